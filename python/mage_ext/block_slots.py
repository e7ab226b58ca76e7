"""The tensors of the blocks that a batch works on: one place per request, places may be empty.

They are written in place, block after block, so that CUDA graphs which read them can be replayed. What is written
`step_functions` computes; this module knows neither the model nor attention.

Test: pytest tests/python/test_denoise.py
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mage_ext._upload import upload
from mage_ext.sampling import Draws, SamplerConfig
from mage_ext.step_functions import StepRows, begin_block, bind, decide_step, rows_of_step


@dataclass(frozen=True)
class BlockRow:
    """What the host knows of a request's next block.

    Fields:
        request: its number. start: position of the block's first token. known: tokens at its start that stand.
        prompt_end: position in the block before which tokens are the prompt's. last: position in the block of the last
            wanted token. seed: of the draws.
        predicted_in: the place whose `next_token` is the block's first token; None: no token comes from there.
        uncommitted_in: the place whose tokens are the block before this one, not committed yet; None: it is committed.
    """

    request: int
    start: int
    known: list[int]
    prompt_end: int
    last: int
    seed: int
    predicted_in: int | None = None
    uncommitted_in: int | None = None


class BlockSlots:
    """A places, each with the block of one request or empty. Q is the block size.

    Fields:
        rows: [A] what each place holds (host), None where it is empty. max_seq_len: host bound of all lengths.
        tokens: [A, Q], int64, mask id where open. open: [A, Q], bool, undecided.
        positions: [A, Q], int64, absolute. start: [A], int32, of the block's first token. seeds: [A], int64.
        block_table: [A, pages], int32.
        carried: [A], bool, starts the block with the lists it has.
        mass_rows: [A, Q], bool, rows whose logits an undecided position consumes; fixed for the block.
        steps: [A], int64, forwards in which a request was live.
        candidates: [A, Q], bool, open positions of each request's current sub-block.
        sub_start: [A], int64, first position of the current sub-block.
        flags: [A, 3], bool: the request is live, which means that it has candidates; the first position of its
            sub-block is one; it has ended.
        blank: [A], bool, a position of this block was decided without any logit above -inf.
        previous_tokens: [A, Q], int64, of the block before. uncommitted: [A], bool, that block is not committed yet.
        next_token: [A], int64, what the commit predicts for the position after the block (under token shift).

    Args:
        sampler: decides. compile: what the steps compute goes through torch.compile.
    """

    def __init__(
        self,
        num_places: int,
        block_size: int,
        sub_block_size: int,
        *,
        mask_id: int,
        eos_ids: tuple[int, ...],
        token_shift: bool,
        sampler: SamplerConfig,
        compile: bool,
        device: torch.device,
    ):
        size = block_size
        self.block_size, self.sub_block_size = block_size, sub_block_size
        self._mask_id, self._token_shift, self._compile = mask_id, token_shift, compile
        constants = {"sub_block_size": sub_block_size, "eos_ids": eos_ids}
        self._begin_block = bind(begin_block, compile, token_shift=token_shift, **constants)
        self._decide_step = bind(decide_step, compile, sampler=sampler, **constants)
        self.rows: list[BlockRow | None] = [None] * num_places
        self.max_seq_len = 0

        def new(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        places = num_places
        self._staged = new(places, size + 7, dtype=torch.int64)
        self.block_table = new(places, 1, dtype=torch.int32)
        self.previous_tokens, self.uncommitted = new(places, size, dtype=torch.int64), new(places)
        self.tokens, self.positions = new(places, size, dtype=torch.int64), new(places, size, dtype=torch.int64)
        self.open, self.candidates, self.mass_rows = (new(places, size) for _ in range(3))
        self._may_end, self._is_last = new(places, size), new(places, size)
        self.carried, self.flags, self.blank = new(places), new(places, 3), new(places)
        self.start = new(places, dtype=torch.int32)
        self.seeds, self.steps, self.sub_start, self.next_token = (new(places, dtype=torch.int64) for _ in range(4))

    @property
    def ended(self) -> Tensor:
        """[A], bool, a view of the flags."""
        return self.flags[:, 2]

    @property
    def num_places(self) -> int:
        return len(self.rows)

    @property
    def requests(self) -> list[int | None]:
        """Of each place."""
        return [None if row is None else row.request for row in self.rows]

    def stage(
        self,
        rows: list[BlockRow | None],
        carried: list[bool],
        block_table: Tensor,
        max_seq_len: int,
        last: "BlockSlots | None",
    ) -> None:
        """Takes the places' next blocks over from the host; `begin` makes the tensors of them.

        Args:
            rows: one per place. carried: one per place.
            block_table: [A, pages], int32; of another width than before, the table is another tensor than before.
            max_seq_len: host bound. last: the slots of the last block, maybe these, to which the rows refer.
        """
        size = self.block_size
        device = self.tokens.device
        self.rows, self.max_seq_len = rows, max_seq_len
        staged = []
        for row, carries in zip(rows, carried, strict=True):
            if row is None:
                staged.append([self._mask_id] * size + [size, 0, size, 0, 0, 0, 1])
                continue
            known = [*row.known, *([0] if row.predicted_in is not None else [])]
            tokens = known + [self._mask_id] * (size - len(known))
            staged.append([*tokens, len(known), row.prompt_end, row.last, row.start, row.seed, carries, 0])
        staged = upload(staged, device)
        takes, sources = _sources([None if row is None else row.predicted_in for row in rows])
        if any(takes):
            # Such a block starts with the one predicted token.
            predicted = last.next_token[upload(sources, device)]
            staged[:, 0] = torch.where(upload(takes, device), predicted, staged[:, 0])
        uncommitted, sources = _sources([None if row is None else row.uncommitted_in for row in rows])
        if any(uncommitted):
            self.previous_tokens.copy_(last.tokens[upload(sources, device)])
        self.uncommitted.copy_(upload(uncommitted, device))
        self._staged.copy_(staged)
        if self.block_table.shape == block_table.shape:
            self.block_table.copy_(block_table)
        else:
            self.block_table = block_table.clone()

    def begin(self) -> None:
        """Fills the tensors of new blocks from what was staged."""
        first, state = self._begin_block(self._staged)
        fields = (self.positions, self.start, self.seeds, self.carried, self.mass_rows, self._may_end, self._is_last)
        _copy((*fields, *self._state), (*first, *state))

    def rows_of_step(self, **variant: bool) -> StepRows:
        """What a forward of a variant sends, stores and draws; variant: as `step_functions.rows_of_step` takes it."""
        function = bind(
            rows_of_step,
            self._compile,
            sub_block_size=self.sub_block_size,
            token_shift=self._token_shift,
            **variant,
        )
        return function(
            self.tokens,
            self.positions,
            self.candidates,
            self.mass_rows,
            self.start,
            self.sub_start,
            self.flags,
            self.seeds,
            self.steps,
            self.carried,
            self.previous_tokens,
            self.uncommitted,
        )

    def decide(self, draws: Draws, candidates: Tensor, live: Tensor) -> Tensor:
        """Fixes positions after a forward.

        Args:
            draws: [A, sub_block_size], of the positions from sub_start on.
            candidates: [A, Q], bool, positions that may be decided. live: [A], bool, took part.
        Returns:
            [A, Q], bool, what was decided.
        """
        decided, state = self._decide_step(
            *draws,
            candidates,
            live,
            self.tokens,
            self.open,
            self.steps,
            self.sub_start,
            self.flags,
            self.blank,
            self._may_end,
            self._is_last,
        )
        _copy(self._state, state)
        return decided

    @property
    def _state(self) -> tuple[Tensor, ...]:
        """In the order of a BlockState."""
        return self.tokens, self.open, self.steps, self.candidates, self.sub_start, self.flags, self.blank


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors into others of their types, on CUDA in one kernel per type."""
    groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in zip(targets, sources, strict=True):
        groups[target.dtype].append((target, source))
    for pairs in groups.values():
        torch._foreach_copy_(*(list(tensors) for tensors in zip(*pairs, strict=True)))


def _sources(places: list[int | None]) -> tuple[list[bool], list[int]]:
    """Which entries name a place, and the places, 0 for the others."""
    return [place is not None for place in places], [place or 0 for place in places]
