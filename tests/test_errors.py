"""Bad input is refused before any work, by an error that names the argument."""

from __future__ import annotations

import pytest
import torch
from helpers import make_inputs, make_state

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step, reference

WINDOW = BlurryWindow(4, 16)


def change(index, make):
    """The valid call with one of query, key, value changed."""

    def arguments(device):
        inputs = list(make_inputs(dtype=torch.float32, device=device, tokens=20))
        inputs[index] = make(inputs[index])
        return inputs, {}

    return arguments


def option(**make):
    """The valid call with an option, made from the device."""
    return lambda device: (
        list(make_inputs(1, dtype=torch.float32, device=device, tokens=20)),
        {name: value(device) if callable(value) else value for name, value in make.items()},
    )


def state(**changes):
    def make(device):
        good = make_state(WINDOW, [3], dtype=torch.float32, device=device)
        return BlurryState(*(changes.get(name, lambda x: x)(getattr(good, name)) for name in vars(good)))

    return option(state=make)


def numbers(*values, dtype=torch.int64):
    return option(cu_seqlens=lambda device: torch.tensor(values, dtype=dtype, device=device))


CASES = {
    "query rank": (change(0, lambda x: x[0]), ValueError, "query must have 4 dimensions"),
    "key rank": (change(1, lambda x: x[None]), ValueError, "key must have 4 dimensions"),
    "no tensor": (change(2, lambda x: x.tolist()), TypeError, "value must be a tensor, got list"),
    "integers": (change(0, lambda x: x.long()), TypeError, "query must be float64, float32, bfloat16 or float16"),
    "complex": (change(1, lambda x: x.to(torch.complex64)), TypeError, "key must be float64"),
    "dtypes": (change(2, lambda x: x.double()), TypeError, "value must have query's dtype"),
    "devices": (change(1, lambda x: x.to("meta")), ValueError, "key must be on query's device"),
    "sparse": (change(2, lambda x: x.to_sparse()), NotImplementedError, "value must be a dense tensor"),
    "batch": (change(1, lambda x: x[:1]), ValueError, "key must have query's batch 2, got 1"),
    "value batch": (change(2, lambda x: x[:1]), ValueError, "value must have query's batch 2, got 1"),
    "key length": (change(1, lambda x: x[:, :, :7]), ValueError, "key must have as many tokens as query"),
    "value length": (change(2, lambda x: x[:, :, :7]), ValueError, "value must have as many tokens as query"),
    "head size": (change(1, lambda x: x[..., :3]), ValueError, "key must have query's head_dim 8, got 3"),
    "no features": (change(2, lambda x: x[..., :0]), ValueError, "value must have a head_dim of at least 1"),
    "value heads": (change(2, lambda x: x[:, :1]), ValueError, "value must have key's number of heads 2, got 1"),
    "heads": (change(0, lambda x: x[:, :1]), ValueError, "query must have as many heads as key .* enable_gqa=True"),
    "gqa": (
        lambda device: ([torch.randn(1, h, 5, 8, device=device) for h in (3, 2, 2)], {"enable_gqa": True}),
        ValueError,
        "query must have a multiple of key's 2 heads, got 3",
    ),
    "scale": (option(scale=float("inf")), ValueError, "scale must be finite"),
    "cu_seqlens dtype": (numbers(0, 20, dtype=torch.float32), TypeError, "cu_seqlens must be int32 or int64"),
    "cu_seqlens rank": (
        option(cu_seqlens=lambda device: torch.zeros(1, 2, dtype=torch.int64, device=device)),
        ValueError,
        "cu_seqlens must have shape",
    ),
    "cu_seqlens empty": (numbers(), ValueError, "cu_seqlens must have shape"),
    "cu_seqlens start": (numbers(1, 20), ValueError, "cu_seqlens must start at 0, got 1"),
    "cu_seqlens end": (numbers(0, 19), ValueError, "cu_seqlens must end at the number of tokens 20, got 19"),
    "cu_seqlens order": (numbers(0, 12, 9, 20), ValueError, "cu_seqlens must not decrease, got 9 after 12"),
    "cu_seqlens batch": (
        lambda device: (make_inputs(2, dtype=torch.float32, device=device), {"cu_seqlens": torch.tensor([0, 50])}),
        ValueError,
        "query must have batch 1 with cu_seqlens|cu_seqlens must be on query's device",
    ),
    "state batch": (
        option(state=lambda device: make_state(WINDOW, [3, 4], dtype=torch.float32, device=device)),
        ValueError,
        "state.key must have shape",
    ),
    "state dtype": (
        option(state=lambda device: make_state(WINDOW, [3], device=device)),
        TypeError,
        "state.key must be Float",
    ),
    "state head size": (
        option(state=lambda device: make_state(WINDOW, [3], dim=5, dtype=torch.float32, device=device)),
        ValueError,
        "state.key must have shape",
    ),
    "state window": (
        option(state=lambda device: make_state(BlurryWindow(4, 8), [3], dtype=torch.float32, device=device)),
        ValueError,
        "state must have been made with the same window",
    ),
    "state type": (option(state=3), TypeError, "state must be a BlurryState, got int"),
    "state device": (state(position=lambda x: x.to("meta")), ValueError, "position must be on the device of key"),
    "position": (state(position=lambda x: -x), ValueError, "state.position must not be negative, got -3"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, device):
    make, error, message = CASES[case]
    with pytest.raises(error, match=message):
        arguments, options = make(device)
        blurry_window_attention(*arguments, WINDOW, **options)


def test_nested(device):
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)], device=device)
    with pytest.raises(NotImplementedError, match="query must not be a nested tensor"):
        blurry_window_attention(nested, nested, nested, WINDOW)


def test_window_of_other_heads(device):
    inputs = make_inputs(dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"window must have one entry per kv head \(2\), got 3"):
        blurry_window_attention(*inputs, BlurryWindow(4, (4, 8, 16)))
    with pytest.raises(TypeError, match="window must be a BlurryWindow, got int"):
        blurry_window_attention(*inputs, 64)


OPERATOR = {"slots": 4, "window": [16, 16], "phase": [0, 2], "kernel": "fejer", "sharpness": 6.0, "scale": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 1}, "slots must be at least 2, got 1"),
        ({"window": [16]}, r"window must have one entry per kv head \(2\), got 1"),
        ({"window": [16, 18]}, r"window must be a positive multiple of slots \(4\), got 18"),
        ({"window": [16, 0]}, "window must be a positive multiple of slots"),
        ({"phase": [0]}, r"phase must have one entry per kv head \(2\), got 1"),
        ({"phase": [0, 4]}, "phase must be in 0 .. 3"),
        ({"phase": [-1, 0]}, "phase must be in 0 .. 3"),
        ({"kernel": "hann"}, "kernel must be 'fejer' or 'dirichlet', got 'hann'"),
        ({"sharpness": 0.5}, "sharpness must be finite and at least 1, got 0.5"),
        ({"sharpness": float("nan")}, "sharpness must be finite and at least 1, got nan"),
        ({"kernel": "dirichlet", "window": [16, 132]}, r"window must be at most 32 \* slots"),
    ],
)
def test_operator_checks_its_own_arguments(changes, message, device):
    inputs = make_inputs(dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=message):
        torch.ops.blurry_attn.forward(*inputs, *(OPERATOR | changes).values(), None, None, None, None, False)


def test_state_in_parts(device):
    inputs, state = make_inputs(1, dtype=torch.float32, device=device), make_state(WINDOW, [3], dtype=torch.float32)
    with pytest.raises(ValueError, match="state_key, state_value and position must be given together"):
        torch.ops.blurry_attn.forward(*inputs, *OPERATOR.values(), None, state.key.to(device), None, None, False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda q, k, v: (q, k, v.double()), TypeError, "value must have query's dtype"),
        (lambda q, k, v: (q, k[:, :1], v), ValueError, "heads"),
        (lambda q, k, v: (q.repeat(1, 1, 2, 1), k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)), ValueError, "one token"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), ValueError, "state.key must have shape"),
        (lambda q, k, v: (q.requires_grad_(), k, v), NotImplementedError, r"torch.no_grad\(\)"),
    ],
)
def test_refused_step_leaves_the_state(make, error, message, device):
    state = make_state(WINDOW, [3, 40], dtype=torch.float32, device=device)
    before = state.clone()
    query, key, value = (x[:, :, :1] for x in make_inputs(dtype=torch.float32, device=device))
    with pytest.raises(error, match=message):
        blurry_window_step(*make(query, key, value), state)
    for name in ("key", "value", "position"):
        assert torch.equal(getattr(state, name), getattr(before, name))


def test_no_forward_mode_and_no_second_derivative(device):
    inputs = [x.requires_grad_() for x in make_inputs(device=device)]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: blurry_window_attention(q, q, q, WINDOW), (inputs[0].detach(),), (inputs[1].detach(),))
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(blurry_window_attention(*inputs, WINDOW).sum(), inputs, create_graph=True)


@pytest.mark.parametrize("shape", [(0, 2, 9, 8), (2, 2, 0, 8), (0, 2, 0, 8)], ids=["B = 0", "T = 0", "both"])
@pytest.mark.parametrize("kernel", ["fejer", "dirichlet"])
def test_nothing_is_fine(shape, kernel, device):
    window = BlurryWindow(4, 16, kernel)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    out, lse, state = blurry_window_attention(*inputs, window, return_lse=True, return_state=True)
    assert out.shape == shape and lse.shape == shape[:3]
    assert state.key.shape == (shape[0], 2, 4, 8) and not state.key.any() and state.position.tolist() == [0] * shape[0]
    (out.sum() + state.value.sum()).backward()
    assert all(x.grad.shape == shape for x in inputs)


def test_reference_takes_the_same_call(device):
    inputs = make_inputs(1, 4, 2, 30, device=device)
    options = {"enable_gqa": True, "scale": 0.3, "cu_seqlens": torch.tensor([0, 11, 30], device=device)}
    torch.testing.assert_close(
        blurry_window_attention(*inputs, WINDOW, **options),
        reference.blurry_window_attention(*inputs, WINDOW, **options),
    )
