"""Strategies that sample networks, where NNI's need mending: TPE, and those that learn to sample by reinforcement.

``Random`` and ``RegularizedEvolution`` work as NNI has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from math import inf
from typing import Any

from nni.nas.oneshot.pytorch.sampling import EnasLightningModule
from nni.nas.strategy import ENAS as StockENAS
from nni.nas.strategy import TPE as StockTPE
from nni.nas.strategy import PolicyBasedRL

__all__ = ["ENAS", "TPE", "PolicyRL", "check_tuner_takes"]

TIANSHOU = "0.5."


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


def check_tianshou(strategy: str) -> None:
    """ImportError unless the tianshou that NNI 3.0 was written for is installed."""
    try:
        found = version("tianshou")
        version("gym")
    except PackageNotFoundError as error:
        found = f"no {error.name}"
    if not found.startswith(TIANSHOU):
        raise ImportError(
            f"{strategy} needs tianshou {TIANSHOU}x and gym, found {found}: pip install 'optinspired-plugins[rl]'"
        )


class TPE(StockTPE):
    """The tree-structured Parzen estimator, looking for high results: NNI's looks for low ones by default.

    Where it would repeat a network, after 28 to 66 of them on HBSpace, NNI's goes on along a grid instead.

    Args:
        seed: seed of what it draws.
        **tpe_args: NNI's, for instance ``n_startup_jobs``, the number of networks drawn at random first.

    Raises:
        ValueError: when it starts, if the space has a choice that NNI's tuners cannot express.
    """

    def __init__(self, seed: int | None = None, **tpe_args: Any) -> None:
        super().__init__("maximize", seed, tpe_args)

    def _initialize(self, model_space: Any, engine: Any) -> Any:
        check_tuner_takes(model_space)
        return super()._initialize(model_space, engine)


class PolicyRL(PolicyBasedRL):
    """Proximal policy optimisation over choices; arguments are those of NNI's ``PolicyBasedRL``.

    Raises:
        ImportError: tianshou is missing, or a later one, whose interface NNI 3.0 does not know.
    """

    def __init__(self, **kwargs: Any) -> None:
        check_tianshou(type(self).__name__)
        super().__init__(**kwargs)


class _ENASModule(EnasLightningModule):
    """NNI's module, whose policy learns when it has new results."""

    batches_per_update: float

    def training_step(self, batch_packed: tuple[Any, str], batch_idx: int) -> Any:
        """Take a step; one on a training batch leaves the policy alone.

        NNI's updates the policy on every batch that follows the last of so many results, until there is another.
        """
        every = self.batches_per_update
        try:
            if batch_packed[1] == "train":
                self.batches_per_update = inf
            return super().training_step(batch_packed, batch_idx)
        finally:
            self.batches_per_update = every


class ENAS(StockENAS):
    """A supernet whose paths a policy learns to sample (Pham et al. 2018).

    Since 2.1, Lightning gives a step its batch alone, and NNI's module then takes images for a batch and labels for
    what it says about them. Here every batch says which part it is of, and only results update the policy.

    Args:
        reward_metric_name: a metric that the evaluator's module logs in each validation step.
        **kwargs: NNI's, for instance ``batches_per_update``.

    Raises:
        ImportError: as for :class:`PolicyRL`.
    """

    def __init__(self, *, reward_metric_name: str = "val_top1", **kwargs: Any) -> None:
        check_tianshou(type(self).__name__)
        super().__init__(reward_metric_name=reward_metric_name, **kwargs)

    def configure_oneshot_module(self, training_module: Any) -> Any:
        """Return NNI's module with our step."""
        module = super().configure_oneshot_module(training_module)
        module.__class__ = _ENASModule
        return module

    def train_dataloader(self, train_dataloader_fn: Callable[[], Any], val_dataloader_fn: Callable[[], Any]) -> Any:
        """Return the training batches, then the validation ones, each with its part's name."""
        return _Parts(train=train_dataloader_fn(), val=val_dataloader_fn())


class _Parts:
    """Loaders one after the other; their items are (batch, name), as NNI's module asks for."""

    def __init__(self, **loaders: Any) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        return chain.from_iterable(((batch, name) for batch in loader) for name, loader in self.loaders.items())
