"""Networks read off optimisation algorithms: any algorithm unrolled, and the relaxed rules of section 7.

:class:`Unrolled` puts layers into an algorithm by ∇f(z) = z − T(z), which gives (7) and (11)-(14). The functions below
it are the relaxed rules (16) to (21), in their plain form. They are the reference: they say what a network
computes in the paper's own symbols, over any transform ``T``, without a thought for speed. The models in
``timm_models`` are tested against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .algorithms import Algorithm, Gradient, check_algorithm, check_coefficient, check_same_shape
from .coefficients import nesterov_weights

__all__ = [
    "TwoPath",
    "TwoPathState",
    "Unrolled",
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


class Unrolled(nn.Module):
    """An algorithm as a network: step k uses the gradient z − T_k(z).

    Gradient descent gives the feed-forward network (7), the heavy ball (11), Nesterov's method (12), its summed form
    (13), linearised ADMM (14).

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``; if it is a module, its parameters are learned too.
        transforms: T_0, T_1, …, one a step, at least one: a module or another callable, shape-preserving; or a sequence
            of them for an algorithm that asks for several gradients a step (ADMM: one for x', one for x).

    Raises:
        TypeError: the algorithm lacks a method, or a transform cannot be called.
        ValueError: there is no transform; a step asks for more or fewer gradients than its sequence has transforms; a
            transform changes the shape.
    """

    def __init__(self, algorithm: Algorithm, transforms: Sequence[Transform | Sequence[Transform]]) -> None:
        super().__init__()
        check_algorithm(algorithm)
        if len(transforms) == 0:
            raise ValueError("transforms is empty: must hold at least one, one a step")
        self.algorithm = as_learnable(algorithm)
        self.transforms = nn.ModuleList(_as_module(T, f"transforms[{k}]") for k, T in enumerate(transforms))

    def forward(self, x: Tensor) -> Tensor:
        """Return the algorithm's result after one step a transform, shape of x."""
        state = self.algorithm.init(x)
        for k, T in enumerate(self.transforms):
            calls = _Calls(T, f"transforms[{k}]")
            state = self.algorithm.step(state, calls.gradient)
            calls.check_all_used()
        return self.algorithm.result(state)


class _Learnable(nn.Module):
    """An algorithm that is no module but holds parameters, as one, so that they are trained, saved and moved."""

    def __init__(self, algorithm: Algorithm, names: Sequence[str]) -> None:
        super().__init__()
        self.plain = algorithm
        for name in names:
            self.register_parameter(name, getattr(algorithm, name))

    def init(self, x0: Tensor) -> Any:
        for name in self._parameters:  # moving a module may have replaced them
            setattr(self.plain, name, getattr(self, name))
        return self.plain.init(x0)

    def step(self, state: Any, grad: Gradient) -> Any:
        return self.plain.step(state, grad)

    def result(self, state: Any) -> Tensor:
        return self.plain.result(state)


def as_learnable(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm, as a module if it has parameters among its attributes."""
    if isinstance(algorithm, nn.Module):
        return algorithm
    names = [name for name, value in getattr(algorithm, "__dict__", {}).items() if isinstance(value, nn.Parameter)]
    return _Learnable(algorithm, names) if names else algorithm


class TwoPathState(NamedTuple):
    """x'_k, x_k and k."""

    x1: Tensor
    x2: Tensor
    k: int


class TwoPath:
    """The rule (20) with the newest states, as an algorithm: x'_{k+1} = T'(x'_k) + s_k, x_{k+1} = T(x_k) + s_k.

    s_k = α x'_k + β x_k, but s_0 = 0 since the sums of (20) begin at t = 1; :func:`two_path` has s_0 = (α + β) x_0. So
    α = β = ½ is DMRNet (Table 3) behind the first step, and from the first on where its layers are residual, as
    those of ``optnet`` are. It minimises nothing; it has an algorithm's methods so that whatever takes one takes it.
    The result is the mean of both paths: without a next step that merges them, one alone would leave the last T'
    without effect.

    Args:
        alpha: α, finite.
        beta: β, finite.

    Raises:
        ValueError: a coefficient is not finite.
    """

    def __init__(self, alpha: Coefficient = 0.5, beta: Coefficient = 0.5) -> None:
        self.alpha, self.beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)

    def init(self, x0: Tensor) -> TwoPathState:
        """Return the state x'_0 = x_0."""
        return TwoPathState(x0, x0, 0)

    def step(self, state: TwoPathState, grad: Gradient) -> TwoPathState:
        """Return the state x'_{k+1}, x_{k+1}; ``grad`` is called at x'_k and then at x_k."""
        x1, x2, k = state
        t1, t2 = x1 - grad(x1), x2 - grad(x2)
        if k == 0:
            return TwoPathState(t1, t2, 1)
        shared = self.alpha * x1 + self.beta * x2
        return TwoPathState(t1 + shared, t2 + shared, k + 1)

    def result(self, state: TwoPathState) -> Tensor:
        """Return (x'_k + x_k) / 2."""
        return (state.x1 + state.x2) / 2


class _Function(nn.Module):
    """A callable that is no module, as one."""

    def __init__(self, function: Transform) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(transform: object, name: str) -> nn.Module:
    if isinstance(transform, nn.Module):
        return transform
    if isinstance(transform, Sequence):
        return nn.ModuleList(_as_module(part, f"{name}[{i}]") for i, part in enumerate(transform))
    if not callable(transform):
        raise TypeError(f"{name} is a {type(transform).__name__}: must be callable")
    return _Function(transform)


class _Calls:
    """The gradients ∇f(z) = z − T(z) of one step; a list of transforms serves its calls in turn."""

    def __init__(self, T: nn.Module, name: str) -> None:
        self.T, self.name = T, name
        self.rest: list[nn.Module] = list(T) if isinstance(T, nn.ModuleList) else []

    def gradient(self, z: Tensor) -> Tensor:
        part = self.T
        if isinstance(part, nn.ModuleList):
            if not self.rest:
                raise ValueError(
                    f"{self.name} has {len(part)} transforms: the algorithm asks for more gradients a step"
                )
            part = self.rest.pop(0)
        return z - check_same_shape(z, part(z), self.name)

    def check_all_used(self) -> None:
        if self.rest:
            raise ValueError(f"{self.name} has {len(self.rest)} transforms too many: the algorithm asks for no more")


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
