"""Times things against each other: interleaved, so that a machine that drifts drifts for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TOGETHER = 20  # rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as long A takes as B: over groups of rounds, the median and the middle half."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleave(competitors: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Call the competitors in turn, in both directions alternately; seconds of each call after the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(warmup + rounds):
        names = list(competitors)
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            competitors[name]()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float], *, together: int = TOGETHER) -> Ratio:
    """Sum of a over sum of b in each group of `together` rounds.

    Sums, so that what happens now and then, such as writing a block to disk, counts; groups, so that a disturbance
    spoils only one of them.
    """
    starts = range(0, len(a) - together + 1, together)
    ratios = [sum(a[i : i + together]) / sum(b[i : i + together]) for i in starts]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median=median, low=low, high=high)
