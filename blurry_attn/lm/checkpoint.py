"""Checkpoints in one safetensors file: tensors of model and optimizer, and a header that says what they are.

The header holds a checksum of all the rest, so that a file that was cut off or altered is not taken for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

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

from ..files import write_whole
from .data import VOCABULARY, InputError
from .model import LanguageModel, ModelConfig
from .parallel import rank

FILE = "checkpoint.safetensors"
PROGRAM = "blurry_attn.lm"
FORMAT = f"{PROGRAM} 4"
MOST_THREADS = 1024
# A configuration has at most so many characters.
MOST_JSON = 2**16
# AdamW divides by the one and takes the root of the other.
LOWEST = {"step": 1.0, "exp_avg_sq": 0.0}
Config = TypeVar("Config", bound="ModelConfig | TrainConfig")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; ``steps`` is also the length of the learning-rate schedule. ``text``: an absolute path, or None.

    ``threads`` compute on the CPU; when None, the number is measured as training begins.

    Raises:
        InputError: a number out of its range; the message names the option.
    """

    text: str | None = None
    context: int = 256
    batch: int = 4
    steps: int = 2400
    learning_rate: float = 3e-3
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.text is not None and (not self.text.startswith("/") or "\0" in self.text):
            raise InputError(f"--text must be an absolute path, got {self.text!r}")
        for name in ("context", "batch", "steps"):
            if not 1 <= getattr(self, name) < 2**63:
                raise InputError(f"--{name} must be in 1 .. 2**63 - 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"--learning-rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be in 0 .. 2**63 - 1, got {self.seed}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise InputError(f"--threads must be in 1 .. {MOST_THREADS}, got {self.threads}")


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
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


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
    # The moments are empty but on the first process.
    for name, values in moments.get("state", {}).items():
        tensors |= {f"optimizer.{name}.{field}": tensor for field, tensor in values.items()}
    header = {
        "format": FORMAT,
        "model": json.dumps(asdict(model.config)),
        "train": json.dumps(asdict(train_config)),
        "digest": digest,
        "step": str(step),
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if rank() == 0:
        content = serialize(tensors, header | {"checksum": _checksum(tensors, header)})
        write_whole(folder / FILE, lambda path: path.write_bytes(content))


def load(folder: Path) -> Checkpoint:
    """Reads the checkpoint of a run, on the CPU. Nothing beyond the size of the file is made, and nothing in it is run.

    Raises:
        InputError: there is none, or the file cannot be read, is not one, is not as it was written or holds what no
            training writes; the message names the file, and the entry if it is one.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no checkpoint there ({FILE})")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # What safe_open gives is no dict.
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: f"{entry.get_dtype()} {tuple(entry.get_shape())}" for name, entry in entries.items()}
            configs = _checked(header, kinds)
            tensors = {name: file.get_tensor(name) for name in kinds}
        if header.pop("checksum") != _checksum(tensors, header):
            raise InputError("was altered after it was written (its checksum is another)")
        for name, tensor in tensors.items():
            lowest = LOWEST.get(name.rpartition(".")[2], -math.inf) if name.startswith("optimizer.") else -math.inf
            if not tensor.isfinite().all():
                raise InputError(f"entry {name!r} holds NaN or infinity")
            if tensor.min() < lowest:
                raise InputError(f"entry {name!r} holds {tensor.min():g}, less than {lowest:g}")
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({' '.join(str(error).split())})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Checkpoint(*configs, header["digest"], int(header["step"]), tensors)


def _checked(header: Mapping[str, str], kinds: Mapping[str, str]) -> tuple[ModelConfig, TrainConfig]:
    """The configurations that a header holds, if all of it and dtype and shape of every entry belong to them."""
    written = header.get("format", "")
    if written != FORMAT:
        of_ours = written.startswith(f"{PROGRAM} ")
        version = f" version ({written[:40]!r}, this one reads {FORMAT!r})" if of_ours else " program"
        raise InputError(f"not a checkpoint of this{version}")
    for name in sorted({"format", "model", "train", "digest", "step", "checksum"} ^ header.keys()):
        raise InputError(f"entry {name[:200]!r} of the header is " + ("not known" if name in header else "missing"))
    model_config = _parsed(ModelConfig, "model", header["model"])
    train_config = _parsed(TrainConfig, "train", header["train"])
    if not re.fullmatch("[0-9]{1,19}", header["step"]) or int(header["step"]) > train_config.steps:
        raise InputError(f"entry 'step' must be in 0 .. {train_config.steps}, got {header['step'][:40]!r}")
    # The width and the number of layers are bounded by the size of the file before a model is laid out.
    embedding = f"F32 {(VOCABULARY, model_config.dim)}"
    if kinds.get("model.embedding.weight") != embedding or model_config.layers > len(kinds):
        size = f"{model_config.layers} layers of {model_config.dim}"
        raise InputError(f"entry 'model' says {size}, and the other entries are not those of such a model")
    expected = _kinds(model_config)
    for name in sorted(expected.keys() | kinds.keys()):
        if name not in kinds:
            raise InputError(f"entry {name!r} is missing")
        if name not in expected:
            raise InputError(f"entry {name[:200]!r} is none of such a model")
        if kinds[name] != expected[name]:
            raise InputError(f"entry {name!r} must be {expected[name]}, got {kinds[name]}")
    return model_config, train_config


def _parsed(kind: type[Config], name: str, text: str) -> Config:
    """A configuration from JSON, whose values are of the types of the defaults, or of the annotation."""
    try:
        values = json.loads(text) if len(text) <= MOST_JSON else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"entry {name!r} is no configuration in JSON")
    known = {field.name: field.type for field in fields(kind)}
    for key in sorted(known.keys() ^ values.keys()):
        raise InputError(f"entry {name!r}: {key[:200]!r} is " + ("missing" if key in known else "not known"))
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = value = tuple(value)
        if not _is_of(value, str(known[key])):
            raise InputError(f"entry {name!r}: {key!r} must be {known[key]}, got {str(value)[:40]!r}")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"entry {name!r}: {error}") from None


def _is_of(value: object, annotation: str) -> bool:
    """Whether a value is of the type of a configuration's field; a bool is no int."""
    if annotation.startswith("tuple"):
        return type(value) is tuple and all(type(entry) is int for entry in value)
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)}
    return type(value) in {kind for name in annotation.split(" | ") for kind in kinds[name]}


def _kinds(config: ModelConfig) -> dict[str, str]:
    """Dtype and shape of every entry of a checkpoint."""
    with torch.device("meta"):
        weights = LanguageModel(config).state_dict()
    shapes = {f"model.{name}": tuple(weight.shape) for name, weight in weights.items()}
    for name, weight in weights.items():
        moments = {"step": (), "exp_avg": tuple(weight.shape), "exp_avg_sq": tuple(weight.shape)}
        shapes |= {f"optimizer.{name}.{moment}": shape for moment, shape in moments.items()}
    return {name: f"F32 {shape}" for name, shape in shapes.items()}


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Of all that a checkpoint holds: names, bytes and the header, from which dtypes and shapes follow."""
    known = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        known.update(f"{name}\n".encode())
        known.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return known.hexdigest()
