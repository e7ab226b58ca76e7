"""Runs the C++ tests in several processes, plain or under a tool of compute-sanitizer.

    python3 .ci/cpp_tests.py BINARY [--jobs N] [gtest arguments]
    python3 .ci/cpp_tests.py BINARY --tool racecheck [--jobs N] [--seconds S] [gtest arguments]

Plain: the processes share the tests; prints what failed and a line at the end. With gtest arguments it is one process
unless --jobs says otherwise, and prints what GoogleTest prints. Several GPUs (all, or those of CUDA_VISIBLE_DEVICES)
share the processes.

Under a tool: the tests run once plain, which tells how long each takes, then in batches from short to long ones. Its
warnings count as much as its errors. Tests found clean are kept in build/sanitize/<tool>.txt for this very binary, so
that a run which --seconds ended goes on where it stood. The exit status is 0 if every test ran and was clean. Needs
nothing installed but the tool.
"""

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
MOST_JOBS = 16  # processes that share a GPU
MOST_FAILURES, LAST_LINES = 10, 40  # that are printed
TEST_MS = 15  # of plain time, what a test costs at least
# Plain time and tests of a batch. A process takes seconds to start under a tool; a killed batch loses what it had done.
BATCH_MS, BATCH_TESTS = 2000, 64
RACECHECK_MS, RACECHECK_TESTS = 250, 8  # which takes some hundred times as long
CLEAN = re.compile(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed)")
PASSED = re.compile(r"\[  PASSED  \] (\d+) test")


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; none where there is no driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True, check=False).stdout
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def env_of(process: int, gpus: list[str]) -> dict[str, str]:
    """The environment of one of several processes: one GPU of all, and threads that don't spin while others work."""
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[process % len(gpus)]} if gpus else {}
    return {"OMP_WAIT_POLICY": "passive"} | os.environ | gpu


def run_shards(binary: Path, jobs: int, gtest_args: list[str]) -> tuple[list[str], list[dict]]:
    """All tests in `jobs` processes: what failed, in words, and GoogleTest's records of the tests that ran."""
    gpus = visible_gpus()

    def run_one(shard: int) -> tuple[list[str], list[dict]]:
        out = Path(folder, f"{shard}.json")
        env = env_of(shard, gpus) | {"GTEST_TOTAL_SHARDS": str(jobs), "GTEST_SHARD_INDEX": str(shard)}
        command = [binary, *gtest_args, f"--gtest_output=json:{out}"]
        to = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, env=env, check=False, **to)
        if not out.exists():  # it ended in the middle of a test
            return ["\n".join([*done.stdout.splitlines()[-LAST_LINES:], f"status {done.returncode}"])], []
        suites = json.loads(out.read_text())["testsuites"]
        tests = [test | {"id": f"{suite['name']}.{test['name']}"} for suite in suites for test in suite["testsuite"]]
        tests = [test for test in tests if test["status"] == "RUN"]
        failed = [f"{test['id']}\n{test['failures'][0]['failure']}" for test in tests if "failures" in test]
        if done.returncode and not failed:
            failed = [f"process {shard} ended with status {done.returncode}"]
        return failed, tests

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(run_one, range(jobs)))
    return [text for failed, _ in results for text in failed], [test for _, tests in results for test in tests]


def print_failed(failed: list[str]) -> None:
    for text in failed[:MOST_FAILURES]:
        print(text, end="\n\n")
    if len(failed) > MOST_FAILURES:
        print(f"... and {len(failed) - MOST_FAILURES} more")


def run_plain(binary: Path, jobs: int, gtest_args: list[str]) -> int:
    start = time.monotonic()
    failed, tests = run_shards(binary, jobs, gtest_args)
    print_failed(failed)
    broken = sum("failures" in test for test in tests)
    skipped = sum(test["result"] == "SKIPPED" for test in tests)
    print(
        f"C++ tests: {len(tests) - broken - skipped} passed, {broken} failed, {skipped} skipped "
        f"in {time.monotonic() - start:.0f} s ({jobs} processes)"
    )
    return 1 if failed or not tests else 0


def make_batches(times: dict[str, float], most_ms: float, most_tests: int) -> list[list[str]]:
    """Tests from short to long ones, several short ones together."""
    batches, own, total = [], [], 0.0
    for name in sorted(times, key=times.get):
        if own and (total + times[name] + TEST_MS > most_ms or len(own) == most_tests):
            batches.append(own)
            own, total = [], 0.0
        own.append(name)
        total += times[name] + TEST_MS
    return [*batches, own] if own else batches


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_under(tool: str, binary: Path, jobs: int, seconds: float, gtest_args: list[str]) -> int:
    if not shutil.which("compute-sanitizer"):
        sys.exit("compute-sanitizer must be on PATH (CUDA toolkit)")
    start = time.monotonic()
    failed, tests = run_shards(binary, jobs, gtest_args)
    if failed:
        print_failed(failed)
        return 1
    times = {test["id"]: 1e3 * float(test["time"].rstrip("s")) for test in tests if test["result"] != "SKIPPED"}
    if not times:
        sys.exit("no test ran: the tools need a Hopper GPU, and tests that use it")
    folder = ROOT / "build" / "sanitize"
    logs = folder / tool
    logs.mkdir(parents=True, exist_ok=True)
    state, digest = folder / f"{tool}.txt", hashlib.sha256(binary.read_bytes()).hexdigest()
    known = state.read_text().split() if state.exists() else []
    clean = set(known[1:]) if known[:1] == [digest] else set()
    if not clean:
        state.write_text(f"{digest}\n")
    reports, running, ended = [], set(), False
    others = [argument for argument in gtest_args if not argument.startswith("--gtest_filter")]
    threads = {"OMP_THREAD_LIMIT": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    gpus, places = visible_gpus(), queue.SimpleQueue()
    for place in range(jobs):
        places.put(place)

    def run_batch(index: int, names: list[str]) -> None:
        left = seconds - (time.monotonic() - start)
        if left < 1 or ended:
            return
        log, place = logs / f"{index}.log", places.get()
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", binary, *others]
        with log.open("w") as out:
            # A session of its own, so that the tool and what it runs end together.
            own = {"stdout": out, "stderr": out, "start_new_session": True, "env": threads | env_of(place, gpus)}
            process = subprocess.Popen([*command, f"--gtest_filter={':'.join(names)}"], **own)
            running.add(process)
            try:
                status = process.wait(None if left == float("inf") else left)
            except subprocess.TimeoutExpired:
                end(process)
                return
            finally:
                running.discard(process)
                places.put(place)
        if ended:
            return
        text = log.read_text(errors="replace")
        passed = sum(int(count) for count in PASSED.findall(text))
        if status == 0 and CLEAN.search(text) and passed == len(names):
            clean.update(names)
            with state.open("a") as file:
                file.write("".join(f"{name}\n" for name in names))
        else:
            reports.append((names, log))

    most = (RACECHECK_MS, RACECHECK_TESTS) if tool == "racecheck" else (BATCH_MS, BATCH_TESTS)
    batches = make_batches({name: ms for name, ms in times.items() if name not in clean}, *most)
    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(run_batch, range(len(batches)), batches))
    finally:  # an interrupt too leaves nothing on the GPU
        ended = True
        for process in list(running):
            end(process)
        pool.shutdown(cancel_futures=True)
    for names, log in reports:
        lines = log.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("====") and "COMPUTE-SANITIZER" not in line] or lines
        print(f"{tool} reports, in one of {' '.join(names)} ({log.relative_to(ROOT)}):", *said[:6], sep="\n  ")
    reported = sum(len(names) for names, _ in reports)
    not_run = len(times) - len(clean & times.keys()) - reported
    print(
        f"{tool}: {len(clean & times.keys())} tests clean, {reported} in batches with reports, {not_run} not run; "
        f"{time.monotonic() - start:.0f} s ({jobs} processes)"
    )
    return 1 if reported or not_run else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument("--jobs", type=int, default=0, help=f"processes; one a core, {MOST_JOBS} a GPU at most")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="with --tool: stop after this long")
    args, gtest_args = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    binary = args.binary.resolve()
    jobs = args.jobs or min(len(os.sched_getaffinity(0)), MOST_JOBS * max(1, len(visible_gpus())))
    if args.tool:
        sys.exit(run_under(args.tool, binary, jobs, args.seconds, gtest_args))
    if jobs == 1 or (gtest_args and not args.jobs):
        os.execv(binary, [str(binary), *gtest_args])
    sys.exit(run_plain(binary, jobs, gtest_args))


if __name__ == "__main__":
    main()
