"""A folder of every kind of run, what reads each without training, and ways to damage their files."""

import io
import json
import os
import shutil
from dataclasses import asdict
from functools import cache

import rows
import torch
from nni.nas.strategy import Random
from report_runs import make_history, make_retrain, write_run
from trial_runs import TINY as SPACE
from trial_runs import sized

from nni_spaces import HBSpace, read_trials, run_trials
from nni_spaces.runs.callback import RunCallback
from nni_spaces.runs.checkpoints import seal
from nni_spaces.runs.data import read_images
from nni_spaces.runs.retrain import _write_weights, retrain
from nni_spaces.runs.search import search
from nni_spaces.runs.settings import RetrainSettings, SearchSettings
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.report.page import write_report
from optinspired_plugins.run_folder import last_entry
from optinspired_plugins.simulation import Recipe, read_runs, simulate

SEARCH = SearchSettings(data="digits", limit=64, epochs=2, channels=2, cells=3, nodes=1, batch_size=16, padding=0)
NODES = [[["sep_conv_3x3", 1], ["max_pool_3x3", 1], ["neg_skip_connect", 0]]]
RETRAIN = RetrainSettings(
    genotype={"version": 1, "rule": "hb", "normal": NODES, "reduction": NODES},
    data="digits", limit=64, epochs=2, cells=3, channels=2, batch_size=16, aux_weight=0, cutout=0, padding=0,
)  # fmt: skip
RECIPE = Recipe(pairs=40, dimension=3, batch_size=10, steps=2)
ROW = dict(network="hbnet20", seed=0, test_error="8.5", command="python table4.py")


def make_folders(root):
    """Run each kind once."""
    search(SEARCH, root / "search", accelerator="cpu")
    retrain(RETRAIN, root / "retraining", accelerator="cpu")
    run_trials(HBSpace(**SPACE), Random(seed=0), sized(), root / "trials", 2)
    simulate(root / "simulation" / "table2.csv", ("gd",), (1,), (0, 1), RECIPE)
    rows.add_rows(root / "tables" / "table4.csv", [ROW, {**ROW, "seed": 1}], ["network", "seed"])
    about = {"versions": {"nni": "3.0"}, "data": {"sha256": "ab" * 32}, "parameters": 5}
    write_run(root / "report", make_history("agd", 2, nodes=2, logit=0.0), about=about, retrain=make_retrain())


@cache
def images():
    """What both runs train on."""
    return read_images("digits", 64)


def open_run(folder, settings, **options):
    """Read and check a run as one that goes on does, up to where it would train."""
    run = RunCallback(folder, settings, images(), lambda module: {}, None, None, None, **options)
    run.resume()
    return run


def read_retraining(folder):
    """Read a retraining that has finished."""
    _write_weights(open_run(folder, RETRAIN), is_new=False)
    last_entry(folder, "test_top1")


def read_tables(folder):
    """Read a table as the commands do that add to it."""
    path = folder / "table4.csv"
    rows.find(path, dict(network="hbnet20", seed=0))
    rows.require(path, dict(network="hbnet20"))


def read_all_trials(folder):
    """Read trials as a run that goes on does, and write their page."""
    read_trials(folder)
    write_report(folder, folder.parent / "page.html")
    Genotype.load(folder / "genotype.json")


READERS = {
    "search": lambda folder: open_run(folder, SEARCH),
    "retraining": read_retraining,
    "trials": read_all_trials,
    "simulation": lambda folder: read_runs(folder / "table2.csv", RECIPE),
    "tables": read_tables,
    "report": lambda folder: write_report(folder, folder.parent / "page.html"),
}
FILES = [
    *[(kind, name) for kind in ("search", "retraining") for name in ("settings.json", "run.json", "history.json")],
    ("search", "checkpoint.pt"), ("retraining", "checkpoint.pt"), ("retraining", "model.safetensors"),
    ("trials", "trials.json"), ("trials", "genotype.json"), ("simulation", "table2.csv"), ("tables", "table4.csv"),
    *[("report", name) for name in ("settings.json", "run.json", "history.json", "genotype.json")],
    *[("report", f"retrain/{name}.json") for name in ("settings", "run", "history")],
]  # fmt: skip


# --- damage -----------------------------------------------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07\n\u202e"
DEEP, HUGE = "@deep@", "@huge@"
VALUES = [
    None, True, -1, 0, 3, 1.5, 10**400, float("inf"), float("nan"), "", "many", ESCAPE, "\ud800", "x" * 100_000, [], {},
    [1, "a"], {"a": 1}, [[0]], {ESCAPE: ESCAPE}, DEEP, HUGE,
]  # fmt: skip


def to_json(value):
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * 5_000 + "]" * 5_000).replace(f'"{HUGE}"', "9" * 5_000)
    return text.encode()


def damage_bytes(content, draw):
    """Flip a bit, cut, drop, repeat, insert or zero a part."""
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice((1, 4, 64, 4096)))
    part, noise = content[start:end], draw.randbytes(end - start)
    flipped = bytes([part[0] ^ (1 << draw.randrange(8))]) + part[1:]
    new = draw.choice((flipped, flipped, b"", part * 2, noise, noise + part, bytes(len(part)), part + ESCAPE.encode()))
    return draw.choice((content[:start] + new + content[end:],) * 8 + (content[:start], b"", bytes(len(content))))


def places(value, found):
    """Every container in a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def damage_json(content, draw):
    """Replace, remove, rename or add one value."""
    whole = [json.loads(content)]
    # Values near the root as often as the many deep in a history.
    deep, shallow = places(whole, []), [*places(whole, [])[:1], *((whole[0], key) for key in _keys(whole[0]))]
    container, key = draw.choice(draw.choice((deep, shallow)))
    kind = draw.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    if kind == "remove" and container is not whole:
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[draw.choice((ESCAPE, "colour", "\ud800"))] = container.pop(key)
    elif kind == "add" and isinstance(container, dict):
        container[draw.choice((ESCAPE, "colour"))] = draw.choice(VALUES)
    else:
        container[key] = draw.choice(VALUES)
    return to_json(whole[0])


def _keys(value):
    return list(value) if isinstance(value, dict) else range(len(value))


def damage_table(content, draw):
    """Replace, add or remove a cell."""
    lines = [line.split(",") for line in content.decode().splitlines()]
    line = draw.choice(lines)
    cell = draw.randrange(len(line))
    new = draw.choice(("", "-1", "many", "nan", "inf", "9" * 5_000, "9" * 200_000, "\0" * 9, "\x1b[31m", '"', "\udcff"))
    line[cell : cell + 1] = draw.choice(([new], [new], [new, new], []))
    return "\n".join(map(",".join, lines)).encode("utf-8", "surrogateescape")


def damage_checkpoint(content, draw):
    """Remove or replace one value of a checkpoint, and give it a digest as if it were right."""
    found = torch.load(io.BytesIO(content), weights_only=True)
    (record,) = found["callbacks"].values()
    container = draw.choice((found, found, found["state_dict"], found["callbacks"], record))
    key = draw.choice(list(container))
    container[key] = draw.choice((None, True, -1, 10**30, "many", ESCAPE, [], {}, torch.tensor([float("nan")])))
    if draw.random() < 0.3:
        del container[key]
    return reseal(found)


def reseal(found):
    archive = io.BytesIO()
    torch.save(found, archive)
    return seal(archive.getvalue())


def damage(name, content, draw):
    """Damage a file as bytes, or as what it holds."""
    inside = {".json": damage_json, ".csv": damage_table, ".pt": damage_checkpoint}.get(os.path.splitext(name)[1])
    return damage_bytes(content, draw) if inside is None or draw.random() < 0.4 else inside(content, draw)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(folders, kind, to):
    """A copy of a folder that a test may damage."""
    return shutil.copytree(folders / kind, to / kind)


def rewrite(path, **changes):
    """Change or, where the value is ``...``, remove fields of a JSON object."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


def settings_of(kind):
    return {"search": SEARCH, "retraining": RETRAIN}[kind]


def written_settings(kind):
    return {**asdict(settings_of(kind)), "devices": 1, "precision": "32-true"}
