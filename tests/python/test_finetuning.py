"""Fine-tuning against its control on the same cases. Run: pytest tests/python/test_finetuning.py"""

import json
import shutil

import pytest

from mage_ext import cli
from mage_ext.evaluation import figures, finetuning, needles
from mage_ext.evaluation.answers import answers
from mage_ext.evaluation.method_comparison import STATIC, Comparison, Setting, mcnemar
from mage_ext.models import builtin

LAYOUT = {"trunk": 2048, "branches": 8}
CHECK = {"kl": 0.07, "sparse_answer": 0.08}


@pytest.fixture
def run(tmp_path):
    """Writes a folder as `mage train finetune` leaves it and returns its path."""

    def make(name, control=False, steps=87, kl=0.03, layout=LAYOUT, before=(), **changed):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter-int8.safetensors").write_bytes(b"")
        config = {"k": 128, "g": 32, "dense_layers": 2, "seed": 0, "lr": 3e-4, "steps": steps, "control": control}
        lines = [
            *before,
            {"event": "start", "config": config | changed, "layout": layout},
            {"event": "check", "step": 0, **CHECK},
            {"step": 1, "prose": 3.0, "seconds_per_step": 30.0},
            {"step": steps, "prose": 2.9, "seconds_per_step": 1.07},
            {"event": "check", "step": steps, "kl": kl, "sparse_answer": 0.02},
            {"event": "end", "step": steps},
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_runs_say_what_their_logs_do(run):
    earlier = [{"event": "start"}, {"event": "check", "step": 0, "kl": 9.0}]
    tuned, control = finetuning.read_runs(run("a", before=earlier), run("b", control=True, kl=0.072, steps=150))
    assert tuned.adapter.parent.name == "a" and tuned.setting == Setting(128, 32, 2)
    assert tuned.first == {"check_kl": 0.07, "check_sparse_answer": 0.08, "steps": 0, "seconds_per_step": None}
    assert tuned.facts == {"check_kl": 0.03, "check_sparse_answer": 0.02, "steps": 87, "seconds_per_step": 1.07}
    assert control.facts["check_kl"] == 0.072 and control.facts["steps"] == 150


def test_what_is_no_run_and_its_control_is_refused(run, tmp_path):
    tuned, control = run("tuned"), run("control", control=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = run("broken", control=True)
    (broken / "log.jsonl").write_text('{"event": "start"}\n')
    deep = run("deep", control=True)
    (deep / "log.jsonl").write_text("[" * 100_000)
    for pair, message in (
        ((empty, control), "finetuned: must be a folder of mage train finetune with adapter-int8.safetensors, got"),
        ((tuned, broken), "control: log.jsonl must be of a run with its checks, got"),
        ((tuned, deep), "control: log.jsonl must be of a run with its checks, got"),
        ((tuned, run("second")), "control: must be a run with --control, got"),
        ((control, control), "finetuned: must be a run without --control, got"),
        ((tuned, run("k", control=True, k=64)), "control: must have the k of finetuned, 128, got 64 in"),
        (
            (tuned, run("l", control=True, layout={"trunk": 512})),
            "control: must have the layout of finetuned, {'trunk'",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            finetuning.read_runs(*pair)
        assert str(caught.value).startswith(message)


def _outcome(exact, *scores):
    """Cases by which are found; scores: of K = 128 and 64."""
    settings = Setting(128, 32, 2), Setting(64, 32, 2)
    base = needles.exact_method(STATIC).config

    def score(name, found, *told):
        return needles.Score(needles.Method(name, base, *told), [[bool(each)] for each in found])

    found = {
        (at, "mage"): score("mage", each, at.K, at.g, at.dense_layers)
        for at, each in zip(settings, scores, strict=False)
    }
    return Comparison(score("exact", exact), found, {}, [2000] * len(exact), 8)


def test_rows_count_what_one_of_the_two_alone_finds(run):
    runs = finetuning.read_runs(run("tuned"), run("control", control=True, kl=0.072, steps=150))
    outcomes = {
        ("shipped", "lines", 2048): _outcome([1, 1, 1, 1], [0, 0, 0, 1]),
        ("control", "lines", 2048): _outcome([1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]),
        ("tuned", "lines", 2048): _outcome([1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]),
    }
    rows = finetuning.rows(outcomes, runs)
    assert [(row["weights"], row["method"], row["K"], row["score"]) for row in rows] == [
        ("shipped", "exact", 0, 1.0),
        ("shipped", "mage", 128, 0.25),
        ("control", "exact", 0, 1.0),
        ("control", "mage", 128, 0.5),
        ("control", "mage", 64, 0.0),
        ("tuned", "exact", 0, 1.0),
        ("tuned", "mage", 128, 0.75),
        ("tuned", "mage", 64, 1.0),
    ]
    tuned = rows[6]
    assert (tuned["control_only"], tuned["tuned_only"], tuned["p_control"]) == (1, 2, mcnemar(1, 2))
    assert (rows[7]["control_only"], rows[7]["tuned_only"]) == (0, 4) and "check_kl" not in rows[7]
    assert "p_control" not in rows[3] and "p_control" not in rows[5]
    assert [row.get("check_kl") for row in rows] == [None, 0.07, None, 0.072, None, None, 0.03, None]
    assert (rows[1]["steps"], rows[3]["steps"], tuned["steps"]) == (0, 150, 87)
    lines = finetuning.table(rows)
    assert len(lines) == 2 and lines[0].startswith(
        "lines, 2048 tokens, K = 128, g = 32, 2 dense layers, %: shipped 25.0"
    )
    assert lines[0].endswith("of 4 control alone 1, tuned alone 2, p = 1")
    # While a run is at work, what it has is held against the same cases of the control.
    outcomes["tuned", "lines", 2048] = _outcome([1, 1], [1, 1])
    assert finetuning.rows(outcomes, runs)[6]["tuned_only"] == 1


def test_the_command_from_folders_to_the_answer(run, tmp_path, capsys, monkeypatch):
    model = "smollm2-cut16-block"
    try:
        loaded = builtin.load_builtin(adapter=model)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    seen = []
    monkeypatch.setattr(needles, "load_builtin", lambda dtype, device, adapter: seen.append(adapter) or loaded)
    folders = run("tuned", k=64, dense_layers=0), run("control", control=True, k=64, dense_layers=0)
    for folder in folders:
        shutil.copyfile(builtin.adapter_path(model), folder / "adapter-int8.safetensors")
    out = tmp_path / "finetune.json"
    command = ["eval", "finetune", "--finetuned", str(folders[0]), "--control", str(folders[1]), "--out", str(out)]
    small = ["--tasks", "needle", "--k", "64", "--dense-layers", "0", "--tokens", "512", "--n", "1"]
    assert cli.main([*command, *small, "--adapter", model, "--first-seed", "1000"]) == 0
    assert "needle, 512 tokens, K = 64, g = 32, 0 dense layers, %: shipped" in capsys.readouterr().out
    assert seen == [model, *(str(folder / "adapter-int8.safetensors") for folder in reversed(folders))]
    (file,) = figures.read([out])
    assert file.head["complete"] and file.head["first_seed"] == 1000 and file.head["model"] == model
    assert [row["weights"] for row in file.rows] == [name for name in finetuning.WEIGHTS for _ in range(2)]
    assert len({row["score"] for row in file.rows if row["K"]}) == 1  # three times the same adapter
    answer = next(each for each in answers([file]) if each.name == "finetuning")
    assert answer.text.startswith(
        "Tuned against control, facts: better in 0, no difference shown in 1, worse in 0 of 1"
    )
    assert "KL to exact 0.0300 nats for 0.0300" in answer.text
    assert cli.main([*command, *small]) == 2
    assert f"eval: finetuned must be adapters of the layers of {builtin.NAME}, got" in capsys.readouterr().err
    assert cli.main([*command[:4], "--control", str(folders[0]), *small, "--adapter", model]) == 2
    assert "eval: control: must be a run with --control" in capsys.readouterr().err
