"""Gradients are right in the layout that searches and retrainings choose, which is channels last where that can be."""

import copy
import json

import pytest
import torch
from extras import needs
from torch import nn

needs("nni")

from nni_spaces.runs.retrain import RetrainModule, make_model
from nni_spaces.runs.search import SearchModule, make_space, make_strategy
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins.cells.genotype import load_genotype
from optinspired_plugins.memory.memory_format import training_layout

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize("channels", [2, 4, 8, 16, 24])
def test_gradients_of_strided_1x1_convolutions(channels):
    """Wrong, or a crash, for fewer channels than a block in channels last (oneDNN's issue 6035)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False), nn.ReLU())
    exact, x = copy.deepcopy(model).double(), torch.randn(8, channels, 16, 16)
    layout = training_layout(model)
    model.to(memory_format=layout)(x.contiguous(memory_format=layout)).square().sum().backward()
    exact(x.double()).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad.double(), exact[0].weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("channels", "expected"), [(2, CONTIGUOUS), (4, CONTIGUOUS), (8, LAST), (16, LAST)])
@pytest.mark.parametrize("space", ["darts", "hb", "agd"])
def test_searches_choose_by_the_supernets_channels(space, channels, expected):
    settings = SearchSettings(space=space, channels=channels, cells=5)
    module = SearchModule(0.1, 0.9, 0.0, 1)
    module.set_model(make_strategy(settings).mutate_model(make_space(settings, 10, 3)))
    seen = []
    module.model.stem0.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module(torch.randn(2, 3, 8, 8))
    assert seen[0].is_contiguous(memory_format=expected)
    assert training_layout(module.model) == expected


@pytest.mark.parametrize(("width", "expected"), [(4, CONTIGUOUS), (16, LAST)])
def test_retrainings_choose_by_the_networks_channels(width, expected):
    genotype = json.loads(load_genotype("cifar10_hb_dagger_seed0").to_json())
    settings = RetrainSettings(genotype=genotype, cells=6, channels=width)
    module = RetrainModule(make_model(settings, 10, 3), settings)
    assert module.layout == expected
