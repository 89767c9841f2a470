"""Random states are saved where a pass may draw random numbers, and nowhere else."""

import pytest
import timm
import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import nn

from optinspired_plugins.memory.randomness import may_draw_random_numbers
from optinspired_plugins.memory.recompute import recompute

RANDOM = [
    *(kind(0.1) for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, DropPath)),
    nn.RReLU(),
    DropBlock2d(0.1, 3),
    PatchDropout(0.1),
    nn.MultiheadAttention(4, 2, dropout=0.1),
]


@pytest.mark.parametrize("module", RANDOM, ids=lambda module: type(module).__name__)
def test_random_modules_are_known_in_training(module):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), module)
    assert may_draw_random_numbers(net.train())
    assert not may_draw_random_numbers(net.eval())


def test_code_that_cannot_be_judged_may_be_random():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    assert may_draw_random_numbers(nn.Sequential(Noise()).eval())
    hooked, replaced = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    assert may_draw_random_numbers(hooked)
    assert may_draw_random_numbers(replaced)


NETWORKS = {
    "hbnet20": ({}, {"drop_path_rate": 0.1}),
    "hbnet50": ({}, {"drop_block_rate": 0.1}),
    "agdnet121": ({}, {"proj_drop_rate": 0.1}),
    "optnet20": ({}, {"drop_path_rate": 0.1}),
    "cellnet_cifar": ({"genotype": "darts_v2", "cells": 3, "channels": 4}, {"drop_path_rate": 0.1}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_random_where_they_are_told(name):
    plain, random = NETWORKS[name]
    assert not may_draw_random_numbers(timm.create_model(name, **plain).train())
    assert may_draw_random_numbers(timm.create_model(name, **plain, **random).train())


@pytest.mark.parametrize(("options", "saves"), [({}, False), ({"drop_path_rate": 0.2}, True)])
@pytest.mark.parametrize("form", ["checkpointing", "reversible"])
def test_a_step_reads_random_states_only_where_it_must(form, options, saves, monkeypatch):
    memory = {"memory": "reversible"} if form == "reversible" else {}
    model = timm.create_model("hbnet20", **options, **memory).train()
    if form == "checkpointing":
        model.set_grad_checkpointing()
    calls, original = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append(1) or original())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert bool(calls) == saves


def test_a_pass_without_a_tensor_is_plain():
    """Torch would not know whose random state to replay."""
    calls, weight = [], torch.ones(1, requires_grad=True)
    recompute(nn.Dropout(), lambda: calls.append(1) or weight * 2).sum().backward()
    assert len(calls) == 1
