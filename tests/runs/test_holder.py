"""One process writes a run, and everybody can see which: real processes, alive, dead, and of other machines."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from attnscope.errors import RunError
from attnscope.runs import holder
from attnscope.runs.holder import hold, holder_of, holding, release, writer_of
from attnscope.runs.listing import list_runs
from attnscope.runs.reader import open_run
from tests.runs import made_up

WRITE = """
import sys
from pathlib import Path
from attnscope.runs.writer import RunWriter
from attnscope.runs.holder import holding
from tests.runs import made_up

path, what = Path(sys.argv[1]), sys.argv[2]
if what == "run":
    with holding(path):
        print("ready", flush=True)
        sys.stdin.readline()
else:
    part = RunWriter.resume(path).part(0)
    made_up.fill(part, range(3))
    print("ready", flush=True)
    sys.stdin.readline()
    made_up.fill(part, range(3, 6))
    part.finish("finished")
"""


@pytest.fixture
def writing(tmp_path):
    """Begin to write a run in another process; it goes on when it is told to."""
    path = made_up.new_run(tmp_path / "a").path
    begun = []

    def begin(what):
        command = [sys.executable, "-c", WRITE, str(path), what]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout.readline() == "ready\n"
        return path, process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def refused(path, pid):
    return (
        rf"{re.escape(str(path))}: process {pid} of this machine is still writing it, since [\dT:+-]+\. "
        rf"Wait until it ends, or stop it \(kill {pid}\), and try again\."
    )


@pytest.mark.parametrize("what", ["run", "part"])
def test_what_another_process_writes_is_refused_until_it_ends(writing, what):
    path, process = writing(what)
    before = sorted(path.rglob("*"))
    attempts = [lambda: holding(path).__enter__()]
    if what == "part":
        attempts.append(lambda: made_up.RunWriter.resume(path).part(0))
    for attempt in attempts:
        with pytest.raises(RunError) as error:
            attempt()
        assert re.fullmatch(refused(path, process.pid), str(error.value))
    assert sorted(path.rglob("*")) == before
    assert open_run(path).status == "running" and open_run(path).writer == ""
    process.communicate("\n")
    assert process.returncode == 0
    with holding(path):
        assert open_run(path).status == ("running" if what == "run" else "finished")
    if what == "part":
        run = open_run(path)
        assert list(run.steps["step"]) == sorted([*range(6)] * 2) and run.lost == ()
    assert not list(path.rglob("writer-*"))


@pytest.mark.parametrize("what", ["run", "part"])
def test_a_dead_process_is_followed_without_a_word(writing, what):
    path, process = writing(what)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet buried
    assert list(path.rglob("writer-*")) and writer_of(path) is None
    assert open_run(path).status == "killed"
    assert [member.status for member in open_run(path).members] == ["killed"] * 2
    with holding(path):
        part = made_up.RunWriter.resume(path).part(0)
        made_up.fill(part, range(3))
        assert open_run(path).status == "running"
        part.finish("finished")
    assert open_run(path).status == "finished" and not list(path.rglob("writer-*"))


def test_a_number_that_another_process_has_now_is_not_its_first_owner(tmp_path):
    path = made_up.new_run(tmp_path / "a").path
    number = hold(path, run=path)
    file = path / "writer-0000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pid": 1}))
    assert writer_of(path) is None and holder_of(path).pid == 1
    release(path, number)


@pytest.mark.parametrize("what", ["run", "part"])
def test_a_process_of_another_machine_is_not_called_killed(tmp_path, what):
    path = made_up.new_run(tmp_path / "a").path
    part = made_up.RunWriter.resume(path).part(0)
    made_up.fill(part, range(3))
    file = part.path / "writer-0000.json"
    if what == "run":
        file = file.rename(path / "writer-0000.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "n17", "pid": 12}))
    for records in part.path.glob("*-0000.*[wl]"):
        os.utime(records, (0, records.stat().st_mtime - 3 * 3600))
    run = open_run(path)
    assert (run.status, run.members[0].status) == ("running", "running")
    assert run.writer == "written by process 12 on n17, its last record is 3 h old"
    assert [summary.writer for summary in list_runs(tmp_path)] == [run.writer]
    with pytest.raises(RunError) as error:
        holding(path).__enter__()
    assert re.fullmatch(
        rf"{path}: process 12 on n17 has been writing it since [\dT:+-]+, its last record is 3 h old\. If it no longer runs "
        rf"there, delete {file} and try again\.",
        str(error.value),
    )
    file.unlink()
    assert open_run(path).status == "killed"
    with holding(path):
        pass
    part.close()


def test_of_many_that_find_a_dead_holder_one_becomes_the_next(writing):
    path, process = writing("run")
    process.kill()
    process.communicate()
    command = [sys.executable, "-c", WRITE, str(path), "run"]
    rivals = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    said = [rival.stdout.readline() for rival in rivals]
    assert sorted(said) == [""] * 5 + ["ready\n"]
    for rival in rivals:
        _, errors = rival.communicate("\n")
        assert rival.returncode == 0 or "RunError" in errors
    assert not list(path.glob("writer-*"))


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", fail)
    number = hold(tmp_path, run=tmp_path)
    assert holder_of(tmp_path).is_me and [p.name for p in tmp_path.iterdir()] == ["writer-0000.json"]
    release(tmp_path, number)
    assert holder_of(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": -1}', '{"host": 1, "pid": 1, "started": "", "since": ""}'])
def test_a_file_that_names_nobody_holds_nothing(tmp_path, content):
    path = made_up.new_run(tmp_path / "a").path
    (path / "writer-9999.json").write_text(content)
    assert open_run(path).status == "killed"
    with holding(path):
        assert (path / "writer-10000.json").exists()
    assert not list(path.glob("writer-*"))


def test_elsewhere_processes_are_asked_of_psutil(monkeypatch):
    monkeypatch.setattr(holder.Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError()))
    monkeypatch.setattr(holder.Path, "exists", lambda *_: False)
    pytest.importorskip("psutil")
    assert holder._started(os.getpid()) == holder._started(os.getpid()) != holder._started(1)
    assert holder._started(2**30) is None
