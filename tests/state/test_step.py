"""A step is the whole, one token at a time."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import HALVES, KERNELS, assert_accurate, make_inputs, make_state, relative_error, run, shut_slots

from blurry_attn import BlurrySelfAttention, BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step

WINDOW = BlurryWindow(4, (12, 20), phase=(2, 0))
PYRAMID = {kernel: BlurryWindow.pyramid(5, (1, 4, 9), kernel) for kernel in KERNELS}


def steps(inputs, state, **options):
    with torch.no_grad():
        outs = [
            blurry_window_step(*(x[:, :, t : t + 1] for x in inputs), state, **options)
            for t in range(inputs[0].shape[2])
        ]
    return torch.cat(outs, 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("position", [(0, 0), (3, 41)], ids=str)
def test_steps_equal_whole(kernel, dtype, position, device):
    window = PYRAMID[kernel]
    inputs = make_inputs(2, 6, 3, 70, 8, 5, dtype, device)
    state = make_state(window, position, 3, 8, 5, dtype, device)
    whole = run(blurry_window_attention, *inputs, window, state=state, gradients=False, scale=0.4)
    out = steps(inputs, state, enable_gqa=True, scale=0.4)
    assert out.dtype == dtype
    found = {"out": out, "end_key": state.key, "end_value": state.value, "position": state.position}
    assert_accurate(found, {name: whole[name] for name in found}, dtype, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(kernel, dtype, device):
    """The state stays float32: a step rounds its output and nothing else."""
    window = BlurryWindow(6, 24, kernel)
    inputs = make_inputs(2, 2, tokens=60, dtype=dtype, device=device)
    state = BlurryState.empty(2, 2, 8, window=window, device=device)
    out = steps(inputs, state)
    exact = blurry_window_attention(*(x.double() for x in inputs), window, return_state=True)
    assert out.dtype == dtype and state.key.dtype == torch.float32
    assert relative_error(out, exact[0].to(dtype)) <= 2 * torch.finfo(dtype).eps
    assert relative_error(state.key, exact[1].key) <= 1e-5


def test_in_place_through_views(device):
    """The state's own memory is written, also where it is a part of a larger one."""
    window = BlurryWindow(4, 16)
    inputs = [x[:, :, :1] for x in make_inputs(dtype=torch.float32, device=device)]
    whole = make_state(window, [7, 8, 9, 10], dtype=torch.float32, device=device)
    part = BlurryState(whole.key[1:3], whole.value[1:3], whole.position[1:3], window)
    alone, before = part.clone(), whole.clone()
    out = blurry_window_step(*inputs, part)
    assert torch.equal(out, blurry_window_step(*inputs, alone))
    assert torch.equal(whole.key[1:3], alone.key) and whole.position.tolist() == [7, 9, 10, 10]
    assert torch.equal(whole.key[::3], before.key[::3]) and torch.equal(whole.value[::3], before.value[::3])


def test_then_whole_again(device):
    """Prefill, steps, prefill: a chat's second turn."""
    window = PYRAMID["fejer"]
    inputs = make_inputs(2, 3, tokens=90, device=device)
    first, middle, last = ([x[:, :, a:b] for x in inputs] for a, b in ((0, 33), (33, 50), (50, 90)))
    out, state = blurry_window_attention(*first, window, return_state=True)
    outs = [out, steps(middle, state)]
    out, state = blurry_window_attention(*last, window, state=state, return_state=True)
    whole = run(blurry_window_attention, *inputs, window, gradients=False)
    found = {"out": torch.cat([*outs, out], 2), "end_key": state.key, "position": state.position}
    assert_accurate(found, {name: whole[name] for name in found}, torch.float64, window)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_position_of_two_windows(kernel, device):
    """Each slot opens, stands and is replaced at its time: one step from each position."""
    window, positions = BlurryWindow(4, (8, 28), kernel), list(range(57))
    inputs = make_inputs(57, 2, None, 1, 8, device=device)
    state = make_state(window, positions, device=device)
    whole = run(blurry_window_attention, *inputs, window, state=state, gradients=False)
    found = {"out": blurry_window_step(*inputs, state)}
    found |= {"end_key": state.key, "end_value": state.value, "position": state.position}
    assert_accurate(found, {name: whole[name] for name in found}, torch.float64, window)


SHAPES = {  # slots, (query heads, kv heads), head_dim, value_dim: of the CUDA kernel, one of each kind
    "few elements": (5, (2, 1), 3, 1),
    "a block's slots": (64, (2, 2), 64, 64),
    "twice a block's slots": (128, (4, 2), 128, 128),
    "a remainder of slots": (70, (2, 2), 64, 64),
    "unlike sizes": (33, (3, 3), 40, 96),
    "many queries": (64, (33, 1), 64, 64),
    "wide": (70, (2, 1), 200, 256),
    "widest": (20, (9, 1), 512, 510),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, kernel, device):
    slots, heads, dim, value_dim = SHAPES[shape]
    window = BlurryWindow(slots, 6 * slots, kernel)
    inputs = make_inputs(3, *heads, 4, dim, value_dim, dtype, device)
    state = make_state(window, (0, 3 * slots, 10**10), heads[1], dim, value_dim, dtype, device)
    exact = run(
        blurry_window_attention,
        *(x.cpu().double() for x in inputs),
        window,
        state=state.to("cpu", torch.float64),
        gradients=False,
    )
    out = steps(inputs, state, enable_gqa=True)
    assert state.position.tolist() == exact["position"].tolist()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(out, exact["out"].to(dtype)) <= (2 * torch.finfo(dtype).eps if dtype in HALVES else bound)
    assert relative_error(state.key, exact["end_key"]) <= bound
    assert relative_error(state.value, exact["end_value"]) <= bound


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("slots, dim", [(5, 8), (64, 64), (128, 128), (70, 200)])
def test_layouts_give_the_same_bits(slots, dim, kernel, device):
    window = BlurryWindow(slots, 4 * slots, kernel)
    inputs = [x[:, :, :1].contiguous() for x in make_inputs(2, 4, 2, 1, dim, dtype=torch.bfloat16, device=device)]
    state = make_state(window, [7 * slots, 2], dim=dim, dtype=torch.bfloat16, device=device)
    strided = BlurryState(state.key.mT.contiguous().mT, state.value.mT.contiguous().mT, state.position.clone(), window)
    memory = strided.key.data_ptr(), strided.value.data_ptr(), strided.position.data_ptr()
    out = blurry_window_step(*inputs, state, enable_gqa=True)
    wide = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in inputs]
    assert torch.equal(blurry_window_step(*wide, strided, enable_gqa=True), out)
    assert torch.equal(strided.key, state.key) and torch.equal(strided.value, state.value)
    assert memory == (strided.key.data_ptr(), strided.value.data_ptr(), strided.position.data_ptr())


def test_a_lazy_clone_is_not_written(device):
    window = BlurryWindow(5, 20)
    inputs = make_inputs(2, 2, tokens=1, dtype=torch.float32, device=device)
    state = make_state(window, [50, 2], dtype=torch.float32, device=device)
    before = state.clone()
    lazy = BlurryState(*(torch._lazy_clone(x) for x in (state.key, state.value, state.position)), window)
    out = blurry_window_step(*inputs, lazy)
    assert all(torch.equal(getattr(state, name), getattr(before, name)) for name in ("key", "value", "position"))
    assert torch.equal(blurry_window_step(*inputs, before), out)
    assert all(torch.equal(getattr(lazy, name), getattr(before, name)) for name in ("key", "value", "position"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_sequences(kernel, device):
    window = BlurryWindow(4, 16, kernel)
    state = BlurryState.empty(0, 2, 8, window=window, device=device)
    out = blurry_window_step(*make_inputs(0, 2, tokens=1, dtype=torch.float32, device=device), state)
    assert out.shape == (0, 2, 1, 8)


def test_sequences_do_not_depend_on_their_mates(device):
    window = PYRAMID["fejer"]
    inputs = make_inputs(3, 3, None, 1, 8, dtype=torch.float32, device=device)
    state = make_state(window, [5, 0, 77], 3, dtype=torch.float32, device=device)
    parts = [
        BlurryState(*(x[b : b + 1].clone() for x in (state.key, state.value, state.position)), window) for b in range(3)
    ]
    out = blurry_window_step(*inputs, state)
    for b, part in enumerate(parts):
        assert torch.equal(blurry_window_step(*(x[b : b + 1] for x in inputs), part), out[b : b + 1])
        assert torch.equal(part.key, state.key[b : b + 1]) and torch.equal(part.value, state.value[b : b + 1])


def test_autocast(device):
    window = BlurryWindow(4, 16)
    inputs = make_inputs(tokens=1, dtype=torch.float32, device=device)
    state = make_state(window, [9, 2], dtype=torch.float32, device=device)
    plain = state.clone()
    with torch.autocast(device.type, torch.bfloat16):
        out = blurry_window_step(*inputs, state)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, blurry_window_step(*(x.bfloat16() for x in inputs), plain))
    assert torch.equal(state.key, plain.key) and state.position.tolist() == [10, 3]


STATES = (torch.float64, torch.float32, torch.bfloat16)
PARTS = ("key", "value", "position", "flux")


def parts(state):
    return {name: getattr(state, name) for name in PARTS if getattr(state, name) is not None}


def of_function(inputs, state):
    return blurry_window_step(*inputs, state)


def of_operator(inputs, state):
    window = state.window
    law = (window.slots, list(window.windows(2)), list(window.phases(2)), window.kernel, window.gate_sharpness, 0.5)
    return torch.ops.blurry_attn.step(*inputs, state.key, state.value, state.position, *law)


def of_compiled_function(inputs, state):
    return torch.compile(blurry_window_step, backend="aot_eager")(*inputs, state)


def of_module(inputs, state):
    attention = BlurrySelfAttention(16, 2, state.window).to(inputs[0])
    return attention.step(inputs[0].transpose(1, 2).flatten(2), state)


@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", [of_function, of_operator, of_compiled_function, of_module])
def test_autograd_sees_what_a_step_writes(way, mode, dtype, device):
    """Version counters of the whole state advance, of nothing else, and of nothing where a step is refused."""
    if way is of_operator and dtype == torch.bfloat16:
        pytest.skip("the operator takes slots of float32 and float64")
    inputs = make_inputs(tokens=1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    state = make_state(WINDOW, [7, 50], dtype=inputs[0].dtype, device=device).to(dtype)
    with mode():
        for _ in range(2):
            before = {name: x._version for name, x in parts(state).items()}
            way(inputs, state)
            assert all(x._version > before[name] for name, x in parts(state).items())
    assert [x._version for x in inputs] == [0, 0, 0]
    if way is of_compiled_function:  # it counts before it calls
        return
    before = {name: x._version for name, x in parts(state).items()}
    with mode(), pytest.raises((TypeError, ValueError, RuntimeError)):
        way([x[..., :3] for x in inputs], state)
    assert {name: x._version for name, x in parts(state).items()} == before


@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("name", ["key", "value", "flux", "attention"])
def test_a_backward_whose_state_was_stepped_raises(name, dtype, device):
    inputs = make_inputs(tokens=1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    state = make_state(WINDOW, [7, 50], dtype=inputs[0].dtype, device=device).to(dtype)
    if name == "attention":
        inputs[0].requires_grad_()
        loss = blurry_window_attention(*inputs, state.window, state=state).sum()
        if dtype == torch.bfloat16:  # saved are its slots in float32
            return
    elif getattr(state, name) is None:
        return
    else:
        x = torch.ones_like(getattr(state, name), requires_grad=True)
        loss = (x * getattr(state, name)).sum()
    with torch.no_grad():
        blurry_window_step(*inputs, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", STATES, ids=str)
@pytest.mark.parametrize("name", [*PARTS, "all"])
def test_inference_tensors_are_stepped_in_inference_mode_alone(name, dtype, device):
    inputs = make_inputs(tokens=1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    state = make_state(WINDOW, [7, 50], dtype=inputs[0].dtype, device=device).to(dtype)
    expected, names = state.clone(), list(parts(state)) if name == "all" else [name]
    if getattr(state, names[0]) is None:
        return
    out = blurry_window_step(*inputs, expected)
    with torch.inference_mode():
        for part in names:
            setattr(state, part, getattr(state, part).clone())
    before = state.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"state\.{names[0]} must be no inference tensor"):
        blurry_window_step(*inputs, state)
    assert all(torch.equal(x, getattr(before, part)) for part, x in parts(state).items())
    with torch.inference_mode():
        assert torch.equal(blurry_window_step(*inputs, state), out)
    assert all(torch.equal(x, getattr(expected, part)) for part, x in parts(state).items())


@pytest.mark.parametrize("dtype", STATES, ids=str)
def test_a_step_leaves_shut_slots_zero(dtype, device):
    window, positions = BlurryWindow(6, (24, 48)), [0, 1, 9, 25]
    inputs = make_inputs(4, tokens=1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    state = make_state(window, positions, dtype=inputs[0].dtype, device=device).to(dtype)
    blurry_window_step(*inputs, state)
    shut = shut_slots(window, state.position.tolist(), 2).to(device)
    for slots in (state.key, state.value):
        assert not slots[shut].any() and slots[~shut].all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_tables_of_gates_are_kept(kernel):
    """A step's time does not depend on how many gates its window has: made anew, 2^21 of them take far longer."""
    inputs, best = [x.float() for x in make_inputs(1, 1, tokens=1)], []
    for resolution in (1, 2**20 if kernel == "fejer" else 32):
        slots = 4 if kernel == "fejer" else 2**15
        state = BlurryState.empty(1, 1, 8, window=BlurryWindow(slots, slots * resolution, kernel))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            blurry_window_step(*inputs, state)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    assert best[1] < 4 * best[0] + 1e-3
