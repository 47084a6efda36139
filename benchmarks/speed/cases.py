"""What is measured: problem sizes, modes, and the claims each device's results are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem: query, key and value of shape (batch, heads, length, head_dim); ``slots`` and ``resolution`` of the
    blurry window (``slots`` is also the number of tokens that a sliding window of equal state sees)."""

    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    slots: int = 64
    resolution: int = 8
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def inputs(self, device: str, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value and the gradient that comes in at the output."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.heads, self.length, self.head_dim)
        query, key, value, grad_out = (
            torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, self.dtype)) for _ in range(4)
        )
        return query, key, value, grad_out


def one_call(attend: Attend, mode: str, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor) -> None:
    """What is timed: the operator alone, or the operator and its gradients for query, key and value."""
    if mode == FORWARD:
        with torch.no_grad():
            attend(query, key, value)
    else:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        torch.autograd.grad(attend(*leaves), leaves, grad_out)


@dataclass(frozen=True)
class Ratio:
    """The claim that time(provider, length) / time(over, over_length) is at least, or at most, ``bound``."""

    text: str
    provider: str
    length: int
    over: str
    over_length: int
    bound: float
    at_most: bool = False
    per_token: bool = False

    def value(self, above: float, below: float) -> float:
        """The ratio of the two measured times, in seconds."""
        return above / below * (self.over_length / self.length if self.per_token else 1.0)

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Suite:
    """Everything one command measures on one device.

    All cases are gone through ``sweeps`` times; each time every provider is called at least ``rounds`` times, and each
    case is given at least ``seconds``.
    """

    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    checks: tuple[Ratio, ...] = field(default=())
    sweeps: int = 3
    rounds: int = 3
    seconds: float = 1.5


SUITES: dict[str, Suite] = {
    "cpu": Suite(
        cases=tuple(Case(length=1024 * 2**i) for i in range(7)),
        providers=("blurry", "local", "sdpa"),
        checks=(
            Ratio("full causal attention / blurry, T = 8192", "sdpa", 8192, "blurry", 8192, 16.0),
            Ratio("block-local window / blurry, T = 8192", "local", 8192, "blurry", 8192, 1.0),
            Ratio(
                "blurry, time per token, T = 65536 / 8192",
                *("blurry", 65536, "blurry", 8192, 1.15),
                at_most=True,
                per_token=True,
            ),
        ),
    ),
}
QUICK: dict[str, Suite] = {
    "cpu": Suite(
        cases=(Case(length=1024, heads=4),), providers=SUITES["cpu"].providers, sweeps=1, rounds=2, seconds=0.0
    )
}
