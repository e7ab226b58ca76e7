"""The one decoder of all families. It knows weights, norms, rotary and the MLP; it does not know how attention is done.

Attention is a function given to every call: attend(layer, q, k, v) -> out. The denoising loop passes one that writes
K/V to the paged cache and calls mage ops; the plain loop, the trainer and the tests pass theirs. Names of parameters
are those of Hugging Face Qwen2 / Qwen3 / Llama checkpoints without the prefix "model.".

Test: pytest tests/python/test_transformer.py
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mage_ext._arguments import check_type
from mage_ext.models.config import ModelConfig

if TYPE_CHECKING:
    from mage_ext.models.fused import FusedForward, PackedLayer

# attend(layer, q [B, Q, H, D], k [B, Q, Hkv, D], v [B, Q, Hkv, D]) -> out [B, Q, H, D]; q and k are rotated, unscaled.
# After optimize(), q, k and v are views whose rows are further apart than their heads need.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in float32, rounded once before the weight."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """[D / 2], float32: theta^(-2i / D), in radians per position."""
    return theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, Q, 1, D] of positions [B, Q], angles in float32: position * theta^(-2i / D), halves repeated."""
    angles = positions[..., None].float() * rotary_frequencies(head_dim, theta, positions.device)  # [B, Q, D / 2]
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with the two halves of head_dim as pairs (Hugging Face convention)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, Q, H, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, Q, Hkv, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Decoder of `config`; hidden() runs the layers, logits() the head on the rows that need it.

    Generation is faster after optimize().
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._fused: FusedForward | None = None

    @property
    def optimized(self) -> bool:
        """Whether optimize() was called."""
        return self._fused is not None

    @property
    def compiled(self) -> bool:
        """Whether that was optimize(compile=True)."""
        return self._fused is not None and self._fused.compiled

    @property
    def packed_layers(self) -> "list[PackedLayer]":
        """The weights of an optimized model's layers as its products take them; ValueError before optimize()."""
        if self._fused is None:
            raise ValueError("packed_layers: model must be optimized, got one that is not")
        return self._fused.layers

    def optimize(self, *, compile: bool = False) -> "Transformer":
        """Packs weights and fuses what stands between the matrix products; in place, once, for inference only.

        q, k and v become one product, gate and up another. The parameters stay under their names, as views of the
        packed tensors: state_dict() is the same, load_state_dict() and apply_adapter() write through. Move, convert and
        freeze the model before; afterwards .to(), deepcopy, pickling and load_state_dict(assign=True) are refused.

        Args:
            compile: residual + RMSNorm, rotary (with the norms of q and k) and SwiGLU become one kernel each by
                torch.compile, at the first call of hidden() (seconds, later other rows compile nothing), and so does
                what a step of generate() computes around the model; else they run as plain torch operators. Call
                hidden() once outside before a CUDA graph is captured.
        Returns:
            self.
        Raises:
            TypeError: compile is no bool.
            ValueError: optimized already, a parameter that requires gradients, a linear wrapped by an adapter, or
                parameters of several dtypes or devices.
        """
        check_type("optimize", "compile", compile, bool, "a bool")
        from mage_ext.models.fused import FusedForward

        self._fused = FusedForward(self, compile)
        return self

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final-norm hidden states.

        Args:
            tokens: [B, Q], int64. positions: [B, Q], int64, absolute. attend: see the module's docstring.
        Returns:
            [B, Q, hidden], dtype of the weights.
        """
        if self._fused is not None:
            return self._fused(tokens, positions, attend)
        x = self.embed_tokens(tokens)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, index, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., hidden], in the weights' dtype."""
        return self.lm_head(hidden)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return self.logits(self.hidden(tokens, positions, attend))

    # What would part the parameters from the packed tensors, or need gradients of them.

    def _refuse(self, action: str) -> None:
        if self._fused is not None:
            raise ValueError(f"Transformer: {action} must come before optimize(), got a model that is optimized")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        self._refuse("a change of device or dtype")
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: int) -> Any:
        self._refuse("a copy (state_dict() can be saved)")
        return super().__reduce_ex__(protocol)

    def requires_grad_(self, requires_grad: bool = True) -> "Transformer":
        if requires_grad:
            self._refuse("training")
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign:
            self._refuse("load_state_dict(assign=True)")
        return super().load_state_dict(state_dict, strict, assign)
