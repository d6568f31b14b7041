"""The two sentences, whole, for each way in which a run can end."""

import math
from dataclasses import replace

import pytest

from attnscope.comparison.member import Softmax
from attnscope.report.numbers import number
from attnscope.report.verdict import verdict_of
from tests.report.rows import row_of

SHARP = Softmax(step=0, entropy=0.1, entropy_ratio=0.03, max_prob=0.96, logit_std=80, max_logit=986)
FLAT = Softmax(step=0, entropy=0.9, entropy_ratio=0.4, max_prob=0.68, logit_std=10, max_logit=123)


def member(name="a", status="trained", **changes):
    healthy = {
        "step": 299,
        "first_loss": 18.0,
        "best_loss": 2.5,
        "final_loss": 3.04,
        "val_loss": 3.1,
        "start": FLAT,
        "end": replace(FLAT, step=299, max_prob=0.6, max_logit=34),
    }
    return row_of(name, status, **(healthy | changes))


def verdict(rows, differing, *, unigram):
    return verdict_of([replace(row, unigram=unigram) for row in rows], differing)


def test_one_diverges_beside_its_twin():
    unscaled = member(
        "unscaled",
        "diverged",
        step=6,
        nonfinite_at=10,
        first_loss=21.1,
        final_loss=math.nan,
        start=SHARP,
    )
    said = verdict([unscaled, member("scaled")], {"attention.scale": ("none", "inverse_sqrt")}, unigram=3.15)
    assert said == (
        "unscaled diverged at step 6: its loss was 21.1 at first and became non-finite at step 10; scaled trained to "
        "a loss of 3.04, below the unigram loss 3.15.",
        "They differ in attention.scale alone: at step 0 the softmax of unscaled puts 0.96 of a query's weight on one "
        "key on average, that of scaled 0.68; largest logits 986 and 123.",
    )


def test_two_train_and_one_was_saturated_all_along():
    unscaled = member("unscaled", final_loss=2.46, start=SHARP)
    first, second = verdict(
        [unscaled, member("scaled", final_loss=2.23)],
        {"attention.scale": ("none", "inverse_sqrt")},
        unigram=3.15,
    )
    assert first == (
        "unscaled trained to a loss of 2.46, below the unigram loss 3.15; scaled trained to a loss of 2.23, below the "
        "unigram loss 3.15."
    )
    assert "unscaled puts 0.96" in second and "diverged" not in second


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            member(status="stalled", final_loss=17.0),
            "a stalled: its final loss 17.0 is above the unigram loss 3.15.",
        ),
        (
            member(status="diverged", step=4, final_loss=7.3e9),
            "a diverged at step 4: its loss was 18.0 at first and 7.3e9 at the end.",
        ),
        (member(status="killed", step=12), "a was killed after step 12 at a loss of 3.04."),
        (
            member(status="interrupted", step=12),
            "a was interrupted after step 12 at a loss of 3.04.",
        ),
        (member(status="running", step=12), "a is still training after step 12 at a loss of 3.04."),
        (member(status="killed", step=None, final_loss=None), "a recorded nothing (killed)."),
        (
            member(is_falling=True),
            "a trained to a loss of 3.04, below the unigram loss 3.15 and still falling.",
        ),
        (
            member(status="stalled", final_loss=7.9, is_falling=True),
            "a is not below the unigram loss 3.15 yet: its final loss 7.90 still falls.",
        ),
        (
            member(nonfinite_at=14),
            "a trained to a loss of 3.04, below the unigram loss 3.15 (its loss of step 14 was not finite, and training "
            "went on).",
        ),
        (
            member(status="failed", step=7, error="ValueError: no data."),
            "a failed after step 7 at a loss of 3.04: ValueError: no data.",
        ),
        (
            member(status="failed", step=None, final_loss=None, error="ValueError: no data"),
            "a recorded nothing (failed: ValueError: no data).",
        ),
    ],
)
def test_how_a_single_member_ended(row, sentence):
    assert verdict([row], {}, unigram=3.15)[0] == sentence


@pytest.mark.parametrize(
    ("prefix_loss", "sentence"),
    [
        (
            9.1,
            "a trained to a loss of 0.10, below the unigram loss 3.15, but to 9.10 where it does not see the token that "
            "it predicts.",
        ),
        (2.35, "a trained to a loss of 0.10, below the unigram loss 3.15."),
    ],
)
def test_a_loss_that_comes_from_reading_the_answer_is_called_out(prefix_loss, sentence):
    row = member(final_loss=0.1, val_loss=0.095, prefix_loss=prefix_loss)
    assert verdict([row], {}, unigram=3.15)[0] == sentence
    assert "but to" not in verdict([row], {}, unigram=None)[0]


def test_every_member_is_held_against_its_own_data():
    easy, hard = replace(member("a"), unigram=3.47), replace(member("b", "stalled"), unigram=2.5)
    assert verdict_of([easy, hard], {})[0] == (
        "a trained to a loss of 3.04, below the unigram loss 3.47; b stalled: its final loss 3.04 is above the unigram "
        "loss 2.50."
    )


def test_without_a_unigram_loss_nothing_is_said_of_it():
    assert verdict([member()], {}, unigram=None)[0] == ("a ran to its end at a loss of 3.04, 18.0 at first.")
    rising = member(final_loss=90.0, is_falling=False)
    assert verdict([rising], {}, unigram=None)[0] == ("a ran to its end at a loss of 90.0, 18.0 at first.")


def test_attention_of_a_single_member():
    assert verdict([member()], {}, unigram=None)[1] == (
        "At step 0 its softmax puts 0.68 of a query's weight on one key on average, with a largest logit of 123; at "
        "step 299 0.60 and 34.0."
    )
    only_one_step = member(end=FLAT)
    assert verdict([only_one_step], {}, unigram=None)[1].endswith("largest logit of 123.")


def test_members_that_begin_alike_are_told_apart_at_the_end():
    rope = member("rope", end=replace(FLAT, step=299, max_prob=0.31))
    assert verdict([rope, member("alibi")], {"model.position": ("rope", "alibi")}, unigram=None)[1] == (
        "They differ in model.position alone: at step 0 their attention is alike (max_prob 0.68 to 0.68), when last "
        "finite it is rope 0.31 (step 299), alibi 0.60 (step 299)."
    )


def test_many_members_are_counted():
    rows = [
        *(member(f"t{i}", final_loss=3 - i / 10) for i in range(5)),
        *(member(f"d{i}", "diverged", start=SHARP, final_loss=math.nan) for i in range(3)),
    ]
    differing = dict.fromkeys(("a", "b", "c", "d"), ())
    first, second = verdict(rows, differing, unigram=3.15)
    assert first == "Of 8 members, 5 trained and 3 diverged; the lowest final loss is 2.60 (t4)."
    assert second.startswith("At step 0 the softmax of d0 puts 0.96")


def test_nothing_recorded_of_attention():
    rows = [
        member("a", start=Softmax(), end=Softmax()),
        member("b", start=Softmax(), end=Softmax()),
    ]
    assert verdict(rows, {}, unigram=None)[1] == "Nothing was recorded of their attention."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "nan"), (-math.inf, "-inf"), (0.0, "0"), (3.0, "3.00"), (18.06, "18.1"), (646.7, "647"),
        (1083.2, "1083"), (9999.9, "1.0e4"), (7.3e9, "7.3e9"), (0.02, "0.02"), (0.0099, "9.9e-3"), (-0.5, "-0.50"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text
