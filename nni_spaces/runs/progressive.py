"""P-DARTS (Chen et al. 2019): searches in stages with more cells, fewer candidates and dropout on skips.

The folder of a run holds one search per stage, ``stage1``, ``stage2``, …, and finally ``genotype.json``. Every stage
can be resumed, and therefore the run can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optinspired_plugins._checks import check_int, check_rate
from optinspired_plugins.cells.genotype import EDGES, Genotype
from optinspired_plugins.run_folder import GENOTYPE, last_entry, lock_folder, process_rank, resolve_devices

from ..spaces.derivation import derive, limit_skips, strongest_candidates
from .search import cell_structure, search
from .settings import SearchSettings

__all__ = ["PDARTS_STAGES", "SearchStage", "search_progressively"]


@dataclass(frozen=True)
class SearchStage:
    """A stage of a progressive search.

    Args:
        cells: number of cells, ≥ 3.
        keep: number of candidates per edge, including zero: the strongest of the stage before. ``None`` for all.
        skip_dropout: initial rate of the dropout after skip connections; it falls linearly to 0 in the stage.

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


# The paper's stages on CIFAR-10, with DARTS's eight candidates in the first.
PDARTS_STAGES = (SearchStage(5), SearchStage(11, 5, 0.4), SearchStage(17, 3, 0.7))


# Over 40 lines: most of them describe arguments and errors.
def search_progressively(
    settings: SearchSettings,
    out: str | Path,
    *,
    stages: Sequence[SearchStage] = PDARTS_STAGES,
    max_skips: int | None = 2,
    **options: Any,
) -> Genotype:
    """Search in stages, or resume such a search.

    Each stage is a new search with the strongest candidates of the stage before
    (:func:`~nni_spaces.strongest_candidates`). The cell is derived from the last stage with a limited number of skip
    connections (:func:`~nni_spaces.limit_skips`).

    Args:
        settings: settings of all stages; the stages replace ``cells``, ``skip_dropout`` and ``allowed``, and each has
            ``epochs`` epochs.
        out: the folder of the run.
        stages: the stages.
        max_skips: largest number of skip connections in the normal cell; ``None`` for no limit.
        **options: other arguments of :func:`~nni_spaces.runs.search.search`; ``on_start`` is called in every stage.

    Returns:
        The genotype, also written to ``genotype.json``.

    Raises:
        ValueError: ``stages`` is empty or its first stage has ``keep``; ``max_skips`` is out of range; or as in a
            search.
    """
    _check(stages, max_skips)
    folder = Path(out)
    strategy = "darts" if settings.strategy == "p-darts" else settings.strategy
    allowed: dict[str, list[str]] | None = None
    probabilities: dict[str, dict[str, float]] = {}
    options["devices"] = resolve_devices(options.get("devices"))
    with lock_folder(folder, options["devices"]):
        for number, stage in enumerate(stages, start=1):
            if stage.keep is not None:
                allowed = strongest_candidates(probabilities, stage.keep)
            changes: dict[str, Any] = dict(cells=stage.cells, skip_dropout=stage.skip_dropout, allowed=allowed)
            search(replace(settings, strategy=strategy, **changes), folder / f"stage{number}", **options)
            probabilities = last_entry(folder / f"stage{number}", "probabilities")
        genotype = _derived(settings, probabilities, max_skips)
        if not process_rank():
            genotype.save(folder / GENOTYPE)
        return genotype


def _derived(settings: SearchSettings, probabilities: dict[str, dict[str, float]], max_skips: int | None) -> Genotype:
    """Return the cells of the last stage with a limited number of skip connections."""
    structure, nodes = cell_structure(settings), settings.nodes
    keep = structure.keep if structure.keep is not None and structure.chooses(nodes) else EDGES["agd"]
    if max_skips is not None:
        probabilities = limit_skips(probabilities, max_skips, keep, structure.operation_labels(nodes))
    return structure.genotype(derive(probabilities, keep), nodes)


def _check(stages: Sequence[SearchStage], max_skips: int | None) -> None:
    if not stages or stages[0].keep is not None:
        raise ValueError(
            f"stages={stages!r}: must have at least one, and keep of the first must be None: no stage is before it"
        )
    if max_skips is not None:
        check_int("max_skips", max_skips, 0)
