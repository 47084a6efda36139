"""Several processes give what one does: a sequence that is cut over ranks."""

from __future__ import annotations

import heapq
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import assert_accurate, make_inputs, make_state, randn, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from world import TIMEOUT, World

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)


from benchmarks.context.__main__ import DIM, HEADS, SLOTS, counted
from blurry_attn import BlurrySelfAttention, BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step
from blurry_attn.distributed import HeadParallel, context_parallel_attention, piece_start
from blurry_attn.files import claimed
from blurry_attn.lm import checkpoint
from blurry_attn.lm import train as training
from blurry_attn.lm.__main__ import main
from blurry_attn.lm.checkpoint import TrainConfig
from blurry_attn.lm.data import InputError
from blurry_attn.lm.model import ModelConfig
from blurry_attn.lm.parallel import STRATEGIES, rank, size
from blurry_attn.ops import rotary

CPU = torch.device("cpu")
STAGGERED = BlurryWindow(4, 32)


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(request.param, tmp_path_factory.mktemp("world") / "store")
    yield world
    world.close()


def at_once(lengths: list[int], whole: tuple[Tensor, ...], state: BlurryState | None, window: BlurryWindow) -> dict:
    """What `helpers.run` gives, of this rank's piece: results and gradients through all of them."""
    rank = dist.get_rank()
    pieces = [x.split(lengths, 2)[rank].clone().requires_grad_() for x in whole]
    leaves = dict(zip(("query", "key", "value"), pieces, strict=True))
    if state is not None:
        slots = [x.clone().requires_grad_() for x in (state.key, state.value)]
        state = BlurryState(*slots, state.position, window)
        if rank == 0:
            leaves |= dict(zip(("state_key", "state_value"), slots, strict=True))
    out, lse, end = context_parallel_attention(
        *pieces, window, enable_gqa=True, state=state, return_lse=True, return_state=True
    )
    shapes = {"out": (*whole[0].shape[:3], out.shape[3]), "lse": whole[0].shape[:3]}
    results = {"out": out, "lse": lse}
    cotangents = [
        randn(*shape, dtype=results[name].dtype, seed=200 + i).split(lengths, 2)[rank]
        for i, (name, shape) in enumerate(shapes.items())
    ]
    if rank == dist.get_world_size() - 1:
        results |= {"end_key": end.key, "end_value": end.value}
        cotangents += [randn(*x.shape, dtype=x.dtype, seed=202 + i) for i, x in enumerate((end.key, end.value))]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), cotangents)
    found = {name: x.detach() for name, x in results.items()}
    found |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found | ({"position": end.position} if rank == dist.get_world_size() - 1 else {})


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The pieces of each result along time; what is there once, as it is."""
    names = {name: None for part in parts for name in part}
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: xs[0] if len(xs) == 1 else torch.cat(xs, 2) for name, xs in found.items()}


# Pieces of a sequence: even, empty, shorter than a lobe, ending within openings; and longer than what a slot remembers.
MIXED = BlurryWindow(4, (4, 12, 32, 68), sharpness=3)
CONTEXTS = {
    "even": (MIXED, [40, 40, 40, 40], None),
    "uneven": (MIXED, [5, 80, 0, 61], None),
    "in a lobe": (MIXED, [3, 1, 2, 4], None),
    "empty first": (MIXED, [0, 30, 7, 0], None),
    "from a state": (MIXED, [33, 2, 50, 9], [3, 777]),
    "in the first lap": (MIXED, [2, 11, 3, 30], [0, 20]),
    "long": (BlurryWindow(4, (32, 64, 4, 16)), [900, 700, 800, 600], [5, 0]),
    "dirichlet": (BlurryWindow(4, (4, 12, 32, 44), "dirichlet"), [30, 6, 0, 90], [3, 50]),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sequence_in_pieces_is_the_sequence(name: str, dtype: torch.dtype, world: World):
    window, lengths, position = CONTEXTS[name]
    lengths = lengths if world.size == 4 else [sum(lengths[:2]), sum(lengths[2:])]
    whole = make_inputs(2, 8, 4, sum(lengths), 4, 6, dtype=dtype)
    state = None if position is None else make_state(window, position, 4, 4, 6, dtype=dtype)
    expected = run(blurry_window_attention, *whole, window, state=state)
    actual = joined(world(at_once, lengths, whole, state, window))
    assert_accurate(actual, expected, dtype, window)


def with_nan(whole: tuple[Tensor, ...], window: BlurryWindow) -> Tensor:
    pieces = [x.chunk(dist.get_world_size(), 2)[dist.get_rank()] for x in whole]
    return context_parallel_attention(*pieces, window)


def test_a_token_that_is_not_a_number_stays_where_it_is_in_one_process(world: World):
    """Gone after a gate of 1 (r <= sharpness), also if that lies on a later rank."""
    window = BlurryWindow(4, (4, 16))
    for token in (0, 33, 39, 40):
        query, key, value = make_inputs(1, 2, None, 80)
        key[:, :, token] = value[:, 0, token] = math.nan
        expected = blurry_window_attention(query, key, value, window)
        actual = torch.cat(world(with_nan, (query, key, value), window), 2)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert not actual[:, :, -20:].isnan().any()


# Echoes without end, and pieces of which the first tokens leave nothing that can be told from rounding.
ENDLESS = BlurryWindow(4, (32, 16, 4, 48), sharpness=2)


def long_ago(what: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], BlurryState | None]:
    """Inputs whose first tokens count in spite of that; lengths are the same for any number of ranks."""
    query, key, value = make_inputs(2, 8, 4, 4000, 4, 6, dtype=dtype)
    if what == "a state":
        state = make_state(ENDLESS, [500, 777], 4, 4, 6, dtype=dtype)
        state.key[0, 0, 1], state.value[1, 1, 2, 3] = math.nan, math.inf
        return (query, key, value), state
    if what == "not finite":
        key[0, :, 100], value[:, 1, 250, 2] = math.nan, math.inf
    elif what == "a first piece of other size":
        value[:, :, :1000] *= 1e12
    else:
        value *= 10.0 ** (-3 * torch.arange(4000) / 48).clamp(min=-30).to(dtype).unsqueeze(1)
    return (query, key, value), None


@pytest.mark.parametrize(
    "what", ["a state", "not finite", "a first piece of other size", "values that fall a thousandfold within a window"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_was_long_ago_counts_as_in_one_process(what: str, dtype: torch.dtype, world: World):
    whole, state = long_ago(what, dtype)
    expected = run(blurry_window_attention, *whole, ENDLESS, state=state)
    actual = joined(world(at_once, [4000 // world.size] * world.size, whole, state, ENDLESS))
    for name, x in expected.items():
        kept = x.isfinite()
        assert torch.equal(actual[name].isfinite(), kept), name
        actual[name], expected[name] = (torch.where(kept, y, 0) for y in (actual[name], x))
    assert_accurate(actual, expected, dtype, ENDLESS)


def test_what_is_sent_does_not_depend_on_the_length(world: World):
    others, numbers = world.size - 1, HEADS * SLOTS
    forward, backward = (numbers * (2 * DIM + extra) * 4 * others for extra in (1, 0))
    for tokens in (80, 800):
        assert world(counted, tokens) == [(forward, forward + backward)] * world.size


def in_groups(whole: tuple[Tensor, ...], state: BlurryState, window: BlurryWindow) -> tuple[Tensor, ...]:
    """Two groups of ranks, each with a sequence of its own; outputs with ``start`` asked for and given, and the end."""
    ranks, size = range(dist.get_world_size()), dist.get_world_size() // 2
    groups = [dist.new_group(list(members)) for members in (ranks[:size], ranks[size:])]
    which, rank = divmod(dist.get_rank(), size)
    group, own = groups[which], slice(which, which + 1)
    pieces = [x[own].tensor_split(size, 2)[rank] for x in whole]
    start = piece_start(pieces[0].shape[2], group)
    assert start == sum(x.shape[2] for x in whole[0].tensor_split(size, 2)[:rank])
    options = {"group": group, "state": state[own], "return_state": True}
    asked, _ = context_parallel_attention(*pieces, window, **options)
    given, end = context_parallel_attention(*pieces, window, start=start, **options)
    return asked, given, end.key, end.position


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_groups_of_ranks_have_sequences_of_their_own(dtype: torch.dtype, world: World):
    whole, size = make_inputs(2, 4, None, 61, dtype=dtype), world.size // 2
    state = make_state(MIXED, [0, 50], 4, dtype=dtype)
    expected, last = blurry_window_attention(*whole, MIXED, state=state, return_state=True)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    found = world(in_groups, whole, state, MIXED)
    for which in range(2):
        parts = found[which * size : (which + 1) * size]
        for outs in list(zip(*parts, strict=True))[:2]:
            torch.testing.assert_close(torch.cat(outs, 2)[0], expected[which], **tolerance)
        torch.testing.assert_close(parts[-1][2][0], last.key[which], **tolerance)
        assert parts[-1][3].tolist() == [last.position[which]]


ONE = make_inputs(1, 2, None, 5)
CALLS = {
    "key": ({"key": [1]}, TypeError, "key must be a tensor, got list"),
    "dimensions": ({"query": ONE[0][0]}, ValueError, "query must have 4 dimensions"),
    "tokens": ({"value": ONE[2][:, :, 1:]}, ValueError, r"value must have as many tokens as query \(5\), got 4"),
    "dtype": ({"key": ONE[1].float()}, TypeError, "key must have query's dtype"),
    "window": ({"window": 16}, TypeError, "window must be a BlurryWindow, got int"),
    "start": ({"start": 1.5}, TypeError, "start must be an int or None, got 1.5"),
    "before": ({"start": -1}, ValueError, "start must not be negative, got -1"),
    "state": ({"state": "x"}, TypeError, "state must be a BlurryState, got str"),
    "its window": ({"state": make_state(BlurryWindow(4, 8), [3])}, ValueError, "state must have been made with"),
    "its sequences": ({"state": make_state(STAGGERED, [3, 4])}, ValueError, "state.key must have shape"),
    "its features": ({"state": make_state(STAGGERED, [3], 2, 6, 10)}, ValueError, "state.key must have shape"),
}


def cannot_be_cut(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {**dict(zip(("query", "key", "value"), ONE, strict=True)), "window": STAGGERED, **changes}
    with pytest.raises(error, match=message):
        context_parallel_attention(**call)


@pytest.mark.parametrize("name", CALLS)
def test_a_cut_sequence_is_refused_before_anything_is_sent(name: str, world: World):
    world(cannot_be_cut, *CALLS[name])


@lru_cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def placed(x: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """A whole tensor that every rank holds, as a DTensor; differentiable."""
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim).redistribute(placements=placements)


def on_mesh(state: BlurryState, mesh: DeviceMesh, placements: list[Placement]) -> BlurryState:
    """The state as the call's placements want it: its position has no heads."""
    positions = [Replicate() if at == Shard(1) else at for at in placements]
    key, value = (placed(x, mesh, placements) for x in (state.key, state.value))
    return BlurryState(key, value, placed(state.position, mesh, positions), state.window)


def gathered(state: BlurryState) -> BlurryState:
    return BlurryState(*(x.full_tensor() for x in (state.key, state.value, state.position)), state.window)


def divided(shape: tuple[int, ...], placements: list[list[Placement]], *arguments: Any, **options: Any) -> dict:
    """What `helpers.run` gives of a call on DTensors, all of it gathered."""

    def attend(query: Tensor, key: Tensor, value: Tensor, window: BlurryWindow, *, state: Any, **options: Any) -> tuple:
        inputs = (placed(x, mesh(*shape), at) for x, at in zip((query, key, value), placements, strict=True))
        if state is not None:
            state = on_mesh(state, mesh(*shape), placements[1])
        out, lse, *end = blurry_window_attention(*inputs, window, state=state, **options)
        return out.full_tensor(), lse.full_tensor(), *map(gathered, end)

    return run(attend, *arguments, **options)


# Placements of query, key and value along each dimension of the mesh.
B, H, R = Shard(0), Shard(1), Replicate()
DIVISIONS = {
    "replicated": ([R], [R], [R]),
    "sequences": ([B], [B], [B]),
    "heads": ([H], [H], [H]),
    "query by heads": ([H], [R], [R]),
    "value by sequences": ([R], [R], [B]),
    "sequences and heads": ([B, H], [B, H], [B, H]),
    "heads twice": ([H, H], [R, H], [H, R]),
    "half of it": ([R, H], [R, R], [R, R]),
}


def mesh_shape(world: World, placements: list[Placement]) -> tuple[int, ...]:
    return (world.size,) if len(placements) == 1 else (2, world.size // 2)


@pytest.mark.parametrize("name", DIVISIONS)
def test_a_call_on_dtensors_is_the_call(name: str, world: World):
    placements = DIVISIONS[name]
    window = BlurryWindow.pyramid(4, (1, 3, 3, 8))
    whole = make_inputs(4, 8, 4, 30, 4, 6)
    state = make_state(window, [0, 3, 50, 777], 4, 4, 6)
    expected = run(blurry_window_attention, *whole, window, state=state)
    for actual in world(divided, mesh_shape(world, placements[0]), placements, *whole, window, state=state):
        assert_accurate(actual, expected, torch.float64, window)


def packed(placements: list[list[Placement]], *whole: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of packed sequences, gathered."""
    leaves = [x.clone().requires_grad_() for x in whole]
    size = dist.get_world_size()
    inputs = (placed(x, mesh(size), at) for x, at in zip(leaves, placements, strict=True))
    out = blurry_window_attention(*inputs, STAGGERED, enable_gqa=True, cu_seqlens=torch.tensor([0, 7, 7, 30]))
    return out.full_tensor().detach(), *torch.autograd.grad(out.full_tensor().square().sum(), leaves)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_ranks_that_share_a_kv_head_sum_its_gradient(kv_heads: int, world: World):
    whole = make_inputs(1, 8, kv_heads, 30)
    leaves = [x.clone().requires_grad_() for x in whole]
    out = blurry_window_attention(*leaves, STAGGERED, enable_gqa=True, cu_seqlens=torch.tensor([0, 7, 7, 30]))
    expected = out.detach(), *torch.autograd.grad(out.square().sum(), leaves)
    for actual in world(packed, [[H], [R], [R]], *whole):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def stepped(placements: list[Placement], whole: tuple[Tensor, ...], state: BlurryState) -> tuple[Tensor, ...]:
    state = on_mesh(state.clone(), mesh(dist.get_world_size()), placements)  # memory that is sent is shared
    inputs = [placed(x, state.key.device_mesh, placements) for x in whole]
    before = [x._version for x in (state.key, state.value, state.position)]
    steps = [
        blurry_window_step(*(x[:, :, t : t + 1] for x in inputs), state, enable_gqa=True).full_tensor()
        for t in range(whole[0].shape[2])
    ]
    assert all(x._version > b for x, b in zip((state.key, state.value, state.position), before, strict=True))
    state = gathered(state)
    return torch.cat(steps, 2), state.key, state.value, state.position


@pytest.mark.parametrize("placements", [[B], [H], [R]], ids=repr)
def test_steps_on_dtensors_are_the_steps(placements: list[Placement], world: World):
    whole, state = make_inputs(4, 8, 4, 5, 4, 6), make_state(STAGGERED, [0, 3, 50, 777], 4, 4, 6)
    actual = world(stepped, placements, whole, state)
    steps = [blurry_window_step(*(x[:, :, t : t + 1] for x in whole), state, enable_gqa=True) for t in range(5)]
    expected = torch.cat(steps, 2), state.key, state.value, state.position
    assert all(torch.equal(x, y) for of_rank in actual for x, y in zip(of_rank, expected, strict=True))


def compiled(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a compiled call on DTensors gives the output and gradients of the call."""
    inputs = [placed(x, mesh(dist.get_world_size()), [H]).detach().requires_grad_() for x in tensors]
    whole = torch.compile(blurry_window_attention, fullgraph=True, backend="aot_eager")
    found = []
    for attend in (blurry_window_attention, whole):
        out = attend(*inputs, STAGGERED)
        found.append([x.to_local() for x in (out, *torch.autograd.grad(out.sum(), inputs))])
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_call_on_dtensors_compiles_whole(world: World):
    assert all(world(compiled, make_inputs(2, 4, None, 30)))


T, D = Shard(2), Shard(3)
# Sequences, query heads, kv heads; where query, key, value and the slots of a state lie (None: plain); the error.
REFUSALS = {
    "plain": (4, 4, 4, (H, None, H, H), TypeError, "key must be a DTensor like the other arguments, got Tensor"),
    "plain state": (4, 4, 4, (H, H, H, None), TypeError, "state.key must be a DTensor like the other"),
    "tokens": (4, 4, 4, (T, T, T, R), NotImplementedError, "sharded along tokens: .*context_parallel_attention"),
    "head_dim": (4, 4, 4, (R, R, D, R), NotImplementedError, "sharded along head_dim: shard heads, dimension 1"),
    "unlike": (4, 4, 4, (B, H, R, H), ValueError, r"must be sharded alike, got Shard.*0.*, Shard.*1.*, Replicate"),
    "sequences": (3, 4, 4, (B, B, B, B), ValueError, "query must divide evenly over . ranks in dimension 0"),
    "heads": (4, 3, 3, (H, H, H, R), ValueError, r"query must .* in dimension 1, got shape \(4, 3, 1, 8\)"),
    "kv heads": (4, 12, 3, (H, R, R, R), ValueError, "key must divide evenly over . ranks in dimension 1"),
    "shared": (4, 4, 1, (H, R, R, R), NotImplementedError, "a state cannot be divided over . ranks by its 1 kv heads"),
    "state": (4, 4, 4, (H, H, H, B), ValueError, "state.key must have placements .* to be updated in place, got"),
}


def is_refused(
    batch: int, heads: int, kv_heads: int, placements: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    def lying(x: Tensor, at: Placement | None) -> Tensor:
        return x if at is None else placed(x, mesh(dist.get_world_size()), [at])

    state = make_state(STAGGERED, [0] * batch, kv_heads)
    tensors = (*make_inputs(batch, heads, kv_heads, 1), state.key, state.value)
    query, key, value, *slots = (lying(x, at) for x, at in zip(tensors, (*placements, placements[-1]), strict=True))
    position = lying(state.position, R if placements[-1] == H else placements[-1])
    with pytest.raises(error, match=message):
        blurry_window_step(query, key, value, BlurryState(*slots, position, STAGGERED), enable_gqa=True)


@pytest.mark.parametrize("name", REFUSALS)
def test_dtensors_that_cannot_be_attended_are_refused(name: str, world: World):
    world(is_refused, *REFUSALS[name])


def layer() -> BlurrySelfAttention:
    torch.manual_seed(0)
    window = BlurryWindow(4, 16)  # the phases of all heads differ
    return BlurrySelfAttention(32, 8, window, 4, bias=True, rope_base=100.0, dtype=torch.float64)


def attended(attention: BlurrySelfAttention, x: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    """Outputs of reading, reading on and a step, gradients of input and weights, and the state's shape."""
    x = x.clone().requires_grad_()
    first, state = attention(x, key_padding_mask=padding, return_state=True)
    second, state = attention(x, state=state, return_state=True)
    grads = torch.autograd.grad((first * second).sum(), (x, *attention.parameters()))
    with torch.no_grad():
        third = attention.step(x[:, :1], state.detach())
    names = ("x", *(name for name, _ in attention.named_parameters()))
    grads = (grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads)
    return {"out": torch.cat((first, second, third), 1).detach(), **dict(zip(names, grads, strict=True))}


def by_heads(x: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    module = nn.Sequential(layer())
    size = dist.get_world_size()
    parallelize_module(module, mesh(size), {"*": HeadParallel()})
    assert module[0](x, return_state=True)[1].kv_heads == 4 // size
    return attended(module[0], x, padding)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_layer_by_heads_is_the_layer(padded: bool, world: World):
    x, padding = randn(2, 20, 32), None
    if padded:
        padding = torch.zeros(2, 20, dtype=torch.bool)
        padding[0, :5] = padding[1, 7:9] = True
    expected = attended(layer(), x, padding)
    for actual in world(by_heads, x, padding):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def by_columns(x: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
    module = layer()
    columns = {name: ColwiseParallel(use_local_output=False) for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(module, mesh(dist.get_world_size()), {**columns, "out_proj": RowwiseParallel()})
    return attended(module, x, padding)


def test_the_usual_plan_of_tensor_parallel_is_the_layer(world: World):
    """With rotary positions, and states that are DTensors."""
    x = randn(2, 20, 32)
    expected = attended(layer(), x, None)
    for actual in world(by_columns, x, None):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def local_columns() -> None:
    module = layer()
    parallelize_module(module, mesh(dist.get_world_size()), {"q_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"q_proj must give 8 \* 4 features, got .*HeadParallel"):
        module(randn(2, 20, 32))


def test_a_plan_that_cuts_heads_unseen_names_the_one_to_use(world: World):
    world(local_columns)


def turned(x: Tensor, placements: list[Placement], positions: Tensor) -> Tensor:
    return rotary(placed(x, mesh(dist.get_world_size()), placements), positions, 100.0).full_tensor()


@pytest.mark.parametrize("placements", [[B], [H], [R]], ids=repr)
def test_rotary_of_a_dtensor_is_that_of_the_tensor(placements: list[Placement], world: World):
    x = randn(4, 8, 5, 6)
    for positions in (torch.arange(5), torch.arange(20).view(4, 5)):
        expected = rotary(x, positions, 100.0)
        assert all(torch.equal(actual, expected) for actual in world(turned, x, placements, positions))


def mixed(kind: str, x: Tensor, policy: dict[str, torch.dtype], state_dtype: torch.dtype) -> list[Tensor]:
    """Outputs of two pieces and a step, the state's position, and a gradient, in FSDP's mixed precision."""
    module = layer().float()
    if kind == "FSDP":
        policy = {name: dtype for name, dtype in policy.items() if name == "param_dtype"}  # it knows no other
        module = FullyShardedDataParallel(
            module, device_id=CPU, mixed_precision=MixedPrecision(**policy), use_orig_params=True
        )
        step = None
    elif kind == "fully_shard":
        fully_shard(module, mesh=mesh(dist.get_world_size()), mp_policy=MixedPrecisionPolicy(**policy))
        register_fsdp_forward_method(module, "step")
        step = module.step
    else:
        step = module.step
    first, state = module(x, return_state=True)
    second, state = module(x, state=state, return_state=True)
    loss = first.float().square().mean() + second.float().square().mean()
    loss.backward()
    held, results = (
        state.detach().to(dtype=state_dtype, copy=True),
        [first, second, state.key, state.value, state.position],
    )
    assert type(state) is BlurryState and state.key.dtype == torch.float32
    if step is not None:
        with torch.no_grad():
            results += [step(x[:, :1], held), held.to(torch.float32).key, held.position]
    return [x.detach().float() for x in results]


@pytest.mark.parametrize("kind", ["fully_shard", "FSDP"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [("param_dtype",), ("output_dtype",), ("param_dtype", "output_dtype")], ids=str)
def test_states_pass_mixed_precision_as_they_are(
    kind: str, state_dtype: torch.dtype, names: tuple[str, ...], world: World
):
    """Nothing of them is cast, and a step advances the caller's own."""
    x, policy = randn(2, 20, 32, dtype=torch.float32), dict.fromkeys(names, torch.bfloat16)
    expected = mixed("", x, {}, state_dtype)
    for actual in world(mixed, kind, x, policy, state_dtype):
        for ours, theirs in zip(actual, expected[: len(actual)], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.03)


def heads_are_refused() -> None:
    for module, error, message in (
        (nn.Linear(4, 4), TypeError, "HeadParallel is for BlurrySelfAttention, got Linear"),
        (BlurrySelfAttention(12, 3, STAGGERED), ValueError, "num_kv_heads must be a multiple of the . ranks, got 3"),
    ):
        with pytest.raises(error, match=message):
            parallelize_module(module, mesh(dist.get_world_size()), HeadParallel())


def test_a_layer_that_does_not_divide_by_heads_is_refused(world: World):
    world(heads_are_refused)


SMALL = ModelConfig(dim=32, layers=2, slots=8, resolutions=(1, 1, 4, 4))


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Batches of 3 sequences, which divide over neither 2 nor 4 processes."""
    text = tmp_path_factory.mktemp("text") / "text.py"
    text.write_bytes(Path(heapq.__file__).read_bytes())
    return TrainConfig(text=str(text), context=32, batch=3, steps=8, learning_rate=1e-2, threads=1)


def trained(
    mixer: str, schedule: TrainConfig, folder: Path, strategy: str = "ddp", stop: int | None = None
) -> float | None:
    """Held-out bits per byte; None where the last process was interrupted at step ``stop``."""

    step = training.train_step

    def interrupted(*arguments: Any) -> dict[str, float]:
        if arguments[4] + 1 == stop and rank() == size() - 1:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    with mock.patch.object(training, "train_step", interrupted):
        try:
            return training.train(replace(SMALL, mixer=mixer), schedule, folder, CPU, strategy).bits
        except training.Interrupted:
            return None


@cache
def alone(mixer: str, schedule: TrainConfig) -> tuple[list[dict], dict[str, Tensor]]:
    with TemporaryDirectory() as folder:
        trained(mixer, schedule, Path(folder))
        return outcome(Path(folder))


def outcome(folder: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """Its numbers at every step, without durations, and its checkpoint."""
    lines = [json.loads(line) for line in (folder / training.METRICS).read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines, checkpoint.load(folder).tensors


@pytest.mark.parametrize(
    ("strategy", "mixer"), [(strategy, "blurry") for strategy in STRATEGIES] + [("tensor", "full")]
)
def test_processes_train_as_one_does(strategy: str, mixer: str, schedule: TrainConfig, world: World, tmp_path: Path):
    """Every loss and every validation, to 1e-5; one process goes on from the checkpoint of many, and many from its."""
    assert world(trained, mixer, schedule, tmp_path, strategy, stop=3) == [None] * world.size
    assert trained(mixer, schedule, tmp_path, stop=5) is None
    bits = world(trained, mixer, schedule, tmp_path, strategy)
    (lines, tensors), (expected, one) = outcome(tmp_path), alone(mixer, schedule)
    assert lines == [pytest.approx(line, rel=1e-5) for line in expected]
    assert bits == [lines[-1]["validation_bits"]] * world.size
    assert {name: x.shape for name, x in tensors.items()} == {name: x.shape for name, x in one.items()}


def is_told(schedule: TrainConfig, folder: Path) -> None:
    with pytest.raises(InputError, match=r"--parallel tensor: 1 heads do not divide evenly over . processes"):
        training.train(replace(SMALL, resolutions=(4,)), schedule, folder, CPU, "tensor")
    assert not folder.exists()


def test_heads_that_do_not_divide_are_told(schedule: TrainConfig, world: World, tmp_path: Path):
    world(is_told, schedule, tmp_path / "run")


def is_claimed(schedule: TrainConfig, folder: Path) -> None:
    with pytest.raises(InputError, match=f"--run {folder}: another process is training there"):
        training.train(SMALL, schedule, folder, CPU)


def test_a_folder_in_which_another_trains_is_told_to_all(schedule: TrainConfig, world: World, tmp_path: Path):
    with claimed(tmp_path, training.METRICS):
        world(is_claimed, schedule, tmp_path)


SHAPE = ["--dim", "16", "--layers", "1", "--context", "32", "--steps", "8", "--device", "cpu", "--threads", "1"]

CRASH = """
import os, sys
from blurry_attn.lm import __main__, train
step = train.train_step
def crash(*arguments):
    if os.environ["RANK"] == "1" and arguments[4] == 4:
        os._exit(7)
    return step(*arguments)
train.train_step = crash
sys.exit(__main__.main())
"""


LATE = """
import sys, time, torch
from blurry_attn.lm import __main__
train = __main__.train
def late(*arguments):
    result = train(*arguments)
    torch.distributed.all_reduce(torch.zeros(1), async_op=True).get_future().then(lambda _: time.sleep(1))
    return result
__main__.train = late
sys.exit(__main__.main())
"""


def launch(program: list[str], options: list[str], schedule: TrainConfig, folder: Path) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = ["--text", str(schedule.text), "--run", str(folder)]
    command = [*torchrun, *program, "train", *SHAPE, *options, *files]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.mark.parametrize("options", [[], ["--parallel", "fsdp"]], ids=str)
def test_torchrun_trains_and_ends(options: list[str], schedule: TrainConfig, tmp_path: Path):
    """The first prints and writes, with the losses of one process."""
    done = launch(["-m", "--", "blurry_attn.lm"], options, schedule, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("step 8: held-out bits per byte") == done.stdout.count("to sample:") == 1
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert written == {checkpoint.FILE, training.METRICS, training.PLOT}
    assert main(["train", *SHAPE, "--text", str(schedule.text), "--run", str(tmp_path / "alone")]) == 0
    lines, expected = (outcome(tmp_path / name)[0] for name in ("run", "alone"))
    assert lines == [pytest.approx(line, rel=1e-5) for line in expected]


def test_a_crash_under_torchrun_ends_all(schedule: TrainConfig, tmp_path: Path):
    """What was saved is whole."""
    (tmp_path / "crash.py").write_text(CRASH)
    done = launch(["--", str(tmp_path / "crash.py")], [], schedule, tmp_path / "run")
    assert done.returncode != 0 and "exitcode  : 7" in done.stderr, done.stderr
    assert checkpoint.load(tmp_path / "run").step == 4


def test_a_late_thread_of_gloo_aborts_nothing(schedule: TrainConfig, tmp_path: Path):
    (tmp_path / "late.py").write_text(LATE)
    done = launch(["--", str(tmp_path / "late.py")], ["--parallel", "fsdp"], schedule, tmp_path / "run")
    assert done.returncode == 0, done.stderr
