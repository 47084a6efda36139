"""Whether the emulator notices faults: each of faults.py's in csrc/cuda, and every barrier and wait left out, alone.

    python tests/tools/emulator/faults.py [--only TEXT] [--seeds 0:300] [--folder build/emulator-faults]

Seeds that fail without a fault do not count. Prints one line per fault; the exit status is 1 if one was not caught. A
barrier whose absence is missed may be one that nothing needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/tools"))
from faults import CUDA  # noqa: E402

WAITS = re.compile(
    r"\bmeet\(\);|__syncthreads\(\);|__syncwarp\(\);|wait_copies<\w+>\(\);|__pipeline_wait_prior\(\w+\);"
)


def faults() -> list[tuple[str, str, int, str, str]]:
    """Name, file, where in it, what is there, what takes its place."""
    found = []
    for path in sorted((ROOT / "csrc/cuda").rglob("*.cu*")):
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        for wait in WAITS.finditer(text):
            line = text.count("\n", 0, wait.start()) + 1
            found.append((f"{name}:{line}: no {wait[0]}", name, wait.start(), wait[0], ";"))
    for fault in CUDA:
        text = (ROOT / fault.file).read_text()
        found.append((fault.name, fault.file, text.index(fault.old), fault.old, fault.new))
    return found


def failing(folder: Path, seeds: str, stop: int = 0) -> dict[int, str] | None:
    """Seeds and what fails, of a build in `folder`; None if it cannot be built."""
    command = ["make", "-C", folder / "tests/tools/emulator", "-j2", "../../../build/emulator/emulate-races"]
    make = subprocess.run(command, capture_output=True)
    if make.returncode:
        return None
    program = folder / "build/emulator/emulate-races"
    out = subprocess.run([program, "--seeds", seeds, "--stop", str(stop)], capture_output=True, text=True).stdout
    lines = [re.match(r"FAIL seed (\d+): [^:]*: (.*)", line) for line in out.splitlines()]
    failed = {int(line[1]): line[2] for line in lines if line}
    return failed if re.search(r"^\d+ cases", out, re.M) else {**failed, -1: "the program crashed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name has this text")
    parser.add_argument("--seeds", default="0:300")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/emulator-faults")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    for part in ("csrc", "tests/tools/emulator"):
        shutil.copytree(ROOT / part, folder / part, copy_function=shutil.copy, dirs_exist_ok=True)
    sound = failing(folder, arguments.seeds)
    if sound is None:
        raise SystemExit("the sources cannot be built")
    print(f"{len(sound)} seeds fail without a fault: {sorted(sound)}", flush=True)
    missed = 0
    for name, file, at, old, new in faults():
        if arguments.only not in name:
            continue
        begin, text = time.time(), (ROOT / file).read_text()
        (folder / file).write_text(text[:at] + new + text[at + len(old) :])
        failed = failing(folder, arguments.seeds, len(sound) + 1)
        (folder / file).write_text(text)
        new_ones = {seed: why for seed, why in (failed or {}).items() if seed not in sound}
        outcome = "NOT BUILT" if failed is None else "MISSED"
        if new_ones:
            seed, why = min(new_ones.items())
            outcome = f"seed {seed}: {why[:150]}"
        missed += not new_ones
        print(f"{name} | {outcome} | {time.time() - begin:.0f} s", flush=True)
    print(f"{missed} not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
