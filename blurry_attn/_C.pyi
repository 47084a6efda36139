from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

class BuildInfo(TypedDict):
    torch: str
    cuda: str | None
    compiler: str

def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: int,
    window: list[int],
    phase: list[int],
    kernel: str,
    sharpness: float,
    scale: float,
    cu_seqlens: Tensor | None,
    state_key: Tensor | None,
    state_value: Tensor | None,
    position: Tensor | None,
    return_state: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state_key: Tensor,
    state_value: Tensor,
    position: Tensor,
    slots: int,
    window: list[int],
    phase: list[int],
    kernel: str,
    sharpness: float,
    scale: float,
    /,
) -> Tensor: ...
def rotary(x: Tensor, positions: Tensor, base: float, /) -> Tensor: ...
def check_is_writable(written: list[tuple[str, Tensor]], read: list[tuple[str, Tensor]]) -> None: ...
def gates(
    kernel: str, slots: int, window: int, phase: int, sharpness: float, start: int, length: int
) -> NDArray[np.float64]: ...
def openings(slots: int, window: int, phase: int) -> list[int]: ...
def build_info() -> BuildInfo: ...
