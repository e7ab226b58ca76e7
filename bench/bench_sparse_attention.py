"""sparse_block_attention on an H100, beside FA3 (and FlashInfer) over the same lists.

    python bench/bench_sparse_attention.py --fa3 _vllm_fa3_C.abi3.so [--flashinfer] [--all]
        [--rows 7B:1:1024:16,8B:16] [--layout hnd] [--out bench/results/h100/sparse_block_attention.json]

Every KV head lists K tokens in units of g, at random places of a context of 32K; the block's Q tokens are the tail.
Uneven rows: the heads' counts spread 1:8 around the mean K. Times are those of cuda_timing.py, cold: calls take turns
over sets of K/V of more than 200 MB and over lists that have no unit in common, so that what a call gathers was not
gathered by the calls before it, until these have gathered 200 MB.

The peers read the same memory: KV heads are folded into the batch, with a page table of units per head (so pages of g
tokens) and q brought into their order outside of the calls. FA3: the best of its own, 1 and 4 splits. Where it does
not take pages of 1 token, its time over as many tokens in pages of 16 stands in, and the row says so.

floor = max(bytes of the listed and the block's K and V, q, out and lse / HBM, flops with rows padded to 64 / tensor
cores). ratio = fastest peer / ours, on one list. At batch 1 the wanted ratio is that of the best g. Every row is
checked against float32 first. Without --all and --rows: the rows that have targets, two uneven ones, and those of 7B
that show smaller and larger budgets and other batches. Batch 64 has the most memory, 2 sets of 4.3 GB.
"""

import argparse
import gc
import itertools
import math
from dataclasses import dataclass

import torch
from block_attention_cuda import PEER_ERROR
from cuda_timing import capture, median_us
from gpu_bench import add_options, chosen_shapes, finish, gpu_name
from kv_sets import (
    COLD_BYTES,
    DTYPE,
    HBM_BYTES_PER_S,
    MMA_FLOPS_PER_S,
    MMA_ROWS,
    MODELS,
    KvSet,
    Shape,
    contiguous_kv,
    make_sets,
    num_sets,
    tokens_of,
)
from peers import Absent, find_peers, reason_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mage_ext import ops
from mage_ext.testing.compare import assert_out_close

CONTEXT = 32768
BATCHES = (1, 4, 16, 64)
BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
UNITS = (64, 32, 16, 1)
UNEVEN = 8  # the largest count over the smallest
FA3_SPLITS = (0, 1, 4)
STAND_IN = 16  # tokens of a page where a peer does not take pages of 1
WANTED_BUDGETS = (512, 1024, 2048)
# Wanted ratio at Q = 32, in the order of WANTED_BUDGETS, by (model, batch, g); g None: of the best g.
WANTED = {
    ("7B", 1, None): (1.6, 1.65, 1.5),
    ("7B", 16, 16): (1.4, 1.35, 1.25),
    ("7B", 16, 1): (1.25, 1.2, 1.15),
    ("1.5B", 1, None): (1.55, 1.5, 1.45),
    ("1.5B", 16, 16): (1.5, 1.5, 1.5),
    ("8B", 1, None): (1.5, 1.5, 1.5),
    ("8B", 16, 16): (1.25, 1.25, 1.15),
}
# Rows without targets that are timed anyway: batch, K, g of 7B.
OTHERS = [(batch, budget, 16) for batch in (1, 16) for budget in (256, 4096, 8192)]
OTHERS += [(batch, 1024, g) for batch in (4, 64) for g in (16, 1)]
SUB_BLOCK_US = 7.5  # of 7B, batch 1, K = 1024, Q = 8, best g


@dataclass(frozen=True)
class SparseShape:
    """A batch of one model, and how many tokens each KV head lists."""

    model: str
    batch: int
    budget: int  # K
    g: int
    q_len: int = 32
    uneven: bool = False

    @property
    def dense(self) -> Shape:
        """The requests, whose K and V lie in the pools."""
        return Shape(self.model, (CONTEXT,) * self.batch, self.q_len)

    @property
    def units(self) -> list[int]:
        """Units that each (request, KV head) lists."""
        streams = self.batch * MODELS[self.model][1]
        if not self.uneven:
            return [self.budget // self.g] * streams
        # 1 to UNEVEN, neighbours far apart, scaled to the mean; sums are rounded, so that all add up to it.
        step = next(n for n in range(streams // 2 + 1, 2 * streams + 2) if math.gcd(n, streams) == 1)
        weights = [1 + (UNEVEN - 1) * (i * step % streams) / (streams - 1) for i in range(streams)]
        scale = self.budget * streams / sum(weights) / self.g
        ends = [round(end * scale) for end in itertools.accumulate(weights, initial=0)]
        return [end - begin for begin, end in itertools.pairwise(ends)]

    @property
    def tokens(self) -> int:
        """That all KV heads attend together."""
        return sum(self.units) * self.g + len(self.units) * self.q_len

    @property
    def gathered_bytes(self) -> int:
        return 2 * self.tokens * MODELS[self.model][2] * DTYPE.itemsize

    @property
    def floor_us(self) -> float:
        heads, _, dim = self.dense.heads
        vectors = self.batch * self.q_len * heads
        moved = self.gathered_bytes + 2 * vectors * dim * DTYPE.itemsize + 4 * vectors
        padded_rows = math.ceil(self.dense.rows / MMA_ROWS) * MMA_ROWS
        return max(moved / HBM_BYTES_PER_S, 4 * padded_rows * dim * self.tokens / MMA_FLOPS_PER_S) * 1e6

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch} K={self.budget} g={self.g} Q={self.q_len}{' uneven' if self.uneven else ''}"

    @property
    def case(self) -> dict:
        case = self.dense.case | {"K": self.budget, "g": self.g, "cache": "cold"}
        return case | ({"counts": "uneven"} if self.uneven else {})

    @property
    def target(self) -> tuple[tuple, float | None, float | None]:
        """Rows that share a target (their best one counts), the wanted ratio, and the most microseconds."""
        ours = (self.model, self.batch, self.budget, self.q_len)
        if self.uneven or self.budget not in WANTED_BUDGETS:
            return ours, None, None
        if self.q_len != 32:
            return ours, None, SUB_BLOCK_US if ours == ("7B", 1, 1024, 8) else None
        g = None if self.batch == 1 else self.g
        wanted = WANTED.get((self.model, self.batch, g))
        return (*ours, g), None if wanted is None else wanted[WANTED_BUDGETS.index(self.budget)], None


def all_shapes() -> list[SparseShape]:
    """Every row; those whose pools are the same follow one another."""
    shapes = []
    for model, batch in itertools.product(MODELS, BATCHES):
        shapes += [SparseShape(model, batch, budget, g) for budget in BUDGETS for g in UNITS]
        if batch in (1, 16):
            shapes += [SparseShape(model, batch, 1024, g, uneven=True) for g in UNITS]
    return shapes + [SparseShape("7B", 1, 1024, g, q_len=8) for g in UNITS]


def default_shapes() -> list[SparseShape]:
    """Rows that have targets (at batch 1 without g = 1 but for 7B), two uneven ones, and OTHERS."""
    uneven = [("7B", 1, 16), ("7B", 16, 16)]

    def is_chosen(shape: SparseShape) -> bool:
        if shape.uneven:
            return (shape.model, shape.batch, shape.g) in uneven
        if shape.model == "7B" and (shape.batch, shape.budget, shape.g) in OTHERS:
            return True
        return shape.target[1:] != (None, None) and (shape.batch != 1 or shape.g > 1 or shape.model == "7B")

    return [shape for shape in all_shapes() if is_chosen(shape)]


def matches(shape: SparseShape, pattern: str) -> bool:
    """Whether MODEL:BATCH:K:G:Q names a shape; parts that are empty, * or not there fit all. `uneven` in place of Q."""
    parts = [part.strip() for part in pattern.split(":")]
    if len(parts) > 5:
        raise ValueError(f"--rows must be MODEL:BATCH:K:G:Q, got {pattern!r}")
    own = (shape.model, shape.batch, shape.budget, shape.g, "uneven" if shape.uneven else shape.q_len)
    for part, value in itertools.zip_longest(parts, own):
        if part in (None, "", "*"):
            continue
        if isinstance(value, str) or part.lower() == "uneven":
            if part.lower() != str(value).lower():
                return False
        elif tokens_of(part) != value:
            return False
    return True


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """Inputs of one call: pools, and lists as sparse_block_attention takes them."""

    kv_set: KvSet
    indices: Tensor  # [B, Hkv, Kmax], int32
    counts: Tensor  # [B, Hkv], int32
    tail_start: Tensor  # [B], int32


def make_calls(shape: SparseShape, sets: list[KvSet], seed: int) -> list[Call]:
    """Calls that gather COLD_BYTES together. Those on one set share no unit: each takes the next of all its units in
    random order."""
    device = sets[0].q.device
    random = torch.Generator(device).manual_seed(seed)
    batch, kv_heads, units = shape.batch, shape.dense.heads[1], CONTEXT // shape.g
    counts = torch.tensor(shape.units, dtype=torch.int32, device=device).view(batch, kv_heads)
    most = max(shape.units)
    wanted = math.ceil(COLD_BYTES / shape.gathered_bytes)
    tail_start = torch.full((batch,), CONTEXT, dtype=torch.int32, device=device)
    slot = torch.arange(most, device=device)
    calls = []
    for kv_set in sets:
        order = torch.rand(batch, kv_heads, units, generator=random, device=device).argsort(-1).int()
        for chunk in order.split(most, -1)[: units // most]:
            listed = torch.where(slot < counts[..., None], chunk, units).sort(-1).values
            indices = torch.where(listed < units, listed, -1).int().contiguous()
            calls.append(Call(kv_set, indices, counts, tail_start))
            if len(calls) == wanted:
                return calls
    return calls


def our_calls(dense: Shape, g: int, calls: list[Call]):
    """Functions to time, and the outputs that all of them write."""
    (heads, kv_heads, dim), device = dense.heads, calls[0].indices.device
    sizes = (dense.batch, dense.q_len, heads, kv_heads, dim, dense.max_len, g, calls[0].indices.shape[2])
    outputs = [torch.empty_like(calls[0].kv_set.q), torch.empty(dense.batch, heads, dense.q_len, device=device)]
    workspace = torch.empty(ops.sparse_block_attention_workspace(*sizes), dtype=torch.uint8, device=device)
    options = {"g": g, "max_seq_len": dense.max_len}

    def call_of(call: Call):
        inputs = (*call.kv_set.tensors, call.indices, call.counts, call.tail_start)
        return lambda: ops.sparse_block_attention_out(*inputs, *outputs, workspace, **options)

    return [call_of(call) for call in calls], outputs


def exact_out(dense: Shape, g: int, call: Call) -> tuple[Tensor, Tensor]:
    """Request 0 in float32 and by torch's bfloat16 attention: [1, Q, H, D]."""
    heads, kv_heads, dim = dense.heads
    group = heads // kv_heads
    k, v = contiguous_kv(call.kv_set, 0, dense.max_len)
    q = call.kv_set.q[0]
    out, same = torch.empty_like(q, dtype=torch.float32), torch.empty_like(q)
    backend = SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH
    tail = torch.arange(int(call.tail_start[0]), dense.max_len, device=q.device)
    for h in range(kv_heads):
        listed = call.indices[0, h, : int(call.counts[0, h])].long()[:, None] * g
        listed = (listed + torch.arange(g, device=q.device)).flatten()
        tokens = torch.cat([listed, tail])
        mine = slice(h * group, (h + 1) * group)
        rows, keys, values = q[:, mine].transpose(0, 1), k[tokens, h], v[tokens, h]  # [G, Q, D], [T, D]
        shares = (rows.float() @ keys.T.float() * dim**-0.5).softmax(-1)
        out[:, mine] = (shares @ values.float()).transpose(0, 1)
        with sdpa_kernel(backend):
            one = torch.nn.functional.scaled_dot_product_attention(
                rows[None], keys[None, None], values[None, None], enable_gqa=True
            )
        same[:, mine] = one[0].transpose(0, 1)
    return out[None], same[None]


# --- the peers, KV heads folded into the batch -----------------------------------------------------------------------


@dataclass(frozen=True)
class FoldedShape:
    """What the peers see: a request per (request, KV head) of ours, with one KV head. The names are those of Shape."""

    contexts: tuple[int, ...]
    heads: tuple[int, int, int]
    q_len: int
    page: int

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def rows(self) -> int:
        return self.heads[0] * self.q_len

    @property
    def lengths(self) -> list[int]:
        return [context + self.q_len for context in self.contexts]

    @property
    def max_len(self) -> int:
        return max(self.lengths)


def fold(shape: SparseShape) -> FoldedShape:
    heads, kv_heads, dim = shape.dense.heads
    contexts = tuple(count * shape.g for count in shape.units)
    return FoldedShape(contexts, (heads // kv_heads, 1, dim), shape.q_len, shape.g)


def fold_call(shape: SparseShape, call: Call) -> KvSet:
    """The inputs of a call for the peers: q permuted, pools as pages of one unit and one head that begin at any row of
    D, a table of the listed units and then those of the block."""
    _, kv_heads, dim = shape.dense.heads
    pool, page = call.kv_set.k_cache, shape.dense.page
    device, g = pool.device, shape.g
    row_of_page, row_of_token, row_of_head = (stride // dim for stride in pool.stride()[:3])
    tail = torch.arange(CONTEXT // g, math.ceil(shape.dense.max_len / g), dtype=torch.int32, device=device)
    width = call.indices.shape[2] + len(tail)
    # Listed units, then the tail's right behind them.
    slot = torch.arange(width, device=device)
    behind = slot - call.counts[..., None]
    units = torch.nn.functional.pad(call.indices, (0, len(tail)))
    units = torch.where(behind >= 0, tail[behind.clamp(0, len(tail) - 1)], units)
    units = torch.where(behind < len(tail), units, 0)  # [B, Hkv, width]
    token = units.long() * g
    pages = call.kv_set.block_table.long()[torch.arange(shape.batch, device=device)[:, None, None], token // page]
    head = torch.arange(kv_heads, device=device)[:, None]
    table = (pages * row_of_page + token % page * row_of_token + head * row_of_head).int().flatten(0, 1)

    def fold_pool(cache: Tensor) -> Tensor:
        rows = cache.numel() // dim - (g - 1) * row_of_token
        return cache.as_strided((rows, g, 1, dim), (dim, row_of_token * dim, dim, 1))

    q = call.kv_set.q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()  # [B * Hkv, Q, G, D]
    lengths = (call.counts.flatten() * g + shape.q_len).int()
    return KvSet(q, fold_pool(call.kv_set.k_cache), fold_pool(call.kv_set.v_cache), table, lengths)


def capture_peers(peers: list, shape: SparseShape, calls: list[Call], exact: Tensor) -> tuple[dict, dict[str, str]]:
    """Graphs by (peer, variant), and why the others have none."""
    graphs, absent = {}, {}
    if not peers:
        return graphs, absent
    folded, sets = fold(shape), [fold_call(shape, call) for call in calls]
    kv_heads = shape.dense.heads[1]
    for peer in peers:
        try:
            for variant, theirs in peer.variants(folded, sets).items():
                try:
                    out = peer.out(theirs[0]())[: kv_heads * shape.q_len].float()
                    out = out.view(kv_heads, shape.q_len, -1, exact.shape[-1]).transpose(0, 1).flatten(1, 2)
                    error = ((out - exact[0]).norm() / exact.norm()).item()
                    if not error < PEER_ERROR:
                        raise Absent(f"its result is off by {error:.1e}")
                    graphs[peer.name, variant] = capture(theirs)
                except Exception as error:
                    absent[f"{peer.name} {variant}"] = reason_of(error)
                    torch.cuda.synchronize()  # a fault of the device ends the run here, by the peer's name
        except torch.AcceleratorError as error:
            raise RuntimeError(f"{peer.name} broke the device at {shape.name}; leave it out") from error
        except Exception as error:
            absent[peer.name] = reason_of(error)
    return graphs, absent


def measure(shape: SparseShape, sets: list[KvSet], peers: list, replays: int, seed: int) -> tuple[dict, dict[str, str]]:
    """Medians in microseconds by key, "ours" or (peer, variant), and the reasons of what is absent."""
    calls = make_calls(shape, sets, seed)
    ours, outputs = our_calls(shape.dense, shape.g, calls)
    exact, same = exact_out(shape.dense, shape.g, calls[0])
    ours[0]()
    assert_out_close(outputs[0][:1], exact, same)
    graphs, absent = capture_peers(peers, shape, calls, exact)
    missing = [peer for peer in peers if not any(key[0] == peer.name for key in graphs)]
    if shape.g == 1 and missing:
        coarse = SparseShape(shape.model, shape.batch, shape.budget, STAND_IN, shape.q_len, shape.uneven)
        others = make_calls(coarse, sets, seed)
        more, reasons = capture_peers(missing, coarse, others, exact_out(coarse.dense, coarse.g, others[0])[0])
        graphs |= {(name, f"page={STAND_IN} {variant}"): graph for (name, variant), graph in more.items()}
        absent |= {f"{name} page={STAND_IN}": reason for name, reason in reasons.items()}
    return median_us({"ours": capture(ours), **graphs}, replays), absent


# --- the table -------------------------------------------------------------------------------------------------------


def make_row(shape: SparseShape, times: dict, absent: dict[str, str]) -> dict:
    """A row of the result file."""
    us, floor_us = times["ours"], shape.floor_us
    theirs = {key: value for key, value in times.items() if key != "ours"}
    best = min(theirs, key=theirs.get) if theirs else None
    row = {"case": shape.case, "us": round(us, 2), "floor_us": round(floor_us, 2), "fraction": round(floor_us / us, 3)}
    row |= {"peer": None, "peer_us": None, "ratio": None}
    if best:
        row |= {"peer": " ".join(best), "peer_us": round(theirs[best], 2), "ratio": round(theirs[best] / us, 3)}
    row["peers"] = {" ".join(key): round(value, 2) for key, value in theirs.items()}
    _, wanted, most_us = shape.target
    row |= ({"wanted": wanted} if wanted else {}) | ({"most_us": most_us} if most_us else {})
    return row | ({"absent": absent} if absent else {})


def print_row(shape: SparseShape, row: dict) -> None:
    numbers = f"{row['us']:8.2f}{row['floor_us']:8.2f}{100 * row['fraction']:5.0f}"
    theirs = f"{row['peer_us']:8.2f}  {row['peer']:24}{row['ratio']:6.2f}" if row["peer"] else f"{'-':>8}{'':32}"
    want = f"{row['wanted']:7.2f}" if "wanted" in row else f"  <= {row['most_us']} us" if "most_us" in row else ""
    print(f"{shape.name:34}{numbers}{theirs}{want}".rstrip(), flush=True)
    for name, reason in row.get("absent", {}).items():
        print(f"{'':34}{name} absent: {reason}", flush=True)


def missed_targets(shapes: list[SparseShape], rows: list[dict]) -> list[str]:
    """Targets that no row which shares them reaches."""
    groups = {}
    for shape, row in zip(shapes, rows, strict=True):
        key, wanted, most_us = shape.target
        if most_us is not None or (wanted is not None and row["peer"]):
            groups.setdefault(key, (wanted, most_us, []))[2].append((shape, row))
    missed = []
    for wanted, most_us, members in groups.values():
        name = (
            members[0][0].name if len(members) == 1 else members[0][0].name.replace(f" g={members[0][0].g}", " any g")
        )
        if wanted is not None and max(row["ratio"] for _, row in members) < wanted:
            missed.append(f"{name}: ratio {max(row['ratio'] for _, row in members):.2f}, wanted {wanted:.2f}")
        if most_us is not None and min(row["us"] for _, row in members) > most_us:
            missed.append(f"{name}: {min(row['us'] for _, row in members):.2f} us, allowed {most_us} us")
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "MODEL:BATCH:K:G:Q (Q may be `uneven`)")
    parser.add_argument("--all", action="store_true", help="every row, not only those with targets")
    parser.add_argument("--fa3", help="the library _vllm_fa3_C.abi3.so of a vllm wheel")
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer too")
    parser.add_argument("--layout", choices=("nhd", "hnd"), default="nhd", help="of the pools; nhd is PagedCache's")
    args = parser.parse_args()
    shapes = chosen_shapes(args, parser, all_shapes() if args.all or args.rows else default_shapes(), matches)
    device = gpu_name(args, parser)
    names = ["fa3"] + (["flashinfer"] if args.flashinfer else [])
    peers, absent = find_peers(names, args.fa3, FA3_SPLITS)
    absent = {name: reason for name, reason in absent.items() if name != "SDPA"}
    print(f"{device}, torch {torch.__version__}, seed {args.seed}, pools {args.layout}")
    for name, reason in absent.items():
        print(f"{name} absent: {reason}")
    print(f"{'case':34}{'us':>8}{'floor':>8}{'fl%':>5}{'peer':>8}{'':26}{'ratio':>6}{'want':>7}")
    rows = []
    for dense, group in itertools.groupby(shapes, lambda shape: shape.dense):
        # Twice: of lists that are uneven, as few fit in a context as of the longest one.
        sets = make_sets(dense, 2 * num_sets(dense), args.seed, layout=args.layout)
        for shape in group:
            rows.append(make_row(shape, *measure(shape, sets, peers, args.replays, args.seed)))
            if args.layout != "nhd":
                rows[-1]["case"]["layout"] = args.layout
            print_row(shape, rows[-1])
        del sets
        gc.collect()
        torch.cuda.empty_cache()
    missed = missed_targets(shapes, rows)
    print(f"targets missed: {len(missed)}" + "".join(f"\n  {line}" for line in missed))
    finish(args, "sparse_block_attention", device, rows, absent=absent)


if __name__ == "__main__":
    main()
