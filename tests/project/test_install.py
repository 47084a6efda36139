"""The source distribution, built into a wheel and installed where no source is in sight."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """Without what the environment says of other packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BLURRY"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("archive")
    source = folder / "source"
    ignored = (".git", ".venv", ".*_cache", "build", "runs", "*.so", "_build.py", "__pycache__")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored))
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=source)
    shutil.rmtree(source)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(archive: Path) -> Path:
    folder = archive.parent
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    run(*command, "--wheel-dir", folder, archive, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own, which sees torch where it lies, with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site)
    run(*command, wheel, cwd=folder)
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "blurry_attn",
        f"blurry_attn-{wheel.name.split('-')[1]}.dist-info",
    }
    assert [name for name in names if re.fullmatch(r"blurry_attn/_C\..*\.so", name)]
    assert {"blurry_attn/py.typed", "blurry_attn/_build.py"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".inl", ".pyc"))]


def test_an_index_can_show_whose_it_is_and_where_to_read_on(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        (metadata,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        lines = content.read(metadata).decode().splitlines()
    assert [line for line in lines if line.startswith("Author: ")]
    assert [line for line in lines if line.startswith("Project-URL: ")]


def test_tests_run_from_the_source_distribution(archive: Path, wheel: Path, tmp_path: Path) -> None:
    """Those that read most of its files; its package is built in place by what the wheel has more."""
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as content:
        for name in content.namelist():
            if name.endswith((".so", "_build.py")):
                content.extract(name, source)
    files = ("tests/law/test_golden.py", "tests/project/test_docs.py", "tests/project/test_packaging.py")
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda", *files, cwd=source)
    assert re.search(r"^\d{2,} passed", said, re.MULTILINE), said


def test_the_installed_package_runs_what_the_readme_shows(python: Path, tmp_path: Path) -> None:
    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert example is not None
    where = run(python, "-c", f"{example[1]}\nimport blurry_attn; print(blurry_attn.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert "train" in run(python, "-m", "blurry_attn.lm", "--help", cwd=tmp_path)


def test_the_installed_package_passes_tests(python: Path, tmp_path: Path) -> None:
    for name in ("conftest.py", "helpers.py", "golden", "test_golden.py", "test_errors.py", "test_step.py"):
        copy = shutil.copytree if (ROOT / "tests" / name).is_dir() else shutil.copy
        copy(ROOT / "tests" / name, tmp_path / name)
    said = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not cuda", cwd=tmp_path)
    assert re.search(r"^\d{3,} passed", said, re.MULTILINE), said
