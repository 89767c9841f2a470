"""When a difference may be claimed: only where it exceeds the spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import fisher_exact, ttest_ind

__all__ = ["NOISE", "ONE_SEED", "Counts", "Verdict", "compare", "compare_counts", "mean_and_spread"]

NOISE, ONE_SEED = "too noisy to say", "one seed: no spread"


class Verdict(NamedTuple):
    """A difference of means, the half-width of its 95 % interval (``None`` where there is none), and what it says.

    ``word`` is ``"lower"``, ``"higher"``, :data:`NOISE` or :data:`ONE_SEED`.
    """

    difference: float
    half_width: float | None
    word: str

    def to_text(self, digits: int) -> str:
        """Return difference ± half-width."""
        around = "" if self.half_width is None else f" ± {self.half_width:.{digits}f}"
        return f"{self.difference:+.{digits}f}{around}"


class Counts(NamedTuple):
    """How many of our runs, and of the peers', something befell, of how many.

    ``word`` is ``"fewer"``, ``"more"`` or :data:`NOISE`.
    """

    ours: tuple[int, int]
    peers: tuple[int, int]
    word: str

    @property
    def difference(self) -> float:
        """Of the shares."""
        return self.ours[0] / self.ours[1] - self.peers[0] / self.peers[1]

    def to_text(self, digits: int = 0) -> str:
        """Return both counts."""
        return "{} of {} against {} of {}".format(*self.ours, *self.peers)


def compare_counts(ours: Sequence[bool], peers: Sequence[bool]) -> Counts:
    """Compare two networks by what befell their runs, one value a seed: Fisher's exact test at 5 %."""
    counts = [(sum(map(bool, runs)), len(runs)) for runs in (ours, peers)]
    p = fisher_exact([[hit, runs - hit] for hit, runs in counts]).pvalue
    found = Counts(*counts, NOISE)
    return found if p > 0.05 else found._replace(word="fewer" if found.difference < 0 else "more")


def compare(ours: Sequence[float], peers: Sequence[float]) -> Verdict:
    """Compare two networks by their values over seeds: Welch's 95 % interval of the difference of the means.

    Up to seven seeds a side, the interval is wider than the standard deviation over seeds. Values without any spread
    are compared as they are.
    """
    difference = mean(ours) - mean(peers)
    if min(len(ours), len(peers)) < 2:
        return Verdict(difference, None, ONE_SEED)
    half = 0.0
    if stdev(ours) or stdev(peers):
        interval = ttest_ind(ours, peers, equal_var=False).confidence_interval(0.95)
        half = float(interval.high - interval.low) / 2
    word = NOISE if abs(difference) <= half else "lower" if difference < 0 else "higher"
    return Verdict(difference, half, word)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation over seeds; of one value, the value."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"
