"""A fast form stands in for modules only while it computes what they would.

Every family and form × every way in which a module can be changed: outputs, gradients and buffers are compared with
the plain form, module by module, in double precision; for the special cases with timm's own network.
"""

import functools
from types import MethodType

import pytest
import torch
from forms import FORMS, TWINS, assert_equal, build, copies, images, plainly, result, twin_of
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations


def leaves(model):
    return [module for module in model.modules() if not any(True for _ in module.children())]


def norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def convs(model):
    return [module for module in model.modules() if type(module) is nn.Conv2d]


def blocks(model):
    names = ("BasicTransform", "BottleneckTransform", "BasicBlock", "SourceLayer", "DenseLayer", "Cell")
    return [module for module in model.modules() if type(module).__name__ in names]


def each(modules, change):
    """A change of every such module of a model."""

    def apply(model):
        for module in modules(model):
            change(module)

    return apply


def replace(modules, make):
    """A change that puts another module in the place of every such module."""

    def apply(model):
        wanted = {id(module) for module in modules(model)}
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in wanted:
                    parent._modules[name] = make(child)

    return apply


def grow(*arguments):
    """The last argument of a hook, enlarged."""
    return scaled(arguments[-1])


def scaled(value):
    if isinstance(value, (tuple, list)):
        return type(value)(map(scaled, value))
    return value if value is None else value * 1.01


def patch(module):
    original = module.forward
    module.forward = lambda *args: 1.01 * original(*args)


def patch_conv_forward(conv):
    conv._conv_forward = MethodType(lambda self, x, w, b: 1.01 * nn.Conv2d._conv_forward(self, x, w, b), conv)


class LargerConv(nn.Conv2d):
    def forward(self, x):
        return 1.01 * super().forward(x)


class LargerNorm(BatchNormAct2d):
    def forward(self, x):
        return 1.01 * super().forward(x)


def make_subclass(module):
    module.__class__ = LargerConv if isinstance(module, nn.Conv2d) else LargerNorm


def old_spectral_norm(conv):
    torch.manual_seed(4)
    torch.nn.utils.spectral_norm(conv)


def spectral_norm(conv):
    torch.manual_seed(4)
    parametrizations.spectral_norm(conv)


def group_norm(norm):
    group = nn.GroupNorm(1, norm.num_features).double()
    return nn.Sequential(group, getattr(norm, "act", nn.Identity()))


def add_bias(conv):
    conv.bias = nn.Parameter(torch.full([conv.out_channels], 0.1, dtype=torch.float64))


def freeze_statistics(norm):
    norm.track_running_stats = False  # as Lightning's BaseFinetuning.freeze


def without_statistics(norm):
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


def without_scale(norm):
    norm.weight = norm.bias = None


def keep_outputs(model):
    """Hooks that hold every output; they must stay as they were."""
    out_of_place(model)
    model.held = []

    def hold(module, args, out):
        if isinstance(out, torch.Tensor):
            model.held.append((out, out.detach().clone()))

    for module in model.modules():
        module.register_forward_hook(hold)


def relus(model):
    return [module for module in model.modules() if isinstance(module, nn.ReLU)]


def out_of_place(model):
    """ReLU in place would overwrite what a hook holds, in any network."""
    for relu in relus(model):
        relu.inplace = False


def backward_hooks(modules):
    """Backward hooks that enlarge gradients."""

    def apply(model):
        out_of_place(model)
        for module in modules(model):
            module.register_full_backward_hook(lambda module, inputs, outputs: scaled(inputs))

    return apply


def backward_pre_hooks(model):
    out_of_place(model)
    for module in leaves(model):
        module.register_full_backward_pre_hook(grow)


def freeze(part):
    def apply(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part not in name)

    return apply


STATES = {
    "nothing": lambda model: None,
    "evaluation": lambda model: model.eval(),
    "norms in evaluation": each(norms, lambda norm: norm.eval()),
    "every other norm in evaluation": lambda model: [norm.eval() for norm in norms(model)[::2]],
    "statistics not tracked": each(norms, freeze_statistics),
    "statistics not tracked, evaluation": lambda model: each(norms, freeze_statistics)(model.eval()),
    "no statistics": each(norms, without_statistics),
    "no statistics, evaluation": lambda model: each(norms, without_statistics)(model.eval()),
    "cumulative statistics": each(norms, lambda norm: setattr(norm, "momentum", None)),
    "norms without scale": each(norms, without_scale),
    "other eps": each(norms, lambda norm: setattr(norm, "eps", 0.1)),
    "first layer frozen": freeze("1.0."),
    "norms frozen": freeze("norm"),
    "convolutions frozen": freeze("conv"),
    "all frozen but the classifier": lambda model: [
        p.requires_grad_("fc" in n or "cl" in n) for n, p in model.named_parameters()
    ],
}
CHANGES = {
    "forward hooks": each(leaves, lambda module: module.register_forward_hook(grow)),
    "forward pre-hooks": each(leaves, lambda module: module.register_forward_pre_hook(grow)),
    "backward hooks": backward_hooks(leaves),
    "backward hooks of convolutions": backward_hooks(convs),
    "backward pre-hooks": backward_pre_hooks,
    "hooks of blocks": each(blocks, lambda module: module.register_forward_hook(grow)),
    "backward hooks of blocks": backward_hooks(blocks),
    "hooks that hold outputs": keep_outputs,
    "patched convolutions": each(convs, patch),
    "patched norms": each(norms, patch),
    "patched activations": each(relus, patch),
    "patched poolings": each(lambda model: [m for m in leaves(model) if "Pool2d" in type(m).__name__], patch),
    "patched blocks": each(blocks, patch),
    "patched _conv_forward": each(convs, patch_conv_forward),
    "subclassed convolutions": each(convs, make_subclass),
    "subclassed norms": each(lambda model: [m for m in norms(model) if type(m) is BatchNormAct2d], make_subclass),
    "other activations": replace(relus, lambda _: nn.Softplus()),
    "group norms": replace(norms, group_norm),
    "wrapped convolutions": replace(convs, lambda conv: nn.Sequential(conv, nn.Tanh())),
    "weight normalisation": each(convs, parametrizations.weight_norm),
    "spectral normalisation": each(convs, spectral_norm),
    "old spectral normalisation": each(convs, old_spectral_norm),
    "convolutions with bias": each(convs, add_bias),
    "reflecting convolutions": each(convs, lambda conv: setattr(conv, "padding_mode", "circular")),
}  # fmt: skip
FAST = ("hbnet18, checkpointing", "hbnet50, reversible", "agdnet121", "agdnet40_k12, checkpointing")


def marked(forms, changes):
    """All pairs; those of some forms in the fast part."""
    return [
        pytest.param(form, change, marks=() if form in FAST or form in TWINS else pytest.mark.slow)
        for form in forms
        for change in changes
    ]


def compare(form, change, between=lambda model: None, x=None):
    model, reference = copies(form)
    for each_model in (model, reference):
        change(each_model)
    x = images() if x is None else x
    with plainly():
        expected = result(reference, x, between)
    got = result(model, x, between)
    assert_equal(got, expected)
    for out, before in getattr(model, "held", ()):
        assert torch.equal(out, before)


@pytest.mark.parametrize(("form", "state"), marked(FORMS, STATES))
def test_states(form, state):
    compare(form, STATES[state])


@pytest.mark.parametrize(("form", "change"), marked(FORMS, CHANGES))
def test_changes(form, change):
    compare(form, CHANGES[change])


# T of HBNet has no addition, and AGDNet pools before a transition's convolution: hooks there see other tensors. The
# backward hooks of a ResNet fail, because it adds in place.
OTHERWISE = {
    "hbnet18": (
        "hooks of blocks",
        "backward hooks of blocks",
        "patched blocks",
        "backward hooks",
        "backward pre-hooks",
    ),
    "agdnet121": ("wrapped convolutions", "backward hooks", "backward pre-hooks"),
}
COMPARABLE = [
    pair for pair in marked(TWINS, STATES | CHANGES) if pair.values[1] not in OTHERWISE[TWINS[pair.values[0]][0]]
]


@pytest.mark.parametrize(("form", "change"), COMPARABLE)
def test_twins(form, change):
    """The network of timm's, changed alike, beside ours."""
    model, twin = build(form), twin_of(form)
    for each_model in (model, twin):
        (STATES | CHANGES)[change](each_model)
    got, expected = result(model, images()), result(twin, images())
    assert_equal({name: got[name] for name in expected}, expected)


@pytest.mark.parametrize("form", FORMS)
def test_global_hooks(form):
    module = torch.nn.modules.module
    seen = []
    for register in (module.register_module_forward_hook, module.register_module_forward_pre_hook):
        handle = register(lambda module, *_: seen.append(type(module)) and None)
        try:
            model, reference = copies(form)
            result(model, images())
            count = len(seen)
            with plainly():
                result(reference, images())
        finally:
            handle.remove()
        fast, plain = seen[:count], seen[count:]
        assert set(fast) == set(plain)
        seen.clear()


@pytest.mark.parametrize("form", FORMS)
def test_a_patched_class(form, monkeypatch):
    original = nn.BatchNorm2d.forward
    patched = lambda self, x: 1.01 * original(self, x)  # noqa: E731
    monkeypatch.setattr(nn.BatchNorm2d, "forward", patched)
    monkeypatch.setattr(BatchNormAct2d, "forward", lambda self, x: self.act(patched(self, x)))
    compare(form, lambda model: None)


# --- between the forward and the backward pass ------------------------------------------------------------------------


BETWEEN = {
    "to evaluation": (True, lambda model: model.eval()),
    "to training": (False, lambda model: model.train()),
    "another batch": (True, lambda model: model(images(batch=4, size=35) + 1)),
    "another batch in evaluation": (True, lambda model: model.eval()(images(batch=4, size=35) + 1)),
}


@pytest.mark.parametrize(("form", "between"), marked(FORMS, BETWEEN))
def test_a_backward_pass_belongs_to_its_forward_pass(form, between):
    training, change = BETWEEN[between]
    model, reference = (each_model.train(training) for each_model in copies(form))
    with plainly():
        expected = result(reference, images())
    got = result(model, images(), change)
    buffers = dict(model.named_buffers())
    assert_equal(*({name: v for name, v in values.items() if name not in buffers} for values in (got, expected)))


@pytest.mark.parametrize("part", ["denseblock1", "denseblock2", "transition1"])
def test_statistics_may_move_between_a_forward_and_a_backward_pass(part):
    """In evaluation, too, where torch's own normalisation would use the new ones."""
    model, reference = copies("agdnet121")
    results = []
    for each_model, move in ((reference, False), (model, True)):
        module = each_model.eval().features.get_submodule(part)
        x = torch.randn(2, module.denselayer1.norm1.num_features if "dense" in part else module.norm.num_features, 8, 8)
        torch.manual_seed(0)
        x = torch.randn(x.shape, dtype=torch.float64, requires_grad=True)
        out = module(x)
        if move:
            with torch.no_grad():
                module.train()(3 * x + 1)
        parameters = list(module.parameters())
        results.append(torch.autograd.grad(out.sin().sum(), [x, *parameters]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_functional_call(form, training):
    """Gradients of parameters that a module is called with, not of its own."""
    model, reference = copies(form)
    found = []
    for each_model, context in ((model, functools.partial(pytest.MonkeyPatch.context)), (reference, plainly)):
        each_model.train(training)
        parameters = {
            name: (p + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype))
            .detach()
            .requires_grad_()
            for name, p in each_model.named_parameters()
        }
        with context():
            torch.manual_seed(0)
            out = torch.func.functional_call(each_model, parameters, (images(),))
            gradients = torch.autograd.grad(out.square().sum(), list(parameters.values()))
        found.append(dict(zip(parameters, gradients), output=out))
    assert_equal(*found)
