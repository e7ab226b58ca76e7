"""row_votes on an H100 against the torch code that a user would write: topk, scatter_add and two sums.

    python bench/bench_row_votes.py [--rows 7B:1:128K:64] [--rows-alike 0.7] [--out bench/results/h100/row_votes.json]

Times are those of cuda_timing.py: cold (log-shares of more than 200 MB take turns) and warm (one set, as
block_attention_rows leaves it in L2). floor = row_mass and the results once at 3.05 TB/s, in both columns. Rows are
blocks of 32 positions, n = ceil((P + 32) / g), k = 1024 tokens per row; logits are 3 * normal(unit) * a + 3 *
normal(unit, row) * (1 - a), a from --rows-alike. Votes and union sizes of every case are checked against the CPU.
"""

import argparse
import gc
import itertools
import math
from dataclasses import dataclass

import torch
from cuda_timing import capture, median_us
from gpu_bench import add_options, chosen_shapes, finish, gpu_name
from kv_sets import COLD_BYTES, HBM_BYTES_PER_S, MODELS, short, tokens_of
from torch import Tensor

from mage_ext import ops

CONTEXTS = ("4K", "32K", "128K")
BATCHES = (1, 4)
GRANULARITIES = (64, 16)
Q = 32
K = 1024
COVERAGE_ERROR = 2**-15  # of float32 sums in different orders


@dataclass(frozen=True)
class VotesShape:
    model: str
    batch: int
    context: int  # P
    g: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, Hkv, n, R."""
        heads, kv_heads, _ = MODELS[self.model]
        return self.batch, kv_heads, math.ceil((self.context + Q) / self.g), heads // kv_heads * Q

    @property
    def input_bytes(self) -> int:
        return 4 * math.prod(self.size)

    @property
    def floor_us(self) -> float:
        requests, heads, units, _ = self.size
        return (self.input_bytes + requests * heads * (4 * units + 8)) / HBM_BYTES_PER_S * 1e6

    @property
    def case(self) -> dict:
        case = {"model": self.model, "batch": self.batch, "context": self.context, "Q": Q, "K": K, "g": self.g}
        return case | {"n": self.size[2], "rows": self.size[3]}

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch}x{short(self.context)} g={self.g}"


def all_shapes() -> list[VotesShape]:
    grid = itertools.product(MODELS, BATCHES, CONTEXTS, GRANULARITIES)
    return [VotesShape(model, batch, tokens_of(context), g) for model, batch, context, g in grid]


def matches(shape: VotesShape, pattern: str) -> bool:
    """Whether MODEL:BATCH:CONTEXT:G names a shape; parts that are empty, * or not there fit all."""
    parts = [part.strip() for part in pattern.split(":")]
    if len(parts) > 4:
        raise ValueError(f"--rows must be MODEL:BATCH:CONTEXT:G, got {pattern!r}")
    own = (shape.model.lower(), shape.batch, shape.context, shape.g)
    return all(
        part in ("", "*") or (part.lower() == value if isinstance(value, str) else tokens_of(part) == value)
        for part, value in zip(parts, own, strict=False)
    )


def make_row_mass(shape: VotesShape, count: int, alike: float, seed: int, device: str = "cuda") -> Tensor:
    """Log-shares [count, B, Hkv, n, R] that sum to 1 over n."""
    random = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(count, *shape.size, device=device).normal_(generator=random).mul_(3 * (1 - alike))
    common = torch.empty(*logits.shape[:-1], 1, device=device).normal_(generator=random)
    logits.add_(common, alpha=3 * alike)
    return logits.sub_(logits.logsumexp(3, keepdim=True))


def torch_votes(row_mass: Tensor, prefix_lens: Tensor, k: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch, but for ties; every row has k / g units."""
    requests, heads, units, _ = row_mass.shape
    eligible = (prefix_lens // g)[:, None, None, None]
    unit = torch.arange(units, device=row_mass.device)[None, None, :, None]
    top = row_mass.masked_fill(unit >= eligible, -math.inf).topk(k // g, 2, sorted=False).indices.flatten(2)
    votes = torch.zeros(requests, heads, units, dtype=torch.int32, device=row_mass.device)
    votes.scatter_add_(2, top, torch.ones_like(top, dtype=torch.int32))
    in_union = votes > 0
    shares = row_mass.exp()
    coverage = ((shares * in_union[..., None]).sum(2) / shares.sum(2)).mean(-1)
    return votes, in_union.sum(-1, dtype=torch.int32), coverage


def our_call(shape: VotesShape, row_mass: Tensor, prefix_lens: Tensor, outputs, workspace: Tensor):
    return lambda: ops.row_votes_out(row_mass, prefix_lens, *outputs, workspace, k=K, g=shape.g)


def check(shape: VotesShape, row_mass: Tensor, prefix_lens: Tensor, outputs, workspace: Tensor) -> None:
    """One call against the CPU, exact but for the coverage. The peer's ties may go to other units."""
    our_call(shape, row_mass, prefix_lens, outputs, workspace)()
    votes, sizes, coverage = ops.row_votes(row_mass.cpu(), prefix_lens.cpu(), k=K, g=shape.g)
    assert torch.equal(outputs[0].cpu(), votes) and torch.equal(outputs[1].cpu(), sizes), f"{shape.name}: other votes"
    torch.testing.assert_close(outputs[2].cpu(), coverage, rtol=COVERAGE_ERROR, atol=0)
    peer = torch_votes(row_mass, prefix_lens, K, shape.g)
    assert torch.equal(outputs[0].sum(-1), peer[0].sum(-1)), f"{shape.name}: torch casts other numbers of votes"


def measure(shape: VotesShape, alike: float, replays: int, seed: int) -> dict[str, tuple[float, float]]:
    """Microseconds of ours and of the peer's, by cache state."""
    requests, heads, units, rows = shape.size
    count = max(1, math.ceil(COLD_BYTES / shape.input_bytes))
    sets = make_row_mass(shape, count, alike, seed)
    prefix_lens = torch.full((requests,), shape.context, dtype=torch.int32, device="cuda")
    integers = {"dtype": torch.int32, "device": "cuda"}
    outputs = [torch.empty(requests, heads, units, **integers), torch.empty(requests, heads, **integers)]
    outputs.append(torch.empty(requests, heads, device="cuda"))
    needed = ops.row_votes_workspace(requests, heads, units, rows)
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    check(shape, sets[0], prefix_lens, outputs, workspace)
    times = {}
    for cache, used in (("cold", sets), ("warm", sets[:1])):
        ours = capture([our_call(shape, row_mass, prefix_lens, outputs, workspace) for row_mass in used])
        peer = capture([lambda s=row_mass: torch_votes(s, prefix_lens, K, shape.g) for row_mass in used])
        medians = median_us({"ours": ours, "peer": peer}, replays)
        times[cache] = medians["ours"], medians["peer"]
        del ours, peer
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "MODEL:BATCH:CONTEXT:G")
    parser.add_argument(
        "--rows-alike", type=float, default=0.7, help="0: every row ranks units on its own, 1: all alike"
    )
    args = parser.parse_args()
    shapes = chosen_shapes(args, parser, all_shapes(), matches)
    if not 0 <= args.rows_alike <= 1:
        parser.error(f"--rows-alike must be in [0, 1], got {args.rows_alike}")
    device = gpu_name(args, parser)
    print(f"{device}, torch {torch.__version__}, seed {args.seed}, rows alike {args.rows_alike}")
    print("us; fl% = floor / us; speed = torch (topk, scatter_add, sums) / us")
    print(f"{'case':22}{'n x R':>11}{'MB':>7}{'floor':>8}{'cache':>7}{'us':>8}{'fl%':>5}{'torch':>9}{'speed':>7}")
    rows = []
    for shape in shapes:
        for cache, (us, peer_us) in measure(shape, args.rows_alike, args.replays, args.seed).items():
            floor_us = shape.floor_us
            size = f"{shape.size[2]} x {shape.size[3]}"
            print(
                f"{shape.name:22}{size:>11}{shape.input_bytes / 1e6:7.1f}{floor_us:8.2f}{cache:>7}{us:8.2f}"
                f"{100 * floor_us / us:5.0f}{peer_us:9.1f}{peer_us / us:7.1f}",
                flush=True,
            )
            row = {"case": shape.case | {"cache": cache}, "us": round(us, 2), "floor_us": round(floor_us, 2)}
            row |= {
                "fraction": round(floor_us / us, 3),
                "peer": "torch topk + scatter_add",
                "peer_us": round(peer_us, 2),
            }
            rows.append(row | {"ratio": round(peer_us / us, 3)})
        gc.collect()
        torch.cuda.empty_cache()
    finish(args, "row_votes", device, rows, rows_alike=args.rows_alike)


if __name__ == "__main__":
    main()
