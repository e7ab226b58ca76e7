"""Whole generations at full model size: block times, forwards by kind and tokens per second, beside their ceilings.

    python bench/bench_generate.py [--rows 7B:4:64K] [--steps 32,16,8] [--k 1024] [--g 64] [--methods ...]
        [--fa3 _vllm_fa3_C.abi3.so] [--out bench/results/h100/generate.json]

Weights are random and so are the prefix's K and V: right for speed, the text means nothing. Every row is one loop
(mage_ext.denoise), its phases captured as CUDA graphs, products by cuBLAS, norms, rotary and activation by
torch.compile. A block is T - 1 forwards under token shift, whose first position is known, else T, and its commit; T is
forced by a static sampler. Times are from one commit to the next, so everything between two blocks is in them.

Methods: exact; FA3: exact with FlashAttention-3 in place of our kernel, in the same graphs, with the number of splits
that is fastest there; FlashInfer: composed, our exact block with the time of our attention replaced by FlashInfer's,
both measured over the layers of the same cache in this run; mage, and baselines of mage_ext.evaluation.baselines.
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
from peers import Absent, Fa3, reason_of

from mage_ext import ops
from mage_ext.cache import PagedCache
from mage_ext.denoise import DenoiseConfig, StepGraphs
from mage_ext.evaluation.speed import BlockTimes, block_floor_ms, bytes_per_token, measure_blocks, random_cache
from mage_ext.models.geometry import GEOMETRIES, random_model
from mage_ext.models.transformer import Transformer
from mage_ext.sampling import SamplerConfig
from mage_ext.selection import SelectionConfig

CONTEXTS = {"4K": 4096, "16K": 16384, "32K": 32768, "64K": 65536, "128K": 131072}
BATCHES = (1, 4, 8, 16)
BLOCKS = 3
SPARE_BYTES = 9 * 2**30  # for masses, logits, graphs and peers beside weights and cache
FA3_SPLITS = (0, 1, 2, 4, 8, 16)
METHODS = ("exact", "fa3", "flashinfer", "mage")


@dataclasses.dataclass(frozen=True)
class Place:
    """A model, a batch and a context."""

    model: str
    batch: int
    context_name: str

    @property
    def context(self) -> int:
        return CONTEXTS[self.context_name]

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
        sampler=SamplerConfig("low_confidence_static", tokens_per_step=-(-block // steps)),
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
    """Milliseconds of the exact attention of one forward, over all layers of the cache: ours or FlashInfer's."""
    config, device = model.config, cache.device
    batch, size = place.batch, config.block_size
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
    return median_us({"calls": capture(calls)}, 5)["calls"] * config.num_layers / 1e3


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
        sparse = method not in ("exact", "FA3", "FlashInfer")
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

    def run(self, place: Place, fa3: Fa3 | None, flashinfer: bool) -> None:
        args, block = self.args, self.model.config.block_size
        graphs = StepGraphs()
        exact = {steps: self.measure(place, config_of("exact", steps, block), graphs) for steps in args.steps}
        theirs: dict[int, float] = {}
        if fa3 is not None:
            best = None
            for splits in FA3_SPLITS:
                with exact_attention(fa3_attention(fa3, splits)):
                    times = self.measure(place, config_of("exact", args.steps[-1], block), StepGraphs())
                if best is None or times.block_ms < best[1].block_ms:
                    best = splits, times
            for steps in args.steps:
                times = best[1]
                if steps != args.steps[-1]:
                    with exact_attention(fa3_attention(fa3, best[0])):
                        times = self.measure(place, config_of("exact", steps, block), StepGraphs())
                theirs[steps] = times.block_ms
                self.row(place, "FA3", steps, times, times.block_ms, 0, "exact", exact[steps].block_ms, splits=best[0])
        if flashinfer:
            try:
                difference = attention_ms(self.model, self.cache, place, True)
                difference -= attention_ms(self.model, self.cache, place, False)
                for steps in args.steps:
                    composed = exact[steps].block_ms + (self.forwards(steps) + 1) * difference
                    self.row(
                        place, "FlashInfer", steps, None, composed, 0, "exact", exact[steps].block_ms, composed=True
                    )
            except Exception as error:
                print(f"FlashInfer: {reason_of(error)}")
        for steps in args.steps:
            times = exact[steps]
            self.row(place, "exact", steps, times, times.block_ms, 0, "FA3", theirs.get(steps))
            for dense in args.dense_layers:
                times = self.measure(place, config_of("mage", steps, block, args.k, args.g, dense), graphs)
                extra = {"fa3_ratio": theirs[steps] / times.block_ms} if steps in theirs else {}
                self.row(place, "mage", steps, times, times.block_ms, dense, "exact", exact[steps].block_ms, **extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="MODEL:BATCH:CONTEXT, parts may be left out, several by commas")
    parser.add_argument("--steps", default="32,16,8", help="T, several by commas")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--g", type=int, default=64)
    parser.add_argument("--dense-layers", default="0,2", help="several by commas")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--fa3", help="the library _vllm_fa3_C.abi3.so")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="result file, written on an H100 only")
    args = parser.parse_args()
    device = gpu_name(args, parser)
    args.steps = [int(part) for part in args.steps.split(",")]
    args.dense_layers = [int(part) for part in args.dense_layers.split(",")]
    methods = args.methods.split(",")
    places = [Place(*each) for each in itertools.product(GEOMETRIES, BATCHES, CONTEXTS)]
    places = [place for place in places if any(place.matches(pattern) for pattern in args.rows.split(","))]
    if not places:
        parser.error(f"--rows must fit a row of the table, got {args.rows!r}")
    fa3 = None
    if "fa3" in methods:
        try:
            fa3 = Fa3(args.fa3, FA3_SPLITS)
        except Exception as error:
            print(f"FA3: {reason_of(error)}")
    rows, left_out = [], []
    begun = time.perf_counter()
    for name in dict.fromkeys(place.model for place in places):
        bench = Bench(args, name, [place for place in places if place.model == name])
        for place in bench.places:
            bench.run(place, fa3, "flashinfer" in methods)
        rows += bench.rows
        left_out += [f"{p.model} {p.batch} x {p.context_name}" for p in bench.left_out]
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    print(
        f"{time.perf_counter() - begun:.0f} s; left out, for they don't fit this GPU: {', '.join(left_out) or 'none'}"
    )
    finish(args, "generate", device, rows, weights="random", left_out=left_out)


if __name__ == "__main__":
    main()
