"""The functions of a GPU, with their kernels in plain torch: where they run, what they keep, and half precision."""

import importlib
import sys

import forms
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from optinspired_plugins.memory import channel_kernels, fused_block, fused_stage
from timm_models.stages import fused, heavy_ball, nesterov

FORMS = [form for form in forms.FORMS if "fused" in form]


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that ran."""
    seen = []
    for module, name in ((heavy_ball, "fused_stage"), (nesterov, "fused_block")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=function, n=name: seen.append(n) or f(*args))
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_every_stage_runs_as_one_function(form, calls):
    model = forms.build(form)
    model(forms.images())
    name = "fused_block" if "agdnet" in form else "fused_stage"
    blocks = (heavy_ball.HeavyBallStage, nesterov.NesterovBlock)
    assert calls == [name] * sum(isinstance(module, blocks) for module in model.modules())


def test_a_cpu_runs_modules(calls):
    assert fused_stage.kernels_for(torch.empty(2, 4, 8, 8, memory_format=torch.channels_last)) is None
    forms.build("hbnet18")(forms.images())
    assert calls == []


def test_small_iterates_run_as_modules(calls, monkeypatch):
    """A launch of ours takes the host longer than one of torch's; recomputation pays at every size."""
    with forms.fused_kernels():
        monkeypatch.setattr(fused, "WORTHWHILE", 2**25)
        forms.build("hbnet18")(forms.images())
        assert calls == []
        monkeypatch.setattr(fused, "WORTHWHILE", 3 * 8 * 9 * 9)  # batch, channels and pixels of the first stage
        forms.build("hbnet18")(forms.images())
        assert calls == ["fused_stage"]
        calls.clear()
        monkeypatch.setattr(fused, "WORTHWHILE", 2**25)
        forms.build("hbnet18, checkpointing")(forms.images())
        assert len(calls) == 4


def saved_bytes(net, x):
    """Return the bytes of the distinct tensors that a forward pass saves."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    parameters = {p.untyped_storage()._cdata for p in net.parameters()}
    return sum(size for key, size in sizes.items() if key not in parameters)


def test_each_form_saves_less():
    x = torch.randn(2, 3, 32, 32)
    sizes = []
    for memory, checkpointing in (("stored", False), ("stored", True), ("reversible", False)):
        net = timm.create_model("hbnet56", memory=memory).train()
        net.set_grad_checkpointing(checkpointing)
        with forms.fused_kernels():
            sizes.append(saved_bytes(net, x))
    everything, narrow, nothing = sizes
    # A basic transform of two convolutions saves one of its iterate and four of its own; narrow keeps one of these.
    assert narrow < 0.35 * everything
    assert nothing < 0.2 * everything


def gradient(name, dtype, amp, **options):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=7, **{k: v for k, v in options.items() if k != "checkpointing"})
    net.to(dtype).train().set_grad_checkpointing(options.get("checkpointing", False))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = net(x)
    F.cross_entropy(logits.to(dtype), torch.arange(4)).backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters()])


@pytest.mark.parametrize(
    "options", [{}, {"checkpointing": True}, {"memory": "reversible"}], ids=["stored", "checkpointing", "reversible"]
)
def test_half_precision_is_as_good_as_module_by_module(options, recwarn):
    exact = gradient("hbnet56", torch.float64, False, init_last=1 / 3)
    plain = gradient("hbnet56", torch.float32, True, init_last=1 / 3)
    with forms.fused_kernels():
        found = gradient("hbnet56", torch.float32, True, init_last=1 / 3, **options)
    ours, modules = (1 - F.cosine_similarity(g, exact, dim=0).item() for g in (found, plain))
    assert ours < 1.3 * modules + 1e-3  # 0.013 to 0.015 against 0.0175
    assert not [w for w in recwarn if "recovered" in str(w.message)]


@pytest.mark.parametrize("steps", [18, 36])
def test_rounding_errors_of_recovered_iterates_do_not_grow(steps):
    """The last two iterates are rounded once; the low parts keep all other digits."""
    generator = torch.Generator().manual_seed(0)
    T = [torch.randn(2, 4, 8, 8, generator=generator).bfloat16() for _ in range(steps)]
    x_prev, x = (channel_kernels.Iterate(torch.randn(2, 4, 8, 8, generator=generator).bfloat16()) for _ in range(2))
    first = x.high.double()
    for t in T:
        x_prev, x = x, channel_kernels.add([1.0, 1.0, -1.0], t, None, x, x_prev, wide=True)
    above, x = channel_kernels.Iterate(x.high), channel_kernels.Iterate(x_prev.high)
    for t in reversed(T):
        above, x = x, channel_kernels.add([1.0, 1.0, -1.0], t, None, x, above, wide=True)
    assert (above.high.double() - first).norm() < 0.01 * first.norm()


def test_a_missing_triton_means_modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "optinspired_plugins.memory.triton_kernels", None)
    assert fused_stage._triton_kernels.__wrapped__() is None


def test_an_old_triton_means_modules(monkeypatch):
    """The interpreter of Triton 3.1 gives wrong sums."""
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.1.0")
    monkeypatch.delitem(sys.modules, "optinspired_plugins.memory.triton_kernels", raising=False)
    with pytest.raises(ImportError, match=r"triton 3\.1\.0: must be 3.2 or newer"):
        importlib.import_module("optinspired_plugins.memory.triton_kernels")
    assert fused_stage._triton_kernels.__wrapped__() is None


def test_places_of_alpha():
    """Channels of z_0, then of each later source, for every layer."""
    places = fused_block._place_of_alpha(3, 2, 3, torch.device("cpu"))
    assert places.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("form", ["hbnet18, fused", "hbnet50, fused, reversible", "agdnet121, fused"])
def test_one_value_per_channel_has_no_statistics(form):
    """As in torch's batch normalisation, before running statistics become infinite."""
    model = forms.build(form)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module in model.modules():
        if isinstance(module, (heavy_ball.HeavyBallStage, nesterov.NesterovBlock)):
            channels = next(p for p in module.parameters() if p.dim() == 4).shape[1]
            with pytest.raises(ValueError, match="more than one value"):
                module(torch.randn(1, channels, 1, 1, dtype=torch.float64))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
