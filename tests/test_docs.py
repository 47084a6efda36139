"""What the documentation shows runs, what it links to exists, and no public name is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import blurry_attn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_usage_shows_every_public_name() -> None:
    usage = (ROOT / "docs" / "usage.md").read_text()
    assert [name for name in blurry_attn.__all__ if name not in usage] == []


def test_readme_names_make_targets_that_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands and set(commands) <= set(targets)
