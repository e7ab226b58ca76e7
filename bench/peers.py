"""The attention kernels that ours are compared with, each as lists of calls over the same sets of K/V.

FA3 and FlashInfer read the same pages. SDPA gets contiguous copies of K and V, which no engine has; it stands beside
them as a reference. A peer that is not there, or fails, says why: `Absent` carries the reason.
"""

import itertools
import math
from collections.abc import Callable

import torch
from kv_sets import KvSet, Shape, contiguous_kv
from torch.nn.attention import SDPBackend, sdpa_kernel

Calls = list[Callable[[], object]]
FLASHINFER_WORKSPACE = 256 * 2**20
FLASHINFER_TOKENS = 16 * 32768  # batches of this size ended in invalid addresses with 0.6.4
FREE_BYTES = 4 * 2**30  # that copies must leave
MULTIPROCESSORS = 132


class Absent(Exception):
    """Why a peer has no time."""


def reason_of(error: Exception) -> str:
    """One line."""
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, Absent) else f"{type(error).__name__}: {text}"[:300]


class Fa3:
    """FlashAttention-3 from a library that registers torch.ops._vllm_fa3_C.fwd, with several numbers of splits."""

    name = "FA3"
    paged = True
    splits = (0, 1, 2, 4, 8, 16, 32, 64)  # 0: its own choice

    def __init__(self, path: str | None, splits: tuple[int, ...] = splits):
        if not path:
            raise Absent("no library was named (--fa3)")
        self.splits = splits
        torch.ops.load_library(path)
        self._op = torch.ops._vllm_fa3_C.fwd.default
        self._names = [argument.name for argument in self._op._schema.arguments]

    def variants(self, shape: Shape, sets: list[KvSet]) -> dict[str, Calls]:
        """Calls by number of splits. More splits than fill the GPU four times are not tried."""
        tiles = shape.batch * shape.heads[1] * math.ceil(shape.rows / 128)
        splits = [n for n in self.splits if n <= 1 or n * tiles <= 4 * MULTIPROCESSORS]
        return {f"splits={n}": [self._call(shape, kv_set, n) for kv_set in sets] for n in splits}

    def out(self, result: object) -> torch.Tensor:
        return result[0]

    def _call(self, shape: Shape, kv_set: KvSet, num_splits: int) -> Callable[[], object]:
        q = kv_set.q.flatten(0, 1)
        starts = torch.arange(0, len(q) + 1, shape.q_len, dtype=torch.int32, device=q.device)
        values = dict(q=q, k=kv_set.k_cache, v=kv_set.v_cache, out=torch.empty_like(q))
        values |= dict(page_table=kv_set.block_table, seqused_k=kv_set.seq_lens, cu_seqlens_q=starts)
        values |= dict(max_seqlen_q=shape.q_len, max_seqlen_k=shape.max_len, softmax_scale=q.shape[-1] ** -0.5)
        values |= dict(is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0)
        values |= dict(is_rotary_interleaved=False, num_splits=num_splits, pack_gqa=True, sm_margin=0)
        values |= dict(cp_world_size=1, cp_rank=0)
        unknown = values.keys() - set(self._names)
        if unknown - {"cp_world_size", "cp_rank"}:
            raise Absent(f"its fwd has no {', '.join(sorted(unknown))}")
        arguments = [values.get(name) for name in self._names]
        return lambda: self._op(*arguments)


class FlashInfer:
    """FlashInfer's paged prefill, FA2 backend, planned outside the timed calls."""

    name = "FlashInfer"
    paged = True

    def __init__(self):
        try:
            import flashinfer
        except Exception as error:
            raise Absent(f"flashinfer can't be imported ({reason_of(error)})") from error
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device="cuda")

    def variants(self, shape: Shape, sets: list[KvSet]) -> dict[str, Calls]:
        """One wrapper per set, because a plan keeps the pages; they share the workspace of partial results."""
        if shape.batch >= 16 and sum(shape.contexts) >= FLASHINFER_TOKENS:
            raise Absent("left out from 16 x 32K on, where release 0.6.4 reads invalid addresses")
        return {"fa2": [self._call(shape, kv_set) for kv_set in sets]}

    def out(self, result: object) -> torch.Tensor:
        return result

    def _call(self, shape: Shape, kv_set: KvSet) -> Callable[[], object]:
        heads, kv_heads, dim = shape.heads
        counts = [math.ceil(length / shape.page) for length in shape.lengths]
        as_int = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
        indices = torch.cat([row[:count] for row, count in zip(kv_set.block_table, counts, strict=True)])
        wrapper = self._wrapper(self._workspace, "NHD", backend="fa2")
        wrapper.plan(
            as_int([b * shape.q_len for b in range(shape.batch + 1)]),
            as_int([0, *itertools.accumulate(counts)]),
            indices,
            as_int([(length - 1) % shape.page + 1 for length in shape.lengths]),
            heads,
            kv_heads,
            dim,
            shape.page,
            causal=False,
            q_data_type=kv_set.q.dtype,
            kv_data_type=kv_set.k_cache.dtype,
        )
        q, out = kv_set.q.flatten(0, 1), torch.empty_like(kv_set.q.flatten(0, 1))
        return lambda: wrapper.run(q, (kv_set.k_cache, kv_set.v_cache), out=out)


class Sdpa:
    """torch's scaled_dot_product_attention on contiguous K and V, by FlashAttention-2 and by cuDNN."""

    name = "SDPA"
    paged = False
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)

    def variants(self, shape: Shape, sets: list[KvSet]) -> dict[str, Calls]:
        if shape.mixed:
            raise Absent("has no batches of mixed lengths")
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if 2 * shape.kv_bytes + len(sets) * shape.kv_bytes + FREE_BYTES > free:
            raise Absent("no memory for contiguous copies")
        operands = [self._operands(shape, kv_set) for kv_set in sets]
        return {
            backend.name.split("_")[0].lower(): [self._call(backend, *each) for each in operands]
            for backend in self.backends
        }

    def out(self, result: object) -> torch.Tensor:
        return result.transpose(1, 2).flatten(0, 1)

    def _operands(self, shape: Shape, kv_set: KvSet) -> tuple[torch.Tensor, ...]:
        _, kv_heads, dim = shape.heads
        k, v = torch.empty(2, shape.batch, kv_heads, shape.max_len, dim, dtype=kv_set.q.dtype, device=kv_set.q.device)
        for b in range(shape.batch):
            for into, values in zip((k[b], v[b]), contiguous_kv(kv_set, b, shape.max_len), strict=True):
                into.copy_(values.transpose(0, 1))
        return kv_set.q.transpose(1, 2).contiguous(), k, v

    def _call(self, backend: SDPBackend, q, k, v) -> Callable[[], object]:
        def call():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call


def find_peers(
    names: list[str], fa3: str | None, fa3_splits: tuple[int, ...] = Fa3.splits
) -> tuple[list, dict[str, str]]:
    """The wanted peers that can be had, and why the others are not there, by name."""
    makers = {
        "fa3": (Fa3.name, lambda: Fa3(fa3, fa3_splits)),
        "flashinfer": (FlashInfer.name, FlashInfer),
        "sdpa": (Sdpa.name, Sdpa),
    }
    found, absent = [], {}
    for key, (name, make) in makers.items():
        try:
            if key not in names:
                raise Absent("not asked for (--peers)")
            found.append(make())
        except Exception as error:
            absent[name] = reason_of(error)
    return found, absent
