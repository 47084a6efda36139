"""``python -m benchmarks.speed``: measures, writes JSON and a plot, prints a table."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
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


def measure(case: Case, suite: Suite, meter: Meter, device: str) -> list[dict[str, Any]]:
    """One row per provider and mode, with seconds and peak bytes, or the reason why there are none.

    All calls of a case take turns, one each per round, so that a busy moment of the machine falls on all alike.
    """
    inputs = case.inputs(device)
    rows: list[dict[str, Any]] = []
    calls: dict[int, Callable[[], None]] = {}
    for name in suite.providers:
        provider = PROVIDERS[name]
        for mode in MODES:
            row: dict[str, Any] = {"provider": name, "label": provider.label.format(**asdict(case)), "mode": mode}
            row["case"] = asdict(case)
            rows.append(row)
            if reason := provider.skip(case):
                row["skipped"] = reason
                continue
            try:
                attend = provider.prepare(case)

                def call(attend=attend, mode=mode) -> None:
                    one_call(attend, mode, *inputs)

                for _ in range(2):
                    meter.seconds(call)
                row["peak_bytes"] = meter.peak_bytes(name, case, mode)
                calls[len(rows) - 1] = call
            except Exception as error:
                row["failed"] = _reason(error)
    samples: dict[int, list[float]] = {index: [] for index in calls}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= suite.rounds and time.perf_counter() - start >= suite.seconds:
            break
        for index, call in calls.items():
            samples[index].append(meter.seconds(call))
    for index, times in samples.items():
        median = statistics.median(times)
        rows[index] |= {
            "seconds": median,
            "seconds_per_token": median / case.tokens,
            "seconds_min": min(times),
            "seconds_max": max(times),
            "rounds": len(times),
        }
    return rows


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
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the JSON and the plot (default: beside the code)"
    )
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
        "time": "median over rounds in which all providers take turns, after two warm-up calls each",
        "memory": meter.memory,
        "rows": [],
    }
    for case in suite.cases:
        print(f"T = {case.length} ...", file=sys.stderr, flush=True)
        result["rows"] += measure(case, suite, meter, args.device)
    result["checks"] = report.checks(result["rows"], suite.checks)
    json_file = out / f"{args.device}.json"
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    plot_file = out / f"{args.device}.png"
    report.plot(result).savefig(plot_file)
    print(f"wrote {json_file} and {plot_file}\n\n{report.table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
