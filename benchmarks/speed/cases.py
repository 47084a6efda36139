"""What is measured: problem sizes, modes, and the claims each device's results are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem: query, key and value of shape (batch, heads, length, head_dim), the latter two of ``kv_heads`` where
    that is given; ``slots`` and ``resolution`` of the blurry window (``slots`` is also the number of tokens that a
    sliding window of equal state sees)."""

    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    slots: int = 64
    resolution: int = 8
    dtype: str = "float32"
    kv_heads: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def inputs(self, device: str, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value and the gradient that comes in at the output."""
        generator = torch.Generator(device).manual_seed(seed)
        kv_heads = self.kv_heads or self.heads
        query, key, value, grad_out = (
            torch.randn(
                (self.batch, heads, self.length, self.head_dim),
                generator=generator,
                device=device,
                dtype=self.torch_dtype,
            )
            for heads in (self.heads, kv_heads, kv_heads, self.heads)
        )
        return query, key, value, grad_out


def one_call(attend: Attend, mode: str, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor) -> None:
    """What is timed: the operator alone, or the operator and its gradients for query, key and value."""
    if mode == FORWARD:  # the inputs require no gradient
        attend(query, key, value)
    else:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        torch.autograd.grad(attend(*leaves), leaves, grad_out)


Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class Claim:
    """What a row's ``quantity``, or its ratio to that of the row ``over``, must be and is meant to become.

    Rows are named by provider and case. ``bounds`` holds (must, goal) by mode, None where there is no bound: the least
    values, or the largest if ``at_most``; of a ratio plain numbers, else in the unit that ``UNITS`` names.
    """

    text: str
    of: tuple[str, Case]
    bounds: dict[str, Bounds]
    over: tuple[str, Case] | None = None
    quantity: str = "seconds"
    at_most: bool = False

    def met(self, value: float | None, bound: float | None) -> bool | None:
        """None where nothing was measured or nothing is claimed."""
        if value is None or bound is None:
            return None
        return value <= bound if self.at_most else value >= bound


# By the quantities that rows have: the unit and how many of it make one of the row's.
UNITS = {
    "seconds": (" ms", 1e3),
    "seconds_per_token": (" us", 1e6),
    "host_seconds": (" us", 1e6),
    "peak_bytes": (" GiB", 2**-30),
    "times_floor": ("x", 1.0),
}


@dataclass(frozen=True)
class Group:
    """Cases that go by one name on the command line, and the providers that are compared on them."""

    cases: tuple[Case, ...]
    providers: tuple[str, ...]


Plan = dict[Case, tuple[str, ...]]
"""The providers to be run on each case."""


@dataclass(frozen=True)
class Suite:
    """Everything one command measures on one device.

    All cases are gone through ``sweeps`` times; each time every provider is called at least ``rounds`` times, and each
    case is given at least ``seconds``.
    """

    groups: dict[str, Group]
    claims: tuple[Claim, ...] = ()
    sweeps: int = 3
    rounds: int = 3
    seconds: float = 1.5

    def plan(
        self,
        groups: Iterable[str] | None = None,
        providers: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Plan:
        """What to run; None selects everything.

        Raises:
            ValueError: a name or a length that is not in the suite, or a selection that leaves nothing.
        """
        known_providers = {name for group in self.groups.values() for name in group.providers}
        known_lengths = {case.length for group in self.groups.values() for case in group.cases}
        for what, wanted, known in (
            ("cases", groups, list(self.groups)),
            ("provider", providers, sorted(known_providers)),
            ("length", lengths, sorted(known_lengths)),
        ):
            for name in wanted or ():
                if name not in known:
                    raise ValueError(f"unknown {what} {name!r}; known: {', '.join(map(str, known))}")
        plan: Plan = {}
        for group in (self.groups[name] for name in groups or self.groups):
            names = tuple(name for name in group.providers if not providers or name in providers)
            for case in group.cases:
                if names and (not lengths or case.length in lengths):
                    plan[case] = tuple(dict.fromkeys(plan.get(case, ()) + names))
        if not plan:
            raise ValueError("none of these cases has one of these providers at one of these lengths")
        return plan


def _equally(must: float | None, goal: float | None = None) -> dict[str, Bounds]:
    return {mode: (must, goal) for mode in MODES}


CPU_8K, CPU_64K = Case(length=8192), Case(length=65536)
CPU = Suite(
    groups={"sweep": Group(tuple(Case(length=1024 * 2**i) for i in range(7)), ("blurry", "local", "sdpa"))},
    claims=(
        Claim("full causal attention / blurry, T = 8192", ("sdpa", CPU_8K), _equally(16.0), over=("blurry", CPU_8K)),
        Claim("block-local window / blurry, T = 8192", ("local", CPU_8K), _equally(1.0), over=("blurry", CPU_8K)),
        Claim(
            "blurry, time per token, T = 65536 / 8192",
            ("blurry", CPU_64K),
            _equally(1.15),
            over=("blurry", CPU_8K),
            quantity="seconds_per_token",
            at_most=True,
        ),
    ),
)

_gpu_case = partial(Case, heads=16, dtype="bfloat16")
MAIN = _gpu_case(length=8192, batch=8)
QUARTER = Case(length=8192, batch=2, heads=16)
SHORT = _gpu_case(length=2048, batch=8)
LONG = _gpu_case(length=65536)
PYRAMID = _gpu_case(length=8192, batch=8, head_dim=128)
STEP = _gpu_case(length=1, batch=256)
BLURRY = ("fejer", "dirichlet", "pyramid")
FULL, FLEX, FLA = ("cudnn", "flash"), ("flex64", "flex512"), ("gsa", "gated_delta")
STEPS = ("step", "cache64", "cache8192")
CUDA = Suite(
    groups={
        "main": Group((MAIN,), BLURRY + FULL + FLEX + FLA),
        "quarter": Group((QUARTER,), BLURRY + FULL + FLEX + FLA),
        "short": Group((SHORT,), BLURRY + FULL + FLEX + FLA),
        "pyramid": Group((PYRAMID,), BLURRY + FULL),
        "sweep": Group(
            tuple(_gpu_case(length=2048 * 2**i) for i in range(10)), ("fejer", "dirichlet", *FULL, "flex64", *FLA)
        ),
        "long": Group((LONG,), ("fejer", "dirichlet", *FULL, *FLA)),
        "step": Group((STEP,), STEPS),
    },
    claims=(
        Claim("main: fejer faster than chunk_gsa", ("gsa", MAIN), _equally(1.0), over=("fejer", MAIN)),
        Claim("main: dirichlet faster than chunk_gsa", ("gsa", MAIN), _equally(1.0), over=("dirichlet", MAIN)),
        Claim("main: fejer", ("fejer", MAIN), {FORWARD: (0.30, 0.19), BOTH: (1.2, 0.77)}, at_most=True),
        Claim("main: cuDNN / fejer", ("cudnn", MAIN), _equally(8.0), over=("fejer", MAIN)),
        Claim(
            "main: chunk_gsa / fejer", ("gsa", MAIN), {FORWARD: (12.0, None), BOTH: (11.0, None)}, over=("fejer", MAIN)
        ),
        Claim("main: fejer, peak memory", ("fejer", MAIN), {BOTH: (0.7, 0.6)}, quantity="peak_bytes", at_most=True),
        Claim("main: dirichlet", ("dirichlet", MAIN), {FORWARD: (2.0, 1.0), BOTH: (8.0, 4.0)}, at_most=True),
        Claim(
            "main: fejer, host time of one call",
            ("fejer", MAIN),
            {FORWARD: (60.0, 30.0)},
            quantity="host_seconds",
            at_most=True,
        ),
        Claim("long / main: fejer", ("fejer", LONG), _equally(1.2, 1.05), over=("fejer", MAIN), at_most=True),
        Claim("short: fejer", ("fejer", SHORT), {FORWARD: (0.10, 0.06), BOTH: (0.40, 0.22)}, at_most=True),
        Claim("short: cuDNN / fejer", ("cudnn", SHORT), _equally(1.0), over=("fejer", SHORT)),
        Claim("short: FlexAttention window of 64 / fejer", ("flex64", SHORT), _equally(1.0), over=("fejer", SHORT)),
        Claim(
            "pyramid, D = 128: time over the floor",
            ("pyramid", PYRAMID),
            {FORWARD: (2.5, 1.7), BOTH: (2.5, 2.0)},
            quantity="times_floor",
            at_most=True,
        ),
        Claim("step", ("step", STEP), {FORWARD: (0.06, 0.04)}, at_most=True),
        Claim("step: cache of 8192 / step", ("cache8192", STEP), {FORWARD: (None, 45.0)}, over=("step", STEP)),
    ),
    sweeps=1,
    rounds=10,
    seconds=0.3,
)

SUITES = {"cpu": CPU, "cuda": CUDA}
_quick = partial(Suite, sweeps=1, rounds=2, seconds=0.0)
QUICK = {
    "cpu": _quick({"tiny": Group((Case(length=1024, heads=4),), CPU.groups["sweep"].providers)}),
    "cuda": _quick(
        {
            "tiny": Group((_gpu_case(length=1024),), BLURRY + FULL),
            "step": Group((_gpu_case(length=1, batch=4),), ("step", "cache64")),
        }
    ),
}
