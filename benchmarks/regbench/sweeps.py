"""What is trained, the most telling first."""

from __future__ import annotations

from ..sweep.command import Point, Sweep
from ..sweep.model import Mixer, Shape
from ..sweep.training import Recipe
from .automata import LONGEST
from .task import Languages

STEPS = 8_000  # about 50 epochs
PUBLISHED_STEPS = 31_250  # 200 epochs


def blurry(slots: int, *resolutions: int) -> Mixer:
    return Mixer("fejer", slots, resolutions)


def sliding(slots: int) -> Mixer:
    return Mixer("sliding", slots)


FULL = Mixer("full", LONGEST)


def _points(*mixers: Mixer, steps: int, note: str = "") -> tuple[Point, ...]:
    recipe = Recipe(steps, warm_up=0.1, decay=0.1, enough=1.0)
    return tuple(Point(Languages(), Shape(mixer, layers=4, mlp=4), recipe, note) for mixer in mixers)


def _main() -> Sweep:
    mixers = (
        blurry(32, 1, 1, 8, 8),
        sliding(32),
        FULL,
        blurry(64, 1, 1, 8, 8),
        sliding(64),
        blurry(16, 1, 1, 8, 8),
        sliding(16),
        blurry(32, 8, 8, 8, 8),
        sliding(128),
        blurry(32, 1, 1, 16, 16),
        blurry(64, 8, 8, 8, 8),
        blurry(16, 8, 8, 8, 8),
        sliding(256),
        blurry(64, 1, 1, 16, 16),
        blurry(32, 2, 2, 8, 8),
    )
    return Sweep("automata, 50 epochs", _points(*mixers, steps=STEPS), (1e-3, 2e-3))


def _published() -> Sweep:
    mixers = blurry(32, 1, 1, 8, 8), sliding(32), FULL
    return Sweep("automata, 200 epochs", _points(*mixers, steps=PUBLISHED_STEPS, note="200 epochs"), (5e-4,))


def _quick() -> Sweep:
    task = Languages(train=64, held_out=16, batch=4)
    recipe = Recipe(steps=20, warm_up=0.1, decay=0.1, enough=1.0)
    mixers = Mixer("fejer", 8, (1, 8), 8), Mixer("sliding", 8, (1, 1), 8), Mixer("full", LONGEST, (1, 1), 8)
    points = tuple(Point(task, Shape(mixer, width=16, mlp=2), recipe) for mixer in mixers)
    return Sweep("a minute on a CPU: does everything run?", points, (1e-2,), (0, 1))


SWEEPS = {"regbench": _main(), "published": _published(), "quick": _quick()}
