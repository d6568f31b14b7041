"""Opens a run directory, anybody's, and makes pandas tables of it. Needs no torch, executes nothing.

Tables are read when they are first asked for. What cannot be read is left out and said in `Run.lost`; only a run.json
that cannot be used is an error. Texts from inside (settings, data, environment, fields of events) are as they were
written: show them through `attnscope.runs.foreign.printable`. Names, commands, kinds and groups have been through it.

Shape key: N rows.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnscope.config import Config, parse_table
from attnscope.errors import ConfigError, RunError
from attnscope.runs.divergence import FED
from attnscope.runs.event_lines import fields_of
from attnscope.runs.events import Event, Nonfinite, Started
from attnscope.runs.foreign import printable
from attnscope.runs.holder import writer_of
from attnscope.runs.layout import RUN_FILE, Manifest, table_file
from attnscope.runs.listing import check_is_run
from attnscope.runs.manifest import change_of, is_whole, read_manifest
from attnscope.runs.members import MemberRecord, end_status_of, guessing_of, losses_seen, member_record
from attnscope.runs.parts import (
    NEVER,
    PartFiles,
    error_of,
    gaps_in,
    parts_of,
    read_events,
    read_table,
    started_with,
    status_of,
    strangers,
    without_steps,
    written_elsewhere,
)
from attnscope.runs.probe_events import CrossEntropySeen
from attnscope.runs.streams import TableData, decode_table

if TYPE_CHECKING:
    import pandas as pd

_What = TypeVar("_What")


class Run:
    """A run directory as it was when it was opened.

    Attributes:
        path: of the directory.
        name: of the directory, fit to show.
        schema_version: of the format.
        kind: train, or watch: recorded in code that is not attnscope's.
        created: time in UTC, ISO 8601.
        command: the command line, word by word.
        environment: versions and device.
        data: fingerprint; `reference` has the losses to compare with; `parts`, by number, what is different in a part.
        entries: who was to be trained, in which part; `members` also says how it went.
        status: finished, interrupted, failed, killed or running: whoever writes it is alive, or on another machine.
        writer: who writes it on another machine and how old its last record is; empty if nobody does.
        ends: part to what its end.json says; parts without one are missing.
    """

    def __init__(self, path: Path, manifest: Manifest, until: int | None = None) -> None:
        """Use `open_run`."""
        self.path = path
        self.name = printable(path.resolve().name)
        self.schema_version = manifest.schema_version
        self.kind = manifest.kind
        self.created = manifest.created
        self.command = manifest.command
        self.environment = manifest.environment
        self.data = manifest.data
        self._manifest = manifest
        self.entries = manifest.members
        self._names = [entry.name for entry in manifest.members]
        self._parts = parts_of(path, manifest)
        if until is not None:
            self._parts = tuple(replace(part, end=None) for part in self._parts)
        self._limit = NEVER if until is None else until + 1
        self._is_held = (holder := writer_of(path)) is not None or until is not None
        self.status = "running" if until is not None else status_of(self._parts, holder)
        self.writer = written_elsewhere(self._parts, holder)
        self.ends = {part.index: part.end for part in self._parts if part.end}
        self._notes = [note for part in self._parts for note in part.lost]
        self._notes += [note for note in [change_of(path)] if note]
        self._notes += strangers(path, [part.index for part in self._parts])
        self._steps_tables: dict[tuple[int, int], TableData] = {}
        self._numbers: dict[int, dict[int, int]] = {}  # part, index in it -> index in run.json
        for number, entry in enumerate(manifest.members):
            self._numbers.setdefault(entry.part, {})[entry.index] = number

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status}, members: {', '.join(self._names[:8])})"

    @cached_property
    def config(self) -> Config:
        """The resolved config.

        Raises:
            RunError: it holds what this version does not know, or the run was watched and has none.
        """
        if self.kind == "watch":
            raise RunError(
                f"{printable(self.path, 400)} was watched: its training was configured by its own script. "
                f"Its command: {printable(' '.join(self.command), 200)}"
            )
        where = f"{printable(self.path / RUN_FILE, 400)}: config"
        try:
            return parse_table(self._manifest.config, where=where)
        except ConfigError as error:
            raise RunError(printable(error, 1000)) from None
        except Exception as error:
            # The table is anybody's, and checks meant for people's TOML need not expect what is in it.
            raise RunError(f"{where} cannot be understood: {printable(error)}.") from None

    @cached_property
    def steps(self) -> "pd.DataFrame":
        """One row per step and member: the columns of `layout.STEPS`, `member` as the name.

        In all tables rows come part by part in the order in which they were recorded, and rows that a resumed run
        recorded anew are there once.
        """
        return self._read("steps")

    @cached_property
    def heads(self) -> "pd.DataFrame":
        """One row per step, member, layer and head: the columns of `layout.HEADS`, `member` as the name."""
        return self._read("heads")

    @cached_property
    def layers(self) -> "pd.DataFrame":
        """One row per step, member and layer: the columns of `layout.LAYERS`, `member` as the name.

        Empty for runs of attnscope versions that had no such table.
        """
        return self._read("layers")

    @cached_property
    def params(self) -> "pd.DataFrame":
        """One row per step, member, layer and group: the columns of `layout.PARAMS`, `member` as the name."""
        return self._read("params")

    @cached_property
    def events(self) -> "pd.DataFrame":
        """What happened once: part, segment, step, member (its name, missing if it concerns all), kind, fields.

        `fields` holds a dictionary; what it holds depends on the kind.
        """
        import pandas as pd

        rows = self._events_kept
        codes = [self._number_of(part, event) for part, _, event in rows]
        return pd.DataFrame(
            {
                "part": np.array([part for part, _, _ in rows], dtype=np.int32),
                "segment": np.array([segment for _, segment, _ in rows], dtype=np.int32),
                "step": np.array([event.step for _, _, event in rows], dtype=np.int32),
                "member": pd.Categorical.from_codes(
                    np.array(codes, dtype=np.int32), categories=pd.Index(self._names, dtype=object)
                ),
                "kind": pd.Series([event.kind for _, _, event in rows], dtype=object),
                "fields": pd.Series([fields_of(event) for _, _, event in rows], dtype=object),
            }
        )

    @cached_property
    def happenings(self) -> tuple[tuple[str | None, Event], ...]:
        """The rows of `events`, typed: the name of the member, None if it concerns all, and what happened."""
        return tuple(
            (None if (m := self._number_of(part, event)) < 0 else self._names[m], event)
            for part, _, event in self._events_kept
        )

    def happened(self, kind: type[_What]) -> list[tuple[int, str | None, _What]]:
        """Step, name of the member and what happened, of the events of one kind."""
        return [(event.step, member, event.what) for member, event in self.happenings if isinstance(event.what, kind)]

    @cached_property
    def members(self) -> tuple[MemberRecord, ...]:
        """Who was trained and how it ended, in the order of run.json."""
        codes_N = self.steps["member"].cat.codes.to_numpy()
        order_N = np.argsort(codes_N, kind="stable")
        bounds = np.searchsorted(codes_N[order_N], np.arange(len(self._names) + 1))
        columns = {name: self.steps[name].to_numpy()[order_N] for name in FED}
        seen_N = self.loss_seen[order_N] if self.kind == "watch" else None
        ends = {part.index: end_status_of(part, run_status=self.status, is_held=self._is_held) for part in self._parts}
        errors = {part.index: error_of(part) for part in self._parts}
        entropies = {name: what for _, name, what in reversed(self.happened(CrossEntropySeen))}
        return tuple(
            member_record(
                entry,
                {name: x_N[low:high] for name, x_N in columns.items()},
                end_status=ends[entry.part],
                error=errors[entry.part],
                config=self._manifest.config,
                unigram=self.unigram_of(entry.part),
                seen=None if seen_N is None else seen_N[low:high],
                guessing=guessing_of(self.data_of(entry.part).get("reference"), entropies.get(entry.name)),
            )
            for entry, (low, high) in zip(self.entries, pairwise(bounds), strict=True)
        )

    @cached_property
    def loss_seen(self) -> NDArray[np.bool_]:
        """Whether the loss of each row of `steps` was seen, (N,): in watched code NaN also stands for one that was not."""
        if self.kind == "train":
            return np.ones(len(self.steps), dtype=bool)
        broken = [
            (m, event.step)
            for part, _, event in self._events_kept
            if isinstance(event.what, Nonfinite) and event.what.tensor == "loss"
            for index, m in self._numbers[part].items()
            if event.member in (None, index)
        ]
        return losses_seen(self.steps, broken, len(self.entries))

    @property
    def lost(self) -> tuple[str, ...]:
        """One line for each thing that could not be read; asks for all tables."""
        for name in ("steps", "heads", "layers", "params", "events"):
            getattr(self, name)
        return tuple(sorted(set(self._notes)))

    def name_of(self, part: int, index: int) -> str:
        """The name of the member at position `index` along the axis M of a part."""
        return self._names[self._numbers[part][index]]

    def threads_of(self, part: int) -> int | None:
        """Threads that a part was trained with, or one that did begin where it did not; None = nobody knows."""
        started = started_with(self._parts, part)
        if started is not None and is_whole(started.threads, 1, 2**15):
            return started.threads
        # Before parts said it, the process that made the run did, which trained all but sweeps.
        made_with = self.environment.get("threads")
        began = any(part.segments for part in self._parts) and "sweep" not in self._manifest.config
        return made_with if began and is_whole(made_with, 1, 2**15) else None

    def data_of(self, part: int) -> Mapping[str, object]:
        """What run.json says of the data of a part: fingerprint and reference."""
        others = self.data.get("parts")
        other = others.get(str(part)) if isinstance(others, dict) else None
        return other if isinstance(other, dict) else self.data

    def unigram_of(self, part: int) -> float | None:
        """Unigram loss of what a part was trained on, nats per token; None = unknown."""
        reference = self.data_of(part).get("reference")
        unigram = reference.get("unigram") if isinstance(reference, dict) else None
        return unigram if isinstance(unigram, float) else None

    def _read(self, table: str) -> "pd.DataFrame":
        import pandas as pd
        from pandas.api.types import union_categoricals

        chunks = [self._chunk(decode_table(b"", table), np.empty(0, dtype=np.int32))]
        for part in self._parts:
            decoded = {segment: self._table(part, segment, table) for segment in part.segments}
            ends = self._replaced_from(part, decoded)
            steps = {segment: self._table(part, segment, "steps") for segment in decoded}
            if table != "steps":
                self._notes += without_steps(part, table, decoded, steps)
            elif self.kind == "train":
                starts = {segment: self._starts_in(part, segment) for segment in decoded}
                self._notes += gaps_in(part, steps, starts, ends)
            for segment, records in decoded.items():
                steps_N, members_N = records.columns["step"], records.columns["member"]
                code_of = np.full(1 << 16, -1, dtype=np.int32)  # of every int16; negative ones at the end
                for index, number in self._numbers[part.index].items():
                    if 0 <= index < 1 << 15:
                        code_of[index] = number
                codes_N = code_of[members_N.view(np.uint16)]
                if strange := int((codes_N < 0).sum()):
                    name = f"{part.path.name}/{table_file(table, segment)}"
                    self._notes.append(f"{name}: {strange} rows belong to no member of run.json")
                keep_N = (codes_N >= 0) & (steps_N < ends[segment])
                chunk = self._chunk(records, codes_N)
                if not keep_N.all():  # a copy, which a long run has no room for
                    chunk = {name: x[keep_N] for name, x in chunk.items()}
                chunks.append(chunk)
                del records, chunk
            decoded.clear()
        filled = [chunk for chunk in chunks if len(chunk["step"])]
        if len(filled) == 1:
            return pd.DataFrame(filled[0], copy=False)
        columns: dict[str, Any] = {}
        for name in list(chunks[0]):
            pieces = [chunk.pop(name) for chunk in chunks]
            if isinstance(pieces[0], pd.Categorical):
                joined = union_categoricals(pieces)  # its names may have become pandas' own text type
                columns[name] = joined.rename_categories(pd.Index(joined.categories, dtype=object))
            else:
                columns[name] = np.concatenate(pieces)
        return pd.DataFrame(columns, copy=False)

    def _chunk(self, table: TableData, codes_N: NDArray[np.int32]) -> dict[str, Any]:
        """The columns of a table, with names instead of positions."""
        import pandas as pd

        columns: dict[str, Any] = dict(table.columns)
        for name, words in table.words.items():
            columns[name] = pd.Categorical.from_codes(columns[name], categories=pd.Index(words, dtype=object))
        columns["member"] = pd.Categorical.from_codes(codes_N, categories=pd.Index(self._names, dtype=object))
        return columns

    def _table(self, part: PartFiles, segment: int, table: str) -> TableData:
        """One file, decoded. The steps stay at hand: they date all the others."""
        key = (part.index, segment)
        if table == "steps" and key in self._steps_tables:
            return self._steps_tables[key]
        decoded = read_table(part, segment, table)
        self._notes += decoded.lost
        if table == "steps":
            self._steps_tables[key] = decoded
        return decoded

    def _replaced_from(self, part: PartFiles, decoded: Mapping[int, TableData]) -> dict[int, int]:
        """The step from which later segments replace the records of each segment.

        A segment begins at the step it says or at its first record, but replaces nothing until it has one.
        """
        ends: dict[int, int] = {}
        limit = self._limit
        for segment in reversed(part.segments):
            ends[segment] = limit
            tables = [self._table(part, segment, "steps"), *filter(None, [decoded.get(segment)])]
            firsts = [int(x.columns["step"].min()) for x in tables if len(x.columns["step"])]
            if firsts:
                limit = min(limit, *firsts, *self._starts_in(part, segment))
        return ends

    def _starts_in(self, part: PartFiles, segment: int) -> list[int]:
        """Where a segment says that it begins."""
        events = self._events_in[part.index, segment]
        return [event.step for event in events if isinstance(event.what, Started)]

    def _number_of(self, part: int, event: Event) -> int:
        """Place in run.json of the member that an event concerns; -1 if there is no such one."""
        return -1 if event.member is None else self._numbers[part].get(event.member, -1)

    @cached_property
    def _events_kept(self) -> list[tuple[int, int, Event]]:
        """Part, segment and event, of what no later segment replaces."""
        rows = [
            (part.index, segment, event)
            for part in self._parts
            for segment, end in self._replaced_from(part, {}).items()
            for event in self._events_in[part.index, segment]
            if event.step < end
        ]
        return sorted(rows, key=lambda row: row[:2])

    @cached_property
    def _events_in(self) -> dict[tuple[int, int], list[Event]]:
        events = {}
        for part in self._parts:
            for segment in part.segments:
                events[part.index, segment], lost = read_events(part, segment)
                self._notes += lost
        return events


def open_run(path: str | Path, *, part: int | None = None, until: int | None = None) -> Run:
    """Open a run directory.

    Args:
        path: of the directory.
        part: look at the members and tables of this part only; None = all.
        until: the last step to look at: the run as it was then, still running; None = all that is there.

    Raises:
        RunError: there is none at `path`, or its run.json cannot be used.
    """
    path = Path(path)
    check_is_run(path)
    manifest = read_manifest(path)
    if part is not None:
        members = tuple(entry for entry in manifest.members if entry.part == part)
        manifest = replace(manifest, members=members)
    return Run(path, manifest, until)
