"""Every test runs with two threads, deterministic algorithms and fresh memory full of NaN, on each device."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a busy machine: threads that wait do not spin

# Compiled graphs are kept by the names of operators, whatever shapes and strides those had when they were compiled.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: runs on a CUDA device")
    config.addinivalue_line("markers", "slow: takes minutes or gigabytes; left out unless -m asks for it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the operators run on; inputs are made on the CPU and moved."""
    if request.param == "cuda":
        from blurry_attn import _C

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if _C.build_info()["cuda"] is None:
            pytest.skip("built without CUDA kernels")
    return torch.device(request.param)
