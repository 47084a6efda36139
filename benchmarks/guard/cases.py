"""What is compared on each device: a short call for every kernel, in each of the ways in which it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

from ..speed.cases import Case


class Subject(NamedTuple):
    """One of the speed benchmark's operators and what it is called with."""

    provider: str
    case: Case


Suite = dict[str, Subject]
"""By the name that the command line takes."""

# About a millisecond each, backward included, which other processes of a busy machine rarely meet.
_cpu = Case(length=1024, heads=1)
_cpu_step = Case(length=1, heads=16)
CPU: Suite = {
    **{f"fejer-r{r}": Subject("fejer", replace(_cpu, resolution=r)) for r in (1, 2, 8)},
    "fejer-wide": Subject("fejer", replace(_cpu, length=512, head_dim=128, resolution=4)),
    "fejer-bfloat16": Subject("fejer", replace(_cpu, dtype="bfloat16")),
    "grouped": Subject("fejer", replace(_cpu, length=512, heads=2, kv_heads=1, resolution=4)),
    "pyramid": Subject("pyramid", replace(_cpu, length=256, heads=8, slots=16)),
    "packed": Subject("packed", _cpu),
    "chunk": Subject("chunk", replace(_cpu, length=128, batch=2)),
    "dirichlet": Subject("dirichlet", replace(_cpu, length=256, resolution=2)),
    "steps-one": Subject("steps", _cpu_step),
    "steps-many": Subject("steps", replace(_cpu_step, batch=8)),
    "steps-bfloat16": Subject("steps_bfloat16", replace(_cpu_step, batch=2)),
    "steps-dirichlet": Subject("steps_dirichlet", _cpu_step),
    "rotary": Subject("rotary", replace(_cpu, heads=4)),
}

_gpu = partial(Case, batch=2, heads=16, dtype="bfloat16")
_gpu_step = _gpu(length=1, batch=64, heads=32, kv_heads=8, head_dim=128, slots=256)
CUDA: Suite = {
    **{
        f"fejer-{dim}-r{r}": Subject("fejer", _gpu(length=8192, head_dim=dim, resolution=r))
        for dim in (64, 128)
        for r in (1, 2, 8)
    },
    "fejer-float16": Subject("fejer", replace(_gpu(length=8192), dtype="float16")),
    "fejer-128-slots": Subject("fejer", _gpu(length=4096, slots=128, resolution=4)),
    "grouped": Subject("fejer", _gpu(length=4096, heads=32, kv_heads=8, head_dim=128)),
    **{f"pyramid-{dim}": Subject("pyramid", _gpu(length=8192, head_dim=dim)) for dim in (64, 128)},
    **{f"dirichlet-{dim}": Subject("dirichlet", _gpu(length=4096, head_dim=dim)) for dim in (64, 128)},
    "dirichlet-64-r16": Subject("dirichlet", _gpu(length=4096, resolution=16)),
    **{
        f"scan-{kernel}": Subject(kernel, Case(length=2048, batch=2, dtype="float32"))
        for kernel in ("fejer", "dirichlet")
    },
    "short": Subject("fejer", _gpu(length=512, batch=1)),
    "long": Subject("fejer", _gpu(length=65536, batch=1)),
    "packed": Subject("packed", _gpu(length=16384, batch=1)),
    "chunk": Subject("chunk", _gpu(length=512, batch=64)),
    "unsound": Subject("unsound", _gpu(length=1024)),
    "steps-one": Subject("steps", replace(_gpu_step, batch=1)),
    "steps-many": Subject("steps", _gpu_step),
    "steps-bfloat16": Subject("steps_bfloat16", _gpu_step),
    "steps-dirichlet": Subject("steps_dirichlet", _gpu_step),
    "rotary": Subject("rotary", _gpu(length=8192, batch=4)),
}

SUITES = {"cpu": CPU, "cuda": CUDA}


def quick(suite: Suite) -> Suite:
    """So small that each takes no time: does everything run?"""
    return {
        name: Subject(provider, replace(case, length=min(case.length, 128), batch=1, slots=16, resolution=1))
        for name, (provider, case) in suite.items()
    }


def chosen(suite: Suite, patterns: Sequence[str]) -> Suite:
    """Those whose names one of the patterns matches, as file names are matched.

    Raises:
        ValueError: a pattern that matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in suite):
            raise ValueError(f"no case is named {pattern!r}; there are {', '.join(suite)}")
    return {name: subject for name, subject in suite.items() if any(fnmatchcase(name, each) for each in patterns)}
