"""``torchrun --nproc-per-node 4 -m benchmarks.context``: counts what a rank sends for one layer of context parallel.

Beside it stands what ring attention has to send in 16 bits: its piece's keys and values to each of the other ranks, and
backward again with their gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from blurry_attn import BlurryWindow
from blurry_attn.distributed import context_parallel_attention

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


def main() -> None:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    lines = ["  tokens  blurry: forward, with backward    ring: forward, with backward   (KiB)"]
    for tokens in LENGTHS:
        forward, both = counted(tokens)
        ring = (ranks - 1) * tokens // ranks * HEADS * 2 * DIM * 2
        lines.append(f"{tokens:8}{forward >> 10:17,}{both >> 10:15,}{ring >> 10:17,}{3 * ring >> 10:15,}")
    if dist.get_rank() == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
