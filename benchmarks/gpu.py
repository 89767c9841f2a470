"""Measure on a GPU whatever only a GPU can tell: correctness, time, memory, and a block of trainings.

    benchmarks/gpu.sh                        # one card; CSV files in $OUT
    python benchmarks/gpu.py --device cpu --tiny --out runs/gpu

The blocks run in this order, and each writes its CSV file row by row, so that a run that is cut off keeps its rows.
No form begins once the share of ``--minutes`` of its block is used up.

- ``card``: the bandwidth of a copy and the rate of a matrix product.
- ``correctness``: gradients of every form against the plain form in float64, bfloat16 and float16 autocast, gradient
  scaling, waits for the device, and capture in a CUDA graph.
- ``training``: time and peak memory of eager steps beside timm's networks, and the time of the same steps in a CUDA
  graph, to which the host adds nothing.
- ``inference``: ``validate.py --amp``'s forward pass.
- ``profile``: the kernels in which a training step spends its time.
- ``compiled``: the training steps under ``torch.compile``.
- ``cifar10``: paired trainings on CIFAR-10 from several starts (needs ``--data``): see ``gpu_training.py``.

It needs torch and timm; a block that fails has a row with the error, and the next one begins.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_training import Data, Recipe, Setting, Trainings, load, settings
from measure import interleaved, peak_memory, ratio
from speed_and_memory import Form, folded
from timm.utils import reparameterize_model
from torch import Tensor, nn

from optinspired_plugins._files import read_table

FIELDS = ["model", "form", "peer", "quantity", "value", "unit", "ratio", "low", "high", "note", "device", "torch", "at"]
TRAINING_FIELDS = [
    *("model", "start", "lr", "recipe", "seed", "quantity", "value", "unit", "loss", "finite", "seconds", "form"),
    *("note", "device", "torch", "at"),
]
BLOCKS = {
    "card": 0.01,
    "correctness": 0.22,
    "training": 0.3,
    "inference": 0.05,
    "profile": 0.07,
    "compiled": 0.2,
    "cifar10": 0.15,
}
TRAINING = [
    *((Form("hbnet50", form), Form("resnet50")) for form in ("default", "checkpointing", "reversible", "learn_beta")),
    (Form("resnet50", "checkpointing"), Form("resnet50")),
    *((Form("agdnet121", form), Form("densenet121")) for form in ("default", "plain", "checkpointing")),
    (Form("densenet121", "memory_efficient"), Form("densenet121")),
    *((Form("hbnet152", form), Form("resnet152")) for form in ("default", "checkpointing", "reversible")),
    (Form("resnet152", "checkpointing"), Form("resnet152")),
]
COMPILED = [
    (Form("hbnet50"), Form("resnet50")),
    (Form("hbnet50", "budget"), Form("resnet50")),
    (Form("agdnet121"), Form("densenet121")),
    (Form("hbnet50", "checkpointing"), Form("resnet50")),
    (Form("hbnet50", "reversible"), Form("resnet50")),
    (Form("agdnet121", "checkpointing"), Form("densenet121")),
]
PROFILED = [
    Form("resnet50"),
    *(Form("hbnet50", form) for form in ("default", "checkpointing", "reversible", "learn_beta")),
    Form("densenet121"),
    *(Form("agdnet121", form) for form in ("default", "checkpointing")),
]
# Name, arguments, the plain form, the others.
FORMS: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("hbnet50", {}, "default", ("checkpointing", "reversible")),
    ("hbnet20", {"drop_path_rate": 0.3}, "default", ("checkpointing", "reversible")),
    ("hbnet20", {"learn_beta": True}, "default", ("checkpointing", "reversible")),
    ("hbnet18", {"drop_block_rate": 0.2}, "default", ("checkpointing", "reversible")),
    ("agdnet121", {"block_config": (3, 4, 3, 2)}, "plain", ("default", "checkpointing")),
    ("agdnet40_k12", {"block_config": (4, 4, 4)}, "plain", ("default", "checkpointing")),
    ("optnet20", {"algorithm": "agd"}, "default", ("checkpointing",)),
    ("optnet20", {"algorithm": "admm"}, "default", ("checkpointing",)),
    ("cellnet_cifar", {"genotype": "darts_v2", "cells": 3, "channels": 8}, "default", ("checkpointing",)),
]


class Run:
    """A run: its device and sizes, its deadline, and the files of its blocks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.start = time.perf_counter()
        self.device, self.tiny, self.out, self.data = torch.device(args.device), args.tiny, args.out, args.data
        self.deadline = self.start + 60 * args.minutes
        self.batch, self.side, self.rounds = (2, 32, 2) if args.tiny else (args.batch, 224, 12)
        self.name = torch.cuda.get_device_name() if self.on_cuda else platform.machine()
        self.errors, self.only = 0, args.only
        self.jobs, self.seeds, self.networks = args.jobs, args.seeds, args.networks
        self.resume = args.resume
        bfloat16 = args.bfloat16 or self.on_cuda
        self.recipe = Recipe(args.epochs, 32 if args.tiny else 128, args.warm_up, args.lr, bfloat16)
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def on_cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    def write(self, block: str, **values: Any) -> None:
        """Append a row to a block's file, and print it."""
        path, fields = self.out / f"{block}.csv", TRAINING_FIELDS if block == "cifar10" else FIELDS
        new = not path.exists()
        at = f"{time.perf_counter() - self.start:.0f}"
        row = {"device": self.name, "torch": torch.__version__, "at": at, **values}
        row = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields)
            if new:
                writer.writeheader()
            writer.writerow(row)
        shown = [str(row[name]) for name in fields[:-3] if row.get(name) not in (None, "")]
        print(f"{row['at']:>4s} s  {block}: {'  '.join(shown)}", flush=True)

    def chosen(self, form: Form) -> bool:
        """True if ``--only`` matches the form, as in ``hbnet50:checkpointing``."""
        return re.search(self.only, f"{form.name}:{form.form}") is not None

    def fail(self, block: str, error: Exception, quantity: str = "", **values: Any) -> None:
        """Record an error as a row, and the quantity that it cost if others were measured."""
        self.errors += 1
        message = f"{quantity}: " * bool(quantity) + f"{type(error).__name__}: {error}"
        self.write(block, **values, quantity="error", note=message.splitlines()[0][:300])
        traceback.print_exception(error)

    @contextmanager
    def guard(self, block: str, **names: Any) -> Iterator[None]:
        """Record an error as a row, and free the memory afterwards."""
        try:
            yield
        except Exception as error:  # one form that fails must not cost the others
            self.fail(block, error, **names)
        finally:
            gc.collect()
            if self.on_cuda:
                torch.cuda.empty_cache()

    def images(self, batch: int, side: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Return random images, channels last, and labels of ten classes."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (batch,), generator=generator)
        return x.to(self.device, dtype, memory_format=torch.channels_last), y.to(self.device)

    def network(self, form: Form, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """Return a network on the device, channels last."""
        if self.tiny and form.name.endswith("121"):
            options.setdefault("block_config", (2, 3, 2, 2))
        if self.tiny and form.name.endswith("152"):
            options.setdefault("layers", (2, 3, 4, 2))
        return form.build(**options).to(self.device, dtype, memory_format=torch.channels_last)


# --- correctness ------------------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """All gradients as one vector in float64, and whether all are finite."""

    vector: Tensor
    finite: bool


def gradients(run: Run, net: nn.Module, x: Tensor, y: Tensor, amp: torch.dtype | None = None) -> Gradients:
    """Return the gradients of cross-entropy, under autocast and with gradient scaling where ``amp`` is a dtype."""
    scale = 1024.0 if amp is torch.float16 else 1.0
    torch.manual_seed(7)
    with torch.autocast(run.device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
        loss = F.cross_entropy(net(x)[:, :10], y)
    (loss * scale).backward()
    parts = [p.grad.detach().double().flatten() / scale for p in net.parameters() if p.grad is not None]
    vector = torch.cat(parts)
    return Gradients(vector, bool(vector.isfinite().all()))


def randomise(net: nn.Module) -> nn.Module:
    """Give the weights of normalisations both signs and several sizes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.add_(0.3 * noise.to(module.weight))
    return net


def correctness(run: Run, until: float) -> None:
    """Compare every form with the plain one."""
    for name, options, plain, others in FORMS:
        side = 32 if name.endswith(("20", "k12", "cifar")) else 64
        batch = 4 if run.tiny else 16

        def net(form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
            torch.manual_seed(0)
            return randomise(run.network(Form(name, form), dtype, **options))  # noqa: B023

        label = f"{name} {', '.join(f'{key}={value}' for key, value in options.items())}".strip()
        with run.guard("correctness", model=label):
            exact = gradients(run, net(plain, torch.float64), *run.images(batch, side, torch.float64)).vector
            for form in others:
                vector = gradients(run, net(form, torch.float64), *run.images(batch, side, torch.float64)).vector
                error = ((vector - exact).norm() / exact.norm()).item()
                note = "" if error < 1e-8 else "WRONG"
                run.errors += note != ""
                run.write(
                    "correctness", model=label, form=form, quantity="float64 gradient error", value=error, note=note
                )
            if not any(key.startswith("drop") for key in options):
                single_precision(run, label, (plain, *others), net, exact, (batch, side))
                autocast(run, label, (plain, *others), net, exact, (batch, side), until)
        if run.on_cuda:
            for form in (plain, *others):
                with run.guard("correctness", model=label, form=form):
                    waits(run, label, form, net(form), *run.images(batch, side))


def single_precision(
    run: Run, label: str, forms: Sequence[str], net: Callable[..., nn.Module], exact: Tensor, shape: tuple[int, int]
) -> None:
    """Compare gradients in float32, in which kernels of a GPU run that have no float64, with float64's."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        errors = {}
        for form in forms:
            vector = gradients(run, net(form), *run.images(*shape)).vector
            errors[form] = ((vector - exact).norm() / exact.norm()).item()
    for form, error in errors.items():
        note = "" if error < 1e-4 + 10 * errors[forms[0]] else "WRONG"
        run.errors += note != ""
        run.write("correctness", model=label, form=form, quantity="float32 gradient error", value=error, note=note)


def autocast(
    run: Run,
    label: str,
    forms: Sequence[str],
    net: Callable[..., nn.Module],
    exact: Tensor,
    shape: tuple[int, int],
    until: float,
) -> None:
    """Compare the direction of gradients in reduced precision with float64's; the first form is the measure."""
    for amp in (torch.bfloat16, torch.float16) if run.on_cuda else (torch.bfloat16,):
        own = None
        for form in forms:
            if time.perf_counter() > until:
                return
            model, dtypes = net(form), set()
            for name, module in model.named_children():
                if name.startswith("layer"):
                    module.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))  # noqa: B023
            low = gradients(run, model, *run.images(*shape), amp)
            cosine = F.cosine_similarity(exact, low.vector, dim=0).item()
            own = cosine if own is None else own
            faults = ["not finite"] * (not low.finite) + ["a stage returns float32"] * (torch.float32 in dtypes)
            faults += ["further away than the plain form"] * (1 - cosine > 3 * (1 - own) + 0.02)
            run.errors += bool(faults)
            quantity = f"{str(amp)[6:]} autocast, cosine to float64"
            run.write(
                "correctness", model=label, form=form, quantity=quantity, value=cosine, note=", ".join(faults).upper()
            )


def waits(run: Run, label: str, form: str, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Count waits for the device in a step, and capture a step in a CUDA graph."""

    def step() -> None:
        for parameter in net.parameters():
            parameter.grad = None
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x)[:, :10], y)
        loss.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    note = " ".join(sorted(set(found)))[:200]
    run.write("correctness", model=label, form=form, quantity="waits for the device", value=len(found), note=note)
    captured(step)()
    torch.cuda.synchronize()
    run.write("correctness", model=label, form=form, quantity="captured in a CUDA graph", value=1)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that replays a step from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# --- time and memory --------------------------------------------------------------------------------------------------


def step_of(run: Run, form: Form, compiled: bool = False) -> Callable[[], None]:
    """Return a training step as timm's ``train.py --amp --amp-dtype bfloat16 --channels-last`` takes it."""
    model = run.network(form)
    if compiled:
        torch._dynamo.reset()  # or the graph of another instance would serve this one, with its budget
    call = torch.compile(model, backend="aot_eager" if run.tiny else "inductor") if compiled else model
    x, y = run.images(run.batch, run.side)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(run.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(call(x)[:, :10], y)
        loss.backward()

    if compiled:  # torch's own recomputation, chosen by the compiler, is the alternative to our forms
        budget = 0.4 if form.form == "budget" else 1.0
        with torch._functorch.config.patch(activation_memory_budget=budget):
            step()
    return step


def compare(
    run: Run,
    block: str,
    ours: Form,
    peer: Form,
    functions: list[Callable[[], None]],
    memory: bool,
    quantity: str = "time",
) -> None:
    """Write the time, and the peak memory, of the first function in units of the second's."""
    names = dict(model=ours.name, form=ours.form, peer=f"{peer.name} {peer.form}")
    times, peers = interleaved(functions, run.rounds, warm_up=1 if run.tiny else 3)
    median, low, high = ratio(times, peers)
    milliseconds = 1e3 * statistics.median(times)
    run.write(block, **names, quantity=quantity, value=milliseconds, unit="ms", ratio=median, low=low, high=high)
    if memory:
        peaks = [peak_memory(function) / 2**20 for function in functions]
        run.write(block, **names, quantity="peak memory", value=peaks[0], unit="MiB", ratio=peaks[0] / peaks[1])


def in_graphs(run: Run, ours: Form, peer: Form, steps: list[Callable[[], None]]) -> None:
    """Write the time of two steps in CUDA graphs."""
    quantity = "time in a CUDA graph"
    try:
        compare(run, "training", ours, peer, [captured(step) for step in steps], memory=False, quantity=quantity)
    except Exception as error:  # the other quantities of the form are measured
        run.fail("training", error, quantity, model=ours.name, form=ours.form, peer=f"{peer.name} {peer.form}")


def training(run: Run, until: float, compiled: bool = False) -> None:
    """Compare our training steps with timm's."""
    block, pairs = ("compiled", COMPILED) if compiled else ("training", TRAINING)
    peers: dict[Form, Callable[[], None]] = {}
    for ours, peer in pairs:
        if not run.chosen(ours):
            continue
        if time.perf_counter() > until:
            run.write(block, model=ours.name, form=ours.form, quantity="left out", note="no time left")
            continue
        with run.guard(block, model=ours.name, form=ours.form):
            if peer not in peers:
                peers.clear()  # one peer's memory at a time
                peers[peer] = step_of(run, peer, compiled)
            functions = [step_of(run, ours, compiled), peers[peer]]
            compare(run, block, ours, peer, functions, memory=run.on_cuda or not compiled)
            if run.on_cuda and not compiled:
                in_graphs(run, ours, peer, functions)


def inference(run: Run, until: float) -> None:
    """Compare forward passes under autocast: networks as built, and with folded normalisations."""
    for name, peer in (("hbnet50", "resnet50"), ("agdnet121", "densenet121")):
        for form in ("default", "fused"):
            if time.perf_counter() > until or not run.chosen(Form(name, form)):
                continue
            with run.guard("inference", model=name, form=form), torch.no_grad():
                nets = [run.network(Form(name)).eval(), run.network(Form(peer)).eval()]
                peer_form = "folded" if form == "fused" else form
                if form == "fused":
                    nets[0] = reparameterize_model(nets[0])
                    nets[0].fuse()  # type: ignore[operator]
                    nets[1] = folded(nets[1])
                x, _ = run.images(2 * run.batch, run.side)

                def forward(net: nn.Module, x: Tensor = x) -> None:
                    with torch.autocast(run.device.type, dtype=torch.bfloat16):
                        net(x)

                functions = [lambda net=net: forward(net) for net in nets]  # type: ignore[misc]
                compare(run, "inference", Form(name, form), Form(peer, peer_form), functions, memory=False)


def card(run: Run, until: float) -> None:
    """Measure what the predictions of ``roofline.py`` assume of a card."""
    n = 2**20 if run.tiny else 2**28
    source, target = (torch.randn(n, device=run.device) for _ in range(2))
    (times,) = interleaved([lambda: target.copy_(source)], 10, warm_up=3)
    rate = 8 * n / statistics.median(times) / 1e9
    run.write("card", quantity="copy, bytes read and written", value=rate, unit="GB/s")
    n = 256 if run.tiny else 8192
    a = torch.randn(n, n, device=run.device, dtype=torch.bfloat16)
    (times,) = interleaved([lambda: a @ a], 10, warm_up=3)
    run.write("card", quantity="bfloat16 matrix product", value=2e-12 * n**3 / statistics.median(times), unit="TFLOP/s")


def profile(run: Run, until: float) -> None:
    """Write a training step's kernels by time: the sum of all, and the longest."""
    activity = torch.profiler.ProfilerActivity
    for form in PROFILED[: 1 if run.tiny else None]:
        if not run.chosen(form) or time.perf_counter() > until:
            continue
        with run.guard("profile", model=form.name, form=form.form):
            step = step_of(run, form)
            for _ in range(3):
                step()
            with torch.profiler.profile(activities=[activity.CUDA if run.on_cuda else activity.CPU]) as profiler:
                step()
                if run.on_cuda:
                    torch.cuda.synchronize()
            rows = [
                (e.self_device_time_total if run.on_cuda else e.self_cpu_time_total, e.count, e.key)
                for e in profiler.key_averages()
            ]
            rows = sorted((row for row in rows if row[0] > 0), reverse=True)
            total = ("all kernels", sum(row[0] for row in rows), sum(row[1] for row in rows))
            for name, microseconds, calls in (total, *((name, t, n) for t, n, name in rows[:25])):
                names = dict(model=form.name, form=form.form, quantity=name[:120], note=f"{calls} calls")
                run.write("profile", **names, value=microseconds / 1e3, unit="ms")


# --- trainings --------------------------------------------------------------------------------------------------------


def cifar10(run: Run, until: float) -> None:
    """Train paired networks on CIFAR-10, several at a time, until the time is over."""
    if run.data is None:
        note = "needs --data: an .npz file or a folder, as gpu_training.py describes them"
        run.write("cifar10", quantity="left out", note=note)
        return
    data = Data.of(load(run.data), run.device)
    lr, recipe = run.recipe.lr, run.recipe.name(data)
    write, fail = (partial(function, "cifar10", lr=lr, recipe=recipe) for function in (run.write, run.fail))
    chosen = [one for one in settings(run.seeds) if re.search(run.networks, f"{one.model}: {one.start}")]
    done = _trained(run.out / "cifar10.csv", lr, recipe)
    Trainings(data, run.recipe, run.jobs, write, fail).run([one for one in chosen if one not in done], until)


def _trained(path: Path, lr: float, recipe: str) -> set[Setting]:
    """Return the trainings with these arguments that have a result."""
    rows = read_table(path, TRAINING_FIELDS).values() if path.exists() else ()
    same = (row for row in rows if row["recipe"] == recipe and float(row["lr"]) == lr)
    return {Setting(row["model"], row["start"], int(row["seed"])) for row in same if row["quantity"] == "test error"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Correctness, time, memory and trainings on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for two CPU cores")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all blocks")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--blocks", default=",".join(BLOCKS), help=f"of {', '.join(BLOCKS)}")
    parser.add_argument("--only", default="", help="pattern of the forms to time, such as hbnet50:checkpointing")
    parser.add_argument("--data", type=Path, help="CIFAR-10: an .npz file, or a folder that gpu_training.py packed")
    parser.add_argument("--epochs", type=int, default=10, help="of the trainings on CIFAR-10")
    parser.add_argument("--jobs", type=int, default=6, help="networks that are trained at the same time")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every training")
    parser.add_argument("--networks", default="", help="pattern of trainings, such as 'HBNet-56: rule'")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16 on a CPU, too")
    parser.add_argument(
        "--resume", action="store_true", help="keep cifar10.csv, and skip trainings that it has with these arguments"
    )
    parser.add_argument("--lr", type=float, default=0.1, help="greatest learning rate of the trainings")
    parser.add_argument("--warm-up", type=int, default=0, help="steps in which the learning rate rises")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the blocks; the exit status is 1 if anything was wrong or failed."""
    args = parser().parse_args(argv)
    if args.resume and (earlier := args.out / "cifar10.csv").exists():
        try:
            read_table(earlier, TRAINING_FIELDS)
        except ValueError as error:
            parser().error(f"argument --resume: {error}")
    run = Run(args)
    if run.on_cuda:
        torch.backends.cudnn.benchmark = True
    functions: dict[str, Callable[[Run, float], None]] = {
        "card": card,
        "correctness": correctness,
        "training": training,
        "inference": inference,
        "profile": profile,
        "compiled": lambda run, until: training(run, until, compiled=True),
        "cifar10": cifar10,
    }
    chosen = args.blocks.split(",")
    shares = {name: share for name, share in BLOCKS.items() if name in chosen}
    for name in shares:
        rest = sum(share for other, share in shares.items() if list(shares).index(other) >= list(shares).index(name))
        now = time.perf_counter()
        until = now + (run.deadline - now) * shares[name] / rest
        if not (run.resume and name == "cifar10"):
            (run.out / f"{name}.csv").unlink(missing_ok=True)
        with run.guard(name):
            functions[name](run, until)
    print(f"{run.errors} rows are wrong or failed; the files are in {run.out}")
    return int(run.errors > 0)


if __name__ == "__main__":
    raise SystemExit(main())
