"""Builds the CPU part under several releases of Python and torch, each in an environment of its own, and tests it.

`make versions` runs this. Interpreters are those on PATH, as python3.10 and so on. Torch comes from where pip gets it;
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes it the small build without CUDA. Arguments name
releases of Python to try these alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"
PAIRS = {"3.10": "2.11.0", "3.11": "2.13.0", "3.13": "2.14.1"}  # Python: torch
# What changes with torch: operators, autograd, compiling, exporting, hooks into modules, processes, loading.
TESTS = ("golden", "gradients", "operators", "export", "modules", "state", "step", "swap", "distributed", "errors")


def run(*command: object, cwd: Path = ROOT) -> str:
    """What it prints; a failure ends this pair."""
    environment = {**os.environ, "BLURRY_CUDA": "0"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def requirements() -> list[str]:
    """What the README has a user install, and what the tests need."""
    (line,) = re.findall(r"^pip install (ninja .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [*line.replace('"', "").split(), "numpy", "pytest", "pytest-timeout", "hypothesis"]


def try_pair(python: str, torch: str, archive: Path) -> str:
    folder = FOLDER / f"python{python}-torch{torch}"
    own = folder / "bin" / "python"
    if not own.exists():
        run(f"python{python}", "-m", "venv", folder)
    run(own, "-m", "pip", "install", "--quiet", f"torch=={torch}", *requirements())
    run(own, "-m", "pip", "check")
    shutil.rmtree(folder / "source", ignore_errors=True)
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder / "source")
    (source,) = (folder / "source").iterdir()
    run(own, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", source)
    tests = [str(path) for name in TESTS for path in ROOT.glob(f"tests/*/test_{name}.py")]
    said = run(own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda", *tests, cwd=source)
    return said.splitlines()[-1]


def main(chosen: list[str]) -> int:
    shutil.rmtree(FOLDER / "sdist", ignore_errors=True)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", FOLDER / "sdist")
    (archive,) = (FOLDER / "sdist").glob("*.tar.gz")
    failures = 0
    for python in chosen or PAIRS:
        try:
            outcome = try_pair(python, PAIRS[python], archive)
        except (OSError, subprocess.CalledProcessError) as error:
            print(getattr(error, "stdout", None) or "")
            failures, outcome = failures + 1, f"FAILED: {error}"
        print(f"Python {python}, torch {PAIRS[python]}: {outcome}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
