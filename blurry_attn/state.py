"""The state of blurry window attention: slots whose number does not grow with the history."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from . import _C, flux_rows, spectrum
from .window import BlurryWindow, integer

TENSORS = ("key", "value", "position")


class BlurryState:
    """The history of ``B`` sequences, held in ``N`` slots per key/value head whatever its length.

    Args:
        key: slots of the key history, ``(B, Hkv, N, Dk)``, float32 (float64 where the inputs are float64), or bfloat16.
        value: slots of the value history, ``(B, Hkv, N, Dv)``, of the same dtype and device.
        position: tokens seen so far by each sequence, ``(B,)`` int64, on the same device.
        window: the window that the slots were written by; ``N`` is its ``slots``.
        flux: beside bfloat16 slots alone, which it stands in for: the two slots that the next token of a sequence
            writes, of the trailing and of the leading cell, ``(B, Hkv, 2, Dk + Dv)``, float32. A slot is then rounded
            once, when it comes to rest.

    ``state.to(torch.bfloat16)`` makes a state of about half the bytes, for "fejer", whose slots do come to rest; it is
    given and stepped like any other, and stays in bfloat16.

    A slot is shut until the first token in its reach; shut slots are zero in a returned state, ignored in a given one.
    :func:`blurry_attn.blurry_window_step` updates a state in place; everything else leaves it alone.

    Raises:
        TypeError: an argument that is not a tensor (``window``: not a :class:`BlurryWindow`), or of another dtype;
            bfloat16 slots of another kernel than "fejer".
        ValueError: shapes or devices that do not fit together, or a window made for another number of heads.
    """

    # The class is no dataclass, since FSDP's mixed precision casts the tensors in one and hands a copy on.
    def __init__(
        self, key: Tensor, value: Tensor, position: Tensor, window: BlurryWindow, flux: Tensor | None = None
    ) -> None:
        self.key, self.value, self.position, self.window, self.flux = key, value, position, window, flux
        self._check()

    def _check(self) -> None:
        for name in ("key", "value", "position"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(getattr(self, name)).__name__}")
            if getattr(self, name).layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor, got layout {getattr(self, name).layout}")
        if not isinstance(self.window, BlurryWindow):
            raise TypeError(f"window must be a BlurryWindow, got {type(self.window).__name__}")
        for name, slots in (("key", self.key), ("value", self.value)):
            if slots.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise TypeError(f"{name} must be float32, float64 or bfloat16, got {slots.dtype}")
            if slots.dim() != 4:
                raise ValueError(f"{name} must be (B, Hkv, N, D), got {slots.dim()} dimensions: {tuple(slots.shape)}")
        if self.value.dtype != self.key.dtype:
            raise TypeError(f"value must have the dtype of key ({self.key.dtype}), got {self.value.dtype}")
        if self.position.dtype != torch.int64:
            raise TypeError(f"position must be int64, got {self.position.dtype}")
        if self.value.shape[:3] != self.key.shape[:3]:
            need, have = tuple(self.key.shape[:3]), tuple(self.value.shape[:3])
            raise ValueError(f"value must agree with key in (B, Hkv, N) = {need}, got {have}")
        if self.position.shape != self.key.shape[:1]:
            raise ValueError(f"position must be (B,) = ({self.batch_size},), got {tuple(self.position.shape)}")
        if self.slots != self.window.slots:
            raise ValueError(f"key must have the {self.window.slots} slots of window, got {self.slots}")
        for name in ("value", "position"):
            device = getattr(self, name).device
            if device != self.key.device:
                raise ValueError(f"{name} must be on the device of key ({self.key.device}), got {device}")
        self.window.phases(self.kv_heads)
        flux_rows.check(self.flux, self.key, self.value, self.window)

    @classmethod
    def _unchecked(cls, key: Any, value: Any, position: Any, window: BlurryWindow, flux: Any = None) -> BlurryState:
        """A state of parts that are known to fit together: made by an operator, or leaves of a tree."""
        state = cls.__new__(cls)
        state.key, state.value, state.position, state.window, state.flux = key, value, position, window, flux
        return state

    def _each(self, change: Callable[..., Tensor], *arguments: Any) -> BlurryState:
        """``change`` of each tensor; torch.compile would fix sizes among ``arguments`` in a closure or a generator."""
        flux = None if self.flux is None else change(self.flux, *arguments)
        key, value = change(self.key, *arguments), change(self.value, *arguments)
        return BlurryState(key, value, change(self.position, *arguments), self.window, flux)

    def _contents(self) -> tuple[Tensor, Tensor]:
        """Key and value slots as they are; those of bfloat16 in float32, with the ones in flux in their place."""
        if self.flux is None:
            return self.key, self.value
        # An attribute may have been set after the state was made.
        self._check()
        return flux_rows.merge(self.window, self.key, self.value, self.position, self.flux)

    def _write(self, key: Tensor, value: Tensor, position: Tensor) -> None:
        """What a step has made of :meth:`_contents`, into a state of bfloat16: all of it at once, or nothing."""
        held = [self.key, self.value, self.position, cast(Tensor, self.flux)]
        torch._foreach_copy_(held, [key, value, position, flux_rows.gather(self.window, key, value, position)])

    def _check_writable(self, **read: Tensor) -> None:
        """What the operator checks of the tensors that it updates, for those of a state of bfloat16.

        Raises:
            ValueError: a tensor whose elements share memory with each other, with another of the state, or with one of
                ``read``; an inference tensor outside inference mode.
        """
        written = [(f"state.{name}", getattr(self, name)) for name in (*TENSORS, "flux")]
        _C.check_is_writable(written, list(read.items()))

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: BlurryWindow,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> BlurryState:
        """The state before the first token: ``batch`` sequences at position 0, all slots shut and zero.

        ``dtype`` is float32, float64 or bfloat16.
        """
        if not isinstance(window, BlurryWindow):
            raise TypeError(f"window must be a BlurryWindow, got {type(window).__name__}")
        value_dim = head_dim if value_dim is None else value_dim
        sizes = (("batch", batch), ("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim))
        for name, size in sizes:
            if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
                raise TypeError(f"{name} must be an int, got {size!r}")
            if size < 0:
                raise ValueError(f"{name} must not be negative, got {size}")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        flux = None
        if dtype == torch.bfloat16:
            flux = torch.zeros(batch, kv_heads, 2, head_dim + value_dim, device=device, dtype=torch.float32)
        return cls(
            torch.zeros(batch, kv_heads, window.slots, head_dim, device=device, dtype=dtype),
            torch.zeros(batch, kv_heads, window.slots, value_dim, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
            window,
            flux,
        )

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.key.shape[0]

    @property
    def kv_heads(self) -> int:
        """Hkv, the number of key/value heads."""
        return self.key.shape[1]

    @property
    def slots(self) -> int:
        """N, slots per key/value head."""
        return self.key.shape[2]

    @property
    def elements(self) -> int:
        """Numbers held in the slots, over all sequences and heads: B Hkv N (Dk + Dv)."""
        return self.key.numel() + self.value.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of those numbers, and of ``flux``."""
        return sum(x.nbytes for x in (self.key, self.value, self.flux) if x is not None)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> BlurryState:
        """On another device, or with slots of another dtype (float32, float64, or bfloat16 with ``flux`` in float32).

        Slots that go to bfloat16 are rounded, except those in flux; they come back as they then are. All memory is new
        where any is.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
        contents = (self.key, self.value) if dtype in (None, self.key.dtype) else self._contents()
        key, value = (x.to(device, dtype, non_blocking=non_blocking, copy=copy) for x in contents)
        flux = None
        if key.dtype == torch.bfloat16:
            flux = self.flux if self.flux is not None else flux_rows.gather(self.window, *contents, self.position)
            flux = flux.to(device, non_blocking=non_blocking, copy=copy)
        # Positions are copied where slots are, so that a step of the one state does not advance the other.
        position = self.position.to(device, non_blocking=non_blocking, copy=copy or key is not self.key)
        return BlurryState(key, value, position, self.window, flux)

    def clone(self) -> BlurryState:
        """A copy that shares no memory; gradients flow through it."""
        return self._each(torch.clone)

    def detach(self) -> BlurryState:
        """The same slots without their gradient history; memory is shared."""
        return self._each(torch.detach)

    def __len__(self) -> int:
        """B, the number of sequences."""
        return self.batch_size

    def __iter__(self) -> Iterator[BlurryState]:
        """The states of the single sequences, each of batch 1, which share memory with this one."""
        return (self[i : i + 1] for i in range(self.batch_size))

    def __getitem__(self, index: int | slice | Tensor) -> BlurryState:
        """The state of some of the sequences, in any order and number: for beam search, and for a batch that shrinks.

        Args:
            index: an int (a state of batch 1) or a slice (the result shares memory with this state), or an int64 or
                bool tensor ``(B',)`` (it is new).

        Raises:
            TypeError: another index.
            IndexError: an int that is not in -B .. B - 1.
        """
        if isinstance(index, Tensor):
            if index.dim() != 1:
                raise TypeError(f"index must be a one-dimensional tensor, got shape {tuple(index.shape)}")
            if index.dtype not in (torch.int64, torch.int32, torch.bool):
                raise TypeError(f"index must be int64 or bool, got {index.dtype}")
        elif not isinstance(index, slice):
            row = integer("index", index)
            if not -self.batch_size <= row < self.batch_size:
                raise IndexError(f"index must be in {-self.batch_size} .. {self.batch_size - 1}, got {row}")
            row %= self.batch_size
            index = slice(row, row + 1)
        return self._each(operator.getitem, index)

    @classmethod
    def cat(cls, states: Sequence[BlurryState]) -> BlurryState:
        """One state of the sequences of all ``states``, in their order; new memory.

        Raises:
            TypeError: something that is no state, or of another dtype.
            ValueError: no states, or of unlike windows, shapes or devices.
        """
        if not isinstance(states, (list, tuple)):
            raise TypeError(f"states must be a list or tuple of BlurryStates, got {type(states).__name__}")
        if not states:
            raise ValueError("states must hold at least one state")
        for state in states:
            if not isinstance(state, BlurryState):
                raise TypeError(f"states must be BlurryStates, got {type(state).__name__}")
            if state.window != states[0].window:
                raise ValueError(f"states must have the same window: {states[0].window}, got {state.window}")
            if state.key.dtype != states[0].key.dtype:
                raise TypeError(f"states must have the same dtype: {states[0].key.dtype}, got {state.key.dtype}")
            if state._place() != states[0]._place():
                raise ValueError(f"states must have the same sizes and device: {states[0]!r}, got {state!r}")
        key, value, position = (torch.cat([getattr(state, name) for state in states]) for name in TENSORS)
        flux = [state.flux for state in states if state.flux is not None]
        return cls(key, value, position, states[0].window, torch.cat(flux) if flux else None)

    def _place(self) -> tuple[object, ...]:
        return self.key.shape[1:], self.value.shape[1:], self.key.device

    def crop(self, length: int) -> NoReturn:
        """Refused: a state cannot go back to ``length`` tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"a BlurryState cannot be cropped to {length} tokens: each slot is a mix of tokens that cannot be taken "
            "out again; keep a clone() of where to return to (its size does not grow with the history)"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All of the state in tensors, for ``torch.save`` or safetensors: ``key``, ``value``, ``position``, where there
        is one ``flux`` (memory is shared, gradient history is not), and ``window``, the text of the window as JSON in
        uint8, all on the state's device. Of a state on meta ``window`` alone has values, and is on the CPU."""
        text = json.dumps(asdict(self.window)).encode()
        device = "cpu" if self.key.is_meta else self.key.device
        tensors = {name: getattr(self, name) for name in (*TENSORS, "flux")}
        return {
            **{name: x.detach() for name, x in tensors.items() if x is not None},
            "window": torch.tensor(list(text), dtype=torch.uint8, device=device),
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> BlurryState:
        """The state of a :meth:`state_dict`, on the device of its tensors; memory is shared.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: entries that do not fit together, or are not those of a state.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
        for name in ("window", *TENSORS):
            if name not in state_dict:
                raise KeyError(f"state_dict must have the entry {name!r}, got {', '.join(state_dict) or 'none'}")
        try:
            window = BlurryWindow(**json.loads(bytes(state_dict["window"].tolist())))
        # A tensor that has no values raises RuntimeError.
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"window must be the text that state_dict() makes of a window: {error}") from None
        key, value, position = (state_dict[name] for name in TENSORS)
        return cls(key, value, position, window, state_dict.get("flux"))

    def frequency_window(self) -> tuple[Tensor, Tensor]:
        """The slots' discrete Fourier transform, for key and value: complex, ``(B, Hkv, N // 2 + 1, D)`` each.

        ``X[n] = (1/N) sum_m S[m] exp(-2 pi i n tau_m / P)``, where slot m is centred at token ``tau_m = m P/N + phase``
        modulo the head's window P: frequency n has n periods per window. A shut slot counts as the oldest open one
        (zero before the first token). Differentiable.
        """
        return spectrum.frequency_window(self.window, *self._contents(), self.position)

    def reconstruct(self, lag: Tensor) -> tuple[Tensor, Tensor]:
        """The blurred key and value history, ``(B, Hkv, L, Dk)`` and ``(B, Hkv, L, Dv)``, ``lag`` tokens back.

        Args:
            lag: ``(L,)`` real numbers, in tokens back from the newest one of each sequence (0 is the newest); not
                differentiated.

        Every head interpolates by the Dirichlet kernel of its own window P: the inverse transform of
        :meth:`frequency_window`, with half of the Nyquist term where N is even. NaN where a lag is outside
        ``[0, min(P, position))``. With one token per slot and whole lags these are the stored tokens. A shut slot
        counts as the oldest open one. The interpolation is periodic, so near lag 0 and near lag P it shows the seam
        between the newest and the oldest slot. Differentiable with respect to the slots.

        Raises:
            TypeError: ``lag`` is not a tensor of real numbers.
            ValueError: ``lag`` is not one-dimensional, is on another device, or requires a gradient.
        """
        return spectrum.reconstruct(self.window, *self._contents(), self.position, lag)

    def __repr__(self) -> str:
        return (
            f"BlurryState(batch_size={self.batch_size}, kv_heads={self.kv_heads}, slots={self.slots}, "
            f"head_dim={self.key.shape[-1]}, value_dim={self.value.shape[-1]}, dtype={self.key.dtype}, "
            f"device='{self.key.device}', window={self.window!r})"
        )
