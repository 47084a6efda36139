"""Training: one run is one folder with a checkpoint, its numbers and its plot."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from types import FrameType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from ..files import claimed, naming, write_whole
from . import checkpoint
from .checkpoint import Checkpoint, TrainConfig
from .data import InputError, Text, check_memory, load_text, ngram_bits
from .model import LanguageModel, ModelConfig
from .parallel import Parallel, agreed, anywhere, mean, rank, size

Found = Literal["none", "same", "shorter"]
METRICS, PLOT = "metrics.jsonl", "loss.png"
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
# These are shares of the steps and of the peak learning rate.
WARM_UP, FINAL = 0.1, 0.02
# A run is validated so many times.
VALIDATIONS = 8
VALIDATION_BATCH = 32
# One thread and all of them take turns for so many seconds.
TRIAL = 1.0


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
    found: Found = "same",
) -> Result:
    """Trains in ``folder``, going on from the checkpoint there if there is one, to the very same losses.

    A collective call of all processes of the default group, if there is one, which divide the work by ``strategy``
    (:class:`blurry_attn.lm.parallel.Parallel`): each reads ``folder``, the first writes. No other training writes there
    meanwhile. Where ``train_config.threads`` is None, a process that is alone on a CPU computes with as many threads as
    the checkpoint says, else ``OMP_NUM_THREADS``, else with one or all, whichever takes less time for gradients.

    Args:
        found: the run that ``folder`` may hold already: ``"none"``, one of the ``"same"`` configuration, or also one of
            fewer steps (``"shorter"``), which goes on from its step in the learning-rate schedule of the new total.

    Raises:
        InputError: a folder that cannot be written, that another process trains in or whose run is not the one that
            ``found`` lets in; text that cannot be used; a loss that is not finite.
        OSError: what is to be written cannot be; it names the file.
        Interrupted: after Ctrl-C, once the run is saved.
    """
    parallel = Parallel(strategy)
    check_memory(16 * train_config.batch * train_config.context, "--batch, --context")
    torch.manual_seed(train_config.seed)
    model = LanguageModel(model_config).to(device)
    divided = parallel.divide(model)
    optimizer = make_optimizer(model, train_config)
    with _claimed(folder):
        saved = _saved(folder, model_config, train_config, found)
        text = load_text(None if train_config.text is None else Path(train_config.text), train_config.context)
        if saved is not None:
            if saved.digest != text.digest:
                raise InputError(f"{folder}: not the text that this run was started on, so it cannot be continued")
            saved.restore(model, optimizer)
        threads, saved_threads = train_config.threads, None if saved is None else saved.train_config.threads
        if threads is None and device.type == "cpu" and size() == 1:
            threads = saved_threads or _faster_threads(model, text, train_config)
        with _threads(threads):
            train_config = replace(train_config, threads=threads or saved_threads)
            start = 0 if saved is None else saved.step
            return _trained(folder, model, divided, optimizer, text, train_config, start, device, parallel)


def _trained(
    folder: Path,
    model: LanguageModel,
    divided: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Text,
    config: TrainConfig,
    start: int,
    device: torch.device,
    parallel: Parallel,
) -> Result:
    """The run after the step ``start``."""
    inputs, targets = text.validation(config.context)
    unigram, bigram = ngram_bits(text.train, inputs, targets)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mixer = model.config.mixer
    print(
        f"{mixer}: {parameters:,} parameters; {len(text.train):,} bytes to train on, "
        f"{targets.numel():,} of {len(text.held_out):,} held-out bytes to validate on; {device}\n"
        f"bits per byte to beat: unigram {unigram:.3f}, bigram {bigram:.3f}"
    )
    log = _kept_metrics(folder / METRICS, start)
    bits = next((line["validation_bits"] for line in reversed(log) if "validation_bits" in line), math.nan)

    step_tokens = config.batch * config.context
    steps_done = start
    with (
        _interrupts() as interrupted,
        _Lines(folder / METRICS) as metrics,
        tqdm(
            total=config.steps * step_tokens,
            initial=start * step_tokens,
            unit="tok",
            unit_scale=True,
            smoothing=0.05,
            disable=rank() > 0,
        ) as bar,
    ):
        for step in range(start, config.steps):
            begin = time.perf_counter()
            numbers = train_step(divided, optimizer, text, config, step, device, parallel)
            line: dict[str, Any] = {"step": step + 1, **numbers}
            line["seconds"] = time.perf_counter() - begin
            steps_done = step + 1
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['bits']:.3f} bits/byte", refresh=False)
            bar.update(step_tokens)
            last = steps_done == config.steps
            if last or steps_done * VALIDATIONS // config.steps > step * VALIDATIONS // config.steps:
                bits = validate(divided, inputs, targets, device, parallel)
                _check_finite("bits of the held-out text", bits, steps_done)
                line["validation_bits"] = bits
                bar.write(
                    f"step {steps_done}: held-out bits per byte {bits:.3f} (unigram {unigram:.3f}, bigram {bigram:.3f})"
                )
            log.append(line)
            metrics.write(line)
            stop = anywhere(interrupted.is_set())
            if "validation_bits" in line or stop:
                metrics.flush()
                checkpoint.save(folder, model, optimizer, config, text.digest, steps_done)
            if stop and not last:
                break
    if rank() == 0:
        write_whole(folder / PLOT, lambda path: _plot(path, log, unigram, bigram, mixer))
    if steps_done < config.steps:
        raise Interrupted(f"stopped and saved at step {steps_done} of {config.steps}")
    seconds = median(line["seconds"] for line in log) if log else math.nan
    return Result(bits, unigram, bigram, parameters, step_tokens / seconds, folder)


@torch.no_grad()
def validate(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device, parallel: Parallel) -> float:
    """Bits per byte of ``targets``."""
    total = 0.0
    batches = zip(inputs.split(VALIDATION_BATCH), targets.split(VALIDATION_BATCH), strict=True)
    for batch_inputs, batch_targets in batches:
        loss = mean(_loss(model, batch_inputs, batch_targets, device, parallel)).item()
        total += loss * batch_targets.numel()
    return total / targets.numel() / math.log(2)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to a small share of it."""
    warm_up = max(1, round(WARM_UP * config.steps))
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, config.steps - warm_up)
    return config.learning_rate * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2)


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
    own_inputs, own_targets = parallel.part(inputs).to(device), parallel.part(targets).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(own_inputs)
    total = F.cross_entropy(logits.float().flatten(0, 1), own_targets.flatten(), reduction="sum")
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
    value, norm_size = torch.stack((mean(loss).to(norm), norm)).tolist()
    for name, number in (("loss", value), ("gradient's norm", norm_size)):
        _check_finite(name, number, step + 1)
    optimizer.step()
    return {
        "loss": value,
        "bits": value / math.log(2),
        "gradient_norm": norm_size,
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


def _check_finite(name: str, number: float, step: int) -> None:
    if not math.isfinite(number):
        raise InputError(f"the {name} became {number} at step {step}; a lower --learning-rate may help")


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The first process makes the folder of the run and keeps it to itself; all are told if it cannot."""
    with ExitStack() as claim:
        refusal = None
        if rank() == 0:
            try:
                claim.enter_context(claimed(folder, METRICS, checkpoint.FILE, PLOT))
            except BlockingIOError:
                refusal = "another process is training there; wait for its end, or name another folder"
            except OSError as error:
                refusal = f"cannot be made or written ({error.strerror}); name another folder"
        refusal = agreed(refusal)
        if refusal is not None:
            raise InputError(f"--run {folder}: {refusal}")
        yield


def _saved(folder: Path, model_config: ModelConfig, train_config: TrainConfig, found: Found) -> Checkpoint | None:
    """The checkpoint in ``folder``, if there is one; see :func:`train` about ``found``."""
    if not (folder / checkpoint.FILE).exists():
        return None
    if found == "none":
        raise InputError(f"{folder}: holds a run already; --resume continues it, another --run starts anew")
    saved = checkpoint.load(folder)
    # The number of threads changes no more than the last bits.
    known = replace(saved.train_config, threads=train_config.threads)
    if found == "shorter" and known.steps < train_config.steps:
        known = replace(known, steps=train_config.steps)
    if (saved.model_config, known) != (model_config, train_config):
        raise InputError(f"{folder}: holds a run of another configuration; choose another folder")
    return saved


def _kept_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to ``step``; later ones, of steps that were never saved, leave the file."""
    try:
        text = path.read_text() if path.exists() else ""
        log = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        log = [line for line in log if line["step"] <= step]
        numbers = [(line["bits"], line["seconds"], line.get("validation_bits", 0.0)) for line in log]
        if not all(isinstance(number, float) for line in numbers for number in line):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: not the numbers of a training; without this file the run goes on") from None
    if rank() == 0:
        write_whole(path, lambda file: file.write_text("".join(json.dumps(line) + "\n" for line in log)))
    return log


class _Lines:
    """A file to which the first process adds lines of JSON; an OSError names it."""

    def __init__(self, path: Path) -> None:
        self.path = path if rank() == 0 else Path(os.devnull)

    def __enter__(self) -> _Lines:
        self.file = self.path.open("a")
        return self

    def write(self, line: dict[str, Any]) -> None:
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        with naming(self.path):
            self.file.flush()

    def __exit__(self, *error: object) -> None:
        with naming(self.path):
            self.file.close()


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads on the CPU inside; those that there are if None."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _faster_threads(model: LanguageModel, text: Text, config: TrainConfig) -> int:
    """One thread or all: those that take less time for losses and gradients, unless the environment says a number."""
    all_threads = torch.get_num_threads()
    if all_threads == 1 or {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return all_threads
    inputs, targets = text.batch(config.seed, 0, config.batch, config.context)
    seconds: dict[int, list[float]] = {1: [], all_threads: []}
    begin = time.perf_counter()
    while time.perf_counter() - begin < TRIAL:
        for number, times in seconds.items():
            with _threads(number):
                start = time.perf_counter()
                _loss(model, inputs, targets, torch.device("cpu"), Parallel("ddp")).backward()
                model.zero_grad()
                times.append(time.perf_counter() - start)
    one_takes, all_take = (1000 * fmean(times[1:] or times) for times in seconds.values())
    faster = 1 if one_takes < all_take else all_threads
    print(f"threads: {faster}, as a gradient takes {one_takes:.1f} ms with 1 and {all_take:.1f} ms with {all_threads}")
    return faster


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
