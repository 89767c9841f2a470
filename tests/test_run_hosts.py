"""What hosts bring to a run: Lightning's arguments and loggers, data sets of torchvision and timm, transforms."""

import csv
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from extras import needs

needs("nni", "sklearn")

import pytorch_lightning as pl
from PIL import Image
from torchvision.transforms import v2

from nni_spaces.runs import callback
from nni_spaces.runs.callback import DECIDED, make_logger, trainer_options
from nni_spaces.runs.data import ImageSet, SeededImages, make_loaders, read_images
from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings

TINY = dict(data="digits", limit=40, epochs=1, cells=3, channels=2, batch_size=16, padding=0)
SKIP = {"version": 1, "rule": "hb", "normal": [[["skip_connect", s] for s in (1, 1, 0)]] * 1}


class Seen(pl.Callback):
    """Count epochs, and remember them in the checkpoint."""

    epochs = 0

    def on_train_epoch_end(self, trainer, module):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}


# --- Lightning's Trainer ----------------------------------------------------------------------------------------------


def test_further_arguments_join_those_of_the_run():
    run, seen = SimpleNamespace(folder="run"), Seen()
    plain = trainer_options(run, 3, "cpu", 1)
    assert (plain["callbacks"], plain["logger"], plain["enable_progress_bar"]) == ([run], False, False)
    for given in (seen, [seen], (seen,)):
        found = trainer_options(run, 3, "cpu", 1, dict(callbacks=given, enable_progress_bar=True, profiler="simple"))
        assert found["callbacks"] == [seen, run], "the run's callback is the last: its checkpoint has all states"
        assert (found["logger"], found["enable_progress_bar"], found["profiler"]) == (False, True, "simple")


@pytest.mark.parametrize("name", DECIDED)
def test_arguments_that_a_run_decides_are_refused(name):
    with pytest.raises(ValueError, match=f"trainer has '{name}': must not, .* decides it"):
        trainer_options(SimpleNamespace(folder="run"), 3, "cpu", 1, {name: None})


def runs(trainer, tmp_path):
    search(SearchSettings(**TINY, nodes=1), tmp_path / "search", accelerator="cpu", trainer=trainer)
    settings = RetrainSettings(genotype={**SKIP, "reduction": SKIP["normal"]}, **TINY, cutout=0)
    retrain(settings, tmp_path / "retrain", accelerator="cpu", trainer=trainer)


def test_loggers_and_callbacks_reach_both_runs(tmp_path):
    seen = Seen()
    runs(dict(logger=make_logger("csv", tmp_path), callbacks=[seen], log_every_n_steps=1), tmp_path)
    assert seen.epochs == 2
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        names = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert names >= {"train_loss", "alpha_top1", "test_top1"}
    state = torch.load(tmp_path / "search" / "checkpoint.pt", weights_only=True)
    assert {"epochs": 1} in state["callbacks"].values()


def test_loggers_have_names(tmp_path, monkeypatch):
    assert isinstance(make_logger("csv", tmp_path), pl.loggers.CSVLogger)
    with pytest.raises(ValueError, match="logger='mlflow': must be one of 'csv', 'tensorboard', 'wandb'"):
        make_logger("mlflow", tmp_path)

    def missing(folder):
        raise ModuleNotFoundError("wandb")

    monkeypatch.setitem(callback.LOGGERS, "wandb", missing)
    with pytest.raises(ModuleNotFoundError, match="logger='wandb': needs the package wandb, which is not installed"):
        make_logger("wandb", tmp_path)


# --- data sets --------------------------------------------------------------------------------------------------------


def test_cifar100_and_svhn_have_names(monkeypatch):
    pixels = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    made = []

    def cifar100(root, download, train):
        made.append((root, train))
        return SimpleNamespace(data=pixels, targets=[i % 100 for i in range(200)])

    def svhn(root, download, split):
        made.append((root, split))
        return SimpleNamespace(data=pixels.transpose(0, 3, 1, 2), labels=np.arange(200) % 10)

    monkeypatch.setattr("torchvision.datasets.CIFAR100", cifar100)
    monkeypatch.setattr("torchvision.datasets.SVHN", svhn)
    for name, classes in (("cifar100", 100), ("svhn", 10)):
        for split in ("train", "test"):
            found = read_images(name, split=split)
            assert (found.classes, found.labels.dtype, found.images.shape) == (classes, torch.int64, (200, 3, 32, 32))
            assert found.images[:, 0, 0, 0].tolist() == list(range(200))
    assert made == [
        ("data/cifar100", True), ("data/cifar100", False), ("data/svhn", "train"), ("data/svhn", "test")
    ]  # fmt: skip


def write_mnist(folder, prefix, images, labels):
    """Write images and labels in the format of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
        (folder / f"{prefix}-{name}").write_bytes(head + array.astype(np.uint8).tobytes())


def test_a_data_set_of_timm_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    folder = tmp_path / "data" / "fashion_mnist" / "FashionMNIST" / "raw"
    write_mnist(folder, "train", images, np.arange(6) % 3)
    write_mnist(folder, "t10k", images[:2], np.arange(2))
    found = read_images("torch/fashion_mnist")
    assert torch.equal(found.images[:, 0], torch.from_numpy(images))
    assert (found.labels.tolist(), found.classes) == ([0, 1, 2, 0, 1, 2], 3)
    assert read_images("torch/fashion_mnist", split="test").labels.tolist() == [0, 1]
    assert read_images("torch/fashion_mnist", limit=3).labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"data='torch/no': timm cannot open its test images \(test: Unknown .*; val:"):
        read_images("torch/no", split="test")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("RGB", (8, 8), 0), ("RGB", (8, 9), 1)], r"images of 8 × 8 \('image 0'\) and 9 × 8 \('image 1'\)"),
        ([("L", (8, 8), 0), ("L", (8, 8), 2)], "its train part has 2 labels from 0 to 2, must be 0 … 1"),
        ([("L", (8, 8), 0), ("L", (8, 8), -1)], "its train part is int64 of shape .* must be integers ≥ 0"),
        ([("L", (8, 8), 0.5)], r"its train part has labels \[0.5\], must be integers"),
        ([], "its train part has no images, must have at least 1"),
    ],
)
@pytest.mark.parametrize("kind", [list, iter])
def test_images_of_timm_that_do_not_fit_are_named(items, message, kind, monkeypatch):
    pairs = [(Image.new(mode, size), label) for mode, size, label in items]
    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **options: kind(pairs))
    with pytest.raises(ValueError, match=f"data='hfds/a/b': (has )?{message}"):
        read_images("hfds/a/b")


def test_a_source_of_timm_says_where_its_images_are(monkeypatch):
    asked = []

    def create_dataset(name, root, split, **options):
        asked.append((name, root, split))
        raise ImportError("no module named 'datasets'")

    monkeypatch.setattr("timm.data.create_dataset", create_dataset)
    for name in ("hfds/a/b", "wds/some/folder"):
        with pytest.raises(
            ValueError, match=r"timm cannot open its train images \(train: no module named 'datasets'\)"
        ):
            read_images(name)
    assert asked == [("hfds/a/b", None, "train"), ("wds/some/folder", "some/folder", "train")]


# --- transforms -------------------------------------------------------------------------------------------------------


def images_of(side=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(8) % 2, 2)


@pytest.mark.parametrize(
    "transform",
    [v2.RandomResizedCrop(12, antialias=True), v2.TrivialAugmentWide(), v2.Compose([v2.ColorJitter(0.9, 0.9)])],
    ids=lambda transform: type(transform).__name__,
)
def test_a_transform_is_drawn_from_seed_epoch_and_index(transform):
    plain, served = (SeededImages(images_of(), seed=3, transform=each) for each in (None, transform))
    state = torch.get_rng_state()
    drawn = [served[epoch, 1][0] for epoch in range(6)]
    assert torch.equal(torch.get_rng_state(), state), "the numbers of the search are not used"
    torch.manual_seed(9)
    assert all(torch.equal(served[epoch, 1][0], image) for epoch, image in enumerate(drawn))
    assert len({image.numpy().tobytes() for image in drawn}) > 3
    assert any(not torch.equal(image, plain[0, 1][0]) for image in drawn)
    other = SeededImages(images_of(), seed=4, transform=transform)
    assert any(not torch.equal(other[epoch, 1][0], image) for epoch, image in enumerate(drawn))


def test_a_transform_reaches_both_halves_and_leaves_the_images(monkeypatch):
    data = images_of()
    before = data.images.clone()
    for loader in make_loaders(data, 2, 0, padding=0, transform=lambda image: image.zero_()):
        batch = next(iter(loader))[0]
        assert torch.equal(batch, (-loader.dataset.mean / loader.dataset.std).expand_as(batch))
    assert torch.equal(data.images, before)


@pytest.mark.parametrize(
    ("transform", "found"),
    [
        (lambda image: image[:, 1:], r"torch.uint8 of shape \(3, 11, 12\)"),
        (lambda image: image / 255, r"torch.float32 of shape \(3, 12, 12\)"),
        (lambda image: image.numpy(), "ndarray"),
    ],
)
def test_a_transform_keeps_type_and_shape(transform, found):
    served = SeededImages(images_of(), transform=transform)
    with pytest.raises(
        ValueError, match=rf"transform=.*: returns {found} for torch.uint8 of shape \(3, 12, 12\), must"
    ):
        served[0, 0]


def test_a_transform_reaches_a_search_and_a_training(tmp_path):
    used = []

    def transform(image):
        used.append(image.shape)
        return image

    search(SearchSettings(**TINY, nodes=1), tmp_path / "search", accelerator="cpu", transform=transform)
    searched = len(used)
    settings = RetrainSettings(genotype={**SKIP, "reduction": SKIP["normal"]}, **TINY, cutout=0)
    retrain(settings, tmp_path / "retrain", accelerator="cpu", transform=transform)
    assert (searched, len(used) - searched) == (32, 32), "training images only"
