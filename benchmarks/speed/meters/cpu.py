"""Time by the wall clock; memory by the kernel's own account of a fresh process."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd.profiler import profile

from ..cases import Case, one_call
from ..providers import PROVIDERS

PROC = Path("/proc/self")
# Freed blocks go back to the system at once, so that what is resident is what is in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class CpuMeter:
    time = "wall clock"
    memory = (
        "peak resident memory of a fresh process during the call, less what was resident before it "
        "(query, key, value and the incoming gradient are there already; one small call has warmed up the libraries)"
    )

    def __init__(self, threads: int) -> None:
        self.threads = threads
        torch.set_num_threads(threads)
        # Processes are forked from a server, started with the first of them, that has done nothing but imports.
        self.fresh = multiprocessing.get_context("forkserver")
        self.fresh.set_forkserver_preload(["benchmarks.speed.__main__", "blurry_attn"])

    def hardware(self) -> dict[str, object]:
        return {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "threads": self.threads}

    def ceilings(self) -> dict[str, float]:
        return {}

    def measure(self, call: Callable[[], None]) -> dict[str, float]:
        start = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - start}

    def allocated(self, call: Callable[[], None]) -> int:
        with profile(profile_memory=True) as profiler:
            call()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        changes = sorted((event for event in events if event["name"] == "[memory]"), key=itemgetter("ts"))
        return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))

    def peak_bytes(self, provider: str, case: Case, mode: str, call: Callable[[], None]) -> int:
        receiver, sender = self.fresh.Pipe(duplex=False)
        process = self.fresh.Process(target=_send_peak, args=(sender, provider, case, mode, self.threads), daemon=True)
        with patch.dict(os.environ, ALLOCATOR):
            process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the memory process ended with status {process.exitcode}") from None
        process.join()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _send_peak(sender: Connection, provider: str, case: Case, mode: str, threads: int) -> None:
    try:
        sender.send(_peak(provider, case, mode, threads))
    except Exception as error:
        sender.send(error)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since it was reset) of this process, in bytes."""
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{PROC}/status has no {field}")


def _peak(provider: str, case: Case, mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    prepare = PROVIDERS[provider].prepare
    small = replace(case, length=2 * case.slots)
    one_call(prepare(small), mode, *small.inputs("cpu"))
    attend, inputs = prepare(case), case.inputs("cpu")
    (PROC / "clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    one_call(attend, mode, *inputs)
    return max(0, resident("VmHWM") - before)
