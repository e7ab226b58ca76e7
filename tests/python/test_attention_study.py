"""Recall, kept mass, queries and budgets along a block. Run: pytest tests/python/test_attention_study.py"""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from mage_ext import cli
from mage_ext.denoise import DenoiseConfig, generate, prefill
from mage_ext.evaluation import attention_study as attention
from mage_ext.evaluation import method_comparison as comparison
from mage_ext.evaluation import needles
from mage_ext.evaluation.attention_study import Look
from mage_ext.evaluation.forced_blocks import ForcedBlocks, rows_of
from mage_ext.models import builtin
from mage_ext.models.adapter import adapter_tensors, add_adapter, save_adapter
from mage_ext.models.config import Cut
from mage_ext.models.huggingface import LoadedModel
from mage_ext.models.transformer import Transformer, rotary_frequencies
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig
from mage_ext.testing.plain_loop import PlainWindow, block_causal_mask
from mage_ext.testing.tiny import tiny_config, tiny_model

SAMPLER = SamplerConfig("low_confidence_static", tokens_per_step=4)


@functools.cache
def _loaded(variant):
    model = tiny_model(tiny_config(variant), seed=1)
    return LoadedModel(model.config, model, None)


def _prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 96, (n,), generator=generator).tolist() for n in lengths]


# ----------------------------------------------------------------------------------------------------------------------
# Formulas


def _one_list(units, tail, g=1):
    return BlockSelection.from_units([[[units]]], [tail], g)


def test_recall_and_kept_mass_of_hand_worked_lists():
    # A prefix of 4 tokens, two tokens of the block. The own list is {0, 2}.
    mass = torch.tensor([[[[0.4, 0.1, 0.3, 0.1, 0.05, 0.05]]]])
    own = _one_list([0, 2], 4)
    recall, kept, kept_own, free = attention.compare_lists(_one_list([0, 1], 4), own, mass)
    assert recall.item() == 0.5 and free.item() == pytest.approx(0.1)
    assert kept.item() == pytest.approx(0.6) and kept_own.item() == pytest.approx(0.8)
    # Lists of an earlier block attend everything from their own tail on, here tokens 2 and 3.
    recall, kept, *_ = attention.compare_lists(_one_list([1], 2), own, mass)
    assert recall.item() == 0.5 and kept.item() == pytest.approx(0.6)
    # Nobody there: no mass, no lists.
    recall, kept, kept_own, _ = attention.compare_lists(own, _one_list([], 4), torch.zeros_like(mass))
    assert recall.item() == kept.item() == kept_own.item() == 0


def test_tokens_needed_counts_the_heaviest_first():
    mass = torch.tensor([0.1, 0.4, 0.2, 0.0, 0.2, 0.1]).view(1, 1, 1, 6)
    four = torch.tensor([4], dtype=torch.int32)
    # The block's two tokens have 0.3; with 0.4 that is 0.7, with 0.2 it is 0.9, with 0.1 it is 1.
    for share, count in ((0.3, 0), (0.5, 1), (0.7, 1), (0.85, 2), (0.95, 3), (1.0, 3)):
        assert attention.tokens_needed(mass, four, share - 1e-6).item() == count, share
    assert attention.tokens_needed(mass, torch.tensor([0], dtype=torch.int32), 0.9).item() == 0


def test_layer_scores_are_those_of_the_paper():
    union = torch.tensor([[[4, 10]], [[6, 2]]], dtype=torch.int32)  # [2 layers, 1 request, 2 heads]
    coverage = torch.tensor([[[0.5, 1.0]], [[math.exp(-1), 1.0]]])
    # max(4 (1 + ln 2), 10) = 10 and max(6 * 2, 2) = 12
    torch.testing.assert_close(attention.layer_scores(union, coverage), torch.tensor([[10.0], [12.0]]))


def test_spearman_against_hand_worked_values():
    one = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert attention.spearman(one, one * 5 - 3).item() == pytest.approx(1)
    assert attention.spearman(one, -one).item() == pytest.approx(-1)
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6
    assert attention.spearman(one, torch.tensor([2.0, 1.0, 9.0, 7.0])).item() == pytest.approx(0.6)
    # Ties share their mean rank: 1.5 1.5 3.5 3.5 with 1 2 3 4 gives 4 / sqrt(4 * 5).
    tied = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert attention.spearman(one, tied).item() == pytest.approx(4 / math.sqrt(20))
    assert attention.spearman(one, torch.zeros(4)).isnan()
    both = attention.spearman(torch.stack((one, one), 1), torch.stack((one, -one), 1))
    torch.testing.assert_close(both, torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_probe_rows():
    assert attention.probe_rows(32, 1) == [16]
    assert attention.probe_rows(32, 5) == [0, 8, 16, 23, 31]  # those of BitSieve
    assert attention.probe_rows(8, 5) == [0, 2, 4, 5, 7]


def test_intervals_are_of_contexts_and_not_of_blocks():
    # Context 7 has four blocks of 1, context 3 one of 0: means of contexts are 1 and 0.
    blocks = attention.Blocks(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])[:, None], torch.tensor([7, 7, 7, 7, 3]))
    assert blocks.interval() == (0.0, 1.0)
    one = attention.Blocks(torch.full((3, 2), 0.25), torch.tensor([1, 2, 3]))
    assert one.interval() == (0.25, 0.25)


# ----------------------------------------------------------------------------------------------------------------------
# What is seen of a forward


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_a_probe_sees_what_a_plain_window_shows(variant):
    loaded = _loaded(variant)
    model, config = loaded.model, loaded.config
    size, shift = config.block_size, config.token_shift
    lengths = (64, 96)
    prompts = _prompts(lengths)
    state = prefill(model, prompts)
    forced = ForcedBlocks(model, state)
    is_open = torch.zeros(2, size, dtype=torch.bool)
    is_open[0, 1:], is_open[1, 5:12] = True, True
    rows = rows_of(is_open, shift)
    tokens = torch.full((2, size), config.mask_id)
    look = Look((16,), (1, 16))
    layers = {layer: layer for layer in range(config.num_layers)}
    probe = attention._Probe(look, rows, True, {}, model)
    with torch.no_grad():
        hidden = forced.hidden(tokens, layers=layers, method=probe)
        plain_hidden = forced.hidden(tokens)
    torch.testing.assert_close(hidden, plain_hidden)
    seen = probe.seen.stack()
    for request, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        whole = [*prompt, *tokens[request].tolist()]
        window = PlainWindow(model, len(whole))
        mask = block_causal_mask(len(whole), size)[None]
        with torch.no_grad():
            logits = window.forward(whole, list(range(len(whole))), lambda layer, mask=mask: mask)
        torch.testing.assert_close(model.logits(hidden[request]), logits[length:], atol=2e-4, rtol=1e-3)
        where = [length + i - shift for i in is_open[request].nonzero().flatten().tolist()]
        for layer, shares in enumerate(window.shares):  # [Hkv, G, rows, T]
            everything = shares[:, :, length:].flatten(1, 2)  # [Hkv, R, T]
            inside = everything[..., :length]
            middle = shares[:, :, length + size // 2].mean(1)
            probes = shares[:, :, [length + r for r in attention.probe_rows(size, 5)]].flatten(1, 2).mean(1)
            expected = {
                "mage_open": shares[:, :, where].flatten(1, 2).mean(1),
                "mage_max": everything.amax(1),
                "mage_prefix": (inside / inside.sum(-1, keepdim=True)).mean(1),
                "probe1": middle,
                "probe5": probes,
            }
            end = len(whole)
            torch.testing.assert_close(seen.mass[layer, request][:, :end], everything.mean(1), atol=1e-5, rtol=1e-3)
            assert not seen.mass[layer, request][:, end:].any()
            for name, value in expected.items():
                score = seen.scores[name, 1][layer, request]
                torch.testing.assert_close(score[:, : value.shape[1]], value, atol=1e-5, rtol=1e-3)
                assert not score[:, value.shape[1] :].any(), name
            by_unit = everything.unflatten(-1, (-1, 16)).sum(-1).amax(1)
            score = seen.scores["mage_max", 16][layer, request]
            torch.testing.assert_close(score[:, : by_unit.shape[1]], by_unit, atol=1e-5, rtol=1e-3)
            # Votes: every row's own 16 tokens of the prefix.
            best = inside.sort(dim=-1, descending=True, stable=True).indices[..., :16]  # [Hkv, R, 16]
            votes = torch.zeros(inside.shape[0], length, dtype=torch.int32)
            votes.scatter_add_(1, best.flatten(1), torch.ones_like(best.flatten(1), dtype=torch.int32))
            found, union, coverage = (part[layer, request] for part in seen.v1[16])
            assert (found[:, :length] != votes).float().mean() < 0.02  # a tie may fall otherwise
            assert (union - (votes > 0).sum(1)).abs().max() <= 1
            covered = torch.where((votes > 0)[:, None], inside, 0.0).sum(-1).mean(1)
            torch.testing.assert_close(coverage, covered, atol=5e-3, rtol=0)
    forced.close()


def test_queries_are_turned_back():
    loaded = _loaded("llama_shift")
    model, config = loaded.model, loaded.config
    size, half = config.block_size, config.head_dim // 2
    state = prefill(model, _prompts((48,)))
    forced = ForcedBlocks(model, state)
    rows = torch.zeros(1, size, dtype=torch.bool)
    rows[0, [2, 9]] = True
    probe = attention._Probe(Look((16,), (1,), ("mage",)), rows, True, {}, model)
    raw = []
    hook = model.layers[1].self_attn.q_proj.register_forward_hook(lambda *call: raw.append(call[2]))
    with torch.no_grad():
        tokens = torch.full((1, size), config.mask_id)
        forced.hidden(tokens, layers={i: i for i in range(config.num_layers)}, method=probe)
    hook.remove()
    seen = probe.seen.stack()
    q = raw[0][0].view(size, config.num_heads, config.head_dim)  # no norm of q in this family
    torch.testing.assert_close(seen.unrotated[1, 0], q[[2, 9]].mean(0), atol=1e-4, rtol=1e-4)
    turned = []
    for row in (2, 9):
        angle = (48 + row) * rotary_frequencies(config.head_dim, config.rope_theta, q.device)
        first, second = q[row, :, :half], q[row, :, half:]
        real, imaginary = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        turned.append(torch.cat((real, imaginary), -1))
    torch.testing.assert_close(seen.query[1, 0], (turned[0] + turned[1]) / 2, atol=1e-4, rtol=1e-4)
    forced.close()


# ----------------------------------------------------------------------------------------------------------------------
# Trajectories and whole studies


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift", "fast_dllm_v2"])
def test_trajectories_are_those_of_the_loop(variant):
    loaded = _loaded(variant)
    model, size, shift = loaded.model, loaded.config.block_size, loaded.config.token_shift
    prompts = _prompts((3 * size, 3 * size + 5))
    config = DenoiseConfig(max_new_tokens=2 * size, sampler=SAMPLER, ignore_eos=True)
    state = prefill(model, prompts, config)
    blocks = attention.trajectories(model, state, config)
    results = generate(model, state, config)
    assert len(blocks) == 3  # the second prompt's tail takes a part of the first block
    for request, result in enumerate(results):
        tail = len(prompts[request]) % size
        written = torch.cat([block.tokens[request] for block in blocks if block.forwards[0][2][request]])
        assert written[tail : tail + 2 * size].tolist() == result.tokens
        forwards = sum(bool(live[request]) for block in blocks for _, _, live in block.forwards)
        assert forwards == result.stats.num_forwards - result.stats.forwards["commit"]
    first = blocks[0]
    _, is_open, _ = first.forwards[0]
    assert is_open.sum(1).tolist() == [size - shift, size - 5]
    for (tokens, is_open, live), (_, later, still) in zip(first.forwards, first.forwards[1:], strict=False):
        assert (tokens[is_open] == loaded.config.mask_id).all() and not (later & ~is_open).any()
        decided = (is_open.sum(1) - later.sum(1))[live & still]
        assert (decided >= 1).all() and (decided <= 4).all()
    assert first.finished.tolist() == [True, True]
    assert not blocks[-1].finished[0]  # it has ended


@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
@pytest.mark.parametrize("g", [1, 16])
def test_recall_is_that_of_the_comparison_of_methods(variant, g):
    """The first block, against another implementation: masses of the loop's own forwards, units summed by the op."""
    loaded = _loaded(variant)
    prompts = _prompts((96, 128))
    base = DenoiseConfig(max_new_tokens=loaded.config.block_size, sampler=SAMPLER, ignore_eos=True)
    state = prefill(loaded.model, prompts, base)
    masses = comparison.exact_masses(loaded.model, state, base, g)
    lens = torch.tensor(state.prefix_lens, dtype=torch.int32)
    expected = comparison.recall(masses, lens, SelectionConfig(k=32, g=g))
    tally = attention.study(loaded, prompts, Look((32,), (g,), ("mage", "oracle")), 1, SAMPLER, ignore_eos=True)
    forwards = len(masses) - 1
    heads = loaded.config.num_kv_heads
    along = tally.along["recall", "mage", 32, g]
    assert along.weights[:forwards].tolist() == [2] * forwards
    torch.testing.assert_close(along.totals[:forwards] * heads, expected.shared.sum(1) / 3, atol=1e-3, rtol=0)
    oracle = tally.blocks["recall", "oracle", 32, g].values
    assert oracle.shape == (2, 3, heads) and (oracle == 1).all()
    assert (tally.blocks["kept", "oracle", 32, g].values == 1).all()
    assert (tally.blocks["kept", "mage", 32, g].values <= 1 + 1e-5).all()


def test_a_study_of_several_blocks():
    loaded = _loaded("sdar_b16")
    look = Look((16, 32), (1, 16))
    tally = attention.study(loaded, _prompts((96, 130, 128)), look, 3, SAMPLER, ignore_eos=True)
    rows = attention.rows(tally, look, task="prose", tokens=128, control="none", forwards=4)
    assert json.loads(json.dumps(rows)) == rows
    by = {(row["method"], row["K"], row["g"]): row for row in rows if row["study"] == "recall"}
    assert len(by) == 2 * 2 * len(attention.LISTS) - 2  # v1 has units of one token
    for (name, k, g), row in by.items():
        assert row["n"] == 3 and len(row["x"]) == 4 == len(row["recall_by_forward"])
        assert row["x"] == sorted(row["x"]) and row["x"][-1] == 1 and row["x"][0] > 0
        assert row["blocks"] == (10 if name != "carry" else 7)  # the last block of 130 + 48 tokens has 2 wanted ones
        assert row["recall_p5"] <= row["score"] <= by["oracle", k, g]["score"] == 1
        assert row["ci_low"] <= row["score"] <= row["ci_high"]
        assert row["recall_worst_layer"] <= row["score"] + 1e-4 and row["kept_worst_layer"] <= row["kept"] + 1e-4
        if name != "carry":  # which attends the block before, too
            assert row["kept_prefix"] <= row["kept"] + 1e-4 <= 1 + 2e-4
            assert row["kept_mass"] <= row["own_mass"] + 1e-4
        if name == "random":
            assert row["score"] == pytest.approx(row["chance"], abs=0.12)
    assert by["mage", 16, 1]["score"] > by["random", 16, 1]["score"] + 0.2
    assert len(by["mage", 16, 1]["recall_by_layer"]) == 3
    assert by["tidal", 16, 1]["recall_by_forward"] != by["mage", 16, 1]["recall_by_forward"]
    alignment = {row["method"]: row for row in rows if row["study"] == "alignment"}
    for row in alignment.values():
        assert -1 <= row["other_text"] <= 1 and -1 <= row["next_block"] <= 1 and len(row["next_block_by_layer"]) == 3
        assert row["score"] == pytest.approx(sum(row["cosine_by_layer"]) / 3, abs=1e-3)
    budgets = [row for row in rows if row["study"] == "budget"]
    assert [row.get("K", row.get("p")) for row in budgets] == [16, 32, 0.9, 0.95]
    for row in budgets:
        assert row["x"][0] == 0 and len(row["by_forward_layer"]) == 5 == len(row["spearman"]) + 1
        assert len(row["by_forward_layer"][0]) == 3
    assert budgets[3]["by_forward_layer"][0][0] >= budgets[2]["by_forward_layer"][0][0]
    assert attention.table(rows)[0].startswith("prose, 128 tokens, g = 1, control none, 3")


def test_lists_of_the_block_before_are_carried():
    loaded = _loaded("sdar_b16")
    prompts = _prompts((96,))
    tally = attention.study(loaded, prompts, Look((32,), (1,), ("mage", "carry")), 2, SAMPLER, ignore_eos=True)
    assert tally.blocks["recall", "mage", 32, 1].values.shape[0] == 2
    assert tally.blocks["recall", "carry", 32, 1].values.shape[0] == 1
    config = DenoiseConfig(max_new_tokens=32, sampler=SAMPLER, ignore_eos=True)
    state = prefill(loaded.model, prompts, config)
    blocks = attention.trajectories(loaded.model, state, config)
    # The same with a cache that holds the first block already.
    longer = [prompts[0] + blocks[0].tokens[0].tolist()]
    masses = [
        comparison.exact_masses(loaded.model, prefill(loaded.model, ids, config), config, 1)
        for ids in (prompts, longer)
    ]
    first = torch.zeros(3, 1, 1, 112, dtype=torch.bool)
    top = masses[0][0][..., :96].sort(dim=-1, descending=True, stable=True).indices[..., :32]
    first.scatter_(-1, top, True)
    first[..., 96:] = True  # what was committed since
    expected = []
    for mass in masses[1][1:]:
        own = mass[..., :112].sort(dim=-1, descending=True, stable=True).indices[..., :32]
        expected.append(first.gather(-1, own).double().mean())
    found = tally.along["recall", "carry", 32, 1].means()[: len(expected)]
    torch.testing.assert_close(found, torch.stack(expected), atol=0.011, rtol=0)  # one of 96 units by rounding


def test_forced_trajectories_uncover_the_text():
    tokens = torch.arange(64).view(2, 32)
    options = dict(block_size=16, tokens_per_step=4, mask_id=99, token_shift=True)
    one, two = attention.forced_trajectories(tokens, seeds=[5, 6], **options)
    assert one.tokens.tolist() == tokens[:, :16].tolist() and two.finished.all()
    assert len(one.forwards) == 4
    counts = [is_open.sum(1).tolist() for _, is_open, _ in one.forwards]
    assert counts == [[15, 15], [11, 11], [7, 7], [3, 3]]
    for block, at in ((one, 0), (two, 16)):
        before = None
        for seen, is_open, live in block.forwards:
            assert live.all() and (seen[is_open] == 99).all() and not is_open[:, 0].any()
            assert torch.equal(seen[~is_open], tokens[:, at : at + 16][~is_open])
            assert before is None or not (is_open & ~before).any()
            before = is_open
    assert not torch.equal(one.forwards[1][1][0], one.forwards[1][1][1])
    (again, _) = attention.forced_trajectories(tokens[:1], seeds=[5], **options)
    assert torch.equal(again.forwards[2][1][0], one.forwards[2][1][0])


@pytest.mark.parametrize("two_way", [False, True])
def test_a_study_of_a_texts_own_blocks(two_way):
    """Against the masses of plain windows."""
    loaded = _loaded("llama_shift")
    model, size = loaded.model, loaded.config.block_size
    texts = _prompts((112, 112))
    look = Look((16,), (1,), ("mage", "carry"))
    tally = attention.study(loaded, texts, look, 2, SAMPLER, forced=True, two_way=two_way)
    assert tally.blocks["recall", "mage", 16, 1].values.shape == (4, 3, 2)
    expected = torch.zeros(4, dtype=torch.float64)
    for number, text in enumerate(texts):
        options = dict(block_size=size, tokens_per_step=4, mask_id=96, token_shift=True, seeds=[number])
        blocks = attention.forced_trajectories(torch.tensor([text[-2 * size :]]), **options)
        for at, block in enumerate(blocks):
            start = 80 + at * size
            lists = []
            for seen in [*(forward[0] for forward in block.forwards), block.tokens]:
                whole = text[:start] + seen[0].tolist()
                window = PlainWindow(model, len(whole))
                mask = block_causal_mask(len(whole), 1 << 20 if two_way else size)[None]
                with torch.no_grad():
                    window.forward(whole, list(range(len(whole))), lambda layer, mask=mask: mask)
                mass = torch.stack([share[:, :, start:].mean((1, 2)) for share in window.shares])
                lists.append(mass[..., :start].sort(dim=-1, descending=True, stable=True).indices[..., :16])
            for later, own in enumerate(lists[1:]):
                shared = (lists[0][..., :, None] == own[..., None, :]).any(-1).double().mean()
                expected[later] += shared
    found = tally.along["recall", "mage", 16, 1]
    assert found.weights.tolist() == [4] * 4
    torch.testing.assert_close(found.totals, expected, atol=0.05, rtol=0)  # of 384 units a few may tie
    with pytest.raises(
        ValueError, match=r"prompts must be of one length, a multiple of 16, with forced, got \[100, 112\]"
    ):
        attention.study(loaded, _prompts((112, 100)), look, 2, SAMPLER, forced=True)


def test_shuffled_weights_have_the_same_entries():
    model = _loaded("llama_shift").model
    other = attention.shuffled(model)
    assert other.lm_head.weight is other.embed_tokens.weight
    changed = 0
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.flatten().sort().values, two.flatten().sort().values, atol=0, rtol=0)
        changed += not torch.equal(one, two)
        assert torch.equal(one, two) == (one.dim() == 1), name
    assert changed and torch.equal(attention.shuffled(model).norm.weight, other.norm.weight)


@pytest.mark.parametrize("cut", [None, Cut((0, 2), 5e5, 1024)], ids=["whole", "cut"])
def test_the_control_before_adaptation_keeps_the_adapters_layers(monkeypatch, tmp_path, cut):
    encode = lambda text, add_special_tokens: [ord(c) % 90 + 1 for c in text]  # noqa: E731
    tokenizer = SimpleNamespace(encode=encode, chat=lambda messages: encode(messages[0]["content"], False))
    whole = tiny_model(tiny_config("llama_shift", num_layers=3), seed=1)
    cuts = []

    def load_base(path=None, block_size=32, cut=None):
        cuts.append(cut)
        kept = range(3) if cut is None else cut.layers
        model = Transformer(whole.config if cut is None else cut.of(whole.config))
        names = {f"layers.{layer}.": f"layers.{i}." for i, layer in enumerate(kept)}
        state = {}
        for name, value in whole.state_dict().items():
            top = ".".join(name.split(".", 2)[:2]) + "."
            if not name.startswith("layers.") or top in names:
                state[name.replace(top, names.get(top, top))] = value.clone()
        model.load_state_dict(state)
        return model.config, model.eval().requires_grad_(False), tokenizer

    monkeypatch.setattr(builtin, "load_base", load_base)
    monkeypatch.setattr(attention, "load_base", load_base)
    monkeypatch.setattr(needles, "_worker", {})
    monkeypatch.setattr(attention, "_control", {})
    _, model, _ = load_base(cut=cut)
    wrapped = add_adapter(model, 2)
    for each in wrapped.values():
        torch.nn.init.normal_(each.b)
    path = tmp_path / "tiny.safetensors"
    save_adapter(path, adapter_tensors(wrapped, torch.ones(model.config.hidden_size)), builtin.BASE_NAME, cut=cut)
    threads = torch.get_num_threads()
    runner = needles.Runner(adapter=str(path))
    assert torch.get_num_threads() == threads
    look, layers = Look((16,), (1,), ("mage",)), 3 if cut is None else 2
    scores = {}
    for control in ("none", "base"):
        rows = list(attention.suite(runner, 1, look, ["prose_forced"], [128], 1, control=control))[-1]
        row = next(row for row in rows if row["study"] == "recall")
        assert row["control"] == control and len(row["recall_by_layer"]) == layers
        scores[control] = row["recall_by_layer"]
    assert scores["none"] != scores["base"] and cuts[-1] == cut
    base, adapted = attention._control["base"], needles.worker()[0]
    assert base.config == adapted.config
    for name, value in load_base(cut=cut)[1].state_dict().items():
        assert torch.equal(base.model.state_dict()[name], value)
    assert not torch.equal(base.model.layers[0].mlp.up_proj.weight, adapted.model.layers[0].mlp.up_proj.weight)
    monkeypatch.setattr(attention, "_control", {})
    needles._worker["cut"] = Cut((0,), 5e5, 1024)
    with pytest.raises(ValueError, match="suite: the base before adaptation must be ModelConfig"):
        list(attention.suite(runner, 1, look, ["prose_forced"], [128], 1, control="base"))


def test_a_suite_joins_its_batches(monkeypatch):
    loaded = _loaded("llama_shift")
    prompts = _prompts((96, 112, 96, 100))
    encode = lambda text, add_special_tokens: [ord(c) % 90 + 1 for c in text]  # noqa: E731
    maker = SimpleNamespace(
        case=lambda seed, tokens, asked, distractors: (None, prompts[seed]),
        sentences=None,
        tokenizer=SimpleNamespace(encode=encode),
    )
    monkeypatch.setattr(needles, "_worker", {"loaded": loaded, "maker": maker})
    monkeypatch.setattr(attention, "_control", {})
    runner = object.__new__(needles.Runner)
    lines = []
    runner.first, runner.jobs, runner.batch, runner.progress, runner._pool = 0, 1, 2, lines.append, None
    look = Look((16,), (1,), ("mage", "random"))
    steps = list(attention.suite(runner, 3, look, ["prose", "needle"], [128], 1))
    assert [steps[i][-1]["n"] for i in range(4)] == [2, 3, 2, 3]
    rows = steps[-1]
    assert [row["task"] for row in rows if row["study"] == "recall"] == ["prose"] * 2 + ["needle"] * 2
    assert lines[0].startswith("prose, 128 tokens: 2/3 contexts, mage K=16 g=1 recall ")
    alone = attention.study(loaded, prompts[:3], look, 1, comparison.STATIC)
    told = dict(task="needle", tokens=128, control="none", forwards=4)
    whole = attention.rows(alone, look, **told)
    got = next(row for row in rows if row["task"] == "needle" and row["method"] == "mage")
    assert got["score"] == pytest.approx(whole[0]["score"], abs=2e-3)
    shuffled = list(attention.suite(runner, 2, look, ["prose"], [128], 1, control="shuffled"))[-1]
    assert {row["control"] for row in shuffled} == {"shuffled"}
    forced = list(attention.suite(runner, 2, look, ["prose_forced"], [128], 1))[-1]
    assert {row["task"] for row in forced} == {"prose_forced"} and forced[0]["prefix_tokens"] == 128
    seen = list(attention.suite(runner, 2, Look((16,), (1, 32)), ["prose_forced"], [128], 1, control="two_way"))[-1]
    methods = {row["method"] for row in seen if row["study"] == "recall"}
    assert methods == set(attention.LISTS) - {"quest", "carry"} and {row["control"] for row in seen} == {"two_way"}
    for arguments, message in (
        (dict(tasks_wanted=["lines?"]), r"tasks_wanted must be of prose, prose_forced, .*, got 'lines\?'"),
        (dict(control="none?"), r"control must be of none, base, shuffled, two_way, got 'none\?'"),
        (dict(control="two_way"), "tasks_wanted must be prose_forced with two_way, got prose, four_keys"),
        (dict(look=Look((16,), (1,), ("x",))), "look.methods must be of mage, .*, got 'x'"),
        (dict(look=Look((16,), (32,))), r"look.ks must hold a multiple of one of gs = \[32\], got \[16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            list(attention.suite(runner, 1, **{"look": look, **arguments}))
    with pytest.raises(ValueError, match=r"look\.ks must be below every prefix, the shortest of which has 96 tokens"):
        attention.study(loaded, prompts, Look((96,), (1,)), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["sdar_b16", "llama_shift"])
def test_a_study_on_cuda(variant):
    shapes = {"sdar_b16": dict(num_heads=5, num_kv_heads=1), "llama_shift": dict(num_heads=9, num_kv_heads=3)}
    config = tiny_config(variant, hidden_size=128, head_dim=64, **shapes[variant])
    loaded = LoadedModel(config, tiny_model(config, seed=1, dtype=torch.bfloat16).cuda(), None)
    look = Look((16, 32), (1, 16))
    tally = attention.study(loaded, _prompts((160, 210, 200)), look, 2, SAMPLER, ignore_eos=True)
    assert all(not value.values.is_cuda for value in tally.blocks.values())
    rows = attention.rows(tally, look, task="prose", tokens=200, control="none", forwards=4)
    by = {(row["method"], row["K"], row["g"]): row for row in rows if row["study"] == "recall"}
    assert len(by) == 2 * 2 * len(attention.LISTS) - 2
    for (name, k, g), row in by.items():
        assert 0 <= row["score"] <= 1 and row["x"][-1] == 1
        assert by["oracle", k, g]["score"] == by["oracle", k, g]["kept"] == 1
        if name != "carry":
            assert row["kept_mass"] <= row["own_mass"] + 1e-4 <= 1 + 2e-4
        assert by["mage", k, g]["kept_mass"] > by["random", k, g]["kept_mass"]
    for row in rows:
        if row["study"] == "alignment":
            assert all(-1.001 <= value <= 1.001 for value in row["cosine_by_layer"])
    both = attention.study(loaded, _prompts((192, 192)), Look((16,), (1,)), 2, SAMPLER, forced=True, two_way=True)
    means = {name: both.blocks["recall", name, 16, 1].values.mean() for name in ("mage", "random", "oracle")}
    assert means["random"] < means["mage"] <= means["oracle"] == 1


def test_rows_of_earlier_weights_come_first(monkeypatch, capsys):
    asked, written = [], []

    def start(args):
        asked.append(args.adapter)
        runner = SimpleNamespace(close=lambda: None, adapter=args.adapter)
        return runner, lambda name, rows, complete=False: written.append((name, [*rows], complete))

    def suite(runner, n, *_):
        row = {"study": "alignment", "task": "prose", "tokens": 640, "method": "rotated", "adapter": runner.adapter}
        yield [row | {"score": 0.5, "n": 1}]
        yield [row | {"score": 0.75, "n": n}]

    monkeypatch.setattr(cli, "_eval_start", start)
    monkeypatch.setattr(cli, "_check_prompts", lambda args, spare: None)
    monkeypatch.setattr(cli, "_check_stages", lambda stages, adapter: None)
    monkeypatch.setattr(attention, "suite", suite)
    assert cli.main(["eval", "recall", "--n", "2", "--stages", "d/one.safetensors", "d/two.safetensors"]) == 0
    assert asked == ["d/one.safetensors", "d/two.safetensors", None]
    assert [complete for _, _, complete in written] == [False, False, True]
    name, rows, _ = written[-1]
    assert name == "eval/recall" and [row["score"] for row in rows] == [0.75] * 3
    assert [(row.get("weights"), row["adapter"]) for row in rows] == [
        ("one", "d/one.safetensors"),
        ("two", "d/two.safetensors"),
        (None, None),
    ]
    assert [row["n"] for row in written[0][1]] == [2, 2, 1]
    assert "alignment, prose, 640 tokens" in capsys.readouterr().out


def test_a_stage_under_two_names_is_refused(tmp_path, capsys):
    names = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    names[0].write_bytes(builtin.adapter_path(None).read_bytes())
    names[1].symlink_to(names[0])
    assert cli.main(["eval", "recall", "--stages", *map(str, names)]) == 2
    assert f"got '{names[1]}', that of {names[0]}" in capsys.readouterr().err


def test_a_k_beyond_a_prompt_that_came_out_shorter_is_ks_own(monkeypatch, capsys):
    def suite(*arguments):
        raise ValueError("study: look.ks must be below every prefix")
        yield

    runner = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(cli, "_eval_start", lambda args: (runner, lambda *_, **__: None))
    monkeypatch.setattr(attention, "suite", suite)
    assert cli.main(["eval", "recall"]) == 2
    assert capsys.readouterr().err == "mage: error: eval: k must be below every prefix\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "7", "--g", "16"], "eval: k must hold a multiple of one of gs = [16], got [7]"),
        (["--tokens", "100"], "tokens must be in [512, 8032]"),
        (["--blocks", "0"], "blocks must be in [1, 32], got 0"),
        (["--tokens-per-step", "40"], "tokens_per_step must be in [1, 32], got 40"),
        (["--n", "0"], "n must be at least 1, got 0"),
        (["--stages", "a/x.safetensors", "b/x.safetensors"], "stages must be files of different names, got a/x"),
        (["--control", "two_way"], "tasks must be prose_forced with the control two_way, got prose four_keys"),
        (["--stages", "x.safetensors", "--control", "base"], "control must be none with stages, got base"),
        (["--k", f"1{'0' * 22}"], "eval: k must be below every length of the prompts, 2048, got 1000"),
        (["--stages", "none"], "models in the box: smollm2-135m-block, smollm2-cut16-block"),
        (["--stages", ""], "stages must be adapters of the layers of smollm2-135m-block, got ''"),
        (
            ["--stages", "smollm2-cut16-block"],
            "stages must be adapters of the layers of smollm2-135m-block, got 'smollm2-cut16-block': load_adapter: cut",
        ),
        (["--stages", "smollm2-135m-block"], "got 'smollm2-135m-block', that of smollm2-135m-block"),
        (
            ["--adapter", "smollm2-cut16-block", "--stages", "none.safetensors"],
            "stages must be adapters of the layers of smollm2-cut16-block, got 'none.safetensors'",
        ),
    ],
)
def test_mistakes_on_the_command_line_name_the_argument(arguments, message, capsys):
    assert cli.main(["eval", "recall", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mage: error: ") and error.count("\n") == 1 and message in error
