"""The README's table of speed and memory, from the CSV files that speed_and_memory.py wrote.

python benchmarks/speed_table.py            # writes it between the marks in README.md
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speed table: begin -->\n", "<!-- speed table: end -->\n"
# Ours, form, peer as in the files -> what the table says.
LINES = {
    ("hbnet50", "default", "resnet50"): "`hbnet50` / `resnet50`",
    ("hbnet50", "semi", "resnet50"): "`hbnet50`, checkpointing / `resnet50`",
    ("hbnet50", "reversible", "resnet50"): "`hbnet50`, reversible / `resnet50`",
    ("resnet50", "checkpointed", "resnet50"): "`resnet50`, timm's checkpointing / `resnet50`",
    ("hbnet152", "reversible", "resnet152"): "`hbnet152`, reversible / `resnet152`",
    ("agdnet121", "default", "densenet121"): "`agdnet121` / `densenet121`",
    ("agdnet121", "lean", "densenet121"): "`agdnet121`, checkpointing / `densenet121`",
    ("densenet121", "memory_efficient", "densenet121"): "`densenet121`, `memory_efficient` / `densenet121`",
    ("hbnet50", "fused", "resnet50"): "`hbnet50`, fused / `resnet50`, folded: inference",
    ("agdnet121", "fused", "densenet121"): "`agdnet121`, fused / `densenet121`, folded: inference",
    ("hb space", "default", "NNI's DARTS"): "HB search step / NNI's DARTS",
    ("hb space", "checkpointed", "NNI's DARTS"): "HB search step, checkpointing / NNI's DARTS",
    ("agd space", "default", "NNI's DARTS"): "AGD search step / NNI's DARTS",
    ("agd space", "checkpointed", "NNI's DARTS"): "AGD search step, checkpointing / NNI's DARTS",
}


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the files that the table is made of."""
    rows = []
    for name in ("training", "inference", "search"):
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Return the table in Markdown; a network that was not measured has no line."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["form"], row["peer"]), {})[row["quantity"]] = row
    first = rows[0]
    lines = [
        f"| measured: {first['device']}, {first['threads']} threads, torch {first['torch']}, timm {first['timm']} | "
        "time | quartiles | peak memory | batch, pixels |",
        "|---|---:|---:|---:|---:|",
    ]
    for key, label in LINES.items():
        if key in found:
            time, memory = found[key]["time"], found[key].get("memory")
            share = f"{float(memory['ratio']):.2f}" if memory and "inference" not in label else ""
            spread = f"{float(time['low']):.2f} … {float(time['high']):.2f}"
            where = f"{time['batch']}, {time['size']}²"
            lines.append(f"| {label} | {float(time['ratio']):.2f} | {spread} | {share} | {where} |")
    commands = dict.fromkeys(f"`{row['command']}`" for row in rows)
    note = "Ratios in one run, medians over rounds in turns; memory is the peak of a step's tensors beside parameters"
    return "\n".join(lines) + f"\n\n{note}\nand their gradients. {', '.join(commands)}.\n"


def main() -> None:
    """Write the table into the README."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = table(read_rows(ROOT / "benchmarks" / "results"))
    readme.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
