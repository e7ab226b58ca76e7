"""The denoising loop on CUDA: bfloat16 over the kernels against dense float32 torch and against the CPU backend.

bfloat16 rounds, so tokens are held against logits. The truth of a forward is the same context through dense float32
attention, in the sparse forwards of mode mage with the loop's own lists as masks; how far bfloat16 may be from it is
what dense bfloat16 torch is. A token that the loop chose may then be below the best one by twice that, never by more,
and its logits may err twice as much. This is checked for every forward of a generation, in the context which the loop
itself had made. Masses are held against those of the dense forward likewise, and lists are, bit for bit, what the CPU
backend selects of the same masses.

Run: pytest tests/python/test_denoise_cuda.py
"""

import contextlib
import copy
import dataclasses
import functools
import random

import pytest
import torch

from mage_ext import carried_lists, denoise, models, ops, sampling
from mage_ext import selection as selections
from mage_ext.cache import PAGE_SIZES, PagedCache
from mage_ext.denoise import DenoiseConfig, DenoiseState, generate, prefill
from mage_ext.evaluation import needles
from mage_ext.models import builtin
from mage_ext.sampling import SAMPLERS, SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig, random_selection, recency_selection
from mage_ext.testing.tiny import VARIANTS, tiny_config, tiny_model
from mage_ext.token_candidates import Candidates, select_tokens

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Two head dims and groups of 1, 2, 3 and 5 query heads.
SHAPES = {
    "fast_dllm_v2": dict(head_dim=64, num_heads=6, num_kv_heads=2),
    "sdar": dict(head_dim=128, num_heads=2, num_kv_heads=2),
    "sdar_b16": dict(head_dim=64, num_heads=5, num_kv_heads=1),
    "llama": dict(head_dim=128, num_heads=4, num_kv_heads=2),
    "llama_shift": dict(head_dim=64, num_heads=9, num_kv_heads=3),
}
LENGTHS = (1, 7, 31, 32, 33, 64, 70, 129, 200)


@functools.cache
def _model(variant, num_layers=3, dtype=torch.bfloat16, **overrides):
    """A tiny model on the GPU whose weights are bfloat16 numbers."""
    config = tiny_config(variant, num_layers=num_layers, hidden_size=128, **{**SHAPES[variant], **overrides})
    return tiny_model(config, seed=1, dtype=torch.bfloat16).to(device=CUDA, dtype=dtype)


def _exact_of(model, device=CUDA):
    """The same weights in float32."""
    return copy.deepcopy(model).to(device=device, dtype=torch.float32)


def _prompts(config, lengths=LENGTHS, seed=0):
    """Random prompts, of which every fifth token is the mask id; the first is not."""
    prompts = []
    for length in lengths:
        rng = random.Random(1000 * seed + length)
        prompt = [config.mask_id if rng.random() < 0.2 else rng.randrange(config.vocab_size) for _ in range(length)]
        prompt[0] = rng.randrange(config.mask_id)
        prompts.append(prompt)
    return prompts


# --------------------------------------------------------------------------- the truth of a forward


@dataclasses.dataclass
class Lists:
    """What the rows of one request's block attended in the selecting layers of a sparse forward.

    Fields:
        start: first position of the block. layers: selecting layer -> its index in the next two. g: tokens per unit.
        indices: [L, Hkv, Kmax], int32. counts: [L, Hkv], int32. tail_start: [], int32.
    """

    start: int
    layers: dict[int, int]
    g: int
    indices: torch.Tensor
    counts: torch.Tensor
    tail_start: torch.Tensor

    def seen(self, length):
        """[L, Hkv, length], bool."""
        position = torch.arange(length, device=self.indices.device)
        named = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        units = length // self.g + 1
        listed = torch.zeros(*self.counts.shape, units + 1, dtype=torch.bool, device=self.indices.device)
        listed.scatter_(-1, torch.where(named, self.indices, units).long(), True)
        return listed[..., position // self.g] | (position >= self.tail_start)


@dataclasses.dataclass
class Emitted:
    """Masses that a forward emitted for one request.

    Fields:
        start: first position of the block. layers: as in Lists. rows: positions of the rows that counted.
        mass: [L, Hkv, n], float32.
    """

    start: int
    layers: dict[int, int]
    rows: list[int]
    mass: torch.Tensor


class Dense:
    """Forwards of whole contexts with a block-causal mask and torch's attention, in the model's dtype."""

    def __init__(self, model):
        self.model = model

    def __call__(self, contexts, lists=None, emitted=None, selection=None):
        """Logits [A, T, V], float32, of contexts of token ids, padded at their ends to the longest.

        lists: per context a Lists, or None where everything was attended exactly. With `emitted`, a list of Emitted,
        and the SelectionConfig of the masses, `masses` holds afterwards the masses of each, [L, Hkv, n], computed in
        float32 from the q and k of the model's dtype.
        """
        size = self.model.config.block_size
        length = max(map(len, contexts))
        device = self.model.embed_tokens.weight.device
        tokens = torch.tensor([context + [0] * (length - len(context)) for context in contexts], device=device)
        positions = torch.arange(length, device=device)
        causal = positions[:, None] // size >= positions // size
        sparse = {a: (one, one.seen(length)) for a, one in enumerate(lists or []) if one is not None}
        self.masses = [torch.zeros_like(one.mass) for one in emitted or []]

        def mask_of(layer, group):
            if not any(layer in one.layers for one, _ in sparse.values()):
                return causal
            mask = causal.repeat(len(contexts), self.model.config.num_heads, 1, 1)
            for a, (one, seen) in sparse.items():
                if layer in one.layers:
                    earlier = positions[:, None] < one.start  # rows that are not the block's
                    mask[a] &= earlier | seen[one.layers[layer]].repeat_interleave(group, 0)[:, None]
            return mask

        def attend(layer, q, k, v):
            group = q.shape[2] // k.shape[2]
            for a, one in enumerate(emitted or []):
                if layer in one.layers:
                    scores = torch.einsum("qhd,khd->hqk", q[a].float(), k[a].float().repeat_interleave(group, 1))
                    scores = (scores * q.shape[-1] ** -0.5).masked_fill(~causal, -torch.inf)[:, one.rows]
                    self.masses[a][one.layers[layer]] = _mass_of(scores, group, one, selection)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_of(layer, group), enable_gqa=True
            )
            return out.transpose(1, 2)

        with torch.no_grad():
            return self.model(tokens, positions.expand(len(contexts), -1), attend).float()


def _mass_of(scores, group, emitted, config):
    """Masses [Hkv, n] of scores [H, rows, T]."""
    units = emitted.mass.shape[-1]
    shares = torch.softmax(scores, -1)
    if config.norm == "prefix":
        shares = shares[..., : emitted.start] / shares[..., : emitted.start].sum(-1, keepdim=True)
    shares = torch.nn.functional.pad(shares, (0, units * config.g - shares.shape[-1]))  # cuts where it is longer
    shares = shares.unflatten(-1, (units, config.g)).sum(-1)
    shares = shares.unflatten(0, (-1, group)).flatten(1, 2)  # [Hkv, G * rows, n]
    return shares.amax(1) if config.score == "max" else shares.mean(1)


@dataclasses.dataclass
class Forward:
    """What one forward of a block did for one request.

    Fields:
        request, start: which, and the position of the block's first token. before: the block's tokens that it saw.
        chosen: position -> token that it decided. logits: position -> [V], float32, the loop's own.
        lists: where it was sparse. emitted: where it emitted masses that the request selects by.
    """

    request: int
    start: int
    before: list[int]
    chosen: dict[int, int]
    logits: dict[int, torch.Tensor]
    lists: Lists | None = None
    emitted: Emitted | None = None


def _watched(model, prompts, config, **arguments):
    """Of `generate`: results and the list of Forwards of each step in which something was decided."""
    steps, drawn, ways = [], [], []
    draw_tokens, step_of = sampling.draw_tokens, denoise._Run._step
    config = dataclasses.replace(config, cuda_graphs=False)  # a replay calls no Python
    layers = config.selecting_layers(model.config.num_layers)

    def watch(logits, **options):
        if options.get("positions") is not None:  # of a block, not of a commit
            drawn[:] = [logits.to(torch.float32, copy=True), options["seeds"].tolist(), options["positions"].tolist()]
        return draw_tokens(logits, **options)

    def watch_step(self, slots, plan, index, step, narrow):
        ways[:] = ["sparse" if way == "carry" or (way == "select" and step > 0) else way for way in plan]
        return step_of(self, slots, plan, index, step, narrow)

    def callback(info):
        if info.kind == "commit":
            return
        rows = {key: drawn[0][i] for i, key in enumerate(zip(drawn[1], drawn[2], strict=True))}
        before = torch.where(info.decided, model.config.mask_id, info.tokens).tolist()
        open = (info.open | info.decided).tolist()
        decided, tokens = info.decided.tolist(), info.tokens.tolist()
        forwards = []
        for row, (request, start) in enumerate(zip(info.requests, info.starts, strict=True)):
            chosen = {start + i: tokens[row][i] for i, was in enumerate(decided[row]) if was}
            if not chosen:
                continue
            logits = {position: rows[request, position] for position in chosen}
            forward = Forward(request, start, before[row], chosen, logits)
            if ways[row] == "sparse" and layers:
                s = info.selection
                forward.lists = Lists(start, layers, s.g, s.indices[:, row], s.counts[:, row], s.tail_start[row])
            if ways[row] == "select" and info.mass is not None:
                shift = int(model.config.token_shift)
                counted = [start + i - shift for i, is_open in enumerate(open[row]) if is_open]
                if config.selection.score_rows == "all":
                    counted = list(range(start, start + len(open[row])))
                forward.emitted = Emitted(start, layers, counted, info.mass[:, row])
            forwards.append(forward)
        if forwards:
            steps.append(forwards)

    sampling.draw_tokens, denoise._Run._step = watch, watch_step
    count = len(prompts.prompts if isinstance(prompts, DenoiseState) else prompts)
    try:
        results = generate(model, prompts, config, callback=callback, seeds=list(range(count)), **arguments)
    finally:
        sampling.draw_tokens, denoise._Run._step = draw_tokens, step_of
    return results, steps


def _check_every_forward(model, exact, prompts, results, steps):
    """Every choice of a generation and its logits, by the rule of the module's docstring. Returns the largest error of
    dense bfloat16."""
    shift, mask_id = int(model.config.token_shift), model.config.mask_id
    errors, theirs = [], []
    for forwards in steps:
        contexts = []
        for f in forwards:
            written = prompts[f.request] + results[f.request].tokens
            contexts.append(written[: f.start] + f.before)
        lists = [f.lists for f in forwards]
        truth, rounded = Dense(exact)(contexts, lists), Dense(model)(contexts, lists)
        for logits in (truth, rounded):
            logits[..., mask_id] = -1e30
        for row, f in enumerate(forwards):
            rows = [position - shift for position in f.chosen]
            wanted, near = truth[row, rows], rounded[row, rows]
            ours = torch.stack(list(f.logits.values()))
            ours[:, mask_id] = -1e30
            # Of all rows of the block: the few that are chosen are too small a sample of an error.
            block = [position - shift for position in range(f.start, f.start + len(f.before)) if position >= shift]
            bound = (rounded[row, block] - truth[row, block]).abs().max()
            tokens = torch.tensor(list(f.chosen.values()), device=CUDA)
            gaps = wanted.amax(-1) - wanted.gather(1, tokens[:, None])[:, 0]
            assert (gaps <= 2 * bound).all(), (f.request, f.start, gaps.max().item(), bound.item())
            errors.append((ours - wanted).flatten())
            theirs.append((near - wanted).flatten())
            if shift and f.start >= len(prompts[f.request]):
                # The block's first token, of the last commit or the prefill.
                known = truth[row, f.start - 1]
                bound = (rounded[row, f.start - 1] - known).abs().max()
                assert known.max() - known[f.before[0]] <= 2 * bound
    errors, theirs = torch.cat(errors), torch.cat(theirs)
    assert errors.abs().max() <= 2 * theirs.abs().max()
    assert errors.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()
    return theirs.abs().max().item()


# --------------------------------------------------------------------------- exact mode


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_forward_of_a_ragged_batch(variant, sampler):
    model = _model(variant)
    prompts = _prompts(model.config)
    config = DenoiseConfig(
        max_new_tokens=50,
        sampler=SamplerConfig(sampler, tokens_per_step=2, threshold=0.6, entropy_bound=1.0),
        prefill_chunk=96,
    )
    results, steps = _watched(model, prompts, config)
    assert all(len(r.tokens) == 50 and r.finish == "length" and len(set(r.tokens)) >= 8 for r in results)
    assert not any(model.config.mask_id in r.tokens for r in results)
    _check_every_forward(model, _exact_of(model), prompts, results, steps)
    again = generate(model, prompts, config)
    assert [r.tokens for r in again] == [r.tokens for r in results]
    assert [r.stats.forwards for r in again] == [r.stats.forwards for r in results]


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "llama"])
def test_float16(variant):
    model = _model(variant, dtype=torch.float16)
    prompts = _prompts(model.config)
    results, steps = _watched(model, prompts, DenoiseConfig(max_new_tokens=40, sampler=SamplerConfig(threshold=0.6)))
    _check_every_forward(model, _exact_of(model), prompts, results, steps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens_as_the_cpu_loop_up_to_the_first_tie(variant):
    """Tokens of the CPU backend in float32. Where a request parts from them, both loops had the same context, and the
    two tokens were closer in float32 than twice the error of bfloat16 there."""
    model = _model(variant)
    exact, on_cpu = _exact_of(model), _exact_of(model, "cpu")
    prompts = _prompts(model.config, seed=2)
    config = DenoiseConfig(max_new_tokens=50, sampler=SamplerConfig("sequential", tokens_per_step=2), prefill_chunk=64)
    results = generate(model, prompts, config)
    expected, steps = _watched(on_cpu, prompts, config)
    for result, twin in zip(results, expected, strict=True):
        assert result.finish == twin.finish and result.stats.forwards == twin.stats.forwards
        _check_first_difference(model, exact, prompts[result.request], result, twin, steps)


def _check_first_difference(model, exact, prompt, result, twin, steps):
    """That two runs with a sequential sampler and the same lists part at a tie. steps: of the twin."""
    different = [i for i, (a, b) in enumerate(zip(result.tokens, twin.tokens, strict=False)) if a != b]
    if not different:
        assert len(result.tokens) == len(twin.tokens)
        return
    position = len(prompt) + different[0]
    shift, size = int(model.config.token_shift), model.config.block_size
    found = [f for forwards in steps for f in forwards if f.request == twin.request and position in f.chosen]
    lists = None
    if found:
        context = (prompt + twin.tokens)[: found[0].start] + found[0].before
        if found[0].lists is not None:
            moved = {name: getattr(found[0].lists, name).to(CUDA) for name in ("indices", "counts", "tail_start")}
            lists = [dataclasses.replace(found[0].lists, **moved)]
    else:  # a block's first token under token shift: predicted by the clean blocks before it
        assert shift and position % size == 0
        context = (prompt + twin.tokens)[:position]
    truth, rounded = (Dense(m)([context], lists)[0, position - shift] for m in (exact, model))
    one, other = result.tokens[different[0]], twin.tokens[different[0]]
    gap = (truth[other] - truth[one]).abs()
    assert gap <= 2 * (rounded - truth).abs().max(), (twin.request, position, gap.item())


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar"])
def test_eos_ends_a_request(variant):
    """EOS ids that the model is known to emit, early, late and in the middle; others of the batch go on."""
    model = _model(variant)
    prompts = _prompts(model.config, (5, 16, 32, 48, 64))
    config = DenoiseConfig(max_new_tokens=37, sampler=SamplerConfig("sequential"))
    free = [result.tokens for result in generate(model, prompts, config)]
    eos_ids = (free[0][0], free[1][20], free[3][-1])
    stopping = copy.copy(model)
    stopping.config = dataclasses.replace(model.config, eos_ids=eos_ids)
    prompts[4][-1] = eos_ids[0]  # EOS of a prompt ends nothing
    results, steps = _watched(stopping, prompts, config)
    for result in results:
        assert not set(result.tokens[:-1]) & set(eos_ids)
        assert (result.finish == "eos") == (result.tokens[-1] in eos_ids)
        assert len(result.tokens) == 37 or result.finish == "eos"
    assert results[0].tokens == free[0][:1] and results[4].tokens
    assert any(1 < len(result.tokens) < 37 for result in results)
    _check_every_forward(model, _exact_of(model), prompts, results, steps)
    unstopped = generate(stopping, prompts, dataclasses.replace(config, ignore_eos=True))
    assert all(len(result.tokens) == 37 and result.finish == "length" for result in unstopped)


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "llama"])
def test_page_sizes_change_nothing(variant):
    model = _model(variant)
    prompts = _prompts(model.config)
    config = DenoiseConfig(max_new_tokens=40, sampler=SamplerConfig(threshold=0.6), prefill_chunk=64)
    expected = generate(model, prompts, config)
    for page_size in PAGE_SIZES:
        cache = PagedCache.for_model(model, num_pages=len(prompts) * -(-256 // page_size), page_size=page_size)
        results = generate(model, prompts, config, cache=cache)
        assert [r.tokens for r in results] == [r.tokens for r in expected], page_size
        assert cache.num_free == cache.num_pages


@pytest.mark.parametrize("chunk", [32, 64, 200, 1000])
def test_prefill_chunks(chunk):
    """Chunks of less and more rows than one launch takes: the K/V of float32, as exact as dense bfloat16 has it."""
    model = _model("fast_dllm_v2")
    prompts = _prompts(model.config, (40, 64, 200, 333))
    config = DenoiseConfig(max_new_tokens=33, prefill_chunk=chunk)
    results, steps = _watched(model, prompts, config)
    _check_every_forward(model, _exact_of(model), prompts, results, steps)


@pytest.mark.parametrize("mode", ["exact", "mage"])
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_sub_block_cache(variant, mode):
    """Forwards of one sub-block whose other K/V stay: the CPU loop's tokens up to the first tie."""
    model = _model(variant)
    prompts = _prompts(model.config, seed=4)
    sampler = SamplerConfig("sequential", tokens_per_step=2)
    config = DenoiseConfig(
        mode=mode,
        max_new_tokens=50,
        sampler=sampler,
        sub_block_size=8,
        sub_block_cache=True,
        selection=SelectionConfig(k=32, g=16),
        dense_layers=(0,),
    )
    plain = dataclasses.replace(config, sub_block_cache=False)
    error = _check_every_forward(model, _exact_of(model), prompts, *_watched(model, prompts, plain))
    with _selections() as chosen:
        results, steps = _watched(model, prompts, config)
    replay = Replay(chosen, "cpu") if mode == "mage" else None
    expected, twin_steps = _watched(
        _exact_of(model, "cpu"), prompts, dataclasses.replace(config, select_override=replay)
    )
    logits, twin_logits = (
        {(f.request, p): f.logits[p].cpu() for forwards in run for f in forwards for p in f.chosen}
        for run in (steps, twin_steps)
    )
    for result, twin in zip(results, expected, strict=True):
        pairs = zip(result.tokens, twin.tokens, strict=True)
        position = next((len(prompts[result.request]) + i for i, (a, b) in enumerate(pairs) if a != b), None)
        for key in twin_logits:
            if key[0] == result.request and (position is None or key[1] < position):
                assert (logits[key] - twin_logits[key]).abs().max() <= 2 * error, key
        if (result.request, position) in twin_logits:
            truth = twin_logits[result.request, position]
            index = position - len(prompts[result.request])
            assert (truth[twin.tokens[index]] - truth[result.tokens[index]]).abs() <= 2 * error


def test_draws_at_a_temperature_are_those_of_the_keys():
    """The same seeds give the same tokens, others do not; forks of one prefill agree with a run of their own."""
    model = _model("llama_shift")
    prompts = _prompts(model.config)
    sampler = SamplerConfig("low_confidence_static", tokens_per_step=3, temperature=0.8, top_k=50, top_p=0.95)
    config = DenoiseConfig(max_new_tokens=40, sampler=sampler)
    one = [r.tokens for r in generate(model, prompts, config)]
    assert [r.tokens for r in generate(model, prompts, config)] == one
    assert [r.tokens for r in generate(model, prompts, config, seeds=[77] * len(prompts))] != one
    state = prefill(model, prompts, config)
    assert [r.tokens for r in generate(model, state.fork(), config)] == one
    assert [r.tokens for r in generate(model, state, config)] == one


# --------------------------------------------------------------------------- what the host waits for


@pytest.fixture
def no_waiting(monkeypatch):
    """Within a block, from its first tensor to its last flag, a wait for the device raises."""
    block_of, finish_of = denoise._Run._block, denoise._Run._finish_block
    seen = []

    def watched_block(self, index):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return block_of(self, index)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def watched_finish(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")
        seen.append(arguments)
        return finish_of(self, *arguments)

    monkeypatch.setattr(denoise._Run, "_block", watched_block)
    monkeypatch.setattr(denoise._Run, "_finish_block", watched_finish)
    yield seen
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar"])
def test_no_wait_within_a_block(variant, sampler, temperature, no_waiting):
    model = _model(variant)
    top = dict(top_k=20, top_p=0.9) if temperature else {}
    config = DenoiseConfig(
        max_new_tokens=40,
        sampler=SamplerConfig(sampler, tokens_per_step=2, temperature=temperature, **top),
        sub_block_cache=variant == "fast_dllm_v2",
    )
    generate(model, _prompts(model.config), config)
    assert len(no_waiting) >= 2


def test_the_watch_sees_a_wait(no_waiting):
    with pytest.raises(RuntimeError, match="synchroniz"):
        generate(_model("sdar"), [[1, 2, 3]], callback=lambda info: info.tokens.tolist())


def test_the_flag_lags_one_step():
    """A step is queued before the flags of the step before it are read: one extra forward per block, no more, and none
    where the number of forwards is known beforehand."""
    model = _model("llama")
    prompts = _prompts(model.config, (8, 16))
    for sampler, steps, queued in (
        (SamplerConfig("low_confidence_dynamic", threshold=0.0), 1, 2),
        (SamplerConfig("sequential", tokens_per_step=4), 2, 2),
    ):
        config = DenoiseConfig(max_new_tokens=16, sampler=sampler)
        seen = []
        results = generate(
            model, prompts, config, callback=lambda info, seen=seen: seen.append((info.index, info.kind, info.step))
        )
        block = [("exact", step) for step in range(queued)]
        assert seen == [(0, *each) for each in block] + [(0, "commit", -1)] + [(1, *each) for each in block]
        assert [r.stats.forwards["exact"] for r in results] == [2 * steps] * 2


# --------------------------------------------------------------------------- mode mage

# Rule, granularity, score and norm; models of two head dims and groups of 1, 2, 3 and 5.
MAGE = {
    "fixed_g64": ("fast_dllm_v2", SelectionConfig(k=64, g=64), (0,)),
    "fixed_g32": ("llama_shift", SelectionConfig(k=64, g=32), (0, 2)),
    "fixed_g16": ("sdar_b16", SelectionConfig(k=48, g=16, sinks=4, recents=8, score_rows="open"), ()),
    "fixed_g1": ("llama", SelectionConfig(k=24, g=1, sinks=2, recents=4), (1,)),
    "fixed_max": ("sdar_b16", SelectionConfig(k=32, g=16, score="max", norm="prefix"), (0,)),
    "layer_g32": ("fast_dllm_v2", SelectionConfig(rule="layer", k=64, k_min=32, g=32), (0,)),
    "layer_g16": ("sdar", SelectionConfig(rule="layer", k=32, g=16, score="max"), ()),
    "layer_g1": ("llama_shift", SelectionConfig(rule="layer", k=24, g=1, score_rows="open"), (0,)),
    "mass_g16": ("llama", SelectionConfig(rule="mass", p=0.6, g=16, k_min=16), (0,)),
    "mass_g1": ("fast_dllm_v2", SelectionConfig(rule="mass", p=0.8, g=1, capacity=60, score_rows="open"), (0,)),
    "joint_g64": ("sdar", SelectionConfig(rule="joint", k=64, g=64), (1,)),
    "joint_g1": ("fast_dllm_v2", SelectionConfig(rule="joint", k=40, g=1, sinks=4), (0,)),
}
REFRESH = {
    "block": {},
    "blocks": {"refresh": "blocks", "refresh_blocks": 2},
    "kept_mass": {"refresh": "kept_mass", "refresh_bound": 0.75},
}


def _mage(name, refresh="block", **fields):
    """Model and config of a case of MAGE."""
    variant, selection, dense_layers = MAGE[name]
    fields = {"max_new_tokens": 50, "sampler": SamplerConfig(threshold=0.6), **REFRESH[refresh], **fields}
    return _model(variant), DenoiseConfig(mode="mage", selection=selection, dense_layers=dense_layers, **fields)


@dataclasses.dataclass
class Chosen:
    """One call of `selection.select`: its arguments and what it returned."""

    mass: torch.Tensor
    prefix_lens: torch.Tensor
    config: SelectionConfig
    votes: tuple[torch.Tensor, ...] | None
    result: BlockSelection


@contextlib.contextmanager
def _selections():
    """Within it, every call of `selection.select` is kept; nothing is read, so nothing waits."""
    select, chosen = selections.select, []

    def watched(mass, prefix_lens, config, *, votes=None):
        chosen.append(Chosen(mass, prefix_lens, config, votes, select(mass, prefix_lens, config, votes=votes)))
        return chosen[-1].result

    selections.select = watched
    try:
        yield chosen
    finally:
        selections.select = select


class Replay:
    """A select_override: the selections of another run in their order, supplied from outside."""

    def __init__(self, chosen, device):
        self._results = [one.result.to(device) for one in chosen]
        self._next = 0

    def __call__(self, mass, prefix_lens, config, *, votes=None):
        self._next += 1
        return self._results[self._next - 1]


def _check_selections(chosen):
    """Every selection is the CPU backend's of the same masses and votes, bit for bit."""
    for one in chosen:
        votes = None if one.votes is None else tuple(tensor.cpu() for tensor in one.votes)
        expected = selections.select(one.mass.cpu(), one.prefix_lens.cpu(), one.config, votes=votes)
        assert one.result.indices.is_cuda == (CUDA.type == "cuda")
        for name in ("indices", "counts", "tail_start", "overflow"):
            assert torch.equal(getattr(one.result, name).cpu(), getattr(expected, name)), name
        assert torch.equal(one.result.kept_mass.cpu().view(torch.int32), expected.kept_mass.view(torch.int32))


def _check_masses(model, exact, prompts, results, steps, selection):
    """Every mass that a request selected by, by the rule of the module's docstring."""
    errors, theirs = [], []
    for forwards in steps:
        forwards = [f for f in forwards if f.emitted is not None]
        if not forwards:
            continue
        contexts = [(prompts[f.request] + results[f.request].tokens)[: f.start] + f.before for f in forwards]
        emitted = [f.emitted for f in forwards]
        truth, rounded = Dense(exact), Dense(model)
        for dense in (truth, rounded):
            dense(contexts, emitted=emitted, selection=selection)
        for one, wanted, near in zip(emitted, truth.masses, rounded.masses, strict=True):
            below = one.start // selection.g  # the units that can be listed
            errors.append((one.mass - wanted)[..., :below].flatten())
            theirs.append((near - wanted)[..., :below].flatten())
    errors, theirs = torch.cat(errors), torch.cat(theirs)
    assert errors.abs().max() <= 2 * theirs.abs().max()
    assert errors.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("name", MAGE)
def test_every_forward_of_mage(name, refresh):
    """Masses, lists, and what the sparse forwards make of them."""
    model, config = _mage(name, refresh)
    prompts = _prompts(model.config)
    with _selections() as chosen:
        results, steps = _watched(model, prompts, config)
    exact = _exact_of(model)
    assert all(len(r.tokens) == 50 and len(set(r.tokens)) >= 8 for r in results)
    forwards = {kind: sum(r.stats.forwards[kind] for r in results) for kind in ("exact", "select", "sparse")}
    assert forwards["sparse"] > forwards["select"] > 0
    assert any(f.lists is not None for step in steps for f in step) and len(chosen) > 0
    if config.selection.score == "mean" and config.selection.norm == "context":
        assert all(0 < kept < 1 + 1e-5 for r in results for kept in r.stats.kept_mass)
    _check_selections(chosen)
    _check_masses(model, exact, prompts, results, steps, config.selection)
    _check_every_forward(model, exact, prompts, results, steps)


@pytest.mark.parametrize("refresh", ["block", "blocks"])
@pytest.mark.parametrize("name", MAGE)
def test_mage_gives_the_tokens_of_the_cpu_loop_up_to_the_first_tie(name, refresh):
    """Tokens of the CPU backend in float32, which gets the lists of the GPU: a tie of units would part the two else.
    The same lists supplied to the GPU give its tokens again."""
    model, config = _mage(name, refresh, sampler=SamplerConfig("sequential", tokens_per_step=2), prefill_chunk=64)
    exact, on_cpu = _exact_of(model), _exact_of(model, "cpu")
    prompts = _prompts(model.config, seed=2)
    with _selections() as chosen:
        results = generate(model, prompts, config)
    again = generate(model, prompts, dataclasses.replace(config, select_override=Replay(chosen, CUDA)))
    assert [r.tokens for r in again] == [r.tokens for r in results]
    replayed = dataclasses.replace(config, select_override=Replay(chosen, "cpu"))
    expected, steps = _watched(on_cpu, prompts, replayed)
    for result, twin in zip(results, expected, strict=True):
        assert result.finish == twin.finish and result.stats.forwards == twin.stats.forwards
        assert result.stats.kept_mass == pytest.approx(twin.stats.kept_mass, rel=1e-5)
        assert result.stats.kv_share == twin.stats.kv_share
        _check_first_difference(model, exact, prompts[result.request], result, twin, steps)


@pytest.mark.parametrize("name", ["fixed_g64", "fixed_g32", "fixed_g16", "fixed_g1"])
def test_lists_of_the_cpu_loop_up_to_ties(name):
    """Of the first blocks, whose contexts are the same: a unit that one loop lists and the other does not is no further
    from the least mass listed than the masses of the two are apart."""
    model, config = _mage(name, max_new_tokens=1, cuda_graphs=False)  # whose masses are as long as the prompts need
    config = dataclasses.replace(config, selection=dataclasses.replace(config.selection, sinks=0, recents=0))
    prompts = _prompts(model.config, (70, 129, 200, 333), seed=5)
    runs = []
    for each in (model, _exact_of(model, "cpu")):
        with _selections() as chosen:
            generate(each, prompts, config)
        runs.append(chosen[0])
    ours, theirs = (run.mass.cpu() for run in runs)
    units = torch.arange(ours.shape[-1])
    listed = [(run.result.indices.cpu()[..., None] == units).any(-2) for run in runs]  # [L, B, Hkv, n]
    assert listed[0].any()
    error = (ours - theirs).abs().amax(-1, keepdim=True)
    least = torch.where(listed[1], theirs, torch.inf).amin(-1, keepdim=True)
    assert ((listed[0] == listed[1]) | ((theirs - least).abs() <= 2 * error)).all()


@pytest.mark.parametrize("name", MAGE)
def test_mage_with_k_past_the_prefix_is_exact(name):
    """Blocks whose prefix is not longer than K run the exact forwards, launch for launch."""
    model, config = _mage(name)
    budget = {"k_min": 256, "capacity": None} if config.selection.rule == "mass" else {"k": 256}
    config = dataclasses.replace(config, selection=dataclasses.replace(config.selection, **budget))
    prompts = _prompts(model.config)
    results = generate(model, prompts, config)
    expected = generate(model, prompts, dataclasses.replace(config, mode="exact"))
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert all(r.stats.kv_share == 1 and r.stats.forwards["sparse"] == 0 for r in results)


OVERRIDES = {"recency": recency_selection, "random": functools.partial(random_selection, seed=7)}


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("name", ["fixed_g32", "fixed_g1", "layer_g16"])
def test_supplied_selections(name, override):
    """Lists from outside are attended as they are."""
    model, config = _mage(name)
    config = dataclasses.replace(config, select_override=OVERRIDES[override])
    prompts = _prompts(model.config)
    results, steps = _watched(model, prompts, config)
    assert any(f.lists is not None for step in steps for f in step)
    _check_every_forward(model, _exact_of(model), prompts, results, steps)


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("name", MAGE)
def test_no_wait_within_a_block_of_mage(name, refresh, no_waiting):
    model, config = _mage(name, refresh, sub_block_cache=name == "fixed_g64")
    for override in (None, *OVERRIDES.values()):
        results = generate(model, _prompts(model.config), dataclasses.replace(config, select_override=override))
        assert len(no_waiting) >= 2 and sum(r.stats.forwards["sparse"] for r in results) > 0
        no_waiting.clear()


CANDIDATES = {
    "fixed": ("llama", SelectionConfig(k=24, g=1, sinks=2, recents=4, candidates=64), (1,)),
    "joint": ("fast_dllm_v2", SelectionConfig(rule="joint", k=40, g=1, sinks=4, score="max", candidates=96), (0,)),
    "prefix": ("sdar_b16", SelectionConfig(k=16, g=1, norm="prefix", score_rows="open", candidates=48), ()),
}


def _candidates(name, refresh="block", **fields):
    """Model and config of a case of CANDIDATES."""
    variant, selection, dense_layers = CANDIDATES[name]
    fields = {"max_new_tokens": 50, "sampler": SamplerConfig(threshold=0.6), **REFRESH[refresh], **fields}
    return _model(variant), DenoiseConfig(mode="mage", selection=selection, dense_layers=dense_layers, **fields)


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("name", CANDIDATES)
def test_every_forward_of_candidates(name, refresh, monkeypatch):
    """Lists and proofs are the CPU backend's of the same masses, and what the sparse forwards make of them."""
    chosen = []

    def watched(candidates, prefix_lens, config):
        chosen.append((candidates, prefix_lens, select_tokens(candidates, prefix_lens, config)))
        return chosen[-1][-1]

    monkeypatch.setattr(carried_lists, "select_tokens", watched)
    model, config = _candidates(name, refresh)
    prompts = _prompts(model.config)
    results, steps = _watched(model, prompts, config)
    assert sum(r.stats.forwards["sparse"] for r in results) > sum(r.stats.forwards["select"] for r in results) > 0
    assert all(len(r.stats.proven) == r.stats.forwards["select"] for r in results) and chosen
    for candidates, prefix_lens, (selection, proven) in chosen:
        on_cpu = {field.name: getattr(candidates, field.name).cpu() for field in dataclasses.fields(Candidates)}
        expected, proven_too = select_tokens(Candidates(**on_cpu), prefix_lens.cpu(), config.selection)
        for part in ("indices", "counts", "tail_start", "overflow"):
            assert torch.equal(getattr(selection, part).cpu(), getattr(expected, part)), part
        torch.testing.assert_close(selection.kept_mass.cpu(), expected.kept_mass)
        assert torch.equal(proven.cpu(), proven_too)
    _check_every_forward(model, _exact_of(model), prompts, results, steps)


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("name", CANDIDATES)
def test_no_wait_within_a_block_of_candidates(name, refresh, no_waiting):
    """With graphs and without: the same tokens, and as many proofs; of the whole prefix all is proven."""
    model, config = _candidates(name, refresh)
    prompts = _prompts(model.config)
    results = generate(model, prompts, config)
    assert len(no_waiting) >= 2 and sum(r.stats.forwards["sparse"] for r in results) > 0
    plain = generate(model, prompts, dataclasses.replace(config, cuda_graphs=False, strict=True))
    again = generate(model, prompts, dataclasses.replace(config, strict=True))
    assert [r.tokens for r in plain] == [r.tokens for r in again]
    assert [r.stats.proven for r in plain] == [r.stats.proven for r in again]
    wide = dataclasses.replace(config.selection, candidates=512)
    results = generate(model, prompts, dataclasses.replace(config, selection=wide))
    shares = [share for r in results for share in r.stats.proven]
    assert shares and min(shares) == 1


def test_masses_come_from_the_kernel(monkeypatch):
    calls = []
    kernel = ops.block_attention_mass

    def watched(q, *arguments, **options):
        calls.append((q.device.type, options["g"]))
        return kernel(q, *arguments, **options)

    monkeypatch.setattr(ops, "block_attention_mass", watched)
    model = _model("llama_shift")

    class Enough(Exception):
        pass

    def stop(*arguments, **options):
        raise Enough

    config = DenoiseConfig(mode="mage", selection=SelectionConfig(k=64, g=32), dense_layers=(1,), select_override=stop)
    with pytest.raises(Enough):
        generate(model, _prompts(model.config, (150, 90)), config)
    assert calls == [(CUDA.type, 32)] * 2


def test_a_selection_that_fails_gives_the_pages_back():
    model, config = _mage("fixed_g32")
    cache = PagedCache.for_model(model, num_pages=8)

    def fail(*arguments, **options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(
            model,
            _prompts(model.config, (128,)),
            dataclasses.replace(config, select_override=fail),
            cache=cache,
        )
    assert cache.num_free == 8


# --------------------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def shipped():
    """The model in the box: in float32 on the CPU, in bfloat16 on the GPU."""
    try:
        return models.load(builtin.NAME), models.load(builtin.NAME, device="cuda")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_defaults_of_the_device(shipped):
    cpu, cuda = (loaded.model.embed_tokens.weight for loaded in shipped)
    assert (cpu.dtype, cuda.dtype, cuda.device.type) == (torch.float32, torch.bfloat16, "cuda")


def test_needles_are_found_as_on_the_cpu(shipped):
    """50 texts with four hidden facts each: the same facts, and the CPU's tokens up to the first tie."""
    cpu, cuda = shipped
    maker = needles.CaseMaker(cpu)
    static = SamplerConfig("low_confidence_static", tokens_per_step=4)
    sequential = SamplerConfig("sequential", tokens_per_step=4)
    configs = [DenoiseConfig(max_new_tokens=48, sampler=sampler) for sampler in (static, sequential)]
    exact = _exact_of(cpu.model)
    found, same, total = 0, 0, 0
    for begin in range(0, 50, 10):
        cases = [maker.case(seed, 640, asked=4) for seed in range(begin, begin + 10)]
        prompts = [ids for _, ids in cases]
        states = [prefill(loaded.model, prompts, configs[0]) for loaded in shipped]
        for config in configs:
            on_cuda = generate(cuda.model, states[1].fork(), config, tokenizer=cuda.tokenizer)
            if config is configs[0]:
                on_cpu, steps = generate(cpu.model, states[0].fork(), config, tokenizer=cpu.tokenizer), None
            else:
                on_cpu, steps = _watched(cpu.model, states[0].fork(), config, tokenizer=cpu.tokenizer)
            for (case, prompt), result, twin in zip(cases, on_cuda, on_cpu, strict=True):
                assert case.found(result.text) == case.found(twin.text), (result.text, twin.text)
                found += sum(case.found(result.text))
                same += result.tokens == twin.tokens
                total += 1
                if steps is not None:
                    _check_first_difference(cuda.model, exact, prompt, result, twin, steps)
        for state in states:
            state.release()
    print(f"{found} of {4 * total} facts, {same} of {total} answers token for token")
    assert found > 4 * total * 0.9


@pytest.mark.parametrize(("g", "asked"), [(32, 1), (1, 4)])
def test_answers_of_mage_are_those_of_the_cpu(shipped, g, asked):
    """100 texts, K = 128: one hidden fact and units of 32 (four units, which cannot hold four facts), four facts and
    units of 1. Each loop selects for itself, and every answer has the same values as the CPU's. Where an answer differs
    in a token, the CPU that is given the GPU's lists either writes the GPU's answer or parts from it at a tie."""
    cpu, cuda = shipped
    maker = needles.CaseMaker(cpu)
    exact = _exact_of(cpu.model)
    # One block, or two where a prompt ends inside the first.
    config = needles.sparse_method("mage", SamplerConfig("sequential", tokens_per_step=4), 128, g).config
    config = dataclasses.replace(config, max_new_tokens=cuda.config.block_size)
    found, same, listed = 0, 0, 0.0
    for begin in range(0, 100, 20):
        cases = [maker.case(seed, 640, asked=asked) for seed in range(begin, begin + 20)]
        prompts = [ids for _, ids in cases]
        states = [prefill(loaded.model, prompts, config) for loaded in shipped]
        with _selections() as chosen:
            on_cuda = generate(cuda.model, states[1].fork(), config, tokenizer=cuda.tokenizer)
        with _selections() as theirs:
            on_cpu = generate(cpu.model, states[0].fork(), config, tokenizer=cpu.tokenizer)
        assert len(chosen) == len(theirs) > 0
        _check_selections(chosen)
        for (case, _), result, twin in zip(cases, on_cuda, on_cpu, strict=True):
            assert case.found(result.text) == case.found(twin.text), (result.text, twin.text)
            found += sum(case.found(result.text))
        parted = [r.request for r, twin in zip(on_cuda, on_cpu, strict=True) if r.tokens != twin.tokens]
        if parted:
            replayed = dataclasses.replace(config, select_override=Replay(chosen, "cpu"))
            again, steps = _watched(cpu.model, states[0].fork(), replayed, tokenizer=cpu.tokenizer)
            for i in parted:
                _check_first_difference(cuda.model, exact, prompts[i], on_cuda[i], again[i], steps)
        same += len(cases) - len(parted)
        listed += _share_of_lists(chosen[0].result, theirs[0].result) / 5
        for state in states:
            state.release()
    print(f"g={g}: {found} of {100 * asked} facts, {same} of 100 answers token for token, {listed:.4f} of lists alike")
    assert found > 90 * asked  # answers that are right, not empty, are compared


def _share_of_lists(one, other):
    """Share of the units of one selection that another of the same shape lists too."""
    size = int(max(one.indices.max(), other.indices.max())) + 1
    listed = []
    for each in (one, other):
        mask = torch.zeros(*each.indices.shape[:3], size + 1, dtype=torch.bool)
        index = torch.where(each.indices >= 0, each.indices, size).cpu().long()
        listed.append(mask.scatter_(-1, index, True)[..., :size])
    return ((listed[0] & listed[1]).sum() / listed[0].sum()).item()
