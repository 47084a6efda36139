"""Pictures of what a blurry window holds.

Every function that draws takes data and returns a :class:`matplotlib.figure.Figure`, which a notebook shows by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import geometry, reference
from .ops import blurry_window_attention
from .state import BlurryState
from .window import BlurryWindow, integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

INK, MUTED, FAINT, ACCENT = "#1c1917", "#78716c", "#e7e5e4", "#c2410c"


def slot_weights(window: BlurryWindow, tokens: int, kv_heads: int = 1) -> Tensor:
    """The weight of every past token in every slot, after ``tokens`` tokens.

    Args:
        window: the window; where it is given per head, it has ``kv_heads`` entries.
        tokens: length of the history, at least 1.
        kv_heads: number of key/value heads.

    Returns:
        ``(kv_heads, N, tokens)`` float64, token 0 the oldest. They sum to one in an open slot; a shut one has none.

    Raises:
        ValueError: ``tokens`` is less than 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    # A slot is a linear map of the values, so that one-hot values show its weights.
    nothing = torch.zeros(1, kv_heads, tokens, 1, dtype=torch.float64, device="cpu")
    one_hot = torch.eye(tokens, dtype=torch.float64, device="cpu").expand(1, kv_heads, tokens, tokens)
    state = blurry_window_attention(nothing, nothing, one_hot, window, return_state=True)[1]
    assert isinstance(state, BlurryState)
    return state.value[0]


def token_weights(windows: dict[str, BlurryWindow], tokens: int = 256) -> Figure:
    """What weight each of the past ``tokens`` tokens has in the slots: per window a heat map of slots by age.

    Args:
        windows: title -> window of one kv head, or of several, whose slots are then drawn below each other.
        tokens: length of the history.

    Raises:
        ValueError: ``windows`` is empty or ``tokens`` is less than 1.
    """
    if not windows:
        raise ValueError("windows must hold at least one window, got none")
    heights = [0.6 + 0.4 * _kv_heads(window) for window in windows.values()]
    figure = _figure(2 + 1.2 * sum(heights))
    panels = figure.subplots(len(windows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    images = [_weight_map(axes, *entry, tokens) for axes, entry in zip(panels, windows.items(), strict=True)]
    panels[-1].set_xlabel("age of the token (tokens back from the newest, which is at the right)", color=INK)
    bar = figure.colorbar(images[0], ax=panels, shrink=0.5, aspect=24, pad=0.015)
    bar.set_label("weight of the token in the slot", color=INK)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    bar.ax.tick_params(labelsize=9, colors=INK)
    bar.outline.set_visible(False)
    _title(figure, f"What {next(iter(windows.values())).slots} slots hold of {tokens} tokens")
    return figure


def _weight_map(axes: Axes, title: str, window: BlurryWindow, tokens: int) -> AxesImage:
    from matplotlib.colors import PowerNorm

    heads, slots = _kv_heads(window), window.slots
    blocks = []
    for weights in slot_weights(window, tokens, heads):
        age = (weights * torch.arange(tokens - 1, -1, -1, device=weights.device)).sum(1)
        blocks.append(weights[torch.where(weights.sum(1) > 0, age, torch.inf).argsort()])
    weights = torch.cat(blocks).flip(1)
    image = axes.imshow(
        weights.masked_fill(weights < 1e-3, torch.nan).numpy(),
        extent=(-0.5, tokens - 0.5, heads * slots, 0),
        aspect="auto",
        cmap="inferno_r",
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        interpolation="nearest",
    )
    for head, reach in enumerate(window.windows(heads)):
        if reach < tokens:
            axes.fill_between(
                (reach - 0.5, tokens - 0.5), head * slots, (head + 1) * slots, color=FAINT, lw=0, zorder=0
            )
            middle = ((reach + tokens) / 2, (head + 0.5) * slots)
            axes.text(*middle, "forgotten", color=MUTED, fontsize=9, ha="center", va="center")
        if head:
            axes.axhline(head * slots, color=MUTED, lw=0.7)
    axes.set_xlim(tokens - 0.5, -0.5)
    axes.set_xticks(range(0, tokens + 1, max(1, tokens // 8)))
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    if heads == 1:
        axes.set_ylabel("slot", color=INK)
        axes.set_yticks([0.5, slots - 0.5], ["newest", "oldest"])
    else:
        axes.set_ylabel("slots of each head", color=INK)
        middles = [(head + 0.5) * slots for head in range(heads)]
        axes.set_yticks(middles, [f"r = {resolution}" for resolution in window.resolutions(heads)])
    _plain(axes)
    return image


def gates(
    window: BlurryWindow, tokens: int | None = None, slots: Sequence[int] | None = None, head: int | None = None
) -> Figure:
    """The share of each token that each slot takes, over time.

    Args:
        window: the window; where it is given per head, the heads that differ are drawn below each other.
        tokens: how many tokens from the start; one and a half periods of the longest window when None.
        slots: which slots to draw; the first four when None.
        head: draw this kv head alone; all that differ when None.

    Raises:
        TypeError: ``tokens``, ``head`` or a slot is not an int.
        ValueError: ``tokens`` is less than 1, ``head`` negative, or ``slots`` is empty or names one that is not there.
    """
    heads = _kv_heads(window) if head is None else max(_kv_heads(window), integer("head", head) + 1)
    if head is not None and head < 0:
        raise ValueError(f"head must not be negative, got {head}")
    laws = list(zip(window.windows(heads), window.phases(heads), strict=True))
    first_heads = {law: index for index, law in reversed(list(enumerate(laws)))}
    drawn = sorted(first_heads.values()) if head is None else [head]
    longest = max(laws[index][0] for index in drawn)
    tokens = longest + longest // 2 if tokens is None else integer("tokens", tokens)
    slots = list(range(min(4, window.slots)) if slots is None else map(partial(integer, "slots"), slots))
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not slots or not all(0 <= slot < window.slots for slot in slots):
        raise ValueError(f"slots must be in 0 .. {window.slots - 1}, got {slots}")
    figure = _figure(1.1 + 1.0 * len(slots) * len(drawn))
    rows = figure.subplots(len(slots) * len(drawn), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (index, slot) in zip(rows, product(drawn, slots), strict=True):
        _gate(axes, window, *laws[index], slot, tokens)
        axes.set_ylabel(f"slot {slot}" if len(drawn) == 1 else f"head {index}\nslot {slot}", color=INK)
    rows[0].set_xlim(-0.5, tokens - 0.5)
    rows[0].set_ylim(top=1.12)
    rows[-1].set_xlabel("token t   (dotted: the slot's centres; grey: the slot is shut)", color=INK)
    law = f'"{window.kernel}"' + (f", sharpness {window.gate_sharpness:g}" if window.kernel == "fejer" else "")
    resolutions = ", ".join(map(str, dict.fromkeys(laws[index][0] // window.slots for index in drawn)))
    _title(figure, f"Gates, the share of token t that a slot takes: {law}, {window.slots} slots, r = {resolutions}")
    return figure


def _gate(axes: Axes, window: BlurryWindow, head_window: int, phase: int, slot: int, tokens: int) -> None:
    """Draws one slot of one head."""
    resolution = head_window // window.slots
    share = reference.gates(window, head_window, phase, 0, tokens)[:, slot].nan_to_num(0.0)
    axes.axvspan(-0.5, reference.opening(slot, window.slots, resolution, phase) - 0.5, color=FAINT, lw=0)
    axes.axhline(0, color=MUTED, lw=0.6)
    time = share.nonzero().flatten()
    axes.vlines(time, 0, share[time], color=ACCENT, lw=max(1.0, min(3.0, 480 / tokens)))
    axes.plot(time, share[time], "o", color=ACCENT, ms=2.5)
    for centre in range(geometry.centre(slot, resolution, phase), tokens, head_window):
        axes.axvline(centre, color=MUTED, lw=0.8, ls=(0, (2, 3)), zorder=0)
    axes.set_yticks([0, 1])
    _plain(axes)


def reconstruction(signal: Tensor, windows: dict[str, BlurryWindow]) -> Figure:
    """A signal, and what the slots of each window still say of it: the slots and the curve interpolated through them.

    Args:
        signal: ``(T,)`` real, one value per token.
        windows: title -> window of one kv head.

    Raises:
        ValueError: ``signal`` is not one-dimensional or empty, or ``windows`` is empty.
    """
    if signal.dim() != 1 or not len(signal):
        raise ValueError(f"signal must be (T,) with T at least 1, got shape {tuple(signal.shape)}")
    if not windows:
        raise ValueError("windows must hold at least one window, got none")
    tokens = len(signal)
    time = torch.arange(tokens, device="cpu")
    figure = _figure(0.9 + 1.6 * len(windows))
    rows = figure.subplots(len(windows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, window) in zip(rows, windows.items(), strict=True):
        value = signal.detach().to("cpu", torch.float64).reshape(1, 1, tokens, 1)
        state = blurry_window_attention(value, value, value, window, return_state=True)[1]
        assert isinstance(state, BlurryState)
        lag = torch.arange(10 * min(window.windows(1)[0], tokens) - 9, dtype=torch.float64, device=value.device) / 10
        curve = state.reconstruct(lag)[1][0, 0, :, 0]
        axes.plot(time, value.flatten(), color=MUTED, lw=0.9, label="signal, one value per token")
        axes.plot(tokens - 1 - lag, curve, color=ACCENT, lw=1.8, label="what the slots say")
        axes.axvspan(-0.5, tokens - 1.5 - float(lag[-1]), color=FAINT, lw=0, label="forgotten")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        _plain(axes)
    rows[0].set_xlim(-0.5, tokens - 0.5)
    rows[-1].set_xlabel("token", color=INK)
    handles, labels = rows[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    _title(figure, f"A history, and {next(iter(windows.values())).slots} slots of it")
    return figure


def _kv_heads(window: BlurryWindow) -> int:
    return max(len(entry) if isinstance(entry, tuple) else 1 for entry in (window.window, window.phase))


def _figure(height: float) -> Figure:
    """An empty figure of the documentation's width, ``height`` inches high."""
    try:
        from ._picture import Picture
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "blurry_attn.viz needs matplotlib; type: pip install matplotlib", name="matplotlib"
        ) from None
    return Picture(figsize=(10, height), dpi=140, layout="constrained")


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", weight="bold", color=INK)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
