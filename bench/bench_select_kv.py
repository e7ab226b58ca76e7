"""select_kv of a whole step on an H100 against FlashInfer's top_k, where it can be imported, and torch.topk over the
same rows; the faster one is the peer.

    python bench/bench_select_kv.py [--rows 7B:1:128K:64:fixed] [--out bench/results/h100/select_kv.json]

Times are those of cuda_timing.py: cold (masses of more than 200 MB take turns) and warm (one set, as the exact forward
may leave it in L2). floor = masses and results once at 3.05 TB/s, in both columns. Rows are all layers and KV heads of
a model, or with layers = 1 those of one layer; n = ceil((P + 32) / g), k = 1024 tokens where the row names no other K,
of which 4 are sinks and 64 recents; masses are softmax(3 * normal), in a row with runs softmax(1.5 * normal of the run
+ 0.3 * normal). The peers find the same number of units, but neither put them in order nor add up their masses, and
know no rules: with "layer", "mass" and "joint" they stand as references. FlashInfer gets rows that are contiguous. All
five results of every case are checked against the CPU, bit for bit.
"""

import argparse
import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cuda_timing import capture, median_us
from gpu_bench import add_options, chosen_shapes, finish, gpu_name
from kv_sets import COLD_BYTES, HBM_BYTES_PER_S, MODELS, short, tokens_of
from peers import reason_of
from torch import Tensor

from mage_ext import ops

LAYERS = {"7B": 28, "1.5B": 28, "8B": 36}
CONTEXTS = ("32K", "128K")
BATCHES = (1, 4)
GRANULARITIES = (64, 16)
Q = 32
K = 1024
SINKS, RECENTS = 4, 64
P_OF_MASS = 0.5


@dataclass(frozen=True)
class SelectShape:
    model: str
    batch: int
    context: int  # P
    g: int
    rule: str
    layers: int
    runs: int | None = None  # units of a run whose masses are alike; None: each by itself
    k: int = K

    @property
    def size(self) -> tuple[int, int, int, int]:
        """L, B, Hkv, n."""
        return self.layers, self.batch, MODELS[self.model][1], math.ceil((self.context + Q) / self.g)

    @property
    def rows(self) -> int:
        return math.prod(self.size[:3])

    @property
    def capacity(self) -> int:
        """Kmax: budgets of rules that differ between rows may be four times the mean."""
        return self.k // self.g * (1 if self.rule == "fixed" else 4)

    @property
    def input_bytes(self) -> int:
        return 4 * math.prod(self.size)

    @property
    def floor_us(self) -> float:
        read = self.input_bytes * (2 if self.rule == "layer" else 1)  # the votes, too
        return (read + self.rows * (4 * self.capacity + 9)) / HBM_BYTES_PER_S * 1e6

    @property
    def case(self) -> dict:
        case = {"model": self.model, "batch": self.batch, "context": self.context, "Q": Q, "K": self.k, "g": self.g}
        case |= {"runs": self.runs} if self.runs else {}
        return case | {"rule": self.rule, "layers": self.layers, "rows": self.rows, "n": self.size[3]}

    @property
    def name(self) -> str:
        layers = "" if self.layers == LAYERS[self.model] else f" L={self.layers}"
        runs = f" runs={self.runs}" if self.runs else ""
        budget = "" if self.k == K else f" K={self.k}"
        return f"{self.model} {self.batch}x{short(self.context)} g={self.g} {self.rule}{layers}{runs}{budget}"


def all_shapes() -> list[SelectShape]:
    grid = itertools.product(MODELS, BATCHES, CONTEXTS, GRANULARITIES)
    shapes = [SelectShape(m, b, tokens_of(context), g, "fixed", LAYERS[m]) for m, b, context, g in grid]
    shapes += [SelectShape("7B", 1, tokens_of("128K"), 64, rule, LAYERS["7B"]) for rule in ("layer", "mass", "joint")]
    shapes += [SelectShape("7B", 1, tokens_of(context), 1, "fixed", 1) for context in CONTEXTS]
    shapes += [SelectShape("7B", 1, tokens_of(context), 1, "fixed", LAYERS["7B"]) for context in CONTEXTS]
    shapes += [SelectShape("7B", 1, tokens_of("128K"), 1, "fixed", LAYERS["7B"], runs=128)]
    shapes += [SelectShape("7B", 16, tokens_of("128K"), 64, "fixed", LAYERS["7B"])]
    return shapes + [SelectShape("7B", 1, tokens_of("128K"), 64, "fixed", LAYERS["7B"], k=k) for k in (256, 4096)]


def matches(shape: SelectShape, pattern: str) -> bool:
    """Whether MODEL:BATCH:CONTEXT:G:RULE names a shape; parts that are empty, * or not there fit all."""
    parts = [part.strip() for part in pattern.split(":")]
    if len(parts) > 5:
        raise ValueError(f"--rows must be MODEL:BATCH:CONTEXT:G:RULE, got {pattern!r}")
    own = (shape.model.lower(), shape.batch, shape.context, shape.g, shape.rule)
    return all(
        part in ("", "*") or (part.lower() == value if isinstance(value, str) else tokens_of(part) == value)
        for part, value in zip(parts, own, strict=False)
    )


def make_mass(shape: SelectShape, count: int, seed: int, device: str = "cuda") -> Tensor:
    """Masses [count, L, B, Hkv, n] that sum to 1 over n."""
    random = torch.Generator(device).manual_seed(seed)
    mass = torch.empty(count, *shape.size, device=device).normal_(generator=random).mul_(0.3 if shape.runs else 3)
    for one in mass:
        if shape.runs:
            runs = torch.empty(*shape.size[:-1], math.ceil(shape.size[-1] / shape.runs), device=device)
            heights = runs.normal_(generator=random).mul_(1.5)
            one.add_(heights.repeat_interleave(shape.runs, -1)[..., : shape.size[-1]])
        one.sub_(one.logsumexp(-1, keepdim=True)).exp_()
    return mass


def make_options(shape: SelectShape, seed: int, device: str = "cuda") -> dict:
    """Everything of a call but masses and lengths."""
    options = {"g": shape.g, "capacity": shape.capacity, "rule": shape.rule, "k": shape.k}
    options |= {"sinks": SINKS, "recents": RECENTS}
    if shape.rule == "mass":
        options |= {"p": P_OF_MASS}
    if shape.rule == "layer":  # as of rows that are half alike
        random = torch.Generator(device).manual_seed(seed)
        integers = {"generator": random, "dtype": torch.int32, "device": device}
        rows = shape.size[:3]
        votes = (torch.randint(0, 400, shape.size, **integers) - 300).clamp(min=0)
        sizes = torch.randint(K // shape.g, 8 * K // shape.g, rows, **integers)
        options |= {"votes": votes, "union_size": sizes, "coverage": torch.rand(rows, generator=random, device=device)}
    return options


def wanted_units(shape: SelectShape, mass: Tensor) -> tuple[Tensor, int]:
    """What a peer looks at, and how many it is to find."""
    units = shape.context // shape.g
    return mass[..., :units], min(shape.k // shape.g, units)


def by_torch(shape: SelectShape, mass: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that finds the largest masses and their units, in no order."""
    rows, k = wanted_units(shape, mass)
    return lambda: rows.topk(k, sorted=False)


def by_flashinfer(shape: SelectShape, mass: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same of FlashInfer, which takes rows [N, n] that lie side by side."""
    import flashinfer

    rows, k = wanted_units(shape, mass)
    rows = rows.reshape(-1, rows.shape[-1]).contiguous()
    return lambda: flashinfer.top_k(rows, k)


def find_peers() -> dict[str, Callable]:
    """What makes a peer's call of a shape and its masses, by name."""
    peers = {"torch.topk": by_torch}
    try:
        import flashinfer
    except ImportError:
        return peers
    return peers | {f"FlashInfer {flashinfer.__version__} top_k": by_flashinfer}


def check_peer(shape: SelectShape, name: str, call: Callable, mass: Tensor) -> None:
    """Its masses against a sort's."""
    rows, k = wanted_units(shape, mass)
    found = call()[0].reshape(-1, k).sort(-1).values
    assert torch.equal(found, rows.reshape(-1, rows.shape[-1]).sort(-1).values[:, -k:]), f"{shape.name}: {name} differs"


def our_call(mass: Tensor, prefix_lens: Tensor, outputs, workspace: Tensor, options: dict):
    return lambda: ops.select_kv_out(mass, prefix_lens, *outputs, workspace, **options)


def check(shape: SelectShape, mass: Tensor, prefix_lens: Tensor, outputs, workspace: Tensor, options: dict) -> None:
    """One call against the CPU."""
    our_call(mass, prefix_lens, outputs, workspace, options)()
    on_cpu = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in options.items()}
    expected = ops.select_kv(mass.cpu(), prefix_lens.cpu(), **on_cpu)
    for name, actual, wanted in zip(("indices", "counts", "kept", "tail", "overflow"), outputs, expected, strict=True):
        assert torch.equal(actual.cpu(), wanted), f"{shape.name}: other {name}"


def measure(shape: SelectShape, peers: dict[str, Callable], replays: int, seed: int):
    """Microseconds of ours and of each peer's, by cache state, and the reasons of the peers that have none."""
    layers, requests, heads, units = shape.size
    count = max(1, math.ceil(COLD_BYTES / shape.input_bytes))
    sets = make_mass(shape, count, seed)
    prefix_lens = torch.full((requests,), shape.context, dtype=torch.int32, device="cuda")
    options = make_options(shape, seed)
    outputs = ops.select_kv(sets[0], prefix_lens, **options)
    needed = ops.select_kv_workspace(layers, requests, heads, units, shape.capacity)
    workspace = torch.empty(needed, dtype=torch.uint8, device="cuda")
    check(shape, sets[0], prefix_lens, outputs, workspace, options)
    times, absent = {}, {}
    for cache, used in (("cold", sets), ("warm", sets[:1])):
        ours = capture([our_call(mass, prefix_lens, outputs, workspace, options) for mass in used])
        graphs = {"ours": ours}
        for name, make in peers.items():
            calls = []
            try:
                calls = [make(shape, mass) for mass in used]
                check_peer(shape, name, calls[0], used[0])
                graphs[name] = capture(calls)
            except Exception as error:
                absent[name] = reason_of(error)
                torch.cuda.synchronize()  # a fault of the device ends the run here
        times[cache] = median_us(graphs, replays)
        del ours, graphs, calls
    return times, absent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "MODEL:BATCH:CONTEXT:G:RULE")
    args = parser.parse_args()
    shapes = chosen_shapes(args, parser, all_shapes(), matches)
    device = gpu_name(args, parser)
    peers = find_peers()
    print(f"{device}, torch {torch.__version__}, seed {args.seed}; peers: {', '.join(peers)}")
    print("us; fl% = floor / us; speed = the faster peer / us")
    columns = "".join(f"{name.split()[0].split('.')[0]:>11}" for name in peers)
    print(f"{'case':30}{'rows x n':>14}{'MB':>7}{'floor':>8}{'cache':>7}{'us':>8}{'fl%':>5}{columns}{'speed':>7}")
    rows = []
    for shape in shapes:
        by_cache, absent = measure(shape, peers, args.replays, args.seed)
        for cache, times in by_cache.items():
            us, floor_us = times.pop("ours"), shape.floor_us
            peer = min(times, key=times.get)
            peer_us = times[peer]
            columns = "".join(f"{times[name]:11.1f}" if name in times else f"{'-':>11}" for name in peers)
            size = f"{shape.rows} x {shape.size[3]}"
            print(
                f"{shape.name:30}{size:>14}{shape.input_bytes / 1e6:7.1f}{floor_us:8.2f}{cache:>7}{us:8.2f}"
                f"{100 * floor_us / us:5.0f}{columns}{peer_us / us:7.1f}",
                flush=True,
            )
            row = {"case": shape.case | {"cache": cache}, "us": round(us, 2), "floor_us": round(floor_us, 2)}
            row |= {"fraction": round(floor_us / us, 3), "peer": peer, "peer_us": round(peer_us, 2)}
            row |= {"peers": {name: round(value, 2) for name, value in times.items()}}
            rows.append(row | {"ratio": round(peer_us / us, 3)} | ({"absent": absent} if absent else {}))
        for name, reason in absent.items():
            print(f"  {name}: {reason}")
        gc.collect()
        torch.cuda.empty_cache()
    finish(args, "select_kv", device, rows)


if __name__ == "__main__":
    main()
