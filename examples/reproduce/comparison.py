"""When a difference may be claimed: only where it exceeds the spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import ttest_ind

__all__ = ["NOISE", "ONE_SEED", "Verdict", "compare", "mean_and_spread"]

NOISE, ONE_SEED = "too noisy to say", "one seed: no spread"


class Verdict(NamedTuple):
    """A difference of means, the half-width of its 95 % interval (``None`` where there is none), and what it says.

    ``word`` is ``"lower"``, ``"higher"``, :data:`NOISE` or :data:`ONE_SEED`.
    """

    difference: float
    half_width: float | None
    word: str

    def against(self, printed: float | None) -> str:
        """Return whether a printed difference agrees: "" without one or without a claim of ours."""
        if printed is None or self.word == ONE_SEED:
            return ""
        if self.word == NOISE:
            return NOISE
        return "agrees" if (self.difference < 0) == (printed < 0) else "does not agree"

    def to_text(self, digits: int) -> str:
        """Return difference ± half-width."""
        around = "" if self.half_width is None else f" ± {self.half_width:.{digits}f}"
        return f"{self.difference:+.{digits}f}{around}"


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
