"""An algorithm of one's own, three times: an optimiser, a picture, and timm models that train on digits.

    python examples/02_your_own_algorithm.py --out runs/own

my_algorithms.py holds two: the optimised gradient method and a heavy ball that learns its β. The first minimises a
quadratic beside the package's algorithms and is drawn; both become ``optnet20`` and are trained for a few epochs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from digits import write_digits
from my_algorithms import LearnedHeavyBall, OptimizedGradient
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy

from optinspired_plugins import GradientDescent, Nesterov
from optinspired_plugins.algorithms.rates import distances, quadratic
from optinspired_plugins.plotting.connections import draw_algorithm


def minimise(steps: int = 100) -> None:
    """Print how far each algorithm still is from the minimum of a quadratic with κ = 10⁴."""
    problem = quadratic(1e4)
    for algorithm in (GradientDescent(), Nesterov(), OptimizedGradient()):
        z = problem.start
        state = algorithm.init(z)
        for _ in range(steps):
            state = algorithm.step(state, problem.grad)
        value = 0.5 * (algorithm.result(state) * problem.grad(algorithm.result(state))).sum()
        remaining = distances(algorithm, problem, steps)[-1]
        print(f"{type(algorithm).__name__:<18} f after {steps} steps {value:.2e}, distance {remaining:.3f}")


def train(algorithm: object, data: Path, epochs: int) -> float:
    """Train ``optnet20`` on the digits and return its validation accuracy in percent."""
    torch.manual_seed(0)
    size = dict(input_size=(3, 16, 16), batch_size=64, use_prefetcher=False, num_workers=0, device=torch.device("cpu"))
    loaders = {}
    for split in ("train", "val"):
        dataset = create_dataset("", root=str(data), split=split)
        loaders[split] = create_loader(dataset, is_training=split == "train", no_aug=True, **size)
    model = timm.create_model("optnet20", algorithm=algorithm, num_classes=10)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4)
    for _ in range(epochs):
        for images, labels in loaders["train"]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    top1 = AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, labels in loaders["val"]:
            top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    for name, parameter in model.named_parameters():
        if "algorithm" in name:
            print(f"  {name} = {parameter.item():.3f} after training")
    return top1.avg


def main() -> None:
    """Minimise, draw, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the digits and the drawing")
    parser.add_argument("--epochs", type=int, default=3, help="epochs a model")
    args = parser.parse_args()
    minimise()
    data = write_digits(args.out / "digits")
    draw_algorithm(OptimizedGradient(), title="Optimised gradient method").savefig(args.out / "algorithm.png", dpi=130)
    print(f"Drawing: {args.out / 'algorithm.png'}")
    for algorithm in (OptimizedGradient(), LearnedHeavyBall()):
        reached = train(algorithm, data, args.epochs)
        print(f"optnet20 of {type(algorithm).__name__}: {reached:.2f} % of 355 digits after {args.epochs} epochs")


if __name__ == "__main__":
    main()
