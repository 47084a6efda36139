"""The golden cases: results, states and gradients of the operator and of the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_accurate

from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention, reference

CASES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))
assert len(CASES) >= 13, "tests/golden is incomplete"


def load(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[dict, BlurryWindow, dict[str, torch.Tensor]]:
    arrays = dict(np.load(path))
    config = json.loads(str(arrays.pop("config")))
    window = BlurryWindow(*(config.get(name) for name in ("slots", "window", "kernel", "sharpness", "phase")))
    return config, window, {name: torch.from_numpy(x).to(device, dtype) for name, x in arrays.items()}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("attend", [blurry_window_attention, reference.blurry_window_attention],
                         ids=["operator", "reference"])  # fmt: skip
def test_golden(attend, dtype, path, device):
    config, window, case = load(path, dtype, device)
    leaves = {"grad_q": case["q"], "grad_k": case["k"], "grad_v": case["v"]}
    resumed = "state_k" in case
    if resumed:
        leaves |= {"grad_state_k": case["state_k"], "grad_state_v": case["state_v"]}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    position = torch.full((config["B"],), config["position"], device=device) if resumed else None
    state = BlurryState(leaves["grad_state_k"], leaves["grad_state_v"], position, window) if resumed else None
    out, lse, end = attend(case["q"], case["k"], case["v"], window, scale=config.get("scale"), enable_gqa=True,
                           state=state, return_lse=True, return_state=True)  # fmt: skip
    results = {"out": out, "lse": lse, "final_k": end.key, "final_v": end.value}
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), [case[f"grad_{n}"] for n in results])
    results |= dict(zip(leaves, grads, strict=True))
    assert_accurate(results, {name: case[name] for name in results}, dtype, window)
    assert end.position.tolist() == [config["T"] + config.get("position", 0)] * config["B"]
