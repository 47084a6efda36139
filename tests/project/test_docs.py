"""What the documentation shows runs, what it links to exists, and no public name is left out."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import blurry_attn
from blurry_attn import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))
LINE = 120


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_are_short(page: Path) -> None:
    """Tables, code and what was printed aside; a line that is one link cannot be broken."""
    lines = outside_code(page.read_text()).splitlines()
    prose = [line for line in lines if not line.startswith("|") and not re.fullmatch(r"!?\[[^]]*\]\([^)]*\)", line)]
    assert [line for line in prose if len(line) > LINE] == []


def test_pages_of_the_design_name_kernels_and_files_that_exist() -> None:
    """What stands in a page's code font and looks like a kernel or a path is one of the sources'."""
    sources = [path for part in ("csrc", "blurry_attn", "tests", "benchmarks") for path in (ROOT / part).rglob("*.*")]
    kernels = "".join(path.read_text() for path in sources if path.suffix in (".cu", ".cuh"))
    for page in (ROOT / "docs" / "design").glob("*.md"):
        for code in re.findall(r"`([^`\n]+)`", outside_code(page.read_text())):
            if re.fullmatch(r"(fejer|window|dirichlet|scan|step|softmax|rotary)_\w+", code):
                assert re.search(rf"\b{code}\b", kernels), f"{page.name} names {code}"
            elif re.fullmatch(r"[\w/]+\.(h|cpp|cu|cuh|inl|py|sh)", code):
                assert any(f"/{path}".endswith(f"/{code}") for path in sources), f"{page.name} names {code}"


def test_the_reference_is_what_the_docstrings_say() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "docs" / "api.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # an installed package may be of other sources
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
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


def test_readme_says_which_releases_are_tested() -> None:
    from versions import PAIRS

    pairs = re.findall(r"(\d\.\d+) with (?:Python )?(\d\.\d+)", (ROOT / "README.md").read_text())
    assert pairs == [(torch_version.rpartition(".")[0], version) for version, torch_version in PAIRS.items()]


def test_readme_names_make_targets_that_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands and set(commands) <= set(targets)


# The numbers of tables are those of the results that lie in the repository.


MQAR = "mqar/results/cuda.jsonl"
TEXTS = ("lm/results/cuda.jsonl", "lm/results/recipe/cuda.jsonl")
PYTHON, LINUX = "Python 3.12 library, 4 layers of 512", "linux-doc-6.1, 4 layers of 512"
HEADS = ", 8 heads of 64"
RECIPE = blurry_attn.BlurryWindow.pyramid(32).resolutions(8)


def pyramid(resolutions: tuple[int, ...], kernel: str = "fejer") -> str:
    return f"{kernel}, pyramid {','.join(map(str, resolutions))}"


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


def recall_by_slots() -> dict[tuple[str, int], str]:
    from benchmarks.sweep.report import points

    heads = ", 4 heads of 32"
    rows = [row for row in result(MQAR) if row["task"] == "32 pairs in 256 tokens" and row["family"].endswith(heads)]
    return {(p.family.removesuffix(heads), p.slots): share(p.mean) for p in points(rows)}


def bits_by_slots(task: str) -> dict[tuple[str, int], float]:
    """Of models with 8 heads of 64; rows that were run again with more seeds count with all of them."""
    from benchmarks.lm.report import bits
    from benchmarks.sweep.report import points

    found: dict[tuple[str, int], float] = {}
    for file in TEXTS:
        rows = [row for row in result(file) if row["task"] == task and row["family"].endswith(HEADS)]
        found |= {(p.family.removesuffix(HEADS), p.slots): -p.mean for p in points(rows, lambda row: -bits(row))}
    return found


def text_by_slots() -> dict[tuple[str, int], str]:
    return {key: f"{bits:.3f}" for key, bits in bits_by_slots(PYTHON).items()}


def which_rows(shown: list[list[str]]) -> list[list[str]]:
    recall, text = recall_by_slots(), text_by_slots()
    spans = (32, 64, 128, 256)
    best, eight = ", ".join(map(str, RECIPE)), ("fejer, window 256", 32)
    return [
        *([f"sliding window of {n} tokens", str(n), recall["sliding", n], text["sliding", n]] for n in spans),
        ['`"fejer"`, every head r = 8', "32", recall[eight], text[eight]],
        [f'`"fejer"`, pyramid r = {best}', "32", "", text[pyramid(RECIPE), 32]],
        ["full attention", "all", recall["full", 256], text["full", 1024]],
    ]


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
    recall, text = recall_by_slots(), text_by_slots()
    steep, even = (1, 1, 1, 1, 4, 4, 32, 32), (1, 1, 2, 2, 4, 4, 8, 8)
    spans = (32, 64, 128, 256)
    return [
        [
            f"sliding window of {' / '.join(map(str, spans))} tokens",
            " / ".join(recall["sliding", n] for n in spans),
            " / ".join(text["sliding", n] for n in spans),
        ],
        ["fejer, r = 8", recall["fejer, window 256", 32], text["fejer, window 256", 32]],
        *([f"fejer, r = {', '.join(map(str, r))}", "", text[pyramid(r), 32]] for r in (RECIPE, even, steep)),
        ["dirichlet, r = 8", recall["dirichlet, window 256", 32], ""],
        [f"dirichlet, r = {', '.join(map(str, steep))}", "", text[pyramid(steep, "dirichlet"), 32]],
        ["full attention", recall["full", 256], text["full", 1024]],
    ]


SOURCES = {
    ("README.md", "Which window?"): which_rows,
    ("README.md", "Speed"): speed_rows,
    ("docs/law.md", 'Why "fejer" is the default'): law_rows,
}


@pytest.mark.parametrize("task", [PYTHON, LINUX])
def test_the_default_pyramid_reads_text_best(task: str) -> None:
    """Of those of 32 slots and the default sharpness; what the pages call best is it."""
    bits = {name: x for (name, slots), x in bits_by_slots(task).items() if slots == 32}
    plain = {name: x for name, x in bits.items() if re.fullmatch(r"fejer, pyramid [\d,]+", name)}
    assert min(plain, key=plain.__getitem__) == pyramid(RECIPE)


@pytest.mark.parametrize("page", ["README.md", "docs/law.md"])
def test_pages_call_the_same_pyramid_the_best(page: str) -> None:
    """The one whose bits are in bold."""
    (row,) = re.findall(r"^.*\*\*\d\.\d+\*\* \|$", (ROOT / page).read_text(), re.MULTILINE)
    assert f"r = {', '.join(map(str, RECIPE))} |" in row


def test_the_caption_of_the_first_picture_is_what_it_shows() -> None:
    from blurry_attn import viz

    caption = r": (\.\d+) of it is the newest token by now, and (\.\d+)"
    ((newest, oldest),) = re.findall(caption, (ROOT / "README.md").read_text())
    weights = viz.slot_weights(blurry_attn.BlurryWindow(32, 256), tokens=256)[0]
    (slot,) = weights[:, :16].sum(1).gt(0).logical_and(weights[:, -1] > 0).nonzero().flatten().tolist()
    assert f"{weights[slot, -1]:.2f}" == f"0{newest}" and f"{weights[slot, :16].sum():.2f}" == f"0{oldest}"


@pytest.mark.parametrize(("page", "heading"), SOURCES)
def test_tables_are_those_of_the_results(page: str, heading: str) -> None:
    (shown,) = tables(sections(page)[heading])
    assert shown == SOURCES[page, heading](shown)


def test_no_table_is_without_a_source() -> None:
    with_tables = {("README.md", heading) for heading, text in sections("README.md").items() if tables(text)}
    assert with_tables == {key for key in SOURCES if key[0] == "README.md"}


def test_readme_says_how_fast_a_card_is_as_measured() -> None:
    rows = [row for row in result("speed/results/cuda.json")["rows"] if row["provider"] == "fejer"]

    def measured(field: str, **case: int) -> list[float]:
        return [1e3 * row[field] for row in rows if case.items() <= row["case"].items()]

    text = " ".join((ROOT / "README.md").read_text().split())
    ((floor, *million),) = re.findall(r"would take (\.\d+) ms.* a million tokens .* take (\S+) and (\S+) ms", text)
    guarded = result("guard/results/seams.json")["rows"]
    assert max(row["quantities"]["seconds"]["ratio"] for row in guarded) == pytest.approx(1.14, abs=0.01)
    assert "up to a seventh more" in text
    main = {"batch": 8, "length": 8192, "head_dim": 64, "heads": 16}
    assert floor == share(measured("floor_seconds", **main)[0])
    assert million == [f"{ms:.1f}" for ms in measured("seconds", batch=1, length=2**20)]


def blend(resolution: int, sharpness: float | None = None) -> tuple[torch.Tensor, float, float, float]:
    """Of one of 32 slots after a lobe: its tokens' weights from the centre on, mean, spread, and what is left."""
    window = blurry_attn.BlurryWindow(32, 32 * resolution, sharpness=sharpness, phase=0)
    period, offsets = 32 * resolution, torch.arange(-resolution, resolution).double()
    kept = 1 - reference.gates(window, period, 0, 2 * period - resolution, 2 * resolution)[:, 0].double()
    after = torch.cat((kept.flip(0).cumprod(0).flip(0), torch.ones(1).double()))  # of what is there before each token
    weights = (1 - kept) * after[1:]
    mean = (weights * offsets).sum() / weights.sum()
    spread = ((weights * (offsets - mean) ** 2).sum() / weights.sum()).sqrt()
    return weights[resolution:], mean.item(), spread.item(), after[0].item()


def near(shown: str, value: float) -> bool:
    """Whether it is the value, rounded."""
    return abs(float(shown) - value) <= 0.51 * 10 ** -len(shown.partition(".")[2])


def test_the_law_says_what_a_slot_blends() -> None:
    text = (ROOT / "docs" / "law.md").read_text()
    for r, shown, *numbers in tables(sections("docs/law.md")['The default gate: "fejer"'])[0]:
        weights, *others = blend(int(r))
        assert not shown or all(
            near(x, weight) for x, weight in zip(shown.split(", "), weights.tolist(), strict=True)
        ), r
        assert all(near(x, other) for x, other in zip(numbers, others, strict=True)), r
    left = re.findall(r"(?:sharpness |, )(\d) leaves (\.\d+)", " ".join(text.split()))
    assert len(left) == 3 and all(near(shown, blend(32, float(sharp))[3]) for sharp, shown in left)
    spreads = re.findall(r"falls from (\.\d+) r to (\.\d+) r", " ".join(text.split()))[0]
    assert all(near(shown, blend(32, sharp)[2] / 32) for shown, sharp in zip(spreads, (6.0, 12.0), strict=True))


def test_no_experiment_is_open() -> None:
    rows = [row for table in tables((ROOT / "docs/design/experiments.md").read_text()) for row in table]
    assert rows and all(len(row) == 4 and all(row) and "open" not in row for row in rows)


def test_pages_say_how_many_seeds_there_are() -> None:
    """Recall has three, text two, and the pyramids that are compared four."""
    from benchmarks.sweep.report import points

    assert {len(p.scores) for p in points(result(MQAR))} == {3}
    text, recipes = ([row for row in result(file) if row["task"] == PYTHON] for file in TEXTS)
    assert {len(p.scores) for p in points(text, lambda row: -row["bits"])} == {2}
    pyramids = {pyramid(r) + HEADS for r in (RECIPE, (1, 1, 2, 2, 4, 4, 8, 8))}
    assert [len(p.scores) for p in points(recipes, lambda row: -row["bits"]) if p.family in pyramids] == [4, 4]


def test_results_are_those_of_the_benchmarks() -> None:
    """Tables and what made them; none stands outside of what docs/results.py writes."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "docs" / "results.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


BLOCK = re.compile(r"<!-- results: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_every_result_is_shown() -> None:
    kept = {str(path.relative_to(ROOT / "benchmarks")) for path in (ROOT / "benchmarks").rglob("results/**/*.json*")}
    assert sorted(file for page in RESULTS for file, _ in BLOCK.findall(page.read_text())) == sorted(kept)


@pytest.mark.parametrize("page", RESULTS, ids=name_of)
def test_pages_of_results_have_no_numbers_of_their_own(page: Path) -> None:
    """A decimal number of the text is one of its tables', rounded. runs.md has no tables, and says so."""
    text = page.read_text()
    blocks = " ".join(block for _, block in BLOCK.findall(text))
    if page.name == "runs.md":
        assert "No result file holds these numbers" in text and not blocks
        return
    prose = outside_code(BLOCK.sub("", text))
    assert tables(prose) == [] or page.name == "README.md"
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose)
    shown = re.findall(r"\d*\.\d+", blocks)
    for number in re.findall(r"(?<![\w.-])\d*\.\d+(?![\w.-]*\w)", plain):
        assert any(near(number, float(x)) for x in shown), f"{page.name}: {number} is in none of its tables"


def test_mutants_are_of_these_sources() -> None:
    """Every fault can be made, and the page has its outcome."""
    from faults import CPU, CUDA, PYTHON, QUICK, QUICK_CUDA

    faults = [*CPU, *PYTHON, *CUDA]
    for edit in (*faults, *QUICK, *QUICK_CUDA):
        assert (ROOT / edit.file).read_text().count(edit.old) == 1, edit
    listed = re.findall(r"^\| (.*?) \| `", (ROOT / "docs/mutants.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fault.name for fault in faults)
