"""HBNet is the heavy-ball rule (16) over ResNet's transforms, and ResNet where β2 = 0."""

import pytest
import timm
import torch
from equality import assert_same_function, put_strides_back, randomise, twin, without_rules
from extras import DROP_BLOCK
from torch import nn

from optinspired_plugins import heavy_ball
from timm_models import HeavyBallStage

IMAGENET = ["hbnet18", "hbnet34", "hbnet50", "hbnet101", "hbnet152"]
CIFAR = ["hbnet20", "hbnet32", "hbnet44", "hbnet56", "hbnet110"]
DEEP = {"hbnet101", "hbnet152", "hbnet110"}


def marked(names):
    return [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in names]


def images(name, batch=3, dtype=torch.float64):
    size = 32 if name in CIFAR or name.endswith("_resnet") else 64
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def plain_stage(stage, u):
    """x_0 = S(u), x_1 = T_0(u) + S(u), then rule (16) from the reference."""
    first, *rest = stage
    x0 = first.downsample(u) if first.downsample is not None else u
    x1 = first(u) + x0
    return heavy_ball(list(rest), x1, x0, stage.beta1, stage.beta2)[-1]


def plain_forward(model):
    put_strides_back(model)

    def forward(x):
        x = model.act1(model.bn1(model.conv1(x)))
        if hasattr(model, "maxpool"):
            x = model.maxpool(x)
        for stage in (m for m in model.children() if isinstance(m, HeavyBallStage)):
            x = plain_stage(stage, x)
        return model.forward_head(x)

    return forward


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", marked(IMAGENET + CIFAR))
def test_forward_and_gradients_are_those_of_rule_16(name, training):
    """With coefficients of every step drawn around (1, −1)."""
    model = timm.create_model(name, learn_beta=True, beta_lr_scale=1.0, dtype=torch.float64, num_classes=7)
    reference = twin(randomise(model).train(training))
    assert_same_function(model, reference, images(name), plain_forward(reference))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kwargs", [{}, {"beta1": 0.8, "beta2": -0.3}, {"beta1": 0}], ids=str)
@pytest.mark.parametrize("name", ["hbnet20", "hbnet50"])
def test_constant_coefficients_too(name, kwargs, training):
    model = timm.create_model(name, dtype=torch.float64, num_classes=7, **kwargs)
    reference = twin(randomise(model).train(training))
    assert_same_function(model, reference, images(name), plain_forward(reference))


@pytest.mark.parametrize("layers", [(1, 1, 1), (1, 2, 3)], ids=str)
def test_small_stages_too(layers):
    model = timm.create_model("hbnet20", layers=layers, learn_beta=True, beta_lr_scale=1.0, dtype=torch.float64)
    reference = twin(randomise(model))
    with pytest.MonkeyPatch.context() as patch:
        # A stage of one block has no step of (16) and so no coefficients to learn.
        for stage in reference.modules():
            if isinstance(stage, HeavyBallStage) and not stage.learn_beta:
                patch.setattr(stage, "beta1", 0.0)
        assert_same_function(model, reference, images("hbnet20"), plain_forward(reference))


def test_the_coefficients_matter():
    """β2 = −1 is not β2 = 0, and x_{−1} of a stage is the projected shortcut, not the stage's input."""
    model = timm.create_model("hbnet20").eval()
    other = timm.create_model("hbnet20", beta2=0.0).eval()
    other.load_state_dict(without_rules(model.state_dict()))
    x = images("hbnet20", dtype=torch.float32)
    assert not torch.allclose(model(x), other(x), rtol=0.1)


RESNET = dict(beta2=0.0, post_act=True, stride_in_1x1=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_beta2_0_with_post_act_is_timms_resnet_to_the_bit(depth, training):
    resnet = randomise(timm.create_model(f"resnet{depth}", num_classes=7)).train(training)
    hbnet = timm.create_model(f"hbnet{depth}", num_classes=7, **RESNET).train(training)
    hbnet.load_state_dict(resnet.state_dict(), strict=True)
    assert_same_function(hbnet, resnet, images("hbnet50", dtype=torch.float32), tolerance=0)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(stem_type="deep", stem_width=32, avg_down=True),
        dict(block_args=dict(attn_layer="se")),
        dict(output_stride=8),
        dict(aa_layer=timm.layers.BlurPool2d),
        dict(replace_stem_pool=True),
        dict(cardinality=32, base_width=4),
        dict(act_layer="silu"),
    ],
    ids=["stem-d", "se", "dilated", "blur", "stem-conv-pool", "resnext", "silu"],
)
def test_every_resnet_option_keeps_the_special_case(kwargs):
    resnet = randomise(timm.models.ResNet(timm.models.Bottleneck, (2, 2, 2, 2), num_classes=7, **kwargs)).eval()
    hbnet = timm.create_model("hbnet50", layers=(2, 2, 2, 2), num_classes=7, **RESNET, **kwargs).eval()
    hbnet.load_state_dict(resnet.state_dict(), strict=True)
    assert_same_function(hbnet, resnet, images("hbnet50", dtype=torch.float32), tolerance=0)


@pytest.mark.parametrize("option", ["drop_path_rate", pytest.param("drop_block_rate", marks=DROP_BLOCK), "drop_rate"])
def test_stochastic_options_draw_as_timms_resnet_does(option):
    kwargs = {option: 0.3, "num_classes": 7, "layers": (2, 2, 2, 2)}
    # Generic weights: timm starts each branch at 0, which would hide drop path and drop block.
    resnet = randomise(timm.models.ResNet(timm.models.Bottleneck, **kwargs)).train()
    hbnet = timm.create_model("hbnet50", **RESNET, **kwargs).train()
    hbnet.load_state_dict(resnet.state_dict())
    x = images("hbnet50", dtype=torch.float32)
    outputs = []
    for model in (resnet, hbnet, resnet):
        torch.manual_seed(3)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], resnet(x))


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnet_weights_load_strictly(depth):
    with torch.device("meta"):
        state = timm.create_model(f"resnet{depth}").state_dict()
        timm.create_model(f"hbnet{depth}").load_state_dict(state, strict=True, assign=True)


class PlainCifarResNet(nn.Module):
    """ResNet for CIFAR as its authors describe it: option-A shortcuts, an activation after every addition."""

    def __init__(self, model):
        super().__init__()
        self.net = model

    def forward(self, x):
        net = self.net
        x = net.act1(net.bn1(net.conv1(x)))
        for stage in (net.layer1, net.layer2, net.layer3):
            for block in stage:
                shortcut = x
                if block.conv1.stride != (1, 1):
                    shortcut = x[:, :, ::2, ::2]
                    zeros = torch.zeros_like(shortcut[:, : x.shape[1] // 2])
                    shortcut = torch.cat([zeros, shortcut, zeros], 1)
                branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
                x = torch.relu(branch + shortcut)
        return net.fc(x.mean((2, 3)))


@pytest.mark.parametrize("name", marked(f"hbnet{d}_resnet" for d in (20, 56)))
def test_the_named_baselines_are_cifar_resnets(name):
    model = randomise(timm.create_model(name, dtype=torch.float64))
    reference = twin(model)
    assert_same_function(model, reference, images(name), PlainCifarResNet(reference))


def test_no_activation_follows_the_addition_unless_asked_for():
    x = images("hbnet20", dtype=torch.float32)
    assert timm.create_model("hbnet20").forward_features(x).min() < 0
    assert timm.create_model("hbnet20", post_act=True).forward_features(x).min() == 0


def parameters_without_gradient(**kwargs):
    model = timm.create_model("hbnet110", layers=(4, 4, 4), **kwargs)
    model(images("hbnet20", dtype=torch.float32)).square().sum().backward()
    return [name for name, p in model.named_parameters() if p.grad.abs().max() == 0]


def test_zero_init_last_kills_layers_and_so_is_off_by_default():
    """With T = 0, x_{k+1} = x_k − x_{k−1} reaches 0 at the third step: what lies behind a 0 gets no gradient."""
    assert not parameters_without_gradient()
    assert len(parameters_without_gradient(zero_init_last=True)) > len(
        parameters_without_gradient(zero_init_last=True, beta2=0.0)
    )


@pytest.mark.parametrize(
    ("name", "last", "options"),
    [
        ("hbnet20", "bn2", {}),
        ("hbnet18", "bn2", {}),
        ("hbnet50", "bn3", {}),
        ("optnet20", "bn2", dict(algorithm="admm")),
    ],
)
def test_init_last_is_the_weight_of_each_last_normalisation(name, last, options):
    def weights(**kwargs):
        torch.manual_seed(0)
        # Two calls a step in OptNet: the copies are drawn again, and start there as well.
        return timm.create_model(name, **options, **kwargs).state_dict()

    plain, scaled = weights(), weights(init_last=0.25)
    set_there = {key for key in plain if key.startswith("layer") and key.endswith(f".{last}.weight")}
    assert len(set_there) == sum(key.endswith(".bn1.weight") for key in plain)  # not the stem's, "bn1.weight"
    for key, value in plain.items():
        expected = torch.full_like(value, 0.25) if key in set_there else value
        assert torch.equal(scaled[key], expected), key
    zeros, same = weights(zero_init_last=True), weights(init_last=0)
    assert all(torch.equal(zeros[key], value) for key, value in same.items())
    assert not any(zeros[key].any() for key in set_there)


def test_the_iterates_keep_their_size_with_init_last_one_over_root_n():
    """Independent T of variance γ² give x_n of x_{k+1} = x_k − x_{k−1} + T_k the variance 2/3 n γ²."""

    def size(gamma):
        torch.manual_seed(0)
        model = timm.create_model("hbnet110", init_last=gamma).train()
        return model.forward_intermediates(torch.randn(8, 3, 32, 32), indices=[1])[1][0].square().mean().item()

    n = 18
    assert 0.5 < size(1.0) / (2 / 3 * n) < 2
    assert size(n**-0.5) < 2


def test_gradient_norm_at_initialisation_grows_without_bound_only_with_post_act():
    """The reason for leaving the activation out: 101 layers, β2 = −1 (design: 2e6 against 2e2)."""
    norms = {}
    for post_act in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("hbnet101", post_act=post_act, num_classes=10).train()
        loss = nn.functional.cross_entropy(model(images("hbnet50", 4, torch.float32)), torch.arange(4))
        loss.backward()
        norms[post_act] = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norms[True] > 100 * norms[False]


def test_learned_coefficients_start_at_the_given_values_and_get_gradients():
    model = timm.create_model("hbnet50", learn_beta=True, beta1=0.9, beta2=-0.5)
    assert model.layer3.beta1.shape == (5,)
    assert (model.layer3.beta1 == 0.9).all()
    assert (model.layer3.beta2 == -0.5).all()
    model(images("hbnet50", dtype=torch.float32)).square().sum().backward()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert (stage.beta1.grad != 0).all()
        assert (stage.beta2.grad != 0).all()


def test_checkpointing_gives_the_same_gradients():
    model = randomise(timm.create_model("hbnet20", learn_beta=True, beta_lr_scale=1.0, dtype=torch.float64)).eval()
    reference = twin(model)
    model.set_grad_checkpointing()
    assert_same_function(model, reference, images("hbnet20"), tolerance=1e-12)
    model.train()
    model(images("hbnet20")).sum().backward()


def test_checkpointing_stores_less():
    saved = {}
    for enable in (False, True):
        model = timm.create_model("hbnet56")
        model.set_grad_checkpointing(enable)
        total = 0

        def pack(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images("hbnet56", dtype=torch.float32))
        saved[enable] = total
    assert saved[True] < 0.5 * saved[False]


def test_a_model_built_on_meta_can_be_initialised_later():
    with torch.device("meta"):
        model = timm.create_model("hbnet20", learn_beta=True, beta2=-0.5)
    model.to_empty(device="cpu")
    model.init_weights()
    assert (model.layer2.beta2 == -0.5).all()
    limit = (6 / (64 + 10)) ** 0.5
    assert 0.9 * limit < model.fc.weight.abs().max() <= limit, "Xavier"
    fan_out = 9 * 64
    assert model.layer3[1].conv1.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), "He"
