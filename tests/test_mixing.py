"""The supernet's fast paths against their plain forms: mixtures, constant parameters, checkpointed cells."""

from copy import deepcopy
from itertools import product

import pytest
import torch
from extras import needs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

needs("nni")

from nni_spaces import DARTS, AGDSpace, HBSpace
from nni_spaces.spaces.edges import SkipDropout
from nni_spaces.spaces.grouped import kind_of
from nni_spaces.spaces.mixed_op import NodeInput, NodeSum, mixed_op
from nni_spaces.strategies.differentiable import _without_gradients
from optinspired_plugins.cells.operations import TABLE_6, make_operation

SMALL = dict(channels=4, cells=3, nodes=2, num_classes=3)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def edges(channels, stride, names):
    """Three edges, two of them from one source."""
    torch.manual_seed(0)
    made = [{name: make_operation(name, channels, stride, False, True) for name in names} for _ in range(3)]
    for operations in made:
        # Running statistics that no edge has by default; poolings of a source always have had the same images.
        for i, norm in enumerate(m for o in operations.values() for m in o.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.fill_(0.1 * i)
            norm.running_var.fill_(1 + 0.1 * i)
    return nn.ModuleList(nn.ModuleDict(operations) for operations in made).double()


def leaves(names, parts):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    weights = [draw(len(names) + ("none" not in names)) for _ in range(3)]
    return weights, draw(3), [draw(2, 4 * parts, 7, 7), draw(2, 4 * parts, 7, 7)]


def plain(modules, weights, edge_weights, states, parts):
    terms = [mixed_op(w, o, states[s], parts) for w, o, s in zip(weights, modules, (0, 0, 1))]
    return sum(p * term for p, term in zip(edge_weights, terms))


def fast(modules, weights, edge_weights, states, parts):
    sources, node_sum = [NodeInput(state, parts) for state in states], NodeSum(parts)
    for w, o, s, p in zip(weights, modules, (0, 0, 1), edge_weights):
        node_sum.add_edge(w, o, sources[s], p)
    return node_sum.value()


@pytest.mark.parametrize(("stride", "parts", "training"), list(product((1, 2), (1, 4), (True, False))))
def test_a_mixture_is_the_sum_of_its_edges(stride, parts, training):
    """Output, gradients and running statistics; 7×7 images, so that stride 2 rounds."""
    modules = edges(4, stride, TABLE_6).train(training)
    twin = deepcopy(modules)
    weights, edge_weights, states = leaves(TABLE_6, parts)
    outputs = [form(m, weights, edge_weights, states, parts) for form, m in ((plain, modules), (fast, twin))]
    close(*outputs)
    cotangent = torch.randn_like(outputs[0])
    wanted = [[*weights, edge_weights, *states, *m.parameters()] for m in (modules, twin)]
    for a, b in zip(*(torch.autograd.grad(y, x, cotangent) for y, x in zip(outputs, wanted))):
        close(a, b)
    for (name, a), b in zip(modules.named_buffers(), twin.buffers()):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name
    assert training == (int(twin[1]["max_pool_3x3"][1].num_batches_tracked) == 1)


@pytest.mark.parametrize("name", TABLE_6[1:])
def test_a_single_operation_is_mixed_alike(name):
    modules = edges(4, 1, [name])
    weights, edge_weights, states = leaves([name], 1)
    close(plain(modules, weights, edge_weights, states, 1), fast(deepcopy(modules), weights, edge_weights, states, 1))


def test_operations_that_share_nothing_are_called():
    """Dropout behind the identity is drawn as the plain form draws it; a normalisation with a scale keeps it."""
    modules = edges(4, 1, ["sep_conv_3x3", "skip_connect"])
    for operations in modules:
        operations["sep_conv_3x3"] = make_operation("sep_conv_3x3", 4, 1, affine=True).double()
        nn.init.normal_(operations["sep_conv_3x3"][-1].weight)
        operations["skip_connect"] = nn.Sequential(nn.Identity(), SkipDropout(0.5))
    weights, edge_weights, states = leaves(["sep_conv_3x3", "skip_connect"], 1)
    outputs = []
    for form in (plain, fast):
        torch.manual_seed(2)
        outputs.append(form(modules, weights, edge_weights, states, 1))
    close(*outputs)


def test_what_edges_share_is_computed_once(monkeypatch):
    """One ReLU, one pooling of each kind and one multiple of each tensor for all edges from a source."""
    modules = edges(4, 1, ["max_pool_3x3", "skip_connect", "neg_skip_connect", "dil_conv_3x3"])
    calls = []
    for function in ("relu", "max_pool2d"):
        original = getattr(torch.nn.functional, function)
        monkeypatch.setattr(
            torch.nn.functional, function, lambda *a, f=original, n=function, **k: calls.append(n) or f(*a, **k)
        )
    weights, _, states = leaves(["max_pool_3x3", "skip_connect", "neg_skip_connect", "dil_conv_3x3"], 1)
    node_sum, source = NodeSum(), NodeInput(states[0])
    for w, operations in zip(weights, modules):
        node_sum.add_edge(w, operations, source)
    assert sorted(calls) == ["max_pool2d", "relu"]
    assert len(node_sum._multiples) == 2  # the source, from two identities, and its pooling


def test_no_output_of_an_operation_is_kept_for_alpha():
    """Autograd keeps the same tensors whether the weights have a gradient or not."""
    names = ["sep_conv_3x3", "dil_conv_5x5"]
    modules = edges(4, 1, names)
    weights, _, states = leaves(names, 1)

    def kept(weights):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            fast(modules, weights, [None] * 3, states, 1)
        return sum(size for size in sizes if size >= states[0].numel())

    assert kept(weights) == kept([w.detach() for w in weights]) > 0


# --- the supernet -----------------------------------------------------------------------------------------------------


def supernet(space, **options):
    torch.manual_seed(0)
    net = DARTS().mutate_model(space(**{**SMALL, **options})).double().train()
    for name, parameter in net.named_parameters():
        if "_arch" in name:
            nn.init.normal_(parameter)
    return net


def images():
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("space", "options"),
    [(HBSpace, {}), (AGDSpace, {}), (HBSpace, dict(skip_dropout=0.5)), (AGDSpace, dict(partial_channels=2))],
    ids=["hb", "agd", "hb-dropout", "agd-partial"],
)
def test_checkpointed_cells_give_the_same_step(space, options):
    """Loss, gradients, running statistics and the random state."""
    net = supernet(space, **options)
    twin = deepcopy(net)
    twin.set_grad_checkpointing()
    found = []
    for model in (net, twin):
        torch.manual_seed(5)
        loss = model(images()).square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters()), *model.buffers(), torch.get_rng_state()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_checkpointed_cells_keep_less():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            model(images())
        return sum(sizes)

    assert kept(supernet(HBSpace, grad_checkpointing=True)) < kept(supernet(HBSpace)) / 4
    net = supernet(HBSpace, grad_checkpointing=True)
    with torch.no_grad():  # nothing to keep: no cell is run in a checkpoint
        close(net(images()), supernet(HBSpace)(images()))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("space", [HBSpace, AGDSpace])
def test_gradients_with_the_others_constant_are_the_same(space, checkpointed):
    """A step of α with weights constant, and a step of the weights with α constant."""
    net = supernet(space, grad_checkpointing=checkpointed)
    alphas = [p for name, p in net.named_parameters() if "_arch" in name]
    weights = [p for name, p in net.named_parameters() if "_arch" not in name]
    every = [*alphas, *weights]
    full = torch.autograd.grad(net(images()).square().sum(), every)
    for moving, constant, expected in (
        (alphas, weights, full[: len(alphas)]),
        (weights, alphas, full[len(alphas) :]),
    ):
        with _without_gradients(constant):
            got = torch.autograd.grad(net(images()).square().sum(), moving)
        for a, b in zip(got, expected):
            close(a, b)
        assert all(p.requires_grad for p in every)


def test_constant_parameters_move_again_after_an_error_and_frozen_ones_do_not():
    moving, frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)

    def fail():
        with _without_gradients([moving, frozen]):
            assert not moving.requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert moving.requires_grad
    assert not frozen.requires_grad


# --- operations of several edges as one -------------------------------------------------------------------------------

RESTRICTED = {
    "normal/op_2_0": ["sep_conv_3x3", "none"],
    "normal/op_2_1": ["sep_conv_3x3", "max_pool_3x3"],
    "normal/op_3_0": ["dil_conv_3x3", "skip_connect"],
}
GROUPED = {
    "hb": (HBSpace, {}),
    "agd": (AGDSpace, {}),
    "partial": (AGDSpace, dict(partial_channels=2)),
    "dropout": (HBSpace, dict(skip_dropout=0.5)),
    "checkpointing": (HBSpace, dict(grad_checkpointing=True)),
    "restricted": (HBSpace, dict(allowed=RESTRICTED)),
}


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("nni_spaces.spaces.mixed_op._launches_are_slow", lambda x: True)


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", GROUPED)
def test_operations_run_as_one_with_the_same_results(case, training, monkeypatch):
    """Two passes, then two backward passes: loss, gradients, statistics and random state; and fewer convolutions."""
    space, options = GROUPED[case]
    nets = [supernet(space, **options).train(training) for _ in range(2)]
    found, counts = [], []
    for net in nets:
        torch.manual_seed(5)
        with Convolutions() as convolutions:
            losses = [net(images() + i).square().sum() for i in range(2)]
        for loss in losses:
            loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        found.append({"losses": torch.stack(losses), "state": torch.get_rng_state(), **gradients, **net.state_dict()})
        counts.append(convolutions.count)
        as_on_a_gpu(monkeypatch)  # the second network
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert counts[1] < (0.9 if case == "restricted" else 0.7) * counts[0]


def test_an_operation_that_is_not_known_runs_alone(monkeypatch):
    """Hooks are called, and another class, a bias or a scale keep an operation from running with others."""
    as_on_a_gpu(monkeypatch)
    net, calls = supernet(HBSpace), []
    edge = next(m for name, m in net.named_modules() if name == "cells.0.nodes.0.0")
    edge["dil_conv_3x3"][1].register_forward_hook(lambda *_: calls.append("hook"))
    net(images())
    assert calls == ["hook"]
    made = make_operation("sep_conv_3x3", 4, 1, False)
    assert kind_of(made) == kind_of(deepcopy(made)) is not None
    assert kind_of(made) != kind_of(make_operation("sep_conv_5x5", 4, 1, False))
    assert kind_of(made) != kind_of(deepcopy(made).eval())
    assert kind_of(make_operation("sep_conv_3x3", 4, 1, True)) is None
    made[1] = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    assert kind_of(made) is None
