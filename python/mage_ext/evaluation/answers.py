"""What evaluation files answer of the project's questions, with numbers, intervals and paired tests.

    recall        does the first forward's list hold along the block, against the 84 to 90 % of the paper
    methods       is MAGE better than Quest, Tidal and SparseD at every K, and where not
    variants      which score, rows, norm and granularity win at equal bytes and at equal time
    layers        what budgets by layer (MAGE v1, "joint") add
    dense         what dense layers add
    finetuning    what fine-tuning with sparse forwards adds over its control
    speed         which times have accuracy behind them at the same units and share of the prefix

A cell is a task, length, number of forwards and setting at which exact attention finds at least 80 %, or a share masked
of held-out prose. Tests are paired by case: McNemar's exact one for found facts, for prose a normal one from the
bootstrap interval of the paired difference. All cells of an answer are one family, at 5 % (Holm 1979). What holds is
"better" or "worse"; the rest is "no difference shown", which is not the same as equal.

Test: pytest tests/python/test_answers.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mage_ext._arguments import check_list, check_type
from mage_ext.evaluation.figures import RELIABLE, ResultFile, Row, groups
from mage_ext.evaluation.method_comparison import holm, mcnemar

PAPER_RECALL = (0.84, 0.90)  # arXiv 2602.14209, its own models
_SIGNS = ("better", "no difference shown", "worse")
_OTHERS = ("quest", "tidal", "sparsed")
_SAME_SHARE = 1.25  # shares of the prefix within this factor count as the same


@dataclass(frozen=True)
class Answer:
    """Fields: name; question; text: the answer in words and numbers; head, rows: the table behind it, may be empty."""

    name: str
    question: str
    text: str
    head: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Cell:
    """A paired comparison of row with other: gain > 0 where row is better. p: two-sided."""

    row: Row
    gain: float
    p: float
    sign: str = ""


def answers(files: Sequence[ResultFile]) -> list[Answer]:
    """One answer per question, in order; where the files have no rows for one it says so.

    Args:
        files: of `figures.read`.
    Raises:
        ValueError: rows that lack a key, naming it. TypeError: files are no list of ResultFile.
    """
    rows: dict[str, list[Row]] = {}
    for file in check_list("answers", "files", files, "a list of ResultFile"):
        check_type("answers", "files", file, ResultFile, "a list of ResultFile")
        rows.setdefault(file.name, []).extend(file.rows)
    found = []
    for name, (question, find) in _QUESTIONS.items():
        try:
            answer = find(rows)
        except KeyError as error:
            raise ValueError(f"files: rows for the answer {name!r} must have the key {error}") from None
        text, head, table = answer if answer is not None else ("Not measured in these files.", (), [])
        found.append(Answer(name, question, text, tuple(head), table))
    return found


def lines(found: Sequence[Answer]) -> list[str]:
    """The answers as lines of text."""
    return [f"{answer.question} {answer.text}" for answer in found]


# ----------------------------------------------------------------------------------------------------------------------
# Paired comparisons


def normal_p(mean: float, low: float, high: float) -> float:
    """Two-sided p of a mean against 0, from its 95 % interval, as of a normal distribution."""
    if high <= low:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / ((high - low) / (2 * 1.959964)) / math.sqrt(2))


def _reliable(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["K"] and row["exact"] >= RELIABLE]


def _facts(rows: Sequence[Row], p: str, other_only: str, own_only: str) -> list[_Cell]:
    """Cells of eval/methods whose rows have a paired test; the gain is in cases, as a share."""
    return [
        _Cell(row, (row[own_only] - row[other_only]) / row["n"], row[p])
        for row in _reliable(rows)
        if row.get(p) is not None
    ]


def _prose(rows: Sequence[Row], column: str) -> list[_Cell]:
    """Cells of eval/prose; the gain is in nats saved."""
    cells = []
    for row in rows:
        if row["K"] and row.get(column) is not None:
            low, high = row[f"{column}_low"], row[f"{column}_high"]
            cells.append(_Cell(row, -row[column], normal_p(row[column], low, high)))
    return cells


def _judged(cells: Sequence[_Cell]) -> list[_Cell]:
    """The same with signs, all of them one family."""
    held = holm([cell.p for cell in cells])
    return [
        _Cell(cell.row, cell.gain, cell.p, ("better" if cell.gain > 0 else "worse") if differs else _SIGNS[1])
        for cell, differs in zip(cells, held, strict=True)
    ]


def _reversed(cells: Sequence[_Cell]) -> list[_Cell]:
    return [_Cell(cell.row, -cell.gain, cell.p) for cell in cells]


def _counts(cells: Sequence[_Cell]) -> str:
    told = [f"{sign} in {sum(cell.sign == sign for cell in cells)}" for sign in _SIGNS]
    return f"{', '.join(told)} of {len(cells)}"


def _signed(value: float, digits: int) -> str:
    """With its sign; what rounds to 0 has "+"."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _gains(cells: Sequence[_Cell], is_prose: bool) -> str:
    """Least, mean and largest gain."""
    values = [cell.gain for cell in cells]
    unit, scale, digits = ("nats", 1.0, 3) if is_prose else ("points", 100.0, 1)
    mean, low, high = (_signed(scale * each, digits) for each in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} {unit} on average ({low} to {high})"


def _place(row: Row) -> str:
    """Where a cell is."""
    told = [str(row["task"]), f"{row['tokens']} tokens"]
    if row["task"] == "prose":
        told.append(f"{100 * row['t']:.0f} % masked")
    else:
        told.append(f"T = {row['T']}")
    told += [f"K = {row['K']}", f"g = {row['g']}", f"{row['dense_layers']} dense"]
    return ", ".join(told)


def _line(cell: _Cell, name: str) -> list[str]:
    row = cell.row
    is_prose = row["task"] == "prose"
    gain = f"{_signed(cell.gain, 4)} nats" if is_prose else f"{_signed(100 * cell.gain, 1)} points"
    share = row["K"] / (row.get("prefix_tokens") or row["tokens"])
    return [name, _place(row), f"{100 * share:.1f} %", gain, f"{cell.p:.2g}", cell.sign]


_HEAD = ("compared", "cell", "K / prefix", "gain", "p", "")


def _compared(
    kinds: Sequence[tuple[str, list[_Cell], list[_Cell]]],
) -> tuple[str, tuple[str, ...], list[list[str]]] | None:
    """An answer of paired cells by what is compared: (name, cells of facts, cells of prose). Facts and prose are a
    family each."""
    parts, table = [], []
    for is_prose in (False, True):
        own = [(name, cells[is_prose]) for name, *cells in kinds]
        judged = _judged([cell for _, cells in own for cell in cells])
        at = 0
        for name, cells in own:
            mine = judged[at : at + len(cells)]
            at += len(cells)
            if not mine:
                continue
            what = "prose" if is_prose else "facts"
            parts.append(f"{name}, {what}: {_counts(mine)} cells, {_gains(mine, is_prose)}.")
            table += [_line(cell, name) for cell in mine]
    return (" ".join(parts), _HEAD, table) if parts else None


def _of(rows: Sequence[Row], *methods: str) -> list[Row]:
    return [row for row in rows if row["method"] in methods]


# ----------------------------------------------------------------------------------------------------------------------
# The questions


def _recall(rows: dict[str, list[Row]]) -> Any:
    own = [row for row in rows.get("eval/recall", []) if row["study"] == "recall" and row["method"] == "mage"]
    controls = {}
    for row in own:
        if row["control"] != "none" and not row.get("weights"):
            key = row["task"], row["tokens"], row["K"], row["g"]
            controls.setdefault(key, []).append(f"{row['control']} {100 * row['score']:.1f}")
    staged = groups([row for row in own if row.get("weights")], "weights")
    own = [row for row in own if row["control"] == "none" and not row.get("weights")]
    if not own:
        return None
    low, high = PAPER_RECALL
    table, places = [], []
    for row in own:
        if row["ci_high"] < low:
            place = "below"
        elif row["ci_low"] > high:
            place = "above"
        else:
            place = "inside" if low <= row["ci_low"] and row["ci_high"] <= high else "touches"
        places.append(place)
        least = min(row["recall_by_forward"])
        key = row["task"], row["tokens"], row["K"], row["g"]
        told = [row["task"], str(row["tokens"]), f"{row['K']} ({100 * row['chance']:.1f} %)", str(row["g"])]
        told += [f"{100 * row['score']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]", place]
        told += [f"{100 * least:.1f}", f"{100 * row['recall_worst_layer']:.1f}", f"{100 * row['kept']:.1f}"]
        table.append([*told, "; ".join(controls.get(key, []))])
    scores = [100 * row["score"] for row in own]
    counted = ", ".join(f"{places.count(each)} {each}" for each in dict.fromkeys(places))
    text = f"Recall is {min(scores):.1f} to {max(scores):.1f} % over {len(own)} cells (task, length, K, g); against "
    text += f"{100 * low:.0f} to {100 * high:.0f} % their 95 % intervals are: {counted}. "
    text += f"Mass kept of what each forward's own list keeps: at least {100 * min(r['kept'] for r in own):.1f} %."
    for (weights,), inside in staged.items():
        shown = ", ".join(f"{row['task']} K = {row['K']} {100 * row['score']:.1f} %" for row in inside)
        text += f" Earlier weights {weights}: {shown}."
    head = ("task", "tokens", "K (chance)", "g", "recall, % [95 %]", f"{low:.2f}-{high:.2f}", "least forward")
    return text, (*head, "worst layer", "kept / own", "controls"), table


def _methods(rows: dict[str, list[Row]]) -> Any:
    facts, prose = rows.get("eval/methods", []), rows.get("eval/prose", [])
    kinds = []
    for name in _OTHERS:
        cells = _reversed(_facts(_of(facts, name), "p_mage", "mage_only", "method_only"))
        kinds.append((f"MAGE against {name}", cells, _reversed(_prose(_of(prose, name), "over_mage"))))
    found = _compared(kinds)
    if found is None:
        return None
    text, head, table = found
    worse = [line for line in table if line[-1] == "worse"]
    if worse:
        ks = sorted({part for line in worse for part in line[1].split(", ") if part.startswith("K = ")}, key=_number)
        text += f" Not better everywhere: worse at {', '.join(ks)}, in cells that the table names."
    else:
        text += " Worse nowhere."
    return text + _best_units(facts), head, table


def _best_units(facts: Sequence[Row]) -> str:
    """Scores of all methods with the units that suit each best, over cells where all of them ran with the same ones."""
    names = ("mage", *_OTHERS)
    best: dict[str, list[float]] = {name: [] for name in names}
    tried = set()
    for inside in groups(_reliable(_of(facts, *names)), "task", "tokens", "T", "K", "dense_layers").values():
        by = {name: {row["g"]: row["score"] for row in inside if row["method"] == name} for name in names}
        if len(by["mage"]) > 1 and all(set(by[name]) == set(by["mage"]) for name in names):
            tried |= set(by["mage"])
            for name in names:
                best[name].append(max(by[name].values()))
    if not tried:
        return ""
    told = ", ".join(f"{name} {100 * sum(scores) / len(scores):.1f}" for name, scores in best.items())
    cells = f"{len(best['mage'])} cells (task, length, T, K, dense layers)"
    return f" With the units, of {sorted(tried)}, that suit each best in each of {cells}, found on average, %: {told}."


def _number(text: str) -> int:
    return int(text.rsplit(" ", 1)[1])


def _variants(rows: dict[str, list[Row]]) -> Any:
    facts, prose = rows.get("eval/methods", []), rows.get("eval/prose", [])
    kinds = []
    for name, told in (
        ("mage_max", "score: largest row for mean"),
        ("mage_open", "rows: open ones for all"),
        ("mage_prefix", "norm: prefix for context"),
    ):
        cells = _facts(_of(facts, name), "p_mage", "mage_only", "method_only")
        kinds.append((told, cells, _prose(_of(prose, name), "over_mage")))
    own = _of(facts, "mage"), _of(prose, "mage")
    for g in sorted({row["g"] for part in own for row in part if row["g"] > 1}):
        cells = _facts([row for row in own[0] if row["g"] == g], "p_g1", "g1_only", "units_only")
        kinds.append(
            (f"units of {g} for 1, equal bytes", cells, _prose([row for row in own[1] if row["g"] == g], "over_g1"))
        )
    found = _compared(kinds)
    text, head, table = found if found is not None else ("", _HEAD, [])
    times = _unit_times(rows)
    if times:
        text += " Equal time: " + "; ".join(times) + "."
    return (text.strip(), head, table) if text else None


def _unit_times(rows: dict[str, list[Row]]) -> list[str]:
    """What a sparse forward's attention of units of one token takes, as a share of larger units of the same K."""
    ratios: dict[int, list[float]] = {}
    fine: dict[tuple, float] = {}
    cases = [(row["case"], row["us"]) for row in rows.get("sparse_block_attention", []) if "g" in row["case"]]
    key = lambda case: tuple(sorted((k, v) for k, v in case.items() if k != "g"))  # noqa: E731
    for case, us in cases:
        if case["g"] == 1:
            fine[key(case)] = us
    for case, us in cases:
        if case["g"] > 1 and key(case) in fine:
            ratios.setdefault(case["g"], []).append(fine[key(case)] / us)
    return [
        f"at the same K a layer's sparse attention takes {min(each):.2f} to {max(each):.2f} times as long with single "
        f"tokens as with units of {g} ({len(each)} timed cases)"
        for g, each in sorted(ratios.items())
    ]


def _layers(rows: dict[str, list[Row]]) -> Any:
    facts, prose = rows.get("eval/methods", []), rows.get("eval/prose", [])
    kinds = []
    for name, told in (("v1", "v1 (votes, budgets by layer)"), ("joint", "joint (heads share a layer's budget)")):
        cells = _facts(_of(facts, name), "p_mage", "mage_only", "method_only")
        kinds.append((told, cells, _prose(_of(prose, name), "over_mage")))
    return _compared(kinds)


def _dense(rows: dict[str, list[Row]]) -> Any:
    facts, prose = _of(rows.get("eval/methods", []), "mage"), _of(rows.get("eval/prose", []), "mage")
    kinds = []
    for count in sorted({row["dense_layers"] for row in (*facts, *prose) if row["dense_layers"] > 0}):
        cells = _facts([row for row in facts if row["dense_layers"] == count], "p_dense0", "dense0_only", "dense_only")
        other = _prose([row for row in prose if row["dense_layers"] == count], "over_dense0")
        kinds.append((f"{count} dense layer{'s' * (count > 1)} for none", cells, other))
    return _compared(kinds)


def difference(score: float, n: int, other: float, other_n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the difference of two rates of different cases (Newcombe 1998, from Wilson's)."""

    def ends(rate: float, trials: int) -> tuple[float, float]:
        zz = z * z
        centre = (rate + zz / (2 * trials)) / (1 + zz / trials)
        half = z / (1 + zz / trials) * math.sqrt(rate * (1 - rate) / trials + zz / (4 * trials * trials))
        return centre - half, centre + half

    (low, high), (other_low, other_high) = ends(score, n), ends(other, other_n)
    gap = score - other
    return (
        gap - math.sqrt((score - low) ** 2 + (other_high - other) ** 2),
        gap + math.sqrt((high - score) ** 2 + (other - other_low) ** 2),
    )


def _finetuning(rows: dict[str, list[Row]]) -> Any:
    own = [row for row in rows.get("eval/finetune", []) if row.get("weights") in ("shipped", "control", "tuned")]
    table, parts = [], []
    for (task, tokens, k, g, dense), inside in groups(
        [row for row in own if row["K"]], "task", "tokens", "K", "g", "dense_layers"
    ).items():
        by = {row["weights"]: row for row in inside}
        if not {"control", "tuned"} <= set(by):
            continue
        control, tuned = by["control"], by["tuned"]
        low, high = difference(tuned["score"], tuned["n"], control["score"], control["n"])
        place = f"{task}, {tokens} tokens, K = {k}, g = {g}, {dense} dense"
        gap = f"{_signed(100 * (tuned['score'] - control['score']), 1)} points [{100 * low:.1f}, {100 * high:.1f}]"
        parts.append(f"{place}: found {100 * tuned['score']:.1f} %, control {100 * control['score']:.1f} %, {gap}.")
        if tuned.get("check_kl") is not None and control.get("check_kl") is not None:
            parts.append(
                f"KL to exact {tuned['check_kl']:.4f} nats for {control['check_kl']:.4f}, answers under sparse "
                f"attention {tuned['check_sparse_answer']:.4f} nats for {control['check_sparse_answer']:.4f}."
            )
        shipped = f"{100 * by['shipped']['score']:.1f} %" if "shipped" in by else ""
        exact = f"{100 * tuned['exact']:.1f} %"
        table.append([place, exact, shipped, f"{100 * control['score']:.1f} %", f"{100 * tuned['score']:.1f} %", gap])
    head = ("cell", "exact", "before", "control", "tuned", "tuned - control [95 %, unpaired]")
    return (" ".join(parts), head, table) if parts else None


def _exact_p(row: Row) -> float:
    """McNemar's p of a row of eval/methods against exact on the same cases."""
    both = round(row["found_of_exact"] * row["exact"] * row["n"])
    return mcnemar(round(row["exact"] * row["n"]) - both, round(row["score"] * row["n"]) - both)


def _speed(rows: dict[str, list[Row]]) -> Any:
    timed = [row for row in rows.get("generate", []) if row["case"]["method"] == "mage"]
    if not timed:
        return None
    measured = _reliable(_of(rows.get("eval/methods", []), "mage"))
    table, backed = [], []
    cells = groups(
        [{**row, **row["case"], "share": row["case"]["K"] / row["case"]["context"]} for row in timed],
        "share",
        "g",
        "dense_layers",
    )
    for (share, g, dense), inside in sorted(cells.items()):
        behind = [
            row
            for row in measured
            if row["g"] == g and 1 / _SAME_SHARE <= row["K"] / row["prefix_tokens"] / share <= _SAME_SHARE
        ]
        ratios = [row["ratio"] for row in inside]
        told = [f"{100 * share:.2f} %", str(g), str(dense), f"{min(ratios):.2f} to {max(ratios):.2f}", str(len(inside))]
        if not behind:
            table.append([*told, "", "", "", "none measured"])
            continue
        worst = min(behind, key=lambda row: row["score"] - row["exact"])
        score = f"{100 * worst['score']:.1f} [{100 * worst['ci_low']:.1f}, {100 * worst['ci_high']:.1f}]"
        kept = all(_exact_p(row) > 0.05 for row in behind)
        if kept:
            backed.append(
                f"{100 * share:.2f} % in units of {g}, {dense} dense ({min(ratios):.2f} to {max(ratios):.2f} x)"
            )
        verdict = "no difference from exact shown" if kept else "differs from exact"
        table.append([*told, _place(worst), score, f"{100 * worst['exact']:.1f}", f"{verdict} ({len(behind)} cells)"])
    text = (
        f"Of {len(cells)} kinds of timed settings (K / context, g, dense layers) {len(backed)} have found facts behind "
    )
    text += f"them without a difference from exact shown{': ' * bool(backed)}{'; '.join(backed)}. "
    text += f"{sum(line[-1] == 'none measured' for line in table)} have none measured at that share and g. "
    text += "Accuracy is of this model at its lengths, times are of other shapes: no claim about those models' answers."
    head = (
        "K / context",
        "g",
        "dense",
        "times exact's speed",
        "timed",
        "worst cell",
        "found, % [95 %]",
        "exact, %",
        "",
    )
    return text, head, table


_QUESTIONS = {
    "recall": ("Does the first forward's list hold along the block (the paper reports recall of 84 to 90 %)?", _recall),
    "methods": ("Is MAGE better than Quest, Tidal and SparseD at every K?", _methods),
    "variants": ("Which score, rows, norm and granularity win at equal bytes and at equal time?", _variants),
    "layers": ("What do budgets by layer add?", _layers),
    "dense": ("What do dense layers add?", _dense),
    "finetuning": ("What does fine-tuning add over its control?", _finetuning),
    "speed": ("Which speed has accuracy behind it at the same share of the prefix?", _speed),
}
