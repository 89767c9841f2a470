"""The tables of speed and memory, from the CSV files that speed_and_memory.py wrote.

python benchmarks/speed_table.py            # between the marks in README.md, and all of it in docs/speed.md
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


FILES = ("training", "inference", "search", "deep", "channels_last", "compiled", "reversible", "growth")
TITLES = {
    "training": "Steps of training",
    "inference": "Inference, normalisations folded on both sides",
    "search": "Steps of a search: one of the weights, one of α",
    "deep": "Steps of training, other depths",
    "channels_last": "Steps of training in channels last, both sides",
    "compiled": "Steps of training under torch.compile",
    "reversible": "A reversible stage and momentumnet, on the same modules",
    "growth": "Memory against depth, resolution and batch",
}
# What the files call a form -> what a document does.
FORMS = {"default": "", "semi": "checkpointing", "lean": "checkpointing", "checkpointed": "checkpointing"}


def read_rows(folder: Path, names: tuple[str, ...] = FILES[:3]) -> list[dict[str, str]]:
    """Return the rows of files of the folder."""
    rows = []
    for name in names:
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def table(rows: list[dict[str, str]], lines: dict[tuple[str, ...], str] | None = None) -> str:
    """Return a table in Markdown: of the README's lines that were measured, or of others."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["form"], row["peer"]), {})[row["quantity"]] = row
    first = rows[0]
    made = [
        f"| measured: {first['device']}, {first['threads']} threads, torch {first['torch']}, timm {first['timm']} | "
        "time | quartiles | peak memory | batch, pixels |",
        "|---|---:|---:|---:|---:|",
    ]
    for key, label in (LINES if lines is None else lines).items():
        if key in found:
            time, memory = found[key]["time"], found[key].get("memory")
            share = f"{float(memory['ratio']):.2f}" if memory and "inference" not in label else ""
            spread = f"{float(time['low']):.2f} … {float(time['high']):.2f}"
            where = f"{time['batch']}, {time['size']}²"
            made.append(f"| {label} | {float(time['ratio']):.2f} | {spread} | {share} | {where} |")
    commands = dict.fromkeys(f"`{row['command']}`" for row in rows)
    note = "Ratios in one run, medians over rounds in turns; memory is the peak of a step's tensors beside parameters"
    return "\n".join(made) + f"\n\n{note}\nand their gradients. {', '.join(commands)}.\n"


def _name(model: str, form: str) -> str:
    named = f"`{model}`" if " " not in model and model != "momentumnet" else model
    form = FORMS.get(form, form)
    return f"{named}, {form}" if form else named


def growth_table(rows: list[dict[str, str]]) -> str:
    """Return the table of memory in Markdown."""
    made = ["| | batch, pixels | peak, MiB | timm's, MiB | ratio |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        label = f"{_name(row['model'], row['form'])} / {_name(row['peer'], row['peer_form'])}"
        where, ours, peers = f"{row['batch']}, {row['size']}²", float(row["ours"]), float(row["peers"])
        made.append(f"| {label} | {where} | {ours:,.0f} | {peers:,.0f} | {float(row['ratio']):.2f} |")
    return "\n".join(made) + f"\n\n`{rows[0]['command']}`; `python benchmarks/growth_figure.py` draws it.\n"


def document(folder: Path) -> str:
    """Return docs/speed.md: every row of every file that is there."""
    parts = ["# Speed and memory\n", __doc__.splitlines()[0].replace("The tables", "Every row") + "\n"]
    for name in FILES:
        if not (folder / f"{name}.csv").exists():
            continue
        rows = read_rows(folder, (name,))
        parts.append(f"## {TITLES[name]}\n")
        if name == "growth":
            parts += ["![Memory of a training step by depth and resolution](figures/memory.png)\n", growth_table(rows)]
            continue
        keys = dict.fromkeys((row["model"], row["form"], row["peer"], row["peer_form"]) for row in rows)
        parts.append(table(rows, {key[:3]: f"{_name(*key[:2])} / {_name(*key[2:])}" for key in keys}))
    return "\n".join(parts)


def main() -> None:
    """Write both documents."""
    readme, results = ROOT / "README.md", ROOT / "benchmarks" / "results"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + table(read_rows(results)) + END + after, encoding="utf-8")
    (ROOT / "docs" / "speed.md").write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
