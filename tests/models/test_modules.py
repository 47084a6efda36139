"""The modules: the drop-in for scaled_dot_product_attention, and self-attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blurry_attn import (
    BlurrySelfAttention,
    BlurryState,
    BlurryWindow,
    BlurryWindowAttention,
    blurry_window_attention,
    reference,
)
from blurry_attn.ops import rotary

WINDOWS = [
    BlurryWindow(4, (12, 4), phase=(1, 0)),
    BlurryWindow(3, 24),
    BlurryWindow(4, (8, 20), kernel="dirichlet"),
]
PADDING = {
    "right": [[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "left": [[1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "holes": [[0, 1, 0, 0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "none": [[0] * 9] * 3,
}


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def self_attention(window: BlurryWindow, **options) -> BlurrySelfAttention:
    """16 features, 4 query heads on 2 key/value heads, with rotary embedding, unless told otherwise."""
    return BlurrySelfAttention(16, 4, window, 2, **{"rope_base": 100.0, "dtype": torch.float64, **options})


# BlurryWindowAttention


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_drop_in_is_the_operator(window, scale):
    query, key, value = double(2, 4, 11, 6), double(2, 2, 11, 6), double(2, 2, 11, 3)
    got = BlurryWindowAttention(window)(query, key, value, scale=scale, enable_gqa=True)
    close(got, reference.blurry_window_attention(query, key, value, window, scale=scale, enable_gqa=True))
    got = BlurryWindowAttention(window)(query, key, value, None, 0.0, True, scale=scale, enable_gqa=True)
    close(got, blurry_window_attention(query, key, value, window, scale=scale, enable_gqa=True))


@pytest.mark.parametrize("kernel", ["fejer", "dirichlet"])
@pytest.mark.parametrize("leading", [(), (2,), (3, 2), (2, 3, 2)], ids=str)
def test_drop_in_takes_the_shapes_of_sdpa(kernel, leading):
    query, key, value = double(*leading, 7, 6), double(*leading, 7, 6), double(*leading, 7, 3)
    got = BlurryWindowAttention(BlurryWindow(7, 7, kernel=kernel))(query, key, value)
    close(got, F.scaled_dot_product_attention(query, key, value, is_causal=True))


def test_drop_in_places_heads_last_among_the_leading_dimensions():
    window = BlurryWindow(4, (12, 4))
    query, key, value = (double(2, 3, 2, 9, 4) for _ in range(3))
    attention = BlurryWindowAttention(window)
    got = attention(query, key, value)
    for i in range(2):
        close(got[i], attention(query[i], key[i], value[i]))
        close(got[i, 1], attention(query[i, 1], key[i, 1], value[i, 1]))


X = torch.zeros(2, 2, 5, 4)
NESTED = torch.nested.nested_tensor([torch.zeros(3, 2, 4), torch.zeros(5, 2, 4)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, X, X, torch.ones(5, 5)), {}, NotImplementedError, "attn_mask must be None"),
        ((X, X, X), {"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0"),
        ((X, X, X), {"is_causal": False}, ValueError, "is_causal must be True"),
        ((X, X[:, :, :3], X[:, :, :3]), {}, ValueError, "key must have the length of query (5), got 3"),
        ((X, X, X[0]), {}, ValueError, "the same number of dimensions, at least 2, got 4, 4 and 3"),
        ((X[0, 0, 0],) * 3, {}, ValueError, "the same number of dimensions, at least 2, got 1, 1 and 1"),
        ((X, X[:1], X), {}, ValueError, "key must have the leading dimensions of query (2,), got (1,)"),
        ((X, X, X[:1]), {}, ValueError, "value must have the leading dimensions of query (2,), got (1,)"),
        ((NESTED, NESTED, NESTED), {}, NotImplementedError, "query must not be a nested tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_drop_in_errors(args, options, error, message):
    with pytest.raises(error) as caught:
        BlurryWindowAttention(BlurryWindow(4, 8))(*args, **options)
    assert message in str(caught.value)


def test_drop_in_refuses_what_is_no_window():
    with pytest.raises(TypeError, match="window must be a BlurryWindow, got int"):
        BlurryWindowAttention(64)
    assert repr(BlurryWindow(4, 8)) in repr(BlurryWindowAttention(BlurryWindow(4, 8)))


# BlurrySelfAttention


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize("rope_base", [None, 100.0])
def test_self_attention_by_hand(window, rope_base):
    module, x = self_attention(window, rope_base=rope_base, bias=True), double(2, 10, 16)
    query, key, value = (
        projection(x).view(2, 10, heads, 4).transpose(1, 2)
        for projection, heads in ((module.q_proj, 4), (module.k_proj, 2), (module.v_proj, 2))
    )
    if rope_base is not None:
        query, key = (rotary(y, torch.arange(10), rope_base) for y in (query, key))
    out = reference.blurry_window_attention(query, key, value, window, enable_gqa=True)
    close(module(x), module.out_proj(out.transpose(1, 2).reshape(2, 10, 16)))


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize("cuts", [[5], [0, 1, 1, 7], [3, 4, 5, 6]], ids=str)
def test_pieces_equal_the_whole(window, cuts):
    module, x = self_attention(window), double(2, 10, 16)
    whole, end = module(x, return_state=True)
    state, outs = None, []
    for a, b in zip([0, *cuts], [*cuts, 10], strict=True):
        out, state = module(x[:, a:b], state=state, return_state=True)
        outs.append(out)
    close(torch.cat(outs, 1), whole)
    close(state.key, end.key)
    close(state.value, end.value)
    assert state.position.tolist() == end.position.tolist() == [10, 10]


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@torch.no_grad()
def test_step_equals_the_whole(window):
    module, x = self_attention(window), double(2, 15, 16)
    whole, end = module(x, return_state=True)
    state = BlurryState.empty(2, 2, 4, window=window, dtype=torch.float64)
    close(torch.cat([module.step(x[:, t : t + 1], state) for t in range(15)], 1), whole)
    close(state.key, end.key)
    assert state.position.tolist() == [15, 15]


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("length", [0, 4])
def test_padding_equals_sequences_alone(window, padding, length):
    """What stands in the padding (a NaN here) is not seen; the state counts kept tokens only, from any position on."""
    module, x = self_attention(window), double(3, 9, 16)
    mask = torch.tensor(PADDING[padding]).bool()
    before = double(3, length, 16)
    _, start = module(before, return_state=True)
    padded = x.masked_fill(mask.unsqueeze(-1), torch.nan).requires_grad_()
    out, state = module(padded, key_padding_mask=mask, state=start, return_state=True)
    assert (out[mask] == 0).all()
    assert start.position.tolist() == [length] * 3
    for b in range(3):
        alone = x[b : b + 1, ~mask[b]]
        expected, end = module(torch.cat((before[b : b + 1], alone), 1), return_state=True)
        close(out[b, ~mask[b]], expected[0, length:])
        close(state.key[b], end.key[0])
        close(state.value[b], end.value[0])
        assert state.position[b] == end.position[0] == length + alone.shape[1]
    gradients = torch.autograd.grad(out.square().sum(), (padded, *module.parameters()))
    assert (gradients[0][mask] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@torch.no_grad()
def test_decoding_after_a_padded_prompt():
    """Per-sequence positions: rotary embedding and window go on where each prompt ended."""
    module, x = self_attention(WINDOWS[0]), double(3, 12, 16)
    mask = torch.tensor(PADDING["left"]).bool()
    _, state = module(x[:, :9], key_padding_mask=mask, return_state=True)
    steps = torch.cat([module.step(x[:, t : t + 1], state) for t in range(9, 12)], 1)
    for b in range(3):
        close(steps[b], module(torch.cat((x[b : b + 1, :9][:, ~mask[b]], x[b : b + 1, 9:]), 1))[0, -3:])


def test_gradients_flow_through_a_padded_piece_and_its_state():
    module = BlurrySelfAttention(4, 2, BlurryWindow(3, 6, phase=(0, 1)), rope_base=10.0, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0]]).bool()

    def outputs(x, y):
        first, state = module(x, key_padding_mask=mask, return_state=True)
        second, state = module(y, state=state, return_state=True)
        return first, second, state.key, state.value

    assert torch.autograd.gradcheck(outputs, (double(2, 4, 4).requires_grad_(), double(2, 2, 4).requires_grad_()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", ["fejer", "dirichlet"])
@pytest.mark.parametrize("training", [False, True])
def test_from_multihead_attention(bias, kernel, training):
    length = 9
    mha = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True, dtype=torch.float64).train(training)
    nn.init.normal_(mha.in_proj_weight)
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    module = BlurrySelfAttention.from_multihead_attention(mha, BlurryWindow(length, length, kernel=kernel))
    assert module.training is training
    x = double(3, length, 16)
    causal = torch.ones(length, length).triu(1).bool()
    expected = mha(x, x, x, attn_mask=causal, need_weights=False)[0]
    close(module(x), expected)
    mask = torch.tensor(PADDING["right"]).bool()
    expected = mha(x, x, x, attn_mask=causal, key_padding_mask=mask, need_weights=False)[0]
    close(module(x, key_padding_mask=mask)[~mask], expected[~mask])
    nn.init.zeros_(module.q_proj.weight)
    assert (mha.in_proj_weight != 0).all(), "weights are copied"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_first": False}, "mha must have batch_first=True, got batch_first=False"),
        ({"dropout": 0.1}, "mha must have dropout=0.0, got dropout=0.1"),
        ({"add_bias_kv": True}, "mha must have add_bias_kv=False, got add_bias_kv=True"),
        ({"add_zero_attn": True}, "mha must have add_zero_attn=False, got add_zero_attn=True"),
        ({"kdim": 6}, "mha must have kdim=8, got kdim=6"),
        ({"vdim": 6}, "mha must have vdim=8, got vdim=6"),
    ],
)
def test_from_multihead_attention_errors(options, message):
    mha = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    with pytest.raises(ValueError) as caught:
        BlurrySelfAttention.from_multihead_attention(mha, BlurryWindow(4, 8))
    assert str(caught.value) == message


def test_from_multihead_attention_refuses_other_modules():
    with pytest.raises(TypeError, match=r"mha must be an nn\.MultiheadAttention, got Linear"):
        BlurrySelfAttention.from_multihead_attention(nn.Linear(2, 2), BlurryWindow(4, 8))


def test_no_tokens_and_no_sequences():
    module = self_attention(WINDOWS[0])
    for shape in ((2, 0, 16), (0, 5, 16)):
        for mask in (None, torch.zeros(shape[:2]).bool()):
            out, state = module(double(*shape), key_padding_mask=mask, return_state=True)
            assert out.shape == shape
            assert state.batch_size == shape[0]
            assert (state.position == 0).all()


def test_autocast_computes_in_its_dtype_with_a_float32_state():
    window = BlurryWindow(4, 8)
    module, x = BlurrySelfAttention(16, 2, window, rope_base=100.0), torch.randn(2, 9, 16)
    mask = torch.tensor(PADDING["holes"][:2]).bool()
    for key_padding_mask in (None, mask):
        with torch.autocast("cpu", torch.bfloat16):
            out, state = module(x, key_padding_mask=key_padding_mask, return_state=True)
        assert out.dtype == torch.bfloat16
        assert state.key.dtype == torch.float32
        expected = module(x, key_padding_mask=key_padding_mask)
        assert (out - expected).norm() < 0.03 * expected.norm()


def test_parameters():
    module = BlurrySelfAttention(12, 6, WINDOWS[0], 2, bias=True, dtype=torch.float64)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "q_proj.weight": (12, 12),
        "q_proj.bias": (12,),
        "k_proj.weight": (4, 12),
        "k_proj.bias": (4,),
        "v_proj.weight": (4, 12),
        "v_proj.bias": (4,),
        "out_proj.weight": (12, 12),
        "out_proj.bias": (12,),
    }
    assert all(name.endswith("weight") for name, _ in BlurrySelfAttention(12, 2, WINDOWS[0]).named_parameters())
    assert f"embed_dim=12, num_heads=6, num_kv_heads=2, rope_base=None, window={WINDOWS[0]!r}" in repr(module)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((16, 3, BlurryWindow(4, 8)), {}, ValueError, "embed_dim must be a positive multiple of num_heads (3), got 16"),
        ((16, 0, BlurryWindow(4, 8)), {}, ValueError, "embed_dim must be a positive multiple of num_heads (0), got 16"),
        ((16, 4, BlurryWindow(4, 8), 3), {}, ValueError, "num_kv_heads must divide num_heads (4), got 3"),
        ((16, 4, BlurryWindow(4, 8), 0), {}, ValueError, "num_kv_heads must divide num_heads (4), got 0"),
        ((16, 4, 8), {}, TypeError, "window must be a BlurryWindow, got int"),
        ((16, 4, BlurryWindow(4, (8, 8))), {}, ValueError, "window must have one entry per kv head (4), got 2"),
        (
            (12, 4, BlurryWindow(4, 8)),
            {"rope_base": 9.0},
            ValueError,
            "embed_dim // num_heads must be even with rope_base",
        ),
        ((16, 4, BlurryWindow(4, 8)), {"rope_base": float("inf")}, ValueError, "rope_base must be positive and finite"),
        ((16, 4, BlurryWindow(4, 8)), {"rope_base": float("nan")}, ValueError, "rope_base must be positive and finite"),
        ((16, 4, BlurryWindow(4, 8)), {"rope_base": "x"}, TypeError, "rope_base must be a float or None, got 'x'"),
        ((16.0, 4, BlurryWindow(4, 8)), {}, TypeError, "embed_dim must be an int, got 16.0"),
        ((16, 4, BlurryWindow(4, 8)), {"rope_base": 0.0}, ValueError, "rope_base must be positive and finite, or None"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_construction_errors(args, options, error, message):
    with pytest.raises(error) as caught:
        BlurrySelfAttention(*args, **options)
    assert message in str(caught.value)


def state_of(window: BlurryWindow, batch: int) -> BlurryState:
    return BlurryState.empty(batch, 2, 4, window=window, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 16)}, ValueError, "x must be (B, T, 16), got (5, 16)"),
        ({"x": torch.zeros(2, 5, 8)}, ValueError, "x must be (B, T, 16), got (2, 5, 8)"),
        ({"x": NESTED}, NotImplementedError, "x must not be a nested tensor"),
        ({"key_padding_mask": torch.zeros(2, 5)}, TypeError, "key_padding_mask must be bool (True = padding)"),
        ({"key_padding_mask": torch.zeros(2, 4).bool()}, ValueError, "key_padding_mask must be (B, T) = (2, 5)"),
        (
            {"key_padding_mask": torch.zeros(2, 5, device="meta").bool()},
            ValueError,
            "key_padding_mask must be on the device of x (cpu), got meta",
        ),
        ({"state": state_of(WINDOWS[0], 3)}, ValueError, "state must hold 2 sequences (B of x), got 3"),
        ({"state": state_of(BlurryWindow(4, 8), 2)}, ValueError, "state must have the window of this module"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_call_errors(change, error, message):
    with pytest.raises(error) as caught:
        self_attention(WINDOWS[0])(**{"x": double(2, 5, 16), **change})
    assert message in str(caught.value)


def test_step_errors():
    module, state = self_attention(WINDOWS[0]), state_of(WINDOWS[0], 2)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"x must hold one token per sequence \(B, 1, E\), got \(2, 3, 16\)"),
    ):
        module.step(double(2, 3, 16), state)
    with torch.no_grad(), pytest.raises(ValueError, match="state must hold 3 sequences"):
        module.step(double(3, 1, 16), state)
    with pytest.raises(NotImplementedError, match="no_grad"):
        module.step(double(2, 1, 16), state)
    assert state.position.tolist() == [0, 0]
    assert math.fsum(state.key.abs().flatten().tolist()) == 0


def refuse(*_args):
    raise RuntimeError("refused")


def break_weight_dtype(module):
    module.out_proj.float()


def break_bias_dtype(module):
    module.out_proj.bias = nn.Parameter(module.out_proj.bias.half())


def break_size(module):
    module.out_proj = nn.Linear(8, 16, dtype=torch.float64)


def break_device(module):
    module.out_proj.to("meta")


def break_before(module):
    module.out_proj.register_forward_pre_hook(refuse)


def break_after(module):
    module.out_proj.register_forward_hook(refuse)


def break_everywhere(module):
    """A hook of all modules that fails at the output projection alone."""
    return nn.modules.module.register_module_forward_hook(
        lambda this, _args, _out: refuse() if this is module.out_proj else None
    )


def break_forward(module):
    module.out_proj.forward = refuse


def break_class(module):
    module.out_proj.__class__ = type("Other", (nn.Linear,), {"forward": refuse})


@pytest.mark.parametrize("window", WINDOWS, ids=repr)
@pytest.mark.parametrize(
    "damage",
    [
        break_weight_dtype,
        break_bias_dtype,
        break_size,
        break_device,
        break_before,
        break_after,
        break_everywhere,
        break_forward,
        break_class,
    ],
)
@torch.no_grad()
def test_a_step_that_fails_leaves_the_state(damage, window):
    module = self_attention(window, bias=True)
    _, state = module(double(2, 7, 16), return_state=True)
    before = state.clone()
    handle = damage(module)
    try:
        with pytest.raises((RuntimeError, NotImplementedError)):
            module.step(double(2, 1, 16), state)
    finally:
        if handle is not None:
            handle.remove()
    for name, was in before.state_dict().items():
        assert torch.equal(state.state_dict()[name], was), name


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_a_step_of_a_plain_module_copies_no_state(autocast, monkeypatch):
    module = self_attention(WINDOWS[1], bias=True, dtype=torch.float32)
    _, state = module(torch.randn(2, 7, 16), return_state=True)
    monkeypatch.setattr(BlurryState, "clone", refuse)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module.step(torch.randn(2, 1, 16), state)
    assert state.position.tolist() == [8, 8]
