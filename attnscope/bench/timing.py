"""Times things against each other: interleaved, so that a machine that drifts drifts for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as long A takes as B: median over rounds, and the middle half of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleave(
    competitors: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int
) -> dict[str, list[float]]:
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


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Median of a over median of b; the spread is that of the ratios round by round."""
    low, _, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return Ratio(median=statistics.median(a) / statistics.median(b), low=low, high=high)
