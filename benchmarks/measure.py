"""Time of alternating functions, and peak memory of tensors."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Ratio", "interleaved", "peak_memory", "ratio"]


class Ratio(NamedTuple):
    """Median and quartiles of the ratios of paired runs."""

    median: float
    low: float
    high: float


class _Peak(TorchDispatchMode):
    """Counter of the bytes of live storages."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in before | self.sizes.keys():
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_memory(function: Callable[[], Any]) -> int:
    """Return the peak memory of a function's tensors in bytes.

    Tensors that exist before the call do not count. On the CPU, the storages of all results of operations are counted;
    temporary memory inside an operation is not. On CUDA, the number is the allocator's.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Peak() as peak:
        function()
    return peak.peak


def seconds(function: Callable[[], Any]) -> float:
    """Return the duration of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(functions: Sequence[Callable[[], Any]], rounds: int, warm_up: int = 1) -> list[list[float]]:
    """Return the seconds of each function's calls; the order rotates from round to round."""
    for function in [*functions] * warm_up:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds):
        for i in range(len(functions)):
            i = (i + round_) % len(functions)
            times[i].append(seconds(functions[i]))
    return times


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Return our time divided by the peer's, round by round."""
    ratios = [a / b for a, b in zip(ours, peer)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)
