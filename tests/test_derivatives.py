"""Higher derivatives, unusual batches, graphs and threads: every family and form, beside the plain form."""

import copy
import threading
import warnings

import pytest
import torch
from forms import FORMS, RECOVERING, TWINS, assert_equal, build, copies, images, marked, plainly, result, twin_of
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

NO_GRAPH = r"create_graph=True: a heavy-ball stage that recovers its iterates has no second derivative"
DIFFERENTIABLE = [form for form in FORMS if form not in RECOVERING]


def small(model, x):
    torch.manual_seed(0)
    return model(x).sin().sum()


def gradient_penalty(model, x):
    """A loss of the input's gradient (R1), and its gradient with respect to every parameter."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(small(model, x), x, create_graph=True)
    gradient.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def hessian_vector_product(model, x):
    """With ``inputs``, which prunes whatever does not lead to them."""
    parameters = dict(model.named_parameters())
    first = torch.autograd.grad(small(model, x), list(parameters.values()), create_graph=True)
    vectors = [torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g) for g in first]
    found = torch.autograd.grad(first, list(parameters.values()), vectors, allow_unused=True)
    return dict(zip(parameters, found))


SECOND = [gradient_penalty, hessian_vector_product]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("derivative", SECOND)
@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_second_derivatives(form, derivative, training):
    model, reference = (each.train(training) for each in copies(form))
    with plainly():
        expected = derivative(reference, images(2))
    assert_equal(derivative(model, images(2)), expected, 1e-8)


@pytest.mark.parametrize("derivative", SECOND)
@pytest.mark.parametrize("form", TWINS)
def test_second_derivatives_of_twins(form, derivative):
    assert_equal(derivative(build(form), images(2)), derivative(twin_of(form), images(2)), 1e-8)


@pytest.mark.parametrize("derivative", SECOND)
@pytest.mark.parametrize("form", RECOVERING)
def test_forms_that_recover_iterates_refuse_second_derivatives(form, derivative):
    with pytest.raises(RuntimeError, match=NO_GRAPH):
        derivative(build(form), images(2))


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_gradients(form):
    """``is_grads_batched`` gives what one gradient after the other gives."""
    model = build(form).eval()
    x = images(2).requires_grad_()
    parameters = list(model.parameters())[:3]
    out = model(x)
    directions = torch.randn(4, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    batched = torch.autograd.grad(out, [x, *parameters], directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for a, b in zip(batched, torch.autograd.grad(out, [x, *parameters], direction, retain_graph=True)):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(form):
    """The directional derivative is the gradient's, and a vectorised Jacobian has it in its rows."""
    model = build(form).eval()
    x, direction = images(2), images(2).flip(0)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    y = x.clone().requires_grad_()
    expected = (torch.autograd.grad(model(y).sum(), y)[0] * direction).sum()
    torch.testing.assert_close(tangent.sum(), expected, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, vectorize=True)
    torch.testing.assert_close((jacobian * direction).sum(), expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_coefficients_alone():
    """Then no gradient of T_1 is asked for, of which x_0 is recovered."""
    for form in ("hbnet50, checkpointing, learned", "hbnet20, reversible, learned"):
        found = []
        for model, context in zip(copies(form), (warnings.catch_warnings, plainly)):
            betas = [p for name, p in model.named_parameters() if name.endswith("beta2")]
            with context():
                found.append(torch.autograd.grad(small(model, images()), betas))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gamma_has_the_precision_of_torchs_own():
    """Against float64, where the mean of a source is ten standard deviations."""
    errors = {}
    for form in ("agdnet121, densenet", "agdnet121, densenet, checkpointing"):
        for name, model in ((form, build(form)), ("densenet", twin_of(form))):
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.bias.add_(10)
            exact = result(copy.deepcopy(model), images(4))
            got = result(model.float(), images(4).float())
            keys = [k for k in exact if "denselayer" in k and k.endswith(("norm1.weight", "norm2.weight"))]
            errors[name] = sum((got[k] - exact[k]).norm().item() / exact[k].norm().item() for k in keys)
    assert max(errors.values()) < 4 * errors["densenet"], errors


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch(form, training):
    """What the plain form makes of it, which is what torch's modules do."""
    outcomes = []
    for model, context in zip(copies(form), (warnings.catch_warnings, plainly)):
        model.train(training)
        with context():
            out = model(images(0))
            out.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        outcomes.append((out.shape, gradients, dict(model.named_buffers())))
    (shape, gradients, buffers), (expected_shape, expected, expected_buffers) = outcomes
    assert shape == expected_shape == (0, 3)
    for name, value in expected.items():
        assert (gradients[name] is None) == (value is None)
        assert value is None or torch.equal(gradients[name], value)
    for name, value in expected_buffers.items():
        torch.testing.assert_close(buffers[name], value, rtol=0, atol=0, equal_nan=True)
        assert value.isfinite().all()


@pytest.mark.parametrize("form", TWINS)
def test_an_empty_batch_of_twins(form):
    outcomes = []
    for model in (build(form), twin_of(form)):
        out = model(images(0))
        out.sum().backward()
        outcomes.append((out.shape, {name: p.grad for name, p in model.named_parameters()}, model))
    (shape, gradients, model), (expected_shape, expected, twin) = outcomes
    assert shape == expected_shape == (0, 3)
    for name, value in expected.items():
        assert torch.equal(gradients[name], value), name
    buffers = dict(model.named_buffers())
    for name, value in twin.named_buffers():
        assert torch.equal(buffers[name], value), name


@pytest.mark.parametrize("form", FORMS)
def test_one_image(form):
    model, reference = copies(form)
    with plainly():
        expected = result(reference, images(1, 65))
    assert_equal(result(model, images(1, 65)), expected)


# --- graphs -----------------------------------------------------------------------------------------------------------

REGIONS = [["Conv2d"], ["BasicTransform", "BottleneckTransform", "SourceLayer", "Cell"]]
SAVING = [form for form in FORMS if "checkpointing" in form or "reversible" in form or "agdnet" in form]


@pytest.mark.parametrize("form", SAVING)
def test_export_and_symbolic_traces(form):
    """With gradients enabled and the form on."""
    model = build(form).eval()
    x = images()
    expected = copy.deepcopy(model)(x)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-9, atol=1e-9)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("form", marked(SAVING))
def test_one_graph_of_a_compiler(form):
    """No break; gradients and statistics as in the plain form, and statistics are updated once."""
    torch._dynamo.reset()
    model, reference = copies(form)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with plainly():
        expected = result(reference, images())
    assert_equal(result(model, images(), forward=lambda x: compiled(x)), expected, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("regions", REGIONS, ids=["convolutions", "blocks"])
@pytest.mark.parametrize("form", marked(SAVING))
def test_regional_compilation(form, regions):
    model, reference = copies(form)
    modules = [module for module in model.modules() if type(module).__name__ in regions]
    assert modules
    torch._dynamo.reset()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.5
    with torch._dynamo.config.patch({limit: 64}):
        for module in modules:
            module.compile(backend="aot_eager")
        got = result(model, images())
    with plainly():
        expected = result(reference, images())
    assert_equal(got, expected, 1e-8)


# --- reversibility and threads ----------------------------------------------------------------------------------------


def amplifying():
    """A stage whose iterates cannot be recovered: frozen statistics far from the batch's."""
    torch.manual_seed(0)
    model = build("hbnet20, reversible, learned").float().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e-3)
    return model


def test_a_warning_where_recovered_iterates_stray():
    with pytest.warns(UserWarning, match=r"the x_1 that a heavy-ball stage recovered differs by more than 0.001"):
        amplifying()(images().float()).sum().backward()


@pytest.mark.parametrize("form", RECOVERING)
def test_no_warning_elsewhere(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(form).float()(images().float()).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = build(form).float()(images().float()).sum()
        loss.backward()


@pytest.mark.parametrize("form", ["hbnet18, checkpointing", "hbnet18, reversible"])
def test_a_loss_inside_a_stage_alone_says_what_is_missing(form):
    model, seen = build(form), []
    model.layer2[1].register_forward_hook(lambda module, args, out: seen.append(out))
    model(images())
    with pytest.raises(RuntimeError, match="the stage's output must take part in the loss"):
        seen[0].sum().backward()


@pytest.mark.parametrize("form", RECOVERING)
def test_threads(form):
    """Gradients of four threads at once, over one model, are those of one after the other."""
    model = build(form)
    batches = [images(2) + i for i in range(4)]
    expected = [torch.autograd.grad(small(model, x), list(model.parameters())) for x in batches]
    found, errors = {}, []

    def work(i):
        try:
            for _ in range(3):
                found[i] = torch.autograd.grad(model(batches[i]).sin().sum(), list(model.parameters()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, gradients in enumerate(expected):
        for a, b in zip(found[i], gradients):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_memory_can_be_switched_after_construction():
    model = build("hbnet18, reversible")
    model.set_memory("stored")
    assert gradient_penalty(model, images(2)).keys() == dict(model.named_parameters()).keys()
    model.set_memory("reversible")
    with pytest.raises(RuntimeError, match=NO_GRAPH):
        gradient_penalty(model, images(2))
    with pytest.raises(ValueError, match="memory='half': must be one of"):
        model.set_memory("half")


def test_functional_call_under_grad_of_torch_func():
    model = build("agdnet121").eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    by_func = torch.func.grad(lambda p: functional_call(model, p, (images(),)).square().sum())(parameters)
    by_autograd = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    for a, b in zip(by_func.values(), by_autograd):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
