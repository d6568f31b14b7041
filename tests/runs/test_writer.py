"""The run directory appears whole, fills up batch by batch, and says how it ended."""

import json
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest

from attnscope.config import Config, parse_table, parse_toml, with_control
from attnscope.errors import RunError, RunWriteError
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from tests.runs import made_up


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_run_has_its_config_in_both_files_and_nothing_else(tmp_path):
    writer = made_up.new_run(tmp_path / "deep" / "down" / "a")
    assert everything_below(writer.path) == ["config.toml", "run.json"]
    config = with_control(Config())
    assert parse_toml((writer.path / "config.toml").read_text()) == config
    raw = made_up.unsealed(writer.path / "run.json")
    assert parse_table(raw["config"]) == config
    assert raw["schema_version"] == 1
    assert raw["members"][0] == {
        "name": "unscaled", "part": 0, "index": 0, "settings": {"attention.scale": "none"},
    }  # fmt: skip
    assert tomllib.loads((writer.path / "config.toml").read_text())["arm"][1]["name"] == "scaled"


def test_an_existing_run_is_refused(tmp_path):
    run = made_up.new_run(tmp_path / "a").path
    before = (run / "run.json").read_bytes()
    with pytest.raises(RunError) as error:
        made_up.new_run(run)
    assert str(error.value) == (
        f"{run} already exists. Choose another --name, or go on with it: attnscope train --resume {run}"
    )
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["file", "empty folder", "dangling link"])
def test_whatever_else_is_there_is_refused_and_left_alone(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "file":
        path.write_text("mine")
    elif kind == "empty folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError) as error:
        made_up.new_run(path)
    assert str(error.value) == f"{path} already exists. Choose another --name."
    assert everything_below(tmp_path) == ["a"]


@pytest.mark.parametrize("below", ["a", "deep/a"])
def test_a_file_as_parent_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / below
    with pytest.raises(RunWriteError) as error:
        made_up.new_run(path)
    assert str(error.value) == (
        f"{path}: the run directory cannot be made: {tmp_path}/file is a file. "
        "Put that right, or choose another place with --out."
    )


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place that nobody can write")
def test_an_unwritable_place_is_one_line():
    with pytest.raises(RunWriteError) as error:
        made_up.new_run(Path("/proc/attnscope/a"))
    message = str(error.value)
    assert message.startswith("/proc/attnscope/a: the run directory cannot be made: ")
    assert message.endswith(", or choose another place with --out.") and "\n" not in message


@pytest.mark.parametrize("broken", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch, broken, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(RunWriteError if isinstance(error, OSError) else KeyboardInterrupt):
        made_up.new_run(tmp_path / "deep" / "a")
    assert everything_below(tmp_path) == []


def test_the_loser_of_a_race_for_a_name_is_told_so(tmp_path, monkeypatch):
    rename = os.rename

    def slow(source, target):
        monkeypatch.setattr(os, "rename", rename)
        made_up.new_run(tmp_path / "a")
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    with pytest.raises(RunError, match="already exists"):
        made_up.new_run(tmp_path / "a")
    assert everything_below(tmp_path) == ["a", "a/config.toml", "a/run.json"]


def test_files_of_a_part_are_made_when_they_are_needed(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    assert everything_below(part.path) == ["events-0000.jsonl", "writer-0000.json"]
    part.append("heads", made_up.columns("heads", []))
    assert everything_below(part.path) == ["events-0000.jsonl", "writer-0000.json"]
    part.append("heads", made_up.columns("heads", [0]))
    part.close()
    assert everything_below(part.path) == ["events-0000.jsonl", "heads-0000.arrow"]


def test_what_was_appended_can_be_read_while_the_file_is_open(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    for step in range(3):
        made_up.fill(part, [step])
        run = open_run(tmp_path / "a")
        assert len(run.steps) == 2 * (step + 1) and run.lost == ()
    part.close()


def test_finish_says_how_it_ended(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, range(5))
    part.finish("finished", peak_bytes=7, best=np.float32("nan"))
    end = made_up.unsealed(part.path / "end.json")
    assert end["status"] == "finished" and end["last_step"] == 4 and end["segment"] == 0
    assert end["peak_bytes"] == 7 and end["best"] == "NaN" and end["wall_s"] >= 0
    run = open_run(tmp_path / "a")
    assert run.status == "finished" and np.isnan(run.ends[0]["best"])


def test_ctrl_c_while_finishing_may_finish_again(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, range(5))
    part.finish("finished")
    part.finish("interrupted")
    run = open_run(tmp_path / "a")
    assert run.status == "interrupted" and run.lost == () and len(run.steps) == 10
    with pytest.raises(AssertionError, match="after finish"):
        part.append("steps", made_up.columns("steps", [5]))


def test_a_resumed_part_opens_new_files_and_is_no_longer_ended(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    first = writer.part(0)
    made_up.fill(first, range(4))
    first.finish("interrupted")
    old = {path: path.read_bytes() for path in first.path.iterdir() if path.name != "end.json"}
    second = RunWriter.resume(writer.path).part(0, first_step=2)
    assert second.segment == 1
    assert not (second.path / "end.json").exists()
    made_up.fill(second, range(2, 4))
    second.close()
    assert {path: path.read_bytes() for path in old} == old
    assert (second.path / "steps-0001.arrow").exists()
    third = RunWriter.resume(writer.path).part(0)
    assert third.segment == 2
    third.close()


def test_a_run_of_a_newer_format_is_not_resumed(tmp_path):
    run = made_up.new_run(tmp_path / "a").path
    raw = made_up.unsealed(run / "run.json")
    (run / "run.json").write_text(json.dumps(raw | {"schema_version": 2}))
    with pytest.raises(RunError) as error:
        RunWriter.resume(run)
    assert str(error.value) == (
        f"{run}/run.json was made by a newer attnscope: its format is 2, this one reads 1. "
        "Upgrade: pip install --upgrade attnscope."
    )


def test_a_run_of_an_older_format_is_not_resumed(tmp_path, monkeypatch):
    run = made_up.new_run(tmp_path / "a").path
    monkeypatch.setattr("attnscope.runs.writer.SCHEMA_VERSION", 2)
    with pytest.raises(RunError) as error:
        RunWriter.resume(run)
    assert str(error.value) == (
        f"{run} has format 1, but format 2 would be added to it. "
        "Go on with the attnscope that made it, or start a new run."
    )


def test_resuming_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"run\.json: cannot be read: no such file or directory"):
        RunWriter.resume(tmp_path)


def test_an_interrupt_between_two_halves_of_a_batch_does_no_harm(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, [0])
    file = part._files["steps-0000.arrow"]

    class Interrupted:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            file.write(data[:10])
            raise KeyboardInterrupt

    part._files["steps-0000.arrow"] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        part.append("steps", made_up.columns("steps", [1]))
    assert open_run(tmp_path / "a").lost  # the torn half is there
    part._files["steps-0000.arrow"] = file
    part.append("steps", made_up.columns("steps", [2]))
    part.finish("interrupted")
    run = open_run(tmp_path / "a")
    assert list(run.steps["step"]) == [0, 0, 2] and run.lost == ()
