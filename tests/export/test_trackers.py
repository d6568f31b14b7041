"""Trackers read back what was exported to them."""

import json
import math
import struct
import subprocess
import sys

import pytest

from attnscope.errors import AttnscopeError
from attnscope.export import export_run
from attnscope.runs.reader import open_run
from tests.export.test_scalars import edit, scalars

# What trackers and the packages below them warn of is theirs to put right.
pytestmark = pytest.mark.filterwarnings("ignore")

WHY = 'needs the extra: pip install "attnscope[trackers]"'
HOSTILE = ["../x", '<script>alert("a/b")</script>']


@pytest.fixture(autouse=True)
def nobody_is_called(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / ".wandb"))


def rename(path):
    def change(raw):
        for member, name in zip(raw["members"], HOSTILE, strict=True):
            member["name"] = name

    edit(path, change)


def numbers(path):
    """Member to (step, tag) to number."""
    return {
        name: {(s, tag): x for s, moment in moments.items() for tag, x in moment.values.items()}
        for name, moments in scalars(path).items()
    }


def same(found, expected, *, huge=math.inf):
    """Equal as float32, NaN for NaN; `huge` is what stands for Inf."""
    stored = {place: math.copysign(huge, x) if math.isinf(x) else x for place, x in expected.items()}
    return found == pytest.approx(stored, nan_ok=True, rel=1e-7, abs=0)


def everything_in(folder):
    return {str(x.relative_to(folder)) for x in folder.rglob("*")}


def read_tensorboard(folder):
    pytest.importorskip("tensorboard", reason=WHY)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {(event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


def test_tensorboard_reads_every_number_of_every_member(run_path):
    pytest.importorskip("tensorboard", reason=WHY)
    exported = export_run(open_run(run_path), "tensorboard")
    expected = numbers(run_path)
    assert exported.counts == {name: len(values) for name, values in expected.items()}
    for name, values in expected.items():
        assert same(read_tensorboard(run_path / "export" / "tensorboard" / name), values)


def test_tensorboard_needs_no_torch(run_path):
    pytest.importorskip("tensorboard", reason=WHY)
    code = (
        "import sys; from attnscope.export import export_run; from attnscope.runs.reader import open_run;"
        f"export_run(open_run({str(run_path)!r}), 'tensorboard');"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorboard_folders_of_hostile_members_stay_where_they_belong(run_path, tmp_path):
    pytest.importorskip("tensorboard", reason=WHY)
    rename(run_path)
    before = everything_in(tmp_path)
    exported = export_run(open_run(run_path), "tensorboard", out=tmp_path / "tb")
    assert list(exported.counts) == HOSTILE
    assert all(x.startswith("tb") for x in everything_in(tmp_path) - before)
    folders = sorted(x.name for x in (tmp_path / "tb").iterdir())
    assert folders == ["_script_alert__a_b____script_", "_x"]


def test_tensorboard_has_members_without_records(empty, events_only):
    pytest.importorskip("tensorboard", reason=WHY)
    for path in (empty, events_only):
        exported = export_run(open_run(path), "tensorboard")
        assert exported.counts == {"unscaled": 0, "scaled": 0}
        assert read_tensorboard(path / "export" / "tensorboard" / "scaled") == {}


def read_wandb(folder):
    """Of each offline run its name, group, settings, outcome and numbers, from the file that `wandb sync` reads."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        about, values, outcome = None, {}, {}
        for data in blocks_in(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                about = about or record.run
            if record.HasField("history"):
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = items.pop("_step")
                values |= {(step, k): float(x) for k, x in items.items() if k[0] != "_"}
            if record.HasField("summary"):
                outcome |= {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.summary.update
                    if not (item.key or item.nested_key[0]).startswith("_")
                }
        settings = {x.key: json.loads(x.value_json) for x in about.config.update}
        found[about.display_name] = (about, settings, outcome, values)
    return found


def blocks_in(data):
    """The records of a LevelDB log (github.com/google/leveldb, doc/log_format.md), after wandb's 7 bytes."""
    size, at, record = 1 << 15, 7, b""
    while at + 7 <= len(data):
        if size - at % size < 7:  # no room for a header
            at += size - at % size
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb_keeps_every_number_offline_with_settings_and_outcome(run_path):
    pytest.importorskip("wandb", reason=WHY)
    exported = export_run(open_run(run_path), "wandb")
    folder = run_path / "export" / "wandb"
    assert exported.next_command == f"wandb sync {folder}/wandb/offline-run-*"
    found, expected = read_wandb(folder), numbers(run_path)
    assert set(found) == set(expected)
    for name, (about, settings, _outcome, values) in found.items():
        assert (about.run_group, about.project, about.job_type) == ("r", "attnscope", "train")
        assert same(values, expected[name])
        assert settings["attention.scale"] == {"unscaled": "none", "scaled": "inverse_sqrt"}[name]
        assert settings["model.d_model"] == 128
        assert exported.counts[name] == len(values)
    assert found["unscaled"][2]["status"] == "diverged"
    assert found["unscaled"][2]["nonfinite_at"] == 2


def test_wandb_takes_hostile_names_and_members_without_records(run_path, events_only, tmp_path):
    pytest.importorskip("wandb", reason=WHY)
    rename(run_path)
    before = everything_in(tmp_path)
    export_run(open_run(run_path), "wandb", out=tmp_path / "wb")
    assert all(x.startswith(("wb", ".wandb")) for x in everything_in(tmp_path) - before)
    assert set(read_wandb(tmp_path / "wb")) == set(HOSTILE)
    export_run(open_run(events_only), "wandb")
    found = read_wandb(events_only / "export" / "wandb")
    for member in open_run(events_only).members:
        assert found[member.name][2] == {"status": member.status, "error": member.error}
        assert not found[member.name][3]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("disabled", "WANDB_MODE is disabled: nothing would be written."),
        ("sometimes", "wandb: 1 validation error for Settings"),
    ],
)
def test_wandb_that_cannot_record_says_so_in_one_line(run_path, monkeypatch, mode, said):
    pytest.importorskip("wandb", reason=WHY)
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(AttnscopeError) as refused:
        export_run(open_run(run_path), "wandb")
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    assert "offline" in str(refused.value)
    assert not list(run_path.glob("export/*"))


@pytest.fixture
def mlflow_client():
    """Opens a store, and lets go of it."""
    pytest.importorskip("mlflow", reason=WHY)
    pytest.importorskip("sqlalchemy", reason=WHY)
    from mlflow import MlflowClient

    clients = []

    def open_store(uri):
        clients.append(MlflowClient(tracking_uri=uri))
        return clients[-1]

    yield open_store
    for client in clients:
        client._tracking_client.store.engine.dispose()


def read_mlflow(client, experiment):
    """Member to its run and its numbers."""
    (found,) = client.search_experiments(filter_string=f"name = '{experiment}'")
    members = {}
    for run in client.search_runs([found.experiment_id]):
        values = {
            (metric.step, tag): metric.value
            for tag in run.data.metrics
            for metric in client.get_metric_history(run.info.run_id, tag)
        }
        members[run.info.run_name] = (run, values)
    return members


def test_mlflow_reads_every_number_of_every_member(run_path, mlflow_client, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    exported = export_run(open_run(run_path), "mlflow")
    uri = f"sqlite:///{run_path / 'export' / 'mlflow' / 'mlflow.db'}"
    assert uri in exported.next_command
    found, expected = read_mlflow(mlflow_client(uri), "r"), numbers(run_path)
    assert set(found) == set(expected)
    for name, (run, values) in found.items():
        assert same(values, expected[name], huge=sys.float_info.max)  # MLflow's own Inf
        assert exported.counts[name] == len(values)
        assert run.info.status == "FINISHED"
        assert run.info.artifact_uri.startswith((run_path / "export" / "mlflow").as_uri())
        assert 0 < run.info.start_time <= run.info.end_time
        assert run.data.params["model.d_model"] == "128"
    assert found["unscaled"][0].data.params["attention.scale"] == "none"
    assert found["unscaled"][0].data.tags["attnscope.status"] == "diverged"
    assert everything_in(run_path / "export") == {"mlflow", "mlflow/mlflow.db"}
    assert not everything_in(tmp_path / "here")


def test_mlflow_goes_where_its_uri_says_and_adds_to_what_is_there(
    run_path, events_only, tmp_path, monkeypatch, mlflow_client
):
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    rename(run_path)
    edit(run_path, lambda raw: raw["members"][0]["settings"].update({"../x\n": ["<script>"] * 999}))
    monkeypatch.chdir(tmp_path)
    for path in (run_path, run_path, events_only):
        exported = export_run(open_run(path), "mlflow")
        assert exported.place == uri
        assert exported.next_command == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    client = mlflow_client(uri)
    assert set(read_mlflow(client, "r")) == set(HOSTILE)
    assert len(client.search_runs([client.get_experiment_by_name("r").experiment_id])) == 4
    assert {run.info.status for run, _ in read_mlflow(client, "events").values()} == {"FAILED"}
    assert {x.name for x in tmp_path.iterdir()} == {"r", "events", "store.db"}
    with pytest.raises(AttnscopeError, match="--out has no effect where MLFLOW_TRACKING_URI"):
        export_run(open_run(run_path), "mlflow", out="x")


def test_mlflow_that_refuses_says_so_in_one_line_without_passwords(run_path, monkeypatch):
    pytest.importorskip("mlflow", reason=WHY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://me:secret@host/x")
    with pytest.raises(AttnscopeError) as refused:
        export_run(open_run(run_path), "mlflow")
    said = str(refused.value)
    assert said.startswith("MLflow at nonsense://host/x: ") and said.endswith("try again.")
    assert "\n" not in said and "secret" not in said


@pytest.mark.parametrize(
    ("target", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(run_path, monkeypatch, target, package):
    for name in [x for x in sys.modules if x.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AttnscopeError) as refused:
        export_run(open_run(run_path), target)
    assert str(refused.value) == (f'{package} is not installed. Install it: pip install "attnscope[trackers]"')
    assert not list(run_path.glob("export/*"))
