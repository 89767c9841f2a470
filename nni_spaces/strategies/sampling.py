"""TPE, which samples networks; NNI's ``Random`` and ``RegularizedEvolution`` need no change."""

from __future__ import annotations

from typing import Any

import nni_spaces._nni  # noqa: F401

from nni.nas.strategy import TPE as StockTPE

__all__ = ["TPE", "check_tuner_takes"]


def check_tuner_takes(space: Any) -> None:
    """ValueError where a space has a choice that NNI's tuners cannot express."""
    for label, mutable in space.simplify().items():
        try:
            mutable.as_legacy_dict()
        except NotImplementedError:
            raise ValueError(
                f"strategy=TPE: NNI's tuners have no {type(mutable).__name__}, which {label!r} is: cells that choose "
                "their inputs need Random or RegularizedEvolution; HBSpace chooses none and takes TPE"
            ) from None


class TPE(StockTPE):
    """The tree-structured Parzen estimator, maximising the result; NNI's minimises it by default.

    Where it would repeat a network, after 28 to 66 networks on HBSpace, NNI's estimator continues along a grid.

    Args:
        seed: seed of its draws.
        **tpe_args: NNI's, for instance ``n_startup_jobs``, the number of networks drawn at random first.

    Raises:
        ValueError: when it starts, if the space has a choice that NNI's tuners cannot express.
    """

    def __init__(self, seed: int | None = None, **tpe_args: Any) -> None:
        super().__init__("maximize", seed, tpe_args)

    def _initialize(self, model_space: Any, engine: Any) -> Any:
        check_tuner_takes(model_space)
        return super()._initialize(model_space, engine)
