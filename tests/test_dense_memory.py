"""The dense block as one function: equal to its plain form, under everything that a training script does to a model."""

import contextlib
import copy
from itertools import product

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from equality import assert_same_function, output_and_gradients, randomise
from measure import peak_memory
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import timm_models.stages.nesterov
from optinspired_plugins.memory import dense_block as dense_memory
from optinspired_plugins.memory.dense_block import DenseLayer, dense_block


@contextlib.contextmanager
def plain_form():
    """Blocks and transitions as if a graph of the forward pass were wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_models.stages.nesterov, "is_eager", lambda x: False)
        yield


class Plain(nn.Module):
    """A model in its plain form, with the other's names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with plain_form():
            return self.model(x)


class Fused(Plain):
    """A model as it is; no block may fall back to the plain form."""

    def forward(self, x):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("dense_block", "dense_block_inference"):
                function = getattr(dense_memory, name)
                patch.setattr(timm_models.stages.nesterov, name, lambda *args, f=function: calls.append(f) or f(*args))
            out = self.model(x)
        assert len(calls) == sum(isinstance(m, timm_models.stages.nesterov.NesterovBlock) for m in self.model.modules())
        return out


def build(name="agdnet121", checkpointing=False, seed=0, **options):
    torch.manual_seed(seed)
    small = dict(growth_rate=4, block_config=(2, 3, 4), num_classes=3)
    model = randomise(timm.create_model(name, **{**small, **options}).double())
    model.set_grad_checkpointing(checkpointing)
    return model.train()


def pair(checkpointing=False, prepare=lambda model: None, **options):
    fused, plain = build(checkpointing=checkpointing, **options), build(**options)
    for model in (fused, plain):
        prepare(model)
    return Fused(fused), Plain(plain)


def images(size=33, batch=4, dtype=torch.float64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- the function -----------------------------------------------------------------------------------------------------


def block(bottleneck, training, checkpointing, z, *flat):
    """Three layers on three channels, growth two, as a function of tensors."""
    layers, end = [], 3
    for k in range(3):
        own = flat[k * (6 if bottleneck else 3) :]
        norms = [nn.BatchNorm2d(c).double().train(training) for c in (end, 4)]
        for norm in norms:
            norm.running_var.fill_(0.7)
            norm.running_mean.fill_(0.1)
        first = _With(norms[0], own[0], own[1])
        second = (_With(norms[1], own[3], own[4]), own[5]) if bottleneck else (None, None)
        layers.append(DenseLayer(first, own[2], *second, 0.0))
        end += 2
    return dense_block(z, layers, [0.0, -0.3, 0.6, 0.9], 0.4, checkpointing)


class _With:
    """A normalisation with the tensors of a gradcheck for scale and shift."""

    def __init__(self, norm, weight, bias):
        self.norm, self.weight, self.bias = norm, weight, bias

    def __getattr__(self, name):
        return getattr(self.norm, name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_gradcheck(bottleneck, training, checkpointing):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    flat = []
    for end in (3, 5, 7):
        flat += [draw(end), draw(end), draw(4, end, 1, 1) if bottleneck else draw(2, end, 3, 3)]
        flat += [draw(4), draw(4), draw(2, 4, 3, 3)] if bottleneck else []
    function = lambda z, *rest: block(bottleneck, training, checkpointing, z, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(function, (draw(2, 3, 3, 3), *flat), eps=1e-7, atol=1e-5)


def test_statistics_are_those_of_a_source_and_taken_once(monkeypatch):
    """Once for each source of a block but the last, which no layer reads, and for each of the 2 + 3 + 4 bottlenecks."""
    shapes, of_source, of_pass = [], dense_memory.batch_statistics, dense_memory.pass_statistics
    monkeypatch.setattr(dense_memory, "batch_statistics", lambda x: shapes.append(x.shape[1]) or of_source(x))
    monkeypatch.setattr(dense_memory, "pass_statistics", lambda n, x, d: shapes.append(x.shape[1]) or of_pass(n, x, d))
    build()(images())
    assert shapes.count(4) == 6, "every source but the first and the last of a block has 4 channels"
    assert len(shapes) == 6 + 9 + 3


# --- models -----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "constant": dict(learn_alpha=False),
    "densenet": dict(beta=0.0, learn_alpha=False),
    "strong momentum": dict(beta=-1.3),
    "dropout": dict(proj_drop_rate=0.4, drop_rate=0.2),
    "blur": dict(aa_layer=timm.layers.BlurPool2d),
    "deep stem": dict(stem_type="deep"),
    "cifar": dict(name="agdnet40_k12"),
    "cifar with bottleneck": dict(name="agdnet40_k12", bn_size=2, compression=0.5, proj_drop_rate=0.3),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_computes_what_the_plain_form_does(options, checkpointing):
    """Outputs, gradients, running statistics and the random state, in training and evaluation, in both layouts."""
    for training, layout in product((True, False), (torch.contiguous_format, torch.channels_last)):
        fused, plain = (model.train(training) for model in pair(checkpointing, **options))
        states: list = []
        for model in (fused, plain):
            model.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
            model.register_forward_hook(lambda *_, states=states: states.append(torch.get_rng_state()))
        assert_same_function(fused, plain, images().to(memory_format=layout))
        assert torch.equal(*states)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scale", [-1.0, 1.0, 0.0, 1e-30, "mixed"], ids=str)
def test_normalisations_of_either_sign_and_none(scale, checkpointing):
    """Without a scale the next normalisation sees a constant, and its own gradient is rounding: hence the tolerance."""

    def prepare(model):
        for name, parameter in model.named_parameters():
            if "denselayer" in name and name.endswith(("norm1.weight", "norm2.weight")):
                with torch.no_grad():
                    size = parameter.abs() + 0.1
                    parameter.copy_(size * (torch.arange(len(size)) % 3 - 1 if scale == "mixed" else scale))

    assert_same_function(*pair(checkpointing, prepare), images(), tolerance=1e-9)


def test_no_gradient_and_a_batch_of_one():
    fused, plain = pair(prepare=lambda model: model.eval())
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), plain(images()), rtol=1e-10, atol=1e-10)
    fused, plain = pair()
    assert_same_function(fused, plain, images(batch=1, size=65))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("frozen", ["denseblock1", "alpha", "norm1", "conv", "denselayer2", "features"])
def test_frozen_parts(frozen, checkpointing):
    def prepare(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)

    found = []
    for model in pair(checkpointing, prepare):
        model(images()).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_two_backward_passes_and_double_use(checkpointing):
    results = []
    for model in pair(checkpointing):
        for part in images().chunk(2):
            model(part).square().sum().backward()
        loss = model(images()).sin().sum() + model(images().flip(0)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-8)


def test_an_output_that_was_overwritten_is_an_error():
    block1 = build().features.denseblock1
    out = block1(torch.randn(2, 8, 8, 8, dtype=torch.float64, requires_grad=True))
    loss = out.sum()
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _hook(model):
    model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda *_: None)


def _replace(model):
    model.features.denseblock1.denselayer2.norm1.act = nn.SiLU()


def _freeze_statistics(model):
    model.features.denseblock1.denselayer2.norm2.eval()


def _cumulative(model):
    model.features.denseblock1.denselayer1.norm1.momentum = None


def _parametrize(model):
    torch.nn.utils.parametrizations.spectral_norm(model.features.denseblock1.denselayer1.conv2)


@pytest.mark.parametrize("change", [_hook, _replace, _freeze_statistics, _cumulative, _parametrize])
def test_what_somebody_changed_is_computed_plainly(change, monkeypatch):
    model, reference = build(), build()
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    change(reference)
    calls, original = [], timm_models.stages.nesterov.dense_block
    monkeypatch.setattr(timm_models.stages.nesterov, "dense_block", lambda *args: calls.append(args) or original(*args))
    assert_same_function(model, reference, images(), forward=Plain(reference))
    assert len(calls) == 2, "the other two blocks are as they were"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reduced_precision_strays_no_further_than_the_plain_form(checkpointing, dtype):
    """Summed over draws of the weights, since the error of one draw varies by a factor of two in both forms."""
    errors = [0.0, 0.0]
    for seed in range(6):
        fused, plain = pair(checkpointing, seed=seed)
        x = images(batch=16, dtype=torch.float32)
        exact = output_and_gradients(plain.float(), x)
        # α of a single source has no effect before a normalisation: its gradient is 0, and its computed value noise.
        known = {key: value for key, value in exact.items() if value.norm() > 1e-2}
        for i, model in enumerate((fused.float(), plain)):
            with torch.autocast("cpu", dtype=dtype):
                got = output_and_gradients(model, x)
            assert got["output"].dtype == dtype
            errors[i] += sum(((got[key] - value).norm() / value.norm()).item() for key, value in known.items())
    assert errors[0] < 1.3 * errors[1]


def test_a_model_in_bfloat16():
    fused, _ = pair()
    out = fused.bfloat16()(images(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in fused.parameters())


def test_a_hundred_steps_lie_on_the_plain_forms():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 16, 3, 16, 16, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (4, 16), generator=generator)
    curves, small = [], dict(name="agdnet40_k12", block_config=(4, 4, 4), proj_drop_rate=0.1)
    for model in [*pair(**small), pair(**small, checkpointing=True)[0]]:
        torch.manual_seed(0)
        model.model.init_weights()
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
        torch.manual_seed(0)
        losses = []
        for step in range(100):
            loss = nn.functional.cross_entropy(model(x[step % 4]), y[step % 4])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses, dtype=torch.float64))
    assert curves[1][-20:].mean() < 0.3 * curves[1][:20].mean()
    for curve in (curves[0], curves[2]):
        torch.testing.assert_close(curve, curves[1], rtol=1e-6, atol=1e-6)


# --- memory -----------------------------------------------------------------------------------------------------------


def step_memory(model):
    x = images(64, 2)
    model(x).sum().backward()  # gradients are there from now on
    return peak_memory(lambda: model(x).sum().backward())


def test_memory_of_a_step_against_timms_densenet():
    options = dict(growth_rate=8, block_config=(8, 8), num_classes=3)
    densenet = step_memory(timm.models.DenseNet(**options).double())
    fused = step_memory(build(**options))
    checkpointing = step_memory(build(checkpointing=True, **options))
    assert fused < 0.5 * densenet
    assert checkpointing < 0.8 * fused


# --- hosts ------------------------------------------------------------------------------------------------------------


def test_exponential_moving_average():
    model = build()
    ema = timm.utils.ModelEmaV2(model, decay=0.5)
    model(images()).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    ema.update(model)
    assert torch.isfinite(ema.module(images())).all()
    assert_same_function(copy.deepcopy(model), model, images())


def test_shapes_alone_need_no_values():
    out = build().to("meta")(torch.empty(2, 3, 33, 33, dtype=torch.float64, device="meta"))
    assert out.shape == (2, 3)
    assert out.requires_grad


def test_graphs_have_the_plain_forms_operations():
    model = build().eval()
    x = images()
    expected = model(x)
    traced = torch.fx.symbolic_trace(model.features.denseblock1)
    assert any("cat" in str(node.target) for node in traced.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-10, atol=1e-10)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-10, atol=1e-10)


def test_function_transforms():
    """Gradients of each image by torch.func are those that autograd gives of one after the other."""
    model = build().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images())
    for i, x in enumerate(images()):
        expected = torch.autograd.grad(model(x[None]).square().sum(), list(model.parameters()))
        for name, gradient in zip(parameters, expected):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled(checkpointing):
    model = build(checkpointing=checkpointing)
    expected = output_and_gradients(build(), images())
    compiled = torch.compile(model, backend="aot_eager")
    got = output_and_gradients(model, images(), forward=lambda x: compiled(x))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-8, atol=1e-8)


def _two_ranks(rank, checkpointing, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for model in pair(checkpointing):
        model = DistributedDataParallel(model)
        first, second = images(batch=8).chunk(2)
        with model.no_sync():
            model(first.chunk(2)[rank]).square().sum().backward()
        model(second.chunk(2)[rank]).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes(checkpointing, tmp_path):
    mp.spawn(_two_ranks, args=(checkpointing, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for fused, plain in ranks:
        for a, b, other in zip(fused, plain, ranks[0][0]):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
            assert torch.equal(a, other)
