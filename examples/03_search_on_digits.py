"""Search and retrain cells of both spaces on digits.

    python examples/03_search_on_digits.py --out runs/search

Supernets of 4 cells and 4 channels are trained on 1,442 scanned digits. The networks of the resulting cells, with 6
cells and 12 channels, are trained from scratch and tested on the other 355 digits. A report is written about each
search. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

from nni_spaces.runs.retrain import retrain
from nni_spaces.runs.search import search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins.plotting.cells import draw_cells
from optinspired_plugins.report.page import write_report

SPACES = {"hb": "heavy-ball", "agd": "zero"}  # space -> initialisation of α


def run(space: str, folder: Path, epochs: int, retrain_epochs: int, limit: int | None = None) -> float:
    """Search, draw and retrain; return the test accuracy in percent."""

    def show(entry: dict[str, Any]) -> None:
        figures = (f"{name} {value:.2f}" for name, value in entry.items() if name.endswith(("loss", "top1")))
        print(f"{space:<4} epoch {entry['epoch'] + 1:>2}  {',  '.join(figures)}", flush=True)

    common = dict(data="digits", limit=limit, padding=1)
    small = dict(epochs=epochs, batch_size=32, channels=4, cells=4, alpha_lr=0.01)
    settings = SearchSettings(space=space, initialization=SPACES[space], **common, **small)
    genotype = search(settings, folder, accelerator="cpu", on_epoch=show)
    draw_cells(genotype).savefig(folder / "cells.png", dpi=110)
    larger = dict(epochs=retrain_epochs, batch_size=32, cells=6, channels=12, cutout=0, drop_path_rate=0.1)
    retrain_settings = RetrainSettings(genotype=json.loads(genotype.to_json()), **common, **larger)
    return retrain(retrain_settings, folder / "retrain", accelerator="cpu", on_epoch=show)


def main() -> None:
    """Search both spaces and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a search")
    parser.add_argument("--retrain-epochs", type=int, default=8, help="epochs of a retraining")
    parser.add_argument("--limit", type=int, help="number of images")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("nni", "pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lines = []
    for space in SPACES:
        folder = args.out / space
        top1 = run(space, folder, args.epochs, args.retrain_epochs, args.limit)
        page = write_report(folder)
        lines.append(f"{space:<4} test accuracy {top1:.1f} %  cells {folder / 'cells.png'}  report {page}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
