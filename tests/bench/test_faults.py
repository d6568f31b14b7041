"""Programs with a known fault in them, and how the answers to them are counted."""

import json
import math
from dataclasses import asdict, replace

import pytest

from attnscope.bench.faults.bases import BASES, available
from attnscope.bench.faults.kinds import FAULTS, changed
from attnscope.bench.faults.lab import LAB_BASES, config_of
from attnscope.bench.faults.loop import train
from attnscope.bench.faults.population import (
    HEALTHY,
    LAB,
    LIST,
    REPORTED,
    TUNED,
    TWIN,
    WATCH,
    Done,
    cases,
    read_list,
    train_all,
    train_one,
)
from attnscope.bench.faults.recipe import Recipe
from attnscope.config import apply_changes
from attnscope.diagnose import RULES
from attnscope.runs.reader import open_run

SHORT = {"d_model": 32, "n_layers": 2, "steps": 12, "batch_size": 4, "seq_len": 24}


def done(fault, base="a", *, half=REPORTED, seed=1, loss=2.0, name=None):
    return Done(
        case=name or f"{fault}-{base}-{seed}",
        fault=fault,
        base=base,
        strength=0,
        half=half,
        seed=seed,
        final_loss=loss,
        held_out_loss=loss,
        error=None,
    )


def short_of(case):
    """The same program, of a few steps."""
    if case.where == LAB:
        changes = {
            "model.d_model": 32,
            "model.seq_len": 24,
            "data.batch_size": 4,
            "data.source": "markov",
            "train.steps": 12,
        }
        return replace(case, recipe=apply_changes(case.recipe, changes, where="test"))
    return replace(case, recipe=replace(case.recipe, **SHORT, source="markov"))


def test_every_fault_changes_what_a_program_has_and_names_rules_that_there_are():
    rules = {rule.__name__ for rule in RULES}
    for fault in FAULTS:
        assert set(fault.right) <= rules, f"{fault.name}: {set(fault.right) - rules}"
        fitting = [base for base in BASES.values() if fault.fits(base)]
        in_lab = [base for base in LAB_BASES if fault.fits_lab(config_of(base, {}, seed=0))]
        assert bool(fitting and fault.strengths) or bool(in_lab and fault.lab), fault.name
        assert bool(fault.strengths) <= bool(fitting) and bool(fault.lab) <= bool(in_lab), fault.name
        for changes in fault.strengths:
            assert all(changed(base, changes) != base for base in fitting), fault.name
        for changes in fault.lab:
            for base in in_lab:
                assert config_of(base, changes, seed=0) != config_of(base, {}, seed=0), fault.name
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30


def test_halves_share_no_program_and_no_seed():
    population = cases()
    for of in ("base", "name"):
        halves = [{getattr(case, of) for case in population if case.half == half} for half in (TUNED, REPORTED)]
        assert halves[0] and halves[1] and not halves[0] & halves[1]
    seeds = [{case.seed for case in population if case.half == half} for half in (TUNED, REPORTED)]
    assert not seeds[0] & seeds[1]
    assert len({case.name for case in population}) == len(population)
    assert sum(case.fault == HEALTHY for case in population) >= 200


def test_each_half_has_programs_of_every_sort():
    for of in (0, 1):
        watched = list(BASES.values())[of::2]
        for field, values in (
            ("objective", {"next_token", "masked"}),
            ("norm", {"pre", "post", "none"}),
            ("optimizer", {"sgd", "adamw", "muon"} - ({"sgd"} if of else set())),
            ("position", {"learned", "rope"}),
            ("source", {"stdlib", "markov", "recall"}),
        ):
            assert {getattr(recipe, field) for recipe in watched} >= values, field
        lab = [config_of(base, {}, seed=0) for base in list(LAB_BASES)[of::2]]
        assert {config.model.kind for config in lab} == {"decoder", "encoder"}
        assert {config.model.norm for config in lab} == {"pre", "post", "none"}
        assert {config.optimizer.name for config in lab} == {"sgd", "adamw", "muon"}
        assert len({config.data.source for config in lab}) == 3
        assert {config.model.position for config in lab} >= {"learned", "rope"}


def test_a_small_population_has_every_fault_in_both_places_it_can_be_put_into():
    small, whole = cases(n_seeds=1, n_healthy=32, strongest=True), cases()
    for where in (WATCH, LAB):
        kinds = {(case.fault, case.half) for case in whole if case.where == where}
        assert {(case.fault, case.half) for case in small if case.where == where} == kinds
    assert len(small) < len(whole) / 8
    assert {case.base for case in small if case.fault != TWIN} == {*BASES, *LAB_BASES}


def test_programs_that_need_transformers_are_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("attnscope.bench.faults.bases.has_transformers", lambda: False)
    assert {*BASES} - {*available()} == {"gpt2", "gpt2 dropout"}
    half_of = {case.base: case.half for case in cases() if case.where == WATCH}
    assert "gpt2" not in half_of
    monkeypatch.undo()
    assert half_of.items() <= {case.base: case.half for case in cases()}.items()  # the others stay in their halves


@pytest.mark.slow
@pytest.mark.parametrize("base", [*BASES, *LAB_BASES])
def test_each_fault_can_be_put_into_each_program_that_it_fits(tmp_path, base):
    seen = set()
    for case in cases(n_seeds=1, n_healthy=0):
        if case.base == base and case.fault != TWIN:
            shorter = (
                replace(case, recipe=replace(case.recipe, steps=2, poison_at=min(1, case.recipe.poison_at)))
                if case.where == WATCH
                else replace(case, recipe=apply_changes(case.recipe, {"train.steps": 2}, where="test"))
            )
            ended = train_one(shorter, tmp_path)
            assert ended.error is None, f"{case.name}: {ended.error}"
            assert open_run(tmp_path / case.name).status == "finished", case.name
            seen.add(case.fault)
    assert len(seen) > 5


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


@pytest.mark.parametrize("base", ["lab pre", "lab encoder"])
def test_a_run_of_the_lab_is_one_member_and_is_worth_its_held_out_loss(tmp_path, base):
    (case,) = (case for case in cases(n_seeds=1, n_healthy=0) if case.base == base and case.fault == TWIN)
    ended = train_one(short_of(case), tmp_path)
    assert ended.where == LAB and ended.error is None
    assert math.isfinite(ended.final_loss) and math.isfinite(ended.held_out_loss)
    run = open_run(tmp_path / case.name)
    assert len(run.members) == 1 and len(run.steps) == 12


def test_what_is_done_is_not_done_again_and_a_list_that_was_cut_short_is_read(tmp_path):
    population = cases(n_seeds=1, n_healthy=0)
    first = short_of(next(case for case in population if case.where == WATCH))
    second = short_of(next(case for case in population if case.where == LAB))
    told = []
    trained = train_all([first], tmp_path, jobs=1, on_done=lambda one, left: told.append((one.case, left)))
    assert told == [(first.name, 0)] and read_list(tmp_path) == trained
    (tmp_path / second.name / "part-0000").mkdir(parents=True)  # of a process that was killed
    with (tmp_path / LIST).open("a") as log:
        log.write('{"case": "cut')
    both = train_all([first, second], tmp_path, jobs=1, on_done=lambda one, left: told.append((one.case, left)))
    assert told[1:] == [(second.name, 0)] and both[0] == trained[0]
    assert [one.where for one in read_list(tmp_path)] == [WATCH, LAB]
    assert {open_run(tmp_path / case.name).status for case in (first, second)} == {"finished"}


def test_a_list_of_before_there_were_runs_of_the_lab_is_read(tmp_path):
    old = asdict(done("twin"))
    del old["where"]
    (tmp_path / LIST).write_text(json.dumps(old) + "\n")
    assert [one.where for one in read_list(tmp_path)] == [WATCH]
