"""Search a cell in both spaces of section 9 on real digits, retrain it, and write a report about each search.

    python examples/03_search_on_digits.py --out runs/search

Supernets of 4 cells and 4 channels learn on 1,442 scanned digits; the networks of what they find, of 6 cells and 12
channels, are trained from scratch and tested on the other 355. All of it resumes where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nni_spaces.runs.retrain import RetrainSettings, retrain
from nni_spaces.runs.search import SearchSettings, search
from optinspired_plugins.cli import quiet_hosts
from optinspired_plugins.plotting.cells import draw_cells
from optinspired_plugins.report.page import write_report

SPACES = {"hb": "heavy-ball", "agd": "zero"}  # space -> initialisation of α


def run(space: str, folder: Path, epochs: int, retrain_epochs: int, limit: int | None = None) -> float:
    """Search, draw, retrain and report; return the test accuracy in percent."""

    def show(entry: dict[str, Any]) -> None:
        figures = (f"{name} {value:.2f}" for name, value in entry.items() if name.endswith(("loss", "top1")))
        print(f"{space:<4} epoch {entry['epoch'] + 1:>2}  {',  '.join(figures)}", flush=True)

    common = dict(data="digits", limit=limit, padding=1)
    small = dict(epochs=epochs, batch_size=32, channels=4, cells=4, alpha_lr=0.01)
    settings = SearchSettings(space=space, init=SPACES[space], **common, **small)
    genotype = search(settings, folder, accelerator="cpu", on_epoch=show)
    draw_cells(genotype).savefig(folder / "cells.png", dpi=110)
    larger = dict(epochs=retrain_epochs, batch_size=32, cells=6, width=12, cutout=0, drop_path=0.1)
    settings_again = RetrainSettings(genotype=json.loads(genotype.to_json()), **common, **larger)
    return retrain(settings_again, folder / "retrain", accelerator="cpu", on_epoch=show)


def main() -> None:
    """Search both spaces and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a search")
    parser.add_argument("--retrain-epochs", type=int, default=8, help="epochs of a retraining")
    parser.add_argument("--limit", type=int, help="use the first so many images")
    args = parser.parse_args()
    lines = []
    for space in SPACES:
        folder = args.out / space
        with quiet_hosts():
            top1 = run(space, folder, args.epochs, args.retrain_epochs, args.limit)
        page = write_report(folder)
        lines.append(f"{space:<4} test accuracy {top1:.1f} %  cells {folder / 'cells.png'}  report {page}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
