"""``python -m benchmarks.training``: tokens per second of whole training steps of a language model, by attention.

One model of 99 million parameters (14 layers, 12 heads of 64) and the trainer's own step: forward, cross-entropy,
backward, clipping, AdamW. Only the function from query, key and value to the output differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from blurry_attn.lm.model import LanguageModel

from .. import command_line, now, results_in, write_json
from ..speed.cases import Case
from ..speed.meters.cuda import driver
from ..speed.report import check_lines, checks
from ..sweep.results import hardware, versions
from .measure import QUICK, WHOLE, Setup, measure

# Title, width, field, factor and format.
COLUMNS = (
    ("ms", 10, "seconds", 1e3, ".2f"),
    ("min", 10, "seconds_min", 1e3, ".2f"),
    ("max", 10, "seconds_max", 1e3, ".2f"),
    ("tokens/s", 11, "tokens_per_second", 1, ".0f"),
    ("x full", 8, "times_full", 1, ".2f"),
    ("peak GiB", 10, "peak_bytes", 2**-30, ".2f"),
)


def heading(result: dict[str, Any]) -> str:
    setup = result["setup"]
    case = Case(**setup["case"])
    model = f"{setup['layers']} layers, {case.heads} heads of {case.head_dim}, {result['parameters'] / 1e6:.1f} million"
    how = ", torch.compile" if setup["compiled"] else ""
    return (
        f"{model} parameters; {case.batch} x {case.length} bytes, {case.dtype}{how}; {result['hardware']}; "
        f"torch {result['versions']['torch']}; {result['date']}"
    )


def table(result: dict[str, Any]) -> str:
    """A line per mixer, with its times or the reason why it has none; then the checks."""
    rows = result["rows"]
    width = max(len(row["label"]) for row in rows)
    lines = [heading(result), "", " " * width + "".join(f"{title:>{size}}" for title, size, *_ in COLUMNS)]
    for row in rows:
        reasons = "".join(f"  {key}: {row[key]}" for key in ("skipped", "failed") if key in row)
        cells = "".join(
            f"{row[field] * factor:{size}{form}}" if field in row else " " * size
            for _, size, field, factor, form in COLUMNS
        )
        lines.append(f"{row['label']:{width}}{reasons or cells}".rstrip())
    return "\n".join([*lines, "", *check_lines(result["checks"])]).rstrip()


def chosen(args: argparse.Namespace) -> Setup:
    """The setup that the command line asks for."""
    setup = QUICK if args.quick else WHOLE
    case = replace(
        setup.case,
        batch=args.batch or setup.case.batch,
        length=args.context or setup.case.length,
        dtype="bfloat16" if args.device == "cuda" else "float32",
    )
    return replace(setup, case=case, steps=args.steps or setup.steps, compiled=args.compile)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batch", type=int, help=f"sequences per step ({WHOLE.case.batch})")
    parser.add_argument("--context", type=int, help=f"bytes per sequence ({WHOLE.case.length})")
    parser.add_argument("--steps", type=int, help=f"that are timed, of each attention ({WHOLE.steps})")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model, with every attention")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does everything run?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the JSON (default: beside the code)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    for name in ("batch", "context", "steps"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    setup, device = chosen(args), torch.device(args.device)
    root = Path(__file__).parents[2]
    out = args.out or (root / "build" / "benchmarks" / "training" if args.quick else Path(__file__).parent / "results")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LanguageModel(setup.model).parameters())
    file = out / f"{args.device}{'_compiled' if args.compile else ''}.json"
    with results_in(out, file.name, parser=parser):
        rows = measure(setup, device)
        on_gpu = {"cudnn": torch.backends.cudnn.version(), "driver": driver()} if args.device == "cuda" else {}
        result = {
            "command": command_line("training", given),
            "date": now(),
            "hardware": hardware(device),
            "versions": versions() | on_gpu,
            "setup": asdict(setup),
            "parameters": parameters,
            "time": "wall clock of a step and a synchronisation; median of steps in which all attentions take turns",
            "memory": "torch.cuda.max_memory_allocated during a step, weights and the optimizer's moments included",
            "rows": rows,
            "checks": checks(rows, setup.claims if setup.case.length == WHOLE.case.length else ()),
        }
        write_json(file, result)
    print(f"wrote {file}\n\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
