"""The paper in torch, without a host: algorithms, propagation rules, cells, kernels and figures.

An optimisation algorithm becomes a network when its gradient is replaced by ``∇f(z) = z − T(z)`` with ``T`` a layer
(Yang et al., "Optimization-inspired Manual Architecture Design and Neural Architecture Search"). With the paper open:

- (1)-(6): ``algorithms/methods.py``; (8)-(9), Table 1: ``algorithms/objectives.py``;
- (7), (11)-(14): ``propagation/unrolled.py``;
- (16): ``propagation/rules.py``, ``heavy_ball``; as a stage ``timm_models/stages/heavy_ball.py``;
- (21): ``propagation/rules.py``, ``nesterov``; as a block ``timm_models/stages/nesterov.py``;
- (23)-(29): ``nni_spaces/spaces/``, (28) in ``supernet.py``; Table 6: ``cells/operations.py``;
- coefficients change in ``algorithms/coefficients.py`` (θ, momentum, h) and, for (21), in
  ``propagation/rules.py``, ``nesterov_coefficients``.

``propagation/rules.py`` ends with a table of all equations. Importing this package loads no torch: attributes are
loaded on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_NAMES = {
    "algorithms.methods": "ALGORITHMS GradientDescent HeavyBall LinearizedADMM Nesterov "
    "NesterovSummed load_algorithm minimize",
    "algorithms.coefficients": "constant_momentum momentum nesterov_weights theta",
    "cells.genotype": "GENOTYPES Genotype load_genotype",
    "algorithms.objectives": "ACTIVATIONS Objective",
    "cells.operations": "OPERATIONS make_operation register_operation",
    "propagation.unrolled": "TwoPath Unrolled",
    "propagation.rules": "concatenated extrapolated heavy_ball nesterov nesterov_coefficients two_path weighted_sums",
    "propagation.patterns": "pattern",
    "propagation.tracing": "trace",
}
_EXPORTS = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
