"""append_kv against its slow twin, and what it refuses. Run: pytest tests/python/test_append_kv.py"""

import pytest
import torch

from mage_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["nhd", "hnd", "interleaved"]
gpu = pytest.mark.gpu

# B, Q, Hkv, D, page, block_table, start
CASES = {
    "one_row": (1, 1, 1, 8, 16, [[0]], [0]),
    "crosses_pages": (2, 33, 4, 128, 16, [[3, 1, 5, 0], [2, 4, 6, 7]], [14, 31]),
    "page_of_one": (1, 5, 2, 64, 1, [[4, 3, 2, 1, 0]], [0]),
    "page_32": (2, 32, 2, 64, 32, [[0, 1], [3, 2]], [0, 17]),
    "page_64": (1, 64, 2, 64, 64, [[1, 0]], [5]),
    "page_128": (2, 7, 1, 128, 128, [[1], [0]], [120, 0]),
    "page_256": (1, 32, 3, 64, 256, [[2]], [200]),
    "dropped_positions": (3, 16, 2, 64, 16, [[0, 1], [2, 3], [4, 5]], [-5, 24, 2**31 - 1]),
    "dropped_pages": (2, 40, 2, 64, 16, [[-1, 1, 2**31 - 1], [8, 0, 2]], [0, 3]),
    "no_requests": (0, 4, 2, 64, 16, [], []),
    "no_rows": (2, 0, 2, 64, 16, [[0], [1]], [0, 0]),
}


def make_pools(layout, pages, page, heads, dim, dtype, device="cpu"):
    """K and V pools [pages, page, Hkv, D] in a layout, full of NaN."""
    if layout == "nhd":
        shape = (2, pages, page, heads, dim)
        k_cache, v_cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
    elif layout == "hnd":
        shape = (2, pages, heads, page, dim)
        k_cache, v_cache = torch.full(shape, float("nan"), dtype=dtype, device=device).transpose(2, 3)
    else:
        shape = (pages, 2, page, heads, dim)
        k_cache, v_cache = torch.full(shape, float("nan"), dtype=dtype, device=device).unbind(1)
    return k_cache, v_cache


def make_inputs(case, layout, dtype, device="cpu"):
    batch, rows, heads, dim, page, table, start = CASES[case]
    pages = 8
    qkv = torch.randn(batch, rows, 3, heads, dim, device=device).to(dtype)  # k and v as a fused projection leaves them
    _, k, v = qkv.unbind(2)
    k_cache, v_cache = make_pools(layout, pages, page, heads, dim, dtype, device)
    block_table = torch.tensor(table, dtype=torch.int32, device=device).reshape(batch, len(table[0]) if table else 1)
    return k, v, k_cache, v_cache, block_table, torch.tensor(start, dtype=torch.int32, device=device)


def assert_same_bits(actual, expected):
    as_int = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.contiguous().view(as_int).cpu(), expected.contiguous().view(as_int).cpu())


def run_both(inputs):
    k, v, k_cache, v_cache, block_table, start = inputs
    expected = k_cache.cpu().clone(), v_cache.cpu().clone()
    reference.append_kv(k.cpu(), v.cpu(), *expected, block_table.cpu(), start.cpu())
    ops.append_kv(k, v, k_cache, v_cache, block_table, start)
    assert_same_bits(k_cache, expected[0])
    assert_same_bits(v_cache, expected[1])
    return k_cache


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, layout):
    """Everything that no token names is still poison: the pools are compared whole, bit by bit."""
    written = run_both(make_inputs(case, layout, torch.bfloat16))
    if case not in ("no_requests", "no_rows"):
        assert written.isnan().any() and not written.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    run_both(make_inputs("crosses_pages", "nhd", dtype))


def test_copies_bits():
    """NaN payloads and infinities arrive unchanged: it is a copy, not arithmetic."""
    k, v, k_cache, v_cache, block_table, start = make_inputs("page_32", "nhd", torch.bfloat16)
    k = torch.randint(-(2**15), 2**15, k.shape, dtype=torch.int16).view(torch.bfloat16)
    run_both((k, v, k_cache, v_cache, block_table, start))


def test_strided_table_and_guard():
    """The table is a slice of a wider one, the pools are slices of a larger buffer: nothing outside is written."""
    k, v, _, _, block_table, start = make_inputs("crosses_pages", "nhd", torch.bfloat16)
    wide = torch.full((2, 9), 7, dtype=torch.int32)
    wide[:, :4] = block_table
    buffer = torch.full((2, 10, 16, 6, 160), float("nan"), dtype=torch.bfloat16)
    k_cache, v_cache = buffer[0, 1:9, :, 1:5, 16:144], buffer[1, 1:9, :, 1:5, 16:144]
    before = buffer.clone()
    run_both((k, v, k_cache, v_cache, wide[:, :4], start))
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[:, 1:9, :, 1:5, 16:144] = False
    assert_same_bits(buffer[outside], before[outside])


def test_many_threads_and_one_agree():
    pools = []
    for threads in (1, 2):
        torch.ops.mage.set_num_threads(threads)
        torch.manual_seed(1)
        pools.append(run_both(make_inputs("crosses_pages", "nhd", torch.float32)))
    torch.ops.mage.set_num_threads(0)
    assert_same_bits(pools[0], pools[1])


BAD = {
    "k_rank": (lambda a: {"k": a["k"][0]}, r"append_kv: k must be a tensor of rank 4, got shape \[32, 2, 64\]"),
    "k_dtype": (lambda a: {"k": a["k"].double()}, "append_kv: k must be bfloat16, float16 or float32, got float64"),
    "v_dtype": (lambda a: {"v": a["v"].half()}, "append_kv: v must be bfloat16, got float16"),
    "v_shape": (
        lambda a: {"v": a["v"][:, :31]},
        r"append_kv: v must be of shape \[B, Q, Hkv, D\] = \[2, 32, 2, 64\], got",
    ),
    "k_cache_dtype": (lambda a: {"k_cache": a["k_cache"].float()}, "append_kv: k_cache must be bfloat16, got float32"),
    "k_cache_rank": (lambda a: {"k_cache": a["k_cache"][0]}, "append_kv: k_cache must be a tensor of rank 4"),
    "v_cache_heads": (lambda a: {"v_cache": a["v_cache"][:, :, :1]}, r"append_kv: v_cache must be of shape \[pages"),
    "v_cache_pages": (lambda a: {"v_cache": a["v_cache"][1:]}, r"append_kv: v_cache must be of shape \[pages"),
    "head_dim": (lambda a: {"k_cache": a["k_cache"][..., :32]}, r"append_kv: k_cache must be of shape \[pages"),
    "page": (
        lambda a: {"k_cache": a["k_cache"][:, :24], "v_cache": a["v_cache"][:, :24]},
        "append_kv: k_cache must have pages of 1, 16, 32, 64, 128 or 256 tokens, got 24",
    ),
    "last_stride": (
        lambda a: {"k_cache": torch.empty(8, 32, 2, 128, dtype=torch.bfloat16)[..., ::2]},
        "append_kv: k_cache must be of last stride 1, got 2",
    ),
    "alignment": (
        lambda a: {"k_cache": torch.empty(8 * 32 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 32, 2, 64)},
        "append_kv: k_cache must be aligned to 16 bytes, got a base 2 bytes past it",
    ),
    "stride": (
        lambda a: {
            "v_cache": torch.empty(8, 2, 32 * 68, dtype=torch.bfloat16).view(8, 2, 32, 68).transpose(1, 2)[..., :64]
        },
        r"append_kv: v_cache must have strides of a multiple of 16 bytes and less than 2\^40 bytes, got 136 bytes",
    ),
    "zero_stride": (
        lambda a: {"k_cache": torch.empty(1, 32, 2, 64, dtype=torch.bfloat16).expand(8, 32, 2, 64)},
        "append_kv: k_cache must be writable, got a stride of 0 in dimension 0",
    ),
    "same_cache": (
        lambda a: {"v_cache": a["k_cache"]},
        "append_kv: v_cache must be another tensor than k_cache, got one that begins where k_cache does",
    ),
    "row_bytes": (
        lambda a: {n: torch.zeros(*a[n].shape[:-1], 4, dtype=torch.bfloat16) for n in ("k", "v", "k_cache", "v_cache")},
        "append_kv: k must have a last dimension of a multiple of 16 bytes, got 4 elements of 2 bytes",
    ),
    "table_dtype": (
        lambda a: {"block_table": a["block_table"].long()},
        "append_kv: block_table must be int32, got int64",
    ),
    "table_rank": (lambda a: {"block_table": a["block_table"][0]}, "append_kv: block_table must be a tensor of rank 2"),
    "table_rows": (
        lambda a: {"block_table": a["block_table"][:1]},
        r"append_kv: block_table must be of shape \[B, max_pages\]",
    ),
    "start_dtype": (lambda a: {"start": a["start"].float()}, "append_kv: start must be int32, got float32"),
    "start_shape": (lambda a: {"start": a["start"][:1]}, r"append_kv: start must be of shape \[B\] = \[2\], got \[1\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    """A bad argument is named, with what was expected and what came, and nothing is written."""
    names = ["k", "v", "k_cache", "v_cache", "block_table", "start"]
    arguments = dict(zip(names, make_inputs("page_32", "nhd", torch.bfloat16), strict=True))
    change, message = BAD[name]
    arguments.update(change(arguments))
    before = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.append_kv(**arguments)
    assert_same_bits(arguments["k_cache"], before[0])
    assert_same_bits(arguments["v_cache"], before[1])


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_cuda_matches_reference(case, layout):
    run_both(make_inputs(case, layout, torch.bfloat16, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_dtypes(dtype):
    run_both(make_inputs("crosses_pages", "nhd", dtype, device="cuda"))


@gpu
def test_cuda_graph_follows_new_starts():
    """A captured call writes where table and starts point when the graph is replayed."""
    k, v, k_cache, v_cache, block_table, start = make_inputs("crosses_pages", "hnd", torch.bfloat16, device="cuda")
    ops.append_kv(k, v, k_cache, v_cache, block_table, start)  # first use, outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.append_kv(k, v, k_cache, v_cache, block_table, start)
    for new_start in ([0, 5], [30, -1], [7, 63]):
        start.copy_(torch.tensor(new_start, dtype=torch.int32))
        block_table.copy_(block_table.flip(1))
        k_cache.fill_(float("nan"))
        v_cache.fill_(float("nan"))
        expected = k_cache.cpu().clone(), v_cache.cpu().clone()
        reference.append_kv(k.cpu(), v.cpu(), *expected, block_table.cpu(), start.cpu())
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(k_cache, expected[0])
        assert_same_bits(v_cache, expected[1])


@gpu
def test_cuda_pool_beyond_32_bits():
    """Offsets are 64-bit: the last page of a pool of 5 GiB is written where it lies."""
    page, heads, dim = 256, 8, 128
    pages = 5 * 2**30 // (page * heads * dim * 2)
    k_cache = torch.zeros(pages, page, heads, dim, dtype=torch.bfloat16, device="cuda")
    v_cache = torch.zeros_like(k_cache)
    k, v = torch.randn(2, 1, 32, heads, dim, device="cuda").bfloat16()
    block_table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    ops.append_kv(k, v, k_cache, v_cache, block_table, torch.tensor([200], dtype=torch.int32, device="cuda"))
    assert torch.equal(k_cache[-1, 200:232], k[0]) and torch.equal(v_cache[-1, 200:232], v[0])
    assert k_cache[:-1].count_nonzero() == 0 and k_cache[-1].count_nonzero() == k.count_nonzero()


@gpu
def test_cuda_refuses_mixed_devices():
    k, v, k_cache, v_cache, block_table, start = make_inputs("page_32", "nhd", torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="append_kv: start must be on cuda:0 like the first argument, got cpu"):
        ops.append_kv(k, v, k_cache, v_cache, block_table, start.cpu())
