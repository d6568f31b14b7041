"""Live logging: what the trackers hold is what the run directory holds, and no tracker disturbs the training or its own user."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from attnscope.errors import ConfigError
from attnscope.runs.reader import open_run
from attnscope.watch import trackers
from attnscope.watch.attach import watch_model
from attnscope.watch.trackers import TRACKERS, check_tracker, moments_of
from tests.export.test_trackers import blocks_in

STEPS = 7


def train(path, log_to, *, each_step=lambda step: None, steps=STEPS):
    """A tiny transformer, measured at every other step; the run and its losses."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    with watch_model(model, optimizer, path, every=2, rows="all", log_to=log_to):
        for step in range(steps):
            loss = model(torch.randn(3, 5, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
            each_step(step)
    return open_run(path), losses


@pytest.fixture(autouse=True)
def nobody_is_called(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture
def each_step_is_a_block(monkeypatch):
    monkeypatch.setattr("attnscope.watch.watcher.FLUSH_SECONDS", 0.0)


def expected(run):
    """Name to [(step, value)], from the run directory by pandas."""
    found = {}
    for name in ("loss", "grad_norm", "clip_factor"):
        found[f"attnscope/{name}"] = list(zip(run.steps["step"], run.steps[name], strict=True))
    by_step = run.heads.groupby("step")
    for name in ("entropy_ratio", "max_prob"):
        found[f"attnscope/{name}"] = list(by_step[name].mean().items())
    found["attnscope/max_logit"] = list(by_step["max_logit"].max().items())
    for layer, rows in run.heads.groupby("layer"):
        largest = rows.groupby("step")["max_logit"].max()
        found[f"attnscope/layer {layer}/max_logit"] = list(largest.items())
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert [x for _, x in found[name]] == pytest.approx([x for _, x in values], rel=1e-5), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard", "ignore::DeprecationWarning:google")  # fmt: skip
def test_tensorboard_has_every_step_in_one_file(tmp_path, each_step_is_a_block):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, losses = train(tmp_path / "plain", None)
    run, same = train(tmp_path / "run", "tensorboard")
    assert same == losses and run.lost == () and run.heads.equals(plain.heads)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(file.parent)).Reload()
    found = {name: [(x.step, x.value) for x in events.Scalars(name)] for name in events.Tags()["scalars"]}  # fmt: skip
    assert_same(found, expected(run))
    assert not (tmp_path / "plain" / "tensorboard").exists()


def read_wandb(folder):
    """The rows of an offline run, and each metric's x axis."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows, axes = [], {}
    for record in map(Record.FromString, blocks_in(file.read_bytes())):
        if record.HasField("history"):
            items = record.history.item
            rows.append({"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items})
        if record.HasField("metric"):
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return rows, axes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_gets_rows_of_the_steps_and_loses_none_of_the_users(tmp_path, each_step_is_a_block):
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(console="off", silent=True)
    with wandb.init(dir=tmp_path, mode="offline", project="x", settings=settings) as mine:
        run, losses = train(tmp_path / "run", "wandb", each_step=lambda i: mine.log({"mine": i}, step=i))
    assert losses == train(tmp_path / "plain", None)[1]
    rows, axes = read_wandb(tmp_path)
    assert axes == {"attnscope/step": "", "attnscope/*": "attnscope/step"}
    assert [row["mine"] for row in rows if "mine" in row] == list(range(STEPS))
    wanted = expected(run)
    found = {name: [(row["attnscope/step"], row[name]) for row in rows if name in row] for name in wanted}  # fmt: skip
    assert_same(found, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")  # fmt: skip
def test_mlflow_has_every_step_also_after_the_script_ended_its_run(tmp_path, each_step_is_a_block):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        mlflow.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
        mlflow.set_experiment("e")
        active = mlflow.start_run()
        run, _ = train(tmp_path / "run", "mlflow", each_step=lambda i: mlflow.end_run() if i == 4 else None)  # fmt: skip
        client = mlflow.MlflowClient()
        run_id = active.info.run_id
        found = {
            name: sorted((x.step, x.value) for x in client.get_metric_history(run_id, name))
            for name in client.get_run(run_id).data.metrics
        }
        assert_same(found, expected(run))
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_without_an_active_run_it_is_said_once_and_training_goes_on(tmp_path, capsys, each_step_is_a_block, name):
    pytest.importorskip(name)
    run, losses = train(tmp_path / "run", name)
    assert losses == train(tmp_path / "plain", None)[1] and run.status == "finished"
    begins = {"wandb": "wandb.init()", "mlflow": "mlflow.start_run()"}[name]
    assert capsys.readouterr().err == (
        f"attnscope: {name} has no active run, so nothing is logged to it until the script calls {begins}.\n"
    )
    assert "tracker_failed" not in set(run.events["kind"])


def test_a_tracker_that_raises_is_not_called_again_and_training_goes_on(
    tmp_path, capsys, each_step_is_a_block, monkeypatch
):
    calls = []

    def write(moments):
        calls.append(moments)
        raise ConnectionError("no route\nto the server")

    monkeypatch.setattr(trackers, "TRACKERS", {"tensorboard": lambda path: write})
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr("attnscope.watch.settings.check_tracker", lambda name: None)
    run, losses = train(tmp_path / "run", "tensorboard")
    assert losses == train(tmp_path / "plain", None)[1] and len(calls) == 1
    assert run.status == "finished" and run.steps["step"].tolist() == list(range(STEPS))
    reason = "tensorboard: ConnectionError: no route to the server"
    assert capsys.readouterr().err == (
        f"attnscope: {reason}. Nothing more is logged to it; {tmp_path / 'run'} has everything.\n"
    )
    (fields,) = run.events[run.events["kind"] == "tracker_failed"]["fields"]
    assert fields == {"reason": reason}


def test_heads_without_rows_count_for_nothing_and_nan_is_handed_on():
    heads = {
        "step": np.array([0, 0, 0, 10]),
        "layer": np.array([0, 0, 1, 0]),
        "rows": np.array([4, 0, 4, 4]),
        "entropy_ratio": np.array([0.5, np.nan, 0.7, np.nan]),
        "max_prob": np.array([0.2, np.nan, 0.4, np.nan]),
        "max_logit": np.array([3.0, np.nan, np.inf, np.nan]),
    }
    steps = {name: np.array([1.0, 2.0]) for name in ("loss", "grad_norm", "clip_factor")}
    first, second, third = moments_of(steps | {"step": np.array([0, 1])}, heads)
    assert first.step == 0 and first.values == {
        "attnscope/loss": 1.0, "attnscope/grad_norm": 1.0, "attnscope/clip_factor": 1.0,
        "attnscope/entropy_ratio": pytest.approx(0.6), "attnscope/max_prob": pytest.approx(0.3),
        "attnscope/max_logit": np.inf, "attnscope/layer 0/max_logit": 3.0, "attnscope/layer 1/max_logit": np.inf,
    }  # fmt: skip
    assert second.step == 1 and len(second.values) == 3
    assert third.step == 10 and np.isnan(third.values["attnscope/layer 0/max_logit"])
    assert moments_of({}, {}) == []


def test_a_tracker_that_is_unknown_or_not_installed_is_said_before_anything_is_made(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^log_to is 'comet', but must be tensorboard, wandb or mlflow\.$"):  # fmt: skip
        train(tmp_path / "run", "comet")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(ConfigError) as raised:
            check_tracker(name)
        assert str(raised.value) == (
            f'log_to is {name!r}, which is not installed. Install it: pip install "attnscope[trackers]"'
        )
        with pytest.raises(ConfigError, match="not installed"):
            train(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


SCRIPT = """
import os, torch
os.mkdir("elsewhere"); os.chdir("elsewhere")
model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(2, 5, 16)).square().mean().backward()
    optimizer.step()
"""


def test_the_command_line_logs_for_an_unmodified_script(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "train.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "attnscope", "watch", "--name", "r", "--out", tmp_path / "runs", "--log-to", "tensorboard", "train.py"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "r" / "tensorboard").iterdir())) == 1
