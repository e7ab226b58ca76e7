"""token_confidence against its slow twin, its promises, and what it refuses.

Run: pytest tests/python/test_token_confidence.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ext import ops, reference

gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_as_good_as_torch(logits, actual):
    """Tokens are exact; errors against float64 are at most twice those of float32 torch, plus a rounding of the result.

    The largest errors of the batch are compared, and what the kernel's e^x may be off by is allowed besides: the rows
    of torch may all be right by chance.
    """
    assert torch.equal(actual[0].cpu(), reference.token_confidence(logits.cpu())[0])
    assert actual[0].dtype == torch.int64
    assert all(tensor.device == logits.device for tensor in actual)
    scores = logits.float().nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    infinite = scores == INF
    scores = torch.where(infinite.any(-1, keepdim=True), torch.where(infinite, 0.0, -INF), scores)
    empty = (scores == -INF).all(-1)
    assert (actual[1][empty] == 0).all() and (actual[2][empty] == 0).all()
    if empty.all():
        return
    probs, shares = torch.softmax(scores[~empty], -1), torch.softmax(scores[~empty].double(), -1)
    theirs = probs.amax(-1), torch.special.entr(probs).sum(-1)
    truths = shares.amax(-1), torch.special.entr(shares).sum(-1)
    for our, their, truth, exp_error in zip(
        actual[1:], theirs, truths, errors_of_exp(scores[~empty], shares), strict=True
    ):
        scale = truth.clamp(min=1)
        error, allowed = (our[~empty] - truth).abs() / scale, (their - truth).abs() / scale
        assert (error <= 2 * allowed.max() + 2**-23 + exp_error / scale).all()


def errors_of_exp(scores, shares):
    """What the e^x of the kernel may add to prob and entropy, in float64; 0 on the CPU.

    On CUDA e^x is ex2.approx, off by up to 2^-22 of the result (PTX ISA), of x * log2(e), whose constant and product
    are rounded: x * 2^-23 more. With Z = sum e^x, W = sum e^x x, x from the largest score on, prob is 1 / Z and the
    entropy ln Z - W / Z: an error d of each e^x moves them by prob * sum p d and by sum p d (1 - x + W / Z).
    """
    if scores.device.type == "cpu":
        return 0.0, 0.0
    below = (scores - scores.amax(-1, keepdim=True)).double()
    below = torch.where(shares > 0, below, 0.0)
    weights = shares * (2**-22 - below * 2**-23) * (below < 0)
    moved = (1 - below + (shares * below).sum(-1, keepdim=True)).abs()
    return shares.amax(-1) * weights.sum(-1), (weights * moved).sum(-1)


CASES = st.tuples(
    st.integers(0, 2**20),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, 15, 16, 17, 100, 4095, 4096, 4097, 9000]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    st.sampled_from(["plain", "ties", "nan", "inf", "none"]),
)


def make_logits(seed, rows, vocab, dtype, scale, kind):
    g = generator(seed)
    logits = torch.randn(rows, vocab, generator=g) * scale
    hit = torch.rand(rows, vocab, generator=g)
    if kind == "ties":
        logits = logits.round()
    if kind == "nan":
        logits[hit < 0.3] = math.nan
        logits[hit > 0.8] = -INF
    if kind == "inf":
        logits[hit < 0.01] = INF
        logits[hit > 0.99] = math.nan
    if kind == "none":
        logits[0] = -INF
        logits[-1] = math.nan
    return logits.to(dtype)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_equals_its_twin(case):
    logits = make_logits(*case)
    assert_as_good_as_torch(logits, ops.token_confidence(logits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [49_152, 151_936, 262_144])
def test_equals_its_twin_over_a_vocabulary(dtype, vocab):
    logits = (torch.randn(3, vocab, generator=generator(vocab)) * 4).to(dtype)
    logits[0] = 0  # uniform: probability 1 / V, entropy ln V
    actual = ops.token_confidence(logits)
    assert_as_good_as_torch(logits, actual)
    assert actual[0][0] == 0
    assert actual[1][0].item() == pytest.approx(1 / vocab, rel=2**-22)
    assert actual[2][0].item() == pytest.approx(math.log(vocab), rel=2**-22)


def test_by_hand():
    nan = math.nan
    rows = [
        ([0.0, 0.0, 0.0, 0.0], 0, 0.25, math.log(4)),
        ([-INF, 2.0, -INF, nan], 1, 1.0, 0.0),
        ([nan, INF, 3.0, INF], 1, 0.5, math.log(2)),
        ([nan, -INF, nan, -INF], 0, 0.0, 0.0),
        ([-1e30, 0.0, 1e30, 0.0], 2, 1.0, 0.0),
        ([math.log(3), 0.0, -INF, -INF], 0, 0.75, 2 * math.log(2) - 0.75 * math.log(3)),
    ]
    for logits, token, prob, entropy in rows:
        out = ops.token_confidence(torch.tensor([logits]))
        assert out[0].item() == token
        assert out[1].item() == pytest.approx(prob, rel=2**-22)
        assert out[2].item() == pytest.approx(entropy, rel=2**-22, abs=2**-22)


def test_a_row_does_not_depend_on_its_batch_or_stride():
    logits = torch.randn(7, 12_345, generator=generator(1))
    batch = ops.token_confidence(logits)
    wide = torch.full((7, 20_000), math.nan)
    wide[:, 100:12_445] = logits
    strided = ops.token_confidence(wide[:, 100:12_445])
    for i in range(7):
        one = ops.token_confidence(logits[i : i + 1])
        for a, b, c in zip(one, batch, strided, strict=True):
            assert torch.equal(a[0], b[i]) and torch.equal(b[i], c[i])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    logits = torch.randn(5, 100_003, generator=generator(2)) * 5
    try:
        torch.ops.mage.set_num_threads(1)
        one = ops.token_confidence(logits)
        torch.ops.mage.set_num_threads(threads)
        for actual, expected in zip(ops.token_confidence(logits), one, strict=True):
            assert torch.equal(actual, expected)
    finally:
        torch.ops.mage.set_num_threads(0)


def test_out_twin_and_no_rows():
    logits = torch.randn(4, 1000, generator=generator(3))
    expected = ops.token_confidence(logits)
    outs = [torch.full_like(tensor, 7) for tensor in expected]
    ops.token_confidence_out(logits, *outs, torch.empty(ops.token_confidence_workspace(4, 1000), dtype=torch.uint8))
    for actual, wanted in zip(outs, expected, strict=True):
        assert torch.equal(actual, wanted)
    assert [tuple(tensor.shape) for tensor in ops.token_confidence(logits[:0])] == [(0,), (0,), (0,)]


@pytest.mark.parametrize(
    ("message", "logits"),
    [
        ("logits must be a tensor of rank 2", torch.zeros(5)),
        ("logits must be bfloat16, float16 or float32, got float64", torch.zeros(2, 5).double()),
        ("logits must be bfloat16, float16 or float32, got int64", torch.zeros(2, 5).long()),
        ("logits must be of last stride 1, got 2", torch.zeros(2, 10)[:, ::2]),
        ("logits must have 1 to 1073741824 entries per row, got 0", torch.zeros(2, 0)),
    ],
)
def test_bad_arguments_are_named(message, logits):
    with pytest.raises(RuntimeError, match=f"token_confidence: {message}"):
        ops.token_confidence(logits)


def test_debug_names_a_nan():
    before = ops.set_debug(True)
    try:
        with pytest.raises(RuntimeError, match=r"token_confidence: logits must have values .*, got nan at element 7"):
            ops.token_confidence(torch.tensor([[0.0] * 5, [0.0, -INF, math.nan, 1.0, 2.0]]).bfloat16())
        ops.token_confidence(torch.tensor([[0.0, -INF]]))
    finally:
        ops.set_debug(before)


# --- CUDA -----------------------------------------------------------------------------------------------------------


@gpu
@settings(max_examples=150, deadline=None)
@given(CASES)
def test_cuda_equals_the_twin(case):
    logits = make_logits(*case).cuda()
    assert_as_good_as_torch(logits, ops.token_confidence(logits))


@gpu
@pytest.mark.parametrize("offset", [0, 1, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [49_152, 50_257, 151_936, 262_144])
def test_cuda_equals_the_twin_over_a_vocabulary(dtype, vocab, offset):
    """Rows that are aligned and rows that are not, of 1, 4 and 8 CTAs; nothing between the rows is read."""
    wide = torch.full((5, vocab + 8), math.nan, device="cuda", dtype=dtype)
    logits = wide[:, offset : offset + vocab]
    logits.copy_(torch.randn(5, vocab, generator=generator(vocab)) * 4)
    logits[0] = 0
    actual = ops.token_confidence(logits)
    assert_as_good_as_torch(logits, actual)
    assert actual[0][0] == 0
    assert actual[1][0].item() == pytest.approx(1 / vocab, rel=2**-22)
    assert actual[2][0].item() == pytest.approx(math.log(vocab), rel=2**-22)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1000, 40_001])
def test_cuda_bits_do_not_depend_on_batch_stride_or_base(dtype, vocab):
    logits = (torch.randn(7, vocab, generator=generator(1)) * 3).to(dtype).cuda()
    batch = ops.token_confidence(logits)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(ops.token_confidence(logits), batch, strict=True))
    for i in range(7):
        wide = torch.full((2, vocab + 16), math.nan, device="cuda", dtype=dtype)
        wide[1, i : i + vocab] = logits[i]
        alone = ops.token_confidence(wide[1:, i : i + vocab])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, batch, strict=True))
    for copies in (20, 40, 90):  # fewer CTAs per row
        many = ops.token_confidence(logits.repeat(copies, 1))
        assert all(torch.equal(a, b.repeat(copies)) for a, b in zip(many, batch, strict=True))


@gpu
def test_cuda_out_twin_in_a_graph():
    """A captured call writes everything, follows new logits, and works behind kernels that write them."""
    logits = torch.randn(6, 70_000, device="cuda").bfloat16()
    outs = [torch.empty_like(tensor) for tensor in ops.token_confidence(logits)]
    workspace = torch.empty(ops.token_confidence_workspace(6, 70_000), dtype=torch.uint8, device="cuda")
    noise = torch.zeros_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shown = logits + noise
        ops.token_confidence_out(shown, *outs, workspace)
    for seed in range(3):
        noise.copy_(torch.randn(6, 70_000, generator=generator(seed)) * 3)
        for out in outs:
            out.view(torch.uint8).fill_(255)
        graph.replay()
        expected = ops.token_confidence(logits + noise)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    assert [tuple(tensor.shape) for tensor in ops.token_confidence(logits[:0])] == [(0,), (0,), (0,)]


@gpu
def test_cuda_bad_arguments_are_named():
    with pytest.raises(RuntimeError, match="token_confidence: logits must be of last stride 1, got 2"):
        ops.token_confidence(torch.zeros(2, 10, device="cuda")[:, ::2])
    outs = [tensor.cpu() for tensor in ops.token_confidence(torch.zeros(2, 10, device="cuda"))]
    workspace = torch.empty(0, dtype=torch.uint8, device="cuda")
    with pytest.raises(
        RuntimeError, match="token_confidence: token must be on cuda:0 like the first argument, got cpu"
    ):
        ops.token_confidence_out(torch.zeros(2, 10, device="cuda"), *outs, workspace)
    before = ops.set_debug(True)
    try:
        with pytest.raises(RuntimeError, match=r"token_confidence: logits must have values .*, got nan at element 3"):
            ops.token_confidence(torch.tensor([[0.0, 1.0, 2.0, math.nan]], device="cuda"))
    finally:
        ops.set_debug(before)
