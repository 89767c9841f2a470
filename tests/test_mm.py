"""The mmengine backbones: timm's features to the bit, freezing, memory, conversions, and what they refuse."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from equality import assert_same_function, randomise
from extras import needs
from measure import peak_memory
from mm_backbones import SMALL, build, image, small, summed
from torch import nn

needs("mmengine")

from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS

# Type and options, timm's name and options, index of output 0 in timm's features, strides.
FAMILIES = [
    (dict(type="HBNet", depth=18), ("hbnet18", {}), 1, (4, 8, 16, 32)),
    (dict(type="HBNet", depth=50), ("hbnet50", {}), 1, (4, 8, 16, 32)),
    (dict(type="HBNet", depth=50, output_stride=8), ("hbnet50", dict(output_stride=8)), 1, (4, 8, 8, 8)),
    (dict(type="HBNet", depth=20), ("hbnet20", {}), 1, (1, 2, 4)),
    (dict(type="AGDNet", depth=121), ("agdnet121", {}), 1, (4, 8, 16, 32)),
    (dict(type="AGDNet", depth=40), ("agdnet40_k12", {}), 1, (1, 2, 4)),
    (dict(type="OptNet", depth=18, algorithm="agd"), ("optnet18", dict(algorithm="agd")), 1, (4, 8, 16, 32)),
    (dict(type="OptNet", depth=20), ("optnet20", {}), 1, (1, 2, 4)),
    (dict(type="CellNet", cells=6, channels=4), ("cellnet_imagenet", dict(cells=6, channels=4)), 0, (4, 8, 16, 32)),
    (
        dict(type="CellNet", stem="cifar", genotype="darts_v1", cells=6, channels=4),
        ("cellnet_cifar", dict(genotype="darts_v1", cells=6, channels=4)),
        1,
        (1, 2, 4),
    ),
]
IDS = [" ".join(map(str, family[0].values())) for family in FAMILIES]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "network", "first", "strides"), FAMILIES, ids=IDS)
def test_features_are_timms_to_the_bit(cfg, network, first, strides):
    name, options = network
    backbone = randomise(build(cfg))
    indices = tuple(range(first, first + len(strides)))
    reference = timm.create_model(name, features_only=True, out_indices=indices, **options)
    reference.load_state_dict(backbone.body.state_dict(), strict=True)
    for mode in (True, False):
        outputs, expected = backbone.train(mode)(image()), reference.train(mode)(image())
        assert type(outputs) is tuple
        assert len(outputs) == len(expected) == len(strides)
        for output, feature in zip(outputs, expected):
            assert torch.equal(output, feature)
    assert [output.shape[-1] for output in outputs] == [64 // stride for stride in strides]
    assert backbone.out_strides == strides
    assert backbone.out_channels == tuple(output.shape[1] for output in outputs)


def test_channels_of_the_standard_backbones():
    assert build(dict(type="HBNet")).out_channels == (256, 512, 1024, 2048)
    assert build(dict(type="AGDNet")).out_channels == (256, 512, 1024, 1024)


@small
def test_stages_that_no_output_needs_are_not_there(cfg):
    backbone = build(cfg, out_indices=(1, 2), in_channels=1)
    assert backbone.out_strides == (8, 16)
    summed(backbone, image(channels=1)).backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == []


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_process_needs_custom_imports_or_the_full_type_alone(tmp_path):
    plain = tmp_path / "plain.py"
    plain.write_text(
        "custom_imports = dict(imports=['optinspired_plugins.mm'], allow_failed_imports=False)\n"
        "backbone = dict(type='HBNet', depth=20)\n"
    )
    full = tmp_path / "full.py"
    full.write_text("backbone = dict(type='optinspired_plugins.mm.HBNet', depth=20)\n")
    lazy = tmp_path / "lazy.py"
    lazy.write_text(
        "from mmengine.config import read_base\nfrom optinspired_plugins.mm import HBNet\n"
        "with read_base():\n    from .lazy_base import *\nbackbone.update(dict(type=HBNet))\n"
    )
    (tmp_path / "lazy_base.py").write_text("backbone = dict(depth=20)\n")
    code = (
        "import sys\nfrom mmengine.config import Config\nfrom mmengine.registry import MODELS\n"
        "print(MODELS.build(Config.fromfile(sys.argv[1]).backbone).out_channels, 'mmcv' in sys.modules)"
    )
    env = {**os.environ, "OPTINSPIRED_AUTOLOAD": "0"}  # mm.py registers timm's names itself
    for file in (plain, full, lazy):
        done = subprocess.run([sys.executable, "-c", code, file], env=env, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1:] == ["(16, 32, 64) False"], done.stderr[-2000:]


def test_a_base_of_another_backbone_is_replaced(tmp_path):
    base = tmp_path / "base.py"
    base.write_text("model = dict(backbone=dict(type='ResNet', depth=50, num_stages=4, norm_cfg=dict(type='BN')))\n")
    config = tmp_path / "config.py"
    config.write_text("_base_ = 'base.py'\nmodel = dict(backbone=dict(_delete_=True, type='HBNet', depth=20))\n")
    assert MODELS.build(Config.fromfile(config).model.backbone).out_channels == (16, 32, 64)
    config.write_text("_base_ = 'base.py'\nmodel = dict(backbone=dict(type='HBNet'))\n")
    with pytest.raises(TypeError, match=r"num_stages|norm_cfg"):
        MODELS.build(Config.fromfile(config).model.backbone)


# --- frozen parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2, 4])
@small
def test_frozen_stages_keep_parameters_and_statistics(cfg, frozen):
    """Stages 1 … i are what output i − 1 needs: it does not change in training, and output i does."""
    backbone = randomise(build(cfg, frozen_stages=frozen)).train()
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad] or [torch.zeros(1)], 0.1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    outputs = copy.deepcopy(backbone).eval()(image())
    loss = summed(backbone, image())
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
    same = [torch.equal(a, b) for a, b in zip(outputs, backbone.eval()(image()))]
    stem_is_output = cfg["type"] == "CellNet"
    kept = max(frozen, 1 if stem_is_output and frozen == 0 else 0)
    assert same == [i < kept for i in range(4)]
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    stem = {
        "HBNet": "body.conv1",
        "OptNet": "body.conv1",
        "AGDNet": "body.features_conv0",
        "CellNet": "body.model.stem0",
    }
    assert any(name.startswith(stem[cfg["type"]]) for name in moved) == (frozen < 0)
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert (len(trainable) == 0) == (frozen == 4)


@small
def test_norm_eval_keeps_running_statistics(cfg):
    for norm_eval in (True, False):
        backbone = randomise(build(cfg, norm_eval=norm_eval)).train()
        before = {name: value.clone() for name, value in backbone.named_buffers()}
        summed(backbone, image()).backward()
        moved = [name for name, value in backbone.named_buffers() if not torch.equal(value, before[name])]
        assert bool(moved) != norm_eval
        assert all(parameter.grad is not None for parameter in backbone.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """All features in one tensor."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return torch.cat([feature.flatten(1) for feature in self.backbone(x)], 1)


LEAN = [(cfg, dict(with_cp=True)) for cfg in SMALL] + [
    (SMALL[0], dict(memory="reversible")),
    (dict(SMALL[1], stem_type="deep"), dict(with_cp=True)),
    (dict(SMALL[0], stem_type="deep", depth=18), dict(with_cp=True)),
    (dict(type="HBNet", depth=20, layers=(2, 2, 2)), dict(with_cp=True)),
    (dict(type="AGDNet", depth=40, block_config=(2, 2, 2)), dict(with_cp=True)),
]


@pytest.mark.parametrize(("cfg", "option"), LEAN, ids=lambda v: " ".join(map(str, v.values()))[:40])
def test_lean_forms_give_the_same_gradients_and_statistics(cfg, option):
    plain = randomise(build(cfg).double())
    lean = build(cfg, **option).double()
    lean.load_state_dict(plain.state_dict())
    assert_same_function(Flat(lean), Flat(plain), image(dtype=torch.float64))


@small
def test_memory_saving_with_frozen_stages(cfg):
    plain = randomise(build(cfg, frozen_stages=1).double())
    lean = build(cfg, frozen_stages=1, with_cp=True).double()
    lean.load_state_dict(plain.state_dict())
    for backbone in (plain, lean):
        summed(backbone, image(dtype=torch.float64)).backward()
    for a, b in zip(plain.parameters(), lean.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("cfg", "option", "most"),
    [
        (dict(type="HBNet", depth=50, layers=(12, 1, 1, 1), channels=(16, 8, 8, 8)), dict(with_cp=True), 0.5),
        (dict(type="HBNet", depth=50, layers=(12, 1, 1, 1), channels=(16, 8, 8, 8)), dict(memory="reversible"), 0.4),
        (dict(type="OptNet", depth=18, layers=(12, 1, 1, 1), channels=(32, 8, 8, 8)), dict(with_cp=True), 0.6),
        (SMALL[1], dict(with_cp=True), 0.8),
        (SMALL[3], dict(with_cp=True), 0.7),
    ],
    ids=lambda v: str(v)[:40],
)
def test_lean_forms_take_less_memory(cfg, option, most):
    """Peak of a step; AGDNet's plain form is lean already."""
    peaks = []
    for options in (option, {}):
        backbone, x = build(cfg, **options), image()
        summed(backbone, x).backward()
        peaks.append(peak_memory(lambda net=backbone, x=x: summed(net, x).backward()))
    assert peaks[0] < most * peaks[1]


# --- conversions to SyncBatchNorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm, lambda m: m])
@small
def test_conversions_of_normalisations_change_no_output(cfg, convert):
    """Without a process group a SyncBatchNorm normalises as a BatchNorm does, in training, too."""
    model = nn.Sequential(randomise(build(cfg, frozen_stages=1).double()))
    reference = copy.deepcopy(model)
    converted = convert(model)
    if convert(nn.BatchNorm2d(1)).__class__ is nn.SyncBatchNorm:
        norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert converted.state_dict().keys() == reference.state_dict().keys()
    x = image(dtype=torch.float64)
    _assert_same_step(converted, reference, x)
    _assert_same_step(revert_sync_batchnorm(converted), reference, x)


def _assert_same_step(model, reference, x):
    for mode in (True, False):
        if mode is False:
            model.eval(), reference.eval()
        for a, b in zip(model(x), reference(x)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    model.train(), reference.train()


def test_what_drops_activations_and_cannot_be_mended_is_refused(monkeypatch):
    """The layer of mmcv needs compiled operators: mmengine's conversion with a stand-in for it."""

    class SyncBatchNorm(nn.SyncBatchNorm):
        __module__ = "mmcv.ops.sync_bn"

    monkeypatch.setattr(nn.modules.batchnorm, "SyncBatchNorm", SyncBatchNorm)
    model = convert_sync_batchnorm(nn.Sequential(build(SMALL[1])))
    with pytest.raises(ValueError, match="sync_bn: must be 'torch'"):
        model(image())
    plain = convert_sync_batchnorm(nn.Sequential(build(SMALL[0])))
    assert len(plain(image())) == 4, "HBNet has no norm with activation"


# --- bad input --------------------------------------------------------------------------------------------------------

LOCAL = r"checkpoint='.*': must be a local file; nothing is downloaded"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(type="HBNet", depth=42), r"depth=42: must be one of 18, 34, 50, 101, 152, 20"),
        (dict(type="HBNet", depth="50"), r"depth='50': must be one of 18"),
        (dict(type="AGDNet", depth=50), r"depth=50: must be one of 121, 161"),
        (dict(type="OptNet", depth=152), r"depth=152: must be one of 18, 34"),
        (dict(type="CellNet", stem="deep"), r"stem='deep': must be one of 'imagenet', 'cifar'"),
        (dict(type="HBNet", out_indices=(0, 4)), r"out_indices=\(0, 4\): must be rising integers from 0 to 3"),
        (dict(type="HBNet", depth=20, out_indices=(3,)), r"out_indices=\(3,\): must be rising integers from 0 to 2"),
        (dict(type="HBNet", out_indices=(2, 1)), r"out_indices=\(2, 1\)"),
        (dict(type="HBNet", out_indices=(1, 1)), r"out_indices=\(1, 1\)"),
        (dict(type="HBNet", out_indices=(-1,)), r"out_indices=\(-1,\)"),
        (dict(type="HBNet", out_indices=(True,)), r"out_indices=\(True,\)"),
        (dict(type="HBNet", out_indices=()), r"out_indices=\(\).*at least one"),
        (dict(type="HBNet", out_indices=3), r"out_indices=3: must be"),
        (dict(type="HBNet", out_indices="0"), r"out_indices='0': must be"),
        (dict(type="HBNet", frozen_stages=5), r"frozen_stages=5: must be an integer from -1 to 4"),
        (dict(type="AGDNet", depth=40, frozen_stages=4), r"frozen_stages=4: must be an integer from -1 to 3"),
        (dict(type="HBNet", frozen_stages=-2), r"frozen_stages=-2"),
        (dict(type="HBNet", frozen_stages=True), r"frozen_stages=True"),
        (dict(type="HBNet", frozen_stages=None), r"frozen_stages=None"),
        (dict(type="HBNet", norm_eval="false"), r"norm_eval='false': must be True or False"),
        (dict(type="AGDNet", with_cp=1), r"with_cp=1: must be True or False"),
        (dict(type="HBNet", output_stride=4), r"output_stride=4: must be one of 8, 16, 32"),
        (dict(type="HBNet", in_channels=0), r"in_chans=0"),
        (dict(type="HBNet", pretrained="open-mmlab://resnet50"), r"pretrained='open-mmlab://resnet50': must be None"),
        (dict(type="HBNet", pretrained=True), r"pretrained=True: must be None"),
        (dict(type="HBNet", init_cfg="open-mmlab://resnet50"), r"init_cfg='open-mmlab://resnet50': must be a dict"),
        (dict(type="HBNet", init_cfg=dict(checkpoint="a.pth")), r"init_cfg=.*must be a dict with a type"),
        (dict(type="HBNet", init_cfg=dict(type="Pretrained")), r"checkpoint=None: must be a local file"),
        (dict(type="HBNet", init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50")), LOCAL),
        (dict(type="HBNet", init_cfg=[dict(type="Pretrained", checkpoint="https://a.org/b.pth")]), LOCAL),
        (dict(type="HBNet", init_cfg=dict(type="Pretrained", checkpoint="a.pth", strict=True)), r"init_cfg has strict"),
    ],
    ids=lambda v: str(v)[:70],
)  # fmt: skip
def test_arguments_out_of_range(cfg, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(cfg)


@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        (dict(type="HBNet", num_stages=4), "num_stages"),
        (dict(type="AGDNet", output_stride=8), "output_stride"),
        (dict(type="AGDNet", memory="reversible"), "memory"),
        (dict(type="CellNet", depth=50), "depth"),
    ],
)
def test_unknown_options(cfg, name):
    with pytest.raises(TypeError, match=name):
        MODELS.build(cfg)
