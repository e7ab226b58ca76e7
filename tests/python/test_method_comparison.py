"""Methods at equal K, and the recall of a block's first lists. Run: pytest tests/python/test_method_comparison.py"""

import dataclasses
import functools
import itertools
import json
import zlib
from types import SimpleNamespace

import pytest
import torch

from mage_ext import cli
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import method_comparison as comparison
from mage_ext.evaluation import needles
from mage_ext.evaluation.forced_blocks import ForcedBlocks
from mage_ext.evaluation.method_comparison import METHODS, Setting
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig
from mage_ext.testing.tiny import tiny_config, tiny_model

SAMPLER = SamplerConfig("low_confidence_static", tokens_per_step=2)


@functools.cache
def _model(variant="sdar"):
    return tiny_model(tiny_config(variant), seed=1)


def _prompts(model, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, model.config.mask_id, (n,), generator=generator).tolist() for n in lengths]


class _Case:
    """A case whose answer is the text that the model writes for an even seed."""

    def __init__(self, seed):
        self.seed = seed

    def found(self, text):
        return [self.seed % 2 == 0, bool(text)]


def _loaded(variant="sdar"):
    model = _model(variant)
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    return SimpleNamespace(model=model, config=model.config, tokenizer=tokenizer)


def _cases(model, lengths=(52, 90, 71)):
    return [(_Case(i), ids) for i, ids in enumerate(_prompts(model, lengths))]


# ----------------------------------------------------------------------------------------------------------------------
# Recall


def test_recall_against_a_hand_worked_example():
    # One layer, two requests, one KV head; units of one token, the fifth is the block's. K = 2 of a prefix of 4.
    first = torch.tensor([[[[0.4, 0.3, 0.1, 0.1, 0.1]], [[0.1, 0.1, 0.3, 0.4, 0.1]]]])  # lists {0, 1} and {2, 3}
    second = torch.tensor([[[[0.4, 0.1, 0.3, 0.1, 0.1]], [[0.5, 0.2, 0.1, 0.1, 0.1]]]])  # {0, 2}: 1 / 2; {0, 1}: 0
    third = torch.tensor([[[[0.4, 0.3, 0.1, 0.1, 0.1]], [[0.0, 0.0, 0.0, 0.0, 0.0]]]])  # {0, 1}: 1; done before
    lens = torch.tensor([4, 4], dtype=torch.int32)
    found = comparison.recall([first, second, third], lens, SelectionConfig(k=2, g=1))
    assert found.cases.tolist() == [2, 1]
    assert found.shared.tolist() == [[0.5], [1.0]]
    # Listed units and the block's: the first list keeps .4 + .1 + .1 and .1 + .1 + .1 of the second forward's mass, the
    # own ones .4 + .3 + .1 and .5 + .2 + .1.
    torch.testing.assert_close(found.kept, torch.tensor([[0.9], [0.8]], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.own, torch.tensor([[1.6], [0.8]], dtype=torch.float64), atol=1e-6, rtol=0)
    row = found.row(0)
    assert row["recall"] == pytest.approx(1.5 / 3) and row["recall_by_forward"] == [0.25, 1.0]
    assert row["kept_mass_later"] == pytest.approx(1.7 / 3) and row["kept_mass_own"] == pytest.approx(2.4 / 3)


def test_recall_leaves_dense_layers_out_and_names_the_worst_layer():
    # Three layers whose later lists share 0, 1 / 2 and all with the first ones.
    first = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05]).expand(3, 1, 1, 5)
    later = torch.tensor([[0.0, 0.1, 0.4, 0.4, 0.1], [0.4, 0.1, 0.3, 0.1, 0.1], [0.4, 0.3, 0.1, 0.1, 0.1]])
    lens = torch.tensor([4], dtype=torch.int32)
    found = comparison.recall([first, later.view(3, 1, 1, 5)], lens, SelectionConfig(k=2, g=1))
    assert found.row(0)["recall"] == pytest.approx(0.5) and found.row(0)["recall_worst_layer"] == 0
    assert found.row(1)["recall"] == pytest.approx(0.75) and found.row(1)["recall_worst_layer"] == 0.5


def test_recalls_add_up_though_blocks_differ_in_forwards():
    def of(*shares):
        shared = torch.tensor([[share] for share in shares], dtype=torch.float64)
        return comparison.Recall(shared, shared, shared, torch.ones(len(shares), dtype=torch.float64))

    both = of(1.0, 0.5) + of(0.0)
    assert both.cases.tolist() == [2, 1] and both.row(0)["recall"] == pytest.approx(0.5)
    assert both.row(0)["recall_by_forward"] == [0.5, 0.5]
    assert of().row(0) == {"recall": None}


def _select_masses(model, state, config, g, forwards):
    """Mass of every forward of the first block, from as many runs: with exact_steps = s, the loop emits the mass of
    forward s, and this one and all before it are exact."""
    masses = []
    for steps in range(1, forwards + 1):
        seen: list = []

        def keep(info, seen=seen):
            if info.index == 0 and info.mass is not None:
                seen.append(info.mass.clone())

        run = dataclasses.replace(
            config, mode="mage", selection=SelectionConfig(k=g, g=g), dense_layers=(), exact_steps=steps
        )
        generate(model, state.fork(), run, callback=keep)
        masses += seen
    return masses


@pytest.mark.parametrize("g", [1, 16])
@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_exact_masses_are_what_the_loop_selects_by(variant, g):
    model = _model(variant)  # blocks of 16, 2 positions per forward
    config = DenoiseConfig(max_new_tokens=20, sampler=SAMPLER)
    state = prefill(model, _prompts(model, (48, 60)), config)  # 16 (15) open positions, and 4 behind a prompt's tail
    cache = state.batch.cache
    used = cache.num_pages - cache.num_free
    masses = comparison.exact_masses(model, state, config, g)
    assert cache.num_pages - cache.num_free == used  # the fork's pages came back
    expected = _select_masses(model, state, config, g, 8)
    assert len(masses) == len(expected) == 8
    for mass, other in zip(masses, expected, strict=True):
        torch.testing.assert_close(mass, other)
    live = [[bool((mass[:, b] > 0).any()) for b in range(2)] for mass in masses]
    assert live == [[True, True]] * 2 + [[True, False]] * 6
    torch.testing.assert_close(masses[0].sum(-1), torch.ones(masses[0].shape[:3]), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


@pytest.mark.parametrize("variant", ["sdar", "llama_shift"])
def test_every_method_runs_at_every_setting(variant):
    loaded = _loaded(variant)
    wanted = comparison.settings([16, 32], [1, 16], [0, 1])
    assert len(wanted) == 8
    lines = []
    cases = _cases(loaded.model)
    found = comparison.compare(loaded, cases, wanted, sampler=SAMPLER, tell=lines.append)
    assert len(lines) == 8 and lines[0].startswith("K=16 g=1 dense=0: of 3 exact 2, mage 2, quest 2")
    assert set(found.scores) == {(setting, name) for setting in wanted for name in METHODS[1:]}
    rows = found.rows("needle", 64)
    assert len(rows) == 1 + 8 * 6
    block = loaded.config.block_size
    assert rows[0]["prefix_tokens"] == pytest.approx(sum(len(ids) // block * block for _, ids in cases) / 3)
    assert {row["T"] for row in rows} == {block // 2} and {row["n"] for row in rows} == {3}
    for row in rows[1:]:
        assert row["ci_low"] < row["score"] == row["exact"] == pytest.approx(2 / 3) and row["found_of_exact"] == 1
        if row["method"] == "mage":
            assert 0 <= row["recall_worst_layer"] <= row["recall"] <= 1
            assert row["kept_mass_later"] <= row["kept_mass_own"] + 1e-6 <= 1 + 2e-6
        else:
            assert (row["mage_only"], row["method_only"], row["p_mage"]) == (0, 0, 1.0)
        if row["method"] in ("quest", "tidal"):
            assert row["kept_mass"] is None
        else:
            assert 0 < row["kept_mass"] <= 1 + 1e-6
    assert json.loads(json.dumps(rows)) == rows


def test_methods_differ_as_their_names_say():
    loaded = _loaded()
    state = prefill(loaded.model, _prompts(loaded.model, (40,)))
    base = DenoiseConfig(sampler=SAMPLER)
    found = comparison.configs(loaded.model, state.batch.cache, Setting(16, 1, 2), base)
    assert tuple(found) == METHODS
    assert all(config.dense_layers == (0, 1) and config.selection.k == 16 for config in found.values())
    assert [name for name, config in found.items() if config.mode == "method"] == ["quest", "tidal"]
    assert [name for name, config in found.items() if config.selection.sinks] == ["recency", "random"]
    with pytest.raises(ValueError, match=r"names must be of exact, mage, .*, got 'best'"):
        comparison.configs(loaded.model, state.batch.cache, Setting(16, 1, 2), base, ["best"])


def test_variants_differ_from_mage_in_what_their_names_say():
    loaded = _loaded()
    state = prefill(loaded.model, _prompts(loaded.model, (40,)))
    base = DenoiseConfig(sampler=SAMPLER)
    found = comparison.configs(loaded.model, state.batch.cache, Setting(32, 16, 1), base, comparison.ALL_METHODS)
    assert tuple(found) == tuple(name for name in comparison.ALL_METHODS if name != "two_level")
    mage = found["mage"]
    for name, changes in (
        ("mage_max", dict(score="max")),
        ("mage_open", dict(score_rows="open")),
        ("mage_prefix", dict(norm="prefix")),
        ("v1", dict(rule="layer")),
        ("joint", dict(rule="joint")),
        ("mass", dict(rule="mass", capacity=2)),
    ):
        selection = dataclasses.replace(mage.selection, **changes)
        assert found[name] == dataclasses.replace(mage, selection=selection), name
    assert found["carry"] == dataclasses.replace(mage, refresh="blocks", refresh_blocks=2)
    only = comparison.configs(loaded.model, state.batch.cache, Setting(32, 16, 1), base, ["v1"])
    assert only == {"v1": found["v1"]}
    for k, candidates in ((64, 512), (6, 48), (1, 48)):
        names = ["two_level", "mage"]
        found = comparison.configs(loaded.model, state.batch.cache, Setting(k, 1, 1), base, names)
        selection = dataclasses.replace(found["mage"].selection, candidates=candidates)
        assert found["two_level"] == dataclasses.replace(found["mage"], selection=selection)


def _attend_own_top(config, tokens, K):
    """attend() over a dense window whose last block lists, in every layer and KV head, its own K heaviest tokens."""
    size, group = config.block_size, config.num_heads // config.num_kv_heads
    start = tokens - size
    causal = torch.arange(tokens)[None] // size <= torch.arange(tokens)[:, None] // size

    def attend(layer, q, k, v):
        out = torch.zeros_like(q)
        for head in range(config.num_heads):
            scores = q[0, :, head] @ k[0, :, head // group].T * config.head_dim**-0.5
            if head % group == 0:
                mine = range(head, head + group)
                all_scores = torch.stack([q[0, start:, h] @ k[0, :, head // group].T for h in mine])
                mass = torch.softmax(all_scores * config.head_dim**-0.5, -1).mean((0, 1))[:start]
                kept = torch.zeros(tokens, dtype=torch.bool)
                kept[mass.sort(descending=True).indices[:K]] = True
                kept[start:] = True
            seen = causal.clone()
            seen[start:] &= kept
            shares = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
            out[0, :, head] = shares @ v[0, :, head // group]
        return out

    return attend


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_own_lists_against_a_dense_window(variant):
    model = _model(variant)
    config, size = model.config, model.config.block_size
    (prompt,) = _prompts(model, (80,))
    state = prefill(model, [prompt])
    forced = ForcedBlocks(model, state)
    block = torch.full((1, size), config.mask_id)
    block[0, ::3] = 5
    method = comparison.OwnLists(SelectionConfig(k=16, g=1))
    window = torch.tensor([prompt + block[0].tolist()])
    with torch.no_grad():
        hidden = forced.hidden(block, layers={i: i for i in range(config.num_layers)}, method=method)
        expected = model.hidden(window, torch.arange(96)[None], _attend_own_top(config, 96, 16))
        exact = forced.hidden(block)
    torch.testing.assert_close(hidden, expected[:, 80:], atol=1e-3, rtol=1e-3)
    assert (hidden - exact).abs().max() > 0.1
    assert method.tokens_read(80, 96) == 96
    forced.close()


def test_every_variant_generates():
    loaded = _loaded("llama_shift")
    names = comparison.VARIANTS
    found = comparison.compare(loaded, _cases(loaded.model), [Setting(32, 1, 0)], names, sampler=SAMPLER)
    rows = found.rows("needle", 64)
    assert [row["method"] for row in rows] == ["exact", *names]
    by = {row["method"]: row for row in rows}
    assert by["oracle"]["kept_mass"] is None and by["oracle"]["kv_share"] == 1
    assert by["mage_max"]["kept_mass"] is None
    for name in names[1:]:
        assert by[name]["kv_share"] < 1, name
        if name != "mage_max":
            assert 0 < by[name]["kept_mass"] <= 1 + 1e-6, name
    assert by["mass"]["kv_share"] <= by["mage_max"]["kv_share"]
    with_mage = comparison.compare(loaded, _cases(loaded.model), [Setting(32, 1, 0)], ["mage", "v1"], sampler=SAMPLER)
    assert "p_mage" in with_mage.rows("needle", 64)[2]


def test_budgets_that_hold_a_whole_prefix_are_refused():
    loaded = _loaded()
    with pytest.raises(ValueError, match="wanted must have K below every prefix, the shortest of which has 52 tokens"):
        comparison.compare(loaded, _cases(loaded.model), [Setting(52, 1, 0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1], [0]), "ks must be different numbers, at least one"),
        (([16, 16], [1], [0]), "ks must be different numbers"),
        (([0], [1], [0]), "ks must be at least 1, got 0"),
        (([16], [3], [0]), r"gs must be of \(1, 16, 32, 64\), got 3"),
        (([16], [1], [-1]), "dense_layers must be at least 0, got -1"),
        (([16], [32], [0]), r"ks must hold a multiple of one of gs = \[32\], got \[16\]"),
    ],
)
def test_settings_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        comparison.settings(*arguments)


def test_a_suite_joins_its_batches(monkeypatch):
    loaded = _loaded()
    cases = _cases(loaded.model)
    maker = SimpleNamespace(case=lambda seed, tokens, asked, distractors: cases[seed])
    monkeypatch.setattr(needles, "_worker", {"loaded": loaded, "maker": maker})
    runner = object.__new__(needles.Runner)
    lines = []
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = 0, 1, 2, lines.append, None
    wanted = [Setting(16, 1, 0)]
    steps = list(comparison.suite(runner, 3, wanted, ["needle", "four_of_eight"], ["mage", "random"]))
    assert [[row["n"] for row in rows] for rows in steps] == [[2] * 3, [3] * 3, [3] * 3 + [2] * 3, [3] * 6]
    rows = steps[-1]
    assert [row["method"] for row in rows] == ["exact", "mage", "random"] * 2
    assert rows[0]["task"] == "needle" and rows[3]["task"] == "four_of_eight" and rows[3]["distractors"] == 4
    assert any(line.startswith("needle, 2048 tokens, T = 1: 3/3 cases, exact 2") for line in lines)
    whole = comparison.compare(loaded, cases, wanted, ["mage"]).rows("needle", 2048)[1]
    assert rows[1]["recall"] == pytest.approx(whole["recall"])
    with pytest.raises(ValueError, match=r"tasks_wanted must be of needle, four_keys, .*, got 'topics'"):
        list(comparison.suite(runner, 1, wanted, ["topics"]))
    with pytest.raises(ValueError, match=r"methods_wanted must be of exact, .*, got 'best'"):
        list(comparison.suite(runner, 1, wanted, ["needle"], ["best"]))


class _Words:
    """A tokenizer whose tokens are words, and which reads from any ids the answer of the prompt made last."""

    def __init__(self):
        self.answer = ""

    def encode(self, text, add_special_tokens=False):
        return [1 + zlib.crc32(word.encode()) % 90 for word in text.split()]

    def chat(self, messages):
        return [1, *self.encode(messages[0]["content"]), 2]

    def decode(self, ids):
        return self.answer


def test_every_task_runs_from_case_to_row(monkeypatch):
    model, tokenizer = _model("llama_shift"), _Words()
    loaded = SimpleNamespace(model=model, config=model.config, tokenizer=tokenizer)

    class Maker(needles.CaseMaker):
        def _ids(self, case):
            self.tokenizer.answer = case.answer
            return super()._ids(case)

    monkeypatch.setattr(needles, "_worker", {"loaded": loaded, "maker": Maker(loaded)})
    runner = object.__new__(needles.Runner)
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = 0, 1, 1, None, None
    arguments = (runner, 2, [Setting(32, 1, 1)], list(comparison.TASKS), ["mage", "random"], [400])
    rows = list(comparison.suite(*arguments))[-1]
    told = [(row["task"], row["method"], row["distractors"], row["n"]) for row in rows]
    expected = itertools.product(comparison.TASKS, ("exact", "mage", "random"))
    assert told == [(task, method, comparison.TASKS[task][1], 2) for task, method in expected]
    for row in rows:
        assert row["score"] == 1 and row["facts"] == 2 * comparison.TASKS[row["task"]][0]
        assert 300 < row["prefix_tokens"] <= 400
        assert row["kv_share"] == 1 if row["method"] == "exact" else row["kv_share"] < 1
    heads = [line.split(",")[0] for line in comparison.table(rows) if " tokens, T = " in line]
    assert heads == list(comparison.TASKS)
    with pytest.raises(ValueError, match="draw_words: num_tokens must hold 30 words"):
        list(comparison.suite(runner, 1, [Setting(32, 1, 1)], ["frequent_words"], ["mage"], [60]))


def test_the_command_takes_every_task():
    for command in ("methods", "recall", "thresholds"):
        parsed = cli.make_parser().parse_args(["eval", command, "--tasks", *comparison.TASKS, "--out", "a.json"])
        assert parsed.tasks == list(comparison.TASKS)


def test_a_suite_of_several_lengths_and_steps(monkeypatch):
    loaded = _loaded()
    cases = {length: _cases(loaded.model, (length, length + 8)) for length in (52, 80)}
    maker = SimpleNamespace(
        case=lambda seed, tokens, asked, distractors: cases[tokens][seed],
        register=lambda seed, tokens, asked: cases[tokens][seed],
    )
    monkeypatch.setattr(needles, "_worker", {"loaded": loaded, "maker": maker})
    runner = object.__new__(needles.Runner)
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = 0, 1, 2, None, None
    rows = list(comparison.suite(runner, 2, [Setting(16, 1, 0)], ["lines"], ["mage"], [52, 80], [1, 2]))[-1]
    assert [(row["tokens"], row["T"], row["method"]) for row in rows] == [
        (tokens, steps, method) for tokens in (52, 80) for steps in (4, 2) for method in ("exact", "mage")
    ]
    assert {row["task"] for row in rows} == {"lines"} and rows[0]["tokens_per_step"] == 1
    assert len([line for line in comparison.table(rows) if line.startswith("lines, ")]) == 4


def test_mcnemar_and_holm_against_hand_worked_values():
    assert comparison.mcnemar(0, 0) == comparison.mcnemar(3, 3) == 1.0
    assert comparison.mcnemar(1, 7) == comparison.mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 2**8)
    assert comparison.mcnemar(0, 6) == pytest.approx(2 / 64)
    # 0.01 <= 0.05 / 4, 0.015 <= 0.05 / 3, 0.03 > 0.05 / 2: then none of the larger ones
    assert comparison.holm([0.03, 0.01, 0.04, 0.015]) == [False, True, False, True]
    assert comparison.holm([]) == []


def test_rows_are_paired_with_mage_with_single_tokens_and_with_no_dense_layers():
    def score(name, setting, found):
        told = () if setting is None else (setting.K, setting.g, setting.dense_layers)
        method = needles.Method(name, needles.exact_method(SAMPLER).config, *told)
        results = [SimpleNamespace(stats=SimpleNamespace(kv_share=1.0, num_forwards=2, kept_mass=[0.5]))] * len(found)
        return needles.Score(method, [[each] for each in found], results)

    fine, coarse, dense = Setting(32, 1, 0), Setting(32, 16, 0), Setting(32, 16, 2)
    scores = {
        (fine, "mage"): score("mage", fine, [True, True, True, False]),
        (coarse, "mage"): score("mage", coarse, [True, False, False, False]),
        (dense, "mage"): score("mage", dense, [True, True, False, True]),
        (dense, "quest"): score("quest", dense, [False, False, False, True]),
    }
    found = comparison.Comparison(score("exact", None, [True] * 4), scores, {}, [64] * 4, 1)
    exact, first, second, third, quest = found.rows("needle", 64)
    assert not any(key.startswith("p_") for key in (*exact, *first))
    assert (second["g1_only"], second["units_only"], second["p_g1"]) == (2, 0, 0.5)
    assert "p_dense0" not in second and "p_mage" not in second
    assert (third["dense0_only"], third["dense_only"], third["p_dense0"]) == (0, 2, 0.5)
    assert "p_g1" not in third  # single tokens with dense layers did not run
    assert (quest["mage_only"], quest["method_only"], quest["p_mage"]) == (2, 0, 0.5)
    assert "p_dense0" not in quest


def test_table_marks_what_differs_from_mage():
    def row(method, k, score, **more):
        base = {"task": "needle", "method": method, "K": k, "g": int(k > 0), "dense_layers": 0 if k else -1}
        base |= {"score": score, "tokens": 1024, "T": 8}
        return base | {"ci_low": 0.9, "ci_high": 1.0, "n": 100, "prefix_tokens": 1000.0} | more

    rows = [
        row("exact", 0, 1.0),
        row("mage", 16, 0.9, recall=0.85),
        row("quest", 16, 0.5, mage_only=40, method_only=0, p_mage=comparison.mcnemar(40, 0)),
        row("random", 16, 0.89, mage_only=1, method_only=0, p_mage=1.0),
    ]
    head, names, line = comparison.table(rows)
    assert (
        head == "needle, 1024 tokens, T = 8, g = 1, 0 dense layers: exact 100.0 % [90.0, 100.0], n = 100, prefix 1000"
    )
    assert names.split() == ["K", "K/prefix", "mage", "quest", "random", "recall"]
    assert line.split() == ["16", "1.6", "%", "90.0", "50.0-", "89.0", "85.0", "%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "7", "--g", "16"], "eval: k must hold a multiple of one of gs = [16], got [7]"),
        (["--k", "0"], "eval: k must be at least 1, got 0"),
        (["--g", "3"], "eval: g must be of (1, 16, 32, 64), got 3"),
        (["--dense-layers", "-1"], "dense_layers must be at least 0, got -1"),
        (["--tokens", "100"], "tokens must be in [512, 8000]"),
        (["--n", "0"], "n must be at least 1, got 0"),
        (["--tokens-per-step", "4", "0"], "tokens_per_step must be in [1, 32], got 0"),
        (["--out", "no/such/folder/x.json"], "out must be in a folder that exists"),
    ],
)
def test_mistakes_on_the_command_line_name_the_argument(arguments, message, capsys):
    assert cli.main(["eval", "methods", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mage: error: ") and error.count("\n") == 1 and message in error


def test_files_of_an_h100_are_written_on_one(tmp_path):
    with pytest.raises(ValueError, match="path must be outside of folders named h100 on cpu"):
        needles.write_rows(tmp_path / "h100" / "methods.json", "eval/methods", "model", "cpu", "abc", [])
    assert not (tmp_path / "h100").exists()
