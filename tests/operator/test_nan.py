"""NaN and inf stay where the law puts them: after their token, in their head and sequence, until they are replaced."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import KERNELS, make_inputs, make_state, run, shut_slots

from blurry_attn import BlurryWindow, blurry_window_attention, reference

TOKENS, AT = 170, 61
OUTPUTS, STATES = ("out", "lse"), ("end_key", "end_value")


def poison(inputs, which, number, at=AT):
    """One token of one input, in the first head of the first sequence."""
    bad = [x.clone() for x in inputs]
    bad[which][0, 0, at] = number
    return bad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("resolution", [1, 3, 8, 20])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_contained(kernel, dtype, resolution, number, which, device):
    """To the last bit: earlier outputs, other sequences and heads with all their gradients, and other queries."""
    window = BlurryWindow(6, 6 * resolution, kernel)
    inputs = make_inputs(2, 4, 2, TOKENS, 8, 8, dtype, device)
    clean, bad = (run(blurry_window_attention, *x, window) for x in (inputs, poison(inputs, which, number)))
    assert not math.isnan(number) or bad["out"][0, 0, AT].isnan().any()
    for name, x in bad.items():
        assert torch.equal(x[1], clean[name][1]), f"{name} of another sequence"
        if name != "position":
            own = 2 if name in (*OUTPUTS, "grad_query") else 1  # query heads that share the key and value head
            assert torch.equal(x[:, own:], clean[name][:, own:]), f"{name} of another head"
    for name in OUTPUTS:
        assert torch.equal(bad[name][:, :, :AT], clean[name][:, :, :AT]), f"earlier {name}"
        if which == 0:
            assert torch.equal(bad[name][:, :, AT + 1 :], clean[name][:, :, AT + 1 :])
            assert torch.equal(bad[name][:, 1:], clean[name][:, 1:])


def touched(window: BlurryWindow, at: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which outputs (length,) and final slots (N,) depend on token `at`: a gate of 1 replaces, one of 0 leaves."""
    gates = reference.gates(window, window.windows(1)[0], window.phases(1)[0], 0, length)
    holds, outputs = torch.zeros(window.slots, dtype=torch.bool), []
    for t, gate in enumerate(gates):
        holds = (holds & (gate != 1)) | (gate > 0 if window.kernel == "fejer" else gate != 0) * (
            t == at
        ) * ~gate.isnan()
        outputs.append(holds.any())
    return torch.stack(outputs), holds


@pytest.mark.parametrize(
    "window",
    [
        BlurryWindow(6, 6),
        BlurryWindow(6, 30),
        BlurryWindow(5, 30, phase=4),
        BlurryWindow(4, 32),
        BlurryWindow(3, 60, sharpness=25.0, phase=7),
        BlurryWindow(3, 60, sharpness=1.0),
        BlurryWindow(2, 26, phase=12),
        BlurryWindow(6, 42, "dirichlet", phase=3),
        BlurryWindow(5, 5, "dirichlet"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_nan_lives_exactly_as_long_as_the_law_says(window, dtype, which, device):
    """Gone once gates of 1 have replaced every slot that held it; with r > sharpness it stays, as the echo."""
    inputs = make_inputs(1, 1, None, TOKENS, 8, dtype=dtype, device=device)
    clean = run(blurry_window_attention, *inputs, window, gradients=False)
    for at in (0, 1, 29, 60, 61, 66, 71):
        bad = run(blurry_window_attention, *poison(inputs, which, math.nan, at), window, gradients=False)
        outputs, slots = (x.to(device) for x in touched(window, at, TOKENS))
        assert torch.equal(bad["out"][0, 0].isnan().all(-1), outputs)
        assert torch.equal(bad["out"][0, 0, ~outputs], clean["out"][0, 0, ~outputs])
        name, other = STATES if which == 1 else STATES[::-1]
        assert torch.equal(bad[name][0, 0].isnan().all(-1), slots)
        assert torch.equal(bad[name][0, 0, ~slots], clean[name][0, 0, ~slots])
        assert torch.equal(bad[other], clean[other])


def test_the_echo_and_its_absence_are_both_tested():
    assert touched(BlurryWindow(4, 32), AT, TOKENS)[0][AT:].all()
    assert not touched(BlurryWindow(6, 30), AT, TOKENS)[0][AT + 36 :].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_packed_neighbours(kernel, which, device):
    """A sequence that is NaN from its first to its last token leaves those packed beside it alone."""
    window, ends = BlurryWindow(5, 45, kernel), [0, 40, 110, 110, 170]
    inputs = make_inputs(1, 2, None, TOKENS, 8, dtype=torch.float32, device=device)
    bad = [x.clone() for x in inputs]
    bad[which][:, :, 40:110] = math.nan
    options = {
        "state": make_state(window, [0, 9, 5, 100], dtype=torch.float32, device=device),
        "cu_seqlens": torch.tensor(ends, device=device),
    }
    clean, found = (run(blurry_window_attention, *x, window, **options) for x in (inputs, bad))
    others = [t for t in range(TOKENS) if not 40 <= t < 110]
    for name, x in found.items():
        kept = (slice(None), slice(None), others) if x.shape[0] == 1 else [0, 2, 3]
        assert torch.equal(x[kept], clean[name][kept]), name


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_in_a_given_slot(kernel, device):
    """Stays in the sequence and head of that slot."""
    window = BlurryWindow(5, 45, kernel)
    inputs = make_inputs(2, 2, None, 30, 8, dtype=torch.float32, device=device)
    state = make_state(window, [100, 200], dtype=torch.float32, device=device)
    clean = run(blurry_window_attention, *inputs, window, state=state)
    state.key[0, 0, 2] = math.nan
    bad = run(blurry_window_attention, *inputs, window, state=state)
    assert bad["out"][0, 0].isnan().any()
    for name, x in bad.items():
        assert torch.equal(x[1], clean[name][1]), name
        assert name == "position" or torch.equal(x[0, 1], clean[name][0, 1]), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_a_query_leaves_shut_slots_without_gradient(kernel, dtype, device):
    """What opened later replaced them whole: no product with zero lets a NaN through."""
    window, position = BlurryWindow(16, (16, 64, 128), kernel), [11, 40]
    inputs = make_inputs(2, 3, 3, 300, 64, dtype=dtype, device=device)
    state = make_state(window, position, 3, 64, dtype=dtype, device=device)
    inputs[0][:, :, -1] = math.nan
    found = run(blurry_window_attention, *inputs, window, state=state)
    shut = shut_slots(window, position, 3).to(device)
    assert shut.any()
    for name in ("grad_state_key", "grad_state_value"):
        assert torch.equal(found[name][shut], torch.zeros_like(found[name][shut])), name
