"""The start of HBNet and OptNet: the weight γ of each transform's last normalisation, read off the algorithm."""

import copy
import math
import pickle

import pytest
import timm
import torch
from extras import needs
from my_algorithms import LearnedHeavyBall
from timm.models import save_for_hf
from timm.utils.misc import ParseKwargs

from optinspired_plugins import HeavyBall, trace
from timm_models import NETWORK_ALGORITHMS, AlgorithmStage, hbnet, to_heavy_ball
from timm_models.stages import start

DEPTHS = (3, 8, 18)


def gammas(net):
    """γ of each stage, which all of its transforms share."""
    stages = [{T.last_norm().weight.unique().item() for T in stage.transforms()} for stage in net.stages()]
    assert all(len(values) == 1 for values in stages)
    return [values.pop() for values in stages]


def build(name="hbnet20", layers=DEPTHS, init_last="auto", channels=(2, 2, 2), **kwargs):
    return timm.create_model(name, layers=layers, channels=channels, init_last=init_last, **kwargs)


def of_squares(*squares):
    return pytest.approx([square**-0.5 for square in squares])


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [dict(learn_beta=True), {}], ids=str)
def test_the_heavy_ball_starts_at_n_minus_a_third(learned):
    assert gammas(build(**learned)) == of_squares(2, 6, 12)
    assert gammas(build("optnet20")) == of_squares(2, 6, 12)
    bottlenecks = timm.create_model("hbnet50", layers=(1, 2, 3, 4), channels=(2, 2, 2, 2), init_last="auto", **learned)
    assert gammas(bottlenecks) == of_squares(1, 2, 2, 3)


def test_without_momentum_the_start_is_one_over_root_n():
    assert gammas(build(beta2=0.0)) == of_squares(*DEPTHS)
    assert gammas(build(post_act=True)) == of_squares(*DEPTHS), "activations change the weights"


def test_other_coefficients_have_their_own_start():
    """g_0 = 1, g_1 = β1, g_{i+1} = β1 g_i + β2 g_{i−1}."""
    g = [1.0, 0.5]
    while len(g) < 18:
        g.append(0.5 * g[-1] - 0.7 * g[-2])
    expected = of_squares(*(sum(x * x for x in g[:n]) for n in DEPTHS))
    assert gammas(build(beta1=0.5, beta2=-0.7)) == expected
    assert gammas(build(beta1=0.5, beta2=-0.7, learn_beta=True)) == expected


@pytest.mark.parametrize("name", NETWORK_ALGORITHMS)
def test_every_algorithm_starts_at_its_own_weights(name):
    net = build("optnet20", algorithm=name)
    programs = [trace(NETWORK_ALGORITHMS[name](), n, transition=True) for n in DEPTHS]
    squares = [sum(w * w for w in program.gains()[1:]) for program in programs]
    assert gammas(net) == pytest.approx([min(1, square**-0.5) for square in squares])


def test_gradient_descent_starts_at_1_and_no_start_is_above():
    """Only the last layer of gradient descent reaches the output; ADMM's single step halves both of its layers."""
    assert gammas(build("optnet20", algorithm="gd")) == [1, 1, 1]
    assert gammas(build("optnet20", algorithm="admm", layers=(1, 1, 1))) == [1, 1, 1]


def test_learned_coefficients_of_an_algorithm_count_with_their_start():
    expected = gammas(build("optnet20", algorithm=HeavyBall(0.5)))
    learned = build("optnet20", algorithm=LearnedHeavyBall(0.5))
    assert isinstance(learned.layer1, AlgorithmStage)
    assert gammas(learned) == expected
    assert gammas(build("optnet20", algorithm=HeavyBall(torch.nn.Parameter(torch.tensor(0.5))))) == expected


class Normalised:
    """A step of unit length."""

    def init(self, x0):
        return x0

    def step(self, state, grad):
        g = grad(state)
        return state - g / g.norm()

    def result(self, state):
        return state


class Idle(Normalised):
    """Returns x_0 until its second step."""

    def init(self, x0):
        return x0, x0

    def step(self, state, grad):
        return state[0] - grad(state[0]), state[0]

    def result(self, state):
        return state[1]


def test_an_algorithm_that_is_not_linear_starts_at_one_over_root_n():
    assert gammas(build("optnet20", algorithm=Normalised())) == of_squares(*DEPTHS)


def test_layers_without_weight_in_the_output_start_at_1():
    assert gammas(build("optnet20", algorithm=Idle(), layers=(1, 1, 1))) == [1, 1, 1]


def test_one_constant_scales_all_starts(monkeypatch):
    monkeypatch.setattr(start, "START_SCALE", 0.5)
    assert gammas(build()) == of_squares(8, 24, 48)


# --- the variance -----------------------------------------------------------------------------------------------------

CASES = [("hbnet20", {}), ("hbnet20", dict(beta2=0.0)), *(("optnet20", dict(algorithm=a)) for a in NETWORK_ALGORITHMS)]


def second_moments(net, x):
    """E x² of the shortcut and of the output of each stage."""
    moments = []
    x = net.act1(net.bn1(net.conv1(x)))
    for stage in net.stages():
        shortcut = stage[0].downsample
        start = x if shortcut is None else shortcut(x[:, :, :: stage.stride, :: stage.stride])
        x = stage(x)
        moments.append((start.square().mean().item(), x.square().mean().item()))
    return moments


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_stage_adds_the_variance_of_its_rule(name, options):
    """E x_n² = h² E S(u)² + γ² Σ_j w_j²; with the start "auto", the last term is 1 for sums of many layers."""
    torch.manual_seed(0)
    layers = (3, 18, 36)
    net = build(name, layers, channels=(16, 32, 64), **options).train()
    with torch.no_grad():
        moments = second_moments(net, torch.randn(8, 3, 32, 32))
    for n, stage, gamma, (of_start, of_output) in zip(layers, net.stages(), gammas(net), moments):
        if name == "hbnet20":
            h = (1, 1, 0, -1, -1, 0)[n % 6] if "beta2" not in options else 1
        else:
            h = trace(NETWORK_ALGORITHMS[options["algorithm"]](), n, transition=True).gains()[0]
        added = gamma**2 * math.fsum(w * w for w in stage.gains())
        assert added <= 1 + 1e-6
        assert of_output == pytest.approx(h**2 * of_start + added, rel=0.05)
    if name == "hbnet20":
        assert added == pytest.approx(1)


# --- the argument -----------------------------------------------------------------------------------------------------


def test_numbers_and_zero_are_what_they_say():
    assert gammas(build(init_last=0.25)) == [0.25] * 3
    assert gammas(build(init_last=1)) == [1] * 3
    assert gammas(build(init_last="zero")) == gammas(build(init_last=1.0, zero_init_last=True)) == [0] * 3
    assert gammas(timm.create_model("hbnet20", zero_init_last=True)) == [0] * 3


@pytest.mark.parametrize("family", ["hbnet", "optnet"])
def test_a_network_as_typed_starts_by_the_rule(family):
    assert gammas(timm.create_model(f"{family}20", layers=DEPTHS)) == of_squares(2, 6, 12)
    assert gammas(timm.create_model(f"{family}18")) == of_squares(2, 2, 2, 2)
    assert gammas(timm.create_model(f"{family}50")) == of_squares(2, 3, 4, 2)


@pytest.mark.parametrize("name", ["hbnet20", "hbnet50", "optnet20", "optnet50"])
@pytest.mark.parametrize("value", ["Auto", "", "0.5", math.nan, True, [1.0]])
def test_another_value_is_named(name, value):
    with pytest.raises(ValueError, match=r"^init_last=.*: must be a finite number, 'auto' or 'zero'$"):
        timm.create_model(name, init_last=value)


@pytest.mark.parametrize("value", ["zero", 0.5])
def test_two_arguments_for_the_start_are_refused(value):
    with pytest.raises(ValueError, match=rf"init_last={value!r} with zero_init_last=True: pass one of them"):
        timm.create_model("hbnet20", init_last=value, zero_init_last=True)


@pytest.mark.parametrize("name", ["hbnet20", "hbnet18", "optnet20"])
def test_a_normalisation_without_weight_has_no_start(name):
    net = timm.create_model(name, norm_layer=torch.nn.InstanceNorm2d, init_last="auto")
    assert net(torch.randn(2, 3, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match=r"init_last=0.0: must be 1 with a norm_layer that has no weight"):
        timm.create_model(name, norm_layer=torch.nn.InstanceNorm2d, init_last="zero")


@pytest.mark.parametrize("layers", range(1, 13))
def test_a_zero_start_cuts_stages_of_2_5_8_layers(layers):
    """With T = 0 the input of a stage has the weight 1, 1, 0, −1, −1, 0, … in its output."""
    net, u = build(layers=(layers, 1, 1), init_last="zero"), torch.randn(2, 2, 4, 4)
    assert torch.equal(net.layer1(u), (1, 1, 0, -1, -1, 0)[layers % 6] * u)


def test_initialising_again_restores_the_start():
    for options in ({}, dict(algorithm="admm")):
        net = build("optnet20" if options else "hbnet20", **options)
        expected = gammas(net)
        for T in (T for stage in net.stages() for T in stage.transforms()):
            torch.nn.init.ones_(T.last_norm().weight)
        net.init_weights()
        assert gammas(net) == expected
        net.init_weights(zero_init_last=True)
        assert gammas(net) == [0] * 3


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_the_named_baselines_ask_for_the_start_of_the_paper(depth, monkeypatch):
    monkeypatch.setattr(hbnet, "build_with_features", lambda *args, **kwargs: kwargs)
    assert getattr(hbnet, f"hbnet{depth}_resnet")()["init_last"] == 1.0
    assert getattr(hbnet, f"hbnet{depth}_resnet")(init_last="auto")["init_last"] == "auto"


def test_a_conversion_keeps_the_weights():
    resnet = timm.create_model("resnet18")
    for block in (block for stage in (resnet.layer1, resnet.layer2) for block in stage):
        torch.nn.init.constant_(block.bn2.weight, 0.7)
    for model, options in ((resnet, {}), (build(), dict(learn_beta=True)), (build(), dict(beta1=0.5))):
        state = to_heavy_ball(model, **options).state_dict()
        for name, value in model.state_dict().items():
            assert name.endswith("rule") or torch.equal(state[name], value), name


# --- hosts ------------------------------------------------------------------------------------------------------------


def test_timms_command_line_passes_the_string():
    arguments = {}
    namespace = type("Namespace", (), {"options": arguments})()
    ParseKwargs(["--model-kwargs"], "options")(None, namespace, ["init_last=auto"])
    assert gammas(timm.create_model("hbnet20", **namespace.options)) == of_squares(2, 2, 2)


def test_a_published_model_keeps_its_start(tmp_path):
    net = timm.create_model("hbnet20", init_last="auto", layers=(2, 3, 4))
    if not hasattr(net, "_model_args"):
        pytest.skip("this timm does not save arguments")
    save_for_hf(net, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (loaded.init_last, gammas(loaded)) == ("auto", gammas(net))
    loaded.init_weights()
    assert gammas(loaded) == of_squares(2, 2, 3)


def test_copies_and_pickles_keep_the_start():
    net = build("optnet20", algorithm=LearnedHeavyBall(0.5))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.init_last == "auto"
        other.init_weights()
        assert gammas(other) == gammas(net)


@pytest.mark.parametrize("kind", ["HBNet", "OptNet"])
def test_an_mmengine_backbone_takes_the_start(kind):
    needs("mmengine")
    from optinspired_plugins.mm import MODELS

    backbone = MODELS.build(dict(type=kind, depth=20, init_last="auto"))
    weights = torch.cat([T.last_norm().weight for T in backbone.modules() if hasattr(T, "last_norm")])
    assert weights.numel() == 3 * (16 + 32 + 64)
    torch.testing.assert_close(weights, torch.full_like(weights, 2**-0.5))
    with pytest.raises(ValueError, match="init_last='small': must be a finite number, 'auto' or 'zero'"):
        MODELS.build(dict(type=kind, depth=20, init_last="small"))
