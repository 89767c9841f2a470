"""Time and memory relative to the networks that ours generalise.

    python benchmarks/speed_and_memory.py training --out benchmarks/results/training.csv

Both networks of a pair run in one process and alternate. A row of time has the median ratio over the rounds and its
quartiles. Memory is the peak of the tensors of a training step, without parameters and their gradients
(:func:`measure.peak_memory`).

``reversible`` needs momentumnet, preferably in a separate folder on PYTHONPATH: ``pip install --no-deps --target FOLDER
momentumnet``.
"""

from __future__ import annotations

import argparse
import csv
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from measure import interleaved, peak_memory, ratio
from search_step import SPACES, search_steps
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_models import SourceLayer

FIELDS = [
    *("model", "form", "peer", "peer_form", "quantity", "batch", "size", "ratio", "low", "high", "ours", "peers"),
    *("unit", "rounds", "device", "threads", "torch", "timm", "command"),
]


class Form(NamedTuple):
    """A network and the form in which it runs."""

    name: str
    form: str = "default"

    def build(self, **options: Any) -> nn.Module:
        """Return the network in training mode."""
        if self.form == "reversible":
            options["memory"] = self.form
        if self.form in ("learn_beta", "memory_efficient"):
            options[self.form] = True
        torch.manual_seed(0)
        name, depth = UNNAMED_DEPTHS.get(self.name, (self.name, {}))
        model = timm.create_model(name, **depth, **options).train()
        if self.form == "checkpointing":
            model.set_grad_checkpointing()
        if self.form == "plain":  # a hook keeps the fast form away
            for module in model.modules():
                if isinstance(module, SourceLayer):
                    module.register_forward_hook(lambda *_: None)
        return torch.compile(model) if self.form == "compiled" else model


# Depths that have no timm name.
UNNAMED_DEPTHS: dict[str, tuple[str, dict[str, Any]]] = {"hbnet200": ("hbnet152", {"layers": (3, 24, 36, 3)})}
TRAINING = [
    (Form("hbnet50"), Form("resnet50")),
    (Form("hbnet50", "checkpointing"), Form("resnet50")),
    (Form("hbnet50", "reversible"), Form("resnet50")),
    (Form("resnet50", "checkpointing"), Form("resnet50")),
    (Form("hbnet152", "reversible"), Form("resnet152")),
    (Form("hbnet152", "checkpointing"), Form("resnet152")),
    (Form("agdnet121"), Form("densenet121")),
    (Form("agdnet121", "checkpointing"), Form("densenet121")),
    (Form("densenet121", "memory_efficient"), Form("densenet121")),
]
HBNET_FORMS, AGDNET_FORMS = ("default", "checkpointing", "reversible"), ("default", "checkpointing")
DEEP = [
    *((Form("hbnet101", form), Form("resnet101")) for form in HBNET_FORMS),
    *((Form("agdnet201", form), Form("densenet201")) for form in AGDNET_FORMS),
]
CHANNELS_LAST = [
    *((Form("hbnet50", form), Form("resnet50")) for form in HBNET_FORMS),
    *((Form("agdnet121", form), Form("densenet121")) for form in AGDNET_FORMS),
]
COMPILED = [
    (Form("hbnet50", "compiled"), Form("resnet50", "compiled")),
    (Form("agdnet121"), Form("densenet121", "compiled")),
    (Form("agdnet121", "compiled"), Form("densenet121", "compiled")),
]
INFERENCE = [(Form("hbnet50"), Form("resnet50")), (Form("agdnet121"), Form("densenet121"))]


def training_step(
    model: nn.Module, batch: int, size: int, layout: torch.memory_format = torch.contiguous_format
) -> Callable[[], Any]:
    """Return a function that computes gradients on one batch."""
    model = model.to(memory_format=layout)
    x, y = torch.randn(batch, 3, size, size).contiguous(memory_format=layout), torch.randint(10, (batch,))
    return lambda: F.cross_entropy(model(x)[:, :10], y).backward()


def folded(model: nn.Module) -> nn.Module:
    """Fold batch normalisations into the convolutions before them, by timm's names."""
    for module in model.modules():
        children = dict(module.named_children())
        pairs = [("conv0", "norm0"), ("conv1", "norm2"), *((f"conv{i}", f"bn{i}") for i in (1, 2, 3)), ("0", "1")]
        for conv, norm in pairs:
            if type(children.get(conv)) is nn.Conv2d and isinstance(children.get(norm), nn.BatchNorm2d):
                setattr(module, conv, fuse_conv_bn_eval(children[conv], children[norm]))
                setattr(module, norm, getattr(children[norm], "act", nn.Identity()))
    return model


Row = dict[str, Any]


def compare(functions: list[Callable[[], Any]], rounds: int, memory: bool = True) -> Iterator[tuple[int, str, Row]]:
    """Yield time and memory relative to the last function."""
    times = interleaved(functions, rounds)
    peaks = [peak_memory(function) for function in functions] if memory else []
    for i in range(len(functions) - 1):
        median, low, high = ratio(times[i], times[-1])
        ours, peers = statistics.median(times[i]), statistics.median(times[-1])
        yield i, "time", dict(ratio=median, low=low, high=high, ours=ours, peers=peers, unit="s")
        if memory:
            yield i, "memory", _memory(peaks[i], peaks[-1])


def _memory(ours: int, peers: int) -> Row:
    share = ours / peers
    return dict(ratio=share, low=share, high=share, ours=ours / 2**20, peers=peers / 2**20, unit="MiB")


def training(
    batch: int,
    size: int,
    rounds: int,
    pairs: list[tuple[Form, Form]] = TRAINING,
    memory: bool = True,
    layout: torch.memory_format = torch.contiguous_format,
) -> Iterator[Row]:
    """Compare training steps with timm's networks."""
    for peer in dict.fromkeys(peer for _, peer in pairs):
        forms = [ours for ours, other in pairs if other == peer] + [peer]
        steps = [training_step(form.build(), batch, size, layout) for form in forms]
        for i, quantity, figures in compare(steps, rounds, memory):
            yield dict(_names(forms[i], peer), quantity=quantity, batch=batch, size=size, **figures)


def inference(batch: int, size: int, rounds: int, pairs: list[tuple[Form, Form]] = INFERENCE) -> Iterator[Row]:
    """Compare fused networks with timm's networks after folding their normalisations."""
    x = torch.randn(batch, 3, size, size)
    for ours, peer in pairs:
        networks = [reparameterize_model(ours.build().eval()), folded(peer.build().eval())]
        networks[0].fuse()
        with torch.no_grad():
            runs = [lambda network=network: network(x) for network in networks]
            for _, quantity, figures in compare(runs, rounds):
                names = dict(model=ours.name, form="fused", peer=peer.name, peer_form="folded")
                yield dict(names, quantity=quantity, batch=batch, size=size, **figures)


def growth(batch: int, size: int, rounds: int) -> Iterator[Row]:
    """Measure the memory of a step by depth, resolution and batch."""
    depths = [(name, form) for name in ("18", "50", "101", "152", "200") for form in HBNET_FORMS]
    cases = [(Form(f"hbnet{n}", form), Form(f"resnet{n}"), batch, size) for n, form in depths]
    dense = [(f"agdnet{n}", f"densenet{n}", form) for n in (121, 201) for form in AGDNET_FORMS]
    cases += [(Form(ours, form), Form(peer), batch, size) for ours, peer, form in dense]
    for side in (96, 160, 384):
        cases += [(Form("hbnet50", form), Form("resnet50"), batch, side) for form in HBNET_FORMS[1:]]
        cases += [(Form("agdnet121", form), Form("densenet121"), batch, side) for form in AGDNET_FORMS]
    base = [case for case in cases if case[3] == size and case[1].name in ("resnet50", "densenet121")]
    cases += [(ours, peer, 4 * batch, size) for ours, peer, _, _ in base]
    for ours, peer, count, side in cases:
        peaks = []
        for form in (ours, peer):
            step = training_step(form.build(), count, side)
            step()  # allocates the gradients
            peaks.append(peak_memory(step))
        yield dict(_names(ours, peer), quantity="memory", batch=count, size=side, **_memory(*peaks))


def deep(batch: int, size: int, rounds: int) -> Iterator[Row]:
    """Compare training steps of other depths."""
    return training(batch, size, rounds, DEEP)


def channels_last(batch: int, size: int, rounds: int) -> Iterator[Row]:
    """Compare training steps, both networks in channels last."""
    return training(batch, size, rounds, CHANNELS_LAST, layout=torch.channels_last)


def compiled(batch: int, size: int, rounds: int) -> Iterator[Row]:
    """Compare the time of training steps under torch.compile."""
    # The counter of memory would run the networks uncompiled.
    return training(batch, size, rounds, COMPILED, memory=False)


def reversible(batch: int, size: int, rounds: int, transforms: int = 16) -> Iterator[Row]:
    """Compare a stage of bottlenecks with momentumnet on the same modules."""
    from momentumnet import MomentumNet

    from timm_models.stages.heavy_ball import HeavyBallRule, HeavyBallStage
    from timm_models.stages.transforms import BottleneckTransform

    layers = [BottleneckTransform(256, 64) for _ in range(transforms)]
    ours = HeavyBallStage(layers, HeavyBallRule(memory="reversible")).train()
    peer = MomentumNet(layers, gamma=0.9, use_backprop=False).train()
    x = torch.randn(batch, 256, size, size)
    steps = [lambda net=net: net(x.clone().requires_grad_()).square().mean().backward() for net in (ours, peer)]
    for _, quantity, figures in compare(steps, rounds):
        names = dict(model=f"{transforms} bottlenecks", form="reversible", peer="momentumnet", peer_form="default")
        yield dict(names, quantity=quantity, batch=batch, size=size, **figures)


def search(batch: int, size: int, rounds: int, channels: int = 16, cells: int = 8) -> Iterator[Row]:
    """Compare search steps with NNI's DARTS on NNI's network."""
    steps = search_steps([*SPACES, "peer"], batch, size, channels, cells)
    for i, quantity, figures in compare(steps, rounds):
        space, _, form = SPACES[i].partition(" ")
        pair = dict(model=f"{space} space", form=form or "default", peer="NNI's DARTS", peer_form="default")
        yield dict(pair, quantity=quantity, batch=batch, size=size, **figures)


def _names(ours: Form, peer: Form) -> Row:
    return dict(model=ours.name, form=ours.form, peer=peer.name, peer_form=peer.form)


SUBJECTS = dict(
    training=training,
    deep=deep,
    channels_last=channels_last,
    compiled=compiled,
    inference=inference,
    growth=growth,
    reversible=reversible,
    search=search,
)
SIZES = dict(search=32, reversible=56)  # 224 for the others


def main(arguments: list[str] | None = None) -> None:
    """Measure a subject, print ratios, and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, help="side of an image; 224 by default, 32 for search, 56 for reversible")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    size = options.size or SIZES.get(options.subject, 224)
    command = shlex.join(["python", "benchmarks/speed_and_memory.py", *(arguments or sys.argv[1:])])
    common = dict(rounds=options.rounds, device=device, threads=torch.get_num_threads(), command=command)
    common.update(torch=torch.__version__, timm=timm.__version__)
    rows = []
    for row in SUBJECTS[options.subject](options.batch, size, options.rounds):
        rows.append(dict(row, **common))
        ours, peer = f"{row['model']} {row['form']}", f"{row['peer']} {row['peer_form']}"
        print(
            f"{ours:<28} / {peer:<24} {row['quantity']:<7} {row['batch']:>3} × {row['size']:<4} "
            f"{row['ratio']:.3f}  ({row['low']:.3f} … {row['high']:.3f})  {row['ours']:.3g} {row['unit']}",
            flush=True,
        )
    if options.out is not None:
        write_rows(options.out, rows)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV, floats with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()})


if __name__ == "__main__":
    main()
