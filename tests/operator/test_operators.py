"""The operators as PyTorch's machinery sees them: opcheck, compile, export, autocast."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from helpers import KERNELS, make_inputs, make_state, randn
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from blurry_attn import (
    _C,
    BlurrySelfAttention,
    BlurryState,
    BlurryWindow,
    blurry_window_attention,
    blurry_window_step,
)
from blurry_attn.ops import _operator, rotary

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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "stated"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_opcheck_backward(kernel, stated, packed, device):
    inputs, cu_seqlens, state = tensors(device, False, packed=packed)
    state = state if stated else [None] * 3
    out, lse, *end, contents = torch.ops.blurry_attn.forward(*inputs, *law(kernel), cu_seqlens, *state, stated)
    gradients = [out, lse, *end[:2]] if stated else [out, None, None, None]
    arguments = (*gradients, *inputs, *law(kernel), cu_seqlens, *state, out, lse, contents)
    torch.library.opcheck(torch.ops.blurry_attn.backward.default, arguments)


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck_step(kernel, device):
    inputs, _, state = tensors(device, False, tokens=1)
    torch.library.opcheck(torch.ops.blurry_attn.step.default, (*inputs, *state, *law(kernel)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads first", "tokens first"])
def test_shapes_for_tracing_are_those_of_results(dtype, tokens_first, device):
    """Sizes, dtypes and strides of all that the operators return: lse and states are of another dtype than halves, and
    results lie in memory as query, key or value does."""
    inputs = make_inputs(2, 4, 2, 9, 8, 6, dtype, device)
    if tokens_first:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    state = make_state(WINDOW["fejer"], [3, 50], 2, 8, 6, dtype, device)
    given = (*law("fejer"), None, state.key, state.value, state.position)

    def results(*tensors):
        query, key, value, *rest = tensors
        forward = torch.ops.blurry_attn.forward(query, key, value, *given[:-3], *rest, True)
        out, lse, end_key, end_value, _, contents = forward
        cotangents = (out, lse, end_key, end_value)
        backward = torch.ops.blurry_attn.backward(
            *cotangents, query, key, value, *given[:-3], *rest, out, lse, contents
        )
        return [(x.shape, x.dtype, x.stride()) for x in (*forward, *backward)]

    real = results(*inputs, *given[-3:])
    assert [real[i][2] for i in (6, 7, 8)] == [x.stride() for x in inputs]
    assert results(*(x.to("meta") for x in (*inputs, *given[-3:]))) == real


def test_what_watches_python_sees_the_operators_called(device):
    """Subclasses and modes with __torch_function__; else torch.ops is left out."""
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs, _, state = tensors(device, False, tokens=1)
    window, positions = WINDOW["fejer"], torch.zeros(1, dtype=torch.int64, device=device)
    calls = {
        "forward": lambda: blurry_window_attention(*inputs, window, enable_gqa=True),
        "step": lambda: blurry_window_step(*inputs, BlurryState(*map(torch.clone, state), window), enable_gqa=True),
        "rotary": lambda: rotary(inputs[0], positions, 50.0),
    }
    for name, call in calls.items():
        alone = call()
        assert seen == []
        with Watch():
            assert torch.equal(call(), alone)
        assert seen.count(f"blurry_attn.{name}.default") == 1
        assert _operator(name, *inputs, None) is getattr(_C, name)
        seen.clear()
    lengths = torch.tensor([0, 1], device=device).as_subclass(Watched)
    blurry_window_attention(*inputs, window, enable_gqa=True, cu_seqlens=lengths)
    assert seen.count("blurry_attn.forward.default") == 1


def test_opcheck_backend(device):
    """It answers with a string, which no graph can hold: nothing of it is for tracing."""
    inputs, _, _ = tensors(device, True)
    torch.library.opcheck(
        torch.ops.blurry_attn.backend.default, (*inputs, *law("fejer")[:-1]), test_utils=("test_schema",)
    )


def test_backward_operator_has_no_gradient(device):
    inputs, _, _ = tensors(device, False)
    out, lse, *_, contents = torch.ops.blurry_attn.forward(*inputs, *law("fejer"), None, None, None, None, False)
    gradient = out.clone().requires_grad_()
    arguments = (None, None, None, *inputs, *law("fejer"), None, None, None, None, out, lse, contents)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.ops.blurry_attn.backward(gradient, *arguments)
    with torch.no_grad():
        torch.ops.blurry_attn.backward(gradient, *arguments)


def module(device):
    torch.manual_seed(0)
    window = BlurryWindow.pyramid(4, (1, 1, 3, 3))
    return nn.Sequential(BlurrySelfAttention(32, 4, window, rope_base=1e4), nn.Linear(32, 8)).to(device)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode, device):
    """Calls and their gradients are seen below autograd, with sizes as numbers or as symbols."""
    inputs = make_inputs(1, 2, 2, 9, 8, 6, torch.float32, device)

    def call(*inputs):
        leaves = [x.requires_grad_() for x in inputs]
        return torch.autograd.grad(blurry_window_attention(*leaves, WINDOW["fejer"]).sum(), leaves)

    graph = make_fx(call, tracing_mode=mode)(*inputs)
    called = {str(node.target) for node in graph.graph.nodes}
    assert called >= {"blurry_attn.forward.default", "blurry_attn.backward.default"}
    with torch.no_grad():
        found = graph(*inputs)
    for ours, expected in zip(found, call(*inputs), strict=True):
        assert torch.equal(ours, expected)


def flops(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("window", [WINDOW["fejer"], WINDOW["dirichlet"], BlurryWindow(4, (4, 400))], ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_counted(window, packed, device):
    """At least the products with the slots, as many again in the backward and more, in proportion to the tokens."""
    counts = []
    for tokens in (24, 48):
        query, key, value = make_inputs(1, 4, 2, tokens, 8, 6, torch.float32, device)
        query.requires_grad_()
        ends = torch.tensor([0, 5, tokens], device=device) if packed else None
        options = {"enable_gqa": True, "cu_seqlens": ends}
        out, forward = flops(lambda: blurry_window_attention(query, key, value, window, **options))  # noqa: B023
        _, backward = flops(lambda: out.sum().backward())  # noqa: B023
        counts.append((forward, backward))
    least = 2 * 4 * 48 * window.slots * (8 + 6)
    assert least <= forward <= 8 * least and 2 * forward <= backward <= 3 * forward
    assert counts[1] == tuple(2 * count for count in counts[0])
    state = BlurryState.empty(1, 2, 8, 6, window=window, device=device)
    token = (x[:, :, :1].detach() for x in (query, key, value))
    _, step = flops(lambda: blurry_window_step(*token, state, enable_gqa=True))
    assert step == forward // 48


def test_a_profile_names_what_runs(device):
    query, key, value = make_inputs(1, dtype=torch.float32, device=device)
    query.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = blurry_window_attention(query, key, value, WINDOW["fejer"])
        rotary(out, torch.arange(50, device=device), 100.0).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert names >= {f"blurry_attn::{name}" for name in ("forward", "backward", "rotary")}
    nodes = {f"torch::autograd::CppNode<blurry_attn::{name}Backward>" for name in ("Attention", "Rotary")}
    assert names >= nodes and out.grad_fn.name() in nodes


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    """One graph for all lengths, forward and backward; at most one recompilation, when the length first changes."""
    torch._dynamo.reset()
    eager = module(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for tokens in (20, 31, 57):
        x = randn(2, tokens, 32, dtype=torch.float32, device=device)
        expected, actual = eager(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum(), list(eager.parameters())) for y in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_compile_with_everything(kernel, device):
    """Grouped heads, packed sequences, states in and out, lse, gradients: one graph."""
    torch._dynamo.reset()
    window = WINDOW[kernel]

    def everything(query, key, value, slots_key, slots_value, position, cu_seqlens):
        given = BlurryState(slots_key, slots_value, position, window)
        out, lse, end = blurry_window_attention(query, key, value, window, enable_gqa=True, cu_seqlens=cu_seqlens,
                                                state=given, return_lse=True, return_state=True)  # fmt: skip
        return out, lse, end.key, end.value, end.position

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for tokens in (20, 33):
        inputs, cu_seqlens, state = tensors(device, True, tokens, packed=True)
        leaves = [*inputs, *state[:2]]
        results = [f(*inputs, *state, cu_seqlens) for f in (everything, compiled)]
        grads = [torch.autograd.grad([x.sum() for x in found[:4]], leaves) for found in results]
        for eager, ours in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            assert torch.equal(eager, ours)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_step_updates_the_state(kernel, device):
    torch._dynamo.reset()
    compiled = torch.compile(blurry_window_step, fullgraph=True, backend="aot_eager")
    state = make_state(WINDOW[kernel], [3, 50], dtype=torch.float32, device=device)
    plain = state.clone()
    for seed in range(3):
        inputs = make_inputs(tokens=1, dtype=torch.float32, device=device, seed=seed)
        assert torch.equal(compiled(*inputs, state), blurry_window_step(*inputs, plain))
    assert torch.equal(state.key, plain.key) and torch.equal(state.value, plain.value)
    assert state.position.tolist() == [6, 53]


@pytest.mark.parametrize("kernel", KERNELS)
def test_export_of_the_function(kernel, device):
    """With a dynamic length, lse and the returned state."""

    class Attend(nn.Module):
        def forward(self, query, key, value):
            out, lse, state = blurry_window_attention(
                query, key, value, WINDOW[kernel], return_lse=True, return_state=True
            )
            return out, lse, state.key, state.value, state.position

    inputs = make_inputs(tokens=20, dtype=torch.float32, device=device)
    shape = {2: torch.export.Dim("tokens")}
    program = torch.export.export(Attend(), inputs, dynamic_shapes=(shape, shape, shape))
    for tokens in (1, 20, 75):
        inputs = make_inputs(tokens=tokens, dtype=torch.float32, device=device)
        for actual, expected in zip(program.module()(*inputs), Attend()(*inputs), strict=True):
            assert torch.equal(actual, expected)


def test_export(device):
    eager = module(device)
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(
        eager, (randn(2, 20, 32, dtype=torch.float32, device=device),), dynamic_shapes=({1: tokens},)
    )
    for length in (1, 20, 63):
        x = randn(2, length, 32, dtype=torch.float32, device=device)
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
