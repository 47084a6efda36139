"""``python -m benchmarks.drift``: the error that a state in bfloat16 would make, along 100,000 tokens.

The law in plain PyTorch, on bfloat16 keys and values that are partly constant, in states side by side: float64, the
truth; float32, as the package has it; bfloat16 but for the slots in flux, which stand in float32 rows beside it;
bfloat16, rounded at every token; and float32 that is kept in bfloat16 between the turns of a conversation. Outputs are
computed in float64 from each, so that the state alone errs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blurry_attn import BlurryWindow
from blurry_attn.reference import gates

from .. import command_line, results_in, write_json
from ..speed.meters.cpu import cpu_model

TURN = 128
STATES = ("float32", "bfloat16, slots in flux in float32", "bfloat16", f"bfloat16 between turns of {TURN}")
RESOLUTIONS = (1, 2, 8, 32)
SLOTS, DIM, BLOCK = 64, 16, 256
MARKS = (1_000, 10_000, 100_000)


def shares(window: BlurryWindow, heads: int) -> list[Tensor]:
    """Of each head the gates (2P, N) of two laps, the first with its openings and 0 where a slot is shut."""
    laps = zip(window.windows(heads), window.phases(heads), strict=True)
    return [gates(window, period, phase, 0, 2 * period).nan_to_num(0) for period, phase in laps]


def share_at(tables: list[Tensor], t: int) -> Tensor:
    """(H, N): of token ``t``."""
    return torch.stack([laps[t if t < len(laps) else t % (len(laps) // 2) + len(laps) // 2] for laps in tables])


def write(slots: Tensor, token: Tensor, share: Tensor) -> Tensor:
    """slots (..., H, N, E), token (H, E), share (H, N)."""
    share, token = share.unsqueeze(-1).to(slots.dtype), token.unsqueeze(-2).to(slots.dtype)
    return torch.where(share == 1, token, slots + share * (token - slots))


def attend(slots: Tensor, query: Tensor) -> Tensor:
    """slots (..., H, N, 2 D), query (H, D) -> (..., H, D), in float64."""
    key, value = slots.double().chunk(2, -1)
    weights = torch.softmax((key @ query.unsqueeze(-1)).squeeze(-1) / DIM**0.5, -1)
    return (weights.unsqueeze(-2) @ value).squeeze(-2)


def measure(marks: Sequence[int], window: BlurryWindow, heads: int) -> list[dict[str, Any]]:
    """Of every state and head, the relative RMS error over the block of tokens that ends at each mark."""
    generator = torch.Generator().manual_seed(0)
    tables = shares(window, heads)
    constant = torch.randn(heads, 2 * DIM, generator=generator)
    exact = torch.zeros(heads, window.slots, 2 * DIM, dtype=torch.float64)
    held = torch.zeros(len(STATES), *exact.shape)
    errors = torch.zeros(len(STATES), heads)
    norms, rounding, rows = torch.zeros(heads), torch.zeros(heads), []

    share = share_at(tables, 0)
    for t in range(max(marks)):
        later = share_at(tables, t + 1)
        token = (constant + torch.randn(heads, 2 * DIM, generator=generator)).bfloat16()
        exact, held = write(exact, token, share), write(held, token, share)
        comes_to_rest = ((share != 0) & (later == 0)).unsqueeze(-1)
        held[1] = torch.where(comes_to_rest, held[1].bfloat16().float(), held[1])
        held[2] = held[2].bfloat16()
        if t % TURN == TURN - 1:
            held[3] = held[3].bfloat16()
        share = later
        mark = next(mark for mark in marks if t < mark)
        if t >= mark - BLOCK:
            query = torch.randn(heads, DIM, dtype=torch.float64, generator=generator)
            expected, found = attend(exact, query), attend(held, query)
            errors += (found - expected).square().sum(-1)
            norms += expected.square().sum(-1)
            rounding += (expected.bfloat16() - expected).square().sum(-1)
        if t == mark - 1:
            for name, error in zip((*STATES, "output in bfloat16"), (*errors, rounding), strict=True):
                rows.append({"state": name, "tokens": mark, "errors": (error / norms).sqrt().tolist()})
            for total in (errors, norms, rounding):
                total.zero_()
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'relative RMS error of the output':38}{'tokens':>8}" + "".join(f"{f'r = {r}':>10}" for r in RESOLUTIONS)
    ]
    for row in sorted(result["rows"], key=lambda row: (*STATES, row["state"]).index(row["state"])):
        lines.append(f"{row['state']:38}{row['tokens']:>8}" + "".join(f"{error:10.1e}" for error in row["errors"]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a thousand tokens")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path(__file__).parent / "results")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    window = BlurryWindow.pyramid(SLOTS, RESOLUTIONS)
    with results_in(args.out, "drift.json", parser=parser):
        rows = measure(MARKS[:1] if args.quick else MARKS, window, len(RESOLUTIONS))
        result = {
            "command": command_line("drift", given),
            "date": date.today().isoformat(),
            "hardware": cpu_model(),
            "torch": torch.__version__,
            "window": repr(window),
            "rows": rows,
        }
        write_json(args.out / "drift.json", result)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
