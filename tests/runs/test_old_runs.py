"""Runs that attnscope 0.1.0 wrote before records had checksums and parts had locks: they stay readable.

`old/lab` is a --no-scale pair with a checkpoint, `old/sweep` a sweep of two settings, `old/watched` a watched script with a
snapshot. Nothing writes into them.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import attnscope
from attnscope.cli import app
from attnscope.errors import RunError
from attnscope.runs.checkpoint import load_checkpoint
from attnscope.runs.layout import COLUMNS
from attnscope.runs.snapshot import load_snapshot

OLD = Path(__file__).parent / "old"
TABLES = ("steps", "heads", "layers", "params")

# Rows of a table, the sum of its finite numbers, and how many are not finite.
RECORDED = {
    "lab": [(60, 17370.029, 54), (120, 9209.1073, 0), (60, 990.63051, 0), (480, 11389.202, 0)],
    "sweep": [
        (85, 8091757542781.7, 115),
        (170, 4.5859478e24, 66),
        (85, 3738737010.0, 10),
        (780, 798519950687.1, 192),
    ],
    "watched": [(12, 1.2748734e34, 76), (24, 4.9180401e22, 148), (0, 0, 0), (60, 4.0948934e26, 208)],
}  # fmt: skip
# Member, status, where it diverged, last step, final loss.
ENDED = {
    "lab": [("unscaled", "stalled", None, 29, 4.7622798), ("scaled", "stalled", None, 29, 4.6981755)],
    "sweep": [
        ("lr=0.01 norm=none", "stalled", None, 24, 4.6058522),
        ("lr=0.01 norm=pre", "stalled", None, 24, 4.3514327),
        ("lr=1 norm=none", "diverged", 2, 9, np.nan),
        ("lr=1 norm=pre", "stalled", None, 24, 4.5979079),
    ],
    "watched": [("watched", "diverged", 1, 11, np.nan)],
}  # fmt: skip
HAPPENED = {
    "lab": {"start": 1, "evaluation": 2},
    "sweep": {"start": 3, "evaluation": 3, "diverged": 1, "nonfinite": 3, "dropped": 1},
    "watched": {"start": 1, "optimizer": 1, "attention": 1, "diverged": 1, "snapshot": 1, "nonfinite": 4},
}  # fmt: skip


@pytest.fixture(params=RECORDED)
def run(request, tmp_path):
    """A copy of an old run, so that nothing can be left in the original."""
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


def test_an_old_run_opens_with_all_it_recorded(run):
    found = attnscope.open_run(run)
    assert (found.status, found.lost) == ("finished", ())
    for table, (rows, total, broken) in zip(TABLES, RECORDED[run.name], strict=True):
        frame = getattr(found, table)
        later = [name for name, column in COLUMNS[table].items() if column.is_later]
        assert frame[later].isna().all(axis=None)
        frame = frame.drop(columns=later)
        numbers = frame.select_dtypes(np.number).to_numpy(dtype=np.float64)
        finite = np.isfinite(numbers)
        assert len(frame) == rows and (~finite).sum() == broken
        assert numbers[finite].sum() == pytest.approx(total, rel=1e-6)
    said = [(m.name, m.status, m.diverged_at, m.last_step) for m in found.members]
    assert said == [each[:4] for each in ENDED[run.name]]
    losses = [m.final_loss for m in found.members]
    assert losses == pytest.approx([each[4] for each in ENDED[run.name]], nan_ok=True)
    assert found.events["kind"].value_counts().to_dict() == HAPPENED[run.name]


def test_the_config_of_an_old_run_is_understood():
    lab = attnscope.open_run(OLD / "lab").config
    assert (lab.model.d_model, lab.data.source, lab.train.checkpoint_every) == (16, "markov", 20)
    swept = attnscope.open_run(OLD / "sweep").config.sweep
    assert [axis.key for axis in swept.vary] == ["optimizer.lr", "model.norm"]
    with pytest.raises(RunError, match=r"was watched: .* attnscope watch"):
        _ = attnscope.open_run(OLD / "watched").config


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_commands_read_an_old_run(run, command):
    done = CliRunner().invoke(app, [command, str(run)])
    assert done.exit_code == 0, done.output
    for member, *_ in ENDED[run.name]:
        if command == "report":
            assert member in (run / "report" / "report.md").read_text()
    assert "warning" not in done.stderr


def test_commands_list_and_compare_old_runs(tmp_path):
    for name in RECORDED:
        shutil.copytree(OLD / name, tmp_path / name)
    listed = CliRunner().invoke(app, ["runs", str(tmp_path), "--json"])
    assert listed.exit_code == 0 and listed.stdout.count('"status": "finished"') == 3
    out = str(tmp_path / "out")
    names = [str(tmp_path / name) for name in RECORDED]
    compared = CliRunner().invoke(app, ["compare", *names, "--out", out])
    assert compared.exit_code == 0, compared.output


def test_an_old_checkpoint_is_gone_on_with(tmp_path):
    run = shutil.copytree(OLD / "lab", tmp_path / "lab")
    assert load_checkpoint(run / "part-0000").step == 20
    whole = attnscope.open_run(run)
    losses = whole.steps["loss"].to_numpy()
    (run / "part-0000" / "end.json").unlink()  # as if it had been killed after its last record
    assert attnscope.open_run(run).status == "killed"
    resumed = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert resumed.exit_code == 0, resumed.output
    again = attnscope.open_run(run)
    assert again.status == "finished" and again.lost == ()
    assert again.steps["loss"].to_numpy() == pytest.approx(losses, rel=1e-5)
    assert (run / "part-0000" / "steps-0001.arrow").exists()


def test_an_old_snapshot_is_read():
    (path,) = (OLD / "watched").rglob("snapshot-*")
    found = load_snapshot(path)
    assert found.step == 3 and found.weights.keys() == {"weight"} and len(found.batches) == 1
