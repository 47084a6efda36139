"""``python -m benchmarks.speed``: measures, writes JSON and a plot, prints a table."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import report
from .cases import MODES, QUICK, SUITES, Case, Suite, one_call
from .meters import METERS, Meter
from .providers import PROVIDERS

ROOT = Path(__file__).parents[2]
MAX_ROUNDS = 200


Row = dict[str, Any]


def prepare(case: Case, suite: Suite, meter: Meter, device: str) -> dict[tuple[str, str], Row]:
    """One row per provider and mode, warmed up: with its peak memory, or the reason why it has no result."""
    inputs = case.inputs(device)
    rows: dict[tuple[str, str], Row] = {}
    for name in suite.providers:
        provider = PROVIDERS[name]
        for mode in MODES:
            row: Row = {"provider": name, "label": provider.label.format(**asdict(case)), "mode": mode}
            row["case"] = asdict(case)
            rows[name, mode] = row
            if reason := provider.skip(case):
                row["skipped"] = reason
                continue
            try:
                one_call(provider.prepare(case), mode, *inputs)
                row["peak_bytes"] = meter.peak_bytes(name, case, mode)
            except Exception as error:
                row["failed"] = _reason(error)
    return rows


def sample(case: Case, rows: dict[tuple[str, str], Row], suite: Suite, meter: Meter, device: str) -> None:
    """Adds times to every row that can be run: all calls take turns, so that a busy moment falls on all alike."""
    inputs = case.inputs(device)
    calls = {}
    for (name, mode), row in rows.items():
        if "peak_bytes" in row:
            calls[name, mode] = partial(one_call, PROVIDERS[name].prepare(case), mode, *inputs)
            calls[name, mode]()
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= suite.rounds and time.perf_counter() - start >= suite.seconds:
            break
        for key, call in calls.items():
            rows[key].setdefault("times", []).append(meter.seconds(call))


def measure(suite: Suite, meter: Meter, device: str) -> list[Row]:
    """All rows of a suite. Its lengths are gone through several times, so that they too can be compared."""
    table = []
    for case in suite.cases:
        print(f"T = {case.length}: warm-up and memory", file=sys.stderr, flush=True)
        table.append((case, prepare(case, suite, meter, device)))
    for sweep in range(suite.sweeps):
        for case, rows in table:
            print(f"T = {case.length}: time, {sweep + 1} of {suite.sweeps}", file=sys.stderr, flush=True)
            sample(case, rows, suite, meter, device)
    for case, rows in table:
        for row in rows.values():
            if times := row.pop("times", None):
                median = statistics.median(times)
                row |= {"seconds": median, "seconds_per_token": median / case.tokens}
                row |= {"seconds_min": min(times), "seconds_max": max(times), "calls": len(times)}
    return [row for _, rows in table for row in rows.values()]


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["blurry_attn"] = metadata.version("blurry_attn")
    except metadata.PackageNotFoundError:
        versions["blurry_attn"] = "not installed"
    return versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--device", choices=sorted(METERS), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one tiny case: does everything run?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for JSON and plot (default: beside the code)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    suite = (QUICK if args.quick else SUITES)[args.device]
    out = args.out or (ROOT / "build" / "benchmarks" if args.quick else Path(__file__).parent / "results")
    out.mkdir(parents=True, exist_ok=True)

    meter = METERS[args.device](args.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.speed", *given]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": meter.hardware(),
        "versions": _versions(),
        "time": f"median of rounds in which all providers take turns, in {suite.sweeps} sweeps over the lengths",
        "memory": meter.memory,
        "rows": measure(suite, meter, args.device),
    }
    result["checks"] = report.checks(result["rows"], suite.checks)
    json_file = out / f"{args.device}.json"
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    plot_file = out / f"{args.device}.png"
    report.plot(result).savefig(plot_file)
    print(f"wrote {json_file} and {plot_file}\n\n{report.table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
