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
WIDTH = 512
DOUBLE = 0.25  # the scale of scores of heads of 64, twice the usual


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


def _recipe() -> Sweep:
    """What else the main pyramid could be at the same state: 32 slots, and 512 numbers of a key over all heads."""

    def blurry(*resolutions: int, sharpness: float | None = None, scale: float | None = None) -> Mixer:
        return Mixer("fejer", 32, resolutions, WIDTH // len(resolutions), sharpness, scale)

    def sliding(heads: int = HEADS, scale: float | None = None) -> Mixer:
        return Mixer("sliding", 32, (1,) * heads, WIDTH // heads, scale=scale)

    task = Reading()
    mixers = (
        blurry(*PYRAMID),
        sliding(),
        blurry(*PYRAMID, sharpness=12.0),
        blurry(*sorted(2 * PYRAMID)),
        blurry(*PYRAMID[::2]),
        blurry(*PYRAMID, scale=DOUBLE),
        blurry(1, 1, 2, 2, 4, 4, 8, 16),
        blurry(1, 1, 1, 1, 2, 4, 8, 16),
        sliding(2 * HEADS),
        sliding(HEADS // 2),
        sliding(scale=DOUBLE),
        blurry(1, 1, 1, 2, 2, 4, 4, 8),
        blurry(1, 2, 3, 4, 5, 6, 7, 8),
        blurry(*PYRAMID, sharpness=3.0),
        blurry(1, 1, 2, 4, 4, 8, 8, 16),
        blurry(1, 1, 1, 1, 4, 4, 8, 8),
        blurry(1, 1, 2, 2, 3, 4, 6, 8),
        blurry(1, 1, 1, 1, 4, 4, 8, 8, sharpness=3.0),
        blurry(*PYRAMID, sharpness=2.0),
        blurry(*PYRAMID, sharpness=4.0),
        blurry(1, 1, 2, 4, 4, 8, 8, 16, sharpness=3.0),
        blurry(1, 1, 4, 4, 8, 8, 16, 16, sharpness=3.0),
        blurry(1, 1, 1, 1, 8, 8, 8, 8, sharpness=3.0),
        blurry(1, 1, 1, 1, 4, 4, 16, 16, sharpness=3.0),
        blurry(1, 1, 4, 4, 4, 4, 8, 8, sharpness=3.0),
        blurry(*UNIFORM, sharpness=3.0),
    )
    points = tuple(Point(task, Decoder(mixer, WIDTH), Schedule(STEPS)) for mixer in mixers)
    return Sweep("sharpness, heads, windows and scale at 32 slots", points, (1.5e-3,), SEEDS)


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


SWEEPS = {"text": _main(), "recipe": _recipe(), "quick": _quick()}
