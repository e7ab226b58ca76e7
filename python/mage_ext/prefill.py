"""Requests between two blocks, and the prefill that puts their prompts into the paged cache.

Test: pytest tests/python/test_denoise.py
"""

import array
import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch

from mage_ext import profiling, sampling
from mage_ext._arguments import check_list, check_type, got
from mage_ext._upload import upload
from mage_ext.cache import OutOfPages, PagedCache, RaggedBatch
from mage_ext.denoise_config import DenoiseConfig
from mage_ext.paged_forward import STRICT_SPLIT, PagedForward, Write
from mage_ext.results import Progress, RequestStats
from mage_ext.step_graphs import StepGraphs


class DenoiseState:
    """Requests between two blocks: what is committed, what comes next. `prefill` makes it, `generate` uses it up,
    `fork` copies it.

    Fields (one entry per request):
        batch: block tables; all tokens below prefix_lens are committed there.
        prompts: ids. seeds: of the random draws.
        prefix_lens: committed tokens, a multiple of the block.
        pending: tokens known at the start of the next block: the prompt's tail, or the one that the prefill's last
            logits predict. predicted: the block starts with the token that the last commit predicted, on the device.
        uncommitted: K/V of the block before the next one are not final yet; its tokens are on the device.
        filled: the prompt's whole blocks are committed. blocks: finished so far.
        outputs: new tokens so far. finish: None while running, else as in Result. errors: why it was refused.
        stats: costs so far. prefill_seconds: of the whole batch.
    """

    def __init__(self, model: torch.nn.Module, prompts: list[list[int]], seeds: list[int], cache: PagedCache):
        self.model = model
        self.batch = RaggedBatch(cache, len(prompts))
        self.prompts = prompts
        self.seeds = seeds
        block_size = model.config.block_size
        self.prefix_lens = [len(prompt) // block_size * block_size for prompt in prompts]
        self.pending = [prompt[length:] for prompt, length in zip(prompts, self.prefix_lens, strict=True)]
        self.predicted = [False] * len(prompts)
        self.uncommitted = [False] * len(prompts)
        self.filled = [False] * len(prompts)
        self.blocks = [0] * len(prompts)
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.finish: list[str | None] = [None] * len(prompts)
        self.errors: list[str | None] = [None] * len(prompts)
        self.stats = [RequestStats(prompt_tokens=len(prompt)) for prompt in prompts]
        self.prefill_seconds = 0.0
        self.used = False

    @property
    def running(self) -> list[int]:
        """Requests that have not ended."""
        return [request for request, finish in enumerate(self.finish) if finish is None]

    def fork(self) -> "DenoiseState":
        """A state that continues from the same tokens on its own. Full pages are shared, partly filled ones copied.

        Raises:
            OutOfPages: the cache has no page for a copy. ValueError: the state was used up by generate.
        """
        self.check_unused()
        twin = object.__new__(DenoiseState)
        twin.__dict__.update(self.__dict__)
        twin.batch = self.batch.fork(
            [0 if finish else n for n, finish in zip(self.prefix_lens, self.finish, strict=True)]
        )
        for name in ("seeds", "prefix_lens", "finish", "errors", "predicted", "uncommitted", "filled", "blocks"):
            setattr(twin, name, list(getattr(self, name)))
        twin.pending = [list(tokens) for tokens in self.pending]
        twin.outputs = [list(tokens) for tokens in self.outputs]
        twin.stats = [
            dataclasses.replace(
                stats, forwards=dict(stats.forwards), kept_mass=list(stats.kept_mass), proven=list(stats.proven)
            )
            for stats in self.stats
        ]
        return twin

    def release(self) -> None:
        """Returns all pages to the cache; the state can't be used afterwards."""
        self.batch.release_all()
        self.used = True

    def check_unused(self) -> None:
        if self.used:
            raise ValueError("DenoiseState: state must not have been used up or released; fork() it before generate()")

    def longest(self, max_new_tokens: int) -> int:
        """Tokens of the longest request at its end, in whole blocks."""
        size = self.model.config.block_size
        return max((_blocks_of(len(prompt) + max_new_tokens, size) for prompt in self.prompts), default=0)

    def reserve(self, max_new_tokens: int) -> None:
        """Takes the pages that every running request needs to its last block; a request that finds none is refused, it
        alone."""
        for request in self.running:
            try:
                self.reserve_pages(request, max_new_tokens)
            except OutOfPages as error:
                self.refuse(request, error)

    def reserve_pages(self, request: int, max_new_tokens: int) -> None:
        """Takes the pages that a request needs to its last block.

        Raises:
            OutOfPages: there are not enough; it keeps what it had.
        """
        total = _blocks_of(len(self.prompts[request]) + max_new_tokens, self.model.config.block_size)
        self.batch.reserve(request, total)

    def refuse(self, request: int, error: OutOfPages) -> None:
        """Ends a request for want of pages."""
        self.end(request, "refused", str(error))

    def end(self, request: int, finish: str, error: str | None = None) -> None:
        """Ends a request, as in Result, and gives its pages back."""
        self.finish[request], self.errors[request] = finish, error
        self.batch.release(request)


def _blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size) * block_size


def check_prompts(
    owner: str, model: torch.nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """The prompts as lists, after a check of ids and lengths against the model."""
    expected = "a list of lists of token ids"
    prompts = check_list(owner, "prompts", prompts, expected)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (list, tuple)):
            raise TypeError(
                f"{owner}: prompts must be {expected}, so prompts[{i}] a list of token ids, got {got(prompt)}"
            )
    if not prompts:
        raise ValueError(f"{owner}: prompts must hold at least one prompt, got none")
    for i, prompt in enumerate(prompts):
        check_ids(owner, f"prompts[{i}]", prompt, model.config.vocab_size)
        check_length(owner, model, i, prompt, max_new_tokens)
    return [list(prompt) for prompt in prompts]


def check_ids(owner: str, name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError where a list or tuple holds something else than token ids."""
    if not _holds_ids(ids, vocab_size):
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(f"{owner}: {name} must hold ids in [0, vocab_size = {vocab_size}), got {token!r}")


def _holds_ids(prompt: Sequence[int], vocab_size: int) -> bool:
    """Whether they are plain integers in [0, vocab_size), without a loop in Python over what may be 100K of them; False
    also where such a loop has to look closer."""
    if not set(map(type, prompt)) <= {int}:
        return False
    try:
        ids = np.frombuffer(array.array("I", prompt), np.uintc)
    except OverflowError:
        return False
    return not len(ids) or int(ids.max()) < vocab_size


def check_length(owner: str, model: torch.nn.Module, index: int, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raises ValueError where prompt `index` and what is to follow don't fit the model."""
    config = model.config
    if not prompt and config.token_shift:
        raise ValueError(f"{owner}: prompts[{index}] must have at least one token under token shift, got none")
    total = _blocks_of(len(prompt) + max_new_tokens, config.block_size)
    if total > config.max_positions:
        raise ValueError(
            f"{owner}: prompts[{index}] and max_new_tokens must fit the model's {config.max_positions} positions, got "
            f"{len(prompt)} + {max_new_tokens} = {total} in whole blocks of {config.block_size}"
        )


def check_run(
    owner: str, model: torch.nn.Module, config: DenoiseConfig | None, cache: PagedCache | None
) -> DenoiseConfig:
    """The configuration, the default for None, after a check of the types of what a run is made of."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"{owner}: model must be a Transformer, got {got(model)}")
    if config is not None:
        check_type(owner, "config", config, DenoiseConfig, "a DenoiseConfig or None")
    if cache is not None:
        check_type(owner, "cache", cache, PagedCache, "a PagedCache or None")
    return DenoiseConfig() if config is None else config


def check_seeds(owner: str, seeds: Sequence[int] | None, count: int) -> list[int]:
    """The seeds of `count` requests; the requests' numbers for None."""
    if seeds is None:
        return list(range(count))
    seeds = check_list(owner, "seeds", seeds, f"{count} integers, one per prompt")
    if len(seeds) != count or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise ValueError(f"{owner}: seeds must be {count} integers, one per prompt, got {list(seeds)!r}")
    if not all(-(1 << 63) <= seed < 1 << 63 for seed in seeds):
        raise ValueError(f"{owner}: seeds must fit 64 bits, got {list(seeds)!r}")
    return list(seeds)


def prefill(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    config: DenoiseConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    cache: PagedCache | None = None,
    progress: bool = False,
) -> DenoiseState:
    """Commits the whole blocks of every prompt, in chunks with a block-causal staircase instead of a mask.

    Args:
        model: a Transformer. prompts: B lists of token ids, of any lengths; the mask id is a token like any other.
        config: max_new_tokens (for the pages) and prefill_chunk are used; None: the defaults.
        seeds: B integers; None: the request's index. They matter at temperature > 0.
        cache: pages to use; a request that does not fit is refused, the others go on. None: a cache of the size that is
            needed, which grows when forks need more.
        progress: one line on stderr, on a terminal only.
    Returns:
        The state before the first block. It can be forked, so that several configurations share this prefill.
    Raises:
        ValueError, TypeError: naming the prompt and what is wrong with it.
    """
    config = check_run("prefill", model, config, cache)
    state = new_state("prefill", model, prompts, config, seeds, cache, None)
    state.reserve(config.max_new_tokens)
    graphs = StepGraphs()
    graphs.bind(model, state.batch.cache, config, state.longest(config.max_new_tokens))
    line = Progress(progress)
    try:
        with torch.no_grad():
            prefill_requests(state, state.running, config, graphs, line)
    except BaseException:
        state.release()
        raise
    finally:
        line.clear()
    return state


def new_state(
    owner: str,
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    config: DenoiseConfig,
    seeds: Sequence[int] | None,
    cache: PagedCache | None,
    max_batch: int | None,
) -> DenoiseState:
    """A state whose requests have neither pages nor K/V yet. Without a cache it gets one that holds max_batch of the
    longest requests (None: all). Raises as `prefill` does."""
    prompts = check_prompts(owner, model, prompts, config.max_new_tokens)
    seeds = check_seeds(owner, seeds, len(prompts))
    if cache is None:
        page_size, size = 64, model.config.block_size
        needed = (_blocks_of(len(prompt) + config.max_new_tokens, size) for prompt in prompts)
        pages = sorted((-(-tokens // page_size) for tokens in needed), reverse=True)
        cache = PagedCache.for_model(model, num_pages=sum(pages[:max_batch]), page_size=page_size, growable=True)
    check_cache(owner, model, cache)
    return DenoiseState(model, prompts, seeds, cache)


def prefill_requests(
    state: DenoiseState, requests: list[int], config: DenoiseConfig, graphs: StepGraphs, line: Progress
) -> None:
    """Commits the whole blocks of the prompts of some requests of a state, which have their pages. Waits for the device
    at the end, so that prefill_seconds are those of the work."""
    block_size = state.model.config.block_size
    chunk = max(config.prefill_chunk // block_size, 1) * block_size
    begun = time.perf_counter()
    # Whose matrix products have the same height, however many there are, gets the same bits.
    groups = [[request] for request in requests] if config.strict else [requests]
    for group in groups:
        longest = max((state.prefix_lens[request] for request in group), default=0)
        for begin in range(0, longest, chunk):
            line.show(f"prefill {begin}/{longest}")
            _prefill_chunk(state, group, begin, chunk, config, graphs)
    for request in requests:
        state.filled[request] = True
    if state.batch.cache.device.type == "cuda":
        torch.cuda.current_stream(state.batch.cache.device).synchronize()
    state.prefill_seconds += time.perf_counter() - begun


def check_cache(owner: str, model: torch.nn.Module, cache: PagedCache) -> None:
    """Raises ValueError where a cache was not made for such a model."""
    config, weight = model.config, model.embed_tokens.weight
    for name, expected in (
        ("num_layers", config.num_layers),
        ("num_kv_heads", config.num_kv_heads),
        ("head_dim", config.head_dim),
        ("dtype", weight.dtype),
        ("device", weight.device),
    ):
        if getattr(cache, name) != expected:
            raise ValueError(f"{owner}: cache.{name} must be the model's {expected}, got {getattr(cache, name)}")


class _ChunkSlots:
    """The tensors of a chunk of A requests, written in place so that a graph may read them.

    Fields:
        tokens: [A, width], int64. begin: [1], int64, position of the first. ends: [A], int32, positions after the last
            token of each request in the chunk. block_table: [A, pages], int32.
    """

    def __init__(self, num_requests: int, width: int, num_pages: int, device: torch.device):
        self.tokens = torch.zeros(num_requests, width, dtype=torch.int64, device=device)
        self.begin = torch.zeros(1, dtype=torch.int64, device=device)
        self.ends = torch.zeros(num_requests, dtype=torch.int32, device=device)
        self.block_table = torch.full((num_requests, num_pages), -1, dtype=torch.int32, device=device)


def _prefill_chunk(
    state: DenoiseState, group: list[int], begin: int, chunk: int, config: DenoiseConfig, graphs: StepGraphs
) -> None:
    """Commits prompt tokens [begin, begin + chunk) of every request of a group that has them; rows past a request's end
    are padding."""
    model, model_config, cache = state.model, state.model.config, state.batch.cache
    device, size = cache.device, model_config.block_size
    requests = [request for request in group if state.prefix_lens[request] > begin]
    ends = [min(begin + chunk, state.prefix_lens[request]) for request in requests]
    width = chunk if config.strict else max(ends) - begin
    rows = np.zeros((len(requests), width), np.int64)  # numpy reads lists five times as fast as torch
    for row, request, end in zip(rows, requests, ends, strict=True):
        row[: end - begin] = state.prompts[request][begin:end]
    # Whole chunks recur with the same shape, the last ones of prompts don't.
    captured = graphs.enabled and width == chunk
    max_seq_len = graphs.bound if captured else begin + width
    table = state.batch.block_table[upload(requests, device)]

    def new_slots() -> _ChunkSlots:
        return _ChunkSlots(len(requests), width, cache.pages_for(max_seq_len), device)

    key = ("prefill", len(requests))
    slots = graphs.keep(key, new_slots) if captured else new_slots()
    slots.tokens.copy_(upload(rows, device))
    slots.begin.fill_(begin)
    slots.ends.copy_(upload(ends, device, torch.int32))
    width_of_table = min(table.shape[1], slots.block_table.shape[1])
    slots.block_table.fill_(-1)
    slots.block_table[:, :width_of_table] = table[:, :width_of_table]

    def forward() -> torch.Tensor:
        index = torch.arange(width, device=device)
        positions = (slots.begin + index).expand(len(requests), -1)
        start = slots.begin.to(torch.int32).expand(len(requests)).contiguous()
        attend = PagedForward(
            cache,
            slots.block_table,
            max_seq_len,
            [Write(start)],
            slots.ends,
            kv_lens=((positions // size + 1) * size).to(torch.int32).contiguous(),
            split_tokens=STRICT_SPLIT if config.strict else 0,
            method=config.method,
            final=True,
        )
        return model.hidden(slots.tokens, positions, attend)

    hidden = graphs.run(key, forward) if captured else forward()
    for request in requests:
        state.stats[request].prefill_forwards += 1
    # Under token shift the last logits of a prompt of whole blocks predict the first token of the first block.
    last = [
        (row, request)
        for row, (request, end) in enumerate(zip(requests, ends, strict=True))
        if model_config.token_shift and end == len(state.prompts[request])
    ]
    if last:
        index = upload([row for row, _ in last], device)
        with profiling.span("logits"):
            logits = model.logits(hidden[index, (slots.ends[index] - begin - 1).long()])
        tokens = sampling.draw_tokens(logits, mask_id=model_config.mask_id, overwrite=True).token.tolist()
        for (_, request), predicted in zip(last, tokens, strict=True):
            state.pending[request] = [predicted]
