"""Trains one model after another with the steps of ``blurry_attn.lm``."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from blurry_attn.lm.checkpoint import TrainConfig
from blurry_attn.lm.data import InputError, Text, load_text
from blurry_attn.lm.parallel import Parallel
from blurry_attn.lm.train import make_optimizer, train_step

from ..sweep.command import Point, Runner, plain
from ..sweep.results import Results, Row
from ..sweep.training import EVALUATIONS, Member, Pace
from .reading import bits_by_position, by_stretch


class Reader(Runner):
    """Trains models on one text, each by itself: a result is kept as soon as it is there."""

    MEASURE = "bits"
    OPTIONS = {  # noqa: RUF012 (as in the class that this is one of)
        "text": {"type": Path, "metavar": "DIR", "help": "text to read (default: the Python library's sources)"}
    }

    def __init__(
        self, results: Results, device: torch.device, *, command: str, deadline: float, text: Path | None
    ) -> None:
        super().__init__(results, device, command=command, eager=True, deadline=deadline)
        self.text: Text = load_text(text, context=1)
        version = ".".join(platform.python_version_tuple()[:2])
        self.name = f"Python {version} library" if text is None else text.resolve().name

    def setting(self, point: Point, member: Member) -> Row:
        return point.setting(member) | {"text": self.text.digest}

    def train(self, point: Point, members: list[Member], name: str) -> Iterator[list[Row]]:
        for member in members:
            try:
                yield [self._train_one(point, member, name)]
            except InputError as error:  # a loss that is not finite ends one model, not the sweep
                print(f"{name}, rate {member.rate:g}, seed {member.seed}: {error}", flush=True)

    def _train_one(self, point: Point, member: Member, name: str) -> Row:
        task, steps, device, parallel = point.task, point.recipe.steps, self.device, Parallel("ddp")
        config = TrainConfig(None, task.context, task.batch, steps, member.rate, member.seed)
        model = point.shape.make(member.seed).to(device)
        optimizer = make_optimizer(model, config)
        held_out = self.text.validation(task.context, task.held_out)
        pace, every = Pace(steps, self.deadline), max(1, steps // EVALUATIONS)
        curve: list[tuple[int, float, float]] = []
        seconds: list[float] = []
        start = time.monotonic()
        for step in tqdm(range(1, steps + 1), desc=name, unit="step", disable=None):
            begin = time.perf_counter()
            numbers = train_step(model, optimizer, self.text, config, step - 1, device, parallel)
            seconds.append(time.perf_counter() - begin)
            if step % every == 0 or step == steps:
                bits = bits_by_position(model, *held_out, device)
                curve.append((step, round(bits.mean().item(), 5), round(numbers["bits"], 4)))
                pace.check(step)
        found: dict[str, Any] = {
            "task": f"{self.name}, {point.shape.title}",
            "bits": curve[-1][1],
            "by_position": by_stretch(bits),
            "tokens_per_second": round(task.batch * task.context / median(seconds)),
            "steps_taken": steps,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "text": self._about_text() | {"judged_bytes": held_out[1].numel()},
            "operator": point.shape.operator,
            "dtype": "bfloat16" if device.type == "cuda" else "float32",
            "seconds": round(time.monotonic() - start, 2),
            "curve": curve,
        }
        return plain(self.described(point, member) | found)

    def _about_text(self) -> Row:
        train, held_out = len(self.text.train), len(self.text.held_out)
        sizes = {"bytes": train + held_out, "train_bytes": train, "held_out_bytes": held_out}
        return {"name": self.name, **sizes, "sha256": self.text.digest}
