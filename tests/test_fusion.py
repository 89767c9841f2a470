"""Networks for inference: the same function, fewer operations, through timm's own switch."""

import copy

import pytest
import timm
import torch
from equality import randomise
from timm.utils import reparameterize_model
from torch import nn

from timm_models.inference.folding import ChannelClamp, fold_before
from timm_models.inference.stream_free import StreamFreeStage

NETWORKS = {
    "hbnet50": {},
    "hbnet50 learned": dict(learn_beta=True),
    "hbnet50 other": dict(beta1=0.7, beta2=0.4),
    "hbnet50 resnet": dict(beta2=0.0),
    "hbnet50 v1.5": dict(stride_in_1x1=False),
    "hbnet50 deep": dict(avg_down=True, stem_type="deep", stem_width=8),
    "hbnet50 activated": dict(post_act=True),
    "hbnet50 se": dict(block_args=dict(attn_layer="se")),
    "hbnet50 dilated": dict(output_stride=8),
    "hbnet101": {},
    "hbnet18": {},
    "hbnet20": {},
    "optnet18": {},
    "agdnet121": {},
    "agdnet121 constant": dict(learn_alpha=False, beta=-0.7),
    "agdnet40_k12": {},
    "agdnet40_k12 constant": dict(learn_alpha=False),
    "agdnet40_k12 bottleneck": dict(bn_size=4, compression=0.5),
    "agdnet121 blurred": dict(aa_layer=timm.layers.BlurPool2d, aa_stem_only=False),
    "cellnet_cifar": dict(cells=4, channels=4),
    "cellnet_cifar hb": dict(cells=4, channels=6, genotype="cifar10_hb_dagger_seed0"),
    "cellnet_imagenet": dict(cells=3, channels=6, genotype="p_darts"),
}
SHORT = {
    "hbnet50",
    "hbnet50 learned",
    "hbnet50 other",
    "hbnet50 resnet",
    "hbnet50 v1.5",
    "hbnet50 deep",
    "hbnet50 dilated",
}


def size_of(case):
    return dict(growth_rate=8, block_config=(2, 4, 3)) if case.startswith("agd") else {}


def build(case, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(case.split()[0], num_classes=5, **size_of(case), **NETWORKS[case])
    with torch.no_grad():
        for module in randomise(model, seed).modules():
            if isinstance(module, nn.BatchNorm2d):  # scales of both signs, and one that is 0
                module.weight[seed % 3 :: 3] *= -1
                module.weight[1 + seed] = 0
    return model.eval()


def images(dtype=torch.float32, size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def batch_norms(model):
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("case", NETWORKS)
@torch.no_grad()
def test_a_fused_network_computes_the_same(case):
    """To 1e-11 in float64; to 1e-5 in float32, or as near to float64 as the network itself where that is further."""
    model = build(case)
    exact = copy.deepcopy(model).double()
    expected = exact(images(torch.float64))
    scale = expected.abs().max()
    own = (model(images()) - expected).abs().max()
    fused = copy.deepcopy(model).fuse()
    for network in (fused, reparameterize_model(model)):
        assert (network(images()) - expected).abs().max() <= max(1e-5 * scale, 2 * own)
    assert (exact.fuse()(images(torch.float64)) - expected).abs().max() <= 1e-11 * scale
    streamless = sum(isinstance(m, StreamFreeStage) for m in fused.modules())
    assert streamless == (4 if case in SHORT else 3 if case == "hbnet101" else 0)


@pytest.mark.parametrize(
    ("case", "left"),
    [
        ("hbnet50", 0),
        ("hbnet18", 0),
        ("hbnet20", 0),
        ("optnet18", 0),
        ("agdnet121", 1),
        ("agdnet121 blurred", 1),
        ("agdnet40_k12", 10),
        ("agdnet40_k12 bottleneck", 1),
        ("cellnet_cifar", 0),
        ("cellnet_cifar hb", 0),
        ("cellnet_imagenet", 0),
    ],
)
def test_what_is_left_of_the_normalisations(case, left):
    """In AGDNet the last, and those in front of a 3×3 convolution, which pads with what they give."""
    fused = build(case).fuse()
    assert batch_norms(fused) == left
    assert all(getattr(module, "alpha", None) is None for module in fused.modules())


def test_timms_function_leaves_the_stem_alone():
    stem = {"hbnet18": 1, "agdnet121": 1, "agdnet40_k12": 0, "cellnet_cifar": 1, "cellnet_imagenet": 3}
    for case, expected in stem.items():
        model = build(case)
        assert batch_norms(reparameterize_model(model)) - batch_norms(copy.deepcopy(model).fuse()) == expected


def test_a_fused_network_again_and_in_other_hands(tmp_path):
    model = build("hbnet50").fuse()
    expected = model(images())
    assert torch.equal(model.fuse()(images()), expected)
    torch.testing.assert_close(torch.jit.script(model)(images()), expected, rtol=1e-4, atol=1e-4)
    model.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(copied(images()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("hbnet50", num_classes=5).load_state_dict(model.state_dict())


@pytest.mark.parametrize("case", [case for case in NETWORKS if not case.startswith("hbnet50 ")] + ["hbnet50 learned"])
@torch.no_grad()
def test_a_fused_network_is_a_function_of_its_state_dict(case):
    """Of other weights and other signs of γ; coefficients that are learned begin where some weights vanish."""
    model = build(case).fuse()
    fresh = timm.create_model(case.split()[0], num_classes=5, **size_of(case), **NETWORKS[case]).eval().fuse()
    for other in (build(case, seed=1).fuse(), fresh):
        assert not torch.allclose(other(images()), model(images()))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(images()), model(images()))


@torch.no_grad()
def test_reduced_precision_passes_through_a_clamp():
    """The bounds are float32 where weights are: they must not make the next convolution's input float32."""
    model = build("agdnet121").fuse()
    clamp = next(m for m in model.modules() if isinstance(m, ChannelClamp))
    x = torch.randn(2, clamp.lower.numel(), 4, 4)
    assert clamp(x.bfloat16()).dtype == torch.bfloat16
    assert clamp(x.half()).dtype == torch.float16
    inputs = []
    model.features.denseblock1.denselayer2.conv1.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images())
    assert inputs == [torch.bfloat16]
    torch.testing.assert_close(got.float(), model(images()), rtol=0.1, atol=0.1 * model(images()).abs().max().item())


@pytest.mark.parametrize("case", ["hbnet50", "agdnet121"])
def test_a_network_in_training_mode_is_fused_as_it_evaluates(case):
    """As scripts do that fuse before they switch to evaluation."""
    model = build(case)
    expected = model(images())
    fused = reparameterize_model(model.train()).eval()
    torch.testing.assert_close(fused(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["hbnet50", "agdnet121"])
def test_fewer_operations_are_exported(case):
    def operations(model):
        exported = torch.export.export(model, (images(),))
        return sum(node.op == "call_function" for node in exported.run_decompositions().graph.nodes)

    model = build(case)
    plain, fused = operations(model), operations(copy.deepcopy(model).fuse())
    assert fused < 0.75 * plain


@torch.no_grad()
def test_a_clamp_and_a_convolution_are_norm_relu_and_convolution():
    torch.manual_seed(0)
    module = nn.Module()
    module.norm, module.conv = timm.layers.BatchNormAct2d(6).double(), nn.Conv2d(6, 4, 1).double()
    module.norm.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0, 1e-3, 2.0]))
    module.norm.bias.copy_(torch.tensor([0.5, 0.3, 1.0, -1.0, 0.2, -3.0]))
    module.eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = module.conv(module.norm(x))
    fold_before(module, "norm", "conv")
    assert isinstance(module.norm, ChannelClamp)
    torch.testing.assert_close(module.conv(module.norm(x)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", ["hbnet50", "agdnet121"])
def test_a_feature_extractor_is_fused(case):
    size = {} if case == "hbnet50" else dict(growth_rate=8, block_config=(2, 4, 3, 2))
    torch.manual_seed(0)
    model = randomise(timm.create_model(case, features_only=True, **size)).double().eval()
    x = images(torch.float64)
    for a, b in zip(model(x), reparameterize_model(model)(x)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
