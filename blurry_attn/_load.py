"""Loads the compiled operators, or says in one line why they cannot be loaded."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("blurry_attn needs torch, and this Python has none; install torch, then blurry_attn") from None

_FOLDER = Path(__file__).resolve().parents[1]


def _series(version: str) -> str:
    """'2.13' of '2.13.0+cpu': releases that differ in more than the patch number differ in their binary interface."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _advice() -> str:
    """What to type: sources, which lie beside setup.py, stay as they are where the package is installed elsewhere."""
    install = "pip install --no-build-isolation --no-deps"
    if not (_FOLDER / "setup.py").is_file():
        return f"in its source folder, type: {install} --force-reinstall ."
    build = f"type: {install} --editable {shlex.quote(str(_FOLDER))}"
    installed = PathFinder.find_spec("blurry_attn", [entry for entry in sys.path if Path(entry).resolve() != _FOLDER])
    if installed is None or installed.origin is None:
        return build
    return (
        f"these are sources, which hide the package installed in {Path(installed.origin).parents[1]}: "
        f"run Python from another folder, or {build}"
    )


def check_build(torch_version: str, cuda_version: str | None) -> None:
    """Raise ImportError unless the running torch is of the series that the extension was built for.

    Args:
        torch_version: the torch that the extension was built with, such as "2.13.0+cpu".
        cuda_version: the CUDA that its kernels were built with, such as "13.0"; None: it has none and runs with any.
    """
    same_torch = _series(torch_version) == _series(torch.__version__)
    running_cuda = torch.version.cuda
    same_cuda = cuda_version is None or (
        running_cuda is not None and cuda_version.split(".")[0] == running_cuda.split(".")[0]
    )
    if same_torch and same_cuda:
        return
    built, running = f"torch {torch_version}", f"torch {torch.__version__}"
    if not same_cuda:
        built, running = f"{built} with CUDA {cuda_version}", f"{running} with CUDA {running_cuda}"
    raise ImportError(f"blurry_attn was built for {built}, and this is {running}; {_advice()}")


def load() -> ModuleType:
    """Import blurry_attn._C, which registers the operators, after checking that it can be."""
    try:
        build = importlib.import_module("blurry_attn._build")
    except ModuleNotFoundError:
        build = None
    if build is None or importlib.util.find_spec("blurry_attn._C") is None:
        raise ImportError(f"blurry_attn in {_FOLDER} is not built for this Python; {_advice()}")
    check_build(build.TORCH, build.CUDA)
    return importlib.import_module("blurry_attn._C")


_C = load()
