"""Blurry window attention in Hugging Face transformers: an attention implementation and a cache of constant size.

>>> register(BlurryWindow(slots=64, window=512))
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="blurry_window")
>>> model.generate(**prompt, past_key_values=BlurryCache())
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from ..ops import blurry_window_attention, blurry_window_step
from ..ragged import Packing
from ..state import BlurryState
from ..window import BlurryWindow

_NOT_THE_KEYS_OF_THIS_CALL = (
    "blurry window attention takes the keys of this call's {query} tokens alone, got {key}: a cache that keeps keys, "
    "as generate() makes one, cannot be used; pass past_key_values=BlurryCache(), "
    "from blurry_attn.integrations.transformers"
)
_NO_WAY_BACK = (
    "a BlurryCache cannot be cropped: its slots blend tokens, and no token can be taken out again; so assisted and "
    "prompt lookup decoding, which take back the tokens that the model refuses, do not work with it"
)
# These options change the logits or the softmax in a way that the operator has no counterpart of.
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")


def register(window: BlurryWindow, name: str = "blurry_window") -> None:
    """Make ``attn_implementation=name`` run every full attention layer of a causal model in ``window``.

    Layers that the model itself gives a sliding window keep it, exactly.

    Args:
        window: of every full attention layer; where it is given per head, one entry per key/value head.
        name: what models are told to use; one for each window.

    Raises:
        TypeError: ``window`` is not a :class:`BlurryWindow`, or ``name`` not a string.
        ValueError: ``name`` stands for another window, or for another attention.
    """
    if not isinstance(window, BlurryWindow):
        raise TypeError(f"window must be a BlurryWindow, got {type(window).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    known = AttentionInterface().get(name)
    is_taken = known is not None or name in AttentionMaskInterface()
    if is_taken and getattr(known, "args", None) != (window,):
        raise ValueError(f"name {name!r} is taken: models that use it would change; choose another for {window}")
    AttentionInterface.register(name, partial(_attention, window))
    AttentionMaskInterface.register(name, _segments)


def convert(model: PreTrainedModel, window: BlurryWindow, name: str = "blurry_window") -> PreTrainedModel:
    """Switch a model, usually one trained with full attention, to ``window``; its weights stay as they are.

    Its loss rises, and falls again by training on as before.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no model of transformers; as :func:`register`.
        ValueError: as :func:`register`.
        NotImplementedError: the model has attention code of its own and does not ask for an implementation by name.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {type(model).__name__}")
    register(window, name)
    model.set_attn_implementation(name)
    if model.config.get_text_config(decoder=True)._attn_implementation != name:
        raise NotImplementedError(
            f"model must look its attention up by name (AttentionInterface); {type(model).__name__} does not"
        )
    return model


class BlurryCacheLayer(CacheLayerMixin):
    """What one attention layer remembers: a :class:`BlurryState`, once the first tokens have been seen."""

    # The window comes with the first call.
    supports_early_init = False

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.state: BlurryState | None = None
        # This number is that of every sequence and includes padding, which state.position does not.
        self.tokens = 0
        self.awaits_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first attention call makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce new tokens: the same tensors, the key marked so that the attention function finds this layer.

        Raises:
            RuntimeError: the tokens announced before never reached blurry window attention.
        """
        if self.awaits_attention:
            raise RuntimeError(
                "BlurryCache: the keys of the call before did not reach blurry window attention; the model must run "
                "with an attn_implementation made by register(), and hand it the keys as the cache returned them "
                "(reset() makes a cache new after a call that was broken off)"
            )
        self.awaits_attention = True
        key_states._blurry_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: BlurryWindow,
        scale: float | None,
        segments: Tensor | None,
    ) -> Tensor:
        """Attend after the history, and take the new tokens into it: ``(B, Hq, T, Dv)``.

        Raises:
            NotImplementedError: these keys are in the state already.
            ValueError: the state was made in another window.
        """
        if not self.awaits_attention:
            raise NotImplementedError("layers that share the keys of another layer cannot be used with a BlurryCache")
        if self.state is not None and self.state.window != window:
            raise ValueError(f"BlurryCache was filled in another window: {self.state.window}, now {window}")
        if self.state is not None and query.shape[2] == 1 and segments is None and not torch.is_grad_enabled():
            out = blurry_window_step(query, key, value, self.state, scale=scale, enable_gqa=True)
        else:
            out, self.state = _attend(query, key, value, window, scale, segments, self.state, return_state=True)
            self.state = cast(BlurryState, self.state).to(dtype=self.dtype)
        self.tokens += query.shape[2]
        self.awaits_attention = False
        return out

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.tokens

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first call."""
        return -1 if self.state is None else self.state.batch_size

    def reset(self) -> None:
        self.state, self.tokens, self.awaits_attention = None, 0, False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise NotImplementedError(_NO_WAY_BACK)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state[indices.to(self.state.key.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.key.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class BlurryCache(Cache):
    """The ``past_key_values`` of a model with blurry window attention; its size does not grow with the tokens seen.

    Starts empty, and goes on from call to call: prompts, single tokens and further turns in any order. To try several
    continuations of one beginning, ``copy.deepcopy`` it. Keys and values themselves are not kept, so it cannot be
    cropped.

    Args:
        dtype: of the slots; torch.bfloat16 takes about half the bytes (:class:`BlurryState`). None: as they come, in
            float32, or float64 where the model is.

    Raises:
        TypeError: another ``dtype``.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.bfloat16, float32 or float64, or None, got {dtype!r}")
        super().__init__(layer_class_to_replicate=partial(BlurryCacheLayer, dtype))  # type: ignore[arg-type]

    @property
    def states(self) -> tuple[BlurryState | None, ...]:
        """The state of each layer so far; None where a layer has not seen a token."""
        return tuple(cast(BlurryCacheLayer, layer).state for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots of all layers."""
        return sum(state.nbytes for state in self.states if state is not None)

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Not possible.

        Raises:
            NotImplementedError: always, with the reason.
        """
        raise NotImplementedError(_NO_WAY_BACK)

    def activate_past_recording(self) -> NoReturn:
        """Not possible: it announces a :meth:`crop`.

        Raises:
            NotImplementedError: always, with the reason.
        """
        raise NotImplementedError(_NO_WAY_BACK)


def _attention(
    window: BlurryWindow,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, Hq, T, Dk), key, value (B, Hkv, T, D) -> ((B, T, Hq, Dv), no weights)."""
    if key.shape[2] != query.shape[2]:
        raise ValueError(_NOT_THE_KEYS_OF_THIS_CALL.format(query=query.shape[2], key=key.shape[2]))
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"blurry window attention is causal; {type(module).__name__} is not")
    if dropout > 0:
        raise NotImplementedError(f"attention dropout must be 0: weights cannot be dropped, got {dropout}")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions must be False: there are no weights of tokens")
    for option in _REFUSED:
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"{option} must be None in {type(module).__name__}: it cannot be honoured")
    if attention_mask is not None and attention_mask.shape != (query.shape[0], query.shape[2]):
        raise NotImplementedError(
            f"attention_mask must be (B, T), 0 where a token is padding; got one of shape {tuple(attention_mask.shape)}"
        )
    if sliding_window is not None:
        window = BlurryWindow(sliding_window, sliding_window)
    config = getattr(module, "config", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if kv_heads is not None and kv_heads != key.shape[1]:
        window = _of_this_rank(window, module, kv_heads, key.shape[1])
    layer: BlurryCacheLayer | None = getattr(key, "_blurry_layer", None)
    if layer is not None:
        if cu_seq_lens_q is not None:
            raise NotImplementedError("cu_seq_lens_q must be None with a BlurryCache: packed sequences have no rows")
        out = layer.attend(query, key, value, window, scaling, attention_mask)
    elif cu_seq_lens_q is not None and attention_mask is None:
        packed = blurry_window_attention(
            query, key, value, window, scale=scaling, enable_gqa=True, cu_seqlens=cu_seq_lens_q
        )
        out = cast(Tensor, packed)
    else:
        out, _ = _attend(query, key, value, window, scaling, attention_mask, None, return_state=False)
    return out.transpose(1, 2), None


def _of_this_rank(window: BlurryWindow, module: nn.Module, kv_heads: int, local: int) -> BlurryWindow:
    """Where the model is tensor parallel: the windows and phases that the ``local`` heads have among all ``kv_heads``.

    Raises:
        NotImplementedError: heads that do not divide evenly over the ranks, or are sharded along several dimensions.
    """
    if not any(hasattr(weight, "device_mesh") for weight in module.parameters()):
        # The layer has so many heads of its own.
        return window
    from torch.distributed.tensor import DTensor, Shard

    ranks = {
        (weight.device_mesh.size(dim), weight.device_mesh.get_local_rank(dim))
        for weight in module.parameters()
        if isinstance(weight, DTensor)
        for dim, placement in enumerate(weight.placements)
        if isinstance(placement, Shard)
    }
    size, rank = ranks.pop() if len(ranks) == 1 else (0, 0)
    if local * size != kv_heads:
        raise NotImplementedError(
            f"the {kv_heads} kv heads of {type(module).__name__} must divide evenly over the ranks of one dimension of "
            f"the mesh, got {local} on this one"
        )
    # A size that is a symbol has no hash.
    return _of_heads(window, kv_heads, rank * int(local), int(local))


@lru_cache
def _of_heads(window: BlurryWindow, kv_heads: int, first: int, count: int) -> BlurryWindow:
    return window.of_heads(kv_heads, slice(first, first + count))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    scale: float | None,
    segments: Tensor | None,
    state: BlurryState | None,
    return_state: bool,
) -> tuple[Tensor, BlurryState | None]:
    """Attention within ``segments`` (see :func:`_segments`); zero at padding, which takes no place in the window."""
    packing = cu_seqlens = None
    if segments is not None:
        packing = Packing(segments == 0)
        changes = packing.pack(segments).squeeze(0).diff().nonzero().squeeze(1) + 1
        cu_seqlens = torch.cat((packing.cu_seqlens, changes)).sort().values
        query, key, value = (packing.pack(x, dim=2) for x in (query, key, value))
    result = blurry_window_attention(
        query,
        key,
        value,
        window,
        scale=scale,
        enable_gqa=True,
        cu_seqlens=cu_seqlens,
        state=state,
        return_state=return_state,
    )
    out, end = cast(tuple[Tensor, BlurryState], result) if return_state else (cast(Tensor, result), None)
    return (out if packing is None else packing.unpack(out, dim=2)), end


def _segments(
    batch_size: int,
    q_length: int,
    q_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: PretrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function: which of the T tokens belong together.

    Returns:
        ``(B, T)`` int64, 0 at padding and the same number at the tokens of one sequence; None: no padding, and one
        sequence per row.

    Raises:
        ValueError: an ``attention_mask`` of the wrong length, or a pattern that is not causal.
        NotImplementedError: a pattern of the model's own.
    """
    if use_vmap or (local_size is not None and getattr(config, "attention_chunk_size", None) is not None):
        raise NotImplementedError("blurry window attention has no other mask than padding, got a pattern of the model")
    segments = None
    if mask_function is not causal_mask_function and q_length > 1:
        # Neighbours tell sequences that are packed in a row: the first token of one does not see the one before it.
        row = torch.arange(batch_size, device=device).unsqueeze(1)
        later = torch.arange(1, q_length, device=device).unsqueeze(0) + q_offset
        if bool(mask_function(row, 0, later - 1, later).any()):
            raise ValueError("blurry window attention is causal, got a mask that lets tokens see later ones")
        starts = ~mask_function(row, 0, later, later - 1).expand(batch_size, q_length - 1)
        if bool(starts.any()):
            segments = nn.functional.pad(starts.cumsum(1), (1, 0)) + 1
    if attention_mask is not None:
        if attention_mask.shape[1] != q_offset + q_length:
            raise ValueError(
                f"attention_mask must cover the {q_offset} tokens seen before and the {q_length} of this call, "
                f"got {attention_mask.shape[1]}"
            )
        is_kept = attention_mask[:, q_offset:]
        if not bool(is_kept.all()):
            segments = is_kept.long() if segments is None else is_kept * segments
    return segments
