"""What fine-tuning with sparse forwards adds over its control: one model before, after, and after the control's steps.

Both runs are folders of `mage train finetune`. The three are measured with exact attention and with MAGE on the same
cases, so that what one of them finds alone can be counted.

Test: pytest tests/python/test_finetuning.py
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mage_ext._arguments import check_path
from mage_ext.evaluation import method_comparison, needles
from mage_ext.evaluation.method_comparison import Comparison, Setting, mcnemar

WEIGHTS = ("shipped", "control", "tuned")  # rows name them so
TASKS = ("four_keys", "four_lines", "lines")
# What a run and its control may differ in.
_OWN = ("control", "steps", "minutes", "lam", "workers")


@dataclass(frozen=True)
class Run:
    """What `mage train finetune` left in a folder.

    Fields: adapter: its int8 file. facts: of the last run of its log: steps, seconds_per_step and, as check_*, the last
    check. first: the check before the first step. config, layout: of that run.
    """

    adapter: Path
    facts: dict[str, Any]
    first: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, Any]

    @property
    def setting(self) -> Setting:
        """Of the lists it was trained and checked with."""
        return Setting(self.config["k"], self.config["g"], self.config["dense_layers"])


def read_runs(finetuned: str | Path, control: str | Path) -> tuple[Run, Run]:
    """The run and its control.

    Args:
        finetuned, control: folders of `mage train finetune` of one model, the second with --control.
    Raises:
        ValueError: naming the argument; also where the two are no such pair.
    """
    runs = _read_run("finetuned", finetuned), _read_run("control", control)
    for name, run, wanted in (("finetuned", runs[0], False), ("control", runs[1], True)):
        if run.config["control"] != wanted:
            told = "with --control" if wanted else "without --control"
            raise ValueError(f"{name}: must be a run {told}, got {str(run.adapter.parent)!r}")
    own, other = (({**run.config, "layout": run.layout}) for run in runs)
    for key in own:
        if key not in _OWN and own[key] != other.get(key):
            raise ValueError(
                f"control: must have the {key} of finetuned, {own[key]}, got {other.get(key)} in {str(control)!r}"
            )
    return runs


def _read_run(name: str, folder: str | Path) -> Run:
    check_path("read_runs", folder, name)
    folder = Path(folder)
    adapter, log = folder / "adapter-int8.safetensors", folder / "log.jsonl"
    for path in (adapter, log):
        if not path.is_file():
            raise ValueError(f"{name}: must be a folder of mage train finetune with {path.name}, got {str(folder)!r}")
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        begin = max(i for i, line in enumerate(lines) if line.get("event") == "start")  # a log may hold several runs
        start, *lines = lines[begin:]
        checks = [line for line in lines if line.get("event") == "check"]
        first, last = (
            {f"check_{key}": value for key, value in line.items() if key not in ("event", "step")}
            for line in (checks[0], checks[-1])
        )
        steps = [line for line in lines if "seconds_per_step" in line]
        # The first line is of the first step, which compiles.
        seconds = steps[-1]["seconds_per_step"] if len(steps) > 1 else None
        facts = {**last, "steps": checks[-1]["step"], "seconds_per_step": seconds}
        run = Run(adapter, facts, {**first, "steps": 0, "seconds_per_step": None}, start["config"], start["layout"])
        _ = run.setting, run.config["control"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: log.jsonl must be of a run with its checks, got {str(log)!r}: {error}") from None
    return run


def suite(
    start: Callable[[str], needles.Runner],
    n: int,
    wanted: Sequence[Setting],
    runs: tuple[Run, Run],
    tasks_wanted: Sequence[str] = TASKS,
    tokens: Sequence[int] = (2048,),
) -> Iterator[list[dict[str, Any]]]:
    """All rows so far, after every batch of cases.

    Args:
        start: gives the runner of each of WEIGHTS; one is closed before the next starts. n: cases per task and length.
        wanted: of `method_comparison.settings`. runs: of `read_runs`. tasks_wanted: of method_comparison.TASKS.
        tokens: lengths of a prompt, about.
    Raises:
        ValueError: naming the argument.
    """
    method_comparison.check_choices("suite", "tasks_wanted", tasks_wanted, tuple(method_comparison.TASKS))
    outcomes: dict[tuple[str, str, int], Comparison] = {}
    for weights in WEIGHTS:
        runner = start(weights)
        for task, length in itertools.product(tasks_wanted, tokens):
            work = functools.partial(_work, task=task, wanted=wanted, tokens=length)
            for whole in method_comparison.joined(runner, work, n):
                outcomes[weights, task, length] = whole
                if runner.progress is not None:
                    counts = ", ".join(f"{setting} {score.whole}" for (setting, _), score in whole.scores.items())
                    told = f"{weights}: {task}, {length} tokens, {whole.exact.cases}/{n} cases"
                    runner.progress(f"{told}, exact {whole.exact.whole}, {counts}")
                yield rows(outcomes, runs)
        runner.close()


def _work(seeds: range, *, task: str, wanted: Sequence[Setting], tokens: int) -> Comparison:
    loaded, maker = needles.worker()
    cases = [method_comparison.make_case(maker, task, seed, tokens) for seed in seeds]
    return method_comparison.compare(loaded, cases, wanted, ("mage",), with_recall=False)


def rows(outcomes: Mapping[tuple[str, str, int], Comparison], runs: tuple[Run, Run]) -> list[dict[str, Any]]:
    """The rows of an evaluation file, by (weights, task, tokens).

    Beside those of `Comparison.rows`: "weights", of WEIGHTS; in rows of the runs' own setting what their logs say; in
    those of "tuned" "control_only" and "tuned_only", cases that one of the two alone answered, and "p_control",
    McNemar's exact two-sided p of that.
    """
    tuned, control = runs
    facts = {"shipped": tuned.first, "control": control.facts, "tuned": tuned.facts}
    found = []
    for (weights, task, tokens), whole in outcomes.items():
        others = {(s.method.K, s.method.g, s.method.dense_layers): s for s in _scores(outcomes, task, tokens)}
        for row in whole.rows(task, tokens):
            row["weights"] = weights
            setting = row["K"], row["g"], row["dense_layers"]
            if setting == (tuned.setting.K, tuned.setting.g, tuned.setting.dense_layers):
                row |= facts[weights]
            if weights == "tuned" and setting in others:
                own = next(s for (at, _), s in whole.scores.items() if (at.K, at.g, at.dense_layers) == setting)
                # A run that was cut off has fewer cases than its control.
                pairs = [(all(a), all(b)) for a, b in zip(others[setting].found, own.found, strict=False)]
                counts = pairs.count((True, False)), pairs.count((False, True))
                row |= {"control_only": counts[0], "tuned_only": counts[1], "p_control": mcnemar(*counts)}
            found.append(row)
    return found


def _scores(outcomes: Mapping[tuple[str, str, int], Comparison], task: str, tokens: int) -> list[needles.Score]:
    """The control's."""
    control = outcomes.get(("control", task, tokens))
    return [] if control is None else list(control.scores.values())


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per task, length and setting."""
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["K"]:
            key = row["task"], row["tokens"], row["K"], row["g"], row["dense_layers"]
            cells.setdefault(key, {})[row["weights"]] = row
    lines = []
    for (task, tokens, k, g, dense), by in cells.items():
        told = ", ".join(
            f"{name} {100 * row['score']:.1f} (exact {100 * row['exact']:.1f})" for name, row in by.items()
        )
        line = f"{task}, {tokens} tokens, K = {k}, g = {g}, {dense} dense layers, %: {told}"
        if "tuned" in by and "p_control" in by["tuned"]:
            row = by["tuned"]
            line += f"; of {row['n']} control alone {row['control_only']}, tuned alone {row['tuned_only']}, "
            line += f"p = {row['p_control']:.2g}"
        lines.append(line)
    return lines
