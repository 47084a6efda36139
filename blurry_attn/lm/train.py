"""Training: one run is one folder with a checkpoint, its numbers and its plot."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from . import checkpoint
from .checkpoint import TrainConfig, write_whole
from .data import InputError, Text, load_text, ngram_bits
from .model import LanguageModel, ModelConfig
from .parallel import Parallel, anywhere, mean, rank

METRICS, PLOT = "metrics.jsonl", "loss.png"
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
WARM_UP, FINAL = 0.1, 0.02  # shares of the steps and of the peak learning rate
VALIDATIONS = 8  # per run
VALIDATION_BATCH = 32


class Interrupted(Exception):
    """Ctrl-C was pressed; the run is saved at the step that the message names."""


@dataclass(frozen=True)
class Result:
    """What a run came to, in bits per byte on the held-out text; its speed is that of the median step."""

    bits: float
    unigram: float
    bigram: float
    parameters: int
    tokens_per_second: float
    folder: Path


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    folder: Path,
    device: torch.device,
    strategy: str = "ddp",
) -> Result:
    """Trains in ``folder``, going on from the checkpoint there if there is one, to the very same losses.

    A collective call of all processes of the default group, if there is one, which divide the work by ``strategy``
    (:class:`blurry_attn.lm.parallel.Parallel`): each reads ``folder``, the first writes.

    Raises:
        InputError: text that cannot be used, or a checkpoint of another configuration, text or program.
        Interrupted: after Ctrl-C, once the run is saved.
    """
    parallel = Parallel(strategy)
    text = load_text(None if train_config.text is None else Path(train_config.text), train_config.context)
    torch.manual_seed(train_config.seed)
    model = LanguageModel(model_config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    divided = parallel.divide(model)
    optimizer = make_optimizer(model, train_config)
    start = 0
    if (folder / checkpoint.FILE).exists():
        saved = checkpoint.load(folder)
        if (saved.model_config, saved.train_config) != (model_config, train_config):
            raise InputError(f"{folder}: holds a run of another configuration; choose another folder")
        if saved.digest != text.digest:
            raise InputError(f"{folder}: not the text that this run was started on, so it cannot be continued")
        saved.restore(model, optimizer)
        start = saved.step

    inputs, targets = text.validation(train_config.context)
    unigram, bigram = ngram_bits(text.train, inputs, targets)
    print(
        f"{model_config.mixer}: {parameters:,} parameters; {len(text.train):,} bytes to train on, "
        f"{targets.numel():,} of {len(text.held_out):,} held-out bytes to validate on; {device}\n"
        f"bits per byte to beat: unigram {unigram:.3f}, bigram {bigram:.3f}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    log = _kept_metrics(folder / METRICS, start)
    bits = next((line["validation_bits"] for line in reversed(log) if "validation_bits" in line), math.nan)

    tokens = train_config.batch * train_config.context  # per step
    total = train_config.steps * tokens
    done = start
    with (
        _interrupts() as interrupted,
        (Path(os.devnull) if rank() else folder / METRICS).open("a") as metrics,
        tqdm(
            total=total, initial=start * tokens, unit="tok", unit_scale=True, smoothing=0.05, disable=rank() > 0
        ) as bar,
    ):
        for step in range(start, train_config.steps):
            begin = time.perf_counter()
            numbers = train_step(divided, optimizer, text, train_config, step, device, parallel)
            line: dict[str, Any] = {"step": step + 1, **numbers}
            line["seconds"] = time.perf_counter() - begin
            done = step + 1
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['bits']:.3f} bits/byte", refresh=False)
            bar.update(tokens)
            last = done == train_config.steps
            if last or done * VALIDATIONS // train_config.steps > step * VALIDATIONS // train_config.steps:
                line["validation_bits"] = bits = validate(divided, inputs, targets, device, parallel)
                bar.write(
                    f"step {done}: held-out bits per byte {bits:.3f} (unigram {unigram:.3f}, bigram {bigram:.3f})"
                )
            log.append(line)
            metrics.write(json.dumps(line) + "\n")
            stop = anywhere(interrupted.is_set())
            if "validation_bits" in line or stop:
                metrics.flush()
                checkpoint.save(folder, model, optimizer, train_config, text.digest, done)
            if stop and not last:
                break
    write_whole(folder / PLOT, lambda path: _plot(path, log, unigram, bigram, model_config.mixer))
    if done < train_config.steps:
        raise Interrupted(f"stopped and saved at step {done} of {train_config.steps}")
    seconds = median(line["seconds"] for line in log) if log else math.nan
    return Result(bits, unigram, bigram, parameters, tokens / seconds, folder)


@torch.no_grad()
def validate(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device, parallel: Parallel) -> float:
    """Bits per byte of ``targets``."""
    total = 0.0
    for x, y in zip(inputs.split(VALIDATION_BATCH), targets.split(VALIDATION_BATCH), strict=True):
        total += mean(_loss(model, x, y, device, parallel)).item() * y.numel()
    return total / targets.numel() / math.log(2)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to a small share of it."""
    warm_up = max(1, round(WARM_UP * config.steps))
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, config.steps - warm_up)
    return config.learning_rate * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """For :func:`train_step`, which sets the learning rate of each step."""
    return torch.optim.AdamW(_groups(model), lr=config.learning_rate, betas=BETAS, fused=True)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by decay, which is that of weights alone; and DTensors apart, as no fused call takes both kinds."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((parameter.ndim == 2, isinstance(parameter, DTensor)), []).append(parameter)
    return [
        {"params": group, "weight_decay": WEIGHT_DECAY if is_weight else 0.0}
        for (is_weight, _), group in groups.items()
    ]


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device, parallel: Parallel) -> Tensor:
    """The mean cross-entropy of a batch, as the mean over processes of what each makes of its part."""
    x, y = parallel.part(inputs).to(device), parallel.part(targets).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(x)
    total = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
    return total * parallel.parts / targets.numel()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Text,
    config: TrainConfig,
    step: int,
    device: torch.device,
    parallel: Parallel,
) -> dict[str, float]:
    """One step on the batch of the number ``step``: its loss before it, gradient's norm and learning rate.

    Raises:
        InputError: loss or norm is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    inputs, targets = text.batch(config.seed, step, config.batch, config.context)
    loss = _loss(model, inputs, targets, device, parallel)
    optimizer.zero_grad()
    loss.backward()
    norm = _clip(optimizer)
    value, size = torch.stack((mean(loss).to(norm), norm)).tolist()
    for name, number in (("loss", value), ("gradient's norm", size)):
        if not math.isfinite(number):
            raise InputError(f"the {name} became {number} at step {step + 1}; a lower --learning-rate may help")
    optimizer.step()
    return {
        "loss": value,
        "bits": value / math.log(2),
        "gradient_norm": size,
        "learning_rate": learning_rate(config, step),
    }


def _clip(optimizer: torch.optim.Optimizer) -> Tensor:
    """Scales all gradients down where their norm is over the limit; returns what it was."""
    groups = [group["params"] for group in optimizer.param_groups]
    norms = [get_total_norm([parameter.grad for parameter in group]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(norms).norm()
    for group in groups:
        clip_grads_with_norm_(group, CLIP, total)
    return total


def _kept_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to ``step``; later ones, of steps that were never saved, leave the file."""
    log = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    log = [line for line in log if line["step"] <= step]
    write_whole(path, lambda file: file.write_text("".join(json.dumps(line) + "\n" for line in log)))
    return log


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or termination) sets, so that a step always ends; the second ends at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _plot(path: Path, log: list[dict[str, Any]], unigram: float, bigram: float, title: str) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, bits = [line["step"] for line in log], [line["bits"] for line in log]
    axes.plot(steps, bits, color="C0", alpha=0.35, label="training")
    points = [line for line in log if "validation_bits" in line]
    steps, bits = [line["step"] for line in points], [line["validation_bits"] for line in points]
    axes.plot(steps, bits, "C0o-", label="held-out text")
    axes.axhline(unigram, color="gray", linestyle=":", label="byte unigram")
    axes.axhline(bigram, color="gray", linestyle="--", label="byte bigram")
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
