"""The command ``optinspired``: searches and their reports, Table 2, and the theory as pictures."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
from .genotype import load_genotype
from .propagation import TwoPath
from .report import write_report

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Networks read off algorithms."
)
plot = typer.Typer(no_args_is_help=True, help="Draw algorithms, their rates, and cells.")
app.add_typer(plot, name="plot")

NAMED = {**ALGORITHMS, "dmrnet": TwoPath}
console = Console()


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
    """Keep NNI's and Lightning's advice out of a terminal that shows progress; errors still come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("nni", "pytorch_lightning", "lightning", "lightning.pytorch", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


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
    strategy: Annotated[str, typer.Option(help="darts, darts-second-order or gumbel.")] = "darts",
    data: Annotated[str, typer.Option(help="digits, cifar10, an .npz file or a folder of images.")] = "cifar10",
    limit: Annotated[Optional[int], typer.Option(help="Use the first so many images.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs (§9.3).")] = 50,
    batch_size: Annotated[int, typer.Option(help="Batch size, of both halves (§9.3).")] = 64,
    channels: Annotated[int, typer.Option(help="Channels of the first cells (§9.3).")] = 16,
    cells: Annotated[int, typer.Option(help="Cells (§9.3).")] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes of a cell.")] = 4,
    lr: Annotated[float, typer.Option(help="First learning rate of the weights (§9.3).")] = 0.025,
    alpha_lr: Annotated[float, typer.Option(help="Learning rate of α and β (§9.3).")] = 3e-4,
    padding: Annotated[int, typer.Option(help="Pixels that a random crop shifts by; 0 for no augmentation.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    accelerator: Annotated[str, typer.Option(help="Lightning's: auto, cpu, gpu, …")] = "auto",
) -> None:
    """Search a cell with NNI's DARTS in a space of section 9; writes genotype.json."""
    with errors_as_messages(), quiet_hosts():
        from nni_spaces.search import SearchSettings
        from nni_spaces.search import search as run_search

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
        )
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{space} search", total=None)

            def on_start(done: int, batches: int) -> None:
                progress.update(task, total=epochs * batches, completed=done * batches)
                if done:
                    progress.console.print(f"Going on after epoch {done} of {out}.", highlight=False)

            def on_epoch(entry: dict[str, Any]) -> None:
                state = f"weights {entry['train_loss']:.3f} {entry['train_top1']:5.1f} %"
                state += f"  α {entry['alpha_loss']:.3f} {entry['alpha_top1']:5.1f} %"
                line = f"epoch {entry['epoch'] + 1:>3}/{epochs}  {state}  {entry['seconds']:.1f} s"
                progress.console.print(line, highlight=False)

            advance = partial(progress.advance, task)
            genotype = run_search(settings, out, workers, accelerator, on_start, advance, on_epoch)
    for name, cell in (("normal", genotype.normal), ("reduction", genotype.reduction)):
        for t, node in enumerate(cell, start=2):
            edges = ", ".join(f"{operation}({source})" for operation, source in node)
            console.print(f"{name:<9} node {t}: {edges}", highlight=False, soft_wrap=True)
    file = out / "genotype.json"
    console.print(
        f"Genotype: {file}\nTrain it: train.py … --model cellnet_cifar --model-kwargs genotype={file}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a search, finished or not.")],
    out: Annotated[Optional[Path], typer.Option(help="Page to write; report.html in the folder if not given.")] = None,
) -> None:
    """Write one self-contained HTML page about a search: result, cells, α by epoch, curves, command to retrain."""
    with errors_as_messages():
        page = write_report(folder, out)
    console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


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
