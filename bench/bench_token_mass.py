"""token_mass on an H100, beside block_attention of the same run, which gave its lse.

    python bench/bench_token_mass.py [--rows 7B:1:128K,8B:16] [--kinds all,prefix,list,rows] [--replays 15]
        [--out bench/results/h100/token_mass.json]

Kinds: `all` tokens with norm context; `prefix`, the same with norm prefix (two passes); `list`, candidates of 64
tokens, an eighth of all, scattered; `rows`, every row's logarithm (contexts up to 32K: the output is larger than K).
Times are those of cuda_timing.py, cold: sets of K of more than 200 MB take turns. share = our time /
block_attention's, which must not exceed 0.55 for `all`. floor = max(bytes / HBM, flops / tensor cores, exponentials /
(16 per clock and multiprocessor)). Every shape is checked against float32 first.
"""

import argparse
import math

import torch
from block_attention_cuda import exact_results, matches, mixed_contexts
from cuda_timing import capture, median_us
from gpu_bench import add_options, chosen_shapes, finish, gpu_name
from kv_sets import HBM_BYTES_PER_S, MMA_FLOPS_PER_S, MODELS, KvSet, Shape, make_sets, num_sets, tokens_of

from mage_ext import ops
from mage_ext.testing.compare import assert_mass_close

KINDS = ("all", "prefix", "list", "rows")
BATCHES = ((1, "4K"), (1, "16K"), (1, "32K"), (1, "128K"), (4, "32K"), (16, "32K"))
UNIT = 64
LISTED = 8  # one unit of so many is a candidate
MOST_ROWS_TOKENS = 40000
WANTED = 0.55  # of block_attention's time
EXPONENTIALS_PER_S = 16 * 132 * 1.755e9


def all_shapes() -> list[Shape]:
    shapes = []
    for model in MODELS:
        shapes += [Shape(model, (tokens_of(context),) * batch) for batch, context in BATCHES]
        shapes.append(Shape(model, mixed_contexts()))
    return shapes


def floor_us(shape: Shape, kind: str, listed: int | None = None) -> float:
    """listed: tokens of the candidates of each request and KV head, where they are not those of this bench."""
    heads, kv_heads, dim = shape.heads
    tokens = sum(shape.lengths)
    if kind == "list":
        tokens = shape.batch * (listed or num_candidates(shape) * UNIT)
    passes = 2 if kind == "prefix" else 1
    pairs = passes * kv_heads * shape.rows * tokens
    moved = passes * tokens * kv_heads * dim * 2 + shape.batch * shape.q_len * heads * (2 * dim + 4)
    moved += 4 * kv_heads * tokens * (shape.rows if kind == "rows" else 1)
    powers = 0 if kind == "rows" else pairs
    return max(moved / HBM_BYTES_PER_S, 2 * pairs * dim / MMA_FLOPS_PER_S, powers / EXPONENTIALS_PER_S) * 1e6


def num_candidates(shape: Shape) -> int:
    return math.ceil(shape.max_len / UNIT / LISTED)


def candidates(shape: Shape, kv_set: KvSet, seed: int) -> torch.Tensor:
    """[B, Hkv, C] units of each request, ascending."""
    random = torch.Generator().manual_seed(seed)
    units = torch.full((shape.batch, shape.heads[1], num_candidates(shape)), -1, dtype=torch.int32)
    for b, length in enumerate(shape.lengths):
        for head in range(shape.heads[1]):
            chosen = torch.randperm(math.ceil(length / UNIT), generator=random)[: units.shape[2]].sort().values
            units[b, head, : len(chosen)] = chosen
    return units.to(kv_set.q.device)


def attention_calls(shape: Shape, sets: list[KvSet]):
    """block_attention of every set, and the lse that it leaves for each."""
    heads, kv_heads, dim = shape.heads
    device = sets[0].q.device
    out = torch.empty_like(sets[0].q)
    size = ops.block_attention_workspace(shape.batch, shape.q_len, heads, kv_heads, dim, shape.max_len)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    lses = [torch.empty(shape.batch, heads, shape.q_len, device=device) for _ in sets]
    calls = [
        lambda s=s, lse=lse: ops.block_attention_out(*s.tensors, out, lse, workspace, max_seq_len=shape.max_len)
        for s, lse in zip(sets, lses, strict=True)
    ]
    return calls, lses


def token_calls(
    shape: Shape,
    sets: list[KvSet],
    lses: list[torch.Tensor],
    kind: str,
    seed: int,
    masses: list[torch.Tensor] | None = None,
):
    """token_mass of every set, the output that all of them write, and their options; each set's output may be given."""
    heads, kv_heads, dim = shape.heads
    device = sets[0].q.device
    options, tokens = {"max_seq_len": shape.max_len}, shape.max_len
    if kind == "prefix":
        options |= {"norm": "prefix", "prefix_lens": torch.tensor(shape.contexts, dtype=torch.int32, device=device)}
    if kind == "list":
        options |= {"units": candidates(shape, sets[0], seed), "g": UNIT}
        tokens = options["units"].shape[2] * UNIT
    sizes = (shape.batch, kv_heads, tokens)
    if kind == "rows":
        options["score"] = "rows"
        sizes += (shape.rows,)
    masses = masses or [torch.empty(sizes, device=device)] * len(sets)
    size = ops.token_mass_workspace(shape.batch, shape.q_len, heads, kv_heads, dim, shape.max_len)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    calls = []
    for kv_set, lse, mass in zip(sets, lses, masses, strict=True):
        inputs = (kv_set.q, kv_set.k_cache, kv_set.block_table, kv_set.seq_lens, lse, mass)
        calls.append(lambda inputs=inputs: ops.token_mass_out(*inputs, workspace, **options))
    return calls, masses[0], options


def check(shape: Shape, kind: str, mass: torch.Tensor, options: dict, shares: torch.Tensor) -> None:
    """Request 0 against its float32 shares [Hkv, R, S]."""
    length = shape.lengths[0]
    if kind == "rows":
        assert_mass_close(mass[0, :, :length].exp(), shares.transpose(1, 2), dim=1)
        return
    exact = shares.mean(1)
    if kind == "prefix":
        below = shares[..., : shape.contexts[0]]
        exact = torch.zeros_like(exact)
        exact[:, : shape.contexts[0]] = (below / below.sum(-1, keepdim=True)).mean(1)
    if kind == "list":
        tokens = options["units"][0].long()[..., None] * UNIT + torch.arange(UNIT, device=mass.device)
        padded = torch.nn.functional.pad(exact, (0, UNIT))
        exact = torch.where(tokens >= 0, padded.gather(1, tokens.clamp(0, length).flatten(1)).view_as(tokens), 0)
        assert_mass_close(mass[0], exact.flatten(1))
        return
    assert_mass_close(mass[0, :, :length], exact)
    assert not mass[0, :, length:].any(), "mass past the last token is not 0"


def measure(shape: Shape, kinds: list[str], replays: int, seed: int) -> dict[str, float]:
    """Microseconds by kind, and of block_attention."""
    sets = make_sets(shape, 2 * num_sets(shape), seed)  # twice: of K and V, only K is read
    attention, lses = attention_calls(shape, sets)
    for call in attention:
        call()
    shares = exact_results(shape, sets[0])[1]
    graphs = {"attention": capture(attention)}
    for kind in kinds:
        if kind == "rows" and sum(shape.lengths) > MOST_ROWS_TOKENS:
            continue
        calls, mass, options = token_calls(shape, sets, lses, kind, seed)
        calls[0]()
        check(shape, kind, mass, options, shares)
        graphs[kind] = capture(calls)
    del shares
    return median_us(graphs, replays)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "MODEL:BATCH:CONTEXT")
    parser.add_argument("--kinds", default="all,prefix,list,rows", help="which of these are timed")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            parser.error(f"--kinds must be of {', '.join(KINDS)}, got {kind!r}")
    shapes = chosen_shapes(args, parser, all_shapes(), matches)
    device = gpu_name(args, parser)
    print(f"{device}, torch {torch.__version__}, seed {args.seed}")
    print(f"{'case':25}{'kind':8}{'us':>8}{'floor':>8}{'fl%':>5}{'attention us':>14}{'share':>7}")
    rows, missed = [], []
    for shape in shapes:
        times = measure(shape, kinds, args.replays, args.seed)
        attention_us = times.pop("attention")
        for kind, us in times.items():
            floor, share = floor_us(shape, kind), us / attention_us
            row = {
                "case": shape.case | {"kind": kind, "cache": "cold"},
                "us": round(us, 2),
                "floor_us": round(floor, 2),
            }
            row |= {"fraction": round(floor / us, 3), "peer": "block_attention", "peer_us": round(attention_us, 2)}
            row |= {"ratio": round(attention_us / us, 3), "share": round(share, 3)}
            mark = ""
            if kind == "all":
                row["wanted"] = WANTED
                mark = " ok" if share <= WANTED else " MISSED"
                if share > WANTED:
                    missed.append(f"{shape.name}: {share:.2f} of block_attention, wanted {WANTED}")
            rows.append(row)
            numbers = f"{us:8.1f}{floor:8.1f}{100 * floor / us:5.0f}{attention_us:14.1f}{share:7.2f}"
            print(f"{shape.name:25}{kind:8}{numbers}{mark}", flush=True)
        torch.cuda.empty_cache()
    print(f"targets missed: {len(missed)}" + "".join(f"\n  {line}" for line in missed))
    finish(args, "token_mass", device, rows)


if __name__ == "__main__":
    main()
