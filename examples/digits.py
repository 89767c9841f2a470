"""Scikit-learn's handwritten digits, 1,797 real 8×8 scans of ten classes, as an image folder for timm.

    python examples/digits.py runs/digits

The images ship inside scikit-learn, so nothing is downloaded.
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
    """Write ``root/{train,val}/<class>/<index>.png``: 1,442 training and 355 validation images, always the same.

    Every fifth scan of each class is for validation. Writers are in both parts, as the data set does not name them.
    A second call leaves the images that are right, writes the missing and broken ones, and removes the digits that a
    smaller limit leaves out; other files in ``root`` are not touched.

    Args:
        root: folder to write to, made if it does not exist.
        limit_train: keep this many training images, classes evenly represented; all if None.
        limit_val: likewise for validation.

    Returns:
        ``root``.

    Raises:
        ValueError: a limit is below 10, the number of classes: timm numbers the classes that it finds.
    """
    limits = {"train": limit_train, "val": limit_val}
    for split, limit in limits.items():
        if limit is not None and limit < CLASSES:
            raise ValueError(f"limit_{split}={limit!r}: must be None or at least {CLASSES}, one image a class")
    written = dict.fromkeys(limits, 0)
    for split, name, png in _digits():
        path = root / split / name
        limit = limits[split]
        if limit is not None and written[split] >= limit:
            path.unlink(missing_ok=True)
            continue
        written[split] += 1
        if not path.is_file() or path.read_bytes() != png:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
    return root


def _digits() -> Iterator[Tuple[str, str, bytes]]:
    """Yield (split, ``<class>/<index>.png``, PNG bytes) of every digit, the classes taking turns."""
    images, labels = load_digits(return_X_y=True)
    by_class = [np.flatnonzero(labels == label) for label in range(CLASSES)]
    for rank in range(max(map(len, by_class))):
        split = "val" if rank % VAL_EVERY == VAL_EVERY - 1 else "train"
        for label, indices in enumerate(by_class):
            if rank < len(indices):
                index = indices[rank]
                yield split, f"{label}/{index:04d}.png", _png(images[index].reshape(8, 8))


def _png(image: np.ndarray) -> bytes:
    """Encode an 8×8 image of grey levels 0 to 16 as an 8-bit greyscale PNG of levels 0 to 255."""
    buffer = BytesIO()
    Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    """Write the digits to the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write train/ and val/ to")
    root = write_digits(parser.parse_args().out)
    for split in ("train", "val"):
        print(f"{root / split}: {len(list((root / split).glob('*/*.png')))} images")


if __name__ == "__main__":
    main()
