"""The operators as PyTorch's machinery sees them: opcheck, compile, export, autocast."""

from __future__ import annotations

import pytest
import torch
from helpers import KERNELS, make_inputs, make_state
from torch import nn

from blurry_attn import BlurrySelfAttention, BlurryWindow, blurry_window_attention

WINDOW = {kernel: BlurryWindow(4, (4, 12), kernel) for kernel in KERNELS}


def law(kernel):
    window = WINDOW[kernel]
    return window.slots, list(window.windows(2)), list(window.phases(2)), kernel, 6.0, 0.5


def tensors(device, grad, tokens=20, packed=False):
    inputs = [x.requires_grad_(grad) for x in make_inputs(1, 4, 2, tokens, 8, 6, torch.float32, device)]
    cu_seqlens = torch.tensor([0, 7, tokens], device=device) if packed else None
    state = make_state(WINDOW["fejer"], [5, 0] if packed else [5], 2, 8, 6, torch.float32, device)
    return inputs, cu_seqlens, [state.key.requires_grad_(grad), state.value.requires_grad_(grad), state.position]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "stated"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_opcheck_forward(kernel, stated, packed, device):
    inputs, cu_seqlens, state = tensors(device, True, packed=packed)
    arguments = (*inputs, *law(kernel), cu_seqlens, *(state if stated else (None,) * 3), stated)
    torch.library.opcheck(torch.ops.blurry_attn.forward.default, arguments)


@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "stated"])
def test_opcheck_backward(stated, device):
    inputs, _, state = tensors(device, False)
    state = state if stated else [None] * 3
    out, lse, *end = torch.ops.blurry_attn.forward(*inputs, *law("fejer"), None, *state, stated)
    gradients = [out, lse, *end[:2]] if stated else [out, None, None, None]
    arguments = (*gradients, *inputs, out, lse, *law("fejer"), None, *state)
    torch.library.opcheck(torch.ops.blurry_attn.backward.default, arguments)


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck_step(kernel, device):
    inputs, _, state = tensors(device, False, tokens=1)
    torch.library.opcheck(torch.ops.blurry_attn.step.default, (*inputs, *state, *law(kernel)))


def test_backward_operator_has_no_gradient(device):
    inputs, _, _ = tensors(device, False)
    out, lse, *_ = torch.ops.blurry_attn.forward(*inputs, *law("fejer"), None, None, None, None, False)
    gradient = out.clone().requires_grad_()
    arguments = (None, None, None, *inputs, out, lse, *law("fejer"), None, None, None, None)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.ops.blurry_attn.backward(gradient, *arguments)
    with torch.no_grad():
        torch.ops.blurry_attn.backward(gradient, *arguments)


def module(device):
    torch.manual_seed(0)
    window = BlurryWindow.pyramid(4, (1, 1, 3, 3))
    return nn.Sequential(BlurrySelfAttention(32, 4, window, rope_base=1e4), nn.Linear(32, 8)).to(device)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    """One graph for all lengths, forward and backward; at most one recompilation, when the length first changes."""
    torch._dynamo.reset()
    eager = module(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for tokens in (20, 31, 57):
        x = torch.randn(2, tokens, 32, device=device)
        expected, actual = eager(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum(), list(eager.parameters())) for y in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_export(device):
    eager = module(device)
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(eager, (torch.randn(2, 20, 32, device=device),), dynamic_shapes=({1: tokens},))
    for length in (1, 20, 63):
        x = torch.randn(2, length, 32, device=device)
        torch.testing.assert_close(program.module()(x), eager(x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kernel, dtype, device):
    """Computes in the autocast dtype; gradients come back in the inputs' own."""
    window = WINDOW[kernel]
    inputs = [x.requires_grad_() for x in make_inputs(1, 4, 2, 30, dtype=torch.float32, device=device)]
    with torch.autocast(device.type, dtype):
        out, state = blurry_window_attention(*inputs, window, enable_gqa=True, return_state=True)
    assert out.dtype == dtype and state.key.dtype == torch.float32
    halves = [x.detach().to(dtype) for x in inputs]
    assert torch.equal(out, blurry_window_attention(*halves, window, enable_gqa=True))
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs)


def test_no_gradient_is_asked_for_what_needs_none(device):
    query, key, value = make_inputs(device=device)
    blurry_window_attention(query.requires_grad_(), key, value, BlurryWindow(4, 16)).sum().backward()
    assert query.grad is not None and key.grad is None and value.grad is None
    assert not blurry_window_attention(query.detach(), key, value, BlurryWindow(4, 16)).requires_grad
