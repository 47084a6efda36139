"""The table and the plot of results: bits per byte against the size of the state, and by position."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sweep import report as shared
from ..sweep.report import Crossing, Point, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bits(row: Row) -> float:
    return float(row["bits"])


def by_task(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Points by text and size of model."""
    return shared.by_task(rows, lambda row: -bits(row))


@dataclass(frozen=True)
class CatchUp:
    """What a sliding window needs to read as well as the best "fejer" of a state, of any window, all else equal."""

    bits: float
    slots: int
    state: int
    sliding: Crossing | None
    largest: int

    def __str__(self) -> str:
        if self.sliding is None:
            return f"> {self.largest / self.state:.1f} times the state"
        return f"{'<= ' if self.sliding.bounded else ''}{self.sliding.state / self.state:.1f} times the state"


def catching_up(mine: Iterable[Point]) -> list[CatchUp]:
    """One for each state of "fejer"; none where the sliding window was trained with one state alone."""
    found = []
    for sliding, blurry in shared.comparable(mine):
        slots = {point.state: point.slots for point in blurry}
        states = [point.state for point in sliding]
        if min(states) == max(states):
            continue
        for state, score in shared.best(blurry):
            found.append(CatchUp(-score, slots[state], state, shared.crossing(sliding, score), max(states)))
    return found


def table(rows: Sequence[Row]) -> str:
    """Every point by task and family, then what a sliding window needs to catch up."""
    lines = []
    for task, mine in by_task(rows).items():
        width = max(len(point.family) for point in mine)
        lines += [
            task,
            f"{'':{width}} {shared.SIZES}    bits   lowest  highest  2nd half  tokens/s  seeds    rate   steps",
        ]
        for point in sorted(mine, key=lambda p: (p.family, p.slots)):
            speed = statistics.fmean(row["tokens_per_second"] for row in point.rows)
            far = statistics.fmean(second_half(row) for row in point.rows)
            lines.append(
                f"{shared.sized(point, width)}  {-point.mean:6.4f}"
                f"  {-max(point.scores):7.4f}  {-min(point.scores):7.4f}  {far:8.4f}  {speed:8.0f}"
                f"  {len(point.scores):5}  {point.rate:6g}  {point.steps:6}"
            )
        lines += [f"sliding : fejer of {it.slots} slots, at {it.bits:.3f} bits: {it}" for it in catching_up(mine)]
        lines.append("")
    about = {row["text"]["name"]: row["text"] for row in rows}
    lines += [
        f"{name}: {text['bytes']:,} bytes, {text['held_out_bytes']:,} of them in files held out; {text['sha256'][:16]}"
        for name, text in about.items()
    ]
    lines.append("State per head; bits per held-out byte: mean over seeds at the best of the learning rates, also of")
    lines.append("the second half of the context alone; tokens/s: of training, by the median step.")
    return "\n".join(lines)


def second_half(row: Row) -> float:
    """Bits per byte in the second half of the context."""
    length = row["by_position"][-1][1]
    far = [(min(end - first, end - length // 2), value) for first, end, value in row["by_position"]]
    return sum(count * value for count, value in far if count > 0) / (length - length // 2)


def plot(rows: Sequence[Row]) -> Figure:
    """A column per text and size of model: above bits per byte against state, below at equal state by position."""
    from matplotlib.figure import Figure

    tasks = by_task(rows)
    figure = Figure(figsize=(0.5 + 7.5 * len(tasks), 11), dpi=130, layout="constrained")
    for (above, below), (task, mine) in zip(
        figure.subplots(2, len(tasks), squeeze=False).T, tasks.items(), strict=True
    ):
        shared.curves(above, mine, bits)
        above.set(title=task, ylabel="bits per held-out byte")
        _arrows(above, mine)
        shared.legend(above)
        _by_position(below, mine)
    shared.sign(figure, rows)
    return figure


def _arrows(axes: Axes, mine: Sequence[Point]) -> None:
    for it in catching_up(mine):
        if it.sliding is not None and it.sliding.state > it.state:
            style = {"arrowstyle": "<->", "color": shared.INK}
            axes.annotate("", (it.sliding.state, it.bits), (it.state, it.bits), arrowprops=style)
            middle = math.sqrt(it.state * it.sliding.state), it.bits
            axes.annotate(str(it), middle, (0, 4), textcoords="offset points", ha="center", fontsize=8)


def _by_position(axes: Axes, mine: Sequence[Point]) -> None:
    """Mixers of the number of slots that most of them were trained with, and full attention.

    The first bytes are left out: without a past all are alike, and far above the rest.
    """
    markers = shared.markers_of(mine)
    slots = Counter(point.slots for point in mine if point.kind != "full").most_common(1)
    shown = [point for point in mine if point.kind == "full" or point.slots == slots[0][0]]
    for point in shown:
        stretches = list(zip(*(row["by_position"] for row in point.rows), strict=True))
        late = [same for same in stretches if same[0][0] >= stretches[-1][0][1] // 64]
        middles = [(same[0][0] + 1 + same[0][1]) / 2 for same in late]
        means = [statistics.fmean(value for *_, value in same) for same in late]
        style = {"marker": markers[point.family], "ms": 4, "lw": 1.4, "color": shared.colour_of(point)}
        axes.plot(middles, means, label=point.family, **style)
    axes.set(xlabel="byte of the context", ylabel="bits per held-out byte")
    if slots:
        axes.set_title(f"{slots[0][0]} slots")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    shared.bare(axes)
    shared.legend(axes)
