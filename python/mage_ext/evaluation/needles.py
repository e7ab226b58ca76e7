"""Which hidden facts each method finds: exact attention, MAGE, and selections of the same size as a floor, on one path.

All methods of a case continue from one shared prefill. A case counts as found when every asked value stands on its line
of the answer. Rates come with Wilson 95 % intervals.

Test: pytest tests/python/test_needles.py
"""

import functools
import json
import math
import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from mage_ext import selection
from mage_ext._arguments import check_list, got
from mage_ext._files import write_text
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import tasks
from mage_ext.models.adapter import adapter_cut
from mage_ext.models.builtin import adapter_path, load_builtin
from mage_ext.models.config import Cut
from mage_ext.models.huggingface import LoadedModel
from mage_ext.results import Result, check_answered
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig

T = TypeVar("T")

METHODS = ("exact", "mage", "recency", "random")
_MAX_NEW_TOKENS = 48  # four values of 7 digits, separators and the end token need 32


@dataclass(frozen=True)
class Method:
    """A named way to generate. K, g and dense_layers repeat the configuration, for tables; 0 and -1 for exact."""

    name: str
    config: DenoiseConfig
    K: int = 0
    g: int = 0
    dense_layers: int = -1

    def __str__(self) -> str:
        return f"{self.name} K={self.K} g={self.g} dense={self.dense_layers}" if self.K else self.name


def exact_method(sampler: SamplerConfig) -> Method:
    return Method("exact", DenoiseConfig(max_new_tokens=_MAX_NEW_TOKENS, sampler=sampler))


def sparse_method(
    name: str, sampler: SamplerConfig, K: int, g: int = 1, dense_layers: int = 2, rule: str = "fixed", seed: int = 0
) -> Method:
    """MAGE, or a selection of the same size.

    Args:
        name: "mage" (largest mean mass), "recency" (sinks and the most recent) or "random".
        sampler: of the answer. K: budget in tokens per layer and KV head; all that is selected is charged to it.
        g: tokens per unit. With g = 1 the first 4 tokens and the last 16 are always kept, else nothing is forced.
        dense_layers: the first so many layers stay exact in every forward. rule: budget rule. seed: of "random".
    Raises:
        ValueError: an unknown name.
    """
    overrides: dict[str, Callable | None] = {
        "mage": None,
        "recency": selection.recency_selection,
        "random": functools.partial(selection.random_selection, seed=seed),
    }
    if name not in overrides:
        raise ValueError(f"sparse_method: name must be one of {', '.join(overrides)}, got {name!r}")
    always = {"sinks": 4, "recents": 16} if g == 1 else {}
    config = DenoiseConfig(
        mode="mage",
        max_new_tokens=_MAX_NEW_TOKENS,
        sampler=sampler,
        selection=SelectionConfig(rule=rule, k=K, g=g, **always),
        dense_layers=tuple(range(dense_layers)),
        select_override=overrides[name],
    )
    return Method(name, config, K, g, dense_layers)


@dataclass
class Score:
    """Outcomes of one method over cases: found[i] lists which asked facts case i gave back."""

    method: Method
    found: list[list[bool]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return len(self.found)

    @property
    def whole(self) -> int:
        """Cases in which every asked fact was found."""
        return sum(map(all, self.found))

    @property
    def facts(self) -> int:
        return sum(map(sum, self.found))

    def row(self, task: str, exact: "Score | None", **more: Any) -> dict[str, Any]:
        """The row of an evaluation file."""
        low, high = wilson(self.whole, self.cases)
        sampler = self.method.config.sampler
        both = (
            sum(all(a) and all(b) for a, b in zip(self.found, exact.found, strict=True))
            if exact is not None
            else self.whole
        )
        kv = [r.stats.kv_share for r in self.results]
        forwards = [r.stats.num_forwards for r in self.results]
        kept = [m for r in self.results for m in r.stats.kept_mass]
        return {
            "task": task,
            "method": self.method.name,
            "K": self.method.K,
            "g": self.method.g,
            "dense_layers": self.method.dense_layers,
            "sampler": sampler.name,
            "tokens_per_step": sampler.tokens_per_step if sampler.name == "low_confidence_static" else None,
            "n": self.cases,
            "score": self.whole / max(self.cases, 1),
            "exact": exact.whole / max(exact.cases, 1) if exact is not None else self.whole / max(self.cases, 1),
            "found_of_exact": both / max(exact.whole, 1) if exact is not None else 1.0,
            "ci_low": low,
            "ci_high": high,
            "facts": self.facts,
            "kv_share": sum(kv) / max(len(kv), 1),
            "forwards": sum(forwards) / max(len(forwards), 1),
            "kept_mass": sum(kept) / len(kept) if kept else 1.0,
            **more,
        }


def row_line(row: dict[str, Any]) -> str:
    """A row of an evaluation file as a line of text."""
    setting = f"K={row['K']} g={row['g']} dense={row['dense_layers']}" if row["K"] else ""
    return (
        f"{row['task']:<9} {row['tokens']} tokens, {row['distractors']} distractors  {row['method']:<7} {setting:<19} "
        f"{row['sampler']:<22} {100 * row['score']:5.1f} % [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    )


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a rate (Wilson 1927)."""
    if trials == 0:
        return 0.0, 1.0
    rate, zz = successes / trials, z * z
    centre = (rate + zz / (2 * trials)) / (1 + zz / trials)
    half = z / (1 + zz / trials) * math.sqrt(rate * (1 - rate) / trials + zz / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


class CaseMaker:
    """Cases for a model: lengths are counted with its tokenizer and chat template.

    Args:
        loaded: the model. texts: prose as (name, text) pairs, or None for the project's own.
    """

    def __init__(self, loaded: LoadedModel, texts: Sequence[tuple[str, str]] | None = None):
        self.tokenizer, self.block = loaded.tokenizer, loaded.config.block_size
        self.sentences = [s for _, text in texts for s in tasks.split_sentences(text)] if texts else None
        self._overhead = len(self.tokenizer.chat([{"role": "user", "content": "x"}])) - 1

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  (one maker per run)
    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def case(
        self, seed: int, num_tokens: int, asked: int = 1, distractors: int = 0, depth: float | None = None
    ) -> tuple[tasks.Case, list[int]]:
        """The case of a seed and its prompt's ids. An answer of several lines starts a block and fits in it.
        depth: see `tasks.make_case`."""
        return self._hidden(f"{seed}/{num_tokens}/{asked}/{distractors}", num_tokens, asked, distractors, depth=depth)

    def register(self, seed: int, num_tokens: int, asked: int = 1) -> tuple[tasks.Case, list[int]]:
        """A register whose prompt has as many lines as num_tokens tokens hold, and its ids.

        Raises:
            ValueError: num_tokens hold fewer than 8 lines.
        """

        def of(lines: int) -> tuple[tasks.Case, list[int]]:
            case = tasks.make_register_case(random.Random(f"register/{seed}/{asked}"), lines, asked)
            return case, self._ids(case)

        few, more = len(of(8)[1]), len(of(24)[1])
        if few > num_tokens:
            raise ValueError(f"register: num_tokens must hold 8 lines, {few} tokens, got {num_tokens}")
        lines = 8 + (num_tokens - few) * 16 // (more - few) + 2  # lines are of about one length
        while True:
            case, ids = of(lines)
            if len(ids) <= num_tokens:
                return case, ids
            lines -= max(1, (len(ids) - num_tokens) * 16 // (more - few))

    def variables(
        self, seed: int, num_tokens: int, asked: int = 1, distractors: int = 0
    ) -> tuple[tasks.Case, list[int]]:
        """A text that hides asked + distractors chains of variables, and its prompt's ids: seed s asks over
        1 + s mod 4 hops. An answer of several lines starts a block and fits in it."""
        seeded = f"variables/{seed}/{num_tokens}/{asked}/{distractors}"
        return self._hidden(seeded, num_tokens, asked, distractors, hops=1 + seed % tasks.MOST_HOPS)

    def word_list(self, seed: int, num_tokens: int) -> tuple[tasks.Case, list[int]]:
        """A list of words, a question for its three most frequent ones, and the prompt's ids."""
        rng = random.Random(f"words/{seed}/{num_tokens}")
        case = tasks.make_list_case(rng, self._count, num_tokens, self._overhead)
        return case, self._ids(case)

    def _hidden(
        self, seed: str, num_tokens: int, asked: int, distractors: int, **more: Any
    ) -> tuple[tasks.Case, list[int]]:
        """A case of prose that hides what is asked, of a seed of its own; more: of `tasks.make_case`."""
        place = {"block": self.block, "align": asked > 1, "overhead": self._overhead}
        rng, prose = random.Random(seed), self.sentences
        case = tasks.make_case(rng, self._count, num_tokens, asked, distractors, prose, **place, **more)
        return case, self._ids(case)

    def _ids(self, case: tasks.Case) -> list[int]:
        return self.tokenizer.chat([{"role": "user", "content": case.prompt}])


def compare(
    loaded: LoadedModel, cases: Sequence[tuple[tasks.Case, list[int]]], methods: Sequence[Method]
) -> list[Score]:
    """Every method on a batch of cases; prefill is done once and forked.

    Args:
        loaded: model and tokenizer. cases: of CaseMaker, all in one batch. methods: in the order of the result.
    Returns:
        One Score per method, cases in order.
    """
    state = prefill(loaded.model, [ids for _, ids in cases], methods[0].config)
    scores = []
    for method in methods:
        results = generate(loaded.model, state.fork(), method.config, tokenizer=loaded.tokenizer)
        check_answered("compare", results)
        found = [case.found(result.text) for (case, _), result in zip(cases, results, strict=True)]
        scores.append(Score(method, found, results))
    state.release()
    return scores


class Runner:
    """Runs comparisons of the built-in model on several processes, each with its share of the cores.

    Args:
        jobs: processes; 1 runs in this one. texts: prose as (name, text) pairs, None for the project's own.
        adapter: as in `load_builtin`. batch: cases per batch. progress: takes a line per batch.
        device, dtype: of the model; as in `load_builtin`. first: the cases' first seed, >= 0.
    Raises:
        ValueError, TypeError: naming the argument; what `load_builtin` raises.
    """

    def __init__(
        self,
        jobs: int = 1,
        texts: Sequence[tuple[str, str]] | None = None,
        adapter: str | None = None,
        batch: int = 1,
        progress: Callable[[str], None] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        first: int = 0,
    ):
        for name, value in (("jobs", jobs), ("batch", batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Runner: {name} must be an integer of at least 1, got {got(value)}")
        if texts is not None:
            texts = check_list("Runner", "texts", texts, "(name, text) pairs or None")
            if not texts:
                raise ValueError("Runner: texts must be at least one, or None, got none")
        self.jobs, self.batch, self.progress, self.first = jobs, batch, progress, first
        threads = max(1, torch.get_num_threads() // jobs)
        arguments = (texts, adapter, threads, device, dtype)
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=arguments)
        else:
            self._pool = None
            _start_worker(*arguments)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def parts(self, work: Callable[[range], T], n: int) -> Iterable[T]:
        """What `work` returns of n seeds from `first` on, batch by batch, in order. It runs where `worker()` is; with
        more than one job it and what it returns must pickle."""
        end = self.first + n
        parts = [range(begin, min(begin + self.batch, end)) for begin in range(self.first, end, self.batch)]
        return (self._pool.map if self._pool is not None else map)(work, parts)

    def compare(self, methods: Sequence[Method], n: int, num_tokens: int, asked: int, distractors: int) -> list[Score]:
        """Every method on the cases of n seeds from `first` on; one Score per method, cases in order of their seeds."""
        work = functools.partial(_work, methods=methods, num_tokens=num_tokens, asked=asked, distractors=distractors)
        scores = [Score(method) for method in methods]
        for part in self.parts(work, n):
            for score, piece in zip(scores, part, strict=True):
                score.found += piece.found
                score.results += piece.results
            if self.progress is not None:
                told = ", ".join(f"{score.method} {score.whole}" for score in scores)
                self.progress(f"{num_tokens} tokens, {asked} asked, {scores[0].cases}/{n}: {told}")
        return scores


_worker: dict[str, Any] = {}


def _start_worker(
    texts: Sequence[tuple[str, str]] | None,
    adapter: str | None,
    threads: int,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    torch.set_num_threads(threads)
    loaded = load_builtin(dtype, device, adapter)
    _worker.update(loaded=loaded, maker=CaseMaker(loaded, texts), cut=adapter_cut(adapter_path(adapter)))


def worker() -> tuple[LoadedModel, CaseMaker]:
    """The model of this process and its cases, inside of a Runner's work."""
    return _worker["loaded"], _worker["maker"]


def worker_cut() -> Cut | None:
    """What the model of this process keeps of its base, None for all of it; inside of a Runner's work."""
    return _worker["cut"]


def _work(seeds: range, *, methods: Sequence[Method], num_tokens: int, asked: int, distractors: int) -> list[Score]:
    loaded, maker = worker()
    cases = [maker.case(seed, num_tokens, asked, distractors) for seed in seeds]
    return compare(loaded, cases, methods)


def check_place(owner: str, name: str, path: str | Path, device: str) -> None:
    """Raises ValueError if path, the argument `name` of `owner`, is in a folder "h100" and device names no H100."""
    if "h100" in Path(path).parts and "H100" not in device:
        raise ValueError(f"{owner}: {name} must be outside of folders named h100 on {device}, got {str(path)!r}")


def write_rows(
    path: str | Path,
    name: str,
    model: str,
    device: str,
    commit: str,
    rows: Sequence[dict[str, Any]],
    first: int = 0,
    complete: bool = True,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes an evaluation file, whole or not at all: JSON, as bench/results/ keeps them, a line per row.

    first: the cases' first seed. complete: False while a suite is still at work. more: what else the head has.

    Raises:
        ValueError: path is in a folder "h100" and device names no H100.
    """
    check_place("write_rows", "path", path, device)
    n = max((row["n"] for row in rows), default=0)
    head = {
        "name": name,
        "model": model,
        "device": device,
        "commit": commit,
        "n": n,
        "first_seed": first,
        "complete": complete,
        **(more or {}),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_text(path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


def suite(
    runner: Runner,
    n: int,
    tasks_wanted: Sequence[str] = ("four_keys", "needle"),
    methods_wanted: Sequence[str] = METHODS,
) -> Iterator[dict[str, Any]]:
    """The gates of a shipped model, and MAGE against exact attention at 2048 tokens with K = 128: rows one by one.

    Args:
        runner: of the model. n: cases per task. tasks_wanted: "needle" (one fact), "four_keys" (four in one block).
        methods_wanted: of METHODS, beside "exact", which the others are held against.
    """
    quick = SamplerConfig()
    static = SamplerConfig(name="low_confidence_static", tokens_per_step=4)
    if "four_keys" in tasks_wanted:
        for distractors in (0, 4):
            (score,) = runner.compare([exact_method(quick)], n, 1024, 4, distractors)
            yield score.row("four_keys", None, tokens=1024, distractors=distractors)
    for task, asked, sparse in (
        ("four_keys", 4, [("mage", 1), ("mage", 32)]),
        ("needle", 1, [("mage", 1), ("mage", 32), ("recency", 1), ("random", 1)]),
    ):
        if task not in tasks_wanted:
            continue
        methods = [exact_method(quick), exact_method(static)]
        sparse = [(name, g) for name, g in sparse if name in methods_wanted]
        methods += [sparse_method(name, static, 128, g, dense) for dense in (0, 2) for name, g in sparse]
        scores = runner.compare(methods, n, 2048, asked, 0)
        yield scores[0].row(task, None, tokens=2048, distractors=0)
        for score in scores[1:]:
            yield score.row(task, scores[1], tokens=2048, distractors=0)
