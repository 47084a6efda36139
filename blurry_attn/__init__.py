"""Blurry window attention: attention whose state stays finite, N slots that hold a blurred history of P tokens."""

from importlib.metadata import PackageNotFoundError, version

# The first of these says in one line why the compiled part cannot be loaded, where it cannot.
from . import (
    _load,  # noqa: F401
    flops,  # noqa: F401
    reference,
    serialization,  # noqa: F401
)
from .modules import BlurrySelfAttention, BlurryWindowAttention
from .ops import backend, blurry_window_attention, blurry_window_step
from .ragged import Packing
from .state import BlurryState
from .swap import replace_sdpa
from .window import BlurryWindow

try:
    __version__ = version("blurry_attn")
except PackageNotFoundError:
    __version__ = "unknown"

__all__ = [
    "BlurrySelfAttention",
    "BlurryState",
    "BlurryWindow",
    "BlurryWindowAttention",
    "Packing",
    "backend",
    "blurry_window_attention",
    "blurry_window_step",
    "reference",
    "replace_sdpa",
]
