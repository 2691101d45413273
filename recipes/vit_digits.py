"""Write what recipes/vit_digits.yaml begins with: scikit-learn's digits as images, and a small ViT without a head.

    python recipes/vit_digits.py [FOLDER]

FOLDER is runs/vit-digits-data unless given.  Needs scikit-learn and Pillow; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

SIZE = 8  # pixels of a side
MEAN, SPREAD = 0.31, 0.38  # of all pixels, as shares of white


def write_images(folder: Path) -> None:
    """Write an 8-bit PNG for each digit, below a folder for each class."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        file = folder / str(label) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(file)


def write_model(folder: Path) -> None:
    """Write an untrained ViT with four layers, of patches of two by two pixels, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=2,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=384,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessorPil(size=size, image_mean=[MEAN] * 3, image_std=[SPREAD] * 3).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/vit-digits-data")
    write_images(target / "images")
    write_model(target / "model")
    print(f"{target}: images and a model for recipes/vit_digits.yaml")
