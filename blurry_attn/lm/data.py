"""Bytes to train on, bytes to be judged by, and what counting alone makes of them."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCABULARY = 256
# One file in ten is held out.
HELD_OUT_SHARE = 10
VALIDATION_WINDOWS = 96


class InputError(ValueError):
    """A user's mistake; its message is one line that says what to do about it."""


def check_memory(size: int, what: str) -> None:
    """Refuses ``what``, options or a path, that takes ``size`` bytes, more than this machine has.

    Raises:
        InputError: it does.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        gib = [f"{min(number / 2**30, 1e15):,.0f} GiB" for number in (size, memory)]
        raise InputError(f"{what}: at least {gib[0]} of memory would be needed, and this machine has {gib[1]}")


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
    if path is not None and not os.path.exists(path):
        raise InputError(f"--text {name}: no such file or folder")
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    try:
        files = _read(root, _library_files(root) if path is None else _text_files(root))
    except OSError as error:
        raise InputError(f"--text {error.filename or name}: {error.strerror}") from None
    if path is not None and path.is_file() and not files:
        raise InputError(f"--text {name}: a binary file (it holds a NUL byte), want text")
    order = sorted(files, key=lambda file: hashlib.sha256(file.encode(errors="surrogateescape")).digest())
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


def _read(root: Path, files: Iterable[Path]) -> dict[str, bytes]:
    """The content of files by their path below ``root``, without binary ones (a NUL byte tells)."""
    files = sorted(files)
    check_memory(2 * sum(file.stat().st_size for file in files), f"--text {root}")
    contents = ((file.relative_to(root).as_posix(), file.read_bytes()) for file in files)
    return {name: content for name, content in contents if b"\0" not in content}


def _library_files(root: Path) -> Iterator[Path]:
    """Python's own modules, without its tests and what was installed beside it."""
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"}.intersection(parts):
            yield file


def _text_files(root: Path) -> Iterator[Path]:
    """The file itself, or the files of a folder but for hidden ones."""
    for file in (root,) if root.is_file() else root.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts):
            yield file
