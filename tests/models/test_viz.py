"""Pictures show what the law says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
from blurry_attn import BlurryWindow, reference, viz

ROOT = Path(__file__).parents[2]
WINDOWS = {
    "sliding": BlurryWindow(8, 8),
    "fejer": BlurryWindow(8, 64),
    "fejer, phase": BlurryWindow(5, 35, phase=3),
    "dirichlet": BlurryWindow(8, 32, kernel="dirichlet"),
}


@pytest.mark.parametrize("tokens", [1, 20, 100])
@pytest.mark.parametrize("name", WINDOWS)
def test_slot_weights_are_the_recurrence_applied_to_each_token(name: str, tokens: int) -> None:
    window = WINDOWS[name]
    share = reference.gates(window, window.windows(1)[0], window.phases(1)[0], 0, tokens)
    expected = torch.zeros(window.slots, tokens, dtype=torch.float64)
    for token, gate in enumerate(share.nan_to_num(0.0)):
        expected *= 1 - gate.unsqueeze(1)
        expected[:, token] += gate
    weights = viz.slot_weights(window, tokens)
    assert weights.shape == (1, window.slots, tokens)
    torch.testing.assert_close(weights[0], expected, rtol=0, atol=1e-12)
    is_open = ~share[-1].isnan()
    torch.testing.assert_close(weights[0].sum(1), is_open.double(), rtol=0, atol=1e-12)


def test_token_weights_draws_every_slot_of_every_window_with_age_zero_at_the_right() -> None:
    figure = viz.token_weights({"sliding": BlurryWindow(4, 4), "pyramid": BlurryWindow.pyramid(4, (1, 2))}, tokens=16)
    sliding, pyramid = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert sliding.shape == (4, 16) and pyramid.shape == (8, 16)
    left, right = figure.axes[0].get_xlim()
    assert left > right
    # Column i of the image is age i; rows run from the newest slot to the oldest.
    assert sliding.filled(0)[:, :4].tolist() == torch.eye(4).tolist()
    assert sliding.mask[:, 4:].all()


def test_a_notebook_shows_every_figure_as_a_picture() -> None:
    """By the method that its display looks for, whatever backend it has."""
    window = BlurryWindow(4, 8)
    signal = torch.ones(16)
    for figure in (
        viz.token_weights({"r = 2": window}, tokens=16),
        viz.gates(window),
        viz.reconstruction(signal, {"r = 2": window}),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("kernel", ["fejer", "dirichlet"])
def test_gates_draws_the_gates(kernel: str) -> None:
    window = BlurryWindow(4, 16, kernel=kernel, phase=1)
    figure = viz.gates(window, tokens=40, slots=[0, 3])
    share = reference.gates(window, 16, 1, 0, 40)
    for axes, slot in zip(figure.axes, [0, 3], strict=True):
        (points,) = (line for line in axes.lines if line.get_marker() == "o")
        drawn = torch.zeros(40, dtype=torch.float64)
        drawn[torch.as_tensor(points.get_xdata())] = torch.as_tensor(points.get_ydata())
        torch.testing.assert_close(drawn, share[:, slot].nan_to_num(0.0), rtol=0, atol=0)


def test_gates_draws_every_head_that_differs_or_the_one_that_is_asked_for() -> None:
    window = BlurryWindow.pyramid(4, (1, 4, 1, 4))  # the second head of r = 4 is staggered
    labels = [axes.get_ylabel().split() for axes in viz.gates(window, slots=[0, 2]).axes]
    assert labels == [["head", str(head), "slot", str(slot)] for head in (0, 1, 3) for slot in (0, 2)]
    drawn = viz.gates(window, tokens=40, slots=[2], head=3).axes
    assert [axes.get_ylabel() for axes in drawn] == ["slot 2"]
    share = reference.gates(window, 16, 2, 0, 40)[:, 2].nan_to_num(0.0)
    (points,) = (line for line in drawn[0].lines if line.get_marker() == "o")
    assert points.get_ydata().tolist() == share[share != 0].tolist()


def test_reconstruction_of_a_sliding_window_passes_through_its_tokens() -> None:
    signal = torch.randn(40, dtype=torch.float64)
    figure = viz.reconstruction(signal, {"sliding": BlurryWindow(16, 16)})
    _, curve = figure.axes[0].lines
    x, y = (torch.as_tensor(data) for data in (curve.get_xdata(), curve.get_ydata()))
    torch.testing.assert_close(x[::10], torch.arange(39.0, 23.0, -1.0, dtype=torch.float64))
    torch.testing.assert_close(y[::10], signal.flip(0)[:16])
    assert y.isfinite().all()


def test_the_pictures_of_the_documentation_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    pictures = importlib.import_module("pictures")
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: viz.slot_weights(BlurryWindow(4, 8), 0), "tokens must be at least 1, got 0"),
        (lambda: viz.token_weights({}), "windows must hold at least one window, got none"),
        (lambda: viz.reconstruction(torch.ones(3), {}), "windows must hold at least one window, got none"),
        (
            lambda: viz.reconstruction(torch.ones(2, 3), {"r = 2": BlurryWindow(4, 8)}),
            r"signal must be \(T,\) with T at least 1, got shape \(2, 3\)",
        ),
        (lambda: viz.gates(BlurryWindow(4, 8), slots=[4]), r"slots must be in 0 \.\. 3, got \[4\]"),
        (lambda: viz.gates(BlurryWindow(4, 8), head=-1), "head must not be negative, got -1"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["slots", "tokens", "head"])
def test_what_is_no_int_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an int, got True"):
        viz.gates(BlurryWindow(4, 8), **{name: [True] if name == "slots" else True})


def test_without_matplotlib_one_line_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name == "blurry_attn._picture"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        viz.gates(BlurryWindow(4, 8))
