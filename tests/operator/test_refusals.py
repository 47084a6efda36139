"""Whatever the interface is handed: a right answer, or an error that names the argument and leaves all as it was."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import make_inputs, make_state
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from blurry_attn import (
    _C,
    BlurrySelfAttention,
    BlurryState,
    BlurryWindow,
    BlurryWindowAttention,
    Packing,
    blurry_window_attention,
    blurry_window_step,
    reference,
    replace_sdpa,
)

WINDOW = BlurryWindow(4, (12, 20), phase=(2, 0))
REFUSED = (TypeError, ValueError, NotImplementedError)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 4, 5, 8, 12, 2**20, 2**20 + 1, 2**31, 2**40, 2**62, 2**63 - 1)
NO_TENSOR = (None, 3, 0.5, "x", b"x", [1.0], np.ones(3), object())
ANYTHING = (*NO_TENSOR, *INTEGERS, 2**70, 10**400, -(10**400), True, math.nan, math.inf, -math.inf, 1.5, 1e308, 1j,
            "8", (), (0,), (4, "8"), [4, 8], (8, 16), (8, 2**70), np.int64(4), np.float32(2), np.array([1, 2]),
            torch.tensor(4), torch.tensor([1.0, 2.0]), torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.bool))  # fmt: skip


def one(*choices):
    return st.sampled_from(choices)


def resized(dim):
    """One more along a dimension."""
    return lambda x: torch.cat((x, x.narrow(dim, 0, 1)), dim)


ANY_STRIDED = (
    *(lambda x, junk=junk: junk for junk in NO_TENSOR),
    *(lambda x, dtype=dtype: x.to(dtype) for dtype in OTHERS),
    lambda x: x[0],
    lambda x: x.unsqueeze(0),
    resized(0),
)
ANY_TENSOR = (*ANY_STRIDED, lambda x: x.to("meta"), lambda x: x.to_sparse())
OF_INPUT = (*ANY_TENSOR, resized(2), lambda x: x[:, :, :0], lambda x: x.to(FLOATS[x.dtype == FLOATS[0]]))
CHANGES = {
    "query": (*OF_INPUT, resized(1), resized(3), lambda x: x[:, :0], lambda x: x[..., :0]),
    "key": (*OF_INPUT, resized(1), resized(3), lambda x: x[:, :0], lambda x: x[..., :0]),
    "value": (*OF_INPUT, resized(1), lambda x: x[:, :0], lambda x: x[..., :0]),
    "state.key": (*ANY_TENSOR, resized(1), resized(2), resized(3), lambda x: x.half()),
    # Its tensors share a device and a layout: a BlurryState cannot be made otherwise.
    "state.value": (*ANY_STRIDED, resized(1), resized(2), resized(3), lambda x: x.half()),
    "state.position": (*ANY_STRIDED, lambda x: x.int(), lambda x: -x, lambda x: x + 2**62, lambda x: x - 2**63),
    "scale": tuple(lambda _, junk=junk: junk for junk in
                   ("x", b"x", [1.0], 1j, object(), math.nan, math.inf, 1e39, 10**400, True, np.float32(0.5),
                    torch.ones(2), torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5)))),
    "window": tuple(lambda _, junk=junk: junk for junk in
                    (None, 4, "x", (4, 8), BlurryWindow(4, (12, 20, 20)), BlurryWindow(4, 16, phase=(0, 0, 1)))),
    "state": tuple(lambda _, junk=junk: junk for junk in (3, "x", [1.0], torch.ones(3))),
    "cu_seqlens": (
        *ANY_TENSOR[1:],  # None is allowed
        *(lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.int16, torch.float32)),
        *(lambda x, at=at, number=number: x.index_fill(0, torch.tensor([at]), number)
          for at, number in ((0, -1), (0, 1), (1, -1), (1, 99), (1, 2**62), (2, 5), (2, -(2**62)))),
        lambda x: x[:0],
        lambda x: x[1:],
        lambda x: x.flip(0),
    ),
}  # fmt: skip
# One is held against the other.
NAMES = {"query": "query|key|value", "cu_seqlens": "cu_seqlens|state", "state.key": "state.key|state.value"}


def valid(packed: bool, dtype: torch.dtype, tokens: int = 20) -> dict:
    state = make_state(WINDOW, [3, 40], dtype=dtype)
    arguments = dict(
        zip(("query", "key", "value"), make_inputs(1 if packed else 2, 2, tokens=tokens, dtype=dtype), strict=True)
    )
    arguments |= {"window": WINDOW, "scale": None, "cu_seqlens": torch.tensor([0, 7, tokens]) if packed else None}
    return arguments | {f"state.{name}": getattr(state, name) for name in ("key", "value", "position")}


def state_of(arguments: dict) -> BlurryState:
    return BlurryState._unchecked(*(arguments[f"state.{name}"] for name in ("key", "value", "position")), WINDOW)


def attend(arguments: dict, **options) -> object:
    state = arguments["state"] if "state" in arguments else state_of(arguments)
    given = {name: arguments[name] for name in ("query", "key", "value", "window", "scale", "cu_seqlens")}
    return blurry_window_attention(**given, state=state, **options)


def tensors(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.device.type != "meta"
            and x.layout == torch.strided}  # fmt: skip


def change(data: st.DataObject, name: str, arguments: dict, dtype: torch.dtype) -> None:
    old, new = arguments.get(name), data.draw(one(*CHANGES[name]))(arguments.get(name))
    assume(new is not old and not (isinstance(new, float) and new == 1e39 and dtype == torch.float64))
    arguments[name] = new


@settings(max_examples=400)
@given(st.data(), one(*FLOATS), st.booleans())
def test_one_bad_argument_is_named(data, dtype, packed):
    arguments = valid(packed, dtype)
    name = data.draw(one(*(name for name in CHANGES if packed or name != "cu_seqlens")))
    change(data, name, arguments, dtype)
    before = tensors(arguments)
    with pytest.raises(REFUSED, match=NAMES.get(name, re.escape(name.split(".")[0]))):
        attend(arguments, return_state=data.draw(st.booleans()))
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


@settings(max_examples=200)
@given(st.data(), one(*FLOATS))
def test_a_refused_step_names_the_argument_and_leaves_the_state(data, dtype):
    arguments = valid(False, dtype, tokens=1)
    name = data.draw(one(*(name for name in CHANGES if name not in ("cu_seqlens", "window"))))
    change(data, name, arguments, dtype)
    before = tensors(arguments)
    state = arguments["state"] if "state" in arguments else state_of(arguments)
    with pytest.raises(REFUSED, match=NAMES.get(name, re.escape(name.split(".")[0]))):
        blurry_window_step(*(arguments[x] for x in ("query", "key", "value")), state, scale=arguments["scale"])
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in ("key", "value", "position")), ("flux", torch.bfloat16), ("position", torch.bfloat16)],
    ids=str,
)
def test_a_step_refuses_a_state_that_cannot_be_written(name, dtype, device):
    """An expanded tensor has one place for several numbers: half of the state would be written before that shows."""
    state = make_state(WINDOW, [3, 3], dtype=torch.float32, device=device).to(dtype)
    setattr(state, name, getattr(state, name)[:1].expand_as(getattr(state, name)))
    before = state.clone()
    token = make_inputs(tokens=1, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=rf"state\.{name} must have memory for every element"):
        blurry_window_step(*token, state)
    for part, held in before.state_dict().items():
        assert torch.equal(state.state_dict()[part], held)


PARTS = ("key", "value", "position", "flux")
BOTH_KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def refused_step(message: str, inputs: tuple, state: BlurryState) -> None:
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        blurry_window_step(*inputs, state)
    for part, held in before.state_dict().items():
        assert torch.equal(state.state_dict()[part], held)


@BOTH_KINDS
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["key", "value", "flux"])
def test_a_step_refuses_slots_that_overlap(name, dim, dtype, device):
    """Each begins an element after the one before, along any dimension: no stride of zero tells."""
    state = make_state(WINDOW, [3, 40], dtype=torch.float32, device=device).to(dtype)
    if getattr(state, name) is None:
        return
    strides = list(getattr(state, name).stride())
    strides[dim] = 1 if dim < 3 else 2
    strides[3] = 2 if dim == 3 and name == "key" else strides[3]
    shape = getattr(state, name).shape
    strides[(dim + 1) % 4] = 1
    memory = torch.zeros(4096, dtype=getattr(state, name).dtype, device=device)
    setattr(state, name, memory.as_strided(shape, strides))
    token = make_inputs(tokens=1, dtype=torch.float32, device=device)
    refused_step(rf"state\.{name} must have memory for every element", token, state)


@BOTH_KINDS
@pytest.mark.parametrize(("name", "other"), [(a, b) for i, b in enumerate(PARTS) for a in PARTS[i + 1 :]])
def test_a_step_refuses_a_state_whose_parts_overlap(name, other, dtype, device):
    state = make_state(WINDOW, [3, 40], dtype=torch.float32, device=device).to(dtype)
    part, whole = getattr(state, name), getattr(state, other)
    if part is None:
        return
    # The one begins at the last element of the other.
    first = (whole.numel() - 1) * whole.element_size() // part.element_size()
    memory = torch.zeros(first + part.numel() + 1, dtype=part.dtype, device=device)
    setattr(state, other, memory.view(torch.uint8)[: whole.nbytes].view(whole.dtype).view(whole.shape))
    setattr(state, name, memory[first : first + part.numel()].view(part.shape))
    state.position.zero_()
    token = make_inputs(tokens=1, dtype=torch.float32, device=device)
    refused_step(rf"state\.{name} must not share memory with state\.{other}", token, state)


@BOTH_KINDS
@pytest.mark.parametrize("written", PARTS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_a_step_refuses_what_overlaps_its_state(which, written, dtype, device):
    state = make_state(WINDOW, [3, 40], dtype=torch.float32, device=device).to(dtype)
    token = list(make_inputs(tokens=1, dtype=torch.float32, device=device))
    part = getattr(state, written)
    if part is None:
        return
    memory = torch.zeros(part.nbytes + token[which].nbytes, dtype=torch.uint8, device=device)
    held, rest = memory[: part.nbytes].view(part.dtype).view(part.shape), memory[part.nbytes - 4 : -4]
    setattr(state, written, held.copy_(part))
    token[which] = rest.view(torch.float32).view(token[which].shape)
    name = ("query", "key", "value")[which]
    refused_step(rf"{name} must not share memory with state\.{written}, which is updated in place", token, state)


PAGES = {  # key and value of 2 sequences, 2 heads, 4 slots and 8 elements, in one memory
    "page by page": lambda page: page.view(2, 2, 2, 4, 8).unbind(1),
    "head by head": lambda page: page.view(2, 2, 2, 4, 8).unbind(2),
    "row by row": lambda page: page.view(2, 2, 4, 2, 8).unbind(3),
    "element by element": lambda page: page.view(2, 2, 4, 8, 2).unbind(4),
    "heads within slots": lambda page: [x.transpose(1, 2) for x in page.view(2, 4, 2, 2, 8).unbind(3)],
    "one after the other": lambda page: page.view(2, 2, 2, 4, 8).unbind(0),
    "with gaps": lambda page: page.as_strided((2, 2, 2, 4, 8), (131, 8, 65, 16, 1)).unbind(1),
}


@BOTH_KINDS
@pytest.mark.parametrize("layout", PAGES)
def test_a_step_takes_a_key_and_a_value_that_alternate(layout, dtype, device):
    state = make_state(WINDOW, [3, 40], dtype=torch.float32, device=device).to(dtype)
    apart, token = state.clone(), make_inputs(tokens=1, dtype=torch.float32, device=device)
    key, value = PAGES[layout](torch.zeros(512, dtype=dtype, device=device)[:256])
    state.key, state.value = key.copy_(state.key), value.copy_(state.value)
    assert torch.equal(blurry_window_step(*token, state), blurry_window_step(*token, apart))
    assert torch.equal(state.key, apart.key) and torch.equal(state.value, apart.value)


def places(tensor: torch.Tensor) -> list[int]:
    """The bytes of every element."""
    grid = [torch.zeros((), dtype=torch.int64)]
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        grid = [x + i * stride for x in grid for i in range(size)]
    first = tensor.data_ptr()
    return [first + tensor.element_size() * int(x) + byte for x in grid for byte in range(tensor.element_size())]


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Any strides over a small memory, which all views share."""
    dtype = draw(one(torch.int8, torch.int16, torch.float32))
    shape, room = draw(st.lists(one(0, 1, 2, 3, 5), min_size=0, max_size=4)), MEMORY.numel() // dtype.itemsize
    strides = [draw(st.integers(0, 20)) for _ in shape]
    end = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    return MEMORY.view(dtype).as_strided(shape, strides, draw(st.integers(0, min(60, room - 1 - end))))


MEMORY = torch.zeros(1024, dtype=torch.int8)


@settings(max_examples=500)
@given(views(), views(), views())
def test_any_overlap_is_found_and_no_other(first, second, read):
    """Against every byte of every element, counted."""
    bytes_of = [places(x) for x in (first, second, read)]
    in_itself = any(len(set(x)) < len(x) for x in bytes_of[:2])
    written = set(bytes_of[0]) | set(bytes_of[1])
    shared = set(bytes_of[0]) & set(bytes_of[1]) or written & set(bytes_of[2])
    with pytest.raises(ValueError, match="memory") if in_itself or shared else nullcontext():
        _C.check_is_writable([("first", first), ("second", second)], [("read", read)])


def test_what_has_no_memory_shares_none():
    """Tensors of a trace and of no elements; a lazy clone is written elsewhere."""
    x = torch.zeros(2, 3)
    for other in (x.to("meta"), x[:0], torch._lazy_clone(x)):
        _C.check_is_writable([("state.key", other)], [("query", other if other.is_meta else x)])
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        _C.check_is_writable([("state.key", fake), ("state.value", fake)], [("query", fake)])


def by_function(query, scale):
    return blurry_window_attention(query, query, query, WINDOW, scale=scale)


def by_step(query, scale):
    return blurry_window_step(query, query, query, BlurryState.empty(1, 2, 8, window=WINDOW), scale=scale)


def by_module(query, scale):
    return BlurryWindowAttention(WINDOW)(query, query, query, scale=scale)


def by_replaced_sdpa(query, scale):
    with replace_sdpa(WINDOW):
        return torch.ops.aten.scaled_dot_product_attention(query, query, query, None, 0.0, True, scale=scale)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "constant"])
@pytest.mark.parametrize("way", [by_function, by_step, by_module, by_replaced_sdpa])
def test_a_tensor_is_no_scale(way, learned, compiled):
    """It would get no gradient; the error says what does."""
    torch._dynamo.reset()
    scale = torch.tensor(0.5, requires_grad=learned)
    call = torch.compile(way, backend="eager", fullgraph=True) if compiled and way is not by_replaced_sdpa else way
    with torch.no_grad(), pytest.raises(Exception, match=r"scale must be an int, a float or None.* multiplies query"):
        call(torch.ones(1, 2, 1, 8), scale)


def test_a_scale_may_be_any_number_in_a_graph():
    query, *_ = make_inputs(1)
    for dynamic in (None, True):
        torch._dynamo.reset()
        call = torch.compile(by_function, backend="eager", fullgraph=True, dynamic=dynamic)
        for scale in (0.5, 0.6, 2):
            assert torch.equal(call(query, scale), by_function(query, scale))


@settings(max_examples=300)
@given(
    st.tuples(one(*INTEGERS), one(*INTEGERS), one(*INTEGERS)),
    one("fejer", "dirichlet", "hann", ""),
    one(math.nan, math.inf, 0.5, 1.0, 6.0, 1e308),
    one(-(2**63), -1, 0, 3, 2**40, 2**62, 2**62 + 1, 2**63 - 1),
)
def test_the_operator_takes_what_a_window_takes_and_is_right(law, kernel, sharpness, position):
    """Any numbers: refused by both, or taken by both, and then the reference agrees."""
    slots, window, phase = law
    query, key, value = make_inputs(1, 1, tokens=5, dim=2)
    kept = min(max(slots, 0), 2**10)  # slots that no memory holds are refused before a state is looked at
    state = [torch.ones(1, 1, kept, 2, dtype=torch.float64) for _ in range(2)]

    def call(*given: object) -> object:
        return torch.ops.blurry_attn.forward(query, key, value, *given)

    options = (slots, [window], [phase], kernel, sharpness, 1.0, None, *state, torch.tensor([position]), True)
    try:
        spec = BlurryWindow(slots, window, kernel, None if kernel == "dirichlet" else sharpness, phase)
    except ValueError:
        with pytest.raises(ValueError, match=r"slots|window|phase|kernel|sharpness"):
            call(*options)
        return
    if not 0 <= position <= 2**62 or slots != kept:
        with pytest.raises(ValueError, match=r"state\.position|state\.key"):
            call(*options)
        return
    out, lse, end_key, _, end, _ = call(*options)
    given_state = BlurryState(*state, torch.tensor([position]), spec)
    expected = reference.blurry_window_attention(
        query, key, value, spec, scale=1.0, state=given_state, return_lse=True, return_state=True
    )
    torch.testing.assert_close(out, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end_key, expected[2].key, rtol=1e-9, atol=1e-9)
    assert end.tolist() == [position + 5]


@settings(max_examples=300)
@given(st.fixed_dictionaries({"slots": one(2, 4, *ANYTHING), "window": one(8, 12, *ANYTHING)},
                             optional={"kernel": one("fejer", "dirichlet", *ANYTHING), "sharpness": one(*ANYTHING),
                                       "phase": one(*ANYTHING)}))  # fmt: skip
def test_a_window_is_what_it_says_or_is_refused(arguments):
    try:
        window = BlurryWindow(**arguments)
    except (TypeError, ValueError) as error:
        assert re.search("slots|window|kernel|sharpness|phase", str(error)), error
        return
    heads = max(len(x) if isinstance(x, tuple) else 1 for x in (window.window, window.phase))
    assert eval(repr(window)) == window and hash(eval(repr(window))) == hash(window)
    assert window.of_heads(heads, slice(None)).phases(heads) == window.phases(heads)
    for length, resolution, phase in zip(
        window.windows(heads), window.resolutions(heads), window.phases(heads), strict=True
    ):
        assert type(length) is type(phase) is int and length == resolution * window.slots
        assert 2 <= window.slots <= 2**20 and 1 <= resolution <= 2**20 and 0 <= phase < resolution
    assert 1 <= window.gate_sharpness < math.inf


def is_named(error: BaseException, *names: str) -> None:
    assert re.search("|".join(names), str(error)), error


@settings(max_examples=200)
@given(st.data())
def test_a_state_is_whole_or_is_refused(data):
    good = make_state(WINDOW, [3, 40])
    arguments = {name: getattr(good, name) for name in ("key", "value", "position", "window")}
    for name in data.draw(st.sets(one(*arguments), min_size=1)):
        arguments[name] = data.draw(one(*ANYTHING, *(change(good.key) for change in ANY_TENSOR if change)))
    with pytest.raises((TypeError, ValueError)) as caught:
        BlurryState(**arguments)
    is_named(caught.value, *arguments)


@settings(max_examples=200)
@given(st.data())
def test_a_state_dict_is_whole_or_is_refused(data):
    entries = make_state(WINDOW, [3, 40]).state_dict()
    name = data.draw(one(*entries))
    texts = (b"", b"[1]", b"{}", b'{"slots": 4}', b'{"slots": 4, "window": 5}', b'{"a": 1}', b"\xff")
    junk = [torch.tensor(list(text), dtype=torch.uint8) for text in texts]
    entries[name] = data.draw(one(*ANYTHING, *junk))
    with pytest.raises((TypeError, ValueError)) as caught:
        BlurryState.from_state_dict(entries)
    is_named(caught.value, name, "key")
    del entries[name]
    with pytest.raises(KeyError, match=f"state_dict must have the entry '{name}'"):
        BlurryState.from_state_dict(entries)


def test_states_that_do_not_fit_together_are_not_joined():
    state = make_state(WINDOW, [3])
    for other, error in (
        (3, TypeError),
        (state.to(torch.float32), TypeError),
        (make_state(WINDOW, [3], dim=5), ValueError),
        (make_state(WINDOW, [3], value_dim=5), ValueError),
        (state.to("meta"), ValueError),
        (make_state(BlurryWindow(4, 8), [3]), ValueError),
    ):
        with pytest.raises(error, match="states must"):
            BlurryState.cat((state, other))


@settings(max_examples=300)
@given(st.fixed_dictionaries(
    {"embed_dim": one(16, 12, -1, 0, 1, 2.0, "16", None), "num_heads": one(2, 4, 0, -2, 3, 2.0, None, True),
     "window": one(BlurryWindow(4, 8), WINDOW, BlurryWindow(4, (8, 8, 8)), 4, None)},
    optional={"num_kv_heads": one(2, 1, 0, -1, 3, 2.0, True), "bias": one(True, False, 1e4, None),
              "rope_base": one(1e4, 0, -1.0, math.nan, math.inf, "x", True)},
))  # fmt: skip
def test_self_attention_works_or_is_refused(arguments):
    try:
        attention = BlurrySelfAttention(**arguments)
    except (TypeError, ValueError) as error:
        return is_named(error, *arguments, "phase")
    x = torch.randn(1, 7, attention.embed_dim)
    assert attention(x).isfinite().all()


X = torch.zeros(2, 5, 16)
Q = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize("junk", [None, 3, "x", [1.0], X[0], X[:, :, :3], X.to("meta")[0]], ids=repr)
def test_self_attention_names_x(junk):
    with pytest.raises(REFUSED, match=r"^x must"):
        BlurrySelfAttention(16, 2, WINDOW)(junk)


@pytest.mark.parametrize(
    "junk", [3, "x", [True], X, torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5), torch.zeros(2, 5).to("meta")]
)
def test_self_attention_names_its_mask(junk):
    with pytest.raises(REFUSED, match=r"^key_padding_mask must"):
        BlurrySelfAttention(16, 2, WINDOW)(X, key_padding_mask=junk)


@pytest.mark.parametrize("junk", [3, "x", (X, X, X), make_state(WINDOW, [3]), make_state(BlurryWindow(4, 8), [3, 4])])
@torch.no_grad()
def test_self_attention_names_its_state(junk):
    attention = BlurrySelfAttention(16, 2, WINDOW)
    with pytest.raises(REFUSED, match=r"^state must"):
        attention(X, state=junk)
    with pytest.raises(REFUSED, match=r"^state must"):
        attention.step(X[:, :1], junk)


@pytest.mark.parametrize("number", [math.nan, -0.1, 0.1, 1.0])
def test_dropout_is_refused_whatever_it_is(number):
    with pytest.raises(NotImplementedError, match="dropout_p must be 0"):
        BlurryWindowAttention(BlurryWindow(4, 8))(Q, Q, Q, dropout_p=number)
    with replace_sdpa(BlurryWindow(4, 8)), pytest.raises(NotImplementedError, match="dropout_p must be 0"):
        torch.nn.functional.scaled_dot_product_attention(Q, Q, Q, dropout_p=number, is_causal=True)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("junk", [None, 3, "x", [1.0], np.zeros((2, 2, 5, 8)), Q[0], Q[:, :, :3], Q[:1], Q.long()])
def test_the_drop_in_names_its_tensors(which, junk):
    inputs = [Q, Q, Q]
    inputs[which] = junk
    with pytest.raises(REFUSED, match=r"query|key|value"):
        BlurryWindowAttention(BlurryWindow(4, 8))(*inputs)


@pytest.mark.parametrize("junk", ANYTHING, ids=lambda x: str(x)[:20])
def test_a_packing_is_made_of_a_mask_alone(junk):
    if isinstance(junk, torch.Tensor) and junk.dtype == torch.bool:
        return
    with pytest.raises((TypeError, ValueError), match="key_padding_mask"):
        Packing(junk)


def test_the_backward_on_a_cpu_takes_nothing_kept():
    query, key, value = make_inputs(tokens=6)
    law = (4, [12, 20], [2, 0], "fejer", 6.0, 1.0)
    out, lse, *_ = torch.ops.blurry_attn.forward(query, key, value, *law, None, None, None, None, False)
    contents = torch.empty(0, dtype=torch.uint8)
    arguments = (out, None, None, None, query, key, value, *law, None, None, None, None, out, lse)
    torch.ops.blurry_attn.backward(*arguments, contents)
    with pytest.raises(ValueError, match=r"^kept must be empty"):
        torch.ops.blurry_attn.backward(*arguments, contents.new_zeros(1))
    with pytest.raises(TypeError, match=r"^kept must"):
        torch.ops.blurry_attn.backward(*arguments, contents.float())


@pytest.mark.parametrize("name", ["grad_out", "grad_lse", "grad_state_key", "grad_state_value", "out", "lse"])
@pytest.mark.parametrize("change", [lambda x: x[..., :-1], lambda x: x[:1], lambda x: x[None], lambda x: x.float()])
def test_the_backward_operator_checks_its_own_arguments(name, change):
    query, key, value = make_inputs(tokens=6)
    law = (4, [12, 20], [2, 0], "fejer", 6.0)
    state = make_state(WINDOW, [3, 40])
    given_state = (None, state.key, state.value, state.position)
    forward = torch.ops.blurry_attn.forward(query, key, value, *law, 1.0, *given_state, True)
    out, lse, end_key, end_value, _, contents = forward
    gradients = {"grad_out": out, "grad_lse": lse, "grad_state_key": end_key, "grad_state_value": end_value}
    results = {"out": out, "lse": lse}
    which = gradients if name in gradients else results
    which[name] = change(which[name])
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
        torch.ops.blurry_attn.backward(
            *gradients.values(), query, key, value, *law, 1.0, *given_state, *results.values(), contents
        )
