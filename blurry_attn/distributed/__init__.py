"""Many devices: a sequence cut over ranks (context parallel), the heads of a layer over ranks (tensor parallel)."""

from .context import context_parallel_attention, piece_start
from .heads import HeadParallel

__all__ = ["HeadParallel", "context_parallel_attention", "piece_start"]
