"""Search and retrain cells of both spaces, or of an algorithm's space, on digits.

    python examples/03_search_on_digits.py --out runs/search
    python examples/03_search_on_digits.py --out runs/own --algorithm my_algorithms:OptimizedGradient

Supernets of 4 cells and 4 channels are trained on 1,442 scanned digits. The networks of the resulting cells, with 6
cells and 12 channels, are trained from scratch and tested on the other 355 digits. A report is written about each
search. An interrupted run resumes. With ``--algorithm`` the edges of a cell are read off an algorithm, here the
optimised gradient method in ``my_algorithms.py``, and drawn; the search starts at the algorithm.

Needs ``pip install ".[nni,viz]"``.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins import load_algorithm
from optinspired_plugins.plotting.cells import draw_cells, draw_pattern
from optinspired_plugins.propagation.named import NETWORK_ALGORITHMS
from optinspired_plugins.propagation.patterns import pattern
from optinspired_plugins.report.page import write_report

# name -> space and initialisation of α
SPACES: dict[str, dict[str, Any]] = {
    "hb": dict(space="hb", initialization="heavy-ball"),
    "agd": dict(space="agd", initialization="zero"),
}


def run(
    name: str, space: dict[str, Any], folder: Path, epochs: int, retrain_epochs: int, limit: int | None = None
) -> float:
    """Search, draw and retrain; return the test accuracy in percent."""

    def show(step: str, number: int, entry: dict[str, Any]) -> None:
        figures = (f"{key} {entry[key]:.2f}" for key in entry if key.endswith(("loss", "top1")))
        print(f"{name:<4} {step:<8} epoch {entry['epoch'] + 1}/{number}  {',  '.join(figures)}", flush=True)

    common = dict(data="digits", limit=limit, padding=1)
    small = dict(epochs=epochs, batch_size=32, channels=4, cells=4, alpha_lr=0.01)
    settings = SearchSettings(**space, **common, **small)
    genotype = search(settings, folder, accelerator="cpu", on_epoch=partial(show, "search", epochs))
    draw_cells(genotype).savefig(folder / "cells.png", dpi=110)
    larger = dict(epochs=retrain_epochs, batch_size=32, cells=6, channels=12, cutout=0, drop_path_rate=0.1)
    retrain_settings = RetrainSettings(genotype=json.loads(genotype.to_json()), **common, **larger)
    on_epoch = partial(show, "retrain", retrain_epochs)
    return retrain(retrain_settings, folder / "retrain", accelerator="cpu", on_epoch=on_epoch)


def main() -> None:
    """Search the spaces and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--algorithm", help="search this algorithm's space: a name (ogm), or module:attribute")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a search")
    parser.add_argument("--retrain-epochs", type=int, default=8, help="epochs of a retraining")
    parser.add_argument("--limit", type=int, help="number of images")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("nni", "pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lines, spaces = [], SPACES
    if args.algorithm is not None:
        name = args.algorithm.rpartition(":")[2]
        spaces = {name: dict(algorithm=args.algorithm, initialization="algorithm")}
        args.out.mkdir(parents=True, exist_ok=True)
        found = pattern(load_algorithm(args.algorithm, NETWORK_ALGORITHMS), nodes=4)
        draw_pattern(found, name).savefig(args.out / "pattern.png", dpi=110)
    for name, space in spaces.items():
        folder = args.out / name
        top1 = run(name, space, folder, args.epochs, args.retrain_epochs, args.limit)
        page = write_report(folder)
        lines.append(f"{name:<4} test accuracy {top1:.1f} %  cells {folder / 'cells.png'}  report {page}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
