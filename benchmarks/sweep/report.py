"""The table and the plot of results: accuracy against the size of the state."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .results import identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
INK, GREY, FAINT = "#1c1917", "#57534e", "#d6d3d1"
COLOURS = {"fejer": "#c2410c", "pyramid": "#7c2d12", "dirichlet": "#f59e0b", "sliding": "#0f766e"}
COLOURS |= {"full": "#4338ca", "gsa": "#be185d"}
MARKERS = "osD^vP*X<>"
TARGETS = (0.9, 0.99)
LEAST_OCTAVES = 0.45  # between ticks, so that their labels have room


@dataclass(frozen=True)
class Point:
    """The models of one setting, at the learning rate that is best in the mean over seeds.

    ``scores`` are the accuracies, or whatever else is the better the higher, of its rows; ``conditions`` is all of the
    setting but slots, resolutions and kind of the mixer: what must be equal to compare.
    """

    task: str
    kind: str
    family: str
    slots: int
    state: int
    heads: int
    steps: int
    rate: float
    scores: tuple[float, ...]
    conditions: str
    rows: tuple[Row, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Crossing:
    """The least state, in elements per head, with which a curve reaches a target.

    ``bounded``: no smaller state was measured, so it may reach it earlier.
    """

    state: float
    bounded: bool


def accuracy(row: Row) -> float:
    return float(row["accuracy"])


def points(rows: Iterable[Row], score: Callable[[Row], float] = accuracy) -> list[Point]:
    """One point per setting, in the rows' order."""
    groups: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        setting = {name: value for name, value in row["setting"].items() if name not in ("rate", "seed")}
        groups[identity(setting)][row["setting"]["rate"]].append(row)
    found = []
    for by_rate in groups.values():
        most = max(len(mine) for mine in by_rate.values())
        whole = {rate: mine for rate, mine in by_rate.items() if len(mine) == most}
        rate = max(whole, key=lambda rate: statistics.fmean(score(row) for row in whole[rate]))
        mine = tuple(whole[rate])
        row = mine[0]
        shape, recipe = row["setting"]["shape"], row["setting"]["recipe"]
        what = (row["task"], shape["mixer"]["kind"], row["family"], row["slots"], row["state_elements"], row["heads"])
        others = {name: value for name, value in shape.items() if name != "mixer"}
        head = row["state_elements"] // row["slots"]
        conditions = identity({"task": row["setting"]["task"], "shape": others, "recipe": recipe, "head": head})
        found.append(Point(*what, recipe["steps"], rate, tuple(map(score, mine)), conditions, mine))
    return found


def best(curve: Iterable[Point]) -> list[tuple[int, float]]:
    """States in order, with the best score at each."""
    found: dict[int, float] = {}
    for point in curve:
        found[point.state] = max(found.get(point.state, -math.inf), point.mean)
    return sorted(found.items())


def crossing(curve: Iterable[Point], target: float) -> Crossing | None:
    """Where the best score at a state reaches ``target``, linear in the logarithm of the state between points."""
    before: tuple[int, float] | None = None
    for state, score in best(curve):
        if score >= target:
            if before is None:
                return Crossing(float(state), bounded=True)
            share = (target - before[1]) / (score - before[1])
            return Crossing(before[0] * (state / before[0]) ** share, bounded=False)
        before = (state, score)
    return None


@dataclass(frozen=True)
class Factor:
    """With which states a sliding window and "fejer" of any window reach an accuracy, all else being equal."""

    target: float
    heads: int
    steps: int
    sliding: Crossing | None
    blurry: Crossing | None

    def __str__(self) -> str:
        if self.sliding is None or self.blurry is None:
            missing = " and ".join(
                name for name, at in (("sliding", self.sliding), ("fejer", self.blurry)) if at is None
            )
            return f"not reached by {missing}"
        if self.sliding.bounded and self.blurry.bounded:
            return "both reach it with the least state measured"
        sign = "<= " if self.sliding.bounded else ">= " if self.blurry.bounded else ""
        return f"{sign}{self.sliding.state / self.blurry.state:.1f} times the state"


def alike(mine: Iterable[Point]) -> list[list[Point]]:
    """Points of equal conditions and as many heads, in the order in which they come."""
    groups: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for point in mine:
        groups[point.conditions, point.heads].append(point)
    return list(groups.values())


def comparable(mine: Iterable[Point]) -> list[tuple[list[Point], list[Point]]]:
    """Sliding windows and "fejer" that are alike."""
    pairs = [tuple([p for p in group if p.kind == kind] for kind in ("sliding", "fejer")) for group in alike(mine)]
    return [(sliding, blurry) for sliding, blurry in pairs if sliding and blurry]


def factors(sliding: Sequence[Point], blurry: Sequence[Point]) -> list[Factor]:
    """One per target; both of equal conditions."""
    heads, steps = sliding[0].heads, sliding[0].steps
    return [Factor(at, heads, steps, crossing(sliding, at), crossing(blurry, at)) for at in TARGETS]


def by_task(rows: Iterable[Row], score: Callable[[Row], float] = accuracy) -> dict[str, list[Point]]:
    tasks: dict[str, list[Point]] = defaultdict(list)
    for point in points(rows, score):
        tasks[point.task].append(point)
    return dict(tasks)


SIZES = "slots  elements  float32 B  bf16 B"


def sized(point: Point, width: int) -> str:
    """A point's family, ``width`` wide, and what stands under ``SIZES``."""
    state = point.state
    return f"{point.family:{width}} {point.slots:5}  {state:8}  {4 * state:9}  {2 * state:6}"


def table(rows: Sequence[Row]) -> str:
    """Every point by task and family, then the factors between sliding window and "fejer"."""
    lines = []
    for task, mine in by_task(rows).items():
        width = max(len(point.family) for point in mine)
        lines += [
            task,
            f"{'':{width}} {SIZES}  accuracy   lowest  highest  seeds    rate   steps",
        ]
        for point in sorted(mine, key=lambda p: (p.family, p.slots)):
            lines.append(
                f"{sized(point, width)}  {point.mean:8.4f}  {min(point.scores):7.4f}  {max(point.scores):7.4f}"
                f"  {len(point.scores):5}  {point.rate:6g}  {point.steps:6}"
            )
        for pair in comparable(mine):
            lines += [f"sliding : fejer at {f.target:g}, {f.heads} heads, {f.steps} steps: {f}" for f in factors(*pair)]
        lines.append("")
    lines.append("State per head; accuracy: mean over seeds at the best of the learning rates.")
    return "\n".join(lines)


def plot(rows: Sequence[Row], label: str = "accuracy") -> Figure:
    """Accuracy against state, the spread over seeds as bars, the factors as arrows: a panel for all that is alike, if
    it holds a curve of sliding windows to compare with. What is alone stands in the table."""
    from matplotlib.figure import Figure

    panels = [(task, group) for task, mine in by_task(rows).items() for group in _curved(alike(mine)) or [mine]]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(0.5 + 7.5 * columns, 6.4 * lines), dpi=130, layout="constrained")
    for place, (task, mine) in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, place)
        curves(axes, mine, accuracy)
        _arrows(axes, mine)
        axes.set(title=f"{task}; {mine[0].heads} heads, {mine[0].steps:,} steps", ylabel=label, ylim=(-0.02, 1.03))
        legend(axes)
    sign(figure, rows)
    return figure


def _curved(groups: Iterable[list[Point]]) -> list[list[Point]]:
    return [group for group in groups if any(len(best(sliding)) > 1 for sliding, _ in comparable(group))]


def sign(figure: Figure, rows: Sequence[Row]) -> None:
    """Says below the panels what made them."""
    hardware = ", ".join(dict.fromkeys(row["hardware"] for row in rows))
    versions = ", ".join(dict.fromkeys(row["versions"]["torch"] for row in rows))
    date = max(row["date"] for row in rows)
    figure.supxlabel(f"{hardware}; torch {versions}; {date}", fontsize=8, color=GREY)


def curves(axes: Axes, mine: Sequence[Point], measure: Callable[[Row], float]) -> None:
    """``measure`` against state, a curve per family with the spread over seeds as bars."""
    families: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(mine, key=lambda p: p.slots):
        families[point.family].append(point)
    markers = markers_of(mine)
    for family, curve in families.items():
        values = [[measure(row) for row in point.rows] for point in curve]
        means = [statistics.fmean(value) for value in values]
        below = [mean - min(value) for mean, value in zip(means, values, strict=True)]
        above = [max(value) - mean for mean, value in zip(means, values, strict=True)]
        x = [point.state for point in curve]
        spread, colour = (below, above), colour_of(curve[0])
        style = {"marker": markers[family], "ms": 5, "lw": 1.6, "capsize": 3, "color": colour}
        axes.errorbar(x, means, spread, label=family, **style)
    slots = {point.state: point.slots for point in mine}
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    ticks: list[int] = []
    for state in sorted(slots, key=lambda state: (state & (state - 1) != 0, state)):  # powers of two first
        if all(abs(math.log2(state / other)) > LEAST_OCTAVES for other in ticks):
            ticks.append(state)
    axes.set_xticks(ticks, [f"{state}\n({slots[state]})" for state in ticks], fontsize=8)
    axes.set_xlabel("state per head: elements (slots)")
    bare(axes)


def markers_of(mine: Iterable[Point]) -> dict[str, str]:
    """Of each family."""
    families = list(dict.fromkeys(point.family for point in mine))
    return dict(zip(families, MARKERS * len(families), strict=False))


def colour_of(point: Point) -> str:
    """Pyramids of "fejer" apart from windows that are the same in every head."""
    return COLOURS["pyramid" if point.kind == "fejer" and "pyramid" in point.family else point.kind]


def bare(axes: Axes) -> None:
    axes.grid(color=FAINT, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Axes) -> None:
    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    columns = 2 if longest < 40 else 1  # what fits below the axes
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, frameon=False, fontsize=8)


def _arrows(axes: Axes, mine: Sequence[Point]) -> None:
    for sliding, blurry in comparable(mine)[:1]:  # more arrows would lie over each other
        label = f"best fejer, {blurry[0].heads} heads"
        axes.plot(*zip(*best(blurry), strict=True), ":", color=COLOURS["fejer"], lw=1.2, label=label)
        for factor in factors(sliding, blurry):
            if factor.sliding is not None and factor.blurry is not None:
                left, right = factor.blurry.state, factor.sliding.state
                style = {"arrowstyle": "<->", "color": INK}
                axes.annotate("", (right, factor.target), (left, factor.target), arrowprops=style)
                middle = math.sqrt(left * right), factor.target
                axes.annotate(str(factor), middle, (0, -12), textcoords="offset points", ha="center", fontsize=8)
