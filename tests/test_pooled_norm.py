"""Pooling before normalisation equals the plain form, and is not used for modified modules."""

import copy

import pytest
import timm
import torch
from equality import randomise
from torch import nn

from optinspired_plugins.memory.batch_norm import batch_statistics
from optinspired_plugins.memory.pooled_norm import max_pooled_norm

POOLS = dict(
    usual=nn.MaxPool2d(3, 2, 1), ceil=nn.MaxPool2d(2, ceil_mode=True), oblong=nn.MaxPool2d((2, 3), (1, 2), (1, 0))
)


def inputs(dtype=torch.float64, **layout):
    x = torch.randn(3, 6, 9, 10, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.to(**layout).requires_grad_()


def norm_of(scale, dtype=torch.float64):
    torch.manual_seed(0)
    norm = randomise(nn.BatchNorm2d(6).to(dtype)).train()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(scale))
    return norm


@pytest.mark.parametrize("layout", [{}, dict(memory_format=torch.channels_last)], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [[0.5] * 6, [1, -1, 0.1, -0.2, 2, 1], [1, 0, -1, 1e-30, 1, 0]], ids=str)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_it_computes_what_the_plain_form_does(pool, scale, layout):
    norm = norm_of(scale)
    twin, x = copy.deepcopy(norm), inputs(**layout)
    expected, got = pool(norm(x).relu()), max_pooled_norm(x, twin, pool)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(y, [x, *n.parameters()], weight) for y, n in ((expected, norm), (got, twin)))
    ):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    for a, b in zip(norm.buffers(), twin.buffers()):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    norm = norm_of([1, -1, 0.5, 2, -0.3, 1])
    function = torch.autograd.gradcheck
    assert function(lambda x, *_: max_pooled_norm(x, norm, POOLS["usual"]), (inputs(), *norm.parameters()))


def test_frozen_inputs_and_parameters():
    norm, x = norm_of([1.0] * 6), inputs().detach()
    max_pooled_norm(x, norm, POOLS["usual"]).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False)
    x.requires_grad_()
    max_pooled_norm(x, norm, POOLS["usual"]).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_statistics_far_from_zero():
    """A mean of a thousand standard deviations leaves four digits of the variance."""
    x = torch.randn(4, 3, 16, 16) + 1000
    exact = x.double()
    mean, var = batch_statistics(x)
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 1\).*more than one value"):
        batch_statistics(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("name", ["hbnet18", "agdnet121"])
def test_hooks_and_other_modules_have_the_plain_form(name, monkeypatch):
    """Modules with hooks or other types are called."""
    model = timm.create_model(name).train()
    model.set_grad_checkpointing()
    norm = model.bn1 if name == "hbnet18" else model.features.norm0
    calls = []
    monkeypatch.setattr("timm_models.stages.stem.max_pooled_norm", lambda *_: calls.append(_) or max_pooled_norm(*_))
    x = torch.randn(2, 3, 64, 64)
    model(x)
    assert len(calls) == 1
    seen = []
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert (len(calls), len(seen)) == (1, 1)
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    model.eval()(x)
    assert len(calls) == 1


@pytest.mark.parametrize(("name", "expected"), [("hbnet18", 0), ("agdnet121", 1)])
def test_agdnet_pools_first_also_where_nothing_is_computed_again(name, expected, monkeypatch):
    calls = []
    monkeypatch.setattr("timm_models.stages.stem.max_pooled_norm", lambda *_: calls.append(_) or max_pooled_norm(*_))
    timm.create_model(name).train()(torch.randn(2, 3, 64, 64))
    assert len(calls) == expected
