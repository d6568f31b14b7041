"""What a report says, as plain data: from a run to members, events, evaluations, and two sentences.

Whatever stands in a run directory may be anybody's: texts are fit to show, numbers are numbers or None.

Shape key: N rows, S steps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnscope.config import SETTINGS, Config, get_setting
from attnscope.diagnose import Finding, diagnose
from attnscope.diagnose.by_member import configs_of
from attnscope.errors import RunError
from attnscope.report.compare import Comparison, baseline_of, compare, subjects_of
from attnscope.report.series import rows_of_member
from attnscope.report.sweeps import sentence_on
from attnscope.report.verdict import MemberRow, Softmax, verdict_of
from attnscope.runs.foreign import printable
from attnscope.runs.layout import to_json
from attnscope.runs.reader import MemberRecord, Run
from attnscope.runs.watched import AttentionLayer, NotMeasured, attention_layers, not_measured

if TYPE_CHECKING:
    import pandas as pd

MOST_EVENTS = 200
TOLD_ELSEWHERE = ("start", "evaluation", "generation", "attention", "not_measured")
MOST_TEXT = 2000  # characters of a generated text


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """An event in words; `member` is empty where it concerns all."""

    step: int
    member: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The held-out loss of a trained member at one sequence length, nats per token."""

    member: str
    seq_len: int
    val_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a member wrote after a held-out prompt, and its loss where it sees no token that it has to predict.

    Attributes:
        member: its name.
        prompt: lines of the held-out text it went on with.
        text: lines it wrote.
        loss_from_prefixes: nats per token; None where it was not measured.
    """

    member: str
    prompt: tuple[str, ...]
    text: tuple[str, ...]
    loss_from_prefixes: float | None


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
        findings: what the rules found, causes first.
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
    findings: tuple[Finding, ...]
    comparison: Comparison | None
    lost: tuple[str, ...]


def contents(run: Run) -> Contents:
    """Read from a run what its report says."""
    events = [
        (int(step), "" if member != member else str(member), str(kind), fields)
        for step, member, kind, fields in zip(
            run.events["step"],
            run.events["member"].astype(object),
            run.events["kind"],
            run.events["fields"],
            strict=True,
        )
    ]
    evaluations = tuple(
        Evaluation(member=member, seq_len=int(seq_len), val_loss=val_loss)
        for _, member, kind, fields in events
        if kind == "evaluation"
        and (seq_len := _number(fields.get("seq_len"))) is not None
        and abs(seq_len) < 2**53
        and (val_loss := _number(fields.get("val_loss"))) is not None
    )
    generations = tuple(
        Generation(
            member=member,
            prompt=_lines(fields.get("prompt")),
            text=_lines(fields.get("text")),
            loss_from_prefixes=_number(fields.get("loss_from_prefixes")),
        )
        for _, member, kind, fields in events
        if kind == "generation"
    )
    happenings = sorted(
        (
            Happening(step=step, member=member, kind=kind, what=_in_words(kind, fields))
            for step, member, kind, fields in events
            if kind not in TOLD_ELSEWHERE
        ),
        key=lambda each: each.step,
    )
    differing = _differing(run)
    members = tuple(_members(run, evaluations, generations, differing))
    swept = baseline_of(run)
    comparison = None if swept is None else compare(subjects_of(run, members), baseline=swept)
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
        findings=diagnose(run),
        comparison=comparison,
        lost=tuple(printable(note, 400) for note in run.lost),
    )


def _members(
    run: Run,
    evaluations: Sequence[Evaluation],
    generations: Sequence[Generation],
    differing: Mapping[str, tuple[str, ...]],
) -> list[MemberRow]:
    prefix_loss = {each.member: each.loss_from_prefixes for each in generations}
    shortest: dict[str, Evaluation] = {}
    for each in evaluations:  # the first of a member is at the length it was trained with
        shortest.setdefault(each.member, each)
    rows = []
    configs = configs_of(run)
    for place, member in enumerate(run.members):
        start, end = _first_and_last(run.heads, member.name)
        evaluation = shortest.get(member.name)
        rows.append(
            MemberRow(
                name=member.name,
                status=member.status,
                error=member.error,
                is_falling=member.is_falling,
                step=member.last_step if member.diverged_at is None else member.diverged_at,
                nonfinite_at=member.nonfinite_at,
                first_loss=member.first_loss,
                best_loss=member.best_loss,
                final_loss=member.final_loss,
                val_loss=evaluation.val_loss if evaluation else _last_val_loss(run, member),
                prefix_loss=prefix_loss.get(member.name),
                unigram=run.unigram_of(member.part),
                theory_std=_theory_std(configs[place]),
                start=start,
                end=end,
                settings={key: values[place] for key, values in differing.items()},
            )
        )
    return rows


def _verdict(
    members: Sequence[MemberRow],
    differing: Mapping[str, Sequence[str]],
    comparison: Comparison | None,
) -> tuple[str, str]:
    outcomes, attention = verdict_of(members, differing)
    compared = None if comparison is None else sentence_on(comparison)
    return outcomes, compared or attention


def _theory_std(config: Config | None) -> float | None:
    if config is None:
        return None
    rule, root = config.attention.scale, math.sqrt(config.d_head)
    named = {"inverse_sqrt": 1.0, "depth": 1.0, "inverse": 1 / root, "none": root, "learned": None}
    return named[rule] if isinstance(rule, str) else float(rule) * root


def _last_val_loss(run: Run, member: MemberRecord) -> float | None:
    losses_N = run.steps["val_loss"].to_numpy()[rows_of_member(run.steps, member.name)]
    evaluated_N = losses_N[~np.isnan(losses_N)]
    return float(evaluated_N[-1]) if len(evaluated_N) else None


def _first_and_last(heads: "pd.DataFrame", name: str) -> tuple[Softmax, Softmax]:
    """Attention at the first step measured, and at the last one at which no more heads were broken than then."""
    rows_N = rows_of_member(heads, name)
    if not len(rows_N):
        return Softmax(), Softmax()
    step_N = heads["step"].to_numpy()[rows_N]
    starts_S = np.flatnonzero(np.r_[True, step_N[1:] != step_N[:-1]])
    sound_N = np.isfinite(heads["max_prob"].to_numpy()[rows_N])
    sound_S = np.add.reduceat(sound_N.astype(np.int64), starts_S)
    last = int(np.flatnonzero(sound_S >= sound_S[0])[-1])
    ends_S = np.r_[starts_S[1:], len(rows_N)]
    return tuple(  # type: ignore[return-value]  # two of them
        _softmax(heads, rows_N[starts_S[s] : ends_S[s]]) for s in (0, last)
    )


def _softmax(heads: "pd.DataFrame", rows_N: NDArray[np.int64]) -> Softmax:
    """Means over layers and heads, the largest of max_logit; heads without a measurable row are left out."""
    found = heads.iloc[rows_N]

    def mean(column: str) -> float | None:
        values = found[column].to_numpy().astype(np.float64)
        values = values[~np.isnan(values)]
        with np.errstate(all="ignore"):
            return float(values.mean()) if len(values) else None

    return Softmax(
        step=int(found["step"].iloc[0]),
        entropy=mean("entropy"),
        entropy_ratio=mean("entropy_ratio"),
        max_prob=mean("max_prob"),
        logit_std=mean("logit_std"),
        max_logit=None if found["max_logit"].isna().all() else float(found["max_logit"].max()),
    )


def _differing(run: Run) -> dict[str, tuple[str, ...]]:
    """Settings in which members differ, each member's value in the order of run.json."""
    keys = dict.fromkeys(key for member in run.members for key in member.settings)
    found = {}
    for key in keys:
        values = tuple(
            _shown(member.settings[key] if key in member.settings else _base(run, key))
            for member in run.members
        )
        if len(set(values)) > 1:
            found[printable(key, 60)] = values
    return found


def _base(run: Run, key: str) -> object:
    try:
        return get_setting(run.config, key) if key in SETTINGS else None
    except RunError:
        return None


def _reference(run: Run) -> dict[str, float]:
    reference = run.data.get("reference")
    if not isinstance(reference, dict):
        return {}
    found = {
        key: _number(reference.get(key)) for key in ("uniform", "unigram", "bigram", "optimum")
    }
    return {key: value for key, value in found.items() if value is not None and np.isfinite(value)}


def _rows(heads: "pd.DataFrame") -> tuple[int, int] | None:
    return (int(heads["rows"].min()), int(heads["rows"].max())) if len(heads) else None


def _in_words(kind: str, fields: Mapping[str, object]) -> str:
    if kind == "nonfinite":
        where = fields.get("where")
        places = (
            ", ".join(printable(place, 40) for place in where) if isinstance(where, list) else ""
        )
        return printable(
            f"{printable(fields.get('tensor'), 60)} not finite" + (f": {places}" if places else ""),
            300,
        )
    if kind == "diverged":
        return printable(f"loss {printable(fields.get('why'), 60)}", 100)
    if kind == "dropped":
        return "no longer trained: the others go on without it"
    return printable("; ".join(f"{key}: {_told(value)}" for key, value in fields.items()), 300)


def _told(value: object) -> str:
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else to_json(value)


def _lines(text: object) -> tuple[str, ...]:
    if not isinstance(text, str):
        return ()
    return tuple(printable(line, 200) for line in text[:MOST_TEXT].splitlines())


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


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
