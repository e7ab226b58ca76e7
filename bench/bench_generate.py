"""Whole generations at full model size: block times, forwards by kind and tokens per second, beside their ceilings.

    python bench/bench_generate.py [--rows 7B:4:64K] [--steps 32,16,8] [--k 1024] [--g 64] [--methods ...]
        [--fa3 _vllm_fa3_C.abi3.so] [--out bench/results/h100/generate.json]

Weights are random and so are the prefix's K and V: right for speed, the text means nothing. Every row is one loop
(mage_ext.denoise), its phases captured as CUDA graphs, products by cuBLAS, norms, rotary and activation by
torch.compile. A block is T - 1 forwards under token shift, whose first position is known, else T, and its commit; T is
forced by a static sampler. Times are from one commit to the next, so everything between two blocks is in them.

Methods: exact and mage, everywhere with the largest and the smallest T. In the rows of SHOWN every T, dense layers and
FA3: exact with FlashAttention-3 in place of our kernel, in the same graphs, with the number of splits that is fastest
there; FlashInfer, composed: our exact block with the time of our attention replaced by FlashInfer's, both measured over
the layers of the same cache; mage fused: the commit in one forward with the next block's first (families without
shift); mage carried: lists of a block serve the next three, too; quest, tidal and sparsed at the same K and g;
autoregressive: a forward per token, for as many tokens as a block has; published: Fast-dLLM v2's own loop in eager
torch (1 x 16K).
floor = every forward at the floor of its products (weights, inputs, outputs / 3.05 TB/s or flops / 700 TFLOP/s) plus
that of its attention. The ceiling of a ratio is the ratio of floors; the share says how much of it was reached.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from cuda_timing import capture, median_us
from gpu_bench import finish, gpu_name
from peers import FLASHINFER_TOKENS, Absent, Fa3, reason_of

from mage_ext import ops
from mage_ext.cache import PagedCache, RaggedBatch
from mage_ext.denoise import DenoiseConfig, StepGraphs
from mage_ext.evaluation import baselines, dense_loops
from mage_ext.evaluation.speed import (
    BlockTimes,
    attention_floor_us,
    block_floor_ms,
    bytes_per_token,
    measure_blocks,
    products_floor_us,
    random_cache,
    tokens_per_step,
)
from mage_ext.models.config import ModelConfig
from mage_ext.models.geometry import GEOMETRIES, random_model
from mage_ext.models.transformer import Transformer
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig

CONTEXTS = {"4K": 4096, "16K": 16384, "32K": 32768, "64K": 65536, "128K": 131072}
BATCHES = (1, 4, 8, 16)
BATCHES_IN_ORDER = (1, 8, 16, 4)  # of their turn, where time is short
BLOCKS = 3
SPARE_BYTES = 9 * 2**30  # for masses, logits, graphs and peers beside weights and cache
FA3_SPLITS = (0, 1, 2, 4, 8, 16)
# Where every method runs: MODEL:BATCH:CONTEXT.
SHOWN = ("1.5B:1:16K", "1.5B:8:128K", "7B:1:32K", "7B:4:64K", "8B:4:64K")
METHODS = ("fa3", "flashinfer", "baselines")


@dataclasses.dataclass(frozen=True)
class Place:
    """A model, a batch and a context."""

    model: str
    batch: int
    context_name: str

    @property
    def context(self) -> int:
        return CONTEXTS[self.context_name]

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch} x {self.context_name}"

    @property
    def shown(self) -> bool:
        return any(self.matches(pattern) for pattern in SHOWN)

    def matches(self, pattern: str) -> bool:
        """pattern: MODEL:BATCH:CONTEXT, parts may be left out."""
        parts = (pattern.split(":") + [""] * 3)[:3]
        return all(
            not part or part == own
            for part, own in zip(parts, (self.model, str(self.batch), self.context_name), strict=True)
        )


def config_of(mode: str, steps: int, block: int, k: int = 1024, g: int = 64, dense: int = 0) -> DenoiseConfig:
    """A run with T forced by the sampler."""
    return DenoiseConfig(
        mode=mode,
        dense_layers=tuple(range(dense)),
        sampler=SamplerConfig("low_confidence_static", tokens_per_step=tokens_per_step(block, steps)),
        selection=SelectionConfig(k=k, g=g),
    )


def fa3_attention(fa3: Fa3, num_splits: int) -> Callable:
    """FlashAttention-3 with the arguments of ops.block_attention, as far as the loop uses them in exact steps."""

    def attend(q, k_cache, v_cache, block_table, seq_lens, *, max_seq_len, kv_lens=None, split_tokens=0):
        if kv_lens is not None or split_tokens:
            raise Absent("has no kv_lens and no fixed splits")
        batch, q_len = q.shape[:2]
        rows = q.reshape(batch * q_len, *q.shape[2:])
        starts = torch.arange(0, batch * q_len + 1, q_len, dtype=torch.int32, device=q.device)
        values = dict(q=rows, k=k_cache, v=v_cache, out=torch.empty_like(rows), page_table=block_table)
        values |= dict(seqused_k=seq_lens, cu_seqlens_q=starts, max_seqlen_q=q_len, max_seqlen_k=max_seq_len)
        values |= dict(softmax_scale=q.shape[-1] ** -0.5, is_causal=False, window_size_left=-1, window_size_right=-1)
        values |= dict(softcap=0.0, is_rotary_interleaved=False, num_splits=num_splits, pack_gqa=True, sm_margin=0)
        values |= dict(cp_world_size=1, cp_rank=0)
        out = fa3._op(*(values.get(name) for name in fa3._names))[0]
        return out.view(q.shape), None

    return attend


@contextlib.contextmanager
def exact_attention(attend: Callable) -> Iterator[None]:
    """Within it, `attend` stands in for ops.block_attention."""
    own = ops.block_attention
    ops.block_attention = attend
    try:
        yield
    finally:
        ops.block_attention = own


def attention_ms(model: Transformer, cache: PagedCache, place: Place, flashinfer: bool) -> float:
    """Milliseconds of the exact attention of one forward, over all layers of the cache: ours or FlashInfer's, whose
    release 0.6.4 reads invalid addresses in large batches and gets them in equal parts."""
    config, device = model.config, cache.device
    size, parts = config.block_size, 1
    while flashinfer and place.batch // parts * place.context >= FLASHINFER_TOKENS and parts < place.batch:
        parts *= 2
    batch = place.batch // parts
    length = place.context + size
    pages = cache.pages_for(length)
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    q = torch.randn(batch, size, config.num_heads, config.head_dim, device=device, dtype=cache.dtype)
    if flashinfer:
        import flashinfer as package

        as_int = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        wrapper.plan(
            as_int([b * size for b in range(batch + 1)]),
            as_int([b * pages for b in range(batch + 1)]),
            table.flatten(),
            as_int([(length - 1) % cache.page_size + 1] * batch),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            cache.page_size,
            causal=False,
            q_data_type=cache.dtype,
            kv_data_type=cache.dtype,
        )
        rows = q.flatten(0, 1)
        calls = [lambda i=i: wrapper.run(rows, cache.layer(i)) for i in range(config.num_layers)]
    else:
        lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        calls = [
            lambda i=i: ops.block_attention(q, *cache.layer(i), table, lens, max_seq_len=length)
            for i in range(config.num_layers)
        ]
    return median_us({"calls": capture(calls)}, 5)["calls"] * config.num_layers * parts / 1e3


def autoregressive_floor_ms(config: ModelConfig, place: Place) -> float:
    """Of as many tokens as a block has, one forward each."""
    products = products_floor_us(config, place.batch, place.batch)
    attention = config.num_layers * attention_floor_us(config, place.batch, 1, place.context + config.block_size)
    return config.block_size * (products + attention) / 1e3


class Bench:
    """The rows of one model."""

    def __init__(self, args: argparse.Namespace, name: str, places: list[Place]):
        self.args = args
        self.name = name
        self.model = random_model(name, device="cuda").optimize(compile=not args.no_compile)
        self.rows: list[dict] = []
        config = self.model.config
        token = bytes_per_token(config)
        free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
        room = BLOCKS * config.block_size + 64
        self.places, self.left_out = [], []
        for place in places:
            tokens = place.batch * (place.context + room)
            (self.places if tokens * token <= free else self.left_out).append(place)
        most = max((place.batch * (place.context + room) for place in self.places), default=0)
        self.cache = random_cache(self.model, num_tokens=most + 64 * 64)

    def forwards(self, steps: int) -> int:
        """Of a block with T = steps, without the commit."""
        return steps - (steps == self.model.config.block_size and self.model.config.token_shift)

    def measure(self, place: Place, config: DenoiseConfig, graphs: StepGraphs) -> BlockTimes:
        return measure_blocks(
            self.model, self.cache, config, batch=place.batch, context=place.context, blocks=BLOCKS, graphs=graphs
        )

    def row(
        self,
        place: Place,
        method: str,
        steps: int,
        times: BlockTimes | None,
        block_ms: float,
        dense: int,
        peer: str,
        peer_ms: float | None,
        **extra,
    ) -> None:
        """Adds a row; of a composed method there are no times of its own."""
        config, args = self.model.config, self.args
        sparse = method not in ("exact", "FA3", "FlashInfer", "autoregressive", "published")
        count = self.forwards(steps)
        floor = lambda exact: block_floor_ms(  # noqa: E731
            config,
            batch=place.batch,
            context=place.context,
            exact=exact,
            sparse=count - exact,
            k=args.k,
            dense_layers=dense,
        )
        mine = floor(1 if sparse else count)
        if method == "autoregressive":
            mine = autoregressive_floor_ms(config, place)
        case = {"model": place.model, "batch": place.batch, "context": place.context, "T": steps, "method": method}
        case |= {"K": args.k, "g": args.g, "dense_layers": dense} if sparse else {}
        row = {"case": case, "us": block_ms * 1e3, "floor_us": mine * 1e3, "fraction": mine / block_ms}
        row |= {"peer": peer, "peer_us": None if peer_ms is None else peer_ms * 1e3}
        row["ratio"] = None if peer_ms is None else peer_ms / block_ms
        row["tokens_per_s"] = place.batch * config.block_size / block_ms * 1e3
        if sparse:
            row["ceiling"] = floor(count) / mine
            row["share"] = row["ratio"] / row["ceiling"]
        if times is not None:
            row |= {"step_ms": times.step_ms, "forwards": times.forwards, "peak_bytes": times.peak_bytes}
        self.rows.append(row | extra)
        steps_text = "" if times is None else " ".join(f"{kind} {ms:.2f}" for kind, ms in times.step_ms.items())
        ratio = "" if peer_ms is None else f"{row['ratio']:5.2f}x of {peer}"
        share = f" {100 * row['share']:3.0f}% of {row['ceiling']:.2f}" if sparse else ""
        print(
            f"{place.model:>5} {place.batch:2d} x {place.context_name:>4} T={steps:2d} {method:>10} dense {dense} "
            f"{block_ms:8.2f} ms {row['tokens_per_s']:7.0f} tok/s {100 * row['fraction']:3.0f}% {ratio}{share}  "
            f"{steps_text}",
            flush=True,
        )

    def run(self, place: Place, fa3: Fa3 | None, methods: list[str]) -> None:
        """All rows of a place."""
        args, block = self.args, self.model.config.block_size
        shown = place.shown
        graphs = StepGraphs()
        all_steps = args.steps if shown else list(dict.fromkeys((max(args.steps), min(args.steps))))
        exact = {steps: self.measure(place, config_of("exact", steps, block), graphs) for steps in all_steps}
        theirs = self.fa3(place, fa3, exact) if shown and fa3 is not None else {}
        if shown and "flashinfer" in methods:
            self.flashinfer(place, exact)
        for steps in all_steps:
            times = exact[steps]
            self.row(place, "exact", steps, times, times.block_ms, 0, "FA3", theirs.get(steps))
            for dense in args.dense_layers if shown else args.dense_layers[:1]:
                times = self.measure(place, config_of("mage", steps, block, args.k, args.g, dense), graphs)
                extra = {"fa3_ratio": theirs[steps] / times.block_ms} if steps in theirs else {}
                self.row(place, "mage", steps, times, times.block_ms, dense, "exact", exact[steps].block_ms, **extra)
        if shown and "baselines" in methods:
            self.baselines(place, exact, graphs)

    def fa3(self, place: Place, fa3: Fa3, exact: dict[int, BlockTimes]) -> dict[int, float]:
        """Block times of the loop with FA3's attention, by T."""
        block, theirs = self.model.config.block_size, {}

        def measure(steps: int, splits: int) -> BlockTimes:
            with exact_attention(fa3_attention(fa3, splits)):
                return self.measure(place, config_of("exact", steps, block), StepGraphs())

        few = min(self.args.steps)
        tried = {splits: measure(few, splits) for splits in FA3_SPLITS}
        best = min(tried, key=lambda splits: tried[splits].block_ms)
        for steps in dict.fromkeys((max(self.args.steps), few)):
            times = tried[best] if steps == few else measure(steps, best)
            theirs[steps] = times.block_ms
            self.row(place, "FA3", steps, times, times.block_ms, 0, "exact", exact[steps].block_ms, splits=best)
        return theirs

    def flashinfer(self, place: Place, exact: dict[int, BlockTimes]) -> None:
        """Composed rows of FlashInfer."""
        try:
            difference = attention_ms(self.model, self.cache, place, True)
        except Exception as error:
            print(f"FlashInfer: {reason_of(error)}")
            return
        difference -= attention_ms(self.model, self.cache, place, False)
        for steps in dict.fromkeys((max(self.args.steps), min(self.args.steps))):
            mine = exact[steps].block_ms
            composed = mine + (self.forwards(steps) + 1) * difference
            self.row(place, "FlashInfer", steps, None, composed, 0, "exact", mine, composed=True)

    def baselines(self, place: Place, exact: dict[int, BlockTimes], graphs: StepGraphs) -> None:
        """Rows of the other sparse methods, of what may be added to MAGE, and of the dense loops."""
        args, model, block = self.args, self.model, self.model.config.block_size
        few = min(args.steps)
        base = config_of("mage", few, block, args.k, args.g)
        chosen = baselines.methods(model, self.cache, base, forwards=self.forwards(few))
        wanted = [(name, few, chosen[name]) for name in ("quest", "tidal", "sparsed")]
        for steps in dict.fromkeys((max(args.steps), few)):
            mage = config_of("mage", steps, block, args.k, args.g)
            wanted.append(("mage carried", steps, dataclasses.replace(mage, refresh="blocks", refresh_blocks=4)))
            if not model.config.token_shift:
                wanted.append(("mage fused", steps, dataclasses.replace(mage, fuse_commit=True)))
        for name, steps, config in wanted:
            try:
                times = self.measure(place, config, StepGraphs() if config.method is not None else graphs)
            except Exception as error:
                print(f"{name}: {reason_of(error)}")
                continue
            self.row(place, name, steps, times, times.block_ms, 0, "exact", exact[steps].block_ms)
        mine = exact[few].block_ms
        self.row(place, "autoregressive", few, None, self.autoregressive_ms(place), 0, "exact", mine)
        if place.batch == 1 and place.context <= 16384 and model.config.token_shift:
            for steps in dict.fromkeys((max(args.steps), few)):
                self.row(
                    place, "published", steps, None, self.published_ms(place, steps), 0, "exact", exact[steps].block_ms
                )

    def autoregressive_ms(self, place: Place) -> float:
        """Milliseconds of a block's number of tokens, one forward each."""
        size, count = self.model.config.block_size, 2 * self.model.config.block_size
        batch, graphs = RaggedBatch(self.cache, place.batch), StepGraphs()
        try:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            arguments = (self.model, batch, [place.context] * place.batch, [0] * place.batch)
            dense_loops.autoregressive(*arguments, 4, graphs=graphs)
            dense_loops.autoregressive(*arguments, count, graphs=graphs)
            start.record()
            dense_loops.autoregressive(*arguments, count, graphs=graphs)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / count * size
        finally:
            batch.release_all()

    def published_ms(self, place: Place, steps: int) -> float:
        """Milliseconds of a block of the published loop, by the host's clock: it waits for the device in every step."""
        size = self.model.config.block_size
        config = dataclasses.replace(config_of("exact", steps, size), max_new_tokens=2 * size, ignore_eos=True)
        best = float("inf")
        for _ in range(3):
            context = dense_loops.ContiguousCache.random(self.model, place.context)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            dense_loops.published_loop(self.model, context, [0], config, prompt_tail=0)
            torch.cuda.synchronize()
            best = min(best, (time.perf_counter() - begun) / 2 * 1e3)
        return best


def numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be integers, several by commas, got {text!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{option} must be different numbers, got {text!r}")
    return found


def checked_places(args: argparse.Namespace) -> list[Place]:
    """The rows of the table that --rows picks. Options that are lists become lists; ValueError names a bad one, for
    nothing is lost before anything is timed."""
    every = [Place(*each) for each in itertools.product(GEOMETRIES, BATCHES, CONTEXTS)]
    patterns = args.rows.split(",")
    for pattern in patterns:
        if pattern.count(":") > 2 or not any(place.matches(pattern) for place in every):
            raise ValueError(f"--rows must fit rows of the table, MODEL:BATCH:CONTEXT, got {pattern!r}")
    places = [place for place in every if any(place.matches(pattern) for pattern in patterns)]
    models = [GEOMETRIES[name] for name in dict.fromkeys(place.model for place in places)]
    args.steps, args.dense_layers = numbers("--steps", args.steps), numbers("--dense-layers", args.dense_layers)
    for model, steps in itertools.product(models, args.steps):
        try:
            tokens_per_step(model.block_size, steps)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
    most = min(model.num_layers for model in models) - 1
    for dense in args.dense_layers:
        if not 0 <= dense <= most:
            raise ValueError(f"--dense-layers must be in [0, {most}], so that a layer is left to select, got {dense}")
    try:
        SelectionConfig(k=args.k, g=args.g)
    except ValueError as error:
        raise ValueError(f"--k and --g: {error}") from None
    least = min(place.context for place in places)
    if not 0 < args.k < least:
        raise ValueError(f"--k must be in [1, {least - 1}], below the shortest context, got {args.k}")
    args.methods = [name for name in args.methods.split(",") if name]
    for name in args.methods:
        if name not in METHODS:
            raise ValueError(f"--methods must be of {', '.join(METHODS)}, got {name!r}")
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {args.minutes}")
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="MODEL:BATCH:CONTEXT, parts may be left out, several by commas")
    parser.add_argument("--steps", default="32,16,8", help="T, several by commas")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--g", type=int, default=64)
    parser.add_argument("--dense-layers", default="0,2", help="several by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="of these, several by commas; '' is none")
    parser.add_argument("--fa3", help="the library _vllm_fa3_C.abi3.so")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--minutes", type=float, default=60, help="no place is begun after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="result file, written on an H100 only")
    args = parser.parse_args()
    try:
        places = checked_places(args)
    except ValueError as error:
        parser.error(str(error))
    device = gpu_name(args, parser)
    methods = args.methods
    fa3 = None
    if "fa3" in methods:
        try:
            fa3 = Fa3(args.fa3, FA3_SPLITS)
        except Exception as error:
            print(f"FA3: {reason_of(error)}")
    rows, left_out, too_late = [], [], []
    begun = time.perf_counter()
    # The largest model first: the fewest of its places fit, and what they leave of the time goes to the others.
    names = list(dict.fromkeys(place.model for place in places))[::-1]
    models = list(range(1, len(names) + 1))  # still to come, with this one
    for name in names:
        bench = Bench(args, name, [place for place in places if place.model == name])
        todo = sorted(bench.places, key=lambda place: (not place.shown, BATCHES_IN_ORDER.index(place.batch)))
        share = (time.perf_counter() - begun) + max(args.minutes * 60 - (time.perf_counter() - begun), 0) / models.pop()
        for place in todo:
            if time.perf_counter() - begun < share:
                bench.run(place, fa3, methods)
            else:
                too_late.append(place.name)
        rows += bench.rows
        left_out += [place.name for place in bench.left_out]
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    print(
        f"{time.perf_counter() - begun:.0f} s; left out, for they don't fit this GPU: {', '.join(left_out) or 'none'}"
    )
    print(f"left out, for the time was over: {', '.join(too_late) or 'none'}")
    finish(args, "generate", device, rows, weights="random", too_large=left_out, no_time=too_late)


if __name__ == "__main__":
    main()
