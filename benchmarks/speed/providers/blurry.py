"""Blurry window attention."""

from __future__ import annotations

from functools import partial

from ..cases import Attend, Case
from . import provider


@provider("blurry", "blurry window, {slots} slots, r = {resolution}")
def blurry(case: Case) -> Attend:
    from blurry_attn import BlurryWindow, blurry_window_attention

    return partial(blurry_window_attention, window=BlurryWindow(case.slots, case.slots * case.resolution))
