"""The language model: it trains, resumes to the same losses, stops without loss, generates from a constant state."""

from __future__ import annotations

import heapq
import io
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, pairwise
from math import log2
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import blurry_attn
from blurry_attn import _C, BlurryWindow
from blurry_attn.lm import checkpoint
from blurry_attn.lm import train as training
from blurry_attn.lm.__main__ import _parser, main
from blurry_attn.lm.checkpoint import TrainConfig
from blurry_attn.lm.data import InputError, load_text, ngram_bits
from blurry_attn.lm.generate import Sampling, continuation, generate
from blurry_attn.lm.model import MIXERS, LanguageModel, ModelConfig, state_size
from blurry_attn.lm.train import Interrupted, learning_rate, train

CPU = torch.device("cpu")
TINY = ModelConfig(dim=32, layers=2, slots=8, resolutions=(1, 1, 4, 4))
SHAPE = ["--dim", "16", "--layers", "1", "--slots", "4", "--resolutions", "1,2"]
OPTIONS = [*SHAPE, "--context", "32", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """``generate`` takes one thread; the next test has its own again."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few Python files."""
    folder = tmp_path_factory.mktemp("text")
    for module in (heapq, json, textwrap, signal):
        (folder / f"{module.__name__}.py").write_bytes(Path(str(module.__file__)).read_bytes())
    return folder


@pytest.fixture(scope="module")
def config(text: Path) -> TrainConfig:
    return TrainConfig(text=str(text), context=64, batch=4, steps=24, learning_rate=1e-2, threads=1)


@pytest.fixture(scope="module")
def run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> training.Result:
    """A whole run that nothing interrupted."""
    return train(TINY, config, tmp_path_factory.mktemp("runs") / "whole", CPU)


def metrics(folder: Path) -> list[dict]:
    """Of each step; without its duration, which no two runs share."""
    lines = [json.loads(line) for line in (folder / training.METRICS).read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def test_training_beats_the_unigram(run: training.Result, config: TrainConfig):
    lines = metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, config.steps + 1))
    assert sum("validation_bits" in line for line in lines) == training.VALIDATIONS
    assert run.bits == lines[-1]["validation_bits"] < run.unigram
    assert (run.folder / training.PLOT).read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in run.folder.iterdir()} == {checkpoint.FILE, training.METRICS, training.PLOT}


@pytest.mark.parametrize("stop", [3, 17])
def test_an_interrupted_run_resumes_to_the_same_bits(
    stop: int, run: training.Result, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = training.train_step

    def interrupted(model, optimizer, text, config, index, *others):
        if index == stop - 1:
            signal.raise_signal(signal.SIGINT)
        return step(model, optimizer, text, config, index, *others)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"step {stop} of {config.steps}"):
        patch.setattr(training, "train_step", interrupted)
        train(TINY, config, tmp_path, CPU)
    assert checkpoint.load(tmp_path).step == stop
    with (tmp_path / training.METRICS).open("a") as file:  # what a crash after the last save would leave
        file.write(json.dumps({"step": stop + 1, "loss": 0.0, "bits": 0.0}) + '\n{"step": ')
    torch.rand(7)  # nothing hangs on the global generator
    result = train(TINY, config, tmp_path, CPU)
    assert metrics(tmp_path) == metrics(run.folder)
    assert result.bits == run.bits
    resumed, whole = (checkpoint.load(folder).tensors for folder in (tmp_path, run.folder))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ctrl_c_leaves_a_run_that_generates(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    command = [sys.executable, "-m", "blurry_attn.lm", "train", "--text", str(text), "--run", str(tmp_path), *OPTIONS]
    with subprocess.Popen([*command, "--steps", "1000000"], stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        seen = b""
        while b"bits/byte" not in seen:  # the bar of a first step
            seen += process.stderr.read(1) or pytest.fail(f"ended early: {seen.decode()}")
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert f"train --resume --run {tmp_path}" in message
    step = checkpoint.load(tmp_path).step
    assert 0 < step == len(metrics(tmp_path))
    assert main(["generate", "--run", str(tmp_path), "--tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_a_folder_has_one_training_at_a_time(
    config: TrainConfig, run: training.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Another is refused by the name of the folder, from its first step to its last; a model is sampled meanwhile."""
    step, folder, seen = training.train_step, tmp_path / "run", []

    def crowded(model, optimizer, text, config, index, *others):
        if index in (0, 5, config.steps - 1):
            with monkeypatch.context() as patch:
                patch.setattr(training, "train_step", lambda *_: pytest.fail("two train"))
                for resume in ([], ["--resume"] if index else []):
                    seen.append(main(["train", "--run", str(folder), *resume, *OPTIONS[-4:]]))
                    assert f"--run {folder}: another process is training there" in capsys.readouterr().err
        if index == 5:
            assert "tokens/s" in generate(folder, "x", 3, Sampling(), CPU, io.StringIO())
        return step(model, optimizer, text, config, index, *others)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", crowded)
        train(TINY, config, folder, CPU)
    assert seen == [2] * 6 and metrics(folder) == metrics(run.folder)
    assert {file.name for file in folder.iterdir()} == {checkpoint.FILE, training.METRICS, training.PLOT}


@pytest.mark.parametrize("run", ["file", "file/below", "/proc/none", "/dev/null"])
def test_a_folder_that_cannot_be_is_told_before_the_text_is_read(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(training, "load_text", lambda *_: pytest.fail("the text was read"))
    assert main(["train", "--run", run, *OPTIONS]) == main(["compare", "--run", run, *OPTIONS]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(f"blurry-lm: error: --run {run}") and line.endswith("; name another folder")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that is full when a file is so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "name"), [(5000, checkpoint.FILE), (100, training.METRICS)])
def test_a_full_disk_is_told_by_the_file(size: int, name: str, text: Path, tmp_path: Path, capsys):
    folder = tmp_path / "run"
    command = ["train", "--text", str(text), "--run", str(folder), *OPTIONS, "--steps", "8"]
    with largest_file(size):
        assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"blurry-lm: error: {folder / name}: File too large; make room there")
    assert {file.name for file in folder.iterdir()} <= {training.METRICS}
    assert main(command) == 0 and len(metrics(folder)) == 8


@pytest.mark.parametrize("command", ["train", "generate"])
def test_output_that_cannot_be_written_is_told(
    command: str, run: training.Result, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    options = {
        "train": ["--text", str(text), "--run", str(tmp_path / "run"), *OPTIONS, "--steps", "2"],
        "generate": ["--run", str(run.folder), "--tokens", "3", "--device", "cpu"],
    }
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([command, *options[command]]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("blurry-lm: error: standard output: No space left")


@pytest.mark.parametrize("faster", [1, 2])
def test_the_number_of_threads_is_the_faster_one_and_kept(
    faster: int, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The trial leaves no trace in the run, whose bits are those of that number of threads."""
    config, loss, clock, used = replace(config, threads=None, steps=6), training._loss, count(step=1e-6), []
    now = 0.0

    def timed(model, *others):
        nonlocal now
        now += 0.01 if torch.get_num_threads() == faster else 0.02
        used.append(torch.get_num_threads())
        assert all(parameter.grad is None for parameter in model.parameters()) or len(used) > 69
        return loss(model, *others)

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_loss", timed)
        patch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now + next(clock)))
        train(TINY, config, tmp_path / "measured", CPU)
        assert f"threads: {faster}, as a gradient takes " in capsys.readouterr().out
        assert used[:68] == [1, 2] * 34 and set(used[68:]) == {faster} and torch.get_num_threads() == 2
        done = len(used)
        train(TINY, replace(config, steps=8), tmp_path / "measured", CPU, found="shorter")
        assert set(used[done:]) == {faster}
    train(TINY, replace(config, threads=faster), tmp_path / "chosen", CPU)
    train(TINY, replace(config, threads=faster, steps=8), tmp_path / "chosen", CPU, found="shorter")
    measured, chosen = (checkpoint.load(tmp_path / name) for name in ("measured", "chosen"))
    assert measured.train_config == chosen.train_config and measured.train_config.threads == faster
    assert all(torch.equal(measured.tensors[name], chosen.tensors[name]) for name in chosen.tensors)


def test_a_number_of_threads_that_was_chosen_is_taken(config: TrainConfig, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    monkeypatch.setattr(training, "TRIAL", math.nan)
    train(TINY, replace(config, threads=None, steps=1), tmp_path / "environment", CPU)
    train(TINY, replace(config, threads=1, steps=1), tmp_path / "option", CPU)
    assert "threads:" not in capsys.readouterr().out
    chosen = [checkpoint.load(tmp_path / name).train_config.threads for name in ("environment", "option")]
    assert chosen == [2, 1]


def test_a_finished_run_trains_longer(run: training.Result, config: TrainConfig, tmp_path: Path, capsys):
    """By the schedule of the new total, from the step at which it stands."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    command, more = ["train", "--resume", "--run", str(folder), "--device", "cpu"], config.steps + 8
    assert main(command) == 0
    assert f"all {config.steps} steps are done; a larger --steps trains longer" in capsys.readouterr().out
    assert metrics(folder) == metrics(run.folder)
    assert main([*command, "--steps", str(more)]) == 0
    lines = metrics(folder)
    assert lines[: config.steps] == metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, more + 1))
    rates = [learning_rate(replace(config, steps=more), step) for step in range(config.steps, more)]
    assert [line["learning_rate"] for line in lines[config.steps :]] == rates
    saved = checkpoint.load(folder)
    assert (saved.step, saved.train_config.steps) == (more, more)
    capsys.readouterr()
    assert main([*command, "--steps", str(more - 1)]) == 2
    assert f"--steps: {folder} was started with {more}, which can grow, got {more - 1}" in capsys.readouterr().err
    with pytest.raises(InputError, match="another configuration"):  # whose steps are no part of a comparison
        train(TINY, replace(config, steps=more + 1), folder, CPU)


@pytest.mark.parametrize("mixer", MIXERS)
def test_stepping_equals_the_whole(mixer: str):
    torch.manual_seed(1)
    model = LanguageModel(replace(TINY, mixer=mixer)).double()
    states: list = []
    prompt = b"import os\n"
    generated = bytes(continuation(model, prompt, 100, Sampling(temperature=0), states))
    tokens = torch.tensor([list(prompt + generated)])
    logits = model(tokens)[0]
    assert bytes(logits.argmax(-1)[len(prompt) - 1 : -1].tolist()) == generated
    step = model.step(tokens[:, -1:], states)[0]
    torch.testing.assert_close(step, logits[-1], rtol=1e-10, atol=1e-10)


def test_the_state_is_constant_and_equal_for_blurry_and_sliding():
    def sizes(mixer: str) -> list[tuple[int, int]]:
        model = LanguageModel(replace(TINY, mixer=mixer))
        sizes, states = [], []
        for _ in continuation(model, b"x" * 20, 30, Sampling(), states):
            sizes.append(state_size(states))
        return sizes

    window = BlurryWindow.pyramid(TINY.slots, TINY.resolutions)
    elements = TINY.layers * window.state_elements(TINY.heads, TINY.dim // TINY.heads)
    assert set(sizes("blurry")) == set(sizes("sliding")) == {(elements, 4 * elements)}
    full = sizes("full")
    assert full[-1][0] == full[0][0] * (20 + 29) // 20


@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_is_seen_ahead_and_the_spans_are_as_said(mixer: str):
    config = replace(TINY, mixer=mixer, layers=1)
    model = LanguageModel(config).double()
    tokens = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 20] = (other[0, 20] + 1) % 256
    changed = (model(tokens) != model(other)).any(-1)[0]
    assert not changed[:20].any() and changed[20]
    if mixer == "sliding":
        assert not changed[20 + config.slots :].any() and changed[20 : 20 + config.slots].all()
    else:
        assert changed[20 : 20 + config.slots * max(config.resolutions) // 2].all()


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@torch.no_grad()
def test_full_attention_over_a_whole_sequence_makes_no_mask():
    model, length = LanguageModel(replace(TINY, mixer="full", layers=1)), 512
    with Largest() as largest:
        model(torch.zeros(1, length, dtype=torch.int64))
    assert largest.elements == length * 256  # the logits


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast_casts_what_layers_read_once(mixer: str):
    """To the bits that each layer's own cast gives."""
    model, tokens = LanguageModel(replace(TINY, mixer=mixer)), torch.randint(256, (2, 30))
    read = []
    for layer in (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)):
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        assert len(read) == 7 * TINY.layers and set(read) == {torch.bfloat16}
        for norm in (norm for norm in model.modules() if isinstance(norm, torch.nn.RMSNorm)):
            norm.forward = lambda x, norm=norm: torch.nn.RMSNorm.forward(norm, x)
        assert torch.equal(model(tokens), logits) and torch.float32 in read


def test_generate_streams_text_and_says_what_it_took(run: training.Result):
    class Stream(io.StringIO):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1

    outs = [Stream() for _ in range(3)]
    lines = [
        generate(run.folder, "é = ", 30, Sampling(seed=seed), CPU, out)
        for seed, out in zip((1, 1, 2), outs, strict=True)
    ]
    assert outs[0].flushes >= 30
    assert outs[0].getvalue().startswith("é = ")
    assert outs[0].getvalue() == outs[1].getvalue() != outs[2].getvalue()
    assert "tokens/s" in lines[0] and "1,024 elements, 4,096 bytes" in lines[0]


def test_sampling_keeps_to_its_limits():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))

    def drawn(**options) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {int(Sampling(**options).draw(logits, generator)) for _ in range(200)}

    assert drawn(temperature=1.0, top_p=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=0) == drawn(top_k=1) == drawn(top_p=0.3) == {1}
    assert drawn(temperature=1.0, top_k=2, top_p=1.0) == drawn(temperature=1.0, top_p=0.6) == {1, 3}
    counts = Counter(int(Sampling(1.0, 0, 1.0).draw(logits, g)) for g in [torch.Generator().manual_seed(0)] * 4000)
    assert all(abs(counts[i] / 4000 - p) < 0.03 for i, p in enumerate((0.1, 0.4, 0.2, 0.3)))


def test_text_is_split_by_file(tmp_path: Path):
    for index in range(30):
        (tmp_path / f"{index:02}.txt").write_text(f"[{index:02}]" * 20)
    (tmp_path / ".hidden").write_text("hidden" * 99)
    (tmp_path / "binary").write_bytes(b"\0" * 999)
    text = load_text(tmp_path, 16)
    train_files, held_files = (
        {bytes(part[i : i + 4].tolist()) for i in range(0, len(part), 4)} for part in (text.train, text.held_out)
    )
    assert len(held_files) == 3 and len(train_files) == 27 and not train_files & held_files
    assert load_text(tmp_path, 16).digest == text.digest
    (tmp_path / "00.txt").write_text("[xx]" * 20)
    assert load_text(tmp_path, 16).digest != text.digest


def test_one_file_is_split_at_its_last_tenth(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{i:04}" for i in range(250)))
    for path in (file, tmp_path):
        text = load_text(path, 16)
        assert bytes(torch.cat([text.train, text.held_out]).tolist()) == file.read_bytes()
        assert len(text.held_out) == 100


def test_the_default_text_is_the_library_without_tests_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["a.py", "email/b.py", "test/c.py", "json/tests/d.py", "site-packages/e.py", "f.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name[-4] * 100)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    text = load_text(None, 16)
    assert set(bytes(torch.cat([text.train, text.held_out]).tolist())) == set(b"ab")


def test_batches_follow_from_seed_and_step(text: Path):
    data = load_text(text, 64)
    inputs, targets = data.batch(3, 5, 4, 64)
    assert torch.equal(inputs, data.batch(3, 5, 4, 64)[0])
    assert not torch.equal(inputs, data.batch(3, 6, 4, 64)[0])
    assert not torch.equal(inputs, data.batch(4, 5, 4, 64)[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    whole = bytes(data.train.tolist())
    assert all(bytes(row.tolist()) in whole for row in torch.cat([inputs, targets[:, -1:]], 1))


def test_ngram_bits_are_those_of_counting():
    train, inputs, targets = b"abababac", b"abz", b"bay"
    singles = Counter(train)
    pairs = Counter(pairwise(train))
    unigram = {b: (singles[b] + 1) / (len(train) + 256) for b in range(256)}
    firsts = Counter(train[:-1])
    bigram = [(pairs[a, b] + unigram[b]) / (firsts[a] + 1) for a, b in zip(inputs, targets, strict=True)]
    got = ngram_bits(
        torch.tensor(list(train), dtype=torch.uint8), torch.tensor([list(inputs)]), torch.tensor([list(targets)])
    )
    want = (-sum(log2(unigram[b]) for b in targets) / 3, -sum(map(log2, bigram)) / 3)
    assert got == pytest.approx(want, rel=1e-12)


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.03


def test_compare_trains_all_mixers_alike(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["compare", "--text", str(text), "--run", str(tmp_path), *OPTIONS, "--steps", "4", "--batch", "2"]
    assert main([*arguments, "--learning-rates", "1e-2", "3e-3"]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "compare.json").read_text())
    assert len(results["runs"]) == 6
    best = {row["mixer"]: row for row in results["best"]}
    assert list(best) == list(MIXERS)
    for mixer, row in best.items():
        assert row["bits"] == min(each["bits"] for each in results["runs"] if each["mixer"] == mixer)
        assert f"{mixer} " in out and f"{row['bits']:.3f}" in out
    assert best["blurry"]["state_elements"] == best["sliding"]["state_elements"] == 2 * 4 * (8 + 8)
    assert best["full"]["state_elements"] == 2 * 32 * (8 + 8)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def bad_inputs() -> list:
    train = ["train", "--device", "cpu"]
    return [
        pytest.param([*train, "--text", "{tmp}/none"], "none: no such file or folder", id="missing text"),
        pytest.param([*train, "--text", "{tmp}/empty"], "empty: no text found", id="empty folder"),
        pytest.param([*train, "--text", "{tmp}/empty.txt"], "empty.txt: no text found", id="empty file"),
        pytest.param([*train, "--text", "{tmp}/short.txt"], "too short, 9 training bytes", id="short text"),
        pytest.param([*train, "--text", "{tmp}/binary"], "binary file", id="binary text"),
        pytest.param([*train, "--text", "{tmp}/huge"], "huge: at least 8,192 GiB", id="text beyond memory"),
        pytest.param([*train, "--dim", "30"], "--dim must be a multiple of", id="dim"),
        pytest.param([*train, "--dim", "9" * 30], "--dim must be a multiple of", id="absurd dim"),
        pytest.param([*train, "--dim", "1048576"], "--dim, --layers: at least", id="weights beyond memory"),
        pytest.param([*train, "--layers", "9" * 30], "--dim, --layers: at least", id="layers beyond memory"),
        pytest.param([*train, "--batch", "9" * 17], "--batch, --context: at least", id="batch beyond memory"),
        pytest.param([*train, "--slots", "1"], "--slots must be in 2 .. 1048576, got 1", id="slots"),
        pytest.param([*train, "--slots", "9" * 30], "--slots must be in 2 .. 1048576, got 9", id="absurd slots"),
        pytest.param([*train, "--resolutions", "1," + "9" * 30], "--resolutions must be", id="absurd resolutions"),
        pytest.param([*train, "--threads", "0"], "--threads must be in 1 .. 1024, got 0", id="threads"),
        pytest.param([*train, "--layers", "0"], "--layers must be at least 1, got 0", id="layers"),
        pytest.param([*train, "--resolutions", "1,0"], "--resolutions must be", id="resolutions"),
        pytest.param([*train, "--steps", "0"], "--steps must be in 1 .. 2**63 - 1, got 0", id="steps"),
        pytest.param([*train, "--batch", "0"], "--batch must be in 1 .. 2**63 - 1, got 0", id="batch"),
        pytest.param([*train, "--context", "0"], "--context must be in 1 .. 2**63 - 1, got 0", id="context"),
        pytest.param([*train, "--learning-rate", "nan"], "--learning-rate must be", id="learning rate"),
        pytest.param([*train, "--seed", "-1"], "--seed must be", id="seed"),
        pytest.param(["train", "--text", "{text}", "--device", "tpu9"], "--device tpu9: cannot be used", id="device"),
        pytest.param(["train", "--text", "{text}", "--device", "meta"], "want cpu or cuda", id="meta device"),
        pytest.param([*train, "--run", "{run}"], "holds a run already", id="run exists"),
        pytest.param(
            [*train, "--run", "{run}", "--resume", "--dim", "8"], "--dim: {run} was started with", id="resume"
        ),
        pytest.param([*train, "--run", "{tmp}/none", "--resume"], "none: no checkpoint there", id="resume nothing"),
        pytest.param(["generate", "--run", "{tmp}/none"], "none: no checkpoint there", id="no checkpoint"),
        pytest.param(["generate", "--run", "{tmp}/wrong"], "not a safetensors file", id="wrong file"),
        pytest.param(["generate", "--run", "{tmp}/other"], "not a checkpoint of this program", id="other file"),
        pytest.param(["generate", "--run", "{run}", "--prompt", ""], "--prompt must not be empty", id="prompt"),
        pytest.param(["generate", "--run", "{run}", "--tokens", "0"], "--tokens must be at least 1", id="tokens"),
        pytest.param(["generate", "--run", "{run}", "--temperature", "-1"], "--temperature must be", id="temperature"),
        pytest.param(["generate", "--run", "{run}", "--top-k", "-1"], "--top-k must be at least 0", id="top-k"),
        pytest.param(["generate", "--run", "{run}", "--top-p", "0"], "--top-p must be in (0, 1]", id="top-p"),
        pytest.param(["generate"], "no checkpoint under runs/", id="nothing trained"),
        pytest.param(["compare", "--learning-rates", "0"], "--learning-rate must be positive", id="compare rate"),
        pytest.param(
            ["compare", "--learning-rates", "1", "1"], "--learning-rates must be distinct", id="compare twice"
        ),
    ]


@pytest.mark.parametrize(("arguments", "message"), bad_inputs())
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    run: training.Result,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "wrong", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short text")
    (tmp_path / "binary").write_bytes(b"\0" * 9999)
    (tmp_path / "wrong" / checkpoint.FILE).write_text("not a checkpoint at all")
    save_file({"x": torch.zeros(1)}, tmp_path / "other" / checkpoint.FILE)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**42)
    before = sorted(tmp_path.rglob("*")), metrics(run.folder)
    places = {"tmp": tmp_path, "run": run.folder, "text": text}
    assert main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("blurry-lm: error: ") and captured.err.count("\n") == 1
    assert message.format(**places) in captured.err
    assert (sorted(tmp_path.rglob("*")), metrics(run.folder)) == before


def test_a_changed_text_is_refused_on_resume(config: TrainConfig, text: Path, tmp_path: Path):
    copy = tmp_path / "text"
    copy.mkdir()
    for file in text.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = replace(config, text=str(copy), steps=2)
    train(TINY, config, tmp_path / "run", CPU)
    next(copy.iterdir()).write_text("changed " * 1000)
    with pytest.raises(InputError, match="not the text that this run was started on"):
        train(TINY, config, tmp_path / "run", CPU)
    with pytest.raises(InputError, match="another configuration"):
        train(TINY, replace(config, seed=5), tmp_path / "run", CPU)


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainConfig, tmp_path: Path):
    with pytest.raises(InputError, match="a lower --learning-rate may help"):
        train(TINY, replace(config, learning_rate=1e30), tmp_path, CPU)
    assert (
        not (tmp_path / checkpoint.FILE).exists()
        or torch.isfinite(checkpoint.load(tmp_path).tensors["model.embedding.weight"]).all()
    )


def test_a_validation_that_is_not_finite_is_not_saved(config: TrainConfig, tmp_path: Path, monkeypatch):
    bits = iter([4.0, 3.0, float("nan")])
    monkeypatch.setattr(training, "validate", lambda *_: next(bits))
    with pytest.raises(InputError, match="the bits of the held-out text became nan at step 9"):
        train(TINY, config, tmp_path, CPU)
    assert checkpoint.load(tmp_path).step == 6


@pytest.mark.parametrize("line", ["[1]", '{"step": 1}', '{"step": "1"}', '{"step": 1, "bits": "2"}', "{}", "\xff}"])
def test_numbers_of_another_program_are_told(line: str, run: training.Result, config: TrainConfig, tmp_path: Path):
    for name in (checkpoint.FILE, training.METRICS):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    (tmp_path / training.METRICS).write_text(line + "\n" if line.endswith("}") else line + "}\n", "latin-1")
    with pytest.raises(InputError, match=f"^{tmp_path / training.METRICS}: not the numbers of a training"):
        train(TINY, config, tmp_path, CPU)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(
    number: float, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before it reaches a parameter: the loss would show it one step late."""
    clip, steps = training._clip, []

    def third_is_bad(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        steps.append(optimizer)
        if len(steps) == 3:
            next(iter(optimizer.param_groups[0]["params"])).grad[0, 0] = number
        return clip(optimizer)

    monkeypatch.setattr(training, "_clip", third_is_bad)
    with pytest.raises(InputError, match=f"the gradient's norm became {number} at step 3"):
        train(TINY, config, tmp_path, CPU)
    parameters = [p for group in steps[0].param_groups for p in group["params"]]
    assert all(p.isfinite().all() for p in parameters)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


def test_a_missing_package_is_named():
    code = "import runpy, sys; sys.modules['tqdm'] = None; runpy.run_module('blurry_attn.lm', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("blurry-lm: tqdm is missing") and done.stderr.count("\n") == 1


def test_the_command_line_tells_about_itself(capsys: pytest.CaptureFixture):
    """Its version, that of torch and what it was built for; and what each option does."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.count("\n") == 1
    assert f"blurry-lm {blurry_attn.__version__}, " in out and f"torch {torch.__version__}" in out
    built_for = _C.build_info()["cuda"]
    assert (f"CUDA {built_for}" if built_for else "built for the CPU alone") in out
    (commands,) = (action for action in _parser()._actions if isinstance(action.choices, dict))
    assert list(commands.choices) == ["train", "generate", "compare"]
    for parser in commands.choices.values():
        assert parser.description and all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", ""], "argument --run: want a path in UTF-8, got ''"),
        (["--run", "\udcff"], "argument --run: want a path in UTF-8"),
        (["--text", ""], "argument --text: want a path in UTF-8, got ''"),
        (["--resolutions", "1,,2"], "argument --resolutions: want whole numbers with commas between"),
        (["--steps", "1e3"], "argument --steps: invalid int value: '1e3'"),
        (["--mixer", "fully"], "argument --mixer: invalid choice: 'fully'"),
    ],
)
def test_what_is_no_value_of_an_option_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_prompt_and_a_terminal_of_any_encoding(run: training.Result, monkeypatch: pytest.MonkeyPatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "--run", str(run.folder), "--tokens", "3", "--prompt", "é\udcff"]) == 0
    assert out.buffer.getvalue().startswith(b"\\xe9\\ufffd")
