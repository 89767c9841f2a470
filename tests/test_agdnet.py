"""AGDNet is the Nesterov rule (21) over DenseNet's layers, and DenseNet where α = 1 and β = 0."""

import pytest
import timm
import torch
import torch.nn.functional as F
from equality import assert_same_function, randomise, twin
from torch import nn

from optinspired_plugins import nesterov
from optinspired_plugins.algorithms.coefficients import momentum
from timm_models import NesterovBlock, SourceLayer

IMAGENET = ["agdnet121", "agdnet161", "agdnet169", "agdnet201"]
CIFAR = ["agdnet40_k12", "agdnet52_k12"]
SMALL = dict(block_config=(3, 4, 2), num_classes=7, dtype=torch.float64)


def images(name="agdnet40_k12", batch=3, dtype=torch.float64):
    size = 64 if name in IMAGENET else 16
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def source_transform(layer, sizes, training):
    """T(j, z_j): normalise and activate z_j with its own channels of norm1, convolve with its columns of conv1."""
    ends = [sum(sizes[: j + 1]) for j in range(len(sizes))]
    norm, conv = layer.norm1, layer.conv1

    def T(j, z):
        own = slice(ends[j] - sizes[j], ends[j])
        stats = (None, None) if training else (norm.running_mean[own], norm.running_var[own])
        z = F.batch_norm(z, *stats, norm.weight[own], norm.bias[own], training=training, eps=norm.eps)
        return F.conv2d(norm.act(z), conv.weight[:, own], padding=conv.padding)

    return T


def plain_block(block, z):
    """Rule (21) by its reference: one convolution a source, the h-term as the sum that (21) prints."""
    layers = list(block.values())
    sizes = [z.shape[1]] + [layer.growth for layer in layers]
    transforms = [source_transform(layer, sizes[: k + 1], block.training) for k, layer in enumerate(layers)]
    alpha = [torch.ones(k + 1) if layer.alpha is None else layer.alpha for k, layer in enumerate(layers)]
    finish = [lambda s, layer=layer: layer.conv2(layer.norm2(s)) for layer in layers]
    return torch.cat(nesterov(transforms, z, alpha, block.beta, finish), 1)


def plain_forward(model):
    def forward(x):
        for module in model.features.children():
            x = plain_block(module, x) if isinstance(module, NesterovBlock) else module(x)
        return model.forward_head(x)

    return forward


def assert_same_gradients(model, x):
    reference = twin(model)
    # The reference normalises source by source and keeps no running statistics.
    assert_same_function(model, reference, x, plain_forward(reference), buffers=False)


def marked(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in IMAGENET[1:] else n for n in names]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", marked(IMAGENET + CIFAR))
def test_forward_and_gradients_are_those_of_rule_21(name, training):
    model = randomise(timm.create_model(name, dtype=torch.float64, num_classes=7)).train(training)
    assert_same_gradients(model, images(name))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(beta=0.7),
        dict(beta=-0.3),
        dict(learn_alpha=False),
        dict(bn_size=4, compression=0.5),
        dict(growth_rate=5),
        dict(block_config=(1, 1, 2)),
        dict(act_layer="silu"),
    ],
    ids=str,
)
def test_every_option_keeps_rule_21(kwargs):
    model = randomise(timm.create_model("agdnet40_k12", **{**SMALL, **kwargs}))
    assert_same_gradients(model, images())


@pytest.mark.parametrize("training", [True, False])
def test_beta_1_subtracts_the_layer_before(training):
    """m_{k+1} = −c_k T_k, so z_{k+1} = T_{k+1} − c_k T_k."""
    torch.manual_seed(0)
    model = timm.create_model("agdnet40_k12", block_config=(6, 2, 2), beta=1).double().train(training)
    block, terms = model.features.denseblock1, []
    for layer in block.values():
        layer.register_forward_hook(lambda _, __, output: terms.append(output))
    z = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    sources = block(z)[:, 16:].split(12, 1)
    c = momentum(6).tolist()
    assert len(terms) == len(sources) == 6
    torch.testing.assert_close(sources[0], terms[0])
    for k in range(1, 6):
        torch.testing.assert_close(sources[k], terms[k] - c[k] * terms[k - 1])
    assert 0 < c[1] < c[5] < 1


@pytest.mark.parametrize("term", ["alpha", "beta"])
def test_each_coefficient_matters(term):
    model = randomise(timm.create_model("agdnet40_k12", **SMALL)).eval()
    other = twin(model)
    for module in other.modules():
        if term == "alpha" and isinstance(module, SourceLayer) and module.alpha is not None:
            nn.init.ones_(module.alpha)
        if term == "beta" and isinstance(module, NesterovBlock):
            module.beta = 0.0
    assert not torch.allclose(other(images()), model(images()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_alpha_1_beta_0_is_timms_densenet(training):
    densenet = randomise(timm.create_model("densenet121", num_classes=7).double()).train(training)
    agdnet = timm.create_model("agdnet121", beta=0, learn_alpha=False, num_classes=7, dtype=torch.float64)
    agdnet.load_state_dict(densenet.state_dict(), strict=True)
    assert_same_function(agdnet.train(training), densenet, images("agdnet121"), tolerance=1e-12)


@pytest.mark.parametrize(
    "kwargs",
    [dict(stem_type="deep"), dict(aa_layer=timm.layers.BlurPool2d, aa_stem_only=False), dict(act_layer="silu")],
    ids=["deep", "blur", "silu"],
)
def test_every_densenet_option_keeps_the_special_case(kwargs):
    shape = dict(growth_rate=8, block_config=(2, 3, 2, 2), num_classes=7)
    densenet = randomise(timm.models.DenseNet(**shape, **kwargs).double()).eval()
    agdnet = timm.create_model("agdnet121", beta=0, learn_alpha=False, **shape, **kwargs).double().eval()
    agdnet.load_state_dict(densenet.state_dict(), strict=True)
    assert_same_function(agdnet, densenet, images("agdnet121"), tolerance=1e-12)


@pytest.mark.parametrize("option", ["drop_rate", "proj_drop_rate"])
def test_stochastic_options_draw_as_timms_densenet_does(option):
    kwargs = {option: 0.3, "num_classes": 7, "growth_rate": 8, "block_config": (2, 2, 2, 2)}
    densenet = timm.models.DenseNet(**kwargs).train()
    agdnet = timm.create_model("agdnet121", beta=0, learn_alpha=False, **kwargs).train()
    agdnet.load_state_dict(densenet.state_dict())
    x = images("agdnet121", dtype=torch.float32)
    outputs = []
    for model in (densenet, agdnet):
        torch.manual_seed(3)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert (outputs[0] - densenet(x)).abs().max() > 0.01


class PlainCifarDenseNet(nn.Module):
    """DenseNet for CIFAR as its authors describe it: concatenate, then norm, ReLU, 3×3 convolution."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        f = self.net.features
        x = f.conv0(x)
        for i in (1, 2, 3):
            if i > 1:
                transition = getattr(f, f"transition{i - 1}")
                x = F.avg_pool2d(transition.conv(transition.norm(x)), 2)
            for layer in getattr(f, f"denseblock{i}").values():
                x = torch.cat([x, layer.conv1(layer.norm1(x))], 1)
        return self.net.classifier(f.norm5(x).mean((2, 3)))


@pytest.mark.parametrize("name", [f"{n}_densenet" for n in CIFAR])
def test_the_named_baselines_are_cifar_densenets(name):
    model = randomise(timm.create_model(name, dtype=torch.float64))
    reference = twin(model)
    assert_same_function(model, reference, images(), PlainCifarDenseNet(reference))


def test_alpha_has_one_entry_a_source_and_starts_at_1():
    model = timm.create_model("agdnet40_k12")
    for i in (1, 2, 3):
        for k, layer in enumerate(getattr(model.features, f"denseblock{i}").values()):
            assert layer.alpha.shape == (k + 1,)
            assert (layer.alpha == 1).all()


def test_alpha_scales_the_contribution_of_its_source_only():
    conv = nn.Conv2d(3 + 2 * 4, 4, 3, padding=1, dtype=torch.float64)
    layer = SourceLayer(nn.Identity(), conv)
    layer.learn_alpha(sources=3)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([2.0, 0.0, -1.0]))
    zs = [torch.randn(2, c, 6, 6, dtype=torch.float64) for c in (3, 4, 4)]
    parts = [F.conv2d(z, w, padding=1) for z, w in zip(zs, conv.weight.split([3, 4, 4], dim=1))]
    expected = 2 * parts[0] - parts[2] + conv.bias[:, None, None]
    torch.testing.assert_close(layer(zs), expected, rtol=1e-12, atol=1e-12)
    assert layer.fold_alpha().alpha is None
    torch.testing.assert_close(layer(zs), expected, rtol=1e-12, atol=1e-12)


def test_low_rank_adapters_of_every_convolution_can_be_trained_and_merged():
    """As PEFT makes them: two convolutions of the base's own type beside it, whose product is added to its weight."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            make = type(base)
            self.base = base
            self.down = make(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False).double()
            self.up = make(2, base.out_channels, 1, bias=False).double()

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

        def merged(self):
            with torch.no_grad():
                self.base.weight += torch.einsum("or,rikl->oikl", self.up.weight[:, :, 0, 0], self.down.weight)
            return self.base

    model = randomise(timm.create_model("agdnet40_k12", **SMALL).double()).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, Adapted(child))
    adapters = [module for module in model.modules() if isinstance(module, Adapted)]
    out = model(images())
    gradients = torch.autograd.grad(out.square().sum(), [adapter.down.weight for adapter in adapters])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Adapted):
                setattr(parent, name, child.merged())
    torch.testing.assert_close(model(images()), out, rtol=1e-9, atol=1e-9)


def test_checkpointing_gives_the_same_gradients():
    for kwargs in (dict(), dict(bn_size=4)):
        model = randomise(timm.create_model("agdnet40_k12", **SMALL, **kwargs)).eval()
        reference = twin(model)
        model.set_grad_checkpointing()
        assert_same_function(model, reference, images(), tolerance=1e-12)


def test_memory_efficient_is_checkpointing_from_the_start():
    model = timm.create_model("agdnet121", memory_efficient=True, block_config=(1, 1, 1, 1))
    assert model.features.denseblock1.denselayer1.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.features.denseblock1.denselayer1.grad_checkpointing


def test_a_model_built_on_meta_can_be_initialised_later():
    with torch.device("meta"):
        model = timm.create_model("agdnet40_k12")
    model.to_empty(device="cpu")
    model.init_weights()
    assert (model.features.denseblock3.denselayer12.alpha == 1).all()
    limit = (6 / (model.num_features + 10)) ** 0.5
    assert 0.9 * limit < model.classifier.weight.abs().max() <= limit, "Xavier"
    conv = model.features.denseblock3.denselayer12.conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.in_channels)) ** 0.5, rel=0.05), "He"


def test_the_imagenet_models_start_as_timms_densenet():
    """Convolutions, normalisations and classifier; α = 1."""
    torch.manual_seed(0)
    small = dict(block_config=(2, 1, 1, 1), num_classes=100)
    model, reference = timm.create_model("agdnet121", **small), timm.create_model("densenet121", **small).state_dict()
    for name, value in reference.items():
        if value.numel() > 1000:  # a random draw, of zero mean
            own = model.state_dict()[name]
            assert own.std().item() == pytest.approx(value.std().item(), rel=0.1), name
            assert own.abs().max().item() == pytest.approx(value.abs().max().item(), rel=0.4), name
        elif not name.endswith("conv0.weight"):
            assert torch.equal(model.state_dict()[name], value), name
    assert model.classifier.weight.abs().max() <= model.num_features**-0.5
    assert all((layer.alpha == 1).all() for layer in model.features.denseblock1.children())
