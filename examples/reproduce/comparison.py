"""Statistical comparisons of networks over seeds.

Runs of two networks with one seed share the order of the images and, where shapes are equal, the initial weights. So
they are compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev, variance
from typing import NamedTuple

from scipy.stats import fisher_exact, t, ttest_1samp

__all__ = ["Counts", "Difference", "PooledVariance", "compare", "compare_counts", "mean_and_spread", "pool"]

MIN_PAIRS = 3  # fewer use the pooled variance: the interval of two pairs is 12.7 standard errors wide


class Difference(NamedTuple):
    """A difference of means with its 95 % interval and p-value; both are ``None`` with a single seed."""

    value: float
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def directions(self) -> tuple[str, str]:
        """Words for a negative and a positive difference."""
        return "lower", "higher"

    def to_text(self, digits: int) -> str:
        """Return the difference and its interval."""
        if self.interval is None:
            return f"{self.value:+.{digits}f}"
        low, high = self.interval
        return f"{self.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


class Counts(NamedTuple):
    """Numbers of runs with an event, and of all runs, with the p-value of Fisher's exact test."""

    ours: tuple[int, int]
    peers: tuple[int, int]
    p: float

    @property
    def value(self) -> float:
        """Difference of the fractions of runs."""
        return self.ours[0] / self.ours[1] - self.peers[0] / self.peers[1]

    @property
    def directions(self) -> tuple[str, str]:
        """Words for a negative and a positive difference."""
        return "fewer", "more"

    def to_text(self, digits: int = 0) -> str:
        """Return both counts."""
        return "{} of {} against {} of {}".format(*self.ours, *self.peers)


class PooledVariance(NamedTuple):
    """A variance over seeds, estimated from several networks, with its degrees of freedom."""

    variance: float
    freedom: int


def pool(groups: Iterable[Sequence[float]]) -> PooledVariance:
    """Return Σ (n_i − 1) s_i² / Σ (n_i − 1) over the networks of an experiment."""
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    total = sum((len(group) - 1) * variance(group) for group in several)
    return PooledVariance(total / freedom if freedom else 0.0, freedom)


def compare_counts(ours: Sequence[bool], peers: Sequence[bool]) -> Counts:
    """Compare numbers of runs with an event by Fisher's exact test."""
    counts = [(sum(map(bool, runs)), len(runs)) for runs in (ours, peers)]
    return Counts(*counts, float(fisher_exact([[events, runs - events] for events, runs in counts]).pvalue))


def compare(ours: Mapping[str, float], peers: Mapping[str, float], pooled: PooledVariance) -> Difference:
    """Compare the values of two networks.

    With three common seeds or more, the difference is the mean over these seeds of the paired differences, with
    Student's interval. Otherwise it is the difference of the means, with the interval of the pooled variance. Values
    without any spread have an interval of width 0.

    Args:
        ours: value by seed.
        peers: value by seed.
        pooled: the variance over seeds in this experiment.
    """
    seeds = [seed for seed in ours if seed in peers]
    if len(seeds) >= MIN_PAIRS:
        return _paired([ours[seed] - peers[seed] for seed in seeds])
    difference = mean(ours.values()) - mean(peers.values())
    if min(len(ours), len(peers)) < 2:
        return Difference(difference)
    error = math.sqrt(pooled.variance * (1 / len(ours) + 1 / len(peers)))
    if error == 0:
        return _exact(difference)
    half = float(t.ppf(0.975, pooled.freedom)) * error
    p = 2 * float(t.sf(abs(difference) / error, pooled.freedom))
    return Difference(difference, (difference - half, difference + half), p)


def _paired(differences: Sequence[float]) -> Difference:
    if not stdev(differences):
        return _exact(differences[0])
    test = ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(mean(differences), (float(low), float(high)), float(test.pvalue))


def _exact(difference: float) -> Difference:
    return Difference(difference, (difference, difference), float(difference == 0))


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"
