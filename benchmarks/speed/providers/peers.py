"""What a PyTorch user has without this package."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import Attend, Case
from . import provider

FULL_ATTENTION_MAX = 16384


def _too_long(case: Case) -> str | None:
    return f"not run beyond T = {FULL_ATTENTION_MAX}" if case.length > FULL_ATTENTION_MAX else None


@provider("sdpa", "full causal attention (SDPA)", skip=_too_long)
def sdpa(case: Case) -> Attend:
    return partial(functional.scaled_dot_product_attention, is_causal=True)


@provider("local", "sliding window of {slots} (blocks, PyTorch ops)")
def local(case: Case) -> Attend:
    """Sliding window attention over the newest ``slots`` tokens, the query's own included.

    Queries in blocks of ``slots`` meet the keys of their own block and of the one before, under a band mask. Of several
    ways to write it (mask by ``masked_fill``, ``baddbmm``, SDPA over blocks) this one was the fastest on a CPU.
    """
    size = case.slots
    if case.length % size:
        raise ValueError(f"length must be a multiple of {size}, got {case.length}")
    row, column = torch.arange(size).unsqueeze(1), torch.arange(2 * size)
    outside = (column <= row) | (column > row + size)
    band = torch.zeros(size, 2 * size, dtype=getattr(torch, case.dtype)).masked_fill_(outside, float("-inf"))

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, size))

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((functional.pad(blocks(x)[:, :, :-1], (0, 0, 0, 0, 1, 0)), blocks(x)), dim=3)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = blocks(query) * query.shape[-1] ** -0.5 @ with_previous(key).transpose(-1, -2)
        logits.add_(band.to(logits.device))
        logits[:, :, 0, :, :size] = float("-inf")
        return (torch.softmax(logits, dim=-1) @ with_previous(value)).flatten(2, 3)

    return attend
