"""block_attention and its emissions: on the CPU against torch's scaled_dot_product_attention, on an H100 against FA3,
FlashInfer and SDPA.

    python bench/bench_block_attention.py [--case 7B] [--dtype bfloat16] [--threads 2] [--profile]
    python bench/bench_block_attention.py --device cuda --fa3 _vllm_fa3_C.abi3.so [--rows 7B:1:32K,8B:16] [--warm]
        [--emit none,mass64] [--out bench/results/h100/block_attention.json]

CUDA: times are those of cuda_timing.py, cold (sets of K/V of more than 200 MB take turns) and with --warm also over one
set; shapes, targets and the table are in block_attention_cuda.py. Every case is checked against float32 first.

CPU: calls of both alternate in one process and the ratio of their medians is the result, as clocks and neighbours move
both. The peer gets contiguous K and V, already expanded to all query heads; we read the paged pool with a shuffled
table and share each KV head. Context means the prefix P; S = P + Q. floor = max(flops at the float32 matrix rate, KV,
q and out bytes at the read rate), both measured first; flops count 4 * H * rows * visible tokens * D. Prefill cases end
blocks of 32 rows where their own block ends.
"""

import argparse
import json
import platform
import statistics
import time

import block_attention_cuda
import gpu_bench
import torch
from result_file import make_result

from mage_ext import ops, reference
from mage_ext.testing.cases import AttentionCase
from mage_ext.testing.compare import assert_out_close

MODELS = {"135M": (9, 3, 64), "7B": (28, 4, 128)}  # H, Hkv, D
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAGE = 64
STAIR = 32


def all_cases():
    """One block at 2K keys with every emission, a sub-block, and chunks of prefill."""
    for model in MODELS:
        for dtype in DTYPES:
            for context, rows, emit, g in (
                (2016, 32, "none", None),
                (2016, 32, "mass", 64),
                (2016, 32, "mass", 16),
                (2016, 32, "mass", 1),
                (2016, 32, "rows", 64),
                (2040, 8, "none", None),
                (1792, 256, "none", None),
            ):
                yield {
                    "model": model,
                    "D": MODELS[model][2],
                    "dtype": dtype,
                    "batch": 1,
                    "context": context,
                    "Q": rows,
                    "g": g,
                    "page": PAGE,
                    "emit": emit,
                    "cache": "warm",
                }


def case_name(case):
    emit = case["emit"] if case["g"] is None else f"{case['emit']} g={case['g']}"
    return f"{case['model']} {case['context']}+{case['Q']} {emit}"


def measure_roofs():
    """(flops per second of a float32 matrix product, bytes per second read) of this machine, best of several."""
    a, b = torch.randn(2, 1024, 1024)
    big = torch.ones(64 * 2**20)

    def best(call):
        times = []
        for _ in range(15):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)

    return 2 * 1024**3 / best(lambda: a @ b), big.numel() * 4 / best(lambda: big.sum())


def build(case):
    """Our call and the peer's, as functions without arguments, and the operands both share."""
    heads, kv_heads, dim = MODELS[case["model"]]
    length = case["context"] + case["Q"]
    prefill = case["Q"] > 64
    shape = AttentionCase(
        (length,),
        case["Q"],
        heads,
        kv_heads,
        dim,
        page=case["page"],
        dtype=DTYPES[case["dtype"]],
        rows="staircase" if prefill else None,
        stair=STAIR,
    )
    tensors, options = shape.tensors(), shape.options
    if case["emit"] == "none":
        ours = lambda: ops.block_attention(**tensors, **options)  # noqa: E731
    elif case["emit"] == "mass":
        ours = lambda: ops.block_attention_mass(**tensors, **options, g=case["g"])  # noqa: E731
    else:
        ours = lambda: ops.block_attention_rows(**tensors, **options, g=case["g"])  # noqa: E731

    table, positions = tensors["block_table"][0].long(), torch.arange(length)
    k, v = (
        tensors[name][table[positions // PAGE], positions % PAGE]
        .transpose(0, 1)
        .repeat_interleave(heads // kv_heads, 0)
        for name in ("k_cache", "v_cache")
    )
    q = tensors["q"].transpose(1, 2).contiguous()
    mask = None if options["kv_lens"] is None else positions < options["kv_lens"][0][:, None]
    k, v = k[None].contiguous(), v[None].contiguous()
    peer = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
    visible = case["Q"] * length if mask is None else int(mask.sum())
    flops = 4 * heads * visible * dim
    size = q.element_size()
    moved = 2 * length * kv_heads * dim * size + 2 * q.numel() * size
    return ours, peer, (tensors, options), flops, moved


def check(ours, peer, call):
    """Our out is as exact as the peer's, once per case and before any timing."""
    tensors, options = call
    exact, _ = reference.block_attention(**tensors, **options, upcast=True)
    assert_out_close(ours()[0], exact, peer().transpose(1, 2))


def measure(ours, peer, repeats):
    """Medians in microseconds of calls that alternate."""
    times = ([], [])
    for i in range(repeats + 3):
        for call, into in zip((ours, peer), times, strict=True):
            begin = time.perf_counter()
            call()
            if i >= 3:
                into.append((time.perf_counter() - begin) * 1e6)
    return [(statistics.median(t), min(t)) for t in times]


def cpu_name():
    with open("/proc/cpuinfo") as info:
        return next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    cpu = parser.add_argument_group("with --device cpu")
    cpu.add_argument("--case", default="", help="only cases whose name contains this")
    cpu.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    cpu.add_argument("--threads", type=int, default=torch.get_num_threads())
    cpu.add_argument("--repeats", type=int, default=30)
    cpu.add_argument("--profile", action="store_true", help="one call of ours per case, for a profiler")
    cuda = parser.add_argument_group("with --device cuda")
    gpu_bench.add_options(cuda, "MODEL:BATCH:CONTEXT:Q")
    cuda.add_argument("--emit", default=block_attention_cuda.DEFAULT_EMISSIONS, help="none, mass64, rows16, by commas")
    cuda.add_argument("--peers", default="fa3,flashinfer,sdpa", help="which of these are timed")
    cuda.add_argument("--fa3", help="the library _vllm_fa3_C.abi3.so of a vllm wheel")
    cuda.add_argument("--warm", action="store_true", help="rows with a warm L2 too")
    args = parser.parse_args()
    for device, group in (("cpu", cpu), ("cuda", cuda)):
        for action in group._group_actions:
            if device != args.device and getattr(args, action.dest) != action.default:
                parser.error(f"{action.option_strings[0]} is for --device {device}, got --device {args.device}")
    if args.device == "cuda":
        block_attention_cuda.run(args, parser)
        return
    torch.set_num_threads(args.threads)
    cases = [c for c in all_cases() if args.case in case_name(c) and args.dtype in (None, c["dtype"])]
    if not cases:
        parser.error(f"--case must be part of a case's name, got {args.case!r}")
    if args.profile:
        for case in cases:
            build(case)[0]()
        return

    device = f"{cpu_name()}, {args.threads} threads"
    flop_rate, read_rate = measure_roofs()
    print(f"{device}, torch {torch.__version__}")
    print(f"roofs, by torch: {flop_rate / 1e9:.0f} GFLOP/s (float32 product), {read_rate / 1e9:.1f} GB/s (sum)")
    print("speed = median of scaled_dot_product_attention on contiguous expanded K and V, attention alone / our median")
    header = f"{'case':28}{'dtype':10}{'median us':>10}{'min us':>9}{'GFLOP/s':>9}{'GB/s':>7}  {'bound':5}{'%floor':>7}"
    print(f"{header}{'torch us':>10}{'speed':>9}")
    rows = []
    for case in cases:
        ours, peer, call, flops, moved = build(case)
        check(ours, peer, call)
        (us, best), (peer_us, _) = measure(ours, peer, args.repeats)
        floor_us = max(flops / flop_rate, moved / read_rate) * 1e6
        bound = "mma" if flops / flop_rate > moved / read_rate else "mem"
        rates = f"{flops / us / 1e3:9.0f}{moved / us / 1e3:7.1f}"
        against = f"{100 * floor_us / us:7.0f}{peer_us:10.0f}{peer_us / us:9.2f}"
        print(f"{case_name(case):28}{case['dtype']:10}{us:10.0f}{best:9.0f}{rates}  {bound:5}{against}", flush=True)
        row = {"case": case, "us": round(us, 1), "min_us": round(best, 1), "floor_us": round(floor_us, 1)}
        row |= {"fraction": round(floor_us / us, 3), "peer": "torch sdpa", "peer_us": round(peer_us, 1)}
        rows.append(row | {"ratio": round(peer_us / us, 3)})
    print(json.dumps(make_result("block_attention", device, rows)))


if __name__ == "__main__":
    main()
