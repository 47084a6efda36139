"""BlurryWindow: what it says of every head, and that it is a value."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from blurry_attn import BlurryWindow


def test_defaults():
    window = BlurryWindow(slots=64, window=512)
    assert (window.kernel, window.sharpness, window.phase) == ("fejer", None, None)
    assert window.gate_sharpness == 6.0
    assert BlurryWindow(4, 8, sharpness=9).gate_sharpness == 9.0


@pytest.mark.parametrize(
    "window",
    [
        BlurryWindow(64, 512),
        BlurryWindow(4, (4, 8), "dirichlet"),
        BlurryWindow(4, (4, 16), sharpness=2.5, phase=(0, 3)),
        BlurryWindow.pyramid(8, (1, 1, 2, 2)),
    ],
)
def test_it_is_a_value(window):
    assert eval(repr(window)) == window
    assert hash(window) == hash(dataclasses.replace(window))
    assert window != dataclasses.replace(window, slots=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        window.slots = 5


def test_windows_that_differ_in_one_field_are_unlike():
    window = BlurryWindow(4, 8, "fejer", 3.0, 0)
    for change in ({"window": 16}, {"kernel": "dirichlet", "sharpness": None}, {"sharpness": 4.0}, {"phase": 1}):
        assert window != dataclasses.replace(window, **change)
    assert window != (4, 8, "fejer", 3.0, 0) and window == dataclasses.replace(window)


def test_sequences_become_tuples():
    assert BlurryWindow(4, [4, 8]) == BlurryWindow(4, (4, 8))
    assert BlurryWindow(4, 8, phase=[0, 1]).phase == (0, 1)


@pytest.mark.parametrize("r", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 16])
def test_heads_of_one_window_are_staggered(r, heads):
    window = BlurryWindow(4, 4 * r)
    assert window.windows(heads) == (4 * r,) * heads
    assert window.resolutions(heads) == (r,) * heads
    assert window.phases(heads) == tuple(i * r // heads for i in range(heads))


def test_heads_of_different_windows_are_staggered_among_their_like():
    window = BlurryWindow(4, (32, 4, 32, 12, 32, 12, 32))
    assert window.resolutions(7) == (8, 1, 8, 3, 8, 3, 8)
    assert window.phases(7) == (0, 0, 2, 0, 4, 1, 6)


def test_phases_can_be_given():
    assert BlurryWindow(4, 32, phase=5).phases(3) == (5, 5, 5)
    assert BlurryWindow(4, (32, 16), phase=(7, 3)).phases(2) == (7, 3)


def test_pyramid():
    window = BlurryWindow.pyramid(64, (1, 1, 2, 2, 8, 8), sharpness=4)
    assert window == BlurryWindow(64, (64, 64, 128, 128, 512, 512), sharpness=4.0)
    assert window.phases(6) == (0, 0, 0, 1, 0, 4)
    assert BlurryWindow.pyramid(4, (2,), "dirichlet", phase=1) == BlurryWindow(4, (8,), "dirichlet", phase=1)
    assert BlurryWindow.pyramid(32) == BlurryWindow.pyramid(32, (1, 1, 1, 1, 4, 4, 8, 8))
    assert BlurryWindow.pyramid(32, heads=12).resolutions(12) == (1, 1, 1, 1, 1, 1, 4, 4, 4, 8, 8, 8)


def test_state_elements():
    window = BlurryWindow(64, 512)
    assert window.state_elements(8, 32) == 8 * 64 * 64
    assert window.state_elements(8, 32, 16) == 8 * 64 * 48


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 8), ValueError, "slots must be at least 2, got 1"),
        ((-4, 8), ValueError, "slots must be at least 2, got -4"),
        ((4.0, 8), TypeError, "slots must be an int, got 4.0"),
        ((True, 8), TypeError, "slots must be an int, got True"),
        ((4, 18), ValueError, r"window must be a positive multiple of slots \(4\), got 18"),
        ((4, 0), ValueError, "window must be a positive multiple of slots"),
        ((4, -8), ValueError, "window must be a positive multiple of slots"),
        ((4, (8, 9)), ValueError, "window must be a positive multiple of slots .* got 9"),
        ((4, ()), ValueError, "window must be an int or a non-empty tuple"),
        ((4, 8.0), TypeError, "window must be an int, got 8.0"),
        ((4, b"\x08"), TypeError, "window must be an int"),
        ((4, bytearray(b"\x08")), TypeError, "window must be an int"),
        ((4, torch.tensor([8])), TypeError, r"window must be an int, got tensor\(\[8\]\)"),
        ((4, np.array([8])), TypeError, r"window must be an int, got array\(\[8\]\)"),
        ((2**20 + 1, 2**20 + 1), ValueError, "slots must be at most 1048576, got 1048577"),
        ((4, 2**22 + 4), ValueError, r"window must be at most 1048576 \* slots, got 4194308"),
        ((4, 8, "fejer", 10**400), ValueError, "sharpness must be finite and at least 1"),
        ((4, (8, "8")), TypeError, r"window\[1\] must be an int, got '8'"),
        ((4, "8"), TypeError, "window must be an int, got '8'"),
        ((4, 8, "hann"), ValueError, r"kernel must be one of \('fejer', 'dirichlet'\), got 'hann'"),
        ((4, 8, None), ValueError, "kernel must be one of"),
        ((4, 8, "fejer", 0.99), ValueError, "sharpness must be finite and at least 1, got 0.99"),
        ((4, 8, "fejer", float("inf")), ValueError, "sharpness must be finite and at least 1, got inf"),
        ((4, 8, "fejer", float("nan")), ValueError, "sharpness must be finite and at least 1, got nan"),
        ((4, 8, "fejer", "6"), TypeError, "sharpness must be a float or None, got '6'"),
        ((4, 8, "dirichlet", 6.0), ValueError, "sharpness must be None with kernel='dirichlet', got 6.0"),
        ((4, 132, "dirichlet"), ValueError, r"window must be at most 32 \* slots with kernel='dirichlet'.* got 132"),
        ((4, (8, 132), "dirichlet"), ValueError, r"window must be at most 32 \* slots"),
        ((4, 8, "fejer", None, 2), ValueError, r"phase must be in 0 .. 1 .* got 2"),
        ((4, 8, "fejer", None, -1), ValueError, r"phase must be in 0 .. 1 .* got -1"),
        ((4, (4, 8), "fejer", None, 1), ValueError, r"phase must be in 0 .. 0 .* got 1"),
        ((4, (8, 16), "fejer", None, (0, 4)), ValueError, r"phase must be in 0 .. 3 .* got 4"),
        ((4, (8, 16), "fejer", None, (0, 1, 1)), ValueError, r"phase must have one entry per window \(2\), got 3"),
        ((4, 8, "fejer", None, 0.5), TypeError, "phase must be an int, got 0.5"),
        ((4, 8, "fejer", None, ()), ValueError, "phase must be an int or a non-empty tuple"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        BlurryWindow(*arguments)


def test_refused_pyramid():
    for eight in (8, np.int64(8)):
        with pytest.raises(TypeError, match=r"resolutions must be a tuple .* per kv head, got 8: .* heads=8 a pyramid"):
            BlurryWindow.pyramid(32, eight)
    assert BlurryWindow.pyramid(32, (8,)).window == (256,)
    with pytest.raises(ValueError, match="resolutions must be at least 1, got 0"):
        BlurryWindow.pyramid(4, (1, 0))
    with pytest.raises(TypeError, match=r"resolutions\[0\] must be an int, got 1.5"):
        BlurryWindow.pyramid(4, (1.5,))
    with pytest.raises(TypeError, match="slots must be an int"):
        BlurryWindow.pyramid("4", (1,))
    for heads in (0, 6):
        with pytest.raises(ValueError, match=f"heads must be a positive multiple of 4, got {heads}"):
            BlurryWindow.pyramid(4, heads=heads)
    with pytest.raises(ValueError, match="heads must be None beside resolutions, got 4"):
        BlurryWindow.pyramid(4, (1, 2, 4, 8), heads=4)


@pytest.mark.parametrize("method", ["windows", "resolutions", "phases"])
def test_another_number_of_heads_is_refused(method):
    with pytest.raises(ValueError, match=r"window must have one entry per kv head \(3\), got 2"):
        getattr(BlurryWindow(4, (4, 8)), method)(3)
    with pytest.raises(ValueError, match=r"phase must have one entry per kv head \(3\), got 2"):
        BlurryWindow(4, 8, phase=(0, 1)).phases(3)
