"""Benchmarks: one folder each, one command each (``python -m benchmarks.NAME``), results as JSON and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def command_line(name: str, given: Sequence[str]) -> str:
    """How a benchmark was called, but for where its results went."""
    kept = [word for before, word in zip(["", *given], given, strict=False) if "--out" not in (before, word)]
    return " ".join([f"python -m benchmarks.{name}", *kept])


def now() -> str:
    """The minute that a result is of."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


@contextmanager
def results_in(folder: Path, *names: str, parser: argparse.ArgumentParser) -> Iterator[None]:
    """Keeps the files ``names`` of ``--out`` to this process; what stands against that is told before a measurement."""
    from blurry_attn.files import claimed  # benchmarks.guard measures packages that may lack it

    with ExitStack() as claim:
        try:
            claim.enter_context(claimed(folder, *names))
        except OSError as error:
            parser.error(f"--out {folder}: results cannot be written there ({error.strerror})")
        yield


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all."""
    from blurry_attn.files import write_whole

    write_whole(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n"))


def described(error: Exception) -> str:
    """An error's type and the first line of its message, if it has one."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
