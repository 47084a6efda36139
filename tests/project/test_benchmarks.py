"""The benchmarks run, compare like with like, and report what they could not measure."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
from benchmarks.decode import __main__ as decode_report
from benchmarks.decode import measure as decode
from benchmarks.drift import __main__ as drift
from benchmarks.guard import report as guard_report
from benchmarks.guard import rounds
from benchmarks.guard.__main__ import main as guard
from benchmarks.guard.cases import SUITES as GUARDED
from benchmarks.guard.cases import quick
from benchmarks.guard.side import Failed, Side
from benchmarks.guard.verdict import final, judge, median_interval
from benchmarks.lm import reading
from benchmarks.lm import report as text_report
from benchmarks.lm.__main__ import main as text_main
from benchmarks.lm.sweeps import SWEEPS
from benchmarks.mqar.__main__ import main as recall_main
from benchmarks.speed import __main__ as speed
from benchmarks.speed import report
from benchmarks.speed.__main__ import main, measure, merge, summarise
from benchmarks.speed.cases import FORWARD, MODES, QUICK, SUITES, Case, Claim, Group, Suite, one_call
from benchmarks.speed.meters.cpu import CpuMeter
from benchmarks.speed.providers import PROVIDERS, Provider
from benchmarks.sweep.command import Point, Runner, Sweep
from benchmarks.sweep.model import Mixer
from benchmarks.sweep.training import Member
from benchmarks.training import __main__ as training_report
from benchmarks.training import measure as training
from blurry_attn import BlurryWindow, blurry_window_attention, reference
from blurry_attn.files import claimed
from blurry_attn.lm.data import load_text
from blurry_attn.lm.model import LanguageModel, TokenCache, state_size
from blurry_attn.lm.parallel import Parallel
from blurry_attn.lm.train import validate

ROOT = Path(__file__).parents[2]


def test_speed_runs_on_a_tiny_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "date", "hardware", "versions", "time", "memory", "checks"} <= set(result)
    rows = {(row["provider"], row["mode"]): row for row in result["rows"]}
    assert set(rows) == {(name, mode) for names in QUICK["cpu"].plan().values() for name in names for mode in MODES}
    for row in rows.values():
        # The output is new memory, and with the backward three gradients besides; the system's count of resident
        # pages lags by up to 64 pages per thread.
        case, tensors = row["case"], 1 if row["mode"] == "forward" else 4
        tensor = 4 * case["batch"] * case["heads"] * case["length"] * case["head_dim"]
        assert tensors * tensor - 2**19 < row["peak_bytes"]
        assert row["seconds"] > 0 and row["seconds_per_token"] == row["seconds"] / case["length"]
    assert done.stdout.rstrip().endswith(report.table(result))


def test_the_local_window_is_a_sliding_window() -> None:
    case = Case(length=96, heads=2, head_dim=8, slots=16)
    query, key, value, _ = case.inputs("cpu")
    age = torch.arange(case.length).unsqueeze(1) - torch.arange(case.length)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=(age >= 0) & (age < case.slots))
    out = PROVIDERS["local"].prepare(case)(query, key, value)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="length must be a multiple of 16, got 97"):
        PROVIDERS["local"].prepare(Case(length=97, slots=16))


def test_what_was_not_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(case: Case):
        raise ModuleNotFoundError("No module named 'peer'")

    monkeypatch.setitem(PROVIDERS, "missing", Provider("missing", "a missing peer", prepare, lambda case: None))
    monkeypatch.setitem(PROVIDERS, "long", Provider("long", "a slow peer", prepare, lambda case: "too long"))
    case = Case(length=64)
    claim = Claim("missing / slow", ("missing", case), dict.fromkeys(MODES, (2.0, None)), over=("long", case))
    suite = Suite({"all": Group((case,), ("missing", "long"))}, (claim,))
    rows = measure(suite.plan(), suite, CpuMeter(2), "cpu", {})
    checks = report.checks(rows, suite.claims)
    result = {"rows": rows, "checks": checks, "hardware": {}, "versions": {"torch": ""}, "date": ""}
    table = report.table(result)
    assert table.count("failed: a missing peer") == len(MODES)
    assert "ModuleNotFoundError: No module named 'peer'" in table
    assert table.count("too long") == len(MODES)
    assert table.count("not measured") == len(MODES)
    labels = {text.get_text() for text in report.plot(result).legends[0].get_texts()}
    assert labels == {"a missing peer: no result", "a slow peer: no result"}


def rows_of(provider: str, case: Case, **quantities: float) -> list[dict]:
    row = {"provider": provider, "label": provider, "case": asdict(case), "date": "then"} | quantities
    return [row | {"mode": mode} for mode in PROVIDERS[provider].modes]


@pytest.mark.parametrize(
    ("quantity", "below", "bounds", "at_most", "above", "value", "met", "goal_met"),
    [
        ("seconds", 2.0, (16.0, None), False, 32.0, 16.0, True, None),
        ("seconds", 2.0, (16.0, 40.0), False, 30.0, 15.0, False, False),
        ("seconds", 2.0, (None, 14.0), False, 30.0, 15.0, None, True),
        ("seconds_per_token", 1.0, (1.15, 1.05), True, 1.1, 1.1, True, False),
        ("seconds", None, (0.3, 0.2), True, 0.00025, 0.25, True, False),
        ("peak_bytes", None, (0.7, 0.5), True, 2**29, 0.5, True, True),
    ],
)
def test_a_claim_is_held_against_its_bounds(quantity, below, bounds, at_most, above, value, met, goal_met) -> None:
    one, other = ("cudnn", Case(length=64)), ("fejer", Case(length=8))
    # The same providers at another size are no part of the claim.
    rows = [row for name, _ in (one, other) for row in rows_of(name, Case(length=64, batch=2), **{quantity: 1e9})]
    rows += rows_of(*one, **{quantity: above})
    rows += [] if below is None else rows_of(*other, **{quantity: below})
    over = None if below is None else other
    claim = Claim("", one, dict.fromkeys(MODES, bounds), over, quantity, at_most)
    results = report.checks(rows, [claim])
    assert [check["mode"] for check in results] == list(MODES)
    for check in results:
        assert check["value"] == pytest.approx(value)
        assert (check["met"], check["goal_met"]) == (met, goal_met)


@pytest.mark.parametrize("suite", [*SUITES.values(), *QUICK.values()])
def test_a_suite_names_what_there_is(suite: Suite) -> None:
    plan = suite.plan()
    for case, names in plan.items():
        assert set(names) <= set(PROVIDERS)
        for name in names:
            assert "{" not in PROVIDERS[name].label.format(**asdict(case))
    for claim in suite.claims:
        for name, case in filter(None, (claim.of, claim.over)):
            assert name in plan[case] and PROVIDERS[name].skip(case) is None
            assert set(claim.bounds) <= set(PROVIDERS[name].modes)


def test_a_plan_is_what_was_selected() -> None:
    suite = SUITES["cuda"]
    assert suite.plan(["main"], ["gsa", "fejer"]) == {suite.groups["main"].cases[0]: ("fejer", "gsa")}
    assert {case.length for case in suite.plan(["sweep"], None, [2048, 8192])} == {2048, 8192}
    # The long case is one of the sweep: it is run once, on the providers of both.
    assert suite.plan()[suite.groups["long"].cases[0]].count("fejer") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "mian"], "unknown cases 'mian'; known: main, "),
        (["--providers", "fejer,cudn"], "unknown provider 'cudn'; known: "),
        (["--lengths", "8191"], "unknown length 8191; known: 1, 2048, "),
        (["--cases", "main", "--lengths", "2048"], "none of these cases"),
        (["--merge", "--out", "nowhere"], "no other result was given"),
        *([] if torch.cuda.is_available() else [(["--cases", "main"], "no CUDA device is available")]),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refusal:
        main(["--device", "cuda", "--out", str(tmp_path), *arguments])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


CEILINGS = {"copy_bytes_per_second": 4e12, "product_flops_per_second": 8e14}


def gpu_result(date: str, providers: list[str] | None = None, *, seconds: float) -> dict:
    """A result as a GPU gives it, in which all that is not skipped takes so many seconds."""
    rows = []
    for case, names in SUITES["cuda"].plan(providers=providers).items():
        for name in names:
            samples = [{"seconds": seconds * factor, "host_seconds": 1e-5} for factor in (1, 1, 3)]
            reason = PROVIDERS[name].skip(case)
            fields = {"skipped": reason} if reason else {"samples": samples, "peak_bytes": 2**30}
            rows += rows_of(name, case, **fields | {"date": date})
    for row in rows:
        summarise(row, CEILINGS)
    hardware, versions = {"gpu": "a GPU", "driver": "driver 1"}, {"torch": "2"}
    return {"hardware": hardware, "versions": versions, "date": date, "ceilings": CEILINGS, "rows": rows}


def test_pieces_of_a_result_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(gpu_result("monday", seconds=1e-3)))
    second.write_text(json.dumps(gpu_result("tuesday", ["fejer"], seconds=1e-4)))
    assert main(["--device", "cuda", "--out", str(tmp_path), "--merge", str(first), str(second)]) == 0
    result = json.loads((tmp_path / "cuda.json").read_text())
    assert len(result["rows"]) == len(gpu_result("", seconds=1.0)["rows"])
    for row in result["rows"]:
        is_new = row["provider"] == "fejer"
        assert row["date"] == ("tuesday" if is_new else "monday")
        assert row.get("seconds", 1e-4 if is_new else 1e-3) == (1e-4 if is_new else 1e-3)
    main_ratio = next(check for check in result["checks"] if check["check"] == "main: cuDNN / fejer")
    assert main_ratio["value"] == pytest.approx(10.0) and main_ratio["met"]
    assert (tmp_path / "cuda.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(report.table(result))
    assert printed.count("  tuesday\n") == len(SUITES["cuda"].plan(providers=["fejer"]))
    # What is in the folder stays, and nothing but the selected rows of a later result is replaced.
    assert merge(result, {}, SUITES["cuda"]) == result


def test_a_gpu_row_is_set_against_floor_and_arithmetic() -> None:
    case = SUITES["cuda"].groups["main"].cases[0]
    rows = {
        (row["provider"], row["mode"]): row
        for row in gpu_result("", seconds=1e-3)["rows"]
        if row["case"] == asdict(case)
    }
    tensor, product = 2 * 8 * 16 * 8192 * 64, 2 * 8 * 16 * 8192 * 64
    for mode, tensors, products in zip(MODES, (4, 12), (2, 7), strict=True):
        row = rows["fejer", mode]
        assert row["floor_seconds"] == pytest.approx(tensors * tensor / 4e12)
        assert row["times_floor"] == pytest.approx(1e-3 / row["floor_seconds"])
        assert row["bytes_per_second"] == pytest.approx(tensors * tensor / 1e-3)
        assert row["flops_per_second"] == pytest.approx(products * product * 64 / 1e-3)
        assert "flops_per_second" not in rows["gsa", mode]
    state = PROVIDERS["step"].fewest_bytes(Case(length=1, batch=256, heads=16, dtype="bfloat16"), FORWARD)
    assert state == 256 * 16 * 64 * (64 + 64) * 4


@pytest.mark.parametrize(("provider", "window"), [("cudnn", 10**9), ("flex64", 64), ("flex512", 512)])
@pytest.mark.parametrize("length", [40, 700])
def test_keys_are_counted_as_the_mask_lets_them_through(provider: str, window: int, length: int) -> None:
    age = torch.arange(length).unsqueeze(1) - torch.arange(length)
    seen = ((age >= 0) & (age < window)).sum(1).double().mean()
    assert PROVIDERS[provider].keys(Case(length=length)) == pytest.approx(seen.item())


def test_a_pyramid_covers_all_heads() -> None:
    case = Case(length=600, heads=16, head_dim=8, slots=32)
    query, key, value, _ = case.inputs("cpu")
    out = PROVIDERS["pyramid"].prepare(case)(query, key, value)
    window = BlurryWindow.pyramid(32, (1, 1, 2, 2, 4, 4, 8, 8) * 2)
    torch.testing.assert_close(out, reference.blurry_window_attention(query, key, value, window))


def test_decode_runs_on_a_tiny_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.decode", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "date", "hardware", "versions", "setup", "parameters", "time", "memory"} <= set(result)
    setup = decode.quick(decode.SETUPS["cpu"])
    assert [(row["history"], row["mixer"]) for row in result["rows"]] == [
        (history, mixer) for history in setup.histories for mixer in decode.MIXERS
    ]
    assert all(row["seconds"]["generate"] > 0 and row["samples"]["generate"] >= 5 for row in result["rows"])
    assert done.stdout.rstrip().endswith(decode_report.table(result))


@torch.no_grad()
def test_decode_compares_the_models_that_it_names() -> None:
    """Both step as the language model itself does, from the same weights, and the bytes are those of the tensors."""
    setup = decode.quick(decode.SETUPS["cpu"])
    tokens = torch.randint(256, (3, 2), generator=torch.Generator().manual_seed(0))
    full, blurry = (decode.make_model(mixer, setup, "cpu") for mixer in ("full", "blurry"))

    caches = decode.make_states(full, 3, 5000, room=2)
    assert all(cache.value[:, :, :5000].std(2).min() > 0.5 for cache in caches)
    plain = LanguageModel(full.config)
    plain.load_state_dict(blurry.state_dict())
    copies = [TokenCache(cache.key[:, :, :5000], cache.value[:, :, :5000], 5000) for cache in caches]
    assert state_size(copies)[1] == decode.state_bytes("full", setup, 3, 5000)
    for token in tokens.split(1, 1):
        torch.testing.assert_close(full.step(token, caches), plain.step(token, copies))

    states = decode.make_states(blurry, 3, 5000, room=2)
    assert state_size(states)[1] == decode.state_bytes("blurry", setup, 3, 5000)
    seconds = decode.decode(blurry, states, 3, setup)
    assert states[0].position.tolist() == [5000 + decode.WARM_UP + len(seconds["generate"])] * 3


def test_decode_names_what_does_not_fit() -> None:
    rows = [
        {"mixer": mixer, "batch": batch, "history": history, "state_bytes": history}
        | ({"skipped": "does not fit"} if history > 9999 and mixer == "full" else {"peak_bytes": 1, "seconds": ways})
        for batch in (1, 16)
        for history in (1024, 131072)
        for mixer, ways in (("blurry", {"generate": 2e-3, "graph": 1e-3}), ("full", {"generate": 4e-3, "graph": 2e-3}))
    ]
    setup = asdict(decode.SETUPS["cuda"])
    result = {"rows": rows, "setup": setup, "parameters": 1, "hardware": {}, "versions": {"torch": ""}, "date": ""}
    lines = decode_report.table(result).splitlines()
    assert lines[-1].split()[:7] == ["16", "131072", "2.000", "8000", "1.000", "16000", "0.1"]
    assert lines[-1].endswith("0.1  does not fit")
    speeds, memory = decode_report.plot(result).axes[:2], decode_report.plot(result).axes[2]
    assert [len(line.get_xdata()) for axes in speeds for line in axes.lines] == [2, 2, 1, 1] * 2
    assert [line.get_xdata().tolist() for line in memory.lines] == [[1024, 131072]] * 2


def test_training_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def prepare(case: Case):
        raise ModuleNotFoundError("No module named 'peer'")

    missing = Provider("missing", "a missing peer", prepare)
    monkeypatch.setattr(training, "MIXERS", (*training.MIXERS, missing))
    assert training_report.main(["--device", "cpu", "--quick", "--steps", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert {"command", "date", "hardware", "versions", "setup", "parameters", "time", "memory"} <= set(result)
    rows = {row["provider"]: row for row in result["rows"]}
    assert list(rows) == ["blurry", "fejer", "flash", "cudnn", "flex64", "missing"]
    for name in ("blurry", "fejer", "flash"):
        row = rows[name]
        assert row["steps"] == 2 and 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(2 * 128 / row["seconds"])
        assert row["times_full"] == pytest.approx(row["tokens_per_second"] / rows["flash"]["tokens_per_second"])
    table = training_report.table(result)
    assert table.count("skipped: runs on CUDA alone") == 2
    assert "failed: ModuleNotFoundError: No module named 'peer'" in table
    assert capsys.readouterr().out.rstrip().endswith(table)


@torch.no_grad()
def test_training_compares_the_models_that_it_names() -> None:
    """Attention apart, it is the language model itself; and that of the claims has 100 million parameters."""
    tokens = torch.randint(256, (2, 300), generator=torch.Generator().manual_seed(0))
    blurry = LanguageModel(training.QUICK.model)
    full = LanguageModel(replace(blurry.config, mixer="full"))
    full.load_state_dict(blurry.state_dict())
    mixers = {mixer.name: mixer.prepare(training.QUICK.case) for mixer in training.MIXERS if mixer.name != "flex64"}
    for name, model in (("blurry", blurry), ("flash", full)):
        torch.testing.assert_close(training.Mixed(blurry, mixers[name])(tokens), model(tokens))
    with torch.device("meta"):
        assert sum(p.numel() for p in LanguageModel(training.WHOLE.model).parameters()) == pytest.approx(1e8, rel=0.01)


@pytest.mark.parametrize(
    ("flash", "flex64", "said"),
    [
        (0.16, 0.09, ["1.60x  must be >= 1.5x  met", "0.90x                                    goal >= 1x  NOT met"]),
        (0.14, 0.11, ["1.40x  must be >= 1.5x  NOT met", "1.10x                                    goal >= 1x  met"]),
        (None, None, ["not measured  must be >= 1.5x", "not measured                                    goal >= 1x"]),
    ],
)
def test_training_is_held_against_full_attention(flash, flex64, said) -> None:
    """Tokens per second of blurry window attention, at a tenth of a second, over those of its peers."""
    setup = training.WHOLE
    case, rows = asdict(setup.case), []
    for name, seconds in (("blurry", 0.1), ("flash", flash), ("flex64", flex64)):
        row = {"provider": name, "label": name, "mode": training.MODE, "case": case}
        rows.append(row | ({"seconds": seconds} if seconds else {"failed": "no room"}))
    result = {"rows": rows, "checks": report.checks(rows, setup.claims), "setup": asdict(setup), "parameters": 1}
    lines = training_report.table(result | {"hardware": "", "versions": {"torch": ""}, "date": ""}).splitlines()
    assert [line.split("training step")[1].strip() for line in lines[-2:]] == said
    assert sum(line.endswith("failed: no room") for line in lines) == (0 if flash else 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--steps", "0"], "--steps must be at least 1, got 0"),
        *([] if torch.cuda.is_available() else [([], "no CUDA device is available")]),
    ],
)
def test_training_that_cannot_be_run_is_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as refusal:
        training_report.main(arguments)
    assert refusal.value.code == 2 and message in capsys.readouterr().err


def test_drift_is_that_of_the_law() -> None:
    """Its float64 state is the operator's; slots that are rounded once cost less than rounding the output."""
    window, heads = BlurryWindow.pyramid(4, (1, 2, 8)), 3
    tokens = torch.randn(100, heads, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slots, tables = torch.zeros(heads, 4, 10, dtype=torch.float64), drift.shares(window, heads)
    for t, token in enumerate(tokens):
        slots = drift.write(slots, token, drift.share_at(tables, t))
    key, value = tokens.movedim(0, 1).unsqueeze(0).chunk(2, -1)
    _, state = blurry_window_attention(key, key, value, window, return_state=True)
    torch.testing.assert_close(slots.unsqueeze(0), torch.cat((state.key, state.value), -1), rtol=1e-12, atol=1e-12)
    errors = {row["state"]: row["errors"] for row in drift.measure([400], window, heads)}
    full, in_flux, always, turns, output = errors.values()
    for head in range(heads):
        assert full[head] < 1e-6
        assert in_flux[head] <= always[head] and max(in_flux[head], turns[head]) < output[head]


MAINS = {"speed": main, "training": training_report.main, "decode": decode_report.main, "drift": drift.main}
MAINS |= {"lm": text_main, "mqar": recall_main}


@pytest.mark.parametrize("name", MAINS)
def test_results_that_cannot_be_written_are_told_first(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Before anything is measured or trained; also where another process keeps the result file to itself."""
    out, file = tmp_path / "results", "drift.json" if name == "drift" else "cpu.json"
    options = ["--quick"] if name in ("speed", "training", "decode", "drift") else []
    options += [] if name == "drift" else ["--device", "cpu"]
    for module in (speed, training_report, drift):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(decode_report, "measure_all", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("something was trained"))
    out.touch()
    with pytest.raises(SystemExit) as refusal:
        MAINS[name]([*options, "--out", str(out)])
    assert refusal.value.code == 2 and f"--out {out}: results cannot be written there (" in capsys.readouterr().err
    out.unlink()
    with claimed(out, file + ("l" if name in ("lm", "mqar") else "")), pytest.raises(SystemExit):
        MAINS[name]([*options, "--out", str(out)])
    assert "(another process is writing there)" in capsys.readouterr().err and not out.exists()


def test_a_model_is_switched_to_every_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention, and a sliding window as long as the context, change nothing at the switch."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.convert import __main__ as convert

    shape = {"dim": 32, "layers": 1, "context": convert.SLOTS, "batch": 2, "steps": 2, "tune-steps": 1, "device": "cpu"}
    options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(convert, "load_text", lambda *_: load_text(Path(__file__), 32))
    monkeypatch.setattr(sys, "argv", ["convert", *options, "--out", str(tmp_path)])
    convert.main()
    rows = {row["window"]: row for row in json.loads((tmp_path / "cpu.json").read_text())["rows"]}
    assert set(rows) == set(convert.WINDOWS)
    assert rows["sliding window"]["switched"] == pytest.approx(rows["full attention"]["switched"], rel=1e-5)
    assert rows["sliding window"]["tuned"] == pytest.approx(rows["full attention"]["tuned"], rel=1e-4)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def text_folder(folder: Path, line: str) -> Path:
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"{line} {number}. " * 40)
    return folder


def test_text_is_read_once_per_setting(tmp_path: Path, monkeypatch, capsys) -> None:
    mixers = Mixer("dirichlet", 4, (1, 4), 8), Mixer("sliding", 4, (1, 1), 8), Mixer("full", 24, (1, 1), 8)
    shapes, task = (reading.Decoder(mixer, 16, layers=1) for mixer in mixers), reading.Reading(24, 2, 4)
    points = tuple(Point(task, shape, reading.Schedule(3)) for shape in shapes)
    monkeypatch.setitem(SWEEPS, "quick", Sweep("tiny", points, (1e-2,), (0, 1)))
    plain, other = text_folder(tmp_path / "plain", "All is well"), text_folder(tmp_path / "other", "All is not")
    command = ["--device", "cpu", "--out", str(tmp_path), "--text"]
    assert text_main([*command, str(plain), "--seconds", "0"]) == 0
    assert "not done, the time is up" in capsys.readouterr().out and not (tmp_path / "cpu.jsonl").exists()

    assert text_main([*command, str(plain)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [(row["setting"]["shape"]["mixer"]["kind"], row["setting"]["seed"]) for row in rows] == [
        (mixer.kind, seed) for mixer in mixers for seed in (0, 1)
    ]
    size = sum(file.stat().st_size for file in plain.iterdir())
    for row in rows:
        assert row["task"] == "plain, 1 layers of 16" and row["tokens_per_second"] > 0
        assert row["state_elements"] == row["slots"] * 16 and [at for at, *_ in row["curve"]] == [1, 2, 3]
        parts = row["by_position"]
        assert sum((end - first) * bits for first, end, bits in parts) / 24 == pytest.approx(row["bits"], abs=1e-4)
        text = row["text"]
        assert text["name"] == "plain" and text["train_bytes"] + text["held_out_bytes"] == text["bytes"] == size
        assert text["sha256"] == row["setting"]["text"] == load_text(plain, 1).digest
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert text_report.table(rows) in capsys.readouterr().out

    assert text_main([*command, str(plain)]) == 0
    assert capsys.readouterr().out.count("already there") == 3
    assert text_main([*command, str(other), "--only", "sliding"]) == 0
    assert "already there" not in capsys.readouterr().out
    assert text_main([*command, str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


def test_text_is_judged_at_every_position() -> None:
    """A model has the window of its mixer, and its bits are those of the trainer's own validation."""
    mixer = Mixer("dirichlet", 4, (1, 4), 8)
    model = reading.Decoder(mixer, 16, layers=2).make(seed=0)
    assert [block.mixer.window for block in model.blocks] == [mixer.window] * 2
    inputs, targets = torch.randint(256, (2, 40, 24), generator=torch.Generator().manual_seed(0))
    bits = reading.bits_by_position(model, inputs, targets, torch.device("cpu"))
    mean = validate(model, inputs, targets, torch.device("cpu"), Parallel("ddp"))
    assert bits.shape == (24,) and bits.mean().item() == pytest.approx(mean, rel=1e-5)
    stretches = reading.by_stretch(torch.arange(24.0))
    assert stretches == [
        *((0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3), (4, 6, 4.5), (6, 8, 6.5), (8, 12, 9.5), (12, 16, 13.5)),
        (16, 24, 19.5),
    ]
    assert text_report.second_half({"by_position": stretches}) == pytest.approx((4 * 13.5 + 8 * 19.5) / 12)


def text_rows(kind: str, slots: int, *bits: float) -> list[dict]:
    mixer = Mixer(kind, slots, (4,) * 2 if kind == "fejer" else (1,) * 2, 8)
    point = Point(reading.Reading(), reading.Decoder(mixer, 16), reading.Schedule(9))
    row = {"task": "a text", "family": mixer.family, "slots": slots, "state_elements": 16 * slots, "heads": 2}
    row |= {"by_position": [[0, 1, 8.0], [1, 64, 2.0]], "tokens_per_second": 1000, "hardware": "", "date": ""}
    row |= {"versions": {"torch": ""}, "text": {"name": "a text", "bytes": 9, "held_out_bytes": 1, "sha256": "abc"}}
    return [row | {"bits": value, "setting": point.setting(Member(1e-3, n))} for n, value in enumerate(bits)]


def test_text_says_what_a_sliding_window_needs() -> None:
    rows = [
        *(*text_rows("fejer", 16, 1.5, 1.7), *text_rows("fejer", 8, 1.9), *text_rows("fejer", 32, 1.2)),
        *(*text_rows("sliding", 16, 1.8), *text_rows("sliding", 64, 1.4), *text_rows("full", 64, 1.1)),
    ]
    table = text_report.table(rows)
    assert "fejer of 8 slots, at 1.900 bits: <= 2.0 times the state" in table
    assert "fejer of 16 slots, at 1.600 bits: 2.0 times the state" in table
    assert "fejer of 32 slots, at 1.200 bits: > 2.0 times the state" in table
    above, below = text_report.plot(rows).axes
    assert {text.get_text() for text in above.texts} >= {"2.0 times the state"}
    assert len(above.get_legend().get_texts()) == len({row["family"] for row in rows})
    assert below.get_title() == "16 slots" and len(below.lines) == 3


@pytest.mark.parametrize("name", SWEEPS)
def test_text_points_differ_and_can_be_made(name: str) -> None:
    points = SWEEPS[name].points
    assert len({(point.family, point.shape.mixer.slots) for point in points}) == len(points)
    for point in points:
        with torch.device("meta"):
            assert len(point.shape.make(0).blocks) == point.shape.layers


# A package that is as slow, as hungry and as broken as it is told to be, where the guard looks for blurry_attn.
PRETENDED = """
import os, time
from types import SimpleNamespace
import torch
_C = SimpleNamespace(__file__=__file__, build_info=lambda: {"of": "{name}"})

class BlurryWindow:
    def __init__(self, slots, window, kernel="fejer"):
        self.kernel = kernel
    @classmethod
    def pyramid(cls, slots, resolutions):
        return cls(slots, None, "pyramid")

def blurry_window_attention(query, key, value, window, enable_gqa, cu_seqlens=None):
    start = time.perf_counter()
    if window.kernel == "pyramid":
        {pyramid}
    if query.shape != key.shape:
        {grouped}
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if cu_seqlens is not None:
        query + torch.zeros({packed})
    out = query + key + value
    while time.perf_counter() < start + (1e-3 * {dirichlet} if window.kernel == "dirichlet" else 1e-3):
        pass
    return out
"""
EQUAL = {"pyramid": "pass", "grouped": "pass", "packed": 1, "dirichlet": 1}


def pretended_package(folder: Path, **how: object) -> Path:
    package = folder / "blurry_attn"
    package.mkdir(parents=True)
    text = PRETENDED
    for name, value in (EQUAL | how | {"name": folder.name}).items():
        text = text.replace("{" + name + "}", str(value))
    (package / "__init__.py").write_text(text)
    return folder


def as_wheel(folder: Path) -> Path:
    files = {"blurry_attn/__init__.py": (folder / "blurry_attn" / "__init__.py").read_text()}
    info = f"{folder.name}-1.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {folder.name}\nVersion: 1\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder.with_name(f"{folder.name}-1-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def test_the_guard_lets_pass_what_is_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
    """Each side imports what it was given, though another package lies where the command is called from."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = as_wheel(pretended_package(tmp_path / "older"))
    after = pretended_package(tmp_path / "newer")
    out = tmp_path / "result.json"
    cases = ["--cases", "fejer-r8,dirichlet", "--quick", "--limit", "20"]
    assert guard([str(before), str(after), *cases, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [result[side]["build"] for side in ("before", "after")] == [{"of": "older"}, {"of": "newer"}]
    assert {"command", "date", "hardware", "versions", "time"} <= set(result)
    assert [(row["name"], row["mode"]) for row in result["rows"]] == [
        (name, mode) for name in ("fejer-r8", "dirichlet") for mode in MODES
    ]
    for row in result["rows"]:
        seconds, peak = row["quantities"]["seconds"], row["quantities"]["peak_bytes"]
        assert row["passed"] and seconds["rounds"] >= 6 and seconds["low"] <= seconds["ratio"] <= seconds["high"]
        assert seconds["before"] >= 1e-3 and peak["before"] == peak["after"] > 0
    assert capsys.readouterr().out.rstrip().endswith("\nwithin 20.0%")


def test_the_guard_names_what_got_worse(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(rounds, "RELAUNCH", 4)
    before = pretended_package(tmp_path / "before", grouped="raise NotImplementedError('no groups yet')")
    dies = "os.kill(os.getpid(), 9)"
    after = pretended_package(tmp_path / "after", dirichlet=1.05, pyramid=dies, packed="(3, *query.shape)")
    out = tmp_path / "result.json"
    cases = ["--cases", "dirichlet,pyramid,grouped,packed,fejer-r1", "--quick"]
    assert guard([str(before), str(after), *cases, "--out", str(out)]) == 1
    rows = {(row["name"], row["mode"]): row for row in json.loads(out.read_text())["rows"]}
    verdicts = {name: {rows[name, mode]["verdict"] for mode in MODES} for name, _ in rows}
    assert verdicts == {
        **{"fejer-r1": {"same"}, "dirichlet": {"slower"}, "packed": {"more memory"}},
        **{"grouped": {"new"}, "pyramid": {"failed"}},
    }
    assert rows["dirichlet", FORWARD]["quantities"]["seconds"]["ratio"] == pytest.approx(1.05, abs=0.01)
    printed = capsys.readouterr().out
    assert f"pyramid, {FORWARD}, after: the process ended with SIGKILL" in printed
    assert f"grouped, {FORWARD}, before: NotImplementedError: no groups yet" in printed
    bad = {("dirichlet", "slower"), ("packed", "more memory"), ("pyramid", "failed")}
    said = printed.splitlines()[-1]
    assert said.startswith("NOT within 3.0%: ")
    assert {tuple(part.split(" ", 1)) for part in said.partition(": ")[2].split("; ")} == {
        (name, f"{mode} ({verdict})") for name, verdict in bad for mode in MODES
    }


def test_the_guard_needs_torch_alone() -> None:
    """Not even the package beside it, which may not be built; its sides import what they are given."""
    missing = "import sys; sys.modules |= dict.fromkeys(['blurry_attn', 'matplotlib', 'numpy']); "
    code = missing + "import benchmarks.guard.__main__, benchmarks.guard.worker"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_guard_outlives_its_processes(tmp_path: Path) -> None:
    subject = "fejer", Case(length=64, heads=1), FORWARD
    with closing(Side(pretended_package(tmp_path / "package"), tmp_path, "cpu", 1)) as side:
        side.installation()
        os.killpg(side.process.pid, signal.SIGKILL)
        with pytest.raises(Failed, match=r"the process ended with status -9|Broken pipe"):
            side.ask("prepare", *subject)
        side.ask("prepare", *subject)
        assert [set(sample) for sample in side.ask("measure", 2)] == [{"seconds"}] * 2


def test_a_guard_that_compared_nothing_does_not_pass() -> None:
    rows = [{"name": "fejer", "mode": FORWARD, "passed": True, "verdict": verdict} for verdict in ("new", "same")]
    assert guard_report.status(rows) == 0 and guard_report.status(rows[:1]) == 2
    assert guard_report.conclusion(rows[:1], 0.03).startswith("nothing was compared")
    assert guard_report.status([*rows, rows[0] | {"passed": False, "verdict": "failed"}]) == 1


@pytest.mark.parametrize(("slower", "verdict"), [(0.95, {"same", "less"}), (1.0, {"same"}), (1.06, {"more"})])
def test_a_verdict_stands_above_the_noise(slower: float, verdict: set[str]) -> None:
    """Rounds are off by 3 %, one in ten by up to a factor of 7; as many are drawn as the verdict takes."""
    draw = random.Random(0)
    for _ in range(200):
        ratios: list[float] = []
        while len(ratios) < 40 and judge(ratios, 0.03) is None:
            far = math.exp(draw.uniform(-2, 2)) if draw.random() < 0.1 else 1.0
            ratios.append(slower * far * math.exp(draw.gauss(0, 0.03)))
        assert len(ratios) >= 6 and final(ratios, 0.03) in verdict


def test_the_bounds_of_a_median_hold_as_often_as_they_say() -> None:
    draw = random.Random(0)
    for size in (6, 20, 41):
        bounds = [median_interval([draw.expovariate(1) for _ in range(size)]) for _ in range(2000)]
        assert sum(low <= math.log(2) <= high for low, high in bounds) / 2000 > 0.94
    assert median_interval([1.0] * 5) == (-math.inf, math.inf)


def test_what_is_allocated_on_a_cpu_is_counted_to_the_byte() -> None:
    def call() -> None:
        kept = torch.empty(1000)
        torch.empty(2000)
        torch.empty(500) + kept[:500]

    assert CpuMeter(1).allocated(call) == 4 * (1000 + 2000)


@pytest.mark.parametrize("device", GUARDED)
def test_the_guard_has_cases_that_can_be_called(device: str) -> None:
    for name, (provider, case) in quick(GUARDED[device]).items():
        for mode in PROVIDERS[provider].modes:
            one_call(PROVIDERS[provider].on("cpu", case), mode, *case.inputs("cpu"))
        assert PROVIDERS[provider].label.format(**asdict(case)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.whl", "."], "missing.whl is neither a wheel nor a folder with the package blurry_attn"),
        (["tests", "."], "tests is neither a wheel nor a folder with the package blurry_attn"),
        (["broken-1-py3-none-any.whl", "."], "broken-1-py3-none-any.whl cannot be installed: "),
        (["liar", "liar"], "blurry_attn was imported from "),
        (["broken", "broken"], "broken: ImportError: it is broken"),
        ([".", ".", "--cases", "fejer-r8,fejr"], "--cases: no case is named 'fejr'; there are fejer-r1, "),
        ([".", ".", "--limit", "0"], "--limit must be between 0 and 100 percent, got 0"),
        ([".", ".", "--out", "tests"], "--out tests: the result cannot be written there (Is a directory)"),
        ([".", ".", "--out", "file/x"], "--out file/x: the result cannot be written there (File exists)"),
        ([".", ".", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        *([] if torch.cuda.is_available() else [([".", ".", "--device", "cuda"], "no CUDA device is available")]),
    ],
)
def test_a_guard_that_cannot_compare_says_so(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken-1-py3-none-any.whl").write_text("no archive")
    for name, text in (("broken", "raise ImportError('it is broken')"), ("liar", f"__file__ = {str(ROOT / 'x/y')!r}")):
        package = pretended_package(tmp_path / name) / "blurry_attn" / "__init__.py"
        package.write_text(f"{package.read_text()}\n{text}\n")
    with pytest.raises(SystemExit) as refusal:
        guard(arguments)
    assert refusal.value.code == 2 and message in capsys.readouterr().err
