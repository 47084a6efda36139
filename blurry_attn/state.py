"""The state of blurry window attention: slots whose number does not grow with the history."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .window import BlurryWindow


def _openings(slots: int, window: int, phase: int) -> list[int]:
    """The token that opens each slot; before it the slot is shut."""
    from . import _C

    return _C.openings(slots, window, phase)


def _dirichlet(x: Tensor, slots: int, window: Tensor) -> Tensor:
    """Cardinal Dirichlet kernel of ``slots`` samples over the period ``window``, at the offsets ``x`` (float64)."""
    x = torch.remainder(x, window)
    # Near the end of the period the angle loses its digits; measured from the nearer end it keeps them.
    x = torch.where(x > window / 2, x - window, x)
    at_centre = torch.remainder(x, window // slots) == 0
    angle = torch.where(at_centre, 1.0, x * torch.pi / window)
    denominator = torch.sin(angle) if slots % 2 else torch.tan(angle)
    between = torch.sin(slots * angle) / (slots * denominator)
    return torch.where(at_centre, (x == 0).to(x.dtype), between)


@dataclass(eq=False, repr=False)
class BlurryState:
    """The history of ``B`` sequences, held in ``N`` slots per key/value head whatever its length.

    Args:
        key: slots of the key history, ``(B, Hkv, N, Dk)``, float32 (float64 where the inputs are float64).
        value: slots of the value history, ``(B, Hkv, N, Dv)``, of the same dtype and device.
        position: tokens seen so far by each sequence, ``(B,)`` int64, on the same device.
        window: the window that the slots were written by; ``N`` is its ``slots``.

    A slot is shut until the first token in its reach; shut slots are zero in a returned state, ignored in a given one.
    :func:`blurry_attn.blurry_window_step` updates a state in place; everything else leaves it alone.

    Raises:
        TypeError: an argument that is not a tensor (``window``: not a :class:`BlurryWindow`), or of another dtype.
        ValueError: shapes or devices that do not fit together, or a window made for another number of heads.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    window: BlurryWindow

    def __post_init__(self) -> None:
        for name in ("key", "value", "position"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(getattr(self, name)).__name__}")
            if getattr(self, name).layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor, got layout {getattr(self, name).layout}")
        if not isinstance(self.window, BlurryWindow):
            raise TypeError(f"window must be a BlurryWindow, got {type(self.window).__name__}")
        for name, slots in (("key", self.key), ("value", self.value)):
            if slots.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must be float32 or float64, got {slots.dtype}")
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

    @classmethod
    def _unchecked(cls, key: Any, value: Any, position: Any, window: BlurryWindow) -> BlurryState:
        """A state of parts that are known to fit together: made by an operator, or leaves of a tree."""
        state = cls.__new__(cls)
        state.key, state.value, state.position, state.window = key, value, position, window
        return state

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
        """The state before the first token: ``batch`` sequences at position 0, all slots shut and zero."""
        if not isinstance(window, BlurryWindow):
            raise TypeError(f"window must be a BlurryWindow, got {type(window).__name__}")
        for name, size in (("batch", batch), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if size < 0:
                raise ValueError(f"{name} must not be negative, got {size}")
        value_dim = head_dim if value_dim is None else value_dim
        return cls(
            torch.zeros(batch, kv_heads, window.slots, head_dim, device=device, dtype=dtype),
            torch.zeros(batch, kv_heads, window.slots, value_dim, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
            window,
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
        """Bytes of those numbers."""
        return self.elements * self.key.element_size()

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
        copy: bool = False,
    ) -> BlurryState:
        """On another device, or with slots of another dtype (float32 or float64); ``position`` stays int64."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        key, value = (x.to(device, dtype, non_blocking=non_blocking, copy=copy) for x in (self.key, self.value))
        position = self.position.to(device, non_blocking=non_blocking, copy=copy)
        return BlurryState(key, value, position, self.window)

    def clone(self) -> BlurryState:
        """A copy that shares no memory; gradients flow through it."""
        return BlurryState(self.key.clone(), self.value.clone(), self.position.clone(), self.window)

    def detach(self) -> BlurryState:
        """The same slots without their gradient history; memory is shared."""
        return BlurryState(self.key.detach(), self.value.detach(), self.position.detach(), self.window)

    def __getitem__(self, index: slice | Tensor) -> BlurryState:
        """The state of some of the sequences, in any order and number: for beam search, and for a batch that shrinks.

        Args:
            index: a slice (the result shares memory with this state) or an int64 or bool tensor ``(B',)`` (it is new).

        Raises:
            TypeError: another index; an int would drop the batch dimension.
        """
        if not isinstance(index, slice) and not (isinstance(index, Tensor) and index.dim() == 1):
            raise TypeError(f"index must be a slice or a one-dimensional tensor, got {index!r}")
        return BlurryState(self.key[index], self.value[index], self.position[index], self.window)

    @classmethod
    def cat(cls, states: Sequence[BlurryState]) -> BlurryState:
        """One state of the sequences of all ``states``, in their order; new memory.

        Raises:
            TypeError: something that is no state, or of another dtype.
            ValueError: no states, or of unlike windows, shapes or devices.
        """
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
        key, value, position = (
            torch.cat([getattr(state, name) for state in states]) for name in ("key", "value", "position")
        )
        return cls(key, value, position, states[0].window)

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

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All of the state in tensors, for ``torch.save`` or safetensors: ``key``, ``value``, ``position`` (memory is
        shared, gradient history is not), and ``window``, the text of the window as JSON in uint8.

        Args:
            dtype: of key and value; None: as they are. In bfloat16 a conversation that waits takes half the bytes.
        """
        text = json.dumps(asdict(self.window)).encode()
        return {
            "key": self.key.detach().to(dtype),
            "value": self.value.detach().to(dtype),
            "position": self.position,
            "window": torch.tensor(list(text), dtype=torch.uint8),
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> BlurryState:
        """The state of a :meth:`state_dict`, on the device of its tensors; memory is shared, but for slots of less than
        32 bits, which become float32.

        Raises:
            KeyError: an entry is missing.
            TypeError, ValueError: entries that do not fit together, or are not those of a state.
        """
        for name in ("window", *_CHILDREN):
            if name not in state_dict:
                raise KeyError(f"state_dict must have the entry {name!r}, got {', '.join(state_dict) or 'none'}")
        try:
            window = BlurryWindow(**json.loads(bytes(state_dict["window"].tolist())))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"window must be the text that state_dict() makes of a window: {error}") from None
        key, value = (
            slots.float() if isinstance(slots, Tensor) and slots.dtype in (torch.bfloat16, torch.float16) else slots
            for slots in (state_dict["key"], state_dict["value"])
        )
        return cls(key, value, state_dict["position"], window)

    def frequency_window(self) -> tuple[Tensor, Tensor]:
        """The slots' discrete Fourier transform, for key and value: complex, ``(B, Hkv, N // 2 + 1, D)`` each.

        ``X[n] = (1/N) sum_m S[m] exp(-2 pi i n tau_m / P)``, where slot m is centred at token ``tau_m = m P/N + phase``
        modulo the head's window P: frequency n has n periods per window. A shut slot counts as the oldest open one
        (zero before the first token). Differentiable.
        """
        windows, phases, is_open, oldest = self._layout()
        frequency = torch.arange(self.slots // 2 + 1, device=self.key.device)
        turns = (frequency * phases.unsqueeze(-1)).to(torch.float64) / windows.unsqueeze(-1)
        shift = torch.polar(torch.ones_like(turns), -2 * torch.pi * turns).unsqueeze(-1)

        def transform(slots: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(_fill(slots, is_open, oldest), dim=-2, norm="forward")
            return spectrum * shift.to(spectrum.dtype)

        return transform(self.key), transform(self.value)

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
        if not isinstance(lag, Tensor):
            raise TypeError(f"lag must be a Tensor, got {type(lag).__name__}")
        if lag.is_complex() or lag.dtype == torch.bool:
            raise TypeError(f"lag must be real numbers, got {lag.dtype}")
        if lag.dim() != 1:
            raise ValueError(f"lag must be one-dimensional (L,), got shape {tuple(lag.shape)}")
        if lag.device != self.key.device:
            raise ValueError(f"lag must be on the device of the state ({self.key.device}), got {lag.device}")
        if lag.requires_grad:
            raise ValueError("lag must not require a gradient: pass lag.detach()")
        windows, phases, is_open, oldest = self._layout()
        lag = lag.to(torch.float64)
        position = self.position.view(-1, 1, 1)
        is_inside = (lag >= 0) & (lag < torch.minimum(windows.view(-1, 1), position))
        lag = torch.where(is_inside, lag, 0.0)
        slot = torch.arange(self.slots, device=lag.device)
        windows, phases = windows.unsqueeze(-1), phases.unsqueeze(-1)
        # The newest token's offset from each centre is reduced as a whole number: a long sequence costs no digits.
        newest = (position - 1 - phases - slot * (windows // self.slots)) % windows
        weight = _dirichlet(newest.unsqueeze(2) - lag.unsqueeze(-1), self.slots, windows.unsqueeze(-1))

        def interpolate(slots: Tensor) -> Tensor:
            history = weight.to(slots.dtype) @ _fill(slots, is_open, oldest)
            return history.masked_fill(~is_inside.unsqueeze(-1), torch.nan)

        return interpolate(self.key), interpolate(self.value)

    def _layout(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Windows and phases (Hkv,), which slots are open (B, Hkv, N), and the oldest (Hkv,) while some are shut."""
        windows, phases = self.window.windows(self.kv_heads), self.window.phases(self.kv_heads)
        opens = [_openings(self.slots, window, phase) for window, phase in zip(windows, phases, strict=True)]
        # With a phase the cell before the first token counts, and it belongs to the last slot.
        oldest = [self.slots - 1 if phase > 0 else 0 for phase in phases]
        device = self.position.device
        opening = torch.tensor(opens, device=device, dtype=torch.int64).reshape(self.kv_heads, self.slots)
        return (
            torch.tensor(windows, device=device, dtype=torch.int64),
            torch.tensor(phases, device=device, dtype=torch.int64),
            opening < self.position.view(-1, 1, 1),
            torch.tensor(oldest, device=device, dtype=torch.int64),
        )

    def __repr__(self) -> str:
        return (
            f"BlurryState(batch_size={self.batch_size}, kv_heads={self.kv_heads}, slots={self.slots}, "
            f"head_dim={self.key.shape[-1]}, value_dim={self.value.shape[-1]}, dtype={self.key.dtype}, "
            f"device='{self.key.device}', window={self.window!r})"
        )


def _fill(slots: Tensor, is_open: Tensor, oldest: Tensor) -> Tensor:
    """The slots (B, Hkv, N, D), a shut one taken as the oldest open one; zero where none is open."""
    is_open = is_open.unsqueeze(-1)
    known = torch.where(is_open, slots, 0.0)
    first = known[:, torch.arange(slots.shape[1], device=slots.device), oldest].unsqueeze(2)
    return torch.where(is_open, known, first)


_CHILDREN = ("key", "value", "position")


def _flatten(state: BlurryState) -> tuple[list[Any], BlurryWindow]:
    return [state.key, state.value, state.position], state.window


def _flatten_with_keys(state: BlurryState) -> tuple[list[tuple[Any, Any]], BlurryWindow]:
    children, window = _flatten(state)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(_CHILDREN, children, strict=True)], window


def _unflatten(children: Any, window: Any) -> BlurryState:
    key, value, position = children  # while a tree is taken apart its leaves need not be tensors
    return BlurryState._unchecked(key, value, position, window)


# States go into and out of compiled and exported programs.
pytree.register_pytree_node(
    BlurryState,
    _flatten,
    _unflatten,
    serialized_type_name="blurry_attn.BlurryState",
    to_dumpable_context=lambda window: asdict(window),
    from_dumpable_context=lambda fields: BlurryWindow(**cast(dict[str, Any], fields)),
    flatten_with_keys_fn=_flatten_with_keys,
)
# Plain data: torch.load and torch.export.load take them under weights_only.
torch.serialization.add_safe_globals([BlurryState, BlurryWindow])
