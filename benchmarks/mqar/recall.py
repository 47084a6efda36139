"""The task: key-value pairs, then the keys again in random places, where the model must give their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sweep.task import Batch

HELD_OUT_SEED = 2
POWER = 0.01


@dataclass(frozen=True)
class Recall:
    """``pairs`` key-value pairs in ``length`` tokens.

    Args:
        length: L, at least 4 ``pairs``.
        pairs: n.
        vocabulary: V; keys are tokens of its lower half without 0, values of its upper half.
        batch: examples of a training step.
        held_out: examples of the evaluation, a multiple of ``batch``.
        curriculum: pairs of the first stages of training, which are as long as the last one with ``pairs`` each.
    """

    length: int = 256
    pairs: int = 32
    vocabulary: int = 8192
    batch: int = 64
    held_out: int = 1024
    curriculum: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        title = f"{self.pairs} pairs in {self.length} tokens"
        return title if self.vocabulary == 8192 else f"{title} of {self.vocabulary}"

    def data(self, device: torch.device) -> RecallData:
        return RecallData(self, device)


class RecallData:
    """Batches of the task on a device, drawn there."""

    def __init__(self, task: Recall, device: torch.device) -> None:
        self.task, self.device, self.vocabulary = task, device, task.vocabulary
        generator = torch.Generator(device).manual_seed(HELD_OUT_SEED)
        self._held_out = [self.draw(task.pairs, generator) for _ in range(task.held_out // task.batch)]

    def variant(self, step: int, steps: int) -> int:
        """The number of pairs."""
        stages = (*self.task.curriculum, self.task.pairs)
        return stages[step * len(stages) // steps]

    def draw(self, variant: int, generator: torch.Generator) -> Batch:
        task = self.task
        tokens, places, values = draw(task.batch, task.length, variant, task.vocabulary, generator, self.device)
        rows = torch.arange(task.batch, device=self.device).unsqueeze(1) * task.length
        weights = torch.full((places.numel(),), 1 / places.numel(), device=self.device)
        return Batch(tokens, (rows + places).flatten(), values.flatten(), weights)

    def held_out(self) -> list[Batch]:
        return self._held_out


def draw(
    batch: int, length: int, pairs: int, vocabulary: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Examples: tokens (B, L), and the places (B, n) at which the answer is the value (B, n); all int64.

    The prefix is k_1 v_1 .. k_n v_n. Key i stands again at 2n + 2 gap_i; the gaps are drawn without replacement, gap g
    with a probability proportional to (g + 1)^(POWER - 1). All other tokens are random.
    """

    def noise(*size: int) -> Tensor:
        return torch.empty(size, device=device).exponential_(generator=generator)

    half = vocabulary // 2
    keys = noise(batch, half - 1).topk(pairs).indices + 1
    values = noise(batch, half).topk(pairs).indices + half
    space = (length - 2 * pairs) // 2
    # The first of several exponential clocks to ring is drawn with a probability proportional to its rate.
    rates = torch.arange(1, space + 1, device=device) ** (POWER - 1)
    gaps = (noise(batch, space) / rates).topk(pairs, largest=False).indices
    places = 2 * pairs + 2 * gaps
    tokens = torch.randint(vocabulary, (batch, length), generator=generator, device=device)
    tokens[:, : 2 * pairs] = torch.stack((keys, values), -1).flatten(1)
    return tokens.scatter_(1, places, keys), places, values
