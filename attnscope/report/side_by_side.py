"""Members of any runs in one document: their tables joined under names that tell them apart, their contents merged.

Figures and sections are those of a report: they see one run with these members.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attnscope.comparison.cells import Comparison, baseline_of, compare
from attnscope.comparison.member import MemberRow, renamed
from attnscope.comparison.subjects import Subject, subjects_of
from attnscope.diagnose import Diagnosis
from attnscope.errors import RunError
from attnscope.report.comparison import sentence_on
from attnscope.report.contents import Contents, contents_of
from attnscope.report.verdict import verdict_of
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd

SECTIONS_OF_DATA = ("data.", "model.seq_len", "model.kind")  # settings that change what a loss is measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A run and those of its members that are compared; None = all."""

    run: Run
    members: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The tables of several runs, as `attnscope.runs.reader.Run` has those of one."""

    steps: "pd.DataFrame"
    heads: "pd.DataFrame"
    layers: "pd.DataFrame"
    params: "pd.DataFrame"


def side_by_side(chosen: Sequence[Chosen], *, baseline: Mapping[str, str] | None = None) -> tuple[Joined, Contents]:
    """Put members of one or more runs side by side.

    Args:
        chosen: in the order in which they are shown; a run may come more than once.
        baseline: settings of the cell that others are compared with; what it leaves open is as in the sweep's own baseline
            where there is one run, else as in the first cell that fits.

    Raises:
        RunError: a member does not exist, or there are fewer than two.
    """
    labels = _labels([choice.run for choice in chosen])
    subjects: list[Subject] = []
    contents_of_runs: list[Contents] = []
    names: list[dict[str, str]] = []
    for choice, label in zip(chosen, labels, strict=True):
        known = [member.name for member in choice.run.members]
        wanted = known if choice.members is None else list(choice.members)
        for name in wanted:
            if name not in known:
                raise RunError(
                    f"{printable(choice.run.path, 200)} has no member {printable(name, 80)!r}. Members: "
                    f"{', '.join(known[:8])}{' ...' if len(known) > 8 else ''}."
                )
        read = contents_of(choice.run)
        several = len(chosen) > 1
        new = {name: (label if len(known) == 1 else f"{label}:{name}") if several else name for name in wanted}
        names.append(new)
        contents_of_runs.append(read)
        subjects += [
            replace(subject, row=renamed(subject.row, new[subject.row.name]))
            for subject in subjects_of(choice.run, read.members)
            if subject.row.name in new
        ]
    if len(subjects) < 2:
        raise RunError("Only one member was named: there is nothing to compare it with.")
    # Of one sweep, its own baseline holds where nothing else is said.
    own = baseline_of(chosen[0].run) if len(chosen) == 1 else None
    comparison = compare(subjects, baseline={**(own or {}), **(baseline or {})})
    rows = tuple(
        replace(subject.row, settings={key: subject.settings.get(key, "-") for key in comparison.axes})
        for subject in subjects
    )
    tables = {
        table: _joined([getattr(choice.run, table) for choice in chosen], names)
        for table in ("steps", "heads", "layers", "params")
    }
    return Joined(**tables), _merged(contents_of_runs, names, labels, rows, comparison)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of the runs; where two folders hold runs of one name, with their folder."""
    paths = {run.path.resolve() for run in runs}
    counts = Counter(printable(path.name) for path in paths)
    return [
        run.name if counts[run.name] == 1 else printable(f"{run.path.resolve().parent.name}/{run.name}", 80)
        for run in runs
    ]


def _joined(tables: "Sequence[pd.DataFrame]", names: Sequence[Mapping[str, str]]) -> "pd.DataFrame":
    import pandas as pd

    categories = list(dict.fromkeys(new for new_names in names for new in new_names.values()))
    pieces = []
    for table, new in zip(tables, names, strict=True):
        codes = {name: categories.index(shown) for name, shown in new.items()}
        old = table["member"].cat
        code_of = [codes.get(name, -1) for name in old.categories]
        codes_N = pd.Series(code_of, dtype="int32").to_numpy()[old.codes.to_numpy()]
        piece = table[codes_N >= 0].copy()
        piece["member"] = pd.Categorical.from_codes(
            codes_N[codes_N >= 0], categories=pd.Index(categories, dtype=object)
        )
        if "group" in piece:
            piece["group"] = piece["group"].astype(object)
        pieces.append(piece)
    return pd.concat(pieces, ignore_index=True)


def _merged(
    contents_of_runs: Sequence[Contents],
    names: Sequence[Mapping[str, str]],
    labels: Sequence[str],
    rows: tuple[MemberRow, ...],
    comparison: Comparison,
) -> Contents:
    first = contents_of_runs[0]
    differing = {key: tuple(row.settings[key] for row in rows) for key in comparison.axes}
    outcomes, attention = verdict_of(rows, differing)
    return replace(
        first,
        name=printable(" against ".join(dict.fromkeys(labels)), 120),
        status=", ".join(dict.fromkeys(contents.status for contents in contents_of_runs)),
        created=", ".join(dict.fromkeys(contents.created for contents in contents_of_runs)),
        command="; ".join(dict.fromkeys(contents.command for contents in contents_of_runs)),
        verdict=(outcomes, _second_sentence(comparison, attention, differing)),
        members=rows,
        differing=differing,
        # Reference losses are of one text: where runs have different ones, no line fits all.
        reference=first.reference if all(e.reference == first.reference for e in contents_of_runs) else {},
        events=(),
        events_left_out=0,
        evaluations=tuple(
            replace(evaluation, member=new[evaluation.member])
            for contents, new in zip(contents_of_runs, names, strict=True)
            for evaluation in contents.evaluations
            if evaluation.member in new
        ),
        generations=(),
        environment=_shared(contents.environment for contents in contents_of_runs),
        data=_shared(contents.data for contents in contents_of_runs),
        layers=(),
        not_measured=(),
        diagnosis=Diagnosis(findings=(), not_looked=()),
        comparison=comparison,
        lost=tuple(
            f"{label}: {note}"
            for contents, label in zip(contents_of_runs, labels, strict=True)
            for note in contents.lost
        ),
    )


def _second_sentence(comparison: Comparison, attention: str, differing: Mapping[str, Sequence[str]]) -> str:
    if any(key.startswith(SECTIONS_OF_DATA) for key in differing):
        unlike = ", ".join(key for key in differing if key.startswith(SECTIONS_OF_DATA))
        return (
            f"They differ in {unlike}, so their losses are not measured on the same text: compare outcomes, not losses."
        )
    return sentence_on(comparison) or attention


def _shared(tables: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Key to value, or to all values where they differ."""
    values_of: dict[str, dict[str, None]] = {}
    for table in tables:
        for key, value in table.items():
            values_of.setdefault(key, {})[value] = None
    return {key: "; ".join(values) for key, values in values_of.items()}
