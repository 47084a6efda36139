"""A small matrix of calls on a CUDA device, for compute-sanitizer (cuda_sanitizer.sh) to watch.

Sizes are tiny, odd and ragged: what is to be seen is every kernel's every access, not a result.
"""

from __future__ import annotations

import itertools

import torch
from helpers import KERNELS, make_inputs, make_state, run

from blurry_attn import BlurryWindow, blurry_window_attention, blurry_window_step
from blurry_attn.ops import rotary

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# name: (slots, tokens per slot of each kv head, heads, key dim, value dim, ends of the packed sequences, positions)
SHAPES = {
    "least": (2, (1,), 1, 1, 1, [0, 1], [0]),
    "ragged": (3, (1, 8), 4, 6, 5, [0, 0, 17, 18, 41], [7, 0, 100, 2]),
    "stretches": (5, (9,), 1, 8, 17, [0, 1037], [4]),
    "many slots": (70, (2,), 2, 36, 4, [0, 33], [1000]),
    "tiles": (16, (8, 3, 40), 3, 64, 40, [0, 0, 150, 151, 300], [7, 0, 100, 2]),
    "patches": (40, (8, 3), 4, 64, 40, [0, 0, 150, 151, 300], [7, 0, 100, 2]),
    "few and wide patches": (17, (5,), 2, 72, 128, [0, 90], [3]),
    "wide tiles": (70, (4,), 2, 128, 128, [0, 260], [5]),
}
VIEWS = (
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
)


def calls(kernel: str, dtype: torch.dtype, shape: str) -> None:
    """Forward and backward, packed and resumed, then as a fresh batch; a step of every sequence. Turns of the query."""
    slots, resolutions, heads, dim, value_dim, ends, positions = SHAPES[shape]
    window, kv_heads = BlurryWindow.pyramid(slots, resolutions, kernel), len(resolutions)
    inputs = make_inputs(1, heads, kv_heads, ends[-1], dim, value_dim, dtype)
    views = VIEWS if dim % 8 else VIEWS[:1] * 3  # rows of whole 16 bytes stay so: the window kernels want them
    packed = [view(x.to("cuda")) for view, x in zip(views, inputs, strict=True)]
    state = make_state(window, positions, kv_heads, dim, value_dim, dtype, "cuda")
    found = run(blurry_window_attention, *packed, window, state=state, cu_seqlens=torch.tensor(ends, device="cuda"))
    assert all(x.isfinite().all() for x in found.values())
    run(blurry_window_attention, *(x.to("cuda") for x in inputs), window)
    token = make_inputs(len(positions), heads, kv_heads, 1, dim, value_dim, dtype, "cuda")
    with torch.no_grad():
        out = blurry_window_step(*token, state, enable_gqa=True)
    assert out.isfinite().all() and state.key.isfinite().all()
    for x in (packed[0], token[0]):
        even = x[..., : dim // 2 * 2] if dim > 1 else x.expand(*x.shape[:3], 2)
        assert rotary(even, torch.arange(x.shape[2], device="cuda"), 100.0).isfinite().all()


def main() -> None:
    cases = [
        (kernel, dtype, shape)
        for kernel, dtype, shape in itertools.product(KERNELS, DTYPES, SHAPES)
        if kernel == "fejer" or max(SHAPES[shape][1]) <= 32
    ]
    for case in cases:
        calls(*case)
    torch.cuda.synchronize()
    print(f"{len(cases)} cases ran")


if __name__ == "__main__":
    main()
