"""The command line of a benchmark of trained mixers."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from blurry_attn.files import write_whole

from .. import command_line, now, results_in
from . import report
from .model import Mixer
from .results import Results, Row, hardware, versions
from .task import Task
from .training import CaptureFailed, Course, Member, OutOfTime, Trainer, train


class Mixing(Protocol):
    """The shape of a model, a dataclass: what else it holds is the runner's concern."""

    mixer: Mixer


class Stepping(Protocol):
    """How to train, a dataclass likewise."""

    steps: int


@dataclass(frozen=True)
class Point:
    """A task, a shape and a recipe, for all learning rates and seeds of its sweep; a stack of models, usually."""

    task: Task
    shape: Mixing
    recipe: Stepping
    note: str = ""

    @property
    def family(self) -> str:
        """What it is but for its slots; ``note`` says how it departs from the rest of its sweep."""
        return ", ".join(filter(None, (self.shape.mixer.family, self.note)))

    def setting(self, member: Member) -> Row:
        """All that decides how a model comes out, but for the device and the versions."""
        task = {"kind": type(self.task).__name__, **asdict(self.task)}  # type: ignore[call-overload]
        return plain({"task": task, "shape": asdict(self.shape), "recipe": asdict(self.recipe), **asdict(member)})


@dataclass(frozen=True)
class Sweep:
    """Points in the order in which they are trained, the most telling first."""

    about: str
    points: tuple[Point, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


class Runner:
    """Trains points on a device and keeps their results.

    ``MEASURE`` is what a model is judged by, ``OPTIONS`` are options of its own on the command line.
    """

    MEASURE = "accuracy"
    OPTIONS: Mapping[str, Mapping[str, Any]] = {"eager": {"action": "store_true", "help": "no CUDA graphs"}}

    def __init__(self, results: Results, device: torch.device, *, command: str, eager: bool, deadline: float) -> None:
        self.results, self.device, self.command, self.deadline = results, device, command, deadline
        self.capture = device.type == "cuda" and not eager
        self.datas: dict[Task, Any] = {}

    def run(self, sweep: Sweep) -> None:
        """Trains what is not there yet, until it is done or the time is up."""
        members = [Member(rate, seed) for rate in sweep.rates for seed in sweep.seeds]
        for number, point in enumerate(sweep.points, 1):
            missing = [member for member in members if self.setting(point, member) not in self.results]
            name = f"{number}/{len(sweep.points)} {point.family}, {point.shape.mixer.slots} slots"
            if not missing:
                print(f"{name}: already there", flush=True)
            elif reason := self.lacking(point):
                print(f"{name}: skipped, {reason}", flush=True)
            else:
                try:
                    for rows in self.train(point, missing, name):
                        self.results.add(rows)
                        found = ", ".join(f"{row[self.MEASURE]:.4f}" for row in rows)
                        print(f"{name}: {found}; {sum(row['seconds'] for row in rows):.0f} s", flush=True)
                except OutOfTime:
                    print(f"{name}: not done, the time is up", flush=True)
                    return

    def setting(self, point: Point, member: Member) -> Row:
        """What a result is known by."""
        return point.setting(member)

    def lacking(self, point: Point) -> str | None:
        """Why a point cannot be trained here."""
        if point.shape.mixer.kind == "gsa":
            try:
                importlib.import_module("fla.ops.gsa")
            except ImportError as error:
                return f"flash-linear-attention cannot be imported: {error}"
        return None

    def train(self, point: Point, members: list[Member], name: str) -> Iterator[list[Row]]:
        """Rows of models that were trained together, as they come."""
        if point.task not in self.datas:
            self.datas = {point.task: point.task.data(self.device)}
        start = time.monotonic()
        try:
            trainer = self._trainer(point, members)
            courses = train(trainer, title=name, deadline=self.deadline)
        except CaptureFailed as failure:
            print(f"{name}: runs without CUDA graphs, as a capture failed: {failure}", flush=True)
            self.capture = False
            trainer = self._trainer(point, members)
            courses = train(trainer, title=name, deadline=self.deadline)
        seconds = time.monotonic() - start
        rows = [
            self._row(point, member, course, trainer, seconds) for member, course in zip(members, courses, strict=True)
        ]
        del trainer
        gc.collect()  # a graph and its memory hang in a cycle
        yield rows

    def _trainer(self, point: Point, members: list[Member]) -> Trainer:
        data = self.datas[point.task]
        return Trainer(data, point.shape, point.recipe, members, self.device, capture=self.capture)

    def described(self, point: Point, member: Member) -> Row:
        """What a row says but for how the training went."""
        mixer = point.shape.mixer
        return {
            "task": point.task.title,
            "family": point.family,
            "slots": mixer.slots,
            "heads": mixer.heads,
            "state_elements": mixer.state_elements,
            "state_bytes": {"float32": 4 * mixer.state_elements, "bfloat16": 2 * mixer.state_elements},
            "setting": self.setting(point, member),
            "optimizer": "AdamW",
            "hardware": hardware(self.device),
            "versions": versions(),
            "command": self.command,
            "date": now(),
        }

    def _row(self, point: Point, member: Member, course: Course, trainer: Trainer, seconds: float) -> Row:
        best = max(course.curve, key=lambda at: at[1])
        return plain(
            self.described(point, member)
            | {
                "accuracy": course.curve[-1][1],
                "best": {"accuracy": best[1], "step": best[0]},
                "steps_taken": course.curve[-1][0],
                "parameters": trainer.stack.parameters_of_each,
                "operator": point.shape.mixer.operator,
                "dtype": str(trainer.stack.dtype).removeprefix("torch."),
                "stack_seconds": round(seconds, 2),
                "stack_models": len(trainer.optimizer.rates),
                "seconds": round(seconds / len(trainer.optimizer.rates), 2),
                "curve": course.curve,
            }
        )


def main(
    name: str,
    about: str | None,
    sweeps: Mapping[str, Sweep],
    folder: Path,
    arguments: Sequence[str] | None,
    runner: type[Runner] = Runner,
    report: Any = report,
) -> int:
    """Runs ``python -m benchmarks.NAME``; returns the exit status. ``report`` has ``table`` and ``plot`` of rows."""
    listed = "\n".join(f"  {key}: {sweep.about}" for key, sweep in sweeps.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        epilog=f"sweeps:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweep", choices=list(sweeps), default="quick")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop in time; what is done is kept")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='only points with this in their name, e.g. "sliding"'
    )
    parser.add_argument("--slots", type=_numbers(int), metavar="N,..", help="only these numbers of slots")
    parser.add_argument("--rates", type=_numbers(float), metavar="X,..", help="learning rates instead of the sweep's")
    parser.add_argument("--seeds", type=_numbers(int), metavar="N,..", help="seeds instead of the sweep's")
    parser.add_argument("--steps", type=int, metavar="N", help="steps instead of the sweep's: other settings")
    for option, what in runner.OPTIONS.items():
        parser.add_argument(f"--{option}", **what)
    parser.add_argument("--plot", action="store_true", help="train nothing: table and plot of what is there")
    parser.add_argument("--out", type=Path, default=folder, help="for results and plot (default: beside the code)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available() and not args.plot:
        parser.error(f"--device {device}: no CUDA device is available")
    sweep = sweeps[args.sweep]
    chosen = tuple(
        point if args.steps is None else replace(point, recipe=replace(point.recipe, steps=args.steps))
        for point in sweep.points
        if args.only in point.family and (args.slots is None or point.shape.mixer.slots in args.slots)
    )
    if not chosen:
        parser.error(f"no point of {args.sweep} has {args.only!r} in its name and these slots")
    sweep = Sweep(sweep.about, chosen, args.rates or sweep.rates, args.seeds or sweep.seeds)
    file = args.out / f"{device.type}.jsonl"
    picture = file.with_suffix(".png")
    with results_in(args.out, *(() if args.plot else (file.name,)), picture.name, parser=parser):
        results = Results(file)
        if not args.plot:
            command = command_line(name, given)
            deadline = time.monotonic() + args.seconds
            options = {option: getattr(args, option) for option in runner.OPTIONS}
            runner(results, device, command=command, deadline=deadline, **options).run(sweep)
        if not results.rows:
            print("no results yet")
            return 0
        try:
            write_whole(picture, report.plot(results.rows).savefig)
            written = f"{file} and {picture}"
        except ModuleNotFoundError as error:
            written = f"{file}; no plot: {error}"
    print(f"\n{report.table(results.rows)}\n\n{written}")
    return 0


def _numbers(kind: type) -> Any:
    return lambda text: tuple(kind(entry) for entry in text.split(","))


def plain(value: Row) -> Row:
    """As it comes back from JSON."""
    row: Row = json.loads(json.dumps(value))
    return row
