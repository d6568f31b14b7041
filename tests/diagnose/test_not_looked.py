"""What could not be looked at is said, and is neither a finding nor silence."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from attnscope.cli import app
from attnscope.diagnose import RULES, NotLooked, diagnose, examine
from attnscope.diagnose.blindness import NO_ATTENTION, NO_CONFIG, NO_LOSS, NO_OPTIMIZER, NO_STEP
from attnscope.diagnose.movement import NO_PARAMS
from attnscope.diagnose.rules.clipping import clipping_always_on
from attnscope.diagnose.rules.depth import NO_LAYERS
from attnscope.diagnose.rules.logits import NO_GROUPS
from attnscope.diagnose.rules.loss import failed, loss_explosion, loss_spike
from attnscope.diagnose.rules.nonfinite import nonfinite, nonfinite_loss_passed, updates_skipped
from attnscope.diagnose.rules.optimizer import FEWEST_MEASURED
from attnscope.diagnose.rules.residual import NOT_FOLLOWED
from attnscope.diagnose.rules.saturation import saturated_at_start
from attnscope.diagnose.rules.scale import applied_scale, unusual_scale
from attnscope.findings import in_words
from attnscope.report import write_report
from attnscope.runs.layout import MemberEntry
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from tests.diagnose.synthetic import heads_table, params_table, run_of, steps_table
from tests.runs.made_up import event

ARMS = {"arm": [{"name": n, "init": {"gain": g}} for n, g in (("a", 1.0), ("b", 1.1))]}
LAYER = {"layer": 0, "name": "attn", "n_heads": 1, "d_head": 16, "mask": "causal", "dtype": "float32", "backend": "sdpa"}  # fmt: skip


def watched(path, *, steps=None, heads=None, events=(), at=0, end="finished"):
    """A watched run of one member; events are (kind, fields), `at` a step."""
    writer = RunWriter.create(
        path,
        command=["attnscope", "watch", "train.py"],
        config=None,
        members=[MemberEntry(name="rank 0", part=0, index=0, settings={})],
        environment={},
        data={},
    )
    part = writer.part(0)
    for table, columns in (("steps", steps), ("heads", heads)):
        if columns is not None:
            part.append(table, columns)
    for kind, fields in events:
        part.event(event(kind, step=at, member=0, **fields))
    part.finish(end)
    return open_run(path)


def whys(run):
    return {each.rule: each.why for each in examine(run).not_looked}


def test_healthy_training_was_looked_at_by_every_rule(tmp_path):
    steps = steps_table(4.0 + 0.1 * np.random.default_rng(0).normal(size=(1, 120)))
    measured = range(0, 120, 9)
    tables = {"heads": heads_table(1, measured), "params": params_table(1, measured, groups=("q", "k", "v", "mlp_in"))}
    run = run_of(tmp_path / "r", steps=steps, **tables, planned=120)
    assert examine(run).findings == () and examine(run).not_looked == ()


def test_a_run_without_a_record_is_blind_to_all_that_happens_in_training(tmp_path):
    said = whys(run_of(tmp_path / "r"))
    needs_none = {"applied_scale", "unusual_scale", "updates_skipped", "failed"}
    needs_none |= {"loss_rises", "repeated_batch", "updates_round_away", "loss_summed"}  # of watched scripts
    needs_none |= {
        "residual_missing",
        "accumulation_not_divided",
        "evaluation_scales_otherwise",
    }  # of watched scripts, too
    needs_none |= {"half_precision_headroom", "loss_too_low"}  # of float16, of models without a causal mask
    assert said == {rule.__name__: NO_STEP for rule in RULES if rule.__name__ not in needs_none}


def test_a_watched_script_of_which_nothing_was_seen_says_why_in_its_own_words(tmp_path):
    steps = steps_table(np.full((1, 30), np.nan), clip_factor=np.full(30, 0.1))
    not_recorded = {"loss": "no scalar was given to backward()"}
    failed_call = {"name": "attn", "backend": "flex", "reason": "NotImplementedError: odd block"}
    internal = {"name": "loss", "backend": "internal", "reason": "ValueError: no"}
    events = [("not_measured", internal), ("not_measured", failed_call), ("not_recorded", not_recorded)]  # fmt: skip
    run = watched(tmp_path / "r", steps=steps, events=events)
    attention = f"{NO_ATTENTION}: attn (flex): NotImplementedError: odd block"
    loss = f"{NO_LOSS}: no scalar was given to backward()"
    expected = {
        "repeated_batch": loss,
        "loss_rises": loss,
        "first_loss_too_high": loss,
        "updates_round_away": NO_OPTIMIZER,
        "poisoned_batch": loss,
        "loss_too_low": loss,
        "plateau": loss,
        "wrong_softmax_axis": attention,
        "future_visible": attention,
        "attention_over_batch": attention,
        "keys_repeated": attention,
        "clipped_before_unscaling": NO_OPTIMIZER,
        "clipped_after_step": NO_OPTIMIZER,
        "rows_fully_masked": attention,
        "padding_attended": attention,
        "parameters_without_optimizer": NO_OPTIMIZER,
        "gradients_accumulate": NO_OPTIMIZER,
        "dropout_in_evaluation": NO_OPTIMIZER,
        "residual_missing": NOT_FOLLOWED,
        "evaluation_scales_otherwise": attention,
        "accumulation_not_divided": NO_OPTIMIZER,
        "applied_scale": attention,
        "saturated_at_start": attention,
        "loss_summed": loss,
        "adam_epsilon_too_large": NO_PARAMS,
        "weight_decay_too_strong": f"{NO_PARAMS} {FEWEST_MEASURED} times",
        "missing_warmup": loss,
        "learning_rate_too_high": NO_PARAMS,
        "learning_rate_too_low": loss,
        "gradients_explode_with_depth": NO_LAYERS,
        "gradients_vanish_with_depth": NO_LAYERS,
        "clipping_always_on": NO_OPTIMIZER,
        "logit_growth": attention,
        "entropy_collapse": attention,
        "uniform_attention": attention,
        "starved_queries_and_keys": NO_GROUPS,
        "identical_heads": attention,
        "attention_sink": attention,
        "unusual_scale": attention,
        "nonfinite": loss,  # nor was a gradient
        "nonfinite_loss_passed": loss,
        "updates_skipped": NO_OPTIMIZER,
        "loss_explosion": loss,
        "loss_spike": loss,
        "stalled": loss,
    }
    assert {rule: why for rule, why in whys(run).items() if rule in expected} == expected


def test_a_killed_script_says_why_its_loss_was_not_seen_by_the_event_of_that_moment(tmp_path):
    steps = steps_table(np.full((1, 30), np.nan), grad_norm=np.ones(30))
    events = [("loss_not_seen", {"why": "its gradients were there without a scalar"})]
    run = watched(tmp_path / "r", steps=steps, events=events)
    assert loss_spike(run).why == f"{NO_LOSS}: its gradients were there without a scalar"
    assert nonfinite(run) is None, "a gradient breaks where a loss does, and was seen"


def test_losses_that_were_not_seen_are_no_losses_that_were_not_finite(tmp_path):
    some = np.full(40, 4.0)
    some[::3] = np.nan
    for name, losses in {"some": some, "none": np.full(2, np.nan), "few": [4.0, np.nan]}.items():
        steps = steps_table([losses], grad_norm=np.ones(len(losses)))
        assert diagnose(watched(tmp_path / name, steps=steps)) == ()
    late = np.r_[np.full(10, 4.0), np.full(20, np.nan)]  # seen up to step 9
    norms = np.ones(30)
    norms[15] = np.inf  # and skipped
    steps = steps_table([late], grad_norm=norms, loss_scale=np.full(30, 1024.0))
    overflow = [("nonfinite", {"tensor": "gradient", "where": ["layer 0 q"]})]
    assert diagnose(watched(tmp_path / "late", steps=steps, events=overflow, at=15)) == ()
    some[13] = np.nan
    event = [("nonfinite", {"tensor": "loss"})]
    seen = watched(tmp_path / "seen", steps=steps_table([some], grad_norm=np.ones(40)), events=event, at=13)  # fmt: skip
    assert nonfinite_loss_passed(seen).evidence[0].step == 13


def test_a_scale_that_could_not_be_seen_is_no_scale_that_is_right(tmp_path):
    seen = [("attention", LAYER | {"layer": k, "scale": s}) for k, s in enumerate((0.25, None))]
    steps, heads = steps_table(np.full((1, 30), 4.0)), heads_table(1, [0], n_layers=2)
    run = watched(tmp_path / "a", steps=steps, heads=heads, events=seen)
    why = "the scale of 1 of 2 attention layers could not be seen, or is no single number"
    assert applied_scale(run).why == unusual_scale(run).why == why
    run = watched(tmp_path / "b", steps=steps, heads=heads, events=seen[:1])
    assert applied_scale(run) is None and unusual_scale(run) is None


def test_a_learned_scale_and_clipping_that_clips_nothing_are_no_blindness(tmp_path):
    run = run_of(
        tmp_path / "r",
        {"attention": {"scale": "learned"}},
        steps=steps_table([4.0] * 5),
        heads=heads_table(1, [0]),
    )
    assert applied_scale(run) is None and unusual_scale(run) is None
    assert clipping_always_on(run) is None
    loss = steps_table(np.full((1, 30), 4.0))
    run = watched(tmp_path / "s", steps=loss)
    assert clipping_always_on(run) is None, "whatever the optimizer is"


def test_what_was_found_in_one_member_does_not_hide_that_another_was_not_looked_at(tmp_path):
    heads = heads_table(2, [0], entropy_ratio=np.array([0.05, np.nan]).reshape(1, 2, 1, 1))
    run = run_of(tmp_path / "r", ARMS, steps=steps_table(np.full((2, 30), 4.0)), heads=heads)
    finding = saturated_at_start(run)
    assert finding.members == ("a",) and finding.also[0].members == ("b",)
    (said,) = [each for each in examine(run).not_looked if each.rule == "saturated_at_start"]
    assert isinstance(said, NotLooked) and said.members == ("b",) and said.also == ()
    assert diagnose(run) == examine(run).findings


def test_members_that_are_blind_for_different_reasons_are_told_apart(tmp_path):
    steps = steps_table(np.full((2, 30), 4.0))
    only_a = {name: np.asarray(x)[np.asarray(steps["member"]) == 0] for name, x in steps.items()}
    heads = heads_table(2, [0], entropy_ratio=np.array([np.nan, 0.5]).reshape(1, 2, 1, 1))
    heads = {name: np.asarray(x)[:1] for name, x in heads.items()}
    run = run_of(tmp_path / "r", ARMS, steps=only_a, heads=heads)
    said = [e for e in examine(run).not_looked if e.rule == "saturated_at_start"]
    assert [e.members for e in said] == [("a",), ("b",)] and said[1].why == NO_STEP


@pytest.mark.parametrize(("n", "blind"), [(3, True), (4, False)])
def test_an_explosion_takes_one_loss_more_than_it_has_to_stay(tmp_path, n, blind):
    run = run_of(tmp_path / "r", steps=steps_table([4.0] * n))
    assert isinstance(loss_explosion(run), NotLooked) is blind


def test_a_spike_is_looked_for_where_there_is_a_whole_window_before_it(tmp_path):
    few = "fewer than 21 losses in a row before divergence"
    assert loss_spike(run_of(tmp_path / "a", steps=steps_table([4.0] * 20))).why == few
    assert loss_spike(run_of(tmp_path / "b", steps=steps_table([4.0] * 21))) is None
    gaps = np.full(200, 4.0)
    gaps[::20] = np.nan  # 19 in a row at most
    run = watched(tmp_path / "c", steps=steps_table(gaps))
    assert loss_spike(run).why == few and loss_explosion(run) is None
    both = np.full((2, 15), 4.0)  # 30 in a row, but of two members
    assert loss_spike(run_of(tmp_path / "d", ARMS, steps=steps_table(both))).members == ()


def test_a_config_nobody_understands_leaves_its_rules_blind(tmp_path):
    run_of(tmp_path / "r", {"attention": {"scale": "none"}}, steps=steps_table([4.0] * 30, clip_factor=np.full(30, 0.1)))  # fmt: skip
    place = tmp_path / "r" / "run.json"
    raw = json.loads(place.read_text())
    raw["config"] = {"strange": {"a": 1}}
    place.write_text(json.dumps(raw))
    said = whys(open_run(tmp_path / "r"))
    for rule in ("applied_scale", "unusual_scale", "clipping_always_on"):
        assert said[rule] == NO_CONFIG


def test_skipped_updates_of_this_lab_are_not_recorded_and_that_is_said(tmp_path):
    steps = steps_table(np.full((2, 5), 4.0), loss_scale=np.tile([1.0, 1024.0], 5))
    assert updates_skipped(run_of(tmp_path / "r", ARMS, steps=steps)).members == ("b",)


def test_a_process_that_left_no_end_is_not_one_that_did_not_fail(tmp_path):
    run = run_of(tmp_path / "r", steps=steps_table([4.0] * 30), planned=90)
    assert failed(run) is None
    (tmp_path / "r" / "part-0000" / "end.json").unlink()
    assert failed(open_run(tmp_path / "r")).why == "no end was recorded"


def test_an_odd_scale_whose_harm_was_not_recorded_is_said_beside_the_note(tmp_path):
    steps = steps_table(np.full((1, 30), 4.0))
    run = run_of(tmp_path / "r", {"attention": {"scale": "none"}}, steps=steps)
    assert applied_scale(run).why == NO_ATTENTION and unusual_scale(run).severity == "note"
    arms = {"arm": [{"name": "odd", "attention": {"scale": "inverse"}}, {"name": "usual"}]}
    for n, why in ((19, "fewer than 20 steps"), (20, None)):
        flat = steps_table(np.full((2, n), 4.0))
        said = applied_scale(run_of(tmp_path / f"{n}", arms, steps=flat, heads=heads_table(2, [0])))
        assert said is None if why is None else said.why.startswith(why)


def test_reasons_that_are_alike_stand_in_one_line():
    said = [
        NotLooked(rule="x", why="no loss was seen"),
        NotLooked(rule="z", why="no loss was seen", members=tuple("abcde")),
        NotLooked(rule="y", why="no loss was seen"),
    ]
    assert in_words(said) == (
        "x, y: no loss was seen",
        "z: no loss was seen (of a, b, c and 2 more)",
    )


def test_terminal_json_and_report_say_where_nobody_could_look(tmp_path):
    params = params_table(1, range(10))
    run = run_of(tmp_path / "r", steps=steps_table([4.0] * 10), heads=heads_table(1, [0]), params=params)
    line = "loss_spike: fewer than 21 losses in a row before divergence"

    def diagnosed(*words):
        return CliRunner().invoke(app, ["diagnose", str(run.path), *words], env={"COLUMNS": "80"}).stdout

    text = diagnosed()
    assert re.search(r"with \d+ of \d+ rules\.", " ".join(text.split()))
    assert text.startswith("No findings.") and f"\n  {line}\n" in text.partition("Could not look:")[2]
    folder = write_report(run).parent
    expected = [
        {
            "rule": "loss_spike",
            "why": "fewer than 21 losses in a row before divergence",
            "members": [],
        }
    ]
    assert expected[0] in json.loads(diagnosed("--json"))["not_looked"]
    assert expected[0] in json.loads((folder / "findings.json").read_text())["not_looked"]
    for name in ("report.md", "report.html"):
        page = (folder / name).read_text()
        assert "Could not look" in page and "fewer than 21 losses in a row" in page
