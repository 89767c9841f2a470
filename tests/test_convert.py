"""Warm start: conversion keeps the function, everything that belongs to the model, and refuses what it cannot read."""

import pytest
import timm
import torch
from equality import assert_same_function, randomise, without_rules
from extras import needs_version
from timm.models import save_for_hf
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


SMALL = dict(layers=(2, 3, 1), num_classes=7, beta2=-0.6)
HBNETS = [
    ("hbnet20", SMALL),
    ("hbnet20", dict(SMALL, memory="reversible")),
    ("hbnet20_resnet", dict(SMALL, beta2=0.0)),
    ("hbnet18", dict(num_classes=7, beta1=0.9)),
    ("hbnet50", dict(num_classes=7, layers=(1, 2, 1, 2))),
]


@pytest.mark.parametrize("learn_beta", [False, True])
@pytest.mark.parametrize(("name", "kwargs"), HBNETS)
def test_an_hbnet_learns_from_its_own_coefficients(name, kwargs, learn_beta):
    hbnet = randomise(timm.create_model(name, **kwargs).double()).eval()
    new = to_heavy_ball(hbnet, learn_beta=learn_beta)
    assert type(new) is type(hbnet)
    assert [stage.settings.memory for stage in new.stages()] == [stage.settings.memory for stage in hbnet.stages()]
    assert_same_function(new, hbnet, images().double(), tolerance=1e-12)
    assert ("layer2.beta1" in new.state_dict()) == learn_beta
    by_name = timm.create_model(name, **kwargs, learn_beta=learn_beta).double().eval()
    by_name.load_state_dict(new.state_dict(), strict=True)
    assert torch.equal(by_name(images().double()), new(images().double()))


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_an_agdnet_learns_from_its_own_coefficients(learn_alpha):
    kwargs = dict(block_config=(2, 3, 2), num_classes=7, beta=0.3, learn_alpha=learn_alpha)
    agdnet = randomise(timm.create_model("agdnet40_k12", **kwargs).double()).eval()
    new = to_nesterov(agdnet)
    assert type(new) is type(agdnet)
    assert_same_function(new, agdnet, images(16).double(), tolerance=1e-12)
    assert "features.denseblock2.denselayer3.alpha" in new.state_dict()
    assert to_nesterov(agdnet, learn_alpha=learn_alpha).state_dict().keys() == agdnet.state_dict().keys()


SAVED = [
    ("resnet18", {}, to_heavy_ball, {}, "hbnet18"),
    ("resnet18", dict(in_chans=1), to_heavy_ball, dict(learn_beta=True), "hbnet18"),
    ("resnet50", dict(layers=(1, 2, 1, 1)), to_heavy_ball, dict(beta2=-0.2, post_act=False), "hbnet50"),
    ("hbnet50", dict(layers=(1, 2, 1, 1)), to_heavy_ball, dict(beta1=0.7), "hbnet50"),
    ("hbnet20_resnet", {}, to_heavy_ball, dict(learn_beta=True), "hbnet20_resnet"),
    ("densenet121", {}, to_nesterov, dict(beta=0.4), "agdnet121"),
    ("agdnet40_k12_densenet", dict(block_config=(2, 2, 2)), to_nesterov, {}, "agdnet40_k12_densenet"),
]


@needs_version("timm", "1.0.31", "keeps no record of a model's arguments")
@pytest.mark.parametrize(("name", "kwargs", "convert", "options", "saved"), SAVED)
def test_a_converted_network_is_saved_as_itself(name, kwargs, convert, options, saved, tmp_path):
    model = convert(randomise(timm.create_model(name, num_classes=7, **kwargs)), **options).eval()
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(model)
    assert loaded.pretrained_cfg["architecture"] == saved
    x = images(32, chans=model.in_chans)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["resnet50d", "resnext50_32x4d", "resnetaa50", "resnet26"])
def test_a_converted_network_that_no_name_builds_is_not_saved(name, tmp_path):
    with pytest.raises(KeyError, match="architecture"):
        save_for_hf(to_heavy_ball(timm.create_model(name)), tmp_path)


@pytest.mark.parametrize(
    ("name", "convert", "rule"),
    [
        ("hbnet18", to_heavy_ball, dict(beta1=1.0, beta2=0.0, post_act=True, stride_in_1x1=False)),
        ("agdnet121", to_nesterov, dict(beta=0.0, learn_alpha=True)),
    ],
)
def test_without_timms_record_of_arguments_they_are_the_callers(name, convert, rule, tmp_path):
    """As in timm < 1.0.31, which keeps none."""
    model = randomise(timm.create_model({"hbnet18": "resnet18", "agdnet121": "densenet121"}[name], num_classes=7))
    vars(model).pop("_model_args", None)
    model = convert(model).eval()
    with pytest.raises(KeyError, match="architecture"):
        save_for_hf(model, tmp_path)
    model.pretrained_cfg["architecture"] = name
    save_for_hf(model, tmp_path, model_args=rule)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images(32)), model(images(32)))


CASES = [("resnet18", to_heavy_ball, "layer1.0.bn1"), ("densenet121", to_nesterov, "features.denseblock1")]


@pytest.mark.parametrize(("name", "convert", "frozen"), CASES)
def test_what_belongs_to_the_model_is_kept(name, convert, frozen):
    model = timm.create_model(name, num_classes=3, in_chans=4, drop_rate=0.2, global_pool="max").to(torch.bfloat16)
    model.train()
    model.get_submodule(frozen).eval().requires_grad_(False)
    new = convert(model)
    assert (new.num_classes, new.global_pool.pool_type) == (3, "max")
    assert next(new.parameters()).shape[1] == 4
    assert getattr(new, "in_chans", None) == getattr(model, "in_chans", None)  # an attribute of later versions of timm
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.training
    assert not new.get_submodule(frozen).training
    kept = dict(new.named_parameters())
    for key, p in model.named_parameters():
        assert kept[key].requires_grad == p.requires_grad
        assert torch.equal(kept[key], p)
    buffers, new_buffers = dict(model.named_buffers()), without_rules(dict(new.named_buffers()))
    assert list(buffers) == list(new_buffers)
    assert all(torch.equal(buffer, new_buffers[key]) for key, buffer in buffers.items())
    names = {"resnet18": "hbnet18", "densenet121": "agdnet121"}
    expected = {key: value for key, value in model.default_cfg.items() if key != "architecture"}
    if hasattr(model, "_model_args"):  # timm's record, without which the network has no name
        expected["architecture"] = names[name]
    assert new.default_cfg == new.pretrained_cfg == expected


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
    agdnet = to_nesterov(timm.create_model("densenet121", num_classes=7)).double()
    agdnet(images().double()).square().sum().backward()
    gradients = {n: p.grad.abs().max() for n, p in agdnet.named_parameters() if n.endswith("alpha")}
    # A first layer's α scales a whole convolution, which the next normalisation undoes up to its ε.
    first = {n for n in gradients if ".denselayer1." in n}
    assert len(first) == 4
    assert all((gradient > 1e-3) == (n not in first) for n, gradient in gradients.items()), gradients


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
        (to_heavy_ball, lambda: timm.create_model("optnet18"), r"resnet is a timm_models.optnet.OptNet"),
        (
            to_heavy_ball,
            lambda: timm.models.ResNet(Odd, (1, 1, 1, 1)),
            r"resnet.layer1\[0\] is a .*Odd: must be .*Basic",
        ),
        (to_heavy_ball, lambda: nn.Linear(1, 1), r"resnet is a torch.nn.modules.linear.Linear"),
        (to_heavy_ball, lambda: timm.create_model("resnet18", features_only=True), r"FeatureListNet"),
        (to_nesterov, lambda: timm.create_model("resnet18"), r"densenet is a timm.models.resnet.ResNet: must be"),
    ],
)
def test_an_unsupported_model_is_refused_by_name(convert, build, message):
    with torch.device("meta"):
        model = build()
    with pytest.raises(TypeError, match=message):
        convert(model)


def test_a_fused_stage_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"resnet.layer1 is a timm_models.inference.stream_free.StreamFreeStage: must be exactly"
    ):
        to_heavy_ball(timm.create_model("hbnet50").eval().fuse())


@pytest.mark.parametrize(
    ("convert", "name", "start", "options", "message"),
    [
        (to_heavy_ball, "hbnet20", dict(learn_beta=True), {}, r"resnet.layer1 has learn_beta=True: must have constant"),
        (to_heavy_ball, "hbnet20", {}, dict(post_act=True), r"post_act=True: must be False or None, the model has no"),
        (to_heavy_ball, "resnet18", {}, dict(learn_beta="false"), r"learn_beta='false': must be True or False"),
        (to_heavy_ball, "resnet18", {}, dict(post_act="false"), r"post_act='false': must be True or False"),
        (to_nesterov, "agdnet40_k12", {}, dict(learn_alpha=False), r"learn_alpha=False: must be True for a model that"),
        (to_nesterov, "densenet121", {}, dict(learn_alpha="false"), r"learn_alpha='false': must be True or False"),
    ],
)
def test_an_option_that_does_not_fit_the_start_is_named(convert, name, start, options, message):
    with torch.device("meta"):
        model = timm.create_model(name, **start)
    with pytest.raises(ValueError, match=message):
        convert(model, **options)


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
