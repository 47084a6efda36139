"""Builds the extension blurry_attn._C. The metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import setuptools

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    raise SystemExit(
        "blurry_attn: this build cannot see torch. Install torch, then type: pip install --no-build-isolation . "
        "(as well: uv pip install; for uv sync, see docs/usage.md#installing)"
    ) from None

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"blurry_attn: the build needs setuptools 77 or newer, this is {setuptools.__version__}. "
        'Type: pip install "setuptools>=77.0.3,<82"'
    )

ROOT = Path(__file__).parent.resolve()
CUDA_SOURCES = ("csrc/cuda/*.cpp", "csrc/cuda/*/*.cu")
CXX = shlex.split(os.environ.get("CXX", "c++"))


def build_cuda() -> bool:
    """Whether to build the CUDA sources: the toolkit and a CUDA torch decide, not a card; BLURRY_CUDA=0|1 overrides."""
    wish = os.environ.get("BLURRY_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"blurry_attn: BLURRY_CUDA is {wish!r}, it must be 0 or 1")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a CUDA build of torch (this is {torch.__version__})")
    if cpp_extension.CUDA_HOME is None:
        missing.append("the CUDA toolkit (nvcc on PATH, or CUDA_HOME)")
    if wish == "1" and missing:
        raise SystemExit(f"blurry_attn: BLURRY_CUDA=1 needs {' and '.join(missing)}; BLURRY_CUDA=0 builds without CUDA")
    if wish == "0" or missing:
        return False
    check_nvcc()
    check_toolkit()
    return True


def check_nvcc() -> None:
    """The toolkit and torch must agree in CUDA's major version; torch says so too, at the end of a traceback."""
    nvcc = os.path.join(str(cpp_extension.CUDA_HOME), "bin", "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None:
        raise SystemExit(f"blurry_attn: {nvcc} does not say which CUDA it is of; BLURRY_CUDA=0 builds without CUDA")
    if release[1] != str(torch.version.cuda).split(".")[0]:
        raise SystemExit(
            f"blurry_attn: {nvcc} is of CUDA {release[0].removeprefix('release ')}, and torch {torch.__version__} was "
            f"built for CUDA {torch.version.cuda}: their major versions must agree. Set CUDA_HOME to such a toolkit, "
            "or BLURRY_CUDA=0 to build without CUDA"
        )


def check_toolkit() -> None:
    """The compiler must find the headers that the CUDA sources include and the runtime library that they link."""
    folders = ["csrc", "csrc/cuda", *cpp_extension.include_paths("cuda"), sysconfig.get_path("include")]
    # With -MG the preprocessor lists a header that it does not find by its bare name, and goes on.
    preprocess = [*CXX, "-std=c++20", "-M", "-MG", *(f"-I{folder}" for folder in folders), "-x", "c++"]
    preprocess += sources(*CUDA_SOURCES)
    rules = subprocess.run(preprocess, cwd=ROOT, capture_output=True, text=True).stdout.replace("\\\n", " ")
    names = {name for name in shlex.split(rules) if not name.endswith(":")}
    missing = sorted(name for name in names if not (ROOT / name).exists())
    libraries = [*(f"-L{folder}" for folder in cpp_extension.library_paths("cuda")), "-lcudart"]
    with tempfile.TemporaryDirectory() as folder:
        link = [*CXX, "-shared", "-x", "c++", os.devnull, "-o", f"{folder}/linked.so", *libraries]
        if subprocess.run(link, capture_output=True).returncode != 0:
            missing.append("libcudart.so")
    if missing:
        raise SystemExit(
            f"blurry_attn: nvcc is in {cpp_extension.CUDA_HOME}/bin, but the compiler does not find CUDA's "
            f"{', '.join(missing)}. Install the whole toolkit (conda, NVIDIA's packages: cuda-toolkit; Debian: "
            "nvidia-cuda-toolkit), set CUDA_HOME to one, or BLURRY_CUDA=0 to build without CUDA"
        )


def check_compiler() -> None:
    """What every build needs besides torch, which the compiler would name after minutes, amid a traceback."""
    missing = []
    if shutil.which(CXX[0]) is None:
        missing.append(f"a C++ compiler, and there is no {CXX[0]} (Debian: g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python's headers, and {sysconfig.get_path('include')} has no Python.h (Debian: python3-dev)")
    if missing:
        raise SystemExit(f"blurry_attn: the build needs {'; '.join(missing)}")


def use_ccache() -> None:
    """Have ccache, where it works, wrap the compilers; newer releases of torch do so themselves, working or not."""
    ccache = subprocess.run(["sh", "cmake/ccache.sh", *CXX], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not ccache:
        os.environ["CCACHE_DISABLE"] = "1"
    if not ccache or hasattr(cpp_extension, "_wrap_compiler"):
        return
    # torch's check of the compiler takes no command of two words: Debian's folder of links named c++ and g++ serves.
    if "CXX" not in os.environ and Path("/usr/lib/ccache/c++").exists():
        os.environ["PATH"] = f"/usr/lib/ccache{os.pathsep}{os.environ['PATH']}"
    if cpp_extension.CUDA_HOME is not None:
        os.environ.setdefault("PYTORCH_NVCC", f"{ccache} {cpp_extension.CUDA_HOME}/bin/nvcc")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(cuda: bool) -> setuptools.Extension:
    files = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    # OpenMP only to compile: its symbols are those of the library that torch loads, the one pool of threads.
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp"]
    macros = [("BLURRY_TORCH_VERSION", f'"{torch.__version__}"')]
    options: dict[str, Any] = {
        "name": "blurry_attn._C",
        "include_dirs": [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")],
    }
    if not cuda:
        return cpp_extension.CppExtension(
            sources=files, define_macros=macros, extra_compile_args={"cxx": flags}, **options
        )
    # The PTX of 8.0 serves every later card that has no code of its own here.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    return cpp_extension.CUDAExtension(
        sources=files + sources(*CUDA_SOURCES),
        define_macros=[*macros, ("BLURRY_CUDA_VERSION", f'"{torch.version.cuda}"')],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]},
        **options,
    )


CUDA = build_cuda()


class BuildExtension(cpp_extension.BuildExtension):
    """Also writes blurry_attn/_build.py beside the extension: what it was built for, readable without loading it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:  # an editable install: keep the objects, so that the next one compiles only what changed
            self.build_temp = str(ROOT / "build" / sys.implementation.cache_tag)

    def run(self) -> None:
        check_compiler()
        super().run()
        package = ROOT / "blurry_attn" if self.inplace else Path(self.build_lib, "blurry_attn")
        cuda = torch.version.cuda if CUDA else None
        (package / "_build.py").write_text(
            '"""What blurry_attn._C was built for; written by setup.py."""\n\n'
            f"TORCH = {str(torch.__version__)!r}\nCUDA = {cuda!r}\n"
        )


use_ccache()
setuptools.setup(ext_modules=[extension(CUDA)], cmdclass={"build_ext": BuildExtension})
