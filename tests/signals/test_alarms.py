"""Tables in, events out: what breaks, when, again, and the same however the steps are cut into blocks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.runs.event_lines import fields_of
from attnscope.runs.events import Place
from attnscope.runs.outcome import outcome
from attnscope.signals.alarms import MOST_PLACES, MOST_TIMES, Alarms, first_places
from attnscope.signals.nonfinite import TENSORS

NAN, INF = np.nan, np.inf


def tables(losses_SM, *, start=0, logits_SM=None, gradients_SM=None, grad_norms_SM=None):
    """Of members with two layers, whose second one shows what is given."""
    losses_SM = np.asarray(losses_SM, dtype=float)
    n_steps, n_members = losses_SM.shape
    sound = np.ones_like(losses_SM)
    logits_SM = sound if logits_SM is None else np.asarray(logits_SM, dtype=float)
    gradients_SM = 0 * sound if gradients_SM is None else np.asarray(gradients_SM)
    norms_SM = np.where(np.isfinite(losses_SM), 1.0, NAN) if grad_norms_SM is None else grad_norms_SM
    step, member = (x.ravel() for x in np.mgrid[start : start + n_steps, 0:n_members])
    both = {"step": np.repeat(step, 2), "member": np.repeat(member, 2), "layer": np.tile([0, 1], len(step))}  # fmt: skip
    logits = np.stack([np.ones(len(step)), logits_SM.ravel()], axis=1).ravel()
    counts = np.stack([np.zeros(len(step)), gradients_SM.ravel()], axis=1).ravel()
    return {
        "steps": {
            "step": step,
            "member": member,
            "loss": losses_SM.ravel(),
            "grad_norm": np.asarray(norms_SM).ravel(),
            "loss_scale": np.ones(len(step)),
        },
        "heads": both | {"max_logit": logits, "max_logit_bound": logits},
        "params": both | {"group": np.array(["q"] * 2 * len(step), dtype=object), "nonfinite": counts},
    }  # fmt: skip


def said(events):
    return [(e.step, e.member, fields_of(e).get("tensor", e.kind), fields_of(e).get("where")) for e in events]


def test_what_breaks_is_said_with_its_place_in_the_order_of_the_step():
    found = Alarms().look(tables([[4.0], [NAN]], logits_SM=[[1], [INF]], gradients_SM=[[0], [7]]))
    assert said(found) == [
        (1, 0, "attention logits", ["layer 1"]),
        (1, 0, "loss", None),
        (1, 0, "gradient", ["layer 1 q"]),
    ]
    assert [e.what.direction for e in found] == ["forward", "forward", "backward"]


def test_a_tensor_that_breaks_again_after_it_was_sound_is_said_again():
    losses = [[4.0], [NAN], [NAN], [3.0], [INF], [3.0]]
    assert [step for step, *_ in said(Alarms().look(tables(losses)))] == [1, 4]


def test_numbers_that_break_every_other_step_do_not_fill_the_disk():
    losses = [[4.0], [NAN]] * 200
    assert len(Alarms().look(tables(losses))) == MOST_TIMES


def test_places_may_be_named_by_whoever_knows_them():
    named = Alarms(place=lambda layer, group: Place(path=f"blocks.{layer}.{group}"))
    (broken,) = named.look(tables([[4.0]], gradients_SM=[[1]]))
    assert broken.what.where == (Place(path="blocks.1.q"),) and MOST_PLACES > 1


def test_places_that_read_alike_are_named_once():
    weight, bias, other = (
        Place(layer=0, group="q", path="q.weight"),
        Place(layer=0, group="q", path="q.bias"),
        Place(layer=1),
    )
    assert first_places([weight, bias, other]) == (weight, other)
    assert len(first_places(Place(layer=layer) for layer in range(2 * MOST_PLACES))) == MOST_PLACES


def test_a_bound_that_is_unknown_is_not_broken():
    made = tables([[4.0]])
    made["heads"]["max_logit_bound"] = np.full(2, NAN)  # q and k were not seen
    assert Alarms().look(made) == []
    made["heads"]["max_logit"] = np.full(2, NAN)
    assert len(Alarms().look(made)) == 1


def test_the_end_decides_on_losses_that_are_not_finite():
    alarms = Alarms()
    assert [e.kind for e in alarms.look(tables([[4.0, 4.0], [4.0, NAN]]))] == ["nonfinite"]
    assert alarms.diverged is None
    assert said(alarms.end([0, 1])) == [(1, 1, "diverged", None)]
    assert (alarms.diverged.step, alarms.diverged.member) == (1, 1)
    assert alarms.end([0, 1]) == []


def test_every_tensor_that_is_looked_at_has_its_order():
    assert list(TENSORS) == ["activation", "attention logits", "loss", "gradient"]


@settings(max_examples=60)
@given(st.data())
def test_events_do_not_depend_on_the_blocks(data):
    n = data.draw(st.integers(1, 40))
    numbers = st.sampled_from([1.0, 4.0, 90.0, 4e3, NAN, INF])
    losses, logits, norms = (
        np.array(data.draw(st.lists(numbers, min_size=2 * n, max_size=2 * n))).reshape(n, 2) for _ in range(3)
    )
    gradients = (~np.isfinite(norms)).astype(int)
    cuts = data.draw(st.lists(st.integers(0, n), max_size=6))

    def events(edges):
        alarms, found = Alarms(), []
        for low, high in itertools.pairwise(edges):
            if low < high:
                part = slice(low, high)
                made = tables(
                    losses[part], start=low, logits_SM=logits[part], gradients_SM=gradients[part], grad_norms_SM=norms[part]
                )  # fmt: skip
                found += alarms.look(made)
        return found + alarms.end([0, 1])

    def by_member(found):
        return sorted(map(repr, said(found)))

    whole = events([0, n])
    assert by_member(whole) == by_member(events([0, *sorted(cuts), n]))
    for member in (0, 1):
        end = outcome(
            range(n), losses[:, member], grad_norms=norms[:, member], end_status="finished", planned_steps=n, unigram=None,
        )  # fmt: skip
        told = [e.step for e in whole if e.kind == "diverged" and e.member == member]
        assert told == ([] if end.diverged_at is None else [end.diverged_at]), "live as read back"


@pytest.mark.parametrize("table", ["steps", "heads", "params"])
def test_tables_that_are_missing_are_passed_over(table):
    made = tables([[4.0], [NAN]])
    del made[table]
    Alarms().look(made)
    assert Alarms().look({}) == []
