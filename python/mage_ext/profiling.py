"""Where the time of a generation goes: named ranges for nsys, and a table of its steps from a trace of the kernels.

Ranges nest: generate > prefill | block > step:kind > layer:i > op. The ops are append_kv, block_attention,
block_attention_mass, block_attention_rows, sparse_block_attention, token_mass and row_votes; draw, and the logits in
it, stand in their step behind the layers. A block has lists (a selection put where graphs read it) before a step,
select_kv after the one that selects, and outcome (the block read back) after the last. The range of a layer holds what
the layer does with the cache; its matrix products lie between these ranges. A streamed generation has its blocks
outside of generate, since the caller's own work lies between them.

Ranges are the host's. A phase that is replayed as a CUDA graph (the default on CUDA) has the range of its step and
nothing inside: layers and ops are seen with `DenoiseConfig(cuda_graphs=False)`.

Ranges are NVTX ones in domain "mage" between `enable` and `enable(False)`. Off, a range is one test of a global: 90 ns
with the `with` statement, measured with Python 3.12 on the host of an H100.

Test: pytest tests/python/test_profiling.py
"""

import bisect
import contextlib
import dataclasses
import gzip
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mage_ext._arguments import check_path, check_type, got


class _Nothing:
    """A range while ranges are off. A method of C that takes any arguments and gives something false takes half the
    time of one in Python."""

    __enter__ = __exit__ = "".format


_NOTHING = _Nothing()
_open: Callable[[str], contextlib.AbstractContextManager[object]] | None = None


def enable(on: bool = True) -> None:
    """Switches NVTX ranges on or off, for the whole process.

    Raises:
        ModuleNotFoundError: the package nvtx is not installed. TypeError: on is no bool.
    """
    global _open
    check_type("profiling.enable", "on", on, bool, "a bool")
    if not on:
        _open = None
        return
    try:
        import nvtx
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "profiling.enable: the package nvtx must be installed: pip install nvtx, or mage_ext[profile]", name="nvtx"
        ) from None
    _open = lambda name: nvtx.annotate(name, domain="mage")  # noqa: E731


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """NVTX ranges are on within a with block. Raises as `enable` does."""
    before = _open
    enable()
    with _restored(before):
        yield


def span(name: str, detail: str | int | None = None) -> contextlib.AbstractContextManager[object]:
    """A range called `name`, or "name:detail", around a with block."""
    if _open is None:
        return _NOTHING
    return _open(name if detail is None else f"{name}:{detail}")


@contextlib.contextmanager
def _restored(before: Callable[[str], contextlib.AbstractContextManager[object]] | None) -> Iterator[None]:
    global _open
    try:
        yield
    finally:
        _open = before


# --------------------------------------------------------------------------- table of steps

PARTS = ("attention", "selection", "append", "gemm", "other", "sampling", "gap", "host_gap")
BETWEEN, OUTSIDE = "between blocks", "outside blocks"
_KINDS = ("exact", "select", "mixed", "sparse", "commit", BETWEEN, "prefill", OUTSIDE)


@dataclass(frozen=True)
class StepRow:
    """Steps of one kind, on average. A step lasts from the start of its first kernel to that of the next step's.

    Fields:
        kind: "exact", "select" (exact, emits mass; the selection is part of it), "sparse", "mixed", "commit",
            "between blocks" (the preparation of a block, and what is read back of it), "prefill", or "outside blocks"
            (before the first and behind the last: prompts, pages).
        count: steps of this kind; of "between blocks" the blocks, of "outside blocks" 1.
        ms: of a step, in milliseconds; the sum of its parts.
        parts: milliseconds by name, for every name of PARTS. attention: attention kernels, token_mass, merges.
            selection: select_kv, row_votes and all that is launched in the ranges select_kv and lists. append: writes
            of K/V. gemm: matrix products. sampling: token_confidence and all that follows the last product of a step
            with one. other: the other kernels, copies and fills: norms, rotary, activation, residuals. gap: no kernel
            runs, between two kernels of one graph replay. host_gap: no kernel runs, between two launches.
        launches: kernels, copies and fills per step.
    """

    kind: str
    count: int
    ms: float
    parts: dict[str, float]
    launches: float

    def share(self, part: str) -> float:
        """Share of a part in the step. Raises ValueError if part is not of PARTS."""
        if part not in PARTS:
            raise ValueError(f"StepRow.share: part must be one of {', '.join(PARTS)}, got {got(part)}")
        return self.parts[part] / self.ms if self.ms else 0.0


@dataclass(frozen=True)
class StepTable:
    """Where the time of a generation went.

    Fields:
        rows: by kind of step, in the order of a block's life.
        blocks: in the trace. plain_ms, profiled_ms: wall time of the generation without and with the profiler, which
            slows launches and the kernels of replays down; None where the table is of a file.
    """

    rows: tuple[StepRow, ...]
    blocks: int
    plain_ms: float | None = None
    profiled_ms: float | None = None

    def row(self, kind: str) -> StepRow:
        """The row of a kind. Raises ValueError if there was no such step."""
        for row in self.rows:
            if row.kind == kind:
                return row
        kinds = ", ".join(row.kind for row in self.rows)
        raise ValueError(f"StepTable.row: kind must be one of {kinds}, got {got(kind)}")

    @property
    def block(self) -> StepRow:
        """The average block: all rows but "prefill" and "outside blocks". Raises ValueError where the trace has no
        block."""
        if not self.blocks:
            raise ValueError("StepTable.block: the trace must hold a block, got none")
        rows, n = [row for row in self.rows if row.kind not in ("prefill", OUTSIDE)], self.blocks
        parts = {part: sum(row.parts[part] * row.count for row in rows) / n for part in PARTS}
        launches = sum(row.launches * row.count for row in rows) / n
        return StepRow("block", n, sum(row.ms * row.count for row in rows) / n, parts, launches)

    def __str__(self) -> str:
        """The table in milliseconds and percent, and what the profiler cost."""
        heads = [part.replace("_", " ") for part in PARTS]
        lines = [f"{'':14} count       ms launches" + "".join(f"{head:>12}" for head in heads)]
        for row in (*self.rows, *([self.block] if self.blocks else [])):
            cells = "".join(f"{row.parts[part]:7.3f}{row.share(part):5.0%}" for part in PARTS)
            lines.append(f"{row.kind:14} {row.count:5} {row.ms:8.3f} {row.launches:8.1f}{cells}")
        if self.plain_ms is not None and self.profiled_ms is not None:
            lines.append(f"whole run: {self.plain_ms:.2f} ms, under the profiler {self.profiled_ms:.2f} ms")
        return "\n".join(lines)


def profile_generation(
    run: Callable[[], object], path: str | os.PathLike[str] | None = None, *, warmup: int = 2
) -> StepTable:
    """Traces one generation on CUDA, kernels inside of graph replays included.

    Args:
        run: calls `generate`, every time from the same start, with graphs and cache of its own that it keeps. It runs
            warmup + 3 times: until the graphs are captured, for the time without the profiler, for the profiler to
            start up, and to be traced.
        path: where the chrome trace is left (for Perfetto or chrome://tracing; compressed if it ends in .gz). None:
            nowhere.
        warmup: runs before the first that counts.
    Returns:
        The table of the traced run.
    Raises:
        TypeError, ValueError: naming the argument; a generation without blocks. FileNotFoundError: no such folder.
        RuntimeError: there is no CUDA device.
    """
    owner = "profile_generation"
    if not callable(run):
        raise TypeError(f"{owner}: run must be callable, got {got(run)}")
    if path is not None:
        check_path(owner, path)
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{owner}: path must be in a folder that exists, got {str(path)!r}")
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
        raise ValueError(f"{owner}: warmup must be an integer >= 0, got {got(warmup)}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{owner}: a CUDA device must be there, torch finds none")

    def timed() -> float:
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) * 1e3

    for _ in range(warmup):
        timed()
    plain_ms = timed()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json" if path is None else Path(path)
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
            acc_events=True,  # of one cycle there are no others to keep; without it torch warns
            on_trace_ready=lambda finished: finished.export_chrome_trace(str(trace)),
        )
        with _restored(_open), profiler:
            _annotate()
            timed()
            profiler.step()
            profiled_ms = timed()
            profiler.step()
        table = read_trace(trace)
    return dataclasses.replace(table, plain_ms=plain_ms, profiled_ms=profiled_ms)


_PREFIX = "mage."  # of the ranges in a chrome trace


def _annotate() -> None:
    """Ranges are annotations of torch's profiler from now on."""
    global _open
    _open = lambda name: torch.profiler.record_function(_PREFIX + name)  # noqa: E731


# The first that is found in a kernel's name says what it does. Of our own kernels the name is looked at without the
# types that it is instantiated with.
_PART_OF = [
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        ("attention", "attention|token_mass|flash|fmha|pagedkvcache"),
        ("selection", "mage_select|mage_row_votes"),
        ("append", "mage_append_kv"),
        ("sampling", "token_confidence"),
        ("gemm", "nvjet|gemm|gemv|cutlass|xmma|splitk|cublas"),
    )
]
_OWN = re.compile(r"\bmage_\w+")


def _part_of(name: str) -> str:
    own = _OWN.search(name)
    name = own.group() if own else name
    return next((part for part, pattern in _PART_OF if pattern.search(name)), "other")


@dataclass
class _Work:
    """A kernel, copy or fill on the device. Times in microseconds."""

    begin: float
    end: float
    launched: float
    correlation: int  # of its launch: all kernels of a graph replay have the same
    part: str
    draws: bool


def read_trace(path: str | os.PathLike[str]) -> StepTable:
    """The table of a chrome trace that `profile_generation` left.

    Every kernel belongs to the step in whose range it was launched, or to the last one launched before. Kernels may
    overlap (programmatic dependent launch); time in which several run belongs to the one that started first, so that
    the parts of a step and its gaps add up to its time.

    Args:
        path: of a .json or .json.gz file.
    Raises:
        TypeError: path is none. FileNotFoundError: there is no file. ValueError: it is no trace of a generation, or not
            a whole one.
    """
    check_path("read_trace", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"read_trace: path must be a file that exists, got {str(path)!r}")
    try:
        with gzip.open(path, "rt") if str(path).endswith(".gz") else open(path) as file:
            events = json.load(file)["traceEvents"]
    except (ValueError, KeyError, TypeError, RecursionError, gzip.BadGzipFile):
        raise ValueError(f"read_trace: path must hold a chrome trace, got {str(path)!r}") from None

    complete = [event for event in events if event.get("ph") == "X"]
    ranges = [
        (event["name"].removeprefix(_PREFIX), event["ts"], event["ts"] + event["dur"])
        for event in complete
        if event.get("cat") == "user_annotation" and event["name"].startswith(_PREFIX)
    ]
    begins, kinds = _markers(ranges)
    steps: list[list[_Work]] = [[] for _ in kinds]
    for work in _works(complete, ranges):
        steps[bisect.bisect_right(begins, work.launched) - 1].append(work)
    if not any(steps):
        raise ValueError("read_trace: the trace must hold kernels, got none")
    for kind, works in zip(kinds, steps, strict=True):
        if not works and kind not in (BETWEEN, OUTSIDE, "prefill"):
            raise ValueError(f"read_trace: the trace must hold kernels of every step, got none of a step {kind!r}")
    filled = [(kind, works) for kind, works in zip(kinds, steps, strict=True) if works]
    blocks = sum(name == "block" for name, _, _ in ranges)
    parts = _charge(filled)

    rows = []
    for kind in dict.fromkeys((*_KINDS, *kinds)):
        mine = [(works, charged) for (of, works), charged in zip(filled, parts, strict=True) if of == kind]
        if mine:
            count = {BETWEEN: blocks, OUTSIDE: 1}.get(kind, len(mine))
            mean = {part: sum(charged[part] for _, charged in mine) / count / 1e3 for part in PARTS}
            rows.append(StepRow(kind, count, sum(mean.values()), mean, sum(len(works) for works, _ in mine) / count))
    return StepTable(tuple(rows), blocks)


def _markers(ranges: list[tuple[str, float, float]]) -> tuple[list[float], list[str]]:
    """When steps begin on the host, ascending, and of which kind they are. What is launched behind a step and before
    the next, for example the copy of a flag, is part of it."""
    markers = []
    for name, begin, end in ranges:
        if name.startswith("step:"):
            markers.append((begin, name.removeprefix("step:")))
        elif name == "prefill":
            markers += [(begin, "prefill"), (end, BETWEEN)]
        elif name == "block":
            markers += [(begin, BETWEEN), (end, BETWEEN)]
        elif name == "outcome":
            markers.append((begin, BETWEEN))
    first = min((begin for name, begin, _ in ranges if name == "block"), default=float("inf"))
    last = max((end for name, _, end in ranges if name == "block"), default=float("inf"))
    begins, kinds = [-float("inf")], [OUTSIDE]
    for begin, kind in sorted(markers):
        if kind == BETWEEN and not first <= begin < last:
            kind = OUTSIDE
        if kind not in (BETWEEN, OUTSIDE) or kind != kinds[-1]:  # consecutive stretches of these are one
            begins.append(begin)
            kinds.append(kind)
    return begins, kinds


def _works(events: list[dict], ranges: list[tuple[str, float, float]]) -> list[_Work]:
    """What ran on the device, in the order in which it started. Raises ValueError if a launch is not in the trace."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    selecting = sorted((begin, end) for name, begin, end in ranges if name in ("select_kv", "lists"))
    works, lost = [], 0
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        correlation = event["args"]["correlation"]
        if correlation not in launched:
            lost += 1
            continue
        time_of_launch, name = launched[correlation], event["name"]
        part = _part_of(name)
        index = bisect.bisect_right(selecting, (time_of_launch, float("inf"))) - 1
        if part == "other" and index >= 0 and time_of_launch < selecting[index][1]:
            part = "selection"
        begin = event["ts"]
        draws = part == "sampling"
        works.append(_Work(begin, begin + event["dur"], time_of_launch, correlation, part, draws))
    if lost:
        raise ValueError(f"read_trace: the trace must hold the launch of every kernel, got {lost} without")
    return sorted(works, key=lambda work: work.begin)


def _charge(steps: list[tuple[str, list[_Work]]]) -> list[dict[str, float]]:
    """Microseconds by part of every step, a kind and its works, in the order in which they were launched."""
    result = []
    busy_until, running = steps[0][1][0].begin, steps[0][1][0].correlation
    for kind, works in steps:
        _find_sampling(works)
        charged = dict.fromkeys(PARTS, 0.0)
        for index, work in enumerate(works):
            idle = work.begin - busy_until
            if idle > 0:
                # A step ends where the next one starts, so a gap before its first kernel is the last one's. But what
                # comes behind the last block is not the block's business.
                owner = charged if index or kind == OUTSIDE else result[-1]
                owner["gap" if work.correlation == running else "host_gap"] += idle
            if work.end > busy_until:
                charged[work.part] += work.end - max(work.begin, busy_until)
                busy_until, running = work.end, work.correlation
        result.append(charged)
    return result


def _find_sampling(works: list[_Work]) -> None:
    """What follows the logits, the last product of a step that draws, is sampling."""
    last = max((index for index, work in enumerate(works) if work.part == "gemm"), default=len(works))
    tail = works[last + 1 :]
    if any(work.draws for work in tail):
        for work in tail:
            if work.part == "other":
                work.part = "sampling"
