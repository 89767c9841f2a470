"""Train HBNet, AGDNet and their special cases on digits.

    python examples/01_train_on_digits.py --out runs/demo

ResNet and DenseNet are special cases of HBNet and AGDNet, so one class builds both models of a pair. Training uses
timm's loader, optimiser and scheduler. Both models get the same seed, images, order and schedule: the paper's SGD with
Nesterov momentum 0.9, weight decay 1e-4, batches of 64 and initial learning rate 0.1 (§8.1), here with a cosine
schedule for a few epochs. The run prints a table, and writes ``results.csv`` (one row per epoch) and ``curves.png`` to
the output folder.

Needs ``pip install ".[viz]"``.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import timm
import torch
import torch.nn.functional as F
from digits import write_digits
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import nn
from torch.utils.data import DataLoader

BATCH_SIZE = 64
DIGITS_MEAN, DIGITS_STD = (0.305,), (0.376,)
OnBatch = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """A model to train, with its labels."""

    timm_name: str
    label: str
    rule: str
    family: str
    special_case: bool = False
    kwargs: Dict[str, Any] = field(default_factory=dict)


# agdnet40_k12 with half of the layers per block: L = 22 instead of 40, which trains in under a minute on two cores.
L22 = dict(block_config=(6, 6, 6))

HB, AGD = "Heavy ball: HBNet and its special case ResNet", "Nesterov: AGDNet and its special case DenseNet"
CONTENDERS = {
    "hbnet": Contender("hbnet20", "hbnet20", "(16)", HB),
    "resnet": Contender("hbnet20_resnet", "hbnet20_resnet", "(16), beta2=0, ReLU", HB, special_case=True),
    "agdnet": Contender("agdnet40_k12", "agdnet k=12 L=22", "(21)", AGD, kwargs=L22),
    "densenet": Contender(
        "agdnet40_k12_densenet", "densenet k=12 L=22", "(21), alpha=1, beta=0", AGD, special_case=True, kwargs=L22
    ),
}
RULES = """\
(16): x_next = T(x) + x + beta2 x_prev, beta2 = -1
(21): z_next = sum alpha T(z) + beta (z - sum h z), alpha learned, beta = 0.1"""


@dataclass(frozen=True)
class Epoch:
    """A row of ``results.csv``."""

    model: str
    parameters: int
    epoch: int
    train_loss: float
    val_accuracy: float
    seconds: float  # since the start of the first epoch, with validation


# --- data, training and validation, in the order of timm's train.py ---------------------------------------------------


def make_loader(data: Path, split: str, image_size: int) -> DataLoader:
    """Return timm's loader for one split of the image folder."""
    dataset = create_dataset("folder", root=str(data), split=split, input_img_mode="L")
    return create_loader(
        dataset,
        input_size=(1, image_size, image_size),
        batch_size=BATCH_SIZE,
        is_training=split == "train",
        no_aug=True,  # mirrored or cropped digits are no digits
        crop_pct=1.0,
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
    )


def train_epoch(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer, on_batch: OnBatch) -> float:
    """Train for one epoch and return the mean loss."""
    model.train()
    losses = AverageMeter()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(labels))
        on_batch()
    return losses.avg


@torch.inference_mode()
def validate(model: nn.Module, loader: DataLoader) -> float:
    """Return the top-1 accuracy in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, labels in loader:
        (acc1,) = accuracy(model(images), labels)
        top1.update(acc1.item(), len(labels))
    return top1.avg


def train(contender: Contender, data: Path, args: argparse.Namespace, on_batch: OnBatch) -> Iterator[Epoch]:
    """Train one model and yield the result of each epoch."""
    random_seed(args.seed)  # the same random weights for both models of a pair
    model = timm.create_model(contender.timm_name, in_chans=1, num_classes=10, **contender.kwargs)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, momentum=0.9, weight_decay=1e-4)  # "sgd" is Nesterov
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs)
    train_loader, val_loader = (make_loader(data, split, args.image_size) for split in ("train", "val"))
    parameters = sum(p.numel() for p in model.parameters())
    random_seed(args.seed)  # the same order of images
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        train_loss = train_epoch(model, train_loader, optimizer, on_batch)
        val_accuracy = validate(model, val_loader)
        scheduler.step(epoch)
        yield Epoch(contender.label, parameters, epoch, train_loss, val_accuracy, time.perf_counter() - start)


def train_all(names: Sequence[str], data: Path, args: argparse.Namespace, console: Console) -> Dict[str, List[Epoch]]:
    """Train the models in turn; show a bar on a terminal, lines elsewhere."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(bar_width=20), TextColumn("{task.fields[state]}"))
    batches = args.epochs * len(make_loader(data, "train", args.image_size))
    histories: Dict[str, List[Epoch]] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        for name in names:
            contender, history = CONTENDERS[name], histories.setdefault(name, [])
            task = progress.add_task(contender.label, total=batches, state=f"epoch  1/{args.epochs}")
            for result in train(contender, data, args, on_batch=partial(progress.advance, task)):
                history.append(result)
                state = f"epoch {result.epoch:>2}/{args.epochs}  loss {result.train_loss:.3f}"
                state += f"  val {result.val_accuracy:5.1f} %"
                progress.update(task, state=state)
                if not console.is_terminal:
                    console.print(f"{contender.label:<18} {state}  {result.seconds:5.1f} s", highlight=False)
    return histories


# --- results ----------------------------------------------------------------------------------------------------------


def results_table(histories: Dict[str, List[Epoch]]) -> Table:
    """Return a table with the last epoch of each model."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=RULES, caption_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("rule")
    for header in ("parameters", "train\nloss", "validation\naccuracy %", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, history in histories.items():
        last = history[-1]
        numbers = f"{last.parameters:,}", f"{last.train_loss:.4f}", f"{last.val_accuracy:.2f}", f"{last.seconds:.1f}"
        table.add_row(last.model, CONTENDERS[name].rule, *numbers)
    return table


def write_csv(path: Path, histories: Dict[str, List[Epoch]]) -> None:
    """Write one row per model and epoch."""
    rows = [asdict(result) for history in histories.values() for result in history]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(axes: Axes, histories: Dict[str, List[Epoch]], attribute: str) -> None:
    """Plot a quantity by epoch; special cases are dashed."""
    for name, history in histories.items():
        dashed = CONTENDERS[name].special_case
        axes.plot(
            [result.epoch for result in history],
            [getattr(result, attribute) for result in history],
            color="#D55E00" if dashed else "#0072B2",  # Okabe and Ito's vermillion and blue
            linestyle="--" if dashed else "-",
            marker="o",
            markersize=3.5,
            label=history[0].model,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def draw_curves(path: Path, histories: Dict[str, List[Epoch]], caveat: str) -> None:
    """Draw validation accuracy above training loss, with one column per family."""
    families = list(dict.fromkeys(CONTENDERS[name].family for name in histories))
    figure = Figure(figsize=(1 + 4 * len(families), 6), layout="constrained")
    grid = figure.subplots(2, len(families), sharex=True, sharey="row", squeeze=False)
    for (above, below), family in zip(grid.T, families):
        members = {name: history for name, history in histories.items() if CONTENDERS[name].family == family}
        plot(above, members, "val_accuracy")
        plot(below, members, "train_loss")
        above.set_title(family, fontsize="medium")
        above.legend(loc="lower right")
        below.set(xlabel="epoch", yscale="log")
    grid[0, 0].set(ylabel="validation accuracy (%)", ylim=(0, 103))
    grid[1, 0].set_ylabel("training loss")
    figure.supxlabel(caveat, fontsize="small")
    figure.savefig(path, dpi=150)


# --- command line -----------------------------------------------------------------------------------------------------


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser of integers ≥ ``minimum``."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {minimum}")
        return int(text)

    return integer


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the digits, results.csv and curves.png")
    parser.add_argument("--models", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="models to train")
    parser.add_argument("--epochs", type=at_least(1), default=10, help="epochs per model")
    parser.add_argument("--lr", type=float, default=0.1, help="initial learning rate")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the weights and of the order of images")
    parser.add_argument("--image-size", type=at_least(8), default=16, help="size to which the 8x8 scans are resized")
    parser.add_argument(
        "--limit", type=at_least(BATCH_SIZE), help="number of training images; validation has a quarter of it"
    )
    return parser.parse_args()


def main() -> None:
    """Write the digits, train, and report."""
    args = parse_args()
    console = Console()
    data = write_digits(args.out / "digits", args.limit, args.limit and args.limit // 4)
    images = len(make_loader(data, "val", args.image_size).dataset)
    caveat = f"One seed and {images} validation images, {100 / images:.2f} points each: no evidence of which is better."
    histories = train_all(list(dict.fromkeys(args.models)), data, args, console)
    write_csv(args.out / "results.csv", histories)
    draw_curves(args.out / "curves.png", histories, caveat)
    console.print(results_table(histories))
    console.print(caveat, highlight=False)
    print(f"Curves: {args.out / 'curves.png'}\nNumbers: {args.out / 'results.csv'}")


if __name__ == "__main__":
    main()
