"""One token per slot: sliding window attention, exactly, whatever the kernel."""

from __future__ import annotations

import pytest
import torch
from helpers import KERNELS, make_inputs, randn, relative_error
from torch.nn.functional import scaled_dot_product_attention

from blurry_attn import BlurryWindow, blurry_window_attention


def sliding(query, key, value, slots, sequence=None, scale=None):
    """`sequence` (T,): which packed sequence each token belongs to."""
    time = torch.arange(query.shape[2])
    lag = time.unsqueeze(1) - time
    mask = (lag >= 0) & (lag < slots)
    if sequence is not None:
        mask &= sequence.unsqueeze(1) == sequence
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype,bounds", [(torch.float64, (1e-12, 1e-12)), (torch.float32, (1e-5, 1e-4))], ids=str)
@pytest.mark.parametrize("slots,tokens", [(2, 50), (7, 100), (16, 5), (64, 300)])
def test_equals_scaled_dot_product_attention(kernel, dtype, bounds, slots, tokens, device):
    leaves = [x.requires_grad_() for x in make_inputs(2, 4, 2, tokens, 12, 20, torch.float64)]
    cotangent = randn(2, 4, tokens, 20, seed=9)
    for scale in (None, 0.3):
        expected = sliding(*leaves, slots, scale=scale)
        theirs = torch.autograd.grad(expected, leaves, cotangent)
        ours = [x.detach().to(device, dtype).requires_grad_() for x in leaves]
        out = blurry_window_attention(*ours, BlurryWindow(slots, slots, kernel), scale=scale, enable_gqa=True)
        assert relative_error(out, expected) <= bounds[0]
        grads = torch.autograd.grad(out, ours, cotangent.to(device, dtype))
        for actual, wanted in zip(grads, theirs, strict=True):
            assert relative_error(actual, wanted) <= bounds[1]


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_sequences(kernel, device):
    query, key, value = make_inputs(1, 2, None, 60, 8)
    ends = [0, 1, 1, 20, 60]
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(ends).diff())
    out = blurry_window_attention(
        *(x.to(device) for x in (query, key, value)),
        BlurryWindow(5, 5, kernel),
        cu_seqlens=torch.tensor(ends, device=device),
    )
    assert relative_error(out, sliding(query, key, value, 5, sequence)) <= 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_state_is_the_last_tokens(kernel, device):
    query, key, value = (x.to(device) for x in make_inputs(1, 1, None, 11, 4))
    _, state = blurry_window_attention(query, key, value, BlurryWindow(4, 4, kernel), return_state=True)
    last = [8, 9, 10, 7]  # token t lies in slot t mod 4
    assert torch.equal(state.key, key[:, :, last]) and torch.equal(state.value, value[:, :, last])
