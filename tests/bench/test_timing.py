"""The arithmetic of the benchmarks; what they measure is no test."""

import pytest

from attnscope.bench.timing import TOGETHER, interleave, ratio


def test_competitors_take_turns_in_both_directions():
    calls = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert all(time >= 0 for times in seconds.values() for time in times)


def test_what_happens_once_in_a_group_counts_and_a_disturbance_spoils_one_group():
    b = [1.0] * (5 * TOGETHER)
    a = [1.0] * (TOGETHER - 1) + [1.0 + TOGETHER]
    found = ratio(a * 5, b)
    assert (found.low, found.median, found.high) == (2, 2, 2)
    disturbed = a * 4 + [100.0] * TOGETHER
    assert ratio(disturbed, b).median == 2
    assert str(found) == "2.000 (2.000 to 2.000)"


def test_rounds_that_fill_no_group_are_left_out():
    found = ratio([1.0] * (2 * TOGETHER) + [9.0], [2.0] * (2 * TOGETHER) + [1.0])
    assert found.median == pytest.approx(0.5)
