"""What a step computes around the model, as pure functions of the tensors of `block_slots`: the rows that a forward
sends, the positions that its draws decide, and a block's first state.

They are plain torch. Of a model that was optimized with compile=True they go through torch.compile, like the functions
between its matrix products; what they return, integers and booleans, is the same. A is the number of places, Q the
block size.

Test: pytest tests/python/test_step_functions.py
"""

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mage_ext import sampling
from mage_ext.paged_forward import NOT_WRITTEN
from mage_ext.sampling import Draws, SamplerConfig


def bind(function: Callable[..., Any], compile: bool, **constants: Hashable) -> Callable[..., Any]:
    """function(*tensors, **constants) as a function of tensors [A, ...], which are given by position, or None."""
    return _compiled(function, **constants) if compile else functools.partial(function, **constants)


@functools.cache
def _compiled(function: Callable[..., Any], **constants: Hashable) -> Callable[..., Any]:
    """Through torch.compile: sizes are constants but for A. fullgraph makes a limit of recompilations an error, not a
    fall back to plain operators; torch counts them by code object, so every set of constants has one of its own."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled = torch.compile(own, fullgraph=True, dynamic=False)

    def call(*tensors: Tensor | None) -> Any:
        if tensors[0].shape[0] > 1:  # torch takes a size of 1 for a constant, always
            for tensor in tensors:
                if tensor is not None:
                    torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(*tensors, **constants)

    return call


class BlockState(NamedTuple):
    """What a step changes; fields as in BlockSlots."""

    tokens: Tensor
    open: Tensor
    steps: Tensor
    candidates: Tensor
    sub_start: Tensor
    flags: Tensor
    blank: Tensor


class FirstState(NamedTuple):
    """What a block starts with and keeps; fields as in BlockSlots."""

    positions: Tensor
    start: Tensor
    seeds: Tensor
    carried: Tensor
    mass_rows: Tensor
    may_end: Tensor
    is_last: Tensor


def begin_block(
    staged: Tensor, *, sub_block_size: int, eos_ids: tuple[int, ...], token_shift: bool
) -> tuple[FirstState, BlockState]:
    """The tensors of new blocks from what the host knows of them.

    Args:
        staged: [A, Q + 7], int64: the tokens, then known, prompt_end, last, start, seed of `BlockRow`, whether the
            block carries lists on, whether the place is empty.
    """
    size = staged.shape[1] - 7
    index = torch.arange(size, device=staged.device)
    tokens = staged[:, :size]
    known, prompt_end, last, start, seeds, carried, vacant = staged[:, size:, None].unbind(1)  # [A, 1]
    open = index >= known
    # Row i predicts position i, or i + 1 under token shift.
    mass_rows = ((index + 1 >= known) & (index + 1 < size)).expand(open.shape) if token_shift else open
    first = FirstState(
        positions=start + index,
        start=start[:, 0].int(),
        seeds=seeds[:, 0],
        carried=carried[:, 0].bool(),
        mass_rows=mass_rows,
        may_end=index >= prompt_end,  # EOS of the prompt's tail ends nothing
        is_last=index == last,
    )
    steps = torch.zeros_like(first.seeds)
    ended = vacant[:, 0].bool()
    blank = torch.zeros_like(ended)
    return first, _state(tokens, open, steps, ended, blank, first.may_end, first.is_last, sub_block_size, eos_ids)


def decide_step(
    token: Tensor,
    confidence: Tensor,
    entropy: Tensor,
    candidates: Tensor,
    live: Tensor,
    tokens: Tensor,
    open: Tensor,
    steps: Tensor,
    sub_start: Tensor,
    flags: Tensor,
    blank: Tensor,
    may_end: Tensor,
    is_last: Tensor,
    *,
    sampler: SamplerConfig,
    sub_block_size: int,
    eos_ids: tuple[int, ...],
) -> tuple[Tensor, BlockState]:
    """Fixes the positions that the sampler decides.

    Args:
        token, confidence, entropy: [A, sub_block_size], draws of the positions from sub_start on.
        candidates: [A, Q], bool. live: [A], bool, took part. The others: of the slots, before the step.
    Returns:
        decided [A, Q], bool; the state after the step.
    """
    draws = Draws(*(_in_block(x, sub_start, tokens.shape[1]) for x in (token, confidence, entropy)))
    decided = sampling.decide(sampler, draws, candidates)
    tokens, open = torch.where(decided, draws.token, tokens), open & ~decided
    blank = blank | (decided & (draws.confidence == 0)).any(-1)
    steps, ended = steps + live, flags[:, 2]
    return decided, _state(tokens, open, steps, ended, blank, may_end, is_last, sub_block_size, eos_ids)


def _in_block(window: Tensor, begin: Tensor, size: int) -> Tensor:
    """window [A, W] at columns begin + [0, W) of [A, size]; the others hold any of its values."""
    width = window.shape[1]
    if width == size:
        return window
    column = torch.arange(size, device=window.device) - begin[:, None]
    return window.gather(1, column.clamp(0, width - 1))


def _state(
    tokens: Tensor,
    open: Tensor,
    steps: Tensor,
    ended: Tensor,
    blank: Tensor,
    may_end: Tensor,
    is_last: Tensor,
    sub_block_size: int,
    eos_ids: tuple[int, ...],
) -> BlockState:
    """The state that follows from tokens and open positions. ended: [A], bool, before."""
    size = tokens.shape[1]
    index = torch.arange(size, device=tokens.device)
    ends = is_last
    for eos_id in eos_ids:
        ends = ends | (may_end & (tokens == eos_id))
    first_open = _first(open)
    ended = ended | (ends & (index < first_open[:, None])).any(-1)
    live = ~ended & (first_open < size)
    first = torch.where(live, first_open, 0)
    sub_start = first - first % sub_block_size
    candidates = open & live[:, None] & (index < (sub_start + sub_block_size)[:, None])
    flags = torch.stack((live, live & (first == sub_start), ended), 1)
    return BlockState(tokens, open, steps, candidates, sub_start, flags, blank)


def _first(mask: Tensor) -> Tensor:
    """[A], int64: the first column where mask [A, Q] is true, Q where none is."""
    index = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, index, mask.shape[1]).amin(-1)


class StepRows(NamedTuple):
    """What a forward sends, stores, attends and draws.

    Fields:
        tokens, positions: [A, R], int64, of the rows that are sent.
        writes: of each store of K/V the start [A], int32, and the first row [A], int64, or None, as `Write` takes them.
        seq_lens: [A], int32. exact_lens, sparse_lens: [A], int32, where requests of both kinds are attended, else None.
        kv_lens: [A, R], int32, or None: all of them attend seq_lens. row_mask: [A, R], bool, or None: all count.
        candidates: [A, Q], bool, that may be decided. live: [A], bool, takes part.
        drawn: [A, sub_block_size], int64, the row in [0, A * R) that predicts each position of the sub-block; None: row
            by row.
        seeds, drawn_positions, steps: [A, sub_block_size], int64, the keys of the draws.
    """

    tokens: Tensor
    positions: Tensor
    writes: tuple[tuple[Tensor, Tensor | None], ...]
    seq_lens: Tensor
    exact_lens: Tensor | None
    sparse_lens: Tensor | None
    kv_lens: Tensor | None
    row_mask: Tensor | None
    candidates: Tensor
    live: Tensor
    drawn: Tensor | None
    seeds: Tensor
    drawn_positions: Tensor
    steps: Tensor


def rows_of_step(
    tokens: Tensor,
    positions: Tensor,
    candidates: Tensor,
    mass_rows: Tensor,
    start: Tensor,
    sub_start: Tensor,
    flags: Tensor,
    seeds: Tensor,
    steps: Tensor,
    carried: Tensor,
    previous_tokens: Tensor,
    uncommitted: Tensor,
    *,
    sub_block_size: int,
    token_shift: bool,
    narrow: bool,
    later: bool,
    fused: bool,
    both_kinds: bool,
    all_rows_count: bool,
) -> StepRows:
    """The rows of a forward from the tensors of the slots.

    Args:
        narrow: sub-blocks alone are sent. later: under the sub-block cache, behind the first steps, which write all.
        fused: the block before is sent, too, and committed. both_kinds: requests that carry lists are sparse, the
            others exact.
        all_rows_count: of those sent, for mass; else those whose logits an undecided position consumes.
    """
    (num_places, size), sub, device = tokens.shape, sub_block_size, tokens.device
    live, first_open = flags[:, 0], flags[:, 1]
    window = sub_start[:, None] + torch.arange(sub, device=device)  # [A, sub]
    drawn_positions = positions[:, :1] + window
    first_row = torch.zeros_like(sub_start)
    row_mask = None if all_rows_count else mass_rows
    kv_lens = None

    def written(who: Tensor, start: Tensor) -> Tensor:
        return torch.where(who, start, NOT_WRITTEN)

    if narrow:
        # The first position of every sub-block is decided: its rows alone. Where a flag that lags could not know yet
        # that a request has come to its next sub-block, it sits this forward out; its next draws have the same keys.
        live = live & ~first_open
        candidates = candidates & live[:, None]
        tokens, positions = tokens.gather(1, window), drawn_positions
        if row_mask is not None:
            row_mask = row_mask.gather(1, window)
        first_row = sub_start
        writes = ((written(live, start + sub_start.int()), None),)
    elif later:
        # Requests of both kinds: all rows of those that start a sub-block, the sub-block's rows of the others.
        writes = (
            (written(first_open, start), None),
            (written(live & ~first_open, start + sub_start.int()), sub_start),
        )
        # And the same rows count as if each were alone.
        of_sub_block = torch.arange(size, device=device) // sub == sub_start[:, None] // sub
        counts = torch.ones_like(mass_rows) if row_mask is None else row_mask
        row_mask = counts & (first_open[:, None] | of_sub_block)
    else:
        writes = ((written(live, start), None),)
    if fused:
        # The clean block before comes first, and sees itself and what is before it.
        both = live & uncommitted
        writes = (
            (written(both, start - size), None),
            (written(live & ~both, start), torch.full_like(sub_start, size)),
        )
        tokens = torch.cat((previous_tokens, tokens), 1)
        positions = torch.cat(((positions - size).clamp(min=0), positions), 1)
        first_row = first_row - size
        index = torch.arange(2 * size, device=device)
        kv_lens = start[:, None] + torch.where(index < size, 0, size).int()
        counts = torch.ones_like(mass_rows) if row_mask is None else row_mask
        row_mask = torch.cat((torch.zeros_like(counts), counts), 1)
    seq_lens = torch.where(live, start + size, 0)
    drawn = None
    if fused or token_shift or sub < tokens.shape[1]:
        row = (window - first_row[:, None] - int(token_shift)).clamp(min=0)
        drawn = torch.arange(num_places, device=device)[:, None] * tokens.shape[1] + row
    return StepRows(
        tokens=tokens,
        positions=positions,
        writes=writes,
        seq_lens=seq_lens,
        exact_lens=torch.where(carried, 0, seq_lens) if both_kinds else None,
        sparse_lens=torch.where(carried, seq_lens, 0) if both_kinds else None,
        kv_lens=kv_lens,
        row_mask=row_mask,
        candidates=candidates,
        live=live.contiguous(),  # of the same strides in every variant
        drawn=drawn,
        seeds=seeds[:, None].expand(window.shape).contiguous(),
        drawn_positions=drawn_positions,
        steps=steps[:, None].expand(window.shape).contiguous(),
    )
