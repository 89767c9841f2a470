"""What users of timm and torch expect of a model: compile, export, precision, layouts, optimiser groups, EMA, DDP."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from equality import assert_close_in_norm, randomise
from extras import needs, needs_version
from packaging.version import Version
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from optinspired_plugins import Genotype

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Rule (23) with every operation of Table 6 but zero.
HB_GENOTYPE = Genotype(
    "hb",
    [
        [("sep_conv_3x3", 1), ("skip_connect", 1), ("neg_skip_connect", 0)],
        [("dil_conv_5x5", 2), ("max_pool_3x3", 2), ("avg_pool_3x3", 1)],
    ],
    [
        [("neg_skip_connect", 1), ("skip_connect", 1), ("sep_conv_5x5", 0)],
        [("dil_conv_3x3", 2), ("avg_pool_3x3", 2), ("max_pool_3x3", 1)],
    ],
)
SMALL = {
    "hbnet20": {},
    "hbnet20-learned": dict(learn_beta=True),
    "hbnet18": {},
    "optnet20": dict(algorithm="admm"),
    "optnet18-agd": dict(algorithm="agd"),
    "agdnet40_k12": dict(block_config=(2, 3, 2)),
    "cellnet_cifar": dict(cells=4, channels=4),
    "cellnet_cifar-hb": dict(cells=3, channels=4, genotype=HB_GENOTYPE),
    "cellnet_imagenet": dict(cells=3, channels=4, genotype="p_darts"),
    "agdnet121": dict(block_config=(2, 2, 2, 2), growth_rate=8),
}
small_models = pytest.mark.parametrize("case", SMALL)
devices = pytest.mark.parametrize("device", DEVICES)


def build(case, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(case.partition("-")[0], **{"num_classes": 7, **SMALL[case], **kwargs})
    return randomise(model.cpu()).to(kwargs.get("device", "cpu"))


def images(case, batch=2, chans=3, device="cpu", dtype=torch.float32):
    size = 32 if case.startswith(("hbnet20", "optnet20", "agdnet40", "cellnet_cifar")) else 64
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def gradients(model, x):
    model.zero_grad()
    model(x).float().square().mean().backward()
    return {n: p.grad.clone() for n, p in getattr(model, "module", model).named_parameters()}


def assert_same_gradients(got, expected, tolerance):
    floor = 1e-3 * max(g.norm().item() for g in expected.values())
    for name, gradient in expected.items():
        assert_close_in_norm(got[name], gradient, tolerance, name, floor)


# --- compilers and exporters ------------------------------------------------------------------------------------------


@devices
@small_models
def test_compiles_into_one_graph(case, device):
    if case == "optnet18-agd" and Version(torch.__version__) < Version("2.14.1"):
        pytest.skip(f"torch {torch.__version__} cannot compile an assignment to a list's item: 2.14.1 can")
    model, x = build(case).to(device).train(), images(case, device=device)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    out = compiled(x)
    out.square().mean().backward()
    got = {n: p.grad for n, p in compiled._orig_mod.named_parameters()}
    torch.testing.assert_close(out, copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)
    assert_same_gradients(got, gradients(model, x), 1e-4)


@pytest.mark.slow
@devices
@pytest.mark.parametrize(
    ("case", "depth"), [("hbnet20-learned", dict(layers=(2, 1, 1))), ("agdnet40_k12", dict(block_config=(2, 1)))]
)
def test_compiles_with_inductor(case, depth, device):
    model, x = build(case, **depth).to(device).eval(), images(case, device=device)
    compiled = torch.compile(model)
    out = compiled(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert_same_gradients(got, gradients(model, x), 1e-3)


@small_models
def test_exports_with_a_dynamic_batch(case):
    model = build(case).eval()
    batch = {0: torch.export.Dim("batch", min=2, max=16)}
    exported = torch.export.export(model, (images(case),), dynamic_shapes=(batch,))
    x = images(case, batch=5)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@small_models
def test_onnxruntime_agrees(case, tmp_path):
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    model, x = build(case).eval(), images(case)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, external_data=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@small_models
def test_scripts_with_torchscript(case):
    model, x = build(case).eval(), images(case)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


# --- layouts, precision, inputs ---------------------------------------------------------------------------------------


@devices
@small_models
def test_channels_last_computes_the_same_and_stays_channels_last(case, device):
    model, x = build(case).to(device, dtype=torch.float64).eval(), images(case, device=device, dtype=torch.float64)
    expected = model(x)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)


@devices
@small_models
def test_bf16_autocast_trains(case, device):
    model, x = build(case).to(device).train(), images(case, batch=4, device=device)
    full = copy.deepcopy(model)(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        features = model.forward_features(x)
        out = model.forward_head(features)
        loss = out.float().square().mean()
    # The features too: the classifier casts whatever a float32 coefficient may have promoted on the way.
    assert features.dtype == out.dtype == torch.bfloat16
    assert_close_in_norm(out.float(), full, 0.1, "output")
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("chans", [1, 4])
@small_models
def test_other_numbers_of_input_channels(case, chans):
    model = build(case, in_chans=chans)
    if Version(timm.__version__) >= Version("1.0.31"):  # 1.0.22 does not keep it
        assert model.in_chans == chans
    assert model(images(case, chans=chans)).shape == (2, 7)


def dilations(model):
    return [m.dilation for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["hbnet18", "hbnet50"])
def test_output_stride_keeps_resolution(name, output_stride):
    kwargs = dict(output_stride=output_stride, features_only=True)
    model = timm.create_model(name, layers=(2, 2, 2, 2), **kwargs).eval()
    assert max(model.feature_info.reduction()) == output_stride
    maps = model(torch.randn(1, 3, 96, 64))
    sizes = [(96 // r, 64 // r) for r in model.feature_info.reduction()]
    assert [tuple(m.shape[-2:]) for m in maps] == sizes
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    resnet = timm.create_model(name.replace("hbnet", "resnet"), layers=(2, 2, 2, 2), output_stride=output_stride)
    assert dilations(model) == dilations(resnet)


dense_features = needs_version("timm", "1.0.31", "has no forward_intermediates in DenseNet")


@pytest.mark.parametrize(
    ("case", "reductions", "channels"),
    [
        ("hbnet20", [1, 1, 2, 4], [16, 16, 32, 64]),
        ("hbnet18", [2, 4, 8, 16, 32], [64, 64, 128, 256, 512]),
        pytest.param("agdnet40_k12", [1, 1, 2, 4], [16, 40, 76, 100], marks=dense_features),
        pytest.param("agdnet121", [2, 4, 8, 16, 32], [16, 32, 32, 32, 32], marks=dense_features),
        ("optnet20", [1, 1, 2, 4], [16, 16, 32, 64]),
        ("cellnet_cifar", [1, 1, 2, 4], [12, 16, 32, 64]),
        ("cellnet_imagenet", [4, 8, 16, 32], [4, 16, 32, 64]),
    ],
)
def test_features_are_those_of_the_whole_model(case, reductions, channels):
    model, x = build(case).eval(), images(case)
    features = build(case, features_only=True, num_classes=0).eval()
    assert features.feature_info.reduction() == reductions
    assert features.feature_info.channels() == channels
    names = ("", "model.") if case.startswith("cellnet") else ("features.", "features_")
    state = {name.replace(*names, 1): value for name, value in model.state_dict().items()}
    features.load_state_dict({name: state[name] for name in features.state_dict()})
    expected = model.forward_intermediates(x, intermediates_only=True)
    for got, want in zip(features(x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected[-1], model.forward_features(x), rtol=1e-5, atol=1e-5)
    last_two = build(case, features_only=True, num_classes=0, out_indices=(-2, -1)).eval()
    assert [f.shape[1] for f in last_two(x)] == channels[-2:]


def test_the_cifar_net_names_a_wrong_feature_index():
    model = timm.create_model("hbnet20")
    with pytest.raises(ValueError, match=r"indices=\[4\]: must be integers from -4 to 3"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[4])
    with pytest.raises(ValueError, match=r"output_fmt='NLC': must be one of 'NCHW'"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")


# --- optimisers, averages, checkpoints --------------------------------------------------------------------------------


def is_coefficient(name):
    return name.rpartition(".")[2] in ("alpha", "beta1", "beta2")


spares_named = needs_version("timm", "1.0.31", "asks no model what to spare without its filter")


@pytest.mark.parametrize("filter_1d", [True, pytest.param(False, marks=spares_named)])
@pytest.mark.parametrize("case", ["hbnet20-learned", "agdnet40_k12"])
def test_weight_decay_leaves_coefficients_alone(case, filter_1d):
    model = build(case)
    coefficients = {id(p) for n, p in model.named_parameters() if is_coefficient(n)}
    assert coefficients
    named = {n for n, _ in model.named_parameters() if is_coefficient(n)}
    assert model.no_weight_decay() == named
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05, filter_bias_and_bn=filter_1d)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in coefficients:
                assert group["weight_decay"] == 0
            elif p.ndim > 1:
                assert group["weight_decay"] == 0.05


def learning_rate_scales(model):
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.7)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    return {n: scales[id(p)] for n, p in model.named_parameters()}


def test_layer_decay_treats_coefficients_as_their_stage():
    hb = learning_rate_scales(build("hbnet20-learned"))
    assert hb["layer1.beta1"] == hb["layer1.2.conv1.weight"]
    assert hb["layer1.beta1"] < hb["layer2.0.conv1.weight"] < hb["layer2.beta2"] < hb["layer3.beta2"] < hb["fc.weight"]
    agd = learning_rate_scales(build("agdnet40_k12"))
    layer = "features.denseblock2.denselayer2."
    assert agd[layer + "alpha"] == agd[layer + "conv1.weight"] < agd["classifier.weight"]


@small_models
def test_ema_follows(case):
    model = build(case)
    ema = ModelEmaV3(model, decay=0.9)
    before = {n: p.clone() for n, p in ema.module.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    after = ema.module.state_dict()
    for name, p in model.named_parameters():
        torch.testing.assert_close(after[name], before[name] * 0.9 + p * 0.1, rtol=1e-5, atol=1e-5)


@small_models
def test_checkpoints_and_copies_hold_everything(case, tmp_path):
    model, x = build(case).eval(), images(case)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(
        case.partition("-")[0], num_classes=7, **SMALL[case], checkpoint_path=tmp_path / "model.safetensors"
    )
    for other in (loaded.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


@small_models
def test_device_and_dtype_arguments_reach_every_tensor(case):
    model = timm.create_model(case.partition("-")[0], **SMALL[case], device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.5])
@small_models
def test_dropout_precedes_the_classifier_in_training_only(case, rate):
    model, x = build(case, drop_rate=rate).eval(), images(case)
    features, expected = model.forward_features(x), model(x)
    # The head holds no normalisation: only dropout tells training from evaluation.
    assert torch.equal(model.train().forward_head(features), expected) == (rate == 0)


@small_models
def test_the_classifier_can_be_left_out_and_put_back(case):
    model, x = build(case, num_classes=0).eval(), images(case)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(3, "max")
    assert model.get_classifier().out_features == model.num_classes == 3
    torch.testing.assert_close(model(x), model.get_classifier()(features.amax((2, 3))))


@pytest.mark.parametrize("case", ["hbnet20", "hbnet18", "optnet20", "cellnet_cifar-hb"])
def test_drop_path_drops_transforms_in_training_only(case):
    model = build(case, drop_path_rate=0.5)
    x = images(case, batch=8)
    model.eval()
    assert torch.equal(model(x), model(x))
    for module in model.modules():  # statistics of the running averages, so that only drop path is random
        if isinstance(module, timm.layers.DropPath):
            module.train()
    assert not torch.equal(model(x), model(x))


def bytes_kept_for_backward(model, x):
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)  # held, so that no address is used twice
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(
    ("case", "depth"),
    [
        ("hbnet20", {}),
        ("optnet20", {}),
        ("agdnet40_k12", dict(block_config=(12, 12, 12), bn_size=4)),
        ("cellnet_cifar", {}),
    ],
)
def test_checkpointing_can_be_switched_on_and_off(case, depth):
    model, x = build(case, **depth).train(), images(case)
    stored = bytes_kept_for_backward(model, x)
    model.set_grad_checkpointing()
    # AGDNet stores little anyway, and without a bottleneck nothing that could be computed again.
    assert bytes_kept_for_backward(model, x) < (1 if case.startswith("agd") else 0.5) * stored
    model.set_grad_checkpointing(False)
    assert bytes_kept_for_backward(model, x) == stored


@devices
@pytest.mark.parametrize("case", ["optnet20", "agdnet40_k12", "cellnet_cifar-hb"])  # HBNet: tests/test_memory.py
def test_checkpointing_under_autocast_and_drop_path_replays(case, device):
    rate = {"proj_drop_rate": 0.3} if case.startswith("agd") else {"drop_path_rate": 0.3}
    model, x = build(case, **rate).to(device).train(), images(case, device=device)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        with torch.autocast(device, dtype=torch.bfloat16):
            results.append(gradients(copy.deepcopy(model), x))
    assert_same_gradients(results[1], results[0], 1e-2)


# --- distributed ------------------------------------------------------------------------------------------------------


def _ddp_step(rank, case, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build(case, dtype=torch.float64).eval()  # eval: the statistics of a half batch are not the whole's
    x = images(case, batch=4, dtype=torch.float64).chunk(2)[rank]
    got = gradients(DistributedDataParallel(model), x)
    torch.save(got, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hbnet20", "hbnet20-learned", "agdnet40_k12"])
def test_two_processes_give_the_gradients_of_one(case, tmp_path):
    mp.spawn(_ddp_step, args=(case, tmp_path), nprocs=2)
    model = build(case, dtype=torch.float64).eval()
    expected = gradients(model, images(case, batch=4, dtype=torch.float64))
    for rank in (0, 1):
        assert_same_gradients(torch.load(tmp_path / f"{rank}.pt"), expected, 1e-6)
