"""select_kv against its slow twin, its promises one by one, and what it refuses.

Run: pytest tests/python/test_select_kv.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ext import ops, reference

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
NAMES = ("indices", "counts", "kept_mass", "tail_start", "overflow")
ONE = 1 << 40  # fixed point of the sums


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_mass(shape, kind, seed):
    """[L, B, Hkv, n] of one kind; "broken" holds NaN, negatives, infinity, zeros and denormals."""
    g = generator(seed)
    mass = torch.rand(shape, generator=g)
    if kind == "ties":
        return (mass * 4).floor() / 4
    if kind == "uniform":
        return torch.full(shape, 1 / shape[-1])
    if kind == "zero":
        return torch.zeros(shape)
    mass = torch.softmax(mass * 20, -1)
    if kind == "broken":
        for value in (math.nan, -1.0, -0.0, math.inf, 0.0, 1e-41, 2e-41):
            mass[torch.rand(shape, generator=g) < 0.08] = value
    return mass


def make_votes(shape, seed, broken=False):
    """votes, union_size and coverage as rule "layer" takes them."""
    g = generator(seed)
    n = shape[-1]
    votes = torch.randint(0, [2, 4, 200][seed % 3], shape, generator=g, dtype=torch.int32)
    union_size = torch.randint(0, n + 1, shape[:3], generator=g, dtype=torch.int32)
    coverage = torch.rand(shape[:3], generator=g)
    if seed % 4 == 0:
        union_size.zero_()
    if broken:
        votes[torch.rand(shape, generator=g) < 0.2] = -3
        union_size[torch.rand(shape[:3], generator=g) < 0.3] = -5
        union_size[torch.rand(shape[:3], generator=g) < 0.3] = 2**31 - 1
        for value in (math.nan, 0.0, -1.0, 2.0, math.inf):
            coverage[torch.rand(shape[:3], generator=g) < 0.1] = value
    return {"votes": votes, "union_size": union_size, "coverage": coverage}


@st.composite
def select_cases(draw, rules=ops.SELECT_RULES, kinds=("random", "ties", "uniform", "zero", "broken"), capacity=None):
    g = draw(st.sampled_from(ops.GRANULARITIES))
    layers, requests, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    n = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 70]))
    shape = (layers, requests, heads, n)
    seed = draw(st.integers(0, 2**20))
    rule = draw(st.sampled_from(rules))
    kind = draw(st.sampled_from(kinds))
    whole = draw(st.booleans())
    lengths = torch.randint(0, n * g + 1, (requests,), generator=generator(seed + 1), dtype=torch.int32)
    if draw(st.booleans()):
        lengths[0] = draw(st.sampled_from([0, 1, g - 1, g, n * g, n * g - 1]))
    lengths = lengths // g * g if whole else lengths
    kwargs = {
        "g": g,
        "capacity": capacity or draw(st.sampled_from([1, 2, max(1, n // 2), n, n + 3])),
        "rule": rule,
        "k": g * draw(st.integers(0, n + 2)),
        "k_min": g * draw(st.sampled_from([0, 0, 1, n // 2])),
        "sinks": draw(st.sampled_from([0, 0, 1, 4, 2 * g, 10**6])),
        "recents": draw(st.sampled_from([0, 0, 1, g, 3 * g + 1, 10**6])),
    }
    if rule == "mass":
        kwargs["p"] = draw(st.sampled_from([1e-9, 0.3, 0.5, 0.9, 0.999, 1.0]))
    if rule == "layer":
        kwargs |= make_votes(shape, seed + 2, broken=kind == "broken")
    return make_mass(shape, kind, seed), lengths, kwargs


def fixed_point(mass):
    return (mass.nan_to_num(nan=0, posinf=1).clamp(0, 1).double() * ONE).long()


def listed_units(indices, n):
    """[L, B, Hkv, n] bool: which units the lists hold."""
    slots = torch.where(indices < 0, n, indices).long()
    return torch.zeros(*indices.shape[:3], n + 1, dtype=torch.bool).scatter(-1, slots, True)[..., :n]


def assert_bitwise(actual, expected):
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name


# --- the twin --------------------------------------------------------------------------------------------------------


@settings(max_examples=350, deadline=None)
@given(select_cases())
def test_equals_its_twin(case):
    mass, lengths, kwargs = case
    assert_bitwise(ops.select_kv(mass, lengths, **kwargs), reference.select_kv(mass, lengths, **kwargs))


@settings(max_examples=60, deadline=None)
@given(select_cases(), st.integers(-(2**31), 2**31 - 1))
def test_lengths_are_clamped(case, length):
    mass, lengths, kwargs = case
    lengths[-1] = length
    clamped = lengths.clamp(0, mass.shape[-1] * kwargs["g"])
    assert_bitwise(ops.select_kv(mass, lengths, **kwargs), ops.select_kv(mass, clamped, **kwargs))


@pytest.mark.parametrize("rule", ops.SELECT_RULES)
@pytest.mark.parametrize("n", [4096, 20_000])
def test_equals_its_twin_at_length(rule, n):
    shape = (2, 1, 2, n)
    mass = torch.softmax(torch.randn(shape, generator=generator(n)) * 3, -1)
    mass[..., ::7] = mass[..., :1]  # ties across the whole range
    kwargs = {"g": 1, "capacity": 1024, "rule": rule, "k": 512, "sinks": 4, "recents": 64, "k_min": 16}
    if rule == "mass":
        kwargs |= {"p": 0.4}
    if rule == "layer":
        kwargs |= make_votes(shape, 1)
    lengths = torch.tensor([n - 37], dtype=torch.int32)
    assert_bitwise(ops.select_kv(mass, lengths, **kwargs), reference.select_kv(mass, lengths, **kwargs))


# --- promises --------------------------------------------------------------------------------------------------------


@settings(max_examples=2000, deadline=None)
@given(select_cases())
def test_lists_are_ascending_subsets_and_mass_is_what_they_keep(case):
    mass, lengths, kwargs = case
    g, n, capacity = kwargs["g"], mass.shape[-1], kwargs["capacity"]
    indices, counts, kept_mass, tail_start, overflow = ops.select_kv(mass, lengths, **kwargs)
    assert torch.equal(tail_start, lengths // g * g)
    listed = torch.arange(capacity) < counts[..., None]
    assert ((counts >= 0) & (counts <= capacity)).all()
    assert (indices[~listed] == -1).all()
    assert (indices[listed] >= 0).all()
    assert (indices < (tail_start // g)[:, None, None]).all()
    assert (indices.diff(dim=-1)[listed[..., 1:]] > 0).all()
    assert (counts[:, lengths == 0] == 0).all()
    assert (overflow <= (counts == capacity)).all()

    fixed = fixed_point(mass)
    attended = listed_units(indices, n) | (torch.arange(n) >= (tail_start // g)[:, None, None])
    assert torch.equal(kept_mass, (torch.where(attended, fixed, 0).sum(-1).double() / ONE).float())


@settings(max_examples=1500, deadline=None)
@given(select_cases(rules=("fixed", "joint"), capacity=80))
def test_budgets_are_respected_to_the_unit(case):
    mass, lengths, kwargs = case
    g, heads = kwargs["g"], mass.shape[2]
    counts = ops.select_kv(mass, lengths, **kwargs)[1]
    eligible = lengths // g
    partial = (lengths % g > 0).int()
    budget = torch.minimum((kwargs["k"] // g - partial).clamp(min=0), eligible)
    if kwargs["rule"] == "fixed":
        assert (counts == budget[:, None]).all()
    else:
        shared = torch.minimum(heads * (kwargs["k"] // g - partial).clamp(min=0), heads * eligible)
        assert (counts.sum(-1) == shared).all()
    # In tokens, with the partial unit, a head of rule "fixed" never keeps more than K.
    if kwargs["rule"] == "fixed":
        kept_tokens = counts * g + (lengths % g)[:, None]
        assert (kept_tokens[:, :] <= torch.maximum(torch.tensor(kwargs["k"]), (lengths % g))[:, None]).all()


@settings(max_examples=1000, deadline=None)
@given(select_cases(rules=("layer",), capacity=80))
def test_layer_budgets_add_up(case):
    mass, lengths, kwargs = case
    kwargs |= {"k_min": 0}
    layers, g = mass.shape[0], kwargs["g"]
    counts = ops.select_kv(mass, lengths, **kwargs)[1]
    assert (counts == counts[..., :1]).all()  # one budget per layer
    assert (counts[..., 0].sum(0) * g <= kwargs["k"] * layers).all()
    least = g * 2
    more = ops.select_kv(mass, lengths, **{**kwargs, "k_min": least})[1]
    wanted = torch.minimum((least // g - (lengths % g > 0).int()).clamp(min=0), lengths // g)
    assert (more >= counts).all() and (more >= wanted[:, None]).all()


@settings(max_examples=1000, deadline=None)
@given(select_cases(rules=("mass",), kinds=("random", "ties", "uniform", "broken"), capacity=80))
def test_mass_takes_the_fewest_units(case):
    mass, lengths, kwargs = case
    kwargs |= {"k_min": 0}
    g, n = kwargs["g"], mass.shape[-1]
    indices = ops.select_kv(mass, lengths, **kwargs)[0]
    fixed = fixed_point(mass)
    total = fixed.sum(-1)
    unit = torch.arange(n)
    listed = listed_units(indices, n)
    kept = torch.where(listed | (unit >= (lengths // g)[:, None, None]), fixed, 0).sum(-1)
    assert (kept.double() >= torch.minimum((kwargs["p"] * total.double()).ceil(), total.double())).all()
    forced = (unit * g < kwargs["sinks"]) | ((unit + 1) * g > (lengths[:, None, None] - kwargs["recents"]))
    forced &= (unit < (lengths // g)[:, None, None]) & ((unit * g < kwargs["sinks"]) | (kwargs["recents"] > 0))
    chosen = torch.where(listed & ~forced, fixed, 2 * ONE).amin(-1)
    has_chosen = (listed & ~forced).any(-1)
    without = (kept - chosen).double() < (kwargs["p"] * total.double())
    assert (without | ~has_chosen).all()


@settings(max_examples=1500, deadline=None)
@given(select_cases(rules=("fixed", "joint", "mass"), kinds=("random", "ties", "uniform")))
def test_kept_mass_grows_with_the_budget(case):
    mass, lengths, kwargs = case
    kwargs["capacity"] = 80
    before = None
    # Forced units displace better ones while the budget does not hold them all; from there on more budget keeps more.
    for step in range(6):
        if kwargs["rule"] == "mass":
            kept = ops.select_kv(mass, lengths, **{**kwargs, "p": 0.1 + 0.18 * step})[2]
        else:
            k = step * kwargs["g"] * 3
            kept = ops.select_kv(mass, lengths, **{**kwargs, "k": k, "sinks": 0, "recents": 0})[2]
        if kwargs["rule"] == "joint":
            kept = kept.sum(-1)
        assert before is None or (kept >= before).all()
        before = kept


@settings(max_examples=100, deadline=None)
@given(select_cases(rules=("fixed", "joint", "layer"), kinds=("random", "ties", "broken")))
def test_a_budget_of_the_whole_prefix_lists_it(case):
    mass, lengths, kwargs = case
    g, n = kwargs["g"], mass.shape[-1]
    kwargs |= {"k": g * (n + 1), "k_min": g * (n + 1), "capacity": n}
    indices, counts, kept_mass, _, overflow = ops.select_kv(mass, lengths, **kwargs)
    assert (counts == (lengths // g)[:, None]).all() and not overflow.any()
    slot = torch.arange(n, dtype=torch.int32)
    assert torch.equal(indices, torch.where(slot < counts[..., None], slot, -1))
    assert torch.equal(kept_mass, (fixed_point(mass).sum(-1).double() / ONE).float())


@settings(max_examples=100, deadline=None)
@given(select_cases(kinds=("random", "ties")))
def test_overflow_keeps_the_best(case):
    mass, lengths, kwargs = case
    wide = ops.select_kv(mass, lengths, **{**kwargs, "capacity": mass.shape[-1]})
    cut = ops.select_kv(mass, lengths, **kwargs)
    assert torch.equal(cut[4], wide[1] > kwargs["capacity"])
    assert torch.equal(cut[1], wide[1].clamp(max=kwargs["capacity"]))
    assert not wide[4].any()
    for narrow, full in zip(cut[0].flatten(0, 2), wide[0].flatten(0, 2), strict=True):
        assert set(narrow.tolist()) - {-1} <= set(full.tolist())
    if not kwargs["sinks"] and not kwargs["recents"] and kwargs["rule"] != "layer":
        # Without forced units, what is dropped weighs no more than what is kept.
        for l, b, h in torch.cartesian_prod(*(torch.arange(size) for size in mass.shape[:3])).view(-1, 3).tolist():
            narrow = set(cut[0][l, b, h].tolist()) - {-1}
            dropped = set(wide[0][l, b, h].tolist()) - {-1} - narrow
            row = mass[l, b, h]
            assert not dropped or max(row[u] for u in dropped) <= min(row[u] for u in narrow)


@pytest.mark.parametrize("rule", ops.SELECT_RULES)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(rule, threads):
    shape = (5, 3, 4, 1501)
    mass = make_mass(shape, "broken", 7)
    lengths = torch.tensor([1501 * 16, 1000, 17], dtype=torch.int32)
    kwargs = {"g": 16, "capacity": 60, "rule": rule, "k": 640, "sinks": 4, "recents": 40, "p": 0.8}
    if rule == "layer":
        kwargs |= make_votes(shape, 3)
    try:
        torch.ops.mage.set_num_threads(1)
        one = ops.select_kv(mass, lengths, **kwargs)
        torch.ops.mage.set_num_threads(threads)
        assert_bitwise(ops.select_kv(mass, lengths, **kwargs), one)
    finally:
        torch.ops.mage.set_num_threads(0)


def test_order_of_priority_by_hand():
    mass = torch.tensor([0.0, 0.1, 0.3, 0.1, 0.0, 0.2, 0.1, 0.2]).view(1, 1, 1, 8)
    lengths = torch.tensor([7 * 16 + 3], dtype=torch.int32)  # unit 7 is partial and charged

    def listed(**kwargs):
        indices, counts, kept, tail, _ = ops.select_kv(mass, lengths, g=16, capacity=8, **kwargs)
        assert tail.tolist() == [112]
        return indices[0, 0, 0, : counts[0, 0, 0]].tolist(), round(kept.item(), 6)

    assert listed(k=0) == ([], 0.2)
    assert listed(k=16) == ([], 0.2)  # the partial unit takes it all
    assert listed(k=32) == ([2], 0.5)
    assert listed(k=64) == ([1, 2, 5], 0.8)  # 1, 3 and 6 tie: the lowest
    assert listed(k=32, sinks=1) == ([0], 0.2)
    assert listed(k=64, sinks=17) == ([0, 1, 2], 0.6)
    assert listed(k=64, recents=4) == ([2, 5, 6], 0.8)  # tokens 111..114: unit 6
    assert listed(k=64, recents=3) == ([1, 2, 5], 0.8)  # tokens 112..114 are in the partial unit
    assert listed(k=48, sinks=1, recents=40) == ([0, 6], 0.3)  # sinks first, then the latest
    assert listed(rule="mass", p=0.5) == ([2], 0.5)
    assert listed(rule="mass", p=0.51) == ([2, 5], 0.7)
    assert listed(rule="mass", p=0.1) == ([], 0.2)
    assert listed(rule="mass", p=0.1, k_min=48) == ([2, 5], 0.7)


def test_joint_follows_the_mass_and_breaks_ties_fairly():
    lengths = torch.tensor([64], dtype=torch.int32)
    mass = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]).view(1, 1, 2, 4)
    indices, counts = ops.select_kv(mass, lengths, g=16, capacity=4, rule="joint", k=32)[:2]
    assert counts.flatten().tolist() == [2, 2] and indices[0, 0].tolist() == [[0, 1, -1, -1], [0, 1, -1, -1]]
    uniform = torch.full((1, 1, 2, 4), 0.25)
    indices, counts = ops.select_kv(uniform, lengths, g=16, capacity=4, rule="joint", k=16)[:2]
    assert indices[0, 0].tolist() == [[0, -1, -1, -1], [0, -1, -1, -1]]
    peaked = torch.tensor([[1.0, 0, 0, 0], [0.3, 0.3, 0.2, 0.2]]).view(1, 1, 2, 4)
    counts = ops.select_kv(peaked, lengths, g=16, capacity=4, rule="joint", k=32)[1]
    assert counts.flatten().tolist() == [1, 3]


def test_layer_rule_by_hand():
    # s = (2 * 1, 6 * 1): K = 2 * 4 * (1/4, 3/4) units; ranked by votes, then the most recent.
    votes = torch.tensor([[0, 3, 0, 5, 0, 0], [1, 1, 1, 0, 2, 0]], dtype=torch.int32).view(2, 1, 1, 6)
    sizes = torch.tensor([2, 6], dtype=torch.int32).view(2, 1, 1)
    indices, counts = ops.select_kv(
        torch.full((2, 1, 1, 6), 1 / 6),
        torch.tensor([96], dtype=torch.int32),
        g=16,
        capacity=6,
        rule="layer",
        k=64,
        votes=votes,
        union_size=sizes,
        coverage=torch.ones(2, 1, 1),
    )[:2]
    assert counts.flatten().tolist() == [2, 6]
    assert indices[0].flatten().tolist() == [1, 3, -1, -1, -1, -1]
    filled = ops.select_kv(
        torch.full((2, 1, 1, 6), 1 / 6),
        torch.tensor([96], dtype=torch.int32),
        g=16,
        capacity=6,
        rule="layer",
        k=64,
        k_min=64,
        votes=votes,
        union_size=sizes,
        coverage=torch.ones(2, 1, 1),
    )
    assert filled[0][0].flatten().tolist() == [1, 3, 4, 5, -1, -1]  # 2 voted units, then the most recent


def test_coverage_outside_its_range_is_clamped():
    votes = make_votes((2, 1, 1, 50), 1)
    votes["union_size"] = torch.full((2, 1, 1), 30, dtype=torch.int32)

    def budgets(coverage):
        votes["coverage"] = torch.tensor(coverage).view(2, 1, 1)
        lengths = torch.tensor([800], dtype=torch.int32)
        return ops.select_kv(torch.rand(2, 1, 1, 50), lengths, g=16, capacity=50, rule="layer", k=320, **votes)[
            1
        ].tolist()

    assert budgets([2.0, 0.5]) == budgets([math.inf, 0.5]) == budgets([1.0, 0.5]) != budgets([0.5, 0.5])
    assert budgets([0.0, 0.5]) == budgets([-1.0, 0.5]) == budgets([math.nan, 0.5]) == budgets([2.0**-24, 0.5])
    assert budgets([2.0**-24, 0.5]) != budgets([2.0**-20, 0.5])


def test_a_share_of_the_mass_is_rounded_up():
    mass = torch.full((1, 1, 1, 3), 1 / ONE)  # three steps of the fixed point, half of which are 1.5
    counts = ops.select_kv(mass, torch.tensor([3], dtype=torch.int32), g=1, capacity=3, rule="mass", p=0.5)[1]
    assert counts.item() == 2


def test_a_uniform_mass_over_a_long_prefix_is_summed_exactly():
    n = 131_072
    mass = torch.full((1, 1, 1, n), 1 / n)
    kept = ops.select_kv(mass, torch.tensor([n], dtype=torch.int32), g=1, capacity=n, k=n // 2)[2]
    assert kept.item() == 0.5


def test_strided_mass_and_out_twin():
    buffer = torch.rand(3, 2, 4, 40)
    mass = buffer[::2, :, 1:3, 5:30]
    lengths = torch.tensor([25 * 32, 100], dtype=torch.int32)
    kwargs = {"g": 32, "capacity": 5, "k": 128, "sinks": 4}
    expected = ops.select_kv(mass.contiguous(), lengths, **kwargs)
    assert_bitwise(ops.select_kv(mass, lengths, **kwargs), expected)
    outs = [torch.full_like(tensor, 1) for tensor in expected]
    workspace = torch.empty(ops.select_kv_workspace(2, 2, 2, 25, 5), dtype=torch.uint8)
    ops.select_kv_out(mass, lengths, *outs, workspace, **kwargs)
    assert_bitwise(outs, expected)


def test_no_requests():
    out = ops.select_kv(torch.zeros(2, 0, 3, 8), torch.zeros(0, dtype=torch.int32), g=16, capacity=4, k=32)
    assert [list(tensor.shape) for tensor in out] == [[2, 0, 3, 4], [2, 0, 3], [2, 0, 3], [0], [2, 0, 3]]


# --- CUDA ------------------------------------------------------------------------------------------------------------


def to_cuda(kwargs):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}


def assert_bitwise_to_cpu(actual, expected):
    assert_bitwise([tensor.cpu() for tensor in actual], expected)


@gpu
@settings(max_examples=350, deadline=None)
@given(select_cases())
def test_cuda_equals_its_twin(case):
    mass, lengths, kwargs = case
    actual = ops.select_kv(mass.cuda(), lengths.cuda(), **to_cuda(kwargs))
    assert_bitwise_to_cpu(actual, reference.select_kv(mass, lengths, **kwargs))


# L, B, Hkv, n, g, k, kind
CUDA_CASES = {
    "step_of_7b": (28, 1, 4, 2049, 64, 1024, "random"),
    "step_of_8b": (32, 2, 8, 2049, 64, 1024, "ties"),
    "step_at_g16": (5, 1, 4, 8194, 16, 1024, "random"),
    "broken": (3, 2, 4, 4099, 32, 2048, "broken"),
    "tokens": (1, 1, 4, 131_104, 1, 1024, "random"),
    "tokens_with_ties": (2, 1, 2, 40_000, 1, 512, "ties"),
    "tokens_without_difference": (1, 1, 2, 50_000, 1, 1000, "uniform"),
    "tokens_without_mass": (1, 1, 2, 50_000, 1, 1000, "zero"),
    "many_long_rows": (9, 1, 4, 33_000, 1, 1024, "broken"),
    "many_requests": (2, 40, 3, 130, 16, 512, "random"),
}


@gpu
@pytest.mark.parametrize("rule", ops.SELECT_RULES)
@pytest.mark.parametrize("name", CUDA_CASES)
def test_cuda_equals_the_cpu(name, rule):
    layers, requests, heads, n, g, k, kind = CUDA_CASES[name]
    shape = (layers, requests, heads, n)
    mass = make_mass(shape, kind, 7)
    lengths = torch.randint(n * g // 2, n * g + 1, (requests,), generator=generator(8), dtype=torch.int32)
    kwargs = {"g": g, "capacity": 2 * k // g, "rule": rule, "k": k, "k_min": g, "p": 0.6, "sinks": 4, "recents": 64}
    if rule == "layer":
        kwargs |= make_votes(shape, 5, broken=kind == "broken")
    expected = ops.select_kv(mass, lengths, **kwargs)
    on_gpu, options = (mass.cuda(), lengths.cuda()), to_cuda(kwargs)
    assert_bitwise_to_cpu(ops.select_kv(*on_gpu, **options), expected)
    size = ops.select_kv_workspace(*shape, kwargs["capacity"])
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    for _ in range(3):  # whatever the memory held before
        outs = [torch.empty_like(tensor, device="cuda") for tensor in expected]
        for out in outs:
            out.view(torch.uint8).fill_(255)
        ops.select_kv_out(*on_gpu, *outs, workspace, **options)
        assert_bitwise_to_cpu(outs, expected)


@gpu
def test_cuda_takes_strided_masses_of_any_alignment():
    buffer = torch.rand(3, 2, 4, 5001, generator=generator(3))
    lengths = torch.tensor([4990 * 16, 70_000], dtype=torch.int32)
    kwargs = {"g": 16, "capacity": 70, "k": 1024, "sinks": 4, "recents": 50}
    for start in (0, 1, 2, 3):
        mass, strided = buffer[::2, :, 1:3, start : start + 4990], buffer.cuda()[::2, :, 1:3, start : start + 4990]
        assert not strided.is_contiguous()
        for rule in ("fixed", "joint"):
            expected = ops.select_kv(mass, lengths, rule=rule, **kwargs)
            assert_bitwise_to_cpu(ops.select_kv(strided, lengths.cuda(), rule=rule, **kwargs), expected)


@gpu
@pytest.mark.parametrize("rule", ops.SELECT_RULES)
def test_cuda_graph_follows_new_masses(rule):
    shape = (3, 2, 4, 700)
    kwargs = {"g": 16, "capacity": 90, "rule": rule, "k": 1024, "k_min": 32, "p": 0.5, "sinks": 4, "recents": 64}
    mass, lengths = make_mass(shape, "random", 1).cuda(), torch.tensor([11_200, 4321], dtype=torch.int32).cuda()
    votes = to_cuda(make_votes(shape, 1)) if rule == "layer" else {}
    ops.select_kv(mass, lengths, **kwargs, **votes)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.select_kv(mass, lengths, **kwargs, **votes)
    for seed, kind in enumerate(["ties", "broken", "random"]):
        mass.copy_(make_mass(shape, kind, seed))
        lengths.copy_(lengths.flip(0))
        for name, tensor in make_votes(shape, seed + 2).items():
            if name in votes:
                votes[name].copy_(tensor)
        graph.replay()
        torch.cuda.synchronize()
        on_cpu = {name: tensor.cpu() for name, tensor in votes.items()}
        assert_bitwise_to_cpu(results, ops.select_kv(mass.cpu(), lengths.cpu(), **kwargs, **on_cpu))


@gpu
def test_cuda_refuses_tensors_of_two_devices():
    with pytest.raises(RuntimeError, match="select_kv: prefix_lens must be on cuda:0 like the first argument, got cpu"):
        ops.select_kv(MASS.cuda(), LENGTHS, g=16, capacity=4, k=64)


# --- errors ----------------------------------------------------------------------------------------------------------

MASS = torch.rand(2, 2, 2, 8)
LENGTHS = torch.tensor([128, 100], dtype=torch.int32)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("g must be one of 1, 16, 32, 64, got 8", {"g": 8}),
        (r"capacity must be in \[1, 4194304\], got 0", {"capacity": 0}),
        (r"capacity must be in \[1, 4194304\], got 4194305", {"capacity": 2**22 + 1}),
        ("rule must be one of fixed, layer, mass, joint, got 'topk'", {"rule": "topk"}),
        ("k must be a multiple of g = 16, got 40", {"k": 40}),
        ("k must be in .*, got -16", {"k": -16}),
        ("k_min must be a multiple of g = 16, got 8", {"k_min": 8}),
        ("sinks must be in .*, got -1", {"sinks": -1}),
        ("recents must be in .*, got -1", {"recents": -1}),
        (r"p must be in \(0, 1\] with rule \"mass\", got 0.0", {"rule": "mass"}),
        (r"p must be in \(0, 1\] with rule \"mass\", got nan", {"rule": "mass", "p": math.nan}),
        (r"p must be in \(0, 1\] with rule \"mass\", got 1.5", {"rule": "mass", "p": 1.5}),
    ],
)
def test_plain_arguments_are_named(message, change):
    kwargs = {"g": 16, "capacity": 4, "k": 64, **change}
    with pytest.raises(ValueError, match=f"select_kv: {message}"):
        ops.select_kv(MASS, LENGTHS, **kwargs)
    # The operator itself refuses the same, for callers that don't come through Python.
    with pytest.raises(RuntimeError, match=f"select_kv: {message.split(' must')[0]} must"):
        torch.ops.mage.select_kv(MASS, LENGTHS, **kwargs)


@pytest.mark.parametrize(
    ("message", "mass", "lengths", "extra"),
    [
        ("mass must be a tensor of rank 4", MASS[0], LENGTHS, {}),
        ("mass must be float32, got float64", MASS.double(), LENGTHS, {}),
        ("mass must be of last stride 1, got 2", torch.rand(2, 2, 2, 16)[..., ::2], LENGTHS, {}),
        ("mass must have 1 to 4194304 units, got 0", torch.rand(2, 2, 2, 0), LENGTHS, {}),
        ("prefix_lens must be int32, got int64", MASS, LENGTHS.long(), {}),
        (r"prefix_lens must be of shape \[B\] = \[2\], got \[3\]", MASS, torch.zeros(3, dtype=torch.int32), {}),
        ('votes must be given with rule "layer", got None', MASS, LENGTHS, {"rule": "layer"}),
        ("votes must be int32, got float32", MASS, LENGTHS, {"votes": torch.zeros(2, 2, 2, 8)}),
        (
            r"votes must be of shape \[L, B, Hkv, n\]",
            MASS,
            LENGTHS,
            {"votes": torch.zeros(2, 2, 2, 7, dtype=torch.int32)},
        ),
        (
            r"union_size must be of shape \[L, B, Hkv\]",
            MASS,
            LENGTHS,
            {"union_size": torch.zeros(2, 2, dtype=torch.int32)},
        ),
        ("coverage must be float32, got float64", MASS, LENGTHS, {"coverage": torch.zeros(2, 2, 2).double()}),
    ],
)
def test_tensors_are_named(message, mass, lengths, extra):
    kwargs = {"g": 16, "capacity": 4, "k": 64}
    if extra:
        kwargs["rule"] = "layer"
        if "rule" not in extra:
            kwargs |= make_votes(MASS.shape, 1)
        kwargs |= extra
    with pytest.raises(RuntimeError, match=f"select_kv: {message}"):
        ops.select_kv(mass, lengths, **kwargs)


def test_out_twin_checks_before_it_writes():
    kwargs = {"g": 16, "capacity": 4, "k": 64}
    good = [torch.full_like(tensor, 1) for tensor in ops.select_kv(MASS, LENGTHS, **kwargs)]
    workspace = torch.empty(0, dtype=torch.uint8)
    for position, name in enumerate(NAMES):
        outs = [tensor.clone() for tensor in good]
        outs[position] = outs[position].double()
        with pytest.raises(RuntimeError, match=f"select_kv: {name} must be .*, got float64"):
            ops.select_kv_out(MASS, LENGTHS, *outs, workspace, **kwargs)
        outs[position] = good[position][..., :1]
        with pytest.raises(RuntimeError, match=f"select_kv: {name} must be of shape"):
            ops.select_kv_out(MASS, LENGTHS, *outs, workspace, **kwargs)
        assert all((tensor == 1).all() for tensor in outs)
    with pytest.raises(RuntimeError, match="select_kv: workspace must be uint8, got float32"):
        ops.select_kv_out(MASS, LENGTHS, *good, torch.empty(0), **kwargs)


# --- debug switch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def debug():
    before = ops.set_debug(True)
    yield
    ops.set_debug(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"prefix_lens\[1\] must be in \[0, 128\], got 129", {"lengths": torch.tensor([0, 129], dtype=torch.int32)}),
        (r"prefix_lens\[0\] must be in \[0, 128\], got -1", {"lengths": torch.tensor([-1, 129], dtype=torch.int32)}),
        ("mass must have values >= 0 that are not NaN, got nan at element 3", {"nan": 3}),
        (r"union_size\[0\] must be in \[0, 8\], got 9", {"union_size": torch.full((2, 2, 2), 9, dtype=torch.int32)}),
        ("coverage must have values >= 0 .*, got nan at element 0", {"coverage": torch.full((2, 2, 2), math.nan)}),
    ],
)
def test_debug_names_the_first_bad_value(debug, message, change, device):
    mass, lengths = MASS.to(device, copy=True), change.get("lengths", LENGTHS).to(device)
    kwargs = {"g": 16, "capacity": 4, "k": 64}
    if "nan" in change:
        mass.view(-1)[change["nan"] :] = math.nan
    if "union_size" in change or "coverage" in change:
        votes = make_votes(MASS.shape, 1) | change
        kwargs |= {name: tensor.to(device) for name, tensor in votes.items()} | {"rule": "layer"}
    with pytest.raises(RuntimeError, match=f"select_kv: {message}"):
        ops.select_kv(mass, lengths, **kwargs)
    ops.set_debug(False)
    ops.select_kv(mass, lengths, **kwargs)  # clamped or ranked last without the switch
    ops.set_debug(True)


def test_set_debug_returns_the_state_before():
    before = ops.set_debug(True)
    assert ops.set_debug(False) is True
    assert ops.set_debug(before) is False
    with pytest.raises(TypeError, match="set_debug: on must be a bool, got 1"):
        ops.set_debug(1)
