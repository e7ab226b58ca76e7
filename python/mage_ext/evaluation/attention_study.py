"""How far the first forward of a block foretells the attention of the later ones: recall, kept mass, queries, budgets.

Blocks are those that exact generation writes, or the next ones of a text, uncovered in a random order; every forward of
them is done with the attention of every row looked at. Rows of `mage eval recall` (eval/recall.json). All have

    study                "recall", "alignment" or "budget"
    task, tokens         tokens of a prompt, about, and what follows it: "prose": what the model writes behind held-out
                         text; "prose_forced": that text's own next blocks, uncovered in an order that is the same for
                         every model (one that has learned nothing would write one token over and over); or a task of
                         method_comparison
    weights              of earlier weights alone (--stages): the name of their file
    control              "none"; "base": the weights before the adapter, of the layers that it keeps; "shuffled":
                         entries of each matrix permuted; "two_way": every token attends every other, so that the
                         prefix sees the block (prose_forced)
    n, blocks            contexts, and the blocks of them that count
    T, prefix_tokens     forwards of a whole open block; mean prefix
    x                    share of the block's open positions that is decided, one per forward that the lists are of: the
                         second forward of the block first, the finished block (x = 1) last

study "recall", one row per method, K and g; lists of the first forward unless it says otherwise, against the list that
each later forward would make by its own mean mass over all rows of the block:

    method               mage (mean over all rows, norm context), mage_max, mage_open (mean over the rows open at the
                         start: those whose logits a position consumes that is open then), mage_prefix, probe1, probe5
                         (one or five rows), v1 (votes, budgets by layer; g = 1), carry (mage's of the block before,
                         which is attended, too, uncharged), tidal and quest (lists of the later forward itself),
                         recency, random, oracle (the later forward's own)
    K, g, chance         chance: K / prefix, what random lists share
    score, ci_low, ci_high      mean recall over layers, heads, blocks and later forwards; interval over contexts
    exact                1.0, the oracle's
    recall_worst_layer, recall_p5      least mean of a layer; 5th percentile over (layer, head, block)
    kept, kept_worst_layer, kept_p5    mass that is attended, the block's own tokens included, as a share of what the
                         own list attends
    kept_prefix          the same without the block's tokens and what else nobody lists
    kept_mass, own_mass  the two masses of the share `kept`, means
    recall_by_forward, kept_by_forward      along x
    recall_by_layer, kept_by_layer          layers from the first on

study "alignment", cosine of the block's mean query, over the rows open at the start, of a later forward with that of
the first:

    method               "rotated" (as it meets the keys) or "unrotated" (before the rotary embedding)
    score, ci_low, ci_high, exact      mean over layers, heads, blocks, forwards; exact 1.0
    cosine_by_forward, cosine_by_layer
    next_block, next_block_by_layer    control: first forward of the next block instead; None with one block
    other_text           control: first forward of another context; None with one context

study "budget", what each layer wants, by all rows of the block:

    method               "v1_score": max over heads of |U| (1 - ln coverage), with K; "tokens": prefix tokens that are
                         needed for the share p of the mass, with p, mean over heads
    x                    here from the first forward (x = 0) on
    by_forward_layer     [forwards][layers], means
    spearman             rank correlation over layers of each later forward with the first
    score                mean of spearman; spearman_contexts: the same of single contexts, mean

Test: pytest tests/python/test_attention_study.py
"""

import copy
import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mage_ext import ops, selection
from mage_ext.denoise import DenoiseConfig, DenoiseState, generate, prefill
from mage_ext.evaluation import needles
from mage_ext.evaluation.baselines import Quest
from mage_ext.evaluation.forced_blocks import ForcedBlocks, bootstrap, prose, rows_of
from mage_ext.evaluation.method_comparison import STATIC, TASKS, check_choices, compare_lists, make_case
from mage_ext.models.builtin import load_base
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.transformer import Transformer, rotary, rotate
from mage_ext.paged_forward import PagedForward
from mage_ext.results import StepInfo
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig

CONTROLS = ("none", "base", "shuffled", "two_way")
_SCORED = ("mage", "mage_max", "mage_open", "mage_prefix", "probe1", "probe5")  # lists of a score of the first forward
LISTS = (*_SCORED, "v1", "carry", "tidal", "quest", "recency", "random", "oracle")
NEEDED = (0.9, 0.95)  # shares of the mass whose price in tokens is counted
_SINKS = 4  # of recency and random, as in method_comparison
_NUM_PROBES = 5
_UNIT = 64  # lengths are padded to a multiple of the largest unit


@dataclass(frozen=True)
class Look:
    """What is looked for.

    Fields:
        ks: budgets in tokens. gs: tokens per unit; a K that is no multiple of g is left out. methods: of LISTS.
    """

    ks: tuple[int, ...]
    gs: tuple[int, ...]
    methods: tuple[str, ...] = LISTS

    @property
    def settings(self) -> list[tuple[int, int]]:
        """(K, g)."""
        return [(k, g) for g in self.gs for k in self.ks if k % g == 0]


# ----------------------------------------------------------------------------------------------------------------------
# What exact generation does: the tokens of every forward


@dataclass
class Trajectory:
    """The forwards of one block of A requests.

    Fields:
        forwards: one (tokens [A, Q] int64 as the forward sees them, open [A, Q] bool, live [A] bool) each.
        tokens: [A, Q], after the last forward. finished: [A], bool, took part and has no open position left.
    """

    forwards: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    tokens: Tensor | None = None
    finished: Tensor | None = None


def trajectories(model: Transformer, state: DenoiseState, config: DenoiseConfig) -> list[Trajectory]:
    """What every forward of exact generation sees, block by block.

    Args:
        model: a Transformer. state: of `prefill`; it is forked, not used up. config: sampler, length and EOS.
    """
    size, mask_id, device = model.config.block_size, model.config.mask_id, state.batch.cache.device
    shape = (len(state.prompts), size)
    blocks: list[Trajectory] = []

    def note(info: StepInfo) -> None:
        if info.kind == "commit":
            return
        places = [place for place, request in enumerate(info.requests) if request is not None]
        where = torch.tensor([info.requests[place] for place in places], device=device)
        places = torch.tensor(places, device=device)

        def spread(values: Tensor, fill: int) -> Tensor:
            whole = torch.full(shape, fill, dtype=values.dtype, device=device)
            whole[where] = values[places]
            return whole

        decided, still_open = spread(info.decided, False), spread(info.open, False)
        tokens = spread(info.tokens, mask_id)
        if info.step == 0:
            blocks.append(Trajectory())
        is_open = decided | still_open
        live = decided.any(1)  # a live request decides a position in every forward
        blocks[-1].forwards.append((torch.where(is_open, mask_id, tokens), is_open, live))
        took_part = blocks[-1].forwards[0][2]
        blocks[-1].tokens, blocks[-1].finished = tokens, took_part & ~still_open.any(1)

    run = dataclasses.replace(config, mode="exact", cuda_graphs=False)
    generate(model, state.fork(), run, callback=note)
    for block in blocks:
        block.forwards = [forward for forward in block.forwards if forward[2].any()]  # a flag on CUDA lags a forward
    return [block for block in blocks if block.forwards]


def forced_trajectories(
    blocks: Tensor, *, block_size: int, tokens_per_step: int, mask_id: int, token_shift: bool, seeds: Sequence[int]
) -> list[Trajectory]:
    """Forwards that uncover given blocks in a random order.

    Args:
        blocks: [A, n * block_size], int64, tokens of n blocks. tokens_per_step: uncovered by every forward.
        mask_id: stands for what is not uncovered. token_shift: a block's first token is known from the start.
        seeds: of the order, one per request.
    """
    found = []
    for number, tokens in enumerate(blocks.split(block_size, 1)):
        orders = []
        for seed in seeds:
            order = list(range(int(token_shift), block_size))
            random.Random(f"order/{seed}/{number}").shuffle(order)
            orders.append(order)
        orders = torch.tensor(orders, device=tokens.device)
        everybody = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        block = Trajectory(tokens=tokens, finished=everybody)
        for begin in range(0, orders.shape[1], tokens_per_step):
            is_open = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, orders[:, begin:], True)
            block.forwards.append((torch.where(is_open, mask_id, tokens), is_open, everybody))
        found.append(block)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What one forward shows


@dataclass
class _Seen:
    """One exact forward. Lists of one tensor per layer while it runs, stacked afterwards.

    Fields:
        mass: [L, A, Hkv, n], float32: share of each token, mean over all rows, of the whole context.
        query, unrotated: [L, A, H, D], float32, mean query of the rows open at the start.
        v1: K -> (votes [L, A, Hkv, n] of the first forward alone, union size, coverage [L, A, Hkv]), units of a token.
        scores: of the first forward, (method, g) -> [L, A, Hkv, n / g].
        bounds: of the others, g -> [L, A, Hkv, n / g], Quest's.
    """

    mass: Any = field(default_factory=list)
    query: Any = field(default_factory=list)
    unrotated: Any = field(default_factory=list)
    v1: dict[int, Any] = field(default_factory=dict)
    scores: dict[tuple[str, int], Any] = field(default_factory=dict)
    bounds: dict[int, Any] = field(default_factory=dict)

    def stack(self) -> "_Seen":
        for name in ("mass", "query", "unrotated"):
            setattr(self, name, torch.stack(getattr(self, name)))
        self.v1 = {
            k: tuple(None if part[0] is None else torch.stack(part) for part in zip(*layers, strict=True))
            for k, layers in self.v1.items()
        }
        for table in (self.scores, self.bounds):
            for key, layers in table.items():
                table[key] = torch.stack(layers)
        return self


class _Probe:
    """An AttentionMethod that attends exactly and looks at every row.

    Args:
        look: what for. rows: [A, Q], bool, rows open at the start. first: of its block. quests: g -> Quest.
    Fields:
        seen: the last forward.
    """

    def __init__(self, look: Look, rows: Tensor, first: bool, quests: dict[int, Quest], model: Transformer):
        self._look, self._rows, self._first, self._quests = look, rows, first, quests
        self._config = model.config
        self._views: dict[
            int, PagedForward
        ] = {}  # g -> the forward as that Quest sees it: each keeps things of its own
        self.seen = _Seen()

    def prepare(self) -> None:
        """Nothing: no lists are made."""

    def written(self, forward: PagedForward, layer: int, k: Tensor, k_cache: Tensor) -> None:
        """See AttentionMethod. Quest's bounds are made anew for every block."""

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """See AttentionMethod."""
        return num_tokens

    def attend(self, forward: PagedForward, layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See AttentionMethod."""
        pool = (forward.block_table, forward.seq_lens)
        out, lse = ops.block_attention(q, k_cache, v_cache, *pool, max_seq_len=forward.max_seq_len)
        rows = ops.token_mass(q, k_cache, *pool, lse, max_seq_len=forward.max_seq_len, score="rows")
        self.look(q, rows, forward.prefix_lens)
        if not self._first:
            for g, quest in self._quests.items():
                view = self._views.setdefault(g, dataclasses.replace(forward))
                self.seen.bounds.setdefault(g, []).append(quest.scores(view, layer, q))
        return out

    def look(self, q: Tensor, rows: Tensor, prefix_lens: Tensor) -> None:
        """One layer. q: [A, Q, H, D]. rows: [A, Hkv, n, R], float32, logarithms of the shares of each token in each
        row's attention, which are overwritten. prefix_lens: [A], int32."""
        seen = self.seen
        for k in dict.fromkeys(self._look.ks):
            votes = ops.row_votes(rows, prefix_lens, k=k, g=1)
            seen.v1.setdefault(k, []).append(votes if self._first else (None, *votes[1:]))
        shares = rows.exp_()  # [A, Hkv, n, R]
        seen.mass.append(shares.mean(-1))

        per_row = self._rows.float() / self._rows.sum(1, keepdim=True).clamp(min=1)
        seen.query.append(torch.einsum("aq,aqhd->ahd", per_row, q.float()))
        positions = prefix_lens[:, None] + torch.arange(q.shape[1], device=q.device)
        cos, sin = rotary(positions, q.shape[-1], self._config.rope_theta, torch.float32)
        seen.unrotated.append(torch.einsum("aq,aqhd->ahd", per_row, rotate(q.float(), cos, -sin)))

        if self._first:
            self._score(prefix_lens, shares, per_row)

    def _score(self, prefix_lens: Tensor, shares: Tensor, per_row: Tensor) -> None:
        """Scores of the first forward. shares: [A, Hkv, n, R]; per_row: [A, Q], weights of the rows open at the
        start."""
        num_rows = per_row.shape[1]
        group = shares.shape[-1] // num_rows  # heads per KV head

        def keep(name: str, g: int, score: Tensor) -> None:
            self.seen.scores.setdefault((name, g), []).append(score)

        by_token = {}
        for name in set(self._look.methods) & {"mage_open", "mage_prefix", "probe1", "probe5"}:
            if name == "mage_open":
                by_token[name] = _weighted(shares, per_row.repeat_interleave(group, 1)[:, None] / group)
            elif name == "mage_prefix":
                position = torch.arange(shares.shape[2], device=shares.device)
                inside = (position < prefix_lens[:, None]).float()[:, None]  # [A, 1, n]
                total = torch.einsum("ahnr,axn->ahr", shares, inside)
                own = 1 / total.clamp(min=torch.finfo(torch.float32).tiny) / total.shape[-1]  # [A, Hkv, R]
                by_token[name] = _weighted(shares, own) * inside
            else:
                count = 1 if name == "probe1" else _NUM_PROBES
                rows = probe_rows(num_rows, count)
                picked = torch.stack([shares[..., row * group : (row + 1) * group].mean(-1) for row in rows])
                by_token[name] = picked.mean(0)
        for g in self._look.gs:
            for name, score in by_token.items():
                keep(name, g, _units(score, g))
            if "mage_max" in self._look.methods:
                by_unit = shares.unflatten(2, (-1, g)).sum(3) if g > 1 else shares
                keep("mage_max", g, by_unit.amax(-1))


def _weighted(shares: Tensor, weights: Tensor) -> Tensor:
    """Sums [A, Hkv, n] over the rows of shares [A, Hkv, n, R] with weights [A, Hkv or 1, R]."""
    return torch.matmul(shares, weights.expand(-1, shares.shape[1], -1)[..., None]).squeeze(-1)


def _units(mass: Tensor, g: int) -> Tensor:
    """Sums [..., n / g] of mass [..., n]."""
    return mass.unflatten(-1, (-1, g)).sum(-1) if g > 1 else mass


def probe_rows(num_rows: int, count: int) -> list[int]:
    """The middle row for one, else evenly spaced rows with both ends (0, 8, 16, 23, 31 of 32 for five)."""
    if count == 1:
        return [num_rows // 2]
    return [round(i * (num_rows - 1) / (count - 1)) for i in range(count)]


class _TwoWay:
    """Stands for ForcedBlocks where every token attends every other, those of the block among them: the prefix has no
    K and V of its own, so that each forward does all of it.

    Args:
        model: a Transformer. prefixes: [A, n], int64.
    """

    def __init__(self, model: Transformer, prefixes: Tensor):
        self._model, self._prefixes = model, prefixes

    @property
    def start(self) -> Tensor:
        """[A], int32, first position of each request's block."""
        count, length = self._prefixes.shape
        return torch.full((count,), length, dtype=torch.int32, device=self._prefixes.device)

    def hidden(self, tokens: Tensor, *, method: _Probe, final: bool, **_: Any) -> None:
        """One forward over prefixes and tokens [A, Q], which `method` looks at. final: they are the block's own."""
        whole = torch.cat((self._prefixes, tokens), 1)
        count, length = whole.shape
        start, begin = self.start, self._prefixes.shape[1]
        padding = -length % _UNIT

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
            # [A, Hkv, n, Q * group]: the heads of a row stand side by side.
            own = q[:, begin:].unflatten(2, (k.shape[2], -1)).permute(0, 2, 1, 3, 4).flatten(2, 3).float()
            scores = keys.float() @ own.transpose(-1, -2) / math.sqrt(q.shape[-1])
            rows = torch.nn.functional.pad(scores.log_softmax(2), (0, 0, 0, padding), value=-math.inf)
            method.look(q[:, begin:], rows.contiguous(), start)
            return out.transpose(1, 2)

        positions = torch.arange(length, device=whole.device).expand(count, -1)
        self._model.hidden(whole, positions, attend)
        if final:
            self._final = tokens

    def advance(self, live: Tensor | None = None) -> None:
        """The next block begins where this one ends."""
        self._prefixes = torch.cat((self._prefixes, self._final), 1)

    def close(self) -> None:
        """Nothing: it holds no pages."""


# ----------------------------------------------------------------------------------------------------------------------
# Budgets and ranks


def tokens_needed(mass: Tensor, prefix_lens: Tensor, share: float) -> Tensor:
    """Fewest prefix tokens [L, A, Hkv], float32, that with everything at or past the prefix hold a share of the mass.

    Args:
        mass: [L, A, Hkv, n], float32, of single tokens. prefix_lens: [A], int32.
    """
    inside = torch.arange(mass.shape[-1], device=mass.device) < prefix_lens[:, None, None]  # [A, 1, n]
    ordered = torch.where(inside, mass, 0.0).sort(-1, descending=True).values.double()
    total = mass.double().sum(-1, keepdim=True)
    # What is kept with the j heaviest tokens; one more is needed while that is too little.
    kept = total - ordered.sum(-1, keepdim=True) + ordered.cumsum(-1) - ordered
    return ((kept < share * total) & (ordered > 0)).sum(-1).float()


def layer_scores(union_size: Tensor, coverage: Tensor) -> Tensor:
    """s_l = max over KV heads of |U| (1 - ln coverage), MAGE v1 (arXiv 2602.14209 v1): [L, A], float32, of union_size
    [L, A, Hkv], int32, and coverage [L, A, Hkv], float32."""
    tiny = torch.finfo(torch.float32).tiny
    return (union_size.float() * (1 - coverage.clamp(min=tiny).log())).amax(-1)


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation over dim 0 (Spearman 1904), equal values sharing their mean rank; NaN where all are equal.
    one, other: [L, ...]. Returns [...], float64."""
    ranks = []
    for values in (one, other):
        lower = (values[:, None] > values[None]).sum(1)
        equal = (values[:, None] == values[None]).sum(1)
        rank = lower.double() + equal.double() / 2
        ranks.append(rank - rank.mean(0))
    return (ranks[0] * ranks[1]).sum(0) / (ranks[0].square().sum(0) * ranks[1].square().sum(0)).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Sums over blocks


@dataclass
class Along:
    """Sums of a quantity along the forwards of blocks: totals [F, ...] and weights [F], float64."""

    totals: Tensor
    weights: Tensor

    def __add__(self, other: "Along") -> "Along":
        return Along(self.totals + other.totals, self.weights + other.weights)

    def means(self) -> Tensor:
        """[F, ...]."""
        return self.totals / self.weights.clamp(min=1).view(-1, *[1] * (self.totals.dim() - 1))


@dataclass
class Blocks:
    """A quantity of single blocks: values [blocks, ...] float32, contexts [blocks] int64 (whose block)."""

    values: Tensor
    contexts: Tensor

    def __add__(self, other: "Blocks") -> "Blocks":
        return Blocks(torch.cat((self.values, other.values)), torch.cat((self.contexts, other.contexts)))

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over contexts, of each of which all values are one mean."""
        flat = self.values.flatten(1).double().mean(1)
        known, place = self.contexts.unique(return_inverse=True)
        sums = torch.zeros(len(known), dtype=torch.float64).index_add(0, place, flat)
        counts = torch.zeros(len(known), dtype=torch.float64).index_add(0, place, torch.ones_like(flat))
        return bootstrap(sums / counts)


class Tally:
    """All sums of a study; they add up over batches.

    Fields:
        along: name -> Along. blocks: name -> Blocks. Names are tuples that begin with what is measured.
    """

    def __init__(self):
        self.along: dict[tuple, Along] = {}
        self.blocks: dict[tuple, Blocks] = {}

    def extend(self, other: "Tally") -> None:
        for mine, theirs in ((self.along, other.along), (self.blocks, other.blocks)):
            for key, value in theirs.items():
                mine[key] = mine[key] + value if key in mine else value

    def add_along(self, key: tuple, length: int, at: int, values: Tensor, live: Tensor) -> None:
        """Adds values [..., A] of the live requests [A] at a forward. Values are summed over requests."""
        values = torch.where(live, values.double(), 0.0).sum(-1)
        if key not in self.along:
            zeros = values.new_zeros(length, *values.shape)
            self.along[key] = Along(zeros, values.new_zeros(length))
        self.along[key].totals[at] += values
        self.along[key].weights[at] += live.sum()

    def add_blocks(self, key: tuple, values: Tensor, contexts: Tensor) -> None:
        """Adds values [blocks, ...]."""
        new = Blocks(values.float(), contexts)
        self.blocks[key] = self.blocks[key] + new if key in self.blocks else new

    def cpu(self) -> "Tally":
        """The same with all tensors on the CPU."""
        for table in (self.along, self.blocks):
            for key, value in table.items():
                table[key] = type(value)(*(getattr(value, each.name).cpu() for each in dataclasses.fields(value)))
        return self


class _BlockStudy:
    """One block: lists of its first forward against all later ones.

    Args:
        look: what for. tally: takes the sums. length: forwards of a whole block, the finished one included, without the
            first. seen: the first forward. start: [A], int32. before: the study of the block before.
        contexts: [A], int64, numbers of the contexts. live: [A], bool, has this block.
    """

    def __init__(
        self,
        look: Look,
        tally: Tally,
        length: int,
        seen: _Seen,
        start: Tensor,
        before: "_BlockStudy | None",
        contexts: Tensor,
        live: Tensor,
    ):
        self._look, self._tally, self._length, self._start = look, tally, length, start
        self._contexts, self.live = contexts, live
        self.first = seen
        self._num_layers = seen.mass.shape[0]
        self.lists = {key: self._lists(seen, *key) for key in self._keys()}
        self._carried = {} if before is None else before.lists
        seen.scores.clear()  # much memory, not needed any more
        seen.v1 = {k: (None, *votes[1:]) for k, votes in seen.v1.items()}
        self._sums: dict[tuple, list[Tensor]] = {}
        self._count = torch.zeros(len(live), device=live.device)
        if before is not None:
            self._next_block(before)
        self._other_text()
        self._budgets(seen, 0, torch.zeros_like(live, dtype=torch.float64), live)

    def _keys(self) -> list[tuple[str, int, int]]:
        """(method, K, g) of the lists that are made of the first forward."""
        made = [name for name in (*_SCORED, "v1", "recency", "random") if name in self._look.methods]
        if "carry" in self._look.methods and "mage" not in made:
            made.append("mage")
        return [(name, k, g) for k, g in self._look.settings for name in made if name != "v1" or g == 1]

    def _lists(self, seen: _Seen, name: str, k: int, g: int) -> BlockSelection:
        mass = _units(seen.mass, g)
        config = SelectionConfig(k=k, g=g, sinks=_SINKS if name in ("recency", "random") else 0)
        if name == "v1":
            return selection.select(mass, self._start, dataclasses.replace(config, rule="layer"), votes=seen.v1[k])
        if name == "recency":
            return selection.recency_selection(mass, self._start, config)
        if name == "random":
            return selection.random_selection(mass, self._start, config, self._contexts)
        return selection.select(mass if name == "mage" else seen.scores[name, g], self._start, config)

    def later(self, seen: _Seen, at: int, share: Tensor, live: Tensor) -> None:
        """A later forward. at: its place along x. share: [A], float64, decided. live: [A], bool."""
        tally, length = self._tally, self._length
        self._count += live
        tally.add_along(("x",), length, at, share, live)
        masses = {g: _units(seen.mass, g) for g in self._look.gs}
        for k, g in self._look.settings:
            mass = masses[g]
            own = selection.select(mass, self._start, SelectionConfig(k=k, g=g))
            for name in self._look.methods:
                lists = self._later_lists(name, k, g, own, seen)
                if lists is None:
                    continue
                recall, kept, kept_own, free = compare_lists(lists, own, mass)
                tiny = torch.finfo(kept.dtype).tiny
                values = {"recall": recall, "kept": kept / kept_own.clamp(min=tiny)}
                values["kept_prefix"] = (kept - free) / (kept_own - free).clamp(min=tiny)
                values |= {"kept_mass": kept, "own_mass": kept_own}
                for what, value in values.items():  # [L, A, Hkv]
                    key = (what, name, k, g)
                    value = torch.where(live[:, None], value, 0.0)
                    self._sums[key] = self._sums[key] + value if key in self._sums else value
                    if what in ("recall", "kept"):
                        tally.add_along(key, length, at, value.mean((0, 2)), live)
        for what in ("query", "unrotated"):
            cosine = torch.cosine_similarity(getattr(self.first, what), getattr(seen, what), -1).mean(-1)  # [L, A]
            key = ("cosine", what)
            value = torch.where(live, cosine, 0.0)
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            tally.add_along(key, length, at, cosine.mean(0), live)
        self._budgets(seen, at + 1, share, live)

    def _later_lists(self, name: str, k: int, g: int, own: BlockSelection, seen: _Seen) -> BlockSelection | None:
        if name == "oracle":
            return own
        if name == "carry":
            return self._carried.get(("mage", k, g))
        if name == "tidal":
            # The first layer and the one in the middle choose for those behind them.
            middle = self._num_layers // 2 if self._num_layers > 2 else self._num_layers
            anchor = [0 if layer < middle else middle for layer in range(self._num_layers)]
            names = ("indices", "counts", "kept_mass", "overflow")
            return dataclasses.replace(own, **{each: getattr(own, each)[anchor] for each in names})
        if name == "quest":
            unit = torch.arange(seen.bounds[g].shape[-1], device=self._start.device)
            whole = unit < (self._start // g)[:, None, None]
            bounds = seen.bounds[g]
            least = torch.where(whole, bounds, math.inf).amin(-1, keepdim=True)
            # select_kv ranks numbers >= 0.
            return selection.select(torch.where(whole, bounds - least, 0.0), self._start, SelectionConfig(k=k, g=g))
        return self.lists.get((name, k, g))

    def _budgets(self, seen: _Seen, at: int, share: Tensor, live: Tensor) -> None:
        """What the layers want. at: the first forward is 0."""
        tally, length = self._tally, self._length + 1
        wanted = {("v1_score", k): layer_scores(votes[1], votes[2]) for k, votes in seen.v1.items()}
        wanted |= {("tokens", p): tokens_needed(seen.mass, self._start, p).mean(-1) for p in NEEDED}
        tally.add_along(("budget x",), length, at, share, live)
        if at == 0:
            self._wanted_first = wanted
        for key, value in wanted.items():  # [L, A]
            tally.add_along(("budget", *key), length, at, value, live)
            rho = spearman(self._wanted_first[key], value)
            known = live & ~rho.isnan()
            tally.add_along(("spearman", *key), length, at, rho.nan_to_num(nan=0.0), known)

    def _next_block(self, before: "_BlockStudy") -> None:
        """Queries of this block's first forward with those of the block before."""
        both = self.live & before.live
        for what in ("query", "unrotated"):
            cosine = torch.cosine_similarity(getattr(before.first, what), getattr(self.first, what), -1).mean(-1)
            self._tally.add_along(("next block", what), 1, 0, cosine, both)

    def _other_text(self) -> None:
        """Queries of the first forward with those of another context of the batch."""
        who = self.live.nonzero().squeeze(1)
        if len(who) < 2:
            return
        for what in ("query", "unrotated"):
            first = getattr(self.first, what)[:, who]
            cosine = torch.cosine_similarity(first, first.roll(1, 1), -1).mean((0, 2))
            self._tally.add_along(("other text", what), 1, 0, cosine, torch.ones_like(who, dtype=torch.bool))

    def close(self) -> None:
        """Hands in the block's means over its later forwards."""
        who = ((self._count > 0) & self.live).nonzero().squeeze(1)
        if not len(who):
            return
        for key, total in self._sums.items():
            values = total.movedim(1, 0)[who] / self._count[who].view(-1, *[1] * (total.dim() - 1))  # [blocks, L, ...]
            if key[0] in ("kept_prefix", "kept_mass", "own_mass"):  # nobody asks for single layers of these
                values = values.mean((1, 2))[:, None]
            self._tally.add_blocks(key, values, self._contexts[who])
        self._tally.add_blocks(("prefix",), self._start[who].float()[:, None], self._contexts[who])
        self.first = dataclasses.replace(self.first, mass=None)  # the next block wants queries and lists alone


# ----------------------------------------------------------------------------------------------------------------------
# The study


def study(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    look: Look,
    num_blocks: int = 4,
    sampler: SamplerConfig = STATIC,
    contexts: Sequence[int] | None = None,
    ignore_eos: bool = False,
    forced: bool = False,
    two_way: bool = False,
) -> Tally:
    """Sums over the blocks that exact generation writes after every prompt, or over the last blocks of given texts.

    Args:
        loaded: the model. prompts: A lists of ids, in one batch, longer than every K. look: what for.
        num_blocks: of an answer, at most. sampler: of the generation; of a static one, T is what it needs for an open
            block. contexts: numbers of the prompts, seeds of "random" too; None: 0, 1, ...
        ignore_eos: blocks are written whatever the model says. forced: nothing is written; the last num_blocks blocks
            of every prompt are uncovered in a random order. Then prompts are multiples of the block, of one length.
        two_way: with forced, every token attends every other, as the model was not trained to: the block is seen by its
            prefix. "quest" is left out, which needs kept K.
    Raises:
        ValueError: naming the argument.
    """
    check_choices("study", "look.methods", look.methods, LISTS)
    model = loaded.model
    size = model.config.block_size
    numbers = list(range(len(prompts)) if contexts is None else contexts)
    if forced:
        lengths = {len(ids) for ids in prompts}
        if len(lengths) != 1 or max(lengths) % size:
            raise ValueError(
                f"study: prompts must be of one length, a multiple of {size}, with forced, got {sorted(lengths)}"
            )
        texts = [list(ids[-num_blocks * size :]) for ids in prompts]
        prompts = [ids[: -num_blocks * size] for ids in prompts]
    shortest = min(len(ids) // size * size for ids in prompts)
    if max(look.ks) >= shortest:
        raise ValueError(
            f"study: look.ks must be below every prefix, the shortest of which has {shortest} tokens, "
            f"got {max(look.ks)}"
        )
    if two_way and not forced:
        raise ValueError("study: two_way must come with forced, got forced False")
    device = model.embed_tokens.weight.device
    state = None
    if not two_way:
        config = DenoiseConfig(
            max_new_tokens=num_blocks * size, sampler=sampler, ignore_eos=ignore_eos, cuda_graphs=False
        )
        state = prefill(model, prompts, config)
    if forced:
        blocks = forced_trajectories(
            torch.tensor(texts, device=device),
            block_size=size,
            tokens_per_step=sampler.tokens_per_step,
            mask_id=model.config.mask_id,
            token_shift=model.config.token_shift,
            seeds=numbers,
        )
    else:
        blocks = trajectories(model, state, config)
    numbers = torch.tensor(numbers, device=device)
    quests = {}
    if two_way:
        replay = _TwoWay(model, torch.tensor([list(ids) for ids in prompts], device=device))
        look = dataclasses.replace(look, methods=tuple(name for name in look.methods if name != "quest"))
    else:
        replay = ForcedBlocks(model, state, num_blocks=num_blocks + 1)  # a prompt's tail adds a block
    if "quest" in look.methods:
        quests = {g: Quest(replay.cache, k=g, g=g) for g in look.gs}
    layers = {layer: layer for layer in range(model.config.num_layers)}
    length = sampler.max_forwards(size - int(model.config.token_shift))
    tally, before = Tally(), None
    try:
        with torch.no_grad():
            for block in blocks:
                for quest in quests.values():
                    quest.prepare()
                _, open_first, _ = block.forwards[0]
                rows, num_open = rows_of(open_first, model.config.token_shift), open_first.sum(1).double()
                steps = [(at, *forward) for at, forward in enumerate(block.forwards)]
                # The finished block is the last one along x, however many forwards it took.
                steps.append((length, block.tokens, torch.zeros_like(open_first), block.finished))
                current: _BlockStudy | None = None
                for at, tokens, is_open, live in steps:
                    if not live.any():
                        continue
                    probe = _Probe(look, rows, at == 0, quests, model)
                    final = at == length
                    replay.hidden(tokens, live=live, layers=layers, method=probe, final=final)
                    seen = probe.seen.stack()
                    if current is None:
                        current = _BlockStudy(look, tally, length, seen, replay.start, before, numbers, live)
                    else:
                        current.later(seen, at - 1, 1 - is_open.sum(1) / num_open.clamp(min=1), live)
                    del seen, probe
                current.close()
                before = current
                replay.advance(block.finished)
    finally:
        replay.close()
        if state is not None:
            state.release()
    return tally.cpu()


def rows(tally: Tally, look: Look, *, task: str, tokens: int, control: str, forwards: int) -> list[dict[str, Any]]:
    """The rows of an evaluation file, as the module's docstring has them. forwards: T."""
    prefix = tally.blocks["prefix",]
    head = {
        "task": task,
        "tokens": tokens,
        "control": control,
        "n": len(prefix.contexts.unique()),
        "blocks": len(prefix.contexts),
        "T": forwards,
        "prefix_tokens": round(prefix.values.mean().item(), 1),
    }
    along = tally.along["x",]
    known = (along.weights > 0).nonzero().squeeze(1)  # forwards that some block came to
    x = _rounded(along.means()[known])
    found: list[dict[str, Any]] = []
    for k, g in look.settings:
        for name in look.methods:
            if ("recall", name, k, g) not in tally.blocks:
                continue
            recall, kept = tally.blocks["recall", name, k, g], tally.blocks["kept", name, k, g]
            low, high = recall.interval()
            row = {"study": "recall", **head, "method": name, "K": k, "g": g}
            row |= {"blocks": len(recall.contexts), "chance": _rounded((k / prefix.values).mean())}
            row |= {"score": _rounded(recall.values.mean()), "exact": 1.0}
            row |= {"ci_low": round(low, 4), "ci_high": round(high, 4)}
            for what, values in (("recall", recall.values), ("kept", kept.values)):  # [blocks, L, Hkv]
                if what == "kept":
                    row["kept"] = _rounded(values.mean())
                row[f"{what}_worst_layer"] = _rounded(values.mean((0, 2)).amin())
                row[f"{what}_p5"] = _rounded(torch.quantile(_thinned(values), 0.05))
            for what in ("kept_prefix", "kept_mass", "own_mass"):
                row[what] = _rounded(tally.blocks[what, name, k, g].values.mean())
            row["x"] = x
            for what in ("recall", "kept"):
                row[f"{what}_by_forward"] = _rounded(tally.along[what, name, k, g].means()[known])
            if name == "mage":
                for what, values in (("recall", recall.values), ("kept", kept.values)):
                    row[f"{what}_by_layer"] = _rounded(values.mean((0, 2)))
            found.append(row)
    for what, name in (("query", "rotated"), ("unrotated", "unrotated")):
        cosine = tally.blocks["cosine", what]  # [blocks, L]
        low, high = cosine.interval()
        row = {"study": "alignment", **head, "method": name, "score": _rounded(cosine.values.mean()), "exact": 1.0}
        row |= {"ci_low": round(low, 4), "ci_high": round(high, 4), "x": x}
        row["cosine_by_forward"] = _rounded(tally.along["cosine", what].means()[known])
        row["cosine_by_layer"] = _rounded(cosine.values.mean(0))
        later = tally.along.get(("next block", what))
        later = later.means()[0] if later is not None and later.weights.sum() else None  # [L]
        row["next_block"] = None if later is None else _rounded(later.mean())
        row["next_block_by_layer"] = None if later is None else _rounded(later)
        other = tally.along.get(("other text", what))
        row["other_text"] = None if other is None else _rounded(other.means()[0])
        found.append(row)
    along = tally.along["budget x",]
    known = (along.weights > 0).nonzero().squeeze(1)
    x = _rounded(along.means()[known])
    wanted = [("v1_score", k) for k in dict.fromkeys(look.ks)] + [("tokens", p) for p in NEEDED]
    for name, value in wanted:
        by_layer = tally.along["budget", name, value].means()[known]  # [F + 1, L]
        rho = spearman(by_layer[:1].expand_as(by_layer).T, by_layer.T)
        of_contexts = tally.along["spearman", name, value]
        contexts = of_contexts.totals[1:].sum() / of_contexts.weights[1:].sum().clamp(min=1)
        row = {"study": "budget", **head, "method": name, "K" if name == "v1_score" else "p": value}
        row |= {"score": _rounded(rho[1:].mean()), "spearman_contexts": _rounded(contexts), "x": x}
        row |= {"spearman": _rounded(rho[1:]), "by_forward_layer": [_rounded(each, 5) for each in by_layer]}
        found.append(row)
    return found


def _rounded(values: Tensor, figures: int = 4) -> Any:
    """A number or a list, of that many significant figures; None where it is no number."""
    if values.dim():
        return [_rounded(value, figures) for value in values]
    value = values.item()
    return float(f"{value:.{figures}g}") if math.isfinite(value) else None


def _thinned(values: Tensor, most: int = 1 << 23) -> Tensor:
    """Values [N] for torch.quantile, which takes 16 million at most: every so manieth of more."""
    flat = values.flatten()
    return flat[:: -(-len(flat) // most)]


def suite(
    runner: needles.Runner,
    n: int,
    look: Look,
    tasks_wanted: Sequence[str] = ("prose", "four_keys"),
    tokens: Sequence[int] = (2048,),
    num_blocks: int = 4,
    tokens_per_step: int = 4,
    control: str = "none",
) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after every batch of contexts.

    Args:
        runner: of the model. n: contexts per task and length, seeds 0 .. n - 1. look: what for.
        tasks_wanted: "prose", "prose_forced" or of method_comparison.TASKS. tokens: of a prompt; prose takes whole
            blocks.
        num_blocks: of an answer, at most; retrieval ends when the model ends it. tokens_per_step: of the generation.
        control: of CONTROLS.
    Raises:
        ValueError: naming the argument.
    """
    check_choices("suite", "tasks_wanted", tasks_wanted, ("prose", "prose_forced", *TASKS))
    check_choices("suite", "control", [control], CONTROLS)
    check_choices("suite", "look.methods", look.methods, LISTS)
    if control == "two_way" and any(task != "prose_forced" for task in tasks_wanted):
        raise ValueError(f"suite: tasks_wanted must be prose_forced with two_way, got {', '.join(tasks_wanted)}")
    if not look.settings:
        raise ValueError(f"suite: look.ks must hold a multiple of one of gs = {list(look.gs)}, got {list(look.ks)}")
    sampler = dataclasses.replace(STATIC, tokens_per_step=tokens_per_step)
    done: list[dict[str, Any]] = []
    for task in tasks_wanted:
        for length in tokens:
            arguments = dict(task=task, tokens=length, look=look, num_blocks=num_blocks, sampler=sampler)
            work = functools.partial(_work, **arguments, control=control)
            whole, now = Tally(), []
            for part, forwards in runner.parts(work, n):
                whole.extend(part)
                told = dict(task=task, tokens=length, control=control, forwards=forwards)
                now = rows(whole, look, **told)
                if runner.progress is not None:
                    runner.progress(f"{task}, {length} tokens: {now[0]['n']}/{n} contexts, {_line(now[0])}")
                yield done + now
            done += now


def _work(
    seeds: range,
    *,
    task: str,
    tokens: int,
    look: Look,
    num_blocks: int,
    sampler: SamplerConfig,
    control: str,
) -> tuple[Tally, int]:
    """The sums of some contexts, and T."""
    loaded, maker = needles.worker()
    size, shift = loaded.config.block_size, int(loaded.config.token_shift)
    forced = task == "prose_forced"
    if task == "prose" or forced:
        length = tokens // size * size + (num_blocks * size if forced else 0)
        prompts = [prose(maker, seed, length) for seed in seeds]
    else:
        prompts = [make_case(maker, task, seed, tokens)[1] for seed in seeds]
    loaded = _controlled(loaded, control)
    two_way = control == "two_way"
    tally = study(loaded, prompts, look, num_blocks, sampler, list(seeds), task == "prose", forced, two_way)
    return tally, sampler.max_forwards(size - shift)


_control: dict[str, LoadedModel] = {}


def _controlled(loaded: LoadedModel, control: str) -> LoadedModel:
    """The model of a control, made once per process; its tokenizer is that of `loaded`."""
    if control in ("none", "two_way"):
        return loaded
    if control not in _control:
        weight = loaded.model.embed_tokens.weight
        if control == "base":
            config, model, _ = load_base(cut=needles.worker_cut())
            if config != loaded.config:
                raise ValueError(f"suite: the base before adaptation must be {loaded.config}, got {config}")
            model = model.to(weight.device, weight.dtype)
        else:
            model = shuffled(loaded.model)
        _control[control] = dataclasses.replace(loaded, model=model)
    return _control[control]


@torch.no_grad()
def shuffled(model: Transformer, seed: int = 0) -> Transformer:
    """A copy that has learned nothing: the entries of every matrix are permuted, norms and biases stay."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return model


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['method']} K={row['K']} g={row['g']} recall {100 * row['score']:.1f} %, kept {100 * row['kept']:.1f} %"
    )


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Recall and kept mass in percent by task, length, g and K, as lines of text."""
    lines = []
    recalls = [row for row in rows if row["study"] == "recall"]
    for task, tokens, g in dict.fromkeys((row["task"], row["tokens"], row["g"]) for row in recalls):
        inside = [row for row in recalls if (row["task"], row["tokens"], row["g"]) == (task, tokens, g)]
        ks = sorted({row["K"] for row in inside})
        first = inside[0]
        lines.append(
            f"{task}, {tokens} tokens, g = {g}, control {first['control']}, {first['n']} contexts: recall / kept, %"
        )
        lines.append(f"{'K':>14}" + "".join(f"{k:>16}" for k in ks))
        for name in dict.fromkeys(row["method"] for row in inside):
            at = {row["K"]: row for row in inside if row["method"] == name}
            told = [f"{100 * at[k]['score']:.1f} / {100 * at[k]['kept']:.1f}" if k in at else "" for k in ks]
            lines.append(f"{name:>14}" + "".join(f"{text:>16}" for text in told))
    for row in rows:
        if row["study"] != "recall":
            what = row["method"] + "".join(f" {name} = {row[name]}" for name in ("K", "p") if name in row)
            lines.append(f"{row['study']}, {row['task']}, {row['tokens']} tokens, {what}: {row['score']}")
    return lines
