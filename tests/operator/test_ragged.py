"""Padded batches: packed and unpacked, every sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch
from helpers import KERNELS, WINDOWS, make_inputs, make_state, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from blurry_attn import BlurrySelfAttention, BlurryState, BlurryWindow, Packing, blurry_window_attention

TOKENS = 40
PADDING = {
    "left": [[t < 13 for t in range(TOKENS)], [False] * TOKENS, [t < 39 for t in range(TOKENS)]],
    "right": [[t >= 7 for t in range(TOKENS)], [t >= 33 for t in range(TOKENS)], [False] * TOKENS],
    "holes": [[t % 3 == 1 for t in range(TOKENS)], [True] * TOKENS, [t in (0, 5, 6, 39) for t in range(TOKENS)]],
    "none": [[False] * TOKENS] * 3,
    "all": [[True] * TOKENS] * 3,
}


@pytest.mark.parametrize("keep_padding", [False, True], ids=["dropped", "kept"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sequences_are_as_alone_bit_for_bit(kernel, padding, keep_padding, device):
    """Output, final state and gradients; what stands in the padding (a NaN here) is not seen."""
    window, mask = WINDOWS[kernel], torch.tensor(PADDING[padding], device=device)
    inputs = make_inputs(3, 4, 2, TOKENS, dtype=torch.float32, device=device)
    start = make_state(window, [0, 5, 30], dtype=torch.float32, device=device)
    cotangent = randn(3, 4, TOKENS, 8, dtype=torch.float32, device=device, seed=9)
    packing = Packing(mask, keep_padding=keep_padding)
    padded = [x.masked_fill(mask[:, None, :, None], torch.nan).requires_grad_() for x in inputs]
    packed, end = blurry_window_attention(
        *(packing.pack(x, dim=2) for x in padded),
        window,
        enable_gqa=True,
        cu_seqlens=packing.cu_seqlens,
        state=packing.pack_state(start),
        return_state=True,
    )
    end = packing.unpack_state(end)
    assert end.batch_size == 3
    out = packing.unpack(packed, dim=2)
    gradients = torch.autograd.grad(out, padded, cotangent)
    for x in (out, *gradients):
        assert (x.transpose(1, 2)[mask] == 0).all()
    for b in range(3):
        kept = ~mask[b]
        alone = [x[b : b + 1, :, kept].requires_grad_() for x in inputs]
        expected, last = blurry_window_attention(
            *alone, window, enable_gqa=True, state=start[b : b + 1], return_state=True
        )
        assert torch.equal(out[b, :, kept], expected[0])
        for ours, theirs in zip(
            gradients, torch.autograd.grad(expected, alone, cotangent[b : b + 1, :, kept]), strict=True
        ):
            assert torch.equal(ours[b, :, kept], theirs[0])
        for name in ("key", "value", "position"):
            assert torch.equal(getattr(end, name)[b], getattr(last, name)[0])


@pytest.mark.parametrize("keep_padding", [False, True])
def test_packing_is_row_by_row_and_has_positions(keep_padding, device):
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]], device=device).bool()
    packing = Packing(mask, keep_padding=keep_padding)
    x = torch.arange(1, 13, device=device).view(3, 4)
    rest = [0] * 7 if keep_padding else []
    assert packing.pack(x).tolist() == [[1, 3, 10, 11, 12, *rest]]
    assert packing.cu_seqlens.tolist() == [0, 2, 2, 5, *([12] if keep_padding else [])]
    assert packing.positions[~mask].tolist() == [0, 1, 0, 1, 2]
    assert packing.unpack(packing.pack(x) + 1).tolist() == [[2, 0, 4, 0], [0] * 4, [0, 11, 12, 13]]
    wide = randn(3, 2, 4, 5, device=device)
    packed = packing.pack(wide, dim=2)
    assert packed.shape == (1, 2, 5 + len(rest), 5)
    assert torch.equal(packing.unpack(packed, dim=2), wide.masked_fill(mask[:, None, :, None], 0))


ONE = make_state(WINDOWS["fejer"], [3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda mask: Packing([[True]]), TypeError, "key_padding_mask must be a Tensor, got list"),
        (lambda mask: Packing(mask.float()), TypeError, "key_padding_mask must be bool (True = padding), got torch.fl"),
        (lambda mask: Packing(mask[0]), ValueError, "key_padding_mask must be (B, T), got shape (3,)"),
        (lambda mask: Packing(mask).pack(torch.zeros(2, 4)), ValueError, "x must have (B, T) = (2, 3) in dimensions 0"),
        (lambda mask: Packing(mask).pack(torch.zeros(2, 3), 2), ValueError, "dimensions 0 and 2, got shape (2, 3)"),
        (lambda mask: Packing(mask).pack(torch.zeros(2, 2), 0), ValueError, "dimensions 0 and 0, got shape (2, 2)"),
        (lambda mask: Packing(mask).unpack(torch.zeros(1, 5)), ValueError, "x must have 1 and 6 tokens in dimensions"),
        (lambda mask: Packing(mask).unpack(torch.zeros(2, 6)), ValueError, "0 and 1, got shape (2, 6)"),
        (lambda mask: Packing(mask.to_sparse()), TypeError, "key_padding_mask must be a dense tensor, got layout"),
        (lambda mask: Packing(mask).pack([1]), TypeError, "x must be a Tensor, got list"),
        (lambda mask: Packing(mask).unpack(None), TypeError, "x must be a Tensor, got NoneType"),
        (lambda mask: Packing(mask).pack(torch.zeros(2, 3), "1"), TypeError, "dim must be an int, got '1'"),
        (lambda mask: Packing(mask).pack_state(None), TypeError, "state must be a BlurryState, got NoneType"),
        (lambda mask: Packing(mask).pack_state(ONE), ValueError, "state must hold 2 sequences, got 1"),
        (lambda mask: Packing(mask, keep_padding=True).unpack_state(ONE), ValueError, "must hold 3 sequences, got 1"),
    ],
    ids=range(15),
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call(torch.zeros(2, 3, dtype=torch.bool))
    assert message in str(caught.value)


def test_a_masked_model_compiles_whole(device):
    """One graph for all masks and lengths, and no shape in it depends on a mask."""
    torch._dynamo.reset()
    window = BlurryWindow(4, (12, 4))
    module = BlurrySelfAttention(16, 4, window, 2, rope_base=100.0, device=device)
    counter = CompileCounterWithBackend("aot_eager")

    def attend(x, mask, state):
        return module(x, key_padding_mask=mask, state=state, return_state=True)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    state = BlurryState.empty(3, 2, 4, window=window, device=device)
    for tokens, padding in ((20, "left"), (31, "holes"), (40, "right")):
        x = randn(3, tokens, 16, dtype=torch.float32, device=device)
        mask = torch.tensor(PADDING[padding], device=device)[:, :tokens].contiguous()
        results = [f(x, mask, state) for f in (compiled, attend)]
        for (out, end), (expected, last) in (results,):
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(end.key, last.key)
            assert end.position.tolist() == last.position.tolist()
        gradients = [
            torch.autograd.grad(out.square().sum() + end.value.sum(), [*module.parameters()]) for out, end in results
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        state = results[0][1].detach()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@torch.no_grad()
def test_a_trace_holds_for_every_mask(mode, device):
    attention = BlurrySelfAttention(16, 2, WINDOWS["fejer"], rope_base=100.0, device=device)
    x, mask = randn(2, 9, 16, dtype=torch.float32, device=device), torch.zeros(2, 9, dtype=torch.bool, device=device)

    def attend(x, mask):
        return attention(x, key_padding_mask=mask)

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert attend(fake.from_tensor(x), fake.from_tensor(mask)).shape == x.shape
    graph = make_fx(attend, tracing_mode=mode, _allow_non_fake_inputs=True)(x, mask)
    for at in (slice(0, 0), slice(3), slice(4, None)):
        other = mask.clone()
        other[1, at] = True
        torch.testing.assert_close(graph(x, other), attend(x, other))


def test_a_mask_without_values():
    """Shapes need none, but to leave the padding out."""
    with torch.device("meta"):
        attention = BlurrySelfAttention(16, 2, WINDOWS["fejer"])
        x, mask = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.bool)
        out, state = attention(x, key_padding_mask=mask, return_state=True)
        assert out.shape == x.shape and state.position.shape == (2,) and out.is_meta
        assert attention(x, key_padding_mask=mask, state=state).shape == x.shape
        with pytest.raises(
            ValueError, match=r"key_padding_mask must have values, .* unless keep_padding=True, got a meta"
        ):
            Packing(mask)
    with FakeTensorMode(), pytest.raises(ValueError, match=r"key_padding_mask must have values, .* got a fake tensor"):
        Packing(torch.zeros(2, 9, dtype=torch.bool))
