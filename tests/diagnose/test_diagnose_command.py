"""`attnscope diagnose`, as a person and as a machine read it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from attnscope.cli import app
from attnscope.diagnose import RULES
from tests.diagnose.synthetic import heads_table, run_of, steps_table


def diagnose(*words):
    return CliRunner().invoke(app, ["diagnose", *map(str, words)], env={"COLUMNS": "80"})


@pytest.fixture
def unscaled(tmp_path):
    """A cause, and nothing that came of it."""
    run_of(
        tmp_path / "unscaled",
        {"attention": {"scale": "none"}},
        steps=steps_table(np.full((1, 40), 4.0)),
        heads=heads_table(1, [0], entropy_ratio=0.25),
    )
    return tmp_path / "unscaled"


@pytest.fixture
def on_purpose(tmp_path):
    """Odd, and it did no harm."""
    run_of(
        tmp_path / "mup",
        {"attention": {"scale": "inverse"}},
        steps=steps_table(np.full((1, 40), 4.0)),
        heads=heads_table(1, [0]),
    )
    return tmp_path / "mup"


@pytest.fixture
def exploded(tmp_path):
    """A symptom whose cause is not in the run."""
    run_of(tmp_path / "exploded", steps=steps_table([4.0, 4.0, np.nan]), heads=heads_table(1, [0]))
    return tmp_path / "exploded"


@pytest.fixture
def healthy(tmp_path):
    run_of(tmp_path / "healthy", steps=steps_table(np.full((1, 40), 4.0)), heads=heads_table(1, [0]))
    return tmp_path / "healthy"


def test_findings_are_readable_at_80_columns_and_plain_in_a_pipe(unscaled):
    done = diagnose(unscaled)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "cause (warning): Attention logits are not scaled by 1/sqrt(d_head)"
    *said, last = lines
    assert max(map(len, said)) <= 80
    assert not [line for line in lines if line != line.rstrip()], "trailing blanks"
    assert "\x1b" not in done.stdout
    assert any(line.split()[:2] == ["unscaled", "0"] for line in said), "no evidence"
    assert last == f"Next: attnscope report {unscaled}"


def test_no_findings_is_said_in_words_with_what_was_looked_at(healthy):
    done = diagnose(healthy)
    assert done.exit_code == 0
    assert done.stdout.startswith("No findings. Looked at 1 member (40 records of steps, 1 of")
    assert f"of {len(RULES)} rules." in " ".join(done.stdout.split()) and f"attnscope report {healthy}" in done.stdout


def test_json_is_strict_and_whole(exploded):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    said = json.loads(diagnose(exploded, "--json").stdout, parse_constant=refuse)
    assert [finding["rule"] for finding in said["findings"]] == ["nonfinite", "loss_explosion"]
    assert said["chains"] == [["nonfinite", "loss_explosion"]]
    assert said["findings"][1]["evidence"][0]["value"] == "NaN"
    assert said["run"] == exploded.name and "loss_spike" in said["rules"]


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_fail_on_gives_exit_code_3_for_what_is_as_bad_or_of_that_rule(unscaled, exploded, healthy, as_json):
    codes = {
        asked: [diagnose(run, "--fail-on", asked, *as_json).exit_code for run in (unscaled, exploded, healthy)]
        for asked in ("error", "warning", "applied_scale", "nonfinite", "loss_spike")
    }
    assert codes == {
        "error": [0, 3, 0],
        "warning": [3, 3, 0],
        "applied_scale": [3, 0, 0],
        "nonfinite": [0, 3, 0],
        "loss_spike": [0, 0, 0],
    }


def test_a_note_is_told_and_fails_nothing_but_its_own_name(on_purpose):
    for asked, code in (("error", 0), ("warning", 0), ("unusual_scale", 3)):
        done = diagnose(on_purpose, "--fail-on", asked)
        assert done.exit_code == code
        assert done.stdout.startswith("note: The attention scale is not 1/sqrt(d_head)")


def test_wrong_command_lines_and_runs_are_refused(tmp_path, unscaled):
    wrong = diagnose(unscaled, "--fail-on", "everything")
    assert wrong.exit_code == 2 and "'everything' is none of error, warning and the rules: " in wrong.stderr
    assert diagnose().exit_code == 2
    done = diagnose(tmp_path / "nowhere", "--fail-on", "error")
    assert done.exit_code == 1
    assert "no such run" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Traceback" in diagnose(tmp_path / "nowhere", "--debug").stderr


def test_what_could_not_be_read_is_said_on_stderr(healthy):
    place = healthy / "part-0000" / "steps-0000.arrow"
    place.write_bytes(place.read_bytes()[:-40])
    done = diagnose(healthy)
    assert done.exit_code == 0 and "not a complete batch" in done.stderr


def test_names_of_strangers_are_not_markup(tmp_path, exploded):
    raw = json.loads((exploded / "run.json").read_text())
    raw["members"][0]["name"] = "[bold red]x[/] \x1b[31m" + "long" * 100
    (exploded / "run.json").write_text(json.dumps(raw))
    done = diagnose(exploded)
    assert done.exit_code == 0
    assert "[bold red]x[/]" in done.stdout and "\x1b" not in done.stdout
