"""Every operator over paged K and V, wherever these lie: pools of more than 2^32 elements, tables whose rows lie apart,
pools that none of them takes. Each test runs on the CPU, and in its full size on a GPU.

Run: pytest tests/python/test_paged_pools.py
"""

import os
from dataclasses import replace

import pytest
import torch

from mage_ext import ops
from mage_ext.testing.cases import BF16, AttentionCase
from mage_ext.testing.compare import assert_same_bits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INT = torch.int32
CASE = AttentionCase((300,), 32, 14, 2, 128, dtype=BF16)


def sparse(tensors, most, g):
    """Every other unit of the first half, and the second half."""
    batch, kv_heads = len(tensors["q"]), tensors["k_cache"].shape[2]
    units = torch.arange(0, most // g, 2, dtype=INT, device=tensors["q"].device)
    lists = {"indices": units.expand(batch, kv_heads, -1).contiguous()}
    lists["counts"] = torch.full((batch, kv_heads), len(units), dtype=INT, device=units.device)
    lists["tail_start"] = tensors["seq_lens"] // 2 // g * g
    return ops.sparse_block_attention(**tensors, **lists, g=g, max_seq_len=most)


def token_mass(tensors, most):
    q = tensors["q"]
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), 5.0, device=q.device)
    inputs = {name: tensors[name] for name in ("q", "k_cache", "block_table", "seq_lens")}
    return [ops.token_mass(**inputs, lse=lse, max_seq_len=most)]


def append_kv(tensors, most):
    """Returns the requests' pages as they are afterwards."""
    q, table, pools = tensors["q"], tensors["block_table"], (tensors["k_cache"], tensors["v_cache"])
    k, v = q.split(pools[0].shape[2], 2)[:2]
    ops.append_kv(k, v, *pools, table, tensors["seq_lens"] - q.shape[1])
    return [torch.stack([pool[page] for page in table.flatten().tolist() if page >= 0]) for pool in pools]


CALLS = {  # tensors of an AttentionCase and max_seq_len -> results
    "block_attention": lambda tensors, most: ops.block_attention(**tensors, max_seq_len=most),
    "block_attention_mass": lambda tensors, most: ops.block_attention_mass(**tensors, max_seq_len=most, g=16),
    "block_attention_rows": lambda tensors, most: ops.block_attention_rows(**tensors, max_seq_len=most, g=16),
    "sparse_block_attention g=1": lambda tensors, most: sparse(tensors, most, 1),
    "sparse_block_attention g=16": lambda tensors, most: sparse(tensors, most, 16),
    "token_mass": token_mass,
    "append_kv": append_kv,
}

# --- pools of more than 2^32 elements --------------------------------------------------------------------------------

FAR = 320 * CASE.kv_heads * CASE.head_dim  # elements past the 2^32: all pages of the request but one
FREE_GIB = 24


@pytest.fixture(scope="module", params=DEVICES)
def memory(request):
    """Memory of a K and a V pool, whatever it holds: 2^32 elements and FAR more, 2^20 on the CPU."""
    if request.param == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < FREE_GIB:
            refuse = pytest.fail if os.environ.get("MAGE_REQUIRE_GPU") == "1" else pytest.skip
            refuse(f"needs {FREE_GIB} GiB of free GPU memory, {free:.1f} are free")
    size = (1 << (32 if request.param == "cuda" else 20)) + FAR
    pools = [torch.empty(size, dtype=BF16, device=request.param) for _ in range(2)]
    yield pools
    pools.clear()
    if request.param == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("page", [64, 1])
@pytest.mark.parametrize("name", CALLS)
def test_pages_at_both_ends_of_a_large_pool(memory, name, page):
    """Offsets are 64-bit: the same bits as from a small pool. What offsets of 32 bits would find instead is NaN."""
    tensors = replace(CASE, page=page).tensors(device=memory[0].device)
    shape = tensors["k_cache"].shape[1:]
    pages = memory[0].numel() // shape.numel()
    near = tensors["block_table"][0].tolist()
    far = list(range(pages - 1, pages - len(near), -1))
    far.insert(1, 0)
    large = {**tensors, "block_table": torch.tensor([far], dtype=INT, device=memory[0].device)}
    for pool, flat in zip(("k_cache", "v_cache"), memory, strict=True):
        flat[: 2 * FAR] = torch.nan
        large[pool] = flat.view(pages, *shape)
        for there, here in zip(far, near, strict=True):
            large[pool][there] = tensors[pool][here]
    results = CALLS[name](large, 300), CALLS[name](tensors, 300)
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_rows_of_the_table_may_lie_apart(name, device):
    """The table begins within a wider one, whose other entries name no page."""
    case = replace(CASE, lens=(300, 0, 77), page=32)
    expected = CALLS[name](case.tensors(device=device), 300)
    tensors = case.tensors(device=device)
    wide = torch.full((3, 50), 10**6, dtype=INT, device=device)
    table = wide[:, 1 : 1 + tensors["block_table"].shape[1]]
    tensors["block_table"] = table.copy_(tensors["block_table"])
    assert table.stride() == (50, 1)
    for actual, wanted in zip(CALLS[name](tensors, 300), expected, strict=True):
        assert_same_bits(actual, wanted)


# --- what all of them refuse -----------------------------------------------------------------------------------------

BAD = {  # of a K pool [pages, page, Hkv, D] of bfloat16
    "page": (
        lambda pool: pool.new_zeros(9, 48, *pool.shape[2:]),
        "have pages of 1, 16, 32, 64, 128 or 256 tokens, got 48",
    ),
    "last_stride": (lambda pool: pool.new_zeros(*pool.shape[:-1], 256)[..., ::2], "be of last stride 1, got 2"),
    "alignment": (
        lambda pool: pool.new_zeros(pool.numel() + 1)[1:].view(pool.shape),
        "be aligned to 16 bytes, got a base 2 bytes past it",
    ),
    "stride": (
        lambda pool: pool.new_zeros(*pool.shape[:-1], 132)[..., :128],
        r"have strides of a multiple of 16 bytes and less than 2\^40 bytes, got 264 bytes",
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_refused_pools_name_what_is_taken(name, bad, device):
    change, message = BAD[bad]
    tensors = CASE.tensors(device=device)
    tensors["k_cache"], tensors["v_cache"] = change(tensors["k_cache"]), change(tensors["v_cache"])
    with pytest.raises(RuntimeError, match=f"^{name.split()[0]}: k_cache must {message}"):
        CALLS[name](tensors, 300)
