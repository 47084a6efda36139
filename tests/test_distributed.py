"""Several processes give what one does: a sequence that is cut over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_accurate, make_inputs, make_state, randn, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from world import World

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)


from blurry_attn import BlurrySelfAttention, BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step
from blurry_attn.distributed import HeadParallel, context_parallel_attention, piece_start

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


def sent(whole: tuple[Tensor, ...], window: BlurryWindow) -> list[int]:
    """Bytes of each collective of a forward and a backward pass that this rank sends to every other one."""
    sizes, gather = [], dist.all_gather

    def counting(gathered: list[Tensor], x: Tensor, group: Any = None) -> Any:
        sizes.append(x.nbytes)
        return gather(gathered, x, group)

    pieces = [x.chunk(dist.get_world_size(), 2)[dist.get_rank()].clone().requires_grad_() for x in whole]
    start = piece_start(pieces[0].shape[2])
    dist.all_gather = counting
    try:
        context_parallel_attention(*pieces, window, start=start).sum().backward()
    finally:
        dist.all_gather = gather
    return sizes


def test_what_is_sent_does_not_depend_on_the_length(world: World):
    numbers = 2 * 4 * STAGGERED.slots  # sequences, kv heads, slots
    for tokens in (40, 400):
        whole = make_inputs(2, 4, None, tokens, 4, 6, dtype=torch.float32)
        assert world(sent, whole, STAGGERED) == [[numbers * (4 + 6 + 1) * 4, numbers * (4 + 6) * 4]] * world.size


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
    steps = [
        blurry_window_step(*(x[:, :, t : t + 1] for x in inputs), state, enable_gqa=True).full_tensor()
        for t in range(whole[0].shape[2])
    ]
    state = gathered(state)
    return torch.cat(steps, 2), state.key, state.value, state.position


@pytest.mark.parametrize("placements", [[B], [H], [R]], ids=repr)
def test_steps_on_dtensors_are_the_steps(placements: list[Placement], world: World):
    whole, state = make_inputs(4, 8, 4, 5, 4, 6), make_state(STAGGERED, [0, 3, 50, 777], 4, 4, 6)
    actual = world(stepped, placements, whole, state)
    steps = [blurry_window_step(*(x[:, :, t : t + 1] for x in whole), state, enable_gqa=True) for t in range(5)]
    expected = torch.cat(steps, 2), state.key, state.value, state.position
    assert all(torch.equal(x, y) for of_rank in actual for x, y in zip(of_rank, expected, strict=True))


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
