"""Continuing a prompt, byte by byte, with a state that does not grow."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from . import checkpoint
from .data import InputError, check_memory
from .model import LanguageModel, state_size


@dataclass(frozen=True)
class Sampling:
    """How to draw the next byte. Temperature 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 cut nothing off.

    Raises:
        InputError: a number out of its range; the message names the option.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"--top-k must be at least 0 (0: no limit), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in 0 .. 2**63 - 1, got {self.seed}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, 256) on the CPU -> bytes (B, 1), int64."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits, order = logits.double().sort(dim=-1, descending=True)
        probabilities = torch.softmax((logits - logits[:, :1]) / self.temperature, -1)
        if self.top_k:
            probabilities[:, self.top_k :] = 0
        # A byte stays while those likelier than it have not yet filled top_p: the first always does.
        probabilities[probabilities.cumsum(-1) - probabilities >= self.top_p] = 0
        return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


def continuation(
    model: LanguageModel, prompt: bytes, tokens: int, sampling: Sampling, states: list[Any]
) -> Iterator[int]:
    """Yields ``tokens`` bytes after ``prompt`` (not empty); ``states`` is filled, one per layer, and kept current."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    logits, states[:] = model.prefill(torch.tensor([list(prompt)], device=device))
    for index in range(tokens):
        token = sampling.draw(logits.float().cpu(), generator)
        yield int(token)
        if index + 1 < tokens:
            logits = model.step(token.to(device), states)


def generate(folder: Path, prompt: str, tokens: int, sampling: Sampling, device: torch.device, out: TextIO) -> str:
    """Streams prompt and continuation to ``out``; returns a line on speed and state.

    Raises:
        InputError: no checkpoint in ``folder``, a state larger than memory, an empty prompt, or ``tokens`` < 1.
        OSError: ``out`` cannot be written.
    """
    if tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {tokens}")
    if not prompt:
        raise InputError("--prompt must not be empty")
    saved = checkpoint.load(folder)
    config = saved.model_config
    if config.mixer == "blurry":
        elements = config.layers * config.window.state_elements(config.heads, config.dim // config.heads)
        check_memory(4 * elements, f"{folder}: a state of {config.slots} slots")
    model = LanguageModel(config)
    saved.restore(model)
    model.to(device).eval()
    # Surrogates stand for bytes of a terminal that are no UTF-8.
    spoken = prompt.encode(errors="surrogateescape")
    print(spoken.decode(errors="replace"), end="", file=out)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    states: list[Any] = []
    begin = time.perf_counter()
    for byte in continuation(model, spoken, tokens, sampling, states):
        print(decoder.decode(bytes([byte])), end="", file=out, flush=True)
    seconds = time.perf_counter() - begin
    print(decoder.decode(b"", final=True), file=out, flush=True)
    elements, size = state_size(states)
    growth = "and growing" if config.mixer == "full" else "however long the text"
    speed = f"{tokens} bytes in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s"
    return f"{speed}; state: {elements:,} elements, {size:,} bytes, {growth}"


def newest_run(root: Path) -> Path:
    """The run under ``root`` whose checkpoint was written last.

    Raises:
        InputError: there is none.
    """
    files = list(root.rglob(checkpoint.FILE)) if root.is_dir() else []
    if not files:
        raise InputError(f"no checkpoint under {root}/; train first, or name a run with --run")
    return max(files, key=lambda file: file.stat().st_mtime).parent
