"""The benchmarks run, compare like with like, and report what they could not measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
from benchmarks.speed import report
from benchmarks.speed.__main__ import measure
from benchmarks.speed.cases import MODES, SUITES, Case, Ratio, Suite
from benchmarks.speed.meters.cpu import CpuMeter
from benchmarks.speed.providers import PROVIDERS, Provider

ROOT = Path(__file__).parents[1]


def test_speed_runs_on_a_tiny_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "date", "hardware", "versions", "time", "memory", "checks"} <= set(result)
    rows = {(row["provider"], row["mode"]): row for row in result["rows"]}
    assert set(rows) == {(name, mode) for name in SUITES["cpu"].providers for mode in MODES}
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
    suite = Suite(
        cases=(Case(length=64),),
        providers=("missing", "long"),
        checks=(Ratio("missing / slow", "missing", 64, "long", 64, 2.0),),
    )
    rows = measure(suite, CpuMeter(2), "cpu")
    checks = report.checks(rows, suite.checks)
    result = {"rows": rows, "checks": checks, "hardware": {}, "versions": {"torch": ""}, "date": ""}
    table = report.table(result)
    assert table.count("failed: a missing peer") == len(MODES)
    assert "ModuleNotFoundError: No module named 'peer'" in table
    assert table.count("too long") == len(MODES)
    assert table.count("not measured") == len(MODES)
    labels = {text.get_text() for text in report.plot(result).legends[0].get_texts()}
    assert labels == {"a missing peer: no result", "a slow peer: no result"}


@pytest.mark.parametrize(
    ("ratio", "above", "below", "value", "met"),
    [
        (Ratio("faster", "a", 8, "b", 8, 16.0), 32.0, 2.0, 16.0, True),
        (Ratio("faster", "a", 8, "b", 8, 16.0), 30.0, 2.0, 15.0, False),
        (Ratio("per token", "a", 64, "a", 8, 1.15, at_most=True, per_token=True), 8.8, 1.0, 1.1, True),
        (Ratio("per token", "a", 64, "a", 8, 1.15, at_most=True, per_token=True), 9.6, 1.0, 1.2, False),
    ],
)
def test_a_claim_is_held_against_its_bound(ratio: Ratio, above: float, below: float, value: float, met: bool) -> None:
    rows = [
        {"mode": mode, "provider": provider, "case": {"length": length}, "seconds": seconds}
        for mode in MODES
        for provider, length, seconds in (
            (ratio.provider, ratio.length, above),
            (ratio.over, ratio.over_length, below),
        )
    ]
    for check in report.checks(rows, [ratio]):
        assert check["value"] == pytest.approx(value)
        assert check["met"] is met
