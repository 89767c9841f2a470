"""A checkpoint says by which rule its weights were trained, and is not loaded into another function unseen."""

import copy
import warnings

import pytest
import timm
import torch
from equality import randomise, without_rules
from extras import needs_version
from my_algorithms import LearnedHeavyBall
from timm.models import save_for_hf
from timm.utils import ModelEmaV3

from optinspired_plugins import HeavyBall
from timm_models import NETWORK_ALGORITHMS, to_heavy_ball, to_nesterov

SMALL = {
    "hbnet18": dict(layers=(1, 2, 1, 3), channels=(8, 8, 12, 16)),
    "hbnet50": dict(layers=(2, 1, 3, 2), channels=(4, 4, 6, 8)),
    "hbnet20": dict(layers=(3, 2, 1), channels=(4, 6, 8)),
    "hbnet20_resnet": dict(layers=(3, 2, 1), channels=(4, 6, 8)),
    "optnet20": dict(layers=(3, 2, 1), channels=(4, 6, 8)),
    "optnet50": dict(layers=(2, 1, 3, 2), channels=(4, 4, 6, 8)),
    "agdnet121": dict(block_config=(2, 1, 3, 2), growth_rate=8),
    "agdnet40_k12": dict(block_config=(2, 3, 1), growth_rate=4),
}


def build(name, **kwargs):
    return timm.create_model(name, **{"num_classes": 5, **SMALL[name], **kwargs})


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def silently(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load()


RULES = [
    ("hbnet18", {}),
    ("hbnet50", dict(beta1=0.9, beta2=-0.5)),
    ("hbnet50", dict(learn_beta=True)),
    ("hbnet20", dict(post_act=True, beta2=0.3)),
    ("hbnet20", dict(learn_beta=True)),
    ("hbnet20_resnet", {}),
    ("optnet20", {}),
    ("optnet50", dict(algorithm="admm")),
    ("optnet20", dict(algorithm="agd2")),
    ("optnet20", dict(algorithm=LearnedHeavyBall())),
    ("agdnet121", {}),
    ("agdnet40_k12", dict(beta=0.7, learn_alpha=False)),
]
rules = pytest.mark.parametrize(("name", "kwargs"), RULES, ids=str)


def rules_of(state):
    return {key: value for key, value in state.items() if key.rpartition(".")[2] == "rule"}


@rules
def test_the_same_rule_loads_without_a_word(name, kwargs):
    model, other = randomise(build(name, **kwargs)).eval(), build(name, **kwargs).eval()
    silently(lambda: other.load_state_dict(model.state_dict()))
    assert torch.equal(other(images()), model(images()))
    assert len(rules_of(model.state_dict())) == (3 if "20" in name or "40" in name else 4)


OTHERS = [
    ("hbnet20", dict(beta2=-0.5), {}, r"checkpoint's network has beta2=-0.5, this one beta2=-1.0: pass beta2=-0.5 to"),
    ("hbnet20", dict(beta2=0.0), {}, r"has beta2=0.0, this one beta2=-1.0: .*; timm_models.to_heavy_ball changes it"),
    ("hbnet50", dict(beta1=0.97), {}, r"has beta1=0.97, this one beta1=1.0"),
    ("hbnet20", dict(post_act=True), {}, r"has post_act=True, this one post_act=False: pass post_act=True"),
    (
        "hbnet50",
        dict(stride_in_1x1=False),
        {},
        r"has stride_in_1x1=False, this one stride_in_1x1=True: pass \S+ to load",
    ),
    (
        "optnet50",
        dict(stride_in_1x1=False),
        dict(algorithm="agd"),
        r"has algorithm='hb', stride_in_1x1=False, this one a",
    ),
    ("hbnet20", dict(learn_beta=True), {}, r"layer1.beta1 is of a network with learn_beta=True: pass it"),
    (
        "hbnet20",
        {},
        dict(learn_beta=True),
        r"no layer1.beta1: load it with learn_beta=False, then timm_models.to_heavy",
    ),
    (
        "hbnet20",
        dict(learn_beta=True, post_act=True),
        dict(learn_beta=True),
        "has post_act=True, this one post_act=Fal",
    ),
    ("agdnet40_k12", dict(beta=0.5), {}, r"has beta=0.5, this one beta=0.1: pass beta=0.5 .*; timm_models.to_nesterov"),
    ("agdnet121", {}, dict(learn_alpha=False), r"denselayer1.alpha is of a network with learn_alpha=True: pass it"),
    ("agdnet121", dict(learn_alpha=False), {}, r"alpha: load it with learn_alpha=False, then timm_models.to_nesterov"),
    ("optnet20", dict(algorithm="gd"), {}, r"has algorithm='gd', this one algorithm='hb': pass algorithm='gd' to load"),
    ("optnet20", dict(algorithm="agd"), dict(algorithm="agd2"), r"has algorithm='agd', this one algorithm='agd2'"),
    (
        "optnet20",
        dict(algorithm="dmrnet"),
        dict(algorithm="admm"),
        r"has algorithm='dmrnet', this one algorithm='admm'",
    ),
    ("optnet20", dict(algorithm=HeavyBall(0.3)), {}, r"has beta1=0.3, beta2=-0.3, this one algorithm='hb'"),
    ("optnet20", dict(algorithm=LearnedHeavyBall()), {}, r"has algorithm='one that runs as it stands', this one algor"),
]


@pytest.mark.parametrize(("name", "trained", "built", "message"), OTHERS, ids=lambda v: str(v)[:40])
def test_another_rule_is_an_error_that_names_both(name, trained, built, message, tmp_path):
    torch.save(build(name, **trained).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=message) as caught:
        build(name, **built, checkpoint_path=tmp_path / "weights.pth")
    assert str(caught.value).count("the checkpoint's network has") <= 1, "once a network, not once a stage"


def test_strict_false_does_not_excuse_another_rule():
    with pytest.raises(RuntimeError, match=r"has beta2=-0.5"):
        build("hbnet20").load_state_dict(build("hbnet20", beta2=-0.5).state_dict(), strict=False)


@pytest.mark.parametrize(("name", "algorithm"), [("hbnet20", "hb"), ("hbnet50", HeavyBall(1.0))])
def test_hbnet_and_its_optnet_have_one_rule(name, algorithm):
    ours = build(name)
    theirs = build(name.replace("hbnet", "optnet"), algorithm=algorithm)
    assert rules_of(ours.state_dict()).keys() == rules_of(theirs.state_dict()).keys()
    silently(lambda: theirs.load_state_dict(ours.state_dict()))
    silently(lambda: ours.load_state_dict(theirs.state_dict()))


def test_every_algorithm_has_a_rule_of_its_own():
    """Of its own but where it is the same function."""
    rules = {a: rules_of(build("optnet20", algorithm=a, layers=(4, 1, 1)).state_dict()) for a in NETWORK_ALGORITHMS}
    for one in rules:
        for other in rules:
            values = rules[one]["layer1.rule"], rules[other]["layer1.rule"]
            assert (values[0].shape == values[1].shape and torch.allclose(*values)) == (one == other)


@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("hbnet20", dict(layers=(1, 1, 1)), dict(beta2=0.3)),  # one layer has no step of (16)
        ("hbnet18", {}, dict(stride_in_1x1=False)),  # two 3×3 convolutions
        ("agdnet40_k12", dict(block_config=(1, 1, 1)), dict(beta=0.9)),
    ],
)
def test_arguments_without_an_effect_are_no_part_of_a_rule(name, options, same):
    one, other = randomise(build(name, **options)).eval(), build(name, **options, **same).eval()
    silently(lambda: other.load_state_dict(one.state_dict()))
    assert torch.equal(one(images()), other(images()))


# --- checkpoints without a rule ---------------------------------------------------------------------------------------

TWINS = [
    (
        "resnet50",
        "hbnet50",
        {},
        r"this HBNet has beta1=1.0, beta2=-1.0, post_act=False, stride_in_1x1=True. .*to_heavy",
    ),
    ("resnet18", "hbnet18", dict(beta2=-0.5), r"this HBNet has beta1=1.0, beta2=-0.5, post_act=False. For weights of"),
    ("resnet50", "hbnet50", dict(beta2=0, post_act=True), r"beta2=0.0, post_act=True, stride_in_1x1=True"),
    ("resnet18", "optnet18", dict(algorithm="agd"), r"this OptNet has algorithm='gd' or 'agd', post_act=False"),
    ("densenet121", "agdnet121", dict(learn_alpha=False), r"this AGDNet has beta=0.1. .* timm_models.to_nesterov"),
    ("resnet50", "hbnet50", dict(beta2=0, post_act=True, stride_in_1x1=False), None),
    ("resnet18", "hbnet18", dict(beta2=0, post_act=True), None),
    ("densenet121", "agdnet121", dict(beta=0, learn_alpha=False), None),
]


@pytest.mark.parametrize(("twin", "name", "kwargs", "message"), TWINS, ids=lambda v: str(v)[:40])
def test_timms_weights_load_strictly_with_one_warning(twin, name, kwargs, message):
    with torch.device("meta"):
        state, model = timm.create_model(twin).state_dict(), timm.create_model(name, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(state, strict=True, assign=True)
    assert len(caught) == (message is not None)
    if message is not None:
        with pytest.warns(UserWarning, match=message):
            model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("name", ["hbnet20", "hbnet20_resnet", "optnet20", "agdnet40_k12"])
def test_an_old_checkpoint_of_ours_warns_unless_it_is_the_twins(name):
    model = build(name)
    load = lambda: model.load_state_dict(without_rules(model.state_dict()))  # noqa: E731
    if name == "hbnet20_resnet":
        silently(load)
    else:
        with pytest.warns(UserWarning, match="the checkpoint does not hold the rule that its weights were trained by"):
            load()


def test_features_only_warns_and_refuses_too():
    features = build("hbnet50", features_only=True, out_indices=(1, 2))
    whole = build("hbnet50").state_dict()
    own = {key: whole[key] for key in features.state_dict()}
    silently(lambda: features.load_state_dict(own))
    with pytest.warns(UserWarning, match="this HBNet has beta1=1.0"):
        features.load_state_dict(without_rules(own))
    other = build("hbnet50", beta2=-0.5).state_dict()
    with pytest.raises(RuntimeError, match=r"has beta2=-0.5, this one beta2=-1.0"):
        features.load_state_dict({key: other[key] for key in own})
    agd = build("agdnet121", features_only=True)
    assert len(rules_of(agd.state_dict())) == 4


# --- what may happen to a module before it is saved -------------------------------------------------------------------


def averaged(model):
    ema = ModelEmaV3(model, decay=0.9)
    for _ in range(5):
        ema.update(model)
    return ema.module


def emptied(model):
    state = model.state_dict()
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    moved.load_state_dict(without_rules(state) if not rules_of(state) else state)
    return moved


def unloaded(model):
    """Memory without values: the rule is not among what is missing."""
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    return moved.load_state_dict(model.state_dict() | rules_of(moved.state_dict())) and moved


def assigned(model):
    with torch.device("meta"):
        moved = copy.deepcopy(model).to("meta")
    moved.load_state_dict(model.state_dict(), assign=True)
    assert not any(buffer.is_meta for buffer in moved.buffers())
    return moved


CHANGES = {
    "half": lambda model: copy.deepcopy(model).half(),
    "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "double": lambda model: copy.deepcopy(model).double(),
    "ema": averaged,
    "to_empty": emptied,
    "to_empty, no values": unloaded,
    "assigned": assigned,
    "inference": lambda model: _in_inference_mode(model),
}


def _in_inference_mode(model):
    with torch.inference_mode():
        moved = copy.deepcopy(model).float()
    return moved.cpu().float()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "kwargs"), [RULES[1], RULES[4], RULES[7], RULES[8], RULES[11]], ids=str)
@pytest.mark.filterwarnings("ignore:.*non-meta parameter")
def test_a_rule_survives(name, kwargs, change):
    model = build(name, **kwargs)
    changed = CHANGES[change](model)
    silently(lambda: model.load_state_dict(changed.state_dict()))
    expected = rules_of(model.state_dict())
    for key, value in rules_of(changed.state_dict()).items():
        torch.testing.assert_close(value.to(expected[key].dtype), expected[key], rtol=5e-3, atol=1e-6)


def test_a_rule_of_another_network_does_not_stay():
    """A rule that agrees within rounding does not replace the own."""
    model = build("hbnet20", beta2=-0.3)
    model.load_state_dict(build("hbnet20", beta2=-0.3).bfloat16().state_dict())
    assert model.layer1.rule[1] == torch.tensor(-0.3)
    assert build("hbnet20", beta2=-0.3).bfloat16().layer1.rule[1] != torch.tensor(-0.3)


@pytest.mark.parametrize(("name", "kwargs"), [RULES[1], RULES[7], RULES[10]], ids=str)
def test_scripts_exports_and_compiles(name, kwargs):
    model, x = randomise(build(name, **kwargs)).eval(), images()
    scripted = torch.jit.script(model)
    assert rules_of(scripted.state_dict()).keys() == rules_of(model.state_dict()).keys()
    exported = torch.export.export(model, (x,)).module()
    functional = torch.func.functional_call(model, model.state_dict(), (x,))
    for got in (scripted(x), exported(x), functional):
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


# --- conversions ------------------------------------------------------------------------------------------------------


def test_a_converted_network_has_its_new_rule():
    trained = build("hbnet20", beta2=-0.5)
    changed = to_heavy_ball(trained, beta2=-0.9)
    silently(lambda: build("hbnet20", beta2=-0.9).load_state_dict(changed.state_dict()))
    with pytest.raises(RuntimeError, match=r"has beta2=-0.9, this one beta2=-0.5"):
        trained.load_state_dict(changed.state_dict())
    learned = to_heavy_ball(trained, learn_beta=True)
    silently(lambda: build("hbnet20", learn_beta=True).load_state_dict(learned.state_dict()))
    with pytest.warns(UserWarning, match="this CifarHBNet has beta1=1.0, beta2=-0.9"):
        changed.load_state_dict(without_rules(changed.state_dict()))
    agd = to_nesterov(build("agdnet40_k12", beta=0.2), beta=0.4)
    silently(lambda: build("agdnet40_k12", beta=0.4).load_state_dict(agd.state_dict()))


def test_a_converted_twin_loads_the_twins_weights_without_a_warning():
    resnet = timm.create_model("resnet18", num_classes=5)
    hbnet = to_heavy_ball(resnet)
    silently(lambda: hbnet.load_state_dict(resnet.state_dict()))
    with pytest.warns(UserWarning, match="beta2=-0.5, post_act=True"):
        to_heavy_ball(resnet, beta2=-0.5).load_state_dict(resnet.state_dict())


@needs_version("timm", "1.0.31", "keeps no record of a model's arguments")
def test_a_folder_with_its_arguments_changed_is_refused(tmp_path):
    save_for_hf(build("hbnet20", beta2=-0.5), tmp_path)
    silently(lambda: timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    with pytest.raises(RuntimeError, match=r"has beta2=-0.5, this one beta2=-0.7"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, beta2=-0.7)


def test_fused_networks_keep_what_stages_are_left():
    fused = build("hbnet18").eval().fuse()
    silently(lambda: copy.deepcopy(fused).load_state_dict(fused.state_dict()))
    with pytest.raises(RuntimeError, match=r"has beta2=-0.5"):
        fused.load_state_dict(build("hbnet18", beta2=-0.5).eval().fuse().state_dict())
