"""What is trained, the most telling first."""

from __future__ import annotations

from ..sweep.command import Point, Sweep
from ..sweep.model import Mixer
from .reading import Decoder, Reading, Schedule

STEPS = 1000  # more overfit texts of 8 MB
SEEDS = (0, 1)
HEADS = 8
PYRAMID = (1, 1, 2, 2, 4, 4, 8, 8)
STEEP = (1, 1, 1, 1, 4, 4, 32, 32)
UNIFORM = (8,) * HEADS


def _mixers(head_dim: int, context: int) -> tuple[list[Mixer], list[Mixer]]:
    """What answers the question, and what surrounds the answer."""

    def blurry(slots: int, resolutions: tuple[int, ...], kind: str = "fejer") -> Mixer:
        return Mixer(kind, slots, resolutions, head_dim)

    def tokens(kind: str, slots: int) -> Mixer:
        return Mixer(kind, slots, (1,) * HEADS, head_dim)

    first = [
        blurry(32, PYRAMID),
        tokens("sliding", 32),
        tokens("sliding", 64),
        tokens("sliding", 128),
        blurry(64, PYRAMID),
        tokens("full", context),
    ]
    then = [
        blurry(32, UNIFORM),
        blurry(32, STEEP, "dirichlet"),
        blurry(32, STEEP),
        tokens("sliding", 256),
        blurry(16, PYRAMID),
        tokens("sliding", 16),
        blurry(64, UNIFORM),
        blurry(64, STEEP),
    ]
    return first, then


def _main() -> Sweep:
    task = Reading()
    points = [
        Point(task, Decoder(mixer, mixer.heads * mixer.head_dim), Schedule(STEPS))
        for part in (0, 1)
        for head_dim in (64, 32)
        for mixer in _mixers(head_dim, task.context)[part]
    ]
    return Sweep("two sizes of model, 1024 bytes of context", tuple(points), (1.5e-3,), SEEDS)


def _quick() -> Sweep:
    task = Reading(context=64, batch=4, held_out=16)
    mixers = (
        Mixer("fejer", 8, (1, 4), 16),
        Mixer("sliding", 8, (1, 1), 16),
        Mixer("sliding", 16, (1, 1), 16),
        Mixer("fejer", 8, (4, 4), 16),
        Mixer("dirichlet", 8, (1, 4), 16),
        Mixer("full", 64, (1, 1), 16),
    )
    points = tuple(Point(task, Decoder(mixer, 32, layers=2), Schedule(60)) for mixer in mixers)
    return Sweep("half a minute on a CPU: does everything run?", points, (1e-2,), SEEDS)


SWEEPS = {"text": _main(), "quick": _quick()}
