"""The weights that are part of the package."""

import csv
import json
from pathlib import Path

import numpy as np
import pack_weights
import pytest
import timm
import torch
from extras import needs
from PIL import Image
from safetensors import safe_open
from timm.data import create_dataset, resolve_data_config

import timm_models

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "cifar10"
NAMES = [name for name in timm.list_pretrained() if name.endswith(".cifar10") and name.startswith("hbnet")]
named = pytest.mark.parametrize("name", NAMES)


def test_timm_lists_them():
    assert NAMES == ["hbnet20.cifar10", "hbnet56.cifar10"]
    assert set(NAMES) <= set(timm.list_models("hbnet*", pretrained=True))


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@named
def test_the_file_is_loaded_in_full_precision(name):
    cfg = timm.get_pretrained_cfg(name)
    model = timm.create_model(name, pretrained=True)
    state = model.state_dict()
    with safe_open(cfg.file, "pt") as file:
        assert set(file.keys()) == state.keys()
        for key in state:
            stored = file.get_tensor(key)
            assert torch.equal(stored.to(state[key].dtype), state[key]), key
            full = not stored.is_floating_point() or key.endswith(("running_mean", "running_var", "rule"))
            assert full or stored.dtype == torch.float16, key
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_the_files_are_small():
    files = list((Path(timm_models.__file__).parent / "weights").glob("*.safetensors"))
    assert len(files) == len(NAMES)
    assert sum(file.stat().st_size for file in files) < 3e6


@named
def test_timm_adapts_them(name):
    trained = timm.create_model(name, pretrained=True)
    grey = timm.create_model(name, pretrained=True, in_chans=1, num_classes=3)
    colours = trained.conv1.weight.sum(1, keepdim=True)
    assert torch.allclose(grey.conv1.weight, colours, atol=2e-3)  # timm adds them in the file's half precision
    assert torch.equal(grey.layer3[-1].conv2.weight, trained.layer3[-1].conv2.weight)
    features = timm.create_model(name, pretrained=True, features_only=True)
    assert torch.equal(features.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)


def test_another_rule_is_refused():
    with pytest.raises(RuntimeError, match="beta2"):
        timm.create_model("hbnet20.cifar10", pretrained=True, beta2=-0.5)


@named
def test_the_stated_accuracy_is_what_timms_script_measured(name):
    with (ROOT / "docs" / "results" / "weights.csv").open(encoding="utf-8") as file:
        measured = {row["model"]: row["top1"] for row in csv.DictReader(file)}
    assert f"top-1 {measured[name]} % of the test images" in timm.get_pretrained_cfg(name).description
    page = (ROOT / "docs" / "guide" / "trained-weights.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {measured[name]} % |" in page


@named
def test_the_configuration_has_what_timm_needs(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.num_classes, cfg.input_size, cfg.license) == (10, (3, 32, 32), "apache-2.0")
    assert len(cfg.label_names) == 10
    assert "CIFAR-10" in cfg.description
    assert "file" not in cfg.to_dict(remove_source=True)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the images of CIFAR-10 are not beside the repository")
@named
def test_accuracy_is_as_stated(name):
    """1,000 images have a standard error below one point."""
    model = timm.create_model(name, pretrained=True).eval()
    config = resolve_data_config(model=model)
    labels = torch.tensor(json.loads((SHARED / "test_labels.json").read_text())[:1000])
    pixels = np.asarray(Image.open(SHARED / "test_batch.png")).reshape(-1, 32, 32, 3)[:1000]
    images = torch.tensor(pixels).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        right = (model((images / 255 - mean) / std).argmax(1) == labels).float().mean().item()
    stated = float(timm.get_pretrained_cfg(name).description.split("top-1 ")[1].split(" %")[0])
    assert abs(100 * right - stated) < 3


# --- the commands that made them --------------------------------------------------------------------------------------


def test_images_become_folders_that_timm_reads(tmp_path):
    needs("nni")
    import image_folders

    generator = np.random.default_rng(0)
    arrays = {f"x_{part}": generator.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": generator.permutation(np.arange(24) % 12) for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **arrays, **labels)
    image_folders.main([str(tmp_path / "out"), "--data", str(tmp_path / "images.npz")])
    for split, part in (("train", "train"), ("validation", "test")):
        found = create_dataset("", root=str(tmp_path / "out"), split=split)
        assert len(found) == 24
        for index in range(24):
            image, label = found[index]
            original = int(Path(found.filename(index)).stem)
            assert label == labels[f"y_{part}"][original]
            assert np.array_equal(np.asarray(image), arrays[f"x_{part}"][original])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_checkpoint_of_timms_script_becomes_a_file(layout, tmp_path, monkeypatch):
    model = timm.create_model("hbnet20", num_classes=3).to(memory_format=layout)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    monkeypatch.setattr("sys.argv", ["", str(tmp_path / "last.pth.tar"), str(tmp_path / "out.safetensors")])
    pack_weights.main()
    loaded = timm.create_model("hbnet20", num_classes=3, checkpoint_path=str(tmp_path / "out.safetensors"))
    for key, value in model.state_dict().items():
        full = not value.is_floating_point() or key.endswith(pack_weights.FULL_PRECISION)
        assert torch.equal(loaded.state_dict()[key], value if full else value.half().float()), key
