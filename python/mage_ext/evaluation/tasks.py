"""Generators of long texts with hidden facts and of questions about them. Text only: no model, no tensors.

Every case is a function of its random generator, so a seed names it. Keys are split by hash into a training and a held-out half that
share no adjective-noun pair; values are drawn fresh. The held-out half is what gates and the demo ask for.

Test: pytest tests/python/test_tasks.py
"""

import json
import lzma
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ADJECTIVES = (
    "amber ancient autumn bitter blue bold brass brave bright bronze broken calm careful clever copper coral crimson curious daring deep "
    "distant dusty eager early emerald empty faded fair feathered fierce floating foreign forgotten frozen gentle gilded golden grand gray "
    "green hidden hollow honest humble icy idle iron ivory jade jolly kind late lazy lively lonely loud lucky marble mellow merry misty "
    "modest narrow nimble noble northern olive orange pale patient pearl plain polite proud purple quick quiet rapid rare red restless "
    "rough royal rustic sacred scarlet secret serene shallow sharp shining silent silver simple sleepy slow smooth solemn southern steady "
    "steep stern still stormy strange strong sturdy sunny swift tall tender thin timid tiny velvet violet wandering warm weary western "
    "white wide wild willing winter wise wooden yellow young"
).split()
NOUNS = (
    "acorn anchor anvil apple arrow badger bakery balcony barley barrel basket beacon beaver bell bishop boat bottle bridge brook buffalo "
    "cabin camel candle canyon captain carpet carriage castle cavern cedar cellar chapel chimney cliff clock cobbler compass cottage "
    "crane cricket crown curtain dagger daisy desert doctor dolphin donkey dragon eagle elm engine falcon farmer feather ferry fiddle "
    "forest fountain fox garden gate giant glacier goat goose granite guitar hammer harbor hawk heron hill horse hunter island jacket "
    "jewel juggler kettle kitten ladder lantern lawyer lemon leopard library lighthouse lion lizard market meadow merchant mill miner "
    "mirror monk mountain mule needle nest oak orchard organ otter owl oyster palace panther parrot pebble pepper piano pigeon pilot "
    "planet pony potter quarry rabbit raven ribbon river robin rooster saddle sailor salmon school shepherd singer sparrow spider spoon "
    "stable statue stove tailor teacher temple tiger tower trumpet tunnel turtle valley village violin wagon walnut walrus weaver whale "
    "willow window wolf"
).split()

# (statement, noun phrase that asks for the value)
_WORDINGS = (
    ("The secret code of the {key} is {value}.", "secret code of the {key}"),
    ("The special number of the {key} is {value}.", "special number of the {key}"),
    ("Remember that the password of the {key} is {value}.", "password of the {key}"),
    ("The account number of the {key} is {value}.", "account number of the {key}"),
)


@dataclass(frozen=True)
class Fact:
    """A key, its value (a string of digits) and the wording (index) in which it is stated and asked for."""

    key: str
    value: str
    wording: int = 0

    @property
    def statement(self) -> str:
        return _WORDINGS[self.wording][0].format(key=self.key, value=self.value)

    @property
    def asked(self) -> str:
        return _WORDINGS[self.wording][1].format(key=self.key)


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


def draw_facts(rng: random.Random, count: int, held_out: bool, digits: int = 7, wording: int | None = 0) -> list[Fact]:
    """`count` facts with distinct keys and values of `digits` digits; wording None mixes the wordings (one per call)."""
    if count < 1 or digits < 1:
        raise ValueError(f"draw_facts: count and digits must be positive, got {count} and {digits}")
    if wording is None:
        wording = rng.randrange(len(_WORDINGS))
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        key = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        if is_held_out(key) == held_out and key not in facts:
            facts[key] = Fact(key, str(rng.randrange(10 ** (digits - 1), 10**digits)), wording)
    return list(facts.values())


def ask(facts: Sequence[Fact]) -> str:
    """The question for one or several facts."""
    if len(facts) == 1:
        return f"Question: What is the {facts[0].asked}? Answer with the number only."
    listed = ", the ".join(fact.key for fact in facts[:-1])
    head = _WORDINGS[facts[0].wording][1].format(key=listed).replace("code of", "codes of").replace("number of", "numbers of")
    head = head.replace("password of", "passwords of")
    return f"Question: What are the {head} and the {facts[-1].key}? Answer with one number per line."


def answer(facts: Sequence[Fact]) -> str:
    return "\n".join(fact.value for fact in facts)


# ----------------------------------------------------------------------------------------------------------------------------------
# Prose: the project's own, or sentences of given texts

_PEOPLE = (
    "the miller,the old captain,a tall stranger,the baker's wife,my uncle,the schoolmaster,a young clerk,the ferryman,the widow next door,"
    "the innkeeper,a traveling musician,the gardener,the mayor's daughter,a retired soldier,the apothecary,two brothers,the night watchman,"
    "a patient fisherman,the postmaster,the carpenter"
).split(",")
_ACTIONS = (
    "walked slowly toward the market,mended a broken chair,counted the coins twice,told a long story about the flood,waited by the gate,"
    "carried water from the well,wrote a letter to a distant cousin,sold three sacks of grain,looked for a lost glove,sang an old song,"
    "argued about the price of wool,painted the door again,fed the horses before noon,read the newspaper aloud,planted beans along the wall,"
    "borrowed a lantern,forgot the name of the road,watched the boats come in,repaired the clock,bought bread and cheese"
).split(",")
_TIMES = (
    "before sunrise,on a rainy afternoon,after the harvest,in the middle of winter,when the bells had stopped,late in the evening,"
    "during the fair,on the first day of spring,as the fog was lifting,a week before the wedding,at the end of the summer,"
    "while the others were asleep"
).split(",")
_REMARKS = (
    "Nobody in the village found this unusual.,The weather did not change for several days.,It was said that the road would be closed soon.,"
    "The dogs barked for a while and then lay down again.,There was a smell of smoke and apples in the air.,"
    "Most people agreed that it had been a good year.,The children laughed and ran down to the river.,"
    "Afterwards the whole house was quiet.,The wind came from the sea and rattled the shutters.,Supper was served later than usual."
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
    """(name, text) of every given file: plain text, or JSON lines with "text" (and "id"), either one also xz-compressed."""
    texts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"text: must name readable files, got {str(path)!r}, which is not a file")
        raw = lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text("utf-8")
        if ".jsonl" in path.suffixes:
            rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
            texts += [(row.get("id", f"{path.name}:{i}"), row["text"]) for i, row in enumerate(rows)]
        else:
            texts.append((path.name, raw))
    return texts


def held_out_texts(texts: Sequence[tuple[str, str]], every: int = 10) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Splits (name, text) pairs into (train, held out): every `every`-th by name order is held out, none of a single text."""
    ordered = sorted(texts)
    held = [t for i, t in enumerate(ordered) if i % every == every - 1]
    return [t for i, t in enumerate(ordered) if i % every != every - 1], held


# ----------------------------------------------------------------------------------------------------------------------------------
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
) -> Case:
    """A text of about `num_tokens` tokens that hides `asked` + `distractors` held-out facts, and the question for `asked` of them.

    Facts stand at depths uniform over the context, none in its last `tail_tokens` tokens.

    Args:
        rng: source of every choice.
        count_tokens: number of tokens of a string.
        num_tokens: wanted length of the prompt (context + question + overhead); the result is at most 40 tokens shorter, never longer.
        asked, distractors: facts that the question asks for, and further ones it does not.
        sentences: prose to draw a contiguous run from; None writes the project's own.
        align, block, overhead: align=True cuts words so that context + question + `overhead` (the tokens of the chat template) is a
            multiple of `block`: the answer starts a block.
    Raises:
        ValueError: if num_tokens is too small for the facts.
    """
    facts = draw_facts(rng, asked + distractors, held_out=True, wording=wording)
    question = ask(facts[:asked])
    budget = num_tokens - overhead - count_tokens("\n\n" + question)
    room = budget - sum(count_tokens(" " + f.statement) for f in facts)
    if room < tail_tokens + 32:
        raise ValueError(f"make_case: num_tokens must leave {tail_tokens + 32} tokens of prose, got {num_tokens}, which leaves {room}")
    prose = _take_prose(rng, count_tokens, room, sentences)
    sizes = [count_tokens(" " + s) for s in prose]
    after = [sum(sizes[i:]) for i in range(len(prose) + 1)]  # tokens of prose behind place i
    places = [i for i in range(len(prose) + 1) if after[i] >= tail_tokens]
    total = after[0]
    order = sorted(
        ((min(places, key=lambda i, u=rng.random(): abs((total - after[i]) - u * (total - tail_tokens))), rng.random(), f) for f in facts),
        key=lambda t: t[:2],
    )
    pieces: list[str] = []
    at = {f.key: place for place, _, f in order}
    for i in range(len(prose) + 1):
        pieces += [f.statement for place, _, f in order if place == i]
        pieces += [prose[i]] if i < len(prose) else []
    context = " ".join(pieces)
    if align:
        context = _cut_to_multiple(context, question, count_tokens, overhead, block)
    depths = tuple((total - after[at[f.key]]) / max(total, 1) for f in facts[:asked])
    return Case(context, question, answer(facts[:asked]), tuple(facts[:asked]), depths)


def _take_prose(rng: random.Random, count_tokens: Callable[[str], int], room: int, sentences: Sequence[str] | None) -> list[str]:
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


def _cut_to_multiple(context: str, question: str, count_tokens: Callable[[str], int], overhead: int, block: int) -> str:
    words = context.split(" ")
    for _ in range(4 * block):
        extra = (count_tokens(join_prompt(" ".join(words), question)) + overhead) % block
        if extra == 0:
            return " ".join(words)
        words.pop()
        # A word of several tokens can jump over the multiple: go on to the next one below.
    raise ValueError(f"make_case: align could not reach a multiple of {block} tokens by cutting words; got {extra} tokens too many")
