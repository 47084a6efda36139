"""A sequence processed in pieces, with the state carried, is the sequence processed whole."""

from __future__ import annotations

import pytest
import torch
from helpers import KERNELS, assert_accurate, make_inputs, make_state, randn, relative_error

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, reference

MIXED = {
    "fejer": BlurryWindow(4, (4, 12, 32, 68), sharpness=3),
    "dirichlet": BlurryWindow(4, (4, 12, 32, 44), "dirichlet"),
}
RESULTS = ("out", "lse", "end_key", "end_value")


def in_pieces(lengths, query, key, value, window, state=None):
    outs, lses = [], []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        out, lse, state = blurry_window_attention(q, k, v, window, state=state, return_state=True, return_lse=True)
        outs.append(out)
        lses.append(lse)
    return dict(zip((*RESULTS, "position"), (torch.cat(outs, 2), torch.cat(lses, 2), state.key, state.value,
                                             state.position), strict=True))  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_cut(kernel, device):
    """Cut anywhere: in a lobe, at a centre, before an opening, before the first and after the last token."""
    inputs = make_inputs(2, 4, None, 100, 5, device=device)
    whole = in_pieces([100], *inputs, MIXED[kernel])
    for cut in range(101):
        assert_accurate(in_pieces([cut, 100 - cut], *inputs, MIXED[kernel]), whole, torch.float64, MIXED[kernel])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lengths", [[1] * 90, [0, 1, 0, 88, 1, 0], [7, 0, 1, 30, 2, 50], [0, 90, 0]], ids=str)
def test_values_and_gradients(kernel, dtype, lengths, device):
    window = MIXED[kernel]
    found = []
    for cuts in ([90], lengths):
        state = make_state(window, [3, 777], 4, 5, dtype=dtype, device=device)
        leaves = [*make_inputs(2, 4, None, 90, 5, dtype=dtype, device=device), state.key, state.value]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        results = in_pieces(cuts, *leaves[:3], window, BlurryState(*leaves[3:], state.position, window))
        cotangents = [randn(*results[n].shape, dtype=dtype, device=device, seed=i) for i, n in enumerate(RESULTS)]
        grads = torch.autograd.grad([results[name] for name in RESULTS], leaves, cotangents)
        found.append(results | {f"grad_{i}": grad for i, grad in enumerate(grads)})
    assert_accurate(found[1], found[0], dtype, window)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sequences_of_one_batch_at_different_positions(kernel, device):
    """Sequences that have come differently far are continued together, as a batch and packed."""
    window, seen, more = MIXED[kernel], [0, 1, 17, 60, 143], 57
    inputs = make_inputs(5, 4, None, 200, 5, device=device)
    states, whole = [], []
    for b, length in enumerate(seen):
        sequence = [x[b : b + 1, :, : length + more] for x in inputs]
        whole.append(in_pieces([length + more], *sequence, window))
        first = [x[:, :, :length] for x in sequence]
        states.append(blurry_window_attention(*first, window, return_state=True)[1])
    state = BlurryState(
        *(torch.cat([getattr(s, name) for s in states]) for name in ("key", "value", "position")), window
    )
    rest = [torch.cat([x[b, :, n : n + more].unsqueeze(0) for b, n in enumerate(seen)]) for x in inputs]
    expected = {n: torch.cat([w[n][:, :, -more:] if n in ("out", "lse") else w[n] for w in whole]) for n in whole[0]}
    actual = in_pieces([more], *rest, window, state)
    assert_accurate(actual, expected, torch.float64, window)

    packed = [x.transpose(0, 1).reshape(1, 4, 5 * more, 5) for x in rest]
    out, end = blurry_window_attention(*packed, window, state=state, return_state=True,
                                       cu_seqlens=torch.arange(0, 5 * more + 1, more, device=device))  # fmt: skip
    assert torch.equal(out.reshape(4, 5, more, 5).transpose(0, 1), actual["out"])
    assert torch.equal(end.key, actual["end_key"]) and torch.equal(end.position, actual["position"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_thousands_of_tokens(kernel, device):
    window = MIXED[kernel]
    inputs = make_inputs(1, 4, None, 6000, 8, device=device)
    whole = in_pieces([6000], *inputs, window)
    assert_accurate(in_pieces([1000, 1, 2999, 2000], *inputs, window), whole, torch.float64, window)


@pytest.mark.parametrize("kernel", KERNELS)
def test_positions_beyond_32_bits(kernel, device):
    """Time is counted in 64 bits: the same phase of the window 2^40 periods later gives the same numbers."""
    window = BlurryWindow(4, 20, kernel, phase=(3, 1))
    inputs = make_inputs(1, 2, None, 45, 8, device=device)
    near, far = (
        in_pieces([45], *inputs, window, make_state(window, [position], device=device))
        for position in (27, 27 + 20 * 2**40)
    )
    assert near.pop("position").tolist() == [27 + 45] and far.pop("position").tolist() == [27 + 45 + 20 * 2**40]
    assert all(torch.equal(near[name], far[name]) for name in near)


@pytest.mark.parametrize("kernel", KERNELS)
def test_first_lap_of_a_continued_sequence_equals_the_reference(kernel, device):
    window = BlurryWindow(5, 40, kernel, phase=(0, 5))
    for position in range(0, 85, 3):
        inputs, state = make_inputs(1, 2, None, 50, 4), make_state(window, [position], 2, 4)
        expected = reference.blurry_window_attention(*inputs, window, state=state)
        actual = blurry_window_attention(*(x.to(device) for x in inputs), window, state=state.to(device))
        assert relative_error(actual, expected) <= 1e-12
