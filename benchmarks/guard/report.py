"""Verdicts in words, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..speed.report import hardware
from .rounds import PEAK, Row
from .verdict import exact, final, median_interval

SIDES = ("before", "after")
WORDS = {
    "seconds": {"less": "faster", "more": "slower", "unsure": "slower?"},
    "host_seconds": {"less": "faster on the host", "more": "slower on the host", "unsure": "slower on the host?"},
    PEAK: {"less": "less memory", "more": "more memory"},
}
# Title, the unit's size and format of a quantity's columns.
COLUMNS = {
    "seconds": ("time, ms", 1e3, ".3f"),
    "host_seconds": ("host, us", 1e6, ".1f"),
    PEAK: ("memory, MiB", 2**-20, ".2f"),
}


def result_of(row: Row, limit: float) -> dict[str, Any]:
    """A row as JSON has it: medians over rounds, their ratio with its bounds (None: unknown), the verdict in words, and
    whether it lets the change pass."""
    quantities = {quantity: _judged(row, quantity, limit) for quantity in row.pairs}
    words = [WORDS[quantity].get(said["verdict"]) for quantity, said in quantities.items()]
    verdict = ", ".join(filter(None, words)) or "same"
    passed = all(said["verdict"] != "more" for said in quantities.values())
    if row.failures:
        passed = list(row.failures) == [0]
        verdict = "new" if passed else "failed"
    return {
        **{"name": row.name, "mode": row.mode, "provider": row.provider, "case": asdict(row.case)},
        "quantities": quantities,
        "failures": {SIDES[side]: reason for side, reason in sorted(row.failures.items())},
        **{"verdict": verdict, "passed": passed},
    }


def _judged(row: Row, quantity: str, limit: float) -> dict[str, Any]:
    pairs, ratios = row.pairs[quantity], row.ratios(quantity)
    low, high, verdict = ratios[0], ratios[0], exact(ratios[0], limit)
    if quantity != PEAK:
        low, high, verdict = *median_interval(ratios), final(ratios, limit)
    return {
        **{side: statistics.median(values) for side, values in zip(SIDES, zip(*pairs, strict=True), strict=True)},
        "ratio": statistics.median(ratios),
        **{name: bound if math.isfinite(bound) else None for name, bound in (("low", low), ("high", high))},
        "rounds": len(pairs),
        "verdict": verdict,
    }


def table(result: dict[str, Any]) -> str:
    """A line per case and mode, then what failed, and what does not pass."""
    rows = result["rows"]
    shown = [quantity for quantity in COLUMNS if any(quantity in row["quantities"] for row in rows)]
    width = max(len(row["name"]) for row in rows)
    lines = [f"{hardware(result)}; torch {result['versions']['torch']}; {result['date']}"]
    lines += [f"{side}: {result[side]['given']}" for side in SIDES]
    lines += ["", " " * (width + 26) + "".join(f"{COLUMNS[quantity][0]:>39}" for quantity in shown)]
    heading = f"{'before':>10}{'after':>10}{'ratio':>7}{'':12}"
    lines.append(f"{'':{width}}  {'':16}  rounds" + heading * len(shown))
    for row in rows:
        rounds = max((said["rounds"] for said in row["quantities"].values()), default=0)
        cells = "".join(_cell(row["quantities"].get(quantity), quantity) for quantity in shown)
        lines.append(f"{row['name']:{width}}  {row['mode']:16}{rounds:8}{cells}  {row['verdict']}".rstrip())
    lines.append("")
    for row in rows:
        lines += [f"{row['name']}, {row['mode']}, {side}: {why}" for side, why in row["failures"].items()]
    return "\n".join([*lines, conclusion(rows, result["limit"])])


def status(rows: Sequence[dict[str, Any]]) -> int:
    """0: all rows pass, 1: one does not, 2: none was compared."""
    if not all(row["passed"] for row in rows):
        return 1
    return 0 if any(row["verdict"] != "new" for row in rows) else 2


def conclusion(rows: Sequence[dict[str, Any]], limit: float) -> str:
    """The last line of the table, which names what does not pass."""
    if status(rows) == 2:
        return "nothing was compared: the side before has none of the cases"
    bad = [row for row in rows if not row["passed"]]
    if bad:
        return f"NOT within {limit:.1%}: {_named(bad)}"
    unsure = [row for row in rows if "?" in row["verdict"]]
    return f"within {limit:.1%}" + (f", but more rounds have to tell: {_named(unsure)}" if unsure else "")


def _named(rows: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{row['name']} {row['mode']} ({row['verdict']})" for row in rows)


def _cell(said: dict[str, Any] | None, quantity: str) -> str:
    if said is None:
        return " " * 39
    _, size, form = COLUMNS[quantity]
    bounds = "" if None in (said["low"], said["high"]) else f"{said['low']:.3f}-{said['high']:.3f}"
    bounds = "" if quantity == PEAK else bounds
    return f"{said['before'] * size:10{form}}{said['after'] * size:10{form}}{said['ratio']:7.3f} {bounds:11}"
