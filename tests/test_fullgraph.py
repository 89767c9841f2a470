"""Every family in every form is one graph of a compiler, with the results of the eager network.

Compared are output, gradients and buffers: statistics are updated once, though a backward pass recomputes them.
"""

import copy

import pytest
import timm
import torch
from equality import randomise
from forms import CELLS, CIFAR, CIFAR_DENSE, DENSE, FORMS, IMAGENET, assert_equal, build, images, result
from my_algorithms import LearnedHeavyBall
from packaging.version import Version
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

# In eager mode these are other functions; a compiler gets the plain form.
PLAIN = [form for form in FORMS if "fused" not in form]
FEATURES = {key: value for key, value in IMAGENET.items() if key != "num_classes"}
DROPPED = dict(drop_rate=0.2, drop_path_rate=0.3, drop_block_rate=0.3)

# name -> model, arguments, checkpointing
OPTIONS = {
    "dropped": ("hbnet20", dict(CIFAR, **DROPPED), True),
    "dropped, reversible": ("hbnet50", dict(IMAGENET, memory="reversible", **DROPPED), False),
    "attention, final norm": ("hbnet50", dict(IMAGENET, block_args=dict(attn_layer="se"), final_norm=True), True),
    "not recoverable": ("hbnet20", dict(CIFAR, beta1=0.5, beta2=0.0), True),
    "features": ("hbnet18", dict(FEATURES, features_only=True), True),
    "learned algorithm": ("optnet20", dict(CIFAR, algorithm=LearnedHeavyBall(0.5)), True),
    "residual reading": ("optnet20", dict(CIFAR, algorithm="agd2", reading="residual", **DROPPED), True),
    "dropped, dense": ("agdnet121", dict(DENSE, drop_rate=0.2, proj_drop_rate=0.3), True),
    "constant alpha": ("agdnet40_k12", dict(CIFAR_DENSE, bn_size=4, compression=0.5, learn_alpha=False), True),
    "auxiliary head": ("cellnet_cifar", dict(CELLS, aux_head=True, drop_path_rate=0.3), True),
}
FAST = ("hbnet18, checkpointing", "agdnet40_k12, checkpointing", "dropped", "features", "learned algorithm")
SMALL = ("hbnet20, reversible, learned", "optnet20, checkpointing", "agdnet40_k12, checkpointing", "cellnet_cifar")


def cases(names, fast=FAST):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.every_model) for name in names]


def skip_if_old(reason):
    if Version(torch.__version__) < Version("2.14"):
        pytest.skip(f"the compiler of torch {torch.__version__} {reason}: 2.14 can")


def build_with(options):
    name, arguments, checkpointing = OPTIONS[options]
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    if arguments.get("aux_head"):
        model.set_auxiliary_training()
    model = randomise(model.double())
    model.set_grad_checkpointing(checkpointing)
    return model.train()


def compiled(function, backend="aot_eager", **arguments):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **arguments), counter


def as_one_tensor(outputs):
    """Return features or logits with a different weight for each value of the list."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    return torch.stack([(k + 1) * x.flatten(1).square().mean(1) for k, x in enumerate(outputs)])


def assert_one_graph(model, x=None, call=lambda model, x: model(x), **arguments):
    """Compare the compiled network with a copy in eager mode."""
    x = images(size=32) if x is None else x
    reference = copy.deepcopy(model)
    expected = result(reference, x, forward=lambda x: as_one_tensor(call(reference, x)))
    run, counter = compiled(lambda x: call(model, x), **arguments)
    got = result(model, x, forward=lambda x: as_one_tensor(run(x)))
    assert_equal(got, expected, 1e-8)
    assert counter.frame_count == 1 or arguments.get("dynamic")  # that starts once more for floats that are symbols
    return run, counter


@pytest.mark.slow
@pytest.mark.parametrize("form", cases(PLAIN))
def test_training(form):
    assert_one_graph(build(form))


@pytest.mark.slow
@pytest.mark.every_model
@pytest.mark.parametrize("form", PLAIN)
def test_evaluation(form):
    assert_one_graph(build(form).eval())


@pytest.mark.slow
@pytest.mark.parametrize("options", cases(OPTIONS))
def test_options(options):
    if options == "learned algorithm":
        skip_if_old("cannot trace `next` with a default")
    assert_one_graph(build_with(options))


@pytest.mark.slow
@pytest.mark.every_model
@pytest.mark.parametrize("form", SMALL)
def test_sizes_as_symbols(form):
    assert_one_graph(build(form), dynamic=True)


def scaled(module, inputs, output):
    return output * 1.5


@pytest.mark.slow
@pytest.mark.every_model
@pytest.mark.parametrize("form", SMALL)
def test_hooks_and_frozen_parameters(form):
    model = build(form)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(scaled)
            module.requires_grad_(False)
    assert_one_graph(model)


@pytest.mark.slow
@pytest.mark.every_model
@pytest.mark.parametrize("form", SMALL)
def test_channels_last(form):
    x = images(size=32).contiguous(memory_format=torch.channels_last)
    assert_one_graph(build(form).to(memory_format=torch.channels_last), x)


@pytest.mark.slow
@pytest.mark.every_model
@pytest.mark.parametrize("form", SMALL)
def test_intermediates(form):
    def call(model, x):
        last, features = model.forward_intermediates(x)
        return [last, *features]

    assert_one_graph(build(form), call=call)


@pytest.mark.slow
@pytest.mark.parametrize("form", cases(["hbnet50, reversible", *SMALL], fast=["hbnet50, reversible"]))
def test_fused(form):
    """The network for evaluation, which reads its modules before it calls them."""
    model = build(form).eval().fuse()
    for buffer in model.buffers():
        buffer.nan_to_num_()  # bounds are infinite, and could not be compared
    assert_one_graph(model)


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(model, x, backend="aot_eager"):
    """Return the bytes that the compiled network keeps for its backward pass, without parameters and input."""
    sizes = {}
    kept = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}

    def pack(t):
        if t.untyped_storage()._cdata not in kept:
            sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    run, _ = compiled(model, backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(x)
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "bound"),
    [
        ("hbnet20", CIFAR, 0.45),
        ("agdnet40_k12", dict(CIFAR_DENSE, bn_size=4), 0.45),
        pytest.param("hbnet50", IMAGENET, 0.45, marks=pytest.mark.every_model),
        pytest.param("agdnet121", dict(DENSE, growth_rate=8), 0.45, marks=pytest.mark.every_model),
        pytest.param("optnet20", dict(CIFAR, algorithm="agd2"), 0.45, marks=pytest.mark.every_model),
        pytest.param("cellnet_cifar", CELLS, 0.3, marks=pytest.mark.every_model),
    ],
)
def test_checkpointing_saves_memory(name, arguments, bound):
    skip_if_old("cannot update statistics in a checkpoint")
    x = images(size=32)
    model = timm.create_model(name, **arguments).double().train()
    stored = saved_bytes(model, x)
    model.set_grad_checkpointing()
    assert 0 < saved_bytes(model, x) < bound * stored


@pytest.mark.slow
def test_a_budget_of_the_compiler_saves_memory():
    """The compiler chooses what a dense block recomputes; the gradients are the same."""
    x = images(size=32)
    model = timm.create_model("agdnet40_k12", **CIFAR_DENSE, bn_size=4).double().train()
    partitioned = "aot_eager_decomp_partition"  # cuts the graph as Inductor does
    stored = saved_bytes(model, x, partitioned)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        assert 0 < saved_bytes(model, x, partitioned) < 0.6 * stored
        assert_one_graph(model, x)
