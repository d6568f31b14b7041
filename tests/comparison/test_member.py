"""A member's row: what of it is in JSON, and that it says nothing but what its record says."""

from attnscope.comparison.member import Softmax, renamed, row_as_json
from tests.report.rows import row_of


def test_the_json_of_a_row_is_what_scripts_read():
    row = row_of(
        "a",
        "diverged",
        step=3,
        nonfinite_at=4,
        error="x",
        settings={"optimizer.lr": "1"},
        start=Softmax(step=0, max_prob=0.5),
    )
    nothing = {
        "step": None, "entropy": None, "entropy_ratio": None, "max_prob": None, "logit_std": None, "max_logit": None,
    }  # fmt: skip
    said = {
        "name": "a", "status": "diverged", "step": 3, "nonfinite_at": 4, "first_loss": 6.0, "best_loss": 2.0, "final_loss": 2.0,
        "val_loss": None, "prefix_loss": None, "unigram": None, "theory_std": None,
        "start": nothing | {"step": 0, "max_prob": 0.5}, "end": nothing,
        "settings": {"optimizer.lr": "1"}, "error": "x", "is_falling": None,
    }  # fmt: skip
    assert list(row_as_json(row).items()) == list(said.items())


def test_the_step_of_a_member_is_the_last_one_unless_it_diverged():
    assert row_of(step=7).step == row_of(status="diverged", step=7).step == 7
    assert row_of(step=7).record.diverged_at is None


def test_a_member_by_another_name_is_the_same_otherwise():
    row = row_of("a", "stalled", final_loss=5.0)
    other = renamed(row, "run:a")
    assert (other.name, row.name) == ("run:a", "a")
    assert row_as_json(other) | {"name": "a"} == row_as_json(row)
