"""Blurry window attention."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..cases import Attend, Case
from . import provider


@provider("blurry", "blurry window, {slots} slots, r = {resolution}")
def blurry(case: Case) -> Attend:
    from blurry_attn import BlurryWindow, blurry_window_attention

    window = BlurryWindow(case.slots, case.slots * case.resolution)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cast(Tensor, blurry_window_attention(query, key, value, window))

    return attend
