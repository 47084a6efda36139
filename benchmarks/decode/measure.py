"""What is measured, and how."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from blurry_attn import BlurryState
from blurry_attn.lm.generate import Sampling
from blurry_attn.lm.model import ROPE_BASE, LanguageModel, ModelConfig, TokenCache, TokenSelfAttention
from blurry_attn.ops import rotary

from ..speed.meters.cpu import ALLOCATOR, PROC, resident

MIXERS = {"blurry": "blurry window", "full": "full attention over a cache"}
GREEDY = Sampling(temperature=0)
WARM_UP = 3
REPLAYS = 5
# A cache has to take in warm-up, one step on the side stream and one that is captured, beside those that are timed.
ROOM = WARM_UP + 2

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What is measured on a device: a model, batches and histories, and for how long (at most so many steps)."""

    dim: int
    layers: int
    resolutions: tuple[int, ...]
    dtype: str
    slots: int = 64
    batches: tuple[int, ...] = (1,)
    histories: tuple[int, ...] = tuple(1024 << n for n in range(8))
    steps: int = 100
    seconds: float = 3.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


PYRAMID = (1, 1, 2, 2, 4, 4, 8, 8)
SETUPS = {
    "cpu": Setup(512, 4, PYRAMID, "float32", steps=300),
    "cuda": Setup(1024, 12, PYRAMID * 2, "bfloat16", batches=(1, 16), steps=40, seconds=0.5),
}


def quick(setup: Setup) -> Setup:
    """So small that it takes seconds: does everything run?"""
    return replace(setup, dim=64, layers=2, resolutions=(1, 4), slots=8, histories=(64, 256), steps=5, seconds=0.1)


class CachedAttention(TokenSelfAttention):
    """Full attention, one token at a time, over a cache that has room for all tokens to come."""

    @torch.no_grad()
    def step(self, x: Tensor, state: TokenCache) -> Tensor:
        begin, end = state.position, state.position + 1
        positions = torch.arange(begin, end, device=x.device)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotary(y, positions, self.rope_base) for y in (query, key))
        state.key[:, :, begin:end], state.value[:, :, begin:end] = key, value
        state.position = end
        out = functional.scaled_dot_product_attention(query, state.key[:, :, :end], state.value[:, :, :end])
        return self.out_proj(out.transpose(1, 2).flatten(2))


def make_model(mixer: str, setup: Setup, device: str) -> LanguageModel:
    """The same weights for every mixer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(ModelConfig(mixer, setup.dim, setup.layers, setup.slots, setup.resolutions))
        if mixer == "full":
            for block in model.blocks:
                attention = CachedAttention(setup.dim, len(setup.resolutions), None, ROPE_BASE)
                attention.load_state_dict(block.mixer.state_dict())
                block.mixer = attention
    return model.to(setup.torch_dtype).eval()


def make_states(model: LanguageModel, batch: int, history: int, room: int) -> list[Any]:
    """What each layer remembers of ``history`` drawn tokens; a cache has room for so many more."""
    weight, config = model.embedding.weight, model.config
    shape = (batch, config.heads, config.slots, config.dim // config.heads)
    states: list[Any] = []
    for block in model.blocks:
        if config.mixer == "blurry":
            slots = torch.randn(2, *shape, device=weight.device)
            position = torch.full((batch,), history, device=weight.device)
            states.append(BlurryState(*slots.unbind(), position, block.mixer.window))
        else:
            cache = weight.new_zeros(2, *shape[:2], history + room, shape[3])
            # Drawing billions of numbers takes longer than what is measured: a stretch of them is repeated.
            stretch = torch.randn_like(cache[:, :, :, : min(history, 4096)])
            for part in cache[:, :, :, :history].split(4096, dim=3):
                part.copy_(stretch[:, :, :, : part.shape[3]])
            states.append(TokenCache(*cache.unbind(), history))
    return states


def state_bytes(mixer: str, setup: Setup, batch: int, history: int) -> int:
    """Bytes that hold a history, in all layers."""
    rows, itemsize = (setup.slots, 4) if mixer == "blurry" else (history, setup.torch_dtype.itemsize)
    return setup.layers * batch * rows * 2 * setup.dim * itemsize


def timed(call: Callable[[], None], setup: Setup) -> list[float]:
    """Seconds of each call; at least five, then until the setup's steps or seconds are spent."""
    seconds: list[float] = []
    while len(seconds) < 5 or (len(seconds) < setup.steps and sum(seconds) < setup.seconds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


@sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # cuDNN would plan anew for every length of the cache
def decode(model: LanguageModel, states: list[Any], batch: int, setup: Setup) -> dict[str, list[float]]:
    """Seconds of each step, by way."""
    device = model.embedding.weight.device
    token, generator = torch.zeros(batch, 1, dtype=torch.int64, device=device), torch.Generator()

    def generate() -> None:
        token.copy_(GREEDY.draw(model.step(token, states).float().cpu(), generator))

    for _ in range(WARM_UP):
        generate()
    seconds = {"generate": timed(generate, setup)}
    if device.type == "cuda":
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.step(token, states)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            token.copy_(model.step(token, states).argmax(-1, keepdim=True))

        def replay() -> None:
            for _ in range(REPLAYS):
                graph.replay()
            torch.cuda.synchronize()

        replay()
        seconds["graph"] = [s / REPLAYS for s in timed(replay, replace(setup, steps=setup.steps // REPLAYS))]
    return seconds


def measure(device: str, threads: int, setup: Setup, mixer: str, batch: int, history: int) -> Row:
    """Median seconds of a step by way, how many were timed, and the most memory in use beyond the weights."""
    torch.set_num_threads(threads)
    model = make_model(mixer, setup, device)
    room = setup.steps + ROOM
    decode(model, make_states(model, batch, 2 * setup.slots, room), batch, replace(setup, seconds=0))
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    states = make_states(model, batch, history, room)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        (PROC / "clear_refs").write_text("5")  # resets VmHWM
    seconds = decode(model, states, batch, setup)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return {
        "seconds": {way: statistics.median(samples) for way, samples in seconds.items()},
        "samples": {way: len(samples) for way, samples in seconds.items()},
        "peak_bytes": max(0, peak - before),
    }


def measure_all(device: str, threads: int, setup: Setup) -> list[Row]:
    """All rows; on the CPU each in a fresh process, whose resident memory is that of this row alone."""
    rows = []
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["benchmarks.decode.measure"])
    for batch, history, mixer in itertools.product(setup.batches, setup.histories, MIXERS):
        print(f"{mixer}, batch {batch}, {history} tokens", file=sys.stderr, flush=True)
        row: Row = {"mixer": mixer, "batch": batch, "history": history}
        row["state_bytes"] = state_bytes(mixer, setup, batch, history)
        arguments = (device, threads, setup, mixer, batch, history)
        if device == "cpu":
            with patch.dict(os.environ, ALLOCATOR), fresh.Pool(1) as pool:
                row |= pool.apply(measure, arguments)
        else:
            try:
                row |= measure(*arguments)
            except torch.OutOfMemoryError:
                row["skipped"] = "does not fit"
        rows.append(row)
    return rows
