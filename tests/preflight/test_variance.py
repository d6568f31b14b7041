"""The variance law: numbers that theory knows."""

import math

import pytest

from attnscope.preflight.variance import N_KEYS, RATIOS, critical_spread, frozen_share, law_as_table, variance_law
from attnscope.report.figures.variance import draw_variance_law

MANY = 1024


@pytest.fixture(scope="module")
def law():
    return variance_law(d_heads=(8, 64, 512), n_keys=(32, 512, MANY))


def test_the_spread_is_the_root_of_d_head_and_1_with_the_scale(law):
    assert {cell.predicted_std for cell in law.cells if not cell.scaled} == {math.sqrt(8), 8.0, math.sqrt(512)}
    for cell in law.cells:
        few = 1 - 1 / cell.n_keys  # a standard deviation within a row
        assert cell.logit_std == pytest.approx(cell.predicted_std * math.sqrt(few), rel=0.03)
        normal = math.erfc(5 / math.sqrt(2) / cell.predicted_std)
        assert cell.logits_over_5 == pytest.approx(normal, abs=0.03)


def test_without_the_scale_most_of_the_gradient_is_gone_and_with_it_none(law):
    left = {(cell.d_head, cell.scaled): cell.softmax_gain for cell in law.cells if cell.n_keys == 512}
    assert left[512, False] < left[64, False] < 0.45 < 0.8 < left[8, False]
    assert min(left[d_head, True] for d_head in (8, 64, 512)) > 0.99
    most = {(cell.d_head, cell.scaled): cell.max_prob for cell in law.cells if cell.n_keys == 32}
    assert most[64, False] > 0.75 and most[64, True] < 0.2


@pytest.mark.parametrize(("n_keys", "critical"), [(32, 2.63), (64, 2.88), (128, 3.12), (1024, 3.72)])
def test_critical_spreads_are_those_of_the_paper(n_keys, critical):
    assert critical_spread(n_keys) == pytest.approx(critical, abs=0.005)
    assert frozen_share(critical, n_keys) == pytest.approx(0, abs=0.01)
    assert frozen_share(1.0, n_keys) == 0.0


def test_above_it_the_sum_of_squares_comes_to_the_theory_from_above_the_more_keys_the_nearer(law):
    assert frozen_share(8.0, 32) == pytest.approx(0.67, abs=0.005)
    gaps = {}
    for n_keys in (32, MANY):
        points = [point for point in law.freezing if point.n_keys == n_keys]
        assert len(points) == len(RATIOS)
        above = [point for point in points if point.logit_std >= 2 * point.critical]
        gaps[n_keys] = max(abs(point.measured - point.predicted) for point in above)
    assert gaps[MANY] < 0.1 and gaps[MANY] < gaps[32] < 0.2
    below = [point for point in law.freezing if point.n_keys == MANY and point.logit_std <= point.critical / 2]
    assert max(point.measured for point in below) < 0.05


def test_the_same_numbers_every_time_and_a_figure_of_them(law):
    assert variance_law(d_heads=(8, 64, 512), n_keys=(32, 512, MANY)) == law
    table = law_as_table(law)
    one, two = (draw_variance_law(table["cells"], table["freezing"]) for _ in range(2))
    assert one.png == two.png and one.png.startswith(b"\x89PNG")
    assert min(N_KEYS) == 32 and max(N_KEYS) == 4096
