"""P-DARTS (Chen et al. 2019) over the spaces: stages of growing depth, shrinking candidates and dropout on skips.

The folder of a run holds a search each stage, ``stage1``, ``stage2``, …, and in the end ``genotype.json``. As every
stage is a search that survives being killed, so does the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optinspired_plugins._checks import check_int
from optinspired_plugins.cells.genotype import Genotype
from optinspired_plugins.run_folder import last_entry

from ..spaces.derivation import derive, limit_skips, strongest_candidates
from ..spaces.space import check_rate
from .callback import locked, resolve_devices
from .data import process_rank
from .search import SearchSettings, search

__all__ = ["PDARTS_STAGES", "Stage", "search_progressively"]


@dataclass(frozen=True)
class Stage:
    """A stage of a progressive search.

    Args:
        cells: number of cells, ≥ 3.
        keep: number of candidates of an edge, zero included: the strongest of the stage before; ``None`` for all.
        skip_dropout: first rate of the dropout behind skip connections; it falls linearly to 0 in the stage.

    Raises:
        ValueError: an argument is out of range.
    """

    cells: int
    keep: int | None = None
    skip_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int("cells", self.cells, 3)
        if self.keep is not None:
            check_int("keep", self.keep, 1)
        check_rate("skip_dropout", self.skip_dropout)


# On CIFAR-10, where the first stage has DARTS's eight candidates.
PDARTS_STAGES = (Stage(5), Stage(11, 5, 0.4), Stage(17, 3, 0.7))


def search_progressively(
    settings: SearchSettings,
    out: str | Path,
    *,
    stages: Sequence[Stage] = PDARTS_STAGES,
    most_skips: int | None = 2,
    **options: Any,
) -> Genotype:
    """Search stage by stage, or go on with such a run.

    A stage begins anew with the strongest candidates of the one before, :func:`~nni_spaces.strongest_candidates`; the
    cell is derived from the last one with few skip connections, :func:`~nni_spaces.limit_skips`.

    Args:
        settings: what to search; ``cells``, ``skip_dropout`` and ``allowed`` are the stages', ``epochs`` a stage's.
        out: the folder of the run.
        stages: the stages.
        most_skips: number of skip connections of the normal cell; ``None`` for any.
        **options: of :func:`~nni_spaces.runs.search.search`, callbacks among them; ``on_start`` is called every stage.

    Returns:
        The genotype, also written to ``genotype.json``.

    Raises:
        ValueError: ``stages`` is empty or the first keeps what no stage has found; ``most_skips`` is out of range; else
            as for a search.
        RuntimeError: another process searches in the folder.
        FloatingPointError: the loss was not finite.
        OSError: a file cannot be written; the ones before are kept.
    """
    _check(stages, most_skips)
    folder = Path(out)
    strategy = "darts" if settings.strategy == "p-darts" else settings.strategy
    allowed: dict[str, list[str]] | None = None
    probabilities: dict[str, dict[str, float]] = {}
    options["devices"] = resolve_devices(options.get("devices"))
    with locked(folder, options["devices"]):
        for number, stage in enumerate(stages, start=1):
            if stage.keep is not None:
                allowed = strongest_candidates(probabilities, stage.keep)
            own = replace(settings, cells=stage.cells, skip_dropout=stage.skip_dropout, allowed=allowed)
            search(replace(own, strategy=strategy), folder / f"stage{number}", **options)
            probabilities = last_entry(folder / f"stage{number}", "probabilities")
        limited = probabilities if most_skips is None else limit_skips(probabilities, most_skips)
        genotype = Genotype.from_nni(derive(limited))
        if not process_rank():
            genotype.save(folder / "genotype.json")
        return genotype


def _check(stages: Sequence[Stage], most_skips: int | None) -> None:
    if not stages or stages[0].keep is not None:
        raise ValueError(f"stages={stages!r}: must hold one, and keep of the first must be None: nothing is known then")
    if most_skips is not None:
        check_int("most_skips", most_skips, 0)
