"""``final_norm``: a normalisation and an activation between the last stage and the pooling."""

import copy

import pytest
import timm
import torch
from equality import assert_same_function, randomise
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn

from timm_models import to_heavy_ball

SMALL = {
    "hbnet18": dict(layers=(2, 1, 2, 2), channels=(8, 8, 8, 8)),
    "hbnet50": dict(layers=(2, 1, 2, 2), channels=(8, 8, 8, 8)),
    "hbnet20": dict(layers=(2, 1, 2), channels=(4, 6, 8)),
    "hbnet20_resnet": dict(layers=(2, 1, 2), channels=(4, 6, 8)),
    "optnet18": dict(layers=(2, 1, 2, 2), channels=(8, 8, 8, 8), algorithm="agd"),
    "optnet20": dict(layers=(2, 1, 2), channels=(4, 6, 8), algorithm="admm"),
}
families = pytest.mark.parametrize("name", SMALL)


def build(name, **kwargs):
    torch.manual_seed(0)
    options = dict(num_classes=5, final_norm=True, dtype=torch.float64)
    return randomise(timm.create_model(name, **{**options, **SMALL[name], **kwargs}))


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def without(net):
    """The same network without the normalisation."""
    other = copy.deepcopy(net)
    other.drop_norm()
    return other


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@families
def test_it_is_a_norm_and_a_relu_before_the_head(name, training):
    net = build(name).train(training)
    reference = copy.deepcopy(net)
    body = without(reference)

    def forward(x):
        return reference.forward_head(torch.relu(reference.norm(body.forward_features(x))))

    torch.testing.assert_close(net(images()), forward(images()), rtol=1e-10, atol=1e-10)
    assert net.forward_features(images()).min() == 0


@families
def test_it_is_off_by_default_and_adds_only_its_own_parameters(name):
    plain, net = build(name, final_norm=False), build(name)
    own = {f"norm.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert net.state_dict().keys() - plain.state_dict().keys() == own
    assert not plain.state_dict().keys() - net.state_dict().keys()
    default = timm.create_model(name, **SMALL[name])
    assert not any(key.startswith("norm.") for key in default.state_dict())
    assert net.norm.weight.shape == (net.num_features,)


@families
def test_the_features_of_stages_come_before_it(name):
    net = build(name).train()
    last = len(net.feature_info) - 1
    raw = without(net).forward_features(images())
    for stop_early in (False, True):
        features, (before,) = net.forward_intermediates(images(), indices=1, stop_early=stop_early)
        torch.testing.assert_close(before, raw)
        torch.testing.assert_close(features, net.forward_features(images()))
    features, (after,) = net.forward_intermediates(images(), indices=[last], norm=True)
    assert after is features
    _, (first, _) = net.forward_intermediates(images(), indices=[0, last], norm=True)
    torch.testing.assert_close(first, net.forward_intermediates(images(), indices=[0])[1][0])


@pytest.mark.parametrize("kind", ["list", "dict", "getter", "hook", "fx"])
@pytest.mark.parametrize("name", ["hbnet50", "optnet20"])
def test_features_only_has_no_unused_parameter(name, kind):
    net = build(name, features_only=True, feature_cls=kind)
    features = net(images())
    features = list(features.values()) if isinstance(features, dict) else features
    assert features[-1].min() < 0, "before the activation"
    sum(feature.square().sum() for feature in features).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@families
def test_pruning_removes_it_with_the_last_stage_or_alone(name):
    x = images()
    cut = build(name)
    cut.prune_intermediate_layers(indices=[1])
    assert cut.forward_features(x).shape[1] == cut.num_features == cut.feature_info[1]["num_chs"]
    kept, alone = build(name), build(name)
    kept.prune_intermediate_layers(indices=1, prune_head=False)
    torch.testing.assert_close(kept(x), build(name)(x))
    alone.prune_intermediate_layers(indices=1, prune_norm=True)
    torch.testing.assert_close(alone(x), without(build(name)).forward_features(x))


@families
def test_the_classifier_can_be_changed(name):
    net = build(name)
    net.reset_classifier(3)
    net.double()  # early versions of timm return a classifier in float32
    assert net(images()).shape == (3, 3)
    net.reset_classifier(0)
    assert net(images()).min() >= 0


@families
def test_fused_networks_are_equal(name):
    net = build(name).eval()
    x = images()
    expected = net(x)
    for fused in (copy.deepcopy(net).fuse(), reparameterize_model(net)):
        torch.testing.assert_close(fused(x), expected, rtol=1e-8, atol=1e-8)
        assert isinstance(fused.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("options", [{}, dict(memory="reversible"), dict(learn_beta=True)], ids=str)
@pytest.mark.parametrize("name", ["hbnet50", "hbnet20"])
def test_memory_saving_forms_have_the_same_gradients(name, options):
    net = build(name, **options)
    reference = build(name, **{key: value for key, value in options.items() if key != "memory"})
    reference.load_state_dict(net.state_dict())
    net.set_grad_checkpointing()
    assert_same_function(net, reference, images(), tolerance=1e-9)


@families
def test_weights_load_strictly_and_mismatches_are_named(name):
    net, other = build(name), build(name)
    randomise(other)
    net.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(net.eval()(images()), other.eval()(images()))
    with pytest.raises(
        RuntimeError, match=r"Missing key.*norm\.weight[\s\S]*no final normalisation: pass final_norm=False"
    ):
        net.load_state_dict(build(name, final_norm=False).state_dict())
    with pytest.raises(
        RuntimeError, match=r"Unexpected key.*norm\.weight[\s\S]*a final normalisation: pass final_norm=True"
    ):
        build(name, final_norm=False).load_state_dict(net.state_dict())


def test_conversions_keep_it():
    net = build("hbnet20_resnet").eval()
    torch.testing.assert_close(to_heavy_ball(net, learn_beta=True)(images()), net(images()))
    resnet = randomise(timm.create_model("resnet18", num_classes=5)).eval()
    converted = to_heavy_ball(resnet)
    assert converted.norm is None
    assert torch.equal(converted(images().float()), resnet(images().float()))


def test_a_published_model_keeps_it(tmp_path):
    net = timm.create_model("hbnet20", final_norm=True, num_classes=5).eval()
    if not hasattr(net, "_model_args"):
        pytest.skip("this timm does not save arguments")
    save_for_hf(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images().float()), net(images().float()))


def test_layer_decay_treats_it_as_part_of_the_head():
    net = build("hbnet20")
    optimizer = create_optimizer_v2(net, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(net.norm.weight)] == scale[id(net.fc.bias)] == 1


@pytest.mark.parametrize("options", [dict(act_layer="silu"), dict(norm_layer="groupnorm1")], ids=str)
@pytest.mark.parametrize("name", ["hbnet18", "hbnet20"])
def test_it_is_of_the_networks_own_kind(name, options):
    net = build(name, **options)
    assert type(net.norm) is type(net.layer1[0].bn1)
    assert type(net.act) is type(net.layer1[0].act1)


@pytest.mark.parametrize("name", ["hbnet18", "optnet20"])
def test_it_scripts_and_exports(name):
    net = build(name).eval()
    torch.testing.assert_close(torch.jit.script(net)(images()), net(images()))
    torch.testing.assert_close(torch.export.export(net, (images(),)).module()(images()), net(images()))


@pytest.mark.parametrize("name", ["hbnet20", "hbnet50", "optnet20", "optnet50"])
def test_another_value_is_named(name):
    with pytest.raises(ValueError, match="final_norm='false': must be True or False"):
        timm.create_model(name, final_norm="false")
