"""Tables of speed and memory for README.md and docs/speed.md.

python benchmarks/speed_table.py            # writes both, from the CSV files of speed_and_memory.py
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speed table: begin -->\n", "<!-- speed table: end -->\n"
# Network, form and peer as in the files -> label in README.md.
LINES = {
    ("hbnet50", "default", "resnet50"): "`hbnet50` / `resnet50`",
    ("hbnet50", "checkpointing", "resnet50"): "`hbnet50`, checkpointing / `resnet50`",
    ("resnet50", "checkpointing", "resnet50"): "`resnet50`, timm's checkpointing / `resnet50`",
    ("hbnet152", "reversible", "resnet152"): "`hbnet152`, reversible / `resnet152`",
    ("agdnet121", "default", "densenet121"): "`agdnet121` / `densenet121`",
    ("densenet121", "memory_efficient", "densenet121"): "`densenet121`, `memory_efficient` / `densenet121`",
}
FILES = ("training", "inference", "search", "deep", "channels_last", "compiled", "reversible", "growth")
TITLES = {
    "training": "Training step",
    "inference": "Inference, normalisations folded in both networks",
    "search": "Search step: one step of the weights, one step of α",
    "deep": "Training step, other depths",
    "channels_last": "Training step, both networks in channels last",
    "compiled": "Training step under torch.compile",
    "reversible": "Reversible stage and momentumnet, on the same modules",
    "growth": "Memory by depth, resolution and batch",
}
NOTE = """\
Time: median and quartiles of the ratios over rounds in which both networks alternate in one process. Memory: peak of
the tensors of a step, without parameters and their gradients."""
INTRODUCTION = f"""\
Every measured row, from the CSV files in [`benchmarks/results`](../benchmarks/results). A label A / B means network A
relative to network B: values below 1 mean that A is faster or takes less memory.

{NOTE}
"""


PREDICTION = """\
`benchmarks/roofline.py` runs a step on fake CUDA tensors, logs every kernel with its bytes and FLOPs, and predicts the
time on the device alone, as in a CUDA graph; launches, bytes and the peak of memory are counted. For timm's networks on
an RTX 3090, predicted times are 0.84 to 1.20 of the published ones (`python benchmarks/roofline.py --calibrate`), so
read ratios within a family.
"""
SEARCH_PREDICTION = """\
Kernels of a search are small, and a step takes about 4 µs per launch. Operations of one kind that read the same state
run as one (`nni_spaces/spaces/grouped.py`); one by one, the HB step would need about 22,500 launches and the AGD step
28,100. NNI's DARTS needs 19,581. How fast cuDNN's grouped convolutions are was not measured.
"""
MEASUREMENT = """\
In a CUDA graph a step takes the time of its kernels. An eager step takes the host's time if the host is slower. This
host needed 30 to 36 µs per kernel of timm's networks, so the eager column is about the host: a larger batch or a faster
host moves it towards the column of the graph. Each row ran at the commit in its last column. `hbnet50` and its
`learn_beta` ran with fused kernels in all stages; since then, stages with fewer than 2²⁵ elements per iterate run as
modules unless they save memory, here the last two.
"""
# Forms of this package that ran before their kernels were fused.
EARLY = "2ad272b"


def read_rows(folder: Path, names: tuple[str, ...] = ("training",)) -> list[dict[str, str]]:
    """Return the rows of the files with these names."""
    rows = []
    for name in names:
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def table(rows: list[dict[str, str]], lines: dict[tuple[str, ...], str] | None = None) -> str:
    """Return a Markdown table of the rows with a label, by default README.md's."""
    pairs: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        pairs.setdefault((row["model"], row["form"], row["peer"]), {})[row["quantity"]] = row
    first = rows[0]
    table_lines = [
        f"| measured: {first['device']}, {first['threads']} threads, torch {first['torch']}, timm {first['timm']} | "
        "time | quartiles | peak memory | batch, pixels |",
        "|---|---:|---:|---:|---:|",
    ]
    for key, label in (LINES if lines is None else lines).items():
        if key in pairs:
            time, memory = pairs[key]["time"], pairs[key].get("memory")
            share = f"{float(memory['ratio']):.2f}" if memory else ""
            spread = f"{float(time['low']):.2f} … {float(time['high']):.2f}"
            where = f"{time['batch']}, {time['size']}²"
            table_lines.append(f"| {label} | {float(time['ratio']):.2f} | {spread} | {share} | {where} |")
    commands = ",\n".join(dict.fromkeys(f"`{row['command']}`" for row in rows))
    note = f"{NOTE}\n\n" if lines is None else ""
    return "\n".join(table_lines) + f"\n\n{note}{commands}\n"


def _name(model: str, form: str) -> str:
    name = f"`{model}`" if " " not in model and model != "momentumnet" else model
    return name if form == "default" else f"{name}, {form}"


def growth_table(rows: list[dict[str, str]]) -> str:
    """Return the table of memory in Markdown."""
    lines = ["| | batch, pixels | peak, MiB | timm's, MiB | ratio |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        label = f"{_name(row['model'], row['form'])} / {_name(row['peer'], row['peer_form'])}"
        where, ours, peers = f"{row['batch']}, {row['size']}²", float(row["ours"]), float(row["peers"])
        lines.append(f"| {label} | {where} | {ours:,.0f} | {peers:,.0f} | {float(row['ratio']):.2f} |")
    return "\n".join(lines) + f"\n\n`{rows[0]['command']}`;\nfigure: `python benchmarks/growth_figure.py`\n"


def predicted_table(rows: list[dict[str, str]], arguments: str) -> str:
    """Return a table of predicted steps in Markdown."""
    first = rows[0]
    kind = first["dtype"] if first["dtype"] == "float32" else f"{first['dtype']} autocast"
    card = f"{first['gpu']}, batch {first['batch']}, {kind}, {first['layout'].replace('_', ' ')}"
    lines = [
        f"| predicted, not measured: {card} | launches | GB moved | ms | time | peak memory |",
        "|---|" + "---:|" * 5,
    ]
    for row in rows:
        label = f"{_name(row['model'], row['form'])} / {_name(row['peer'], 'default')}"
        numbers = (row[name] for name in ("launches", "gigabytes", "milliseconds", "time_ratio", "peak_ratio"))
        lines.append(f"| {label} | {' | '.join(numbers)} |")
    return "\n".join(lines) + f"\n\n`python benchmarks/roofline.py {arguments}`\n"


def measured_table(rows: list[dict[str, str]]) -> str:
    """Return the table of training steps that were measured on a GPU, in Markdown."""
    steps: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["commit"] != EARLY or row["model"].startswith(("resnet", "densenet")):
            steps.setdefault((row["model"], row["form"], row["peer"]), {})[row["quantity"]] = row
    first = rows[0]
    lines = [
        f"| measured: {first['device']}, torch {first['torch']}, batch 128, bfloat16, channels last "
        "| ms in a graph | time in a graph | ms eager | time eager | peak memory | commit |",
        "|---|" + "---:|" * 6,
    ]
    for (model, form, peer), found in steps.items():
        label = f"{_name(model, form)} / {_name(*peer.split(maxsplit=1))}"
        cells = []
        for quantity in ("time in a CUDA graph", "time"):
            row = found.get(quantity)
            cells += [f"{float(row['value']):.1f}", f"{float(row['ratio']):.2f}"] if row else ["", ""]
        peak = f"{float(found['peak memory']['ratio']):.2f}"
        lines.append(f"| {label} | {' | '.join(cells)} | {peak} | `{found['time']['commit']}` |")
    return "\n".join(lines) + "\n\n`benchmarks/gpu.sh --blocks training`\n"


def document(folder: Path) -> str:
    """Return docs/speed.md: the rows of all files in the folder."""
    parts = ["# Speed and memory\n", INTRODUCTION]
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
    if (folder / "gpu" / "training.csv").exists():
        parts += ["## Training step on a GPU\n", MEASUREMENT, measured_table(read_rows(folder / "gpu", ("training",)))]
    if (folder / "roofline.csv").exists():
        parts += [
            "## Predicted training step on a GPU\n",
            PREDICTION,
            predicted_table(read_rows(folder, ("roofline",)), "--out benchmarks/results/roofline.csv"),
        ]
    if (folder / "roofline_search.csv").exists():
        arguments = "--search --out benchmarks/results/roofline_search.csv"
        parts += [
            "## Predicted search step on a GPU\n",
            SEARCH_PREDICTION,
            predicted_table(read_rows(folder, ("roofline_search",)), arguments),
        ]
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
