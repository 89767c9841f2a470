"""Folders of searches that never ran, with the files that a search writes, and as many epochs as a test wants."""

import json
import math
import random

from optinspired_plugins.cells.genotype import CHOICES, GENOTYPES, Genotype, heavy_ball_sources

OPERATIONS = [*CHOICES, "none"]


def softmax(logits):
    exps = [math.exp(value) for value in logits]
    return [value / sum(exps) for value in exps]


def labels(rule, nodes):
    """Yield (label, cell, node, slot or source) as NNI's strategies name edges."""
    for cell in ("normal", "reduce"):
        for t in range(2, 2 + nodes):
            for i in range(3 if rule == "hb" else t):
                yield (f"{cell}/op_{t}_{i}" if rule == "hb" else f"{cell}/{t}_{i}"), cell, t, i


def derive(rule, nodes, probabilities):
    """The strongest operation of every edge (hb), or of the two strongest edges of a node (agd)."""
    cells = {"normal": [[] for _ in range(nodes)], "reduce": [[] for _ in range(nodes)]}
    for label, cell, t, i in labels(rule, nodes):
        p, name = max((p, name) for name, p in probabilities[label].items() if name != "none")
        cells[cell][t - 2].append((p, name, heavy_ball_sources(t)[i] if rule == "hb" else i))
    pick = (lambda node: node) if rule == "hb" else (lambda node: sorted(node, reverse=True)[:2])
    both = [tuple(tuple((n, s) for _, n, s in pick(node)) for node in cells[cell]) for cell in ("normal", "reduce")]
    return Genotype(rule, *both)


def heavy_ball_start(label, logit):
    """α of an edge that starts at the heavy ball (26)."""
    favoured = {"1": "skip_connect", "2": "neg_skip_connect"}.get(label[-1])
    return [logit * (name == favoured) for name in OPERATIONS]


def as_rows(alpha):
    return {label: dict(zip(OPERATIONS, logits)) for label, logits in alpha.items()}


def make_history(rule="hb", epochs=6, nodes=4, seed=0, beta=None, resumed=(), logit=None, step=0.4):
    """A random walk of α, and of β where a space has it; with ``logit`` α is recorded and starts at the heavy ball."""
    draw = random.Random(seed)
    alpha = {label: heavy_ball_start(label, logit or 0.0) for label, *_ in labels(rule, nodes)}
    start, history = as_rows(alpha), []
    for epoch in range(epochs):
        alpha = {label: [a + draw.gauss(0, step) for a in logits] for label, logits in alpha.items()}
        rows = {label: dict(zip(OPERATIONS, softmax(logits))) for label, logits in alpha.items()}
        genotype = derive(rule, nodes, rows)
        if beta if beta is not None else rule == "agd":
            for cell in ("normal", "reduce"):
                for t in range(2, 2 + nodes):
                    p = softmax([draw.gauss(0, 1) for _ in range(t)])
                    rows[f"{cell}/beta_{t}"] = {str(i): value for i, value in enumerate(p)}
        entry = {"epoch": epoch, "genotype": json.loads(genotype.to_json()), "probabilities": rows}
        if logit is not None:
            entry |= {"logits": as_rows(alpha)} | ({"start_logits": start} if epoch == 0 else {})
        for k, part in enumerate(("train", "alpha")):
            entry[f"{part}_loss"] = round(2.3 / (1 + 0.1 * epoch) + 0.1 * k, 6)
            entry[f"{part}_top1"] = round(90 - 80 / (1 + 0.2 * epoch) - k, 6)
        history.append({**entry, "seconds": 10.5, "resumed": epoch in resumed})
    return history


def write_run(folder, history, finished=True, settings=None, about=None, retrain=None):
    """Write settings.json, history.json and what else is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"space": "hb", "data": "digits", "epochs": len(history), "seed": 7, **(settings or {})}
    files = {"settings.json": settings, "history.json": history}
    if about is not None:
        files["run.json"] = about
    if retrain is not None:
        (folder / "retrain").mkdir(exist_ok=True)
        files.update({f"retrain/{name}.json": content for name, content in retrain.items()})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    if finished:
        Genotype.from_json(json.dumps(history[-1]["genotype"])).save(folder / "genotype.json")
    return folder


def make_retrain(tests=(50.0, 97.5, 96.25), resumed=(), epochs=3, **about):
    """The files of a retraining with these test accuracies."""
    history = [
        {
            "epoch": epoch,
            "lr": 0.025,
            "drop_path_rate": 0.2,
            "train_loss": 1.0 / (1 + epoch),
            "train_top1": 90.0,
            "test_loss": 1.2 / (1 + epoch),
            "test_top1": top1,
            "seconds": 3.5,
            "resumed": epoch in resumed,
        }
        for epoch, top1 in enumerate(tests)
    ]
    genotype = json.loads(GENOTYPES["darts_v2"].to_json())
    settings = {
        "genotype": genotype,
        "model": "cellnet_cifar",
        "cells": 20,
        "channels": 36,
        "epochs": epochs,
        "seed": 3,
    }
    return {"settings": settings, "run": {"parameters": 3349342, "macs": 528000000, **about}, "history": history}
