"""``python -m benchmarks.guard BEFORE AFTER``: fails where a change costs over 3 % of time or memory.

BEFORE and AFTER are wheels, or folders with an installed package. Each is measured in processes of its own, which take
turns at every case on the same inputs: the device's time, on a GPU the host's, too, and the most memory that a call
takes. Rounds are added until 95 % bounds of the median ratio are clear of the limit. The exit status is 0 if all cases
are within it, 1 if one is not or fails, 2 if nothing could be compared.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from .. import command_line, now
from .cases import SUITES, Suite, chosen, quick
from .report import SIDES, result_of, status, table
from .rounds import compare
from .side import Side, Unusable, installed


def compared(args: argparse.Namespace, suite: Suite) -> dict[str, Any]:
    """What is measured, of what and on what.

    Raises:
        Unusable: one of the two cannot be installed or imported.
    """
    limit = args.limit / 100
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = []
        for name in SIDES:
            empty = scratch / f"empty {name}"
            empty.mkdir()
            side = Side(installed(getattr(args, name), scratch / name), empty, args.device, args.threads)
            sides.append(stack.enter_context(closing(side)))
        installations = {name: side.installation() for name, side in zip(SIDES, sides, strict=True)}
        return {
            **sides[0].ask("setting"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **{name: {"given": str(getattr(args, name)), **found} for name, found in installations.items()},
            "limit": limit,
            "rows": [result_of(row, limit) for row in compare(sides, suite, limit, args.rounds)],
        }


def check_writable(file: Path) -> None:
    """Makes the file's folder.

    Raises:
        OSError: the file cannot be written.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side in SIDES:
        parser.add_argument(side, type=Path, help="a wheel, or a folder with an installed package")
    parser.add_argument("--device", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=["*"], metavar="A,B,..", help="only cases of these names"
    )
    parser.add_argument("--limit", type=float, default=3.0, metavar="PERCENT", help="what is let pass (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="at most so many for a case (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny cases: does everything run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the result as JSON")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    for name in ("threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.limit < 100:
        parser.error(f"--limit must be between 0 and 100 percent, got {args.limit:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    suite = SUITES[args.device]
    try:
        suite = chosen(quick(suite) if args.quick else suite, args.cases)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    if args.out:
        try:
            check_writable(args.out)
        except OSError as error:
            parser.error(f"--out {args.out}: the result cannot be written there ({error.strerror})")

    try:
        result = {"command": command_line("guard", given), "date": now()} | compared(args, suite)
    except Unusable as error:
        parser.error(str(error))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return status(result["rows"])


if __name__ == "__main__":
    sys.exit(main())
