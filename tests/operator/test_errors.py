"""Bad input is refused before any work, by an error that names the argument."""

from __future__ import annotations

import pytest
import torch
from helpers import make_inputs, make_state
from torch.autograd import forward_ad

from blurry_attn import _C, BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step, reference
from blurry_attn.ops import rotary

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
        lambda device: (make_inputs(1, 3, 2, 5, device=device), {"enable_gqa": True}),
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
        lambda device: (make_inputs(2, device=device), {"cu_seqlens": torch.tensor([0, 50], device=device)}),
        ValueError,
        "query must have batch 1 with cu_seqlens, got 2",
    ),
    "cu_seqlens device": (
        option(cu_seqlens=lambda device: torch.tensor([0, 20], device="meta")),
        ValueError,
        "cu_seqlens must be on query's device",
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
    "state device": (
        option(state=lambda device: make_state(WINDOW, [3], dtype=torch.float32, device="meta")),
        ValueError,
        "state.key must be on query's device",
    ),
    "position": (state(position=lambda x: -x), ValueError, "state.position must not be negative, got -3"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case, device):
    make, error, message = CASES[case]
    arguments, options = make(device)
    with pytest.raises(error, match=message):
        blurry_window_attention(*arguments, WINDOW, **options)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested(which, layout, device):
    parts = [torch.zeros(tokens, 2, 8, device=device) for tokens in (3, 5)]
    inputs = list(make_inputs(dtype=torch.float32, device=device))
    inputs[which] = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    name = ("query", "key", "value")[which]
    with pytest.raises(
        NotImplementedError, match=f"{name} must not be a nested tensor; pack sequences with cu_seqlens"
    ):
        blurry_window_attention(*inputs, WINDOW)


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
        ({"slots": 2**20 + 1, "window": [2**20 + 1] * 2}, "slots must be at most 1048576, got 1048577"),
        ({"window": [16, 2**22 + 4]}, r"window must be at most 1048576 \* slots, got 4194308"),
        ({"scale": 1e39}, r"scale must be finite in float32 when multiplied by log2\(e\), got 1e"),
        ({"scale": -2.4e38}, r"scale must be finite in float32 when multiplied by log2\(e\), got -2.4e"),
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
        (lambda q, k, v: (q, k[:, :1], v), ValueError, "query must have as many heads as key"),
        (lambda q, k, v: (q.repeat(1, 1, 2, 1), k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)), ValueError, "one token"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), ValueError, "state.key must have shape"),
        (lambda q, k, v: (q.long(), k, v), TypeError, "query must be float64, float32, bfloat16 or float16"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), TypeError, "state.key must be Double"),
        (lambda q, k, v: (q[..., :3], k[..., :3], v), ValueError, "state.key must have shape"),
        (lambda q, k, v: (q, k, v[..., :3]), ValueError, "state.value must have shape"),
        (lambda q, k, v: (q, k, v[0]), ValueError, "value must have 4 dimensions"),
        (lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")), ValueError, "state.key must be on query's device"),
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


def step_arguments(device):
    inputs = [x[:, :, :1].contiguous() for x in make_inputs(1, device=device)]
    given = make_state(WINDOW, [40], device=device)
    return [*inputs, given.key, given.value], given.position


def attend(position, *tensors):
    given = BlurryState(*tensors[3:], position, WINDOW)
    return blurry_window_attention(*tensors[:3], WINDOW, state=given, return_state=True)[0]


def step(position, *tensors):
    return blurry_window_step(*tensors[:3], BlurryState(*tensors[3:], position, WINDOW))


@pytest.mark.parametrize("which", range(5), ids=["query", "key", "value", "state.key", "state.value"])
@pytest.mark.parametrize("call", [attend, step])
def test_forward_mode_is_refused(call, which, device):
    tensors, position = step_arguments(device)
    before = [x.clone() for x in (*tensors, position)]
    with forward_ad.dual_level():
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented"):
            call(position, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, position), strict=True))


RESULTS = ["out", "lse", "state.key", "state.value"]


def result(which, position, *tensors):
    given = BlurryState(*tensors[3:], position, WINDOW)
    out, lse, end = blurry_window_attention(*tensors[:3], WINDOW, state=given, return_state=True, return_lse=True)
    return [out, lse, end.key, end.value][which]


@pytest.mark.parametrize("of", range(4), ids=RESULTS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_mode_over_reverse_is_refused(of, create_graph, device):
    """A tangent that comes with the incoming gradient alone."""
    tensors, position = step_arguments(device)
    found = result(of, position, *(x.requires_grad_() for x in tensors))
    with forward_ad.dual_level():
        head = forward_ad.make_dual(torch.ones_like(found), torch.ones_like(found))
        with pytest.raises(NotImplementedError, match=r"forward-mode differentiation|double backward"):
            torch.autograd.grad(found, tensors, head, create_graph=create_graph, allow_unused=True)


@pytest.mark.parametrize("which", range(9), ids=["grad_out", "grad_lse", "grad_state_key", "grad_state_value", "query",
                                                 "key", "value", "out", "lse"])  # fmt: skip
def test_the_backward_operator_refuses_forward_mode(which, device):
    tensors, position = step_arguments(device)
    law = [*OPERATOR.values()]
    results = torch.ops.blurry_attn.forward(*tensors[:3], *law, None, *tensors[3:], position, True)
    given = [*results[:4], *tensors[:3], *results[:2]]
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented"):
            torch.ops.blurry_attn.backward(*given[:7], *law, None, *tensors[3:], position, *given[7:], results[5])


def test_rotary_refuses_forward_mode_over_reverse(device):
    x = make_inputs(device=device)[0].requires_grad_()
    turned = rotary(x, torch.arange(50, device=device), 9.0)
    with forward_ad.dual_level():
        head = forward_ad.make_dual(torch.ones_like(turned), torch.ones_like(turned))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented"):
            torch.autograd.grad(turned, x, head)


@pytest.mark.parametrize("of", range(4), ids=RESULTS)
@pytest.mark.parametrize("which", range(5), ids=["query", "key", "value", "state.key", "state.value"])
def test_double_backward_is_refused(which, of, device):
    tensors, position = step_arguments(device)
    found = result(of, position, *(x.requires_grad_(i == which) for i, x in enumerate(tensors)))
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.autograd.grad(found.sum(), tensors[which], create_graph=True, allow_unused=True)


def placed(operator, device):
    """A function that calls an operator, the names of its tensors, and the tensors."""
    tensors, position = step_arguments(device)
    law, state = [*OPERATOR.values()], [*tensors[3:], position]
    names = ["query", "key", "value", "state.key", "state.value", "state.position"]
    if operator == "forward":
        given = [*tensors[:3], *state, torch.tensor([0, 1], device=device)]
        names.append("cu_seqlens")
        call = lambda *x: torch.ops.blurry_attn.forward(*x[:3], *law, x[6], *x[3:6], True)  # noqa: E731
        direct = lambda *x: _C.forward(*x[:3], *law, x[6], *x[3:6], True)  # noqa: E731
    elif operator == "step":
        given = [*tensors[:3], *state]
        call = lambda *x: torch.ops.blurry_attn.step(*x, *law)  # noqa: E731
        direct = lambda *x: _C.step(*x, *law)  # noqa: E731
    elif operator == "backward":
        results = torch.ops.blurry_attn.forward(*tensors[:3], *law, None, *state, True)
        given = [*tensors[:3], *state, *results[:2], results[5], *results[:4]]
        names += ["out", "lse", "kept", "grad_out", "grad_lse", "grad_state_key", "grad_state_value"]
        call = direct = lambda *x: torch.ops.blurry_attn.backward(*x[9:], *x[:3], *law, None, *x[3:6], *x[6:9])
    else:
        names, given = ["x", "positions"], [tensors[0], position]
        call = lambda *x: torch.ops.blurry_attn.rotary(*x, 9.0)  # noqa: E731
        direct = lambda *x: rotary(*x, 9.0)  # noqa: E731
    return (call, direct), names, given


@pytest.mark.parametrize("way", [0, 1], ids=["torch.ops", "direct"])
@pytest.mark.parametrize("operator", ["forward", "backward", "step", "rotary"])
@pytest.mark.parametrize("grad", [torch.enable_grad, torch.inference_mode])
def test_a_tensor_on_meta_among_others_is_named(grad, operator, way, device):
    """One of all on meta, and all but one: never a result that nobody computed."""
    calls, names, given = placed(operator, device)
    for i, name in enumerate(names):
        for is_other in (False, True):
            tensors = [x.to("meta") if (i == j) != is_other else x.clone() for j, x in enumerate(given)]
            # Held against the first, all others are elsewhere.
            named = "|".join(names[1:]) if i == 0 or (is_other and i > 1) else name
            with grad(), pytest.raises(ValueError, match=f"({named}) must be on (query|x)'s device"):
                calls[way](*tensors)
            for before, x in zip(given, tensors, strict=True):
                assert x.is_meta or torch.equal(before, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["key", "value", "position", "flux"])
def test_an_attribute_of_a_state_that_was_moved_is_named(name, dtype, device):
    inputs = make_inputs(1, tokens=1, dtype=torch.float32, device=device)
    state = make_state(WINDOW, [3], dtype=torch.float32, device=device).to(dtype)
    if getattr(state, name) is None:
        return
    setattr(state, name, getattr(state, name).to("meta"))
    for call in (lambda: blurry_window_step(*inputs, state),
                 lambda: blurry_window_attention(*inputs, WINDOW, state=state)):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name} must be on .*device"):
            call()


@pytest.mark.parametrize("which", range(5), ids=["query", "key", "value", "state.key", "state.value"])
def test_a_step_refuses_gradients_and_leaves_the_state(which, device):
    tensors, position = step_arguments(device)
    before = [x.clone() for x in (*tensors, position)]
    tensors[which].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"call it under torch.no_grad\(\)"):
        step(position, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, position), strict=True))
    with torch.no_grad():
        assert not step(position, *tensors).requires_grad
    assert position.tolist() == [41]


def test_reference_takes_the_same_call(device):
    inputs = make_inputs(1, 4, 2, 30, device=device)
    options = {"enable_gqa": True, "scale": 0.3, "cu_seqlens": torch.tensor([0, 11, 30], device=device)}
    torch.testing.assert_close(
        blurry_window_attention(*inputs, WINDOW, **options),
        reference.blurry_window_attention(*inputs, WINDOW, **options),
    )
