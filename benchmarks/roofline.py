"""Predict time and memory of a training step on a GPU that is not there.

    python benchmarks/roofline.py --out benchmarks/results/roofline.csv
    python benchmarks/roofline.py --search --out benchmarks/results/roofline_search.csv
    python benchmarks/roofline.py hbnet50 hbnet50:reversible --gpu rtx3090 --top 10

A step runs on fake CUDA tensors (:mod:`fake_cuda`), and every operation that launches kernels is logged, with this
package's own kernels (:mod:`fake_kernels`). The predicted
time is Σ max(bytes / bandwidth, FLOPs / (0.6 · peak), launches · 4 µs) over the operations. Bytes count each input and
output once; a training batch normalisation reads its input twice. The peak follows the storages of all tensors.

Ratios within a family, launches and bytes are better than absolute times: ``--calibrate`` compares those with the
figures that timm publishes for an RTX 3090.
"""

from __future__ import annotations

if __name__ == "__main__":
    import fake_cuda

    fake_cuda.install()  # before torch

import argparse
import collections
import csv
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fake_cuda import convolution_layout, to_fake
from fake_cuda import fake_cuda as on_fake_cuda
from fake_kernels import fake_kernels
from search_step import SPACES
from speed_and_memory import Form
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Card(NamedTuple):
    """Bandwidth in bytes per second, and peak of half precision in FLOPs per second."""

    bandwidth: float
    peak: float


CARDS = {"h100": Card(3.0e12, 8e14), "rtx3090": Card(0.936e12 * 0.9, 71e12)}
LAUNCH, EFFICIENCY = 4e-6, 0.6  # seconds per kernel; the share of the peak that convolutions reach
CASES = [
    *(("hbnet50", form, "resnet50") for form in ("default", "checkpointing", "reversible", "learn_beta")),
    ("resnet50", "checkpointing", "resnet50"),
    *(("hbnet152", form, "resnet152") for form in ("default", "checkpointing", "reversible")),
    ("resnet152", "checkpointing", "resnet152"),
    *(("agdnet121", form, "densenet121") for form in ("default", "checkpointing", "plain")),
    ("densenet121", "memory_efficient", "densenet121"),
]
# Search steps: one step of the weights, one step of α, in float32.
SEARCH = [
    (f"{kind} space", form or "default", "NNI's DARTS") for kind, _, form in (name.partition(" ") for name in SPACES)
]
# Samples per second, batch: timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv.
PUBLISHED = {
    "resnet18": (3481.78, 512),
    "resnet50": (1218.01, 512),
    "resnet152": (501.44, 192),
    "densenet121": (913.65, 256),
    "densenet201": (562.52, 192),
}
FIELDS = [
    *("model", "form", "peer", "gpu", "batch", "size", "dtype", "layout", "launches", "gigabytes", "teraflops"),
    *("milliseconds", "time_ratio", "kept_gib", "kept_ratio", "peak_gib", "peak_ratio", "synchronisations", "torch"),
]


class Kernel(NamedTuple):
    """An operation: its name, bytes moved, floating-point operations, and kernels launched."""

    name: str
    bytes: int
    flops: int = 0
    launches: int = 1


def size_in_bytes(x: Tensor) -> int:
    """Return the bytes of a tensor's elements in memory; an expanded dimension counts once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride else 1
    return count


def total(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, the same view counted once."""
    views = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    return sum(map(size_in_bytes, views.values()))


Cost = Callable[[list[Tensor], list[Tensor], tuple[Any, ...]], tuple[int, int, int]]


def _convolution(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    x, weight, out = inputs[0], inputs[1], outputs[0]
    copied = 0 if x.is_contiguous(memory_format=convolution_layout(x, weight)) else 2 * size_in_bytes(x)
    flops = 2 * out.numel() * weight[0].numel()
    return total([x, weight, out]) + copied, flops, 1 + (copied > 0)


def _convolution_backward(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    """Two convolutions, for the input's gradient and the weight's, and copies of arguments of another layout."""
    gradient, x, weight = inputs[:3]
    layout, needs = convolution_layout(x, weight), args[-1]
    copies = [y for y in (gradient, x) if not y.is_contiguous(memory_format=layout)]
    count = sum(needs[:2])
    return (
        count * total([gradient, x, weight]) + 2 * sum(map(size_in_bytes, copies)),
        count * 2 * gradient.numel() * weight[0].numel(),
        count + len(copies),
    )


def _norm(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    reads = 2 if args[5] else 1
    return (reads + 1) * size_in_bytes(inputs[0]), 0, 3


def _norm_backward(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    """A pass for the sums, and one for the input's gradient if that is needed."""
    gradient, x = size_in_bytes(inputs[0]), size_in_bytes(inputs[1])
    return gradient + x + (gradient + 2 * x) * args[-1][0], 0, 1 + args[-1][0]


def _cudnn_norm(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    return 3 * size_in_bytes(inputs[0]), 0, 1


def _cudnn_norm_backward(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    return 5 * size_in_bytes(inputs[0]), 0, 1


def _product(inputs: list[Tensor], outputs: list[Tensor], args: tuple[Any, ...]) -> tuple[int, int, int]:
    return total([*inputs, *outputs]), 2 * outputs[0].numel() * inputs[-1].shape[-2], 1


COSTS: dict[str, Cost] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _norm,
    "native_batch_norm_backward": _norm_backward,
    "cudnn_batch_norm": _cudnn_norm,
    "cudnn_batch_norm_backward": _cudnn_norm_backward,
    "mm": _product,
    "addmm": _product,
    "bmm": _product,
}
# They allocate or describe, and launch nothing.
FREE = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "set_", "resize_", "lift_fresh", "scalar_tensor")
WAITS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero")


class Trace(TorchDispatchMode):
    """Logs the kernels of a step, and follows the storages of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.waits: collections.Counter[str] = collections.Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name == "prim::device":
            return function(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in WAITS:
            self.waits[name] += 1
            if name == "_local_scalar_dense":
                return 1.0
        before = {x.untyped_storage()._cdata for x in inputs}
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in outputs:
            self._follow(x.untyped_storage(), before)
        if any(x.device.type == "cuda" for x in (*inputs, *outputs)):
            self._log(function._schema, name, inputs, outputs, args)
        return result

    def _follow(self, storage: Any, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def _log(self, schema: Any, name: str, inputs: list[Tensor], outputs: list[Tensor], args: Any) -> None:
        returns = [value.alias_info for value in schema.returns]
        is_view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        if is_view or name.startswith(FREE):
            return
        if name in COSTS:
            self.kernels.append(Kernel(name, *COSTS[name](inputs, outputs, args)))
            return
        # An operation in place reads its first argument and writes it.
        self.kernels.append(Kernel(name, total(inputs) + sum(map(size_in_bytes, outputs))))

    def log_kernel(self, name: str, bytes: int, launches: int) -> None:
        """Log a kernel of this package."""
        self.kernels.append(Kernel(name, bytes, 0, launches))


class Step(NamedTuple):
    """The kernels of a training step; bytes kept for the backward pass, and at the peak; and waits for the device."""

    kernels: list[Kernel]
    kept: int
    peak: int
    waits: int

    def seconds(self, card: Card) -> dict[str, float]:
        """Return the predicted time of each operation's name."""
        times: collections.Counter[str] = collections.Counter()
        for kernel in self.kernels:
            work = max(kernel.bytes / card.bandwidth, kernel.flops / (EFFICIENCY * card.peak))
            times[kernel.name] += max(work, LAUNCH * kernel.launches)  # type: ignore[assignment]
        return dict(times)


def run_step(
    form: Form,
    batch: int,
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format = torch.channels_last,
) -> Step:
    """Take the gradients of cross-entropy on a batch of fake images, under autocast unless ``dtype`` is float32."""
    model = form.build()
    with on_fake_cuda() as backward:
        to_fake(model, layout)
        x = torch.empty(batch, 3, size, size).contiguous(memory_format=layout)
        y = torch.zeros(batch, dtype=torch.int64)
        with Trace() as trace, fake_kernels(trace.log_kernel):
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(x), y)
            kept = trace.now
            backward(loss)
    return Step(trace.kernels, kept, trace.peak, sum(trace.waits.values()))


def run_search_step(name: str, batch: int, size: int, channels: int = 16, cells: int = 8) -> Step:
    """Take a search step on fake images; ``name`` is one of :func:`search_step.search_modules`."""
    from search_step import search_modules

    (module,) = search_modules([name], 2, size, channels, cells)
    layout = torch.contiguous_format if name == "peer" else module.training_module.layout
    with on_fake_cuda() as backward:
        to_fake(module, layout, optimizers=[optimizer.optimizer for optimizer in module.optimizers()])
        module.manual_backward = backward
        images, labels = torch.empty(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64)
        with Trace() as trace:
            module.training_step({"train": (images, labels), "val": (images, labels)}, 1)
    return Step(trace.kernels, trace.peak, trace.peak, sum(trace.waits.values()))


def row(names: tuple[str, str, str], step: Step, peer: Step, args: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table: a step beside its peer's."""
    card = CARDS[args.gpu]
    seconds, other = (sum(s.seconds(card).values()) for s in (step, peer))
    return dict(
        zip(("model", "form", "peer"), names),
        gpu=args.gpu,
        batch=args.batch,
        size=args.size,
        dtype=args.dtype,
        layout=args.layout,
        launches=sum(kernel.launches for kernel in step.kernels),
        gigabytes=f"{sum(kernel.bytes for kernel in step.kernels) / 1e9:.1f}",
        teraflops=f"{sum(kernel.flops for kernel in step.kernels) / 1e12:.2f}",
        milliseconds=f"{1e3 * seconds:.1f}",
        time_ratio=f"{seconds / other:.2f}",
        kept_gib=f"{step.kept / 2**30:.2f}",
        kept_ratio=f"{step.kept / peer.kept:.2f}",
        peak_gib=f"{step.peak / 2**30:.2f}",
        peak_ratio=f"{step.peak / peer.peak:.2f}",
        synchronisations=step.waits,
        torch=torch.__version__,
    )


def calibrate() -> None:
    """Print predicted beside published milliseconds of timm's networks on an RTX 3090."""
    print(f"{'model':12s} {'batch':>5s} {'predicted':>10s} {'published':>10s} {'ratio':>6s}   (ms per step)")
    for name, (rate, batch) in PUBLISHED.items():
        predicted = 1e3 * sum(run_step(Form(name), batch, 224, torch.float16).seconds(CARDS["rtx3090"]).values())
        published = 1e3 * batch / rate
        print(f"{name:12s} {batch:5d} {predicted:10.1f} {published:10.1f} {predicted / published:6.2f}")


def main(argv: list[str] | None = None) -> None:
    """Predict the steps of some networks, or of all in the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="name, or name:form; by default the networks of docs/speed.md")
    parser.add_argument("--gpu", choices=CARDS, default="h100")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--layout", choices=("channels_last", "contiguous_format"), default="channels_last")
    parser.add_argument("--top", type=int, default=0, help="also print the operations that take longest")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--search", action="store_true", help="search steps: 64 images of 32², float32")
    parser.add_argument("--calibrate", action="store_true", help="compare with timm's published figures")
    args = parser.parse_args(argv)
    if args.calibrate:
        calibrate()
        return
    if args.search:
        args.batch, args.size, args.dtype = 64, 32, "float32"
    peers = {name: peer for name, _, peer in CASES}
    pairs = [model.partition(":")[::2] for model in args.models]
    cases = [(name, form or "default", peers.get(name, name)) for name, form in pairs] or (
        SEARCH if args.search else CASES
    )
    steps: dict[tuple[str, str], Step] = {}

    def step_of(name: str, form: str) -> Step:
        if (name, form) not in steps and args.search:
            kind = "peer" if name == SEARCH[0][2] else name.removesuffix(" space")
            steps[name, form] = run_search_step(f"{kind} {form}".removesuffix(" default"), args.batch, args.size)
        elif (name, form) not in steps:
            kinds = getattr(torch, args.dtype), getattr(torch, args.layout)
            steps[name, form] = run_step(Form(name, form), args.batch, args.size, *kinds)
        return steps[name, form]

    rows = []
    print(f"{'model':12s} {'form':16s} {'peer':12s} launches     GB     ms  time / peer  peak / peer  waits")
    for names in cases:
        step = step_of(*names[:2])
        found = row(names, step, step_of(names[2], "default"), args)
        rows.append(found)
        print(
            "{model:12s} {form:16s} {peer:12s} {launches:8d} {gigabytes:>6s} {milliseconds:>6s} {time_ratio:>12s} "
            "{peak_ratio:>12s} {synchronisations:6d}".format(**found),
            flush=True,
        )
        for name, seconds in sorted(step.seconds(CARDS[args.gpu]).items(), key=lambda item: -item[1])[: args.top]:
            same = [kernel for kernel in step.kernels if kernel.name == name]
            moved = sum(kernel.bytes for kernel in same) / 1e9
            print(f"    {name:36s} {1e3 * seconds:7.2f} ms {sum(k.launches for k in same):6d} launches {moved:8.2f} GB")
    if args.out is not None:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
