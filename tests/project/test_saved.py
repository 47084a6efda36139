"""Files that users of this version or of an earlier one saved: they load, and give the numbers that they gave then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors")
from safetensors.torch import load_file
from saved import FOLDER, answers_of_checkpoint, answers_of_hub, answers_of_state

from blurry_attn import BlurryState

VERSIONS = sorted(FOLDER.iterdir())
STATES = [
    path
    for folder in VERSIONS
    for path in sorted(folder.iterdir())
    if path.suffix in (".pt", ".safetensors") and not path.name.startswith("answers_")
]
assert STATES, "tests/golden/saved is incomplete"


def assert_answers(found: dict[str, Tensor], file: Path) -> None:
    expected = load_file(file)
    assert found.keys() == expected.keys()
    for name, answer in expected.items():
        tolerance = 1e-12 if answer.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[name], answer, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("path", STATES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_saved_state_loads(path: Path) -> None:
    """As torch.load and safetensors read it, and whether it is a state or its state_dict."""
    loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    state = loaded if isinstance(loaded, BlurryState) else BlurryState.from_state_dict(loaded)
    name = path.stem.removesuffix("_dict")
    assert_answers(answers_of_state(state), path.with_name(f"answers_{name}.safetensors"))


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_saved_checkpoint_of_the_language_model_loads(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    assert_answers(answers_of_checkpoint(folder / "lm"), folder / "answers_lm.safetensors")


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_saved_model_of_transformers_loads(folder: Path) -> None:
    pytest.importorskip("transformers")
    assert_answers(answers_of_hub(folder / "hub"), folder / "answers_hub.safetensors")
