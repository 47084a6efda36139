"""Time by CUDA events; memory by PyTorch's allocator."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from ..cases import Case

FLUSH_BYTES = 4 * 2**30
CEILING_ROUNDS = 10
PRODUCT_SIZE = 8192


class CudaMeter:
    time = (
        "CUDA events around one call, right after a read of 4 GiB, which empties the cache and lets the host run ahead "
        "of the device; the host's time is that of a second call right after it"
    )
    memory = (
        "peak of torch.cuda.max_memory_allocated during a warm call, less what was allocated before it (query, key, "
        "value, the incoming gradient and ready-made gates are there already)"
    )

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")

    def hardware(self) -> dict[str, object]:
        return {"gpu": torch.cuda.get_device_name(), "driver": f"driver {driver()}"}

    def ceilings(self) -> dict[str, float]:
        source, target = self.flush.chunk(2)
        left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device="cuda").bfloat16()
        product = torch.empty_like(left)
        copying = self._median(lambda: target.copy_(source))
        multiplying = self._median(lambda: torch.matmul(left, right, out=product))
        return {
            "copy_bytes_per_second": 2 * source.nbytes / copying,
            "product_flops_per_second": 2 * PRODUCT_SIZE**3 / multiplying,
        }

    def measure(self, call: Callable[[], object]) -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # A read leaves no dirty lines that the call would have to write back.
        self.flush.sum()
        start.record()
        call()
        end.record()
        # One call after another, as a model makes them: the first one finds its code out of the processor's caches.
        host_start = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - host_start
        torch.cuda.synchronize()
        return {"seconds": start.elapsed_time(end) * 1e-3, "host_seconds": host_seconds}

    def peak_bytes(self, provider: str, case: Case, mode: str, call: Callable[[], None]) -> int:
        return self.allocated(call)

    def allocated(self, call: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _median(self, call: Callable[[], object]) -> float:
        call()
        return statistics.median(self.measure(call)["seconds"] for _ in range(CEILING_ROUNDS))


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
