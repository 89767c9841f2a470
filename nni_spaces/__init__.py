"""Search spaces, initialisation and strategies for NNI (section 9 of the paper).

With the paper open:

- (23) ``x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2})``: ``spaces/heavy_ball_cell.py``
- (24), (25) the mixed operation: ``spaces/mixed_op.py``, and its weights softmax(α): ``spaces/edges.py``
- (26) the heavy-ball initialisation: ``spaces/initialization.py``
- (27), (28), (29) the DARTS and AGD cells: ``spaces/supernet.py``
- §9.3 the settings of a search and of a retraining: ``runs/settings.py``, and the derivation of a cell:
  ``spaces/derivation.py``

Importing this package loads neither NNI nor torch: attributes are loaded on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module

_EXPORTS = {
    "AGDSpace": "spaces.space",
    "DARTSSpace": "spaces.space",
    "HBSpace": "spaces.space",
    "HeavyBallCell": "spaces.heavy_ball_cell",
    "EdgeNormalizedCell": "spaces.supernet",
    "MixedCell": "spaces.supernet",
    "MixedLayer": "spaces.edges",
    "HeavyBallInit": "spaces.initialization",
    "RandomInit": "spaces.initialization",
    "ZeroInit": "spaces.initialization",
    "derive": "spaces.derivation",
    "limit_skips": "spaces.derivation",
    "strongest_candidates": "spaces.derivation",
    "DARTS": "strategies.differentiable",
    "GumbelDARTS": "strategies.differentiable",
    "TPE": "strategies.sampling",
    "SearchSettings": "runs.settings",
    "RetrainSettings": "runs.settings",
    "search": "runs.search",
    "retrain": "runs.retrain",
    "Trial": "trials.run",
    "read_trials": "trials.run",
    "run_trials": "trials.run",
    "TrialEvaluator": "trials.evaluator",
    "quiet_hosts": "_nni",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
