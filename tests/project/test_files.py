"""Files are whole or as they were, and of one writer; a checkpoint that no training wrote is refused by name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from blurry_attn.files import claimed, write_whole
from blurry_attn.lm import checkpoint
from blurry_attn.lm.checkpoint import FILE, TrainConfig
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


@pytest.mark.parametrize("change", ["step", "train", "tensors swapped", "checksum"])
def test_a_file_whose_parts_do_not_belong_together_is_refused(folder: Path, change: str) -> None:
    tensors = load_file(folder / FILE)
    with safe_open(folder / FILE, "pt") as file:
        header = file.metadata()
    name = "model.blocks.0.mixer.k_proj.weight"
    if change == "step":
        header["step"] = "8"
    elif change == "train":
        header["train"] = json.dumps(json.loads(header["train"]) | {"seed": 1})
    elif change == "tensors swapped":
        other = name.replace("k_proj", "v_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        header["checksum"] = "0" * 64
    save_file(tensors, folder / FILE, header)
    with pytest.raises(InputError, match=f"{FILE}: was altered after it was written"):
        checkpoint.load(folder)


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}, {"step": "3"}])
def test_a_file_of_another_program_is_refused(folder: Path, header: dict[str, str] | None) -> None:
    save_file({"x": torch.zeros(1)}, folder / FILE, header)
    with pytest.raises(InputError, match=f"{FILE}: not a checkpoint of this program"):
        checkpoint.load(folder)


def forge(folder: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """Changes tensors and header as ``change`` does, and gives the file the checksum that it then should have."""
    tensors = load_file(folder / FILE)
    with safe_open(folder / FILE, "pt") as file:
        header = file.metadata()
    del header["checksum"]
    change(tensors, header)
    header = {"checksum": checkpoint._checksum(tensors, header)} | header
    save_file(tensors, folder / FILE, header)


def entry(which: str, **values: object) -> Callable:
    """A forgery of a configuration."""

    def change(tensors: dict, header: dict) -> None:
        known = json.loads(header[which]) | values
        header[which] = json.dumps({name: value for name, value in known.items() if value != "missing"})

    return change


NAME = "model.embedding.weight"
MOMENT = "optimizer.embedding.weight."
FORGERIES = {
    "format": (lambda t, h: h.update(format="blurry_attn.lm 3"), "not a checkpoint of this version"),
    "header missing": (lambda t, h: h.pop("digest"), "entry 'digest' of the header is missing"),
    "header more": (lambda t, h: h.update(more="x"), "entry 'more' of the header is not known"),
    "step negative": (lambda t, h: h.update(step="-1"), "entry 'step' must be in 0 .. 2400, got '-1'"),
    "step words": (lambda t, h: h.update(step="seven"), "entry 'step' must be"),
    "step huge": (lambda t, h: h.update(step="9" * 5000), "entry 'step' must be"),
    "step beyond": (lambda t, h: h.update(step="2401"), "entry 'step' must be"),
    "no JSON": (lambda t, h: h.update(model="{"), "entry 'model' is no configuration"),
    "JSON list": (lambda t, h: h.update(train="[]"), "entry 'train' is no configuration"),
    "JSON deep": (lambda t, h: h.update(model="[" * 60000), "entry 'model' is no configuration"),
    "JSON long": (lambda t, h: h.update(model="{" + " " * 70000 + "}"), "entry 'model' is no configuration"),
    "JSON digits": (lambda t, h: h.update(train='{"seed": ' + "9" * 5000 + "}"), "entry 'train' is no configuration"),
    "option missing": (entry("model", dim="missing"), "entry 'model': 'dim' is missing"),
    "option more": (entry("train", more=1), "entry 'train': 'more' is not known"),
    "option a bool": (entry("train", batch=True), "entry 'train': 'batch' must be int, got 'True'"),
    "option a float": (entry("model", layers=1.0), "entry 'model': 'layers' must be int, got '1.0'"),
    "option a list": (entry("train", text=["/x"]), "entry 'train': 'text' must be str | None"),
    "resolutions of words": (entry("model", resolutions=["1", "2"]), "entry 'model': 'resolutions' must be tuple"),
    "rate NaN": (entry("train", learning_rate=float("nan")), "entry 'train': --learning-rate must be"),
    "rate negative": (entry("train", learning_rate=-1.0), "entry 'train': --learning-rate must be"),
    "steps negative": (entry("train", steps=-5), "entry 'train': --steps must be"),
    "threads absurd": (entry("train", threads=10**6), "entry 'train': --threads must be"),
    "text relative": (entry("train", text="../../text"), "entry 'train': --text must be an absolute path"),
    "text with NUL": (entry("train", text="/text\0"), "entry 'train': --text must be an absolute path"),
    "mixer": (entry("model", mixer="__import__"), "entry 'model': --mixer must be one of"),
    "layers absurd": (entry("model", layers=10**15), "entry 'model' says 1000000000000000 layers of 16"),
    "layers more": (entry("model", layers=2), "entry 'model.blocks.1.mixer.k_proj.weight' is missing"),
    "dim absurd": (entry("model", dim=2**20), "entry 'model' says 1 layers of 1048576"),
    "dim beyond": (entry("model", dim=10**40), "entry 'model': --dim must be"),
    "slots absurd": (entry("model", slots=10**12), "entry 'model': --slots must be"),
    "resolutions absurd": (entry("model", resolutions=[1, 2**62]), "entry 'model': --resolutions must be"),
    "tensor missing": (lambda t, h: t.pop(NAME.replace("embedding", "norm")), "entry 'model.norm.weight' is missing"),
    "tensor more": (lambda t, h: t.update(more=torch.zeros(1)), "entry 'more' is none of such a model"),
    "tensor wide": (lambda t, h: t.update({NAME: t[NAME].double()}), "entry 'model' says 1 layers of 16"),
    "tensor half": (
        lambda t, h: t.update({MOMENT + "exp_avg": t[NAME].half()}),
        f"entry '{MOMENT}exp_avg' must be F32 \\(256, 16\\), got F16",
    ),
    "tensor reshaped": (
        lambda t, h: t.update({MOMENT + "exp_avg": torch.zeros(16, 256)}),
        f"entry '{MOMENT}exp_avg' must be F32 \\(256, 16\\), got F32 \\(16, 256\\)",
    ),
    "tensor empty": (
        lambda t, h: t.update({MOMENT + "exp_avg": torch.zeros(2**40, 0)}),
        f"entry '{MOMENT}exp_avg' must be F32",
    ),
    "NaN": (lambda t, h: t[NAME].fill_(float("nan")), f"entry '{NAME}' holds NaN or infinity"),
    "infinity": (lambda t, h: t[MOMENT + "exp_avg"].fill_(float("-inf")), f"entry '{MOMENT}exp_avg' holds NaN or inf"),
    "moment": (lambda t, h: t[MOMENT + "exp_avg_sq"].fill_(-1), f"entry '{MOMENT}exp_avg_sq' holds -1, less than 0"),
    "moment's step": (lambda t, h: t[MOMENT + "step"].fill_(-1), f"entry '{MOMENT}step' holds -1, less than 1"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_refused_by_its_entry(folder: Path, forgery: str) -> None:
    """Though its checksum is right. Nothing is made of what it asks for, so this takes no time either."""
    change, message = FORGERIES[forgery]
    forge(folder, change)
    begin = time.monotonic()
    with pytest.raises(InputError, match=f"^{folder / FILE}: {message}") as refusal:
        checkpoint.load(folder)
    assert "\n" not in str(refusal.value) and time.monotonic() - begin < 5


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(-2, 9), max_size=3)
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from(["model", "train", "digest", "step", "more"]), st.text(max_size=9), max_size=2
    ),
    model=st.dictionaries(st.sampled_from(["mixer", "dim", "layers", "slots", "resolutions", "more"]), ODD, max_size=2),
    train=st.dictionaries(st.sampled_from([*TrainConfig.__dataclass_fields__, "more"]), ODD, max_size=2),
    tensors=st.dictionaries(
        st.sampled_from([NAME, "model.norm.weight", MOMENT + "step", MOMENT + "exp_avg_sq", "more", ""]),
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
            st.lists(st.integers(0, 16), max_size=3),
            st.floats(),
        ),
        max_size=2,
    ),
)
def test_any_forgery_is_refused_in_one_line_or_a_model(folder: Path, header, model, train, tensors) -> None:
    def change(known: dict[str, Any], others: dict[str, str]) -> None:
        entry("model", **model)(known, others)
        entry("train", **train)(known, others)
        others.update(header)
        for name, (dtype, shape, value) in tensors.items():
            known[name] = torch.full(shape, value, dtype=torch.float64).to(dtype)

    whole = (folder / FILE).read_bytes()
    forge(folder, change)
    try:
        saved = checkpoint.load(folder)
    except InputError as error:
        assert str(error).startswith(f"{folder / FILE}: ") and "\n" not in str(error)
    else:
        restored = LanguageModel(saved.model_config)
        saved.restore(restored, torch.optim.AdamW(restored.parameters()))
    finally:
        (folder / FILE).write_bytes(whole)


def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def safe_open(*_: object, **__: object) -> None:
        raise PermissionError("Permission denied (os error 13)")  # as safetensors does, without number and name

    monkeypatch.setattr(checkpoint, "safe_open", safe_open)
    with pytest.raises(InputError, match=f"^{folder / FILE}: cannot be read .Permission denied"):
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
from blurry_attn.files import claimed
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
with claimed(folder, checkpoint.FILE):
    write(last + 1)
print(last, unfinished, len(list(folder.iterdir())))
"""


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written, unfinished, files = map(int, done.stdout.split())
    assert written >= 10  # kills came between writes,
    assert unfinished >= 5  # and in the midst of one,
    assert files == 1  # and the next claim clears what that left.


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_partial_file_is_new_and_of_a_name_that_none_foresees(tmp_path: Path) -> None:
    """Links of the names of earlier ones lead nowhere."""
    path, victim, names = tmp_path / "run" / "numbers.json", tmp_path / "victim", set()
    path.parent.mkdir()
    victim.write_text("precious")

    def write(partial: Path) -> None:
        assert partial.read_bytes() == b"" and not partial.is_symlink() and partial.suffix == path.suffix
        names.add(partial.name)
        partial.write_text("new")

    for _ in range(3):
        write_whole(path, write)
        for name in names:
            path.with_name(name).unlink(missing_ok=True)
            path.with_name(name).symlink_to(victim)
    assert len(names) == 3 and victim.read_text() == "precious" and path.read_text() == "new" and not path.is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_whole_file_has_the_permissions_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "whole", lambda path: path.write_text("x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "whole").stat().st_mode) == 0o666 & ~umask


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path, errors = tmp_path / "numbers", []

    def write(letter: bytes) -> None:
        try:
            for _ in range(30):
                write_whole(path, lambda partial: partial.write_bytes(letter * 300_000))
                content = path.read_bytes()
                assert content == content[:1] * 300_000
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"A", b"B")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [28, 27, 122])
def test_an_error_without_a_path_gets_one(error: int, tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        raise OSError(error, os.strerror(error))

    for write in (fail, lambda partial: partial.mkdir()):
        with pytest.raises(OSError) as told:
            write_whole(tmp_path / "numbers", write)
        assert told.value.filename == str(tmp_path / "numbers")
    assert not list(tmp_path.iterdir())


@contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """A process that does ``work``, and is killed at the end."""
    number = os.fork()
    if number == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield number
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_claim_is_of_one_process_and_ends_with_it(tmp_path: Path) -> None:
    """What it left goes with the next claim; folders that it made go where they are empty."""
    folder = tmp_path / "some" / "run"

    def claim() -> None:
        with claimed(folder, "metrics", "checkpoint"):
            write_whole(folder / "checkpoint", lambda path: time.sleep(600))

    with child(claim):
        wait_for(folder)
        while not list(folder.glob("*partial*")):
            time.sleep(0.001)
        with pytest.raises(BlockingIOError) as refusal, claimed(folder, "metrics"):
            pass
        assert refusal.value.filename == str(folder)
        with claimed(folder, "other"):
            pass
        assert list(folder.glob("*partial*"))
    with claimed(folder, "metrics", "checkpoint"):
        assert [file.name for file in folder.iterdir()] == [".metrics.lock"]
    assert folder.exists()
    folder.rmdir()
    folder.parent.rmdir()
    with claimed(folder, "metrics"):
        pass
    assert not list(tmp_path.iterdir())


def test_claims_that_come_and_go_are_never_of_two(tmp_path: Path) -> None:
    """Lock file and folder are made and removed all the time: none holds a lock on a file that is gone."""
    folder, mark = tmp_path / "run", tmp_path / "mark"

    def claim() -> int:
        held = 0
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            try:
                with claimed(folder, "metrics"):
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                    held += 1
                    mark.unlink()
            except BlockingIOError:
                pass
        return held

    children = []
    for _ in range(3):
        number = os.fork()
        if number == 0:
            try:
                os._exit(0 if claim() else 2)
            except BaseException:
                os._exit(1)
        children.append(number)
    assert [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children] == [0, 0, 0]
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_lock_that_goes_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a claim that ends in between: what is locked then is no file of the folder."""
    lock, ends = tmp_path / ".metrics.lock", iter([lambda: lock.unlink(), lambda: None, lambda: None])
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (next(ends)(), flock(*arguments)))
    with claimed(tmp_path, "metrics"):
        assert lock.exists()
        with pytest.raises(BlockingIOError), claimed(tmp_path, "metrics"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=f"^{tmp_path}: cannot be locked"), claimed(tmp_path, "metrics"):
        write_whole(tmp_path / "metrics", lambda path: path.write_text("x"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics"]


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / ".metrics.lock").symlink_to(victim)
    with pytest.raises(OSError), claimed(tmp_path, "metrics"):
        pass
    assert not victim.exists()
