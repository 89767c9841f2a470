"""Table 6: the function of each candidate operation, and the size of its output."""

import pytest
import torch
from torch import nn

from optinspired_plugins.cells.operations import (
    DARTS_OPERATIONS,
    OPERATIONS,
    TABLE_6,
    FactorizedReduce,
    NegativeIdentity,
    make_operation,
)


def images(size=8, channels=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=generator)


def build(name, stride=1, channels=4, **kwargs):
    torch.manual_seed(0)
    return make_operation(name, channels, stride, **kwargs).double().eval()


def test_table_6_is_the_eight_of_darts_and_the_negative_identity():
    assert len(TABLE_6) == 9
    assert set(TABLE_6) - set(DARTS_OPERATIONS) == {"neg_skip_connect"}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(("stride", "sizes"), [(1, {7: 7, 8: 8}), (2, {7: 4, 8: 4})])
def test_sizes_are_kept_or_halved_upwards(name, size, stride, sizes):
    assert build(name, stride)(images(size)).shape == (2, 4, sizes[size], sizes[size])


def test_identities_and_zero_are_exact():
    x = images()
    assert torch.equal(build("skip_connect")(x), x)
    assert torch.equal(build("neg_skip_connect")(x), -x)
    assert not build("none")(torch.full_like(x, float("inf"))).any()
    assert not build("none", 2)(torch.full_like(x, float("nan"))).any()


def test_the_negative_identity_of_stride_2_is_the_negative_of_a_reduction():
    op, x = build("neg_skip_connect", 2), images()
    assert isinstance(op, NegativeIdentity)
    torch.testing.assert_close(op(x), -op.shortcut(x))
    assert sum(p.numel() for p in op.parameters()) == sum(p.numel() for p in build("skip_connect", 2).parameters()) > 0


@pytest.mark.parametrize("size", [7, 8])
def test_a_factorised_reduction_reads_even_and_odd_pixels(size):
    reduce, x = FactorizedReduce(4, 6).double().eval(), images(size)
    y, scale = torch.relu(x), (1 + reduce.bn.eps) ** -0.5
    even = nn.functional.conv2d(y[:, :, ::2, ::2], reduce.conv_1.weight) * scale
    odd = nn.functional.conv2d(y[:, :, 1::2, 1::2], reduce.conv_2.weight) * scale
    out, side = reduce(x), odd.shape[-1]
    torch.testing.assert_close(out[:, :3], even)
    torch.testing.assert_close(out[:, 3:, :side, :side], odd)
    assert not out[:, 3:, side:].any()


def plain_separable(op, x, kernel, stride, dilation, repeats):
    convs = [m for m in op.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    for i in range(repeats):
        depth, point = convs[2 * i : 2 * i + 2]
        pad = dilation * (kernel - 1) // 2
        x = nn.functional.conv2d(torch.relu(x), depth.weight, None, stride if i == 0 else 1, pad, dilation, x.shape[1])
        x = norms[i](nn.functional.conv2d(x, point.weight))
    return x


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("name", "kernel", "dilation", "repeats"),
    [("sep_conv_3x3", 3, 1, 2), ("sep_conv_5x5", 5, 1, 2), ("dil_conv_3x3", 3, 2, 1), ("dil_conv_5x5", 5, 2, 1)],
)
def test_separable_and_dilated_convolutions(name, kernel, dilation, repeats, stride):
    op, x = build(name, stride), images()
    torch.testing.assert_close(op(x), plain_separable(op, x, kernel, stride, dilation, repeats))
    assert sum(p.numel() for p in op.parameters()) == repeats * (4 * kernel**2 + 16 + 8)


def test_the_average_leaves_padding_out():
    assert torch.equal(build("avg_pool_3x3")(torch.ones_like(images())), torch.ones_like(images()))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_supernets_operations_have_no_scale_of_their_own(name, stride):
    op = make_operation(name, 4, stride, affine=False, norm_after_pooling=True)
    norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.weight is None for m in norms)
    assert bool(norms) == (name != "none" and (stride == 2 or name not in ("skip_connect", "neg_skip_connect")))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in make_operation("max_pool_3x3", 4, 1).modules())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="operation='conv_7x7': must be one of none, max_pool_3x3"):
        make_operation("conv_7x7", 4, 1)
    with pytest.raises(ValueError, match="stride=3: must be 1 or 2"):
        make_operation("none", 4, 3)
