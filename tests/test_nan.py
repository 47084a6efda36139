"""NaN and inf stay where the law puts them: after their token, in their head and sequence, until they are replaced."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import KERNELS, assert_same_bits, make_inputs, run

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention

TOKENS, AT = 150, 61


def poison(inputs, which, number, head=0):
    bad = [x.clone() for x in inputs]
    bad[which][0, head, AT] = number
    return bad


def call(inputs, window):
    return run(blurry_window_attention, *inputs, window, gradients=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resolution", [1, 3, 8, 20])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_contained(kernel, dtype, resolution, number, which, device):
    window = BlurryWindow(6, 6 * resolution, kernel)
    inputs = make_inputs(2, 2, tokens=TOKENS, dtype=dtype, device=device)
    clean, bad = (call(x, window) for x in (inputs, poison(inputs, which, number)))
    for name in ("out", "lse"):
        assert torch.equal(bad[name][:, :, :AT], clean[name][:, :, :AT])
    assert_same_bits({n: x[1] for n, x in bad.items()}, {n: x[1] for n, x in clean.items()})
    for name in ("out", "lse", "end_key", "end_value"):
        assert torch.equal(bad[name][:, 1], clean[name][:, 1])
    if which == 0:
        others = [t for t in range(TOKENS) if t != AT]
        assert torch.equal(bad["out"][:, :, others], clean["out"][:, :, others])
        assert not bad["out"][0, 0, AT].isfinite().all()


@pytest.mark.parametrize(("kernel", "resolution"), [("fejer", 1), ("fejer", 5), ("fejer", 6), ("dirichlet", 7)])
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_gone_once_replaced(kernel, resolution, which, device):
    """Gates of exactly 1 at the centres: a window later nothing is left, to the last bit."""
    window = BlurryWindow(6, 6 * resolution, kernel)
    inputs = make_inputs(1, 1, tokens=TOKENS, dtype=torch.float32, device=device)
    clean, bad = (call(x, window) for x in (inputs, poison(inputs, which, math.nan)))
    assert bad["out"][0, 0, AT].isnan().any()
    gone = AT + window.windows(1)[0] + resolution
    assert torch.equal(bad["out"][:, :, gone:], clean["out"][:, :, gone:])
    assert torch.equal(bad["end_key"], clean["end_key"]) and torch.equal(bad["end_value"], clean["end_value"])


def test_stays_as_the_echo_says(device):
    """With r > sharpness no gate is 1: what a slot held is never quite gone."""
    window = BlurryWindow(4, 32, sharpness=2.0)
    inputs = make_inputs(1, 1, tokens=TOKENS, dtype=torch.float32, device=device)
    assert call(poison(inputs, 2, math.nan), window)["out"][0, 0, AT + 1 :].isnan().any(-1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_shut_slots_are_not_read(kernel, device):
    """Neither their content nor its gradient counts."""
    window = BlurryWindow(5, 20, kernel, phase=2)
    inputs = make_inputs(1, 1, tokens=40, device=device)
    slots = [torch.full((1, 1, 5, 8), math.nan, dtype=torch.float64, device=device) for _ in range(2)]
    state = BlurryState(*slots, torch.zeros(1, dtype=torch.int64, device=device), window)
    given, fresh = (run(blurry_window_attention, *inputs, window, state=s) for s in (state, None))
    assert_same_bits({name: given[name] for name in fresh}, fresh)
    assert not given["grad_state_key"].any() and not given["grad_state_value"].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_logits(kernel, dtype, device):
    """Logits of 1e4 are a choice of one slot, not an overflow."""
    window = BlurryWindow(6, 24, kernel)
    query, key, value = make_inputs(1, 2, tokens=100, dtype=dtype, device=device)
    result = run(blurry_window_attention, query, key, value, window, scale=1e4)
    assert all(x.isfinite().all() for name, x in result.items() if name in ("out", "lse", "end_key", "grad_value"))
