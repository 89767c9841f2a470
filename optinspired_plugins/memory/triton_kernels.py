"""The functions of :mod:`optinspired_plugins.memory.channel_kernels` for a GPU, as Triton kernels.

They take images in channels-last layout, in float16, bfloat16 or float32. An input may be a slice of the channels of
wider images. Sums are made in a fixed order, so that results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_kernels import Iterate, RunningStatistics

__all__ = ["add", "dots", "gradient_of_input", "gradient_sums", "normalization", "rectified"]

_TILE = 4096  # elements per step of a program
_PROGRAMS = 528  # four per multiprocessor of an H100


class _Grid(NamedTuple):
    """A division of images, as a matrix of pixels × channels, into blocks."""

    pixels: int
    channels: int
    block_pixels: int
    block_channels: int
    parts: int  # programs that share the pixels
    share: int  # pixels per program

    @property
    def size(self) -> tuple[int, int]:
        return self.parts, triton.cdiv(self.channels, self.block_channels)

    @property
    def blocks(self) -> dict[str, int]:
        return dict(BLOCK_R=self.block_pixels, BLOCK_C=self.block_channels)


def _grid(x: Tensor, programs: int | None = None) -> _Grid:
    """Return a division into tiles, or into parts for about this number of programs."""
    channels = x.shape[1]
    pixels = x.numel() // channels
    block_channels = min(64, triton.next_power_of_2(channels))
    block_pixels = _TILE // block_channels
    columns = triton.cdiv(channels, block_channels)
    tiles = triton.cdiv(pixels, block_pixels)
    parts = tiles if programs is None else max(1, min(tiles, programs // columns))
    share = triton.cdiv(tiles, parts) * block_pixels
    return _Grid(pixels, channels, block_pixels, block_channels, triton.cdiv(pixels, share), share)


def _stride(x: Tensor) -> int:
    """Return the distance between neighbouring pixels in memory."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- statistics -------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(x, means, squares, R, C, S, share, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel over the pixels of one program."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    start = part * share
    end = tl.minimum(start + share, R)
    # Deviations from the first pixel: squares of the values themselves would lose digits.
    origin = tl.load(x + start.to(tl.int64) * S + columns, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        inside = (rows < end)[:, None] & valid[None, :]
        value = tl.load(x + rows[:, None].to(tl.int64) * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - origin[None, :], 0.0)
        total += value
        square += value * value
    count = (end - start).to(tl.float32)
    deviation = tl.sum(total, 0) / count
    tl.store(means + part * C + columns, origin + deviation, mask=valid)
    tl.store(squares + part * C + columns, tl.sum(square, 0) - count * deviation * deviation, mask=valid)


@triton.jit
def _affine_kernel(
    means, squares, weight, bias, affine, running_mean, running_var,
    R, C, share, parts, eps, momentum, TRACK: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of all parts, the affine map, and the update of running statistics."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & valid[None, :]
    place = part[:, None] * C + columns[None, :]
    mean_of = tl.load(means + place, mask=inside, other=0.0)
    count = tl.where(part < parts, tl.minimum(share, R - part * share), 0).to(tl.float32)[:, None]
    mean = tl.sum(mean_of * count, 0) / R
    deviation = tl.where(inside, mean_of - mean[None, :], 0.0)
    var = tl.sum(tl.load(squares + place, mask=inside, other=0.0) + count * deviation * deviation, 0) / R
    var = tl.maximum(var, 0.0)
    inverse_std = 1.0 / tl.sqrt(var + eps)
    scale = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32) * inverse_std
    shift = tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32) - mean * scale
    tl.store(affine + columns, scale, mask=valid)
    tl.store(affine + C + columns, shift, mask=valid)
    tl.store(affine + 2 * C + columns, mean, mask=valid)
    tl.store(affine + 3 * C + columns, inverse_std, mask=valid)
    if TRACK:
        old = tl.load(running_mean + columns, mask=valid, other=0.0).to(tl.float32)
        tl.store(running_mean + columns, old + momentum * (mean - old), mask=valid)
        old = tl.load(running_var + columns, mask=valid, other=0.0).to(tl.float32)
        tl.store(running_var + columns, old + momentum * (var * (R / (R - 1)) - old), mask=valid)


def normalization(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """See :func:`.channel_kernels.normalization`."""
    grid = _grid(x, _PROGRAMS)
    means, squares = torch.empty(2, grid.parts, grid.channels, dtype=torch.float32, device=x.device)
    _statistics_kernel[grid.size](
        x, means, squares, grid.pixels, grid.channels, _stride(x), grid.share, **grid.blocks, num_warps=8
    )
    affine = torch.empty(4, grid.channels, dtype=torch.float32, device=x.device)
    mean, var, momentum = running or RunningStatistics(affine, affine, 0.0)
    _affine_kernel[(triton.cdiv(grid.channels, 16),)](
        means, squares, weight, bias, affine, mean, var, grid.pixels, grid.channels, grid.share, grid.parts,
        eps, momentum, TRACK=running is not None, PARTS=triton.next_power_of_2(grid.parts), BLOCK_C=16,
    )  # fmt: skip
    return affine


# --- elementwise ------------------------------------------------------------------------------------------------------


@triton.jit
def _rectified_kernel(x, affine, out, R, C, S, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rectified map: max(a x + b, 0)."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    inside = (rows < R) & valid[None, :]
    scale = tl.load(affine + columns, mask=valid, other=0.0)[None, :]
    shift = tl.load(affine + C + columns, mask=valid, other=0.0)[None, :]
    value = tl.load(x + rows * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rows * C + columns[None, :], tl.maximum(scale * value + shift, 0.0), mask=inside)


def rectified(x: Tensor, affine: Tensor) -> Tensor:
    """See :func:`.channel_kernels.rectified`."""
    grid, out = _grid(x), _like(x)
    _rectified_kernel[grid.size](x, affine, out, grid.pixels, grid.channels, _stride(x), **grid.blocks, num_warps=8)
    return out


@triton.jit
def _load_iterate(high, low, place, inside, WIDE: tl.constexpr):
    value = tl.load(high + place, mask=inside, other=0.0).to(tl.float32)
    if WIDE:
        value += tl.load(low + place, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _add_kernel(
    x, affine, p, p_low, q, q_low, out, out_low, factors, f0, f1, f2, R, C, S,
    AFFINE: tl.constexpr, ITERATES: tl.constexpr, P_WIDE: tl.constexpr, Q_WIDE: tl.constexpr, WIDE: tl.constexpr,
    LEARNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum f_0 (a x + b) + f_1 p + f_2 q."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    inside = (rows < R) & valid[None, :]
    place = rows * C + columns[None, :]
    if LEARNED:
        f0 = tl.load(factors)
    value = tl.load(x + rows * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if AFFINE:
        scale = tl.load(affine + columns, mask=valid, other=0.0)[None, :]
        shift = tl.load(affine + C + columns, mask=valid, other=0.0)[None, :]
        value = scale * value + shift
    total = f0 * value
    if ITERATES > 0:
        if LEARNED:
            f1 = tl.load(factors + 1)
        total += f1 * _load_iterate(p, p_low, place, inside, P_WIDE)
    if ITERATES > 1:
        if LEARNED:
            f2 = tl.load(factors + 2)
        total += f2 * _load_iterate(q, q_low, place, inside, Q_WIDE)
    high = total.to(out.dtype.element_ty)
    tl.store(out + place, high, mask=inside)
    if WIDE:
        tl.store(out_low + place, total - high.to(tl.float32), mask=inside)


def add(
    factors: Sequence[float] | Tensor, x: Tensor, affine: Tensor | None, *iterates: Iterate, wide: bool = False
) -> Iterate:
    """See :func:`.channel_kernels.add`."""
    grid, out = _grid(x), _like(x)
    low = _like(x) if wide and x.dtype != torch.float32 else None
    learned = isinstance(factors, Tensor)
    numbers = [1.0] * 3 if learned else [*map(float, factors), 0.0, 0.0][:3]
    p, q = ([*iterates] + [Iterate(x)] * 2)[:2]
    _add_kernel[grid.size](
        x, x if affine is None else affine, p.high, _or(p.low, x), q.high, _or(q.low, x), out, _or(low, x),
        factors if learned else x, *numbers, grid.pixels, grid.channels, _stride(x), AFFINE=affine is not None,
        ITERATES=len(iterates), P_WIDE=p.low is not None, Q_WIDE=q.low is not None, WIDE=low is not None,
        LEARNED=learned, **grid.blocks, num_warps=8,
    )  # fmt: skip
    return Iterate(out, low)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """Return x, or a pointer that is not read."""
    return other if x is None else x


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _sums_kernel(
    g, x, affine, sums, R, C, GS, S, share, parts, RECTIFY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Σ m g and Σ m g (x − mean) of every channel over the pixels of one program."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    scale = tl.load(affine + columns, mask=valid, other=0.0)[None, :]
    shift = tl.load(affine + C + columns, mask=valid, other=0.0)[None, :]
    mean = tl.load(affine + 2 * C + columns, mask=valid, other=0.0)[None, :]
    start = part * share
    end = tl.minimum(start + share, R)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_R):
        rows = (first + tl.arange(0, BLOCK_R))[:, None]
        inside = (rows < end) & valid[None, :]
        value = tl.load(x + rows.to(tl.int64) * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(g + rows.to(tl.int64) * GS + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if RECTIFY:
            gradient = tl.where(scale * value + shift > 0, gradient, 0.0)
        total += gradient
        product += gradient * (value - mean)
    tl.store(sums + part * C + columns, tl.sum(total, 0), mask=valid)
    tl.store(sums + (parts + part) * C + columns, tl.sum(product, 0), mask=valid)


@triton.jit
def _coefficients_kernel(
    sums, affine, out, R, C, parts, THROUGH: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The gradients of weight and bias, and c and d of the gradient of x."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & valid[None, :]
    place = part[:, None] * C + columns[None, :]
    total = tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0)
    product = tl.sum(tl.load(sums + parts * C + place, mask=inside, other=0.0), 0)
    scale = tl.load(affine + columns, mask=valid, other=0.0)
    mean = tl.load(affine + 2 * C + columns, mask=valid, other=0.0)
    inverse_std = tl.load(affine + 3 * C + columns, mask=valid, other=0.0)
    tl.store(out + columns, product * inverse_std, mask=valid)
    tl.store(out + C + columns, total, mask=valid)
    c = tl.zeros([BLOCK_C], tl.float32)
    d = tl.zeros([BLOCK_C], tl.float32)
    if THROUGH:
        c = -scale * inverse_std * inverse_std * product / R
        d = -scale * total / R - c * mean
    tl.store(out + 2 * C + columns, c, mask=valid)
    tl.store(out + 3 * C + columns, d, mask=valid)


def gradient_sums(g: Tensor, x: Tensor, affine: Tensor, rectify: bool, through_statistics: bool) -> tuple[Any, ...]:
    """See :func:`.channel_kernels.gradient_sums`."""
    grid = _grid(x, _PROGRAMS)
    sums = torch.empty(2, grid.parts, grid.channels, dtype=torch.float32, device=x.device)
    _sums_kernel[grid.size](
        g, x, affine, sums, grid.pixels, grid.channels, _stride(g), _stride(x), grid.share, grid.parts,
        RECTIFY=rectify, **grid.blocks, num_warps=8,
    )  # fmt: skip
    out = torch.empty(4, grid.channels, dtype=torch.float32, device=x.device)
    _coefficients_kernel[(triton.cdiv(grid.channels, 16),)](
        sums, affine, out, grid.pixels, grid.channels, grid.parts, THROUGH=through_statistics,
        PARTS=triton.next_power_of_2(grid.parts), BLOCK_C=16,
    )  # fmt: skip
    return out[0], out[1], out[2:]


@triton.jit
def _input_kernel(
    g, x, affine, coefficients, out, R, C, GS, S, RECTIFY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The gradient of x: a m g + c x + d."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    inside = (rows < R) & valid[None, :]
    scale = tl.load(affine + columns, mask=valid, other=0.0)[None, :]
    shift = tl.load(affine + C + columns, mask=valid, other=0.0)[None, :]
    c = tl.load(coefficients + columns, mask=valid, other=0.0)[None, :]
    d = tl.load(coefficients + C + columns, mask=valid, other=0.0)[None, :]
    value = tl.load(x + rows * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + rows * GS + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if RECTIFY:
        gradient = tl.where(scale * value + shift > 0, gradient, 0.0)
    tl.store(out + rows * C + columns[None, :], scale * gradient + c * value + d, mask=inside)


def gradient_of_input(g: Tensor, x: Tensor, affine: Tensor, coefficients: Tensor, rectify: bool) -> Tensor:
    """See :func:`.channel_kernels.gradient_of_input`."""
    grid, out = _grid(x), _like(x)
    _input_kernel[grid.size](
        g, x, affine, coefficients, out, grid.pixels, grid.channels, _stride(g), _stride(x),
        RECTIFY=rectify, **grid.blocks, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _dots_kernel(
    g, p, p_low, q, q_low, sums, R, C, share, parts,
    ITERATES: tl.constexpr, P_WIDE: tl.constexpr, Q_WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ g p and Σ g q over the pixels and channels of one program."""
    part = tl.program_id(0)
    columns = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    start = part * share
    end = tl.minimum(start + share, R)
    of_p = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    of_q = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_R):
        rows = (first + tl.arange(0, BLOCK_R))[:, None]
        inside = (rows < end) & (columns < C)
        place = rows.to(tl.int64) * C + columns
        gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        of_p += gradient * _load_iterate(p, p_low, place, inside, P_WIDE)
        if ITERATES > 1:
            of_q += gradient * _load_iterate(q, q_low, place, inside, Q_WIDE)
    number = tl.program_id(1) * parts + part
    tl.store(sums + number, tl.sum(tl.sum(of_p, 0), 0))
    if ITERATES > 1:
        tl.store(sums + parts * tl.num_programs(1) + number, tl.sum(tl.sum(of_q, 0), 0))


def dots(g: Tensor, *iterates: Iterate) -> Tensor:
    """See :func:`.channel_kernels.dots`; one or two iterates, all contiguous."""
    grid = _grid(g, _PROGRAMS)
    sums = torch.empty(len(iterates), grid.size[0] * grid.size[1], dtype=torch.float32, device=g.device)
    p, q = iterates[0], iterates[-1]
    _dots_kernel[grid.size](
        g, p.high, _or(p.low, g), q.high, _or(q.low, g), sums, grid.pixels, grid.channels, grid.share, grid.parts,
        ITERATES=len(iterates), P_WIDE=p.low is not None, Q_WIDE=q.low is not None, **grid.blocks, num_warps=8,
    )  # fmt: skip
    return sums.sum(1)
