"""Programs with a known fault in them, and how the answers to them are counted."""

import json
import math
from dataclasses import replace

import pytest

from attnscope.bench.faults.kinds import BASES, FAULTS
from attnscope.bench.faults.loop import train
from attnscope.bench.faults.population import (
    HEALTHY,
    LIST,
    REPORTED,
    TUNED,
    cases,
    changed,
    read_list,
    train_all,
)
from attnscope.bench.faults.recipe import Recipe
from attnscope.diagnose import RULES
from attnscope.runs.reader import open_run

SHORT = {"d_model": 32, "n_layers": 2, "steps": 12, "batch_size": 4, "seq_len": 24}


def test_every_fault_changes_what_a_recipe_has_and_names_rules_that_there_are():
    rules = {rule.__name__ for rule in RULES}
    for fault in FAULTS:
        assert any(fault.fits(base) for base in BASES.values()), fault.name
        assert set(fault.right) <= rules, f"{fault.name}: {set(fault.right) - rules}"
        for changes in fault.strengths:
            assert all(changed(base, changes) != base for base in BASES.values() if fault.fits(base))
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30


def test_halves_share_no_program_and_no_seed():
    population = cases()
    for of in ("base", "name"):
        halves = [{getattr(case, of) for case in population if case.half == half} for half in (TUNED, REPORTED)]
        assert halves[0] and halves[1] and not halves[0] & halves[1]
    seeds = [{case.recipe.seed for case in population if case.half == half} for half in (TUNED, REPORTED)]
    assert not seeds[0] & seeds[1]
    assert len({case.name for case in population}) == len(population)
    assert sum(case.fault == HEALTHY for case in population) >= 200


@pytest.mark.parametrize("base", BASES)
def test_each_program_trains_under_watch_and_its_attention_is_seen(tmp_path, base):
    source = (
        "stdlib" if BASES[base].source == "recall" else BASES[base].source
    )  # its sequences have a length of their own
    ended = train(replace(BASES[base], **SHORT, source=source), tmp_path / "r")
    run = open_run(tmp_path / "r")
    assert math.isfinite(ended.final_loss) and math.isfinite(ended.held_out_loss)
    assert len(run.steps) == SHORT["steps"]
    assert run.heads["layer"].nunique() == SHORT["n_layers"] and run.heads["entropy"].notna().all()


def test_a_program_that_looks_ahead_is_worth_nothing_where_nobody_knows_what_comes(tmp_path):
    recipe = replace(Recipe(), **SHORT | {"steps": 120, "batch_size": 8})
    good, leaking = (train(replace(recipe, mask=mask), tmp_path / mask) for mask in ("causal", "off_by_one"))
    assert leaking.final_loss < good.final_loss - 0.5
    assert leaking.held_out_loss > good.held_out_loss + 0.2


def test_what_is_done_is_not_done_again_and_a_list_that_was_cut_short_is_read(tmp_path):
    first, second = (replace(case, recipe=replace(case.recipe, **SHORT, source="stdlib")) for case in cases()[:2])
    told = []
    trained = train_all([first], tmp_path, jobs=1, on_done=lambda one, left: told.append((one.case, left)))
    assert told == [(first.name, 0)] and read_list(tmp_path) == trained
    with (tmp_path / LIST).open("a") as log:
        log.write('{"case": "cut')
    (tmp_path / LIST).write_text(json.dumps(json.loads((tmp_path / LIST).read_text().splitlines()[0])) + "\n")
    both = train_all([first, second], tmp_path, jobs=1, on_done=lambda one, left: told.append((one.case, left)))
    assert told[1:] == [(second.name, 0)] and both[0] == trained[0]
    assert {open_run(tmp_path / case.name).status for case in (first, second)} == {"finished"}
