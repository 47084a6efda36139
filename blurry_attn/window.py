"""The specification of a blurry window: how many slots, how long a history, blurred by which law."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import geometry

KERNELS = ("fejer", "dirichlet")
DEFAULT_SHARPNESS = 6.0
# These resolutions read text best of those that docs/results/text.md compares at equal state.
PYRAMID = (1, 1, 4, 8)


def integer(name: str, value: object) -> int:
    """``value`` as an int, if it is one number and no bool; else a TypeError that names it."""
    try:
        # An array of one number has an index, and is no number.
        if not isinstance(value, bool) and getattr(value, "ndim", 0) == 0:
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{name} must be an int, got {value!r}")


def _per_head(name: str, value: object) -> int | tuple[int, ...]:
    """An int, or a non-empty tuple of ints (any sequence is taken)."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        if not value:
            raise ValueError(f"{name} must be an int or a non-empty tuple of ints, got an empty one")
        return tuple(integer(f"{name}[{i}]", entry) for i, entry in enumerate(value))
    return integer(name, value)


@dataclass(frozen=True)
class BlurryWindow:
    """N slots that hold a blurred history of P tokens, for every key/value head.

    With one token per slot (``window == slots``) this is a sliding window of ``slots`` tokens; with
    ``r = window // slots`` tokens per slot the same state reaches r times as far, r times as blurred.

    Args:
        slots: N, slots per key/value head; 2 to 2^20.
        window: P in tokens, a multiple of ``slots``, P/N <= 2^20; an int for all heads, or a tuple with one entry per
            kv head.
        kernel: ``"fejer"`` (at most two slots take a token) or ``"dirichlet"`` (all do; P/N <= 32).
        sharpness: of the fejer gate, finite and >= 1; 6 when None. Must be None for ``"dirichlet"``.
        phase: where the slots' centres lie, in tokens, 0 <= phase < P/N: None staggers the heads that share a
            window evenly, an int places all heads alike, a tuple has one entry per kv head.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range; the message names it.
    """

    slots: int
    window: int | tuple[int, ...]
    kernel: str = "fejer"
    sharpness: float | None = None
    phase: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "slots", integer("slots", self.slots))
        geometry.check_slots(self.slots)
        set_field(self, "window", _per_head("window", self.window))
        for window in self._entries(self.window):
            geometry.check_window(window, self.slots)
        if not isinstance(self.kernel, str) or self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {KERNELS}, got {self.kernel!r}")
        if self.kernel == "dirichlet":
            if self.sharpness is not None:
                raise ValueError(f"sharpness must be None with kernel='dirichlet', got {self.sharpness!r}")
            for window in self._entries(self.window):
                geometry.check_dirichlet_window(window, self.slots)
        elif self.sharpness is not None:
            if isinstance(self.sharpness, bool) or not isinstance(self.sharpness, (int, float)):
                raise TypeError(f"sharpness must be a float or None, got {self.sharpness!r}")
            if not 1 <= self.sharpness <= sys.float_info.max:
                raise ValueError(f"sharpness must be finite and at least 1, got {self.sharpness!r}")
            set_field(self, "sharpness", float(self.sharpness))
        if self.phase is not None:
            set_field(self, "phase", _per_head("phase", self.phase))
            self._check_phases()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlurryWindow):
            return NotImplemented
        # Fields are compared one by one, as torch.compile cannot compare tuples that hold symbolic sizes.
        return (
            self.slots == other.slots
            and self.window == other.window
            and self.kernel == other.kernel
            and self.sharpness == other.sharpness
            and self.phase == other.phase
        )

    @staticmethod
    def _entries(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,)

    def _check_phases(self) -> None:
        windows, phases = self._entries(self.window), self._entries(self.phase)  # type: ignore[arg-type]
        if isinstance(self.window, tuple) and isinstance(self.phase, tuple) and len(windows) != len(phases):
            raise ValueError(f"phase must have one entry per window ({len(windows)}), got {len(phases)}")
        count = max(len(windows), len(phases))
        for window, phase in zip(self._spread(windows, count), self._spread(phases, count), strict=True):
            geometry.check_phase(phase, window, self.slots)

    @staticmethod
    def _spread(entries: tuple[int, ...], count: int) -> tuple[int, ...]:
        return entries * count if len(entries) == 1 else entries

    @classmethod
    def pyramid(
        cls,
        slots: int,
        resolutions: Sequence[int] | None = None,
        kernel: str = "fejer",
        sharpness: float | None = None,
        phase: int | tuple[int, ...] | None = None,
        *,
        heads: int | None = None,
    ) -> BlurryWindow:
        """One window per kv head, ``slots * resolutions[i]`` tokens long: sharp heads beside far-reaching ones.

        Without ``resolutions`` half of the ``heads`` (8 when None, else a multiple of 4) have r = 1, a quarter r = 4
        and a quarter r = 8, which read text best of what was tried at equal state.

        Raises:
            TypeError, ValueError: as the class; ``resolutions`` that are one int; ``heads`` beside ``resolutions``, or
                not a multiple of 4.
        """
        slots = integer("slots", slots)
        if resolutions is None:
            heads = 8 if heads is None else integer("heads", heads)
            if heads < 1 or heads % len(PYRAMID):
                raise ValueError(f"heads must be a positive multiple of {len(PYRAMID)}, got {heads}")
            resolutions = tuple(r for r in PYRAMID for _ in range(heads // len(PYRAMID)))
        elif heads is not None:
            raise ValueError(f"heads must be None beside resolutions, got {heads!r}")
        entries = _per_head("resolutions", resolutions)
        if isinstance(entries, int):
            raise TypeError(
                f"resolutions must be a tuple with one int per kv head, got {entries}: ({entries},) is one head, and "
                f"heads={entries} a pyramid of so many"
            )
        for resolution in entries:
            if resolution < 1:
                raise ValueError(f"resolutions must be at least 1, got {resolution}")
        return cls(slots, tuple(slots * resolution for resolution in entries), kernel, sharpness, phase)

    def windows(self, kv_heads: int) -> tuple[int, ...]:
        """P of each kv head, in tokens."""
        return self._of_heads("window", self.window, kv_heads)

    def resolutions(self, kv_heads: int) -> tuple[int, ...]:
        """r = P / N of each kv head: tokens per slot."""
        return tuple(window // self.slots for window in self.windows(kv_heads))

    def phases(self, kv_heads: int) -> tuple[int, ...]:
        """Phase of each kv head, in tokens; the i-th of n heads that share a window gets floor(i r / n)."""
        if self.phase is not None:
            phases = self._of_heads("phase", self.phase, kv_heads)
            self.windows(kv_heads)
            return phases
        return geometry.staggered_phases(self.resolutions(kv_heads))

    def of_heads(self, kv_heads: int, heads: slice) -> BlurryWindow:
        """The window of some of ``kv_heads`` heads: each keeps its length and its phase."""
        return BlurryWindow(
            self.slots, self.windows(kv_heads)[heads], self.kernel, self.sharpness, self.phases(kv_heads)[heads]
        )

    def state_elements(self, kv_heads: int, head_dim: int, value_dim: int | None = None) -> int:
        """Numbers in the state of one sequence, over all kv heads: kv_heads * slots * (head_dim + value_dim)."""
        return kv_heads * self.slots * (head_dim + (head_dim if value_dim is None else value_dim))

    @property
    def gate_sharpness(self) -> float:
        """The sharpness in force: ``sharpness``, or the default where it is None."""
        return DEFAULT_SHARPNESS if self.sharpness is None else self.sharpness

    def _of_heads(self, name: str, value: int | tuple[int, ...], kv_heads: int) -> tuple[int, ...]:
        entries = self._entries(value)
        if isinstance(value, tuple) and len(entries) != kv_heads:
            raise ValueError(f"{name} must have one entry per kv head ({kv_heads}), got {len(entries)}")
        return self._spread(entries, kv_heads)
