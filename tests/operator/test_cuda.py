"""What only a card can show: CUDA against the CPU and the float64 reference, streams, graphs, devices, autocast."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import (
    HALVES,
    KERNELS,
    assert_accurate,
    assert_same_bits,
    compute_dtype,
    make_inputs,
    make_state,
    oracle,
    randn,
    relative_error,
    run,
)
from torch.utils._python_dispatch import BaseTorchDispatchMode

from blurry_attn import BlurryState, BlurryWindow, backend, blurry_window_attention, blurry_window_step

pytestmark = [pytest.mark.cuda, pytest.mark.parametrize("device", ["cuda"], indirect=True)]

DTYPES = (torch.float64, torch.float32, *HALVES)
RESOLUTIONS = 1, 8, 20  # the third: "fejer" has no gate of 1, so an echo from stretch to stretch
CPU = torch.device("cpu")


def setup(kernel, dtype, device, tokens=1300, batch=2, slots=16):
    window = BlurryWindow.pyramid(slots, RESOLUTIONS, kernel)
    inputs = make_inputs(batch, 6, 3, tokens, 24, 40, dtype, device)
    return window, inputs, make_state(window, [7 + 991 * b for b in range(batch)], 3, 24, 40, dtype, device)


def steps(inputs, state, tokens):
    with torch.no_grad():
        return torch.cat(
            [blurry_window_step(*(x[:, :, t : t + 1] for x in inputs), state, enable_gqa=True) for t in tokens], 2
        )


@pytest.mark.parametrize("slots", [16, 64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_cpu_and_float64(kernel, dtype, slots, device):
    """Over several stretches of time, from states at different positions."""
    window, inputs, state = setup(kernel, dtype, CPU, slots=slots)
    exact = run(oracle, *(x.double() for x in inputs), window, state=state.to(dtype=torch.float64))
    on_device = run(blurry_window_attention, *(x.to(device) for x in inputs), window, state=state.to(device))
    assert_accurate(on_device, exact, dtype, window)
    on_cpu = run(blurry_window_attention, *inputs, window, state=state)
    assert_accurate(on_device, on_cpu, dtype, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_against_the_cpu(kernel, dtype, device):
    """Both round float32 results: CUDA's error is at most twice the CPU's, or two roundings."""
    window, inputs, _ = setup(kernel, dtype, CPU)
    exact = run(blurry_window_attention, *(x.double() for x in inputs), window)
    on_device = run(blurry_window_attention, *(x.to(device) for x in inputs), window)
    on_cpu = run(blurry_window_attention, *inputs, window)
    assert torch.equal(on_device.pop("position").cpu(), on_cpu["position"])
    for name, x in on_device.items():
        error, allowed = relative_error(x, exact[name]), relative_error(on_cpu[name], exact[name])
        assert error <= 2 * max(allowed, torch.finfo(dtype).eps), f"{name}: {error:.2e}, the CPU's {allowed:.2e}"


WALKS = {  # slots, resolutions, phase, (query heads, head_dim, value_dim), tokens
    "aligned": (64, (8, 4), None, (2, 64, 64), 1100),
    "sliding": (32, (1, 8), None, (4, 64, 64), 700),
    "coarse": (32, (16, 64), None, (2, 64, 64), 5000),
    "fine": (48, (2, 3), None, (4, 64, 40), 300),
    "odd": (40, (5, 7, 11, 13), None, (4, 40, 64), 777),
    "phases": (16, (8, 9, 24), (3, 4, 23), (3, 64, 64), 600),
    "wide": (32, (8, 4), None, (2, 128, 96), 500),
    "many slots": (150, (4, 8), None, (2, 64, 64), 2000),
    "every other": (40, (2, 2), None, (4, 64, 40), 777),  # one ends where a cell does, one where it does not
    "every other, wide": (64, (2, 2), None, (2, 128, 96), 3001),
    "long": (32, (8, 6), 2, (2, 64, 64), 9001),
    "long and sliding": (40, (1, 2), None, (2, 64, 40), 9001),
}


PATCHES = {  # the same for "dirichlet"
    "aligned": (64, (8, 4), None, (2, 64, 64), 6000),
    "sliding": (32, (1, 8), None, (4, 64, 64), 700),
    "coarse": (32, (16, 32), None, (2, 64, 64), 5700),
    "few slots": (18, (3, 8), (2, 3), (4, 64, 40), 3000),
    "odd": (40, (5, 7, 11, 13), None, (4, 40, 64), 777),
    "phases": (16, (8, 9, 24), (3, 4, 23), (3, 64, 64), 600),
    "wide": (48, (8, 4), None, (6, 128, 96), 4200),
    "wide and few": (17, (12,), 5, (1, 72, 128), 500),
    "short": (64, (8, 32), None, (2, 64, 64), 50),  # slots stay shut
}


def unwatched(*arguments, **options):
    """The attention where a mode sees its operators, as in tracing: its forward keeps nothing for the backward."""
    with BaseTorchDispatchMode():
        return blurry_window_attention(*arguments, **options)


def hold_to_half_precision(
    window, backend_name, heads, dims, tokens, dtype, stated, device, attention=blurry_window_attention
):
    """At most twice (gradients: three times) plain PyTorch's error; the same bits in every run."""
    kv_heads = len(window.window)
    inputs = make_inputs(2, heads, kv_heads, tokens, *dims, dtype, device)
    assert backend(*inputs, window) == backend_name
    state = make_state(window, [11, 10**10 + 7], kv_heads, *dims, dtype, device) if stated else None
    found = run(attention, *inputs, window, state=state)
    assert_same_bits(run(attention, *inputs, window, state=state), found)
    on_cpu = state and state.to(CPU)
    exact = run(
        blurry_window_attention,
        *(x.cpu().double() for x in inputs),
        window,
        state=on_cpu and on_cpu.to(dtype=torch.float64),
    )
    few = min(tokens, 400)  # plain PyTorch is slow: its error is that of the first tokens
    plain = run(oracle, *(x[:, :, :few].cpu() for x in inputs), window, state=on_cpu, gradients=False)
    allowed = relative_error(plain["out"], exact["out"][:, :, :few])
    grown = window.kernel == "dirichlet" and max(window.resolutions(kv_heads)) >= 16
    assert torch.equal(found.pop("position").cpu(), exact["position"])
    for name, x in found.items():
        error = relative_error(x, exact[name])
        if name in ("end_key", "end_value"):
            assert error <= (1e-4 if grown else 1e-5), f"{name}: {error:.2e}"
        elif name.startswith("grad_"):
            assert error <= 3 * allowed, f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"
        else:  # slots of "dirichlet" grow, and the error of plain PyTorch with them
            most = min(2 * allowed, 0.01 if dtype == torch.bfloat16 else 0.0015)
            assert error <= most, f"{name}: {error:.2e}, allowed {most:.2e}"


@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("walk", WALKS)
def test_window_kernels(walk, dtype, stated, device):
    slots, resolutions, phase, (heads, *dims), tokens = WALKS[walk]
    window = BlurryWindow(slots, tuple(slots * r for r in resolutions), phase=phase)
    hold_to_half_precision(window, "fejer", heads, dims, tokens, dtype, stated, device)


@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize("walk", ["coarse", "odd", "every other", "long", "long and sliding"])
def test_window_kernels_with_an_echo(walk, sharpness, dtype, stated, device):
    slots, resolutions, phase, (heads, *dims), tokens = WALKS[walk]
    window = BlurryWindow(slots, tuple(slots * r for r in resolutions), "fejer", sharpness, phase)
    hold_to_half_precision(window, "fejer", heads, dims, tokens, dtype, stated, device)


@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("walk", ["sliding", "coarse", "fine", "odd", "phases", "wide", "long"])
def test_window_kernels_without_what_the_forward_kept(walk, stated, device):
    slots, resolutions, phase, (heads, *dims), tokens = WALKS[walk]
    window = BlurryWindow(slots, tuple(slots * r for r in resolutions), phase=phase)
    hold_to_half_precision(window, "fejer", heads, dims, tokens, torch.bfloat16, stated, device, unwatched)


def test_what_the_forward_keeps(device):
    """Where the backward runs on tensor cores, and nothing else will do for it."""
    law = (32, [256, 256], [0, 4], "fejer", 6.0, 0.125)
    inputs = make_inputs(1, 2, None, 300, 64, dtype=torch.bfloat16, device=device)

    def forward(tensors, slots=32):
        given = (slots, [8 * slots] * 2, *law[2:])
        return torch.ops.blurry_attn.forward(*tensors, *given, None, None, None, None, False, True)

    out, lse, *_, contents = forward(inputs)
    assert contents.numel() > 0
    assert forward([x.float() for x in inputs])[-1].numel() == 0
    assert forward(inputs, slots=65)[-1].numel() == 0
    none = torch.ops.blurry_attn.forward(*inputs, *law, None, None, None, None, False)[-1]
    assert none.numel() == 0

    def backward(contents):
        arguments = (out, None, None, None, *inputs, *law, None, None, None, None, out, lse, contents)
        return torch.ops.blurry_attn.backward(*arguments)[:3]

    for kept, made in zip(backward(contents), backward(none), strict=True):
        assert relative_error(kept, made) <= 1e-2
    for wrong in (contents[1:], contents.float(), contents[None], contents.cpu()):
        with pytest.raises((TypeError, ValueError), match=r"^kept must"):
            backward(wrong)


@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("walk", PATCHES)
def test_patch_kernels(walk, dtype, stated, device):
    slots, resolutions, phase, (heads, *dims), tokens = PATCHES[walk]
    window = BlurryWindow(slots, tuple(slots * r for r in resolutions), "dirichlet", phase=phase)
    hold_to_half_precision(window, "dirichlet", heads, dims, tokens, dtype, stated, device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["key", "value", "state"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_window_kernels_contain_what_is_not_finite(kernel, which, bad, device):
    """It reaches what the law says, however late, and nothing else; the rest is as right as ever."""
    window = BlurryWindow(16, (16, 64, 128), kernel)
    inputs = make_inputs(2, 3, 3, 1500, 64, dtype=torch.bfloat16)
    state = make_state(window, [60, 10**10], 3, 64, dtype=torch.bfloat16)
    tokens = dict(zip(("query", "key", "value"), inputs, strict=True))
    spoiled = state.key[1, :, 3] if which == "state" else tokens[which][1, :, 205]
    spoiled[..., 7] = bad
    expected = run(blurry_window_attention, *inputs, window, state=state, gradients=False)
    inputs, state = [x.to(device) for x in inputs], state.to(device)
    found = run(blurry_window_attention, *inputs, window, state=state, gradients=False)
    for name in ("out", "lse", "end_key", "end_value"):
        sound = expected[name].isfinite()
        assert torch.equal(found[name].isfinite().cpu(), sound), name
        kept = [torch.where(sound, x.cpu(), 0) for x in (found[name], expected[name])]
        assert relative_error(*kept) <= 1e-2, name


def test_backend(device):
    """What the kernels on tensor cores do not take, they name."""
    inputs = make_inputs(1, 2, None, 8, 64, dtype=torch.bfloat16, device=device)
    window = BlurryWindow(32, 256)
    assert backend(*inputs, window) == "fejer"
    assert backend(*inputs, BlurryWindow(32, 256, "dirichlet")) == "dirichlet"
    assert "64 slots" in backend(*inputs, BlurryWindow(65, 65, "dirichlet"))
    assert "dtype" in backend(*(x.float() for x in inputs), window)
    assert "slots" in backend(*inputs, BlurryWindow(4, 32))
    assert "head sizes" in backend(*(x[..., :60] for x in inputs), window)
    assert backend(*(torch.cat((x, x), -1)[..., 3:67] for x in inputs), window) == "fejer"  # by way of a copy


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_over_many_stretches(kernel, dtype, device):
    window, inputs, state = setup(kernel, dtype, device, 2500, 1)
    ends = [0, 0, 700, 701, 2500, 2500]
    position = torch.tensor([0, 3, 10**10, 50, 12], device=device)
    slots = [x.expand(5, -1, -1, -1).contiguous() for x in (state.key, state.value)]
    state = BlurryState(*slots, position, window)
    packed = run(blurry_window_attention, *inputs, window, state=state, cu_seqlens=torch.tensor(ends, device=device))
    for s, (a, b) in enumerate(pairwise(ends)):
        part = BlurryState(*(x[s : s + 1] for x in (state.key, state.value, state.position)), window)
        alone = run(blurry_window_attention, *(x[:, :, a:b] for x in inputs), window, state=part, gradients=False)
        for name in ("out", "lse"):
            assert torch.equal(packed[name][:, :, a:b], alone[name]), (name, s)
        for name in ("end_key", "end_value", "position"):
            assert torch.equal(packed[name][s : s + 1], alone[name]), (name, s)


@pytest.mark.parametrize("slots, dim, value_dim", [(1024, 512, 300), (1024, 1, 2), (513, 2, 1)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_largest_sizes(kernel, dtype, slots, dim, value_dim, device):
    """Also with the least sizes of a head."""
    window = BlurryWindow(slots, 2 * slots, kernel)
    inputs = make_inputs(2, 2, 1, 40, dim, value_dim, torch.float32)
    inputs, state = [x.to(dtype) for x in inputs], make_state(window, [5, 5000], 1, dim, value_dim, dtype)
    exact = run(oracle, *(x.double() for x in inputs), window, state=state.to(dtype=torch.float64))
    found = run(blurry_window_attention, *(x.to(device) for x in inputs), window, state=state.to(device))
    assert_accurate(found, exact, dtype, window)


@pytest.mark.parametrize("slots, dim, value_dim", [(1025, 8, 8), (4, 513, 8), (4, 8, 513)])
def test_limits(slots, dim, value_dim, device):
    inputs = make_inputs(1, 1, 1, 4, dim, value_dim, device=device)
    with pytest.raises(NotImplementedError, match=r"must (be|have a head_dim of) at most (1024|512).* on CUDA, got"):
        blurry_window_attention(*inputs, BlurryWindow(slots, slots))


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_heads_than_a_grid_is_wide(kernel, device):
    window, inputs = BlurryWindow(2, 4, kernel), make_inputs(35_000, 2, None, 3, 4, dtype=torch.float32)
    found = run(blurry_window_attention, *(x.to(device) for x in inputs), window)
    assert_accurate(found, run(blurry_window_attention, *inputs, window), torch.float32, window)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_run(kernel, dtype, device):
    window, inputs, state = setup(kernel, dtype, device)
    first = run(blurry_window_attention, *inputs, window, state=state)
    for _ in range(3):
        assert_same_bits(run(blurry_window_attention, *inputs, window, state=state), first)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(kernel, dtype, device):
    """Channels last, and rows that no wide access fits: odd offsets and gaps."""
    window, inputs, state = setup(kernel, dtype, device, 200)
    expected = run(blurry_window_attention, *inputs, window, state=state)
    channels_last = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert_same_bits(run(blurry_window_attention, *channels_last, window, state=state), expected)
    gapped = [x.new_empty(*x.shape[:3], 2 * x.shape[3] + 1)[..., 1::2].copy_(x) for x in inputs]
    assert_same_bits(run(blurry_window_attention, *gapped, window, state=state), expected)
    shifted = [torch.cat([x.new_empty(*x.shape[:3], 1), x], -1)[..., 1:] for x in inputs]
    assert_same_bits(run(blurry_window_attention, *shifted, window, state=state), expected)


def test_on_another_stream(device):
    """Work is queued on the current stream: behind what made the inputs there, and nowhere else."""
    window, inputs, state = setup("fejer", torch.float32, device, 300)
    expected = run(blurry_window_attention, *inputs, window, state=state)
    expected_step = steps(inputs, state.clone(), range(5))
    torch.cuda.synchronize()
    late, stream = [torch.full_like(x, float("nan")) for x in inputs], torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        found = run(blurry_window_attention, *late, window, state=state)
        found_step = steps(late, state.clone(), range(5))
    stream.synchronize()
    assert_same_bits(found, expected)
    assert torch.equal(found_step, expected_step)


def test_on_another_device(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    window, inputs, state = setup("fejer", torch.float32, device, 300)
    expected = run(blurry_window_attention, *inputs, window, state=state)
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        found = run(blurry_window_attention, *(x.to(other) for x in inputs), window, state=state.to(other))
        out = steps([x.to(other) for x in inputs], state.to(other), range(5))
    assert all(x.device == other for x in found.values()) and out.device == other
    assert_same_bits({name: x.to(device) for name, x in found.items()}, expected)


@pytest.mark.parametrize(
    ("kernel", "dtype", "slots"),
    [*((kernel, dtype, None) for kernel in KERNELS for dtype in DTYPES), ("fejer", torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_graph_of_the_step(kernel, dtype, slots, device):
    """Positions advance inside the graph: its replays are the following tokens."""
    _, inputs, state = setup(kernel, dtype, device, 60)
    state = state.to(slots)
    eager = state.clone()
    expected = steps(inputs, eager, range(60))
    token = [x[:, :, :1].clone() for x in inputs]
    with torch.no_grad():
        blurry_window_step(*token, state.clone(), enable_gqa=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = blurry_window_step(*token, state, enable_gqa=True)
    for t in range(60):
        for x, y in zip(token, inputs, strict=True):
            x.copy_(y[:, :, t : t + 1])
        graph.replay()
        assert torch.equal(out, expected[:, :, t : t + 1]), t
    for name, held in eager.state_dict().items():
        assert torch.equal(state.state_dict()[name], held)


def test_graph_with_an_unseen_window_is_refused(device):
    window, graph = BlurryWindow(4, 4 * 8191), torch.cuda.CUDAGraph()
    token, state = make_inputs(1, 1, 1, 1, 8, device=device), make_state(window, [0], 1, device=device)
    with (
        pytest.raises(RuntimeError, match="make one call before the capture"),
        torch.no_grad(),
        torch.cuda.graph(graph),
    ):
        blurry_window_step(*token, state)


def captured(call):
    """A graph of a call, and what its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_with_cu_seqlens_out_of_range(kernel, dtype, device):
    """A captured call cannot look at values; nothing is read or written out of bounds, and no harm stays."""
    window, inputs, _ = setup(kernel, dtype, device, 1300, 1)
    valid = torch.tensor([0, 100, 1000, 1300], device=device)
    cu_seqlens = valid.clone()
    leaves = [x.requires_grad_() for x in inputs]

    def call():
        out, state = blurry_window_attention(*leaves, window, enable_gqa=True, cu_seqlens=cu_seqlens, return_state=True)
        results = [out, state.key, state.value]
        grads = torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
        return [x.detach() for x in (*results, *grads)]

    expected = call()
    graph, found = captured(call)
    most = 2**63 - 1
    for bad in ([5, 10**12, -7, 2000], [1300, 0, 1300, 0], [-most, most, -most, most], [900, 1000, 1300, 1300]):
        cu_seqlens.copy_(torch.tensor(bad))
        graph.replay()
        torch.cuda.synchronize()
    cu_seqlens.copy_(valid)
    graph.replay()
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_with_positions_out_of_range(kernel, dtype, device):
    """They count as the nearest in range, 0 or 2^62, which takes no longer."""
    window, inputs, state = setup(kernel, dtype, device, 300)
    leaves = [x.requires_grad_() for x in (*inputs, state.key, state.value)]
    position = state.position

    def call():
        before = BlurryState(*leaves[3:], position, window)
        out, end = blurry_window_attention(*leaves[:3], window, enable_gqa=True, state=before, return_state=True)
        results = [out, end.key, end.value]
        grads = torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
        after = BlurryState(*(x.detach().clone() for x in leaves[3:]), position.clone(), window)
        out = blurry_window_step(*(x[:, :, :1].detach() for x in inputs), after, enable_gqa=True)
        return [x.detach() for x in (*results, *grads, out, after.key, after.value, after.position)]

    graph, found = captured(call)
    last = 2**62
    for bad in ([-1, last + 1], [-(2**63), 2**63 - 1], [2**63 - 1 - 300, 2**63 - 150], [last - 1, last]):
        bad = torch.tensor(bad, device=device)
        position.copy_(bad)
        graph.replay()
        torch.cuda.synchronize()
        position.copy_(bad.clamp(0, last))
        for i, (x, y) in enumerate(zip([x.clone() for x in found], call(), strict=True)):
            assert torch.equal(x, y), (bad, i)


def test_tables_are_kept_within_bounds(device):
    """Of windows without end some tables are kept, and those that a graph holds."""
    inputs = make_inputs(1, 1, 1, 40, 8, dtype=torch.float32, device=device)

    def call(i, stream=None):
        with torch.no_grad(), torch.cuda.stream(stream):
            return blurry_window_attention(*inputs, BlurryWindow(4, 400, sharpness=1 + i / 64))

    expected = call(0), call(1)
    graph, found = captured(lambda: call(0))
    for i in range(2, 400):
        call(i)
    held, side = torch.cuda.memory_allocated(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000_000)
    late = call(399, side)  # the tables are dropped and their memory is used before this call begins
    for i in range(400, 1000):
        call(i)
    assert torch.cuda.memory_allocated() - held <= 1 << 16
    graph.replay()
    assert torch.equal(found, expected[0]) and torch.equal(call(1), expected[1])
    torch.cuda.synchronize()
    assert torch.equal(late, call(399))


@pytest.mark.parametrize("stated", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_sharp_softmax_of_few_slots(kernel, dtype, stated, device):
    """Gradients that cancel to nearly nothing: at most three times plain PyTorch's error, over all sequences.

    Tensor cores take slots that are rounded, which moves logits of 3 |q| |k| by a few hundredths, and gradients by as
    much of themselves.
    """
    window, batch = BlurryWindow(16, 208, kernel, phase=0), 30
    inputs = make_inputs(batch, 1, None, 3, 32, dtype=dtype)
    given = make_state(window, [2] * batch, 1, 32, dtype=dtype) if stated else None

    def gradients(attend, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        state = given and given.to(device, compute_dtype(dtype))
        out, *_ = attend(*leaves, window, state=state, scale=3.0, return_lse=True, return_state=True)
        grads = torch.autograd.grad(out, leaves, randn(*out.shape, dtype=torch.float64, seed=7).to(out))
        return [x.cpu().double() for x in grads]

    exact = gradients(oracle, CPU, torch.float64)
    results = zip(gradients(blurry_window_attention, device, dtype), gradients(oracle, CPU, dtype), exact, strict=True)
    for name, (found, plain, expected) in zip(("query", "key", "value"), results, strict=True):
        error, allowed, size = (
            x.square().mean((1, 2, 3)).sqrt() for x in (found - expected, plain - expected, expected)
        )
        limit = 3 * allowed.maximum(6 * torch.finfo(dtype).eps * size).clamp_min(torch.finfo(dtype).eps / 100)
        assert (error / limit).square().mean() <= 1, (name, (error / limit).max())


@pytest.mark.parametrize("slots", [16, 80])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_values_that_agree_give_queries_and_keys_no_gradient(kernel, dtype, slots, device):
    """Logits of thousands, whose log-sum-exp is rounded by 5e-4: nothing of that is left where gradients cancel."""
    window, scale = BlurryWindow(slots, 8 * slots, kernel), 400.0
    query, key, value = make_inputs(2, 2, None, 300, 64, dtype=dtype, device=device)
    value, grad = value[:, :, :1].expand_as(value), randn(*query.shape, dtype=dtype, device=device, seed=7)
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    out = blurry_window_attention(*leaves, value, window, scale=scale)
    parts = scale * (grad.double() * value.double()).sum(-1).square().mean().sqrt()  # what cancels, but for a factor
    for found, other in zip(torch.autograd.grad(out, leaves, grad), (key, query), strict=True):
        assert found.double().square().mean().sqrt() <= 2e-5 * parts * other.double().square().mean().sqrt()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(kernel, dtype, device):
    window, inputs, state = setup(kernel, torch.float32, device, 200)
    expected = run(blurry_window_attention, *(x.to(dtype) for x in inputs), window, state=state)
    with torch.autocast("cuda", dtype):
        found = run(blurry_window_attention, *inputs, window, state=state)
        out = steps(inputs, state.clone(), range(3))
    assert found["out"].dtype == out.dtype == dtype and found["lse"].dtype == compute_dtype(dtype)
    for name in ("grad_query", "grad_key", "grad_value"):
        assert found[name].dtype == torch.float32
    assert_same_bits({name: x.to(expected[name].dtype) for name, x in found.items()}, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_more_elements_than_32_bits_count(kernel, device):
    """The last sequence of a batch of more than 2^31 elements has the bits that it has alone."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free memory on the device")
    window, shape = BlurryWindow(16, 64, kernel), (33, 16, 65536, 64)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(3)]
    leaves = [x.requires_grad_() for x in inputs]
    out = blurry_window_attention(*leaves, window)
    grads = torch.autograd.grad(out, leaves, out.detach())
    alone = [x[-1:].detach().requires_grad_() for x in inputs]
    last = blurry_window_attention(*alone, window)
    assert torch.equal(out[-1:], last)
    for x, y in zip(grads, torch.autograd.grad(last, alone, last.detach()), strict=True):
        assert torch.equal(x[-1:], y)


@pytest.mark.slow
def test_window_kernels_beyond_two_to_the_31_elements(device):
    """One head of 33 million tokens, forward and backward: the last ones are what they are without the first."""
    tokens, tail, shown, window = 2**25 + 777, 2048, 256, BlurryWindow(16, 128, phase=3)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.empty(1, 1, tokens, 64, dtype=torch.bfloat16, device=device).normal_(generator=generator).requires_grad_()
        for _ in range(3)
    ]
    assert inputs[0].numel() > 2**31
    ends = [x[:, :, -tail:].detach().clone().requires_grad_() for x in inputs]
    state = make_state(window, [tokens - tail], 1, 64, 64, torch.bfloat16, device)  # forgotten within two laps
    results = []
    for given, before in ((inputs, None), (ends, state)):
        out = blurry_window_attention(*given, window, state=before)
        results.append((out, *torch.autograd.grad(out, given, torch.ones_like(out))))
    for found, expected in zip(*results, strict=True):
        assert relative_error(*(x[:, :, -shown:] for x in (found, expected))) <= 1e-2
