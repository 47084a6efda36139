"""Numbers at the ends of their types, and a history of a million tokens."""

from __future__ import annotations

import pytest
import torch
from helpers import HALVES, KERNELS, make_inputs, oracle, relative_error, run

from blurry_attn import BlurryWindow, blurry_window_attention, blurry_window_step

DTYPES = (torch.float64, torch.float32, *HALVES)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(kernel, dtype, size, device):
    """The softmax picks, and nothing overflows: keys of 0 and 1, so that in float32, too, logits keep their digits."""
    window = BlurryWindow(4, 8, kernel)
    value = make_inputs(1, 1, None, 40, 4, dtype=dtype, device=device)[2]
    key = torch.zeros(1, 1, 40, 1, dtype=dtype, device=device)
    key[0, 0, ::7] = 1
    inputs = (torch.full_like(key, size), key, value)
    found = run(blurry_window_attention, *inputs, window, scale=1.0)
    assert all(x.isfinite().all() for x in found.values())
    exact = run(oracle, *(x.double().cpu() for x in inputs), window, scale=1.0)
    torch.testing.assert_close(found["lse"].double().cpu(), exact["lse"], rtol=1e-6, atol=2e-3)
    assert relative_error(found["out"], exact["out"]) <= 2e-3 + torch.finfo(dtype).eps


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_at_the_end_of_their_type(kernel, dtype, device):
    """ "fejer" mixes with weights that sum to one: values of the largest number of a type do not overflow.

    A softmax in float32 has room for float16 to its end; of the wider types a quarter is left, for sums on the way.
    """
    window = BlurryWindow(4, 4 if kernel == "dirichlet" else 32, kernel)
    query, key, value = make_inputs(1, 2, None, 70, 8, dtype=dtype, device=device)
    top = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 4)
    out = blurry_window_attention(query, key, value.sign() * top, window)
    assert out.isfinite().all() and out.abs().max() > top / 2
    constant = torch.full_like(value, top)
    torch.testing.assert_close(blurry_window_attention(query, key, constant, window), constant, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_values_are_not_lost(kernel, dtype, device):
    window = BlurryWindow(4, 32, kernel)
    query, key, value = make_inputs(1, 2, None, 70, 8, dtype=dtype, device=device)
    denormal = torch.full_like(value, torch.finfo(dtype).smallest_normal / 4)
    out = blurry_window_attention(query, key, denormal, window)
    torch.testing.assert_close(out, denormal, rtol=0.03, atol=0)


def drift(
    tokens: int, window: BlurryWindow, device: torch.device, state_dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Relative error of prefill and of steps in float32, over the last 64 of many tokens, against float64."""
    inputs = make_inputs(1, 1, None, tokens, 4, dtype=torch.float64, device=device)
    last = slice(tokens - 64, tokens)
    exact = blurry_window_attention(*inputs, window)[:, :, last]
    inputs = tuple(x.float() for x in inputs)
    whole = blurry_window_attention(*inputs, window)[:, :, last]
    _, state = blurry_window_attention(*(x[:, :, :1] for x in inputs), window, return_state=True)
    state = state.to(state_dtype)
    steps = []
    for token in zip(*(x[:, :, 1:].split(1, 2) for x in inputs), strict=True):
        steps.append(blurry_window_step(*token, state))
        del steps[:-64]
    assert state.position.tolist() == [tokens]
    return relative_error(whole, exact), relative_error(torch.cat(steps, 2), exact)


@pytest.mark.parametrize("window", [BlurryWindow(4, 64), BlurryWindow(4, 64, "dirichlet")], ids=KERNELS)
def test_steps_do_not_drift(window, device):
    """Errors are forgotten as the tokens are: after 20,000 steps they are no larger than after 200."""
    with torch.no_grad():
        for tokens in (200, 20_000):
            whole, steps = drift(tokens, window, device)
            assert whole <= 1e-5 and steps <= 1e-5


@pytest.mark.parametrize("tokens", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_steps_with_a_bfloat16_state_do_not_drift(tokens, device):
    """The error stays that of one rounding, however many tokens went by."""
    with torch.no_grad():
        _, steps = drift(tokens, BlurryWindow(4, 64), device, torch.bfloat16)
    print(f"bfloat16 state: error over the last of {tokens} tokens {steps:.1e}")
    assert steps <= 2**-8


@pytest.mark.slow
@pytest.mark.parametrize("window", [BlurryWindow(4, 64), BlurryWindow(4, 64, "dirichlet")], ids=KERNELS)
def test_a_million_steps_do_not_drift(window, device):
    with torch.no_grad():
        whole, steps = drift(1_000_000, window, device)
    print(f"{window.kernel}: error over the last of 10^6 tokens, in one piece {whole:.1e}, in steps {steps:.1e}")
    assert whole <= 1e-5 and steps <= 1e-5
