"""The first steps of a config on a throw-away copy, recorded in a run directory like any other; then a few to time and to weigh."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from attnscope.config import Config, members_of
from attnscope.data import Batch, Corpus, data_of
from attnscope.runs.reader import Run, open_run
from attnscope.runs.writer import RunWriter
from attnscope.signals.alarms import Alarms
from attnscope.signals.journal import Journal
from attnscope.train.loop import train_step
from attnscope.train.part import Part
from attnscope.train.recording import Recorder
from attnscope.train.run import by_part, create_run

RECORDED = 2  # steps: the untouched weights, and what the first update made of them
TIMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one part, for each of its members.

    Attributes:
        n_members: that share the part.
        state_bytes: weights, their gradients and what the optimizer remembers.
        activation_bytes: what the forward pass keeps for the backward pass.
        peak_bytes: largest that was allocated on the device; None on a CPU, which does not tell.
        step_s: seconds of a step of the whole part.
    """

    n_members: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int | None
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """Of a whole config.

    Attributes:
        run: of RECORDED steps, every query row measured.
        costs: of each part.
        data: of each part.
        batches: that each part began with.
        weights: each part's before the first step, name to tensor with the axis M.
    """

    run: Run
    costs: Mapping[int, Cost]
    data: Mapping[int, Corpus]
    batches: Mapping[int, Batch]
    weights: Mapping[int, Mapping[str, Tensor]]


def rehearse(config: Config, path: Path, *, command: Sequence[str] = ()) -> Rehearsed:
    """Take the first steps of every member.

    It is not compiled, and every query row is measured, whatever the config says.

    Args:
        config: to be trained.
        path: of the run directory, which must not exist.
        command: for run.json.

    Raises:
        AttnscopeError: the config, the data or the directory cannot be used.
    """
    steps = max(config.train.steps, RECORDED + 1)  # who has done all its steps is judged by where it ended
    config = replace(
        config,
        record=replace(config.record, every=1, rows="all"),
        train=replace(config.train, compile=False, eval_every=0, steps=steps),
    )
    members = members_of(config)
    create_run(config, members, path, command=command)
    costs, data, batches, weights = {}, {}, {}, {}
    for index, part_members in by_part(members).items():
        configs = [member.config for member in part_members]
        data[index] = data_of(configs[0])
        batches[index] = data[index].train_batch(0)
        part = Part(configs, vocab_size=data[index].vocab_size)
        weights[index] = {name: value.detach().clone() for name, value in part.parameters.items()}
        _record(path, index, part, data[index])
        costs[index] = _cost(part, data[index])
    return Rehearsed(run=open_run(path), costs=costs, data=data, batches=batches, weights=weights)


def _record(path: Path, index: int, part: Part, data: Corpus) -> None:
    writer = RunWriter.resume(path).part(index, first_step=0, threads=torch.get_num_threads())
    recorder = Recorder(part.configs[0])
    for _ in range(RECORDED):
        assert part.setup is not None
        train_step(part, part.setup, data, recorder)
    Journal(writer, Alarms()).add(recorder.flush(part.alive)[1])
    writer.finish("interrupted")


def _cost(part: Part, data: Corpus) -> Cost:
    is_cuda = part.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(part.device)
    assert part.setup is not None
    with _kept_for_backward(part.parameters) as kept:
        train_step(part, part.setup, data, None)
    seconds = []
    for _ in range(TIMED):
        before = time.perf_counter()
        train_step(part, part.setup, data, None)
        if is_cuda:
            torch.cuda.synchronize(part.device)
        seconds.append(time.perf_counter() - before)
    n_members = len(part.configs)
    n_bytes = 2 * _bytes_of(part.parameters) + _bytes_of(part.state)  # a gradient is as large as its weight
    return Cost(
        n_members=n_members,
        state_bytes=n_bytes // n_members,
        activation_bytes=sum(kept.values()) // n_members,
        peak_bytes=torch.cuda.max_memory_allocated(part.device) if is_cuda else None,
        step_s=statistics.median(seconds),
    )


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in tensors.values())


@contextmanager
def _kept_for_backward(parameters: Mapping[str, Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps, by its address; weights are none of them."""
    weights = {x.untyped_storage().data_ptr() for x in parameters.values()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield kept
