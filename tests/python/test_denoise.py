"""The denoising loop against its slow twin, and what it promises about batches, forks, caches and costs.

Run: pytest tests/python/test_denoise.py
"""

import copy
import dataclasses
import functools
import itertools
import random

import pytest
import torch

from mage_ext import denoise
from mage_ext.cache import PagedCache
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.results import Progress, check_answered
from mage_ext.sampling import SAMPLERS, SamplerConfig
from mage_ext.selection import SelectionConfig, random_selection, recency_selection, select
from mage_ext.testing.margins import CLOSE, Margins
from mage_ext.testing.plain_loop import PlainWindow, block_causal_mask, plain_generate
from mage_ext.testing.reference_ops import use_reference
from mage_ext.testing.tiny import VARIANTS, tiny_config, tiny_model

LENGTHS = range(1, 71)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models of this size only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Seeds of the weights, by number of layers; chosen for variety of the generated tokens, which the tests assert.
_SEEDS = {
    2: {"fast_dllm_v2": 0, "sdar": 2, "sdar_b16": 14, "llama": 12, "llama_shift": 3},
    3: {"fast_dllm_v2": 7, "sdar": 6, "sdar_b16": 2, "llama": 7, "llama_shift": 7},
}


@functools.cache
def _model(variant, num_layers=3, **overrides):
    return tiny_model(tiny_config(variant, num_layers=num_layers, **overrides), _SEEDS[num_layers][variant])


def _prompts(config, lengths, seed=0):
    """A random prompt per length; every fifth token on average is the mask id, and so is the last one of odd lengths.

    The first token never is: a block of mask ids alone has equal rows, and ties that rounding breaks.
    """
    prompts = []
    for length in lengths:
        rng = random.Random(1000 * seed + length)
        prompt = [config.mask_id if rng.random() < 0.2 else rng.randrange(config.vocab_size) for _ in range(length)]
        if length % 2:
            prompt[-1] = config.mask_id
        if length:
            prompt[0] = (config.mask_id + 1 + rng.randrange(config.vocab_size - 1)) % config.vocab_size
        prompts.append(prompt)
    return prompts


@functools.cache
def _measured(variant, num_layers):
    """Quantiles of what a sampler sees in this model: (confidences, least entropies of a step)."""
    model = _model(variant, num_layers=num_layers)
    config = DenoiseConfig(max_new_tokens=24, sampler=SamplerConfig("low_confidence_static"))
    confidences, entropies = [], []
    for prompt in _prompts(model.config, (3, 17, 40), seed=5):
        for step in plain_generate(model, prompt, config).steps:
            confidences += step.confidences
            entropies.append(min(step.entropies))
    return float(torch.tensor(confidences).quantile(0.6)), float(torch.tensor(entropies).median())


def _sampler(variant, name, num_layers=2, tokens_per_step=2):
    threshold, bound = _measured(variant, num_layers)
    return SamplerConfig(name, tokens_per_step=tokens_per_step, threshold=threshold, entropy_bound=bound)


def _assert_both_branches(name, plains):
    """The sampler's rule decided several positions somewhere, and elsewhere only the one it must decide."""
    if name not in ("low_confidence_dynamic", "entropy_bounded"):
        return
    choices = [step.num_decided for plain in plains for step in plain.steps if len(step.confidences) > 1]
    assert 1 in choices and max(choices) > 1


def _generate(model, prompts, config, callback=None, **arguments):
    """Results and the margins of their decisions."""
    with (margins := Margins(callback)).recorded():
        return generate(model, prompts, config, callback=margins.callback, **arguments), margins


def _same(results, twins, margins):
    """Pairs (result, twin) after an assertion that their tokens are equal, token for token.

    Both are float32 sums in different orders. A request may part from its twin at a decision that was a tie up to
    rounding, if it is the only one; the pairs come without it.
    """
    pairs = list(zip(results, twins, strict=True))
    parted = [result for result, twin in pairs if result.tokens != twin.tokens]
    for result in parted:
        assert margins.of(result.request) < CLOSE, f"request {result.request} differs and had no tie"
    assert len(parted) <= 1
    return [pair for pair in pairs if pair[0] not in parted]


def test_margins_see_ties_and_nothing_else():
    """Without a prompt all rows of the first block are equal, so are their confidences."""
    model = _model("sdar_b16", num_layers=2)
    config = DenoiseConfig(max_new_tokens=16, sampler=SamplerConfig("low_confidence_static"))
    _, margins = _generate(model, [[], *_prompts(model.config, (20, 41))], config)
    assert margins.of(0) < CLOSE < min(margins.of(1), margins.of(2)) < 0.1


# --------------------------------------------------------------------------- exact mode


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_equals_plain_loop(variant, sampler):
    """Token for token; each family sees all lengths 1..70, and half of them (all: dynamic) with each sampler."""
    model = _model(variant, num_layers=2)
    config = DenoiseConfig(
        max_new_tokens=max(2 * model.config.block_size + 3, 50), sampler=_sampler(variant, sampler), prefill_chunk=32
    )
    first, stride = (0, 1) if sampler == "low_confidence_dynamic" else (SAMPLERS.index(sampler) % 2, 2)
    lengths = list(LENGTHS)[first::stride]
    random.Random(1).shuffle(lengths)
    prompts = _prompts(model.config, lengths)
    tails = [prompt[len(prompt) // model.config.block_size * model.config.block_size :] for prompt in prompts]
    assert any(model.config.mask_id in tail for tail in tails)
    results, margins = _generate(model, prompts, config)
    plains = [plain_generate(model, prompt, config) for prompt in prompts]
    for result, plain in _same(results, plains, margins):
        assert result.finish == plain.finish == "length"
        assert result.stats.forwards["exact"] == len(plain.steps)
        assert result.stats.forwards["commit"] == plain.commits >= 1
        assert len(set(result.tokens)) >= 8
        assert model.config.mask_id not in result.tokens
    _assert_both_branches(sampler, plains)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eos_ends_a_request(variant):
    """EOS ids are tokens that the model is known to emit; prompts hold them too and don't end there."""
    model = _model(variant, num_layers=2)
    config = DenoiseConfig(max_new_tokens=37, sampler=_sampler(variant, "low_confidence_dynamic"))
    prompts = _prompts(model.config, (1, 5, 16, 31, 32, 33, 48, 64))
    free = [result.tokens for result in generate(model, prompts, config)]
    # The first token of one request, the last of another, and one from the middle that not all of them emit.
    middle = next(token for token in free[2][5:] if not all(token in tokens for tokens in free))
    eos_ids = (free[4][0], middle, free[0][-1])
    stopping = _model(variant, num_layers=2, eos_ids=eos_ids)
    prompts[3][-1] = prompts[5][0] = eos_ids[0]
    results, margins = _generate(stopping, prompts, config)
    plains = [plain_generate(stopping, prompt, config) for prompt in prompts]
    for result, plain in _same(results, plains, margins):
        assert result.finish == plain.finish
        assert not set(result.tokens[:-1]) & set(eos_ids)
        assert (result.finish == "eos") == (result.tokens[-1] in eos_ids)
        assert len(result.tokens) == 37 or result.finish == "eos"
    assert any(result.finish == "eos" and 1 < len(result.tokens) < 37 for result in results)
    assert results[4].tokens == free[4][:1]
    unstopped = generate(stopping, prompts, dataclasses.replace(config, ignore_eos=True))
    assert all(len(result.tokens) == 37 and result.finish == "length" for result in unstopped)


@pytest.mark.parametrize("variant", VARIANTS)
def test_max_new_tokens(variant):
    """Any limit gives the first tokens of a longer run's blocks that are the same, and as many as asked for."""
    model = _model(variant, num_layers=2)
    prompts = _prompts(model.config, (1, 16, 30, 32, 64))
    for limit in (1, 2, model.config.block_size, model.config.block_size + 1):
        config = DenoiseConfig(max_new_tokens=limit, sampler=_sampler(variant, "low_confidence_static"))
        results, margins = _generate(model, prompts, config)
        for result, plain in _same(results, [plain_generate(model, prompt, config) for prompt in prompts], margins):
            assert len(result.tokens) == limit
            assert sum(result.stats.forwards.values()) == len(plain.steps) + plain.commits


def test_first_token_under_shift_needs_no_forward():
    model = _model("llama_shift", num_layers=2)
    result = generate(model, _prompts(model.config, [32]), DenoiseConfig(max_new_tokens=1))[0]
    assert len(result.tokens) == 1 and result.stats.num_forwards == 0 and result.stats.prefill_forwards == 1
    assert result.stats.tokens_per_forward == 0 and result.stats.kv_share == 1


def test_mask_id_is_never_emitted(monkeypatch):
    """Even where it has the largest logit everywhere."""
    model = _model("llama_shift", num_layers=2, mask_id=0)
    prompts = _prompts(model.config, (16, 20))
    config = DenoiseConfig(max_new_tokens=20, sampler=SamplerConfig("sequential"))
    expected = [result.tokens for result in generate(model, prompts, config)]
    plain_logits = model.logits

    def logits(hidden):
        out = plain_logits(hidden)
        out[..., 0] = out.amax() + 10
        return out

    model = copy.copy(model)
    monkeypatch.setattr(model, "logits", logits)
    for temperature in (0.0, 1.0):
        sampler = SamplerConfig("sequential", temperature=temperature)
        tokens = [r.tokens for r in generate(model, prompts, dataclasses.replace(config, sampler=sampler))]
        assert 0 not in tokens[0] + tokens[1]
        assert temperature > 0 or tokens == expected


@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
@pytest.mark.parametrize("name", ["sequential", "low_confidence_static"])
def test_static_samplers_take_as_many_forwards_as_they_say(name, tokens_per_step):
    model = _model("sdar_b16", num_layers=2)
    size = model.config.block_size
    sampler = SamplerConfig(name, tokens_per_step=tokens_per_step)
    prompts = _prompts(model.config, (1, 15, 16, 29))
    for prompt, result in zip(
        prompts, generate(model, prompts, DenoiseConfig(max_new_tokens=64 - 1, sampler=sampler)), strict=True
    ):
        opens = [size - len(prompt) % size] + [size] * 8
        blocks = -(-(len(prompt) % size + 63) // size)
        if name == "sequential" and (len(prompt) + 63) % size:
            opens[blocks - 1] -= size - (len(prompt) + 63) % size  # positions behind the limit are not waited for
            assert result.stats.forwards["exact"] == sum(sampler.max_forwards(n) for n in opens[:blocks])
        elif (len(prompt) + 63) % size == 0:
            assert result.stats.forwards["exact"] == sum(sampler.max_forwards(n) for n in opens[:blocks])
        assert result.stats.forwards["commit"] == blocks - 1


def test_chunks_and_pages_change_nothing():
    model = _model("llama", num_layers=2)
    prompts = _prompts(model.config, (1, 8, 23, 64, 70))
    config = DenoiseConfig(max_new_tokens=20, sampler=_sampler("llama", "low_confidence_dynamic"))
    expected = generate(model, prompts, config)
    for page_size, chunk in ((1, 8), (16, 24), (32, 1), (128, 64), (256, 1000)):
        cache = PagedCache.for_model(model, num_pages=5 * -(-96 // page_size), page_size=page_size)
        results, margins = _generate(model, prompts, dataclasses.replace(config, prefill_chunk=chunk), cache=cache)
        _same(results, expected, margins)
        assert results[3].stats.prefill_forwards == -(-64 // max(chunk // 8 * 8, 8))
        assert cache.num_free == cache.num_pages


# --------------------------------------------------------------------------- sub-blocks


@pytest.mark.parametrize("mode", ["exact", "mage"])
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_sub_block_cache_equals_its_own_twin(variant, mode):
    model = _model(variant, num_layers=2)
    config = DenoiseConfig(
        mode=mode,
        max_new_tokens=50,
        sampler=_sampler(variant, "low_confidence_dynamic"),
        sub_block_size=8,
        sub_block_cache=True,
        selection=SelectionConfig(k=16, g=16),
        dense_layers=(0,),
    )
    lengths = [1, 7, 8, 9, 12, 20, 31, 32, 33, 44, 64, 70]
    prompts = _prompts(model.config, lengths)
    seen = []
    results, margins = _generate(model, prompts, config, lambda info: seen.append((info.step, info.rows)))
    plains = [plain_generate(model, prompt, config) for prompt in prompts]
    for result, _ in _same(results, plains, margins):
        assert len(set(result.tokens)) >= 8
    rows = {step.rows for plain in plains for step in plain.steps}
    assert rows == {8, model.config.block_size}
    assert all(rows == model.config.block_size for step, rows in seen if step <= 0)
    rows = []
    alone = [generate(model, [prompt], config, callback=lambda info: rows.append(info.rows))[0] for prompt in prompts]
    _same(results, alone, margins)
    assert 8 in rows  # a batch of one really sends sub-blocks
    whole = generate(model, prompts, dataclasses.replace(config, sub_block_cache=False))
    assert [r.tokens for r in whole] != [r.tokens for r in results]


@pytest.mark.parametrize("score_rows", ["all", "open"])
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_lists_of_a_sub_block_alone_equal_the_twin(variant, score_rows):
    """The second forward selects, from the whole block; those behind it send a sub-block alone."""
    model = _model(variant, num_layers=2)
    config = DenoiseConfig(
        mode="mage",
        max_new_tokens=50,
        sampler=_sampler(variant, "low_confidence_dynamic"),
        sub_block_size=8,
        sub_block_cache=True,
        exact_steps=2,
        selection=SelectionConfig(k=16, g=16, score_rows=score_rows),
        dense_layers=(0,),
    )
    prompts = _prompts(model.config, [9, 33, 44, 64, 70])
    sent = set()
    results, margins = _generate(model, prompts, config)
    for prompt in prompts:
        generate(model, [prompt], config, callback=lambda info: sent.add((info.kind, info.rows)))
    assert ("select", 32 if variant == "fast_dllm_v2" else 16) in sent and ("sparse", 8) in sent
    for result, plain in _same(results, [plain_generate(model, prompt, config) for prompt in prompts], margins):
        assert result.stats.forwards["sparse"] == sum(step.sparse for step in plain.steps) > 0


# --------------------------------------------------------------------------- mode mage

_RULES = {
    "fixed": SelectionConfig(k=32, g=16),
    "fixed_tokens": SelectionConfig(k=24, g=1, sinks=2, recents=4),
    "fixed_max": SelectionConfig(k=32, g=16, score="max", norm="prefix", score_rows="open"),
    "layer": SelectionConfig(rule="layer", k=32, g=16, k_min=16),
    "layer_max": SelectionConfig(rule="layer", k=16, g=16, score="max", score_rows="open"),
    "mass": SelectionConfig(rule="mass", p=0.6, g=16, k_min=16),
    "mass_cut": SelectionConfig(rule="mass", p=0.9, g=16, capacity=2),
    "joint": SelectionConfig(rule="joint", k=32, g=16, sinks=4),
    "fixed_candidates": SelectionConfig(k=24, g=1, sinks=2, recents=4, candidates=64),
    "joint_candidates": SelectionConfig(rule="joint", k=24, g=1, score="max", score_rows="open", candidates=64),
}
_REFRESH = {
    "block": {},
    "blocks": {"refresh": "blocks", "refresh_blocks": 2},
    "kept_mass": {"refresh": "kept_mass", "refresh_bound": 0.75},
}


def _let_flags_lag(monkeypatch):
    """By a step, as on CUDA."""
    plain_init = denoise._LaggingFlags.__init__

    def lagging(self, device):
        plain_init(self, device)
        self.lag = 1

    monkeypatch.setattr(denoise._LaggingFlags, "__init__", lagging)


def _mage(variant, selection, max_new_tokens=40, **fields):
    sampler = _sampler(variant, "low_confidence_dynamic", num_layers=3)
    fields = {"dense_layers": (0,), **fields}
    return DenoiseConfig(mode="mage", max_new_tokens=max_new_tokens, sampler=sampler, selection=selection, **fields)


@pytest.mark.parametrize("refresh", _REFRESH)
@pytest.mark.parametrize(
    ("variant", "k", "g", "score_rows", "dense_layers"),
    [
        ("fast_dllm_v2", 32, 32, "open", (0,)),
        ("fast_dllm_v2", 24, 1, "all", ()),
        ("sdar", 16, 16, "open", (0, 2)),
        ("sdar_b16", 64, 64, "all", (1,)),
        ("llama", 32, 16, "open", (0,)),
        ("llama_shift", 16, 1, "open", (0,)),
    ],
)
def test_mage_equals_plain_loop(variant, k, g, score_rows, dense_layers, refresh):
    """Selections written out in Python over dense softmax: the same tokens, forwards and kinds of forwards."""
    model = _model(variant)
    config = _mage(
        variant, SelectionConfig(k=k, g=g, score_rows=score_rows), dense_layers=dense_layers, **_REFRESH[refresh]
    )
    prompts = _prompts(model.config, (1, 9, 30, 47, 64, 70, 127, 130), seed=3)
    results, margins = _generate(model, prompts, config)
    exact = generate(model, prompts, dataclasses.replace(config, mode="exact"))
    for result, plain in _same(results, [plain_generate(model, prompt, config) for prompt in prompts], margins):
        assert len(set(result.tokens)) >= 8
        assert result.stats.forwards["sparse"] == sum(step.sparse for step in plain.steps)
        assert result.stats.forwards["commit"] == plain.commits
        assert len(result.stats.kept_mass) == result.stats.forwards["select"]
    assert sum(r.stats.forwards["sparse"] for r in results) > 0
    assert [r.tokens for r in results] != [r.tokens for r in exact]
    selected = sum(r.stats.forwards["select"] for r in results)
    blocks = sum(r.stats.forwards["commit"] + 1 for r in results)
    assert 0 < selected < blocks if refresh != "block" else 0 < selected <= blocks


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_what_a_prompts_tail_reads_counts_by_default(variant):
    """The tail's rows are computed anew in every sparse forward. The first forward's mass against softmax written out:
    over all rows of the block by default; "open" counts those alone that predict, and lists less of what the others
    read. (A list A of the most mass over all rows and a list O of the most over the open ones: the other rows' share of
    A is never below their share of O.)"""
    model = _model(variant)
    size, shift, k = model.config.block_size, int(model.config.token_shift), 8
    (prompt,) = _prompts(model.config, (64 + size // 2,), seed=3)
    tail = len(prompt) - 64
    tokens = prompt + [model.config.mask_id] * (size - tail)
    window, causal = PlainWindow(model, len(tokens)), block_causal_mask(len(tokens), size)[None]
    window.forward(tokens, list(range(len(tokens))), lambda layer: causal)
    shares = torch.stack(window.shares)[:, :, :, 64:].mean(2)  # [L, Hkv, block, T]
    is_open = torch.zeros(size, dtype=torch.bool)
    is_open[tail - shift : size - shift] = True
    read = {}
    for name, chosen, counted in (
        ("all", SelectionConfig(k=k, g=1), slice(None)),
        ("open", SelectionConfig(k=k, g=1, score_rows="open"), is_open),
    ):
        seen = []
        config = _mage(variant, chosen, max_new_tokens=size - tail, dense_layers=())
        generate(model, [prompt], config, callback=lambda info, seen=seen: seen.append((info.mass, info.selection)))
        mass, lists = seen[0]
        expected = shares[:, :, counted].mean(2)
        torch.testing.assert_close(mass[:, 0, :, : len(tokens)], expected, atol=1e-5, rtol=1e-4)
        top = expected[..., :64].topk(k).indices.sort().values
        assert torch.equal(lists.indices[:, 0].long(), top)
        read[name] = shares[:, :, ~is_open].mean(2).gather(2, top).sum(2)
    assert SelectionConfig().score_rows == "all"
    assert (read["all"] >= read["open"] - 1e-5).all() and (read["all"] > read["open"] + 0.01).any()


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "llama"])
def test_mage_with_k_past_the_prefix_is_exact(variant, rule):
    model = _model(variant)
    selection = _RULES[rule]
    budget = {"k_min": 256, "capacity": None} if selection.rule == "mass" else {"k": 256}
    budget |= {"candidates": 320} if selection.candidates else {}
    config = _mage(variant, dataclasses.replace(selection, **budget))
    prompts = _prompts(model.config, (1, 8, 31, 32, 50, 64, 70, 150), seed=3)
    results, margins = _generate(model, prompts, config)
    exact = generate(model, prompts, dataclasses.replace(config, mode="exact"))
    for result, expected in _same(results, exact, margins):
        assert len(set(result.tokens)) >= 8
        assert result.stats.forwards == expected.stats.forwards and result.stats.kv_share == 1


@pytest.mark.parametrize("refresh", _REFRESH)
@pytest.mark.parametrize("rule", _RULES)
def test_mage_cpu_equals_reference(rule, refresh):
    """K below the prefix: the CPU backend and the slow twins drive the loop to the same tokens, lists and kept mass."""
    variant = "llama_shift" if rule.startswith("fixed") else "sdar_b16"
    model = _model(variant)
    config = _mage(variant, _RULES[rule], max_new_tokens=36, **_REFRESH[refresh])
    prompts = _prompts(model.config, (1, 40, 64, 97, 130), seed=7)

    def run():
        lists = []

        def callback(info):
            if info.selection is not None:
                lists.append((dict(zip(info.requests, range(9), strict=False)), info.selection))

        return *_generate(model, prompts, config, callback), lists

    results, margins, lists = run()
    with use_reference():
        expected, _, expected_lists = run()
    assert sum(r.stats.forwards["sparse"] for r in results) > 0
    pairs = _same(results, expected, margins)
    for result, twin in pairs:
        assert result.stats.forwards == twin.stats.forwards
        assert len(set(result.tokens)) >= 8
        kept, twin_kept = torch.tensor(result.stats.kept_mass), torch.tensor(twin.stats.kept_mass)
        torch.testing.assert_close(kept, twin_kept, rtol=1e-4, atol=1e-5)
        assert result.stats.kv_bytes == twin.stats.kv_bytes <= result.stats.kv_bytes_exact
    if len(pairs) == len(results):
        for (rows, one), (twin_rows, two) in zip(lists, expected_lists, strict=True):
            assert rows == twin_rows
            assert torch.equal(one.indices, two.indices) and torch.equal(one.tail_start, two.tail_start)


@pytest.mark.parametrize("refresh", _REFRESH)
@pytest.mark.parametrize("rule", ["fixed", "joint"])
@pytest.mark.parametrize("variant", ["llama", "sdar_b16"])
def test_candidates_of_the_whole_prefix_are_all_tokens(variant, rule, refresh):
    """The lists of g = 1 without candidates, all proven, hence its tokens; and where candidates are few, what is proven
    is what the lists have in common with those of all tokens."""
    model = _model(variant)
    chosen = SelectionConfig(rule=rule, k=24, g=1, sinks=2, recents=4)
    config = _mage(variant, chosen, **_REFRESH[refresh])
    prompts = _prompts(model.config, (1, 30, 47, 64, 70, 130), seed=3)
    expected, margins = _generate(model, prompts, config)
    wide = dataclasses.replace(config, selection=dataclasses.replace(chosen, candidates=256))
    results = generate(model, prompts, wide)
    for result, twin in _same(results, expected, margins):
        assert result.stats.forwards == twin.stats.forwards and result.stats.kv_bytes == twin.stats.kv_bytes
        torch.testing.assert_close(torch.tensor(result.stats.kept_mass), torch.tensor(twin.stats.kept_mass))
        assert result.stats.proven == [1.0] * result.stats.forwards["select"] and twin.stats.proven == []
    seen = []
    few = dataclasses.replace(config, selection=dataclasses.replace(chosen, candidates=64), refresh="block")
    results = generate(model, prompts, few, callback=seen.append)
    assert all(len(r.stats.proven) == r.stats.forwards["select"] for r in results)
    shares = [share for r in results for share in r.stats.proven]
    assert min(shares) < 1 and all(0 <= share <= 1 for share in shares)
    emitted = [info for info in seen if info.candidates is not None]
    assert emitted and all(info.mass is None and info.selection.g == 1 for info in emitted)
    assert all(info.candidates is None for info in seen if info.kind in ("exact", "sparse", "commit"))


@pytest.mark.parametrize("fields", [dict(fuse_commit=True), dict(exact_steps=2), dict(strict=True)], ids=str)
def test_candidates_beside_other_options(fields):
    """Rows of the block before in the same forward, a selection in the second one, places without a request."""
    model = _model("llama")
    chosen = SelectionConfig(k=24, g=1, recents=4, score_rows="open", norm="prefix")
    config = _mage("llama", chosen, **fields)
    prompts = _prompts(model.config, (30, 47, 130), seed=3)
    expected, margins = _generate(model, prompts, config, max_batch=2)
    wide = dataclasses.replace(config, selection=dataclasses.replace(chosen, candidates=256))
    for result, twin in _same(generate(model, prompts, wide, max_batch=2), expected, margins):
        assert result.stats.forwards == twin.stats.forwards and result.stats.forwards["sparse"] > 0
        assert set(result.stats.proven) == {1.0}
        torch.testing.assert_close(torch.tensor(result.stats.kept_mass), torch.tensor(twin.stats.kept_mass))


@pytest.mark.parametrize("rule", ["fixed_max", "layer_max", "joint_candidates"])
def test_a_forward_that_selects_sends_the_whole_block(rule):
    """Also the second one, whatever is cached: who sits a forward of a sub-block out would select from nothing."""
    model = _model("fast_dllm_v2")
    sampler = SamplerConfig(name="sequential", tokens_per_step=2)
    config = _mage("fast_dllm_v2", _RULES[rule], sub_block_cache=True, exact_steps=2)
    config = dataclasses.replace(config, sampler=sampler)
    sent = set()
    (result,) = generate(model, _prompts(model.config, [70]), config, callback=lambda i: sent.add((i.kind, i.rows)))
    assert ("select", 32) in sent and ("select", 8) not in sent and ("sparse", 8) in sent
    assert result.stats.forwards["sparse"] > 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("fields", [dict(refresh="blocks", refresh_blocks=4), dict(sub_block_cache=True)], ids=str)
@pytest.mark.parametrize("threshold", [0.05, 0.1])
def test_blocks_that_end_before_they_select(threshold, fields, lag, monkeypatch):
    """With three exact forwards: who is done before the third has no lists of its own, whatever its mates still do."""
    if lag:
        _let_flags_lag(monkeypatch)
    model = _model("sdar_b16", eos_ids=())
    config = _mage("sdar_b16", SelectionConfig(k=32, g=16), 80, exact_steps=3, sub_block_size=8, **fields)
    sampler = SamplerConfig("low_confidence_dynamic", threshold=threshold)
    config = dataclasses.replace(config, sampler=sampler, dense_layers=())
    prompts = _prompts(model.config, (130, 150, 170, 190))
    results, margins = _generate(model, prompts, config)
    assert threshold > 0.05 or any(r.stats.forwards["select"] < len(r.tokens) // 16 for r in results)
    for result, alone in _same(results, [generate(model, [prompt], config)[0] for prompt in prompts], margins):
        assert alone.stats.forwards == result.stats.forwards
        assert alone.stats.kv_bytes == result.stats.kv_bytes


@pytest.mark.parametrize("refresh", _REFRESH)
@pytest.mark.parametrize("rule", ["fixed", "layer", "mass", "joint", "fixed_candidates"])
def test_mage_does_not_depend_on_batch_mates(rule, refresh):
    """Exact, selecting and carrying requests share a batch; each gets what it gets alone."""
    model = _model("llama")
    config = _mage("llama", _RULES[rule], **_REFRESH[refresh])
    prompts = _prompts(model.config, (1, 24, 31, 32, 40, 90, 131), seed=2)
    kinds = set()
    results, margins = _generate(model, prompts, config, lambda info: kinds.add(info.kind))
    assert rule == "mass" or "mixed" in kinds
    for result, alone in _same(results, [generate(model, [prompt], config)[0] for prompt in prompts], margins):
        assert alone.stats.forwards == result.stats.forwards
        assert alone.stats.kv_bytes == result.stats.kv_bytes


def test_costs_of_a_known_block():
    """One block of 8 after 64 tokens with K = 16: bytes by hand."""
    model = _model("llama")
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=2)
    config = dataclasses.replace(
        _mage("llama", SelectionConfig(k=16, g=16)), max_new_tokens=16, sampler=sampler, dense_layers=(0,)
    )
    stats = generate(model, _prompts(model.config, [64]), config)[0].stats
    token = 2 * 16 * 4  # K and V of 16 floats
    layers, heads = model.config.num_layers, model.config.num_kv_heads
    assert stats.forwards == {"exact": 0, "select": 2, "sparse": 6, "commit": 1}
    whole = [72 * layers * heads, 80 * layers * heads]
    sparse = [(72 + 2 * (16 + 8)) * heads, (80 + 2 * (16 + 16 - 8 * 0) - 0) * heads]
    # The second block starts at 72: half a unit of 16 is partial, is charged to K and leaves no unit to list.
    sparse[1] = (80 + 2 * (0 + 16)) * heads
    assert stats.kv_bytes_exact == token * (5 * whole[0] + 4 * whole[1])
    assert stats.kv_bytes == token * (2 * whole[0] + 3 * sparse[0] + whole[1] + 3 * sparse[1])
    assert stats.tokens_per_forward == 16 / 9
    assert len(stats.kept_mass) == 2 and all(0 < kept < 1 for kept in stats.kept_mass)


def test_select_override():
    model = _model("llama")
    config = _mage("llama", SelectionConfig(k=32, g=16, sinks=4))
    prompts = _prompts(model.config, (64, 100))
    lists = {}
    for name, override in (
        ("own", None),
        ("recency", recency_selection),
        ("random", functools.partial(random_selection, seed=1)),
    ):
        lists[name] = []
        generate(
            model,
            prompts,
            dataclasses.replace(config, select_override=override),
            callback=lambda info, name=name: lists[name].append(info.selection) if info.kind == "select" else None,
        )
    own, recency, drawn = (lists[name][0] for name in ("own", "recency", "random"))
    assert torch.equal(own.counts, recency.counts) and torch.equal(own.counts, drawn.counts)
    assert recency.units(0, 0, 0) == [0, 3] and recency.units(1, 0, 0) == [0, 5]
    assert not torch.equal(own.indices, drawn.indices)
    wrong = dataclasses.replace(config, select_override=lambda mass, *a, **k: recency_selection(mass[:1], *a, **k))
    with pytest.raises(ValueError, match=r"select_override must return lists .* \[2, 2, 2\] .* got \[1, 2, 2\]"):
        generate(model, prompts, wrong)


def _past_the_tail(chosen):
    chosen.indices[1, 1, 0, 0] = 10_000
    return chosen


def _moved_tail(chosen):
    return dataclasses.replace(chosen, tail_start=chosen.tail_start + 16)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "select_override must return a BlockSelection, got NoneType", lambda chosen: None),
        (TypeError, "select_override must return a BlockSelection, got tuple", lambda chosen: (chosen.indices,)),
        (ValueError, r"select_override must .*indices\[1, 1, 0, 0\] must be in .* got 10000", _past_the_tail),
        (ValueError, "select_override must return tail_start 64 for request 0, got 80", _moved_tail),
        (
            ValueError,
            "select_override must return lists on cpu, got meta",
            lambda chosen: chosen.to("meta"),
        ),
    ],
)
def test_what_select_override_returns_is_checked(error, match, change):
    model = _model("llama")
    config = _mage("llama", SelectionConfig(k=32, g=16, sinks=4))
    config = dataclasses.replace(config, select_override=lambda *a, **k: change(recency_selection(*a, **k)))
    with pytest.raises(error, match=f"generate: {match}"):
        generate(model, _prompts(model.config, (64, 100)), config)


@pytest.mark.parametrize("refresh", ["blocks", "kept_mass"])
def test_an_override_that_selects_as_usual_changes_nothing(refresh):
    # Short requests are exact and longer ones carry: their rows pass the checks, too.
    model = _model("llama")
    config = dataclasses.replace(
        _mage("llama", SelectionConfig(k=32, g=16, sinks=4), max_new_tokens=24), refresh=refresh
    )
    prompts = _prompts(model.config, (20, 44, 100))
    kinds = set()
    expected = [r.tokens for r in generate(model, prompts, config, callback=lambda info: kinds.add(info.kind))]
    assert "mixed" in kinds
    config = dataclasses.replace(config, select_override=select)
    assert [r.tokens for r in generate(model, prompts, config)] == expected


# --------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_draws_depend_on_seed_position_and_step_alone(variant):
    model = _model(variant, num_layers=2)
    sampler = dataclasses.replace(_sampler(variant, "low_confidence_static"), temperature=1.3, top_k=40, top_p=0.95)
    config = DenoiseConfig(max_new_tokens=40, sampler=sampler)
    prompts = _prompts(model.config, (5, 20, 32, 50))
    seeds = [11, -3, 7, 2**62]
    results = [r.tokens for r in generate(model, prompts, config, seeds=seeds)]
    assert results == [r.tokens for r in generate(model, prompts, config, seeds=seeds)]
    for prompt, seed, tokens in zip(prompts, seeds, results, strict=True):
        assert generate(model, [prompt], config, seeds=[seed])[0].tokens == tokens
        assert plain_generate(model, prompt, config, seed).tokens == tokens
        assert len(set(tokens)) >= 8
    others = [r.tokens for r in generate(model, prompts, config, seeds=[1, 2, 3, 4])]
    assert all(one != two for one, two in zip(results, others, strict=True))


def test_token_before_a_block_is_the_most_probable_one_at_any_temperature():
    model = _model("llama_shift", num_layers=2)
    prompts = _prompts(model.config, (16, 32))
    cold = generate(model, prompts, DenoiseConfig(max_new_tokens=1))
    hot = generate(
        model, prompts, DenoiseConfig(max_new_tokens=1, sampler=SamplerConfig(temperature=50.0)), seeds=[8, 9]
    )
    assert [r.tokens for r in cold] == [r.tokens for r in hot]


# --------------------------------------------------------------------------- batches, forks, caches


@pytest.mark.parametrize("mode", ["exact", "mage"])
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar"])
def test_a_flag_that_lags_changes_nothing(variant, mode, monkeypatch):
    """As on CUDA: a step more in blocks that end before they must, and the same tokens, K/V and draws."""
    model = _model(variant)
    config = dataclasses.replace(
        _mage(variant, SelectionConfig(k=16, g=16), max_new_tokens=40), mode=mode, sub_block_cache=variant != "sdar"
    )
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, temperature=0.7))
    prompts = _prompts(model.config, (3, 32, 41, 64))

    def run():
        cache = PagedCache.for_model(model, num_pages=40, page_size=16)
        for layer in range(3):
            for pool in cache.layer(layer):
                pool.zero_()
        kinds = []
        results = generate(model, prompts, config, cache=cache, callback=lambda info: kinds.append(info.kind))
        return results, cache, kinds

    results, cache, kinds = run()
    _let_flags_lag(monkeypatch)
    lagged, lagged_cache, lagged_kinds = run()
    assert [r.tokens for r in results] == [r.tokens for r in lagged]
    assert [r.stats.forwards for r in results] == [r.stats.forwards for r in lagged]
    # Blocks of 4 take all steps that they may.
    assert len(lagged_kinds) > len(kinds) or variant == "sdar"
    assert len(lagged_kinds) >= len(kinds)
    for layer in range(3):
        for pool, lagged_pool in zip(cache.layer(layer), lagged_cache.layer(layer), strict=True):
            torch.testing.assert_close(pool, lagged_pool, rtol=1e-4, atol=1e-5)


def test_a_refused_call_leaves_the_seeds_of_a_prefill():
    model = _model("llama")
    config = DenoiseConfig(max_new_tokens=16, sampler=SamplerConfig(temperature=0.9))
    prompts = _prompts(model.config, (30, 41))
    state = prefill(model, prompts, config, seeds=[4, 5])
    too_long = dataclasses.replace(config, max_new_tokens=model.config.max_positions)
    with pytest.raises(ValueError, match=r"prompts\[0\] and max_new_tokens must fit"):
        generate(model, state, too_long, seeds=[6, 7])
    expected = [r.tokens for r in generate(model, prompts, config, seeds=[4, 5])]
    assert [r.tokens for r in generate(model, state, config)] == expected


def test_forks_share_a_prefill():
    model = _model("llama")
    prompts = _prompts(model.config, (5, 64, 90, 130))
    configs = [
        DenoiseConfig(max_new_tokens=30, sampler=_sampler("llama", "low_confidence_dynamic", 3)),
        _mage("llama", SelectionConfig(k=32, g=16), max_new_tokens=50),
        _mage("llama", SelectionConfig(k=16, g=1), max_new_tokens=20),
    ]
    fresh = [[r.tokens for r in generate(model, prompts, config)] for config in configs]
    state = prefill(model, prompts, configs[0])
    cache = state.batch.cache
    used = cache.num_pages - cache.num_free
    for config, expected in zip(configs, fresh, strict=True):
        results = generate(model, state.fork(), config)
        assert [r.tokens for r in results] == expected
        assert results[3].stats.prefill_forwards == 1
    assert cache.num_pages - cache.num_free == used  # the forks' pages are back
    # Two forks at once, block by block.
    streams = [generate(model, state.fork(), config, stream=True) for config in configs[:2]]
    for _ in itertools.zip_longest(*streams):
        pass
    assert [[r.tokens for r in stream.results] for stream in streams] == fresh[:2]
    assert [r.tokens for r in generate(model, state, configs[0])] == fresh[0]
    assert cache.num_free == cache.num_pages
    with pytest.raises(ValueError, match="must not have been used up"):
        generate(model, state, configs[0])
    with pytest.raises(ValueError, match="must not have been used up"):
        state.fork()


@pytest.mark.parametrize("mode", ["exact", "mage"])
def test_what_was_not_written_is_never_read(mode):
    """Pools full of NaN, and pages that other requests leave behind."""
    model = _model("llama")
    config = dataclasses.replace(_mage("llama", SelectionConfig(k=32, g=16)), mode=mode)
    prompts = _prompts(model.config, (3, 24, 61, 90))
    expected = [r.tokens for r in generate(model, prompts, config)]
    cache = PagedCache.for_model(model, num_pages=4 * 3, page_size=64)
    for layer in range(3):
        for pool in cache.layer(layer):
            pool.fill_(torch.nan)
    for _ in range(2):
        assert [r.tokens for r in generate(model, prompts, config, cache=cache)] == expected
        prompts, expected = prompts[::-1], expected[::-1]


@pytest.mark.parametrize("mode", ["exact", "mage"])
def test_a_request_without_pages_is_refused_alone(mode):
    model = _model("llama")
    config = dataclasses.replace(_mage("llama", SelectionConfig(k=32, g=16), max_new_tokens=20), mode=mode)
    prompts = _prompts(model.config, (40, 200, 90, 30))
    expected = [r.tokens for r in generate(model, [prompts[0], prompts[2], prompts[3]], config)]
    cache = PagedCache.for_model(model, num_pages=15, page_size=16)
    results = generate(model, prompts, config, cache=cache)
    assert [r.finish for r in results] == ["length", "refused", "length", "length"]
    assert [results[i].tokens for i in (0, 2, 3)] == expected
    assert results[1].tokens == [] and "request 1 must find 14 free pages" in results[1].error
    assert results[1].stats.num_forwards == results[1].stats.prefill_forwards == 0
    assert cache.num_free == cache.num_pages


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("mode", ["exact", "mage"])
def test_a_request_without_logits_fails_alone(mode, value, temperature, monkeypatch):
    """From its second block on, request 1 gets nothing from the model."""
    model = _model("sdar")
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=2, temperature=temperature)
    config = dataclasses.replace(
        _mage("sdar", SelectionConfig(k=32, g=16), max_new_tokens=20), mode=mode, sampler=sampler, ignore_eos=True
    )
    prompts = _prompts(model.config, (40, 90, 30))
    expected = generate(model, prompts, config)
    draw, logits = denoise._Run._draw, type(model).logits

    def spoil(run, hidden, rows, slots):
        rows_of = hidden.view(slots.num_places, -1, hidden.shape[-1]).clone()
        for place, request in enumerate(slots.requests):
            if request == 1 and run.state.blocks[1] == 1:
                rows_of[place] = float("nan")
        return draw(run, rows_of.flatten(0, 1), rows, slots)

    def spoiled_logits(self, hidden):
        lost = hidden.isnan().any(-1, keepdim=True)
        return torch.where(lost, value, logits(self, hidden))

    monkeypatch.setattr(denoise._Run, "_draw", spoil)
    monkeypatch.setattr(type(model), "logits", spoiled_logits)
    cache = PagedCache.for_model(model, num_pages=64, page_size=16)
    with generate(model, prompts, config, cache=cache, stream=True) as stream:
        blocks = list(stream)
    results = stream.results
    assert [r.finish for r in results] == ["length", "failed", "length"]
    assert [results[i].tokens for i in (0, 2)] == [expected[i].tokens for i in (0, 2)]
    of_first = [token for block in blocks if block.request == 1 and block.index == 0 for token in block.tokens]
    assert results[1].tokens == of_first == expected[1].tokens[: len(of_first)] and of_first
    assert "logits above -inf, got a row of block 1" in results[1].error
    assert [(b.tokens, b.done, b.error) for b in blocks if b.request == 1][1:] == [([], True, results[1].error)]
    assert cache.num_free == cache.num_pages
    with pytest.raises(ValueError, match=r"^me: request 1 failed: the model must give"):
        check_answered("me", results)


def test_a_batch_of_refused_requests_only():
    model = _model("llama")
    cache = PagedCache.for_model(model, num_pages=1, page_size=16)
    results = generate(model, _prompts(model.config, (40, 50)), DenoiseConfig(max_new_tokens=8), cache=cache)
    assert [r.finish for r in results] == ["refused", "refused"]


def test_a_fork_that_needs_more_pages_is_refused():
    model = _model("llama")
    cache = PagedCache.for_model(model, num_pages=6, page_size=16)
    state = prefill(model, _prompts(model.config, (64,)), DenoiseConfig(max_new_tokens=16), cache=cache)
    assert generate(model, state.fork(), DenoiseConfig(max_new_tokens=48))[0].finish == "refused"
    assert generate(model, state.fork(), DenoiseConfig(max_new_tokens=16))[0].finish == "length"


def test_stream_yields_blocks_as_they_end():
    model = _model("llama", num_layers=2)
    config = DenoiseConfig(max_new_tokens=21, sampler=_sampler("llama", "low_confidence_dynamic"))
    prompts = _prompts(model.config, (4, 8, 19))
    expected = generate(model, prompts, config)
    stream = generate(model, prompts, config, stream=True)
    with pytest.raises(RuntimeError, match="after the last block"):
        _ = stream.results
    blocks = list(stream)
    assert [r.tokens for r in stream.results] == [r.tokens for r in expected]
    for request in range(3):
        own = [block for block in blocks if block.request == request]
        assert [block.index for block in own] == list(range(len(own)))
        assert [block.done for block in own] == [False] * (len(own) - 1) + [True]
        assert list(itertools.chain(*(block.tokens for block in own))) == expected[request].tokens
    # Whoever stops early leaves no pages behind.
    cache = PagedCache.for_model(model, num_pages=12, page_size=16)
    stream = generate(model, prompts, config, stream=True, cache=cache)
    next(stream)
    assert cache.num_free < 12
    stream._blocks.close()
    assert cache.num_free == 12
    for started in (False, True):
        stream = generate(model, prompts, config, stream=True, cache=cache)
        if started:
            next(stream)
        assert cache.num_free < 12
        del stream
        assert cache.num_free == 12
    # A stream that ended gives nothing back twice, and not what others hold since.
    stream = generate(model, prompts, config, stream=True, cache=cache)
    list(stream)
    other = prefill(model, prompts, config, cache=cache)
    free = cache.num_free
    del stream
    assert cache.num_free == free < 12
    other.release()


def test_callback_sees_every_forward():
    model = _model("llama_shift")
    config = _mage("llama_shift", SelectionConfig(k=16, g=16), max_new_tokens=40)
    prompts = _prompts(model.config, (33,))
    infos = []

    def callback(info):
        infos.append((info.kind, info.index, info.step, info.open.sum().item(), info.decided.sum().item(), info.mass))
        assert info.requests == [0] and info.starts == [32 + 16 * info.index]
        assert (info.tokens[info.open] == model.config.mask_id).all()
        assert not (info.open & info.decided).any()
        assert (info.selection is None) == (info.kind in ("exact", "commit"))

    result = generate(model, prompts, config, callback=callback)[0]
    kinds = [info[0] for info in infos]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {k: n for k, n in result.stats.forwards.items() if n}
    assert kinds[0] == "select" and all(info[4] >= 1 for info in infos if info[0] != "commit")
    assert all((info[5] is not None) == (info[0] == "select") for info in infos)
    mass = infos[0][5]
    assert mass.shape == (2, 1, 2, 3)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 1, 2), rtol=1e-5, atol=1e-5)
    assert sum(info[4] for info in infos if info[1] == 0) == 15  # 16 positions, one of the prompt


def test_text_comes_from_the_tokenizer():
    class Letters:
        def decode(self, ids):
            return " ".join(map(str, ids))

    model = _model("sdar", num_layers=2)
    result = generate(model, _prompts(model.config, [6]), DenoiseConfig(max_new_tokens=5), tokenizer=Letters())[0]
    assert result.text == " ".join(map(str, result.tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = tiny_model(tiny_config("fast_dllm_v2"), dtype=dtype)
    config = DenoiseConfig(mode="mage", max_new_tokens=40, selection=SelectionConfig(k=32, g=32), dense_layers=(0,))
    results = generate(model, _prompts(model.config, (5, 70, 128)), config)
    assert all(len(set(r.tokens)) >= 8 and r.finish == "length" for r in results)
    assert results[2].stats.forwards["sparse"] > 0


def test_nothing_is_printed_without_a_terminal(capfd):
    model = _model("sdar", num_layers=2)
    generate(model, _prompts(model.config, [9]), DenoiseConfig(max_new_tokens=5), progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_is_one_line_on_a_terminal(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    line = Progress()
    line.show("first")
    line.show("too soon")
    line.clear()
    line.clear()
    assert capsys.readouterr().err == "\r\x1b[Kfirst\r\x1b[K"
