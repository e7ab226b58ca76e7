"""Scores of LongBench (arXiv 2308.14508) and RULER (arXiv 2404.06654), per item, in [0, 1].

Written from their evaluation scripts (LongBench's metrics.py and eval.py, RULER's scripts/eval), whose results they
are made to equal, oddities included. ROUGE-L is that of the Python package rouge 1.0.1, which LongBench calls: sets of
words, sentences cut at every full stop. Where that package's recursion overflows, at sentences of about a thousand
words, LongBench counts 0 and this the score. The ratio of code is that of fuzzywuzzy without python-Levenshtein, as
LongBench's requirements have it. Datasets whose Chinese text LongBench cuts with jieba are left out.

Test: pytest tests/python/test_benchmark_files.py
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str]], float]  # (prediction, reference, classes) -> score

_PUNCTUATION = set(string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (as SQuAD's script does it)."""
    kept = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def qa_f1_score(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words of both, as multisets, after normalize_answer."""
    given, wanted = (normalize_answer(text).split() for text in (prediction, reference))
    same = sum((Counter(given) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_score(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L, summary level, F: of the words in the union of the longest common subsequences of all pairs of
    sentences."""
    given, wanted = ([piece.split() or [""] for piece in text.split(".") if piece] for text in (prediction, reference))
    if not given or not wanted:
        return 0.0
    common = {word for one in wanted for other in given for word in _common_subsequence(one, other)}
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    precision = len(common) / len({word for sentence in given for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one that is found from the ends, shortening y before x."""
    lengths = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, word in enumerate(x, 1):
        for j, other in enumerate(y, 1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if word == other else max(lengths[i - 1][j], lengths[i][j - 1])
    found, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def classification_score(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (number of classes named) if the right one is among them. A named class that is a part of the right one does
    not count, except directly behind another such (LongBench removes from the list that it walks through)."""
    named = [name for name in classes if name in prediction]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if reference in named else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count_score(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, reference)


def retrieval_score(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the paragraph's, reference being "Paragraph <number>".

    Raises:
        ValueError: the reference is not of that form.
    """
    return _retrieval(prediction, reference, r"Paragraph (\d+)")


def retrieval_zh_score(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same for the Chinese form of the reference."""
    return _retrieval(prediction, reference, r"段落(\d+)")


def _retrieval(prediction: str, reference: str, pattern: str) -> float:
    number = re.search(pattern, reference)
    if number is None:
        raise ValueError(f"retrieval_score: reference must hold {pattern}, got {reference!r}")
    return _share_of_numbers(prediction, number[1])


def code_sim_score(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity (difflib, rounded to a hundredth) of the first line without `, # and // to the reference."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


LONGBENCH: dict[str, Metric] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), qa_f1_score
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_score),
    **dict.fromkeys(("trec", "lsht"), classification_score),
    **dict.fromkeys(("lcc", "repobench-p"), code_sim_score),
    "passage_retrieval_en": retrieval_score,
    "passage_retrieval_zh": retrieval_zh_score,
    "passage_count": count_score,
}
LONGBENCH_LEFT_OUT = ("multifieldqa_zh", "dureader", "vcsum")  # cut with jieba
_FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of the prediction counts


def longbench_score(dataset: str, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best score of a prediction over all answers.

    Args:
        dataset: of LONGBENCH. prediction: as decoded. answers: at least one. classes: all_classes of the item.
    """
    if dataset in _FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(LONGBENCH[dataset](prediction, answer, classes) for answer in answers)


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the prediction, whatever their case."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference stands in the prediction, whatever its case, else 0."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


RULER = {
    **dict.fromkeys(("niah", "vt", "cwe", "fwe"), string_match_all),
    "qa": string_match_part,
}


def ruler_score(kind: str, prediction: str, references: Sequence[str]) -> float:
    """The score of a prediction: control characters count as line ends, space at both ends not at all.

    Args:
        kind: of RULER: a task's name up to its first underscore. references: at least one.
    """
    return RULER[kind](re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip(), references)
