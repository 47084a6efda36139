"""What is measured, and how."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from blurry_attn import BlurryWindow, blurry_window_attention
from blurry_attn.lm.checkpoint import TrainConfig
from blurry_attn.lm.data import VOCABULARY, Text
from blurry_attn.lm.model import LanguageModel, ModelConfig
from blurry_attn.lm.parallel import Parallel
from blurry_attn.lm.train import make_optimizer, train_step

from .. import described
from ..speed.cases import Attend, Case, Claim
from ..speed.providers import PROVIDERS, Provider

RESOLUTIONS = (1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8)
MODE = "training step"
WARM_UP = 3
LEARNING_RATE = 1e-4

Row = dict[str, Any]
Step = Callable[[int], object]
"""A training step by its number."""


@dataclass(frozen=True)
class Setup:
    """A model of so many layers, with one head per entry of ``RESOLUTIONS``, and how many of its steps are timed."""

    case: Case
    layers: int
    steps: int
    compiled: bool = False

    @property
    def model(self) -> ModelConfig:
        case = self.case
        return ModelConfig("blurry", case.heads * case.head_dim, self.layers, case.slots, RESOLUTIONS)

    @property
    def claims(self) -> tuple[Claim, ...]:
        """A ratio of tokens per second is that of the times, the other way round."""
        blurry = ("blurry", self.case)
        return (
            Claim("tokens/s, blurry / full (flash)", ("flash", self.case), {MODE: (1.5, None)}, over=blurry),
            Claim("tokens/s, blurry / sliding window of 64", ("flex64", self.case), {MODE: (None, 1.0)}, over=blurry),
        )


_case = partial(Case, heads=len(RESOLUTIONS))
WHOLE = Setup(_case(length=8192, batch=4), layers=14, steps=30)
QUICK = Setup(_case(length=128, batch=2, head_dim=8), layers=1, steps=3)


def pyramid(case: Case) -> Attend:
    return cast(Attend, partial(blurry_window_attention, window=BlurryWindow.pyramid(case.slots, RESOLUTIONS)))


MIXERS = (
    Provider("blurry", "blurry window, {slots} slots, r = 1, 2, 4, 8", pyramid),
    *(PROVIDERS[name] for name in ("fejer", "flash", "cudnn", "flex64")),
)
CUDA_ALONE = ("cudnn", "flex64")


class Mixed(nn.Module):
    """A language model with ``attend`` for its attention; all else, parameters too, is the model's own."""

    def __init__(self, model: LanguageModel, attend: Attend) -> None:
        super().__init__()
        self.model, self.attend = model, attend

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)

        def mix(mixer: Any, x: Tensor) -> Tensor:
            return mixer._merge(self.attend(*mixer._project(x, positions)))

        return self.model._run(tokens, mix)


def trainer(setup: Setup, device: torch.device) -> Callable[[Provider], Step]:
    """A function from a mixer to a training step with it. All train one model, on the same random bytes."""
    case = setup.case
    config = TrainConfig(
        context=case.length, batch=case.batch, steps=WARM_UP + setup.steps, learning_rate=LEARNING_RATE
    )
    torch.manual_seed(0)
    text = Text(torch.randint(VOCABULARY, (64 * case.length,), dtype=torch.uint8), torch.empty(0), "random bytes")
    model = LanguageModel(setup.model).to(device)
    optimizer = make_optimizer(model, config)

    def step_with(mixer: Provider) -> Step:
        mixed: Any = Mixed(model, mixer.prepare(case))
        if setup.compiled:
            mixed = torch.compile(mixed, fullgraph=True)
        return lambda number: train_step(mixed, optimizer, text, config, number, device, Parallel("ddp"))

    return step_with


def timed(step: Step, number: int, device: torch.device) -> tuple[float, int]:
    """Seconds of a step, and the most bytes that PyTorch held on a GPU during it."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step(number)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() if on_gpu else 0


def measure(setup: Setup, device: torch.device) -> list[Row]:
    """A row per mixer: how long its steps take, or why it has none. They take turns, so that a slow moment of the
    machine falls on all alike."""
    case, step_with = setup.case, trainer(setup, device)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for mixer in MIXERS:
        row: Row = {"provider": mixer.name, "label": mixer.label.format(**asdict(case))}
        rows[mixer.name] = row | {"mode": MODE, "case": asdict(case)}
        if device.type == "cpu" and mixer.name in CUDA_ALONE:
            rows[mixer.name]["skipped"] = "runs on CUDA alone"
            continue
        print(f"{row['label']}: warm-up", file=sys.stderr, flush=True)
        try:
            step = step_with(mixer)
            for number in range(WARM_UP):
                step(number)
            steps[mixer.name] = step
        except Exception as error:
            rows[mixer.name]["failed"] = described(error)
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in steps}
    for number in range(setup.steps):
        print(f"step {number + 1} of {setup.steps}", file=sys.stderr, flush=True)
        for name, step in steps.items():
            samples[name].append(timed(step, WARM_UP + number, device))
    for name, taken in samples.items():
        seconds, peaks = zip(*taken, strict=True)
        row = rows[name]
        row |= {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}
        row |= {"steps": len(seconds), "tokens_per_second": case.tokens / row["seconds"]}
        if device.type == "cuda":
            row["peak_bytes"] = max(peaks)
    if "flash" in steps:
        for name in steps:
            rows[name]["times_full"] = rows["flash"]["seconds"] / rows[name]["seconds"]
    return list(rows.values())
