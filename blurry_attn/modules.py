"""Modules: a drop-in for scaled_dot_product_attention, and self-attention with projections."""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from .ops import blurry_window_attention, blurry_window_step, rotary
from .ragged import Packing, shapes_may_depend_on
from .state import BlurryState
from .window import BlurryWindow, integer


class BlurryWindowAttention(nn.Module):
    """Blurry window attention with the call signature of :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        window: the window; where it is given per head, its length is the number of key/value heads.
    """

    def __init__(self, window: BlurryWindow) -> None:
        super().__init__()
        if not isinstance(window, BlurryWindow):
            raise TypeError(f"window must be a BlurryWindow, got {type(window).__name__}")
        self.window = window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = True,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend causally; ``is_causal`` is True here unless told otherwise.

        Args:
            query: ``(..., Hq, T, Dk)``, any number of batch dimensions; ``(T, Dk)`` is one head of one sequence.
            key: ``(..., Hkv, T, Dk)``.
            value: ``(..., Hkv, T, Dv)``.
            attn_mask: must be None.
            dropout_p: must be 0.
            is_causal: must be True.
            scale: of the logits, ``1 / sqrt(Dk)`` when None.
            enable_gqa: let Hq be a multiple of Hkv.

        Returns:
            ``(..., Hq, T, Dv)``.

        Raises:
            TypeError: an argument that is not a tensor.
            NotImplementedError: ``attn_mask``, ``dropout_p`` other than 0, or nested tensors.
            ValueError: ``is_causal=False``, a key length unlike the query's, or shapes that do not fit together.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.is_nested:
                raise NotImplementedError(f"{name} must not be a nested tensor: pack sequences with cu_seqlens")
        if attn_mask is not None:
            raise NotImplementedError("attn_mask must be None: blurry window attention has no other mask than its own")
        if dropout_p != 0:
            raise NotImplementedError(f"dropout_p must be 0: attention weights cannot be dropped, got {dropout_p}")
        if not is_causal:
            raise ValueError("is_causal must be True: blurry window attention is causal")
        if not query.dim() == key.dim() == value.dim() >= 2:
            raise ValueError(
                "query, key and value must have the same number of dimensions, at least 2, "
                f"got {query.dim()}, {key.dim()} and {value.dim()}"
            )
        if key.shape[-2] != query.shape[-2]:
            raise ValueError(f"key must have the length of query ({query.shape[-2]}), got {key.shape[-2]}")
        leading = query.shape[:-3]
        for name, x in (("key", key), ("value", value)):
            if x.shape[:-3] != leading:
                raise ValueError(
                    f"{name} must have the leading dimensions of query {tuple(leading)}, got {tuple(x.shape[:-3])}"
                )
        out = blurry_window_attention(
            _batched(query), _batched(key), _batched(value), self.window, scale=scale, enable_gqa=enable_gqa
        )
        return cast(Tensor, out).reshape(*query.shape[:-1], value.shape[-1])

    def extra_repr(self) -> str:
        return repr(self.window)


def _batched(x: Tensor) -> Tensor:
    """(T, D), (H, T, D) or (B, ..., H, T, D) as (B, H, T, D)."""
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x.flatten(0, -4)


class BlurrySelfAttention(nn.Module):
    """Causal self-attention in a blurry window: projections, optional rotary embedding, decoding with a constant state.

    Args:
        embed_dim: E, a multiple of ``num_heads``; head_dim is ``embed_dim // num_heads``.
        num_heads: Hq query heads.
        window: the window; where it is given per head, one entry per key/value head.
        num_kv_heads: Hkv, a divisor of ``num_heads``; ``num_heads`` when None.
        bias: whether the four projections (``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``) have a bias.
        rope_base: base of the rotary embedding of query and key; None for none.

    Raises:
        TypeError: an argument of another type.
        ValueError: numbers that do not divide, or a window made for another number of heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: BlurryWindow,
        num_kv_heads: int | None = None,
        *,
        bias: bool = False,
        rope_base: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(window, BlurryWindow):
            raise TypeError(f"window must be a BlurryWindow, got {type(window).__name__}")
        embed_dim, num_heads = integer("embed_dim", embed_dim), integer("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads)
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be a bool, got {bias!r}")
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads ({num_heads}), got {embed_dim}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
        head_dim = embed_dim // num_heads
        if rope_base is not None:
            if isinstance(rope_base, bool) or not isinstance(rope_base, (int, float)):
                raise TypeError(f"rope_base must be a float or None, got {rope_base!r}")
            if not 0 < rope_base <= sys.float_info.max:
                raise ValueError(f"rope_base must be positive and finite, or None, got {rope_base}")
            if head_dim % 2:
                raise ValueError(f"embed_dim // num_heads must be even with rope_base, got {head_dim}")
        window.phases(num_kv_heads)
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, num_kv_heads, head_dim
        self.window = window
        self.rope_base = rope_base
        kv_dim = num_kv_heads * head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_multihead_attention(cls, mha: nn.MultiheadAttention, window: BlurryWindow) -> BlurrySelfAttention:
        """Self-attention with a copy of the weights of ``mha``, on its device, in its dtype and training mode.

        Raises:
            TypeError: ``mha`` is not an ``nn.MultiheadAttention``.
            ValueError: an option of ``mha`` that this module does not have; the message names it.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be an nn.MultiheadAttention, got {type(mha).__name__}")
        for name, have, need in (
            ("batch_first", mha.batch_first, True),
            ("dropout", mha.dropout, 0.0),
            ("add_bias_kv", mha.bias_k is not None or mha.bias_v is not None, False),
            ("add_zero_attn", mha.add_zero_attn, False),
            ("kdim", mha.kdim, mha.embed_dim),
            ("vdim", mha.vdim, mha.embed_dim),
        ):
            if have != need:
                raise ValueError(f"mha must have {name}={need}, got {name}={have}")
        source, biases = mha.in_proj_weight, mha.in_proj_bias
        module = cls(
            mha.embed_dim,
            mha.num_heads,
            window,
            bias=biases is not None,
            device=source.device,
            dtype=source.dtype,
        )
        projections = (module.q_proj, module.k_proj, module.v_proj)
        with torch.no_grad():
            for projection, weight in zip(projections, source.chunk(3), strict=True):
                projection.weight.copy_(weight)
            module.out_proj.weight.copy_(mha.out_proj.weight)
            if biases is not None:
                for projection, bias in zip(projections, biases.chunk(3), strict=True):
                    projection.bias.copy_(bias)
                module.out_proj.bias.copy_(mha.out_proj.bias)
        return module.train(mha.training)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        state: BlurryState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, BlurryState]:
        """Attend over ``x`` (B, T, E), after the history in ``state`` if there is one.

        Args:
            x: ``(B, T, E)``.
            key_padding_mask: ``(B, T)`` bool, True where a token is padding, anywhere in a sequence. The other tokens
                are attended as if the padding was not there: it takes no position, no place in the window and no step
                of the state, and its own output is zero.
            state: where the sequences stand; not changed.
            return_state: also return where they stand afterwards.

        Returns:
            ``out (B, T, E)``, or ``(out, state)``.

        Raises:
            TypeError, ValueError, NotImplementedError: an argument of another type, shape or layout.
        """
        self._check(x, state)
        if key_padding_mask is None:
            positions = _after(state, torch.arange(x.shape[1], device=x.device))
            out, state = self._attend(x, positions, None, state, return_state)
        else:
            self._check_mask(key_padding_mask, x)
            # Padding is left out before the projections: whatever it holds reaches neither an output nor a gradient.
            # Where shapes cannot depend on the mask it stays, as one more sequence.
            packing = Packing(key_padding_mask, keep_padding=not shapes_may_depend_on(key_padding_mask))
            positions = _after(state, packing.positions)
            if state is not None:
                state = packing.pack_state(state)
            packed, state = self._attend(
                packing.pack(x), packing.pack(positions), packing.cu_seqlens, state, return_state
            )
            if state is not None:
                state = packing.unpack_state(state)
            out = packing.unpack(packed)
        return (out, cast(BlurryState, state)) if return_state else out

    def step(self, x: Tensor, state: BlurryState) -> Tensor:
        """Decode one token per sequence: ``x`` (B, 1, E) -> (B, 1, E); ``state`` is updated in place.

        If it fails, ``state`` is as it was. Where ``out_proj`` has hooks or is no plain ``nn.Linear``, that takes a
        copy of the state.

        Raises:
            NotImplementedError: a gradient would be required (call it under ``torch.no_grad()``), or a nested tensor.
            TypeError, ValueError: an argument of another type or shape.
        """
        if not isinstance(state, BlurryState):
            raise TypeError(f"state must be a BlurryState, got {type(state).__name__}")
        self._check(x, state)
        if x.shape[1] != 1:
            raise ValueError(f"x must hold one token per sequence (B, 1, E), got {tuple(x.shape)}")
        query, key, value = self._project(x, state.position.unsqueeze(1))
        if torch.compiler.is_compiling() or self._surely_merges(query):
            return self._merge(blurry_window_step(query, key, value, state, enable_gqa=True))
        before = state.clone()
        # The step itself is made as a whole or not at all.
        out = blurry_window_step(query, key, value, state, enable_gqa=True)
        try:
            return self._merge(out)
        except BaseException:
            for held, was in zip(pytree.tree_leaves(state), pytree.tree_leaves(before), strict=True):
                held.copy_(was)
            raise

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"rope_base={self.rope_base}, window={self.window!r}"
        )

    def _check(self, x: Tensor, state: BlurryState | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.is_nested:
            raise NotImplementedError("x must not be a nested tensor: pad it and pass key_padding_mask")
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (B, T, {self.embed_dim}), got {tuple(x.shape)}")
        if state is not None:
            if not isinstance(state, BlurryState):
                raise TypeError(f"state must be a BlurryState, got {type(state).__name__}")
            if state.window != self.window:
                raise ValueError(f"state must have the window of this module ({self.window!r}), got {state.window!r}")
            if state.batch_size != x.shape[0]:
                raise ValueError(f"state must hold {x.shape[0]} sequences (B of x), got {state.batch_size}")

    @staticmethod
    def _check_mask(mask: Tensor, x: Tensor) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"key_padding_mask must be a tensor, got {type(mask).__name__}")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"key_padding_mask must be (B, T) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"key_padding_mask must be on the device of x ({x.device}), got {mask.device}")

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (B, H, T, D) of x (B, T, E), as views of the projections."""
        projected = []
        for name, heads in (("q_proj", self.num_heads), ("k_proj", self.num_kv_heads), ("v_proj", self.num_kv_heads)):
            features = getattr(self, name)(x)
            if features.shape[-1] != heads * self.head_dim:
                raise ValueError(
                    f"{name} must give {heads} * {self.head_dim} features, got {features.shape[-1]}; heads are divided "
                    "over ranks by blurry_attn.distributed.HeadParallel, or ColwiseParallel(use_local_output=False)"
                )
            projected.append(features.unflatten(-1, (heads, self.head_dim)).transpose(1, 2))
        query, key, value = projected
        if self.rope_base is not None:
            query, key = rotary(query, positions, self.rope_base), rotary(key, positions, self.rope_base)
        return query, key, value

    def _attend(
        self,
        x: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        state: BlurryState | None,
        return_state: bool,
    ) -> tuple[Tensor, BlurryState | None]:
        query, key, value = self._project(x, positions)
        result = blurry_window_attention(
            query,
            key,
            value,
            self.window,
            enable_gqa=True,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
        out, end = cast(tuple[Tensor, BlurryState], result) if return_state else (cast(Tensor, result), None)
        return self._merge(out), end

    def _merge(self, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _surely_merges(self, query: Tensor) -> bool:
        """Whether ``out_proj`` runs no code but nn.Linear's own, on weights that take a step's output."""
        module = self.out_proj
        if (
            getattr(module.forward, "__func__", None) is not nn.Linear.forward
            or module._forward_pre_hooks
            or module._forward_hooks
            or _has_any_global_hook()
        ):
            return False
        weight, bias, size = module.weight, module.bias, self.embed_dim
        return (
            weight.shape == (size, size)
            and (bias is None or bias.shape == (size,))
            and all(
                # A subclass may have a product of its own.
                type(x) is nn.Parameter
                and x.device == query.device
                and (x.dtype == query.dtype or torch.is_autocast_enabled(query.device.type))
                for x in (weight, bias)
                if x is not None
            )
        )


def _after(state: BlurryState | None, tokens: Tensor) -> Tensor:
    """Absolute positions of ``tokens``, (T,) or (B, T) counted from where each sequence of ``state`` stands."""
    if state is None:
        return tokens
    position = state.position.full_tensor() if hasattr(state.position, "full_tensor") else state.position
    return tokens + position.unsqueeze(1)
