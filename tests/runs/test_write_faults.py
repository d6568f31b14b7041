"""The disk is full, the folder is gone, the process is killed: one line, and what was recorded stays good."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from attnscope.errors import RunWriteError
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from tests.runs import made_up

# Appends steps one by one until it is stopped; says each one that was appended.
WRITE_ON = """
import resource, sys
from pathlib import Path
from attnscope.errors import RunWriteError
from attnscope.runs.writer import RunWriter
from tests.runs import made_up

path, limit, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
part = RunWriter.resume(path).part(0)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    for step in range(steps):
        made_up.fill(part, [step])
        print(step, flush=True)
except RunWriteError as error:
    first = str(error)
    for again in (lambda: made_up.fill(part, [step]), lambda: part.event(made_up.event("x", step=step))):
        try:
            again()
            print("wrote on after an error")
        except RunWriteError as second:
            assert str(second) == first
    part.finish("finished")
    print(first, flush=True)
"""


def write_on(path, *, limit=0, steps=10_000, **how):
    command = [sys.executable, "-c", WRITE_ON, str(path), str(limit), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **how)


def check_kept(path, said, reason):
    """After a full disk: the message is right about what is kept, and the run can go on."""
    *steps, message = said.splitlines()
    match = re.fullmatch(
        rf"{path}/part-0000/\w+-0000\.arrow: {reason}\. The records up to step (\d+) are kept\. "
        rf"Free space, then: attnscope train --resume {path}",
        message,
    )
    assert match, said
    run = open_run(path)
    assert run.status in ("failed", "running")  # "failed" where there was room left to say so
    assert list(run.steps["step"]) == sorted([*range(int(match[1]) + 1)] * 2)
    for table in (run.heads, run.layers, run.params):
        assert set(table["step"]) >= set(range(len(steps)))
    assert all("are not a complete batch" in line for line in run.lost) and len(run.lost) <= 1


@pytest.mark.parametrize("limit", [6_000, 30_000])
def test_a_file_that_may_not_grow_is_one_line_and_what_was_written_stays_good(tmp_path, limit):
    path = made_up.new_run(tmp_path / "a").path
    with write_on(path, limit=limit) as process:
        said, _ = process.communicate()
    check_kept(path, said, "file too large")
    assert open_run(path).status == "failed"
    part = RunWriter.resume(path).part(0, first_step=2)
    made_up.fill(part, range(2, 5))
    part.finish("finished")
    run = open_run(path)
    assert run.status == "finished" and list(run.steps["step"]) == sorted([*range(5)] * 2)


def test_a_full_disk_is_one_line_and_what_was_written_stays_good(tiny_disk):
    path = made_up.new_run(tiny_disk / "a").path
    with write_on(path) as process:
        said, _ = process.communicate()
    check_kept(path, said, "no space left on device")


def test_on_a_full_disk_no_run_is_made_and_nothing_is_left(tiny_disk):
    (tiny_disk / "ballast").write_bytes(bytes(4096))
    with contextlib.suppress(OSError), (tiny_disk / "rest").open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))
    with pytest.raises(RunWriteError) as error:
        made_up.new_run(tiny_disk / "a")
    assert str(error.value) == (
        f"{tiny_disk}/a: the run directory cannot be made: no space left on device. "
        "Free space, or choose another place with --out."
    )
    assert sorted(path.name for path in tiny_disk.iterdir()) == ["ballast", "rest"]


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_leaves_everything_it_had_appended(tmp_path, seed):
    path = made_up.new_run(tmp_path / "a").path
    with write_on(path) as process:
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    appended = 1 + rest.count("\n")
    run = open_run(path)
    for table in (run.steps, run.heads, run.layers, run.params):
        assert set(range(appended)) <= set(table["step"]) <= set(range(appended + 1))
    assert all("are not a complete batch" in line for line in run.lost)
    assert run.ends == {}


def test_a_folder_that_was_taken_away_is_one_line(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, [0])
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(RunWriteError) as error:
        made_up.fill(part, [1])
    assert str(error.value) == (
        f"{part.path}/steps-0000.arrow: the file was deleted while it was written. "
        "The run directory was taken away. Start a new run."
    )
    part.finish("finished")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EIO, "Put that right"),
        (errno.EROFS, "Make it writable"),
        (errno.EDQUOT, "Free space"),
    ],
)
def test_every_error_of_the_disk_is_repeated_and_never_success(tmp_path, number, remedy):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, range(3))

    class Broken:
        def __getattr__(self, name):
            raise OSError(number, os.strerror(number))

    file = part._files["heads-0000.arrow"]
    file.close()
    part._files["heads-0000.arrow"] = Broken()
    messages = set()
    for _ in range(2):
        with pytest.raises(RunWriteError) as error:
            part.append("heads", made_up.columns("heads", [3]))
        messages.add(str(error.value))
    with pytest.raises(RunWriteError) as error:
        part.event(made_up.event("tick", step=3))
    messages.add(str(error.value))
    (message,) = messages
    assert "\n" not in message and message.endswith(
        f"The records up to step 2 are kept. {remedy}, then: attnscope train --resume {tmp_path}/a"
    )
    part.finish("finished")
    part.close()
    run = open_run(tmp_path / "a")
    assert run.status == "failed" and run.ends[0]["error"] == message and run.lost == ()


def test_an_end_that_cannot_be_written_is_an_error_and_no_end(tmp_path, monkeypatch):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, range(3))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(RunWriteError, match=r"end\.json: no space\. The records up to step 2 are"):
        part.finish("finished")
    part.finish("finished")
    monkeypatch.undo()
    assert open_run(tmp_path / "a").ends == {}


def test_a_part_that_cannot_be_begun_is_one_line(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    (writer.path / "part-0000").write_text("a file")
    with pytest.raises(RunWriteError) as error:
        writer.part(0)
    assert str(error.value) == (
        f"{writer.path}/part-0000: file exists. What was recorded before is kept. "
        f"Put that right, then: attnscope train --resume {writer.path}"
    )
