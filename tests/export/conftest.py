"""Runs to export."""

import numpy as np
import pytest

from attnscope.config.schema import Arm, Config
from attnscope.runs.layout import COLUMNS, MemberEntry
from attnscope.runs.writer import RunWriter
from tests.runs import made_up

STEPS = 4
NAN_AT, INF_AT = 2, 3  # steps at which unscaled has such a loss


@pytest.fixture
def run_path(tmp_path):
    """unscaled and scaled, four steps; the loss of unscaled ends with NaN and Inf, val_loss is there at step 0."""
    writer = made_up.new_run(tmp_path / "r")
    part = writer.part(0)
    for table in COLUMNS:
        columns = made_up.columns(table, range(STEPS), members=(0, 1))
        if table == "steps":
            step, member = columns["step"], columns["member"]
            columns["loss"][(step == NAN_AT) & (member == 0)] = np.nan
            columns["loss"][(step == INF_AT) & (member == 0)] = np.inf
            columns["loss_scale"][:] = 1.0
            columns["grad_norm"][(step == NAN_AT) & (member == 0)] = np.nan
            columns["grad_norm"][(step == INF_AT) & (member == 0)] = -np.inf
            columns["val_loss"][step > 0] = np.nan
        part.append(table, columns)
    part.event(made_up.event("nonfinite", step=NAN_AT, member=0, tensor="loss", worst=float("inf")))
    part.event(made_up.event("resumed", step=3))
    part.finish("finished")
    return writer.path


@pytest.fixture
def two_parts(tmp_path):
    """Two members that cannot share a part."""
    arms = (Arm(name="one", changes={}), Arm(name="two", changes={"model.n_layers": 2}))
    writer = made_up.new_run(tmp_path / "parts", config=Config(arms=arms))
    for number in (0, 1):
        part = writer.part(number)
        made_up.fill(part, range(3), members=(0,), seed=number)
        part.event(made_up.event("evaluation", step=3, member=0, val_loss=1.5 + number))
        part.finish("finished")
    return writer.path


@pytest.fixture
def watched(tmp_path):
    """A run of a script that told neither grad_norm nor log_z, and whose loss was never a number."""
    writer = RunWriter.create(
        tmp_path / "watched",
        command=["attnscope", "watch", "train.py"],
        config=None,
        members=[MemberEntry(name="watched", part=0, index=0, settings={})],
        environment={},
        data={},
    )
    part = writer.part(0)
    columns = made_up.columns("steps", range(3))
    for name in ("loss", "grad_norm", "val_loss", "log_z"):
        columns[name] = np.full(3, np.nan)
    part.append("steps", columns)
    part.finish("finished")
    return writer.path


@pytest.fixture
def empty(tmp_path):
    """A run that was killed before its first record."""
    return made_up.new_run(tmp_path / "empty").path


@pytest.fixture
def events_only(tmp_path):
    """A run that failed at its first step."""
    writer = made_up.new_run(tmp_path / "events")
    part = writer.part(0)
    part.event(made_up.event("nonfinite", step=0, member=1, tensor="loss"))
    part.finish("failed")
    return writer.path
