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

from .channel_kernels import Gradients, Iterate, RunningStatistics

__all__ = [
    "add",
    "affine_of_moments",
    "dots",
    "gradient_of_input",
    "gradient_sums",
    "moments",
    "normalization",
    "rectified",
]

_TILE = 4096  # elements per step of a program
_PROGRAMS = 512  # about four per multiprocessor of a large GPU


# Numbers that do not decide how memory is read: one compiled kernel serves all of their values.
_SIZES = ["R", "share", "parts", "TS", "AS"]


def _compiled(function: Any) -> Any:
    names = [name for name in _SIZES if name in function.__code__.co_varnames[: function.__code__.co_argcount]]
    return triton.jit(function, do_not_specialize=names)


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


def _bound(parts: int) -> int:
    """Return a number of parts for which a kernel is compiled."""
    return 32 if parts <= 32 else _PROGRAMS


def _stride(x: Tensor) -> int:
    """Return the distance between neighbouring pixels in memory."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- statistics -------------------------------------------------------------------------------------------------------


@_compiled
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


@_compiled
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


@_compiled
def _merge_kernel(means, squares, out, R, C, TS, share, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel over all parts."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & valid[None, :]
    place = part[:, None] * C + columns[None, :]
    mean_of = tl.load(means + place, mask=inside, other=0.0)
    count = tl.where(part < parts, tl.minimum(share, R - part * share), 0).to(tl.float32)[:, None]
    mean = tl.sum(mean_of * count, 0) / R
    deviation = tl.where(inside, mean_of - mean[None, :], 0.0)
    square = tl.sum(tl.load(squares + place, mask=inside, other=0.0) + count * deviation * deviation, 0)
    tl.store(out + columns, mean, mask=valid)
    tl.store(out + TS + columns, square, mask=valid)


def _partial_statistics(x: Tensor) -> tuple[_Grid, Tensor]:
    """Return statistics of parts of the pixels, shape (2, parts, channels)."""
    grid = _grid(x, _PROGRAMS)
    of = torch.empty(2, grid.parts, grid.channels, dtype=torch.float32, device=x.device)
    _statistics_kernel[grid.size](
        x, of[0], of[1], grid.pixels, grid.channels, _stride(x), grid.share, **grid.blocks, num_warps=8
    )
    return grid, of


def moments(x: Tensor, out: Tensor) -> None:
    """See :func:`.channel_kernels.moments`."""
    grid, of = _partial_statistics(x)
    _merge_kernel[(triton.cdiv(grid.channels, 16),)](
        of[0], of[1], out, grid.pixels, grid.channels, out.stride(0), grid.share, grid.parts,
        PARTS=_bound(grid.parts), BLOCK_C=16,
    )  # fmt: skip


def affine_of_moments(
    of: Tensor, count: int, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """See :func:`.channel_kernels.affine_of_moments`."""
    return _affine(of[0], of[1], (count, weight.shape[0], count, 1), weight, bias, eps, running)


def normalization(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """See :func:`.channel_kernels.normalization`."""
    grid, of = _partial_statistics(x)
    return _affine(of[0], of[1], (grid.pixels, grid.channels, grid.share, grid.parts), weight, bias, eps, running)


def _affine(means: Tensor, squares: Tensor, sizes: Any, weight: Tensor, bias: Tensor, eps: float, running: Any) -> Any:
    channels, parts = sizes[1], sizes[3]
    affine = torch.empty(4, channels, dtype=torch.float32, device=means.device)
    mean, var, momentum = running or RunningStatistics(affine, affine, 0.0)
    _affine_kernel[(triton.cdiv(channels, 16),)](
        means, squares, weight, bias, affine, mean, var, *sizes, eps, momentum, TRACK=running is not None,
        PARTS=_bound(parts), BLOCK_C=16,
    )  # fmt: skip
    return affine


# --- elementwise ------------------------------------------------------------------------------------------------------


@_compiled
def _rectified_kernel(
    x, affine, factor, out, R, C, S, FACTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The rectified map f max(a x + b, 0)."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    inside = (rows < R) & valid[None, :]
    scale = tl.load(affine + columns, mask=valid, other=0.0)[None, :]
    shift = tl.load(affine + C + columns, mask=valid, other=0.0)[None, :]
    value = tl.load(x + rows * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.maximum(scale * value + shift, 0.0)
    if FACTOR:
        value *= tl.load(factor + columns, mask=valid, other=0.0)[None, :]
    tl.store(out + rows * C + columns[None, :], value, mask=inside)


def rectified(x: Tensor, affine: Tensor, factor: Tensor | None = None) -> Tensor:
    """See :func:`.channel_kernels.rectified`."""
    grid, out = _grid(x), _like(x)
    _rectified_kernel[grid.size](
        x, affine, _or(factor, affine), out, grid.pixels, grid.channels, _stride(x), FACTOR=factor is not None,
        **grid.blocks, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _load_iterate(high, low, place, inside, WIDE: tl.constexpr):
    value = tl.load(high + place, mask=inside, other=0.0).to(tl.float32)
    if WIDE:
        value += tl.load(low + place, mask=inside, other=0.0).to(tl.float32)
    return value


@_compiled
def _add_kernel(
    x, affine, p, p_low, q, q_low, out, out_low, factors, f0, f1, f2, R, C, S, AS, PS, QS,
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
        shift = tl.load(affine + AS + columns, mask=valid, other=0.0)[None, :]
        value = scale * value + shift
    total = f0 * value
    if ITERATES > 0:
        if LEARNED:
            f1 = tl.load(factors + 1)
        total += f1 * _load_iterate(p, p_low, rows * PS + columns[None, :], inside, P_WIDE)
    if ITERATES > 1:
        if LEARNED:
            f2 = tl.load(factors + 2)
        total += f2 * _load_iterate(q, q_low, rows * QS + columns[None, :], inside, Q_WIDE)
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
    strides = _stride(x), 0 if affine is None else affine.stride(0), _stride(p.high), _stride(q.high)
    _add_kernel[grid.size](
        x, x if affine is None else affine, p.high, _or(p.low, x), q.high, _or(q.low, x), out, _or(low, x),
        factors if learned else x, *numbers, grid.pixels, grid.channels, *strides, AFFINE=affine is not None,
        ITERATES=len(iterates), P_WIDE=p.low is not None, Q_WIDE=q.low is not None, WIDE=low is not None,
        LEARNED=learned, **grid.blocks, num_warps=8,
    )  # fmt: skip
    return Iterate(out, low)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """Return x, or a pointer that is not read."""
    return other if x is None else x


# --- backward ---------------------------------------------------------------------------------------------------------


@_compiled
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


@_compiled
def _coefficients_kernel(
    sums, affine, factor, out, total, R, C, TS, parts,
    FACTOR: tl.constexpr, THROUGH: tl.constexpr, TOTAL: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of weight, bias and factor, and c and d of the gradient of x."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & valid[None, :]
    place = part[:, None] * C + columns[None, :]
    summed = tl.sum(tl.load(sums + place, mask=inside, other=0.0), 0)
    product = tl.sum(tl.load(sums + parts * C + place, mask=inside, other=0.0), 0)
    scale = tl.load(affine + columns, mask=valid, other=0.0)
    shift = tl.load(affine + C + columns, mask=valid, other=0.0)
    mean = tl.load(affine + 2 * C + columns, mask=valid, other=0.0)
    inverse_std = tl.load(affine + 3 * C + columns, mask=valid, other=0.0)
    tl.store(out + 2 * C + columns, scale * product + (scale * mean + shift) * summed, mask=valid)
    if FACTOR:
        f = tl.load(factor + columns, mask=valid, other=0.0)
        summed *= f
        product *= f
    tl.store(out + columns, product * inverse_std, mask=valid)
    tl.store(out + C + columns, summed, mask=valid)
    c = tl.zeros([BLOCK_C], tl.float32)
    d = tl.zeros([BLOCK_C], tl.float32)
    if THROUGH:
        c = -scale * inverse_std * inverse_std * product / R
        d = -scale * summed / R - c * mean
    tl.store(out + 3 * C + columns, c, mask=valid)
    tl.store(out + 4 * C + columns, d, mask=valid)
    if TOTAL:
        tl.store(total + columns, tl.load(total + columns, mask=valid, other=0.0) + c, mask=valid)
        tl.store(total + TS + columns, tl.load(total + TS + columns, mask=valid, other=0.0) + d, mask=valid)


def gradient_sums(
    g: Tensor,
    x: Tensor,
    affine: Tensor,
    rectify: bool,
    through_statistics: bool,
    factor: Tensor | None = None,
    total: Tensor | None = None,
) -> Gradients:
    """See :func:`.channel_kernels.gradient_sums`."""
    grid = _grid(x, _PROGRAMS)
    sums = torch.empty(2, grid.parts, grid.channels, dtype=torch.float32, device=x.device)
    _sums_kernel[grid.size](
        g, x, affine, sums, grid.pixels, grid.channels, _stride(g), _stride(x), grid.share, grid.parts,
        RECTIFY=rectify, **grid.blocks, num_warps=8,
    )  # fmt: skip
    out = torch.empty(5, grid.channels, dtype=torch.float32, device=x.device)
    _coefficients_kernel[(triton.cdiv(grid.channels, 16),)](
        sums, affine, _or(factor, affine), out, _or(total, out), grid.pixels, grid.channels,
        0 if total is None else total.stride(0), grid.parts, FACTOR=factor is not None, THROUGH=through_statistics,
        TOTAL=total is not None, PARTS=_bound(grid.parts), BLOCK_C=16,
    )  # fmt: skip
    return Gradients(out[0], out[1], out[2], out[3:])


@_compiled
def _input_kernel(
    g, x, affine, coefficients, factor, out, R, C, GS, S, OS, RECTIFY: tl.constexpr, COEFFICIENTS: tl.constexpr,
    FACTOR: tl.constexpr, INTO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of x: a f m g + c x + d."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    inside = (rows < R) & valid[None, :]
    scale = tl.load(affine + columns, mask=valid, other=0.0)[None, :]
    shift = tl.load(affine + C + columns, mask=valid, other=0.0)[None, :]
    value = tl.load(x + rows * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(g + rows * GS + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if RECTIFY:
        gradient = tl.where(scale * value + shift > 0, gradient, 0.0)
    if FACTOR:
        scale *= tl.load(factor + columns, mask=valid, other=0.0)[None, :]
    result = scale * gradient
    if COEFFICIENTS:
        result += tl.load(coefficients + columns, mask=valid, other=0.0)[None, :] * value
        result += tl.load(coefficients + C + columns, mask=valid, other=0.0)[None, :]
    place = rows * OS + columns[None, :]
    if INTO:
        result += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, result, mask=inside)


def gradient_of_input(
    g: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor | None,
    rectify: bool,
    factor: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """See :func:`.channel_kernels.gradient_of_input`."""
    grid, out = _grid(x), _like(x) if into is None else into
    _input_kernel[grid.size](
        g, x, affine, _or(coefficients, affine), _or(factor, affine), out, grid.pixels, grid.channels, _stride(g),
        _stride(x), _stride(out), RECTIFY=rectify, COEFFICIENTS=coefficients is not None, FACTOR=factor is not None,
        INTO=into is not None, **grid.blocks, num_warps=8,
    )  # fmt: skip
    return out


@_compiled
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
