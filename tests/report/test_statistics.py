"""The statistics of a sweep against cases worked out by hand, and against simulated truth."""

import math

import numpy as np
import pytest

from attnscope.comparison.statistics import FEWEST, capped_loss, lr_sensitivity, mean_interval


def test_lr_sensitivity_by_hand():
    # Mean 3.5, best 2: Wortsman et al. 2023, with the diverged one at its first loss of 6.
    assert lr_sensitivity([3.0, 2.0, 3.0, 6.0]) == pytest.approx(1.5)
    assert lr_sensitivity([2.5, 2.5, 2.5]) == 0
    assert lr_sensitivity([]) is None


def test_lr_sensitivity_over_the_range_of_its_paper():
    """Seven learning rates from 3e-4 to 3e-1: min(final, first) of each, their mean, minus the best (Wortsman et al. 2023)."""
    first = 6.25
    finals = [4.0, 3.5, 3.25, 3.0, 3.75, 9.0, math.nan]
    losses = [capped_loss(first, final) for final in finals]
    assert losses == [4.0, 3.5, 3.25, 3.0, 3.75, 6.25, 6.25]
    assert lr_sensitivity(losses) == pytest.approx(30 / 7 - 3)


def test_lr_sensitivity_does_not_depend_on_the_level_or_the_order():
    losses = [3.0, 2.0, 4.5, 6.0]
    assert lr_sensitivity([loss + 10 for loss in losses]) == pytest.approx(lr_sensitivity(losses))
    assert lr_sensitivity(losses[::-1]) == lr_sensitivity(losses)
    assert lr_sensitivity([5.0]) == 0


@pytest.mark.parametrize(
    ("first", "final", "capped"),
    [
        (6.0, 2.0, 2.0),
        (6.0, 9.0, 6.0),
        (6.0, math.nan, 6.0),
        (6.0, math.inf, 6.0),
        (6.0, None, 6.0),
        (6.0, -math.inf, 6.0),
        (6.0, 6.0, 6.0),
    ],
)
def test_a_loss_is_no_higher_than_the_first(first, final, capped):
    assert capped_loss(first, final) == capped


@pytest.mark.parametrize("first", [None, math.nan, math.inf])
def test_without_a_first_loss_there_is_none(first):
    assert capped_loss(first, 2.0) is None


def simulated(law, n, sweeps, seed):
    """Intervals of that many simulated sweeps, of those whose paired differences say enough for one; and how many did not."""
    generator = np.random.default_rng(seed)
    found, without = [], 0
    while len(found) < sweeps:
        noise = generator.normal(size=n) - 0.3 if law == "normal" else generator.lognormal(sigma=0.75, size=n)
        interval = mean_interval(noise)
        found += [interval] if interval else []
        without += interval is None
    return found, without


@pytest.mark.parametrize("n", [5, 8])
@pytest.mark.parametrize("law", ["normal", "lognormal"])
def test_intervals_hold_the_truth(n, law):
    """At nominal 95 %, in at least 90 % of 1,000 simulated sweeps whose paired differences follow `law`."""
    truth = -0.3 if law == "normal" else math.exp(0.75**2 / 2)
    found, without = simulated(law, n, 1000, seed=n)
    assert sum(low <= truth <= high for low, high in found) >= 900
    assert without <= (0.25 if n == 5 else 0.05) * len(found), "there is one nearly always"


def test_an_interval_can_miss():
    """The test above can fail: an interval of half the length holds the truth too rarely."""
    held = 0
    for low, high in simulated("normal", 5, 300, seed=0)[0]:
        middle, half = (low + high) / 2, (high - low) / 8
        held += middle - half <= -0.3 <= middle + half
    assert held < 0.9 * 300


def test_values_in_two_clusters_have_no_interval_of_many_times_their_range():
    """As pairs have where some diverge and the others train: five of them do not say how often."""
    generator = np.random.default_rng(2)
    for _ in range(200):
        values = -3.0 * (generator.random(5) < 0.5) + 0.05 * generator.normal(size=5)
        found = mean_interval(values)
        assert found is None or found[1] - found[0] < 4 * np.ptp(values)


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
    assert FEWEST == 5, "with fewer it holds the truth too rarely, or is far too long"
    for n in range(FEWEST):
        assert mean_interval([float(i) for i in range(n)]) is None
    assert mean_interval([0.25] * 6) == (0.25, 0.25)
    assert mean_interval([0.1] * 6) == pytest.approx((0.1, 0.1)), "a tenth is not exact"
    for broken in (math.nan, math.inf, -math.inf):
        assert mean_interval([1.0, 2.0, 3.0, 4.0, broken]) is None


@pytest.mark.parametrize("n", [5, 6, 20])
def test_an_interval_moves_and_stretches_with_its_values(n):
    values = np.random.default_rng(n).lognormal(size=n)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert mean_interval(values * 1e-3 - 7) == pytest.approx((low * 1e-3 - 7, high * 1e-3 - 7))
    mirrored = mean_interval(-values)
    assert mirrored == pytest.approx((-high, -low), rel=0.05), "resampling aside"


@pytest.mark.parametrize("n", [5, 8, 12])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_where_members_tie_an_interval_holds_the_truth_or_there_is_none(n, share):
    """A pair with a diverged member counts with its first loss, so differences take few values."""
    generator = np.random.default_rng(n)
    given = held = 0
    for _ in range(300):
        differences = -3.0 * (generator.random(n) < share)
        found = mean_interval(differences)
        if found is None or np.ptp(differences) == 0:
            continue
        given += 1
        held += found[0] <= -3 * share <= found[1]
    assert given - held <= 0.05 * 300
    assert given > 100 or n * share < 6, "or this would show nothing"


@pytest.mark.parametrize("values", [[0.0, 0, 0, 0, -3], [1.0, 1, 1, 2, 2], [0.0] * 11 + [5.0]])
def test_no_interval_ends_where_one_value_tells_the_others_apart(values):
    assert mean_interval(values) is None


def test_more_seeds_give_a_shorter_interval():
    lengths = {n: np.median([high - low for low, high in simulated("normal", n, 40, seed=n)[0]]) for n in (5, 10, 40)}
    assert lengths[5] > lengths[10] > lengths[40]
    assert lengths[40] == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.15), "as normal theory has it"


def test_more_values_give_the_same_interval_each_time():
    values = np.random.default_rng(3).normal(size=12)
    assert mean_interval(values) == mean_interval(values)
