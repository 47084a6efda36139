"""replace_sdpa: an unchanged model runs blurred inside, every call that cannot be replaced is an error."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from blurry_attn import BlurryWindow, reference, replace_sdpa

WINDOW = BlurryWindow(3, 9)
LENGTH, HEADS, WIDTH = 10, 2, 8
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def by_hand(mha: nn.MultiheadAttention, x: torch.Tensor, window: BlurryWindow) -> torch.Tensor:
    """x (B, T, E) -> (B, T, E): the weights of mha around the reference."""
    query, key, value = (
        y.unflatten(-1, (mha.num_heads, -1)).transpose(1, 2)
        for y in F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, -1)
    )
    return mha.out_proj(reference.blurry_window_attention(query, key, value, window).transpose(1, 2).flatten(2))


def layer_by_hand(layer: nn.TransformerEncoderLayer, x: torch.Tensor, window: BlurryWindow) -> torch.Tensor:
    if layer.norm_first:
        x = x + by_hand(layer.self_attn, layer.norm1(x), window)
        return x + layer.linear2(F.relu(layer.linear1(layer.norm2(x))))
    x = layer.norm1(x + by_hand(layer.self_attn, x, window))
    return layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))


def encoder_layer(batch_first: bool = True, norm_first: bool = False, **options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        WIDTH,
        HEADS,
        12,
        **{"dropout": 0.0, "dtype": torch.float64, **options},
        batch_first=batch_first,
        norm_first=norm_first,
    )


@pytest.fixture(autouse=True)
def _fast_path_is_as_before():
    assert torch.backends.mha.get_fastpath_enabled()
    yield
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "function",
    [
        scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    ],
    ids=["imported before", "operator", "overload"],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_calls_are_replaced_by_any_name(function, scale):
    query, key, value = double(2, 4, LENGTH, 6), double(2, 2, LENGTH, 6), double(2, 2, LENGTH, 3)
    expected = reference.blurry_window_attention(query, key, value, WINDOW, scale=scale, enable_gqa=True)
    with replace_sdpa(WINDOW):
        got = function(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        close(F.scaled_dot_product_attention(query, key, value, None, 0.0, True, scale=scale, enable_gqa=True), got)
    close(got, expected)
    outside = function(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    assert (outside - expected).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["hint", "bool", "float"])
def test_encoder_layer(mode, batch_first, norm_first, mask):
    layer = encoder_layer(batch_first, norm_first).train(mode == "train")
    x = double(3, LENGTH, WIDTH)
    given = x if batch_first else x.transpose(0, 1)
    src_mask = torch.zeros(LENGTH, LENGTH).double().masked_fill(CAUSAL, -torch.inf) if mask == "float" else CAUSAL
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        full = layer(given, src_mask=src_mask, is_causal=mask == "hint")
        with replace_sdpa(WINDOW):
            got = layer(given, src_mask=src_mask, is_causal=mask == "hint")
        expected = layer_by_hand(layer, x, WINDOW)
    assert (got - full).abs().max() > 0.001
    close(got if batch_first else got.transpose(0, 1), expected)


def test_gradients_reach_the_weights():
    layer, x = encoder_layer(), double(2, LENGTH, WIDTH).requires_grad_()
    with replace_sdpa(WINDOW):
        got = layer(x, src_mask=CAUSAL, is_causal=True)
    inputs = (x, *layer.parameters())
    weight = double(*got.shape)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((layer_by_hand(layer, x, WINDOW) * weight).sum(), inputs),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_of_several_layers(training):
    encoder = nn.TransformerEncoder(encoder_layer(), 2).train(training)
    x = double(2, LENGTH, WIDTH)
    expected = x
    for layer in encoder.layers:
        expected = layer_by_hand(layer, expected, WINDOW)
    with torch.no_grad(), replace_sdpa(WINDOW):
        close(encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)), expected)


@pytest.mark.parametrize("kdim", [None, 6])
def test_multihead_attention_unbatched_and_with_other_widths(kdim):
    mha = nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=kdim, batch_first=True, dtype=torch.float64)
    x, y = double(LENGTH, WIDTH), double(LENGTH, kdim or WIDTH)
    whole = BlurryWindow(LENGTH, LENGTH)
    expected = mha(x, y, y, attn_mask=CAUSAL, need_weights=False)[0]
    with replace_sdpa(whole):
        close(mha(x, y, y, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0], expected)
        close(mha(x, y, y, attn_mask=CAUSAL, need_weights=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, x = encoder_layer(dtype=torch.float32).eval(), torch.randn(2, LENGTH, WIDTH)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), torch.autocast("cpu", dtype), replace_sdpa(WINDOW):
            got = layer(x, src_mask=CAUSAL, is_causal=True)
            attended = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        assert attended.dtype == dtype
        expected = layer_by_hand(layer, x, WINDOW)
        assert (got - expected).norm() < 0.03 * expected.norm()


T = LENGTH
FLOAT_MASK = torch.zeros(T, T).masked_fill(CAUSAL, -torch.inf)


@pytest.mark.parametrize(
    "mask",
    [
        ~CAUSAL,
        (~CAUSAL).expand(2, 1, T, T),
        (~CAUSAL).repeat(2, 2, 1, 1),
        FLOAT_MASK.double(),
        torch.zeros(T, T).masked_fill(CAUSAL, torch.finfo(torch.float32).min),
        causal_upper_left(T, T),
        causal_lower_right(T, T),
    ],
    ids=["bool", "expanded", "per head", "float", "lowest number", "upper left", "lower right"],
)
def test_a_mask_that_is_exactly_causal_counts_as_causal(mask):
    x = double(2, 2, T, 4)
    with replace_sdpa(WINDOW):
        close(F.scaled_dot_product_attention(x, x, x, mask), reference.blurry_window_attention(x, x, x, WINDOW))


X = torch.zeros(2, 2, T, 4)
OTHER = (~CAUSAL).clone()
OTHER[T - 1, 0] = False
NESTED = torch.nested.nested_tensor([torch.zeros(3, 2, 4), torch.zeros(5, 2, 4)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, X, X), {}, ValueError, "is_causal must be True: cannot replace"),
        (
            (X[:, :, :1], X[:, :, :1], X[:, :, :1]),
            {},
            ValueError,
            "(query (2, 2, 1, 4), key (2, 2, 1, 4), no attn_mask)",
        ),
        ((X[:, :, :1], X, X), {}, ValueError, "(query (2, 2, 1, 4), key (2, 2, 10, 4), no attn_mask)"),
        ((X[:, :, :3], X, X), {"is_causal": True}, ValueError, "key must have the length of query (3), got 10"),
        ((X, X, X, OTHER), {}, NotImplementedError, "attn_mask must be None or exactly the causal mask, got another"),
        ((X, X, X, torch.ones(T, T).bool()), {}, NotImplementedError, "another mask of shape (10, 10)"),
        ((X, X, X, torch.ones(T).bool()), {}, NotImplementedError, "another mask of shape (10,)"),
        ((X, X, X, torch.stack((~CAUSAL, OTHER))), {}, NotImplementedError, "another mask of shape (2, 10, 10)"),
        ((X, X, X, FLOAT_MASK + torch.eye(T)), {}, NotImplementedError, "attn_mask must be None or exactly the causal"),
        (
            (X, X, X, FLOAT_MASK.clamp(min=-1e4)),
            {},
            NotImplementedError,
            "attn_mask must be None or exactly the causal",
        ),
        ((X, X, X, FLOAT_MASK.clone().requires_grad_()), {}, NotImplementedError, "attn_mask must be None or exactly"),
        ((X, X, X, torch.zeros(T, T).long()), {}, NotImplementedError, "attn_mask must be None or exactly the causal"),
        ((X[:, :, :3], X, X, (~CAUSAL)[:3]), {}, NotImplementedError, "for query length 3 and key length 10"),
        (
            (X[:, :, :3], X, X, causal_lower_right(3, T)),
            {},
            NotImplementedError,
            "for query length 3 and key length 10",
        ),
        ((X, X, X), {"dropout_p": 0.5, "is_causal": True}, NotImplementedError, "dropout_p must be 0"),
        ((NESTED, NESTED, NESTED), {"is_causal": True}, NotImplementedError, "query must not be a nested tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_calls_are_errors(args, options, error, message):
    with pytest.raises(error) as caught, replace_sdpa(WINDOW):
        F.scaled_dot_product_attention(*args, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "is_causal must be True"),
        (
            {"src_mask": CAUSAL, "src_key_padding_mask": torch.arange(T).expand(2, T) > 7},
            NotImplementedError,
            "attn_mask must be None or exactly the causal mask",
        ),
    ],
    ids=["no mask", "padding"],
)
def test_an_encoder_layer_that_is_not_causal_is_an_error(training, options, error, message):
    with pytest.raises(error, match=message), torch.no_grad(), replace_sdpa(WINDOW):
        encoder_layer().train(training)(double(2, T, WIDTH), **options)


def test_attention_weights_and_dropout_in_modules_are_errors():
    x, mha = double(2, T, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64).eval()
    with pytest.raises(ValueError, match="need_weights must be False"), replace_sdpa(WINDOW):
        mha(x, x, x, attn_mask=CAUSAL)
    layer = encoder_layer(dropout=0.5)
    with pytest.raises(NotImplementedError, match="dropout_p must be 0"), replace_sdpa(WINDOW):
        layer(x, src_mask=CAUSAL, is_causal=True)
    with replace_sdpa(WINDOW):
        close(layer.eval()(x, src_mask=CAUSAL, is_causal=True), layer_by_hand(layer, x, WINDOW))


def test_contexts_nest_and_are_entered_again():
    inner_window = BlurryWindow(2, 8)
    layer, x = encoder_layer(), double(2, T, WIDTH)
    q = double(1, HEADS, T, 4)

    def check(window: BlurryWindow) -> None:
        close(
            F.scaled_dot_product_attention(q, q, q, is_causal=True), reference.blurry_window_attention(q, q, q, window)
        )
        close(layer(x, src_mask=CAUSAL, is_causal=True), layer_by_hand(layer, x, window))

    outer, inner = replace_sdpa(WINDOW), replace_sdpa(inner_window)
    for _ in range(2):
        with outer:
            check(WINDOW)
            with inner:
                check(inner_window)
                with outer:
                    check(WINDOW)
                check(inner_window)
            check(WINDOW)


@pytest.mark.parametrize("replace_first", [True, False])
def test_other_modes_do_not_hide_calls(replace_first):
    """A default device is a mode too, below or above this one."""
    layer, x = encoder_layer().eval(), double(2, T, WIDTH)
    contexts = [replace_sdpa(WINDOW), torch.device("cpu")]
    first, second = contexts if replace_first else reversed(contexts)
    with torch.no_grad(), first, second:
        close(layer(x, src_mask=CAUSAL, is_causal=True), layer_by_hand(layer, x, WINDOW))


def test_the_fast_path_comes_back_as_it_was():
    for before in (True, False):
        torch.backends.mha.set_fastpath_enabled(before)
        try:
            with replace_sdpa(WINDOW):
                assert not torch.backends.mha.get_fastpath_enabled()
                with replace_sdpa(WINDOW):
                    assert not torch.backends.mha.get_fastpath_enabled()
                assert not torch.backends.mha.get_fastpath_enabled()
            assert torch.backends.mha.get_fastpath_enabled() is before
            with pytest.raises(KeyError), replace_sdpa(WINDOW), replace_sdpa(WINDOW):
                raise KeyError
            assert torch.backends.mha.get_fastpath_enabled() is before
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    x = torch.zeros(1, 1, T, 4)
    assert F.scaled_dot_product_attention(x, x, x).shape == x.shape


def test_threads():
    """A context holds in its own thread; the fast path stays off until the last thread has left."""
    q = double(1, 2, T, 4)
    full, blurred = (
        F.scaled_dot_product_attention(q, q, q, is_causal=True),
        reference.blurry_window_attention(q, q, q, WINDOW),
    )
    entered, leave = threading.Event(), threading.Event()
    seen = {}

    def worker() -> None:
        with replace_sdpa(WINDOW):
            entered.set()
            leave.wait(60)
            seen["inside"] = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            seen["fast path"] = torch.backends.mha.get_fastpath_enabled()

    thread = threading.Thread(target=worker)
    with replace_sdpa(WINDOW):
        thread.start()
        assert entered.wait(60)
    assert not torch.backends.mha.get_fastpath_enabled()
    close(F.scaled_dot_product_attention(q, q, q, is_causal=True), full)
    leave.set()
    thread.join(60)
    close(seen["inside"], blurred)
    assert seen["fast path"] is False


def test_compiled_models_are_replaced_too():
    torch._dynamo.reset()
    layer, x = encoder_layer(), double(2, T, WIDTH)
    compiled = torch.compile(layer, backend="eager")
    full = compiled(x, src_mask=CAUSAL, is_causal=True)
    with replace_sdpa(WINDOW):
        close(compiled(x, src_mask=CAUSAL, is_causal=True), layer_by_hand(layer, x, WINDOW))
    assert torch.equal(compiled(x, src_mask=CAUSAL, is_causal=True), full)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_is_named(compiled):
    torch._dynamo.reset()
    q = torch.randn(1, 2, 16, 16)
    attend = torch.compile(flex_attention, backend="eager") if compiled else flex_attention
    with pytest.raises(Exception, match="replace_sdpa: cannot replace flex_attention"), replace_sdpa(WINDOW):
        attend(q, q, q)
    torch._dynamo.reset()
    assert flex_attention(q, q, q).shape == q.shape


def other_operators() -> list:
    """All of PyTorch's operators that attend, backwards aside, in every form that Python can call."""
    found = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, name = qualified.split(".")[0].split("::")
        words = ("attention", "attn", "sdp", "encoder_layer")
        if namespace in ("aten", "torch_attn") and any(word in name for word in words) and "backward" not in name:
            packet = getattr(getattr(torch.ops, namespace), name)
            found |= {str(x): x for x in (packet, *(getattr(packet, overload) for overload in packet.overloads()))}
            if hasattr(torch, name):
                found[f"torch.{name}"] = getattr(torch, name)
    return [pytest.param(x, id=name) for name, x in found.items() if "aten.scaled_dot_product_attention" not in name]


@pytest.mark.parametrize("operator", other_operators())
def test_an_operator_that_attends_by_another_name_is_refused(operator):
    with pytest.raises(NotImplementedError, match="replace_sdpa: cannot replace"):
        replace_sdpa(WINDOW).__torch_function__(operator, ())  # as any call of it ends here, whatever its arguments


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["function", "overload", "varlen"])
def test_a_model_that_calls_another_operator_is_refused(form, compiled):
    torch._dynamo.reset()

    def attend(x):
        if form == "varlen":
            ends = torch.tensor([0, T], dtype=torch.int32)
            return varlen_attn(x[0], x[0], x[0], ends, ends, T, T)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return (flash if form == "overload" else torch._scaled_dot_product_flash_attention_for_cpu)(x, x, x)[0]

    if compiled:
        attend = torch.compile(attend, backend="eager")
    with pytest.raises(Exception, match="replace_sdpa: cannot replace _"), replace_sdpa(WINDOW):
        attend(torch.randn(1, HEADS, T, 8))


def test_the_backward_of_a_call_from_outside_runs_inside():
    x, given = torch.randn(1, HEADS, T, 8, requires_grad=True), torch.randn(1, HEADS, T, 8)
    out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    (expected,) = torch.autograd.grad(out, x, given, retain_graph=True)
    with replace_sdpa(WINDOW):
        assert torch.equal(torch.autograd.grad(out, x, given)[0], expected)


class HandWritten(nn.Module):
    """A small GPT in the usual styles of splitting heads."""

    def __init__(self, style: str):
        super().__init__()
        self.style, options = style, {"bias": False, "dtype": torch.float64}
        self.embedding = nn.Embedding(11, WIDTH, dtype=torch.float64)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, **options) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH, **options) for _ in range(2))

    def heads(self, x):
        if self.style == "split and view":
            batch, tokens, _ = x.shape
            return [y.view(batch, tokens, HEADS, -1).transpose(1, 2) for y in x.split(WIDTH, dim=2)]
        if self.style == "chunk and unflatten":
            return [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in x.chunk(3, dim=-1)]
        return x.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, tokens, attend=None, **options):
        x = self.embedding(tokens)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            heads = self.heads(qkv(x))
            if attend is None:
                attended = F.scaled_dot_product_attention(*heads, **{"is_causal": True, **options})
            else:
                attended = attend(*heads)
            x = x + out(attended.transpose(1, 2).contiguous().flatten(2))
        return x @ self.embedding.weight.T


@pytest.mark.parametrize("style", ["split and view", "chunk and unflatten", "reshape and permute"])
def test_a_hand_written_model_compiled_whole(style):
    """One graph for all lengths, forward and backward, and full attention again afterwards."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = HandWritten(style)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (20, 31, 17):
        tokens = torch.randint(11, (2, length))
        expected = model(tokens, lambda *heads: reference.blurry_window_attention(*heads, WINDOW))
        with replace_sdpa(WINDOW):
            close(model(tokens), expected)
            got = compiled(tokens)
            gradients = torch.autograd.grad(got.square().sum(), [*model.parameters()])
        close(got, expected)
        for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), [*model.parameters()]), strict=True):
            close(a, b)
    assert counter.frame_count <= 2
    full = model(tokens)
    assert (full - expected).abs().max() > 0.001
    close(compiled(tokens), full)


def test_an_encoder_layer_compiled_whole():
    torch._dynamo.reset()
    layer, x = encoder_layer(), double(2, T, WIDTH)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with replace_sdpa(WINDOW):
        close(compiled(x, src_mask=CAUSAL, is_causal=True), layer_by_hand(layer, x, WINDOW))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": False}, "replace_sdpa: is_causal must be True"),
        ({"dropout_p": 0.5}, "dropout_p must be 0"),
    ],
    ids=["not causal", "dropout"],
)
def test_a_compiled_model_that_cannot_be_replaced_is_named(fullgraph, options, message):
    torch._dynamo.reset()
    compiled = torch.compile(HandWritten("split and view"), fullgraph=fullgraph, backend="eager")
    with pytest.raises(Exception, match=message), replace_sdpa(WINDOW):
        compiled(torch.randint(11, (2, T)), **options)


@pytest.mark.parametrize(
    ("backward", "use_reentrant"),
    [("Tensor.backward", True), ("Tensor.backward", False), ("autograd.backward", False), ("autograd.grad", False)],
)
def test_activation_checkpointing(backward, use_reentrant):
    """The forward that a backward runs again is replaced too."""
    layer, x = encoder_layer(), double(2, T, WIDTH).requires_grad_()
    with replace_sdpa(WINDOW):
        out = checkpoint(lambda y: layer(y, src_mask=CAUSAL, is_causal=True), x, use_reentrant=use_reentrant)
        loss = out.square().sum()
        if backward == "autograd.grad":
            x.grad = torch.autograd.grad(loss, x)[0]
        elif backward == "Tensor.backward":
            loss.backward()
        else:
            torch.autograd.backward(loss)
    close(x.grad, torch.autograd.grad(layer_by_hand(layer, x, WINDOW).square().sum(), x)[0])


def test_a_model_is_left_as_it_was():
    layer, x = encoder_layer(), double(2, T, WIDTH)
    twin = copy.deepcopy(layer)
    before = layer(x, src_mask=CAUSAL, is_causal=True)
    with replace_sdpa(WINDOW):
        layer(x, src_mask=CAUSAL, is_causal=True)
    assert torch.equal(layer(x, src_mask=CAUSAL, is_causal=True), before)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))


def test_bad_window():
    with pytest.raises(TypeError, match="window must be a BlurryWindow, got int"):
        replace_sdpa(64)
    assert torch.backends.mha.get_fastpath_enabled()
