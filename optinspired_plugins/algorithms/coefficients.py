"""Coefficients of Nesterov's accelerated gradient descent: equations (3) and (5) of the paper.

They are float64 tensors, computed from one recursion, and used by the optimiser, the networks and the tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_int

__all__ = ["constant_momentum", "momentum", "nesterov_weights", "theta"]


def theta(n: int) -> Tensor:
    """θ_0..θ_n of (3): θ_0 = 1 and (1 − θ_k) / θ_k² = 1 / θ_{k−1}².

    The positive root of that quadratic, written without cancellation, is θ_k = 2 / (1 + √(1 + 4 / θ_{k−1}²)).

    Args:
        n: index of the last term, n ≥ 0.

    Returns:
        float64, shape (n + 1,), strictly decreasing from 1.

    Raises:
        ValueError: n is negative.
    """
    check_int("n", n, 0)
    values = [1.0]
    for _ in range(n):
        values.append(2 / (1 + math.sqrt(1 + 4 / values[-1] ** 2)))
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def momentum(n: int) -> Tensor:
    """β_1..β_n of (12): β_k = θ_k (1 − θ_{k−1}) / θ_{k−1}; β_1 = 0 and β_k → 1.

    Args:
        n: number of terms, n ≥ 0.

    Returns:
        float64, shape (n,).

    Raises:
        ValueError: n is negative.
    """
    t = theta(n)
    return t[1:] * (1 - t[:-1]) / t[:-1]


def nesterov_weights(n: int) -> Tensor:
    """h_{k,j} of (5): the weights of past gradients in the summed form (4) of Nesterov's method.

    With c_k = β_{k+1}: h_{k+1,j} = c_k h_{k,j} for j ≤ k − 2, h_{k+1,k−1} = c_k (h_{k,k−1} − 1), h_{k+1,k} = 1 + c_k.
    Since θ_0 = 1, c_0 = 0: h_{1,0} = 1 and h_{k,0} = 0 for every k ≥ 2.

    Args:
        n: number of rows, n ≥ 0.

    Returns:
        float64 lower triangular, shape (n, n): row k − 1 holds h_{k,0}..h_{k,k−1}.

    Raises:
        ValueError: n is negative.
    """
    c = momentum(n)
    h = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    for k in range(n):
        if k:
            h[k, :k] = c[k] * h[k - 1, :k]
            h[k, k - 1] -= c[k]
        h[k, k] = 1 + c[k]
    return h


def constant_momentum(smoothness: float, strong_convexity: float) -> float:
    """The momentum for a strongly convex objective (footnote 5): (√L − √μ) / (√L + √μ).

    Args:
        smoothness: L, the Lipschitz constant of the gradient.
        strong_convexity: μ, 0 < μ ≤ L.

    Raises:
        ValueError: not 0 < μ ≤ L < ∞.
    """
    if not 0 < strong_convexity <= smoothness < math.inf:
        raise ValueError(
            f"smoothness={smoothness!r}, strong_convexity={strong_convexity!r}: must obey 0 < strong_convexity ≤ "
            "smoothness < ∞"
        )
    root_l, root_mu = math.sqrt(smoothness), math.sqrt(strong_convexity)
    return (root_l - root_mu) / (root_l + root_mu)
