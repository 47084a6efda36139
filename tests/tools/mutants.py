"""Mutation check: single faults, put into the sources one by one, each of which the tests must catch.

    python tests/tools/mutants.py                           the CPU and the Python faults: build, test, report
    python tests/tools/mutants.py --cuda-build DIR          build one extension per CUDA fault; needs nvcc and no card
    python tests/tools/mutants.py --cuda-run DIR            test those with the installed package, where a card is
    python tests/tools/mutants.py --merge FILE              take over the rows of a table written elsewhere

The faults and the tests that must catch them are in faults.py, the outcome is in docs/mutants.md. The exit status is 0
if every fault was caught.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from faults import CPU, CUDA, PYTHON, QUICK, QUICK_CUDA, Edit, Fault

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "mutants.md"
PARTS = ("blurry_attn", "csrc", "tests", "LICENSE", "README.md", "pyproject.toml", "setup.py")
LIMIT = 120  # seconds that a fault's tests may take
AT_ONCE = 8  # faults that share a card
UNMUTATED = "unmutated"
SURVIVED = "SURVIVED"
HEAD = """\
# Mutants

Single faults in the sources and, of the tests that must catch each ([faults.py](../tests/tools/faults.py)), the first
that fails. [mutants.py](../tests/tools/mutants.py) writes this page; [testing.md](design/testing.md) says how it is
run.

| fault | file | caught by |
| --- | --- | --- |
"""


class Copy:
    """A copy of the tree, with a few edits, built in place. It stays, so that the next one compiles what changed."""

    def __init__(self, folder: Path, python: str, edits: list[Edit], **environment: str) -> None:
        self.folder, self.python = folder, python
        programs = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": programs, **environment}
        self.sources = {path.relative_to(ROOT): path.read_bytes() for path in self._files(ROOT)}
        for edit in edits:
            self.sources[Path(edit.file)] = self._edited(edit)
        for path in self._files(folder):
            if path.relative_to(folder) not in self.sources:
                path.unlink()
        for name, content in self.sources.items():
            self._write(name, content)

    @staticmethod
    def _files(root: Path) -> list[Path]:
        found = [path for part in PARTS for path in (root / part, *(root / part).rglob("*")) if path.is_file()]
        return [path for path in found if path.suffix not in (".so", ".pyc") and path.name != "_build.py"]

    def _edited(self, edit: Edit) -> bytes:
        """The file's content with the edit made."""
        return self.sources[Path(edit.file)].decode().replace(edit.old, edit.new).encode()

    def _write(self, name: Path, content: bytes) -> None:
        path = self.folder / name
        if not path.exists() or path.read_bytes() != content:  # else its objects are still good
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    @contextmanager
    def mutated(self, fault: Fault) -> Iterator[None]:
        """The tree with one fault."""
        name = Path(fault.file)
        self._write(name, self._edited(fault))
        try:
            yield
        finally:
            self._write(name, self.sources[name])

    def build(self) -> Path:
        """Builds in place; returns the extension."""
        command = [self.python, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the build failed:\n{(done.stdout + done.stderr)[-4000:]}")
        (extension,) = (self.folder / "blurry_attn").glob("_C*.so")
        return extension


def pytest_arguments(tests: tuple[str, ...], marker: str) -> list[str]:
    return ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-m", marker, *tests]


def test_environment(package: Path) -> dict[str, str]:
    return {"CI": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"}


def run_tests(tests: tuple[str, ...], root: Path, package: Path, marker: str, python: str) -> str | None:
    """Runs pytest in `root` on the package whose folder lies in `package`; what failed first, None if nothing did."""
    command = [python, "-m", "pytest", *pytest_arguments(tests, marker)]
    environment = os.environ | test_environment(package)
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT} s"
    return outcome(done.returncode, done.stdout + done.stderr)


def outcome(status: int, said: str) -> str | None:
    """What failed first, from pytest's exit status and output."""
    if status == 0:
        return None
    if status < 0:
        return f"crash (signal {-status})"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(?:\w+/)?([\w.]+::\w+)", said, re.MULTILINE)
    if status != 1 or not failed:
        raise SystemExit(f"pytest ended with {status}:\n{said[-4000:]}")
    return failed[1]


def import_what_tests_import() -> None:
    """But the package; what OpenMP reads from the environment when it is loaded, as conftest.py sets it."""
    os.environ |= {"OMP_WAIT_POLICY": "passive", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for name in (
        "hypothesis",
        "matplotlib",
        "pytest",
        "safetensors.torch",
        "torch._dynamo",
        "torch.distributed.tensor",
    ):
        importlib.import_module(name)


def run_tests_in_a_fork(tests: tuple[str, ...], root: Path, marker: str) -> str | None:
    """As run_tests, in a copy of this process: after import_what_tests_import() that saves most of the time."""
    with tempfile.TemporaryFile("w+") as log:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.setsid()  # with what it starts, so that all of it can be stopped
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os.chdir(root)
            os.environ |= test_environment(root)
            sys.dont_write_bytecode = True
            sys.path[0] = str(root)
            status = importlib.import_module("pytest").main(pytest_arguments(tests, marker))
            sys.stdout.flush()
            os._exit(status)
        end, status = time.perf_counter() + LIMIT, None
        while status is None and time.perf_counter() < end:
            time.sleep(0.05)
            done, found = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if done else None
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end within {LIMIT} s"
        log.seek(0)
        return outcome(status, log.read())


def check_unmutated(faults: list[Fault], root: Path, package: Path, marker: str, python: str, at_once: int = 1) -> None:
    """Every subset passes, in time, where there is no fault."""

    def check(tests: tuple[str, ...]) -> None:
        start = time.perf_counter()
        if failed := run_tests(tests, root, package, marker, python):
            raise SystemExit(f"without a fault: {failed} ({' '.join(tests)})")
        print(f"{time.perf_counter() - start:4.0f} s  no fault  {' '.join(tests)}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(check, dict.fromkeys(fault.tests for fault in faults)))


def rows(table: Path) -> dict[str, str]:
    """The lines of a table by the name of their fault."""
    lines = table.read_text().splitlines() if table.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


def write(table: Path, found: dict[str, str]) -> None:
    """Writes the rows of the faults that there are, in their order, those in `found` in place of older ones."""
    known = rows(table) | found
    lines = [known[fault.name] for fault in (*CPU, *PYTHON, *CUDA) if fault.name in known]
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(HEAD + "".join(f"{line}\n" for line in lines))


def report(fault: Fault, caught: str | None, seconds: float, table: Path) -> bool:
    print(f"{seconds:4.0f} s  {fault.name}: {caught or SURVIVED}", flush=True)
    outcome = f"`{caught}`" if caught and "::" in caught else caught or f"**{SURVIVED}**"
    write(table, {fault.name: f"| {fault.name} | `{fault.file.removeprefix('csrc/')}` | {outcome} |"})
    return caught is not None


def is_built(fault: Fault) -> bool:
    """Whether the fault is in the extension."""
    return fault.file.startswith("csrc/")


def check_cpu(faults: list[Fault], table: Path, unmutated: bool) -> bool:
    python = sys.executable
    copy = Copy(ROOT / "build" / "mutants", python, QUICK, BLURRY_CUDA="0")
    copy.build()
    if unmutated:
        check_unmutated(faults, copy.folder, copy.folder, "not cuda", python)
    import_what_tests_import()
    all_caught, was_built = True, False
    for fault in faults:
        start = time.perf_counter()
        with copy.mutated(fault):
            if is_built(fault) or was_built:
                copy.build()
            was_built = is_built(fault)
            caught = run_tests_in_a_fork(fault.tests, copy.folder, "not cuda")
        all_caught &= report(fault, caught, time.perf_counter() - start, table)
    return all_caught


def stored(folder: Path, name: str) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.so"


def build_cuda(faults: list[Fault], python: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def store(copy: Copy, name: str) -> None:
        start = time.perf_counter()
        path = stored(folder, name)
        shutil.copy(copy.build(), path)
        print(f"{time.perf_counter() - start:4.0f} s  {path.name}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)

    quick = Copy(ROOT / "build" / "mutants-cuda", python, [*QUICK, *QUICK_CUDA], BLURRY_CUDA="1")
    whole = Copy(ROOT / "build" / "mutants-cuda-whole", python, QUICK, BLURRY_CUDA="1")
    store(quick, UNMUTATED)
    for fault in faults:
        copy = whole if fault.whole else quick
        with copy.mutated(fault):
            store(copy, fault.name)


def run_cuda(faults: list[Fault], python: str, source: Path, table: Path) -> bool:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: every test would be skipped")
    installed = importlib.util.find_spec("blurry_attn")
    if installed is None or installed.origin is None:
        raise SystemExit("blurry_attn is not installed")
    package = Path(installed.origin).parent
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(AT_ONCE) as pool:

        def site(name: str) -> Path:
            """A folder with the package whose extension is the one built under that name."""
            folder = Path(tempfile.mkdtemp(dir=temporary))
            shutil.copytree(package, folder / "blurry_attn")
            (extension,) = (folder / "blurry_attn").glob("_C*.so")
            shutil.copy(stored(source, name), extension)
            return folder

        def check(fault: Fault) -> tuple[str | None, float]:
            start = time.perf_counter()
            caught = run_tests(fault.tests, ROOT, site(fault.name), "cuda", python)
            return caught, time.perf_counter() - start

        check_unmutated(faults, ROOT, site(UNMUTATED), "cuda", python, AT_ONCE)
        outcomes = zip(faults, pool.map(check, faults), strict=True)
        return all([report(fault, caught, seconds, table) for fault, (caught, seconds) in outcomes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cuda-build", type=Path, metavar="DIR")
    mode.add_argument("--cuda-run", type=Path, metavar="DIR")
    mode.add_argument("--merge", type=Path, metavar="FILE")
    parser.add_argument("--python", default=sys.executable, help="of the CUDA faults' environment")
    parser.add_argument("--no-unmutated", action="store_true", help="take it that tests pass where there is no fault")
    parser.add_argument("--only", default="", metavar="TEXT", help="the faults with this in their name or file")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: docs/mutants.md")
    options = parser.parse_args()
    faults = [
        fault
        for fault in (CUDA if options.cuda_build or options.cuda_run else (*CPU, *PYTHON))
        if options.only in f"{fault.name} {fault.file}"
    ]
    if options.merge:
        write(options.table, rows(options.merge))
    elif options.cuda_build:
        build_cuda(faults, options.python, options.cuda_build)
    elif options.cuda_run:
        sys.exit(not run_cuda(faults, options.python, options.cuda_run, options.table))
    else:
        sys.exit(not check_cpu(faults, options.table, not options.no_unmutated))


if __name__ == "__main__":
    main()
