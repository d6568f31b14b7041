"""`attnscope export`, as a person and as a machine read it."""

import json
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from attnscope.cli import app
from attnscope.cli.readers import ExportTo
from attnscope.export import TARGETS


def export(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)], env={"COLUMNS": "80"})


def test_every_target_can_be_named():
    assert [each.value for each in ExportTo] == list(TARGETS)


def test_what_was_written_is_said_with_the_command_that_shows_it(run_path):
    done = export(run_path, "--to", "csv")
    assert done.exit_code == 0 and done.stderr == ""
    folder = run_path / "export" / "csv"
    assert done.stdout.splitlines() == [
        "steps.csv    8 rows",
        "heads.csv   32 rows",
        "layers.csv  16 rows",
        "params.csv  24 rows",
        "events.csv   3 rows",
        "",
        f"Written: {folder}",
        f"Next:    python -c \"import pandas; print(pandas.read_csv('{folder}/steps.csv'))\"",
    ]
    said = done.stdout.splitlines()[-1].partition("python ")[2]
    shown = subprocess.run([sys.executable, *shlex.split(said)], capture_output=True, text=True, check=True)
    assert "[8 rows x 14 columns]" in shown.stdout


def test_the_next_command_can_be_typed_whatever_the_folder_is_called(run_path, tmp_path):
    out = tmp_path / "it's $HOME"
    done = export(run_path, "--to", "parquet", "--out", out)
    command = done.stdout.splitlines()[-1].removeprefix("Next:    ")
    code = shlex.split(command)[-1]
    assert str(out / "steps.parquet") in code.replace("\\'", "'")
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_json_is_strict_and_alone_on_stdout(run_path, tmp_path):
    done = export(run_path, "--to", "parquet", "--out", tmp_path / "p", "--json")
    said = json.loads(done.stdout)
    assert (said["target"], said["unit"], said["lost"]) == ("parquet", "rows", [])
    assert said["place"] == str(tmp_path / "p") and said["counts"]["heads.parquet"] == 32
    assert (tmp_path / "p" / "heads.parquet").is_file()


def test_what_could_not_be_read_is_a_warning(run_path):
    place = run_path / "part-0000" / "heads-0000.arrow"
    place.write_bytes(place.read_bytes()[:-40])
    done = export(run_path, "--to", "csv")
    assert done.exit_code == 0 and done.stderr.startswith("warning: part-0000/heads-0000.arrow: ")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere", "--to", "csv"], 1, "error: nowhere: no such run."),
        (["{run}", "--to", "csv", "--out", "{run}"], 1, "error: {run} already exists. Choose"),
        (["{run}", "--to", "xlsx"], 2, "'xlsx' is not one of 'csv', 'parquet', 'tensorboard'"),
        (["{run}"], 2, "Missing option '--to'"),
    ],
)
def test_what_cannot_be_done_is_refused(run_path, words, code, said):
    done = export(*(word.format(run=run_path) for word in words))
    assert done.exit_code == code
    text = " ".join(done.stderr.replace("│", " ").split())
    assert said.format(run=run_path) in text and "Traceback" not in done.stderr
    assert not (run_path / "export").exists()
