"""Results: one JSON line per finished model, in a file that is whole at every moment."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from blurry_attn.files import write_whole

Row = dict[str, Any]


class Results:
    """The rows of a file; a row is known by its ``setting``, all that decides how a model comes out."""

    def __init__(self, file: Path) -> None:
        self.file = file
        text = file.read_text() if file.exists() else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]
        self._known = {identity(row["setting"]) for row in self.rows}

    def __contains__(self, setting: Row) -> bool:
        return identity(setting) in self._known

    def add(self, rows: Iterable[Row]) -> None:
        """Replaces the file by one with these rows too, all or none."""
        rows = list(rows)
        self.rows += rows
        self._known |= {identity(row["setting"]) for row in rows}
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_whole(self.file, lambda file: file.write_text(text))


def identity(setting: Row) -> str:
    return json.dumps(setting, sort_keys=True)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return f"{torch.get_num_threads()} threads of {model[1] if model else platform.machine()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        return found | {"blurry_attn": metadata.version("blurry_attn")}
    except metadata.PackageNotFoundError:
        return found | {"blurry_attn": "not installed"}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
