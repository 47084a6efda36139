"""The operators in Python: the checks that must come before dispatch, shapes for tracing, and the public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import _C
from .state import BlurryState
from .window import BlurryWindow


def _operator(name: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """The operator: by torch.ops only where Python must see the call, for it costs a third of a call's host time."""
    seen = torch.compiler.is_compiling() or has_torch_function(tensors)
    return getattr(torch.ops.blurry_attn, name).default if seen else getattr(_C, name)


def _check_arguments(query: Tensor, key: Tensor, value: Tensor, window: BlurryWindow, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise NotImplementedError(f"{name} must not be a nested tensor; pack sequences with cu_seqlens")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), "
                f"got {tensor.dim()} in shape {tuple(tensor.shape)}"
            )
        _check_place(name, tensor, query)
    if not isinstance(window, BlurryWindow):
        raise TypeError(f"window must be a BlurryWindow, got {type(window).__name__}")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query must have as many heads as key ({key.shape[1]}) unless enable_gqa=True, got {query.shape[1]}"
        )


def _check_place(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def _check_places(query: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """For the fake kernels: one tensor on meta among others leads there, where nothing else looks at devices."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_place(name, tensor, query)


def _check_state(state: BlurryState, window: BlurryWindow, query: Tensor) -> None:
    if not isinstance(state, BlurryState):
        raise TypeError(f"state must be a BlurryState, got {type(state).__name__}")
    # The state's other tensors lie where its key does.
    _check_place("state.key", state.key, query)
    for name, tensor in (("state.value", state.value), ("state.position", state.position)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if state.window is not window and state.window != window:
        raise ValueError(f"state must have been made with the same window: {state.window}, got {window}")


_Law = tuple[int, list[int], list[int], str, float]


def _make_law(window: BlurryWindow, kv_heads: int) -> _Law:
    return (
        window.slots,
        list(window.windows(kv_heads)),
        list(window.phases(kv_heads)),
        window.kernel,
        window.gate_sharpness,
    )


_cached_law = lru_cache(_make_law)


def _law(window: BlurryWindow, kv_heads: int) -> _Law:
    """The operators' arguments slots, window, phase, kernel, sharpness."""
    # A trace sees through the cache, with a warning, and sizes that are symbols have no hash.
    traced = torch.compiler.is_compiling() or type(kv_heads) is not int
    return _make_law(window, int(kv_heads)) if traced else _cached_law(window, kv_heads)


def _is_distributed(*tensors: Tensor) -> bool:
    """Whether there is a DTensor among them, told without loading ``torch.distributed.tensor``."""
    return any(hasattr(tensor, "device_mesh") for tensor in tensors)


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(max(head_dim, 1))
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(
            f"scale must be an int, a float or None, got {type(scale).__name__}; a learned one multiplies query instead"
        )
    try:
        return float(scale)
    except OverflowError:
        raise ValueError(f"scale must be finite, got {scale!r}") from None


def blurry_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    state: BlurryState | None = None,
    return_state: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""Causal attention over N slots that hold a blurred history of P tokens (see docs/law.md).

    With K_t[m], V_t[m] the contents of slot m after token t,
    :math:`o_t = \sum_m \mathrm{softmax}_m(\mathrm{scale}\; q_t \cdot K_t[m])\, V_t[m]` over open slots. Cost and state
    per token do not depend on the length of the history. The same inputs give the same bits in every run.

    DTensors are attended where they lie, sharded by sequences or by heads, and give DTensors (docs/usage.md).

    Args:
        query: (B, Hq, T, Dk), float64, float32, bfloat16 or float16, any strides.
        key: (B, Hkv, T, Dk), as query; Hq is a multiple of Hkv.
        value: (B, Hkv, T, Dv), as query.
        window: slots, window, kernel and phases of every kv head.
        scale: of the logits; 1 / sqrt(Dk) when None. No tensor: a learned one multiplies the query instead.
        enable_gqa: allow Hq > Hkv: query head h reads kv head h // (Hq // Hkv).
        cu_seqlens: (S + 1,) int32 or int64, from 0 to T, not decreasing: packs S sequences along T, with B = 1
            (:class:`Packing` makes it from a padding mask).
        state: what came before the first token, of each sequence; positions may differ.
        return_state: return the state after the last token too, in bfloat16 if the given one is.
        return_lse: return the log-sum-exp of the logits too.

    Returns:
        out (B, Hq, T, Dv) in query's dtype, dense, (B, T, Hq, Dv) in memory if query is; with ``return_lse`` then lse
        (B, Hq, T) in float32 (float64 for float64); with ``return_state`` then the :class:`BlurryState`. Differentiable
        in query, key, value and the given state's key and value, through all that is returned.

    Raises:
        TypeError: a dtype or type that is not taken.
        ValueError: a shape or value that is not; the message names the argument.
        NotImplementedError: nested tensors, forward-mode and second derivatives.
    """
    _check_arguments(query, key, value, window, enable_gqa)
    if state is not None:
        _check_state(state, window, query)
    if cu_seqlens is not None:
        _check_place("cu_seqlens", cu_seqlens, query)
    if _is_distributed(query, key, value):
        from .distributed import dtensor

        return dtensor.attend(
            blurry_window_attention,
            query,
            key,
            value,
            window,
            state=state,
            cu_seqlens=cu_seqlens,
            return_lse=return_lse,
            return_state=return_state,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    contents = (None, None) if state is None else state._contents()
    position = None if state is None else state.position
    forward = _operator("forward", query, key, value, cu_seqlens, *contents, position)
    out, lse, state_key, state_value, position, *_ = forward(
        query,
        key,
        value,
        *_law(window, key.shape[1]),
        _scale(scale, query.shape[-1]),
        cu_seqlens,
        *contents,
        position,
        return_state,
    )
    results = [out]
    if return_lse:
        results.append(lse)
    if return_state:
        end = BlurryState._unchecked(state_key, state_value, position, window)
        results.append(end if state is None or state.flux is None else end.to(dtype=torch.bfloat16))
    return results[0] if len(results) == 1 else tuple(results)


def backend(query: Tensor, key: Tensor, value: Tensor, window: BlurryWindow) -> str:
    """Which kernels a call of :func:`blurry_window_attention` (with ``enable_gqa=True``) would run forward.

    For eager code: a graph cannot hold the answer.

    Returns:
        ``"fejer"`` or ``"dirichlet"``: the parallel form of that kernel; or ``"scan: "`` and the reason
        why it is not taken.

    Raises:
        as :func:`blurry_window_attention`.
    """
    _check_arguments(query, key, value, window, enable_gqa=True)
    return torch.ops.blurry_attn.backend(query, key, value, *_law(window, key.shape[1]))


def blurry_window_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: BlurryState,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One token per sequence: attends, and updates ``state`` in place. For decoding; it has no gradient.

    Args:
        query: (B, Hq, 1, Dk); dtypes as for :func:`blurry_window_attention`.
        key: (B, Hkv, 1, Dk).
        value: (B, Hkv, 1, Dv).
        state: of B sequences, each at its own position, in memory that no other argument shares; nothing of it is
            touched if an argument is refused.
        scale: of the logits; 1 / sqrt(Dk) when None.
        enable_gqa: allow Hq > Hkv.

    Returns:
        out (B, Hq, 1, Dv) in query's dtype.

    Raises:
        TypeError, ValueError: as :func:`blurry_window_attention`; memory that is shared; inference tensors in the state
            outside inference mode.
        NotImplementedError: an input requires a gradient and gradients are enabled (use ``torch.no_grad()``).
    """
    if not isinstance(state, BlurryState):
        raise TypeError(f"state must be a BlurryState, got {type(state).__name__}")
    _check_arguments(query, key, value, state.window, enable_gqa)
    _check_state(state, state.window, query)
    if _is_distributed(query, key, value):
        from .distributed import dtensor

        return dtensor.step(blurry_window_step, query, key, value, state, scale=scale, enable_gqa=enable_gqa)
    slots, position = state._contents(), state.position
    if state.flux is not None:
        if not torch.compiler.is_compiling():
            state._check_writable(query=query, key=key, value=value)
        position = position.clone()
    step = _operator("step", query, key, value, *slots, position)
    out: Tensor = step(
        query, key, value, *slots, position, *_law(state.window, key.shape[1]), _scale(scale, query.shape[-1])
    )
    if state.flux is not None:
        state._write(*slots, position)
    return out


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary position embedding, rotate-half form: feature pairs (i, i + D/2) turn by position * base^(-2i/D) radians.

    Args:
        x: ``(B, H, T, D)``, D even, any strides; computed in float32 at least and returned in its dtype.
        positions: ``(T,)`` or ``(B, T)`` integers, absolute positions in tokens.
        base: > 0, commonly 10000.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that are not taken, as an odd D.
    """
    if positions.is_floating_point() or positions.is_complex():
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if _is_distributed(x):
        from .distributed import dtensor

        return dtensor.turn(rotary, x, positions, base)
    turned: Tensor = _operator("rotary", x, positions)(x, positions.long(), base)
    return turned


def _empty_beside(x: Tensor, dim: int) -> Tensor:
    """A new (B, H, T, dim): where ``x`` is (B, T, H, D) in memory, so is it."""
    if not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], dim).transpose(1, 2)
    return x.new_empty(*x.shape[:3], dim)


@torch.library.register_fake("blurry_attn::rotary")
def _rotary_shape(x: Tensor, positions: Tensor, base: float, back: bool = False) -> Tensor:
    if positions.device != x.device:
        raise ValueError(f"positions must be on x's device {x.device}, got {positions.device}")
    return _empty_beside(x, x.shape[3])


def _state_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _empty_state(like: Tensor, sequences: int, key: Tensor, value: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(like)
    return (
        like.new_empty(sequences, key.shape[1], slots, key.shape[3], dtype=dtype),
        like.new_empty(sequences, value.shape[1], slots, value.shape[3], dtype=dtype),
    )


@torch.library.register_fake("blurry_attn::forward")
def _forward_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: int,
    window: list[int],
    phase: list[int],
    kernel: str,
    sharpness: float,
    scale: float,
    cu_seqlens: Tensor | None,
    state_key: Tensor | None,
    state_value: Tensor | None,
    position: Tensor | None,
    return_state: bool,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    state = {"state.key": state_key, "state.value": state_value, "state.position": position}
    _check_places(query, {"key": key, "value": value, "cu_seqlens": cu_seqlens, **state})
    out = _empty_beside(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=_state_dtype(query))
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = query.new_empty(0, dtype=torch.uint8)  # a trace keeps nothing
    if return_state:
        states = _empty_state(query, sequences, key, value, slots)
        return out, lse, *states, query.new_empty(sequences, dtype=torch.int64), kept
    none = query.new_empty(0, dtype=_state_dtype(query))
    return out, lse, none, torch.empty_like(none), query.new_empty(0, dtype=torch.int64), kept


@torch.library.register_fake("blurry_attn::backward")
def _backward_shapes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_state_key: Tensor | None,
    grad_state_value: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: int,
    window: list[int],
    phase: list[int],
    kernel: str,
    sharpness: float,
    scale: float,
    cu_seqlens: Tensor | None,
    state_key: Tensor | None,
    state_value: Tensor | None,
    position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    given = {"grad_out": grad_out, "grad_lse": grad_lse, "key": key, "value": value, "out": out, "lse": lse}
    given |= {"grad_state_key": grad_state_key, "grad_state_value": grad_state_value, "cu_seqlens": cu_seqlens}
    given |= {"state.key": state_key, "state.value": state_value, "state.position": position, "kept": kept}
    _check_places(query, given)
    gradients = tuple(_empty_beside(tensor, tensor.shape[3]) for tensor in (query, key, value))
    if state_key is None:
        none = query.new_empty(0, dtype=_state_dtype(query))
        return *gradients, none, torch.empty_like(none)
    return *gradients, *_empty_state(query, state_key.shape[0], key, value, slots)


@torch.library.register_fake("blurry_attn::step")
def _step_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state_key: Tensor,
    state_value: Tensor,
    position: Tensor,
    slots: int,
    window: list[int],
    phase: list[int],
    kernel: str,
    sharpness: float,
    scale: float,
) -> Tensor:
    state = {"state.key": state_key, "state.value": state_value, "state.position": position}
    _check_places(query, {"key": key, "value": value, **state})
    return _empty_beside(query, value.shape[3])
