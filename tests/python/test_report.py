"""Figures and reports of evaluation files. Run: pytest tests/python/test_report.py"""

import base64
import html
import json
import math
import random
import re
import runpy
import sys
from pathlib import Path

import pytest

from mage_ext import cli
from mage_ext.evaluation import figures, needles, report
from mage_ext.models import builtin
from mage_ext.testing import browser

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("mage", "quest", "tidal", "recency")


def _score(method, successes, *, n=50, exact=50, K=64, **more):
    low, high = needles.wilson(successes, n)
    row = {"task": "needle", "method": method, "K": K, "g": 1, "dense_layers": 2, "n": n, "score": successes / n}
    row |= {"exact": exact / n, "found_of_exact": min(successes / max(exact, 1), 1), "ci_low": low, "ci_high": high}
    row |= {"sampler": "low_confidence_static", "tokens_per_step": 4, "kv_share": 0.25, "forwards": 8.0, "T": 8}
    row |= {"tokens": 2048, "distractors": 0, "prefix_tokens": 2000.0}
    return row | more


def _exact(successes=50, n=50, **more):
    return _score("exact", successes, n=n, exact=successes, K=0, **{"g": 0, "dense_layers": -1, "kv_share": 1.0} | more)


def _tested(method, successes, mage_only, method_only, p, **more):
    return _score(method, successes, mage_only=mage_only, method_only=method_only, p_mage=p, **more)


def _methods():
    """Two speeds; exact is below 80 % at one of them. Four comparisons."""
    rows = [_exact()]
    for k, mage, quest in ((64, 49, 20), (256, 50, 47)):
        rows.append(_score("mage", mage, K=k, recall=0.85))
        rows.append(_tested("quest", quest, *((30, 1, 1e-7) if k == 64 else (3, 0, 0.02)), K=k))
    rows.append(_exact(30, tokens_per_step=1))
    for k in (64, 256):
        rows.append(_score("mage", 25, exact=30, K=k, tokens_per_step=1, recall=0.8))
        rows.append(_tested("quest", 40, 0, 15, 6.1e-5 if k == 64 else 0.5, exact=30, K=k, tokens_per_step=1))
    return rows


def _heatmap():
    rows = []
    for tokens in (1024, 4096):
        for depth in (0.0, 0.5, 1.0):
            known = 50 if tokens == 1024 else 35
            rows.append(_exact(known, tokens=tokens, depth=depth))
            rows += [
                _score(name, known - 5 * i, exact=known, tokens=tokens, depth=depth) for i, name in enumerate(NAMES)
            ]
    return rows


def _thresholds():
    rows = []
    for threshold in (0.5, 0.9):
        told = {"tokens_per_step": None, "sampler": "low_confidence_dynamic", "threshold": threshold}
        rows.append(_exact(forwards=2 + 4 * threshold, tokens_per_forward=4.0, **told))
        for i, name in enumerate(NAMES):
            told |= {"forwards": 2 + 4 * threshold + i, "exact_forwards": 2 + 4 * threshold, "tokens_per_forward": 3.5}
            told |= {"forwards_ratio": 1 + 0.1 * i, "forwards_ratio_low": 1.0, "forwards_ratio_high": 1.2 + 0.1 * i}
            rows.append(_score(name, 50 - 10 * i, **told))
    return rows


def _prose():
    rows = []
    for share in (1.0, 0.5):
        for k in (64, 256):
            for i, name in enumerate(NAMES):
                delta, kl = 0.02 * (i + 1) * 64 / k, 0.01 * (i + 1) * 64 / k
                row = {"task": "prose", "method": name, "K": k, "g": 1, "dense_layers": 0, "T": 8, "t": share}
                row |= {"masked": int(32 * share), "n": 40, "tokens": 2048, "prefix_tokens": 2048, "exact": 3.5}
                row |= {"score": 3.5 + delta, "ci_low": 3.3, "ci_high": 3.8, "delta": delta, "kl": kl, "agreement": 0.9}
                for key, value in (("delta", delta), ("kl", kl), ("agreement", 0.9)):
                    row |= {f"{key}_low": 0.8 * value, f"{key}_high": 1.1 * value}
                rows.append(row | {"kept_mass": 0.95})
    return rows


def _recall():
    rows, x = [], [0.25, 0.5, 0.75, 1.0]
    for control in ("none", "shuffled"):
        head = {
            "task": "prose",
            "tokens": 2048,
            "control": control,
            "n": 8,
            "blocks": 30,
            "T": 4,
            "prefix_tokens": 2040.0,
        }
        for k in (64, 256):
            for i, name in enumerate(("mage", "v1", "carry", "quest", "random", "oracle")):
                level = 1.0 if name == "oracle" else 0.9 - 0.1 * i
                row = {"study": "recall", **head, "method": name, "K": k, "g": 1, "chance": k / 2040, "score": level}
                row |= {"exact": 1.0, "ci_low": level - 0.02, "ci_high": level, "recall_worst_layer": 0.5, "x": x}
                row |= {"recall_p5": 0.4, "kept": 0.97, "kept_worst_layer": 0.9, "kept_p5": 0.8, "kept_mass": 0.93}
                row |= {"own_mass": 0.95, "recall_by_forward": [level - 0.01 * s for s in range(4)]}
                rows.append(row | {"kept_by_forward": [0.98, 0.97, 0.96, 0.95]})
        for name in ("rotated", "unrotated"):
            row = {"study": "alignment", **head, "method": name, "score": 0.9, "exact": 1.0, "ci_low": 0.8, "x": x}
            row |= {"ci_high": 0.95, "cosine_by_forward": [0.95, 0.9, 0.85, 0.8], "next_block": 0.6, "other_text": None}
            rows.append(row)
        budgets = [[100.0 * (1 + layer % 3) - s for layer in range(5)] for s in range(5)]
        for what in ({"method": "v1_score", "K": 64}, {"method": "tokens", "p": 0.9}):
            row = {"study": "budget", **head, **what, "score": 0.94, "spearman_contexts": 0.9, "x": [0.0, *x]}
            rows.append(row | {"spearman": [0.99, 0.95, 0.92, 0.9], "by_forward_layer": budgets})
    return rows


def _generate(places=(("1.5B", 8), ("7B", 4), ("8B", 4))):
    rows = []
    for model, batch in places:
        for context in (16384, 65536, 131072):
            for T in (32, 16, 8):
                exact = 0.001 * context * T
                for method, part in (
                    ("exact", 1.0),
                    ("FA3", 0.97),
                    ("mage", 0.5),
                    ("quest", 0.55),
                    ("mage fused", 0.45),
                ):
                    case = {"model": model, "batch": batch, "context": context, "T": T, "method": method}
                    case |= {} if method in ("exact", "FA3") else {"K": 1024, "g": 64, "dense_layers": 0}
                    row = {"case": case, "us": 1e3 * exact * part, "floor_us": 800.0 * exact * part, "fraction": 0.8}
                    row |= {"peer": "exact", "peer_us": 1e3 * exact, "ratio": 1 / part, "tokens_per_s": 1000.0}
                    forwards = (
                        {"exact": T - 1, "commit": 1} if method in ("exact", "FA3") else {"select": 1, "sparse": T - 1}
                    )
                    row |= {
                        "forwards": forwards,
                        "step_ms": dict.fromkeys(["exact", "select", "sparse", "commit"], 1.5),
                    }
                    rows.append(row)
    rows.append({"case": {**rows[-1]["case"], "method": "autoregressive"}, "us": 1e9, "peer": "exact", "ratio": 0.1})
    return rows


SUITES = {
    "eval/methods": _methods,
    "eval/heatmap": _heatmap,
    "eval/thresholds": _thresholds,
    "eval/prose": _prose,
    "eval/recall": _recall,
    "generate": _generate,
}


@pytest.fixture
def write(tmp_path):
    """Writes a result file and returns its path."""

    def make(suite, rows, model=builtin.NAME, **head):
        path = tmp_path / f"{suite.replace('/', '_')}.json"
        head = {"model": model} | head if suite.startswith("eval") else head
        whole = {"name": suite, **head, "device": "cpu", "commit": "abc1234", "n": 50, "rows": rows}
        path.write_text(json.dumps(whole))
        return path

    return make


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def _drawn(path):
    return {drawing.stem: drawing.draw() for drawing in figures.drawings(figures.read([path]))}


def _lines(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_every_suite_is_drawn_in_small_files(write, tmp_path, capsys):
    paths = [write(suite, make()) for suite, make in SUITES.items()]
    written = figures.write(figures.read(paths), tmp_path / "figures")
    stems = {path.stem for path in written}
    assert stems == {
        *("budget_needle_2048_g1_dense2", "needle_k64_g1_dense2", "thresholds_needle_2048_k64_g1_dense2"),
        *("prose_2048_g1_dense0", "recall_prose_2048_g1", "recall_prose_2048_g1_shuffled"),
        *("alignment_prose_2048", "alignment_prose_2048_shuffled", "layer_budget_prose_2048"),
        *("layer_budget_prose_2048_shuffled", "step_latency_1.5B_batch8", "step_latency_7B_batch4"),
        "step_latency_8B_batch4",
    }
    first = {path: path.read_bytes() for path in written}
    assert all(data.startswith(b"\x89PNG") and 2000 < len(data) <= figures.MAX_BYTES for data in first.values())
    figures.write(figures.read(paths), tmp_path / "figures")
    assert first == {path: path.read_bytes() for path in written}
    assert capsys.readouterr().out.count("written: ") == 2 * len(written)


def test_recall_along_denoising(write):
    rows = _recall()
    figure = _drawn(write("eval/recall", rows))["recall_prose_2048_g1"]
    top = figure.axes[:2]
    for axis, k in zip(top, (64, 256), strict=True):
        lines = _lines(axis)
        for row in rows:
            if (row["study"], row["control"], row.get("K")) == ("recall", "none", k):
                assert lines[row["method"]] == (row["x"], row["recall_by_forward"])
        assert lines["chance"][1] == pytest.approx([k / 2040] * 2) and lines["oracle"][1][0] == 1.0
    assert f"K = 256 ({100 * 256 / 2040:.1f} % of the prefix)" in top[1].get_title()


def test_layer_budgets(write):
    figure = _drawn(write("eval/recall", _recall()))["layer_budget_prose_2048"]
    assert len(figure.axes) == 2 and "rank correlation 0.94" in figure.axes[0].get_title()
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == _recall()[-1]["by_forward_layer"]


def test_accuracy_against_budget(write):
    rows = _methods()
    random.Random(0).shuffle(rows)
    (figure,) = _drawn(write("eval/methods", rows)).values()
    slow, fast = figure.axes  # 1 and 4 tokens per forward
    assert "forward: 1" in slow.get_title() and "forward: 4" in fast.get_title() and "n = 50" in fast.get_title()
    assert _lines(fast)["mage"] == ([64, 256], [0.98, 1.0]) and _lines(fast)["quest"] == ([64, 256], [0.4, 0.94])
    assert set(_lines(fast)["exact"][1]) == {1.0} and set(_lines(slow)["exact"][1]) == {0.6}
    assert slow.get_facecolor() != fast.get_facecolor()  # exact is below 80 %
    assert [label.get_text() for label in fast.get_xticklabels()] == ["64\n3.2 %", "256\n12.8 %"]


def test_needle_map(write):
    (figure,) = _drawn(write("eval/heatmap", _heatmap())).values()
    maps = {axis.get_title().split(",")[0]: axis for axis in figure.axes if axis.images}
    assert list(maps) == ["exact", *NAMES]
    assert maps["quest"].images[0].get_array().tolist() == [[0.9, 0.6]] * 3  # depths by lengths
    assert [text.get_text() for text in maps["quest"].texts] == ["90"] * 3 + ["60"] * 3
    assert len(maps["quest"].patches) == 3  # where exact finds 70 %


def test_thresholds_and_prose_and_latency(write):
    (figure,) = _drawn(write("eval/thresholds", _thresholds())).values()
    assert _lines(figure.axes[0])["quest"] == ([0, 1], pytest.approx([5.0, 6.6]))
    assert _lines(figure.axes[0])["exact"] == ([0, 1], pytest.approx([4.0, 5.6]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.5", "0.9"]
    (figure,) = _drawn(write("eval/prose", _prose())).values()
    assert _lines(figure.axes[0])["tidal"] == ([64, 256], pytest.approx([0.06, 0.015]))
    assert _lines(figure.axes[2])["tidal"] == ([64, 256], pytest.approx([0.03, 0.0075]))
    figure = _drawn(write("generate", _generate()))["step_latency_7B_batch4"]
    assert [axis.get_title() for axis in figure.axes] == ["T = 32", "T = 16", "T = 8"]
    lines = _lines(figure.axes[2])
    assert lines["mage"] == ([16, 64, 128], pytest.approx([8.192, 32.768, 65.536]))
    assert "autoregressive" not in lines


def test_a_figure_that_is_too_large_is_refused(write, monkeypatch):
    monkeypatch.setattr(figures, "MAX_BYTES", 1000)
    (figure,) = _drawn(write("eval/methods", _methods())).values()
    with pytest.raises(ValueError, match="must have at most 1000 bytes as PNG, got "):
        figures.png(figure)


def test_figures_of_the_bench(write, tmp_path, monkeypatch):
    places = [(model, batch) for model in ("1.5B", "7B", "8B") for batch in (1, 4, 8)]
    path = write("generate", _generate(places))
    monkeypatch.setattr(sys, "argv", ["plot_generate.py", str(path)])
    runpy.run_path(str(ROOT / "bench" / "plot_generate.py"), run_name="__main__")
    names = {found.name for found in tmp_path.glob("*.png")}
    assert names == {f"generate_{name}.png" for name in ("step_time", "speed_up", "breakdown", "break_even")}


# ----------------------------------------------------------------------------------------------------------------------
# Reports


def test_marks_are_holms_over_the_file():
    rows = _methods()
    signs, family = report.marks(rows)
    told = {(row["tokens_per_step"], row["K"]): signs.get(id(row)) for row in rows if row["method"] == "quest"}
    # 1e-7 < 0.05 / 4; 6.1e-5 < 0.05 / 3; 0.02 < 0.05 / 2; 0.5 > 0.05.
    assert family == 4 and told == {(4, 64): "-", (1, 64): "+", (4, 256): "-", (1, 256): None}
    for row in rows:
        if row.get("p_mage") == 0.02:
            row["p_mage"] = 0.03  # > 0.05 / 2
    assert len(report.marks(rows)[0]) == 2 and report.marks([]) == ({}, 0)


@pytest.mark.parametrize("exact, is_grey", [(40, False), (39, True), (0, True)])
def test_a_cell_is_grey_where_exact_fails(exact, is_grey):
    cell = report.score_cell(_tested("quest", 30, 5, 1, 0.2, exact=exact))
    assert ("grey" in cell) == is_grey
    low, high = needles.wilson(30, 50)
    assert f"60.0 <small>[{100 * low:.1f}, {100 * high:.1f}]" in cell
    assert f"exact {2 * exact:.1f} % on the same 50 cases" in cell


def _cells(text):
    """Texts of the cells of every table, by caption."""
    found = {}
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        caption = re.search(r"<caption>(.*?)</caption>", table)
        lines = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        cells = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", line)] for line in lines]
        found[caption[1] if caption else ""] = cells
    return found


def test_scores_stand_beside_those_of_exact(write):
    text = report.report(figures.read([write("eval/methods", _methods())]))
    tables = _cells(text)
    fast = next(cells for caption, cells in tables.items() if "tokens per step 4" in caption)
    assert fast[0] == ["K (of the prefix)", "exact", "mage", "quest", "recall, %"]
    assert fast[1][0] == "64 (3.2 %)" and fast[1][1] == "100.0 [92.9, 100.0]" and fast[1][2].startswith("98.0 [")
    assert fast[1][3].endswith("\u2212") and not fast[1][2].endswith("\u2212") and fast[1][4] == "85.0"
    slow = next(cells for caption, cells in tables.items() if "tokens per step 1" in caption)
    assert slow[1][1].startswith("60.0 [") and slow[1][3].endswith("+") and not slow[2][3].endswith("+")
    assert "4 comparisons together" in next(iter(caption for caption in tables if "tokens per step 4" in caption))
    assert text.count('class="score grey"') == 6


def test_cells_of_more_cases_stand_beside_exact_on_as_many(write, tmp_path):
    """A file of more cases has some cells of another one's grid, and exact's."""
    rows = [row for row in _methods() if row["tokens_per_step"] == 4]
    few = [row for row in rows if row["K"] != 0 and (row["K"], row["method"]) != (256, "mage")]
    more = [_exact(480, 500), _score("mage", 490, n=500, exact=480, K=256, recall=0.9)]
    files = figures.read([write("eval/methods", few).rename(tmp_path / "few.json"), write("eval/methods", more)])
    tables = {caption.split("; ")[1]: lines for caption, lines in _cells(report.report(files)).items() if caption}
    assert tables["n = 50"][1][:3] == ["64 (3.2 %)", "100.0 [92.9, 100.0]", "98.0 [89.5, 99.6]"]
    assert tables["n = 50"][2][:3] == ["256 (12.8 %)", "100.0 [92.9, 100.0]", ""]
    assert tables["n = 500"][1][:3] == ["256 (12.8 %)", "96.0 [93.9, 97.4]", "98.0 [96.4, 98.9]"]
    (drawing,) = figures.drawings(files)
    (axes,) = drawing.draw().axes
    assert axes.get_title() == "tokens per forward: 4, n = 50 and 500"
    assert next(line for line in axes.lines if line.get_label() == "exact").get_ydata()[0] == 0.96


def test_thresholds_have_their_forwards(write):
    tables = _cells(report.report(figures.read([write("eval/thresholds", _thresholds())])))
    costs = next(cells for caption, cells in tables.items() if "Forwards per answer" in caption)
    assert costs[0][:6] == ["task", "tokens", "method", "K (of the prefix)", "g, dense layers", "threshold"]
    assert costs[2] == ["needle", "2048", "quest", "64 (3.2 %)", "1, 2", "0.5", "5.00", "4.00", "1.100 [1.000, 1.300]"]
    scores = next(cells for caption, cells in tables.items() if "% of the cases" in caption)
    assert scores[0] == ["threshold", "exact", *NAMES] and scores[2][0] == "0.9" and scores[2][3].startswith("80.0 [")


def test_scores_of_benchmarks(write):
    more = {"diff_low": -0.05, "diff_high": 0.01, "prompt_tokens": 9000.0, "K_share": 0.0625, "sparse_items": 0.9}
    row = {key: value for key, value in _score("mage", 15, exact=16).items() if "tokens" not in key}
    rows = [_exact(16, **more), {**row, "task": "hotpotqa", **more}]
    text = report.report(figures.read([write("eval/longbench", rows)]))
    cells = next(cells for caption, cells in _cells(text).items() if "Scores times 100" in caption)
    assert cells[1][:7] == ["hotpotqa", "mage", "64 (6.2 %)", "1, 2", "50", "9000", "90.0"] and len(cells) == 2
    assert cells[1][7].startswith("30.0 [") and cells[1][8:] == ["32.0", "-2.0 [-5.0, 1.0]"]


def test_fine_tuning_stands_beside_its_control(write):
    checks = {"check_kl": 0.03, "check_sparse_answer": 0.02}
    rows = [_exact(45, weights="tuned"), _score("mage", 20, exact=45, weights="control", steps=100, **checks)]
    more = {"control_only": 1, "tuned_only": 16, "p_control": 2.7e-4, "steps": 100, **checks}
    rows += [_score("mage", 35, exact=45, weights="tuned", **more), _score("mage", 9, exact=39, weights="tuned", K=128)]
    rows.append({"task": "measure", "method": "finetune", "weights": "random:1.5B", "K": 512, "seconds_per_step": 0.75})
    tables = _cells(report.report(figures.read([write("eval/finetune", rows)])))
    cells = next(cells for caption, cells in tables.items() if caption.startswith("needle, 2048 tokens; n = 50"))
    assert cells[1] == ["64 (3.2 %)", "1, 2", "control", cells[1][3], "90.0", "", "", "", "100", "0.03", "0.02"]
    assert cells[1][3].startswith("40.0 [") and cells[2][3].startswith("70.0 [")
    assert cells[2][5:] == ["1", "16", "0.00027", "100", "0.03", "0.02"] and len(cells) == 4
    assert tables[""][-1][-1] == "0.75"


def test_report_has_what_ran_and_the_card(write):
    paths = [write(suite, make()) for suite, make in SUITES.items()]
    text = report.report(figures.read(paths))
    runs = re.search(r'<table class="run">.*?</table>', text, re.DOTALL)[0]
    assert runs.count("abc1234") == runs.count("<td>cpu</td>") == len(paths)
    assert runs.count(builtin.NAME) == len(paths) - 1
    assert "task needle, sampler low_confidence_static, T 8, tokens 2048" in runs
    assert "Low-rank factors on all seven linears" in text and 'id="card"' in text
    for name in builtin.names():  # each with its own part of the card
        card = report.report(figures.read([write("eval/methods", _methods(), model=name)])).partition('id="card"')[2]
        assert [other for other in builtin.names() if f"\n## {other}\n" in card] == [name] and "\n## Licence\n" in card
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 13 and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert len(text) < 3_000_000
    assert "Low-rank" not in report.report(figures.read([write("eval/methods", _methods(), model="other")]))
    assert "my &lt;card&gt;" in report.report(figures.read(paths[:1]), card="my <card>")


def test_an_unknown_suite_and_odd_texts(write):
    rows = [
        {"task": "<td><script>alert(1)</script>", "value": 0.123456, "list": [1, 2], "case": {"model": "\u202ex\x00"}}
    ]
    text = report.report(
        figures.read([write("eval/new", [{**row, "n": n} for row in rows for n in range(20)], model="<b>&\"'\n")])
    )
    assert "&lt;td&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script>" not in text
    assert "0.1235" in text and "\u27e8U+202E\u27e9x\u2400" in text and "<summary>20 rows</summary>" in text
    assert "Evaluation of &lt;b&gt;&amp;&quot;&#x27;\u21b5" in text


def test_recall_of_earlier_weights_is_a_figure_of_its_own(write):
    rows = _recall()
    early = [{**row, "weights": name} for name in ("stage-0", "stage-1") for row in rows if row["control"] == "none"]
    files = figures.read([write("eval/recall", early + rows)])
    plain = figures.read([write("eval/recall", rows)])
    stems = [drawing.stem for drawing in figures.drawings(files)]
    assert stems == ["recall_progress_prose_2048_g1", *(drawing.stem for drawing in figures.drawings(plain))]
    (axes, *_) = next(figures.drawings(files)).draw().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stage-0", "stage-1", "finished"]
    mage = next(line for line in axes.lines if line.get_label() == "mage")
    assert list(mage.get_ydata()) == [0.9] * 3
    page = report.report(files)
    assert "earlier weights stage-1" in page and "recall_progress" not in page


@pytest.mark.skipif(browser.chromium() is None, reason="chromium is not installed")
def test_report_in_a_browser(write, tmp_path):
    paths = [write(suite, make()) for suite, make in SUITES.items()]
    assert cli.main(["eval", "report", "--files", *map(str, paths), "--out", str(tmp_path / "report.html")]) == 0
    opened = browser.open_page(tmp_path / "report.html", tmp_path / "profile")
    assert opened.console == []
    assert opened.find("h1")[0].text == f"Evaluation of {builtin.NAME}"
    images = opened.find("img")
    assert len(images) == 13 and all(image.attributes["src"].startswith("data:image/png;base64,") for image in images)
    linked = {element.attributes["href"] for element in opened.find("a")}
    assert linked == {f"#{element.attributes['id']}" for element in opened.find("h2")} and len(linked) == 8
    assert opened.find("script") == [] and opened.find("link") == []
    signs = [b.text for td in ("below", "above") for b in opened.find("b", td)]
    assert signs.count("\u2212") == 3 and signs.count("+") == 2  # two of them in the legend


def test_files_of_the_tree_become_a_report():
    paths = sorted((ROOT / "bench" / "results").glob("**/eval/**/*.json"))
    assert paths
    by_model = {}
    for path in paths:
        by_model.setdefault((json.loads(path.read_text())["model"], path.parent), []).append(path)
    for group in by_model.values():
        text = report.report(figures.read(group))
        assert all(f'<p class="dim">{path.name}</p>' in text for path in group)


def test_the_other_training_seed_stands_in_page_and_terminal(write, tmp_path, capsys):
    rows = _methods()
    turned = [dict(row) for row in rows]
    for row in turned:
        if row["method"] == "quest" and row["tokens_per_step"] == 4:
            row |= _tested("quest", 49, 1, 2, row["p_mage"], K=row["K"])
    first = str(write("eval/methods", rows, model="smollm2-cut16-block", first_seed=1000))
    folder = tmp_path / "other"
    folder.mkdir()
    other = write("eval/methods", turned, model="smollm2-cut16-block-seed1", first_seed=1000).rename(folder / "o.json")
    first = str(write("eval/methods", rows, model="smollm2-cut16-block", first_seed=1000))
    out = tmp_path / "page.html"
    arguments = ["eval", "report", "--files", first, "--out", str(out)]
    assert cli.main(arguments) == 0
    alone = out.read_text()
    assert "Do two training seeds" not in capsys.readouterr().out + alone and "<b>=</b>" not in alone
    assert cli.main([*arguments, "--other-seed", str(other)]) == 0
    told, page = capsys.readouterr().out.splitlines(), out.read_text()
    # What the terminal says stands in the page, word by word.
    for line in told[:-1]:
        question, answer = line.split("? ", 1)
        assert f"<td>{html.escape(answer, quote=True)}</td>" in page
        assert html.escape(f"{question}?", quote=True) in page
    seeds = next(line for line in told if line.startswith("Do two training seeds of the model agree?"))
    assert "needle, 2048 tokens, T = 8 100.0 [92.9, 100.0] (50) and 100.0 [92.9, 100.0] (50);" in seeds
    assert "are ties: 2: 2 of methods. Commits: abc1234 and abc1234." in seeds
    assert "better in 0, no difference shown in 0, worse in 0, tie in 2 of 2 cells" in page
    fast = next(cells for caption, cells in _cells(page).items() if "tokens per step 4" in caption)
    assert fast[1][3].endswith("=") and "=: not with the other training seed" in page
    slow = next(cells for caption, cells in _cells(page).items() if "tokens per step 1" in caption)
    assert slow[1][3].endswith("+")  # exact is below 80 % there, so the other seed has no say
    assert "What ran: 2 files" in page and "o.json" in page


def test_recall_of_the_other_training_seed_must_have_its_keys(write, tmp_path, capsys):
    first = str(write("eval/recall", _recall(), model="m", first_seed=0).rename(tmp_path / "first.json"))
    rows = [{key: value for key, value in row.items() if key != "ci_low"} for row in _recall()]
    other = str(write("eval/recall", rows, model="m-seed1", first_seed=0))
    out = str(tmp_path / "out.html")
    assert cli.main(["eval", "report", "--files", first, "--other-seed", other, "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"other_seed: rows of '{other}' for the answer 'recall' must have the key 'ci_low'" in error
    # What no answer reads, but a table.
    times = str(write("eval/thresholds", _thresholds(), model="m", first_seed=0).rename(tmp_path / "times.json"))
    rows = [{key: value for key, value in row.items() if key != "forwards_ratio"} for row in _thresholds()]
    there = str(write("eval/thresholds", rows, model="m-seed1", first_seed=0).rename(tmp_path / "there.json"))
    assert cli.main(["eval", "report", "--files", times, "--other-seed", there, "--out", out]) == 2
    assert "other_seed: rows of there.json must have the key 'forwards_ratio'" in capsys.readouterr().err
    # What is missing in the first seed's files is told of these.
    assert cli.main(["eval", "report", "--files", other, "--out", out]) == 2
    assert "mage: error: files: rows " in capsys.readouterr().err and not Path(out).exists()


def test_runs_that_ended_early_and_files_without_answers_are_told(write, tmp_path, capsys):
    path = write("eval/methods", _methods(), first_seed=0)
    out = tmp_path / "out.html"
    arguments = ["eval", "report", "--files", str(path), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "Not complete" not in capsys.readouterr().out + out.read_text()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    assert cli.main(arguments) == 0
    line = f"Not complete, the run ended early: {path}"
    assert capsys.readouterr().out.startswith(line + "\n") and html.escape(line) in out.read_text()
    out.unlink()
    heatmap = str(write("eval/heatmap", _heatmap()))
    assert cli.main(["eval", "report", "--files", heatmap, "--out", str(out)]) == 0
    assert "These files answer none of the questions" in capsys.readouterr().out and out.exists()
    out.unlink()
    bench = tmp_path / "block_attention.json"
    bench.write_text(json.dumps({"name": "block_attention", "rows": [{"case": {"model": "7B"}, "us": 1.0}]}))
    assert cli.main(["eval", "report", "--files", str(bench), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "files: must answer a question or be of an evaluation, got block_attention alone" in error
    assert not out.exists()


def test_what_is_no_other_training_seed_is_refused(write, tmp_path, capsys):
    def file(name, suite="eval/methods", model="smollm2-cut16-block-seed1", first_seed=1000, rows=None):
        path = write(suite, SUITES[suite]() if rows is None else rows, model=model, first_seed=first_seed)
        return str(path.rename(tmp_path / f"{name}.json"))

    first = file("first", model="smollm2-cut16-block")
    out = str(tmp_path / "out.html")
    good = file("good")
    few = [row | ({"n": 24} if row["K"] == 256 else {}) for row in _methods()]
    few = [row | ({"mage_only": 1} if row["n"] == 24 and "mage_only" in row else {}) for row in few]
    for other, message in (
        ([good, good], f"other_seed: must be different files, got {good!r} twice"),
        (["none.json"], "other_seed: must name files that exist, got 'none.json'"),
        (
            [file("b", model="smollm2-135m-block")],
            "of the model of files trained with another seed, named smollm2-cut16-block with -seedN behind it, got "
            "smollm2-135m-block in ",
        ),
        ([file("same", model="smollm2-cut16-block")], "trained with another seed, got smollm2-cut16-block in "),
        (
            [file("zero", first_seed=0)],
            "other_seed: must have the first_seed of files, 1000, got 0 of eval/methods in ",
        ),
        (
            [file("prose", "eval/prose")],
            "other_seed: must be of suites that files have (eval/methods), got eval/prose in ",
        ),
        (
            [file("words", rows=[row | {"task": "lines"} for row in _methods()])],
            "other_seed: must have cases that files have too, got none of eval/methods in ",
        ),
        (
            [file("few", rows=few)],
            f"other_seed: n of row 4 of '{tmp_path}/few.json' must be at least 25, half of that in files, got 24, of ",
        ),
        ([file("exact", rows=_without("exact"))], f"other_seed: rows of '{tmp_path}/exact.json' for the answer "),
        (
            [file("low", rows=_without("ci_low"))],
            f"other_seed: rows of '{tmp_path}/low.json' for the answer 'seeds' must ",
        ),
        ([file("n", rows=_without("n"))], f"other_seed: rows of '{tmp_path}/n.json' for the answer "),
        ([file("lone", rows=_without("mage_only"))], "for the answer 'methods' must have the key 'mage_only'"),
    ):
        assert cli.main(["eval", "report", "--files", first, "--other-seed", *other, "--out", out]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    # However many cases the first seed's cell has, 200 are enough.
    many = file("many", model="smollm2-cut16-block", rows=[row | {"n": 500} for row in _methods()])
    arguments = ["eval", "report", "--files", many, "--out", out, "--other-seed"]
    assert cli.main([*arguments, file("enough", rows=[row | {"n": 200} for row in _methods()])]) == 0
    assert cli.main([*arguments, file("less", rows=[row | {"n": 199} for row in _methods()])]) == 2
    assert "/less.json' must be at least 200, got 199, of " in capsys.readouterr().err
    assert cli.main(["eval", "report", "--files", first, "--other-seed", good, "--out", good]) == 2
    assert f"eval: out must be none of other_seed, got {good!r}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def _without(key):
    return [{name: value for name, value in row.items() if name != key} for row in _methods()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bad.json must be JSON"),
        ("[" * 100_000, "bad.json must be JSON, got: maximum recursion depth"),
        ("[]", 'bad.json must be an object with a text "name"'),
        ('{"name": 7, "rows": [{"K": 1}]}', 'bad.json must have a text "name", got 7'),
        ('{"rows": [{"K": 1}]}', 'bad.json must have a text "name", got None'),
        ('{"name": "eval/methods"}', 'bad.json must have "rows", a list of objects'),
        ('{"name": "eval/methods", "rows": [1]}', 'bad.json must have "rows", a list of objects'),
        (
            json.dumps({"name": "eval/methods", "model": "m", "rows": _without("score")}),
            "bad.json must have the key 'score' of eval/",
        ),
        (
            json.dumps({"name": "eval/recall", "model": "m", "rows": [{"K": 1}]}),
            "bad.json must have the key 'study' of eval/recall",
        ),
        ('{"name": "eval/methods", "rows": [{"K": 1}]}', 'bad.json must have a text "model", got None'),
        ('{"name": "eval/methods", "model": ["m"], "rows": [{"K": 1}]}', """must have a text "model", got ['m']"""),
        *(
            (
                json.dumps({"name": "eval/methods", "model": "m", "first_seed": seed, "rows": [{"K": 1}]}),
                f"first_seed of bad.json must be a whole number of at least 0, got {seed!r}",
            )
            for seed in ("1000", 0.5, None, True, -1)
        ),
    ],
    ids="json, deep, object, name, no name, rows, row, score, study, no model, model, "
    "seed in text, half a seed, null as seed, true as seed, seed below 0".split(", "),
)
def test_broken_files_are_named(tmp_path, capsys, text, message):
    (tmp_path / "bad.json").write_text(text)
    arguments = ["--files", str(tmp_path / "bad.json"), "--out", str(tmp_path / "out")]
    for command in ("report", "figures"):
        assert cli.main(["eval", command, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mage: error: ") and message in error and error.count("\n") == 1


def test_without_matplotlib_it_is_named(write, tmp_path, capsys, monkeypatch):
    path, out = str(write("eval/methods", _methods())), tmp_path / "out"
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for command in ("report", "figures"):
        assert cli.main(["eval", command, "--files", path, "--out", str(out)]) == 2
        assert capsys.readouterr().err == "mage: error: figures: need matplotlib: pip install '.[plot]'\n"
        assert not out.is_file()


def test_other_mistakes(write, tmp_path, capsys):
    good = str(write("eval/methods", _methods()))
    other = str(write("eval/prose", _prose(), model="other"))
    unknown = str(write("eval/new", [{"x": 1}]))
    out = str(tmp_path / "out")
    for arguments, message in (
        (["report", "--files", "no-such.json", "--out", out], "files: must name files that exist, got 'no-such.json'"),
        (["report", "--files", str(tmp_path), "--out", out], f"must name files, got the folder {str(tmp_path)!r}"),
        (
            ["report", "--files", good, "--other-seed", str(tmp_path), "--out", out],
            f"other_seed: must name files, got the folder {str(tmp_path)!r}",
        ),
        (["report", "--files", good, "--out", "no/such/report.html"], "out must be in a folder that exists"),
        (
            ["report", "--files", good, other, "--out", out],
            f"files: must be of one model, got {builtin.NAME} in {good!r}, other in {other!r}",
        ),
        (["report", "--files", good, "--card", "no-such-card", "--out", out], "no-such-card"),
        (["figures", "--files", good, "--out", ""], "eval: out must be a folder that can be written, made if needed"),
        (
            ["figures", "--files", good, "--out", good],
            f"eval: out must be a folder that can be written, made if needed, got {good!r}",
        ),
        (["figures", "--files", good, "--out", f"{good}/x"], f"made if needed, got '{good}/x': Not a directory"),
        (
            ["figures", "--files", unknown, "--out", out],
            "eval: files must hold rows that figures are drawn of, got none",
        ),
    ):
        assert cli.main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err
    twice = write("eval/recall", _recall() + [row | {"kept": 0.5} for row in _recall()])
    with pytest.raises(ValueError, match=r"must have a case once, got row 1 of '.*' and row .*\{'study': 'recall'"):
        _drawn(twice)


@pytest.mark.parametrize(
    ("suite", "key", "value", "expected"),
    [
        ("eval/methods", "task", ["needle"], "a text, got ['needle']"),
        ("eval/methods", "tokens", None, "a whole number of at least 0, got None"),
        ("eval/methods", "K", "64", "a whole number of at least 0, got '64'"),
        ("eval/methods", "n", -5, "a whole number of at least 1, got -5"),
        ("eval/methods", "score", 7.0, "in [0, 1], got 7.0"),
        ("eval/methods", "exact", math.nan, "a number, got nan"),
        ("eval/methods", "tokens", 10**400, "a whole number of at least 0, got 1000"),
        ("eval/heatmap", "ci_low", None, "a number, got None"),
        ("eval/finetune", "check_kl", "low", "a number, got 'low'"),
        ("eval/prose", "kl_low", True, "a number, got True"),
        ("eval/recall", "x", "0.5", "a list of numbers, got '0.5'"),
        ("eval/recall", "score", -0.5, "in [0, 1], got -0.5"),
        ("eval/recall", "recall_by_forward", [0.5, "1"], "a list of numbers, got [0.5, '1']"),
        ("generate", "us", "fast", "a number, got 'fast'"),
        ("generate", "case", [1], "an object, got [1]"),
    ],
)
def test_a_value_of_another_kind_is_named(write, suite, key, value, expected):
    rows = (SUITES | {"eval/finetune": _methods})[suite]()
    path = write(suite, [rows[0] | {key: value}, *rows[1:]])
    with pytest.raises(ValueError, match=re.escape(f"files: {key} of row 1 of {path.name} must be {expected}")):
        figures.read([path])


@pytest.mark.parametrize(
    ("suite", "change", "message"),
    [
        ("eval/methods", {"p_mage": -0.1}, "p_mage of {} must be in [0, 1], got -0.1"),
        ("eval/tuned", {"p_g1": 1.5}, "p_g1 of {} must be in [0, 1], got 1.5"),
        ("eval/finetune", {"p_control": 2}, "p_control of {} must be in [0, 1], got 2"),
        ("eval/tune", {"score": 1.2}, "score of {} must be in [0, 1], got 1.2"),
        ("eval/methods", {"exact": 1.01}, "exact of {} must be in [0, 1], got 1.01"),
        ("eval/needles", {"found_of_exact": 3.0}, "found_of_exact of {} must be in [0, 1], got 3.0"),
        ("eval/recall", {"recall_by_forward": [0.9, 1.1]}, "recall_by_forward of {} must be in [0, 1], got [0.9, 1.1]"),
        ("eval/recall", {"study": "alignment", "score": -1.5}, "score of {} must be in [-1, 1], got -1.5"),
        ("eval/methods", {"ci_low": 0.9, "ci_high": 0.8}, "ci_low of {} must be at most ci_high = 0.8, got 0.9"),
        (
            "eval/methods",
            {"score": 0.1, "ci_low": 0.25, "ci_high": 0.5},
            "score of {} must be in [ci_low, ci_high] = [0.25, 0.5], got 0.1",
        ),
        ("eval/prose", {"score": 4.0}, "score of {} must be in [ci_low, ci_high] = [3.3, 3.8], got 4.0"),
        (
            "eval/prose",
            {"delta_low": 1.0, "delta_high": 0.5},
            "delta_low of {} must be at most delta_high = 0.5, got 1.",
        ),
        ("eval/prose", {"kl": -0.01}, "kl of {} must be at least 0, got -0.01"),
        ("eval/finetune", {"check_kl": -1}, "check_kl of {} must be at least 0, got -1"),
        ("eval/methods", {"mage_only": 51}, "mage_only of {} must be at most n = 50, got 51"),
        (
            "eval/methods",
            {"score": 0.8, "ci_low": 0.7, "g1_only": 11},
            "g1_only of {} must be at most 10, the cases wrong by score, got 11",
        ),
        (
            "eval/tuned",
            {"score": 0.8, "ci_low": 0.7, "method_only": 41},
            "method_only of {} must be at most 40, the cases right by score, got 41",
        ),
    ],
)
def test_a_value_that_can_not_be_is_named(write, tmp_path, capsys, suite, change, message):
    rows = (SUITES | dict.fromkeys(["eval/tuned", "eval/finetune", "eval/tune", "eval/needles"], _methods))[suite]()
    path = write(suite, [rows[0] | change, *rows[1:]])
    assert cli.main(["eval", "report", "--files", str(path), "--out", str(tmp_path / "page.html")]) == 2
    told = message.format(f"row 1 of {path.name}")
    assert capsys.readouterr().err.startswith(f"mage: error: files: {told}")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("suite", "change"),
    [
        ("eval/methods", {"score": 1.0, "ci_low": 0.9, "ci_high": 0.9999999999999999}),
        ("eval/methods", {"p_mage": None, "kv_share": 1.23, "kept_mass": 1.0000002}),
        ("eval/methods", {"score": 0.8, "ci_low": 0.7, "mage_only": 10, "method_only": 40, "p_mage": 1}),
        ("eval/prose", {"kl": -0.00005, "kl_low": -0.00009, "over_mage": -0.5}),
        ("eval/recall", {"study": "budget", "score": -0.5, "ci_low": -0.6, "ci_high": -0.4, "kept": 1.06}),
        ("eval/new", {"score": 7.0, "ci_low": 9.0, "ci_high": 8.0, "p_mage": 3.0}),
    ],
    ids=["rounding", "shares of costs", "all cases", "divergence", "correlation", "unknown suite"],
)
def test_values_at_the_border_are_taken(write, suite, change):
    rows = SUITES.get(suite, _methods)()
    (file,) = figures.read([write(suite, [rows[0] | change, *rows[1:]])])
    assert file.rows[0].items() >= change.items()


def test_every_p_value_has_its_range():
    told = {key for key in figures._KIND_OF if key.startswith("p_")}
    assert told and all(figures._RANGE_OF[key] == (0, 1) for key in told)


def test_cases_of_two_files_are_not_mixed(write, tmp_path):
    first = write("eval/methods", _methods(), first_seed=1000)
    other = first.rename(tmp_path / "other.json")
    second = write("eval/methods", _methods(), first_seed=0)
    with pytest.raises(ValueError, match=r"of eval/methods must have one first_seed, got 1000 in .*other.json', 0 in"):
        figures.read([other, second])
    second = write("eval/methods", _methods(), first_seed=1000)
    with pytest.raises(ValueError, match=r"must have a case once, got row 1 of .*other.json' and row 1 of"):
        figures.read([other, second])
    for paths in (None, "other.json", [5]):
        with pytest.raises(TypeError, match="read: paths must be a "):
            figures.read(paths)


def test_a_row_that_stands_twice_is_refused(write):
    rows = _methods()
    path = write("eval/methods", [*rows, dict(reversed(rows[2].items()))])  # another order of keys is the same row
    with pytest.raises(
        ValueError, match=rf"files: rows of {path.name} must differ, got row 3 again as row {len(rows) + 1}"
    ):
        figures.read([path])
