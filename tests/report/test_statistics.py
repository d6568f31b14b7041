"""The statistics of a sweep against cases worked out by hand, and against simulated truth."""

import math

import numpy as np
import pytest

from attnscope.report.statistics import FEWEST, capped_loss, lr_sensitivity, mean_interval


def test_lr_sensitivity_by_hand():
    # Mean 3.5, best 2: Wortsman et al. 2023, with the diverged one at its first loss of 6.
    assert lr_sensitivity([3.0, 2.0, 3.0, 6.0]) == pytest.approx(1.5)
    assert lr_sensitivity([2.5, 2.5, 2.5]) == 0
    assert lr_sensitivity([]) is None


@pytest.mark.parametrize(
    ("first", "final", "capped"),
    [
        (6.0, 2.0, 2.0),
        (6.0, 9.0, 6.0),
        (6.0, math.nan, 6.0),
        (6.0, math.inf, 6.0),
        (6.0, None, 6.0),
    ],
)
def test_a_loss_is_no_higher_than_the_first(first, final, capped):
    assert capped_loss(first, final) == capped


@pytest.mark.parametrize("first", [None, math.nan, math.inf])
def test_without_a_first_loss_there_is_none(first):
    assert capped_loss(first, 2.0) is None


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("law", ["normal", "lognormal"])
def test_intervals_hold_the_truth(n, law):
    """At nominal 95 %, in at least 90 % of 1,000 simulated sweeps whose paired differences follow `law`."""
    generator = np.random.default_rng(n)
    held = 0
    for _ in range(1000):
        noise = (
            generator.normal(size=n) if law == "normal" else generator.lognormal(sigma=0.75, size=n)
        )
        truth = -0.3 if law == "normal" else math.exp(0.75**2 / 2)
        low, high = mean_interval(noise + truth if law == "normal" else noise)
        held += low <= truth <= high
    assert held >= 900


def test_an_interval_can_miss():
    """The test above can fail: an interval of half the length holds the truth too rarely."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = mean_interval(generator.normal(size=5))
        middle, half = (low + high) / 2, (high - low) / 8
        held += middle - half <= 0 <= middle + half
    assert held < 0.9 * 300


def test_an_interval_by_hand():
    """Five values of which every one resample is known: percentiles of t over all 5^5 resamples."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    index = np.array(np.meshgrid(*[range(5)] * 5)).reshape(5, -1).T
    resamples = values[index]
    error = resamples.std(axis=1, ddof=1) / math.sqrt(5)
    spread = error > 0
    t = (resamples.mean(axis=1)[spread] - 3) / error[spread]
    high, low = 3 - np.quantile(t, [0.025, 0.975]) * values.std(ddof=1) / math.sqrt(5)
    assert mean_interval(values) == pytest.approx((low, high))


def test_few_equal_or_broken_values():
    assert mean_interval([1.0] * (FEWEST - 1)) is None
    assert mean_interval([0.25] * 6) == (0.25, 0.25)
    assert mean_interval([1.0, 2.0, 3.0, 4.0, math.nan]) is None


def test_more_values_give_the_same_interval_each_time():
    values = np.random.default_rng(3).normal(size=12)
    assert mean_interval(values) == mean_interval(values)
