"""`attnscope train`, as a person types it: real processes, real signals, real full disks."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from attnscope.runs.reader import open_run

# A model small enough that start-up is most of the time.
FAST = [
    *("--set", "model.d_model=16"),
    *("--set", "model.n_layers=2"),
    *("--set", "model.seq_len=8"),
    *("--set", "data.batch_size=2"),
    *("--set", "data.source=markov"),
]


def attnscope(*words, cwd, environment=None, **options):
    """Run the command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **(environment or {})}
    return subprocess.run(
        [sys.executable, "-m", "attnscope", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


def start(*words, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "attnscope", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_records(run, process):
    """Until the process has written its first rows."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if list(run.glob("part-0000/steps-*.arrow")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no records: {process.communicate()}")


def test_no_scale_trains_a_pair_and_says_what_happened(tmp_path):
    done = attnscope("train", "--no-scale", "--steps", "40", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss of unscaled is not finite" in done.stderr
    assert "unscaled" in done.stdout and "diverged" in done.stdout
    assert "Next:" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    run = open_run(tmp_path / "runs" / "no-scale-001")
    assert [member.name for member in run.members] == ["unscaled", "scaled"]
    assert run.members[0].status == "diverged"
    assert (run.path / "report" / "report.md").is_file()
    assert run.command[:2] == ("attnscope", "train")


@pytest.mark.slow
def test_json_is_strict_and_alone_on_stdout(tmp_path):
    done = attnscope("train", "--no-scale", "--steps", "30", "--json", cwd=tmp_path)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    said = json.loads(done.stdout, parse_constant=refuse)
    assert [member["name"] for member in said["members"]] == ["unscaled", "scaled"]
    assert said["members"][0]["status"] == "diverged"
    assert len(said["verdict"]) == 2
    assert Path(tmp_path / said["report"]).is_file()


@pytest.mark.slow
def test_runs_get_the_next_free_name_and_a_given_name_is_never_overwritten(tmp_path):
    for _ in range(2):
        assert attnscope("train", *FAST, "--steps", "2", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["train-001", "train-002"]
    before = (tmp_path / "runs" / "train-001" / "run.json").read_bytes()
    again = attnscope("train", *FAST, "--steps", "2", "--name", "train-001", cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1] == (
        "error: runs/train-001 already exists. Choose another --name, or go on with it: "
        "attnscope train --resume runs/train-001"
    )
    assert (tmp_path / "runs" / "train-001" / "run.json").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_resume_finishes(tmp_path):
    process = start("train", *FAST, "--steps", "100000", "--name", "r", cwd=tmp_path)
    run = tmp_path / "runs" / "r"
    wait_for_records(run, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Go on with: attnscope train --resume runs/r" in err
    assert "Traceback" not in err
    opened = open_run(run)
    assert opened.status == "interrupted" and opened.members[0].status == "interrupted"
    assert "interrupted" in out
    reached = opened.members[0].last_step
    process = start("train", "--resume", "runs/r", cwd=tmp_path)
    wait_for_records_from(run, process, "steps-0001.arrow")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    steps = open_run(run).steps["step"]
    assert steps.is_monotonic_increasing and steps.max() > reached
    assert steps.tolist() == list(range(steps.max() + 1))


def test_resuming_a_run_that_still_trains_is_refused_in_one_line_and_does_it_no_harm(tmp_path):
    every = ["--set", "train.checkpoint_every=50"]
    process = start("train", *FAST, *every, "--steps", "600", "--name", "r", cwd=tmp_path)
    run = tmp_path / "runs" / "r"
    wait_for_records_from(run, process, "checkpoint-00000050.json")
    process.send_signal(signal.SIGSTOP)  # a step that takes long
    for command in ("train", "sweep"):
        second = attnscope(command, "--resume", "runs/r", cwd=tmp_path)
        assert (second.returncode, second.stdout) == (1, "")
        (line,) = second.stderr.splitlines()
        assert re.fullmatch(
            rf"error: runs/r: process {process.pid} of this machine is still writing it, since \S+\. Wait until it ends, "
            rf"or stop it \(kill {process.pid}\), and try again\.",
            line,
        )
    assert open_run(run).status == "running"
    listed = attnscope("runs", "--json", cwd=tmp_path)
    assert [each["status"] for each in json.loads(listed.stdout)] == ["running"]
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    ended = open_run(run)
    assert (ended.status, ended.lost) == ("finished", ())
    assert ended.steps["step"].tolist() == list(range(600))
    assert not list(run.rglob("writer-*")) and not list(run.rglob("*-0001.*"))


def wait_for_records_from(run, process, name):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "part-0000" / name).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {name}: {process.communicate()}")


@pytest.mark.slow
def test_killed_at_20_random_moments_it_opens_reports_and_resumes(tmp_path):
    """Each run is killed with -9 somewhere, then read; every fifth is resumed and must finish."""
    draw = random.Random(0)
    moments = [draw.uniform(0.0, 1.5) for _ in range(20)]

    def kill_and_look(number):
        name = f"r{number}"
        process = start(
            "train", *FAST, "--steps", "1500", "--set", "train.checkpoint_every=50",
            "--name", name, cwd=tmp_path,
        )  # fmt: skip
        run = tmp_path / "runs" / name
        deadline = time.monotonic() + 60
        while not (run / "part-0000").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments[number])
        process.kill()
        killed_at = time.time()
        process.communicate()
        opened = open_run(run)
        if opened.ends:  # it was faster than the knife
            return True
        steps = opened.steps["step"]
        assert steps.tolist() == list(range(len(steps)))
        if len(steps):
            newest = max(path.stat().st_mtime for path in run.glob("part-0000/steps-*.arrow"))
            assert killed_at - newest < 1.5  # half a second of records and a step, on a busy machine
        assert all(note for note in opened.lost)
        if number % 5 == 0:
            done = attnscope("train", "--resume", f"runs/{name}", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            steps = open_run(run).steps["step"]
            assert steps.tolist() == list(range(1500))
        elif number % 5 == 1:
            done = attnscope("report", f"runs/{name}", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        return False

    with ThreadPoolExecutor(2) as pool:
        finished = list(pool.map(kill_and_look, range(20)))
    assert sum(finished) < 10, "most runs ended before they were killed: the test proves nothing"


@pytest.mark.slow
def test_a_full_disk_gives_one_line_and_keeps_what_was_recorded(tmp_path):
    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = attnscope(
        "train", *FAST, "--steps", "5000", "--set", "train.checkpoint_every=0", "--name", "r",
        cwd=tmp_path, preexec_fn=small_files_only,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "file too large" in line and "attnscope train --resume runs/r" in line
    assert "Traceback" not in done.stderr
    run = open_run(tmp_path / "runs" / "r")
    assert run.status == "failed"
    assert run.steps["step"].tolist() == list(range(len(run.steps)))
    assert len(run.steps) > 10
    again = attnscope("train", "--resume", "runs/r", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert open_run(run.path).steps["step"].tolist() == list(range(5000))


def test_an_unwritable_folder_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = attnscope("train", *FAST, "--out", "file", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: file/train-001: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_nothing_is_left_to_resume_in_a_finished_run(tmp_path):
    attnscope("train", *FAST, "--steps", "2", "--name", "r", cwd=tmp_path)
    done = attnscope("train", "--resume", "runs/r", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: runs/r is finished: there is nothing to resume. Read it: attnscope report runs/r"
    )


def test_debug_shows_the_traceback(tmp_path):
    plain = attnscope("report", "nowhere", cwd=tmp_path)
    assert plain.returncode == 1 and "Traceback" not in plain.stderr
    assert "Traceback" in attnscope("report", "nowhere", "--debug", cwd=tmp_path).stderr


@pytest.mark.slow
def test_a_closed_pipe_is_not_an_error_worth_a_traceback(tmp_path):
    attnscope("train", *FAST, "--steps", "2", "--name", "r", cwd=tmp_path)
    command = f"{sys.executable} -m attnscope runs | head -c 1 > /dev/null"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["runs", "elsewhere"])
def test_runs_lists_what_is_there(tmp_path, folder):
    attnscope("train", *FAST, "--steps", "2", "--name", "r", "--out", folder, cwd=tmp_path)
    done = attnscope("runs", folder, cwd=tmp_path)
    assert "r " in done.stdout and "finished" in done.stdout and "scaled" in done.stdout
    (row,) = json.loads(attnscope("runs", folder, "--json", cwd=tmp_path).stdout)
    assert row["name"] == "r" and row["status"] == "finished"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_records_the_same_first_steps(tmp_path):
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        done = attnscope("train", "--no-scale", *FAST, *flags, "--steps", "4", "--name", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    plain, compiled = (open_run(tmp_path / "runs" / name) for name in ("plain", "compiled"))
    assert compiled.config.train.compile
    for table, columns in (("steps", ["loss", "grad_norm"]), ("heads", ["entropy", "max_logit"])):
        np.testing.assert_allclose(getattr(plain, table)[columns], getattr(compiled, table)[columns], rtol=1e-3)


@pytest.mark.slow
def test_without_a_compiler_compile_gives_one_line(tmp_path):
    environment = {
        "CXX": "nowhere/g++",
        "PATH": "",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = attnscope("train", *FAST, "--steps", "2", "--compile", cwd=tmp_path, environment=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: train.compile: PyTorch cannot compile the model here: ")
    assert last.endswith("Train without it, or put that right (on a CPU it needs a C++ compiler).")
    assert "Traceback" not in done.stderr
