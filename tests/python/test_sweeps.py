"""Depths, registers and thresholds. Run: pytest tests/python/test_sweeps.py"""

import functools
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch

from mage_ext import cli
from mage_ext.evaluation import method_comparison as comparison
from mage_ext.evaluation import needles, sweeps, tasks
from mage_ext.evaluation.method_comparison import Setting
from mage_ext.models.huggingface import LoadedModel
from mage_ext.testing.tiny import tiny_config, tiny_model


@functools.cache
def _model():
    return tiny_model(tiny_config("llama_shift"), seed=1)


class _Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text, add_special_tokens=False):
        return [len(word) for word in text.split()]

    def chat(self, messages):
        return [1, 2, *self.encode(messages[0]["content"]), 3]

    def decode(self, ids):
        return " ".join(map(str, ids))


def _maker():
    return needles.CaseMaker(LoadedModel(_model().config, _model(), _Words()))


def _runner(monkeypatch, maker, lines):
    loaded = LoadedModel(_model().config, _model(), _Words())
    monkeypatch.setattr(needles, "_worker", {"loaded": loaded, "maker": maker})
    runner = object.__new__(needles.Runner)
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = 0, 1, 4, lines.append, None
    return runner


# ----------------------------------------------------------------------------------------------------------------------
# Cases


def test_a_fact_stands_where_it_is_wanted():
    maker = _maker()
    cases = [maker.case(3, 600, depth=depth)[0] for depth in (0.0, 0.25, 0.5, 1.0)]
    contexts = {case.context.replace(case.facts[0].statement, "").replace("  ", " ").strip() for case in cases}
    assert len(contexts) == 1 and len({case.facts for case in cases}) == 1
    shares = []
    for case in cases:
        before = len(case.context[: case.context.index(case.facts[0].statement)].split())
        shares.append(before / (len(case.context.split()) - 128))
    # A place lies between sentences, of at most 25 words.
    for share, depth in zip(shares, (0.0, 0.25, 0.5, 1.0), strict=True):
        assert share == pytest.approx(depth, abs=25 / 400)
    assert shares[0] == 0 and cases[0].depths == (0.0,)
    with pytest.raises(ValueError, match=r"depth must be None or in \[0, 1\], got 1.5"):
        maker.case(3, 600, depth=1.5)


def test_depth_none_is_what_it_was():
    count = lambda text: len(text.split())  # noqa: E731
    one = tasks.make_case(random.Random(5), count, 500, asked=2)
    two = tasks.make_case(random.Random(5), count, 500, asked=2, depth=None)
    assert one == two and one.depths[0] != one.depths[1]


@pytest.mark.parametrize("asked", [1, 4])
def test_a_register_is_as_long_as_wanted(asked):
    maker = _maker()
    for tokens in (200, 400, 1000):
        case, ids = maker.register(2, tokens, asked)
        assert ids == maker.tokenizer.chat([{"role": "user", "content": case.prompt}])
        lines = re.findall(r"^line [a-z]+-[a-z]+: REGISTER_CONTENT is <\d{5}>$", case.context, re.MULTILINE)
        assert len(lines) == len(case.context.split("\n")) - 1 >= 8
        assert tokens - 4 <= len(ids) <= tokens  # a line has four words
        assert len(case.facts) == asked and case.found(case.answer) == [True] * asked
        assert maker.register(2, tokens, asked) == (case, ids) and maker.register(3, tokens, asked) != (case, ids)
    with pytest.raises(ValueError, match=r"register: num_tokens must hold 8 lines, \d+ tokens, got 20"):
        maker.register(0, 20)


@pytest.mark.parametrize("asked", [1, 4])
def test_a_seed_names_its_hops(asked):
    maker = _maker()
    for seed in range(4):
        case, ids = maker.variables(seed, 500, asked, 4 - asked)
        assert {len(fact.path) for fact in case.facts} == {1 + seed} and len(case.facts) == asked
        assert ids == maker.tokenizer.chat([{"role": "user", "content": case.prompt}])
        assert len(ids) % maker.block == 0 if asked > 1 else 490 <= len(ids) <= 500
        assert maker.variables(seed, 500, asked, 4 - asked) == (case, ids)
    assert maker.variables(0, 500, asked, 4 - asked)[0].facts != maker.variables(4, 500, asked, 4 - asked)[0].facts


def test_a_list_is_as_long_as_wanted():
    maker = _maker()
    for tokens in (100, 500):
        case, ids = maker.word_list(2, tokens)
        assert ids == maker.tokenizer.chat([{"role": "user", "content": case.prompt}]) and len(ids) == tokens
        assert maker.word_list(2, tokens) == (case, ids) and maker.word_list(3, tokens)[0].facts != case.facts
    with pytest.raises(ValueError, match=r"draw_words: num_tokens must hold 30 words, got -?\d+"):
        maker.word_list(0, 60)


def test_tasks_have_their_makers():
    names = {"case": "prose", "register": "lines", "variables": "chains", "word_list": "words"}
    made = SimpleNamespace(**{name: lambda *arguments, told=told: (told, arguments) for name, told in names.items()})
    assert comparison.make_case(made, "four_of_eight", 7, 2048) == ("prose", (7, 2048, 4, 4))
    assert comparison.make_case(made, "four_lines", 7, 2048) == ("lines", (7, 2048, 4))
    assert comparison.make_case(made, "variables", 7, 2048) == ("chains", (7, 2048, 1, 3))
    assert comparison.make_case(made, "four_variables", 7, 2048) == ("chains", (7, 2048, 4, 0))
    assert comparison.make_case(made, "frequent_words", 7, 2048) == ("words", (7, 2048))


# ----------------------------------------------------------------------------------------------------------------------
# Suites


class _Case:
    def __init__(self, right):
        self.right = right

    def found(self, text):
        return [self.right]


def _ids(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 96, (length,), generator=generator).tolist()


def test_heatmap_counts_every_depth_for_itself(monkeypatch):
    # Found: at depth 0 by nobody, at 0.5 for even seeds, at 1 always.
    asked = []

    def case(seed, tokens, depth):
        asked.append((seed, tokens, depth))
        return _Case({0.0: False, 0.5: seed % 2 == 0, 1.0: True}[depth]), _ids(seed, 64)

    lines = []
    runner = _runner(monkeypatch, SimpleNamespace(case=case), lines)
    steps = list(sweeps.heatmap(runner, 3, [Setting(16, 1, 0)], ["mage"], [64, 80], 3))
    assert asked[:9] == [(seed, 64, depth) for seed in range(3) for depth in (0.0, 0.5, 1.0)]
    rows = steps[-1]
    assert json.loads(json.dumps(rows)) == rows and len(rows) == 2 * 3 * 2
    found = {(row["tokens"], row["depth"], row["method"]): row["score"] for row in rows}
    for tokens in (64, 80):
        for method in ("exact", "mage"):
            assert [found[tokens, depth, method] for depth in (0.0, 0.5, 1.0)] == [0, pytest.approx(2 / 3), 1]
    assert {row["n"] for row in rows} == {3} and {row["task"] for row in rows} == {"needle"}
    # After the first batch of four cases: two of seed 0 and 1 at depth 0, and so on.
    assert [row["n"] for row in steps[0]] == [2, 2, 1, 1, 1, 1]
    assert lines[0] == "needle, 64 tokens: of 4/9 exact 2, mage 2"
    asked.clear()
    runner.first = 1000  # no multiple of the depths
    list(sweeps.heatmap(runner, 3, [Setting(16, 1, 0)], ["mage"], [64], 3))
    assert asked == [(1000 + seed, 64, depth) for seed in range(3) for depth in (0.0, 0.5, 1.0)]
    text = sweeps.heatmap_table(rows)
    assert text[0] == "exact: found, %" and text[1].split() == ["tokens", "0.0", "0.5", "1.0"]
    assert text[2].split() == ["64", "0", "67", "100"] and text[4] == "mage, K = 16, g = 1, 0 dense layers: found, %"
    with pytest.raises(ValueError, match="depths must be at least 2, got 1"):
        list(sweeps.heatmap(runner, 1, [Setting(16, 1, 0)], ["mage"], [64], 1))
    with pytest.raises(ValueError, match=r"methods_wanted must be of exact, .*, got 'best'"):
        list(sweeps.heatmap(runner, 1, [Setting(16, 1, 0)], ["best"], [64], 3))


def test_thresholds_trade_forwards_for_tokens(monkeypatch):
    maker = SimpleNamespace(case=lambda seed, tokens, asked, distractors: (_Case(True), _ids(seed, 64 + seed)))
    lines = []
    runner = _runner(monkeypatch, maker, lines)
    wanted = [Setting(16, 1, 0), Setting(32, 1, 0)]
    rows = list(sweeps.thresholds(runner, 5, wanted, ["needle"], ["mage"], [64], [0.1, 1.0]))[-1]
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["threshold"], row["method"], row["K"]) for row in rows] == [
        (level, *which) for level in (0.1, 1.0) for which in (("exact", 0), ("mage", 16), ("mage", 32))
    ]
    by = {(row["threshold"], row["K"]): row for row in rows}
    assert by[0.1, 0]["forwards"] < by[1.0, 0]["forwards"]
    assert by[0.1, 0]["tokens_per_forward"] > by[1.0, 0]["tokens_per_forward"]
    for (level, k), row in by.items():
        assert row["n"] == 5 and row["exact_forwards"] == by[level, 0]["forwards"]
        assert row["forwards_ratio_low"] <= row["forwards_ratio"] <= row["forwards_ratio_high"]
        if not k:
            assert row["forwards_ratio"] == 1
    # At threshold 1 every forward decides one position, whoever attends, until the last wanted one is decided.
    assert by[1.0, 16]["forwards_ratio"] == pytest.approx(1, abs=0.05)
    assert lines[-1] == "needle, 64 tokens, threshold 1.0: of 5/5 exact 5, mage 5, mage 5"
    assert len(sweeps.thresholds_table(rows)) == 7
    with pytest.raises(ValueError, match=r"tasks_wanted must be of needle, .*, got 'topics'"):
        list(sweeps.thresholds(runner, 1, wanted, ["topics"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heatmap", "--depths", "1"], "depths must be in [2, 101], got 1"),
        (["heatmap", "--tokens", "100"], "tokens must be in [512, 8000]"),
        (["thresholds", "--thresholds", "2"], "thresholds must be in [0, 1], got 2.0"),
        (["thresholds", "--k", "7", "--g", "16"], "eval: k must hold a multiple of one of gs = [16], got [7]"),
    ],
)
def test_mistakes_on_the_command_line_name_the_argument(arguments, message, capsys):
    assert cli.main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mage: error: ") and error.count("\n") == 1 and message in error
