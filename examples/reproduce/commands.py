"""Arguments of the commands, and the loop over runs."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from rows import RESULTS, require

from nni_spaces.runs.data import read_images

__all__ = [
    "Place",
    "at_least",
    "command_line",
    "common_arguments",
    "fingerprint",
    "not_negative",
    "place_of",
    "run_missing",
]

Job = TypeVar("Job")


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser of integers ≥ ``minimum``."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {minimum}")
        return int(text)

    return integer


def not_negative(text: str) -> float:
    """Parse a finite number ≥ 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0, and finite")
    return float(text)


def common_arguments(description: str, table: str, seeds: Iterable[int]) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all training commands share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="cifar10", help="cifar10 (torchvision's download), or an .npz file")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=list(seeds), help="seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce") / table, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: auto, cpu, gpu")
    return parser


def fingerprint(source: str) -> str:
    """Return a hash of the images, independent of their file."""
    digests = []
    for split in ("train", "test"):
        images, labels, _ = read_images(source, split=split)
        digests.append(hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Place:
    """Destination of runs and rows, and Lightning's accelerator."""

    out: Path
    results: Path  # CSV file
    shared: Mapping[str, Any]  # fields with one value in all rows of that file
    accelerator: str = "auto"

    @property
    def device(self) -> torch.device:
        """The device that Lightning selects for the accelerator."""
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        return pl.Trainer(accelerator=self.accelerator, devices=1, **quiet).strategy.root_device


def place_of(parser: argparse.ArgumentParser, args: argparse.Namespace, table: str, **shared: Any) -> Place:
    """Return the destination; unreadable images, or a file with rows of others, are usage errors."""
    results = args.results / f"{table}.csv"
    try:
        shared["data_sha256"] = fingerprint(args.data)
        require(results, shared)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return Place(args.out, results, shared, args.accelerator)


def command_line(script: str, data: str, **options: Any) -> str:
    """Return the command of one row, without the data's folder."""
    words = [f"python examples/reproduce/{script}.py", f"--data {data if data == 'cifar10' else Path(data).name}"]
    for name, value in options.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def run_missing(
    jobs: Iterable[Job], name: Callable[[Job], str], is_done: Callable[[Job], bool], run: Callable[[Job], str]
) -> None:
    """Run the jobs that have no row and are not run by another process."""
    for job in jobs:
        if is_done(job):
            print(f"{name(job)}: has its row", flush=True)
            continue
        try:
            print(f"{name(job)}: {run(job)}", flush=True)
        except RuntimeError as error:
            if "another process" not in str(error):
                raise
            print(f"{name(job)}: {error}", file=sys.stderr, flush=True)
