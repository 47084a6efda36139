"""What is trained, the most telling first."""

from __future__ import annotations

from ..sweep.command import Point, Sweep
from ..sweep.model import Mixer, Shape
from ..sweep.training import Recipe
from .recall import Recall

STEPS = 10_700
RATES = (2e-3, 4e-3, 6e-3)
MIXED = (8, 8, 8, 8, 16, 16, 16, 16)
DOUBLE = 0.35  # the scale of scores of heads of 32, twice the usual


def fejer(
    slots: int, *resolutions: int, head_dim: int = 32, sharpness: float | None = None, scale: float | None = None
) -> Mixer:
    return Mixer("fejer", slots, resolutions, head_dim, sharpness, scale)


def sliding(slots: int, heads: int = 4, head_dim: int = 32, scale: float | None = None) -> Mixer:
    return Mixer("sliding", slots, (1,) * heads, head_dim, scale=scale)


def same(heads: int, resolution: int) -> tuple[int, ...]:
    return (resolution,) * heads


def _points(task: Recall, *mixers: Mixer, recipe: Recipe, note: str = "", layers: int = 2) -> tuple[Point, ...]:
    return tuple(Point(task, Shape(mixer, layers=layers), recipe, note) for mixer in mixers)


def _main() -> Sweep:
    mixers = (
        fejer(32, *same(4, 8)),
        sliding(128),
        sliding(256),
        fejer(16, *same(4, 16)),
        sliding(64),
        sliding(32),
        fejer(24, *same(4, 11)),
        fejer(24, *same(4, 8)),
        Mixer("full", 256),
        fejer(64, *same(4, 4)),
        fejer(32, 4, 4, 8, 8),
        fejer(32, *same(4, 4)),
        fejer(16, *same(4, 8)),
        fejer(32, *same(4, 16)),
        sliding(16),
        Mixer("dirichlet", 32, same(4, 8)),
        sliding(8),
        fejer(8, *same(4, 32)),
        fejer(8, *same(4, 8)),
        fejer(128, *same(4, 2)),
        fejer(28, *same(4, 9)),
        sliding(192),
    )
    return Sweep("32 pairs in 256 tokens", _points(Recall(), *mixers, recipe=Recipe(STEPS)), RATES)


def _long() -> Sweep:
    mixers = (
        fejer(64, *same(4, 8)),
        sliding(256),
        sliding(512),
        fejer(32, *same(4, 16)),
        sliding(128),
        sliding(64),
        Mixer("full", 512),
        sliding(32),
    )
    points = _points(Recall(length=512, pairs=64, batch=32), *mixers, recipe=Recipe(STEPS))
    return Sweep("64 pairs in 512 tokens", points, RATES)


def _moonshot() -> Sweep:
    task, recipe, long_warm_up = Recall(), Recipe(STEPS), Recipe(STEPS, warm_up=0.2)
    curriculum = Recall(curriculum=(4, 8, 16))
    points = (
        *_points(task, fejer(16, *same(8, 16)), recipe=recipe),
        *_points(curriculum, fejer(16, *same(8, 16)), recipe=long_warm_up, note="curriculum"),
        *_points(task, fejer(16, *MIXED), recipe=recipe),
        *_points(
            task,
            fejer(16, *MIXED),
            fejer(20, *MIXED),
            sliding(256, heads=8),
            sliding(128, heads=8),
            fejer(16, 4, 6, 8, 10, 12, 14, 16, 16),
            fejer(24, *MIXED),
            sliding(64, heads=8),
            recipe=long_warm_up,
            note="long warm-up",
        ),
        *_points(
            task,
            fejer(16, *MIXED),
            fejer(16, *same(8, 12)),
            sliding(128, heads=8),
            sliding(64, heads=8),
            fejer(16, *same(6, 8), *same(6, 16)),
            fejer(14, *same(8, 12)),
            fejer(14, *same(8, 14)),
            sliding(96, heads=8),
            recipe=Recipe(3 * STEPS, warm_up=0.2),
            note="long warm-up, 3 times the steps",
        ),
        *_points(
            task,
            fejer(16, *same(8, 12), sharpness=12.0, scale=DOUBLE),
            sliding(96, heads=8, scale=DOUBLE),
            sliding(128, heads=8, scale=DOUBLE),
            fejer(14, *same(8, 14), sharpness=12.0, scale=DOUBLE),
            fejer(12, *same(8, 16), sharpness=12.0, scale=DOUBLE),
            fejer(16, *same(8, 12), scale=DOUBLE),
            recipe=long_warm_up,
            note="long warm-up",
        ),
        *_points(
            task,
            fejer(16, *same(4, 8), *same(4, 12)),
            fejer(16, *same(8, 8)),
            fejer(16, *same(6, 8), *same(2, 16)),
            fejer(16, *same(8, 8), *same(8, 16)),
            fejer(16, *MIXED, head_dim=64),
            sliding(128, heads=8, head_dim=64),
            fejer(16, 8, 8, 16, 16, head_dim=64),
            sliding(128, head_dim=64),
            fejer(12, *MIXED, head_dim=64),
            sliding(64, heads=8, head_dim=64),
            fejer(16, *same(8, 12)),
            fejer(16, 4, 4, 8, 8, 8, 8, 16, 16),
            fejer(16, *same(6, 8), *same(6, 16)),
            fejer(16, *same(4, 8), *same(4, 10)),
            recipe=long_warm_up,
            note="long warm-up",
        ),
        *_points(task, fejer(16, *same(16, 16)), recipe=recipe),
        *_points(task, sliding(128, heads=8), sliding(64, heads=8), recipe=recipe),
        *_points(task, fejer(16, *same(8, 16)), recipe=long_warm_up, note="long warm-up"),
        *_points(task, fejer(16, *same(8, 16), sharpness=12.0), recipe=recipe),
        *_points(task, fejer(16, *same(8, 12)), recipe=recipe),
        *_points(task, fejer(16, *same(4, 16), head_dim=64), recipe=recipe),
        *_points(task, fejer(16, *same(8, 16)), recipe=Recipe(3 * STEPS), note="3 times the steps"),
        *_points(task, fejer(16, *same(8, 16)), recipe=recipe, note="3 layers", layers=3),
        *_points(task, sliding(256, heads=8), sliding(16, heads=8), recipe=recipe),
    )
    return Sweep("16 slots for 32 pairs in 256 tokens: what helps", points, RATES)


def _quick() -> Sweep:
    task = Recall(length=32, pairs=8, vocabulary=64, batch=64, held_out=256)
    mixers = (
        fejer(8, *same(4, 4), head_dim=16),
        *(Mixer("sliding", slots, same(4, 1), 16) for slots in (8, 16, 32)),
    )
    points = tuple(Point(task, Shape(mixer, width=64), Recipe(steps=600)) for mixer in mixers)
    return Sweep("a minute on a CPU: 8 pairs in 32 tokens", points, (6e-3,), (0,))


def _gated() -> Sweep:
    mixers = Mixer("gsa", 32), Mixer("gsa", 64), Mixer("gsa", 16)
    points = _points(Recall(), *mixers, recipe=Recipe(STEPS))
    return Sweep("gated slot attention of flash-linear-attention, 32 pairs in 256 tokens", points, RATES)


SWEEPS = {"mqar": _main(), "mqar-long": _long(), "moonshot": _moonshot(), "gsa": _gated(), "quick": _quick()}
