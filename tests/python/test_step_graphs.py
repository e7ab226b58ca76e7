"""Queues of requests, strict runs and captured phases: what they promise whatever the batch looks like.

Run: pytest tests/python/test_step_graphs.py
"""

import copy
import dataclasses

import pytest
import torch

from mage_ext.cache import PagedCache
from mage_ext.denoise import DenoiseConfig, StepGraphs, generate, prefill
from mage_ext.sampling import SAMPLERS, SamplerConfig
from mage_ext.selection import SelectionConfig, recency_selection
from mage_ext.testing.tiny import tiny_config, tiny_model

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
LENGTHS = (5, 70, 33, 130, 64, 17, 96, 41)
SELECTIONS = {
    "fixed_g32": SelectionConfig(k=32, g=32),
    "fixed_g1": SelectionConfig(k=24, g=1, sinks=2, recents=4, score_rows="open"),
    "layer_g16": SelectionConfig(rule="layer", k=32, k_min=16, g=16),
    "mass_g16": SelectionConfig(rule="mass", p=0.6, k_min=16, g=16),
    "joint_g16": SelectionConfig(rule="joint", k=32, g=16, sinks=4),
}
REFRESH = {
    "block": {},
    "blocks": {"refresh": "blocks", "refresh_blocks": 2},
    "kept_mass": {"refresh": "kept_mass", "refresh_bound": 0.8},
}


def _model(device, variant="fast_dllm_v2", **overrides):
    config = tiny_config(variant, num_layers=3, hidden_size=128, head_dim=64, **overrides)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return tiny_model(config, seed=1, dtype=dtype).to(device)


def _prompts(model, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _config(selection=None, **fields):
    sampler = fields.pop("sampler", SamplerConfig("low_confidence_static", tokens_per_step=5))
    fields = {"mode": "mage" if selection else "exact", "max_new_tokens": 50, "dense_layers": (0,), **fields}
    return DenoiseConfig(sampler=sampler, selection=selection or SelectionConfig(), **fields)


def _tokens(results):
    return [result.tokens for result in results]


# --------------------------------------------------------------------------- a queue of prompts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("selection", [None, SELECTIONS["fixed_g32"]], ids=["exact", "mage"])
def test_a_queue_serves_everyone_in_order(device, selection):
    """No more than max_batch run at a time, places are taken in order, and each gets what a strict batch gives it."""
    model = _model(device)
    config = _config(selection, strict=True)
    prompts = _prompts(model)
    running = []
    results = generate(
        model,
        prompts,
        config,
        max_batch=3,
        callback=lambda info: running.append([request for request in info.requests if request is not None]),
    )
    assert [r.finish for r in results] == ["length"] * len(prompts) and all(len(r.tokens) == 50 for r in results)
    assert max(map(len, running)) == 3
    first_seen = []
    for requests in running:
        first_seen += [request for request in requests if request not in first_seen]
    assert first_seen == list(range(len(prompts)))
    for prompt, result in zip(prompts, results, strict=True):
        alone = generate(model, [prompt], config, max_batch=3, seeds=[result.request])[0]
        assert alone.tokens == result.tokens and alone.stats.forwards == result.stats.forwards


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_counted_per_request(device):
    model = _model(device)
    prompts = _prompts(model)
    stream = generate(model, prompts, _config(), max_batch=2, stream=True)
    blocks = list(stream)
    for result in stream.results:
        own = [block for block in blocks if block.request == result.request]
        assert [block.index for block in own] == list(range(len(own)))
        assert [block.done for block in own] == [False] * (len(own) - 1) + [True]
        assert [token for block in own for token in block.tokens] == result.tokens


@pytest.mark.parametrize("device", DEVICES)
def test_early_ends_make_room(device):
    """EOS inside a block ends a request at its boundary, and the next in the queue joins there."""
    model = _model(device)
    prompts = _prompts(model)
    config = _config(sampler=SamplerConfig("sequential", tokens_per_step=4), strict=True)
    free = generate(model, prompts, config, max_batch=2)
    stopping = copy.copy(model)
    stopping.config = dataclasses.replace(model.config, eos_ids=(free[0].tokens[3], free[3].tokens[20]))
    results = generate(stopping, prompts, config, max_batch=2)
    assert any(r.finish == "eos" and len(r.tokens) < 50 for r in results)
    for result, longer in zip(results, free, strict=True):
        assert result.tokens == longer.tokens[: len(result.tokens)]
        ends = [i for i, token in enumerate(longer.tokens) if token in stopping.config.eos_ids]
        assert len(result.tokens) == (ends[0] + 1 if ends else 50)
        assert result.finish == ("eos" if ends else "length")


@pytest.mark.parametrize("device", DEVICES)
def test_pages_are_waited_for(device):
    """A request that finds no pages waits for those of its batch mates; one that could never run is refused alone."""
    model = _model(device)
    prompts = _prompts(model, (70, 130, 33, 400, 64))
    config = _config(strict=True)
    cache = PagedCache.for_model(model, num_pages=12, page_size=16)  # 192 tokens; 130 + 50 take them all
    results = generate(model, prompts, config, max_batch=3, cache=cache)
    assert [r.finish for r in results] == ["length", "length", "length", "refused", "length"]
    assert "request 3 must find 30 free pages of 16 tokens for its 480 tokens, got 12 of 12" in results[3].error
    assert results[3].tokens == [] and cache.num_free == 12
    free = generate(model, prompts, config, max_batch=3)
    assert [r.tokens for r in results if r.request != 3] == [r.tokens for r in free if r.request != 3]


@pytest.mark.parametrize("device", DEVICES)
def test_a_prefilled_state_may_be_a_queue(device):
    model = _model(device)
    prompts = _prompts(model)
    config = _config(SELECTIONS["fixed_g32"], strict=True)
    expected = generate(model, prompts, config, max_batch=3)
    state = prefill(model, prompts, config)
    assert _tokens(generate(model, state.fork(), config, max_batch=3)) == _tokens(expected)
    assert _tokens(generate(model, state, config, max_batch=3)) == _tokens(expected)


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_who_joins_finds_its_own_lists(device, name, refresh):
    """Requests that select, carry lists and are exact share places with those that come later."""
    model = _model(device, "sdar_b16")
    config = _config(SELECTIONS[name], strict=True, **REFRESH[refresh])
    prompts = _prompts(model, (20, 90, 131, 40, 200, 31, 75))
    kinds = set()
    results = generate(model, prompts, config, max_batch=3, callback=lambda info: kinds.add(info.kind))
    assert name == "mass_g16" or "mixed" in kinds
    assert sum(r.stats.forwards["sparse"] for r in results) > 0
    for prompt, result in zip(prompts, results, strict=True):
        alone = generate(model, [prompt], config, max_batch=3)[0]
        assert alone.tokens == result.tokens
        assert alone.stats.forwards == result.stats.forwards
        assert alone.stats.kv_bytes == result.stats.kv_bytes
        assert alone.stats.kept_mass == result.stats.kept_mass


# --------------------------------------------------------------------------- strict runs


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["exact", "mage"])
@pytest.mark.parametrize("device", DEVICES)
def test_strict_tokens_do_not_depend_on_batch_mates(device, mode, temperature):
    """Bit for bit: confidences are compared, not only tokens."""
    model = _model(device)
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=5, temperature=temperature)
    config = _config(SELECTIONS["fixed_g32"] if mode == "mage" else None, strict=True, sampler=sampler)
    prompts = _prompts(model)
    together = generate(model, prompts, config, max_batch=4, seeds=list(range(8)))
    reversed_order = generate(model, prompts[::-1], config, max_batch=4, seeds=list(range(8))[::-1])[::-1]
    assert _tokens(together) == _tokens(reversed_order)
    others = _prompts(model, (12, 77, 300), seed=3)
    mixed = generate(model, [others[0], prompts[3], *others[1:]], config, max_batch=4, seeds=[9, 3, 8, 7])
    assert mixed[1].tokens == together[3].tokens


@pytest.mark.parametrize("device", DEVICES)
def test_strict_hidden_states_do_not_depend_on_batch_mates(device):
    """Of a request that is exact, since its prefix is short, beside one that selects: every forward, bit for bit."""
    model = _model(device, "sdar_b16", max_positions=2048)
    config = _config(SelectionConfig(k=512, g=16), strict=True, dense_layers=())
    short, long = _prompts(model, (400, 900))

    def forwards(prompts):
        seen, plain = [], model.hidden

        def hidden(tokens, positions, attend):
            states = plain(tokens, positions, attend)
            if len(tokens) == 2:  # not the prefill
                seen.append(states[0].clone())
            return states

        model.hidden = hidden
        try:
            results = generate(model, prompts, config, max_batch=2, seeds=[7] * len(prompts))
        finally:
            del model.hidden
        return results[0], seen

    config = dataclasses.replace(config, cuda_graphs=False)
    (alone, own), (together, mixed) = forwards([short]), forwards([short, long])
    assert alone.tokens == together.tokens and alone.stats.forwards == together.stats.forwards
    assert len(own) >= 10
    for one, other in zip(own, mixed, strict=False):
        assert torch.equal(one, other)


def test_strict_draws_do_not_depend_on_batch_mates():
    """Rows of logits come from products of the same height, however many positions are open."""
    model = _model("cpu", "sdar_b16", vocab_size=4096, mask_id=4095)
    config = _config(strict=True, sampler=SamplerConfig("low_confidence_dynamic", threshold=0.999), max_new_tokens=32)
    heights = []
    plain = model.logits
    model.logits = lambda hidden: (heights.append(len(hidden)), plain(hidden))[1]
    try:
        generate(model, _prompts(model, (64, 96)), config, max_batch=2)
    finally:
        del model.logits
    assert set(heights) == {2 * 16}


def _pool_of(device, model, prompts, config, **arguments):
    """K/V that a run leaves behind."""
    cache = PagedCache.for_model(model, num_pages=64, page_size=16)
    for layer in range(cache.num_layers):
        for pool in cache.layer(layer):
            pool.zero_()
    generate(model, prompts, config, cache=cache, **arguments)
    return [pool.clone() for layer in range(cache.num_layers) for pool in cache.layer(layer)]


@pytest.mark.parametrize("device", DEVICES)
def test_strict_keys_and_values_are_the_same_bits(device):
    model = _model(device)
    config = _config(SELECTIONS["fixed_g32"], strict=True)
    first, others = _prompts(model, (70,)), _prompts(model, (100, 40), seed=4)
    num_pages = -(-120 // 16)
    alone = _pool_of(device, model, first, config, max_batch=3)
    together = _pool_of(device, model, first + others, config, max_batch=3)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[:num_pages], other[:num_pages])


# --------------------------------------------------------------------------- captured phases


@gpu
@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("name", [None, *SELECTIONS])
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16", "llama_shift"])
def test_graphs_give_the_tokens_of_plain_launches(variant, name, refresh):
    """Bit for bit in strict runs, whose places are padded alike; lengths, tables and lists are new in every replay."""
    model = _model("cuda", variant)
    selection = SELECTIONS[name] if name else None
    prompts = _prompts(model, (20, 90, 131, 40, 200, 31, 75))
    plain = _config(selection, strict=True, cuda_graphs=False, **REFRESH[refresh])
    captured = dataclasses.replace(plain, cuda_graphs=True)
    expected = generate(model, prompts, plain, max_batch=3)
    cache = PagedCache.for_model(model, num_pages=40)
    graphs = StepGraphs()
    for _ in range(2):
        results = generate(model, prompts, captured, max_batch=3, graphs=graphs, cache=cache)
        assert _tokens(results) == _tokens(expected)
        assert [r.stats.forwards for r in results] == [r.stats.forwards for r in expected]
        assert [r.stats.kept_mass for r in results] == [r.stats.kept_mass for r in expected]
        count = graphs.num_graphs
        assert count >= 3
    others = _prompts(model, (150, 60, 33), seed=8)
    assert _tokens(generate(model, others, captured, max_batch=3, graphs=graphs, cache=cache)) == _tokens(
        generate(model, others, plain, max_batch=3)
    )
    assert graphs.num_graphs >= count


@gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_with_every_sampler(sampler, temperature):
    model = _model("cuda")
    top = dict(top_k=20, top_p=0.9) if temperature else {}
    sampler = SamplerConfig(
        sampler, tokens_per_step=3, threshold=0.3, entropy_bound=1.0, temperature=temperature, **top
    )
    for sub_block_cache in (False, True):
        plain = _config(
            SELECTIONS["fixed_g32"],
            sampler=sampler,
            strict=True,
            cuda_graphs=False,
            sub_block_cache=sub_block_cache,
            sub_block_size=8,
        )
        prompts = _prompts(model)
        expected = generate(model, prompts, plain, max_batch=4)
        results = generate(model, prompts, dataclasses.replace(plain, cuda_graphs=True), max_batch=4)
        assert _tokens(results) == _tokens(expected)


@gpu
def test_phases_are_captured_once_per_batch():
    """Of 12 prompts in places for 4, 2 and 1, each phase is captured once; a second call captures nothing."""
    model = _model("cuda")
    config = _config(SELECTIONS["fixed_g32"])
    prompts = _prompts(model, tuple(range(70, 130, 5)))
    cache, graphs = PagedCache.for_model(model, num_pages=64), StepGraphs()
    generate(model, prompts, config, max_batch=4, cache=cache, graphs=graphs)
    count = graphs.num_graphs
    assert 4 <= count <= 3 * 5
    generate(model, prompts, config, max_batch=4, cache=cache, graphs=graphs)
    assert count <= graphs.num_graphs <= 3 * 5
    count = graphs.num_graphs
    for seed in range(3):
        generate(model, _prompts(model, (70, 99, 81), seed), config, max_batch=4, cache=cache, graphs=graphs)
    generate(model, prompts, config, max_batch=4, cache=cache, graphs=graphs)
    assert graphs.num_graphs <= count + 5


@gpu
def test_overrides_and_callbacks_run_between_graphs():
    model = _model("cuda")
    config = _config(SELECTIONS["fixed_g32"], select_override=recency_selection, strict=True)
    prompts = _prompts(model)
    seen = []

    def callback(info):
        seen.append((info.kind, info.open.sum().item(), info.decided.sum().item()))

    results = generate(model, prompts, config, max_batch=4, callback=callback)
    expected_seen, seen = seen, []
    expected = generate(model, prompts, dataclasses.replace(config, cuda_graphs=False), max_batch=4, callback=callback)
    assert _tokens(results) == _tokens(expected) and expected_seen == seen


def test_configurations_that_launch_the_same_share_their_phases():
    model = _model("cpu")
    cache, graphs = PagedCache.for_model(model, num_pages=8), StepGraphs()
    made = []
    config = _config(SELECTIONS["fixed_g32"])
    for changes in (
        {},
        {"max_new_tokens": 7},
        {"select_override": lambda *arguments, **options: None},
        {"strict": True},
    ):
        graphs.bind(model, cache, dataclasses.replace(config, **changes), 256)
        made.append(graphs.keep("tensors", lambda: torch.zeros(1)))
    assert made[0] is made[1] is made[2] is not made[3]
    graphs.bind(model, cache, config, 200)
    assert graphs.keep("tensors", lambda: None) is made[0]
    graphs.bind(model, cache, config, 300)  # longer than what the tensors are for
    assert graphs.keep("tensors", lambda: None) is None and graphs.bound == 320


def test_graphs_of_another_model_are_left_for_their_own():
    model, other = _model("cpu"), _model("cpu")
    graphs, config, prompts = StepGraphs(), _config(), _prompts(model, (40,))
    cache = PagedCache.for_model(model, num_pages=16)
    expected = _tokens(generate(model, prompts, config, graphs=graphs, cache=cache))
    with pytest.raises(ValueError, match="graphs must belong to this model") as refused:
        generate(other, prompts, config, graphs=graphs)
    assert _tokens(generate(model, prompts, config, graphs=graphs, cache=cache)) == expected
    assert refused.value is not None  # still held while the graphs were taken again


def test_graphs_serve_one_generation_at_a_time():
    """A second one on the same tensors would overwrite what the first has between its blocks."""
    model = _model("cpu")
    cache, graphs, config = PagedCache.for_model(model, num_pages=16), StepGraphs(), _config()
    prompts = _prompts(model, (40,))
    expected = _tokens(generate(model, prompts, config))
    first = generate(model, prompts, config, graphs=graphs, cache=cache, stream=True)
    next(first)
    with pytest.raises(ValueError, match="graphs must be of one generation at a time"):
        generate(model, prompts, config, graphs=graphs, cache=cache)
    with pytest.raises(ValueError, match="graphs must be of one generation at a time"):
        generate(
            model,
            prompts,
            config,
            cache=cache,
            graphs=(own := StepGraphs()),
            callback=lambda info: generate(model, prompts, config, cache=cache, graphs=own),
        )
    list(first)
    assert _tokens(first.results) == expected
    left = generate(model, prompts, config, graphs=graphs, cache=cache, stream=True)
    next(left)
    left.close()
    with generate(model, prompts, config, graphs=graphs, cache=cache, stream=True) as second:
        next(second)
    with pytest.raises(RuntimeError, match="results must be read after the last block, got one closed before its end"):
        _ = second.results
    generate(model, prompts, config, graphs=graphs, cache=cache, stream=True)  # never started, dropped
    assert _tokens(generate(model, prompts, config, graphs=graphs, cache=cache)) == expected
    assert cache.num_free == cache.num_pages


def test_a_stream_that_failed_says_so():
    model = _model("cpu")
    cache = PagedCache.for_model(model, num_pages=8)
    stream = generate(model, _prompts(model, (40,)), _config(), cache=cache, stream=True, callback=lambda info: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    for use in (lambda: next(stream), lambda: stream.results):
        with pytest.raises(RuntimeError, match="must not be used after an error, got ZeroDivisionError before"):
            use()
    assert cache.num_free == 8


def test_pages_come_back_from_what_is_dropped_or_interrupted(monkeypatch):
    model = _model("cpu")
    cache, config = PagedCache.for_model(model, num_pages=8), _config()
    prompts = _prompts(model, (40,))
    state = prefill(model, prompts, config, cache=cache)
    fork = state.fork()
    assert cache.num_free < 7
    del state, fork
    assert cache.num_free == 8

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "hidden", interrupt)
    for call in (
        lambda: prefill(model, prompts, config, cache=cache),
        lambda: generate(model, prompts, config, cache=cache),
    ):
        with pytest.raises(KeyboardInterrupt) as caught:
            call()
        assert cache.num_free == 8 and caught.tb is not None  # though the traceback holds on to the state


def test_graphs_belong_to_one_model_and_cache():
    one, other = _model("cpu"), _model("cpu")
    graphs, config = StepGraphs(), _config(max_new_tokens=4)
    cache = PagedCache.for_model(one, num_pages=8)
    prompts = _prompts(one, (40,))
    tokens = _tokens(generate(one, prompts, config, graphs=graphs, cache=cache))
    assert _tokens(generate(one, prompts, config, graphs=graphs, cache=cache)) == tokens
    with pytest.raises(ValueError, match="graphs must belong to this model, got those of another"):
        generate(other, prompts, config, graphs=graphs, cache=PagedCache.for_model(other, num_pages=8))
    with pytest.raises(ValueError, match="graphs must belong to this cache, got those of another"):
        generate(one, prompts, config, graphs=graphs)
    with pytest.raises(TypeError, match="graphs must be a StepGraphs or None, got 3"):
        generate(one, prompts, config, graphs=3)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4"])
def test_max_batch_is_checked(value):
    model = _model("cpu")
    with pytest.raises(ValueError, match=r"max_batch must be an integer in \[1, 65536\] or None, got"):
        generate(model, _prompts(model, (4,)), max_batch=value)


# --------------------------------------------------------------------------- commit and first step in one


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [None, *SELECTIONS])
@pytest.mark.parametrize("variant", ["sdar_b16", "llama"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_commit_changes_nothing(device, variant, name, strict):
    """The tokens of a run with its own commits, up to what rounding makes of products of another height; one forward
    less per block. Requests that join have nothing to commit."""
    model = _model(device, variant).to(torch.float32 if device == "cpu" else torch.bfloat16)
    config = _config(
        SELECTIONS[name] if name else None,
        strict=strict,
        max_new_tokens=40,
        sampler=SamplerConfig("sequential", tokens_per_step=3),
    )
    prompts = _prompts(model, (20, 90, 131, 40, 64))
    infos = []
    fused = dataclasses.replace(config, fuse_commit=True)
    results = generate(model, prompts, fused, max_batch=3, callback=infos.append)
    expected = generate(model, prompts, config, max_batch=3)
    assert not any(info.kind == "commit" for info in infos)
    for result, twin in zip(results, expected, strict=True):
        assert len(result.tokens) == 40
        assert result.stats.forwards == {**twin.stats.forwards, "commit": 0}
        if device == "cpu":
            assert result.tokens == twin.tokens
            assert result.stats.kept_mass == pytest.approx(twin.stats.kept_mass, rel=1e-4)


def test_fused_commits_are_refused_where_they_can_not_be():
    shifted = _model("cpu")
    with pytest.raises(ValueError, match="fuse_commit must be off for a model with token shift, got True"):
        generate(shifted, _prompts(shifted, (4,)), _config(fuse_commit=True))
    large = _model("cpu", "sdar", block_size=64)
    with pytest.raises(ValueError, match="fuse_commit must be off for blocks beyond 32 tokens, got 64"):
        generate(large, _prompts(large, (4,)), _config(fuse_commit=True))
    with pytest.raises(ValueError, match="fuse_commit must be off with mode"):
        _config(SELECTIONS["fixed_g32"], fuse_commit=True, refresh="blocks")
