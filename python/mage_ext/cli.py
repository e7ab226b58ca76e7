"""The `mage` command. Each subcommand imports what it needs when it runs, so that the others start without it."""

import argparse
import os
import sys
from collections.abc import Sequence


def _info(args: argparse.Namespace) -> int:
    from mage_ext.info import info_lines

    print("\n".join(info_lines()))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand; `run` of the parsed namespace is the function to call."""
    parser = argparse.ArgumentParser(prog="mage", description="Block-diffusion attention with MAGE selection.")
    commands = parser.add_subparsers(metavar="command", required=True)
    info = commands.add_parser("info", help="print what a bug report needs")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
