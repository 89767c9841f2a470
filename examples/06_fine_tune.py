"""Fine-tune weights of this package on digits.

    python examples/06_fine_tune.py --out runs/fine-tune

``hbnet20.cifar10`` was trained on photographs. One epoch on scanned digits, from these weights and from random ones,
with timm's loader and optimiser, the same images and the same order.

Needs ``pip install ".[viz]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from digits import write_digits
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader


def make_loader(model: nn.Module, data: Path, split: str) -> DataLoader:
    """Return timm's loader with the size and the normalisation that the weights expect."""
    config = resolve_data_config(model=model)
    return create_loader(
        create_dataset("folder", root=str(data), split=split),
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        batch_size=64,
        is_training=split == "train",
        no_aug=True,  # mirrored or cropped digits are no digits
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
    )


def fine_tune(model: nn.Module, loader: DataLoader, epochs: int) -> None:
    """Train all weights; the learning rate falls to 0."""
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Return the top-1 accuracy in percent."""
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return 100 * right / len(loader.dataset)


def main() -> None:
    """Fine-tune, and train from random weights beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the digits")
    parser.add_argument("--model", default="hbnet20.cifar10", help="a name of timm.list_pretrained")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    data = write_digits(args.out / "digits")
    for pretrained in (True, False):
        random_seed(0)
        model = timm.create_model(args.model, pretrained=pretrained, num_classes=10)
        if pretrained:
            model.reset_classifier(10)  # digits are other classes than the weights know
        random_seed(0)  # the same order of images
        fine_tune(model, make_loader(model, data, "train"), args.epochs)
        top1 = accuracy(model, make_loader(model, data, "val"))
        start = args.model if pretrained else "random weights"
        print(f"{start:<16} {args.epochs} epoch(s): {top1:.1f} % of the validation images")


if __name__ == "__main__":
    main()
