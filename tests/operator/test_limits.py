"""Sizes at both ends, and memory that runs out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import KERNELS, assert_accurate, assert_same_bits, make_inputs, make_state, oracle, run

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step

BEYOND = 2**31  # elements, from which a 32-bit index is another


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("resolution", [1, 2, 32])
@pytest.mark.parametrize("position", [None, 0, 1, 5])
def test_the_smallest(kernel, tokens, slots, resolution, position, device):
    window = BlurryWindow(slots, slots * resolution, kernel)
    inputs = make_inputs(2, 2, None, tokens, 1, 1, device=device)
    state = None if position is None else make_state(window, [position, position + 1], dim=1, device=device)
    expected = run(oracle, *(x.cpu() for x in inputs), window, state=state and state.to("cpu"))
    assert_accurate(run(blurry_window_attention, *inputs, window, state=state), expected, torch.float64, window)


@pytest.mark.parametrize("resolution", [1, 256])
@pytest.mark.parametrize("dim", [(1, 512), (512, 1), (512, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_widest(resolution, dim, dtype, device):
    """Head sizes of 1 and 512; windows of 256 tokens per slot, over a lap and more."""
    window = BlurryWindow(2, 2 * resolution)
    inputs = make_inputs(1, 1, None, 600, *dim, dtype)
    expected = run(oracle, *(x.double() for x in inputs), window)
    actual = run(blurry_window_attention, *(x.to(device) for x in inputs), window)
    assert_accurate(actual, expected, dtype, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_at_all(kernel, batch, tokens, device):
    """No sequences, no tokens, or neither: results and gradients of these sizes, a state that goes on."""
    window = BlurryWindow(4, 16, kernel)
    state = make_state(window, [7] * batch, device=device)
    found = run(blurry_window_attention, *make_inputs(batch, tokens=tokens, device=device), window, state=state)
    assert found["out"].shape == found["grad_query"].shape == (batch, 2, tokens, 8)
    assert found["end_key"].shape == (batch, 2, 4, 8) and found["position"].tolist() == [7 + tokens] * batch
    packed = make_inputs(1, tokens=0, device=device)
    for ends in ([0], [0, 0, 0]):
        empty = run(blurry_window_attention, *packed, window, cu_seqlens=torch.tensor(ends, device=device))
        assert empty["end_key"].shape == (len(ends) - 1, 2, 4, 8) and not empty["end_key"].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_sequences_and_heads_than_a_grid_of_blocks_counts(kernel, device):
    """65537 sequences, then heads: the first and the last are what they are alone."""
    window, many = BlurryWindow(2, 4, kernel, phase=1), 65537
    for shape in ((many, 1), (1, many)):
        inputs = make_inputs(*shape, tokens=3, dim=2, dtype=torch.float32, device=device)
        found = run(blurry_window_attention, *inputs, window)
        for at in (0, 65535, 65536):
            pick = (lambda x, at=at: x[at : at + 1]) if shape[1] == 1 else (lambda x, at=at: x[:, at : at + 1])
            alone = run(blurry_window_attention, *(pick(x) for x in inputs), window)
            for name in ("out", "lse", "end_key", "end_value"):
                assert torch.equal(pick(found[name]), alone[name]), f"{name} of {at}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_of_more_than_two_to_the_31_elements(kernel, device):
    """Each token is the one before, moved by an element: 4 million different ones in 8 MB."""
    dim, window, last = 512, BlurryWindow(2, 4, kernel), 64
    tokens = BEYOND // dim + 7
    memory = make_inputs(1, 1, None, 1, tokens + dim, dtype=torch.bfloat16, device=device)[0].flatten()
    x = memory.as_strided((1, 1, tokens, dim), (0, 0, 1, 1))
    assert x.numel() > BEYOND
    out, state = blurry_window_attention(x, x, x[..., :1], window, return_state=True)
    assert state.position.tolist() == [tokens]
    # Gates of 1 replace every slot within a lap: the last tokens tell the same, whatever was there before them.
    before = make_state(window, [tokens - last], 1, dim, 1, torch.bfloat16, device)
    tail = (x[:, :, -last:], x[:, :, -last:], x[:, :, -last:, :1])
    expected, end = blurry_window_attention(*tail, window, state=before, return_state=True)
    torch.testing.assert_close(out[:, :, -last // 2 :], expected[:, :, -last // 2 :])
    torch.testing.assert_close(state.key, end.key)


def test_strides_of_more_than_two_to_the_31_elements(device):
    """Two heads that lie more than 2^31 elements apart in one tensor are read and written where they are."""
    window = BlurryWindow(2, 4)
    apart = torch.empty(BEYOND + 4096, dtype=torch.bfloat16, device=device)
    views = torch.as_strided(apart, (1, 2, 20, 8), (0, BEYOND + 64, 16, 1))
    inputs = make_inputs(1, 2, None, 20, dtype=torch.bfloat16, device=device)
    for x in inputs:
        views.copy_(x)
        found = run(blurry_window_attention, views, *inputs[1:], window)
        assert_same_bits(found, run(blurry_window_attention, x, *inputs[1:], window))
        found = run(blurry_window_attention, inputs[0], views, views, window)
        assert_same_bits(found, run(blurry_window_attention, inputs[0], x, x, window))


@pytest.mark.slow
def test_results_of_more_than_two_to_the_31_elements(device):
    """4.3 GB of output in bfloat16; its last head is what that head is alone."""
    dim, tokens, window = 512, 1024, BlurryWindow(2, 4, phase=1)
    heads = BEYOND // (dim * tokens) + 2
    inputs = make_inputs(1, 1, None, tokens, 1, dim, torch.bfloat16, device)
    out = blurry_window_attention(*(x.expand(1, heads, -1, -1) for x in inputs), window)
    assert out.numel() > BEYOND
    alone = blurry_window_attention(*inputs, window)
    for head in (0, heads - 2, heads - 1):
        assert torch.equal(out[:, head], alone[:, 0])


OUT_OF_MEMORY = """
import resource, torch
from functools import partial
from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step

torch.set_num_threads(1)
window = BlurryWindow(64, 64)
state = BlurryState.empty(256, 16, 64, window=window)
query, key, value = torch.randn(256, 800, 1, 64), *torch.randn(2, 256, 16, 1, 64).unbind()
step = partial(blurry_window_step, query, key, value, enable_gqa=True)
long = torch.zeros(1).expand(1, 16, 200_000, 64)
step(state)
before = state.clone()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
errors = []
for call in (lambda: step(state),
             lambda: blurry_window_attention(long, long, long, window)):
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        errors.append(str(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(errors) == 2 and all("memory" in error or "alloc" in error for error in errors), errors
assert all(torch.equal(getattr(state, name), getattr(before, name)) for name in ("key", "value", "position"))
expected = step(before)
assert torch.equal(step(state), expected)
print("whole")
"""


def test_memory_that_runs_out_is_told_and_leaves_the_state() -> None:
    """A step that finds no memory for its result, and a call for its output: an error each, and a usable state."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


@pytest.mark.cuda
def test_memory_of_the_device_that_runs_out_is_told_and_leaves_the_state():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    window = BlurryWindow(64, 64)
    state = BlurryState.empty(4, 2, 64, window=window, device="cuda")
    token = make_inputs(4, 2, None, 1, 64, dtype=torch.bfloat16, device="cuda")
    blurry_window_step(*token, state)
    before = state.clone()
    huge = torch.zeros(1, dtype=torch.bfloat16, device="cuda").expand(4096, 64, 2**20, 64)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        blurry_window_attention(huge, huge, huge, window)
    for name in ("key", "value", "position"):
        assert torch.equal(getattr(state, name), getattr(before, name))
    assert torch.equal(blurry_window_step(*token, state), blurry_window_step(*token, before))
