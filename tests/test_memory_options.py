"""Memory options set in any order: the network saves memory as one that is built with the last of them."""

from itertools import chain, product

import pytest
import timm
import torch
from forms import CELLS, CIFAR, CIFAR_DENSE, DENSE, IMAGENET
from measure import peak_memory

NETWORKS = {
    "hbnet50": ("hbnet50", IMAGENET),
    "hbnet20": ("hbnet20", CIFAR),
    "hbnet20, learned": ("hbnet20", dict(CIFAR, learn_beta=True)),
    "agdnet121": ("agdnet121", DENSE),
    "agdnet40_k12": ("agdnet40_k12", dict(CIFAR_DENSE, bn_size=4)),
    "optnet20": ("optnet20", dict(CIFAR, algorithm="agd2")),
    "optnet50": ("optnet50", dict(IMAGENET, algorithm="hb")),
    "cellnet_cifar": ("cellnet_cifar", CELLS),
}
CHANGES = [("checkpointing", True), ("checkpointing", False), ("memory", "reversible"), ("memory", "stored")]


def flags(model):
    """Return the options of all modules."""
    names = ("grad_checkpointing", "recompute_stem", "settings")
    return {path: [getattr(m, name, None) for name in names] for path, m in model.named_modules()}


def peak(model):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def step():
        outputs = model(x)
        outputs = outputs.values() if isinstance(outputs, dict) else outputs
        sum(out.square().mean() for out in outputs).backward()

    step()  # allocates the gradients
    return peak_memory(step)


def build(name, arguments, checkpointing, memory, **options):
    arguments = dict(arguments, memory="reversible") if memory == "reversible" else arguments
    model = timm.create_model(name, **{**arguments, **options}).train()
    if checkpointing:
        model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize("network", NETWORKS)
def test_any_order_of_changes(network):
    name, arguments = NETWORKS[network]
    changes = CHANGES if name.startswith("hbnet") else CHANGES[:2]
    model, expected = build(name, arguments, False, "stored"), {}
    last = {"checkpointing": False, "memory": "stored"}
    for option, value in chain(*product(changes, repeat=3)):
        (model.set_memory if option == "memory" else model.set_grad_checkpointing)(value)
        last[option] = value
        key = tuple(last.values())
        if key not in expected:
            built = build(name, arguments, *key)
            expected[key] = flags(built), peak(built)
            assert peak(model) == expected[key][1], key
        assert flags(model) == expected[key][0], key
    peaks = [figure for _, figure in expected.values()]
    assert len(set(peaks)) > 1  # the options make a difference


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
def test_features_of_a_reversible_network(feature_cls):
    """Switching checkpointing off leaves it reversible, its stem included."""
    arguments = {key: value for key, value in IMAGENET.items() if key != "num_classes"}
    options = dict(features_only=True, feature_cls=feature_cls, out_indices=(4,))
    model, built = (build("hbnet50", arguments, False, "reversible", **options) for _ in range(2))
    stored = build("hbnet50", arguments, False, "stored", **options)
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    assert peak(model) == peak(built) != peak(stored)
