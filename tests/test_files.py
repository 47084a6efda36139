"""Checkpoints: what was cut off, altered or written by another program is refused; a kill leaves a whole file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from blurry_attn.lm import checkpoint
from blurry_attn.lm.checkpoint import FILE, FORMAT, TrainConfig
from blurry_attn.lm.data import InputError
from blurry_attn.lm.model import LanguageModel, ModelConfig

TINY = ModelConfig(dim=16, layers=1, slots=4, resolutions=(1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LanguageModel(TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, TrainConfig(), "digest", 7)
    return tmp_path


def test_what_is_saved_comes_back(folder: Path) -> None:
    saved = checkpoint.load(folder)
    assert (saved.model_config, saved.train_config, saved.digest, saved.step) == (TINY, TrainConfig(), "digest", 7)
    model = LanguageModel(TINY)
    saved.restore(model, torch.optim.AdamW(model.parameters()))
    assert torch.equal(model.embedding.weight, saved.tensors["model.embedding.weight"])


def test_a_file_that_was_cut_off_is_refused(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        (folder / FILE).write_bytes(content[:length])
        with pytest.raises(InputError, match=f"{FILE}: not a safetensors file"):
            checkpoint.load(folder)


def test_every_altered_byte_is_noticed(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, header, 13), *range(header, len(content), len(content) // 200)]
    assert len(places) > 200
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1
        (folder / FILE).write_bytes(altered)
        with pytest.raises(InputError, match=FILE):
            checkpoint.load(folder)


@pytest.mark.parametrize("change", ["step", "train", "tensor missing", "tensor renamed", "tensor reshaped", "checksum"])
def test_a_file_whose_parts_do_not_belong_together_is_refused(folder: Path, change: str) -> None:
    tensors = load_file(folder / FILE)
    with safe_open(folder / FILE, "pt") as file:
        header = file.metadata()
    name = "model.embedding.weight"
    if change == "step":
        header["step"] = "8"
    elif change == "train":
        header["train"] = json.dumps(json.loads(header["train"]) | {"seed": 1})
    elif change == "tensor missing":
        del tensors[name]
    elif change == "tensor renamed":
        tensors["model.other"] = tensors.pop(name)
    elif change == "tensor reshaped":
        tensors[name] = tensors[name].reshape(tensors[name].shape[::-1])
    else:
        del header["checksum"]
    save_file(tensors, folder / FILE, header)
    with pytest.raises(InputError, match=f"{FILE}: was altered after it was written"):
        checkpoint.load(folder)


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}, {"format": FORMAT[:-1]}, {"step": "3"}])
def test_a_file_of_another_program_is_refused(folder: Path, header: dict[str, str] | None) -> None:
    save_file({"x": torch.zeros(1)}, folder / FILE, header)
    with pytest.raises(InputError, match=f"{FILE}: not a checkpoint of this program"):
        checkpoint.load(folder)


def test_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), folder / FILE)
    with pytest.raises(InputError, match=f"{FILE}: not a safetensors file"):
        checkpoint.load(folder)
    assert not (tmp_path / "exploded").exists()


# Writers that are killed at any moment, one after the other; each goes on counting where the file before says.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from blurry_attn.lm import checkpoint
from blurry_attn.lm.checkpoint import TrainConfig
from blurry_attn.lm.model import LanguageModel, ModelConfig

torch.set_num_threads(1)
folder, config = Path(sys.argv[1]), ModelConfig(dim=64, layers=2, slots=4, resolutions=(1, 2))
chance = random.Random(0)
model = LanguageModel(config)
optimizer = torch.optim.AdamW(model.parameters())

def write(step):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, step)
    checkpoint.save(folder, model, optimizer, TrainConfig(), "digest", step)

begin = time.monotonic()
write(0)
duration = time.monotonic() - begin
last = attempts = unfinished = 0
while attempts < 30 or (min(last, 2 * unfinished) < 10 and time.monotonic() - begin < 90):
    attempts += 1
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            write(step)
    time.sleep(chance.uniform(0, 4 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    unfinished += any(file.name.startswith(".") for file in folder.iterdir())
    saved = checkpoint.load(folder)
    assert saved.step >= last, (saved.step, last)
    assert all((tensor == saved.step).all() for name, tensor in saved.tensors.items() if name.startswith("model."))
    last = saved.step
write(last + 1)
print(last, unfinished, len(list(folder.iterdir())))
"""


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written, unfinished, files = map(int, done.stdout.split())
    assert written >= 10  # kills came between writes,
    assert unfinished >= 5  # and in the midst of one,
    assert files == 1  # and the next write clears what that left.
