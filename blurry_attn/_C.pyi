from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

class BuildInfo(TypedDict):
    torch: str
    cuda: str | None
    compiler: str

def check_is_writable(written: list[tuple[str, Tensor]], read: list[tuple[str, Tensor]]) -> None: ...
def gates(
    kernel: str, slots: int, window: int, phase: int, sharpness: float, start: int, length: int
) -> NDArray[np.float64]: ...
def openings(slots: int, window: int, phase: int) -> list[int]: ...
def build_info() -> BuildInfo: ...
