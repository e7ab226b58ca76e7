"""Accuracy over the depth of a fact and over the threshold of the sampler.

Rows of `mage eval heatmap` (eval/heatmap.json) are those of eval/methods.json without recall, one per method, length
and depth:

    task "needle", method, K, g, dense_layers, n, score, exact, ci_low, ci_high, kv_share, forwards, ...
    tokens               of the prompt, about; prefix_tokens: mean prefix before the first block
    depth                where the fact stands, 0 = start of the context, 1 = end

Rows of `mage eval thresholds` (eval/thresholds.json), one per method and threshold:

    task, method, K, g, dense_layers, n, score, exact, ci_low, ci_high, kv_share, ...   as in eval/methods.json
    threshold            of the sampler low_confidence_dynamic
    forwards             mean per answer, commits included; exact_forwards: of exact at this threshold
    tokens_per_forward   new tokens per forward, mean over answers
    forwards_ratio, forwards_ratio_low, forwards_ratio_high    forwards / exact_forwards, interval over cases

Test: pytest tests/python/test_sweeps.py
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mage_ext.evaluation import needles
from mage_ext.evaluation.forced_blocks import bootstrap
from mage_ext.evaluation.method_comparison import (
    ALL_METHODS,
    STATIC,
    TASKS,
    Comparison,
    Setting,
    check_choices,
    compare,
    joined,
    make_case,
)
from mage_ext.sampling import SamplerConfig

THRESHOLDS = (0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)  # a sure model decides a whole answer in its first, exact forward


def heatmap(
    runner: needles.Runner,
    n: int,
    wanted: Sequence[Setting],
    methods_wanted: Sequence[str] = ("mage", "quest", "tidal"),
    tokens: Sequence[int] = (1024, 2048),
    depths: int = 11,
) -> Iterator[list[dict[str, Any]]]:
    """All rows of eval/heatmap so far, after every batch of cases.

    Args:
        runner: of the model. n: cases per length and depth, seeds from the runner's first on: a seed's text is the same
            at all depths.
        wanted: of `method_comparison.settings`. methods_wanted: of ALL_METHODS, beside "exact". tokens: lengths of a
            prompt, about. depths: number of them, evenly from 0 to 1, >= 2.
    Raises:
        ValueError: naming the argument.
    """
    check_choices("heatmap", "methods_wanted", methods_wanted, ALL_METHODS)
    if depths < 2:
        raise ValueError(f"heatmap: depths must be at least 2, got {depths}")
    places = [i / (depths - 1) for i in range(depths)]
    done: list[dict[str, Any]] = []
    for length in tokens:
        work = functools.partial(
            _needles, first=runner.first, wanted=wanted, names=methods_wanted, tokens=length, places=places
        )
        for whole in _joined(runner, work, n * depths, f"needle, {length} tokens"):
            rows = []
            for number, depth in enumerate(places):
                cases = range(number, whole.exact.cases, depths)  # see _needles
                if cases:
                    rows += [{**row, "depth": depth} for row in whole.of(cases).rows("needle", length)]
            yield done + rows
        done += rows


def _needles(
    numbers: range,
    *,
    first: int,
    wanted: Sequence[Setting],
    names: Sequence[str],
    tokens: int,
    places: Sequence[float],
) -> Comparison:
    """Of numbers from `first` on, that many depths to a seed."""
    loaded, maker = needles.worker()
    count = len(places)
    cases = [maker.case(first + (i - first) // count, tokens, depth=places[(i - first) % count]) for i in numbers]
    return compare(loaded, cases, wanted, names, STATIC, with_recall=False)


def thresholds(
    runner: needles.Runner,
    n: int,
    wanted: Sequence[Setting],
    tasks_wanted: Sequence[str] = ("needle", "four_keys"),
    methods_wanted: Sequence[str] = ("mage",),
    tokens: Sequence[int] = (2048,),
    levels: Sequence[float] = THRESHOLDS,
) -> Iterator[list[dict[str, Any]]]:
    """All rows of eval/thresholds so far, after every batch of cases.

    Args:
        runner: of the model. n: cases per task, length and threshold, the same ones for all thresholds.
        wanted: of `method_comparison.settings`. tasks_wanted: of TASKS. methods_wanted: of ALL_METHODS, beside "exact".
        tokens: lengths of a prompt, about. levels: thresholds, in [0, 1].
    Raises:
        ValueError: naming the argument.
    """
    check_choices("thresholds", "tasks_wanted", tasks_wanted, tuple(TASKS))
    check_choices("thresholds", "methods_wanted", methods_wanted, ALL_METHODS)
    samplers = [SamplerConfig("low_confidence_dynamic", threshold=level) for level in levels]
    done: list[dict[str, Any]] = []
    for task, length, sampler in itertools.product(tasks_wanted, tokens, samplers):
        work = functools.partial(
            _answers, task=task, tokens=length, wanted=wanted, names=methods_wanted, sampler=sampler
        )
        for whole in _joined(runner, work, n, f"{task}, {length} tokens, threshold {sampler.threshold}"):
            rows = [
                {**row, "threshold": sampler.threshold, **_forwards(whole, score)}
                for row, score in zip(whole.rows(task, length), [whole.exact, *whole.scores.values()], strict=True)
            ]
            yield done + rows
        done += rows


def _answers(
    seeds: range,
    *,
    task: str,
    tokens: int,
    wanted: Sequence[Setting],
    names: Sequence[str],
    sampler: SamplerConfig,
) -> Comparison:
    loaded, maker = needles.worker()
    cases = [make_case(maker, task, seed, tokens) for seed in seeds]
    return compare(loaded, cases, wanted, names, sampler, with_recall=False)


def _forwards(whole: Comparison, score: needles.Score) -> dict[str, float]:
    """What a row has about forwards."""
    exact = torch.tensor([result.stats.num_forwards for result in whole.exact.results], dtype=torch.float64)
    own = torch.tensor([result.stats.num_forwards for result in score.results], dtype=torch.float64)
    low, high = bootstrap(own / exact)
    per_forward = [result.stats.tokens_per_forward for result in score.results]
    return {
        "exact_forwards": exact.mean().item(),
        "tokens_per_forward": sum(per_forward) / len(per_forward),
        "forwards_ratio": (own / exact).mean().item(),
        "forwards_ratio_low": low,
        "forwards_ratio_high": high,
    }


def _joined(runner: needles.Runner, work: Any, n: int, told: str) -> Iterator[Comparison]:
    """The comparison of all cases so far, after every batch, which is told."""
    for whole in joined(runner, work, n):
        if runner.progress is not None:
            counts = ", ".join(f"{name} {score.whole}" for (_, name), score in whole.scores.items())
            runner.progress(f"{told}: of {whole.exact.cases}/{n} exact {whole.exact.whole}, {counts}")
        yield whole


def heatmap_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Found needles in percent, a line per length, as lines of text."""
    lines = []
    depths = sorted({row["depth"] for row in rows})
    for name, k, g, dense in dict.fromkeys((row["method"], row["K"], row["g"], row["dense_layers"]) for row in rows):
        setting = f", K = {k}, g = {g}, {dense} dense layers" if k else ""
        lines += [f"{name}{setting}: found, %", f"{'tokens':>8}" + "".join(f"{depth:>6.1f}" for depth in depths)]
        inside = [
            row for row in rows if (row["method"], row["K"], row["g"], row["dense_layers"]) == (name, k, g, dense)
        ]
        for tokens in sorted({row["tokens"] for row in inside}):
            at = {row["depth"]: row for row in inside if row["tokens"] == tokens}
            cells = [f"{100 * at[depth]['score']:.0f}" if depth in at else "" for depth in depths]
            lines.append(f"{tokens:>8}" + "".join(f"{cell:>6}" for cell in cells))
    return lines


def thresholds_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy and forwards by threshold, as lines of text."""
    lines = [f"{'':>45}{'threshold':>10}{'found, %':>10}{'exact, %':>10}{'forwards':>10}{'exact':>8}{'tok/fwd':>9}"]
    for row in rows:
        setting = f"K={row['K']} g={row['g']} dense={row['dense_layers']}" if row["K"] else ""
        lines.append(
            f"{row['task']:>10} {row['tokens']:>5} {row['method']:>8} {setting:>19}{row['threshold']:>10}"
            f"{100 * row['score']:>10.1f}{100 * row['exact']:>10.1f}{row['forwards']:>10.2f}"
            f"{row['exact_forwards']:>8.2f}{row['tokens_per_forward']:>9.2f}"
        )
    return lines
