"""Algorithms beyond section 3, with the same protocol of three methods.

Gradient methods for an L-smooth, μ-strongly convex f, κ = L/μ: :class:`TwoStep`, of which the heavy ball, Nesterov's
method and triple momentum are points, and :class:`Chebyshev`. For a convex f without μ: :class:`OptimizedGradient`.
Fixed-point iterations for a nonexpansive T(z) =
z − ∇f(z): :class:`KrasnoselskiiMann` and :class:`Halpern`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from .methods import Gradient, HeavyBallState, check_coefficient

__all__ = [
    "FASTER",
    "Chebyshev",
    "ChebyshevState",
    "Halpern",
    "HalpernState",
    "KrasnoselskiiMann",
    "OptimizedGradient",
    "OptimizedGradientState",
    "TwoStep",
]


class TwoStep:
    """The two-step method with a gradient between both iterates.

    y_k = z_k + γ (z_k − z_{k−1}), z_{k+1} = z_k + β (z_k − z_{k−1}) − α ∇f(y_k), with z_{−1} = z_0. The result is
    z_k + δ (z_k − z_{k−1}). γ = δ = 0 is the heavy ball, and γ = β, δ = 0 is Nesterov's method with constant momentum.

    Args:
        alpha: α, the step size, finite.
        beta: β, finite.
        gamma: γ, finite.
        delta: δ, finite.

    Raises:
        ValueError: a coefficient is not finite.
    """

    def __init__(
        self,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 0.0,
        gamma: float | Tensor = 0.0,
        delta: float | Tensor = 0.0,
    ) -> None:
        self.alpha, self.beta = check_coefficient("alpha", alpha), check_coefficient("beta", beta)
        self.gamma, self.delta = check_coefficient("gamma", gamma), check_coefficient("delta", delta)

    @classmethod
    def triple_momentum(cls, smoothness: float = 1.0, strong_convexity: float = 0.1) -> TwoStep:
        """Return the triple momentum method (Van Scoy, Freeman and Lynch 2018).

        Its distance to the minimiser decreases like ρ^k with ρ = 1 − √(μ/L) for every f of the class.

        Raises:
            ValueError: not 0 < μ ≤ L < ∞.
        """
        rho = 1 - math.sqrt(_inverse_condition(smoothness, strong_convexity))
        beta = rho**2 / (2 - rho)
        return cls((1 + rho) / smoothness, beta, beta / (1 + rho), rho**2 / (1 - rho**2))

    @classmethod
    def robust_momentum(cls, rho: float, smoothness: float = 1.0, strong_convexity: float = 0.1) -> TwoStep:
        """Return the robust momentum method (Cyrus, Hu, Van Scoy and Lessard 2018) with the rate ρ.

        ρ = 1 − √(μ/L) is triple momentum's z_k, and ρ = 1 − μ/L is gradient descent with the step size 1/L.

        Raises:
            ValueError: not 0 < μ < L < ∞, or ρ is not between these two.
        """
        inverse = _inverse_condition(smoothness, strong_convexity)
        if inverse == 1:
            raise ValueError(f"strong_convexity={strong_convexity!r}: must be < smoothness={smoothness!r}")
        if not 1 - math.sqrt(inverse) <= rho <= 1 - inverse:
            raise ValueError(f"rho={rho!r}: must be from {1 - math.sqrt(inverse):.4g} to {1 - inverse:.4g}")
        kappa = 1 / inverse
        alpha = kappa * (1 - rho) ** 2 * (1 + rho) / smoothness
        return cls(alpha, kappa * rho**3 / (kappa - 1), rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho)))

    def init(self, x0: Tensor) -> HeavyBallState:
        """Return the state z_0 = z_{−1} = x0."""
        return HeavyBallState(x0, x0)

    def step(self, state: HeavyBallState, grad: Gradient) -> HeavyBallState:
        """Return the state z_{k+1}, z_k."""
        z, z_prev = state
        y = z + self.gamma * (z - z_prev)
        return HeavyBallState(z + self.beta * (z - z_prev) - self.alpha * grad(y), z)

    def result(self, state: HeavyBallState) -> Tensor:
        """Return z_k + δ (z_k − z_{k−1})."""
        return state.z + self.delta * (state.z - state.z_prev)


class ChebyshevState(NamedTuple):
    """z_k, z_{k−1} and ω_k."""

    z: Tensor
    z_prev: Tensor
    omega: float


class Chebyshev:
    """Chebyshev's semi-iteration, optimal in every number of steps on quadratics with eigenvalues in [μ, L].

    z_{k+1} = z_{k−1} + ω_{k+1} (z_k − z_{k−1} − α ∇f(z_k)) with α = 2/(L + μ), σ = (L − μ)/(L + μ), ω_1 = 1,
    ω_2 = 1/(1 − σ²/2) and ω_{k+1} = 1/(1 − σ² ω_k/4). After k steps the largest factor of an error is
    1/C_k(1/σ), C_k Chebyshev's polynomial (Golub and Varga 1961).

    Args:
        smoothness: L.
        strong_convexity: μ.

    Raises:
        ValueError: not 0 < μ ≤ L < ∞.
    """

    def __init__(self, smoothness: float = 1.0, strong_convexity: float = 0.1) -> None:
        inverse = _inverse_condition(smoothness, strong_convexity)
        self.alpha, self.sigma = 2 / (smoothness + strong_convexity), (1 - inverse) / (1 + inverse)

    def init(self, x0: Tensor) -> ChebyshevState:
        """Return the state z_0 = z_{−1} = x0."""
        return ChebyshevState(x0, x0, 0.0)

    def step(self, state: ChebyshevState, grad: Gradient) -> ChebyshevState:
        """Return the state z_{k+1}, z_k, ω_{k+1}."""
        z, z_prev, omega = state
        following = 1.0 if omega == 0 else 1 / (1 - self.sigma**2 * omega / (2 if omega == 1 else 4))
        return ChebyshevState(z_prev + following * (z - z_prev - self.alpha * grad(z)), z, following)

    def result(self, state: ChebyshevState) -> Tensor:
        """Return z_k."""
        return state.z


class OptimizedGradientState(NamedTuple):
    """x_k, z_k and t_k."""

    x: Tensor
    z: Tensor
    t: float


class OptimizedGradient:
    """The optimised gradient method (Kim and Fessler 2016).

    z_{k+1} = x_k − ∇f(x_k), t_{k+1} = (1 + √(1 + 4 t_k²))/2 with t_0 = 1, and
    x_{k+1} = z_{k+1} + (t_k − 1)/t_{k+1} (z_{k+1} − z_k) + t_k/t_{k+1} (z_{k+1} − x_k). Without the last term it is
    Nesterov's method. For a convex f with L = 1 and a minimiser z*, f(z_{k+1}) − f(z*) ≤ ‖z_0 − z*‖² / (4 t_k²), half
    of the bound of Nesterov's method (Kim and Fessler 2017).
    """

    def init(self, x0: Tensor) -> OptimizedGradientState:
        """Return the state x_0 = z_0 = x0, t_0 = 1."""
        return OptimizedGradientState(x0, x0, 1.0)

    def step(self, state: OptimizedGradientState, grad: Gradient) -> OptimizedGradientState:
        """Return the state x_{k+1}, z_{k+1}, t_{k+1}."""
        x, z, t = state
        following, t_next = x - grad(x), (1 + math.sqrt(1 + 4 * t**2)) / 2
        x_next = following + (t - 1) / t_next * (following - z) + t / t_next * (following - x)
        return OptimizedGradientState(x_next, following, t_next)

    def result(self, state: OptimizedGradientState) -> Tensor:
        """Return z_k."""
        return state.z


class KrasnoselskiiMann:
    """The averaged iteration z_{k+1} = z_k − θ ∇f(z_k) = (1 − θ) z_k + θ T(z_k).

    For a nonexpansive T with a fixed point z*, ‖z_k − T(z_k)‖ ≤ ‖z_0 − z*‖ / √(θ (1 − θ) (k + 1)).

    Args:
        theta: θ, finite; between 0 and 1 in the theory.

    Raises:
        ValueError: ``theta`` is not finite.
    """

    def __init__(self, theta: float | Tensor = 0.5) -> None:
        self.theta = check_coefficient("theta", theta)

    def init(self, x0: Tensor) -> Tensor:
        """Return the state z_0 = x0."""
        return x0

    def step(self, state: Tensor, grad: Gradient) -> Tensor:
        """Return the state z_{k+1}."""
        return state - self.theta * grad(state)

    def result(self, state: Tensor) -> Tensor:
        """Return z_k."""
        return state


class HalpernState(NamedTuple):
    """z_k, z_0 and k."""

    z: Tensor
    anchor: Tensor
    k: int


class Halpern:
    """The anchored iteration z_{k+1} = z_0 / (k + 2) + (k + 1)/(k + 2) T(z_k), T(z) = z − ∇f(z).

    For a nonexpansive T with a fixed point z*, ‖z_k − T(z_k)‖ ≤ 2 ‖z_0 − z*‖ / (k + 1), the best possible bound
    (Lieder 2021). The input always has a weight ≥ 1/(k + 1) in z_k.
    """

    def init(self, x0: Tensor) -> HalpernState:
        """Return the state z_0 = x0."""
        return HalpernState(x0, x0, 0)

    def step(self, state: HalpernState, grad: Gradient) -> HalpernState:
        """Return the state z_{k+1}."""
        z, anchor, k = state
        weight = 1 / (k + 2)
        return HalpernState(weight * anchor + (1 - weight) * (z - grad(z)), anchor, k + 1)

    def result(self, state: HalpernState) -> Tensor:
        """Return z_k."""
        return state.z


FASTER: dict[str, Any] = {
    "tmm": TwoStep.triple_momentum,
    "chebyshev": Chebyshev,
    "ogm": OptimizedGradient,
    "km": KrasnoselskiiMann,
    "halpern": Halpern,
}


def _inverse_condition(smoothness: float, strong_convexity: float) -> float:
    """Return μ/L; ValueError unless 0 < μ ≤ L < ∞."""
    if not 0 < strong_convexity <= smoothness < math.inf:
        raise ValueError(
            f"smoothness={smoothness!r}, strong_convexity={strong_convexity!r}: must obey "
            "0 < strong_convexity ≤ smoothness < inf"
        )
    return strong_convexity / smoothness
