"""Runs evaluations.txt in parts, several at once, and puts the parts together as result files.

    python bench/run_evaluations.py --text eltec-eng.jsonl.xz [--only 'cut16/*'] [--jobs 12] [--minutes 9]
        [--parts build/evaluations] [--out bench/results/h100/eval] [--device cuda] [-- more of every `mage eval`]

Every job is one `mage eval` and leaves a file under --parts. One whose file is complete, of the libraries' commit and
by the same command does not run again, so that a run which --minutes ended goes on where it stood. The longest start
first. A result file is written when all of its parts are there, with a word on how it differs from the one that was
there before. Rows that two parts have, as exact's, must be alike. From the root of a checkout; files in a folder named
h100 need an H100.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mage_ext.evaluation.needles import write_rows
from mage_ext.info import commit

HERE = Path(__file__).resolve().parent
CUT_BY = {  # options whose values are jobs of their own, by suite
    "methods": ("--tasks", "--tokens", "--tokens-per-step", "--k"),
    "prose": ("--tokens", "--k"),
    "recall": ("--tasks", "--tokens"),
    "heatmap": ("--tokens",),
    "thresholds": ("--tasks",),
}
# What a row is of.
CASE = ("study", "task", "tokens", "depth", "t", "threshold", "tokens_per_step", "control", "method")
CASE += ("dense_layers", "g", "K")


@dataclass(frozen=True)
class Job:
    out: str  # the result file it is a part of
    arguments: tuple[str, ...]  # of `mage eval`

    def part(self, more: list[str]) -> str:
        """Name of its file under --parts, with further arguments of `mage eval`."""
        digest = hashlib.sha256(shlex.join([*self.arguments, *more]).encode()).hexdigest()[:12]
        return f"{self.out.removesuffix('.json')}/{digest}.json"

    @property
    def cost(self) -> float:
        """Grows with the time it takes: cells times tokens."""
        values = options_of(self.arguments)
        counts = (len(values.get(option, ())) or 1 for option in ("--methods", "--k", "--g", "--dense-layers"))
        steps = 4 / int(values.get("--tokens-per-step", ["4"])[0])
        lengths = sum(int(tokens) for tokens in values.get("--tokens", ["2048"]))
        return math.prod(counts) * lengths * steps * int(values.get("--n", ["200"])[0])


def options_of(arguments: tuple[str, ...]) -> dict[str, list[str]]:
    """Values by option, of what follows the suite."""
    values = {}
    for word in arguments[1:]:
        if word.startswith("--"):
            values[word] = []
        else:
            values[list(values)[-1]].append(word)
    return values


def read_jobs(path: Path) -> list[Job]:
    """All jobs of a list of runs, in its order."""
    jobs = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        out, suite, *rest = shlex.split(line)
        values = options_of((suite, *rest))
        cut = [option for option in CUT_BY[suite] if option in values]
        for chosen in itertools.product(*(values[option] for option in cut)):
            one = values | {option: [value] for option, value in zip(cut, chosen, strict=True)}
            if out.startswith("cut16/"):
                one["--adapter"] = ["smollm2-cut16-block"]
            jobs.append(Job(out, (suite, *itertools.chain.from_iterable((o, *v) for o, v in one.items()))))
    return list(dict.fromkeys(jobs))


def read_part(path: Path, of_commit: str) -> dict | None:
    """A part that is complete and of this commit."""
    try:
        part = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # or cut in the middle, when its job was stopped
        return None
    return part if part["complete"] and part["commit"] == of_commit else None


def case_of(row: dict) -> tuple:
    return tuple(row.get(key) for key in CASE)


def join(parts: list[dict]) -> list[dict]:
    """The rows of all parts. Of a row that several have, some may have more comparisons; what they share must be equal.

    Raises:
        ValueError: naming what differs.
    """
    rows = {}
    for part in parts:
        for row in part["rows"]:
            known = rows.setdefault(case_of(row), {})
            for key, value in row.items():
                if known.setdefault(key, value) != value:
                    case = {name: value for name, value in zip(CASE, case_of(row), strict=True) if value is not None}
                    raise ValueError(f"parts must agree on {key} of {case}, got {known[key]} and {value}")
    return list(rows.values())


def without_headline(rows: list[dict], path: Path) -> list[dict]:
    """Without what X_headline.json beside the file X.json has: more cases of the same cell."""
    headline = path.with_name(f"{path.stem}_headline.json")
    known = {case_of(row) for row in json.loads(headline.read_text())["rows"]} if headline.exists() else set()
    return [row for row in rows if case_of(row) not in known]


def compare(rows: list[dict], before: list[dict]) -> str:
    """In words: how many rows were there before, and how many of these have a number that is another now."""
    old = {case_of(row): row for row in before}
    known = [(row, old[case_of(row)]) for row in rows if case_of(row) in old]
    changed = [row for row, was in known if any(row[key] != was[key] for key in row.keys() & was.keys())]
    same, gone = len(known) - len(changed), len(old) - len(known)
    return f"{len(rows)} rows; of {len(old)} before {same} the same, {len(changed)} changed, {gone} gone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="prose, as `mage eval` takes it")
    parser.add_argument("--runs", type=Path, default=HERE / "evaluations.txt", help="the list of runs")
    parser.add_argument("--only", nargs="+", default=["*"], help="result files by pattern")
    parser.add_argument("--jobs", type=int, default=12, help="at once; 12 fill an H100 and 16 cores")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no job starts; those at work go on")
    parser.add_argument("--parts", type=Path, default=Path("build/evaluations"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "h100" / "eval")
    parser.add_argument("--device", default="cuda", help="of every job")
    parser.add_argument("more", nargs="*", help="behind --: further arguments of every `mage eval`")
    args = parser.parse_args()
    of_commit, end = commit(), time.monotonic() + 60 * args.minutes
    jobs = [job for job in read_jobs(args.runs) if any(fnmatch.fnmatch(job.out, name) for name in args.only)]
    if not jobs:
        parser.error(f"--only must fit a file of {args.runs}, got {' '.join(args.only)}")
    more = ["--device", args.device, "--text", *args.text, *args.more]
    if "--first-seed" not in args.more:
        more += ["--first-seed", "1000"]
    paths = {job: args.parts / job.part(more) for job in jobs}
    missing = [job for job in jobs if read_part(paths[job], of_commit) is None]
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} done before", flush=True)
    failed, running, ended = [], set(), False

    def run(job: Job) -> None:
        if time.monotonic() > end or ended:
            return
        path, start = paths[job], time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mage_ext.cli", "eval", *job.arguments, *more, "--out", str(path)]
        with path.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            running.add(process)
            status = process.wait()
            running.discard(process)
        if status:
            failed.append(job)
        seconds = f"{time.monotonic() - start:6.0f} s"
        print(seconds, f"status {status}", job.out, shlex.join(job.arguments), flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = ThreadPoolExecutor(args.jobs)
    try:
        list(pool.map(run, sorted(missing, key=lambda job: -job.cost)))
    finally:  # an interrupt leaves nothing at work
        ended = True
        for process in list(running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        pool.shutdown(cancel_futures=True)
    unfinished = 0
    for out in sorted({job.out for job in jobs}, key=lambda out: ("_headline" not in out, out)):
        parts = [read_part(paths[job], of_commit) for job in jobs if job.out == out]
        if None in parts:
            unfinished += 1
            print(f"{out}: {len(parts) - parts.count(None)} of {len(parts)} parts")
            continue
        path, head = args.out / out, parts[0]
        try:
            rows = without_headline(join(parts), path)
        except ValueError as error:
            unfinished += 1
            print(f"{out}: {error}")
            continue
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        write_rows(path, head["name"], head["model"], head["device"], of_commit, rows, head["first_seed"])
        print(f"{out}: {compare(rows, before)}")
    for job in failed:
        print(f"failed: {paths[job].with_suffix('.log')}")
    sys.exit(bool(failed or unfinished))


if __name__ == "__main__":
    main()
