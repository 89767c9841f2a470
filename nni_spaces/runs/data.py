"""Images for searches: read once, and served in an order and with augmentations that seed and epoch determine.

A killed search goes on as if nothing had happened only if the batches of an epoch do not depend on the ones before.
So an item is asked for as (epoch, index), and its crop is drawn from (seed, epoch, index), in whichever process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from optinspired_plugins._checks import check_int

from .image_sources import open_source, take_turns

__all__ = ["EpochSampler", "ImageSet", "SeededImages", "make_loader", "make_loaders", "process_rank", "read_images"]


class ImageSet(NamedTuple):
    """Images, uint8, shape (n, channels, height, width); labels, int64, shape (n,); and how many classes."""

    images: Tensor
    labels: Tensor
    classes: int


def read_images(source: str | Path, limit: int | None = None, split: str = "train") -> ImageSet:
    """Read the training or the test images of a source.

    The sources:

    - ``"digits"``: scikit-learn's 1,797 scans, every fifth of a class for testing.
    - ``"cifar10"``: torchvision's, in ``data/cifar10``, where it downloads them once.
    - An ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test``. Images are uint8 of (n, height, width,
      channels), with fewer channels than rows and columns, so that (n, channels, height, width) is refused. Labels are
      integers of (n,); those of training are 0 to classes − 1, each at least once, and those of testing among them. An
      array may have 32 GB.
    - A folder with ``train/<class>/*.png`` and the same classes in ``test``, ``val`` or ``validation``, or with
      ``<class>/*.png`` and no test images. Every class has a training image. Files are PNG, JPEG, BMP, PPM, TIFF, WebP
      or GIF, of one size, and of several frames the first counts. Names that begin with a dot, ``__pycache__`` and
      ``__MACOSX`` are left out. Links are followed, but a folder that is met twice is refused.

    Images of a folder have one channel if all that are read are grey, and else three. 16-bit grey is scaled to 8 bits.
    Other integers, floating point and transparent pixels are refused: they have no range, or no background.

    Args:
        source: one of the above.
        limit: keep the first so many images. Where these miss a class, the classes take turns instead, each in its own
            order.
        split: ``"train"`` or ``"test"``.

    Raises:
        ValueError: the source is none of these, or a file of it is not as above or is damaged; it has fewer than two
            classes or no such split; ``limit`` is out of range. The message names the file.
        OSError: a file cannot be read, or CIFAR-10 cannot be downloaded.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: must be 'train' or 'test'")
    if limit is not None:
        check_int("limit", limit, 1)
    found = open_source(source, split)
    if found.classes < 2:
        raise ValueError(f"data={str(source)!r}: has {found.classes} classes, must have at least 2")
    chosen: Any = slice(None)
    if limit is not None:
        present = len(np.unique(found.labels))
        if limit < present:
            raise ValueError(f"limit={limit!r}: must be at least {present}, an image of each class")
        holds_all = len(np.unique(found.labels[:limit])) == present
        chosen = slice(limit) if holds_all else take_turns(found.labels)[:limit]
    images = torch.from_numpy(found.read(chosen)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.from_numpy(found.labels[chosen]), found.classes)


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

    Raises:
        ValueError: a square of ``cutout`` can cover a whole image.
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
        side = max(data.images.shape[-2:])
        if cutout >= side:
            height, width = data.images.shape[-2:]
            raise ValueError(
                f"cutout={cutout!r}: must be less than {side}, or it covers an image of {height} × {width}"
            )
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
