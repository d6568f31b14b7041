"""Exported tables are the tables of the run, to the last bit."""

import json
import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from attnscope.errors import AttnscopeError, RunError, RunWriteError
from attnscope.export import export_run, tables
from attnscope.export.folder import safe_names
from attnscope.runs.layout import COLUMNS
from attnscope.runs.reader import open_run

FILES = ("steps", "heads", "layers", "params", "events")


def read(folder, table):
    """A table of an export as pandas reads it."""
    if (folder / f"{table}.csv").exists():
        kinds = {name: column.kind for name, column in COLUMNS.get(table, {}).items()}
        kinds |= {"member": object, "group": object}
        return pd.read_csv(folder / f"{table}.csv", dtype=kinds)
    return pq.read_table(folder / f"{table}.parquet").to_pandas()


def assert_same(found, expected):
    assert list(found.columns) == list(expected.columns)
    for name in expected.columns:
        if isinstance(expected[name].dtype, pd.CategoricalDtype):
            assert found[name].tolist() == expected[name].tolist(), name
        else:
            np.testing.assert_array_equal(found[name].to_numpy(), expected[name].to_numpy(), name)


@pytest.mark.parametrize("target", ["csv", "parquet"])
def test_every_number_comes_back_with_nan_and_inf_and_the_member_by_name(run_path, target):
    exported = export_run(open_run(run_path), target)
    folder = run_path / "export" / target
    assert exported.place == str(folder) and exported.lost == ()
    assert sorted(x.name for x in folder.iterdir()) == sorted(f"{t}.{target}" for t in FILES)
    run = open_run(run_path)
    for table in COLUMNS:
        assert exported.counts[f"{table}.{target}"] == len(getattr(run, table)) > 0
        assert_same(read(folder, table), getattr(run, table))
    loss = read(folder, "steps").query("member == 'unscaled'")["loss"].tolist()
    assert np.isnan(loss[2]) and loss[3] == np.inf


@pytest.mark.parametrize("target", ["csv", "parquet"])
def test_fields_of_events_are_strict_json_and_no_member_is_none(run_path, target):
    export_run(open_run(run_path), target)
    events = read(run_path / "export" / target, "events")
    assert events["kind"].tolist() == open_run(run_path).events["kind"].tolist()
    one = events[events["kind"] == "nonfinite"].iloc[0]
    assert one["member"] == "unscaled" and one["step"] == 2
    assert json.loads(one["fields"]) == {"tensor": "loss", "worst": "Infinity"}
    assert events[events["kind"] == "resumed"]["member"].isna().all()


def test_csv_says_nan_and_inf_in_words_that_others_read(run_path):
    export_run(open_run(run_path), "csv")
    lines = (run_path / "export" / "csv" / "steps.csv").read_text().splitlines()
    assert lines[0].startswith('"step","member","loss","val_loss","grad_norm"')
    rows = [line.split(",") for line in lines[1:] if '"unscaled"' in line]
    assert [row[2] for row in rows[2:]] == ["nan", "inf"] and rows[3][4] == "-inf"


def test_parquet_keeps_the_types_of_the_run(run_path):
    export_run(open_run(run_path), "parquet")
    schema = pq.read_schema(run_path / "export" / "parquet" / "heads.parquet")
    expected = {name: column.kind for name, column in COLUMNS["heads"].items()}
    found = {field.name: str(field.type).replace("float", "float32") for field in schema}
    assert found == expected | {"member": "string"}


@pytest.mark.parametrize("target", ["csv", "parquet"])
def test_parts_follow_each_other_and_rows_are_written_in_blocks(two_parts, target, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", 2)
    exported = export_run(open_run(two_parts), target)
    run, folder = open_run(two_parts), two_parts / "export" / target
    assert exported.lost == () == run.lost
    for table in COLUMNS:
        assert_same(read(folder, table), getattr(run, table))
    assert read(folder, "events")["member"].dropna().tolist() == ["one", "two"]
    if target == "parquet":
        assert pq.ParquetFile(folder / "steps.parquet").num_row_groups == 4


def test_a_column_that_old_files_do_not_have_is_missing_not_zero(run_path):
    frame = open_run(run_path).steps
    schema = tables._schema("steps")
    frame = frame.assign(tokens=np.float32("nan"))
    (batch,) = tables._batches(frame, schema)
    assert batch.column("tokens").null_count == len(frame)
    assert batch.column("val_loss").null_count == 0  # NaN is a number


@pytest.mark.parametrize("target", ["csv", "parquet"])
def test_runs_without_records_give_empty_tables_with_their_columns(empty, events_only, target):
    for path, n_events in ((empty, 0), (events_only, 2)):
        exported = export_run(open_run(path), target)
        folder = path / "export" / target
        for table in COLUMNS:
            found = read(folder, table)
            assert len(found) == 0 and list(found.columns) == list(COLUMNS[table])
        events = read(folder, "events")
        assert len(events) == exported.counts[f"events.{target}"] == n_events
    assert events["member"].tolist()[-1] == "scaled"


def test_what_could_not_be_read_is_said(run_path):
    place = run_path / "part-0000" / "steps-0000.arrow"
    place.write_bytes(place.read_bytes()[:-40])
    (line,) = export_run(open_run(run_path), "csv").lost
    assert "steps-0000.arrow" in line and "not a complete batch" in line


def test_an_export_replaces_the_one_before_but_no_other_folder(run_path, tmp_path):
    export_run(open_run(run_path), "csv")
    (run_path / "export" / "csv" / "old").touch()
    export_run(open_run(run_path), "csv")
    assert not (run_path / "export" / "csv" / "old").exists()
    export_run(open_run(run_path), "csv", out=run_path / "export" / "csv")  # the same by name
    (tmp_path / "mine").mkdir()
    export_run(open_run(run_path), "csv", out=tmp_path / "mine")  # nothing is lost
    before = (tmp_path / "mine" / "steps.csv").read_bytes()
    with pytest.raises(AttnscopeError) as refused:
        export_run(open_run(run_path), "parquet", out=tmp_path / "mine")
    assert str(refused.value) == (f"{tmp_path / 'mine'} already exists. Choose another --out, or delete it.")
    assert (tmp_path / "mine" / "steps.csv").read_bytes() == before
    assert {x.name for x in tmp_path.iterdir()} == {"mine", "r"}
    assert {x.name for x in (run_path / "export").iterdir()} == {"csv"}


@pytest.mark.parametrize("link", ["export", "export/csv"])
def test_a_link_in_the_run_leads_nowhere(run_path, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    (run_path / link).parent.mkdir(exist_ok=True)
    (run_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is a link or a file"):
        export_run(open_run(run_path), "csv")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_link_to_itself_is_no_traceback(run_path, tmp_path):
    (run_path / "export").symlink_to("export")
    with pytest.raises(RunError, match="is a link or a file"):
        export_run(open_run(run_path), "csv")
    export_run(open_run(run_path), "csv", out=tmp_path / "mine")


def test_an_export_that_fails_leaves_nothing_and_keeps_the_one_before(run_path, monkeypatch):
    export_run(open_run(run_path), "csv")
    before = (run_path / "export" / "csv" / "heads.csv").read_bytes()

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tables, "_batches", full)
    with pytest.raises(RunWriteError) as refused:
        export_run(open_run(run_path), "csv")
    assert str(refused.value) == (
        f"{run_path / 'export' / 'csv'}: no space left on device. Put that right, or name another folder with --out."
    )
    assert (run_path / "export" / "csv" / "heads.csv").read_bytes() == before
    assert {x.name for x in (run_path / "export").iterdir()} == {"csv"}


def test_a_folder_below_a_file_is_refused(run_path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunWriteError, match="name another folder with --out"):
        export_run(open_run(run_path), "csv", out=tmp_path / "file" / "x")


def test_an_unknown_target_is_refused_with_the_nearest(run_path):
    with pytest.raises(AttnscopeError) as refused:
        export_run(open_run(run_path), "parket")
    assert str(refused.value) == (
        "There is no export to parket. Did you mean parquet? Use csv, parquet, tensorboard, wandb, mlflow."
    )


def test_safe_names_stay_in_their_folder_and_differ_whatever_their_case():
    names = ["../x", "a/b", "a\\b", "..", "", "<script>", "Scaled", "scaled", "é" * 300, "é" * 301]
    safe = safe_names(names)
    assert list(safe) == names
    assert len({name.casefold() for name in safe.values()}) == len(names)
    for name in safe.values():
        assert name.strip(" .") == name != "" and not set('/\\<>:"|?*\0') & set(name)
        assert len(name.encode()) < 255
    assert (safe["Scaled"], safe["scaled"]) == ("Scaled", "scaled_2")
