"""The forward of an optimized Transformer: packed weights, and one function for each gap between matrix products.

A layer is four products (q|k|v, o, gate|up, down) and four functions between them. Every function rounds where the
plain modules round, so that the two forwards differ only by the order of sums inside a product or a norm; torch.compile
is told to keep those roundings.

Test: pytest tests/python/test_transformer.py
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from mage_ext.models.transformer import Attend, rms_norm, rotary_frequencies

if TYPE_CHECKING:
    from mage_ext.models.transformer import Transformer

_COMPILE_OPTIONS = {"emulate_precision_casts": True}


def rotary_table(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos [N, 1, D] of positions [N], and sin negated in its first half, which is what `rotate_qk` multiplies with."""
    angles = positions[:, None, None].float() * inv_freq  # [N, 1, D / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its RMSNorm; [N, hidden]."""
    x = x + y
    return x, rms_norm(x, weight, eps)


def rotate_qk(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Rotated q and k [N, H + Hkv, D] of the product [N, (H + 2 Hkv) * D]."""
    qk = _heads_of_qk(qkv, num_heads, num_kv_heads)
    return qk * cos + _swap_halves(qk) * sin


def norm_rotate_qk(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
) -> Tensor:
    """The same with RMSNorm over every head of q and k first; weights [D].

    The swapped halves are normed a second time instead of being taken from the normed head: inductor fuses that with
    the mean into one kernel, the other way it needs two.
    """
    qk = _heads_of_qk(qkv, num_heads, num_kv_heads)
    inverse = torch.rsqrt(qk.float().square().mean(-1, keepdim=True) + eps)
    is_q = torch.arange(num_heads + num_kv_heads, device=qkv.device)[:, None] < num_heads
    weight = torch.where(is_q, q_weight, k_weight)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x.float() * inverse).to(x.dtype)

    return normed(qk, weight) * cos + normed(_swap_halves(qk), _swap_halves(weight)) * sin


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [N, intermediate] of the product [N, 2 * intermediate]."""
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def _heads_of_qk(qkv: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    return heads[:, : num_heads + num_kv_heads]


def _swap_halves(x: Tensor) -> Tensor:
    """The two halves of the last dim in the other order; the sign of `transformer.rotate` is in sin."""
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


# Arguments at the front that have a row per token.
_ROWS_OF = {rms_norm: 1, rotary_table: 1, add_norm: 2, rotate_qk: 3, norm_rotate_qk: 3, silu_mul: 1}


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile: sizes are constants but for the rows, dim 0 of the first arguments.

    fullgraph makes a limit of recompilations an error, not a fall back to plain operators.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=_COMPILE_OPTIONS)
    rows_of = _ROWS_OF[function]

    def call(*arguments: Any) -> Any:
        if arguments[0].shape[0] > 1:  # torch takes a size of 1 for a constant, always
            for argument in arguments[:rows_of]:
                torch._dynamo.mark_dynamic(argument, 0)
        return compiled(*arguments)

    return call


@dataclass(frozen=True)
class PackedLayer:
    """Weights of a layer, as the products take them: qkv [(H + 2 Hkv) * D, hidden], gate_up [2 * intermediate,
    hidden]; the norms of q and k are None where the family has none."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    post_attention_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedForward:
    """hidden(tokens, positions, attend) of a Transformer whose weights it packs."""

    def __init__(self, model: "Transformer", compile: bool):
        _check(model)
        config, weight = model.config, model.embed_tokens.weight
        self.config, self.compiled = config, compile
        self.embedding, self.final_norm = weight, model.norm.weight
        self.inv_freq = rotary_frequencies(config.head_dim, config.rope_theta, weight.device)
        self.layers = []
        for layer in model.layers:
            self.layers.append(_pack_layer(layer))
            if weight.is_cuda:
                torch.cuda.empty_cache()  # the parts don't fit what the next layer packs, and would pile up
        wrap = _compiled if compile else lambda function: function
        self.norm, self.add_norm, self.silu_mul = wrap(rms_norm), wrap(add_norm), wrap(silu_mul)
        self.rotary_table = wrap(rotary_table)
        self.rotate = wrap(norm_rotate_qk if config.qk_norm else rotate_qk)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        config, eps, shape = self.config, self.config.rms_eps, tokens.shape
        heads = (config.num_heads, config.num_kv_heads)
        x = embedding(tokens.flatten(), self.embedding)  # [N, hidden]
        cos, sin = self.rotary_table(positions.expand(shape).flatten(), self.inv_freq, x.dtype)
        normed = self.norm(x, self.layers[0].input_norm, eps)
        for index, layer in enumerate(self.layers):
            qkv = linear(normed, layer.qkv, layer.qkv_bias)
            norms = (layer.q_norm, layer.k_norm, eps) if config.qk_norm else ()
            qk = self.rotate(qkv, cos, sin, *heads, *norms)
            q, k = qk.unflatten(0, shape).split(heads, 2)
            v = qkv.unflatten(0, shape).unflatten(-1, (-1, config.head_dim))[:, :, -config.num_kv_heads :]
            out = attend(index, q, k, v)
            x, normed = self.add_norm(x, linear(out.reshape(len(x), -1), layer.o), layer.post_attention_norm, eps)
            act = self.silu_mul(linear(normed, layer.gate_up))
            next_norm = self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.final_norm
            x, normed = self.add_norm(x, linear(act, layer.down), next_norm, eps)
        return normed.unflatten(0, shape)


def _check(model: "Transformer") -> None:
    if model.optimized:
        raise ValueError("optimize: model must not be optimized, got one that is")
    for name, module in model.layers.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            raise ValueError(f"optimize: layers.{name} must be a plain linear, got {type(module).__name__}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"optimize: model must be frozen (requires_grad_(False)), got {name} with gradients")
        for fact in ("dtype", "device"):
            expected, got = getattr(model.embed_tokens.weight, fact), getattr(parameter, fact)
            if got != expected:
                raise ValueError(f"optimize: {name} must have the {fact} of embed_tokens, {expected}, got {got}")


def _pack_layer(layer: nn.Module) -> PackedLayer:
    attn, mlp = layer.self_attn, layer.mlp
    qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
    return PackedLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=_pack([linear.weight for linear in qkv]),
        qkv_bias=None if attn.q_proj.bias is None else _pack([linear.bias for linear in qkv]),
        q_norm=None if attn.q_norm is None else attn.q_norm.weight,
        k_norm=None if attn.k_norm is None else attn.k_norm.weight,
        o=attn.o_proj.weight,
        post_attention_norm=layer.post_attention_layernorm.weight,
        gate_up=_pack([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
    )


def _pack(parts: list[nn.Parameter]) -> Tensor:
    """Parameters one after another along dim 0, which become views of the result."""
    packed = torch.cat([part.data for part in parts])
    for part, view in zip(parts, packed.split([len(part) for part in parts]), strict=True):
        part.data = view
    return packed
