"""token_confidence against torch's softmax, max and entropy.

    python bench/bench_token_confidence.py --device cuda [--rows 512] [--out bench/results/h100/token_confidence.json]
    python bench/bench_token_confidence.py [--rows 32] [--threads 2]

CUDA: times are those of cuda_timing.py, cold: sets of logits of more than 200 MB take turns. CPU: calls of both
alternate and the ratio of their medians is the result. floor = bytes of the logits / the read rate (3.05 TB/s on an
H100, that of torch's sum on the CPU). "odd" rows begin one logit behind a boundary of 16 bytes. Every case is checked
against float64 first. The peer works in float32, as the sampler would without the op.
"""

import argparse
import json
import math
import statistics
import time

import torch
from cuda_timing import capture, median_us
from kv_sets import COLD_BYTES, HBM_BYTES_PER_S
from result_file import check_device, make_result, write_result

from mage_ext import ops

VOCABS = {"SmolLM2": 49_152, "Qwen2.5": 151_936, "Gemma": 262_144}
ROWS = (8, 32, 128, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def all_cases() -> list[dict]:
    """bfloat16 at every size, and the other variants of the kernel at one."""
    cases = [(rows, vocab, "bfloat16", False) for vocab in VOCABS.values() for rows in ROWS]
    cases += [(128, 151_936, dtype, odd) for dtype in DTYPES for odd in (False, True)]
    keys = ("rows", "vocab", "dtype", "odd")
    cases = list(dict.fromkeys(cases))
    return [dict(zip(keys, case, strict=True)) | {"cache": "cold"} for case in cases]


def logits_bytes(case: dict) -> int:
    return case["rows"] * case["vocab"] * DTYPES[case["dtype"]].itemsize


def make_logits(case: dict, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    wide = torch.empty(case["rows"], case["vocab"] + 8, dtype=DTYPES[case["dtype"]], device=device)
    logits = wide[:, 1 : 1 + case["vocab"]] if case["odd"] else wide[:, : case["vocab"]]
    for row in logits:
        row.copy_(torch.randn(case["vocab"], generator=generator, device=device) * 4)
    return logits


def by_torch(logits: torch.Tensor):
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    prob, token = probs.max(-1)
    return token, prob, torch.special.entr(probs).sum(-1)


def check(logits: torch.Tensor) -> None:
    """Tokens are exact; probability and entropy are as the contract has them."""
    for begin in range(0, len(logits), 64):
        part = logits[begin : begin + 64]
        token, prob, entropy = ops.token_confidence(part)
        truth = torch.log_softmax(part.double(), -1)
        torch.testing.assert_close(token, part.float().argmax(-1), rtol=0, atol=0)
        torch.testing.assert_close(prob.double(), truth.amax(-1).exp(), rtol=2**-20, atol=0)
        torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1), rtol=2**-20, atol=0)


def our_call(logits: torch.Tensor):
    outs = ops.token_confidence(logits)
    workspace = torch.empty(ops.token_confidence_workspace(*logits.shape), dtype=torch.uint8, device=logits.device)
    return lambda: ops.token_confidence_out(logits, *outs, workspace)


def times_on_cuda(case: dict, replays: int, seed: int) -> dict[str, float]:
    count = max(1, math.ceil(COLD_BYTES / logits_bytes(case)))
    sets = [make_logits(case, "cuda", seed + i) for i in range(count)]
    check(sets[0])
    graphs = {
        "ours": capture([our_call(logits) for logits in sets]),
        "torch": capture([lambda logits=logits: by_torch(logits) for logits in sets]),
    }
    return median_us(graphs, replays)


def times_on_cpu(case: dict, replays: int, seed: int) -> dict[str, float]:
    logits = make_logits(case, "cpu", seed)
    check(logits)
    calls = {"ours": our_call(logits), "torch": lambda: by_torch(logits)}
    times = {name: [] for name in calls}
    for replay in range(replays + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if replay:
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_read_rate() -> float:
    big = torch.ones(64 * 2**20)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        big.sum()
        times.append(time.perf_counter() - begin)
    return big.numel() * 4 / min(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="only cases of so many rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="with --device cpu")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="result file, written on an H100 only")
    args = parser.parse_args(argv)
    cases = [case for case in all_cases() if args.rows in (None, case["rows"])]
    if not cases:
        parser.error(f"--rows must be one of {', '.join(map(str, ROWS))}, got {args.rows}")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that torch can use")
        device, rate, measure = torch.cuda.get_device_name(), HBM_BYTES_PER_S, times_on_cuda
    else:
        torch.set_num_threads(args.threads)
        device, rate, measure = f"cpu, {args.threads} threads", cpu_read_rate(), times_on_cpu
    if args.out:
        try:
            check_device(device)
        except ValueError as error:
            parser.error(str(error))
    print(f"{device}, torch {torch.__version__}, reads {rate / 1e9:.0f} GB/s")
    print(f"{'rows':>5}{'vocab':>8}  {'dtype':14}{'MB':>8}{'us':>9}{'floor':>8}{'fl%':>5}{'torch us':>10}{'speed':>7}")
    rows = []
    for case in cases:
        times, moved = measure(case, args.replays, args.seed), logits_bytes(case)
        us, peer_us, floor_us = times["ours"], times["torch"], moved / rate * 1e6
        name = case["dtype"] + (" odd" if case["odd"] else "")
        size = f"{case['rows']:>5}{case['vocab']:>8}  {name:14}{moved / 1e6:8.1f}"
        print(f"{size}{us:9.1f}{floor_us:8.1f}{100 * floor_us / us:5.0f}{peer_us:10.1f}{peer_us / us:7.1f}", flush=True)
        row = {"case": case, "us": round(us, 2), "floor_us": round(floor_us, 2), "fraction": round(floor_us / us, 3)}
        rows.append(row | {"peer": "torch", "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 3)})
        if args.device == "cuda":
            torch.cuda.empty_cache()
    result = make_result("token_confidence", device, rows, seed=args.seed)
    if args.out:
        write_result(args.out, result)
        print(f"written: {args.out}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
