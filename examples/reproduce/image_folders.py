"""Write a data set as folders of images, as timm's scripts read them.

    python examples/reproduce/image_folders.py folder --data cifar10

An image is ``folder/{train,validation}/<label>/<index>.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from nni_spaces.runs.data import read_images

__all__ = ["write_folders"]


def write_folders(data: str, out: Path) -> int:
    """Write training and test images, and return their number."""
    count = 0
    for split, name in (("train", "train"), ("test", "validation")):
        images, labels, classes = read_images(data, split=split)
        folders = [out / name / f"{label:0{len(str(classes - 1))}}" for label in range(classes)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for index, (image, label) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist())):
            Image.fromarray(image).save(folders[label] / f"{index:05}.png")
        count += len(labels)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--data", default="cifar10", help="cifar10 (torchvision's download), or an .npz file")
    args = parser.parse_args(arguments)
    print(f"{args.out}: {write_folders(args.data, args.out):,} images")


if __name__ == "__main__":
    main()
