"""``torchrun --nproc-per-node 4 -m benchmarks.context``: counts what a rank sends for one layer of context parallel.

Beside it stands what ring attention has to send in 16 bits: its piece's keys and values to each of the other ranks, and
backward again with their gradients. The result file keeps a list for each number of ranks.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blurry_attn import BlurryWindow
from blurry_attn.distributed import context_parallel_attention

from .. import results_in, write_json

HEADS, DIM, SLOTS, WINDOW = 16, 64, 64, 512
LENGTHS = (8192, 65536, 524288)


def counted(tokens: int) -> tuple[int, int]:
    """Bytes that this rank sends forward, and forward and backward, of a sequence of so many tokens."""
    sent, gather, others = 0, dist.all_gather, dist.get_world_size() - 1

    def counting(gathered: list[Tensor], x: Tensor, group: dist.ProcessGroup | None = None) -> None:
        nonlocal sent
        sent += x.nbytes * others
        gather(gathered, x, group)

    piece = tokens // dist.get_world_size()
    inputs = torch.randn(3, 1, HEADS, piece, DIM, dtype=torch.bfloat16, requires_grad=True).unbind()
    dist.all_gather = counting
    try:
        out = context_parallel_attention(*inputs, BlurryWindow(SLOTS, WINDOW), start=piece * dist.get_rank())
        forward = sent
        out.sum().backward()
    finally:
        dist.all_gather = gather
    return forward, sent


def measure(tokens: int) -> dict[str, Any]:
    """Bytes that a rank sends: ``[forward, forward and backward]``."""
    ranks = dist.get_world_size()
    ring = (ranks - 1) * tokens // ranks * HEADS * 2 * DIM * 2
    return {"tokens": tokens, "blurry": counted(tokens), "ring": (ring, 3 * ring)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["  tokens  blurry: forward, with backward    ring: forward, with backward   (KiB)"]
    for row in rows:
        sizes = [size >> 10 for size in (*row["blurry"], *row["ring"])]
        lines.append(
            f"{row['tokens']:8}"
            + "".join(f"{size:{width},}" for size, width in zip(sizes, (17, 15, 17, 15), strict=True))
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path(__file__).parent / "results")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    file, first = args.out / "context.json", dist.get_rank() == 0
    with results_in(args.out, file.name, parser=parser) if first else nullcontext():
        rows = [measure(tokens) for tokens in LENGTHS]
        if first:
            results = json.loads(file.read_text()) if file.exists() else {}
            write_json(file, dict(sorted((results | {str(dist.get_world_size()): rows}).items())))
            print(table(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
