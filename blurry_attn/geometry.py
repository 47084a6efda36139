"""Geometry of the law (docs/law.md): sizes of windows, centres and openings of slots, cells in flux, interpolation.

Times and positions are whole tokens of one sequence, counted from 0. ``slots`` is N, ``window`` P, ``resolution``
P / N, all of one key/value head unless a tensor holds those of several.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from . import _C

MAX_SLOTS = MAX_RESOLUTION = 2**20
MAX_DIRICHLET_RESOLUTION = 32
Index = TypeVar("Index", int, Tensor)


def check_slots(slots: int) -> None:
    """Raises ValueError unless 2 <= ``slots`` <= 2^20."""
    if slots < 2:
        raise ValueError(f"slots must be at least 2, got {slots}")
    if slots > MAX_SLOTS:
        raise ValueError(f"slots must be at most {MAX_SLOTS}, got {slots}")


def check_window(window: int, slots: int) -> None:
    """Raises ValueError unless ``window`` is a multiple of ``slots``, of 1 to 2^20 tokens per slot."""
    if window < slots or window % slots:
        raise ValueError(f"window must be a positive multiple of slots ({slots}), got {window}")
    if window // slots > MAX_RESOLUTION:
        raise ValueError(f"window must be at most {MAX_RESOLUTION} * slots, got {window}")


def check_dirichlet_window(window: int, slots: int) -> None:
    """Raises ValueError where ``window`` has more tokens per slot than the "dirichlet" kernel takes."""
    if window // slots > MAX_DIRICHLET_RESOLUTION:
        raise ValueError(
            f"window must be at most {MAX_DIRICHLET_RESOLUTION} * slots with kernel='dirichlet' "
            f"(its negative lobes amplify), got {window} with {slots} slots"
        )


def check_phase(phase: int, window: int, slots: int) -> None:
    """Raises ValueError unless 0 <= ``phase`` < the resolution."""
    if not 0 <= phase < window // slots:
        raise ValueError(f"phase must be in 0 .. {window // slots - 1} (window // slots - 1), got {phase}")


def _count(entries: tuple[int, ...], entry: int) -> int:
    """``entries.count(entry)``, which torch 2.11 does not compile where entries are symbols."""
    return sum(1 for other in entries if other == entry)


def staggered_phases(resolutions: tuple[int, ...]) -> tuple[int, ...]:
    """The phase of every head, in tokens: the i-th of n heads of one resolution r has floor(i r / n)."""
    return tuple(
        _count(resolutions[:head], resolution) * resolution // _count(resolutions, resolution)
        for head, resolution in enumerate(resolutions)
    )


def centre(cell: Index, resolution: Index, phase: Index) -> Index:
    """The token at which ``cell`` has its centre; cell c belongs to slot c mod N."""
    return cell * resolution + phase


def openings(slots: int, window: int, phase: int) -> list[int]:
    """The token that opens each of the N slots; up to it the slot is shut."""
    return _C.openings(slots, window, phase)


def first_slot(slots: int, phase: int) -> int:
    """The slot that opens first: of cell -1 where there is a phase, and of cell 0 elsewhere."""
    return slots - 1 if phase > 0 else 0


def slots_in_flux(position: Tensor, slots: int, resolution: Tensor, phase: Tensor) -> Tensor:
    """The slots that the next token of each sequence lies in: of its trailing and of its leading cell.

    Args:
        position: tokens seen so far, ``(B,)`` int64; a negative one counts as 0.
        slots: N.
        resolution: of every head, ``(Hkv,)`` int64.
        phase: of every head, ``(Hkv,)`` int64.

    Returns:
        ``(B, Hkv, 2)`` int64, in 0 .. N - 1.
    """
    trailing = (position.clamp(min=0).unsqueeze(1) - phase).div(resolution, rounding_mode="floor")
    return torch.stack((trailing, trailing + 1), -1).remainder(slots)


def echo(kernel: str, slots: int, window: int, phase: int, sharpness: float) -> float:
    """The largest share of its content that a slot keeps over one lap, the tokens of a window; 0: a gate of 1 replaces.

    Args:
        kernel: ``"fejer"`` or ``"dirichlet"``.
        slots, window, phase: of the head.
        sharpness: of the fejer gate; not read for ``"dirichlet"``.
    """
    # All slots are open after two laps at most, and each meets every gate of the period once in a lap.
    lap = _C.gates(kernel, slots, window, phase, sharpness, 2 * window, window)
    return float(abs(1 - lap).prod(0).max())


def dirichlet(offset: Tensor, slots: int, window: Tensor) -> Tensor:
    """Cardinal Dirichlet kernel of N samples over the period P: exactly 1 at 0 and 0 at the other samples.

    Args:
        offset: from a sample, in tokens, any shape, float64.
        slots: N.
        window: P, int64, of a shape that broadcasts with ``offset``.
    """
    offset = torch.remainder(offset, window)
    # Near the end of the period the angle loses its digits; measured from the nearer end it keeps them.
    offset = torch.where(offset > window / 2, offset - window, offset)
    at_centre = torch.remainder(offset, window // slots) == 0
    angle = torch.where(at_centre, 1.0, offset * torch.pi / window)
    denominator = torch.sin(angle) if slots % 2 else torch.tan(angle)
    between = torch.sin(slots * angle) / (slots * denominator)
    return torch.where(at_centre, (offset == 0).to(offset.dtype), between)


def interpolation_weights(lag: Tensor, position: Tensor, slots: int, windows: Tensor, phases: Tensor) -> Tensor:
    """The weight of every slot in the history ``lag`` tokens back from the newest token.

    Args:
        lag: ``(B, Hkv, L)`` float64, in tokens.
        position: tokens seen so far, ``(B,)`` int64.
        slots: N.
        windows: P of every head, ``(Hkv,)`` int64.
        phases: of every head, ``(Hkv,)`` int64.

    Returns:
        ``(B, Hkv, L, N)`` float64.
    """
    slot = torch.arange(slots, device=lag.device)
    windows, phases = windows.unsqueeze(-1), phases.unsqueeze(-1)
    # The newest token's offset from each centre is reduced as a whole number, so that a long sequence costs no digits.
    newest = (position.view(-1, 1, 1) - 1 - centre(slot, windows // slots, phases)) % windows
    return dirichlet(newest.unsqueeze(2) - lag.unsqueeze(-1), slots, windows.unsqueeze(-1))
