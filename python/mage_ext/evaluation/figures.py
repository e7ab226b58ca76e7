"""Figures of evaluation files and of bench/results/<gpu>/generate.json, drawn from their rows alone.

    recall_*, alignment_*, layer_budget_*     eval/recall: MAGE paper's figures 1 and 2, and the queries behind them
    recall_progress_*                         eval/recall --stages: recall of earlier weights
    budget_*                                  eval/methods: accuracy against K (figure 4)
    needle_*                                  eval/heatmap: accuracy by length and depth
    prose_*                                   eval/prose: cross entropy and KL divergence against K
    thresholds_*                              eval/thresholds: forwards and accuracy against the sampler's threshold
    step_latency_*                            generate: milliseconds per forward by context (figure 5)

One figure for every combination of what its axes don't show, such as task and dense layers; the file's name says which.
Needs matplotlib.

Test: pytest tests/python/test_report.py
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ext._arguments import check_list, check_path
from mage_ext._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

MAX_BYTES = 150_000  # of a PNG
# The one home of what a method looks like. "FA3" is exact attention by FlashAttention-3.
COLORS = {
    "exact": "#4c4c4c",
    "mage": "#1f77b4",
    "quest": "#d62728",
    "tidal": "#2ca02c",
    "sparsed": "#9467bd",
    "recency": "#8c564b",
    "random": "#b0b0b0",
    "oracle": "#111111",
    "carry": "#17becf",
    "v1": "#ff7f0e",
    "mage_max": "#e377c2",
    "mage_open": "#98df8a",
    "mage_prefix": "#bcbd22",
    "joint": "#c5b0d5",
    "mass": "#ffbb78",
    "two_level": "#dbdb8d",
    "probe1": "#f7b6d2",
    "probe5": "#9edae5",
    "FA3": "#c44e52",
    "FlashInfer": "#c49c94",
    "mage fused": "#aec7e8",
}
_OTHER_COLOR = "#7f7f7f"
RELIABLE = 0.8  # exact's score from which on a method's means anything
ENOUGH = 200  # cases of a cell, however many another one has


@dataclass(frozen=True)
class ResultFile:
    """A JSON file of an evaluation or a bench.

    Fields: path. name: of the suite, such as "eval/methods". head: everything but the rows. rows.
    """

    path: Path
    name: str
    head: dict[str, Any]
    rows: list[Row]


# What keys of rows hold. Suites without a kind here, such as those of kernels' benches, may hold anything.
_KINDS = {
    "a text": "study task method control sampler weights settings tuned_on",
    "a whole number": "K g T n tokens tokens_per_step dense_layers blocks masked facts distractors "
    "mage_only method_only g1_only units_only dense0_only dense_only control_only tuned_only steps",
    "a number": "score exact ci_low ci_high found_of_exact kv_share forwards kept_mass prefix_tokens recall chance t p "
    "depth threshold exact_forwards forwards_ratio forwards_ratio_low forwards_ratio_high recall_worst_layer recall_p5 "
    "kept kept_worst_layer kept_p5 kept_prefix own_mass next_block other_text spearman_contexts p_mage p_g1 p_dense0 "
    "p_control delta delta_low delta_high kl kl_low kl_high agreement agreement_low agreement_high over_mage "
    "over_mage_low over_mage_high over_g1 over_g1_low over_g1_high over_dense0 over_dense0_low over_dense0_high "
    "check_kl check_sparse_answer diff_low diff_high prompt_tokens sparse_items K_share",
    "a list of numbers": "x recall_by_forward kept_by_forward cosine_by_forward",
    "a list of lists of numbers": "by_forward_layer",
}
_KIND_OF = {key: kind for kind, keys in _KINDS.items() for key in keys.split()}
_MAY_BE_NULL = "tokens_per_step weights kv_share kept_mass recall p_mage p_g1 p_dense0 over_mage over_g1 over_dense0 "
_MAY_BE_NULL = frozenset((_MAY_BE_NULL + "check_kl next_block other_text spearman_contexts").split())
_LEAST = {"n": 1, "dense_layers": -1}  # of whole numbers; 0 for the others
_RATES = ("score", "exact", "ci_low", "ci_high")
_RANGES = {
    (0, 1): "found_of_exact recall recall_worst_layer recall_p5 recall_by_forward chance kept_mass own_mass agreement "
    "agreement_low agreement_high t p p_mage p_g1 p_dense0 p_control depth threshold",
    (-1, 1): "next_block other_text spearman_contexts cosine_by_forward",
    (0, math.inf): "kl kl_low kl_high check_kl check_sparse_answer kv_share forwards exact_forwards prefix_tokens",
}
_RANGE_OF = {key: limits for limits, keys in _RANGES.items() for key in keys.split()}
_ROUNDING = 1e-4  # files hold four digits and more; sums of float32 end a little beyond 1 and below 0
_WITH_INTERVAL = "delta kl agreement forwards_ratio over_mage over_g1 over_dense0".split()
_INTERVALS = {"score": ("ci_low", "ci_high")} | {key: (f"{key}_low", f"{key}_high") for key in _WITH_INTERVAL}
# Cases that one of two alone answered; the second is who the row's score is of.
_PAIRS = (
    ("mage_only", "method_only"),
    ("g1_only", "units_only"),
    ("dense0_only", "dense_only"),
    ("control_only", "tuned_only"),
)
_SUITES_OF_RATES = ("needles", "methods", "tuned", "heatmap", "thresholds", "finetune", "longbench", "ruler")
_SUITES_OF_KINDS = tuple(f"eval/{name}" for name in (*_SUITES_OF_RATES, "prose", "recall"))
_SUITES_OF_RANGES = (*_SUITES_OF_KINDS, "eval/tune")
_TIMED = ("generate", "sparse_block_attention")  # benches that figures and answers are made of
# Which case a row is of: a case has one row in all files of a suite together.
_CASE = "study task method K g dense_layers tokens tokens_per_step T t p control weights threshold depth sampler "
_CASE = (_CASE + "distractors trial case").split()


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63  # no NaN


def _is_of(kind: str, key: str, value: Any) -> bool:
    if kind == "a text":
        return isinstance(value, str)
    if kind == "a whole number":
        return _is_number(value) and isinstance(value, int) and value >= _LEAST.get(key, 0)
    if kind == "a number":
        return _is_number(value)
    inner = "a number" if kind == "a list of numbers" else "a list of numbers"
    return isinstance(value, list) and all(_is_of(inner, key, each) for each in value)


def _check_row(suite: str, place: str, row: Row) -> None:
    """Raises ValueError for a value that is not what its key says, or that can't be; keys that are missing are found by
    their readers."""

    def refuse(key: str, expected: str, value: Any) -> None:
        raise ValueError(f"files: {key} of {place} must be {expected}, got {value!r:.60}")

    if not isinstance(row.get("case", {}), dict):
        refuse("case", "an object", row["case"])
    if suite in _TIMED:
        for key in ("us", "ratio"):
            if row.get(key) is not None and not _is_number(row[key]):
                refuse(key, "a number", row[key])
        for key, value in row.get("case", {}).items():
            if isinstance(value, (dict, list)):
                refuse(f"{key} of case", "a plain value", value)
            if key in ("K", "g", "T", "context", "batch") and value is not None:
                if not _is_of("a whole number", key, value):
                    refuse(f"{key} of case", "a whole number of at least 0", value)
        return
    for key, value in row.items():
        kind = _KIND_OF.get(key) if suite in _SUITES_OF_KINDS or key in _RATES else None
        may_be_null = key in _MAY_BE_NULL or suite not in _SUITES_OF_KINDS
        may_be_null |= suite == "eval/recall" and kind == "a number"  # of cells without blocks
        if kind is None or (value is None and may_be_null):
            continue
        if not _is_of(kind, key, value):
            least = f" of at least {_LEAST.get(key, 0)}" if kind == "a whole number" else ""
            refuse(key, kind + least, value)
    if suite in _SUITES_OF_RANGES:
        _check_ranges(suite, row, refuse)


def _check_ranges(suite: str, row: Row, refuse: Callable[[str, str, Any], None]) -> None:
    """Refuses numbers that their key can't have, alone or beside the row's others."""
    rates = (0, 1)
    if suite == "eval/prose":
        rates = (0, math.inf)  # nats
    elif row.get("study", "recall") != "recall":
        rates = (-1, 1)  # cosines and correlations
    for key, value in row.items():
        low, high = rates if key in _RATES else _RANGE_OF.get(key, (-math.inf, math.inf))
        numbers = [each for each in (value if isinstance(value, list) else [value]) if _is_number(each)]
        if not all(low - _ROUNDING <= each <= high + _ROUNDING for each in numbers):
            refuse(key, f"in [{low}, {high}]" if high < math.inf else f"at least {low}", value)
    for key, names in _INTERVALS.items():
        low, high = (row.get(name) for name in names)
        if not (_is_number(low) and _is_number(high)):
            continue
        if low > high + _ROUNDING:
            refuse(names[0], f"at most {names[1]} = {high:g}", low)
        if _is_number(row.get(key)) and not low - _ROUNDING <= row[key] <= high + _ROUNDING:
            refuse(key, f"in [{names[0]}, {names[1]}] = [{low:g}, {high:g}]", row[key])
    if not _is_number(row.get("n")):
        return
    for other, own in _PAIRS:
        for name in (other, own):
            if _is_number(row.get(name)) and row[name] > row["n"]:
                refuse(name, f"at most n = {row['n']}", row[name])
        if not (_is_number(row.get("score")) and suite in _SUITES_OF_KINDS):
            continue
        right = round(row["score"] * row["n"])
        for name, most, told in ((own, right, "right"), (other, row["n"] - right, "wrong")):
            if _is_number(row.get(name)) and row[name] > most:
                refuse(name, f"at most {most}, the cases {told} by score", row[name])


def _check_together(files: Sequence[ResultFile]) -> None:
    """Raises ValueError if files are of several models, or those of a suite of several first seeds, or a case has
    several rows."""
    models = [(file.head["model"], file) for file in files if "model" in file.head]
    if len({model for model, _ in models}) > 1:
        told = ", ".join(f"{model} in {str(file.path)!r}" for model, file in models)
        raise ValueError(f"files: must be of one model, got {told}")
    for suite in dict.fromkeys(file.name for file in files):
        own = [file for file in files if file.name == suite]
        seeds = [(file.head["first_seed"], file) for file in own if "first_seed" in file.head]
        if any(seed != seeds[0][0] for seed, _ in seeds):
            told = ", ".join(f"{seed} in {str(file.path)!r}" for seed, file in seeds)
            raise ValueError(f"files: of {suite} must have one first_seed, got {told}")
        if suite not in _SUITES_OF_KINDS and suite not in _TIMED:
            continue
        seen: dict[str, str] = {}
        for file in own:
            for number, row in enumerate(file.rows, 1):
                place = f"row {number} of {str(file.path)!r}"
                first = seen.setdefault(case_of(row), place)
                if first != place:
                    raise ValueError(f"files: must have a case once, got {first} and {place}, both of {_case(row)}")


def _case(row: Row) -> Row:
    return {key: row[key] for key in _CASE if row.get(key) is not None}


def case_of(row: Row) -> str:
    """Which case a row is of, the same text for the same case of any file of its suite."""
    return json.dumps(_case(row), sort_keys=True)


def model_of(files: Sequence[ResultFile]) -> str | None:
    """The model that the files are of, None where none names one."""
    return next((file.head["model"] for file in files if "model" in file.head), None)


def read(paths: Sequence[str | Path]) -> list[ResultFile]:
    """The files, in order.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing, a folder or named twice, is no JSON object with
            "name", for evaluations "model", and "rows", has no rows, rows that are no objects, a row twice, or a value
            that is not what its key says or can't be beside the others of its row; files of several models, of one
            suite with several first seeds, or with several rows of a case.
        TypeError: paths are no list of paths.
    """
    found: list[ResultFile] = []
    for path in check_list("read", "paths", paths, "a list of paths"):
        check_path("read", path, "paths")
        path = Path(path)
        if any(path.resolve() == file.path.resolve() for file in found):
            raise ValueError(f"files: must be different files, got {str(path)!r} twice")
        if path.is_dir():
            raise ValueError(f"files: must name files, got the folder {str(path)!r}")
        if not path.is_file():
            raise FileNotFoundError(f"files: must name files that exist, got {str(path)!r}")
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"files: {path.name} must be JSON, got: {error}") from None
        if not isinstance(whole, dict):
            raise ValueError(f'files: {path.name} must be an object with a text "name", got {type(whole).__name__}')
        if not isinstance(whole.get("name"), str):
            raise ValueError(f'files: {path.name} must have a text "name", got {whole.get("name")!r:.60}')
        rows = whole.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f'files: {path.name} must have "rows", a list of objects')
        if not rows:
            raise ValueError(f"files: {path.name} must have rows, got none")
        head = {key: value for key, value in whole.items() if key != "rows"}
        has_model = isinstance(head.get("model"), str) and head["model"] != ""
        if not has_model and ("model" in head or whole["name"].startswith("eval/")):
            raise ValueError(f'files: {path.name} must have a text "model", got {head.get("model")!r:.60}')
        if "first_seed" in head and not _is_of("a whole number", "first_seed", head["first_seed"]):
            expected = f"first_seed of {path.name} must be a whole number of at least 0"
            raise ValueError(f"files: {expected}, got {head['first_seed']!r:.60}")
        seen: dict[str, int] = {}
        for number, row in enumerate(rows, 1):
            first = seen.setdefault(json.dumps(row, sort_keys=True), number)
            if first != number:
                raise ValueError(f"files: rows of {path.name} must differ, got row {first} again as row {number}")
            _check_row(whole["name"], f"row {number} of {path.name}", row)
        found.append(ResultFile(path, whole["name"], head, rows))
    _check_together(found)
    return found


def read_other_seed(paths: Sequence[str | Path], files: Sequence[ResultFile]) -> list[ResultFile]:
    """Evaluations of the model of files, trained with another seed, on the same test cases.

    Args:
        paths: as `read` takes them. files: of `read`. The names of the two models differ in "-seedN" behind one of
            them, or behind both.
    Raises:
        ValueError: naming other_seed; of another model or the same one, a suite that files lack, other first seeds, no
            case that files have too, or one of less than ENOUGH contexts and half as many. What `read` raises.
    """
    try:
        found = read(paths)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(str(error).replace("files: ", "other_seed: ", 1)) from None
    model, other = model_of(files), model_of(found)
    plain = [None if name is None else re.sub(r"-seed\d+$", "", name) for name in (model, other)]
    if model is None or other == model or plain[0] != plain[1]:
        expected = "of the model of files trained with another seed"
        expected += f", named {plain[0]} with -seedN behind it" if other != model and model is not None else ""
        raise ValueError(f"other_seed: must be {expected}, got {other} in {str(found[0].path)!r} and {model} in files")
    for file in found:
        own = [each for each in files if each.name == file.name]
        place = f"{file.name} in {str(file.path)!r}"
        if file.name not in _SUITES_OF_KINDS or not own:
            suites = ", ".join(dict.fromkeys(each.name for each in files if each.name in _SUITES_OF_KINDS))
            raise ValueError(f"other_seed: must be of suites that files have ({suites}), got {place}")
        seeds = [each.head.get("first_seed") for each in (own[0], file)]
        if seeds[0] != seeds[1]:
            raise ValueError(f"other_seed: must have the first_seed of files, {seeds[0]}, got {seeds[1]} of {place}")
        cases = {case_of(row): row.get("n") for each in own for row in each.rows}
        if not any(case_of(row) in cases for row in file.rows):
            raise ValueError(f"other_seed: must have cases that files have too, got none of {place}")
        for number, row in enumerate(file.rows, 1):
            n, least = row.get("n"), min((cases.get(case_of(row)) or 0) / 2, ENOUGH)
            if n is not None and n < least:  # too few to say that a difference turns
                expected = f"n of row {number} of {str(file.path)!r} must be at least {least:g}"
                expected += ", half of that in files" * (least < ENOUGH)
                raise ValueError(f"other_seed: {expected}, got {n}, of {_case(row)}")
    return found


def incomplete(files: Sequence[ResultFile]) -> list[str]:
    """A line of text per file whose run ended early."""
    return [f"Not complete, the run ended early: {file.path}" for file in files if file.head.get("complete") is False]


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn. Fields: stem of its file's name; title, plain text; suite; draw."""

    stem: str
    title: str
    suite: str
    draw: Callable[[], "Figure"]


def drawings(files: Sequence[ResultFile]) -> Iterator[Drawing]:
    """Every figure that the files have rows for. Rows of files of one suite are drawn together.

    Raises:
        ValueError: a file lacks a key of its suite; naming file and key. The same when a figure is drawn.
    """
    for suite, find in _SUITES.items():
        own = [file for file in files if file.name == suite]
        rows = [row for file in own for row in file.rows]
        with _keys_of(suite, own):
            found = list(find(suite, rows))
        for drawing in found:
            yield dataclasses.replace(drawing, draw=functools.partial(_drawn, drawing, own))


def _drawn(drawing: Drawing, files: Sequence[ResultFile]) -> "Figure":
    with _keys_of(drawing.suite, files):
        return drawing.draw()


@contextlib.contextmanager
def _keys_of(suite: str, files: Sequence[ResultFile]) -> Iterator[None]:
    """Names the files whose rows lack a key."""
    try:
        yield
    except KeyError as error:
        names = ", ".join(file.path.name for file in files)
        raise ValueError(f"files: rows of {names} must have the key {error} of {suite}") from None


def write(files: Sequence[ResultFile], folder: str | Path) -> list[Path]:
    """Draws every figure as a PNG in a folder, which is made.

    Raises:
        ValueError: a figure of more than MAX_BYTES; what `drawings` raises. ModuleNotFoundError: matplotlib is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for drawing in drawings(files):
        written.append(folder / f"{drawing.stem}.png")
        save(drawing.draw(), written[-1])
    return written


def png(figure: "Figure") -> bytes:
    """The figure as a PNG of 256 colours, which has a third of the bytes. Raises ValueError beyond MAX_BYTES."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib brings it

    figure.set_dpi(100)
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    data = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    if data.tell() > MAX_BYTES:
        raise ValueError(f"figure: must have at most {MAX_BYTES} bytes as PNG, got {data.tell()}")
    return data.getvalue()


def save(figure: "Figure", path: Path) -> None:
    """Writes the figure as a PNG and says so."""
    data = png(figure)
    with replacing(path) as part:
        part.write_bytes(data)
    print(f"written: {path}")


def panels(
    num_rows: int, num_columns: int, width: float = 3.6, height: float = 3.0, **options: Any
) -> "tuple[Figure, list[list[Axes]]]":
    """A figure and its axes [row][column]; width and height of each in inches, options of matplotlib's `subplots`.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("figures: need matplotlib: pip install '.[plot]'") from None
    figure = Figure(figsize=(max(width * num_columns, 4.2), height * num_rows))
    return figure, [list(row) for row in figure.subplots(num_rows, num_columns, squeeze=False, **options)]


def color(method: str) -> str:
    """Of a method, the same in every figure."""
    return COLORS.get(method, _OTHER_COLOR)


def line(axis: "Axes", method: str, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """A method's line in its colour; ceilings and peers are dashed, MAGE's is thick."""
    style = {"oracle": "--", "random": ":", "FA3": "--"}.get(method, "-")
    options = {"color": color(method), "marker": "o", "ms": 3, "ls": style, "label": method} | options
    axis.plot(x, y, lw=2.4 if method == "mage" else 1.4, zorder=4 if method == "mage" else 2, **options)


def context_axis(axis: "Axes", contexts: Sequence[int]) -> None:
    """Contexts in K tokens on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context}K" for context in contexts])
    axis.set_xlabel("context, tokens")
    axis.grid(alpha=0.3)


def _budget_axis(axis: "Axes", rows: Sequence[Row]) -> None:
    """K on a logarithmic axis, below it the share of the prefix."""
    ks = sorted({row["K"] for row in rows if row["K"]})
    prefix = next(row["prefix_tokens"] for row in rows)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [f"{k}\n{100 * k / prefix:.1f} %" for k in ks], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel("K; share of the prefix", fontsize=8)
    axis.grid(alpha=0.3)


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows by the values of keys, in order of first appearance. A key that a row lacks counts as None."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def counts(rows: Sequence[Row]) -> str:
    """How many cases the rows' cells have: "200", "200 and 500"."""
    return " and ".join(map(str, sorted({row["n"] for row in rows})))


def of_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by method: exact, MAGE and the other known ones first."""
    found = groups(rows, "method")
    order = sorted(found, key=lambda key: list(COLORS).index(key[0]) if key[0] in COLORS else len(COLORS))
    return {key[0]: found[key] for key in order}


def _single(rows: Sequence[Row]) -> Row:
    """The row of a case. Raises ValueError if the files have it twice."""
    if len(rows) > 1:
        case = {key: value for key, value in rows[0].items() if isinstance(value, (str, int)) and key != "n"}
        raise ValueError(f"files: must have a case once, got {len(rows)} rows of {case}")
    return rows[0]


def _stem(*parts: object) -> str:
    """A file's name of words and numbers."""
    text = "_".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts if part is not None)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def _setting(row: Row) -> str:
    return f"g = {row['g']}, dense layers {row['dense_layers']}"


# ----------------------------------------------------------------------------------------------------------------------
# eval/recall


def _recall(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    kinds = {"recall": _recall_along, "alignment": _alignment, "budget": _layer_budget}
    names = {"recall": "recall", "alignment": "alignment", "budget": "layer_budget"}
    titles = {
        "recall": "What the first forward's lists share with those of later forwards",
        "alignment": "The block's mean query against that of its first forward",
        "budget": "What each layer wants, forward by forward",
    }
    yield from _progress(suite, [row for row in rows if row["study"] == "recall" and row["control"] == "none"])
    rows = [row for row in rows if not row.get("weights")]
    for kind, draw in kinds.items():
        own = [row for row in rows if row["study"] == kind]
        keys = ("task", "tokens", "control", *(("g",) if kind == "recall" else ()))
        for values, inside in groups(own, *keys).items():
            task, tokens, control = values[:3]
            g = f"g{values[3]}" if kind == "recall" else None
            name = _stem(names[kind], task, tokens, g, None if control == "none" else control)
            about = f"{task}, {tokens} tokens" + (f", g = {values[3]}" if g else "")
            about += "" if control == "none" else f", control: {control}"
            yield Drawing(name, f"{titles[kind]}: {about}", suite, lambda draw=draw, inside=inside: draw(inside))


def _progress(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    """Recall against training, where there are rows of earlier weights."""
    for (task, tokens, g), inside in groups(rows, "task", "tokens", "g").items():
        if any(row.get("weights") for row in inside):
            title = f"Recall of the first forward's lists against training: {task}, {tokens} tokens, g = {g}"
            name = _stem("recall_progress", task, tokens, f"g{g}")
            yield Drawing(name, title, suite, lambda inside=inside: _by_weights(inside))


def _by_weights(rows: Sequence[Row]) -> "Figure":
    """Recall with its interval by weights, the finished ones last; a panel per K."""
    ks = sorted({row["K"] for row in rows})
    order = [key[0] for key in groups([row for row in rows if row.get("weights")], "weights")] + [None]
    figure, axes = panels(1, len(ks), 3.6, 3.2)
    for axis, k in zip(axes[0], ks, strict=True):
        inside = [row for row in rows if row["K"] == k]
        for method, found in of_method(inside).items():
            found = sorted(found, key=lambda row: order.index(row.get("weights")))
            x = [order.index(row.get("weights")) for row in found]
            line(axis, method, x, [row["score"] for row in found])
            low, high = ([row[key] for row in found] for key in ("ci_low", "ci_high"))
            axis.fill_between(x, low, high, color=color(method), alpha=0.12, lw=0)
        axis.set_xticks(range(len(order)), [each or "finished" for each in order], fontsize=7, rotation=30, ha="right")
        axis.set_ylim(0, 1.03)
        axis.set_title(f"K = {k} ({100 * k / inside[0]['prefix_tokens']:.1f} % of the prefix)", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("recall of the later forward's own list", fontsize=8)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.4))
    return figure


def _recall_along(rows: Sequence[Row]) -> "Figure":
    """Recall and kept mass along denoising, a column per K."""
    ks = sorted({row["K"] for row in rows})
    figure, axes = panels(2, len(ks))
    for column, k in enumerate(ks):
        inside = [row for row in rows if row["K"] == k]
        for method, found in of_method(inside).items():
            row = _single(found)
            line(axes[0][column], method, row["x"], row["recall_by_forward"])
            line(axes[1][column], method, row["x"], row["kept_by_forward"])
        chance = sum(row["chance"] for row in inside) / len(inside)
        axes[0][column].axhline(chance, color="black", ls=":", lw=0.9, label="chance")
        axes[0][column].set_title(f"K = {k} ({100 * k / inside[0]['prefix_tokens']:.1f} % of the prefix)", fontsize=9)
        axes[0][column].set_ylim(0, 1.03)
        least = min(min(row["kept_by_forward"]) for row in inside if row["method"] not in ("recency", "random"))
        axes[1][column].set_ylim(max(0.0, least - 0.05), 1.05)
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xlabel("share of the block that is decided", fontsize=8)
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("recall of the later forward's own list", fontsize=8)
    axes[1][0].set_ylabel("mass attended / by the own list", fontsize=8)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.4))
    return figure


def _alignment(rows: Sequence[Row]) -> "Figure":
    """Cosines along denoising with their controls."""
    figure, ((axis,),) = panels(1, 1, 5.2, 3.4)
    for row, tint in zip(rows, ("#1f77b4", "#ff7f0e"), strict=False):
        axis.plot(row["x"], row["cosine_by_forward"], color=tint, marker="o", ms=3, label=row["method"])
        for key, style in (("next_block", "--"), ("other_text", ":")):
            if row[key] is not None:
                axis.axhline(row[key], color=tint, ls=style, lw=1, label=f"{row['method']}: {key.replace('_', ' ')}")
    axis.set_xlabel("share of the block that is decided")
    axis.set_ylabel("cosine, mean over layers and heads", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def _layer_budget(rows: Sequence[Row]) -> "Figure":
    """Wants by layer, a line per forward, a panel per measure."""
    from matplotlib import colormaps

    figure, axes = panels(1, len(rows), 3.8, 3.2)
    shades = colormaps["viridis"]
    for axis, row in zip(axes[0], rows, strict=True):
        steps = row["x"]
        for step, (share, values) in enumerate(zip(steps, row["by_forward_layer"], strict=True)):
            label = f"{100 * share:.0f} % decided" if step in (0, len(steps) // 2, len(steps) - 1) else None
            axis.plot(range(len(values)), values, color=shades(0.9 * share), lw=1.2, label=label)
        score = "" if row["score"] is None else f", rank correlation {row['score']:.2f}"
        what = f"v1's score, K = {row['K']}" if row["method"] == "v1_score" else f"tokens for {row['p']:g} of the mass"
        axis.set_title(what + score, fontsize=8)
        axis.set_xlabel("layer")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy


def _methods(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    sparse = [row for row in rows if row["K"]]
    for (task, tokens, g, dense), inside in groups(sparse, "task", "tokens", "g", "dense_layers").items():
        name = _stem("budget", task, tokens, f"g{g}", f"dense{dense}")
        title = f"Accuracy against K: {task}, {tokens} tokens, {_setting(inside[0])}"
        yield Drawing(name, title, suite, lambda inside=inside: _accuracy(inside))


def _accuracy(rows: Sequence[Row]) -> "Figure":
    """Scores with their intervals against K, a panel per number of tokens decided in a forward."""
    speeds = groups(rows, "tokens_per_step")
    speeds = {key[0]: speeds[key] for key in sorted(speeds, key=lambda key: key[0] or math.inf)}
    figure, axes = panels(1, len(speeds), 3.9, 3.3)
    for axis, (speed, inside) in zip(axes[0], speeds.items(), strict=True):
        exact = max(inside, key=lambda row: row["n"])["exact"]  # on the most cases
        axis.axhline(exact, color=COLORS["exact"], lw=1.2, label="exact")
        if exact < RELIABLE:
            axis.set_facecolor("#e4e4e4")
        for method, found in of_method(inside).items():
            found = sorted(found, key=lambda row: row["K"])
            x = [row["K"] for row in found]
            line(axis, method, x, [row["score"] for row in found])
            low, high = ([row[key] for row in found] for key in ("ci_low", "ci_high"))
            axis.fill_between(x, low, high, color=color(method), alpha=0.12, lw=0)
        _budget_axis(axis, inside)
        axis.set_ylim(-0.03, 1.05)
        what = f"tokens per forward: {speed}" if speed is not None else str(inside[0].get("sampler"))
        axis.set_title(f"{what}, n = {counts(inside)}", fontsize=9)
    axes[0][0].set_ylabel("found, share of the cases", fontsize=9)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _heatmap(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    exact = [row for row in rows if not row["K"]]
    for (k, g, dense), inside in groups([row for row in rows if row["K"]], "K", "g", "dense_layers").items():
        name, title = (
            _stem("needle", f"k{k}", f"g{g}", f"dense{dense}"),
            f"Needles found: K = {k}, {_setting(inside[0])}",
        )
        yield Drawing(name, title, suite, lambda inside=inside: _needles(exact + inside))


def _needles(rows: Sequence[Row]) -> "Figure":
    """Scores by length and depth, a panel per method; hatched where exact attention is below RELIABLE."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("tokens", "depth"))
    methods = of_method(rows)
    columns = min(len(methods), 4)
    figure, axes = panels(-(-len(methods) // columns), columns, 3.4, 1.2 + 0.3 * len(depths))
    flat = [axis for row in axes for axis in row]
    for axis in flat[len(methods) :]:
        axis.set_axis_off()
    for axis, (method, found) in zip(flat, methods.items(), strict=False):
        score = [[math.nan] * len(lengths) for _ in depths]
        for row in found:
            i, j = depths.index(row["depth"]), lengths.index(row["tokens"])
            score[i][j] = row["score"]
            axis.text(j, i, f"{100 * row['score']:.0f}", ha="center", va="center", fontsize=7)
            if row["exact"] < RELIABLE:
                axis.fill(
                    [j - 0.5, j + 0.5, j + 0.5, j - 0.5],
                    [i - 0.5, i - 0.5, i + 0.5, i + 0.5],
                    fc="#c4c4c4",
                    ec="#a0a0a0",
                    hatch="//",
                )
        axis.imshow(score, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.7)
        axis.set_xticks(range(len(lengths)), lengths, fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7)
        axis.set_title(f"{method}, n = {found[0]['n']} each", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
    flat[0].set_ylabel("depth of the fact", fontsize=8)
    return figure


def _thresholds(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    exact = groups([row for row in rows if not row["K"]], "task", "tokens")
    sparse = [row for row in rows if row["K"]]
    for (task, tokens, k, g, dense), inside in groups(sparse, "task", "tokens", "K", "g", "dense_layers").items():
        name = _stem("thresholds", task, tokens, f"k{k}", f"g{g}", f"dense{dense}")
        title = f"Forwards and accuracy against the threshold: {task}, {tokens} tokens, K = {k}, {_setting(inside[0])}"
        mine = exact.get((task, tokens), []) + inside
        yield Drawing(name, title, suite, lambda mine=mine: _by_threshold(mine))


def _by_threshold(rows: Sequence[Row]) -> "Figure":
    """Forwards per answer, and scores with their intervals, against the threshold; steps of equal width, since most
    thresholds lie close below 1."""
    figure, (axes,) = panels(1, 2, 4.4, 3.3)
    thresholds = sorted({row["threshold"] for row in rows})
    for method, found in of_method(rows).items():
        found = sorted(found, key=lambda row: row["threshold"])
        x = [thresholds.index(row["threshold"]) for row in found]
        line(axes[0], method, x, [row["forwards"] for row in found])
        line(axes[1], method, x, [row["score"] for row in found])
        axes[1].fill_between(
            x,
            [row["ci_low"] for row in found],
            [row["ci_high"] for row in found],
            color=color(method),
            alpha=0.12,
            lw=0,
        )
    axes[0].set_ylabel("forwards per answer")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("found, share of the cases")
    axes[1].set_ylim(-0.03, 1.05)
    for axis in axes:
        axis.set_xlabel("threshold of the sampler")
        axis.set_xticks(range(len(thresholds)), [f"{threshold:g}" for threshold in thresholds], fontsize=8)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# eval/prose


def _prose(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    sparse = [row for row in rows if row["K"]]
    for (tokens, g, dense), inside in groups(sparse, "tokens", "g", "dense_layers").items():
        name = _stem("prose", tokens, f"g{g}", f"dense{dense}")
        title = f"Held-out prose, cost in cross entropy and KL: {tokens} tokens, {_setting(inside[0])}"
        yield Drawing(name, title, suite, lambda inside=inside: _cost(inside))


def _cost(rows: Sequence[Row]) -> "Figure":
    """Cross entropy minus exact's, and KL, with their intervals, against K; a column per masked share."""
    shares = sorted({row["t"] for row in rows}, reverse=True)
    figure, axes = panels(2, len(shares), 3.2, 2.9)
    for column, share in enumerate(shares):
        inside = [row for row in rows if row["t"] == share]
        for method, found in of_method(inside).items():
            found = sorted(found, key=lambda row: row["K"])
            for axis, key in ((axes[0][column], "delta"), (axes[1][column], "kl")):
                x = [row["K"] for row in found]
                line(axis, method, x, [row[key] for row in found])
                low, high = ([row[f"{key}_{end}"] for row in found] for end in ("low", "high"))
                axis.fill_between(x, low, high, color=color(method), alpha=0.12, lw=0)
        axes[0][column].axhline(0, color=COLORS["exact"], lw=1)
        axes[0][column].set_title(f"{100 * share:.0f} % masked, exact {inside[0]['exact']:.2f} nats", fontsize=8)
        axes[1][column].set_yscale("log")
        for axis in (axes[0][column], axes[1][column]):
            _budget_axis(axis, inside)
    axes[0][0].set_ylabel("cross entropy - exact, nats", fontsize=8)
    axes[1][0].set_ylabel("KL(exact || method), nats", fontsize=8)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.3))
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# generate


def _generate(suite: str, rows: Sequence[Row]) -> Iterator[Drawing]:
    rows = [{**row, **row["case"]} for row in rows]
    rows = [row for row in rows if row["method"] not in ("autoregressive", "published")]  # loops of other forwards
    for (model, batch), inside in groups(rows, "model", "batch").items():
        first = [row for row in inside if row.get("dense_layers", 0) == 0]
        if len({row["context"] for row in first}) > 1:
            title = f"Milliseconds per forward by context: {model}, batch {batch}"
            yield Drawing(
                _stem("step_latency", model, f"batch{batch}"), title, suite, lambda first=first: _latency(first)
            )


def _latency(rows: Sequence[Row]) -> "Figure":
    """Time of a block over its T forwards, first one and commit included, a panel per T."""
    steps = sorted({row["T"] for row in rows if row["T"]}, reverse=True)
    figure, axes = panels(1, len(steps), 3.8, 3.3)
    for axis, T in zip(axes[0], steps, strict=True):
        inside = [row for row in rows if row["T"] == T]
        for method, found in of_method(inside).items():
            found = sorted(found, key=lambda row: row["context"])
            line(axis, method, [row["context"] / 1024 for row in found], [row["us"] / 1e3 / T for row in found])
        context_axis(axis, sorted({row["context"] // 1024 for row in inside}))
        axis.set_ylim(bottom=0)
        axis.set_title(f"T = {T}", fontsize=9)
    axes[0][0].set_ylabel("ms per block / T")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


_SUITES: dict[str, Callable[[str, Sequence[Row]], Iterator[Drawing]]] = {
    "eval/recall": _recall,
    "eval/methods": _methods,
    "eval/heatmap": _heatmap,
    "eval/prose": _prose,
    "eval/thresholds": _thresholds,
    "generate": _generate,
}
