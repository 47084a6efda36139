"""Bytes to train on, bytes to be judged by, and what counting alone makes of them."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCABULARY = 256
HELD_OUT_SHARE = 10  # one file in ten
VALIDATION_WINDOWS = 96


class InputError(ValueError):
    """A user's mistake; its message is one line that says what to do about it."""


@dataclass(frozen=True)
class Text:
    """Bytes as uint8 tensors, and a digest that tells one text from another."""

    train: Tensor
    held_out: Tensor
    digest: str

    def batch(self, seed: int, step: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (size, context), int64, of one training step: a function of seed and step alone."""
        starts = np.random.default_rng((seed, step)).integers(0, len(self.train) - context, size)
        return _windows(self.train, torch.from_numpy(starts), context)

    def validation(self, context: int, windows: int = VALIDATION_WINDOWS) -> tuple[Tensor, Tensor]:
        """Inputs and targets (at most ``windows``, context), int64, spread evenly over the held-out bytes."""
        room = len(self.held_out) - context - 1
        count = min(windows, 1 + room // context)
        starts = torch.linspace(0, room, count, dtype=torch.float64).long()
        return _windows(self.held_out, starts, context)


def load_text(path: Path | None, context: int) -> Text:
    """The text of a file or of every text file in a folder; of Python's own library when ``path`` is None.

    A tenth of the files, those whose path hashes lowest, is held out; of a single file, its last tenth.

    Raises:
        InputError: there is no such path, no text in it, or too little for windows of ``context`` bytes.
    """
    name = "the Python library" if path is None else str(path)
    if path is not None and not path.exists():
        raise InputError(f"--text {name}: no such file or folder")
    if path is not None and path.is_file():
        content = path.read_bytes()
        if b"\0" in content:
            raise InputError(f"--text {name}: a binary file (it holds a NUL byte), want text")
        cut = len(content) - len(content) // HELD_OUT_SHARE
        train, held_out = content[:cut], content[cut:]
    else:
        root = Path(sysconfig.get_path("stdlib")) if path is None else path
        files = dict(_library_files(root) if path is None else _text_files(root))
        order = sorted(files, key=lambda file: hashlib.sha256(file.encode()).digest())
        held = set(order[: math.ceil(len(order) / HELD_OUT_SHARE)]) if len(order) > 1 else set()
        train = b"".join(files[file] for file in sorted(files) if file not in held)
        held_out = b"".join(files[file] for file in sorted(held))
        if len(order) == 1:
            cut = len(train) - len(train) // HELD_OUT_SHARE
            train, held_out = train[:cut], train[cut:]
    if not train:
        raise InputError(f"--text {name}: no text found")
    for part, content in (("training", train), ("held-out", held_out)):
        if len(content) <= context:
            raise InputError(f"--text {name}: too short, {len(content)} {part} bytes, --context wants over {context}")
    digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(held_out).digest()).hexdigest()
    return Text(_bytes(train), _bytes(held_out), digest)


def ngram_bits(train: Tensor, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Bits per byte of ``targets`` under the byte unigram and the bigram (given ``inputs``) counted in ``train``.

    Add-one smoothing for the unigram, which in turn smooths the bigram with the weight of one count.
    """
    data = train.long()
    unigram = torch.bincount(data, minlength=VOCABULARY).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(data[:-1] * VOCABULARY + data[1:], minlength=VOCABULARY**2).double()
    pairs = pairs.reshape(VOCABULARY, VOCABULARY)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdim=True) + 1)
    return -unigram[targets].log2().mean().item(), -bigram[inputs, targets].log2().mean().item()


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    rows = data[starts.unsqueeze(1) + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def _library_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Python's own modules by relative path, without its tests and what was installed beside it."""
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"}.intersection(parts):
            yield "/".join(parts), file.read_bytes()


def _text_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Files by relative path, without hidden and binary ones (a NUL byte tells)."""
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if file.is_file() and not any(part.startswith(".") for part in parts):
            content = file.read_bytes()
            if b"\0" not in content:
                yield "/".join(parts), content
