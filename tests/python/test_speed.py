"""Speed measurements: random prefixes, floors worked out by hand, break-even, and block times on a GPU.

Run: pytest tests/python/test_speed.py
"""

import dataclasses
import math

import pytest
import torch

from mage_ext.cache import OutOfPages, PagedCache
from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.evaluation import speed
from mage_ext.models.geometry import GEOMETRIES
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig
from mage_ext.testing.tiny import tiny_config, tiny_model

MAGE = DenoiseConfig(
    mode="mage",
    dense_layers=(),
    sampler=SamplerConfig("low_confidence_static", tokens_per_step=8),
    selection=SelectionConfig(k=64, g=32),
)


def _model(variant="fast_dllm_v2", device="cpu"):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = tiny_config(variant, num_layers=2, hidden_size=128, head_dim=64, max_positions=1 << 14)
    return tiny_model(config, seed=1, dtype=dtype).to(device)


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "llama"])
def test_a_random_prefix_counts_as_committed(variant):
    model = _model(variant)
    cache = speed.random_cache(model, num_tokens=2 * 256, page_size=16)
    pools = [pool.clone() for pool in cache.layer(1)]
    assert all(abs(pool.mean()) < 0.05 and abs(pool.std() - 1) < 0.05 for pool in pools)
    state = speed.random_state(model, cache, batch=2, context=128, new_tokens=64)
    config = dataclasses.replace(MAGE, max_new_tokens=64, ignore_eos=True)
    results = generate(model, state, config)
    assert all(len(r.tokens) == 64 and r.stats.prefill_forwards == 0 for r in results)
    assert all(r.stats.forwards["select"] > 0 for r in results)
    prefix = sorted(page for page in range(16))
    assert torch.equal(cache.layer(1)[0][prefix[:8]], pools[0][prefix[:8]])  # the loop wrote behind the prefix alone
    assert cache.num_free == cache.num_pages


def test_bad_arguments_are_named():
    model = _model()
    cache = speed.random_cache(model, num_tokens=256)
    arguments = dict(batch=1, context=128, new_tokens=32)
    for name in arguments:
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"random_state: {name} must be an integer >= 1, got"):
                speed.random_state(model, cache, **{**arguments, name: value})
    with pytest.raises(ValueError, match="context must be a multiple of the block of 32, got 100"):
        speed.random_state(model, cache, **{**arguments, "context": 100})
    with pytest.raises(OutOfPages, match="request 1 must find"):
        speed.random_state(model, cache, **{**arguments, "batch": 2})
    assert cache.num_free == cache.num_pages
    for name in ("batch", "context", "exact", "sparse", "k", "dense_layers"):
        good = dict(batch=1, context=0, exact=1, sparse=0, k=0, dense_layers=0)
        for value in (-1, 1.5, math.nan, True):
            with pytest.raises(ValueError, match=f"block_floor_ms: {name} must be an integer >= "):
                speed.block_floor_ms(model.config, **{**good, name: value})
    with pytest.raises(ValueError, match="dense_layers must be at most the 2 there are, got 3"):
        speed.block_floor_ms(model.config, batch=1, context=0, exact=1, sparse=0, dense_layers=3)
    with pytest.raises(ValueError, match="batch must be at most the cache's 4 pages, got 1000000000"):
        speed.random_state(model, cache, **{**arguments, "batch": 10**9})
    with pytest.raises(ValueError, match=r"page_size must be one of .* got 0"):
        speed.random_cache(model, num_tokens=64, page_size=0)
    with pytest.raises(ValueError, match="num_tokens must be an integer >= 1, got -5"):
        speed.random_cache(model, num_tokens=-5)
    with pytest.raises(TypeError, match="random_state: model must be a Transformer, got None"):
        speed.random_state(None, cache, **arguments)
    with pytest.raises(ValueError, match="contexts must have at least one, got none"):
        speed.advise(model, cache, MAGE, batch=1, contexts=[])
    with pytest.raises(TypeError, match=r"num_tokens must be an integer, got 1\.5"):
        speed.random_cache(model, num_tokens=1.5)
    with pytest.raises(ValueError, match="model and cache must be on cuda, got cpu"):
        speed.measure_blocks(model, cache, MAGE, batch=1, context=128)
    with pytest.raises(ValueError, match=r"config\.mode must be .mage., got .exact."):
        speed.advise(model, cache, DenoiseConfig(), batch=1, contexts=[128])
    with pytest.raises(ValueError, match="contexts must be longer than the 64 tokens of the budget, got 64"):
        speed.advise(model, cache, MAGE, batch=1, contexts=[64])


def test_floors_by_hand():
    """7B at 128K: bytes bound the products (14.1 GB of weights without the embedding), flops the attention."""
    config = GEOMETRIES["7B"]
    weights = 28 * (3584 * 4608 + 3584 * 3584 + 2 * 3584 * 18944 + 18944 * 3584) + 3584 * 152064
    floor = speed.products_floor_us(config, 32, 8)
    assert 2 * weights / 3.05e6 < floor < 1.02 * 2 * weights / 3.05e6
    assert speed.bytes_per_token(config) == 28 * 4 * 128 * 2 * 2 == 57344
    tokens = 131072 + 32
    # 7 * 32 rows count as 256, and their flops take longer than the bytes; those of 8 rows of a sub-block do not.
    flops = 4 * 128 * 4 * 256 * tokens
    assert speed.attention_floor_us(config, 1, 32, tokens) == pytest.approx(flops / 700e6)
    num_bytes = 4 * 2 * 128 * (2 * tokens + 2 * 7 * 8)
    assert speed.attention_floor_us(config, 1, 8, tokens) == pytest.approx(num_bytes / 3.05e6)
    # 8B with 8 requests: 4 * 32 = 128 rows and 1024 + 32 tokens; flops are below the bytes.
    config = GEOMETRIES["8B"]
    flops = 4 * 128 * 8 * 8 * 128 * 1056
    num_bytes = 8 * 8 * 2 * 128 * (2 * 1056 + 2 * 128)
    assert speed.attention_floor_us(config, 8, 32, 1056) == pytest.approx(max(num_bytes / 3.05e6, flops / 700e6))
    # At 2048 rows products are bound by flops.
    assert speed.products_floor_us(config, 2048, 0) == pytest.approx(
        36 * 2 * 2048 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288) / 700e6
    )


def test_floor_of_a_block_adds_its_forwards_up():
    config = GEOMETRIES["8B"]
    one = lambda **counts: speed.block_floor_ms(config, batch=2, context=65536, **counts)  # noqa: E731
    exact = one(exact=2, sparse=0) - one(exact=1, sparse=0)
    sparse = one(exact=1, sparse=2, k=1024) - one(exact=1, sparse=1, k=1024)
    assert 0 < sparse < exact
    assert one(exact=1, sparse=1, k=1 << 20) - one(exact=1, sparse=0) == pytest.approx(exact)  # K past the context
    dense = one(exact=1, sparse=1, k=1024, dense_layers=36) - one(exact=1, sparse=0)
    assert dense == pytest.approx(exact)
    assert one(exact=1, sparse=7, k=1024) == pytest.approx(one(exact=1, sparse=0) + 7 * sparse)


def test_break_even():
    assert speed.break_even_context({4096: (1.0, 0.9), 8192: (2.0, 1.0)}) == 0
    assert speed.break_even_context({4096: (1.0, 1.5), 8192: (2.0, 1.5)}) == 6144
    assert speed.break_even_context({4096: (1.0, 1.5), 8192: (1.1, 1.5)}) == math.inf
    # Slower, faster, slower: it never stays faster. Faster, slower, faster: from the last crossing on.
    assert speed.break_even_context({1000: (1, 2), 2000: (2, 1), 3000: (1, 2)}) == math.inf
    assert speed.break_even_context({1000: (2, 1), 2000: (1, 2), 3000: (2, 1)}) == 2500
    with pytest.raises(ValueError, match="times must have a context, got none"):
        speed.break_even_context({})
    for pair in ((math.nan, 1.0), (0, 1), (-1, 2), (1, math.inf), ("a", 1), (1,)):
        with pytest.raises(ValueError, match="times must be pairs of positive numbers, got"):
            speed.break_even_context({1000: pair})


@pytest.mark.gpu
def test_block_times_on_a_gpu():
    model = _model(device="cuda")
    cache = speed.random_cache(model, num_tokens=3 * 2048)
    times = speed.measure_blocks(model, cache, MAGE, batch=3, context=1024)
    assert times.forwards == {"select": 1, "sparse": 3, "commit": 1}
    steps = times.step_ms["select"] + 3 * times.step_ms["sparse"] + times.step_ms["commit"]
    assert times.block_ms == pytest.approx(steps, rel=0.25)
    assert times.tokens_per_s == pytest.approx(3 * 32 / times.block_ms * 1e3)
    fused = dataclasses.replace(MAGE, fuse_commit=True)
    model = _model("llama", device="cuda")
    cache = speed.random_cache(model, num_tokens=3 * 2048)
    assert speed.measure_blocks(model, cache, fused, batch=3, context=1024).forwards == {"select": 1}
    (advice,) = speed.advise(model, cache, MAGE, batch=3, contexts=[1024])
    assert advice.speedup == advice.exact_ms / advice.mage_ms > 0 and advice.ceiling > 0


@pytest.mark.gpu
def test_ten_thousand_blocks_leak_nothing():
    """Device memory, pages and graphs stay what they are, its reserve settles; runs give the same tokens."""
    model = _model("llama", device="cuda")
    config = dataclasses.replace(MAGE, max_new_tokens=8 * 250, ignore_eos=True)
    prompts = [[1 + i % 90 for i in range(80 + 7 * r)] for r in range(10)]
    cache = PagedCache.for_model(model, num_pages=400)
    from mage_ext.denoise import StepGraphs

    graphs = StepGraphs()
    tokens, sizes, reserved = [], [], []
    for _ in range(8):
        results = generate(model, prompts, config, max_batch=4, cache=cache, graphs=graphs)
        tokens.append([r.tokens for r in results])
        torch.cuda.synchronize()
        sizes.append((torch.cuda.memory_allocated(), graphs.num_graphs))
        reserved.append(torch.cuda.memory_reserved())
        assert cache.num_free == cache.num_pages
    assert sum(len(t) for run in tokens for t in run) == 8 * 10 * 8 * 250  # 20,000 blocks of 8
    assert tokens[1:] == tokens[:1] * 7
    assert sizes[1:] == sizes[1:2] * 7
    assert reserved[4:] == reserved[4:5] * 4
