"""What the commands of this folder share: their arguments, and running what is missing from a file of results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from rows import RESULTS

from nni_spaces.data import read_images

__all__ = ["at_least", "check_data", "command_line", "common_arguments", "run_missing"]

Job = TypeVar("Job")


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser of integers not below ``minimum``."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {minimum}")
        return int(text)

    return integer


def common_arguments(description: str, table: str, seeds: Iterable[int]) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every command that trains."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="cifar10", help="cifar10 (torchvision's download), or an .npz file")
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=list(seeds), help="seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce") / table, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{table}.csv", help="file of the results")
    parser.add_argument("--accelerator", default="auto", help="Lightning's: auto, cpu, gpu")
    return parser


def check_data(parser: argparse.ArgumentParser, source: str) -> None:
    """End the command where the images cannot be read, before anything is made."""
    try:
        for split in ("train", "test"):
            read_images(source, 2, split)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def command_line(script: str, data: str, **options: Any) -> str:
    """Return the command that makes one row; a file is named without its folder."""
    words = [f"python examples/reproduce/{script}.py", f"--data {data if data == 'cifar10' else Path(data).name}"]
    for name, value in options.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def run_missing(
    jobs: Iterable[Job], name: Callable[[Job], str], is_done: Callable[[Job], bool], run: Callable[[Job], str]
) -> None:
    """Run the jobs that have no row, one after the other; one that another process runs is left to it."""
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
