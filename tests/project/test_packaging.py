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

ROOT = Path(__file__).parents[2]
SERIES = ".".join(torch.__version__.split(".")[:2])
INSTALL = "pip install --no-build-isolation"


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
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


@pytest.mark.parametrize(
    ("left_out", "command"),
    [("_build.py", ("-c", "import blurry_attn")), ("_C.*", ("-m", "blurry_attn.lm", "--help"))],
)
def test_sources_that_are_not_built_name_the_package_that_they_hide(
    tmp_path: Path, left_out: str, command: tuple[str, ...]
) -> None:
    """In a clone after `pip install .`: Python finds the sources first, and another folder is the cure."""
    sources, site = tmp_path / "my sources", tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", left_out)
    shutil.copytree(ROOT / "blurry_attn", sources / "blurry_attn", ignore=ignore)
    shutil.copy(ROOT / "setup.py", sources)
    (site / "blurry_attn").mkdir(parents=True)
    (site / "blurry_attn" / "__init__.py").touch()
    result = python(*command, cwd=sources, PYTHONPATH=str(site))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert f"blurry_attn in {sources} is not built for this Python; " in last
    assert f"hide the package installed in {site}: run Python from another folder" in last
    assert f"{INSTALL} --no-deps --editable '{sources}'" in last


@pytest.mark.parametrize(
    ("beside", "advice"),
    [("setup.py", " --no-deps --editable {}"), ("another.py", " --no-deps --force-reinstall .")],
)
def test_a_package_that_is_not_built_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str, advice: str
) -> None:
    """Nothing is hidden here: sources are built in place, an installed package is installed again."""
    (tmp_path / beside).touch()
    monkeypatch.setattr(_load, "_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        _load.load()
    assert str(error.value).startswith(f"blurry_attn in {tmp_path} is not built for this Python; ")
    assert str(error.value).endswith(INSTALL + advice.format(tmp_path))


def test_build_that_cannot_see_torch_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    result = python("setup.py", "egg_info", "--egg-base", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert re.fullmatch(rf"blurry_attn: .*torch.*: {INSTALL} \. .*uv pip install.*uv sync.*\n", result.stderr)


@pytest.mark.skipif(torch.version.cuda is not None and CUDA_HOME is not None, reason="CUDA can be built here")
def test_cuda_build_names_what_is_missing(tmp_path: Path) -> None:
    result = python("setup.py", "egg_info", "--egg-base", str(tmp_path), BLURRY_CUDA="1")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("blurry_attn: BLURRY_CUDA=1 needs ")
    assert ("CUDA build of torch" in last) == (torch.version.cuda is None)
    assert ("CUDA toolkit" in last) == (CUDA_HOME is None)
    assert last.endswith("; BLURRY_CUDA=0 builds without CUDA")


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


SETUP = "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
FAKE_TOOLKIT = f"""
import sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME, sys.argv = "13.0", sys.argv[1], ["setup.py", "--version"]
{SETUP}
"""


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Cuda compilation tools, release 12.4, V12.4.131", "nvcc is of CUDA 12.4, and torch"),
        ("nothing", "nvcc does not say which CUDA it is of; BLURRY_CUDA=0"),
    ],
)
def test_nvcc_of_another_major_version_ends_in_one_line(tmp_path: Path, said: str, message: str) -> None:
    executable(tmp_path / "bin" / "nvcc", f"echo '{said}'")
    result = python("-c", FAKE_TOOLKIT, str(tmp_path), BLURRY_CUDA="")
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_cuda_headers_and_libraries_that_are_missing_are_named_before_anything_is_compiled(tmp_path: Path) -> None:
    """All of them: once they are there, the check is content."""
    home = tmp_path / "the toolkit"
    executable(home / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.2, V13.2.1'")
    result = python("-c", FAKE_TOOLKIT, str(home), BLURRY_CUDA="", CPATH="", LIBRARY_PATH="")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    found = re.search(r"does not find CUDA's (.*?)\. Install .*BLURRY_CUDA=0 to build without CUDA\n", result.stderr)
    assert found is not None, result.stderr
    headers = found[1].split(", ")
    library = headers.pop()
    assert library == "libcudart.so" and {"cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h"} <= set(headers)
    for header in headers:
        (home / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (home / "include" / header).touch()
    (home / "lib64").mkdir()
    subprocess.run(["c++", "-shared", "-x", "c++", os.devnull, "-o", home / "lib64" / library], check=True)
    result = python("-c", FAKE_TOOLKIT, str(home), BLURRY_CUDA="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == metadata.version("blurry_attn")


def test_a_build_without_a_compiler_or_pythons_headers_says_so_in_one_line(tmp_path: Path) -> None:
    nowhere = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'; "
    result = python("-c", nowhere + SETUP, "build_ext", BLURRY_CUDA="0", CXX=str(tmp_path / "c++"))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"blurry_attn: the build needs a C++ compiler, and there is no {tmp_path}/c++ ")
    assert "Python's headers, and /nowhere has no Python.h" in last


@pytest.mark.parametrize("works", [True, False])
def test_ccache_is_used_where_it_can_write(tmp_path: Path, works: bool) -> None:
    """Elsewhere it is told to stand aside, since newer releases of torch call it by themselves."""
    if works:
        executable(tmp_path / "ccache", 'exec "$@"')
    else:
        executable(tmp_path / "ccache", "echo 'ccache: error: Failed to create directory' >&2; exit 1")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    said = subprocess.run(
        ["sh", "cmake/ccache.sh", "c++"], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout == (f"{tmp_path}/ccache\n" if works else "")
    code = f"{SETUP}; import os; print('disabled' if 'CCACHE_DISABLE' in os.environ else 'in use')"
    result = python("-c", code, "--version", PATH=path, BLURRY_CUDA="0")
    assert result.stdout.splitlines()[-1] == ("in use" if works else "disabled")


def test_every_place_asks_for_the_same_setuptools() -> None:
    """torch 2.11 wants one below 82, later releases 77.0.3 or newer."""
    asked = {
        requirement
        for page in ("README.md", "docs/usage.md", "pyproject.toml", "setup.py")
        for requirement in re.findall(r"setuptools[<>=][<>=,.\d]*", (ROOT / page).read_text())
    }
    assert asked == {"setuptools>=77.0.3,<82"}
    (pinned,) = re.findall(r"^setuptools==(\d+)", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    assert 78 <= int(pinned) < 82


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


def test_source_distribution_holds_all_that_is_versioned_and_nothing_built(tmp_path: Path) -> None:
    result = python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(listed.stdout.splitlines()) - names == set()
    else:  # an unpacked source distribution
        assert {"setup.py", "README.md", "docs/usage.md", "csrc/law.cpp", "tests/conftest.py"} <= names
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
