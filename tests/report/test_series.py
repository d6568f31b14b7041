"""Thinning keeps what a reader looks for: peaks, breaks, and the order of steps."""

import numpy as np
import pandas as pd

from attnscope.report.series import CELLS, POINTS, finite_steps, heat, largest_per_step, thinned, where_measured


def test_a_short_curve_stays_as_it_is():
    steps, values = np.arange(5.0), np.array([1.0, np.nan, 3.0, np.inf, 2.0])
    found = thinned(steps, values)
    assert found[0] is steps and found[1] is values


def test_a_long_curve_keeps_its_peak_its_valley_and_where_it_breaks():
    steps = np.arange(100_000.0)
    values = np.random.default_rng(0).normal(size=len(steps))
    values[[777, 54_321]] = 99.0, -99.0
    values[99_000:] = np.nan
    x, y = thinned(steps, values)
    assert len(x) <= 3 * POINTS and (np.diff(x) > 0).all()
    assert y[x == 777] == 99 and y[x == 54_321] == -99
    assert np.isnan(y[-1]) and x[np.isnan(y)][0] == 99_000
    assert (values[x.astype(int)] == y)[~np.isnan(y)].all()


def test_a_curve_of_measured_steps_alone_is_a_line_whose_gaps_are_breaks():
    steps, nan = np.arange(6.0), np.nan
    x, y = where_measured(steps, np.array([1.0, nan, nan, nan, 3.0, nan]), np.array([0, 0, 2, 2, 4, 4]))
    assert x.tolist() == [0, 2, 4] and np.isnan(y).tolist() == [False, True, False]


def test_a_curve_that_was_recorded_at_other_steps_too_keeps_them_and_its_gaps():
    steps, values = np.arange(4.0), np.array([1.0, 2.0, np.nan, np.nan])
    for measured in (np.array([0, 2]), np.empty(0, dtype=int)):
        x, y = where_measured(steps, values, measured)
        assert x is steps and y is values


def test_the_largest_of_each_step_and_not_a_number_wins():
    steps, values = largest_per_step(np.array([0.0, 0.0, 2.0, 2.0]), np.array([1.0, 5.0, np.nan, 3.0]))
    assert steps.tolist() == [0, 2] and values[0] == 5 and np.isnan(values[1])
    assert len(largest_per_step(np.empty(0), np.empty(0))[0]) == 0


def heads(steps, n_layers=2, n_heads=2, value=lambda step, layer, head: step):
    rows = [(s, i, h, value(s, i, h)) for s in steps for i in range(n_layers) for h in range(n_heads)]
    return pd.DataFrame(rows, columns=["step", "layer", "head", "max_prob"])


def test_a_heat_map_has_a_line_per_layer_and_head_and_a_cell_per_step():
    table = heads(range(3), value=lambda step, layer, head: 100 * step + 10 * layer + head)
    found = heat(table, np.arange(len(table)), "max_prob")
    assert found.labels == ("0.0", "0.1", "1.0", "1.1")
    assert found.edges.tolist() == [0, 1, 2, 3]
    assert found.values[3].tolist() == [11, 111, 211]


def test_a_heat_map_of_many_steps_is_their_means():
    table = heads(range(10 * CELLS), n_layers=1, n_heads=1)
    found = heat(table, np.arange(len(table)), "max_prob")
    assert found.values.shape == (1, CELLS)
    np.testing.assert_allclose(found.values[0], 4.5 + 10 * np.arange(CELLS))


def test_steps_that_were_not_recorded_show_the_measurement_before_them():
    table = heads([0, 4, 8], n_layers=1, n_heads=1, value=lambda step, *_: 1 + step)
    found = heat(table, np.arange(len(table)), "max_prob")
    assert found.values[0].tolist() == [1, 1, 1, 1, 5, 5, 5, 5, 9]


def test_cells_without_a_finite_value_are_not_numbers():
    table = heads(range(2), value=lambda step, layer, head: np.inf if step and layer else 0.5)
    found = heat(table, np.arange(len(table)), "max_prob")
    assert np.isnan(found.values[2:, 1]).all() and (found.values[:2] == 0.5).all()
    assert heat(table, np.arange(0), "max_prob") is None


def test_steps_that_broke_half_way_are_left_out():
    steps_N = np.array([0, 0, 1, 1, 2, 2, 3, 3], dtype=np.int32)
    values_N = np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.inf, np.nan, np.nan])
    assert finite_steps(steps_N, values_N).tolist() == [0, 1]
    assert finite_steps(steps_N[4:], values_N[4:]).tolist() == []
