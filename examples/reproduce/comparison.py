"""Statistical comparisons of networks over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import fisher_exact, ttest_ind

__all__ = ["NOISE", "ONE_SEED", "Counts", "Verdict", "compare", "compare_counts", "mean_and_spread"]

NOISE, ONE_SEED = "too noisy to say", "one seed: no spread"


class Verdict(NamedTuple):
    """A difference of means with its 95 % interval."""

    difference: float
    half_width: float | None  # None with a single seed
    word: str  # "lower", "higher", NOISE or ONE_SEED

    def to_text(self, digits: int) -> str:
        """Return difference ± half-width."""
        around = "" if self.half_width is None else f" ± {self.half_width:.{digits}f}"
        return f"{self.difference:+.{digits}f}{around}"


class Counts(NamedTuple):
    """Numbers of runs with an event, and of all runs."""

    ours: tuple[int, int]
    peers: tuple[int, int]
    word: str  # "fewer", "more" or NOISE

    @property
    def difference(self) -> float:
        """Difference of the fractions of runs."""
        return self.ours[0] / self.ours[1] - self.peers[0] / self.peers[1]

    def to_text(self, digits: int = 0) -> str:
        """Return both counts."""
        return "{} of {} against {} of {}".format(*self.ours, *self.peers)


def compare_counts(ours: Sequence[bool], peers: Sequence[bool]) -> Counts:
    """Compare numbers of runs with an event by Fisher's exact test at 5 %."""
    counts = [(sum(map(bool, runs)), len(runs)) for runs in (ours, peers)]
    p = fisher_exact([[events, runs - events] for events, runs in counts]).pvalue
    verdict = Counts(*counts, NOISE)
    return verdict if p > 0.05 else verdict._replace(word="fewer" if verdict.difference < 0 else "more")


def compare(ours: Sequence[float], peers: Sequence[float]) -> Verdict:
    """Compare means by Welch's 95 % interval of their difference.

    With up to seven seeds per network, the interval is wider than the standard deviation over seeds. Values without
    any spread are compared directly.
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
    """Return mean ± standard deviation as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"
