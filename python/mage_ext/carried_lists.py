"""The lists that blocks carry on: who starts a block exactly, who selects anew, who keeps what it has.

It applies the refresh policy and keeps one row of lists per running request; it knows neither tokens nor attention.

Test: pytest tests/python/test_denoise.py
"""

import dataclasses

import torch
from torch import Tensor

from mage_ext import selection as selections
from mage_ext._upload import upload
from mage_ext.denoise_config import DenoiseConfig
from mage_ext.selection import BlockSelection
from mage_ext.token_candidates import Candidates, select_tokens


class CarriedLists:
    """The current selection of a generation, across its blocks.

    Fields:
        selection: None before the first. requests: the request of each of its rows, None where there is none.
        proven: [L, A, Hkv], bool, of a selection out of candidates that this block made, as `select_tokens` has it;
            else None.
    """

    def __init__(self, config: DenoiseConfig):
        self.selection: BlockSelection | None = None
        self.requests: list[int | None] = []
        self.proven: Tensor | None = None
        self._config = config
        self._select = config.select_override or selections.select
        self._ages: dict[int, int] = {}  # request -> blocks since it selected
        self._drifted: set[int] = set()  # requests whose lists keep too little under the mass of their last commit

    def plan(self, request: int, prefix_len: int) -> str:
        """How a request starts its block: "exact" throughout, "select" anew, "carry" the lists it has, or "method"."""
        config = self._config
        if config.mode == "method":
            return "method"
        if config.mode == "exact" or prefix_len <= config.exact_prefix:
            return "exact"
        age = self._ages.get(request)
        if (
            age is None
            or config.refresh == "block"
            or (config.refresh == "blocks" and age >= config.refresh_blocks)
            or (config.refresh == "kept_mass" and request in self._drifted)
        ):
            return "select"
        return "carry"

    def rows(self, requests: list[int | None]) -> BlockSelection:
        """The selection with one row per entry of `requests`, in their order. A request that has no lists gets empty
        ones whose tail starts at 0, which attend everything."""
        if self.requests != requests:
            row_of = {request: row for row, request in enumerate(self.requests) if request is not None}
            device = self.selection.indices.device
            rows = [row_of.get(request, -1) for request in requests]
            self.selection = _rows(self.selection, upload([max(row, 0) for row in rows], device))
            if -1 in rows:
                self.selection = _without(self.selection, upload([row < 0 for row in rows], device))
            self.requests = requests
        return self.selection

    def start_empty(self, requests: list[int | None], num_layers: int, num_kv_heads: int, device: torch.device) -> None:
        """Before there is a selection: one that lists nothing, whose tail starts at 0."""
        if self.selection is not None:
            return
        heads = (num_layers, len(requests), num_kv_heads)
        self.selection = BlockSelection(
            indices=torch.full((*heads, 1), -1, dtype=torch.int32, device=device),
            counts=torch.zeros(heads, dtype=torch.int32, device=device),
            kept_mass=torch.ones(heads, device=device),
            tail_start=torch.zeros(len(requests), dtype=torch.int32, device=device),
            g=self._config.selection.g,
            overflow=torch.zeros(heads, dtype=torch.bool, device=device),
        )
        self.requests = requests

    def take(
        self,
        requests: list[int | None],
        plan: list[str],
        prefix_lens: Tensor,
        mass: Tensor,
        votes: tuple[Tensor, Tensor, Tensor] | None,
        candidates: Candidates | None,
    ) -> None:
        """Selects for the requests whose plan is "select". Those that carry keep their lists; those that are exact get
        empty lists whose tail starts at 0, which attend everything.

        Args:
            requests: A requests, None for an empty place. plan: their plans, "exact" for an empty place.
            prefix_lens: [A], int32.
            mass: [L, A, Hkv, n], float32. votes: for rule "layer", as `selection.select` takes them.
            candidates: of a configuration that has them: what is selected of, in place of mass.
        Raises:
            TypeError: select_override returned no BlockSelection.
            ValueError: it returned lists of another shape, granularity or device, or (read on the CPU alone, where
                nothing waits) lists or tails that don't hold.
        """
        config = self._config.selection
        chosen = upload([way == "select" for way in plan], mass.device)
        lens = torch.where(chosen, prefix_lens, 0)
        if candidates is None:
            selection = self._select(mass, lens, config, votes=votes)
        else:
            selection, self.proven = select_tokens(candidates, lens, config)
        if not isinstance(selection, BlockSelection):
            raise TypeError(f"generate: select_override must return a BlockSelection, got {type(selection).__name__}")
        shape = selection.indices.shape[:3]
        if shape != mass.shape[:3] or selection.g != config.g:
            raise ValueError(
                f"generate: select_override must return lists [L, A, Hkv] = {list(mass.shape[:3])} with g = {config.g}"
                f", got {list(shape)} with g = {selection.g}"
            )
        if selection.indices.device != mass.device:
            raise ValueError(
                f"generate: select_override must return lists on {mass.device}, got {selection.indices.device}"
            )
        if self._config.select_override is not None and mass.device.type == "cpu":
            _check_override(selection, requests, plan, prefix_lens.tolist())
        if "carry" in plan:
            carried = upload([way == "carry" for way in plan], mass.device)
            selection = _merge(selection, self.rows(requests), carried)
        self.selection, self.requests = selection, requests
        for request, way in zip(requests, plan, strict=True):
            if way == "select":
                self._ages[request] = 0
                self._drifted.discard(request)

    @property
    def wants_commit_mass(self) -> bool:
        """Whether the commit is to emit mass for `measure`."""
        return self._config.refresh == "kept_mass" and self.selection is not None

    def measure(self, requests: list[int | None], mass: Tensor) -> None:
        """Notes whose lists keep less than the bound of a commit's mass [L, A, Hkv, n]. Waits for the device."""
        kept = _kept_mass(self.rows(requests), mass).mean((0, 2)).tolist()
        bound = self._config.refresh_bound
        self._drifted = {
            request for request, share in zip(requests, kept, strict=True) if request is not None and share < bound
        }

    def forget(self, request: int) -> None:
        """A request's lists are not its own: its next block selects."""
        self._ages.pop(request, None)

    def end_block(self, requests: list[int]) -> None:
        """Ages the lists of requests that go on to another block."""
        self.proven = None
        for request in requests:
            if request in self._ages:
                self._ages[request] += 1


def _check_override(
    selection: BlockSelection, requests: list[int | None], plan: list[str], prefix_lens: list[int]
) -> None:
    """Reads what select_override returned; rows that carry are replaced anyway, so their tails may be anything."""
    try:
        selection.validate()
    except ValueError as error:
        raise ValueError(f"generate: select_override must return lists that hold, got: {error}") from None
    tails = selection.tail_start.tolist()
    for request, way, prefix_len, tail in zip(requests, plan, prefix_lens, tails, strict=True):
        expected = prefix_len // selection.g * selection.g if way == "select" else 0
        if way != "carry" and tail != expected:
            raise ValueError(
                f"generate: select_override must return tail_start {expected} for request {request}, got {tail}"
            )


def _rows(selection: BlockSelection, rows: Tensor) -> BlockSelection:
    """Some requests of a selection. rows: [A], int64."""
    return dataclasses.replace(
        selection,
        indices=selection.indices[:, rows],
        counts=selection.counts[:, rows],
        kept_mass=selection.kept_mass[:, rows],
        tail_start=selection.tail_start[rows],
        overflow=selection.overflow[:, rows],
    )


def _without(selection: BlockSelection, empty: Tensor) -> BlockSelection:
    """`selection` with empty lists and a tail from 0 where empty [A], bool, says so."""
    per_head = empty[:, None]
    return dataclasses.replace(
        selection,
        indices=selection.indices.masked_fill(per_head[..., None], -1),
        counts=selection.counts.masked_fill(per_head, 0),
        kept_mass=selection.kept_mass.masked_fill(per_head, 1.0),
        tail_start=selection.tail_start.masked_fill(empty, 0),
        overflow=selection.overflow.masked_fill(per_head, False),
    )


def _merge(new: BlockSelection, old: BlockSelection, keep_old: Tensor) -> BlockSelection:
    """`new` with the rows of `old` where keep_old [A], bool, says so; as wide as the wider one."""
    capacity = max(new.capacity, old.capacity)
    wide = [torch.nn.functional.pad(s.indices, (0, capacity - s.capacity), value=-1) for s in (new, old)]
    per_head = keep_old[:, None]
    return dataclasses.replace(
        new,
        indices=torch.where(per_head[..., None], wide[1], wide[0]),
        counts=torch.where(per_head, old.counts, new.counts),
        kept_mass=torch.where(per_head, old.kept_mass, new.kept_mass),
        tail_start=torch.where(keep_old, old.tail_start, new.tail_start),
        overflow=torch.where(per_head, old.overflow, new.overflow),
    )


def _kept_mass(selection: BlockSelection, mass: Tensor) -> Tensor:
    """Share [L, A, Hkv] of mass [L, A, Hkv, n] that a selection attends: its units and all from tail_start on."""
    listed = selection.indices >= 0
    kept = torch.where(listed, mass.gather(-1, selection.indices.clamp(min=0).long()), 0.0).sum(-1)
    unit = torch.arange(mass.shape[-1], device=mass.device) * selection.g
    tail = torch.where(unit >= selection.tail_start[:, None, None], mass, 0.0).sum(-1)
    return (kept + tail) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
