"""How answers are counted: harm, what is right, and how much of what a rule says is."""

import math
from dataclasses import dataclass, replace

import pytest

from attnscope.bench.faults import answered as asking
from attnscope.bench.faults.answered import FILE, LIST, ask, ask_all, from_row, read_answers, to_row, write_answers
from attnscope.bench.faults.goals import goals
from attnscope.bench.faults.kinds import FAULTS
from attnscope.bench.faults.loop import train
from attnscope.bench.faults.population import HEALTHY, TUNED
from attnscope.bench.faults.publish import write_outcome
from attnscope.bench.faults.recipe import Recipe
from attnscope.bench.faults.score import TWIN, answers, layers_of, score
from attnscope.findings import Confidence
from tests.bench.answers import answered, done, said

KIND = next(fault for fault in FAULTS if not fault.is_structural)
STRUCTURAL = next(fault for fault in FAULTS if fault.is_structural)
RIGHT = KIND.right[0]
BROKEN = {"loss": math.inf}


def test_a_program_does_harm_where_it_is_worse_than_its_twin_by_more_than_seeds_differ():
    population = [answered(done(TWIN, seed=seed, loss=loss)) for seed, loss in ((1, 2.00), (3, 2.02), (5, 2.04))]
    population += [
        answered(done(KIND.name, seed=1, loss=2.05)),
        answered(done(KIND.name, seed=3, loss=2.30)),
        answered(done(KIND.name, seed=5, loss=math.nan)),
        answered(done(KIND.name, seed=1, loss=2.0, error="it died", name="died")),
        answered(done(STRUCTURAL.name, seed=1, loss=1.0)),
        answered(done(HEALTHY, seed=9, loss=math.nan)),  # it did not train: of no use
    ]
    assert [answer.is_harmful for answer in answers(population)] == [*[False] * 4, True, True, True, True]


def test_scores_count_harmful_programs_alone_and_what_is_told_first():
    population = [
        answered(done(KIND.name, seed=1, **BROKEN), said(RIGHT), said("loss_explosion", kind="symptom")),
        answered(done(KIND.name, seed=3, **BROKEN), said("clipping_always_on", severity="warning"), said(RIGHT)),
        answered(done(KIND.name, seed=5, **BROKEN)),
        answered(done(KIND.name, seed=9, **BROKEN), said(RIGHT, severity="note", step=5)),
        answered(done(KIND.name, seed=7)),
        answered(done(TWIN, seed=7)),
        answered(done(KIND.name, seed=0, half=TUNED, **BROKEN)),
        answered(done(TWIN, seed=1)),
        answered(done(HEALTHY, seed=9), said("clipping_always_on", severity="warning"), said("x", severity="note")),
    ]
    found = score(answers(population))
    (of_kind,) = (each for each in found.kinds if each.fault == KIND.name)
    assert (of_kind.programs, of_kind.harmless, found.harmful) == (4, 1, 4)
    assert of_kind.detected == found.detected == 0.5  # a note alone is no detection
    assert of_kind.named == found.named == 0.5
    assert of_kind.instead == ("clipping_always_on",) and of_kind.step == 4
    assert (found.healthy, found.errors_per_healthy) == (3, 0.0)
    assert found.warnings_per_healthy == found.notes_per_healthy == pytest.approx(1 / 3)
    assert found.said_of_healthy == {"clipping_always_on": 1}
    assert [goal.verdict for goal in goals(found)] == ["missed", "missed", "met", "missed", *["not measured"] * 2]


def test_right_is_what_names_the_fault_what_that_explains_and_a_symptom_of_its_harm():
    findings = (
        said(RIGHT, explains=("logit_growth",)),
        said("logit_growth", explains=("entropy_collapse",)),
        said("entropy_collapse", severity="warning"),
        said("clipping_always_on", severity="warning"),
        said("loss_explosion", kind="symptom"),
        said("attention_sink", severity="note"),
    )
    population = [
        answered(done(KIND.name, seed=1, **BROKEN), *findings),
        answered(done(KIND.name, seed=5), *findings),  # no harm: it says nothing of the rules
        answered(done(TWIN, seed=5)),
        answered(done(HEALTHY, seed=7), said("entropy_collapse"), said("loss_explosion", kind="symptom")),
    ]
    assert score(answers(population)).confidence == {
        "clipping_always_on": Confidence(right=0, said=1),
        "entropy_collapse": Confidence(right=1, said=2),
        "logit_growth": Confidence(right=1, said=1),
        "loss_explosion": Confidence(right=1, said=2),
        RIGHT: Confidence(right=1, said=1),
    }


def test_the_right_layer_is_asked_of_faults_that_are_in_one():
    @dataclass(frozen=True)
    class InLayers:
        layers: object = None

    assert layers_of(KIND, 0) is None or isinstance(layers_of(KIND, 0), tuple)
    assert layers_of(InLayers(), 0) is layers_of(InLayers(layers=()), 0) is None
    assert layers_of(InLayers(layers=(1, 2)), 1) == (1, 2)
    assert [layers_of(InLayers(layers=((1,), (0, 1))), strength) for strength in (0, 1, 5)] == [(1,), (0, 1), (0, 1)]


def test_rows_come_back_from_json_and_parquet_as_they_were(tmp_path):
    population = [
        answered(
            done(KIND.name, name="b", loss=math.inf),
            said(RIGHT, step=None, layers=(1, 0), explains=("x",)),
            diverged_at=12,
            norm=None,
            max_logit=(1.5, 2.0, math.inf),
        ),
        answered(done(TWIN, name="a", error="it died")),
    ]
    assert [from_row(to_row(each)) for each in population] == population
    assert from_row({**to_row(population[0]), "no such column": 1}) == population[0]
    write_answers(population, tmp_path / FILE)
    assert read_answers(tmp_path / FILE) == population[::-1]  # by name


def test_programs_are_asked_once_and_again_after_rules_changed_and_none_ends_the_bench(tmp_path, monkeypatch):
    recipe = replace(Recipe(), d_model=32, n_layers=2, steps=12, batch_size=4, seq_len=24)
    train(recipe, tmp_path / "trained")
    one, gone = done(TWIN, "sdpa pre", name="trained"), done(KIND.name, name="gone", error="it died at once")
    asked = ask_all([one, gone], tmp_path, jobs=2)
    assert asked[0].norm == "pre" and asked[0].problem is None and "max_logit" in asked[0].traces
    assert asked[1].problem == f"{tmp_path / 'gone'}: no such run. List them: attnscope runs"
    assert not asked[1].findings and score(answers(asked)).problems == (f"gone: {asked[1].problem}",)

    monkeypatch.setattr(asking, "ask", None)
    with (tmp_path / LIST).open("a") as log:
        log.write('{"code": "cut')
    assert ask_all([one, gone], tmp_path) == asked
    monkeypatch.setattr(asking, "_code", lambda: "others")
    with pytest.raises(TypeError):
        ask_all([one], tmp_path)
    monkeypatch.setattr(asking, "examine", lambda run: [][0])
    assert ask(one, tmp_path).problem == "IndexError: list index out of range"


def test_what_is_left_behind_is_data_the_score_a_page_and_figures(tmp_path):
    population = [
        answered(done(TWIN, seed=0, half=TUNED), max_logit=(1.0, 2.0), grad_norm=(1.0,)),
        answered(done(TWIN, seed=1), max_logit=(1.0, 1.5), grad_norm=(1.0,)),
        answered(
            done(KIND.name, seed=1, **BROKEN), said(RIGHT), diverged_at=45, max_logit=(1.0, 2.5), grad_norm=(1.0, 2.0)
        ),
    ]
    found = score(answers(population))
    write_outcome(population, found, tmp_path)
    assert read_answers(tmp_path / FILE) == sorted(population, key=lambda each: each.done.case)
    assert '"threshold": 2.0' in (tmp_path / "faults.json").read_text()
    page = (tmp_path / "faults.md").read_text()
    assert "max\\_logit | \\> 2.00 | 35 (35 to 35) | 1.00 | 35 (35 to 35) | 1.00 | 0 of 1 | 1.00 |" in page
    for name in ("kinds", "leads"):
        assert f"](figures/{name}.png)" in page and (tmp_path / f"figures/{name}.png").stat().st_size > 5_000
