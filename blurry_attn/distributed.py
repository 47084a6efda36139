"""Many devices: a sequence cut over ranks (context parallel), the heads of a layer over ranks (tensor parallel)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from . import _C
from .modules import BlurrySelfAttention
from .ops import _check_arguments, blurry_window_attention
from .state import BlurryState
from .window import BlurryWindow, integer


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
    for name, x in (("key", key), ("value", value)):
        if x.shape[2] != query.shape[2]:
            raise ValueError(f"{name} must have as many tokens as query ({query.shape[2]}), got {x.shape[2]}")
    with torch.no_grad():  # what one process would refuse is refused before anything is sent
        q, k, v = (x[:, :, :0] for x in (query, key, value))
        blurry_window_attention(q, k, v, window, scale=scale, enable_gqa=enable_gqa, state=state)
    if start is None:
        start = piece_start(key.shape[2], group)
    elif integer("start", start) < 0:
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

    def at(contents: Tensor, position: Tensor) -> BlurryState:
        key, value = contents.split(sizes, -1)
        return BlurryState(key, value, position, window)

    # Of what lies further back than this, and of what was there before, nothing is left at this precision.
    tail = min(key.shape[2], _reach(window, key.shape[1], torch.finfo(dtype).eps))
    skipped = key.shape[2] - tail
    last_key, last_value = (x.narrow(2, skipped, tail) for x in (key, value))
    given = before if not skipped else torch.zeros_like(before)
    end = _state_after(last_key, last_value, at(given, position + skipped))
    with torch.no_grad():
        nothing = key.new_zeros((), dtype=dtype).expand(*shape[:2], tail, 1)
        one = key.new_ones(*shape, 1, dtype=dtype)
        decay = _state_after(nothing, nothing, BlurryState(one, one, position + skipped, window)).key
    carried = _Carry.apply(before, torch.cat((end.key, end.value), -1), decay, group)
    return blurry_window_attention(
        query,
        key,
        value,
        window,
        scale=scale,
        enable_gqa=enable_gqa,
        state=at(carried, position),
        return_state=return_state,
        return_lse=return_lse,
    )


@lru_cache
def _reach(window: BlurryWindow, kv_heads: int, precision: float) -> int:
    """Tokens over which every slot keeps less than ``precision`` of what it held."""
    reach = 0
    for period, phase in set(zip(window.windows(kv_heads), window.phases(kv_heads), strict=True)):
        # Of all slots open, one lap: each meets every gate of the period once.
        lap = _C.gates(window.kernel, window.slots, period, phase, window.gate_sharpness, 2 * period, period)
        echo = float(abs(1 - lap).prod(0).max())
        laps = 1 if echo == 0 else math.ceil(math.log(precision) / math.log(echo))
        reach = max(reach, laps * period)
    return reach


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
    """

    @staticmethod
    def forward(ctx: Any, before: Tensor, end: Tensor, decay: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        pieces = _all_gather(torch.cat((end, decay), -1), group)
        ctx.save_for_backward(*(piece[..., -1:] for piece in pieces))
        carried = before.clone()
        for piece in pieces[: dist.get_rank(group)]:
            carried = piece[..., :-1] + _kept(piece[..., -1:], carried)
        return carried

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rank, decays = dist.get_rank(ctx.group), ctx.saved_tensors
        gathered = _all_gather(grad, ctx.group)
        grad_end = torch.zeros_like(grad)
        for later in range(len(gathered) - 1, rank, -1):
            grad_end = gathered[later] + _kept(decays[later], grad_end)
        return (grad if rank == 0 else torch.zeros_like(grad)), grad_end, None, None


def _kept(decay: Tensor, slots: Tensor) -> Tensor:
    """decay * slots; where nothing is left, it is not read."""
    return torch.where(decay == 0, 0.0, decay * slots)


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x.contiguous(), group)
    return gathered


class HeadParallel(ParallelStyle):
    """Tensor parallel for :class:`blurry_attn.BlurrySelfAttention`, in a plan of ``parallelize_module``.

    A rank projects to some of the heads and attends over them, each through its own window; one all-reduce sums the
    output. Inputs and outputs are plain tensors, the same on every rank; a state holds the heads of its rank.

    >>> parallelize_module(model, mesh, {"layers.*.attention": HeadParallel()})

    Raises:
        TypeError: another module.
        ValueError: kv heads that do not divide evenly over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, BlurrySelfAttention):
            raise TypeError(f"HeadParallel is for BlurrySelfAttention, got {type(module).__name__}")
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()
        if module.num_kv_heads % ranks:
            raise ValueError(f"num_kv_heads must be a multiple of the {ranks} ranks, got {module.num_kv_heads}")
        projections = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(
            module, device_mesh, {**projections, "out_proj": RowwiseParallel()}, src_data_rank=self.src_data_rank
        )
        kv_heads = module.num_kv_heads // ranks
        module.window = module.window.of_heads(module.num_kv_heads, slice(rank * kv_heads, (rank + 1) * kv_heads))
        module.num_heads, module.num_kv_heads = module.num_heads // ranks, kv_heads
        return module
