"""sparse_block_attention against its float64 twin, and what it refuses.

Run: pytest tests/python/test_sparse_block_attention.py
"""

import math
from dataclasses import replace

import pytest
import torch

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES, BF16, CUDA_ATTENTION_CASES, FP16, AttentionCase, on_cuda
from mage_ext.testing.compare import (
    assert_cuda_out_close,
    assert_lse_close,
    assert_out_close,
    assert_same_bits,
    masked_attention,
    torch_attention,
)
from test_block_attention import LONG_CASES, assert_requests_close, fused_attention

INT = torch.int32
gpu = pytest.mark.gpu


def lists(case, g, keep, spare=2):
    """Random lists per KV head over the prefix: indices with `spare` unused entries, counts, tail_start.

    keep: share of the units listed; 1 lists all, 0 none.
    """
    random = torch.Generator().manual_seed(7)
    prefix = [max(0, min(n, case.longest) - case.q_len) for n in case.lens]
    capacity = max([0, *prefix]) // g + spare
    indices = torch.full((len(case.lens), case.kv_heads, capacity), -1, dtype=INT)
    counts = torch.zeros(len(case.lens), case.kv_heads, dtype=INT)
    for b, tokens in enumerate(prefix):
        for h in range(case.kv_heads):
            chosen = (torch.rand(tokens // g, generator=random) < keep).nonzero().flatten()
            indices[b, h, : len(chosen)], counts[b, h] = chosen, len(chosen)
    return {"indices": indices, "counts": counts, "tail_start": torch.tensor(prefix, dtype=INT) // g * g}


RUNS = [
    ("all_ones", 1, 0.5),
    ("one_token", 16, 0.5),
    ("one_row", 1, 0.3),
    ("block_of_135m", 32, 0.5),
    ("block_of_135m", 1, 0.2),
    ("block_of_7b", 64, 0.4),
    ("block_of_7b", 16, 0.1),
    ("ragged", 16, 0.5),
    ("ragged", 1, 0.7),
    ("ragged_half", 32, 0.0),
    ("rows_exceed_tokens", 16, 1.0),
    ("page_of_1", 1, 0.5),
    ("page_of_1_hnd", 16, 0.5),
    ("page_of_128", 64, 0.5),
    ("page_of_256", 32, 0.6),
    ("no_groups", 16, 0.5),
    ("head_dim_24", 1, 0.5),
    ("head_dim_512", 16, 0.4),
    ("many_rows", 16, 0.5),
    ("prefill_chunk", 32, 0.5),
    ("causal", 16, 0.3),
    ("rows_without_tokens", 32, 0.5),
    ("invalid_pages", 16, 0.7),
    ("one_winner", 32, 0.5),
    ("split_by_64", 64, 0.8),
    ("split_by_192", 16, 0.5),
    ("long", 1, 0.25),
    ("longer_than_max", 16, 0.5),
    ("room_to_spare", 64, 1.0),
    ("fused_projection", 32, 0.5),
    ("no_requests", 32, 0.5),
]


def masked_peer(case, tensors, chosen, g):
    """torch's attention per KV head with the unlisted tokens masked, in the case's own dtype."""
    group = case.heads // case.kv_heads
    out = torch.zeros_like(tensors["q"])
    for b, length in enumerate(case.lens):
        length = min(length, case.longest)
        if length == 0:
            continue
        positions = torch.arange(length)
        for h in range(case.kv_heads):
            units = chosen["indices"][b, h, : int(chosen["counts"][b, h])].long()
            tail = int(chosen["tail_start"][b])
            seen = (positions >= tail) | torch.isin(positions // g, units)
            keep = positions[seen]
            k, valid = reference._tokens(tensors["k_cache"][:, :, h : h + 1], tensors["block_table"][b], keep)
            v, _ = reference._tokens(tensors["v_cache"][:, :, h : h + 1], tensors["block_table"][b], keep)
            visible = valid[None].expand(case.q_len, -1)
            if case.kv_lens() is not None:
                visible = visible & (keep < case.kv_lens()[b][:, None])
            mine = slice(h * group, (h + 1) * group)
            k, v = (x.transpose(0, 1).expand(group, -1, -1) for x in (k, v))
            out[b, :, mine] = masked_attention(tensors["q"][b, :, mine], k, v, visible, case.softmax_scale)
    return out


@pytest.mark.parametrize(("name", "g", "keep"), RUNS)
def test_matches_reference(name, g, keep):
    """Tokens that are not listed are not read: they are NaN in the operator's pools, but not in the twin's."""
    case = ATTENTION_CASES[name]
    tensors, chosen = case.tensors(), lists(case, g, keep)
    exact_out, exact_lse = reference.sparse_block_attention(**tensors, **chosen, g=g, **case.options, upcast=True)
    peer = masked_peer(case, tensors, chosen, g)
    poison_unlisted(case, tensors, chosen, g)
    out, lse = ops.sparse_block_attention(**tensors, **chosen, g=g, **case.options)
    assert_lse_close(lse, exact_lse)
    assert_out_close(out, exact_out, peer)


def poison_unlisted(case, tensors, chosen, g):
    """NaN into every token of a KV head that neither its list nor the tail names."""
    for b, length in enumerate(case.lens):
        for h in range(case.kv_heads):
            listed = torch.zeros(length, dtype=torch.bool)
            for unit in chosen["indices"][b, h, : int(chosen["counts"][b, h])].tolist():
                listed[unit * g : (unit + 1) * g] = True
            listed[int(chosen["tail_start"][b]) :] = True
            position = (~listed).nonzero().flatten()
            page = tensors["block_table"][b].cpu()[position // case.page].long()
            inside = (page >= 0) & (page < len(tensors["k_cache"]))
            for name in ("k_cache", "v_cache"):
                tensors[name][page[inside], position[inside] % case.page, h] = math.nan


@pytest.mark.parametrize("g", [1, 16, 32, 64])
@pytest.mark.parametrize("name", ["ragged", "block_of_135m", "causal", "split_by_64"])
def test_full_list_equals_exact_attention(name, g):
    """Bit for bit with the same splits; and whatever the splits, within the tolerance."""
    case = ATTENTION_CASES[name]
    tensors, chosen = case.tensors(), lists(case, g, 1.0)
    options = {**case.options, "split_tokens": 256}
    exact = ops.block_attention(**tensors, **options)
    actual = ops.sparse_block_attention(**tensors, **chosen, g=g, **options)
    assert_same_bits(actual[0], exact[0])
    assert_same_bits(actual[1], exact[1])
    exact_out, exact_lse = reference.block_attention(**tensors, **case.options, upcast=True)
    out, lse = ops.sparse_block_attention(**tensors, **chosen, g=g, **case.options)
    assert_lse_close(lse, exact_lse)
    assert_out_close(out, exact_out, torch_attention(**tensors, **case.options))


def test_skipped_entries():
    """Repeated, falling, negative and far entries, and those at or past tail_start, add nothing; counts are clamped."""
    case = replace(ATTENTION_CASES["one_row"], lens=(200,), heads=3, kv_heads=1)
    tensors = case.tensors()
    clean = torch.tensor([[[1, 4, 7]]], dtype=INT)
    dirty = torch.tensor([[[-3, 1, 1, 4, 4, 2, 7, 3, 9, 2**31 - 1]]], dtype=INT)
    tail = torch.tensor([144], dtype=INT)
    expected = ops.sparse_block_attention(
        **tensors, indices=clean, counts=torch.tensor([[3]], dtype=INT), tail_start=tail, g=16, **case.options
    )
    for count in (10, 100):
        actual = ops.sparse_block_attention(
            **tensors, indices=dirty, counts=torch.tensor([[count]], dtype=INT), tail_start=tail, g=16, **case.options
        )
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])
    nothing = {"counts": torch.tensor([[-4]], dtype=INT), "tail_start": torch.tensor([2**31 - 1], dtype=INT)}
    out, lse = ops.sparse_block_attention(**tensors, indices=dirty, **nothing, g=16, **case.options)
    assert (out == 0).all() and (lse == -math.inf).all()
    everything = {"counts": torch.tensor([[0]], dtype=INT), "tail_start": torch.tensor([-9], dtype=INT)}
    out, lse = ops.sparse_block_attention(**tensors, indices=dirty, **everything, g=16, **case.options)
    exact = ops.block_attention(**tensors, **case.options)
    assert_same_bits(out, exact[0])
    assert_same_bits(lse, exact[1])


def test_a_falling_list_is_compared_with_predecessors():
    """An entry is held against the one before it alone, skipped or not: what comes again after a fall counts again."""
    case = replace(ATTENTION_CASES["one_row"], lens=(200,), heads=3, kv_heads=1)
    tensors = case.tensors()
    listed = {"indices": torch.tensor([[[5, 2, 5, -1, 0, 99, 7]]], dtype=INT), "counts": torch.tensor([[7]], dtype=INT)}
    listed["tail_start"] = torch.tensor([144], dtype=INT)
    taken = torch.cat([torch.arange(u * 16, u * 16 + 16) for u in (5, 5, 0)] + [torch.arange(144, 200)])
    k, v = (
        tensors[name][tensors["block_table"][0][taken // 16].long(), taken % 16, 0].double()
        for name in ("k_cache", "v_cache")
    )
    scores = tensors["q"][0, 0].double() @ k.T * 64**-0.5
    exact, exact_lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    twin, twin_lse = reference.sparse_block_attention(**tensors, **listed, g=16, **case.options, upcast=True)
    torch.testing.assert_close(twin[0, 0], exact)
    torch.testing.assert_close(twin_lse[0, :, 0], exact_lse)
    out, lse = ops.sparse_block_attention(**tensors, **listed, g=16, **case.options)
    assert_lse_close(lse, twin_lse)
    peer = torch.nn.functional.scaled_dot_product_attention(
        tensors["q"].transpose(1, 2), *(x.float().expand(1, 3, -1, -1) for x in (k, v))
    )
    assert_out_close(out, twin, peer.transpose(1, 2))


def test_unit_across_tail_start_counts_once():
    """tail_start need not be a multiple of g: a listed unit that crosses it is cut there."""
    case = replace(ATTENTION_CASES["one_row"], lens=(200,))
    tensors = case.tensors()
    full = torch.arange(4, dtype=INT).expand(1, 3, 4).contiguous()
    listed = {"indices": full, "counts": torch.full((1, 3), 4, dtype=INT), "tail_start": torch.tensor([100], dtype=INT)}
    options = {**case.options, "split_tokens": 64}
    actual = ops.sparse_block_attention(**tensors, **listed, g=32, **options)
    exact = ops.block_attention(**tensors, **options)
    assert_same_bits(actual[0], exact[0])
    assert_same_bits(actual[1], exact[1])


def test_long_tail():
    """A tail far longer than the lists (tokens committed since the selection) is attended whole."""
    case = replace(ATTENTION_CASES["long"], lens=(2300, 900))
    tensors = case.tensors()
    listed = {"indices": torch.zeros(2, 1, 1, dtype=INT), "counts": torch.ones(2, 1, dtype=INT)}
    listed["tail_start"] = torch.tensor([64, 128], dtype=INT)
    exact_out, exact_lse = reference.sparse_block_attention(**tensors, **listed, g=64, **case.options, upcast=True)
    out, lse = ops.sparse_block_attention(**tensors, **listed, g=64, **case.options)
    assert_lse_close(lse, exact_lse)
    assert_out_close(out, exact_out, masked_peer(case, tensors, listed, 64))


def test_repeats_bit_for_bit_on_any_number_of_threads():
    case = ATTENTION_CASES["block_of_7b"]
    tensors, chosen = case.tensors(), lists(case, 16, 0.5)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.ops.mage.set_num_threads(threads)
            results.append(ops.sparse_block_attention(**tensors, **chosen, g=16, **case.options))
    finally:
        torch.ops.mage.set_num_threads(0)
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("name", ["ragged", "block_of_135m", "no_requests"])
def test_out_twin_writes_everything(name):
    case = ATTENTION_CASES[name]
    tensors, chosen = case.tensors(), lists(case, 16, 0.5)
    expected = ops.sparse_block_attention(**tensors, **chosen, g=16, **case.options)
    out, lse = torch.full_like(expected[0], math.nan), torch.full_like(expected[1], math.nan)
    size = ops.sparse_block_attention_workspace(
        len(case.lens),
        case.q_len,
        case.heads,
        case.kv_heads,
        case.head_dim,
        case.longest,
        16,
        chosen["indices"].shape[2],
    )
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    ops.sparse_block_attention_out(**tensors, **chosen, out=out, lse=lse, workspace=workspace, g=16, **case.options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


BAD = {
    "g": ({"g": 128}, "g must be .*1, 16, 32.*64, got 128"),
    "indices_dtype": ({"indices": torch.zeros(2, 2, 3, dtype=torch.int64)}, "indices must be int32, got int64"),
    "indices_rank": ({"indices": torch.zeros(2, 3, dtype=INT)}, "indices must be a tensor of rank 3"),
    "indices_heads": (
        {"indices": torch.zeros(2, 1, 3, dtype=INT)},
        r"indices must be of shape \[B, Hkv, Kmax\] = \[2, 2, 3\], got \[2, 1, 3\]",
    ),
    "indices_strided": ({"indices": torch.zeros(2, 3, 2, dtype=INT).mT}, "indices must be contiguous"),
    "counts_dtype": ({"counts": torch.zeros(2, 2)}, "counts must be int32, got float32"),
    "counts_shape": ({"counts": torch.zeros(2, 3, dtype=INT)}, r"counts must be of shape \[B, Hkv\] = \[2, 2\]"),
    "tail_start_dtype": ({"tail_start": torch.zeros(2).long()}, "tail_start must be int32, got int64"),
    "tail_start_shape": ({"tail_start": torch.zeros(3, dtype=INT)}, r"tail_start must be of shape \[B\] = \[2\]"),
    "max_seq_len": ({"max_seq_len": 0}, "max_seq_len must be in .*, got 0"),
    "split_tokens": ({"split_tokens": 65}, "split_tokens must be 0 or a positive multiple of 64, got 65"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    options, message = BAD[name]
    case = replace(ATTENTION_CASES["ragged"], lens=(100, 128))
    good = {"indices": torch.zeros(2, 2, 3, dtype=INT), "counts": torch.zeros(2, 2, dtype=INT), "g": 16}
    good |= {"tail_start": torch.zeros(2, dtype=INT), "max_seq_len": 128}
    for op in (ops.sparse_block_attention, torch.ops.mage.sparse_block_attention):
        with pytest.raises((ValueError, RuntimeError), match="sparse_block_attention: " + message):
            op(**case.tensors(), **{**good, **options})


def test_debug_switch_names_the_value():
    case = replace(ATTENTION_CASES["ragged"], lens=(100, 128))
    good = {"indices": torch.tensor([[[0, 2], [1, 3]]] * 2, dtype=INT), "counts": torch.full((2, 2), 2, dtype=INT)}
    good |= {"tail_start": torch.tensor([64, 64], dtype=INT), "g": 16, "max_seq_len": 128}
    falling = good["indices"].clone()
    falling[1, 0, 1] = 0
    was_on = ops.set_debug(True)
    try:
        ops.sparse_block_attention(**case.tensors(), **good)
        with pytest.raises(RuntimeError, match=r"sparse_block_attention: indices.* must be .*, got 0"):
            ops.sparse_block_attention(**case.tensors(), **good | {"indices": falling})
        with pytest.raises(RuntimeError, match=r"sparse_block_attention: counts.* must be .*, got 3"):
            ops.sparse_block_attention(**case.tensors(), **good | {"counts": torch.full((2, 2), 3, dtype=INT)})
    finally:
        ops.set_debug(was_on)


# --- CUDA ------------------------------------------------------------------------------------------------------------


def cuda_inputs(case, g, keep, seed=0):
    """Tensors and lists on the GPU."""
    return case.tensors(seed, device="cuda"), on_cuda(lists(case, g, keep))


@gpu
@pytest.mark.parametrize(("name", "g", "keep"), [run for run in RUNS if run[0] in CUDA_ATTENTION_CASES])
def test_cuda_matches_reference(name, g, keep):
    """Tokens that are not listed are NaN in the operator's pools, but not in the twin's."""
    case = CUDA_ATTENTION_CASES[name]
    tensors, chosen = case.tensors(), lists(case, g, keep)
    exact, exact_lse = reference.sparse_block_attention(**tensors, **chosen, g=g, **case.options, upcast=True)
    tensors["v_cache"] = tensors["v_cache"].abs()
    size = reference.sparse_block_attention(**tensors, **chosen, g=g, **case.options, upcast=True)[0]
    tensors = case.tensors(device="cuda")
    poison_unlisted(case, tensors, chosen, g)
    out, lse = ops.sparse_block_attention(**tensors, **on_cuda(chosen), g=g, **on_cuda(case.options))
    assert out.is_cuda and lse.is_cuda and out.dtype == case.dtype and out.is_contiguous() and lse.is_contiguous()
    assert_lse_close(lse.cpu(), exact_lse)
    assert_cuda_out_close(out.cpu(), exact, size, case.longest)


def listed_streams(tensors, chosen, g):
    """Request, query heads, k and v [T, D] of every KV head whose valid, ascending list and tail have tokens."""
    q, kv_heads = tensors["q"], tensors["k_cache"].shape[2]
    group, page = q.shape[2] // kv_heads, tensors["k_cache"].shape[1]
    for b, length in enumerate(tensors["seq_lens"].tolist()):
        for h in range(kv_heads):
            units = chosen["indices"][b, h, : int(chosen["counts"][b, h])].long()
            tail = min(int(chosen["tail_start"][b]), length)
            listed = (units[:, None] * g + torch.arange(g, device=q.device)).flatten()
            token = torch.cat([listed, torch.arange(tail, length, device=q.device)])
            if len(token):
                pages, slot = tensors["block_table"][b].long()[token // page], token % page
                k, v = (tensors[name][pages, slot, h] for name in ("k_cache", "v_cache"))
                yield b, slice(h * group, (h + 1) * group), k, v


def exact_lists(tensors, chosen, g):
    """float64 attention over the lists where the tensors are: out, sum w |v|, lse."""
    q = tensors["q"]
    out = q.new_zeros(q.shape, dtype=torch.float64)
    size, lse = torch.zeros_like(out), out.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    for b, mine, k, v in listed_streams(tensors, chosen, g):
        scores = torch.einsum("qhd,td->hqt", q[b, :, mine].double(), k.double()) * q.shape[-1] ** -0.5
        lse[b, mine] = scores.logsumexp(-1)
        for result, values in ((out, v.double()), (size, v.double().abs())):
            result[b, :, mine] = torch.einsum("hqt,td->qhd", scores.softmax(-1), values)
    return out, size, lse


def fused_lists(tensors, chosen, g):
    """torch's attention over the lists, in their dtype."""
    out = torch.zeros_like(tensors["q"])
    for b, mine, k, v in listed_streams(tensors, chosen, g):
        out[b, :, mine] = fused_attention(tensors["q"][b, :, mine], k[:, None], v[:, None])
    return out


# Blocks of 32 of 8B, 7B, 1.5B and 135M models over thousands of tokens, one of 64, a sub-block of 8, long streams.
LARGE_CASES = {
    "8b": AttentionCase((8224,), 32, 32, 8, 128, dtype=BF16),
    "7b": AttentionCase((0, 8224, 65), 32, 28, 4, 128, dtype=BF16),
    "1.5b": AttentionCase((0, 1, 63, 2048, 5000), 32, 12, 2, 128, page=16, layout="hnd", dtype=FP16),
    "135m": AttentionCase((300, 2077), 32, 9, 3, 64, page=256, layout="interleaved", dtype=BF16),
    "block_of_64": AttentionCase((1500, 200), 64, 28, 4, 128, page=1, dtype=BF16),
    "sub_block": AttentionCase((8200,), 8, 28, 4, 128, dtype=BF16),
    **LONG_CASES,
}


@gpu
@pytest.mark.parametrize("g", [1, 16, 32, 64])
@pytest.mark.parametrize("name", LARGE_CASES)
def test_cuda_matches_float64_on_the_gpu(name, g):
    case = LARGE_CASES[name]
    for keep in (0.1, 0.5):
        tensors, chosen = cuda_inputs(case, g, keep)
        exact, size, exact_lse = exact_lists(tensors, chosen, g)
        peer = fused_lists(tensors, chosen, g)
        for split_tokens in (0, 320):
            out, lse = ops.sparse_block_attention(
                **tensors, **chosen, g=g, max_seq_len=case.longest, split_tokens=split_tokens
            )
            assert_lse_close(lse, exact_lse)
            assert_cuda_out_close(out, exact, size, case.longest)
            assert_requests_close(out, exact, peer)


@gpu
@pytest.mark.parametrize("g", [1, 16, 32, 64])
@pytest.mark.parametrize("name", ["ragged", "block_of_7b", "causal", "split_by_64"])
def test_cuda_full_list_equals_exact_attention(name, g):
    case = CUDA_ATTENTION_CASES[name]
    tensors, chosen = cuda_inputs(case, g, 1.0)
    out, lse = ops.sparse_block_attention(**tensors, **chosen, g=g, **on_cuda(case.options))
    exact, exact_lse = ops.block_attention(**tensors, **on_cuda(case.options))
    assert_lse_close(lse.cpu(), exact_lse.cpu())
    tensors["v_cache"] = tensors["v_cache"].abs()
    size = ops.block_attention(**tensors, **on_cuda(case.options))[0].cpu().double()
    # Both are rounded, so they may be twice as far apart as one of them from the truth.
    assert_cuda_out_close(out.cpu(), exact.cpu().double(), 2 * size, case.longest)


@gpu
def test_cuda_skipped_entries():
    """As on the CPU: repeats, falling, negative and far entries add nothing; counts and tails are clamped."""
    case = replace(CUDA_ATTENTION_CASES["one_row"], lens=(200,), heads=3, kv_heads=1)
    tensors = case.tensors(device="cuda")
    clean = torch.tensor([[[1, 4, 7]]], dtype=INT, device="cuda")
    dirty = torch.tensor([[[-3, 1, 1, 4, 4, 2, 7, 3, 9, 2**31 - 1]]], dtype=INT, device="cuda")

    def call(indices, count, tail):
        listed = {"indices": indices, "counts": torch.tensor([[count]], dtype=INT, device="cuda")}
        listed["tail_start"] = torch.tensor([tail], dtype=INT, device="cuda")
        return ops.sparse_block_attention(**tensors, **listed, g=16, **case.options)

    exact, size, exact_lse = exact_lists(
        tensors, {"indices": clean, "counts": torch.tensor([[3]]), "tail_start": torch.tensor([144])}, 16
    )
    for indices, count in ((clean, 3), (dirty, 10), (dirty, 100), (dirty, 2**31 - 1)):
        out, lse = call(indices, count, 144)
        assert_lse_close(lse, exact_lse)
        assert_cuda_out_close(out, exact, size, 200)
    out, lse = call(dirty, -4, 2**31 - 1)
    assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = call(dirty, 0, -9)
    exact, size, exact_lse = exact_lists(
        tensors, {"indices": clean, "counts": torch.tensor([[0]]), "tail_start": torch.tensor([0])}, 16
    )
    assert_lse_close(lse, exact_lse)
    assert_cuda_out_close(out, exact, size, 200)


@gpu
@pytest.mark.parametrize(
    ("name", "g"), [("block_of_7b", 64), ("block_of_7b", 1), ("ragged", 16), ("many_rows", 16), ("split_by_64", 32)]
)
def test_cuda_repeats_bit_for_bit(name, g):
    case = CUDA_ATTENTION_CASES[name]
    tensors, chosen = cuda_inputs(case, g, 0.5)
    options = on_cuda(case.options)
    expected = ops.sparse_block_attention(**tensors, **chosen, g=g, **options)
    for _ in range(100):
        actual = ops.sparse_block_attention(**tensors, **chosen, g=g, **options)
        for ours, wanted in zip(actual, expected, strict=True):
            assert_same_bits(ours, wanted)


@gpu
@pytest.mark.parametrize("g", [1, 16, 64])
@pytest.mark.parametrize("layout", ["hnd", "interleaved"])
def test_cuda_layouts_give_the_same_bits(layout, g):
    case = CUDA_ATTENTION_CASES["block_of_7b"]
    results = []
    for each in ("nhd", layout):
        tensors, chosen = cuda_inputs(replace(case, layout=each), g, 0.5)
        results.append(ops.sparse_block_attention(**tensors, **chosen, g=g, **case.options))
    for ours, wanted in zip(*results, strict=True):
        assert_same_bits(ours, wanted)


@gpu
@pytest.mark.parametrize("g", [1, 32])
@pytest.mark.parametrize("name", ["ragged", "block_of_7b", "prefill_chunk", "split_by_64", "no_requests"])
def test_cuda_out_twin_writes_everything(name, g):
    case = CUDA_ATTENTION_CASES[name]
    tensors, chosen = cuda_inputs(case, g, 0.5)
    options = on_cuda(case.options)
    expected = ops.sparse_block_attention(**tensors, **chosen, g=g, **options)
    out, lse = (torch.full_like(t, math.nan) for t in expected)
    sizes = (len(case.lens), case.q_len, case.heads, case.kv_heads, case.head_dim, case.longest)
    size = ops.sparse_block_attention_workspace(*sizes, g, chosen["indices"].shape[2], case.split_tokens)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    ops.sparse_block_attention_out(**tensors, **chosen, out=out, lse=lse, workspace=workspace, g=g, **options)
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


@gpu
@pytest.mark.parametrize("split_tokens", [0, 128])
@pytest.mark.parametrize("g", [1, 16, 64])
def test_cuda_graph_follows_new_lists(g, split_tokens):
    """A captured call reads lists, counts, tails, lengths, tables and tokens when the graph is replayed."""
    case = replace(CUDA_ATTENTION_CASES["block_of_7b"], lens=(517, 517), layout="nhd")
    tensors, chosen = cuda_inputs(case, g, 0.5)
    options = {"g": g, "max_seq_len": 517, "split_tokens": split_tokens}
    ops.sparse_block_attention(**tensors, **chosen, **options)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.sparse_block_attention(**tensors, **chosen, **options)
    for seed, (lens, keep) in enumerate([((517, 64), 0.2), ((0, 300), 1.0), ((0, 0), 0.5), ((64, 517), 0.0)]):
        for name, value in case.tensors(seed + 1, device="cuda").items():
            tensors[name].copy_(value)
        tensors["seq_lens"].copy_(torch.tensor(lens, dtype=INT))
        prefix = torch.tensor(lens) * 3 // 4 // g * g
        for b, tokens in enumerate(prefix.tolist()):
            for h in range(case.kv_heads):
                units = (torch.rand(tokens // g) < keep).nonzero().flatten()
                chosen["indices"][b, h].fill_(-1)[: len(units)] = units.cuda()
                chosen["counts"][b, h] = len(units)
        chosen["tail_start"].copy_(prefix)
        graph.replay()
        torch.cuda.synchronize()
        expected = ops.sparse_block_attention(**tensors, **chosen, **options)
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])
        exact, size, exact_lse = exact_lists(tensors, chosen, g)
        assert_lse_close(lse, exact_lse)
        assert_cuda_out_close(out, exact, size, 517)


@gpu
def test_cuda_streams_run_at_once():
    calls = []
    for name, g in (("block_of_7b", 16), ("block_of_135m", 1)):
        tensors, chosen = cuda_inputs(CUDA_ATTENTION_CASES[name], g, 0.5)
        calls.append({**tensors, **chosen, "g": g, **CUDA_ATTENTION_CASES[name].options})
    expected = [ops.sparse_block_attention(**call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.sparse_block_attention(**call))
    torch.cuda.synchronize()
    for i, actual in enumerate(results):
        assert_same_bits(actual[0], expected[i % 2][0])
        assert_same_bits(actual[1], expected[i % 2][1])


@gpu
@pytest.mark.parametrize("key", [101.0, 102.0, -200.0])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_cuda_equal_scores_weigh_the_same_however_large(dtype, key):
    """scale * q k log2(e), of 2^24 and more, is rounded by up to 32: a short list must not show that."""
    case = replace(CUDA_ATTENTION_CASES["block_of_135m"], lens=(517,), dtype=dtype, softmax_scale=65536.0)
    tensors, chosen = cuda_inputs(case, 16, 0.4)
    tensors["q"].fill_(10.0)
    tensors["q"][..., 63] = 1.0
    tensors["k_cache"].fill_(10.0)
    tensors["k_cache"][..., 63] = key  # q k = 6300 + key
    out, lse = ops.sparse_block_attention(**tensors, **chosen, g=16, **on_cuda(case.options))
    assert (lse / (65536.0 * (6300 + key)) - 1).abs().max() < 1e-6
    tensors["q"].zero_()
    mean, _ = ops.sparse_block_attention(**tensors, **chosen, g=16, **on_cuda(case.options))
    assert_same_bits(out, mean)


@gpu
def test_cuda_nan_of_a_listed_token_shows():
    """In out and lse of the rows of its KV head, and of no others; that of an unlisted one nowhere."""
    case = replace(CUDA_ATTENTION_CASES["one_row"], lens=(130,))
    tensors = case.tensors(device="cuda")
    listed = {"indices": torch.tensor([[[1, 4], [2, 3], [4, 5]]], dtype=INT, device="cuda")}
    listed |= {"counts": torch.full((1, 3), 2, dtype=INT, device="cuda")}
    listed["tail_start"] = torch.tensor([112], dtype=INT, device="cuda")
    tensors["k_cache"][tensors["block_table"][0, 4].item(), 3, :2, 5] = math.nan
    out, lse = ops.sparse_block_attention(**tensors, **listed, g=16, **case.options)
    assert out[:, :, :3].isnan().all() and lse[:, :3].isnan().all()
    assert not out[:, :, 3:].isnan().any() and not lse[:, 3:].isnan().any()


@gpu
def test_cuda_opcheck():
    case = CUDA_ATTENTION_CASES["causal"]
    tensors, chosen = cuda_inputs(case, 16, 0.5)
    options = {"g": 16, **on_cuda(case.options)}
    inputs = (*tensors.values(), *chosen.values())
    results = torch.library.opcheck(torch.ops.mage.sparse_block_attention.default, inputs, options)
    assert set(results.values()) == {"SUCCESS"}
    size = ops.sparse_block_attention_workspace(2, 37, 4, 2, 64, 150, 16, chosen["indices"].shape[2])
    out = torch.empty_like(tensors["q"], memory_format=torch.contiguous_format)
    rest = (out, torch.empty(2, 4, 37, device="cuda"), torch.empty(size, dtype=torch.uint8, device="cuda"))
    op = torch.ops.mage.sparse_block_attention_out.default
    assert set(torch.library.opcheck(op, (*inputs, *rest), options).values()) == {"SUCCESS"}


BAD_CUDA = {
    "float32": (
        lambda a: {n: a[n].float() for n in ("q", "k_cache", "v_cache")},
        "q must be bfloat16 or float16 on CUDA, got float32",
    ),
    "head_dim": (
        lambda a: {n: a[n].new_zeros(*a[n].shape[:-1], 96) for n in ("q", "k_cache", "v_cache")},
        "the head dim of q must be 64 or 128 on CUDA, got 96",
    ),
    "indices_device": (lambda a: {"indices": a["indices"].cpu()}, "indices must be on cuda:0.*, got cpu"),
    "counts_device": (lambda a: {"counts": a["counts"].cpu()}, "counts must be on cuda:0.*, got cpu"),
    "tail_start_device": (lambda a: {"tail_start": a["tail_start"].cpu()}, "tail_start must be on cuda:0.*, got cpu"),
    "g": (lambda a: {"g": 8}, "g must be .*1, 16, 32.*64, got 8"),
    "table": (lambda a: {"max_seq_len": 129}, "block_table must have pages for max_seq_len = 129 tokens, got 4 pages"),
}


@gpu
@pytest.mark.parametrize("name", BAD_CUDA)
def test_cuda_refuses(name):
    change, message = BAD_CUDA[name]
    tensors, chosen = cuda_inputs(replace(ATTENTION_CASES["ragged"], lens=(100, 128), dtype=BF16), 16, 0.5)
    arguments = {**tensors, **chosen, "g": 16, "max_seq_len": 128}
    arguments |= change(arguments)
    with pytest.raises((ValueError, RuntimeError), match="sparse_block_attention: " + message):
        ops.sparse_block_attention(**arguments)


@gpu
def test_cuda_refuses_a_small_workspace():
    tensors, chosen = cuda_inputs(replace(ATTENTION_CASES["ragged"], lens=(100, 128), dtype=BF16), 16, 0.5)
    arguments = {**tensors, **chosen, "g": 16, "max_seq_len": 128}
    arguments |= {"out": torch.full_like(tensors["q"], 7.0), "lse": torch.full((2, 4, 8), 7.0, device="cuda")}
    workspace = torch.zeros(64, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match=r"sparse_block_attention: workspace must have at least .* bytes, got 64"):
        ops.sparse_block_attention_out(**arguments, workspace=workspace)
    assert (arguments["out"] == 7).all() and (arguments["lse"] == 7).all()


@gpu
def test_cuda_debug_switch_names_the_value():
    tensors, chosen = cuda_inputs(replace(ATTENTION_CASES["ragged"], lens=(100, 128), dtype=BF16), 16, 1.0)
    arguments = {**tensors, **chosen, "g": 16, "max_seq_len": 128}
    falling = chosen["indices"].clone()
    falling[1, 0, 2] = 0
    was_on = ops.set_debug(True)
    try:
        ops.sparse_block_attention(**arguments)
        with pytest.raises(
            RuntimeError,
            match=r"sparse_block_attention: indices\[1, 0, 2\] must be above the entry before it, .*, got 0",
        ):
            ops.sparse_block_attention(**arguments | {"indices": falling})
    finally:
        ops.set_debug(was_on)
