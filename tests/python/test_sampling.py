"""Samplers and random draws. Run: pytest tests/python/test_sampling.py"""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ext import reference, sampling
from mage_ext.counter_random import random_bits, random_uniform
from mage_ext.sampling import (
    Draws,
    SamplerConfig,
    decide,
    draw_tokens,
    entropy_bounded,
    low_confidence_dynamic,
    low_confidence_static,
    sequential,
)

pytestmark = pytest.mark.filterwarnings("error")

seeds_st = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- counter-based numbers -------------------------------------------------------------------------------------------


def splitmix(x: int) -> int:
    """One SplitMix64 output in Python integers."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_random_bits_are_splitmix64():
    # First output of SplitMix64 with state 0, from the published generator.
    assert int(random_bits(torch.tensor(0))) & ((1 << 64) - 1) == 0xE220A8397B1DCDAF
    for key, position, step in [(0, 0, 0), (1, 2, 3), (-5, 1 << 40, 7), (2**62, 31, 0)]:
        expected = splitmix(splitmix(splitmix(key & ((1 << 64) - 1)) ^ position) ^ step)
        got = random_bits(torch.tensor(key), torch.tensor(position), step)
        assert int(got) & ((1 << 64) - 1) == expected


def test_random_uniform_has_the_moments_of_a_uniform():
    u = random_uniform(torch.arange(200_000), 3, 7)
    n = len(u)
    assert 0 <= u.min() and u.max() < 1
    # Five standard errors of the mean, the variance and the lag-1 correlation of n uniform numbers.
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert abs(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean() * 12) < 5 / n**0.5
    counts = torch.histc(u.float(), 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5


def test_random_numbers_differ_in_every_part_of_the_key():
    grid = random_bits(*torch.meshgrid(torch.arange(20), torch.arange(20), torch.arange(20), indexing="ij"))
    assert len(grid.unique()) == 8000


# --- draws -----------------------------------------------------------------------------------------------------------


def draw_one(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, uniform: float) -> int:
    """The definition for one row of float32 logits (mask id excluded already), in Python."""
    finite = [-math.inf if math.isnan(x) else x for x in logits.tolist()]
    top = max(finite)
    scaled = (torch.tensor(finite) - top) / temperature
    by_rank = sorted(range(len(finite)), key=lambda i: (-float(scaled[i]), i))
    kept = by_rank[: top_k or len(by_rank)]
    scaled = torch.tensor([float(scaled[i]) if i in kept else -math.inf for i in range(len(finite))])
    weights = [int(w) for w in (torch.softmax(scaled, -1).double() * 2**40).long()]
    if top_p < 1:
        total, before, nucleus = float(sum(weights)), 0, []
        for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
            if before < top_p * total:
                nucleus.append(i)
            before += weights[i]
        weights = [w if i in nucleus else 0 for i, w in enumerate(weights)]
    target = min(int(uniform * float(sum(weights))), sum(weights) - 1)
    for i, w in enumerate(weights):
        target -= w
        if target < 0:
            return i
    raise AssertionError("unreachable")


@settings(max_examples=100, deadline=None)
@given(
    seeds_st,
    st.integers(2, 40),
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    st.integers(0, 45),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.booleans(),
)
def test_draws_follow_their_definition(seed, vocab, temperature, top_k, top_p, quantised):
    logits = torch.randn(3, vocab, generator=generator(seed)) * 2
    if quantised:
        logits = logits.round()
    logits[torch.rand(logits.shape, generator=generator(seed + 1)) < 0.1] = math.nan
    mask_id = seed % vocab
    logits[:, (mask_id + 1) % vocab] = 0.5  # one number at least
    positions = torch.arange(100, 103)
    draws = draw_tokens(
        logits,
        mask_id=mask_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=torch.tensor(seed),
        positions=positions,
        step=5,
    )
    excluded = logits.clone()
    excluded[:, mask_id] = -math.inf
    uniform = random_uniform(torch.tensor(seed), positions, 5)
    expected = [draw_one(excluded[i], temperature, top_k, top_p, float(uniform[i])) for i in range(3)]
    assert draws.token.tolist() == expected
    probs = torch.softmax(excluded.nan_to_num(nan=-math.inf, neginf=-math.inf).double(), -1)
    torch.testing.assert_close(
        draws.confidence.double(), probs.gather(1, draws.token[:, None])[:, 0], rtol=2e-6, atol=0
    )
    entropy = torch.special.entr(probs).sum(-1)
    torch.testing.assert_close(draws.entropy.double(), entropy, rtol=2e-6, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    seeds_st, st.integers(2, 30), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(-1, 29)
)
def test_temperature_zero_takes_the_largest_logit(seed, vocab, dtype, mask_id):
    mask_id = None if mask_id < 0 else mask_id % vocab
    logits = (torch.randn(2, 3, vocab, generator=generator(seed)) * 2).round().to(dtype)  # rounded: ties
    before = logits.clone()
    draws = draw_tokens(logits, mask_id=mask_id)
    assert torch.equal(logits, before)
    if mask_id is not None:
        before[..., mask_id] = -math.inf
        assert (draws.token != mask_id).all()
    token, prob, entropy = reference.token_confidence(before.view(-1, vocab))
    assert torch.equal(draws.token.flatten(), token)
    torch.testing.assert_close(draws.confidence.flatten(), prob, rtol=2e-6, atol=0)
    torch.testing.assert_close(draws.entropy.flatten(), entropy, rtol=2e-6, atol=2e-6)


def test_mask_id_is_never_emitted_even_where_nothing_else_can_be():
    logits = torch.full((3, 5), -math.inf)
    logits[:, 0] = 100.0
    logits[1] = math.nan
    for kwargs in ({}, {"temperature": 1.0, "seeds": torch.tensor(1), "positions": torch.arange(3)}):
        draws = draw_tokens(logits, mask_id=0, **kwargs)
        assert (draws.token == 1).all() and (draws.confidence == 0).all() and (draws.entropy == 0).all()
        assert (draw_tokens(logits[1:2], mask_id=2).token == 0).all()


def test_infinite_logits_share_the_probability():
    logits = torch.tensor([[0.0, math.inf, 5.0, math.inf]])
    draws = draw_tokens(logits, mask_id=None)
    assert draws.token.item() == 1 and draws.confidence.item() == 0.5
    assert draws.entropy.item() == pytest.approx(math.log(2))
    sampled = draw_tokens(
        logits.expand(200, 4), mask_id=None, temperature=1.0, seeds=torch.arange(200), positions=torch.tensor(0)
    )
    assert set(sampled.token.tolist()) == {1, 3} and (sampled.confidence == 0.5).all()


def test_draws_depend_on_seed_position_and_step_alone():
    logits = torch.randn(4, 8, 50, generator=generator(0))
    seeds = torch.tensor([[11], [12], [13], [14]])
    positions = torch.arange(64, 72).expand(4, 8)
    step = torch.tensor([[0], [1], [2], [3]])
    kwargs = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "mask_id": 7}
    batch = draw_tokens(logits, seeds=seeds, positions=positions, step=step, **kwargs)
    for b in range(4):
        for i in range(8):
            one = draw_tokens(
                logits[b, i], seeds=seeds[b, 0], positions=positions[b, i], step=int(step[b, 0]), **kwargs
            )
            assert one.token == batch.token[b, i] and one.confidence == batch.confidence[b, i]
    order = torch.tensor([2, 0, 3, 1])
    moved = draw_tokens(logits[order], seeds=seeds[order], positions=positions, step=step[order], **kwargs)
    assert torch.equal(moved.token, batch.token[order])
    again = draw_tokens(logits, seeds=seeds, positions=positions, step=step + 1, **kwargs)
    assert not torch.equal(again.token, batch.token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_overwriting_spares_a_copy_and_changes_no_draw(temperature, dtype):
    logits = torch.randn(4, 6, 50, generator=generator(0)).to(dtype)
    logits[..., 7] = 9  # the mask id, which would win
    kwargs = {"mask_id": 7, "temperature": temperature, "seeds": torch.tensor(3), "positions": torch.arange(6)}
    before, owned = logits.clone(), logits.clone()
    expected = draw_tokens(logits, **kwargs)
    assert torch.equal(logits, before)
    for part, other in zip(draw_tokens(owned, overwrite=True, **kwargs), expected, strict=True):
        assert torch.equal(part, other)
    before[..., 7] = -math.inf
    assert torch.equal(owned, before)
    untouched = logits.clone()
    draw_tokens(untouched, overwrite=True, **{**kwargs, "mask_id": None})
    assert torch.equal(untouched, logits)


def test_the_lowest_allowed_id_stands_where_no_logit_does():
    for fill in (-math.inf, math.nan):
        for mask_id, expected in ((0, 1), (1, 0), (4, 0), (None, 0)):
            for temperature in (0.0, 1.0):
                key = {"seeds": torch.tensor(1), "positions": torch.arange(2)}
                draws = draw_tokens(torch.full((2, 5), fill), mask_id=mask_id, temperature=temperature, **key)
                assert draws.token.tolist() == [expected] * 2 and draws.confidence.tolist() == [0.0] * 2


def test_a_token_that_was_drawn_has_a_confidence():
    """0 is for rows without one: the loop takes it for a failure of the model."""
    logits = torch.tensor([[0.0, -500.0, -500.0, -500.0]]).expand(64, 4)
    kwargs = dict(mask_id=None, temperature=1e4, seeds=torch.arange(64), positions=torch.tensor(0))
    draws = draw_tokens(logits, **kwargs)
    assert set(draws.token.tolist()) == {0, 1, 2, 3}
    assert (draws.confidence[draws.token == 0] == 1).all() and (draws.confidence > 0).all()
    assert (draws.confidence[draws.token != 0] < 1e-37).all()


def test_draws_have_the_probabilities_of_the_model():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    n = 40_000
    tokens = draw_tokens(
        probs.log().expand(n, 4), mask_id=None, temperature=1.0, seeds=torch.tensor(3), positions=torch.arange(n)
    ).token
    for token, p in enumerate(probs.tolist()):
        assert abs((tokens == token).float().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    nucleus = draw_tokens(
        probs.log().expand(n, 4),
        mask_id=None,
        temperature=1.0,
        top_p=0.75,
        seeds=torch.tensor(3),
        positions=torch.arange(n),
    ).token
    assert set(nucleus.tolist()) == {0, 1}  # a token is kept while the probability before it is < 0.75
    assert abs((nucleus == 0).float().mean() - 2 / 3) < 5 * (2 / 9 / n) ** 0.5


def test_a_low_temperature_approaches_the_argmax_without_overflow():
    logits = torch.randn(50, 30, generator=generator(2)) * 1e4
    cold = draw_tokens(logits, mask_id=None, temperature=1e-4, seeds=torch.tensor(0), positions=torch.arange(50))
    assert torch.equal(cold.token, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_the_extreme_temperatures_draw_from_the_tempered_distribution(temperature):
    n = 4000
    logits = (torch.tensor([0.1, 0.2, 0.3, 0.4]).log() * temperature).expand(n, 4)
    drawn = draw_tokens(
        logits, mask_id=None, temperature=temperature, seeds=torch.tensor(5), positions=torch.arange(n)
    ).token
    shares = torch.bincount(drawn, minlength=4) / n
    assert (shares - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max() < 5 * (0.25 / n) ** 0.5


# --- samplers --------------------------------------------------------------------------------------------------------


def draws_of(confidence: torch.Tensor, entropy: torch.Tensor | None = None) -> Draws:
    entropy = torch.zeros_like(confidence) if entropy is None else entropy
    return Draws(torch.zeros(confidence.shape, dtype=torch.int64), confidence, entropy)


def decide_one(config: SamplerConfig, confidence: list[float], entropy: list[float], open: list[bool]) -> list[bool]:
    """The definitions for one row, in Python; NaN confidence ranks lowest, NaN entropy last."""
    positions = [i for i in range(len(open)) if open[i]]
    confidence = [-1.0 if math.isnan(c) else c for c in confidence]
    entropy = [math.inf if math.isnan(e) else e for e in entropy]
    by_confidence = sorted(positions, key=lambda i: (-confidence[i], i))
    by_entropy = sorted(positions, key=lambda i: (entropy[i], i))
    if config.name == "sequential":
        chosen = positions[: config.tokens_per_step]
    elif config.name == "low_confidence_static":
        chosen = by_confidence[: config.tokens_per_step]
    elif config.name == "low_confidence_dynamic":
        above = [i for i in positions if confidence[i] > float(torch.tensor(config.threshold))]
        chosen = above or by_confidence[:1]
    else:
        chosen = []
        for i in by_entropy:
            together = [entropy[j] for j in [*chosen, i]]
            if sum(sorted(together)[:-1]) > config.entropy_bound:
                break
            chosen.append(i)
    return [i in chosen for i in range(len(open))]


@settings(max_examples=250, deadline=None)
@given(seeds_st, st.sampled_from(sampling.SAMPLERS), st.integers(1, 33), st.integers(1, 5))
def test_samplers_follow_their_definition(seed, name, width, tokens_per_step):
    g = generator(seed)
    confidence = torch.rand(3, width, generator=g)
    entropy = torch.rand(3, width, generator=g) * 2
    if seed % 3 == 0:  # ties
        confidence, entropy = (confidence * 4).round() / 4, (entropy * 2).round() / 2
    if seed % 5 == 0:
        confidence[torch.rand(3, width, generator=g) < 0.2] = math.nan
        entropy[torch.rand(3, width, generator=g) < 0.2] = math.nan
    open = torch.rand(3, width, generator=g) < 0.6
    config = SamplerConfig(
        name,
        tokens_per_step=tokens_per_step,
        threshold=[0.0, 0.5, 0.75, 1.0][seed % 4],
        entropy_bound=[0, 0.5, 2, 9][seed % 4],
    )
    decided = decide(config, draws_of(confidence, entropy), open)
    expected = [
        decide_one(config, c, e, o)
        for c, e, o in zip(confidence.tolist(), entropy.tolist(), open.tolist(), strict=True)
    ]
    assert decided.tolist() == expected
    assert not (decided & ~open).any()
    assert torch.equal(decided.any(-1), open.any(-1))


@pytest.mark.parametrize("name", sampling.SAMPLERS)
@pytest.mark.parametrize("tokens_per_step", [1, 2, 4])
@pytest.mark.parametrize("num_open", [1, 7, 32])
def test_max_forwards_bounds_the_steps(name, tokens_per_step, num_open):
    config = SamplerConfig(name, tokens_per_step=tokens_per_step, threshold=0.6)
    open = torch.zeros(1, 32, dtype=torch.bool)
    open[0, torch.randperm(32, generator=generator(num_open))[:num_open]] = True
    forwards = 0
    while open.any():
        draws = draws_of(
            torch.rand(1, 32, generator=generator(forwards)), torch.rand(1, 32, generator=generator(forwards))
        )
        open = open & ~decide(config, draws, open)
        forwards += 1
    if name in ("sequential", "low_confidence_static"):
        assert forwards == config.max_forwards(num_open) == math.ceil(num_open / tokens_per_step)
    assert forwards <= config.max_forwards(num_open)


def test_threshold_is_strict():
    open = torch.ones(1, 3, dtype=torch.bool)
    draws = draws_of(torch.tensor([[0.5, 0.75, 1.0]]))
    assert decide(SamplerConfig(threshold=0.75), draws, open).tolist() == [[False, False, True]]
    assert decide(SamplerConfig(threshold=0.5), draws, open).tolist() == [[False, True, True]]
    assert decide(SamplerConfig(threshold=1.0), draws, open).tolist() == [[False, False, True]]


def test_entropy_bound_excludes_the_largest_term_and_is_inclusive():
    open = torch.ones(1, 4, dtype=torch.bool)
    draws = draws_of(torch.zeros(1, 4), torch.tensor([[3.0, 0.25, 0.5, 0.25]]))
    for bound, expected in [(0.0, [1]), (0.25, [1, 3]), (0.5, [1, 2, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        decided = decide(SamplerConfig("entropy_bounded", entropy_bound=bound), draws, open)
        assert decided[0].nonzero().flatten().tolist() == expected


def test_entropies_that_are_almost_zero_or_no_entropies():
    """Only an entropy of 0 is free under a bound of 0; what no vocabulary reaches counts as infinite, like NaN."""
    open = torch.ones(1, 4, dtype=torch.bool)
    for entropy, bound, expected in [
        ([0.0, 1e-30, 0.0, 0.0], 0.0, [0, 1, 2, 3]),  # the largest term is not in the sum
        ([1e-30, 1e-30, 0.0, 2e-30], 0.0, [0, 2]),
        ([math.nan, math.inf, math.nan, math.nan], 1e9, [1]),
        ([math.nan, 2.0, 65.0, 3.0], 1e9, [1, 2, 3]),
    ]:
        draws = draws_of(torch.zeros(1, 4), torch.tensor([entropy]))
        decided = decide(SamplerConfig("entropy_bounded", entropy_bound=bound), draws, open)
        assert decided[0].nonzero().flatten().tolist() == expected


@pytest.mark.gpu
def test_cuda_draws_and_decides_as_the_cpu_does():
    keys, positions = torch.arange(50)[:, None], torch.arange(40)
    uniform = random_uniform(keys, positions, 3)
    assert torch.equal(random_uniform(keys.cuda(), positions.cuda(), 3).cpu(), uniform)
    probs = torch.softmax(torch.randn(50, 40, 300, generator=generator(0)) * 3, -1)
    drawn = sampling._inverse_cdf(probs, uniform)
    assert torch.equal(sampling._inverse_cdf(probs.cuda(), uniform.cuda()).cpu(), drawn)
    nucleus = sampling._keep_top_p(probs, 0.7)
    assert torch.equal(sampling._keep_top_p(probs.cuda(), 0.7).cpu(), nucleus)

    logits = torch.randn(4, 32, 1000, generator=generator(1)) * 3
    cpu, cuda = draw_tokens(logits, mask_id=5), draw_tokens(logits.cuda(), mask_id=5)
    assert torch.equal(cuda.token.cpu(), cpu.token)
    torch.testing.assert_close(cuda.confidence.cpu(), cpu.confidence, rtol=2e-6, atol=0)
    torch.testing.assert_close(cuda.entropy.cpu(), cpu.entropy, rtol=2e-6, atol=2e-6)
    open = torch.rand(4, 32, generator=generator(2)) < 0.6
    for name in sampling.SAMPLERS:
        config = SamplerConfig(name, tokens_per_step=3, threshold=0.3, entropy_bound=2.0)
        on_cuda = decide(config, Draws(*(part.cuda() for part in cpu)), open.cuda())
        assert torch.equal(on_cuda.cpu(), decide(config, cpu, open))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "greedy"),
        ("name", None),
        ("tokens_per_step", 0),
        ("tokens_per_step", 1.5),
        ("tokens_per_step", True),
        ("threshold", math.nan),
        ("threshold", 1.1),
        ("threshold", -0.1),
        ("threshold", "0.9"),
        ("entropy_bound", math.nan),
        ("entropy_bound", math.inf),
        ("entropy_bound", -1),
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", 1e-300),
        ("temperature", 1e-45),
        ("temperature", 9.9e-5),
        ("temperature", 10001),
        ("temperature", 1e39),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
    ],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=rf"SamplerConfig: {field} must be .*, got {re.escape(repr(value))}"):
        SamplerConfig(**{field: value})


@pytest.mark.parametrize(
    ("error", "message", "logits", "kwargs"),
    [
        (TypeError, "logits must be floating point", torch.zeros(2, 5, dtype=torch.int32), {}),
        (ValueError, "logits must have an id", torch.zeros(2, 1), {"mask_id": 0}),
        (ValueError, r"mask_id must be in \[0, V = 5\), got 5", torch.zeros(2, 5), {"mask_id": 5}),
        (ValueError, "mask_id must be in .*, got -1", torch.zeros(2, 5), {"mask_id": -1}),
        (ValueError, "temperature must be a number", torch.zeros(2, 5), {"temperature": math.nan}),
        (
            ValueError,
            r"temperature must be .* 0 or in \[0.0001, 10000\], got 1e-45",
            torch.zeros(2, 5),
            {"temperature": 1e-45},
        ),
        (ValueError, r"temperature must be .*, got 1e\+39", torch.zeros(2, 5), {"temperature": 1e39}),
        (ValueError, "top_k must be an integer", torch.zeros(2, 5), {"top_k": -2}),
        (ValueError, "top_p must be a number", torch.zeros(2, 5), {"top_p": 0.0}),
        (
            ValueError,
            "seeds must be an int64 tensor",
            torch.zeros(2, 5),
            {"temperature": 1.0, "positions": torch.arange(2)},
        ),
        (
            ValueError,
            "positions must be an int64 tensor",
            torch.zeros(2, 5),
            {"temperature": 1.0, "seeds": torch.tensor(0)},
        ),
        (
            ValueError,
            "seeds must be an int64 tensor .*, got torch.float32",
            torch.zeros(2, 5),
            {"temperature": 1.0, "seeds": torch.tensor(0.0), "positions": torch.arange(2)},
        ),
    ],
)
def test_draw_tokens_names_the_bad_argument(error, message, logits, kwargs):
    with pytest.raises(error, match=f"draw_tokens: {message}"):
        draw_tokens(logits, **{"mask_id": None, **kwargs})


@pytest.mark.parametrize(
    "open", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
)
def test_decide_names_open(open):
    with pytest.raises(ValueError, match=r"decide: open must be bool \[2, 3\]"):
        decide(SamplerConfig(), draws_of(torch.zeros(2, 3)), open)


# --- arguments of another type ---------------------------------------------------------------------------------------

_LOGITS, _OPEN = torch.randn(2, 3, 9), torch.ones(2, 3, dtype=torch.bool)
_KEY = {"temperature": 0.5, "seeds": torch.zeros(2, 1).long(), "positions": torch.zeros(2, 3).long(), "mask_id": None}
_FLOAT = torch.rand(2, 3)


def _draw(**changes):
    return lambda: draw_tokens(**{"logits": _LOGITS, **_KEY, **changes})


_CALLS = {
    "name": (lambda: SamplerConfig(name=["sequential"]), "SamplerConfig: name must be one of .* got list"),
    "num_open": (
        lambda: SamplerConfig().max_forwards(None),
        "SamplerConfig: num_open must be an integer >= 0, got None",
    ),
    "logits": (_draw(logits=None), "draw_tokens: logits must be a tensor, got None"),
    "logits_list": (_draw(logits=[1.0]), "draw_tokens: logits must be a tensor, got list"),
    "mask_id": (_draw(mask_id="a"), "draw_tokens: mask_id must be an integer or None, got 'a'"),
    "mask_id_float": (_draw(mask_id=1.0), "draw_tokens: mask_id must be an integer or None, got 1.0"),
    "seeds": (_draw(seeds=3), "draw_tokens: seeds must be an int64 tensor at temperature > 0, got 3"),
    "positions": (_draw(positions=_FLOAT), "draw_tokens: positions must be an int64 tensor .* got torch.float32"),
    "seeds_shape": (
        _draw(seeds=torch.zeros(3, 1).long()),
        r"draw_tokens: seeds must broadcast with \[2, 3\], got \[3, 1\]",
    ),
    "positions_shape": (
        _draw(positions=torch.zeros(4).long()),
        r"draw_tokens: positions must broadcast with \[2, 3\], got \[4\]",
    ),
    "positions_rank": (
        _draw(positions=torch.zeros(1, 2, 3).long()),
        r"draw_tokens: positions must broadcast with \[2, 3\], got \[1, 2, 3\]",
    ),
    "step": (_draw(step="a"), "draw_tokens: step must be an integer or an int64 tensor, got 'a'"),
    "step_true": (_draw(step=True), "draw_tokens: step must be an integer or an int64 tensor, got True"),
    "step_dtype": (_draw(step=torch.zeros(())), "draw_tokens: step must be .* int64 tensor, got torch.float32"),
    "step_large": (_draw(step=1 << 63), "draw_tokens: step must fit 64 bits, got 9223372036854775808"),
    "overwrite": (_draw(overwrite=1), "draw_tokens: overwrite must be a bool, got 1"),
    "temperature": (_draw(temperature=None), "draw_tokens: temperature must be a number, .* got None"),
    "decide_config": (lambda: decide(None, None, _OPEN), "decide: config must be a SamplerConfig, got None"),
    "decide_draws": (lambda: decide(SamplerConfig(), 3, _OPEN), "decide: draws must be Draws, got 3"),
    "decide_open": (lambda: decide(SamplerConfig(), _draw()(), None), "decide: open must be a tensor"),
    "open": (lambda: sequential(None, 1), "sequential: open must be a tensor, got None"),
    "open_dtype": (lambda: sequential(_FLOAT, 1), "sequential: open must be bool, got torch.float32"),
    "open_rank": (lambda: sequential(_OPEN[0], 1), r"sequential: open must be \[B, Q\], got \[3\]"),
    "per_step": (lambda: sequential(_OPEN, 0), "sequential: tokens_per_step must be an integer >= 1, got 0"),
    "confidence": (
        lambda: low_confidence_static(None, _OPEN, 1),
        "low_confidence_static: confidence must be a tensor, got None",
    ),
    "confidence_shape": (
        lambda: low_confidence_static(_FLOAT[:1], _OPEN, 1),
        r"low_confidence_static: confidence must have shape \[2, 3\], got \[1, 3\]",
    ),
    "confidence_dtype": (
        lambda: low_confidence_dynamic(_OPEN, _OPEN, 0.5),
        "low_confidence_dynamic: confidence must be floating point, got torch.bool",
    ),
    "threshold": (
        lambda: low_confidence_dynamic(_FLOAT, _OPEN, float("nan")),
        "low_confidence_dynamic: threshold must be a number in .* got nan",
    ),
    "entropy": (lambda: entropy_bounded("a", _OPEN, 0.5), "entropy_bounded: entropy must be a tensor, got 'a'"),
    "bound": (
        lambda: entropy_bounded(_FLOAT, _OPEN, -1.0),
        "entropy_bounded: entropy_bound must be a number in .* got -1.0",
    ),
}


@pytest.mark.parametrize("case", _CALLS)
def test_names_what_is_of_another_type(case):
    call, message = _CALLS[case]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()
