"""The command ``optinspired``: searches, retrainings and their reports, Table 2, and figures of the theory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Optional

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from nni_spaces import cli as nni_cli
    from nni_spaces.runs import settings

    from . import plotting
    from .terminal import console, errors_as_messages, show
except ImportError as error:  # the base installation has torch and timm only
    raise SystemExit(f"{error}: the command needs the extra 'viz': pip install '.[viz]' in a clone") from error

from . import __version__, simulation
from ._files import write_atomically
from .algorithms.methods import ALGORITHMS, load_algorithm
from .cells.genotype import load_genotype
from .cells.operations import import_modules
from .propagation.named import NETWORK_ALGORITHMS
from .propagation.patterns import pattern
from .report.page import write_report

__all__ = ["app", "main"]

Imports = Annotated[
    Optional[str], typer.Option("--import", help=settings.IMPORTS + " The current folder is searched, too.")
]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Networks read off algorithms.")
plot = typer.Typer(no_args_is_help=True, help="Draw algorithms, their rates, and cells.")
app.add_typer(plot, name="plot")

NAMED: dict[str, Callable[[], Any]] = {
    **NETWORK_ALGORITHMS,
    **ALGORITHMS,
}  # the heavy ball is drawn with β = 0.3 (§6.3)


def integers(text: str) -> list[int]:
    """Parse ``10,20,30``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: must be integers separated by commas, 10,20,30") from None


def network_names(text: str) -> list[str]:
    """Parse ``gd,hb``."""
    names = text.split(",")
    for name in names:
        if name not in ALGORITHMS:
            raise typer.BadParameter(f"network={name!r}: must be one of {', '.join(ALGORITHMS)}")
    return names


def _show_version(is_requested: bool) -> None:
    if is_requested:
        show(f"optinspired-plugins {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""


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

    Every finished network is a row of table2.csv; an interrupted run goes on after the last row.
    """
    with errors_as_messages():
        recipe = simulation.Recipe(pairs=pairs, dimension=dimension, lr=lr, batch_size=batch_size, steps=steps)
        chosen = (network_names(networks), [10] if quick else integers(depths), [0] if quick else integers(seeds))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            total = len(chosen[0]) * len(chosen[1]) * len(chosen[2])
            task = progress.add_task("Table 2", total=total * recipe.steps)

            def on_run(run: simulation.Run, is_recorded: bool) -> None:
                result = f"{run.network:<5} depth {run.depth:>2} seed {run.seed}  MSE {run.mse:.5f}"
                show(result + ("  (from the file)" if is_recorded else f"  {run.seconds:.1f} s"))
                progress.advance(task, recipe.steps if is_recorded else 0)

            path = out / "table2.csv"
            runs = simulation.simulate(path, *chosen, recipe, lambda: progress.advance(task), on_run)
        cells = simulation.summarise(runs)
        write_atomically(out / "table2.md", simulation.to_markdown(cells))
        plotting.draw_simulation(runs).savefig(out / "table2.png", dpi=130)
    console.print(_table(cells))
    show(f"Runs: {path}", f"Table: {out / 'table2.md'}", f"Figure: {out / 'table2.png'}")


for _command in (nni_cli.search, nni_cli.retrain):
    app.command()(_command)


@app.command()
def report(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folder of a search, a retraining or trials, finished or not; a genotype's file or name (darts_v2)."
        ),
    ],
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="Page to write; by default report.html in the folder, NAME.html for a genotype, comparison.html for "
            "several."
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Write one self-contained HTML page about a run, a genotype, or several beside each other.

    It has result, cells, curves, settings and hashes; of a search also α by epoch, the edges that it has found, and the
    command to retrain; of trials their Pareto front; of several, the edges that agree.
    """
    with errors_as_messages():
        _import(imports)
        page = write_report(sources, out)
    show(f"Report: {page}")


def _import(modules: str | None) -> None:
    if modules is not None:
        sys.path.insert(0, "")
        import_modules(modules.split(","))


def _table(cells: list[simulation.TableEntry]) -> Table:
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
    algorithm: Annotated[str, typer.Argument(help=f"A name ({', '.join(NAMED)}) or my_module:MyAlgorithm.")],
    steps: Annotated[int, typer.Option(help="Steps to draw.")] = 4,
    out: Annotated[Path, typer.Option(help="Image to write; the ending chooses the format.")] = Path("algorithm.png"),
) -> None:
    """Draw the network that an algorithm unrolls into. A module is looked for in the current folder too."""
    sys.path.insert(0, "")
    _save(lambda: plotting.draw_algorithm(load_algorithm(algorithm, NAMED), steps, algorithm), out)


@plot.command("pattern")
def plot_pattern(
    algorithm: Annotated[str, typer.Argument(help=f"A name ({', '.join(NAMED)}) or my_module:MyAlgorithm.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the cell.")] = 4,
    start: Annotated[int, typer.Option(help="Steps that are skipped.")] = 0,
    merge: Annotated[bool, typer.Option("--merge", help="One edge per source, as in (28).")] = False,
    out: Annotated[Path, typer.Option(help="Image to write; the ending chooses the format.")] = Path("pattern.png"),
) -> None:
    """Draw the cell of an algorithm's search space. A module is looked for in the current folder too."""
    sys.path.insert(0, "")

    def draw() -> Any:
        found = pattern(load_algorithm(algorithm, NETWORK_ALGORITHMS), nodes, start)
        return plotting.draw_pattern(found.merged() if merge else found, algorithm)

    _save(draw, out)


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
    imports: Imports = None,
) -> None:
    """Draw the normal and the reduction cell of a genotype."""

    def draw() -> Any:
        _import(imports)
        return plotting.draw_cells(load_genotype(genotype))

    _save(draw, out)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal of code page 1252 has no α
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
