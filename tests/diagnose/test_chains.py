"""Which finding explains which, and in what order they are told."""

from attnscope.diagnose.chains import chains, linked
from attnscope.findings import Finding, chain_in_words


def finding(rule, *, kind="cause", severity="error", step=None, explains=(), members=("a",)):
    return Finding(
        rule=rule,
        title=rule.capitalize(),
        kind=kind,
        severity=severity,
        summary="",
        members=members,
        evidence=(),
        evidence_left_out=0,
        remedy="",
        source="",
        step=step,
        explains=explains,
    )


def test_a_finding_explains_what_its_rule_may_explain_in_the_same_member_and_not_before_it():
    first, other, earlier, elsewhere = linked(
        [
            finding("scale", step=3, explains=("growth", "start", "loss", "missing")),
            finding("growth", step=5),
            finding("start", step=2),
            finding("loss", step=9, members=("b",)),
        ]
    )
    assert first.explains == ("growth",)
    assert [each.rule for each in (other, earlier, elsewhere)] == ["start", "loss", "growth"]


def test_two_findings_never_explain_each_other_and_at_one_step_the_first_in_order_explains():
    nan = finding("nan", kind="symptom", step=4, explains=("loss",))
    loss = finding("loss", kind="symptom", step=4, explains=("nan",))
    assert {each.rule: each.explains for each in linked([nan, loss])} == {"nan": ("loss",), "loss": ()}
    later = finding("nan", kind="symptom", step=7, explains=("loss",))
    assert {each.rule: each.explains for each in linked([later, loss])} == {"loss": ("nan",), "nan": ()}


def test_how_training_ended_comes_after_everything_and_a_state_without_a_step_before():
    cause = finding("frozen", explains=("stalled",))
    end = finding("stalled", kind="symptom", explains=("frozen",))
    assert [each.explains for each in linked([end, cause])] == [("stalled",), ()]


def test_causes_come_before_symptoms_the_worst_first_and_notes_last():
    told = linked(
        [
            finding("spike", kind="symptom", severity="note", step=4),
            finding("odd", severity="note", step=0),
            finding("collapse", severity="warning", step=2),
            finding("rate", severity="warning", step=0, explains=("collapse",)),
            finding("nan", kind="symptom", step=9),
            finding("leak", step=0),
        ]
    )
    assert [each.rule for each in told] == ["leak", "rate", "collapse", "nan", "odd", "spike"]


def test_a_finding_is_as_bad_as_the_worst_that_it_leads_to_and_notes_come_last():
    told = linked(
        [
            finding("odd", severity="note", step=0),
            finding("idle", severity="note", step=0, explains=("spike",)),
            finding("slow", severity="warning", step=0),
            finding("rate", severity="note", step=0, explains=("growth",)),
            finding("growth", severity="warning", step=2, explains=("loss",)),
            finding("loss", kind="symptom", step=5),
            finding("spike", kind="symptom", severity="note", step=6),
        ]
    )
    assert [each.rule for each in told] == ["growth", "slow", "loss", "rate", "odd", "idle", "spike"]


def test_a_chain_is_the_longest_way_from_a_cause_to_what_became_of_it():
    told = linked(
        [
            finding("scale", step=0, explains=("sharp", "loss")),
            finding("sharp", step=1, explains=("loss",)),
            finding("loss", kind="symptom", step=7),
            finding("alone", step=0),
        ]
    )
    (chain,) = chains(told)
    assert chain_in_words(chain) == "Loss (step 7) ← Sharp (step 1) ← Scale (step 0)"
    assert chains(linked([finding("alone", step=0)])) == ()


def test_a_cause_is_told_before_the_worse_one_that_it_explainss():
    warm = finding("warm-up", severity="warning", step=0, explains=("alike", "loss"))
    alike, other = finding("alike", step=2), finding("other", step=5, explains=("loss",))
    loss = finding("loss", kind="symptom", step=9)
    assert [each.rule for each in linked([warm, alike, loss])] == ["warm-up", "alike", "loss"]
    assert [each.rule for each in linked([warm, other, loss])] == ["other", "warm-up", "loss"]
    note = finding("note", severity="note", explains=("alike",))
    assert [each.rule for each in linked([note, alike])] == ["alike", "note"]
