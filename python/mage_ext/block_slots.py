"""The tensors of the blocks that a batch works on: one place per request, places may be empty.

They are written in place, block after block, so that CUDA graphs which read them can be replayed. This module knows
which positions are open and which requests have ended; it knows neither the model nor attention.

Test: pytest tests/python/test_denoise.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mage_ext._upload import upload


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
        ended: [A], bool. steps: [A], int64, forwards in which a request was live.
        candidates: [A, Q], bool, open positions of each request's current sub-block. live: [A], bool, has candidates.
        sub_start: [A], int64, first position of the current sub-block. first_open: [A], bool, that position is a
            candidate.
        previous_tokens: [A, Q], int64, of the block before. uncommitted: [A], bool, that block is not committed yet.
        next_token: [A], int64, what the commit predicts for the position after the block (under token shift).
        flags: [3], bool: some request is live; no live request has the first position of its sub-block open; some
            request has not ended.
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
        device: torch.device,
    ):
        size = block_size
        self.sub_block_size = sub_block_size
        self._mask_id, self._token_shift = mask_id, token_shift
        self.rows: list[BlockRow | None] = [None] * num_places
        self.max_seq_len = 0
        self.index = torch.arange(size, device=device)
        self._eos = upload(eos_ids, device, torch.int64)

        def new(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        places = num_places
        self._staged = new(places, size + 7, dtype=torch.int64)
        self.block_table = new(places, 1, dtype=torch.int32)
        self.previous_tokens, self.uncommitted = new(places, size, dtype=torch.int64), new(places)
        self.tokens, self.positions = new(places, size, dtype=torch.int64), new(places, size, dtype=torch.int64)
        self.open, self.candidates, self.mass_rows = (new(places, size) for _ in range(3))
        self._may_end, self._is_last = new(places, size), new(places, size)
        self.carried, self.ended, self.live, self.first_open = (new(places) for _ in range(4))
        self.start = new(places, dtype=torch.int32)
        self.seeds, self.steps, self.sub_start, self.next_token = (new(places, dtype=torch.int64) for _ in range(4))
        self.flags = new(3)

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
        size = len(self.index)
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
        size = len(self.index)
        self.tokens.copy_(self._staged[:, :size])
        known, prompt_end, last, start, seeds, carried, vacant = self._staged[:, size:, None].unbind(1)  # [A, 1]
        self.open.copy_(self.index >= known)
        self._may_end.copy_(self.index >= prompt_end)  # EOS of the prompt's tail ends nothing
        self._is_last.copy_(self.index == last)
        self.positions.copy_(start + self.index)
        self.start.copy_(start[:, 0])
        self.seeds.copy_(seeds[:, 0])
        self.carried.copy_(carried[:, 0])
        if self._token_shift:
            self.mass_rows.copy_(torch.nn.functional.pad(self.open[:, 1:], (0, 1)))
        else:
            self.mass_rows.copy_(self.open)
        self.ended.copy_(vacant[:, 0])
        self.steps.zero_()
        self._update()

    def decide(self, decided: Tensor, tokens: Tensor, live: Tensor) -> None:
        """Fixes positions after a forward. decided: [A, Q], bool. tokens: [A, Q], int64. live: [A], bool, took part."""
        self.steps.add_(live)
        self.tokens.copy_(torch.where(decided, tokens, self.tokens))
        self.open.logical_and_(~decided)
        self._update()

    def _update(self) -> None:
        """Recomputes what follows from tokens and open positions."""
        is_eos = (self.tokens[..., None] == self._eos).any(-1)
        ends = self._is_last | (self._may_end & is_eos)
        decided_up_to = (~self.open).cumprod(-1).bool()
        self.ended.logical_or_((decided_up_to & ends).any(-1))
        candidates = self.open & ~self.ended[:, None]
        first = candidates.int().argmax(-1)
        self.sub_start.copy_(first - first % self.sub_block_size)
        self.candidates.copy_(candidates & (self.index < (self.sub_start + self.sub_block_size)[:, None]))
        self.live.copy_(self.candidates.any(-1))
        self.first_open.copy_(self.live & (first == self.sub_start))
        self.flags.copy_(torch.stack((self.live.any(), ~self.first_open.any(), ~self.ended.all())))


def _sources(places: list[int | None]) -> tuple[list[bool], list[int]]:
    """Which entries name a place, and the places, 0 for the others."""
    return [place is not None for place in places], [place or 0 for place in places]
