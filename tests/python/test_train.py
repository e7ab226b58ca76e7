"""Training on a tiny random base with a tokenizer made here: rows, losses, gates, resuming, and the command.

Run: pytest tests/python/test_train.py
"""

import collections
import dataclasses
import json
import random
import re
import zlib

import numpy as np
import pytest
import tokenizers
import torch

from mage_ext import cli
from mage_ext.evaluation import tasks
from mage_ext.models import builtin
from mage_ext.models.adapter import adapter_cut, adapter_tensors, apply_adapter, load_adapter, save_adapter
from mage_ext.models.config import Cut
from mage_ext.models.tokenizer import Tokenizer, byte_level_bpe
from mage_ext.testing.tiny import tiny_config, tiny_model
from mage_ext.train import adapt
from mage_ext.train.data import Corpus, RowMaker, loader
from mage_ext.train.packing import ANSWER, CLEAN, PROSE, Layout, dense_mask
from mage_ext.train.trainer import Attention, Stage, TrainConfig, Trainer
from test_gguf import ARRAY as ARRAY_TYPE
from test_gguf import FLOAT32, INT32, STRING, UINT32, entry, gguf_bytes, tensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", builtin.MASK_TOKEN]
END, MASK = 2, 3
BLOCK = 16
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYOUT = Layout(trunk=256, branches=4, branch_tokens=96, branch_blocks=4, trunk_blocks=3, block=BLOCK)
SMALL = Layout(trunk=128, branches=2, branch_tokens=96, branch_blocks=3, trunk_blocks=2, block=BLOCK)


@pytest.fixture(autouse=True)
def _one_thread():
    """Steps of a tiny model are too short to share out; waiting for each other takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens and merges of a BPE over the project's own prose, facts and questions."""
    rng = random.Random(0)
    lines = tasks.filler(rng, 400)
    for wording in range(4):
        facts = tasks.draw_facts(rng, 200, wording % 2 == 0, wording=wording)
        lines += [fact.statement for fact in facts] + [tasks.ask(facts[i : i + 3]) for i in range(0, 200, 3)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers
    backend.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=split.ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    tokens, merges = vocabulary
    backend = byte_level_bpe({t: i for i, t in enumerate(tokens)}, merges, digits=True, special_tokens=SPECIAL)
    return Tokenizer(backend, eos_ids=(END,), mask_id=MASK, chat_template=TEMPLATE)


def make_model(vocabulary_size):
    config = tiny_config(
        "llama_shift",
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        mask_id=MASK,
        eos_ids=(END,),
        block_size=BLOCK,
    )
    return tiny_model(config)


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer.vocab_size)


def trainer_of(model, out, resume=None, **config):
    settings = {**dict(minutes=10, rank=4, lr=1e-2, warmup_steps=5, eval_batches=1), **config}
    return Trainer(model, TrainConfig(**settings), out, "tiny.gguf", resume=resume)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- rows -----------------------------------------------------------------------------------------------------------


def sentences_of(tokenizer, trunk):
    return tokenizer.decode(trunk.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("held_out", [False, True])
def test_every_asked_fact_stands_whole_in_the_trunk(tokenizer, held_out):
    texts = [("novel", " ".join(f"Sentence number {w} of the novel was written." for w in tasks.NOUNS))]
    maker = RowMaker(tokenizer, Corpus.build(texts, tokenizer), LAYOUT, 1, MASK, END, held_out=held_out, own_prose=0.5)
    lengths, asked_counts, values = set(), set(), set()
    for seed in range(60):
        trunk, branches = maker._row(random.Random(seed))
        text = sentences_of(tokenizer, trunk)
        assert len(trunk) % BLOCK == 0 and LAYOUT.trunk // 2 - BLOCK < len(trunk) <= LAYOUT.trunk
        assert text.startswith("<|im_start|>user\n")
        lengths.add(len(trunk))
        stated = dict(re.findall(r"(?:code|number|password) of the (\w+ \w+) is (\d+)\.", text))
        assert stated and all(tasks.is_held_out(key) == held_out for key in stated)
        assert branches
        for branch in branches:
            question = tokenizer.decode(branch.tokens[: branch.answer_start], skip_special_tokens=False)
            answer = tokenizer.decode(branch.tokens[branch.answer_start :], skip_special_tokens=False)
            assert question.endswith("<|im_end|>\n<|im_start|>assistant\n") and answer.endswith("<|im_end|>")
            lines = answer.removesuffix("<|im_end|>").split("\n")
            keys = re.findall(r"(?:of the|, the|and the) (\w+ \w+)(?=[?,]| and the)", question.split("Question:")[1])
            assert [stated[key] for key in keys] == lines
            asked_counts.add(len(lines))
            values.update(lines)
    assert len(lengths) > 5 and asked_counts == {1, 2, 3, 4}
    assert {len(value) for value in values} == ({7} if held_out else {4, 5, 6, 7, 8})


@pytest.mark.parametrize("held_out", [False, True])
def test_every_asked_line_stands_in_the_register(tokenizer, held_out):
    layout = Layout(trunk=512, branches=4, branch_tokens=192, branch_blocks=5, block=BLOCK)
    maker = RowMaker(tokenizer, None, layout, 1, MASK, END, held_out=held_out, registers=1.0)
    lengths, asked_counts, values, cut = set(), set(), set(), 0
    for seed in range(60):
        trunk, branches = maker._row(random.Random(seed))
        text = sentences_of(tokenizer, trunk)
        assert len(trunk) % BLOCK == 0 and 256 - BLOCK < len(trunk) <= 512
        assert text.startswith(f"<|im_start|>user\n{tasks.REGISTER_HEAD}\nline ")
        lengths.add(len(trunk))
        assert branches
        for branch in branches:
            prompt = tokenizer.decode(branch.tokens[: branch.answer_start], skip_special_tokens=False)
            answer = tokenizer.decode(branch.tokens[branch.answer_start :], skip_special_tokens=False)
            rest, question = prompt.split("\n\n")
            cut += bool(rest)
            register = (text + rest).split("\n")[2:]
            stated = dict(
                re.fullmatch(r"line (\w+-\w+): REGISTER_CONTENT is <(\d+)>", line).groups() for line in register
            )
            assert len(stated) == len(register) > 5
            assert all(tasks.is_held_out(key.replace("-", " ")) == held_out for key in stated)
            assert question.endswith("<|im_end|>\n<|im_start|>assistant\n") and answer.endswith("<|im_end|>")
            lines = answer.removesuffix("<|im_end|>").split("\n")
            assert [stated[key] for key in re.findall(r"\w+-\w+", question)] == lines
            asked_counts.add(len(lines))
            values.update(lines)
    assert len(lengths) > 5 and asked_counts == {1, 2, 3, 4} and cut
    assert {len(value) for value in values} == ({5} if held_out else {4, 5, 6, 7})


@pytest.mark.parametrize("held_out", [False, True])
def test_every_asked_variable_leads_to_its_number(tokenizer, held_out):
    texts = [("novel", " ".join(f"Sentence number {w} of the novel was written." for w in tasks.NOUNS))]
    layout = Layout(trunk=1024, branches=4, branch_tokens=192, branch_blocks=5, block=BLOCK)
    corpus = Corpus.build(texts, tokenizer)
    maker = RowMaker(tokenizer, corpus, layout, 1, MASK, END, held_out=held_out, own_prose=0.5, variables=1.0)
    asked_counts, hops, values, starts = set(), set(), set(), set()
    for seed in range(60):
        trunk, branches = maker._row(random.Random(seed))
        text = sentences_of(tokenizer, trunk)
        assert len(trunk) % BLOCK == 0 and 512 - BLOCK < len(trunk) <= 1024
        numbers, far, read = {}, {}, set()
        for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", text):
            assert name not in numbers and (number or source in numbers)  # set before it is read
            numbers[name], far[name] = number or numbers[source], 0 if number else far[source] + 1
            read.add(source)
        assert len(set(numbers.values())) >= 4 and all(tasks.is_held_out(name) == held_out for name in numbers)
        assert branches
        for branch in branches:
            prompt = tokenizer.decode(branch.tokens[: branch.answer_start], skip_special_tokens=False)
            answer = tokenizer.decode(branch.tokens[branch.answer_start :], skip_special_tokens=False)
            question = prompt.split("\n\n")[1]
            assert question.endswith("<|im_end|>\n<|im_start|>assistant\n") and answer.endswith("<|im_end|>")
            names = re.findall(r"VAR (\w+)", question)
            assert [numbers[name] for name in names] == answer.removesuffix("<|im_end|>").split("\n")
            assert not (held_out and read & set(names))  # the last of its chain
            asked_counts.add(len(names))
            hops.update(far[name] for name in names)
            values.update(numbers[name] for name in names)
            starts.add(branch.answer_start % BLOCK)
    assert asked_counts == {1, 2, 3, 4} and hops == set(range(held_out, 5)) and starts == set(range(BLOCK))
    assert {len(value) for value in values} == ({5} if held_out else {4, 5, 6, 7})


@pytest.mark.parametrize("held_out", [False, True])
def test_the_words_of_an_answer_are_the_most_frequent_of_its_list(tokenizer, held_out):
    layout = Layout(trunk=1024, branches=3, branch_tokens=192, branch_blocks=5, block=BLOCK)
    maker = RowMaker(tokenizer, None, layout, 1, MASK, END, held_out=held_out, word_lists=1.0)
    lengths, starts, answers = set(), set(), set()
    for seed in range(150):
        trunk, branches = maker._row(random.Random(seed))
        assert len(trunk) % BLOCK == 0 and 512 - 2 * BLOCK < len(trunk) <= 1024
        assert len(branches) == 3 and all(branch == branches[0] for branch in branches)
        start = branches[0].answer_start
        prompt = sentences_of(tokenizer, np.concatenate((trunk, branches[0].tokens[:start])))
        answer = tokenizer.decode(branches[0].tokens[start:], skip_special_tokens=False)
        context, question = prompt.split("\n\n")
        assert question == f"{tasks.LIST_QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        words = context.removeprefix(f"<|im_start|>user\n{tasks.LIST_HEAD} ").split(" ")
        counts = collections.Counter(words).most_common()
        assert all(counts[i][1] > counts[i + 1][1] for i in range(3))
        assert answer == "\n".join(word for word, _ in counts[:3]) + "<|im_end|>"
        assert {tasks.is_held_out(word) for word in words} == {held_out} and set(words) <= set(tasks.NOUNS)
        lengths.add(len(trunk))
        starts.add(start % BLOCK)
        answers.add(answer)
    assert len(lengths) > 5 and starts == set(range(BLOCK)) and len(answers) > 140


def test_a_gate_asks_once_for_a_list(tokenizer):
    layout = Layout(trunk=512, branches=3, branch_tokens=192, branch_blocks=5, block=BLOCK)
    maker = RowMaker(tokenizer, None, layout, 1, MASK, END, held_out=True, all_masked=True, word_lists=1.0)
    assert len(maker._row(random.Random(0))[1]) == 1
    batch = maker.batch(0)
    assert set(batch.branch.unique().tolist()) == {-1, 0, 1} and (batch.kind == ANSWER).any()


def test_rows_are_of_their_kinds_by_share(tokenizer):
    layout = Layout(trunk=512, branches=1, branch_tokens=96, branch_blocks=4, block=BLOCK)
    heads = {"registers": tasks.REGISTER_HEAD, "variables": "VAR ", "word_lists": tasks.LIST_HEAD}

    def kinds(**shares):
        maker = RowMaker(tokenizer, None, layout, 1, MASK, END, **shares)
        texts = [sentences_of(tokenizer, maker._row(random.Random(seed))[0]) for seed in range(200)]
        found = [[kind for kind, head in heads.items() if head in text] for text in texts]
        assert all(len(kind) < 2 for kind in found)
        return collections.Counter("".join(kind) for kind in found)

    assert kinds() == {"": 200}
    for kind in heads:
        assert kinds(**{kind: 1.0}) == {kind: 200}
    for shares in ({"registers": 0.4}, {"registers": 0.4, "variables": 0.1, "word_lists": 0.1}, {"word_lists": 0.3}):
        counts = kinds(**shares)
        for kind, share in {"": 1 - sum(shares.values()), **shares}.items():
            assert abs(counts[kind] - 200 * share) < 5 * (200 * share * (1 - share)) ** 0.5
        assert sum(counts.values()) == 200 and set(counts) == {"", *shares}


@pytest.mark.parametrize(
    "held_out, registers, checksum",
    [(False, 0.0, 2683172349), (False, 0.4, 4196591442), (True, 0.0, 2330816501), (True, 0.4, 211002774)],
)
def test_rows_of_the_shipped_curricula_stay_what_they_were(held_out, registers, checksum):
    """Checksums of rows made before variables and lists of words came, over a tokenizer of single bytes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + letters)}
    backend = byte_level_bpe(vocabulary, [], digits=True, special_tokens=SPECIAL)
    letter_tokenizer = Tokenizer(backend, eos_ids=(END,), mask_id=MASK, chat_template=TEMPLATE)
    texts = [("novel", " ".join(f"Sentence number {w} of the novel was written." for w in tasks.NOUNS))]
    layout = Layout(trunk=2048, branches=4, branch_tokens=320, branch_blocks=4, block=32)
    corpus = Corpus.build(texts, letter_tokenizer)
    maker = RowMaker(letter_tokenizer, corpus, layout, 1, MASK, END, held_out=held_out, registers=registers)
    found = 0
    for seed in range(20):
        trunk, branches = maker._row(random.Random(seed))
        pieces = [sentences_of(letter_tokenizer, trunk)]
        for branch in branches:
            text = letter_tokenizer.decode(list(branch.tokens), skip_special_tokens=False)
            pieces.append(f"{text}{branch.answer_start}")
        found = zlib.crc32("\x00".join(pieces).encode(), found)
    assert found == checksum


def test_lengths_are_full_or_drawn_from_512_on(tokenizer):
    maker = RowMaker(tokenizer, None, Layout(trunk=2048, branches=0, block=BLOCK), 1, MASK, END)
    lengths = [maker._length(random.Random(seed)) for seed in range(500)]
    shorter = [length for length in lengths if length < 2048]
    assert 100 < len(shorter) < 200 and min(shorter) < 700 and all(length % BLOCK == 0 for length in lengths)
    assert min(shorter) >= 512 and abs(np.mean(shorter) - 1280) < 150


def test_facts_of_rows_stand_at_every_depth(tokenizer):
    """As many facts in each fifth of the trunk, within five standard deviations of a fair draw."""
    maker = RowMaker(tokenizer, None, Layout(trunk=512, branches=0, block=BLOCK), 1, MASK, END)
    depths = []
    for seed in range(200):
        text = sentences_of(tokenizer, maker._row(random.Random(seed))[0])
        depths += [match.start() / len(text) for match in re.finditer(r"(code|number|password) of the", text)]
    counts, _ = np.histogram(depths, 5, (0, 1))
    assert len(depths) > 1000
    assert np.abs(counts / len(depths) - 0.2).max() < 5 * (0.2 * 0.8 / len(depths)) ** 0.5


def test_batches_are_functions_of_their_seed_whoever_makes_them(tokenizer):
    maker = RowMaker(tokenizer, None, LAYOUT, 2, MASK, END)
    own, worked = loader(maker, 5, 0), loader(maker, 5, 2)
    for seed in range(5, 9):
        expected = maker.batch(seed)
        for batch in (next(own), next(worked)):
            assert all(torch.equal(value, getattr(batch, name)) for name, value in vars(expected).items())
    assert not torch.equal(maker.batch(5).tokens, maker.batch(6).tokens)
    assert {PROSE, ANSWER, CLEAN} == set(maker.batch(5).kind.tolist())


def test_corpus_is_runs_of_sentences(tokenizer):
    texts = [("a", "One went away. Two came back. Three stayed."), ("b", "Four slept.")]
    corpus = Corpus.build(texts, tokenizer)
    assert len(corpus.starts) == 5 and corpus.tokens.dtype == np.uint32
    run = corpus.run(random.Random(0), 30)
    assert sum(map(len, run)) >= 30 > sum(map(len, run[:-1]))
    words = [tokenizer.decode(piece.tolist()) for piece in run]
    order = [" One went away.", " Two came back.", " Three stayed.", " Four slept."]
    first = order.index(words[0])
    assert words == [order[(first + i) % 4] for i in range(len(words))]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: Corpus.build([("a", " ")], t), "Corpus: texts must hold a sentence, got 1 texts without one"),
        (lambda t: Corpus.build([], t), "Corpus: texts must hold a sentence, got 0 texts"),
        (lambda t: RowMaker(t, None, LAYOUT, 0, MASK, END), "RowMaker: rows must be at least 1, got 0"),
        (lambda t: RowMaker(t, None, LAYOUT, 1, MASK, END, own_prose=1.5), r"own_prose must be in \[0, 1\], got 1.5"),
        (lambda t: RowMaker(t, None, LAYOUT, 1, MASK, END, registers=-1), r"registers must be in \[0, 1\], got -1"),
        (lambda t: RowMaker(t, None, LAYOUT, 1, MASK, END, variables=2), r"variables must be in \[0, 1\], got 2"),
        (lambda t: RowMaker(t, None, LAYOUT, 1, MASK, END, word_lists=-1), r"word_lists must be in \[0, 1\], got -1"),
        (
            lambda t: RowMaker(t, None, LAYOUT, 1, MASK, END, registers=0.5, variables=0.4, word_lists=0.2),
            r"registers \+ variables \+ word_lists must be at most 1, got \[0.5, 0.4, 0.2\]",
        ),
        (
            lambda t: RowMaker(t, None, Layout(trunk=64, branches=1, block=16), 1, MASK, END, word_lists=1).batch(0),
            r"half of layout.trunk must hold the head of a list \(\d+ tokens\) and 30 words, got 64",
        ),
        (lambda t: RowMaker(t, None, LAYOUT, 1, MASK, END, keys_asked={0: 1.0}), "keys_asked must map numbers of keys"),
        (
            lambda t: RowMaker(t, None, Layout(trunk=32, branches=1, block=16), 1, MASK, END, registers=1).batch(0),
            r"half of layout.trunk must hold the head of a register \(\d+ tokens\), got 32",
        ),
        (
            lambda t: RowMaker(t, None, Layout(trunk=16, branches=1, block=16), 1, MASK, END).batch(0),
            r"half of layout.trunk must hold the chat's head \(\d+ tokens\) and a fact \(\d+\), got 16",
        ),
        (
            lambda t: RowMaker(Tokenizer(t.backend, chat_template="hello"), None, LAYOUT, 1, MASK, END),
            "the chat template must quote a message once, got 0 times: 'hello'",
        ),
    ],
)
def test_rows_refuse(call, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


# --- losses and steps -----------------------------------------------------------------------------------------------


def test_losses_are_the_cross_entropy_of_each_kind(model, tokenizer, tmp_path):
    """Against the plain model with the adapter folded in, target by target.

    The head is the base's: folding changes the mask token's row of a tied head too, but that token is never emitted.
    """
    trainer = trainer_of(model, tmp_path)
    with torch.no_grad():
        for module in trainer.wrapped.values():
            module.b.normal_(std=0.05)
        trainer.mask_row.normal_()
    batch = RowMaker(tokenizer, None, LAYOUT, 2, MASK, END).batch(0)
    with torch.no_grad():
        loss, means = trainer.losses(batch)
    plain = make_model(tokenizer.vocab_size)
    apply_adapter(plain, adapter_tensors(trainer.wrapped, trainer.mask_row))
    mask = dense_mask(batch, BLOCK)

    def attend(layer, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    head = make_model(tokenizer.vocab_size).lm_head
    log_probs = head(plain.hidden(batch.tokens, batch.positions, attend)).log_softmax(-1)
    by_kind = {kind: [] for kind in (PROSE, ANSWER, CLEAN)}
    for (row, at), target, kind in zip(batch.source.tolist(), batch.target.tolist(), batch.kind.tolist(), strict=True):
        by_kind[kind].append(-float(log_probs[row, at, target]))
    expected = [np.mean(by_kind[kind]) for kind in (PROSE, ANSWER, CLEAN)]
    np.testing.assert_allclose([float(mean) for mean in means], expected, rtol=1e-4)
    weights = (0.5, 1.0, 0.2)
    np.testing.assert_allclose(float(loss), np.dot(weights, expected), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_dense_mask(model, tokenizer, tmp_path):
    """What a GPU trains with, run here without its compiler."""
    batch = RowMaker(tokenizer, None, SMALL, 2, MASK, END).batch(0)
    dense, flex = (Attention(BLOCK, torch.device("cpu"), flex) for flex in (False, True))
    q, k = torch.randn(2, SMALL.tokens, 4, 16), torch.randn(2, 2, SMALL.tokens, 2, 16)
    for attention in (dense, flex):
        attention.set(batch)
    assert isinstance(flex.mask, torch.nn.attention.flex_attention.BlockMask)
    expected = dense(0, q, k[0], k[1])
    torch.testing.assert_close(flex(0, q, k[0], k[1]), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


def test_loss_goes_down_and_only_the_adapter_moves(model, tokenizer, tmp_path):
    before = {name: value.clone() for name, value in make_model(tokenizer.vocab_size).state_dict().items()}
    trainer = trainer_of(model, tmp_path, rank=16)
    maker = RowMaker(tokenizer, None, SMALL, 4, MASK, END)
    unseen = maker.batch(10**6)
    with torch.no_grad():
        first = [float(mean) for mean in trainer.losses(unseen)[1]]
    stage = Stage(SMALL, rows=1, gate=None, max_steps=40)
    assert trainer.run([stage], tokenizer, None, None)
    with torch.no_grad():
        last = [float(mean) for mean in trainer.losses(unseen)[1]]
    # ln 900 = 6.8 is a model that knows nothing; digits and line ends alone bring answers to about ln 10.
    assert all(b < a - 1.0 for a, b in zip(first, last, strict=True))
    assert last[ANSWER] < 3.5
    for name, value in model.state_dict().items():
        if not name.endswith((".a", ".b")):
            assert torch.equal(value, before[name.replace(".base.", ".")])
    assert any(module.b.abs().max() > 0 for module in trainer.wrapped.values())


def test_learning_rate_warms_up_stays_and_falls(model, tmp_path):
    trainer = trainer_of(model, tmp_path, lr=1.0, warmup_steps=10, decay_share=0.25)
    assert [trainer._rate(0.0, step) for step in (0, 4, 9, 500)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    rates = [trainer._rate(share, 500) for share in (0.5, 0.75, 0.875, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.02])


# --- gates ----------------------------------------------------------------------------------------------------------


class Oracle:
    """In place of a trainer's model: logits that give each target's token, and another one where `spoiled` says so."""

    def __init__(self, trainer, spoiled):
        self.trainer, self.spoiled, self.config = trainer, spoiled, trainer.model.config
        self.forwards = 0
        trainer.hidden, trainer.model = self.hidden, self

    def hidden(self, batch):
        self.forwards += 1
        truth = torch.full_like(batch.tokens, -1)
        truth[batch.source[:, 0], batch.source[:, 1]] = batch.target
        for row, at in batch.source.tolist():
            branch = int(batch.branch[row, at])
            if branch and self.spoiled(row, branch, int(batch.positions[row, at + 1])):
                truth[row, at] = 7
        return truth[..., None].float()

    def logits(self, hidden):
        return 20.0 * torch.nn.functional.one_hot(hidden[..., 0].long(), self.config.vocab_size)


def test_answers_found_counts_whole_answers_by_their_lines(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path)
    trainer.newline_id, trainer.header_id = tokenizer.encode("\n")[0], tokenizer.encode("<|im_start|>")[0]
    maker = RowMaker(tokenizer, None, LAYOUT, 2, MASK, END, held_out=True, all_masked=True)
    rows = [maker._row(rng)[1] for rng in [random.Random(3)] for _ in range(2)]  # what maker.batch(3) packs
    lines = [[1 + branch.tokens[branch.answer_start :].count(trainer.newline_id) for branch in row] for row in rows]
    counts = {n: sum(row.count(n) for row in lines) for n in range(1, 5) if any(n in row for row in lines)}
    assert len(counts) >= 2
    oracle = Oracle(trainer, lambda row, branch, position: False)
    assert trainer.answers_found(iter([maker.batch(3)]), 1) == {n: (count, count) for n, count in counts.items()}
    assert oracle.forwards <= 2  # every token is certain
    # One wrong token anywhere in the answer of row 0's second branch spoils it, a block's first token included.
    branch = rows[0][1]
    for wrong in range(branch.answer_start, len(branch.tokens)):
        trainer = trainer_of(make_model(tokenizer.vocab_size), tmp_path)
        trainer.newline_id, trainer.header_id = tokenizer.encode("\n")[0], tokenizer.encode("<|im_start|>")[0]
        batch = maker.batch(3)
        trunk = int((batch.branch[0] == 0).logical_and(batch.noisy[0] == 0).sum())
        Oracle(trainer, lambda row, j, position, at=trunk + wrong: (row, j, position) == (0, 2, at))
        found = trainer.answers_found(iter([batch]), 1)
        assert {n: count - right for n, (right, count) in found.items() if right < count} == {lines[0][1]: 1}


def test_gate_that_holds_ends_a_stage(model, tokenizer, tmp_path, monkeypatch):
    shares = iter([0.5, 0.95, 0.95, 0.2, 0.3])
    monkeypatch.setattr(Trainer, "answers_found", lambda self, test, count: {1: (round(100 * next(shares)), 100)})
    trainer = trainer_of(model, tmp_path, eval_every=2)
    stages = [
        Stage(SMALL, 1, gate=0.9, min_steps=5, max_steps=50),
        Stage(SMALL, 1, gate=None, max_steps=3),
    ]
    assert trainer.run(stages, tokenizer, None, None)
    log = log_of(tmp_path)
    gates = [(line["stage"], line["step"], line["share"]) for line in log if line.get("event") == "gate"]
    # Step 4 holds too early, step 6 ends the stage; a stage without a gate goes on to its last step.
    assert gates == [(0, 2, 0.5), (0, 4, 0.95), (0, 6, 0.95), (1, 8, 0.2), (1, 9, 0.3)]
    assert log[-1]["event"] == "end" and log[-1]["ended_by"] == "steps" and log[-1]["gate_held"] is True


def test_missed_gate_ends_training(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path, eval_every=2, lr=1e-5)
    stages = [Stage(SMALL, 1, gate=1.0, min_steps=1, max_steps=3), Stage(SMALL, 1, gate=None, max_steps=3)]
    assert not trainer.run(stages, tokenizer, None, None)
    log = log_of(tmp_path)
    assert [line["step"] for line in log if line.get("event") == "gate"] == [2, 3]
    assert all(line["share"] < 1 and line["by_lines"] for line in log if line.get("event") == "gate")
    assert {"event": "gate missed", "stage": 0, "gate": 1.0} in log
    assert log[-1]["stage"] == 0 and log[-1]["step"] == 3 and log[-1]["gate_held"] is False
    assert (tmp_path / "adapter.safetensors").exists()  # what was learnt is kept


@pytest.mark.parametrize("gate", [None, 0.7, 0.8])
def test_time_ends_training_in_its_stage(model, tokenizer, tmp_path, gate, monkeypatch):
    monkeypatch.setattr(Trainer, "answers_found", lambda self, test, count: {1: (7, 10)})
    trainer = trainer_of(model, tmp_path, minutes=1e-6)
    stages = [Stage(SMALL, 1, gate=gate), Stage(SMALL, 1, gate=None)]
    assert trainer.run(stages, tokenizer, None, None) == (gate != 0.8)
    end = log_of(tmp_path)[-1]
    assert (end["stage"], end["ended_by"], end["step"], end["gate_held"]) == (0, "time", 0, gate != 0.8)


def test_stages_end_by_their_share_of_the_time(model, tokenizer, tmp_path, monkeypatch):
    """A clock of a minute per look; the file is there when the gate of such an end is measured."""
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("mage_ext.train.trainer.time.monotonic", lambda: next(clock))
    seen = []

    def measured(self, test, count):
        seen.append((tmp_path / "adapter-int8.safetensors").exists())
        return {1: (7, 10)}

    monkeypatch.setattr(Trainer, "answers_found", measured)
    trainer = trainer_of(model, tmp_path, minutes=60, save_every_s=1e9)
    assert trainer.run([Stage(SMALL, 1, until=0.3), Stage(SMALL, 1, until=0.6), Stage(SMALL, 1)], tokenizer, None, None)
    log = log_of(tmp_path)
    gates = [(line["stage"], line["step"]) for line in log if line.get("event") == "gate"]
    assert [stage for stage, _ in gates] == [0, 1, 2] and 0 < gates[0][1] < gates[1][1] < gates[2][1]
    assert log[-1]["ended_by"] == "time" and seen == [True] * 3
    # What misses its gate at the end of its share ends training.
    again = trainer_of(make_model(tokenizer.vocab_size), tmp_path / "b", minutes=60, save_every_s=1e9)
    assert not again.run([Stage(SMALL, 1, gate=0.8, until=0.3), Stage(SMALL, 1)], tokenizer, None, None)
    assert log_of(tmp_path / "b")[-1]["ended_by"] == "share"


def test_gates_ask_both_kinds(model, tokenizer, tmp_path):
    layout = Layout(trunk=128, branches=2, branch_tokens=192, branch_blocks=5, trunk_blocks=2, block=BLOCK)
    trainer = trainer_of(model, tmp_path, registers=0.5)
    trainer.run([Stage(layout, 2, max_steps=1)], tokenizer, None, None)
    (gate,) = [line for line in log_of(tmp_path) if line.get("event") == "gate"]
    assert list(gate["kinds"]) == ["facts", "registers"] and all(pair[1] > 0 for pair in gate["kinds"].values())
    assert sum(pair[1] for pair in gate["kinds"].values()) == sum(pair[1] for pair in gate["by_lines"].values())


def test_gates_log_every_kind_and_judge_by_facts_and_registers(model, tokenizer, tmp_path, monkeypatch):
    layout = Layout(trunk=320, branches=2, branch_tokens=192, branch_blocks=5, trunk_blocks=2, block=BLOCK)
    shares = {"registers": 0.25, "variables": 0.25, "word_lists": 0.25}
    trainer = trainer_of(model, tmp_path / "a", **shares)
    assert trainer.run([Stage(layout, 1, max_steps=2)], tokenizer, None, None)
    log = log_of(tmp_path / "a")
    (gate,) = [line for line in log if line.get("event") == "gate"]
    assert list(gate["kinds"]) == ["facts", *shares] and all(log[0]["config"][kind] == 0.25 for kind in shares)
    assert [pair[1] for pair in gate["kinds"].values()] == [2, 2, 2, 1]  # a list is asked for once
    assert sum(pair[1] for pair in gate["by_lines"].values()) == 4
    # What a gate finds: (7 + 8) / 20 of what it judges by, none of the others.
    answers = iter([{1: (7, 10)}, {1: (4, 5), 4: (4, 5)}, {2: (0, 10)}, {3: (0, 10)}])
    monkeypatch.setattr(Trainer, "answers_found", lambda self, test, count: next(answers))
    again = trainer_of(make_model(tokenizer.vocab_size), tmp_path / "b", **shares)
    assert again.run([Stage(layout, 2, gate=0.75, max_steps=1)], tokenizer, None, None)
    (gate,) = [line for line in log_of(tmp_path / "b") if line.get("event") == "gate"]
    assert gate["share"] == 0.75 and gate["by_lines"] == {"1": [11, 15], "4": [4, 5]}
    assert gate["kinds"] == {"facts": [7, 10], "registers": [8, 10], "variables": [0, 10], "word_lists": [0, 10]}


# --- files ----------------------------------------------------------------------------------------------------------


def test_resume_continues_with_the_values_of_the_file(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path / "one", scale=2.0)
    assert trainer.run([Stage(SMALL, 1, max_steps=4)], tokenizer, None, None)
    file = tmp_path / "one" / "adapter.safetensors"
    saved = load_adapter(file, base="tiny.gguf")
    assert any(value.abs().max() > 0 for name, value in saved.items() if name.endswith(".b"))
    again = trainer_of(make_model(tokenizer.vocab_size), tmp_path / "two", resume=file, seed=1)
    values = adapter_tensors(again.wrapped, again.mask_row)
    assert set(values) == set(saved) and all(torch.equal(values[name], saved[name]) for name in saved)
    assert not again.optimizer.state and again.step == 0
    # It is also the model that was trained, within bfloat16 of its adapter.
    batch = RowMaker(tokenizer, None, SMALL, 2, MASK, END).batch(0)
    with torch.no_grad():
        fresh = trainer_of(make_model(tokenizer.vocab_size), tmp_path / "three").losses(batch)[0]
        loss, resumed = trainer.losses(batch)[0], again.losses(batch)[0]
    assert abs(loss - resumed) < 0.02 * abs(loss - fresh)
    assert again.run([Stage(SMALL, 1, max_steps=2)], tokenizer, None, None)
    assert trainer_of(make_model(tokenizer.vocab_size), tmp_path / "four", resume=tmp_path / "two/adapter.safetensors")


def test_every_stage_leaves_its_adapter(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path)
    trainer.run([Stage(SMALL, 1, max_steps=2)] * 3, tokenizer, None, None)
    names = [f"adapter-int8{name}.safetensors" for name in ("-stage-0", "-stage-1", "")]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "adapter.safetensors", "log.jsonl"}
    first, second, last = (load_adapter(tmp_path / name, base="tiny.gguf") for name in names)
    for one, other in ((first, second), (second, last)):
        assert any((one[name] != other[name]).any() for name in one)


def test_resume_with_a_larger_rank_is_the_same_model(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path / "one", rank=3)
    trainer.run([Stage(SMALL, 1, max_steps=4)], tokenizer, None, None)
    file = tmp_path / "one" / "adapter.safetensors"
    grown = trainer_of(make_model(tokenizer.vocab_size), tmp_path / "two", resume=file, rank=7)
    again = trainer_of(make_model(tokenizer.vocab_size), tmp_path / "three", resume=file, rank=3)
    batch = RowMaker(tokenizer, None, SMALL, 2, MASK, END).batch(0)
    with torch.no_grad():
        torch.testing.assert_close(grown.losses(batch)[0], again.losses(batch)[0], rtol=1e-5, atol=0)
    assert all(module.a.shape[0] == 7 and not module.b[:, 3:].any() for module in grown.wrapped.values())
    assert all(module.a[3:].std() > 0 and module.b[:, :3].any() for module in grown.wrapped.values())


def test_shipped_file_is_the_trained_model(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path)
    trainer.run([Stage(SMALL, 1, max_steps=4)], tokenizer, None, None)
    small = load_adapter(tmp_path / "adapter-int8.safetensors", base="tiny.gguf")
    for name, value in adapter_tensors(trainer.wrapped, trainer.mask_row).items():
        if name != "mask_row":
            step = value.abs().amax(1 if name.endswith(".a") else 0, keepdim=True) / 127
            assert ((small[name] - value).abs() <= 0.501 * step).all()
    assert (tmp_path / "adapter-int8.safetensors").stat().st_size < (tmp_path / "adapter.safetensors").stat().st_size


def test_log_is_json_lines(model, tokenizer, tmp_path, capsys):
    trainer = trainer_of(model, tmp_path, eval_every=100)
    trainer.run([Stage(SMALL, 2, max_steps=1)], tokenizer, None, None)
    log = log_of(tmp_path)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == log
    assert [line.get("event") for line in log] == ["start", None, "gate", "end"]
    assert log[0]["config"]["rank"] == 4 and log[0]["stages"][0]["layout"]["trunk"] == 128
    assert log[1]["tokens"] == 2 * SMALL.tokens and {"prose", "answer", "clean", "lr", "tokens_per_s"} <= set(log[1])
    trainer.log(event="more")
    assert len(log_of(tmp_path)) == 5  # appended


def test_losses_that_are_not_finite_end_training(model, tokenizer, tmp_path):
    trainer = trainer_of(model, tmp_path)
    with torch.no_grad():
        trainer.mask_row.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="Trainer: losses must stay finite, got nan"):
        trainer.run([Stage(SMALL, 1, max_steps=4)], tokenizer, None, None)
    assert not list(tmp_path.glob("*.safetensors"))


def test_trainer_refuses(model, tokenizer, tmp_path):
    trainer_of(model, tmp_path / "a").save()
    saved = tmp_path / "a" / "adapter.safetensors"
    save_adapter(tmp_path / "cut.safetensors", load_adapter(saved), "tiny.gguf", cut=Cut((1,), 1e4, 512))
    size = tokenizer.vocab_size
    no_shift = tiny_model(tiny_config("llama", eos_ids=(1,)))
    cases = [
        (
            lambda: trainer_of(make_model(size), tmp_path / "b", saved, rank=2),
            r"resume must hold .* \(rank 2\), got \[4",
        ),
        (
            lambda: trainer_of(make_model(size), tmp_path / "b", tmp_path / "cut.safetensors"),
            r"resume must be of cut none, got Cut\(layers=\(1,\)",
        ),
        (
            lambda: Trainer(make_model(size), TrainConfig(1), tmp_path / "b", "x.gguf", resume=saved),
            "base must be 'x.gguf'",
        ),
        (lambda: trainer_of(make_model(size), tmp_path / "b", tmp_path), "path must name an adapter file"),
        (lambda: trainer_of(model, tmp_path / "b"), "model must be plain"),
        (lambda: trainer_of(no_shift, tmp_path / "b"), "model must have the token shift and an end token"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "b").exists()
    trainer = trainer_of(make_model(size), tmp_path / "c")
    for layout, message in (
        (Layout(trunk=256, branches=1, branch_tokens=96, block=32), "layout.block must be 16, got 32"),
        (Layout(trunk=512, branches=1, branch_tokens=96, block=16), r"must fit max_positions \(512\), got 608"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.run([Stage(layout, 1)], tokenizer, None, None)
    with pytest.raises(ValueError, match="stages must hold a stage"):
        trainer.run([], tokenizer, None, None)
    assert not (tmp_path / "c" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainConfig(0), "minutes must be a positive number, got 0"),
        (lambda: TrainConfig(float("nan")), "minutes must be a positive number, got nan"),
        (lambda: TrainConfig(1, lr=-1e-3), "lr must be a positive number, got -0.001"),
        (lambda: TrainConfig(1, rank=0), "rank must be at least 1, got 0"),
        (lambda: TrainConfig(1, workers=-1), "workers must be at least 0, got -1"),
        (lambda: TrainConfig(1, seed=1000), r"seed must be in \[0, 1000\), got 1000"),
        (lambda: Stage(LAYOUT, 0), "rows must be at least 1, got 0"),
        (lambda: Stage(SMALL, 1, gate=1.5), r"gate must be None or in \[0, 1\], got 1.5"),
        (lambda: Stage(SMALL, 1, until=0.0), r"until must be in \(0, 1\], got 0.0"),
    ],
)
def test_settings_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, curricula", [("smollm2-135m-block", ("short", "long")), ("smollm2-cut16-block", ("cut",))]
)
def test_curricula_are_those_of_the_shipped_models(model, curricula):
    """Their runs, with all that their logs tell of stages and settings."""
    lines = map(json.loads, (builtin.WEIGHTS / f"{model}.log.jsonl").read_text().splitlines())
    starts = [line for line in lines if line.get("event") == "start"]
    for start, name in zip(starts, curricula, strict=True):
        plan = adapt.CURRICULA[name]
        for stage, told in zip(plan.stages(8), start["stages"], strict=True):
            assert {key: value for key, value in dataclasses.asdict(stage).items() if key in told} == told
        config = {key: start["config"][key] for key in ("minutes", "workers", "seed", "rank", "lr")}
        run = TrainConfig(**config, **plan.settings)
        assert all(getattr(run, name) == value for name, value in start["config"].items())


def test_cut_curriculum_fits_what_is_kept():
    stages, cut = adapt.cut_curriculum(), adapt.CURRICULA["cut"].cut
    assert all(stage.layout.trunk + stage.layout.branch_tokens <= cut.max_positions for stage in stages)
    assert [stage.until for stage in stages] == sorted(stage.until for stage in stages) and stages[-1].until == 1
    assert len(cut.layers) == 16 and cut.layers[-1] == 29
    new = {"variables", "word_lists"}  # of no other curriculum: their rows are those of smollm2-135m-block's runs
    assert [name for name, plan in adapt.CURRICULA.items() if new & set(plan.settings)] == ["cut"]
    assert all(adapt.CURRICULA["cut"].settings[kind] == 0.1 for kind in new)
    # No angle of the slowest rotary pair at its last position is larger than any that the base was trained to.
    assert cut.max_positions * cut.rope_theta ** (-62 / 64) < 8192 * 100000.0 ** (-62 / 64)


def test_long_curriculum_fits_the_base():
    """SmolLM2 has 8192 positions; a step has about as many tokens in each stage, less than twice the shipped run's."""
    stages = adapt.long_curriculum()
    assert all(stage.layout.trunk + stage.layout.branch_tokens <= 8192 for stage in stages)
    assert [stage.until for stage in stages] == sorted(stage.until for stage in stages) and stages[-1].until == 1
    tokens = [stage.rows * stage.layout.tokens for stage in stages]
    assert max(tokens) < 1.2 * min(tokens) and max(tokens) < 2 * adapt.curriculum()[1].rows * 5504
    assert all(stage.rows >= 1 for stage in adapt.long_curriculum(1))


@pytest.fixture
def base(tmp_path, vocabulary):
    """A GGUF file of a random Llama of three layers with the tokenizer above."""
    tokens, merges = vocabulary
    hidden, inner = 32, 48
    entries = [
        entry("general.architecture", STRING, "llama"),
        entry("llama.block_count", UINT32, 3),
        entry("llama.context_length", UINT32, 512),
        entry("llama.embedding_length", UINT32, hidden),
        entry("llama.feed_forward_length", UINT32, inner),
        entry("llama.attention.head_count", UINT32, 2),
        entry("llama.attention.head_count_kv", UINT32, 1),
        entry("llama.rope.freq_base", FLOAT32, 10000.0),
        entry("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, "smollm"),
        entry("tokenizer.ggml.tokens", ARRAY_TYPE, tokens, STRING),
        entry("tokenizer.ggml.token_type", ARRAY_TYPE, [3 if t in SPECIAL else 1 for t in tokens], INT32),
        entry("tokenizer.ggml.merges", ARRAY_TYPE, [" ".join(merge) for merge in merges], STRING),
        entry("tokenizer.ggml.eos_token_id", UINT32, END),
        entry("tokenizer.chat_template", STRING, TEMPLATE),
    ]
    shapes = {
        "token_embd": (len(tokens), hidden),
        "output_norm": (hidden,),
    }
    layer_shapes = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 2, hidden),
        "attn_v": (hidden // 2, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(3) for name, shape in layer_shapes.items()}
    table, data, rng = [], b"", np.random.default_rng(0)
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype("<f4").tobytes()
        table.append(tensor(name + ".weight", shape[::-1], 0, len(data)))
        data += values + bytes(-len(values) % 32)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(entries, table, data))
    return path


@pytest.fixture
def command(base, tmp_path, monkeypatch):
    """Runs `mage train adapter` on the tiny base with short stages and a text; returns the status."""
    layout = Layout(
        trunk=128, branches=2, branch_tokens=96, branch_blocks=2, trunk_blocks=2
    )  # blocks of 32, as shipped
    monkeypatch.setattr(Trainer, "answers_found", lambda self, test, count: {1: (7, 10)})
    for name, plan in adapt.CURRICULA.items():
        short = dataclasses.replace(
            plan,
            stages=lambda rows: [Stage(layout, rows, gate=command.gate, max_steps=2)],
            cut=plan.cut and Cut((0, 2), 5e5, 1024),
        )
        monkeypatch.setitem(adapt.CURRICULA, name, short)
    novels = [{"id": f"n{i}", "text": " ".join(tasks.filler(random.Random(i), 30))} for i in range(10)]
    (tmp_path / "novels.jsonl").write_text("\n".join(map(json.dumps, novels)))

    def run(*arguments, gate=0.7, text="novels.jsonl"):
        command.gate = gate
        required = [
            "--text",
            str(tmp_path / text),
            "--out",
            str(tmp_path / "out"),
            "--minutes",
            "5",
            "--base",
            str(base),
        ]
        return cli.main(["train", "adapter", *required, "--device", "cpu", "--rows", "1", "--rank", "2", *arguments])

    return run


def test_command_trains_and_its_adapter_loads(command, base, tmp_path, capsys):
    assert command() == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.startswith("9 texts to train on (")
    assert {path.name for path in out.iterdir()} == {"adapter.safetensors", "adapter-int8.safetensors", "log.jsonl"}
    config, model, _ = builtin.load_base(base)
    assert config.block_size == 32
    apply_adapter(model, load_adapter(out / "adapter-int8.safetensors", base="tiny.gguf"))
    assert command("--resume", str(out / "adapter-int8.safetensors"), "--seed", "1", "--curriculum", "long") == 0
    assert log_of(out)[-1]["ended_by"] == "steps" and log_of(out)[-2]["kinds"] == {
        "facts": [7, 10],
        "registers": [7, 10],
    }
    assert [line["event"] for line in log_of(out) if line.get("event") in ("start", "end")] == ["start", "end"] * 2


def test_command_cuts_and_takes_over_an_adapter_of_the_whole_base(command, base, tmp_path):
    assert command("--lr", "1") == 0
    whole = load_adapter(tmp_path / "out" / "adapter-int8.safetensors")
    arguments = ("--resume", str(tmp_path / "out" / "adapter-int8.safetensors"), "--curriculum", "cut", "--rank", "3")
    assert command(*arguments, "--lr", "1e-9") == 0
    file = tmp_path / "out" / "adapter-int8.safetensors"
    cut = adapter_cut(file)
    assert cut == Cut((0, 2), 5e5, 1024)
    with pytest.raises(ValueError, match=r"load_adapter: cut must be Cut\(layers=\(0, 2\).*, got None"):
        load_adapter(file)
    tensors = load_adapter(file, "tiny.gguf", cut)
    assert {name.split(".")[1] for name in tensors if name != "mask_row"} == {"0", "1"}
    for here, there in ((0, 0), (1, 2)):
        name, source = f"layers.{here}.mlp.up_proj", f"layers.{there}.mlp.up_proj"
        assert tensors[name + ".a"].shape[0] == 3  # int8 of what int8 can hold is the same
        torch.testing.assert_close(
            tensors[name + ".b"] @ tensors[name + ".a"], whole[source + ".b"] @ whole[source + ".a"], rtol=0, atol=1e-5
        )
        assert (whole[source + ".b"] @ whole[source + ".a"]).abs().max() > 2e-3
    config, model, _ = builtin.load_base(base, cut=cut)
    apply_adapter(model, tensors)
    assert (config.num_layers, config.rope_theta, config.max_positions) == (2, 5e5, 1024)


def test_base_can_be_cut(base):
    whole, cut = builtin.load_base(base)[1], builtin.load_base(base, cut=Cut((0, 2), 5e5, 1024))[1]
    kept, all_ = cut.state_dict(), whole.state_dict()
    assert len(cut.layers) == 2 and cut.config == dataclasses.replace(
        whole.config, num_layers=2, rope_theta=5e5, max_positions=1024
    )
    for name, value in kept.items():
        assert torch.equal(value, all_[name.replace("layers.1.", "layers.2.")])
    assert not torch.equal(all_["layers.1.mlp.up_proj.weight"], all_["layers.2.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="Cut: layers must be below the base's 3, got 3"):
        builtin.load_base(base, cut=Cut((0, 3), 5e5, 1024))


def test_command_tells_a_missed_gate_by_its_status(command, tmp_path):
    assert command(gate=0.8) == 1
    assert log_of(tmp_path / "out")[-1]["gate_held"] is False


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--rank", "0"), "TrainConfig: rank must be at least 1, got 0"),
        (("--rows", "0"), "train: rows must be at least 1, got 0"),
        (("--minutes", "-1"), "TrainConfig: minutes must be a positive number, got -1.0"),
        (("--lr", "nan"), "TrainConfig: lr must be a positive number, got nan"),
        (("--resume", "novels.jsonl"), "load_adapter: path must name an adapter file, got 'novels.jsonl'"),
        (("--base", "novels.jsonl"), "gguf: path must be a GGUF file, got 'novels.jsonl'"),
        (("--text", "missing.txt"), "text: must name readable files, got 'missing.txt'"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(command, arguments, message, tmp_path, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"mage: error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_without_gpu_says_so(command, tmp_path, capsys):
    assert command("--device", "cuda") == 2
    assert "train: device must be cpu on a machine without a CUDA GPU, got 'cuda'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
