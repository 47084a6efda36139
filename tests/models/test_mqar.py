"""Recall: the task is as defined, stacked models are as if alone, and results outlive whatever happens to a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from benchmarks.mqar.__main__ import main
from benchmarks.mqar.recall import Recall, draw
from benchmarks.mqar.sweeps import SWEEPS
from benchmarks.sweep import report, training
from benchmarks.sweep.command import Point, Runner, Sweep
from benchmarks.sweep.model import Mixer, Shape, Shifts, Stack, TiedLoss
from benchmarks.sweep.results import Results
from benchmarks.sweep.task import Batch
from benchmarks.sweep.training import Adam, CaptureFailed, Member, Recipe, Trainer, judge, train
from blurry_attn import reference

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Recall(length=24, pairs=3, vocabulary=32, batch=4, held_out=8)
MIXERS = (
    Mixer("fejer", 4, (4, 4), 8),
    Mixer("fejer", 4, (1, 3), 8, sharpness=8.0, scale=0.7),
    Mixer("dirichlet", 4, (4, 4), 8),
    Mixer("sliding", 4, (1, 1), 8),
    Mixer("sliding", 4, (1, 1), 8, scale=0.7),
    Mixer("full", 24, (1, 1), 8, scale=0.7),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The task.


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(256, 32, 8192), (64, 4, 40), (16, 4, 10)])
def test_an_example_is_as_defined(length: int, pairs: int, vocabulary: int) -> None:
    tokens, places, values = draw(200, length, pairs, vocabulary, generator(), CPU)
    keys = tokens[:, : 2 * pairs : 2]
    assert tokens.shape == (200, length) and tokens.min() >= 0 and tokens.max() < vocabulary
    assert keys.min() >= 1 and keys.max() <= vocabulary // 2 - 1
    assert values.min() >= vocabulary // 2 and values.max() <= vocabulary - 1
    torch.testing.assert_close(tokens[:, 1 : 2 * pairs : 2], values)  # a value follows its key
    torch.testing.assert_close(tokens.gather(1, places), keys)  # the key stands again where it is asked for
    for drawn in (keys, values, places):  # without replacement
        assert all(len(set(row)) == pairs for row in drawn.tolist())
    assert places.min() == 2 * pairs and places.max() <= length - 2 and not (places % 2).any()


def test_all_that_is_not_asked_for_is_random() -> None:
    tokens, places, _ = draw(2000, 24, 3, 32, generator(), CPU)
    free = torch.ones_like(tokens, dtype=torch.bool).scatter_(1, places, False)
    free[:, :6] = False
    counts = tokens[free].bincount(minlength=32)
    assert len(counts) == 32
    torch.testing.assert_close(counts / counts.sum(), torch.full((32,), 1 / 32), atol=0.004, rtol=0)


def test_keys_and_values_are_uniform_and_apart() -> None:
    tokens, _, values = draw(4000, 24, 3, 32, generator(), CPU)
    for place in range(3):
        for drawn, low, count in ((tokens[:, 2 * place], 1, 15), (values[:, place], 16, 16)):
            shares = (drawn - low).bincount(minlength=count) / len(drawn)
            torch.testing.assert_close(shares, torch.full((count,), 1 / count), atol=0.02, rtol=0)


def test_gaps_follow_the_power_law_without_replacement() -> None:
    examples, space = 40_000, 9
    _, places, _ = draw(examples, 24, 3, 32, generator(), CPU)
    gaps = (places - 6) // 2
    weights = torch.arange(1, space + 1, dtype=torch.float64) ** (0.01 - 1)
    shares = weights / weights.sum()
    first = gaps[:, 0].bincount(minlength=space) / examples
    torch.testing.assert_close(first.double(), shares, atol=0.01, rtol=0)
    # The second is drawn from what the first left.
    left = shares.expand(space, space).clone().fill_diagonal_(0)
    second = (shares.unsqueeze(1) * left / left.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close((gaps[:, 1].bincount(minlength=space) / examples).double(), second, atol=0.01, rtol=0)


def test_batches_are_the_same_for_the_same_seed_alone() -> None:
    data, again = TINY.data(CPU), TINY.data(CPU)
    for one, other in zip(data.held_out(), again.held_out(), strict=True):
        assert one.tokens.equal(other.tokens) and one.answers.equal(other.answers)
    assert sum(len(batch.tokens) for batch in data.held_out()) == TINY.held_out
    batch = data.draw(TINY.pairs, generator(1))
    assert batch.tokens.equal(data.draw(TINY.pairs, generator(1)).tokens)
    assert not batch.tokens.equal(data.draw(TINY.pairs, generator(2)).tokens)
    # Positions count through the whole batch.
    rows = batch.positions.view(TINY.batch, TINY.pairs) // TINY.length
    assert rows.equal(torch.arange(TINY.batch).unsqueeze(1).expand(-1, TINY.pairs))
    assert batch.weights.sum().item() == pytest.approx(1)


def test_a_curriculum_ends_with_all_pairs() -> None:
    data = replace(TINY, curriculum=(1, 2)).data(CPU)
    assert [data.variant(step, 9) for step in range(9)] == [1] * 3 + [2] * 3 + [3] * 3
    assert len(data.draw(1, generator()).answers) == TINY.batch
    assert {data.variant(step, 7) for step in range(7)} == {1, 2, 3}


# The models.


def alone(stack: Stack, model: int, tokens: Tensor) -> Tensor:
    """One model of a stack, written out: a depthwise convolution after each projection; logits (B, T, V)."""
    mixer, weights = stack.shape.mixer, {name: weight[model] for name, weight in stack.weights.items()}
    x = weights["embedding"][tokens]
    heads = (-1, mixer.heads, mixer.head_dim)
    for layer in range(stack.shape.layers):
        projected = F.rms_norm(x, x.shape[-1:], eps=1e-6) @ weights["project"][layer]
        kernel = weights["convolution"][layer].flip(0).T.unsqueeze(1)
        padded = F.pad(projected.mT, (len(kernel[0, 0]) - 1, 0))
        parts = F.conv1d(padded, kernel, groups=len(kernel)).mT.chunk(3, -1)
        query, key, value = (part.unflatten(-1, heads[1:]).transpose(1, 2) for part in parts)
        if mixer.kind in ("sliding", "full"):
            age = torch.arange(tokens.shape[1]).unsqueeze(1) - torch.arange(tokens.shape[1])
            seen = (age >= 0) & (age < mixer.slots)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=mixer.scale)
        else:
            mixed = reference.blurry_window_attention(query, key, value, mixer.window, scale=mixer.scale)
        x = x + mixed.transpose(1, 2).flatten(2) @ weights["out"][layer]
        if stack.shape.mlp:
            x = x + F.gelu(F.rms_norm(x, x.shape[-1:], eps=1e-6) @ weights["up"][layer]) @ weights["down"][layer]
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) @ weights["embedding"].T


@pytest.mark.parametrize("mlp", [0, 2])
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.family)
def test_a_model_of_a_stack_is_convolution_and_mixer(mixer: Mixer, mlp: int) -> None:
    stack = Stack(Shape(mixer, width=16, mlp=mlp), TINY.vocabulary, [0, 1], CPU, torch.float32)
    batch = TINY.data(CPU).draw(3, generator())
    loss = stack.loss(batch.tokens, batch.positions, batch.answers, batch.weights)
    gradients = torch.autograd.grad(loss.sum(), list(stack.weights.values()))
    for model in range(2):
        logits = alone(stack, model, batch.tokens).flatten(0, 1)[batch.positions]
        expected = F.cross_entropy(logits, batch.answers)
        torch.testing.assert_close(loss[model], expected, atol=1e-5, rtol=1e-5)
        assert stack.predict(batch.tokens, batch.positions)[model].equal(logits.argmax(-1))
        for one, other in zip(gradients, torch.autograd.grad(expected, list(stack.weights.values())), strict=True):
            torch.testing.assert_close(one[model], other[model], atol=2e-6, rtol=1e-3)
            assert one[model].any() and not other[1 - model].any()


@pytest.mark.parametrize("slots", [64, 65])
def test_a_sliding_window_is_one_whichever_operator_computes_it(slots: int) -> None:
    mixer = Mixer("sliding", slots, (1, 1), 8, scale=0.7)
    assert mixer.operator.startswith("blurry") == (slots == 64)
    query, key, value = torch.randn(3, 2, 2, 100, 8).unbind()
    age = torch.arange(100).unsqueeze(1) - torch.arange(100)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=(age >= 0) & (age < slots), scale=0.7)
    torch.testing.assert_close(mixer.attend(query, key, value), expected, atol=1e-5, rtol=1e-5)


def test_gradients_written_by_hand_are_right() -> None:
    x = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Shifts.apply(x, 4), (x,))
    assert torch.autograd.gradcheck(lambda x: Shifts.apply(x, 7), (x,))
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    vocabulary = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    answers, weights = torch.tensor([0, 5, 2, 2]), torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, v: TiedLoss.apply(h, v, answers, weights), (hidden, vocabulary))
    expected = (F.cross_entropy((hidden @ vocabulary.mT).mT, answers.expand(2, -1), reduction="none") * weights).sum(-1)
    torch.testing.assert_close(TiedLoss.apply(hidden, vocabulary, answers, weights), expected)


def test_adam_is_that_of_torch_with_a_rate_per_model() -> None:
    recipe, rates = Recipe(steps=6, warm_up=0.5, decay=0.1, clip=0.7), [1e-2, 3e-2]
    start = [torch.randn(2, 3, 4), torch.randn(2, 5)]
    stacked = [weight.clone() for weight in start]
    ours = Adam(stacked, rates, recipe)
    theirs = [[weight[model].clone().requires_grad_() for weight in start] for model in range(2)]
    peers = [
        torch.optim.AdamW(weights, lr=rate, betas=recipe.betas, weight_decay=recipe.decay)
        for weights, rate in zip(theirs, rates, strict=True)
    ]
    for step in range(recipe.steps):
        gradients = [torch.randn_like(weight) for weight in start]
        ours.step([gradient.clone() for gradient in gradients])
        # Warm-up over 3 steps, then a cosine to 0 at the end of the 6th.
        factor = min(1, (step + 1) / 3) * (1 + math.cos(math.pi * max(0, step + 1 - 3) / 3)) / 2
        for model, (weights, peer) in enumerate(zip(theirs, peers, strict=True)):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient[model].clone()
            torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
            peer.param_groups[0]["lr"] = rates[model] * factor
            peer.step()
            for mine, weight in zip(stacked, weights, strict=True):
                torch.testing.assert_close(mine[model], weight.detach(), atol=1e-6, rtol=1e-5)


def test_models_in_a_stack_train_as_if_alone() -> None:
    members = [Member(1e-2, 0), Member(3e-3, 0), Member(1e-2, 1)]
    shape, recipe, data = Shape(MIXERS[1], width=16), Recipe(steps=12), TINY.data(CPU)
    together = Trainer(data, shape, recipe, members, CPU)
    apart = [Trainer(data, shape, recipe, [member], CPU) for member in members]
    losses = []
    for _ in range(recipe.steps):
        losses.append(together.step())
        torch.testing.assert_close(losses[-1], torch.cat([one.step() for one in apart]), atol=1e-5, rtol=0)
    assert losses[0][0] == losses[0][1] != losses[0][2]  # one seed, one beginning
    assert len(set(losses[-1].tolist())) == 3
    assert together.accuracy() == [one.accuracy()[0] for one in apart]


def test_it_learns() -> None:
    task = Recall(length=16, pairs=4, vocabulary=64, batch=64, held_out=256)
    shape, recipe = Shape(Mixer("fejer", 8, (2,) * 4, 16), width=64), Recipe(steps=400, enough=0.98)
    (course,) = train(Trainer(task.data(CPU), shape, recipe, [Member(6e-3, 0)], CPU), title="")
    assert course.curve[0][1] < 0.5 and course.curve[-1][1] >= 0.98
    assert course.curve[-1][2] < course.curve[0][2] / 3


def test_what_is_right_is_counted() -> None:
    prediction = torch.tensor([[1, 2, 3], [1, 0, 0]])
    batch = Batch(torch.zeros(1, 4), torch.arange(3), torch.tensor([1, 2, 0]), torch.ones(3))
    assert judge(prediction, batch).tolist() == [[True, True, False], [True, False, True]]
    allowed = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    batch = replace(batch, allowed=allowed)
    assert judge(prediction, batch).tolist() == [[True, False, True], [True, True, False]]

    class Two:
        vocabulary = TINY.vocabulary

        def held_out(self) -> list[Batch]:
            return [replace(batch, weights=torch.tensor(w)) for w in ([1.0, 1.0, 0.0], [1.0, 1.0, 1.0])]

    trainer = Trainer(TINY.data(CPU), Shape(MIXERS[3], width=16), Recipe(1), [Member(1, 0), Member(1, 1)], CPU)
    trainer.data = Two()
    trainer.stack.predict = lambda tokens, positions: prediction
    assert trainer.accuracy() == pytest.approx([3 / 5, 4 / 5])


# Runs and their results.


def tiny_sweep(steps: int = 4, mixers: tuple[Mixer, ...] = (MIXERS[0], MIXERS[3])) -> Sweep:
    points = tuple(Point(TINY, Shape(mixer, width=16), Recipe(steps)) for mixer in mixers)
    return Sweep("tiny", points, (1e-2, 1e-3), (0, 1))


def run(file: Path, sweep: Sweep, deadline: float = math.inf) -> Results:
    results = Results(file)
    Runner(results, CPU, command="a command", eager=False, deadline=deadline).run(sweep)
    return results


def test_a_row_says_all_that_made_it(tmp_path: Path) -> None:
    rows = run(tmp_path / "cpu.jsonl", tiny_sweep()).rows
    assert [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()] == rows
    assert [(row["setting"]["rate"], row["setting"]["seed"]) for row in rows[:4]] == [
        *((1e-2, 0), (1e-2, 1), (1e-3, 0), (1e-3, 1))
    ]
    row = rows[0]
    assert row["setting"]["task"] | {"kind": "Recall", "length": 24, "pairs": 3, "batch": 4} == row["setting"]["task"]
    assert {"steps", "warm_up", "decay", "clip", "betas"} <= set(row["setting"]["recipe"])
    assert row["state_elements"] == 4 * (8 + 8) and row["state_bytes"] == {"float32": 256, "bfloat16": 128}
    assert row["operator"] == "blurry_window_attention" and row["dtype"] == "float32"
    assert row["parameters"] == 32 * 16 + 2 * (16 * 3 * 16 + 4 * 3 * 16 + 16 * 16)
    assert [point[0] for point in row["curve"]] == [1, 2, 3, 4] and row["accuracy"] == row["curve"][-1][1]
    assert row["best"]["accuracy"] == max(point[1] for point in row["curve"])
    assert {"hardware", "versions", "command", "date", "seconds", "heads", "task"} <= set(row)


def test_a_run_skips_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, sweep = tmp_path / "cpu.jsonl", tiny_sweep()
    run(file, replace(sweep, points=sweep.points[:1]))
    first = file.read_text()
    capsys.readouterr()
    run(file, sweep)
    assert "1/2 fejer, window 16, 2 heads of 8, 4 slots: already there" in capsys.readouterr().out
    assert file.read_text().startswith(first) and len(Results(file).rows) == 8
    # Another seed, and nothing but that; another number of steps is another setting.
    assert len(run(file, replace(sweep, seeds=(0, 2))).rows) == 12
    assert len(run(file, tiny_sweep(steps=5)).rows) == 20


def test_time_ends_a_run_without_half_a_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "cpu.jsonl"
    assert not run(file, tiny_sweep(), deadline=time.monotonic()).rows
    assert "not done, the time is up" in capsys.readouterr().out and not file.exists()
    # A stack that would end in time is trained.
    assert len(run(file, tiny_sweep(), deadline=time.monotonic() + 600).rows) == 8


def test_a_stack_stops_when_all_its_models_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter(([0.999, 0.5], [0.999, 0.995], [1.0, 1.0]))
    trainer = Trainer(TINY.data(CPU), Shape(MIXERS[3], width=16), Recipe(40), [Member(1e-3, 0), Member(1e-3, 1)], CPU)
    monkeypatch.setattr(trainer, "accuracy", lambda: next(accuracies))
    first, second = train(trainer, title="")
    assert [point[0] for point in first.curve] == [2, 4] and second.curve[-1][1] == 0.995


def test_a_failed_capture_is_named_and_done_without(tmp_path, monkeypatch, capsys) -> None:
    class Broken:
        def __init__(self, function, generator) -> None:
            pass

        def __call__(self) -> Tensor:
            raise CaptureFailed("operation not permitted when stream is capturing")

    monkeypatch.setattr(training, "Replay", Broken)
    results = Results(tmp_path / "cpu.jsonl")
    runner = Runner(results, CPU, command="", eager=False, deadline=math.inf)
    runner.capture = True
    runner.run(tiny_sweep())
    assert len(results.rows) == 8
    assert capsys.readouterr().out.count("runs without CUDA graphs, as a capture failed: operation not permitted") == 1


KILLED = """
import os, pathlib, sys
from blurry_attn import files
from benchmarks.sweep import results
store = results.Results(pathlib.Path(sys.argv[1]))
store.add([{"setting": {"seed": 0}, "text": "x" * 100000}])
moment = sys.argv[2]
if moment == "writing":
    files.os.fsync = lambda number: os.kill(os.getpid(), 9)
else:
    files.os.replace = lambda *paths: os.kill(os.getpid(), 9)
store.add([{"setting": {"seed": 1}, "text": "y" * 100000}])
"""


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_result_file_is_whole_after_a_kill(moment: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.jsonl"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(file), moment], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -9
    results = Results(file)
    assert [row["setting"] for row in results.rows] == [{"seed": 0}]
    results.add([{"setting": {"seed": 2}}])
    assert [row["setting"]["seed"] for row in Results(file).rows] == [0, 2]


# The report.


RECIPE = {"steps": 9}


def rows_of(kind: str, slots: int, accuracies: dict[float, tuple[float, ...]], heads: int = 4) -> list[report.Row]:
    mixer = Mixer(kind, slots, (8 if kind == "fejer" else 1,) * heads)
    shape = {"mixer": {"kind": kind, "slots": slots, "heads": heads}}
    rest = {"task": "a task", "family": mixer.family, "slots": slots, "heads": heads, "seconds": 1.0}
    rest |= {"state_elements": mixer.state_elements, "hardware": "a GPU", "versions": {"torch": "2"}, "date": "now"}
    return [
        {
            "setting": {"shape": shape, "recipe": RECIPE, "task": {}, "rate": rate, "seed": seed},
            "accuracy": accuracy,
            **rest,
        }
        for rate, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


ROWS = [
    *rows_of("sliding", 64, {1e-3: (0.5, 0.5)}),
    *rows_of("sliding", 128, {1e-3: (0.8, 0.8), 2e-3: (0.9, 0.6)}),
    *rows_of("sliding", 256, {1e-3: (1.0, 1.0)}),
    *rows_of("fejer", 16, {1e-3: (0.7, 0.9), 2e-3: (0.99,)}),
    *rows_of("fejer", 32, {1e-3: (1.0, 1.0)}),
]


def test_a_point_is_at_the_best_rate_of_the_mean() -> None:
    by_slots = {(point.kind, point.slots): point for point in report.points(ROWS)}
    assert by_slots["sliding", 128].rate == 1e-3 and by_slots["sliding", 128].mean == pytest.approx(0.8)
    # A rate that lacks a seed is not compared.
    assert by_slots["fejer", 16].scores == (0.7, 0.9)
    # Nor is what was trained for longer.
    longer = [row | {"setting": row["setting"] | {"recipe": {"steps": 99}}} for row in ROWS]
    assert len(report.points(ROWS + longer)) == 2 * len(report.points(ROWS))


def test_factors_are_interpolated_in_the_logarithm_of_the_state() -> None:
    (pair,) = report.comparable(report.points(ROWS))
    found = {factor.target: factor for factor in report.factors(*pair)}
    assert found[0.9].sliding.state == pytest.approx(64 * 128 * 2**0.5)
    assert found[0.9].blurry.state == pytest.approx(64 * 16 * 2**0.5)
    assert str(found[0.9]) == "8.0 times the state"
    assert found[0.99].sliding.state == pytest.approx(64 * 128 * 2**0.95)
    assert "sliding : fejer at 0.9, 4 heads, 9 steps: 8.0 times the state" in report.table(ROWS)


def test_factors_say_what_they_do_not_know() -> None:
    def text(*rows: list[report.Row]) -> list[str]:
        pairs = report.comparable(report.points([row for part in rows for row in part]))
        return [str(factor) for pair in pairs for factor in report.factors(*pair)]

    good, poor = {1e-3: (0.99,)}, {1e-3: (0.2,)}
    assert text(rows_of("fejer", 16, good), rows_of("sliding", 16, poor)) == ["not reached by sliding"] * 2
    fejer = rows_of("fejer", 16, good)
    assert text(fejer, rows_of("sliding", 16, poor), rows_of("sliding", 256, good))[1] == ">= 16.0 times the state"
    assert text(fejer, rows_of("sliding", 64, good))[0] == "both reach it with the least state measured"
    # Models with other heads are no peers, nor is what was trained for longer.
    assert text(fejer, rows_of("sliding", 64, good, heads=8)) == []
    longer = [row | {"setting": row["setting"] | {"recipe": {"steps": 99}}} for row in fejer]
    assert text(longer, rows_of("sliding", 64, good)) == []


def test_the_plot_shows_points_and_factors(tmp_path: Path) -> None:
    figure = report.plot(ROWS)
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} >= {"8.0 times the state"}
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {row["family"] for row in ROWS} | {"best fejer, 4 heads"}
    figure.savefig(tmp_path / "plot.png")
    two = [row | {"task": "another", "setting": row["setting"] | {"task": {"length": 1}}} for row in ROWS]
    assert len(report.plot([*ROWS, *two]).axes) == 2
    # What has no curve of sliding windows to be compared with is left to the table.
    assert len(report.plot([*ROWS, *rows_of("fejer", 16, {1e-3: (0.5,)}, heads=8)]).axes) == 1


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(SWEEPS, "quick", tiny_sweep())
    out = ["--device", "cpu", "--out", str(tmp_path)]
    assert main([*out, "--only", "sliding", "--rates", "1e-2", "--seeds", "3"]) == 0
    (row,) = Results(tmp_path / "cpu.jsonl").rows
    assert row["command"].startswith("python -m benchmarks.mqar --device cpu") and row["setting"]["seed"] == 3
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out
    assert main([*out, "--plot"]) == 0
    assert report.table([row]) in first and report.table([row]) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*out, "--only", "slidding"])
    assert "no point of quick has 'slidding' in its name" in capsys.readouterr().err


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_can_be_trained(name: str) -> None:
    sweep = SWEEPS[name]
    settings = [json.dumps(point.setting(Member(rate, 0))) for point in sweep.points for rate in sweep.rates]
    assert len(set(settings)) == len(settings)
    names = [(point.task.title, point.family, point.shape.mixer.slots) for point in sweep.points]
    assert len(set(names)) == len(names)  # else the report would take two settings for one
    for point in sweep.points:
        assert point.task.held_out % point.task.batch == 0
        if point.shape.mixer.operator == "blurry_window_attention":
            assert point.shape.mixer.window.windows(point.shape.mixer.heads)
