"""Fine-tuning with the sparse forward: masses and lists against generation's, masks against plain ones, losses against
the plain trainer's, steps, files and the command.

Run: pytest tests/python/test_finetune.py
"""

import dataclasses
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from mage_ext import cli, models
from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.evaluation import tasks
from mage_ext.models import builtin
from mage_ext.models.adapter import adapter_cut, adapter_tensors, add_adapter, load_adapter, save_adapter
from mage_ext.models.config import Cut
from mage_ext.models.tokenizer import byte_level_bpe
from mage_ext.selection import SelectionConfig, select
from mage_ext.testing.tiny import tiny_config, tiny_model
from mage_ext.train import finetune as command_module
from mage_ext.train.data import RowMaker
from mage_ext.train.finetuner import FinetuneConfig, Finetuner, divergence
from mage_ext.train.packing import ANSWER, Layout, dense_mask
from mage_ext.train.sparse_rows import Masks, RowAttention, kept_units, sampled_blocks, unit_mass
from mage_ext.train.trainer import TrainConfig, Trainer
from test_train import BLOCK, END, MASK, SMALL, SPECIAL, TEMPLATE, make_model
from test_train import _one_thread as _one_thread
from test_train import base as base
from test_train import tokenizer as tokenizer
from test_train import vocabulary as vocabulary


def maker(tokenizer, rows=2, **options):
    return RowMaker(tokenizer, None, SMALL, rows, MASK, END, **options)


def tuner_of(tokenizer, rank=None, start=None, dtype=None, **config):
    settings = {**dict(k=32, g=16, dense_layers=0, lr=1e-2, check_batches=1), **config}
    return Finetuner(
        make_model(tokenizer.vocab_size), FinetuneConfig(**settings), SMALL, rank=rank, start=start, dtype=dtype
    )


# --- the exact pass -------------------------------------------------------------------------------------------------


def test_all_masked_copies_are_blocks_as_denoising_starts(tokenizer):
    batch = maker(tokenizer).batch(3)
    blocks = sampled_blocks(batch, SMALL, MASK)
    places = SMALL.branches * SMALL.branch_blocks + SMALL.trunk_blocks
    assert blocks.first == SMALL.tokens and blocks.size == BLOCK and blocks.batch.tokens.shape[1] % 128 == 0
    assert torch.equal(blocks.rows.tokens, batch.tokens) and torch.equal(blocks.rows.noisy, batch.noisy)
    masked = {}  # (row, place) -> offsets that one of its copies masks
    for at in batch.target_at.tolist():
        copy = int(batch.noisy[tuple(at)])
        if copy:
            masked.setdefault((at[0], (copy - 1) // 2), set()).add((at[1] - SMALL.clean) % BLOCK)
    seen = 0
    for row in range(2):
        for place in range(places):
            start = blocks.first + place * BLOCK
            here = slice(start, start + BLOCK)
            first_copy = (batch.noisy[row] == 2 * place + 1).nonzero().flatten()
            if not len(first_copy):
                assert blocks.prefix[row, place] == 0
                assert (blocks.batch.branch[row, here] == -1).all() and not blocks.sees[row, place].any()
                continue
            seen += 1
            offsets = masked[row, place]
            clean = batch.tokens[row, : SMALL.clean]
            position, branch = batch.positions[row, first_copy], batch.branch[row, first_copy[0]]
            text = [
                int(clean[i])
                for i in range(SMALL.clean)
                if batch.branch[row, i] == branch and position[0] <= batch.positions[row, i] <= position[-1]
            ]
            expected = [MASK if i in offsets else text[i] for i in range(BLOCK)]
            assert blocks.batch.tokens[row, here].tolist() == expected
            assert torch.equal(blocks.batch.positions[row, here], position)
            assert blocks.prefix[row, place] == position[0]
            before = [
                i
                for i in range(SMALL.clean)
                if batch.branch[row, i] in (0, branch) and batch.positions[row, i] < position[0]
            ]
            assert blocks.sees[row, place].nonzero().flatten().tolist() == before
            assert len(before) == position[0]  # a text of its own, every position once
            assert (blocks.owner[row, first_copy] == place).all()
    assert seen > 6 and len(masked) == seen


def test_masses_and_lists_are_those_of_generation(tokenizer):
    """Of a trunk's block, against the first forward of generate() behind the same prefix."""
    tuner = tuner_of(tokenizer, k=32)
    batch = maker(tokenizer, rows=1, own_prose=1.0).batch(1)
    blocks = tuner.prepare(batch)
    _, selection = tuner.teach(blocks)
    checked = 0
    for place in range(SMALL.trunk_blocks):
        start = int(blocks.prefix[0, place])
        seen = []

        def keep(mass, prefix_lens, config, *, votes=None, seen=seen):
            seen.append(select(mass, prefix_lens, config, votes=votes))
            return seen[-1]

        # The block's first token is known in both, the others are masked.
        config = DenoiseConfig(
            mode="mage",
            max_new_tokens=BLOCK - 1,
            selection=SelectionConfig(k=32, g=16),
            dense_layers=(),
            select_override=keep,
        )
        prompt = batch.tokens[0, : start + 1].tolist()
        generate(tuner.model.requires_grad_(False), [prompt], config)
        if start <= 32:
            continue  # kept whole: nothing is selected
        expected = seen[0]
        got = selection.indices[:, place], selection.counts[:, place], selection.kept_mass[:, place]
        torch.testing.assert_close(got[2], expected.kept_mass[:, 0], rtol=0, atol=1e-5)
        width = expected.indices.shape[-1]
        assert torch.equal(got[0][..., :width], expected.indices[:, 0])
        assert torch.equal(got[1], expected.counts[:, 0])
        assert got[2].min() < 0.9  # so that a wrong list would show
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("g", [1, 16, 64])
def test_unit_masses_are_mean_shares(tokenizer, g):
    """Against softmax written down row by row in float64."""
    blocks = sampled_blocks(maker(tokenizer).batch(5), SMALL, MASK)
    tokens = blocks.batch.tokens.shape[1]
    units = -(-(SMALL.trunk + SMALL.branch_tokens) // g)
    q, k = 2 * torch.randn(2, tokens, 4, 16), torch.randn(2, tokens, 2, 16)
    got = unit_mass(q, k, blocks, g, units)
    mask = dense_mask(blocks.batch, BLOCK)[:, 0]
    expected = torch.zeros(got.shape, dtype=torch.float64)
    for row, place in (blocks.prefix > 0).nonzero().tolist():
        start = blocks.first + place * BLOCK
        for at, head in itertools.product(range(start, start + BLOCK), range(4)):
            keys = mask[row, at].nonzero().flatten()
            score = k[row, keys, head // 2].double() @ q[row, at, head].double() / 4
            unit = blocks.batch.positions[row, keys] // g
            expected[row, place, head // 2].index_add_(0, unit, score.softmax(0) / (2 * BLOCK))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    assert (expected.sum(-1)[blocks.prefix > 0] - 1).abs().max() < 1e-9


# --- masks ----------------------------------------------------------------------------------------------------------


def random_lists(blocks, k, g, layers=1):
    units = -(-(SMALL.trunk + SMALL.branch_tokens) // g)
    mass = torch.rand(layers, blocks.prefix.numel(), 2, units) / units
    return select(mass, blocks.prefix.flatten(), SelectionConfig(k=k, g=g)), units


@pytest.mark.parametrize("k, g", [(32, 16), (64, 64), (20, 1)])
def test_noisy_tokens_see_their_lists_and_nothing_else_changes(tokenizer, k, g):
    blocks = sampled_blocks(maker(tokenizer).batch(7), SMALL, MASK)
    selection, units = random_lists(blocks, k, g)
    kept = kept_units(selection, 2, units)
    masks = Masks(blocks.rows, BLOCK, group=2, flex=False)
    owner = blocks.owner[:, : blocks.first]
    (sparse,), exact = masks.sparse(owner, kept, g), dense_mask(blocks.rows, BLOCK)
    assert torch.equal(masks.exact(), exact)
    batch, cut = blocks.rows, 0
    places = blocks.prefix.shape[1]
    for row in range(2):
        clean = batch.noisy[row] == 0
        assert torch.equal(sparse[row, :, clean], exact[row].expand(4, -1, -1)[:, clean])
        for place in range(places):
            prefix = int(blocks.prefix[row, place])
            for head in range(2):
                listed = set(selection.tokens(row * places + place, 0, head))
                listed |= set(range(prefix // g * g, prefix))  # the partial unit, charged to k
                assert len(listed) <= max(k, g) and (len(listed) == prefix if prefix <= k else True)
                for copy in (2 * place + 1, 2 * place + 2):
                    for at in (batch.noisy[row] == copy).nonzero().flatten().tolist():
                        keys = exact[row, 0, at].nonzero().flatten()
                        expected = [
                            i
                            for i in keys.tolist()
                            if batch.noisy[row, i] == copy or int(batch.positions[row, i]) in listed
                        ]
                        cut += len(keys) - len(expected)
                        for query_head in (2 * head, 2 * head + 1):
                            assert sparse[row, query_head, at].nonzero().flatten().tolist() == expected
    assert cut > 1000


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("k, g", [(32, 16), (64, 64), (20, 1), (4096, 32)])
def test_flex_attention_is_the_dense_mask(tokenizer, k, g):
    """What a GPU trains with, run here without its compiler; every tile of the lists is read or taken whole rightly."""
    blocks = sampled_blocks(maker(tokenizer).batch(9), SMALL, MASK)
    selection, units = random_lists(blocks, k, g, layers=2)
    kept = kept_units(selection, 2, units)
    owner = blocks.owner[:, : blocks.first]
    q, kv = torch.randn(2, SMALL.tokens, 4, 16), torch.randn(2, 2, SMALL.tokens, 2, 16)
    outs, written = [], dense_mask(blocks.rows, BLOCK)[:, 0]
    for flex in (False, True):
        masks = Masks(blocks.rows, BLOCK, group=2, flex=flex)
        attend = RowAttention([masks.exact(), *masks.sparse(owner, kept, g)])
        outs.append(torch.stack([attend(layer, q, kv[0], kv[1]) for layer in range(3)]))
        if flex:
            for mask in attend.masks:
                tiles = mask.to_dense()[:, 0].bool()
                assert torch.equal(tiles, written.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128)).any(-1).any(-2))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)
    assert outs[0].std() > 0.05
    apart = [(outs[0][layer] - outs[0][0]).abs().amax() for layer in (1, 2)]
    assert min(apart) > 0.1 if k < 4096 else max(apart) < 1e-5


# --- losses ---------------------------------------------------------------------------------------------------------


def test_the_controls_loss_and_gradient_are_the_plain_trainers(tokenizer, tmp_path):
    batch = maker(tokenizer).batch(0)
    trainer = Trainer(make_model(tokenizer.vocab_size), TrainConfig(1, rank=4), tmp_path, "tiny.gguf")
    with torch.no_grad():
        for module in trainer.wrapped.values():
            module.b.normal_(std=0.05)
        trainer.mask_row.normal_()
    start = adapter_tensors(trainer.wrapped, trainer.mask_row)
    expected, means = trainer.losses(batch)
    expected.backward()
    for settings in (dict(control=True), dict(k=1024, lam=0.0), dict(k=1024, lam=3.0)):
        tuner = tuner_of(tokenizer, rank=4, start=start, **settings)
        loss, parts = tuner.losses(tuner.prepare(batch))
        loss.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        assert [float(parts[n]) for n in ("prose", "answer", "clean")] == pytest.approx(
            [mean.item() for mean in means], 1e-5
        )
        for got, wanted in zip(tuner.trained, trainer.parameters, strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=1e-5)
        assert ("kl" in parts) != tuner.config.control
        if not tuner.config.control:  # a budget that holds every prefix: sparse is exact
            assert abs(float(parts["kl"])) < 1e-6 and float(parts["kept"]) == pytest.approx(1, abs=1e-4)


def test_a_small_budget_costs_something_and_dense_layers_less(tokenizer):
    batch = maker(tokenizer).batch(0)
    kl = []
    for settings in (dict(k=16), dict(k=64), dict(k=16, dense_layers=1), dict(k=1024)):
        tuner = tuner_of(tokenizer, **settings)
        with torch.no_grad():
            kl.append(float(tuner.losses(tuner.prepare(batch))[1]["kl"]))
    assert kl[0] > kl[1] > kl[3] and kl[0] > kl[2] > kl[3]


def test_gradient_passes_neither_teacher_nor_selection(tokenizer):
    """The same gradient as with both given from outside, and none of the units that no list holds."""
    tuner = tuner_of(tokenizer, lam=2.0)
    blocks = tuner.prepare(maker(tokenizer).batch(2))
    loss, _ = tuner.losses(blocks)
    loss.backward()
    teacher, selection = tuner.teach(blocks)
    assert not teacher.requires_grad
    other = tuner_of(tokenizer, lam=2.0)
    student = other.sparse_logits(blocks, selection)
    masked = other._masked(blocks.batch)
    logp, logq = teacher[masked].log_softmax(-1), student[masked].log_softmax(-1)
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    (other._cross_entropy(blocks.batch, student)[0] + 2.0 * kl).backward()
    for got, expected in zip(tuner.trained, other.trained, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=1e-6)
    assert max(p.grad.abs().max() for p in tuner.trained) > 1e-3


def test_divergence_is_kl_of_the_teacher():
    teacher, student = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log().nan_to_num(neginf=0.0)
    # teacher 1/2, 1/2; student 1/4, 3/4: log(2) / 2 + log(2 / 3) / 2
    assert float(divergence(teacher, student)) == pytest.approx(0.5 * (0.6931472 - 0.4054651), abs=1e-6)
    assert float(divergence(teacher[:0], student[:0])) == 0


# --- steps and runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 8])
def test_losses_go_down(tokenizer, rank, tmp_path):
    tuner = tuner_of(tokenizer, rank=rank, steps=30, k=16, lr=3e-3 if rank is None else 1e-2, warmup_steps=3)
    frozen = {name: p.clone() for name, p in tuner.model.named_parameters() if not p.requires_grad}
    batch = maker(tokenizer).batch(0)
    saved = []
    tuner.run(iter([batch] * 30), iter([maker(tokenizer).batch(10**6)]), tmp_path, lambda: saved.append(tuner.step))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "event" not in line]
    assert [line["step"] for line in steps] == [1, 10, 20, 30] and saved == [30]
    assert steps[-1]["ce"] < steps[0]["ce"] - 1 and steps[-1]["kl"] < 0.7 * steps[0]["kl"]
    assert steps[-1]["seconds_per_step"] > 0 and 0 < steps[-1]["kept"] <= 1 and steps[-1]["memory_gib"] == 0
    checks = [line for line in log if line.get("event") == "check"]
    assert [line["step"] for line in checks] == [0, 30]
    assert checks[1]["exact_answer"] < checks[0]["exact_answer"] - 0.5
    assert checks[1]["sparse_answer"] < checks[0]["sparse_answer"] - 0.5
    assert log[-1]["event"] == "end" and log[-1]["ended_by"] == "steps"
    for name, p in tuner.model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])


def test_checks_report_both_ways(tokenizer):
    tuner = tuner_of(tokenizer, k=16)
    blocks = tuner.prepare(maker(tokenizer).batch(4))
    facts = tuner.check([blocks, blocks])
    with torch.no_grad():
        exact = tuner.exact_logits(blocks.rows)
        student = tuner.sparse_logits(blocks, tuner.teach(blocks)[1])
    batch = blocks.batch
    masked = batch.noisy[batch.source[:, 0], batch.source[:, 1]] > 0
    answers = masked & (batch.kind == ANSWER)
    for way, logits in (("exact", exact), ("sparse", student)):
        each = -logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        assert facts[f"{way}_answer"] == pytest.approx(float(each[batch.kind == ANSWER].mean()), abs=1e-4)
        right = logits.argmax(-1) == batch.target
        assert facts[f"{way}_right"] == pytest.approx(float(right[answers].float().mean()), abs=1e-6)
    assert facts["same"] == pytest.approx(
        float((exact.argmax(-1) == student.argmax(-1))[masked].float().mean()), abs=1e-6
    )


def test_small_steps_are_not_lost_in_bfloat16(tokenizer):
    """Steps far below the spacing of bfloat16 add up in the optimizer's copies; the model follows, rounded."""
    tuner = tuner_of(tokenizer, dtype=torch.bfloat16, control=True)
    before = [p.detach().clone() for p in tuner.trained]
    assert all(p.dtype == torch.bfloat16 for p in tuner.trained)
    blocks = tuner.prepare(maker(tokenizer, rows=1).batch(0))
    for _ in range(2):
        tuner.train_step(blocks, 1e-6)
    moved = 0
    for first, now, exact in zip(before, tuner.trained, tuner._exact, strict=True):
        assert exact.dtype == torch.float32 and torch.equal(now, exact.bfloat16())
        moved += int((exact != first.float()).sum())
        assert (exact - first.float()).abs().max() < 1e-5
    assert moved > 0.5 * sum(p.numel() for p in before)
    assert sum(int((now != first).sum()) for first, now in zip(before, tuner.trained, strict=True)) < 0.1 * moved


def test_time_ends_a_run(tokenizer, tmp_path):
    tuner = tuner_of(tokenizer, minutes=1e-9, steps=5)
    batch = maker(tokenizer, rows=1).batch(0)
    tuner.run(iter([batch]), iter([batch]), tmp_path, lambda: None)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["ended_by"] == "time" and log[-1]["step"] == 0


def test_rates_warm_up_stay_and_fall(tokenizer):
    tuner = tuner_of(tokenizer, lr=1.0, warmup_steps=10, decay_share=0.25)
    rates = []
    for tuner.step, share in ((0, 0.0), (4, 0.02), (9, 0.05), (100, 0.75), (150, 0.875), (199, 1.0)):
        rates.append(tuner.rate(share))
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.02])


def test_measuring_reports_every_context(short_rows):
    model = tiny_model(tiny_config("fast_dllm_v2", num_layers=2, max_positions=1024))
    config = FinetuneConfig(k=64, g=32, dense_layers=1)
    rows = list(command_module.measure(model, config, [128, 256], rows=1, device="cpu", steps=1))
    assert [row["tokens"] for row in rows] == [128, 256]
    assert [row["row_tokens"] for row in rows] == [command_module.layout_for(n, 32).tokens for n in (128, 256)]
    for row in rows:
        assert row["seconds_per_step"] > 0
        assert row["minutes_of_200_steps"] == pytest.approx(row["seconds_per_step"] * 200 / 60)


def test_random_rows_take_every_place():
    layout = command_module.layout_for(512, 32)
    config = tiny_config("fast_dllm_v2")
    batch = command_module.random_batch(config, layout, 2, 0)
    blocks = sampled_blocks(batch, layout, config.mask_id)
    assert (blocks.prefix >= 32).all()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(steps=0), "FinetuneConfig: steps must be at least 1, got 0"),
        (dict(minutes=0.0), "minutes must be None or a positive number, got 0.0"),
        (dict(k=100, g=32), "k must be a multiple of g = 32, got 100"),
        (dict(g=7), "g must be one of 1, 16, 32, 64, got 7"),
        (dict(lam=-1.0), "lam must be a number >= 0, got -1.0"),
        (dict(lam=float("nan")), "lam must be a number >= 0, got nan"),
        (dict(lr=0.0), "lr must be a positive number, got 0.0"),
        (dict(dense_layers=-1), "dense_layers must be at least 0, got -1"),
        (dict(seed=1000), r"seed must be in \[0, 1000\), got 1000"),
    ],
)
def test_settings_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**settings)


def test_models_that_do_not_fit_are_refused(tokenizer):
    def tuner(model, layout=SMALL, **config):
        return Finetuner(model, FinetuneConfig(**config), layout)

    with pytest.raises(ValueError, match="model must have the token shift"):
        tuner(tiny_model(tiny_config("sdar_b16")))
    with pytest.raises(ValueError, match=r"layout\.block must be 32, got 16"):
        tuner(tiny_model(tiny_config("fast_dllm_v2")))
    with pytest.raises(ValueError, match=r"trunk \+ branch_tokens must fit max_positions \(200\), got 224"):
        tuner(tiny_model(tiny_config("llama_shift", max_positions=200)))
    with pytest.raises(ValueError, match="dense_layers must leave a layer that selects, got 2 of 2"):
        tuner(make_model(tokenizer.vocab_size), dense_layers=2)
    wrapped = add_adapter(make_model(tokenizer.vocab_size), 3)
    start = adapter_tensors(wrapped, torch.zeros(64))
    with pytest.raises(ValueError, match=r"start must hold layers.0.mlp.down_proj.a of shape \[4, 96\], got \[3, 96\]"):
        tuner_of(tokenizer, rank=4, start=start)


def test_rows_of_another_layout_are_refused(tokenizer):
    batch = maker(tokenizer).batch(0)
    with pytest.raises(ValueError, match=f"batch must have rows of 256 tokens, got {SMALL.tokens}"):
        sampled_blocks(batch, Layout(trunk=64, branches=0, trunk_blocks=4, block=16), MASK)
    moved = dataclasses.replace(batch, noisy=batch.noisy.roll(1, 1))
    with pytest.raises(ValueError, match=r"must hold its copies in order behind layout\.clean tokens"):
        sampled_blocks(moved, SMALL, MASK)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short_rows(monkeypatch):
    """Few questions per row, so that a step on a CPU is short."""
    small = dict(branches=2, branch_blocks=2, trunk_blocks=2)
    monkeypatch.setattr(command_module, "layout_for", lambda tokens, block: Layout(tokens, **small, block=block))


@pytest.fixture
def texts(tmp_path, short_rows):
    novels = [{"id": f"n{i}", "text": " ".join(tasks.filler(random.Random(i), 30))} for i in range(10)]
    (tmp_path / "novels.jsonl").write_text("\n".join(map(json.dumps, novels)))
    return str(tmp_path / "novels.jsonl")


@pytest.fixture
def folder(tmp_path, vocabulary):
    """A folder as Fast-dLLM v2's, with random weights and the tokenizer of test_train.py."""
    tokens, merges = vocabulary
    config = tiny_config("fast_dllm_v2", vocab_size=len(tokens), mask_id=MASK, eos_ids=(END,), num_layers=2)
    path = tmp_path / "model"
    path.mkdir()
    backend = byte_level_bpe({t: i for i, t in enumerate(tokens)}, merges, digits=True, special_tokens=SPECIAL)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    facts = dict(
        model_type="Fast_dLLM_Qwen",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_eps,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        eos_token_id=END,
        mask_token_id=MASK,
        torch_dtype="float32",
    )
    (path / "config.json").write_text(json.dumps(facts))
    weights = {f"model.{n}": w.clone() for n, w in tiny_model(config).state_dict().items() if n != "lm_head.weight"}
    save_file(weights, str(path / "model.safetensors"))
    return path


def command(model, texts, out, *arguments):
    fixed = ["--text", texts, "--tokens", "128", "--k", "64", "--dense-layers", "1", "--steps", "2", "--device", "cpu"]
    return cli.main(["train", "finetune", "--model", str(model), "--out", str(out), *fixed, *arguments])


def test_command_trains_all_weights_of_a_folder(folder, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(folder, texts, out) == 0
    assert "9 texts to train on, 1 held out; all weights" in capsys.readouterr().out
    expected = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "log.jsonl"}
    assert {path.name for path in out.iterdir()} == expected
    first, now = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert first.keys() == now.keys()
    assert all(not torch.equal(value, now[name]) for name, value in first.items())
    assert models.load(out).config == models.load(folder).config
    assert command(out, texts, tmp_path / "second", "--control", "--seed", "1") == 0  # goes on from there
    steps = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    assert "kl" not in steps[2] and {"kl", "kept"} <= steps[1].keys()  # a step of the control; a check


def test_command_trains_adapters_of_a_folder_and_resumes(folder, texts, tmp_path):
    out = tmp_path / "out"
    assert command(folder, texts, out, "--rank", "3") == 0
    assert {path.name for path in out.iterdir()} == {"adapter.safetensors", "adapter-int8.safetensors", "log.jsonl"}
    saved = load_adapter(out / "adapter.safetensors", base="model")
    assert command(folder, texts, out, "--rank", "3", "--resume", str(out / "adapter.safetensors"), "--lr", "1e-9") == 0
    again = load_adapter(out / "adapter.safetensors", base="model")
    for name, value in saved.items():
        torch.testing.assert_close(again[name], value, rtol=0.01, atol=1e-5)
    assert max(value.abs().max() for name, value in saved.items() if name.endswith(".b")) > 1e-5


@pytest.mark.parametrize("name, cut", [(builtin.NAME, None), ("other-block", Cut((0, 2), 2e4, 256))])
def test_command_goes_on_from_the_adapter_of_a_model_in_the_box(name, cut, base, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "base_path", lambda: base)
    monkeypatch.setattr(builtin, "WEIGHTS", tmp_path)
    model = builtin.load_base(cut=cut)[1]
    wrapped = add_adapter(model, 2)
    with torch.no_grad():
        for module in wrapped.values():
            module.b.normal_(std=0.1)
    shipped = tmp_path / f"{name}.safetensors"
    save_adapter(shipped, adapter_tensors(wrapped, torch.randn(32)), builtin.BASE_NAME, cut=cut)
    out = tmp_path / "out"
    assert command(name, texts, out, "--dense-layers", "0", "--lr", "1e-9") == 0
    first, now = (load_adapter(path, builtin.BASE_NAME, cut) for path in (shipped, out / "adapter.safetensors"))
    for key, value in first.items():
        torch.testing.assert_close(now[key], value, rtol=0.01, atol=1e-4)
    assert adapter_cut(out / "adapter-int8.safetensors") == cut
    again = ("--resume", str(out / "adapter-int8.safetensors"))
    assert command(name, texts, tmp_path / "again", "--dense-layers", "0", *again) == 0
    assert command(name, texts, out, "--dense-layers", "0", "--rank", "2") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--rows", "0"), "finetune: rows must be at least 1, got 0"),
        (("--tokens", "100"), "Layout: trunk must be a multiple of block (32), got 100"),
        (("--tokens", "128", "256"), "finetune: tokens must be one context but for --measure, got 2"),
        (("--k", "65"), "SelectionConfig: k must be a multiple of g = 32, got 65"),
        (("--resume", "x.safetensors"), "finetune: resume must be left out where all weights are trained"),
        (("--rank", "2", "--resume", "x.safetensors"), "load_adapter: path must name an adapter file"),
        (("--text", "missing.txt"), "text: must name readable files, got 'missing.txt'"),
        (
            ("--model", "nowhere"),
            "load: path must be a folder with config.json or a model in the box (",
        ),
        (("--device", "moon"), "finetune: device must be a torch.device or its name, got 'moon'"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(folder, texts, arguments, message, tmp_path, capsys):
    assert command(folder, texts, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"mage: error: {message}")
    assert not (tmp_path / "out").exists()


def test_command_measures_steps(folder, short_rows, capsys):
    options = ["--tokens", "128", "--k", "64", "--dense-layers", "1", "--device", "cpu"]
    assert cli.main(["train", "finetune", "--measure", "--model", str(folder), *options]) == 0
    title, line = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert title == f"{folder} on cpu" and row["tokens"] == 128 and row["seconds_per_step"] > 0
    assert cli.main(["train", "finetune", "--measure", "--model", "random:9B", "--device", "cpu"]) == 2
    assert "random_model: name must be one of 1.5B, 7B, 8B, got '9B'" in capsys.readouterr().err


def test_command_needs_texts_and_a_folder(folder, capsys):
    assert cli.main(["train", "finetune", "--model", str(folder), "--device", "cpu"]) == 2
    assert "finetune: text must be given but for --measure, got none" in capsys.readouterr().err
    assert command(folder, str(folder / "config.json"), folder) == 2
    assert "finetune: out must be another folder than model" in capsys.readouterr().err
