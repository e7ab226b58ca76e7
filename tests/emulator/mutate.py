"""Plants defects in the kernels and demands that the emulated tests see them.

    python3 tests/emulator/mutate.py [NAME...]

Works on a copy of the tracked files in build/mutants, which is configured once; each defect costs a build of what it
touches (up to two minutes on two cores). Not part of CI.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "mutants"
TREE, BUILD = FOLDER / "tree", FOLDER / "build"
SEEDS = 6

SHORT_LISTS = "block_attention/short_lists.cuh"
MAINLOOP = "block_attention/mainloop.cuh"
SHORT = "Cases/SparseBlockAttentionCuda*/G16Batch3Rows224:*/G64PageOf16D128Bf16Rows224"
RINGS = "Cases/SparseBlockAttentionCuda*/SharedRing13Of650*:*/SharedRing7Of1300*"
PAIRS = "Cases/SparseBlockAttentionCuda*/G64WavesRows224:*/G16ShortTiles40Rows224:*/G16BrokenPagesRows224"
EXPECTS = "(is_v ? Config::kBoxes : boxes) * (Config::kBox * Config::kDim * 2)"


class Defect(NamedTuple):
    file: str  # in csrc/kernels
    old: str  # once in it
    new: str
    tests: str  # a filter


def without(file: str, line: str, tests: str) -> Defect:
    return Defect(file, line, "", tests)


def waits_for_nothing(file: str, tests: str) -> Defect:
    """Inputs are read, or outputs written, before the kernels that come before are done."""
    return Defect(file, "device::dependency_wait();", ";", tests)


DEFECTS = {
    # Short lists: clusters that share what they read.
    "short_no_wait_before_multicast": without(
        SHORT_LISTS, "    if (shares(args)) device::cluster_wait();  // their barriers are initialised\n", SHORT
    ),
    "short_expects_too_much": Defect(SHORT_LISTS, EXPECTS, EXPECTS.replace(": boxes", ": Config::kBoxes"), SHORT),
    "short_expects_too_little": Defect(SHORT_LISTS, EXPECTS, EXPECTS.replace("Config::kBoxes :", "boxes :"), SHORT),
    "short_both_bring_all": Defect(
        SHORT_LISTS, "const bool owns = (box & args.ctas - 1) == at.rank;", "const bool owns = true;", SHORT
    ),
    "short_wrong_receivers": Defect(
        SHORT_LISTS, "((1 << args.ctas) - 1) << at.split * args.ctas", "((1 << args.ctas) - 1)", SHORT
    ),
    "short_releases_always": Defect(
        SHORT_LISTS,
        "const bool releases = token + Config::kStages * piece.tile_tokens < piece.token_end;",
        "const bool releases = true;",
        SHORT,
    ),
    "short_no_wait_for_records": without(
        SHORT_LISTS, "device::mbarrier_wait(device::shared_address(&shared.merged), 0);", SHORT
    ),
    "short_no_syncthreads": without(SHORT_LISTS, "__syncthreads();  // the records of this CTA are written", SHORT),
    "short_no_tail_barrier": Defect(
        SHORT_LISTS,
        "device::named_barrier(kTailBarrier, Config::kConsumers);\n        auto* values",
        "auto* values",
        SHORT,
    ),
    "short_no_wait_for_products": Defect(
        SHORT_LISTS, "beside();\n        device::wgmma_wait<0>();", "beside();", SHORT
    ),
    "short_no_wait_for_values": Defect(
        SHORT_LISTS,
        "device::mbarrier_wait(device::shared_address(&shared.full_v[stage]), parity);\n            clear_values",
        "clear_values",
        SHORT,
    ),
    # The same, tile after tile.
    "ring_no_remote_release": Defect(
        SHORT_LISTS, "} else if (shares(args) && lane < args.ctas) {", "} else if (false) {", RINGS
    ),
    "ring_producer_does_not_wait": without(
        SHORT_LISTS, "            device::mbarrier_wait(empty + 8 * stage, parity);\n", RINGS
    ),
    "ring_keeps_its_parity": Defect(
        SHORT_LISTS,
        "stage ^= 1;\n            if (stage == 0) parity ^= 1;\n        }\n    }\n\n    // Adds up",
        "stage ^= 1;\n        }\n    }\n\n    // Adds up",
        RINGS,
    ),
    # Pairs of CTAs.
    "pair_no_wait_for_releases": Defect(
        MAINLOOP,
        "    wait_for_releases<Config>(shared, ring);\n}\n\n// Of the calling",
        "}\n\n// Of the calling",
        PAIRS,
    ),
    "attention_overlap": waits_for_nothing(MAINLOOP, "BlockAttentionMassCudaOverlap.*"),
    # The other operators.
    "select_kv_cluster_not_started": without(
        "select_kv/select_kv.cu", "if (cluster > 1) device::cluster_sync_relaxed();", "Cases/SelectKvCuda*"
    ),
    "select_kv_no_wait_for_totals": without(
        "select_kv/group.cuh", "device::mbarrier_wait(totals, bins_parity_);", "Cases/SelectKvCuda*"
    ),
    "select_kv_no_wait_for_entries": without(
        "select_kv/group.cuh", "device::mbarrier_wait(arrived, entries_parity_);", "Cases/SelectKvCuda*"
    ),
    "row_votes_cluster_not_started": Defect(
        "row_votes/cluster.cuh",
        "    device::cluster_wait();\n    if (warp < args.row_blocks) {",
        "    if (warp < args.row_blocks) {",
        "Cases/RowVotesCuda*",
    ),
    "row_votes_no_wait_for_exchange": without(
        "row_votes/cluster.cuh", "device::mbarrier_wait(exchanged, 0);", "Cases/RowVotesCuda*"
    ),
    "row_votes_overlap": waits_for_nothing("row_votes/cluster.cuh", "RowVotesCudaOverlap.*"),
    "token_confidence_cluster_not_started": without(
        "token_confidence/token_confidence.cu", "if (in_cluster) device::cluster_wait();", "TokenConfidenceCuda.Agrees*"
    ),
    "token_confidence_no_wait_for_pieces": without(
        "token_confidence/token_confidence.cu", "device::mbarrier_wait(barrier, 0);", "TokenConfidenceCuda.Ties*"
    ),
    "token_confidence_overlap": waits_for_nothing(
        "token_confidence/token_confidence.cu", "TokenConfidenceCudaOverlap.*"
    ),
    "token_mass_stage_not_awaited": without(
        "token_mass/mainloop.cuh",
        "device::mbarrier_wait(device::shared_address(&shared.empty_k[ring.stage]), ring.parity ^ 1);",
        "Cases/TokenMassCuda*/RingRows8",
    ),
    "token_mass_no_wait_for_q": Defect(
        "token_mass/mainloop.cuh",
        "device::copies_wait();\n                device::named_barrier(kLoaderBarrier",
        "device::named_barrier(kLoaderBarrier",
        "Cases/TokenMassCuda*/RingRows8",
    ),
    "merge_attention_overlap": waits_for_nothing("merge_attention/merge_attention.cu", "MergeAttentionCudaOverlap.*"),
}


def build() -> str:
    """What the compiler said, if it failed."""
    command = ["cmake", "--build", BUILD, "--target", "mage_emulated_tests"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode else ""


def run(tests: str) -> tuple[bool, str]:
    """Whether a seed failed, and the first line that says why."""
    binary = BUILD / "tests" / "emulator" / "mage_emulated_tests"
    for seed in range(1, SEEDS + 1):
        command = [binary, f"--seed={seed}", f"--gtest_filter={tests}", "--gtest_fail_fast", "--gtest_brief=1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if "exception" in line or "Failure" in line]
            return True, f"seed {seed}: {lines[-1] if lines else f'status {done.returncode}'}"
    return False, f"{SEEDS} seeds pass"


def main() -> None:
    names = sys.argv[1:] or list(DEFECTS)
    shutil.rmtree(TREE, ignore_errors=True)
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name.startswith(("csrc/", "include/", "tests/cpp/", "tests/emulator/", "CMake", "python/mage_ext/_version")):
            copy = TREE / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy)
    options = ["-G", "Ninja", "-DMAGE_TORCH=OFF", "-DMAGE_TESTS=ON", "-DMAGE_CUDA=OFF", "-DMAGE_EMULATOR=ON"]
    subprocess.run(["cmake", "-S", TREE, "-B", BUILD, *options], check=True, stdout=subprocess.DEVNULL)
    missed = []
    for name in names:
        defect = DEFECTS[name]
        path = TREE / "csrc" / "kernels" / defect.file
        text = path.read_text()
        if text.count(defect.old) != 1:
            seen, why = False, f"{defect.file} has its place {text.count(defect.old)} times, adapt it"
        else:
            path.write_text(text.replace(defect.old, defect.new))
            said = build()
            seen, why = (False, f"does not build:\n{said[-1000:]}") if said else run(defect.tests)
            path.write_text(text)
            os.utime(path)
        print(f"{'seen' if seen else 'MISSED':7} {name}: {why}", flush=True)
        if not seen:
            missed.append(name)
    print(f"{len(names) - len(missed)} of {len(names)} defects seen")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
