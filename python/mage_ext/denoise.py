"""The denoising loop: prefill, then block after block until every request has ended. The one loop of the project.

A block's life: its tokens that are known already (the prompt's tail, or under token shift the token that the previous
logits predict) stand, the others are open; forwards decide open positions until none is left; a commit forward writes
the K/V of the clean block. With mode "mage" the first forward is exact and emits attention mass, one selection follows,
the other forwards are sparse. Which positions are decided is `sampling`'s business, what is listed `selection`'s, how
attention runs `paged_forward`'s.

Inside a block nothing waits for the device, except for one flag that lags a step on CUDA; an extra step it may cost
changes nothing: a request without open positions is an empty slot that neither writes K/V nor draws. What a request
gets does not depend on its batch mates (up to the rounding of matrix products of another height; not even that with
`DenoiseConfig.strict`).

Requests have places in a batch. They leave and join between blocks. On CUDA the phases of a block are graphs
(`step_graphs`) over the tensors of the places (`block_slots`).

Test: pytest tests/python/test_denoise.py
"""

import dataclasses
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mage_ext import profiling, sampling
from mage_ext._arguments import check_type, got
from mage_ext._upload import upload
from mage_ext.block_slots import BlockRow, BlockSlots
from mage_ext.cache import OutOfPages, PagedCache
from mage_ext.carried_lists import CarriedLists
from mage_ext.denoise_config import DenoiseConfig
from mage_ext.paged_forward import (
    MAX_ROWS,
    NOT_WRITTEN,
    STRICT_SPARSE_SPLIT,
    STRICT_SPLIT,
    Emission,
    PagedForward,
    Write,
)
from mage_ext.prefill import DenoiseState, check_length, check_run, check_seeds, new_state, prefill, prefill_requests
from mage_ext.results import FinishedBlock, Progress, Result, StepInfo
from mage_ext.selection import BlockSelection
from mage_ext.step_functions import StepRows
from mage_ext.step_graphs import StepGraphs
from mage_ext.token_candidates import Candidates

__all__ = ["BlockStream", "DenoiseConfig", "DenoiseState", "StepGraphs", "generate", "prefill"]

# Logits that exist at a time; draws at a temperature take about 16 times their memory, in float32 and int64.
_LOGIT_BYTES = 256 << 20
_DRAWN_FACTOR = 16
MAX_REQUESTS = 1 << 16  # that run at a time


class BlockStream:
    """Iterator over finished blocks in the order in which they end; `results` holds every request's Result
    afterwards. Left early, `close` (or the end of a with block) gives pages and graphs back."""

    def __init__(
        self,
        state: DenoiseState,
        blocks: Iterator[FinishedBlock],
        finish: Callable[[], list[Result]],
        give_back: Callable[[], None],
    ):
        self.state = state
        self._blocks = blocks
        self._finish = finish
        self._results: list[Result] | None = None
        self._error: BaseException | None = None
        # A generator that never started runs no `finally` when it is dropped, so its pages go back here.
        self._finalizer = weakref.finalize(self, give_back)
        self._finalizer.atexit = False

    def __iter__(self) -> "BlockStream":
        return self

    def __next__(self) -> FinishedBlock:
        if self._error is not None:
            raise self._failed()
        try:
            return next(self._blocks)
        except StopIteration:
            if self._results is None and self._finalizer.alive:
                self._results = self._finish()
            raise
        except BaseException as error:
            self._error = error
            raise

    def __enter__(self) -> "BlockStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the generation; there are no results if blocks were to come."""
        self._blocks.close()
        self._finalizer()

    @property
    def results(self) -> list[Result]:
        """One per request. Raises RuntimeError while blocks are to come, and after an error or an early close."""
        if self._error is not None:
            raise self._failed()
        if self._results is None:
            what = "still running" if self._finalizer.alive else "closed before its end"
            raise RuntimeError(f"BlockStream: results must be read after the last block, got one {what}")
        return self._results

    def _failed(self) -> RuntimeError:
        error = RuntimeError(f"BlockStream: must not be used after an error, got {type(self._error).__name__} before")
        error.__cause__ = self._error
        return error


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]] | DenoiseState,
    config: DenoiseConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    stream: bool = False,
    cache: PagedCache | None = None,
    max_batch: int | None = None,
    graphs: StepGraphs | None = None,
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
        max_batch: requests that run at a time. The others wait, in order, for a place and for pages, and join between
            two blocks; refused is who finds too few pages where nobody else runs. None: all at once, and refused is who
            finds too few pages beside the others.
        graphs: CUDA graphs of earlier calls with the same model and cache, to go on with; of one generation at a time.
            None: those of this call.
        tokenizer: with `decode(ids)`, for Result.text.
    Returns:
        One Result per request, in order; with stream, a BlockStream that has them at its end.
    Raises:
        ValueError, TypeError: naming the argument.
    Example:
        loaded = mage_ext.models.load("path/to/model")
        prompt = loaded.tokenizer.chat([{"role": "user", "content": "Hello"}])
        print(generate(loaded.model, [prompt], tokenizer=loaded.tokenizer)[0].text)
    """
    config = check_run("generate", model, config, cache)
    if callback is not None and not callable(callback):
        raise TypeError(f"generate: callback must be callable or None, got {got(callback)}")
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(f"generate: tokenizer must have decode(ids) or be None, got {got(tokenizer)}")
    for name, value in (("stream", stream), ("progress", progress)):
        check_type("generate", name, value, bool, "a bool")
    is_number = isinstance(max_batch, int) and not isinstance(max_batch, bool)
    if max_batch is not None and not (is_number and 1 <= max_batch <= MAX_REQUESTS):
        raise ValueError(f"generate: max_batch must be an integer in [1, {MAX_REQUESTS}] or None, got {got(max_batch)}")
    if graphs is not None:
        check_type("generate", "graphs", graphs, StepGraphs, "a StepGraphs or None")
    layers = config.selecting_layers(model.config.num_layers)
    sub_block_size = config.sub_block_size or model.config.sub_block_size or model.config.block_size
    if config.fuse_commit and model.config.token_shift:
        raise ValueError("generate: fuse_commit must be off for a model with token shift, got True")
    if config.fuse_commit and 2 * model.config.block_size > MAX_ROWS:
        raise ValueError(
            f"generate: fuse_commit must be off for blocks beyond {MAX_ROWS // 2} tokens, got {model.config.block_size}"
        )
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
            seeds = check_seeds("generate", seeds, len(state.prompts))
        for index, prompt in enumerate(state.prompts):
            check_length("generate", model, index, prompt, config.max_new_tokens)
    else:
        state = new_state("generate", model, prompts, config, seeds, cache, max_batch)
    graphs = StepGraphs() if graphs is None else graphs
    run = _Run(state, config, layers, sub_block_size, max_batch, graphs, callback, Progress(progress))
    if state is prompts and seeds is not None:
        state.seeds = seeds
    state.used = True

    def finish() -> list[Result]:
        return [_result(state, request, tokenizer) for request in range(len(state.prompts))]

    with profiling.span("generate"):
        try:
            if config.method is not None and any(state.filled):
                config.method.prepare()
            if max_batch is None:
                state.reserve(config.max_new_tokens)
                run.prefill([request for request in state.running if not state.filled[request]])
        except BaseException:
            run.give_back()
            raise
        blocks = BlockStream(state, run.blocks(), finish, run.give_back)
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
        """flags: [A, n], bool."""
        if not self._cuda:
            self._queue.append((flags.clone(), None))
            return
        self._queue.append(_copy_to_host(flags))

    def read(self) -> list[list[bool]] | None:
        """The flags of `lag` pushes ago; None if there are none yet."""
        if len(self._queue) <= self.lag:
            return None
        flags, event = self._queue.pop(0)
        if event is not None:
            event.synchronize()
        return flags.tolist()


def _copy_to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and the event after which it holds the values."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return copy, event


class _Outcome:
    """What the host wants to know of a finished block, on its way to the host.

    Fields: commit_mass: [L, A, Hkv, n], of the commit that follows, where it measures.
    """

    def __init__(self, **tensors: Tensor):
        self.commit_mass: Tensor | None = None
        self._copies = {
            name: _copy_to_host(tensor) if tensor.is_cuda else (tensor.clone(), None)
            for name, tensor in tensors.items()
        }

    def wait(self) -> dict[str, list]:
        """The tensors as lists, by name."""
        for _, event in self._copies.values():
            if event is not None:
                event.synchronize()
        return {name: copy.tolist() for name, (copy, _) in self._copies.items()}


@dataclass(frozen=True)
class _Variant:
    """What decides which kernels a step launches.

    Fields:
        exact, sparse, method: some request is attended so in the selecting layers; none: these are dense.
        emits: mass. fused: the block before is sent, too, and committed. narrow: sub-blocks alone are sent.
        later: under the sub-block cache, behind the block's first exact_steps steps. capacity: of the lists, 0 without.
    """

    exact: bool = False
    sparse: bool = False
    method: bool = False
    emits: bool = False
    fused: bool = False
    narrow: bool = False
    later: bool = False
    capacity: int = 0


class _Run:
    """One generation over a state: the blocks, and within a block the steps."""

    def __init__(
        self,
        state: DenoiseState,
        config: DenoiseConfig,
        layers: dict[int, int],
        sub_block_size: int,
        max_batch: int | None,
        graphs: StepGraphs,
        callback: Callable[[StepInfo], None] | None,
        progress: Progress,
    ):
        self.state = state
        self.config = config
        self.layers = layers
        self.sub_block_size = sub_block_size
        self.max_batch = max(len(state.running), 1) if max_batch is None else max_batch
        self.graphs = graphs
        self.callback = callback
        self.progress = progress
        self.begun = time.perf_counter()
        self.lists = CarriedLists(config)
        self.slots: BlockSlots | None = None  # of the last block
        self.waiting = deque(state.running)
        self.active: list[int] = []
        self._bound_lists: BlockSelection | None = None  # what the graphs' lists hold
        graphs.take(self)
        try:
            self._bind()
        except ValueError:
            graphs.leave(self)
            raise

    def give_back(self) -> None:
        """Returns the pages of all requests, and the graphs to whoever comes next."""
        self.progress.clear()
        self.state.batch.release_all()
        self.graphs.leave(self)

    def _bind(self) -> None:
        """Graphs and tensors of the cache's pools as they are now."""
        state = self.state
        longest = state.longest(self.config.max_new_tokens)
        self.graphs.bind(state.model, state.batch.cache, self.config, longest)

    def prefill(self, requests: list[int]) -> None:
        """Commits the prompts of requests that have pages."""
        self._bind()
        with torch.no_grad(), profiling.span("prefill"):
            prefill_requests(self.state, requests, self.config, self.graphs, self.progress)
        self.begun = time.perf_counter()

    def blocks(self) -> Iterator[FinishedBlock]:
        """Blocks as they end; all running requests work on their blocks together."""
        index = 0
        try:
            while self._admit():
                with torch.no_grad(), profiling.span("block"):
                    slots, plan, outcome = self._block(index)
                    finished = self._finish_block(slots, plan, outcome, index)
                yield from finished
                index += 1
        finally:
            self.give_back()

    def _admit(self) -> bool:
        """Lets waiting requests in for whom there are places and pages; False when nobody runs any more."""
        state = self.state
        self.active = [request for request in self.active if state.finish[request] is None]
        new: list[int] = []
        while self.waiting and len(self.active) + len(new) < self.max_batch:
            request = self.waiting[0]
            if state.finish[request] is None:
                try:
                    state.reserve_pages(request, self.config.max_new_tokens)
                except OutOfPages as error:
                    if self.active or new:
                        break  # pages come back when a request ends
                    state.refuse(request, error)
                else:
                    new.append(request)
            self.waiting.popleft()
        unfilled = [request for request in new if not state.filled[request]]
        if unfilled:
            begun, before = self.begun, time.perf_counter()
            self.prefill(unfilled)
            self.begun = begun + time.perf_counter() - before
        else:
            self._bind()  # the cache may have grown, for these or for another generation on it
        self.active += new
        return bool(self.active)

    def _places(self) -> int:
        """Places of the next block: what runs, or a size that more batches share."""
        if self.config.strict:
            return self.max_batch
        count = len(self.active)
        if not self.graphs.enabled:
            return count
        return min(1 << (count - 1).bit_length(), max(self.max_batch, count))

    def _begin(self, index: int) -> tuple[BlockSlots, list[str]]:
        """The next block of every active request, in slots of their number."""
        state, config, model_config = self.state, self.config, self.state.model.config
        device = state.batch.cache.device
        size, num_places = model_config.block_size, self._places()
        eos_ids = () if config.ignore_eos else tuple(model_config.eos_ids)
        slots = self.graphs.keep(
            ("slots", num_places),
            lambda: BlockSlots(
                num_places,
                size,
                self.sub_block_size,
                mask_id=model_config.mask_id,
                eos_ids=eos_ids,
                token_shift=model_config.token_shift,
                sampler=config.sampler,
                compile=state.model.compiled,
                device=device,
            ),
        )
        places = {} if self.slots is None else {r: place for place, r in enumerate(self.slots.requests)}
        rows: list[BlockRow | None] = []
        for request in self.active:
            prompt_end = max(len(state.prompts[request]) - state.prefix_lens[request], 0)
            rows.append(
                BlockRow(
                    request=request,
                    start=state.prefix_lens[request],
                    known=state.pending[request],
                    prompt_end=prompt_end,
                    last=prompt_end + config.max_new_tokens - len(state.outputs[request]) - 1,
                    seed=state.seeds[request],
                    predicted_in=places[request] if state.predicted[request] else None,
                    uncommitted_in=places[request] if state.uncommitted[request] else None,
                )
            )
        plan = [self.lists.plan(row.request, row.start) for row in rows]
        vacant = num_places - len(rows)
        table = state.batch.block_table[upload(self.active, device)]
        longest = max(row.start for row in rows) + size
        if self.graphs.enabled:
            longest = self.graphs.bound
            width = state.batch.cache.pages_for(longest)
            table = table[:, :width]
            table = torch.nn.functional.pad(table, (0, width - table.shape[1], 0, vacant), value=-1)
        elif vacant:
            table = torch.nn.functional.pad(table, (0, 0, 0, vacant), value=-1)
        rows += [None] * vacant
        plan += ["exact"] * vacant
        slots.stage(rows, [way == "carry" for way in plan], table, longest, self.slots)
        self.graphs.run(("begin", num_places), slots.begin)
        self.slots = slots
        return slots, plan

    def _block(self, index: int) -> tuple[BlockSlots, list[str], _Outcome]:
        """Steps until no request has an open position, then the commit of those that go on."""
        config = self.config
        slots, plan = self._begin(index)
        flags = _LaggingFlags(slots.tokens.device)
        flags.push(slots.flags)
        num_steps = self._max_steps(slots)
        if config.sub_block_cache:
            # A request may sit a forward out for each of its sub-blocks.
            num_steps += flags.lag * (self.state.model.config.block_size // self.sub_block_size)
        narrow, goes_on = False, True
        for step in range(num_steps):
            seen = flags.read()
            if seen is not None:
                live, first_open, ended = zip(*seen, strict=True)
                goes_on = not all(ended)
                if not any(live):
                    break
                # Those that sit a narrow forward out must not miss the one that selects.
                narrow = config.sub_block_cache and step >= config.exact_steps and not any(first_open)
            self.progress.show(f"block {index}, forward {step}, {len(self.active)} requests")
            self._step(slots, plan, index, step, narrow)
            flags.push(slots.flags)
        if not flags.lag:
            goes_on = not all(slots.ended.tolist())
        with profiling.span("outcome"):
            tensors = {"tokens": slots.tokens, "ended": slots.ended, "blank": slots.blank, "steps": slots.steps}
            if self.lists.selection is not None and self.lists.requests == slots.requests:
                selection = self.lists.selection
                tensors |= {"listed": selection.counts.sum((0, 2)) * selection.g, "tails": selection.tail_start}
                tensors["kept"] = selection.kept_mass.mean((0, 2))
                if self.lists.proven is not None:
                    tensors["proven"] = self.lists.proven.float().mean((0, 2))
            outcome = _Outcome(**tensors)
        if (
            not config.fuse_commit
            and goes_on
            and any(row is not None and row.last >= slots.block_size for row in slots.rows)
        ):
            outcome.commit_mass = self._commit(slots, index)
        return slots, plan, outcome

    def _max_steps(self, slots: BlockSlots) -> int:
        """Forwards after which every open position is decided for certain."""
        size, sub = slots.block_size, self.sub_block_size
        counts = [0]
        for row in slots.rows:
            if row is not None:
                known = len(row.known) + (row.predicted_in is not None)
                opens = [end - max(known, end - sub) for end in range(sub, size + 1, sub) if end > known]
                counts.append(sum(self.config.sampler.max_forwards(num_open) for num_open in opens))
        return max(counts)

    def _step(self, slots: BlockSlots, plan: list[str], index: int, step: int, narrow: bool) -> None:
        """One forward of all live requests, and the selection that follows the first."""
        variant = self._variant(slots, plan, step, narrow)
        with profiling.span("lists"):
            lists = self._lists(slots, variant) if variant.sparse else None
        kind = self._kind(plan, step)
        with profiling.span("step", kind):
            decided, emission = self.graphs.run(
                ("step", slots.num_places, variant), lambda: self._forward(slots, variant, lists)
            )
        if emission is not None:
            mass = emission.mass
            with profiling.span("select_kv"):
                self.lists.take(slots.requests, plan, slots.start, mass, emission.votes, emission.candidates)
        num_rows = self.sub_block_size if narrow else slots.block_size
        self._tell(slots, index, step, kind, num_rows, decided, emission)

    def _kind(self, plan: list[str], step: int) -> str:
        """For the callback."""
        ways = {self._way(way, step) for way in plan[: len(self.active)]}
        return ways.pop().replace("method", "sparse") if len(ways) == 1 else "mixed"

    def _way(self, way: str, step: int) -> str:
        """How a request with this plan is attended in a step."""
        if way != "select":
            return "sparse" if way == "carry" else way
        last_exact = self.config.exact_steps - 1
        return "exact" if step < last_exact else "select" if step == last_exact else "sparse"

    def _variant(self, slots: BlockSlots, plan: list[str], step: int, narrow: bool) -> _Variant:
        config = self.config
        ways = {self._way(way, step) for way in plan[: len(self.active)]}
        strict = config.strict and config.mode == "mage"
        if strict and step >= config.exact_steps:
            # Requests that are exact go through the lists' kernel, whoever their mates are.
            ways = {"sparse"}
            num_kv_heads = self.state.model.config.num_kv_heads
            self.lists.start_empty(slots.requests, len(self.layers), num_kv_heads, slots.start.device)
        parts = {"narrow": narrow, "later": config.sub_block_cache and step >= config.exact_steps}
        parts["fused"] = step == 0 and any(row is not None and row.uncommitted_in is not None for row in slots.rows)
        if not self.layers or ways == {"exact"}:
            return _Variant(**parts)
        if ways == {"method"}:
            return _Variant(method=True, **parts)
        if "select" not in ways and "sparse" not in ways:
            return _Variant(**parts)
        if ways == {"exact", "sparse"} and (strict or ("select" in plan and step < config.exact_steps - 1)):
            # Before they select, requests are exact while others already go by the lists that they carry.
            capacity = self.lists.rows(slots.requests).capacity
            return _Variant(exact=True, sparse=True, capacity=capacity, **parts)
        if "select" not in ways:
            # Lists of requests that are exact start at tail 0: they attend everything.
            return _Variant(sparse=True, capacity=self.lists.rows(slots.requests).capacity, **parts)
        if "sparse" not in ways:
            return _Variant(exact=True, emits=True, **parts)
        capacity = self.lists.rows(slots.requests).capacity
        return _Variant(exact=True, sparse=True, emits=True, capacity=capacity, **parts)

    def _lists(self, slots: BlockSlots, variant: _Variant) -> BlockSelection:
        """The lists of the slots' requests, in tensors that graphs may read."""
        selection = self.lists.rows(slots.requests)
        if not self.graphs.enabled:
            return selection
        names = ("indices", "counts", "kept_mass", "tail_start", "overflow")
        key = ("lists", slots.num_places, variant.capacity)
        kept = self.graphs.keep(
            key,
            lambda: dataclasses.replace(selection, **{name: getattr(selection, name).clone() for name in names}),
        )
        if self._bound_lists is not selection:
            for name in names:
                getattr(kept, name).copy_(getattr(selection, name))
            self._bound_lists = selection
        return kept

    def _forward(
        self, slots: BlockSlots, variant: _Variant, lists: BlockSelection | None
    ) -> tuple[Tensor, "_Emitted | None"]:
        """A step on the device: rows, attention, draws, decisions. Returns what was decided, [A, Q], bool, and what the
        forward emitted."""
        config, model = self.config, self.state.model

        # 1. Which rows are sent and whose K/V they replace.
        rows = slots.rows_of_step(
            narrow=variant.narrow,
            later=variant.later,
            fused=variant.fused,
            both_kinds=variant.exact and variant.sparse,
            all_rows_count=config.selection.score_rows == "all",
        )
        num_written = slots.block_size if variant.fused else slots.sub_block_size
        writes = [Write(start, first_row, num_written) for start, first_row in rows.writes]

        # 2. The forward, exact or sparse per request.
        forward = self._paged(slots, writes, rows.seq_lens)
        forward.kv_lens = rows.kv_lens
        if variant.exact or variant.sparse or variant.method:
            forward.selecting, forward.selection = self.layers, lists
        if variant.exact:
            forward.exact_lens = rows.exact_lens if variant.sparse else rows.seq_lens
        if variant.sparse:
            forward.sparse_lens = rows.sparse_lens if variant.exact else rows.seq_lens
        if variant.emits:
            forward.emission = Emission(config.selection, rows.row_mask, slots.start)
        hidden = model.hidden(rows.tokens, rows.positions, forward)

        # 3. Draws for the positions that may be decided.
        with profiling.span("draw"):
            draws = self._draw(hidden.flatten(0, 1), rows, slots)

        # 4. Decisions.
        decided = slots.decide(draws, rows.candidates, rows.live)
        emission = forward.emission
        if emission is None:
            return decided, None
        candidates = emission.candidates()
        mass = emission.mass() if candidates is None else candidates.unit_mass
        return decided, _Emitted(mass, emission.stacked_votes(), candidates)

    def _draw(self, hidden: Tensor, rows: StepRows, slots: BlockSlots) -> sampling.Draws:
        """Draws [A, sub_block_size] from hidden states [A * R, hidden]."""
        keys = [key.flatten() for key in (rows.seeds, rows.drawn_positions, rows.steps)]
        drawn = None if rows.drawn is None else rows.drawn.flatten()
        chosen = None
        if hidden.device.type == "cpu" and not self.config.strict:
            # Rows that may be decided alone. Elsewhere all, since their number is known on the device only; strict:
            # sums of a product may depend on how many rows it has.
            window = rows.drawn_positions - slots.positions[:, :1]
            chosen = rows.candidates.gather(1, window).flatten().nonzero().squeeze(1)
            drawn = chosen if drawn is None else drawn[chosen]
            keys = [key[chosen] for key in keys]
        draws = self._draw_rows(hidden if drawn is None else hidden.index_select(0, drawn), *keys)
        if chosen is not None:
            draws = [x.new_zeros(rows.steps.numel()).index_copy(0, chosen, x) for x in draws]
        return sampling.Draws(*(x.view(rows.steps.shape) for x in draws))

    def _draw_rows(self, hidden: Tensor, seeds: Tensor, positions: Tensor, steps: Tensor) -> sampling.Draws:
        """Draws for hidden states [N, hidden] with the keys [N]."""
        model, sampler = self.state.model, self.config.sampler
        row_bytes = model.config.vocab_size * hidden.element_size() * (_DRAWN_FACTOR if sampler.temperature > 0 else 1)
        at_a_time = max(_LOGIT_BYTES // row_bytes, 32)
        parts = []
        for begin in range(0, max(len(hidden), 1), at_a_time):
            part = slice(begin, begin + at_a_time)
            with profiling.span("logits"):
                logits = model.logits(hidden[part])
            parts.append(
                sampling.draw_tokens(
                    logits,
                    mask_id=model.config.mask_id,
                    temperature=sampler.temperature,
                    top_k=sampler.top_k,
                    top_p=sampler.top_p,
                    seeds=seeds[part],
                    positions=positions[part],
                    step=steps[part],
                    overwrite=True,
                )
            )
            del logits  # before the next part has its own
        return parts[0] if len(parts) == 1 else sampling.Draws(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def _paged(self, slots: BlockSlots, writes: list[Write], seq_lens: Tensor) -> PagedForward:
        forward = PagedForward(self.state.batch.cache, slots.block_table, slots.max_seq_len, writes, seq_lens)
        forward.method, forward.prefix_lens = self.config.method, slots.start
        if self.config.strict:
            forward.split_tokens, forward.sparse_split_tokens = STRICT_SPLIT, STRICT_SPARSE_SPLIT
        return forward

    def _finish_block(self, slots: BlockSlots, plan: list[str], outcome: _Outcome, index: int) -> list[FinishedBlock]:
        """Reads the block back once: new tokens, ends, costs."""
        state, config = self.state, self.config
        size = slots.block_size
        values = outcome.wait()
        seconds = time.perf_counter() - self.begun
        eos_ids = () if config.ignore_eos else state.model.config.eos_ids
        finished, going_on = [], []
        for place, row in enumerate(slots.rows):
            if row is None:
                continue
            request = row.request
            stats = state.stats[request]
            self._count(row, plan[place], {name: value[place] for name, value in values.items()})
            if plan[place] == "select" and values["steps"][place] < config.exact_steps:
                self.lists.forget(request)  # it ended before it could select
            new = values["tokens"][place][row.prompt_end :]
            ended = values["ended"][place]
            if values["blank"][place]:
                new, ended = [], True
                why = (
                    f"the model must give logits above -inf, got a row of block {state.blocks[request]} without (NaN?)"
                )
                state.end(request, "failed", why)
            elif ended:
                room = config.max_new_tokens - len(state.outputs[request])
                ends = [i + 1 for i, token in enumerate(new) if token in eos_ids]
                new = new[: min([room, *ends])]
                state.end(request, "eos" if new[-1] in eos_ids else "length")
            else:
                going_on.append(request)
                state.prefix_lens[request] += size
                state.pending[request] = []
                state.predicted[request] = state.model.config.token_shift
                state.uncommitted[request] = config.fuse_commit
                stats.forwards["commit"] += not config.fuse_commit
            state.outputs[request] += new
            stats.seconds = seconds
            finished.append(FinishedBlock(request, state.blocks[request], new, ended, state.errors[request]))
            state.blocks[request] += 1
        if outcome.commit_mass is not None:
            self.lists.measure(slots.requests, outcome.commit_mass)
        self.lists.end_block(going_on)
        return finished

    def _count(self, row: BlockRow, way: str, values: dict) -> None:
        """Adds a block's forwards, kept mass and bytes of K/V to the request's statistics."""
        cache, config = self.state.batch.cache, self.state.model.config
        stats, count = self.state.stats[row.request], values["steps"]
        length = row.start + config.block_size
        whole = length * config.num_layers * config.num_kv_heads
        commits = not values["ended"] and not self.config.fuse_commit
        stats.kv_bytes += commits * whole * cache.token_bytes
        stats.kv_bytes_exact += (count + commits) * whole * cache.token_bytes
        if not count:
            return
        exact_steps = min(self.config.exact_steps, count) if way == "select" else 0
        sparse_steps = 0 if way == "exact" else count - exact_steps
        selected = way == "select" and count >= self.config.exact_steps
        stats.forwards["exact"] += count if way == "exact" else exact_steps - selected
        stats.forwards["select"] += selected
        stats.forwards["sparse"] += sparse_steps
        sparse = 0
        if sparse_steps:
            dense = (config.num_layers - len(self.layers)) * length * config.num_kv_heads
            heads = len(self.layers) * config.num_kv_heads
            if way == "method":
                sparse = dense + round(self.config.method.tokens_read(row.start, length) * heads)
            else:
                sparse = dense + values["listed"] + (length - values["tails"]) * heads
        stats.kv_bytes += ((count - sparse_steps) * whole + sparse_steps * sparse) * cache.token_bytes
        if selected:
            stats.kept_mass.append(values["kept"])
            if "proven" in values:
                stats.proven.append(values["proven"])

    def _commit(self, slots: BlockSlots, index: int) -> Tensor | None:
        """Writes the clean block's K/V of the requests that go on; under token shift its last logits give the next
        first token. Returns its mass [L, A, Hkv, n] if that is wanted."""
        measures = self.lists.wants_commit_mass
        with profiling.span("step", "commit"):
            mass = self.graphs.run(
                ("commit", slots.num_places, measures), lambda: self._commit_forward(slots, measures)
            )
        if self.callback is not None:
            self._tell(slots, index, -1, "commit", slots.block_size, torch.zeros_like(slots.open), None)
        return mass

    def _commit_forward(self, slots: BlockSlots, measures: bool) -> Tensor | None:
        """The commit on the device. Returns its mass [L, A, Hkv, n] if it measures."""
        model = self.state.model
        starts = torch.where(slots.ended, NOT_WRITTEN, slots.start)
        seq_lens = torch.where(slots.ended, 0, slots.start + slots.block_size)
        forward = self._paged(slots, [Write(starts)], seq_lens)
        forward.final = True
        if measures:
            forward.selecting, forward.exact_lens = self.layers, seq_lens
            # Votes and candidates are for selecting; measuring needs the mass of what is listed, wherever it is.
            config = dataclasses.replace(self.config.selection, rule="fixed", candidates=None)
            forward.emission = Emission(config, None, slots.start)
        hidden = model.hidden(slots.tokens, slots.positions, forward)
        if model.config.token_shift:
            with profiling.span("logits"):
                logits = model.logits(hidden[:, -1])
            with profiling.span("draw"):
                draws = sampling.draw_tokens(logits, mask_id=model.config.mask_id, overwrite=True)
                slots.next_token.copy_(draws.token)
        return forward.emission.mass() if measures else None

    def _tell(
        self,
        slots: BlockSlots,
        index: int,
        step: int,
        kind: str,
        rows: int,
        decided: Tensor,
        emission: "_Emitted | None",
    ) -> None:
        if self.callback is None:
            return
        lists = None if kind in ("exact", "commit") else self.lists.selection
        starts = [0 if row is None else row.start for row in slots.rows]
        candidates = None if emission is None else emission.candidates
        self.callback(
            StepInfo(
                index,
                step,
                kind,
                rows,
                slots.requests,
                starts,
                slots.tokens,
                torch.zeros_like(slots.open) if kind == "commit" else slots.open,
                decided,
                lists,
                None if emission is None or candidates is not None else emission.mass,
                candidates,
            )
        )


@dataclass(frozen=True)
class _Emitted:
    """Mass [L, A, Hkv, n] of a forward, its votes for rule "layer", and its candidates where they are wanted."""

    mass: Tensor
    votes: tuple[Tensor, Tensor, Tensor] | None
    candidates: Candidates | None
