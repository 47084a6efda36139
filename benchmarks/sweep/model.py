"""A stack of M small models with the same shape: every weight has a leading dimension M, every product is batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blurry_attn import BlurryWindow, blurry_window_attention

NORM_EPS = 1e-6
MOST_SLOTS = 64  # with which the operator's backward runs on tensor cores


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens: one head per entry of ``resolutions``, each with ``slots`` slots.

    ``kind`` is ``"fejer"``, ``"dirichlet"``, ``"sliding"`` (a sliding window of ``slots`` tokens), ``"full"`` (causal
    softmax attention, whose slots are all tokens) or ``"gsa"`` (gated slot attention of flash-linear-attention).
    """

    kind: str
    slots: int
    resolutions: tuple[int, ...] = (1, 1, 1, 1)
    head_dim: int = 32
    sharpness: float | None = None
    scale: float | None = None  # of scores; 1 / sqrt(head_dim) if None

    @property
    def heads(self) -> int:
        return len(self.resolutions)

    @property
    def window(self) -> BlurryWindow:
        kernel = "dirichlet" if self.kind == "dirichlet" else "fejer"
        return BlurryWindow.pyramid(self.slots, self.resolutions, kernel, self.sharpness)

    @property
    def operator(self) -> str:
        """The function that computes it. A sliding window is r = 1; where that has no fast backward, a mask does it."""
        if self.kind == "gsa":
            return "chunk_gsa"
        if self.kind == "full" or (self.kind == "sliding" and self.slots > MOST_SLOTS):
            return "scaled_dot_product_attention"
        return "blurry_window_attention"

    @property
    def state_elements(self) -> int:
        """Numbers in the state of one head: slots (Dk + Dv)."""
        return self.slots * 2 * self.head_dim

    @property
    def family(self) -> str:
        """What it is, but for its number of slots: a curve of the plot."""
        parts = [self.kind]
        if self.kind in ("fejer", "dirichlet"):
            same = len(set(self.resolutions)) == 1
            reach = self.slots * self.resolutions[0] if same else ",".join(map(str, self.resolutions))
            parts.append(f"window {reach}" if same else f"pyramid {reach}")
        if self.sharpness is not None:
            parts.append(f"sharpness {self.sharpness:g}")
        if self.scale is not None:
            parts.append(f"scale {self.scale:g}")
        parts.append(f"{self.heads} heads of {self.head_dim}")
        return ", ".join(parts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(N, H, T, D) each -> (N, H, T, D), for all kinds but ``"gsa"``."""
        if self.operator == "blurry_window_attention":
            return cast(Tensor, blurry_window_attention(query, key, value, self.window, scale=self.scale))
        if self.kind == "full":
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        positions = torch.arange(query.shape[2], device=query.device)
        age = positions.unsqueeze(1) - positions
        seen = (age >= 0) & (age < self.slots)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)


@dataclass(frozen=True)
class Shape:
    """Layers of [short causal convolution on q, k, v; mixer], and an MLP ``mlp`` times as wide if that is not 0."""

    mixer: Mixer
    width: int = 128
    layers: int = 2
    convolution: int = 4
    mlp: int = 0


class Shifts(torch.autograd.Function):
    """x (M, B, T, E) -> (M, B, T, taps, E): x of this token and the ``taps`` - 1 before it, zero before the start."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: int) -> Tensor:
        models, batch, length, width = x.shape
        shifted = x.new_zeros(models, batch, length, taps, width)
        for tap in range(min(taps, length)):
            shifted[:, :, tap:, tap] = x[:, :, : length - tap]
        return shifted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        length, taps = grad.shape[2:4]
        total = grad[:, :, :, 0].clone(memory_format=torch.contiguous_format)
        for tap in range(1, min(taps, length)):
            total[:, :, : length - tap] += grad[:, :, tap:, tap]
        return total, None


class TiedLoss(torch.autograd.Function):
    """Cross-entropy of hidden (M, P, E) against a vocabulary (M, V, E): loss (M,), in as few passes as there can be.

    Every model has the same answers (P,), an index below V each, and weights (P,) of the positions.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocabulary: Tensor, answers: Tensor, weights: Tensor) -> Tensor:
        gradient = torch.softmax(torch.bmm(hidden, vocabulary.mT), -1)
        index = answers.expand(len(hidden), -1).unsqueeze(-1)
        right = gradient.gather(-1, index).squeeze(-1).to(weights.dtype)
        # 1 - p of the answer is the sum of the others: exact in bfloat16 too, where p itself rounds to 1.
        gradient.scatter_(-1, index, 0.0)
        wrong = gradient.sum(-1, keepdim=True, dtype=weights.dtype)
        gradient.scatter_(-1, index, -wrong.to(gradient.dtype))
        ctx.save_for_backward(hidden, vocabulary, gradient, weights)
        return -(right.clamp_min(torch.finfo(right.dtype).tiny).log() * weights).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, vocabulary, gradient, weights = ctx.saved_tensors
        share = (grad.unsqueeze(-1) * weights).unsqueeze(-1)
        grad_hidden = torch.bmm(gradient, vocabulary) * share.to(hidden.dtype)
        grad_vocabulary = torch.bmm(gradient.mT, hidden * share.to(hidden.dtype))
        return grad_hidden, grad_vocabulary, None, None


class Stack(nn.Module):
    """M models that differ in their seeds; a model is the same whether it is alone or one of many.

    Args:
        shape: of each model.
        vocabulary: V, number of tokens.
        seeds: M seeds of the initial weights.
        device: of the weights, which are float32.
        dtype: of activations and products.
    """

    def __init__(
        self, shape: Shape, vocabulary: int, seeds: list[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        models = [_initial(shape, vocabulary, seed) for seed in seeds]
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.stack([model[name] for model in models]).to(device)) for name in models[0]}
        )

    @property
    def parameters_of_each(self) -> int:
        return sum(weight[0].numel() for weight in self.weights.values())

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T), the same for every model -> last hidden states (M, B T, E) and the vocabulary (M, V, E)."""
        vocabulary = self.weights["embedding"].to(self.dtype)
        models, size, width = vocabulary.shape
        offsets = torch.arange(models, device=tokens.device).unsqueeze(1) * size
        index = (tokens.flatten() + offsets).flatten()
        # Its gradient sums over all places of a token, hence in float32.
        x = self.weights["embedding"].flatten(0, 1).index_select(0, index).to(self.dtype).view(models, -1, width)
        # A short convolution of a projection is one product with the last few tokens side by side.
        taps = self.weights["convolution"].unsqueeze(3) * self.weights["project"].unsqueeze(2)
        layers = {"taps": taps.flatten(2, 3)} | {name: self.weights[name] for name in ("out", *self._optional())}
        by_layer = {name: weight.to(self.dtype).unbind(1) for name, weight in layers.items()}
        for layer in range(self.shape.layers):
            weights = {name: weight[layer] for name, weight in by_layer.items()}
            x = self._mix(x, tokens.shape, weights)
            if self.shape.mlp:
                x = torch.baddbmm(x, F.gelu(torch.bmm(_norm(x), weights["up"])), weights["down"])
        return _norm(x), vocabulary

    def loss(self, tokens: Tensor, positions: Tensor, answers: Tensor, weights: Tensor) -> Tensor:
        """Weighted cross-entropy (M,) at ``positions`` (P,) of the flattened ``tokens`` (B, T)."""
        hidden, vocabulary = self.hidden(tokens)
        loss: Tensor = TiedLoss.apply(hidden.index_select(1, positions), vocabulary, answers, weights)
        return loss

    @torch.no_grad()
    def predict(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The likeliest of all tokens (M, P) at ``positions`` (P,) of the flattened ``tokens`` (B, T)."""
        hidden = self.hidden(tokens)[0].index_select(1, positions)
        # In bfloat16 the likeliest would often be several.
        return torch.bmm(hidden.float(), self.weights["embedding"].mT).argmax(-1)

    def _optional(self) -> list[str]:
        return [name for name in ("gate", "up", "down") if name in self.weights]

    def _mix(self, x: Tensor, size: torch.Size, weights: dict[str, Tensor]) -> Tensor:
        """x (M, B T, E) -> x + mixer(convolution(norm(x)))."""
        mixer, models = self.shape.mixer, len(x)
        normed = _norm(x)
        past = Shifts.apply(normed.view(models, *size, -1), self.shape.convolution).view(models, x.shape[1], -1)
        # Models are so many more sequences of the batch.
        parts = torch.bmm(past, weights["taps"]).view(models * size[0], size[1], 3, mixer.heads, mixer.head_dim)
        query, key, value = parts.unbind(2)
        if mixer.kind == "gsa":
            gate = torch.bmm(normed, weights["gate"]).view(models * size[0], size[1], mixer.heads, mixer.slots)
            mixed = gated_slots(query, key, value, gate, mixer.scale)
        else:
            mixed = mixer.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
        return torch.baddbmm(x, mixed.reshape(models, x.shape[1], -1), weights["out"])


def gated_slots(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scale: float | None = None) -> Tensor:
    """Gated slot attention as in its paper's layer: (N, T, H, D) each and gate (N, T, H, slots) -> (N, T, H, D)."""
    from fla.ops.gsa import chunk_gsa  # type: ignore[import-not-found]

    decay = F.logsigmoid(gate.float()) / 8
    share = (1 - decay.exp()).to(gate.dtype)
    out: Tensor = chunk_gsa(F.silu(query), F.silu(key), value, share, decay, scale)[0]
    return out


def _norm(x: Tensor) -> Tensor:
    """To a root mean square of 1; no weight, as a product follows."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def _initial(shape: Shape, vocabulary: int, seed: int) -> dict[str, Tensor]:
    """The weights of one model; those of a layer have a leading dimension of layers."""
    generator = torch.Generator().manual_seed(seed)
    width, layers, inner = shape.width, shape.layers, shape.mixer.heads * shape.mixer.head_dim

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(size, generator=generator) * scale

    residual = 1 / (2 * layers) ** 0.5
    weights = {
        "embedding": normal(vocabulary, width, scale=0.02),
        "project": normal(layers, width, 3 * inner, scale=width**-0.5),
        "convolution": (torch.rand(layers, shape.convolution, 3 * inner, generator=generator) - 0.5)
        * (2 / shape.convolution**0.5),
        "out": normal(layers, inner, width, scale=residual * inner**-0.5),
    }
    if shape.mixer.kind == "gsa":
        weights["gate"] = normal(layers, width, shape.mixer.heads * shape.mixer.slots, scale=width**-0.5)
    if shape.mlp:
        wide = shape.mlp * width
        weights["up"] = normal(layers, width, wide, scale=width**-0.5)
        weights["down"] = normal(layers, wide, width, scale=residual * wide**-0.5)
    return weights
