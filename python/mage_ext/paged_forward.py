"""Attention of one forward over the paged cache: the `attend` function that the loop gives to the model.

It writes the forward's K and V, then attends: exactly, exactly with emission of mass, or over a selection. It knows
ops, pages and lists; it does not know tokens, samplers or steps.

Test: pytest tests/python/test_denoise.py
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mage_ext import ops, profiling
from mage_ext._arguments import check_tensor
from mage_ext.cache import PagedCache
from mage_ext.selection import CANDIDATE_UNIT, BlockSelection, SelectionConfig
from mage_ext.token_candidates import Candidates, candidate_units, whole_lens

# Start of a request whose rows are not to be written: append_kv drops negative positions.
NOT_WRITTEN = -(1 << 30)
# Query rows that one attention launch takes; the CPU backend has no such bound.
MAX_ROWS = 64
# Split boundaries of strict runs, in tokens: of all attention, and of attention over lists.
STRICT_SPLIT, STRICT_SPARSE_SPLIT = 1024, 256


@dataclass
class Write:
    """K/V rows to store.

    Fields:
        start: [A], int32. Position of the first row, or NOT_WRITTEN.
        first_row: [A], int64. First of num_rows rows within the forward's rows; None: all of them.
        num_rows: rows to store where first_row is given.
    """

    start: Tensor
    first_row: Tensor | None = None
    num_rows: int = 0


@dataclass
class Emission:
    """Mass that a forward emits in its selecting layers, and what was collected.

    Fields:
        config: granularity, score, norm, rule (rule "layer" also collects votes) and candidates.
        row_mask: [A, Q], bool, rows that count; None: all. prefix_lens: [A], int32.
        masses: per layer [A, Hkv, n], float32; with candidates of units of CANDIDATE_UNIT tokens.
        votes: per layer (votes, union_size, coverage) of `row_votes`.
        units, token_masses: with candidates, per layer [A, Hkv, C], int32, and the masses of their tokens.
    """

    config: SelectionConfig
    row_mask: Tensor | None
    prefix_lens: Tensor
    masses: list[Tensor] = field(default_factory=list)
    votes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    units: list[Tensor] = field(default_factory=list)
    token_masses: list[Tensor] = field(default_factory=list)

    @cached_property
    def whole_lens(self) -> Tensor:
        """[A], int32, of `token_candidates.whole_lens`; the layers share it."""
        return whole_lens(self.prefix_lens)

    def mass(self) -> Tensor:
        """[L, A, Hkv, n]."""
        return torch.stack(self.masses)

    def stacked_votes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """votes [L, A, Hkv, n], union_size and coverage [L, A, Hkv]; None for rules that need none."""
        return tuple(torch.stack(parts) for parts in zip(*self.votes, strict=True)) if self.votes else None

    def candidates(self) -> Candidates | None:
        """Of all layers; None without."""
        if not self.units:
            return None
        return Candidates(torch.stack(self.units), torch.stack(self.token_masses), self.mass())


class AttentionMethod(Protocol):
    """How the selecting layers of every step attend, in place of MAGE's lists: what baselines implement.

    Its functions queue work like ops do: they neither wait for the device nor depend on its data for shapes, and keep
    what they know of K in tensors by page, since requests come and go.
    """

    def prepare(self) -> None:
        """Before a generation over K and V that are in the cache already."""

    def written(self, forward: "PagedForward", layer: int, k: Tensor, k_cache: Tensor) -> None:
        """After K and V of positions that will not change any more were stored: those of k [A, Q, Hkv, D] that
        forward.writes names. What lies at or past forward.seq_lens is padding, to be overwritten."""

    def attend(self, forward: "PagedForward", layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attention of a selecting layer. q: [A, Q, H, D]. Returns [A, Q, H, D]."""

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """K/V tokens, or bytes worth as much, that a step reads per selecting layer and KV head, of a request of
        num_tokens tokens whose block starts at prefix_len."""


@dataclass
class PagedForward:
    """attend(layer, q, k, v) of one forward of A requests.

    In selecting layers a request is attended exactly where exact_lens has its length and sparsely where sparse_lens has
    it; the other is 0, an empty slot, whose output is 0, so the sum of both is every request's own.

    Fields:
        cache: the pools. block_table: [A, max_pages], int32. max_seq_len: host bound of all lengths.
        writes: K/V rows that this forward stores before it attends.
        seq_lens: [A], int32. Length per request, 0 for an empty slot; dense layers attend all of it.
        kv_lens: [A, Q], int32, or None: the staircase of prefill.
        selecting: selecting layer -> its index in selections; empty: every layer is dense.
        exact_lens, sparse_lens: [A], int32, or None for nobody.
        selection: lists of the sparse part. emission: collects the mass of the exact part.
        split_tokens, sparse_split_tokens: as the ops take them; 0: what suits the batch.
        method: attends in the selecting layers, in place of lists. prefix_lens: [A], int32, for it.
        final: what is written will not change any more.
        shared: what the method keeps for the later layers of this forward.
    """

    cache: PagedCache
    block_table: Tensor
    max_seq_len: int
    writes: list[Write]
    seq_lens: Tensor
    kv_lens: Tensor | None = None
    selecting: dict[int, int] = field(default_factory=dict)
    exact_lens: Tensor | None = None
    sparse_lens: Tensor | None = None
    selection: BlockSelection | None = None
    emission: Emission | None = None
    split_tokens: int = 0
    sparse_split_tokens: int = 0
    method: AttentionMethod | None = None
    prefix_lens: Tensor | None = None
    final: bool = False
    shared: dict[str, object] = field(default_factory=dict, init=False)
    _launches: list[tuple[slice, Tensor | None, Tensor]] = field(default_factory=list, init=False)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with profiling.span("layer", layer):
            return self._attend(layer, q, k, v)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_cache, v_cache = self.cache.layer(layer)
        with profiling.span("append_kv"):
            for write in self.writes:
                self._write(write, k, v, k_cache, v_cache)
        if self.method is not None and self.final:
            self.method.written(self, layer, k, k_cache)
        index = self.selecting.get(layer)
        if index is None:
            return self._exact(q, k_cache, v_cache, self.seq_lens)
        if self.method is not None:
            out = self.method.attend(self, layer, q, k_cache, v_cache)
            check_tensor(type(self.method).__name__, "the result of attend", out, q.shape, q.dtype)
            return out
        outs = []
        if self.exact_lens is not None:
            if self.emission is None:
                outs.append(self._exact(q, k_cache, v_cache, self.exact_lens))
            else:
                outs.append(self.emit(self.emission, q, k_cache, v_cache, self.exact_lens))
        if self.sparse_lens is not None:
            lists = self.selection.layer(index)
            outs.append(self.attend_lists(q, k_cache, v_cache, self.sparse_lens, lists, self.selection.g))
        return outs[0] if len(outs) == 1 else outs[0] + outs[1]

    def attend_lists(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seq_lens: Tensor,
        lists: tuple[Tensor, Tensor, Tensor],
        g: int,
    ) -> Tensor:
        """Attention over lists (indices, counts, tail_start) of units of g tokens, as sparse_block_attention has them.
        q: [A, Q, H, D]. seq_lens: [A], int32. Returns [A, Q, H, D]."""
        with profiling.span("sparse_block_attention"):
            out, _ = ops.sparse_block_attention(
                q,
                k_cache,
                v_cache,
                self.block_table,
                seq_lens,
                *lists,
                g=g,
                max_seq_len=self.max_seq_len,
                split_tokens=self.sparse_split_tokens,
            )
        return out

    def _write(self, write: Write, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        if write.first_row is not None:
            rows = write.first_row[:, None] + torch.arange(write.num_rows, device=k.device)  # [A, num_rows]
            rows = rows[:, :, None, None].expand(-1, -1, *k.shape[2:])
            k, v = k.gather(1, rows), v.gather(1, rows)
        ops.append_kv(k, v, k_cache, v_cache, self.block_table, write.start)

    def _exact(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
        outs = []
        for rows, kv_lens, lens in self._launches_of(q, seq_lens):
            with profiling.span("block_attention"):
                out, _ = ops.block_attention(
                    q[:, rows],
                    k_cache,
                    v_cache,
                    self.block_table,
                    lens,
                    max_seq_len=self.max_seq_len,
                    kv_lens=kv_lens,
                    split_tokens=self.split_tokens,
                )
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _launches_of(self, q: Tensor, seq_lens: Tensor) -> list[tuple[slice, Tensor | None, Tensor]]:
        """Rows, their kv_lens and lengths of each launch. With kv_lens, once per forward: the layers share them."""
        if self._launches:
            return self._launches
        num_rows = q.shape[1]
        step = min(num_rows, MAX_ROWS) if q.is_cuda else num_rows
        pieces = [slice(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step)]
        if self.kv_lens is None:
            return [(rows, None, seq_lens) for rows in pieces]
        for rows in pieces:
            kv_lens = self.kv_lens[:, rows].contiguous()
            # No row of the piece attends more than its last one, so no more is read.
            self._launches.append((rows, kv_lens, torch.minimum(seq_lens, kv_lens[:, -1])))
        return self._launches

    def emit(self, emission: Emission, q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor) -> Tensor:
        """Exact attention [A, Q, H, D] whose mass (and votes, for rule "layer", or candidates) `emission` collects.
        seq_lens: [A], int32."""
        config = emission.config
        pool = (k_cache, v_cache, self.block_table, seq_lens)
        two_levels = config.candidates is not None
        g = CANDIDATE_UNIT if two_levels else config.g
        options = {"max_seq_len": self.max_seq_len, "kv_lens": self.kv_lens}
        exact = {**options, "split_tokens": self.split_tokens}
        counting = {"row_mask": emission.row_mask, "norm": config.norm}
        counting["prefix_lens"] = emission.prefix_lens if config.norm == "prefix" else None

        def token_mass(lse: Tensor, **how: object) -> Tensor:
            with profiling.span("token_mass"):
                return ops.token_mass(q, k_cache, self.block_table, seq_lens, lse, **options, **counting, **how)

        # Token granularity on CUDA is a second pass over the keys; the attention kernels emit units of 16 tokens and
        # more.
        if g == 1 and q.is_cuda:
            with profiling.span("block_attention"):
                out, lse = ops.block_attention(q, *pool, **exact)
            mass = token_mass(lse, score="rows" if config.rule == "layer" else config.score)
        elif config.rule == "layer":
            with profiling.span("block_attention_rows"):
                out, _, mass = ops.block_attention_rows(q, *pool, g=g, **exact)
        else:
            with profiling.span("block_attention_mass"):
                out, lse, mass = ops.block_attention_mass(q, *pool, g=g, score=config.score, **counting, **exact)
        if two_levels:
            with profiling.span("select_kv"):
                units = candidate_units(mass, emission.whole_lens, config)
            emission.units.append(units)
            emission.token_masses.append(token_mass(lse, score=config.score, units=units, g=g))
        if config.rule == "layer":
            with profiling.span("row_votes"):
                emission.votes.append(
                    ops.row_votes(mass, emission.prefix_lens, k=config.k, g=config.g, row_mask=emission.row_mask)
                )
            mass = _mass_of_rows(mass, emission.row_mask, config.score)
        emission.masses.append(mass)
        return out


def _mass_of_rows(row_mass: Tensor, row_mask: Tensor | None, score: str) -> Tensor:
    """Unit mass [A, Hkv, n] of log shares per row [A, Hkv, n, R], over the rows that row_mask [A, Q] keeps."""
    shares = row_mass.exp()
    if row_mask is None:
        return shares.mean(-1) if score == "mean" else shares.amax(-1)
    group = row_mass.shape[-1] // row_mask.shape[1]
    kept = row_mask.repeat_interleave(group, 1)[:, None, None]  # [A, 1, 1, R]
    shares = torch.where(kept, shares, 0.0)
    return shares.sum(-1) / kept.sum(-1).clamp(min=1) if score == "mean" else shares.amax(-1)
