"""Writes the tables of docs/results/*.md, with what made them, from the results that lie beside the benchmarks.

python docs/results.py           writes them
python docs/results.py --check   fails if a page is not what would be written

A page marks a place by ``<!-- results: FILE -->`` and ``<!-- end -->``; FILE lies below benchmarks/. The tables are
those that the benchmarks print.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from api import wrapped

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for benchmarks, wherever this is called
PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PARTS_OF_A_SWEEP = ("only", "slots", "seeds", "seconds")
"""Options by which a sweep is run in parts."""

# Modules with the table that a folder's benchmark prints.
MODULES = {
    **{name: f"{name}.report" for name in ("speed", "guard", "lm")},
    **{name: f"{name}.__main__" for name in ("training", "decode", "drift", "convert")},
    **{name: "sweep.report" for name in ("mqar", "regbench")},
}
# What a file does not hold itself.
CONTEXT = {
    "command": "\n".join(f"torchrun --nproc-per-node {ranks} -m benchmarks.context" for ranks in (2, 4)),
    "hardware": "CPU; bytes are counted in the collectives and do not depend on it",
    "date": "2026-11-25",
}


def content(file: str) -> Any:
    text = (ROOT / "benchmarks" / file).read_text()
    return [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def checks_alone(result: dict[str, Any]) -> str:
    report = module("speed.report")
    return "\n".join([report.heading(result), "", *report.check_lines(result["checks"])])


def by_ranks(result: dict[str, Any]) -> str:
    table = module("context.__main__").table
    return "\n\n".join(f"{ranks} ranks\n{table(rows)}" for ranks, rows in result.items())


def comparison(result: dict[str, Any]) -> str:
    """Of the file that `blurry-lm compare` wrote before it had a table of its own."""
    lines = [f"{'mixer':10}{'bits/byte':>10}{'tokens/s':>12}"]
    for mixer, run in result["runs"].items():
        lines.append(f"{mixer:10}{run['validation'][-1][1]:10.3f}{run['tokens_per_second']:12,.0f}")
    return "\n".join([*lines, *(f"{name:10}{result[name]:10.3f}" for name in ("bigram", "unigram"))])


SPECIAL: dict[str, Callable[[Any], str]] = {
    "speed/results/h100.json": checks_alone,
    "context/results/context.json": by_ranks,
    "lm/results/compare.json": comparison,
}


def table(file: str, result: Any) -> str:
    print_it = SPECIAL.get(file) or module(MODULES[file.partition("/")[0]]).table
    return str(print_it(result))


def distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def whole_sweep(command: str) -> str:
    words = command.split(" --")
    return " --".join(word for word in words if word.split(" ")[0] not in PARTS_OF_A_SWEEP)


def made_by(file: str, result: Any) -> tuple[str, str]:
    """The command, and a sentence with hardware, versions and date."""
    rows = result if isinstance(result, list) else [CONTEXT | result]
    dates = sorted({row["date"] for row in rows})
    hardware = distinct(described(row["hardware"]) for row in rows)
    torch = distinct(row.get("versions", row).get("torch", "") for row in rows)
    on = " and ".join(hardware)
    with_torch = f", torch {' and '.join(torch)}" if any(torch) and "torch" not in on else ""
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commands = sorted(distinct(whole_sweep(row["command"]) for row in rows))
    link = f"[{Path(file).name}](../../benchmarks/{file})"
    return "\n".join(commands), f"Measured on {on}{with_torch}; {when}. All numbers are in {link}."


def described(hardware: str | dict[str, Any]) -> str:
    if isinstance(hardware, str):
        return hardware
    return ", ".join(value if isinstance(value, str) else f"{value} {key}" for key, value in hardware.items())


def block(file: str) -> str:
    result = content(file)
    command, sentence = made_by(file, result)
    return f"\n```sh\n{command}\n```\n\n{wrapped(sentence)}\n\n```text\n{table(file, result)}\n```\n\n"


def page(text: str) -> str:
    return BLOCK.sub(lambda found: found[1] + block(found[2]) + found[3], text)


def main() -> None:
    for path in PAGES:
        text = path.read_text()
        written = page(text)
        if "--check" not in sys.argv:
            path.write_text(written)
        elif text != written:
            sys.exit(f"{path.relative_to(ROOT)} is not what the results say; type: make results")


if __name__ == "__main__":
    main()
