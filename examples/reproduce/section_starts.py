"""The starts of γ on the results page: trainings by ``benchmarks/gpu.sh``."""

from __future__ import annotations

from pathlib import Path

from claims import Claim, Row, Section, Table, by_seed, grouped, name_seeds, numbers
from comparison import compare, mean_and_spread, pool
from rows import read_rows

__all__ = ["starts"]

COMMAND = "benchmarks/gpu.sh --blocks cifar10 --epochs EPOCHS --seeds 3 --jobs 8 --networks PATTERN --data FOLDER"
ON_CPU = "--device cpu --bfloat16 --jobs 1 --minutes 600 --resume"
ABOUT = (
    "Images of CIFAR-10 in batches of 128, learning rate 0.1 with a cosine unless the table has another, all 10,000 "
    "test images. γ is the weight of the last normalisation of each transform. *rule* is "
    'the default of HBNet and OptNet, `init_last="auto"`: 1/√(n − ⌊n/3⌋) for n transforms of HBNet, 1/√n for ResNet; '
    "*rule/3* is a third of it. γ = 0 is the default of timm's ResNets. *Momentum* and *Nesterov ResNet* are "
    "`optnet56` by the residual reading, of the heavy ball with β = 0.9 and of Nesterov's method; *not normalised* is "
    "`final_norm=False`. A transform of the pre-activation ResNet ends in a convolution, which starts at 0, as in "
    "timm. 0.05 is the learning rate that timm's `train.py` takes for SGD with 128 images. A seed has the same images, "
    "crops, mirrors and first weights on every device. Not every start was run with every seed, and one seed decides "
    "no difference."
)
SETTING = ("model", "start", "lr")
NO_RELU = "ResNet-56 without its last ReLU"
# Columns of the table by depth: a network, and as in SETTING its start and learning rate.
BY_DEPTH = {
    "HBNet, γ = 1": ("HBNet-{}", "1", "0.1"),
    "HBNet, rule (default)": ("HBNet-{}", "rule", "0.1"),
    "ResNet without its last ReLU, rule": ("ResNet-{} without its last ReLU", "rule", "0.1"),
    "ResNet, γ = 0 (timm's default)": ("ResNet-{}", "0", "0.1"),
}
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
    (("HBNet-20", "rule"), ("ResNet-20 without its last ReLU", "rule")),
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
    # A training that was run again on another device. This quantity, and notes of added seeds, are entered by hand.
    repeated = [row for row in rows if row["quantity"] == "test error, repeated"]
    rows = [row for row in rows if row["quantity"] == "test error" and row["value"]]
    if not rows:
        return Section([], [], {})
    devices = sorted({row["device"] for row in rows})
    about = f"`{COMMAND}` ({', '.join(devices)}), on a CPU with `{ON_CPU}`. {ABOUT}"
    content: list[str | Table] = ["## Starts", "", about, ""]
    for (recipe,), block in grouped(rows, ("recipe",)).items():
        groups = grouped(block, SETTING)
        finite = {setting: _finite(group) for setting, group in groups.items()}
        content += [f"### {recipe}", "", *_by_depth(finite), *_errors(groups, len(devices) > 1), ""]
        again = [row for row in repeated if row["recipe"] == recipe]
        notes = [_repetition(row, finite[tuple(row[name] for name in SETTING)]) for row in again]
        notes += [f"{_training(row)}, was {row['note']}." for row in block if row["note"].startswith("added")]
        content += [*notes, *[""] * bool(notes), Table("difference of test error, points", _claims(groups, recipe)), ""]
    return Section(content, [], {})


def _by_depth(groups: dict[tuple[str, ...], list[Row]]) -> list[str]:
    """Return the table of mean errors by depth, empty if no depth has any."""
    lines = []
    for depth in (20, 56, 110):
        found = [groups.get((model.format(depth), *rest), []) for model, *rest in BY_DEPTH.values()]
        if any(found):
            cells = (mean_and_spread(numbers(group, "value")) if group else "" for group in found)
            lines.append(f"| {depth} | " + " | ".join(cells) + " |")
    heads = ["| layers | " + " | ".join(BY_DEPTH) + " |", "|---|" + "---:|" * len(BY_DEPTH)]
    about = "Test errors by depth, measured, of runs that do not diverge; the next table has their seeds."
    return [about, "", *heads, *lines, ""] if lines else []


def _errors(groups: dict[tuple[str, ...], list[Row]], name_devices: bool) -> list[str]:
    """Return the table of test errors."""
    lines = ["| network | γ | learning rate | test error, measured | seeds |", "|---|---|---:|---:|---|"]
    for (model, start, lr), group in groups.items():
        errors, diverged = numbers(_finite(group), "value"), [row["seed"] for row in group if row["finite"] == "False"]
        note = _seeds(group, name_devices) + (f" (diverged: {', '.join(diverged)})" if diverged else "")
        lines.append(f"| {model} | {start} | {lr} | {mean_and_spread(errors) if errors else ''} | {note} |")
    return lines


def _repetition(row: Row, group: list[Row]) -> str:
    """Return a sentence about a training that another device repeated."""
    first = by_seed(group, "value")[row["seed"]]
    ends = f"ended at {float(row['value']):.2f} instead of {first:.2f}"
    return f"{_training(row)}, was repeated on {row['device']}, and {ends}."


def _training(row: Row) -> str:
    return f"{row['model']}, γ = {row['start']}, seed {row['seed']}"


def _finite(rows: list[Row]) -> list[Row]:
    """Return the trainings that did not diverge."""
    return [row for row in rows if row["finite"] == "True"]


def _seeds(group: list[Row], name_device: bool) -> str:
    """Return the seeds as text, by device if there are several."""
    if not name_device:
        return name_seeds(group, [])
    parts = {device.removeprefix("NVIDIA ").split()[0]: part for (device,), part in grouped(group, ("device",)).items()}
    return "; ".join(f"{name_seeds(part, [])} ({device})" for device, part in parts.items())


def _claims(groups: dict[tuple[str, ...], list[Row]], recipe: str) -> tuple[Claim, ...]:
    claims, pooled = [], pool(numbers(_finite(group), "value") for group in groups.values())
    for pair in PAIRS:
        both = [groups.get((*setting, "0.1")[:3], []) for setting in pair]
        ours, peer = map(_finite, both)
        if ours and peer:
            difference = compare(by_seed(ours, "value"), by_seed(peer, "value"), pooled)
            setting = recipe + ", without runs that diverged" * (both != [ours, peer])
            labels = [f"{model}, γ = {start}" + "".join(f", at {rate}" for rate in lr) for model, start, *lr in pair]
            claims.append(Claim(setting, *labels, "test error", difference))
    return tuple(claims)
