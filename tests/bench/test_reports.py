"""The synthetic runs that reports are timed on are runs like others."""

import pytest

from attnscope.bench.reports import RunSize, measure_reports, write_synthetic
from attnscope.runs.reader import open_run


def test_a_synthetic_run_opens_whole(tmp_path):
    write_synthetic(tmp_path / "r", RunSize(n_members=4, n_steps=10, n_layers=3, n_heads=2))
    run = open_run(tmp_path / "r")
    assert run.lost == () and run.status == "finished"
    assert len(run.steps) == 40 and len(run.layers) == 120 and len(run.heads) == 240
    assert not run.heads.duplicated(["step", "member", "layer", "head"]).any()
    assert not run.params.duplicated(["step", "member", "layer", "group"]).any()
    assert {member.last_step for member in run.members} == {9}


@pytest.mark.slow
def test_costs_are_measured_in_processes_of_their_own():
    (cost,) = measure_reports((RunSize(n_members=2, n_steps=20, n_layers=2, n_heads=2),))
    assert 0 < cost.opened.seconds < cost.reported.seconds
    assert cost.opened.peak_bytes < cost.reported.peak_bytes < 2**30
