"""block_attention against its float64 twin, and what it refuses. Run: pytest tests/python/test_block_attention.py"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES, BF16, CUDA_ATTENTION_CASES, FP16, AttentionCase, make_pools, on_cuda
from mage_ext.testing.compare import (
    assert_cuda_out_close,
    assert_lse_close,
    assert_out_close,
    assert_same_bits,
    exact_attention,
    torch_attention,
)

ISAS = ("baseline", "avx2", "avx512")
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def run_and_check(case, seed=0):
    """The operator on a case, compared with the float64 twin; returns its results."""
    tensors, options = case.tensors(seed), case.options
    out, lse = ops.block_attention(**tensors, **options)
    exact_out, exact_lse = reference.block_attention(**tensors, **options, upcast=True)
    assert_lse_close(lse, exact_lse)
    assert_out_close(out, exact_out, torch_attention(**tensors, **options))
    assert out.dtype == case.dtype and out.is_contiguous() and lse.is_contiguous()
    return out, lse


@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_matches_reference(name):
    """Every slot that no token occupies and every page of nobody is NaN, so a read of one would show."""
    case = ATTENTION_CASES[name]
    if case.lens:
        assert case.tensors()["k_cache"].isnan().any()
    run_and_check(case)


@pytest.mark.parametrize("name", ["ragged", "block_of_135m", "prefill_chunk"])
def test_float32_twin_agrees(name):
    """The twin's own float32 mode, with the operator's dtypes."""
    case = ATTENTION_CASES[name]
    out, lse = reference.block_attention(**case.tensors(), **case.options)
    exact_out, exact_lse = reference.block_attention(**case.tensors(), **case.options, upcast=True)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    assert_lse_close(lse, exact_lse)
    assert_out_close(out, exact_out, torch_attention(**case.tensors(), **case.options))


def test_rows_without_tokens():
    """An empty slot, rows with kv_len 0 and rows whose pages are all invalid: out 0, lse -inf."""
    out, lse = run_and_check(ATTENTION_CASES["ragged"])
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and (lse[1:] > -math.inf).all()
    out, lse = run_and_check(ATTENTION_CASES["rows_without_tokens"])
    assert (out[:, :6] == 0).all() and (lse[..., :6] == -math.inf).all() and (lse[..., 6:] > -math.inf).all()
    out, lse = run_and_check(ATTENTION_CASES["only_invalid_pages"])
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and (lse[1] > -math.inf).all()


def test_lengths_are_clamped():
    """Negative lengths are empty slots; lengths past max_seq_len are cut there; kv_lens outside [0, S] likewise."""
    case = replace(ATTENTION_CASES["ragged"], lens=(70, 70, 70))
    tensors = case.tensors()
    tensors["seq_lens"] = torch.tensor([-5, 2**31 - 1, 70], dtype=torch.int32)
    kv_lens = torch.full((3, 8), 2**31 - 1, dtype=torch.int32)
    kv_lens[2, 0] = -(2**31)
    out, lse = ops.block_attention(**tensors, max_seq_len=70, kv_lens=kv_lens)
    tensors["seq_lens"] = torch.tensor([0, 70, 70], dtype=torch.int32)
    full, full_lse = ops.block_attention(**tensors, max_seq_len=70)
    assert_same_bits(out[:2], full[:2])
    assert_same_bits(out[2, 1:], full[2, 1:])
    assert_same_bits(lse[1:, :, 1:], full_lse[1:, :, 1:])
    assert (out[2, 0] == 0).all() and (lse[2, :, 0] == -math.inf).all()


@pytest.mark.parametrize("name", ["block_of_7b", "ragged", "prefill_chunk", "long", "many_rows"])
def test_repeats_bit_for_bit_on_any_number_of_threads(name):
    case = ATTENTION_CASES[name]
    tensors = case.tensors()
    try:
        results = []
        for threads in (1, 2, 3, 7, 1):
            torch.ops.mage.set_num_threads(threads)
            results.append(ops.block_attention(**tensors, **case.options))
    finally:
        torch.ops.mage.set_num_threads(0)
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("split_tokens", [64, 128, 1024])
def test_splits_do_not_change_the_result(split_tokens):
    """Merged splits stay within the tolerance, and a request's result does not depend on its batch mates."""
    case = replace(ATTENTION_CASES["ragged"], lens=(700, 0, 129), split_tokens=split_tokens)
    out, lse = run_and_check(case)
    tensors = case.tensors()
    alone = {**tensors, **{n: tensors[n][2:] for n in ("q", "block_table", "seq_lens")}}
    options = {**case.options, "max_seq_len": 129}
    out_alone, lse_alone = ops.block_attention(**alone, **options)
    assert_same_bits(out[2:], out_alone)
    assert_same_bits(lse[2:], lse_alone)


@pytest.mark.parametrize("layout", ["hnd", "interleaved"])
def test_layouts_give_the_same_bits(layout):
    case = ATTENTION_CASES["page_of_16"]
    expected = ops.block_attention(**case.tensors(), **case.options)
    actual = ops.block_attention(**replace(case, layout=layout).tensors(), **case.options)
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(actual[1], expected[1])


def test_table_that_is_a_slice():
    """Rows of the block table may lie apart."""
    case = ATTENTION_CASES["ragged"]
    tensors = case.tensors()
    expected, _ = ops.block_attention(**tensors, **case.options)
    wide = torch.full((len(case.lens), 50), 10**6, dtype=torch.int32)
    wide[:, 1 : 1 + tensors["block_table"].shape[1]] = tensors["block_table"]
    tensors["block_table"] = wide[:, 1 : 1 + tensors["block_table"].shape[1]]
    assert_same_bits(ops.block_attention(**tensors, **case.options)[0], expected)


@pytest.mark.parametrize("name", ["ragged", "block_of_7b", "prefill_chunk", "page_of_1_hnd", "no_requests"])
def test_out_twin_writes_everything(name):
    """Outputs and workspace start as NaN: what the twin leaves is what the functional op returns."""
    case = ATTENTION_CASES[name]
    tensors = case.tensors()
    expected = ops.block_attention(**tensors, **case.options)
    out, lse = torch.full_like(expected[0], math.nan), torch.full_like(expected[1], math.nan)
    size = ops.block_attention_workspace(
        len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest, case.split_tokens
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    ops.block_attention_out(**tensors, out=out, lse=lse, workspace=workspace, **case.options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


def test_nan_shows():
    """A NaN among the tokens is not swallowed: the rows of its KV head are NaN, those of others are not."""
    case = ATTENTION_CASES["one_row"]
    tensors = case.tensors()
    page = tensors["block_table"][0, 4]
    tensors["k_cache"][page, 3, 1, 5] = math.nan
    out, lse = ops.block_attention(**tensors, **case.options)
    assert out[:, :, 3:6].isnan().all() and lse[:, 3:6].isnan().all()
    assert not out[:, :, :3].isnan().any() and not out[:, :, 6:].isnan().any()


# --- instruction sets ------------------------------------------------------------------------------------------------

# Other files too: every attention operator runs through the same vector code.
ISA_TESTS = [
    "tests/python/test_block_attention.py::test_matches_reference",
    "tests/python/test_block_attention_mass.py::test_matches_reference",
    "tests/python/test_block_attention_rows.py::test_matches_reference",
    "tests/python/test_token_mass.py::test_matches_reference",
    "tests/python/test_sparse_block_attention.py::test_matches_reference",
    "tests/python/test_merge_attention.py::test_matches_reference",
]
ISA_CASES = (
    "ragged or rows_exceed_tokens or page_of_1_hnd or head_dim_24 or block_of_135m or causal or one_winner or max"
)


def run_with_isa(isa, *command):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "MAGE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )


def best_isa():
    flags = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(flags, "baseline")


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa):
    """The other paths that this processor has, each in a process of its own, on every dtype and partial vectors."""
    if ISAS.index(isa) > ISAS.index(best_isa()):
        pytest.skip(f"this processor lacks {isa}")
    if isa == os.environ.get("MAGE_CPU_ISA", best_isa()):
        pytest.skip(f"all other tests run with {isa}")
    result = run_with_isa(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ISA_TESTS, "-k", ISA_CASES)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


def test_instruction_set_must_be_known():
    result = run_with_isa(
        "sse9",
        "-c",
        "import torch; from mage_ext import ops; q, i = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.int32)\n"
        "ops.block_attention(q, q, q, i, i[0], max_seq_len=1)",
    )
    assert result.returncode != 0 and "must be baseline, avx2 or avx512, got sse9" in result.stderr


# --- what it refuses -------------------------------------------------------------------------------------------------


def pool_like(t, dtype=None, **shape):
    """A pool of other sizes than t."""
    sizes = dict(zip(("pages", "page", "kv_heads", "head_dim"), t.shape, strict=True)) | shape
    return make_pools("nhd", *sizes.values(), dtype or t.dtype)[0]


BAD = {
    "q_rank": (lambda a: {"q": a["q"][0]}, r"q must be a tensor of rank 4, got shape \[8, 4, 64\]"),
    "q_dtype": (lambda a: {"q": a["q"].double()}, "q must be bfloat16, float16 or float32, got float64"),
    "q_int": (lambda a: {"q": a["q"].int()}, "q must be bfloat16, float16 or float32, got int32"),
    "q_last_stride": (lambda a: {"q": torch.zeros(2, 8, 4, 128)[..., ::2]}, "q must be of last stride 1, got 2"),
    "q_alignment": (
        lambda a: {"q": torch.zeros(2 * 8 * 4 * 64 + 1)[1:].view(2, 8, 4, 64)},
        "q must be aligned to 16 bytes, got a base 4 bytes past it",
    ),
    "q_strides": (lambda a: {"q": torch.zeros(2, 8, 4, 65)[..., :64]}, "q must have strides of a multiple of 16 bytes"),
    "q_heads": (
        lambda a: {"q": torch.zeros(2, 8, 5, 64)},
        r"heads of q must be a multiple of the KV heads \(2\), got 5",
    ),
    "q_no_rows": (lambda a: {"q": torch.zeros(2, 0, 4, 64)}, "q must have at least 1 query"),
    "head_dim": (
        lambda a: {n: torch.zeros(*a[n].shape[:-1], 12) for n in ("q", "k_cache", "v_cache")},
        "head dim of q must be a multiple of 8 and at most 512, got 12",
    ),
    "head_dim_large": (
        lambda a: {n: torch.zeros(*a[n].shape[:-1], 520) for n in ("q", "k_cache", "v_cache")},
        "head dim of q must be a multiple of 8 and at most 512, got 520",
    ),
    "k_cache_dtype": (lambda a: {"k_cache": a["k_cache"].half()}, "k_cache must be float32, got float16"),
    "k_cache_rank": (lambda a: {"k_cache": a["k_cache"][0]}, "k_cache must be a tensor of rank 4"),
    "k_cache_head_dim": (
        lambda a: {"k_cache": pool_like(a["k_cache"], head_dim=32)},
        r"k_cache must be of shape \[pages, page, Hkv, D\]",
    ),
    "v_cache_dtype": (lambda a: {"v_cache": a["v_cache"].bfloat16()}, "v_cache must be float32, got bfloat16"),
    "v_cache_shape": (
        lambda a: {"v_cache": pool_like(a["v_cache"], kv_heads=1)},
        r"v_cache must be of shape \[pages, page, Hkv, D\]",
    ),
    "v_cache_pages": (lambda a: {"v_cache": a["v_cache"][:-1]}, r"v_cache must be of shape \[pages, page, Hkv, D\]"),
    "page": (
        lambda a: {n: pool_like(a[n], page=48) for n in ("k_cache", "v_cache")},
        "k_cache must have pages of 1, 16, 32, 64, 128 or 256 tokens, got 48",
    ),
    "pool_strides": (
        lambda a: {"k_cache": torch.zeros(*a["k_cache"].shape[:-1], 66)[..., :64]},
        "k_cache must have strides of a multiple of 16 bytes",
    ),
    "table_dtype": (lambda a: {"block_table": a["block_table"].long()}, "block_table must be int32, got int64"),
    "table_rank": (lambda a: {"block_table": a["block_table"][0]}, "block_table must be a tensor of rank 2"),
    "table_rows": (lambda a: {"block_table": a["block_table"][:1]}, r"block_table must be of shape \[B, max_pages\]"),
    "table_too_small": (
        lambda a: {"max_seq_len": 129},
        "block_table must have pages for max_seq_len = 129 tokens, got 4 pages of 32",
    ),
    "seq_lens_dtype": (lambda a: {"seq_lens": a["seq_lens"].long()}, "seq_lens must be int32, got int64"),
    "seq_lens_shape": (
        lambda a: {"seq_lens": a["seq_lens"][:1]},
        r"seq_lens must be of shape \[B\] = \[2\], got \[1\]",
    ),
    "kv_lens_dtype": (lambda a: {"kv_lens": torch.zeros(2, 8)}, "kv_lens must be int32, got float32"),
    "kv_lens_shape": (
        lambda a: {"kv_lens": torch.zeros(2, 7, dtype=torch.int32)},
        r"kv_lens must be of shape \[B, Q\] = \[2, 8\], got \[2, 7\]",
    ),
    "kv_lens_strided": (
        lambda a: {"kv_lens": torch.zeros(8, 2, dtype=torch.int32).T},
        "kv_lens must be contiguous, got a strided view",
    ),
    "max_seq_len_zero": (lambda a: {"max_seq_len": 0}, "max_seq_len must be in .1, .*., got 0"),
    "max_seq_len_negative": (lambda a: {"max_seq_len": -64}, "max_seq_len must be in .1, .*., got -64"),
    "max_seq_len_large": (lambda a: {"max_seq_len": 2**30 + 1}, "max_seq_len must be in .1, .*., got 1073741825"),
    "split_negative": (lambda a: {"split_tokens": -64}, "split_tokens must be 0 or a positive multiple of 64, got -64"),
    "split_uneven": (lambda a: {"split_tokens": 100}, "split_tokens must be 0 or a positive multiple of 64, got 100"),
    "scale_nan": (lambda a: {"softmax_scale": math.nan}, "softmax_scale must be finite, got nan"),
}

REFUSAL_CASE = replace(ATTENTION_CASES["ragged"], lens=(100, 128), layout="nhd")


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    """A bad argument is named, with what was expected and what came, by the function and by the operator below it."""
    change, message = BAD[name]
    arguments = {**REFUSAL_CASE.tensors(), "max_seq_len": 128}
    arguments |= change(arguments)
    for op in (ops.block_attention, torch.ops.mage.block_attention):
        with pytest.raises((ValueError, RuntimeError), match="block_attention: .*" + message):
            op(**arguments)


BAD_OUT = {
    "out_shape": (lambda a: {"out": a["out"][:, :7]}, r"out must be of shape \[B, Q, H, D\] = \[2, 8, 4, 64\]"),
    "out_dtype": (lambda a: {"out": a["out"].half()}, "out must be float32, got float16"),
    "out_strided": (
        lambda a: {"out": torch.zeros(2, 4, 8, 64).transpose(1, 2)},
        "out must be contiguous, got a strided view",
    ),
    "lse_shape": (lambda a: {"lse": a["lse"].transpose(1, 2)}, r"lse must be of shape \[B, H, Q\] = \[2, 4, 8\]"),
    "lse_dtype": (lambda a: {"lse": a["lse"].double()}, "lse must be float32, got float64"),
    "workspace_dtype": (lambda a: {"workspace": a["workspace"].float()}, "workspace must be uint8, got float32"),
    "workspace_small": (lambda a: {"workspace": a["workspace"][:64]}, "workspace must have at least .* bytes, got 64"),
    "workspace_alignment": (
        lambda a: {"workspace": torch.zeros(len(a["workspace"]) + 1, dtype=torch.uint8)[1:]},
        "workspace must be aligned to 16 bytes, got a base 1 bytes past it",
    ),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_out_twin_refuses(name):
    change, message = BAD_OUT[name]
    size = ops.block_attention_workspace(2, 8, 4, 2, 64, 128)
    arguments = {**REFUSAL_CASE.tensors(), "max_seq_len": 128, "out": torch.full((2, 8, 4, 64), 7.0)}
    arguments |= {"lse": torch.full((2, 4, 8), 7.0), "workspace": torch.zeros(size, dtype=torch.uint8)}
    before = arguments["out"], arguments["lse"]
    arguments |= change(arguments)
    with pytest.raises(RuntimeError, match="block_attention: " + message):
        ops.block_attention_out(**arguments)
    assert (before[0] == 7).all() and (before[1] == 7).all()  # nothing was written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 8, 4, 2, 64, 128), r"batch must be in \[0, 16777216\], got -1"),
        ((1 << 24, 1 << 20, 16, 1, 512, 1 << 30), r"batch must be smaller, .*, got 16777216"),
        ((1, 8, 4, 0, 64, 128), r"num_kv_heads must be in \[1, 16777216\], got 0"),
        ((1, 8, 3, 2, 64, 128), r"num_heads must be a multiple of num_kv_heads \(2\), got 3"),
        ((1, 0, 4, 2, 64, 128), r"q_len must be in \[1, 8388608\], got 0"),
        ((1, 8, 4, 2, 60, 128), "head_dim must be a multiple of 8 and at most 512, got 60"),
        ((1, 8, 4, 2, 64, 0), r"max_seq_len must be in \[1, 2\^30\], got 0"),
        ((1, 8, 4, 2, 64, 128, 63), "split_tokens must be 0 or a positive multiple of 64, got 63"),
    ],
)
def test_workspace_refuses(arguments, message):
    with pytest.raises(RuntimeError, match="block_attention: .*" + message):
        ops.block_attention_workspace(*arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_debug_switch_names_the_value(device):
    """Values that are clamped or skipped otherwise are errors while the debug switch is on."""
    tensors = replace(REFUSAL_CASE, dtype=BF16).tensors(device=device)
    bad_table = tensors["block_table"].clone()
    bad_table[1, 2] = 99
    falling = torch.full((2, 8), 100, dtype=torch.int32, device=device)
    falling[1, 4:] = 50
    was_on = ops.set_debug(True)
    try:
        ops.block_attention(**tensors, max_seq_len=128)
        with pytest.raises(RuntimeError, match=r"block_attention: seq_lens\[1\] must be .*128"):
            ops.block_attention(**tensors, max_seq_len=100)
        with pytest.raises(RuntimeError, match=r"block_attention: block_table\[1, 2\] must be .* got 99"):
            ops.block_attention(**tensors | {"block_table": bad_table}, max_seq_len=128)
        with pytest.raises(RuntimeError, match=r"block_attention: kv_lens.* must be .*"):
            ops.block_attention(**tensors, max_seq_len=128, kv_lens=falling)
    finally:
        ops.set_debug(was_on)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("name", CUDA_ATTENTION_CASES)
def test_cuda_matches_reference(name):
    case = CUDA_ATTENTION_CASES[name]
    out, lse = ops.block_attention(**case.tensors(device="cuda"), **on_cuda(case.options))
    assert out.is_cuda and lse.is_cuda and out.dtype == case.dtype and out.is_contiguous() and lse.is_contiguous()
    tensors = case.tensors()
    exact, exact_lse = reference.block_attention(**tensors, **case.options, upcast=True)
    tensors["v_cache"] = tensors["v_cache"].abs()
    size = reference.block_attention(**tensors, **case.options, upcast=True)[0]
    assert_lse_close(lse.cpu(), exact_lse)
    assert_cuda_out_close(out.cpu(), exact, size, case.longest)


# Blocks of 32 of 8B, 7B, 1.5B and 135M models over thousands of tokens, and one of 64.
LARGE_CASES = {
    "8b": AttentionCase((4128,), 32, 32, 8, 128, dtype=BF16),
    "7b": AttentionCase((0, 4128, 65), 32, 28, 4, 128, dtype=BF16),
    "1.5b": AttentionCase((0, 1, 63, 2048, 5000), 32, 12, 2, 128, page=16, layout="hnd", dtype=FP16),
    "135m": AttentionCase((300, 2077), 32, 9, 3, 64, page=256, layout="interleaved", dtype=BF16),
    "block_of_64": AttentionCase((1500, 200), 64, 28, 4, 128, page=1, dtype=BF16),
}

# One token beside a long stream, and a million tokens: of weights that are alike, of few that matter, and of all rows
# of a block of 7B, whose scores take 2 GB in float64.
LONG_CASES = {
    "beside_one_token": AttentionCase((1, 131_104), 32, 12, 2, 128, dtype=BF16),
    "million": AttentionCase((1_048_600,), 8, 4, 1, 64, dtype=BF16),
    "million_of_few": AttentionCase((1_048_600,), 8, 4, 1, 64, q_scale=4.0, dtype=BF16),
    "million_of_7b": AttentionCase((1_048_600,), 32, 7, 1, 128, dtype=BF16),
}


def fused_attention(q, k, v):
    """torch's of q [Q, H, D] over contiguous k and v [T, Hkv, D], in their dtype."""
    k, v = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)[None] for x in (k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v)[0].transpose(0, 1)


def fused_attention_of(tensors):
    out = torch.zeros_like(tensors["q"])
    page_size = tensors["k_cache"].shape[1]
    for b, length in enumerate(tensors["seq_lens"].tolist()):
        if length:
            position = torch.arange(length, device=out.device)
            page, slot = tensors["block_table"][b].long()[position // page_size], position % page_size
            out[b] = fused_attention(tensors["q"][b], *(tensors[name][page, slot] for name in ("k_cache", "v_cache")))
    return out


def assert_requests_close(actual, exact, peer):
    """assert_out_close of each request by itself: the more tokens, the smaller the errors."""
    for one in zip(actual, exact, peer, strict=True):
        assert_out_close(*(tensor[None] for tensor in one))


@gpu
@pytest.mark.parametrize("name", [*LARGE_CASES, *LONG_CASES])
def test_cuda_matches_float64_on_the_gpu(name):
    case = (LARGE_CASES | LONG_CASES)[name]
    tensors = case.tensors(device="cuda")
    exact, size, exact_lse, _ = exact_attention(**tensors)
    peer = fused_attention_of(tensors)
    for split_tokens in (0, 320):
        out, lse = ops.block_attention(**tensors, max_seq_len=case.longest, split_tokens=split_tokens)
        assert_lse_close(lse, exact_lse)
        assert_cuda_out_close(out, exact, size, case.longest)
        assert_requests_close(out, exact, peer)


@gpu
def test_cuda_lengths_are_clamped():
    case = replace(CUDA_ATTENTION_CASES["ragged"], lens=(70, 70, 70))
    tensors = case.tensors(device="cuda")
    tensors["seq_lens"] = torch.tensor([-5, 2**31 - 1, 70], dtype=torch.int32, device="cuda")
    kv_lens = torch.full((3, 8), 2**31 - 1, dtype=torch.int32, device="cuda")
    kv_lens[2, 0] = -(2**31)
    out, lse = ops.block_attention(**tensors, max_seq_len=70, kv_lens=kv_lens)
    tensors["seq_lens"] = torch.tensor([0, 70, 70], dtype=torch.int32, device="cuda")
    full, full_lse = ops.block_attention(**tensors, max_seq_len=70)
    assert_same_bits(out[:2], full[:2])
    assert_same_bits(out[2, 1:], full[2, 1:])
    assert_same_bits(lse[1:, :, 1:], full_lse[1:, :, 1:])
    assert (out[2, 0] == 0).all() and (lse[2, :, 0] == -math.inf).all()


@gpu
@pytest.mark.parametrize("scale", [65536.0, -65536.0, 0.0, 1e-300])
def test_cuda_extreme_softmax_scales_give_no_nan(scale):
    tensors = CUDA_ATTENTION_CASES["ragged"].tensors(device="cuda")
    out, lse = ops.block_attention(**tensors, max_seq_len=250, softmax_scale=scale)
    assert out.isfinite().all() and lse[1:].isfinite().all()
    if abs(scale) < 1:
        counts = tensors["seq_lens"][1:].float().log()[:, None, None]
        assert torch.allclose(lse[1:], counts.expand_as(lse[1:]), atol=1e-4)


@gpu
@pytest.mark.parametrize("name", ["block_of_7b", "ragged", "prefill_chunk", "long", "many_rows", "split_by_64"])
def test_cuda_repeats_bit_for_bit(name):
    case = CUDA_ATTENTION_CASES[name]
    tensors, options = case.tensors(device="cuda"), on_cuda(case.options)
    expected = ops.block_attention(**tensors, **options)
    for _ in range(20):
        for actual, wanted in zip(ops.block_attention(**tensors, **options), expected, strict=True):
            assert_same_bits(actual, wanted)


@gpu
@pytest.mark.parametrize("layout", ["hnd", "interleaved"])
def test_cuda_layouts_give_the_same_bits(layout):
    case = CUDA_ATTENTION_CASES["block_of_7b"]
    expected = ops.block_attention(**replace(case, layout="nhd").tensors(device="cuda"), **case.options)
    actual = ops.block_attention(**replace(case, layout=layout).tensors(device="cuda"), **case.options)
    for ours, wanted in zip(actual, expected, strict=True):
        assert_same_bits(ours, wanted)


@gpu
@pytest.mark.parametrize("name", ["ragged", "block_of_7b", "prefill_chunk", "split_by_64", "no_requests"])
def test_cuda_out_twin_writes_everything(name):
    case = CUDA_ATTENTION_CASES[name]
    tensors, options = case.tensors(device="cuda"), on_cuda(case.options)
    expected = ops.block_attention(**tensors, **options)
    out, lse = (torch.full_like(t, math.nan) for t in expected)
    size = ops.block_attention_workspace(
        len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest, case.split_tokens
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    ops.block_attention_out(**tensors, out=out, lse=lse, workspace=workspace, **options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


@gpu
@pytest.mark.parametrize("split_tokens", [0, 128])
def test_cuda_graph_follows_new_lengths(split_tokens):
    """A captured call reads lengths, tables and tokens when the graph is replayed."""
    case = replace(CUDA_ATTENTION_CASES["block_of_7b"], lens=(517, 517), layout="nhd")
    tensors = case.tensors(device="cuda")
    options = {"max_seq_len": 517, "split_tokens": split_tokens}
    ops.block_attention(**tensors, **options)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.block_attention(**tensors, **options)
    for seed, lens in enumerate([(517, 1), (0, 300), (0, 0), (64, 517)]):
        for name, value in case.tensors(seed + 1, device="cuda").items():
            tensors[name].copy_(value)
        tensors["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        expected = ops.block_attention(**tensors, **options)
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])
        exact, size, exact_lse, _ = exact_attention(**tensors)
        assert_lse_close(lse, exact_lse)
        assert_cuda_out_close(out, exact, size, 517)


@gpu
def test_cuda_streams_run_at_once():
    names = ("block_of_7b", "block_of_135m")
    calls = [(CUDA_ATTENTION_CASES[n].tensors(device="cuda"), CUDA_ATTENTION_CASES[n].options) for n in names]
    expected = [ops.block_attention(**tensors, **options) for tensors, options in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, (tensors, options) in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.block_attention(**tensors, **options))
    torch.cuda.synchronize()
    for i, actual in enumerate(results):
        assert_same_bits(actual[0], expected[i % 2][0])
        assert_same_bits(actual[1], expected[i % 2][1])


@gpu
def test_cuda_nan_shows():
    """As on the CPU: a NaN among the tokens is in out and lse of the rows of its KV head, and of no others."""
    for lens in ((130,), (2000,)):  # one worker, several
        case = replace(CUDA_ATTENTION_CASES["one_row"], lens=lens)
        tensors = case.tensors(device="cuda")
        tensors["k_cache"][tensors["block_table"][0, 4].item(), 3, 1, 5] = math.nan
        out, lse = ops.block_attention(**tensors, **case.options)
        assert out[:, :, 3:6].isnan().all() and lse[:, 3:6].isnan().all()
        assert not out[:, :, :3].isnan().any() and not out[:, :, 6:].isnan().any()


@gpu
def test_cuda_opcheck():
    case = CUDA_ATTENTION_CASES["causal"]
    tensors, options = case.tensors(device="cuda"), on_cuda(case.options)
    results = torch.library.opcheck(torch.ops.mage.block_attention.default, tuple(tensors.values()), options)
    assert set(results.values()) == {"SUCCESS"}
    size = ops.block_attention_workspace(2, 37, 4, 2, 64, 150)
    out = torch.empty_like(tensors["q"], memory_format=torch.contiguous_format)
    rest = (out, torch.empty(2, 4, 37, device="cuda"), torch.empty(size, dtype=torch.uint8, device="cuda"))
    op = torch.ops.mage.block_attention_out.default
    assert set(torch.library.opcheck(op, (*tensors.values(), *rest), options).values()) == {"SUCCESS"}


BAD_CUDA = {
    "float32": (
        lambda a: {n: a[n].float() for n in ("q", "k_cache", "v_cache")},
        "q must be bfloat16 or float16 on CUDA, got float32",
    ),
    "head_dim": (
        lambda a: {n: a[n].new_zeros(*a[n].shape[:-1], 96) for n in ("q", "k_cache", "v_cache")},
        "the head dim of q must be 64 or 128 on CUDA, got 96",
    ),
    "k_cache_device": (lambda a: {"k_cache": a["k_cache"].cpu()}, "k_cache must be on cuda:0.*, got cpu"),
    "seq_lens_device": (lambda a: {"seq_lens": a["seq_lens"].cpu()}, "seq_lens must be on cuda:0.*, got cpu"),
    "kv_lens_device": (lambda a: {"kv_lens": torch.zeros(2, 8, dtype=torch.int32)}, "kv_lens must be on cuda:0.*"),
    "split_tokens": (lambda a: {"split_tokens": 100}, "split_tokens must be 0 or a positive multiple of 64, got 100"),
    "table": (lambda a: {"max_seq_len": 129}, "block_table must have pages for max_seq_len = 129 tokens, got 4 pages"),
}


@gpu
@pytest.mark.parametrize("name", BAD_CUDA)
def test_cuda_refuses(name):
    change, message = BAD_CUDA[name]
    arguments = {**replace(REFUSAL_CASE, dtype=BF16).tensors(device="cuda"), "max_seq_len": 128}
    arguments |= change(arguments)
    with pytest.raises((ValueError, RuntimeError), match="block_attention: " + message):
        ops.block_attention(**arguments)


@gpu
def test_cuda_refuses_a_small_workspace():
    arguments = {**replace(REFUSAL_CASE, dtype=BF16).tensors(device="cuda"), "max_seq_len": 128}
    arguments |= {"out": torch.full_like(arguments["q"], 7.0), "lse": torch.full((2, 4, 8), 7.0, device="cuda")}
    workspace = torch.zeros(64, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match=r"block_attention: workspace must have at least .* bytes, got 64"):
        ops.block_attention_out(**arguments, workspace=workspace)
    assert (arguments["out"] == 7).all() and (arguments["lse"] == 7).all()
