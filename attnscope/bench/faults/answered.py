"""What there is to count of each program: what the rules say of it, and what its signals did. A row each.

Rows are asked for in processes, and once: what was asked with the same rules stands in a list. All of them make one small file
(Parquet), from which scores can be made again without training: `attnscope bench faults --published`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from attnscope.bench.faults.population import Done
from attnscope.bench.faults.traces import Trace, traces_of
from attnscope.diagnose import examine
from attnscope.errors import RunError
from attnscope.findings import Finding
from attnscope.runs.reader import Run, open_run

LIST = "answers.jsonl"
FILE = "faults.parquet"
PUBLISHED = Path(__file__).with_name("published.parquet")
PACKAGE = Path(__file__).parents[2]
ASKED_WITH = ("bench/faults", "diagnose", "signals", "runs", "config", "findings.py")  # what decides what is said


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A finding, as far as it is counted. Words as in `Finding`.

    Attributes:
        rule: that found it.
        severity: error, warning or note.
        kind: cause or symptom.
        step: at which it shows first.
        layers: of its evidence, the worst first.
        explains: rules.
    """

    rule: str
    severity: str
    kind: str
    step: int | None
    layers: tuple[int, ...] = ()
    explains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One program.

    Attributes:
        done: what it is, and what became of it.
        norm: of its model: pre, post or none; None = unknown.
        diverged_at: the step at which its loss left for good; None = it did not, or its run cannot be read.
        findings: in the order in which they are told.
        traces: of the signals that were measured.
        problem: why nothing could be asked; None = all was.
    """

    done: Done
    norm: str | None = None
    diverged_at: int | None = None
    findings: tuple[Said, ...] = ()
    traces: Mapping[str, Trace]
    problem: str | None = None


def ask_all(
    population: Sequence[Done], folder: Path, *, jobs: int = 1, on_asked: Callable[[int], None] = lambda _left: None
) -> list[Answered]:
    """Ask every rule of every program that was not asked with these rules.

    Args:
        population: programs.
        folder: of their run directories.
        jobs: processes.
        on_asked: told of each how many are left.
    """
    code = _code()
    known = _read_list(folder, code)
    left = [done for done in population if done.case not in known]
    with (folder / LIST).open("a") as log:

        def keep(answered: Answered, still: int) -> None:
            log.write(json.dumps({"code": code, **to_row(answered)}) + "\n")
            log.flush()
            known[answered.done.case] = answered
            on_asked(still)

        if jobs == 1 or len(left) < 2:
            for number, done in enumerate(left, start=1):
                keep(ask(done, folder), len(left) - number)
        else:
            _ask_in_processes(left, folder, jobs, keep)
    return [known[done.case] for done in population]


def _ask_in_processes(left: Sequence[Done], folder: Path, jobs: int, keep: Callable[[Answered, int], None]) -> None:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(ask, done, folder) for done in left]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                keep(future.result(), len(left) - number)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def ask(done: Done, folder: Path) -> Answered:
    """What is said of one program; a run that cannot be read, or that no rule can be asked of, is a problem and no end of the bench."""
    try:
        run = open_run(folder / done.case)
        return Answered(
            done=done,
            norm=_norm_of(done, run),
            diverged_at=run.members[0].diverged_at if run.members else None,
            findings=tuple(map(_said, examine(run).findings)),
            traces=traces_of(run),
        )
    except RunError as error:  # it died before it recorded anything
        return Answered(done=done, traces={}, problem=str(error))
    except Exception as error:  # a mistake of a rule: told beside the table, after all the others were counted
        return Answered(done=done, traces={}, problem=f"{type(error).__name__}: {error}")


def to_row(answered: Answered) -> dict[str, Any]:
    """As plain data, of which `from_row` makes the same again."""
    row = {**asdict(answered.done), **asdict(answered)}
    del row["done"], row["traces"]
    row["signals"] = [{"name": name, **asdict(trace)} for name, trace in answered.traces.items()]
    return row


def from_row(row: Mapping[str, Any]) -> Answered:
    """What `to_row` had; columns that nobody knows any more are left out."""
    return Answered(
        done=Done(**{field.name: row[field.name] for field in fields(Done) if field.name in row}),
        norm=row.get("norm"),
        diverged_at=row.get("diverged_at"),
        findings=tuple(
            Said(**{**said, "layers": tuple(said["layers"]), "explains": tuple(said["explains"])})
            for said in row["findings"]
        ),
        traces={
            signal["name"]: Trace(steps=tuple(signal["steps"]), values=tuple(signal["values"]))
            for signal in row["signals"]
        },
        problem=row.get("problem"),
    )


def write_answers(answered: Sequence[Answered], path: Path) -> None:
    """All rows as one Parquet file, in the order of their names; what stood there is replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[object, object] = {int: pa.int32(), float: pa.float64(), bool: pa.bool_()}
    said = {
        "rule": pa.string(),
        "severity": pa.string(),
        "kind": pa.string(),
        "step": pa.int32(),
        "layers": pa.list_(pa.int16()),
        "explains": pa.list_(pa.string()),
    }
    signal = {"name": pa.string(), "steps": pa.list_(pa.int32()), "values": pa.list_(pa.float32())}
    schema = pa.schema(
        [
            *((field.name, types.get(field.type, pa.string())) for field in fields(Done)),
            ("norm", pa.string()),
            ("diverged_at", pa.int32()),
            ("problem", pa.string()),
            ("findings", pa.list_(pa.struct(list(said.items())))),
            ("signals", pa.list_(pa.struct(list(signal.items())))),
        ]
    )
    rows = [to_row(each) for each in sorted(answered, key=lambda each: each.done.case)]
    scratch = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), scratch, compression="zstd", compression_level=15)
    scratch.replace(path)


def read_answers(path: Path = PUBLISHED) -> list[Answered]:
    """The rows of a file that `write_answers` made."""
    import pyarrow.parquet as pq

    return [from_row(row) for row in pq.read_table(path).to_pylist()]


def _said(finding: Finding) -> Said:
    layers = dict.fromkeys(each.layer for each in finding.evidence if each.layer is not None)
    return Said(
        rule=finding.rule,
        severity=finding.severity,
        kind=finding.kind,
        step=finding.step,
        layers=tuple(layers),
        explains=finding.explains,
    )


def _norm_of(done: Done, run: Run) -> str | None:
    from attnscope.bench.faults import bases

    if run.kind == "train":
        return run.config.model.norm
    base: object = bases.BASES.get(done.base)
    return getattr(base, "norm", None)


def _read_list(folder: Path, code: str) -> dict[str, Answered]:
    """What was asked with this code; a line that was cut short is none."""
    try:
        lines = (folder / LIST).read_text().splitlines()
    except FileNotFoundError:
        return {}
    known = {}
    for line in lines:
        try:
            row = json.loads(line)
            if row["code"] == code:
                known[row["case"]] = from_row(row)
        except (ValueError, TypeError, KeyError):
            continue
    return known


def _code() -> str:
    """Of the files that decide what is said."""
    digest = hashlib.sha256()
    for name in ASKED_WITH:
        path = PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
