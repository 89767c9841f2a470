"""The command ``optinspired``: searches, retrainings and their reports, Table 2, and the theory as pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from . import plotting
    from .terminal import console, epoch_progress, errors_as_messages, quiet_hosts, show
except ImportError as error:  # the base installation has torch and timm only
    raise SystemExit(f"{error}: the command needs the extra 'viz', pip install 'optinspired-plugins[viz]'") from error

from . import __version__, simulation
from ._files import write_atomically
from .algorithms.methods import ALGORITHMS, load_algorithm
from .cells.genotype import GENOTYPES, Genotype, found_names, load_genotype
from .cli_options import Accelerator, Initialization, Model, Precision, Space, Strategy, integers, network_names
from .next_steps import absolute_source, retrain_command, timm_call
from .propagation.unrolled import TwoPath
from .report.files import is_retraining, read_about, read_retraining
from .report.page import SKIPS, write_report

__all__ = ["app", "main", "quiet_hosts"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Networks read off algorithms."
)
plot = typer.Typer(no_args_is_help=True, help="Draw algorithms, their rates, and cells.")
app.add_typer(plot, name="plot")

NAMED = {**ALGORITHMS, "dmrnet": TwoPath}


def _show_version(wanted: bool) -> None:
    if wanted:
        show(f"optinspired-plugins {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options of every command."""


def search_line(entry: dict[str, Any]) -> str:
    """Say how weights and α did in an epoch, and how many edges of the genotype are skips: a collapse shows there."""
    edges = [edge for cell in ("normal", "reduction") for node in entry["genotype"][cell] for edge in node]
    skips = f"skips {sum(operation in SKIPS for operation, _ in edges):>2}/{len(edges)}"
    weights = f"weights {entry['train_loss']:.3f} {entry['train_top1']:5.1f} %"
    if entry["alpha_loss"] is None:
        return f"{weights}  α stands still  {skips}"
    return f"{weights}  α {entry['alpha_loss']:.3f} {entry['alpha_top1']:5.1f} %  {skips}"


def retrain_line(entry: dict[str, Any]) -> str:
    """Say how training and test did in an epoch."""
    training = f"train {entry['train_loss']:.3f} {entry['train_top1']:6.2f} %"
    return f"{training}  test {entry['test_loss']:.3f} {entry['test_top1']:6.2f} %"


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder of table2.csv, table2.md and table2.png.")] = Path(
        "runs/simulation"
    ),
    networks: Annotated[str, typer.Option(help="Of gd, hb, agd, agd2, admm.")] = ",".join(simulation.PAPER),
    depths: Annotated[str, typer.Option(help="Depths, separated by commas.")] = "10,20,30,40",
    seeds: Annotated[str, typer.Option(help="Seeds of pairs, weights and order.")] = "0,1,2",
    pairs: Annotated[int, typer.Option(help="Training pairs (§6.3).")] = simulation.Recipe.pairs,
    dimension: Annotated[int, typer.Option(help="Dimension of a pair (§6.3).")] = simulation.Recipe.dimension,
    lr: Annotated[float, typer.Option(help="Learning rate of plain SGD; our choice.")] = simulation.Recipe.lr,
    batch_size: Annotated[int, typer.Option(help="Our choice.")] = simulation.Recipe.batch_size,
    steps: Annotated[int, typer.Option(help="Training steps; our choice.")] = simulation.Recipe.steps,
    quick: Annotated[bool, typer.Option("--quick", help="Depth 10 and seed 0 only: under a minute.")] = False,
) -> None:
    """Train the five networks of Table 2 on random pairs (§6.3) and compare with the paper.

    Every finished network is a row of table2.csv; an interrupted run goes on behind the last row.
    """
    with errors_as_messages():
        recipe = simulation.Recipe(pairs=pairs, dimension=dimension, lr=lr, batch_size=batch_size, steps=steps)
        chosen = (network_names(networks), [10] if quick else integers(depths), [0] if quick else integers(seeds))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            total = len(chosen[0]) * len(chosen[1]) * len(chosen[2])
            task = progress.add_task("Table 2", total=total * recipe.steps)

            def on_run(run: simulation.Run, found: bool) -> None:
                done = f"{run.network:<5} depth {run.depth:>2} seed {run.seed}  MSE {run.mse:.5f}"
                show(done + ("  (from the file)" if found else f"  {run.seconds:.1f} s"))
                progress.advance(task, recipe.steps if found else 0)

            path = out / "table2.csv"
            runs = simulation.simulate(path, *chosen, recipe, lambda: progress.advance(task), on_run)
        cells = simulation.summarise(runs)
        write_atomically(out / "table2.md", simulation.to_markdown(cells))
        plotting.draw_simulation(runs).savefig(out / "table2.png", dpi=130)
    console.print(_table(cells))
    show(f"Runs: {path}", f"Table: {out / 'table2.md'}", f"Figure: {out / 'table2.png'}")


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted search there goes on.")],
    space: Annotated[Space, typer.Option(help="Search space (§9).")] = "hb",
    init: Annotated[Initialization, typer.Option(help="How α begins; heavy-ball for hb only.")] = "zero",
    strategy: Annotated[Strategy, typer.Option(help="How α and weights are found.")] = "darts",
    data: Annotated[str, typer.Option(help="digits, cifar10, an .npz file or a folder of images.")] = "cifar10",
    limit: Annotated[Optional[int], typer.Option(help="Use the first so many images.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs (§9.3); of p-darts in each of its stages.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Batch size, of both halves (§9.3).")] = 64,
    channels: Annotated[int, typer.Option(help="Channels of the first cells (§9.3).")] = 16,
    cells: Annotated[int, typer.Option(help="Cells (§9.3); p-darts has its own.")] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes of a cell.")] = 4,
    lr: Annotated[float, typer.Option(help="First learning rate of the weights (§9.3).")] = 0.025,
    alpha_lr: Annotated[float, typer.Option(help="Learning rate of α and β (§9.3).")] = 3e-4,
    padding: Annotated[int, typer.Option(help="Pixels that a random crop shifts by; 0 for no augmentation.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    partial_channels: Annotated[
        Optional[int], typer.Option(help="K: mix operations on 1/K of the channels; pc-darts has 4, the others 1.")
    ] = None,
    warmup_epochs: Annotated[
        Optional[int], typer.Option(help="Epochs in which α stands still; pc-darts 30 %, p-darts 40 %, the others 0.")
    ] = None,
    grad_checkpointing: Annotated[bool, typer.Option(help="Compute cells twice to save memory.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    accelerator: Annotated[Accelerator, typer.Option(help="Lightning's.")] = "auto",
    devices: Annotated[
        Optional[int], typer.Option(help="Processes that share the work; torchrun's by default, and else 1.")
    ] = None,
) -> None:
    """Search a cell with NNI's DARTS in a space of section 9; writes genotype.json."""
    with errors_as_messages(), quiet_hosts():
        from nni_spaces.runs.callback import resolve_devices
        from nni_spaces.runs.progressive import search_progressively
        from nni_spaces.runs.search import SearchSettings
        from nni_spaces.runs.search import search as search_once

        settings = SearchSettings(
            space=space,
            init=init,
            strategy=strategy,
            data=absolute_source(data),
            limit=limit,
            epochs=epochs,
            batch_size=batch_size,
            channels=channels,
            cells=cells,
            nodes=nodes,
            lr=lr,
            alpha_lr=alpha_lr,
            padding=padding,
            seed=seed,
            partial_channels=partial_channels,
            warmup_epochs=warmup_epochs,
            grad_checkpointing=grad_checkpointing,
        )
        run_search: Callable[..., Any] = search_progressively if strategy == "p-darts" else search_once
        with epoch_progress(f"{space} search", epochs, out, search_line) as progress:
            machine: dict[str, Any] = dict(workers=workers, accelerator=accelerator, devices=resolve_devices(devices))
            found = run_search(settings, out, **machine, **progress)
        step = _training_step(out, {**asdict(settings), **machine})
    for name, cell in (("normal", found.normal), ("reduction", found.reduction)):
        for t, node in enumerate(cell, start=2):
            edges = ", ".join(f"{operation}({source})" for operation, source in node)
            show(f"{name:<9} node {t}: {edges}")
    show(f"Genotype: {out / 'genotype.json'}", step)


def _training_step(out: Path, settings: dict[str, Any]) -> str:
    """Name the command that trains what a search has found, or what it would miss."""
    from nni_spaces.runs.data import read_images

    try:
        read_images(settings["data"], settings["limit"], "test")
    except ValueError as error:
        return f"To train it, give images that have a test part: {error}"
    images = read_about(out)["data"]["images"]
    return f"Train it: {retrain_command(out / 'genotype.json', settings, images)}"


@app.command()
def retrain(
    genotype: Annotated[str, typer.Argument(help="A genotype's file, or the name of a published one (darts_v2).")],
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder of the run; by default retrain/ beside genotype.json, retrain-NAME/ beside NAME.json, and "
            "runs/NAME of a published one."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="digits, cifar10, an .npz file or a folder of images.")] = "cifar10",
    limit: Annotated[Optional[int], typer.Option(help="Use the first so many images, for training and test.")] = None,
    model: Annotated[Model, typer.Option(help="timm's name of the network.")] = "cellnet_cifar",
    epochs: Annotated[int, typer.Option(help="Epochs (§9.3).")] = 600,
    batch_size: Annotated[int, typer.Option(help="Batch size (§9.3).")] = 96,
    cells: Annotated[int, typer.Option(help="Cells (§9.3).")] = 20,
    width: Annotated[int, typer.Option(help="Channels of the first cells (§9.3).")] = 36,
    lr: Annotated[float, typer.Option(help="First learning rate (§9.3).")] = 0.025,
    aux_weight: Annotated[
        Optional[float],
        typer.Option(help="Weight of the auxiliary loss; 0.4 (§9.3) where its head fits the images, else 0."),
    ] = None,
    drop_path: Annotated[float, typer.Option(help="Rate at which operations are dropped in the end (§9.3).")] = 0.2,
    cutout: Annotated[
        Optional[int], typer.Option(help="Side of the square cut out of an image; half a side by default, 0 for none.")
    ] = None,
    padding: Annotated[int, typer.Option(help="Pixels that a random crop shifts by; 0 for no augmentation.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    accelerator: Annotated[Accelerator, typer.Option(help="Lightning's.")] = "auto",
    devices: Annotated[
        Optional[int], typer.Option(help="Processes that share the work; torchrun's by default, and else 1.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Lightning's.")] = "32-true",
) -> None:
    """Train the network of a genotype from scratch (§9.3); an interrupted training goes on."""
    with errors_as_messages(), quiet_hosts():
        from nni_spaces.runs.retrain import RetrainSettings
        from nni_spaces.runs.retrain import retrain as run_retrain

        found = load_genotype(genotype)
        out = out or _retraining_folder(genotype, found)
        settings = RetrainSettings(
            genotype=json.loads(found.to_json()),
            data=absolute_source(data),
            limit=limit,
            model=model,
            epochs=epochs,
            batch_size=batch_size,
            cells=cells,
            width=width,
            lr=lr,
            aux_weight=aux_weight,
            drop_path=drop_path,
            cutout=cutout,
            padding=padding,
            seed=seed,
        )
        with epoch_progress("retraining", epochs, out, retrain_line) as progress:
            top1 = run_retrain(settings, out, workers, accelerator, devices, precision, **progress)
        trained = read_retraining(out)
    show(f"Test accuracy after the last epoch: {top1:.2f} %", f"Weights for timm: {out / 'model.safetensors'}")
    show(f"In Python: {timm_call(out, trained.settings, trained.about['data'])}")


def _retraining_folder(genotype: str, found: Genotype) -> Path:
    """Return the folder of a genotype's training; an older one in ``retrain`` goes on, whatever the file is called."""
    if genotype in {*GENOTYPES, *found_names()}:
        return Path("runs") / genotype
    folder = Path(genotype).parent / "retrain"
    name = Path(genotype).name.removesuffix(".json")
    if name == "genotype" or (is_retraining(folder) and read_retraining(folder).genotype == found):
        return folder
    return folder.with_name(f"retrain-{name}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a search or a retraining, finished or not.")],
    out: Annotated[Optional[Path], typer.Option(help="Page to write; report.html in the folder if not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a search or a retraining.

    It has result, cells, curves, settings and hashes; of a search also α by epoch, and the command to retrain.
    """
    with errors_as_messages():
        page = write_report(folder, out)
    show(f"Report: {page}")


def _table(cells: list[simulation.Cell]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        caption="Plain SGD; learning rate × steps = 100 was chosen by us. A std near 0: the output ignores the input.",
        caption_justify="left",
    )
    for heading in ("network", "depth", "MSE, paper", "MSE, measured", "± std over seeds", "std of the output"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for cell in cells:
        printed = "" if cell.paper is None else f"{cell.paper:.5f}"
        spread = f"{cell.spread:.5f}" if cell.seeds > 1 else "one seed"
        table.add_row(cell.network, str(cell.depth), printed, f"{cell.mse:.5f}", spread, f"{cell.output_std:.1e}")
    return table


def _save(draw: Callable[[], Any], out: Path) -> None:
    with errors_as_messages():
        out.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(out, dpi=130)
    show(str(out))


@plot.command("algorithm")
def plot_algorithm(
    algorithm: Annotated[
        str, typer.Argument(help="A name (gd, hb, agd, agd2, admm, dmrnet) or my_module:MyAlgorithm.")
    ],
    steps: Annotated[int, typer.Option(help="Steps to draw.")] = 4,
    out: Annotated[Path, typer.Option(help="Image to write; the ending chooses the format.")] = Path("algorithm.png"),
) -> None:
    """Draw the network that an algorithm unrolls into. A module is looked for in the current folder too."""
    sys.path.insert(0, "")
    _save(lambda: plotting.draw_algorithm(load_algorithm(algorithm, NAMED), steps, algorithm), out)


@plot.command("algorithms")
def plot_algorithms(
    steps: Annotated[int, typer.Option(help="Steps to draw.")] = 4,
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("algorithms.png"),
) -> None:
    """Draw the five networks of Table 2 (Figure 1), one below another."""
    _save(lambda: plotting.draw_algorithms(steps=steps), out)


@plot.command("convergence")
def plot_convergence(
    condition: Annotated[float, typer.Option(help="Condition number.")] = 100.0,
    steps: Annotated[int, typer.Option(help="Steps.")] = 400,
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("convergence.png"),
) -> None:
    """Draw distance to the minimiser by step, on a quadratic and on the objective (8)."""
    _save(lambda: plotting.draw_convergence(condition, steps), out)


@plot.command("condition-numbers")
def plot_condition_numbers(
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("condition_numbers.png"),
) -> None:
    """Draw the steps that gradient descent, heavy ball and Nesterov's method need by condition number."""
    _save(plotting.draw_condition_numbers, out)


@plot.command("cells")
def plot_cells(
    genotype: Annotated[str, typer.Argument(help="A JSON file, or darts_v2 and the like.")],
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("cells.png"),
) -> None:
    """Draw the normal and the reduction cell of a genotype."""
    _save(lambda: plotting.draw_cells(load_genotype(genotype)), out)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
