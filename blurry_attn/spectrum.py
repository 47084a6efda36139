"""The frequency window of a state, and the history that its inverse transform gives back.

Shapes: key ``(B, Hkv, N, Dk)``, value ``(B, Hkv, N, Dv)``, float32 or float64, position ``(B,)`` int64. A shut slot
counts as the oldest open one; where none is open, all are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import geometry
from .window import BlurryWindow


def frequency_window(window: BlurryWindow, key: Tensor, value: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """As :meth:`blurry_attn.BlurryState.frequency_window`: complex, ``(B, Hkv, N // 2 + 1, D)`` each."""
    windows, phases = _sizes(window, key.shape[1], position.device)
    is_open, oldest = _openness(window, key.shape[1], position)
    frequency = torch.arange(window.slots // 2 + 1, device=key.device)
    turns = (frequency * phases.unsqueeze(-1)).to(torch.float64) / windows.unsqueeze(-1)
    shift = torch.polar(torch.ones_like(turns), -2 * torch.pi * turns).unsqueeze(-1)

    def transform(slots: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(_fill(slots, is_open, oldest), dim=-2, norm="forward")
        return spectrum * shift.to(spectrum.dtype)

    return transform(key), transform(value)


def reconstruct(
    window: BlurryWindow, key: Tensor, value: Tensor, position: Tensor, lag: Tensor
) -> tuple[Tensor, Tensor]:
    """As :meth:`blurry_attn.BlurryState.reconstruct`: ``(B, Hkv, L, D)`` each, for ``lag`` (L,) in tokens.

    Raises:
        TypeError, ValueError: ``lag`` is no one-dimensional tensor of real numbers on this device, without gradient.
    """
    if not isinstance(lag, Tensor):
        raise TypeError(f"lag must be a Tensor, got {type(lag).__name__}")
    if lag.is_complex() or lag.dtype == torch.bool:
        raise TypeError(f"lag must be real numbers, got {lag.dtype}")
    if lag.dim() != 1:
        raise ValueError(f"lag must be one-dimensional (L,), got shape {tuple(lag.shape)}")
    if lag.device != key.device:
        raise ValueError(f"lag must be on the device of the state ({key.device}), got {lag.device}")
    if lag.requires_grad:
        raise ValueError("lag must not require a gradient: pass lag.detach()")
    windows, phases = _sizes(window, key.shape[1], position.device)
    is_open, oldest = _openness(window, key.shape[1], position)
    lag = lag.to(torch.float64)
    is_inside = (lag >= 0) & (lag < torch.minimum(windows.view(-1, 1), position.view(-1, 1, 1)))
    lag = torch.where(is_inside, lag, 0.0)
    weight = geometry.interpolation_weights(lag, position, window.slots, windows, phases)

    def interpolate(slots: Tensor) -> Tensor:
        history = weight.to(slots.dtype) @ _fill(slots, is_open, oldest)
        return history.masked_fill(~is_inside.unsqueeze(-1), torch.nan)

    return interpolate(key), interpolate(value)


def _sizes(window: BlurryWindow, kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Window and phase of every kv head in tokens, (Hkv,) int64."""
    return (
        torch.tensor(window.windows(kv_heads), device=device, dtype=torch.int64),
        torch.tensor(window.phases(kv_heads), device=device, dtype=torch.int64),
    )


def _openness(window: BlurryWindow, kv_heads: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Which slots are open (B, Hkv, N), and the slot of every head that opens first (Hkv,) int64."""
    slots, windows, phases = window.slots, window.windows(kv_heads), window.phases(kv_heads)
    opens = [geometry.openings(slots, *head) for head in zip(windows, phases, strict=True)]
    oldest = [geometry.first_slot(slots, phase) for phase in phases]
    opening = torch.tensor(opens, device=position.device, dtype=torch.int64).reshape(kv_heads, slots)
    return opening < position.view(-1, 1, 1), torch.tensor(oldest, device=position.device, dtype=torch.int64)


def _fill(slots: Tensor, is_open: Tensor, oldest: Tensor) -> Tensor:
    """The slots (B, Hkv, N, D), a shut one taken as the oldest open one; zero where none is open."""
    is_open = is_open.unsqueeze(-1)
    known = torch.where(is_open, slots, 0.0)
    first = known[:, torch.arange(slots.shape[1], device=slots.device), oldest].unsqueeze(2)
    return torch.where(is_open, known, first)
