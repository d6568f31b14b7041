"""What trackers are given: names, order, and nothing that was not measured."""

import json
import math

import pytest

from attnscope.export.parts import by_part
from attnscope.export.scalars import scalars_of, start_of
from attnscope.export.settings import outcome_of, settings_of
from attnscope.runs.layout import COLUMNS, KEYS
from attnscope.runs.reader import open_run


def scalars(path):
    """Member to its moments, by step."""
    found = {}
    for part in by_part(open_run(path), []):
        for member, moments in scalars_of(part):
            found[member.name] = {moment.step: moment for moment in moments}
            assert list(found[member.name]) == sorted(found[member.name])
    return found


def edit(path, change):
    """As somebody else could have written run.json."""
    raw = json.loads((path / "run.json").read_text())
    change(raw)
    (path / "run.json").write_text(json.dumps(raw))


def test_every_number_has_one_name(run_path):
    found, run = scalars(run_path), open_run(run_path)
    assert list(found) == ["unscaled", "scaled"]
    for name, moments in found.items():
        expected = {}
        for table in COLUMNS:
            frame = getattr(run, table)
            for row in frame[frame["member"] == name].to_dict("records"):
                layer = f"layer {row['layer']}/" if row.get("layer", -1) >= 0 else ""
                head = f"head {row['head']}/" if "head" in row else ""
                group = f"{row['group']}/" if "group" in row else ""
                for column in COLUMNS[table].keys() - set(KEYS[table]):
                    tag = f"{table}/{layer}{head}{group}{column}"
                    if not (tag == "steps/val_loss" and math.isnan(row[column])):
                        expected[row["step"], tag] = float(row[column])
        written = {(s, tag): x for s, each in moments.items() for tag, x in each.values.items()}
        assert written == pytest.approx(expected, nan_ok=True, abs=0, rel=0)
    names = found["scaled"][0].values
    assert {
        "steps/loss",
        "heads/layer 0/head 1/entropy",
        "layers/layer 1/activation_rms",
        "params/layer 0/q/grad_norm",
        "params/embedding/grad_norm",
    } <= set(names)


def test_nan_and_inf_are_handed_on_but_no_loss_that_was_not_evaluated(run_path):
    moments = scalars(run_path)["unscaled"]
    assert math.isnan(moments[2].values["steps/loss"])
    assert moments[3].values["steps/loss"] == math.inf
    assert ["steps/val_loss" in moment.values for moment in moments.values()] == [*(True, False, False, False)]


def test_of_a_watched_run_what_was_not_measured_is_left_out_but_never_the_loss(watched):
    names = scalars(watched)["watched"][0].values
    assert math.isnan(names["steps/loss"]) and "steps/lr" in names
    assert not {"steps/grad_norm", "steps/log_z", "steps/val_loss"} & set(names)


def test_times_begin_with_the_run_and_never_go_back(run_path):
    moments = scalars(run_path)["scaled"]
    seconds = [moment.seconds for moment in moments.values()]
    assert seconds == sorted(seconds) and seconds[0] >= start_of(open_run(run_path)) > 1.7e9
    took = open_run(run_path).steps.query("member == 'scaled'")["step_ms"].sum() / 1000
    assert seconds[-1] - start_of(open_run(run_path)) == pytest.approx(took, rel=1e-3)


@pytest.mark.parametrize("created", ["yesterday", "0001-01-01T00:00:00", "9999-12-31T23:59:59+00"])
def test_a_strange_date_is_no_error(run_path, created):
    edit(run_path, lambda raw: raw.update(created=created))
    assert start_of(open_run(run_path)) >= 0


def test_every_part_is_looked_at_once(two_parts):
    lost = []
    names = [part.entries[0].name for part in by_part(open_run(two_parts), lost)]
    assert names == ["one", "two"] and lost == []
    assert {len(moments) for moments in scalars(two_parts).values()} == {3}


def test_part_folders_that_no_member_is_in_are_lost_once(two_parts):
    (two_parts / "part-0007").mkdir()
    lost = []
    for _ in by_part(open_run(two_parts), lost):
        pass
    assert lost == ["part-0007: no member of run.json is in it; left out"]


def test_settings_are_those_of_the_member(run_path, watched):
    (run,) = by_part(open_run(run_path), [])
    lost = []
    unscaled, scaled = (settings_of(run, member, lost) for member in run.members)
    assert unscaled["attention.scale"] == "none" and scaled["attention.scale"] == "inverse_sqrt"
    assert unscaled["optimizer.betas"] == "[0.9, 0.95]"
    assert unscaled["model.d_model"] == 128 and lost == []
    (run,) = by_part(open_run(watched), [])
    assert settings_of(run, run.members[0], lost) == {"command": "attnscope watch train.py"}


def test_a_config_of_another_version_costs_its_settings_only(run_path):
    edit(run_path, lambda raw: raw["config"].update(future={"a": 1}))
    run, lost = open_run(run_path), []
    settings = [settings_of(run, member, lost) for member in run.members]
    assert settings[0] == {"attention.scale": "none"}
    assert len(lost) == 1 and "future" in lost[0]


def test_the_outcome_leaves_out_what_is_not_known(run_path, empty):
    unscaled = outcome_of(open_run(run_path).members[0])
    assert (unscaled["status"], unscaled["nonfinite_at"]) == ("diverged", 2)
    assert set(outcome_of(open_run(empty).members[0])) == {"status"}
