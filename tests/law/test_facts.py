"""What the law implies: constants, convex mixtures, how little of a slot's past is left, when each slot opens."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import KERNELS, history_weights, make_inputs, randn, relative_error, tolerance

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, reference

MIXED = {
    "fejer": BlurryWindow(6, (6, 12, 18, 48, 240), sharpness=3),
    "dirichlet": BlurryWindow(6, (6, 12, 18, 48, 192), "dirichlet"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_constant_values_give_that_constant(kernel, dtype, device):
    query, key, _ = make_inputs(2, 5, None, 3000, 4, dtype=dtype, device=device)
    constant = randn(2, 5, 1, 3, dtype=dtype, device=device, seed=7)
    out, state = blurry_window_attention(
        query, key, constant.expand(-1, -1, 3000, -1), MIXED[kernel], return_state=True
    )
    bound = tolerance("out", dtype, MIXED[kernel])
    assert relative_error(out, constant.expand_as(out)) <= bound
    assert relative_error(state.value, constant.expand_as(state.value)) <= bound


@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_are_causal_mixtures_of_weight_one(kernel, device):
    for weights in history_weights(blurry_window_attention, MIXED[kernel], 500, 5, torch.float64, device):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-11)
    out, slots = history_weights(blurry_window_attention, MIXED[kernel], 500, 5, torch.float64, device)
    assert (out.triu(1) == 0).all(), "a later token has weight"
    if kernel == "fejer":
        assert (out >= 0).all() and (slots >= 0).all(), "the mixture is not convex"


def test_fejer_stays_within_the_past(device):
    query, key, value = make_inputs(2, 5, None, 700, 4, dtype=torch.float32, device=device)
    out = blurry_window_attention(query, key, value, MIXED["fejer"])
    slack = 1e-6 * value.abs().max()
    assert (out <= value.cummax(2).values + slack).all() and (out >= value.cummin(2).values - slack).all()


def echo(window: BlurryWindow, device: torch.device) -> torch.Tensor:
    """Share of a slot's content before its lobe that is left after it, of each slot."""
    r, slots = window.resolutions(1)[0], window.slots
    start = [slots * r + slot * r - r + 1 for slot in range(slots)]  # sequence i is about to enter the lobe of slot i
    zeros = torch.zeros(slots, 1, 2 * r - 1, 1, dtype=torch.float64, device=device)
    ones = torch.ones(slots, 1, slots, 1, dtype=torch.float64, device=device)
    before = BlurryState(ones, ones.clone(), torch.tensor(start, device=device), window)
    _, after = blurry_window_attention(zeros, zeros, zeros, window, state=before, return_state=True)
    return after.value[:, 0, :, 0].diagonal().cpu()


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 6, 7, 8, 16, 33])
def test_little_is_left_of_a_slot_after_its_lobe(slots, device):
    bound = 0.005 if slots == 3 or slots >= 6 else 0.012
    for r in (7, 8, 9, 12, 16, 31, 64, 200):
        left = echo(BlurryWindow(slots, slots * r, phase=0), device)
        assert (left > 0).all() and (left <= bound).all(), (r, left.max())
    for r in (1, 2, 3, 5, 6):
        assert (echo(BlurryWindow(slots, slots * r, phase=0), device) == 0).all(), r
    for r in (1, 2, 7, 16, 32):
        assert (echo(BlurryWindow(slots, slots * r, "dirichlet", phase=0), device) == 0).all(), r


@pytest.mark.parametrize("r,growth", [(4, 4), (16, 20), (32, 130)])
def test_dirichlet_amplifies(r, growth, device):
    """Its slots hold mixtures whose weights are negative too: of unit tokens they grow as documented."""
    window = BlurryWindow(32, 32 * r, "dirichlet", phase=0)
    query, key, value = make_inputs(1, 1, None, 4 * 32 * r, 16, dtype=torch.float64, device=device)
    _, state = blurry_window_attention(query, key, value, window, return_state=True)
    assert growth / 4 < state.value.abs().max() < growth * 4


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("slots,r", [(2, 3), (3, 1), (4, 6), (5, 4)])
def test_opening_for_every_phase(kernel, slots, r, device):
    """Head i has phase i: until its opening a slot is zero and unseen, and then it holds that one token."""
    window = BlurryWindow(slots, slots * r, kernel, phase=tuple(range(r)))
    query, key, value = make_inputs(1, r, None, slots * r + 1, 3, device=device)
    opened = torch.tensor([[reference.opening(m, slots, r, phase) for m in range(slots)] for phase in range(r)])
    for tokens in range(1, slots * r + 2):
        q, k, v = (x[:, :, :tokens] for x in (query, key, value))
        out, lse, state = blurry_window_attention(q, k, v, window, return_state=True, return_lse=True)
        for h in range(r):
            for m in range(slots):
                content = state.key[0, h, m], state.value[0, h, m]
                if opened[h, m] >= tokens:
                    assert all((x == 0).all() for x in content)
                elif opened[h, m] == tokens - 1:
                    assert torch.equal(content[0], k[0, h, -1]) and torch.equal(content[1], v[0, h, -1])
            seen = (opened[h] < tokens).to(device)
            logits = q[0, h, -1] @ state.key[0, h, seen].T / math.sqrt(3)
            torch.testing.assert_close(lse[0, h, -1], logits.logsumexp(0))
            torch.testing.assert_close(out[0, h, -1], logits.softmax(0) @ state.value[0, h, seen])
