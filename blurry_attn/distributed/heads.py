"""Tensor parallel: the heads of a layer, divided over ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..modules import BlurrySelfAttention


class HeadParallel(ParallelStyle):
    """Tensor parallel for :class:`blurry_attn.BlurrySelfAttention`, in a plan of ``parallelize_module``.

    A rank projects to some of the heads and attends over them, each through its own window; one all-reduce sums the
    output. Inputs and outputs are plain tensors, the same on every rank; a state holds the heads of its rank.

    >>> parallelize_module(model, mesh, {"layers.*.attention": HeadParallel()})

    Raises:
        TypeError: another module.
        ValueError: kv heads that do not divide evenly over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, BlurrySelfAttention):
            raise TypeError(f"HeadParallel is for BlurrySelfAttention, got {type(module).__name__}")
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()
        if module.num_kv_heads % ranks:
            raise ValueError(f"num_kv_heads must be a multiple of the {ranks} ranks, got {module.num_kv_heads}")
        projections = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        parallelize_module(
            module, device_mesh, {**projections, "out_proj": RowwiseParallel()}, src_data_rank=self.src_data_rank
        )
        kv_heads = module.num_kv_heads // ranks
        module.window = module.window.of_heads(module.num_kv_heads, slice(rank * kv_heads, (rank + 1) * kv_heads))
        module.num_heads, module.num_kv_heads = module.num_heads // ranks, kv_heads
        return module
