"""Search steps of our spaces, and of NNI's DARTS on NNI's network."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["SPACES", "search_modules", "search_steps"]

# Spaces whose steps are compared with NNI's DARTS: the paper's two in both forms, then other algorithms.
SPACES = (
    *("hb", "hb checkpointing", "agd", "agd checkpointing"),
    *("gd", "admm", "dmrnet", "tmm", "chebyshev", "ogm", "km", "halpern"),
)


def search_steps(names: Sequence[str], batch: int, size: int, channels: int, cells: int) -> list[Callable[[], Any]]:
    """Return functions that step α and the weights once. See :func:`search_modules` for the arguments."""
    images, labels = torch.randn(2 * batch, 3, size, size), torch.randint(10, (2 * batch,))
    step_batch = {"train": (images[:batch], labels[:batch]), "val": (images[batch:], labels[batch:])}
    modules = search_modules(names, batch, size, channels, cells)
    return [lambda module=module: module.training_step(step_batch, 1) for module in modules]


def search_modules(names: Sequence[str], batch: int, size: int, channels: int, cells: int) -> list[Any]:
    """Return NNI's modules after one step, which creates their optimisers.

    Args:
        names: ``"hb"``, ``"agd"``, ``"darts"`` or an algorithm's name, optionally followed by ``" checkpointing"``; or
            ``"peer"``, NNI's.
        batch: images per step.
        size: side of an image.
        channels: channels of the first cells.
        cells: number of cells.
    """
    warnings.filterwarnings("ignore")
    import nni_spaces._nni  # the hosts set their levels when they are imported

    for name in ("nni", "pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    images, labels = torch.randn(2 * batch, 3, size, size), torch.randint(10, (2 * batch,))
    modules = []
    for name in names:
        kind, _, form = name.partition(" ")
        if kind == "peer":
            from nni.nas.hub.pytorch import DARTS as HubDARTS
            from nni.nas.strategy import DARTS as StockDARTS

            space: Any = HubDARTS(width=channels, num_cells=cells, dataset="cifar")
            module = _ready(space, StockDARTS(gradient_clip_val=5.0), images, labels, last=False)
        else:
            spaces = {"hb": nni_spaces.HBSpace, "agd": nni_spaces.AGDSpace, "darts": nni_spaces.DARTSSpace}
            make = spaces.get(kind, partial(nni_spaces.AlgorithmSpace, kind))
            space = make(channels=channels, cells=cells, grad_checkpointing=bool(form))
            module = _ready(space, nni_spaces.DARTS(), images, labels, last=True)
        modules.append(module)
    return modules


def _ready(space: Any, strategy: Any, images: Tensor, labels: Tensor, last: bool) -> Any:
    """Return NNI's module after one step, which creates its optimisers."""
    from nni.nas.evaluator.pytorch import Lightning, Trainer
    from nni.nas.execution import SequentialExecutionEngine
    from nni.nas.space import RawFormatModelSpace

    from nni_spaces.runs.search import SearchModule

    class Module(SearchModule):
        """The search's module, without its channels-last conversion for NNI's network."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if last else self.model(x)

    loader = DataLoader(TensorDataset(images, labels), len(images) // 2)
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(max_epochs=1, limit_train_batches=1, accelerator="auto", default_root_dir=folder, **quiet)
        evaluator = Lightning(Module(0.025, 0.9, 3e-4, 50), trainer, train_dataloaders=loader, val_dataloaders=loader)
        strategy(RawFormatModelSpace(space, evaluator), SequentialExecutionEngine())
    module = strategy.oneshot_module.train()
    if not last:
        module.training_module.model.to(memory_format=torch.contiguous_format)
    for part in (module, module.training_module):  # without a trainer there is no logger
        part.log = part.log_dict = part.log_probs = lambda *args, **kwargs: None
    return module
