"""What the documentation shows runs, what it links to exists, and no public name is left out."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

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
