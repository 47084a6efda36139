"""The three mixers side by side: same shape, same steps, same learning rates, the best of each by validation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..files import write_whole
from .checkpoint import TrainConfig
from .data import InputError
from .model import MIXERS, LanguageModel, ModelConfig, state_size
from .parallel import rank
from .train import METRICS, train

RESULTS, PLOT = "compare.json", "compare.png"


@dataclass(frozen=True)
class Row:
    """A mixer's best run; its state is that of one sequence as long as the context."""

    mixer: str
    learning_rate: float
    bits: float
    tokens_per_second: float
    state_elements: int
    state_bytes: int
    run: str


def compare(
    model_config: ModelConfig,
    train_config: TrainConfig,
    learning_rates: list[float],
    folder: Path,
    device: torch.device,
) -> str:
    """Trains every mixer at every learning rate below ``folder``, writes results and plot there, returns a table.

    Sliding-window attention keeps as many tokens as the blurry window has slots; full attention keeps all and is the
    yardstick. Runs that are already there are taken as they are, or continued.

    Raises:
        InputError, OSError, Interrupted: as :func:`blurry_attn.lm.train.train`.
    """
    if not learning_rates or len(set(learning_rates)) < len(learning_rates):
        raise InputError(f"--learning-rates must be distinct and at least one, got {learning_rates}")
    configs = [replace(train_config, learning_rate=rate) for rate in learning_rates]
    rows, runs = [], []
    for mixer in MIXERS:
        mixer_config = replace(model_config, mixer=mixer)
        elements, size = _state(mixer_config, train_config.context)
        results = [
            (train(mixer_config, config, folder / f"{mixer}-{config.learning_rate}", device), config.learning_rate)
            for config in configs
        ]
        runs += [{"mixer": mixer, "learning_rate": rate, "bits": result.bits} for result, rate in results]
        best, rate = min(results, key=lambda pair: pair[0].bits)
        rows.append(Row(mixer, rate, best.bits, best.tokens_per_second, elements, size, best.folder.name))
    content = {
        "model": {name: value for name, value in asdict(model_config).items() if name != "mixer"},
        "train": {name: value for name, value in asdict(train_config).items() if name != "learning_rate"},
        "parameters": best.parameters,
        "unigram": best.unigram,
        "bigram": best.bigram,
        "runs": runs,
        "best": [asdict(row) for row in rows],
    }
    if rank() == 0:
        write_whole(folder / RESULTS, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
        write_whole(folder / PLOT, lambda path: _plot(path, folder, rows, best.bigram))
    titles = f"{'mixer':10}{'bits/byte':>10}{'learning rate':>15}{'tokens/s':>12}{'state elements':>16}{'bytes':>12}"
    table = [titles]
    for row in rows:
        grows = "  (grows)" if row.mixer == "full" else ""
        table.append(
            f"{row.mixer:10}{row.bits:10.3f}{row.learning_rate:15g}{row.tokens_per_second:12,.0f}"
            f"{row.state_elements:16,}{row.state_bytes:12,}{grows}"
        )
    table.append(f"{'bigram':10}{best.bigram:10.3f}")
    table.append(f"{'unigram':10}{best.unigram:10.3f}")
    return "\n".join(table)


def _state(config: ModelConfig, length: int) -> tuple[int, int]:
    """Elements and bytes of the state after ``length`` bytes."""
    return state_size(LanguageModel(config).prefill(torch.zeros(1, length, dtype=torch.int64))[1])


def _plot(path: Path, folder: Path, rows: list[Row], bigram: float) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for color, row in enumerate(rows):
        lines: list[dict[str, Any]] = [
            json.loads(line) for line in (folder / row.run / METRICS).read_text().splitlines()
        ]
        axes.plot([line["step"] for line in lines], [line["bits"] for line in lines], color=f"C{color}", alpha=0.15)
        points = [(line["step"], line["validation_bits"]) for line in lines if "validation_bits" in line]
        label = f"{row.mixer}: {row.bits:.3f} ({row.state_elements:,} state elements)"
        axes.plot(*zip(*points, strict=True), f"C{color}o-", label=label)
    axes.axhline(bigram, color="gray", linestyle="--", label=f"byte bigram: {bigram:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte (dots: held-out text)", title="three mixers, trained alike")
    axes.legend()
    figure.savefig(path, dpi=120)
