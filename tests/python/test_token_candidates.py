"""Lists of tokens in two levels against lists written out in Python and against the masses of all tokens.

Run: pytest tests/python/test_token_candidates.py
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ext import ops
from mage_ext.paged_forward import Emission, PagedForward
from mage_ext.selection import CANDIDATE_UNIT, SelectionConfig, select
from mage_ext.testing.cases import ATTENTION_CASES, CUDA_ATTENTION_CASES
from mage_ext.testing.compare import assert_mass_close, assert_same_bits
from mage_ext.token_candidates import Candidates, candidate_units, select_tokens, whole_lens

gpu = pytest.mark.gpu
UNIT = CANDIDATE_UNIT
N = 20 * UNIT - 5  # tokens; the last unit is not whole


def of_units(masses):
    """[..., n] of masses of tokens [..., N]."""
    return torch.nn.functional.pad(masses, (0, -masses.shape[-1] % UNIT)).unflatten(-1, (-1, UNIT)).sum(-1)


def of_candidates(masses, units):
    """Masses [L, B, Hkv, C * u] of the candidates' tokens."""
    tokens = (units.long()[..., None] * UNIT + torch.arange(UNIT, device=units.device)).flatten(-2)
    padded = torch.nn.functional.pad(masses, (0, -masses.shape[-1] % UNIT))
    return torch.where(tokens >= 0, padded.gather(-1, tokens.clamp(min=0)), 0.0)


def make_candidates(masses, prefix_lens, config):
    """What a forward would see of these masses [L, B, Hkv, N]."""
    unit_mass = of_units(masses)
    units = torch.stack([candidate_units(layer, whole_lens(prefix_lens), config) for layer in unit_mass])
    return Candidates(units, of_candidates(masses, units), unit_mass)


def make_masses(seed, levels, shape=(2, 5, 2, N)):
    """Masses that all sum to at most 1, and lengths, of which the first are 0 and N. With levels, many masses and sums
    are equal, to the last bit."""
    g = torch.Generator().manual_seed(seed)
    if levels:
        masses = torch.randint(0, levels, shape, generator=g) / 4096.0
    else:
        masses = torch.softmax(torch.randn(shape, generator=g) * 3, -1)
    lens = torch.randint(0, N + 1, shape[1:2], generator=g, dtype=torch.int32)
    lens[:2] = torch.tensor([0, N])
    lens[2] = lens[2] // UNIT * UNIT
    return masses, lens


@st.composite
def configs(draw):
    k = draw(st.sampled_from([0, 1, 10, 32, 77, 160]))
    least = -(-k // UNIT) + 2
    return SelectionConfig(
        rule=draw(st.sampled_from(["fixed", "joint"])),
        k=k,
        g=1,
        sinks=draw(st.sampled_from([0, 4, 33, 400])),
        recents=draw(st.sampled_from([0, 1, 10, 34, 500])),
        capacity=draw(st.sampled_from([None, None, 8])),
        candidates=UNIT * (least + draw(st.sampled_from([0, 1, 5, 50]))),
    )


def plain_units(unit_mass, prefix_len, config):
    """Candidates of one head, written out."""
    sinks = min(config.sinks, config.k)
    recents = min(config.recents, config.k - sinks)
    last = -(-prefix_len // UNIT)
    order = [unit for unit in range(last) if unit * UNIT < sinks]
    order += [unit for unit in reversed(range(last)) if (unit + 1) * UNIT > last * UNIT - recents - UNIT + 1]
    order += sorted(range(last), key=lambda unit: (-unit_mass[unit], unit))
    return sorted(list(dict.fromkeys(order))[: config.candidates // UNIT])


def plain_lists(masses, units, prefix_len, config):
    """Lists of all heads of a layer and request out of their candidates, written out. masses: per head a list."""
    inside = [[t for t in range(prefix_len) if t // UNIT in chosen] for chosen in units]
    sinks = range(min(prefix_len, config.sinks))
    recents = [t for t in range(prefix_len - 1, max(prefix_len - config.recents, 0) - 1, -1) if t not in sinks]
    forced = [*sinks, *recents][: config.k]
    assert all(set(forced) <= set(tokens) for tokens in inside)
    # Ties go to the lowest place among the candidates, then to the lowest head.
    free = [(-masses[h][t], i, h, t) for h, tokens in enumerate(inside) for i, t in enumerate(tokens)]
    free = [each for each in sorted(free) if each[-1] not in forced]
    room = config.k - len(forced)
    if config.rule == "joint":
        free = free[: room * len(units)]
    lists = [[*forced, *(t for *_, head, t in free if head == h)] for h in range(len(units))]
    if config.rule == "fixed":
        lists = [one[: config.k] for one in lists]
    capacity = math.inf if config.capacity is None else config.capacity
    return [sorted(one[: min(capacity, len(one))]) for one in lists], [len(one) > capacity for one in lists]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0, 3, 200]), configs())
def test_lists_are_those_written_out(seed, levels, config):
    masses, lens = make_masses(seed, levels)
    candidates = make_candidates(masses, lens, config)
    selection, _ = select_tokens(candidates, lens, config)
    selection.validate()
    assert selection.g == 1 and torch.equal(selection.tail_start, lens)
    for l, b in torch.cartesian_prod(torch.arange(masses.shape[0]), torch.arange(len(lens))).tolist():
        prefix_len, heads = int(lens[b]), masses[l, b].tolist()
        units = [plain_units(each, prefix_len, config) for each in candidates.unit_mass[l, b].tolist()]
        assert [[u for u in row if u >= 0] for row in candidates.units[l, b].tolist()] == units
        lists, cut = plain_lists(heads, units, prefix_len, config)
        assert selection.overflow[l, b].tolist() == cut
        for h, expected in enumerate(lists):
            assert selection.units(b, l, h) == expected
            attended = [*expected, *range(prefix_len, N)]
            assert selection.kept_mass[l, b, h] == pytest.approx(sum(heads[h][t] for t in attended), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0, 3, 200]), configs())
def test_proven_lists_are_those_of_all_tokens(seed, levels, config):
    """Peaks make some lists proven; where every unit is a candidate, all are."""
    masses, lens = make_masses(seed, levels)
    masses[0, :, :, ::37] *= 30
    masses /= masses.sum(-1, keepdim=True).clamp(min=1)
    selection, proven = select_tokens(make_candidates(masses, lens, config), lens, config)
    whole = select(masses, lens, dataclasses.replace(config, candidates=None))
    width = max(whole.capacity, selection.capacity)
    lists = [torch.nn.functional.pad(s.indices, (0, width - s.capacity), value=-1) for s in (selection, whole)]
    same = (lists[0] == lists[1]).all(-1)
    assert (same | ~proven).all()
    assert (selection.overflow == whole.overflow)[proven].all()
    torch.testing.assert_close(selection.kept_mass[proven], whole.kept_mass[proven], atol=1e-5, rtol=1e-5)
    fits = whole_lens(lens) <= config.candidates
    assert proven[:, fits].all() and fits.any()
    if config.rule == "fixed":
        assert (selection.counts == whole.counts).all()
    else:
        assert (selection.counts.sum(-1) == whole.counts.sum(-1)).all() or selection.overflow.any()


@pytest.mark.parametrize("rule", ["fixed", "joint"])
def test_peaks_are_proven_and_even_masses_are_not(rule):
    config = SelectionConfig(rule=rule, k=16, g=1, sinks=2, recents=3, candidates=5 * UNIT)
    lens = torch.tensor([N], dtype=torch.int32)
    even = torch.full((1, 1, 2, N), 1e-4)
    selection, proven = select_tokens(make_candidates(even, lens, config), lens, config)
    assert not proven.any() and selection.units(0, 0, 0) == [*range(13), N - 3, N - 2, N - 1]
    peaks = even.clone()
    peaks[..., 100:111] = 0.05
    selection, proven = select_tokens(make_candidates(peaks, lens, config), lens, config)
    assert proven.all() and selection.units(0, 0, 1) == [0, 1, *range(100, 111), N - 3, N - 2, N - 1]
    # The other head has too little in its peaks: alone it is not proven, nor is with rule "joint" the first.
    peaks[:, :, 1, 100:111] = UNIT / 2 * 1e-4
    _, proven = select_tokens(make_candidates(peaks, lens, config), lens, config)
    assert proven.tolist() == [[[rule == "fixed", False]]]
    # Units that are no candidates have as much as the least token.
    peaks = even.clone()
    peaks[..., 100:111] = 33 * 1e-4
    peaks[..., 7 * UNIT : 10 * UNIT] = 33 / UNIT * 1e-4
    assert not select_tokens(make_candidates(peaks, lens, config), lens, config)[1].any()


def test_a_loss_is_no_proof():
    """A token that stands alone in a light unit is lost, and the result says so."""
    config = SelectionConfig(k=4, g=1, candidates=3 * UNIT)
    masses = torch.full((1, 1, 1, N), 1e-3)
    masses[..., : 4 * UNIT] = 2e-3
    masses[..., 9 * UNIT : 10 * UNIT] = 0
    masses[..., 9 * UNIT] = 1.9e-3 * UNIT
    lens = torch.tensor([N - 40], dtype=torch.int32)
    selection, proven = select_tokens(make_candidates(masses, lens, config), lens, config)
    assert selection.units(0, 0, 0) == [0, 1, 2, 3] and not proven.any()
    whole = select(masses, lens, dataclasses.replace(config, candidates=None))
    assert 9 * UNIT in whole.units(0, 0, 0)


def test_a_length_of_0_lists_nothing_and_attends_everything():
    """Whatever length the first level had: so the loop treats requests that do not select."""
    config = SelectionConfig(k=40, g=1, candidates=6 * UNIT)
    masses, lens = make_masses(3, 0)
    candidates = make_candidates(masses, lens, config)
    selection, _ = select_tokens(candidates, torch.where(lens == N, 0, lens), config)
    assert not selection.counts[:, 1].any() and (selection.indices[:, 1] == -1).all() and selection.tail_start[1] == 0
    torch.testing.assert_close(selection.kept_mass[:, 1], masses[:, 1].sum(-1))
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(selection.indices[:, others], select_tokens(candidates, lens, config)[0].indices[:, others])


def test_names_what_is_wrong():
    config = SelectionConfig(k=40, g=1, candidates=6 * UNIT)
    masses, lens = make_masses(3, 0)
    candidates = make_candidates(masses, lens, config)
    with pytest.raises(TypeError, match="select_tokens: candidates must be a Candidates, got Tensor"):
        select_tokens(masses, lens, config)
    with pytest.raises(TypeError, match="select_tokens: prefix_lens must be a tensor, got list"):
        select_tokens(candidates, [0], config)
    with pytest.raises(TypeError, match="select_tokens: config must be a SelectionConfig, got None"):
        select_tokens(candidates, lens, None)
    with pytest.raises(ValueError, match="select_tokens: config must have candidates, got None"):
        select_tokens(candidates, lens, SelectionConfig(g=1))
    with pytest.raises(ValueError, match="candidate_units: config must have candidates, got None"):
        candidate_units(masses[0], lens, SelectionConfig(g=1))
    with pytest.raises(TypeError, match="candidate_units: config must be a SelectionConfig, got None"):
        candidate_units(masses[0], lens, None)
    with pytest.raises(TypeError, match=r"select_tokens: prefix_lens must be int32, got torch\.int64"):
        select_tokens(candidates, lens.long(), config)
    for name, value, told in (
        ("units", None, "units must be a tensor, got None"),
        ("units", candidates.units.long(), "units must be int32, got torch.int64"),
        ("units", candidates.units[0], "units must have 4 dimensions, got shape "),
        ("token_mass", candidates.token_mass[..., 1:], "token_mass must have shape .*, got "),
        ("unit_mass", candidates.unit_mass[:, :, :1], "unit_mass must have shape .*, got "),
    ):
        with pytest.raises((TypeError, ValueError), match=f"select_tokens: candidates.{told}"):
            select_tokens(dataclasses.replace(candidates, **{name: value}), lens, config)
    with pytest.raises(ValueError, match=f"select: config must have no candidates, .*, got {6 * UNIT}"):
        select(masses, lens, config)


# --- what a forward emits --------------------------------------------------------------------------------------------

EMISSIONS = {
    "plain": {},
    "max": {"score": "max"},
    "prefix": {"norm": "prefix"},
    "max_prefix_open": {"score": "max", "norm": "prefix", "masked": True},
    "joint_open": {"rule": "joint", "masked": True},
}


def emit(case, config, device="cpu", masked=False):
    """An Emission of two forwards in place of two layers, its lengths, and the masses of all tokens by token_mass."""
    emission, masses = None, []
    for seed in range(2):
        tensors = case.tensors(seed, device=device)
        lens = torch.tensor([max(0, n - case.q_len) for n in case.lens], dtype=torch.int32, device=device)
        if emission is None:
            row_mask = torch.arange(case.q_len, device=device).expand(len(case.lens), -1) % 3 == 1 if masked else None
            emission = Emission(config, row_mask, lens)
        q, k_cache, v_cache, table, seq_lens = tensors.values()
        kv_lens = case.options["kv_lens"]
        kv_lens = kv_lens if kv_lens is None else kv_lens.to(device)
        forward = PagedForward(None, table, case.longest, [], seq_lens, kv_lens=kv_lens)
        out = forward.emit(emission, q, k_cache, v_cache, seq_lens)
        options = {"max_seq_len": case.longest, "kv_lens": kv_lens}
        expected, lse = ops.block_attention(q, k_cache, v_cache, table, seq_lens, **options)
        torch.testing.assert_close(out, expected)
        options |= {"score": config.score, "norm": config.norm, "row_mask": emission.row_mask}
        options["prefix_lens"] = lens if config.norm == "prefix" else None
        masses.append(ops.token_mass(q, k_cache, table, seq_lens, lse, **options))
    return emission, lens, torch.stack(masses)


def check_emission(case, device, name):
    options = dict(EMISSIONS[name])
    masked = options.pop("masked", False)
    config = SelectionConfig(k=24, g=1, sinks=2, recents=4, candidates=4 * UNIT, **options)
    emission, lens, masses = emit(case, config, device, masked)
    candidates = emission.candidates()
    tokens = of_candidates(masses, candidates.units)
    # A forward's own lse may differ from the other's in its last bits.
    assert_mass_close(candidates.token_mass, tokens)
    selection, proven = select_tokens(dataclasses.replace(candidates, token_mass=tokens), lens, config)
    selection.validate()
    whole = select(masses, lens, dataclasses.replace(config, candidates=None))
    width = max(whole.capacity, selection.capacity)
    lists = [torch.nn.functional.pad(s.indices, (0, width - s.capacity), value=-1) for s in (selection, whole)]
    assert (lists[0] == lists[1]).all(-1)[proven].all()
    assert (selection.kept_mass <= whole.kept_mass + 1e-3).all() or config.rule == "joint"
    # A token's mass is at most its unit's: what a proof rests on.
    by_unit = torch.nn.functional.pad(masses, (0, -masses.shape[-1] % UNIT)).unflatten(-1, (-1, UNIT)).amax(-1)
    assert (by_unit <= candidates.unit_mass * (1 + 2**-9) + 1e-30).all()
    # With room for every unit the lists are those of all tokens.
    wide = dataclasses.replace(config, candidates=(case.longest // UNIT + 4) * UNIT)
    emission, lens, masses = emit(case, wide, device, masked)
    candidates = emission.candidates()
    tokens = of_candidates(masses, candidates.units)
    selection, proven = select_tokens(dataclasses.replace(candidates, token_mass=tokens), lens, wide)
    whole = select(masses, lens, dataclasses.replace(config, candidates=None))
    assert proven.all() and torch.equal(selection.counts, whole.counts)
    width = max(whole.capacity, selection.capacity)
    lists = [torch.nn.functional.pad(s.indices, (0, width - s.capacity), value=-1) for s in (selection, whole)]
    assert torch.equal(*lists)
    return candidates, tokens


@pytest.mark.parametrize("name", EMISSIONS)
@pytest.mark.parametrize("case", ["block_of_7b", "ragged", "page_of_256", "room_to_spare"])
def test_what_a_forward_emits(case, name):
    check_emission(ATTENTION_CASES[case], "cpu", name)


@gpu
@pytest.mark.parametrize("name", EMISSIONS)
@pytest.mark.parametrize("case", ["block_of_7b", "ragged", "page_of_256", "room_to_spare"])
def test_cuda_what_a_forward_emits(case, name):
    check_emission(CUDA_ATTENTION_CASES[case], "cuda", name)


@gpu
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("rule", ["fixed", "joint"])
def test_cuda_lists_are_those_of_the_cpu(rule, levels):
    """Bit for bit, but for kept_mass, whose last part is a sum of torch."""
    config = SelectionConfig(rule=rule, k=77, g=1, sinks=4, recents=34, candidates=8 * UNIT)
    for seed in range(4):
        masses, lens = make_masses(seed, levels)
        masses[0, :, :, ::37] *= 30
        masses /= masses.sum(-1, keepdim=True).clamp(min=1)
        on_cpu = make_candidates(masses, lens, config)
        on_gpu = make_candidates(masses.cuda(), lens.cuda(), config)
        assert torch.equal(on_gpu.units.cpu(), on_cpu.units)
        on_gpu = Candidates(**{f.name: getattr(on_cpu, f.name).cuda() for f in dataclasses.fields(Candidates)})
        (expected, proven), (selection, proven_too) = (
            select_tokens(on_cpu, lens, config),
            select_tokens(on_gpu, lens.cuda(), config),
        )
        for name in ("indices", "counts", "tail_start", "overflow"):
            assert torch.equal(getattr(selection, name).cpu(), getattr(expected, name)), name
        assert torch.equal(proven_too.cpu(), proven)
        torch.testing.assert_close(selection.kept_mass.cpu(), expected.kept_mass)


@gpu
def test_cuda_graph_follows_new_lengths():
    """Both levels in one graph, which waits for nothing."""
    config = SelectionConfig(k=24, g=1, sinks=2, recents=4, candidates=4 * UNIT)
    masses, lens = (x.cuda() for x in make_masses(0, 0))
    make_candidates(masses, lens, config)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, proven = select_tokens(make_candidates(masses, lens, config), lens, config)
    for seed in range(1, 4):
        for tensor, fresh in zip((masses, lens), make_masses(seed, 0), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        expected, proven_too = select_tokens(make_candidates(masses, lens, config), lens, config)
        assert torch.equal(captured.indices, expected.indices) and torch.equal(proven, proven_too)
        assert_same_bits(captured.kept_mass, expected.kept_mass)
