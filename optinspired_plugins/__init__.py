"""The mathematics shared by the networks, spaces and tools of optinspired-plugins.

An optimisation algorithm becomes a network when its gradient is replaced by ``∇f(z) = z − T(z)`` with ``T`` a layer
(Yang et al., "Optimization-inspired Manual Architecture Design and Neural Architecture Search"). Importing this
package costs nothing: attributes are loaded on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "ALGORITHMS": "algorithms",
    "GradientDescent": "algorithms",
    "HeavyBall": "algorithms",
    "LinearizedADMM": "algorithms",
    "Nesterov": "algorithms",
    "NesterovSummed": "algorithms",
    "load_algorithm": "algorithms",
    "minimize": "algorithms",
    "constant_momentum": "coefficients",
    "momentum": "coefficients",
    "nesterov_weights": "coefficients",
    "theta": "coefficients",
    "GENOTYPES": "genotype",
    "Genotype": "genotype",
    "load_genotype": "genotype",
    "ACTIVATIONS": "objectives",
    "Objective": "objectives",
    "OPERATIONS": "operations",
    "make_operation": "operations",
    "TwoPath": "propagation",
    "Unrolled": "propagation",
    "concatenated": "propagation",
    "extrapolated": "propagation",
    "heavy_ball": "propagation",
    "nesterov": "propagation",
    "nesterov_coefficients": "propagation",
    "two_path": "propagation",
    "weighted_sums": "propagation",
    "trace": "tracing",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
