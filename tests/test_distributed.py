"""Several processes give what one does: a sequence that is cut over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_accurate, make_inputs, make_state, randn, run
from torch import Tensor
from world import World

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)


from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention
from blurry_attn.distributed import context_parallel_attention, piece_start

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
