"""A run directory read back: tables, members, events, status; resumed, killed, damaged, missing."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from attnscope.config import Config, with_control
from attnscope.errors import RunError
from attnscope.runs.layout import COLUMNS
from attnscope.runs.listing import list_runs
from attnscope.runs.reader import open_run
from attnscope.runs.report_folder import report_dir
from tests.runs import made_up


def finished(path, *, steps=30, **how):
    writer = made_up.new_run(path, **how)
    part = writer.part(0)
    made_up.fill(part, range(steps))
    part.finish("finished")
    return writer


def age(run):
    """Let the run look as if it was last written to an hour ago."""
    for path in run.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def test_tables_have_the_columns_of_the_layout_and_members_by_name(tmp_path):
    run = open_run(finished(tmp_path / "a").path)
    for table, columns in COLUMNS.items():
        frame = getattr(run, table)
        assert list(frame.columns) == list(columns)
        assert isinstance(frame["member"].dtype, pd.CategoricalDtype)
        assert list(frame["member"].cat.categories) == ["unscaled", "scaled"]
        for name, column in columns.items():
            if name not in ("member", "group"):
                assert frame[name].dtype == column.kind
    assert len(run.steps) == 60 and len(run.heads) == 240 and len(run.params) == 180
    assert len(run.layers) == 120
    assert list(run.params["group"].cat.categories) == list(made_up.GROUPS)
    assert (run.params.loc[run.params["group"] == "embedding", "layer"] == -1).all()
    assert run.lost == ()


def test_what_was_said_at_the_start_is_there(tmp_path):
    run = open_run(str(finished(tmp_path / "a").path))
    assert run.name == "a" and run.status == "finished" and run.schema_version == 1
    assert run.command == ("attnscope", "train", "--no-scale")
    assert run.config == with_control(Config())
    assert run.environment == {"python": "3.11"}
    assert run.data["reference"] == {"unigram": 3.0}
    assert run.created.endswith("+00:00")
    assert repr(run) == f"Run('{tmp_path}/a', finished, members: unscaled, scaled)"


def test_members_say_how_they_ended(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    part = writer.part(0)
    columns = made_up.columns("steps", range(300), members=(0, 1))
    columns["loss"][0::2] = [20.0] * 10 + [math.nan] * 290
    columns["loss"][1::2] = [19.0] * 280 + [2.5] * 20
    part.append("steps", columns)
    part.finish("finished")
    unscaled, scaled = open_run(writer.path).members
    assert (unscaled.name, unscaled.part, unscaled.index) == ("unscaled", 0, 0)
    assert unscaled.settings == {"attention.scale": "none"}
    assert (unscaled.status, unscaled.diverged_at, unscaled.nonfinite_at) == ("diverged", 10, 10)
    assert (scaled.status, scaled.final_loss, scaled.last_step) == ("trained", 2.5, 299)


@pytest.mark.parametrize(("unigram", "status"), [(3.0, "trained"), (0.5, "stalled"), ("x", "trained")])
def test_the_unigram_loss_of_the_data_tells_trained_from_stalled(tmp_path, unigram, status):
    run = open_run(finished(tmp_path / "a", unigram=unigram).path)
    assert run.members[0].status == status


def test_a_unigram_loss_that_is_not_finite_comes_back_as_a_number(tmp_path):
    run = open_run(finished(tmp_path / "a", unigram=math.inf).path)
    assert run.data["reference"]["unigram"] == math.inf


def test_a_part_with_data_of_its_own_has_its_own_unigram_loss(tmp_path):
    writer = finished(tmp_path / "a", unigram=0.5)
    raw = made_up.unsealed(writer.path / "run.json")
    raw["data"]["parts"] = {"0": {"reference": {"unigram": 3.0}}, "1": {}}
    (writer.path / "run.json").write_text(json.dumps(raw))
    assert open_run(writer.path).members[0].status == "trained"


def test_parts_are_joined(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    raw = made_up.unsealed(writer.path / "run.json")
    raw["members"][1] |= {"part": 1, "index": 0}
    (writer.path / "run.json").write_text(json.dumps(raw))
    for index in (0, 1):
        part = writer.part(index)
        made_up.fill(part, range(3), members=(0,), value=10.0 * index)
        part.event(made_up.event("diverged", step=1, member=0))
        part.finish("finished")
    run = open_run(writer.path)
    assert run.lost == () and set(run.ends) == {0, 1}
    assert list(run.steps["member"]) == ["unscaled"] * 3 + ["scaled"] * 3
    assert (run.heads.groupby("member", observed=True)["entropy"].mean().round() == [0, 10]).all()
    diverged = run.events[run.events["kind"] == "diverged"]
    assert list(diverged["member"]) == ["unscaled", "scaled"] and list(diverged["part"]) == [0, 1]


def test_a_resumed_run_replaces_what_it_recorded_anew(tmp_path):
    writer = made_up.new_run(tmp_path / "a", twins=False)
    for first, last, value in [(0, 10, 0.0), (6, 12, 100.0), (8, 9, 200.0)]:
        part = writer.part(0, first_step=first)
        made_up.fill(part, range(first, last), members=(0,), value=value)
        for step in range(first, last):
            part.event(made_up.event("tick", step=step, value=value))
        part.close()
    run = open_run(writer.path)
    expected = [0] * 6 + [100] * 2 + [200]
    assert list(run.steps["step"]) == list(range(9))
    assert list(run.steps["loss"].round(-2)) == expected
    for frame in (run.heads, run.layers, run.params):
        assert list(frame.groupby("step").size()) == [len(frame) // 9] * 9
    assert list(run.heads.groupby("step")["entropy"].mean().round(-2)) == expected
    ticks = run.events[run.events["kind"] == "tick"]
    assert list(ticks["step"]) == list(range(9))
    assert [fields["value"] for fields in ticks["fields"]] == expected
    assert run.lost == ()


def test_a_resumed_run_that_was_killed_at_once_takes_nothing_away(tmp_path):
    writer = made_up.new_run(tmp_path / "a", twins=False)
    part = writer.part(0)
    made_up.fill(part, range(10), members=(0,))
    part.close()
    writer.part(0, first_step=5).close()
    (tmp_path / "a" / "part-0000" / "steps-0001.arrow").write_bytes(b"\xff\xff\xff\xff torn")
    run = open_run(writer.path)
    assert list(run.steps["step"]) == list(range(10))
    assert run.lost == ("part-0000/steps-0001.arrow: the last 9 bytes are not a complete batch",)


def test_a_resumed_run_whose_first_records_are_damaged_still_replaces_from_where_it_began(tmp_path):
    writer = made_up.new_run(tmp_path / "a", twins=False)
    part = writer.part(0)
    made_up.fill(part, range(10), members=(0,))
    part.close()
    part = writer.part(0, first_step=6)
    path = part.path / "steps-0001.arrow"
    made_up.fill(part, [6], members=(0,))
    end = path.stat().st_size
    made_up.fill(part, [7], members=(0,))
    part.close()
    damaged = bytearray(path.read_bytes())
    damaged[end - 200 : end] = b"\xaa" * 200
    path.write_bytes(damaged)
    run = open_run(writer.path)
    assert list(run.steps["step"]) == [0, 1, 2, 3, 4, 5, 7]
    assert run.lost == ("part-0000/steps-0001.arrow: 1 of 2 batches are damaged",)


def test_rows_are_there_once_even_if_the_steps_of_the_later_segment_are_gone(tmp_path):
    writer = made_up.new_run(tmp_path / "a", twins=False)
    for first in (0, 6):
        part = writer.part(0, first_step=first)
        made_up.fill(part, range(first, 10), members=(0,))
        part.close()
    (tmp_path / "a" / "part-0000" / "steps-0001.arrow").unlink()
    run = open_run(writer.path)
    assert (run.heads.groupby("step").size() == 4).all()
    assert list(run.steps["step"]) == list(range(10))


def test_events_come_back_with_numbers_that_are_not_finite(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    part.event(made_up.event("diverged", step=3, member=1, why="not finite", values=[np.float32("nan"), -math.inf, 2]))
    part.event(made_up.event("note", step=np.int64(4), nested={"best": math.inf}, text="NaN\n\u2028é"))
    part.close()
    lines = (part.path / "events-0000.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["fields"]["values"][1] == "-Infinity"
    events = open_run(tmp_path / "a").events
    assert list(events["kind"]) == ["start", "diverged", "note"]
    assert list(events["step"]) == [0, 3, 4]
    assert list(events["member"].astype(object).fillna("")) == ["", "scaled", ""]
    why, values = events["fields"][1].values()
    assert why == "not finite" and math.isnan(values[0]) and values[1:] == [-math.inf, 2]
    assert events["fields"][2] == {"nested": {"best": math.inf}, "text": "NaN\n\u2028é"}


def test_events_cut_at_every_byte_are_the_prefix_of_their_lines(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    for step in range(3):
        part.event(made_up.event("tick", step=step))
    part.close()
    path = part.path / "events-0000.jsonl"
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        run = open_run(tmp_path / "a")
        assert len(run.events) == data[:cut].count(b"\n")
        torn = cut - (data[:cut].rfind(b"\n") + 1)
        line = f"part-0000/events-0000.jsonl: the last {torn} bytes are not a complete line"
        assert run.lost == ((line,) if torn else ())


def test_lines_that_are_no_events_are_said(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    part.close()
    path = part.path / "events-0000.jsonl"
    good = path.read_bytes()
    bad = [
        b"{",
        b"[]",
        b'{"kind": 1, "step": 0, "fields": {}}',
        b"\xff",
        b"[" * 100_000,
        b"9" * 9999,
    ]
    path.write_bytes(good + b"\n".join(bad) + b"\n" + good)
    run = open_run(tmp_path / "a")
    assert len(run.events) == 2
    assert run.lost == ("part-0000/events-0000.jsonl: 6 of 8 lines are no events, the first is line 2",)


def test_a_new_run_has_empty_tables_of_the_right_types(tmp_path):
    run = open_run(made_up.new_run(tmp_path / "a").path)
    assert len(run.steps) == len(run.heads) == len(run.layers) == len(run.params) == len(run.events) == 0
    assert run.steps["loss"].dtype == np.float32 and run.steps["tokens"].dtype == np.int64
    assert [member.first_loss for member in run.members] == [None, None]
    assert run.status == "killed" and run.members[0].status == "killed"


@pytest.mark.parametrize(
    ("ending", "run_status", "member_status"),
    [
        ("finished", "finished", "trained"),
        ("interrupted", "interrupted", "interrupted"),
        ("failed", "failed", "failed"),
        ("not yet", "running", "running"),
        ("never", "killed", "killed"),
    ],
)
def test_status(tmp_path, ending, run_status, member_status):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, range(3))
    if ending == "never":
        part.close()
    elif ending == "not yet":
        age(tmp_path / "a")  # its steps take an hour
    else:
        part.finish(ending)
    run = open_run(tmp_path / "a")
    assert (run.status, run.members[0].status) == (run_status, member_status)
    assert [summary.status for summary in list_runs(tmp_path)] == [run_status]
    part.close()


def test_an_end_that_a_later_segment_overtook_does_not_count(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    part = writer.part(0)
    part.finish("interrupted")
    end = (part.path / "end.json").read_bytes()
    writer.part(0).close()
    (part.path / "end.json").write_bytes(end)  # as if the machine had failed just before it went
    assert open_run(tmp_path / "a").status == "killed"


def test_an_attempt_to_resume_that_failed_at_once_changes_nothing(tmp_path):
    writer = finished(tmp_path / "a")
    (writer.path / "part-0000" / "events-0001.jsonl").write_bytes(b"")  # the disk was full
    run = open_run(writer.path)
    assert run.status == "finished" and run.lost == ()


def test_a_part_that_never_began_ended_like_the_run(tmp_path):
    writer = finished(tmp_path / "a", steps=300)
    raw = made_up.unsealed(writer.path / "run.json")
    raw["members"][1] |= {"part": 1, "index": 0}
    (writer.path / "run.json").write_text(json.dumps(raw))
    end = made_up.unsealed(writer.path / "part-0000" / "end.json")
    (writer.path / "part-0000" / "end.json").write_text(json.dumps(end | {"status": "interrupted"}))
    run = open_run(writer.path)
    assert run.status == "interrupted"
    assert [member.status for member in run.members] == ["trained", "interrupted"]


def test_no_such_run_names_the_nearest(tmp_path):
    finished(tmp_path / "scaled-1")
    with pytest.raises(RunError) as error:
        open_run(tmp_path / "scaled-2")
    assert str(error.value) == (f"{tmp_path}/scaled-2: no such run. Did you mean scaled-1? List them: attnscope runs")


def test_a_folder_of_runs_is_not_a_run(tmp_path):
    finished(tmp_path / "a")
    with pytest.raises(RunError) as error:
        open_run(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is not a run directory: it has no run.json. It holds runs, for example {tmp_path}/a."
    )


def test_a_file_is_not_a_run(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError) as error:
        open_run(tmp_path / "file")
    assert str(error.value) == (f"{tmp_path}/file is a file, not a run directory. Give the folder with run.json.")


def test_runs_are_listed_and_a_broken_one_says_why(tmp_path):
    finished(tmp_path / "b")
    finished(tmp_path / "a", twins=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")
    (tmp_path / "no run").mkdir()
    a, b, c = list_runs(tmp_path)
    assert (a.name, a.status, a.members, a.last_step) == ("a", "finished", ("scaled",), 29)
    assert b.members == ("unscaled", "scaled")
    assert c.status == "unreadable" and c.problem.startswith(f"{tmp_path}/c/run.json is damaged: ")
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_from_before_there_were_layers_opens(tmp_path):
    finished(tmp_path / "r")
    part = tmp_path / "r" / "part-0000"
    (part / "layers-0000.arrow").unlink()
    end = made_up.unsealed(part / "end.json")
    del end["files"]["layers-0000.arrow"]
    (part / "end.json").write_text(json.dumps(end))
    run = open_run(tmp_path / "r")
    assert len(run.layers) == 0 and list(run.layers.columns) == list(COLUMNS["layers"])
    assert len(run.heads) and run.lost == ()


def test_the_report_folder_is_made_once(tmp_path):
    run = open_run(finished(tmp_path / "a").path)
    assert report_dir(run) == tmp_path / "a" / "report"
    (report_dir(run) / "figures").mkdir()
    (report_dir(run) / "figures" / "loss.png").write_bytes(b"x")
    assert report_dir(run).is_dir()


def test_opening_a_run_imports_no_torch(tmp_path):
    run = finished(tmp_path / "a").path
    script = (
        "import sys; from attnscope.runs.reader import open_run; "
        f"run = open_run({str(run)!r}); light = 'pandas' not in sys.modules; "
        "run.members, run.heads, run.layers, run.params, run.events, run.lost, run.config; "
        "sys.exit(2 * ('torch' in sys.modules) + 4 * (not light) + (len(run.steps) != 60))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_package_itself_imports_nothing_heavy():
    script = (
        "import sys, attnscope.runs, attnscope.runs.layout, attnscope.runs.writer; "
        "sys.exit(any(heavy in sys.modules for heavy in ('torch', 'pandas', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
