"""The generators of texts, facts and questions, and the readers of prose. Run: pytest tests/python/test_tasks.py"""

import collections
import functools
import itertools
import json
import lzma
import random
import re
import zlib

import pytest

from mage_ext.evaluation import tasks


@functools.cache
def count_tokens(text: str) -> int:
    """A stand-in for a tokenizer: words with the space before them, digits one by one, marks and line ends."""
    return len(re.findall(r"\d| ?[^\W\d]+|[^\w ]", text))


OVERHEAD = 7  # of a chat template


def case(seed, num_tokens=500, **arguments):
    return tasks.make_case(random.Random(seed), count_tokens, num_tokens, overhead=OVERHEAD, **arguments)


def end_of(text, fact):
    return text.index(fact.statement) + len(fact.statement)


# --- keys and facts -------------------------------------------------------------------------------------------------


def test_halves_share_no_key_and_cover_all():
    keys = {f"{adjective} {noun}" for adjective in tasks.ADJECTIVES for noun in tasks.NOUNS}
    held = {key for key in keys if tasks.is_held_out(key)}
    assert len(keys) == len(tasks.ADJECTIVES) * len(tasks.NOUNS)  # no word stands twice
    assert (tasks.num_keys(True), tasks.num_keys(False)) == (len(held), len(keys) - len(held))
    assert 0.45 < len(held) / len(keys) < 0.55


@pytest.mark.parametrize("held_out", [False, True])
def test_facts_are_of_one_half_and_distinct(held_out):
    rng = random.Random(1)
    for digits in (1, 4, 7, 9):
        facts = tasks.draw_facts(rng, 200, held_out, digits, wording=None)
        assert len({fact.key for fact in facts}) == 200 and len({fact.wording for fact in facts}) == 1
        assert all(tasks.is_held_out(fact.key) == held_out for fact in facts)
        assert all(re.fullmatch(rf"[1-9]\d{{{digits - 1}}}", fact.value) for fact in facts)
    assert {tasks.draw_facts(rng, 1, held_out, wording=None)[0].wording for _ in range(100)} == {0, 1, 2, 3}


@pytest.mark.parametrize("wording", range(4))
def test_statements_and_questions_name_key_and_value(wording):
    facts = tasks.draw_facts(random.Random(2), 3, True, wording=wording)
    for fact in facts:
        assert fact.key in fact.statement and fact.statement.endswith(f"is {fact.value}.")
        assert fact.key in fact.asked and fact.asked in tasks.ask([fact])
    question = tasks.ask(facts)
    assert all(fact.key in question for fact in facts) and re.search(r"(codes|numbers|passwords) of the", question)
    assert tasks.answer(facts).split("\n") == [fact.value for fact in facts]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(count=0, held_out=True), r"count must be in \[1, \d+\], got 0"),
        (dict(count=10**6, held_out=True), r"count must be in \[1, \d+\], got 1000000"),
        (dict(count=1, held_out=True, digits=0), "digits must be at least 1, got 0"),
        (dict(count=1, held_out=True, wording=5), r"wording must be None or in \[0, 5\), got 5"),
    ],
)
def test_draw_facts_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tasks.draw_facts(random.Random(0), **arguments)


def test_own_prose_holds_no_digit_and_no_key():
    text = " ".join(tasks.filler(random.Random(3), 3000))
    assert not re.search(r"\d", text)
    keys = {f"{adjective} {noun}" for adjective in tasks.ADJECTIVES for noun in tasks.NOUNS}
    words = re.findall(r"[a-z]+", text)
    assert not keys & {f"{a} {b}" for a, b in itertools.pairwise(words)}
    assert len(set(tasks.split_sentences(text))) > 500


# --- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("asked, distractors", [(1, 0), (4, 0), (2, 5)])
def test_case_holds_what_it_asks_for(asked, distractors, align):
    for seed in range(20):
        made = case(seed, asked=asked, distractors=distractors, align=align)
        stated = re.findall(r"The secret code of the (\w+ \w+) is (\d+)\.", made.context)
        assert len(stated) == len({key for key, _ in stated}) == asked + distractors
        assert all(tasks.is_held_out(key) for key, _ in stated)
        assert {(fact.key, fact.value) for fact in made.facts} <= set(stated)
        assert len(made.facts) == len(made.depths) == asked
        assert made.answer == tasks.answer(made.facts) and made.question == tasks.ask(made.facts)
        assert made.prompt == f"{made.context}\n\n{made.question}"
        size = count_tokens(made.prompt) + OVERHEAD
        assert size <= 500 + 4  # pieces are counted one by one
        assert size % 32 == 0 if align else size >= 500 - 8


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("align", [False, True])
def test_no_fact_in_the_last_tokens(align, own):
    words = "a", "bee", "unquestionably-well-to-do,", "it's", "n.n.n.n.n.n."  # some are cut by jumps of many tokens
    rng = random.Random(4)
    sentences = None if own else [" ".join(rng.choice(words) for _ in range(rng.randint(3, 40))) for _ in range(300)]
    for seed in range(100):
        made = case(seed, asked=2, distractors=2, align=align, sentences=sentences)
        for statement in re.findall(r"The secret code of the \w+ \w+ is \d+\.", made.context):
            behind = made.context[made.context.index(statement) + len(statement) :]
            assert count_tokens(behind) >= 128


def test_depths_are_uniform():
    """Kolmogorov-Smirnov distance to U(0, 1 - tail / length) below its 0.1 % bound plus half the spacing of places."""
    depths, shares, n = [], [], 600
    for seed in range(n):
        made = case(seed, 900)
        (fact,) = made.facts
        depths += made.depths
        # Where the statement really stands, in tokens of the context without it.
        before = count_tokens(made.context[: made.context.index(fact.statement)])
        total = count_tokens(made.context) - count_tokens(fact.statement)
        shares.append(before / (total - 128))
        assert abs(before / total - made.depths[0]) < 0.01
    shares.sort()
    distance = max(max(abs(share - i / n), abs(share - (i + 1) / n)) for i, share in enumerate(shares))
    longest = max(count_tokens(" " + s) for s in tasks.filler(random.Random(0), 2000))
    assert distance < 1.95 / n**0.5 + longest / 2 / (900 - 128)
    assert min(depths) < 0.02 and max(depths) < 1


def test_case_is_a_function_of_its_seed():
    for align in (False, True):
        assert case(5, asked=4, align=align) == case(5, asked=4, align=align)
        assert case(5, asked=4, align=align) != case(6, asked=4, align=align)


def test_given_sentences_are_a_contiguous_run():
    sentences = [f"Sentence {chr(97 + i // 26)}{chr(97 + i % 26)} tells of it." for i in range(200)]
    made = case(7, sentences=sentences, asked=2)
    numbers = [sentences.index(s) for s in tasks.split_sentences(made.context) if s in sentences]
    assert len(numbers) > 20
    assert all((b - a) % len(sentences) == 1 for a, b in itertools.pairwise(numbers))


@pytest.mark.parametrize("lines, asked", [(1, 1), (40, 1), (300, 4)])
def test_register_holds_what_it_asks_for(lines, asked):
    for seed in range(10):
        made = tasks.make_register_case(random.Random(seed), lines, asked)
        head, *records = made.context.split("\n")
        assert head == tasks.REGISTER_HEAD and len(records) == lines
        stated = dict(re.fullmatch(r"line (\w+-\w+): REGISTER_CONTENT is <(\d{5})>", line).groups() for line in records)
        assert len(stated) == lines and all(tasks.is_held_out(key.replace("-", " ")) for key in stated)
        keys = re.findall(r"\w+-\w+", made.question)
        assert len(keys) == asked == len(set(keys)) and made.answer.split("\n") == [stated[key] for key in keys]
        assert made.found(made.answer) == [True] * asked
        assert made.depths == tuple(list(stated).index(key) / lines for key in keys)
        assert made == tasks.make_register_case(random.Random(seed), lines, asked)


def test_register_asks_for_every_depth():
    depths = [tasks.make_register_case(random.Random(seed), 20).depths[0] for seed in range(400)]
    counts = [sum(a <= depth < a + 0.25 for depth in depths) for a in (0, 0.25, 0.5, 0.75)]
    assert sum(counts) == 400 and all(abs(count - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for count in counts)


@pytest.mark.parametrize("lines, asked", [(3, 4), (3, 0)])
def test_register_refuses(lines, asked):
    with pytest.raises(ValueError, match=rf"make_register_case: asked must be in \[1, lines = 3\], got {asked}"):
        tasks.make_register_case(random.Random(0), lines, asked)


def test_cases_of_published_results_stay_what_they_were():
    """Checksums of prompts made before variables and lists of words came."""

    def checksum(**arguments):
        made = [
            tasks.make_case(random.Random(seed), lambda text: len(text.split()), 500, **arguments) for seed in range(20)
        ]
        return zlib.crc32("\x00".join(case.prompt for case in made).encode())

    assert checksum(asked=1) == 3554937255
    assert checksum(asked=4, distractors=4, align=True) == 3997528997


# --- variables ------------------------------------------------------------------------------------------------------


def resolved(text):
    """Number of every variable that a text sets, and its steps from there; what is read must have been set before."""
    numbers, hops = {}, {}
    for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", text):
        assert name not in numbers
        numbers[name] = number or numbers[source]
        hops[name] = 0 if number else hops[source] + 1
    return numbers, hops


@pytest.mark.parametrize("held_out", [False, True])
def test_variables_are_chains_of_one_half(held_out):
    for seed in range(20):
        drawn = tasks.draw_variables(random.Random(seed), [0, 1, 4, 2], held_out)
        numbers, hops = resolved(" ".join(fact.statement for fact in drawn))
        assert [hops[fact.key] for fact in drawn] == [0, 0, 1, 0, 1, 2, 3, 4, 0, 1, 2]
        assert all(numbers[fact.key] == fact.value and len(fact.value) == 5 for fact in drawn)
        assert len(set(numbers.values())) == 4 and all(tasks.is_held_out(name) == held_out for name in numbers)
        assert [len(fact.path) for fact in drawn] == [hops[fact.key] for fact in drawn]
    assert set(tasks.half_nouns(True)) | set(tasks.half_nouns(False)) == set(tasks.NOUNS)


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
@pytest.mark.parametrize("asked, distractors, align", [(1, 3, False), (4, 0, True)])
def test_variables_are_answered_by_following_the_text(hops, asked, distractors, align):
    for seed in range(15):
        made = case(seed, 600, asked=asked, distractors=distractors, align=align, hops=hops)
        numbers, far = resolved(made.context)
        assert len(numbers) == 4 * (hops + 1) and len(set(numbers.values())) == 4
        assert all(tasks.is_held_out(name) for name in numbers)
        names = re.findall(r"VAR (\w+)", made.question)
        assert len(names) == len(set(names)) == asked and {far[name] for name in names} == {hops}
        assert made.answer.split("\n") == [numbers[name] for name in names]
        assert len(set(made.answer.split("\n"))) == asked  # each of another chain
        assert made.found(made.answer) == [True] * asked
        size = count_tokens(made.prompt) + OVERHEAD
        assert size <= 600 + 4 and (size % 32 == 0 if align else size >= 600 - 8)
        for fact, depth in zip(made.facts, made.depths, strict=True):
            if align:
                continue  # depths are those before the cut
            without = re.sub(r" ?VAR \w+ = [\w ]+\.", "", made.context)
            before = re.sub(r" ?VAR \w+ = [\w ]+\.", "", made.context[: made.context.index(fact.statement)])
            assert abs(count_tokens(before) / count_tokens(without) - depth) < 0.01
        assert made == case(seed, 600, asked=asked, distractors=distractors, align=align, hops=hops)


def test_statements_of_variables_stand_at_every_depth():
    """As many in each quarter of the allowed places, within five standard deviations of a fair draw."""
    depths = []
    for seed in range(100):
        made = case(seed, 900, distractors=3, hops=3)
        total = count_tokens(made.context)
        starts = [match.start() for match in re.finditer(r"VAR \w+ = ", made.context)]
        depths += [count_tokens(made.context[:start]) / (total - 128) for start in starts]
    counts = [sum(a <= depth < a + 0.25 for depth in depths) for a in (0, 0.25, 0.5, 0.75)]
    assert len(depths) == 1600 and all(abs(count / 1600 - 0.25) < 5 * (0.25 * 0.75 / 1600) ** 0.5 for count in counts)


def test_variables_are_asked_for_by_name():
    one, two, three = tasks.draw_variables(random.Random(0), [1, 0], True)
    assert one.statement == f"VAR {one.key} = {one.value}." and two.statement == f"VAR {two.key} = VAR {one.key}."
    assert tasks.ask([two]) == f"Question: What is the value of VAR {two.key}? Answer with the number only."
    asked = f"Question: What are the values of VAR {two.key} and VAR {three.key}? Answer with one number per line."
    assert tasks.ask([two, three]) == asked


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(hops=[]), r"hops must be in \[0, 4\] and take at most \d+ names, got \[\], 0 names"),
        (dict(hops=[2, 5]), r"hops must be in \[0, 4\] .* got \[2, 5\], 9 names"),
        (dict(hops=[-1, 3]), r"hops must be in \[0, 4\] .* got \[-1, 3\], 4 names"),
        (dict(hops=[4] * 40), r"hops must be in .* got \[4, .*\], 200 names"),
        (dict(hops=[1], digits=0), "digits must allow 1 different numbers, got 0"),
        (dict(hops=[0] * 10, digits=1), "digits must allow 10 different numbers, got 1"),
    ],
)
def test_draw_variables_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"draw_variables: {message}"):
        tasks.draw_variables(random.Random(0), held_out=True, **arguments)


# --- lists of words -------------------------------------------------------------------------------------------------


def by_frequency(words):
    """Words and counts, most frequent first; the three first ones must have no rival."""
    counts = collections.Counter(words).most_common()
    assert all(counts[i][1] > counts[i + 1][1] for i in range(3))
    return counts


@pytest.mark.parametrize("num_tokens", [90, 500, 4000])
def test_the_most_frequent_words_are_asked_for(num_tokens):
    for seed in range(10):
        made = tasks.make_list_case(random.Random(seed), count_tokens, num_tokens, OVERHEAD)
        assert num_tokens - 4 <= count_tokens(made.prompt) + OVERHEAD <= num_tokens
        head, _, listed = made.context.partition(": ")
        words = listed.split(" ")
        counts = by_frequency(words)
        assert f"{head}:" == tasks.LIST_HEAD and made.question == tasks.LIST_QUESTION
        assert made.answer.split("\n") == [word for word, _ in counts[:3]]
        assert made.found(made.answer) == [True] * 3
        assert made.found("\n".join(reversed(made.answer.split("\n")))) == [False, True, False]
        assert all(tasks.is_held_out(word) and word in tasks.NOUNS for word, _ in counts)
        assert [count for _, count in counts[:3]] == [round(share * len(words)) for share in tasks.WORD_SHARES]
        rest = [count for _, count in counts[3:]]
        assert max(rest) - min(rest) <= 1 and (len(rest) == len(tasks.half_nouns(True)) - 3 or max(rest) == 1)
        for fact, depth in zip(made.facts, made.depths, strict=True):
            places = [i for i, word in enumerate(words) if word == fact.value]
            assert depth == pytest.approx(sum(places) / len(places) / len(words))
        assert made == tasks.make_list_case(random.Random(seed), count_tokens, num_tokens, OVERHEAD)


@pytest.mark.parametrize("held_out", [False, True])
def test_words_of_several_tokens_fill_a_list(held_out):
    seen = set()
    for num_tokens in range(300, 400, 7):
        words, facts = tasks.draw_words(random.Random(num_tokens), len, num_tokens, held_out)  # a token per letter
        assert num_tokens - 3 * 11 < len(" " + " ".join(words)) <= num_tokens
        assert [fact.value for fact in facts] == [word for word, _ in by_frequency(words)[:3]]
        assert [fact.key for fact in facts] == ["first", "second", "third"]
        assert {tasks.is_held_out(word) for word in words} == {held_out}
        seen.update(fact.value for fact in facts)
    assert len(seen) > 20  # any word can be a frequent one


def test_frequent_words_stand_everywhere():
    words, facts = tasks.draw_words(random.Random(1), lambda text: 1, 4000, True)
    for fact, share in zip(facts, tasks.WORD_SHARES, strict=True):
        parts = [words[i : i + 1000].count(fact.value) for i in range(0, 4000, 1000)]
        assert all(abs(part - 1000 * share) < 5 * (1000 * share * (1 - share)) ** 0.5 for part in parts)


def test_short_lists_are_refused():
    assert len(tasks.draw_words(random.Random(0), lambda text: 1, 30, True)[0]) == 30
    for num_tokens in (29, 0, -5):
        with pytest.raises(ValueError, match=f"draw_words: num_tokens must hold 30 words, got {num_tokens}"):
            tasks.draw_words(random.Random(0), lambda text: 1, num_tokens, True)


def test_found_compares_line_by_line():
    facts = tuple(tasks.Fact(f"key {i}", value) for i, value in enumerate(("1234567", "7654321", "1111111")))
    made = tasks.Case("", "", "", facts, (0.0, 0.0, 0.0))
    assert made.found("1234567\n7654321\n1111111") == [True, True, True]
    assert made.found("  1234567 \n 7654321\n1111111\nmore") == [True, True, True]
    assert made.found("1234567\n1111111\n7654321") == [True, False, False]
    assert made.found("12345678\n7654321") == [False, True, False]
    assert made.found("") == [False, False, False]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_tokens=200), "num_tokens must leave 160 tokens of prose beside facts and question, got"),
        (dict(asked=0), "asked must be at least 1, got 0"),
        (dict(distractors=-1), "distractors must be at least 0, got -1"),
        (dict(block=0, align=True), "block must be at least 1, got 0"),
        (dict(sentences=[]), "sentences must be None or hold a sentence, got an empty list"),
        (dict(sentences=["n." * 400]), "sentences must fill .* with words that can be cut, got 0"),
        (
            dict(hops=4, distractors=3, num_tokens=260),
            "num_tokens must leave 160 tokens of prose beside facts and question, got",
        ),
        (dict(sentences=["n.n. " * 9], align=True, block=512, num_tokens=900), "align must reach a multiple of 512"),
    ],
)
def test_make_case_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"make_case: {message}"):
        case(0, **arguments)


# --- texts ----------------------------------------------------------------------------------------------------------


def test_split_sentences_folds_white_space():
    text = 'It  rained.\n\nMr. Low left! "Why?" he asked. "I\ndo not know." The end'
    assert tasks.split_sentences(text) == [
        "It rained.",
        "Mr.",
        "Low left!",
        '"Why?" he asked.',
        '"I do not know." The end',
    ]
    assert tasks.split_sentences(" \n ") == []


def test_texts_of_every_kind(tmp_path):
    line_separator = "one\u2028line\x85still"  # not the end of a JSON line
    rows = [{"id": "b", "text": "Text b."}, {"text": line_separator}, {"id": 7, "text": "Text 7."}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "plain.txt").write_bytes("Plain é.\r\nSecond.".encode())
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    with lzma.open(tmp_path / "packed.txt.xz", "wb") as file:
        file.write("Packed é.".encode())
    with lzma.open(tmp_path / "rows.jsonl.xz", "wb") as file:
        file.write(lines.encode())
    read = tasks.read_texts([tmp_path / n for n in ("plain.txt", "rows.jsonl", "packed.txt.xz", "rows.jsonl.xz")])
    same = [("b", "Text b."), ("rows.jsonl:1", line_separator), ("7", "Text 7.")]
    assert read[0] == ("plain.txt", "Plain é.\nSecond.")
    assert read[1:4] == same and read[4] == ("packed.txt.xz", "Packed é.")
    assert [text for _, text in read[5:]] == [text for _, text in same]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9 au lait", "a.txt must be UTF-8, got byte 0xe9"),
        ("a.txt", b" \n", "a.txt must hold text, got none"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 of a.jsonl must be JSON"),
        ("a.jsonl", b"[" * 100000, "line 1 of a.jsonl must be JSON"),
        ("a.jsonl", b'{"id": "1", "body": "x"}', "line 1 of a.jsonl .* string \"text\", got keys \\['body', 'id'\\]"),
        ("a.jsonl", b'{"text": 3}', 'line 1 of a.jsonl .* string "text"'),
        ("a.jsonl", b'["text"]', 'line 1 of a.jsonl .* string "text", got list'),
        ("a.txt.xz", b"not xz at all", "a.txt.xz must be readable, xz, got"),
        ("a.txt.xz", lzma.compress(b"text " * 1000)[:-20], "a.txt.xz must be readable, xz, got"),
        ("a.txt.xz", lzma.compress(b"caf\xe9"), "a.txt.xz must be UTF-8"),
    ],
)
def test_texts_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"text: {message}"):
        tasks.read_texts([tmp_path / name])


def test_texts_that_are_no_files(tmp_path):
    with pytest.raises(ValueError, match=r"text: must name readable files, got '.*missing.txt', which is not a file"):
        tasks.read_texts([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="text: must name readable files"):
        tasks.read_texts([tmp_path])
    with pytest.raises(TypeError, match="text: must be a list of files"):
        tasks.read_texts(str(tmp_path / "a.txt"))


def test_every_tenth_text_is_held_out():
    texts = [(f"n{i:02}", f"text {i}") for i in range(25)]
    train, held = tasks.held_out_texts(random.Random(0).sample(texts, 25))
    assert [name for name, _ in held] == ["n09", "n19"]
    assert sorted(train + held) == texts
    assert tasks.held_out_texts(texts[:1]) == (texts[:1], [])
    assert [name for name, _ in tasks.held_out_texts(texts, every=2)[1]][:2] == ["n01", "n03"]
    with pytest.raises(ValueError, match="every must be at least 2, got 1"):
        tasks.held_out_texts(texts, every=1)
