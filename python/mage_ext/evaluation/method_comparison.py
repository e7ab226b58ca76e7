"""All methods at equal K on one loop: what each finds, and how far a block's first forward foretells the later ones.

The methods are those of `baselines.methods`. Every method of a case continues from one shared prefill, over the same
prompts, with the same sampler, K, g and dense layers. Nothing is forced into a list, except that the two floors,
recency and random, always keep the first 4 tokens (at g > 1 the first unit), which they charge to K like all else.

Test: pytest tests/python/test_method_comparison.py
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mage_ext import selection
from mage_ext.cache import PagedCache
from mage_ext.denoise import DenoiseConfig, DenoiseState, generate, prefill
from mage_ext.evaluation import baselines, needles
from mage_ext.evaluation.tasks import Case
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.transformer import Transformer
from mage_ext.paged_forward import Emission, PagedForward
from mage_ext.results import check_answered
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import CANDIDATE_UNIT, BlockSelection, SelectionConfig

METHODS = baselines.METHODS
# What else is compared on demand; see `configs`.
VARIANTS = ("oracle", "carry", "mage_max", "mage_open", "mage_prefix", "v1", "joint", "mass", "two_level")
ALL_METHODS = METHODS + VARIANTS
# Asked facts, and distractors of the same form. The contexts of _REGISTERS are lines alone; those of _VARIABLES hide
# chains of 1 to 4 hops, that of frequent_words is a list whose three most frequent words are asked for.
TASKS = {
    "needle": (1, 0),
    "four_keys": (4, 0),
    "four_of_eight": (4, 4),
    "lines": (1, 0),
    "four_lines": (4, 0),
    "variables": (1, 3),
    "four_variables": (4, 0),
    "frequent_words": (3, 0),
}
_REGISTERS, _VARIABLES = ("lines", "four_lines"), ("variables", "four_variables")
STATIC = SamplerConfig(name="low_confidence_static", tokens_per_step=4)
_FLOORS, _FLOOR_SINKS = ("recency", "random"), 4
# Methods whose lists change with every forward, or whose scores are no shares: their lists keep no mass of their own.
_NO_KEPT_MASS = ("quest", "tidal", "oracle", "mage_max")
_MASS_SHARE = 0.95
_CANDIDATES_OF_K = 8  # times K tokens are looked at by "two_level"

Settings = Mapping[str, Any]  # of a method: what differs from its default, see `baselines.methods`


@dataclass(frozen=True)
class Setting:
    """Budget K in tokens per layer and KV head, tokens g per unit, and how many of the first layers stay exact."""

    K: int
    g: int
    dense_layers: int

    def __str__(self) -> str:
        return f"K={self.K} g={self.g} dense={self.dense_layers}"


def settings(ks: Sequence[int], gs: Sequence[int], dense_layers: Sequence[int]) -> list[Setting]:
    """Every combination in which K is a multiple of g.

    Args:
        ks: budgets in tokens, >= 1. gs: tokens per unit, of 1, 16, 32, 64. dense_layers: numbers of dense layers, >= 0.
    Raises:
        ValueError: naming the argument; also where no K is a multiple of any g.
    """
    for name, values, least in (("ks", ks, 1), ("gs", gs, 1), ("dense_layers", dense_layers, 0)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"settings: {name} must be different numbers, at least one, got {list(values)}")
        for value in values:
            if value < least or (name == "gs" and value not in selection.GRANULARITIES):
                expected = f"of {selection.GRANULARITIES}" if name == "gs" else f"at least {least}"
                raise ValueError(f"settings: {name} must be {expected}, got {value}")
    found = [Setting(k, g, dense) for dense in dense_layers for g in gs for k in ks if k % g == 0]
    if not found:
        raise ValueError(f"settings: ks must hold a multiple of one of gs = {list(gs)}, got {list(ks)}")
    return found


def configs(
    model: Transformer,
    cache: PagedCache,
    setting: Setting,
    base: DenoiseConfig,
    names: Sequence[str] = METHODS,
    settings: Mapping[str, Settings] | None = None,
) -> dict[str, DenoiseConfig]:
    """The configuration of each named method at one setting.

    Beside METHODS, which are those of `baselines.methods`:

        oracle       every forward attends its own top K, by the mean mass of all rows: `OwnLists`
        carry        MAGE that lets every second block go by the lists of the block before
        mage_max     MAGE by the largest share of any row
        mage_open    MAGE by the rows alone whose logits an undecided position consumes
        mage_prefix  MAGE by shares of the prefix alone
        v1           MAGE v1: rule "layer", ranked by votes of the rows, K on average over the layers
        joint        rule "joint": the KV heads of a layer share their budgets
        mass         rule "mass": the fewest units that keep 95 %, at most K
        two_level    MAGE out of candidates, 8 K tokens of the heaviest units; with g = 1 alone

    Args:
        model, cache: as `baselines.methods` takes them. setting: budget, units and dense layers.
        base: sampler and length; its mode, selection and dense layers are replaced. names: of ALL_METHODS; one that
            `methods_at` leaves out has no configuration.
        settings: of METHODS by name, as `baselines.methods` takes them; the other methods are not touched by them.
    Raises:
        ValueError: an unknown name, a page that is no multiple of g, or a dense layer that the model lacks.
    """
    check_choices("configs", "names", names, ALL_METHODS)
    names = methods_at(setting, names)
    chosen = SelectionConfig(k=setting.K, g=setting.g)
    config = dataclasses.replace(base, selection=chosen, dense_layers=tuple(range(setting.dense_layers)))
    own = [name for name in names if name in METHODS]
    found = baselines.methods(model, cache, config, names=own, settings=settings)
    for name in set(_FLOORS) & set(found):
        found[name] = dataclasses.replace(found[name], selection=dataclasses.replace(chosen, sinks=_FLOOR_SINKS))
    mage = dataclasses.replace(config, mode="mage")
    for name, changes in {
        "mage_max": {"score": "max"},
        "mage_open": {"score_rows": "open"},
        "mage_prefix": {"norm": "prefix"},
        "v1": {"rule": "layer"},
        "joint": {"rule": "joint"},
        "mass": {"rule": "mass", "p": _MASS_SHARE, "capacity": setting.K // setting.g},
    }.items():
        found[name] = dataclasses.replace(mage, selection=dataclasses.replace(chosen, **changes))
    if "two_level" in names:
        units = max(_CANDIDATES_OF_K * setting.K, setting.K + 3 * CANDIDATE_UNIT) // CANDIDATE_UNIT
        wide = dataclasses.replace(chosen, candidates=units * CANDIDATE_UNIT)
        found["two_level"] = dataclasses.replace(mage, selection=wide)
    found["carry"] = dataclasses.replace(mage, refresh="blocks", refresh_blocks=2)
    found["oracle"] = dataclasses.replace(mage, mode="method", method=OwnLists(chosen))
    return {name: found[name] for name in names}


def methods_at(setting: Setting, names: Sequence[str]) -> list[str]:
    """The names of ALL_METHODS that there are at a setting: "two_level" is of single tokens."""
    return [name for name in names if name != "two_level" or setting.g == 1]


def make_case(maker: needles.CaseMaker, task: str, seed: int, tokens: int) -> tuple[Case, list[int]]:
    """The case of a task (of TASKS) and a seed, and its prompt's ids, of about so many tokens."""
    asked, distractors = TASKS[task]
    if task in _REGISTERS:
        return maker.register(seed, tokens, asked)
    if task in _VARIABLES:
        return maker.variables(seed, tokens, asked, distractors)
    if task == "frequent_words":
        return maker.word_list(seed, tokens)
    return maker.case(seed, tokens, asked, distractors)


def check_choices(owner: str, name: str, values: Sequence[str], choices: Sequence[str]) -> None:
    """Raises ValueError where a value is none of the choices."""
    for value in values:
        if value not in choices:
            raise ValueError(f"{owner}: {name} must be of {', '.join(choices)}, got {value!r}")


class OwnLists:
    """An AttentionMethod whose every forward attends the lists that its own exact attention gives: the most that lists
    of K tokens can do, at the cost of exact attention.

    Args:
        config: of the lists; rule "fixed". All rows count.
    """

    def __init__(self, config: SelectionConfig):
        self._config = config

    def prepare(self) -> None:
        """Nothing: a forward knows all it needs."""

    def written(self, forward: PagedForward, layer: int, k: Tensor, k_cache: Tensor) -> None:
        """See AttentionMethod. Nothing is kept of K."""

    def attend(self, forward: PagedForward, layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See AttentionMethod."""
        emission = Emission(self._config, None, forward.prefix_lens)
        forward.emit(emission, q, k_cache, v_cache, forward.seq_lens)
        lists = selection.select(emission.mass(), forward.prefix_lens, self._config)
        return forward.attend_lists(q, k_cache, v_cache, forward.seq_lens, lists.layer(0), self._config.g)

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """See AttentionMethod. Its lists cost exact attention."""
        return num_tokens


# ----------------------------------------------------------------------------------------------------------------------
# Recall of the first forward's lists


class _ExactWithMass:
    """An AttentionMethod that attends exactly and keeps the mass of every forward.

    Fields:
        masses: one list per forward, of one tensor [A, Hkv, n], float32, per layer.
    """

    def __init__(self, g: int):
        self.masses: list[list[Tensor]] = []
        self._config = SelectionConfig(k=g, g=g)

    def prepare(self) -> None:
        """Nothing: no lists are made."""

    def written(self, forward: PagedForward, layer: int, k: Tensor, k_cache: Tensor) -> None:
        """See AttentionMethod. Nothing is kept of K."""

    def attend(self, forward: PagedForward, layer: int, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See AttentionMethod."""
        if layer == 0:
            self.masses.append([])
        emission = Emission(self._config, None, forward.prefix_lens)
        out = forward.emit(emission, q, k_cache, v_cache, forward.seq_lens)
        self.masses[-1] += emission.masses
        return out

    def tokens_read(self, prefix_len: int, num_tokens: int) -> float:
        """See AttentionMethod."""
        return num_tokens


def exact_masses(model: Transformer, state: DenoiseState, config: DenoiseConfig, g: int) -> list[Tensor]:
    """Attention mass of every forward of the first block of an answer, all of them exact in all layers.

    Args:
        model: of the state, without sub-blocks. state: of `prefill`; it is forked, not used up.
        config: sampler and max_new_tokens. g: tokens per unit.
    Returns:
        One tensor [layers, B, Hkv, n], float32, per forward, the commit left out: the share that each unit has of the
        attention to the whole context, mean over all rows of the block. All 0 in requests whose block was done before.
    """
    method = _ExactWithMass(g)
    run = dataclasses.replace(config, mode="method", method=method, dense_layers=(), cuda_graphs=False)
    blocks = generate(model, state.fork(), run, stream=True)
    next(blocks)
    del blocks  # returns its pages: only the first block is wanted
    return [torch.stack(layers) for layers in method.masses]


@dataclass
class Recall:
    """What the lists of a block's first forward share with those of later forwards; sums over KV heads and blocks.

    Fields (float64, on the CPU):
        shared: [forwards, layers], share of the units in a later forward's own list that the first list holds.
        kept: [forwards, layers], share of the later forward's mass that the first list keeps, with everything that is
            attended without being listed. own: the same of the later forward's own list.
        cases: [forwards], blocks that came to this forward, times KV heads. Row 0 is the second forward.
    """

    shared: Tensor
    kept: Tensor
    own: Tensor
    cases: Tensor

    def __add__(self, other: "Recall") -> "Recall":
        length = max(len(self.cases), len(other.cases))
        parts = []
        for name in ("shared", "kept", "own", "cases"):
            padded = []
            for value in (getattr(self, name), getattr(other, name)):
                missing = value.new_zeros(length - len(value), *value.shape[1:])
                padded.append(torch.cat((value, missing)))
            parts.append(padded[0] + padded[1])
        return Recall(*parts)

    def row(self, dense_layers: int) -> dict[str, Any]:
        """Numbers of an evaluation file, over the layers from dense_layers on: "recall" is the mean over later
        forwards, layers, KV heads and blocks; "recall_by_forward" begins with the second forward; "recall_worst_layer"
        is the least mean of a layer; "kept_mass_later" and "kept_mass_own" are of the first and of the own list."""
        if not self.cases.sum():
            return {"recall": None}
        shared = self.shared[:, dense_layers:]
        by_layer = shared.sum(0) / self.cases.sum()
        return {
            "recall": by_layer.mean().item(),
            "recall_by_forward": (shared.mean(1) / self.cases.clamp(min=1)).tolist(),
            "recall_worst_layer": by_layer.min().item(),
            "kept_mass_later": (self.kept[:, dense_layers:].mean(1).sum() / self.cases.sum()).item(),
            "kept_mass_own": (self.own[:, dense_layers:].mean(1).sum() / self.cases.sum()).item(),
        }


def recall(masses: Sequence[Tensor], prefix_lens: Tensor, config: SelectionConfig) -> Recall:
    """How much of each later forward's own list the list of the first forward holds.

    Args:
        masses: of `exact_masses`, with config.g. prefix_lens: [B], int32. config: K, g and rule of both lists.
    """
    lists = [selection.select(mass, prefix_lens, config) for mass in masses]
    sums: list[list[Tensor]] = [[], [], [], []]
    for mass, own in zip(masses[1:], lists[1:], strict=True):
        is_live = (mass.sum((0, 2, 3)) > 0).view(1, -1, 1)
        for total, share in zip(sums, compare_lists(lists[0], own, mass)[:3], strict=False):
            total.append(torch.where(is_live, share.double(), 0.0).sum((1, 2)).cpu())  # [layers]
        sums[3].append(is_live.sum().double().cpu() * mass.shape[2])
    empty = torch.zeros(0, masses[0].shape[0], dtype=torch.float64)
    parts = [torch.stack(total) if total else empty for total in sums[:3]]
    return Recall(*parts, torch.stack(sums[3]) if sums[3] else empty[:, 0])


def listed(lists: BlockSelection, num_units: int) -> Tensor:
    """[L, B, Hkv, num_units], bool: units that are listed."""
    indices = torch.where(lists.indices >= 0, lists.indices, num_units).long()
    found = torch.zeros(*indices.shape[:3], num_units + 1, dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, indices, True)[..., :-1]


def attended(lists: BlockSelection, num_units: int) -> Tensor:
    """[L, B, Hkv, num_units], bool: units that are attended: listed ones and all from the tail on."""
    unit = torch.arange(num_units, device=lists.indices.device) * lists.g
    return listed(lists, num_units) | (unit >= lists.tail_start.view(1, -1, 1, 1))


def compare_lists(lists: BlockSelection, own: BlockSelection, mass: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What lists share with the own lists of a forward.

    Args:
        lists, own: of the same g. mass: [L, B, Hkv, n], float32, of the forward.
    Returns:
        recall: share of the units in `own` that `lists` attend. kept, kept_own: mass that `lists` and `own` attend as a
        share of all; free: the part of it from the tail of `own` on. Each [L, B, Hkv], float32; where nothing is listed
        in `own` (or there is no mass) 0.
    """
    num_units = mass.shape[-1]
    held, wanted = attended(lists, num_units), listed(own, num_units)
    whole = mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
    recall = (held & wanted).sum(-1) / wanted.sum(-1).clamp(min=1)
    kept = torch.where(held, mass, 0.0).sum(-1) / whole
    kept_own = torch.where(attended(own, num_units), mass, 0.0).sum(-1) / whole
    free = torch.where(attended(own, num_units) & ~wanted, mass, 0.0).sum(-1) / whole
    return recall, kept, kept_own, free


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


@dataclass
class Comparison:
    """Outcomes over the same cases: exact's, every other method's by (setting, name), recalls by (K, g), the prefixes'
    lengths in tokens, and T, the forwards of a whole open block without its commit."""

    exact: needles.Score
    scores: dict[tuple[Setting, str], needles.Score]
    recalls: dict[tuple[int, int], Recall]
    prefixes: list[int]
    T: int

    def extend(self, other: "Comparison") -> None:
        """Adds further cases."""
        for key, score in (("exact", self.exact), *self.scores.items()):
            more = other.exact if key == "exact" else other.scores[key]
            score.found += more.found
            score.results += more.results
        for key, more in other.recalls.items():
            self.recalls[key] += more
        self.prefixes += other.prefixes

    def of(self, cases: Sequence[int]) -> "Comparison":
        """The same of some cases, by number; without recalls."""

        def pick(score: needles.Score) -> needles.Score:
            return needles.Score(score.method, [score.found[i] for i in cases], [score.results[i] for i in cases])

        scores = {key: pick(score) for key, score in self.scores.items()}
        return Comparison(pick(self.exact), scores, {}, [self.prefixes[i] for i in cases], self.T)

    def common(self, task: str, tokens: int) -> dict[str, Any]:
        """What all rows have alike."""
        prefix = sum(self.prefixes) / max(len(self.prefixes), 1)
        return {"T": self.T, "tokens": tokens, "distractors": TASKS[task][1], "prefix_tokens": prefix}

    def rows(self, task: str, tokens: int, settings: Mapping[str, Settings] | None = None) -> list[dict[str, Any]]:
        """The rows of an evaluation file.

        Args:
            task, tokens: of the cases. settings: those that the methods ran with; every row then has "settings" in
                words, exact's without.

        Beside those of `Score.row`: "T"; "prefix_tokens", the mean prefix before the first block; "mage_only" and
        "method_only", cases that MAGE alone or this method alone answered at the same setting, and "p_mage", McNemar's
        exact two-sided p of that; in MAGE's rows what `Recall.row` has. Against the same method with units of one
        token, where it ran too: "g1_only", "units_only" and "p_g1"; without dense layers: "dense0_only", "dense_only"
        and "p_dense0". "kept_mass" is None where a method's lists change with every forward or its scores are no
        shares; that of "mage_prefix" is of the prefix alone, that of "mage_open" of its rows.
        """
        more = self.common(task, tokens)
        rows = [self.exact.row(task, None, **more)]
        for (setting, name), score in self.scores.items():
            row = score.row(task, self.exact, **more)
            own = settings.get(name, {}) if settings is not None else {}
            if settings is not None:
                row["settings"] = settings_text(own)
            if name in _NO_KEPT_MASS or own.get("score") == "max":
                row["kept_mass"] = None
            mage = self.scores.get((setting, "mage"))
            if name == "mage":
                known = self.recalls.get((setting.K, setting.g))
                row |= known.row(setting.dense_layers) if known is not None else {}
            elif mage is not None:
                row |= _paired(mage, score, "mage_only", "method_only", "p_mage")
            fine = self.scores.get((dataclasses.replace(setting, g=1), name))
            if setting.g > 1 and fine is not None:
                row |= _paired(fine, score, "g1_only", "units_only", "p_g1")
            sparse = self.scores.get((dataclasses.replace(setting, dense_layers=0), name))
            if setting.dense_layers > 0 and sparse is not None:
                row |= _paired(sparse, score, "dense0_only", "dense_only", "p_dense0")
            rows.append(row)
        return rows


def settings_text(settings: Settings) -> str:
    """Settings of a method in words: "default", "score=max", "skip_share=0.3 score=max", "anchors=0,0.25"."""

    def told(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    return " ".join(f"{key}={told(value)}" for key, value in settings.items()) or "default"


def _paired(one: needles.Score, other: needles.Score, only_one: str, only_other: str, p: str) -> dict[str, Any]:
    """Under the names given: cases that one alone answered, that the other alone did, and McNemar's p of them."""
    pairs = [(all(a), all(b)) for a, b in zip(one.found, other.found, strict=True)]
    counts = pairs.count((True, False)), pairs.count((False, True))
    return {only_one: counts[0], only_other: counts[1], p: mcnemar(*counts)}


def mcnemar(only_one: int, only_other: int) -> float:
    """McNemar's exact two-sided p from the two counts of cases on which a pair differs; 1 where there are none."""
    trials = only_one + only_other
    tail = sum(math.comb(trials, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**trials)


def holm(values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which p values hold at `level` for the whole family (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    held = [False] * len(values)
    for rank, i in enumerate(order):
        if values[i] > level / (len(values) - rank):
            break
        held[i] = True
    return held


class SharedPrefill:
    """A batch of cases behind one prefill, which every method continues from.

    Args:
        loaded, cases, wanted, sampler: as `compare` takes them.
    Fields:
        base: the configuration of exact attention. state: of `prefill`. cache: its pages. T: forwards of a whole block.
    Raises:
        ValueError: as `compare`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cases: Sequence[tuple[Any, list[int]]],
        wanted: Sequence[Setting],
        sampler: SamplerConfig,
    ):
        self._loaded, self._cases = loaded, cases
        # A block or two per configuration: capturing graphs would cost more than replaying them saves.
        self.base = dataclasses.replace(needles.exact_method(sampler).config, cuda_graphs=False)
        self.state = prefill(loaded.model, [ids for _, ids in cases], self.base)
        self.prefixes = list(self.state.prefix_lens)
        self.cache = self.state.batch.cache
        self.T = sampler.max_forwards(loaded.config.block_size)
        longest = max(setting.K for setting in wanted)
        if longest >= min(self.prefixes):
            self.state.release()
            raise ValueError(
                f"compare: wanted must have K below every prefix, the shortest of which has {min(self.prefixes)} "
                f"tokens, got {longest}"
            )

    def run(self, name: str, setting: Setting | None, config: DenoiseConfig) -> needles.Score:
        """The outcome of one method."""
        results = generate(self._loaded.model, self.state.fork(), config, tokenizer=self._loaded.tokenizer)
        check_answered("compare", results)
        found = [case.found(result.text) for (case, _), result in zip(self._cases, results, strict=True)]
        # Not config itself: it may hold Quest's tensors.
        told = (setting.K, setting.g, setting.dense_layers) if setting is not None else ()
        return needles.Score(needles.Method(name, self.base, *told), found, results)


def compare(
    loaded: LoadedModel,
    cases: Sequence[tuple[Any, list[int]]],
    wanted: Sequence[Setting],
    names: Sequence[str] = METHODS,
    sampler: SamplerConfig = STATIC,
    tell: Callable[[str], None] | None = None,
    with_recall: bool = True,
    settings: Mapping[str, Settings] | None = None,
) -> Comparison:
    """Every method at every setting on a batch of cases; prefill is done once and forked.

    Args:
        loaded: model and tokenizer. cases: of `needles.CaseMaker`, all in one batch; their prefixes must be longer than
            every K, or the blocks would be exact. wanted: of `settings`. names: of ALL_METHODS; exact always runs, and
            recall is measured with "mage", unless with_recall is off. tell: takes a line per setting. settings: of
            methods by name, as `configs` takes them.
    Raises:
        ValueError: naming the argument.
    """
    shared = SharedPrefill(loaded, cases, wanted, sampler)
    recalls: dict[tuple[int, int], Recall] = {}
    if "mage" in names and with_recall:
        prefix_lens = torch.tensor(shared.prefixes, dtype=torch.int32, device=shared.cache.device)
        for g in dict.fromkeys(setting.g for setting in wanted):
            masses = exact_masses(loaded.model, shared.state, shared.base, g)
            for k in dict.fromkeys(setting.K for setting in wanted if setting.g == g):
                recalls[k, g] = recall(masses, prefix_lens, SelectionConfig(k=k, g=g))
            del masses
    exact = shared.run("exact", None, shared.base)
    scores = {}
    others = [name for name in names if name != "exact"]
    for setting in wanted:
        found = configs(loaded.model, shared.cache, setting, shared.base, others, settings)
        for name in list(found):
            scores[setting, name] = shared.run(name, setting, found.pop(name))
        if tell is not None:
            counts = ", ".join(f"{name} {score.whole}" for (at, name), score in scores.items() if at == setting)
            tell(f"{setting}: of {len(cases)} exact {exact.whole}, {counts}")
    shared.state.release()
    return Comparison(exact, scores, recalls, shared.prefixes, shared.T)


def suite(
    runner: needles.Runner,
    n: int,
    wanted: Sequence[Setting],
    tasks_wanted: Sequence[str] = ("needle", "four_keys"),
    methods_wanted: Sequence[str] = METHODS,
    tokens: Sequence[int] = (2048,),
    tokens_per_step: Sequence[int] = (4,),
    settings: Mapping[str, Settings] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after every batch of cases.

    Args:
        runner: of the model. n: cases per task, seeds 0 .. n - 1. wanted: of `settings`. tasks_wanted: of TASKS.
        methods_wanted: of ALL_METHODS, beside "exact", which the others are held against. tokens: lengths of a prompt,
            about. tokens_per_step: numbers of tokens that are decided in every forward. settings: of methods by name,
            as `configs` takes them; the rows tell them and have no recall, which is that of the defaults.
    Raises:
        ValueError: naming the argument.
    """
    check_choices("suite", "tasks_wanted", tasks_wanted, tuple(TASKS))
    check_choices("suite", "methods_wanted", methods_wanted, ALL_METHODS)
    done: list[dict[str, Any]] = []
    for task, length, per_step in itertools.product(tasks_wanted, tokens, tokens_per_step):
        sampler = dataclasses.replace(STATIC, tokens_per_step=per_step)
        work = functools.partial(_work, task=task, wanted=wanted, names=methods_wanted, tokens=length, sampler=sampler)
        work = functools.partial(work, settings=settings)
        if runner.jobs == 1:
            work = functools.partial(work, tell=runner.progress)
        for whole in joined(runner, work, n):
            if runner.progress is not None:
                told = f"{task}, {length} tokens, T = {whole.T}"
                runner.progress(f"{told}: {whole.exact.cases}/{n} cases, exact {whole.exact.whole}")
            yield done + whole.rows(task, length, settings)
        done += whole.rows(task, length, settings)


def joined(runner: needles.Runner, work: Callable[[range], Comparison], n: int) -> Iterator[Comparison]:
    """The comparison of all cases so far, after every batch of `work` over seeds 0 .. n - 1."""
    whole = None
    for part in runner.parts(work, n):
        if whole is None:
            whole = part
        else:
            whole.extend(part)
        yield whole


def _work(
    seeds: range,
    *,
    task: str,
    wanted: Sequence[Setting],
    names: Sequence[str],
    tokens: int,
    sampler: SamplerConfig,
    settings: Mapping[str, Settings] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    loaded, maker = needles.worker()
    cases = [make_case(maker, task, seed, tokens) for seed in seeds]
    return compare(loaded, cases, wanted, names, sampler, tell, settings is None, settings)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Scores in percent by task, length, T, dense layers, g and K, as lines of text.

    A mark stands behind the score of a method that differs from MAGE's at the same setting: "-" below, "+" above, by
    McNemar's exact test at 5 % for all comparisons of these rows together (Holm).
    """
    tested = [row for row in rows if row.get("p_mage") is not None]
    held = holm([row["p_mage"] for row in tested])
    marks = {
        id(row): ("-" if row["mage_only"] > row["method_only"] else "+") if differs else " "
        for row, differs in zip(tested, held, strict=True)
    }
    names = [name for name in ALL_METHODS if name != "exact" and any(row["method"] == name for row in rows)]
    lines: list[str] = []
    groups = dict.fromkeys((row["task"], row["tokens"], row["T"], row["dense_layers"], row["g"]) for row in rows)
    for task, tokens, steps, dense, g in groups:
        same = [row for row in rows if (row["task"], row["tokens"], row["T"]) == (task, tokens, steps)]
        if not g:
            continue  # exact alone
        exact = next(row for row in same if not row["K"])
        lines.append(
            f"{task}, {tokens} tokens, T = {steps}, g = {g}, {dense} dense layers: exact {100 * exact['score']:.1f} % "
            f"[{100 * exact['ci_low']:.1f}, {100 * exact['ci_high']:.1f}], n = {exact['n']}, "
            f"prefix {exact['prefix_tokens']:.0f}"
        )
        lines.append("     K  K/prefix" + "".join(f"{name:>12}" for name in names) + "    recall")
        inside = [row for row in same if (row["dense_layers"], row["g"]) == (dense, g)]
        for k in sorted({row["K"] for row in inside}):
            at = {row["method"]: row for row in inside if row["K"] == k}
            line = f"{k:6d}  {100 * k / exact['prefix_tokens']:6.1f} %"
            for name in names:
                row = at.get(name)
                line += f"{100 * row['score']:11.1f}{marks.get(id(row), ' ')}" if row is not None else " " * 12
            share = at["mage"].get("recall") if "mage" in at else None
            lines.append(line + (f"{100 * share:8.1f} %" if share is not None else ""))
    return lines
