"""A user's algorithm as optimiser, drawing and timm model.

    python examples/02_your_own_algorithm.py --out runs/own

my_algorithms.py has two algorithms: the optimised gradient method, and a heavy ball that learns its β. The first one
minimises a quadratic next to the package's algorithms, and is drawn. Both become an ``optnet20``, which is trained for
a few epochs on digits.

Needs ``pip install ".[viz]"``.
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
    """Compare the algorithms on a quadratic with κ = 10⁴."""
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
    """Train ``optnet20`` and return its validation accuracy in percent."""
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
    """Minimise, draw and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the digits and the drawing")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per model")
    args = parser.parse_args()
    minimise()
    data = write_digits(args.out / "digits")
    draw_algorithm(OptimizedGradient(), title="Optimised gradient method").savefig(args.out / "algorithm.png", dpi=130)
    print(f"Drawing: {args.out / 'algorithm.png'}")
    for algorithm in (OptimizedGradient(), LearnedHeavyBall()):
        top1 = train(algorithm, data, args.epochs)
        print(f"optnet20 of {type(algorithm).__name__}: {top1:.2f} % of 355 digits after {args.epochs} epochs")


if __name__ == "__main__":
    main()
