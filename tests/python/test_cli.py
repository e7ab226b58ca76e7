"""The mage command as a user types it. Run: pytest tests/python/test_cli.py"""

import argparse
import io
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from mage_ext import cli, terminal
from mage_ext._files import write_text
from mage_ext._version import __version__
from mage_ext.denoise import DenoiseConfig
from mage_ext.evaluation import needles
from mage_ext.models import builtin
from mage_ext.sampling import SamplerConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--sampler", "best"], "name must be one of sequential"),
        (["generate", "--prompt", "x", "--threshold", "nan"], "threshold must be"),
        (["generate", "--prompt", "x", "-k", "100", "-g", "32"], "k must be a multiple of g = 32, got 100"),
        (["generate", "--prompt", "x", "-g", "7"], "g must be one of 1, 16, 32, 64, got 7"),
        (["generate", "--prompt", "x", "--rule", "all"], "rule must be one of fixed"),
        (["generate", "--prompt", "x", "--score", "sum"], "score must be one of mean, max, got 'sum'"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1, got 0"),
        (["generate", "--prompt", "x", "--model", "no/such/folder"], "no/such/folder"),
        (["generate", "--prompt", "x", "--dense-layers", "-1"], r"dense_layers must be in [0, 1000], got -1"),
        (["demo", "--text", "no-such-file"], "no-such-file"),
        (["demo", "--tokens", "10"], "tokens must be in [512, 8000]"),
        (["demo", "--tokens", "999999"], "tokens must be in [512, 8000]"),
        (
            ["demo", "--adapter", "smollm2-cut16-block", "--tokens", "16200"],
            "tokens must be in [512, 16192] (the model",
        ),
        (
            ["demo", "--adapter", "no"],
            "demo: adapter must be an adapter file or a model in the box (smollm2-135m-block, ",
        ),
        (["eval", "needles", "--adapter", "d/no"], "smollm2-cut16-block), got 'd/no': load_adapter: path must name an"),
        (["eval", "prose", "--adapter", ""], "eval: adapter must be an adapter file or a model in the box (smollm2-"),
        (["eval", "methods", "--dense-layers", "-1"], "eval: dense_layers must be at least 0, got -1"),
        (["eval", "needles", "--out", "no/such/folder/x.json"], "out must be in a folder that exists"),
        (["generate", "--prompt", "x", "--tokens-per-step", "9" * 24], "tokens_per_step must be below 2^31"),
        (["eval", "needles", "--n", "0"], "n must be at least 1, got 0"),
        (["eval", "needles", "--jobs", "0"], "jobs must be at least 1, got 0"),
        (["chat"], "needs a terminal"),
        (["generate", "--prompt", "x", "--device", "gpu"], "device must be a torch.device or its name, got 'gpu'"),
        (["demo", "--device", "meta"], "demo: device must be cpu or cuda, got meta"),
        (["eval", "needles", "--dtype", "int8"], "dtype must be one of"),
        (["train", "adapter", "--text", "no-such-file", "--out", "x", "--minutes", "1", "--device", "cpu"], "no-such"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mage: error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "exact", "-k", "64"], "generate: k must come with --mode mage, got 64 in mode exact"),
        (
            ["--dense-layers", "2", "--mode", "exact"],
            "generate: dense_layers must come with --mode mage, got 2 in mode ",
        ),
        (
            ["--mode", "exact", "-g", "1", "--candidates", "4096"],
            "generate: candidates must come with --mode mage, got 4096 in mode exact",
        ),
        (["--mode", "exact", "--score", "mean"], "generate: score must come with --mode mage, got mean in mode exact"),
        (
            ["--sampler", "entropy_bounded", "--threshold", "0.5"],
            "generate: threshold must come with --sampler low_confidence_dynamic, got 0.5 with entropy_bounded",
        ),
        (
            ["--tokens-per-step", "4"],
            "generate: tokens_per_step must come with --sampler sequential or low_confidence_static, got 4 with "
            "low_confidence_dynamic",
        ),
        (
            ["--top-k", "5"],
            "generate: top_k must come with --temperature above 0, got 5 at temperature 0, the most probable token",
        ),
        (["--top-p", "0.9", "--temperature", "0"], "generate: top_p must come with --temperature above 0, got 0.9 at "),
        (
            ["--rule", "mass", "-k", "64"],
            "generate: k must come with --rule fixed, layer or joint, got 64 with mass",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(arguments, message, capsys):
    assert cli.main(["generate", "--prompt", "x", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    # What was not given may stand at any default, and what is read is taken.
    for taken in (
        ["--mode", "exact"],
        ["--sampler", "sequential"],
        ["--threshold", "0.5", "-k", "64"],
        ["--temperature", "0.5", "--top-k", "5", "--top-p", "0.9"],
        ["--rule", "mass", "-g", "1"],
        ["--rule", "joint", "-k", "64"],
        ["-g", "1", "--candidates", "4096"],
    ):
        args = cli.make_parser().parse_args(["generate", "--prompt", "x", *taken])
        assert cli._config("generate", args).mode == args.mode
    page = cli.make_parser().parse_args(["inspect", "--out", "p.html", "--mode", "exact", "-k", "64", "-g", "1"])
    assert cli._config("inspect", page).selection.k == 64
    for unread in (["--rule", "mass", "-k", "64"], ["--top-k", "5"]):
        assert cli.main(["inspect", "--out", "p.html", *unread]) == 2
        assert capsys.readouterr().err.startswith("mage: error: inspect: ")
        with pytest.raises(ValueError, match="chat: "):
            cli._config("chat", cli.make_parser().parse_args(["chat", *unread]))


@pytest.mark.parametrize("command", ["generate", "inspect"])
@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_an_empty_prompt_is_refused(command, raw, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "page.html")] if command == "inspect" else []
    monkeypatch.setattr(cli, "_load", None)  # told before a model is loaded
    for prompt, piped, told in (
        ("", "x", "''"),
        (" \n", "x", "' \\n'"),
        ("-", "", "'' from standard input"),
        ("-", "\n", "'\\n' from standard input"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        assert cli.main([command, "--prompt", prompt, *raw, *out]) == 2
        expected = f"mage: error: {command}: prompt must be a text that is not empty, got {told}\n"
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize("what", ["finetune", "adapter"])
def test_help_of_training_names_the_default_device(what, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", what, "--help"])
    assert "cuda (default) or cpu" in " ".join(capsys.readouterr().out.split())


def test_float32_is_for_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["generate", "--prompt", "x", "--device", "cuda", "--dtype", "float32"]) == 2
    assert "generate: dtype must be bfloat16 or float16 on cuda, got float32" in capsys.readouterr().err


def test_an_operator_without_a_kernel_is_one_line(monkeypatch, capsys):
    def without_kernel(*arguments, **options):
        torch.ops.mage.select_kv.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.XLA),
            *(torch.zeros(1), torch.zeros(1)),
            **dict(g=1, capacity=1),
        )

    monkeypatch.setattr("mage_ext.info.info_lines", without_kernel)
    assert cli.main(["info"]) == 2
    error = capsys.readouterr().err
    assert error == "mage: error: Could not run 'mage::select_kv' with arguments from the 'XLA' backend\n"


def test_info_names_package_torch_and_libraries(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "mage_ext: " in out and "torch: " in out and "library " in out


def _needs_base():
    try:
        builtin.base_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_generate_writes_the_answer_and_its_cost(capsys):
    _needs_base()
    prompt = "The secret code of the timid oyster is 4821973.\n\nQuestion: What is the secret code of the timid oyster?"
    assert cli.main(["generate", "--prompt", prompt + " Answer with the number only.", "--max-new-tokens", "20"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "4821973"
    assert re.search(r"8 tokens in \d+ forwards", printed.err)


def test_the_demo_names_its_model(monkeypatch, capsys):
    _needs_base()
    told = []
    monkeypatch.setattr("mage_ext.evaluation.demo.run_demo", lambda loaded, tokens, *_: told.append(tokens))
    for name, line in (("smollm2-cut16-block", "16 layers of SmolLM2-135M adapted"), (builtin.NAME, "SmolLM2-135M ad")):
        tokens = str(builtin.positions(name) - 192)
        assert cli.main(["demo", "--adapter", name, "--tokens", tokens]) == 0
        assert capsys.readouterr().out.startswith(line)
    assert told == [16192, 8000]


def test_dense_layers_beyond_the_model_are_told_as_given(capsys):
    _needs_base()
    assert cli.main(["generate", "--prompt", "x", "--model", "smollm2-cut16-block", "--dense-layers", "17"]) == 2
    assert "generate: dense_layers must be at most the model's 16 layers, got 17" in capsys.readouterr().err


@pytest.mark.parametrize("owner", ("profile", "advise"))
def test_dense_layers_beyond_a_random_model_are_told_before_it_is_made(owner, monkeypatch):
    monkeypatch.setattr("mage_ext.models.geometry.random_model", lambda *_, **__: pytest.fail("weights were drawn"))
    args = argparse.Namespace(model="random:7B", dense_layers=29, device="cpu", dtype=None, compile=False)
    with pytest.raises(ValueError, match=f"{owner}: dense_layers must be at most the model's 28 layers, got 29"):
        cli._speed_model(owner, args)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_block_is_seen_to_unmask():
    _needs_base()
    loaded = builtin.load_builtin()
    prompt = loaded.tokenizer.chat([{"role": "user", "content": "Remember that the password of the icy fox is 1234567. "
        "Question: What is the password of the icy fox? Answer with the number only."}])  # fmt: skip
    out = _Terminal()
    sampler = SamplerConfig(name="sequential")
    result = terminal.write(loaded, prompt, DenoiseConfig(max_new_tokens=16, sampler=sampler), 0, out)
    frames = [frame for frame in out.getvalue().split("\r") if "exact" in frame]
    shaded = [frame.count(terminal._OPEN) for frame in frames]
    assert len(frames) >= 7 and shaded == sorted(shaded, reverse=True) and shaded[0] > shaded[-1]
    assert result.text and result.text in out.getvalue()


@pytest.mark.parametrize("tail", ["!", "\u2026", ""])
def test_a_character_of_two_blocks_is_printed_once(tail, monkeypatch):
    """Blocks of three bytes: each part of a character comes with the block that completes it."""
    data = f"a\U0001f994b\U0001f9c0{tail}".encode()
    blocks = [SimpleNamespace(tokens=list(data[i : i + 3])) for i in range(0, len(data), 3)]

    result = SimpleNamespace(error=None)
    stream = type("Stream", (list,), {"results": [result]})(blocks)
    monkeypatch.setattr(terminal, "generate", lambda *arguments, **options: stream)
    tokenizer = SimpleNamespace(decode=lambda tokens: bytes(tokens).decode(errors="replace"))
    out = io.StringIO()
    loaded = SimpleNamespace(model=None, tokenizer=tokenizer)
    assert terminal.write(loaded, [1], DenoiseConfig(), 0, out) is result
    assert out.getvalue() == data.decode() + "\n"


def test_info_counts_kernels_by_family():
    from mage_ext.info import _counted

    names = ["mage_append_kv_kernel", "mage_row_votes_select_long_kernel", "mage_merge_attention_bf16_odd_many_kernel"]
    names += [f"mage_token_mass_kernel_bf16_d128_rows{rows}" for rows in (64, 128)]
    assert _counted(names) == "append_kv, row_votes_select_long, merge_attention, token_mass (2)"
    assert _counted([]) == ""


@pytest.mark.parametrize(
    "command", [["info"], ["eval", "recall"], ["train", "adapter", "--text", "t", "--out", "o", "--minutes", "1"]]
)
def test_unknown_options_come_with_the_usage_of_their_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--bogus", "1"])
    told = capsys.readouterr().err
    words = " ".join(word for word in command[:2] if not word.startswith("-"))
    assert ended.value.code == 2 and told.startswith(f"usage: mage {words} ")
    assert told.endswith(f"mage {words}: error: unrecognized arguments: --bogus 1\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"mage_ext {__version__}\n"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("mage_ext.info.info_lines", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "mage: interrupted; files written so far stay as they are\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["eval", "methods", "--dense-layers", "0", "99"],
            "eval: dense_layers must be below the model's 30 layers, got 99",
        ),
        (["eval", "methods", "--out", ""], "eval: out must be a file, got ''"),
        (["eval", "methods", "--first-seed", "-1"], "eval: first_seed must be in [0, 4294967296), got -1"),
        (["eval", "needles", "--tasks", "needle", "needle"], "eval: tasks must be different values, got needle needle"),
        (
            ["eval", "methods", "--tokens-per-step", "4", "8", "4"],
            "eval: tokens_per_step must be different values, got 4 8 4",
        ),
        (["eval", "recall", "--methods", "mage", "mage"], "eval: methods must be different values, got mage mage"),
        (["eval", "recall", "--k", "64", "64"], "eval: k must be different values, got 64 64"),
        (["eval", "prose", "--t", "0.5", ".50"], "eval: t must be different values, got 0.5 0.5"),
        (["eval", "heatmap", "--tokens", "1024", "1024"], "eval: tokens must be different values, got 1024 1024"),
        (["eval", "thresholds", "--thresholds", "1", "1"], "eval: thresholds must be different values, got 1.0 1.0"),
        (["eval", "methods", "--dense-layers", "0", "0"], "eval: dense_layers must be different values, got 0 0"),
        (["eval", "ruler", "a", "a", "--model", "m"], "eval: files must be different values, got a a"),
        (["inspect", "--out", ""], "inspect: out must be a file, got ''"),
        (
            ["train", "finetune", "--device", "cpu", "--model", "random:1.5B", "--text", "t.txt", "--out", "o"],
            "finetune: model must be a folder or a model in the box but for --measure, got 'random:1.5B'",
        ),
        (
            ["train", "finetune", "--device", "cpu", "--text", "t.txt", "--out", "o", "--control", "--lam", "2"],
            "finetune: lam must come without --control, got 2.0",
        ),
    ],
)
def test_mistakes_are_told_before_the_work(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"mage: error: {message}\n"


@pytest.mark.parametrize("suite", ["needles", "methods", "recall", "prose", "heatmap", "thresholds"])
def test_files_of_an_h100_are_refused_before_the_work(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(needles, "Runner", None)
    (tmp_path / "h100").mkdir()
    out = str(tmp_path / "h100" / "x.json")
    assert cli.main(["eval", suite, "--device", "cpu", "--out", out]) == 2
    told = f"mage: error: eval: out must be outside of folders named h100 on cpu, got {out!r}\n"
    assert capsys.readouterr().err == told


def test_a_folder_that_takes_no_new_file_is_refused(tmp_path, capsys):
    """Before the work. A file is replaced by a new one of its folder; what is no file is written in place."""
    for path in ("/proc/x.json", str(tmp_path / ("x" * 256)), str(tmp_path)):
        assert cli.main(["eval", "needles", "--out", path]) == 2
        told = f"eval: out must be a file that can be written, in a folder that can be, got {path!r}: "
        assert told in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    cli._check_out("eval", str(tmp_path / "pipe"))
    longest = tmp_path / ("x" * 255)
    cli._check_out("eval", str(longest))
    assert not longest.exists()
    write_text(longest, "text")
    cli._check_out("eval", str(longest))
    assert longest.read_text() == "text" and sorted(os.listdir(tmp_path)) == ["pipe", "x" * 255]


def test_a_report_spares_its_files(tmp_path, capsys):
    rows = [{"task": "t", "method": "exact", "K": 0, "g": 0, "n": 1, "score": 1.0, "exact": 1.0}]
    file = tmp_path / "m.json"
    needles.write_rows(file, "eval/unknown", "tiny", "cpu", "none", rows)
    before = file.read_text()
    assert json.loads(before)["complete"] is True
    page = tmp_path / "page.html"
    for files, out, message in (
        ([file], file, "eval: out must be none of files"),
        ([file, file], page, "files: must be different files"),
    ):
        assert cli.main(["eval", "report", "--files", *map(str, files), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["eval", "report", "--files", str(file), "--out", str(page), "--card", str(tmp_path / "none")]) == 2
    assert "eval: card must be a UTF-8 text file" in capsys.readouterr().err
    for bad, message in (
        ([], "must have rows, got none"),
        ([{**rows[0], "score": "high"}], "score of row 1 of b.json"),
    ):
        other = tmp_path / "b.json"
        needles.write_rows(other, "eval/unknown", "tiny", "cpu", "none", bad)
        assert cli.main(["eval", "report", "--files", str(other), "--out", str(page)]) == 2
        assert message in capsys.readouterr().err
    assert not page.exists() and file.read_text() == before
