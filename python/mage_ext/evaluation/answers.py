"""What evaluation files answer of the project's questions, with numbers, intervals and paired tests.

    recall        does the first forward's list hold along the block, against the 84 to 90 % of the paper
    methods       is MAGE better than Quest, Tidal and SparseD at every K, and where not
    tuned         the same with every method tuned by as many trials
    variants      which score, rows, norm and granularity win at equal bytes and at equal time
    carried       what lists kept from the block before cost
    layers        what votes with budgets by layer (MAGE v1) and budgets shared by heads ("joint") add
    dense         what dense layers add
    finetuning    what fine-tuning with sparse forwards adds over its control
    speed         which times have accuracy behind them at the same units and share of the prefix
    seeds         what exact attention finds with two training seeds of a model, where both are given

A cell is a task, length, number of forwards and setting at which exact attention finds at least 80 %, or a share masked
of held-out prose. Tests are paired by case: McNemar's exact one for found facts, for prose a normal one from the
bootstrap interval of the paired difference. Cells of facts in which no case differs are counted apart: in most of them
both find all or nothing. All cells of an answer are one family, at 5 % (Holm 1979). What holds is "better" or "worse";
the rest is "no difference shown", which is not the same as equal. With files of another training seed, a cell that is
better or worse with the first one is a "tie" where the other's gain has not the same sign.

Test: pytest tests/python/test_answers.py
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mage_ext._arguments import check_list, check_type
from mage_ext.evaluation import tuning
from mage_ext.evaluation.figures import RELIABLE, ResultFile, Row, case_of, groups, model_of
from mage_ext.evaluation.method_comparison import holm, mcnemar
from mage_ext.evaluation.needles import wilson

PAPER_RECALL = (0.84, 0.90)  # arXiv 2602.14209, its own models
_SIGNS = ("better", "no difference shown", "worse")
TIE = "tie"  # of two training seeds
NOT_MEASURED = "Not measured in these files."
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
    """A paired comparison of row with other: gain > 0 where row is better, with its 95 % interval. p: two-sided.
    alike: no case differs. other_gain: with the other training seed, where the case was measured with it."""

    row: Row
    gain: float
    low: float
    high: float
    p: float
    alike: bool = False
    sign: str = ""
    other_gain: float | None = None


_Rows = dict[str, list[Row]]  # by suite
_Kinds = list[tuple[str, list[_Cell], list[_Cell]]]  # what is compared, its cells of facts, and of prose


def answers(files: Sequence[ResultFile], other_seed: Sequence[ResultFile] = ()) -> list[Answer]:
    """One answer per question, in order; where the files have no rows for one it says so.

    Args:
        files: of `figures.read`. other_seed: of `figures.read_other_seed`; with any, the question of the two seeds is
            answered too.
    Raises:
        ValueError: rows that lack a key, naming it. TypeError: files are no list of ResultFile.
    """
    check_other_seed(files, other_seed)
    return answers_of_checked(files, other_seed)


def answers_of_checked(files: Sequence[ResultFile], other_seed: Sequence[ResultFile]) -> list[Answer]:
    """`answers` of files that `check_other_seed` has let pass."""
    rows, other = _by_suite("files", files), _by_suite("other_seed", other_seed)
    found = []
    for name, (question, find) in _QUESTIONS.items():
        try:
            answer = find(rows, other)
        except KeyError as error:
            raise ValueError(f"files: rows for the answer {name!r} must have the key {error}") from None
        text, head, table = answer if answer is not None else (NOT_MEASURED, (), [])
        found.append(Answer(name, question, text, tuple(head), table))
    if other_seed:
        try:
            found.append(_seeds(files, other_seed, found))
        except KeyError as error:
            raise ValueError(f"files: rows for the answer 'seeds' must have the key {error}") from None
    return found


def check_other_seed(files: Sequence[ResultFile], other_seed: Sequence[ResultFile]) -> None:
    """Raises ValueError, naming other_seed and the file, if rows of the other training seed lack a key that an answer
    reads. files: those of the first seed, whose times the answers take; of theirs `answers` tells."""
    timed = {name: rows for name, rows in _by_suite("files", files).items() if not name.startswith("eval/")}
    for file in other_seed:
        rows = {**timed, **_by_suite("other_seed", [file])}
        for name, (_, find) in _QUESTIONS.items():
            if not _lacks(lambda find=find: find(timed, {})):  # what they lack is not the other seed's
                _refuse(file, name, _lacks(lambda find=find, rows=rows: find(rows, {})))
        _refuse(file, "seeds", _lacks(lambda file=file: _seeds([file], [file], [])))


def _lacks(find: Callable[[], Any]) -> str:
    """The key that a question does not find in rows, "" if it finds all."""
    try:
        find()
    except KeyError as error:
        return str(error)
    return ""


def _refuse(file: ResultFile, name: str, key: str) -> None:
    if key:
        place = f"rows of {str(file.path)!r} for the answer {name!r}"
        raise ValueError(f"other_seed: {place} must have the key {key}")


def _by_suite(name: str, files: Sequence[ResultFile]) -> _Rows:
    rows: _Rows = {}
    for file in check_list("answers", name, files, "a list of ResultFile"):
        check_type("answers", name, file, ResultFile, "a list of ResultFile")
        rows.setdefault(file.name, []).extend(file.rows)
    return rows


def lines(found: Sequence[Answer]) -> list[str]:
    """The answers as lines of text."""
    return [f"{answer.question} {answer.text}" for answer in found]


# ----------------------------------------------------------------------------------------------------------------------
# Paired comparisons


def normal_p(mean: float, low: float, high: float) -> float:
    """Two-sided p of a mean against 0, from its 95 % interval, as of a normal distribution. An interval of one point,
    such as that of a single case, shows nothing: 1."""
    if high <= low:
        return 1.0
    return math.erfc(abs(mean) / ((high - low) / (2 * 1.959964)) / math.sqrt(2))


def _reliable(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["K"] and row["exact"] >= RELIABLE]


def _facts(rows: Sequence[Row], p: str, other_only: str, own_only: str) -> list[_Cell]:
    """Cells of eval/methods whose rows have a paired test; the gain is in cases, as a share."""
    cells = []
    for row in _reliable(rows):
        if row.get(p) is not None:
            own, other, n = row[own_only], row[other_only], row["n"]
            both = round(row["score"] * n) - own
            if min(both, n - both - own - other) < 0:
                told = f"{own_only} = {own} and {other_only} = {other} of {row['method']} at {_place(row)}"
                raise ValueError(f"files: {told} must fit score = {row['score']} of n = {n}")
            low, high = paired_difference(both, own, other, n - both - own - other)
            cells.append(_Cell(row, (own - other) / n, low, high, row[p], own + other == 0))
    return cells


def _prose(rows: Sequence[Row], column: str) -> list[_Cell]:
    """Cells of eval/prose; the gain is in nats saved."""
    cells = []
    for row in rows:
        if row["K"] and row.get(column) is not None:
            low, high = row[f"{column}_low"], row[f"{column}_high"]
            cells.append(_Cell(row, -row[column], -high, -low, normal_p(row[column], low, high)))
    return cells


def is_tie(gain: float, other_gain: float | None) -> bool:
    """Whether a gain has another direction with the other training seed, where None is one that was not measured."""
    return other_gain is not None and gain * other_gain <= 0


def _judged(cells: Sequence[_Cell]) -> list[_Cell]:
    """The same with signs, all of them one family."""
    held = holm([cell.p for cell in cells])

    def sign(cell: _Cell, differs: bool) -> str:
        if not differs:
            return _SIGNS[1]
        return TIE if is_tie(cell.gain, cell.other_gain) else "better" if cell.gain > 0 else "worse"

    return [dataclasses.replace(cell, sign=sign(cell, differs)) for cell, differs in zip(cells, held, strict=True)]


def _reversed(cells: Sequence[_Cell]) -> list[_Cell]:
    return [dataclasses.replace(cell, gain=-cell.gain, low=-cell.high, high=-cell.low) for cell in cells]


def _beside(cells: Sequence[_Cell], others: Sequence[_Cell]) -> list[_Cell]:
    """The cells with the gains of the other training seed's."""
    gains = {case_of(cell.row): cell.gain for cell in others}
    return [dataclasses.replace(cell, other_gain=gains.get(case_of(cell.row))) for cell in cells]


def _counts(cells: Sequence[_Cell]) -> str:
    signs = (*_SIGNS, TIE) if any(cell.sign == TIE for cell in cells) else _SIGNS
    told = [f"{sign} in {sum(cell.sign == sign for cell in cells)}" for sign in signs]
    alike = sum(cell.alike for cell in cells)
    return f"{', '.join(told)} of {len(cells)} cells{f' (in {alike} no case differs)' * bool(alike)}"


def _signed(value: float, digits: int) -> str:
    """With its sign; what rounds to 0 has "+"."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _gains(cells: Sequence[_Cell], is_prose: bool) -> str:
    """Least, mean and largest gain."""
    values = [cell.gain for cell in cells]
    unit, scale, digits = ("nats", 1.0, 3) if is_prose else ("points", 100.0, 1)
    mean, low, high = (_signed(scale * each, digits) for each in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} {unit} on average (cells from {low} to {high})"


def _place(row: Row) -> str:
    """Where a cell is."""
    told = [str(row["task"]), f"{row['tokens']} tokens"]
    if row["task"] == "prose":
        told.append(f"{100 * row['t']:.0f} % masked")
    else:
        told.append(f"T = {row['T']}")
    told += [f"K = {row['K']}", f"g = {row['g']}", f"{row['dense_layers']} dense"]
    return ", ".join(told)


def _gain(row: Row, gain: float | None, interval: tuple[float, float] | None = None) -> str:
    if gain is None:
        return ""
    unit, scale, digits = ("nats", 1.0, 4) if row["task"] == "prose" else ("points", 100.0, 1)
    told = f"{_signed(scale * gain, digits)} {unit}"
    if interval is not None:
        told += f" [{', '.join(_signed(scale * each, digits) for each in interval)}]"
    return told


def _line(cell: _Cell, name: str, with_other: bool) -> list[str]:
    row = cell.row
    share = row["K"] / (row.get("prefix_tokens") or row["tokens"])
    told = [name, _place(row), f"{100 * share:.1f} %", _gain(row, cell.gain, (cell.low, cell.high)), f"{cell.p:.2g}"]
    return [*told, *([_gain(row, cell.other_gain)] * with_other), cell.sign]


def _head(with_other: bool) -> tuple[str, ...]:
    return "compared", "cell", "K / prefix", "gain [95 %]", "p", *(["gain, other seed"] * with_other), ""


def _compared(
    find: Callable[[_Rows], _Kinds], rows: _Rows, other: _Rows
) -> tuple[str, tuple[str, ...], list[list[str]]] | None:
    """An answer of paired cells by what is compared, which `find` gives. Facts and prose are a family each. other: rows
    of another training seed, or none."""
    parts, table, ties, shared = [], [], 0, 0
    kinds, beside = find(rows), {name: cells for name, *cells in find(other)}
    for is_prose in (False, True):
        own = [
            (name, _beside(cells[is_prose], beside[name][is_prose] if name in beside else [])) for name, *cells in kinds
        ]
        judged = _judged([cell for _, cells in own for cell in cells])
        ties += sum(cell.sign == TIE for cell in judged)
        shared += sum(cell.other_gain is not None for cell in judged)
        at = 0
        for name, cells in own:
            mine = judged[at : at + len(cells)]
            at += len(cells)
            if not mine:
                continue
            what = "prose" if is_prose else "facts"
            parts.append(f"{name}, {what}: {_counts(mine)}, {_gains(mine, is_prose)}.")
            table += [_line(cell, name, bool(other)) for cell in mine]
    if not parts:
        return None
    if other:
        told = f"{shared} of {len(table)} cells were measured with the other training seed too"
        parts.append(f"{told}, which makes ties of {ties} that were better or worse.")
    return " ".join(parts), _head(bool(other)), table


def _of(rows: Sequence[Row], *methods: str) -> list[Row]:
    return [row for row in rows if row["method"] in methods]


# ----------------------------------------------------------------------------------------------------------------------
# The questions


def _recall(rows: _Rows, other: _Rows) -> Any:
    own, beside = (
        [row for row in part.get("eval/recall", []) if row["study"] == "recall" and row["method"] == "mage"]
        for part in (rows, other)
    )
    theirs = {case_of(row): row for row in beside}
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
        told += [_interval(row), place]
        told += [f"{100 * least:.1f}", f"{100 * row['recall_worst_layer']:.1f}", f"{100 * row['kept']:.1f}"]
        if other:
            told.append(_interval(theirs[case_of(row)]) if case_of(row) in theirs else "")
        table.append([*told, "; ".join(controls.get(key, []))])
    scores = [100 * row["score"] for row in own]
    counted = ", ".join(f"{places.count(each)} {each}" for each in dict.fromkeys(places))
    text = f"Recall is {min(scores):.1f} to {max(scores):.1f} % over {len(own)} cells (task, length, K, g); against "
    text += f"{100 * low:.0f} to {100 * high:.0f} % their 95 % intervals are: {counted}. "
    text += f"Mass kept of what each forward's own list keeps: at least {100 * min(r['kept'] for r in own):.1f} %."
    both = [(row["score"], theirs[case_of(row)]["score"]) for row in own if case_of(row) in theirs]
    if both:
        text += f" With the other training seed, in {len(both)} of the cells: {_range([each[1] for each in both])} %, "
        text += f"with the first {_range([each[0] for each in both])} % there."
    for (weights,), inside in staged.items():
        shown = ", ".join(f"{row['task']} K = {row['K']} {100 * row['score']:.1f} %" for row in inside)
        text += f" Earlier weights {weights}: {shown}."
    head = ("task", "tokens", "K (chance)", "g", "recall, % [95 %]", f"{low:.2f}-{high:.2f}", "least forward")
    head = (*head, "worst layer", "kept / own", *(["other seed's recall"] * bool(other)), "controls")
    return text, head, table


def _interval(row: Row) -> str:
    """A row's score with its interval, in percent."""
    return f"{100 * row['score']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _range(shares: Sequence[float]) -> str:
    return f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"


def _of_methods(rows: _Rows) -> _Kinds:
    facts, prose = rows.get("eval/methods", []), rows.get("eval/prose", [])
    kinds = []
    for name in _OTHERS:
        cells = _reversed(_facts(_of(facts, name), "p_mage", "mage_only", "method_only"))
        kinds.append((f"MAGE against {name}", cells, _reversed(_prose(_of(prose, name), "over_mage"))))
    return kinds


def _methods(rows: _Rows, other: _Rows) -> Any:
    found = _compared(_of_methods, rows, other)
    if found is None:
        return None
    text, head, table = found
    worse = [line for line in table if line[-1] == "worse"]
    if worse:
        ks = sorted({part for line in worse for part in line[1].split(", ") if part.startswith("K = ")}, key=_number)
        text += f" Not better everywhere: worse at {', '.join(ks)}, in cells that the table names."
    else:
        text += " Worse nowhere."
    return text + _best_units(rows.get("eval/methods", [])), head, table


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


def _of_variants(rows: _Rows) -> _Kinds:
    names = {
        "mage_max": "score: largest row for mean",
        "mage_open": "rows: open ones for all",
        "mage_prefix": "norm: prefix for context",
        "two_level": "candidates: single tokens in two levels for one",
    }
    kinds = _against_mage(rows, names)
    own = _of(rows.get("eval/methods", []), "mage"), _of(rows.get("eval/prose", []), "mage")
    for g in sorted({row["g"] for part in own for row in part if row["g"] > 1}):
        cells = _facts([row for row in own[0] if row["g"] == g], "p_g1", "g1_only", "units_only")
        kinds.append(
            (f"units of {g} for 1, equal bytes", cells, _prose([row for row in own[1] if row["g"] == g], "over_g1"))
        )
    return kinds


def _variants(rows: _Rows, other: _Rows) -> Any:
    found = _compared(_of_variants, rows, other)
    text, head, table = found if found is not None else ("", _head(bool(other)), [])
    times = _unit_times(rows)
    if times:
        text += " Equal time: " + "; ".join(times) + "."
    return (text.strip(), head, table) if text else None


def _unit_times(rows: _Rows) -> list[str]:
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


def _against_mage(rows: _Rows, names: dict[str, str]) -> _Kinds:
    """Methods that are compared with MAGE, and what to call each."""
    facts, prose = rows.get("eval/methods", []), rows.get("eval/prose", [])
    return [
        (
            told,
            _facts(_of(facts, name), "p_mage", "mage_only", "method_only"),
            _prose(_of(prose, name), "over_mage"),
        )
        for name, told in names.items()
    ]


def _of_carried(rows: _Rows) -> _Kinds:
    return _against_mage(rows, {"carry": "lists kept for every second block, for lists of its own"})


def _carried(rows: _Rows, other: _Rows) -> Any:
    return _compared(_of_carried, rows, other)


def _of_layers(rows: _Rows) -> _Kinds:
    names = {"v1": "v1 (votes and budgets by layer together)", "joint": "joint (heads share a layer's budget)"}
    return _against_mage(rows, names)


def _layers(rows: _Rows, other: _Rows) -> Any:
    return _compared(_of_layers, rows, other)


def _of_dense(rows: _Rows) -> _Kinds:
    facts, prose = _of(rows.get("eval/methods", []), "mage"), _of(rows.get("eval/prose", []), "mage")
    kinds = []
    for count in sorted({row["dense_layers"] for row in (*facts, *prose) if row["dense_layers"] > 0}):
        cells = _facts([row for row in facts if row["dense_layers"] == count], "p_dense0", "dense0_only", "dense_only")
        other = _prose([row for row in prose if row["dense_layers"] == count], "over_dense0")
        kinds.append((f"{count} dense layer{'s' * (count > 1)} for none", cells, other))
    return kinds


def _dense(rows: _Rows, other: _Rows) -> Any:
    return _compared(_of_dense, rows, other)


def difference(score: float, n: int, other: float, other_n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the difference of two rates of different cases (Newcombe 1998, from Wilson's)."""
    (low, high), (other_low, other_high) = wilson(score * n, n, z), wilson(other * other_n, other_n, z)
    gap = score - other
    return (
        gap - math.sqrt((score - low) ** 2 + (other_high - other) ** 2),
        gap + math.sqrt((high - score) ** 2 + (other - other_low) ** 2),
    )


def paired_difference(both: int, one_only: int, other_only: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two rates of the same cases (Newcombe 1998, method 10).

    Args:
        both, one_only, other_only, neither: cases that both rates count, the first alone, the second alone, and none.
    """
    n = both + one_only + other_only + neither
    one, other = (both + one_only) / n, (both + other_only) / n
    (low, high), (other_low, other_high) = wilson(both + one_only, n), wilson(both + other_only, n)
    sides = (both + one_only) * (other_only + neither) * (both + other_only) * (one_only + neither)
    cross = both * neither - one_only * other_only
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(sides) if sides else 0.0

    def half(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return one - other - half(one - low, other_high - other), one - other + half(high - one, other - other_low)


def _finetuning(rows: _Rows, other: _Rows) -> Any:
    own = [row for row in rows.get("eval/finetune", []) if row.get("weights") in ("shipped", "control", "tuned")]
    pairs, cells = [], []
    for by in (
        {row["weights"]: row for row in inside}
        for inside in groups([row for row in own if row["K"]], "task", "tokens", "K", "g", "dense_layers").values()
    ):
        if {"control", "tuned"} <= set(by):
            pairs.append(by)
            if by["control"]["exact"] >= RELIABLE:
                cells += _facts([by["tuned"]], "p_control", "control_only", "tuned_only")
    if not pairs:
        return None
    judged = {id(cell.row): cell for cell in _judged(cells)}
    parts, table = [], []
    if judged:
        found = list(judged.values())
        parts.append(f"Tuned against control, facts: {_counts(found)}, {_gains(found, False)}.")
    for by in pairs:
        control, tuned = by["control"], by["tuned"]
        place = f"{tuned['task']}, {tuned['tokens']} tokens, K = {tuned['K']}, g = {tuned['g']}, "
        place += f"{tuned['dense_layers']} dense"
        if tuned.get("p_control") is not None:
            counts = tuned["tuned_only"], tuned["control_only"]
            both = round(tuned["score"] * tuned["n"]) - counts[0]
            low, high = paired_difference(both, *counts, tuned["n"] - both - sum(counts))
        else:
            low, high = difference(tuned["score"], tuned["n"], control["score"], control["n"])
        gap = f"{_signed(100 * (tuned['score'] - control['score']), 1)} points [{100 * low:.1f}, {100 * high:.1f}]"
        cell = judged.get(id(tuned))
        p, sign = (f"{cell.p:.2g}", cell.sign) if cell is not None else ("", "")
        scores = f"found {100 * tuned['score']:.1f} %, control {100 * control['score']:.1f} %"
        shipped = f"{100 * by['shipped']['score']:.1f} %" if "shipped" in by else ""
        scores += f", before {shipped}" * bool(shipped)
        parts.append(f"{place}: {scores}, {gap}{f', {sign}' * bool(sign)}.")
        exact = " / ".join(f"{100 * by[name]['exact']:.1f}" for name in ("shipped", "control", "tuned") if name in by)
        told = [place, exact, shipped, f"{100 * control['score']:.1f} %", f"{100 * tuned['score']:.1f} %", gap, p]
        table.append([*told, sign if p else "unpaired" if "p_control" not in tuned else "exact below 80 %"])
    logs = [
        f"KL to exact {tuned['check_kl']:.4f} nats for {control['check_kl']:.4f}, answers under sparse "
        f"attention {tuned['check_sparse_answer']:.4f} nats for {control['check_sparse_answer']:.4f}"
        f"{_steps(tuned, control)}."
        for tuned, control in ((by["tuned"], by["control"]) for by in pairs)
        if tuned.get("check_kl") is not None and control.get("check_kl") is not None
    ]
    parts += dict.fromkeys(logs)  # the same in every cell of the runs' own setting
    head = ("cell", "exact, %", "before", "control", "tuned", "tuned - control [95 %]", "p", "")
    return " ".join(parts), head, table


def _steps(tuned: Row, control: Row) -> str:
    if tuned.get("steps") is None or control.get("steps") is None:
        return ""
    return f" (after {tuned['steps']} and {control['steps']} steps)"


def _exact_p(row: Row) -> float:
    """McNemar's p of a row of eval/methods against exact on the same cases."""
    both = round(row["found_of_exact"] * row["exact"] * row["n"])
    return mcnemar(round(row["exact"] * row["n"]) - both, round(row["score"] * row["n"]) - both)


def _speed(rows: _Rows, other: _Rows) -> Any:
    timed = [row for row in rows.get("generate", []) if row["case"]["method"] == "mage"]
    if not timed:
        return None
    measured, beside = (_reliable(_of(part.get("eval/methods", []), "mage")) for part in (rows, other))
    found_at, timed_at = set(), {row["case"]["T"] for row in timed if row["case"].get("T")}
    places = {
        id(row): f"{_place(row)}{', other training seed' * (part is beside)}"
        for part in (measured, beside)
        for row in part
    }
    table, backed, nearly = [], [], []
    cells = groups(
        [{**row, **row["case"], "share": row["case"]["K"] / row["case"]["context"]} for row in timed],
        "share",
        "g",
        "dense_layers",
    )
    for (share, g, dense), inside in sorted(cells.items()):
        at_share = [
            row
            for row in (*measured, *beside)
            if row["g"] == g and 1 / _SAME_SHARE <= row["K"] / row["prefix_tokens"] / share <= _SAME_SHARE
        ]
        # Without facts at that number of dense layers, those at others are told, and count for nothing.
        behind = [row for row in at_share if row["dense_layers"] == dense] or at_share
        found_at |= {row["T"] for row in behind}
        ratios = [row["ratio"] for row in inside]
        told = [f"{100 * share:.2f} %", str(g), str(dense), f"{min(ratios):.2f} to {max(ratios):.2f}", str(len(inside))]
        if not behind:
            table.append([*told, "", "", "", "none measured"])
            continue
        worst = min(behind, key=lambda row: row["score"] - row["exact"])
        kept = not any(row["score"] < row["exact"] and _exact_p(row) <= 0.05 for row in behind)
        same = worst["dense_layers"] == dense
        if kept:
            (backed if same else nearly).append(
                f"{100 * share:.2f} % in units of {g}, {dense} dense ({min(ratios):.2f} to {max(ratios):.2f} x)"
            )
        verdict = "no loss against exact shown" if kept else "less than exact"
        table.append(
            [
                *told,
                places[id(worst)],
                _interval(worst),
                f"{100 * worst['exact']:.1f}",
                f"{verdict} ({len(behind)} cells{'' if same else ', none with as many dense layers'})",
            ]
        )
    text = (
        f"Of {len(cells)} kinds of timed settings (K / context, g, dense layers) {len(backed)} have found facts behind "
    )
    text += f"them without a loss against exact shown{': ' * bool(backed)}{'; '.join(backed)}. "
    if nearly:
        text += f"{len(nearly)} have such facts with another number of dense layers alone: {'; '.join(nearly)}. "
    text += f"{sum(line[-1] == 'none measured' for line in table)} have none measured at that share and g. "
    if found_at and timed_at:
        text += f"Facts are of T = {_listed(found_at)}, times of T = {_listed(timed_at)}. "
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


def _seeds(files: Sequence[ResultFile], other_seed: Sequence[ResultFile], found: Sequence[Answer]) -> Answer:
    """What exact attention finds with either training seed, and how many comparisons of the answers are ties."""
    question = "Do two training seeds of the model agree?"
    names = [str(model_of(part)) for part in (files, other_seed)]
    cells: dict[str, list[Row | None]] = {}
    for number, part in enumerate((files, other_seed)):
        for file in part:
            for row in file.rows:
                if file.name == "eval/methods" and not row["K"]:
                    cells.setdefault(case_of(row), [None, None])[number] = row
    table, told = [], []
    for both in cells.values():
        row = both[0] if both[0] is not None else both[1]
        scores = ["" if each is None else f"{_interval(each)} ({each['n']})" for each in both]
        place = f"{row['task']}, {row['tokens']} tokens, T = {row['T']}"
        table.append([place, *scores])
        if all(scores):
            told.append(f"{place} {scores[0]} and {scores[1]}")
    text = f"Exact attention finds with {names[0]} and {names[1]}, % [95 %] (n): {'; '.join(told)}. "
    if not told:
        text = f"No cell of exact attention is of both {names[0]} and {names[1]}. "
    ties = [sum(line[-1] == TIE for line in answer.rows) for answer in found]
    places = [f"{count} of {answer.name}" for count, answer in zip(ties, found, strict=True) if count]
    text += "Comparisons that are better or worse with the first and have another direction with the other are ties: "
    text += f"{sum(ties)}{': ' * bool(places)}{', '.join(places)}."
    commits = [
        sorted({str(file.head.get("commit")) for file in part if "model" in file.head}) for part in (files, other_seed)
    ]
    text += f" Commits: {', '.join(commits[0])} and {', '.join(commits[1])}."
    return Answer("seeds", question, text, ("exact attention", *(f"{name}, % [95 %] (n)" for name in names)), table)


_QUESTIONS = {
    "recall": ("Does the first forward's list hold along the block (the paper reports recall of 84 to 90 %)?", _recall),
    "methods": ("Is MAGE better than Quest, Tidal and SparseD at every K?", _methods),
    "tuned": ("And with all of them tuned?", lambda rows, other: tuning.answer(rows, other, _methods)),
    "variants": ("Which score, rows, norm and granularity win at equal bytes and at equal time?", _variants),
    "carried": ("What do lists kept from the block before cost?", _carried),
    "layers": ("What do budgets by layer add, with votes or with heads that share them?", _layers),
    "dense": ("What do dense layers add?", _dense),
    "finetuning": ("What does fine-tuning add over its control?", _finetuning),
    "speed": ("Which speed has accuracy behind it at the same share of the prefix?", _speed),
}
