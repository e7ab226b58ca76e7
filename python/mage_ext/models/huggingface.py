"""Reads a Hugging Face folder into the project's own modules: config.json, safetensors, tokenizer. No remote code runs.

Families: Fast-dLLM v2 (model_type "Fast_dLLM_Qwen"), SDAR and TraDo ("sdar"), and Llama layers with the block-diffusion
facts in config.json ("llama"). What a folder says that the modules can't do (scaled rotary, sliding windows, biases
elsewhere) is an error.

Test: pytest tests/python/test_huggingface.py
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mage_ext._arguments import check_device, check_path, got
from mage_ext.models.config import ModelConfig
from mage_ext.models.tokenizer import Tokenizer, read_json
from mage_ext.models.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = ("F32", "BF16", "F16")

# Larger than any model known; a config beyond them is broken or hostile, and would be found out only by running out of
# memory.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 30,
}
_HEADER_LIMIT = 100 << 20  # bytes; the format's own bound


@dataclass(frozen=True)
class Family:
    """What a model_type means beyond its config.json.

    Fields:
        name: family of ModelConfig. qkv_bias, qk_norm: as there.
        block_size_keys: keys of config.json that may hold the block size, first found counts; default_block_size: else.
        mask_tokens: texts of the mask token, first found in the tokenizer counts. default_mask_id: else.
        sub_block_size, token_shift: as in ModelConfig. None: config.json must say.
    """

    name: str
    qkv_bias: bool
    qk_norm: bool
    block_size_keys: tuple[str, ...]
    default_block_size: int | None
    mask_tokens: tuple[str, ...]
    default_mask_id: int | None
    sub_block_size: int | None
    token_shift: bool | None


FAMILIES = {
    "Fast_dLLM_Qwen": Family(
        name="fast_dllm_v2",
        qkv_bias=True,
        qk_norm=False,
        block_size_keys=("bd_size",),
        default_block_size=32,
        mask_tokens=("|<MASK>|",),
        default_mask_id=151665,
        sub_block_size=8,
        token_shift=True,
    ),
    "sdar": Family(
        name="sdar",
        qkv_bias=False,
        qk_norm=True,
        block_size_keys=("block_size", "block_length"),
        default_block_size=4,
        mask_tokens=("<|MASK|>", "<MASK>", "|<MASK>|"),
        default_mask_id=151669,
        sub_block_size=None,
        token_shift=False,
    ),
    "llama": Family(
        name="llama",
        qkv_bias=False,
        qk_norm=False,
        block_size_keys=("block_size",),
        default_block_size=None,
        mask_tokens=(),
        default_mask_id=None,
        sub_block_size=None,
        token_shift=None,
    ),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Fields:
        config: what it is. model: the weights, in eval mode, without gradients. tokenizer: its tokenizer.
    """

    config: ModelConfig
    model: Transformer
    tokenizer: Tokenizer


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> LoadedModel:
    """Reads a folder: configuration, weights, tokenizer.

    Args:
        path: the folder. dtype: torch dtype or its name; None: the one config.json names, float32 if none.
        device: where the weights go.
        overrides: of ModelConfig fields, e.g. block_size=16, where the folder does not say or says something else.
    Raises:
        FileNotFoundError, ValueError: naming the file, the key or tensor, what it must be and what it is.
        TypeError: path is no path, or device no device.
    """
    check_path("load", path)
    device = check_device("load", device)
    folder = Path(path)
    config = read_config(folder, **overrides)
    tokenizer = Tokenizer.from_folder(folder, eos_ids=config.eos_ids, mask_id=config.mask_id)
    return LoadedModel(config, load_weights(folder, config, dtype, device), tokenizer)


def read_config(path: str | Path, **overrides: Any) -> ModelConfig:
    """ModelConfig of a folder's config.json, generation_config.json (EOS) and tokenizer files (mask token).

    Args:
        path: the folder. overrides: fields of ModelConfig that replace or supply what is read.
    Raises:
        FileNotFoundError: no folder or no config.json. ValueError: as in `load`.
        TypeError: path is no path.
    """
    check_path("load", path)
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: path must be a folder with config.json, got {folder}")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"load: {folder} must hold config.json, got none")
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    family = FAMILIES[model_type]
    _refuse_unsupported(config)
    unknown = set(overrides) - set(ModelConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(f"load: overrides must be fields of ModelConfig, got {', '.join(sorted(unknown))}")

    num_heads = _count(config, "num_attention_heads")
    hidden_size = _count(config, "hidden_size")
    vocab_size = _count(config, "vocab_size")
    fields = {
        "family": family.name,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": _count(config, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": _count(config, "num_key_value_heads", default=num_heads),
        "head_dim": _count(config, "head_dim", default=hidden_size // num_heads),
        "intermediate_size": _count(config, "intermediate_size"),
        "rope_theta": _rope_theta(config),
        "rms_eps": _real(config, "rms_norm_eps", 1e-6),
        "max_positions": _count(config, "max_position_embeddings"),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "tie_embeddings": _flag(config, "tie_word_embeddings", False),
        "sub_block_size": family.sub_block_size,
    }
    block_keys = [key for key in family.block_size_keys if config.get(key) is not None]
    fields["block_size"] = _count(config, block_keys[0]) if block_keys else family.default_block_size
    fields["token_shift"] = _flag(config, "token_shift", family.token_shift)
    if config.get("sub_block_size") is not None:
        fields["sub_block_size"] = _count(config, "sub_block_size")
    fields["mask_id"] = None if "mask_id" in overrides else _mask_id(folder, config, family, vocab_size)
    fields["eos_ids"] = _eos_ids(folder, config, vocab_size)
    fields.update(overrides)
    if fields["sub_block_size"] is not None and fields["sub_block_size"] == fields["block_size"]:
        fields["sub_block_size"] = None  # one sub-block is the block
    missing = {"block_size": family.block_size_keys, "token_shift": ("token_shift",), "mask_id": ("mask_token_id",)}
    for name, keys in missing.items():
        if fields[name] is None:
            raise ValueError(f"config.json: {' or '.join(keys)} must be given for model_type {model_type!r}, got none")
    return ModelConfig(**fields)


def load_weights(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The Transformer of `config` with the weights of a folder's safetensors files; arguments and errors as in
    `load`."""
    folder = Path(path)
    if dtype is None:
        stored = read_json(folder / "config.json")
        dtype = stored.get("torch_dtype") or stored.get("dtype") or "float32"
    dtype = resolve_dtype(dtype)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for file in _safetensors_files(folder):
        _check_header(file.path)
        try:
            with safe_open(file.path, framework="pt", device="cpu") as reader:
                _check_keys(file, reader.keys())
                for key in reader.keys():
                    name = key.removeprefix("model.")
                    if name.endswith(".rotary_emb.inv_freq"):
                        continue  # written by old versions of transformers; it follows from rope_theta
                    if name not in shapes and name != "lm_head.weight":
                        raise ValueError(f"{file.path.name}: {key} is not a tensor of {config.family}")
                    if name in weights:
                        raise ValueError(f"{file.path.name}: {key} must be stored once, got it twice")
                    view = reader.get_slice(key)
                    if view.get_dtype() not in _STORED_DTYPES:
                        stored = ", ".join(_STORED_DTYPES)
                        raise ValueError(f"{file.path.name}: {key} must be {stored}, got {view.get_dtype()}")
                    if tuple(view.get_shape()) != tuple(shapes[name]):
                        raise ValueError(
                            f"{file.path.name}: {key} must have shape {list(shapes[name])}, got {view.get_shape()}"
                        )
                    weights[name] = reader.get_tensor(key).to(device=device, dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"{file.path.name}: must be a complete safetensors file, got: {error}") from None
    if config.tie_embeddings:
        _take_tied_head(weights)
    missing = [_stored_name(name) for name in shapes if name not in weights]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{folder.name}: safetensors must hold every tensor of {config.family}, missing {shown}")
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class _WeightFile:
    """A safetensors file and the keys that the index promises in it (None: no index)."""

    path: Path
    promised: frozenset[str] | None


def _safetensors_files(folder: Path) -> list[_WeightFile]:
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index_path.exists():
        if single.exists():
            return [_WeightFile(single, None)]
        hint = "; pickled weights (.bin, .pt) are not read" if any(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"load: {folder} must hold model.safetensors or {index_path.name}{hint}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ValueError(f"{index_path.name}: weight_map must be an object of tensor name to file, got {weight_map!r}")
    by_file: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or PurePath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"{index_path.name}: {key} must be in a file of this folder, got {name!r}")
        by_file.setdefault(name, set()).add(key)
    for name in sorted(by_file):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{index_path.name}: {name} must be in {folder}, got no such file")
    return [_WeightFile(folder / name, frozenset(keys)) for name, keys in sorted(by_file.items())]


def _check_header(path: Path) -> None:
    """Bounds and form of the header before the library reads it, so that a hostile one costs nothing and is named."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError(f"{path.name}: must be a safetensors file, got a Git LFS pointer; fetch the file itself")
        if len(start) < 8:
            raise ValueError(f"{path.name}: must be a complete safetensors file, got {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError(
                f"{path.name}: header must be at most {min(_HEADER_LIMIT, size - 8)} bytes, got a length of {length}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: header must be JSON, got: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: header must be a JSON object, got {type(header).__name__}")
    end = 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(offsets, list)
            or len(offsets) != 2
            or not all(isinstance(offset, int) for offset in offsets)
            or not 0 <= offsets[0] <= offsets[1]
        ):
            raise ValueError(f"{path.name}: data_offsets of {key} must be [begin, end], got {offsets!r}")
        end = max(end, offsets[1])
    if end != size - 8 - length:
        raise ValueError(f"{path.name}: must hold {end} bytes of tensors after its header, got {size - 8 - length}")


def _check_keys(file: _WeightFile, keys: list[str]) -> None:
    if file.promised is None:
        return
    missing, extra = file.promised - set(keys), set(keys) - file.promised
    if missing:
        raise ValueError(f"{file.path.name}: {min(missing)} must be in it as the index says, got no such tensor")
    if extra:
        raise ValueError(f"{file.path.name}: {min(extra)} is not in the index")


def _take_tied_head(weights: dict[str, Tensor]) -> None:
    """A tied head is stored not at all, or equal to the embedding; afterwards the two names are one tensor."""
    embedding, head = weights.get("embed_tokens.weight"), weights.get("lm_head.weight")
    if embedding is None:
        return
    if head is not None and not torch.equal(head, embedding):
        raise ValueError(
            "config.json: tie_word_embeddings must be false for a stored lm_head.weight that differs from "
            "model.embed_tokens.weight, got true"
        )
    weights["lm_head.weight"] = embedding


def _stored_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype that weights may have, of itself or its name. Raises ValueError for others."""
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."), dtype)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        shown = dtype if isinstance(dtype, torch.dtype) else got(dtype)
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {shown}")
    return dtype


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    scaling = config.get("rope_scaling")
    if scaling is not None and (
        not isinstance(scaling, Mapping) or scaling.get("rope_type", scaling.get("type")) != "default"
    ):
        raise ValueError(f"config.json: rope_scaling must be null, got {scaling!r}")
    parameters = config.get("rope_parameters")
    if parameters is not None and (
        not isinstance(parameters, Mapping) or parameters.get("rope_type", "default") != "default"
    ):
        raise ValueError(f"config.json: rope_parameters must be of rope_type 'default', got {parameters!r}")
    layer_types = config.get("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or set(layer_types) - {"full_attention"}):
        raise ValueError(f"config.json: layer_types must all be 'full_attention', got {layer_types!r}")
    for key, expected in (
        ("hidden_act", "silu"),
        ("use_sliding_window", False),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
        ("pretraining_tp", 1),
        ("quantization_config", None),
    ):
        # Qwen2.5 always has its q/k/v biases; its configs may say so with attention_bias.
        if key == "attention_bias" and FAMILIES[config["model_type"]].qkv_bias:
            continue
        value = config.get(key, expected)
        if value is not None and value != expected:
            raise ValueError(f"config.json: {key} must be {expected!r}, got {value!r}")


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"config.json: {key} must be given, got none")
    limit = _LIMITS.get(key, 1 << 30)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ValueError(f"config.json: {key} must be an integer in [1, {limit}], got {value!r}")
    return value


def _real(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def _flag(config: Mapping[str, Any], key: str, default: bool | None) -> bool | None:
    value = config.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, got {value!r}")
    return value


def _rope_theta(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    source = parameters if "rope_theta" in parameters else config
    if source.get("rope_theta") is None:
        raise ValueError("config.json: rope_theta must be given, got none")
    return _real(source, "rope_theta", 0.0)


def _id(key: str, value: Any, vocab_size: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ValueError(f"{key} must be an id in [0, vocab_size = {vocab_size}), got {value!r}")
    return value


def _mask_id(folder: Path, config: Mapping[str, Any], family: Family, vocab_size: int) -> int | None:
    """Of config.json's mask_token_id or mask_id, else the tokenizer's mask token, else the family's default."""
    for key in ("mask_token_id", "mask_id"):
        if config.get(key) is not None:
            return _id(f"config.json: {key}", config[key], vocab_size)
    added: dict[str, Any] = {}
    if (folder / "tokenizer.json").exists():
        entries = read_json(folder / "tokenizer.json").get("added_tokens") or []
        added.update({entry.get("content"): entry.get("id") for entry in entries if isinstance(entry, Mapping)})
    if (folder / "added_tokens.json").exists():
        added.update(read_json(folder / "added_tokens.json"))
    for text in family.mask_tokens:
        if text in added:
            return _id(f"tokenizer: {text}", added[text], vocab_size)
    if family.default_mask_id is None:
        return None
    return _id(f"config.json: mask_token_id (by default {family.default_mask_id})", family.default_mask_id, vocab_size)


def _eos_ids(folder: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Of generation_config.json and config.json together; a checkpoint's chat end and text end are often in different
    files."""
    sources = [("config.json", config)]
    if (folder / "generation_config.json").exists():
        sources.insert(0, ("generation_config.json", read_json(folder / "generation_config.json")))
    found: list[int] = []
    for name, source in sources:
        value = source.get("eos_token_id")
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            number = _id(f"{name}: eos_token_id", item, vocab_size)
            if number not in found:
                found.append(number)
    return tuple(found)
