"""Quantised and pruned by the usual tools: every convolution is one that they know."""

import copy

import pytest
import timm
import torch
from equality import assert_same_function, randomise
from torch import nn
from torch.ao.quantization import disable_fake_quant, get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from timm_models.stages.transforms import PadShortcut

NETWORKS = {
    "hbnet20": dict(channels=(8, 8, 16)),
    "optnet20": dict(channels=(8, 8, 16)),
    "agdnet40_k12": dict(block_config=(2, 2, 2)),
    "agdnet121": dict(block_config=(2, 2, 2), growth_rate=8),
    "cellnet_cifar": dict(cells=3, channels=4),
}
ENGINE = torch.backends.quantized.engine
quantised = pytest.mark.skipif(ENGINE == "none", reason="this torch has no quantised kernels")


def build(name):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5, **NETWORKS[name]))


def images():
    return torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def assert_is_quantised(network, original, expected):
    """All convolutions, and an output not too far off."""
    convolutions = sum(isinstance(m, nn.Conv2d) for m in original.modules())
    found = [m for m in network.modules() if "quantized" in type(m).__module__ and "Conv" in type(m).__name__]
    assert len(found) == convolutions > 0
    assert (network(images()) - expected).norm() < 0.3 * expected.norm()


@quantised
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_after_training_with_and_without_fusing(name):
    for fuse in (False, True):
        network = build(name).eval()
        expected = network(images())
        network = network.fuse() if fuse else network
        prepared = prepare_fx(copy.deepcopy(network), get_default_qconfig_mapping(ENGINE), (images(),))
        prepared(images())
        assert_is_quantised(convert_fx(prepared), network, expected)


@quantised
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "cellnet_cifar"])
def test_while_training(name):
    """A CellNet of four channels loses its logits to fake quantisation already."""
    network = build(name).train()
    network = network.fold_alpha() if name.startswith("agdnet") else network
    prepared = prepare_qat_fx(copy.deepcopy(network), get_default_qat_qconfig_mapping(ENGINE), (images(),))
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(images()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in prepared.parameters())
    with torch.no_grad():
        for _ in range(50):  # running statistics come to the batch's, and then the observers' averages to evaluation
            prepared(images())
        prepared.eval()
        for _ in range(100):
            prepared(images())
        converted = convert_fx(copy.deepcopy(prepared))
        assert_is_quantised(converted, network, prepared.apply(disable_fake_quant)(images()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["hbnet20", "hbnet20_resnet", "optnet20"])
def test_a_padded_shortcut_as_a_convolution(name, training):
    """A tool that prunes follows convolutions; the function is the same to the bit."""
    torch.manual_seed(0)
    network = randomise(timm.create_model(name, num_classes=5, channels=(4, 7, 8))).double().train(training)
    convolved = copy.deepcopy(network).convolve_shortcuts()
    assert not any(isinstance(m, PadShortcut) for m in convolved.modules())
    assert [m.training for m in convolved.modules()] == [training] * len(list(convolved.modules()))
    x = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    assert torch.equal(convolved(x), network(x))
    fixed = [name for name, p in convolved.named_parameters() if not p.requires_grad]
    assert fixed == ["layer2.0.downsample.weight", "layer3.0.downsample.weight"]
    for parameter in convolved.parameters():
        parameter.requires_grad_()
    assert_same_function(convolved, network, x, tolerance=1e-12)


@torch.no_grad()
def test_a_pruned_dense_block_of_one_layer_computes_what_its_modules_do():
    """A tool takes channels of a convolution: the fast form expects as many as the layer was made with."""
    network = timm.create_model("agdnet40_k12", num_classes=5, block_config=(1, 1, 1), learn_alpha=False).eval()
    block = network.features.denseblock1
    conv = block.denselayer1.conv1
    conv.weight, conv.out_channels = nn.Parameter(conv.weight[:5]), 5
    z = torch.randn(2, 16, 8, 8)
    expected = torch.cat([z, conv(block.denselayer1.norm1(z.clone()))], 1)
    torch.testing.assert_close(block(z), expected)
