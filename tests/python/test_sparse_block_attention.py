"""sparse_block_attention against its float64 twin, and what it refuses.

Run: pytest tests/python/test_sparse_block_attention.py
"""

import math
from dataclasses import replace

import pytest
import torch

from mage_ext import ops, reference
from mage_ext.testing.cases import ATTENTION_CASES
from mage_ext.testing.compare import (
    assert_lse_close,
    assert_out_close,
    assert_same_bits,
    masked_attention,
    torch_attention,
)

INT = torch.int32


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
    if case.kv_heads == 1:
        poison_unlisted(case, tensors, chosen, g)
    out, lse = ops.sparse_block_attention(**tensors, **chosen, g=g, **case.options)
    assert_lse_close(lse, exact_lse)
    assert_out_close(out, exact_out, peer)


def poison_unlisted(case, tensors, chosen, g):
    """NaN into every token that no list and no tail names; for one KV head."""
    for b, length in enumerate(case.lens):
        listed = torch.zeros(length, dtype=torch.bool)
        for unit in chosen["indices"][b, 0, : int(chosen["counts"][b, 0])].tolist():
            listed[unit * g : (unit + 1) * g] = True
        listed[int(chosen["tail_start"][b]) :] = True
        position = (~listed).nonzero().flatten()
        page = tensors["block_table"][b][position // case.page].long()
        inside = (page >= 0) & (page < len(tensors["k_cache"]))
        for name in ("k_cache", "v_cache"):
            tensors[name][page[inside], position[inside] % case.page] = math.nan


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
