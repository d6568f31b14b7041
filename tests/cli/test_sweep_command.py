"""`attnscope sweep` and `attnscope compare`, as a person types them."""

import json
import re
import signal
import time

import pytest

from attnscope.runs.reader import open_run
from tests.cli.test_train_command import FAST, attnscope, start

pytestmark = pytest.mark.slow  # whole sweeps, each in a process of its own

GRID = ["--vary", "attention.scale=inverse_sqrt,none", "--vary", "init.gain=0.5,4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished sweep of 8 members, and a config that describes another."""
    folder = tmp_path_factory.mktemp("sweeps")
    done = attnscope("sweep", *FAST, *GRID, "--seeds", "2", "--set", "train.steps=30", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    (folder / "lr.toml").write_text(
        "[model]\nd_model = 16\nn_layers = 1\nseq_len = 8\n[data]\nsource = 'markov'\n[train]\nsteps = 5\n"
        "[sweep]\nseeds = 2\nvary.optimizer.lr = 'log:1e-3:1e-1:3'\nvary.attention.scale = ['none', 'inverse_sqrt']\n"
    )
    return folder


def test_the_result_is_said_by_cell_and_fits_80_columns(folder):
    said = (folder / "said.txt").read_text()
    assert max(map(len, said.splitlines())) <= 80
    assert "setting" in said and "effect" in said and "(baseline)" in said
    assert "Of 8 members, " in said and "Baseline scale=inverse_sqrt gain=0.5: " in said
    assert "Report: runs/sweep-001/report/report.html" in said


def test_the_run_directory_is_one_like_any_other(folder):
    run = open_run(folder / "runs" / "sweep-001")
    assert run.status == "finished" and len(run.members) == 8
    assert run.config.sweep.seeds == (0, 1)
    again = attnscope("report", "runs/sweep-001", cwd=folder)
    assert again.stdout == (folder / "said.txt").read_text()


def test_piped_progress_is_plain_lines(folder):
    done = attnscope("sweep", "lr.toml", "--name", "piped", cwd=folder)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert lines[0] == "Measuring how many of 12 members to train at once ..."
    assert lines[1] == "Run runs/piped: 12 members in 1 part"
    assert any(line.startswith("part 0 finished: ") for line in lines)
    assert "\x1b" not in done.stderr + done.stdout


def test_a_dry_run_says_what_it_would_do_and_does_nothing(folder):
    done = attnscope("sweep", "lr.toml", "--dry-run", "--name", "dry", cwd=folder)
    assert done.returncode == 0 and not (folder / "runs" / "dry").exists()
    assert "optimizer.lr     0.001, 0.01, 0.1    0.001" in done.stdout
    # How many are trained at once is measured: on a machine that is busy it may be any number.
    assert re.search(r"12 members in \d+ parts?, 1 at a time: about ", done.stdout)
    plan = json.loads(attnscope("sweep", "lr.toml", "--dry-run", "--json", cwd=folder).stdout)
    assert sum(part["members"] for part in plan["parts"]) == 12 and plan["seconds"] > 0
    assert len({member["name"] for member in plan["members"]}) == 12


def test_flags_add_to_the_file_and_replace_its_axes(folder):
    words = ["--vary", "optimizer.lr=0.1,0.2", "--vary", "init.gain=1,2", "--seeds", "4,7"]
    plan = json.loads(attnscope("sweep", "lr.toml", *words, "--dry-run", "--json", cwd=folder).stdout)
    assert plan["vary"] == {
        "optimizer.lr": [0.1, 0.2],
        "attention.scale": ["none", "inverse_sqrt"],
        "init.gain": [1.0, 2.0],
    }
    assert plan["seeds"] == [4, 7] and len(plan["members"]) == 16
    assert plan["baseline"] == {
        "optimizer.lr": 0.1, "attention.scale": "inverse_sqrt", "init.gain": 1.0,
    }  # fmt: skip


def test_json_has_the_cells(folder):
    done = attnscope("sweep", "lr.toml", "--jobs", "2", "--name", "json", "--json", cwd=folder)
    found = json.loads(done.stdout)
    assert len(found["members"]) == 12 and len(found["cells"]) == 6
    assert [cell["is_baseline"] for cell in found["cells"]].count(True) == 1
    assert found["cells"][0]["settings"]["optimizer.lr"] == "0.001"


def test_train_does_not_take_a_sweep(folder):
    done = attnscope("train", "lr.toml", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: lr.toml describes a sweep. Run it: attnscope sweep lr.toml\n"


def test_an_existing_run_is_left_alone(folder):
    done = attnscope("sweep", "lr.toml", "--name", "sweep-001", cwd=folder)
    assert done.returncode == 1
    assert "runs/sweep-001 already exists" in done.stderr.splitlines()[-1]


def test_too_little_memory_is_refused_in_words(folder):
    done = attnscope("sweep", "lr.toml", "--memory", "50MiB", cwd=folder)
    assert done.returncode == 1 and not done.stdout
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: lr=0.001 scale=none seed=0: one member needs ")
    assert said.endswith("Use fewer jobs, a smaller model or a smaller batch.")


def test_ctrl_c_keeps_what_there_is_and_names_the_way_on(folder):
    words = ["sweep", *FAST, *GRID, "--set", "train.steps=3000", "--name", "stopped"]
    process = start(*words, cwd=folder)
    part = folder / "runs" / "stopped" / "part-0000"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(part.glob("steps-*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Train what is missing: attnscope sweep --resume runs/stopped" in said
    run = open_run(folder / "runs" / "stopped")
    assert run.status == "interrupted" and list(part.glob("checkpoint-*"))
    done = attnscope("sweep", "--resume", "runs/stopped", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert open_run(folder / "runs" / "stopped").status == "finished"
    done = attnscope("sweep", "--resume", "runs/stopped", cwd=folder)
    assert (done.returncode, done.stderr) == (
        1, "error: runs/stopped is finished: there is nothing to resume. Read it: attnscope report runs/stopped\n",
    )  # fmt: skip


def test_without_ray_it_says_how_to_get_it(folder, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    done = attnscope("sweep", "lr.toml", "--ray", cwd=folder, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == 'error: ray is not installed. Install it: pip install "attnscope[ray]"\n'


def test_compare_prints_what_differs_and_writes_a_page(folder):
    first, second = (
        "runs/sweep-001:scale=none gain=0.5 seed=0",
        "runs/sweep-001:scale=none gain=4 seed=0",
    )
    done = attnscope("compare", first, second, cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert rows["init.gain"] == ["0.5", "4"] and "attention.scale" not in rows
    assert {"outcome", "final", "max_prob"} <= set(rows)
    (page,) = (folder / "comparisons").glob("*/report.html")
    assert str(page.relative_to(folder)) in done.stdout
    assert (page.parent / "figures" / "loss.png").exists()


def test_compare_as_json_and_into_a_folder_of_choice(folder, tmp_path):
    out = tmp_path / "new" / "place"
    words = [
        "compare",
        "runs/sweep-001",
        "--baseline",
        "attention.scale=none",
        "--out",
        str(out),
        "--json",
    ]
    found = json.loads(attnscope(*words, cwd=folder).stdout)
    assert found["report"] == str(out / "report.html") and (out / "report.md").exists()
    (base,) = [cell for cell in found["cells"] if cell["is_baseline"]]
    assert base["settings"] == {"attention.scale": "none", "init.gain": "0.5"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "error: nowhere: no such run. List them: attnscope runs"),
        (("nowhere:x",), "error: nowhere: no such run. List them: attnscope runs"),
        (
            ("runs/sweep-001:x",),
            "error: runs/sweep-001 has no member 'x'. Members: scale=inverse_sqrt gain=0.5 seed=0, "
            "scale=inverse_sqrt gain=0.5 seed=1, scale=inverse_sqrt gain=4 seed=0, scale=inverse_sqrt gain=4 seed=1, "
            "scale=none gain=0.5 seed=0, scale=none gain=0.5 seed=1, scale=none gain=4 seed=0, scale=none gain=4 seed=1.",
        ),
        (
            ("runs/sweep-001:scale=none gain=4 seed=0",),
            "error: Only one member was named: there is nothing to compare it with.",
        ),
    ],
)
def test_wrong_comparisons_are_refused_in_words(folder, words, said):
    done = attnscope("compare", *words, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said + "\n")


def test_no_cell_is_cut_where_titles_are_wider_than_what_stands_below(capsys):
    from rich.console import Console

    from attnscope.cli.tables import print_block
    from attnscope.report.blocks import Table

    table = Table(
        titles=("setting", "value", "outcome", "effect", "final loss", "loss - baseline"),
        rows=(("threshold", "inverse_sqrt1", "3 diverged", "does not help", "3.05 (3.04–3.06)", "+6.8e4"),),
        words=4,
    )  # fmt: skip
    print_block(Console(width=80, highlight=False), table)
    title, more, row = capsys.readouterr().out.splitlines()
    assert title.split() == ["loss", "-"] and more.endswith("final loss baseline")
    assert row.split() == [
        "threshold", "inverse_sqrt1", "3", "diverged", "does", "not", "help", "3.05", "(3.04–3.06)", "+6.8e4",
    ]  # fmt: skip
