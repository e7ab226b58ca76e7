"""The operators: one typed function per op, its fake kernel right below it.

A function checks what Python can see cheaply (values of plain arguments; ValueError or TypeError), then calls
`torch.ops.mage.<op>`, which checks every tensor (RuntimeError). Nothing here chooses hardware or falls back: the device
of the tensors decides, and an op without a kernel for it raises. The slow twin of each is in `mage_ext.reference`.

    B requests            Q query rows per request      S cached tokens of a request, its block included
    H, Hkv, G = H / Hkv   D head dim                    P prefix tokens before the current block
    R = G * Q rows        g tokens per unit             n = ceil(max_seq_len / g) units of a mass buffer
    L layers that select  K selected prefix tokens      row r = q * G + head within the group

Pools are [pages, page, Hkv, D] with page in 1, 16, 32, 64, 128, 256; NHD, HND and K|V-interleaved pools are strided
views of it. Test: pytest tests/python -k "append or attention or mass or select or votes or confidence or merge"
"""

import torch
from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, start: Tensor) -> None:
    """Writes a block's K and V into the pool, token i of request b at position start[b] + i.

    Args:
        k: [B, Q, Hkv, D], bfloat16, float16 or float32; rows of a multiple of 16 bytes.
        v: like k.
        k_cache: [pages, page, Hkv, D], dtype of k; written in place.
        v_cache: like k_cache; may be the other half of an interleaved pool.
        block_table: [B, max_pages], int32, page ids.
        start: [B], int32, position of each request's first row.

    Raises:
        RuntimeError: a tensor's device, dtype, rank, shape, stride or alignment is not as above.

    Notes:
        A token is dropped if its position is negative or past max_pages * page, or its page is not in the pool: nothing
        outside a request's own pages is written. Deterministic; can be captured in a CUDA graph.
        Reference: mage_ext.reference.append_kv.
    """
    torch.ops.mage.append_kv(k, v, k_cache, v_cache, block_table, start)


@torch.library.register_fake("mage::append_kv")
def _(k, v, k_cache, v_cache, block_table, start):
    return None
