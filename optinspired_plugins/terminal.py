"""Output of the command: plain lines, a progress bar, and errors as one line on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ._files import printable

__all__ = ["console", "epoch_progress", "errors_as_messages", "show"]

# Errors caused by arguments, files, a full disk or a diverging loss.
FOR_USERS = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
_PLAIN: dict[str, Any] = dict(markup=False, emoji=False, highlight=False)

# In a distributed run only the first process prints; every process reports its errors.
console = Console(quiet=os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0", **_PLAIN)
errors = Console(stderr=True, **_PLAIN)


def show(*lines: str) -> None:
    """Print lines; control characters are written as escapes."""
    for line in lines:
        console.print(printable(line), soft_wrap=True)


@contextmanager
def epoch_progress(
    name: str, epochs: int, out: Path, line: Callable[[dict[str, Any]], str]
) -> Iterator[dict[str, Callable[..., None]]]:
    """Show a bar of batches and one line per epoch, and return the callbacks of a run.

    Args:
        name: label of the bar.
        epochs: number of epochs.
        out: folder of the run.
        line: returns the text of an epoch, from its entry of the history.
    """
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
        except SystemExit:  # Lightning raises it at an interrupt or SIGTERM
            show("Stopped: the same command goes on after the last finished epoch.")
            raise


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print an error that a user can cause as one line on stderr and exit with 1; others keep their traceback."""
    try:
        yield
    except Exception as error:
        lightning = sys.modules.get("pytorch_lightning.utilities.exceptions")
        misconfigured = getattr(lightning, "MisconfigurationException", ())
        if not isinstance(error, (FOR_USERS, misconfigured)):
            raise
        message = printable(" ".join(line.strip() for line in str(error).splitlines()))
        errors.print(Text.assemble(("error", "red"), f" {type(error).__name__}: {message}"), soft_wrap=True)
        raise typer.Exit(1) from error
