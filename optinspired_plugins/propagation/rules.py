"""The propagation rules (16)-(21) of the paper, as plain functions of lists of transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..algorithms.coefficients import nesterov_weights
from ..algorithms.methods import check_coefficient

__all__ = [
    "concatenated",
    "extrapolated",
    "heavy_ball",
    "nesterov",
    "nesterov_coefficients",
    "two_path",
    "weighted_sums",
]

Transform = Callable[[Tensor], Tensor]


SourceTransform = Callable[[int, Tensor], Tensor]


Coefficient = float | Tensor


def heavy_ball(
    transforms: Sequence[Transform],
    x: Tensor,
    x_prev: Tensor | None = None,
    beta1: Coefficient | Sequence[Coefficient] = 1.0,
    beta2: Coefficient | Sequence[Coefficient] = -1.0,
) -> list[Tensor]:
    """The heavy-ball rule (16): x_{k+1} = T_k(x_k) + β1 x_k + β2 x_{k−1}.

    β1 = 1, β2 = −1 is HBNet (§7.1); β2 = 0 is ResNet without the activation after its addition.

    Args:
        transforms: T_0, T_1, …; each maps a tensor to one of the same shape.
        x: x_0, any shape.
        x_prev: x_{−1}, same shape; ``None`` stands for x_{−1} = x_0, the convention of algorithm (2).
        beta1: β1, one for all steps or one a step.
        beta2: β2, likewise.

    Returns:
        The iterates x_0, x_1, …: ``len(transforms) + 1`` tensors.

    Raises:
        ValueError: a sequence of coefficients has another length than ``transforms``, or one is not finite.
    """
    beta1, beta2 = _per_step("beta1", beta1, len(transforms)), _per_step("beta2", beta2, len(transforms))
    x_prev = x if x_prev is None else x_prev
    iterates = [x]
    for T, b1, b2 in zip(transforms, beta1, beta2, strict=True):
        x, x_prev = T(x) + b1 * x + b2 * x_prev, x
        iterates.append(x)
    return iterates


def extrapolated(
    transforms: Sequence[Transform],
    x: Tensor,
    x_prev: Tensor | None = None,
    beta1: Coefficient | Sequence[Coefficient] = 1.0,
    beta2: Coefficient | Sequence[Coefficient] = 0.0,
) -> list[Tensor]:
    """The two-step Nesterov rule (17): x_{k+1} = T_k(β1 x_k + β2 x_{k−1}).

    Arguments, result and errors are those of :func:`heavy_ball`; β1 = 1 + β_k, β2 = −β_k is (12).
    """
    beta1, beta2 = _per_step("beta1", beta1, len(transforms)), _per_step("beta2", beta2, len(transforms))
    x_prev = x if x_prev is None else x_prev
    iterates = [x]
    for T, b1, b2 in zip(transforms, beta1, beta2, strict=True):
        x, x_prev = T(b1 * x + b2 * x_prev), x
        iterates.append(x)
    return iterates


def two_path(
    transforms: Sequence[tuple[Transform, Transform]],
    x: Tensor,
    alpha: Sequence[Tensor] | None = None,
    beta: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """The ADMM rule (20): x'_{k+1} = T'(x'_k) + s_k and x_{k+1} = T(x_k) + s_k.

    The paths share s_k = Σ_{t≤k} (α_{k,t} x'_t + β_{k,t} x_t). The sums run over the states after the start, and over
    the start alone for the first step, where :class:`TwoPath` has none: its s_0 is 0.

    Args:
        transforms: (T', T) of each step, shape-preserving.
        x: the start of both paths, any shape.
        alpha: ``alpha[k]`` of shape (max(k, 1),); ``None`` for ½ of the newest state, which is DMRNet as
            §7 prints it.
        beta: likewise for the other path.

    Returns:
        The pairs (x'_0, x_0), (x'_1, x_1), …: ``len(transforms) + 1`` of them.

    Raises:
        ValueError: ``alpha`` or ``beta`` does not hold max(k, 1) finite coefficients for step k.
    """
    steps = len(transforms)
    alpha, beta = (_newest_half(steps) if rows is None else rows for rows in (alpha, beta))
    sizes = [max(k, 1) for k in range(steps)]
    _check_rows("alpha", alpha, sizes)
    _check_rows("beta", beta, sizes)
    pairs = [(x, x)]
    for k, (T1, T2) in enumerate(transforms):
        x1, x2 = pairs[-1]
        shared = sum(
            (a * p1 + b * p2 for a, b, (p1, p2) in zip(alpha[k], beta[k], pairs[1:] or pairs, strict=True)),
            start=torch.zeros(()),
        )
        pairs.append((T1(x1) + shared, T2(x2) + shared))
    return pairs


def concatenated(transforms: Sequence[Transform], z: Tensor, dim: int = 1) -> list[Tensor]:
    """DenseNet's rule (19): z_{k+1} = T([z_0, z_1, …, z_k]).

    Args:
        transforms: T_1, T_2, …; T_{k+1} maps the concatenation of all sources so far.
        z: z_0.
        dim: dimension of the concatenation.

    Returns:
        z_0, z_1, …: ``len(transforms) + 1`` tensors.
    """
    zs = [z]
    for T in transforms:
        zs.append(T(torch.cat(zs, dim)))
    return zs


def weighted_sums(
    transforms: Sequence[SourceTransform],
    x: Tensor,
    alpha: Sequence[Tensor],
    beta: Sequence[Tensor],
    finish: Sequence[Transform] | None = None,
) -> list[Tensor]:
    """The summed rule (18): x_{k+1} = Σ_{j≤k} α_{k+1,j} T_{k+1}(x_j) + Σ_{j≤k} β_{k+1,j} x_j.

    β = 0, α = 1 is DenseNet: a convolution of concatenated sources is the sum of one convolution a source.

    Args:
        transforms: T_1, T_2, …; ``T(j, x_j)`` is what layer k + 1 makes of source j. A plain layer ignores j; a
            convolution over concatenated sources uses the columns of source j.
        x: x_0, any shape. It may differ in shape from x_1, x_2, … if no sum below needs it: a term whose β is exactly
            0 is left out.
        alpha: ``alpha[k]`` of shape (k + 1,): α_{k+1,0..k}.
        beta: ``beta[k]`` of shape (k + 1,): β_{k+1,0..k}.
        finish: what a composite layer does after its first convolution, ``finish[k]`` applied to the α-sum of layer
            k + 1 (DenseNet's bottleneck layers: norm, activation, 3×3 convolution); ``None`` for nothing.

    Returns:
        The iterates x_0, x_1, …: ``len(transforms) + 1`` tensors.

    Raises:
        ValueError: ``alpha`` or ``beta`` does not hold k + 1 finite coefficients for layer k + 1.
    """
    sizes = list(range(1, len(transforms) + 1))
    _check_rows("alpha", alpha, sizes)
    _check_rows("beta", beta, sizes)
    xs = [x]
    for k, T in enumerate(transforms):
        x = sum((alpha[k][j] * T(j, x_j) for j, x_j in enumerate(xs)), start=torch.zeros(()))
        if finish is not None:
            x = finish[k](x)
        for j, x_j in enumerate(xs):
            if beta[k][j] != 0:
                x = x + beta[k][j] * x_j
        xs.append(x)
    return xs


def nesterov_coefficients(n: int, beta: float = 0.1) -> list[Tensor]:
    """The β_{k+1,j} that turn (18) into (21): β (δ_{jk} − h_{k+1,j}), h from (5).

    Args:
        n: number of layers, n ≥ 0.
        beta: β of (21); 0.1 in the paper's experiments (§7.2).

    Returns:
        n float64 tensors; the k-th, of shape (k + 1,), belongs to x_{k+1}.
    """
    weights = beta * (torch.eye(n, dtype=torch.float64, device="cpu") - nesterov_weights(n))
    return [weights[k, : k + 1] for k in range(n)]


def nesterov(
    transforms: Sequence[SourceTransform],
    z: Tensor,
    alpha: Sequence[Tensor],
    beta: float = 0.1,
    finish: Sequence[Transform] | None = None,
) -> list[Tensor]:
    """The AGDNet rule (21): z_{k+1} = Σ_{j≤k} α_{k+1,j} T(z_j) + β (z_k − Σ_{j≤k} h_{k+1,j} z_j).

    It is (18) with the coefficients of :func:`nesterov_coefficients`. z_0 enters no β-sum, since h_{1,0} = 1 and
    h_{k,0} = 0 for k ≥ 2, so it may have its own number of channels.

    Args:
        transforms: as for :func:`weighted_sums`.
        z: z_0.
        alpha: ``alpha[k]`` of shape (k + 1,).
        beta: β.
        finish: as for :func:`weighted_sums`.

    Returns:
        The iterates z_0, z_1, …: ``len(transforms) + 1`` tensors.
    """
    return weighted_sums(transforms, z, alpha, nesterov_coefficients(len(transforms), beta), finish)


def _per_step(name: str, value: Coefficient | Sequence[Coefficient], steps: int) -> Sequence[Coefficient]:
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return [check_coefficient(name, value)] * steps
    if len(value) != steps:
        raise ValueError(f"{name} has {len(value)} values: must be one number or {steps} of them, one a transform")
    return [check_coefficient(f"{name}[{k}]", b) for k, b in enumerate(value)]


def _newest_half(steps: int) -> list[Tensor]:
    rows = [torch.zeros(max(k, 1), device="cpu") for k in range(steps)]
    for row in rows:
        row[-1] = 0.5
    return rows


def _check_rows(name: str, rows: Sequence[Tensor], sizes: list[int]) -> None:
    found = [len(row) for row in rows]
    if found != sizes:
        raise ValueError(f"{name} has rows of {found} coefficients: must be {sizes}")
    for k, row in enumerate(rows):
        check_coefficient(f"{name}[{k}]", row)
