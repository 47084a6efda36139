"""Gradients: against finite differences, of every input through every output, alone and together."""

from __future__ import annotations

import pytest
import torch
from helpers import KERNELS, WINDOWS, assert_accurate, make_inputs, make_state, randn, relative_error, run, shut_slots
from torch.autograd import gradcheck

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, reference

CU_SEQLENS = [0, 4, 4, 5, 13]
POSITIONS = [2, 0, 9, 6]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("phase", [None, (3, 1)], ids=["staggered", "phases"])
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("value_dim", [2, 3], ids=["Dk=Dv", "Dk!=Dv"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "cu_seqlens"])
def test_gradcheck(kernel, heads, kv_heads, phase, stated, value_dim, packed, device):
    resolution = 4 if phase else 8  # 8 > sharpness: with an echo
    window = BlurryWindow(3, (3 * resolution, 12), kernel, phase=phase)
    batch, tokens, positions = (1, 13, POSITIONS) if packed else (2, 9, POSITIONS[-2:])
    cu_seqlens = torch.tensor(CU_SEQLENS, device=device) if packed else None
    leaves = list(make_inputs(batch, heads, kv_heads, tokens, 2, value_dim, device=device))
    given = make_state(window, positions, kv_heads, 2, value_dim, device=device)
    if stated:
        leaves += [given.key, given.value]

    def function(query, key, value, *slots):
        state = BlurryState(*slots, given.position, window) if slots else None
        out, lse, end = blurry_window_attention(query, key, value, window, enable_gqa=True, cu_seqlens=cu_seqlens,
                                                state=state, return_state=True, return_lse=True)  # fmt: skip
        return out, lse, end.key, end.value

    assert gradcheck(function, [leaf.requires_grad_() for leaf in leaves], nondet_tol=0.0)


def call(kernel, device):
    """A call with everything, its leaves and its results."""
    window = WINDOWS[kernel]
    given = make_state(window, [5, 40], 2, 6, 5, device=device)
    leaves = [*make_inputs(2, 4, 2, 37, 6, 5, device=device), given.key, given.value]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out, lse, end = blurry_window_attention(*leaves[:3], window, enable_gqa=True, return_state=True, return_lse=True,
                                            state=BlurryState(*leaves[3:], given.position, window))  # fmt: skip
    return leaves, [out, lse, end.key, end.value]


@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_alone_add_up(kernel, device):
    """A result without a gradient counts as one whose gradient is zero."""
    leaves, results = call(kernel, device)
    cotangents = [randn(*x.shape, device=device, seed=i) for i, x in enumerate(results)]
    together = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for result, cotangent in zip(results, cotangents, strict=True):
        alone = torch.autograd.grad(result, leaves, cotangent, retain_graph=True)
        total = [a + b for a, b in zip(total, alone, strict=True)]
    for a, b in zip(together, total, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_alone(kernel, device):
    """The gradient of one input does not depend on which others require one."""
    leaves, results = call(kernel, device)
    together = torch.autograd.grad([x.sum() for x in results], leaves)
    window, position = WINDOWS[kernel], torch.tensor([5, 40], device=device)
    for i, expected in enumerate(together):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        state = BlurryState(*alone[3:], position, window)
        out, lse, end = blurry_window_attention(*alone[:3], window, enable_gqa=True, state=state, return_state=True,
                                                return_lse=True)  # fmt: skip
        (grad,) = torch.autograd.grad([x.sum() for x in (out, lse, end.key, end.value)], alone[i])
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_incoming_gradients(kernel, device):
    """sum() gives a gradient of stride 0, a transposed consumer a transposed one."""
    leaves, results = call(kernel, device)
    dense = [torch.ones_like(x) for x in results]
    expected = torch.autograd.grad(results, leaves, dense, retain_graph=True)
    expanded = [torch.ones((), dtype=x.dtype, device=device).expand_as(x) for x in results]
    transposed = [x.mT.contiguous().mT for x in dense]
    for cotangents in (expanded, transposed):
        grads = torch.autograd.grad(results, leaves, cotangents, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_shut_slots_are_not_read_and_have_gradient_zero(kernel, device):
    window, positions = BlurryWindow(6, (24, 48), kernel), [0, 1, 3, 9, 25]
    state = make_state(window, positions, device=device)
    shut = shut_slots(window, positions, 2).to(device)
    inputs = make_inputs(5, 2, None, 20, 8, device=device)
    expected = run(blurry_window_attention, *inputs, window, state=state)
    for name in ("key", "value"):
        assert (expected[f"grad_state_{name}"][shut] == 0).all()
        getattr(state, name)[shut] = torch.nan
    actual = run(blurry_window_attention, *inputs, window, state=state)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("beyond", ["key", "value", "grad_key", "grad_value"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_state_beyond_float16(kernel, beyond, device):
    """A state in float32, given or the gradient of a returned one, may hold more than float16 inputs do."""
    window = BlurryWindow(16, (16, 128), kernel)
    inputs = make_inputs(2, 2, None, 40, 64, dtype=torch.float16)
    inputs[0][..., 7] *= 1e-5  # a key of 1e5 is then one among others
    state = make_state(window, [300, 10**6], 2, 64, dtype=torch.float16)
    end_grads = {name: torch.randn_like(state.key) for name in ("grad_key", "grad_value")}
    large = end_grads[beyond] if beyond in end_grads else getattr(state, beyond)
    large[:, :, 3, 7] = 1e5

    def gradients(device, dtype, state_dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        given = [x.to(device, state_dtype).requires_grad_() for x in (state.key, state.value)]
        before = BlurryState(*given, state.position.to(device), window)
        out, end = blurry_window_attention(*leaves, window, state=before, return_state=True)
        cotangents = [x.to(device, state_dtype) for x in end_grads.values()]
        return torch.autograd.grad([out, end.key, end.value], leaves + given, [torch.ones_like(out), *cotangents])

    exact = gradients(torch.device("cpu"), torch.float64, torch.float64)
    for found, expected in zip(gradients(device, torch.float16, torch.float32), exact, strict=True):
        fits = expected.abs() < torch.finfo(found.dtype).max
        assert relative_error(*(torch.where(fits, x.cpu(), 0) for x in (found, expected))) <= 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_gradient_is_asked_for(kernel, device):
    inputs = make_inputs(device=device)
    out, state = blurry_window_attention(*inputs, WINDOWS[kernel], return_state=True)
    assert not (out.requires_grad or state.key.requires_grad or state.value.requires_grad)
    with torch.no_grad():
        out = blurry_window_attention(*(x.requires_grad_() for x in inputs), WINDOWS[kernel])
    assert not out.requires_grad
    out, lse, state = blurry_window_attention(*inputs, WINDOWS[kernel], return_state=True, return_lse=True)
    assert all(x.requires_grad for x in (out, lse, state.key, state.value)) and not state.position.requires_grad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_equal_the_reference(kernel, dtype, device):
    """Longer than finite differences can go, packed, resumed and grouped at once."""
    window = BlurryWindow(5, (20, 45), kernel)
    inputs = make_inputs(1, 4, 2, 150, 7, 9)
    state = make_state(window, [3, 0, 1000], 2, 7, 9)
    cu_seqlens = torch.tensor([0, 60, 61, 150])
    expected = run(reference.blurry_window_attention, *inputs, window, state=state, cu_seqlens=cu_seqlens)
    actual = run(blurry_window_attention, *(x.to(device, dtype) for x in inputs), window,
                 state=state.to(device, dtype), cu_seqlens=cu_seqlens.to(device))  # fmt: skip
    assert_accurate(actual, expected, dtype, window)
