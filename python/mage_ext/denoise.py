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
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mage_ext import sampling
from mage_ext._arguments import check_type, got
from mage_ext._upload import upload
from mage_ext.cache import PagedCache
from mage_ext.carried_lists import CarriedLists
from mage_ext.denoise_config import DenoiseConfig
from mage_ext.paged_forward import NOT_WRITTEN, Emission, PagedForward, Write
from mage_ext.prefill import DenoiseState, check_prompts, check_run, check_seeds, prefill
from mage_ext.results import FinishedBlock, Progress, Result, StepInfo

__all__ = ["BlockStream", "DenoiseConfig", "DenoiseState", "generate", "prefill"]


class BlockStream:
    """Iterator over finished blocks in the order in which they end; `results` holds every request's Result
    afterwards."""

    def __init__(self, state: DenoiseState, blocks: Iterator[FinishedBlock], finish: Callable[[], list[Result]]):
        self.state = state
        self._blocks = blocks
        self._finish = finish
        self._results: list[Result] | None = None
        # A generator that never started runs no `finally` when it is dropped, so its pages go back here.
        weakref.finalize(self, state.batch.release_all).atexit = False

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
            state.seeds = check_seeds(seeds, len(state.prompts))
        check_prompts(model, state.prompts, config.max_new_tokens)
        state.reserve(config.max_new_tokens)
    else:
        state = prefill(model, prompts, config, seeds=seeds, cache=cache, progress=progress)
    state.used = True
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
        event.record(torch.cuda.current_stream(flags.device))
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
            int32. eos_ids: tokens that end a request (host).
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
        self.tokens = upload(tokens, device)
        index = torch.arange(size, device=device)
        per_request = upload([[len(tail) for tail in known], prompt_ends, self.starts], device)[..., None]
        self.open = index >= per_request[0]
        self._may_end = index >= per_request[1]  # EOS of the prompt's tail ends nothing
        self._is_last = index == per_request[1] + config.max_new_tokens - 1
        self.eos_ids = () if config.ignore_eos else tuple(model_config.eos_ids)
        self._eos = upload(self.eos_ids, device, torch.int64)
        self.positions = per_request[2] + index  # [A, Q]
        self.start = per_request[2, :, 0].to(torch.int32)
        self.index = index
        self.ended = torch.zeros(len(self.requests), dtype=torch.bool, device=device)
        self.seeds = upload([state.seeds[request] for request in self.requests], device)
        self.block_table = state.batch.block_table[upload(self.requests, device)]
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
        self.lists = CarriedLists(config)

    def blocks(self) -> Iterator[FinishedBlock]:
        """Blocks as they end; all running requests work on their blocks of one number together."""
        state = self.state
        index = 0
        try:
            while state.running:
                with torch.no_grad():
                    block, finished = self._block(index)
                yield from finished
                with torch.no_grad():
                    self._commit(block, index)
                index += 1
        finally:
            self.progress.clear()
            state.batch.release_all()

    def _block(self, index: int) -> tuple[_Block, list[FinishedBlock]]:
        """Steps until no request has an open position; the block is not committed yet."""
        state, config = self.state, self.config
        block = _Block(state, config, self.sub_block_size)
        plan = [self.lists.plan(request, state.prefix_lens[request]) for request in block.requests]
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
        return block, self._finish_block(block, plan, index)

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
            self.lists.take(block.requests, plan, block.start, mass, forward.emission.stacked_votes())

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
            forward.selection, forward.sparse_lens = self.lists.rows(block.requests), forward.seq_lens
            return "sparse" if ways == {"sparse"} else "mixed"
        forward.exact_lens = forward.seq_lens
        if "sparse" in ways:
            carried = upload([way == "carry" for way in plan], forward.seq_lens.device)
            forward.selection = self.lists.rows(block.requests)
            forward.sparse_lens = torch.where(carried, forward.seq_lens, 0)
            forward.exact_lens = torch.where(carried, 0, forward.seq_lens)
        row_mask = block.mass_rows if self.config.selection.score_rows == "open" else None
        forward.emission = Emission(self.config.selection, row_mask, block.start)
        return "select" if ways == {"select"} else "mixed"

    def _finish_block(self, block: _Block, plan: list[str], index: int) -> list[FinishedBlock]:
        """Reads the block back once: new tokens, ends, costs."""
        state = self.state
        seconds = time.perf_counter() - self.begun
        tokens, ended = block.tokens.tolist(), block.ended.tolist()
        eos = block.eos_ids
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
        lists = self.lists
        listed = kept = tails = None
        if lists.selection is not None and lists.requests == block.requests:
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
        pick = upload(rows, device)
        start = block.start[pick]
        max_seq_len = max(block.starts[row] for row in rows) + size
        forward = PagedForward(state.batch.cache, block.block_table[pick], max_seq_len, [Write(start)], start + size)
        if self.lists.wants_commit_mass:
            forward.selecting, forward.exact_lens = self.layers, forward.seq_lens
            # Votes are for selecting; measuring needs mass alone.
            forward.emission = Emission(dataclasses.replace(self.config.selection, rule="fixed"), None, start)
        hidden = model.hidden(block.tokens[pick], block.positions[pick], forward)
        if forward.emission is not None:
            self.lists.measure(requests, forward.emission.mass())
        self.lists.end_block(requests)
        pending = [[] for _ in requests]
        if model.config.token_shift:
            logits = model.logits(hidden[:, -1])
            pending = [[token] for token in sampling.draw_tokens(logits, mask_id=model.config.mask_id).token.tolist()]
        for row, request, tokens in zip(rows, requests, pending, strict=True):
            state.prefix_lens[request] += size
            state.pending[request] = tokens
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
            lists = None if kind == "exact" else self.lists.selection
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
