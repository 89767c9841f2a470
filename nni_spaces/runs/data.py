"""Images of searches and retrainings, in an order and with augmentations determined by seed and epoch.

Batches of an epoch do not depend on earlier epochs, so that a resumed run sees the same batches. The key of an item is
(epoch, index), and its augmentation is drawn from (seed, epoch, index) in any process.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from optinspired_plugins._checks import check_int
from optinspired_plugins.run_folder import process_rank

from .image_files import Form
from .image_sources import open_source, take_turns

__all__ = ["EpochSampler", "ImageSet", "SeededImages", "make_loader", "make_loaders", "read_images", "read_run_images"]


Transform = Callable[[Tensor], Tensor]


PART = 2**20  # numbers that are converted at a time
WHITE = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}


class ImageSet(NamedTuple):
    """Images, shape (n, channels, height, width); labels, shape (n,); the number of classes.

    Images are uint8, uint16, or float32 from 0 to 1. Labels are int64, or float32 for regression, which has one class.
    """

    images: Tensor
    labels: Tensor
    classes: int

    @property
    def white(self) -> int:
        """The value of white."""
        return WHITE[self.images.dtype]


# Over 40 lines: most of them describe arguments and errors.
def read_images(
    source: str | Path,
    limit: int | None = None,
    split: str = "train",
    resize: int | None = None,
    keep_depth: bool = False,
    regression: bool = False,
    store: Path | None = None,
) -> ImageSet:
    """Read the training or the test images of a source.

    The sources:

    - ``"digits"``: scikit-learn's 1,797 scans, every fifth of a class for testing.
    - ``"cifar10"``, ``"cifar100"``, ``"svhn"``: torchvision's, downloaded once to ``data/NAME``.
    - A name of timm's ``create_dataset`` with a prefix: ``"torch/fashion_mnist"``, ``"hfds/…"``, ``"hfids/…"``,
      ``"tfds/…"``, or ``"wds/…"`` with the folder of the shards. All images are read, and must have one size.
    - An ``.npz`` file with ``x_train``, ``y_train``, ``x_test`` and ``y_test``. Images are uint8 of (n, height, width,
      channels), with fewer channels than rows and columns, so that (n, channels, height, width) is refused. Labels are
      integers of (n,). Training labels are 0 to classes − 1, each at least once; test labels are a subset. An array may
      have 32 GB.
    - A folder with ``train/<class>/*.png`` and the same classes in ``test``, ``val`` or ``validation``, or with
      ``<class>/*.png`` and no test images. Every class has a training image. Files are PNG, JPEG, BMP, PPM, TIFF, WebP
      or GIF, of one size; only the first frame is read. Names that begin with a dot, ``__pycache__`` and ``__MACOSX``
      are skipped. Links are followed, but a folder that is reached twice is refused.

    Images of a folder have one channel if all of them are grey, and otherwise three. 16-bit grey is scaled to 8 bits.
    Other integers, floating point and transparent pixels are refused: they have no range, or no background. With
    ``keep_depth``, 16-bit grey of files and uint16 of arrays stay, and floating point from 0 to 1 is accepted.

    Args:
        source: one of the above.
        limit: number of images to use. They are the first ones, or, if these lack a class, the first of each class in
            turns.
        split: ``"train"`` or ``"test"``.
        resize: the side of all images: the shorter side becomes this long, and the centre is cut out; ``None`` to keep
            their size.
        keep_depth: see above.
        regression: labels are real numbers; the source must be an ``.npz`` file.
        store: a folder for a file without a name that holds the images of a folder or of timm, instead of memory.

    Raises:
        ValueError: the source is unknown, or one of its files has another form or is damaged; it has fewer than two
            classes or no such split; ``limit`` is out of range. The message names the file.
        OSError: a file cannot be read, or CIFAR-10 cannot be downloaded.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: must be 'train' or 'test'")
    for name, value in (("limit", limit), ("resize", resize)):
        if value is not None:
            check_int(name, value, 1)
    opened = open_source(source, split, Form(resize, keep_depth, store), regression)
    if opened.classes < 2 and not regression:
        raise ValueError(f"data={str(source)!r}: has {opened.classes} classes, must have at least 2")
    chosen: Any = slice(limit if regression else None)
    if limit is not None and not regression:
        present = len(np.unique(opened.labels))
        if limit < present:
            raise ValueError(f"limit={limit!r}: must be at least {present}, an image of each class")
        holds_all = len(np.unique(opened.labels[:limit])) == present
        chosen = slice(limit) if holds_all else take_turns(opened.labels)[:limit]
    images = torch.from_numpy(opened.read(chosen))
    return ImageSet(images, torch.from_numpy(opened.labels[chosen]), opened.classes)


def read_run_images(settings: Any, split: str = "train", store: Path | None = None) -> ImageSet:
    """Return the images of the settings of a search or a retraining; see :func:`read_images`."""
    form = dict(resize=settings.resize, keep_depth=settings.keep_depth, regression=settings.regression)
    return read_images(settings.data, settings.limit, split, store=store, **form)


def channel_moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, in grey levels; the latter rounded to float32.

    Sums are exact for integers, and a part of the images is converted at a time.
    """
    count, kind = images[:, 0].numel(), torch.float64 if images.is_floating_point() else torch.int64
    totals, squares = torch.zeros(2, images.shape[1], dtype=kind)
    for part in images.split(max(1, PART // images[0].numel())):
        values = part.to(kind).transpose(0, 1).flatten(1)
        totals += values.sum(1)
        squares += (values * values).sum(1)
    means = [total / count for total in totals.tolist()]
    if count < 2:
        return means, [math.nan] * len(means)
    variances = [(count * q - s * s) / (count * (count - 1)) for s, q in zip(totals.tolist(), squares.tolist())]
    return means, [float(np.float32(math.sqrt(max(variance, 0)))) for variance in variances]


class SeededImages(Dataset):
    """Normalised and augmented images with keys (epoch, index).

    Args:
        data: the images.
        indices: indices of the images to use; ``None`` for all.
        seed: seed of the augmentation.
        padding: largest shift of a random crop, in pixels; 0 for no crops and flips.
        flip: flip every second image that is cropped. Only images wider than 8 pixels are flipped: digits are not.
        cutout: side of a square that is set to 0, clipped at the edge of the image; 0 for none.
        moments: mean and standard deviation of each channel, in grey levels; ``None`` for the moments of ``data``.
        transform: a function of an image of ``data`` that returns one of the same type and shape, for instance of
            torchvision's ``transforms.v2``; ``None`` for none. It is called before all others, with torch's random
            numbers seeded by (seed, epoch, index).

    Raises:
        ValueError: a square of ``cutout`` can cover a whole image; an image after ``transform`` has another form.
    """

    def __init__(
        self,
        data: ImageSet,
        indices: Tensor | None = None,
        seed: int = 0,
        padding: int = 0,
        cutout: int = 0,
        moments: tuple[list[float], list[float]] | None = None,
        transform: Transform | None = None,
        flip: bool = True,
    ) -> None:
        side = max(data.images.shape[-2:])
        if cutout >= side:
            height, width = data.images.shape[-2:]
            raise ValueError(
                f"cutout={cutout!r}: must be less than {side}, or it covers an image of {height} × {width}"
            )
        self.images, self.indices = data.images, indices
        self.labels = data.labels if indices is None else data.labels[indices]
        self.seed, self.padding, self.cutout, self.transform = seed, padding, cutout, transform
        self.flip = flip and data.images.shape[-1] > 8
        mean, std = channel_moments(data.images) if moments is None else moments
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std).clamp(min=1e-6)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | Tensor]:
        """Return the image of ``key`` = (epoch, index), float32, and its label."""
        epoch, index = key
        image = self.images[index if self.indices is None else int(self.indices[index])]
        if self.transform is not None:
            image = self._transformed(self.transform, image, np.random.SeedSequence((self.seed, epoch, index)))
        image = (image.float() - self.mean) / self.std
        if self.padding or self.cutout:
            image = self._augmented(image, np.random.default_rng((self.seed, epoch, index)))
        label = self.labels[index]
        return image, label if label.is_floating_point() else int(label)

    def _transformed(self, transform: Transform, image: Tensor, seed: np.random.SeedSequence) -> Tensor:
        state = torch.get_rng_state()
        # torch.manual_seed would seed the generators of GPUs, too.
        torch.default_generator.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        try:
            found = transform(image.clone())  # it may work in place
        finally:
            torch.set_rng_state(state)
        described = [
            f"{each.dtype} of shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            for each in (found, image)
        ]
        if described[0] != described[1]:
            raise ValueError(f"transform={transform!r}: returns {described[0]} for {described[1]}, must be the same")
        return found

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
            # The square begins half a side before the centre, as in DARTS.
            image[:, max(y - half, 0) : y - half + self.cutout, max(x - half, 0) : x - half + self.cutout] = 0
        return image


class EpochSampler(Sampler):
    """Yield every index once per epoch as (epoch, index), in an order determined by seed and epoch.

    Args:
        length: number of items.
        seed: seed of the order; ``None`` for the order of the items.
        parts: number of processes that share an epoch in equal parts. A random order leaves out at most ``parts`` − 1
            items.
    """

    def __init__(self, length: int, seed: int | None, parts: int = 1) -> None:
        self.length, self.seed, self.parts, self.epoch = length, seed, parts, 0
        self.part = process_rank() if parts > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this."""
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
    data: ImageSet,
    batch_size: int,
    seed: int,
    workers: int = 0,
    padding: int = 4,
    parts: int = 1,
    transform: Transform | None = None,
    flip: bool = True,
) -> tuple[DataLoader, DataLoader]:
    """Return loaders of two random halves, for the weights and for α (§9.3).

    See :class:`SeededImages` and :class:`EpochSampler` for the arguments.

    Raises:
        ValueError: the part of a process in a half is smaller than a batch.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.labels)))
    half = len(order) // 2
    loaders = []
    for part, indices in enumerate((order[:half], order[half : 2 * half])):
        sampler = EpochSampler(half, seed + part, parts)
        if len(sampler) < batch_size:
            of = "half of the images" if parts == 1 else f"half of the images by {parts} processes"
            raise ValueError(f"batch_size={batch_size!r}: must be at most {len(sampler)}, {of}")
        images = SeededImages(data, indices, seed + part, padding, transform=transform, flip=flip)
        loaders.append(make_loader(images, batch_size, sampler, workers))
    return loaders[0], loaders[1]


def make_loader(
    images: SeededImages, batch_size: int, sampler: EpochSampler, workers: int, drop_last: bool = True
) -> DataLoader:
    """Return a loader that does not change torch's random state."""
    # With its own generator: a loader draws seeds of workers, by default from the generator of Gumbel's softmax.
    options: dict[str, Any] = dict(generator=torch.Generator())
    if workers:
        options |= dict(persistent_workers=True, worker_init_fn=_end_with_parent)
    return DataLoader(images, batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, **options)


def _end_with_parent(worker: int) -> None:
    """End a loader process with its parent, also if that is killed: torch's can wait on a full pipe for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
