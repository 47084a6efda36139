"""``python -m benchmarks.convert``: trains a small Llama with full attention, then switches it to each window."""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from blurry_attn import BlurryWindow
from blurry_attn.files import write_whole
from blurry_attn.integrations.transformers import convert
from blurry_attn.lm.data import VOCABULARY, Text, load_text

from .. import command_line, results_in, write_json
from ..speed.meters.cpu import cpu_model

SLOTS = 32
HEADS = 8
WARM_UP = 20  # steps
WINDOWS: dict[str, BlurryWindow | None] = {
    "full attention": None,
    "sliding window": BlurryWindow(SLOTS, SLOTS),
    "r = 2": BlurryWindow(SLOTS, 2 * SLOTS),
    "r = 4": BlurryWindow(SLOTS, 4 * SLOTS),
    "r = 8": BlurryWindow(SLOTS, 8 * SLOTS),
    "r = 1,1,1,1,4,4,8,8": BlurryWindow.pyramid(SLOTS, (1, 1, 1, 1, 4, 4, 8, 8)),
}


def train(
    model: LlamaForCausalLM, text: Text, rate: Callable[[int], float], args: argparse.Namespace, steps: int
) -> None:
    """AdamW on batches that depend on the step alone; ``rate`` is a function of the share done."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps) * min(1, (step + 1) / WARM_UP)
        inputs, targets = text.batch(0, step, args.batch, args.context)
        loss = bits(model, inputs.to(args.device), targets.to(args.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step}: {loss.item():.3f} bits per byte", file=sys.stderr, flush=True)


def bits(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / math.log(2)


@torch.no_grad()
def validate(model: LlamaForCausalLM, text: Text, args: argparse.Namespace) -> float:
    model.eval()
    inputs, targets = (x.to(args.device) for x in text.validation(args.context))
    parts = zip(inputs.split(args.batch), targets.split(args.batch), strict=True)
    return sum(bits(model, x, y).item() * len(x) for x, y in parts) / len(inputs)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The base model's loss; of every window the loss right after the switch, and after training on."""
    torch.manual_seed(0)
    text = load_text(None, args.context)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.dim,
        intermediate_size=8 * args.dim // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=HEADS,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    base = LlamaForCausalLM(config).to(args.device)
    train(base, text, lambda done: args.rate * (1.05 + math.cos(math.pi * done)) / 2, args, args.steps)
    rows = []
    for name, window in WINDOWS.items():
        model = copy.deepcopy(base)
        if window is not None:
            convert(model, window, name)
        switched = validate(model, text, args)
        train(model, text, lambda done: args.rate / 2 * (1 - done), args, args.tune_steps)
        rows.append({"window": name, "switched": switched, "tuned": validate(model, text, args)})
        print(line(rows[-1]), flush=True)
    return {
        "command": command_line("convert", sys.argv[1:]),
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu_model(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": {name: value for name, value in vars(args).items() if name != "out"},
        "parameters": base.num_parameters(),
        "rows": rows,
    }


HEAD = f"{'bits per byte':24}{'switched':>10}{'tuned':>10}"


def line(row: dict[str, Any]) -> str:
    return f"{row['window']:24}{row['switched']:10.3f}{row['tuned']:10.3f}"


def table(result: dict[str, Any]) -> str:
    return "\n".join([HEAD, *map(line, result["rows"])])


def plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    names = [row["window"] for row in rows]
    axes.plot([row["switched"] for row in rows], names, "o", label="right after the switch")
    axes.plot([row["tuned"] for row in rows], names, "o", label="after training on")
    axes.invert_yaxis()
    axes.set(xlabel="bits per byte, held-out text", title=f"trained with full attention, switched to {SLOTS} slots")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500, help="of the base model, with full attention")
    parser.add_argument("--tune-steps", type=int, default=200, help="after the switch")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate; half of it after the switch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    names = f"{args.device}.json", f"{args.device}.png"
    with results_in(args.out, *names, parser=parser):
        print(HEAD)
        content = measure(args)
        write_json(args.out / names[0], content)
        write_whole(args.out / names[1], lambda file: plot(content["rows"]).savefig(file, dpi=120))


if __name__ == "__main__":
    main()
