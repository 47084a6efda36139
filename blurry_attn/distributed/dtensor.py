"""Calls on DTensors: every rank attends over its own sequences and heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from ..state import BlurryState
from ..window import BlurryWindow

# These are the dimensions of query, key and value.
SEQUENCES, HEADS, TOKENS, FEATURES = range(4)


def attend(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    *,
    state: BlurryState | None,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    return_state: bool,
    **options: Any,
) -> Any:
    """``function``, :func:`blurry_attn.blurry_window_attention`, on this rank's part of DTensors; DTensors again.

    Along each dimension of the mesh, query, key and value are sharded by sequences (dimension 0), by heads (1) or not
    at all. One that is replicated is cut as the others are, a partial one is summed first. Where there are fewer kv
    heads than ranks, several ranks read the same one. ``cu_seqlens`` may be a plain tensor.

    Raises:
        TypeError: a plain tensor among DTensors.
        ValueError: unlike meshes or placements; sequences or heads that do not divide evenly over the ranks.
        NotImplementedError: sharded along tokens or head_dim; a state whose kv heads several ranks share, or
            of bfloat16.
    """
    division = _divide(query, key, value, window, state, return_state)

    def local(
        query: Tensor, key: Tensor, value: Tensor, state: BlurryState | None, cu_seqlens: Tensor | None
    ) -> tuple[Any, ...]:
        results = function(
            query,
            key[:, division.kv_heads],
            value[:, division.kv_heads],
            division.window,
            state=None if state is None else _with_window(state, division.window),
            cu_seqlens=cu_seqlens,
            return_lse=return_lse,
            return_state=return_state,
            **options,
        )
        return results if isinstance(results, tuple) else (results,)

    given = (None,) if state is None else division.of_state
    lengths = None if cu_seqlens is None else division.whole
    results = local_map(
        local,
        out_placements=(division.query, *[division.query] * return_lse, *division.of_state * return_state),
        in_placements=(division.query, division.kv, division.kv, *given, lengths),
        in_grad_placements=(division.query, division.kv_grad, division.kv_grad, *given, lengths),
        redistribute_inputs=True,
    )(query, key, value, state, cu_seqlens)
    if return_state:
        results = (*results[:-1], _with_window(results[-1], window))
    return results if len(results) > 1 else results[0]


def step(
    function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, state: BlurryState, **options: Any
) -> Tensor:
    """``function``, :func:`blurry_attn.blurry_window_step`, on this rank's part of DTensors; a DTensor again.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`attend`; and a state that does not lie as it is needed.
    """
    division = _divide(query, key, value, state.window, state, return_state=True)
    for name, placements in zip(("key", "value", "position"), division.of_state, strict=True):
        found = getattr(state, name).placements
        if found != placements:
            raise ValueError(f"state.{name} must have placements {placements} to be updated in place, got {found}")

    def local(query: Tensor, key: Tensor, value: Tensor, state: BlurryState) -> tuple[Tensor]:
        return (function(query, key, value, _with_window(state, division.window), **options),)

    (out,) = local_map(
        local,
        out_placements=(division.query,),
        in_placements=(division.query, division.kv, division.kv, *division.of_state),
        redistribute_inputs=True,
    )(query, key, value, state)
    # The step wrote to the parts, and a backward may have saved the whole.
    torch.autograd.graph.increment_version((state.key, state.value, state.position))
    return out


def turn(function: Callable[..., Tensor], x: Tensor, positions: Tensor, base: float) -> Tensor:
    """``function``, :func:`blurry_attn.ops.rotary`, on this rank's part of a DTensor; a DTensor again.

    Raises:
        NotImplementedError: sharded along tokens or head_dim.
    """
    assert isinstance(x, DTensor)
    mesh = x.device_mesh
    if not isinstance(positions, DTensor):
        positions = DTensor.from_local(positions, mesh, [Replicate()] * mesh.ndim)
    cuts = [_cut([placement]) for placement in x.placements]
    placements = tuple(Replicate() if cut is None else Shard(cut) for cut in cuts)
    of_positions = tuple(Shard(0) if cut == SEQUENCES and positions.dim() == 2 else Replicate() for cut in cuts)
    turned: Tensor = local_map(
        lambda x, positions: function(x, positions, base),
        out_placements=list(placements),
        in_placements=(placements, of_positions),
        redistribute_inputs=True,
    )(x, positions)
    return turned


Placements = tuple[Placement, ...]


@dataclass(frozen=True)
class _Division:
    """Placements of a call's tensors, and which of the kv heads that a rank holds it reads, through which window."""

    query: Placements
    kv: Placements
    kv_grad: Placements
    of_state: tuple[Placements, Placements, Placements]
    whole: Placements
    kv_heads: slice
    window: BlurryWindow


def _divide(
    query: Tensor, key: Tensor, value: Tensor, window: BlurryWindow, state: BlurryState | None, return_state: bool
) -> _Division:
    arguments = {"query": query, "key": key, "value": value}
    if state is not None:
        if state.flux is not None:
            raise NotImplementedError("state must not be in bfloat16 among DTensors; state.to(torch.float32)")
        arguments |= {"state.key": state.key, "state.value": state.value, "state.position": state.position}
    tensors: dict[str, DTensor] = {}
    for name, tensor in arguments.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor like the other arguments, got {type(tensor).__name__}")
        tensors[name] = tensor
    mesh = tensors["query"].device_mesh
    for name, tensor in tensors.items():
        if tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on query's device mesh {mesh}, got {tensor.device_mesh}")
    given = [tensors[name].placements for name in ("query", "key", "value")]
    cuts = [_cut([placements[dim] for placements in given]) for dim in range(mesh.ndim)]

    # A dimension is cut into so many parts, and this rank has the one of this index.
    parts, part = {SEQUENCES: 1, HEADS: 1}, {SEQUENCES: 0, HEADS: 0}
    for dim, cut in enumerate(cuts):
        if cut is not None:
            parts[cut] *= mesh.size(dim)
            part[cut] = part[cut] * mesh.size(dim) + mesh.get_local_rank(dim)
    kv_heads, ranks = key.shape[1], parts[HEADS]
    is_shared = 0 < kv_heads < ranks and ranks % kv_heads == 0
    if is_shared and (return_state or state is not None):
        raise NotImplementedError(f"a state cannot be divided over {ranks} ranks by its {kv_heads} kv heads")

    def at(heads: Placement) -> Placements:
        kinds: dict[int | None, Placement] = {SEQUENCES: Shard(SEQUENCES), HEADS: heads, None: Replicate()}
        return tuple(kinds[cut] for cut in cuts)

    by_head, by_sequence = at(Shard(HEADS)), at(Replicate())
    kv = by_sequence if is_shared else by_head
    of_state = (by_head, by_head, by_sequence)
    for (name, tensor), placements in zip(tensors.items(), (by_head, kv, kv, *of_state), strict=False):
        for dim in {placement.dim for placement in placements if isinstance(placement, Shard)}:
            if tensor.shape[dim] % parts[dim]:
                raise ValueError(
                    f"{name} must divide evenly over {parts[dim]} ranks in dimension {dim}, "
                    f"got shape {tuple(tensor.shape)}"
                )
    first = part[HEADS] * kv_heads // ranks
    own = slice(first, first + max(1, kv_heads // ranks))
    return _Division(
        query=by_head,
        kv=kv,
        kv_grad=at(Partial()) if is_shared else by_head,
        of_state=of_state,
        whole=(Replicate(),) * mesh.ndim,
        kv_heads=own if is_shared else slice(None),
        window=window.of_heads(kv_heads, own),
    )


def _cut(placements: Sequence[Placement]) -> int | None:
    """What query, key and value are cut by along one dimension of the mesh."""
    dims = {placement.dim for placement in placements if isinstance(placement, Shard)}
    if TOKENS in dims:
        raise NotImplementedError(
            "query, key and value must not be sharded along tokens: each rank's piece of a sequence goes to "
            "blurry_attn.distributed.context_parallel_attention"
        )
    if FEATURES in dims:
        raise NotImplementedError("query, key and value must not be sharded along head_dim: shard heads, dimension 1")
    if len(dims) > 1:
        raise ValueError(f"query, key and value must be sharded alike, got {', '.join(map(repr, placements))}")
    return dims.pop() if dims else None


def _with_window(state: BlurryState, window: BlurryWindow) -> BlurryState:
    return BlurryState(state.key, state.value, state.position, window)
