"""A network that is converted to SyncBatchNorm, or back, computes what it did: its normalisations keep their ReLU."""

import copy

import pytest
import timm
import torch
from equality import randomise
from torch import nn

NETWORKS = {
    "agdnet40_k12": dict(growth_rate=4, block_config=(2, 2, 2), bn_size=2),
    "agdnet121": dict(growth_rate=4, block_config=(2, 2, 2, 2)),
    "hbnet20": dict(channels=(4, 8, 8)),
    "cellnet_cifar": dict(cells=3, channels=4),
}
FORMS = [(name, None) for name in NETWORKS] + [("agdnet40_k12", kind) for kind in ("list", "dict", "fx")]


def build(name, kind=None):
    torch.manual_seed(0)
    features = {} if kind is None else dict(features_only=True, feature_cls=kind)
    return randomise(timm.create_model(name, **NETWORKS[name], **features).double()).eval()


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flat(outputs):
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return [outputs] if isinstance(outputs, torch.Tensor) else outputs


def revert(module):
    """The usual way back: a batch normalisation of any dimension, children put back by ``add_module``."""

    class BatchNormXd(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, x):
            return

    out = module
    if isinstance(module, nn.SyncBatchNorm):
        out = BatchNormXd(module.num_features, module.eps, module.momentum, module.affine)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
            setattr(out, name, getattr(module, name))
    for name, child in module.named_children():
        out.add_module(name, revert(child))
    return out


@pytest.mark.parametrize(("name", "kind"), FORMS)
@torch.no_grad()
def test_torchs_conversion_and_the_way_back_change_no_output(name, kind):
    net = build(name, kind)
    expected = flat(net(images()))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net).eval())  # a copied graph is in training
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    for got, wanted in zip(flat(converted(images())), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    reverted = revert(converted)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in reverted.modules())
    for got, wanted in zip(flat(reverted(images())), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_reverted_network_trains_as_before():
    net = build("agdnet40_k12").train()
    reverted = revert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)))
    torch.testing.assert_close(reverted(images()), net(images()))
    for (name, got), (_, wanted) in zip(reverted.named_buffers(), net.named_buffers(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in net.modules()]
