"""Blurry window attention in plain PyTorch, token by token from the law: what every kernel is tested against.

Written from the law alone, it shares no arithmetic with the C++ sources. It is slow and keeps all that autograd needs.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .state import BlurryState
from .window import BlurryWindow


def dirichlet(x: int, slots: int, window: int) -> float:
    """The cardinal Dirichlet kernel D(x) of ``slots`` samples over ``window``: 1 at 0 and 0 at the other samples."""
    x %= window
    if x % (window // slots) == 0:
        return 1.0 if x == 0 else 0.0
    angle = math.pi * x / window
    denominator = math.sin(angle) if slots % 2 else math.tan(angle)
    return math.sin(slots * angle) / (slots * denominator)


def gate(token: int, slot: int, window: BlurryWindow, head_window: int, phase: int) -> float:
    """The share of ``token`` that an open ``slot`` takes, before openings are considered."""
    resolution = head_window // window.slots
    offset = (token - slot * resolution - phase) % head_window
    if window.kernel == "dirichlet":
        return dirichlet(offset, window.slots, head_window)
    if offset >= head_window - resolution:
        offset -= head_window
    if abs(offset) >= resolution:
        return 0.0
    return min(1.0, window.gate_sharpness / resolution * dirichlet(offset, window.slots, head_window) ** 2)


def opening(slot: int, slots: int, resolution: int, phase: int) -> int:
    """The token that opens ``slot``: the first in the lobe of one of its cells. It is written whole."""
    cell = -1 if slot == slots - 1 and phase > 0 else slot
    return max(0, cell * resolution + phase - resolution + 1)


def gates(window: BlurryWindow, head_window: int, phase: int, start: int, length: int) -> Tensor:
    """Gates of tokens start .. start + length - 1 with openings: (length, slots), float64; NaN where a slot is shut."""
    slots, resolution = window.slots, head_window // window.slots
    rows = []
    for token in range(start, start + length):
        row = []
        for slot in range(slots):
            opens = opening(slot, slots, resolution, phase)
            if token <= opens:
                row.append(1.0 if token == opens else math.nan)
            else:
                row.append(gate(token, slot, window, head_window, phase))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(length, slots)


def _write(content: Tensor, token: Tensor, share: Tensor) -> Tensor:
    """content + share (token - content); a share of exactly 1 replaces and one of exactly 0 leaves, unread."""
    token = token.unsqueeze(-2)
    share = share.unsqueeze(-1)
    taken = (share == share) & (share != 0)
    safe_content = torch.where(taken & (share != 1), content, torch.zeros_like(content))
    safe_token = torch.where(taken, token, torch.zeros_like(token))
    mixed = safe_content + share.nan_to_num(0.0) * (safe_token - safe_content)
    return torch.where(taken, torch.where(share == 1, safe_token, mixed), content)


def _head(
    q: Tensor, k: Tensor, v: Tensor, slots: tuple[Tensor, Tensor], share: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One kv head of one sequence: q (G, T, Dk), k (T, Dk), v (T, Dv), slots (N, Dk) and (N, Dv), share (T, N)."""
    key, value = slots
    outs, lses = [], []
    for t in range(k.shape[0]):
        key = _write(key, k[t], share[t])
        value = _write(value, v[t], share[t])
        is_open = share[t] == share[t]
        logits = scale * (q[:, t] @ key[is_open].T)
        lse = torch.logsumexp(logits, dim=-1)
        outs.append(torch.softmax(logits, dim=-1) @ value[is_open])
        lses.append(lse)
    if not outs:
        return q.new_zeros(q.shape[0], 0, v.shape[-1]), q.new_zeros(q.shape[0], 0), key, value
    return torch.stack(outs, 1), torch.stack(lses, 1), key, value


def blurry_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    state: BlurryState | None = None,
    return_state: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple:
    """As :func:`blurry_attn.blurry_window_attention`, in plain PyTorch: any device, differentiable through autograd."""
    kv_heads, head_dim, value_dim = key.shape[1], key.shape[-1], value.shape[-1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    work = torch.promote_types(query.dtype, torch.float32)
    if cu_seqlens is None:
        sequences = [(row, slice(0, query.shape[2])) for row in range(query.shape[0])]
    else:
        ends = cu_seqlens.tolist()
        sequences = [(0, slice(begin, end)) for begin, end in pairwise(ends)]
    group = query.shape[1] // kv_heads
    windows, phases = window.windows(kv_heads), window.phases(kv_heads)

    out = query.new_zeros(*query.shape[:-1], value_dim)
    lse = query.new_zeros(query.shape[:-1], dtype=work)
    outs, lses, keys, values = [], [], [], []
    for sequence, (row, span) in enumerate(sequences):
        start = 0 if state is None else int(state.position[sequence])
        for head in range(kv_heads):
            share = gates(window, windows[head], phases[head], start, span.stop - span.start).to(query.device, work)
            if state is None:
                slots = tuple(key.new_zeros(window.slots, dim, dtype=work) for dim in (head_dim, value_dim))
            else:
                resolution = windows[head] // window.slots
                opens = [opening(m, window.slots, resolution, phases[head]) for m in range(window.slots)]
                is_open = (torch.tensor(opens, device=query.device) < start).unsqueeze(-1)
                given = tuple(slots[sequence, head].to(work) for slots in state._contents())
                slots = tuple(torch.where(is_open, x, torch.zeros_like(x)) for x in given)
            head_out, head_lse, head_key, head_value = _head(
                query[row, head * group : (head + 1) * group, span].to(work),
                key[row, head, span].to(work),
                value[row, head, span].to(work),
                (slots[0], slots[1]),
                share,
                scale,
            )
            outs.append(head_out)
            lses.append(head_lse)
            keys.append(head_key)
            values.append(head_value)
    count = len(sequences)
    if count:
        # Lists over (sequence, head) become (batch, heads, tokens, ...): sequences lie along the batch, or packed.
        join = torch.stack if cu_seqlens is None else lambda rows: torch.cat(rows, 1).unsqueeze(0)
        out = join([torch.cat(outs[i : i + kv_heads]) for i in range(0, len(outs), kv_heads)])
        lse = join([torch.cat(lses[i : i + kv_heads]) for i in range(0, len(lses), kv_heads)])
    results: list = [out.to(query.dtype)]
    if return_lse:
        results.append(lse)
    if return_state:
        shape = (count, kv_heads, window.slots)
        ends = [torch.stack(x) if count else key.new_zeros(0, dtype=work) for x in (keys, values)]
        lengths = [span.stop - span.start for _, span in sequences]
        position = torch.tensor(lengths, dtype=torch.int64, device=query.device) + (
            0 if state is None else state.position
        )
        results.append(
            BlurryState(ends[0].reshape(*shape, head_dim), ends[1].reshape(*shape, value_dim), position, window)
        )
    return results[0] if len(results) == 1 else tuple(results)
