"""Running an unchanged model with blurry window attention."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mha
from torch.overrides import TorchFunctionMode

from .modules import BlurryWindowAttention
from .window import BlurryWindow

_SDPA = {
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}
# These other operators attend. They are known by name, as what registers them need not be loaded. Their backwards may
# run, since they belong to calls from outside of the context.
_OTHERS = (
    "_cudnn_attention_forward",
    "_efficient_attention_forward",
    "_flash_attention_forward",
    "_flash_attention_forward_no_dropout_inplace",
    "_fused_sdp_choice",
    "_native_multi_head_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_transformer_encoder_layer_fwd",
    "_triton_multi_head_attention",
    "_triton_scaled_dot_attention",
    "_varlen_attn",
    "_varlen_attn_out",
    "flex_attention",
)
_REFUSED = {name + overload for name in _OTHERS for overload in ("", ".default", ".out", ".quantized")}
_MULTI_HEAD_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _opened(function: Any) -> Callable[..., Any]:
    """A Python function of PyTorch without its hand-over to modes, which would hide the calls inside it from them."""
    never = {"has_torch_function": lambda tensors: False, "has_torch_function_unary": lambda tensor: False}
    body = FunctionType(
        function.__code__,
        {**function.__globals__, **never},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


# The backwards are among them, since they run the model's forward again where activations are checkpointed.
_OPENED = {
    function: _opened(function)
    for function in (
        F.multi_head_attention_forward,
        Tensor.backward,
        torch.autograd.backward,
        torch.autograd.grad,
    )
}


class replace_sdpa(TorchFunctionMode):
    """Context in which a model's causal ``scaled_dot_product_attention`` calls run blurred, the model unchanged.

    >>> with blurry_attn.replace_sdpa(window):
    ...     model(x)

    It reaches every call that goes through PyTorch's Python interface, whatever name it was imported by, and those
    inside ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` (whose fused fast path is off until the last
    such context ends). A call counts as causal with ``is_causal=True``, or with an ``attn_mask`` that is exactly the
    causal mask: boolean, or 0 and -inf (or the dtype's lowest number). Any other call is an error, never full
    attention, and so are FlexAttention, ``varlen_attn`` and PyTorch's fused operators under their own names. Attention
    written out as products and a softmax, or by another package's kernels, is not seen.

    It holds in code under ``torch.compile`` too: enter it around the call of the compiled model.

    Contexts nest (the inner one is in force) and may be entered again. As every mode of PyTorch, a context holds in
    the thread that entered it; calls from C++ and TorchScript do not pass it. A model with activation checkpointing
    runs its forward again in the backward: call ``backward()`` inside the context too.

    Args:
        window: the window of every replaced call; given per head, every call needs that many key/value heads.

    Raises:
        ValueError: a call that is not causal, asks for attention weights, or has a key length unlike its query length.
        NotImplementedError: an ``attn_mask`` other than causal, ``dropout_p > 0``, nested tensors, or an operator that
            attends by another name, as FlexAttention.
    """

    def __init__(self, window: BlurryWindow) -> None:
        super().__init__()
        self.attention = BlurryWindowAttention(window)

    def __enter__(self) -> replace_sdpa:
        _FastPath.turn_off()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        _FastPath.restore()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SDPA:
            return self._attend(*args, **kwargs)
        name = getattr(func, "__name__", None)
        if name in _REFUSED:
            raise NotImplementedError(f"replace_sdpa: cannot replace {name}, only scaled_dot_product_attention")
        if func is F.multi_head_attention_forward:
            call = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
            call.apply_defaults()
            if call.arguments["need_weights"]:
                raise ValueError(
                    "replace_sdpa: need_weights must be False in multi_head_attention_forward: "
                    "blurry window attention has no attention weights"
                )
        # Inside a mode torch.compile can trace the function, and not the method.
        if func is Tensor.unflatten:
            func = torch.unflatten
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None:
            if not _is_causal(attn_mask, query.shape[-2], key.shape[-2]):
                raise NotImplementedError(
                    "replace_sdpa: attn_mask must be None or exactly the causal mask, got another mask of shape "
                    f"{tuple(attn_mask.shape)} for query length {query.shape[-2]} and key length {key.shape[-2]}"
                )
        elif not is_causal:
            raise ValueError(
                "replace_sdpa: is_causal must be True: cannot replace a scaled_dot_product_attention call that is not "
                f"causal (query {tuple(query.shape)}, key {tuple(key.shape)}, no attn_mask)"
            )
        return self.attention(query, key, value, None, dropout_p, True, scale, enable_gqa)


class _FastPath:
    """PyTorch's one switch of the transformer fast path, off while any thread is in a context."""

    lock = threading.Lock()
    users = 0
    before = True

    @classmethod
    def turn_off(cls) -> None:
        with cls.lock:
            if cls.users == 0:
                cls.before = mha.get_fastpath_enabled()
            cls.users += 1
            mha.set_fastpath_enabled(False)

    @classmethod
    def restore(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if cls.users == 0:
                mha.set_fastpath_enabled(cls.before)


def _is_causal(mask: Tensor, query_length: int, key_length: int) -> bool:
    """Whether ``mask`` lets every query see exactly its own and earlier keys, and is not learned."""
    if type(mask) is not Tensor:
        # This module takes a second to load.
        from torch.nn.attention.bias import CausalBias

        if isinstance(mask, CausalBias):
            return mask.seq_len_q == mask.seq_len_kv == query_length == key_length
    if mask.requires_grad or mask.shape[-2:] != (query_length, key_length) or query_length != key_length:
        return False
    is_seen = torch.ones(query_length, key_length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == is_seen).all())
    if not mask.is_floating_point():
        return False
    return bool(torch.where(is_seen, mask == 0, mask <= torch.finfo(mask.dtype).min).all())
