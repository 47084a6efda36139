"""The table, the checks and the plot of a result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .cases import BOTH, FORWARD, MODES, UNITS, Case, Claim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    **{"blurry": "#c2410c", "local": "#0f766e", "sdpa": "#4338ca"},
    **{"fejer": "#c2410c", "dirichlet": "#f59e0b", "pyramid": "#7c2d12", "cudnn": "#4338ca", "flash": "#60a5fa"},
    **{"flex64": "#0f766e", "flex512": "#5eead4", "gsa": "#be185d", "gated_delta": "#78716c"},
}
SPARE_COLOURS = ("#a16207", "#be185d", "#4d7c0f", "#0369a1", "#57534e")
INK, GREY, FAINT = "#1c1917", "#57534e", "#d6d3d1"

# Title, width, field, factor and format of the columns that each mode has; more where ceilings were measured.
CPU_COLUMNS = (
    ("ms", 10, "seconds", 1e3, ".2f"),
    ("us/token", 10, "seconds_per_token", 1e6, ".2f"),
    ("peak MiB", 10, "peak_bytes", 2**-20, ".1f"),
)
GPU_COLUMNS = (
    ("ms", 10, "seconds", 1e3, ".3f"),
    ("x floor", 9, "times_floor", 1, ".2f"),
    ("GB/s", 7, "bytes_per_second", 1e-9, ".0f"),
    ("TFLOP/s", 9, "flops_per_second", 1e-12, ".1f"),
    ("peak MiB", 10, "peak_bytes", 2**-20, ".1f"),
    ("host us", 9, "host_seconds", 1e6, ".0f"),
)

Row = dict[str, Any]


def checks(rows: Sequence[Row], claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Each claim in each mode: its measured value (None: not measured) and whether it was met."""
    found = {(row["provider"], Case(**row["case"]), row["mode"]): row for row in rows}
    results = []
    for claim in claims:
        for mode, (must, goal) in claim.bounds.items():
            value = found.get((*claim.of, mode), {}).get(claim.quantity)
            unit, factor = UNITS[claim.quantity]
            if claim.over is not None:
                below = found.get((*claim.over, mode), {}).get(claim.quantity)
                value = None if value is None or below is None else value / below
                unit, factor = "x", 1.0
            value = None if value is None else value * factor
            result = {"check": claim.text, "mode": mode, "value": value, "unit": unit}
            for name, bound in (("must", must), ("goal", goal)):
                result[name] = None if bound is None else f"{'<=' if claim.at_most else '>='} {bound:g}"
            results.append(result | {"met": claim.met(value, must), "goal_met": claim.met(value, goal)})
    return results


def shape(case: Case) -> str:
    """A case but for its length."""
    heads = f"{case.heads}/{case.kv_heads}" if case.kv_heads else f"{case.heads}"
    return f"B={case.batch} H={heads} D={case.head_dim} {case.dtype}, {case.slots} slots, r = {case.resolution}"


def sections(result: dict[str, Any]) -> list[list[Row]]:
    """The rows in groups that differ in length alone."""
    groups = defaultdict(list)
    for row in result["rows"]:
        groups[replace(Case(**row["case"]), length=0)].append(row)
    return list(groups.values())


def hardware(result: dict[str, Any]) -> str:
    """What a result was measured on, in a line."""
    return ", ".join(value if isinstance(value, str) else f"{value} {key}" for key, value in result["hardware"].items())


def heading(result: dict[str, Any], *, section: Sequence[Row] | None = None) -> str:
    """What was measured (all of it, or a section), where, with what and when."""
    groups = [section] if section else sections(result)
    parts = [shape(Case(**groups[0][0]["case"]))] if len(groups) == 1 else []
    parts.append(hardware(result))
    if ceilings := result.get("ceilings"):
        copy, product = ceilings["copy_bytes_per_second"], ceilings["product_flops_per_second"]
        parts.append(f"copy {copy * 1e-12:.2f} TB/s, bf16 product {product * 1e-12:.0f} TFLOP/s")
    return "; ".join([*parts, f"torch {result['versions']['torch']}", result["date"]])


def table(result: dict[str, Any]) -> str:
    """Time, memory and what they compare with, by length and provider in sections; then what failed and the checks."""
    rows, groups = result["rows"], sections(result)
    columns = GPU_COLUMNS if result.get("ceilings") else CPU_COLUMNS
    cell = sum(width for _, width, *_ in columns)
    width = max(len(row["label"]) for row in rows)
    digits = max(6, *(len(str(row["case"]["length"])) for row in rows))
    dated = len({row.get("date") for row in rows}) > 1
    lines = [heading(result), ""]
    lines.append(" " * (digits + 2 + width) + "".join(f"{mode:>{cell}}" for mode in MODES))
    titles = "".join(f"{title:>{size}}" for title, size, *_ in columns)
    lines.append(f"{'T':>{digits}}  {'':{width}}" + titles * len(MODES) + ("  measured" if dated else ""))
    for group in groups:
        by_key = {(row["case"]["length"], row["provider"], row["mode"]): row for row in group}
        labels = {row["provider"]: row["label"] for row in group}
        if len(groups) > 1:
            lines.append(shape(Case(**group[0]["case"])))
        for length in sorted({row["case"]["length"] for row in group}):
            for provider, label in labels.items():
                mine = [by_key.get((length, provider, mode)) for mode in MODES]
                if any(mine):
                    cells = "".join(f"{_cell(row, columns) if row else '':>{cell}}" for row in mine)
                    dates = "  " + next(row.get("date", "") for row in mine if row) if dated else ""
                    lines.append(f"{length:>{digits}}  {label:{width}}{cells}{dates}".rstrip())
            lines.append("")
    for row in rows:
        if "failed" in row:
            case = Case(**row["case"])
            where = f"{shape(case)}, T = {case.length}" if len(groups) > 1 else f"T = {case.length}"
            lines.append(f"failed: {row['label']}, {row['mode']}, {where}: {row['failed']}")
    return "\n".join([*lines, *check_lines(result["checks"])]).rstrip()


def check_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    """Of each check its value, its bounds and whether they were met."""
    lines = []
    width = max((42, *(len(check["check"]) for check in checks)))
    for check in checks:
        unit = check.get("unit", "x")
        value = check["value"]
        shown = "not measured" if value is None else f"{value:.{2 if unit == 'x' else 3}f}{unit}"
        must = _bound("must be", check["must"], unit, check["met"])
        goal = _bound("goal", check.get("goal"), unit, check.get("goal_met"))
        gap = 34 if any(other.get("goal") for other in checks) else 0
        lines.append(f"{check['check']:{width}} {check['mode']:18}{shown:>12}  {must:{gap}}{goal}".rstrip())
    return lines


def _bound(name: str, bound: str | None, unit: str, met: bool | None) -> str:
    verdict = {True: "met", False: "NOT met", None: ""}[met]
    return f"{name} {bound}{unit}  {verdict}" if bound else ""


def _cell(row: Row, columns: Sequence[tuple[str, int, str, float, str]]) -> str:
    if "seconds" not in row:
        return row.get("skipped", "failed (see below)")
    return "".join(
        f"{row[field] * factor:{size}{form}}" if field in row else " " * size
        for _, size, field, factor, form in columns
    )


def plot(result: dict[str, Any]) -> Figure:
    """Time (both modes) and peak memory against T, all log-log, of the section with the most lengths."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = max(sections(result), key=lambda group: len({row["case"]["length"] for row in group}))
    labels = {row["provider"]: row["label"] for row in rows}
    tall = len(labels) > 3
    figure = Figure(figsize=(13, 5.2 if tall else 4.6), dpi=130, layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = (
        (FORWARD, "seconds", 1e3, "forward", "time (ms)"),
        (BOTH, "seconds", 1e3, "forward + backward", "time (ms)"),
        (BOTH, "peak_bytes", 2**-20, "forward + backward", "peak memory beyond inputs (MiB)"),
    )
    spare = iter(SPARE_COLOURS)
    colours = {name: COLOURS.get(name) or next(spare, INK) for name in labels}
    for axes, (mode, field, unit, title, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        lengths: list[int] = []
        for name, text in labels.items():
            mine = [row for row in rows if row["provider"] == name and row["mode"] == mode and row.get(field)]
            mine.sort(key=lambda row: row["case"]["length"])
            x, y = [row["case"]["length"] for row in mine], [row[field] * unit for row in mine]
            lengths = sorted({*lengths, *x})
            axes.plot(x, y, "o-", color=colours[name], label=text if x else f"{text}: no result", lw=2, ms=5)
        floors = {
            row["case"]["length"]: row["floor_seconds"] * unit
            for row in rows
            if row["mode"] == mode and "floor_seconds" in row and field == "seconds"
        }
        if floors:
            x = sorted(floors)
            axes.plot(x, [floors[n] for n in x], "--", color=INK, lw=1.2, label="floor: the fewest bytes, copied")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(lengths, [_thousands(n) for n in lengths], fontsize=8 if len(lengths) > 8 else None)
        axes.set_title(title, loc="left", color=INK)
        axes.set_xlabel("sequence length T (tokens)")
        axes.set_ylabel(label)
        axes.grid(True, which="major", color=FAINT, lw=0.7)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=4 if tall else len(names), frameon=False)
    figure.supxlabel(heading(result, section=rows), fontsize=8, color=GREY)
    return figure


def _thousands(n: int) -> str:
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if n % size == 0:
            return f"{n // size}{letter}"
    return str(n)
