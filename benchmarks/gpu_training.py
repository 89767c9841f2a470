"""Paired trainings on CIFAR-10, several at a time, each step a replay of a CUDA graph.

    benchmarks/gpu.sh --blocks cifar10 --minutes 3.3 --data FOLDER_OR_NPZ
    python benchmarks/gpu_training.py pack FOLDER --data CIFAR10.npz --train 20000 --test 10000

They compare networks and starts: the weight γ of the last normalisation of each transform. The networks of a seed see
the same images, crops and mirrors in the same order, and start with the same convolutions where their shapes agree.
The pre-activation ResNet is defined in ``examples/reproduce``, which ``gpu.sh`` adds to the search path.

A step of a 56-layer network on 128 small images is about 900 kernels. Launched one by one from a slow host, at 36 µs
each, it takes 30 ms. Replayed, at an estimated 3 to 4 µs each, it takes about 3 ms: 5 s for ten epochs of 20,000 images
if nothing else runs. Networks that run at the same time share the card, so a row's seconds are no cost of its network.

``pack`` writes a folder of lossless images for machines that accept little data.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import timm_models  # noqa: F401 - registers the networks
from optinspired_plugins import HeavyBall

HEAVY_BALL = ("1", "rule", "rule/3", "0.1", "0.03")
RELU = ("0", "1")  # 0 is timm's start
NO_RELU = ("rule", "1", "0.1")
NARROW: dict[str, Any] = {"channels": (16, 32, 64, 128)}  # of hbnet50, and a stem for small images
NO_MOMENTUM: dict[str, Any] = {"beta2": 0.0}
RESIDUAL: dict[str, Any] = {"reading": "residual"}
PLAIN: dict[str, Any] = {"reading": "residual", "final_norm": False}
# Name: timm model, its options, the starts; the most important first.
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "HBNet-56": ("hbnet56", {}, HEAVY_BALL),
    "HBNet-20": ("hbnet20", {}, HEAVY_BALL),
    "ResNet-56": ("hbnet56_resnet", {}, RELU),
    "ResNet-56 without its last ReLU": ("hbnet56_resnet", {"post_act": False}, NO_RELU),
    "ResNet-20": ("hbnet20_resnet", {}, RELU),
    "ResNet-20 without its last ReLU": ("hbnet20_resnet", {"post_act": False}, NO_RELU),
    "HBNet-110": ("hbnet110", {}, ("rule", "1")),
    "ResNet-110": ("hbnet110_resnet", {}, ("0",)),
    "ResNet-110 without its last ReLU": ("hbnet110_resnet", {"post_act": False}, ("rule",)),
    "Momentum ResNet-56": ("optnet56", {**RESIDUAL, "algorithm": HeavyBall(0.9)}, ("rule",)),
    "Nesterov ResNet-56": ("optnet56", {**RESIDUAL, "algorithm": "agd"}, ("rule",)),
    "Momentum ResNet-56, not normalised": ("optnet56", {**PLAIN, "algorithm": HeavyBall(0.9)}, ("rule",)),
    "Nesterov ResNet-56, not normalised": ("optnet56", {**PLAIN, "algorithm": "agd"}, ("rule",)),
    "HBNet-56 with a final normalisation": ("hbnet56", {"final_norm": True}, ("rule",)),
    "pre-activation ResNet-56": ("preact56", {}, ("0", "1")),
    "HBNet-50, narrow": ("hbnet50", NARROW, HEAVY_BALL),
    "ResNet-50, narrow": ("hbnet50", {**NARROW, **NO_MOMENTUM, "post_act": True}, RELU),
    "ResNet-50, narrow, without its last ReLU": ("hbnet50", {**NARROW, **NO_MOMENTUM}, NO_RELU),
}
WARM_UP, PADDING, SIDE, ROWS = 3, 4, 32, 2500
REPLAYS = 50  # of a network before it is the next one's turn


class Setting(NamedTuple):
    """A row of the comparison."""

    model: str
    start: str  # γ: a number, "rule" for init_last="auto", or "rule/3"
    seed: int


class Recipe(NamedTuple):
    """The arguments of a training by SGD with a cosine."""

    epochs: int = 10
    batch: int = 128
    warm_up: int = 0
    lr: float = 0.1
    bfloat16: bool = False  # autocast

    def name(self, data: Data) -> str:
        """Return all but the learning rate as text, without what has its default."""
        parts = [f"{len(data.train):,} images", f"{self.epochs} epochs"]
        parts += [f"batches of {self.batch}"] * (self.batch != Recipe().batch)
        parts += [f"warm-up of {self.warm_up} steps"] * (self.warm_up > 0)
        return ", ".join([*parts, *["bfloat16"] * self.bfloat16])


def settings(seeds: int) -> list[Setting]:
    """Return all trainings; every seed is complete before the next."""
    starts = [(name, start) for name, (_, _, starts) in NETWORKS.items() for start in starts]
    return [Setting(name, start, seed) for seed in range(seeds) for name, start in starts]


# --- networks ---------------------------------------------------------------------------------------------------------


def network(setting: Setting) -> nn.Module:
    """Return a network of 10 classes for 32×32 images at its start."""
    torch.manual_seed(setting.seed)
    net = _preactivated(setting) if NETWORKS[setting.model][0].startswith("preact") else _staged(setting)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # not needed, and a kernel less
    return net


def _preactivated(setting: Setting) -> nn.Module:
    """Return a pre-activation ResNet. Its transforms end in a convolution: it starts at 0, as in timm, or as all do."""
    import networks  # noqa: F401 - registers the model

    model, options, _ = NETWORKS[setting.model]
    return timm.create_model(model, num_classes=10, zero_init_last=setting.start == "0", **options)


def _staged(setting: Setting) -> nn.Module:
    model, options, _ = NETWORKS[setting.model]
    start, _, divisor = setting.start.partition("/")
    net = timm.create_model(model, num_classes=10, init_last="auto" if start == "rule" else float(start), **options)
    if hasattr(net, "maxpool"):
        net.conv1 = nn.Conv2d(3, net.bn1.num_features, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    for transform in (transform for stage in net.stages() for transform in stage.transforms()):
        transform.last_norm().weight.data /= float(divisor or 1)
    return net


# --- data -------------------------------------------------------------------------------------------------------------


def pack(out: Path, data: Path, train: int, test: int) -> None:
    """Write the first images of an .npz file as lossless WebP, a row of 1,024 pixels for each."""
    arrays = load(data)
    out.mkdir(parents=True, exist_ok=True)
    labels = {}
    for part, count in (("train", train), ("test", test)):
        x = arrays[f"x_{part}"][:count]
        labels[part] = arrays[f"y_{part}"][:count].tolist()
        for i, start in enumerate(range(0, len(x), ROWS)):
            rows = np.ascontiguousarray(x[start : start + ROWS]).reshape(-1, SIDE * SIDE, 3)
            Image.fromarray(rows).save(out / f"{part}_{i + 1}.webp", lossless=True, method=4)
    (out / "labels.json").write_text(json.dumps(labels), encoding="utf-8")


def load(path: Path) -> dict[str, np.ndarray]:
    """Return x_train, y_train, x_test and y_test of an .npz file, or of a folder as ``pack`` writes it.

    Images are uint8 of shape (n, 32, 32, 3). A folder holds ``train_1``, … and ``test_1``, … (or ``train`` and
    ``test``) as lossless .webp or .png, and ``labels.json``.
    """
    if path.is_file():
        with np.load(path) as file:
            return {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}

    def read(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, SIDE, SIDE, 3)

    arrays, labels = {}, json.loads((path / "labels.json").read_text(encoding="utf-8"))
    with ThreadPoolExecutor() as pool:
        for part in ("train", "test"):
            files = [file for file in path.glob(f"{part}*") if file.suffix in (".webp", ".png")]
            files.sort(key=lambda file: [int(number) for number in re.findall(r"\d+", file.stem)])
            arrays[f"x_{part}"] = np.concatenate(list(pool.map(read, files)))
            arrays[f"y_{part}"] = np.asarray(labels[part])
            if len(arrays[f"x_{part}"]) != len(labels[part]):
                raise ValueError(f"{path}: {len(labels[part])} labels of {len(arrays[f'x_{part}'])} images in '{part}'")
    return arrays


class Data(NamedTuple):
    """Normalised images, channels last, and labels on a device; training images are padded with zeros."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], device: torch.device) -> Data:
        """Return the arrays of :func:`load` on a device."""
        train, test = (torch.from_numpy(arrays[f"x_{part}"]).to(device).float() for part in ("train", "test"))
        labels = [torch.from_numpy(arrays[f"y_{part}"]).to(device).long() for part in ("train", "test")]
        mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
        padded = F.pad((train - mean) / std, (0, 0, *[PADDING] * 4))
        return cls(padded, labels[0], (test - mean) / std, labels[1])


class Batches:
    """All batches of a seed: images, crops and mirrors of every step, drawn at once.

    Args:
        data: images and labels.
        recipe: epochs and images of a batch; an epoch's last images that fill no batch are left out.
        seed: every network of a seed gets the same batches.
    """

    def __init__(self, data: Data, recipe: Recipe, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        count, per_epoch = len(data.train), len(data.train) // recipe.batch
        orders = [torch.randperm(count, generator=generator) for _ in range(recipe.epochs)]
        kept = [order[: per_epoch * recipe.batch].view(per_epoch, recipe.batch) for order in orders]
        images = torch.cat(kept)
        crops = [torch.randint(2 * PADDING + 1, images.shape, generator=generator) for _ in range(2)]
        mirrored = torch.randint(2, images.shape, generator=generator)
        device = data.train.device
        self.data, self.per_epoch, self.steps = data, per_epoch, len(images)
        self.draws = torch.stack([images, *crops, mirrored], 1).to(device)  # (steps, 4, batch)
        pixels = torch.arange(data.test.shape[1], device=device)
        self.pixels = torch.stack([pixels, pixels.flip(0)])

    def at(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, channels last, and labels of a step; ``position``, of shape (1,), stays on its device."""
        image, top, left, mirrored = self.draws.index_select(0, position)[0]
        rows, columns = top[:, None] + self.pixels[0], left[:, None] + self.pixels[mirrored]
        x = self.data.train[image[:, None, None], rows[:, :, None], columns[:, None, :]]
        return x.permute(0, 3, 1, 2), self.data.train_labels[image]


# --- a training -------------------------------------------------------------------------------------------------------


def rates(steps: int, recipe: Recipe) -> Tensor:
    """Return the learning rate of every step: a linear warm-up, then a cosine that ends at 0."""
    warm_up = recipe.warm_up
    rising = [(i + 1) / warm_up for i in range(min(warm_up, steps))]
    falling = [(1 + math.cos(math.pi * i / (steps - warm_up))) / 2 for i in range(steps - warm_up)]
    return recipe.lr * torch.tensor([*rising, *falling], dtype=torch.float64).float()


@torch.no_grad()
def sgd(weights: list[Tensor], gradients: Sequence[Tensor], momenta: list[Tensor], rate: Tensor) -> None:
    """Take a step of Nesterov's SGD with momentum 0.9 and weight decay 1e-4, in place.

    ``torch.optim.SGD`` reads a rate on the device from the host, which a captured step cannot.
    """
    # With other strides than the weights' the kernels over lists would fall apart into one for each weight.
    aligned = [
        g if g.stride() == w.stride() else torch.empty_like(w).copy_(g) for g, w in zip(gradients, weights, strict=True)
    ]
    change = torch._foreach_add(aligned, weights, alpha=1e-4)
    torch._foreach_mul_(momenta, 0.9)
    torch._foreach_add_(momenta, change)
    torch._foreach_add_(change, momenta, alpha=0.9)
    torch._foreach_mul_(change, rate)
    torch._foreach_sub_(weights, change)


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors back the values that they had before."""
    tensors = list(tensors)
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


class Job:
    """A network in training; on CUDA on a stream of its own.

    A step reads all that changes from the device: its number is ``position``, of shape (1,), by which it finds its
    batch and its learning rate. So a captured step can be replayed without the host.

    Args:
        setting: network, start and seed.
        batches: the batches of the seed.
        recipe: the learning rates.
    """

    def __init__(self, setting: Setting, batches: Batches, recipe: Recipe) -> None:
        self.start, self.setting, self.batches, self.steps = time.perf_counter(), setting, batches, batches.steps
        self.device = batches.draws.device
        self.bfloat16 = recipe.bfloat16
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the data's
        self.graph: Any = None
        self.note, self.done, self.events = "", 0, deque[Any]()
        with self.on_stream():
            self.net = network(setting).to(self.device, memory_format=torch.channels_last).train()
            self.weights = list(self.net.parameters())
            self.momenta = [torch.zeros_like(weight, requires_grad=False) for weight in self.weights]
            self.rates = rates(self.steps, recipe).to(self.device)
            self.losses = torch.zeros(self.steps, device=self.device)
            self.position = torch.zeros(1, dtype=torch.long, device=self.device)

    def on_stream(self) -> AbstractContextManager[Any]:
        """Return a context in which the job's stream is the current one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def state(self) -> list[Tensor]:
        """Return all tensors that a step changes."""
        return [*self.weights, *self.net.buffers(), *self.momenta, self.losses, self.position]

    def step(self) -> None:
        """Take a step."""
        x, y = self.batches.at(self.position)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(self.net(x), y)
        gradients = torch.autograd.grad(loss, self.weights)
        sgd(self.weights, gradients, self.momenta, self.rates.index_select(0, self.position)[0])
        self.losses.index_copy_(0, self.position, loss.detach()[None])
        self.position.add_(1)

    def capture(self) -> None:
        """Capture a step, after a few that choose algorithms and allocate; the state stays at its start.

        All of it runs on the job's stream. If it fails, the job runs without a graph and its note says why.
        """
        try:
            with self.on_stream(), restored(self.state()):
                for _ in range(min(WARM_UP, self.steps)):
                    self.step()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):  # a memory pool of its own
                    self.step()
            self.graph = graph
        except Exception as error:  # a form that cannot be captured can still be trained
            traceback.print_exc()
            self.note = f"not captured: {type(error).__name__}: {error}".splitlines()[0][:200]

    def queued(self) -> int:
        """Return how many calls of :meth:`advance` the device has not finished."""
        while self.events and self.events[0].query():
            self.events.popleft()
        return len(self.events)

    def advance(self) -> None:
        """Queue the next steps: some replays of the graph, or one step without it."""
        count = min(1 if self.graph is None else REPLAYS, self.steps - self.done)
        with self.on_stream():
            for _ in range(count):
                self.step() if self.graph is None else self.graph.replay()
            if self.stream is not None:
                self.events.append(self.stream.record_event())
        self.done += count

    @torch.no_grad()
    def results(self) -> dict[str, Any]:
        """Return the row of a finished training; it waits for the job's stream."""
        data, hits = self.batches.data, 0
        with self.on_stream():
            self.net.eval()
            for x, y in zip(data.test.split(1000), data.test_labels.split(1000), strict=True):
                hits += (self.net(x.permute(0, 3, 1, 2)).argmax(1) == y).sum()
            error = 100 - 100 * int(hits) / len(data.test)
            loss = self.losses[-self.batches.per_epoch :].mean().item()
            finite = bool(self.losses.isfinite().all())
        form = "eager" if self.graph is None else "captured"
        seconds = time.perf_counter() - self.start
        return dict(quantity="test error", value=error, unit="%", loss=loss, finite=finite, seconds=seconds, form=form)


# --- all trainings ----------------------------------------------------------------------------------------------------


class Trainings:
    """Trainings that run at the same time and take turns.

    Args:
        data: images and labels.
        recipe: the arguments of every training.
        jobs: networks at the same time.
        write: writes a row, given its columns.
        fail: writes a row of an error, given the error and the columns.
    """

    def __init__(
        self, data: Data, recipe: Recipe, jobs: int, write: Callable[..., None], fail: Callable[..., None]
    ) -> None:
        self.data, self.recipe, self.jobs, self.write, self.fail = data, recipe, jobs, write, fail
        self.running: list[Job] = []
        self.batches: dict[int, Batches] = {}

    def begin(self, setting: Setting) -> None:
        """Start a training."""
        if setting.seed not in self.batches:
            self.batches[setting.seed] = Batches(self.data, self.recipe, setting.seed)
        try:
            job = Job(setting, self.batches[setting.seed], self.recipe)
            if job.stream is not None:
                job.capture()
        except Exception as error:  # one network that fails must not cost the others
            self.fail(error, **setting._asdict())
        else:
            self.running.append(job)

    def turn(self, job: Job) -> bool:
        """Let a training go on, or write its row; return False if the device is busy with it."""
        is_done = job.done == job.steps
        if job.queued() >= (1 if is_done else 2):
            return False
        try:
            if is_done:
                self.write(**job.setting._asdict(), **job.results(), note=job.note)
            else:
                job.advance()
        except Exception as error:
            is_done = True
            self.fail(error, **job.setting._asdict())
        if is_done:
            self.running.remove(job)
        return True

    def run(self, all_settings: Sequence[Setting], until: float) -> None:
        """Train until the time is over; rows name the trainings that it did not suffice for."""
        waiting = deque(all_settings)
        while (waiting or self.running) and time.perf_counter() < until:
            if waiting and len(self.running) < self.jobs:
                self.begin(waiting.popleft())
            moved = [self.turn(job) for job in [*self.running] if time.perf_counter() < until]
            if not any(moved):
                time.sleep(0.0005)
        for job in self.running:
            note = f"no time left after {job.done} of {job.steps} steps"
            self.write(**job.setting._asdict(), quantity="left out", note=note)
        for setting in waiting:
            self.write(**setting._asdict(), quantity="left out", note="no time left")
        if self.data.train.is_cuda:
            torch.cuda.synchronize()  # before graphs in use are deleted
        self.running.clear()


def main(argv: list[str] | None = None) -> None:
    """Write the images of an .npz file as a small folder."""
    parser = argparse.ArgumentParser(description="Write the images of an .npz file as a small folder.")
    parser.add_argument("command", choices=["pack"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help=".npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--test", type=int, default=10000)
    args = parser.parse_args(argv)
    pack(args.out, args.data, args.train, args.test)
    size = sum(file.stat().st_size for file in args.out.iterdir()) / 2**20
    print(f"{size:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
