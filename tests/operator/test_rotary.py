"""Rotary embedding: an operator of its own, one read and one write of a tensor."""

from __future__ import annotations

import pytest
import torch
from helpers import randn
from torch import Tensor

from blurry_attn.ops import rotary

HALVES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = {
    "(B, H, T, D)": lambda x: x,
    "(B, T, H, D)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2],
    "not aligned": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


def turned(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """By complex numbers, in float64 and on the CPU."""
    x, positions = x.double().cpu(), positions.double().cpu()
    first, second = x.chunk(2, -1)
    angle = positions.unsqueeze(-1) * base ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    angle = angle if positions.dim() == 1 else angle.unsqueeze(1)
    pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [2, 6, 16, 64, 96, 130])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_turns_pairs_by_the_position(dtype, dim, layout, device):
    """Of each sequence or of all, from the first token on and far out; results lie in memory as (B, T, H, D) does."""
    x = LAYOUTS[layout](randn(2, 3, 5, dim, dtype=dtype, device=device))
    far = torch.tensor([[0, 1, 2, 7, 10**7], [3, 1, 4, 1, 10**9]], device=device)
    for positions in (far, far[0], far.int(), torch.arange(10, device=device)[::2]):
        got, expected = rotary(x, positions, 50.0), turned(x, positions, 50.0)
        assert got.dtype == dtype and got.device == x.device
        error = (got.double().cpu() - expected).abs().max() / expected.abs().max()
        angles = 4 * 2**-53 * positions.max().item()  # a frequency's last digit
        assert error <= angles + HALVES.get(dtype, 1e-14 if dtype == torch.float64 else 1e-6)
        dense = layout == "(B, T, H, D)"
        assert (got.transpose(1, 2) if dense else got).is_contiguous()
        assert torch.equal(got, rotary(x.contiguous(), positions, 50.0))


@pytest.mark.parametrize(("heads", "tokens", "batch"), [(67, 70, 2), (0, 5, 2), (3, 0, 2), (3, 5, 0), (1, 1, 300)])
def test_many_heads_and_none(heads, tokens, batch, device):
    x, positions = randn(batch, heads, tokens, 128, dtype=torch.float32, device=device), torch.arange(tokens).to(device)
    got = rotary(x, positions, 10000.0)
    torch.testing.assert_close(got.cpu(), turned(x, positions, 10000.0).float(), rtol=1e-5, atol=1e-6)


def test_float32_has_the_digits_of_its_angles(device):
    """Cosine and sine to a rounding of theirs, 1.7 in the last place where they are near 1."""
    x = torch.zeros(1, 1, 5000, 64, device=device)
    x[..., :32] = 1
    positions = torch.arange(0, 5 * 10**6, 1000, device=device)
    error = rotary(x, positions, 10000.0).double().cpu() - turned(x, positions, 10000.0)
    assert error.abs().max() < 1e-7


def test_gradients(device):
    x = randn(2, 3, 5, 6, device=device).requires_grad_()
    positions = torch.tensor([0, 1, 2, 7, 10**7], device=device)
    assert torch.autograd.gradcheck(lambda x: rotary(x, positions, 50.0), x)
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, positions, 50.0), x)
    both = torch.stack((x, 2 * x)).detach()
    alone = torch.stack([rotary(y, positions, 50.0) for y in both])
    assert torch.equal(torch.vmap(lambda x: rotary(x, positions, 50.0))(both), alone)


def test_tracing(device):
    x = randn(2, 5, 3, 8, dtype=torch.float32, device=device).transpose(1, 2).requires_grad_()
    positions = torch.arange(5, device=device)
    torch.library.opcheck(torch.ops.blurry_attn.rotary.default, (x, positions, 50.0))
    torch.library.opcheck(torch.ops.blurry_attn.rotary.default, (x.detach().contiguous(), positions, 50.0, True))
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, positions, 50.0), rotary(x, positions, 50.0))


@pytest.mark.parametrize(
    ("x", "positions", "base", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 5), torch.arange(2), 9.0, ValueError, "x must have an even head_dim .*, got 5"),
        (torch.zeros(1, 2, 4), torch.arange(2), 9.0, ValueError, "x must have 4 dimensions"),
        (torch.zeros(1, 1, 2, 4).long(), torch.arange(2), 9.0, TypeError, "x must be float64"),
        (torch.zeros(1, 1, 2, 4), torch.arange(3), 9.0, ValueError, r"positions must be \(T,\) or \(B, T\) of x"),
        (torch.zeros(1, 1, 2, 4), torch.zeros(2), 9.0, TypeError, "positions must be integers, got torch.float32"),
        (torch.zeros(3, 1, 2, 4), torch.arange(4).view(2, 2), 9.0, ValueError, r"positions must be \(T,\) or \(B, T\)"),
        (torch.zeros(1, 1, 2, 4), torch.arange(2), 0.0, ValueError, "base must be positive and finite, got 0"),
        (torch.zeros(1, 1, 2, 4), torch.arange(2), float("inf"), ValueError, "base must be positive and finite"),
    ],
)
def test_refusals(x, positions, base, error, message):
    with pytest.raises(error, match=message):
        rotary(x, positions, base)


def test_limits_of_a_card(device):
    x = torch.zeros(1, 1, 2, 1024, device=device)
    if device.type == "cpu":
        assert rotary(x, torch.arange(2), 9.0).shape == x.shape
        return
    with pytest.raises(ValueError, match="positions must be on x's device"):
        rotary(x[..., :64], torch.arange(2), 9.0)
    with pytest.raises(NotImplementedError, match="x must have a head_dim of at most 512 on CUDA, got 1024"):
        rotary(x, torch.arange(2, device=device), 9.0)
