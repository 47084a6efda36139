"""Random deterministic automata, and strings that they accept.

Tokens: letters 0 .. 17, ``BAR`` between the strings of an example, ``END`` after the last one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS = 18
BAR, END = LETTERS, LETTERS + 1
VOCABULARY = LETTERS + 2
STATES, ALPHABET, EDGES = (4, 12), (4, 18), (1, 3)
STRINGS, LENGTHS = (10, 19), (1, 49)
LONGEST = STRINGS[1] * (LENGTHS[1] + 1) - 1


@dataclass(frozen=True)
class Automaton:
    """``edges[state]`` maps letters to states; state 0 is the start, and all states accept."""

    edges: tuple[tuple[tuple[int, int], ...], ...]

    def minimised(self) -> Automaton:
        """The least automaton of the same language, trimmed, its states numbered as a search by letters finds them.

        Two automata with the same language become equal.
        """
        kinds = [0] * len(self.edges)
        while True:
            behaviour = [tuple(sorted((letter, kinds[to]) for letter, to in edges)) for edges in self.edges]
            numbers = {known: number for number, known in enumerate(dict.fromkeys(behaviour))}
            if len(numbers) == len(set(kinds)):
                break
            kinds = [numbers[each] for each in behaviour]
        found = [0]
        numbers_of = {kinds[0]: 0}
        for state in found:
            for _, to in sorted(self.edges[state]):
                if kinds[to] not in numbers_of:
                    numbers_of[kinds[to]] = len(found)
                    found.append(to)
        return Automaton(
            tuple(tuple((letter, numbers_of[kinds[to]]) for letter, to in sorted(self.edges[state])) for state in found)
        )


def draw_automaton(source: random.Random) -> Automaton:
    """4 .. 12 states over 4 .. 18 letters, each with 1 .. 3 edges to distinct other states; then minimised."""
    states = source.randint(*STATES)
    alphabet = source.sample(range(LETTERS), source.randint(*ALPHABET))
    edges = []
    for state in range(states):
        count = source.randint(*EDGES)
        others = [other for other in range(states) if other != state]
        edges.append(tuple(zip(source.sample(alphabet, count), source.sample(others, count), strict=True)))
    return Automaton(tuple(edges)).minimised()


def draw_automata(count: int, seed: int) -> list[Automaton]:
    """``count`` automata, no two with the same language."""
    source = random.Random(seed)
    found: dict[Automaton, None] = {}
    while len(found) < count:
        found[draw_automaton(source)] = None
    return list(found)


def transitions(automata: Sequence[Automaton]) -> Tensor:
    """(A, states, letters) int64: the state after a letter in a state, -1 where the automaton does not allow it."""
    table = torch.full((len(automata), STATES[1], LETTERS), -1)
    for number, automaton in enumerate(automata):
        for state, edges in enumerate(automaton.edges):
            for letter, to in edges:
                table[number, state, letter] = to
    return table


def draw_examples(automata: Sequence[Automaton], generator: torch.Generator) -> Tensor:
    """One example per automaton: (A, LONGEST) tokens, filled up with ``END``.

    It joins 10 .. 19 strings of length 1 .. 49 by ``BAR``; each letter follows one of the state's edges, all alike.
    """
    rows = torch.arange(len(automata))
    count = torch.ones(len(automata), STATES[1], dtype=torch.int64)
    edges = torch.zeros(len(automata), STATES[1], EDGES[1], 2, dtype=torch.int64)
    for number, automaton in enumerate(automata):
        for place, mine in enumerate(automaton.edges):
            count[number, place] = len(mine)
            edges[number, place, : len(mine)] = torch.tensor(mine)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (len(automata),), generator=generator)

    state = torch.zeros_like(rows)
    strings, letters = whole(*STRINGS), whole(*LENGTHS)
    tokens = torch.full((len(automata), LONGEST), END)
    for place in range(LONGEST):
        edge = (torch.rand(len(automata), generator=generator) * count[rows, state]).long()
        letter, after = edges[rows, state, edge].unbind(-1)
        done = letters == 0
        strings -= done.long()
        over = strings <= 0
        tokens[:, place] = torch.where(done, torch.where(over, END, BAR), letter)
        state = torch.where(done, 0, after)
        letters = torch.where(done, torch.where(over, 0, whole(*LENGTHS)), letters - 1)
    return tokens


def allowed(table: Tensor, tokens: Tensor) -> Tensor:
    """What may come after each token, by the automaton: (A, T, VOCABULARY) bool, letters alone.

    Args:
        table: (A, states, letters), as ``transitions`` gives it.
        tokens: (A, T) of examples that the automata accept.
    """
    rows = torch.arange(len(table))
    state = torch.zeros_like(rows)
    may = torch.zeros(*tokens.shape, VOCABULARY, dtype=torch.bool)
    for place in range(tokens.shape[1]):
        token = tokens[:, place]
        after = table[rows, state, token.clamp(max=LETTERS - 1)]
        state = torch.where(token < LETTERS, after, 0)
        if (state < 0).any():
            raise ValueError(f"tokens must be accepted by their automata, but are not at place {place}")
        may[:, place, :LETTERS] = table[rows, state] >= 0
    return may
