"""Times of calls on the GPU from replays of CUDA graphs, with a cold L2 where the calls rotate over enough inputs.

A graph holds at least 20 calls. A tiny kernel stands between neighbours, because our launches would otherwise begin
while their predecessor still runs, which no model's do; what a graph of that kernel alone takes per node is subtracted.
Peers get the same. Graphs that are compared take turns, so that clocks and power move all of them alike, and each
replay is queued behind a short sleep of the device, so that the time of launching a graph is not in it.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

CALLS = 20  # of a graph, at least
SLEEP_CYCLES = 700_000  # 0.4 ms: longer than the host needs to launch a graph
SEPARATORS = 200  # nodes of the graph that times the separator


@dataclass
class TimedGraph:
    """A captured graph, how many calls it holds, and what owns the memory that it uses."""

    graph: torch.cuda.CUDAGraph
    calls: int
    owners: object


def rounds_of(num_calls: int) -> int:
    """How often a list of calls is repeated in a graph."""
    return max(1, math.ceil(CALLS / num_calls))


def capture(calls: list[Callable[[], object]]) -> TimedGraph:
    """A graph of the calls in turn, repeated; every call runs once before, outside."""
    cell = torch.zeros(1, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # inputs may still be on their way on another stream
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        cell.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds_of(len(calls))):
            for call in calls:
                call()
                cell.add_(1)
    return TimedGraph(graph, rounds_of(len(calls)) * len(calls), (calls, cell))


def capture_separator() -> TimedGraph:
    """A graph of separators alone."""
    return capture([lambda: None] * SEPARATORS)


def median_us(graphs: dict, replays: int) -> dict:
    """Microseconds of a call of each graph, without its separator: medians over replays that take turns."""
    separator = object()
    timed = {separator: capture_separator(), **graphs}
    times = {key: [] for key in timed}
    for replay in range(replays + 1):
        for key, entry in timed.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            entry.graph.replay()
            end.record()
            end.synchronize()
            if replay:  # the first one uploads the graph
                times[key].append(start.elapsed_time(end) * 1e3 / entry.calls)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {key: medians[key] - medians[separator] for key in graphs}
