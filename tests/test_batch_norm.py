"""Statistics of a batch, and recomputed pooled normalisations."""

import pytest
import timm
import torch

from optinspired_plugins.memory.batch_norm import batch_statistics
from timm_models.stages import stem


def test_statistics_far_from_zero():
    """A mean of a thousand standard deviations leaves four digits of the variance."""
    x = torch.randn(4, 3, 16, 16) + 1000
    exact = x.double()
    for layout in (torch.contiguous_format, torch.channels_last):
        mean, var = batch_statistics(x.contiguous(memory_format=layout))
        torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_one_value_a_channel_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 1\).*more than one value"):
        batch_statistics(torch.zeros(1, 3, 1, 1))


def test_agdnet_recomputes_pooled_normalisations_without_hooks(monkeypatch):
    """Stem and three transitions are recomputed; a hook on one of them runs once."""
    model = timm.create_model("agdnet121").train()
    chains, seen, x = [], [], torch.randn(2, 3, 64, 64)
    recompute = stem.recompute
    monkeypatch.setattr(stem, "recompute", lambda *args: chains.append(1) or recompute(*args))
    model(x).sum().backward()
    assert len(chains) == 4
    model.features.norm0.register_forward_hook(lambda *_: seen.append(1))
    model(x).sum().backward()
    assert (len(chains), len(seen)) == (7, 1)
    with torch.no_grad():
        model(x)
    assert len(chains) == 7
