"""Answers that evaluation files give, against hand-worked values. Run: pytest tests/python/test_answers.py"""

import json
from pathlib import Path

import pytest

from mage_ext import cli
from mage_ext.evaluation import needles
from mage_ext.evaluation.answers import answers, difference, lines, normal_p, paired_difference
from mage_ext.evaluation.figures import ResultFile
from mage_ext.evaluation.method_comparison import mcnemar


def _file(name, rows):
    return ResultFile(Path(f"{name.split('/')[-1]}.json"), name, {"name": name}, rows)


def _ask(name, *files):
    return next(each for each in answers(files) if each.name == name)


def _fact(method, successes, *, exact=100, n=100, **more):
    low, high = needles.wilson(successes, n)
    row = {"task": "lines", "tokens": 2048, "T": 8, "method": method, "K": 64, "g": 1, "dense_layers": 0, "n": n}
    row |= {"found_of_exact": min(successes / exact, 1)}
    row |= {"score": successes / n, "exact": exact / n, "ci_low": low, "ci_high": high, "prefix_tokens": 2000.0}
    return row | more


def _against_mage(method, mage_only, method_only, **more):
    row = {"mage_only": mage_only, "method_only": method_only, "p_mage": mcnemar(mage_only, method_only)}
    return _fact(method, 60 - mage_only + method_only, **row | more)


def _prose(method, column, mean, half, **more):
    row = {"task": "prose", "tokens": 2048, "method": method, "K": 64, "g": 1, "dense_layers": 0, "t": 0.5, "n": 100}
    row |= {"exact": 3.5, "score": 3.6, column: mean, f"{column}_low": mean - half, f"{column}_high": mean + half}
    return row | more


def _recall(low, score, high, control="none", **more):
    row = {"study": "recall", "task": "prose", "tokens": 2048, "control": control, "method": "mage", "K": 64, "g": 1}
    row |= {"score": score, "ci_low": low, "ci_high": high, "chance": 0.03, "kept": 0.98, "recall_worst_layer": 0.6}
    return row | {"recall_by_forward": [score + 0.05, score - 0.05]} | more


def _timed(K, context, ratio, g=64, method="mage"):
    return {"case": {"method": method, "K": K, "context": context, "g": g, "dense_layers": 0}, "ratio": ratio}


def test_without_rows_every_answer_says_so():
    found = answers([_file("eval/heatmap", [])])
    assert [each.name for each in found] == [
        "recall",
        "methods",
        "tuned",
        "variants",
        "carried",
        "layers",
        "dense",
        "finetuning",
        "speed",
    ]
    assert all(each.text == "Not measured in these files." and not each.rows for each in found)
    assert len(lines(found)) == 9


def test_recall_is_held_against_the_papers_range():
    rows = [
        _recall(0.85, 0.87, 0.89),
        _recall(0.70, 0.75, 0.80, K=16, kept=0.9),
        _recall(0.91, 0.92, 0.93, K=512),
        _recall(0.80, 0.85, 0.88, g=32),
        _recall(0.4, 0.5, 0.6, "shuffled"),
        _recall(0.6, 0.7, 0.8, weights="stage-0"),
        _recall(0.99, 1.0, 1.0, method="oracle"),
        {"study": "alignment", "method": "rotated", "control": "none"},
    ]
    found = _ask("recall", _file("eval/recall", rows))
    assert "75.0 to 92.0 % over 4 cells" in found.text
    assert "1 inside, 1 below, 1 above, 1 touches" in found.text
    assert "at least 90.0 %" in found.text
    assert "Earlier weights stage-0: prose K = 64 70.0 %." in found.text
    assert [row[5] for row in found.rows] == ["inside", "below", "above", "touches"]
    assert found.rows[0][4] == "87.0 [85.0, 89.0]" and found.rows[0][6] == "82.0"
    assert found.rows[0][-1] == "shuffled 50.0" and found.rows[1][-1] == ""


def test_methods_count_where_mage_is_better_and_name_where_not():
    rows = [
        _fact("exact", 100, K=0),
        _fact("mage", 90),
        _against_mage("quest", 30, 1),  # p = 3e-8
        _against_mage("quest", 8, 1, K=128),  # 0.039: alone below 5 %, not in a family of four
        _against_mage("tidal", 0, 20, K=256),  # 2e-6: MAGE is worse
        _against_mage("sparsed", 3, 3),
        _against_mage("sparsed", 60, 0, exact=79),  # exact is too low
        _against_mage("v1", 60, 0),  # another question's
    ]
    found = _ask("methods", _file("eval/methods", rows))
    assert (
        "MAGE against quest, facts: better in 1, no difference shown in 1, worse in 0 of 2 cells, +18.0 points"
        in found.text
    )
    assert "MAGE against tidal, facts: better in 0, no difference shown in 0, worse in 1 of 1 cells" in found.text
    assert "MAGE against sparsed, facts: better in 0, no difference shown in 1" in found.text
    assert "worse at K = 256," in found.text
    assert [row[0].split()[-1] for row in found.rows] == ["quest", "quest", "tidal", "sparsed"]
    assert found.rows[0][1:3] == ["lines, 2048 tokens, T = 8, K = 64, g = 1, 0 dense", "3.2 %"]
    low, high = paired_difference(30, 1, 30, 39)  # quest has found 31, one of them alone
    assert found.rows[0][3] == f"+29.0 points [{-100 * high:+.1f}, {-100 * low:+.1f}]"
    better = _ask("methods", _file("eval/methods", rows[:4]))
    assert better.text.endswith("Worse nowhere.")


def test_methods_are_also_compared_with_the_units_that_suit_each():
    names = ("mage", "quest", "tidal", "sparsed")
    scores = {1: (90, 80, 10, 70), 32: (50, 60, 20, 75)}
    rows = [_fact("mage", 90), _against_mage("quest", 3, 3)]
    for g, each in scores.items():
        rows += [_fact(name, found, g=g, K=128) for name, found in zip(names, each, strict=True)]
    rows += [_fact(name, 0, g=1, K=256) for name in names]  # one kind of units only
    found = _ask("methods", _file("eval/methods", rows))
    assert "of [1, 32], that suit each best in each of 1 cells" in found.text
    assert found.text.endswith("found on average, %: mage 90.0, quest 80.0, tidal 20.0, sparsed 75.0.")


def test_prose_is_a_family_of_its_own_with_the_sign_of_what_is_saved():
    rows = [
        _prose("quest", "over_mage", 0.10, 0.03),  # Quest costs more: z = 6.5
        _prose("quest", "over_mage", -0.05, 0.02, t=0.25),  # less: z = 4.9
        _prose("tidal", "over_mage", 0.01, 0.02),
        _prose("mage", "over_g1", 0.2, 0.05, g=32),
        _prose("exact", "over_mage", 0.0, 0.0, K=0),
    ]
    found = _ask("methods", _file("eval/prose", rows))
    assert "MAGE against quest, prose: better in 1, no difference shown in 0, worse in 1 of 2 cells" in found.text
    assert "+0.025 nats on average (cells from -0.050 to +0.100)" in found.text
    assert "MAGE against tidal, prose: better in 0, no difference shown in 1" in found.text
    assert found.rows[1][1] == "prose, 2048 tokens, 25 % masked, K = 64, g = 1, 0 dense"
    units = _ask("variants", _file("eval/prose", rows))
    assert "units of 32 for 1, equal bytes, prose: better in 0, no difference shown in 0, worse in 1" in units.text


def test_variants_layers_and_dense_layers_read_their_own_pairs():
    pairs = {"g1_only": 20, "units_only": 0, "p_g1": mcnemar(20, 0)}
    dense = {"dense0_only": 0, "dense_only": 15, "p_dense0": mcnemar(0, 15)}
    rows = [
        _fact("mage", 90),
        _fact("mage", 70, g=32, **pairs),
        _fact("quest", 70, g=32, **pairs),
        _fact("mage", 95, dense_layers=2, **dense),
        _against_mage("mage_max", 0, 12),
        _against_mage("mage_open", 25, 0),
        _against_mage("v1", 30, 0),
        _against_mage("joint", 2, 1),
        _against_mage("joint", 0, 0, K=128),
        _against_mage("carry", 30, 0),
        _against_mage("two_level", 1, 2),
    ]
    times = [
        {"case": {"model": "7B", "K": 512, "g": g, "batch": batch}, "us": us}
        for g, batch, us in ((1, 1, 12.0), (64, 1, 10.0), (1, 16, 30.0), (64, 16, 20.0), (16, 4, 5.0))
    ]
    files = _file("eval/methods", rows), _file("sparse_block_attention", times)
    variants = _ask("variants", *files)
    assert "score: largest row for mean, facts: better in 1" in variants.text
    assert "rows: open ones for all, facts: better in 0, no difference shown in 0, worse in 1 of 1" in variants.text
    assert "norm:" not in variants.text
    told = "candidates: single tokens in two levels for one, facts: better in 0, no difference shown in 1"
    assert told in variants.text
    assert (
        "units of 32 for 1, equal bytes, facts: better in 0, no difference shown in 0, worse in 1 of 1" in variants.text
    )
    assert "takes 1.20 to 1.50 times as long with single tokens as with units of 64 (2 timed cases)" in variants.text
    layers = _ask("layers", *files)
    told = (
        "v1 (votes and budgets by layer together), facts: better in 0, no difference shown in 0, worse in 1 of 1 cells,"
    )
    assert told in layers.text
    assert "better in 0, no difference shown in 2, worse in 0 of 2 cells (in 1 no case differs)" in layers.text
    told = "kept for every second block, for lists of its own, facts: better in 0, no difference shown in 0, worse in 1"
    assert told in _ask("carried", *files).text
    assert "2 dense layers for none, facts: better in 1" in _ask("dense", *files).text


def test_finetuning_against_its_control():
    checks = {"check_kl": 0.03, "check_sparse_answer": 0.02}
    rows = [
        _fact("mage", 50, weights="shipped"),
        _fact("mage", 52, weights="control", check_kl=0.07, check_sparse_answer=0.09),
        _fact("mage", 80, weights="tuned", **checks),
        _fact("mage", 80, weights="tuned", K=128),  # without a control
        {"task": "measure", "weights": "random:1.5B", "K": 512},
    ]
    found = _ask("finetuning", _file("eval/finetune", rows))
    low, high = difference(0.8, 100, 0.52, 100)
    assert f"+28.0 points [{100 * low:.1f}, {100 * high:.1f}]" in found.text
    assert "KL to exact 0.0300 nats for 0.0700" in found.text
    assert len(found.rows) == 1 and found.rows[0][2:5] == ["50.0 %", "52.0 %", "80.0 %"]


def test_speed_wants_facts_at_the_same_units_and_share():
    timed = [_timed(1024, 32768, 1.5), _timed(1024, 32768, 2.0), _timed(1024, 131072, 4.0), _timed(1024, 8192, 1.1)]
    timed.append(_timed(1024, 32768, 0.9, method="quest"))
    rows = [
        _fact("mage", 99, g=64),  # 64 / 2000 = 3.2 %: as 1024 / 32768
        _fact("mage", 40, g=64, K=256),  # 12.8 %: as 1024 / 8192
        _fact("mage", 10, g=1, K=16),  # 0.8 %, but other units
    ]
    found = _ask("speed", _file("generate", timed), _file("eval/methods", rows))
    assert "Of 3 kinds of timed settings" in found.text and "1 have found facts behind" in found.text
    assert "3.12 % in units of 64, 0 dense (1.50 to 2.00 x). 1 have none measured" in found.text
    assert [row[-1] for row in found.rows] == [
        "none measured",
        "no loss against exact shown (1 cells)",
        "less than exact (1 cells)",
    ]


def test_what_finds_more_than_exact_is_behind_a_speed_too():
    """8 cases that exact misses, none that it alone finds: p = 0.008."""
    rows = [_fact("mage", 98, exact=90, g=64, task="needle"), _fact("mage", 90, exact=90, g=64)]
    assert mcnemar(0, 8) < 0.01
    (line,) = _ask("speed", _file("generate", [_timed(1024, 32768, 1.5)]), _file("eval/methods", rows)).rows
    assert line[-1] == "no loss against exact shown (2 cells)" and line[6].startswith("90.0 [")


def test_facts_with_other_dense_layers_are_not_behind_a_speed():
    timed = [_timed(1024, 32768, 1.5)]
    found = _ask("speed", _file("generate", timed), _file("eval/methods", [_fact("mage", 99, g=64, dense_layers=2)]))
    assert "0 have found facts behind" in found.text
    assert "1 have such facts with another number of dense layers alone: 3.12 % in units of 64, 0 dense" in found.text
    assert found.rows[0][-1] == "no loss against exact shown (1 cells, none with as many dense layers)"
    both = [_fact("mage", 99, g=64, dense_layers=2), _fact("mage", 40, g=64)]
    found = _ask("speed", _file("generate", timed), _file("eval/methods", both))
    assert found.rows[0][-1] == "less than exact (1 cells)" and "another number" not in found.text


def _other(name, rows):
    return ResultFile(Path("other.json"), name, {"name": name, "model": "m-seed1", "commit": "b"}, rows)


def test_a_comparison_that_turns_with_the_other_seed_is_a_tie():
    rows = [
        _fact("exact", 97, exact=97, K=0, task="needle", tokens=16128),
        _fact("exact", 99, exact=99, K=0),
        _against_mage("quest", 30, 1),  # better here and there
        _against_mage("quest", 31, 1, K=128),  # better here, worse there
        _against_mage("quest", 32, 1, K=256),  # better here, level there
        _against_mage("quest", 33, 1, K=512),  # not measured there
        _against_mage("quest", 3, 2, K=1024),  # no difference here, so none that could turn
        _against_mage("tidal", 0, 20),  # worse here; exact finds too little there
        _against_mage("mage_max", 0, 12),  # better here, worse there
    ]
    others = [
        _fact("exact", 96, exact=96, K=0, task="needle", tokens=16128),
        _fact("exact", 90, exact=90, K=0, task="four_keys"),
        _against_mage("quest", 12, 2),
        _against_mage("quest", 4, 9, K=128),
        _against_mage("quest", 5, 5, K=256),
        _against_mage("quest", 1, 4, K=1024),
        _against_mage("tidal", 20, 0, exact=79),
        _against_mage("mage_max", 1, 0),
    ]
    files = [
        ResultFile(Path("methods.json"), "eval/methods", {"name": "eval/methods", "model": "m", "commit": "a"}, rows)
    ]
    found = {each.name: each for each in answers(files, [_other("eval/methods", others)])}
    methods = found["methods"]
    assert (
        "against quest, facts: better in 2, no difference shown in 1, worse in 0, tie in 2 of 5 cells" in methods.text
    )
    assert "against tidal, facts: better in 0, no difference shown in 0, worse in 1 of 1 cells" in methods.text
    assert "4 of 6 cells were measured with the other training seed too, which makes ties of 2" in methods.text
    assert methods.head == ("compared", "cell", "K / prefix", "gain [95 %]", "p", "gain, other seed", "")
    assert [(line[3].split(" [")[0], line[5], line[6]) for line in methods.rows] == [
        ("+29.0 points", "+10.0 points", "better"),
        ("+30.0 points", "-5.0 points", "tie"),
        ("+31.0 points", "+0.0 points", "tie"),
        ("+32.0 points", "", "better"),
        ("+1.0 points", "-3.0 points", "no difference shown"),
        ("-20.0 points", "", "worse"),
    ]
    assert found["variants"].rows[0][5:] == ["-1.0 points", "tie"]
    seeds = found["seeds"]
    assert list(found)[-1] == "seeds" and seeds.head == ("exact attention", "m, % [95 %] (n)", "m-seed1, % [95 %] (n)")
    assert seeds.rows == [
        ["needle, 16128 tokens, T = 8", "97.0 [91.5, 99.0] (100)", "96.0 [90.2, 98.4] (100)"],
        ["lines, 2048 tokens, T = 8", "99.0 [94.6, 99.8] (100)", ""],
        ["four_keys, 2048 tokens, T = 8", "", "90.0 [82.6, 94.5] (100)"],
    ]
    assert "needle, 16128 tokens, T = 8 97.0 [91.5, 99.0] (100) and 96.0 [90.2, 98.4] (100). Comparisons" in seeds.text
    assert seeds.text.endswith("are ties: 3: 2 of methods, 1 of variants. Commits: a and b.")
    alone = {each.name: each for each in answers(files)}
    assert "seeds" not in alone and "tie" not in alone["methods"].text and len(alone["methods"].rows[0]) == 6


def test_prose_recall_and_speed_with_the_other_seed():
    prose = [_prose("quest", "over_mage", 0.10, 0.03), _prose("quest", "over_mage", 0.10, 0.03, t=0.25)]
    turned = [_prose("quest", "over_mage", 0.01, 0.03), _prose("quest", "over_mage", -0.01, 0.03, t=0.25)]
    own = [_recall(0.85, 0.87, 0.89), _recall(0.70, 0.75, 0.80, K=16)]
    theirs = [_recall(0.83, 0.86, 0.88), _recall(0.5, 0.6, 0.7, K=512)]
    facts, beside = [_fact("mage", 99, g=64)], [_fact("mage", 60, g=64)]
    files = [_file("eval/prose", prose), _file("eval/recall", own), _file("eval/methods", facts)]
    files.append(_file("generate", [_timed(1024, 32768, 1.5)]))
    others = [_other("eval/prose", turned), _other("eval/recall", theirs), _other("eval/methods", beside)]
    found = {each.name: each for each in answers(files, others)}
    assert "quest, prose: better in 1, no difference shown in 0, worse in 0, tie in 1 of 2" in found["methods"].text
    assert found["methods"].rows[1][3:] == [
        "+0.1000 nats [+0.0700, +0.1300]",
        "6.4e-11",
        "-0.0100 nats",
        "tie",
    ]
    assert "With the other training seed, in 1 of the cells: 86.0 to 86.0 %, with the first 87.0 to 87.0 %" in (
        found["recall"].text
    )
    assert found["recall"].head[-2] == "other seed's recall"
    assert [line[-2] for line in found["recall"].rows] == ["86.0 [83.0, 88.0]", ""]
    (line,) = found["speed"].rows
    assert line[-1] == "less than exact (2 cells)" and line[5].endswith(", other training seed")
    assert "No cell of exact attention is of both" in found["seeds"].text
    assert _ask("speed", *files).rows[0][-1] == "no loss against exact shown (1 cells)"


def test_finetuning_is_paired_where_the_cases_are():
    def cell(task, control_only, tuned_only, both, **more):
        score = {"control": both + control_only, "tuned": both + tuned_only}
        pair = {"control_only": control_only, "tuned_only": tuned_only, "p_control": mcnemar(control_only, tuned_only)}
        checks = {"check_kl": 0.03, "check_sparse_answer": 0.02, "steps": 87} if more.get("K") == 128 else {}
        return [
            _fact("mage", 40, weights="shipped", task=task, **more),
            _fact("mage", score["control"], weights="control", task=task, **more | checks),
            _fact("mage", score["tuned"], weights="tuned", task=task, **more | checks | pair),
        ]

    rows = [
        *cell("four_keys", 2, 30, 50, K=128),  # p = 2.5e-7
        *cell("four_lines", 10, 12, 40, K=128),
        *cell("lines", 7, 0, 80, K=64),  # 0.016: alone below 5 %, and 0.05 / 2 of three
        *cell("lines", 0, 40, 10, K=256, exact=79),  # exact is too low
        _fact("exact", 100, K=0, weights="tuned"),
    ]
    found = _ask("finetuning", _file("eval/finetune", rows))
    assert found.text.startswith(
        "Tuned against control, facts: better in 1, no difference shown in 1, worse in 1 of 3 cells, +7.7 points"
    )
    low, high = paired_difference(50, 30, 2, 18)
    gap = f"+28.0 points [{100 * low:.1f}, {100 * high:.1f}]"
    place = "four_keys, 2048 tokens, K = 128, g = 1, 0 dense"
    assert f"{place}: found 80.0 %, control 52.0 %, before 40.0 %, {gap}, better." in found.text
    assert found.text.count("KL to exact 0.0300 nats for 0.0300") == 1
    assert found.text.endswith("0.0200 nats for 0.0200 (after 87 and 87 steps).")
    assert found.rows[0] == [place, "100.0 / 100.0 / 100.0", "40.0 %", "52.0 %", "80.0 %", gap, "2.5e-07", "better"]
    assert [row[-1] for row in found.rows] == ["better", "no difference shown", "worse", "exact below 80 %"]


def test_paired_intervals_against_published_values():
    # Newcombe (1998), paired data, method 10.
    assert paired_difference(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    assert paired_difference(0, 5, 5, 0)[0] < 0 < paired_difference(0, 5, 5, 0)[1]
    low, high = paired_difference(20, 3, 1, 6)
    assert paired_difference(20, 1, 3, 6) == (pytest.approx(-high), pytest.approx(-low))


def test_intervals_and_p_against_published_values():
    # Newcombe (1998), table II, method 10: 56/70 and 48/80.
    assert difference(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert normal_p(1.96, 0.0, 3.92) == pytest.approx(0.05, abs=1e-4)
    assert normal_p(-1.0, -3.0, 1.0) == pytest.approx(0.3270, abs=1e-3)
    assert normal_p(0.0, 0.0, 0.0) == 1 and normal_p(0.5, 0.5, 0.5) == 1  # of one case: shows nothing


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"answer 'methods' must have the key 'method_only'"):
        answers([_file("eval/methods", [_fact("quest", 50, p_mage=0.5)])])


def test_counts_that_do_not_fit_the_score_are_refused():
    row = _against_mage("quest", 30, 1) | {"score": 0.9}
    message = (
        r"files: method_only = 1 and mage_only = 30 of quest at lines, 2048 tokens.* must fit score = 0.9 of n = 100"
    )
    with pytest.raises(ValueError, match=message):
        answers([_file("eval/methods", [row])])


def test_the_command_prints_them(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    row = _fact("mage", 90, sampler="low_confidence_static", tokens_per_step=4, kv_share=0.2, distractors=0)
    exact = _fact("exact", 100, K=0, g=0, dense_layers=-1)
    rows = [row | exact, row]
    path = tmp_path / "methods.json"
    path.write_text(json.dumps({"name": "eval/methods", "model": "m", "rows": rows}))
    assert cli.main(["eval", "report", "--files", str(path), "--out", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr().out
    assert "Which speed has accuracy behind it" in told and "Not measured in these files." in told
    page = (tmp_path / "page.html").read_text()
    assert '<h2 id="answers">' in page and "Which speed has accuracy behind it" in page
