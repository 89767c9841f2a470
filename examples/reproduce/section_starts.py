"""The starts of γ on the results page: trainings by ``benchmarks/gpu.sh``."""

from __future__ import annotations

from pathlib import Path

from claims import Claim, Row, Section, Table, by_seed, grouped, name_seeds, numbers
from comparison import compare, mean_and_spread, pool
from rows import read_rows

__all__ = ["starts"]

COMMAND = "benchmarks/gpu.sh --blocks cifar10 --epochs 8 --seeds 3 --jobs 8 --networks PATTERN --data FOLDER"
ON_CPU = "--device cpu --bfloat16 --jobs 1 --minutes 600 --resume"
ABOUT = (
    "20,000 training and 10,000 test images of CIFAR-10, 8 epochs, batches of 128, learning rate 0.1 with a cosine "
    "unless the table has another, bfloat16. γ is the weight of the last normalisation of each transform. *rule* is "
    'the default of HBNet and OptNet, `init_last="auto"`: 1/√(n − ⌊n/3⌋) for n transforms of HBNet, 1/√n for ResNet; '
    "*rule/3* is a third of it. γ = 0 is the default of timm's ResNets. *Momentum* and *Nesterov ResNet* are "
    "`optnet56` by the residual reading, of the heavy ball with β = 0.9 and of Nesterov's method; *not normalised* is "
    "`final_norm=False`. A transform of the pre-activation ResNet ends in a convolution, which starts at 0, as in "
    "timm. 0.05 is the learning rate that timm's `train.py` takes for SGD with 128 images. A seed has the same images, "
    "crops, mirrors and first weights on every device. Not every start was run with every seed, and one seed decides "
    "no difference."
)
NO_RELU = "ResNet-56 without its last ReLU"
# Runs that were added after others had been seen.
ADDED = {(NO_RELU, "3"): "Seed 3 of HBNet-56 and of ResNet-56 without its last ReLU was added after seeds 0, 1 and 2."}
# Pairs of a network, its start, and the learning rate unless it is 0.1.
PAIRS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("HBNet-56", "rule"), ("HBNet-56", "1")),
    (("HBNet-56", "rule/3"), ("HBNet-56", "rule")),
    (("HBNet-56", "0.1"), ("HBNet-56", "rule")),
    (("HBNet-56", "0.03"), ("HBNet-56", "rule")),
    (("HBNet-20", "rule"), ("HBNet-20", "1")),
    (("HBNet-20", "rule/3"), ("HBNet-20", "rule")),
    (("HBNet-50, narrow", "rule"), ("HBNet-50, narrow", "1")),
    (("HBNet-50, narrow", "rule/3"), ("HBNet-50, narrow", "rule")),
    (("HBNet-56", "rule"), ("ResNet-56", "0")),
    (("HBNet-56", "rule"), (NO_RELU, "rule")),
    ((NO_RELU, "rule"), ("ResNet-56", "0")),
    ((NO_RELU, "rule"), (NO_RELU, "1")),
    (("HBNet-20", "rule"), ("ResNet-20", "0")),
    (("HBNet-110", "rule"), ("HBNet-110", "1")),
    (("HBNet-110", "rule"), ("ResNet-110", "0")),
    (("HBNet-110", "rule"), ("ResNet-110 without its last ReLU", "rule")),
    (("Momentum ResNet-56", "rule"), ("ResNet-56", "0")),
    (("Momentum ResNet-56", "rule"), ("HBNet-56", "rule")),
    (("Nesterov ResNet-56", "rule"), ("ResNet-56", "0")),
    (("Nesterov ResNet-56", "rule"), ("HBNet-56", "rule")),
    (("HBNet-56 with a final normalisation", "rule"), ("HBNet-56", "rule")),
    (("HBNet-56", "rule"), ("pre-activation ResNet-56", "0")),
    (("HBNet-56", "rule"), ("pre-activation ResNet-56", "1")),
    (("HBNet-56", "rule", "0.05"), ("ResNet-56", "0", "0.05")),
    (("HBNet-56", "rule", "0.05"), (NO_RELU, "rule", "0.05")),
    (("HBNet-56", "rule", "0.05"), ("HBNet-56", "rule")),
    (("ResNet-56", "0", "0.05"), ("ResNet-56", "0")),
]


def starts(folder: Path | None) -> Section:
    """Return the section; it is empty without a folder of ``benchmarks/gpu.sh``."""
    rows = read_rows(folder / "cifar10.csv") if folder else []
    # A training that was run again on another device; this quantity is entered by hand.
    repeated = [row for row in rows if row["quantity"] == "test error, repeated"]
    rows = [row for row in rows if row["quantity"] == "test error" and row["value"]]
    if not rows:
        return Section([], [], {})
    groups = grouped(rows, ("model", "start", "lr"))
    devices = sorted({row["device"] for row in rows})
    lines = [
        "## Starts",
        "",
        f"`{COMMAND}` ({', '.join(devices)}), on a CPU with `{ON_CPU}`. {ABOUT}",
        "",
        "| network | γ | learning rate | test error, measured | seeds |",
        "|---|---|---:|---:|---|",
    ]
    for (model, start, lr), group in groups.items():
        errors, diverged = numbers(_finite(group), "value"), [row["seed"] for row in group if row["finite"] == "False"]
        note = _seeds(group, len(devices) > 1) + (f" (diverged: {', '.join(diverged)})" if diverged else "")
        lines.append(f"| {model} | {start} | {lr} | {mean_and_spread(errors) if errors else ''} | {note} |")
    groups = {setting: _finite(group) for setting, group in groups.items()}
    notes = [_repetition(row, groups[row["model"], row["start"], row["lr"]]) for row in repeated]
    notes += [ADDED[run] for row in rows if (run := (row["model"], row["seed"])) in ADDED]
    lines += ["", *notes]
    return Section([*lines, "", Table("difference of test error, points", _claims(groups)), ""], [], {})


def _repetition(row: Row, group: list[Row]) -> str:
    """Return a sentence about a training that another device repeated."""
    first = by_seed(group, "value")[row["seed"]]
    training = f"{row['model']}, γ = {row['start']}, seed {row['seed']}"
    return f"{training} was repeated on {row['device']}, and ended at {float(row['value']):.2f} instead of {first:.2f}."


def _finite(rows: list[Row]) -> list[Row]:
    """Return the trainings that did not diverge."""
    return [row for row in rows if row["finite"] == "True"]


def _seeds(group: list[Row], name_device: bool) -> str:
    """Return the seeds as text, by device if there are several."""
    if not name_device:
        return name_seeds(group, [])
    parts = {device.removeprefix("NVIDIA ").split()[0]: part for (device,), part in grouped(group, ("device",)).items()}
    return "; ".join(f"{name_seeds(part, [])} ({device})" for device, part in parts.items())


def _claims(groups: dict[tuple[str, ...], list[Row]]) -> tuple[Claim, ...]:
    claims, pooled = [], pool(numbers(group, "value") for group in groups.values())
    for pair in PAIRS:
        ours, peer = (groups.get((*setting, "0.1")[:3]) for setting in pair)
        if ours and peer:
            difference = compare(by_seed(ours, "value"), by_seed(peer, "value"), pooled)
            labels = [f"{model}, γ = {start}" + "".join(f", at {rate}" for rate in lr) for model, start, *lr in pair]
            claims.append(Claim("20,000 images, 8 epochs, bfloat16", *labels, "test error", difference))
    return tuple(claims)
