"""Files as users of this version save them: states, a checkpoint of the language model, a model of transformers.

python tests/tools/saved.py writes them to tests/golden/saved/VERSION, once for each version, with the numbers that they
give. Later versions must be able to load them, and give the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import blurry_attn
from blurry_attn import BlurryState, BlurryWindow, blurry_window_attention

FOLDER = Path(__file__).parents[1] / "golden" / "saved"
WINDOWS = {
    "pyramid": BlurryWindow.pyramid(4, (1, 3)),
    "dirichlet": BlurryWindow(4, 8, "dirichlet", phase=1),
    "sharp": BlurryWindow(5, 40, sharpness=9.0),
}
STATES = {
    "pyramid": ("pyramid", torch.float32),
    "pyramid64": ("pyramid", torch.float64),
    "pyramid16": ("pyramid", torch.bfloat16),
    "dirichlet": ("dirichlet", torch.float32),
    "sharp": ("sharp", torch.float32),
}
HUB_WINDOW = BlurryWindow(4, 16)
TEXT = b"what a model has read "


def numbers(*shape: int) -> Tensor:
    """Reproducible on every machine and in every version: no generator makes them."""
    count = torch.Size(shape).numel()
    return torch.sin(1.7 * torch.arange(1, count + 1, dtype=torch.float64).square()).reshape(shape)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of two sequences of two heads, in float64."""
    query, key, value = numbers(3, 2, 2, tokens, 4).unbind()
    return query, key, value


def make_state(name: str) -> BlurryState:
    """The state that is saved as ``name``, after 19 tokens and 14 of them."""
    window, dtype = STATES[name]
    ends = []
    for row, tokens in enumerate((19, 14)):
        query, key, value = (
            tensor[row : row + 1, :, :tokens].to(torch.promote_types(dtype, torch.float32)) for tensor in inputs(19)
        )
        ends.append(blurry_window_attention(query, key, value, WINDOWS[window], return_state=True)[1])
    return BlurryState.cat(ends).to(dtype)


def answers_of_state(state: BlurryState) -> dict[str, Tensor]:
    """What a state is asked: its history, its frequencies, and the outputs of the tokens that follow."""
    dtype = state.key.dtype if state.flux is None else torch.float32
    query, key, value = (tensor[:, :, -3:].to(dtype) for tensor in inputs(23))
    out, end = blurry_window_attention(query, key, value, state.window, state=state, return_state=True)
    history, frequencies = state.reconstruct(torch.tensor([0.0, 1.5, 3.0])), state.frequency_window()
    return {
        "out": out,
        "position": end.position,
        "key": history[0],
        "value": history[1],
        "key frequencies": torch.view_as_real(frequencies[0]).contiguous(),
        "value frequencies": torch.view_as_real(frequencies[1]).contiguous(),
    }


@torch.no_grad()
def answers_of_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Logits after a text and after one byte more, by the state, and the second moments of the embedding."""
    from blurry_attn.lm import checkpoint
    from blurry_attn.lm.model import LanguageModel
    from blurry_attn.lm.train import make_optimizer

    saved = checkpoint.load(folder)
    model = LanguageModel(saved.model_config)
    optimizer = make_optimizer(model, saved.train_config)
    saved.restore(model, optimizer)
    logits, states = model.prefill(torch.tensor([list(TEXT)]))
    moments = optimizer.state[model.embedding.weight]["exp_avg_sq"]
    return {"prefill": logits, "step": model.step(torch.tensor([[65]]), states), "moments": moments.clone()}


@torch.no_grad()
def answers_of_hub(folder: Path) -> dict[str, Tensor]:
    """Logits of a model of transformers, and the tokens that it goes on with."""
    from transformers import AutoModelForCausalLM

    from blurry_attn.integrations.transformers import BlurryCache, register

    register(HUB_WINDOW, "blurry_window of saved files")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="blurry_window of saved files").eval()
    tokens = torch.arange(20).remainder(13).unsqueeze(0)
    continued = model.generate(tokens, past_key_values=BlurryCache(), max_new_tokens=8, do_sample=False)
    return {"logits": model(tokens, use_cache=False).logits, "continued": continued}


def save_checkpoint(folder: Path) -> None:
    """A model of one layer after two steps of training on numbers in place of text."""
    from blurry_attn.lm import checkpoint
    from blurry_attn.lm.model import LanguageModel, ModelConfig
    from blurry_attn.lm.train import make_optimizer

    config = checkpoint.TrainConfig(steps=2, context=16, batch=2, threads=1)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(dim=8, layers=1, slots=4, resolutions=(1, 3)))
    optimizer = make_optimizer(model, config)
    tokens = torch.arange(2 * 17).reshape(2, 17).remainder(7)
    for _ in range(2):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(folder, model, optimizer, config, "0" * 64, 2)


def save_hub(folder: Path) -> None:
    """A converted Llama of one layer, as save_pretrained writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from blurry_attn.integrations.transformers import convert

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0))
    convert(model, HUB_WINDOW, "blurry_window of saved files").save_pretrained(folder)


def main() -> None:
    folder = FOLDER / blurry_attn.__version__
    folder.mkdir(parents=True)
    for name in STATES:
        state = make_state(name)
        torch.save(state, folder / f"{name}.pt")
        torch.save(state.state_dict(), folder / f"{name}_dict.pt")
        save_file(state.state_dict(), folder / f"{name}.safetensors")
        save_file(answers_of_state(state), folder / f"answers_{name}.safetensors")
    for name, save, answers in (
        ("lm", save_checkpoint, answers_of_checkpoint),
        ("hub", save_hub, answers_of_hub),
    ):
        (folder / name).mkdir()
        save(folder / name)
        save_file(answers(folder / name), folder / f"answers_{name}.safetensors")


if __name__ == "__main__":
    main()
