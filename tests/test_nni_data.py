"""Images of searches and trainings: every source the same, an order that is a function of seed and epoch, bad files."""

import numpy as np
import pytest
import torch
from extras import needs

needs("nni", "sklearn")

from PIL import Image

from nni_spaces.runs.data import EpochSampler, ImageSet, SeededImages, make_loaders, read_images


def test_every_source_gives_the_same_images(tmp_path):
    digits = read_images("digits", 40)
    assert digits.images.shape == (40, 1, 8, 8)
    assert digits.classes == 10
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    images = digits.images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", x_train=images, y_train=digits.labels.numpy())
    for part in ("", "train/"):
        for i, label in enumerate(digits.labels.tolist()):
            folder = tmp_path / f"folder{bool(part)}" / f"{part}{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i, :, :, 0]).save(folder / f"{i:03}.png")
    assert torch.equal(read_images(tmp_path / "a.npz").images, digits.images)
    for name in ("folderFalse", "folderTrue"):
        found = read_images(tmp_path / name)
        order, ours = (torch.argsort(labels, stable=True) for labels in (digits.labels, found.labels))
        assert torch.equal(found.images[ours], digits.images[order])
        assert torch.equal(found.labels[:10], torch.arange(10)), "classes take turns"


def test_an_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(10, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(i for _, i in order(0, 3)) == list(range(10))
    assert {e for e, _ in order(0, 3)} == {3}
    assert order(0, 3) == order(0, 3)
    assert [i for _, i in order(0, 3)] != [i for _, i in order(0, 4)]
    assert order(0, 3) != order(1, 3)


def test_augmentation_shifts_flips_and_cuts():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(4, 3, 1, 1)
    data = ImageSet(images, torch.zeros(4, dtype=torch.int64), 2)
    plain = SeededImages(data, torch.arange(4), 0)
    shifted = SeededImages(data, torch.arange(4), 0, padding=2)
    assert torch.equal(plain[0, 1][0], plain[5, 1][0])
    assert torch.equal(shifted[0, 1][0], shifted[0, 1][0])
    assert not torch.equal(shifted[0, 1][0], shifted[1, 1][0])
    flips = [shifted[e, 0][0][0, 8, 4] > shifted[e, 0][0][0, 8, 10] for e in range(40)]
    assert 8 < sum(flips) < 32
    cut = SeededImages(data, torch.arange(4), 0, cutout=6)[0, 0][0]
    assert 9 <= (cut == 0).all(0).sum() <= 36
    assert abs(torch.stack([plain[0, i][0] for i in range(4)]).mean()) < 1e-5


@pytest.mark.parametrize("side", [1, 3, 5, 16])
def test_a_square_of_the_given_side_is_cut_out_and_clipped_by_the_image(side):
    images = torch.arange(32 * 32).reshape(1, 1, 32, 32).remainder(251).to(torch.uint8)
    data = ImageSet(images, torch.zeros(1, dtype=torch.int64), 2)
    served = SeededImages(data, cutout=side)
    seen = []
    for epoch in range(60):
        rows, columns = torch.nonzero(served[epoch, 0][0][0] == 0, as_tuple=True)
        height, width = (int(where.max() - where.min()) + 1 for where in (rows, columns))
        assert len(rows) == height * width
        seen += [height, width]
    assert max(seen) == side
    assert min(seen) >= side // 2, "the centre is in the image"


@pytest.mark.parametrize("shape", [(8, 8), (4, 8), (5, 3)])
def test_what_is_cut_out_never_is_the_whole_image(shape):
    images = torch.randint(1, 256, (1, 1, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageSet(images, torch.zeros(1, dtype=torch.int64), 2)
    for side in range(1, max(shape)):
        served = SeededImages(data, cutout=side, moments=([0.0], [1.0]))
        assert all(served[epoch, 0][0].any() for epoch in range(60))
    for side in (max(shape), 16):
        size = f"{shape[0]} × {shape[1]}"
        with pytest.raises(ValueError, match=f"cutout={side}: must be less than {max(shape)}, or it covers .* {size}"):
            SeededImages(data, cutout=side)


def test_halves_are_disjoint_and_cover_the_images():
    data = ImageSet(torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1), torch.arange(20), 20)
    first, second = (set(loader.dataset.labels.tolist()) for loader in make_loaders(data, 5, 0))
    assert first.isdisjoint(second)
    assert len(first | second) == 20


# --- what does not go -------------------------------------------------------------------------------------------------


def test_data_without_two_classes_or_of_several_sizes(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="has 1 class folders, must have at least 2"):
        read_images(tmp_path)
    for name, size in (("one", 8), ("two", 9)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("L", (size, size)).save(tmp_path / name / "a.png")
    with pytest.raises(ValueError, match=r"has images of 8 × 8 \(.*\) and 9 × 9 \(.*\), must have one size"):
        read_images(tmp_path)
    np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="has no array y_train, must have x_train and y_train"):
        read_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x_train=np.zeros((3, 8, 8, 1), np.uint8), y_train=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="has 1 classes, must have at least 2"):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_train=np.zeros((8, 4, 4), np.uint8)), r"x_train is uint8 of shape \(8, 4, 4\), must be uint8 of"),
        (dict(x_train=np.zeros((8, 4, 4, 1))), r"x_train is float64 of shape \(8, 4, 4, 1\), must be uint8 of"),
        (
            dict(y_train=np.zeros(7, np.int64)),
            r"y_train is int64 of shape \(7,\), must be integers ≥ 0 of shape \(8,\)",
        ),
        (dict(y_train=np.arange(8) - 1), "y_train is int64 of shape .* must be integers ≥ 0"),
        (dict(y_train=np.arange(8) / 2), "y_train is float64 of shape .* must be integers ≥ 0"),
    ],
)
def test_arrays_that_are_no_images_or_labels(change, message, tmp_path):
    arrays = dict(x_train=np.zeros((8, 4, 4, 1), np.uint8), y_train=np.arange(8, dtype=np.uint8))
    np.savez(tmp_path / "a.npz", **arrays)
    assert read_images(tmp_path / "a.npz").labels.tolist() == list(range(8))
    content = (tmp_path / "a.npz").read_bytes()
    np.savez(tmp_path / "a.npz", **{**arrays, **change})
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"must be an \.npz file, is damaged"):
        read_images(tmp_path / "a.npz")
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"limit={limit}: must be an integer ≥ 1"):
            read_images("digits", limit)
