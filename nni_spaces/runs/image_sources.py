"""Sources of images: digits, data sets of torchvision and timm, an ``.npz`` file or a folder.

Opening a source reads its labels; images are read by index. Files are checked, and an error is one line that names the
file.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optinspired_plugins._extras import from_extra

from .image_files import Form, checked_floats, collect, pixels, read_image, reason, resized

__all__ = ["ImageSource", "open_source", "take_turns"]

# ImageNet at 64 × 64 has half of these bytes.
LIMIT_BYTES = 32_000_000_000
FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
# Folders of other programs beside images; names that begin with a dot are hidden, too.
HIDDEN = ("__pycache__", "__MACOSX")
# Names, and torchvision's classes.
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
TIMM = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


class ImageSource(NamedTuple):
    """Labels, shape (n,), the number of classes, and a function that reads images.

    Labels are int64, or float32 for regression, which has one class. ``read`` takes indices or a slice and returns
    images, shape (n, channels, height, width).
    """

    labels: np.ndarray
    classes: int
    read: Callable[[Any], np.ndarray]


def open_source(source: str | Path, split: str, form: Form, regression: bool) -> ImageSource:
    """Open the training or the test images of a source, see :func:`nni_spaces.runs.data.read_images`."""
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path, split, form, regression)
    if regression:
        raise ValueError(f"regression=True with data={str(source)!r}: must be an .npz file")
    if str(source) == "digits":
        return _digits(split, form)
    if str(source) in TORCHVISION:
        return _torchvision(str(source), split, form)
    if path.is_dir():
        return _folder(path, split, form)
    if str(source).startswith(TIMM):
        return _timm(str(source), split, form)
    sets = ", ".join([*list(TORCHVISION)[1:], *(f"{prefix}…" for prefix in TIMM)])
    raise ValueError(
        f"data={str(source)!r}: must be 'digits', 'cifar10', an .npz file or a folder of images, or a data set ({sets})"
    )


def take_turns(labels: np.ndarray) -> np.ndarray:
    """Return the order in which classes take turns: the first image of each class, then the second of each."""
    return np.lexsort((labels, _ranks(labels)))


def _ranks(labels: np.ndarray) -> np.ndarray:
    """Return the position of each image within its class."""
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks


def _of_arrays(images: np.ndarray, labels: Any, classes: int, form: Form) -> ImageSource:
    """Return the source of images of shape (n, height, width, channels)."""
    values = np.asarray(labels)
    kind = np.float32 if values.dtype.kind == "f" else np.int64

    def read(chosen: Any) -> np.ndarray:
        return resized(np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2)), form.resize)

    return ImageSource(values.astype(kind), classes, read)


# --- digits, torchvision and timm -------------------------------------------------------------------------------------


def _digits(split: str, form: Form) -> ImageSource:
    with from_extra("viz"):
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = (_ranks(labels) % 5 == 4) == (split == "test")
    images = (images.reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8)
    return _of_arrays(images[chosen], labels[chosen], 10, form)


def _torchvision(name: str, split: str, form: Form) -> ImageSource:
    from torchvision import datasets

    root = f"data/{name}"
    make = getattr(datasets, TORCHVISION[name])
    part: dict[str, Any] = dict(split=split) if name == "svhn" else dict(train=split == "train")
    try:
        data = make(root, download=True, **part)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: the download has a wrong hash
        url = make.split_list[split][0] if name == "svhn" else make.url
        raise OSError(f"data={name!r}: cannot be downloaded from {url} to {root!r} ({reason(error)})") from error
    images, labels = (data.data.transpose(0, 2, 3, 1), data.labels) if name == "svhn" else (data.data, data.targets)
    return _of_arrays(images, labels, 100 if name == "cifar100" else 10, form)


def _timm(name: str, split: str, form: Form) -> ImageSource:
    """Read a data set of timm."""
    where = f"data={name!r}"
    labels, images = [], []
    for image, label in _timm_items(name, split, where):
        labels.append(label)
        images.append(pixels(image, form.keep_depth))
    if not labels:
        raise ValueError(f"{where}: its {split} part has no images, must have at least 1")
    values = np.asarray(labels)
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError(f"{where}: its {split} part has labels {labels[:3]!r}, must be integers")
    _check_labels(where, f"its {split} part", values, len(images))
    classes = _count_classes(where, values, "its train part") if split == "train" else int(values.max()) + 1
    names = [f"image {i}" for i in range(len(images))]
    read = collect(where, names, images.__getitem__, form, LIMIT_BYTES).__getitem__
    return ImageSource(values.astype(np.int64), classes, read)


def _timm_items(name: str, split: str, where: str) -> Iterable[Any]:
    """Return the pairs of image and label of a part of one of timm's data sets."""
    from timm.data import create_dataset

    kind, _, rest = name.partition("/")
    roots = {"torch": f"data/{rest}", "wds": rest}
    errors = []
    for part in FOLDERS[split]:
        try:
            found = create_dataset(name, roots.get(kind), part, download=True, is_training=False)
            return (found[i] for i in range(len(found))) if hasattr(found, "__getitem__") else found
        except Exception as error:  # of any library that timm uses
            errors.append(f"{part}: {reason(error)}")
    raise ValueError(f"{where}: timm cannot open its {split} images ({'; '.join(errors)})")


# --- an .npz file -----------------------------------------------------------------------------------------------------


def _arrays(path: Path, split: str, form: Form, regression: bool) -> ImageSource:
    where = f"data={str(path)!r}"
    names = dict.fromkeys((f"x_{split}", f"y_{split}", "y_train"))  # each once
    images, labels, *rest = _read_arrays(path, where, list(names))
    training = rest[0] if rest else labels
    images = _checked_images(where, f"x_{split}", images, form.keep_depth)
    if regression:
        _check_targets(where, f"y_{split}", labels, len(images))
        classes, labels = 1, labels.astype(np.float32)
    else:
        _check_labels(where, f"y_{split}", labels, len(images))
        _check_labels(where, "y_train", training, training.size)
    if not len(labels):
        raise ValueError(f"{where}: x_{split} has no images, must have at least 1")
    if not regression:
        classes = _count_classes(where, training)
        if labels.max() >= classes:
            raise ValueError(f"{where}: y_{split} has the label {labels.max()}, must be 0 … {classes - 1}, as y_train")
    return _of_arrays(images, labels, classes, form)


def _checked_images(where: str, name: str, images: np.ndarray, keep_depth: bool) -> np.ndarray:
    """Return images as uint8, or with ``keep_depth`` also as uint16 or as float32 from 0 to 1."""
    kinds = ("uint8", "uint16", "float16", "float32", "float64") if keep_depth else ("uint8",)
    if images.dtype.name not in kinds or images.ndim != 4 or not 1 <= images.shape[3] < min(images.shape[1:3]):
        layout = "(n, height, width, channels), with fewer channels than rows and columns"
        allowed = f"must be {', '.join(kinds)} of {layout}"
        if not keep_depth and images.dtype.kind == "f":
            allowed += ", or keep_depth for floating point from 0 to 1"
        raise ValueError(f"{where}: {name} is {images.dtype} of shape {images.shape}, {allowed}")
    return checked_floats(f"{where}: {name}", images) if images.dtype.kind == "f" else images


def _read_arrays(path: Path, where: str, names: Sequence[str]) -> list[np.ndarray]:
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            members = set(archive.namelist())
        except Exception as error:  # damaged bytes can raise any error
            raise ValueError(f"{where}: must be an .npz file, is damaged ({reason(error)})") from error
        missing = [name for name in names if f"{name}.npy" not in members]
        if missing:
            raise ValueError(f"{where}: has no array {missing[0]}, must have {' and '.join(names)}")
        return [_read_array(archive, where, name) for name in names]


def _read_array(archive: zipfile.ZipFile, where: str, name: str) -> np.ndarray:
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > LIMIT_BYTES:
        raise ValueError(f"{where}: {name} has {member.file_size} bytes, must have at most {LIMIT_BYTES}")
    try:
        with archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if file.read(1):
                raise ValueError("its header says less than it holds")
    except Exception as error:  # damaged bytes can raise any error, also MemoryError
        raise ValueError(f"{where}: {name} must be an array, is damaged ({reason(error)})") from error
    return array


def _check_labels(where: str, name: str, labels: np.ndarray, count: int) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (count,) or (labels < 0).any():
        allowed = f"must be integers ≥ 0 of shape ({count},)"
        raise ValueError(f"{where}: {name} is {labels.dtype} of shape {labels.shape}, {allowed}")


def _check_targets(where: str, name: str, targets: np.ndarray, count: int) -> None:
    if targets.dtype.kind not in "fiu" or targets.shape != (count,) or not np.isfinite(targets).all():
        allowed = f"must be finite numbers of shape ({count},)"
        raise ValueError(f"{where}: {name} is {targets.dtype} of shape {targets.shape}, {allowed}")


def _count_classes(where: str, labels: np.ndarray, name: str = "y_train") -> int:
    """Return the number of classes; ValueError unless every label from 0 to classes − 1 occurs."""
    values = np.unique(labels)
    if not np.array_equal(values, np.arange(len(values))):
        allowed = (
            f"must be 0 … {len(values) - 1}, each at least once, as np.unique({name}, return_inverse=True) has them"
        )
        raise ValueError(f"{where}: {name} has {len(values)} labels from {values[0]} to {values[-1]}, {allowed}")
    return len(values)


# --- a folder ---------------------------------------------------------------------------------------------------------


def _folder(root: Path, split: str, form: Form) -> ImageSource:
    part = next((root / name for name in FOLDERS[split] if (root / name).is_dir()), root)
    where = f"data={str(part)!r}"
    if part == root and split == "test":
        raise ValueError(f"{where}: has no test images, must have a folder {' or '.join(FOLDERS[split])}")
    classes = _class_folders(part)
    if len(classes) < 2:
        raise ValueError(f"{where}: has {len(classes)} class folders, must have at least 2")
    if split == "test" and (root / "train").is_dir() and classes != _class_folders(root / "train"):
        raise ValueError(f"{where}: has other class folders than train, must have the same")
    files = _image_files(where, part, classes)
    empty = [name for name, paths in zip(classes, files) if not paths]
    if empty and (split == "train" or len(empty) == len(classes)):
        raise ValueError(f"{where}: has no images in {empty[0]!r}, must have at least 1")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in files])
    order = take_turns(labels)
    ordered = np.asarray([path for paths in files for path in paths], dtype=object)[order]

    def read(chosen: Any) -> np.ndarray:
        paths = ordered[chosen]
        return collect(where, paths, lambda i: read_image(paths[i], form.keep_depth), form, LIMIT_BYTES)

    return ImageSource(labels[order], len(classes), read)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _class_folders(part: Path) -> list[str]:
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _image_files(where: str, part: Path, classes: Sequence[str]) -> list[list[str]]:
    """Return the files of each class; ValueError where links lead into a folder twice."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    real = part.resolve()
    entered = {str(real), *map(str, real.parents)}

    def files(root: Path) -> list[str]:
        paths = []
        for folder, inner, names in os.walk(root, onerror=_raise, followlinks=True):
            if os.path.realpath(folder) in entered:
                raise ValueError(f"{where}: {folder!r} links to a folder that is read already or holds it, must not")
            entered.add(os.path.realpath(folder))
            inner[:] = [name for name in inner if not _is_hidden(name)]
            paths += [(folder, n) for n in names if n.lower().endswith(IMG_EXTENSIONS) and not _is_hidden(n)]
        return [os.path.join(*pair) for pair in sorted(paths)]

    return [files(part / name) for name in classes]


def _raise(error: OSError) -> None:
    raise error
