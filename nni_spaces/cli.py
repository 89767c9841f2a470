"""The commands ``optinspired search`` and ``optinspired retrain``; ``optinspired_plugins.cli`` adds them.

Their options are generated from the fields of the settings (:mod:`nni_spaces.runs.settings`). NNI is loaded when a
command runs, so that ``--help`` is quick and needs no extra.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, fields
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_type_hints

import typer

from optinspired_plugins.cells.genotype import Genotype, genotype_names, load_genotype
from optinspired_plugins.cells.operations import import_modules
from optinspired_plugins.next_steps import absolute_source, retrain_command, timm_call
from optinspired_plugins.report import texts
from optinspired_plugins.report.files import is_retraining, read_about, read_epochs, read_retraining
from optinspired_plugins.report.findings import findings
from optinspired_plugins.run_folder import GENOTYPE, WEIGHTS, read_history, resolve_devices
from optinspired_plugins.terminal import epoch_progress, errors_as_messages, show

from .runs.settings import NAMES, RetrainSettings, SearchSettings

__all__ = ["retrain", "search"]

# Lightning's names; a test compares them with Lightning's tables, which take seconds to load.
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"]
SearchPrecision = Literal["32-true", "bf16-mixed", "16-true", "bf16-true", "64-true"]

Logger = Literal["csv", "tensorboard", "wandb"]

Loggers = Annotated[Logger | None, typer.Option(help="Lightning's logger, to logs/ in the folder of the run.")]
OnDisk = Annotated[
    bool, typer.Option(help="Keep the images of a folder in a file in the folder of the run, instead of in memory.")
]
Workers = Annotated[int, typer.Option(help="Processes that load images.")]
Devices = Annotated[
    int | None, typer.Option(help="Processes that share the work; torchrun's by default, and otherwise 1.")
]


def names_of(text: str) -> list[str]:
    """Parse ``a,b``."""
    return text.split(",")


def imported(options: dict[str, Any]) -> dict[str, Any]:
    """Import the modules that the options name, also from the current folder, and return options with full paths."""
    if options["imports"] is not None:
        sys.path.insert(0, "")
        options = {**options, "imports": import_modules(options["imports"])}
    if options["start_from"] is not None:
        options = {**options, "start_from": os.path.abspath(options["start_from"])}
    return {**options, "data": absolute_source(options["data"])}


def option_of(setting: Field, hint: Any) -> Parameter:
    """Return the command's option for a field of a settings dataclass."""
    about = setting.metadata
    kind: Any = Literal[about["choices"]] if "choices" in about else hint
    names = [about["option"]] if "option" in about else []
    parser = names_of if setting.type == NAMES else None
    if parser:
        kind = Optional[str]  # as it is typed: typer shows the type, and on Python 3.10 a generic one is an error
    annotation: Any = Annotated[kind, typer.Option(*names, help=about["help"], parser=parser)]
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=setting.default, annotation=annotation)


def with_options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter ``options`` by an option for each field of ``settings`` that has a help text.

    The command receives their values as a dictionary.
    """
    hints = get_type_hints(settings)
    options = [option_of(each, hints[each.name]) for each in fields(settings) if "help" in each.metadata]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[Parameter] = []
        for each in signature(command, eval_str=True).parameters.values():
            parameters += options if each.name == "options" else [each]

        @wraps(command)
        def run(**arguments: Any) -> None:
            command(options={each.name: arguments.pop(each.name) for each in options}, **arguments)

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


@contextmanager
def hosts() -> Iterator[None]:
    """Load NNI, and keep errors to a line and the hosts quiet."""
    with errors_as_messages():
        from ._nni import quiet_hosts

        with quiet_hosts():
            yield


def search_line(out: Path, entry: dict[str, Any]) -> str:
    """Describe an epoch of a search.

    It has losses of weights and α, how far α has moved and could have, the number of edges that α has decided, and of
    skip connections among the edges that the start has not decided, which shows a collapse.
    """
    weights = f"weights {measured(entry, 'train', 5.1)}"
    if entry["alpha_loss"] is None:
        return f"{weights}  α stands still"
    alpha = f"α {measured(entry, 'alpha', 5.1)}"
    found = findings(read_epochs(out))[-1]
    if found is None:  # the search began with a version that did not record α
        return f"{weights}  {alpha}"
    reach = "" if found.reach is None else f" of {found.reach:.2g}"
    (skips, edges), counts = found.skips(), found.counts()
    way = f"moved {found.farthest:.2g}{reach}"
    return f"{weights}  {alpha}  {way}  found {counts['found']}/{counts.total()}  skips {skips}/{edges}"


def measured(entry: dict[str, Any], part: str, width: float) -> str:
    """Describe loss and accuracy of a part of the images; regression has no accuracy."""
    top1 = entry[f"{part}_top1"]
    return f"{entry[f'{part}_loss']:.3f}" + ("" if top1 is None else f" {top1:{width}f} %")


def retrain_line(entry: dict[str, Any]) -> str:
    """Describe an epoch of a retraining."""
    return f"train {measured(entry, 'train', 6.2)}  test {measured(entry, 'test', 6.2)}"


@with_options_of(SearchSettings)
def search(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted search there goes on.")],
    options: dict[str, Any],
    workers: Workers = 0,
    accelerator: Annotated[Accelerator, typer.Option(help="Lightning's.")] = "auto",
    devices: Devices = None,
    logger: Loggers = None,
    on_disk: OnDisk = False,
    precision: Annotated[SearchPrecision, typer.Option(help="Lightning's.")] = "32-true",
) -> None:
    """Search a cell with NNI's DARTS in a space of section 9 or of any algorithm; writes genotype.json.

    The module of an algorithm or an initialisation may be in the current folder.
    """
    if options["algorithm"] is not None or ":" in options["initialization"]:
        sys.path.insert(0, "")
    with hosts():
        from .runs.progressive import search_progressively
        from .runs.search import search as search_once

        settings = SearchSettings(**imported(options))
        run: Callable[..., Genotype] = search_progressively if settings.strategy == "p-darts" else search_once
        machine: dict[str, Any] = dict(workers=workers, accelerator=accelerator, on_disk=on_disk, precision=precision)
        name = f"{settings.algorithm or settings.space} search"
        with epoch_progress(name, settings.epochs, out, partial(search_line, out)) as progress:
            machine["devices"] = resolve_devices(devices)
            genotype = run(settings, out, **machine, **progress, trainer=_trainer(logger, out))
        step = _training_step(out, settings, {**machine, "logger": logger})
    for name, cell in (("normal", genotype.normal), ("reduction", genotype.reduction)):
        for t, node in enumerate(cell, start=2):
            edges = ", ".join(f"{operation}({source})" for operation, source in node)
            show(f"{name:<9} node {t}: {edges}")
    show(*_early_end(out, settings), *_summary(out), f"Genotype: {out / GENOTYPE}", step)


def _early_end(out: Path, settings: SearchSettings) -> list[str]:
    """Return a line about a search that skip connections ended."""
    if settings.early_stop == "never" or (done := len(read_history(out))) == settings.epochs:
        return []
    return [f"The search ended after epoch {done} of {settings.epochs}, by --early-stop {settings.early_stop}."]


def _trainer(logger: str | None, out: Path) -> dict[str, Any]:
    """Return further arguments of Lightning's Trainer."""
    from .runs.callback import make_logger

    return {} if logger is None else dict(logger=make_logger(logger, out))


def _summary(out: Path) -> list[str]:
    """Return lines about the way of α and about the edges that it has decided; of a search in stages, of the last."""
    run = read_epochs(out)
    found = findings(run)[-1]
    if found is None:
        return []
    favoured = f"; the favoured began at {run.about['logit']:.2g}" if "logit" in run.about else ""
    counts = found.counts()
    edges = f"Of {counts.total()} edges, {texts.counted(counts)}."
    return [f"{texts.moved(found)}{favoured}.", texts.nothing_found(found) or edges]


def _training_step(out: Path, settings: SearchSettings, machine: dict[str, Any]) -> str:
    """Return the command that trains the genotype of a search, or the reason why there is none."""
    from .runs.data import read_run_images

    try:
        read_run_images(settings, "test", out if machine["on_disk"] else None)
    except ValueError as error:
        return f"To train it, give images that have a test part: {error}"
    images = read_about(out)["data"]["images"]
    return f"Train it: {retrain_command(out / GENOTYPE, {**asdict(settings), **machine}, images)}"


@with_options_of(RetrainSettings)
def retrain(
    *,
    genotype: Annotated[str, typer.Argument(help="A genotype's file, or the name of a published one (darts_v2).")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; by default retrain/ beside genotype.json, retrain-NAME/ beside NAME.json, and "
            "runs/NAME for a published one."
        ),
    ] = None,
    options: dict[str, Any],
    workers: Workers = 0,
    accelerator: Annotated[Accelerator, typer.Option(help="Lightning's.")] = "auto",
    devices: Devices = None,
    precision: Annotated[Precision, typer.Option(help="Lightning's.")] = "32-true",
    logger: Loggers = None,
    on_disk: OnDisk = False,
) -> None:
    """Train the network of a genotype from scratch (§9.3); an interrupted training goes on."""
    with hosts():
        from .runs.retrain import retrain as run

        options = imported(options)
        network = load_genotype(genotype)
        out = out or retraining_folder(genotype, network)
        settings = RetrainSettings(genotype=json.loads(network.to_json()), **options)
        with epoch_progress("retraining", settings.epochs, out, retrain_line) as progress:
            further: dict[str, Any] = dict(trainer=_trainer(logger, out), on_disk=on_disk, **progress)
            result = run(settings, out, workers, accelerator, devices, precision, **further)
        trained = read_retraining(out)
    kind, value = ("loss", f"{result:.4g}") if settings.regression else ("accuracy", f"{result:.2f} %")
    show(f"Test {kind} after the last epoch: {value}", f"Weights for timm: {out / WEIGHTS}")
    show(f"In Python: {timm_call(out, trained.settings, trained.about['data'])}")


def retraining_folder(genotype: str, network: Genotype) -> Path:
    """Return the default folder of a genotype's training.

    A training of the same genotype in ``retrain`` goes on, whatever the name of the genotype's file.
    """
    if genotype in genotype_names():
        return Path("runs") / genotype
    folder = Path(genotype).parent / "retrain"
    name = Path(genotype).name.removesuffix(".json")
    if name == "genotype" or (is_retraining(folder) and read_retraining(folder).genotype == network):
        return folder
    return folder.with_name(f"retrain-{name}")
