"""``python -m benchmarks.regbench``: trains what is missing of a sweep, then writes table and plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..sweep import command
from .sweeps import SWEEPS


def main(arguments: Sequence[str] | None = None) -> int:
    return command.main("regbench", __doc__, SWEEPS, Path(__file__).parent / "results", arguments)


if __name__ == "__main__":
    sys.exit(main())
