"""`--help` and `report` never import what they do not need."""

import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "pandas", "matplotlib", "numpy", "pyarrow"}


def imported_by(code, times=1):
    """Which heavy modules a fresh interpreter has loaded after running `code`, and its CPU seconds.

    The least of several times: a neighbour on the machine adds CPU time (shared caches, clock), never takes any away.
    """
    took = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"{code}\nimport sys; print(sorted({HEAVY!r} & set(sys.modules)))",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return set(eval(done.stdout.splitlines()[-1], {})), min(took)


def calling(*words):
    return (
        "from attnscope.cli import app\n"
        f"try: app({list(words)!r})\n"
        "except SystemExit as end: assert end.code == 0, end.code"
    )


@pytest.mark.parametrize(
    "words",
    [(), ("train",), ("preflight",), ("watch",), ("check",), ("report",), ("diagnose",), ("export",), ("runs",), ("bench", "overhead")],
)  # fmt: skip
def test_help_is_quick_and_imports_nothing_heavy(words):
    heavy, seconds = imported_by(calling(*words, "--help"), times=5)
    assert heavy == set()
    assert seconds < 0.25


def test_the_import_test_can_fail():
    heavy, seconds = imported_by("import torch", times=2)
    assert "torch" in heavy and seconds > 0.25


def test_importing_attnscope_costs_nothing():
    heavy, _ = imported_by("import attnscope")
    assert heavy == set()


def test_runs_and_report_do_without_torch(tmp_path):
    from attnscope import train_model

    train_model({"data": {"source": "markov"}, "train": {"steps": 2}}, path=tmp_path / "runs" / "r")
    for words in (["report", str(tmp_path / "runs" / "r")], ["runs", str(tmp_path / "runs")]):
        heavy, _ = imported_by(calling(*words))
        assert "torch" not in heavy
