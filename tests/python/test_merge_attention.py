"""merge_attention against its float64 twin, and what it refuses. Run: pytest tests/python/test_merge_attention.py"""

import math
from dataclasses import replace

import pytest
import torch

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES
from mage_ext.testing.compare import assert_lse_close, assert_out_close, assert_same_bits, torch_attention, ulp

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
gpu = pytest.mark.gpu

# B, Q, H, D, parts, dtype
CASES = {
    "one_of_each": (1, 1, 1, 1, 1, FP32),
    "two_parts_of_a_block": (1, 32, 9, 64, 2, BF16),
    "max_dim": (1, 3, 2, 512, 3, FP16),
    "odd_dim": (2, 5, 3, 37, 3, FP32),
    "many_parts": (1, 4, 2, 128, 40, FP32),
    "batch": (5, 8, 4, 64, 2, FP16),
    "ragged_parts": (3, 33, 6, 24, 5, BF16),
    "no_requests": (0, 4, 2, 64, 2, BF16),
}


def parts_of(name, spread=5.0):
    """Random parts; every tenth lse is -inf, and its out NaN: such a part must not be read."""
    batch, rows, heads, dim, parts, dtype = CASES[name]
    outs = [torch.randn(batch, rows, heads, dim).to(dtype) for _ in range(parts)]
    lses = [torch.randn(batch, heads, rows) * spread for _ in range(parts)]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        silent = torch.rand(lse.shape) < 0.1
        silent[..., 0] = i % 2 == 1
        lse[silent] = -math.inf
        out[silent.transpose(1, 2)] = math.nan
    return outs, lses


def assert_merged(actual, outs, lses, **logs):
    """out within one rounding of its dtype and 1e-6 of the largest part; lse within its own tolerance."""
    exact_out, exact_lse = reference.merge_attention(outs, lses, **logs, upcast=True)
    assert_lse_close(actual[1], exact_lse)
    assert not actual[0].isnan().any() and actual[0].dtype == outs[0].dtype
    largest = torch.stack(outs).nan_to_num().double().abs().amax(0)
    # float32: weights and products carry a few roundings of 2^-24 each; lse differences of up to 30 scale those of exp
    allowed = ulp(exact_out, outs[0].dtype) / 2 + 30 * 2**-24 * largest
    assert ((actual[0].double() - exact_out).abs() <= allowed).all()


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name):
    outs, lses = parts_of(name)
    assert_merged(ops.merge_attention(outs, lses), outs, lses)


@pytest.mark.parametrize("log2_in", [False, True])
@pytest.mark.parametrize("log2_out", [False, True])
def test_log2(log2_in, log2_out):
    outs, lses = parts_of("odd_dim")
    logs = {"log2_in": log2_in, "log2_out": log2_out}
    assert_merged(ops.merge_attention(outs, lses, **logs), outs, lses, **logs)
    scaled = [lse * math.log2(math.e) for lse in lses] if log2_in else lses
    _, lse = ops.merge_attention(outs, scaled, **logs)
    _, natural = ops.merge_attention(outs, lses)
    assert_lse_close(lse, natural.double() * (math.log2(math.e) if log2_out else 1))


def test_silent_parts():
    """A part with lse -inf has no say; without any other, out is 0 and lse -inf; one part alone comes back as it is."""
    out, lse = torch.randn(2, 4, 3, 16), torch.randn(2, 3, 4)
    silent = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    merged = ops.merge_attention([silent[0], out, silent[0]], [silent[1], lse, silent[1]])
    assert_same_bits(merged[0], out)
    assert_same_bits(merged[1], lse)
    nothing = ops.merge_attention([silent[0], silent[0]], [silent[1], silent[1]])
    assert (nothing[0] == 0).all() and (nothing[1] == -math.inf).all()


def test_nan_shows():
    out, lse = torch.randn(1, 2, 1, 8), torch.zeros(1, 1, 2)
    bad = lse.clone()
    bad[0, 0, 1] = math.nan
    merged, merged_lse = ops.merge_attention([out, out], [lse, bad])
    assert merged[:, 1].isnan().all() and merged_lse[..., 1].isnan().all() and not merged[:, 0].isnan().any()


@pytest.mark.parametrize("name", ["block_of_135m", "block_of_7b_fp32", "page_of_16"])
def test_prefix_and_rest_merge_to_exact_attention(name):
    """Attention over [0, P) and over [P, S), merged, is attention over [0, S)."""
    case = ATTENTION_CASES[name]
    tensors = case.tensors()
    prefix = tensors["seq_lens"] // 2 // 16 * 16
    first = ops.block_attention(**tensors | {"seq_lens": prefix}, **case.options)
    nothing = (
        torch.zeros(len(case.lens), case.kv_heads, 0, dtype=torch.int32),
        torch.zeros(len(case.lens), case.kv_heads, dtype=torch.int32),
    )
    second = ops.sparse_block_attention(
        **tensors, indices=nothing[0], counts=nothing[1], tail_start=prefix, g=16, **case.options
    )
    outs, lses = zip(first, second, strict=True)
    out, lse = ops.merge_attention(list(outs), list(lses))
    exact_out, exact_lse = reference.block_attention(**tensors, **case.options, upcast=True)
    assert_lse_close(lse, exact_lse)
    peer = torch_attention(**tensors, **case.options)
    if case.dtype == FP32:
        assert_out_close(out, exact_out, peer)
    else:  # the two parts were rounded to the dtype before they were merged
        slack = sum(ulp(part, case.dtype) / 2 for part in outs)
        allowed = 2 * (peer.double() - exact_out).abs().max() + ulp(exact_out, case.dtype) + slack
        assert ((out.double() - exact_out).abs() <= allowed).all()


def test_strided_parts():
    """outs may be views: heads of a wider tensor, or rows with a gap."""
    outs, lses = parts_of("two_parts_of_a_block")
    wide = torch.full((1, 64, 20, 64), math.nan, dtype=BF16)
    wide[:, ::2, 5:14] = outs[0]
    expected = ops.merge_attention(outs, lses)
    actual = ops.merge_attention([wide[:, ::2, 5:14], outs[1]], lses)
    assert_same_bits(actual[0], expected[0])


def test_repeats_bit_for_bit_on_any_number_of_threads():
    outs, lses = parts_of("ragged_parts")
    try:
        results = []
        for threads in (1, 2, 5):
            torch.ops.mage.set_num_threads(threads)
            results.append(ops.merge_attention(outs, lses)[0])
    finally:
        torch.ops.mage.set_num_threads(0)
    for out in results[1:]:
        assert_same_bits(out, results[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("parts", [2, 3, 8, 9, 40])
def test_parts_near_the_largest_number(parts, dtype, device):
    """Whose sum is beyond it: an average is not."""
    outs = [torch.full((1, 2, 3, 8), -3e38, dtype=dtype, device=device) for _ in range(parts)]
    lses = [torch.full((1, 3, 2), 0.25 * (i % 3), device=device) for i in range(parts)]
    out, lse = ops.merge_attention(outs, lses)
    assert (out.float() / outs[0].float() - 1).abs().max() < 1e-5
    assert_lse_close(lse, torch.stack(lses).double().logsumexp(0))


@pytest.mark.parametrize("name", ["ragged_parts", "no_requests"])
def test_out_twin_writes_everything(name):
    outs, lses = parts_of(name)
    expected = ops.merge_attention(outs, lses)
    out, lse = torch.full_like(expected[0], math.nan), torch.full_like(expected[1], math.nan)
    batch, rows, heads, dim, parts, _ = CASES[name]
    size = ops.merge_attention_workspace(parts, batch, rows, heads, dim)
    ops.merge_attention_out(outs, lses, out, lse, torch.empty(size, dtype=torch.uint8))
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


O, L = torch.zeros(2, 4, 3, 8), torch.zeros(2, 3, 4)
BAD = {
    "empty": (([], []), "outs must hold at least one tensor, got none"),
    "lengths": (([O, O], [L]), r"lses must .*2\), got 1"),
    "rank": (([O[0]], [L]), r"outs\[0\] must be a tensor of rank 4"),
    "dtype": (([O.double()], [L]), r"outs\[0\] must be bfloat16, float16 or float32, got float64"),
    "mixed_dtype": (([O, O.half()], [L, L]), r"outs\[1\] must be float32, got float16"),
    "shape": (
        ([O, O[:, :3]], [L, L]),
        r"outs\[1\] must be of shape \[B, Q, H, D\] = \[2, 4, 3, 8\], got \[2, 3, 3, 8\]",
    ),
    "last_stride": (([torch.zeros(2, 4, 3, 16)[..., ::2]], [L]), r"outs\[0\] must be of last stride 1, got 2"),
    "lse_shape": (([O], [L.mT.contiguous()]), r"lses\[0\] must be of shape \[B, H, Q\] = \[2, 3, 4\], got \[2, 4, 3\]"),
    "lse_dtype": (([O], [L.half()]), r"lses\[0\] must be float32, got float16"),
    "lse_strided": (([O], [torch.zeros(2, 4, 3).mT]), r"lses\[0\] must be contiguous"),
    "no_dim": (([O[..., :0]], [L]), "outs must have a head dim of at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    (outs, lses), message = BAD[name]
    with pytest.raises((ValueError, RuntimeError), match="merge_attention: " + message):
        ops.merge_attention(outs, lses)


def test_case_with_exact_splits():
    """Splits that block_attention merges inside equal parts merged here, within rounding."""
    case = replace(ATTENTION_CASES["ragged"], lens=(256,), split_tokens=128)
    tensors = case.tensors()
    whole, whole_lse = ops.block_attention(**tensors, **case.options)
    half = {**tensors, "seq_lens": torch.tensor([128], dtype=torch.int32)}
    rest = {**half, "block_table": tensors["block_table"][:, 4:].contiguous()}
    options = {**case.options, "max_seq_len": 128}
    parts = [ops.block_attention(**part, **options) for part in (half, rest)]
    out, lse = ops.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    assert (out - whole).abs().max() < 1e-6 and (lse - whole_lse).abs().max() < 1e-5


# --- CUDA -----------------------------------------------------------------------------------------------------------


def to_cuda(tensors):
    return [tensor.cuda() for tensor in tensors]


@gpu
@pytest.mark.parametrize("logs", [{}, {"log2_in": True}, {"log2_out": True}], ids=["natural", "log2_in", "log2_out"])
@pytest.mark.parametrize("name", CASES)
def test_cuda_matches_reference(name, logs):
    outs, lses = parts_of(name)
    actual = ops.merge_attention(to_cuda(outs), to_cuda(lses), **logs)
    assert_merged([tensor.cpu() for tensor in actual], outs, lses, **logs)


@gpu
def test_cuda_silent_parts_and_nan():
    out, lse = torch.randn(2, 4, 3, 16, device="cuda"), torch.randn(2, 3, 4, device="cuda")
    silent = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    merged = ops.merge_attention([silent[0], out, silent[0]], [silent[1], lse, silent[1]])
    assert_same_bits(merged[0].cpu(), out.cpu())
    assert_same_bits(merged[1].cpu(), lse.cpu())
    nothing = ops.merge_attention([silent[0], silent[0]], [silent[1], silent[1]])
    assert (nothing[0] == 0).all() and (nothing[1] == -math.inf).all()
    bad = lse.clone()
    bad[0, 0, 1] = math.nan
    merged, merged_lse = ops.merge_attention([out, out], [lse, bad])
    assert merged[0, 1, 0].isnan().all() and merged.isnan().sum() == 16
    assert merged_lse[0, 0, 1].isnan() and merged_lse.isnan().sum() == 1


@gpu
def test_cuda_strided_parts_agree_with_whole_ones():
    """Views that can be read in vectors, and one that cannot, give the bits of contiguous parts."""
    outs, lses = map(to_cuda, parts_of("two_parts_of_a_block"))
    expected = ops.merge_attention(outs, lses)
    for offset in (0, 1):
        wide = torch.full((1, 64, 20, 72), math.nan, dtype=BF16, device="cuda")
        view = wide[:, ::2, 5:14, offset : offset + 64]
        view.copy_(outs[0])
        actual = ops.merge_attention([view, outs[1]], lses)
        assert_same_bits(actual[0].cpu(), expected[0].cpu())
        assert_same_bits(actual[1].cpu(), expected[1].cpu())


@gpu
def test_cuda_out_twin_in_a_graph():
    """A captured call writes everything, follows what its parts hold, and repeats bit for bit."""
    outs, lses = map(to_cuda, parts_of("ragged_parts"))
    batch, rows, heads, dim, parts, _ = CASES["ragged_parts"]
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    size = ops.merge_attention_workspace(parts, batch, rows, heads, dim)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    ops.merge_attention_out(outs, lses, out, lse, workspace)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.merge_attention_out(outs, lses, out, lse, workspace)
    for shift in (0.0, 1.0):
        lses[1].add_(shift)
        expected = ops.merge_attention(outs, lses)
        for _ in range(3):
            out.fill_(math.nan)
            lse.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(out.cpu(), expected[0].cpu())
            assert_same_bits(lse.cpu(), expected[1].cpu())
        assert_merged([out.cpu(), lse.cpu()], [part.cpu() for part in outs], [part.cpu() for part in lses])


@gpu
def test_cuda_refuses():
    out, lse = O.cuda(), L.cuda()
    with pytest.raises(RuntimeError, match="merge_attention: outs must hold at most 512 tensors on a GPU, got 513"):
        ops.merge_attention([out] * 513, [lse] * 513)
    with pytest.raises(RuntimeError, match=r"merge_attention: lses\[0\] must be on cuda:0 like the first argument"):
        ops.merge_attention([out], [L])
