"""THE loop: one part of an ensemble, from its first step or a checkpoint to the end.

Steps run without waiting for the device. The host looks in between: it takes the records every FLUSH_SECONDS, and every
CHECK_EVERY steps it asks who is lost, and goes on without them.

Shape key: M member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnscope.data import Corpus
from attnscope.errors import AttnscopeError
from attnscope.runs.events import Dropped, Evaluated, Event, Generated, Stopped
from attnscope.runs.part_writer import PartWriter
from attnscope.signals.alarms import Alarms
from attnscope.signals.conditions import Condition
from attnscope.signals.journal import FLUSH_SECONDS, Journal, interrupts_wait
from attnscope.signals.moments import Live
from attnscope.train import evaluation
from attnscope.train.block import Block
from attnscope.train.part import Part
from attnscope.train.recording import Recorder
from attnscope.train.step import Setup, run_step

CHECK_EVERY = 10  # steps; fixed, so that a resumed run drops members at the same step


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the caller may show while a part trains: the newest block and what happened in it."""

    steps_done: int
    block: Block | None
    events: Sequence[Event]


def train_part(
    part: Part,
    data: Corpus,
    *,
    writer: PartWriter | None,
    alarms: Alarms,
    live: Live | None = None,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> str:
    """Train until the configured steps are done, nobody is left, a condition is met, or `should_stop` says so.

    Args:
        part: where to start; moved on in place.
        data: what to train on.
        writer: where to record; None = record nothing, and train exactly the same.
        alarms: finds what is worth an event.
        live: what is looked for meanwhile, and what training stops on: with conditions, the host waits for every step.
        on_progress: called after every block with what was recorded.
        should_stop: asked between steps.

    Returns:
        "finished", "interrupted", or "stopped" on a condition.

    Raises:
        RunWriteError: the record could not be written.
    """
    config = part.configs[0]
    recorder = Recorder(config) if writer else None
    journal = Journal(writer, alarms, live)
    conditions = live.stop_on if live is not None else ()
    met: tuple[Condition, str] | None = None

    def hand_over(*extra: Event) -> None:
        nonlocal met
        with interrupts_wait():
            block, tables = recorder.flush(part.alive) if recorder else (None, {})
            events = [*journal.add(tables), *extra]
        met = met or journal.met(conditions, {**tables, "losses": tables.get("steps", {})})
        on_progress(Progress(steps_done=part.step, block=block, events=events))

    try:
        while part.step < config.train.steps and part.setup is not None:
            if should_stop():
                hand_over()
                if writer:
                    part.save(writer)
                return "interrupted"
            train_step(part, part.setup, data, recorder)
            if part.step % CHECK_EVERY == 0 and (lost := part.lost()):
                hand_over()
                dropped = [part.alive[position] for position in lost]
                part.drop(lost)
                # Dated to the last step they took, so that a run resumed from here keeps the event.
                gone = [Event(step=part.step - 1, member=m, what=Dropped()) for m in dropped]
                ended = journal.end(dropped)
                journal.note(gone)
                hand_over(*ended, *gone)
            if recorder and (conditions or recorder.due(FLUSH_SECONDS)):
                hand_over()
            if met is not None and part.setup is not None:
                condition, found = met
                stopped = Event(step=part.step - 1, what=Stopped(on=condition.text, found=found))
                journal.note([stopped])
                hand_over(stopped)
                if writer:
                    part.save(writer)
                return "stopped"
            every = config.train.checkpoint_every
            if writer and every and part.step % every == 0 and part.step < config.train.steps:
                hand_over()
                part.save(writer)
        hand_over()
        hand_over(*journal.end(part.alive))
        hand_over(*journal.last_found())
    except AttnscopeError:
        raise
    except BaseException:
        # A crash loses no record: what stands in the block goes to disk before the error goes up.
        hand_over()
        raise
    if part.setup is not None:
        last = last_look(part, part.setup, data)
        journal.note(last)
        hand_over(*last)
    return "finished"


def train_step(part: Part, setup: Setup, data: Corpus, recorder: Recorder | None) -> None:
    """One step: measure it, then carry it out."""
    step = part.step
    batch = evaluation.to_device(data.train_batch(step), part.device)
    if recorder:
        recorder.begin(step, batch, setup.grouping)
        every = setup.config.train.eval_every
        if every and step % every == 0:
            seq_len = setup.config.model.seq_len
            val_loss_M = evaluation.held_out_loss(setup, part.parameters, data, seq_len=seq_len)
            recorder.evaluated(val_loss_M)
    loss_M = run_step(setup, part.parameters, part.state, batch, step=step, observer=recorder)
    broken_M = part.state["broken_steps"]
    broken_M.add_(1).masked_fill_(loss_M.isfinite(), 0)
    if recorder:
        recorder.end()
    part.step = step + 1


def last_look(part: Part, setup: Setup, data: Corpus) -> list[Event]:
    """Evaluate the trained members: held-out loss at every length, and generation where it was asked for."""
    events: list[Event] = []
    config = setup.config
    for seq_len in evaluation.reachable_lengths(setup):
        val_loss_M = evaluation.held_out_loss(setup, part.parameters, data, seq_len=seq_len)
        events += [
            Event(step=part.step, member=member, what=Evaluated(seq_len=seq_len, val_loss=val_loss))
            for member, val_loss in zip(part.alive, val_loss_M.tolist(), strict=True)
        ]
    if config.train.sample_tokens:
        prompt_T = data.prompt(config.model.seq_len)
        prefix_loss_M = evaluation.loss_from_prefixes(setup, part.parameters, data).tolist()
        tokens_MT = evaluation.generate(setup, part.parameters, prompt_T, n_tokens=config.train.sample_tokens)
        events += [
            Event(
                step=part.step,
                member=member,
                what=Generated(
                    prompt=data.decode(prompt_T), text=data.decode(tokens_T), loss_from_prefixes=prefix_loss
                ),
            )
            for member, prefix_loss, tokens_T in zip(part.alive, prefix_loss_M, tokens_MT, strict=True)
        ]
    return events
