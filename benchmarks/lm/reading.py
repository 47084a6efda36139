"""The task: every next byte of a text. How a model of ``blurry_attn.lm`` is made for it, and what it comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from blurry_attn.lm.model import LanguageModel, ModelConfig
from blurry_attn.lm.train import BETAS, CLIP, FINAL, VALIDATION_BATCH, WARM_UP, WEIGHT_DECAY

from ..sweep.model import Mixer


@dataclass(frozen=True)
class Reading:
    """``batch`` windows of ``context`` bytes in a step; ``held_out`` windows, at most, to be judged by."""

    context: int = 1024
    batch: int = 32
    held_out: int = 256

    @property
    def title(self) -> str:
        return f"{self.context} bytes of context"


@dataclass(frozen=True)
class Decoder:
    """The shape of a :class:`blurry_attn.lm.model.LanguageModel`; the mixer's ``scale`` is where its scores begin."""

    mixer: Mixer
    width: int
    layers: int = 4

    @property
    def title(self) -> str:
        return f"{self.layers} layers of {self.width}"

    @property
    def operator(self) -> str:
        """The function that mixes tokens in it; a sliding window is a mask there."""
        blurry = self.mixer.kind in ("fejer", "dirichlet")
        return "blurry_window_attention" if blurry else "scaled_dot_product_attention"

    def make(self, seed: int) -> LanguageModel:
        mixer = self.mixer
        if mixer.heads * mixer.head_dim != self.width:
            raise ValueError(f"width must be {mixer.heads} heads of {mixer.head_dim}, got {self.width}")
        kind = mixer.kind if mixer.kind in ("sliding", "full") else "blurry"
        torch.manual_seed(seed)
        model = LanguageModel(ModelConfig(kind, self.width, self.layers, mixer.slots, mixer.resolutions))
        if kind == "blurry":
            for block in model.blocks:
                block.mixer.window = mixer.window  # the configuration knows no law and no sharpness
        if mixer.scale is not None:
            with torch.no_grad():
                for block in model.blocks:
                    block.mixer.q_proj.weight *= mixer.scale * math.sqrt(mixer.head_dim)
        return model


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: all but the steps is the trainer's own, and stands here to be written down."""

    steps: int
    warm_up: float = field(default=WARM_UP, init=False)
    final: float = field(default=FINAL, init=False)
    decay: float = field(default=WEIGHT_DECAY, init=False)
    clip: float = field(default=CLIP, init=False)
    betas: tuple[float, float] = field(default=BETAS, init=False)


@torch.no_grad()
def bits_by_position(model: LanguageModel, inputs: Tensor, targets: Tensor, device: torch.device) -> Tensor:
    """Bits per byte (T,), float64, at each position of windows (W, T), in the mean over these."""
    total = torch.zeros(inputs.shape[1], dtype=torch.float64, device=device)
    for x, y in zip(inputs.split(VALIDATION_BATCH), targets.split(VALIDATION_BATCH), strict=True):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(x.to(device))
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.to(device).flatten(), reduction="none")
        total += loss.view(x.shape).sum(0, dtype=torch.float64)
    return total.cpu() / len(inputs) / math.log(2)


def by_stretch(bits: Tensor) -> list[tuple[int, int, float]]:
    """(first position, end, mean bits) of stretches half an octave long, which part the positions (T,)."""
    length = len(bits)
    marks = sorted({1, *(base << n for base in (2, 3) for n in range(length.bit_length()))})
    ends = [mark for mark in marks if mark < length] + [length]
    stretches = zip([0, *ends], ends, strict=False)
    return [(first, end, round(bits[first:end].mean().item(), 5)) for first, end in stretches]
