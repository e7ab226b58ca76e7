"""Attention of one whole denoising block on an H100, all layers together, beside a block that is exact throughout.

    python bench/bench_block_total.py --fa3 _vllm_fa3_C.abi3.so [--rows 64:0:32,16,1:0:32:4K] [--layers 4]
        [--out bench/results/h100/block_total.json]

us = a step that is exact and emits masses + one select_kv over all layers that select + (T - 1) sparse steps at K
tokens per KV head + the exact commit; each part is in its row. own_us and peer_us are T + 1 exact steps, of
block_attention and of FA3 (with the number of splits that is best on one layer). The first dense_layers layers are
exact in every step and do not select. Masses are made as paged_forward.py makes them: by block_attention_mass, and for
g = 1 by a pass of token_mass over all tokens after block_attention. Rows of g = 1 with `candidates` are the two levels
of token_candidates.py: in the exact step every layer that selects has block_attention_mass, a select_kv of its
candidate units and a token_mass of their tokens; select is what follows it in the loop, stacking of the layers, mapping
of the lists and proof included. There are neither sinks nor recents, as in SelectionConfig's defaults.

Every part is one graph of whole steps, timed as cuda_timing.py says and cold as a real step is, where weights pass
between two layers: each layer has pools of its own (268 MB), masses take turns, and the graph of the sparse step holds
at least four steps over different lists, which select_kv made of the masses of different queries; `distinct_mb` is what
all of these lists name. All layers of a step have one q, since the projection before would leave it in L2. The last
layer's results are checked against float32, the lists against the CPU. floor = sum of the floors of the parts.
"""

import argparse
import dataclasses
import gc
import itertools
import math
from dataclasses import dataclass

import torch
from bench_select_kv import LAYERS, K, Q, SelectShape
from bench_select_kv import check as check_selection
from bench_select_kv import our_call as selection_call
from bench_sparse_attention import Call, SparseShape, exact_out
from bench_sparse_attention import our_calls as sparse_calls
from bench_token_mass import attention_calls, token_calls
from bench_token_mass import check as check_tokens
from bench_token_mass import floor_us as token_floor_us
from block_attention_cuda import capture_peers, check, exact_results, our_calls
from cuda_timing import capture, median_us
from gpu_bench import add_options, chosen_shapes, finish, gpu_name
from kv_sets import COLD_BYTES, DTYPE, HBM_BYTES_PER_S, KvSet, Shape, make_sets, short, tokens_of
from peers import find_peers
from torch import Tensor

from mage_ext import ops
from mage_ext.paged_forward import Emission, PagedForward
from mage_ext.selection import CANDIDATE_UNIT, SelectionConfig
from mage_ext.testing.compare import assert_mass_close, assert_out_close
from mage_ext.token_candidates import Candidates, select_tokens

MODEL = "7B"
CONTEXT = 131072
UNITS = (64, 32, 16, 1)
CANDIDATES = 4096
DENSE_LAYERS = (0, 2)
FORWARDS = (8, 16, 32)  # T
LEAST_SELECTIONS = 4  # of the graph of the sparse step
SEARCH_REPLAYS = 3  # for the best number of splits
# Wanted speed over T + 1 exact steps of our own and of the peer, by T: of the better of these g, without dense layers.
WANTED = {8: (3.2, 3.5), 32: (6.5, 7.5)}
WANTED_UNITS = (64, 16)


@dataclass(frozen=True)
class BlockShape:
    g: int
    dense_layers: int
    forwards: int  # T
    layers: int
    candidates: int | None = None  # of g = 1: tokens per layer and KV head whose masses are looked at; None: all

    @property
    def attention(self) -> Shape:
        return Shape(MODEL, (CONTEXT,), Q)

    @property
    def selection(self) -> SelectShape:
        return SelectShape(MODEL, 1, CONTEXT, self.g, "fixed", self.layers - self.dense_layers)

    @property
    def sparse(self) -> SparseShape:
        return SparseShape(MODEL, 1, K, self.g, Q)

    @property
    def floor_us(self) -> float:
        attention, selecting = self.attention, self.layers - self.dense_layers
        exact, select = attention.floor_us(None), self.selection.floor_us
        if self.candidates:
            kv_heads, units = attention.heads[1], math.ceil(attention.max_len / CANDIDATE_UNIT)
            listed = self.candidates // CANDIDATE_UNIT
            first = 4 * kv_heads * (units + listed) / HBM_BYTES_PER_S * 1e6
            tokens = token_floor_us(attention, "list", self.candidates)
            with_mass = attention.floor_us(CANDIDATE_UNIT) + first + tokens
            read = units + listed + self.candidates
            select = 4 * selecting * kv_heads * (read + K) / HBM_BYTES_PER_S * 1e6
        elif self.g == 1:
            with_mass = exact + token_floor_us(attention, "all")
        else:
            with_mass = attention.floor_us(self.g)
        dense = self.forwards * self.dense_layers * exact
        sparse = (self.forwards - 1) * selecting * self.sparse.floor_us
        return dense + selecting * with_mass + select + sparse + self.layers * exact

    @property
    def case(self) -> dict:
        case = self.attention.case | {"K": K, "g": self.g, "T": self.forwards, "dense_layers": self.dense_layers}
        case |= {"candidates": self.candidates} if self.candidates else {}
        return case | {"layers": self.layers, "cache": "cold"}

    @property
    def name(self) -> str:
        layers = "" if self.is_whole else f" L={self.layers}"
        few = f" of {short(self.candidates)}" if self.candidates else ""
        return f"{MODEL} 1x{short(CONTEXT)} g={self.g}{few} dense={self.dense_layers} T={self.forwards}{layers}"

    @property
    def is_whole(self) -> bool:
        return self.layers == LAYERS[MODEL]


def all_shapes(layers: int) -> list[BlockShape]:
    """Every row; those that differ in T alone follow one another."""
    shapes = [BlockShape(*each, layers) for each in itertools.product(UNITS, DENSE_LAYERS, FORWARDS)]
    return shapes + [BlockShape(1, *each, layers, CANDIDATES) for each in itertools.product(DENSE_LAYERS, FORWARDS)]


def matches(shape: BlockShape, pattern: str) -> bool:
    """Whether G:DENSE_LAYERS:T:CANDIDATES names a shape; parts that are empty, * or not there fit all, and 0 candidates
    are all tokens."""
    parts = [part.strip() for part in pattern.split(":")]
    if len(parts) > 4:
        raise ValueError(f"--rows must be G:DENSE_LAYERS:T:CANDIDATES, got {pattern!r}")
    own = (shape.g, shape.dense_layers, shape.forwards, shape.candidates or 0)
    return all(part in ("", "*") or tokens_of(part) == value for part, value in zip(parts, own, strict=False))


# --- the steps -------------------------------------------------------------------------------------------------------


def with_q(layers: list[KvSet], q: Tensor) -> list[KvSet]:
    return [dataclasses.replace(layer, q=q) for layer in layers]


def make_layers(count: int, seed: int) -> list[KvSet]:
    """Pools for each layer, and a q that is common to them."""
    layers = make_sets(Shape(MODEL, (CONTEXT,), Q), count, seed)
    return with_q(layers, layers[0].q)


def mass_calls(shape: Shape, layers: list[KvSet], g: int, masses: list[Tensor], exact: tuple | None):
    """An exact call of each layer, which also writes its masses; the last layer is checked if `exact` is given."""
    if g > 1:
        calls, outputs = our_calls(shape, layers, f"mass{g}", masses)
        if exact:
            check(f"mass{g}", calls[-1], [*outputs[:2], masses[-1]], {0: exact})
        return calls
    attention, lses = attention_calls(shape, layers)
    tokens, _, options = token_calls(shape, layers, lses, "all", 0, masses)
    calls = [lambda first=first, then=then: (first(), then()) for first, then in zip(attention, tokens, strict=True)]
    if exact:
        calls[-1]()
        check_tokens(shape, "all", masses[-1], options, exact[1])
    return calls


def capture_exact(layers: list[KvSet], peers: list) -> tuple[dict, list, str | None, dict[str, str], tuple]:
    """Graphs of the exact step ("exact" and "peer"), our calls, the peer's name, why others are absent, and the exact
    results of the last layer."""
    shape = Shape(MODEL, (CONTEXT,), Q)
    exact = exact_results(shape, layers[-1])
    calls, outputs = our_calls(shape, layers, "none")
    check("none", calls[-1], outputs, {0: exact})
    graphs, name = {"exact": capture(calls)}, None
    variants, absent = capture_peers(peers, shape, layers[-1:], exact[0])
    if variants:
        times = median_us(variants, SEARCH_REPLAYS)
        best, variant = min(times, key=times.get)
        peer = next(peer for peer in peers if peer.name == best)
        graphs["peer"], name = capture(peer.variants(shape, layers)[variant]), f"{best} {variant}"
    return graphs, calls, name, absent, exact


def listed_bytes(lists: list[Tensor], g: int) -> int:
    """Of K and V that lists [L, B, Hkv, Kmax] of several steps name, each unit once."""
    units = torch.cat(lists, -1).sort(-1).values
    distinct = units.shape[:-1].numel() + int((units.diff(dim=-1) > 0).sum())
    return 2 * distinct * g * Shape(MODEL, (CONTEXT,), Q).heads[2] * DTYPE.itemsize


def one_level(shape: BlockShape, steps: list[list[KvSet]], exact: tuple) -> tuple[list, list, list]:
    """Calls of the first step's layers that emit masses, the lists of every step as select_kv gives them, and calls
    that select."""
    selection, g, device = shape.selection, shape.g, steps[0][0].q.device
    masses = torch.empty(len(steps), *selection.size, device=device)
    for i, step in enumerate(steps):
        calls = mass_calls(shape.attention, step, g, list(masses[i]), None if i else exact)
        for call in calls:
            call()
        if i == 0:
            emitting = calls

    prefix_lens = torch.tensor([CONTEXT], dtype=torch.int32, device=device)
    options = {"g": g, "capacity": selection.capacity, "k": K}
    selections = [ops.select_kv(mass, prefix_lens, **options) for mass in masses]
    outputs = [torch.empty_like(tensor) for tensor in selections[0]]
    needed = ops.select_kv_workspace(*selection.size, selection.capacity)
    workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    check_selection(selection, masses[0], prefix_lens, outputs, workspace, options)
    copies = range(len(steps), math.ceil(COLD_BYTES / selection.input_bytes))
    rotating = [*masses, *(masses[i % len(steps)].clone() for i in copies)]
    return emitting, selections, [selection_call(mass, prefix_lens, outputs, workspace, options) for mass in rotating]


def two_levels(shape: BlockShape, steps: list[list[KvSet]], exact: tuple) -> tuple[list, list, list]:
    """What one_level gives, of candidates."""
    config = SelectionConfig(k=K, g=1, candidates=shape.candidates)
    prefix_lens = torch.tensor([CONTEXT], dtype=torch.int32, device=steps[0][0].q.device)

    def calls_of(step: list[KvSet]) -> tuple[list, list[Emission]]:
        """A call of each layer, and the emission of their last turn."""
        last = []

        def call(index: int, layer: KvSet) -> None:
            if index == 0:
                last[:] = [Emission(config, None, prefix_lens)]
            q, k_cache, v_cache, table, seq_lens = layer.tensors
            forward = PagedForward(None, table, shape.attention.max_len, [], seq_lens)
            forward.emit(last[0], q, k_cache, v_cache, seq_lens)

        return [lambda i=i, layer=layer: call(i, layer) for i, layer in enumerate(step)], last

    def select_call(emission: Emission):
        return lambda: select_tokens(emission.candidates(), prefix_lens, config)

    emitting, emissions = None, []
    for step in steps:
        calls, last = calls_of(step)
        for call in calls:
            call()
        emitting = emitting or calls
        emissions += last
    candidates = emissions[0].candidates()
    check_candidates(candidates, exact[1])
    chosen = [select_call(emission)()[0] for emission in emissions]
    on_cpu = Candidates(*(x.cpu() for x in (candidates.units, candidates.token_mass, candidates.unit_mass)))
    expected, _ = select_tokens(on_cpu, prefix_lens.cpu(), config)
    assert torch.equal(chosen[0].indices.cpu(), expected.indices), f"{shape.name}: other lists"

    size = sum(x.nbytes for x in (candidates.units, candidates.token_mass, candidates.unit_mass))
    names = ("masses", "units", "token_masses")
    rotating = list(emissions)
    for i in range(len(steps), math.ceil(COLD_BYTES / size)):
        emission = emissions[i % len(steps)]
        rotating.append(dataclasses.replace(emission, **{n: [x.clone() for x in getattr(emission, n)] for n in names}))
    selections = [(s.indices, s.counts, s.kept_mass, s.tail_start, s.overflow) for s in chosen]
    return emitting, selections, [select_call(emission) for emission in rotating]


def check_candidates(candidates: Candidates, shares: Tensor) -> None:
    """The last layer's masses against its float32 shares [Hkv, R, S]."""
    tokens = torch.nn.functional.pad(shares.mean(1), (0, -shares.shape[-1] % CANDIDATE_UNIT))
    tokens = tokens.unflatten(-1, (-1, CANDIDATE_UNIT))  # [Hkv, n, u]
    assert_mass_close(candidates.unit_mass[-1, 0], tokens.sum(-1))
    units = candidates.units[-1, 0].long()[..., None].expand(-1, -1, CANDIDATE_UNIT)
    listed = torch.where(units >= 0, tokens.gather(1, units.clamp(min=0)), 0)
    assert_mass_close(candidates.token_mass[-1, 0], listed.flatten(1))


def measure(shape: BlockShape, layers: list[KvSet], graphs: dict, exact_calls: list, exact: tuple, args):
    """Microseconds of each part, and of what all lists of the sparse graph name, the bytes."""
    attention, g = shape.attention, shape.g
    dense_calls, selecting = exact_calls[: shape.dense_layers], layers[shape.dense_layers :]
    q = layers[0].q
    random = torch.Generator(q.device).manual_seed(args.seed + 1)
    count = max(LEAST_SELECTIONS, math.ceil(COLD_BYTES / (len(selecting) * shape.sparse.gathered_bytes)))
    queries = [q] + [torch.empty_like(q).normal_(generator=random) for _ in range(count - 1)]
    steps = [with_q(selecting, each) for each in queries]
    make = two_levels if shape.candidates else one_level
    emitting, selections, selecting_calls = make(shape, steps, exact)

    lists = []
    for step, (indices, counts, _, tail_start, _) in zip(steps, selections, strict=True):
        assert (counts == K // g).all(), f"{shape.name}: a list is shorter than K"
        lists += [Call(layer, *each, tail_start) for layer, *each in zip(step, indices, counts, strict=True)]
    calls, outputs = sparse_calls(attention, g, lists)
    last = len(selecting) - 1
    calls[last]()
    assert_out_close(outputs[0], *exact_out(attention, g, lists[last]))
    sparse = []
    for i in range(0, len(calls), len(selecting)):
        sparse += [*dense_calls, *calls[i : i + len(selecting)]]

    graphs = {
        **graphs,
        "exact_mass": capture([*dense_calls, *emitting]),
        "select": capture(selecting_calls),
        "sparse": capture(sparse),
    }
    times = median_us(graphs, args.replays)
    times = {key: us if key == "select" else us * len(layers) for key, us in times.items()}
    return times, listed_bytes([each[0] for each in selections], g)


# --- the table -------------------------------------------------------------------------------------------------------


def make_row(shape: BlockShape, times: dict, distinct: int, peer: str | None, absent: dict[str, str]) -> dict:
    """A row of the result file."""
    us = times["exact_mass"] + times["select"] + (shape.forwards - 1) * times["sparse"] + times["exact"]
    own_us, floor_us = (shape.forwards + 1) * times["exact"], shape.floor_us
    row = {"case": shape.case, "us": round(us, 2), "floor_us": round(floor_us, 2), "fraction": round(floor_us / us, 3)}
    row |= {"peer": None, "peer_us": None, "ratio": None}
    if peer:
        peer_us = (shape.forwards + 1) * times["peer"]
        row |= {"peer": peer, "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 3)}
    row |= {"own_us": round(own_us, 2), "own_ratio": round(own_us / us, 3)}
    row |= {"exact_mass_us": round(times["exact_mass"], 2), "select_us": round(times["select"], 2)}
    row |= {"sparse_step_us": round(times["sparse"], 2), "commit_us": round(times["exact"], 2)}
    of_tokens = "token_mass of candidates" if shape.candidates else "token_mass of all tokens"
    row |= {"masses": of_tokens if shape.g == 1 else "block_attention_mass"}
    row |= {"distinct_mb": round(distinct / 1e6, 1)}
    if shape.is_whole and shape.dense_layers == 0 and shape.g in WANTED_UNITS and shape.forwards in WANTED:
        row |= dict(zip(("wanted_own", "wanted"), WANTED[shape.forwards], strict=True))
    return row | ({"absent": absent} if absent else {})


def print_row(shape: BlockShape, row: dict) -> None:
    numbers = f"{row['us']:10.1f}{row['floor_us']:10.1f}{100 * row['fraction']:5.0f}"
    parts = "".join(f"{row[key]:10.1f}" for key in ("exact_mass_us", "select_us", "sparse_step_us", "commit_us"))
    theirs = f"{row['ratio']:8.2f}  {row['peer']}" if row["peer"] else f"{'-':>8}"
    want = f"  wanted {row['wanted_own']}, {row['wanted']}" if "wanted" in row else ""
    print(f"{shape.name:40}{numbers}{parts}{row['own_ratio']:8.2f}{theirs}{want}", flush=True)


def missed_targets(rows: list[dict]) -> list[str]:
    """Targets that the better g does not reach."""
    missed = []
    for forwards in WANTED:
        members = [row for row in rows if "wanted" in row and row["case"]["T"] == forwards]
        for ratio, wanted, than in (("own_ratio", "wanted_own", "exact steps of our own"), ("ratio", "wanted", "FA3")):
            reached = [row[ratio] for row in members if row[ratio] is not None]
            if reached and max(reached) < members[0][wanted]:
                missed.append(f"T={forwards}: {max(reached):.2f} of {than}, wanted {members[0][wanted]}")
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, "G:DENSE_LAYERS:T:CANDIDATES")
    parser.add_argument("--layers", type=int, default=LAYERS[MODEL], help="fewer than the model has, for a quick look")
    parser.add_argument("--fa3", help="the library _vllm_fa3_C.abi3.so of a vllm wheel")
    args = parser.parse_args()
    shapes = chosen_shapes(args, parser, all_shapes(args.layers), matches)
    least = 1 + max(shape.dense_layers for shape in shapes)
    if args.layers < least:
        parser.error(f"--layers must be >= {least} for these rows, got {args.layers}")
    device = gpu_name(args, parser)
    peers, absent = find_peers(["fa3"], args.fa3)
    absent = {name: reason for name, reason in absent.items() if name == "FA3"}
    print(f"{device}, torch {torch.__version__}, seed {args.seed}")
    layers = make_layers(args.layers, args.seed)
    graphs, exact_calls, peer, reasons, exact = capture_exact(layers, peers)
    for name, reason in {**absent, **reasons}.items():
        print(f"{name} absent: {reason}")
    print("us of a block; fl% = floor / us; parts in us; own, FA3: speed over as many exact steps")
    header = f"{'case':40}{'us':>10}{'floor':>10}{'fl%':>5}{'mass':>10}{'select':>10}{'sparse':>10}{'commit':>10}"
    print(f"{header}{'own':>8}{'FA3':>8}")
    rows = []
    for _, group in itertools.groupby(shapes, lambda shape: (shape.g, shape.dense_layers, shape.candidates)):
        group = list(group)
        times, distinct = measure(group[0], layers, graphs, exact_calls, exact, args)
        for shape in group:
            rows.append(make_row(shape, times, distinct, peer, reasons))
            print_row(shape, rows[-1])
        gc.collect()
        torch.cuda.empty_cache()
    missed = missed_targets(rows)
    print(f"targets missed: {len(missed)}" + "".join(f"\n  {line}" for line in missed))
    finish(args, "block_total", device, rows, absent=absent)


if __name__ == "__main__":
    main()
