"""Low-rank adapters: W' = W + scale * B A on every linear of the decoder layers, and a trained row for the mask token.

Training wraps the linears (add_adapter), shipping stores int8 factors with one float32 scale per rank (save_adapter),
loading folds them into the base weights (apply_adapter), so a loaded model is a plain Transformer. Method: LoRA, arXiv
2106.09685.

Test: pytest tests/python/test_adapter.py
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mage_ext._files import save_tensors
from mage_ext.models.config import Cut
from mage_ext.models.transformer import Transformer

_FORMAT = "mage-adapter-1"


class AdaptedLinear(nn.Module):
    """y = x W^T + scale * (x A^T) B^T with W frozen; A [rank, in], B [out, rank], float32, used in x's dtype."""

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
    """Freezes `model` and wraps every linear of its layers; returns them by name.

    Raises:
        ValueError: rank is not positive, or the model is wrapped or optimized already.
    """
    if rank < 1:
        raise ValueError(f"add_adapter: rank must be at least 1, got {rank}")
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ValueError("add_adapter: model must be plain, got one that is wrapped already")
    if model.optimized:
        raise ValueError("add_adapter: model must not be optimized, got one that is")
    model.requires_grad_(False)
    wrapped = {}
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            wrapped["layers." + name] = AdaptedLinear(module, rank, scale)
            setattr(model.layers.get_submodule(parent), leaf, wrapped["layers." + name])
    return wrapped


def adapter_tensors(wrapped: Mapping[str, AdaptedLinear], mask_row: Tensor) -> dict[str, Tensor]:
    """float32 factors, B already scaled: "<layer>.a" [rank, in], "<layer>.b" [out, rank]; and "mask_row" [hidden]."""
    tensors = {"mask_row": mask_row.detach().float().cpu().clone()}
    for name, module in wrapped.items():
        tensors[name + ".a"] = module.a.detach().float().cpu().clone()
        tensors[name + ".b"] = (module.b.detach().float() * module.scale).cpu()
    return tensors


def save_adapter(
    path: str | Path, tensors: Mapping[str, Tensor], base: str, int8: bool = True, cut: Cut | None = None
) -> None:
    """Writes an adapter as safetensors, whole or not at all: factors as int8 with float32 scales, or all as bfloat16.

    Args:
        path: of the file. tensors: as adapter_tensors gives them. base: name of the base model's file.
        int8: a scale belongs to a rank: a row of a ("<layer>.a.scale" [rank, 1]), a column of b (".b.scale" [1, rank]).
        cut: what was adapted if not the whole base; layers are numbered as they stand there.
    """
    stored: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if int8 and name.endswith((".a", ".b")):
            scale = value.abs().amax(_scale_dim(name), keepdim=True).clamp_min(1e-12) / 127
            stored[name] = (value / scale).round().to(torch.int8)
            stored[name + ".scale"] = scale
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    metadata = {"format": _FORMAT, "base": base}
    if cut is not None:
        metadata["cut"] = json.dumps(asdict(cut))
    save_tensors(path, stored, metadata)


def _read(path: str | Path, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata, and what is stored (if wanted)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_adapter: path must name an adapter file, got {Path(path).name!r}: {error}") from None
    if metadata.get("format") != _FORMAT:
        found = metadata.get("format")
        raise ValueError(f"load_adapter: format of {Path(path).name!r} must be {_FORMAT!r}, got {found!r}")
    return metadata, stored


def adapter_cut(path: str | Path) -> Cut | None:
    """What the adapter of a file was made for if not for its whole base. Raises ValueError as load_adapter does."""
    text = _read(path, tensors=False)[0].get("cut")
    if text is None:
        return None
    try:
        fields = json.loads(text)
        return Cut(tuple(fields["layers"]), fields["rope_theta"], fields["max_positions"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"load_adapter: cut must be layers, rope_theta and max_positions, got {text:.60}: {error}"
        ) from None


def load_adapter(path: str | Path, base: str | None = None, cut: Cut | None = None) -> dict[str, Tensor]:
    """float32 factors of an adapter file, as adapter_tensors gives them.

    Args:
        path: of the file. base: name of the base's file that it must be for; None: any. cut: that it must be for.
    Raises:
        ValueError: not an adapter file, made for another base or cut, a factor without its partner or its scale, or
            values that are not finite.
    """
    metadata, stored = _read(path, tensors=True)
    if base is not None and metadata.get("base") != base:
        raise ValueError(f"load_adapter: base must be {base!r}, got {metadata.get('base')!r}")
    if (own := adapter_cut(path)) != cut:
        name = Path(path).name
        raise ValueError(
            f"load_adapter: cut must be {own} as {name!r} was made for{'' if own else ' the whole base'}, got {cut}"
        )
    return {name: _restored(name, stored) for name in stored if not name.endswith(".scale")}


def cut_tensors(tensors: Mapping[str, Tensor], cut: Cut) -> dict[str, Tensor]:
    """Of an adapter of a whole base, what belongs to a cut of it: factors of the layers that stay, numbered anew."""
    place = {str(layer): i for i, layer in enumerate(cut.layers)}
    kept = {}
    for name, value in tensors.items():
        if name == "mask_row":
            kept[name] = value
            continue
        layers, number, rest = name.split(".", 2)
        if number in place:
            kept[f"{layers}.{place[number]}.{rest}"] = value
    return kept


def _scale_dim(name: str) -> int:
    """The dim over which values share a scale: a scale belongs to a rank, a row of A and a column of B."""
    return 1 if name.endswith(".a") else 0


def _restored(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    value = stored[name]
    if name != "mask_row":
        partner = name[:-1] + ("b" if name.endswith(".a") else "a")
        if not name.endswith((".a", ".b")) or partner not in stored:
            raise ValueError(
                f"load_adapter: {name} must be mask_row or a factor .a or .b with its partner, got neither"
            )
        if value.dim() != 2:
            raise ValueError(f"load_adapter: {name} must be a matrix, got shape {list(value.shape)}")
    if value.dtype == torch.int8:
        scale = stored.get(name + ".scale")
        shape = [1 if i == _scale_dim(name) else size for i, size in enumerate(value.shape)]
        if scale is None or scale.dtype != torch.float32 or list(scale.shape) != shape:
            got = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(f"load_adapter: {name}.scale must be float32 {shape} beside an int8 factor, got {got}")
        value = value.float() * scale
    elif not value.is_floating_point():
        raise ValueError(f"load_adapter: {name} must be int8 or of a float dtype, got {value.dtype}")
    value = value.float()
    if not value.isfinite().all():
        raise ValueError(f"load_adapter: {name} must hold finite values, got NaN or infinity")
    return value


@torch.no_grad()
def apply_adapter(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Folds an adapter into a plain model: W += B A for every pair, and the mask token's row of the embedding.

    Raises:
        ValueError: a pair names no linear of the model's layers or does not fit it; the model is unchanged then.
    """
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, a, b
    linears = {"layers." + name: m for name, m in model.layers.named_modules() if isinstance(m, nn.Linear)}
    for name in sorted({name[:-2] for name in tensors if name != "mask_row"}):
        a, b = tensors.get(name + ".a"), tensors.get(name + ".b")
        if name not in linears or a is None or b is None:
            raise ValueError(
                f"apply_adapter: {name} must be a linear of the model's layers with factors a and b, got none"
            )
        weight = linears[name].weight
        if a.dim() != 2 or b.dim() != 2 or [b.shape[0], a.shape[1]] != list(weight.shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"apply_adapter: {name} must have a [r, {weight.shape[1]}] and b [{weight.shape[0]}, r], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        pairs.append((weight, a, b))
    row = tensors.get("mask_row")
    if row is not None and row.shape != (model.config.hidden_size,):
        raise ValueError(f"apply_adapter: mask_row must be [{model.config.hidden_size}], got {list(row.shape)}")
    for weight, a, b in pairs:
        weight += (b @ a).to(weight.device, weight.dtype)
    if row is not None:
        model.embed_tokens.weight[model.config.mask_id] = row.to(model.embed_tokens.weight)
