"""Whole sweeps: in one process and in two, killed, divided, interrupted and gone on with."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

import attnscope
from attnscope.cli.sweeping import SweepView
from attnscope.errors import AttnscopeError, RunError
from attnscope.runs.events import Stopped
from attnscope.runs.found_live import FoundLive, line_of
from attnscope.runs.reader import open_run
from attnscope.sweep.plan import PartPlan, Plan
from attnscope.sweep.run import resume_sweep, run_sweep
from attnscope.sweep.workers import LocalWorkers, train_here
from attnscope.train.run import by_part, train_run
from tests.sweep.small import members, table_of, tiny


class Here:
    """Trains in this process, unless `dies` says that a part shall die; counts what it was given."""

    machines = 1

    def __init__(self, dies=lambda part, before: None):
        self.given, self._dies = [], dies

    def reserve(self, memory_bytes):
        pass

    def submit(self, path, part):
        future = Future()
        error = self._dies(part, self.given)
        self.given.append(part)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(train_here(path, part))
        return future

    def stop(self):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def plan():
    """Two parts, however fast this machine is just now."""
    found = members()
    parts = tuple(
        PartPlan(part=part, n_members=len(group), seconds=1.0, peak_bytes=1) for part, group in by_part(found).items()
    )
    return Plan(members=found, parts=parts, memory_bytes=2**30, jobs=1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_sweep(tiny(), plan, path, workers=Here()).status == "finished"
    return path


def test_a_sweep_is_what_its_members_are_alone(uninterrupted, tmp_path):
    train_run(tiny(), tmp_path / "one-process")
    alone, swept = table_of(tmp_path / "one-process"), table_of(uninterrupted)
    assert alone.keys() == swept.keys() and len(alone) == 16
    assert {name: each[:3] for name, each in alone.items()} == {name: each[:3] for name, each in swept.items()}
    assert len({status for status, *_ in swept.values()}) > 1, "or the comparison would show little"


def test_finished_parts_keep_no_checkpoints(uninterrupted):
    assert not list(uninterrupted.rglob("checkpoint-*"))


def test_two_processes_give_the_same(uninterrupted, plan, tmp_path):
    workers = LocalWorkers(2)
    try:
        end = run_sweep(tiny(), plan, tmp_path / "two", workers=workers)
    finally:
        workers.close()
    assert end.status == "finished" and end.failures == ()
    assert table_of(tmp_path / "two") == table_of(uninterrupted)


def test_what_rules_find_is_told_by_part_and_once(plan, tmp_path):
    view, lines = SweepView(tmp_path / "r", plan), []

    def look(standings):
        view.update(standings)
        lines.extend(str(line) for line in view.found())

    workers = LocalWorkers(1)
    try:
        assert run_sweep(tiny(), plan, tmp_path / "r", workers=workers, on_look=look).status == "finished"
    finally:
        workers.close()
    run = open_run(tmp_path / "r")
    told = [(what.rule, name) for _, _, what in run.happened(FoundLive) for name in what.members]
    assert "nonfinite" in {rule for rule, _ in told} and len(told) == len(set(told))
    expected = [
        f"part {part} {line_of(step, what)}"
        for part in (0, 1)
        for step, _, what in open_run(tmp_path / "r", part=part).happened(FoundLive)
    ]
    assert sorted(lines) == sorted(expected)


def test_a_sweep_stops_where_a_rule_finds_something(plan, tmp_path):
    workers = LocalWorkers(1, stop_on=["saturated_at_start"])
    try:
        end = run_sweep(tiny(), plan, tmp_path / "r", workers=workers)
    finally:
        workers.close()
    run = open_run(tmp_path / "r")
    ((step, _, stopped),) = run.happened(Stopped)
    assert end.status == "stopped" and stopped.on == "saturated_at_start"
    assert run.steps["step"].max() == step < 39
    assert resume_sweep(tmp_path / "r", workers=Here()).status == "finished"


def test_a_part_that_dies_is_divided_and_all_finish(uninterrupted, plan, tmp_path):
    def dies(part, before):
        return MemoryError() if part == 0 and not before else None

    workers = Here(dies)
    end = run_sweep(tiny(), plan, tmp_path / "r", workers=workers)
    assert end.status == "finished" and len(end.divided) == 1
    assert "part 0 (8 members) ran out of memory; trained again as parts" in end.divided[0]
    assert len(workers.given) == 2 + len(plan.parts) and len(set(workers.given)) == len(workers.given)
    found, whole = table_of(tmp_path / "r"), table_of(uninterrupted)
    assert {name: each[:3] for name, each in found.items()} == {name: each[:3] for name, each in whole.items()}


def test_what_dies_twice_is_reported_and_the_others_are_kept(plan, tmp_path):
    def dies(part, before):
        return None if part == 1 else MemoryError()

    end = run_sweep(tiny(), plan, tmp_path / "r", workers=Here(dies))
    assert end.status == "failed" and len(end.failures) == 2
    assert {failure.reason for failure in end.failures} == {"ran out of memory, again"}
    assert sum(len(failure.members) for failure in end.failures) == 8
    run = open_run(tmp_path / "r")
    kept = [member for member in run.members if member.last_step is not None]
    assert len(kept) == 8 and run.status == "failed"


def test_an_error_in_the_code_is_not_tried_again(plan, tmp_path):
    def dies(part, before):
        return ZeroDivisionError("by nothing") if part == 0 else None

    workers = Here(dies)
    end = run_sweep(tiny(), plan, tmp_path / "r", workers=workers)
    assert workers.given == [0, 1]
    assert [failure.reason for failure in end.failures] == ["ZeroDivisionError: by nothing"]


def test_a_worker_that_is_killed_costs_its_part_one_division(plan, tmp_path):
    config = tiny(train={"steps": 400})
    workers = LocalWorkers(1)
    killed = []

    def kill(standings):
        if not killed and standings[0].steps_done > 20:
            (process,) = workers._pools[0]._processes.values()
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    try:
        end = run_sweep(config, plan, tmp_path / "r", workers=workers, on_look=kill)
    finally:
        workers.close()
    assert killed and end.status == "finished"
    assert "its process was killed" in end.divided[0]
    assert {status for status, *_ in table_of(tmp_path / "r").values()} <= {
        "trained",
        "stalled",
        "diverged",
    }


def test_stopping_keeps_what_there_is_and_resuming_makes_it_whole(uninterrupted, plan, tmp_path):
    asked = []

    class Stopping(Here):
        def submit(self, path, part):
            if asked:
                return None  # busy
            asked.append(part)
            return super().submit(path, part)

    end = run_sweep(tiny(), plan, tmp_path / "r", workers=Stopping(), should_stop=lambda: bool(asked))
    assert end.status == "interrupted" and asked == [0]
    workers = Here()
    assert resume_sweep(tmp_path / "r", workers=workers).status == "finished"
    assert workers.given == [1], "only what has no end marker"
    assert table_of(tmp_path / "r") == table_of(uninterrupted)
    with pytest.raises(RunError, match="is finished: there is nothing to resume"):
        resume_sweep(tmp_path / "r", workers=workers)


def test_standings_tell_waiting_from_training_from_done(plan, tmp_path):
    seen = []
    workers = LocalWorkers(1)
    try:
        run_sweep(
            tiny(train={"steps": 300}),
            plan,
            tmp_path / "r",
            workers=workers,
            on_look=lambda found: seen.append([found[part].state for part in sorted(found)]),
        )
    finally:
        workers.close()
    assert seen[0] == ["training", "waiting"] and seen[-1] == ["finished", "finished"]


def test_a_sweep_that_just_began_has_no_killed_members(plan, tmp_path):
    seen = []
    workers = LocalWorkers(1)

    def look(standings):
        seen.append(open_run(tmp_path / "r").status)
        for standing in standings.values():
            seen.extend(standing.outcomes)

    try:
        run_sweep(tiny(), plan, tmp_path / "r", workers=workers, on_look=look)
    finally:
        workers.close()
    assert seen[:3] == ["running"] * 3, "two parts that wait"
    assert "killed" not in seen
    assert open_run(tmp_path / "r").status == "finished"
    assert not list((tmp_path / "r").rglob("writer-*"))


def test_a_run_that_exists_is_left_alone(uninterrupted, plan):
    with pytest.raises(AttnscopeError, match="already exists"):
        run_sweep(tiny(), plan, uninterrupted, workers=Here())


KILLED = """
import sys
from pathlib import Path
from attnscope.sweep.plan import plan_sweep
from attnscope.sweep.run import resume_sweep, run_sweep
from attnscope.sweep.workers import LocalWorkers
from tests.sweep.small import members, tiny

path, steps = Path(sys.argv[1]), int(sys.argv[2])
workers = LocalWorkers(2)
if path.exists():
    end = resume_sweep(path, workers=workers)
else:
    changes = {"train": {"steps": steps, "checkpoint_every": 50}}
    config = tiny(**changes)
    end = run_sweep(config, plan_sweep(members(**changes), jobs=2), path, workers=workers)
workers.close()
print(end.status)
"""


@pytest.mark.slow
def test_killed_three_times_and_resumed_gives_the_table_of_one_uninterrupted(tmp_path):
    """Real processes, kill -9 of the whole sweep; its workers end with it."""

    def begin(name):
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / name), "1500"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = begin("whole")
    assert whole.communicate()[0].strip() == "finished"
    chance = random.Random(0)
    for _ in range(3):
        victim = begin("killed")
        part = tmp_path / "killed" / "part-0001"
        before = sum(path.stat().st_size for path in part.glob("steps-*")) if part.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # until it has trained some, then a little longer
            if sum(path.stat().st_size for path in part.glob("steps-*")) > before:
                break
            time.sleep(0.05)
        time.sleep(chance.uniform(0.1, 0.6))
        assert victim.poll() is None, "it was over before it could be killed"
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert attnscope.open_run(tmp_path / "killed").status != "finished"
    last = begin("killed")
    assert last.communicate()[0].strip() == "finished"
    assert table_of(tmp_path / "killed") == table_of(tmp_path / "whole")


def living(session):
    """Processes of a session that are not only waiting to be buried, and their parents."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                state, parent, _, its_session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(its_session) == session and state not in "ZX":
                found[int(path.name)] = int(parent)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("when", ["while it measures", "while it trains"])
def test_no_process_outlives_a_sweep_that_is_killed(tmp_path, when):
    sizes = [
        "--set",
        "model.d_model=32",
        "--set",
        "train.steps=100000",
        "--set",
        "data.source=markov",
    ]
    victim = subprocess.Popen(
        [sys.executable, "-m", "attnscope", "sweep", "--vary", "model.norm=none,pre", *sizes, "--jobs", "2", "--name", "r"],
        cwd=tmp_path,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    parts = [tmp_path / "runs" / "r" / f"part-000{k}" for k in (0, 1)]

    def is_time():
        if when == "while it trains":
            return all(list(part.glob("steps-*")) for part in parts)
        return len(living(victim.pid)) > 3  # its tracker, its fork server, and a worker

    try:
        deadline = time.monotonic() + 90
        while not is_time():
            assert time.monotonic() < deadline and victim.poll() is None
            time.sleep(0.02)
        workers = {pid for pid, parent in living(victim.pid).items() if parent != victim.pid}
        workers -= {victim.pid}
        assert workers
        victim.kill()
        victim.wait()
        killed_at = time.monotonic()
        while workers & living(victim.pid).keys() and time.monotonic() < killed_at + 10:
            time.sleep(0.02)
        assert time.monotonic() < killed_at + 2, "a worker went on"
        while living(victim.pid) and time.monotonic() < killed_at + 20:
            time.sleep(0.05)
        assert not living(victim.pid), "its fork server or its tracker went on"
    finally:
        for pid in living(victim.pid):
            os.kill(pid, signal.SIGKILL)
    if when == "while it trains":
        run = open_run(tmp_path / "runs" / "r")
        assert run.status == "killed" and {m.status for m in run.members} == {"killed"}
