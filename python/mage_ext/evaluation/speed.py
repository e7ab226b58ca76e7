"""How fast a generation runs on this GPU: whole blocks through the one loop, over prefixes of random K/V.

Speed depends on lengths and budgets, not on what the tokens say, so a prefix needs no prefill and weights may be
random. Times are of CUDA events behind the forwards, so they hold everything between two of them: attention, products,
sampling, and the gaps in which the host was late.

Test: pytest tests/python/test_speed.py
"""

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass

import torch

from mage_ext._arguments import check_type, got
from mage_ext.cache import PAGE_SIZES, PagedCache
from mage_ext.denoise import DenoiseConfig, DenoiseState, StepGraphs, generate
from mage_ext.models.config import ModelConfig
from mage_ext.models.transformer import Transformer
from mage_ext.results import StepInfo

HBM_BYTES_PER_S = 3.05e12  # what an H100 SXM reads
MMA_FLOPS_PER_S = 700e12  # what it multiplies in bfloat16, on random data
MMA_ROWS = 64  # of one wgmma


def random_cache(model: Transformer, *, num_tokens: int, page_size: int = 64, seed: int = 0) -> PagedCache:
    """A cache of num_tokens tokens in all, full of standard normal K and V.

    Raises:
        ValueError, TypeError: naming the argument. OutOfPages: the device has no room.
    """
    check_type("random_cache", "num_tokens", num_tokens, int, "an integer")
    if num_tokens < 1:
        raise ValueError(f"random_cache: num_tokens must be an integer >= 1, got {num_tokens}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"random_cache: page_size must be one of {PAGE_SIZES}, got {got(page_size)}")
    cache = PagedCache.for_model(model, num_pages=-(-num_tokens // page_size), page_size=page_size)
    generator = torch.Generator(cache.device).manual_seed(seed)
    for layer in range(cache.num_layers):
        for pool in cache.layer(layer):
            pool.normal_(generator=generator)
    return cache


def random_state(model: Transformer, cache: PagedCache, *, batch: int, context: int, new_tokens: int) -> DenoiseState:
    """Requests whose prompts of `context` tokens count as committed: their K/V are what the cache's pages hold.

    Args:
        model: a Transformer. cache: pages for batch * (context + new_tokens) tokens, in whole pages per request.
        batch: requests. context: tokens of each prompt, a multiple of the model's block. new_tokens: to be written.
    Raises:
        ValueError: naming the argument. OutOfPages: the cache is too small.
    """
    check_type("random_state", "model", model, Transformer, "a Transformer")
    check_type("random_state", "cache", cache, PagedCache, "a PagedCache")
    size = model.config.block_size
    for name, value in (("batch", batch), ("context", context), ("new_tokens", new_tokens)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"random_state: {name} must be an integer >= 1, got {got(value)}")
    if context % size:
        raise ValueError(f"random_state: context must be a multiple of the block of {size}, got {context}")
    if batch > cache.num_pages:
        raise ValueError(f"random_state: batch must be at most the cache's {cache.num_pages} pages, got {batch}")
    prompt = [0] * context
    state = DenoiseState(model, [prompt] * batch, list(range(batch)), cache)
    try:
        for request in range(batch):
            state.reserve_pages(request, new_tokens)
    except RuntimeError:
        state.release()
        raise
    state.filled = [True] * batch
    if model.config.token_shift:
        state.pending = [[0] for _ in range(batch)]
    return state


@dataclass(frozen=True)
class BlockTimes:
    """Of a generation whose graphs were captured before.

    Fields:
        block_ms: from the end of one block, its commit with it, to that of the next, median over blocks.
        step_ms: by kind of forward, median; the first forward of a block holds what the host does between two blocks.
        forwards: by kind, of one block, the commit with them.
        tokens_per_s: of the whole batch. peak_bytes: device memory that was allocated at most.
    """

    block_ms: float
    step_ms: dict[str, float]
    forwards: dict[str, int]
    tokens_per_s: float
    peak_bytes: int


class _Marks:
    """A callback that marks the stream behind every forward."""

    def __init__(self):
        self.marks: list[tuple[int, str, torch.cuda.Event]] = []

    def __call__(self, info: StepInfo) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((info.index, info.kind, event))


def measure_blocks(
    model: Transformer,
    cache: PagedCache,
    config: DenoiseConfig,
    *,
    batch: int,
    context: int,
    blocks: int = 4,
    graphs: StepGraphs | None = None,
) -> BlockTimes:
    """Times blocks of `batch` requests behind `context` tokens of random K/V each.

    Args:
        model: on CUDA. cache: of random_cache. config: max_new_tokens is replaced; EOS does not end a request.
        blocks: >= 3, timed after as many that capture the graphs. graphs: to reuse.
    Raises:
        ValueError: the model is not on CUDA, or blocks < 3. As random_state.
    """
    check_type("measure_blocks", "model", model, Transformer, "a Transformer")
    check_type("measure_blocks", "cache", cache, PagedCache, "a PagedCache")
    check_type("measure_blocks", "config", config, DenoiseConfig, "a DenoiseConfig")
    if cache.device.type != "cuda":
        raise ValueError(f"measure_blocks: model and cache must be on cuda, got {cache.device}")
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 3:
        raise ValueError(f"measure_blocks: blocks must be an integer >= 3, got {got(blocks)}")
    size = model.config.block_size
    config = dataclasses.replace(config, max_new_tokens=blocks * size, ignore_eos=True)
    graphs = StepGraphs() if graphs is None else graphs
    torch.cuda.reset_peak_memory_stats(cache.device)

    def run() -> _Marks:
        marks = _Marks()
        state = random_state(model, cache, batch=batch, context=context, new_tokens=blocks * size)
        generate(model, state, config, callback=marks, graphs=graphs)
        return marks

    run()
    marks = run().marks
    torch.cuda.synchronize(cache.device)
    ends = [event for (index, _, event), (after, _, _) in itertools.pairwise(marks) if index != after]
    block_ms = statistics.median(one.elapsed_time(other) for one, other in itertools.pairwise(ends))
    times: dict[str, list[float]] = {}
    for (_, _, before), (index, kind, event) in itertools.pairwise(marks):
        if index > 0 or kind == "commit":
            times.setdefault(kind, []).append(before.elapsed_time(event))
    second = [kind for index, kind, _ in marks if index == 1]
    return BlockTimes(
        block_ms=block_ms,
        step_ms={kind: statistics.median(values) for kind, values in times.items()},
        forwards={kind: second.count(kind) for kind in dict.fromkeys(second)},
        tokens_per_s=batch * size / block_ms * 1e3,
        peak_bytes=torch.cuda.max_memory_allocated(cache.device),
    )


# --------------------------------------------------------------------------- floors


@dataclass(frozen=True)
class Product:
    """x [rows, inputs] times a weight [outputs, inputs], `count` times in a forward, in 2-byte elements."""

    name: str
    outputs: int
    inputs: int
    count: int

    def bytes(self, rows: int) -> int:
        """Of all of them: weights, inputs and outputs."""
        return 2 * self.count * (self.outputs * self.inputs + rows * (self.outputs + self.inputs))

    def flops(self, rows: int) -> int:
        """Of all of them, with rows as the tensor cores take them."""
        return 2 * self.count * math.ceil(rows / MMA_ROWS) * MMA_ROWS * self.outputs * self.inputs

    def floor_us(self, rows: int) -> float:
        return max(self.bytes(rows) / HBM_BYTES_PER_S, self.flops(rows) / MMA_FLOPS_PER_S) * 1e6


def products(config: ModelConfig) -> list[Product]:
    """Of a forward with packed weights, in the order of a layer, the head last."""
    hidden, layers, heads = config.hidden_size, config.num_layers, config.num_heads * config.head_dim
    return [
        Product("qkv", heads + 2 * config.num_kv_heads * config.head_dim, hidden, layers),
        Product("o", hidden, heads, layers),
        Product("gate_up", 2 * config.intermediate_size, hidden, layers),
        Product("down", hidden, config.intermediate_size, layers),
        Product("lm_head", config.vocab_size, hidden, 1),
    ]


def products_floor_us(config: ModelConfig, rows: int, logit_rows: int) -> float:
    """Floor of the matrix products of a forward of `rows` rows, of which logit_rows go through the head: of each
    product, the larger of its bytes (weights, inputs and outputs) at 3.05 TB/s and its flops (rows padded to 64) at 700
    TFLOP/s."""
    *layers, head = products(config)
    return sum(product.floor_us(rows) for product in layers) + (head.floor_us(logit_rows) if logit_rows else 0.0)


def attention_floor_us(config: ModelConfig, batch: int, q_len: int, tokens: float) -> float:
    """Floor of one layer's attention of `batch` requests over `tokens` K/V tokens per KV head each."""
    rows = config.num_heads // config.num_kv_heads * q_len
    padded = -(-rows // MMA_ROWS) * MMA_ROWS
    heads = batch * config.num_kv_heads
    num_bytes = 2 * config.head_dim * heads * (2 * tokens + 2 * rows)
    flops = 4 * config.head_dim * heads * padded * tokens
    return max(num_bytes / HBM_BYTES_PER_S, flops / MMA_FLOPS_PER_S) * 1e6


def block_floor_ms(
    config: ModelConfig, *, batch: int, context: int, exact: int, sparse: int, k: int = 0, dense_layers: int = 0
) -> float:
    """Floor of a block of `exact` exact forwards, `sparse` sparse ones over k tokens and the block itself, and one
    commit: every forward at the floors of its products and its attention. Logits are those of a sub-block, or of the
    block where there are none; a commit's of one row under token shift, else of none."""
    check_type("block_floor_ms", "config", config, ModelConfig, "a ModelConfig")
    counts = {
        "batch": batch,
        "context": context,
        "exact": exact,
        "sparse": sparse,
        "k": k,
        "dense_layers": dense_layers,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < (name == "batch"):
            raise ValueError(f"block_floor_ms: {name} must be an integer >= {int(name == 'batch')}, got {got(value)}")
    if dense_layers > config.num_layers:
        raise ValueError(
            f"block_floor_ms: dense_layers must be at most the {config.num_layers} there are, got {dense_layers}"
        )
    size = config.block_size
    logit_rows = batch * (config.sub_block_size or size)
    products = products_floor_us(config, batch * size, logit_rows)
    commit = products_floor_us(config, batch * size, batch if config.token_shift else 0)
    whole = config.num_layers * attention_floor_us(config, batch, size, context + size)
    listed = dense_layers / config.num_layers * whole
    listed += (config.num_layers - dense_layers) * attention_floor_us(config, batch, size, min(k, context) + size)
    return ((exact + sparse) * products + commit + (exact + 1) * whole + sparse * listed) / 1e3


def tokens_per_step(size: int, steps: int) -> int:
    """Positions that a static sampler decides in every forward, so that a block of `size` takes `steps` forwards.

    Raises:
        ValueError: no such number makes it so many: of 32 positions there are 32, 16, 11, 8, 7, 6, 5, 4, 3, 2 or 1.
    """
    possible = sorted({-(-size // each) for each in range(1, size + 1)}, reverse=True)
    if isinstance(steps, bool) or steps not in possible:
        told = ", ".join(map(str, possible))
        raise ValueError(f"steps must be forwards that a block of {size} can take, one of {told}, got {steps!r}")
    return -(-size // steps)


def bytes_per_token(config: ModelConfig, element_size: int = 2) -> int:
    """Bytes of K and V that a token takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_size


def break_even_context(times: dict[int, tuple[float, float]]) -> float:
    """Context from which on selection is faster, by straight lines between the measured times.

    Args:
        times: context -> (block time exact, block time with selection), positive numbers.
    Returns:
        Tokens: where the times cross last; 0 where selection is never slower, inf where it is at the longest context.
    Raises:
        ValueError: there is no context, or a time is no positive number.
    """
    if not times:
        raise ValueError("break_even_context: times must have a context, got none")
    for context, pair in times.items():
        if len(pair) != 2 or not all(isinstance(t, (int, float)) and 0 < t < math.inf for t in pair):
            raise ValueError(f"break_even_context: times must be pairs of positive numbers, got {pair} at {context}")
    points = sorted((context, exact - mage) for context, (exact, mage) in times.items())
    if points[-1][1] < 0:
        return math.inf
    crossings = [
        left + (right - left) * -below / (above - below)
        for (left, below), (right, above) in itertools.pairwise(points)
        if below < 0 <= above
    ]
    return crossings[-1] if crossings else 0.0


# --------------------------------------------------------------------------- advice


@dataclass(frozen=True)
class Advice:
    """Measured at one context.

    Fields:
        context: tokens per request. exact_ms, mage_ms: of a block. exact_step_ms, sparse_step_ms: of a forward.
        ceiling: what the ratio of the two would be at the floors of all products and reads.
    """

    context: int
    exact_ms: float
    mage_ms: float
    exact_step_ms: float
    sparse_step_ms: float
    ceiling: float

    @property
    def speedup(self) -> float:
        return self.exact_ms / self.mage_ms


def advise(
    model: Transformer, cache: PagedCache, config: DenoiseConfig, *, batch: int, contexts: list[int]
) -> list[Advice]:
    """Block times with and without selection, measured on this GPU over random K/V.

    Args:
        model: on CUDA. cache: of random_cache, with room for the longest context. config: of mode "mage".
        batch: requests. contexts: tokens of each, multiples of the block, longer than the budget.
    Raises:
        ValueError: naming the argument, as measure_blocks.
    """
    check_type("advise", "config", config, DenoiseConfig, "a DenoiseConfig")
    if not contexts:
        raise ValueError("advise: contexts must have at least one, got none")
    if config.mode != "mage":
        raise ValueError(f'advise: config.mode must be "mage", got {config.mode!r}')
    for context in contexts:
        if context <= config.exact_prefix:
            raise ValueError(
                f"advise: contexts must be longer than the {config.exact_prefix} tokens of the budget, got {context}"
            )
    found = []
    for context in contexts:
        times = {
            mode: measure_blocks(
                model, cache, dataclasses.replace(config, mode=mode), batch=batch, context=context, blocks=3
            )
            for mode in ("exact", "mage")
        }
        exact, mage = times["exact"], times["mage"]
        floors = [
            block_floor_ms(
                model.config,
                batch=batch,
                context=context,
                exact=each.forwards.get("exact", 0) + each.forwards.get("select", 0),
                sparse=each.forwards.get("sparse", 0),
                k=config.selection.k,
                dense_layers=len(config.dense_layers),
            )
            for each in (exact, mage)
        ]
        sparse_ms = mage.step_ms.get("sparse", math.nan)
        found.append(
            Advice(context, exact.block_ms, mage.block_ms, exact.step_ms["exact"], sparse_ms, floors[0] / floors[1])
        )
    return found
