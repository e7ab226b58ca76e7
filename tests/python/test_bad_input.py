"""What the loop, the cache and the readers of files refuse: the message names the argument, what it must be and what
came.

The operators' own bad inputs are in their test files. Run: pytest tests/python/test_bad_input.py
"""

import functools
import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mage_ext import models, sampling
from mage_ext.cache import OutOfPages, PagedCache, RaggedBatch
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import answers, needles
from mage_ext.models import builtin
from mage_ext.models.huggingface import load, load_weights, read_config
from mage_ext.models.tokenizer import Tokenizer, byte_level_bpe
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig
from mage_ext.testing.tiny import tiny_config, tiny_model

NAN = float("nan")


@functools.cache
def _model(variant="llama_shift"):
    return tiny_model(tiny_config(variant, num_layers=2))


def _raises(match, call, error=ValueError):
    with pytest.raises(error, match=match):
        call()


# --------------------------------------------------------------------------- configuration

_CONFIGS = {
    "method": (
        dict(mode="method"),
        "method must be given with mode \"method\" and only there, got mode 'method' and None",
    ),
    "method_kind": (dict(mode="method", method=3), "method must be an AttentionMethod, got 3"),
    "exact_steps": (dict(exact_steps=0), "exact_steps must be an integer >= 1, got 0"),
    "strict": (dict(strict=1), "strict must be a bool, got 1"),
    "cuda_graphs": (dict(cuda_graphs="on"), "cuda_graphs must be a bool, got 'on'"),
    "fuse_commit": (dict(fuse_commit=None), "fuse_commit must be a bool, got None"),
    "mode": (dict(mode="fast"), "mode must be one of exact, mage, method, got 'fast'"),
    "max_new_tokens": (dict(max_new_tokens=0), "max_new_tokens must be an integer >= 1, got 0"),
    "max_new_tokens_float": (dict(max_new_tokens=2.0), "max_new_tokens must be an integer >= 1, got 2.0"),
    "refresh": (dict(refresh="never"), "refresh must be one of block, blocks, kept_mass, got 'never'"),
    "refresh_blocks": (dict(refresh_blocks=0), "refresh_blocks must be an integer >= 1, got 0"),
    "refresh_bound": (dict(refresh_bound=1.5), r"refresh_bound must be a number in \[0, 1\], got 1.5"),
    "refresh_bound_nan": (dict(refresh_bound=NAN), r"refresh_bound must be a number in \[0, 1\], got nan"),
    "sampler_as_text": (dict(sampler="sequential"), "sampler must be a SamplerConfig, got 'sequential'"),
    "selection_as_dict": (dict(selection={"k": 32}), "selection must be a SelectionConfig"),
    "dense_layers": (dict(dense_layers=[0, 1]), r"dense_layers must be a tuple of layer numbers, got \[0, 1\]"),
    "dense_below": (dict(dense_layers=(-1,)), r"dense_layers must be different numbers from 0 on, got \(-1,\)"),
    "dense_twice": (dict(dense_layers=(0, 0)), r"dense_layers must be different numbers from 0 on, got \(0, 0\)"),
    "prefill_chunk": (dict(prefill_chunk=-32), "prefill_chunk must be an integer >= 1, got -32"),
    "sub_block_size": (dict(sub_block_size=0), "sub_block_size must be an integer >= 1, got 0"),
    "select_override": (dict(select_override="recency"), "select_override must be callable, got 'recency'"),
    "override_of_candidates": (
        dict(select_override=len, selection=SelectionConfig(k=64, g=1, candidates=512)),
        "select_override must be None with selection.candidates",
    ),
    "layer_rule_over_the_prefix": (
        dict(selection=SelectionConfig(rule="layer", norm="prefix")),
        'selection.norm must be "context" with rule "layer"',
    ),
}


@pytest.mark.parametrize("case", _CONFIGS)
def test_denoise_config(case):
    fields, match = _CONFIGS[case]
    _raises(f"DenoiseConfig: {match}", lambda: DenoiseConfig(**fields), (ValueError, TypeError))


_PARTS = {
    "unknown_sampler": (lambda: SamplerConfig("greedy"), "name must be one of sequential.* got 'greedy'"),
    "nan_threshold": (lambda: SamplerConfig(threshold=NAN), r"threshold must be a number in \[0, 1\], got nan"),
    "no_tokens_per_step": (lambda: SamplerConfig(tokens_per_step=0), "tokens_per_step must be an integer >= 1"),
    "nan_bound": (lambda: SamplerConfig(entropy_bound=NAN), "entropy_bound must be a number"),
    "negative_temperature": (lambda: SamplerConfig(temperature=-1), "temperature must be a number"),
    "top_p_of_0": (lambda: SamplerConfig(top_p=0.0), r"top_p must be a number in \(0, 1\], got 0.0"),
    "k_not_a_multiple": (lambda: SelectionConfig(k=100, g=32), "k must be a multiple of g = 32, got 100"),
    "unknown_rule": (lambda: SelectionConfig(rule="best"), "rule must be one of fixed, layer, mass, joint"),
    "unknown_g": (lambda: SelectionConfig(g=8), "g must be one of 1, 16, 32, 64, got 8"),
    "negative_sinks": (lambda: SelectionConfig(sinks=-1), "sinks must be an integer >= 0, got -1"),
}


@pytest.mark.parametrize("case", _PARTS)
def test_sampler_and_selection_config(case):
    call, match = _PARTS[case]
    _raises(match, call)


_MODELS = {
    "rope_theta_0": (dict(rope_theta=0.0), "rope_theta must be a positive finite number, got 0.0"),
    "rope_theta_inf": (dict(rope_theta=float("inf")), "rope_theta must be a positive finite number, got inf"),
    "rope_theta_text": (dict(rope_theta="1e4"), "rope_theta must be a positive finite number, got '1e4'"),
    "rms_eps_nan": (dict(rms_eps=NAN), "rms_eps must be a positive finite number, got nan"),
    "rms_eps_negative": (dict(rms_eps=-1e-6), "rms_eps must be a positive finite number, got -1e-06"),
    "rms_eps_true": (dict(rms_eps=True), "rms_eps must be a positive finite number, got True"),
    "eos_past_vocabulary": (dict(eos_ids=(1, 97)), r"eos_ids must be ids in \[0, vocab_size = 97\), got 97"),
    "eos_negative": (dict(eos_ids=(-1,)), "eos_ids must be ids in .* got -1"),
    "layers_true": (dict(num_layers=True), "num_layers must be a positive integer, got True"),
    "sub_block_true": (dict(sub_block_size=True), "sub_block_size must divide block_size .* got True"),
    "token_shift_text": (dict(token_shift="a"), "token_shift must be a bool, got 'a'"),
    "qk_norm_number": (dict(qk_norm=1), "qk_norm must be a bool, got 1"),
    "tie_embeddings_none": (dict(tie_embeddings=None), "tie_embeddings must be a bool, got None"),
    "eos_none": (dict(eos_ids=None), "eos_ids must be a tuple of ids, got None"),
    "eos_text": (dict(eos_ids="1"), "eos_ids must be a tuple of ids, got '1'"),
    "mask_true": (dict(mask_id=True), "mask_id must be in .* got True"),
}


@pytest.mark.parametrize("case", _MODELS)
def test_model_config(case):
    fields, match = _MODELS[case]
    _raises(f"ModelConfig: {match}", lambda: tiny_config("llama_shift", **fields))


# --------------------------------------------------------------------------- generate

_GENERATE = {
    "no_prompts": (lambda m: generate(m, []), "prompts must hold at least one prompt, got none"),
    "text": (lambda m: generate(m, "hello"), "prompts must be a list of lists of token ids, got 'hello'"),
    "one_flat_prompt": (lambda m: generate(m, [1, 2, 3]), "prompts must be a list of lists"),
    "id_past_vocabulary": (
        lambda m: generate(m, [[1], [2, 97]]),
        r"prompts\[1\] must hold ids in \[0, .* 97\), got 97",
    ),
    "true_id": (lambda m: generate(m, [[1, True, 97]]), r"prompts\[0\] must hold ids .* got True"),
    "large_id": (lambda m: generate(m, [[3, 1 << 70]]), rf"prompts\[0\] must hold ids .* got {1 << 70}"),
    "first_bad_id": (lambda m: generate(m, [[0, 96], (5, -2, 97)]), r"prompts\[1\] must hold ids .* got -2"),
    "text_id": (lambda m: generate(m, [["a"]]), r"prompts\[0\] must hold ids .* got 'a'"),
    "negative_id": (lambda m: generate(m, [[-1]]), r"prompts\[0\] must hold ids .* got -1"),
    "float_id": (lambda m: generate(m, [[1.0]]), r"prompts\[0\] must hold ids .* got 1.0"),
    "empty_prompt": (lambda m: generate(m, [[1], []]), r"prompts\[1\] must have at least one token under token shift"),
    "prompt_too_long": (
        lambda m: generate(m, [[1] * 500], DenoiseConfig(max_new_tokens=13)),
        r"prompts\[0\] and max_new_tokens must fit the model's 512 positions, got 500 \+ 13 = 528",
    ),
    "seeds_missing": (lambda m: generate(m, [[1], [2]], seeds=[1]), "seeds must be 2 integers, one per prompt, got"),
    "seed_too_large": (lambda m: generate(m, [[1]], seeds=[1 << 63]), "seeds must fit 64 bits"),
    "dense_layer_unknown": (
        lambda m: generate(m, [[1]], DenoiseConfig(mode="mage", dense_layers=(0, 2))),
        r"dense_layers must be in \[0, 2\), got 2",
    ),
    "every_layer_dense": (
        lambda m: generate(m, [[1]], DenoiseConfig(mode="mage", dense_layers=(0, 1))),
        "dense_layers must leave a layer that selects, got all 2",
    ),
    "sub_block_size": (
        lambda m: generate(m, [[1]], DenoiseConfig(sub_block_size=5)),
        "sub_block_size must divide the model's block of 16, got 5",
    ),
    "cache_of_another_model": (
        lambda m: generate(m, [[1]], cache=PagedCache(3, 2, 16, num_pages=9)),
        "cache.num_layers must be the model's 2, got 3",
    ),
    "cache_of_another_dtype": (
        lambda m: generate(m, [[1]], cache=PagedCache.for_model(m, num_pages=9, dtype=torch.float16)),
        "cache.dtype must be the model's torch.float32, got torch.float16",
    ),
    "state_of_another_model": (
        lambda m: generate(_model("llama"), prefill(m, [[1]])),
        "model and cache must be those of the state's prefill",
    ),
    "released_state": (
        lambda m: (state := prefill(m, [[1]]), state.release(), generate(m, state)),
        "state must not have been used up or released",
    ),
}


@pytest.mark.parametrize("case", _GENERATE)
def test_generate(case):
    call, match = _GENERATE[case]
    _raises(match, lambda: call(_model()), (ValueError, TypeError))


class _Method:
    """Attends nothing and returns what it is made with."""

    def __init__(self, make):
        self.make = make

    def prepare(self):
        pass

    def written(self, *_):
        pass

    def attend(self, forward, layer, q, k_cache, v_cache):
        return self.make(q)

    def tokens_read(self, prefix_len, num_tokens):
        return num_tokens


_RETURNED = {
    "nothing": (lambda q: None, "must be a tensor, got None"),
    "another_dtype": (lambda q: q.double(), "must be float32, got torch.float64"),
    "flat": (lambda q: q.flatten(2), r"must have shape \[1, 4, 4, 16\], got \[1, 4, 64\]"),
}


@pytest.mark.parametrize("case", _RETURNED)
def test_what_a_method_returns(case):
    make, match = _RETURNED[case]
    config = DenoiseConfig(mode="method", method=_Method(make), dense_layers=(), max_new_tokens=8)
    call = functools.partial(generate, _model("sdar"), [[1, 2]], config)
    _raises(f"_Method: the result of attend {match}", call, (ValueError, TypeError))


def test_a_refused_call_takes_no_pages():
    cache = PagedCache.for_model(_model(), num_pages=9)
    for prompts in ([[1], []], [[1], [97]], [[1] * 512]):
        _raises("generate: prompts", lambda prompts=prompts: generate(_model(), prompts, cache=cache))
    assert cache.num_free == 9


# --------------------------------------------------------------------------- cache

_CACHES = {
    "page_size": (lambda: PagedCache(1, 1, 8, num_pages=1, page_size=48), "page_size must be one of .* got 48"),
    "num_pages_beyond_int32": (
        lambda: PagedCache(1, 1, 8, num_pages=1 << 31),
        r"num_pages must be in \[1, 2147483647\], got 2147483648",
    ),
    "page_size_true": (lambda: PagedCache(1, 1, 8, num_pages=1, page_size=True), "page_size must be one of"),
    "num_pages": (lambda: PagedCache(1, 1, 8, num_pages=0), "num_pages must be an integer >= 1, got 0"),
    "num_layers": (lambda: PagedCache(0, 1, 8, num_pages=1), "num_layers must be an integer >= 1, got 0"),
    "dtype": (lambda: PagedCache(1, 1, 8, num_pages=1, dtype=torch.int8), "dtype must be float32, .* got torch.int8"),
    "out_of_pages": (
        lambda: RaggedBatch(PagedCache(1, 1, 8, num_pages=2, page_size=16), 1).reserve(0, 33),
        "request 0 must find 3 free pages of 16 tokens for its 33 tokens, got 2 of 2",
    ),
}


@pytest.mark.parametrize("case", _CACHES)
def test_cache(case):
    call, match = _CACHES[case]
    _raises(match, call, (ValueError, OutOfPages))


# --------------------------------------------------------------------------- folders

_SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


def _folder(path, **config):
    """A complete folder of a tiny Llama type."""
    facts = {"model_type": "llama", "block_size": 8, "mask_token_id": 3, "token_shift": True, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps({**facts, **_SIZES, **config}))
    letters = {chr(ord("a") + i): i for i in range(26)}
    byte_level_bpe(letters, []).save(str(path / "tokenizer.json"))
    model = tiny_model(read_config(path))
    tensors = {
        (name if name.startswith("lm_head") else f"model.{name}"): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def _change(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_the_folder_that_the_cases_break_is_good(tmp_path):
    loaded = load(_folder(tmp_path))
    assert generate(loaded.model, [[1, 2]], DenoiseConfig(max_new_tokens=3))[0].finish in ("length", "eos")


_JSON = {
    "family": (
        dict(model_type="mamba"),
        "config.json: model_type must be one of Fast_dLLM_Qwen, sdar, llama, got 'mamba'",
    ),
    "no_family": (dict(model_type=...), "model_type must be one of .* got None"),
    "llada2_is_not_read": (dict(model_type="llada2_moe"), "model_type must be one of .* got 'llada2_moe'"),
    "key_missing": (dict(intermediate_size=...), "intermediate_size must be given, got none"),
    "no_block_size": (dict(block_size=...), "block_size must be given for model_type 'llama', got none"),
    "no_mask_id": (dict(mask_token_id=...), "mask_token_id must be given for model_type 'llama'"),
    "no_token_shift": (dict(token_shift=...), "token_shift must be given for model_type 'llama'"),
    "no_rope_theta": (dict(rope_theta=...), "rope_theta must be given, got none"),
    "text_for_a_number": (dict(hidden_size="16"), r"hidden_size must be an integer in \[1, 65536\], got '16'"),
    "layers_beyond_memory": (dict(num_hidden_layers=10**9), r"num_hidden_layers must be an integer in \[1, 1024\]"),
    "vocabulary_beyond_memory": (dict(vocab_size=1 << 40), "vocab_size must be an integer in"),
    "negative_size": (dict(head_dim=-8), "head_dim must be an integer in .* got -8"),
    "heads_do_not_divide": (
        dict(num_attention_heads=3, num_key_value_heads=2),
        r"num_heads must be a multiple of num_kv_heads \(2\), got 3",
    ),
    "odd_head_dim": (dict(head_dim=7), "head_dim must be even .* got 7"),
    "mask_id_past_vocabulary": (
        dict(mask_token_id=40),
        r"mask_token_id must be an id in \[0, vocab_size = 40\), got 40",
    ),
    "eos_past_vocabulary": (dict(eos_token_id=[2, 99]), r"eos_token_id must be an id in .* got 99"),
    "scaled_rotary": (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling must be null, got .*yarn"),
    "scaled_rotary_v5": (
        dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        "rope_parameters must be of rope_type 'default', got .*llama3",
    ),
    "partial_rotary": (dict(partial_rotary_factor=0.5), "partial_rotary_factor must be 1.0, got 0.5"),
    "sliding_window": (dict(use_sliding_window=True), "use_sliding_window must be False, got True"),
    "sliding_layers": (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types must all be"),
    "biases": (dict(attention_bias=True), "attention_bias must be False, got True"),
    "gelu": (dict(hidden_act="gelu"), "hidden_act must be 'silu', got 'gelu'"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config must be None, got"),
    "nan_eps": (dict(rms_norm_eps=NAN), "rms_norm_eps must be a positive number, got nan"),
    "flag_as_text": (dict(tie_word_embeddings="no"), "tie_word_embeddings must be true or false, got 'no'"),
    "sub_block": (dict(sub_block_size=3), r"sub_block_size must divide block_size \(8\), got 3"),
    "dtype": (dict(torch_dtype="int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    "tied_with_another_head": (dict(tie_word_embeddings=True), "tie_word_embeddings must be false"),
}


@pytest.mark.parametrize("case", _JSON)
def test_config_json(case, tmp_path):
    changes, match = _JSON[case]
    _change(_folder(tmp_path), **changes)
    _raises(match, lambda: load(tmp_path))


def test_files_that_are_not_there(tmp_path):
    _raises("path must be a folder with config.json", lambda: load(tmp_path / "nowhere"), FileNotFoundError)
    _raises("must hold config.json, got none", lambda: load(tmp_path), FileNotFoundError)
    folder = _folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    _raises("must hold tokenizer.json, or vocab.json and merges.txt", lambda: load(folder), FileNotFoundError)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config = read_config(folder)
    _raises("must hold model.safetensors .* pickled weights", lambda: load_weights(folder, config), FileNotFoundError)


def test_models_load_takes_names_and_folders(tmp_path):
    _raises("dtype must be one of float32, .* got 'int8'", lambda: models.load(builtin.NAME, dtype="int8"))
    _raises("overrides must not be given for", lambda: models.load(builtin.NAME, block_size=4))
    _raises("path must be a folder", lambda: models.load("no-such-model"), FileNotFoundError)
    assert models.load(_folder(tmp_path), "bfloat16").model.norm.weight.dtype == torch.bfloat16


def test_values_of_another_type(tmp_path):
    folder = _folder(tmp_path)
    _raises("^ModelConfig: token_shift must be a bool, got 'a'$", lambda: load(folder, token_shift="a"))
    _raises("^ModelConfig: block_size must be a positive integer, got 'a'$", lambda: load(folder, block_size="a"))
    _raises("^load: path must be a path, got None$", lambda: models.load(None), TypeError)
    _raises("^load: path must be a path, got 3$", lambda: read_config(3), TypeError)
    _raises("^load: device must be a torch.device or its name, got 'tpux'$", lambda: load(folder, device="tpux"))
    _raises("^load: device must be .* got list$", lambda: load(folder, device=["cpu"]), TypeError)


def test_unknown_override(tmp_path):
    _raises("overrides must be fields of ModelConfig, got blocksize", lambda: load(_folder(tmp_path), blocksize=4))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"model_type": ' + "[" * 100_000])
def test_config_that_is_not_a_json_object(text, tmp_path):
    (_folder(tmp_path) / "config.json").write_text(text)
    _raises("config.json: must be", lambda: load(tmp_path))


# --------------------------------------------------------------------------- safetensors

_Q = "model.layers.1.self_attn.q_proj.weight"


def _with(tensors, **changes):
    """Tensors with some replaced, added or (by ...) removed; __ in a name is a dot."""
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is ...:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


_TENSORS = {
    "missing": (lambda t: _with(t, **{_Q: ...}), f"must hold every tensor of llama, missing {_Q}$"),
    "many_missing": (lambda t: {_Q: t[_Q]}, "missing model.embed_tokens.weight, .* and 17 more"),
    "extra": (lambda t: _with(t, **{"model.extra": torch.zeros(1)}), "model.extra is not a tensor of llama"),
    "bias_of_another_family": (
        lambda t: _with(t, **{_Q.replace("weight", "bias"): torch.zeros(16)}),
        "q_proj.bias is not a tensor of llama",
    ),
    "shape": (lambda t: _with(t, **{_Q: torch.zeros(16, 17)}), rf"{_Q} must have shape \[16, 16\], got \[16, 17\]"),
    "rank": (lambda t: _with(t, **{_Q: torch.zeros(256)}), r"must have shape \[16, 16\], got \[256\]"),
    "integers": (
        lambda t: _with(t, **{_Q: torch.zeros(16, 16, dtype=torch.int8)}),
        f"{_Q} must be F32, BF16, F16, got I8",
    ),
    "float64": (
        lambda t: _with(t, **{_Q: torch.zeros(16, 16, dtype=torch.float64)}),
        "must be F32, BF16, F16, got F64",
    ),
    "float8": (
        lambda t: _with(t, **{_Q: torch.zeros(16, 16).to(torch.float8_e4m3fn)}),
        "must be F32, BF16, F16, got F8_E4M3",
    ),
    "no_head": (lambda t: _with(t, **{"lm_head.weight": ...}), "missing lm_head.weight"),
}


@pytest.mark.parametrize("case", _TENSORS)
def test_tensors(case, tmp_path):
    change, match = _TENSORS[case]
    path = _folder(tmp_path) / "model.safetensors"
    save_file(change(load_file(path)), path)
    _raises(match, lambda: load(tmp_path))


def _header(content, length=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def _entry(begin, end, shape=(16, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


_BYTES = {
    "empty_file": (lambda good: b"", "must be a complete safetensors file, got 0 bytes"),
    "seven_bytes": (lambda good: good[:7], "got 7 bytes"),
    "cut_in_the_header": (lambda good: good[:100], "header must be at most 92 bytes, got a length of"),
    "cut_in_the_tensors": (lambda good: good[:-5], r"must hold \d+ bytes of tensors after its header, got \d+"),
    "bytes_after_the_end": (lambda good: good + b"\0", "must hold .* bytes of tensors after its header"),
    "git_lfs_pointer": (lambda good: b"version https://git-lfs.github.com/spec/v1\n", "got a Git LFS pointer"),
    "huge_header": (
        lambda good: _header(b"{}", length=1 << 63),
        "header must be at most 2 bytes, got a length of 9223",
    ),
    "header_is_not_json": (lambda good: _header(b"\xff\xfe not json"), "header must be JSON"),
    "header_is_a_list": (lambda good: _header([1, 2]), "header must be a JSON object, got list"),
    "deep_header": (lambda good: _header(b'{"a":' + b"[" * 200_000), "header must be JSON"),
    "entry_is_a_number": (lambda good: _header({_Q: 1}), f"data_offsets of {_Q} must be .begin, end., got None"),
    "negative_offset": (lambda good: _header({_Q: _entry(-4, 1020)}), r"must be \[begin, end\], got \[-4, 1020\]"),
    "backward_offsets": (lambda good: _header({_Q: _entry(8, 0)}), r"must be \[begin, end\], got \[8, 0\]"),
    "offsets_past_the_file": (
        lambda good: _header({_Q: _entry(0, 1 << 50)}),
        "bytes of tensors after its header, got 0",
    ),
    "overlap": (
        lambda good: _header({_Q: _entry(0, 1024), "model.norm.weight": _entry(0, 64, [16])}) + bytes(1024),
        "must be a complete safetensors file, got",
    ),
    "shape_and_bytes_differ": (
        lambda good: _header({_Q: _entry(0, 64)}) + bytes(64),
        "must be a complete safetensors file",
    ),
    "unknown_dtype": (
        lambda good: _header({_Q: _entry(0, 1024, dtype="X7")}) + bytes(1024),
        "complete safetensors file",
    ),
    "shape_overflow": (
        lambda good: _header({_Q: _entry(0, 1024, [1 << 40, 1 << 40])}) + bytes(1024),
        "must be a complete safetensors file",
    ),
}


@pytest.mark.parametrize("case", _BYTES)
def test_safetensors_bytes(case, tmp_path):
    change, match = _BYTES[case]
    path = _folder(tmp_path) / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    _raises(f"model.safetensors: .*{match}", lambda: load(tmp_path))


def _sharded(path):
    """The folder with its tensors in two shards and an index."""
    _folder(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map.update(dict.fromkeys(part, file))
    _index(path, weight_map)
    return weight_map, tensors


def _index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


_FIRST, _SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
_INDEXES = {
    "no_map": (lambda m: None, "weight_map must be an object of tensor name to file, got None"),
    "empty_map": (lambda m: {}, "weight_map must be an object"),
    "parent_folder": (
        lambda m: {**m, _Q: "../secret.safetensors"},
        f"{_Q} must be in a file of this folder, got '../secret",
    ),
    "absolute_path": (lambda m: {**m, _Q: "/etc/passwd"}, "must be in a file of this folder, got '/etc/passwd'"),
    "number": (lambda m: {**m, _Q: 3}, "must be in a file of this folder, got 3"),
    "shard_missing": (lambda m: {**m, _Q: "model-00003.safetensors"}, "model-00003.safetensors must be in"),
    "tensor_in_another_shard": (lambda m: {**m, _Q: _FIRST}, f"{_FIRST}: {_Q} must be in it as the index says"),
    "tensor_not_in_the_index": (
        lambda m: {k: v for k, v in m.items() if k != _Q},
        f"{_SECOND}: {_Q} is not in the index",
    ),
}


@pytest.mark.parametrize("case", _INDEXES)
def test_index(case, tmp_path):
    change, match = _INDEXES[case]
    weight_map, _ = _sharded(tmp_path)
    load(tmp_path)
    _index(tmp_path, change(weight_map))
    _raises(match, lambda: load(tmp_path), (ValueError, FileNotFoundError))


def test_tensor_in_two_shards(tmp_path):
    weight_map, tensors = _sharded(tmp_path)
    extra = {name: tensors[name] for name, file in weight_map.items() if file == _FIRST}
    save_file({**extra, _Q: tensors[_Q]}, tmp_path / _FIRST)
    _raises("is not in the index", lambda: load(tmp_path))


# --------------------------------------------------------------------------- tokenizers

_BPE = byte_level_bpe({"a": 0, "b": 1}, [])
_CHATS = {
    "no_template": (None, [{"role": "user", "content": "a"}], "chat_template must be given"),
    "no_messages": ("x", [], "messages must hold at least one message"),
    "text_for_messages": ("x", ["hello"], r'messages\[0\] must have strings "role" and "content", got \'hello\''),
    "no_content": ("x", [{"role": "user"}], r"messages\[0\] must have strings"),
    "content_of_parts": ("x", [{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\] must have strings"),
    "template_refuses": (
        "{{ raise_exception('roles must alternate') }}",
        [{"role": "user", "content": "a"}],
        "must render these messages, got: roles must alternate",
    ),
    "template_fails": (
        "{{ messages[7].content.x.y }}",
        [{"role": "user", "content": "a"}],
        "must render these messages",
    ),
    "template_divides_by_0": ("{{ 1 / 0 }}", [{"role": "user", "content": "a"}], "must render these messages"),
    "template_escapes": ("{{ ''.__class__.mro() }}", [{"role": "user", "content": "a"}], "must render these messages"),
}


@pytest.mark.parametrize("case", _CHATS)
def test_chat(case):
    template, messages, match = _CHATS[case]
    _raises(match, lambda: Tokenizer(_BPE, chat_template=template).chat(messages))


def test_template_that_does_not_parse():
    _raises("chat_template must be a jinja2 template, got", lambda: Tokenizer(_BPE, chat_template="{% if %}"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "1.0", "model": {"type": "Unknown"}}'])
def test_tokenizer_json(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    _raises("tokenizer.json: must be", lambda: Tokenizer.from_folder(tmp_path))


def test_vocab_and_merges(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    _raises("tokenizer_class must be Qwen2Tokenizer", lambda: Tokenizer.from_folder(tmp_path))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert Tokenizer.from_folder(tmp_path).encode("ab") == [2]
    (tmp_path / "merges.txt").write_text("a b\na b c\n")
    _raises("merges.txt: line 2 must be two tokens, got 'a b c'", lambda: Tokenizer.from_folder(tmp_path))
    (tmp_path / "merges.txt").write_text("a z\n")
    _raises("must be a BPE vocabulary", lambda: Tokenizer.from_folder(tmp_path))
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "added_tokens.json").write_text('{"<mask>": 7}')
    _raises("'<mask>' must get id 7, got 3", lambda: Tokenizer.from_folder(tmp_path))
    config.write_text('{"tokenizer_class": "Qwen2Tokenizer", "chat_template": 3}')
    (tmp_path / "added_tokens.json").unlink()
    _raises("chat_template must be a text, got int", lambda: Tokenizer.from_folder(tmp_path))


# --------------------------------------------------------------------------- types of what a run is made of

_TYPES = {
    "model None": (lambda: generate(None, [[1]]), "generate: model must be a Transformer, got None"),
    "model text": (lambda: prefill("x", [[1]]), "prefill: model must be a Transformer, got 'x'"),
    "config": (lambda: generate(_model(), [[1]], [1]), "generate: config must be a DenoiseConfig or None, got list"),
    "config of prefill": (lambda: prefill(_model(), [[1]], {}), "prefill: config must be a DenoiseConfig or None"),
    "cache": (lambda: generate(_model(), [[1]], cache="x"), "generate: cache must be a PagedCache or None, got 'x'"),
    "tokenizer": (lambda: generate(_model(), [[1]], tokenizer=[1]), "generate: tokenizer must have decode"),
    "callback": (
        lambda: generate(_model(), [[1]], callback="x"),
        "generate: callback must be callable or None",
    ),
    "stream": (lambda: generate(_model(), [[1]], stream="x"), "generate: stream must be a bool, got 'x'"),
    "prompts None": (lambda: generate(_model(), None), "generate: prompts must be a list of lists of token ids, got"),
    "prompts text": (lambda: generate(_model(), "x"), "generate: prompts must be a list of lists of token ids, got"),
    "seeds": (
        lambda: generate(_model(), [[1]], seeds=-1),
        "generate: seeds must be 1 integers, one per prompt",
    ),
    "seeds bytes": (lambda: generate(_model(), [[1]], seeds=b"x"), "generate: seeds must be 1 integers"),
    "ignore_eos": (lambda: DenoiseConfig(ignore_eos="False"), "DenoiseConfig: ignore_eos must be a bool, got 'False'"),
    "sub_block_cache": (
        lambda: DenoiseConfig(sub_block_cache=1),
        "DenoiseConfig: sub_block_cache must be a bool",
    ),
}


@pytest.mark.parametrize("name", list(_TYPES))
def test_wrong_types_are_refused(name):
    call, message = _TYPES[name]
    _raises("^" + re.escape(message), call, TypeError)


def test_numbers_beyond_reason_are_refused():
    _raises(
        r"RaggedBatch: num_requests must be below 2\^24", lambda: RaggedBatch(PagedCache(1, 1, 8, num_pages=2), 10**30)
    )
    _raises(r"SamplerConfig: tokens_per_step must be below 2\^31", lambda: SamplerConfig(tokens_per_step=10**30))
    _raises("DenoiseConfig: mode must be one of exact, mage", lambda: DenoiseConfig(mode=[1, 2]))


def test_evaluation_and_models_in_the_box_name_the_argument():
    for call, message, error in (
        (lambda: needles.Runner(jobs=0), "Runner: jobs must be an integer of at least 1, got 0", ValueError),
        (lambda: needles.Runner(batch=0), "Runner: batch must be an integer of at least 1, got 0", ValueError),
        (lambda: needles.Runner(texts=[]), "Runner: texts must be at least one, or None, got none", ValueError),
        (
            lambda: needles.Runner(texts="abc"),
            r"Runner: texts must be \(name, text\) pairs or None, got 'abc'",
            TypeError,
        ),
        (lambda: answers.answers(None), "answers: files must be a list of ResultFile, got None", TypeError),
        (lambda: answers.answers(["a.json"]), "answers: files must be a list of ResultFile, got 'a.json'", TypeError),
        (lambda: builtin.positions(5), "adapter_path: adapter must be a path, got 5", TypeError),
        (lambda: builtin.num_layers(5), "adapter_path: adapter must be a path, got 5", TypeError),
        (lambda: builtin.load_builtin(adapter=5), "adapter_path: adapter must be a path, got 5", TypeError),
        (lambda: builtin.load_builtin("float99"), "dtype must be one of float32, .*, got 'float99'", ValueError),
        (lambda: builtin.load_builtin(device="tpu"), "load_builtin: device must be .*, got 'tpu'", ValueError),
        (
            lambda: builtin.model_card("nope"),
            f"model_card: name must be one of {builtin.NAME}, .*, got 'no",
            ValueError,
        ),
    ):
        _raises(message, call, error)


def test_numbers_that_no_float_and_no_int64_holds(tmp_path):
    row, open_row = torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool)
    for message, call in (
        ("SamplerConfig: entropy_bound must be finite, got 1", lambda: SamplerConfig(entropy_bound=10**400)),
        (r"SamplerConfig: threshold must be a number in \[0, 1\], got 1", lambda: SamplerConfig(threshold=10**400)),
        (r"SelectionConfig: p must be a number in \(0, 1\], got 1", lambda: SelectionConfig(p=10**400)),
        ("sequential: tokens_per_step must be below 2\\^31", lambda: sampling.sequential(open_row, 2**70)),
        (
            "BlockSelection: capacity must be at most",
            lambda: BlockSelection.from_units([[[[0]]]], [16], 16, capacity=2**70),
        ),
        (r"PagedCache: head_dim must be in \[1, ", lambda: PagedCache(1, 1, 2**70, num_pages=1)),
        ("BlockSelection: path must be", lambda: BlockSelection.from_units([[[[0]]]], [16], 16).save("a\0b")),
    ):
        _raises(message, call, (ValueError, FileNotFoundError))
    for name in ("x" * 5000, "a\0b"):
        _raises("load: path must be", lambda name=name: models.load(name), FileNotFoundError)
        _raises("BlockSelection: path must be", lambda name=name: BlockSelection.load(name), FileNotFoundError)
    assert sampling.entropy_bounded(row, open_row, 2**70).all()
    assert sampling.low_confidence_dynamic(row, open_row, 2**70).sum() == 1
    (tmp_path / "config.json").write_text('{"model_type": []}')
    _raises(r"model_type must be one of .*, got \[\]", lambda: models.load(tmp_path))
    with pytest.raises(RuntimeError, match=r"set_num_threads: n must be in \[0, 2\^31\), got 4294967297"):
        torch.ops.mage.set_num_threads(2**32 + 1)


def test_load_names_a_device_or_dtype_that_there_is_not():
    for device in ("xpu", "mps"):
        call = functools.partial(models.load, builtin.NAME, device=device)
        _raises(f"load: device must be cpu, cuda or meta, got {device}", call)
    if not torch.cuda.is_available():
        _raises("load: device must be one that this machine has", lambda: models.load(builtin.NAME, device="cuda"))
    _raises("load: device must be a torch.device or its name, got 'x'", lambda: models.load(builtin.NAME, device="x"))
    _raises("load: dtype must be one of .*, got ''", lambda: models.load(builtin.NAME, dtype=""))
    _raises("load: dtype must be one of .*, got list", lambda: models.load(builtin.NAME, dtype=[]))
