"""A plain decoder: RMSNorm, rotary positions, SwiGLU, tied embeddings, and a mixer that is a switch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import MAX_RESOLUTION, MAX_SLOTS
from ..modules import BlurrySelfAttention
from ..ops import rotary
from ..window import BlurryWindow
from .data import VOCABULARY, InputError, check_memory

MIXERS = ("blurry", "sliding", "full")
ROPE_BASE = 10000.0
MOST_WIDTH = 2**20


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model; one head per entry of ``resolutions`` (tokens per slot, read by ``blurry`` alone).

    Raises:
        InputError: a number out of its range; the message names the option.
    """

    mixer: str = "blurry"
    dim: int = 96
    layers: int = 4
    slots: int = 32
    resolutions: tuple[int, ...] = (1, 1, 1, 1, 4, 4, 8, 8)

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise InputError(f"--mixer must be one of {', '.join(MIXERS)}, got {self.mixer!r}")
        if not 2 <= self.slots <= MAX_SLOTS:
            raise InputError(f"--slots must be in 2 .. {MAX_SLOTS}, got {self.slots}")
        if self.layers < 1:
            raise InputError(f"--layers must be at least 1, got {self.layers}")
        if not self.resolutions or not 1 <= min(self.resolutions) <= max(self.resolutions) <= MAX_RESOLUTION:
            raise InputError(f"--resolutions must be whole numbers in 1 .. {MAX_RESOLUTION}, got {self.resolutions}")
        if not 1 <= self.dim <= MOST_WIDTH or self.dim % (2 * self.heads):
            raise InputError(
                f"--dim must be a multiple of twice the heads ({2 * self.heads}), at most {MOST_WIDTH}, got {self.dim}"
            )

    @property
    def heads(self) -> int:
        return len(self.resolutions)

    @property
    def window(self) -> BlurryWindow:
        return BlurryWindow.pyramid(self.slots, self.resolutions)


@dataclass
class TokenCache:
    """The past of softmax attention: key and value (B, H, S, D) of the tokens still in sight, and tokens seen."""

    key: Tensor
    value: Tensor
    position: int


class TokenSelfAttention(nn.Module):
    """Causal softmax attention over the last ``span`` tokens, or over all of them when ``span`` is None.

    The same projections, rotary positions and decoding interface as :class:`blurry_attn.BlurrySelfAttention`.
    """

    def __init__(self, embed_dim: int, num_heads: int, span: int | None, rope_base: float) -> None:
        super().__init__()
        self.head_dim, self.span, self.rope_base = embed_dim // num_heads, span, rope_base
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False)

    def forward(self, x: Tensor, *, state: TokenCache | None = None, return_state: bool = False) -> Any:
        """(B, T, E) -> (B, T, E), and the cache after it if ``return_state``."""
        start = 0 if state is None else state.position
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotary(heads, positions, self.rope_base) for heads in (query, key))
        if state is not None:
            key, value = torch.cat([state.key, key], 2), torch.cat([state.value, value], 2)
        # Without a mask in memory, PyTorch takes its fastest kernels.
        plain = state is None and self.span is None
        mask = None if plain else self._mask(positions, key.shape[2])
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=plain)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not return_state:
            return out
        keep = slice(None) if self.span is None else slice(-self.span, None)
        return out, TokenCache(key[:, :, keep], value[:, :, keep], start + x.shape[1])

    @torch.no_grad()
    def step(self, x: Tensor, state: TokenCache) -> Tensor:
        """(B, 1, E) -> (B, 1, E); updates ``state`` in place."""
        out, new = self(x, state=state, return_state=True)
        state.key, state.value, state.position = new.key, new.value, new.position
        return out

    def _mask(self, positions: Tensor, keys: int) -> Tensor:
        """True where a query sees a key; the keys are the last ``keys`` tokens up to the last query."""
        key_positions = torch.arange(keys, device=positions.device) + (positions[-1] + 1 - keys)
        age = positions.unsqueeze(1) - key_positions
        return (age >= 0) if self.span is None else (age >= 0) & (age < self.span)


class Norm(nn.RMSNorm):
    """Under autocast, the result is cast once, not by each of the layers that read it."""

    def forward(self, x: Tensor) -> Tensor:
        out, device = super().forward(x), x.device.type
        return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_up) W_down, 8/3 as wide inside (rounded up to a multiple of 16)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 16 * math.ceil(8 * dim / 3 / 16)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = Norm(config.dim)
        self.mixer: nn.Module
        if config.mixer == "blurry":
            self.mixer = BlurrySelfAttention(config.dim, config.heads, config.window, rope_base=ROPE_BASE)
        else:
            span = config.slots if config.mixer == "sliding" else None
            self.mixer = TokenSelfAttention(config.dim, config.heads, span, ROPE_BASE)
        self.mlp_norm = Norm(config.dim)
        self.mlp = SwiGLU(config.dim)

    def forward(self, x: Tensor, mix: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """``mix`` calls the mixer, in the one way or the other."""
        x = x + mix(self.mixer, self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out.

    ``forward`` reads whole sequences; ``prefill`` also returns one state per layer, which ``step`` then carries on,
    one byte at a time and in place.

    Raises:
        InputError: weights that are larger than this machine's memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":
            with torch.device("meta"):
                layer = sum(parameter.numel() for parameter in Block(config).parameters())
            check_memory(4 * (config.layers * layer + VOCABULARY * config.dim), "--dim, --layers")
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("out_proj.weight", "down.weight"))
                fan = config.dim if name.startswith("embedding") else parameter.shape[1]
                nn.init.normal_(parameter, std=1 / math.sqrt(fan * (2 * config.layers if last else 1)))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, 256)."""
        return self._run(tokens, lambda mixer, x: mixer(x))

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        """tokens (B, T) int64 -> logits of the byte after the last one (B, 256), and the state of each layer."""
        states: list[Any] = []

        def mix(mixer: nn.Module, x: Tensor) -> Tensor:
            out, state = mixer(x, return_state=True)
            states.append(state)
            return out

        return self._run(tokens, mix)[:, -1], states

    @torch.no_grad()
    def step(self, tokens: Tensor, states: list[Any]) -> Tensor:
        """tokens (B, 1) int64 -> logits (B, 256); updates ``states`` in place."""
        of_layer = iter(states)
        return self._run(tokens, lambda mixer, x: cast(Any, mixer).step(x, next(of_layer)))[:, -1]

    def _run(self, tokens: Tensor, mix: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mix)
        return F.linear(self.norm(x), self.embedding.weight)


def state_size(states: list[Any]) -> tuple[int, int]:
    """Elements and bytes that the states of all layers hold."""
    tensors = [tensor for state in states for tensor in (state.key, state.value)]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
