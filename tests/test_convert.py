"""Warm start: conversion keeps the function, everything that belongs to the model, and refuses what it cannot read."""

import pytest
import timm
import torch
from equality import assert_same_function, randomise
from torch import nn

from timm_models import AGDNet, HBNet, to_heavy_ball, to_nesterov

RESNETS = ["resnet18", "resnet50", "resnet50d", "seresnet50", "resnext50_32x4d", "resnetaa50", "ecaresnet26t"]


def images(size=64, batch=2, chans=3):
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("learn_beta", [False, True])
@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_becomes_the_hbnet_of_the_same_function(name, learn_beta):
    resnet = randomise(timm.create_model(name, num_classes=7)).eval()
    hbnet = to_heavy_ball(resnet, learn_beta=learn_beta)
    assert isinstance(hbnet, HBNet)
    assert_same_function(hbnet, resnet, images(), tolerance=1e-5 if learn_beta else 0)


@pytest.mark.parametrize("name", ["densenet121", "densenetblur121d"])
def test_a_densenet_becomes_the_agdnet_of_the_same_function(name):
    densenet = randomise(timm.create_model(name, num_classes=7).double()).eval()
    agdnet = to_nesterov(densenet)
    assert isinstance(agdnet, AGDNet)
    assert_same_function(agdnet, densenet, images().double(), tolerance=1e-12)


def test_a_converted_state_dict_loads_by_name():
    hbnet = to_heavy_ball(randomise(timm.create_model("resnet50", num_classes=7)), learn_beta=True).eval()
    by_name = timm.create_model(
        "hbnet50", num_classes=7, beta2=0, learn_beta=True, post_act=True, stride_in_1x1=False
    ).eval()
    by_name.load_state_dict(hbnet.state_dict(), strict=True)
    assert torch.equal(by_name(images()), hbnet(images()))
    agdnet = to_nesterov(randomise(timm.create_model("densenet121", num_classes=7))).eval()
    by_name = timm.create_model("agdnet121", num_classes=7, beta=0).eval()
    by_name.load_state_dict(agdnet.state_dict(), strict=True)
    assert torch.equal(by_name(images()), agdnet(images()))


CASES = [("resnet18", to_heavy_ball, "layer1.0.bn1"), ("densenet121", to_nesterov, "features.denseblock1")]


@pytest.mark.parametrize(("name", "convert", "frozen"), CASES)
def test_what_belongs_to_the_model_is_kept(name, convert, frozen):
    model = timm.create_model(name, num_classes=3, in_chans=4, drop_rate=0.2, global_pool="max").to(torch.bfloat16)
    model.train()
    model.get_submodule(frozen).eval().requires_grad_(False)
    new = convert(model)
    assert (new.num_classes, new.in_chans, new.global_pool.pool_type) == (3, 4, "max")
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.training
    assert not new.get_submodule(frozen).training
    kept = dict(new.named_parameters())
    for key, p in model.named_parameters():
        assert kept[key].requires_grad == p.requires_grad
        assert torch.equal(kept[key], p)
    for (key, buffer), (new_key, new_buffer) in zip(model.named_buffers(), new.named_buffers(), strict=True):
        assert key == new_key
        assert torch.equal(buffer, new_buffer)
    assert new.default_cfg == model.default_cfg


@pytest.mark.parametrize(("name", "convert", "frozen"), CASES)
def test_the_given_model_is_left_alone(name, convert, frozen):
    model = timm.create_model(name, num_classes=3).eval()
    kind, before = type(model), model(images())
    new = convert(model)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(1.0)
    assert type(model) is kind
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize(("name", "convert", "frozen"), CASES)
def test_conversion_works_on_the_meta_device(name, convert, frozen):
    with torch.device("meta"):
        new = convert(timm.create_model(name))
    assert all(p.is_meta for p in new.parameters())


def test_checkpointing_survives_conversion():
    """Timm's flag would run the blocks of a stage as a chain: it must reach the stages and nothing else."""
    resnet = randomise(timm.create_model("resnet18", num_classes=7).double()).eval()
    plain = to_heavy_ball(resnet, beta2=-0.5)
    resnet.set_grad_checkpointing()
    checkpointed = to_heavy_ball(resnet, beta2=-0.5)
    assert not plain.layer1.grad_checkpointing
    assert checkpointed.layer1.grad_checkpointing
    assert_same_function(checkpointed, plain, images().double(), tolerance=1e-12)


def test_learned_coefficients_train_away_from_the_special_case():
    hbnet = to_heavy_ball(timm.create_model("resnet18", num_classes=7), learn_beta=True)
    optimizer = torch.optim.SGD(hbnet.parameters(), lr=0.1)
    before = hbnet.layer1.beta2.detach().clone()
    hbnet(images()).square().sum().backward()
    optimizer.step()
    assert (hbnet.layer1.beta2 != before).all()
    agdnet = to_nesterov(timm.create_model("densenet121", num_classes=7))
    agdnet(images()).square().sum().backward()
    assert all((p.grad != 0).any() for n, p in agdnet.named_parameters() if n.endswith("alpha"))


class Odd(timm.models.BasicBlock):
    pass


@pytest.mark.parametrize(
    ("convert", "build", "message"),
    [
        (
            to_heavy_ball,
            lambda: timm.create_model("resnetv2_50"),
            r"resnet is a timm.models.resnetv2.ResNetV2: must be",
        ),
        (to_heavy_ball, lambda: timm.create_model("densenet121"), r"resnet is a timm.models.densenet.DenseNet"),
        (to_heavy_ball, lambda: timm.create_model("hbnet18"), r"resnet is a timm_models.hbnet.HBNet"),
        (
            to_heavy_ball,
            lambda: timm.models.ResNet(Odd, (1, 1, 1, 1)),
            r"resnet.layer1\[0\] is a .*Odd: must be .*Basic",
        ),
        (to_heavy_ball, lambda: nn.Linear(1, 1), r"resnet is a torch.nn.modules.linear.Linear"),
        (to_heavy_ball, lambda: timm.create_model("resnet18", features_only=True), r"FeatureListNet"),
        (to_nesterov, lambda: timm.create_model("resnet18"), r"densenet is a timm.models.resnet.ResNet: must be"),
        (to_nesterov, lambda: timm.create_model("agdnet121"), r"densenet is a timm_models.agdnet.AGDNet"),
    ],
)
def test_an_unsupported_model_is_refused_by_name(convert, build, message):
    with torch.device("meta"):
        model = build()
    with pytest.raises(TypeError, match=message):
        convert(model)


def test_a_parametrised_layer_is_refused_by_name():
    densenet = timm.create_model("densenet121")
    torch.nn.utils.parametrizations.weight_norm(densenet.features.denseblock2.denselayer3.conv1)
    with pytest.raises(TypeError, match=r"densenet.features.denseblock2.denselayer3.conv1 is a .*Parametrized"):
        to_nesterov(densenet)


@pytest.mark.parametrize(
    ("convert", "name", "key"), [(to_heavy_ball, "resnet18", "beta2"), (to_nesterov, "densenet121", "beta")]
)
def test_a_coefficient_that_is_not_finite_is_refused(convert, name, key):
    with pytest.raises(ValueError, match=rf"{key}=nan: must be a finite number"):
        convert(timm.create_model(name), **{key: float("nan")})
