"""block_attention_mass against its float64 twin, and what it refuses.

Run: pytest tests/python/test_block_attention_mass.py
"""

import math
from dataclasses import replace

import pytest
import torch

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES, BF16, CUDA_ATTENTION_CASES, AttentionCase, on_cuda
from mage_ext.testing.compare import (
    assert_cuda_out_close,
    assert_lse_close,
    assert_mass_close,
    assert_same_bits,
    exact_attention,
)
from test_block_attention import LONG_CASES

gpu = pytest.mark.gpu


def prefix_lens(case):
    """P of a case: what lies before the current block; ragged within units."""
    return torch.tensor([max(0, length - case.q_len) for length in case.lens], dtype=torch.int32)


def alternate_rows(case):
    """Keeps every third query; the last request keeps none."""
    mask = (torch.arange(case.q_len) % 3 == 0).expand(len(case.lens), -1).clone()
    mask[-1:] = False
    return mask


def mass_options(case, options):
    extra = dict(options)
    if extra.get("norm") == "prefix":
        extra["prefix_lens"] = prefix_lens(case)
    if extra.pop("masked", False):
        extra["row_mask"] = alternate_rows(case)
    return extra


# Options of the emission over the named shapes: every g, score, norm and mask at least four times.
RUNS = [
    ("all_ones", {"g": 1}),
    ("one_token", {"g": 16, "score": "max"}),
    ("one_row", {"g": 32}),
    ("block_of_135m", {"g": 32, "norm": "prefix"}),
    ("block_of_135m", {"g": 1, "norm": "prefix", "masked": True}),
    ("block_of_7b", {"g": 64}),
    ("block_of_7b", {"g": 16, "score": "max", "norm": "prefix"}),
    ("ragged", {"g": 64, "masked": True}),
    ("ragged", {"g": 16, "norm": "prefix"}),
    ("ragged", {"g": 1, "score": "max"}),
    ("ragged_half", {"g": 32, "score": "max", "norm": "prefix", "masked": True}),
    ("rows_exceed_tokens", {"g": 16, "norm": "prefix"}),
    ("page_of_1", {"g": 32, "norm": "prefix"}),
    ("page_of_1_hnd", {"g": 1}),
    ("page_of_128", {"g": 16, "masked": True}),
    ("page_of_256", {"g": 64, "score": "max"}),
    ("head_dim_24", {"g": 1, "norm": "prefix", "score": "max"}),
    ("head_dim_256", {"g": 32, "masked": True}),
    ("many_rows", {"g": 16}),
    ("many_rows", {"g": 64, "score": "max", "norm": "prefix"}),
    ("prefill_chunk", {"g": 32, "norm": "prefix"}),
    ("prefill_start", {"g": 64}),
    ("causal", {"g": 16, "masked": True}),
    ("causal_longer_than_tokens", {"g": 1, "masked": True}),
    ("rows_without_tokens", {"g": 32}),
    ("invalid_pages", {"g": 16}),
    ("invalid_pages", {"g": 1, "norm": "prefix"}),
    ("only_invalid_pages", {"g": 64, "score": "max"}),
    ("one_winner", {"g": 16, "norm": "prefix"}),
    ("one_winner_bf16", {"g": 32, "score": "max"}),
    ("split_by_64", {"g": 64, "norm": "prefix", "masked": True}),
    ("split_by_64", {"g": 16, "score": "max"}),
    ("split_by_192", {"g": 32}),
    ("long", {"g": 64, "norm": "prefix"}),
    ("longer_than_max", {"g": 64}),
    ("room_to_spare", {"g": 32, "masked": True}),
    ("room_to_spare", {"g": 1}),
    ("fused_projection", {"g": 16}),
    ("no_requests", {"g": 64, "norm": "prefix"}),
]


def run(name, options):
    case = ATTENTION_CASES[name]
    tensors, extra = case.tensors(), mass_options(case, options)
    actual = ops.block_attention_mass(**tensors, **case.options, **extra)
    exact = reference.block_attention_mass(**tensors, **case.options, **extra, upcast=True)
    return case, tensors, actual, exact


@pytest.mark.parametrize(
    ("name", "options"), RUNS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_matches_reference(name, options):
    """Mass within tolerance; out and lse are those of block_attention, bit for bit."""
    case, tensors, (out, lse, mass), (_, exact_lse, exact_mass) = run(name, options)
    expected = ops.block_attention(**tensors, **case.options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
    assert_lse_close(lse, exact_lse)
    assert_mass_close(mass, exact_mass)
    assert mass.shape == (len(case.lens), case.kv_heads, -(-case.longest // options["g"]))


def assert_mean_mass_sums_to_one(case, g, norm, device):
    """In requests that have tokens to count: the last is all block, without a prefix."""
    case = replace(case, lens=(517, 64, 0, 32))
    options = mass_options(case, {"g": g, "norm": norm})
    options = on_cuda(options) if device == "cuda" else options
    mass = ops.block_attention_mass(**case.tensors(device=device), **case.options, **options)[2]
    totals = mass.double().sum(-1)
    has_mass = [True, True, False, norm == "context"]
    for b, expected in enumerate(has_mass):
        assert (totals[b] - int(expected)).abs().max() < 1e-3


@pytest.mark.parametrize("g", [1, 16, 32, 64])
@pytest.mark.parametrize("norm", ["context", "prefix"])
def test_mean_mass_sums_to_one(g, norm):
    assert_mean_mass_sums_to_one(ATTENTION_CASES["block_of_7b"], g, norm, "cpu")


def test_zero_where_nothing_counts():
    """Past S, at or past P with norm prefix, in an empty slot, and where row_mask keeps no row."""
    case = replace(ATTENTION_CASES["room_to_spare"], lens=(120, 0, 200))
    mask = torch.tensor([True, True, False])[:, None].expand(3, case.q_len).contiguous()
    mass = ops.block_attention_mass(**case.tensors(), **case.options, g=16, row_mask=mask)[2]
    assert (mass[0, :, :8] > 0).all() and (mass[0, :, 8:] == 0).all()
    assert (mass[1:] == 0).all()
    prefix = torch.tensor([35, 0, -3], dtype=torch.int32)
    mass = ops.block_attention_mass(**case.tensors(), **case.options, g=16, norm="prefix", prefix_lens=prefix)[2]
    assert (mass[0, :, :3] > 0).all() and (mass[0, :, 3:] == 0).all() and (mass[1:] == 0).all()


def test_row_mask_is_a_selection_of_rows():
    """Masking rows equals sending the others alone; a masked row may hold NaN; out is not masked."""
    case = ATTENTION_CASES["page_of_128"]
    tensors = case.tensors()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3:11] = True
    out, _, mass = ops.block_attention_mass(**tensors, **case.options, g=32, row_mask=mask)
    kept = {**tensors, "q": tensors["q"][:, 3:11].contiguous()}
    assert_mass_close(mass, ops.block_attention_mass(**kept, **case.options, g=32)[2].double())
    tensors["q"][:, 0] = math.nan
    for norm in ({}, {"norm": "prefix", "prefix_lens": torch.tensor([200, 100], dtype=torch.int32)}):
        for g in (1, 32):
            poisoned, _, mass = ops.block_attention_mass(**tensors, **case.options, g=g, row_mask=mask, **norm)
            assert not mass.isnan().any() and poisoned[:, 0].isnan().all()
            assert_same_bits(poisoned[:, 3:], out[:, 3:])
            for score in ("mean", "max"):
                kept_rows = ops.block_attention_mass(**tensors, **case.options, g=g, score=score, **norm)[2]
                assert kept_rows.isnan().any()  # a kept row's NaN is not swallowed


@pytest.mark.parametrize("score", ["mean", "max"])
def test_repeats_bit_for_bit_on_any_number_of_threads(score):
    case = ATTENTION_CASES["block_of_7b"]
    tensors = case.tensors()
    options = {"g": 16, "score": score, "norm": "prefix", "prefix_lens": prefix_lens(case)}
    try:
        results = []
        for threads in (1, 2, 5, 1):
            torch.ops.mage.set_num_threads(threads)
            results.append(ops.block_attention_mass(**tensors, **case.options, **options)[2])
    finally:
        torch.ops.mage.set_num_threads(0)
    for mass in results[1:]:
        assert_same_bits(mass, results[0])


@pytest.mark.parametrize("g", [1, 16, 64])
def test_splits_do_not_change_the_result(g):
    case = replace(ATTENTION_CASES["ragged"], lens=(700, 0, 129))
    whole = ops.block_attention_mass(**case.tensors(), **case.options, g=g)[2]
    for split_tokens in (64, 192, 1024):
        options = {**case.options, "split_tokens": split_tokens}
        assert_mass_close(ops.block_attention_mass(**case.tensors(), **options, g=g)[2], whole.double())


@pytest.mark.parametrize(("name", "g"), [("ragged", 16), ("prefill_chunk", 64), ("room_to_spare", 32), ("one_row", 1)])
def test_out_twin_writes_everything(name, g):
    case = ATTENTION_CASES[name]
    tensors = case.tensors()
    options = {**case.options, "g": g, "norm": "prefix", "prefix_lens": prefix_lens(case)}
    expected = ops.block_attention_mass(**tensors, **options)
    outputs = [torch.full_like(t, math.nan) for t in expected]
    size = ops.block_attention_mass_workspace(
        len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest, g, case.split_tokens
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    out, lse, mass = outputs
    ops.block_attention_mass_out(**tensors, out=out, lse=lse, mass=mass, workspace=workspace, **options)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(actual, wanted)


BAD = {
    "g": ({"g": 8}, "g must be .*1, 16, 32.*64, got 8"),
    "g_zero": ({"g": 0}, "g must be .*1, 16, 32.*64, got 0"),
    "score": ({"score": "sum"}, "score must be .*mean.*max, got '?sum"),
    "score_rows": ({"score": "rows"}, "score must be .*mean.*max, got '?rows"),
    "norm": ({"norm": "all"}, "norm must be .*context.*prefix, got '?all"),
    "prefix_missing": ({"norm": "prefix"}, "prefix_lens must be given with norm .?prefix.?.*, got None"),
    "prefix_unused": ({"prefix_lens": torch.zeros(2, dtype=torch.int32)}, "prefix_lens must be .*, got a tensor"),
    "prefix_dtype": ({"norm": "prefix", "prefix_lens": torch.zeros(2)}, "prefix_lens must be int32, got float32"),
    "prefix_shape": (
        {"norm": "prefix", "prefix_lens": torch.zeros(3, dtype=torch.int32)},
        r"prefix_lens must be of shape \[B\] = \[2\], got \[3\]",
    ),
    "mask_dtype": ({"row_mask": torch.ones(2, 8)}, "row_mask must be bool, got float32"),
    "mask_shape": ({"row_mask": torch.ones(2, 7, dtype=torch.bool)}, r"row_mask must be of shape \[B, Q\] = \[2, 8\]"),
    "mask_strided": ({"row_mask": torch.ones(8, 2, dtype=torch.bool).T}, "row_mask must be contiguous"),
    "max_seq_len": ({"max_seq_len": -1}, r"max_seq_len must be in .*, got -1"),
    "split_tokens": ({"split_tokens": 32}, "split_tokens must be 0 or a positive multiple of 64, got 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    options, message = BAD[name]
    case = replace(ATTENTION_CASES["ragged"], lens=(100, 128))
    for op in (ops.block_attention_mass, torch.ops.mage.block_attention_mass):
        with pytest.raises((ValueError, RuntimeError), match="block_attention_mass: " + message):
            op(**case.tensors(), **{"max_seq_len": 128, **options})


@pytest.mark.parametrize("wrong", ["mass_shape", "mass_dtype", "workspace"])
def test_out_twin_refuses(wrong):
    case = replace(ATTENTION_CASES["ragged"], lens=(100, 128))
    size = ops.block_attention_mass_workspace(2, 8, 4, 2, 64, 128, 32)
    outputs = {
        "out": torch.zeros(2, 8, 4, 64),
        "lse": torch.zeros(2, 4, 8),
        "mass": torch.zeros(
            2, 2, 4 + (wrong == "mass_shape"), dtype=torch.half if wrong == "mass_dtype" else torch.float
        ),
        "workspace": torch.zeros(64 if wrong == "workspace" else size, dtype=torch.uint8),
    }
    with pytest.raises(RuntimeError, match=f"block_attention_mass: {wrong.split('_')[0]} must "):
        ops.block_attention_mass_out(**case.tensors(), **outputs, max_seq_len=128, g=32)


# --- CUDA ------------------------------------------------------------------------------------------------------------

CUDA_RUNS = [(name, options) for name, options in RUNS if name in CUDA_ATTENTION_CASES and options["g"] > 1]
CUDA_RUNS += [(name, {**o, "g": 32}) for name, o in RUNS if name in CUDA_ATTENTION_CASES and o["g"] == 1]


@gpu
@pytest.mark.parametrize(
    ("name", "options"), CUDA_RUNS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_cuda_matches_reference(name, options):
    """Mass within tolerance; out and lse are those of block_attention, bit for bit."""
    case = CUDA_ATTENTION_CASES[name]
    tensors, extra = case.tensors(device="cuda"), mass_options(case, options)
    out, lse, mass = ops.block_attention_mass(**tensors, **on_cuda(case.options), **on_cuda(extra))
    expected = ops.block_attention(**tensors, **on_cuda(case.options))
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
    exact = reference.block_attention_mass(**case.tensors(), **case.options, **extra, upcast=True)
    assert_lse_close(lse.cpu(), exact[1])
    assert_mass_close(mass.cpu(), exact[2])
    assert mass.shape == (len(case.lens), case.kv_heads, -(-case.longest // options["g"]))


@gpu
@pytest.mark.parametrize("g", [16, 32, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (32, 8), (12, 2), (7, 4)])
def test_cuda_matches_float64_on_the_gpu(heads, kv_heads, g):
    """Blocks of 32 over thousands of tokens: 224, 128, 192 rows, and 56 as blocks of 8."""
    kv_heads = 1 if heads == 7 else kv_heads
    case = AttentionCase((4128, 0, 1500, 65), 8 if heads == 7 else 32, heads, kv_heads, 128, dtype=BF16)
    tensors = case.tensors(device="cuda")
    shares = exact_attention(**tensors)[3]
    shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % g)).unflatten(-1, (-1, g)).sum(-1)
    for score, exact in (("mean", shares.mean(2)), ("max", shares.amax(2))):
        mass = ops.block_attention_mass(**tensors, max_seq_len=4128, g=g, score=score)[2]
        assert_mass_close(mass, exact)


# Unit sums in float32; and of R = 192 where they may take 12 MB, which packs them.
SUMMED = {
    "float32": CUDA_ATTENTION_CASES["block_of_7b"],
    "packed": AttentionCase((), 32, 12, 2, 128, dtype=BF16, max_seq_len=1 << 17),
}


@gpu
@pytest.mark.parametrize("g", [16, 32, 64])
@pytest.mark.parametrize("norm", ["context", "prefix"])
@pytest.mark.parametrize("name", SUMMED)
def test_cuda_mean_mass_sums_to_one(name, norm, g):
    assert_mean_mass_sums_to_one(SUMMED[name], g, norm, "cuda")


@gpu
@pytest.mark.parametrize("g", [16, 64])
@pytest.mark.parametrize("name", LONG_CASES)
def test_cuda_long_streams_match_float64(name, g):
    case = LONG_CASES[name]
    tensors = case.tensors(device="cuda")
    exact_out, size, exact_lse, shares = exact_attention(**tensors)
    shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % g)).unflatten(-1, (-1, g)).sum(-1)
    for score, exact in (("mean", shares.mean(2)), ("max", shares.amax(2))):
        out, lse, mass = ops.block_attention_mass(**tensors, max_seq_len=case.longest, g=g, score=score)
        assert_mass_close(mass, exact)
        assert_lse_close(lse, exact_lse)
        assert_cuda_out_close(out, exact_out, size, case.longest)


@gpu
def test_cuda_prefix_lens_are_clamped():
    case = replace(CUDA_ATTENTION_CASES["block_of_7b"], lens=(200, 200, 200, 200))
    tensors, options = case.tensors(), {"g": 16, "norm": "prefix"}
    options["prefix_lens"] = torch.tensor([-(2**31), -1, 2**31 - 1, 201], dtype=torch.int32)
    mass = ops.block_attention_mass(**case.tensors(device="cuda"), max_seq_len=200, **on_cuda(options))[2]
    exact = reference.block_attention_mass(**tensors, max_seq_len=200, **options, upcast=True)[2]
    assert_mass_close(mass.cpu(), exact)
    assert (mass[:2] == 0).all()


@gpu
def test_cuda_masked_row_may_hold_nan():
    case = CUDA_ATTENTION_CASES["page_of_128"]
    tensors = case.tensors(device="cuda")
    mask = torch.zeros(2, 16, dtype=torch.bool, device="cuda")
    mask[:, 3:11] = True
    expected = ops.block_attention_mass(**tensors, **case.options, g=32, row_mask=mask)
    tensors["q"][:, 0] = math.nan
    out, _, mass = ops.block_attention_mass(**tensors, **case.options, g=32, row_mask=mask)
    assert_same_bits(mass, expected[2])
    assert_same_bits(out[:, 3:], expected[0][:, 3:])


@gpu
@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("max_seq_len", [300, 1 << 20])  # unit sums of 0.1 MB, and of so many that they are packed
def test_cuda_nan_of_a_kept_row_shows(score, max_seq_len):
    """In every unit of its KV head that has tokens, and of no other."""
    case = replace(CUDA_ATTENTION_CASES["page_of_128"], max_seq_len=max_seq_len)
    tensors = case.tensors(device="cuda")
    tensors["q"][:, 0, 0] = math.nan
    mass = ops.block_attention_mass(**tensors, **case.options, g=32, score=score)[2]
    for b, tokens in enumerate(case.lens):
        used = -(-tokens // 32)
        assert mass[b, 0, :used].isnan().all() and not mass[b, 0, used:].isnan().any()
    assert not mass[:, 1:].isnan().any()


@gpu
@pytest.mark.parametrize("score", ["mean", "max"])
def test_cuda_repeats_bit_for_bit(score):
    case = CUDA_ATTENTION_CASES["block_of_7b"]
    tensors = case.tensors(device="cuda")
    options = on_cuda({**case.options, "g": 16, "score": score, "norm": "prefix", "prefix_lens": prefix_lens(case)})
    expected = ops.block_attention_mass(**tensors, **options)[2]
    for _ in range(20):
        assert_same_bits(ops.block_attention_mass(**tensors, **options)[2], expected)


@gpu
@pytest.mark.parametrize(("name", "g"), [("ragged", 16), ("prefill_chunk", 64), ("room_to_spare", 32)])
def test_cuda_out_twin_writes_everything(name, g):
    case = CUDA_ATTENTION_CASES[name]
    tensors = case.tensors(device="cuda")
    options = on_cuda({**case.options, "g": g, "norm": "prefix", "prefix_lens": prefix_lens(case)})
    expected = ops.block_attention_mass(**tensors, **options)
    out, lse, mass = outputs = [torch.full_like(t, math.nan) for t in expected]
    size = ops.block_attention_mass_workspace(
        len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest, g, case.split_tokens
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    ops.block_attention_mass_out(**tensors, out=out, lse=lse, mass=mass, workspace=workspace, **options)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(actual, wanted)


@gpu
def test_cuda_graph_follows_new_lengths():
    case = replace(CUDA_ATTENTION_CASES["block_of_7b"], lens=(517, 517), layout="nhd")
    tensors = case.tensors(device="cuda")
    options = {"max_seq_len": 517, "g": 32, "norm": "prefix"}
    options["prefix_lens"] = torch.tensor([485, 485], dtype=torch.int32, device="cuda")
    ops.block_attention_mass(**tensors, **options)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.block_attention_mass(**tensors, **options)
    for seed, lens in enumerate([(517, 1), (0, 300), (0, 0), (64, 517)]):
        for name, value in case.tensors(seed + 1, device="cuda").items():
            tensors[name].copy_(value)
        tensors["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        options["prefix_lens"].copy_(torch.tensor(lens, dtype=torch.int32) * 2 // 3)
        graph.replay()
        torch.cuda.synchronize()
        for actual, wanted in zip(captured, ops.block_attention_mass(**tensors, **options), strict=True):
            assert_same_bits(actual, wanted)
        on_cpu = {name: t.cpu() for name, t in (tensors | options).items() if isinstance(t, torch.Tensor)}
        exact = reference.block_attention_mass(**on_cpu, max_seq_len=517, g=32, norm="prefix", upcast=True)
        assert_mass_close(captured[2].cpu(), exact[2])


@gpu
def test_cuda_opcheck():
    case = CUDA_ATTENTION_CASES["causal"]
    tensors = case.tensors(device="cuda")
    extra = mass_options(case, {"g": 16, "norm": "prefix", "masked": True, "score": "max"})
    options = on_cuda({**case.options, **extra})
    op = torch.ops.mage.block_attention_mass.default
    assert set(torch.library.opcheck(op, tuple(tensors.values()), options).values()) == {"SUCCESS"}


@gpu
def test_cuda_refuses():
    case = replace(CUDA_ATTENTION_CASES["ragged"], lens=(100, 128))
    tensors = case.tensors(device="cuda")
    with pytest.raises(RuntimeError, match=r"block_attention_mass: g must be 16, 32 or 64 on CUDA .*, got 1$"):
        ops.block_attention_mass(**tensors, max_seq_len=128, g=1)
    with pytest.raises(RuntimeError, match="block_attention_mass: q must be bfloat16 or float16 on CUDA, got float32"):
        ops.block_attention_mass(**replace(case, dtype=torch.float32).tensors(device="cuda"), max_seq_len=128)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"block_attention_mass: row_mask must be on cuda:0.*, got cpu"
    ):
        ops.block_attention_mass(**tensors, max_seq_len=128, row_mask=torch.ones(2, 8, dtype=torch.bool))
