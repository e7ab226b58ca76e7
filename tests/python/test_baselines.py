"""Quest, Tidal, SparseD and the dense loops against what they are defined to be, written out.

Run: pytest tests/python/test_baselines.py
"""

import copy
import dataclasses
import math

import pytest
import torch

from mage_ext.cache import OutOfPages, PagedCache, RaggedBatch
from mage_ext.denoise import DenoiseConfig, StepGraphs, generate, prefill
from mage_ext.evaluation import baselines
from mage_ext.evaluation.baselines import Quest, Tidal, methods, sparsed_config
from mage_ext.evaluation.dense_loops import (
    ContiguousCache,
    autoregressive,
    causal_prefill,
    published_loop,
    published_prefill,
)
from mage_ext.paged_forward import PagedForward, Write
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig
from mage_ext.testing.tiny import VARIANTS, tiny_config, tiny_model

gpu = pytest.mark.gpu
LENGTHS = (20, 90, 131, 40, 64)
STATIC = SamplerConfig("low_confidence_static", tokens_per_step=8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(variant="fast_dllm_v2", **overrides):
    return tiny_model(tiny_config(variant, **overrides), seed=1)


def _cuda_model(variant="fast_dllm_v2"):
    config = tiny_config(variant, num_layers=4, hidden_size=128, head_dim=64)
    return tiny_model(config, seed=1, dtype=torch.bfloat16).to("cuda")


def _prompts(model, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, model.config.mask_id, (n,), generator=generator).tolist() for n in lengths]


def _cache(model, page_size=64, tokens=1024):
    """A cache whose pools hold NaN."""
    cache = PagedCache.for_model(model, num_pages=tokens // page_size, page_size=page_size)
    for layer in range(cache.num_layers):
        for pool in cache.layer(layer):
            pool.fill_(math.nan)
    return cache


def _config(method=None, **fields):
    fields = {"max_new_tokens": 40, "dense_layers": (0,), "sampler": STATIC, **fields}
    return DenoiseConfig(mode="exact" if method is None else "method", method=method, **fields)


def _tokens(results):
    return [result.tokens for result in results]


# --------------------------------------------------------------------------- what a forward over lists is


def _keys_of(cache, pool, table, request, num_tokens):
    """K or V [num_tokens, Hkv, D] of a request, page by page."""
    pages = [pool[int(page)] for page in table[request, : cache.pages_for(num_tokens)]]
    return torch.cat(pages)[:num_tokens]


def _attention(q, k, v, kept):
    """[Q, H, D] of q [Q, H, D] over the tokens of k, v [S, Hkv, D] that kept[head] lists."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        tokens = kept[head // group]
        scores = q[:, head] @ k[tokens, head // group].T * q.shape[-1] ** -0.5
        out[:, head] = scores.softmax(-1) @ v[tokens, head // group]
    return out


def _kept_tokens(lists, request, num_tokens, g):
    """Tokens that lists attend, per KV head."""
    indices, counts, tail_start = lists
    kept = []
    for head in range(indices.shape[1]):
        units = indices[request, head, : counts[request, head]].tolist()
        assert units == sorted(set(units)) and all(0 <= unit < tail_start[request] // g for unit in units)
        kept.append([u * g + i for u in units for i in range(g)] + list(range(int(tail_start[request]), num_tokens)))
    return kept


def _check_choice(lists, request, scores, prefix_len, config):
    """The best K / g units of every KV head by scores[head][unit], one fewer beside a partial unit, up to rounding."""
    indices, counts, tail_start = lists
    whole = prefix_len // config.g
    assert int(tail_start[request]) == whole * config.g
    for head, score in enumerate(scores):
        chosen = indices[request, head, : counts[request, head]].tolist()
        assert len(chosen) == min(whole, config.k // config.g - (prefix_len % config.g > 0))
        forced = {u for u in range(whole) if u * config.g < config.sinks}
        forced |= {u for u in range(whole) if (u + 1) * config.g > prefix_len - config.recents}
        assert forced <= set(chosen)
        left = [float(score[u]) for u in range(whole) if u not in chosen]
        free = [float(score[u]) for u in chosen if u not in forced]
        if left and free:
            assert min(free) >= max(left) - 1e-5 * max(1.0, abs(max(left)))


class CheckedQuest(Quest):
    """Quest that holds every forward against loops over units, tokens and rows."""

    checked = 0

    def attend(self, forward, layer, q, k_cache, v_cache):
        config, g = self.selection, self.selection.g
        seen = {}

        def spy(*arguments):
            seen["lists"] = arguments[-2]
            return attend_lists(*arguments)

        attend_lists, forward.attend_lists = forward.attend_lists, spy
        try:
            out = super().attend(forward, layer, q, k_cache, v_cache)
        finally:
            forward.attend_lists = attend_lists
        scores = self.scores(forward, layer, q)
        for request in range(len(q)):
            num_tokens, prefix_len = int(forward.seq_lens[request]), int(forward.prefix_lens[request])
            if not num_tokens:
                assert not out[request].any()
                continue
            keys = _keys_of(self.cache, k_cache, forward.block_table, request, num_tokens)
            values = _keys_of(self.cache, v_cache, forward.block_table, request, num_tokens)
            group = q.shape[2] // keys.shape[1]
            whole, per_page = prefix_len // g, self.cache.page_size // g
            units = keys[: whole * g].unflatten(0, (whole, g))  # [whole, g, Hkv, D]
            low, high = units.amin(1), units.amax(1)
            places = [(int(forward.block_table[request, u // per_page]), u % per_page) for u in range(whole)]
            for unit, (page, place) in enumerate(places):
                assert torch.equal(self.bounds[layer, page, place], torch.stack((low[unit], high[unit]), 1))
            expected = torch.zeros(keys.shape[1], whole)
            for head in range(keys.shape[1]):
                rows = q[request, :, head * group : (head + 1) * group].flatten(0, 1)[:, None]  # [R, 1, D]
                bound = torch.maximum(rows * low[:, head], rows * high[:, head]).sum(-1)  # [R, whole]
                products = (rows[:, :, None] * units[:, :, head]).sum(-1)  # [R, whole, g]
                assert (products <= bound[..., None] + 1e-4).all()
                if self.norm == "prefix":
                    bound = (bound * q.shape[-1] ** -0.5).softmax(-1)
                expected[head] = bound.amax(0) if config.score == "max" else bound.mean(0)
            torch.testing.assert_close(scores[request, :, :whole], expected, rtol=1e-5, atol=1e-4)
            _check_choice(seen["lists"], request, expected, prefix_len, config)
            kept = _kept_tokens(seen["lists"], request, num_tokens, g)
            torch.testing.assert_close(out[request], _attention(q[request], keys, values, kept), rtol=1e-4, atol=1e-4)
            read = sum(map(len, kept)) / len(kept) + whole
            assert self.tokens_read(prefix_len, num_tokens) == read
            self.checked += 1
        return out


class CheckedTidal(Tidal):
    """Tidal that holds every forward against its definition."""

    checked = 0

    def attend(self, forward, layer, q, k_cache, v_cache):
        g, held = self.selection.g, forward.shared.get("lists")
        out = super().attend(forward, layer, q, k_cache, v_cache)
        lists = forward.shared["lists"]
        assert (lists is held) == (layer not in self.anchors)
        for request in range(len(q)):
            num_tokens, prefix_len = int(forward.seq_lens[request]), int(forward.prefix_lens[request])
            if not num_tokens:
                assert not out[request].any()
                continue
            keys = _keys_of(forward.cache, k_cache, forward.block_table, request, num_tokens)
            values = _keys_of(forward.cache, v_cache, forward.block_table, request, num_tokens)
            kept = _kept_tokens(lists, request, num_tokens, g)
            if layer in self.anchors:
                group = q.shape[2] // keys.shape[1]
                masses = []
                for head in range(keys.shape[1]):
                    rows = q[request, :, head * group : (head + 1) * group].flatten(0, 1)
                    share = (rows @ keys[:, head].T * q.shape[-1] ** -0.5).softmax(-1)  # [R, S]
                    units = [share[:, u * g : (u + 1) * g].sum(-1) for u in range(max(prefix_len // g, 1))]
                    units = torch.stack(units)
                    masses.append(units.mean(-1) if self.selection.score == "mean" else units.amax(-1))
                _check_choice(lists, request, masses, prefix_len, self.selection)
                kept = [list(range(num_tokens))] * keys.shape[1]
            torch.testing.assert_close(out[request], _attention(q[request], keys, values, kept), rtol=1e-4, atol=1e-4)
            self.checked += 1
        return out


# --------------------------------------------------------------------------- Quest


@pytest.mark.parametrize(
    ("variant", "page_size", "options"),
    [
        ("fast_dllm_v2", 64, dict(k=32, g=16)),
        ("fast_dllm_v2", 64, dict(k=64, g=64, score="mean")),
        ("sdar_b16", 32, dict(k=48, g=16, sinks=4, recents=20, score="mean")),
        ("sdar", 16, dict(k=12, g=1, sinks=2, recents=4)),
        ("llama_shift", 128, dict(k=64, g=32)),
        ("fast_dllm_v2", 64, dict(k=32, g=16, norm="prefix")),
        ("llama_shift", 64, dict(k=12, g=1, norm="prefix", score="mean")),
    ],
)
def test_quest_is_what_it_is_defined_to_be(variant, page_size, options):
    """Bounds, scores, lists and attention of every forward: ragged chunks, who joins later, NaN in the pools."""
    model = _model(variant)
    cache = _cache(model, page_size, tokens=768)
    method = CheckedQuest(cache, **options)
    prompts = _prompts(model, (20, 90, 131, 40) if variant == "sdar" else LENGTHS)
    config = _config(method, prefill_chunk=32, max_new_tokens=20 if variant == "sdar" else 40)
    results = generate(model, prompts, config, cache=cache, max_batch=3)
    assert [len(result.tokens) for result in results] == [config.max_new_tokens] * len(prompts)
    assert method.checked > 20
    assert all(0 < result.stats.kv_share < 2 for result in results)


def test_methods_refuse_sub_blocks_that_are_sent_alone():
    """Their lists would come from the rows sent, and how many these are depends on the mates."""
    method = Tidal((1, 2), k=32, g=16)
    with pytest.raises(ValueError, match=r'sub_block_cache must be off with mode "method", .*, got True'):
        _config(method, sub_block_cache=True)


@pytest.mark.parametrize("kind", ["quest", "tidal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lists_of_everything_are_exact(variant, kind):
    model = _model(variant)
    cache = _cache(model, page_size=16)
    method = Quest(cache, k=512, g=16) if kind == "quest" else Tidal((1, 2), k=512, g=16)
    prompts = _prompts(model)
    expected = generate(model, prompts, _config())
    results = generate(model, prompts, _config(method), cache=cache, max_batch=2)
    assert _tokens(results) == _tokens(expected)
    if kind == "tidal":
        assert all(result.stats.kv_share == 1 for result in results)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_strict_runs_do_not_depend_on_batch_mates(temperature):
    model = _model()
    sampler = dataclasses.replace(STATIC, temperature=temperature)
    prompts = _prompts(model)
    for make in (lambda cache: Quest(cache, k=32, g=16), lambda cache: Tidal((0, 1, 2), k=32, g=16)):
        cache = _cache(model)
        config = _config(make(cache), strict=True, sampler=sampler, dense_layers=())
        if isinstance(config.method, Quest):
            config = dataclasses.replace(config, dense_layers=(0,))
        together = generate(model, prompts, config, cache=cache, max_batch=3)
        assert _tokens(generate(model, prompts, config, cache=cache, max_batch=3)) == _tokens(together)
        for prompt, result in zip(prompts, together, strict=True):
            alone = generate(model, [prompt], config, cache=cache, max_batch=3, seeds=[result.request])[0]
            assert alone.tokens == result.tokens and alone.stats.kv_bytes == result.stats.kv_bytes


def test_prepare_makes_the_bounds_of_a_prefill_without_the_method():
    """Shared by several methods and forked, over pages that end inside units and blocks."""
    model = _model("llama")  # blocks of 8
    prompts = _prompts(model, (30, 77, 133))
    cache = _cache(model)
    own = Quest(cache, k=32, g=16)
    expected = generate(model, prompts, _config(own), cache=cache)

    cache = PagedCache.for_model(model, num_pages=6, growable=True)
    for pool in cache.layer(0):
        pool.fill_(math.nan)
    method = Quest(cache, k=32, g=16)
    state = prefill(model, prompts, _config(), cache=cache)
    fork = state.fork()
    assert cache.num_pages > 6
    method.prepare()
    assert method.bounds.shape == (3, cache.num_pages, 4, 2, 2, 16)
    assert _tokens(generate(model, fork, _config(method))) == _tokens(expected)


def test_a_cache_that_grows_keeps_its_bounds():
    model = _model()
    prompts = _prompts(model)
    expected = generate(model, prompts, _config(Quest(cache := _cache(model), k=32, g=16)), cache=cache, max_batch=2)
    cache = PagedCache.for_model(model, num_pages=1, page_size=16, growable=True)
    config = _config(CheckedQuest(cache, k=32, g=16))
    assert _tokens(generate(model, prompts, config, cache=cache, max_batch=2)) == _tokens(expected)


def test_scores_become_numbers_that_select_kv_ranks_alike():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, generator=generator) * 10.0 ** torch.randint(-30, 30, (4000,), generator=generator)
    extremes = [0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]
    scores = torch.cat((scores, torch.tensor(extremes)))
    mass = baselines._as_mass(scores)
    assert (mass >= 0).all() and mass.isfinite().all()
    order = scores.argsort()
    assert (mass[order].diff() >= 0).all()
    apart = scores[order].diff() > 1e-6 * scores[order].abs()[1:].clamp(min=1e-38)
    assert (mass[order].diff()[apart] > 0).all()
    assert baselines._as_mass(torch.tensor([math.nan, -math.nan, math.inf, -math.inf])).isfinite().all()


# --------------------------------------------------------------------------- Tidal


@pytest.mark.parametrize(
    ("variant", "dense", "options", "anchors"),
    [
        ("fast_dllm_v2", (0,), dict(k=32, g=16), (1, 2)),
        ("sdar_b16", (), dict(k=96, g=32, score="max", sinks=4, recents=20), (0, 2)),
        ("llama_shift", (0, 2), dict(k=8, g=1), (1,)),
        ("llama", (), dict(k=32, g=16, anchors=(0, 1)), (0, 1)),
    ],
)
def test_tidal_is_what_it_is_defined_to_be(variant, dense, options, anchors):
    model = _model(variant, num_layers=4)
    selecting = [layer for layer in range(4) if layer not in dense]
    method = CheckedTidal(selecting, **options)
    assert method.anchors == anchors
    cache = _cache(model)
    results = generate(
        model, _prompts(model), _config(method, dense_layers=dense, prefill_chunk=32), cache=cache, max_batch=3
    )
    assert method.checked > 20
    assert all(len(result.tokens) == 40 for result in results)


def test_tidal_counts_its_anchors():
    method = Tidal((2, 3, 4, 5), k=64, g=32)
    assert method.anchors == (2, 4)
    assert method.tokens_read(1000, 1032) == (2 * 1032 + 2 * (32 + 1032 - 992)) / 4
    assert Quest(_cache(_model()), k=64, g=32).tokens_read(1000, 1032) == 32 + 1032 - 992 + 31
    assert Quest(_cache(_model()), k=64, g=32).tokens_read(32, 64) == 64 + 1


# --------------------------------------------------------------------------- SparseD and the list of all


@pytest.mark.parametrize(
    ("forwards", "share", "expected"), [(32, 0.2, 7), (8, 0.2, 2), (5, 0.2, 1), (25, 0.28, 7), (1, 0.01, 1), (4, 1, 4)]
)
def test_sparsed_is_exact_for_a_share_of_a_block(forwards, share, expected):
    config = sparsed_config(_config(), skip_share=share, forwards=forwards)
    assert config.mode == "mage" and config.exact_steps == expected


def test_sparsed_selects_after_its_exact_forwards():
    model = _model("sdar_b16")
    base = _config(selection=SelectionConfig(k=32, g=16), sampler=SamplerConfig("sequential", tokens_per_step=2))
    kinds = []
    config = sparsed_config(base, skip_share=0.3, forwards=8)
    generate(model, _prompts(model, (64,)), config, callback=lambda info: kinds.append(info.kind))
    assert kinds[:9] == ["exact", "exact", "select", *["sparse"] * 5, "commit"]


def test_all_methods_run_with_the_same_budget():
    model = _model()
    cache = _cache(model)
    base = _config(selection=SelectionConfig(k=32, g=16))
    configs = methods(model, cache, base)
    assert list(configs) == ["exact", "mage", "quest", "tidal", "sparsed", "recency", "random"]
    assert configs["sparsed"].exact_steps == 1  # of 4: one forward for each of four sub-blocks
    configs["sparsed"] = sparsed_config(base, skip_share=0.5, forwards=4)
    prompts = _prompts(model)
    shares = {}
    for name, config in configs.items():
        assert config.sampler == base.sampler and config.selection == base.selection
        results = generate(model, prompts, config, cache=cache, max_batch=3)
        assert all(len(result.tokens) == 40 for result in results)
        shares[name] = sum(r.stats.kv_bytes for r in results) / sum(r.stats.kv_bytes_exact for r in results)
    assert shares["exact"] == 1 and shares["mage"] == shares["recency"] == shares["random"]
    assert shares["mage"] < shares["sparsed"] < 1 and shares["mage"] < shares["tidal"] < 1
    assert cache.num_free == cache.num_pages
    with pytest.raises(ValueError, match=r'config.selection.rule must be "fixed", got \'joint\''):
        methods(model, cache, dataclasses.replace(base, selection=SelectionConfig(rule="joint")))


def test_settings_change_their_method_alone():
    model = _model(num_layers=6)
    base = _config(selection=SelectionConfig(k=32, g=16))
    plain = methods(model, _cache(model), base)
    settings = {
        "mage": {"score": "max", "norm": "prefix"},
        "quest": {"score": "mean", "norm": "prefix"},
        "tidal": {"anchors": (0, 0.25, 0.5, 0.75), "score": "max"},
        "sparsed": {"skip_share": 0.5, "score_rows": "open"},
    }
    found = methods(model, _cache(model), base, settings=settings)
    assert found["mage"].selection == dataclasses.replace(base.selection, score="max", norm="prefix")
    quest = found["quest"].method
    assert (quest.selection.score, quest.norm) == ("mean", "prefix")
    assert (plain["quest"].method.selection.score, plain["quest"].method.norm) == ("max", "none")
    # Five layers select: 1 .. 5. A quarter of them is one layer, a half two, three quarters three.
    assert found["tidal"].method.anchors == (1, 2, 3, 4) and plain["tidal"].method.anchors == (1, 3)
    assert found["tidal"].method.selection.score == "max"
    assert found["sparsed"].selection == dataclasses.replace(base.selection, score_rows="open")
    assert found["sparsed"].exact_steps == 2 and plain["sparsed"].exact_steps == 1  # of four sub-blocks
    for name in ("exact", "recency", "random"):
        assert found[name].selection == base.selection and found[name].method is None
    assert baselines.anchor_layers((3, 4), (0, 0.25, 0.5, 0.75)) == (3, 4)
    assert list(methods(model, _cache(model), base, names=["tidal", "exact"])) == ["exact", "tidal"]


# --------------------------------------------------------------------------- one token per forward


def _causal(model, prompt, num_tokens):
    """Greedy text by forwards of all tokens so far, every row attending those up to itself."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()

        def attend(layer, q, k, v, mask=mask):
            group = q.shape[2] // k.shape[2]
            k, v = (x.repeat_interleave(group, 2) for x in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)

        logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attend)[0, -1]
        logits[model.config.mask_id] = -math.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_autoregressive_is_the_dense_causal_loop(variant):
    model = _model(variant)
    prompts = _prompts(model, (1, 37, 70))
    batch = RaggedBatch(_cache(model, page_size=16), 3)
    lengths, tokens = causal_prefill(model, batch, prompts, chunk=16)
    assert lengths == [0, 36, 69] and tokens == [prompt[-1] for prompt in prompts]
    graphs = StepGraphs()
    written = autoregressive(model, batch, lengths, tokens, 20, graphs=graphs)
    assert written.tolist() == [_causal(model, prompt, 20) for prompt in prompts]
    # It goes on from where it stopped: its last token has no K and V yet.
    more = autoregressive(model, batch, [n + 20 for n in lengths], written[:, -1].tolist(), 5, graphs=graphs)
    assert more.tolist() == [_causal(model, prompt, 25)[20:] for prompt in prompts]


def test_autoregressive_says_what_is_wrong():
    model = _model()
    batch = RaggedBatch(_cache(model, tokens=128), 2)
    with pytest.raises(ValueError, match=r"lengths must be 2 integers in \[0, 512\), got \[1\]"):
        autoregressive(model, batch, [1], [1, 2], 4)
    with pytest.raises(ValueError, match=r"tokens must be 2 integers in \[0, 97\), got \[1, 97\]"):
        autoregressive(model, batch, [0, 0], [1, 97], 4)
    with pytest.raises(ValueError, match="num_tokens must be an integer >= 1, got 0"):
        autoregressive(model, batch, [0, 0], [1, 2], 0)
    with pytest.raises(ValueError, match="must fit the model's 512 positions, got 520"):
        autoregressive(model, batch, [0, 500], [1, 2], 20)
    with pytest.raises(OutOfPages, match="request 1 must find 3 free pages"):
        autoregressive(model, batch, [0, 150], [1, 2], 20)
    with pytest.raises(TypeError, match="batch must be a RaggedBatch, got None"):
        autoregressive(model, None, [0], [1], 1)
    with pytest.raises(TypeError, match="graphs must be a StepGraphs or None, got True"):
        autoregressive(model, batch, [0, 0], [1, 2], 4, graphs=True)
    with pytest.raises(ValueError, match="prompts must be 2 lists that are not empty, got 1"):
        causal_prefill(model, batch, [[1]])
    with pytest.raises(ValueError, match="chunk must be an integer >= 1, got 0"):
        causal_prefill(model, batch, [[1], [2]], chunk=0)
    for token in (97, -1, 2.5):
        with pytest.raises(ValueError, match=rf"prompts\[1\] must hold ids in \[0, vocab_size = 97\), got {token}"):
            causal_prefill(model, batch, [[1], [2, token]])
    with pytest.raises(TypeError, match=r"prompts\[0\] must be a list of token ids, got 'ab'"):
        causal_prefill(model, batch, ["ab", [1]])
    with pytest.raises(ValueError, match=r"prompts\[0\] must fit the model's 512 positions, got 513 tokens"):
        causal_prefill(model, batch, [[1] * 513, [1]])
    with pytest.raises(ValueError, match=r"causal_prefill: cache.num_layers must be the model's 2, got 3"):
        causal_prefill(_model(num_layers=2), batch, [[1], [2]])


# --------------------------------------------------------------------------- the loop as published


def _published(model, prompt, config):
    cache, known, tail = published_prefill(model, prompt)
    assert tail == len(prompt) % model.config.block_size
    return published_loop(model, cache, known, config, prompt_tail=tail)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    "sampler",
    [STATIC, SamplerConfig(threshold=0.3), SamplerConfig(threshold=1.0), SamplerConfig("low_confidence_static")],
    ids=["static_8", "threshold_0.3", "threshold_1", "static_1"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_loop_is_the_same_computation(variant, sampler, optimized):
    model = _model(variant)
    if optimized:
        model.optimize()
    config = _config(sampler=sampler, max_new_tokens=45)
    prompts = _prompts(model, (5, 32, 70, 64))
    expected = generate(_model(variant), prompts, config)
    assert [_published(model, prompt, config) for prompt in prompts] == _tokens(expected)


def test_the_published_loop_ends_where_generation_ends():
    model = _model()
    prompts = _prompts(model, (5, 32, 70, 64, 96))
    config = _config(max_new_tokens=70)
    free = generate(model, prompts, config)
    stopping = copy.copy(model)
    stopping.config = dataclasses.replace(model.config, eos_ids=(free[0].tokens[30], free[2].tokens[41]))
    expected = generate(stopping, prompts, config)
    assert {result.finish for result in expected} >= {"eos"}
    assert [_published(stopping, prompt, config) for prompt in prompts] == _tokens(expected)
    ignoring = dataclasses.replace(config, ignore_eos=True)
    assert [_published(stopping, prompt, ignoring) for prompt in prompts] == _tokens(free)


def test_the_published_loop_takes_a_random_context():
    """The same context in pages gives the same tokens."""
    model = _model()
    context = ContiguousCache.random(model, 96, seed=3)
    assert len(context) == 96 and context.keys[0].shape == (1, 2, 96, 16)
    assert torch.equal(context.values[1], ContiguousCache.random(model, 96, seed=3).values[1])
    cache = PagedCache.for_model(model, num_pages=4)
    state = prefill(model, _prompts(model, (96,)), _config(), cache=cache)
    pages = state.batch.pages(0)
    for layer in range(cache.num_layers):
        for pool, source in zip(cache.layer(layer), (context.keys, context.values), strict=True):
            for position in range(96):
                pool[pages[position // 64], position % 64] = source[layer][0, :, position]
    state.pending = [[7]]
    expected = generate(model, state, _config())[0].tokens
    assert published_loop(model, context, [7], _config(), prompt_tail=0) == expected
    assert len(context) == 96 + 64


def test_the_published_loop_says_what_is_wrong():
    model = _model()
    with pytest.raises(
        ValueError, match=r"num_tokens must be a multiple of the block of 32 in \[1, 1073741824\], got 40"
    ):
        ContiguousCache.random(model, 40)
    cache = ContiguousCache.random(model, 32)
    for known in ([], [1] * 32, [96]):
        with pytest.raises(ValueError, match="known must be at least 1 and fewer than 32 ids other than the mask"):
            published_loop(model, cache, known, _config(), prompt_tail=0)
    with pytest.raises(ValueError, match=r"prompt_tail must be in \[0, 1\], got 2"):
        published_loop(model, cache, [1], _config(), prompt_tail=2)
    with pytest.raises(ValueError, match=r"config must be of mode .* got 'mage'"):
        published_loop(model, cache, [1], dataclasses.replace(_config(), mode="mage"), prompt_tail=0)
    with pytest.raises(ValueError, match=r"config must be .* without sub_block_cache"):
        published_loop(model, cache, [1], _config(sub_block_cache=True), prompt_tail=0)
    with pytest.raises(ValueError, match=r"config.sampler must be .* got 'sequential' at 0"):
        published_loop(model, cache, [1], _config(sampler=SamplerConfig("sequential")), prompt_tail=0)
    with pytest.raises(TypeError, match="cache must be a ContiguousCache, got PagedCache"):
        published_loop(model, _cache(model), [1], _config(), prompt_tail=0)
    other = ContiguousCache.random(_model(num_layers=2), 32)
    with pytest.raises(ValueError, match=r"cache must have the model's layers, .* \(3, 2, 16\), got \(2, 2, 16\)"):
        published_loop(model, other, [1], _config(), prompt_tail=0)
    with pytest.raises(ValueError, match=r"known must hold ids in \[0, vocab_size = 97\), got 97"):
        published_loop(model, cache, [97], _config(), prompt_tail=0)
    with pytest.raises(ValueError, match=r"prompt must hold ids in \[0, vocab_size = 97\), got -1"):
        published_prefill(model, [3, -1])
    with pytest.raises(ValueError, match="prompt must fit the model's 512 positions, got 513 tokens"):
        published_prefill(model, [1] * 513)
    with pytest.raises(ValueError, match="prompt must have at least one token under token shift, got none"):
        published_prefill(model, [])


# --------------------------------------------------------------------------- bad input


def test_methods_say_what_is_wrong():
    model = _model()
    cache, other = _cache(model), _cache(model)
    with pytest.raises(TypeError, match="cache must be a PagedCache, got None"):
        Quest(None, k=32, g=16)
    with pytest.raises(ValueError, match="k must be a multiple of g = 16, got 30"):
        Quest(cache, k=30, g=16)
    with pytest.raises(ValueError, match="g must be one of 1, 16, 32, 64, got 8"):
        Quest(cache, k=32, g=8)
    with pytest.raises(ValueError, match="g must divide the cache's pages of 16 tokens, got 32"):
        Quest(_cache(model, page_size=16), k=32, g=32)
    with pytest.raises(ValueError, match="score must be one of mean, max, got 'sum'"):
        Quest(cache, k=32, g=16, score="sum")
    with pytest.raises(ValueError, match="Quest: norm must be one of none, prefix, got 'context'"):
        Quest(cache, k=32, g=16, norm="context")
    with pytest.raises(ValueError, match="cache must be that of the generation, got another"):
        generate(model, _prompts(model), _config(Quest(cache, k=32, g=16)), cache=other)
    for selecting in ((), (1, 0), (1, 1), (0.0,), (True,), (-1,)):
        with pytest.raises(ValueError, match="selecting must be ascending layer numbers, at least one, got"):
            Tidal(selecting, k=32, g=16)
    for anchors in ((2,), (1, 3)):
        with pytest.raises(ValueError, match=r"anchors must be of the selecting layers \(1, 2\) and begin"):
            Tidal((1, 2), k=32, g=16, anchors=anchors)
    with pytest.raises(ValueError, match=r"selecting must be the layers .* selects in, \(1, 2\), got \(0, 1, 2\)"):
        generate(model, _prompts(model), _config(Tidal((0, 1, 2), k=32, g=16)), cache=cache)
    for share in (0, 1.5, True, "0.2"):
        with pytest.raises(ValueError, match=r"skip_share must be a number in \(0, 1\], got"):
            sparsed_config(_config(), skip_share=share, forwards=8)
    with pytest.raises(ValueError, match="forwards must be an integer >= 1, got 0"):
        sparsed_config(_config(), forwards=0)
    with pytest.raises(TypeError, match="base must be a DenoiseConfig, got None"):
        sparsed_config(None, forwards=8)
    base = _config(selection=SelectionConfig(k=32, g=16))
    with pytest.raises(ValueError, match=r"methods: names must be of exact, mage, .*, got 'best'"):
        methods(model, cache, base, names=["best"])
    with pytest.raises(ValueError, match="methods: settings must be of mage, quest, tidal, sparsed, got 'random'"):
        methods(model, cache, base, settings={"random": {"seed": 1}})
    with pytest.raises(ValueError, match="methods: settings of quest must be of score, norm, got 'anchors'"):
        methods(model, cache, base, settings={"quest": {"anchors": (0,)}})


# --------------------------------------------------------------------------- CUDA


CUDA_METHODS = {
    "quest_g16_max": lambda cache: Quest(cache, k=32, g=16),
    "quest_g32_mean": lambda cache: Quest(cache, k=64, g=32, score="mean", sinks=4, recents=8),
    "quest_g64_max": lambda cache: Quest(cache, k=64, g=64),
    "quest_g1_max": lambda cache: Quest(cache, k=24, g=1),
    "quest_g16_shares": lambda cache: Quest(cache, k=32, g=16, score="mean", norm="prefix"),
    "tidal_g32": lambda cache: Tidal((1, 2, 3), k=64, g=32),
    "tidal_g1": lambda cache: Tidal((1, 2, 3), k=24, g=1, score="max"),
}


@gpu
@pytest.mark.parametrize("name", CUDA_METHODS)
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_graphs_give_the_tokens_of_plain_launches(variant, name):
    model = _cuda_model(variant)
    prompts = _prompts(model, (20, 90, 131, 40, 200, 31, 75))
    cache = _cache(model, tokens=2560)
    method = CUDA_METHODS[name](cache)
    plain = _config(method, strict=True, cuda_graphs=False)
    expected = generate(model, prompts, plain, max_batch=3, cache=cache)
    for layer in range(cache.num_layers):
        for pool in cache.layer(layer):
            pool.fill_(math.nan)
    captured, graphs = dataclasses.replace(plain, cuda_graphs=True), StepGraphs()
    for _ in range(2):
        results = generate(model, prompts, captured, max_batch=3, graphs=graphs, cache=cache)
        assert _tokens(results) == _tokens(expected)
        assert [r.stats.kv_bytes for r in results] == [r.stats.kv_bytes for r in expected]
    assert graphs.num_graphs >= 3


@gpu
@pytest.mark.parametrize("score", ["max", "mean"])
def test_cuda_scores_bound_every_product(score):
    """Bounds that replayed commits left behind, and scores from them, against float32 products."""
    model = _cuda_model()
    cache = _cache(model, tokens=1024)
    method = Quest(cache, k=32, g=16, score=score)
    state = prefill(model, _prompts(model, (200, 333)), _config(method, max_new_tokens=40), cache=cache)
    table, prefix_lens = state.batch.block_table, state.prefix_lens
    made = method.bounds.clone()
    method.prepare()
    q = torch.randn(2, 32, 4, 64, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor(prefix_lens, dtype=torch.int32, device="cuda")
    forward = PagedForward(cache, table, 384, [Write(lens)], lens, prefix_lens=lens)
    for layer in range(cache.num_layers):
        scores = method.scores(forward, layer, q)
        for request, prefix_len in enumerate(prefix_lens):
            keys = _keys_of(cache, cache.layer(layer)[0], table, request, prefix_len).float()
            for unit in range(prefix_len // 16):
                page = int(table[request, unit // 4])
                assert torch.equal(made[layer, page, unit % 4], method.bounds[layer, page, unit % 4])
                for head in range(2):
                    rows = q[request, :, 2 * head : 2 * head + 2].flatten(0, 1).float()
                    products = (rows @ keys[16 * unit : 16 * unit + 16, head].T).amax(1)  # [R]
                    best = products.max() if score == "max" else products.mean()
                    assert scores[request, head, unit] >= best - 1e-3 * best.abs()


@gpu
def test_autoregressive_graphs_give_the_tokens_of_plain_launches():
    model = _cuda_model()
    prompts = _prompts(model, (1, 37, 150))
    batch = RaggedBatch(_cache(model), 3)
    lengths, tokens = causal_prefill(model, batch, prompts, chunk=64)
    expected = autoregressive(model, batch, lengths, tokens, 40, cuda_graphs=False).tolist()
    graphs = StepGraphs()
    for _ in range(2):
        assert autoregressive(model, batch, lengths, tokens, 40, graphs=graphs).tolist() == expected
    assert graphs.num_graphs == 1


@gpu
def test_the_published_loop_runs_on_cuda():
    model = _cuda_model()
    context = ContiguousCache.random(model, 512)
    assert len(published_loop(model, context, [7], _config(max_new_tokens=63), prompt_tail=0)) == 63
    assert len(context) == 512 + 64
