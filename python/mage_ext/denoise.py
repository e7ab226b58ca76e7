"""The denoising loop: prefill, then block after block until every request has ended. The one loop of the project.

A block's life: its tokens that are known already (the prompt's tail, or under token shift the token that the previous
logits predict) stand, the others are open; forwards decide open positions until none is left; a commit forward writes
the K/V of the clean block. With mode "mage" the first forward is exact and emits attention mass, one selection follows,
the other forwards are sparse. Which positions are decided is `sampling`'s business, what is listed `selection`'s, how
attention runs `paged_forward`'s.

Inside a block nothing waits for the device, except for one flag that lags a step on CUDA; an extra step it may cost
changes nothing: a request without open positions is an empty slot that neither writes K/V nor draws. What a request
gets does not depend on its batch mates (up to the rounding of matrix products of another height).

Test: pytest tests/python/test_denoise.py
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mage_ext import sampling
from mage_ext import selection as selections
from mage_ext.cache import OutOfPages, PagedCache, RaggedBatch
from mage_ext.paged_forward import NOT_WRITTEN, Emission, PagedForward, Write
from mage_ext.results import FinishedBlock, Progress, RequestStats, Result, StepInfo
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import BlockSelection, SelectionConfig

MODES = ("exact", "mage")
REFRESH_POLICIES = ("block", "blocks", "kept_mass")


@dataclass(frozen=True)
class DenoiseConfig:
    """How text is generated.

    Fields:
        mode: "exact", or "mage" (exact first forward of a block, then a selection of the prefix).
        max_new_tokens: per request, >= 1. ignore_eos: EOS does not end a request.
        sampler: which positions are decided, how tokens are drawn.
        selection: of mode "mage". dense_layers: layers that stay exact in every forward.
        refresh: when a block selects anew instead of starting with the lists it has: "block" (always), "blocks" (every
            refresh_blocks blocks) or "kept_mass" (after a commit under whose mass the lists keep less than
            refresh_bound). Tokens committed after a selection are always attended.
        select_override: called instead of `selection.select` with its arguments (mass, prefix_lens, config, votes=);
            returns a BlockSelection.
        sub_block_size: positions that are decided before any later one; None: the model's own (whole block if it has
            none).
        sub_block_cache: once the first position of the current sub-block is decided, forwards send that sub-block alone
            and the block's other K/V stay as they were.
        prefill_chunk: tokens of each request per prefill forward; multiples of the block are taken. Larger chunks fill
            the processor better, smaller ones need less memory.

    Raises:
        ValueError, TypeError: naming the field, what it must be and what came.
    """

    mode: str = "exact"
    max_new_tokens: int = 128
    ignore_eos: bool = False
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    dense_layers: tuple[int, ...] = (0, 1)
    refresh: str = "block"
    refresh_blocks: int = 1
    refresh_bound: float = 0.9
    select_override: Callable[..., BlockSelection] | None = None
    sub_block_size: int | None = None
    sub_block_cache: bool = False
    prefill_chunk: int = 512

    def __post_init__(self):
        for name, value, choices in (("mode", self.mode, MODES), ("refresh", self.refresh, REFRESH_POLICIES)):
            if value not in choices:
                raise ValueError(f"DenoiseConfig: {name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("max_new_tokens", "refresh_blocks", "prefill_chunk", "sub_block_size"):
            value = getattr(self, name)
            if name == "sub_block_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"DenoiseConfig: {name} must be an integer >= 1, got {value!r}")
        for name, kind in (("sampler", SamplerConfig), ("selection", SelectionConfig)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"DenoiseConfig: {name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        bound = self.refresh_bound
        if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not 0 <= bound <= 1:
            raise ValueError(f"DenoiseConfig: refresh_bound must be a number in [0, 1], got {bound!r}")
        layers = self.dense_layers
        if not isinstance(layers, tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise TypeError(f"DenoiseConfig: dense_layers must be a tuple of layer numbers, got {layers!r}")
        if self.select_override is not None and not callable(self.select_override):
            raise TypeError(f"DenoiseConfig: select_override must be callable, got {self.select_override!r}")
        if self.selection.rule == "layer" and self.selection.norm == "prefix":
            raise ValueError(
                'DenoiseConfig: selection.norm must be "context" with rule "layer", whose coverage is a share of it, '
                'got "prefix"'
            )

    def selecting_layers(self, num_layers: int) -> dict[int, int]:
        """Layers that select -> their index in a selection, for a model of num_layers; empty in mode "exact".

        Raises:
            ValueError: a dense layer the model lacks, or no layer left to select.
        """
        if self.mode == "exact":
            return {}
        for layer in self.dense_layers:
            if not 0 <= layer < num_layers:
                raise ValueError(f"DenoiseConfig: dense_layers must be in [0, {num_layers}), got {layer}")
        chosen = [layer for layer in range(num_layers) if layer not in self.dense_layers]
        if not chosen:
            raise ValueError(f"DenoiseConfig: dense_layers must leave a layer that selects, got all {num_layers}")
        return {layer: index for index, layer in enumerate(chosen)}

    @property
    def exact_prefix(self) -> int:
        """Longest prefix that a selection would keep whole; such blocks are exact."""
        return self.selection.k_min if self.selection.rule == "mass" else self.selection.k


class DenoiseState:
    """Requests between two blocks: what is committed, what comes next. `prefill` makes it, `generate` uses it up,
    `fork` copies it.

    Fields (one entry per request):
        batch: block tables; all tokens below prefix_lens are committed there.
        prompts: ids. seeds: of the random draws.
        prefix_lens: committed tokens, a multiple of the block.
        pending: tokens known at the start of the next block: the prompt's tail, or the one that the last logits
            predict.
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
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.finish: list[str | None] = [None] * len(prompts)
        self.errors: list[str | None] = [None] * len(prompts)
        self.stats = [RequestStats(prompt_tokens=len(prompt)) for prompt in prompts]
        self.prefill_seconds = 0.0
        self.used = False
        self.lists = _Lists()

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
        for name in ("seeds", "prefix_lens", "finish", "errors"):
            setattr(twin, name, list(getattr(self, name)))
        twin.pending = [list(tokens) for tokens in self.pending]
        twin.outputs = [list(tokens) for tokens in self.outputs]
        twin.stats = [
            dataclasses.replace(stats, forwards=dict(stats.forwards), kept_mass=list(stats.kept_mass))
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

    def reserve(self, max_new_tokens: int) -> None:
        """Takes the pages that every running request needs to its last block; a request that finds none is refused, it
        alone."""
        for request in self.running:
            total = _blocks_of(len(self.prompts[request]) + max_new_tokens, self.model.config.block_size)
            try:
                self.batch.reserve(request, total)
            except OutOfPages as error:
                self.finish[request], self.errors[request] = "refused", str(error)
                self.batch.release(request)


@dataclass
class _Lists:
    """The selection that blocks carry on.

    Fields:
        selection: None before the first. requests: request of each of its rows. ages: request -> blocks since it was
            selected.
        drifted: requests whose lists keep too little under the mass of the last commit.
    """

    selection: BlockSelection | None = None
    requests: list[int] = field(default_factory=list)
    ages: dict[int, int] = field(default_factory=dict)
    drifted: set[int] = field(default_factory=set)


def _blocks_of(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size) * block_size


def _check_prompts(model: torch.nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    config = model.config
    if isinstance(prompts, (str, bytes)) or not all(isinstance(prompt, (list, tuple)) for prompt in prompts):
        raise TypeError(f"generate: prompts must be a list of lists of token ids, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("generate: prompts must hold at least one prompt, got none")
    for i, prompt in enumerate(prompts):
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"generate: prompts[{i}] must hold ids in [0, vocab_size = {config.vocab_size}), got {token!r}"
                )
        if not prompt and config.token_shift:
            raise ValueError(f"generate: prompts[{i}] must have at least one token under token shift, got none")
        total = _blocks_of(len(prompt) + max_new_tokens, config.block_size)
        if total > config.max_positions:
            raise ValueError(
                f"generate: prompts[{i}] and max_new_tokens must fit the model's {config.max_positions} positions, got "
                f"{len(prompt)} + {max_new_tokens} = {total} in whole blocks of {config.block_size}"
            )
    return [list(prompt) for prompt in prompts]


def _check_seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    if seeds is None:
        return list(range(count))
    if len(seeds) != count or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise ValueError(f"generate: seeds must be {count} integers, one per prompt, got {list(seeds)!r}")
    if not all(-(1 << 63) <= seed < 1 << 63 for seed in seeds):
        raise ValueError(f"generate: seeds must fit 64 bits, got {list(seeds)!r}")
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
    config = config or DenoiseConfig()
    prompts = _check_prompts(model, prompts, config.max_new_tokens)
    seeds = _check_seeds(seeds, len(prompts))
    block_size = model.config.block_size
    if cache is None:
        page_size = 64
        needed = [_blocks_of(len(prompt) + config.max_new_tokens, block_size) for prompt in prompts]
        num_pages = sum(-(-tokens // page_size) for tokens in needed)
        cache = PagedCache.for_model(model, num_pages=num_pages, page_size=page_size, growable=True)
    _check_cache(model, cache)
    state = DenoiseState(model, prompts, seeds, cache)
    state.reserve(config.max_new_tokens)
    chunk = max(config.prefill_chunk // block_size, 1) * block_size
    longest = max((state.prefix_lens[request] for request in state.running), default=0)
    line, begun = Progress(progress), time.perf_counter()
    with torch.no_grad():
        for begin in range(0, longest, chunk):
            line.show(f"prefill {begin}/{longest}")
            _prefill_chunk(state, begin, chunk)
    line.clear()
    state.prefill_seconds = time.perf_counter() - begun
    return state


def _check_cache(model: torch.nn.Module, cache: PagedCache) -> None:
    config, weight = model.config, model.embed_tokens.weight
    for name, expected in (
        ("num_layers", config.num_layers),
        ("num_kv_heads", config.num_kv_heads),
        ("head_dim", config.head_dim),
        ("dtype", weight.dtype),
        ("device", weight.device),
    ):
        if getattr(cache, name) != expected:
            raise ValueError(f"prefill: cache.{name} must be the model's {expected}, got {getattr(cache, name)}")


def _prefill_chunk(state: DenoiseState, begin: int, chunk: int) -> None:
    """Commits prompt tokens [begin, begin + chunk) of every running request that has them; rows past a request's end
    are padding."""
    model, config = state.model, state.model.config
    device = state.batch.cache.device
    requests = [request for request in state.running if state.prefix_lens[request] > begin]
    ends = [min(begin + chunk, state.prefix_lens[request]) for request in requests]
    width = max(ends) - begin
    rows = [state.prompts[r][begin:end] + [0] * (begin + width - end) for r, end in zip(requests, ends, strict=True)]
    tokens = torch.tensor(rows, device=device)  # [A, width]
    positions = torch.arange(begin, begin + width, device=device).expand(len(requests), -1)
    seq_lens = torch.tensor(ends, dtype=torch.int32, device=device)
    forward = PagedForward(
        state.batch.cache,
        state.batch.block_table[requests],
        begin + width,
        [Write(torch.full_like(seq_lens, begin))],
        seq_lens,
        kv_lens=((positions // config.block_size + 1) * config.block_size).to(torch.int32).contiguous(),
    )
    hidden = model.hidden(tokens, positions, forward)
    for request in requests:
        state.stats[request].prefill_forwards += 1
    # Under token shift the last logits of a prompt of whole blocks predict the first token of the first block.
    last = [
        (row, request)
        for row, (request, end) in enumerate(zip(requests, ends, strict=True))
        if config.token_shift and end == len(state.prompts[request])
    ]
    if last:
        index = torch.tensor([row for row, _ in last], device=device)
        logits = model.logits(hidden[index, (seq_lens[index] - begin - 1).long()])
        tokens = sampling.draw_tokens(logits, mask_id=config.mask_id).token.tolist()
        for (_, request), predicted in zip(last, tokens, strict=True):
            state.pending[request] = [predicted]


class BlockStream:
    """Iterator over finished blocks in the order in which they end; `results` holds every request's Result
    afterwards."""

    def __init__(self, state: DenoiseState, blocks: Iterator[FinishedBlock], finish: Callable[[], list[Result]]):
        self.state = state
        self._blocks = blocks
        self._finish = finish
        self._results: list[Result] | None = None

    def __iter__(self) -> "BlockStream":
        return self

    def __next__(self) -> FinishedBlock:
        try:
            return next(self._blocks)
        except StopIteration:
            if self._results is None:
                self._results = self._finish()
            raise

    @property
    def results(self) -> list[Result]:
        """One per request. Raises RuntimeError while blocks are to come."""
        if self._results is None:
            raise RuntimeError("BlockStream: results must be read after the last block, got one still running")
        return self._results


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]] | DenoiseState,
    config: DenoiseConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    stream: bool = False,
    cache: PagedCache | None = None,
    tokenizer: object | None = None,
    progress: bool = False,
) -> list[Result] | BlockStream:
    """Writes up to max_new_tokens tokens after every prompt.

    Args:
        model: a Transformer.
        prompts: B lists of token ids, or a state of `prefill`, which is used up (fork it to keep it).
        config: None: the defaults. seeds, cache, progress: as in `prefill`; with a state, seeds replace its own.
        callback: called after every forward of a block. Reading its tensors waits for the device.
        stream: return an iterator over finished blocks that works as it is consumed.
        tokenizer: with `decode(ids)`, for Result.text.
    Returns:
        One Result per request, in order; with stream, a BlockStream that has them at its end.
    Raises:
        ValueError, TypeError: naming the argument.
    Example:
        loaded = mage_ext.models.huggingface.load("path/to/model")
        prompt = loaded.tokenizer.chat([{"role": "user", "content": "Hello"}])
        print(generate(loaded.model, [prompt], tokenizer=loaded.tokenizer)[0].text)
    """
    config = config or DenoiseConfig()
    layers = config.selecting_layers(model.config.num_layers)
    sub_block_size = config.sub_block_size or model.config.sub_block_size or model.config.block_size
    if model.config.block_size % sub_block_size:
        raise ValueError(
            f"generate: sub_block_size must divide the model's block of {model.config.block_size}, got {sub_block_size}"
        )
    if isinstance(prompts, DenoiseState):
        state = prompts
        state.check_unused()
        if state.model is not model or cache is not None:
            raise ValueError("generate: model and cache must be those of the state's prefill, got others")
        if seeds is not None:
            state.seeds = _check_seeds(seeds, len(state.prompts))
        _check_prompts(model, state.prompts, config.max_new_tokens)
        state.reserve(config.max_new_tokens)
    else:
        state = prefill(model, prompts, config, seeds=seeds, cache=cache, progress=progress)
    state.used = True
    state.lists = _Lists()
    run = _Run(state, config, layers, sub_block_size, callback, Progress(progress))

    def finish() -> list[Result]:
        return [_result(state, request, tokenizer) for request in range(len(state.prompts))]

    blocks = BlockStream(state, run.blocks(), finish)
    if stream:
        return blocks
    for _ in blocks:
        pass
    return blocks.results


def _result(state: DenoiseState, request: int, tokenizer: object | None) -> Result:
    tokens, stats = state.outputs[request], state.stats[request]
    stats.new_tokens = len(tokens)
    text = None if tokenizer is None else tokenizer.decode(tokens)
    return Result(request, tokens, state.finish[request], stats, text, state.errors[request])


class _LaggingFlags:
    """Device booleans read on the host without waiting for the newest: those of `lag` steps ago.

    On the CPU nothing lags. On CUDA a copy to pinned memory is queued after every step and the one before is read,
    whose event has passed by the time the next step is queued.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.lag = 1 if self._cuda else 0
        self._queue: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def push(self, flags: Tensor) -> None:
        """flags: [n], bool."""
        if not self._cuda:
            self._queue.append((flags, None))
            return
        copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._queue.append((copy, event))

    def read(self) -> list[bool] | None:
        """The flags of `lag` pushes ago; None if there are none yet."""
        if len(self._queue) <= self.lag:
            return None
        flags, event = self._queue.pop(0)
        if event is not None:
            event.synchronize()
        return flags.tolist()


class _Block:
    """Tensors of the block that A requests are in. Q is the block size.

    Fields:
        requests: [A] batch index of each row (host). starts: [A] position of the first token (host), start: the same,
            int32.
        tokens: [A, Q], int64, mask id where open. open: [A, Q], bool, undecided. ended: [A], bool.
        candidates: [A, Q], bool, open positions of each request's current sub-block. live: [A], bool, has candidates.
        sub_start: [A], int64, first position of the current sub-block. first_open: [A], bool, that position is a
            candidate.
        steps: [A], int64, forwards in which a request was live.
    """

    def __init__(self, state: DenoiseState, config: DenoiseConfig, sub_block_size: int):
        model_config = state.model.config
        device = state.batch.cache.device
        size = model_config.block_size
        self.requests = state.running
        self.starts = [state.prefix_lens[request] for request in self.requests]
        self.sub_block_size = sub_block_size
        known = [state.pending[request] for request in self.requests]
        tokens = [tail + [model_config.mask_id] * (size - len(tail)) for tail in known]
        prompt_ends = [len(state.prompts[r]) - start for r, start in zip(self.requests, self.starts, strict=True)]
        self.tokens = torch.tensor(tokens, device=device)
        index = torch.arange(size, device=device)
        per_request = torch.tensor([[len(tail) for tail in known], prompt_ends, self.starts], device=device)[..., None]
        self.open = index >= per_request[0]
        self._may_end = index >= per_request[1]  # EOS of the prompt's tail ends nothing
        self._is_last = index == per_request[1] + config.max_new_tokens - 1
        self._eos = torch.tensor(() if config.ignore_eos else model_config.eos_ids, dtype=torch.int64, device=device)
        self.positions = per_request[2] + index  # [A, Q]
        self.start = per_request[2, :, 0].to(torch.int32)
        self.index = index
        self.ended = torch.zeros(len(self.requests), dtype=torch.bool, device=device)
        self.seeds = torch.tensor([state.seeds[request] for request in self.requests], device=device)
        self.block_table = state.batch.block_table[self.requests]
        self.max_seq_len = max(self.starts) + size
        self.steps = torch.zeros(len(self.requests), dtype=torch.int64, device=device)
        shift = model_config.token_shift
        # Rows whose logits an undecided position consumes; fixed for the block.
        self.mass_rows = torch.nn.functional.pad(self.open[:, 1:], (0, 1)) if shift else self.open.clone()
        self.update()

    def update(self) -> None:
        """Recomputes what follows from tokens and open positions."""
        is_eos = (self.tokens[..., None] == self._eos).any(-1)
        ends = self._is_last | (self._may_end & is_eos)
        decided_up_to = (~self.open).cumprod(-1).bool()
        self.ended = self.ended | (decided_up_to & ends).any(-1)
        candidates = self.open & ~self.ended[:, None]
        first = candidates.int().argmax(-1)
        self.sub_start = first - first % self.sub_block_size
        self.candidates = candidates & (self.index < (self.sub_start + self.sub_block_size)[:, None])
        self.live = candidates.any(-1)
        self.first_open = self.live & (first == self.sub_start)

    def flags(self) -> Tensor:
        """[2], bool: some request is live; no live request has the first position of its sub-block open."""
        return torch.stack((self.live.any(), ~self.first_open.any()))


class _Run:
    """One generation over a state: the blocks, and within a block the steps."""

    def __init__(
        self,
        state: DenoiseState,
        config: DenoiseConfig,
        layers: dict[int, int],
        sub_block_size: int,
        callback: Callable[[StepInfo], None] | None,
        progress: Progress,
    ):
        self.state = state
        self.config = config
        self.layers = layers
        self.sub_block_size = sub_block_size
        self.callback = callback
        self.progress = progress
        self.begun = time.perf_counter()
        self.select = config.select_override or selections.select

    def blocks(self) -> Iterator[FinishedBlock]:
        """Blocks as they end; all running requests work on their blocks of one number together."""
        state = self.state
        index = 0
        try:
            while state.running:
                with torch.no_grad():
                    finished = self._block(index)
                yield from finished
                index += 1
        finally:
            self.progress.clear()
            state.batch.release_all()

    def _block(self, index: int) -> list[FinishedBlock]:
        state, config = self.state, self.config
        block = _Block(state, config, self.sub_block_size)
        plan = [self._plan(request) for request in block.requests]
        flags = _LaggingFlags(block.tokens.device)
        flags.push(block.flags())
        # Every step decides a position of every live request, so the number of steps is bounded on the host.
        size = state.model.config.block_size
        bound = size - min(len(state.pending[request]) for request in block.requests)
        narrow = False
        for step in range(bound + flags.lag * (size // self.sub_block_size)):
            seen = flags.read()
            if seen is not None:
                if not seen[0]:
                    break
                narrow = config.sub_block_cache and step > 0 and seen[1]
            self.progress.show(f"block {index}, forward {step}, {len(block.requests)} requests")
            self._step(block, plan, index, step, narrow)
            flags.push(block.flags())
        finished = self._finish_block(block, plan, index)
        self._commit(block, index)
        return finished

    def _plan(self, request: int) -> str:
        """How a request starts its block: "exact" throughout, "select" anew, or "carry" the lists it has."""
        config, lists = self.config, self.state.lists
        if not self.layers or self.state.prefix_lens[request] <= config.exact_prefix:
            return "exact"
        age = lists.ages.get(request)
        if (
            age is None
            or config.refresh == "block"
            or (config.refresh == "blocks" and age >= config.refresh_blocks)
            or (config.refresh == "kept_mass" and request in lists.drifted)
        ):
            return "select"
        return "carry"

    def _step(self, block: _Block, plan: list[str], index: int, step: int, narrow: bool) -> None:
        """One forward of all live requests: rows, attention, draws, decisions."""
        state, config, model = self.state, self.config, self.state.model
        size, sub = model.config.block_size, block.sub_block_size
        device = block.tokens.device

        # 1. Which rows are sent and whose K/V they replace.
        live, candidates = block.live, block.candidates
        if narrow:
            # The first position of every sub-block is decided: its rows alone. Where a flag that lags could not know
            # yet that a request has come to its next sub-block, it sits this forward out; its next draws have the same
            # keys.
            live = live & ~block.first_open
            candidates = candidates & live[:, None]
            rows = block.sub_start[:, None] + torch.arange(sub, device=device)  # [A, sub]
            tokens, positions = block.tokens.gather(1, rows), block.positions.gather(1, rows)
            first_row = block.sub_start
            starts = [(live, block.start + block.sub_start.int(), None)]
        else:
            tokens, positions = block.tokens, block.positions
            first_row = torch.zeros_like(block.sub_start)
            starts = [(live, block.start, None)]
            if config.sub_block_cache and step > 0:
                # Requests of both kinds: all rows of those that start a sub-block, the sub-block's rows of the others.
                starts = [
                    (block.first_open, block.start, None),
                    (live & ~block.first_open, block.start + block.sub_start.int(), block.sub_start),
                ]
        writes = [Write(torch.where(who, start, NOT_WRITTEN), row, sub) for who, start, row in starts]

        # 2. The forward, exact or sparse per request.
        seq_lens = torch.where(live, block.start + size, 0)
        forward = PagedForward(state.batch.cache, block.block_table, block.max_seq_len, writes, seq_lens)
        kind = self._attention(forward, block, plan, step)
        hidden = model.hidden(tokens, positions, forward)
        mass = None
        if forward.emission is not None:
            mass = forward.emission.mass()
            self._take_selection(forward.emission, mass, block, plan)

        # 3. Draws for the positions that may be decided. Row i predicts position i, or i + 1 under token shift.
        if device.type == "cpu":
            who, where = candidates.nonzero(as_tuple=True)
        else:  # a fixed grid, since the number of candidates is known on the device only
            where = block.sub_start[:, None] + torch.arange(sub, device=device)
            who = torch.arange(len(block.requests), device=device)[:, None].expand_as(where).flatten()
            where = where.flatten()
        row = (where - first_row[who] - int(model.config.token_shift)).clamp(min=0)
        draws = sampling.draw_tokens(
            model.logits(hidden[who, row]),
            mask_id=model.config.mask_id,
            temperature=config.sampler.temperature,
            top_k=config.sampler.top_k,
            top_p=config.sampler.top_p,
            seeds=block.seeds[who],
            positions=block.positions[who, where],
            step=block.steps[who],
        )
        grid = sampling.Draws(
            *(torch.zeros(block.tokens.shape, dtype=x.dtype, device=device).index_put((who, where), x) for x in draws)
        )

        # 4. Decisions.
        decided = sampling.decide(config.sampler, grid, candidates)
        block.steps += live
        block.tokens = torch.where(decided, grid.token, block.tokens)
        block.open = block.open & ~decided
        block.update()
        self._tell(block, index, step, kind, tokens.shape[1], decided, mass)

    def _attention(self, forward: PagedForward, block: _Block, plan: list[str], step: int) -> str:
        """Fills in who is attended exactly and who sparsely in this step; returns the kind for the callback."""
        first = step == 0
        ways = {("sparse" if way == "carry" or (way == "select" and not first) else way) for way in plan}
        if not self.layers or ways == {"exact"}:
            return "exact"
        forward.selecting = self.layers
        if "select" not in ways:
            # Lists of requests that are exact start at tail 0: they attend everything.
            forward.selection, forward.sparse_lens = self._lists_of(block.requests), forward.seq_lens
            return "sparse" if ways == {"sparse"} else "mixed"
        forward.exact_lens = forward.seq_lens
        if "sparse" in ways:
            carried = torch.tensor([way == "carry" for way in plan], device=forward.seq_lens.device)
            forward.selection = self._lists_of(block.requests)
            forward.sparse_lens = torch.where(carried, forward.seq_lens, 0)
            forward.exact_lens = torch.where(carried, 0, forward.seq_lens)
        row_mask = block.mass_rows if self.config.selection.score_rows == "open" else None
        forward.emission = Emission(self.config.selection, row_mask, block.start)
        return "select" if ways == {"select"} else "mixed"

    def _take_selection(self, emission: Emission, mass: Tensor, block: _Block, plan: list[str]) -> None:
        """Selects for the requests that are to; the others keep their lists, or get the empty one that attends
        everything."""
        lists = self.state.lists
        chosen = torch.tensor([way == "select" for way in plan], device=mass.device)
        prefix_lens = torch.where(chosen, block.start, 0)
        selection = self.select(mass, prefix_lens, self.config.selection, votes=emission.stacked_votes())
        expected = (*mass.shape[:3],)
        if tuple(selection.indices.shape[:3]) != expected or selection.g != self.config.selection.g:
            raise ValueError(
                f"generate: select_override must return lists [L, A, Hkv] = {list(expected)} with g = "
                f"{self.config.selection.g}, got {list(selection.indices.shape[:3])} with g = {selection.g}"
            )
        if "carry" in plan:
            carried = torch.tensor([way == "carry" for way in plan], device=mass.device)
            selection = _merge(selection, self._lists_of(block.requests), carried)
        lists.selection, lists.requests = selection, block.requests
        for request, way in zip(block.requests, plan, strict=True):
            if way == "select":
                lists.ages[request] = 0
                lists.drifted.discard(request)

    def _lists_of(self, requests: list[int]) -> BlockSelection:
        """The carried selection with one row per request of `requests`, in their order."""
        lists = self.state.lists
        if lists.requests != requests:
            rows = torch.tensor(
                [lists.requests.index(request) for request in requests], device=lists.selection.indices.device
            )
            lists.selection = _rows(lists.selection, rows)
            lists.requests = requests
        return lists.selection

    def _finish_block(self, block: _Block, plan: list[str], index: int) -> list[FinishedBlock]:
        """Reads the block back once: new tokens, ends, costs."""
        state = self.state
        seconds = time.perf_counter() - self.begun
        tokens, ended = block.tokens.tolist(), block.ended.tolist()
        eos = block._eos.tolist()
        self._count(block, plan)
        finished = []
        for row, request in enumerate(block.requests):
            new_from = max(len(state.prompts[request]) - block.starts[row], 0)
            new = tokens[row][new_from:]
            if ended[row]:
                room = self.config.max_new_tokens - len(state.outputs[request])
                ends = [i + 1 for i, token in enumerate(new) if token in eos]
                new = new[: min([room, *ends])]
                state.finish[request] = "eos" if new[-1] in eos else "length"
                state.batch.release(request)
            state.outputs[request] += new
            state.stats[request].seconds = seconds
            finished.append(FinishedBlock(request, index, new, ended[row]))
        return finished

    def _count(self, block: _Block, plan: list[str]) -> None:
        """Adds the block's forwards, kept mass and bytes of K/V to the requests' statistics."""
        cache, config = self.state.batch.cache, self.state.model.config
        steps = block.steps.tolist()
        lists = self.state.lists
        listed = kept = tails = None
        if any(way != "exact" for way in plan) and lists.selection is not None and lists.requests == block.requests:
            listed = (lists.selection.counts.sum((0, 2)) * lists.selection.g).tolist()
            kept = lists.selection.kept_mass.mean((0, 2)).tolist()
            tails = lists.selection.tail_start.tolist()
        for row, (request, way) in enumerate(zip(block.requests, plan, strict=True)):
            stats, count = self.state.stats[request], steps[row]
            if not count:
                continue
            length = block.starts[row] + config.block_size
            whole = length * config.num_layers * config.num_kv_heads
            sparse_steps = {"exact": 0, "select": count - 1, "carry": count}[way]
            stats.forwards["exact"] += count if way == "exact" else 0
            stats.forwards["select"] += way == "select"
            stats.forwards["sparse"] += sparse_steps
            sparse = 0
            if sparse_steps:
                dense = (config.num_layers - len(self.layers)) * length * config.num_kv_heads
                sparse = dense + listed[row] + (length - tails[row]) * len(self.layers) * config.num_kv_heads
            stats.kv_bytes_exact += count * whole * cache.token_bytes
            stats.kv_bytes += ((count - sparse_steps) * whole + sparse_steps * sparse) * cache.token_bytes
            if way == "select":
                stats.kept_mass.append(kept[row])

    def _commit(self, block: _Block, index: int) -> None:
        """Writes the clean block's K/V of the requests that go on; under token shift its last logits give the next
        first token."""
        state, model = self.state, self.state.model
        rows = [row for row, request in enumerate(block.requests) if state.finish[request] is None]
        if not rows:
            return
        requests = [block.requests[row] for row in rows]
        size, device = model.config.block_size, block.tokens.device
        pick = torch.tensor(rows, device=device)
        start = block.start[pick]
        max_seq_len = max(block.starts[row] for row in rows) + size
        forward = PagedForward(state.batch.cache, block.block_table[pick], max_seq_len, [Write(start)], start + size)
        lists = state.lists
        measure = self.config.refresh == "kept_mass" and lists.selection is not None
        if measure:
            forward.selecting, forward.exact_lens = self.layers, forward.seq_lens
            # Votes are for selecting; measuring needs mass alone.
            plain = dataclasses.replace(self.config.selection, rule="fixed")
            forward.emission = Emission(plain, None, start)
        hidden = model.hidden(block.tokens[pick], block.positions[pick], forward)
        if measure:
            kept = _kept_mass(self._lists_of(requests), forward.emission.mass()).mean((0, 2)).tolist()
            lists.drifted = {r for r, share in zip(requests, kept, strict=True) if share < self.config.refresh_bound}
        pending = [[] for _ in requests]
        if model.config.token_shift:
            logits = model.logits(hidden[:, -1])
            pending = [[token] for token in sampling.draw_tokens(logits, mask_id=model.config.mask_id).token.tolist()]
        for row, request, tokens in zip(rows, requests, pending, strict=True):
            state.prefix_lens[request] += size
            state.pending[request] = tokens
            if request in lists.ages:
                lists.ages[request] += 1
            stats = state.stats[request]
            stats.forwards["commit"] += 1
            num_bytes = (block.starts[row] + size) * model.config.num_layers * model.config.num_kv_heads
            stats.kv_bytes += num_bytes * state.batch.cache.token_bytes
            stats.kv_bytes_exact += num_bytes * state.batch.cache.token_bytes
        if self.callback is not None:
            nothing = torch.zeros_like(block.open[pick])
            starts = [block.starts[row] for row in rows]
            self.callback(
                StepInfo(index, -1, "commit", size, requests, starts, block.tokens[pick], nothing, nothing, None, None)
            )

    def _tell(
        self, block: _Block, index: int, step: int, kind: str, rows: int, decided: Tensor, mass: Tensor | None
    ) -> None:
        if self.callback is not None:
            lists = None if kind == "exact" else self.state.lists.selection
            self.callback(
                StepInfo(
                    index,
                    step,
                    kind,
                    rows,
                    block.requests,
                    block.starts,
                    block.tokens,
                    block.open,
                    decided,
                    lists,
                    mass,
                )
            )


def _rows(selection: BlockSelection, rows: Tensor) -> BlockSelection:
    """Some requests of a selection. rows: [A], int64."""
    return dataclasses.replace(
        selection,
        indices=selection.indices[:, rows],
        counts=selection.counts[:, rows],
        kept_mass=selection.kept_mass[:, rows],
        tail_start=selection.tail_start[rows],
        overflow=selection.overflow[:, rows],
    )


def _merge(new: BlockSelection, old: BlockSelection, keep_old: Tensor) -> BlockSelection:
    """`new` with the rows of `old` where keep_old [A], bool, says so; as wide as the wider one."""
    capacity = max(new.capacity, old.capacity)
    wide = [torch.nn.functional.pad(s.indices, (0, capacity - s.capacity), value=-1) for s in (new, old)]
    per_head = keep_old[:, None]
    return dataclasses.replace(
        new,
        indices=torch.where(per_head[..., None], wide[1], wide[0]),
        counts=torch.where(per_head, old.counts, new.counts),
        kept_mass=torch.where(per_head, old.kept_mass, new.kept_mass),
        tail_start=torch.where(keep_old, old.tail_start, new.tail_start),
        overflow=torch.where(per_head, old.overflow, new.overflow),
    )


def _kept_mass(selection: BlockSelection, mass: Tensor) -> Tensor:
    """Share [L, A, Hkv] of mass [L, A, Hkv, n] that a selection attends: its units and all from tail_start on."""
    listed = selection.indices >= 0
    kept = torch.where(listed, mass.gather(-1, selection.indices.clamp(min=0).long()), 0.0).sum(-1)
    unit = torch.arange(mass.shape[-1], device=mass.device) * selection.g
    tail = torch.where(unit >= selection.tail_start[:, None, None], mass, 0.0).sum(-1)
    return (kept + tail) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
