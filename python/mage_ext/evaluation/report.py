"""Evaluation files as one HTML report: what ran, answers, tables, figures, the model's card. All it needs is a browser.

A score stands beside exact attention's on the same cases, with its 95 % interval and K as a share of the prefix. Where
exact is below 80 % a cell is grey, since a method can't be judged there. A mark says that a method differs from MAGE at
the same setting by McNemar's exact test, at 5 % for all comparisons of its file together (Holm 1979). Where another
training seed is given, a difference that has not the same direction there is marked as a tie.

Test: pytest tests/python/test_report.py
"""

import base64
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mage_ext.evaluation import figures, pages
from mage_ext.evaluation.answers import NOT_MEASURED, Answer, answers_of_checked, check_other_seed, is_tie
from mage_ext.evaluation.figures import RELIABLE, ResultFile, Row, case_of, groups, model_of, of_method
from mage_ext.evaluation.method_comparison import holm
from mage_ext.evaluation.needles import wilson
from mage_ext.models import builtin

_TITLES = {
    "eval/needles": "Hidden facts: the gates of a shipped model",
    "eval/methods": "Methods at equal K",
    "eval/tuned": "Methods at equal K, tuned by as many trials",
    "eval/heatmap": "Hidden facts by length and depth",
    "eval/thresholds": "Forwards and accuracy against the sampler's threshold",
    "eval/prose": "Held-out prose: cross entropy on given blocks",
    "eval/finetune": "Fine-tuning with sparse forwards and its control",
    "eval/recall": "How far a block's first forward foretells the later ones",
    "eval/longbench": "LongBench",
    "eval/ruler": "RULER",
    "generate": "Times of whole generations",
}
_LONG = 12  # rows of a table that has none of its own are shown whole up to here


def report(files: Sequence[ResultFile], card: str | None = None, other_seed: Sequence[ResultFile] = ()) -> str:
    """The report of a run as an HTML document.

    Args:
        files: of `figures.read`, at least one. card: text of the model's card; None: that of the model where it is
            shipped, else none. other_seed: of `figures.read_other_seed`, for the answers and the marks.
    Raises:
        ValueError: no file, none that answers a question or is of an evaluation, or rows that lack a key, naming it.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not files:
        raise ValueError("report: files must be at least one, got none")
    check_other_seed(files, other_seed)
    for file in other_seed:
        try:
            _section(file, [])
        except ValueError as error:
            raise ValueError(str(error).replace("files: ", "other_seed: ", 1)) from None
    model = model_of(files)
    if card is None and model in builtin.names():
        card = builtin.model_card(model)
    ordered = sorted(files, key=lambda file: list(_TITLES).index(file.name) if file.name in _TITLES else len(_TITLES))
    body = [
        f"<h1>Evaluation of {pages.escape(model or 'a run')}</h1>",
        _contents(ordered, card),
    ]
    top = len(body)
    ran = [*ordered, *other_seed]
    legend = _LEGEND + (_TIE_LEGEND if other_seed else "")
    body += [f"<details><summary>What ran: {len(ran)} files</summary>{_runs(ran)}</details>", legend]
    drawn = {name: [] for name in dict.fromkeys(file.name for file in ordered)}
    for drawing in figures.drawings(ordered):
        image = base64.b64encode(figures.png(drawing.draw())).decode("ascii")
        title = pages.escape(drawing.title)
        drawn[drawing.suite].append(
            f'<figure><img alt="{title}" src="data:image/png;base64,{image}"><figcaption>{title}</figcaption></figure>'
        )
    for name, pictures in drawn.items():
        body.append(f'<h2 id="{_anchor(name)}">{pages.escape(_TITLES.get(name, name))}</h2>')
        body += pictures
        for file in ordered:
            if file.name == name:
                body.append(_section(file, [row for each in other_seed if each.name == name for row in each.rows]))
    found = answers_of_checked(ordered, other_seed)  # made last: a missing key is named with its file before
    own = [file for file in files if file.name in _TITLES or file.name.startswith("eval/")]
    if not own and all(each.text == NOT_MEASURED for each in found):
        names = ", ".join(dict.fromkeys(file.name for file in files))
        raise ValueError(f"files: must answer a question or be of an evaluation, got {names} alone")
    body.insert(top, "".join(f"<p><b>{pages.escape(line)}</b></p>\n" for line in figures.incomplete(ran)))
    body.insert(top + 1, _answers(found))
    if card is not None:
        lines = "\n".join(pages.escape(each) for each in card.splitlines())
        body.append(f'<h2 id="card">The model\'s card</h2>\n<pre class="card">{lines}</pre>')
    return pages.page(f"Evaluation of {model or 'a run'}", "\n".join(body), style=_STYLE)


def _anchor(name: str) -> str:
    return "suite-" + "".join(c if c.isalnum() else "-" for c in name)


def _runs(files: Sequence[ResultFile]) -> str:
    """What ran, file by file: the heads, and what all rows have in common."""
    keys = list(dict.fromkeys(key for file in files for key in file.head))
    lines = []
    for file in files:
        common = ", ".join(f"{key} {_plain(value)}" for key, value in _constants(file.rows).items())
        lines.append([file.path.name, *(_plain(file.head.get(key)) for key in keys), str(len(file.rows)), common])
    return _table(["file", *keys, "rows", "the same in all rows"], lines, "run")


def _constants(rows: Sequence[Row]) -> Row:
    """What all rows say alike, among what describes a case."""
    told = (
        "task",
        "sampler",
        "tokens_per_step",
        "T",
        "tokens",
        "distractors",
        "control",
        "dense_layers",
        "g",
        "K",
        "n",
    )
    found = {}
    for key in told:
        values = [row[key] for row in rows if key in row and (row.get("K") or key not in ("dense_layers", "g", "K"))]
        if values and all(value == values[0] for value in values) and values[0] is not None:
            found[key] = values[0]
    return found


def _contents(files: Sequence[ResultFile], card: str | None) -> str:
    links = {"answers": "Answers"}
    links |= {_anchor(file.name): _TITLES.get(file.name, file.name) for file in files}
    links |= {} if card is None else {"card": "The model's card"}
    return "<p>" + " · ".join(f'<a href="#{name}">{pages.escape(text)}</a>' for name, text in links.items()) + "</p>"


def _answers(found: Sequence[Answer]) -> str:
    """The questions with their answers, and behind each, folded, the cells it is made of."""
    short = _table(["question", "answer"], [[each.question, each.text] for each in found], "answers")
    behind = [
        f"<details><summary>{pages.escape(each.question)} {len(each.rows)} cells</summary>"
        f"{_table(each.head, each.rows)}</details>"
        for each in found
        if each.rows
    ]
    return "\n".join(['<h2 id="answers">Answers</h2>', _ANSWERS_LEGEND, short, *behind])


def _section(file: ResultFile, other: Sequence[Row]) -> str:
    """The tables of a file. other: rows of its suite with another training seed."""
    make = _TABLES.get(file.name, _any_rows)
    try:
        tables = make(file.rows, other) if make in _MARKED else make(file.rows)
    except KeyError as error:
        raise ValueError(f"files: rows of {file.path.name} must have the key {error} of {file.name}") from None
    return f'<p class="dim">{pages.escape(file.path.name)}</p>\n' + "\n".join(tables)


# ----------------------------------------------------------------------------------------------------------------------
# Cells


class _Cell(str):
    """A cell that is HTML already; whoever made it has escaped what it quotes."""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _plain(value: Any) -> str:
    """A value of a row as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _interval(row: Row, key: str, low: str, high: str, text: Callable[[float], str]) -> str:
    """HTML of a value with its interval."""
    return f"{text(row[key])} <small>[{text(row[low])}, {text(row[high])}]</small>"


def score_cell(row: Row, mark: str = "") -> _Cell:
    """A cell: score with its interval, in percent; grey where exact is below RELIABLE.

    Args:
        row: of an evaluation file, with score, exact, ci_low and ci_high. mark: "" or of `marks`.
    """
    told = f"{row['method']} {_percent(row['score'])} %, exact {_percent(row['exact'])} % on the same {row['n']} cases"
    if row.get("kv_share") is not None:
        told += f", K/V read {_percent(row['kv_share'])} %"
    if mark:
        told += f", MAGE alone found {row['mage_only']}, this one alone {row['method_only']}"
    classes = "score grey" if row["exact"] < RELIABLE else "score"
    text = _interval(row, "score", "ci_low", "ci_high", _percent)
    sign = {"": "", "-": ' <b class="below">\u2212</b>', "+": ' <b class="above">+</b>', "=": " <b>=</b>"}[mark]
    return _Cell(f'<td class="{classes}" title="{pages.escape(told)}">{text}{sign}</td>')


def marks(rows: Sequence[Row], other: Sequence[Row] = ()) -> tuple[dict[int, str], int]:
    """Which rows differ from MAGE's at the same setting: id of the row -> "-", "+" or "="; and the size of the family.

    Args:
        rows: those with p_mage are tested, all of them together (Holm, 5 %). other: the same suite's with another
            training seed; "=" is a difference that has not the same direction there, of the cells where exact
            attention can be judged.
    """
    gain = lambda row: row["method_only"] - row["mage_only"]  # noqa: E731
    others = {case_of(row): gain(row) for row in other if row.get("p_mage") is not None and row["exact"] >= RELIABLE}
    tested = [row for row in rows if row.get("p_mage") is not None]
    held = holm([row["p_mage"] for row in tested])
    signs = {
        id(row): "=" if is_tie(gain(row), others.get(case_of(row))) else "-" if gain(row) < 0 else "+"
        for row, differs in zip(tested, held, strict=True)
        if differs
    }
    return signs, len(tested)


def _cell(text: str) -> str:
    return text if isinstance(text, _Cell) else f"<td>{pages.escape(text)}</td>"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "", caption: str = "") -> str:
    """A table. Cells are text, or `_Cell`s."""
    top = "".join(f"<th>{pages.escape(text)}</th>" for text in head)
    body = "\n".join(
        "<tr>" + "".join(_cell(text) for _, text in zip(head, line, strict=True)) + "</tr>" for line in lines
    )
    above = f"<caption>{pages.escape(caption)}</caption>" if caption else ""
    inner = f"{above}<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{inner}</table></div>'


def _budget(row: Row) -> str:
    """K and, where the prefix is known, its share of it."""
    prefix = row.get("prefix_tokens") or row.get("tokens")
    share = row["K"] / prefix if prefix else row.get("K_share")
    return f"{row['K']}" + (f" ({100 * share:.1f} %)" if share else "")


def _exact_cell(row: Row, exact: Sequence[Row]) -> _Cell:
    """Exact's cell on a row's cases: from exact's own row, or, where that is of more cases, from the row's."""
    for each in exact:
        if each["n"] == row["n"] and each["score"] == row["exact"]:
            return score_cell(each)
    low, high = wilson(row["exact"] * row["n"], row["n"])
    return score_cell({**row, "method": "exact", "score": row["exact"], "ci_low": low, "ci_high": high, "kv_share": 1})


# ----------------------------------------------------------------------------------------------------------------------
# Tables of the suites


def _score_tables(rows: Sequence[Row], other: Sequence[Row], *, by: Sequence[str], across: str = "K") -> list[str]:
    """Tables of scores: one per combination of `by`, a line per value of `across`, a column per method."""
    signs, family = marks(rows, other)
    tables = []
    for values, inside in groups([row for row in rows if row["K"]], *by).items():
        told = dict(zip(by, values, strict=True))
        # Exact rows have no K, g and dense layers of their own.
        same = [key for key in by if key not in ("K", "g", "dense_layers")]
        exact = [row for row in rows if not row["K"] and all(row.get(key) == told[key] for key in same)]
        methods = list(of_method(inside))
        has_recall = any(row.get("recall") is not None for row in inside)
        lines = []
        for (value,), at in groups(inside, across).items():
            found = {row["method"]: row for row in at}
            here = [row for row in exact if across == "K" or row.get(across) == value]
            line = [_budget(at[0]) if across == "K" else _plain(value), _exact_cell(at[0], here)]
            line += [
                score_cell(found[name], signs.get(id(found[name]), "")) if name in found else "" for name in methods
            ]
            if has_recall:
                line.append(_percent(found.get("mage", {}).get("recall")))
            lines.append(line)
        caption = ", ".join(
            f"{key.replace('_', ' ')} {_plain(value)}" for key, value in told.items() if value is not None
        )
        caption += f"; n = {inside[0]['n']}; % of the cases [95 % interval]"
        if family:
            caption += f"; \u2212 and +: differs from MAGE, {family} comparisons together"
            caption += "; =: not with the other training seed" * bool(other)
        head = ["K (of the prefix)" if across == "K" else across, "exact", *methods, *(["recall, %"] * has_recall)]
        tables.append(_table(head, lines, "scores", caption))
    return tables


def _needles(rows: Sequence[Row]) -> list[str]:
    """A line per row: samplers and tasks differ from row to row."""
    lines = []
    for row in rows:
        setting = (
            ["exact", "", ""] if not row["K"] else [row["method"], _budget(row), f"{row['g']}, {row['dense_layers']}"]
        )
        line = [row["task"], str(row["tokens"]), str(row["distractors"]), row["sampler"], *setting, score_cell(row)]
        lines.append([*line, _percent(row["exact"]), _percent(row["found_of_exact"]), _percent(row["kv_share"])])
    head = ["task", "tokens", "distractors", "sampler", "method", "K (of the prefix)", "g, dense layers"]
    head += ["found, % [95 % interval]", "exact, %", "found of what exact finds, %", "K/V read, %"]
    return [_table(head, lines, "scores", f"n = {rows[0]['n']} cases a line" if rows else "")]


def _methods(rows: Sequence[Row], other: Sequence[Row]) -> list[str]:
    return _score_tables(rows, other, by=("task", "tokens", "tokens_per_step", "dense_layers", "g"))


def _heatmap(rows: Sequence[Row], other: Sequence[Row]) -> list[str]:
    by = ("tokens", "K", "g", "dense_layers")
    return _score_tables(rows, other, by=by, across="depth")


def _thresholds(rows: Sequence[Row], other: Sequence[Row]) -> list[str]:
    tables = _score_tables(rows, other, by=("task", "tokens", "K", "g", "dense_layers"), across="threshold")
    lines = []
    for row in rows:
        if row["K"]:
            keys = ("forwards_ratio", "forwards_ratio_low", "forwards_ratio_high")
            ratio = _Cell(f"<td>{_interval(row, *keys, lambda value: f'{value:.3f}')}</td>")
            told = [row["task"], str(row["tokens"]), row["method"], _budget(row)]
            told += [f"{row['g']}, {row['dense_layers']}", _plain(row["threshold"])]
            lines.append([*told, f"{row['forwards']:.2f}", f"{row['exact_forwards']:.2f}", ratio])
    head = ["task", "tokens", "method", "K (of the prefix)", "g, dense layers", "threshold"]
    head += ["forwards", "of exact", "ratio"]
    return [*tables, _table(head, lines, "", "Forwards per answer, commits included; ratio [95 % interval]")]


def _benchmark(rows: Sequence[Row]) -> list[str]:
    """LongBench's and RULER's scores times 100, a line per row. Metrics that are no rates are never grey."""
    lines = []
    for row in rows:
        if not row["K"]:
            continue
        low, high = 100 * row["diff_low"], 100 * row["diff_high"]
        told = [row["task"], row["method"], _budget(row), f"{row['g']}, {row['dense_layers']}", str(row["n"])]
        score = _Cell(f"<td>{_interval(row, 'score', 'ci_low', 'ci_high', _percent)}</td>")
        told += [f"{row['prompt_tokens']:.0f}", _percent(row["sparse_items"]), score, _percent(row["exact"])]
        lines.append([*told, f"{100 * (row['score'] - row['exact']):.1f} [{low:.1f}, {high:.1f}]"])
    head = ["task", "method", "K (of the prefix)", "g, dense layers", "n", "tokens", "longer than K, %", "score"]
    return [_table([*head, "exact's", "difference"], lines, "scores", "Scores times 100 [95 % interval]")]


def _prose(rows: Sequence[Row]) -> list[str]:
    """Cross entropy minus exact's, KL and agreement: a table per length, dense layers, g and masked share."""
    tables = []
    nats = lambda value: f"{value:.4f}"  # noqa: E731
    for (tokens, dense, g, share), inside in groups(
        [row for row in rows if row["K"]], "tokens", "dense_layers", "g", "t"
    ).items():
        lines = []
        for row in sorted(inside, key=lambda row: row["K"]):
            cells = [
                _Cell(f"<td>{_interval(row, key, f'{key}_low', f'{key}_high', text)}</td>")
                for key, text in (("delta", nats), ("kl", nats), ("agreement", _percent))
            ]
            lines.append([_budget(row), row["method"], nats(row["score"]), nats(row["exact"]), *cells])
        head = [
            "K (of the prefix)",
            "method",
            "cross entropy",
            "exact's",
            "difference, nats",
            "KL, nats",
            "agreement, %",
        ]
        caption = (
            f"{tokens} tokens before the block, {100 * share:.0f} % masked, g = {g}, dense layers {dense}; "
            f"n = {inside[0]['n']} contexts; [95 % interval]"
        )
        tables.append(_folded(_table(head, lines, "", caption), len(lines)))
    return tables


def _recall(rows: Sequence[Row]) -> list[str]:
    tables = []
    recalls = [row for row in rows if row["study"] == "recall"]
    for (task, tokens, control, g, weights), inside in groups(
        recalls, "task", "tokens", "control", "g", "weights"
    ).items():
        lines = []
        for row in sorted(inside, key=lambda row: row["K"]):
            recall = _Cell(f"<td>{_interval(row, 'score', 'ci_low', 'ci_high', _percent)}</td>")
            own = (
                "exact",
                "chance",
                "recall_worst_layer",
                "recall_p5",
                "kept",
                "kept_worst_layer",
                "kept_mass",
                "own_mass",
            )
            lines.append([_budget(row), row["method"], recall, *(_percent(row[key]) for key in own)])
        head = [
            "K (of the prefix)",
            "method",
            "recall [95 % interval]",
            "oracle's",
            "chance",
            "worst layer",
            "5th percentile",
        ]
        head += ["kept / own list's", "worst layer", "kept mass", "own list's mass"]
        caption = f"{task}, {tokens} tokens, g = {g}, control {control}, n = {inside[0]['n']} contexts; all in %"
        caption += f"; earlier weights {weights}" if weights else ""
        tables.append(_table(head, lines, "", caption))
    others = [row for row in rows if row["study"] != "recall" and not row.get("weights")]
    if others:
        lines = []
        for row in others:
            told = [row["study"], row["task"], str(row["tokens"]), row["control"], row["method"]]
            values = [row.get("K", row.get("p")), row["score"]]
            values += [row.get(key) for key in ("next_block", "other_text", "spearman_contexts")]
            lines.append([*told, *map(_plain, values)])
        head = ["study", "task", "tokens", "control", "measure", "K or p", "score", "next block", "other text"]
        caption = "alignment: mean cosine with the first forward; budget: mean rank correlation over layers with it"
        tables.append(_table([*head, "of single contexts"], lines, "", caption))
    return tables


def _finetune(rows: Sequence[Row]) -> list[str]:
    """A line per cell and weights; what else the rows hold, such as times of steps, as in suites without a table."""
    scored = [row for row in rows if "score" in row]
    tables = []
    for (task, tokens), inside in groups(scored, "task", "tokens").items():
        lines = []
        for row in inside:
            if not row["K"]:
                continue
            line = [_budget(row), f"{row['g']}, {row['dense_layers']}", row["weights"], score_cell(row)]
            line += [
                _percent(row["exact"]),
                *(_plain(row.get(key)) for key in ("control_only", "tuned_only", "p_control")),
            ]
            lines.append([*line, *(_plain(row.get(key)) for key in ("steps", "check_kl", "check_sparse_answer"))])
        head = ["K (of the prefix)", "g, dense layers", "weights", "found, % [95 % interval]", "exact, %"]
        head += ["control alone", "tuned alone", "p", "steps", "KL to exact, nats", "answers, nats"]
        caption = f"{task}, {tokens} tokens; n = {inside[0]['n']}; KL and answers under sparse attention: held-out rows"
        tables.append(_table(head, lines, "scores", caption))
    others = [row for row in rows if "score" not in row]
    return [*tables, *(_any_rows(others) if others else [])]


def _generate(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        case = row["case"]
        told = [str(case[key]) for key in ("model", "batch", "context", "T", "method")]
        told += [_plain(case.get(key)) for key in ("K", "g", "dense_layers")]
        lines.append([*told, f"{row['us'] / 1e3:.2f}", _plain(row.get("peer")), _plain(row.get("ratio"))])
    head = ["model", "batch", "context", "T", "method", "K", "g", "dense layers", "ms per block", "peer", "peer / it"]
    return [_folded(_table(head, lines), len(lines))]


def _any_rows(rows: Sequence[Row]) -> list[str]:
    """Rows of a suite that has no table of its own: every plain value."""
    flat = [{**{k: v for k, v in row.items() if k != "case"}, **row.get("case", {})} for row in rows]
    plain = (str, int, float, bool, type(None))
    keys = [k for k in dict.fromkeys(k for row in flat for k in row) if all(isinstance(r.get(k), plain) for r in flat)]
    return [_folded(_table(keys, [[_plain(row.get(key)) for key in keys] for row in flat]), len(flat))]


def _folded(table: str, num_lines: int) -> str:
    return table if num_lines <= _LONG else f"<details><summary>{num_lines} rows</summary>{table}</details>"


_TABLES: dict[str, Callable[..., list[str]]] = {
    "eval/needles": _needles,
    "eval/methods": _methods,
    "eval/tuned": _methods,
    "eval/heatmap": _heatmap,
    "eval/thresholds": _thresholds,
    "eval/prose": _prose,
    "eval/recall": _recall,
    "eval/finetune": _finetune,
    "eval/longbench": _benchmark,
    "eval/ruler": _benchmark,
    "generate": _generate,
}

_MARKED = (_methods, _heatmap, _thresholds)  # these take the rows of another training seed, too

_LEGEND = f"""<p>Every score stands beside the one of exact attention on the same cases, with its 95 % interval
(Wilson for rates, bootstrap over contexts elsewhere). K is what a sparse forward reads of the prefix per layer and KV
head, with its share of the prefix. <span class="grey">Grey</span>: exact attention finds less than
{100 * RELIABLE:.0f} %, so a method can't be judged there.
<b class="below">&#8722;</b> below and <b class="above">+</b> above MAGE at the same setting: McNemar's exact test on
the same cases, at 5 % for all comparisons of the file together (Holm).</p>"""

_TIE_LEGEND = """<p>Another training seed of the model is given: <b>=</b> and "tie" are differences that hold with the
first one and have not the same direction with the other, on the same cases. Where the other was not measured, or its
exact attention finds too little, the first stands alone.</p>"""

_ANSWERS_LEGEND = f"""<p>Cells where exact attention finds at least {100 * RELIABLE:.0f} %, and shares masked of prose.
"Better" and "worse" hold in a paired test (McNemar's for facts; for prose a normal one from the bootstrap interval of
the difference) at 5 % for all cells of an answer's facts, or prose, together (Holm). No difference shown is not the
same as none.</p>"""

_STYLE = """
table { border-collapse: collapse; margin: 0.6em 0 1.2em; font-size: 0.9em; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.15em 0.7em; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--dim); } caption { text-align: left; color: var(--dim); padding-bottom: 0.2em; }
td { white-space: nowrap; } table.run td, table.answers td { white-space: normal; }
.grey { background: #d9d9d9; color: #6a6a6a; } small { color: var(--dim); }
.below { color: #c0392b; } .above { color: #1e8449; } .wide { overflow-x: auto; }
figure { margin: 0.8em 1em 0.8em 0; display: inline-block; vertical-align: top; }
img { max-width: 100%; } figcaption { color: var(--dim); font-size: 0.9em; }
pre.card { white-space: pre-wrap; border: 1px solid var(--line); padding: 0.8em; font-size: 0.85em; }
"""
