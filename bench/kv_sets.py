"""Paged inputs of the CUDA benches: shapes of the models and sets of random K/V that a timing rotates over."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mage_ext.evaluation.speed import HBM_BYTES_PER_S, MMA_FLOPS_PER_S, MMA_ROWS

MODELS = {"7B": (28, 4, 128), "1.5B": (12, 2, 128), "8B": (32, 8, 128)}  # H, Hkv, D
HEADS = MODELS | {"135M": (9, 3, 64)}
COLD_BYTES = 220e6  # of KV in all sets together; the L2 has 50 MB
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A batch of requests of one model: `contexts` cached tokens each (P), and a block of `q_len` on top."""

    model: str
    contexts: tuple[int, ...]
    q_len: int = 32
    page: int = 64
    dtype: torch.dtype = DTYPE

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, Hkv, D."""
        return HEADS[self.model]

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def mixed(self) -> bool:
        return len(set(self.contexts)) > 1

    @property
    def lengths(self) -> list[int]:
        """S of every request."""
        return [context + self.q_len for context in self.contexts]

    @property
    def max_len(self) -> int:
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """R, the rows that share a KV head."""
        return self.heads[0] // self.heads[1] * self.q_len

    @property
    def kv_bytes(self) -> int:
        _, kv_heads, dim = self.heads
        return 2 * sum(self.lengths) * kv_heads * dim * self.dtype.itemsize

    def partial_bytes(self, g: int) -> int:
        """The float32 sums of every row over every unit of g tokens."""
        return 4 * self.heads[1] * self.rows * sum(math.ceil(length / g) for length in self.lengths)

    def floor_us(self, g: int | None) -> float:
        """Least time of attention that also writes one sum per row and unit of g tokens (None: that emits nothing)."""
        heads, kv_heads, dim = self.heads
        q_values = self.batch * self.q_len * heads * dim
        moved = self.kv_bytes + 2 * q_values * self.dtype.itemsize + 4 * self.batch * heads * self.q_len
        if g is not None:
            moved += self.partial_bytes(g)
        padded_rows = math.ceil(self.rows / MMA_ROWS) * MMA_ROWS
        flops = 4 * kv_heads * padded_rows * sum(self.lengths) * dim
        return max(moved / HBM_BYTES_PER_S, flops / MMA_FLOPS_PER_S) * 1e6

    @property
    def name(self) -> str:
        contexts = f"{self.batch}x{short(self.contexts[0])}"
        if self.mixed:
            contexts = f"{self.batch} of {short(min(self.contexts))}..{short(max(self.contexts))}"
        dtype = "" if self.dtype == DTYPE else f" {self.dtype_name}"
        return f"{self.model} {contexts} Q={self.q_len}{dtype}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def case(self) -> dict:
        """Keys of a result file. A batch of mixed lengths has all its `contexts` in place of one `context`."""
        context = {"contexts": list(self.contexts)} if self.mixed else {"context": self.contexts[0]}
        case = {"model": self.model, "D": self.heads[2], "dtype": self.dtype_name, "batch": self.batch, **context}
        return case | {"Q": self.q_len, "page": self.page}


@dataclass
class KvSet:
    """Inputs of one call: q [B, Q, H, D], pools [pages, page, Hkv, D], block_table [B, max_pages], seq_lens [B]."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.block_table, self.seq_lens


def num_sets(shape: Shape) -> int:
    return max(1, math.ceil(COLD_BYTES / shape.kv_bytes))


def make_sets(shape: Shape, count: int, seed: int, device: str = "cuda", layout: str = "nhd") -> list[KvSet]:
    """Random numbers drawn in place; every request's pages lie scattered over the pool, unused table entries are 0.

    layout: "nhd", or "hnd": pools whose pages hold one head after the other.
    """
    random = torch.Generator(device).manual_seed(seed)
    heads, kv_heads, dim = shape.heads
    pages_of = [math.ceil(length / shape.page) for length in shape.lengths]

    def normal(*size):
        return torch.empty(size, dtype=shape.dtype, device=device).normal_(generator=random)

    def pool(pages):
        if layout == "hnd":
            return normal(pages, kv_heads, shape.page, dim).transpose(1, 2)
        return normal(pages, shape.page, kv_heads, dim)

    sets = []
    for _ in range(count):
        order = torch.randperm(sum(pages_of), device=device, generator=random).int()
        table = torch.zeros(shape.batch, max(pages_of), dtype=torch.int32, device=device)
        for row, pages in zip(table, order.split(pages_of), strict=True):
            row[: len(pages)] = pages
        seq_lens = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        q = normal(shape.batch, shape.q_len, heads, dim)
        sets.append(KvSet(q, pool(sum(pages_of)), pool(sum(pages_of)), table, seq_lens))
    return sets


def contiguous_kv(kv_set: KvSet, request: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V of one request, [S, Hkv, D], gathered from its pages."""
    page = kv_set.k_cache.shape[1]
    pages = kv_set.block_table[request, : math.ceil(length / page)].long()
    return tuple(cache[pages].flatten(0, 1)[:length] for cache in (kv_set.k_cache, kv_set.v_cache))


def short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def tokens_of(text: str) -> int:
    """The number that `short` wrote."""
    return int(text[:-1]) * 1024 if text[-1:] in ("K", "k") else int(text)
