"""The table, the checks and the plot of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .cases import BOTH, FORWARD, MODES, Ratio

COLOURS = {"blurry": "#c2410c", "local": "#0f766e", "sdpa": "#4338ca"}
SPARE_COLOURS = ("#a16207", "#be185d", "#4d7c0f", "#0369a1", "#57534e")
INK, FAINT = "#1c1917", "#d6d3d1"


def checks(rows: Sequence[dict[str, Any]], ratios: Sequence[Ratio]) -> list[dict[str, Any]]:
    """Each claim in each mode: its measured value (None: not measured) and whether it was met."""
    seconds = {
        (row["mode"], row["provider"], row["case"]["length"]): row["seconds"] for row in rows if "seconds" in row
    }
    results = []
    for ratio in ratios:
        for mode in MODES:
            above = seconds.get((mode, ratio.provider, ratio.length))
            below = seconds.get((mode, ratio.over, ratio.over_length))
            value = None if above is None or below is None else ratio.value(above, below)
            must = f"{'<=' if ratio.at_most else '>='} {ratio.bound:g}"
            met = None if value is None else ratio.met(value)
            results.append({"check": ratio.text, "mode": mode, "value": value, "must": must, "met": met})
    return results


def heading(result: dict[str, Any]) -> str:
    """What was measured, where, with what and when."""
    case, hardware, versions = result["rows"][0]["case"], result["hardware"], result["versions"]
    machine = ", ".join(str(value) if key in ("cpu", "gpu") else f"{value} {key}" for key, value in hardware.items())
    return (
        f"B={case['batch']} H={case['heads']} D={case['head_dim']} {case['dtype']}, {case['slots']} slots, "
        f"r = {case['resolution']}; {machine}; torch {versions['torch']}; {result['date']}"
    )


def table(result: dict[str, Any]) -> str:
    """Time, time per token and peak memory by length and provider, then the checks."""
    rows = result["rows"]
    by_key = {(row["case"]["length"], row["provider"], row["mode"]): row for row in rows}
    labels = {row["provider"]: row["label"] for row in rows}
    width = max(map(len, labels.values()))
    cell = 10 + 10 + 10
    lines = [heading(result), ""]
    lines.append(" " * (8 + width) + "".join(f"{mode:>{cell}}" for mode in MODES))
    lines.append(f"{'T':>6}  {'':{width}}" + f"{'ms':>10}{'us/token':>10}{'peak MiB':>10}" * len(MODES))
    for length in dict.fromkeys(row["case"]["length"] for row in rows):
        for provider, label in labels.items():
            cells = (_cell(by_key[length, provider, mode]) for mode in MODES)
            lines.append(f"{length:>6}  {label:{width}}" + "".join(f"{text:>{cell}}" for text in cells))
        lines.append("")
    for row in rows:
        if "failed" in row:
            lines.append(f"failed: {row['label']}, {row['mode']}, T = {row['case']['length']}: {row['failed']}")
    for check in result["checks"]:
        value = "not measured" if check["value"] is None else f"{check['value']:.2f}x"
        verdict = {True: "met", False: "NOT met", None: ""}[check["met"]]
        lines.append(f"{check['check']:42} {check['mode']:18}{value:>12}  must be {check['must']}x  {verdict}".rstrip())
    return "\n".join(lines).rstrip()


def _cell(row: dict[str, Any]) -> str:
    if "seconds" in row:
        per_token = row["seconds_per_token"] * 1e6
        return f"{row['seconds'] * 1e3:10.2f}{per_token:10.2f}{row['peak_bytes'] / 2**20:10.1f}"
    return row.get("skipped", "failed (see below)")


def plot(result: dict[str, Any]) -> Figure:
    """Time (both modes) and peak memory against T, all log-log."""
    figure = Figure(figsize=(13, 4.6), dpi=130, layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = (
        (FORWARD, "seconds", 1e3, "forward", "time (ms)"),
        (BOTH, "seconds", 1e3, "forward + backward", "time (ms)"),
        (BOTH, "peak_bytes", 2**-20, "forward + backward", "peak memory beyond inputs (MiB)"),
    )
    labels = {row["provider"]: row["label"] for row in result["rows"]}
    spare = iter(SPARE_COLOURS)
    colours = {name: COLOURS.get(name) or next(spare, INK) for name in labels}
    for axes, (mode, field, unit, title, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        lengths: list[int] = []
        for name, text in labels.items():
            mine = [row for row in result["rows"] if row["provider"] == name and row["mode"] == mode and row.get(field)]
            x, y = [row["case"]["length"] for row in mine], [row[field] * unit for row in mine]
            lengths = sorted({*lengths, *x})
            axes.plot(x, y, "o-", color=colours[name], label=text if x else f"{text}: no result", lw=2, ms=5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.set_title(title, loc="left", color=INK)
        axes.set_xlabel("sequence length T (tokens)")
        axes.set_ylabel(label)
        axes.grid(True, which="major", color=FAINT, lw=0.7)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False)
    figure.supxlabel(heading(result), fontsize=8, color="#57534e")
    return figure
