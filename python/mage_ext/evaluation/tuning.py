"""Every method tuned with the same number of trials on a development split, and the comparison of the tuned methods.

A trial is one setting of a method for all cells (task, length, K, g, dense layers); the first is the method's default.
`TRIALS` has as many for each. A method's winner has the highest mean score over the cells; of equal ones the earliest,
so a default stays unless another setting is better. What a setting reads beside its K is not held against it, but told:
kv_share.

Rows of `mage eval tune` (eval/tune.json), one per method, trial and cell, beside those of exact attention:

    task, method, K, g, dense_layers, n, score, exact, ci_low, ci_high, kv_share, ...   as in eval/methods.json
    trial, settings   number of the trial, and what it changes, in words

The file's head has "trials" and "winners", the number of every method's best one; `read` holds both against the rows
and the code. `mage eval methods --tuned FILE` runs the methods with the winners' settings on other seeds. Its rows are
of a suite of their own, eval/tuned, so that they never stand among untuned ones; they have "settings" and "tuned_on".

Test: pytest tests/python/test_tuning.py
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mage_ext.evaluation import method_comparison as comparison
from mage_ext.evaluation import needles
from mage_ext.evaluation.method_comparison import Comparison, Setting, Settings, settings_text
from mage_ext.models.huggingface import LoadedModel
from mage_ext.sampling import SamplerConfig

Row = dict[str, Any]
Trials = Mapping[str, Sequence[Settings]]

# What each method leaves open in our code, the same number for each. MAGE: its score, its rows, its norm. Quest: how
# the rows of a block share a list. Tidal: the layers that choose, as shares of the selecting ones, and the score.
# SparseD: how much of a block is exact, and the score.
TRIALS: Trials = {
    "mage": ({}, {"score": "max"}, {"score_rows": "open"}, {"norm": "prefix"}),
    "quest": ({}, {"score": "mean"}, {"norm": "prefix"}, {"score": "mean", "norm": "prefix"}),
    "tidal": ({}, {"anchors": (0, 0.25)}, {"anchors": (0, 0.25, 0.5, 0.75)}, {"score": "max"}),
    "sparsed": ({}, {"skip_share": 0.3}, {"score": "max"}, {"skip_share": 0.3, "score": "max"}),
}
DEVELOPMENT_SEEDS = 1000  # 0 .. 999
SUITE, TUNED_SUITE = "eval/tune", "eval/tuned"
_CELL = ("task", "tokens", "T", "K", "g", "dense_layers")
# Methods that run with tuned ones: those, exact attention, and the floors, which have nothing to tune.
TUNABLE = comparison.METHODS


def compare_trials(
    loaded: LoadedModel,
    cases: Sequence[tuple[Any, list[int]]],
    wanted: Sequence[Setting],
    sampler: SamplerConfig = comparison.STATIC,
    tell: Callable[[str], None] | None = None,
    trials: Trials = TRIALS,
) -> Comparison:
    """Every trial of every method at every setting on a batch of cases; prefill is done once and forked.

    Args:
        as `method_comparison.compare`.
    Returns:
        A Comparison whose scores are under (setting, "method number").
    """
    shared = comparison.SharedPrefill(loaded, cases, wanted, sampler)
    exact = shared.run("exact", None, shared.base)
    scores = {}
    for setting in wanted:
        for name, number, settings in _numbered(trials):
            found = comparison.configs(loaded.model, shared.cache, setting, shared.base, [name], {name: settings})
            scores[setting, f"{name} {number}"] = shared.run(name, setting, found.pop(name))
        if tell is not None:
            counts = ", ".join(f"{name} {score.whole}" for (at, name), score in scores.items() if at == setting)
            tell(f"{setting}: of {len(cases)} exact {exact.whole}, {counts}")
    shared.state.release()
    return Comparison(exact, scores, {}, shared.prefixes, shared.T)


def _numbered(trials: Trials) -> list[tuple[str, int, Settings]]:
    return [(name, number, settings) for name, own in trials.items() for number, settings in enumerate(own)]


def suite(
    runner: needles.Runner,
    n: int,
    wanted: Sequence[Setting],
    tasks_wanted: Sequence[str] = ("lines", "four_lines"),
    tokens: Sequence[int] = (2048,),
    tokens_per_step: int = 4,
) -> Iterator[list[Row]]:
    """All rows of eval/tune so far, after every batch of cases.

    Args:
        runner: of the model. n: cases per task and length. wanted: of `method_comparison.settings`.
        tasks_wanted: of TASKS. tokens: lengths of a prompt, about. tokens_per_step: decided in every forward.
    Raises:
        ValueError: naming the argument.
    """
    comparison.check_choices("suite", "tasks_wanted", tasks_wanted, tuple(comparison.TASKS))
    sampler = dataclasses.replace(comparison.STATIC, tokens_per_step=tokens_per_step)
    done: list[Row] = []
    for task, length in itertools.product(tasks_wanted, tokens):
        work = functools.partial(_work, task=task, wanted=wanted, tokens=length, sampler=sampler)
        if runner.jobs == 1:
            work = functools.partial(work, tell=runner.progress)
        for whole in comparison.joined(runner, work, n):
            if runner.progress is not None:
                cases = f"{whole.exact.cases}/{n} cases, exact {whole.exact.whole}"
                runner.progress(f"{task}, {length} tokens, T = {whole.T}: {cases}")
            yield done + _rows(whole, task, length)
        done += _rows(whole, task, length)


def _work(
    seeds: range,
    *,
    task: str,
    wanted: Sequence[Setting],
    tokens: int,
    sampler: SamplerConfig,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    loaded, maker = needles.worker()
    cases = [comparison.make_case(maker, task, seed, tokens) for seed in seeds]
    return compare_trials(loaded, cases, wanted, sampler, tell)


def _rows(whole: Comparison, task: str, tokens: int) -> list[Row]:
    more = whole.common(task, tokens)
    rows = [whole.exact.row(task, None, **more)]
    for (_, label), score in whole.scores.items():
        name, number = label.split(" ")
        told = {"trial": int(number), "settings": settings_text(TRIALS[name][int(number)])}
        rows.append(score.row(task, whole.exact, **more, **told))
    for row in rows:
        del row["kept_mass"]  # scores of the trials are no shares of one kind
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Winners


def means(rows: Sequence[Row], trials: Trials = TRIALS) -> dict[str, list[Fraction]]:
    """Mean score over the cells of every trial of every method.

    Args:
        rows: of eval/tune, of one or several files; those of exact attention don't count.
    Raises:
        ValueError: a method has no row of a trial in a cell, or two, or the cells have different numbers of cases.
    """
    own = [row for row in rows if row["K"]]
    cells = list(dict.fromkeys(tuple(row[key] for key in _CELL) for row in own))
    if not cells:
        raise ValueError("means: rows must be of at least one cell, got none")
    if len({row["n"] for row in own}) > 1:
        raise ValueError(f"means: rows must have one n, got {sorted({row['n'] for row in own})}")
    found: dict[tuple, Fraction] = {}
    for row in own:
        at = (row["method"], row["trial"], *(row[key] for key in _CELL))
        if at in found:
            raise ValueError(f"means: rows must have a trial once in a cell, got {at} twice")
        found[at] = Fraction(round(row["score"] * row["n"]), row["n"])  # exact, so that equal trials are equal
    for name, number, _ in _numbered(trials):
        for cell in cells:
            if (name, number, *cell) not in found:
                raise ValueError(
                    f"means: rows must have every trial in every cell, got none of {name} {number}, {cell}"
                )
    if len(found) != len(cells) * len(_numbered(trials)):
        raise ValueError(f"means: rows must be of {_count(trials)}, got others")
    return {
        name: [sum(found[(name, number, *cell)] for cell in cells) / len(cells) for number in range(len(own))]
        for name, own in trials.items()
    }


def _count(trials: Trials) -> str:
    return ", ".join(f"{len(own)} trials of {name}" for name, own in trials.items())


def winners(rows: Sequence[Row], trials: Trials = TRIALS) -> dict[str, int]:
    """The number of every method's trial of the highest mean, the earliest of equal ones. See `means`."""
    return {name: max(range(len(own)), key=own.__getitem__) for name, own in means(rows, trials).items()}


def head(rows: Sequence[Row]) -> dict[str, Any]:
    """What the head of a whole file has beside that of other suites. See `means`."""
    return {"trials": {name: [dict(each) for each in own] for name, own in TRIALS.items()}, "winners": winners(rows)}


def table(rows: Sequence[Row]) -> list[str]:
    """Mean score and K/V read of every trial, the winners with a star, as lines of text."""
    won = winners(rows)
    cells = len({tuple(row[key] for key in _CELL) for row in rows if row["K"]})
    lines = [f"{'':>9} {'settings':<28}{'found, %':>9}{'K/V, %':>8}   mean of {cells} cells"]
    for name, own in means(rows).items():
        for number, mean in enumerate(own):
            inside = [row for row in rows if row["K"] and (row["method"], row["trial"]) == (name, number)]
            read = sum(row["kv_share"] for row in inside) / len(inside)
            star = " *" if number == won[name] else ""
            told = settings_text(TRIALS[name][number])
            lines.append(f"{name:>9} {told:<28}{100 * float(mean):>9.2f}{100 * read:>8.1f}{star}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Tuned methods


@dataclass(frozen=True)
class Tuned:
    """What a file of eval/tune decided.

    Fields: settings: of the winner, by method. told: model and seeds that decided. seeds: the same ones. path.
    """

    settings: dict[str, Settings]
    told: str
    seeds: range
    path: str

    def check_seeds(self, first: int, n: int) -> None:
        """Raises ValueError if the cases of these seeds are among those that decided."""
        if first < self.seeds.stop and self.seeds.start < first + n:
            told = f"{self.seeds.start} to {self.seeds.stop - 1}"
            raise ValueError(
                f"tuned: first_seed must give cases that tuned nothing, seeds other than {told} of {self.path!r}, "
                f"got {first} to {first + n - 1}"
            )


def read(path: str | Path) -> Tuned:
    """The winners of a complete file of `mage eval tune`.

    Raises:
        ValueError: naming the file: it is missing, no such file, not complete, of other trials than this version's, or
            its winners are not those of its rows.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"tuned: path must be a complete file of `mage eval tune`, got {str(path)!r}: {why}")

    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse(error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise refuse(f"no JSON: {error}") from None
    if not isinstance(whole, dict) or whole.get("name") != SUITE:
        name = whole.get("name") if isinstance(whole, dict) else type(whole).__name__
        raise refuse(f'"name" must be {SUITE!r}, got {name!r:.60}')
    if whole.get("complete") is not True:
        raise refuse(f'"complete" must be true, got {whole.get("complete")!r:.60}')
    if not isinstance(whole.get("model"), str) or not whole["model"]:
        raise refuse(f'"model" must be a text, got {whole.get("model")!r:.60}')
    for key, least in (("first_seed", 0), ("n", 1)):
        value = whole.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise refuse(f'"{key}" must be a whole number of at least {least}, got {value!r:.60}')
    rows = whole.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise refuse('"rows" must be a list of objects, at least one')
    for number, row in enumerate(rows, 1):
        _check_row(row, f"row {number}", whole["n"], refuse)
    try:
        decided = head(rows)
    except ValueError as error:
        raise refuse(str(error).removeprefix("means: ")) from None
    for key, expected in json.loads(json.dumps(decided)).items():
        if whole.get(key) != expected:
            of = "of this version" if key == "trials" else "of its rows"
            raise refuse(f'"{key}" must be those {of}, {expected}, got {whole.get(key)!r:.200}')
    first, last = whole["first_seed"], whole["first_seed"] + whole["n"] - 1
    settings = {name: TRIALS[name][number] for name, number in decided["winners"].items()}
    return Tuned(settings, f"{whole['model']}, seeds {first} to {last}", range(first, last + 1), str(path))


def _check_row(row: Row, place: str, n: int, refuse: Callable[[str], ValueError]) -> None:
    """Raises what `refuse` makes where a row lacks what winners are made of."""
    for key in ("task", "method"):
        if not isinstance(row.get(key), str):
            raise refuse(f"{key} of {place} must be a text, got {row.get(key)!r:.60}")
    for key in ("tokens", "T", "K", "g", "dense_layers", "n"):
        value = row.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < (-1 if key == "dense_layers" else 0):
            raise refuse(f"{key} of {place} must be a whole number, got {value!r:.60}")
    if row["n"] != n:
        raise refuse(f"n of {place} must be that of the file, {n}, got {row['n']}")
    score = row.get("score")
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not 0 <= score <= 1:
        raise refuse(f"score of {place} must be in [0, 1], got {score!r:.60}")
    if not row["K"]:
        return
    trials, trial = TRIALS.get(row["method"]), row.get("trial")
    if trials is None:
        raise refuse(f"method of {place} must be of {', '.join(TRIALS)}, got {row['method']!r:.60}")
    if not isinstance(trial, int) or isinstance(trial, bool) or not 0 <= trial < len(trials):
        raise refuse(f"trial of {place} must be in [0, {len(trials)}), got {trial!r:.60}")
    expected = settings_text(trials[trial])
    if row.get("settings") != expected:
        raise refuse(f"settings of {place} must be {expected!r}, got {row.get('settings')!r:.60}")


def tuned_suite(
    runner: needles.Runner,
    n: int,
    wanted: Sequence[Setting],
    tuned: Tuned,
    tasks_wanted: Sequence[str],
    methods_wanted: Sequence[str] = TUNABLE,
    tokens: Sequence[int] = (2048,),
    tokens_per_step: Sequence[int] = (4,),
) -> Iterator[list[Row]]:
    """All rows of eval/tuned so far, after every batch of cases: those of `method_comparison.suite` with the winners'
    settings.

    Args:
        tuned: of `read`. methods_wanted: of TUNABLE. The others as `method_comparison.suite` takes them.
    Raises:
        ValueError: naming the argument; also for seeds that tuned.
    """
    comparison.check_choices("tuned", "methods", methods_wanted, TUNABLE)
    tuned.check_seeds(runner.first, n)
    options = (tasks_wanted, methods_wanted, tokens, tokens_per_step, tuned.settings)
    for rows in comparison.suite(runner, n, wanted, *options):
        yield [{**row, "tuned_on": tuned.told} for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# The answer


def answer(rows: Mapping[str, list[Row]], other: Mapping[str, list[Row]], compared: Callable[..., Any]) -> Any:
    """The comparison of the tuned methods, beside the untuned one.

    Args:
        rows: of evaluation files by suite. other: the same of another training seed of the model, may be empty.
        compared: makes text, head and table of rows and other rows of eval/methods.
    Returns:
        Text, head and table; None without rows of eval/tuned.
    """
    own = rows.get(TUNED_SUITE, [])
    beside = {"eval/methods": other[TUNED_SUITE]} if other.get(TUNED_SUITE) else {}
    found = compared({"eval/methods": own}, beside) if own else None
    if found is None:
        return None
    text, top, lines = found
    told = []
    for name in TRIALS:
        chosen = list(dict.fromkeys(row["settings"] for row in own if row["method"] == name))
        if chosen:
            told.append(f"{name} {' and '.join(chosen)}")
    places = " and ".join(dict.fromkeys(row["tuned_on"] for row in own))
    parts = [f"Best of {len(TRIALS['mage'])} trials each on {places}: {'; '.join(told)}.", text]
    before = {_place(row): row for row in rows.get("eval/methods", []) if row["K"]}
    pairs: dict[str, dict[tuple, tuple[Row, Row]]] = {}  # by method, then cell: tuned, untuned
    for row in own:
        if row["method"] in TRIALS and _place(row) in before:
            pairs.setdefault(row["method"], {})[_place(row)[1:]] = row, before[_place(row)]
    # Averages of methods can be compared over the same cells only.
    shared = set.intersection(*map(set, pairs.values())) if pairs else set()
    if shared:
        averages = []
        for name in (name for name in TRIALS if name in pairs):
            both = [pair for cell, pair in pairs[name].items() if cell in shared]
            scores = [100 * sum(pair[at]["score"] for pair in both) / len(both) for at in (0, 1)]
            reads = [100 * sum(pair[at]["kv_share"] for pair in both) / len(both) for at in (0, 1)]
            averages.append(f"{name} {scores[0]:.1f} for {scores[1]:.1f}, K/V read {reads[0]:.1f} for {reads[1]:.1f}")
        where = f"in {len(shared)} cells, where all of these were measured tuned and untuned"
        parts.append(f"Found on average {where}, %, tuned for untuned: {'; '.join(averages)}.")
    elif pairs:
        parts.append(f"No cell has all of {', '.join(pairs)} tuned and untuned, so there are no averages to compare.")
    return " ".join(parts), top, lines


def _place(row: Row) -> tuple:
    return (row["method"], *(row[key] for key in _CELL))
