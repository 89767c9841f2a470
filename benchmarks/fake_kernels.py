"""The kernels of a GPU on fake tensors: they allocate their results, and report the bytes that they would move."""

# ruff: noqa: D102  methods are described where the kernels are
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from optinspired_plugins.memory.channel_kernels import Gradients, Iterate

__all__ = ["FakeKernels", "fake_kernels"]

MODULES = ("timm_models.stages.fused", "timm_models.stages.heavy_ball", "timm_models.stages.nesterov")


class FakeKernels:
    """The functions of :mod:`optinspired_plugins.memory.triton_kernels` without values.

    Args:
        log: called with the name of a function, its bytes and its launches.
    """

    def __init__(self, log: Callable[[str, int, int], None]) -> None:
        self.log = log

    def _report(self, name: str, launches: int, *images: Tensor | None) -> None:
        self.log(name, sum(x.numel() * x.element_size() for x in images if x is not None), launches)

    def moments(self, x: Tensor, out: Tensor) -> None:
        self._report("moments", 2, x)

    def affine_of(self, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        self._report("affine_of", 1)
        return torch.empty(4, len(weight), device=weight.device)

    def affine_of_moments(self, of: Tensor, count: int, weight: Tensor, *rest: Any) -> Tensor:
        self._report("affine_of_moments", 1)
        return torch.empty(4, len(weight), device=weight.device)

    def normalization(self, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        self._report("normalization", 2, x)
        return torch.empty(4, len(weight), device=weight.device)

    def rectified(self, x: Tensor, affine: Tensor, factor: Tensor | None = None) -> Tensor:
        self._report("rectified", 1, x, x)
        return _like(x)

    def add(
        self, factors: Any, x: Tensor, affine: Any, *terms: Iterate, wide: bool = False, out: Any = None
    ) -> Iterate:
        low = None
        if wide and x.dtype != torch.float32:
            low = _like(x) if out is None or out.low is None else out.low
        result = Iterate(_like(x) if out is None else out.high, low)
        self._report("add", 1, x, *result, *(part for term in terms for part in term))
        return result

    def gradient_sums(self, g: Tensor, x: Tensor, affine: Tensor, *rest: Any) -> Gradients:
        self._report("gradient_sums", 2, g, x)
        out = torch.empty(5, x.shape[1], device=x.device)
        return Gradients(out[0], out[1], out[2], out[3:])

    def gradient_of_input(
        self,
        g: Tensor,
        x: Tensor,
        affine: Tensor,
        coefficients: Tensor | None,
        rectify: bool,
        factor: Tensor | None = None,
        into: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        self._report("gradient_of_input", 1, g, x, x, into)
        if into is not None:
            return into
        return _like(x) if out is None else out

    def dots(self, g: Tensor, *iterates: Iterate) -> Tensor:
        self._report("dots", 2, g, *(part for iterate in iterates for part in iterate))
        return torch.empty(len(iterates), device=g.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@contextmanager
def fake_kernels(log: Callable[[str, int, int], None] = lambda *_: None) -> Iterator[None]:
    """Use the kernels of a GPU for fake images that they support."""
    kernels = FakeKernels(log)

    def kernels_for(x: Tensor) -> Any:
        is_supported = x.dtype != torch.float64 and x.is_contiguous(memory_format=torch.channels_last)
        return kernels if is_supported and type(x) in (torch._subclasses.FakeTensor, torch.nn.Parameter) else None

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch(f"{module}.kernels_for", kernels_for))
        yield
