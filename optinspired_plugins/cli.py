"""The command ``optinspired``: searches, retrainings and their reports, Table 2, and the theory as pictures."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from . import plotting
except ImportError as error:  # the base installation has torch and timm only
    raise SystemExit(f"{error}: the command needs the extra 'viz', pip install 'optinspired-plugins[viz]'") from error

from . import simulation
from ._files import write_atomically
from .algorithms import ALGORITHMS, load_algorithm
from .genotype import GENOTYPES, found_names, load_genotype
from .propagation import TwoPath
from .report import SKIPS, write_report

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Networks read off algorithms."
)
plot = typer.Typer(no_args_is_help=True, help="Draw algorithms, their rates, and cells.")
app.add_typer(plot, name="plot")

NAMED = {**ALGORITHMS, "dmrnet": TwoPath}
# Of a distributed run, the first process speaks.
console = Console(quiet=os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0")


def integers(text: str) -> list[int]:
    """Parse ``10,20,30``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: must be integers separated by commas, 10,20,30") from None


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn what a user can cause into a line of text and exit status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        message = f"[red]error[/red] {type(error).__name__}: {escape(str(error))}"
        console.print(message, markup=True, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def quiet_hosts() -> Iterator[None]:
    """Keep NNI's and Lightning's advice out of a terminal that shows progress; what they raise still comes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nni_spaces  # noqa: F401  the hosts set their own levels when they are imported

        logging.getLogger("nni").setLevel(logging.CRITICAL)  # it logs every exception that it passes on
        for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


def show(text: str) -> None:
    """Print text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def epoch_progress(
    name: str, epochs: int, out: Path, line: Callable[[dict[str, Any]], str]
) -> Iterator[dict[str, Callable[..., None]]]:
    """Show a bar of batches and a line an epoch; give what a run calls."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=None)

        def on_start(done: int, batches: int) -> None:
            progress.update(task, total=epochs * batches, completed=done * batches)
            if done:
                show(f"Going on after epoch {done} of {out}.")

        def on_epoch(entry: dict[str, Any]) -> None:
            show(f"epoch {entry['epoch'] + 1:>3}/{epochs}  {line(entry)}  {entry['seconds']:.1f} s")

        try:
            yield dict(on_start=on_start, on_batch=lambda: progress.advance(task), on_epoch=on_epoch)
        except SystemExit:  # Lightning's, of an interrupt or SIGTERM
            show("Stopped: the same command goes on after the last finished epoch.")
            raise


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
        chosen = (networks.split(","), [10] if quick else integers(depths), [0] if quick else integers(seeds))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            total = len(chosen[0]) * len(chosen[1]) * len(chosen[2])
            task = progress.add_task("Table 2", total=total * recipe.steps)

            def on_run(run: simulation.Run, found: bool) -> None:
                done = f"{run.network:<5} depth {run.depth:>2} seed {run.seed}  MSE {run.mse:.5f}"
                progress.console.print(
                    done + ("  (from the file)" if found else f"  {run.seconds:.1f} s"), highlight=False
                )
                progress.advance(task, recipe.steps if found else 0)

            path = out / "table2.csv"
            runs = simulation.simulate(path, *chosen, recipe, lambda: progress.advance(task), on_run)
        cells = simulation.summarise(runs)
        write_atomically(out / "table2.md", simulation.to_markdown(cells))
        plotting.draw_simulation(runs).savefig(out / "table2.png", dpi=130)
    console.print(_table(cells))
    console.print(f"Runs: {path}\nTable: {out / 'table2.md'}\nFigure: {out / 'table2.png'}", highlight=False)


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted search there goes on.")],
    space: Annotated[str, typer.Option(help="hb, agd or darts.")] = "hb",
    init: Annotated[str, typer.Option(help="How α begins: heavy-ball (hb only), zero or random.")] = "zero",
    strategy: Annotated[str, typer.Option(help="darts, darts-second-order, gumbel, pc-darts or p-darts.")] = "darts",
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
    accelerator: Annotated[str, typer.Option(help="Lightning's: auto, cpu, gpu, …")] = "auto",
    devices: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
) -> None:
    """Search a cell with NNI's DARTS in a space of section 9; writes genotype.json."""
    with errors_as_messages(), quiet_hosts():
        from nni_spaces.progressive import search_progressively
        from nni_spaces.search import SearchSettings
        from nni_spaces.search import search as search_once

        settings = SearchSettings(
            space=space,
            init=init,
            strategy=strategy,
            data=data,
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
            found = run_search(settings, out, workers=workers, accelerator=accelerator, devices=devices, **progress)
    for name, cell in (("normal", found.normal), ("reduction", found.reduction)):
        for t, node in enumerate(cell, start=2):
            edges = ", ".join(f"{operation}({source})" for operation, source in node)
            show(f"{name:<9} node {t}: {edges}")
    command = shlex.join(["optinspired", "retrain", str(out / "genotype.json"), "--data", data])
    show(f"Genotype: {out / 'genotype.json'}\nTrain it: {command}")


@app.command()
def retrain(
    genotype: Annotated[str, typer.Argument(help="A genotype's file, or the name of a published one (darts_v2).")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of the run; by default retrain/ beside the file, or runs/NAME.")
    ] = None,
    data: Annotated[str, typer.Option(help="digits, cifar10, an .npz file or a folder of images.")] = "cifar10",
    limit: Annotated[Optional[int], typer.Option(help="Use the first so many images, for training and test.")] = None,
    model: Annotated[str, typer.Option(help="cellnet_cifar or cellnet_imagenet.")] = "cellnet_cifar",
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
    cutout: Annotated[int, typer.Option(help="Side of the square cut out of an image; 0 for none.")] = 16,
    padding: Annotated[int, typer.Option(help="Pixels that a random crop shifts by; 0 for no augmentation.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    accelerator: Annotated[str, typer.Option(help="Lightning's: auto, cpu, gpu, …")] = "auto",
    devices: Annotated[int, typer.Option(help="Processes that share the work.")] = 1,
    precision: Annotated[str, typer.Option(help="Lightning's: 32-true, bf16-mixed, 16-mixed.")] = "32-true",
) -> None:
    """Train the network of a genotype from scratch (§9.3); an interrupted training goes on."""
    with errors_as_messages(), quiet_hosts():
        from nni_spaces.retrain import RetrainSettings
        from nni_spaces.retrain import retrain as run_retrain

        found = load_genotype(genotype)
        if out is None:
            is_name = genotype in {*GENOTYPES, *found_names()}
            out = Path("runs") / genotype if is_name else Path(genotype).parent / "retrain"
        settings = RetrainSettings(
            genotype=json.loads(found.to_json()),
            data=data,
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
    show(f"Test accuracy after the last epoch: {top1:.2f} %\nWeights for timm: {out / 'model.safetensors'}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a search, finished or not.")],
    out: Annotated[Optional[Path], typer.Option(help="Page to write; report.html in the folder if not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a search: result, cells, α by epoch, curves, command to retrain."""
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
    console.print(str(out), highlight=False, soft_wrap=True)


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
