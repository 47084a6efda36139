"""Inputs, an oracle that is fast enough for long sequences, and the one measure of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, reference

WINDOWS = {
    "fejer": BlurryWindow(4, 16),
    "dirichlet": BlurryWindow(4, 16, "dirichlet"),
}
KERNELS = tuple(WINDOWS)
HALVES = (torch.bfloat16, torch.float16)
BLOCK = 64  # tokens over which an error is taken
FLOOR = 1e-2  # RMS of a block below which its error counts as absolute, in units of this
LSE_FLOOR = 1.0  # the same for lse, a logarithm: its absolute error is the relative error of the sum


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the state and of lse."""
    return torch.promote_types(dtype, torch.float32)


def randn(*shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """The same numbers, up to rounding, for every dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).to(device)


def make_inputs(
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    tokens: int = 50,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value."""
    shapes = [(heads, dim), (kv_heads or heads, dim), (kv_heads or heads, value_dim or dim)]
    query, key, value = (
        randn(batch, h, tokens, d, dtype=dtype, device=device, seed=3 * seed + i) for i, (h, d) in enumerate(shapes)
    )
    return query, key, value


def make_state(
    window: BlurryWindow,
    position: Sequence[int],
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 100,
) -> BlurryState:
    """A state with numbers in every slot, shut ones too: one sequence per position."""
    dtype, shape = compute_dtype(dtype), (len(position), kv_heads, window.slots)
    return BlurryState(
        randn(*shape, dim, dtype=dtype, device=device, seed=seed),
        randn(*shape, value_dim or dim, dtype=dtype, device=device, seed=seed + 1),
        torch.tensor(position, dtype=torch.int64, device=device),
        window,
    )


def shut_slots(window: BlurryWindow, position: Sequence[int], kv_heads: int) -> Tensor:
    """(sequences, kv_heads, slots) bool: the slots that no token of the first `position` ones has opened."""
    heads = list(zip(window.resolutions(kv_heads), window.phases(kv_heads), strict=True))
    opens = [[reference.opening(m, window.slots, r, phase) for m in range(window.slots)] for r, phase in heads]
    return torch.tensor(opens) >= torch.tensor(position).reshape(-1, 1, 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """For loops of many small operations, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    attend: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    *,
    state: BlurryState | None = None,
    gradients: bool = True,
    **options: object,
) -> dict[str, Tensor]:
    """All that a call returns, and the gradients through all of it of all that it is given."""
    leaves = {"query": query, "key": key, "value": value}
    if state is not None:
        leaves |= {"state_key": state.key, "state_value": state.value}
    leaves = {name: leaf.detach().requires_grad_(gradients) for name, leaf in leaves.items()}
    if state is not None:
        state = BlurryState(leaves["state_key"], leaves["state_value"], state.position, state.window)
    with nullcontext() if attend is blurry_window_attention else one_thread():
        out, lse, end = attend(
            *(leaves[name] for name in ("query", "key", "value")),
            window,
            state=state,
            enable_gqa=True,
            return_lse=True,
            return_state=True,
            **options,
        )
        results = {"out": out, "lse": lse, "end_key": end.key, "end_value": end.value}
        found = {name: result.detach() for name, result in results.items()} | {"position": end.position}
        if gradients:
            cotangents = [
                randn(*x.shape, dtype=x.dtype, device=x.device, seed=200 + i) for i, x in enumerate(results.values())
            ]
            grads = torch.autograd.grad(list(results.values()), list(leaves.values()), cotangents)
            found |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


@lru_cache(maxsize=64)
def _gates(window: BlurryWindow, head_window: int, phase: int, start: int, length: int) -> Tensor:
    return reference.gates(window, head_window, phase, start, length)


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: BlurryWindow,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    state: BlurryState | None = None,
    return_lse: bool = True,
    return_state: bool = True,
) -> tuple[Tensor, Tensor, BlurryState]:
    """The law as one loop over tokens for all sequences and heads at once, every number in the dtype of the inputs."""
    batch, kv_heads, tokens, dim = key.shape
    dtype, scale = query.dtype, 1 / math.sqrt(dim) if scale is None else scale
    start = [0] * batch if state is None else state.position.tolist()
    heads = list(zip(window.windows(kv_heads), window.phases(kv_heads), strict=True))
    share = torch.stack([torch.stack([_gates(window, *head, s, tokens) for head in heads]) for s in start])
    shut, share = share.isnan(), share.nan_to_num(0.0).to(dtype).unsqueeze(-1)
    if state is None:
        slots = [x.new_zeros(batch, kv_heads, window.slots, x.shape[-1]) for x in (key, value)]
    else:
        kept = ~shut_slots(window, start, kv_heads).unsqueeze(-1)
        slots = [torch.where(kept, x.to(dtype), 0.0) for x in (state.key, state.value)]
    query = query.reshape(batch, kv_heads, -1, tokens, dim)
    outs, lses = [], []
    for q, k, v, gate, closed in zip(
        *(x.unbind(-2) for x in (query, key, value)), share.unbind(2), shut.unbind(2), strict=True
    ):
        slots = [x + gate * (new.unsqueeze(-2) - x) for x, new in zip(slots, (k, v), strict=True)]
        logits = (scale * (q @ slots[0].mT)).masked_fill(closed.unsqueeze(2), -math.inf)
        outs.append(torch.softmax(logits, -1) @ slots[1])
        lses.append(torch.logsumexp(logits, -1))
    out, lse = torch.stack(outs, 3).flatten(1, 2), torch.stack(lses, 3).flatten(1, 2)
    work = compute_dtype(dtype)
    end = BlurryState(slots[0].to(work), slots[1].to(work), torch.tensor(start) + tokens, window)
    return out, lse.to(work), end


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error of the worst block: 64 tokens (or slots) of one head of one sequence."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    a, b = (x.detach().to("cpu", torch.float64) for x in (actual, expected))
    floor = FLOOR
    if b.dim() == 3:  # lse
        a, b, floor = a.unsqueeze(-1), b.unsqueeze(-1), LSE_FLOOR
    worst = 0.0
    for x, y in zip(a.split(BLOCK, -2), b.split(BLOCK, -2), strict=True):
        error = (x - y).square().mean((-1, -2)).sqrt() / y.square().mean((-1, -2)).sqrt().clamp_min(floor)
        worst = max(worst, error.nan_to_num(math.inf, math.inf).max().item())
    return worst


def tolerance(name: str, dtype: torch.dtype, window: BlurryWindow) -> float:
    """The bound of a result called `name`, in float64 or float32."""
    if dtype == torch.float64:
        return 1e-12
    entries = window.window if isinstance(window.window, tuple) else (window.window,)
    grows = window.kernel == "dirichlet" and max(entries) >= 16 * window.slots
    return (1e-4 if name.startswith("grad_") else 1e-5) * (10 if grows else 1)


def assert_accurate(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, window: BlurryWindow
) -> None:
    """Each result of `run` within the bound of its dtype, float64 or float32."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        if name == "position":
            assert x.tolist() == expected[name].tolist()
        else:
            error, bound = relative_error(x, expected[name]), tolerance(name, dtype, window)
            assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.0e}"


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the last bit, result by result; NaN equals NaN."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.dtype == expected[name].dtype, name
        assert torch.equal(x.nan_to_num(12345.0), expected[name].nan_to_num(12345.0)), name


def history_weights(
    attend: Callable, window: BlurryWindow, tokens: int, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight of each token in each output (heads, tokens, tokens) and each final slot (heads, slots, tokens)."""
    query, key, _ = make_inputs(1, kv_heads, None, tokens, 8, dtype=dtype, device=device)
    one_hot = torch.eye(tokens, dtype=dtype, device=device).expand(1, kv_heads, -1, -1)
    out, state = attend(query, key, one_hot, window, return_state=True)
    return out[0], state.value[0]
