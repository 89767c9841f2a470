"""Backward passes that keep less: equal to the plain form, under everything that a training script does to a model."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from equality import assert_close_in_norm, assert_same_function, output_and_gradients, randomise
from extras import DROP_BLOCK
from measure import peak_memory
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optinspired_plugins.memory.recompute import recompute

SMALL = dict(layers=(2, 3, 1, 4), channels=(8, 12, 16, 16), num_classes=3)
RECOMPUTED = ["checkpointing", "reversible"]


def build(name="hbnet50", memory="stored", **options):
    """A model in double precision with generic parameters; alike for every ``memory``."""
    torch.manual_seed(0)
    options = dict(SMALL, **options) if name in ("hbnet18", "hbnet50") else dict(num_classes=3, **options)
    made = "reversible" if memory == "reversible" else "stored"
    model = timm.create_model(name, memory=made, **options)
    model = randomise(model.double())
    if memory == "checkpointing":
        model.set_grad_checkpointing()
    return model.train()


def images(size=32, batch=4, dtype=torch.float64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- models -----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "learned": dict(learn_beta=True),
    "other coefficients": dict(beta1=0.6, beta2=0.5),
    "se": dict(block_args=dict(attn_layer="se")),
    "eca": dict(block_args=dict(attn_layer="eca")),
    "groupnorm": dict(norm_layer="groupnorm1"),
    "dilated": dict(output_stride=8),
    "avg down": dict(avg_down=True, stem_type="deep", stem_width=8),
    "blur": dict(aa_layer=timm.layers.BlurPool2d, stride_in_1x1=False),
    "drop path": dict(drop_path_rate=0.4, drop_rate=0.3),
    "drop block": pytest.param(dict(drop_block_rate=0.2, drop_path_rate=0.2), marks=DROP_BLOCK),
}


@pytest.mark.parametrize("memory", RECOMPUTED)
@pytest.mark.parametrize("name", ["hbnet18", "hbnet50"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_computes_what_the_stored_form_does(options, name, memory):
    """Outputs, gradients, running statistics; the random state is replayed and left as the stored form leaves it."""
    if name == "hbnet18":
        options = {key: value for key, value in options.items() if key != "stride_in_1x1"}
    states = []

    def seeded(model, x):
        torch.manual_seed(7)
        out = model(x)
        out.register_hook(lambda gradient: None)
        states.append(torch.get_rng_state())
        return out

    stored, recomputed = build(name, **options), build(name, memory, **options)
    assert_same_function(lambda_module(recomputed, seeded), lambda_module(stored, seeded), images(64))
    assert torch.equal(states[0], states[1])


def lambda_module(model, forward):
    """A module that calls another through a function, with the other's names."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return forward(self.model, x)

    return Wrapped()


@pytest.mark.parametrize("name", ["hbnet20", "hbnet20_resnet", "optnet20"])
def test_cifar_names_checkpoint(name):
    options = {} if name == "optnet20" else dict(drop_path_rate=0.3)
    torch.manual_seed(0)
    stored = randomise(timm.create_model(name, **options).double()).train()
    recomputed = copy.deepcopy(stored)
    recomputed.set_grad_checkpointing()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = output_and_gradients(stored, images(16))
        torch.manual_seed(3)
        got = output_and_gradients(recomputed, images(16))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9)
    for a, b in zip(recomputed.buffers(), stored.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_evaluation_mode_channels_last_and_no_gradient(memory):
    stored, recomputed = build(), build(memory=memory)
    assert_same_function(recomputed.eval(), stored.eval(), images())
    last = dict(memory_format=torch.channels_last)
    assert_same_function(recomputed.train().to(**last), stored.train().to(**last), images().to(**last))
    with torch.no_grad():
        torch.testing.assert_close(recomputed.eval()(images()), stored.eval()(images()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory", RECOMPUTED)
@pytest.mark.parametrize("frozen", [("conv1", "bn1", "layer1"), ("layer2.1", "layer4.0"), ("layer",), ("bn",)])
def test_frozen_parts(frozen, memory):
    results = []
    for model in (build(), build(memory=memory)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        model(images()).square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_accumulation_two_backward_passes_and_double_use(memory):
    results = []
    for model in (build(learn_beta=True), build(memory=memory, learn_beta=True)):
        for part in images().chunk(2):
            model(part).square().sum().backward()
        loss = model(images()).sin().sum() + model(images().flip(0)).square().sum()  # both graphs at once
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_coefficients_may_move_before_the_backward_pass(memory):
    model = build(memory=memory, learn_beta=True)
    loss = model(images()).square().sum()
    before = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name:
                parameter.mul_(2)
    for a, b in zip(before, torch.autograd.grad(loss, list(model.parameters()))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_an_output_that_was_overwritten_is_an_error(memory):
    features = build(memory=memory).layer2
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    out = features(x)
    loss = out.sum()
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_iterates_are_recovered_in_reduced_precision(dtype):
    """The iterates are float32: rounded, the first recovered one equals the original except for few elements.

    Iterates in reduced precision would be wrong by a third of its rounding error from the first on. A layer turns an
    element that was rounded the other way into many, so that later ones differ by as much as the rounding.
    """
    model = build(memory="reversible", layers=(2, 5, 3, 2), act_layer=nn.SiLU).float()
    inputs = {name: [] for name, _ in model.named_modules() if name.endswith(".conv1")}

    def record(seen):
        return lambda module, args: seen.append(args[0].detach().clone())

    for name, seen in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(record(seen))
    with torch.autocast("cpu", dtype=dtype):
        model(images(64, batch=16, dtype=torch.float32)).square().sum().backward()
    for name, (first, repeated) in inputs.items():
        assert first.dtype == repeated.dtype == dtype
        stage = model.get_submodule(name.partition(".")[0])
        steps_back = len(list(stage.transforms())) - int(name.split(".")[1])  # 1: kept, 2: recovered first
        errors = 0.05 if steps_back <= 2 else 2
        assert_close_in_norm(repeated.float(), first.float(), errors * torch.finfo(dtype).eps, name)


def _distance(a, b):
    """Norm of the difference of two sets of gradients, over all of them together."""
    return sum((a[key] - b[key]).square().sum().item() for key in a if key != "output") ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_reduced_precision(dtype):
    """No form strays further from float32 than the stored form does, up to chance.

    The two that keep less differ by less than rounding costs. The activation is smooth: an error that turns a ReLU off
    would be as large as what passes it, and the comparison a matter of chance.
    """
    x = images(64, batch=16, dtype=torch.float32)
    options = dict(layers=(2, 8, 2, 2), drop_path_rate=0.2, act_layer=nn.SiLU)
    exact = output_and_gradients(build(**options).float(), x)
    found = {}
    for kind in ("stored", *RECOMPUTED):
        with torch.autocast("cpu", dtype=dtype):
            found[kind] = output_and_gradients(build(memory=kind, **options).float(), x)
    rounding = _distance(found["stored"], exact)
    assert 0 < rounding < 0.5 * _distance(exact, {key: 0 * value for key, value in exact.items()})
    for kind in RECOMPUTED:
        assert _distance(found[kind], exact) < 1.5 * rounding, kind
    assert _distance(found["checkpointing"], found["reversible"]) < 0.5 * rounding


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_a_model_in_bfloat16(memory):
    model = build(memory=memory).bfloat16()
    out = model(images(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_two_hundred_steps_lie_on_the_stored_forms():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 16, 3, 16, 16, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (4, 16), generator=generator)
    curves = {}
    for memory in ("stored", *RECOMPUTED):
        model = build("hbnet20", memory, channels=(4, 8, 8), drop_path_rate=0.1)
        model.init_weights()
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
        torch.manual_seed(0)
        losses = []
        for step in range(200):
            loss = nn.functional.cross_entropy(model(x[step % 4]), y[step % 4])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[memory] = torch.tensor(losses, dtype=torch.float64)
    assert curves["stored"][-20:].mean() < 0.2 * curves["stored"][:20].mean()
    for memory in RECOMPUTED:
        torch.testing.assert_close(curves[memory], curves["stored"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta2", [-0.1, -0.01, 0.0])
@pytest.mark.parametrize("memory", ["checkpointing", "reversible learned", "checkpointing learned"])
def test_iterates_are_not_recovered_if_errors_would_grow(memory, beta2):
    """Recovered with these coefficients, iterates would be wrong in the ninth digit already at −0.1."""
    kind, learned = memory.split()[0], "learned" in memory
    start = dict(learn_beta=True) if learned else dict(beta2=beta2)
    stored, recomputed = (build("hbnet56", made, **start) for made in ("stored", kind))
    if learned:
        for stage in (*stored.stages(), *recomputed.stages()):
            stage.beta2.data.fill_(beta2)
    assert_same_function(recomputed, stored, images())


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_learned_coefficients_of_frozen_layers(memory):
    """Nothing before the first step has a gradient, so no backward pass of T_1 comes that finds x_0."""
    results = []
    for model in (build(learn_beta=True), build(memory=memory, learn_beta=True)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("beta" in name or name.startswith("layer4"))
        model(images()).square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() >= {"layer1.beta1", "layer1.beta2", "layer2.beta2"}
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-8)


HOOKED = [("hbnet50", memory) for memory in ("stored", *RECOMPUTED)] + [
    ("hbnet18", "checkpointing"),
    ("optnet18", "stored"),
]


@pytest.mark.parametrize(("name", "memory"), HOOKED)
@pytest.mark.parametrize("place", ["layer2.0", "layer2.1", "layer2.1.last"])
def test_hooks_see_and_change_what_a_transform_returns(name, memory, place):
    """A kept output stays as it was, one that a hook doubles is doubled, and backward hooks get its gradient."""
    torch.manual_seed(0)
    if name == "optnet18":
        small = dict(algorithm="hb", layers=SMALL["layers"], channels=SMALL["channels"])
        model = randomise(timm.create_model(name, num_classes=3, **small).double()).train()
    else:
        model = build(name, memory)
    transform = model.get_submodule(place.removesuffix(".last"))
    module = transform.last_norm() if place.endswith("last") else transform
    expected = copy.deepcopy(model)
    for parameter in expected.get_submodule(place.removesuffix(".last")).last_norm().parameters():
        parameter.data.mul_(2)

    kept, gradients = [], []
    handles = [
        module.register_forward_hook(lambda module, args, out: kept.append((out, out.detach().clone()))),
        module.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0])),
    ]
    model(images()).square().sum().backward()
    for out, copied in kept:
        assert torch.equal(out, copied)
    assert [g.shape for g in gradients] == [kept[0][0].shape]
    assert gradients[0].abs().sum() > 0
    for handle in handles:
        handle.remove()
    module.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(model(images()), expected(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [dict(post_act=True), dict(beta2=0.0), dict(memory="none")], ids=str)
@pytest.mark.parametrize("name", ["hbnet50", "hbnet20"])
def test_what_cannot_be_reversed_is_named(name, options):
    allowed = "must be one of 'stored', 'reversible'" if "memory" in options else f"{next(iter(options))}="
    with pytest.raises(ValueError, match=f"memory='.*{allowed}"):
        timm.create_model(name, **{"memory": "reversible", **options})


def test_a_reversal_that_would_lose_too_much_is_named():
    with pytest.raises(ValueError, match=r"memory='reversible' with .*beta2=-0.2: .* grow 4.75e\+04 times in 8 steps"):
        timm.create_model("hbnet56", memory="reversible", beta2=-0.2)


def test_checkpointing_where_nothing_can_be_reversed():
    stored, recomputed = (build(post_act=True, beta2=0.0) for _ in range(2))
    recomputed.set_grad_checkpointing()
    assert_same_function(recomputed, stored, images())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_is_there_at_once():
    def function():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        b = b.view(2, 1000).t()  # a view is nothing new
        b.add_(1)
        c = b * b
        del b, c
        torch.empty(100)

    assert peak_memory(function) == 4 * 4000


def step_memory(model, size=64):
    x = images(size, 2)
    model(x).sum().backward()  # gradients are there from now on
    return peak_memory(lambda: model(x).sum().backward())


@pytest.mark.parametrize(
    ("memory", "least", "most"), [("stored", 11, 13), ("checkpointing", 1, 2.1), ("reversible", 0, 0.1)]
)
def test_memory_against_depth(memory, least, most):
    """Peak of a step at 4 and 28 transforms of one size, as growth for every transform in units of one activation."""
    channels = (16, 16, 16, 16)
    few, many = (step_memory(build("hbnet50", memory, layers=(n, 1, 1, 1), channels=channels)) for n in (4, 28))
    unit = 2 * 16 * 16 * 16 * 8  # a narrow activation of the first stage, float64
    assert least <= (many - few) / 24 / unit <= most


def test_learned_coefficients_cost_no_memory():
    assert step_memory(build(memory="reversible", learn_beta=True)) < 1.15 * step_memory(build(memory="reversible"))


def test_recompute_replays_and_updates_once():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    twin = copy.deepcopy(module)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    gradients = []
    for form in (module, lambda x: recompute(twin, twin, x)):
        torch.manual_seed(0)
        gradients += torch.autograd.grad(form(x).square().sum(), x)
    assert torch.equal(*gradients)
    assert twin[0].num_batches_tracked == 1
    torch.testing.assert_close(module[0].running_var, twin[0].running_var, rtol=1e-12, atol=1e-12)


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_exponential_moving_average(memory):
    model = build(memory=memory)
    ema = timm.utils.ModelEmaV2(model, decay=0.5)
    model(images()).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    ema.update(model)
    assert torch.isfinite(ema.module(images())).all()
    assert_same_function(copy.deepcopy(model), model, images())


def _two_ranks(rank, memory, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for kind in ("stored", memory):
        model = DistributedDataParallel(build(memory=kind, learn_beta=True))
        first, second = images(batch=8).chunk(2)
        with model.no_sync():
            model(first.chunk(2)[rank]).square().sum().backward()
        model(second.chunk(2)[rank]).square().sum().backward()
        found[kind] = [p.grad for p in model.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("memory", RECOMPUTED)
def test_two_processes(memory, tmp_path):
    mp.spawn(_two_ranks, args=(memory, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank in ranks:
        for a, b, other in zip(rank["stored"], rank[memory], ranks[0][memory]):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
            assert torch.equal(b, other)


@pytest.mark.slow
@pytest.mark.parametrize("memory", RECOMPUTED)
def test_compiled(memory):
    """The stages break the graph; the modules around them are compiled."""
    recomputed, stored = build(memory=memory), build()
    compiled = torch.compile(recomputed, backend="aot_eager")
    expected = output_and_gradients(stored, images())
    x = images().requires_grad_()
    out = compiled(x)
    torch.testing.assert_close(out, expected["output"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_shapes_alone_need_no_values(memory):
    out = build(memory=memory).to("meta")(torch.empty(2, 3, 33, 33, dtype=torch.float64, device="meta"))
    assert out.shape == (2, 3)
    assert out.requires_grad


def test_it_stays_scriptable():
    model = build(memory="checkpointing").eval()
    torch.testing.assert_close(torch.jit.script(model)(images()), model(images()), rtol=1e-10, atol=1e-10)
