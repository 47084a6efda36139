"""Reading and writing in turns: what a state promises to a program that decodes."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from helpers import KERNELS, make_inputs, make_state, randn, shut_slots

from blurry_attn import (
    BlurrySelfAttention,
    BlurryState,
    BlurryWindow,
    blurry_window_attention,
    blurry_window_step,
    reference,
)

WINDOW = {kernel: BlurryWindow(4, (4, 12), kernel) for kernel in KERNELS}
NAMES = ("key", "value", "position", "flux")


def assert_same(state: BlurryState, expected: BlurryState) -> None:
    assert state.window == expected.window
    for name in NAMES:
        ours, theirs = getattr(state, name), getattr(expected, name)
        assert ours is theirs is None or torch.equal(ours, theirs), name


def continued(state: BlurryState, rows: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """The outputs of a turn read whole and a turn of steps after it, with the inputs of the named sequences."""
    state = state.clone()
    turn = [x[rows] for x in make_inputs(4, 4, 2, 9, dtype=torch.float32, device=device, seed=1)]
    read, state = blurry_window_attention(*turn, state.window, enable_gqa=True, state=state, return_state=True)
    steps = [
        blurry_window_step(*(x[:, :, t : t + 1].contiguous() for x in turn), state, enable_gqa=True) for t in range(5)
    ]
    return read, *steps, *(x for name, x in state.state_dict().items() if name != "window")


def assert_continues(state: BlurryState, expected: BlurryState, rows: list[int], device: torch.device) -> None:
    for ours, theirs in zip(continued(state, rows, device), continued(expected, rows, device), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("turns", [(0, 3, 1, 2), (1, 1, 30, 4), (17, 5, 2, 40), (64, 2, 13, 1)], ids=str)
@torch.no_grad()
def test_a_chat_in_turns_is_one_reading(kernel, turns, device):
    """Prefill, steps, prefill, steps, with padding in both prefills: the sequences stand at positions of their own."""
    module = BlurrySelfAttention(16, 4, WINDOW[kernel], 2, rope_base=100.0, device=device, dtype=torch.float64)
    state = BlurryState.empty(3, 2, 4, window=WINDOW[kernel], device=device, dtype=torch.float64)
    kept, outs = [[], [], []], [[], [], []]
    for turn, tokens in enumerate(turns):
        x = randn(3, tokens, 16, device=device, seed=turn)
        mask = torch.zeros(3, tokens, dtype=torch.bool, device=device)
        if turn % 2:
            out = torch.cat([module.step(x[:, t : t + 1], state) for t in range(tokens)], 1)
        else:
            mask[0, : tokens // 2] = mask[1, tokens // 3 :] = True  # left and right
            out, state = module(x, key_padding_mask=mask, state=state, return_state=True)
        for b in range(3):
            kept[b].append(x[b, ~mask[b]])
            outs[b].append(out[b, ~mask[b]])
    for b in range(3):
        whole = torch.cat(kept[b]).unsqueeze(0)
        torch.testing.assert_close(torch.cat(outs[b]), module(whole)[0], rtol=1e-12, atol=1e-12)
        assert state.position[b] == whole.shape[1]


@pytest.mark.parametrize(
    ("kernel", "dtype"), [*((kernel, torch.float32) for kernel in KERNELS), ("fejer", torch.bfloat16)]
)
@torch.no_grad()
def test_beams_are_reordered_and_the_batch_grows_and_shrinks(kernel, dtype, device):
    """Every sequence goes on as alone, bit for bit, wherever it stands in whichever batch."""
    state = make_state(WINDOW[kernel], [3, 50, 0, 7], dtype=torch.float32, device=device).to(dtype)
    alone = [state[b : b + 1] for b in range(4)]
    order = [2, 0, 0, 3, 1]
    finished = torch.tensor([True, False, False, True], device=device)
    for changed, rows in (
        (state[torch.tensor(order, device=device)], order),
        (state[1:3], [1, 2]),
        (state[~finished], [1, 2]),
        (BlurryState.cat((state[2:], state[:1])), [2, 3, 0]),
        (BlurryState.cat([state[:0], state]), [0, 1, 2, 3]),
    ):
        assert changed.batch_size == len(rows)
        results = continued(changed, rows, device)
        for i, row in enumerate(rows):
            for ours, theirs in zip(results, continued(alone[row], [row], device), strict=True):
                assert torch.equal(ours[i], theirs[0])


def test_a_slice_shares_memory_and_a_tensor_copies():
    state = make_state(WINDOW["fejer"], [3, 50]).to(torch.bfloat16)
    for name in NAMES:
        whole = getattr(state, name)
        assert getattr(state[:1], name).data_ptr() == whole.data_ptr()
        for new in (state[torch.tensor([0])], BlurryState.cat((state,))):
            assert getattr(new, name).data_ptr() != whole.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_is_a_sequence_of_states_of_one_sequence(dtype):
    state = make_state(WINDOW["fejer"], [3, 50, 7]).to(dtype)
    assert len(state) == 3 and len(list(state)) == 3
    for i, one in enumerate(state):
        assert len(one) == 1 and one.window == state.window
        for same in (one, state[i], state[i - 3], state[np.int64(i)]):
            for name in NAMES:
                if getattr(state, name) is not None:
                    assert torch.equal(getattr(same, name), getattr(state, name)[i : i + 1])
                    assert getattr(same, name).data_ptr() == getattr(state, name)[i].data_ptr()
    again = BlurryState.cat(list(state))
    assert torch.equal(again.key, state.key) and torch.equal(again.position, state.position)


def test_gradients_flow_through_a_choice_of_sequences():
    state = make_state(WINDOW["fejer"], [3, 50])
    state.key.requires_grad_()
    chosen = BlurryState.cat((state[torch.tensor([1, 1])], state[:1]))
    (gradient,) = torch.autograd.grad(chosen.key.sum(), state.key)
    assert gradient[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("way", ["torch.save", "safetensors", "pickle", "deepcopy", "to"])
@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        *((window, torch.float32) for window in WINDOW.values()),
        (BlurryWindow(4, 8, sharpness=5.3, phase=(1, 0)), torch.float32),
        (WINDOW["fejer"], torch.bfloat16),
    ],
    ids=repr,
)
@torch.no_grad()
def test_a_saved_state_goes_on_bit_for_bit(way, window, dtype, device, tmp_path):
    state = make_state(window, [3, 50, 0, 7], dtype=torch.float32, device=device).to(dtype)
    buffer = io.BytesIO()
    if way == "torch.save":
        torch.save(state.state_dict(), buffer)
        buffer.seek(0)
        loaded = BlurryState.from_state_dict(torch.load(buffer, weights_only=True))
    elif way == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        entries = {f"layers.0.{name}": tensor for name, tensor in state.state_dict().items()}
        safetensors.save_file(entries, tmp_path / "state.safetensors")
        entries = safetensors.load_file(tmp_path / "state.safetensors", device=str(device))
        loaded = BlurryState.from_state_dict({name.removeprefix("layers.0."): x for name, x in entries.items()})
    elif way == "pickle":
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
    elif way == "deepcopy":
        loaded = copy.deepcopy(state)
    else:
        loaded = state.to("cpu", torch.float64).to(device, dtype)
    assert loaded.key.device == state.key.device
    assert_same(loaded, state)
    assert_continues(loaded, state, [0, 1, 2, 3], device)


def standing(window: BlurryWindow, kv_heads: int, position: int) -> torch.Tensor:
    """(kv_heads, slots) bool: slots that the token at ``position`` leaves alone, as the table of gates has it."""
    heads = zip(window.windows(kv_heads), window.phases(kv_heads), strict=True)
    share = torch.cat([reference.gates(window, period, phase, position, 1) for period, phase in heads])
    return share.nan_to_num(0) == 0


HALF_WINDOWS = [WINDOW["fejer"], BlurryWindow(2, (2, 10)), BlurryWindow(5, (5, 40), phase=(0, 3)), BlurryWindow(16, 48)]


@pytest.mark.parametrize("window", HALF_WINDOWS, ids=repr)
@torch.no_grad()
def test_a_bfloat16_state_rounds_a_slot_when_it_comes_to_rest(window, device):
    """Turns and steps are those of a float32 state whose standing slots are rounded after each, once."""
    state = make_state(window, [0, 3, 50, 7], dtype=torch.float32, device=device).to(torch.bfloat16)
    assert state.key.dtype == state.value.dtype == torch.bfloat16
    assert state.flux.dtype == torch.float32
    never, top = state.to(torch.float32), torch.zeros(())
    for turn, tokens in enumerate((1, 1, 30, *[1] * 45)):
        inputs = make_inputs(4, 4, 2, tokens, dtype=torch.float32, device=device, seed=turn)
        arguments = {"scale": 0.5, "enable_gqa": True}
        rounded = state.to(torch.float32)
        if tokens == 1:
            outs = [blurry_window_step(*inputs, kept, **arguments) for kept in (state, rounded, never)]
        else:
            results = [
                blurry_window_attention(*inputs, window, state=kept, return_state=True, **arguments)
                for kept in (state, rounded, never)
            ]
            outs, (state, rounded, never) = zip(*results, strict=True)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(state.position, rounded.position)
        open_slots = ~shut_slots(window, state.position.tolist(), 2)
        for name in ("key", "value"):
            ours, theirs, exact = (getattr(x.to(torch.float32), name).cpu() for x in (state, rounded, never))
            top = torch.maximum(top, exact.abs().max())
            for b, position in enumerate(state.position.tolist()):
                rests, is_open = standing(window, 2, position), open_slots[b]
                assert torch.equal(ours[b][~rests], theirs[b][~rests])
                unrounded = (ours[b] != ours[b].bfloat16().float()).any(-1)
                assert unrounded.sum(-1).max() <= 2
                kept = is_open & ~unrounded
                assert torch.equal(ours[b][kept], theirs[b][kept].bfloat16().float())
                # One rounding, half a step of 2^-8, and what the lobe after it leaves of the one before.
                error = (ours[b] - exact[b])[is_open].abs().max() if is_open.any() else 0
                assert error <= 1.1 * 2**-9 * 2 ** torch.frexp(top).exponent


@torch.no_grad()
def test_a_bfloat16_state_takes_half_the_bytes(device):
    state = BlurryState.empty(2, 3, 64, window=BlurryWindow(64, 512), device=device, dtype=torch.bfloat16)
    whole = state.to(torch.float32)
    assert state.elements == whole.elements
    assert state.nbytes == whole.nbytes // 2 + whole.nbytes * 2 // 64


def test_gradients_flow_through_a_bfloat16_state(device):
    window, inputs = WINDOW["fejer"], make_inputs(2, 2, 2, 9, dtype=torch.float32, device=device)
    given = make_state(window, [3, 50], dtype=torch.float32, device=device)
    given.key.requires_grad_()
    _, end = blurry_window_attention(*inputs, window, state=given.to(torch.bfloat16), return_state=True)
    (gradient,) = torch.autograd.grad(end.to(torch.float32).key.sum(), given.key)
    _, end = blurry_window_attention(*inputs, window, state=given, return_state=True)
    (expected,) = torch.autograd.grad(end.key.sum(), given.key)
    torch.testing.assert_close(gradient, expected, rtol=2**-8, atol=2**-8)


def test_a_state_cannot_go_back():
    with pytest.raises(NotImplementedError, match="cannot be cropped to 5 tokens: each slot is a mix of tokens"):
        make_state(WINDOW["fejer"], [9]).crop(5)


STATE = make_state(WINDOW["fejer"], [3, 50])


def empty(batch=1, kv_heads=2, head_dim=8, value_dim=None, **options):
    return BlurryState.empty(batch, kv_heads, head_dim, value_dim, window=WINDOW["fejer"], **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: STATE[len(STATE)], IndexError, "index must be in -"),
        (lambda: STATE[-len(STATE) - 1], IndexError, "index must be in -"),
        (lambda: STATE[True], TypeError, "index must be an int, got True"),
        (lambda: STATE[0.0], TypeError, "index must be an int, got 0.0"),
        (lambda: STATE[torch.tensor(0)], TypeError, "index must be a one-dimensional tensor, got shape ()"),
        (lambda: BlurryState.cat([]), ValueError, "states must hold at least one state"),
        (
            lambda: BlurryState.cat((STATE, make_state(WINDOW["dirichlet"], [1]))),
            ValueError,
            "states must have the same window: BlurryWindow(",
        ),
        (lambda: BlurryState.from_state_dict({}), KeyError, "window"),
        (lambda: BlurryState.from_state_dict(None), TypeError, "state_dict must be a mapping of names to tensors, got"),
        (lambda: STATE[torch.tensor([0.5])], TypeError, "index must be int64 or bool, got torch.float32"),
        (lambda: BlurryState.cat(STATE), TypeError, "states must be a list or tuple of BlurryStates, got BlurryState"),
        (lambda: BlurryState.cat(iter([STATE])), TypeError, "states must be a list or tuple of BlurryStates, got list"),
        (lambda: STATE.to(dtype="bfloat16"), TypeError, "dtype must be a torch.dtype or None, got 'bfloat16'"),
        (lambda: STATE.to(torch.float16), TypeError, "key must be float32, float64 or bfloat16, got torch.float16"),
        (lambda: empty(1.5), TypeError, "batch must be an int, got 1.5"),
        (lambda: empty(True), TypeError, "batch must be an int, got True"),
        (lambda: empty(1, 2, 8, -1), ValueError, "value_dim must not be negative, got -1"),
        (lambda: empty(dtype="float32"), TypeError, "dtype must be a torch.dtype, got 'float32'"),
    ],
    ids=range(18),
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
