"""The table and the plot of results: accuracy against the size of the state."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Point:
    """The models of one setting, at the learning rate that is best in the mean over seeds.

    ``conditions`` is all of the setting but slots, resolutions and kind of the mixer: what must be equal to compare.
    """

    task: str
    kind: str
    family: str
    slots: int
    state: int
    heads: int
    steps: int
    rate: float
    accuracies: tuple[float, ...]
    conditions: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)


@dataclass(frozen=True)
class Crossing:
    """The least state, in elements per head, with which a curve reaches a target.

    ``bounded``: no smaller state was measured, so it may reach it earlier.
    """

    state: float
    bounded: bool


def points(rows: Iterable[Row]) -> list[Point]:
    """One point per setting, in the rows' order."""
    groups: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        setting = {name: value for name, value in row["setting"].items() if name not in ("rate", "seed")}
        groups[identity(setting)][row["setting"]["rate"]].append(row)
    found = []
    for by_rate in groups.values():
        most = max(len(mine) for mine in by_rate.values())
        whole = {rate: mine for rate, mine in by_rate.items() if len(mine) == most}
        rate = max(whole, key=lambda rate: statistics.fmean(row["accuracy"] for row in whole[rate]))
        accuracies = tuple(row["accuracy"] for row in whole[rate])
        row = whole[rate][0]
        shape, recipe = row["setting"]["shape"], row["setting"]["recipe"]
        what = (row["task"], shape["mixer"]["kind"], row["family"], row["slots"], row["state_elements"], row["heads"])
        others = {name: value for name, value in shape.items() if name != "mixer"}
        head = row["state_elements"] // row["slots"]
        conditions = identity({"task": row["setting"]["task"], "shape": others, "recipe": recipe, "head": head})
        found.append(Point(*what, recipe["steps"], rate, accuracies, conditions))
    return found


def best(curve: Iterable[Point]) -> list[tuple[int, float]]:
    """States in order, with the best accuracy at each."""
    found: dict[int, float] = {}
    for point in curve:
        found[point.state] = max(found.get(point.state, 0.0), point.mean)
    return sorted(found.items())


def crossing(curve: Iterable[Point], target: float) -> Crossing | None:
    """Where the best accuracy at a state reaches ``target``, linear in the logarithm of the state between points."""
    before: tuple[int, float] | None = None
    for state, accuracy in best(curve):
        if accuracy >= target:
            if before is None:
                return Crossing(float(state), bounded=True)
            share = (target - before[1]) / (accuracy - before[1])
            return Crossing(before[0] * (state / before[0]) ** share, bounded=False)
        before = (state, accuracy)
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


def comparable(mine: Iterable[Point]) -> list[tuple[list[Point], list[Point]]]:
    """Sliding windows and "fejer" of equal conditions, in the order in which they come."""
    groups: dict[tuple[str, int], tuple[list[Point], list[Point]]] = defaultdict(lambda: ([], []))
    for point in mine:
        if point.kind in ("sliding", "fejer"):
            groups[point.conditions, point.heads][point.kind == "fejer"].append(point)
    return [(sliding, blurry) for sliding, blurry in groups.values() if sliding and blurry]


def factors(sliding: Sequence[Point], blurry: Sequence[Point]) -> list[Factor]:
    """One per target; both of equal conditions."""
    heads, steps = sliding[0].heads, sliding[0].steps
    return [Factor(at, heads, steps, crossing(sliding, at), crossing(blurry, at)) for at in TARGETS]


def by_task(rows: Iterable[Row]) -> dict[str, list[Point]]:
    tasks: dict[str, list[Point]] = defaultdict(list)
    for point in points(rows):
        tasks[point.task].append(point)
    return dict(tasks)


def table(rows: Sequence[Row]) -> str:
    """Every point by task and family, then the factors between sliding window and "fejer"."""
    lines = []
    for task, mine in by_task(rows).items():
        width = max(len(point.family) for point in mine)
        lines += [
            task,
            f"{'':{width}} slots  elements  float32 B  bf16 B  accuracy   lowest  highest  seeds    rate   steps",
        ]
        for point in sorted(mine, key=lambda p: (p.family, p.slots)):
            lines.append(
                f"{point.family:{width}} {point.slots:5}  {point.state:8}  {4 * point.state:9}  {2 * point.state:6}"
                f"  {point.mean:8.4f}  {min(point.accuracies):7.4f}  {max(point.accuracies):7.4f}"
                f"  {len(point.accuracies):5}  {point.rate:6g}  {point.steps:6}"
            )
        for pair in comparable(mine):
            lines += [f"sliding : fejer at {f.target:g}, {f.heads} heads, {f.steps} steps: {f}" for f in factors(*pair)]
        lines.append("")
    lines.append("State per head; accuracy: mean over seeds at the best of the learning rates.")
    return "\n".join(lines)


def plot(rows: Sequence[Row], label: str = "accuracy") -> Figure:
    """A panel per task: accuracy against state, the spread over seeds as bars, the factors as arrows."""
    from matplotlib.figure import Figure

    tasks = by_task(rows)
    figure = Figure(figsize=(0.5 + 7.5 * len(tasks), 6.4), dpi=130, layout="constrained")
    for axes, (task, mine) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        _panel(axes, mine)
        axes.set(title=task, ylabel=label, xlabel="state per head: elements (slots)", ylim=(-0.02, 1.03))
    hardware = ", ".join(dict.fromkeys(row["hardware"] for row in rows))
    versions = ", ".join(dict.fromkeys(row["versions"]["torch"] for row in rows))
    date = max(row["date"] for row in rows)
    figure.supxlabel(f"{hardware}; torch {versions}; {date}", fontsize=8, color=GREY)
    return figure


def _panel(axes: Axes, mine: Sequence[Point]) -> None:
    families: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(mine, key=lambda p: p.slots):
        families[point.family].append(point)
    for (family, curve), marker in zip(families.items(), MARKERS * len(families), strict=False):
        colour = COLOURS["pyramid" if "pyramid" in family else curve[0].kind]
        means = [point.mean for point in curve]
        below = [point.mean - min(point.accuracies) for point in curve]
        above = [max(point.accuracies) - point.mean for point in curve]
        x = [point.state for point in curve]
        spread = (below, above)
        axes.errorbar(x, means, spread, marker=marker, ms=5, lw=1.6, capsize=3, color=colour, label=family)
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
    ticks = {point.state: point.slots for point in mine}
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(list(ticks), [f"{state}\n({slots})" for state, slots in ticks.items()], fontsize=8)
    axes.grid(color=FAINT, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8)
