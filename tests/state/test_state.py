"""BlurryState: checks, bookkeeping, the frequency window and the reconstruction of the history."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blurry_attn import BlurryState, BlurryWindow
from blurry_attn.reference import blurry_window_attention, opening

WINDOWS = [
    BlurryWindow(5, (5, 15, 20), phase=(0, 0, 3)),
    BlurryWindow(6, (6, 24, 24)),
    BlurryWindow(2, (2, 6, 10), phase=(0, 2, 4)),
    BlurryWindow(4, (8, 12, 4), kernel="dirichlet", phase=(1, 2, 0)),
    BlurryWindow(3, (9, 9, 9)),
]


def random_state(window: BlurryWindow, positions: list[int], kv_heads: int = 3, seed: int = 0) -> BlurryState:
    """Random slots; shut ones too hold numbers, which must not be read."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(positions), kv_heads, window.slots)
    key = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    value = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    return BlurryState(key, value, torch.tensor(positions), window)


def filled(slots: np.ndarray, position: int, resolution: int, phase: int) -> np.ndarray:
    """The slots (N, D) of one head with every shut one taken as the open one with the oldest centre."""
    count = len(slots)
    is_open = [opening(m, count, resolution, phase) < position for m in range(count)]
    if not any(is_open):
        return np.zeros_like(slots)
    cells = [m - count if m == count - 1 and phase else m for m in range(count)]
    oldest = min((m for m in range(count) if is_open[m]), key=lambda m: cells[m])
    return np.stack([slots[m] if is_open[m] else slots[oldest] for m in range(count)])


def spectrum(slots: np.ndarray, window: int, phase: int) -> np.ndarray:
    """Dense DFT over the whole period, of the slots as impulses at their centres: (N // 2 + 1, D)."""
    count = len(slots)
    period = np.zeros((window, slots.shape[1]))
    for m in range(count):
        period[(m * (window // count) + phase) % window] = slots[m]
    return np.fft.fft(period, axis=0)[: count // 2 + 1] / count


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_frequency_window_is_the_dense_dft(window):
    positions = [0, 1, 2, 3, 5, 7, 11, 16, 23, 100]
    state = random_state(window, positions)
    for got, slots in zip(state.frequency_window(), (state.key, state.value), strict=True):
        assert got.shape == (len(positions), 3, window.slots // 2 + 1, slots.shape[-1])
        assert got.dtype == torch.complex128
        for b, position in enumerate(positions):
            for h, (length, phase) in enumerate(zip(window.windows(3), window.phases(3), strict=True)):
                content = filled(slots[b, h].numpy(), position, length // window.slots, phase)
                np.testing.assert_allclose(got[b, h].numpy(), spectrum(content, length, phase), atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_reconstruct_is_the_inverse_dft(window):
    positions = [0, 1, 2, 3, 5, 7, 11, 16, 23, 100]
    state = random_state(window, positions)
    lags = [0.0, 0.25, 1.0, 1.5, 2.0, 3.999, 4.0, 5.0, 7.75, 9.0, 13.3, 19.0, 24.0, -0.5, torch.nan, torch.inf]
    lag = torch.tensor(lags, dtype=torch.float64)
    for got, slots in zip(state.reconstruct(lag), (state.key, state.value), strict=True):
        assert got.shape == (len(positions), 3, len(lag), slots.shape[-1])
        for b, position in enumerate(positions):
            for h, (length, phase) in enumerate(zip(window.windows(3), window.phases(3), strict=True)):
                content = filled(slots[b, h].numpy(), position, length // window.slots, phase)
                frequencies = spectrum(content, length, phase)
                weights = np.full(len(frequencies), 2.0)
                weights[0] = 1.0
                if window.slots % 2 == 0:
                    weights[-1] = 1.0
                for i, back in enumerate(lags):
                    if not 0 <= back < min(length, position):
                        assert torch.isnan(got[b, h, i]).all()
                        continue
                    turns = 2j * np.pi * np.arange(len(frequencies)) * (position - 1 - back) / length
                    expected = ((weights * np.exp(turns))[:, None] * frequencies).real.sum(0)
                    np.testing.assert_allclose(got[b, h, i].numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("kernel", ["fejer", "dirichlet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("slots", "length"), [(5, 3), (5, 17), (8, 8), (8, 29)])
def test_one_token_per_slot_returns_the_stored_tokens(kernel, dtype, slots, length):
    window = BlurryWindow(slots, slots, kernel=kernel)
    key, value = torch.randn(2, 2, length, 4, dtype=dtype), torch.randn(2, 2, length, 3, dtype=dtype)
    _, state = blurry_window_attention(key, key, value, window, return_state=True)
    lag = torch.arange(min(slots, length))
    for got, tokens in zip(state.reconstruct(lag), (key, value), strict=True):
        assert torch.equal(got, tokens.flip(2)[:, :, : len(lag)])


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize("length", [1, 2, 4, 9, 40])
def test_constant_history_gives_that_constant(window, length):
    value = torch.tensor([1.5, -2.0], dtype=torch.float64).expand(1, 3, length, 2)
    key = torch.randn(1, 3, length, 3, dtype=torch.float64)
    _, state = blurry_window_attention(key, key, value, window, return_state=True)
    shortest = min(window.windows(3))
    history = state.reconstruct(torch.linspace(0, min(shortest, length) - 1e-3, 13))[1]
    torch.testing.assert_close(history, value[:, :, :1].expand_as(history), rtol=0, atol=1e-12)
    frequencies = state.frequency_window()[1]
    torch.testing.assert_close(frequencies[:, :, 0].real, value[:, :, 0], rtol=0, atol=1e-12)
    assert frequencies[:, :, 1:].abs().max() < 1e-12


def test_a_long_sequence_costs_no_digits():
    window = BlurryWindow(5, (15, 20, 5), phase=(0, 3, 0))
    near = random_state(window, [60])
    far = BlurryState(near.key, near.value, near.position + 60 * 2**50, window)
    lag = torch.tensor([0.3, 1.7, 4.1])
    for a, b in zip(near.reconstruct(lag), far.reconstruct(lag), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
def test_gradients(window):
    state = random_state(window, [0, 3, 50])
    lag = torch.tensor([0.0, 0.5, 1.0, 1.75, 8.0], dtype=torch.float64)

    def outputs(key, value):
        given = BlurryState(key, value, state.position, window)
        history = [x.nan_to_num(0.0) for x in given.reconstruct(lag)]
        return (*history, *(torch.view_as_real(x) for x in given.frequency_window()))

    key, value = state.key.requires_grad_(), state.value.requires_grad_()
    assert torch.autograd.gradcheck(outputs, (key, value))
    grads = torch.autograd.grad([x.sum() for x in outputs(key, value)], (key, value))
    for grad in grads:
        assert grad.isfinite().all()
        assert (grad[0] == 0).all()


def test_shut_slots_are_not_read():
    window = BlurryWindow(4, 16, phase=2)
    state = random_state(window, [3], kv_heads=1)
    is_shut = [opening(m, 4, 4, 2) >= 3 for m in range(4)]
    assert any(is_shut)
    other = state.clone()
    other.key[:, :, is_shut] = torch.nan
    other.value[:, :, is_shut] = torch.inf
    lag = torch.tensor([0.0, 1.5])
    for method in (lambda s: s.reconstruct(lag), BlurryState.frequency_window):
        for a, b in zip(method(state), method(other), strict=True):
            assert torch.equal(a, b)


def test_empty_state():
    window = BlurryWindow(4, (8, 12))
    state = BlurryState.empty(3, 2, 5, 6, window=window, dtype=torch.float64)
    assert state.key.shape == (3, 2, 4, 5)
    assert state.value.shape == (3, 2, 4, 6)
    assert state.key.dtype == state.value.dtype == torch.float64
    assert state.position.tolist() == [0, 0, 0]
    assert (state.batch_size, state.kv_heads, state.slots) == (3, 2, 4)
    assert state.elements == 3 * window.state_elements(2, 5, 6) == 264
    assert state.nbytes == 8 * 264
    assert all(x.isnan().all() for x in state.reconstruct(torch.zeros(1)))
    assert all((x == 0).all() for x in state.frequency_window())
    assert BlurryState.empty(1, 2, 5, window=window).value.shape == (1, 2, 4, 5)
    assert BlurryState.empty(1, 2, 5, window=window).key.dtype == torch.float32
    none = BlurryState.empty(0, 2, 5, window=window)
    assert none.reconstruct(torch.zeros(3))[0].shape == (0, 2, 3, 5)
    assert state.reconstruct(torch.zeros(0))[0].shape == (3, 2, 0, 5)


def test_starting_from_the_empty_state_is_starting_from_none():
    window = BlurryWindow(4, (8, 12), phase=(1, 0))
    query, key, value = (torch.randn(2, 2, 9, 3, dtype=torch.float64) for _ in range(3))
    empty = BlurryState.empty(2, 2, 3, window=window, dtype=torch.float64)
    expected, end = blurry_window_attention(query, key, value, window, return_state=True)
    got, state = blurry_window_attention(query, key, value, window, state=empty, return_state=True)
    for a, b in ((got, expected), (state.key, end.key), (state.value, end.value), (state.position, end.position)):
        assert torch.equal(a, b)


def test_copies():
    state = random_state(BlurryWindow(4, 8), [1, 9])
    state.key.requires_grad_()
    copy, detached = state.clone(), state.detach()
    assert copy.key.requires_grad
    assert not detached.key.requires_grad
    for name in ("key", "value", "position"):
        assert torch.equal(getattr(copy, name), getattr(state, name))
        assert getattr(copy, name).data_ptr() != getattr(state, name).data_ptr()
        assert getattr(detached, name).data_ptr() == getattr(state, name).data_ptr()
    for half in (state.to(torch.float32), state.to(dtype=torch.float32), state.to("cpu", torch.float32)):
        assert half.key.dtype == half.value.dtype == torch.float32
        assert half.position.dtype == torch.int64
        assert half.window is state.window
        assert half.position.data_ptr() != state.position.data_ptr(), "a step of one would advance the other"
    assert state.to(torch.float64).position is state.position
    meta = state.to("meta")
    assert {meta.key.device.type, meta.value.device.type, meta.position.device.type} == {"meta"}
    assert meta.key.dtype == torch.float64
    moved = state.to(copy=True)
    assert moved.position.data_ptr() != state.position.data_ptr()
    assert state != copy
    assert state == state
    with pytest.raises(TypeError, match=r"key must be float32, float64 or bfloat16, got torch\.float16"):
        state.to(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_a_state_dict_lies_where_the_state_does(default, dtype):
    state = BlurryState.empty(1, 2, 8, window=BlurryWindow(4, 16), device="cpu", dtype=dtype)
    with torch.device(default):
        entries = state.state_dict()
        assert {x.device.type for x in entries.values()} == {"cpu"}
        assert BlurryState.from_state_dict(entries).window == state.window
    shapes = BlurryState.from_state_dict(state.to("meta").state_dict())
    assert shapes.key.is_meta and shapes.window == state.window
    with pytest.raises(ValueError, match="window must be the text that state_dict"):
        BlurryState.from_state_dict({name: x.to("meta") for name, x in entries.items()})


def test_repr():
    state = BlurryState.empty(2, 3, 5, 6, window=BlurryWindow(4, 8))
    assert repr(state) == (
        "BlurryState(batch_size=2, kv_heads=3, slots=4, head_dim=5, value_dim=6, dtype=torch.float32, device='cpu', "
        "window=BlurryWindow(slots=4, window=8, kernel='fejer', sharpness=None, phase=None))"
    )


HALF = {"key": torch.zeros(2, 3, 4, 5).bfloat16(), "value": torch.zeros(2, 3, 4, 5).bfloat16()}
FLUX = torch.zeros(2, 3, 2, 10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": [1.0]}, TypeError, "key must be a Tensor, got list"),
        ({"window": 8}, TypeError, "window must be a BlurryWindow, got int"),
        (
            {"key": torch.zeros(2, 3, 4, 5).half()},
            TypeError,
            "key must be float32, float64 or bfloat16, got torch.float16",
        ),
        (
            {"value": torch.zeros(2, 3, 4, 5).long()},
            TypeError,
            "value must be float32, float64 or bfloat16, got torch.int64",
        ),
        ({"value": torch.zeros(2, 3, 4, 5).double()}, TypeError, "value must have the dtype of key (torch.float32)"),
        ({"position": torch.zeros(2)}, TypeError, "position must be int64, got torch.float32"),
        (
            {"key": torch.zeros(2, 3, 4, 5).to_sparse()},
            TypeError,
            "key must be a dense tensor, got layout torch.sparse",
        ),
        ({"position": torch.zeros(2).long().to_sparse()}, TypeError, "position must be a dense tensor, got layout"),
        ({"key": torch.zeros(3, 4, 5)}, ValueError, "key must be (B, Hkv, N, D), got 3 dimensions: (3, 4, 5)"),
        ({"value": torch.zeros(2, 3, 4)}, ValueError, "value must be (B, Hkv, N, D), got 3 dimensions: (2, 3, 4)"),
        ({"value": torch.zeros(2, 2, 4, 5)}, ValueError, "value must agree with key in (B, Hkv, N) = (2, 3, 4)"),
        ({"position": torch.zeros(3).long()}, ValueError, "position must be (B,) = (2,), got (3,)"),
        ({"window": BlurryWindow(5, 10)}, ValueError, "key must have the 5 slots of window, got 4"),
        ({"window": BlurryWindow(4, (4, 8))}, ValueError, "window must have one entry per kv head (3), got 2"),
        ({"window": BlurryWindow(4, 8, phase=(0, 1))}, ValueError, "phase must have one entry per kv head (3), got 2"),
        ({"value": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "value must be on the device of key (cpu)"),
        ({"position": torch.zeros(2, device="meta").long()}, ValueError, "position must be on the device of key (cpu)"),
        ({"flux": FLUX}, ValueError, "flux must be None beside slots of torch.float32"),
        (HALF, TypeError, "flux must be a Tensor beside bfloat16 slots, got NoneType; state.to(torch.bfloat16) makes"),
        ({**HALF, "flux": FLUX.half()}, TypeError, "flux must be dense and float32, got torch.float16"),
        ({**HALF, "flux": FLUX.to_sparse()}, TypeError, "flux must be dense and float32, got torch.float32, layout"),
        (
            {**HALF, "flux": FLUX[:1]},
            ValueError,
            "flux must be (B, Hkv, 2, Dk + Dv) = (2, 3, 2, 10), got (1, 3, 2, 10)",
        ),
        ({**HALF, "flux": FLUX.to("meta")}, ValueError, "flux must be on the device of key (cpu), got meta"),
        (
            {**HALF, "flux": FLUX, "window": BlurryWindow(4, 8, "dirichlet")},
            TypeError,
            'key must be float32 or float64 where kernel is "dirichlet": no slot of it ever comes to rest',
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_construction_errors(change, error, message):
    good = {
        "key": torch.zeros(2, 3, 4, 5),
        "value": torch.zeros(2, 3, 4, 5),
        "position": torch.zeros(2, dtype=torch.int64),
        "window": BlurryWindow(4, 8),
    }
    BlurryState(**good)
    with pytest.raises(error) as caught:
        BlurryState(**{**good, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lag", "error", "message"),
    [
        (3, TypeError, "lag must be a Tensor, got int"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "lag must be real numbers, got torch.complex64"),
        (torch.zeros(2, dtype=torch.bool), TypeError, "lag must be real numbers, got torch.bool"),
        (torch.zeros(()), ValueError, "lag must be one-dimensional (L,), got shape ()"),
        (torch.zeros(1, device="meta"), ValueError, "lag must be on the device of the state (cpu), got meta"),
        (torch.zeros(1, requires_grad=True), ValueError, "lag must not require a gradient"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_reconstruct_errors(lag, error, message):
    with pytest.raises(error) as caught:
        random_state(BlurryWindow(4, 8), [3]).reconstruct(lag)
    assert message in str(caught.value)
