"""What there is for a GPU: PyTorch's attention and FlexAttention, and flash-linear-attention's recurrences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import Attend, Case
from . import provider

FULL_ATTENTION_MAX = 131072
# The block mask is made from a mask of T x T, and every T is compiled anew.
FLEX_MAX = 16384


def _not_full(case: Case) -> str | None:
    if case.dtype == "float32":
        return "takes no float32"
    return f"not run beyond T = {FULL_ATTENTION_MAX}" if case.length > FULL_ATTENTION_MAX else None


def _not_flex(case: Case) -> str | None:
    return f"not run beyond T = {FLEX_MAX}" if case.length > FLEX_MAX else None


def causal_keys(case: Case) -> float:
    return (case.length + 1) / 2


def window_keys(window: int, case: Case) -> float:
    seen = min(window, case.length)
    return seen - seen * (seen - 1) / (2 * case.length)


def _sdpa(backend: str) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = getattr(SDPBackend, backend)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(only):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attend


@provider("cudnn", "full causal attention (SDPA, cuDNN)", skip=_not_full, keys=causal_keys)
def cudnn(case: Case) -> Attend:
    return _sdpa("CUDNN_ATTENTION")


@provider("flash", "full causal attention (SDPA, flash)", skip=_not_full, keys=causal_keys)
def flash(case: Case) -> Attend:
    return _sdpa("FLASH_ATTENTION")


@cache
def _flex_attention() -> Callable[..., Any]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = 64  # one for every length, window and mode
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def _sliding_window(length: int, window: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(sees, None, None, length, length, device="cuda")


def _flex(window: int, case: Case) -> Attend:
    return partial(_flex_attention(), block_mask=_sliding_window(case.length, window))


for _window in (64, 512):
    provider(
        f"flex{_window}",
        f"FlexAttention, sliding window of {_window}",
        skip=_not_flex,
        keys=partial(window_keys, _window),
    )(partial(_flex, _window))


TRIED = 4  # configurations of a Triton kernel of fla, which tries for many minutes if all are


@cache
def _fewer_configurations() -> None:
    """Before fla is imported: its kernels tune themselves over a few of the configurations that they name."""
    import triton

    tune = triton.autotune

    def autotune(configs: list[Any], *args: Any, **options: Any) -> Any:
        return tune(configs[:: -(-len(configs) // TRIED)], *args, **options)

    triton.autotune = autotune


def _gate_logits(case: Case, *last: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(case.batch, case.length, case.heads, *last, generator=generator, device="cuda")


# Gates are ready-made, and their gradients are computed too: the operators' backward passes leave none out.
@provider("gsa", "gated slot attention, {slots} slots (fla)", tokens_first=True)
def gsa(case: Case) -> Attend:
    _fewer_configurations()
    from fla.ops.gsa import chunk_gsa

    forget = functional.logsigmoid(_gate_logits(case, case.slots)) / 8  # as fla's layer makes them
    slots = (1 - forget.exp()).to(case.torch_dtype)
    forget = forget.to(case.torch_dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = chunk_gsa(query, key, value, slots, forget)[0]
        return out

    return attend


@provider("gated_delta", "gated delta rule (fla)", tokens_first=True)
def gated_delta(case: Case) -> Attend:
    _fewer_configurations()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    decay = functional.logsigmoid(_gate_logits(case))
    beta = _gate_logits(case).sigmoid().to(case.torch_dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = chunk_gated_delta_rule(query, key, value, decay, beta, use_qk_l2norm_in_kernel=True)[0]
        return out

    return attend
