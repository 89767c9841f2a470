"""The stride of 1×1 convolutions, taken before them: the same function, and only where it is one stride."""

import copy

import pytest
import timm
import torch
from equality import output_and_gradients, put_strides_back, randomise
from torch import nn

from timm_models.strides import pull_out_stride, subsample

SMALL = dict(layers=(1, 2, 1, 2), channels=(8, 12, 16, 20), num_classes=3)


@pytest.mark.parametrize("size", [64, 57])
@pytest.mark.parametrize(
    "options", [{}, dict(memory="reversible"), dict(output_stride=8), dict(learn_beta=True)], ids=str
)
def test_it_is_the_same_function(options, size):
    torch.manual_seed(0)
    ours = randomise(timm.create_model("hbnet50", **SMALL, **options).double()).train()
    assert [stage.stride for stage in ours.stages()] == ([1, 2, 1, 1] if "output_stride" in options else [1, 2, 2, 2])
    twin, x = put_strides_back(copy.deepcopy(ours)), torch.randn(2, 3, size, size, dtype=torch.float64)
    expected, got = output_and_gradients(twin, x), output_and_gradients(ours, x)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [64, 57])
@pytest.mark.parametrize("algorithm", ["admm", "dmrnet", "hb"])
def test_it_is_the_same_function_with_several_layers_a_step(algorithm, size):
    torch.manual_seed(0)
    ours = randomise(timm.create_model("optnet50", **SMALL, algorithm=algorithm).double()).train()
    assert [stage.stride for stage in ours.stages()] == [1, 2, 2, 2]
    twin, x = put_strides_back(copy.deepcopy(ours)), torch.randn(2, 3, size, size, dtype=torch.float64)
    expected, got = output_and_gradients(twin, x), output_and_gradients(ours, x)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["hbnet50", "optnet50"])
def test_it_is_the_same_function_fused(name):
    ours = randomise(timm.create_model(name, num_classes=3).double()).eval()
    twin, x = put_strides_back(copy.deepcopy(ours)), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = twin(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.fuse()(x), expected, rtol=1e-9, atol=1e-9)


def test_a_fused_stage_computes_what_the_next_one_reads():
    """A quarter of its last pixels; all of them where somebody looks at its output."""
    model = randomise(timm.create_model("hbnet50", num_classes=3).double()).eval().fuse()
    sizes, x = [], torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for stage in model.stages():
        stage.mixes[-1].register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    expected = model(x)
    assert sizes == [8, 4, 2, 2]
    features, intermediates = model.forward_intermediates(x)
    assert [y.shape[-1] for y in intermediates[1:]] == [16, 8, 4, 2]
    torch.testing.assert_close(model.forward_head(features), expected, rtol=1e-9, atol=1e-9)
    sizes.clear()
    stem = []
    model.act1.register_forward_hook(lambda module, args, output: stem.append(output.shape[-1]))
    model.layer2.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert sizes == [16, 8, 2, 2]
    assert stem == [32]


def test_nothing_of_the_input_is_kept_but_what_is_read():
    """A stage of stride 2 keeps a quarter of its input for the backward pass."""
    stage, u = timm.create_model("hbnet50", **SMALL).layer2, torch.randn(1, 32, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stage(u)
    assert not any(t.untyped_storage().nbytes() == u.untyped_storage().nbytes() for t in kept)


@pytest.mark.parametrize(
    "options",
    [dict(stride_in_1x1=False), dict(avg_down=True), dict(stride_in_1x1=False, aa_layer=nn.AvgPool2d)],
    ids=str,
)
def test_other_strides_stay(options):
    model = timm.create_model("hbnet50", **SMALL, **options)
    assert [stage.stride for stage in model.stages()] == [1, 1, 1, 1]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert [stage.stride for stage in timm.create_model("hbnet18").stages()] == [1, 1, 1, 1]


def test_a_stage_of_two_strides_stays():
    blocks = [timm.create_model("hbnet50", **SMALL).layer1[0] for _ in range(2)]
    for block, stride in zip(blocks, (2, 3)):
        block.conv1.stride = block.downsample[0].stride = (stride, stride)
    assert pull_out_stride(blocks) == 1
    assert blocks[0].conv1.stride == (2, 2)
    blocks[1].conv1.stride = blocks[1].downsample[0].stride = (2, 2)
    assert pull_out_stride(blocks) == 2
    assert blocks[1].downsample[0].stride == (1, 1)


def test_layouts_are_kept():
    x = torch.randn(2, 5, 7, 7).to(memory_format=torch.channels_last)
    assert subsample(x, 2).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(subsample(x, 2), nn.functional.max_pool2d(x, 1, 2))
    assert subsample(x, 1) is x
