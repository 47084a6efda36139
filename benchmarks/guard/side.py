"""One of the two installations that are compared: where it lies, and the process that measures it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = "blurry_attn"
ENVIRONMENT = {
    "KINETO_LOG_LEVEL": "6",  # torch's profiler prints two messages at every use
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads, which are started at its import and do not survive a fork
}
PATIENCE = 300
"""Seconds after which a process that does not answer is ended."""


class Unusable(Exception):
    """What was given cannot be installed or imported."""


class Failed(Exception):
    """What a process was asked for failed in it, or ended it."""


def installed(given: Path, target: Path) -> Path:
    """The folder to import from: ``given`` itself if it is one, else a wheel, which is installed into ``target``.

    Raises:
        Unusable: it is neither, or pip does not take it.
    """
    if (given / PACKAGE / "__init__.py").is_file():
        return given.resolve()
    if given.suffix != ".whl" or not given.is_file():
        raise Unusable(f"{given} is neither a wheel nor a folder with the package {PACKAGE}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    done = subprocess.run([*command, "--no-deps", "--target", target, given], capture_output=True, text=True)
    if done.returncode:
        raise Unusable(f"{given} cannot be installed: {done.stderr.strip() or done.stdout.strip()}")
    return target.resolve()


class Gone(Failed):
    """The process does not answer any more."""


class Side:
    """Answers one call at a time, in processes that import the package from ``folder`` and no other place.

    They start in ``scratch``, an empty folder, so that of the places where a package is looked for ``folder`` is the
    first, and the project, with the benchmarks and perhaps a package, comes after it.
    """

    def __init__(self, folder: Path, scratch: Path, device: str, threads: int) -> None:
        self.folder, self.scratch, self.arguments = folder, scratch, (device, str(threads))
        self.asked = 0
        self.launch()

    def launch(self) -> None:
        """Starts a process, which imports the package meanwhile."""
        self.connection, other = Pipe()
        path = [str(self.folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.guard.worker", str(other.fileno()), *self.arguments],
            pass_fds=[other.fileno()],
            cwd=self.scratch,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )
        other.close()

    def installation(self) -> dict[str, Any]:
        """What :meth:`launch`'s process has imported; to be called once, before any other call.

        Raises:
            Unusable: the package cannot be imported, or comes from elsewhere.
        """
        try:
            found: dict[str, Any] = self._answer()
        except Failed as error:
            raise Unusable(f"{self.folder}: {error}") from None
        if found["folder"] != str(self.folder):
            raise Unusable(f"{self.folder}: {PACKAGE} was imported from {found['folder']}")
        return found

    def ask(self, name: str, *arguments: object) -> Any:
        """The result of a method of ``Worker``.

        Raises:
            Failed: with the reason; later calls are answered all the same.
        """
        try:
            self.asked += 1
            self.connection.send((self.asked, name, *arguments))
            return self._answer()
        except (Gone, BrokenPipeError) as error:
            relaunch([self])
            raise Failed(str(error)) from None

    def renew(self) -> None:
        """A process forked anew takes over."""
        self.connection.send((0, "renew"))

    def _answer(self) -> Any:
        while True:
            if not self.connection.poll(PATIENCE):
                raise Gone(f"no answer within {PATIENCE} s")
            try:
                number, succeeded, result = self.connection.recv()
            except (EOFError, ConnectionResetError):
                raise Gone(f"the process ended with status {self.process.wait()}") from None
            # Not the answer to an earlier call, which comes late where a process broke down after it had answered.
            if number in (None, self.asked):
                break
        if not succeeded:
            raise Failed(result)
        return result

    def close(self) -> None:
        """Ends all processes."""
        self.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def relaunch(sides: Sequence[Side]) -> None:
    """Both import the package anew, at once."""
    for side in sides:
        side.close()
        side.launch()
    for side in sides:
        side.installation()
