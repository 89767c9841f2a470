"""Scikit-learn's handwritten digits as an image folder.

    python examples/digits.py runs/digits

The data set has 1,797 scans of 8×8 pixels. It is a part of scikit-learn, so nothing is downloaded.

Needs ``pip install ".[viz]"``.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from typing import Iterator, Optional, Tuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["write_digits"]

CLASSES = 10
VAL_EVERY = 5  # every fifth scan of a class is for validation


def write_digits(root: Path, limit_train: Optional[int] = None, limit_val: Optional[int] = None) -> Path:
    """Write ``root/{train,val}/<class>/<index>.png``: 1,442 training and 355 validation images.

    Every fifth scan of each class is for validation. A writer may have digits in both splits, as the data set does not
    identify writers. A second call writes missing and broken images and removes the digits beyond a smaller limit;
    other files in ``root`` are not touched.

    Args:
        root: folder to write to, created if it does not exist.
        limit_train: number of training images, with balanced classes; all if None.
        limit_val: number of validation images.

    Returns:
        ``root``.

    Raises:
        ValueError: a limit is below 10, the number of classes: timm numbers the class folders.
    """
    limits = {"train": limit_train, "val": limit_val}
    for split, limit in limits.items():
        if limit is not None and limit < CLASSES:
            raise ValueError(f"limit_{split}={limit!r}: must be None or at least {CLASSES}, one image per class")
    counts = dict.fromkeys(limits, 0)
    for split, name, png in _digits():
        path = root / split / name
        limit = limits[split]
        if limit is not None and counts[split] >= limit:
            path.unlink(missing_ok=True)
            continue
        counts[split] += 1
        if not path.is_file() or path.read_bytes() != png:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
    return root


def _digits() -> Iterator[Tuple[str, str, bytes]]:
    """Yield (split, ``<class>/<index>.png``, PNG bytes) of each digit, alternating between classes."""
    images, labels = load_digits(return_X_y=True)
    by_class = [np.flatnonzero(labels == label) for label in range(CLASSES)]
    for rank in range(max(map(len, by_class))):
        split = "val" if rank % VAL_EVERY == VAL_EVERY - 1 else "train"
        for label, indices in enumerate(by_class):
            if rank < len(indices):
                index = indices[rank]
                yield split, f"{label}/{index:04d}.png", _png(images[index].reshape(8, 8))


def _png(image: np.ndarray) -> bytes:
    """Encode an 8×8 image with grey levels 0 to 16 as PNG."""
    buffer = BytesIO()
    Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    """Write the digits to a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write train/ and val/ to")
    root = write_digits(parser.parse_args().out)
    for split in ("train", "val"):
        print(f"{root / split}: {len(list((root / split).glob('*/*.png')))} images")


if __name__ == "__main__":
    main()
