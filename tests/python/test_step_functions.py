"""What a step computes around the model, against its definition, and compiled against plain.

Run: pytest tests/python/test_step_functions.py
"""

import pytest
import torch

from mage_ext import step_functions
from mage_ext.block_slots import BlockRow, BlockSlots
from mage_ext.denoise import DenoiseConfig, generate
from mage_ext.paged_forward import NOT_WRITTEN
from mage_ext.sampling import SAMPLERS, Draws, SamplerConfig, decide
from mage_ext.selection import SelectionConfig
from mage_ext.testing.tiny import tiny_config, tiny_model

gpu = pytest.mark.gpu
MASK, EOS = 0, (7, 9)
VARIANTS = {
    "whole": {},
    "narrow": {"narrow": True, "later": True},
    "later": {"later": True},
    "fused": {"fused": True},
    "both_kinds": {"both_kinds": True},
}


def _slots(places=3, size=8, sub=4, shift=False, sampler=None, compile=False, device="cpu"):
    """Slots with a block each: place 1 has a prompt's tail, the last place is empty where there are several."""
    slots = BlockSlots(
        places,
        size,
        sub,
        mask_id=MASK,
        eos_ids=EOS,
        token_shift=shift,
        sampler=sampler or SamplerConfig("low_confidence_static", tokens_per_step=2),
        compile=compile,
        device=torch.device(device),
    )
    rows = [
        BlockRow(
            request=i, start=16 * i, known=[EOS[0], 5][: i % 3], prompt_end=i % 3, last=size - 1 - i % 2, seed=40 + i
        )
        for i in range(places)
    ]
    if places > 2:
        rows[-1] = None
    table = torch.zeros(places, 4, dtype=torch.int32, device=device)
    slots.stage(rows, [i % 2 == 0 for i in range(places)], table, 16 * places + size, None)
    slots.begin()
    return slots


def _draws(slots, seed):
    """Random draws of the sub-blocks, EOS among them; confidences have ties and NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = (slots.num_places, slots.sub_block_size)
    confidence = (torch.rand(shape, generator=generator) * 4).round() / 4
    confidence[torch.rand(shape, generator=generator) < 0.1] = torch.nan
    token = torch.randint(1, 12, shape, generator=generator)
    entropy = torch.rand(shape, generator=generator)
    return Draws(*(x.to(slots.tokens.device) for x in (token, confidence, entropy)))


def _tensors(slots):
    return {name: value for name, value in vars(slots).items() if isinstance(value, torch.Tensor)}


def test_a_block_begins_with_what_is_known():
    slots = _slots()
    assert slots.tokens.tolist() == [[0] * 8, [7, *[0] * 7], [0] * 8]
    assert slots.open.tolist() == [[True] * 8, [False, *[True] * 7], [False] * 8]
    assert slots.positions[1].tolist() == list(range(16, 24)) and slots.seeds.tolist() == [40, 41, 0]
    assert slots.carried.tolist() == [True, False, False]
    # EOS of the prompt's tail ends nothing; an empty place has ended.
    assert slots.flags.tolist() == [[True, True, False], [True, False, False], [False, False, True]]
    assert slots.candidates.tolist() == [[True] * 4 + [False] * 4, [False, True, True, True] + [False] * 4, [False] * 8]
    assert torch.equal(slots.mass_rows, slots.open)
    shifted = _slots(shift=True)
    assert torch.equal(shifted.mass_rows[:, :-1], shifted.open[:, 1:]) and not shifted.mass_rows[:, -1].any()


def _after_step(slots, draws, decided):
    """The state after a step by its definition, in Python, of copies of the slots' lists."""
    tokens, open, steps = slots.tokens.tolist(), slots.open.tolist(), slots.steps.tolist()
    begins, flags = slots.sub_start.tolist(), slots.flags.tolist()
    size, sub = slots.block_size, slots.sub_block_size
    new_flags, candidates, starts = [], [], []
    for place, row in enumerate(slots.rows):
        steps[place] += flags[place][0]
        for i in range(size):
            if decided[place][i]:
                tokens[place][i], open[place][i] = int(draws.token[place, i - begins[place]]), False
        ended = flags[place][2]
        for i in range(size):
            if open[place][i]:
                break
            ended = ended or (row is not None and (i == row.last or (i >= row.prompt_end and tokens[place][i] in EOS)))
        first = next((i for i in range(size) if open[place][i]), None)
        live = not ended and first is not None
        begin = first // sub * sub if live else 0
        candidates.append([live and open[place][i] and begin <= i < begin + sub for i in range(size)])
        starts.append(begin)
        new_flags.append([live, live and first == begin, ended])
    return tokens, open, steps, candidates, starts, new_flags


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sub", [2, 4, 8])
def test_steps_follow_their_definition(name, sub):
    sampler = SamplerConfig(name, tokens_per_step=2, threshold=0.6, entropy_bound=0.5)
    for seed in range(4):
        slots = _slots(places=5, sub=sub, sampler=sampler)
        for step in range(9):
            draws = _draws(slots, 10 * seed + step)
            grid = [torch.zeros(slots.open.shape, dtype=x.dtype) for x in draws]
            for place, begin in enumerate(slots.sub_start.tolist()):
                for part, x in zip(grid, draws, strict=True):
                    part[place, begin : begin + sub] = x[place]
            expected_decided = decide(sampler, Draws(*grid), slots.candidates).tolist()
            expected = _after_step(slots, draws, expected_decided)
            decided = slots.decide(draws, slots.candidates, slots.flags[:, 0])
            assert decided.tolist() == expected_decided
            names = ("tokens", "open", "steps", "candidates", "sub_start", "flags")
            assert tuple(getattr(slots, name).tolist() for name in names) == expected
        assert not slots.flags[:, 0].any()


def test_rows_of_every_variant():
    slots = _slots()
    slots.candidates[0, 0] = slots.open[0, 0] = False  # place 0 is past the first position of its sub-block
    slots.flags[0, 1] = False
    slots.sub_start[1], slots.flags[1, 1] = 4, True  # and place 1 at that of its second
    slots.uncommitted[0] = True
    slots.previous_tokens[:] = 3
    plain = {"narrow": False, "later": False, "fused": False, "both_kinds": False, "all_rows_count": False}
    rows = {name: slots.rows_of_step(**{**plain, **variant}) for name, variant in VARIANTS.items()}
    whole = rows["whole"]
    assert whole.seq_lens.tolist() == [8, 24, 0] and whole.kv_lens is None and whole.exact_lens is None
    assert [(s.tolist(), r) for s, r in whole.writes] == [([0, 16, NOT_WRITTEN], None)]
    assert whole.drawn.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert whole.drawn_positions.tolist() == [[0, 1, 2, 3], [20, 21, 22, 23], [0, 1, 2, 3]]
    assert whole.seeds.tolist() == [[40] * 4, [41] * 4, [0] * 4]
    assert torch.equal(whole.tokens, slots.tokens) and torch.equal(whole.row_mask, slots.mass_rows)
    narrow = rows["narrow"]
    assert narrow.tokens.shape == (3, 4) and narrow.drawn is None and narrow.live.tolist() == [True, False, False]
    assert torch.equal(narrow.positions, narrow.drawn_positions) and not narrow.candidates[1:].any()
    assert [(s.tolist(), r) for s, r in narrow.writes] == [([0, NOT_WRITTEN, NOT_WRITTEN], None)]
    assert narrow.seq_lens.tolist() == [8, 0, 0]
    later = [(s.tolist(), r if r is None else r.tolist()) for s, r in rows["later"].writes]
    assert later == [([NOT_WRITTEN, 16, NOT_WRITTEN], None), ([0, NOT_WRITTEN, NOT_WRITTEN], [0, 4, 0])]
    fused = rows["fused"]
    assert fused.tokens.shape == (3, 16) and (fused.tokens[:, :8] == 3).all()
    assert fused.positions[1].tolist() == list(range(8, 24)) and fused.positions[0, :8].tolist() == [0] * 8
    assert fused.kv_lens[1].tolist() == [16] * 8 + [24] * 8 and fused.kv_lens.dtype == torch.int32
    assert [(s.tolist(), r if r is None else r.tolist()) for s, r in fused.writes] == [
        ([-8, NOT_WRITTEN, NOT_WRITTEN], None),
        ([NOT_WRITTEN, 16, NOT_WRITTEN], [8, 8, 8]),
    ]
    assert fused.drawn[1].tolist() == [16 + 12, 16 + 13, 16 + 14, 16 + 15]
    assert not fused.row_mask[:, :8].any() and torch.equal(fused.row_mask[:, 8:], slots.mass_rows)
    assert rows["both_kinds"].sparse_lens.tolist() == [8, 0, 0]
    assert rows["both_kinds"].exact_lens.tolist() == [0, 24, 0]
    every = slots.rows_of_step(**{**plain, "fused": True, "all_rows_count": True})
    assert every.row_mask.sum(1).tolist() == [8] * 3
    shifted = _slots(shift=True).rows_of_step(**plain)
    assert shifted.drawn.tolist() == [[0, 0, 1, 2], [8, 8, 9, 10], [16, 16, 17, 18]] and shifted.row_mask.any()


def _assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif one is None:
        assert other is None
    else:
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "low_confidence_static"), *(pytest.param("cuda", name, marks=gpu) for name in SAMPLERS)],
)
def test_compiled_equals_plain(device, name):
    """Bit for bit, and other numbers of places compile nothing."""
    sampler = SamplerConfig(name, tokens_per_step=2, threshold=0.5, entropy_bound=0.7)
    shift = name == "sequential"
    variants = VARIANTS if name == "low_confidence_static" else {"whole": {}}
    off = {"narrow": False, "later": False, "fused": False, "both_kinds": False, "all_rows_count": False}
    for places in (4, 1, 6):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        plain, compiled = (_slots(places, 16, 4, shift, sampler, compile, device) for compile in (False, True))
        for step in range(10):
            for variant in variants.values():
                rows = [slots.rows_of_step(**{**off, **variant}) for slots in (plain, compiled)]
                _assert_same(*rows)
            draws = _draws(plain, step)
            decided = [slots.decide(draws, slots.candidates, slots.flags[:, 0]) for slots in (plain, compiled)]
            _assert_same(*decided)
            for key, tensor in _tensors(plain).items():
                _assert_same(tensor, _tensors(compiled)[key])
        assert not plain.flags[:, 0].any()
        if places == 6:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@gpu
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_graphs_of_compiled_steps_give_the_tokens_of_plain_launches(variant):
    """The functions alone are compiled, so that nothing rounds in another way."""
    config = tiny_config(variant, num_layers=3, hidden_size=128, head_dim=64)
    model = tiny_model(config, seed=1, dtype=torch.bfloat16).to("cuda").requires_grad_(False).optimize()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in (20, 90, 131, 40)]
    for sampler in (SamplerConfig("low_confidence_static", tokens_per_step=5), SamplerConfig(threshold=0.2)):
        run = DenoiseConfig(
            mode="mage",
            max_new_tokens=50,
            dense_layers=(0,),
            sampler=sampler,
            selection=SelectionConfig(k=32, g=32),
            strict=True,
            sub_block_cache=variant == "fast_dllm_v2",
        )
        expected = [r.tokens for r in generate(model, prompts, run, max_batch=3)]
        assert not model.compiled
        model._fused.compiled = True
        assert [r.tokens for r in generate(model, prompts, run, max_batch=3)] == expected
        model._fused.compiled = False


def test_nothing_is_compiled_unasked(monkeypatch):
    """Not even of a model that was packed."""
    monkeypatch.setattr(step_functions, "_compiled", lambda *_, **__: pytest.fail("compiled"))
    model = tiny_model(tiny_config("sdar"), seed=1).requires_grad_(False)
    config = DenoiseConfig(max_new_tokens=4, mode="exact")
    tokens = generate(model, [[1, 2, 3]], config)[0].tokens
    assert generate(model.optimize(), [[1, 2, 3]], config)[0].tokens == tokens
