"""row_votes against its slow twin, its promises one by one, and what it refuses.

Run: pytest tests/python/test_row_votes.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ext import ops, reference

NAMES = ("votes", "union_size", "coverage")
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_row_mass(shape, kind, seed):
    """Log-shares [B, Hkv, n, R] that sum to 1 over n, of one kind."""
    g = generator(seed)
    logits = torch.randn(shape, generator=g) * (0 if kind == "uniform" else 4)
    if kind == "ties":
        logits = logits.round()
    if kind in ("sparse", "broken"):
        logits[torch.rand(shape, generator=g) < 0.4] = -math.inf
        logits[:, :, 0] = 0.0
    log_shares = torch.log_softmax(logits, 2)
    if kind == "broken":
        for value in (math.nan, 0.0, -0.0, 1.0):
            log_shares[torch.rand(shape, generator=g) < 0.05] = value
    return log_shares


@st.composite
def vote_cases(draw, kinds=("random", "ties", "uniform", "sparse", "broken")):
    g = draw(st.sampled_from(ops.GRANULARITIES))
    requests, heads, n = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 33, 100]))
    positions, group = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7]))
    seed = draw(st.integers(0, 2**20))
    row_mass = make_row_mass((requests, heads, n, positions * group), draw(st.sampled_from(kinds)), seed)
    lengths = torch.randint(0, n * g + 1, (requests,), generator=generator(seed + 1), dtype=torch.int32)
    keep = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    row_mask = None if keep is None else torch.rand(requests, positions, generator=generator(seed + 2)) < keep
    return row_mass, lengths, {"k": g * draw(st.integers(0, n + 1)), "g": g, "row_mask": row_mask}


def assert_close(actual, expected):
    """Votes and union are exact. Coverage: float32 sums of at most 256 terms, so a relative error of at most 2^-16."""
    assert torch.equal(actual[0], expected[0]) and actual[0].dtype == torch.int32
    assert torch.equal(actual[1], expected[1]) and actual[1].dtype == torch.int32
    torch.testing.assert_close(actual[2], expected[2], rtol=2**-16, atol=0)


@settings(max_examples=250, deadline=None)
@given(vote_cases())
def test_equals_its_twin(case):
    row_mass, lengths, kwargs = case
    assert_close(ops.row_votes(row_mass, lengths, **kwargs), reference.row_votes(row_mass, lengths, **kwargs))


@settings(max_examples=40, deadline=None)
@given(vote_cases(), st.integers(-(2**31), 2**31 - 1))
def test_lengths_are_clamped(case, length):
    row_mass, lengths, kwargs = case
    lengths[0] = length
    clamped = lengths.clamp(0, row_mass.shape[2] * kwargs["g"])
    for actual, expected in zip(
        ops.row_votes(row_mass, lengths, **kwargs), ops.row_votes(row_mass, clamped, **kwargs), strict=True
    ):
        assert torch.equal(actual, expected)


@settings(max_examples=150, deadline=None)
@given(vote_cases(kinds=("random", "ties", "uniform", "sparse")))
def test_promises(case):
    row_mass, lengths, kwargs = case
    _, heads, n, rows = row_mass.shape
    g, row_mask = kwargs["g"], kwargs["row_mask"]
    votes, union_size, coverage = ops.row_votes(row_mass, lengths, **kwargs)
    kept = torch.full_like(lengths, rows) if row_mask is None else row_mask.sum(-1) * (rows // row_mask.shape[1])
    eligible = lengths // g
    assert (votes <= kept[:, None, None]).all() and (votes >= 0).all()
    assert (votes[(torch.arange(n) >= eligible[:, None, None]).expand_as(votes)] == 0).all()
    assert torch.equal(union_size, (votes > 0).sum(-1, dtype=torch.int32))
    # Every kept row casts k / g votes, or as many as it has units with a share.
    most = kept[:, None] * torch.minimum(torch.tensor(kwargs["k"] // g), eligible)[:, None]
    assert (votes.sum(-1) <= most).all()
    if not row_mass.isinf().any():
        assert torch.equal(votes.sum(-1), most.expand(-1, heads))
    assert ((coverage >= 0) & (coverage <= 1 + 2**-20)).all()
    assert (coverage[union_size == 0] == 0).all()
    more = ops.row_votes(row_mass, lengths, **{**kwargs, "k": kwargs["k"] + g})
    assert (more[0] >= votes).all() and (more[2] >= coverage - 2**-20).all()


def test_by_hand():
    shares = torch.tensor([[0.5, 0.1], [0.1, 0.2], [0.1, 0.4], [0.2, 0.1], [0.1, 0.2]])
    row_mass = shares.log().view(1, 1, 5, 2)
    lengths = torch.tensor([4 * 16 + 5], dtype=torch.int32)  # units 0..3 can be chosen
    votes, union_size, coverage = ops.row_votes(row_mass, lengths, k=32, g=16)
    assert votes.flatten().tolist() == [1, 1, 1, 1, 0]  # row 0: 0 and 3; row 1: 2 and 1
    assert union_size.item() == 4 and coverage.item() == pytest.approx((0.9 + 0.8) / 2)
    votes, union_size, coverage = ops.row_votes(row_mass, lengths, k=16, g=16, row_mask=torch.tensor([[True, False]]))
    assert votes.flatten().tolist() == [1, 0, 0, 0, 0]
    assert coverage.item() == pytest.approx(0.5)


def test_rows_of_a_position_are_masked_together():
    row_mass = make_row_mass((1, 1, 10, 6), "random", 0)  # Q = 2, G = 3: rows 0..2 are position 0
    lengths = torch.tensor([160], dtype=torch.int32)
    masked = ops.row_votes(row_mass, lengths, k=32, g=16, row_mask=torch.tensor([[True, False]]))
    alone = ops.row_votes(row_mass[..., :3].contiguous(), lengths, k=32, g=16)
    for actual, expected in zip(masked, alone, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    row_mass = make_row_mass((2, 3, 700, 96), "ties", 5)
    lengths = torch.tensor([700 * 16, 5000], dtype=torch.int32)
    try:
        torch.ops.mage.set_num_threads(1)
        one = ops.row_votes(row_mass, lengths, k=512, g=16)
        torch.ops.mage.set_num_threads(threads)
        for actual, expected in zip(ops.row_votes(row_mass, lengths, k=512, g=16), one, strict=True):
            assert torch.equal(actual, expected)
    finally:
        torch.ops.mage.set_num_threads(0)


def test_workspace_follows_the_shapes():
    assert ops.row_votes_workspace(1, 4, 2048, 224) == 8 * 4 * (1 + 224 * (1 + 64))
    assert ops.row_votes_workspace(3, 2, 33, 5) == 8 * 6 * (1 + 5 * (1 + 2))


def test_out_twin_and_no_requests():
    row_mass = make_row_mass((2, 3, 20, 12), "random", 1)
    lengths = torch.tensor([320, 100], dtype=torch.int32)
    expected = ops.row_votes(row_mass, lengths, k=64, g=16)
    outs = [torch.full_like(tensor, 7) for tensor in expected]
    workspace = torch.empty(ops.row_votes_workspace(2, 3, 20, 12), dtype=torch.uint8)
    ops.row_votes_out(row_mass, lengths, *outs, workspace, k=64, g=16)
    for actual, wanted in zip(outs, expected, strict=True):
        assert torch.equal(actual, wanted)
    empty = ops.row_votes(row_mass[:0], lengths[:0], k=64, g=16)
    assert [list(tensor.shape) for tensor in empty] == [[0, 3, 20], [0, 3], [0, 3]]


ROW_MASS = make_row_mass((2, 2, 8, 6), "random", 3)
LENGTHS = torch.tensor([128, 100], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "row_mass", "lengths", "kwargs"),
    [
        (ValueError, "g must be one of 1, 16, 32, 64, got 0", ROW_MASS, LENGTHS, {"g": 0}),
        (ValueError, "k must be a multiple of g = 16, got 8", ROW_MASS, LENGTHS, {"k": 8}),
        (ValueError, "k must be in .*, got -16", ROW_MASS, LENGTHS, {"k": -16}),
        (RuntimeError, "row_mass must be a tensor of rank 4", ROW_MASS[0], LENGTHS, {}),
        (RuntimeError, "row_mass must be float32, got bfloat16", ROW_MASS.bfloat16(), LENGTHS, {}),
        (RuntimeError, "row_mass must be contiguous", ROW_MASS.transpose(0, 1), LENGTHS, {}),
        (RuntimeError, "row_mass must have 1 to 1024 rows, got 1025", torch.zeros(2, 1, 2, 1025), LENGTHS, {}),
        (RuntimeError, "row_mass must have 1 to 1024 rows, got 0", torch.zeros(2, 1, 2, 0), LENGTHS, {}),
        (RuntimeError, "row_mass must have at least one head and unit", torch.zeros(2, 1, 0, 4), LENGTHS, {}),
        (RuntimeError, "prefix_lens must be int32, got float32", ROW_MASS, LENGTHS.float(), {}),
        (RuntimeError, r"prefix_lens must be of shape \[B\] = \[2\], got \[1\]", ROW_MASS, LENGTHS[:1], {}),
        (RuntimeError, "row_mask must be bool, got int32", ROW_MASS, LENGTHS, {"row_mask": torch.ones(2, 3).int()}),
        (RuntimeError, r"row_mask must be of shape \[B, Q\]", ROW_MASS, LENGTHS, {"row_mask": torch.ones(1, 3).bool()}),
        (
            RuntimeError,
            "row_mask must have Q positions that divide",
            ROW_MASS,
            LENGTHS,
            {"row_mask": torch.ones(2, 4).bool()},
        ),
    ],
)
def test_bad_arguments_are_named(error, message, row_mass, lengths, kwargs):
    with pytest.raises(error, match=f"row_votes: {message}"):
        ops.row_votes(row_mass, lengths, **{"k": 32, "g": 16, **kwargs})


@pytest.mark.parametrize("device", DEVICES)
def test_debug_names_the_first_bad_value(device):
    row_mass, lengths = ROW_MASS.to(device), LENGTHS.to(device)
    broken = row_mass.clone()
    broken[0, 1, 2, 3] = math.nan
    before = ops.set_debug(True)
    try:
        ops.row_votes(row_mass, lengths, k=32, g=16)
        with pytest.raises(RuntimeError, match=r"row_votes: row_mass must have values .*, got nan at element 63"):
            ops.row_votes(broken, lengths, k=32, g=16)
        with pytest.raises(RuntimeError, match=r"row_votes: prefix_lens\[1\] must be in \[0, 128\], got 129"):
            ops.row_votes(row_mass, torch.tensor([128, 129], dtype=torch.int32, device=device), k=32, g=16)
    finally:
        ops.set_debug(before)


# --- CUDA -----------------------------------------------------------------------------------------------------------


def to_cuda(row_mass, lengths, kwargs):
    row_mask = kwargs.get("row_mask")
    return row_mass.cuda(), lengths.cuda(), {**kwargs, "row_mask": None if row_mask is None else row_mask.cuda()}


def assert_close_to_cpu(actual, expected):
    assert_close([tensor.cpu() for tensor in actual], expected)


@gpu
@settings(max_examples=150, deadline=None)
@given(vote_cases())
def test_cuda_equals_the_twin(case):
    row_mass, lengths, kwargs = to_cuda(*case)
    actual = ops.row_votes(row_mass, lengths, **kwargs)
    assert_close_to_cpu(actual, reference.row_votes(case[0], case[1], **case[2]))


# B, Hkv, n, R, g, k, kind
CUDA_CASES = {
    "block_of_7b": (1, 4, 2048, 224, 64, 4096, "random"),
    "large_budget": (1, 4, 2048, 224, 64, 16384, "random"),
    "small_budget": (1, 4, 2048, 224, 64, 1024, "broken"),
    "block_of_7b_with_itself": (1, 4, 2049, 224, 64, 1024, "random"),
    "block_of_8b": (1, 8, 2049, 128, 64, 1024, "random"),
    "most_held": (2, 1, 2176, 256, 16, 1024, "ties"),
    "no_difference": (1, 2, 2048, 96, 16, 2048, "uniform"),
    "ties": (2, 2, 1777, 65, 16, 2048, "ties"),
    "longer_than_held": (2, 2, 3001, 96, 16, 3200, "random"),
    "longer_with_ties": (1, 1, 2049, 96, 1, 700, "ties"),
    "long": (1, 1, 40000, 32, 1, 3000, "sparse"),
    "most_rows": (1, 2, 300, 1024, 32, 960, "random"),
}


@gpu
@pytest.mark.parametrize("name", CUDA_CASES)
def test_cuda_agrees_with_the_cpu(name):
    requests, heads, n, rows, g, k, kind = CUDA_CASES[name]
    row_mass = make_row_mass((requests, heads, n, rows), kind, 7)
    lengths = torch.randint(n * g // 2, n * g + 1, (requests,), generator=generator(8), dtype=torch.int32)
    expected = ops.row_votes(row_mass, lengths, k=k, g=g)
    on_gpu = row_mass.cuda(), lengths.cuda()
    actual = ops.row_votes(*on_gpu, k=k, g=g)
    assert_close_to_cpu(actual, expected)
    workspace = torch.full((ops.row_votes_workspace(requests, heads, n, rows),), 255, dtype=torch.uint8, device="cuda")
    for _ in range(3):  # bit for bit, and whatever the memory held before
        outs = [tensor.view(torch.uint8).fill_(255).view(tensor.dtype) for tensor in map(torch.empty_like, actual)]
        ops.row_votes_out(*on_gpu, *outs, workspace.fill_(255), k=k, g=g)
        assert all(torch.equal(out, tensor) for out, tensor in zip(outs, actual, strict=True))


@gpu
def test_cuda_graph_follows_new_shares():
    shape, options = (2, 3, 500, 40), {"k": 512, "g": 16}
    row_mass = make_row_mass(shape, "random", 1).cuda()
    lengths = torch.tensor([8000, 4321], dtype=torch.int32, device="cuda")
    row_mask = torch.ones(2, 20, dtype=torch.bool, device="cuda")
    ops.row_votes(row_mass, lengths, row_mask=row_mask, **options)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.row_votes(row_mass, lengths, row_mask=row_mask, **options)
    for seed, kind in enumerate(["ties", "broken", "sparse"]):
        row_mass.copy_(make_row_mass(shape, kind, seed))
        lengths.copy_(lengths.flip(0))
        row_mask.copy_(torch.rand(2, 20, generator=generator(seed)) < 0.7)
        graph.replay()
        torch.cuda.synchronize()
        expected = ops.row_votes(row_mass.cpu(), lengths.cpu(), row_mask=row_mask.cpu(), **options)
        assert_close_to_cpu(results, expected)


@gpu
def test_cuda_out_twin_names_a_bad_workspace():
    outs = [tensor.cuda() for tensor in ops.row_votes(ROW_MASS, LENGTHS, k=32, g=16)]
    size = ops.row_votes_workspace(2, 2, 8, 6)
    workspace = torch.empty(size + 8, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match=rf"row_votes: workspace must have at least {size} bytes, got {size - 1}"):
        ops.row_votes_out(ROW_MASS.cuda(), LENGTHS.cuda(), *outs, workspace[: size - 1], k=32, g=16)
    with pytest.raises(RuntimeError, match="row_votes: workspace must be aligned to 16 bytes, got a base 8 bytes past"):
        ops.row_votes_out(ROW_MASS.cuda(), LENGTHS.cuda(), *outs, workspace[8:], k=32, g=16)
    with pytest.raises(RuntimeError, match="row_votes: prefix_lens must be on cuda:0 like the first argument, got cpu"):
        ops.row_votes(ROW_MASS.cuda(), LENGTHS, k=32, g=16)
