"""Slow twins of the operators in plain torch: the documentation of what each computes, and the oracle of the tests.

Names, argument order and returns are those of `mage_ext.ops`, which never imports this module.
"""

from torch import Tensor


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, start: Tensor) -> None:
    """Twin of ops.append_kv: one token at a time, in place."""
    pages, page = k_cache.shape[:2]
    capacity = block_table.shape[1] * page
    for b in range(k.shape[0]):
        for i in range(k.shape[1]):
            position = int(start[b]) + i
            if not 0 <= position < capacity:
                continue
            page_id = int(block_table[b, position // page])
            if not 0 <= page_id < pages:
                continue
            k_cache[page_id, position % page] = k[b, i]
            v_cache[page_id, position % page] = v[b, i]
