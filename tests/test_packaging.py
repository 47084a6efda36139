"""What a user sees of the package: what is in it, and one line that helps where it cannot be built or loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import blurry_attn
from blurry_attn import _build, _load

ROOT = Path(__file__).parents[1]
SERIES = ".".join(torch.__version__.split(".")[:2])
INSTALL = "pip install --no-build-isolation"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_build_info() -> None:
    info = blurry_attn._C.build_info()
    assert (info["torch"], info["cuda"]) == (_build.TORCH, _build.CUDA)
    assert info["torch"] == torch.__version__
    assert info["compiler"]


@pytest.mark.parametrize(
    ("built_torch", "built_cuda", "running_cuda"),
    [
        (torch.__version__, None, None),
        (f"{SERIES}.99", None, None),  # another patch release
        (f"{SERIES}.0+cu130", None, "13.0"),  # no CUDA kernels: any CUDA will do
        (f"{SERIES}.0+cu130", "13.0", "13.1"),
    ],
)
def test_build_is_accepted(
    monkeypatch: pytest.MonkeyPatch, built_torch: str, built_cuda: str | None, running_cuda: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", running_cuda)
    _load.check_build(built_torch, built_cuda)


@pytest.mark.parametrize(
    ("built_torch", "built_cuda", "running_cuda", "built_for"),
    [
        ("2.1.0+cpu", None, None, "torch 2.1.0+cpu"),
        (f"{SERIES}9.0", None, "13.0", f"torch {SERIES}9.0"),
        (f"{SERIES}.0", "12.8", "13.0", f"torch {SERIES}.0 with CUDA 12.8"),
        (f"{SERIES}.0", "13.0", None, f"torch {SERIES}.0 with CUDA 13.0"),
    ],
)
def test_build_for_another_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, built_torch: str, built_cuda: str | None, running_cuda: str | None, built_for: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", running_cuda)
    with pytest.raises(ImportError) as error:
        _load.check_build(built_torch, built_cuda)
    message = str(error.value)
    assert message.startswith(f"blurry_attn was built for {built_for}, and this is torch {torch.__version__}")
    assert INSTALL in message
    assert "\n" not in message


def test_import_under_another_torch_ends_in_one_line() -> None:
    code = (
        "import sys, types; sys.modules['blurry_attn._build'] = types.SimpleNamespace(TORCH='1.13.1', CUDA=None); "
        "import blurry_attn"
    )
    result = python("-c", code)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: blurry_attn was built for torch 1.13.1")
    assert "undefined symbol" not in result.stderr


@pytest.mark.parametrize("left_out", ["_build.py", "_C.*"])
def test_import_of_a_source_tree_that_is_not_built_ends_in_one_line(tmp_path: Path, left_out: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__", left_out)
    shutil.copytree(ROOT / "blurry_attn", tmp_path / "blurry_attn", ignore=ignore)
    result = python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import blurry_attn")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: blurry_attn is not built")
    assert INSTALL in last


def test_build_that_cannot_see_torch_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    result = python("setup.py", "egg_info", "--egg-base", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert re.fullmatch(rf"blurry_attn: .*torch.*: {INSTALL} \.\n", result.stderr)


@pytest.mark.skipif(torch.version.cuda is not None and CUDA_HOME is not None, reason="CUDA can be built here")
def test_cuda_build_names_what_is_missing(tmp_path: Path) -> None:
    result = python("setup.py", "egg_info", "--egg-base", str(tmp_path), BLURRY_CUDA="1")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("blurry_attn: BLURRY_CUDA=1 needs ")
    assert ("CUDA build of torch" in last) == (torch.version.cuda is None)
    assert ("CUDA toolkit" in last) == (CUDA_HOME is None)


FAKE_TOOLKIT = """
import sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME, sys.argv = "13.0", sys.argv[1], ["setup.py", "--version"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Cuda compilation tools, release 12.4, V12.4.131", "nvcc is of CUDA 12.4, and torch"),
        ("nothing", "nvcc does not say which CUDA it is of; BLURRY_CUDA=0"),
        ("Cuda compilation tools, release 13.2, V13.2.1", None),
    ],
)
def test_nvcc_of_another_major_version_ends_in_one_line(tmp_path: Path, said: str, message: str | None) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '{said}'\n")
    nvcc.chmod(0o755)
    result = python("-c", FAKE_TOOLKIT, str(tmp_path), BLURRY_CUDA="")
    assert result.returncode == (message is not None), result.stderr
    if message is None:
        assert result.stdout.splitlines()[-1] == metadata.version("blurry_attn")
    else:
        assert message in result.stderr and result.stderr.count("\n") == 1


def test_import_loads_no_compiler() -> None:
    """Nor what of torch takes seconds to load; torch itself does not either."""
    slow = ("torch._dynamo", "torch.distributed.tensor", "sympy", "matplotlib")
    program = "import torch, sys; before = set(sys.modules); import blurry_attn; print(*set(sys.modules) - before)"
    loaded = python("-c", program).stdout.split()
    assert "blurry_attn.swap" in loaded and not set(slow) & set(loaded)


def test_import_without_torch_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = python("-c", "import blurry_attn", PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: blurry_attn needs torch, and this Python has none")


def test_the_library_shows_its_own_names_alone() -> None:
    """Other extensions in the process, of any version of anything, do not meet ours."""
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols with")
    command = ["nm", "-D", "--defined-only", "-C", str(blurry_attn._C.__file__)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    # Weak ones are templates and inline functions of the headers, which every library of torch shares.
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    own = {name.partition("(")[0] for kind, name in symbols if kind not in "WVu"}
    of_the_linker = {"__bss_start", "_edata", "_end"}
    assert own - of_the_linker == {"PyInit__C"} | {f"blurry_attn::{name}" for name in ("forward", "step", "rotary")}


def test_cuda_switch_is_checked(tmp_path: Path) -> None:
    result = python("setup.py", "egg_info", "--egg-base", str(tmp_path), BLURRY_CUDA="yes")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "blurry_attn: BLURRY_CUDA is 'yes', it must be 0 or 1"


def test_source_distribution_holds_all_sources_and_nothing_built(tmp_path: Path) -> None:
    result = python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "blurry_attn/py.typed"}
    expected |= {
        str(path.relative_to(ROOT))
        for folder, pattern in (("csrc", "*"), ("cmake", "*"), ("blurry_attn", "*.py"))
        for path in (ROOT / folder).rglob(pattern)
        if path.is_file()
    }
    assert expected - {"blurry_attn/_build.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.py"))]


def test_requirements_are_pinned_and_audited() -> None:
    """`make audit` asks about exact versions; it needs a service, so it is no part of what must pass everywhere."""
    files = sorted((ROOT / "requirements").glob("*.txt"))
    lines = [
        line for file in files for line in file.read_text().splitlines() if line and not line.startswith(("#", "-r "))
    ]
    assert lines and [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line)] == []
    said = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"-r requirements/{file.name}" in said for file in files) and "--strict" in said
    assert "audit" not in (ROOT / ".ci" / "run").read_text()


def test_installed_metadata() -> None:
    assert metadata.version("blurry_attn") == blurry_attn.__version__
    (script,) = metadata.entry_points(group="console_scripts", name="blurry-lm")
    assert callable(script.load())
