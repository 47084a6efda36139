"""``python -m benchmarks.guard.worker``: measures the blurry_attn that it can import, as it is asked to over a pipe.

The process that is started only imports. What it forks off answers, until it is told to end or breaks down, and then
the next one does: each has memory of its own, and none has to import anything.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .. import described
from ..speed.cases import Case, one_call
from ..speed.meters import METERS
from ..speed.providers import PROVIDERS

RENEWED, ENDED = 0, 3
"""How a process ends that is to be followed by another one, or by none."""


def installation() -> dict[str, object]:
    """The folder of blurry_attn, and which build it is."""
    import blurry_attn

    compiled = Path(blurry_attn._C.__file__)
    return {
        "folder": str(Path(blurry_attn.__file__).resolve().parents[1]),
        "sha256": hashlib.sha256(compiled.read_bytes()).hexdigest(),
        "build": blurry_attn._C.build_info(),
    }


class Worker:
    """What can be asked for. One call at a time is prepared."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.meter = METERS[device](threads)
        self.call: Callable[[], None] | None = None

    def setting(self) -> dict[str, object]:
        """What is measured on, and how."""
        return {"hardware": self.meter.hardware(), "time": self.meter.time}

    def prepare(self, provider: str, case: Case, mode: str) -> float:
        """Sets up a call, with the same inputs in every process, and warms it up; what a measurement takes in
        seconds."""
        torch.manual_seed(0)
        self.call = partial(one_call, PROVIDERS[provider].on(self.device, case), mode, *case.inputs(self.device))
        self.measure(1)
        start = time.perf_counter()
        self.measure(1)
        return time.perf_counter() - start

    def measure(self, calls: int) -> list[dict[str, float]]:
        """The meter's measurements of so many calls, one after another."""
        return [self.meter.measure(self.call) for _ in range(calls)]

    def peak_bytes(self) -> int:
        """The most memory that a call takes."""
        return self.meter.allocated(self.call)


def serve(connection: Connection, device: str, threads: int) -> int:
    """Answers until told to end: the number of what was asked, and (True, result) or (False, what failed)."""
    worker: Worker | None = None
    while True:
        try:
            number, name, *arguments = connection.recv()
        except EOFError:
            return ENDED
        if name == "renew":
            return RENEWED
        try:
            worker = worker or Worker(device, threads)
            answer = True, getattr(worker, name)(*arguments)
        except Exception as error:
            answer = False, described(error)
        connection.send((number, *answer))


def main() -> None:
    connection, device, threads = Connection(int(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    try:
        connection.send((None, True, installation()))
    except Exception as error:
        connection.send((None, False, described(error)))
        return
    code = RENEWED
    while code != ENDED:
        child = os.fork()
        if child == 0:
            os._exit(serve(connection, device, threads))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (RENEWED, ENDED):
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            connection.send((None, False, f"the process ended with {how}"))


if __name__ == "__main__":
    main()
