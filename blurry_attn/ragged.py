"""Padded batches as packed ones, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from .state import BlurryState
from .window import integer


def shapes_may_depend_on(x: Tensor) -> bool:
    """Whether the values of ``x`` are there, and hold for more than the recording of a program."""
    return not (torch.compiler.is_compiling() or x.is_meta or is_fake(x) or get_proxy_mode() is not None)


class Packing:
    """Where the tokens of a padded batch lie when its sequences are packed one after the other.

    Args:
        key_padding_mask: ``(B, T)`` bool, True where a token is padding, anywhere in a sequence.
        keep_padding: pack the padding too, as one last sequence of zeros. Then no shape depends on the mask's values
            and nothing waits for the device, as ``torch.compile``, ``torch.export`` and CUDA graphs need.

    Attributes:
        cu_seqlens: ``(B + 1,)`` int64, where each packed sequence begins, and the end; one entry more with
            ``keep_padding``.
        positions: ``(B, T)`` int64, the place of each token in its own sequence; without meaning at padding.

    Raises:
        TypeError: the mask is not a bool tensor.
        ValueError: the mask is not ``(B, T)``, or has no values (on meta, fake) without ``keep_padding``.
    """

    def __init__(self, key_padding_mask: Tensor, *, keep_padding: bool = False) -> None:
        if not isinstance(key_padding_mask, Tensor):
            raise TypeError(f"key_padding_mask must be a Tensor, got {type(key_padding_mask).__name__}")
        if key_padding_mask.layout != torch.strided:
            raise TypeError(f"key_padding_mask must be a dense tensor, got layout {key_padding_mask.layout}")
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool (True = padding), got {key_padding_mask.dtype}")
        if key_padding_mask.dim() != 2:
            raise ValueError(f"key_padding_mask must be (B, T), got shape {tuple(key_padding_mask.shape)}")
        if not keep_padding and (key_padding_mask.is_meta or is_fake(key_padding_mask)):
            raise ValueError(
                "key_padding_mask must have values, which say how many tokens are packed, unless keep_padding=True, "
                f"got a {'meta' if key_padding_mask.is_meta else 'fake'} tensor"
            )
        is_kept = ~key_padding_mask
        self.mask, self.keep_padding = key_padding_mask, keep_padding
        self.positions = is_kept.cumsum(1) - 1
        ends = is_kept.sum(1).cumsum(0)
        if keep_padding:
            ends = torch.cat((ends, ends.new_full((1,), key_padding_mask.numel())))
            # The sort is stable: kept tokens come first, and each group stays in the batch's order.
            self._order = key_padding_mask.flatten().argsort(stable=True)
        else:
            self._order = is_kept.flatten().nonzero().squeeze(1)
        self.cu_seqlens = F.pad(ends, (1, 0))

    def pack(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x (B, ..., T, ...)``, T at ``dim``, as ``(1, ..., tokens, ...)``.

        What stands in the padding reaches neither the result nor, going back, a gradient.

        Raises:
            TypeError: ``x`` is not a tensor, or ``dim`` not an int.
            ValueError: B or T is not the mask's.
        """
        self._check(x, dim)
        if dim < 1 or x.dim() <= dim or (x.shape[0], x.shape[dim]) != self.mask.shape:
            raise ValueError(
                f"x must have (B, T) = {tuple(self.mask.shape)} in dimensions 0 and {dim}, got shape {tuple(x.shape)}"
            )
        tokens = x.movedim(dim, 1).flatten(0, 1)
        if self.keep_padding:
            tokens = tokens.masked_fill(self._padding(tokens), 0)
        return tokens.index_select(0, self._order).unsqueeze(0).movedim(1, dim)

    def unpack(self, x: Tensor, dim: int = 1) -> Tensor:
        """The reverse of :meth:`pack`: ``x (1, ..., tokens, ...)`` as ``(B, ..., T, ...)``, zero at padding.

        Raises:
            TypeError: ``x`` is not a tensor, or ``dim`` not an int.
            ValueError: the number of tokens is not that of :meth:`pack`.
        """
        self._check(x, dim)
        if dim < 1 or x.dim() <= dim or x.shape[0] != 1 or x.shape[dim] != self._order.shape[0]:
            raise ValueError(
                f"x must have 1 and {self._order.shape[0]} tokens in dimensions 0 and {dim}, got shape {tuple(x.shape)}"
            )
        tokens = x.movedim(dim, 1).squeeze(0)
        padded = tokens.new_zeros(self.mask.numel(), *tokens.shape[1:]).index_copy(0, self._order, tokens)
        if self.keep_padding:
            padded = padded.masked_fill(self._padding(padded), 0)
        return padded.unflatten(0, self.mask.shape).movedim(1, dim)

    def pack_state(self, state: BlurryState) -> BlurryState:
        """The state of the B sequences as one of the packed sequences; memory may be shared.

        Raises:
            TypeError: ``state`` is not a :class:`BlurryState`.
            ValueError: it does not hold B sequences.
        """
        self._check_state(state, self.mask.shape[0])
        if not self.keep_padding:
            return state
        _, kv_heads, _, head_dim = state.key.shape
        start = BlurryState.empty(
            1,
            kv_heads,
            head_dim,
            state.value.shape[-1],
            window=state.window,
            device=state.key.device,
            dtype=state.key.dtype,
        )
        return BlurryState.cat((state, start))

    def unpack_state(self, state: BlurryState) -> BlurryState:
        """The reverse of :meth:`pack_state`; memory is shared.

        Raises:
            TypeError: ``state`` is not a :class:`BlurryState`.
            ValueError: it does not hold the packed sequences.
        """
        self._check_state(state, self.cu_seqlens.shape[0] - 1)
        return state[: self.mask.shape[0]]

    @staticmethod
    def _check(x: Tensor, dim: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        integer("dim", dim)

    @staticmethod
    def _check_state(state: BlurryState, sequences: int) -> None:
        if not isinstance(state, BlurryState):
            raise TypeError(f"state must be a BlurryState, got {type(state).__name__}")
        if state.batch_size != sequences:
            raise ValueError(f"state must hold {sequences} sequences, got {state.batch_size}")

    def _padding(self, tokens: Tensor) -> Tensor:
        """The mask (B T, 1, ...), against ``tokens`` (B T, ...)."""
        return self.mask.flatten().reshape(-1, *(1,) * (tokens.dim() - 1))
