"""Search spaces, initialisation and strategies for NNI: the heavy-ball and Nesterov spaces of section 9."""

import io
import warnings
from contextlib import redirect_stderr
from importlib.util import find_spec

for _host in ("nni", "pytorch_lightning"):
    if find_spec(_host) is None:
        raise ImportError(f"no module named {_host!r}: install the extra, pip install 'optinspired-plugins[nni]'")

if find_spec("gym") is not None:
    # NNI's PolicyRL needs gym, which prints at every import that it has a successor.
    with redirect_stderr(io.StringIO()):
        import gym  # noqa: F401

with warnings.catch_warnings():
    # NNI wraps every class in torch.nn, and warns of those of newer versions of torch that are no modules.
    warnings.filterwarnings("ignore", ".* is found to be not a nn.Module", RuntimeWarning)
    import nni.nas.nn.pytorch  # noqa: F401

from .spaces.derivation import derive, limit_skips, strongest_candidates  # noqa: E402
from .spaces.edges import MixedLayer  # noqa: E402
from .spaces.heavy_ball_cell import HeavyBallCell  # noqa: E402
from .spaces.initialization import HeavyBallInit, RandomInit, ZeroInit  # noqa: E402
from .spaces.space import AGDSpace, DARTSSpace, HBSpace  # noqa: E402
from .spaces.supernet import EdgeNormalizedCell, MixedCell  # noqa: E402
from .strategies.differentiable import DARTS, GumbelDARTS  # noqa: E402
from .strategies.sampling import ENAS, TPE, PolicyRL  # noqa: E402
from .trials.evaluator import TrialEvaluator  # noqa: E402
from .trials.run import Trial, TrialExperiment, read_trials, run_trials, sequential_config  # noqa: E402

__all__ = [
    "DARTS",
    "ENAS",
    "TPE",
    "AGDSpace",
    "DARTSSpace",
    "EdgeNormalizedCell",
    "GumbelDARTS",
    "HBSpace",
    "HeavyBallCell",
    "HeavyBallInit",
    "MixedCell",
    "MixedLayer",
    "PolicyRL",
    "RandomInit",
    "Trial",
    "TrialEvaluator",
    "TrialExperiment",
    "ZeroInit",
    "derive",
    "limit_skips",
    "read_trials",
    "run_trials",
    "sequential_config",
    "strongest_candidates",
]
