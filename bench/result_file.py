"""Result files of the GPU benches: bench/results/h100/<name>.json, only from an H100."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from mage_ext import info
from mage_ext._files import write_text

KEYS = ["case", "us", "floor_us", "fraction", "peer", "peer_us", "ratio"]


def commit() -> str:
    """Of the checkout; where there is none, of the libraries."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or info.commit() or "unknown"


def check_device(device: str) -> None:
    """Refuses every device but an H100."""
    if "H100" not in device:
        raise ValueError(f"results of benches are written on an H100 only, got {device}")


def make_result(name: str, device: str, rows: list[dict], **extra) -> dict:
    """The content of a result file; refuses rows that lack a key and cases that appear twice."""
    seen = set()
    for row in rows:
        lacking = [key for key in KEYS if key not in row]
        if lacking:
            raise ValueError(f"a row must have {', '.join(KEYS)}, got none of {', '.join(lacking)}: {row}")
        case = json.dumps(row["case"], sort_keys=True)
        if case in seen:
            raise ValueError(f"a case must appear once, got twice {case}")
        seen.add(case)
    head = {"name": name, "device": device, "torch": torch.__version__}
    if "flashinfer" in sys.modules:
        head["flashinfer"] = sys.modules["flashinfer"].__version__
    return head | {"commit": commit(), **extra, "rows": rows}


def write_result(path: str | Path, result: dict) -> None:
    """One row per line, so that two runs can be compared by diff."""
    check_device(result["device"])
    head = {key: value for key, value in result.items() if key != "rows"}
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    text = json.dumps(head)[:-1] + f', "rows": [\n{rows}\n]}}\n'
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
