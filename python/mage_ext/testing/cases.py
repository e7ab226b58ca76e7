"""Inputs of the attention operators for tests and benches: named shapes, pools of every layout, poison in unused slots.

It knows how inputs are laid out and what of a pool may be read; it does not know what the operators compute.
Test: pytest tests/python -k attention
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

LAYOUTS = ("nhd", "hnd", "interleaved")


def make_pools(
    layout: str, pages: int, page: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """K and V pools [pages, page, Hkv, D] full of NaN, as views of a buffer in the given layout."""
    nan = float("nan")
    if layout == "nhd":
        k_cache, v_cache = torch.full((2, pages, page, kv_heads, head_dim), nan, dtype=dtype, device=device)
    elif layout == "hnd":
        buffer = torch.full((2, pages, kv_heads, page, head_dim), nan, dtype=dtype, device=device)
        k_cache, v_cache = buffer.transpose(2, 3)
    elif layout == "interleaved":
        k_cache, v_cache = torch.full((pages, 2, page, kv_heads, head_dim), nan, dtype=dtype, device=device).unbind(1)
    else:
        raise ValueError(f"make_pools: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return k_cache, v_cache


@dataclass(frozen=True)
class AttentionCase:
    """Shape and content of one call of an attention operator.

    Fields:
        lens: tokens in each request's pages. A request has pages for them and no more; other entries of its row of the
            block table are -1 and every slot past a request's last token holds NaN, as do the pages of nobody.
        q_len, heads, kv_heads, head_dim, page, layout, dtype: the shapes.
        max_seq_len: None: the longest request, at least 1. Smaller than a request: its length is clamped.
        rows: None: every row sees all tokens. "staircase": blocks of `stair` rows end where their own block ends, the
            last one at S. "causal": row i sees S - Q + 1 + i tokens. "late": the first rows see none.
        invalid_pages: (request, page index) whose entry of the table points outside the pool.
        q_scale: factor of q: 1 gives scores of about N(0, 1), 20 a softmax with one winner.
        softmax_scale: passed on. split_tokens: passed on.
        fused_q: q is a slice of a wider tensor, as a fused projection leaves it.
    """

    lens: tuple[int, ...]
    q_len: int
    heads: int
    kv_heads: int
    head_dim: int
    page: int = 64
    layout: str = "nhd"
    dtype: torch.dtype = torch.float32
    max_seq_len: int | None = None
    rows: str | None = None
    stair: int = 32
    invalid_pages: tuple[tuple[int, int], ...] = field(default=())
    q_scale: float = 1.0
    softmax_scale: float | None = None
    split_tokens: int = 0
    fused_q: bool = False

    @property
    def longest(self) -> int:
        """max_seq_len as passed to the operator."""
        return max([1, *self.lens]) if self.max_seq_len is None else self.max_seq_len

    @property
    def options(self) -> dict:
        """Keyword arguments that every attention operator with K and V takes."""
        return {
            "max_seq_len": self.longest,
            "softmax_scale": self.softmax_scale,
            "kv_lens": self.kv_lens(),
            "split_tokens": self.split_tokens,
        }

    def kv_lens(self) -> Tensor | None:
        """[B, Q] int32 as `rows` says."""
        if self.rows is None:
            return None
        lens = torch.tensor(self.lens).clamp(max=self.longest)[:, None]
        row = torch.arange(self.q_len)
        if self.rows == "staircase":
            row = ((row // self.stair + 1) * self.stair).clamp(max=self.q_len)
            seen = lens - self.q_len + row
        elif self.rows == "causal":
            seen = lens - self.q_len + row + 1
        elif self.rows == "late":
            seen = (lens * (row - self.q_len // 2)).clamp(min=0)
        else:
            raise ValueError(f"AttentionCase: rows must be None, staircase, causal or late, got {self.rows!r}")
        return seen.to(torch.int32)

    def tensors(self, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
        """q, k_cache, v_cache, block_table, seq_lens: random values where a token lies, NaN elsewhere in the pools."""
        random = torch.Generator().manual_seed(seed)
        used = [-(-length // self.page) for length in self.lens]
        pages = sum(used) + 3  # three pages are nobody's
        order = torch.randperm(pages, generator=random).int()
        max_pages = max([-(-self.longest // self.page), *used])
        block_table = torch.full((len(self.lens), max_pages), -1, dtype=torch.int32)
        k_cache, v_cache = make_pools(self.layout, pages, self.page, self.kv_heads, self.head_dim, self.dtype, device)
        for b, length in enumerate(self.lens):
            block_table[b, : used[b]], order = order[: used[b]], order[used[b] :]
            position = torch.arange(length)
            page, slot = block_table[b][position // self.page].long(), position % self.page
            for cache in (k_cache, v_cache):
                values = torch.randn(length, self.kv_heads, self.head_dim, generator=random)
                cache[page.to(device), slot.to(device)] = values.to(device, self.dtype)
        for i, (b, index) in enumerate(self.invalid_pages):
            block_table[b, index] = (-1, pages, 2**31 - 1, -(2**31))[i % 4]
        width = 3 if self.fused_q else 1
        q = torch.randn(len(self.lens), self.q_len, width * self.heads, self.head_dim, generator=random)
        q = (q * self.q_scale).to(device, self.dtype)[:, :, (width - 1) * self.heads :]
        seq_lens = torch.tensor(self.lens, dtype=torch.int32)
        return {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": block_table.to(device),
            "seq_lens": seq_lens.to(device),
        }


BF16, FP16 = torch.bfloat16, torch.float16

# Each axis (sizes of one, ragged and empty requests, partial tiles, page, layout, dtype, head dim, groups, row lengths,
# invalid pages, splits) appears at least twice.
ATTENTION_CASES = {
    "all_ones": AttentionCase((1,), 1, 1, 1, 8, page=1),
    "one_token": AttentionCase((1,), 32, 9, 3, 64, dtype=BF16),
    "one_row": AttentionCase((130,), 1, 9, 3, 64, page=16),
    "block_of_135m": AttentionCase((300,), 32, 9, 3, 64, page=16, layout="hnd", dtype=BF16),
    "block_of_7b": AttentionCase((517,), 32, 28, 4, 128, layout="interleaved", dtype=BF16),
    "block_of_7b_fp32": AttentionCase((200,), 32, 28, 4, 128, page=32),
    "ragged": AttentionCase((0, 1, 63, 64, 65, 250), 8, 4, 2, 64, page=32, layout="interleaved"),
    "ragged_half": AttentionCase((129, 0, 17), 4, 6, 2, 64, page=16, dtype=FP16),
    "rows_exceed_tokens": AttentionCase((5, 0, 31), 33, 6, 2, 32, page=16, dtype=FP16),
    "page_of_1": AttentionCase((97, 40), 4, 4, 4, 64, page=1, dtype=BF16),
    "page_of_1_hnd": AttentionCase((33,), 5, 3, 1, 16, page=1, layout="hnd"),
    "page_of_16": AttentionCase((100, 3), 7, 5, 1, 64, page=16),
    "page_of_128": AttentionCase((300, 127), 16, 8, 2, 64, page=128, layout="hnd"),
    "page_of_256": AttentionCase((257,), 3, 16, 1, 128, page=256, dtype=BF16),
    "no_groups": AttentionCase((75, 150), 9, 3, 3, 64),
    "head_dim_8": AttentionCase((70,), 17, 4, 2, 8, page=16),
    "head_dim_24": AttentionCase((90,), 11, 4, 2, 24, page=32, dtype=FP16),
    "head_dim_80": AttentionCase((90,), 6, 4, 2, 80, page=32, dtype=BF16),
    "head_dim_256": AttentionCase((140,), 20, 8, 2, 256),
    "head_dim_512": AttentionCase((70, 65), 33, 4, 2, 512, page=16, dtype=BF16),
    "many_rows": AttentionCase((200,), 64, 16, 1, 64, page=16, dtype=BF16),  # R = 1024: five row tiles
    "prefill_chunk": AttentionCase((420, 100), 100, 9, 3, 64, rows="staircase"),
    "prefill_start": AttentionCase((160,), 160, 9, 3, 64, page=16, rows="staircase", dtype=BF16),
    "causal": AttentionCase((150, 37), 37, 4, 2, 64, page=32, rows="causal"),
    "causal_longer_than_tokens": AttentionCase((20, 0), 50, 4, 2, 64, page=16, rows="causal"),
    "rows_without_tokens": AttentionCase((90,), 10, 4, 1, 128, rows="late", dtype=BF16),
    "invalid_pages": AttentionCase((200, 70), 8, 4, 2, 64, page=16, invalid_pages=((0, 0), (0, 5), (1, 3), (0, 12))),
    "only_invalid_pages": AttentionCase((60, 64), 4, 4, 2, 64, invalid_pages=((0, 0),), dtype=BF16),
    "one_winner": AttentionCase((300,), 8, 4, 2, 64, page=32, q_scale=20.0),
    "one_winner_bf16": AttentionCase((333,), 8, 4, 2, 128, q_scale=20.0, dtype=BF16),
    "negative_scale": AttentionCase((99,), 5, 4, 2, 64, softmax_scale=-0.3),
    "zero_scale": AttentionCase((99,), 5, 4, 2, 64, page=16, softmax_scale=0.0),
    "split_by_64": AttentionCase((700, 64, 0, 65), 8, 6, 3, 64, split_tokens=64),
    "split_by_192": AttentionCase((500,), 40, 9, 3, 64, page=16, split_tokens=192, rows="causal", dtype=FP16),
    "long": AttentionCase((2300,), 8, 3, 1, 64, page=128),  # several splits of their own
    "longer_than_max": AttentionCase((120, 400), 6, 4, 2, 64, page=32, max_seq_len=256),
    "room_to_spare": AttentionCase((120, 0), 6, 4, 2, 64, page=32, max_seq_len=1000, dtype=BF16),
    "fused_projection": AttentionCase((110, 20), 12, 9, 3, 64, page=16, fused_q=True, dtype=BF16),
    "no_requests": AttentionCase((), 4, 4, 2, 64),
}

# Those that the CUDA kernels serve, float32 as 16 bits.
CUDA_ATTENTION_CASES = {
    name: replace(case, dtype=FP16 if case.dtype == torch.float32 else case.dtype)
    for name, case in ATTENTION_CASES.items()
    if case.head_dim in (64, 128)
}


def on_cuda(options: dict) -> dict:
    """Keyword arguments with their tensors on the GPU."""
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
