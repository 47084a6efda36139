"""Trains a stack: one optimizer with a learning rate per model, every step a replay of one CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from .model import Shape, Stack
from .task import Batch, Data

EAGER_RUNS = 3  # of a function before its capture
DATA_SEED = 1
EVALUATIONS = 20


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW with a linear warm-up, then a cosine down to 0.

    Args:
        steps: at most.
        warm_up: share of the steps.
        decay: of weights, AdamW's.
        clip: largest norm of a model's gradient.
        betas: of Adam.
        enough: accuracy at which a stack stops if all its models have it.
    """

    steps: int
    warm_up: float = 0.05
    decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    enough: float = 0.995


@dataclass(frozen=True)
class Member:
    """What tells the models of a stack apart."""

    rate: float
    seed: int


@dataclass
class Course:
    """How the training of one model went: (step, accuracy, training loss) at every evaluation."""

    curve: list[tuple[int, float, float]] = field(default_factory=list)


class OutOfTime(Exception):
    """A stack would not end before the time is up."""


class CaptureFailed(Exception):
    """A training step could not be captured as a CUDA graph."""


@dataclass
class Pace:
    """Whether so many steps end before a deadline of ``time.monotonic``."""

    steps: int
    deadline: float
    first: tuple[int, float] | None = None

    def check(self, step: int) -> None:
        """Called at a few of the steps.

        Raises:
            OutOfTime: at the pace since the first call they do not end in time.
        """
        now = time.monotonic()
        if self.first is None:  # the time up to here is no measure: kernels are loaded, graphs captured
            self.first = step, now
        elif now + (now - self.first[1]) * (self.steps - step) / (step - self.first[0]) > self.deadline:
            raise OutOfTime


class Adam:
    """AdamW over stacked weights (M, ...), with one learning rate and one gradient norm per model.

    All that changes from step to step lies in tensors on the device, so a CUDA graph of a step stays true.
    """

    EPS = 1e-8

    def __init__(self, weights: list[Tensor], rates: list[float], recipe: Recipe) -> None:
        self.weights, self.recipe = weights, recipe
        self.rates = torch.tensor(rates, device=weights[0].device)
        self.taken = torch.zeros((), device=weights[0].device)
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]

    def schedule(self) -> Tensor:
        """The factor of the learning rates in the step after ``taken``, a number in 0 .. 1."""
        warm_up = max(1.0, self.recipe.warm_up * self.recipe.steps)
        done = ((self.taken + 1 - warm_up) / max(1.0, self.recipe.steps - warm_up)).clamp(0, 1)
        return ((self.taken + 1) / warm_up).clamp(max=1) * (1 + torch.cos(torch.pi * done)) / 2

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        rates = self.rates * self.schedule()
        self.taken += 1
        beta1, beta2 = self.recipe.betas
        correction1, correction2 = 1 - beta1**self.taken, (1 - beta2**self.taken).sqrt()
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        clip = (self.recipe.clip / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1)
        for weight, gradient, first, second in zip(self.weights, gradients, self.first, self.second, strict=True):
            per_model = (-1, *[1] * (weight.dim() - 1))
            gradient = gradient * clip.view(per_model)
            first.lerp_(gradient, 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = second.sqrt().div_(correction2).add_(self.EPS)
            if self.recipe.decay:
                weight.mul_(1 - (rates * self.recipe.decay).view(per_model))
            weight.addcdiv_(first * (-rates / correction1).view(per_model), scale)


class Replay:
    """A function without arguments that runs again and again: after a few runs on a side stream, as a CUDA graph.

    Its result must be a tensor, and random numbers must come from ``generator``.
    """

    def __init__(self, function: Callable[[], Tensor], generator: torch.Generator) -> None:
        self.function, self.generator = function, generator
        self.runs = 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        if self.graph is None:
            if self.runs < EAGER_RUNS:
                return self._run()
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _run(self) -> Tensor:
        self.runs += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, stream=self.stream):
                self.result = self.function()
        except RuntimeError as error:
            raise CaptureFailed(str(error).strip().splitlines()[0]) from error
        self.graph = graph


class Trainer:
    """A stack in training on a task.

    Args:
        data: of the task that is learned.
        shape: of each model.
        recipe: of the training.
        members: learning rate and seed of each model; all see the same data.
        device: where.
        capture: whether steps become CUDA graphs; then activations are bfloat16, as on any CUDA device.
    """

    def __init__(
        self,
        data: Data,
        shape: Shape,
        recipe: Recipe,
        members: list[Member],
        device: torch.device,
        *,
        capture: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.data, self.recipe, self.capture = data, recipe, capture
        self.stack = Stack(shape, data.vocabulary, [member.seed for member in members], device, dtype)
        self.weights = list(self.stack.weights.values())
        self.optimizer = Adam([weight.detach() for weight in self.weights], [m.rate for m in members], recipe)
        self.generator = torch.Generator(device).manual_seed(DATA_SEED)
        self.replays: dict[int, Callable[[], Tensor]] = {}
        self.taken = 0

    def step(self) -> Tensor:
        """One step on the next batch; the loss (M,) before it, which the step after next may overwrite."""
        variant = self.data.variant(self.taken, self.recipe.steps)
        if variant not in self.replays:
            self.replays[variant] = self._make_step(variant)
        self.taken += 1
        return self.replays[variant]()

    def accuracy(self) -> list[float]:
        """Share of right answers of each model in the held-out batches."""
        right, count = [], []
        for batch in self.data.held_out():
            prediction = self.stack.predict(batch.tokens, batch.positions)
            right.append((judge(prediction, batch) * batch.weights.double()).sum(-1))
            count.append(batch.weights.double().sum())
        shares: list[float] = (torch.stack(right).sum(0) / torch.stack(count).sum()).tolist()
        return shares

    def _make_step(self, variant: int) -> Callable[[], Tensor]:
        def step() -> Tensor:
            batch = self.data.draw(variant, self.generator)
            loss = self.stack.loss(batch.tokens, batch.positions, batch.answers, batch.weights)
            self.optimizer.step(list(torch.autograd.grad(loss.sum(), self.weights)))
            return loss.detach()

        return Replay(step, self.generator) if self.capture else step


def judge(prediction: Tensor, batch: Batch) -> Tensor:
    """Whether each of prediction (M, P) is right: (M, P) bool."""
    if batch.allowed is None:
        return prediction == batch.answers
    return batch.allowed.gather(1, prediction.T).T


def train(trainer: Trainer, *, title: str, deadline: float = float("inf")) -> list[Course]:
    """Trains to the end, or until all models are good enough; one course per model.

    Raises:
        OutOfTime: at its own pace it would not end before ``deadline`` (of ``time.monotonic``).
        CaptureFailed: a step could not be captured.
    """
    recipe = trainer.recipe
    courses = [Course() for _ in trainer.optimizer.rates]
    every = max(1, recipe.steps // EVALUATIONS)
    pace = Pace(recipe.steps, deadline)
    with tqdm(total=recipe.steps, desc=title, unit="step", disable=None) as bar:
        for step in range(1, recipe.steps + 1):
            loss = trainer.step()
            if step % every and step < recipe.steps:
                continue
            accuracy = trainer.accuracy()
            for course, *point in zip(courses, accuracy, loss.tolist(), strict=True):
                course.curve.append((step, round(point[0], 5), round(point[1], 4)))
            bar.update(step - bar.n)
            bar.set_postfix(accuracy=f"{min(accuracy):.3f} .. {max(accuracy):.3f}")
            if min(accuracy) >= recipe.enough:
                break
            pace.check(step)
    return courses
