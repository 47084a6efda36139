"""The geometry of the law in Python agrees with the reference, which shares nothing with it."""

from __future__ import annotations

import math

import pytest
import torch

from blurry_attn import BlurryWindow, geometry, reference

HEADS = [(2, 2, 0), (4, 16, 0), (4, 16, 3), (5, 35, 2), (8, 24, 1)]
WINDOWS = [BlurryWindow(slots, window, kernel, phase=phase) for slots, window, phase in HEADS
           for kernel in ("fejer", "dirichlet")]  # fmt: skip


@pytest.mark.parametrize(("slots", "window", "phase"), HEADS)
def test_openings_and_the_slot_that_opens_first(slots: int, window: int, phase: int) -> None:
    opens = geometry.openings(slots, window, phase)
    assert opens == [reference.opening(slot, slots, window // slots, phase) for slot in range(slots)]
    assert opens[geometry.first_slot(slots, phase)] == min(opens) == 0


@pytest.mark.parametrize(("slots", "window", "phase"), HEADS)
def test_slots_in_flux_are_those_whose_gate_is_not_zero(slots: int, window: int, phase: int) -> None:
    position = torch.arange(3 * window)
    resolution = window // slots
    found = geometry.slots_in_flux(position, slots, torch.tensor([resolution]), torch.tensor([phase]))
    shares = reference.gates(BlurryWindow(slots, window, phase=phase), window, phase, 0, 3 * window).nan_to_num(0.0)
    assert found.shape == (3 * window, 1, 2)
    for token, (trailing, leading) in enumerate(found[:, 0].tolist()):
        assert set(shares[token].nonzero().flatten().tolist()) <= {trailing, leading}
        assert leading == (trailing + 1) % slots
        assert (token - geometry.centre(trailing, resolution, phase)) % window < resolution


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_echo_is_what_a_lap_leaves(window: BlurryWindow) -> None:
    ((head_window,), (phase,)) = window.windows(1), window.phases(1)
    lap = reference.gates(window, head_window, phase, 2 * head_window, head_window)
    expected = (1 - lap).prod(0).abs().max().item()
    found = geometry.echo(window.kernel, window.slots, head_window, phase, window.gate_sharpness)
    assert math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-300)


@pytest.mark.parametrize(("slots", "window", "phase"), HEADS)
def test_interpolation_weights_are_the_dirichlet_kernel(slots: int, window: int, phase: int) -> None:
    lag, position = torch.arange(window, dtype=torch.float64), 5 * window + 1
    weights = geometry.interpolation_weights(
        lag.reshape(1, 1, -1), torch.tensor([position]), slots, torch.tensor([window]), torch.tensor([phase])
    )
    centres = [geometry.centre(slot, window // slots, phase) for slot in range(slots)]
    expected = [
        [reference.dirichlet(position - 1 - back - centre, slots, window) for centre in centres]
        for back in range(window)
    ]
    torch.testing.assert_close(weights[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("resolutions", [(1,), (4, 4, 4), (1, 8, 8, 1, 8, 3)])
def test_heads_of_one_resolution_are_staggered_evenly(resolutions: tuple[int, ...]) -> None:
    seen: dict[int, int] = {}
    for resolution, phase in zip(resolutions, geometry.staggered_phases(resolutions), strict=True):
        assert phase == math.floor(seen.get(resolution, 0) * resolution / resolutions.count(resolution))
        seen[resolution] = seen.get(resolution, 0) + 1
