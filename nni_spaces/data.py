"""Images for searches: read once, and served in an order and with augmentations that seed and epoch determine.

A killed search goes on as if nothing had happened only if the batches of an epoch do not depend on the ones before.
So an item is asked for as (epoch, index), and its crop is drawn from (seed, epoch, index), in whichever process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from optinspired_plugins._checks import check_int

__all__ = ["EpochSampler", "ImageSet", "SeededImages", "make_loader", "make_loaders", "process_rank", "read_images"]


class ImageSet(NamedTuple):
    """Images, uint8, shape (n, channels, height, width); labels, int64, shape (n,); and how many classes."""

    images: Tensor
    labels: Tensor
    classes: int


def read_images(source: str | Path, limit: int | None = None, split: str = "train") -> ImageSet:
    """Read the training or the test images of a source.

    Args:
        source: ``"digits"``, scikit-learn's 1,797 scans, every fifth of a class for testing; ``"cifar10"``,
            torchvision's download in ``data/cifar10``; an ``.npz`` file with ``x_train``, uint8, (n, height, width,
            channels), and ``y_train``, integers, ``x_test`` and ``y_test``; or a folder with ``train/<class>/*.png``
            and ``test/…`` or ``val/…``, or with ``<class>/*.png`` and no test images, all of one size.
        limit: keep the first so many, ≥ 1; those of a folder take turns by class.
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: the source is none of these, is damaged, has fewer than two classes, images of several sizes or no
            such split, or test images of other classes; ``limit`` is out of range.
        OSError: a file cannot be read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: must be 'train' or 'test'")
    if limit is not None:
        check_int("limit", limit, 1)
    if str(source) == "digits":
        images, labels = _digits(split)
    elif str(source) == "cifar10":
        from torchvision.datasets import CIFAR10

        data = CIFAR10("data/cifar10", train=split == "train", download=True)
        images, labels = data.data, np.asarray(data.targets)
    elif Path(source).suffix == ".npz" and Path(source).is_file():
        images, labels = _arrays(source, split)
    elif Path(source).is_dir():
        images, labels = _folder(Path(source), split)
    else:
        raise ValueError(f"data={str(source)!r}: must be 'digits', 'cifar10', an .npz file or a folder of images")
    classes = int(labels.max()) + 1 if len(labels) else 0
    if classes < 2:
        raise ValueError(f"data={str(source)!r}: has {classes} classes, must have at least 2")
    found = ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), classes)
    return found if limit is None else ImageSet(found.images[:limit], found.labels[:limit], classes)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = (_ranks(labels) % 5 == 4) == (split == "test")
    images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8)
    return images[chosen], labels[chosen].astype(np.int64)


def _ranks(labels: np.ndarray) -> np.ndarray:
    """Return the number of each image among those of its class."""
    ranks = np.zeros_like(labels)
    for label in np.unique(labels):
        ranks[labels == label] = np.arange((labels == label).sum())
    return ranks


def _arrays(source: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    names, where = (f"x_{split}", f"y_{split}"), f"data={str(source)!r}"
    try:
        with np.load(source, allow_pickle=False) as arrays:
            missing = set(names) - set(arrays.files)
            if missing:
                raise ValueError(f"{where}: has no array {min(missing)}, must have {' and '.join(names)}")
            images, labels = (arrays[name] for name in names)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{where}: must be an .npz file, is damaged ({error})") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        allowed = "must be uint8 of (n, height, width, channels)"
        raise ValueError(f"{where}: {names[0]} is {images.dtype} of shape {images.shape}, {allowed}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or (labels < 0).any():
        allowed = f"must be integers ≥ 0 of shape ({len(images)},)"
        raise ValueError(f"{where}: {names[1]} is {labels.dtype} of shape {labels.shape}, {allowed}")
    return images, labels.astype(np.int64)


def _folder(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import ImageFolder

    part = next((root / name for name in _FOLDERS[split] if (root / name).is_dir()), root)
    if part == root and split == "test":
        raise ValueError(f"data={str(root)!r}: has no test images, must have a folder {' or '.join(_FOLDERS[split])}")
    classes = _class_folders(part)
    if len(classes) < 2:
        raise ValueError(f"data={str(part)!r}: has {len(classes)} class folders, must have at least 2")
    if split == "test" and (root / "train").is_dir() and classes != _class_folders(root / "train"):
        raise ValueError(f"data={str(part)!r}: has other class folders than train, must have the same")
    found = ImageFolder(str(part), loader=_read_image, allow_empty=True)
    images = [image for image, _ in found]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"data={str(part)!r}: has images of {len(shapes)} sizes, must have one")
    labels = np.asarray(found.targets, dtype=np.int64)
    order = np.lexsort((labels, _ranks(labels)))
    return np.stack(images)[order], labels[order]


def _class_folders(part: Path) -> list[str]:
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir())


_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}


def _read_image(path: str) -> np.ndarray:
    """Read an image as (height, width, channels), one channel where it is grey."""
    from PIL import Image

    with Image.open(path) as image:
        array = np.asarray(image.convert("L" if image.mode in ("L", "1", "I") else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def channel_moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel, in grey levels."""
    # One channel at a time: the whole set as float64 would take 8 times its memory.
    moments = [(c.float().mean(dtype=torch.float64), c.float().std()) for c in images.unbind(1)]
    return [float(mean) for mean, _ in moments], [float(std) for _, std in moments]


class SeededImages(Dataset):
    """Images normalised by the training images' mean and deviation; asked for as (epoch, index).

    Args:
        data: the images.
        indices: which of them belong to this part; ``None`` for all.
        seed: seed of the augmentation.
        padding: pixels that a random crop may shift by; 0 for no augmentation. Images wider than 8 pixels are flipped
            too, digits are not.
        cutout: side of a square set to 0, clipped where it leaves the image; 0 for none.
        moments: mean and deviation of each channel, in grey levels; ``None`` for those of ``data``.
    """

    def __init__(
        self,
        data: ImageSet,
        indices: Tensor | None = None,
        seed: int = 0,
        padding: int = 0,
        cutout: int = 0,
        moments: tuple[list[float], list[float]] | None = None,
    ) -> None:
        self.images = data.images if indices is None else data.images[indices]
        self.labels = data.labels if indices is None else data.labels[indices]
        self.seed, self.padding, self.cutout = seed, padding, cutout
        self.flip = data.images.shape[-1] > 8
        mean, std = channel_moments(data.images) if moments is None else moments
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std).clamp(min=1e-6)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Return the image of ``key`` = (epoch, index), float32, and its label."""
        epoch, index = key
        image = (self.images[index].float() - self.mean) / self.std
        if self.padding or self.cutout:
            image = self._augmented(image, np.random.default_rng((self.seed, epoch, index)))
        return image, int(self.labels[index])

    def _augmented(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        _, height, width = image.shape
        if self.padding:
            padded = torch.nn.functional.pad(image, [self.padding] * 4)
            top, left = rng.integers(0, 2 * self.padding + 1, 2)
            image = padded[:, top : top + height, left : left + width]
            if self.flip and rng.random() < 0.5:
                image = image.flip(-1)
        if self.cutout:
            image = image.clone()
            y, x, half = *rng.integers(0, (height, width)), self.cutout // 2
            # From half before the centre, as DARTS's, which takes even sides.
            image[:, max(y - half, 0) : y - half + self.cutout, max(x - half, 0) : x - half + self.cutout] = 0
        return image


def process_rank() -> int:
    """Return the number of this process in a distributed run, also before torch knows it: 0 outside of one."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


class EpochSampler(Sampler):
    """Every index once an epoch, as (epoch, index), in an order that seed and epoch determine.

    Args:
        length: number of items.
        seed: seed of the order; ``None`` for the items' own.
        parts: number of processes that share an epoch; each takes an equal part, and at most ``parts`` − 1 items are
            left out of an order that is drawn.
    """

    def __init__(self, length: int, seed: int | None, parts: int = 1) -> None:
        self.length, self.seed, self.parts, self.epoch = length, seed, parts, 0
        self.part = process_rank() if parts > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._positions())

    def _positions(self) -> range:
        stop = self.length if self.seed is None else self.length - self.length % self.parts
        return range(self.part, stop, self.parts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.seed is not None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(order[position])) for position in self._positions())


def make_loaders(
    data: ImageSet, batch_size: int, seed: int, workers: int = 0, padding: int = 4, parts: int = 1
) -> tuple[DataLoader, DataLoader]:
    """Return loaders of two random halves: for the weights, and for α (§9.3).

    Raises:
        ValueError: a process's part of a half is smaller than a batch.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.labels)))
    half = len(order) // 2
    loaders = []
    for part, indices in enumerate((order[:half], order[half : 2 * half])):
        sampler = EpochSampler(half, seed + part, parts)
        if len(sampler) < batch_size:
            of = "half of the images" if parts == 1 else f"half of the images by {parts} processes"
            raise ValueError(f"batch_size={batch_size!r}: must be at most {len(sampler)}, {of}")
        images = SeededImages(data, indices, seed + part, padding)
        loaders.append(make_loader(images, batch_size, sampler, workers))
    return loaders[0], loaders[1]


def make_loader(
    images: SeededImages, batch_size: int, sampler: EpochSampler, workers: int, drop_last: bool = True
) -> DataLoader:
    """Return a loader that draws from no random state but the images' own."""
    # A generator of its own: otherwise a loader draws seeds of workers from the one that Gumbel's softmax uses.
    options: dict[str, Any] = dict(generator=torch.Generator())
    if workers:
        options |= dict(persistent_workers=True, worker_init_fn=_end_with_parent)
    return DataLoader(images, batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, **options)


def _end_with_parent(worker: int) -> None:
    """Let a loader process end with its parent, also a killed one: torch's own can wait on a full pipe for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
