"""Anything that the interface takes, against the reference."""

from __future__ import annotations

import torch
from helpers import HALVES, assert_accurate, compute_dtype, make_inputs, make_state, relative_error, run
from hypothesis import given, settings
from hypothesis import strategies as st

from blurry_attn import BlurryState, BlurryWindow, backend, blurry_window_attention, blurry_window_step, reference

SIZES = st.one_of(st.integers(1, 9), st.integers(10, 70))
LENGTHS = st.one_of(st.integers(0, 5), st.integers(0, 90))
POSITIONS = st.one_of(st.integers(0, 60), st.integers(0, 2**40))
DTYPES = [torch.float64, torch.float32, *HALVES]


@st.composite
def windows(draw, kv_heads):
    kernel, slots = draw(st.sampled_from(["fejer", "dirichlet"])), draw(st.one_of(st.integers(2, 9), st.just(70)))
    resolutions = tuple(draw(st.sampled_from([1, 2, 3, 5, 7, 8, 13])) for _ in range(kv_heads))
    phases = st.none() | st.tuples(*(st.integers(0, r - 1) for r in resolutions))
    sharpness = st.none() if kernel == "dirichlet" else st.none() | st.floats(1, 20)
    if len(set(resolutions)) == 1 and draw(st.booleans()):
        return BlurryWindow(slots, slots * resolutions[0], kernel, draw(sharpness), draw(phases))
    return BlurryWindow.pyramid(slots, resolutions, kernel, draw(sharpness), draw(phases))


@st.composite
def calls(draw):
    """Keyword arguments of make_inputs, the window, positions of a given state or None, and other options."""
    kv_heads = draw(st.integers(1, 3))
    window, tokens, packed = draw(windows(kv_heads)), draw(LENGTHS), draw(st.booleans())
    options = {"scale": draw(st.none() | st.floats(-2, 2))}
    batch = 1 if packed else draw(st.integers(0, 2))
    sequences = batch
    if packed:
        ends = [0, *sorted(draw(st.lists(st.integers(0, tokens), max_size=3))), tokens]
        sequences = len(ends) - 1
        options["cu_seqlens"] = torch.tensor(ends, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    positions = draw(st.none() | st.lists(POSITIONS, min_size=sequences, max_size=sequences))
    shape = {"kv_heads": kv_heads, "dim": draw(SIZES), "value_dim": draw(SIZES)}
    return (
        {"batch": batch, "heads": kv_heads * draw(st.integers(1, 3)), "tokens": tokens, **shape},
        window,
        positions,
        options,
    )


LAYOUTS = st.tuples(*3 * [st.sampled_from([
    lambda x: x,
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    lambda x: torch.stack((x, x), -1)[..., 0],
    lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0))[..., 3:, 1:-2],
    lambda x: x[:, :, :1].expand_as(x),
])])  # fmt: skip


@settings(max_examples=150)
@given(calls(), st.sampled_from(DTYPES), LAYOUTS, st.integers(0, 1000))
def test_against_the_reference(device, call, dtype, layouts, seed):
    shape, window, positions, options = call
    inputs, exact = make_inputs(**shape, dtype=dtype, seed=seed), torch.float64
    inputs = [layout(x) for layout, x in zip(layouts, inputs, strict=True)]
    state = None
    if positions is not None:
        sizes = {name: shape[name] for name in ("kv_heads", "dim", "value_dim")}
        state = make_state(window, positions, **sizes, dtype=dtype, seed=seed + 1)
    differentiable = shape["batch"] > 0 and shape["tokens"] > 0
    expected = run(reference.blurry_window_attention, *(x.to(exact) for x in inputs), window,
                   state=None if state is None else state.to(exact), gradients=differentiable, **options)  # fmt: skip
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = [x.to(device) for x in inputs]
    actual = run(blurry_window_attention, *inputs, window, state=None if state is None else state.to(device),
                 gradients=differentiable, **moved)  # fmt: skip
    if dtype not in HALVES:
        assert_accurate(actual, expected, dtype, window)
        return
    # Float32 inside, then the output is rounded; on a card's tensor cores what slots hold is rounded, too.
    rounded = device.type == "cuda" and not backend(*inputs, window).startswith("scan")
    eps = torch.finfo(dtype).eps
    bounds = {"out": 2 * eps, "lse": 2 * eps} if rounded else {"out": eps, "lse": 1e-5}
    for name, bound in {**bounds, "end_key": 1e-5, "end_value": 1e-5}.items():
        error = relative_error(actual[name], expected[name])
        assert error <= bound, f"{name}: {error:.2e}"


@settings(max_examples=50)
@given(st.data(), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 1000))
def test_step_against_the_reference(device, data, dtype, seed):
    kv_heads = data.draw(st.integers(1, 3))
    window, positions = data.draw(windows(kv_heads)), data.draw(st.lists(POSITIONS, max_size=3))
    dim, value_dim, group = data.draw(SIZES), data.draw(SIZES), data.draw(st.integers(1, 3))
    inputs = make_inputs(len(positions), group * kv_heads, kv_heads, 1, dim, value_dim, dtype, seed=seed)
    state = make_state(window, positions, kv_heads, dim, value_dim, dtype, seed=seed + 1)
    expected = run(reference.blurry_window_attention, *inputs, window, state=state, gradients=False)
    state = BlurryState(*(x.to(device, copy=True) for x in (state.key, state.value, state.position)), window)
    out = blurry_window_step(*(x.to(device) for x in inputs), state, enable_gqa=True)
    assert out.dtype == dtype and state.key.dtype == compute_dtype(dtype)
    actual = {"out": out, "end_key": state.key, "end_value": state.value, "position": state.position}
    assert_accurate(actual, {name: expected[name] for name in actual}, dtype, window)
