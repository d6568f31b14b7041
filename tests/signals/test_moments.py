"""Moments: the same steps whatever the blocks, asked in order and once, at a cost that is bounded."""

import itertools

import numpy as np
import pytest

from attnscope.runs.events import Diverged, Event, Nonfinite
from attnscope.signals import moments as module
from attnscope.signals.alarms import Alarms
from attnscope.signals.conditions import Condition
from attnscope.signals.moments import Live, Moments, moments

NOW = Live(ask=lambda *_: (), stop_on=(Condition(text="loss_rises", rule="loss_rises"),))


def table(steps):
    return {"steps": {"step": np.array(steps)}, "heads": {}}


def asking(asked):
    def ask(run, part, step, before, also):
        asked.append((step, before))
        return [Event(step=step, what=Diverged(why="as it was asked"))]

    return Live(ask=ask, stop_on=NOW.stop_on)


def test_moments_grow_by_half_from_the_tenth_step_on():
    assert [step + 1 for step in itertools.islice(moments(), 9)] == [2, 10, 15, 23, 35, 53, 80, 120, 180]


@pytest.mark.parametrize("cuts", [[], range(1, 60), [11, 12, 40], [5, 30]])
def test_blocks_change_nothing(tmp_path, cuts):
    asked = []
    mine = Moments(asking(asked), tmp_path / "part-0003")
    broken = [Event(step=step, member=0, what=Nonfinite(tensor="loss", direction="forward")) for step in (17, 30)]
    bounds = [0, *cuts, 60]
    for low, high in itertools.pairwise(bounds):
        if low < high:
            events = [event for event in broken if low <= event.step < high]
            list(mine.passed(table(range(low, high)), events, [step for step in (21,) if low <= step < high]))
    assert asked == [(1, None), (9, 1), (14, 9), (19, 14), (21, 14), (22, 14), (32, 22), (34, 22), (52, 34)]


def test_a_part_that_goes_on_is_not_asked_about_what_was_before(tmp_path):
    asked = []
    list(Moments(asking(asked), tmp_path / "part-0000").passed(table(range(20, 40)), [], [7]))
    assert asked == [(22, 14), (34, 22)]


def test_what_alarms_say_again_and_again_asks_no_more(tmp_path):
    asked = []
    broken = [Event(step=step, what=Nonfinite(tensor="gradient", direction="backward")) for step in range(60, 400)]
    list(Moments(asking(asked), tmp_path / "part-0000").passed(table(range(410)), broken, []))
    assert sum(60 < step < 79 for step, _ in asked) == module.MOST_OF_A_KIND


def test_asking_waits_until_it_may_and_ends_with_training(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    asked = []

    def ask(run, part, step, before, also):
        nonlocal now
        asked.append((step, now))
        now += 1.0
        return ()

    mine = Moments(Live(ask=ask), tmp_path / "part-0000")
    for step in range(30):
        now = max(now, 10.0 * step)
        list(mine.passed(table([step]), [], []))
    # The first one is not counted, as it imports; of the second it is not known what it takes; then it is one in a hundred seconds.
    assert asked == [(1, 10.0), (9, 90.0), (14, 200.0)]
    list(mine.end())
    assert [step for step, _ in asked] == [1, 9, 14, 22]


def test_tables_that_are_too_large_are_left_to_diagnose(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 20)
    for cuts in ([0, 40], [0, 7, 21, 40]):
        asked = []
        mine = Moments(asking(asked), tmp_path / "part-0000")
        for low, high in itertools.pairwise(cuts):
            list(mine.passed(table(range(low, high)), [], []))
        assert [step for step, _ in asked] == [1, 9, 14]


def test_a_rule_that_fails_ends_the_asking_and_not_the_training(tmp_path):
    def ask(*_args):
        raise ZeroDivisionError("in a rule")

    mine = Moments(Live(ask=ask, stop_on=NOW.stop_on), tmp_path / "part-0000")
    ((event,),) = mine.passed(table(range(40)), [], [])
    assert event.step == 1 and event.what.reason == "ZeroDivisionError: in a rule"
    assert list(mine.passed(table(range(40, 80)), [], [])) == [] == list(mine.end())


def fed(losses, cuts):
    alarms, events, shown = Alarms(), [], []
    steps = np.arange(len(losses))
    for low, high in itertools.pairwise([0, *cuts, len(losses)]):
        columns = (steps[low:high], np.array(losses)[low:high], np.ones(high - low), np.ones(high - low))
        events += alarms.feed(0, *columns)
        shown += alarms.take_shown()
    return [event.step for event in events], shown


def test_the_step_that_shows_a_divergence_does_not_depend_on_blocks():
    losses = [4.0, 4.1, 3.9] * 5 + [90.0] * 15
    whole = fed(losses, [])
    assert whole[0] == [15] and 15 < whole[1][0] < 29
    assert all(fed(losses, cuts) == whole for cuts in ([3, 16, 17], range(1, 30), [29]))
