"""Programs that PyTorch makes of a model and its state: trees, compiled, exported, packaged; and its transforms."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import cache, partial
from itertools import product

import pytest
import torch
from helpers import make_inputs, make_state, randn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from blurry_attn import (
    BlurrySelfAttention,
    BlurryState,
    BlurryWindow,
    blurry_window_attention,
    blurry_window_step,
)
from blurry_attn.flux_rows import _cached_cells

WINDOW = BlurryWindow(4, (12, 4))


class Decoder(nn.Module):
    """Two layers; reads a padded piece, from one state per layer to the next."""

    def __init__(self, device):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            BlurrySelfAttention(16, 4, WINDOW, 2, rope_base=100.0, device=device) for _ in range(2)
        )

    def forward(self, x, states, key_padding_mask=None):
        ends = []
        for layer, state in zip(self.layers, states, strict=True):
            out, end = layer(x, key_padding_mask=key_padding_mask, state=state, return_state=True)
            x = x + out
            ends.append(end)
        return x, ends


class Stepper(Decoder):
    """One token per sequence; the states are updated in place."""

    def forward(self, x, states, key_padding_mask=None):
        for layer, state in zip(self.layers, states, strict=True):
            x = x + layer.step(x, state)
        return x


def states(device, dtype=torch.float32):
    return [make_state(WINDOW, [3, 50], dim=4, dtype=torch.float32, device=device, seed=i).to(dtype) for i in range(2)]


def tokens(length, device):
    return randn(2, length, 16, dtype=torch.float32, device=device, seed=length)


def padding(length, device):
    return (torch.arange(2 * length, device=device) % 5 == 3).view(2, length)


def assert_close(actual, expected):
    """Trees of tensors."""
    actual, expected = (pytree.tree_flatten(x) for x in (actual, expected))
    assert actual[1] == expected[1]
    torch.testing.assert_close(actual[0], expected[0])


# The state as a tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_is_a_tree_of_its_tensors(dtype):
    state = make_state(WINDOW, [3, 50]).to(dtype)
    parts = ("key", "value", "position", "flux")[: 3 if dtype == torch.float32 else 4]
    leaves, spec = pytree.tree_flatten({"layer": state})
    assert [leaf is getattr(state, name) for leaf, name in zip(leaves, parts, strict=True)]
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))["layer"]
    assert again.key is state.key and again.flux is state.flux and again.window == WINDOW
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path({"layer": state})[0]]
    assert names == [f"['layer'].{name}" for name in parts]


def test_a_tree_may_hold_what_is_no_tensor():
    shapes = pytree.tree_map(lambda x: tuple(x.shape), make_state(WINDOW, [3]))
    assert shapes.key == (1, 2, 4, 8) and shapes.position == (1,)


# Compiled


def test_compile_around_the_state(device):
    """One graph for all lengths, forward and backward, states in and out."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = Decoder(device)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    given = states(device)
    for length in (20, 31, 57, 2):
        results = [model(tokens(length, device), given) for model in (compiled, eager)]
        assert_close(*results)
        losses = [x.square().sum() + sum(end.value.square().sum() for end in ends) for x, ends in results]
        gradients = [torch.autograd.grad(loss, [*eager.parameters()]) for loss in losses]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        given = [end.detach() for end in results[0][1]]
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_compiled_step_is_one_graph_for_all_positions(dtype, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = Stepper(device)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    ours, theirs = states(device, dtype), states(device, dtype)
    for length in range(4):
        x = randn(2, 1, 16, dtype=torch.float32, device=device, seed=length)
        torch.testing.assert_close(compiled(x, ours), eager(x, theirs))
    assert_close(ours, theirs)
    assert ours[0].position.tolist() == [7, 54]
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("method", ["forward", "step"])
@torch.no_grad()
def test_layers_of_different_windows_compile_one_by_one(method, dynamic, device):
    """Each gives what it gives in eager mode, its state the window that it came with."""
    torch._dynamo.reset()
    for resolution in range(1, 4):
        layer = BlurrySelfAttention(16, 2, BlurryWindow(4, (4 * resolution, 8)), device=device)
        compiled = torch.compile(getattr(layer, method), backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for length in (5, 9):
            x = tokens(1 if method == "step" else length, device)
            ours, theirs = (
                make_state(BlurryWindow(4, (4 * resolution, 8)), [3, 50], dtype=torch.float32, device=device)
                for _ in range(2)
            )
            options = {} if method == "step" else {"return_state": True}
            assert_close(compiled(x, state=ours, **options), getattr(layer, method)(x, state=theirs, **options))
            assert_close(ours, theirs)


@torch.no_grad()
def test_one_layer_meets_every_kind_of_batch_within_the_limit_of_graphs(device):
    """Two graphs, of one sequence and of several, for each of a mask or none and a state or none."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    layer = BlurrySelfAttention(16, 4, WINDOW, 2, rope_base=100.0, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for masked, stated, (batch, length) in product(
        (False, True), (False, True), ((3, 20), (5, 31), (7, 9), (1, 12), (1, 40))
    ):
        x = randn(batch, length, 16, dtype=torch.float32, device=device)
        options = {"return_state": True}
        if masked:
            options["key_padding_mask"] = (torch.arange(batch * length, device=device) % 5 == 3).view(batch, length)
        if stated:
            options["state"] = make_state(WINDOW, range(batch), dim=4, dtype=torch.float32, device=device)
        assert_close(compiled(x, **options), layer(x, **options))
    assert counter.frame_count == 8 <= torch._dynamo.config.recompile_limit


# Traced


def call_with_state(window, dtype, device, steps):
    """A piece and maybe a step, after a state that is made within."""

    def call(query, key, value):
        state = BlurryState.empty(2, 2, 8, window=window, device=device, dtype=dtype)
        out, state = blurry_window_attention(query, key, value, window, state=state, return_state=True)
        if steps:
            out = out + blurry_window_step(query[:, :, :1], key[:, :, :1], value[:, :, :1], state)
        state = state[:1].to(torch.bfloat16).to(dtype)
        return out, *pytree.tree_leaves(state)

    return call


def traced(call, inputs, mode):
    graph = make_fx(call, tracing_mode=mode)(*inputs)
    return lambda *given: graph(*given)


def fake(call, inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(*(mode.from_tensor(x) for x in inputs))


def functional(call, inputs):
    torch.func.functionalize(call)(*inputs)


TRACES = {
    "fake": fake,
    "functionalize": functional,
    **{f"make_fx {mode}": partial(traced, mode=mode) for mode in ("real", "fake", "symbolic")},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trace_first", [True, False], ids=["trace first", "trace last"])
@pytest.mark.parametrize("name", TRACES)
@torch.no_grad()
def test_traces_and_real_calls_leave_nothing_to_each_other(name, trace_first, dtype, device):
    inputs = make_inputs(tokens=7, dtype=torch.promote_types(dtype, torch.float32), device=device)
    _cached_cells.cache_clear()
    # What PyTorch cannot functionalize is an operator that writes and returns.
    call = call_with_state(BlurryWindow(4, 16), dtype, device, steps=name != "functionalize")
    if not trace_first:
        call(*inputs)
    graph = TRACES[name](call, inputs)
    expected = call(*inputs)
    if graph is not None:
        assert_close(graph(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_states_on_meta(dtype):
    inputs = make_inputs(tokens=7, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    window = BlurryWindow(4, 16)
    real = call_with_state(window, dtype, "cpu", steps=True)(*inputs)
    meta = call_with_state(window, dtype, "meta", steps=True)(*(x.to("meta") for x in inputs))
    assert [(x.shape, x.dtype, x.device.type) for x in meta] == [(x.shape, x.dtype, "meta") for x in real]


# Exported


def exported(model, device, dtype=torch.float32, strict=False):
    """The model as a program, saved and loaded."""
    steps = isinstance(model, Stepper)
    length = None if steps else {1: torch.export.Dim("tokens")}
    arguments = (tokens(1 if steps else 20, device), states(device, dtype))
    shapes = (length, [[None] * (3 if dtype == torch.float32 else 4)] * 2)
    if not steps:
        arguments, shapes = (*arguments, padding(20, device)), (*shapes, length)
    with torch.no_grad():
        program = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@torch.no_grad()
def assert_runs_as(program, model, device, dtype=torch.float32):
    lengths = (1,) if isinstance(model, Stepper) else (2, 20, 63)
    for length in lengths:
        masks = () if isinstance(model, Stepper) else (padding(length, device),)
        ours, theirs = states(device, dtype), states(device, dtype)
        result = program(tokens(length, device), ours, *masks)
        assert_close(result, model(tokens(length, device), theirs, *masks))
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Decoder, Stepper])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_an_exported_model_is_saved_and_loaded(strict, kind, dtype, device):
    model = kind(device)
    assert_runs_as(exported(model, device, dtype, strict).module(), model, device, dtype)


LOAD_A_PACKAGE = """
import sys, torch
device, path = sys.argv[1:]
model = torch.nn.Linear(8, 8, device=device)
with torch.no_grad():
    program = torch.export.export(model, (torch.zeros(2, 8, device=device),))
    path = torch._inductor.aoti_compile_and_package(program, package_path=path)
torch._inductor.aoti_load_package(path)(torch.zeros(2, 8, device=device))
"""


@cache
def crash_of_torch_itself(device, path):
    """How a process ends in which torch loads the package of one linear layer, if a signal ends it."""
    done = subprocess.run([sys.executable, "-c", LOAD_A_PACKAGE, device, path], capture_output=True, text=True)
    return f"signal {-done.returncode}" if done.returncode < 0 else None


@pytest.mark.parametrize("kind", [Decoder, Stepper])
def test_aot_inductor_package(kind, device, tmp_path, tmp_path_factory):
    if device.type == "cuda" and (
        signal := crash_of_torch_itself("cuda", str(tmp_path_factory.getbasetemp() / "x.pt2"))
    ):
        pytest.skip(f"torch {torch.__version__} cannot load even a package of one linear layer here: {signal}")
    model = kind(device)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            exported(model, device), package_path=str(tmp_path / "model.pt2")
        )
    assert_runs_as(torch._inductor.aoti_load_package(path), model, device)


# Transforms


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    """The same bits, gradients too, and also those into and out of states."""
    model, x = Decoder(device), tokens(20, device).requires_grad_()

    def run(call):
        given = [BlurryState(s.key.requires_grad_(), s.value, s.position, s.window) for s in states(device)]

        def read(x, *slots):
            fed = [BlurryState(key, s.value, s.position, s.window) for key, s in zip(slots, given, strict=True)]
            x, ends = model(x, fed)
            return x, *(end.value for end in ends)

        results = call(read, x, *(s.key for s in given))
        leaves = [x, *(s.key for s in given), *model.parameters()]
        for leaf in leaves:
            leaf.grad = None
        sum(result.square().sum() for result in results).backward()
        return [*results, *(leaf.grad for leaf in leaves)]

    checkpointed = run(lambda read, *args: checkpoint(read, *args, use_reentrant=use_reentrant))
    for ours, theirs in zip(checkpointed, run(lambda read, *args: read(*args)), strict=True):
        assert torch.equal(ours, theirs)


def test_functional_call(device):
    model, x = Decoder(device), tokens(20, device)
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    out, _ = torch.func.functional_call(model, parameters, (x, states(device)))
    gradients = torch.autograd.grad(out.square().sum(), [*parameters.values()])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    expected, _ = model(x, states(device))
    assert torch.equal(out, expected)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected.square().sum(), [*model.parameters()]), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap of grad"])
def test_function_transforms_say_that_they_cannot_pass(transform, device):
    inputs = make_inputs(tokens=5, dtype=torch.float32, device=device)

    def loss(*inputs):
        return blurry_window_attention(*inputs, WINDOW).sum()

    with pytest.raises(RuntimeError, match=r"cannot use C\+\+ torch::autograd::Function with functorch transforms"):
        if transform == "vmap of grad":
            torch.func.vmap(torch.func.grad(loss))(*(x.unsqueeze(1) for x in inputs))
        elif transform == "vjp":
            torch.func.vjp(loss, *inputs)
        else:
            getattr(torch.func, transform)(loss)(*inputs)


def test_forward_mode_says_that_it_cannot_pass(device):
    query, key, value = make_inputs(tokens=5, dtype=torch.float32, device=device)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented"):
        torch.func.jvp(lambda x: blurry_window_attention(x, key, value, WINDOW), (query,), (query,))


def test_vmap_of_a_step_says_that_it_cannot_pass(device):
    query, key, value = make_inputs(tokens=1, dtype=torch.float32, device=device)
    state = make_state(WINDOW, [3, 50], dtype=torch.float32, device=device)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for blurry_attn::step"):
        torch.func.vmap(lambda x: blurry_window_step(x, key, value, state))(query.unsqueeze(0))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_the_forward_is_a_loop(device):
    """Slow, but right; the batch dimension is there to be used instead."""
    query, key, value = (x.unsqueeze(1) for x in make_inputs(3, dtype=torch.float32, device=device))
    looped = torch.func.vmap(lambda *x: blurry_window_attention(*x, WINDOW))(query, key, value)
    for b in range(3):
        assert torch.equal(looped[b], blurry_window_attention(query[b], key[b], value[b], WINDOW))
