"""What nvcc made of the CUDA kernels: the fast ones use tensor cores, and spill registers to memory only where listed.

`make sass` compiles the kernels and says where they are; no card is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a")

FAST = {"fejer_walk", "fejer_back", "dirichlet_walk", "dirichlet_weights", "dirichlet_back"}
OTHERS = {
    "dirichlet_rows",
    "dirichlet_state",
    "fejer_given",
    "fejer_state",
    "fejer_walk_seams",
    "fejer_back_seams",
    "repair_walks",
}
OTHERS |= {"step_slots", "step_positions", "rotary_turn", "softmax_rows", "softmax_rows_backward"}
OTHERS |= {f"scan_{pass_}" for pass_ in ("adjoint", "boundaries", "carries", "chains", "decays", "dot", "mix")}

# The most loads and stores of spilled registers that nvcc makes in kernels of a name, for each architecture, and why. A
# line that allows more than twice what there is fails, too: it is lowered, or goes.
NVCC = "13.0"
TWO_BLOCKS = "two blocks of 256 threads leave 128 registers"
ATTENDING = "384 threads leave 168 registers; only sm_90a can give those that attend 240"
SPILLS = {
    "fejer_walk<*, 64, 3, 64, true, false>": (131, 109, f"over 64 slots: {TWO_BLOCKS}"),
    "fejer_walk<*, 64, 5, 64, true, false>": (224, 209, f"over 64 slots: {TWO_BLOCKS}"),
    "fejer_walk<*, 64, 8, 64, true, false>": (66, 51, f"over 64 slots: {TWO_BLOCKS}"),
    "fejer_walk<*, 64, 16, 64, true, false>": (61, 36, f"over 64 slots: {TWO_BLOCKS}"),
    "fejer_walk<*, 64, 5, 64, false, false>": (18, 22, TWO_BLOCKS),
    "fejer_walk<*, 64, 8, 64, false, false>": (0, 4, TWO_BLOCKS),
    "fejer_walk<*, 64, 3, 64, false, false>": (10, 4, TWO_BLOCKS),
    "fejer_walk<*, 64, 5, 32, false, false>": (2, 2, TWO_BLOCKS),
    "fejer_walk<*, 64, 16, 64, false, false>": (4, 0, TWO_BLOCKS),
    "fejer_walk<*, 128, 8, 64, true, false>": (0, 22, f"over 64 slots: {TWO_BLOCKS}"),
    "fejer_walk<*, 128, 9, 64, true, false>": (2, 12, f"over 64 slots: {TWO_BLOCKS}"),
    "fejer_back<*, 64, 3, 32, 4>": (50, 20, TWO_BLOCKS),
    "fejer_back<*, 64, 3, 64, 4>": (152, 24, TWO_BLOCKS),
    "fejer_back<*, 128, 3, 32, 4>": (167, 0, ATTENDING),
    "fejer_back<*, 128, 3, 64, 4>": (220, 12, ATTENDING),
    "fejer_back<*, 128, 5, 32, 4>": (201, 12, ATTENDING),
    "fejer_back<*, 128, 5, 64, 4>": (266, 12, ATTENDING),
    "fejer_back<*, 128, 8, 32, 4>": (45, 0, ATTENDING),
    "fejer_back<*, 128, 8, 64, 4>": (132, 0, ATTENDING),
    "fejer_back<*, 128, 3, ??, 2>": (104, 0, ATTENDING),
    "fejer_back<*, 128, 5, ??, 2>": (113, 0, ATTENDING),
    "fejer_back<*, 128, 8, ??, 2>": (59, 0, ATTENDING),
    "fejer_back<*, 128, 9, ??, 2>": (159, 0, ATTENDING),
    "fejer_back<*, 128, 16, ??, 2>": (74, 0, ATTENDING),
    "dirichlet_weights<*, 64, ?>": (0, 10, "twelve warps leave 168 registers"),
}


class Kernel(NamedTuple):
    architecture: str
    name: str  # with template arguments
    products: int  # instructions for tensor cores
    spills: int  # loads and stores of local memory

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]


def disassemble(file: Path) -> list[Kernel]:
    tools = metadata.distribution("nvidia-cuda-cuobjdump").locate_file("nvidia/cu13/bin")  # nvdisasm's, too
    script = r'cuobjdump --dump-sass "$0" | grep -oE "Function : .*|\b(HG?MMA|LDL|STL)\b" | c++filt'
    said = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, str(file)],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, f"{file}: {said.stdout[-500:]}{said.stderr[-500:]}"
    kernels = []
    for function in said.stdout.split("Function : ")[1:]:
        signature, *instructions = function.splitlines()
        plain = re.sub(r"void |blurry_attn::cuda::|\(anonymous namespace\)::|(\bBack)?Config<(?=__)", "", signature)
        name = plain.partition("(")[0].replace("> >", ">")
        count = Counter(instructions)
        kernels.append(Kernel(file.suffixes[-2][1:], name, count["HMMA"] + count["HGMMA"], count["LDL"] + count["STL"]))
    return kernels


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    folder = os.environ.get("CUDA_OBJECTS")
    if folder is None:
        assert "\nmake sass\n" in (ROOT / ".ci" / "run").read_text()
        pytest.skip("no CUDA_OBJECTS: make sass, which .ci/run calls, runs this where nvcc is")
    root = ROOT / "csrc" / "cuda"
    sources = [source.relative_to(root) for source in sorted(root.rglob("*.cu"))]
    files = [ROOT / folder / source.with_suffix(f".{name}.o") for name in ARCHITECTURES for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for found in pool.map(disassemble, files) for kernel in found]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_known(kernels: list[Kernel], architecture: str) -> None:
    assert {kernel.family for kernel in kernels if kernel.architecture == architecture} == FAST | OTHERS


def test_fast_kernels_use_tensor_cores(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.family in FAST and not kernel.products] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_kernels_spill_as_listed(kernels: list[Kernel], architecture: str) -> None:
    said = subprocess.check_output([os.environ.get("NVCC", "nvcc"), "--version"], text=True)
    if f"release {NVCC}," not in said:
        pytest.skip(f"the list is of nvcc {NVCC}, and here: {said.splitlines()[-1]}")
    listed = {pattern: most[ARCHITECTURES.index(architecture)] for pattern, (*most, _) in SPILLS.items()}
    found = dict.fromkeys(SPILLS, 0)
    for kernel in kernels:
        if kernel.family in FAST and kernel.architecture == architecture:
            entry = next((pattern for pattern in SPILLS if fnmatchcase(kernel.name, pattern)), kernel.name)
            found[entry] = max(found.get(entry, 0), kernel.spills)
    wrong = {
        entry: f"{spills} where {listed.get(entry, 0)} are listed"
        for entry, spills in found.items()
        if not spills <= listed.get(entry, 0) <= 2 * spills
    }
    assert wrong == {}
    assert all(any(most) for *most, _ in SPILLS.values())
