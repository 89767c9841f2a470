"""Images as arrays: pixels of PIL's modes, other sizes, and many images in one array, in memory or in a file."""

from __future__ import annotations

import math
import os
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["COLOUR", "GREY", "GREY_16", "Form", "collect", "pixels", "read_image", "reason", "resized"]

# Only these: for some other formats PIL starts a program. GIF files often have the ending of another format.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
GREY = ("1", "L", "LA", "La")
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA = ("LA", "La", "P", "PA", "RGBA", "RGBa")


class Form(NamedTuple):
    """The form in which images are read.

    Attributes:
        resize: the side of all images: the shorter side becomes this long, and the centre is cut out; ``None`` to keep
            their size.
        keep_depth: keep 16-bit grey and floating point from 0 to 1; otherwise 16 bits become 8.
        store: a folder for a file without a name that holds the images, and that the system removes with the process;
            ``None`` for memory.
    """

    resize: int | None = None
    keep_depth: bool = False
    store: Path | None = None

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array for images.

        Raises:
            OSError: the disk has too little space.
        """
        if self.store is None:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile(dir=self.store) as file:
            size = math.prod(shape) * dtype.itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a file with holes ends the process where the disk becomes full
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=shape)


def reason(error: Exception) -> str:
    """Return one line about an error in a file."""
    return textwrap.shorten(str(error), 200) or type(error).__name__


def collect(
    where: str, names: Sequence[str], read: Callable[[int], np.ndarray], form: Form, limit_bytes: int
) -> np.ndarray:
    """Return images of one size as an array of shape (n, channels, height, width).

    Grey images have three equal channels if another has colour.

    Args:
        where: the source, for messages.
        names: the name of each image, for messages; there is at least one.
        read: returns an image, of shape (height, width, channels), from its index.
        form: size, depth and place.
        limit_bytes: maximal size of an array in memory.

    Raises:
        ValueError: images differ in size or depth, or need more memory.
    """
    array: np.ndarray | None = None
    for i, name in enumerate(names):
        image = resized(read(i).transpose(2, 0, 1), form.resize)
        first = image if array is None else array[0]
        _check_alike(where, (first, names[0]), (image, name))
        if form.store is None and len(names) * image.nbytes > limit_bytes:
            size = f"{len(names)} images of {image.shape[1]} × {image.shape[2]}"
            raise ValueError(f"{where}: has {size}, must have at most {limit_bytes} bytes")
        if array is None or len(image) > len(first):
            wider = form.empty((len(names), *image.shape), image.dtype)
            if array is not None:
                wider[:i] = array[:i]
            array = wider
        array[i] = image
    assert array is not None
    return array


def _check_alike(where: str, first: tuple[np.ndarray, str], other: tuple[np.ndarray, str]) -> None:
    described = [
        (f"{image.shape[1]} × {image.shape[2]}", str(image.dtype), f"({name!r})") for image, name in (first, other)
    ]
    for (one, *_, a), (two, *_, b), must in (
        (described[0], described[1], "one size, or resize them"),
        (described[0][1:], described[1][1:], "one depth"),
    ):
        if one != two:
            raise ValueError(f"{where}: has images of {one} {a} and {two} {b}, must have {must}")


def resized(images: np.ndarray, side: int | None) -> np.ndarray:
    """Return images, shape (…, channels, height, width), as squares; ``None`` keeps them."""
    if side is None:
        return images
    from torchvision.transforms.v2 import functional

    given = torch.from_numpy(np.ascontiguousarray(images))
    exact = given if given.dtype == torch.uint8 else given.float()
    found = functional.center_crop(functional.resize(exact, [side], antialias=True), [side, side])
    if given.dtype == torch.uint16:
        found = found.round().clamp(0, 65535)
    return found.to(given.dtype).contiguous().numpy()


# --- one image --------------------------------------------------------------------------------------------------------


def read_image(path: str, keep_depth: bool = False) -> np.ndarray:
    """Return an image file as (height, width, channels).

    Raises:
        ValueError: it is no regular file, or no image that can be read.
        OSError: the file cannot be read.
    """
    from PIL import Image

    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise ValueError(f"{path!r}: must be a regular file")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as image:
                image.load()
                return pixels(image, keep_depth)
        except Exception as error:  # damaged bytes can raise any error
            raise ValueError(f"{path!r}: must be an image that can be read ({reason(error)})") from error


def pixels(image: Any, keep_depth: bool = False) -> np.ndarray:
    """Return PIL's image as (height, width, channels), with one channel if it is grey.

    ValueError if the mode has no range that could be scaled to 0 … 255, or pixels are transparent.
    """
    # PNG and PPM have at most 16 bits, also where PIL's mode has 32.
    if image.mode in GREY_16 or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _pixels_of_16_bits(image, keep_depth)
    if image.mode == "F" and keep_depth:
        return checked_floats("mode='F'", np.array(image)[..., None])
    if image.mode not in GREY + COLOUR:
        allowed = "" if keep_depth else ", or floating point with keep_depth"
        raise ValueError(f"mode={image.mode!r}: must be grey of at most 16 bits, or colour{allowed}")
    target = "L" if image.mode in GREY else "RGB"
    if image.mode in ALPHA or "transparency" in image.info:
        image = image.convert("LA" if target == "L" else "RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise ValueError("has transparent pixels, must be opaque: put it on a background")
    array = np.asarray(image.convert(target))
    return array[..., None] if array.ndim == 2 else array


def _pixels_of_16_bits(image: Any, keep_depth: bool) -> np.ndarray:
    from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

    tags = getattr(image, "tag_v2", {})
    if tags.get(BITSPERSAMPLE, (16,)) != (16,) or tags.get(PHOTOMETRIC_INTERPRETATION, 1) != 1:
        raise ValueError(f"mode={image.mode!r}: a TIFF of it must have 16 bits, of which 0 is black")
    values = np.asarray(image).astype(np.uint32)
    if (values == image.info.get("transparency", -1)).any():
        raise ValueError("has transparent pixels, must be opaque: put it on a background")
    if keep_depth:
        return values.astype(np.uint16)[..., None]
    return ((values + 128) // 257).astype(np.uint8)[..., None]  # 65535 is 255, to the nearest


def checked_floats(name: str, values: np.ndarray) -> np.ndarray:
    """Return floating-point pixels as float32; ValueError unless they are from 0 to 1."""
    if not ((values >= 0) & (values <= 1)).all():  # also if one is not a number
        raise ValueError(f"{name}: has values outside of 0 to 1, must be black at 0 and white at 1")
    return values.astype(np.float32)
