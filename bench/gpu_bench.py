"""What the benches of GPU operators share: options, refusals before anything is timed, and the result at the end."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from result_file import check_device, make_result, write_result


def add_options(parser, rows: str) -> None:
    """--rows, whose form is given, --replays, --seed and --out."""
    parser.add_argument("--rows", default="", help=f"{rows}, parts may be left out, several by commas")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="result file, written on an H100 only")


def chosen_shapes(args: argparse.Namespace, parser, shapes: list, matches: Callable[[object, str], bool]) -> list:
    """The shapes that --rows picks; ends with a message if there are none."""
    try:
        chosen = [shape for shape in shapes if any(matches(shape, pattern) for pattern in args.rows.split(","))]
    except ValueError as error:
        parser.error(str(error))
    if not chosen:
        parser.error(f"--rows must fit a row of the table, got {args.rows!r}")
    return chosen


def gpu_name(args: argparse.Namespace, parser) -> str:
    """The device that will be timed; ends with a message if there is none, or none whose results may be written."""
    if args.out and Path(args.out).is_dir():
        parser.error(f"--out must be a file, got the folder {args.out!r}")
    if not torch.cuda.is_available():
        parser.error("needs a GPU that torch can use")
    device = torch.cuda.get_device_name()
    if args.out:
        try:
            check_device(device)
        except ValueError as error:
            parser.error(str(error))
    return device


def finish(args: argparse.Namespace, name: str, device: str, rows: list[dict], **extra) -> None:
    """Writes the result file if one is asked for, and prints the result as the last line."""
    result = make_result(name, device, rows, seed=args.seed, **extra)
    if args.out:
        write_result(args.out, result)
        print(f"written: {args.out}")
    print(json.dumps(result))
