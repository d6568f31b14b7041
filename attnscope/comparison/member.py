"""One member in numbers: how it ended, and what its attention was at its first and its last step."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnscope.config import Config, scale_of
from attnscope.runs.by_member import configs_of, rows_of_member
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd

# What a row is in JSON, in this order.
IN_JSON = (
    "name",
    "status",
    "step",
    "nonfinite_at",
    "first_loss",
    "best_loss",
    "final_loss",
    "val_loss",
    "prefix_loss",
    "unigram",
    "theory_std",
    "start",
    "end",
    "settings",
    "error",
    "is_falling",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """A member's attention at one step: means over layers and heads, `max_logit` the largest; None = not measured."""

    step: int | None = None
    entropy: float | None = None
    entropy_ratio: float | None = None
    max_prob: float | None = None
    logit_std: float | None = None
    max_logit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRow:
    """One member of a run in the report.

    Attributes:
        record: the member and how it ended.
        val_loss: held-out, at the length it was trained with, nats per token as the two below.
        prefix_loss: held-out, where no token that is to be predicted is seen; None where it was not measured.
        unigram: loss of predicting from token frequencies alone, on this member's data; None = unknown.
        theory_std: scale * sqrt(d_head) of layer 0: logit_std where q and k have entries of mean 0 and variance 1; None =
            unknown, or learned.
        start: attention at the first step measured.
        end: attention at the last step measured at which it was still finite.
        settings: those in which members differ, as texts.
    """

    record: MemberRecord
    val_loss: float | None
    prefix_loss: float | None
    unigram: float | None
    theory_std: float | None
    start: Softmax
    end: Softmax
    settings: Mapping[str, str]

    @property
    def step(self) -> int | None:
        """Where it diverged, or the last one recorded."""
        return self.record.last_step if self.record.diverged_at is None else self.record.diverged_at

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def error(self) -> str | None:
        return self.record.error

    @property
    def nonfinite_at(self) -> int | None:
        return self.record.nonfinite_at

    @property
    def first_loss(self) -> float | None:
        return self.record.first_loss

    @property
    def best_loss(self) -> float | None:
        return self.record.best_loss

    @property
    def final_loss(self) -> float | None:
        return self.record.final_loss

    @property
    def is_falling(self) -> bool | None:
        return self.record.is_falling


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


def member_rows(
    run: Run,
    evaluations: Sequence[Evaluation],
    generations: Sequence[Generation],
    differing: Mapping[str, tuple[str, ...]],
) -> list[MemberRow]:
    """A row for each member of a run.

    Args:
        run: whose members.
        evaluations: of trained members; the first of each is at the length it was trained with.
        generations: of trained members.
        differing: settings in which members differ, with each member's value, in the order of run.json.
    """
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
                record=member,
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


def row_as_json(row: MemberRow) -> dict[str, object]:
    """A row for `runs.layout.to_json`."""
    table = {name: getattr(row, name) for name in IN_JSON}
    return table | {name: asdict(table[name]) for name in ("start", "end")}


def renamed(row: MemberRow, name: str) -> MemberRow:
    """The same member by another name."""
    return replace(row, record=replace(row.record, entry=replace(row.record.entry, name=name)))


def _theory_std(config: Config | None) -> float | None:
    if config is None:
        return None
    scale = scale_of(config.attention.scale, d_head=config.d_head)
    return None if scale is None else scale / config.d_head**-0.5


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
