"""Context parallel: a sequence that is cut over ranks, of which each holds one piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import geometry
from ..ops import _check_arguments, blurry_window_attention
from ..ragged import shapes_may_depend_on
from ..state import BlurryState
from ..window import BlurryWindow


def piece_start(tokens: int, group: dist.ProcessGroup | None = None) -> int:
    """Where this rank's piece of a sequence starts: the tokens that the ranks before it hold. A collective call.

    Args:
        tokens: the length of this rank's piece; lengths may differ, and be 0.
        group: the ranks that share the sequence, in its order; all when None.
    """
    lengths: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(lengths, tokens, group)
    return sum(lengths[: dist.get_rank(group)])


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    *,
    group: dist.ProcessGroup | None = None,
    start: int | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    state: BlurryState | None = None,
    return_state: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`blurry_attn.blurry_window_attention` over a sequence that is cut over the ranks of ``group``.

    Every rank calls it with its piece, in the order of the sequence, and gets what one process would give for these
    tokens. All ranks compress their pieces at once; one all-gather of the slots, N (Dk + Dv + 1) numbers per sequence
    and kv head, then tells each what its piece starts from. The backward pass makes one more, of N (Dk + Dv) numbers:
    if one rank runs it, all must.

    Args:
        query: (B, Hq, T, Dk), the T tokens of this rank; T may differ between ranks, and be 0.
        key: (B, Hkv, T, Dk).
        value: (B, Hkv, T, Dv).
        window: as for one process.
        group: the ranks that share the sequence; all when None.
        start: tokens before this piece in the sequence; asked of the others (:func:`piece_start`) when None.
        scale: of the logits; 1 / sqrt(Dk) when None.
        enable_gqa: allow Hq > Hkv.
        state: what came before the whole sequence. Every rank gives its positions; the slots are read, and get their
            gradient, on the first rank.
        return_state: return the state after this piece too, not in bfloat16; the last rank's is that of the whole
            sequence.
        return_lse: return the log-sum-exp of the logits too.

    Returns, Raises:
        as :func:`blurry_attn.blurry_window_attention`.
    """
    _check_arguments(query, key, value, window, enable_gqa)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[2] != query.shape[2]:
            raise ValueError(f"{name} must have as many tokens as query ({query.shape[2]}), got {tensor.shape[2]}")
    # A call without tokens refuses what one process would refuse, before anything is sent.
    with torch.no_grad():
        empty_query, empty_key, empty_value = (tensor[:, :, :0] for tensor in (query, key, value))
        blurry_window_attention(
            empty_query, empty_key, empty_value, window, scale=scale, enable_gqa=enable_gqa, state=state
        )
    if start is None:
        start = piece_start(key.shape[2], group)
    elif isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"start must be an int or None, got {start!r}")
    elif start < 0:
        raise ValueError(f"start must not be negative, got {start}")
    shape, dtype = (*key.shape[:2], window.slots), torch.promote_types(key.dtype, torch.float32)
    if state is None or dist.get_rank(group) > 0:
        before = key.new_zeros(*shape, key.shape[3] + value.shape[3], dtype=dtype)
    else:
        before = torch.cat(state._contents(), -1).to(dtype)
    position = torch.full(shape[:1], start, device=key.device)
    if state is not None:
        position = position + state.position
    sizes = [key.shape[3], value.shape[3]]

    def as_state(contents: Tensor, position: Tensor) -> BlurryState:
        key, value = contents.split(sizes, -1)
        return BlurryState(key, value, position, window)

    echoes = _echoes(window, key.shape[1])

    def compress(first: int) -> Tensor:
        """What the piece's tokens from ``first`` on make of ``before``: (B, Hkv, N, Dk + Dv)."""
        given = torch.zeros_like(before) if first else before
        end = _state_after(key[:, :, first:], value[:, :, first:], as_state(given, position + first))
        return torch.cat((end.key, end.value), -1)

    first = _first_that_counts(window, echoes, key.shape[2], dtype)
    end = compress(first)
    if first and any(echoes) and not _outweighs(end, before, key[:, :, :first], value[:, :, :first]):
        first, end = 0, compress(0)
    with torch.no_grad():
        nothing = key.new_zeros((), dtype=dtype).expand(*shape[:2], key.shape[2] - first, 1)
        one = key.new_ones(*shape, 1, dtype=dtype)
        decay = _state_after(nothing, nothing, BlurryState(one, one, position + first, window)).key
        laps = (first // head_window for head_window in window.windows(key.shape[1]))
        decay = decay * _per_head(one, [echo**count for echo, count in zip(echoes, laps, strict=True)])
        endless = _per_head(one, [echo > 0 for echo in echoes]).bool()
    carried = _Carry.apply(before, end, decay, endless, group)
    return blurry_window_attention(
        query,
        key,
        value,
        window,
        scale=scale,
        enable_gqa=enable_gqa,
        state=as_state(carried, position),
        return_state=return_state,
        return_lse=return_lse,
    )


@lru_cache
def _echoes(window: BlurryWindow, kv_heads: int) -> tuple[float, ...]:
    """The share that the slots of each kv head keep over a lap (:func:`blurry_attn.geometry.echo`)."""

    @cache
    def echo(head_window: int, phase: int) -> float:
        return geometry.echo(window.kernel, window.slots, head_window, phase, window.gate_sharpness)

    return tuple(map(echo, window.windows(kv_heads), window.phases(kv_heads)))


def _first_that_counts(window: BlurryWindow, echoes: tuple[float, ...], tokens: int, dtype: torch.dtype) -> int:
    """The index of the first of ``tokens`` tokens that counts: of all before, less than the precision squared is left.

    A multiple of the laps of every head whose echo has no end, over which it is a power.
    """
    reach, lap = 0, 1
    for echo, head_window in zip(echoes, window.windows(len(echoes)), strict=True):
        if echo > 0:
            reach = max(reach, head_window * math.ceil(2 * math.log(torch.finfo(dtype).eps) / math.log(echo)))
            lap = math.lcm(lap, head_window)
        else:
            reach = max(reach, head_window)
    return max(0, tokens - reach) // lap * lap


@torch.no_grad()
def _outweighs(end: Tensor, before: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the least slot of ``end`` surely outweighs what is left of ``before`` and these keys and values.

    Not so where they hold a NaN or an infinity, which an echo keeps, nor where nobody can know: without numbers, and
    while a program or a CUDA graph is recorded.
    """
    if not (key.numel() and value.numel() and shapes_may_depend_on(key)):
        return False
    if key.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    sizes, eps = [key.shape[3], value.shape[3]], torch.finfo(end.dtype).eps
    is_less = [
        torch.maximum(old.abs().amax((2, 3)), new.abs().amax((2, 3))) * eps <= slots.abs().amax(3).amin(2)
        for old, new, slots in zip(before.split(sizes, -1), (key, value), end.split(sizes, -1), strict=True)
    ]
    return bool(torch.stack(is_less).all())


def _per_head(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """(Hkv, 1, 1), without a copy to the device, which a CUDA graph could not hold."""
    return torch.stack([like.new_full((1, 1), number) for number in numbers])


def _state_after(key: Tensor, value: Tensor, state: BlurryState) -> BlurryState:
    """The state after ``key`` and ``value``; nobody asks, so the queries are one zero."""
    query = key.new_zeros(()).expand_as(key)
    _, end = cast(
        tuple[Tensor, BlurryState],
        blurry_window_attention(query, key, value, state.window, state=state, return_state=True),
    )
    return end


class _Carry(torch.autograd.Function):
    """(before, end, decay) of every rank's piece, (B, Hkv, N, D) and (B, Hkv, N, 1) -> what this rank's slots hold at
    its start. ``end`` is what the piece makes of ``before``: zero but on the first rank, to which ``before`` returns.
    ``endless`` (Hkv, 1, 1) says whose echo has no end.
    """

    @staticmethod
    def forward(
        ctx: Any, before: Tensor, end: Tensor, decay: Tensor, endless: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.group, ctx.endless = group, endless
        pieces = _all_gather(torch.cat((end, decay), -1), group)
        ctx.save_for_backward(*(piece[..., -1:] for piece in pieces))
        carried = before.clone()
        for piece in pieces[: dist.get_rank(group)]:
            carried = piece[..., :-1] + _kept(piece[..., -1:], carried, endless)
        return carried

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rank, decays = dist.get_rank(ctx.group), ctx.saved_tensors
        gathered = _all_gather(grad, ctx.group)
        grad_end = torch.zeros_like(grad)
        for later in range(len(gathered) - 1, rank, -1):
            grad_end = gathered[later] + _kept(decays[later], grad_end, ctx.endless)
        return (grad if rank == 0 else torch.zeros_like(grad)), grad_end, None, None, None


def _kept(decay: Tensor, slots: Tensor, endless: Tensor) -> Tensor:
    """decay * slots; where nothing is left it is not read, unless that is by underflow, which a NaN outlives."""
    return torch.where((decay == 0) & ~endless, 0.0, decay * slots)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all ranks, in their order; all have one shape."""
    like = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    gathered = [torch.empty_like(like) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.contiguous(), group)
    return gathered
