"""Checkpoints of mmengine backbones: the formats that load, and files that are refused with nothing loaded."""

import argparse
import copy
import os

import pytest
import timm
import torch
from equality import randomise
from mm_backbones import SMALL, build, image, small, whole
from safetensors.torch import save_file

from optinspired_plugins import mm

# --- what loads -------------------------------------------------------------------------------------------------------


def save_plain(net, folder):
    torch.save(net.state_dict(), folder / "net.pth")
    return dict(checkpoint=str(folder / "net.pth"))


def save_timm_training(net, folder):
    """What timm's train.py writes; the moving average is the net, the weights are others."""
    other = randomise(copy.deepcopy(net), seed=9)
    average = timm.utils.ModelEmaV3(net)
    saver = timm.utils.CheckpointSaver(
        other, torch.optim.SGD(other.parameters(), 0.1), argparse.Namespace(model="net"), average,
        checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(0, 1.0)
    return dict(checkpoint=str(folder / "last.pth.tar"))


def save_safetensors(net, folder):
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "net.safetensors")
    return dict(checkpoint=folder / "net.safetensors")


def save_distributed(net, folder):
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / "net.pth")
    return dict(checkpoint=str(folder / "net.pth"))


def save_in_a_model(net, folder):
    state = {f"backbone.{k}": v for k, v in net.state_dict().items() if k.split(".")[0] not in mm.HEADS}
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(1)}, "meta": {"epoch": 1}}, folder / "net.pth")
    return dict(checkpoint=str(folder / "net.pth"), prefix="backbone.")


FORMATS = [save_plain, save_timm_training, save_safetensors, save_distributed, save_in_a_model]


@pytest.mark.parametrize("save", FORMATS)
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2)], ids=str)
@small
def test_checkpoints_load(cfg, indices, save, tmp_path):
    net = whole(cfg).eval()
    backbone = build(cfg, out_indices=indices, init_cfg=dict(type="Pretrained", **save(net, tmp_path))).eval()
    first = 0 if cfg["type"] == "CellNet" else 1
    expected = net.forward_intermediates(image(), [i + first for i in indices], intermediates_only=True)
    backbone.init_weights()
    for output, feature in zip(backbone(image()), expected):
        torch.testing.assert_close(output, feature)


def test_a_resnet_of_timms_loads_into_hbnet(tmp_path):
    settings = save_plain(timm.create_model("resnet18"), tmp_path)
    backbone = build(dict(type="HBNet", depth=18, init_cfg=dict(type="Pretrained", **settings)))
    with pytest.warns(UserWarning, match=r"this HBNet has beta1=1.0, beta2=-1.0, post_act=False") as caught:
        backbone.init_weights()
    assert len(caught) == 1


@small
def test_what_a_model_saves_of_its_backbone_loads(cfg, tmp_path):
    backbone = randomise(build(cfg, out_indices=(0, 1)))
    torch.save({f"backbone.{k}": v for k, v in backbone.state_dict().items()}, tmp_path / "model.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "model.pth"), prefix="backbone")
    loaded = build(cfg, out_indices=(0, 1), init_cfg=init_cfg)
    loaded.init_weights()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[name])


def test_other_initialisations_are_mmengines():
    backbone = build(SMALL[0], init_cfg=[dict(type="Constant", layer="Conv2d", val=0.25)])
    backbone.init_weights()
    assert (backbone.body.conv1.weight == 0.25).all()
    assert (backbone.body.bn1.weight == 1).all()
    without = build(SMALL[0])
    before = without.body.conv1.weight.clone()
    without.init_weights()
    assert torch.equal(without.body.conv1.weight, before)


# --- bad input --------------------------------------------------------------------------------------------------------


def _state(**changes):
    return {**whole(SMALL[0]).state_dict(), **changes}


def _without(key):
    state = _state()
    del state[key]
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: timm.create_model("densenet121").state_dict(),
            r"missing: conv1.weight.*unknown: features.conv0.weight",
        ),
        (
            lambda: timm.create_model("resnet18").state_dict(),
            r"of another shape: layer1.0.conv1.weight ",
        ),
        (lambda: _without("layer2.1.conv2.weight"), r"1 missing: layer2.1.conv2.weight$"),
        (
            lambda: whole(SMALL[0], beta2=-0.5).state_dict(),
            r"the checkpoint's network has beta2=-0.5, this one beta2=-1.0: pass beta2=-0.5 to load it",
        ),
        (lambda: _state(extra=torch.zeros(1)), r"1 unknown: extra"),
        (
            lambda: _state(**{"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"conv1.weight \(64, 1, 7, 7\), not \(64, 3, 7, 7\)",
        ),
        (lambda: {f"backbone.{k}": v for k, v in _state().items()}, r"prefix='backbone.' takes"),
        (lambda: {}, "must be a state dict"),
        (lambda: [1, 2], "must be a state dict"),
        (lambda: {"state_dict": {"conv1.weight": 3}}, "must be a state dict"),
        (lambda: whole(SMALL[0]), "must be a state dict"),
    ],
)
def test_foreign_checkpoints_name_keys_and_load_nothing(content, message, tmp_path):
    torch.save(content(), tmp_path / "net.pth")
    backbone = build(SMALL[0], init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth")))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        backbone.init_weights()
    assert f"checkpoint={str(tmp_path / 'net.pth')!r}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_files_that_are_none(tmp_path):
    backbone = build(SMALL[0], init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "none.pth")))
    with pytest.raises(FileNotFoundError, match=r"none.pth'.*existing file"):
        backbone.init_weights()
    for name in ("none.pth", "none.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        backbone.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / name))
        with pytest.raises(ValueError, match="must be a state dict, or a file of timm's or mmengine's"):
            backbone.init_weights()


def test_a_prefix_that_is_not_there(tmp_path):
    init_cfg = dict(type="Pretrained", prefix="backbone.", **save_plain(whole(SMALL[0]), tmp_path))
    with pytest.raises(ValueError, match=r"prefix='backbone.': must begin keys .* begin with bn1, conv1, fc"):
        build(SMALL[0], init_cfg=init_cfg).init_weights()


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_runs_no_code(tmp_path, monkeypatch):
    """Nor with the switch that mmengine's resuming needs."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": _state(), "message_hub": _Touch(tmp_path / "made")}, tmp_path / "net.pth")
    backbone = build(SMALL[0], init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "net.pth")))
    with pytest.raises(ValueError, match="must be a state dict"):
        backbone.init_weights()
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "net.pth")
    assert (tmp_path / "made").exists(), "the file does what it is for"
