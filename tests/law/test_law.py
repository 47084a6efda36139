"""The law: the compiled tables against the plain Python of the reference, and both against what defines them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from blurry_attn import _C, BlurryWindow, reference

SIZES = [(slots, r) for slots, r in itertools.product((2, 3, 4, 5, 6, 7, 16, 65), (1, 2, 3, 5, 6, 7, 8, 32))] + [
    (2, 300),
    (3, 301),
]


def table(kernel: str, slots: int, r: int, phase: int, start: int, length: int, sharpness: float = 6.0) -> torch.Tensor:
    return torch.from_numpy(_C.gates(kernel, slots, slots * r, phase, sharpness, start, length))


@pytest.mark.parametrize("slots,r", SIZES)
@pytest.mark.parametrize("kernel", ["fejer", "dirichlet"])
def test_gates_equal_the_reference(kernel, slots, r):
    if kernel == "dirichlet" and r > 32:
        pytest.skip("dirichlet stops at 32 tokens per slot")
    period, far = slots * r, 10**15
    for phase in sorted({0, 1 % r, r // 2, r - 1}):
        for start, sharpness in ((0, 6.0), (period - 1, 1.0), (far, 9.5)):
            window = BlurryWindow(slots, period, kernel, sharpness if kernel == "fejer" else None, phase)
            length = min(period + 2 * r + 1, 200)
            expected = reference.gates(window, period, phase, start, length)
            actual = table(kernel, slots, r, phase, start, length, sharpness)
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-16, equal_nan=True)
            for exact in (0.0, 1.0):
                assert torch.equal(actual == exact, expected == exact)


@pytest.mark.parametrize("slots,r", SIZES)
def test_openings_are_the_first_tokens_of_the_lobes(slots, r):
    for phase in range(r) if slots * r <= 200 else (0, 1, r - 1):
        lobes = [[] for _ in range(slots)]
        for cell in range(-1 if phase else 0, slots):
            centre = cell * r + phase
            lobes[cell % slots] += [t for t in range(max(0, centre - r + 1), centre + r)]
        expected = [min(tokens) for tokens in lobes]
        assert _C.openings(slots, slots * r, phase) == expected
        assert [reference.opening(m, slots, r, phase) for m in range(slots)] == expected


@pytest.mark.parametrize("slots,r", SIZES)
def test_dirichlet_interpolates(slots, r):
    """The gates of a token sum to one, are those of a cosine sum, and are exactly 0 or 1 at the centres."""
    if r > 32:
        pytest.skip("dirichlet stops at 32 tokens per slot")
    period = slots * r
    gates = table("dirichlet", slots, r, r // 2, 2 * period, period)
    assert not gates.isnan().any()
    torch.testing.assert_close(gates.sum(1), torch.ones(period, dtype=torch.float64), rtol=0, atol=1e-13)
    x = (torch.arange(2 * period, 3 * period).unsqueeze(1) - torch.arange(slots) * r - r // 2).double()
    harmonics = torch.arange(1, (slots + 1) // 2, dtype=torch.float64)
    cosine = 1 + 2 * (2 * math.pi / period * x.unsqueeze(-1) * harmonics).cos().sum(-1)
    if slots % 2 == 0:
        cosine = cosine + (math.pi / r * x).cos()
    torch.testing.assert_close(gates, cosine / slots, rtol=0, atol=1e-11)
    centred = x % r == 0
    assert torch.equal(gates[centred], (x[centred] % period == 0).double())


@pytest.mark.parametrize("slots,r", SIZES)
@pytest.mark.parametrize("sharpness", [1.0, 6.0, 40.0])
def test_fejer_is_a_squared_lobe(slots, r, sharpness):
    period, phase = slots * r, r - 1
    gates = table("fejer", slots, r, phase, 2 * period, period, sharpness)
    squared = table("dirichlet", slots, r, phase, 2 * period, period).square()
    away = (torch.arange(period).unsqueeze(1) - torch.arange(slots) * r - phase) % period
    lobe = torch.minimum(away, period - away) < r
    torch.testing.assert_close(gates, torch.where(lobe, (sharpness / r * squared).clamp_max(1.0), 0.0))
    assert ((gates > 0).sum(1) <= 2).all()
    assert (gates >= 0).all() and (gates <= 1).all()
    if r <= sharpness:
        assert (gates.amax(0) == 1).all()


def test_gates_repeat_exactly():
    """Time is reduced modulo the window in integers: a period later the gates are the same bits."""
    for kernel in ("fejer", "dirichlet"):
        near, far = (table(kernel, 6, 7, 3, start, 42) for start in (42, 42 * 10**15))
        assert torch.equal(near, far)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "hann"}, "kernel must be 'fejer' or 'dirichlet', got 'hann'"),
        ({"slots": 1}, r"slots must be at least 2, got 1"),
        ({"window": 18}, r"window must be a positive multiple of slots \(4\), got 18"),
        ({"window": 0}, r"window must be a positive multiple of slots \(4\), got 0"),
        ({"phase": 4}, r"phase must be in 0 .. 3 \(window / slots - 1\), got 4"),
        ({"phase": -1}, r"phase must be in 0 .. 3 \(window / slots - 1\), got -1"),
        ({"start": -1}, r"start must be in 0 .. 2\^62"),
        ({"length": -1}, r"length must be in 0 .. 2\^42"),
    ],
)
def test_bad_arguments_of_the_table(changes, message):
    good = {"kernel": "fejer", "slots": 4, "window": 16, "phase": 0, "sharpness": 6.0, "start": 0, "length": 3}
    assert _C.gates(**good).shape == (3, 4)
    with pytest.raises(ValueError, match=message):
        _C.gates(**good | changes)
