"""The simulation of section 6.3: five networks fit random pairs (Table 2).

The paper states data, networks and loss, but neither the optimiser nor its learning rate: :class:`Recipe` marks our
choices. The product of learning rate and steps, 100, was chosen so that the network of gradient descent ends near the
figure of the paper. The order of the networks is not fitted.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_int, short
from ._files import clear_temporaries, printable, read_table, write_atomically
from .algorithms.methods import ALGORITHMS
from .propagation.probing import layers_per_step
from .propagation.unrolled import Unrolled
from .run_folder import lock_file

__all__ = [
    "PAPER",
    "Recipe",
    "Run",
    "TableEntry",
    "build",
    "read_runs",
    "simulate",
    "summarise",
    "to_markdown",
    "train",
]

DEPTHS = (10, 20, 30, 40)

# Table 2: MSE by network, one value per depth.
PAPER = {
    "admm": dict(zip(DEPTHS, (1.07576, 1.07495, 1.07665, 1.07749))),
    "gd": dict(zip(DEPTHS, (1.00644, 1.00679, 1.00652, 1.00653))),
    "hb": dict(zip(DEPTHS, (1.00443, 1.00449, 1.00455, 1.00457))),
    "agd": dict(zip(DEPTHS, (1.00270, 1.00215, 1.00204, 1.00213))),
    "agd2": dict(zip(DEPTHS, (1.00745, 1.00227, 1.00086, 0.99964))),
}


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings of a training; weights start Xavier uniform and biases at 0 (our choice)."""

    pairs: int = 10_000  # §6.3
    dimension: int = 100  # §6.3
    lr: float = 0.5  # ours, constant; plain SGD
    batch_size: int = 1_000  # ours
    steps: int = 200  # ours

    def __post_init__(self) -> None:
        for name in ("pairs", "dimension", "batch_size", "steps"):
            check_int(name, getattr(self, name), 1)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr!r}: must be a positive number")
        if self.pairs % self.batch_size:
            raise ValueError(f"batch_size={self.batch_size!r}: must divide pairs={self.pairs!r}")


class Run(NamedTuple):
    """One trained network.

    ``mse`` is the mean over all pairs and dimensions after training, NaN if training diverged. ``output_std`` is the
    standard deviation of the output over the pairs, averaged over dimensions; it is 0 if the network ignores its input.
    """

    network: str
    depth: int
    seed: int
    mse: float
    output_std: float
    seconds: float


class TableEntry(NamedTuple):
    """An entry of Table 2: the printed MSE or ``None``, and mean and spread of our runs over seeds."""

    network: str
    depth: int
    paper: float | None
    mse: float
    spread: float
    output_std: float
    seeds: int


def build(network: str, depth: int, recipe: Recipe, generator: torch.Generator) -> Unrolled:
    """Return a network of Table 2: an algorithm unrolled over layers sigmoid(W_k x + b_k).

    Raises:
        ValueError: the network is unknown, or the depth is not an integer ≥ 1.
    """
    _check_network(network, depth)
    algorithm = ALGORITHMS[network]()

    def layer() -> nn.Module:
        linear = nn.Linear(recipe.dimension, recipe.dimension)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(linear, nn.Sigmoid())

    layers = [[layer() for _ in range(count)] for count in layers_per_step(algorithm, depth)]
    return Unrolled(algorithm, [group[0] if len(group) == 1 else group for group in layers])


def train(
    network: str, depth: int, seed: int, recipe: Recipe | None = None, on_step: Callable[[], None] = lambda: None
) -> Run:
    """Draw pairs from N(0, I), train one network on them by (15), and measure it on the same pairs.

    Args:
        network: a name in :data:`~optinspired_plugins.algorithms.methods.ALGORITHMS`.
        depth: number of steps of the algorithm, ≥ 1.
        seed: seed of pairs, weights and order.
        recipe: other settings; ``None`` for the default.
        on_step: called after every step.

    Raises:
        ValueError: an argument is out of range.
    """
    recipe = recipe or Recipe()
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(2, recipe.pairs, recipe.dimension, generator=generator)
    net = build(network, depth, recipe, generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr)
    for batch in _batches(recipe, generator):
        loss = F.mse_loss(net(inputs[batch]), targets[batch])
        if not loss.isfinite():
            return Run(network, depth, seed, math.nan, math.nan, time.perf_counter() - began)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step()
    with torch.no_grad():
        output = torch.cat([net(part) for part in inputs.split(recipe.batch_size)])
    mse = F.mse_loss(output, targets).item()
    return Run(network, depth, seed, mse, output.std(0).mean().item(), time.perf_counter() - began)


def _batches(recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of a batch per step, every pair once per epoch."""
    left: list[Tensor] = []
    for _ in range(recipe.steps):
        if not left:
            left = list(torch.randperm(recipe.pairs, generator=generator).split(recipe.batch_size))
        yield left.pop()


def simulate(
    path: Path,
    networks: Iterable[str] = ALGORITHMS,
    depths: Iterable[int] = DEPTHS,
    seeds: Iterable[int] = (0, 1, 2),
    recipe: Recipe | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_run: Callable[[Run, bool], None] = lambda run, stored: None,
) -> list[Run]:
    """Train networks of all depths with all seeds, and return their runs.

    Args:
        path: CSV of the runs, rewritten after each run; runs that it already has are not repeated.
        networks: names.
        depths: numbers of steps.
        seeds: one run of each network and depth per seed.
        recipe: ``None`` for the default.
        on_step: called after every training step.
        on_run: called with each run, and True if it was in the file.

    Raises:
        ValueError: an argument is out of range, or the file is damaged or has runs of another recipe.
        RuntimeError: another process writes the file.
        OSError: the file cannot be written; it still has the earlier runs.
    """
    recipe = recipe or Recipe()
    keys = [(network, depth, seed) for network in networks for depth in depths for seed in seeds]
    for network, depth, _ in keys:
        _check_network(network, depth)
    with lock_file(path.with_name(f".{path.name}.lock")):
        clear_temporaries(path.parent, [path.name])
        runs = {run[:3]: run for run in read_runs(path, recipe)} if path.exists() else {}
        for key in keys:
            stored = key in runs
            if not stored:
                runs[key] = train(*key, recipe, on_step)
                write_atomically(path, _to_csv(runs.values(), recipe))
            on_run(runs[key], stored)
        rounded = {run[:3]: run for run in read_runs(path)}  # as in the file, so that later tables agree
    return [rounded[key] for key in keys]


def _to_csv(runs: Iterable[Run], recipe: Recipe) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Run._fields, *(field.name for field in fields(recipe))])
    for run in runs:
        measured = f"{run.mse:.6f}", f"{run.output_std:.3e}", f"{run.seconds:.1f}"
        writer.writerow([*run[:3], *measured, *astuple(recipe)])
    return text.getvalue()


def read_runs(path: Path, recipe: Recipe | None = None) -> list[Run]:
    """Read the runs of a file.

    Args:
        path: the CSV.
        recipe: the recipe of all runs; ``None`` for any.

    Raises:
        ValueError: a line is damaged or has another recipe; the message names it.
    """
    runs = []
    for line, row in read_table(path, [*Run._fields, *asdict(Recipe())]).items():
        try:
            run, stored = _parse_run(row)
        except ValueError as error:
            raise ValueError(f"{printable(path)}, line {line}: not a run of the simulation ({error})") from None
        if recipe is not None and stored != recipe:
            mine = asdict(recipe)
            other = ", ".join(f"{k}={v!r} (here {mine[k]!r})" for k, v in asdict(stored).items() if v != mine[k])
            where = f"{printable(path)}, line {line}"
            raise ValueError(f"{where}: a run with {other}: must be of one recipe, choose another file")
        runs.append(run)
    return runs


def _parse_run(row: Mapping[str, str]) -> tuple[Run, Recipe]:
    """Return the run and the recipe of a row; ValueError if a field is invalid."""

    def number(name: str, kind: type[Any]) -> Any:
        try:
            return kind(row[name])
        except ValueError:
            raise ValueError(f"{name}={short(row[name])}: must be a number") from None

    run = Run(row["network"], number("depth", int), number("seed", int), *(number(n, float) for n in Run._fields[3:]))
    _check_network(run.network, run.depth)
    check_int("seed", run.seed, 0)
    for name, value in (("mse", run.mse), ("output_std", run.output_std), ("seconds", run.seconds)):
        if not 0 <= value < math.inf and not (math.isnan(value) and name != "seconds"):
            raise ValueError(f"{name}={value!r}: must be a finite number ≥ 0, or nan of a training that diverged")
    return run, Recipe(**{name: number(name, type(value)) for name, value in asdict(Recipe()).items()})


def summarise(runs: Iterable[Run]) -> list[TableEntry]:
    """Group runs by network and depth, in order of appearance.

    ``spread`` is the standard deviation over seeds, NaN for a single seed; ``output_std`` is the largest of the group.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.network, run.depth), []).append(run)
    entries = []
    for (network, depth), group in groups.items():
        errors = [run.mse for run in group]
        spread = stdev(errors) if len(errors) > 1 else math.nan
        largest = max(run.output_std for run in group)
        printed = PAPER.get(network, {}).get(depth)
        entries.append(TableEntry(network, depth, printed, mean(errors), spread, largest, len(group)))
    return entries


def to_markdown(entries: Iterable[TableEntry]) -> str:
    """Return the entries as a Markdown table, paper and measured in separate columns."""
    lines = [
        "| network | depth | MSE, paper | MSE, measured | std over seeds | seeds | std of the output |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        printed = "" if entry.paper is None else f"{entry.paper:.5f}"
        spread = "" if math.isnan(entry.spread) else f"{entry.spread:.5f}"
        measured = f"{entry.mse:.5f} | {spread} | {entry.seeds} | {entry.output_std:.1e}"
        lines.append(f"| {entry.network} | {entry.depth} | {printed} | {measured} |")
    return "\n".join(lines) + "\n"


def _check_network(network: str, depth: int) -> None:
    if network not in ALGORITHMS:
        raise ValueError(f"network={short(network)}: must be one of {', '.join(ALGORITHMS)}")
    check_int("depth", depth, 1)
