"""Members into parts: all of them, once, as large as is fast and fits."""

from collections import Counter

import pytest

from attnscope.errors import AttnscopeError, ConfigError
from attnscope.sweep.plan import (
    PartPlan,
    Plan,
    Trial,
    free_memory,
    gib,
    members_at_once,
    peak_bytes,
    plan_sweep,
    step_seconds,
)
from tests.sweep.small import members

MB = 2**20


def trials(*pairs):
    """(members at once, seconds per step) with 100 MB and 10 MB per member."""
    return [Trial(n_members=n, step_s=s, peak_bytes=(100 + 10 * n) * MB, free_bytes=10_000 * MB) for n, s in pairs]


def test_as_many_as_is_fastest_per_member():
    falling = trials((1, 0.010), (4, 0.012), (16, 0.016), (64, 0.040))
    assert members_at_once(falling, 1000, 10_000 * MB) == 64
    assert members_at_once(falling, 10, 10_000 * MB) == 10
    rising = trials((1, 0.010), (4, 0.038), (16, 0.150), (64, 0.900))
    assert members_at_once(rising, 1000, 10_000 * MB) == 16, "64 are slower for each"


def test_no_more_than_fit():
    falling = trials((1, 0.010), (4, 0.012), (16, 0.016))
    assert members_at_once(falling, 1000, 200 * MB) == 10
    assert members_at_once(falling, 1000, 105 * MB) == 0


def test_memory_and_time_between_and_beyond_what_was_tried():
    found = trials((1, 0.010), (4, 0.040), (16, 0.100))
    assert peak_bytes(found, 64) == (100 + 640) * MB
    assert step_seconds(found, 10) == pytest.approx(0.070)
    assert step_seconds(found, 32) == pytest.approx(0.200)
    (one,) = trials((1, 0.01))
    assert peak_bytes([one], 4) == 4 * one.peak_bytes, "unknown: as if all of it were the member's"


def test_jobs_share_the_parts():
    parts = tuple(PartPlan(part=i, n_members=1, seconds=s, peak_bytes=1) for i, s in enumerate([5, 3, 3]))
    assert Plan(members=(), parts=parts, memory_bytes=1, jobs=1).seconds == 11
    assert Plan(members=(), parts=parts, memory_bytes=1, jobs=2).seconds == 6


def test_everyone_is_placed_once():
    found = members()
    plan = plan_sweep(found, jobs=1)
    assert [member.name for member in plan.members] == [member.name for member in found]
    places = Counter((member.part, member.index) for member in plan.members)
    assert set(places.values()) == {1}
    for part in plan.parts:
        inside = [member for member in plan.members if member.part == part.part]
        assert sorted(member.index for member in inside) == list(range(part.n_members))
        assert len({member.config.model.norm for member in inside}) == 1
        assert part.seconds > 0 and 50 * MB < part.peak_bytes < 2000 * MB


def test_two_jobs_and_three_machines_share_a_group(monkeypatch):
    # As measured on a machine that does nothing else; on a busy one larger parts may not be faster.
    trials = [
        Trial(n_members=n, step_s=0.003 * n**0.2, peak_bytes=(240 + n) * MB, free_bytes=4000 * MB) for n in (1, 4, 12)
    ]
    monkeypatch.setattr("attnscope.sweep.plan.measure", lambda configs, *, threads: trials)
    found = members(sweep={"vary": {"init": {"gain": "lin:1:2:12"}}})
    assert len(plan_sweep(found, jobs=1).parts) == 1
    assert len(plan_sweep(found, jobs=1, memory_bytes=246 * MB).parts) == 2
    assert len(plan_sweep(found, jobs=2).parts) == 2
    assert len(plan_sweep(found, jobs=1, machines=3).parts) == 3


def test_a_member_that_does_not_fit_is_refused_in_words():
    with pytest.raises(
        ConfigError,
        match=r"one member needs 0\.\d+ GiB of memory, but a part may take 0\.\d+ GiB\. Use fewer",
    ):
        plan_sweep(members(), jobs=1, memory_bytes=50 * MB)


def test_a_config_that_cannot_be_trained_is_refused_by_the_first_trial(tmp_path):
    with pytest.raises(AttnscopeError, match="no such file"):
        plan_sweep(members(data={"source": str(tmp_path / "no.txt")}), jobs=1)


def test_sizes_for_people():
    assert gib(1.5 * 2**30) == "1.5 GiB" and gib(64 * 2**30) == "64 GiB"
    assert 100 * MB < free_memory() < 2**45
