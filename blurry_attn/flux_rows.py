"""States in bfloat16: slots at rest are rounded once, and the two slots in flux of each head are kept in float32 rows.

Shapes: key ``(B, Hkv, N, Dk)``, value ``(B, Hkv, N, Dv)``, position ``(B,)`` int64, flux ``(B, Hkv, 2, Dk + Dv)``: the
slots that the next token writes, of its trailing and of its leading cell, key features before value features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import geometry
from .window import BlurryWindow


def check(flux: Tensor | None, key: Tensor, value: Tensor, window: BlurryWindow) -> None:
    """Raises TypeError or ValueError unless ``flux`` fits the slots: None beside float32 and float64 ones."""
    if key.dtype != torch.bfloat16:
        if flux is not None:
            raise ValueError(f"flux must be None beside slots of {key.dtype}")
        return
    if window.kernel != "fejer":
        raise TypeError(
            f'key must be float32 or float64 where kernel is "{window.kernel}": no slot of it ever comes to rest'
        )
    if not isinstance(flux, Tensor):
        raise TypeError(
            f"flux must be a Tensor beside bfloat16 slots, got {type(flux).__name__}; state.to(torch.bfloat16) makes it"
        )
    if flux.dtype != torch.float32 or flux.layout != torch.strided:
        raise TypeError(f"flux must be dense and float32, got {flux.dtype}, layout {flux.layout}")
    shape = (*key.shape[:2], 2, key.shape[3] + value.shape[3])
    if flux.shape != shape:
        raise ValueError(f"flux must be (B, Hkv, 2, Dk + Dv) = {shape}, got {tuple(flux.shape)}")
    if flux.device != key.device:
        raise ValueError(f"flux must be on the device of key ({key.device}), got {flux.device}")


def gather(window: BlurryWindow, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """The flux rows of these slots, in float32."""
    rows = _rows(window, key.shape[1], position)
    return torch.cat((key[rows], value[rows]), -1).float()


def merge(window: BlurryWindow, key: Tensor, value: Tensor, position: Tensor, flux: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value slots in float32, those in flux from their rows; new memory."""
    rows = _rows(window, key.shape[1], position)
    key, value = key.float(), value.float()
    key[rows], value[rows] = flux.split((key.shape[3], value.shape[3]), -1)
    return key, value


def _cells(window: BlurryWindow, kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens per cell and phase of every kv head, (Hkv,) int64."""
    resolutions, phases = window.resolutions(kv_heads), window.phases(kv_heads)
    return torch.tensor(resolutions, device=device), torch.tensor(phases, device=device)


_cached_cells = lru_cache(_cells)


def _rows(window: BlurryWindow, kv_heads: int, position: Tensor) -> tuple[Tensor, ...]:
    """An index of the slots in flux, (B, Hkv, 2), into key and value."""
    # The copy to the device is made once, since a CUDA graph cannot hold it. What is made within a trace, a mode or a
    # transform belongs to it and is not kept. Sizes in there need have no hash.
    is_kept = not (
        torch.compiler.is_compiling()
        or type(kv_heads) is not int
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
    )
    resolution, phase = (_cached_cells if is_kept else _cells)(window, kv_heads, position.device)
    slots = geometry.slots_in_flux(position, window.slots, resolution, phase)
    sequence, head = (torch.arange(size, device=position.device) for size in slots.shape[:2])
    return sequence.view(-1, 1, 1), head.view(-1, 1), slots
