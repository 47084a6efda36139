"""What the documentation shows runs, what it links to exists, and no public name is left out."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import blurry_attn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_python_examples_run_as_shown(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    examples = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert examples
    names: dict[str, object] = {}
    for example in examples:
        if page == "README.md":  # each of its examples stands alone
            names = {}
        lines_before = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_before + example[1], page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            destination = page.parent / path if path else page
            assert destination.is_file(), f"{page.name} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", destination.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
                assert anchor in anchors, f"{page.name} links to {target}"


def test_the_reference_is_what_the_docstrings_say() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "docs" / "api.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def examples(module: object, path: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module, path) if test.examples]


@pytest.mark.parametrize("path", ["swap", "integrations.transformers"])
def test_examples_of_docstrings_run(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the names that they take for granted; all such examples but one that needs several processes."""
    names: dict[str, object] = {
        "blurry_attn": blurry_attn,
        "BlurryWindow": blurry_attn.BlurryWindow,
        "window": blurry_attn.BlurryWindow(4, 8),
        "model": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        "x": torch.zeros(1, 2, 5, 16),
    }
    if path != "swap":
        transformers = pytest.importorskip("transformers")
        for registry in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            others = {name: x for name, x in registry._global_mapping.items() if name != "blurry_window"}
            monkeypatch.setattr(registry, "_global_mapping", others)  # the pages' examples took the name
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=16, eos_token_id=None, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
        names |= {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "name": tmp_path}
        names |= {"prompt": {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}}
    module = importlib.import_module(f"blurry_attn.{path}")
    found = examples(module, path)
    assert found
    for test in found:
        scope = {**vars(module), **names}
        for example in test.examples:
            exec(compile(example.source, test.name, "exec"), scope)


def test_usage_shows_every_public_name() -> None:
    usage = (ROOT / "docs" / "usage.md").read_text()
    assert [name for name in blurry_attn.__all__ if name not in usage] == []


def test_readme_names_make_targets_that_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands and set(commands) <= set(targets)


# The numbers of tables are those of the results that lie in the repository.


MQAR, LM = "mqar/results/cuda.jsonl", "lm/results/compare.json"


def result(path: str) -> Any:
    text = (ROOT / "benchmarks" / path).read_text()
    return [json.loads(line) for line in text.splitlines()] if path.endswith("l") else json.loads(text)


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Cells of the rows of each Markdown table, without titles and emphasis."""
    found = re.findall(r"^\|.*\n\|[ :|-]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[[cell.strip(" *") for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]


def share(x: float) -> str:
    return f"{x:.3f}".removeprefix("0")


def error(x: float) -> str:
    return "0" if x == 0 else f"{x:.1e}".replace("e-0", "e-")


def drift_rows(shown: list[list[str]]) -> list[list[str]]:
    """The states and marks that are shown; r = 1 and r = 2 share a column, the larger error of the two."""
    states = {
        "float32": "float32",
        "bfloat16, the two slots in flux in float32 rows beside it": "bfloat16, slots in flux in float32",
        "bfloat16, rounded at every token": "bfloat16",
        "float32, kept in bfloat16 between turns of 128 tokens": "bfloat16 between turns of 128",
        "the output itself rounded to bfloat16": "output in bfloat16",
    }
    measured = {(row["state"], row["tokens"]): row["errors"] for row in result("drift/results/drift.json")["rows"]}
    rows, state = [], ""
    for label, tokens, *_ in shown:
        state = states[label] if label else state
        sharp, every_second, *others = measured[state, int(tokens.replace(",", "") or 100_000)]
        rows.append([label, tokens, *map(error, (max(sharp, every_second), *others))])
    return rows


def language_rows(shown: list[list[str]]) -> list[list[str]]:
    runs = result(LM)["runs"]
    labels = [label for label, *_ in shown]
    assert [label.split()[0].rstrip(",") for label in labels] == list(runs)
    return [
        [label, f"{run['validation'][-1][1]:.3f}", f"{round(run['tokens_per_second'], -3):,.0f}"]
        for label, run in zip(labels, runs.values(), strict=True)
    ]


def switch_rows(shown: list[list[str]]) -> list[list[str]]:
    names = [label for label, *_ in shown]
    rows = result("convert/results/cpu.json")["rows"]
    assert [name.removesuffix(", all heads") for name in names] == [row["window"] for row in rows]
    return [[name, f"{row['switched']:.3f}", f"{row['tuned']:.3f}"] for name, row in zip(names, rows, strict=True)]


def context_rows(_: list[list[str]]) -> list[list[str]]:
    """Forward and backward, by numbers of ranks."""
    mebi = 2**20
    return [
        [
            f"{row['tokens']:,}",
            ranks,
            f"{row['blurry'][1] / mebi:.1f} MiB",
            f"{row['ring'][1] / mebi:,.0f} MiB",
            f"{row['ring'][1] / row['blurry'][1]:,.0f}",
        ]
        for ranks, rows in result("context/results/context.json").items()
        for row in rows
    ]


def recall_by_slots() -> dict[tuple[str, int], str]:
    from benchmarks.sweep.report import points

    heads = ", 4 heads of 32"
    rows = [row for row in result(MQAR) if row["task"] == "32 pairs in 256 tokens" and row["family"].endswith(heads)]
    return {(p.family.removesuffix(heads), p.slots): share(p.mean) for p in points(rows)}


def which_rows(shown: list[list[str]]) -> list[list[str]]:
    recall = recall_by_slots()
    text = {name: f"{run['validation'][-1][1]:.3f}" for name, run in result(LM)["runs"].items()}
    rows = [[f"sliding window of {n} tokens", str(n), recall["sliding", n], ""] for n in (32, 64, 128, 256)]
    rows[0][3] = text["sliding"]
    rows += [['`"fejer"`, every head r = 8', "32", recall["fejer, window 256", 32], ""]]
    rows += [['`"fejer"`, pyramid r = 1, 1, 2, 2, 4, 4, 8, 8', "32", "", text["blurry"]]]
    return [*rows, ["full attention", "all", recall["full", 256], text["full"]]]


def speed_rows(shown: list[list[str]]) -> list[list[str]]:
    found: dict[tuple[str, str], dict[str, Any]] = {
        (row["label"], row["mode"]): row
        for row in result("speed/results/cuda.json")["rows"]
        if (row["case"]["batch"], row["case"]["length"], row["case"]["head_dim"]) == (8, 8192, 64)
    }
    return [
        [
            label,
            *(share(1e3 * found[label, mode]["seconds"]) for mode in ("forward", "forward+backward")),
            f"{found[label, 'forward+backward']['peak_bytes'] / 2**20:,.0f} MiB",
        ]
        for label, *_ in shown
    ]


def law_rows(shown: list[list[str]]) -> list[list[str]]:
    from benchmarks.lm.report import bits
    from benchmarks.sweep.report import points

    recall = recall_by_slots()
    rows = [row for row in result("lm/results/cuda.jsonl") if row["task"] == "Python 3.12 library, 4 layers of 512"]
    text = {(p.family.split(", 8 heads")[0], p.slots): f"{-p.mean:.3f}" for p in points(rows, lambda row: -bits(row))}
    steep = "pyramid 1,1,1,1,4,4,32,32"
    spans = (32, 64, 128, 256)
    return [
        [
            f"sliding window of {' / '.join(map(str, spans))} tokens",
            " / ".join(recall["sliding", n] for n in spans),
            " / ".join(text.get(("sliding", n), "–") for n in spans),
        ],
        ["fejer, r = 8", recall["fejer, window 256", 32], text["fejer, window 256", 32]],
        ["fejer, r = 1, 1, 2, 2, 4, 4, 8, 8", "", text["fejer, pyramid 1,1,2,2,4,4,8,8", 32]],
        ["fejer, r = 1, 1, 1, 1, 4, 4, 32, 32", "", text[f"fejer, {steep}", 32]],
        ["dirichlet, r = 1, 1, 1, 1, 4, 4, 32, 32", "", text[f"dirichlet, {steep}", 32]],
        ["full attention", recall["full", 256], text["full", 1024]],
    ]


SOURCES = {
    ("README.md", "Which window?"): which_rows,
    ("README.md", "Speed"): speed_rows,
    ("docs/law.md", 'Why "fejer" is the default'): law_rows,
    ("docs/results.md", "Context parallel"): context_rows,
    ("docs/results.md", "A state in bfloat16"): drift_rows,
    ("docs/results.md", "A language model on an H200"): language_rows,
    ("docs/results.md", "Switching a model trained with full attention"): switch_rows,
}
# Outcomes of tests.
WITHOUT = {("docs/results.md", "Trust")}


@pytest.mark.parametrize(("page", "heading"), SOURCES)
def test_tables_are_those_of_the_results(page: str, heading: str) -> None:
    (shown,) = tables(sections(page)[heading])
    assert shown == SOURCES[page, heading](shown)


def test_reports_are_those_of_the_results() -> None:
    """What benchmarks print stands on the page as it was printed."""
    pytest.importorskip("matplotlib")
    from benchmarks.decode.__main__ import table as decode_table
    from benchmarks.lm.report import table as text_table
    from benchmarks.speed.report import table as speed_table
    from benchmarks.sweep.report import table as sweep_table
    from benchmarks.training.__main__ import table as training_table

    both, trained = ("cpu.json", "cuda.json"), ("cuda.jsonl",)
    reports = {
        "speed": (speed_table, both),
        "training": (training_table, ("cuda.json",)),
        "decode": (decode_table, both),
        "mqar": (sweep_table, trained),
        "regbench": (sweep_table, trained),
        "lm": (text_table, (*trained, "recipe/cuda.jsonl")),
    }
    printed = [table(result(f"{name}/results/{file}")) for name, (table, files) in reports.items() for file in files]
    shown = re.findall(r"^```text\n(.*?)\n```$", (ROOT / "docs/results.md").read_text(), re.MULTILINE | re.DOTALL)
    assert sorted(shown) == sorted(printed)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_no_table_is_without_a_source(page: str) -> None:
    with_tables = {(page, heading) for heading, text in sections(page).items() if tables(text)}
    assert with_tables == {key for key in {*SOURCES, *WITHOUT} if key[0] == page}


def test_mutants_are_of_these_sources() -> None:
    """Every fault can be made, and the page has its outcome."""
    from faults import CPU, CUDA, PYTHON, QUICK, QUICK_CUDA

    faults = [*CPU, *PYTHON, *CUDA]
    for edit in (*faults, *QUICK, *QUICK_CUDA):
        assert (ROOT / edit.file).read_text().count(edit.old) == 1, edit
    listed = re.findall(r"^\| (.*?) \| `", (ROOT / "docs/mutants.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fault.name for fault in faults)
