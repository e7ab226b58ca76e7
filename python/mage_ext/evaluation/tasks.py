"""Generators of long texts with hidden facts and of questions about them. Text only: no model, no tensors.

Every case is a function of its random generator, so a seed names it. Keys are split by hash into a training and a
held-out half that share no adjective-noun pair; values are drawn fresh. Gates and the demo ask for the held-out half.
Names of variables and words of lists are nouns, split by the same hash.

Variables have the form of RULER's variable tracking, lists that of its frequent words (arXiv 2404.06654); names, words,
counts and wordings are the project's own.

Test: pytest tests/python/test_tasks.py
"""

import functools
import json
import lzma
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ADJECTIVES = (
    "amber ancient autumn bitter blue bold brass brave bright bronze broken calm careful clever copper coral crimson "
    "curious daring deep distant dusty eager early emerald empty faded fair feathered fierce floating foreign "
    "forgotten frozen gentle gilded golden grand gray green hidden hollow honest humble icy idle iron ivory jade "
    "jolly kind late lazy lively lonely loud lucky marble mellow merry misty modest narrow nimble noble northern "
    "olive orange pale patient pearl plain polite proud purple quick quiet rapid rare red restless rough royal rustic "
    "sacred scarlet secret serene shallow sharp shining silent silver simple sleepy slow smooth solemn southern "
    "steady steep stern still stormy strange strong sturdy sunny swift tall tender thin timid tiny velvet violet "
    "wandering warm weary western white wide wild willing winter wise wooden yellow young"
).split()
NOUNS = (
    "acorn anchor anvil apple arrow badger bakery balcony barley barrel basket beacon beaver bell bishop boat bottle "
    "bridge brook buffalo cabin camel candle canyon captain carpet carriage castle cavern cedar cellar chapel chimney "
    "cliff clock cobbler compass cottage crane cricket crown curtain dagger daisy desert doctor dolphin donkey dragon "
    "eagle elm engine falcon farmer feather ferry fiddle forest fountain fox garden gate giant glacier goat goose "
    "granite guitar hammer harbor hawk heron hill horse hunter island jacket jewel juggler kettle kitten ladder "
    "lantern lawyer lemon leopard library lighthouse lion lizard market meadow merchant mill miner mirror monk "
    "mountain mule needle nest oak orchard organ otter owl oyster palace panther parrot pebble pepper piano pigeon "
    "pilot planet pony potter quarry rabbit raven ribbon river robin rooster saddle sailor salmon school shepherd "
    "singer sparrow spider spoon stable statue stove tailor teacher temple tiger tower trumpet tunnel turtle valley "
    "village violin wagon walnut walrus weaver whale willow window wolf"
).split()

# (statement, noun phrase that asks for the value)
_WORDINGS = (
    ("The secret code of the {key} is {value}.", "secret code of the {key}"),
    ("The special number of the {key} is {value}.", "special number of the {key}"),
    ("Remember that the password of the {key} is {value}.", "password of the {key}"),
    ("The account number of the {key} is {value}.", "account number of the {key}"),
    ("line {key}: REGISTER_CONTENT is <{value}>", "REGISTER_CONTENT in line {key}"),
)
RECORD = 4  # the wording of a register's lines; the others are sentences
REGISTER_HEAD = "This is a register. Remember the content of every line."
VARIABLE, WORD = 5, 6  # wordings of draw_variables and draw_words
MOST_HOPS = 4
LIST_HEAD = "This is a list of words. Remember how often each of them occurs:"
LIST_QUESTION = (
    "Question: Which three words occur most often in the list? "
    "Answer with one word per line, the most frequent word first."
)
WORD_SHARES = (0.2, 0.1, 0.05)  # of a list; the other words of the half share the rest evenly
_RANKS = ("first", "second", "third")
LEAST_WORDS = 30  # the third word occurs twice there, the others once


@dataclass(frozen=True)
class Fact:
    """A key, its value and the wording (index) in which it is stated and asked for.

    Fields:
        value: a string of digits; of WORD a word, whose key is its rank.
        path: of VARIABLE, the variables that lead from the number to this one, in order; none if it is set to a number.
    """

    key: str
    value: str
    wording: int = 0
    path: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The key as texts write it; lines of a register write it with a hyphen."""
        return {RECORD: self.key.replace(" ", "-"), VARIABLE: f"VAR {self.key}"}.get(self.wording, self.key)

    @property
    def statement(self) -> str:
        """What the text says of it; of a word the word, which stands there many times."""
        if self.wording == VARIABLE:
            return f"{self.name} = {f'VAR {self.path[-1]}' if self.path else self.value}."
        if self.wording == WORD:
            return self.value
        return _WORDINGS[self.wording][0].format(key=self.name, value=self.value)

    @property
    def asked(self) -> str:
        """The noun phrase that asks for it."""
        if self.wording in (VARIABLE, WORD):
            return f"value of {self.name}" if self.wording == VARIABLE else f"{self.key} most frequent word"
        return _WORDINGS[self.wording][1].format(key=self.name)

    @property
    def chain(self) -> str:
        """The key at the start of its path: statements of one chain stand in their order."""
        return self.path[0] if self.path else self.key


@dataclass(frozen=True)
class Case:
    """A prompt with one answer. `facts` are those asked for, in the order of the answer; `context` is the long text."""

    context: str
    question: str
    answer: str
    facts: tuple[Fact, ...]
    depths: tuple[float, ...]  # where each asked fact stands in the context, 0 = start, 1 = end

    @property
    def prompt(self) -> str:
        return join_prompt(self.context, self.question)

    def found(self, text: str) -> list[bool]:
        """Which of the asked values the answer `text` gives, each at its own line."""
        lines = [line.strip() for line in text.strip().split("\n")]
        return [i < len(lines) and lines[i] == fact.value for i, fact in enumerate(self.facts)]


def join_prompt(context: str, question: str) -> str:
    """The user's message: context, empty line, question."""
    return f"{context}\n\n{question}"


def is_held_out(key: str) -> bool:
    """True for the half of all keys that training never sees."""
    return zlib.crc32(key.encode()) % 2 == 1


@functools.cache
def num_keys(held_out: bool) -> int:
    """Number of keys of a half."""
    return sum(is_held_out(f"{adjective} {noun}") == held_out for adjective in ADJECTIVES for noun in NOUNS)


def draw_facts(rng: random.Random, count: int, held_out: bool, digits: int = 7, wording: int | None = 0) -> list[Fact]:
    """`count` facts with distinct keys and values of `digits` digits; wording None: one of the sentences, for all.

    Raises:
        ValueError: count is not in [1, num_keys(held_out)], digits is not positive, or there is no such wording.
    """
    if not 1 <= count <= num_keys(held_out):
        raise ValueError(f"draw_facts: count must be in [1, {num_keys(held_out)}], got {count}")
    if digits < 1:
        raise ValueError(f"draw_facts: digits must be at least 1, got {digits}")
    if wording is not None and not 0 <= wording < len(_WORDINGS):
        raise ValueError(f"draw_facts: wording must be None or in [0, {len(_WORDINGS)}), got {wording}")
    if wording is None:
        wording = rng.randrange(RECORD)
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        key = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        if is_held_out(key) == held_out and key not in facts:
            facts[key] = Fact(key, str(rng.randrange(10 ** (digits - 1), 10**digits)), wording)
    return list(facts.values())


@functools.cache
def half_nouns(held_out: bool) -> tuple[str, ...]:
    """The nouns of a half: its names of variables and words of lists."""
    return tuple(noun for noun in NOUNS if is_held_out(noun) == held_out)


def draw_variables(rng: random.Random, hops: Sequence[int], held_out: bool, digits: int = 5) -> list[Fact]:
    """Chains of variables: the first of each is set to a number of `digits` digits, every further one to that before.

    Args:
        hops: of each chain, in [0, MOST_HOPS], how many steps its last variable is away from the number.
    Returns:
        The variables chain by chain in order. Names differ, and so do the numbers of chains.
    Raises:
        ValueError: hops is empty, out of range or asks for more names than the half has, or numbers of so many digits
            can't differ.
    """
    names = half_nouns(held_out)
    count = sum(hops) + len(hops)
    if not hops or min(hops) < 0 or max(hops) > MOST_HOPS or count > len(names):
        raise ValueError(
            f"draw_variables: hops must be in [0, {MOST_HOPS}] and take at most {len(names)} names, "
            f"got {list(hops)}, {count} names"
        )
    if digits < 1 or len(hops) > 9 * 10 ** (digits - 1):
        raise ValueError(f"draw_variables: digits must allow {len(hops)} different numbers, got {digits}")
    drawn = rng.sample(names, count)
    numbers = rng.sample(range(10 ** (digits - 1), 10**digits), len(hops))
    facts = []
    for number, far in zip(numbers, hops, strict=True):
        chain, drawn = drawn[: far + 1], drawn[far + 1 :]
        facts += [Fact(name, str(number), VARIABLE, tuple(chain[:i])) for i, name in enumerate(chain)]
    return facts


def draw_words(
    rng: random.Random, count_tokens: Callable[[str], int], num_tokens: int, held_out: bool
) -> tuple[list[str], tuple[Fact, ...]]:
    """As many words in random order as `num_tokens` tokens hold, and the three most frequent ones, most frequent first.

    These make WORD_SHARES of the list; the other words of the half occur equally often, give or take one.

    Args:
        count_tokens: number of tokens of a string; that of a list is the sum over its words, a space before each.
    Raises:
        ValueError: num_tokens hold fewer than 30 words.
    """
    picked = rng.sample(half_nouns(held_out), len(half_nouns(held_out)))
    sizes = [count_tokens(" " + word) for word in picked]
    top = len(WORD_SHARES)

    def counts_of(words: int) -> list[int]:
        counts = [round(share * words) for share in WORD_SHARES]
        each, more = divmod(words - sum(counts), len(picked) - top)
        return counts + [each + (i < more) for i in range(len(picked) - top)]

    words = num_tokens // min(sizes)
    while words >= LEAST_WORDS:
        counts = counts_of(words)
        over = sum(count * size for count, size in zip(counts, sizes, strict=True)) - num_tokens
        if over <= 0:
            break
        words -= max(1, over // max(sizes))
    else:
        raise ValueError(f"draw_words: num_tokens must hold {LEAST_WORDS} words, got {num_tokens}")
    listed = [word for word, count in zip(picked, counts, strict=True) for _ in range(count)]
    rng.shuffle(listed)
    return listed, tuple(Fact(rank, word, WORD) for rank, word in zip(_RANKS, picked, strict=False))


def ask(facts: Sequence[Fact]) -> str:
    """The question for one or several facts; for words always that for the three most frequent."""
    if facts[0].wording == WORD:
        return LIST_QUESTION
    if len(facts) == 1:
        return f"Question: What is the {facts[0].asked}? Answer with the number only."
    if facts[0].wording in (RECORD, VARIABLE):
        what = "REGISTER_CONTENTs in lines" if facts[0].wording == RECORD else "values of"
        listed = ", ".join(fact.name for fact in facts[:-1])
        return f"Question: What are the {what} {listed} and {facts[-1].name}? Answer with one number per line."
    listed = ", the ".join(fact.key for fact in facts[:-1])
    head = _WORDINGS[facts[0].wording][1].format(key=listed)
    for noun in ("code", "number", "password"):
        head = head.replace(f"{noun} of", f"{noun}s of")
    return f"Question: What are the {head} and the {facts[-1].key}? Answer with one number per line."


def answer(facts: Sequence[Fact]) -> str:
    return "\n".join(fact.value for fact in facts)


# ----------------------------------------------------------------------------------------------------------------------
# Prose: the project's own, or sentences of given texts

_PEOPLE = (
    "the miller,the old captain,a tall stranger,the baker's wife,my uncle,the schoolmaster,a young clerk,"
    "the ferryman,the widow next door,the innkeeper,a traveling musician,the gardener,the mayor's daughter,"
    "a retired soldier,the apothecary,two brothers,the night watchman,a patient fisherman,the postmaster,"
    "the carpenter"
).split(",")
_ACTIONS = (
    "walked slowly toward the market,mended a broken chair,counted the coins twice,told a long story about the flood,"
    "waited by the gate,carried water from the well,wrote a letter to a distant cousin,sold three sacks of grain,"
    "looked for a lost glove,sang an old song,argued about the price of wool,painted the door again,"
    "fed the horses before noon,read the newspaper aloud,planted beans along the wall,borrowed a lantern,"
    "forgot the name of the road,watched the boats come in,repaired the clock,bought bread and cheese"
).split(",")
_TIMES = (
    "before sunrise,on a rainy afternoon,after the harvest,in the middle of winter,when the bells had stopped,"
    "late in the evening,during the fair,on the first day of spring,as the fog was lifting,a week before the wedding,"
    "at the end of the summer,while the others were asleep"
).split(",")
_REMARKS = (
    "Nobody in the village found this unusual.,The weather did not change for several days.,"
    "It was said that the road would be closed soon.,The dogs barked for a while and then lay down again.,"
    "There was a smell of smoke and apples in the air.,Most people agreed that it had been a good year.,"
    "The children laughed and ran down to the river.,Afterwards the whole house was quiet.,"
    "The wind came from the sea and rattled the shutters.,Supper was served later than usual."
).split(",")


def filler_sentence(rng: random.Random) -> str:
    """One sentence of plain village prose; it contains no digits and no key of a fact."""
    if rng.random() < 0.3:
        return rng.choice(_REMARKS)
    who, what, when = rng.choice(_PEOPLE), rng.choice(_ACTIONS), rng.choice(_TIMES)
    if rng.random() < 0.5:
        return f"{who[0].upper()}{who[1:]} {what} {when}."
    other = rng.choice(_ACTIONS)
    return f"{when[0].upper()}{when[1:]}, {who} {what} and {other}."


def filler(rng: random.Random, sentences: int) -> list[str]:
    return [filler_sentence(rng) for _ in range(sentences)]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“‘'])")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, white space folded; a simple rule is enough to find places between which facts can stand."""
    return [s for s in _SENTENCE_END.split(" ".join(text.split())) if s]


def read_texts(paths: Sequence[str | Path]) -> list[tuple[str, str]]:
    """(name, text) of every given file: plain text, or JSON lines with "text" (and "id"), either also xz-compressed.

    Raises:
        ValueError: a file that can't be read, is not UTF-8 or not xz, a line that is no JSON object with a string
            "text", or an empty text; the message names the file and the line.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(f"text: must be a list of files, got {str(paths)!r}")
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"text: must name readable files, got {str(path)!r}, which is not a file")
        try:
            with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
                raw = file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text: {path.name} must be UTF-8, got byte {error.object[error.start]:#04x}") from None
        except (OSError, lzma.LZMAError, EOFError) as error:
            raise ValueError(
                f"text: {path.name} must be readable{', xz' * (path.suffix == '.xz')}, got: {error}"
            ) from None
        raw = raw.replace("\r\n", "\n").replace("\r", "\n")
        texts += _read_lines(path.name, raw) if ".jsonl" in path.suffixes else [(path.name, raw)]
    for name, text in texts:
        if not text.strip():
            raise ValueError(f"text: {name} must hold text, got none")
    return texts


def _read_lines(name: str, raw: str) -> list[tuple[str, str]]:
    """(id, text) of JSON lines. Only a newline ends a line: JSON strings may hold the other separators of Unicode."""
    texts: list[tuple[str, str]] = []
    for number, line in enumerate(raw.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"text: line {number} of {name} must be JSON, got: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            got = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f'text: line {number} of {name} must be an object with a string "text", got {got}')
        texts.append((str(row.get("id", f"{name}:{len(texts)}")), row["text"]))
    return texts


def held_out_texts(
    texts: Sequence[tuple[str, str]], every: int = 10
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Splits (name, text) pairs into (train, held out): every `every`-th by name is held out, none of fewer texts."""
    if every < 2:
        raise ValueError(f"held_out_texts: every must be at least 2, got {every}")
    ordered = sorted(texts)
    held = [t for i, t in enumerate(ordered) if i % every == every - 1]
    return [t for i, t in enumerate(ordered) if i % every != every - 1], held


# ----------------------------------------------------------------------------------------------------------------------
# Cases


def make_case(
    rng: random.Random,
    count_tokens: Callable[[str], int],
    num_tokens: int,
    asked: int = 1,
    distractors: int = 0,
    sentences: Sequence[str] | None = None,
    block: int = 32,
    align: bool = False,
    overhead: int = 0,
    tail_tokens: int = 128,
    wording: int | None = 0,
    depth: float | None = None,
    hops: int | None = None,
) -> Case:
    """A text of about `num_tokens` tokens that hides `asked` + `distractors` held-out facts and asks for the former.

    Facts stand at depths uniform over the context, none in its last `tail_tokens` tokens. With `hops`, it hides so many
    chains of variables instead and asks for the last ones of `asked` of them; statements of a chain keep their order.

    Args:
        rng: source of every choice.
        count_tokens: number of tokens of a string.
        depth: where all facts stand, as near as sentences allow: 0 is the start of the context, 1 the last place before
            its last `tail_tokens` tokens. None: each at a random one. The text is the same at every depth.
        num_tokens: wanted length of the prompt (context + question + overhead). Pieces are counted one by one, so the
            result may be a few tokens longer; it may be a word shorter, with `align` by all that is cut.
        asked, distractors: facts that the question asks for, and further ones it does not.
        sentences: prose to draw a contiguous run from; None writes the project's own.
        align, block, overhead: align=True cuts words at the end of the context so that context + question + `overhead`
            (the tokens of the chat template) is a multiple of `block`: the answer starts a block.
        wording: of draw_facts. hops: of every chain; None: facts of `wording`.
    Raises:
        ValueError: num_tokens is too small for the facts, a count or depth is out of range, `sentences` gives no prose,
            or draw_facts or draw_variables refuse.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"make_case: depth must be None or in [0, 1], got {depth}")
    for name, value, least in (("asked", asked, 1), ("distractors", distractors, 0), ("block", block, 1)):
        if value < least:
            raise ValueError(f"make_case: {name} must be at least {least}, got {value}")
    if sentences is not None and not len(sentences):
        raise ValueError("make_case: sentences must be None or hold a sentence, got an empty list")
    # Of many statements one nearly always stands at the last place, where most cuts come too close to it.
    behind = tail_tokens + block if align and hops is not None else tail_tokens
    for _ in range(32):  # a cut can come too close to the last fact: then the case is drawn again
        if hops is None:
            facts = draw_facts(rng, asked + distractors, held_out=True, wording=wording)
            wanted = tuple(facts[:asked])
        else:
            facts = draw_variables(rng, [hops] * (asked + distractors), held_out=True)
            wanted = tuple(facts[hops :: hops + 1][:asked])
        question = ask(wanted)
        room = num_tokens - overhead
        context, depths = _hide(rng, count_tokens, room, facts, question, sentences, behind, depth)
        if align:
            context = _cut_to_multiple(context, question, count_tokens, overhead, block) or ""
        ends = [context.rfind(fact.statement) + len(fact.statement) for fact in facts]
        if all(fact.statement in context for fact in facts) and count_tokens(context[max(ends) :]) >= tail_tokens:
            told = tuple(depths[fact.key] for fact in wanted)
            return Case(context, question, answer(wanted), wanted, told)
    raise ValueError(
        f"make_case: align must reach a multiple of {block} tokens by cutting words and leave {tail_tokens} behind "
        "every fact, got no such context in 32 draws"
    )


def make_register_case(rng: random.Random, lines: int, asked: int = 1, digits: int = 5) -> Case:
    """A register of `lines` records with held-out keys, and a question for `asked` of them, drawn uniformly.

    The form is that of LongEval's line retrieval; head, keys, values and question are the project's own.

    Raises:
        ValueError: asked is not in [1, lines], or draw_facts refuses lines or digits.
    """
    if not 1 <= asked <= lines:
        raise ValueError(f"make_register_case: asked must be in [1, lines = {lines}], got {asked}")
    facts = draw_facts(rng, lines, held_out=True, digits=digits, wording=RECORD)
    context = "\n".join((REGISTER_HEAD, *(fact.statement for fact in facts)))
    picked = rng.sample(range(lines), asked)
    told = tuple(facts[i] for i in picked)
    return Case(context, ask(told), answer(told), told, tuple(i / lines for i in picked))


def make_list_case(rng: random.Random, count_tokens: Callable[[str], int], num_tokens: int, overhead: int = 0) -> Case:
    """A list of held-out words, and a question for its three most frequent ones; depths are the means of their places.

    Args:
        count_tokens, num_tokens, overhead: as of make_case; the prompt is at most a few tokens shorter or longer.
    Raises:
        ValueError: num_tokens hold fewer than 30 words.
    """
    room = num_tokens - overhead - count_tokens(join_prompt(LIST_HEAD, LIST_QUESTION))
    words, facts = draw_words(rng, count_tokens, room, held_out=True)
    places = [[i for i, word in enumerate(words) if word == fact.value] for fact in facts]
    depths = tuple(sum(at) / len(at) / len(words) for at in places)
    return Case(" ".join((LIST_HEAD, *words)), LIST_QUESTION, answer(facts), facts, depths)


def _hide(
    rng: random.Random,
    count_tokens: Callable[[str], int],
    num_tokens: int,
    facts: Sequence[Fact],
    question: str,
    sentences: Sequence[str] | None,
    tail_tokens: int,
    depth: float | None,
) -> tuple[str, dict[str, float]]:
    """A context with `facts` at places of its prose, and the depth of each key.

    Args: as of make_case; num_tokens: of context and question.
    """
    room = num_tokens - count_tokens("\n\n" + question) - sum(count_tokens(" " + f.statement) for f in facts)
    if room < tail_tokens + 32:
        raise ValueError(
            f"make_case: num_tokens must leave {tail_tokens + 32} tokens of prose beside facts and question, got {room}"
        )
    prose = _take_prose(rng, count_tokens, room, sentences)
    sizes = [count_tokens(" " + s) for s in prose]
    after = [sum(sizes[i:]) for i in range(len(prose) + 1)]  # tokens of prose behind place i
    places = [i for i in range(len(prose) + 1) if after[i] >= tail_tokens]
    total = after[0]
    if not places:
        raise ValueError(f"make_case: sentences must fill {room} tokens with words that can be cut, got {total} tokens")

    def place_at(share: float) -> int:
        return min(places, key=lambda i: abs((total - after[i]) - share * (total - tail_tokens)))

    drawn = [(rng.random(), rng.random(), fact) for fact in facts]
    drawn = [(place_at(share if depth is None else depth), tie, fact) for share, tie, fact in drawn]
    chains: dict[str, list[Fact]] = {}
    for fact in facts:
        chains.setdefault(fact.chain, []).append(fact)
    order = [(place, chains[fact.chain].pop(0)) for place, _, fact in sorted(drawn, key=lambda t: t[:2])]
    pieces: list[str] = []
    for i in range(len(prose) + 1):
        pieces += [fact.statement for place, fact in order if place == i]
        pieces += [prose[i]] if i < len(prose) else []
    return " ".join(pieces), {fact.key: (total - after[place]) / total for place, fact in order}


def _take_prose(
    rng: random.Random, count_tokens: Callable[[str], int], room: int, sentences: Sequence[str] | None
) -> list[str]:
    taken: list[str] = []
    used = 0
    at = rng.randrange(len(sentences)) if sentences else 0
    while True:
        sentence = sentences[at % len(sentences)] if sentences else filler_sentence(rng)
        at += 1
        size = count_tokens(" " + sentence)
        if used + size > room:
            words = sentence.split(" ")
            while words and used + count_tokens(" " + " ".join(words)) > room:
                words.pop()
            return taken + ([" ".join(words)] if words else [])
        taken.append(sentence)
        used += size


def _cut_to_multiple(
    context: str, question: str, count_tokens: Callable[[str], int], overhead: int, block: int
) -> str | None:
    """The context with words cut from its end until the prompt is a multiple of the block; None if too many go."""
    words = context.split(" ")
    for _ in range(min(4 * block, len(words))):
        if (count_tokens(join_prompt(" ".join(words), question)) + overhead) % block == 0:
            return " ".join(words)
        words.pop()  # a word of several tokens can jump over the multiple: then the one below it is next
    return None
