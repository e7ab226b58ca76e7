"""LongBench's and RULER's metrics against values worked out by hand; their files, written here, on a tiny model.

Run: pytest tests/python/test_benchmark_files.py
"""

import json
import random

import pytest
import torch

from mage_ext import cli, models
from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.evaluation import benchmark_files as files
from mage_ext.evaluation import benchmark_metrics as metrics
from mage_ext.evaluation.method_comparison import Setting
from mage_ext.sampling import SamplerConfig
from test_finetune import folder as folder
from test_train import _one_thread as _one_thread
from test_train import vocabulary as vocabulary

# --- metrics --------------------------------------------------------------------------------------------------------


def test_normalized_answers():
    assert metrics.normalize_answer("The  cat's, (an) Apple-pie\n and THE a.") == "cats applepie and"
    assert metrics.normalize_answer("theatre another") == "theatre another"


@pytest.mark.parametrize(
    "prediction, reference, score",
    [
        ("The cat sat on the mat.", "a cat on mat", 2 * 0.75 / 1.75),  # 3 of 4 words, 3 of 3
        ("cat cat", "cat", 2 * 0.5 / 1.5),  # words count as often as they occur
        ("Dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
    ],
)
def test_qa_f1(prediction, reference, score):
    assert metrics.qa_f1_score(prediction, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    "prediction, reference, score",
    [
        # "the cat" of the first sentence and "ran" of the second are 3 of 3 words; of 6 given ones the half.
        ("the cat sat. a dog ran", "the cat ran", 2 * 0.5 / 1.5),
        ("a a a", "a b", 2 * 0.5 / 1.5),  # sets: 1 of 1, 1 of 2
        ("the cat. ", "the cat.", 2 * (2 / 3) / (5 / 3)),  # what stands behind the last stop is an empty word
        ("b a", "a b", 2 * 0.25 / 1.0),  # one word of two is in order
        ("same words here", "same words here", 1.0),
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("a", "", 0.0),
    ],
)
def test_rouge_l(prediction, reference, score):
    assert metrics.rouge_score(prediction, reference) == pytest.approx(score, abs=1e-7)


def test_which_common_subsequence_is_taken():
    """From the ends; where both ways are as long the second list is shortened, so that "a b" and "b a" share "b"."""
    assert metrics._common_subsequence(["a", "b"], ["b", "a"]) == ["b"]
    assert metrics._common_subsequence(list("xaxbx"), list("ayb"))[::-1] == ["a", "b"]
    assert metrics._common_subsequence(["a"], []) == []


@pytest.mark.parametrize(
    "prediction, reference, classes, score",
    [
        ("It is a Date", "Date", ["Date", "Number"], 1.0),
        ("Date or Number", "Date", ["Date", "Number"], 0.5),
        ("Number", "Date", ["Date", "Number"], 0.0),
        # A class that is a part of the right one goes; the one behind it is passed over, as in LongBench's own loop.
        ("Number of something", "Number of something", ["Number", "Number of something"], 1.0),
        ("abc", "abc", ["a", "ab", "abc"], 0.5),
        ("", "Date", ["Date"], 0.0),
    ],
)
def test_classification(prediction, reference, classes, score):
    assert metrics.classification_score(prediction, reference, classes) == score


def test_counts_and_paragraphs():
    assert metrics.count_score("5, or 7, no: 5", "5") == pytest.approx(2 / 3)
    assert metrics.count_score("55", "5") == 0 and metrics.count_score("five", "5") == 0
    assert metrics.retrieval_score("Paragraph 12 or paragraph 3", "Paragraph 12") == 0.5
    assert metrics.retrieval_zh_score("段落3", "段落3") == 1.0
    with pytest.raises(ValueError, match=r"reference must hold Paragraph \(\\d\+\), got 'twelve'"):
        metrics.retrieval_score("12", "twelve")


@pytest.mark.parametrize(
    "prediction, reference, score",
    [
        ("\n# comment\n`x`\n// y\nreturn x + 1\nmore", "return x + 1", 1.0),
        ("return x + 1", "return x", 0.8),  # 2 * 8 / (12 + 8)
        ("abc", "abd", 0.67),  # 2 * 2 / 6, rounded
        ("# all", "x", 0.0),
        ("# all", "", 1.0),  # two empty lines are equal
    ],
)
def test_code_similarity(prediction, reference, score):
    assert metrics.code_sim_score(prediction, reference) == score


@pytest.mark.filterwarnings("ignore:Using slow pure-python SequenceMatcher")
def test_metrics_are_those_of_the_packages_that_longbench_calls():
    """On random text, where the packages are installed: pip install rouge==1.0.1 fuzzywuzzy."""
    rouge, fuzz = pytest.importorskip("rouge"), pytest.importorskip("fuzzywuzzy.fuzz")
    if fuzz.SequenceMatcher.__module__ != "difflib":
        pytest.skip("fuzzywuzzy counts with python-Levenshtein here")
    rng, pieces = random.Random(0), ["a", "b", "c", "the", "dog", " ", " ", ". ", ".", " x ", "\n"]

    def text():
        return "".join(rng.choice(pieces) for _ in range(rng.randrange(40)))

    for _ in range(500):
        prediction, reference = text(), text()
        try:
            expected = rouge.Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
        except ValueError:  # nothing to compare: LongBench counts 0
            expected = 0.0
        assert metrics.rouge_score(prediction, reference) == pytest.approx(expected, abs=1e-12)
        line = prediction.lstrip("\n").split("\n")[0]
        assert metrics.code_sim_score(prediction, reference) == fuzz.ratio(line, reference) / 100


def test_the_best_answer_counts_and_of_some_datasets_the_first_line():
    assert metrics.longbench_score("narrativeqa", "Paris", ["London", "Paris"]) == 1.0
    assert metrics.longbench_score("narrativeqa", "\nParis\nRome", ["Paris"]) == pytest.approx(2 / 3)
    assert metrics.longbench_score("triviaqa", "\n\nParis\nRome", ["Paris"]) == 1.0
    assert metrics.longbench_score("trec", "Date\nNumber", ["Date"], ["Date", "Number"]) == 1.0
    assert metrics.longbench_score("passage_count", "3", ["3"]) == 1.0
    assert len(metrics.LONGBENCH) + len(metrics.LONGBENCH_LEFT_OUT) == 21  # the datasets of LongBench


def test_ruler_matches_strings():
    assert metrics.string_match_all("They are 123 and 456", ["123", "789"]) == 0.5
    assert metrics.string_match_part("They are 123 and 456", ["123", "789"]) == 1.0
    assert metrics.string_match_part("none", ["123"]) == 0.0
    assert metrics.ruler_score("niah", "  ABC ", ["abc"]) == 1.0
    assert metrics.ruler_score("niah", "12\x003", ["123"]) == 0.0  # control characters part what they stand between
    assert metrics.ruler_score("qa", "Yes, Paris", ["paris", "rome"]) == 1.0
    assert metrics.ruler_score("vt", "X1 X2", ["X1", "X2", "X3", "X4"]) == 0.5


# --- files ----------------------------------------------------------------------------------------------------------

PROSE = "The miller walked slowly toward the market. The wind came from the sea. " * 6


@pytest.fixture
def loaded(folder):
    return models.load(folder)


@pytest.fixture
def config(tmp_path):
    """LongBench's folder config, for two datasets."""
    path = tmp_path / "config"
    path.mkdir()
    prompts = {"narrativeqa": "Story: {context}\nQuestion: {input}\nAnswer:", "trec": "{context}\n{input}"}
    (path / "dataset2prompt.json").write_text(json.dumps(prompts))
    (path / "dataset2maxlen.json").write_text(json.dumps({"narrativeqa": 40, "trec": 8}))
    return path


def longbench_row(**fields):
    row = dict(
        input="Who walked?",
        context=PROSE,
        answers=["the miller", "miller"],
        length=80,
        dataset="narrativeqa",
        language="en",
        all_classes=None,
        _id="1",
    )
    return {key: value for key, value in {**row, **fields}.items() if value is not ...}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_longbench_prompts_follow_the_given_wording(loaded, config, tmp_path):
    rows = [longbench_row(), longbench_row(dataset="trec", all_classes=["Date", "Number"], answers=["Date"])]
    path = write(tmp_path / "two.jsonl", rows)
    first, second = files.longbench_items(loaded, [path], config)
    decode = lambda item: loaded.tokenizer.decode(item.prompt, skip_special_tokens=False)  # noqa: E731
    text = f"Story: {PROSE}\nQuestion: Who walked?\nAnswer:"
    assert decode(first) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(second) == f"{PROSE}\nWho walked?"  # no chat template
    assert (first.max_new_tokens, second.max_new_tokens) == (40, 8)
    assert not first.cut and first.answers == ("the miller", "miller")
    assert first.score("It was the miller") == pytest.approx(0.5)  # 1 of 3 words and 1 of 1
    assert second.score("Date\nNumber") == 1.0
    assert [item.place for item in (first, second)] == ["line 1 of two.jsonl", "line 2 of two.jsonl"]
    assert len(files.longbench_items(loaded, [path], config, n=1)) == 1
    # The dataset is the file's name where no line says it; "_e" is LongBench-E's.
    path = write(tmp_path / "trec_e.jsonl", [longbench_row(dataset=..., all_classes=["x"], answers=["x"])])
    assert [item.task for item in files.longbench_items(loaded, [path], config)] == ["trec"]


def test_long_prompts_lose_their_middle(loaded, config, tmp_path):
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(PROSE)
    assert files.cut_middle(PROSE, tokenizer, len(ids)) == PROSE
    cut = files.cut_middle(PROSE, tokenizer, 21)
    assert cut == tokenizer.decode(ids[:10]) + tokenizer.decode(ids[-10:])
    path = write(tmp_path / "a.jsonl", [longbench_row()])
    (item,) = files.longbench_items(loaded, [path], config, max_length=21)
    assert item.cut and len(item.prompt) < 21 + 20
    long = write(tmp_path / "b.jsonl", [longbench_row(context=PROSE * 20)])
    (item,) = files.longbench_items(loaded, [long], config)  # the model has 512 positions
    assert item.cut and 440 < len(item.prompt) <= 512 - 40


def test_ruler_prompts_are_taken_as_they_are(loaded, tmp_path):
    old = dict(index=0, input=PROSE + " The numbers are", outputs=["123", "456"], length=90)
    new = dict(index=1, input=PROSE, outputs=["123"], length=90, answer_prefix=" The numbers are")
    path = write(tmp_path / "niah_multikey_1" / "validation.jsonl", [old, new])
    first, second = files.ruler_items(loaded, [path])
    assert first.task == "niah_multikey_1" and first.max_new_tokens == 128
    assert first.prompt == second.prompt == loaded.tokenizer.encode(PROSE + " The numbers are")
    assert first.score("123") == 0.5
    qa = write(tmp_path / "qa_1.jsonl", [dict(input=PROSE, outputs=["a", "b"])])
    assert files.ruler_items(loaded, [qa])[0].max_new_tokens == 32
    (item,) = files.ruler_items(loaded, [qa], max_new_tokens=5)
    assert item.max_new_tokens == 5 and item.score("b") == 1.0
    _, chat = files.ruler_items(loaded, [path], chat=True)
    text = loaded.tokenizer.decode(chat.prompt, skip_special_tokens=False)
    assert text == f"<|im_start|>user\n{PROSE}<|im_end|>\n<|im_start|>assistant\n The numbers are"


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "eval: line 2 of x.jsonl must be JSON"),
        ("[]", "eval: line 2 of x.jsonl must be an object, got list"),
        (longbench_row(context=...), "eval: line 2 of x.jsonl must have a string 'context', got None"),
        (longbench_row(answers=[]), "eval: line 2 of x.jsonl must have a list of strings 'answers', at least one"),
        (longbench_row(answers="miller"), "must have a list of strings 'answers', at least one, got 'miller'"),
        (longbench_row(dataset="dureader"), "got 'dureader', whose metric needs the package jieba"),
        (longbench_row(dataset="poems"), "the dataset of line 2 of x.jsonl must be one of narrativeqa, "),
        (longbench_row(dataset="qasper"), "longbench: dataset2prompt.json must have 'qasper', got none"),
        (longbench_row(dataset="trec"), "longbench: line 2 of x.jsonl must have a list 'all_classes', got none"),
    ],
)
def test_longbench_files_refuse(loaded, config, tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", [longbench_row(), row])
    with pytest.raises(ValueError) as error:
        files.longbench_items(loaded, [path], config)
    assert message in str(error.value)


def test_other_files_refuse(loaded, config, tmp_path):
    good = write(tmp_path / "a.jsonl", [longbench_row()])
    cases = [
        (lambda: files.longbench_items(loaded, [tmp_path / "no"], config), "which is not a file"),
        (
            lambda: files.longbench_items(loaded, [good], tmp_path),
            "config must be LongBench's folder of that name with",
        ),
        (lambda: files.longbench_items(loaded, [good], config, max_length=1), "max_length must be None or at least 2"),
        (lambda: files.ruler_items(loaded, [good]), "must begin with one of niah, vt, cwe, fwe, qa, got 'a'"),
        (
            lambda: files.ruler_items(loaded, [write(tmp_path / "vt.jsonl", [dict(input=PROSE * 9, outputs=["x"])])]),
            "the prompt of line 1 of vt.jsonl must have from 1 to 482 tokens",
        ),
        (
            lambda: files.ruler_items(loaded, [write(tmp_path / "qa_2.jsonl", [dict(input="x", outputs=[3])])]),
            "must have a list of strings 'outputs'",
        ),
        (lambda: list(files.run(loaded, [], [Setting(64, 16, 0)])), "files must hold at least one item, got none"),
    ]
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "dataset2prompt.json").write_text("[" * 100_000)
    cases.append((lambda: files.longbench_items(loaded, [good], deep), "dataset2prompt.json must be JSON, got: "))
    (config / "dataset2prompt.json").write_text('{"narrativeqa": "{story}"}')
    cases.append((lambda: files.longbench_items(loaded, [good], config), "must name fields of line 1 of a.jsonl"))
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_runs_score_what_generate_writes(loaded, config, tmp_path):
    rows = [longbench_row(input=f"Who walked {i}?", context=PROSE[i:]) for i in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    items = files.longbench_items(loaded, [path], config)
    expected = [
        generate(loaded.model, [item.prompt], DenoiseConfig(max_new_tokens=40), tokenizer=loaded.tokenizer)[0].text
        for item in items
    ]
    # Answers that a random model writes can't be foreseen: the references are taken from them.
    items = [
        files.Item(**{**vars(item), "score": lambda text, own=own: metrics.qa_f1_score(text, own)})
        for item, own in zip(items, [expected[0], expected[1], "nothing of it"], strict=True)
    ]
    kept = {}
    wanted = [Setting(32, 16, 0), Setting(512, 16, 0)]
    (rows,) = files.run(
        loaded,
        items,
        wanted,
        ["exact", "mage", "quest", "two_level"],  # the last one is of single tokens
        batch=2,
        keep=lambda task, method, items, outcome: kept.update({method: outcome}),
    )
    assert kept["exact"].predictions == expected == kept["mage-512-16-0"].predictions
    exact, mage, quest, full = rows[0], rows[1], rows[2], rows[3]
    assert [row["method"] for row in rows] == ["exact", "mage", "quest", "mage", "quest"]
    best = [metrics.qa_f1_score(text, text) for text in expected[:2]]
    assert exact["score"] == pytest.approx(sum(best) / 3) and exact["n"] == 3
    assert exact["ci_low"] <= exact["score"] <= exact["ci_high"] and exact["diff_low"] == exact["diff_high"] == 0
    assert exact["kv_share"] == 1 and exact["K"] == 0
    for row in (mage, quest, full):
        assert row["exact"] == exact["score"]
    outcome = kept["mage-32-16-0"]
    assert mage["score"] == pytest.approx(sum(outcome.scores) / 3)
    assert outcome.scores == [item.score(text) for item, text in zip(items, outcome.predictions, strict=True)]
    assert mage["sparse_items"] == 1 and mage["kv_share"] < 1
    assert full["sparse_items"] == 0 and full["kv_share"] == 1 and full["score"] == exact["score"]
    prefixes = [len(item.prompt) // 32 * 32 for item in items]
    assert mage["K_share"] == pytest.approx(32 * 3 / sum(prefixes))
    assert len(files.row_line(mage)) < 160


def test_the_interval_is_that_of_the_mean(loaded):
    scores = [0.0, 1.0, 0.5, 0.25]
    outcome = files.Outcome([""] * 4, scores, [1.0] * 4, [1] * 4)
    items = [files.Item("qa", "", [1] * 64, 8, ("x",), float, {})] * 4
    row = files._row("qa", Setting(32, 16, 0), "mage", outcome, outcome, items, [64] * 4, SamplerConfig())
    assert row["score"] == pytest.approx(0.4375)
    draws = torch.tensor(scores, dtype=torch.float64)[torch.randint(4, (200000, 4))].mean(1)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    grid = 1 / 16  # means of four of these scores are multiples of it
    assert row["ci_low"] == pytest.approx(low, abs=grid) and row["ci_high"] == pytest.approx(high, abs=grid)


def test_commands_write_rows_and_answers(folder, config, tmp_path, capsys, monkeypatch):
    stories = write(tmp_path / "narrativeqa.jsonl", [longbench_row(), longbench_row(input="Where?")])
    (tmp_path / "h100").mkdir()
    out, pred = tmp_path / "rows.json", tmp_path / "pred"
    shared = ["--model", str(folder), "--k", "32", "--g", "16", "--dense-layers", "0", "--device", "cpu"]
    arguments = [str(stories), "--config", str(config), "--out", str(out), "--pred", str(pred)]
    assert cli.main(["eval", "longbench", *arguments, *shared, "--batch", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[1].startswith("narrativeqa") and "K=32 g=16 dense=0" in printed[1]
    written = json.loads(out.read_text())
    assert (written["name"], written["n"], written["model"]) == ("eval/longbench", 2, str(folder))
    assert [(row["task"], row["method"], row["K"]) for row in written["rows"]] == [
        ("narrativeqa", "exact", 0),
        ("narrativeqa", "mage", 32),
    ]
    for row, name in zip(written["rows"], ("exact", "mage-32-16-0"), strict=True):
        lines = [json.loads(line) for line in (pred / name / "narrativeqa.jsonl").read_text().splitlines()]
        assert [line["answers"] for line in lines] == [["the miller", "miller"]] * 2
        assert {"pred", "answers", "all_classes", "length", "_id"} == set(lines[0])
        scores = [metrics.longbench_score("narrativeqa", line["pred"], line["answers"]) for line in lines]
        assert row["score"] == pytest.approx(sum(scores) / 2)

    elsewhere = tmp_path / "h100" / "rows.json"
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", None)  # told before the model is read
        arguments = ["eval", "longbench", str(stories), "--config", str(config), *shared, "--out", str(elsewhere)]
        assert cli.main(arguments) == 2
    assert "eval: out must be outside of folders named h100 on cpu, got '" in capsys.readouterr().err

    needles = write(tmp_path / "niah_single_1.jsonl", [dict(index=0, input=PROSE, outputs=["123"], length=9)])
    assert cli.main(["eval", "ruler", str(needles), *shared, "--max-new-tokens", "4", "--tokens-per-step", "2"]) == 0
    assert capsys.readouterr().out.startswith("niah_single_1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--k", "33", "--g", "16"), "eval: k must hold a multiple of one of gs = [16], got [33]"),
        (("--n", "0"), "eval: n must be at least 1, got 0"),
        (("--batch", "0"), "eval: batch must be at least 1, got 0"),
        (
            ("--model", "nowhere"),
            "load: path must be a folder with config.json or a model in the box (",
        ),
        (("--out", "no/such/folder.json"), "eval: out must be in a folder that exists"),
    ],
)
def test_commands_say_in_one_line_what_is_wrong(folder, tmp_path, arguments, message, capsys):
    path = write(tmp_path / "qa_1.jsonl", [dict(input=PROSE, outputs=["x"])])
    assert cli.main(["eval", "ruler", str(path), "--model", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"mage: error: {message}")
