"""How a device measures: what the hardware is, how long a call takes, how much memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..cases import Case
from .cpu import CpuMeter
from .cuda import CudaMeter


class Meter(Protocol):
    """One device."""

    time: str
    """How ``measure`` takes time, in a few words."""
    memory: str
    """How ``peak_bytes`` measures, in a sentence."""

    def hardware(self) -> dict[str, object]:
        """What the figures were measured on."""

    def ceilings(self) -> dict[str, float]:
        """The device's measured ``copy_bytes_per_second`` (read and written) and ``product_flops_per_second``, if they
        are measured."""

    def measure(self, call: Callable[[], None]) -> dict[str, float]:
        """One call's duration, ``seconds``, and where calls return early ``host_seconds``, what the caller spent."""

    def allocated(self, call: Callable[[], None]) -> int:
        """The most bytes that PyTorch's allocator gave out during a warm call, beyond those before it."""

    def peak_bytes(self, provider: str, case: Case, mode: str, call: Callable[[], None]) -> int:
        """The most memory in use during a call beyond the inputs and the incoming gradient; ``call`` is that call,
        ready and warmed up in this process."""


METERS: dict[str, Callable[[int], Meter]] = {"cpu": CpuMeter, "cuda": CudaMeter}
"""By device: makes a meter for so many CPU threads."""
