"""``python -m benchmarks.decode``: tokens per second and memory of the language model, by length of the history.

One model, random weights, twice: with blurry window attention and its state, and with full attention over a cache of
all keys and values, allocated beforehand so that nothing is ever moved. Histories are drawn, not read. Two ways to
decode: ``generate``, the loop of ``blurry-lm generate``, in which every token visits the host; and on CUDA ``graph``,
step and choice of the next token replayed as a CUDA graph, which the host does not slow down.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blurry_attn.files import write_whole

from .. import command_line, now, results_in, write_json
from ..speed.meters.cpu import cpu_model
from ..speed.meters.cuda import driver
from .measure import MIXERS, REPLAYS, SETUPS, make_model, measure_all, quick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"blurry": "#c2410c", "full": "#4338ca"}
WAYS = {"generate": "--", "graph": "-"}
MiB = 2**20


def heading(result: dict[str, Any]) -> str:
    setup, hardware = result["setup"], ", ".join(str(value) for value in result["hardware"].values())
    model = (
        f"{setup['layers']} layers, {len(setup['resolutions'])} heads of {setup['dim'] // len(setup['resolutions'])}"
    )
    return (
        f"{model}, {setup['slots']} slots, {result['parameters'] / 1e6:.1f} million parameters, {setup['dtype']}; "
        f"{hardware}; torch {result['versions']['torch']}; {result['date']}"
    )


def table(result: dict[str, Any]) -> str:
    """A line per batch and history: both mixers beside each other."""
    by_key = {(row["batch"], row["history"], row["mixer"]): row for row in result["rows"]}
    ways = [way for way in WAYS if any(way in row.get("seconds", {}) for row in result["rows"])]
    titles = "".join(f"{way + ' ms':>13}{'tokens/s':>10}" for way in ways) + f"{'state MiB':>11}{'peak MiB':>10}"
    lines = [heading(result), "", " " * 14 + "".join(f"{MIXERS[mixer]:>{len(titles)}}" for mixer in MIXERS)]
    lines.append(f"{'batch':>5}{'history':>9}" + titles * len(MIXERS))
    for batch, history in dict.fromkeys(key[:2] for key in by_key):
        line = f"{batch:>5}{history:>9}"
        for mixer in MIXERS:
            row = by_key[batch, history, mixer]
            for way in ways:
                seconds = row.get("seconds", {}).get(way)
                line += f"{seconds * 1e3:13.3f}{batch / seconds:10.0f}" if seconds else " " * 23
            peak = f"{row['peak_bytes'] / MiB:10.1f}" if "peak_bytes" in row else f"{row['skipped']:>14}"
            line += f"{row['state_bytes'] / MiB:11.1f}" + peak
        lines.append(line)
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> Figure:
    """Tokens per second of each batch, and bytes, against the history, log-log."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in result["rows"]})
    figure = Figure(figsize=(4.6 * (len(batches) + 1), 4.6), dpi=130, layout="constrained")
    *speeds, memory = figure.subplots(1, len(batches) + 1)
    for batch, axes in zip(batches, speeds, strict=True):
        axes.set_title(f"batch {batch}" if len(batches) > 1 else "speed", loc="left")
        axes.set_ylabel("tokens per second")
        for mixer, label in MIXERS.items():
            rows = [row for row in result["rows"] if (row["batch"], row["mixer"]) == (batch, mixer)]
            for way, style in WAYS.items():
                measured = [
                    (row["history"], batch / row["seconds"][way]) for row in rows if way in row.get("seconds", {})
                ]
                if measured:
                    line = style if len(rows[0]["seconds"]) > 1 else "-"
                    axes.plot(
                        *zip(*measured, strict=True), line, marker="o", color=COLOURS[mixer], label=f"{label}, {way}"
                    )
            sizes = [(row["history"], row["state_bytes"] / batch) for row in rows]
            if batch == batches[0]:
                memory.plot(*zip(*sizes, strict=True), "-", marker="o", color=COLOURS[mixer])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    memory.set_yscale("log")
    memory.set_title("memory", loc="left")
    memory.set_ylabel("bytes of state or cache per sequence")
    histories = sorted({row["history"] for row in result["rows"]})
    for axes in (*speeds, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(histories, [f"{n >> 10}k" if n >= 1024 else str(n) for n in histories])
        axes.set_xlabel("tokens of history")
        axes.grid(True, which="major", color="#d6d3d1", lw=0.7)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*speeds[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    figure.supxlabel(heading(result), fontsize=8, color="#57534e")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(SETUPS), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short histories: does everything run?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for JSON and plot (default: beside the code)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    setup = quick(SETUPS[args.device]) if args.quick else SETUPS[args.device]
    folder = Path(__file__).parent / "results"
    out = args.out or (Path(__file__).parents[2] / "build" / "benchmarks" / "decode" if args.quick else folder)
    if args.device == "cuda":
        hardware = {"gpu": torch.cuda.get_device_name(), "driver": f"driver {driver()}"}
    else:
        cores = len(os.sched_getaffinity(0))
        hardware = {"cpu": cpu_model(), "cores": f"{cores} cores", "threads": f"{args.threads} threads"}
    names = f"{args.device}.json", f"{args.device}.png"
    with results_in(out, *names, parser=parser):
        result = {
            "command": command_line("decode", given),
            "date": now(),
            "hardware": hardware,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "blurry_attn": metadata.version("blurry_attn"),
            },
            "setup": asdict(setup),
            "parameters": sum(p.numel() for p in make_model("blurry", setup, "meta").parameters()),
            "time": "median over steps; generate: wall clock of a step with its token's way to the host and back; "
            f"graph: wall clock of {REPLAYS} replays and a synchronisation, by {REPLAYS}, at a fixed position of "
            "the cache",
            "memory": "most memory in use while decoding beyond the weights, state or cache included; "
            + ("torch.cuda.max_memory_allocated" if args.device == "cuda" else "peak resident, in a fresh process"),
            "rows": measure_all(args.device, args.threads, setup),
        }
        write_json(out / names[0], result)
        write_whole(out / names[1], plot(result).savefig)
    print(f"wrote {out}/{args.device}.json and .png\n\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
