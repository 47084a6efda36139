"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators.

A product and a sum count as two, as for PyTorch's own operators; softmax and gates count as nothing. Per token, a query
head of N slots and r tokens per slot counts, with D = Dk + Dv:

- 2 N D for the products with the slots;
- for "fejer" min(3 r, 10) D for the two slots in flux, as a band of r tokens or as running contents;
- for "dirichlet" 3 N D, once per kv head, since every slot takes every token.

The backward counts 2.5 times the former two (it recomputes the logits, and each product has two gradients), and
"dirichlet" slots twice: forward again, and back. A step counts as a forward of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_Shape = Sequence[int]


def _count(
    query: _Shape, key: _Shape, value: _Shape, slots: int, window: Sequence[int], kernel: str, backward: bool
) -> int:
    tokens, features = query[0] * query[2], key[3] + value[3]
    group = query[1] // max(key[1], 1)
    # Both are counted per token, in units of D.
    attend, write = 0, 0
    for period in window:
        attend += 2 * slots * group
        if kernel == "fejer":
            attend += min(3 * (period // slots), 10) * group
        else:
            write += 3 * slots
    work = 5 * attend // 2 + 2 * write if backward else attend + write
    return tokens * features * work


@register_flop_formula(torch.ops.blurry_attn.forward)
def _forward(
    query: _Shape,
    key: _Shape,
    value: _Shape,
    slots: int,
    window: Sequence[int],
    phase: Any,
    kernel: str,
    *_: Any,
    **__: Any,
) -> int:
    return _count(query, key, value, slots, window, kernel, backward=False)


@register_flop_formula(torch.ops.blurry_attn.step)
def _step(
    query: _Shape,
    key: _Shape,
    value: _Shape,
    state_key: Any,
    state_value: Any,
    position: Any,
    slots: int,
    window: Sequence[int],
    phase: Any,
    kernel: str,
    *_: Any,
    **__: Any,
) -> int:
    return _count(query, key, value, slots, window, kernel, backward=False)


@register_flop_formula(torch.ops.blurry_attn.backward)
def _backward(
    grad_out: Any,
    grad_lse: Any,
    grad_state_key: Any,
    grad_state_value: Any,
    query: _Shape,
    key: _Shape,
    value: _Shape,
    slots: int,
    window: Sequence[int],
    phase: Any,
    kernel: str,
    *_: Any,
    **__: Any,
) -> int:
    return _count(query, key, value, slots, window, kernel, backward=True)
