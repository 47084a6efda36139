"""Draws the pictures of the documentation: ``python docs/pictures.py`` writes them to docs/images."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from blurry_attn import BlurryWindow
from blurry_attn.viz import gates, reconstruction, token_weights

FOLDER = Path(__file__).resolve().parent / "images"


def pictures() -> dict[str, Figure]:
    """File name -> figure, for every picture of the documentation."""
    sliding, blurry = BlurryWindow(32, 32), BlurryWindow(32, 256)
    generator = torch.Generator().manual_seed(5)
    steps = torch.randn(256, generator=generator, dtype=torch.float64, device="cpu")
    time = torch.arange(256, dtype=torch.float64, device="cpu")
    wave = torch.sin(time / 19) + 0.5 * torch.sin(time / 6.1)
    return {
        "token_weights.png": token_weights(
            {
                "Sliding window: one token per slot, a sharp memory of 32 tokens": sliding,
                "Blurry window, r = 8: eight tokens per slot, a blurred memory of 256 tokens": blurry,
                "Pyramid: heads with r = 1, 2, 4, 8, sharp near and blurred far": BlurryWindow.pyramid(
                    32, (1, 2, 4, 8)
                ),
            }
        ),
        "gates_fejer.png": gates(BlurryWindow(8, 64), tokens=136),
        "gates_dirichlet.png": gates(BlurryWindow(8, 64, kernel="dirichlet"), tokens=136),
        "reconstruction.png": reconstruction(
            wave + 0.25 * steps, {"Sliding window of 32 tokens": sliding, "Blurry window, r = 8": blurry}
        ),
    }


def main() -> None:
    for name, figure in pictures().items():
        figure.savefig(FOLDER / name)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
