"""Cells, effects, learning rates and pairs, on members made up so that the answer is known."""

import math
from dataclasses import replace

import pytest

import attnscope
from attnscope.comparison.cells import compare
from attnscope.comparison.subjects import Subject, outcome_text, subjects_of
from attnscope.errors import RunError
from attnscope.report.comparison import (
    cell_table,
    change_table,
    lr_table,
    sentence_on,
    steps_text,
    with_interval,
)
from attnscope.report.contents import contents_of
from attnscope.report.side_by_side import Chosen, side_by_side
from attnscope.runs.reader import open_run
from tests.report.rows import row_of


def subject(status="trained", final=2.0, *, seed=0, step=99, data="d", first=6.0, **settings):
    shown = {key.replace("__", "."): value for key, value in settings.items()}
    return Subject(
        run="r",
        row=row_of(
            str((seed, shown)), status, final_loss=final, step=step, first_loss=first, unigram=3.0, theory_std=1.0
        ),
        settings={key: f"{value:g}" if isinstance(value, float) else value for key, value in shown.items()}
        | {"train.seed": str(seed)},
        numbers={key: value for key, value in shown.items() if isinstance(value, float)},
        seed=str(seed),
        data=data,
    )


def cell(outcomes, **settings):
    """One member per letter: t(rained), s(talled), d(iverged)."""
    made = {
        "t": ("trained", 2.0),
        "s": ("stalled", 5.0),
        "d": ("diverged", math.nan),
        "k": ("killed", 3.0),
    }
    return [subject(*made[letter], seed=seed, **settings) for seed, letter in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        ("ddd", "ttt", "rescues"),
        ("dds", "ttt", "rescues"),
        ("sss", "ttt", "rescues"),
        ("ddd", "sss", "hides"),
        ("ddd", "tts", "hides"),
        ("ddd", "ddt", "helps"),
        ("ddd", "dds", "helps"),
        ("sss", "sst", "helps"),
        ("sss", "sss", "does not help"),
        ("ddd", "ddd", "does not help"),
        ("dds", "ddd", "breaks"),
        ("sss", "dss", "breaks"),
        ("ttt", "dtt", "breaks"),
        ("ttt", "stt", "stalls"),
        ("ttt", "ttt", "keeps"),
        ("ddd", "ttk", "unknown"),
    ],
)
def test_what_a_single_change_does(before, after, effect):
    found = compare([*cell(before, clip="none"), *cell(after, clip="1")])
    (change,) = found.changes
    assert (change.setting, change.value, change.effect) == ("clip", "1", effect)


def test_two_changes_at_once_are_no_single_change():
    found = compare([*cell("d", a="0", b="0"), *cell("t", a="1", b="0"), *cell("t", a="1", b="1")])
    assert [(change.setting, change.value) for change in found.changes] == [("a", "1")]


def test_a_clipping_mode_counts_only_where_something_is_clipped():
    off, on = (
        {"clip__mode": "norm", "clip__threshold": "none"},
        {"clip__mode": "value", "clip__threshold": "0.1"},
    )
    found = compare([*cell("d", **off), *cell("t", **on)])
    assert [(change.setting, change.value) for change in found.changes] == [("clip.threshold", "value 0.1")]
    found = compare([*cell("d", clip__mode="norm", clip__threshold="1"), *cell("t", **on)])
    assert found.changes == ()


def test_cells_hold_all_seeds_and_count_outcomes():
    found = compare([*cell("tds", a="0"), *cell("ttt", a="1")])
    assert [outcome_text(each) for each in found.cells] == [
        "1 trained, 1 stalled, 1 diverged",
        "3 trained",
    ]
    assert [each.outcome for each in found.cells] == ["mixed", "trained"]
    assert found.cells[0].final_losses == (2.0, 5.0), "a diverged member has no final loss"
    assert found.axes == {"a": ("0", "1")}


def test_the_baseline_is_the_first_cell_that_fits():
    members = [*cell("t", a="0", b="0"), *cell("t", a="1", b="0"), *cell("t", a="1", b="1")]
    assert compare(members).baseline.settings == {"a": "0", "b": "0"}
    assert compare(members, baseline={"a": "1"}).baseline.settings == {"a": "1", "b": "0"}
    assert compare(members[:1]).baseline is None


def test_differences_are_paired_by_seed_and_data():
    before = [subject(final=2.0 + seed, seed=seed, a="0") for seed in range(5)]
    after = [subject(final=1.5 + seed, seed=seed, a="1") for seed in range(5)]
    (difference,) = compare([*before, *after]).differences
    assert (difference.pairs, difference.mean) == (5, pytest.approx(-0.5))
    assert difference.interval == pytest.approx((-0.5, -0.5)), "the luck of the seeds cancels"
    (difference,) = compare([*before, *after[3:]]).differences
    assert (difference.pairs, difference.interval) == (2, None)
    assert compare([*before, *(replace(each, data="other") for each in after)]).differences == ()


def test_a_diverged_member_counts_with_its_first_loss():
    found = compare([*cell("t", a="0"), *cell("d", a="1")])
    assert found.differences[0].mean == pytest.approx(6.0 - 2.0)


def lr_sweep(**arms):
    """Arm to one string of outcomes per learning rate."""
    return compare(
        [
            member
            for arm, cells in arms.items()
            for place, outcomes in enumerate(cells)
            for member in cell(outcomes, arm=arm, optimizer__lr=10.0**place)
        ]
    )


@pytest.mark.parametrize(
    ("cells", "stable", "bracket"),
    [
        (["tt", "tt", "tt"], 100.0, None),
        (["tt", "tt", "td"], 10.0, 100.0),
        (["tt", "ts", "dd"], 10.0, 100.0),
        (["dd", "dd", "dd"], None, 1.0),
        (["td", "tt", "tt"], None, 1.0),
        (["tt", "dd", "tt"], 1.0, 10.0),  # an island above an unstable one does not count
    ],
)
def test_the_largest_stable_learning_rate_and_its_bracket(cells, stable, bracket):
    (arm,) = lr_sweep(only=cells).lr_arms
    assert (arm.stable, arm.bracket) == (stable, bracket)


def test_lr_sensitivity_of_an_arm_by_hand():
    a, b = lr_sweep(a=["tt", "ss", "dd"], b=["tt", "tt", "tt"]).lr_arms
    # Losses 2, 5 and 6 (its first): mean 13/3, best 2.
    assert a.sensitivity == pytest.approx(13 / 3 - 2) and b.sensitivity == 0
    assert (a.best, a.name) == (1.0, "arm=a")


def test_sensitivity_needs_every_learning_rate_of_a_seed():
    members = [
        *cell("tt", optimizer__lr=1.0),
        *cell("s", optimizer__lr=2.0),  # seed 1 was not trained at 2
    ]
    (arm,) = compare(members).lr_arms
    assert arm.sensitivity == pytest.approx(3.5 - 2)


def test_sentences_say_what_was_found():
    found = compare([*cell("ddd", a="0", b="0"), *cell("ttt", a="1", b="0"), *cell("sss", a="0", b="1")])
    assert sentence_on(found) == (
        "Baseline a=0 b=0: 3 diverged. Changed alone, a=1 rescues it; b=1 only hides it: nothing diverges, but not all "
        "learn."
    )
    assert sentence_on(lr_sweep(x=["t", "t", "d"], y=["t", "t", "t"])) == (
        "Largest stable learning rate: arm=x 10 (diverges at 100), arm=y 100."
    )


def test_tables_have_a_cell_for_each_title():
    found = lr_sweep(a=["tt", "ss", "dd"], b=["tt", "tt", "tt"])
    for table in (change_table(found), cell_table(found), lr_table(found)):
        assert table.rows and all(len(row) == len(table.titles) for row in table.rows)
    assert lr_table(compare(cell("tt", a="0"))) is None


def test_numbers_in_words():
    assert steps_text([7, 10, 17]) == "10 (7–17)" and steps_text([]) == "-" and steps_text([3]) == "3"
    assert with_interval(0.5, (0.25, 0.75), signed=True) == "+0.50 [0.25, 0.75]"
    assert with_interval(-0.5, None, signed=True) == "-0.50"


TINY = {
    "model": {"d_model": 16, "n_layers": 1, "seq_len": 8},
    "data": {"source": "markov", "batch_size": 2},
    "train": {"steps": 30},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two real runs that differ in the learning rate, one on other data, one of a sweep."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, **changes):
        table = {key: {**TINY.get(key, {}), **changes.get(key, {})} for key in {*TINY, *changes}}
        return attnscope.train_model(table, path=folder / name)

    return {
        "slow": train("slow", optimizer={"lr": 1e-3}),
        "fast": train("fast", optimizer={"lr": 1e-2}),
        "other": train("other", data={"source": "modular", "batch_size": 2}),
        "swept": train("swept", sweep={"vary": {"attention": {"scale": ["inverse_sqrt", "none"]}}, "seeds": 2}),
    }


def test_runs_side_by_side_differ_in_what_differs(runs):
    tables, found = side_by_side([Chosen(run=runs["slow"]), Chosen(run=runs["fast"])])
    assert found.comparison.axes == {"optimizer.lr": ("0.001", "0.01")}
    assert [member.name for member in found.members] == ["slow", "fast"]
    (difference,) = found.comparison.differences
    finals = [run.members[0].final_loss for run in (runs["slow"], runs["fast"])]
    assert difference.mean == pytest.approx(finals[1] - finals[0]), "same seed, same data: a pair"
    assert set(tables.steps["member"].unique()) == {"slow", "fast"}
    assert len(tables.heads) == len(runs["slow"].heads) + len(runs["fast"].heads)


def test_a_member_of_a_sweep_beside_a_run(runs):
    name = "scale=none seed=1"
    tables, found = side_by_side([Chosen(run=runs["swept"], members=(name,)), Chosen(run=runs["slow"])])
    assert [member.name for member in found.members] == [f"swept:{name}", "slow"]
    assert found.comparison.differences == (), "other seeds are no pair"
    assert len(tables.steps) == 60


def test_a_run_named_twice_keeps_its_short_name(runs):
    first, second = (run.entries[0].name for run in (runs["slow"], runs["swept"]))
    chosen = [
        Chosen(run=runs["swept"], members=(second,)),
        Chosen(run=runs["slow"], members=(first,)),
        Chosen(run=runs["swept"], members=("scale=none seed=1",)),
    ]
    _, found = side_by_side(chosen)
    names = [member.name for member in found.members]
    assert names == [f"swept:{second}", "slow", "swept:scale=none seed=1"]


def test_unlike_runs_are_compared_by_outcome_and_it_is_said(runs):
    _, found = side_by_side([Chosen(run=runs["slow"]), Chosen(run=runs["other"])])
    assert "compare outcomes, not losses" in found.verdict[1]
    assert found.comparison.differences == () and found.reference == {}


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    again = attnscope.train_model({**TINY, "optimizer": {"lr": 0.1}}, path=tmp_path / "else" / "slow")
    _, found = side_by_side([Chosen(run=runs["slow"]), Chosen(run=again)])
    names = [member.name for member in found.members]
    assert len(set(names)) == 2 and names[1] == "else/slow"


def test_the_same_run_twice_is_one_cell(runs):
    _, found = side_by_side([Chosen(run=runs["swept"])])
    assert len(found.members) == 4 and len(found.comparison.cells) == 2


def test_the_baseline_of_one_sweep_is_its_own_but_for_what_is_said(runs):
    _, found = side_by_side([Chosen(run=runs["swept"])])
    assert found.comparison.baseline.settings == {"attention.scale": "inverse_sqrt"}
    _, found = side_by_side([Chosen(run=runs["swept"])], baseline={"attention.scale": "none"})
    assert found.comparison.baseline.settings == {"attention.scale": "none"}


def test_a_member_that_is_not_there_and_one_alone(runs):
    with pytest.raises(RunError, match=r"has no member 'x'\. Members: stalled|has no member 'x'\. Members: "):
        side_by_side([Chosen(run=runs["slow"], members=("x",))])
    with pytest.raises(RunError, match="there is nothing to compare it with"):
        side_by_side([Chosen(run=runs["slow"])])


def test_the_contents_of_a_sweep_have_its_comparison(runs):
    found = contents_of(runs["swept"])
    assert [each.name for each in found.comparison.cells] == ["scale=inverse_sqrt", "scale=none"]
    assert found.comparison.baseline.name == "scale=inverse_sqrt"
    assert contents_of(runs["slow"]).comparison is None


def test_a_half_finished_sweep_is_compared_as_far_as_it_is(runs, tmp_path):
    import os
    import shutil

    shutil.copytree(runs["swept"].path, tmp_path / "r")
    part = tmp_path / "r" / "part-0000"
    (part / "end.json").unlink()
    for path in part.iterdir():
        os.truncate(path, path.stat().st_size * 2 // 3) if path.suffix == ".arrow" else None
        os.utime(path, (1, 1))
    run = open_run(tmp_path / "r")
    found = contents_of(run)
    assert {member.status for member in found.members} == {"killed"}
    assert {change.effect for change in found.comparison.changes} == {"unknown"}
    subjects = subjects_of(run, found.members)
    assert len(subjects) == 4
