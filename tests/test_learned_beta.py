"""Learned β1 and β2 move at a part of the learning rate."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils.misc import ParseKwargs

from timm_models.stages.heavy_ball import scale_gradient

SMALL = dict(layers=(3, 3, 1), channels=(4, 6, 8), num_classes=5, learn_beta=True, dtype=torch.float64)
FORMS = {"plain": {}, "checkpointing": {}, "reversible": dict(memory="reversible")}


def build(form="plain", **kwargs):
    torch.manual_seed(0)
    net = timm.create_model("hbnet20", **SMALL, **FORMS[form], **kwargs).train()
    net.set_grad_checkpointing(form == "checkpointing")
    return net


def images():
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def movement(optimizer, steps=3, **kwargs):
    """The output, and the distance of each parameter from its start after some steps of one gradient."""
    net = build(**kwargs)
    optimizer = create_optimizer_v2(net, optimizer, lr=0.01, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    output = net(images())
    output.square().sum().backward()
    for _ in range(steps):
        optimizer.step()
    return output, {name: p.detach() - start[name] for name, p in net.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_timms_sgd_moves_them_at_a_tenth_of_its_rate(optimizer, form):
    """The factory of timm has no rate per parameter without layer decay, so the gradient has the factor."""
    full, by_full = movement(optimizer, form=form, beta_lr_scale=1.0)
    output, by = movement(optimizer, form=form)
    torch.testing.assert_close(output, full, rtol=1e-12, atol=1e-12)
    for name, distance in by_full.items():
        part = 0.1 if "beta" in name else 1.0
        torch.testing.assert_close(by[name], part * distance, rtol=1e-9, atol=1e-12, msg=name)
    assert sum("beta" in name for name in by) == 4
    assert all(by[name].all() for name in by if "beta" in name)


def test_layer_decay_multiplies_it():
    """With timm's groups, each parameter keeps its own rate."""
    net = build()
    optimizer = create_optimizer_v2(net, "sgd", lr=0.01, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    last = [net.layer2[2].conv1.weight, net.layer2.beta1]
    assert scale[id(last[0])] == scale[id(last[1])] < 1


def test_the_values_are_the_parameters_to_the_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(100, dtype=dtype, requires_grad=True)
        y = scale_gradient(x, 0.1)
        assert torch.equal(y, x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, 0.1))


def test_a_compiled_and_a_scripted_network_are_the_same():
    net = build()
    net(images()).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if "beta" in name}
    for run in (torch.compile(build(), backend="aot_eager"), torch.jit.script(build())):
        run(images()).square().sum().backward()
        for name, p in run.named_parameters():
            if "beta" in name:
                torch.testing.assert_close(p.grad, expected[name.removeprefix("_orig_mod.")])


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), "slow", True])
def test_another_value_is_named(value):
    with pytest.raises(ValueError, match=r"beta_lr_scale=.*: must be (> 0|a finite number)"):
        build(beta_lr_scale=value)


def test_timms_command_line_passes_it():
    namespace = type("Namespace", (), {"options": {}})()
    ParseKwargs(["--model-kwargs"], "options")(None, namespace, ["learn_beta=True", "beta_lr_scale=0.5"])
    assert timm.create_model("hbnet20", **namespace.options).layer1.beta_lr_scale == 0.5
