"""Blurry window attention: of whole sequences, of many in one row, of tokens after a state, one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cases import FORWARD, Attend, Case
from . import provider

if TYPE_CHECKING:
    from blurry_attn import BlurryState, BlurryWindow

PYRAMID = (1, 1, 2, 2, 4, 4, 8, 8)
PACKED = 128
POSITION = 100_000  # every slot is open
STEPS = 4


def _slots(case: Case) -> float:
    return case.slots


@provider("blurry", "blurry window, {slots} slots, r = {resolution}", keys=_slots)
@provider("fejer", "blurry window, {slots} slots, r = {resolution}", keys=_slots)
def fejer(case: Case) -> Attend:
    return _uniform(case, "fejer")


@provider("dirichlet", "blurry window, kernel dirichlet", keys=_slots)
def dirichlet(case: Case) -> Attend:
    return _uniform(case, "dirichlet")


@provider("pyramid", "blurry window, pyramid of r = 1 to 8", keys=_slots)
def pyramid(case: Case) -> Attend:
    from blurry_attn import BlurryWindow

    return _attend(BlurryWindow.pyramid(case.slots, tuple(islice(cycle(PYRAMID), case.heads))))


@provider("packed", f"blurry window, sequences of {PACKED} tokens in one row", keys=_slots)
def packed(case: Case) -> Attend:
    ends = torch.arange(0, case.length + 1, PACKED, dtype=torch.int32)
    return _attend(uniform_window(case), cu_seqlens=ends)


@provider("unsound", "blurry window, a NaN in one sequence", modes=(FORWARD,))
def unsound(case: Case) -> Attend:
    attend = _uniform(case, "fejer")

    def attend_to_nan(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key[0, 0, 0] = torch.nan
        return attend(query, key, value)

    return attend_to_nan


@provider("chunk", "blurry window, {length} tokens after a state, {slots} slots")
def chunk(case: Case) -> Attend:
    attend = _attend(uniform_window(case), state=drawn_state(case), return_state=True)
    return lambda query, key, value: attend(query, key, value)[0]


def _steps(case: Case, kernel: str = "fejer", dtype: torch.dtype = torch.float32) -> Attend:
    from blurry_attn import blurry_window_step

    state = drawn_state(case, kernel).to(dtype=dtype)
    step = partial(blurry_window_step, state=state, enable_gqa=True)

    def steps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(STEPS - 1):
            step(query, key, value)
        return step(query, key, value)

    return steps


for _name, _label, _options in (
    ("steps", "{slots} slots", {}),
    ("steps_dirichlet", "kernel dirichlet", {"kernel": "dirichlet"}),
    ("steps_bfloat16", "a state of {slots} slots in bfloat16", {"dtype": torch.bfloat16}),
):
    provider(_name, f"{STEPS} steps of a blurry window, {_label}", modes=(FORWARD,))(partial(_steps, **_options))


@provider("rotary", "rotary embedding of the query", modes=(FORWARD,))
def rotary(case: Case) -> Attend:
    from blurry_attn.ops import rotary

    positions = torch.arange(case.length)
    return lambda query, key, value: rotary(query, positions, 10_000.0)


def uniform_window(case: Case, kernel: str = "fejer") -> BlurryWindow:
    from blurry_attn import BlurryWindow

    return BlurryWindow(case.slots, case.slots * case.resolution, kernel=kernel)


def drawn_state(case: Case, kernel: str = "fejer") -> BlurryState:
    """A state of drawn slots, all open, in which no two sequences are at one position."""
    from blurry_attn import BlurryState

    key, value = torch.randn(2, case.batch, case.kv_heads or case.heads, case.slots, case.head_dim)
    return BlurryState(key, value, torch.arange(POSITION, POSITION + case.batch), uniform_window(case, kernel))


def _uniform(case: Case, kernel: str) -> Attend:
    return _attend(uniform_window(case, kernel))


def _attend(window: BlurryWindow, **options: object) -> Callable[..., Any]:
    from blurry_attn import blurry_window_attention

    return partial(blurry_window_attention, window=window, enable_gqa=True, **options)
