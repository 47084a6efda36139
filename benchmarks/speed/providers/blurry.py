"""Blurry window attention."""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, cast

from ..cases import Attend, Case
from . import provider

if TYPE_CHECKING:
    from blurry_attn import BlurryWindow

PYRAMID = (1, 1, 2, 2, 4, 4, 8, 8)


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


def _uniform(case: Case, kernel: str) -> Attend:
    from blurry_attn import BlurryWindow

    return _attend(BlurryWindow(case.slots, case.slots * case.resolution, kernel=kernel))


def _attend(window: BlurryWindow) -> Attend:
    from blurry_attn import blurry_window_attention

    return cast(Attend, partial(blurry_window_attention, window=window))
