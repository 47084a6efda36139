"""A few processes that have joined in a gloo group and run the functions that a test sends them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120  # seconds


class World:
    """``world(function, *arguments)`` runs it on every rank at once and returns their results, in rank order."""

    def __init__(self, size: int, store: Path) -> None:
        self.size = size
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.ends = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, str(store), there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable, *arguments: Any, **options: Any) -> list[Any]:
        for end in self.ends:
            end.send((function, arguments, options))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            ready = wait([end for rank, end in enumerate(self.ends) if rank not in results], TIMEOUT)
            assert ready, f"ranks {set(range(self.size)) - results.keys()} do not answer"
            for end in ready:
                rank = self.ends.index(end)  # type: ignore[arg-type]
                error, results[rank] = end.recv()  # type: ignore[union-attr]
                assert error is None, f"rank {rank}:\n{error}"
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, store: str, end: Connection) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    while True:
        function, arguments, options = end.recv()
        try:
            answer = None, function(*arguments, **options)
        except Exception:
            answer = traceback.format_exc(), None
        end.send(answer)
