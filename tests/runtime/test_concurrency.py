"""Many threads, streams and processes at once: the bits of one after the other; what breaks off changes nothing."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers import assert_same_bits, make_inputs, make_state, oracle, relative_error, run
from torch.utils.data import DataLoader, Dataset

from blurry_attn import BlurrySelfAttention, BlurryState, BlurryWindow, blurry_window_attention, blurry_window_step

THREADS = 8
PROBLEMS = [
    (BlurryWindow(4, 16), torch.float32),
    (BlurryWindow(4, 16, "dirichlet"), torch.float64),
    (BlurryWindow(16, 128), torch.bfloat16),
    (BlurryWindow(4, (8, 20)), torch.float64),
]


def call(index: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Forward and backward of one of a few problems, with a state in and out."""
    window, dtype = PROBLEMS[index % len(PROBLEMS)]
    inputs = make_inputs(2, 4, 2, 150, 8, dtype=dtype, device=device, seed=index)
    return run(blurry_window_attention, *inputs, window, state=make_state(window, [3, 90], dtype=dtype, device=device))


def steps(index: int, device: torch.device) -> dict[str, torch.Tensor]:
    window, dtype = PROBLEMS[index % len(PROBLEMS)]
    state = make_state(window, [3, 90], dtype=dtype, device=device, seed=index)
    inputs = make_inputs(2, 4, 2, 40, 8, dtype=dtype, device=device, seed=index)
    tokens = zip(*(x.split(1, 2) for x in inputs), strict=True)
    out = torch.cat([blurry_window_step(*token, state, enable_gqa=True) for token in tokens], 2)
    return {"out": out, "key": state.key, "value": state.value}


@pytest.mark.parametrize("work", [call, steps])
def test_threads_get_the_bits_of_one(work, device):
    count = 3 * THREADS
    expected = [work(index, device) for index in range(count)]
    start = Barrier(THREADS)

    def share(thread: int) -> list[dict[str, torch.Tensor]]:
        start.wait()
        return [work(index, device) for index in range(thread, count, THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(share, range(THREADS)))
    for thread, results in enumerate(found):
        for result, index in zip(results, range(thread, count, THREADS), strict=True):
            assert_same_bits(result, expected[index])


LAWS = [
    BlurryWindow(slots, slots * resolution, kernel, sharpness)
    for slots in (2, 3, 4, 5, 7)
    for resolution in range(2, 12)
    for kernel, sharpness in (("fejer", None), ("fejer", 7.5), ("dirichlet", None))
]


def test_threads_of_more_laws_than_are_kept_have_each_its_own(device):
    """Tables of gates are kept between calls, of some laws: whichever those are, results are the law's."""
    inputs = make_inputs(1, 1, tokens=25, dim=2)
    expected = [oracle(*inputs, law)[0].to(device) for law in LAWS]
    inputs = [x.to(device) for x in inputs]

    def check(thread: int) -> None:
        for index in torch.randperm(len(LAWS), generator=torch.Generator().manual_seed(thread)).tolist():
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
                found = blurry_window_attention(*(x.to(dtype) for x in inputs), LAWS[index])
                assert relative_error(found, expected[index]) <= bound

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, range(THREADS)))


def test_backwards_of_one_graph_at_once(device):
    """Several threads go back through one output; autograd's saved tensors are read, not written."""
    inputs = [x.requires_grad_() for x in make_inputs(2, 4, 2, 150, 8, device=device)]
    out = blurry_window_attention(*inputs, BlurryWindow(4, 16), enable_gqa=True)
    cotangents = [torch.full_like(out, float(i + 1)) for i in range(THREADS)]

    def back(cotangent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True)

    expected = [back(cotangent) for cotangent in cotangents]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(back, cotangents))
    assert all(torch.equal(a, b) for x, y in zip(expected, found, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("work", [call, steps])
def test_streams_get_the_bits_of_one(work):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    expected = [work(index, device) for index in range(THREADS)]
    streams = [torch.cuda.Stream() for _ in range(THREADS)]
    torch.cuda.synchronize()
    found = []
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            found.append(work(index, device))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


FORK = """
import os, sys, torch
from blurry_attn import BlurryWindow, blurry_window_attention

def work():
    torch.manual_seed(0)
    query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 8, 600, 16).unbind())
    out = blurry_window_attention(query, key, value, BlurryWindow(8, 32))
    return [out, *torch.autograd.grad(out.sum(), (query, key, value))]

after_use = sys.argv[1] == "after use"
torch.set_num_threads(2)
before = work() if after_use else None
if os.fork() == 0:
    if after_use:
        torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's threads are not in this process
    torch.save([x.detach() for x in work()], sys.argv[2])
    os._exit(0)
assert os.wait()[1] == 0
found = torch.load(sys.argv[2])
assert all(torch.equal(a, b) for a, b in zip(found, before or work(), strict=True))
print("same")
"""


@pytest.mark.parametrize("when", ["after import", "after use"])
def test_a_forked_process_gets_the_same_bits(when, tmp_path):
    command = [sys.executable, "-c", FORK, when, str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "same\n", done.stderr


class Attended(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return blurry_window_attention(*make_inputs(1, tokens=100, seed=index), BlurryWindow(4, 16))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context):
    workers = 2 if context == "fork" else 1
    loader = DataLoader(Attended(), batch_size=None, num_workers=workers, multiprocessing_context=context)
    for index, out in enumerate(loader):
        assert torch.equal(out, Attended()[index])


def parts(state: BlurryState) -> list[torch.Tensor]:
    return [state.key.clone(), state.value.clone(), state.position.clone()]


def test_a_step_that_an_exception_ends_leaves_the_state(device):
    """Whatever fails before the operator has its inputs: a projection, or an interrupt."""
    attention = BlurrySelfAttention(16, 2, BlurryWindow(4, 16)).to(device)
    state = BlurryState.empty(2, 2, 8, window=attention.window, device=device)
    x = torch.randn(2, 1, 16, device=device)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        attention.step(x, state)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            before, hook = parts(state), projection.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                attention.step(x, state)
            hook.remove()
            assert all(torch.equal(a, b) for a, b in zip(before, parts(state), strict=True))
        copy = state.clone()
        assert torch.equal(attention.step(x, state), attention.step(x, copy))


def test_a_step_that_is_refused_is_told_by_its_own_error(device):
    """Where a copy of the state is kept for what comes after it, too."""
    attention = BlurrySelfAttention(16, 2, BlurryWindow(4, 16)).to(device)
    attention.out_proj.register_forward_hook(lambda *arguments: None)
    with torch.inference_mode():
        state = BlurryState.empty(2, 2, 8, window=attention.window, device=device)
    with torch.no_grad(), pytest.raises(ValueError, match=r"state\.key must be no inference tensor"):
        attention.step(torch.randn(2, 1, 16, device=device), state)


def test_a_call_with_a_state_never_writes_it(device):
    state = make_state(BlurryWindow(4, 16), [3, 90], device=device)
    before = parts(state)
    run(blurry_window_attention, *make_inputs(device=device), state.window, state=state)
    assert all(torch.equal(a, b) for a, b in zip(before, parts(state), strict=True))
