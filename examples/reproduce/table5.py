"""Table 5: parameters and multiply-accumulates of every row.

    python examples/reproduce/table5.py

The rows go to ``table5.csv``. ImageNet is not run; the README of this folder has the commands that would measure the
errors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from architecture_table import ROWS, count
from paper_figures import TABLE5
from rows import RESULTS, add_rows, provenance


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    rows = []
    for row in (row for row in ROWS if row.paper_name in TABLE5):
        parameters, macs = count(row.model, **row.kwargs)
        shape = dict(name=row.paper_name, model=row.model, options=json.dumps(row.kwargs))
        command = "python examples/reproduce/table5.py"
        rows.append({**shape, "parameters": parameters, "macs": macs, **provenance(command, torch.device("cpu"))})
        print(f"{row.paper_name}: {parameters:,} parameters, {macs:,} multiply-accumulates", flush=True)
    add_rows(args.results / "table5.csv", rows, ["name"])


if __name__ == "__main__":
    main()
