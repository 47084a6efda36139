"""What the ratios of a case's rounds, after over before, say about a limit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

DOUBT = 0.05
"""How often the median that was meant may lie outside of its bounds."""


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the median of what ``values`` were drawn from, whatever its distribution is (those of the sign test).

    Fewer than six values have none.
    """
    ordered, n = sorted(values), len(values)
    rank, outside = 0, 0.0
    while (more := outside + math.comb(n, rank) / 2**n) <= DOUBT / 2:
        rank, outside = rank + 1, more
    return (ordered[rank - 1], ordered[n - rank]) if rank else (-math.inf, math.inf)


def judge(ratios: Sequence[float], limit: float) -> str | None:
    """``"more"`` or ``"less"`` by over ``limit``, or ``"same"``; None: further rounds have to tell."""
    low, high = median_interval(ratios)
    if low > 1 + limit:
        return "more"
    if high > 1 + limit:
        return None
    return "less" if high < 1 - limit else "same"


def final(ratios: Sequence[float], limit: float) -> str:
    """The same where no more rounds come: then what is slower for sure, and by the median over the limit, is "more".

    ``"unsure"`` where the median alone says so.
    """
    verdict = judge(ratios, limit)
    if verdict is not None:
        return verdict
    if statistics.median(ratios) <= 1 + limit:
        return "same"
    return "more" if median_interval(ratios)[0] > 1 else "unsure"


def exact(ratio: float, limit: float) -> str:
    """The verdict on what is the same in every round."""
    return "more" if ratio > 1 + limit else "less" if ratio < 1 - limit else "same"
