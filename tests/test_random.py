"""Anything that the interface takes, against the reference."""

from __future__ import annotations

import torch
from helpers import assert_accurate, make_inputs, make_state, run
from hypothesis import given, settings
from hypothesis import strategies as st

from blurry_attn import BlurryWindow, blurry_window_attention, reference

SIZES = st.integers(1, 9)
LENGTHS = st.one_of(st.integers(0, 5), st.integers(0, 70))
POSITIONS = st.one_of(st.integers(0, 40), st.integers(0, 2**40))


@st.composite
def calls(draw):
    """Keyword arguments of make_inputs, the window, positions of a given state or None, and other options."""
    kv_heads, kernel = draw(st.integers(1, 3)), draw(st.sampled_from(["fejer", "dirichlet"]))
    slots = draw(st.integers(2, 9))
    resolutions = draw(st.lists(st.integers(1, 12), min_size=kv_heads, max_size=kv_heads))
    phases = st.none() | st.tuples(*(st.integers(0, r - 1) for r in resolutions))
    sharpness = st.none() | st.floats(1, 20)
    window = BlurryWindow.pyramid(
        slots, resolutions, kernel, None if kernel == "dirichlet" else draw(sharpness), draw(phases)
    )
    tokens, packed = draw(LENGTHS), draw(st.booleans())
    options = {"scale": draw(st.none() | st.floats(-2, 2))}
    if packed:
        cuts = draw(st.lists(st.integers(0, tokens), max_size=3))
        ends = [0, *sorted(cuts), tokens]
        options["cu_seqlens"] = torch.tensor(ends, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    batch = 1 if packed else draw(st.integers(0, 2))
    sequences = len(ends) - 1 if packed else batch
    positions = draw(st.none() | st.lists(POSITIONS, min_size=sequences, max_size=sequences))
    shape = {"kv_heads": kv_heads, "dim": draw(SIZES), "value_dim": draw(SIZES)}
    heads = kv_heads * draw(st.integers(1, 3))
    return {"batch": batch, "heads": heads, "tokens": tokens, **shape}, window, positions, options


@settings(max_examples=120)
@given(calls(), st.integers(0, 1000))
def test_against_the_reference(device, call, seed):
    shape, window, positions, options = call
    inputs = make_inputs(**shape, device=device, seed=seed)
    state = None
    if positions is not None:
        sizes = {name: shape[name] for name in ("kv_heads", "dim", "value_dim")}
        state = make_state(window, positions, **sizes, device=device)
    if "cu_seqlens" in options:
        options = options | {"cu_seqlens": options["cu_seqlens"].to(device)}
    if window.kernel == "dirichlet" and positions is not None:
        # A given state of any size grows as the law says: the bound is on what the recurrence itself keeps.
        state.key.mul_(0.1)
    gradients = shape["batch"] > 0 and shape["tokens"] > 0
    actual = run(blurry_window_attention, *inputs, window, state=state, gradients=gradients, **options)
    expected = run(reference.blurry_window_attention, *inputs, window, state=state, gradients=gradients, **options)
    assert_accurate(actual, expected, torch.float64, window)
