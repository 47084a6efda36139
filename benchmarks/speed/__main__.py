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
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blurry_attn.files import write_whole

from .. import command_line, described, now, results_in, write_json
from . import report
from .cases import QUICK, SUITES, Case, Plan, Suite, one_call
from .meters import METERS, Meter
from .providers import PROVIDERS, Provider

ROOT = Path(__file__).parents[2]
MAX_ROUNDS = 200
SLOW = """\
On a GPU the groups of cases can be run one by one, and their results add up. Slow are: gsa and gated_delta, which tune
themselves (over at most 4 configurations a kernel) at the first call of each mode and head size; flex64 and flex512,
which compile for half a minute at each new length. Without these, "main" takes seconds, and "sweep" about a minute. gsa
and gated_delta need the packages flash-linear-attention, fla-core and einops."""

Row = dict[str, Any]


def inputs_for(case: Case, device: str) -> Callable[[Provider], tuple[Tensor, ...]]:
    """query, key, value and incoming gradient of a case, in the layout that a provider wants."""
    layouts: dict[bool, tuple[Tensor, ...]] = {False: case.inputs(device)}

    def inputs(provider: Provider) -> tuple[Tensor, ...]:
        if provider.tokens_first not in layouts:
            layouts[True] = tuple(x.transpose(1, 2).contiguous() for x in layouts[False])
        return layouts[provider.tokens_first]

    return inputs


def prepare(case: Case, providers: Sequence[str], meter: Meter, device: str) -> dict[tuple[str, str], Row]:
    """One row per provider and mode, warmed up: with its peak memory, or the reason why it has no result."""
    inputs = inputs_for(case, device)
    rows: dict[tuple[str, str], Row] = {}
    for name in providers:
        provider = PROVIDERS[name]
        print(f"  {name}", file=sys.stderr, flush=True)
        for mode in provider.modes:
            row: Row = {"provider": name, "label": provider.label.format(**asdict(case)), "mode": mode}
            row |= {"case": asdict(case), "date": now()}
            rows[name, mode] = row
            if reason := provider.skip(case):
                row["skipped"] = reason
                continue
            try:
                call = partial(one_call, provider.on(device, case), mode, *inputs(provider))
                call()
                row["peak_bytes"] = meter.peak_bytes(name, case, mode, call)
            except Exception as error:
                row["failed"] = described(error)
    return rows


def sample(case: Case, rows: dict[tuple[str, str], Row], suite: Suite, meter: Meter, device: str) -> None:
    """Adds samples to every row that can be run: all calls take turns, so that a busy moment falls on all alike."""
    inputs = inputs_for(case, device)
    calls = {}
    for (name, mode), row in rows.items():
        if "peak_bytes" in row and "failed" not in row:
            try:
                call = partial(one_call, PROVIDERS[name].on(device, case), mode, *inputs(PROVIDERS[name]))
                call()
                calls[name, mode] = call
            except Exception as error:
                row["failed"] = described(error)
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= suite.rounds and time.perf_counter() - start >= suite.seconds:
            break
        for key, call in calls.items():
            rows[key].setdefault("samples", []).append(meter.measure(call))


def summarise(row: Row, ceilings: dict[str, float]) -> None:
    """Turns a row's samples into medians, and sets them against the least that must be moved and what was computed."""
    samples = row.pop("samples", None)
    if not samples or "failed" in row:
        return
    case, provider, mode = Case(**row["case"]), PROVIDERS[row["provider"]], row["mode"]
    row |= {quantity: statistics.median(sample[quantity] for sample in samples) for quantity in samples[0]}
    times = [sample["seconds"] for sample in samples]
    row |= {"seconds_per_token": row["seconds"] / case.tokens}
    row |= {"seconds_min": min(times), "seconds_max": max(times), "calls": len(times)}
    if ceilings:
        fewest = provider.fewest_bytes(case, mode)
        floor = fewest / ceilings["copy_bytes_per_second"]
        row |= {"floor_seconds": floor, "times_floor": row["seconds"] / floor}
        row["bytes_per_second"] = fewest / row["seconds"]
        if flops := provider.flops(case, mode):
            row["flops_per_second"] = flops / row["seconds"]


def measure(plan: Plan, suite: Suite, meter: Meter, device: str, ceilings: dict[str, float]) -> list[Row]:
    """All rows of a plan. Its cases are gone through several times, so that they too can be compared."""
    table = []
    for case, providers in plan.items():
        print(f"{report.shape(case)}, T = {case.length}: warm-up and memory", file=sys.stderr, flush=True)
        table.append((case, prepare(case, providers, meter, device)))
    for sweep in range(suite.sweeps):
        for case, rows in table:
            print(f"T = {case.length}: time, {sweep + 1} of {suite.sweeps}", file=sys.stderr, flush=True)
            sample(case, rows, suite, meter, device)
    results = [row for _, rows in table for row in rows.values()]
    for row in results:
        summarise(row, ceilings)
    return results


def merge(old: dict[str, Any] | None, new: dict[str, Any], suite: Suite) -> dict[str, Any]:
    """The new result with the old one's other rows, in the suite's order; each row has its date."""
    rows = {_key(row): row for result in (old or {}, new) for row in result.get("rows", ())}
    ranks = {(name, case): i for i, (case, names) in enumerate(suite.plan().items()) for name in names}
    ordered = sorted(rows.items(), key=lambda item: ranks.get(item[0][:2], len(ranks)))
    merged = (old or {}) | new | {"rows": [row for _, row in ordered]}
    return merged | {"checks": report.checks(merged["rows"], suite.claims)}


def _key(row: Row) -> tuple[str, Case, str]:
    return row["provider"], Case(**row["case"]), row["mode"]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("blurry_attn", *(("flash-linear-attention", "triton") if torch.cuda.is_available() else ())):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _save(result: dict[str, Any], out: Path, device: str) -> str:
    """Writes JSON and plot; says what was written."""
    json_file, plot_file = out / f"{device}.json", out / f"{device}.png"
    write_json(json_file, result)
    try:
        write_whole(plot_file, report.plot(result).savefig)
    except ModuleNotFoundError as error:
        return f"wrote {json_file}; no plot: {error}"
    return f"wrote {json_file} and {plot_file}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        epilog=SLOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=sorted(METERS), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one tiny case: does everything run?")
    groups = "; ".join(f"{device}: {', '.join(suite.groups)}" for device, suite in SUITES.items())
    for option, help in (
        ("--cases", f"only these groups of cases ({groups})"),
        ("--providers", f"only these operators ({', '.join(PROVIDERS)})"),
    ):
        parser.add_argument(option, type=lambda text: text.split(","), metavar="A,B,..", help=help)
    parser.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], metavar="T,..", help="only these T"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for JSON and plot (default: beside the code)")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="*",
        metavar="JSON",
        help="measure nothing: add these results to those in FOLDER, then write plot and table again",
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    suite = (QUICK if args.quick else SUITES)[args.device]
    out = args.out or (ROOT / "build" / "benchmarks" if args.quick else Path(__file__).parent / "results")
    try:
        plan = suite.plan(args.cases, args.providers, args.lengths)
    except ValueError as error:
        parser.error(str(error))
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")

    json_file = out / f"{args.device}.json"
    with results_in(out, json_file.name, f"{args.device}.png", parser=parser):
        # A selection updates its own rows; everything at once starts afresh.
        keep = json_file.exists() and (args.merge is not None or plan != suite.plan())
        result: dict[str, Any] | None = json.loads(json_file.read_text()) if keep else None
        if args.merge is not None:
            for file in args.merge:
                result = merge(result, json.loads(file.read_text()), suite)
            if result is None:
                parser.error(f"--merge: there is no {json_file}, and no other result was given")
            result = merge(result, {}, suite)
            wrote = _save(result, out, args.device)
        else:
            if args.device == "cuda" and not torch.cuda.is_available():
                parser.error("--device cuda: no CUDA device is available")
            meter = METERS[args.device](args.threads)
            ceilings = meter.ceilings()
            # Where cases need not be compared by turns, each is written as soon as it is measured.
            parts = [plan] if suite.sweeps > 1 else [{case: names} for case, names in plan.items()]
            for part in parts:
                measured: dict[str, Any] = {
                    "command": command_line("speed", given),
                    "date": now(),
                    "hardware": meter.hardware(),
                    "versions": _versions(),
                    "time": f"{meter.time}; median of rounds in which all providers take turns, in {suite.sweeps} "
                    "sweeps over the lengths",
                    "memory": meter.memory,
                    "ceilings": ceilings,
                    "rows": measure(part, suite, meter, args.device, ceilings),
                }
                result = merge(result, measured, suite)
                wrote = _save(result, out, args.device)
    assert result is not None
    print(f"{wrote}\n\n{report.table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
