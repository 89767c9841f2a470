"""Parameters and multiply-accumulates of Tables 4 and 5.

    python examples/reproduce/architecture_table.py                    # print the table
    python examples/reproduce/architecture_table.py --write docs/parameters.md  # replace it between the markers

The table has the paper's figures and the counts. Models are built on the meta device, so no memory is allocated and
nothing is computed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import timm

from optinspired_plugins.counting import count_network

BEGIN, END = "<!-- architecture table: begin -->", "<!-- architecture table: end -->"


class Row(NamedTuple):
    """A row of Table 4 (CIFAR, no ``macs``) or 5 (ImageNet), as printed."""

    paper_name: str
    model: str
    kwargs: dict[str, object]
    params: str
    macs: str | None = None


RESNET = {"beta2": 0.0, "post_act": True}
DENSENET = {"beta": 0.0, "learn_alpha": False}
ROWS = [
    Row("ResNet (n = 9)", "hbnet56_resnet", {}, "0.85M"),
    Row("HB-Net (n = 9)", "hbnet56", {}, "0.85M"),
    Row("ResNet (n = 18)", "hbnet110_resnet", {}, "1.7M"),
    Row("HB-Net (n = 18)", "hbnet110", {}, "1.7M"),
    Row("DenseNet (k = 12, L = 40)", "agdnet40_k12_densenet", {}, "1.0M"),
    Row("AGD-Net (k = 12, L = 40)", "agdnet40_k12", {}, "1.0M"),
    Row("DenseNet (k = 12, L = 52)", "agdnet52_k12_densenet", {}, "1.4M"),
    Row("AGD-Net (k = 12, L = 52)", "agdnet52_k12", {}, "1.4M"),
    Row("ResNet-34", "hbnet34", RESNET, "21.80M", "3.66G"),
    Row("HB-Net-34", "hbnet34", {}, "21.80M", "3.66G"),
    Row("ResNet-50", "hbnet50", RESNET, "25.56M", "3.86G"),
    Row("HB-Net-50", "hbnet50", {}, "25.56M", "3.87G"),
    Row("ResNet-101", "hbnet101", RESNET, "44.55M", "7.58G"),
    Row("HB-Net-101", "hbnet101", {}, "44.55M", "7.59G"),
    Row("DenseNet-121", "agdnet121", DENSENET, "7.98M", "2.88G"),
    Row("AGD-Net-121", "agdnet121", {}, "7.98M", "2.92G"),
]


def count(model_name: str, **kwargs: object) -> tuple[int, int]:
    """Count parameters, and multiply-accumulates of convolutions and classifier for one image."""
    model = timm.create_model(model_name, device="meta", **kwargs)
    return count_network(model, model.default_cfg["input_size"])


def table() -> str:
    """Return the table as Markdown."""
    lines = [
        "| the paper's model | here | parameters, paper | parameters, measured | FLOPs, paper | MACs, measured |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        params, macs = count(row.model, **row.kwargs)
        options = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.kwargs.items())
        here = f"`{row.model}`" + (f" with `{options}`" if options else "")
        lines.append(
            f"| {row.paper_name} | {here} | {row.params} | {params:,} | {row.macs or ''} | {macs / 1e9:.3f}G |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table or write it to a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="replace the table in this document")
    args = parser.parse_args()
    if args.write is None:
        print(table())
        return
    before, rest = args.write.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    args.write.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
