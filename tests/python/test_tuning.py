"""Trials, winners and tuned comparisons. Run: pytest tests/python/test_tuning.py"""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from mage_ext import cli
from mage_ext.denoise import DenoiseConfig, prefill
from mage_ext.evaluation import answers, figures, needles, tuning
from mage_ext.evaluation import method_comparison as comparison
from mage_ext.evaluation.method_comparison import Setting
from mage_ext.evaluation.tuning import TRIALS
from mage_ext.sampling import SamplerConfig
from mage_ext.testing.tiny import tiny_config, tiny_model

SAMPLER = SamplerConfig("low_confidence_static", tokens_per_step=2)


@functools.cache
def _loaded():
    model = tiny_model(tiny_config("sdar_b16", num_layers=6), seed=1)
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    return SimpleNamespace(model=model, config=model.config, tokenizer=tokenizer)


class _Case:
    """A case that even sums of an answer's tokens find."""

    def found(self, text):
        return [sum(map(int, text.split())) % 2 == 0]


def _cases(lengths=(52, 90, 71)):
    generator = torch.Generator().manual_seed(0)
    mask_id = _loaded().config.mask_id
    return [(_Case(), torch.randint(1, mask_id, (n,), generator=generator).tolist()) for n in lengths]


def _row(method, trial, found, n=10, **cell):
    cell = {"task": "lines", "tokens": 2048, "T": 8, "K": 64, "g": 1, "dense_layers": 2} | cell
    settings = comparison.settings_text(TRIALS[method][trial])
    return {**cell, "method": method, "trial": trial, "settings": settings, "n": n, "score": found / n, "kv_share": 0.5}


def _rows(found, n=10, **cell):
    """Rows of one cell; found: cases by method, one number per trial."""
    exact = {"task": "lines", "tokens": 2048, "T": 8, "K": 0, "g": 0, "dense_layers": -1, "method": "exact"}
    rows = [{**exact, **{k: v for k, v in cell.items() if k in exact and k not in ("K", "g")}, "n": n, "score": 1.0}]
    for method, own in found.items():
        rows += [_row(method, trial, each, n, **cell) for trial, each in enumerate(own)]
    return rows


FIRST = {"mage": [5, 5, 4, 5], "quest": [1, 2, 3, 3], "tidal": [0, 0, 0, 0], "sparsed": [6, 5, 9, 9]}
SECOND = {"mage": [5, 6, 4, 5], "quest": [1, 2, 3, 3], "tidal": [0, 0, 1, 0], "sparsed": [6, 9, 3, 2]}


def _whole():
    return _rows(FIRST) + _rows(SECOND, g=32)


def _write(path, rows, first=0, complete=True, more=None, name=tuning.SUITE):
    more = tuning.head(rows) if more is None else more
    needles.write_rows(path, name, "tiny", "cpu", "abc", rows, first, complete, more)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Trials


def test_every_method_has_the_same_number_of_different_trials():
    assert set(TRIALS) == {"mage", "quest", "tidal", "sparsed"}
    assert {len(own) for own in TRIALS.values()} == {4}
    for own in TRIALS.values():
        assert own[0] == {}  # the default
        assert len({comparison.settings_text(each) for each in own}) == 4


def test_every_trial_is_another_configuration():
    loaded = _loaded()
    state = prefill(loaded.model, [ids for _, ids in _cases()])
    base = DenoiseConfig(sampler=SAMPLER)  # 8 forwards of a block of 16

    def of(name, settings):
        found = comparison.configs(
            loaded.model, state.batch.cache, Setting(16, 1, 2), base, [name, "random"], {name: settings}
        )
        assert set(found) == {name, "random"} and found["random"].selection.score == "mean"
        config = found[name]
        method = config.method
        own = config.selection if method is None else method.selection
        told = (own.score, own.score_rows, own.norm, config.exact_steps)
        return (*told, getattr(method, "norm", None), getattr(method, "anchors", None))

    found = {name: [of(name, settings) for settings in own] for name, own in TRIALS.items()}
    assert all(len(set(own)) == 4 for own in found.values())
    assert found["mage"] == [
        ("mean", "all", "context", 1, None, None),
        ("max", "all", "context", 1, None, None),
        ("mean", "open", "context", 1, None, None),
        ("mean", "all", "prefix", 1, None, None),
    ]
    assert [(each[0], each[4]) for each in found["quest"]] == [
        ("max", "none"),
        ("mean", "none"),
        ("max", "prefix"),
        ("mean", "prefix"),
    ]
    assert [(each[5], each[0]) for each in found["tidal"]] == [
        ((2, 4), "mean"),
        ((2, 3), "mean"),
        ((2, 3, 4, 5), "mean"),
        ((2, 4), "max"),
    ]
    assert [(each[3], each[0]) for each in found["sparsed"]] == [(2, "mean"), (3, "mean"), (2, "max"), (3, "max")]
    state.release()


def test_trials_share_a_prefill_and_the_first_is_what_runs_untuned():
    loaded, wanted, cases = _loaded(), [Setting(16, 1, 1)], _cases((52, 90))
    lines = []
    whole = tuning.compare_trials(loaded, cases, wanted, SAMPLER, lines.append)
    assert len(lines) == 1 and lines[0].startswith("K=16 g=1 dense=1: of 2 exact")
    labels = [f"{name} {number}" for name in TRIALS for number in range(4)]
    assert list(whole.scores) == [(setting, label) for setting in wanted for label in labels]
    plain = comparison.compare(loaded, cases, wanted, tuple(TRIALS), SAMPLER, with_recall=False)
    for (setting, name), score in plain.scores.items():
        tokens = [result.tokens for result in score.results]
        assert [result.tokens for result in whole.scores[setting, f"{name} 0"].results] == tokens
    chosen = {name: own[-1] for name, own in TRIALS.items()}
    tuned = comparison.compare(loaded, cases, wanted, tuple(TRIALS), SAMPLER, None, False, chosen)
    for (setting, name), score in tuned.scores.items():
        tokens = [result.tokens for result in score.results]
        assert [result.tokens for result in whole.scores[setting, f"{name} 3"].results] == tokens
    rows = tuning._rows(whole, "lines", 64)
    assert len(rows) == 1 + 16 and json.loads(json.dumps(rows)) == rows
    assert all("kept_mass" not in row and row["n"] == 2 for row in rows)
    assert sum(map(len, tuning.means(rows).values())) == 16
    lines = tuning.table(rows)
    assert len(lines) == 17 and sum(line.endswith("*") for line in lines) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Winners


def test_winners_against_hand_worked_means():
    # MAGE: 5, 5.5, 4, 5 of 10. Quest: 1, 2, 3, 3, the earlier of two. Tidal: 0, 0, .5, 0. SparseD: 6, 7, 6, 5.5.
    rows = _whole()
    assert tuning.winners(rows) == {"mage": 1, "quest": 2, "tidal": 2, "sparsed": 1}
    assert [float(mean) for mean in tuning.means(rows)["sparsed"]] == [0.6, 0.7, 0.6, 0.55]
    # Of one cell alone defaults win where nothing is better.
    assert tuning.winners(_rows(FIRST)) == {"mage": 0, "quest": 2, "tidal": 0, "sparsed": 2}
    # A tie that float64 would break: 0.1 + 0.2 > 0.3.
    tie = {name: [0, 0, 0, 0] for name in TRIALS}
    rows = _rows(tie | {"mage": [3, 1, 0, 0]}) + _rows(tie | {"mage": [0, 2, 0, 0]}, g=32)
    assert tuning.winners(rows)["mage"] == 0
    # Scores that a file keeps with five digits.
    rows = [{**row, "score": round(row["score"], 5)} for row in _rows(FIRST, 12) + _rows(FIRST, 12, task="four_lines")]
    assert tuning.winners(rows) == {"mage": 0, "quest": 2, "tidal": 0, "sparsed": 2}


def test_winners_need_every_trial_in_every_cell():
    rows = _whole()
    with pytest.raises(
        ValueError, match=r"every trial in every cell, got none of sparsed 3, \('lines', 2048, 8, 64, 32"
    ):
        tuning.winners(rows[:-1])
    with pytest.raises(ValueError, match=r"a trial once in a cell, got .* twice"):
        tuning.winners([*rows, rows[-1]])
    with pytest.raises(ValueError, match=r"rows must have one n, got \[9, 10\]"):
        tuning.winners([*rows[:-1], {**rows[-1], "n": 9}])
    with pytest.raises(ValueError, match="at least one cell, got none"):
        tuning.winners(rows[:1])
    with pytest.raises(ValueError, match=r"rows must be of 4 trials of mage, .*, got others"):
        tuning.winners([*rows, {**rows[-1], "method": "recency"}])


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_file_gives_its_winners_settings(tmp_path):
    tuned = tuning.read(_write(tmp_path / "t.json", _whole(), first=40))
    assert tuned.settings == {
        "mage": {"score": "max"},
        "quest": {"norm": "prefix"},
        "tidal": {"anchors": (0, 0.25, 0.5, 0.75)},
        "sparsed": {"skip_share": 0.3},
    }
    assert tuned.told == "tiny, seeds 40 to 49" and tuned.seeds == range(40, 50)
    for first, n in ((0, 40), (50, 200), (1000, 1)):
        tuned.check_seeds(first, n)
    for first, n in ((0, 41), (49, 1), (45, 2), (0, 100)):
        with pytest.raises(ValueError, match=r"seeds other than 40 to 49 of '.*t\.json', got"):
            tuned.check_seeds(first, n)


BAD = {
    "no_json": (lambda whole: "{", "no JSON"),
    "deep": (lambda whole: "[" * 100_000, "no JSON: maximum recursion depth"),
    "list": (lambda whole: [], "\"name\" must be 'eval/tune', got 'list'"),
    "other_suite": (lambda whole: {**whole, "name": "eval/methods"}, "got 'eval/methods'"),
    "unfinished": (lambda whole: {**whole, "complete": False}, '"complete" must be true, got False'),
    "model": (lambda whole: {**whole, "model": 3}, '"model" must be a text, got 3'),
    "seed": (lambda whole: {**whole, "first_seed": -1}, '"first_seed" must be a whole number of at least 0, got -1'),
    "n": (lambda whole: {**whole, "n": True}, '"n" must be a whole number of at least 1, got True'),
    "other_n": (lambda whole: {**whole, "n": 11}, "n of row 1 must be that of the file, 11, got 10"),
    "no_rows": (lambda whole: {**whole, "rows": []}, '"rows" must be a list of objects, at least one'),
    "row": (lambda whole: {**whole, "rows": [3]}, '"rows" must be a list of objects'),
    "lost_row": (lambda whole: {**whole, "rows": whole["rows"][:-1]}, "every trial in every cell, got none of sparsed"),
    "score": (lambda whole: _changed(whole, score=1.5), r"score of row 2 must be in \[0, 1\], got 1.5"),
    "K": (lambda whole: _changed(whole, K="64"), "K of row 2 must be a whole number, got '64'"),
    "task": (lambda whole: _changed(whole, task=None), "task of row 2 must be a text, got None"),
    "method": (lambda whole: _changed(whole, method="v1"), "method of row 2 must be of mage, quest, .*, got 'v1'"),
    "trial": (lambda whole: _changed(whole, trial=4), r"trial of row 2 must be in \[0, 4\), got 4"),
    "settings": (lambda whole: _changed(whole, settings="g=2"), "settings of row 2 must be 'default', got 'g=2'"),
    "trials": (lambda whole: {**whole, "trials": {}}, '"trials" must be those of this version'),
    "winners": (lambda whole: {**whole, "winners": {"mage": 0}}, '"winners" must be those of its rows'),
}


def _changed(whole, **more):
    return {**whole, "rows": [*whole["rows"][:1], {**whole["rows"][1], **more}, *whole["rows"][2:]]}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name, tmp_path, capsys):
    change, message = BAD[name]
    path = _write(tmp_path / f"bad_{name}.json", _whole())
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=rf"^tuned: path must be .*bad_{name}\.json': .*{message}"):
        tuning.read(path)
    assert cli.main(["eval", "methods", "--tuned", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mage: error: eval: tuned must be a complete file of `mage eval tune`, got '")
    assert f"bad_{name}.json" in told and told.count("\n") == 1


def test_the_commands_say_what_is_wrong(tmp_path, capsys):
    good, here = str(_write(tmp_path / "t.json", _whole())), str(tmp_path)
    for arguments, message in (
        (["methods", "--tuned", ""], "eval: tuned must be a complete file of `mage eval tune`, got ''"),
        (["methods", "--tuned", here], f"eval: tuned must be a complete file of `mage eval tune`, got {here!r}: Is a"),
        (["methods", "--tuned", here + "/no"], f"got '{here}/no': No such file"),
        (
            ["methods", "--tuned", good],
            f"eval: first_seed must give cases that tuned nothing, seeds other than 0 to 9 of {good!r}, got 0 to 199",
        ),
        (
            ["methods", "--tuned", good, "--first-seed", "1000", "--methods", "mage", "v1"],
            "eval: methods with tuned must be of exact, mage, quest, tidal, sparsed, recency, random, got 'v1'",
        ),
        (["tune", "--first-seed", "801"], "eval: first_seed must give cases of development, seeds below 1000, got 801"),
        (["tune", "--first-seed", "-1"], "eval: first_seed must be in [0, 4294967296), got -1"),
        (["tune", "--k", "64", "64"], "eval: k must be different values, got 64 64"),
        (["tune", "--n", "0"], "eval: n must be at least 1, got 0"),
        (["tune", "--tokens-per-step", "33"], "eval: tokens_per_step must be in [1, 32], got 33"),
    ):
        assert cli.main(["eval", *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told


# ----------------------------------------------------------------------------------------------------------------------
# From trials to a tuned comparison


def _runner(monkeypatch, first=0):
    cases = _cases()
    maker = SimpleNamespace(register=lambda seed, tokens, asked: cases[seed % 3])
    monkeypatch.setattr(needles, "_worker", {"loaded": _loaded(), "maker": maker})
    runner = object.__new__(needles.Runner)
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = first, 1, 2, None, None
    return runner


def test_tuned_methods_run_with_the_winners_settings(monkeypatch, tmp_path):
    wanted = [Setting(16, 1, 1)]
    steps = list(tuning.suite(_runner(monkeypatch), 3, wanted, ["lines"], [64]))
    assert [[row["n"] for row in rows] for rows in steps] == [[2] * 17, [3] * 17]
    tuned = tuning.read(_write(tmp_path / "t.json", steps[-1]))
    ran = []
    configs = comparison.configs

    def spy(model, cache, setting, base, names, settings=None):
        ran.append((tuple(names), settings))
        return configs(model, cache, setting, base, names, settings)

    monkeypatch.setattr(comparison, "configs", spy)
    runner = _runner(monkeypatch, 1000)
    rows = list(tuning.tuned_suite(runner, 3, wanted, tuned, ["lines"], ("exact", *TRIALS, "random"), [64]))[-1]
    assert ran == [((*TRIALS, "random"), tuned.settings)] * 2
    assert [row["method"] for row in rows] == ["exact", *TRIALS, "random"]
    texts = {name: comparison.settings_text(settings) for name, settings in tuned.settings.items()}
    assert {row["method"]: row["settings"] for row in rows[1:]} == texts | {"random": "default"}
    assert {row["tuned_on"] for row in rows} == {"tiny, seeds 0 to 2"} and "recall" not in rows[1]
    assert all(row["p_mage"] is not None for row in rows[2:])
    with pytest.raises(ValueError, match="first_seed must give cases that tuned nothing"):
        list(tuning.tuned_suite(_runner(monkeypatch, 2), 3, wanted, tuned, ["lines"]))
    with pytest.raises(ValueError, match=r"tuned: methods must be of exact, .*, got 'oracle'"):
        list(tuning.tuned_suite(runner, 3, wanted, tuned, ["lines"], ["mage", "oracle"]))


def _result(method, score, mage_only=0, method_only=0, **more):
    row = {"task": "lines", "tokens": 2048, "T": 8, "K": 64, "g": 1, "dense_layers": 2, "method": method, "n": 200}
    row |= {"score": score, "exact": 1.0, "kv_share": 0.25, "prefix_tokens": 2000.0, "ci_low": 0.0, "ci_high": 1.0}
    if method != "mage":
        p = comparison.mcnemar(mage_only, method_only)
        row |= {"mage_only": mage_only, "method_only": method_only, "p_mage": p}
    return row | more


def test_the_answer_tells_settings_and_what_they_changed():
    told = {"tuned_on": "tiny, seeds 0 to 199"}
    untuned = [_result("mage", 0.9), _result("quest", 0.5, 90, 10)]
    tuned = [
        _result("mage", 0.95, settings="score=max", **told),
        _result("quest", 0.8, 35, 5, settings="norm=prefix", kv_share=0.3, **told),
        _result("quest", 0.8, 0, 0, settings="norm=prefix", g=32, **told),
    ]

    seen = []

    def compared(rows, other):
        seen.append((rows, other))
        return "Compared.", ("head",), [["line"]]

    rows = {"eval/methods": untuned, tuning.TUNED_SUITE: tuned}
    text, head, table = tuning.answer(rows, {"eval/methods": untuned}, compared)
    assert seen == [({"eval/methods": tuned}, {})] and (head, table) == (("head",), [["line"]])
    assert text == (
        "Best of 4 trials each on tiny, seeds 0 to 199: mage score=max; quest norm=prefix. Compared. Found on average "
        "in 1 cells, where all of these were measured tuned and untuned, %, tuned for untuned: mage 95.0 for 90.0, K/V "
        "read 25.0 for 25.0; quest 80.0 for 50.0, K/V read 30.0 for 25.0."
    )
    # A cell that one method was not run in untuned counts for none of them.
    more = [_result("mage", 0.2, K=128)], [_result("mage", 0.4, K=128, settings="score=max", **told)]
    wider = {"eval/methods": untuned + more[0], tuning.TUNED_SUITE: tuned + more[1]}
    assert tuning.answer(wider, {}, compared)[0] == text
    apart = {"eval/methods": [more[0][0], untuned[1]], tuning.TUNED_SUITE: tuned + more[1]}
    assert tuning.answer(apart, {}, compared)[0].endswith(
        "Compared. No cell has all of quest, mage tuned and untuned, so there are no averages to compare."
    )
    tuning.answer(rows, rows, compared)
    assert seen[-1] == ({"eval/methods": tuned}, {"eval/methods": tuned})
    assert tuning.answer({"eval/methods": untuned}, {}, compared) is None
    assert tuning.answer(rows, {}, lambda *_: None) is None


def test_tuned_and_untuned_rows_stay_apart_in_answers_and_reports(tmp_path):
    told = {"tuned_on": "tiny, seeds 0 to 199"}
    untuned = [_result("mage", 0.9), _result("quest", 0.5, 90, 10)]
    tuned = [
        _result("mage", 0.95, settings="score=max", **told),
        _result("quest", 0.8, 35, 5, settings="norm=prefix", **told),
        _result("quest", 0.9, 0, 0, g=32, settings="norm=prefix", **told),
    ]
    paths = [tmp_path / "methods.json", tmp_path / "tuned.json"]
    for path, name, own in zip(paths, ("eval/methods", tuning.TUNED_SUITE), (untuned, tuned), strict=True):
        needles.write_rows(path, name, "tiny", "cpu", "abc", own, 1000)
    files = figures.read(paths)
    both, alone = ({each.name: each for each in answers.answers(part)} for part in (files, files[:1]))
    assert both["methods"] == alone["methods"] and len(both["methods"].rows) == 1
    assert len(both["tuned"].rows) == 2 and alone["tuned"].text == "Not measured in these files."
    assert (
        "MAGE against quest, facts: better in 1, no difference shown in 1, worse in 0 of 2 cells" in both["tuned"].text
    )
    bad = tmp_path / "bad.json"
    needles.write_rows(bad, tuning.TUNED_SUITE, "tiny", "cpu", "abc", [{**tuned[0], "settings": 3}], 1000)
    with pytest.raises(ValueError, match=r"settings of row 1 of bad\.json must be a text, got 3"):
        figures.read([bad])
