"""What a task gives to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens and what is to be predicted.

    Args:
        tokens: (B, T) int64.
        positions: (P,) int64, into the flattened tokens.
        answers: (P,) int64.
        weights: (P,) float32, share of each position in the loss; in evaluation 1 where it counts, else 0.
        allowed: (P, V) bool, what counts as right; the answer alone if None.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor
    weights: Tensor
    allowed: Tensor | None = None


class Data(Protocol):
    """The data of a task on one device."""

    vocabulary: int

    def variant(self, step: int, steps: int) -> int:
        """Which kind of batch a step trains on; batches of one variant have one shape."""

    def draw(self, variant: int, generator: torch.Generator) -> Batch:
        """A training batch, by operations that a CUDA graph can hold."""

    def held_out(self) -> list[Batch]:
        """The same batches at every call."""


class Task(Protocol):
    """A frozen dataclass: the numbers that define a task."""

    @property
    def title(self) -> str:
        """Names the task in reports; also tells tasks apart."""

    def data(self, device: torch.device) -> Data: ...
