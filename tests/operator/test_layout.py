"""Layout and order never change a bit: strides, packing, batch mates, threads, reruns."""

from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import KERNELS, assert_same_bits, make_inputs, make_state, run
from torch.profiler import ProfilerActivity, profile

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MIXED = {
    "fejer": BlurryWindow(5, (5, 20, 45)),
    "dirichlet": BlurryWindow(5, (5, 20, 45), "dirichlet"),
}
STATES = ("end_key", "end_value", "position", "grad_state_key", "grad_state_value")

VIEWS = {
    "(B, T, H, D)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "(T, H, B, D)": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "(B, H, D, T)": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2],
    "part of a larger one": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4), value=torch.nan)[..., 1:-4, 3:-2],
    "negative bit": lambda x: torch._neg_view(-x),
}


def setup(kernel, dtype=torch.float32, device="cpu", tokens=150, batch=2):
    window = MIXED[kernel]
    inputs = make_inputs(batch, 6, 3, tokens, 12, 20, dtype, device)
    return window, inputs, make_state(window, [3, 1000, 0, 17][:batch], 3, 12, 20, dtype, device)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strided(kernel, dtype, view, device):
    window, inputs, state = setup(kernel, dtype, device)
    expected = run(blurry_window_attention, *inputs, window, state=state)
    strided = [VIEWS[view](x) for x in inputs]
    slots = [VIEWS[view](x) for x in (state.key, state.value)]
    actual = run(blurry_window_attention, *strided, window, state=BlurryState(*slots, state.position, window))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "heads", "tokens", "features"])
def test_expanded(kernel, dim, device):
    """Stride 0, of each input alone and of all."""
    window, inputs, _ = setup(kernel, device=device)
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        expanded = [x.narrow(dim, 0, 1).expand_as(x) if i in which else x for i, x in enumerate(inputs)]
        actual = run(blurry_window_attention, *expanded, window)
        assert_same_bits(actual, run(blurry_window_attention, *(x.contiguous() for x in expanded), window))


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_projection_for_all(kernel, device):
    """query, key and value as parts of one tensor, as a fused projection gives them."""
    fused = torch.stack(make_inputs(2, 3, None, 90, 8, dtype=torch.float32, device=device), 3)  # (B, H, T, 3, D)
    parts = fused.permute(0, 2, 3, 1, 4).contiguous().permute(2, 0, 3, 1, 4).unbind(0)
    expected = run(blurry_window_attention, *(x.contiguous() for x in parts), MIXED[kernel])
    assert_same_bits(run(blurry_window_attention, *parts, MIXED[kernel]), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_transposed_inputs_are_read_in_place(kernel, device):
    window, inputs, _ = setup(kernel, device=device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        blurry_window_attention(*strided, window, enable_gqa=True)
    names = {event.key for event in profiler.key_averages()}
    assert "blurry_attn::forward" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_beyond_32_bits(kernel, device, tmp_path: Path):
    """Tokens lie so far apart that elements are more than 2^31 from the first: a sparse file on the CPU."""
    tokens, dim, step = 40, 8, 2**26
    inputs = make_inputs(1, 1, None, tokens, dim, dtype=torch.bfloat16, device=device)
    window = BlurryWindow(5, 20, kernel)
    size = tokens * step
    if device.type == "cpu":
        with open(tmp_path / "sparse", "w+b") as file:
            file.truncate(2 * size)
            memory = mmap.mmap(file.fileno(), 2 * size)
        buffer = torch.frombuffer(memory, dtype=torch.bfloat16)
    else:
        torch.utils.deterministic.fill_uninitialized_memory = False
        buffer = torch.empty(size, dtype=torch.bfloat16, device=device)
        torch.utils.deterministic.fill_uninitialized_memory = True
    far = [buffer[i * dim :].as_strided((1, 1, tokens, dim), (size, size, step, 1)) for i in range(3)]
    for x, content in zip(far, inputs, strict=True):
        x.copy_(content)
    assert_same_bits(run(blurry_window_attention, *far, window), run(blurry_window_attention, *inputs, window))


def select(results, heads=slice(None), tokens=slice(None), sequence=slice(None)):
    """The part of results that belongs to some heads, tokens and one sequence of the states."""
    return {
        name: x[sequence] if name in STATES else x[:, heads, tokens] if name == "lse" else x[:, heads, tokens, :]
        for name, x in results.items()
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("ends", [[0, 40, 41, 41, 300], [0, 0, 1, 129, 300], [0, 300, 300, 300, 300]], ids=str)
def test_packed_sequences_have_the_bits_of_each_alone(kernel, dtype, stated, ends, device):
    window = MIXED[kernel]
    inputs = make_inputs(1, 6, 3, 300, 12, 20, dtype, device)
    state = make_state(window, [3, 1000, 0, 17], 3, 12, 20, dtype, device) if stated else None
    for index_dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(ends, dtype=index_dtype, device=device)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse, end = blurry_window_attention(*leaves, window, enable_gqa=True, state=state, cu_seqlens=cu_seqlens,
                                                return_lse=True, return_state=True)  # fmt: skip
        (out.sum() + lse.sum() + end.key.sum() + end.value.sum()).backward()
        for s, (a, b) in enumerate(pairwise(ends)):
            alone = [x[:, :, a:b].detach().requires_grad_() for x in inputs]
            part = state and BlurryState(*(x[s : s + 1] for x in (state.key, state.value, state.position)), window)
            o, z, e = blurry_window_attention(*alone, window, enable_gqa=True, state=part, return_lse=True,
                                              return_state=True)  # fmt: skip
            (o.sum() + z.sum() + e.key.sum() + e.value.sum()).backward()
            assert torch.equal(out[:, :, a:b], o) and torch.equal(lse[:, :, a:b], z)
            for name in ("key", "value", "position"):
                assert torch.equal(getattr(end, name)[s : s + 1], getattr(e, name))
            for x, y in zip(leaves, alone, strict=True):
                assert torch.equal(x.grad[:, :, a:b], y.grad)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_and_heads_do_not_depend_on_their_mates(kernel, dtype, device):
    window, inputs, _ = setup(kernel, dtype, device, batch=3)
    out, lse = blurry_window_attention(*inputs, window, enable_gqa=True, return_lse=True)
    for b in range(3):
        alone = blurry_window_attention(*(x[b : b + 1] for x in inputs), window, enable_gqa=True)
        assert torch.equal(alone, out[b : b + 1])
    for h, (length, phase) in enumerate(zip(window.windows(3), window.phases(3), strict=True)):
        query, key, value = inputs
        own = BlurryWindow(5, length, kernel, phase=phase)
        for query_head in (2 * h, 2 * h + 1):
            part = [query[:, [query_head]], key[:, [h]], value[:, [h]]]
            alone, its_lse = blurry_window_attention(*part, own, return_lse=True)
            assert torch.equal(alone, out[:, [query_head]]) and torch.equal(its_lse, lse[:, [query_head]])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_rerun_and_for_any_number_of_threads(kernel, dtype, device):
    window, inputs, state = setup(kernel, dtype, device, tokens=700)
    before = [x.clone() for x in (*inputs, state.key, state.value, state.position)]
    expected = run(blurry_window_attention, *inputs, window, state=state)
    try:
        for threads in (2, 1, 3, 2):
            torch.set_num_threads(threads)
            assert_same_bits(run(blurry_window_attention, *inputs, window, state=state), expected)
    finally:
        torch.set_num_threads(2)
    after = (*inputs, state.key, state.value, state.position)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_outputs_never_alias_inputs(kernel, tokens, device):
    window, inputs, state = setup(kernel, torch.float64, device, tokens)
    found = run(blurry_window_attention, *inputs, window, state=state)
    given = {x.untyped_storage().data_ptr() for x in (*inputs, state.key, state.value, state.position)} - {0}
    ours = [x.untyped_storage().data_ptr() for x in found.values() if x.numel()]
    assert not given & set(ours)
    assert len(ours) == len(set(ours)), "two outputs share memory"
