"""The CUDA rows of bench_block_attention.py: what is timed, what it is held against, and the table.

speed = median of the fastest peer / ours. The peers of the speed are those that read the same pages, FA3 and
FlashInfer; SDPA on contiguous K and V has a column of its own and is the peer only where neither of them is there.
"""

import gc
import itertools
import math

import torch
from cuda_timing import capture, median_us
from gpu_bench import chosen_shapes, finish, gpu_name
from kv_sets import KvSet, Shape, contiguous_kv, make_sets, num_sets, tokens_of
from peers import Absent, find_peers, reason_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mage_ext import ops
from mage_ext.testing.compare import assert_mass_close, assert_out_close

EMISSIONS = {"none": ("none", None), "mass64": ("mass", 64), "mass32": ("mass", 32), "mass16": ("mass", 16)}
EMISSIONS |= {"rows64": ("rows", 64), "rows32": ("rows", 32), "rows16": ("rows", 16)}
DEFAULT_EMISSIONS = "none,mass64,mass32,mass16"

BATCHES = ((1, "4K"), (1, "16K"), (1, "32K"), (1, "128K"), (4, "32K"), (16, "32K"))
SUB_BLOCK_BATCHES = ((1, "4K"), (1, "32K"), (1, "128K"), (16, "32K"))  # Q = 8
# The other head dim and the other dtype that have kernels; then many requests.
OTHER_BATCHES = [("135M", torch.bfloat16, *batch) for batch in ((1, "4K"), (1, "32K"), (16, "32K"))]
OTHER_BATCHES += [("7B", torch.float16, 1, "32K"), ("7B", torch.float16, 1, "128K"), ("135M", torch.float16, 1, "32K")]
OTHER_BATCHES += [(model, torch.bfloat16, 64, "4K") for model in ("7B", "8B")]
MIXED_REQUESTS = 16
# Wanted speed of block_attention_mass, g = 64 and Q = 32, over a peer that emits nothing; in the order of BATCHES.
WANTED = {
    "7B": (1.45, 1.40, 1.30, 1.10, 1.08, 1.10),
    "1.5B": (1.50, 1.65, 1.60, 1.45, 1.25, 1.15),
    "8B": (1.70, 1.30, 1.18, 1.02, 1.02, 0.96),
}
L2_BYTES = 50e6
PEER_ERROR = 0.02  # of the norm: a peer beyond it computes something else


def mixed_contexts() -> tuple[int, ...]:
    """16 requests from 128K to 1K, evenly spread on a logarithmic scale and shuffled; the first is the longest."""
    steps = [1024 * 128 ** (i / (MIXED_REQUESTS - 1)) for i in range(MIXED_REQUESTS)]
    rounded = [round(step / 32) * 32 for step in steps]
    return tuple(rounded[(i * 7 - 1) % MIXED_REQUESTS] for i in range(MIXED_REQUESTS))


def all_shapes() -> list[Shape]:
    """Rows of the table, by model: blocks of 32, sub-blocks of 8, a batch of mixed lengths; then OTHER_BATCHES."""
    shapes = []
    for model in WANTED:
        shapes += [Shape(model, (tokens_of(context),) * batch) for batch, context in BATCHES]
        shapes += [Shape(model, (tokens_of(context),) * batch, q_len=8) for batch, context in SUB_BLOCK_BATCHES]
        shapes.append(Shape(model, mixed_contexts()))
    return shapes + [Shape(m, (tokens_of(context),) * batch, dtype=dtype) for m, dtype, batch, context in OTHER_BATCHES]


def matches(shape: Shape, pattern: str) -> bool:
    """Whether MODEL:BATCH:CONTEXT:Q names a shape; parts that are empty, * or not there fit all."""
    parts = [part.strip() for part in pattern.split(":")]
    if len(parts) > 4:
        raise ValueError(f"--rows must be MODEL:BATCH:CONTEXT:Q, got {pattern!r}")
    context = "mixed" if shape.mixed else shape.contexts[0]
    for part, own in itertools.zip_longest(parts, (shape.model, shape.batch, context, shape.q_len)):
        if part in (None, "", "*"):
            continue
        if isinstance(own, str):
            if part.lower() != own.lower():
                return False
        elif part.lower() == "mixed" or tokens_of(part) != own:
            return False
    return True


def wanted_speed(shape: Shape, emission: str) -> float | None:
    if emission != "mass64" or shape.q_len != 32 or shape.mixed:
        return None
    if shape.model not in WANTED or shape.dtype != torch.bfloat16:
        return None
    batches = [(batch, tokens_of(context)) for batch, context in BATCHES]
    return dict(zip(batches, WANTED[shape.model], strict=True)).get((shape.batch, shape.contexts[0]))


def allowed_emission_us(shape: Shape, g: int, none_us: float) -> float | None:
    """How much more than attention alone masses may take; None where no limit is set."""
    partials = shape.partial_bytes(g)
    if g == 64:
        if shape.kv_bytes >= 130e6:
            return (0.03 if partials <= L2_BYTES else 0.05) * none_us
        return max(0.05 * none_us, 1.0)
    return (0.08 if partials <= 24e6 else 0.20) * none_us if g == 16 else None


def our_calls(shape: Shape, sets: list[KvSet], emission: str, masses: list[Tensor] | None = None):
    """A call per set, and the outputs that all of them write; the masses of each set may be given."""
    emit, g = EMISSIONS[emission]
    (heads, kv_heads, dim), device = shape.heads, sets[0].q.device
    sizes = (shape.batch, shape.q_len, heads, kv_heads, dim, shape.max_len)
    outputs = [torch.empty_like(sets[0].q), torch.empty(shape.batch, heads, shape.q_len, device=device)]
    options = {"max_seq_len": shape.max_len}
    if emit == "none":
        call, needed = ops.block_attention_out, ops.block_attention_workspace(*sizes)
    else:
        options["g"] = g
        units = (shape.batch, kv_heads, math.ceil(shape.max_len / g))
        if emit == "mass":
            call, needed = ops.block_attention_mass_out, ops.block_attention_mass_workspace(*sizes, g)
        else:
            call, needed = ops.block_attention_rows_out, ops.block_attention_rows_workspace(*sizes, g)
            units += (shape.rows,)
        outputs.append(torch.empty(units, device=device) if masses is None else masses[0])
    workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    own = [[*outputs[:2], mass] for mass in masses] if masses else [outputs] * len(sets)
    calls = [lambda s=s, o=o: call(*s.tensors, *o, workspace, **options) for s, o in zip(sets, own, strict=True)]
    return calls, outputs


def exact_results(shape: Shape, kv_set: KvSet, request: int = 0):
    """A request in float32: out [1, Q, H, D], probabilities [Hkv, R, S], and torch's bfloat16 out."""
    heads, kv_heads, dim = shape.heads
    k, v = contiguous_kv(kv_set, request, shape.lengths[request])
    q = kv_set.q[request]
    rows = q.view(shape.q_len, kv_heads, heads // kv_heads, dim).transpose(0, 1).reshape(kv_heads, shape.rows, dim)
    scores = rows.float() @ k.permute(1, 2, 0).float()
    shares = scores.mul_(dim**-0.5).softmax(-1)
    out = (shares @ v.transpose(0, 1).float()).view(kv_heads, shape.q_len, heads // kv_heads, dim).transpose(0, 1)
    backend = SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH
    with sdpa_kernel(backend):
        operands = (x.transpose(0, 1)[None] for x in (q, k, v))
        same = torch.nn.functional.scaled_dot_product_attention(*operands, enable_gqa=True)
    return out.reshape(1, shape.q_len, heads, dim), shares, same.transpose(1, 2)


def check(emission: str, call, outputs, exact: dict) -> None:
    """Our results of some requests before any timing: out as exact as torch's, masses as the contract says.

    exact: exact_results of each request that is looked at.
    """
    for output in outputs:
        output.fill_(float("nan"))
    call()
    emit, g = EMISSIONS[emission]
    for request, (out, shares, same) in exact.items():
        assert_out_close(outputs[0][request : request + 1], out, same)
        if emit == "mass":
            units = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % g)).unflatten(-1, (-1, g)).sum(-1).mean(1)
            assert_mass_close(outputs[2][request, :, : units.shape[-1]], units)
            assert not outputs[2][request, :, units.shape[-1] :].any(), "mass past the last token is not 0"


def capture_peers(peers: list, shape: Shape, sets: list[KvSet], exact_out) -> tuple[dict, dict[str, str]]:
    """Graphs by (peer, variant), and the reasons of the peers that have none."""
    graphs, absent = {}, {}
    for peer in peers:
        mine = {}
        try:
            for variant, calls in peer.variants(shape, sets).items():
                try:
                    out = peer.out(calls[0]())[: shape.q_len].float()
                    error = ((out - exact_out[0]).norm() / exact_out.norm()).item()
                    if not error < PEER_ERROR:
                        raise Absent(f"its result is off by {error:.1e}")
                    mine[peer.name, variant] = capture(calls)
                except Exception as error:
                    absent[f"{peer.name} {variant}"] = reason_of(error)
                    torch.cuda.synchronize()  # a fault of the device ends the run here, by the peer's name
        except torch.AcceleratorError as error:
            raise RuntimeError(f"{peer.name} broke the device at {shape.name}; leave it out by --peers") from error
        except Exception as error:
            absent[peer.name] = reason_of(error)
        graphs |= mine
    return graphs, absent


def measure_shape(shape: Shape, emissions: list[str], peers: list, warm: bool, replays: int, seed: int):
    """Medians by cache state and key, an emission or (peer, variant), and the reasons of what is absent."""
    sets = make_sets(shape, num_sets(shape), seed)
    # The last request too: schedules of many segments treat them differently.
    exact = {request: exact_results(shape, sets[0], request) for request in sorted({0, shape.batch - 1})}
    results, absent = {}, {}
    for cache in ("cold", "warm") if warm else ("cold",):
        used = sets if cache == "cold" else sets[:1]
        graphs = {}
        for emission in emissions:
            calls, outputs = our_calls(shape, used, emission)
            check(emission, calls[0], outputs, exact)
            graphs[emission] = capture(calls)
        theirs, reasons = capture_peers(peers, shape, used, exact[0][0])
        absent |= reasons
        if cache == "cold" and not warm:
            exact.clear()
        results[cache] = median_us(graphs | theirs, replays)
        del graphs, theirs
    return results, absent


def make_rows(shape: Shape, emissions: list[str], cache: str, times: dict, absent: dict[str, str], paged: set[str]):
    """Rows of the result file."""
    best = {}
    for key, us in times.items():
        if isinstance(key, tuple):
            best[key[0]] = min(us, best.get(key[0], math.inf))
    of_speed = {name: us for name, us in best.items() if name in paged} or best
    peer = min(of_speed, key=of_speed.get) if of_speed else None
    rows = []
    for emission in emissions:
        (emit, g), us = EMISSIONS[emission], times[emission]
        floor_us = shape.floor_us(g)
        row = {"case": shape.case | {"g": g, "emit": emit, "cache": cache}, "us": round(us, 2)}
        row |= {"floor_us": round(floor_us, 2), "fraction": round(floor_us / us, 3), "peer": peer}
        row |= {"peer_us": round(best[peer], 2) if peer else None, "ratio": round(best[peer] / us, 3) if peer else None}
        row["peers"] = {" ".join(key): round(value, 2) for key, value in times.items() if isinstance(key, tuple)}
        wanted = wanted_speed(shape, emission) if cache == "cold" else None
        row |= {"wanted": wanted} if wanted else {}
        if emit != "none" and "none" in times:
            row["extra_us"] = round(us - times["none"], 2)
            allowed = allowed_emission_us(shape, g, times["none"]) if emit == "mass" and cache == "cold" else None
            row |= {"allowed_us": round(allowed, 2)} if allowed else {}
        rows.append(row | ({"absent": absent} if absent else {}))
    return rows


PEER_COLUMNS = ("FA3", "FlashInfer", "SDPA")


def print_header() -> None:
    print("us = cold unless said; fl% = floor / us; extra = more than emit none (! = beyond its limit)")
    print(
        "speed = fastest of FA3 and FlashInfer (SDPA, on contiguous K and V, without them) / us; want = of the target"
    )
    header = f"{'case':25}{'emit':8}{'us':>8}{'floor':>8}{'fl%':>5}{'extra':>15}"
    print(header + "".join(f"{name:>11}" for name in PEER_COLUMNS) + f"{'speed':>7}{'want':>6}")


def print_rows(shape: Shape, emissions: list[str], rows: list[dict]) -> list[str]:
    """Prints the rows of one shape and returns what they miss."""
    missed = []
    for emission, row in zip(emissions, rows, strict=True):
        cache, extra = row["case"]["cache"], ""
        name = f"{shape.name}{' warm' if cache == 'warm' else ''}"
        if "extra_us" in row:
            more, allowed = row["extra_us"], row.get("allowed_us", math.inf)
            extra = f"{more:+.1f} {100 * more / (row['us'] - more):+.1f}%{'!' if more > allowed else ' '}"
            if more > allowed:
                missed.append(f"{name} {emission}: {more:+.2f} us, allowed {allowed:.2f}")
        columns = ""
        for peer in PEER_COLUMNS:
            own = [us for key, us in row["peers"].items() if key.split(" ")[0] == peer]
            columns += f"{min(own):11.1f}" if own else f"{'-':>11}"
        speed = f"{row['ratio']:7.2f}" if row["peer"] else f"{'-':>7}"
        wanted, mark = row.get("wanted"), ""
        if wanted and row["peer"]:
            mark = " ok" if row["ratio"] >= wanted else " MISSED"
            if row["ratio"] < wanted:
                missed.append(f"{name} {emission}: speed {row['ratio']:.2f}, wanted {wanted:.2f}")
        want = f"{wanted:6.2f}{mark}" if wanted else ""
        numbers = f"{row['us']:8.1f}{row['floor_us']:8.1f}{100 * row['fraction']:5.0f}{extra:>15}"
        print(f"{name:25}{emission:8}{numbers}{columns}{speed}{want}", flush=True)
    for name, reason in rows[0].get("absent", {}).items():
        print(f"{'':25}{name} absent: {reason}", flush=True)
    return missed


def run(args, parser) -> None:
    """The CUDA mode of bench_block_attention.py."""
    emissions = args.emit.split(",")
    for emission in emissions:
        if emission not in EMISSIONS:
            parser.error(f"--emit must be of {', '.join(EMISSIONS)}, got {emission!r}")
    shapes = chosen_shapes(args, parser, all_shapes(), matches)
    device = gpu_name(args, parser)
    peers, absent = find_peers(args.peers.split(","), args.fa3)
    print(f"{device}, torch {torch.__version__}, seed {args.seed}")
    for name, reason in absent.items():
        print(f"{name} absent: {reason}")
    print_header()
    rows, missed = [], []
    for shape in shapes:
        results, reasons = measure_shape(shape, emissions, peers, args.warm, args.replays, args.seed)
        for cache, times in results.items():
            new = make_rows(shape, emissions, cache, times, reasons, {peer.name for peer in peers if peer.paged})
            missed += print_rows(shape, emissions, new)
            rows += new
        gc.collect()
        torch.cuda.empty_cache()
    print(f"targets missed: {len(missed)}" + "".join(f"\n  {line}" for line in missed))
    finish(args, "block_attention", device, rows, absent=absent)
