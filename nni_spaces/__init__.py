"""Search spaces, initialisation and strategies for NNI: the heavy-ball and Nesterov spaces of section 9."""

from importlib.util import find_spec

for _host in ("nni", "pytorch_lightning"):
    if find_spec(_host) is None:
        raise ImportError(f"no module named {_host!r}: install the extra, pip install 'optinspired-plugins[nni]'")

from .cells import EdgeNormalizedCell, HeavyBallCell, MixedCell, MixedLayer  # noqa: E402
from .initialization import HeavyBallInit, RandomInit, ZeroInit  # noqa: E402
from .spaces import AGDSpace, DARTSSpace, HBSpace  # noqa: E402
from .strategies import DARTS, GumbelDARTS  # noqa: E402

__all__ = [
    "DARTS",
    "AGDSpace",
    "DARTSSpace",
    "EdgeNormalizedCell",
    "GumbelDARTS",
    "HBSpace",
    "HeavyBallCell",
    "HeavyBallInit",
    "MixedCell",
    "MixedLayer",
    "RandomInit",
    "ZeroInit",
]
