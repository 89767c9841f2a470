"""Search spaces, initialisation and strategies for NNI (section 9 of the paper).

``AlgorithmSpace`` is the search space of any algorithm; ``HBSpace`` and ``AGDSpace`` are two of them.

With the paper open:

- (23) ``x_t = o_1(x_{t−1}) + o_2(x_{t−1}) + o_3(x_{t−2})``: ``spaces/algorithm_cell.py``
- (24), (25) the mixed operation: ``spaces/mixed_op.py``, and its weights softmax(α): ``spaces/edges.py``
- (26) the heavy-ball initialisation: ``spaces/initialization.py``
- (27), (28), (29) the DARTS and AGD cells: ``spaces/supernet.py``
- §9.3 the settings of a search and of a retraining: ``runs/settings.py``, and the derivation of a cell:
  ``spaces/derivation.py``

Importing this package loads neither NNI nor torch: attributes are loaded on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module

_NAMES = {
    "spaces.space": "AGDSpace AlgorithmSpace DARTSSpace HBSpace",
    "spaces.algorithm_cell": "AlgorithmCell HeavyBallCell",
    "spaces.supernet": "EdgeNormalizedCell MixedCell",
    "spaces.edges": "MixedLayer",
    "spaces.initialization": "AlgorithmInit HeavyBallInit RandomInit ZeroInit",
    "spaces.derivation": "derive limit_skips strongest_candidates",
    "strategies.differentiable": "DARTS GumbelDARTS",
    "strategies.fair": "FairDARTS",
    "strategies.sampling": "TPE",
    "strategies.collapse": "EigenvalueStop SkipStop",
    "runs.settings": "SearchSettings RetrainSettings",
    "runs.search": "search",
    "runs.retrain": "retrain",
    "trials.run": "Trial read_trials run_trials",
    "trials.evaluator": "TrialEvaluator",
    "trials.study": "save_study study_trials suggest_sample",
    "_nni": "quiet_hosts",
}
_EXPORTS = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
