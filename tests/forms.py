"""Every family in every form, small and in double precision, and the plain form of each."""

import contextlib
import copy

import pytest
import timm
import torch
from equality import assert_close_in_norm, randomise
from torch import nn

from optinspired_plugins.memory import channel_kernels

IMAGENET = dict(layers=(2, 3, 1, 2), channels=(8, 12, 16, 16), num_classes=3)
DENSE = dict(growth_rate=4, block_config=(2, 3), num_classes=3)
CIFAR_DENSE = dict(growth_rate=4, block_config=(2, 3), stem_chs=6, num_classes=3)
CIFAR = dict(layers=(3, 2, 3), channels=(4, 6, 8), num_classes=3)
DEEP = dict(layers=(2, 5, 1, 4), channels=(8, 12, 16, 16), num_classes=3)
CELLS = dict(genotype="darts_v2", cells=3, channels=4, num_classes=3)

# name -> model, arguments, checkpointing
FORMS = {
    "hbnet18": ("hbnet18", IMAGENET, False),
    "hbnet18, checkpointing": ("hbnet18", IMAGENET, True),
    "hbnet18, reversible": ("hbnet18", dict(IMAGENET, memory="reversible"), False),
    "hbnet18, reversible and checkpointing": ("hbnet18", dict(IMAGENET, memory="reversible"), True),
    "hbnet50, checkpointing, learned": ("hbnet50", dict(IMAGENET, learn_beta=True), True),
    "hbnet50, reversible": ("hbnet50", dict(IMAGENET, memory="reversible"), False),
    "hbnet20": ("hbnet20", CIFAR, False),
    "hbnet20, checkpointing": ("hbnet20", CIFAR, True),
    "hbnet20, reversible, learned": ("hbnet20", dict(CIFAR, memory="reversible", learn_beta=True), False),
    "hbnet20, post_act, checkpointing": ("hbnet20", dict(CIFAR, post_act=True), True),
    "optnet20, admm": ("optnet20", dict(CIFAR, algorithm="admm"), False),
    "optnet20, checkpointing": ("optnet20", dict(CIFAR, algorithm="agd2"), True),
    "agdnet121": ("agdnet121", DENSE, False),
    "agdnet121, checkpointing": ("agdnet121", DENSE, True),
    "agdnet40_k12": ("agdnet40_k12", CIFAR_DENSE, False),
    "agdnet40_k12, checkpointing": ("agdnet40_k12", CIFAR_DENSE, True),
    "cellnet_cifar": ("cellnet_cifar", CELLS, False),
    "cellnet_cifar, checkpointing": ("cellnet_cifar", CELLS, True),
    # On the CPU these run only with the fixture fused_kernels.
    "hbnet18, fused": ("hbnet18", IMAGENET, False),
    "hbnet20, fused, checkpointing": ("hbnet20", CIFAR, True),
    "hbnet50, fused, learned": ("hbnet50", dict(IMAGENET, learn_beta=True), False),
    "hbnet50, fused, checkpointing, learned": ("hbnet50", dict(DEEP, learn_beta=True), True),
    "hbnet50, fused, reversible": ("hbnet50", dict(DEEP, memory="reversible"), False),
    "agdnet121, fused": ("agdnet121", DENSE, False),
    "agdnet40_k12, fused, checkpointing": ("agdnet40_k12", CIFAR_DENSE, True),
}
# Forms that recover iterates: they have no second derivative.
RECOVERING = [
    form
    for form in FORMS
    if "hbnet" in form and ("reversible" in form or "checkpointing" in form) and "fused" not in form
]
RECOVERING.remove("hbnet20, post_act, checkpointing")

# Special cases of ours -> the network of timm's that they are.
TWINS = {
    "agdnet121, densenet": ("agdnet121", dict(DENSE, beta=0.0, learn_alpha=False), False),
    "agdnet121, densenet, checkpointing": ("agdnet121", dict(DENSE, beta=0.0, learn_alpha=False), True),
    "hbnet18, resnet, checkpointing": ("hbnet18", dict(IMAGENET, beta2=0.0, post_act=True), True),
}


def build(form):
    """Return the model of a form, in training, with generic parameters."""
    name, options, checkpointing = (FORMS | TWINS)[form]
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **options).double())
    model.set_grad_checkpointing(checkpointing)
    return model.train()


def twin_of(form):
    """Return timm's own network with the weights of ours."""
    model = build(form)
    if "densenet" in form:
        twin = timm.models.DenseNet(**DENSE)
    else:
        block = timm.models.resnet.BasicBlock
        twin = timm.models.ResNet(block, **{key: IMAGENET[key] for key in ("layers", "channels", "num_classes")})
    keys = twin.state_dict().keys()
    twin.double().load_state_dict({key: value for key, value in model.state_dict().items() if key in keys})
    return twin.train()


@contextlib.contextmanager
def fused_kernels():
    """Run the forms of a GPU with the plain kernels, on any device and for images of any size."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("timm_models.stages.fused", "timm_models.stages.heavy_ball", "timm_models.stages.nesterov"):
            patch.setattr(f"{module}.kernels_for", lambda x: channel_kernels)
        patch.setattr("timm_models.stages.fused.WORTHWHILE", 0)
        yield


@contextlib.contextmanager
def plainly():
    """Run everything module by module, as where no fast form may stand in."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            "timm_models.stages.nesterov",
            "timm_models.agdnet",
            "timm_models.stages.stem",
            "timm_models.stages.heavy_ball",
        ):
            patch.setattr(f"{module}.is_eager", lambda *x: False)
        patch.setattr("optinspired_plugins.memory.recompute.is_eager", lambda *x: False)
        for module in ("timm_models.stages.heavy_ball", "timm_models.stages.algorithm"):
            patch.setattr(f"{module}.writable", lambda T, t: t.clone())
        yield


def images(batch=3, size=33):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def result(model, x, between=lambda model: None, forward=None):
    """Return output, gradients and buffers of a step; ``between`` comes between forward and backward pass."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = (forward or model)(x)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    between(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = (out * weight).sum()
    gradients = torch.autograd.grad(loss, [x, *parameters.values()], allow_unused=True)
    values = {"output": out.detach(), "input": gradients[0]} | dict(zip(parameters, gradients[1:]))
    return values | {name: b.detach().clone().double() for name, b in model.named_buffers()}


def assert_equal(got, expected, tolerance=1e-9):
    """Compare what :func:`result` returns; some gradients are 0 in theory and rounding in practice."""
    assert got.keys() == expected.keys()
    floor = 1e-4 * max(value.norm().item() for value in expected.values() if value is not None)
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert_close_in_norm(got[name], value, tolerance, name, floor)


def copies(form):
    """Return the model of a form twice, for the form and for the plain one."""
    model = build(form)
    return model, copy.deepcopy(model)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


# In `make test`; the other forms are in `make test-all`.
FUSED = ("hbnet50, fused, checkpointing, learned", "agdnet121, fused")
FAST = ("hbnet18, checkpointing", *FUSED, "hbnet50, reversible", "agdnet121", "agdnet40_k12, checkpointing", *TWINS)


def marked(forms, cases=(None,)):
    """Return all pairs of forms and cases, or the forms alone, as parameters of a test."""
    return [
        pytest.param(
            *((form,) if case is None else (form, case)), marks=() if form in FAST else pytest.mark.every_model
        )
        for form in forms
        for case in cases
    ]
