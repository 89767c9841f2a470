"""The functions of :mod:`optinspired_plugins.memory.channel_kernels` for a GPU, as Triton kernels.

They take images in channels-last layout, in float16, bfloat16 or float32. An input may be a slice of the channels of
wider images. Sums are made in a fixed order, so that results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_kernels import Gradients, Iterate, RunningStatistics

__all__ = [
    "add",
    "affine_of",
    "affine_of_moments",
    "dots",
    "gradient_of_input",
    "gradient_sums",
    "moments",
    "normalization",
    "rectified",
]

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if _VERSION < (3, 2):
    raise ImportError(f"triton {triton.__version__}: must be 3.2 or newer, as with torch 2.6 or newer")

_TILE = 4096  # elements per step of a program
_PROGRAMS = 512  # about four per multiprocessor of a large GPU
_REDUCED = 16  # channels per program that merges parts

# Numbers that do not decide how memory is read: one compiled kernel serves all of their values.
_SIZES = ["R", "share", "parts", "TS", "AS"]
# From this version on a compiled kernel takes the same arguments as its source.
_IS_DIRECT = _VERSION >= (3, 4)


class _Kernel:
    """A Triton kernel that is launched without Triton's dispatch, which takes longer than small kernels run."""

    def __init__(self, function: Any) -> None:
        names = [name for name in _SIZES if name in function.__code__.co_varnames[: function.__code__.co_argcount]]
        self.function = triton.jit(function, do_not_specialize=names)
        self.compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: Any, constants: Any) -> None:
        """Launch the kernel; its arguments are tensors, numbers and constants in this order."""
        key = (
            tensors[0].get_device(),
            constants,
            *[(t.dtype, t.data_ptr() % 16) for t in tensors],
            *[isinstance(n, float) or (n % 16, n == 1) for n in numbers],
        )
        kernel = self.compiled.get(key, self.function)
        arguments = (*tensors, *numbers, *constants)
        if kernel is not self.function:
            kernel[grid](*arguments)
            return
        kernel = kernel[grid](*arguments, num_warps=8)
        if _IS_DIRECT and kernel is not None:  # the interpreter returns None
            self.compiled[key] = kernel


class _Grid(NamedTuple):
    """A division of images, as a matrix of pixels × channels, into blocks."""

    pixels: int
    channels: int
    parts: int  # programs that share the pixels
    share: int  # pixels per program
    size: tuple[int, int, int]
    reduced: tuple[int, int, int]  # programs that merge the parts
    blocks: tuple[int, int]  # pixels and channels of a step
    bound: tuple[int, int]  # constants of the kernel that merges: at least the parts, and channels


@lru_cache(maxsize=1024)
def _grid(shape: torch.Size, programs: int | None = None) -> _Grid:
    """Return a division into tiles, or into parts for about this number of programs."""
    channels = shape[1]
    pixels = shape.numel() // channels
    block_channels = min(64, 2 ** (channels - 1).bit_length())
    block_pixels = _TILE // block_channels
    columns, tiles = -(-channels // block_channels), -(-pixels // block_pixels)
    parts = tiles if programs is None else max(1, min(tiles, programs // columns))
    share = -(-tiles // parts) * block_pixels
    parts = -(-pixels // share)
    bound = 32 if parts <= 32 else _PROGRAMS
    reduced = (-(-channels // _REDUCED), 1, 1)
    blocks = (block_pixels, block_channels)
    return _Grid(pixels, channels, parts, share, (parts, columns, 1), reduced, blocks, (bound, _REDUCED))


def _stride(x: Tensor) -> int:
    """Return the distance between neighbouring pixels in memory."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- statistics -------------------------------------------------------------------------------------------------------


@_Kernel
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
def _merged(means, squares, columns, R, C, share, parts, PARTS: tl.constexpr):
    """Mean and sum of squared deviations of channels over all parts."""
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (columns < C)[None, :]
    place = part[:, None] * C + columns[None, :]
    mean_of = tl.load(means + place, mask=inside, other=0.0)
    count = tl.where(part < parts, tl.minimum(share, R - part * share), 0).to(tl.float32)[:, None]
    mean = tl.sum(mean_of * count, 0) / R
    deviation = tl.where(inside, mean_of - mean[None, :], 0.0)
    return mean, tl.sum(tl.load(squares + place, mask=inside, other=0.0) + count * deviation * deviation, 0)


@_Kernel
def _affine_kernel(
    means, squares, weight, bias, affine, running_mean, running_var,
    R, C, share, parts, eps, momentum, TRACK: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of all parts, the affine map, and the update of running statistics."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    mean, square = _merged(means, squares, columns, R, C, share, parts, PARTS)
    var = tl.maximum(square / R, 0.0)
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


@_Kernel
def _merge_kernel(means, squares, out, R, C, TS, share, parts, PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel over all parts."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = columns < C
    mean, square = _merged(means, squares, columns, R, C, share, parts, PARTS)
    tl.store(out + columns, mean, mask=valid)
    tl.store(out + TS + columns, square, mask=valid)


def _partial_statistics(x: Tensor) -> tuple[_Grid, Tensor]:
    """Return statistics of parts of the pixels, shape (2, parts, channels)."""
    grid = _grid(x.shape, _PROGRAMS)
    of = torch.empty(2, grid.parts, grid.channels, dtype=torch.float32, device=x.device)
    numbers = grid.pixels, grid.channels, _stride(x), grid.share
    _statistics_kernel(grid.size, (x, of[0], of[1]), numbers, grid.blocks)
    return grid, of


def moments(x: Tensor, out: Tensor) -> None:
    """See :func:`.channel_kernels.moments`."""
    grid, of = _partial_statistics(x)
    numbers = grid.pixels, grid.channels, out.stride(0), grid.share, grid.parts
    _merge_kernel(grid.reduced, (of[0], of[1], out), numbers, grid.bound)


def affine_of(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """See :func:`.channel_kernels.affine_of`."""
    channels = weight.shape[0]
    reduced = (-(-channels // _REDUCED), 1, 1)
    return _affine(reduced, (mean, var), (1, channels, 1, 1), (weight, bias, eps, None), (32, _REDUCED))


def affine_of_moments(
    of: Tensor, count: int, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """See :func:`.channel_kernels.affine_of_moments`."""
    channels = weight.shape[0]
    reduced = (-(-channels // _REDUCED), 1, 1)
    return _affine(reduced, of, (count, channels, count, 1), (weight, bias, eps, running), (32, _REDUCED))


def normalization(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, running: RunningStatistics | None = None
) -> Tensor:
    """See :func:`.channel_kernels.normalization`."""
    grid, of = _partial_statistics(x)
    sizes = grid.pixels, grid.channels, grid.share, grid.parts
    return _affine(grid.reduced, of, sizes, (weight, bias, eps, running), grid.bound)


def _affine(programs: Any, of: Any, sizes: Any, norm: Any, bound: tuple[int, int]) -> Tensor:
    weight, bias, eps, running = norm
    affine = torch.empty(4, sizes[1], dtype=torch.float32, device=weight.device)
    mean, var, momentum = running or (affine, affine, 0.0)
    tensors = of[0], of[1], weight, bias, affine, mean, var
    _affine_kernel(programs, tensors, (*sizes, eps, momentum), (running is not None, *bound))
    return affine


# --- elementwise ------------------------------------------------------------------------------------------------------


@_Kernel
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
    grid, out = _grid(x.shape), _like(x)
    tensors = x, affine, _or(factor, affine), out
    _rectified_kernel(grid.size, tensors, (grid.pixels, grid.channels, _stride(x)), (factor is not None, *grid.blocks))
    return out


@triton.jit
def _load_iterate(high, low, place, inside, WIDE: tl.constexpr):
    value = tl.load(high + place, mask=inside, other=0.0).to(tl.float32)
    if WIDE:
        value += tl.load(low + place, mask=inside, other=0.0).to(tl.float32)
    return value


@_Kernel
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
    factors: Sequence[float] | Tensor,
    x: Tensor,
    affine: Tensor | None,
    *iterates: Iterate,
    wide: bool = False,
    out: Iterate | None = None,
) -> Iterate:
    """See :func:`.channel_kernels.add`."""
    grid, low = _grid(x.shape), None
    if wide and x.dtype != torch.float32:
        low = _like(x) if out is None or out.low is None else out.low
    high = _like(x) if out is None else out.high
    learned = isinstance(factors, Tensor)
    values = [1.0] * 3 if learned else [*map(float, factors), 0.0, 0.0][:3]
    p, q = (*iterates, Iterate(x), Iterate(x))[:2]
    pointers = x, _or(affine, x), p.high, _or(p.low, x), q.high, _or(q.low, x), high, _or(low, x)
    strides = _stride(x), 0 if affine is None else affine.stride(0), _stride(p.high), _stride(q.high)
    constants = affine is not None, len(iterates), p.low is not None, q.low is not None, low is not None, learned
    numbers = *values, grid.pixels, grid.channels, *strides
    tensors = *pointers, factors if isinstance(factors, Tensor) else x
    _add_kernel(grid.size, tensors, numbers, (*constants, *grid.blocks))
    return Iterate(high, low)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """Return x, or a pointer that is not read."""
    return other if x is None else x


# --- backward ---------------------------------------------------------------------------------------------------------


@_Kernel
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


@_Kernel
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
    grid = _grid(x.shape, _PROGRAMS)
    sums = torch.empty(2, grid.parts, grid.channels, dtype=torch.float32, device=x.device)
    sizes = grid.pixels, grid.channels, _stride(g), _stride(x), grid.share, grid.parts
    _sums_kernel(grid.size, (g, x, affine, sums), sizes, (rectify, *grid.blocks))
    out = torch.empty(5, grid.channels, dtype=torch.float32, device=x.device)
    tensors = sums, affine, _or(factor, affine), out, _or(total, out)
    numbers = grid.pixels, grid.channels, 0 if total is None else total.stride(0), grid.parts
    constants = factor is not None, through_statistics, total is not None, *grid.bound
    _coefficients_kernel(grid.reduced, tensors, numbers, constants)
    return Gradients(out[0], out[1], out[2], out[3:])


@_Kernel
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
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`.channel_kernels.gradient_of_input`."""
    grid = _grid(x.shape)
    if out is None:
        out = _like(x) if into is None else into
    tensors = g, x, affine, _or(coefficients, affine), _or(factor, affine), out
    numbers = grid.pixels, grid.channels, _stride(g), _stride(x), _stride(out)
    constants = rectify, coefficients is not None, factor is not None, into is not None
    _input_kernel(grid.size, tensors, numbers, (*constants, *grid.blocks))
    return out


@_Kernel
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
    grid, (p, q) = _grid(g.shape, _PROGRAMS), (iterates[0], iterates[-1])
    sums = torch.empty(len(iterates), grid.size[0] * grid.size[1], dtype=torch.float32, device=g.device)
    tensors = g, p.high, _or(p.low, g), q.high, _or(q.low, g), sums
    constants = len(iterates), p.low is not None, q.low is not None
    numbers = grid.pixels, grid.channels, grid.share, grid.parts
    _dots_kernel(grid.size, tensors, numbers, (*constants, *grid.blocks))
    return sums.sum(1)
