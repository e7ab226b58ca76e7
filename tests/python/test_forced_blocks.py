"""Blocks whose tokens are given, and what methods cost on them. Run: pytest tests/python/test_forced_blocks.py"""

import functools
import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from mage_ext import cli
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import forced_blocks, needles
from mage_ext.evaluation import method_comparison as comparison
from mage_ext.evaluation.forced_blocks import ForcedBlocks
from mage_ext.evaluation.method_comparison import ALL_METHODS, Setting
from mage_ext.models.huggingface import LoadedModel
from mage_ext.sampling import SamplerConfig
from mage_ext.testing.plain_loop import PlainWindow, block_causal_mask
from mage_ext.testing.tiny import tiny_config, tiny_model

SAMPLER = SamplerConfig("low_confidence_static", tokens_per_step=4)


@functools.cache
def _loaded(variant):
    model = tiny_model(tiny_config(variant), seed=1)
    return LoadedModel(model.config, model, None)


def _ids(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (count, length), generator=generator).tolist()


def _plain_logits(model, tokens):
    """[T, V] of a window, block-causal, without the mask id."""
    mask = block_causal_mask(len(tokens), model.config.block_size)[None]
    with torch.no_grad():
        logits = PlainWindow(model, len(tokens)).forward(tokens, list(range(len(tokens))), lambda layer: mask)
    logits[:, model.config.mask_id] = -math.inf
    return logits


# ----------------------------------------------------------------------------------------------------------------------
# Forwards


def test_blocks_follow_each_other_and_absent_requests_write_nothing():
    loaded = _loaded("llama_shift")
    model, size = loaded.model, loaded.config.block_size
    first, second = _ids(2, 80)
    state = prefill(model, [first[:32], second[:48]])
    cache = state.batch.cache
    used = cache.num_pages - cache.num_free
    forced = ForcedBlocks(model, state, num_blocks=2)
    assert forced.max_seq_len == 128 and forced.start.tolist() == [32, 48]
    blocks = torch.tensor([first[32:48], second[48:64]])
    with torch.no_grad():
        hidden = forced.hidden(blocks, final=True)
        forced.advance(torch.tensor([True, False]))
        assert forced.start.tolist() == [48, 48]
        # The second request sits a forward out, whose tokens would spoil its block.
        live = torch.tensor([True, False])
        pages = forced._state.batch.pages(1)
        before = cache.layer(2)[0][pages].clone()
        later = forced.hidden(torch.tensor([first[48:64], [7] * size]), live=live)
        torch.testing.assert_close(cache.layer(2)[0][pages], before, atol=0, rtol=0, equal_nan=True)
        again = forced.hidden(torch.tensor([first[48:64], second[48:64]]))
    for request, tokens in enumerate((first[:48], second[:64])):
        expected = _plain_logits(model, tokens)[-size:]
        logits = model.logits(hidden[request])
        logits[:, loaded.config.mask_id] = -math.inf
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    for found in (later, again):
        logits = model.logits(found[0])
        logits[:, loaded.config.mask_id] = -math.inf
        torch.testing.assert_close(logits, _plain_logits(model, first[:64])[-size:], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(again[1], hidden[1])
    forced.close()
    assert cache.num_pages - cache.num_free == used


def test_rows_of_open_positions():
    is_open = torch.tensor([[False, True, False, True]])
    assert forced_blocks.rows_of(is_open, False) is is_open
    assert forced_blocks.rows_of(is_open, True).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
@pytest.mark.parametrize("name", ["mage", "v1", "mage_open", "sparsed", "recency", "two_level"])
def test_lists_are_those_of_the_loop(variant, name):
    loaded = _loaded(variant)
    model, size, shift = loaded.model, loaded.config.block_size, loaded.config.token_shift
    prompts = [ids[:80] for ids in _ids(2, 80)]
    base = DenoiseConfig(max_new_tokens=size, sampler=SAMPLER, ignore_eos=True)
    state = prefill(model, prompts, base)
    setting = Setting(6, 1, 1) if name == "two_level" else Setting(32, 16, 1)
    (config,) = comparison.configs(model, state.batch.cache, setting, base, [name]).values()
    seen = {}

    def note(info):
        if info.step == config.exact_steps - 1:
            is_open = info.open | info.decided
            seen["tokens"] = torch.where(is_open, loaded.config.mask_id, info.tokens)
        if info.step == 0:
            seen["open"] = info.open | info.decided
        if info.selection is not None:
            seen["lists"] = info.selection

    generate(model, state.fork(), config, callback=note)
    forced = ForcedBlocks(model, state)
    with torch.no_grad():
        lists = forced.select(seen["tokens"], config, forced_blocks.rows_of(seen["open"], shift))
    for field in ("indices", "counts", "tail_start"):
        assert torch.equal(getattr(lists, field), getattr(seen["lists"], field)), field
    torch.testing.assert_close(lists.kept_mass, seen["lists"].kept_mass, atol=1e-5, rtol=0)
    forced.close()


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_losses_of_exact_attention_against_a_plain_window(variant):
    loaded = _loaded(variant)
    model, size, shift = loaded.model, loaded.config.block_size, int(loaded.config.token_shift)
    contexts = _ids(2, 80)
    found = forced_blocks.measure(loaded, contexts, [], (), (1.0, 0.5), SAMPLER)
    assert found.masked == {1.0: size - shift, 0.5: 8} and found.T == 4
    for share in (1.0, 0.5):
        masks = forced_blocks._Masks(2, size, shift, loaded.config.mask_id, None, torch.device("cpu"))
        for request, context in enumerate(contexts):
            where = [64 + i for i in masks.positions(share)[request].tolist()]
            tokens = [loaded.config.mask_id if i in where else token for i, token in enumerate(context)]
            log_probs = torch.log_softmax(_plain_logits(model, tokens), -1)
            expected = -sum(log_probs[i - shift, context[i]].item() for i in where) / len(where)
            assert found.losses[None, "exact", share].ce[request].item() == pytest.approx(expected, abs=1e-3)


def test_masks_are_nested_and_leave_the_predicted_position_alone():
    masks = forced_blocks._Masks(3, 16, 1, 96, [5, 6, 5], torch.device("cpu"))
    assert [masks.count(share) for share in (1.0, 0.75, 0.5, 0.01)] == [15, 11, 8, 1]
    whole, half = masks.positions(1.0), masks.positions(0.5)
    assert whole.tolist() == [list(range(1, 16))] * 3
    assert half[0].tolist() == half[2].tolist() != half[1].tolist() and 0 not in half
    quarter = masks.positions(0.25)
    assert all(set(few.tolist()) < set(more.tolist()) for few, more in zip(quarter, half, strict=True))
    tokens = torch.arange(48).view(3, 16)
    masked = masks.apply(tokens, 0.5)
    assert ((masked == 96).sum(1) == 8).all() and (masked[:, 0] == tokens[:, 0]).all()
    assert masks.rows(0.5)[0].nonzero().flatten().tolist() == [i - 1 for i in half[0].tolist()]


def test_losses_against_exact_by_hand():
    """A model of three tokens, the third of which is the mask."""
    logits = torch.tensor([[[2.0, 0.0, 9.0], [0.0, 1.0, 9.0]]])
    model = SimpleNamespace(config=SimpleNamespace(token_shift=False, mask_id=2), logits=lambda hidden: hidden.clone())
    scores = forced_blocks._Scores(model, torch.tensor([[0, 0]]))
    positions = torch.tensor([[0, 1]])
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]  # of token 0
    exact = scores.exact(logits, positions, 1.0)
    assert exact.ce.item() == pytest.approx(-statistics.mean(map(math.log, p)))
    other = scores.against_exact(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]), positions, 1.0, None)
    q = 1 / (1 + math.e)
    kl = statistics.mean(a * math.log(a / q) + (1 - a) * math.log((1 - a) / (1 - q)) for a in p)
    assert other.kl.item() == pytest.approx(kl) and other.agreement.item() == 0.5
    assert other.ce.item() == pytest.approx(-math.log(q)) and other.kept.isnan().all()


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_every_method_is_measured(variant):
    loaded = _loaded(variant)
    size, shift = loaded.config.block_size, int(loaded.config.token_shift)
    contexts = _ids(3, 112)
    wanted = comparison.settings([16, 32], [1, 16], [1])
    shares = (1.0, 0.75, 0.5)
    found = forced_blocks.measure(loaded, contexts, wanted, ALL_METHODS, shares, SAMPLER)
    rows = found.rows(96)
    assert json.loads(json.dumps(rows)) == rows
    by = {(row["method"], row["K"], row["g"], row["t"]): row for row in rows}
    # Of four forwards sparsed has one exact one; two_level is of single tokens.
    assert len(by) == len(rows) == 3 + (4 * len(ALL_METHODS[1:]) - 2) * 3
    for (name, _, _, share), row in by.items():
        assert row["n"] == 3 and row["tokens"] == 96 and row["masked"] == round(share * (size - shift))
        assert row["delta"] == pytest.approx(row["score"] - row["exact"], abs=1e-6)
        assert row["delta_low"] <= row["delta"] <= row["delta_high"] and row["kl"] >= -1e-6
        if name == "exact":
            assert (row["delta"], row["kl"], row["agreement"]) == (0, 0, 1)
        else:
            assert row["kl"] > 0
        assert (row["kept_mass"] is None) == (name in ("quest", "tidal", "oracle", "carry", "mage_max"))
    for k, g in ((16, 1), (32, 1)):
        assert by["mage", k, g, 0.5]["kl"] < by["random", k, g, 0.5]["kl"]
    # One exact forward of four: sparsed is mage.
    assert by["sparsed", 16, 1, 0.5]["kl"] == by["mage", 16, 1, 0.5]["kl"]
    text = forced_blocks.table(rows)
    assert text[0] == "96 tokens, K = 16, g = 1, 1 dense layers: cross entropy minus exact, nats"
    assert text[1].split() == ["t", "1.0", "0.75", "0.5"]


def test_sparsed_is_measured_where_it_is_sparse():
    """Of 8 forwards two are exact, and the second one sees 2 of 16 positions decided."""
    loaded = _loaded("sdar_b16")
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=2)
    found = forced_blocks.measure(
        loaded, _ids(2, 96), [Setting(16, 1, 0)], ("sparsed", "mage"), (1.0, 0.875, 0.5), sampler
    )
    shares = [share for _, name, share in found.losses if name == "sparsed"]
    assert shares == [0.875, 0.5]
    setting = Setting(16, 1, 0)
    assert not torch.equal(found.losses[setting, "sparsed", 0.5].kl, found.losses[setting, "mage", 0.5].kl)


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_a_list_of_the_whole_prefix_but_one_token_costs_little_and_oracle_least(variant):
    loaded = _loaded(variant)
    size = loaded.config.block_size
    contexts = _ids(4, 96 + size)
    most = 96 - size - 1
    found = forced_blocks.measure(
        loaded, contexts, [Setting(most, 1, 0), Setting(8, 1, 0)], ("oracle", "random"), (0.5,), SAMPLER
    )

    def kl(k, name):
        return found.losses[Setting(k, 1, 0), name, 0.5].kl.mean()

    assert kl(most, "oracle") < 0.3 * kl(8, "oracle") and kl(8, "oracle") < kl(8, "random")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_every_method_is_measured_on_cuda(variant):
    shapes = {"sdar_b16": dict(num_heads=5, num_kv_heads=1), "llama_shift": dict(num_heads=9, num_kv_heads=3)}
    config = tiny_config(variant, hidden_size=128, head_dim=64, **shapes[variant])
    loaded = LoadedModel(config, tiny_model(config, seed=1, dtype=torch.bfloat16).cuda(), None)
    wanted = comparison.settings([16, 128], [1, 16], [1])
    found = forced_blocks.measure(loaded, _ids(4, 208), wanted, ALL_METHODS, (1.0, 0.5), SAMPLER)
    rows = found.rows(192)
    assert len(rows) == 2 + (4 * len(ALL_METHODS[1:]) - 2) * 2
    by = {(row["method"], row["K"], row["g"], row["t"]): row for row in rows}
    for (name, *_), row in by.items():
        assert math.isfinite(row["score"]) and 0 <= row["agreement"] <= 1
        assert row["kl"] == 0 if name == "exact" else row["kl"] > 0
    for g in (1, 16):
        assert by["oracle", 128, g, 0.5]["kl"] < by["oracle", 16, g, 0.5]["kl"]


@pytest.mark.parametrize(
    ("contexts", "wanted", "shares", "message"),
    [
        ([], [], (1.0,), r"contexts must be of one length, a multiple of 16 and at least 48, got \[\]"),
        ([[1] * 64, [1] * 80], [], (1.0,), r"contexts must be of one length, .*, got \[64, 80\]"),
        ([[1] * 40], [], (1.0,), r"a multiple of 16 and at least 48, got \[40\]"),
        ([[1] * 64], [], (0.0,), r"shares must be in \(0, 1\], got 0.0"),
        (
            [[1] * 64],
            [Setting(32, 1, 0)],
            (1.0,),
            "wanted must have K below the prefix of the block before, 32, got 32",
        ),
        ([[1] * 64], [Setting(16, 1, 0)], (1.0,), r"names must be of exact, .*, got 'best'"),
    ],
)
def test_what_does_not_fit_is_named(contexts, wanted, shares, message):
    with pytest.raises(ValueError, match=message):
        forced_blocks.measure(_loaded("sdar_b16"), contexts, wanted, ("best",), shares, SAMPLER)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals, prose, the suite


def test_bootstrap_against_the_normal_interval():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    low, high = forced_blocks.bootstrap(values)
    half = 1.96 * values.std() / 20
    # The percentile interval of 2000 resamples of a normal mean: within a few percent of its width.
    assert low == pytest.approx((values.mean() - half).item(), abs=0.1 * half.item())
    assert high == pytest.approx((values.mean() + half).item(), abs=0.1 * half.item())
    assert forced_blocks.bootstrap(values) == (low, high)
    assert forced_blocks.bootstrap(torch.full((5,), 2.0)) == (2.0, 2.0)
    assert all(map(math.isnan, forced_blocks.bootstrap(torch.zeros(0))))


def test_prose_is_a_run_of_the_texts_sentences():
    sentences = [f"Sentence {i} is here." for i in range(50)]
    words = {}

    def encode(text, add_special_tokens):
        assert not add_special_tokens
        return [words.setdefault(word, len(words)) for word in text.replace(" ", " _").split(" ")]

    maker = SimpleNamespace(sentences=sentences, tokenizer=SimpleNamespace(encode=encode))
    ids = forced_blocks.prose(maker, 1, 300)
    assert len(ids) == 300 and forced_blocks.prose(maker, 1, 300) == ids != forced_blocks.prose(maker, 2, 300)
    names = {number: word for word, number in words.items()}
    numbers = [int(word.strip("_")) for word in (names[i] for i in ids) if word.strip("_").isdigit()]
    assert len(numbers) >= 74 and all((b - a) % 50 == 1 for a, b in itertools.pairwise(numbers))
    maker.sentences = None
    assert len(forced_blocks.prose(maker, 1, 40)) == 40


def test_rows_are_paired_with_mage_with_single_tokens_and_with_no_dense_layers():
    def losses(*ce):
        ce = torch.tensor(ce, dtype=torch.float64)
        return forced_blocks.Losses(ce, torch.zeros_like(ce), torch.ones_like(ce), torch.ones_like(ce))

    fine, coarse, dense = Setting(32, 1, 0), Setting(32, 16, 0), Setting(32, 16, 2)
    found = forced_blocks.ProseLosses(
        {
            (None, "exact", 0.5): losses(1.0, 2.0),
            (fine, "mage", 0.5): losses(1.5, 2.5),
            (fine, "quest", 0.5): losses(2.0, 2.5),
            (coarse, "mage", 0.5): losses(2.5, 2.5),
            (dense, "mage", 0.5): losses(2.0, 2.25),
        },
        {0.5: 16},
        8,
    )
    exact, mage, quest, units, layers = found.rows(64)
    assert not any(key.startswith("over_") for key in (*exact, *mage))
    assert (quest["over_mage"], quest["over_mage_low"], quest["over_mage_high"]) == (0.25, 0.0, 0.5)
    assert units["over_g1"] == 0.5 and "over_dense0" not in units and "over_mage" not in units
    assert layers["over_dense0"] == -0.375 and "over_g1" not in layers


def test_a_suite_joins_its_batches(monkeypatch):
    loaded = _loaded("llama_shift")
    encode = lambda text, add_special_tokens: [ord(c) % 90 + 1 for c in text]  # noqa: E731
    maker = SimpleNamespace(sentences=None, tokenizer=SimpleNamespace(encode=encode))
    monkeypatch.setattr(needles, "_worker", {"loaded": loaded, "maker": maker})
    runner = object.__new__(needles.Runner)
    lines = []
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = 0, 1, 2, lines.append, None
    wanted = [Setting(16, 1, 0)]
    steps = list(forced_blocks.suite(runner, 3, wanted, ["mage"], [96, 128], (1.0, 0.5)))
    assert [[row["n"] for row in rows] for rows in steps] == [[2] * 4, [3] * 4, [3] * 4 + [2] * 4, [3] * 8]
    rows = steps[-1]
    assert [row["tokens"] for row in rows] == [96] * 4 + [128] * 4
    contexts = [forced_blocks.prose(maker, seed, 112) for seed in range(3)]
    whole = forced_blocks.measure(loaded, contexts, wanted, ["mage"], (1.0, 0.5)).rows(96)
    for row, other in zip(rows, whole, strict=False):
        assert row["method"] == other["method"]
        assert row["score"] == pytest.approx(other["score"], abs=1e-5)
        assert row["kl_high"] == pytest.approx(other["kl_high"], abs=1e-5)
    assert lines[0].startswith("prose, 96 tokens: 2/3 contexts, exact ")
    with pytest.raises(ValueError, match=r"methods_wanted must be of exact, .*, got 'best'"):
        list(forced_blocks.suite(runner, 1, wanted, ["best"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "7", "--g", "16"], "eval: k must hold a multiple of one of gs = [16], got [7]"),
        (["--tokens", "100"], "tokens must be in [512, 8160]"),
        (["--tokens", "1000"], "tokens must be multiples of the block of 32, got 1000"),
        (["--t", "1.5"], "t must be in (0, 1], got 1.5"),
        (["--tokens-per-step", "0"], "tokens_per_step must be in [1, 32], got 0"),
    ],
)
def test_mistakes_on_the_command_line_name_the_argument(arguments, message, capsys):
    assert cli.main(["eval", "prose", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mage: error: ") and error.count("\n") == 1 and message in error
