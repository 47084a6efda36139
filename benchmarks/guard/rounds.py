"""Both sides take turns at every case, in rounds, until each has a verdict."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..speed.cases import Case
from ..speed.providers import PROVIDERS
from .cases import Suite
from .side import Failed, Side, relaunch
from .verdict import judge

TIMES, PEAK = ("seconds", "host_seconds"), "peak_bytes"
"""What is measured in every round, and what is counted once: it is the same at every call."""
RELAUNCH = 10
"""Rounds of one import."""
TURNS = 4
TURN_SECONDS = 0.008
CALLS = (3, 100)
"""The fewest and the most in a turn; in between a turn takes ``TURN_SECONDS``."""

Pair = tuple[float, float]
"""Of the sides before and after the change."""


@dataclass
class Row:
    """One case in one mode: of each quantity a pair per round, and of sides that fail (0: before) the reason."""

    name: str
    provider: str
    case: Case
    mode: str
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def ratios(self, quantity: str) -> list[float]:
        """After over before, what is zero counting as one."""
        return [(after or 1) / (before or 1) for before, after in self.pairs[quantity]]

    def is_open(self, limit: float) -> bool:
        """Whether another round may tell more; a bad verdict is not taken from processes of one import alone."""
        timed = [self.ratios(quantity) for quantity in TIMES if quantity in self.pairs]
        if self.failures or not timed:
            return not self.failures
        verdicts = {judge(ratios, limit) for ratios in timed}
        return None in verdicts or ("more" in verdicts and len(timed[0]) < 2 * RELAUNCH)


def compare(sides: Sequence[Side], suite: Suite, limit: float, most: int) -> list[Row]:
    """A row for every case and mode, after as many rounds as its verdict takes, but not over ``most``.

    In every round both sides are new processes. What memory a process was given makes the same code some per cent
    slower or faster for as long as it lives, so that no number of turns of one pair would tell; less so where the
    package was loaded, which changes every ``RELAUNCH`` rounds.
    """
    rows = [
        Row(name, provider, case, mode)
        for name, (provider, case) in suite.items()
        for mode in PROVIDERS[provider].modes
    ]
    for number in range(most):
        still = [row for row in rows if row.is_open(limit)]
        if not still:
            break
        if number % RELAUNCH:
            for side in sides:
                side.renew()
        elif number:
            relaunch(sides)
        print(f"round {number + 1}, of at most {most}: {len(still)} of {len(rows)} left", file=sys.stderr, flush=True)
        for row in still:
            _add_round(row, sides, number)
    return rows


def _add_round(row: Row, sides: Sequence[Side], number: int) -> None:
    """Lets the sides take turns; who begins changes from turn to turn and from round to round."""

    def ask(turn: int, *request: object) -> list[Any]:
        answers: list[Any] = [None, None]
        for side in (0, 1) if (number + turn) % 2 == 0 else (1, 0):
            try:
                answers[side] = sides[side].ask(*request)
            except Failed as error:
                row.failures[side] = str(error)
        if row.failures:
            raise Failed
        return answers

    try:
        slowest = max(ask(0, "prepare", row.provider, row.case, row.mode))
        if PEAK not in row.pairs:
            row.pairs[PEAK] = [tuple(ask(0, "peak_bytes"))]
        fewest, most = CALLS
        calls = min(max(fewest, round(TURN_SECONDS / slowest)), most)
        turns = [ask(turn, "measure", calls) for turn in range(TURNS)]
    except Failed:
        return
    samples = [[sample for turn in turns for sample in turn[side]] for side in (0, 1)]
    for quantity in samples[0][0]:
        pair = [_lower_quartile([sample[quantity] for sample in taken]) for taken in samples]
        row.pairs.setdefault(quantity, []).append(tuple(pair))


def _lower_quartile(values: Sequence[float]) -> float:
    """What a call takes that nothing disturbs, but not the luckiest one."""
    return statistics.quantiles(values, method="inclusive")[0]
