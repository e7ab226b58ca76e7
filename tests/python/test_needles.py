"""Comparison of methods and the demo. Run: pytest tests/python/test_needles.py"""

import json

import pytest

from mage_ext.evaluation import demo, needles
from mage_ext.models import builtin
from mage_ext.sampling import SamplerConfig

STATIC = SamplerConfig(name="low_confidence_static", tokens_per_step=4)


def test_wilson_against_hand_worked_values():
    # 10 of 10: low = 10 / (10 + 1.96^2) = 0.72247; 50 of 100: 0.5 -+ 0.0962 (Wilson 1927, z = 1.96)
    assert needles.wilson(10, 10) == (pytest.approx(10 / (10 + 1.96**2)), 1.0)
    low, high = needles.wilson(50, 100)
    assert low == pytest.approx(0.40383, abs=1e-5) and high == pytest.approx(0.59617, abs=1e-5)
    assert needles.wilson(0, 0) == (0.0, 1.0)


def test_sparse_method_charges_what_it_always_keeps():
    method = needles.sparse_method("mage", STATIC, 128, g=1)
    selection = method.config.selection
    assert (selection.k, selection.g) == (128, 1)
    assert 0 < selection.sinks <= 4 and 0 < selection.recents <= 32
    assert needles.sparse_method("mage", STATIC, 128, g=32, dense_layers=0).config.dense_layers == ()


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"name must be one of mage, recency, random, got 'oracle'"):
        needles.sparse_method("oracle", STATIC, 128)


def test_suite_runs_the_methods_that_are_asked_for():
    class Runner:
        def compare(self, methods, n, num_tokens, asked, distractors):
            self.seen = [str(method) for method in methods]
            return [needles.Score(method) for method in methods]

    runner = Runner()
    rows = list(needles.suite(runner, 1, ["needle"], ["exact"]))
    assert runner.seen == ["exact", "exact"] and [row["method"] for row in rows] == ["exact", "exact"]
    list(needles.suite(runner, 1, ["needle"], ["mage"]))
    assert len(runner.seen) == 6 and sum(name.startswith("mage K=128") for name in runner.seen) == 4
    assert len(list(needles.suite(runner, 1, ["needle"]))) == 10


@pytest.fixture(scope="module")
def loaded():
    try:
        return builtin.load_builtin()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_demo_compares_all_methods(loaded):
    lines = []
    found = demo.run_demo(loaded, 512, 1, say=lines.append)
    assert list(found) == ["exact", "mage 64", "mage 128", "mage 256", "recency 128", "random 128"]
    assert found["exact"] == found["mage 256"] == 4 > max(found["recency 128"], found["random 128"])
    for name, facts in found.items():
        assert any(line.split()[:1] == name.split()[:1] and f" {facts}/4" in line for line in lines), name


def test_the_shipped_model_finds_facts_that_floors_miss(loaded, tmp_path):
    maker = needles.CaseMaker(loaded)
    cases = [maker.case(seed, 640, asked=4) for seed in range(3)]
    assert all(len(ids) % loaded.config.block_size == 0 for _, ids in cases)
    methods = [needles.exact_method(STATIC)]
    methods += [needles.sparse_method(name, STATIC, 128, dense_layers=2) for name in ("mage", "recency", "random")]
    exact, mage, recency, random = needles.compare(loaded, cases, methods)
    assert exact.facts >= 11 and mage.facts >= exact.facts - 1
    assert recency.facts < 6 and random.facts < 6
    row = mage.row("four_keys", exact, tokens=640, distractors=0)
    assert row["n"] == 3 and 0 < row["kv_share"] < 0.6 and 0.5 < row["kept_mass"] < 1
    assert row["ci_low"] <= row["score"] <= row["ci_high"]
    assert "K=128 g=1 dense=2" in needles.row_line(row)
    needles.write_rows(tmp_path / "a" / "needles.json", "eval/needles", builtin.NAME, "cpu", "abc", [row])
    assert json.loads((tmp_path / "a" / "needles.json").read_text())["rows"] == [row]
