"""Benchmarks: one folder each, one command each (``python -m benchmarks.NAME``), results as JSON and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone


def command_line(name: str, given: Sequence[str]) -> str:
    """How a benchmark was called, but for where its results went."""
    kept = [word for before, word in zip(["", *given], given, strict=False) if "--out" not in (before, word)]
    return " ".join([f"python -m benchmarks.{name}", *kept])


def now() -> str:
    """The minute that a result is of."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def described(error: Exception) -> str:
    """An error's type and the first line of its message, if it has one."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
