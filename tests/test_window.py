"""BlurryWindow: what it says of every head, and that it is a value."""

from __future__ import annotations

import dataclasses

import pytest

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


def test_state_elements():
    window = BlurryWindow(64, 512)
    assert window.state_elements(8, 32) == 8 * 64 * 64
    assert window.state_elements(8, 32, 16) == 8 * 64 * 48
