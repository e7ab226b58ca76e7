"""Runs evaluations.txt in parts, several at once, and puts the parts together as result files.

    python bench/run_evaluations.py --text eltec-eng.jsonl.xz [--only 'cut16/*'] [--jobs 12] [--minutes 9]
        [--parts build/evaluations] [--out bench/results/h100/eval] [--device cuda] [-- more of every `mage eval`]

Every job is one `mage eval` and leaves a file under --parts. One whose file is complete, of the libraries' commit and
by the same command does not run again, so that a run which --minutes ended goes on where it stood. What evaluates must
be as in that commit: where a checkout's python, csrc or include have changed since, nothing runs until they are
committed and built. The longest start first. A result file is written when all of its parts are there, with a word on
how it differs from the one that was there before. Rows that two parts have, as exact's, must be alike. From the root of
a checkout; files in a folder named h100 need an H100.
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
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mage_ext._arguments import check_device
from mage_ext.evaluation.figures import case_of
from mage_ext.evaluation.needles import check_place, write_rows
from mage_ext.info import commit

HERE = Path(__file__).resolve().parent
CUT_BY = {  # options whose values are jobs of their own, by suite
    "methods": ("--tasks", "--tokens", "--tokens-per-step", "--k"),
    "prose": ("--tokens", "--k"),
    "recall": ("--tasks", "--tokens"),
    "heatmap": ("--tokens",),
    "thresholds": ("--tasks",),
}
# What evaluates: folders that must be as in the commit which the rows name.
EVALUATES = ("python", "csrc", "include", ":!*.md")


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
    """All jobs of a list of runs, in its order. Raises ValueError, naming a line that is no run; OSError."""
    jobs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        out, suite, *rest = shlex.split(line) if len(line.split()) > 1 else (line, "")
        if suite not in CUT_BY or (rest and not rest[0].startswith("--")):
            told = f"a result file, one of {', '.join(CUT_BY)}, and its options"
            raise ValueError(f"{path}:{number} must be {told}, got {line!r}")
        values = options_of((suite, *rest))
        cut = [option for option in CUT_BY[suite] if option in values]
        for chosen in itertools.product(*(values[option] for option in cut)):
            one = values | {option: [value] for option, value in zip(cut, chosen, strict=True)}
            if out.startswith("cut16/"):
                one["--adapter"] = ["smollm2-cut16-block"]
            jobs.append(Job(out, (suite, *itertools.chain.from_iterable((o, *v) for o, v in one.items()))))
    return list(dict.fromkeys(jobs))


def changed_since(of_commit: str, root: Path = HERE.parent) -> str:
    """What evaluates and is not as in a commit, in words; "" if all is, or where no checkout can tell."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    if shutil.which("git") is None or git("rev-parse").returncode:
        return ""
    found = git("diff", "--name-only", of_commit, "--", *EVALUATES)
    if found.returncode:
        return "a commit that the checkout does not have"
    names = found.stdout.splitlines()
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"changes in {names[0]}{more}" if names else ""


def device_name(device: str) -> str:
    """As the files of `mage eval` have it. Raises ValueError if this machine has no such device."""
    found = check_device("run_evaluations", device)
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def read_part(path: Path, of_commit: str) -> dict | None:
    """A part that is complete and of this commit; None: there is none, or the file is something else."""
    try:
        part = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(part, dict) and {"name", "model", "device", "commit", "first_seed", "rows"} <= part.keys()
    return part if known and part.get("complete") is True and part["commit"] == of_commit else None


def read_rows(path: Path) -> list[dict]:
    """The rows of a result file, none if there is no file. Raises ValueError, naming a file that is none."""
    try:
        return json.loads(path.read_text())["rows"] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a result file, got: {error!r}") from None


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
                    raise ValueError(f"parts must agree on {key} of {case_of(row)}, got {known[key]} and {value}")
    return list(rows.values())


def without_headline(rows: list[dict], path: Path) -> list[dict]:
    """Without what X_headline.json beside the file X.json has: more cases of the same cell. Raises as `read_rows`."""
    known = {case_of(row) for row in read_rows(path.with_name(f"{path.stem}_headline.json"))}
    return [row for row in rows if case_of(row) not in known]


def compare(rows: list[dict], before: list[dict]) -> str:
    """In words: how many rows were there before, and how many of these have a number that is another now."""
    old = {case_of(row): row for row in before}
    known = [(row, old[case_of(row)]) for row in rows if case_of(row) in old]
    changed = [row for row, was in known if any(row[key] != was[key] for key in row.keys() & was.keys())]
    same, gone = len(known) - len(changed), len(old) - len(known)
    return f"{len(rows)} rows; of {len(old)} before {same} the same, {len(changed)} changed, {gone} gone"


def write_result(path: Path, parts: list[dict], of_commit: str) -> str:
    """Writes a result file of all its parts; how it differs from the one before, in words. Raises ValueError, naming
    what differs between parts, or a file beside it that can't be read."""
    rows = without_headline(join(parts), path)
    try:
        before = compare(rows, read_rows(path))
    except ValueError as error:
        before = f"{len(rows)} rows; before: {error}"
    head = parts[0]
    write_rows(path, head["name"], head["model"], head["device"], of_commit, rows, head["first_seed"])
    return before


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
    if args.jobs < 1:
        parser.error(f"--jobs must be >= 1, got {args.jobs}")
    if not args.minutes >= 0:
        parser.error(f"--minutes must be >= 0, got {args.minutes}")
    of_commit, end = commit(), time.monotonic() + 60 * args.minutes
    try:
        jobs = [job for job in read_jobs(args.runs) if any(fnmatch.fnmatch(job.out, name) for name in args.only)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not jobs:
        parser.error(f"--only must fit a file of {args.runs}, got {' '.join(args.only)}")
    try:
        check_place("run_evaluations", "out", args.out, device_name(args.device))
    except ValueError as error:
        parser.error(str(error))
    changes = changed_since(of_commit)
    if changes:
        folders = ", ".join(EVALUATES[:3])
        told = f"got {changes}: commit them, then make build"
        parser.error(f"{folders} must be as in the libraries' commit, {of_commit or 'none'}, {told}")
    try:
        args.parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    # An option that is given twice has its last value.
    more = ["--device", args.device, "--first-seed", "1000", "--text", *args.text, *args.more]
    paths = {job: args.parts / job.part(more) for job in jobs}
    missing = [job for job in jobs if read_part(paths[job], of_commit) is None]
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} done before", flush=True)
    failed, running, ended = [], set(), False
    starts = threading.Lock()  # held while a job starts, and when no more may

    def run(job: Job) -> None:
        if time.monotonic() > end:
            return
        path, start = paths[job], time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mage_ext.cli", "eval", *job.arguments, *more, "--out", str(path)]
        with path.with_suffix(".log").open("w") as log:
            with starts:
                if ended:
                    return
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
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with starts:
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
        try:
            print(f"{out}: {write_result(args.out / out, parts, of_commit)}")
        except ValueError as error:
            unfinished += 1
            print(f"{out}: {error}")
    for job in failed:
        print(f"failed: {paths[job].with_suffix('.log')}")
    sys.exit(bool(failed or unfinished))


if __name__ == "__main__":
    main()
