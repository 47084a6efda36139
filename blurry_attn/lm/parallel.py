"""Training by many processes, those that torchrun started: each has its part of the batch, or of the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from ..distributed import HeadParallel
from ..modules import BlurrySelfAttention
from .data import InputError
from .model import Block, LanguageModel

STRATEGIES = ("ddp", "fsdp", "tensor")
Value = TypeVar("Value")


@contextmanager
def joined() -> Iterator[None]:
    """Makes one group of the processes that torchrun started, of which the first alone prints to standard output.

    After an error the others are not waited for: this process ends, and torchrun ends them.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    device, backend = int(os.environ["LOCAL_RANK"]), "gloo"
    if device < torch.cuda.device_count():
        torch.cuda.set_device(device)
        # Flags are agreed upon on the CPU.
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        yield
    dist.destroy_process_group()


def end(status: int) -> None:
    """Ends a process that torchrun started, without the interpreter's last steps; nothing for one that is alone.

    A device mesh outlives `joined`, and so do gloo's threads: one that lets go of a tensor in those steps aborts.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value: Value) -> Value:
    """What the first process says."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def anywhere(flag: bool) -> bool:
    """Whether any process says so."""
    return mean(torch.tensor(float(flag))).item() > 0


def mean(value: Tensor) -> Tensor:
    """Over all processes; without gradient."""
    value = value.detach().clone()
    if size() > 1:
        dist.all_reduce(value)
    return value / size()


@dataclass(frozen=True)
class Parallel:
    """What is divided among the processes.

    ``"ddp"``: the sequences of a batch; every process has the whole model. ``"fsdp"``: these and the parameters.
    ``"tensor"``: the heads and the inner features of every layer; every process sees the whole batch.
    """

    strategy: str

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided."""
        return 1 if self.strategy == "tensor" else size()

    def part(self, batch: Tensor) -> Tensor:
        """This process's sequences, one fewer than another's or none where they do not divide evenly."""
        return batch.tensor_split(self.parts)[rank() % self.parts]

    def divide(self, model: LanguageModel) -> nn.Module:
        """What to call in place of ``model``, so that gradients come to the mean over the processes.

        Raises:
            InputError: "tensor", and heads or features that do not divide evenly.
        """
        if size() == 1:
            return model
        if self.strategy == "ddp":
            return DistributedDataParallel(model)
        mesh = init_device_mesh(model.embedding.weight.device.type, (size(),))
        if self.strategy == "fsdp":
            for layer in model.blocks:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        blocks = [cast(Block, block) for block in model.blocks]
        for what, number in (("heads", model.config.heads), ("inner features", blocks[0].mlp.down.in_features)):
            if number % size():
                raise InputError(f"--parallel tensor: {number} {what} do not divide evenly over {size()} processes")
        for block in blocks:
            _divide_features(block, mesh)
        return model


def _divide_features(block: Block, mesh: DeviceMesh) -> None:
    columns, rows = ColwiseParallel(), RowwiseParallel()
    heads: ParallelStyle | dict[str, ParallelStyle]
    if isinstance(block.mixer, BlurrySelfAttention):
        heads = HeadParallel()
    else:
        heads = {"q_proj": columns, "k_proj": columns, "v_proj": columns, "out_proj": rows}
    parallelize_module(block.mixer, mesh, heads)
    parallelize_module(block.mlp, mesh, {"gate": columns, "up": columns, "down": rows})
    # As a DTensor, an input has its gradient summed once, not once by each projection that reads it.
    whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    for module in (block.mixer, block.mlp):
        parallelize_module(module, mesh, whole)
