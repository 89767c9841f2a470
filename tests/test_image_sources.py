"""What images may come from: every mode of an image and every array is read right or refused by name."""

import io
import os
import random
import socket
import struct
import urllib.error
import urllib.request
import warnings
import zipfile
from http.client import IncompleteRead, RemoteDisconnected

import numpy as np
import pytest
import torch
from extras import needs, needs_version

needs("nni", "sklearn")

from PIL import Image

from nni_spaces.runs import image_sources
from nni_spaces.runs.data import read_images
from nni_spaces.runs.image_files import COLOUR, GREY, GREY_16, pixels
from nni_spaces.runs.image_sources import take_turns

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
OPAQUE = np.full_like(RAMP, 255)


def palette_image(mode="P"):
    image = Image.fromarray(RAMP)
    image.putpalette(COLOURS.tobytes())
    return image if mode == "P" else image.convert(mode)


def image_of(mode):
    """Return an opaque image of a mode, and the pixels that it stands for."""
    ramp, colours = Image.fromarray(RAMP), Image.fromarray(COLOURS)
    if mode == "1":
        return ramp.point(lambda v: 255 * (v > 100), "1"), 255 * (RAMP > 100)
    if mode == "L":
        return ramp, RAMP
    if mode in ("LA", "La"):
        return Image.merge("LA", (ramp, Image.fromarray(OPAQUE))).convert(mode), RAMP
    if mode in ("P", "PA"):
        return palette_image(mode), COLOURS
    if mode in GREY_16:
        values = RAMP.astype(np.int64) * 257 + np.where(RAMP > 100, -128, 128) * (RAMP % 3 != 0)
        values = values.clip(0, 65535).astype("<u2" if mode != "I;16B" else ">u2")
        return Image.frombytes(mode, (16, 16), values.tobytes()), RAMP
    if mode == "RGBa":
        return colours.convert("RGBA").convert("RGBa"), COLOURS
    if mode in TOLERANCE:  # 8 bits of these tell saturated colours badly
        return Image.fromarray(COLOURS // 2 + 64).convert(mode), COLOURS // 2 + 64
    return colours.convert(mode), COLOURS


TOLERANCE = {"YCbCr": 3, "LAB": 12, "HSV": 4}
# Modes that files have, with a format that keeps them.
FILES = {
    "1": "png", "L": "png", "LA": "png", "P": "png", "RGB": "png", "RGBA": "png", "I;16": "png", "I;16B": "tif",
    "CMYK": "tif", "YCbCr": "tif", "LAB": "tif",
}  # fmt: skip


OWN_TIFF = needs_version("pillow", "13.0.0", "cannot read the TIFF files of YCbCr that it writes")


def write_folder(root, image, suffix="png", **options):
    """Write two classes of one image each."""
    for label in "ab":
        (root / label).mkdir(parents=True, exist_ok=True)
        image.save(root / label / f"0.{suffix}", **options)
    return root


def message_of(error):
    """Return the text of an error, which must be one line for a terminal."""
    text = str(error.value)
    assert text
    assert text.isprintable()
    return text


# --- modes of images --------------------------------------------------------------------------------------------------


def test_every_mode_of_pil_is_in_a_table():
    assert set(getattr(Image, "MODES", [])) <= {*GREY, *GREY_16, *COLOUR, "I", "F"}


@pytest.mark.parametrize("mode", [*GREY, *GREY_16, *COLOUR])
def test_an_image_of_every_mode_is_read_as_what_it_shows(mode):
    image, expected = image_of(mode)
    assert image.mode == mode
    found = pixels(image)
    assert found.dtype == np.uint8
    assert found.shape == (16, 16, 1 if mode in GREY + GREY_16 else 3)
    assert abs(found.squeeze().astype(int) - expected).max() <= TOLERANCE.get(mode, 0)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=OWN_TIFF) if mode == "YCbCr" else mode for mode in FILES])
def test_a_file_of_a_mode_is_read_as_what_it_shows(mode, tmp_path):
    image, expected = image_of(mode)
    write_folder(tmp_path, image, FILES[mode])
    with Image.open(tmp_path / "a" / f"0.{FILES[mode]}") as written:
        assert written.mode == mode
    found = read_images(tmp_path).images[0].permute(1, 2, 0).numpy().squeeze()
    assert abs(found.astype(int) - expected).max() <= TOLERANCE.get(mode, 0)


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
def test_16_bits_become_8(suffix, tmp_path):
    """PIL holds those of a PGM, and old ones those of a PNG, in 32 bits."""
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], np.uint16)
    write_folder(tmp_path, Image.frombytes("I;16", (4, 2), values.tobytes()), suffix)
    assert read_images(tmp_path).images[0, 0].tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]


def patched_tiff(path, tag, value):
    """Write 16-bit grey with another value of a tag."""
    image_of("I;16")[0].save(path)
    content = path.read_bytes()
    old = next(v for v in (16, 1) if struct.pack("<HHIHH", tag, 3, 1, v, 0) in content)
    path.write_bytes(
        content.replace(struct.pack("<HHIHH", tag, 3, 1, old, 0), struct.pack("<HHIHH", tag, 3, 1, value, 0))
    )


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: Image.new("F", (16, 16), 0.5).save(path), "mode='F': must be grey of at most 16 bits, or colour"),
        (lambda path: Image.new("I", (16, 16), 70000).save(path), "mode='I': must be grey of at most 16 bits"),
        (lambda path: patched_tiff(path, 258, 12), "mode='I;16': a TIFF of it must have 16 bits, of which 0 is black"),
        (lambda path: patched_tiff(path, 262, 0), "mode='I;16': a TIFF of it must have 16 bits, of which 0 is black"),
    ],
)
def test_pixels_without_a_known_range_are_refused_by_mode(write, message, tmp_path):
    write_folder(tmp_path, image_of("L")[0], "tif")
    write(tmp_path / "b" / "0.tif")
    with pytest.raises(ValueError, match=message) as error:
        read_images(tmp_path)
    assert repr(str(tmp_path / "b" / "0.tif")) in message_of(error)


def with_alpha(mode, alpha):
    image = image_of("LA" if mode in ("LA", "La") else "RGBA")[0]
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


HOLE = np.where(RAMP == 77, 254, 255).astype(np.uint8)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_an_alpha_channel_must_be_opaque(mode):
    if mode == "PA":
        image = palette_image("PA")
        image.putalpha(Image.fromarray(HOLE))
    else:
        image = with_alpha(mode, HOLE)
    assert image.mode == mode
    with pytest.raises(ValueError, match="has transparent pixels, must be opaque"):
        pixels(image)


@pytest.mark.parametrize(
    ("mode", "used", "unused"),
    [
        ("1", 255, None),
        ("L", 77, 78),
        ("I;16", 0, 3),
        ("RGB", (0, 240, 0), (1, 2, 3)),
        ("P", 77, None),
        ("P", bytes([255] * 77 + [0]), bytes([255] * 256)),
    ],
)
def test_a_transparent_colour_must_not_occur(mode, used, unused, tmp_path):
    image, expected = image_of(mode)
    if mode == "L":
        expected = expected.copy()
        expected[expected == 78] = 79
        image = Image.fromarray(expected)
    write_folder(tmp_path, image, transparency=used)
    with pytest.raises(ValueError, match=r"0\.png': .*has transparent pixels, must be opaque"):
        read_images(tmp_path)
    if unused is not None:
        write_folder(tmp_path, image, transparency=unused)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read_images(tmp_path).images[0].permute(1, 2, 0).numpy().squeeze()
        assert (found == expected).all()


def test_grey_images_among_colours_get_three_equal_channels(tmp_path):
    write_folder(tmp_path, Image.fromarray(RAMP))
    assert read_images(tmp_path).images.shape == (2, 1, 16, 16)
    Image.fromarray(COLOURS).save(tmp_path / "b" / "0.png")
    grey, colour = read_images(tmp_path).images
    assert (grey == torch.from_numpy(RAMP)).all()
    assert torch.equal(colour, torch.from_numpy(COLOURS).permute(2, 0, 1))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_hidden_folders_and_files_are_no_images(split, tmp_path):
    for part in ("train", "test"):
        write_folder(tmp_path / part, Image.fromarray(RAMP))
    for junk in (".ipynb_checkpoints", "__pycache__", "__MACOSX", "a/.ipynb_checkpoints", "b/__MACOSX/deep"):
        (tmp_path / split / junk).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / split / junk / "1.png")
    (tmp_path / split / "a" / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / split / "a" / "notes.txt").write_text("no image")
    found = read_images(tmp_path, split=split)
    assert (found.labels.tolist(), found.classes) == ([0, 1], 2)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/a/up", ".."),
        ("train/a/root", "../../.."),
        ("train/up", ".."),
        ("train/c", "a"),
        ("train/b/more", "../a"),
    ],
)
def test_a_folder_that_is_met_twice_is_refused(link, target, tmp_path):
    write_folder(tmp_path / "train", Image.fromarray(RAMP))
    (tmp_path / link).symlink_to(target)
    with pytest.raises(ValueError, match="links to a folder that is read already or holds it") as error:
        read_images(tmp_path)
    assert repr(str(tmp_path / link)) in message_of(error)


def test_links_to_folders_and_images_elsewhere_are_followed(tmp_path):
    write_folder(tmp_path / "store", Image.fromarray(RAMP))
    (tmp_path / "data" / "a" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a" / "deep" / "0.png").symlink_to(tmp_path / "store" / "a" / "0.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "store" / "b")
    assert read_images(tmp_path / "data").labels.tolist() == [0, 1]


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # the absolute path may be too long for one


@pytest.mark.parametrize(
    "make",
    [
        fifo,
        unix_socket,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/tty"),
        lambda path: path.symlink_to("nowhere.png"),
    ],
    ids=["pipe", "socket", "zeros", "terminal", "dangling"],
)
def test_what_is_no_file_is_named_and_not_opened(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(write_folder(tmp_path, Image.fromarray(RAMP)) / "b" / "1.png")
    with pytest.raises(ValueError, match=r"b/1\.png': must be a regular file"):
        read_images(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_damaged_image_is_named(suffix, damage, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"0.{suffix}")
    content = (tmp_path / f"0.{suffix}").read_bytes()
    write_folder(tmp_path / "data", Image.fromarray(COLOURS))
    bad = {"empty": b"", "truncated": content[: len(content) * 2 // 3], "text": b"no image\n" * 9}[damage]
    (tmp_path / "data" / "b" / "1.png").write_bytes(bad)
    with pytest.raises(ValueError, match=r"b/1\.png': must be an image that can be read \(.+\)") as error:
        read_images(tmp_path / "data")
    message_of(error)


def test_the_content_and_not_the_ending_decides_but_no_program_is_started(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(args))
    write_folder(tmp_path, image_of("L")[0])
    image_of("L")[0].save(tmp_path / "b" / "0.png", format="GIF")
    assert (read_images(tmp_path).images == torch.from_numpy(RAMP)).all()
    Image.fromarray(COLOURS).save(tmp_path / "b" / "0.png", format="EPS")  # PIL gives these to Ghostscript
    with pytest.raises(ValueError, match=r"b/0\.png': must be an image that can be read"):
        read_images(tmp_path)
    assert not started


@pytest.mark.parametrize("most", [255, 100])
def test_more_pixels_than_pil_thinks_safe_are_refused(most, tmp_path, monkeypatch):
    """It warns from its limit on, and fails from twice that on."""
    write_folder(tmp_path, Image.fromarray(RAMP))
    assert len(read_images(tmp_path).labels) == 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(ValueError, match=r"a/0\.png': .*256 pixels.*decompression bomb"):
        read_images(tmp_path)


def test_images_that_do_not_fit_in_memory_are_refused_after_the_first(tmp_path, monkeypatch):
    write_folder(tmp_path, Image.fromarray(RAMP))
    monkeypatch.setattr(image_sources, "LIMIT_BYTES", 511)
    with pytest.raises(ValueError, match="has 2 images of 16 × 16, must have at most 511 bytes"):
        read_images(tmp_path)


def test_images_of_several_sizes_are_named_with_an_example_each(tmp_path):
    write_folder(tmp_path, Image.fromarray(RAMP))
    Image.new("L", (9, 16)).save(tmp_path / "b" / "1.png")
    with pytest.raises(ValueError, match=r"16 × 16 \(.*/a/0.png'\) and 16 × 9 \(.*/b/1.png'\), must have one size"):
        read_images(tmp_path)


def test_a_class_without_training_images_is_named_and_one_without_test_images_is_none(tmp_path):
    for part in ("train", "test"):
        write_folder(tmp_path / part, Image.fromarray(RAMP))
    (tmp_path / "test" / "a" / "0.png").unlink()
    found = read_images(tmp_path, split="test")
    assert (found.labels.tolist(), found.classes) == ([1], 2)
    (tmp_path / "test" / "b" / "0.png").unlink()
    (tmp_path / "train" / "b" / "0.png").rename(tmp_path / "train" / "b" / "0.npy")
    for split, name in (("train", "b"), ("test", "a")):
        with pytest.raises(ValueError, match=f"{split}': has no images in '{name}', must have at least 1"):
            read_images(tmp_path, split=split)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
    write_folder(tmp_path, Image.fromarray(RAMP))
    (tmp_path / "a" / "closed").mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed"):
        read_images(tmp_path)


# --- arrays -----------------------------------------------------------------------------------------------------------


def arrays(**change):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3), np.uint8)
    labels = np.arange(8, dtype=np.uint8) % 4
    return {**dict(x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4]), **change}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "shape",
    [(8, 3, 32, 32), (8, 1, 8, 8), (8, 3, 32, 3), (8, 3, 3, 3), (8, 1, 1, 1), (8, 4, 4, 0), (8, 4, 4), (8, 0, 4, 1)],
)
def test_arrays_of_another_layout_are_refused(shape, split, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(**{f"x_{split}": np.zeros(shape, np.uint8), f"y_{split}": np.arange(8) % 4}))
    message = (
        rf"x_{split} is uint8 of shape \({shape[0]}, .*, must be uint8 of \(n, height, width, channels\), with fewer"
    )
    with pytest.raises(ValueError, match=message) as error:
        read_images(tmp_path / "a.npz", split=split)
    message_of(error)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_of_the_documented_layout_are_read(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 5, channels), np.uint8)
    for name, stored in (("rows", images), ("columns", np.asfortranarray(images))):
        np.savez(tmp_path / f"{name}.npz", **arrays(x_train=stored))
        found = read_images(tmp_path / f"{name}.npz")
        assert found.images.is_contiguous()
        assert torch.equal(found.images, torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["<u8", ">i2", "i1", "<i8"])
def test_labels_of_every_integer_type_are_read(kind, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(y_train=(np.arange(8) % 4).astype(kind)))
    assert read_images(tmp_path / "a.npz").labels.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (dict(y_train=np.arange(8) % 3 * 100_000), "train", "y_train has 3 labels from 0 to 200000, must be 0 … 2"),
        (dict(y_train=np.arange(8) % 3 * 100_000), "test", "y_train has 3 labels from 0 to 200000, must be 0 … 2"),
        (dict(y_train=np.arange(8) % 4 + 1), "train", "y_train has 4 labels from 1 to 4, must be 0 … 3"),
        (dict(y_train=np.arange(8) % 2 * 2**62), "train", f"y_train has 2 labels from 0 to {2**62}, must be 0 … 1"),
        (
            dict(y_train=np.arange(8, dtype=np.uint64) % 2 * np.uint64(2**64 - 1)),
            "train",
            f"y_train has 2 labels from 0 to {2**64 - 1}, must be 0 … 1",
        ),
        (dict(y_train=np.array([0, 1, 2, 3] * 2)[:, None]), "test", r"y_train is int64 of shape \(8, 1\)"),
        (dict(y_train=np.array(0)), "test", r"y_train is int64 of shape \(\), must be integers ≥ 0 of shape \(1,\)"),
        (dict(y_test=np.arange(4) + 1), "test", "y_test has the label 4, must be 0 … 3, as y_train"),
        (dict(y_test=np.full(4, 2**64 - 1, np.uint64)), "test", f"y_test has the label {2**64 - 1}, must be 0 … 3"),
        (dict(y_test=np.arange(4) - 1), "test", "y_test is int64 of shape .* must be integers ≥ 0"),
        (dict(x_test=np.zeros((0, 4, 5, 3), np.uint8), y_test=np.arange(0)), "test", "x_test has no images"),
        (dict(x_train=np.zeros((0, 4, 5, 3), np.uint8), y_train=np.arange(0)), "train", "x_train has no images"),
        (dict(y_train=np.array([0, 1] * 4, object)), "train", "y_train must be an array, is damaged .*[Oo]bject"),
        (dict(y_train=np.array(["a", "b"] * 4)), "train", "y_train is <U1 of shape"),
    ],
)
def test_labels_that_name_no_classes_are_refused(change, split, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(**change))
    with pytest.raises(ValueError, match=message) as error:
        read_images(tmp_path / "a.npz", split=split)
    assert repr(str(tmp_path / "a.npz")) in message_of(error)


def test_test_images_have_the_classes_of_training(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(x_test=arrays()["x_test"][:1], y_test=np.array([1])))
    assert read_images(tmp_path / "a.npz", split="test").classes == 4


def header(**change):
    """Return the bytes of an array whose header says something else."""
    file, said = io.BytesIO(), dict(descr="|u1", fortran_order=False, shape=(8, 4, 5, 3))
    np.lib.format.write_array_header_1_0(file, {**said, **change})
    return file.getvalue() + bytes(8 * 4 * 5 * 3)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "member",
    [
        header(shape=(10**9, 10**3, 10**3, 3)),
        header(shape=(10**6, 10**3, 10**3, 3)),
        header(shape=(2**40, 2**40, 2**40, 3)),
        header(shape=(-8, 4, 5, 3)),
        header(shape=(8, 4, 5, -3)),
        header(shape=(7, 4, 5, 3)),
        header(shape=(True, 10**300)),
        header(descr="|V4000000000"),
        header(descr="|O"),
        header(descr=[("a", "|O")]),
        header(shape="12"),
        header().replace(b"'shape'", b"'shame'"),
        header().replace(b"{", b"("),
        header().replace(b"(8, 4", b"((((("),
        header().replace(b"\x93NUMPY\x01", b"\x93NUMPY\x09"),
        b"\x93NUMPY\2\0" + struct.pack("<I", 20_000) + b" " * 20_000,  # numpy has three lines about it
        header()[:7],
        header()[:100],
        header()[:-1],
        b"",
        b"\x80\x04K\x01.",
    ],
)
@pytest.mark.filterwarnings("ignore:Reading .*additional header parsing")
def test_an_impossible_or_damaged_member_is_one_line_that_names_it(member, compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("x_train.npy", member)
        for name, value in arrays().items():
            if name != "x_train":
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, value)
    with pytest.raises(ValueError, match=r"x_train must be an array, is damaged \(.+\)") as error:
        read_images(tmp_path / "a.npz")
    assert repr(str(tmp_path / "a.npz")) in message_of(error)


@pytest.mark.parametrize("name", ["x_train", "y_train"])
def test_an_array_over_the_limit_is_refused_unread(name, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", **arrays(**{name: np.zeros(10**6)}))
    monkeypatch.setattr(image_sources, "LIMIT_BYTES", 10**6)
    with pytest.raises(ValueError, match=f"{name} has 8000128 bytes, must have at most 1000000"):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive", b"\x80\x04K\x01."])
def test_a_file_that_is_no_archive_is_named(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz': must be an \.npz file, is damaged"):
        read_images(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", arrays()["x_train"])
    (tmp_path / "b.npy").rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz': must be an \.npz file, is damaged"):
        read_images(tmp_path / "a.npz")


def test_a_pipe_with_the_name_of_a_source_is_none(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz': must be 'digits', 'cifar10', an \.npz file or a folder of images"):
        read_images(tmp_path / "a.npz")


# --- any damage -------------------------------------------------------------------------------------------------------


def mutated(content, rng):
    """Return bytes of which some are other ones, are gone or have come."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(found))
        kind = rng.random()
        if kind < 0.7:
            found[place] = rng.choice([0, 255, found[place] ^ 1 << rng.randrange(8)])
        elif kind < 0.85:
            del found[place : place + rng.randrange(1, 20)]
        else:
            found[place:place] = rng.randbytes(rng.randrange(1, 20))
        if not found:
            break
    return bytes(found)


def outcome(source):
    """Return the images, or None and the one line that refuses them."""
    try:
        return read_images(source), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_archive_is_the_original_or_one_line_that_names_it(save, tmp_path):
    """Every byte of the arrays is under a checksum, so what is read is what was written."""
    path = tmp_path / "a.npz"
    save(path, **arrays())
    original, content, rng = read_images(path), path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        path.write_bytes(mutated(content, rng))
        found, message = outcome(path)
        if found is None:
            refused += 1
            assert repr(str(path)) in message
            assert message.isprintable()
        else:
            assert torch.equal(found.images, original.images)
            assert torch.equal(found.labels, original.labels)
    assert refused > 100


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "pgm", "gif", "webp"])
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_image_is_one_or_one_line_that_names_it(suffix, tmp_path):
    path = tmp_path / "b" / "1.png"
    write_folder(tmp_path, Image.fromarray(COLOURS))
    buffer = io.BytesIO()
    kind = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}.get(suffix, suffix)
    image_of("L" if suffix == "pgm" else "P" if suffix == "gif" else "RGB")[0].save(buffer, kind)
    rng = random.Random(0)
    for _ in range(150):
        path.write_bytes(mutated(buffer.getvalue(), rng))
        found, message = outcome(tmp_path)
        if found is None:
            assert repr(str(path)) in message
            assert message.isprintable()
        else:
            assert found.images.shape == (3, 3, 16, 16)


# --- a limit ----------------------------------------------------------------------------------------------------------


class SortedCIFAR:
    """Stands in for torchvision's, sorted by class."""

    url = "https://example.org/cifar"

    def __init__(self, root, train, download):
        count = 40 if train else 20
        self.targets = sorted(i % 10 for i in range(count))
        self.data = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)


def sorted_source(kind, tmp_path, monkeypatch):
    """Return a source of ten classes that has all images of a class before those of the next."""
    if kind == "cifar10":
        monkeypatch.setattr("torchvision.datasets.CIFAR10", SortedCIFAR)
        return "cifar10"
    parts = {split: SortedCIFAR(None, split == "train", None) for split in ("train", "test")}
    if kind == "npz":
        found = {f"x_{split}": part.data for split, part in parts.items()}
        np.savez(tmp_path / "a.npz", **found, **{f"y_{split}": part.targets for split, part in parts.items()})
        return tmp_path / "a.npz"
    for split, part in parts.items():
        for i, (image, label) in enumerate(zip(part.data, part.targets)):
            (tmp_path / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / split / str(label) / f"{i:02}.png")
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_limit_keeps_the_first_images_where_these_have_every_class(split):
    whole, found = read_images("digits", split=split), read_images("digits", 100, split)
    assert torch.equal(found.images, whole.images[:100])
    assert torch.equal(found.labels, whole.labels[:100])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["cifar10", "npz", "folder"])
def test_a_limit_keeps_every_class(kind, split, tmp_path, monkeypatch):
    source = sorted_source(kind, tmp_path, monkeypatch)
    whole = read_images(source, split=split)
    for limit in (10, 17, 10_000):
        found = read_images(source, limit, split)
        assert found.classes == 10
        counts = torch.bincount(found.labels, minlength=10)
        expected = torch.bincount(whole.labels).clamp(max=limit // 10)
        assert ((counts - expected >= 0) & (counts - expected <= 1)).all()
        assert counts.sum() == min(limit, len(whole.labels))
        for label in range(10):  # the first of each class, in its own order
            kept, every = (part.images[part.labels == label] for part in (found, whole))
            assert torch.equal(kept, every[: len(kept)])
        assert torch.equal(found.images, read_images(source, limit, split).images)
    with pytest.raises(ValueError, match="limit=9: must be at least 10, an image of each class"):
        read_images(source, 9, split)


def test_a_limit_reads_no_image_that_it_leaves_out(tmp_path):
    write_folder(tmp_path, Image.fromarray(RAMP))
    (tmp_path / "b" / "1.png").write_bytes(b"")
    assert read_images(tmp_path, 2).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"b/1\.png"):
        read_images(tmp_path, 3)


def test_classes_take_turns():
    labels = np.array([2, 2, 0, 1, 2, 0, 2])
    order = take_turns(labels)
    assert labels[order].tolist() == [0, 1, 2, 0, 2, 2, 2]
    assert order.tolist() == [2, 3, 0, 5, 1, 4, 6]


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        urllib.error.URLError("[Errno -2] Name or service not known"),
        TimeoutError("timed out"),
        RemoteDisconnected("Remote end closed connection"),
        IncompleteRead(b""),
        RuntimeError("File not found or corrupted."),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_cifar10_without_network_is_one_line_that_names_where_it_is_from(fault, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise fault

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        OSError, match=r"data='cifar10': cannot be downloaded from https.* to 'data/cifar10' \("
    ) as error:
        read_images("cifar10")
    assert type(error.value) is OSError
    message_of(error)


def test_a_page_that_is_not_cifar10_is_no_traceback_either(tmp_path, monkeypatch):
    """A network that answers everything with a page to log in."""

    class Page(io.BytesIO):
        length, url = 5, "https://example.org/login"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda request: Page(b"login"))
    with pytest.raises(OSError, match=r"data='cifar10': cannot be downloaded"):
        read_images("cifar10")
