"""``features_only`` in all of timm's forms: checkpointing changes no output, no gradient and no running statistic."""

import copy
import re

import pytest
import timm
import torch
from equality import assert_close_in_norm, randomise
from timm.models import FeatureDictNet, FeatureListNet

FAMILIES = {
    "hbnet18": dict(channels=(8, 8, 8, 8)),
    "hbnet50": dict(channels=(8, 8, 8, 8), layers=(2, 3, 2, 2)),
    "hbnet50-reversible": dict(channels=(8, 8, 8, 8), layers=(2, 3, 2, 2), memory="reversible"),
    "hbnet50-deep": dict(channels=(8, 8, 8, 8), layers=(2, 2, 2, 2), stem_type="deep", stem_width=8),
    "hbnet20": dict(channels=(4, 8, 8)),
    "optnet18": dict(channels=(8, 8, 8, 8), algorithm="agd"),
    "optnet20": dict(channels=(4, 8, 8), algorithm="admm"),
    "agdnet121": dict(growth_rate=4, block_config=(2, 3, 2, 2)),
    "agdnet121-deep": dict(growth_rate=4, block_config=(2, 2, 2, 2), stem_type="deep"),
    "agdnet40_k12": dict(growth_rate=4, block_config=(2, 3, 2), bn_size=2),
    "cellnet_cifar": dict(cells=4, channels=4),
    "cellnet_imagenet": dict(cells=3, channels=4),
}
# A cell reads two outputs, so CellNet is no chain.
KINDS = {"hbnet": ("list", "dict", "getter", "hook"), "cellnet": ("getter", "hook")}
KINDS["optnet"] = KINDS["agdnet"] = KINDS["hbnet"]
CHECKPOINTED = [(case, kind) for case in FAMILIES for kind in KINDS[re.match("[a-z]+", case).group()]]


def build(case, **kwargs):
    torch.manual_seed(0)
    name = case.partition("-")[0]
    kwargs = {**FAMILIES[case], "features_only": True, "dtype": torch.float64, **kwargs}
    return randomise(timm.create_model(name, **kwargs)).train()


def images(seed=1):
    return torch.randn(2, 3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def listed(features):
    return list(features.values()) if isinstance(features, dict) else features


def training_step(net, x):
    """Return features, gradients and buffers of a step."""
    x = x.clone().requires_grad_()
    features = listed(net(x))
    generator = torch.Generator().manual_seed(2)
    loss = sum((f * torch.randn(f.shape, generator=generator, dtype=f.dtype)).sum() for f in features)
    loss.backward()
    found = {f"feature {i}": feature.detach() for i, feature in enumerate(features)}
    found |= {"gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_same_step(got, expected):
    assert got.keys() == expected.keys()
    floor = 1e-4 * max(g.norm().item() for name, g in expected.items() if name.startswith("gradient"))
    for name, value in expected.items():
        is_gradient = name.startswith("gradient")
        assert_close_in_norm(got[name].double(), value.double(), 1e-10, name, floor if is_gradient else 0.0)


@pytest.mark.parametrize(("case", "kind"), CHECKPOINTED)
def test_checkpointing_changes_no_output_gradient_or_statistic(case, kind):
    """After two steps: a hook that is called again in a backward pass must not reorder the next one's features."""
    net = build(case, feature_cls=kind)
    saving = copy.deepcopy(net)
    saving.set_grad_checkpointing()
    for seed in (1, 2):
        assert_same_step(training_step(saving, images(seed)), training_step(net, images(seed)))
    counts = {int(buffer) for name, buffer in saving.named_buffers() if name.endswith("num_batches_tracked")}
    assert 2 in counts
    assert counts <= {0, 2}, "a batch was counted twice"  # 0: after the last feature


def take_weights(net, other):
    """Give a wrapper of a network the weights that another wrapper of it has."""

    def stripped(state):
        prefixes = r"^(?:model|body|graph_module)\."
        return {re.sub(prefixes, "", name).replace("features_", "features."): name for name in state}

    source, own = other.state_dict(), stripped(net.state_dict())
    found = stripped(source)
    net.load_state_dict({name: source[found[key]] for key, name in own.items()})
    return net


@pytest.mark.parametrize(("case", "kind"), [*CHECKPOINTED, *((case, "fx") for case in FAMILIES)])
def test_every_form_returns_the_features_of_the_default(case, kind):
    default = build(case)
    net = take_weights(build(case, feature_cls=kind), default)
    for training in (True, False):
        expected = default.train(training)(images())
        for got, wanted in zip(listed(net.train(training)(images())), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def bytes_kept(net, x):
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = listed(net(x))
    assert all(feature.requires_grad for feature in features)
    return sum(storages.values())


@pytest.mark.parametrize("case", [case for case in FAMILIES if not case.endswith("reversible")])
def test_checkpointing_is_switched_on_and_off(case):
    net, x = build(case), images()
    stored = bytes_kept(net, x)
    net.set_grad_checkpointing()
    assert bytes_kept(net, x) < stored
    net.set_grad_checkpointing(False)
    assert bytes_kept(net, x) == stored


@pytest.mark.parametrize("case", ["hbnet18", "hbnet50-deep", "agdnet121", "agdnet121-deep"])
def test_the_stem_is_recomputed_after_its_last_convolution(case):
    """Stages alone keep more: what the pooling has between its input and its output."""
    net, x = build(case, out_indices=(1, 2)), images()
    net.set_grad_checkpointing()
    saving = bytes_kept(net, x)
    net.recompute_stem = False
    assert saving < bytes_kept(net, x)
    taps = build(case, out_indices=(0, 1))
    taps.set_grad_checkpointing()
    assert len(taps(x)) == 2, "a feature of the stem is returned"


def test_a_reversible_network_recomputes_its_stem_without_being_asked(monkeypatch):
    net, stored = (build(case, out_indices=(1, 2)) for case in ("hbnet50-reversible", "hbnet50"))
    assert_same_step(training_step(net, images()), training_step(stored, images()))
    saving = bytes_kept(net, images())
    monkeypatch.setattr("timm_models._features.is_reversible", lambda stage: False)
    assert saving < bytes_kept(net, images())


@pytest.mark.parametrize("case", ["hbnet18", "agdnet121", "optnet20", "agdnet40_k12"])
def test_a_stem_alone_can_be_checkpointed(case):
    net = build(case, out_indices=(0,))
    saving = copy.deepcopy(net)
    saving.set_grad_checkpointing()
    assert_same_step(training_step(saving, images()), training_step(net, images()))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), [("hbnet18", "list"), ("optnet20", "dict"), ("agdnet121", "list")])
def test_scripts_and_compiles_as_timms_own(case, kind):
    net = build(case, feature_cls=kind).eval()
    expected = listed(net(images()))
    scripted = listed(torch.jit.script(net)(images()))
    compiled = listed(torch.compile(net, backend="aot_eager", fullgraph=True)(images()))
    for other in (scripted, compiled):
        for got, wanted in zip(other, expected, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hbnet18", "agdnet121"])
def test_checkpointing_is_right_under_compile(case):
    net = build(case)
    saving = copy.deepcopy(net)
    saving.set_grad_checkpointing()
    compiled = torch.compile(saving, backend="aot_eager")
    compiled(images())  # the step below is the compiled one, statistics of this one included
    net(images())
    got, expected = training_step(compiled, images(2)), training_step(net, images(2))
    assert_same_step({name.replace("_orig_mod.", ""): value for name, value in got.items()}, expected)


def test_timms_classes_are_taken_as_their_names():
    for timms, keys in ((FeatureListNet, None), (FeatureDictNet, ["0", "1", "2", "3"])):
        net = build("hbnet20", feature_cls=timms)
        net.set_grad_checkpointing()
        assert not net.grad_checkpointing, "timm's, which counts a batch twice"
        assert isinstance(net, timms)
        features = net(images())
        assert keys is None or list(features) == keys

    class Own(FeatureListNet):
        pass

    assert type(build("agdnet40_k12", feature_cls=Own)) is Own


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("cellnet_cifar", "list", "feature_cls='list': must be one of 'getter', 'fx', 'hook'"),
        ("cellnet_imagenet", "dict", "feature_cls='dict': must be one of 'getter', 'fx', 'hook'"),
        ("hbnet20", "tree", "feature_cls='tree': must be one of 'list', 'dict', 'getter', 'fx', 'hook'"),
    ],
)
def test_an_unsupported_form_is_refused_by_name(case, kind, message):
    with pytest.raises(ValueError, match=message):
        build(case, feature_cls=kind)
    with pytest.raises(ValueError, match="feature_cls='list'"):
        build("cellnet_cifar", feature_cls=FeatureListNet)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_graph_refuses_checkpointing(case):
    net = build(case, feature_cls="fx")
    net.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match="feature_cls='fx' with checkpointing"):
        net.set_grad_checkpointing()
