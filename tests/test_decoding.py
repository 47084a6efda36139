"""Reading and writing in turns: what a state promises to a program that decodes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import KERNELS, make_inputs, make_state, randn

from blurry_attn import BlurrySelfAttention, BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step

WINDOW = {kernel: BlurryWindow(4, (4, 12), kernel) for kernel in KERNELS}
NAMES = ("key", "value", "position")


def assert_same(state: BlurryState, expected: BlurryState) -> None:
    assert state.window == expected.window
    for name in NAMES:
        assert torch.equal(getattr(state, name), getattr(expected, name)), name


def continued(state: BlurryState, rows: list[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """The outputs of a turn read whole and a turn of steps after it, with the inputs of the named sequences."""
    state = state.clone()
    turn = [x[rows] for x in make_inputs(4, 4, 2, 9, dtype=torch.float32, device=device, seed=1)]
    read, state = blurry_window_attention(*turn, state.window, enable_gqa=True, state=state, return_state=True)
    steps = [
        blurry_window_step(*(x[:, :, t : t + 1].contiguous() for x in turn), state, enable_gqa=True) for t in range(5)
    ]
    return read, *steps, state.key, state.value, state.position


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


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_beams_are_reordered_and_the_batch_grows_and_shrinks(kernel, device):
    """Every sequence goes on as alone, bit for bit, wherever it stands in whichever batch."""
    state = make_state(WINDOW[kernel], [3, 50, 0, 7], dtype=torch.float32, device=device)
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
    state = make_state(WINDOW["fejer"], [3, 50])
    for name in NAMES:
        whole = getattr(state, name)
        assert getattr(state[:1], name).data_ptr() == whole.data_ptr()
        for new in (state[torch.tensor([0])], BlurryState.cat((state,))):
            assert getattr(new, name).data_ptr() != whole.data_ptr()


def test_gradients_flow_through_a_choice_of_sequences():
    state = make_state(WINDOW["fejer"], [3, 50])
    state.key.requires_grad_()
    chosen = BlurryState.cat((state[torch.tensor([1, 1])], state[:1]))
    (gradient,) = torch.autograd.grad(chosen.key.sum(), state.key)
    assert gradient[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("way", ["torch.save", "safetensors", "pickle", "deepcopy", "to"])
@pytest.mark.parametrize("window", [*WINDOW.values(), BlurryWindow(4, 8, sharpness=5.3, phase=(1, 0))], ids=repr)
@torch.no_grad()
def test_a_saved_state_goes_on_bit_for_bit(way, window, device, tmp_path):
    state = make_state(window, [3, 50, 0, 7], dtype=torch.float32, device=device)
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
        loaded = state.to("cpu", torch.float64).to(device, torch.float32)
    assert loaded.key.device == state.key.device
    assert_same(loaded, state)
    assert_continues(loaded, state, [0, 1, 2, 3], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_state_may_be_kept_in_half_the_bytes(dtype, device, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = make_state(WINDOW["fejer"], [3, 50, 0, 7], dtype=torch.float32, device=device)
    safetensors.save_file(state.state_dict(dtype), tmp_path / "state.safetensors")
    entries = safetensors.load_file(tmp_path / "state.safetensors", device=str(device))
    assert entries["key"].dtype == dtype and 2 * entries["key"].nbytes == state.key.nbytes
    loaded = BlurryState.from_state_dict(entries)
    rounded = BlurryState(*(x.to(dtype).float() for x in (state.key, state.value)), state.position, state.window)
    assert_same(loaded, rounded)
    assert_continues(loaded, rounded, [0, 1, 2, 3], device)


def test_a_state_cannot_go_back():
    with pytest.raises(NotImplementedError, match="cannot be cropped to 5 tokens: each slot is a mix of tokens"):
        make_state(WINDOW["fejer"], [9]).crop(5)


STATE = make_state(WINDOW["fejer"], [3, 50])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: STATE[0], TypeError, "index must be a slice or a one-dimensional tensor, got 0"),
        (lambda: STATE[torch.tensor(0)], TypeError, "index must be a slice or a one-dimensional tensor, got tensor(0)"),
        (lambda: list(STATE), TypeError, "index must be a slice"),
        (lambda: BlurryState.cat([]), ValueError, "states must hold at least one state"),
        (
            lambda: BlurryState.cat((STATE, make_state(WINDOW["dirichlet"], [1]))),
            ValueError,
            "states must have the same window: BlurryWindow(",
        ),
        (lambda: BlurryState.from_state_dict({}), KeyError, "window"),
    ],
    ids=range(6),
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
