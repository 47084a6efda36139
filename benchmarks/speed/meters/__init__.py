"""How a device measures: what the hardware is, how long a call takes, how much memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..cases import Case
from .cpu import CpuMeter


class Meter(Protocol):
    """One device."""

    memory: str
    """How ``peak_bytes`` measures, in a sentence."""

    def hardware(self) -> dict[str, object]:
        """What the figures were measured on."""

    def seconds(self, call: Callable[[], None]) -> float:
        """The duration of one call."""

    def peak_bytes(self, provider: str, case: Case, mode: str) -> int:
        """The most memory in use during a call beyond the inputs and the incoming gradient."""


METERS: dict[str, Callable[[int], Meter]] = {"cpu": CpuMeter}
"""By device: makes a meter for so many CPU threads."""
