"""In channels last, gradients are channels last wherever a normalisation meets them."""

import copy

import pytest
import timm
import torch
from torch import nn

from optinspired_plugins.memory.memory_format import align_gradient

LAST = torch.channels_last


class Averaged:
    """Gradient descent from the mean of the last two iterates, in code that is no weighted sum for the tracer."""

    def init(self, x0):
        return x0, x0

    def step(self, state, grad):
        x, x_prev = state
        y = (x + x_prev).clamp(-1e6, 1e6) / 2
        return y - grad(y), x

    def result(self, state):
        return state[0]


CASES = [
    ("hbnet20", {}),
    ("hbnet20", dict(memory="reversible")),
    ("hbnet20", dict(learn_beta=True)),
    ("hbnet20", dict(beta2=0.0)),
    ("hbnet50", dict(layers=(2, 2, 2, 2))),
    ("hbnet18", dict(layers=(2, 1, 2, 1))),
    ("optnet20", dict(algorithm="agd")),
    ("optnet20", dict(algorithm="admm")),
    ("optnet20", dict(algorithm=Averaged())),
    ("cellnet_cifar", dict(genotype="cifar10_hb_seed0", cells=3, channels=16)),
    ("cellnet_cifar", dict(genotype="darts_v2", cells=3, channels=16)),
]


def strange_gradients(model, x):
    """Run a step, and return the normalisations whose output has a gradient of other strides than the output."""
    strange = []

    def watch(name):
        def compare(gradient):
            if not gradient.is_contiguous(memory_format=LAST):
                strange.append(name)

        def look(module, args, output):
            if output.requires_grad and not output.is_contiguous():
                output.register_hook(compare)

        return look

    hooks = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    model(x).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return strange


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_normalisation_meets_a_gradient_of_other_strides(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).double()
    last, x = copy.deepcopy(model).to(memory_format=LAST), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert strange_gradients(last, x.to(memory_format=LAST)) == []
    model(x).square().sum().backward()
    for (place, p), q in zip(model.named_parameters(), last.parameters()):
        torch.testing.assert_close(
            q.grad, p.grad, rtol=1e-8, atol=1e-8, msg=lambda text, place=place: f"{place}: {text}"
        )


def test_checkpointing_keeps_them_too():
    model = timm.create_model("hbnet20", num_classes=3, learn_beta=True).to(memory_format=LAST)
    model.set_grad_checkpointing()
    assert strange_gradients(model, torch.randn(2, 3, 16, 16).to(memory_format=LAST)) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_gradients_take_the_layout_of_what_they_belong_to(layout):
    leaf = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    x = leaf.contiguous(memory_format=layout).sin()
    align_gradient(x)
    seen = []
    x.register_hook(seen.append)
    x.mean((2, 3)).square().sum().backward()
    assert seen[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(leaf.grad, leaf.cos() * (2 / 20) * leaf.sin().mean((2, 3), keepdim=True))


def test_second_derivatives_pass():
    def f(leaf):
        x = leaf.contiguous(memory_format=LAST).sin()
        align_gradient(x)
        return x.mean((2, 3)).square().sum()

    assert torch.autograd.gradgradcheck(f, torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True))
