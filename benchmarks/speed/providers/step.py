"""Decoding, one token per sequence, replayed from a CUDA graph: a state of slots against a cache of keys and values."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import FORWARD, Attend, Case
from . import provider
from .blurry import drawn_state


def graphed(step: Attend) -> Attend:
    """Captures ``step`` at the first call, and replays it from then on: every call must bring the same tensors."""
    graph = torch.cuda.CUDAGraph()
    captured: list[Tensor] = []

    def replay(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not captured:
            step(query, key, value)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                captured.append(step(query, key, value))
        graph.replay()
        return captured[0]

    return replay


def _state_bytes(case: Case, mode: str) -> int:
    """The state, in float32, is read once."""
    return 2 * 4 * case.batch * case.heads * case.slots * case.head_dim


def _cache_bytes(length: int, case: Case, mode: str) -> int:
    return 2 * case.torch_dtype.itemsize * case.batch * case.heads * length * case.head_dim


@provider("step", "blurry window step, {slots} slots", fewest_bytes=_state_bytes, modes=(FORWARD,))
def step(case: Case) -> Attend:
    from blurry_attn import blurry_window_step

    return graphed(partial(blurry_window_step, state=drawn_state(case)))


def _attend_to_cache(length: int, case: Case) -> Attend:
    shape = (case.batch, case.heads, length, case.head_dim)
    keys, values = (torch.randn(shape, dtype=case.torch_dtype) for _ in range(2))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, keys, values)

    return graphed(attend)


for _length in (64, 8192):
    provider(
        f"cache{_length}",
        f"attention over a cache of {_length} (SDPA)",
        fewest_bytes=partial(_cache_bytes, _length),
        modes=(FORWARD,),
    )(partial(_attend_to_cache, _length))
