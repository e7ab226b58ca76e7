"""Training rows: prose of given novels or of the project's own with facts or variables hidden in it, a register, or a
list of words; then questions.

Text is tokenised sentence by sentence once; rows are put together from token runs, which makes hundreds per second.

Test: pytest tests/python/test_train.py
"""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mage_ext.evaluation import tasks
from mage_ext.models.tokenizer import Tokenizer
from mage_ext.train.packing import Batch, Branch, Layout, pack


@dataclass(frozen=True)
class Corpus:
    """Sentences of several texts as one run of tokens: tokens uint32 [n], starts int64 [sentences + 1]."""

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def build(cls, texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> "Corpus":
        """Splits (name, text) pairs into sentences and encodes them. Raises ValueError if there is no sentence."""
        runs = []
        for _, text in texts:
            sentences = [" " + s for s in tasks.split_sentences(text)]
            runs += [e.ids for e in tokenizer.backend.encode_batch_fast(sentences, add_special_tokens=False)]
        if not any(runs):
            raise ValueError(f"Corpus: texts must hold a sentence, got {len(texts)} texts without one")
        starts = np.concatenate(([0], np.cumsum([len(r) for r in runs]))).astype(np.int64)
        return cls(np.concatenate([np.asarray(r, np.uint32) for r in runs]), starts)

    def run(self, rng: random.Random, tokens: int) -> list[np.ndarray]:
        """Consecutive sentences of at least `tokens` tokens in all (wrapping round at the end)."""
        count = len(self.starts) - 1
        at, got, out = rng.randrange(count), 0, []
        while got < tokens:
            out.append(self.tokens[self.starts[at] : self.starts[at + 1]])
            got += len(out[-1])
            at = (at + 1) % count
        return out


class RowMaker:
    """Makes packed batches.

    Args:
        tokenizer: with a chat template. corpus: prose; None: only the project's own.
        layout: of the rows. rows: per batch. mask_id, end_id: tokens.
        held_out: draw facts from the held-out keys (for gates). all_masked: see packing.pack.
        own_prose: share of prose rows whose prose is the project's own.
        keys_asked: number of keys per question -> weight.
        registers: share of rows whose context is a register of lines (tasks.RECORD) in place of prose with facts.
        variables: share of rows whose prose hides chains of variables, see tasks.draw_variables.
        word_lists: share of rows whose context is a list of words; all questions of such a row are the same.
    Raises:
        ValueError: naming the argument, or a chat template that does not quote the user's message once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        corpus: Corpus | None,
        layout: Layout,
        rows: int,
        mask_id: int,
        end_id: int,
        held_out: bool = False,
        all_masked: bool = False,
        own_prose: float = 0.25,
        keys_asked: dict[int, float] | None = None,
        registers: float = 0.0,
        variables: float = 0.0,
        word_lists: float = 0.0,
    ):
        if rows < 1:
            raise ValueError(f"RowMaker: rows must be at least 1, got {rows}")
        shares = {"registers": registers, "variables": variables, "word_lists": word_lists}
        for name, share in (("own_prose", own_prose), *shares.items()):
            if not 0 <= share <= 1:
                raise ValueError(f"RowMaker: {name} must be in [0, 1], got {share}")
        if sum(shares.values()) > 1 + 1e-9:  # decimal shares that make 1 may sum to a little more
            raise ValueError(f"RowMaker: {' + '.join(shares)} must be at most 1, got {list(shares.values())}")
        if keys_asked is not None and not (keys_asked and min(keys_asked) >= 1 and min(keys_asked.values()) > 0):
            raise ValueError(f"RowMaker: keys_asked must map numbers of keys to positive weights, got {keys_asked}")
        self.tokenizer, self.corpus, self.layout, self.rows = tokenizer, corpus, layout, rows
        self.mask_id, self.end_id = mask_id, end_id
        self.held_out, self.all_masked = held_out, all_masked
        self.own_prose = own_prose if corpus is not None else 1.0
        self.keys_asked = keys_asked or {1: 0.5, 2: 0.1, 3: 0.1, 4: 0.3}
        self._kinds = (
            (registers, self._register),
            (variables, functools.partial(self._prose_row, chains=True)),
            (word_lists, self._word_list),
        )
        chat = tokenizer.render_chat([{"role": "user", "content": "\x00"}])
        if chat.count("\x00") != 1:
            raise ValueError(
                f"RowMaker: the chat template must quote a message once, got {chat.count(chr(0))} times: {chat!r}"
            )
        head, tail = chat.split("\x00")
        self._head = tokenizer.encode(head, add_special_tokens=False)
        self._tail = tail
        self._encoded: dict[str, np.ndarray] = {}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _known(self, text: str) -> np.ndarray:
        """Tokens of a sentence of the project's own or a word, kept."""
        if text not in self._encoded:
            self._encoded[text] = np.asarray(self._encode(text), np.uint32)
        return self._encoded[text]

    def _prose(self, rng: random.Random, tokens: int, own: bool) -> list[np.ndarray]:
        if not own:
            return self.corpus.run(rng, tokens)
        out, got = [], 0
        while got < tokens:
            out.append(self._known(" " + tasks.filler_sentence(rng)))
            got += len(out[-1])
        return out

    def _length(self, rng: random.Random) -> int:
        """Tokens of a trunk, whole blocks: often all of the layout's, else from 512 (or half of a short one) on."""
        most = self.layout.trunk
        tokens = most if rng.random() < 0.7 else rng.randint(min(most // 2, 512), most)
        return tokens // self.layout.block * self.layout.block

    def _row(self, rng: random.Random) -> tuple[np.ndarray, list[Branch]]:
        """Trunk and branches of a row."""
        if any(share for share, _ in self._kinds):
            drawn = rng.random()
            for share, make in self._kinds:
                if drawn < share:
                    return make(rng)
                drawn -= share
        return self._prose_row(rng)

    def _branch(self, context: list[int], question: list[int], asked: Sequence[tasks.Fact]) -> list[Branch]:
        """The branch with the end of the context, the question and the answer, if it fits the layout."""
        prompt, block = context + question, self.layout.block
        full = prompt + self._encode(tasks.answer(asked)) + [self.end_id]
        fits = -(-len(full) // block) - len(prompt) // block <= self.layout.branch_blocks
        return [Branch(full, len(prompt))] if len(full) <= self.layout.branch_tokens and fits else []

    def _asked(self, rng: random.Random, facts: Sequence[tasks.Fact]) -> list[tasks.Fact]:
        counts, weights = zip(*self.keys_asked.items(), strict=True)
        return rng.sample(facts, min(len(facts), rng.choices(counts, weights)[0]))

    def _register(self, rng: random.Random) -> tuple[np.ndarray, list[Branch]]:
        length = self._length(rng)
        tokens = self._head + self._encode(tasks.REGISTER_HEAD)
        if len(tokens) >= length:
            raise ValueError(
                f"RowMaker: half of layout.trunk must hold the head of a register ({len(tokens)} tokens), "
                f"got {self.layout.trunk}"
            )
        digits = 5 if self.held_out or rng.random() < 0.8 else rng.randint(4, 7)
        drawn = tasks.draw_facts(rng, 1 + length // 8, self.held_out, digits, tasks.RECORD)  # more than have room
        facts = []
        while len(tokens) < length:
            facts.append(drawn[len(facts)])
            tokens += self._encode("\n" + facts[-1].statement)
        branches = []
        for _ in range(self.layout.branches):
            asked = self._asked(rng, facts)
            # The last record goes on in the branch, which starts at a block.
            branches += self._branch(tokens[length:], self._encode("\n\n" + tasks.ask(asked) + self._tail), asked)
        return np.asarray(tokens[:length], np.uint32), branches

    def _word_list(self, rng: random.Random) -> tuple[np.ndarray, list[Branch]]:
        block = self.layout.block
        head = self._head + self._encode(tasks.LIST_HEAD)
        room = self._length(rng) + rng.randrange(block) - len(head)  # answers start anywhere in a block
        try:
            words, facts = tasks.draw_words(rng, lambda text: len(self._known(text)), room, self.held_out)
        except ValueError:
            raise ValueError(
                f"RowMaker: half of layout.trunk must hold the head of a list ({len(head)} tokens) and "
                f"{tasks.LEAST_WORDS} words, got {self.layout.trunk}"
            ) from None
        tokens = np.concatenate((np.asarray(head, np.uint32), *(self._known(" " + word) for word in words)))
        length = len(tokens) // block * block
        question = self._encode("\n\n" + tasks.ask(facts) + self._tail)
        branches = []
        for _ in range(1 if self.all_masked else self.layout.branches):  # they differ by their noise alone
            branches += self._branch(tokens[length:].tolist(), question, facts)
        return tokens[:length], branches

    def _draw_facts(self, rng: random.Random) -> list[tasks.Fact]:
        return tasks.draw_facts(
            rng,
            rng.randint(4, max(4, min(24, self.layout.trunk // 48))),
            self.held_out,
            digits=7 if self.held_out or rng.random() < 0.8 else rng.randint(4, 8),
            wording=0 if self.held_out else None,
        )

    def _draw_variables(self, rng: random.Random) -> list[tasks.Fact]:
        chains = rng.randint(4, max(4, min(8, self.layout.trunk // 256)))
        hops = [rng.randint(1, tasks.MOST_HOPS) for _ in range(chains)]
        digits = 5 if self.held_out or rng.random() < 0.8 else rng.randint(4, 7)
        return tasks.draw_variables(rng, hops, self.held_out, digits)

    def _prose_row(self, rng: random.Random, chains: bool = False) -> tuple[np.ndarray, list[Branch]]:
        """Prose that hides facts or, in chains, variables."""
        layout, block = self.layout, self.layout.block
        own = rng.random() < self.own_prose
        facts = self._draw_variables(rng) if chains else self._draw_facts(rng)
        stated = [np.asarray(self._encode(" " + fact.statement), np.uint32) for fact in facts]
        length = self._length(rng)  # whole blocks, so that no fact at the end is cut
        room = length - len(self._head) - sum(map(len, stated))
        while room < 0 and len(stated) > 1:
            facts.pop()
            room += len(stated.pop())
        if room < 0:
            raise ValueError(
                f"RowMaker: half of layout.trunk must hold the chat's head ({len(self._head)} tokens) and a fact "
                f"({len(stated[0])}), got {layout.trunk}"
            )
        kept: list[np.ndarray | str] = []  # pieces of prose, and names of chains where their next statement stands
        used = 0
        for piece in self._prose(rng, room, own):  # the last sentence is cut
            kept.append(piece[: room - used])
            used += len(kept[-1])
        waiting: dict[str, list[np.ndarray]] = {}
        for fact, statement in zip(facts, stated, strict=True):
            waiting.setdefault(fact.chain, []).append(statement)
            kept.insert(rng.randint(0, len(kept)), fact.chain)
        pieces = [waiting[piece].pop(0) if isinstance(piece, str) else piece for piece in kept]
        trunk = np.concatenate((np.asarray(self._head, np.uint32), *pieces))

        if chains and self.held_out:  # the last of every chain, as cases ask
            facts = list({fact.chain: fact for fact in facts}.values())
        branches = []
        for _ in range(layout.branches):
            asked = self._asked(rng, facts)
            question = self._encode("\n\n" + tasks.ask(asked) + self._tail)
            # The context goes on for 0..block - 1 tokens of prose in the branch, so that answers start anywhere in a
            # block; long answers start at a block's first position half of the time.
            aligned = -len(question) % block
            extra = aligned if len(asked) > 2 and rng.random() < 0.5 else rng.randrange(block)
            prose = np.concatenate(self._prose(rng, extra + 1, own))[:extra]
            branches += self._branch(prose.tolist(), question, asked)
        return trunk, branches

    def batch(self, seed: int) -> Batch:
        """The batch that `seed` names."""
        rng = random.Random(seed)
        made = [self._row(rng) for _ in range(self.rows)]
        return pack(
            np.random.default_rng(seed),
            self.layout,
            [trunk for trunk, _ in made],
            [branches for _, branches in made],
            self.mask_id,
            self.end_id,
            all_masked=self.all_masked,
        )


class BatchStream(torch.utils.data.IterableDataset):
    """Endless batches of a RowMaker, seeds `first`, `first` + 1, ... dealt out over the loader's workers."""

    def __init__(self, maker: RowMaker, first: int):
        self.maker, self.first = maker, first

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        index, step = (info.id, info.num_workers) if info else (0, 1)
        seed = self.first + index
        while True:
            yield self.maker.batch(seed)
            seed += step


def loader(maker: RowMaker, first: int, workers: int) -> Iterator[Batch]:
    """Batches in the order of their seeds; worker processes when workers > 0."""
    return iter(
        torch.utils.data.DataLoader(
            BatchStream(maker, first),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
    )
