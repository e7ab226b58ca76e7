"""The denoising loop on CUDA: bfloat16 over the kernels against dense float32 torch and against the CPU backend.

bfloat16 rounds, so tokens are held against logits. The truth of a forward is the same context through dense float32
attention; how far bfloat16 may be from it is what dense bfloat16 torch is. A token that the loop chose may then be
below the best one by twice that, never by more, and its logits may err twice as much. This is checked for every forward
of a generation, in the context which the loop itself had made.

Run: pytest tests/python/test_denoise_cuda.py
"""

import copy
import dataclasses
import functools
import random

import pytest
import torch

from mage_ext import denoise, models, ops, sampling
from mage_ext.cache import PAGE_SIZES, PagedCache
from mage_ext.denoise import DenoiseConfig, DenoiseState, generate, prefill
from mage_ext.evaluation import needles
from mage_ext.models import builtin
from mage_ext.sampling import SAMPLERS, SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig
from mage_ext.testing.tiny import VARIANTS, tiny_config, tiny_model

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


class Dense:
    """Forwards of whole contexts with a block-causal mask and torch's attention, in the model's dtype."""

    def __init__(self, model):
        self.model = model

    def __call__(self, contexts, shares_of=None):
        """Logits [A, T, V], float32, of contexts of token ids, padded at their ends to the longest.

        With shares_of (g, start), `masses` holds afterwards, per layer, the mean shares [A, Hkv, n] of units of g
        tokens in the rows from start on, computed in float32 from the q and k of the model's dtype.
        """
        size = self.model.config.block_size
        length = max(map(len, contexts))
        tokens = torch.tensor([context + [0] * (length - len(context)) for context in contexts], device=CUDA)
        positions = torch.arange(length, device=CUDA)
        mask = positions[:, None] // size >= positions // size
        self.masses = []

        def attend(layer, q, k, v):
            if shares_of is not None:
                g, start = shares_of
                group = q.shape[2] // k.shape[2]
                keys = k.float().repeat_interleave(group, 2)
                scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), keys)[:, :, start:] * q.shape[-1] ** -0.5
                shares = torch.softmax(scores.masked_fill(~mask[start:], -torch.inf), -1)
                shares = shares.unflatten(1, (-1, group)).mean((2, 3))
                self.masses.append(torch.nn.functional.pad(shares, (0, -length % g)).unflatten(-1, (-1, g)).sum(-1))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2)

        with torch.no_grad():
            return self.model(tokens, positions.expand(len(contexts), -1), attend).float()


@dataclasses.dataclass
class Forward:
    """What one forward of a block did for one request.

    Fields:
        request, start: which, and the position of the block's first token. before: the block's tokens that it saw.
        chosen: position -> token that it decided. logits: position -> [V], float32, the loop's own.
    """

    request: int
    start: int
    before: list[int]
    chosen: dict[int, int]
    logits: dict[int, torch.Tensor]


def _watched(model, prompts, config, **arguments):
    """Of `generate`: results and the list of Forwards of each step in which something was decided."""
    steps, drawn = [], []
    draw_tokens = sampling.draw_tokens

    def watch(logits, **options):
        if options.get("positions") is not None:  # of a block, not of a commit
            drawn[:] = [logits.float(), options["seeds"].tolist(), options["positions"].tolist()]
        return draw_tokens(logits, **options)

    def callback(info):
        if info.kind == "commit":
            return
        rows = {key: drawn[0][i] for i, key in enumerate(zip(drawn[1], drawn[2], strict=True))}
        before = torch.where(info.decided, model.config.mask_id, info.tokens).tolist()
        decided, tokens = info.decided.tolist(), info.tokens.tolist()
        forwards = []
        for row, (request, start) in enumerate(zip(info.requests, info.starts, strict=True)):
            chosen = {start + i: tokens[row][i] for i, was in enumerate(decided[row]) if was}
            if chosen:
                logits = {position: rows[request, position] for position in chosen}
                forwards.append(Forward(request, start, before[row], chosen, logits))
        if forwards:
            steps.append(forwards)

    sampling.draw_tokens = watch
    count = len(prompts.prompts if isinstance(prompts, DenoiseState) else prompts)
    try:
        results = generate(model, prompts, config, callback=callback, seeds=list(range(count)), **arguments)
    finally:
        sampling.draw_tokens = draw_tokens
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
        truth, rounded = Dense(exact)(contexts), Dense(model)(contexts)
        for logits in (truth, rounded):
            logits[..., mask_id] = -1e30
        for row, f in enumerate(forwards):
            rows = [position - shift for position in f.chosen]
            wanted, near = truth[row, rows], rounded[row, rows]
            ours = torch.stack(list(f.logits.values()))
            ours[:, mask_id] = -1e30
            bound = (near - wanted).abs().max()
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
    """That two runs with a sequential sampler part at a tie. steps: of the twin."""
    different = [i for i, (a, b) in enumerate(zip(result.tokens, twin.tokens, strict=False)) if a != b]
    if not different:
        assert len(result.tokens) == len(twin.tokens)
        return
    position = len(prompt) + different[0]
    shift, size = int(model.config.token_shift), model.config.block_size
    found = [f for forwards in steps for f in forwards if f.request == twin.request and position in f.chosen]
    if found:
        context = (prompt + twin.tokens)[: found[0].start] + found[0].before
    else:  # a block's first token under token shift: predicted by the clean blocks before it
        assert shift and position % size == 0
        context = (prompt + twin.tokens)[:position]
    truth, rounded = (Dense(m)([context])[0, position - shift] for m in (exact, model))
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


@pytest.mark.parametrize("variant", ["fast_dllm_v2", "sdar_b16"])
def test_sub_block_cache(variant):
    """Forwards of one sub-block whose other K/V stay: the CPU loop's tokens up to the first tie."""
    model = _model(variant)
    prompts = _prompts(model.config, seed=4)
    sampler = SamplerConfig("sequential", tokens_per_step=2)
    config = DenoiseConfig(max_new_tokens=50, sampler=sampler, sub_block_size=8, sub_block_cache=True)
    plain = dataclasses.replace(config, sub_block_cache=False)
    error = _check_every_forward(model, _exact_of(model), prompts, *_watched(model, prompts, plain))
    results, steps = _watched(model, prompts, config)
    expected, twin_steps = _watched(_exact_of(model, "cpu"), prompts, config)
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
    """A step is queued before the flags of the step before it are read: one extra forward per block, no more."""
    model = _model("llama")
    prompts = _prompts(model.config, (8, 16))
    config = DenoiseConfig(max_new_tokens=16, sampler=SamplerConfig("sequential", tokens_per_step=4))
    seen = []
    results = generate(model, prompts, config, callback=lambda info: seen.append((info.index, info.kind, info.step)))
    assert seen == [(0, "exact", 0), (0, "exact", 1), (0, "exact", 2), (0, "commit", -1)] + [
        (1, "exact", step) for step in range(3)
    ]
    assert [r.stats.forwards["exact"] for r in results] == [4, 4]


# --------------------------------------------------------------------------- mode mage, as far as kernels go


def _has_kernel(op):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mage::{op}", "CUDA")


@pytest.mark.parametrize("op", ["sparse_block_attention"])
def test_mage_runs_to_the_first_missing_kernel_and_names_it(op, no_waiting):
    """The exact forward emits its masses on the GPU; nothing goes on elsewhere in place of a kernel that is missing."""
    if _has_kernel(op):
        pytest.skip(f"{op} has a CUDA kernel")
    model = _model("fast_dllm_v2")
    masses = []

    def everything(mass, prefix_lens, config, *, votes=None):
        """Lists of all units below a tail."""
        masses.append(mass)
        layers, requests, heads, units = mass.shape
        number = torch.arange(units, device=mass.device, dtype=torch.int32)
        tail = prefix_lens // config.g * config.g
        listed = number < (tail // config.g)[:, None, None]
        indices = torch.where(listed, number, -1).expand(layers, requests, heads, units).contiguous()
        counts = (indices >= 0).sum(-1, dtype=torch.int32)
        kept = torch.ones(layers, requests, heads, device=mass.device)
        return BlockSelection(indices, counts, kept, tail, config.g, torch.zeros_like(kept, dtype=torch.bool))

    config = DenoiseConfig(
        mode="mage",
        max_new_tokens=40,
        sampler=SamplerConfig("sequential"),
        selection=SelectionConfig(k=32, g=16, score_rows="all"),
        dense_layers=(0,),
        select_override=everything,
    )
    (prompt,) = _prompts(model.config, (128,))
    cache = PagedCache.for_model(model, num_pages=8)
    with pytest.raises(NotImplementedError, match=f"mage::{op}'.*CUDA"):
        generate(model, [prompt], config, cache=cache)
    assert cache.num_free == 8
    (mass,) = masses  # [L, 1, Hkv, n]
    assert mass.is_cuda and mass.shape == (2, 1, 2, 10)
    context = prompt + [model.config.mask_id] * 32
    exact, rounded = Dense(_exact_of(model)), Dense(model)
    first = exact([prompt])[0, -1]
    first[model.config.mask_id] = -torch.inf
    context[128] = int(first.argmax())  # known before the block under token shift
    for dense in (exact, rounded):
        dense([context], shares_of=(16, 128))
    truth, near = (torch.stack(dense.masses[1:]) for dense in (exact, rounded))
    assert (mass - truth).abs().max() <= 2 * (near - truth).abs().max()


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
    assert calls == [("cuda", 32)] * 2


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
