"""``python -m benchmarks.lm``: trains what is missing of a sweep on a text, then writes table and plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from blurry_attn.lm.data import InputError

from ..sweep import command
from . import report
from .sweeps import SWEEPS
from .training import Reader


def main(arguments: Sequence[str] | None = None) -> int:
    folder = Path(__file__).parent / "results"
    try:
        return command.main("lm", __doc__, SWEEPS, folder, arguments, runner=Reader, report=report)
    except InputError as error:
        print(f"python -m benchmarks.lm: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
