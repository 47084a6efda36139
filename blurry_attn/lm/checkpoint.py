"""Checkpoints in one safetensors file: tensors of model and optimizer, and a header that says what they are.

The header holds a checksum of all the rest, so that a file that was cut off or altered is not taken for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .data import InputError
from .model import LanguageModel, ModelConfig
from .parallel import rank

FILE = "checkpoint.safetensors"
FORMAT = "blurry_attn.lm 3"


@dataclass(frozen=True)
class TrainConfig:
    """How to train; ``steps`` is also the length of the learning-rate schedule. ``text``: an absolute path, or None.

    Raises:
        InputError: a number out of its range; the message names the option.
    """

    text: str | None = None
    context: int = 256
    batch: int = 4
    steps: int = 2400
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "batch", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning-rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in 0 .. 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Checkpoint:
    """A run at ``step``. All chance comes from the configured seed and the step, so no generator's state is kept."""

    model_config: ModelConfig
    train_config: TrainConfig
    digest: str
    step: int
    tensors: dict[str, Tensor]

    def restore(self, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Puts the tensors into a model and an optimizer of the same configuration, however they are divided."""
        options = StateDictOptions(full_state_dict=True)
        weights: dict[str, Any] = self._part("model.")
        set_model_state_dict(model, weights, options=options)
        if optimizer is not None:
            state: dict[str, Any] = {}
            for name, tensor in self._part("optimizer.").items():
                parameter, _, field = name.rpartition(".")
                state.setdefault(parameter, {})[field] = tensor
            groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
            set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets ``write`` fill a temporary file beside ``path`` and moves it there when it is whole.

    Of many processes, the first does.
    """
    if rank() > 0:
        return
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(
    folder: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    train_config: TrainConfig,
    digest: str,
    step: int,
) -> None:
    """Writes the run's checkpoint into its folder, whole or not at all; a collective call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = cast(tuple[dict[str, Any], dict[str, Any]], get_state_dict(model, optimizer, options=options))
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, fields in moments.get("state", {}).items():  # empty but on the first process
        tensors |= {f"optimizer.{name}.{field}": tensor for field, tensor in fields.items()}
    header = {
        "format": FORMAT,
        "model": json.dumps(asdict(model.config)),
        "train": json.dumps(asdict(train_config)),
        "digest": digest,
        "step": str(step),
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = serialize(tensors, header | {"checksum": _checksum(tensors, header)})
    write_whole(folder / FILE, lambda path: path.write_bytes(content))


def load(folder: Path) -> Checkpoint:
    """Reads the checkpoint of a run, on the CPU.

    Raises:
        InputError: there is none, or the file is not one, or not as it was written.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no checkpoint there ({FILE})")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this program")
    if header.pop("checksum", None) != _checksum(tensors, header):
        raise InputError(f"{path}: was altered after it was written (its checksum is another)")
    model = json.loads(header["model"])
    model["resolutions"] = tuple(model["resolutions"])
    return Checkpoint(
        ModelConfig(**model),
        TrainConfig(**json.loads(header["train"])),
        header["digest"],
        int(header["step"]),
        tensors,
    )


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Of all that a checkpoint holds: names, shapes, dtypes, bytes, and the header."""
    known = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        known.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        known.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return known.hexdigest()
