"""The task: strings of a language that no model has seen; at each letter, is the likeliest letter one it allows?"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sweep.task import Batch
from .automata import END, LETTERS, LONGEST, VOCABULARY, allowed, draw_automata, draw_examples, transitions

SEED = 0
ROUND = 16  # lengths are multiples of it


@dataclass(frozen=True)
class Languages:
    """``train`` automata with one example each to learn from, and ``held_out`` others.

    Args:
        batch: examples of a training step.
        parts: examples are sorted by length into so many parts, and a batch is drawn from one of them.
    """

    train: int = 5000
    held_out: int = 500
    batch: int = 32
    parts: int = 4

    @property
    def title(self) -> str:
        return f"{self.train} automata"

    def data(self, device: torch.device) -> LanguageData:
        return LanguageData(self, device)


class LanguageData:
    """Batches of the task on a device; automata and examples are made on the CPU."""

    vocabulary = VOCABULARY

    def __init__(self, task: Languages, device: torch.device) -> None:
        self.task, self.device = task, device
        automata = draw_automata(task.train + task.held_out, SEED)
        table, tokens = transitions(automata), draw_examples(automata, torch.Generator().manual_seed(SEED))
        train, test = by_length(tokens[: task.train]), by_length(tokens[task.train :])
        self.parts = [trimmed(tokens[part]).to(device) for part in train.tensor_split(task.parts)]
        self._held_out = []
        for part in (test + task.train).split(task.batch):
            inputs, answers = shifted(trimmed(tokens[part]))
            batch = self._batch(inputs, answers, (answers < LETTERS).float(), allowed(table[part], inputs))
            self._held_out.append(batch)

    def variant(self, step: int, steps: int) -> int:
        """The part of the examples."""
        return random.Random(step).randrange(self.task.parts)

    def draw(self, variant: int, generator: torch.Generator) -> Batch:
        part = self.parts[variant]
        rows = torch.randint(len(part), (self.task.batch,), generator=generator, device=self.device)
        inputs, answers = shifted(part.index_select(0, rows))
        counts = (answers != END).float()
        return self._batch(inputs, answers, counts / counts.sum())

    def held_out(self) -> list[Batch]:
        return self._held_out

    def _batch(self, inputs: Tensor, answers: Tensor, weights: Tensor, may: Tensor | None = None) -> Batch:
        positions = torch.arange(inputs.numel(), device=self.device)
        may = None if may is None else may.flatten(0, 1).to(self.device)
        answers, weights = answers.flatten().to(self.device), weights.flatten().to(self.device)
        return Batch(inputs.to(self.device), positions, answers, weights, may)


def by_length(tokens: Tensor) -> Tensor:
    """Indices of examples (A, T), the shortest first."""
    return (tokens != END).sum(1).argsort(stable=True)


def trimmed(tokens: Tensor) -> Tensor:
    """Examples (A, LONGEST) cut to the longest of them, rounded up, and one ``END``: (A, T + 1)."""
    length = int((tokens != END).sum(1).max())
    length = (length + ROUND - 1) // ROUND * ROUND
    padding = tokens.new_full((len(tokens), max(0, length + 1 - LONGEST)), END)
    return torch.cat((tokens[:, : length + 1], padding), 1)


def shifted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> inputs (B, T) and the token after each."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
