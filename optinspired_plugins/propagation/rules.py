"""The propagation rules (16)-(21) of the paper, as plain functions of lists of transforms.

They are the reference for the stages in ``timm_models`` and the kernels in ``memory``: :data:`EQUATIONS` names both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
        beta1: β1, one for all steps or one per step.
        beta2: β2, one for all steps or one per step.

    Returns:
        The iterates x_0, x_1, …: ``len(transforms) + 1`` tensors.

    Raises:
        ValueError: a sequence of coefficients does not have the length of ``transforms``, or one is not finite.
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

    β1 = 1 + β_k, β2 = −β_k is (12). See :func:`heavy_ball` for arguments, result and errors.
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

    The paths share s_k = Σ_{t≤k} (α_{k,t} x'_t + β_{k,t} x_t). The sums begin at t = 1, but s_0 is the term
    of t = 0. :class:`~optinspired_plugins.propagation.unrolled.TwoPath` has s_0 = 0 instead.

    Args:
        transforms: (T', T) of each step, shape-preserving.
        x: the start of both paths, any shape.
        alpha: ``alpha[k]`` of shape (max(k, 1),); ``None`` for ½ of the newest state, which is DMRNet as printed
            in §7.
        beta: coefficients of the other path, in the same form.

    Returns:
        ``len(transforms) + 1`` pairs (x'_0, x_0), (x'_1, x_1), ….

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

    β = 0, α = 1 is DenseNet: a convolution of concatenated sources is the sum of one convolution per source.

    Args:
        transforms: T_1, T_2, …; ``T(j, x_j)`` is the output of layer k + 1 for source j. A plain layer ignores j; a
            convolution over concatenated sources uses the columns of source j.
        x: x_0, any shape. Terms with β = 0 are left out, so x_0 may have another shape than x_1, x_2, … if its β are 0.
        alpha: ``alpha[k]`` of shape (k + 1,): α_{k+1,0..k}.
        beta: ``beta[k]`` of shape (k + 1,): β_{k+1,0..k}.
        finish: the rest of a composite layer after its first convolution, ``finish[k]`` applied to the α-sum of layer
            k + 1 (in DenseNet's bottleneck layers: norm, activation, 3×3 convolution); ``None`` for nothing.

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
    """Return the β_{k+1,j} = β (δ_{jk} − h_{k+1,j}) that turn (18) into (21), h from (5).

    Args:
        n: number of layers, n ≥ 0.
        beta: β of (21); 0.1 in the paper's experiments (§7.2).

    Returns:
        n float64 tensors; the k-th has shape (k + 1,) and the coefficients of x_{k+1}.
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
        transforms: see :func:`weighted_sums`.
        z: z_0.
        alpha: ``alpha[k]`` of shape (k + 1,).
        beta: β.
        finish: see :func:`weighted_sums`.

    Returns:
        The iterates z_0, z_1, …: ``len(transforms) + 1`` tensors.
    """
    return weighted_sums(transforms, z, alpha, nesterov_coefficients(len(transforms), beta), finish)


def _per_step(name: str, value: Coefficient | Sequence[Coefficient], steps: int) -> Sequence[Coefficient]:
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return [check_coefficient(name, value)] * steps
    if len(value) != steps:
        raise ValueError(f"{name} has {len(value)} values: must be one number or {steps} of them, one per transform")
    return [check_coefficient(f"{name}[{k}]", b) for k, b in enumerate(value)]


def _newest_half(steps: int) -> list[Tensor]:
    rows = [torch.zeros(max(k, 1), device="cpu") for k in range(steps)]
    for row in rows:
        row[-1] = 0.5
    return rows


def _check_rows(name: str, rows: Sequence[Tensor], sizes: list[int]) -> None:
    lengths = [len(row) for row in rows]
    if lengths != sizes:
        raise ValueError(f"{name} has rows of {lengths} coefficients: must be {sizes}")
    for k, row in enumerate(rows):
        check_coefficient(f"{name}[{k}]", row)


# --- where the paper's equations are ----------------------------------------------------------------------------------


class Equation(NamedTuple):
    """An equation or table of the paper, with the dotted names of its implementations.

    ``plain`` is the formula as printed, ``stage`` the module of a network, ``kernel`` its fast form for training,
    ``inference`` its form for evaluation, and ``test`` a test as ``file::name``. Empty: there is none.
    """

    number: str
    plain: str
    stage: str = ""
    kernel: str = ""
    inference: str = ""
    test: str = ""


_ALGORITHMS, _CELLS, _MEMORY = (f"optinspired_plugins.{room}." for room in ("algorithms", "cells", "memory"))
_RULES, _UNROLLED = f"{__name__}.", "optinspired_plugins.propagation.unrolled.Unrolled"
_STAGES, _INFERENCE, _SPACES = "timm_models.stages.", "timm_models.inference.", "nni_spaces.spaces."
_PROGRAM = f"{_STAGES}algorithm.ProgramStage"

EQUATIONS = (
    Equation("(1)", _ALGORITHMS + "methods.GradientDescent",
        test="test_algorithms.py::test_gradient_descent_is_the_feedforward_network_7"),
    Equation("(2)", _ALGORITHMS + "methods.HeavyBall",
        test="test_propagation.py::test_rule_16_is_the_heavy_ball_algorithm_2"),
    Equation("(3)", _ALGORITHMS + "methods.Nesterov", test="test_coefficients.py::test_theta_solves_its_quadratic"),
    Equation("(4)", _ALGORITHMS + "methods.NesterovSummed",
        test="test_coefficients.py::test_summed_form_4_gives_the_iterates_of_3"),
    Equation("(5)", _ALGORITHMS + "coefficients.nesterov_weights",
        test="test_coefficients.py::test_weights_follow_recursion_5_entry_by_entry"),
    Equation("(6)", _ALGORITHMS + "methods.LinearizedADMM",
        test="test_algorithms.py::test_admm_steps_minimise_what_6_says"),
    Equation("(7)", _UNROLLED, _PROGRAM,
        test="test_algorithms.py::test_gradient_descent_is_the_feedforward_network_7"),
    Equation("(8)", _ALGORITHMS + "objectives.Objective.value",
        test="test_objectives.py::test_gradient_9_is_the_gradient_of_8"),
    Equation("(9)", _ALGORITHMS + "objectives.Objective.grad",
        test="test_objectives.py::test_gradient_9_is_the_gradient_of_8"),
    Equation("(10)", _ALGORITHMS + "objectives.Objective.grad",
        test="test_objectives.py::test_propagation_is_gradient_descent_in_another_variable"),
    Equation("(11)", _UNROLLED, _PROGRAM, test="test_algorithms.py::test_heavy_ball_is_network_11"),
    Equation("(12)", _UNROLLED, _PROGRAM, test="test_algorithms.py::test_nesterov_is_network_12"),
    Equation("(13)", _UNROLLED, _PROGRAM,
        test="test_algorithms.py::test_summed_nesterov_is_network_13"),
    Equation("(14)", _UNROLLED, _PROGRAM, test="test_algorithms.py::test_admm_is_network_14"),
    Equation("(15)", "optinspired_plugins.simulation.train",
        test="test_simulation.py::test_training_is_the_stated_optimiser_on_the_stated_loss"),
    Equation("(16)", _RULES + "heavy_ball", _STAGES + "heavy_ball.HeavyBallStage",
        _MEMORY + "heavy_ball.reversible_heavy_ball", _INFERENCE + "stream_free.StreamFreeStage",
        "test_hbnet.py::test_forward_and_gradients_are_those_of_rule_16"),
    Equation("(17)", _RULES + "extrapolated", _PROGRAM,
        test="test_propagation.py::test_rule_17_with_nesterovs_momentum_is_network_12"),
    Equation("(18)", _RULES + "weighted_sums", _STAGES + "nesterov.SourceLayer",
        test="test_propagation.py::test_rule_18_without_beta_is_densenet"),
    Equation("(19)", _RULES + "concatenated", _STAGES + "nesterov.NesterovBlock",
        test="test_propagation.py::test_rule_19_concatenates_every_source"),
    Equation("(20)", _RULES + "two_path", _PROGRAM, test="test_optnet.py::test_dmrnet_is_the_last_row_of_table_3"),
    Equation("(21)", _RULES + "nesterov", _STAGES + "nesterov.NesterovBlock",
        _MEMORY + "dense_block.dense_block", _MEMORY + "dense_block.dense_block_inference",
        "test_agdnet.py::test_forward_and_gradients_are_those_of_rule_21"),
    Equation("(22)", _CELLS + "genotype.CellGenotype", _STAGES + "cell.Cell",
        test="test_cellnet.py::test_a_network_is_what_its_genotype_says"),
    Equation("(23)", _SPACES + "space.HBSpace", _SPACES + "algorithm_cell.HeavyBallCell",
        test="test_nni_spaces.py::test_a_supernets_cell_computes_its_equation_with_its_gradients"),
    Equation("(24)", _SPACES + "edges.MixedLayer", test="test_mixing.py::test_a_mixture_is_the_sum_of_its_edges"),
    Equation("(25)", _SPACES + "edges.MixedLayer.weights",
        test="test_nni_spaces.py::test_probabilities_are_reported_with_zero_and_beta"),
    Equation("(26)", _SPACES + "initialization.HeavyBallInit",
        test="test_nni_spaces.py::test_a_heavy_ball_supernet_begins_as_equation_26"),
    Equation("(27)", _SPACES + "space.DARTSSpace", _SPACES + "supernet.MixedCell",
        test="test_nni_spaces.py::test_a_supernets_cell_computes_its_equation_with_its_gradients"),
    Equation("(28)", _SPACES + "space.AGDSpace", _SPACES + "supernet.EdgeNormalizedCell",
        test="test_nni_spaces.py::test_a_supernets_cell_computes_its_equation_with_its_gradients"),
    Equation("(29)", _SPACES + "supernet.EdgeNormalizedCell.edge_weights",
        test="test_nni_spaces.py::test_probabilities_are_reported_with_zero_and_beta"),
    Equation("Table 1", _ALGORITHMS + "objectives.ACTIVATIONS",
        test="test_objectives.py::test_psi_has_the_derivative_phi_on_the_whole_line"),
    Equation("Table 3", _ALGORITHMS + "methods.ALGORITHMS", "timm_models.optnet.OptNet",
        test="test_optnet.py::test_dmrnet_is_the_last_row_of_table_3"),
    Equation("Table 6", _CELLS + "operations.OPERATIONS",
        test="test_operations.py::test_table_6_is_the_eight_of_darts_and_the_negative_identity"),
)  # fmt: skip
