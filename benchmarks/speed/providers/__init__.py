"""The operators that are compared. Importing this package registers them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from ..cases import BOTH, FORWARD, MODES, Attend, Case

# What no implementation can avoid to move: q, k, v, out; backward q, k, v, out and its gradient, and three gradients.
# Half of these have the heads of the query.
TENSORS = {FORWARD: 4, BOTH: 12}


def moved_tensors(case: Case, mode: str) -> int:
    """The fewest bytes that attention moves."""
    heads = case.heads + (case.kv_heads or case.heads)
    return TENSORS[mode] // 2 * case.tokens * heads * case.head_dim * case.torch_dtype.itemsize


@dataclass(frozen=True)
class Provider:
    """An operator under measurement.

    ``prepare(case)`` imports what it needs and returns ``attend(query, key, value) -> out``; what it raises is reported
    as the reason why the provider has no result. Its tensors are of torch's default device. ``skip(case)`` says why a
    case is left out on purpose, or None. ``keys(case)`` is the mean number of keys, or slots, that a query meets: with
    it arithmetic is counted. ``fewest_bytes(case, mode)`` is the least that has to be moved. With ``tokens_first`` all
    tensors are (batch, length, heads, head_dim).
    """

    name: str
    label: str
    prepare: Callable[[Case], Attend]
    skip: Callable[[Case], str | None] = lambda case: None
    keys: Callable[[Case], float] | None = None
    fewest_bytes: Callable[[Case, str], int] = moved_tensors
    tokens_first: bool = False
    modes: tuple[str, ...] = MODES

    def on(self, device: str, case: Case) -> Attend:
        """What ``prepare(case)`` returns, for tensors of this device."""
        with torch.device(device):
            return self.prepare(case)

    def flops(self, case: Case, mode: str) -> float | None:
        """Of the matrix products: two forward and five more backward (the scores are made again)."""
        if self.keys is None:
            return None
        return (2 if mode == FORWARD else 7) * 2 * case.tokens * case.heads * case.head_dim * self.keys(case)


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, label: str, **fields: object) -> Callable[[Callable[[Case], Attend]], Callable[[Case], Attend]]:
    """Registers the decorated ``prepare`` function; ``label`` may use the case's fields, as in ``"{slots} slots"``;
    ``fields`` are :class:`Provider`'s."""

    def register(prepare: Callable[[Case], Attend]) -> Callable[[Case], Attend]:
        PROVIDERS[name] = Provider(name, label, prepare, **fields)  # type: ignore[arg-type]
        return prepare

    return register


for _module in ("blurry", "peers", "gpu", "step"):
    import_module(f"{__name__}.{_module}")
