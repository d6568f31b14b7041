"""Courses along the steps: in order, without what follows divergence, and with NaN where nothing was measured."""

import numpy as np
import pytest

from attnscope.diagnose.courses import group_courses, head_courses, layer_courses, step_courses
from tests.diagnose.synthetic import heads_table, qkv_table, run_of, steps_table

AT = list(range(0, 40, 2))
ARMS = {"arm": [{"name": name, "init": {"gain": gain}} for name, gain in (("a", 1.0), ("b", 1.1))]}


@pytest.fixture
def run(tmp_path):
    """Two members, two layers, three heads; the second diverges at step 20. entropy says where a number is from."""
    shape = (len(AT), 2, 2, 3)
    at, member, layer, head = np.indices(shape)
    entropy = np.asarray(AT)[at] + 100 * member + 1000 * layer + 10000.0 * head
    entropy[3, 0, 0, 1] = np.nan
    entropy[4, 0, 0] = np.nan
    losses = np.full((2, 40), 4.0)
    losses[1, 20:] = 400.0
    return run_of(
        tmp_path / "r",
        ARMS,
        steps=steps_table(losses, token_cosine=np.tile(np.arange(40.0)[:, None], (1, 2))),
        heads=heads_table(2, AT, n_layers=2, n_heads=3, entropy=entropy),
        params=qkv_table(2, AT, n_layers=2, groups=("q", "mlp"), grad_norm=entropy[..., :2]),
    )


def test_a_head_has_its_own_numbers_in_the_order_of_steps(run):
    courses = head_courses(run, ("entropy",))
    assert len(courses.start_C) == 12
    for course in range(12):
        rows = courses.rows(course)
        member, layer, head = courses.member_C[course], courses.layer_C[course], courses.head_C[course]
        steps = [step for step in AT if member == 0 or step < 20]
        assert courses.step_N[rows].tolist() == steps
        values = courses.columns["entropy"][rows]
        np.testing.assert_array_equal(
            values[~np.isnan(values)],
            (np.asarray(steps) + 100 * member + 1000 * layer + 10000 * head)[~np.isnan(values)],
        )
    only = head_courses(run, ("entropy",), members={1})
    assert set(only.member_C.tolist()) == {1} and len(only.start_C) == 6


def test_a_layer_is_its_heads_without_those_that_are_not_numbers(run):
    courses = layer_courses(run, mean=("entropy",), largest=("entropy",))
    assert len(courses.start_C) == 4
    rows = courses.rows(0)
    mean, largest = courses.columns["entropy"][rows], courses.columns["largest entropy"][rows]
    np.testing.assert_array_equal(mean[:5], [10000, 10002, 10004, 10006, np.nan])
    np.testing.assert_array_equal(largest[:5], [20000, 20002, 20004, 20006, np.nan])


def test_groups_and_steps_have_courses_too(run):
    courses = group_courses(run, "grad_norm", {"q": "q", "v": "v"})
    assert len(courses.start_C) == 4 and np.isnan(courses.columns["v"]).all()
    assert courses.columns["q"][courses.rows(3)].tolist() == [1100.0 + step for step in range(0, 20, 2)]
    whole = step_courses(run, "token_cosine")
    assert whole.columns["token_cosine"][whole.rows(1)].tolist() == list(range(20))


def test_the_end_is_the_last_fifth_and_at_least_five_records(run):
    whole = step_courses(run, "token_cosine")
    assert whole.end_median(0, "token_cosine") == np.median(range(32, 40))
    heads = head_courses(run, ("entropy",))
    assert heads.end_median(0, "entropy") == np.median(AT[-5:])
    np.testing.assert_allclose(whole.share_at_end(whole.columns["token_cosine"] >= 36), [0.5, 0])
    assert whole.first("token_cosine").tolist() == [0, 0]


def test_something_holds_since_the_step_from_which_nine_in_ten_have_it(run):
    whole = step_courses(run, "token_cosine")
    values = whole.columns["token_cosine"]
    assert whole.step_since(0, values >= 10) == 10
    assert whole.step_since(0, (values >= 10) & (values != 30)) == 10, "one in thirty is noise"
    assert whole.step_since(0, (values >= 10) & (values != 38)) == 10
    assert whole.since(0, values > 99) is None and whole.step_since(0, values > 99) == 39


def test_tables_out_of_order_are_put_in_order(tmp_path):
    heads = heads_table(1, [8, 6, 4, 2, 0], entropy=np.array([8, 6, 4, 2, 0.0])[:, None, None, None])
    run = run_of(tmp_path / "r", steps=steps_table(np.full(10, 4.0)), heads=heads)
    assert head_courses(run, ("entropy",)).columns["entropy"].tolist() == [0, 2, 4, 6, 8]
