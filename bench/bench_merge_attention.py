"""merge_attention on an H100 against flashinfer.merge_states, or, where that can't be imported, against torch.

    python bench/bench_merge_attention.py [--rows 7B:1:2] [--out bench/results/h100/merge_attention.json]

Times are those of cuda_timing.py: cold (parts of more than 200 MB take turns, or 1000 sets) and warm (one set). floor =
all parts, all lse and the results once at 3.05 TB/s. FlashInfer gets the parts stacked [B * Q, N, H, D] and lse in
log2, as it wants them; torch gets lists, as we do. Every case is checked against float64 first.
"""

import argparse
import gc
import itertools
import math
from dataclasses import dataclass

import torch
from cuda_timing import capture, median_us
from gpu_bench import add_options, chosen_shapes, finish, gpu_name
from kv_sets import COLD_BYTES, DTYPE, HBM_BYTES_PER_S, MODELS, tokens_of
from torch import Tensor

from mage_ext import ops
from mage_ext.testing.compare import assert_out_close

BATCHES = (1, 16)
PARTS = (2, 3, 4, 8)
Q = 32
MOST_SETS = 1000
LSE_ERROR = 1e-4


@dataclass(frozen=True)
class MergeShape:
    model: str
    batch: int
    parts: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, Q, H, D."""
        heads, _, dim = MODELS[self.model]
        return self.batch, Q, heads, dim

    @property
    def input_bytes(self) -> int:
        return self.parts * self._result_bytes

    @property
    def _result_bytes(self) -> int:
        vectors = math.prod(self.size[:3])
        return vectors * (self.size[3] * DTYPE.itemsize + 4)

    @property
    def floor_us(self) -> float:
        return (self.input_bytes + self._result_bytes) / HBM_BYTES_PER_S * 1e6

    @property
    def case(self) -> dict:
        case = {"model": self.model, "D": self.size[3], "dtype": "bfloat16", "batch": self.batch, "Q": Q}
        return case | {"parts": self.parts}

    @property
    def name(self) -> str:
        return f"{self.model} batch {self.batch}, {self.parts} parts"


def all_shapes() -> list[MergeShape]:
    return [MergeShape(*values) for values in itertools.product(MODELS, BATCHES, PARTS)]


def matches(shape: MergeShape, pattern: str) -> bool:
    """Whether MODEL:BATCH:PARTS names a shape; parts that are empty, * or not there fit all."""
    parts = [part.strip() for part in pattern.split(":")]
    if len(parts) > 3:
        raise ValueError(f"--rows must be MODEL:BATCH:PARTS, got {pattern!r}")
    own = (shape.model.lower(), shape.batch, shape.parts)
    return all(
        part in ("", "*") or (part.lower() == value if isinstance(value, str) else tokens_of(part) == value)
        for part, value in zip(parts, own, strict=False)
    )


def make_parts(shape: MergeShape, count: int, seed: int, device: str = "cuda") -> list[tuple[list, list]]:
    """Sets of outs [B, Q, H, D] and lses [B, H, Q]."""
    random = torch.Generator(device).manual_seed(seed)
    requests, queries, heads, _ = shape.size
    outs = torch.empty(count, shape.parts, *shape.size, dtype=DTYPE, device=device).normal_(generator=random)
    lses = torch.empty(count, shape.parts, requests, heads, queries, device=device).normal_(5, 2, generator=random)
    return [(list(out), list(lse)) for out, lse in zip(outs, lses, strict=True)]


def torch_merge(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The formula, in `dtype` within."""
    stacked = torch.stack(lses).to(dtype)
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().transpose(2, 3)[..., None]
    return (torch.stack(outs) * weights).sum(0).to(outs[0].dtype), lse


def find_peer():
    """Name, and a function from a set to the peer's call."""
    try:
        import flashinfer
    except ImportError:
        return "torch logsumexp", lambda outs, lses: lambda: torch_merge(outs, lses)

    def flashinfer_call(outs, lses):
        v = torch.stack(outs, 2).flatten(0, 1)  # [B * Q, N, H, D]
        s = (torch.stack(lses, 1).permute(0, 3, 1, 2).flatten(0, 1) * math.log2(math.e)).contiguous()
        return lambda: flashinfer.merge_states(v, s)

    return "FlashInfer merge_states", flashinfer_call


def measure(shape: MergeShape, make_peer, replays: int, seed: int) -> dict[str, tuple[float, float]]:
    """Microseconds of ours and of the peer's, by cache state."""
    requests, queries, heads, dim = shape.size
    sets = make_parts(shape, min(MOST_SETS, math.ceil(COLD_BYTES / shape.input_bytes)), seed)
    out, lse = torch.empty(shape.size, dtype=DTYPE, device="cuda"), torch.empty(requests, heads, queries, device="cuda")
    needed = ops.merge_attention_workspace(shape.parts, requests, queries, heads, dim)
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")

    def our_call(outs, lses):
        return lambda: ops.merge_attention_out(outs, lses, out, lse, workspace)

    our_call(*sets[0])()
    exact, exact_lse = torch_merge([part.double() for part in sets[0][0]], sets[0][1], torch.float64)
    assert_out_close(out, exact, torch_merge(*sets[0])[0])
    assert ((lse - exact_lse).abs() <= LSE_ERROR * exact_lse.abs().clamp(min=1)).all()
    times = {}
    for cache, used in (("cold", sets), ("warm", sets[:1])):
        ours = capture([our_call(*parts) for parts in used])
        peer = capture([make_peer(*parts) for parts in used])
        medians = median_us({"ours": ours, "peer": peer}, replays)
        times[cache] = medians["ours"], medians["peer"]
        del ours, peer
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "MODEL:BATCH:PARTS")
    args = parser.parse_args()
    shapes = chosen_shapes(args, parser, all_shapes(), matches)
    device = gpu_name(args, parser)
    peer, make_peer = find_peer()
    print(f"{device}, torch {torch.__version__}, seed {args.seed}; peer: {peer}")
    print(f"{'case':24}{'MB':>7}{'floor':>8}{'cache':>7}{'us':>8}{'fl%':>5}{'peer':>9}{'speed':>7}")
    rows = []
    for shape in shapes:
        for cache, (us, peer_us) in measure(shape, make_peer, args.replays, args.seed).items():
            floor_us = shape.floor_us
            print(
                f"{shape.name:24}{shape.input_bytes / 1e6:7.1f}{floor_us:8.2f}{cache:>7}{us:8.2f}"
                f"{100 * floor_us / us:5.0f}{peer_us:9.2f}{peer_us / us:7.1f}",
                flush=True,
            )
            row = {"case": shape.case | {"cache": cache}, "us": round(us, 2), "floor_us": round(floor_us, 2)}
            row |= {"fraction": round(floor_us / us, 3), "peer": peer, "peer_us": round(peer_us, 2)}
            rows.append(row | {"ratio": round(peer_us / us, 3)})
        gc.collect()
        torch.cuda.empty_cache()
    finish(args, "merge_attention", device, rows)


if __name__ == "__main__":
    main()
