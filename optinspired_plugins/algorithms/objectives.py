"""The objectives that feed-forward propagation minimises: Lemma 1 and Table 1.

For an activation Φ with Ψ' = Φ, and W symmetric positive definite with U = √W, the network x ← Φ(W x) is gradient
descent on f(z) = ‖z‖² / 2 − Σ_i Ψ(U_i^T z) (8) in the variable z = U x, because ∇f(z) = z − U Φ(U z) (9).

Three rows of the paper's Table 1 are misprinted; the forms here have the right derivative and are continuous:

- tanh: Ψ = u + log(e^{−2u} + 1);
- softsign, u ≤ 0: Ψ = −u − log(1 − u); the printed −u − log(u − 1) is not real there;
- ELU, u ≤ 0: Ψ = a (e^u − u − 1); without the −1, as printed, Ψ jumps by a at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "Objective", "dilogarithm_of_minus_exp"]

SERIES_TERMS = 60


def softplus(u: Tensor) -> Tensor:
    """Return log(1 + e^u); above 40 float64 cannot tell it from u, which torch returns there."""
    return F.softplus(u, threshold=40)


def dilogarithm_of_minus_exp(u: Tensor) -> Tensor:
    """Return Li_2(−e^u) for any real u, the polylogarithm of Table 1.

    For u ≤ 0 Landen's identity gives −Σ_k σ(u)^k / k² − softplus(u)² / 2. Since σ(u) ≤ ½, the sum of 60 terms has an
    error below 2^{−60} / 61² < 3e-22. For u > 0 the inversion is Li_2(−e^u) = −π²/6 − u²/2 − Li_2(−e^{−u}).

    Args:
        u: any shape, floating point.

    Returns:
        Same shape; differentiable, with derivative −softplus(u).
    """
    low = torch.where(u <= 0, u, -u)  # the derivative of |u| at 0 is 0 to torch
    share, power, series = torch.sigmoid(low), torch.ones_like(u), torch.zeros_like(u)
    for k in range(1, SERIES_TERMS + 1):
        power = power * share
        series = series + power / k**2
    value = -series - softplus(low) ** 2 / 2
    return torch.where(u <= 0, value, -(math.pi**2) / 6 - u**2 / 2 - value)


class Activation(NamedTuple):
    """An activation Φ and a Ψ with Ψ' = Φ, both elementwise."""

    phi: Callable[[Tensor], Tensor]
    psi: Callable[[Tensor], Tensor]


def leaky_relu(slope: float = 0.01) -> Activation:
    """Return leaky ReLU, slope α for u ≤ 0: Ψ = u² / 2 or α u² / 2."""
    return Activation(lambda u: F.leaky_relu(u, slope), lambda u: torch.where(u > 0, u**2, slope * u**2) / 2)


def elu(a: float = 1.0) -> Activation:
    """Return ELU, a (e^u − 1) for u ≤ 0: Ψ = u² / 2 or a (e^u − u − 1)."""
    # The clamp keeps an overflow of the other branch out of the gradient.
    return Activation(
        lambda u: F.elu(u, a), lambda u: torch.where(u > 0, u**2 / 2, a * (torch.expm1(u.clamp(max=0)) - u))
    )


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(torch.sigmoid, softplus),  # u + log(e^{−u} + 1)
    "tanh": Activation(torch.tanh, lambda u: u + softplus(-2 * u)),
    "softplus": Activation(softplus, lambda u: -dilogarithm_of_minus_exp(u)),  # C = 0
    "softsign": Activation(F.softsign, lambda u: u.abs() - torch.log1p(u.abs())),
    "relu": Activation(torch.relu, lambda u: torch.relu(u) ** 2 / 2),
    "leaky_relu": leaky_relu(),
    "elu": elu(),
    "swish": Activation(F.silu, lambda u: u**2 / 2 + u * softplus(-u) - dilogarithm_of_minus_exp(-u)),
}


class Objective:
    """The objective f (8) of an activation and a weight matrix, with its gradient (9).

    Args:
        activation: a name in :data:`ACTIVATIONS`, or an :class:`Activation`.
        weight: W, shape (n, n), symmetric positive definite, float32 or float64.

    Raises:
        ValueError: the name is unknown, or W is not a finite, symmetric, positive definite matrix.
    """

    def __init__(self, activation: str | Activation, weight: Tensor) -> None:
        if isinstance(activation, str):
            if activation not in ACTIVATIONS:
                raise ValueError(f"activation={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
            activation = ACTIVATIONS[activation]
        self.activation = activation
        self.weight = weight
        self.root = _square_root(weight)

    def value(self, z: Tensor) -> Tensor:
        """Return f(z), shape (...), for z of shape (..., n)."""
        return (z**2).sum(-1) / 2 - self.activation.psi(z @ self.root).sum(-1)

    def grad(self, z: Tensor) -> Tensor:
        """Return ∇f(z) = z − U Φ(U z), shape (..., n)."""
        return z - self.activation.phi(z @ self.root) @ self.root


def _square_root(weight: Tensor) -> Tensor:
    """Return U = √W by the eigendecomposition of a checked W."""
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: must be a square matrix")
    if not weight.isfinite().all():
        raise ValueError("weight has entries that are not finite: must be symmetric positive definite")
    asymmetry, scale = (weight - weight.T).abs().max().item(), weight.abs().max().item()
    if asymmetry > 100 * torch.finfo(weight.dtype).eps * scale:
        raise ValueError(f"weight differs from its transpose by {asymmetry:.2e}: must be symmetric")
    values, vectors = torch.linalg.eigh((weight + weight.T) / 2)
    if values[0] <= 0:
        raise ValueError(f"weight has an eigenvalue {values[0].item():.2e}: must be positive definite, all of them > 0")
    return (vectors * values.sqrt()) @ vectors.T
