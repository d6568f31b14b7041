"""A whole run: a config becomes members, members become parts, parts are trained one after another into one directory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from attnscope.config import Config, DataConfig, Member, members_of
from attnscope.data import Corpus, data_of
from attnscope.errors import RunError, error_in_words
from attnscope.model import QKV
from attnscope.runs.checkpoint import Checkpoint, load_checkpoint
from attnscope.runs.divergence import FED, Guessing
from attnscope.runs.environment import environment
from attnscope.runs.events import CheckpointLeftOut, Event
from attnscope.runs.foreign import printable
from attnscope.runs.holder import holding
from attnscope.runs.layout import part_folder
from attnscope.runs.manifest import is_whole
from attnscope.runs.part_writer import PartWriter
from attnscope.runs.reader import Run, open_run
from attnscope.runs.writer import RunWriter
from attnscope.signals.alarms import Alarms
from attnscope.signals.moments import Live
from attnscope.train.loop import Progress, train_part
from attnscope.train.part import Part, device_of

OnProgress = Callable[[int, Progress], None]


def train_run(
    config: Config,
    path: Path,
    *,
    command: Sequence[str] = (),
    live: Live | None = None,
    on_progress: OnProgress = lambda _part, _progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train every member of `config` into a new run directory.

    Args:
        config: what to train.
        path: of the run directory; must not exist.
        command: the command line, for run.json.
        live: what is looked for while it trains, and what it stops on; None = nothing.
        on_progress: called with the part's number and its progress after every block of steps.
        should_stop: asked between steps; True ends the run with a checkpoint.

    Returns:
        "finished", "interrupted", or "stopped" on a condition.

    Raises:
        AttnscopeError: the config, the data or the directory cannot be used, or the disk is full.
    """
    create_run(config, members_of(config), path, command=command)
    with holding(path):
        return _train_parts(path, live, on_progress, should_stop)


def resume_run(
    path: Path,
    *,
    live: Live | None = None,
    on_progress: OnProgress = lambda _part, _progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Go on with a run that was interrupted or killed: every part from its last checkpoint, or from the start.

    Args:
        path: of the run directory.
        live: as in `train_run`.
        on_progress: as in `train_run`.
        should_stop: as in `train_run`.

    Returns:
        "finished", "interrupted", or "stopped" on a condition.

    Raises:
        RunError: another process still writes it, there is nothing left to do, or the data is not what the run began with.
    """
    if not parts_left(open_run(path)):
        raise RunError(f"{path} is finished: there is nothing to resume. Read it: attnscope report {path}")
    with holding(path):
        return _train_parts(path, live, on_progress, should_stop)


def create_run(config: Config, members: Sequence[Member], path: Path, *, command: Sequence[str]) -> None:
    """Make the run directory of `members`, whose parts are trained with `train_part_of`.

    Raises:
        AttnscopeError: a part has no data or no device, or the directory cannot be made.
    """
    parts = by_part(members)
    corpora: dict[tuple[DataConfig, int], Corpus] = {}
    described = {}
    for index, part in parts.items():
        first = part[0].config
        device_of(first)  # says now, not in an hour, that a part has no device
        key = (first.data, first.model.seq_len)
        if key not in corpora:
            corpora[key] = data_of(first)
        described[index] = corpora[key]
    RunWriter.create(
        path,
        command=command,
        config=config,
        members=members,
        environment=environment(device_of(members[0].config)),
        data=_describe(described),
    )


def members_in(run: Run) -> tuple[Member, ...]:
    """The members of a run with their configs, in the parts that run.json puts them into."""
    resolved = members_of(run.config)
    if len(resolved) != len(run.entries):
        raise RunError(
            f"{printable(run.path, 400)}: its config describes {len(resolved)} members, but run.json lists "
            f"{len(run.entries)}. Restore run.json, or start a new run."
        )
    return tuple(
        replace(member, part=entry.part, index=entry.index) for member, entry in zip(resolved, run.entries, strict=True)
    )


def parts_left(run: Run) -> list[int]:
    """The parts that have not been trained to the end."""
    parts = sorted({entry.part for entry in run.entries})
    return [index for index in parts if run.ends.get(index, {}).get("status") != "finished"]


def train_part_of(
    run: Run,
    index: int,
    members: Sequence[Member],
    *,
    live: Live | None = None,
    report: Callable[[Progress], None] = lambda _progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train one part of a run, from its last checkpoint if there is one, with as many threads as the run began with.

    Args:
        run: opened before this part was last written to, or never since.
        index: of the part.
        members: all of the part's, from `members_in`.
        live: what is looked for while it trains, and what it stops on, with a checkpoint; None = nothing.
        report: called after every block of steps.
        should_stop: asked between steps; True ends the part with a checkpoint.

    Returns:
        "finished", "interrupted", or "stopped" on a condition.

    Raises:
        AttnscopeError: the data is not what the run began with, or the disk is full.
    """
    data = data_of(members[0].config)
    _same_data(run, index, data)
    with _threads(run.threads_of(index)) as threads:
        part, alarms, notes = _begun(run, index, members, data)
        writer = RunWriter.resume(run.path).part(index, first_step=part.step, threads=threads)
        with _said_how_it_ended(writer):
            for note in notes:
                writer.event(Event(step=part.step, what=CheckpointLeftOut(why=note)))
            status = train_part(
                part, data, writer=writer, alarms=alarms, live=live, on_progress=report, should_stop=should_stop
            )
            writer.finish("interrupted" if status == "stopped" else status)
            return status


def _begun(run: Run, index: int, members: Sequence[Member], data: Corpus) -> tuple[Part, Alarms, tuple[str, ...]]:
    """A part at its first step or last checkpoint, alarms that have heard all before, and why newer checkpoints will not do."""
    configs = [member.config for member in members]
    checkpoint = load_checkpoint(run.path / part_folder(index))
    if checkpoint is not None:
        _check_fits(run, checkpoint, len(configs))
    part = Part(configs, vocab_size=data.vocab_size, resume_from=checkpoint)
    alarms = Alarms(guessing=Guessing(level=data.reference.uniform))
    if part.step:
        for member in members:
            name = run.name_of(index, member.index)
            before = run.steps[(run.steps["member"] == name) & (run.steps["step"] < part.step)]
            alarms.feed(member.index, *(before[name].to_numpy() for name in FED))
    return part, alarms, checkpoint.notes if checkpoint is not None else ()


def _train_parts(path: Path, live: Live | None, on_progress: OnProgress, should_stop: Callable[[], bool]) -> str:
    run = open_run(path)
    parts = by_part(members_in(run))
    for index in parts_left(run):
        status = train_part_of(
            run, index, parts[index], live=live, report=partial(on_progress, index), should_stop=should_stop
        )
        if status != "finished":
            return status
    return "finished"


def by_part(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Members sorted into their parts, each in the order of the axis M."""
    parts: dict[int, list[Member]] = {}
    for member in members:
        parts.setdefault(member.part, []).append(member)
    return parts


@contextlib.contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """So many threads, for a while: another number would change the last digits of sums. None = as many as there are."""
    before = torch.get_num_threads()
    if wanted is not None and wanted != before:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _said_how_it_ended(writer: PartWriter) -> Iterator[None]:
    """Whatever goes wrong, end.json says so, and the error goes up."""
    try:
        yield
    except KeyboardInterrupt:
        writer.finish("interrupted")
        raise
    except BaseException as error:
        with contextlib.suppress(RunError):
            writer.finish("failed", error=error_in_words(error))
        raise


def _describe(corpora: Mapping[int, Corpus]) -> dict[str, object]:
    """The data of run.json: that of the first part, and of other parts where it differs."""
    described = {
        index: {"fingerprint": data.fingerprint, "reference": asdict(data.reference)} for index, data in corpora.items()
    }
    first = described[min(described)]
    others = {str(index): data for index, data in described.items() if data != first}
    return {**first, "parts": others}


def _check_fits(run: Run, checkpoint: Checkpoint, n_members: int) -> None:
    alive, names = checkpoint.state.get("alive"), checkpoint.state.get("parameters")
    good = (
        isinstance(alive, list)
        and all(is_whole(index, 0, n_members - 1) for index in alive)
        and len({*alive}) == len(alive)
        and isinstance(names, list)
        and all(f"parameters/{name}" in checkpoint.tensors for name in names)
        and all(x.shape[:1] == (len(alive),) for x in checkpoint.tensors.values())
    )
    if not good:
        raise RunError(
            f"{run.path}: its checkpoint at step {checkpoint.step} does not fit the members of this run. Restore it, or "
            "delete it: the part is then trained again from its first step."
        )
    assert isinstance(names, list)
    if apart := [name for name in QKV if name in names]:
        raise RunError(
            f"{run.path}: its checkpoint at step {checkpoint.step} has {', '.join(apart)} as parameters of their own, as old "
            "versions of attnscope saved them, and cannot be gone on with. Delete it: the part is then trained again from its "
            "first step."
        )


def _same_data(run: Run, index: int, data: Corpus) -> None:
    if run.data_of(index).get("fingerprint") != data.fingerprint:
        raise RunError(
            f"{run.path}: the data is not what this run began with: its fingerprint has changed. "
            "Restore the data, or start a new run."
        )
