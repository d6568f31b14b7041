"""What a report says, as plain data: from a run to members, events, evaluations, and two sentences.

Whatever stands in a run directory may be anybody's: texts are fit to show, numbers are numbers or None.

Shape key: N rows, S steps.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnscope.comparison.cells import Comparison, baseline_of, compare
from attnscope.comparison.member import Evaluation, Generation, MemberRow, member_rows
from attnscope.comparison.subjects import subjects_of
from attnscope.config import SETTINGS, get_setting
from attnscope.diagnose import Diagnosis, examine
from attnscope.errors import RunError
from attnscope.report.comparison import sentence_on
from attnscope.report.verdict import verdict_of
from attnscope.runs.event_lines import PLACES, fields_of
from attnscope.runs.events import (
    AttentionSeen,
    Diverged,
    Dropped,
    Evaluated,
    Event,
    Generated,
    Nonfinite,
    Started,
    Unmeasured,
)
from attnscope.runs.foreign import number_in, printable
from attnscope.runs.layout import to_json
from attnscope.runs.probe_events import CrossEntropySeen, FirstTargets
from attnscope.runs.reader import Run
from attnscope.runs.watched import AttentionLayer, NotMeasured, attention_layers, not_measured

if TYPE_CHECKING:
    import pandas as pd

MOST_EVENTS = 200
TOLD_ELSEWHERE = (Started, Evaluated, Generated, AttentionSeen, Unmeasured, CrossEntropySeen, FirstTargets)
MOST_TEXT = 2000  # characters of a generated text


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """An event in words; `member` is empty where it concerns all."""

    step: int
    member: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A report before it has a form.

    Attributes:
        name: of the run directory.
        status: of the run.
        created: time in UTC, ISO 8601.
        command: the command line.
        verdict: what happened, and what the attention of those members was like.
        members: in the order of run.json.
        differing: setting to its value in each member, only where members differ.
        reference: name of a reference loss (uniform, unigram, bigram, optimum) to nats per token.
        events: in the order of their steps, at most MOST_EVENTS of them.
        events_left_out: how many more there are.
        evaluations: at the end of training.
        generations: at the end of training.
        rows: query rows measured per head and step, the smallest and the largest number; None if nothing was.
        environment: versions and device, as texts.
        data: fingerprint of what was trained on, as texts.
        layers: attention layers that were seen in a watched run.
        not_measured: calls that were seen there and could not be measured.
        diagnosis: what the rules say.
        comparison: cells of a sweep; None where the run has none.
        lost: what could not be read.
    """

    name: str
    status: str
    created: str
    command: str
    verdict: tuple[str, str]
    members: tuple[MemberRow, ...]
    differing: Mapping[str, tuple[str, ...]]
    reference: Mapping[str, float]
    events: tuple[Happening, ...]
    events_left_out: int
    evaluations: tuple[Evaluation, ...]
    generations: tuple[Generation, ...]
    rows: tuple[int, int] | None
    environment: Mapping[str, str]
    data: Mapping[str, str]
    layers: tuple[AttentionLayer, ...]
    not_measured: tuple[NotMeasured, ...]
    diagnosis: Diagnosis
    comparison: Comparison | None
    lost: tuple[str, ...]


def contents_of(run: Run) -> Contents:
    """Read from a run what its report says."""
    evaluations = tuple(
        Evaluation(member=member or "", seq_len=evaluated.seq_len, val_loss=evaluated.val_loss)
        for _, member, evaluated in run.happened(Evaluated)
    )
    generations = tuple(
        Generation(
            member=member or "",
            prompt=_lines(generated.prompt),
            text=_lines(generated.text),
            loss_from_prefixes=generated.loss_from_prefixes,
        )
        for _, member, generated in run.happened(Generated)
    )
    happenings = sorted(
        (
            Happening(step=event.step, member=member or "", kind=event.kind, what=_in_words(event))
            for member, event in run.happenings
            if not isinstance(event.what, TOLD_ELSEWHERE)
        ),
        key=lambda happening: happening.step,
    )
    differing = _differing(run)
    members = tuple(member_rows(run, evaluations, generations, differing))
    swept = baseline_of(run)
    comparison = None if swept is None else compare(subjects_of(run, members), baseline=swept)
    diagnosis = examine(run)
    return Contents(
        name=run.name,
        status=run.status,
        created=run.created,
        command=printable(" ".join(run.command), 400),
        verdict=_verdict(members, differing, comparison),
        members=members,
        differing=differing,
        reference=_reference(run),
        events=tuple(happenings[:MOST_EVENTS]),
        events_left_out=max(0, len(happenings) - MOST_EVENTS),
        evaluations=evaluations,
        generations=generations,
        rows=_rows(run.heads),
        environment=_texts(run.environment),
        data=_texts(run.data.get("fingerprint")),
        layers=attention_layers(run),
        not_measured=not_measured(run),
        diagnosis=diagnosis,
        comparison=comparison,
        lost=tuple(printable(note, 400) for note in run.lost),
    )


def _verdict(
    members: Sequence[MemberRow],
    differing: Mapping[str, Sequence[str]],
    comparison: Comparison | None,
) -> tuple[str, str]:
    outcomes, attention = verdict_of(members, differing)
    compared = None if comparison is None else sentence_on(comparison)
    return outcomes, compared or attention


def _differing(run: Run) -> dict[str, tuple[str, ...]]:
    """Settings in which members differ, each member's value in the order of run.json."""
    keys = dict.fromkeys(key for member in run.members for key in member.settings)
    differing = {}
    for key in keys:
        values = tuple(
            _shown(member.settings[key] if key in member.settings else _base(run, key)) for member in run.members
        )
        if len(set(values)) > 1:
            differing[printable(key, 60)] = values
    return differing


def _base(run: Run, key: str) -> object:
    try:
        return get_setting(run.config, key) if key in SETTINGS else None
    except RunError:
        return None


def _reference(run: Run) -> dict[str, float]:
    reference = run.data.get("reference")
    if not isinstance(reference, dict):
        return {}
    losses = {key: number_in(reference.get(key)) for key in ("uniform", "unigram", "bigram", "optimum")}
    return {key: value for key, value in losses.items() if value is not None and np.isfinite(value)}


def _rows(heads: "pd.DataFrame") -> tuple[int, int] | None:
    return (int(heads["rows"].min()), int(heads["rows"].max())) if len(heads) else None


def _in_words(event: Event) -> str:
    what = event.what
    if isinstance(what, Nonfinite):
        places = ", ".join(printable(place.words, 40) for place in what.where or ())
        return printable(f"{printable(what.tensor, 60)} not finite" + (f": {places}" if places else ""), 300)
    if isinstance(what, Diverged):
        return printable(f"loss {printable(what.why, 60)}", 100)
    if isinstance(what, Dropped):
        return "no longer trained: the others go on without it"
    told = (
        f"{key}: {_told(value)}" for key, value in fields_of(event).items() if key != PLACES
    )  # in words they are told
    return printable("; ".join(told), 300)


def _told(value: object) -> str:
    if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else to_json(value)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(printable(line, 200) for line in text[:MOST_TEXT].splitlines())


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    return printable(value if isinstance(value, str) else json.dumps(value, default=str), 60)


def _texts(table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        return {}
    return {printable(key, 40): _shown(value) for key, value in list(table.items())[:40]}
