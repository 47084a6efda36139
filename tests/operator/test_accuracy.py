"""Accuracy: against float64 of the same inputs, by the worst block of 64 tokens of one head of one sequence."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALVES,
    KERNELS,
    assert_accurate,
    make_inputs,
    make_state,
    oracle,
    randn,
    relative_error,
    run,
    shut_slots,
)

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, reference

# (slots, tokens per slot of each of two heads, tokens, head_dim, value_dim)
SHAPES = {
    "small": (2, (3, 1), 300, 8, 8),
    "odd": (5, (5, 8), 700, 20, 12),
    "even": (16, (8, 2), 1000, 32, 32),
    "wide": (64, (13, 4), 1100, 16, 24),
    "coarse": (5, (40, 17), 1000, 16, 16),
    "long": (70, (8, 1), 2000, 6, 5),
}


def case(kernel, shape):
    slots, resolutions, tokens, dim, value_dim = SHAPES[shape]
    if kernel == "dirichlet":
        resolutions = tuple(min(r, 32) for r in resolutions)
    window = BlurryWindow.pyramid(slots, resolutions, kernel)
    state = make_state(window, [5, 12345], 2, dim, value_dim)
    return window, make_inputs(2, 4, 2, tokens, dim, value_dim), state


def test_fresh_memory_is_nan(device):
    """What every other test relies on: memory that nobody has written cannot pass for a zero."""
    assert torch.empty(1000, device=device).isnan().all()
    for dtype in (torch.float64, torch.float32):  # workspaces on CUDA are bytes
        assert torch.empty(1000, dtype=torch.uint8, device=device).view(dtype).isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_oracle_equals_the_reference(kernel):
    window = BlurryWindow.pyramid(5, (3, 8), kernel)
    inputs, state = make_inputs(2, 4, 2, 60, 4, 6), make_state(window, [0, 7], 2, 4, 6)
    expected = run(reference.blurry_window_attention, *inputs, window, state=state)
    assert_accurate(run(oracle, *inputs, window, state=state), expected, torch.float64, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
def test_float64_and_float32(kernel, shape, stated, device):
    window, inputs, state = case(kernel, shape)
    inputs = [x.float().double() for x in inputs]
    state = state.to(dtype=torch.float32).to(dtype=torch.float64) if stated else None
    expected = run(oracle, *inputs, window, state=state)
    for dtype in (torch.float64, torch.float32):
        ours = state.to(device, dtype) if stated else None
        actual = run(blurry_window_attention, *(x.to(device, dtype) for x in inputs), window, state=ours)
        assert all(x.dtype in (dtype, torch.int64) for x in actual.values())
        assert_accurate(actual, expected, dtype, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(kernel, shape, dtype, device):
    """At most twice (gradients: three times) the error of plain PyTorch that keeps every tensor in that dtype."""
    window, inputs, _ = case(kernel, shape)
    inputs = [x.to(dtype) for x in inputs]
    exact = run(oracle, *(x.double() for x in inputs), window)
    plain = run(oracle, *inputs, window)
    actual = run(blurry_window_attention, *(x.to(device) for x in inputs), window)
    for name in exact.keys() - {"position"}:
        state_like = name in ("lse", "end_key", "end_value")
        assert actual[name].dtype == (torch.float32 if state_like else dtype), name
        error, allowed = (relative_error(x[name], exact[name]) for x in (actual, plain))
        factor = 3 if name.startswith("grad_") else 2
        assert error <= factor * allowed, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"
        if name in ("end_key", "end_value"):  # sums in float32 of exact inputs
            assert error <= (1e-4 if kernel == "dirichlet" else 1e-5), f"{name}: {error:.2e}"


@pytest.mark.parametrize("resolutions", [(8,), (1, 8)], ids=str)
@pytest.mark.parametrize("change", ["values fall", "values rise", "gradients fall", "gradients rise"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sizes_that_change_a_thousandfold(resolutions, change, dtype, device):
    """At a token, another one for each sequence, so that it may lie anywhere beside a place where kernels cut time."""
    sequences, tokens, heads = 9, 1300, len(resolutions)
    window = BlurryWindow.pyramid(16, resolutions)
    changed = torch.arange(tokens) < 128 * torch.arange(1, sequences + 1).unsqueeze(1)
    if change.endswith("rise"):
        changed = ~changed
    factor = torch.where(changed, 1024.0, 1.0).view(sequences, 1, tokens, 1)  # a power of two rounds nothing
    query, key, value = (x.to(dtype) for x in make_inputs(sequences, heads, None, tokens, 16))
    if change.startswith("values"):
        value, factor = value * factor.to(dtype), torch.ones(1, 1, 1, 1)

    def with_factor(attend):
        def call(query, *inputs, **options):
            out, lse, end = attend(query, *inputs, **options)
            return out * factor.to(query), lse, end

        return call

    inputs = query, key, value
    exact = run(with_factor(blurry_window_attention), *(x.double() for x in inputs), window)
    plain = run(with_factor(oracle), *inputs, window)
    actual = run(with_factor(blurry_window_attention), *(x.to(device) for x in inputs), window)
    for name in exact.keys() - {"position"}:
        error, allowed = (relative_error(x[name], exact[name]) for x in (actual, plain))
        factor_allowed = 3 if name.startswith("grad_") else 2
        assert error <= factor_allowed * allowed, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"
        if name in ("end_key", "end_value"):
            assert error <= 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dims", [(1, 1), (60, 60), (100, 37), (3, 130), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 63, 65])
def test_head_sizes_and_tails(kernel, dims, tokens, device):
    window = BlurryWindow.pyramid(6, (4, 9), kernel)
    inputs = [x.float().double() for x in make_inputs(1, 2, None, tokens, *dims)]
    expected = run(oracle, *inputs, window)
    for dtype in (torch.float64, torch.float32):
        actual = run(blurry_window_attention, *(x.to(device, dtype) for x in inputs), window)
        assert_accurate(actual, expected, dtype, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("batch,tokens", [(0, 7), (2, 0), (0, 0)])
def test_empty(kernel, stated, batch, tokens, device):
    window = BlurryWindow(4, 16, kernel)
    inputs = make_inputs(batch, 4, 2, tokens, 6, 5, torch.float32, device)
    state = make_state(window, [30, 2][:batch], 2, 6, 5, torch.float32, device) if stated else None
    found = run(blurry_window_attention, *inputs, window, state=state)
    assert found["out"].shape == (batch, 4, tokens, 5) and found["lse"].shape == (batch, 4, tokens)
    assert found["end_key"].shape == (batch, 2, 4, 6) and found["end_value"].shape == (batch, 2, 4, 5)
    assert found["position"].tolist() == ([30 + tokens, 2 + tokens] if stated else [tokens] * 2)[:batch]
    assert [found[f"grad_{n}"].shape for n in ("query", "key", "value")] == [x.shape for x in inputs]
    if stated:
        kept = torch.where(shut_slots(window, [30, 2][:batch], 2).unsqueeze(-1).to(device), 0.0, state.key)
        assert tokens or torch.equal(found["end_key"], kept)
    else:
        assert tokens or (found["end_key"] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_large_logits(kernel, dtype, device):
    """Logits up to 10^5, above what float16 can hold: one slot wins, nothing overflows."""
    window = BlurryWindow(4, 16, kernel)
    query, key, value = make_inputs(1, 2, None, 100, 8, dtype=dtype, device=device)
    found = run(blurry_window_attention, 100 * query, 300 * key, value, window, gradients=False, scale=1.0)
    assert found["lse"].abs().max() > 1e5
    assert all(x.isfinite().all() for x in found.values())
    expected = run(
        oracle, *(x.cpu().double() for x in (100 * query, 300 * key, value)), window, gradients=False, scale=1.0
    )
    assert relative_error(found["lse"], expected["lse"]) <= 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [0.0, 5e-324, -0.5, 2.0])
def test_scale(kernel, scale, device):
    window, inputs = BlurryWindow(4, 16, kernel), make_inputs()
    expected = run(oracle, *inputs, window, scale=scale)
    actual = run(blurry_window_attention, *(x.to(device) for x in inputs), window, scale=scale)
    assert_accurate(actual, expected, torch.float64, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [0.0, 5e-324, -0.125])
def test_scale_in_half_precision(kernel, scale, device):
    """Of a size that tensor cores take: a scale of zero makes no NaN of slots that are shut."""
    window, inputs = BlurryWindow(32, 128, kernel), make_inputs(tokens=150, dim=64, dtype=torch.bfloat16)
    exact = run(oracle, *(x.double() for x in inputs), window, scale=scale)
    found = run(blurry_window_attention, *(x.to(device) for x in inputs), window, scale=scale)
    for name in exact.keys() - {"position"}:
        assert relative_error(found[name], exact[name]) <= 0.03, name


def gradients_of_out(attend, inputs, state, grad, **options):
    """Of query, key, value and the state's slots, as float64 on the CPU."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, state.key, state.value)]
    out, *_ = attend(*leaves[:3], state.window, state=BlurryState(*leaves[3:], state.position, state.window),
                     return_lse=True, return_state=True, **options)  # fmt: skip
    return [x.double().cpu() for x in torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_half_gradients_of_a_sharp_softmax(kernel, dtype, tokens, scale, device):
    """Few slots are open or one has almost all of the weight, so that gradients of the logits nearly cancel: of each of
    many sequences at most three times the error of plain PyTorch, or 3e-5."""
    window, batch, dim = BlurryWindow(6, 78, kernel, phase=0), 30, 32
    inputs = make_inputs(batch, 1, None, tokens, dim, dtype=dtype, seed=1)
    state = make_state(window, [2] * batch, 1, dim, dtype=torch.float32)
    grad = randn(batch, 1, tokens, dim, dtype=dtype, seed=7)
    state = BlurryState(state.key.to(dtype).float(), state.value.to(dtype).float(), state.position, window)
    exact = gradients_of_out(oracle, [x.double() for x in inputs], state, grad.double(), scale=scale)
    plain = gradients_of_out(oracle, inputs, state, grad, scale=scale)
    ours = gradients_of_out(
        blurry_window_attention, [x.to(device) for x in inputs], state.to(device), grad.to(device), scale=scale
    )
    for name, a, b, truth in zip(
        ("query", "key", "value", "state.key", "state.value"), ours, plain, exact, strict=True
    ):
        error, allowed = ((x - truth).square().mean((1, 2, 3)).sqrt() for x in (a, b))
        worst = (error / (3 * allowed).clamp_min(3e-5)).max().item()
        assert worst <= 1, f"gradient of {name}: {worst:.1f} times the bound"


@pytest.mark.parametrize("kernel", KERNELS)
def test_values_that_agree_give_queries_and_keys_no_gradient(kernel, device):
    """Logits of hundreds, whose log-sum-exp is rounded by 1e-5: nothing of that is left where gradients cancel."""
    window, scale = BlurryWindow(6, 24, kernel), 30.0
    query, key, value = make_inputs(2, 2, None, 100, 16, dtype=torch.float32, device=device)
    value, grad = value[:, :, :1].expand_as(value), randn(*query.shape, dtype=torch.float32, device=device, seed=7)
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    out = blurry_window_attention(*leaves, value, window, scale=scale)
    parts = scale * (grad * value).sum(-1).abs().max()  # what cancels, but for the other factor
    for found, other in zip(torch.autograd.grad(out, leaves, grad), (key, query), strict=True):
        assert found.abs().max() <= 5e-7 * parts * other.abs().max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_half_gradients_of_slots_beyond_float16(kernel, side, device):
    """Slots of float32 that float16 cannot hold, whose gradients it can."""
    window, dim = BlurryWindow(6, 24, kernel), 8
    query, key, value = make_inputs(2, 2, None, 5, dim, dtype=torch.float16)
    state = make_state(window, [40, 7], 2, dim, dtype=torch.float32)
    setattr(state, side, 1e6 * getattr(state, side))
    inputs = (1e-6 * query.double()).half() if side == "key" else query, key, value
    grad = (1e-5 * randn(2, 2, 5, dim)).half()
    exact = gradients_of_out(oracle, [x.double() for x in inputs], state, grad.double())
    ours = gradients_of_out(blurry_window_attention, [x.to(device) for x in inputs], state.to(device), grad.to(device))
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= 2e-3 * b.abs().max() + 2**-24


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_scale(kernel, device):
    window, (query, key, value) = BlurryWindow(4, 16, kernel), make_inputs(dtype=torch.float32)
    inputs = 1e-37 * query, key, value
    expected = oracle(*(x.double() for x in inputs), window, scale=2.35e38)[0]
    found = blurry_window_attention(*(x.to(device) for x in inputs), window, scale=2.35e38)
    assert relative_error(found, expected) <= 1e-5
