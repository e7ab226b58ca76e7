"""block_attention_rows against its float64 twin, and what it refuses.

Run: pytest tests/python/test_block_attention_rows.py
"""

import math
from dataclasses import replace

import pytest
import torch

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES, BF16, CUDA_ATTENTION_CASES, AttentionCase, on_cuda
from mage_ext.testing.compare import assert_log_mass_close, assert_mass_close, assert_same_bits, exact_attention

gpu = pytest.mark.gpu

RUNS = [
    ("all_ones", 1),
    ("one_row", 16),
    ("block_of_135m", 32),
    ("block_of_7b", 64),
    ("ragged", 16),
    ("ragged", 1),
    ("rows_exceed_tokens", 32),
    ("page_of_1_hnd", 16),
    ("head_dim_24", 1),
    ("many_rows", 64),
    ("prefill_chunk", 32),
    ("causal", 16),
    ("causal_longer_than_tokens", 64),
    ("rows_without_tokens", 32),
    ("rows_without_tokens", 1),
    ("invalid_pages", 16),
    ("only_invalid_pages", 32),
    ("one_winner", 16),
    ("split_by_64", 64),
    ("longer_than_max", 32),
    ("room_to_spare", 16),
    ("no_requests", 64),
]


@pytest.mark.parametrize(("name", "g"), RUNS)
def test_matches_reference(name, g):
    case = ATTENTION_CASES[name]
    tensors, options = case.tensors(), {**case.options, "g": g}
    out, lse, row_mass = ops.block_attention_rows(**tensors, **options)
    expected = ops.block_attention(**tensors, **case.options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
    rows = case.q_len * case.heads // case.kv_heads
    assert row_mass.shape == (len(case.lens), case.kv_heads, -(-case.longest // g), rows)
    assert_log_mass_close(row_mass, reference.block_attention_rows(**tensors, **options, upcast=True)[2], dim=2)


@pytest.mark.parametrize("name", ["block_of_135m", "ragged", "causal"])
def test_mass_is_the_mean_of_rows(name):
    """The mean over rows of exp(row_mass) is the mass that block_attention_mass gives."""
    case = ATTENTION_CASES[name]
    row_mass = ops.block_attention_rows(**case.tensors(), **case.options, g=32)[2]
    mass = ops.block_attention_mass(**case.tensors(), **case.options, g=32)[2]
    assert_mass_close(mass, row_mass.double().exp().mean(-1))


def test_row_order():
    """Row r is query r // G, head r % G of the group: the query that looks at one token puts its share there."""
    case = replace(ATTENTION_CASES["one_row"], lens=(64,), q_len=4)
    tensors = case.tensors()
    page, slot = tensors["block_table"][0, 2], 5  # token 37, unit 2 of g = 16
    tensors["q"][:] = 0
    tensors["q"][0, 3, 7] = 100 * tensors["k_cache"][page, slot, 2]  # query 3, head 7: KV head 2, head 1 of its group
    row_mass = ops.block_attention_rows(**tensors, **case.options, g=16)[2]
    assert row_mass[0, 2, 2, 3 * 3 + 1].exp() > 0.99
    others = row_mass.exp()
    others[0, 2, :, 3 * 3 + 1] = 0.25
    assert (others - 0.25).abs().max() < 1e-5


def test_repeats_bit_for_bit_on_any_number_of_threads():
    case = ATTENTION_CASES["block_of_7b"]
    tensors = case.tensors()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.ops.mage.set_num_threads(threads)
            results.append(ops.block_attention_rows(**tensors, **case.options, g=16)[2])
    finally:
        torch.ops.mage.set_num_threads(0)
    for row_mass in results[1:]:
        assert_same_bits(row_mass, results[0])


@pytest.mark.parametrize(("name", "g"), [("ragged", 16), ("prefill_chunk", 64), ("room_to_spare", 1)])
def test_out_twin_writes_everything(name, g):
    case = ATTENTION_CASES[name]
    tensors = case.tensors()
    expected = ops.block_attention_rows(**tensors, **case.options, g=g)
    out, lse, row_mass = outputs = [torch.full_like(t, math.nan) for t in expected]
    size = ops.block_attention_rows_workspace(
        len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest, g, case.split_tokens
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    ops.block_attention_rows_out(
        **tensors, out=out, lse=lse, row_mass=row_mass, workspace=workspace, **case.options, g=g
    )
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(actual, wanted)


BAD = {
    "g": ({"g": 48}, "g must be .*1, 16, 32.*64, got 48"),
    "max_seq_len": ({"max_seq_len": 0}, "max_seq_len must be in .*, got 0"),
    "table": ({"max_seq_len": 500}, "block_table must have pages for max_seq_len = 500 tokens"),
    "split_tokens": ({"split_tokens": 1}, "split_tokens must be 0 or a positive multiple of 64, got 1"),
    "kv_lens": ({"kv_lens": torch.zeros(2, 8, dtype=torch.int64)}, "kv_lens must be int32, got int64"),
    "scale": ({"softmax_scale": math.inf}, "softmax_scale must be finite, got inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    options, message = BAD[name]
    case = replace(ATTENTION_CASES["ragged"], lens=(100, 128))
    for op in (ops.block_attention_rows, torch.ops.mage.block_attention_rows):
        with pytest.raises((ValueError, RuntimeError), match="block_attention_rows: " + message):
            op(**case.tensors(), **{"max_seq_len": 128, **options})


@pytest.mark.parametrize("wrong", ["row_mass", "workspace"])
def test_out_twin_refuses(wrong):
    case = replace(ATTENTION_CASES["ragged"], lens=(100, 128))
    size = ops.block_attention_rows_workspace(2, 8, 4, 2, 64, 128, 32)
    outputs = {
        "out": torch.zeros(2, 8, 4, 64),
        "lse": torch.zeros(2, 4, 8),
        "row_mass": torch.zeros(2, 2, 4, 16 - (wrong == "row_mass")),
        "workspace": torch.zeros(64 if wrong == "workspace" else size, dtype=torch.uint8),
    }
    with pytest.raises(RuntimeError, match=f"block_attention_rows: {wrong} must "):
        ops.block_attention_rows_out(**case.tensors(), **outputs, max_seq_len=128, g=32)


# --- CUDA ------------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize(("name", "g"), [(name, max(g, 16)) for name, g in RUNS if name in CUDA_ATTENTION_CASES])
def test_cuda_matches_reference(name, g):
    case = CUDA_ATTENTION_CASES[name]
    tensors, options = case.tensors(device="cuda"), on_cuda(case.options)
    out, lse, row_mass = ops.block_attention_rows(**tensors, **options, g=g)
    expected = ops.block_attention(**tensors, **options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])
    rows = case.q_len * case.heads // case.kv_heads
    assert row_mass.shape == (len(case.lens), case.kv_heads, -(-case.longest // g), rows)
    exact = reference.block_attention_rows(**case.tensors(), **case.options, g=g, upcast=True)[2]
    assert_log_mass_close(row_mass.cpu(), exact, dim=2)


@gpu
@pytest.mark.parametrize("g", [16, 32, 64])
def test_cuda_matches_float64_on_the_gpu(g):
    case = AttentionCase((4128, 0, 65), 32, 28, 4, 128, dtype=BF16)
    tensors = case.tensors(device="cuda")
    shares = exact_attention(**tensors)[3]
    shares = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % g)).unflatten(-1, (-1, g)).sum(-1)
    row_mass = ops.block_attention_rows(**tensors, max_seq_len=4128, g=g)[2]
    assert_log_mass_close(row_mass, shares.transpose(2, 3).log(), dim=2)


@gpu
@pytest.mark.parametrize(("name", "g"), [("ragged", 16), ("prefill_chunk", 64), ("room_to_spare", 32)])
def test_cuda_out_twin_writes_everything(name, g):
    case = CUDA_ATTENTION_CASES[name]
    tensors, options = case.tensors(device="cuda"), on_cuda(case.options)
    expected = ops.block_attention_rows(**tensors, **options, g=g)
    out, lse, row_mass = outputs = [torch.full_like(t, math.nan) for t in expected]
    size = ops.block_attention_rows_workspace(
        len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest, g, case.split_tokens
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    ops.block_attention_rows_out(**tensors, out=out, lse=lse, row_mass=row_mass, workspace=workspace, **options, g=g)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(actual, wanted)


@gpu
def test_cuda_graph_follows_new_lengths():
    case = replace(CUDA_ATTENTION_CASES["block_of_7b"], lens=(517, 517), layout="nhd")
    tensors = case.tensors(device="cuda")
    ops.block_attention_rows(**tensors, max_seq_len=517, g=16)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.block_attention_rows(**tensors, max_seq_len=517, g=16)
    for seed, lens in enumerate([(517, 1), (0, 300), (0, 0), (64, 517)]):
        for name, value in case.tensors(seed + 1, device="cuda").items():
            tensors[name].copy_(value)
        tensors["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for actual, wanted in zip(captured, ops.block_attention_rows(**tensors, max_seq_len=517, g=16), strict=True):
            assert_same_bits(actual, wanted)
        on_cpu = {name: t.cpu() for name, t in tensors.items()}
        exact = reference.block_attention_rows(**on_cpu, max_seq_len=517, g=16, upcast=True)[2]
        assert_log_mass_close(captured[2].cpu(), exact, dim=2)


@gpu
def test_cuda_opcheck():
    case = CUDA_ATTENTION_CASES["causal"]
    tensors, options = case.tensors(device="cuda"), on_cuda({**case.options, "g": 32})
    op = torch.ops.mage.block_attention_rows.default
    assert set(torch.library.opcheck(op, tuple(tensors.values()), options).values()) == {"SUCCESS"}


@gpu
def test_cuda_refuses():
    case = replace(CUDA_ATTENTION_CASES["ragged"], lens=(100, 128))
    with pytest.raises(RuntimeError, match=r"block_attention_rows: g must be 16, 32 or 64 on CUDA .*, got 1$"):
        ops.block_attention_rows(**case.tensors(device="cuda"), max_seq_len=128, g=1)
    with pytest.raises(RuntimeError, match="block_attention_rows: q must be bfloat16 or float16 on CUDA, got float32"):
        ops.block_attention_rows(**replace(case, dtype=torch.float32).tensors(device="cuda"), max_seq_len=128)
