"""Which prefix units the sparse steps of a block attend: the configuration, the object, and how one becomes the other.

A unit is g consecutive tokens of the prefix. A `BlockSelection` lists units per layer, request and KV head; attention
adds everything from `tail_start` on by itself, so the partial unit at the end of the prefix and the current block are
never listed. This module knows nothing of attention and of the loop; the ranking itself is the op `select_kv`.

Test: pytest tests/python/test_selection.py
"""

import dataclasses
import math
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mage_ext import ops
from mage_ext._arguments import check_device, check_index, check_list, check_path, check_tensor, check_type, got
from mage_ext._files import save_tensors
from mage_ext.counter_random import random_bits

RULES = ("fixed", "layer", "mass", "joint")
GRANULARITIES = (1, 16, 32, 64)
MAX_CAPACITY = ops.MAX_UNITS  # of a list
# Tokens per unit of `candidates`. Lists of K = 64 out of 512 candidates had 98 % of their tokens in common with lists
# out of all tokens where units had 16 tokens, 93 % with 32 and 88 % with 64 (135m, four facts in 2,048 tokens).
CANDIDATE_UNIT = 16

_FILE_FORMAT = "mage_ext.BlockSelection/1"
_OWNER = "BlockSelection"


@dataclass(frozen=True)
class SelectionConfig:
    """How much of the prefix is kept, and which part. Tokens everywhere, except `capacity`.

    Fields:
        rule: "fixed" (k per KV head), "layer" (k on average over the layers, more where attention is diffuse; needs
            votes), "mass" (the fewest units that reach the share p) or "joint" (the KV heads of a layer share their
            budgets).
        k: budget per layer and KV head, multiple of g. Sinks, recents and the partial unit are charged to it; rule
            "mass" does not use it.
        k_min: least budget of rules "layer" and "mass", multiple of g.
        p: share of the mass that rule "mass" keeps, in (0, 1].
        g: tokens per unit: 1, 16, 32 or 64.
        sinks: tokens at the start of the prefix that are always kept, as far as the budget reaches.
        recents: the same at its end.
        capacity: width of the lists in units; None: whatever the rule can need (see capacity_units).
        score: "mean" over the rows or "max", the largest share any row gives.
        score_rows: "all" rows of the block or "open" (rows whose logits an undecided position consumes). Rows of known
            positions are computed anew in every forward, so what they read must be listed: the default counts them.
        norm: shares of the whole "context" or of the "prefix" alone.
        candidates: of g = 1 with rule "fixed" or "joint": tokens per layer and KV head whose masses are looked at,
            those of the units of CANDIDATE_UNIT tokens with the most mass (see `token_candidates`). Whole units, at
            least two more than k takes; None: all tokens. On CUDA it saves `token_mass` of all tokens. With norm
            "prefix" nothing is saved: `token_mass` then reads the whole prefix for its sums. With score "max"
            kept_mass is not that of all tokens: what is behind the prefix counts by units.

    Raises:
        ValueError: naming the field, what it must be and what came.
    """

    rule: str = "fixed"
    k: int = 512
    k_min: int = 0
    p: float = 0.95
    g: int = 32
    sinks: int = 0
    recents: int = 0
    capacity: int | None = None
    score: str = "mean"
    score_rows: str = "all"
    norm: str = "context"
    candidates: int | None = None

    def __post_init__(self):
        _check_choice("rule", self.rule, RULES)
        _check_choice("g", self.g, GRANULARITIES)
        _check_choice("score", self.score, ("mean", "max"))
        _check_choice("score_rows", self.score_rows, ("open", "all"))
        _check_choice("norm", self.norm, ("context", "prefix"))
        for name in ("k", "k_min", "sinks", "recents"):
            _check_count(name, getattr(self, name), 0)
            if getattr(self, name) > ops.MAX_TOKENS:
                raise ValueError(f"SelectionConfig: {name} must be at most {ops.MAX_TOKENS}, got {getattr(self, name)}")
        for name in ("k", "k_min"):
            if getattr(self, name) % self.g:
                raise ValueError(
                    f"SelectionConfig: {name} must be a multiple of g = {self.g}, got {getattr(self, name)}"
                )
        if self.capacity is not None:
            _check_count("capacity", self.capacity, 1)
            if self.capacity > MAX_CAPACITY:
                raise ValueError(f"SelectionConfig: capacity must be at most {MAX_CAPACITY} units, got {self.capacity}")
        is_real = isinstance(self.p, (int, float)) and not isinstance(self.p, bool)
        if not is_real or not 0 < self.p <= 1:  # NaN is not
            raise ValueError(f"SelectionConfig: p must be a number in (0, 1], got {got(self.p)}")
        if self.candidates is not None:
            self._check_candidates()

    def _check_candidates(self) -> None:
        _check_count("candidates", self.candidates, CANDIDATE_UNIT)
        if self.g != 1 or self.rule not in ("fixed", "joint"):
            raise ValueError(
                'SelectionConfig: candidates must be None but for g = 1 with rule "fixed" or "joint", '
                f'got {self.candidates} with g = {self.g} and rule "{self.rule}"'
            )
        # Sinks, recents and the unit that the prefix ends in take up to two units more than k tokens fill.
        least = (-(-self.k // CANDIDATE_UNIT) + 2) * CANDIDATE_UNIT
        if least > ops.MAX_UNITS:
            most = ops.MAX_UNITS - 2 * CANDIDATE_UNIT
            raise ValueError(f"SelectionConfig: k must be at most {most} with candidates, got {self.k}")
        if self.candidates % CANDIDATE_UNIT or not least <= self.candidates <= ops.MAX_UNITS:
            raise ValueError(
                f"SelectionConfig: candidates must be a multiple of {CANDIDATE_UNIT} in [{least}, {ops.MAX_UNITS}] "
                f"with k = {self.k}, got {self.candidates}"
            )

    def capacity_units(self, num_units: int, num_layers: int, num_kv_heads: int) -> int:
        """Width of the index lists: `capacity`, or the most units that the rule can list, at least 1.

        Args:
            num_units: n, the units of the mass buffer.
            num_layers: L, layers that select.
            num_kv_heads: Hkv.

        Raises:
            ValueError: one of them is no integer >= 0.
        """
        for name, value in (("num_units", num_units), ("num_layers", num_layers), ("num_kv_heads", num_kv_heads)):
            _check_count(name, value, 0)
        if self.capacity is not None:
            return self.capacity
        share = {"fixed": 1, "layer": num_layers, "joint": num_kv_heads, "mass": num_units}[self.rule]
        most = num_units if self.rule == "mass" else max(self.k * share, self.k_min) // self.g
        return max(1, min(num_units, most))


def _check_choice(name: str, value: object, choices: Sequence) -> None:
    if isinstance(value, bool) or not isinstance(value, type(choices[0])) or value not in choices:
        raise ValueError(
            f"SelectionConfig: {name} must be one of {', '.join(str(choice) for choice in choices)}, got {got(value)}"
        )


def _check_count(name: str, value: object, minimum: int, owner: str = "SelectionConfig") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{owner}: {name} must be an integer >= {minimum}, got {got(value)}")


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """What one block attends of its prefix in its sparse steps.

    Construction checks shapes and dtypes; `validate` also reads the values, which waits for the device.

    Fields:
        indices: [L, B, Hkv, Kmax], int32. Unit numbers, strictly ascending, -1 after the count.
        counts: [L, B, Hkv], int32. Listed units.
        kept_mass: [L, B, Hkv], float32. Mass of everything attended (listed units and all from tail_start on); NaN: not
            known.
        tail_start: [B], int32. First token that is attended without being listed; a multiple of g.
        g: tokens per unit.
        overflow: [L, B, Hkv], bool. The rule asked for more than Kmax units and got the best Kmax.
    """

    indices: Tensor
    counts: Tensor
    kept_mass: Tensor
    tail_start: Tensor
    g: int
    overflow: Tensor

    def __post_init__(self):
        _check_g(self.g)
        _check_tensor("indices", self.indices, torch.int32, None)
        heads = tuple(self.indices.shape[:3])
        _check_tensor("counts", self.counts, torch.int32, heads)
        _check_tensor("kept_mass", self.kept_mass, torch.float32, heads)
        _check_tensor("tail_start", self.tail_start, torch.int32, heads[1:2])
        _check_tensor("overflow", self.overflow, torch.bool, heads)
        for name in ("counts", "kept_mass", "tail_start", "overflow"):
            device = getattr(self, name).device
            if device != self.indices.device:
                raise ValueError(f"BlockSelection: {name} must be on {self.indices.device} like indices, got {device}")

    @classmethod
    def from_units(
        cls,
        units: Sequence[Sequence[Sequence[Iterable[int]]]],
        tail_start: Sequence[int],
        g: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "BlockSelection":
        """A selection from outside.

        Args:
            units: units[layer][request][head] is a list of unit numbers below tail_start[request] / g, in any order.
            tail_start: one per request, multiple of g.
            g: tokens per unit.
            capacity: Kmax; None: the longest list, at least 1.
            device: of the tensors.

        Raises:
            TypeError: units or tail_start is no list. ValueError: no integer, a list of another length, a duplicate, a
                unit outside [0, tail_start / g), a list longer than capacity.
        """
        lists = [
            [[_units("units", head) for head in _list("units", request)] for request in _list("units", layer)]
            for layer in _list("units", units)
        ]
        starts = [_integer("tail_start", start) for start in check_list(_OWNER, "tail_start", tail_start, "a list")]
        device = check_device(_OWNER, device)
        _check_g(g)
        _check_tails(starts, g)
        if capacity is not None:
            _check_count("capacity", capacity, 1, _OWNER)
            if capacity > MAX_CAPACITY:
                raise ValueError(f"{_OWNER}: capacity must be at most {MAX_CAPACITY} units, got {capacity}")
        shape = (len(lists), len(lists[0]) if lists else 0, len(lists[0][0]) if lists and lists[0] else 0)
        if not all(shape):
            raise ValueError(f"BlockSelection: units must have a layer, a request and a head, got shape {list(shape)}")
        for l, layer in enumerate(lists):
            if len(layer) != shape[1] or any(len(request) != shape[2] for request in layer):
                raise ValueError(f"BlockSelection: units[{l}] must have {shape[1]} requests of {shape[2]} heads each")
        longest = max(len(head) for layer in lists for request in layer for head in request)
        if capacity is None:
            capacity = max(1, longest)
        elif longest > capacity:
            raise ValueError(f"BlockSelection: units must have at most capacity = {capacity} entries, got {longest}")
        indices = torch.full((*shape, capacity), -1, dtype=torch.int32)
        for l, layer in enumerate(lists):
            for b, request in enumerate(layer):
                for h, head in enumerate(request):
                    indices[l, b, h, : len(head)] = torch.tensor(head, dtype=torch.int32)
        selection = cls(
            indices=indices,
            counts=(indices >= 0).sum(-1, dtype=torch.int32),
            kept_mass=torch.full(shape, math.nan),
            tail_start=torch.tensor(starts, dtype=torch.int32),
            g=g,
            overflow=torch.zeros(shape, dtype=torch.bool),
        )
        for l, layer in enumerate(lists):
            for b, request in enumerate(layer):
                for h, head in enumerate(request):
                    _check_units(f"units[{l}][{b}][{h}]", head, int(selection.tail_start[b]), g)
        selection.validate()
        return selection.to(device)

    @property
    def num_layers(self) -> int:
        return self.indices.shape[0]

    @property
    def capacity(self) -> int:
        return self.indices.shape[3]

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """What sparse_block_attention takes of one layer: indices [B, Hkv, Kmax], counts [B, Hkv], tail_start [B].

        Raises:
            ValueError: layer is not in [0, L).
        """
        check_index(_OWNER, "layer", layer, self.num_layers)
        return self.indices[layer], self.counts[layer], self.tail_start

    def units(self, request: int, layer: int, head: int) -> list[int]:
        """Listed unit numbers, ascending. Waits for the device.

        Raises:
            ValueError: request, layer or head is out of range.
        """
        self._check_list(request, layer, head)
        return self.indices[layer, request, head, : int(self.counts[layer, request, head])].tolist()

    def tokens(self, request: int, layer: int, head: int) -> list[int]:
        """Positions of the listed tokens, ascending; those from tail_start on are not listed. Waits for the device.

        Raises:
            ValueError: request, layer or head is out of range.
        """
        return [unit * self.g + i for unit in self.units(request, layer, head) for i in range(self.g)]

    def with_units(self, request: int, layer: int, head: int, units: Iterable[int]) -> "BlockSelection":
        """A copy in which one list is replaced; its kept_mass becomes NaN, its overflow False. Waits for the device.

        Raises:
            TypeError: units is no list. ValueError: request, layer or head is out of range; no integer, a duplicate, a
                unit outside [0, tail_start / g), more units than the capacity.
        """
        self._check_list(request, layer, head)
        units = _units("units", units)
        _check_units("units", units, int(self.tail_start[request]), self.g)
        if len(units) > self.capacity:
            raise ValueError(
                f"BlockSelection: units must have at most capacity = {self.capacity} entries, got {len(units)}"
            )
        changed = dataclasses.replace(
            self,
            indices=self.indices.clone(),
            counts=self.counts.clone(),
            kept_mass=self.kept_mass.clone(),
            overflow=self.overflow.clone(),
        )
        row = torch.full((self.capacity,), -1, dtype=torch.int32)
        row[: len(units)] = torch.tensor(units, dtype=torch.int32)
        changed.indices[layer, request, head] = row.to(self.indices.device)
        changed.counts[layer, request, head] = len(units)
        changed.kept_mass[layer, request, head] = math.nan
        changed.overflow[layer, request, head] = False
        return changed

    def _check_list(self, request: int, layer: int, head: int) -> None:
        sizes = self.indices.shape
        for name, value, size in (("request", request, sizes[1]), ("layer", layer, sizes[0]), ("head", head, sizes[2])):
            check_index(_OWNER, name, value, size)

    def validate(self) -> "BlockSelection":
        """Reads every value and returns self if all hold; waits for the device.

        Raises:
            ValueError: naming the first entry that is out of range, not ascending or not -1 after its count.
        """
        tail = self.tail_start.cpu()
        _check_tails(tail.tolist(), self.g)
        counts, indices = self.counts.cpu(), self.indices.cpu()
        bad = ((counts < 0) | (counts > self.capacity)).nonzero()
        if len(bad):
            l, b, h = bad[0].tolist()
            raise ValueError(
                f"BlockSelection: counts[{l}, {b}, {h}] must be in [0, capacity = {self.capacity}], "
                f"got {counts[l, b, h]}"
            )
        slot = torch.arange(self.capacity)
        listed = slot < counts[..., None]
        limit = (tail // self.g)[None, :, None, None]
        previous = torch.cat((torch.full_like(indices[..., :1], -1), indices[..., :-1]), -1)
        for wrong, expected in (
            (listed & ((indices < 0) | (indices >= limit)), "in [0, tail_start / g)"),
            (listed & (indices <= previous), "greater than the entry before it"),
            (~listed & (indices != -1), "-1 after the count"),
        ):
            bad = wrong.nonzero()
            if len(bad):
                l, b, h, i = bad[0].tolist()
                value = int(indices[l, b, h, i])
                raise ValueError(f"BlockSelection: indices[{l}, {b}, {h}, {i}] must be {expected}, got {value}")
        return self

    def to(self, device: torch.device | str) -> "BlockSelection":
        """The same selection on `device`. Raises TypeError or ValueError if that is no device."""
        device = check_device(_OWNER, device)
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def save(self, path: str | PathLike) -> None:
        """Writes one safetensors file, whole or not at all, with the five tensors; g is in its metadata.

        Raises:
            TypeError: path is none. ValueError: it can't be written.
            FileNotFoundError: its folder does not exist.
        """
        check_path(_OWNER, path)
        if not os.path.isdir(Path(path).parent):
            raise FileNotFoundError(f"BlockSelection: path must be in a folder that exists, got {path}")
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        try:
            save_tensors(path, tensors, {"format": _FILE_FORMAT, "g": str(self.g)})
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"BlockSelection: path must be a file that can be written, got {path}: {error}") from None

    @classmethod
    def load(cls, path: str | PathLike, device: torch.device | str = "cpu") -> "BlockSelection":
        """Reads what `save` wrote and validates it.

        Raises:
            TypeError: path is none. FileNotFoundError: there is no file.
            ValueError: not such a file, keys missing or unknown, or values that don't hold.
        """
        check_path(_OWNER, path)
        device = check_device(_OWNER, device)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"BlockSelection: path must be a file that exists, got {path}")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"BlockSelection: {path} must be a safetensors file, got: {error}") from None
        if metadata.get("format") != _FILE_FORMAT:
            raise ValueError(f"BlockSelection: {path} must be of format {_FILE_FORMAT}, got {metadata.get('format')!r}")
        if set(tensors) != set(_TENSORS):
            raise ValueError(
                f"BlockSelection: {path} must have the tensors {', '.join(_TENSORS)}, got {', '.join(sorted(tensors))}"
            )
        g = metadata.get("g", "")
        if not g.isdecimal():
            raise ValueError(f"BlockSelection: {path} must name g in its metadata, got {g!r}")
        return cls(**tensors, g=int(g)).validate().to(device)


_TENSORS = ("indices", "counts", "kept_mass", "tail_start", "overflow")


def _check_tensor(name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"BlockSelection: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"BlockSelection: {name} must be {dtype}, got {tensor.dtype}")
    if shape is None:
        if tensor.dim() != 4 or 0 in (tensor.shape[0], *tensor.shape[2:]):
            raise ValueError(f"BlockSelection: {name} must be [L, B, Hkv, Kmax], got {list(tensor.shape)}")
    elif tuple(tensor.shape) != shape:
        raise ValueError(f"BlockSelection: {name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _check_g(g: object) -> None:
    if not isinstance(g, int) or isinstance(g, bool) or g not in GRANULARITIES:
        raise ValueError(f"BlockSelection: g must be one of {GRANULARITIES}, got {got(g)}")


def _integer(name: str, value: object) -> int:
    """An integer of any kind (Python's, NumPy's, of a tensor), never a rounded number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise ValueError(f"BlockSelection: {name} must be integers, got {got(value)}") from None
    if not -(1 << 31) <= integer < 1 << 31:
        raise ValueError(f"BlockSelection: {name} must be integers of 32 bits, got {integer}")
    return integer


def _list(name: str, values: object) -> list:
    return check_list(_OWNER, name, values, "lists of unit numbers")


def _units(name: str, values: object) -> list[int]:
    return sorted(_integer(name, unit) for unit in _list(name, values))


def _check_tails(starts: list[int], g: int) -> None:
    for b, start in enumerate(starts):
        if start < 0 or start % g:
            raise ValueError(f"BlockSelection: tail_start[{b}] must be a multiple of g = {g} >= 0, got {start}")


def _check_units(name: str, ascending: list[int], tail_start: int, g: int) -> None:
    for i, unit in enumerate(ascending):
        if not 0 <= unit < tail_start // g:
            raise ValueError(f"BlockSelection: {name} must be in [0, {tail_start // g}) (tail_start / g), got {unit}")
        if i and unit == ascending[i - 1]:
            raise ValueError(f"BlockSelection: {name} must not repeat a unit, got {unit} twice")


def _check_select(owner: str, mass: object, prefix_lens: object, config: object, votes: object) -> None:
    """What `select` and its baselines check before they look into their arguments."""
    check_type(owner, "config", config, SelectionConfig, "a SelectionConfig")
    check_tensor(owner, "mass", mass)
    check_tensor(owner, "prefix_lens", prefix_lens)
    if mass.dim() != 4:
        raise ValueError(f"{owner}: mass must be [L, B, Hkv, n], got {list(mass.shape)}")
    if config.candidates is not None:
        raise ValueError(
            f"{owner}: config must have no candidates, whose lists are select_tokens's, got {config.candidates}"
        )
    if config.rule != "layer":
        return
    if votes is None:
        raise ValueError(f'{owner}: votes must be given with rule "layer", got None')
    if not isinstance(votes, (tuple, list)) or len(votes) != 3:
        size = f" of {len(votes)}" if isinstance(votes, (tuple, list)) else ""
        raise TypeError(f"{owner}: votes must be the three tensors of row_votes, got {got(votes)}{size}")
    for i, tensor in enumerate(votes):
        check_tensor(owner, f"votes[{i}]", tensor)


def select(
    mass: Tensor,
    prefix_lens: Tensor,
    config: SelectionConfig,
    *,
    votes: tuple[Tensor, Tensor, Tensor] | None = None,
) -> BlockSelection:
    """Budgets and top units of all selecting layers of a step, without waiting for the device.

    Args:
        mass: [L, B, Hkv, n], float32. Share of each unit, as the attention ops emit it with the same g.
        prefix_lens: [B], int32. P of each request.
        config: rule and budgets.
        votes: (votes [L, B, Hkv, n] int32, union_size [L, B, Hkv] int32, coverage [L, B, Hkv] float32) of `row_votes`,
            stacked over the layers; needed by rule "layer" alone.

    Returns:
        BlockSelection on mass's device.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    _check_select("select", mass, prefix_lens, config, votes)
    num_layers, _, num_kv_heads, num_units = mass.shape
    row_votes, union_size, coverage = votes if config.rule == "layer" else (None, None, None)
    indices, counts, kept_mass, tail_start, overflow = ops.select_kv(
        mass,
        prefix_lens,
        g=config.g,
        capacity=config.capacity_units(num_units, num_layers, num_kv_heads),
        rule=config.rule,
        k=config.k,
        k_min=config.k_min,
        p=config.p if config.rule == "mass" else 0.0,
        sinks=config.sinks,
        recents=config.recents,
        votes=row_votes,
        union_size=union_size,
        coverage=coverage,
    )
    return BlockSelection(indices, counts, kept_mass, tail_start, config.g, overflow)


def recency_selection(
    mass: Tensor,
    prefix_lens: Tensor,
    config: SelectionConfig,
    *,
    votes: tuple[Tensor, Tensor, Tensor] | None = None,
) -> BlockSelection:
    """Baseline: every list is as long as that of `select` and has the same sinks, then the most recent units.

    kept_mass is what these lists keep of `mass`. Arguments, returns and errors are those of `select`.
    """
    _check_select("recency_selection", mass, prefix_lens, config, votes)
    number = torch.arange(mass.shape[-1], device=mass.device)
    return _select_by(number.expand(mass.shape), mass, prefix_lens, config, votes)


def random_selection(
    mass: Tensor,
    prefix_lens: Tensor,
    config: SelectionConfig,
    seed: int | Tensor,
    *,
    votes: tuple[Tensor, Tensor, Tensor] | None = None,
) -> BlockSelection:
    """Baseline: every list is as long as that of `select` and has the same sinks and recents, then random units.

    Args:
        mass: as in `select`; kept_mass is what these lists keep of it.
        prefix_lens: as in `select`.
        config: as in `select`.
        seed: an integer, or [B], int64. The list of a (layer, request, head) depends on (seed of the request, layer,
            head) alone, so requests with one seed draw alike, whoever shares the batch.
        votes: as in `select`.

    Returns:
        BlockSelection on mass's device.

    Raises:
        TypeError: seed is neither an integer nor an int64 tensor. ValueError: it does not fit 64 bits or is a tensor of
            another shape. Both of the other arguments as in `select`.
    """
    _check_select("random_selection", mass, prefix_lens, config, votes)
    check_type("random_selection", "seed", seed, (int, Tensor), "an integer or an int64 tensor")
    if isinstance(seed, Tensor) and seed.dtype != torch.int64:
        raise TypeError(f"random_selection: seed must be an integer or an int64 tensor, got {seed.dtype}")
    if isinstance(seed, int) and not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"random_selection: seed must fit 64 bits, got {seed}")
    num_layers, num_requests, num_heads, num_units = mass.shape
    if isinstance(seed, Tensor) and seed.shape not in ((), (1,), (num_requests,)):
        raise ValueError(
            f"random_selection: seed must be one integer or [B] = [{num_requests}], got {list(seed.shape)}"
        )
    device = mass.device
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=device)  # a fill, where a copy would wait for the device
    seed = seed.to(device).expand(num_requests).view(1, -1, 1, 1)
    layer = torch.arange(num_layers, device=device).view(-1, 1, 1, 1)
    head = torch.arange(num_heads, device=device).view(1, 1, -1, 1)
    unit = torch.arange(num_units, device=device)
    return _select_by(random_bits(seed, layer, head, unit) >> 2, mass, prefix_lens, config, votes)


def _select_by(
    score: Tensor,
    mass: Tensor,
    prefix_lens: Tensor,
    config: SelectionConfig,
    votes: tuple[Tensor, Tensor, Tensor] | None,
) -> BlockSelection:
    """`select`, its lists refilled by descending score [L, B, Hkv, n], int64 in [-2^61, 2^61)."""
    chosen = select(mass, prefix_lens, config, votes=votes)
    g, num_units, top = config.g, mass.shape[-1], 1 << 62
    unit = torch.arange(num_units, device=mass.device)
    prefix = prefix_lens.long().clamp(0, num_units * g).view(1, -1, 1, 1)
    eligible = (unit < prefix // g).expand(mass.shape)
    score = torch.where((unit + 1) * g > prefix - config.recents, top // 2 + unit, score)
    score = torch.where(unit * g < config.sinks, top - unit, score)
    score = torch.where(eligible, score, -top)

    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, unit.expand_as(order))
    listed = eligible & (rank < chosen.counts[..., None])
    numbers = torch.where(listed, unit, num_units).sort(-1).values[..., : chosen.capacity]
    numbers = torch.nn.functional.pad(numbers, (0, chosen.capacity - numbers.shape[-1]), value=num_units)
    indices = torch.where(numbers < num_units, numbers, -1).to(torch.int32)
    kept = torch.where(listed | ~eligible, mass.nan_to_num(nan=0.0).double(), 0).sum(-1).float()
    return dataclasses.replace(chosen, indices=indices, kept_mass=kept)
