"""Events: written and read back the same, and whatever stands in a line, it is read."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.runs.event_lines import as_plain, event_as_json, event_in_json, fields_of
from attnscope.runs.events import (
    EVENTS,
    Diverged,
    Event,
    Nonfinite,
    NotRecorded,
    OptimizerSeen,
    Place,
    SkippedUpdate,
    Started,
    Unmeasured,
    Untyped,
    place_in_words,
)
from attnscope.runs.layout import to_json

TEXTS = st.text(max_size=8).filter(lambda text: text not in ("NaN", "Infinity", "-Infinity"))
NUMBERS = st.floats(allow_nan=False)
WHOLE = st.integers(-(2**53), 2**53)
PLACES = st.builds(
    Place, layer=st.none() | st.integers(0, 2**15 - 1), group=st.none() | TEXTS, path=st.none() | TEXTS
).filter(lambda place: place != Place())
# What a field of each type may hold.
VALUES = {
    str: TEXTS,
    bool: st.booleans(),
    bool | None: st.none() | st.booleans(),
    int: WHOLE,
    int | None: st.none() | WHOLE,
    float: NUMBERS,
    float | None: st.none() | NUMBERS,
    tuple[str, ...]: st.lists(TEXTS, max_size=3).map(tuple),
    tuple[tuple[object, ...], ...]: st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=2).map(tuple),
    tuple[Place, ...]: st.lists(PLACES, max_size=3).map(tuple),
    tuple[Place, ...] | None: st.none() | st.lists(PLACES, max_size=3).map(tuple),
}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=6,
)


def read(line):
    return event_in_json(json.loads(to_json(line)))


def written(what, *, step=3, member=None):
    return json.loads(to_json(event_as_json(Event(step=step, member=member, what=what))))


@given(st.data())
def test_every_kind_is_read_as_it_was_written(data):
    kind = data.draw(st.sampled_from(sorted(EVENTS.keys() - {"start", "not_recorded"})))
    values = {each.name: data.draw(VALUES[each.type]) for each in fields(EVENTS[kind])}
    event = Event(
        step=data.draw(st.integers(0, 2**31 - 1)), member=data.draw(st.none() | st.just(2)), what=EVENTS[kind](**values)
    )
    line = written(event.what, step=event.step, member=event.member)
    assert line["kind"] == kind
    again = event_in_json(line)
    assert (again.step, again.member, again.what) == (event.step, event.member, event.what)
    assert fields_of(again) == fields_of(event_in_json(json.loads(to_json(event_as_json(again)))))


@pytest.mark.parametrize(
    "what",
    [
        Started(segment=1, threads=None, files={"steps-0000.arrow": {"bytes": 3, "crc32": "0a"}}),
        NotRecorded(why_empty={"loss": "no scalar", "table heads": "none"}),
        Untyped(kind="later", fields={"a": [1, {"b": None}]}),
    ],
)
def test_kinds_with_tables_are_read_as_they_were_written(what):
    assert event_in_json(written(what)).what == what


@given(st.sampled_from([*EVENTS, "later"]), st.data())
def test_junk_in_any_field_of_any_kind_is_read_and_kept(kind, data):
    names = [each.name for each in fields(EVENTS[kind])] if kind in EVENTS else ["a"]
    junk = data.draw(st.dictionaries(st.sampled_from([*names, "places", "more"]), JUNK))
    event = read({"kind": kind, "step": 1, "member": None, "fields": junk})
    assert event.kind == kind and fields_of(event).keys() == junk.keys()
    assert isinstance(event.what, EVENTS.get(kind, Untyped) | Untyped)


@given(JUNK | st.dictionaries(st.sampled_from(["kind", "step", "member", "fields"]), JUNK))
def test_a_line_of_junk_is_no_event_or_one(line):
    event = read(line)
    assert event is None or (isinstance(line["kind"], str) and event.step == line["step"])


@pytest.mark.parametrize("kind", EVENTS)
def test_an_event_without_fields_is_its_defaults_or_nothing_that_is_understood(kind):
    what = event_in_json({"kind": kind, "step": 1, "member": None, "fields": {}}).what
    needed = [
        each.name
        for each in fields(EVENTS[kind])
        if each.type in (str, int, float, tuple[str, ...]) and each.default is MISSING
    ]
    assert isinstance(what, Untyped if needed else EVENTS[kind])


def test_a_field_of_a_wrong_type_is_as_one_that_is_missing():
    line = {
        "kind": "optimizer",
        "step": 1,
        "member": 0,
        "fields": {"name": "SGD", "parameters": "many", "devices": [1]},
    }
    assert event_in_json(line).what == OptimizerSeen(name="SGD", parameters=None, devices=())
    assert fields_of(event_in_json(line)) == line["fields"]


def test_old_places_in_words_are_understood():
    line = {
        "kind": "nonfinite",
        "step": 1,
        "member": 0,
        "fields": {"tensor": "gradient", "where": ["layer 2 q", "layer 10", "head"]},
    }
    assert event_in_json(line).what.where == (Place(layer=2, group="q"), Place(layer=10), Place(group="head"))


def test_places_stand_beside_their_words():
    where = (Place(layer=1, group="q", path="h.1.q.weight"), Place(layer=0, path="layer 7 of mine"), Place(path="head"))
    line = written(Nonfinite(tensor="gradient", direction="backward", where=where))
    assert line["fields"]["where"] == ["layer 1 q", "layer 7 of mine", "head"]
    assert event_in_json(line).what.where == where, "and a name that reads like a layer is none"
    line["fields"]["places"] = line["fields"]["places"][:2]  # they no longer belong together
    assert event_in_json(line).what.where[1] == Place(layer=7, group="of mine")


def test_what_has_no_place_names_none():
    assert written(Nonfinite(tensor="loss", direction="forward"))["fields"] == {
        "tensor": "loss",
        "direction": "forward",
    }
    assert written(SkippedUpdate(why="x"))["fields"] == {"why": "x", "where": [], "places": []}


@given(PLACES.filter(lambda place: place.path is None))
def test_the_words_of_a_layer_and_a_group_stay_the_same(place):
    assert place_in_words(place.words).words == place.words


def test_numbers_of_numpy_and_those_that_are_not_finite_are_written():
    line = written(
        Untyped(kind="x", fields={"a": np.float32("nan"), "b": [np.int64(3), float("inf")]}), step=np.int64(4)
    )
    assert line["step"] == 4 and line["fields"] == {"a": "NaN", "b": [3, "Infinity"]}
    assert fields_of(event_in_json(line))["b"] == [3, float("inf")]


def test_a_size_that_json_does_not_know_is_written_as_text():
    class Symbol:
        def __str__(self):
            return "s0"

    assert written(Unmeasured(name="a", backend="sdpa", shapes=((2, Symbol()),), reason=""))["fields"]["shapes"] == [
        [2, "s0"]
    ]


def test_the_kind_of_a_stranger_is_fit_to_show():
    assert event_in_json({"kind": "\x1b[2J", "step": 0, "member": None, "fields": {}}).kind == "�[2J"
    assert written(Diverged(why="not finite"))["kind"] == "diverged"


class Unprintable:
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (3, 3), (True, True), (None, None), ("x", "x"), ((1, {"a": {2}}), [1, {"a": [2]}]),
        (Path("a"), "a"), ({Path("b"): 1}, {"b": 1}), (Unprintable(), "Unprintable"),
        ([[[[[[1]]]]]], [[[["[[1]]"]]]]),
    ],
)  # fmt: skip
def test_values_that_json_does_not_know_are_written_as_text(value, plain):
    assert as_plain(value) == plain
    json.dumps(as_plain(value))
