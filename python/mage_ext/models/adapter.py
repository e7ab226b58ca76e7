"""Low-rank adapters: W' = W + scale * B A on every linear layer of the decoder blocks, and one trained row for the mask token.

Training wraps the linears (add_adapter), shipping stores int8 factors with one float32 scale per rank (save_adapter), loading folds them
into the base weights (apply_adapter), so a loaded model is a plain Transformer. Method: LoRA, arXiv 2106.09685.

Test: pytest tests/python/test_adapter.py
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mage_ext.models.transformer import Transformer

_FORMAT = "mage-adapter-1"


class AdaptedLinear(nn.Module):
    """y = x W^T + scale * (x A^T) B^T with W frozen; A [rank, in], B [out, rank], float32 masters computed in x's dtype."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.a = nn.Parameter(torch.randn(rank, base.in_features, device=device) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.a.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, self.b.to(x.dtype)) * self.scale


def add_adapter(model: Transformer, rank: int, scale: float = 2.0) -> dict[str, AdaptedLinear]:
    """Freezes `model` and wraps every linear of its layers; returns them by name."""
    if rank < 1:
        raise ValueError(f"add_adapter: rank must be positive, got {rank}")
    model.requires_grad_(False)
    wrapped = {}
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            wrapped["layers." + name] = AdaptedLinear(module, rank, scale)
            setattr(model.layers.get_submodule(parent), leaf, wrapped["layers." + name])
    return wrapped


def adapter_tensors(wrapped: Mapping[str, AdaptedLinear], mask_row: Tensor) -> dict[str, Tensor]:
    """float32 factors by name, B already scaled: "<layer>.a" [rank, in], "<layer>.b" [out, rank]; "mask_row" [hidden]."""
    tensors = {"mask_row": mask_row.detach().float().cpu().clone()}
    for name, module in wrapped.items():
        tensors[name + ".a"] = module.a.detach().float().cpu().clone()
        tensors[name + ".b"] = (module.b.detach().float() * module.scale).cpu()
    return tensors


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], base: str, int8: bool = True) -> None:
    """Writes an adapter: safetensors, factors as int8 with a float32 scale per rank row (a) or column (b), else as bfloat16."""
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if int8 and name.endswith((".a", ".b")):
            dim = 1 if name.endswith(".a") else 0  # the scale belongs to a rank: a row of A, a column of B
            scale = value.abs().amax(dim, keepdim=True).clamp_min(1e-12) / 127
            stored[name] = (value / scale).round().to(torch.int8)
            stored[name + ".scale"] = scale
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    save_file(stored, str(path), metadata={"format": _FORMAT, "base": base})


def load_adapter(path: str | Path, base: str | None = None) -> dict[str, Tensor]:
    """float32 factors of an adapter file, as adapter_tensors gives them.

    Raises:
        ValueError: not an adapter file, or made for another base than `base`.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_adapter: path must name an adapter file, got {Path(path).name!r}: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"load_adapter: format must be {_FORMAT!r}, got {metadata.get('format')!r}")
    if base is not None and metadata.get("base") != base:
        raise ValueError(f"load_adapter: base must be {base!r}, got {metadata.get('base')!r}")
    tensors = {}
    for name, value in stored.items():
        if not name.endswith(".scale"):
            tensors[name] = value.float() * stored[name + ".scale"] if value.dtype == torch.int8 else value.float()
    return tensors


@torch.no_grad()
def apply_adapter(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Folds an adapter into a plain model: W += B A for every pair, and the mask token's row of the embedding.

    Raises:
        ValueError: a pair names no linear of the model, or does not fit it.
    """
    with_pairs = {name[:-2] for name in tensors if name.endswith((".a", ".b"))}
    for name in sorted(with_pairs):
        try:
            weight = model.get_submodule(name).weight
            a, b = tensors[name + ".a"], tensors[name + ".b"]
        except (AttributeError, KeyError):
            raise ValueError(f"apply_adapter: {name} must be a linear layer of the model with factors a and b, got none") from None
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"apply_adapter: {name} must have a [r, {weight.shape[1]}] and b [{weight.shape[0]}, r], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        weight += (b @ a).to(weight.device, weight.dtype)
    if "mask_row" in tensors:
        row = tensors["mask_row"]
        if row.shape != (model.config.hidden_size,):
            raise ValueError(f"apply_adapter: mask_row must be [{model.config.hidden_size}], got {list(row.shape)}")
        model.embed_tokens.weight[model.config.mask_id] = row.to(model.embed_tokens.weight)
