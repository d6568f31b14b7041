"""`--help` and `report` never import what they do not need."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "pandas", "matplotlib", "numpy", "pyarrow"}
# Of modules, for a command line that is quick on every machine: with what draws its help it takes 320, numpy alone 150 more.
MOST_MODULES = 400


def imported_by(code):
    """Which heavy modules a fresh interpreter has loaded after running `code`, and how many in all."""
    told = f"{code}\nimport sys; print((sorted({HEAVY!r} & set(sys.modules)), len(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    heavy, count = eval(done.stdout.splitlines()[-1], {})
    return set(heavy), count


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
    heavy, modules = imported_by(calling(*words, "--help"))
    assert heavy == set()
    assert modules <= MOST_MODULES


def test_the_import_test_can_fail():
    heavy, modules = imported_by("import torch")
    assert "torch" in heavy and modules > MOST_MODULES


def test_importing_attnscope_costs_nothing():
    heavy, _ = imported_by("import attnscope")
    assert heavy == set()


def test_runs_and_report_do_without_torch(tmp_path):
    from attnscope import train_model

    train_model({"data": {"source": "markov"}, "train": {"steps": 2}}, path=tmp_path / "runs" / "r")
    for words in (["report", str(tmp_path / "runs" / "r")], ["runs", str(tmp_path / "runs")]):
        heavy, _ = imported_by(calling(*words))
        assert "torch" not in heavy
