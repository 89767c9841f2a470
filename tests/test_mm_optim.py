"""What mmengine's optimisers do with the backbones: no decay of coefficients, learning rates by depth."""

from pathlib import Path

import pytest
import timm
import torch
from extras import needs
from my_algorithms import LearnedHeavyBall
from timm.optim import param_groups_layer_decay
from torch import nn

needs("mmengine")

from mm_backbones import SMALL, build, small
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

EXAMPLES = sorted((Path(__file__).parents[1] / "examples" / "mm").glob("hbnet*.py"))
EXAMPLES += [
    Path(__file__).parents[1] / "examples" / "mm" / f"{name}.py"
    for name in ("faster_rcnn_hbnet50_fpn", "pspnet_hbnet50_d8")
]
LIBRARY = {"faster_rcnn_hbnet50_fpn": "mmdet", "pspnet_hbnet50_d8": "mmseg"}
HBNET, AGDNET, OPTNET, CELLNET = SMALL
LEARNED = [dict(HBNET, learn_beta=True), AGDNET, dict(OPTNET, algorithm=LearnedHeavyBall()), CELLNET]
learned = pytest.mark.parametrize("cfg", LEARNED, ids=lambda cfg: cfg["type"])
OURS = "NoWeightDecayOptimWrapperConstructor"
SGD = dict(type="SGD", lr=0.1, weight_decay=0.01)


class Model(nn.Module):
    """A backbone where mmengine's libraries have it, and a head, as mmpretrain's ImageClassifier has them."""

    def __init__(self, cfg, **options):
        super().__init__()
        self.backbone = build(cfg, **options)
        self.head = nn.Linear(self.backbone.out_channels[-1], 2)

    def get_layer_depth(self, param_name):
        return self.backbone.get_layer_depth(param_name, "backbone.")


def settings(model, optim_wrapper):
    """Name of a parameter -> the group that it is in."""
    groups = build_optim_wrapper(model, optim_wrapper).optimizer.param_groups
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def coefficients(names):
    return {name for name in names if name.split(".")[-1] in ("alpha", "beta1", "beta2", "beta")}


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return [Model(cfg) for cfg in LEARNED]


def unscoped(cfg):
    """A config that mmengine's own registries build: those of mmdetection import compiled operators."""
    return {k: unscoped(v) if isinstance(v, dict) else v for k, v in cfg.items() if k != "_scope_"}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_leaves_coefficients_without_weight_decay(file, models):
    if file.stem in LIBRARY:
        needs(LIBRARY[file.stem])
    optim_wrapper = unscoped(Config.fromfile(file).optim_wrapper)
    wanted = optim_wrapper["optimizer"]["weight_decay"]
    assert wanted > 0
    for model in models:
        found = settings(model, optim_wrapper)
        without = {name for name, group in found.items() if group["weight_decay"] == 0}
        assert without == coefficients(found)
        assert bool(without) == (model is not models[-1])
        assert {group["weight_decay"] for group in found.values()} == {wanted, *([0.0] if without else [])}


def test_every_example_is_among_these():
    configs = {file for file in EXAMPLES[0].parent.glob("*.py") if "optim_wrapper" in file.read_text()}
    assert configs == set(EXAMPLES)
    assert {file.stem for file in EXAMPLES[0].parent.glob("*.py")} - {file.stem for file in configs} == {
        "folder",
        "train",
    }


@learned
def test_a_backbone_without_its_last_stages_names_what_it_has(cfg):
    backbone = build(cfg, out_indices=(0, 1))
    assert backbone.no_weight_decay() == coefficients(name for name, _ in backbone.named_parameters())


def test_options_of_mmengine_hold_beside_it():
    """Also a key that is longer than the names of coefficients, which decides alone where it is mmengine's."""
    options = dict(norm_decay_mult=0.5, custom_keys=dict(backbone=dict(lr_mult=0.1)))
    found = settings(Model(AGDNET), dict(constructor=OURS, optimizer=SGD, paramwise_cfg=options))
    for name, group in found.items():
        assert group["lr"] == pytest.approx(0.01 if name.startswith("backbone.") else 0.1)
        assert group["weight_decay"] == (0.0 if name.endswith(".alpha") else 0.01)


def test_frozen_and_shared_parameters_are_taken_once():
    model = Model(AGDNET, frozen_stages=1)
    model.again = model.head
    model.twin = nn.Linear(model.head.in_features, 2)
    model.twin.weight = model.head.weight
    groups = build_optim_wrapper(model, dict(constructor=OURS, optimizer=SGD)).optimizer.param_groups
    taken = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_alpha_stays_where_it_is_without_a_gradient():
    for constructor, stays in ((OURS, True), ("DefaultOptimWrapperConstructor", False)):
        model = Model(AGDNET)
        wrapper = build_optim_wrapper(model, dict(constructor=constructor, optimizer=SGD))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".alpha")}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        wrapper.step()
        assert all(torch.equal(model.get_parameter(name), value) == stays for name, value in before.items())


# --- layer-wise learning rates ----------------------------------------------------------------------------------------

LAYERWISE = "mmpretrain.LearningRateDecayOptimWrapperConstructor"
CUSTOM = {".alpha": dict(decay_mult=0.0), ".beta": dict(decay_mult=0.0), ".algorithm.": dict(decay_mult=0.0)}


@learned
def test_mmpretrains_layer_decay_is_timms(cfg):
    needs("mmpretrain")
    import mmpretrain.engine  # noqa: F401  registers the constructor

    model = Model(cfg)
    options = dict(layer_decay_rate=0.5, custom_keys=CUSTOM)
    found = settings(model, dict(constructor=LAYERWISE, optimizer=SGD, paramwise_cfg=options))
    whole = timm.create_model(model.backbone.name, num_classes=2, **model.backbone.options)
    groups = param_groups_layer_decay(whole, weight_decay=0.01, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    expected = {name: scales[id(parameter)] for name, parameter in whole.named_parameters()}
    for name, group in found.items():
        place = name.removeprefix("backbone.body.").removeprefix("model.").replace("features_", "features.", 1)
        assert group["lr_scale"] == (1.0 if name.startswith("head.") else expected[place]), name
    without = {name for name, group in found.items() if group["weight_decay"] == 0}
    assert without == coefficients(found), "the custom_keys of the README"


@small
def test_depths_of_a_backbone_without_its_last_stages(cfg):
    """Every depth up to the last occurs, and what follows has the next one."""
    backbone = build(cfg, out_indices=(0, 1))
    names = [name for name, _ in backbone.named_parameters()]
    depths = [backbone.get_layer_depth(f"backbone.{name}", "backbone.") for name in names]
    last = max(depth for depth, _ in depths)
    assert depths[0] == (0, last + 2) == backbone.get_layer_depth(names[0])
    assert sorted(set(depths)) == [(depth, last + 2) for depth in range(last + 1)]
    assert backbone.get_layer_depth("head.fc.weight", "backbone.") == (last + 1, last + 2)


def test_a_parameter_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"param_name='backbone.fc.weight': must be a parameter of hbnet50 with 'back"):
        build(HBNET).get_layer_depth("backbone.fc.weight", "backbone.")
