"""LongBench and RULER on the user's own files and checkpoint: every method at given K beside exact attention.

The project has neither the files nor the paper's checkpoints, and these suites were never run on real weights. They
are tested on small files of the same form.

LongBench: JSON lines with input, context, answers, all_classes, length, dataset, _id, and the two files of its folder
config, dataset2prompt.json and dataset2maxlen.json, from which the wording of prompts and the length of answers come;
the project has no wording of its own. Prompts longer than --max-length lose their middle, as in LongBench's pred.py;
the datasets that it gives to chat models without a template get none. LongBench ends samsum's answers at a newline;
here the metric, which reads the first line, does.

RULER: JSON lines with input, outputs, length and, in newer files, answer_prefix, which the answer continues. The task
is the file's name, or its folder's where that is validation.jsonl or test.jsonl. Prompts are taken as they are.

Intervals are 95 % bootstrap intervals over items.

Test: pytest tests/python/test_benchmark_files.py
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mage_ext._files import write_text
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import benchmark_metrics as metrics
from mage_ext.evaluation.forced_blocks import bootstrap
from mage_ext.evaluation.method_comparison import METHODS, Setting, configs, methods_at
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.sampling import SamplerConfig

# LongBench: "chat models are better off without build prompts on these tasks".
_NO_TEMPLATE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
# Tokens that RULER generates for a kind of task.
_RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


@dataclass(frozen=True)
class Item:
    """One question.

    Fields:
        task: dataset or task. place: file and line, for messages. prompt: ids. max_new_tokens: of the answer.
        answers: references, at least one. score: of a decoded answer, in [0, 1].
        source: the fields of its line. cut: its prompt lost its middle.
    """

    task: str
    place: str
    prompt: list[int]
    max_new_tokens: int
    answers: tuple[str, ...]
    score: Callable[[str], float]
    source: Mapping[str, Any]
    cut: bool = False


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a file of JSON lines."""
    if not path.is_file():
        raise ValueError(f"eval: files must name readable files, got {str(path)!r}, which is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"eval: {path.name} must be UTF-8, got byte {error.object[error.start]:#04x}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path.name}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"eval: {place} must be JSON, got: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"eval: {place} must be an object, got {type(row).__name__}")
        yield place, row


def _text(place: str, row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"eval: {place} must have a string {key!r}, got {row.get(key)!r:.100}")
    return row[key]


def _texts(place: str, row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f"eval: {place} must have a list of strings {key!r}, at least one, got {value!r:.100}")
    return tuple(value)


def cut_middle(text: str, tokenizer: Tokenizer, most: int) -> str:
    """A text of more than `most` tokens without its middle: the texts of its first and last most // 2 tokens, joined
    (LongBench's pred.py); others as they are."""
    ids = tokenizer.encode(text)
    if len(ids) <= most:
        return text
    half = most // 2
    return tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])


def _user(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.chat([{"role": "user", "content": text}])


def _check_room(loaded: LoadedModel, place: str, prompt: Sequence[int], max_new_tokens: int) -> None:
    room = loaded.config.max_positions - max_new_tokens
    if not 1 <= len(prompt) <= room:
        raise ValueError(
            f"eval: the prompt of {place} must have from 1 to {room} tokens (the model's positions less the answer's "
            f"{max_new_tokens}), got {len(prompt)}"
        )


def _read_config(folder: str | Path, name: str, kind: type) -> dict[str, Any]:
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"longbench: config must be LongBench's folder of that name with {name}, got {str(folder)!r}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"longbench: {name} must be JSON, got: {error}") from None
    if not isinstance(value, dict) or not all(type(each) is kind for each in value.values()):
        raise ValueError(f"longbench: {name} must map datasets to {kind.__name__}, got something else")
    return value


def longbench_items(
    loaded: LoadedModel,
    files: Sequence[str | Path],
    config: str | Path,
    *,
    max_length: int | None = None,
    n: int | None = None,
) -> list[Item]:
    """Items of LongBench's files, in order; the dataset is the line's, or the file's name, a final "_e" left out.

    Args:
        loaded: model and tokenizer, with a chat template. files: JSON lines. config: folder of dataset2prompt.json and
            dataset2maxlen.json.
        max_length: tokens of a prompt before the chat template; None: what the model's positions leave.
        n: items of a file; None: all.
    Raises:
        ValueError: naming the file and the line.
    """
    templates, lengths = (
        _read_config(config, f"dataset2{name}.json", kind) for name, kind in (("prompt", str), ("maxlen", int))
    )
    if max_length is not None and max_length < 2:
        raise ValueError(f"longbench: max_length must be None or at least 2, got {max_length}")
    tokenizer, items = loaded.tokenizer, []
    around = len(_user(tokenizer, "x"))
    for path in map(Path, files):
        for place, row in list(_lines(path))[:n]:
            dataset = (_text(place, row, "dataset") if "dataset" in row else path.stem).removesuffix("_e")
            if dataset not in metrics.LONGBENCH:
                left_out = dataset in metrics.LONGBENCH_LEFT_OUT
                why = ", whose metric needs the package jieba" if left_out else ""
                raise ValueError(
                    f"longbench: the dataset of {place} must be one of {', '.join(metrics.LONGBENCH)}, "
                    f"got {dataset!r}{why}"
                )
            for name, table in (("dataset2prompt.json", templates), ("dataset2maxlen.json", lengths)):
                if dataset not in table:
                    raise ValueError(f"longbench: {name} must have {dataset!r}, got none")
            for key in ("context", "input"):
                _text(place, row, key)
            answers = _texts(place, row, "answers")
            classes = _texts(place, row, "all_classes") if row.get("all_classes") is not None else ()
            if metrics.LONGBENCH[dataset] is metrics.classification_score and not classes:
                raise ValueError(f"longbench: {place} must have a list 'all_classes', got none")
            try:
                whole = templates[dataset].format(**row)
            except (KeyError, IndexError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"longbench: the template of {dataset!r} must name fields of {place}, got: {error!r}"
                ) from None
            new = lengths[dataset]
            # Two halves that are joined can become a few tokens longer.
            room = max(2, loaded.config.max_positions - new - around - 16)
            text = cut_middle(whole, tokenizer, room if max_length is None else max_length)
            prompt = tokenizer.encode(text) if dataset in _NO_TEMPLATE else _user(tokenizer, text)
            _check_room(loaded, place, prompt, new)
            items.append(
                Item(dataset, place, prompt, new, answers, _longbench(dataset, answers, classes), row, text != whole)
            )
    return items


def _longbench(dataset: str, answers: Sequence[str], classes: Sequence[str]) -> Callable[[str], float]:
    return lambda prediction: metrics.longbench_score(dataset, prediction, answers, classes)


def ruler_items(
    loaded: LoadedModel,
    files: Sequence[str | Path],
    *,
    chat: bool = False,
    max_new_tokens: int | None = None,
    n: int | None = None,
) -> list[Item]:
    """Items of RULER's files, in order.

    Args:
        loaded: model and tokenizer. files: JSON lines, named after their task, or validation.jsonl in a folder of its
            name. chat: put the chat template around "input", for files that were made without one.
        max_new_tokens: of all answers; None: RULER's number for the task. n: items of a file; None: all.
    Raises:
        ValueError: naming the file and the line.
    """
    tokenizer, items = loaded.tokenizer, []
    for path in map(Path, files):
        task = path.resolve().parent.name if path.stem in ("validation", "test") else path.stem
        kind = task.partition("_")[0]
        if kind not in metrics.RULER:
            raise ValueError(
                f"ruler: the task of {str(path)!r} must begin with one of {', '.join(metrics.RULER)}, got {task!r}"
            )
        new = _RULER_TOKENS[kind] if max_new_tokens is None else max_new_tokens
        for place, row in list(_lines(path))[:n]:
            text, outputs = _text(place, row, "input"), _texts(place, row, "outputs")
            start = _text(place, row, "answer_prefix") if row.get("answer_prefix") is not None else ""
            if text.endswith(start):  # older files have it there
                text = text[: len(text) - len(start)]
            if chat:
                prompt = tokenizer.encode(
                    tokenizer.render_chat([{"role": "user", "content": text}]) + start, add_special_tokens=False
                )
            else:
                prompt = tokenizer.encode(text + start)
            _check_room(loaded, place, prompt, new)
            items.append(Item(task, place, prompt, new, outputs, _ruler(kind, outputs), row))
    return items


def _ruler(kind: str, references: Sequence[str]) -> Callable[[str], float]:
    return lambda prediction: metrics.ruler_score(kind, prediction, references)


@dataclass
class Outcome:
    """What a method did with the items of a task: answers, scores, shares of K/V read, and forwards, item by item."""

    predictions: list[str]
    scores: list[float]
    kv_shares: list[float]
    forwards: list[int]


def run(
    loaded: LoadedModel,
    items: Sequence[Item],
    wanted: Sequence[Setting],
    names: Sequence[str] = METHODS,
    sampler: SamplerConfig | None = None,
    batch: int = 1,
    tell: Callable[[str], None] | None = None,
    keep: Callable[[str, str, list[Item], Outcome], None] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Every method at every setting on all items, task by task; a batch shares its prefill.

    Args:
        loaded: model and tokenizer. items: of `longbench_items` or `ruler_items`.
        wanted: of `method_comparison.settings`. names: of `method_comparison.ALL_METHODS`; exact always runs.
        sampler: None: SamplerConfig(). batch: items per batch. tell: takes a line per batch.
        keep: takes (task, method with its setting, items, outcome) when a task is done.
    Returns:
        The rows of an evaluation file so far, after every task. score is the mean of the official metric, [ci_low,
        ci_high] its interval, exact that of exact attention on the same items, [diff_low, diff_high] the interval of
        the mean difference to it. sparse_items: share of the items whose prefix is longer than K.
    Raises:
        ValueError: naming the argument.
    """
    if not items:
        raise ValueError("eval: files must hold at least one item, got none")
    if batch < 1:
        raise ValueError(f"eval: batch must be at least 1, got {batch}")
    names = [name for name in dict.fromkeys(names) if name != "exact"]
    sampler = SamplerConfig() if sampler is None else sampler
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(item.task for item in items):
        own = [item for item in items if item.task == task]
        outcomes: dict[tuple[Setting | None, str], Outcome] = {(None, "exact"): Outcome([], [], [], [])}
        for setting in wanted:
            outcomes |= {(setting, name): Outcome([], [], [], []) for name in methods_at(setting, names)}
        for begin in range(0, len(own), batch):
            _run_batch(loaded, own[begin : begin + batch], outcomes, sampler)
            if tell is not None:
                done = min(begin + batch, len(own))
                means = (f"{_label(*key)} {100 * sum(o.scores) / done:.1f}" for key, o in outcomes.items())
                tell(f"{task} {done}/{len(own)}: {', '.join(means)}")
        size = loaded.config.block_size
        prefixes = [len(item.prompt) // size * size for item in own]
        exact = outcomes[None, "exact"]
        for (setting, name), outcome in outcomes.items():
            rows.append(_row(task, setting, name, outcome, exact, own, prefixes, sampler))
            if keep is not None:
                keep(task, _label(setting, name), own, outcome)
        yield rows


def _label(setting: Setting | None, name: str) -> str:
    return name if setting is None else f"{name}-{setting.K}-{setting.g}-{setting.dense_layers}"


def _run_batch(
    loaded: LoadedModel,
    items: Sequence[Item],
    outcomes: Mapping[tuple[Setting | None, str], Outcome],
    sampler: SamplerConfig,
) -> None:
    base = DenoiseConfig(max_new_tokens=max(item.max_new_tokens for item in items), sampler=sampler)
    state = prefill(loaded.model, [item.prompt for item in items], base)
    try:
        for setting in dict.fromkeys(setting for setting, _ in outcomes):
            names = [name for at, name in outcomes if at == setting]
            # Not kept: Quest's holds tensors as large as a part of the cache.
            found = (
                {"exact": base} if setting is None else configs(loaded.model, state.batch.cache, setting, base, names)
            )
            for name in names:
                results = generate(loaded.model, state.fork(), found.pop(name), tokenizer=loaded.tokenizer)
                outcome = outcomes[setting, name]
                for item, result in zip(items, results, strict=True):
                    if result.text is None or result.error is not None:
                        raise ValueError(f"eval: {item.place} could not be answered: {result.error}")
                    outcome.predictions.append(result.text)
                    outcome.scores.append(item.score(result.text))
                    outcome.kv_shares.append(result.stats.kv_share)
                    outcome.forwards.append(result.stats.num_forwards)
    finally:
        state.release()


def _row(
    task: str,
    setting: Setting | None,
    name: str,
    outcome: Outcome,
    exact: Outcome,
    items: Sequence[Item],
    prefixes: Sequence[int],
    sampler: SamplerConfig,
) -> dict[str, Any]:
    scores, reference = (torch.tensor(o.scores, dtype=torch.float64) for o in (outcome, exact))
    low, high = bootstrap(scores)
    diff_low, diff_high = bootstrap(scores - reference)
    count, K = len(items), setting.K if setting is not None else 0
    return {
        "task": task,
        "method": name,
        "K": K,
        "g": setting.g if setting is not None else 0,
        "dense_layers": setting.dense_layers if setting is not None else -1,
        "sampler": sampler.name,
        "tokens_per_step": sampler.tokens_per_step if sampler.name == "low_confidence_static" else None,
        "n": count,
        "score": scores.mean().item(),
        "ci_low": low,
        "ci_high": high,
        "exact": reference.mean().item(),
        "diff_low": diff_low,
        "diff_high": diff_high,
        "prompt_tokens": sum(len(item.prompt) for item in items) / count,
        "K_share": K * count / max(sum(prefixes), 1),
        "sparse_items": sum(prefix > K for prefix in prefixes) / count if setting is not None else 0.0,
        "cut_items": sum(item.cut for item in items) / count,
        "kv_share": sum(outcome.kv_shares) / count,
        "forwards": sum(outcome.forwards) / count,
    }


def row_line(row: Mapping[str, Any]) -> str:
    """A row as a line of text, scores times 100 as both benchmarks print them."""
    setting = f"K={row['K']} g={row['g']} dense={row['dense_layers']}" if row["K"] else ""
    return (
        f"{row['task']:<20} {row['method']:<11} {setting:<21} {100 * row['score']:6.2f} "
        f"[{100 * row['ci_low']:.2f}, {100 * row['ci_high']:.2f}]  exact {100 * row['exact']:6.2f}  n = {row['n']}, "
        f"{row['prompt_tokens']:.0f} tokens, K/prefix {100 * row['K_share']:.1f} %, "
        f"{100 * row['sparse_items']:.0f} % sparse"
    )


def keeper(folder: str | Path) -> Callable[[str, str, list[Item], Outcome], None]:
    """For `run`: writes <folder>/<method>/<task>.jsonl, one line per item, with pred beside the fields that the
    benchmarks' own scripts read (answers, all_classes, length; index, outputs)."""
    folder = Path(folder)

    def keep(task: str, method: str, items: list[Item], outcome: Outcome) -> None:
        (folder / method).mkdir(parents=True, exist_ok=True)
        lines = []
        for item, prediction in zip(items, outcome.predictions, strict=True):
            fields = {key: item.source[key] for key in _KEPT if key in item.source}
            lines.append(json.dumps({"pred": prediction, **fields}, ensure_ascii=False))
        write_text(folder / method / f"{task}.jsonl", "\n".join(lines) + "\n")

    return keep


_KEPT = ("answers", "all_classes", "length", "_id", "index", "outputs")
