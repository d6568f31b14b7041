"""THE loop: one part of an ensemble, from its first step or a checkpoint to the end.

Steps run without waiting for the device. The host looks in between: it takes the records every FLUSH_SECONDS, and every
CHECK_EVERY steps it asks who is lost, and goes on without them.

Shape key: M member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnscope.config import Config
from attnscope.data import Corpus
from attnscope.errors import AttnscopeError, ConfigError
from attnscope.model import QKV, forward, initial_parameters
from attnscope.runs.checkpoint import Checkpoint, save_checkpoint
from attnscope.runs.divergence import NOT_FINITE_IN_A_ROW
from attnscope.runs.writer import PartWriter
from attnscope.signals.alarms import Alarms, Event
from attnscope.train import evaluation
from attnscope.train.clipping import clip_state
from attnscope.train.optimizer import optimizer_state
from attnscope.train.recording import Block, Recorder
from attnscope.train.step import Setup, all_finite, loss_scaling_state, run_step, set_up

FLUSH_SECONDS = 0.75  # a killed process loses at most this and the step it was in
CHECK_EVERY = 10  # steps; fixed, so that a resumed run drops members at the same step


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the caller may show while a part trains: the newest block and what happened in it."""

    steps_done: int
    block: Block | None
    events: Sequence[Event]


class Part:
    """The members of one part that are still alive, and everything that moves from step to step.

    Invariant: every tensor in `parameters` and `state` has the members of `alive` along its first axis.
    """

    def __init__(
        self, configs: Sequence[Config], *, vocab_size: int, resume_from: Checkpoint | None = None
    ) -> None:
        self.configs = configs
        self.device = device_of(configs[0])
        self._forward = _compiled() if configs[0].train.compile else forward
        self.alive = list(range(len(configs)))
        self.step = 0
        if resume_from is None:
            self.parameters = {
                name: value.to(self.device)
                for name, value in initial_parameters(configs, vocab_size=vocab_size).items()
            }
            self.state = self._initial_state()
        else:
            self._restore(resume_from)
        self._prepare()

    def _initial_state(self) -> dict[str, Tensor]:
        config, n_members = self.configs[0], len(self.alive)
        state = optimizer_state(config.optimizer.name, self.parameters)
        state |= clip_state(config.clip.mode, n_members, self.device)
        if config.precision.loss_scaling:
            state |= loss_scaling_state(n_members, self.device)
        return state | self._all_well()

    def _all_well(self) -> dict[str, Tensor]:
        """How many of the last steps, in a row, had a loss that is not finite, (M,)."""
        return {"broken_steps": torch.zeros(len(self.alive), dtype=torch.int64, device=self.device)}

    def _prepare(self) -> None:
        for value in self.parameters.values():
            value.requires_grad_()
        self.setup: Setup | None = None
        if self.alive:
            self.setup = set_up(
                [self.configs[index] for index in self.alive],
                self.parameters,
                device=self.device,
                forward=self._forward,
            )

    def lost(self) -> list[int]:
        """Positions along M of members whose weights are not finite, or whose losses are not for good; waits for the device.

        A few losses that are not finite are no reason: loss scaling skips such a step, and weights that are finite go on.
        """
        with torch.no_grad():
            lost_M = self.state["broken_steps"] >= NOT_FINITE_IN_A_ROW
            lost_M |= ~all_finite(self.parameters)
        return [position for position, lost in enumerate(lost_M.tolist()) if lost]

    def drop(self, positions: Sequence[int]) -> None:
        """Go on without these members."""
        keep = [p for p in range(len(self.alive)) if p not in set(positions)]
        index_M = torch.tensor(keep, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.parameters = {
                name: value.index_select(0, index_M) for name, value in self.parameters.items()
            }
            self.state = {
                name: value.index_select(0, index_M) for name, value in self.state.items()
            }
        self.alive = [self.alive[p] for p in keep]
        self._prepare()

    def save(self, writer: PartWriter) -> None:
        """Write a checkpoint of everything a resumed run needs to go on bit by bit."""
        save_checkpoint(
            writer.path,
            step=self.step,
            tensors={
                **{f"parameters/{name}": value.detach() for name, value in self.parameters.items()},
                **{f"state/{name}": value for name, value in self.state.items()},
            },
            # safetensors sorts names, but sums over parameters depend on their order.
            state={"alive": self.alive, "parameters": list(self.parameters)},
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        alive, names = checkpoint.state["alive"], checkpoint.state["parameters"]
        assert isinstance(alive, list) and isinstance(names, list)
        self.alive = [int(index) for index in alive]
        self.step = checkpoint.step
        found = {name: value.to(self.device) for name, value in checkpoint.tensors.items()}
        if "q" in names:  # saved before q, k and v became one parameter
            names = ["qkv" if name == "q" else name for name in names if name not in ("k", "v")]
            for first in [name for name in found if name.endswith(("/q", ".q"))]:
                three = [found.pop(first[:-1] + name) for name in QKV]
                found[first[:-1] + "qkv"] = torch.stack(three, dim=-2)
        self.parameters = {name: found[f"parameters/{name}"] for name in names}
        self.state = self._all_well() | {
            name.removeprefix("state/"): value
            for name, value in found.items()
            if name.startswith("state/") and name != "state/finite"  # of versions before
        }


def train_part(
    part: Part,
    data: Corpus,
    *,
    writer: PartWriter | None,
    alarms: Alarms,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> str:
    """Train until the configured steps are done, nobody is left, or `should_stop` says so.

    Args:
        part: where to start; moved on in place.
        data: what to train on.
        writer: where to record; None = record nothing, and train exactly the same.
        alarms: finds what is worth an event.
        on_progress: called after every block with what was recorded.
        should_stop: asked between steps.

    Returns:
        "finished" or "interrupted".

    Raises:
        RunWriteError: the record could not be written.
    """
    config = part.configs[0]
    recorder = Recorder(writer, config) if writer else None

    def hand_over(*extra: Event) -> None:
        block, tables = recorder.flush(part.alive) if recorder else (None, {})
        events = [*alarms.look(tables), *extra]
        for event in events:
            if writer:
                writer.event(event.kind, step=event.step, member=event.member, **event.fields)
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
                gone = [Event(kind="dropped", step=part.step - 1, member=m) for m in dropped]
                hand_over(*alarms.end(dropped), *gone)
            if recorder and recorder.due(FLUSH_SECONDS):
                hand_over()
            every = config.train.checkpoint_every
            if writer and every and part.step % every == 0 and part.step < config.train.steps:
                hand_over()
                part.save(writer)
        hand_over()
        hand_over(*alarms.end(part.alive))
    except AttnscopeError:
        raise
    except BaseException:
        # A crash loses no record: what stands in the block goes to disk before the error goes up.
        hand_over()
        raise
    if part.setup is not None:
        hand_over(*last_look(part, part.setup, data))
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
            Event(
                kind="evaluation",
                step=part.step,
                member=member,
                fields={"seq_len": seq_len, "val_loss": val_loss},
            )
            for member, val_loss in zip(part.alive, val_loss_M.tolist(), strict=True)
        ]
    if config.train.sample_tokens:
        prompt_T = data.prompt(config.model.seq_len)
        prefix_loss_M = evaluation.loss_from_prefixes(setup, part.parameters, data).tolist()
        tokens_MT = evaluation.generate(
            setup, part.parameters, prompt_T, n_tokens=config.train.sample_tokens
        )
        events += [
            Event(
                kind="generation",
                step=part.step,
                member=member,
                fields={
                    "prompt": data.decode(prompt_T),
                    "text": data.decode(tokens_T),
                    "loss_from_prefixes": prefix_loss,
                },
            )
            for member, prefix_loss, tokens_T in zip(
                part.alive, prefix_loss_M, tokens_MT, strict=True
            )
        ]
    return events


def _compiled() -> Callable[..., Tensor]:
    """The forward pass through torch.compile, which fails when it is first called."""
    from torch._dynamo.exc import TorchDynamoException  # heavy, and has no public name

    compiled = torch.compile(forward)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"train.compile: PyTorch cannot compile the model here: {reason}. Train without it, or put that right "
                "(on a CPU it needs a C++ compiler)."
            ) from error

    return run


def device_of(config: Config) -> torch.device:
    """The device that `train.device` names; auto = a GPU where there is one.

    Raises:
        ConfigError: it is not there.
    """
    wanted = config.train.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available.get(wanted, True):
        raise ConfigError(
            f"train.device is {wanted}, but PyTorch sees no such device here. Use cpu or auto."
        )
    return torch.device(wanted)
