"""The reader of Hugging Face folders against transformers itself. Run: pytest tests/python/test_huggingface.py"""

import json

import pytest
import torch

from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.models.huggingface import load, load_weights, read_config
from mage_ext.models.tokenizer import byte_level_bpe
from mage_ext.models.transformer import Transformer
from mage_ext.testing.plain_loop import block_causal_mask, plain_generate

transformers = pytest.importorskip("transformers")

# What a dLLM's config.json says on top of its base's.
_DLLM = {
    "Qwen2": {"model_type": "Fast_dLLM_Qwen", "bd_size": 8, "mask_token_id": 5},
    "Qwen3": {"model_type": "sdar", "block_size": 4, "mask_token_id": 5},
    "Llama": {"model_type": "llama", "block_size": 16, "mask_token_id": 5, "token_shift": True},
}
_SHAPES = {
    "base": dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "head_dim_128": dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=128),
    "mha": dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=3, head_dim=32),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    transformers.utils.logging.disable_progress_bar()


def _save(folder, base, *, tied=False, shards=False, tokenizer=True, **config):
    """A folder that transformers wrote, with config.json turned into the dLLM's; returns the transformers model."""
    arguments = dict(
        vocab_size=128,
        intermediate_size=80,
        num_hidden_layers=3,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        eos_token_id=[7, 9],
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        attn_implementation="eager",
        **{**_SHAPES["base"], **config},
    )
    reference = getattr(transformers, f"{base}ForCausalLM")(getattr(transformers, f"{base}Config")(**arguments)).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.dim() == 1:  # biases and norms start as 0 and 1, which hides swapped ones
                weight.add_(0.3 * torch.randn_like(weight))
    reference.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    _edit(folder / "config.json", **_DLLM[base])
    if tokenizer:
        letters = {chr(ord("a") + i): i for i in range(26)}
        byte_level_bpe(letters, [], special_tokens=["<eos>"]).save(str(folder / "tokenizer.json"))
    return reference


def _edit(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def _masked_logits(model, tokens, mask):
    """Logits of our Transformer with plain dense attention under mask [T, T]."""

    def attend(layer, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
        ).transpose(1, 2)

    return model(tokens, torch.arange(tokens.shape[1])[None], attend)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize("base", _DLLM)
def test_logits_agree_with_transformers(base, shape, tied, shards, tmp_path):
    reference = _save(tmp_path, base, tied=tied, shards=shards, **_SHAPES[shape])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    loaded = load(tmp_path)
    model, config = loaded.model, loaded.config
    assert (config.head_dim, config.tie_embeddings, config.num_layers) == (_SHAPES[shape]["head_dim"], tied, 3)
    assert model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr() or not tied
    assert not any(weight.requires_grad for weight in model.parameters())
    tokens = torch.randint(0, 128, (1, 41))
    causal = torch.ones(41, 41, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = reference(tokens).logits
        torch.testing.assert_close(_masked_logits(model, tokens, causal), expected, rtol=0, atol=1e-4)
        # Block-causal, by the 4-D mask that transformers adds to the scores.
        mask = block_causal_mask(41, config.block_size)
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
        expected = reference(tokens, attention_mask=added, position_ids=torch.arange(41)[None]).logits
        got = _masked_logits(model, tokens, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1 and (got - _masked_logits(model, tokens, causal)).abs().max() > 0.01


@pytest.mark.parametrize("base", _DLLM)
def test_facts_of_the_families(base, tmp_path):
    _save(tmp_path, base)
    config = read_config(tmp_path)
    expected = {
        "Qwen2": ("fast_dllm_v2", 8, None, True, True, False),
        "Qwen3": ("sdar", 4, None, False, False, True),
        "Llama": ("llama", 16, None, True, False, False),
    }[base]
    assert expected == (
        config.family,
        config.block_size,
        config.sub_block_size,
        config.token_shift,
        config.qkv_bias,
        config.qk_norm,
    )
    assert config.eos_ids == (7, 9) and config.mask_id == 5 and config.rope_theta == 50000.0
    assert read_config(tmp_path, block_size=32, mask_id=3, sub_block_size=8).sub_block_size == 8


def test_defaults_of_released_checkpoints(tmp_path):
    """Their config.json has no mask id, and Fast-dLLM's rope_theta stands at the top level."""
    _save(tmp_path, "Qwen2")
    _edit(
        tmp_path / "config.json",
        vocab_size=151936,
        bd_size=32,
        mask_token_id=...,
        rope_parameters=...,
        rope_theta=1e6,
        rope_scaling=None,
        eos_token_id=151645,
        torch_dtype="bfloat16",
        sliding_window=32768,
    )
    _edit(tmp_path / "generation_config.json", eos_token_id=[151645, 151643])
    config = read_config(tmp_path)
    assert (config.mask_id, config.block_size, config.sub_block_size, config.rope_theta) == (151665, 32, 8, 1e6)
    assert config.eos_ids == (151645, 151643)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"|<MASK>|": 151700}))
    assert read_config(tmp_path).mask_id == 151700
    _edit(tmp_path / "config.json", model_type="sdar", bd_size=...)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|MASK|>": 151669}))
    config = read_config(tmp_path)
    assert (config.mask_id, config.block_size, config.sub_block_size, config.qk_norm) == (151669, 4, None, True)


def test_mask_token_of_tokenizer_json(tmp_path):
    _save(tmp_path, "Qwen2", tokenizer=False)
    _edit(tmp_path / "config.json", mask_token_id=...)
    byte_level_bpe({"a": 0}, [], special_tokens=["<x>", "|<MASK>|"]).save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path)
    assert loaded.config.mask_id == loaded.tokenizer.mask_id == 2
    assert loaded.tokenizer.eos_ids == (7, 9)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes(name, tmp_path):
    """Of the argument, else of config.json; stored and wanted dtype may differ."""
    _save(tmp_path, "Llama", dtype=getattr(torch, name))
    _edit(tmp_path / "config.json", dtype=name)
    assert load(tmp_path).model.embed_tokens.weight.dtype == getattr(torch, name)
    assert load(tmp_path, "bfloat16").model.norm.weight.dtype == torch.bfloat16
    assert load(tmp_path, torch.float32).model.lm_head.weight.dtype == torch.float32


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path):
    from safetensors.torch import load_file, save_file

    _save(tmp_path, "Qwen2", tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings must be false"):
        load(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    from safetensors.torch import load_file, save_file

    reference = _save(tmp_path, "Llama")
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path).model
    assert torch.equal(model.norm.weight, reference.model.norm.weight)


@pytest.mark.parametrize("base", _DLLM)
def test_a_loaded_model_generates(base, tmp_path):
    _save(tmp_path, base, shards=True)
    loaded = load(tmp_path)
    config = DenoiseConfig(max_new_tokens=24, ignore_eos=True)
    prompts = [loaded.tokenizer.encode("hello"), loaded.tokenizer.encode("blockwise" * 4)]
    for prompt, result in zip(
        prompts, generate(loaded.model, prompts, config, tokenizer=loaded.tokenizer), strict=True
    ):
        assert result.tokens == plain_generate(loaded.model, prompt, config).tokens
        assert result.text == loaded.tokenizer.decode(result.tokens)


def test_no_code_of_the_folder_runs(tmp_path):
    _save(tmp_path, "Qwen2")
    (tmp_path / "modeling.py").write_text("raise SystemExit('ran')")
    _edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert isinstance(load_weights(tmp_path, read_config(tmp_path)), Transformer)
