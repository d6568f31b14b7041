"""What recording costs, how the loop compares with a plain one, and what an ensemble saves. On the CPU, two threads."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from attnscope.bench.plain import PlainLoop
from attnscope.bench.timing import Ratio, interleave, ratio
from attnscope.config import Config, apply_changes, members_of
from attnscope.data import Corpus, data_of
from attnscope.diagnose.live import live
from attnscope.runs.writer import RunWriter
from attnscope.signals.alarms import Alarms
from attnscope.signals.journal import FLUSH_SECONDS, Journal
from attnscope.train.loop import train_step
from attnscope.train.part import Part
from attnscope.train.recording import Recorder

THREADS = 2
SHAPE = {
    "model.d_model": 128,
    "model.n_layers": 4,
    "model.n_heads": 4,
    "model.seq_len": 64,
    "data.batch_size": 16,
    "optimizer.lr": 1e-4,
    "train.device": "cpu",
}
TINY = {**SHAPE, "model.d_model": 32, "model.n_layers": 2, "model.seq_len": 16, "data.batch_size": 8}
MEMBERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Ratios of step times measured in one run, interleaved; and what a run takes on disk.

    Attributes:
        recording: recording every table at every step, over the same loop with recording off.
        plain: a plain `nn.Module` loop over ours with recording on: our tokens/s over its tokens/s.
        plain_twice: the plain loop over itself: what the machine makes of equal things.
        ensemble: one step of 16 members over 16 steps of one, both recorded.
        mb_per_1000_steps: tables on disk, MB.
        recorded_tokens_s: tokens/s of our loop with recording on.
        plain_tokens_s: tokens/s of the plain loop.
    """

    recording: Ratio
    plain: Ratio
    plain_twice: Ratio
    ensemble: Ratio
    mb_per_1000_steps: float
    recorded_tokens_s: float
    plain_tokens_s: float


def measure_overhead(*, rounds: int = 400) -> Overhead:
    """Measure; takes about two minutes for 400 rounds. Sets the number of threads of this process to two."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(Path(folder), rounds=rounds)


def _measure(folder: Path, *, rounds: int) -> Overhead:
    config = apply_changes(Config(), SHAPE, where="bench")
    data = data_of(config)
    recorded = _Loop([config], data, folder / "recorded")
    silent = _Loop([config], data, None)
    weights = {name: value[0].detach() for name, value in silent.part.parameters.items()}
    plain = PlainLoop(config, data, weights=weights)
    twin = PlainLoop(config, data, weights=weights)
    seconds = interleave(
        {"recorded": recorded.step, "silent": silent.step, "plain": plain.step, "twin": twin.step},
        rounds=rounds,
        warmup=20,
    )
    recorded.finish()
    size = sum(path.stat().st_size for path in (folder / "recorded").rglob("*.arrow"))

    tiny = apply_changes(Config(), TINY, where="bench")
    tiny_data = data_of(tiny)
    seeds = [apply_changes(tiny, {"train.seed": seed}, where="bench") for seed in range(MEMBERS)]
    together = _Loop(seeds, tiny_data, folder / "together")
    alone = [_Loop([seed_config], tiny_data, folder / f"alone-{i}") for i, seed_config in enumerate(seeds)]

    def one_by_one() -> None:
        for loop in alone:
            loop.step()

    ensemble = interleave({"together": together.step, "alone": one_by_one}, rounds=rounds, warmup=20)
    tokens = config.data.batch_size * config.model.seq_len
    return Overhead(
        recording=ratio(seconds["recorded"], seconds["silent"]),
        plain=ratio(seconds["plain"], seconds["recorded"]),
        plain_twice=ratio(seconds["plain"], seconds["twin"]),
        ensemble=ratio(ensemble["together"], ensemble["alone"]),
        mb_per_1000_steps=size / recorded.part.step * 1000 / 1e6,
        recorded_tokens_s=tokens / sorted(seconds["recorded"])[rounds // 2],
        plain_tokens_s=tokens / sorted(seconds["plain"])[rounds // 2],
    )


class _Loop:
    """The training loop, one step at a time, with a real writer or with recording off.

    Blocks are as long as in `train_part`: the clock that ends them stands still while other loops have their turn.
    """

    def __init__(self, configs: list[Config], data: Corpus, path: Path | None) -> None:
        self.part = Part(configs, vocab_size=data.vocab_size)
        self._data = data
        self._waiting_s = 0.0
        self._recorder: Recorder | None = None
        self._finish: Callable[[], None] = lambda: None
        if path is not None:
            writer = RunWriter.create(
                path,
                command=("attnscope", "bench", "overhead"),
                config=configs[0],
                members=members_of(configs[0]),
                environment={},
                data={},
            ).part(0)
            self._recorder = Recorder(configs[0])
            self._journal = Journal(writer, Alarms(), live())
            self._finish = lambda: writer.finish("finished")

    def step(self) -> None:
        """One step, and the block to disk when it is due, as in `train_part`."""
        assert self.part.setup is not None
        began = time.perf_counter()
        train_step(self.part, self.part.setup, self._data, self._recorder)
        self._waiting_s += time.perf_counter() - began
        if self._recorder and (self._waiting_s >= FLUSH_SECONDS or self._recorder.due(math.inf)):
            self._hand_over(self._recorder)
            self._waiting_s = 0.0

    def finish(self) -> None:
        """Write what is left."""
        if self._recorder:
            self._hand_over(self._recorder)
        self._finish()

    def _hand_over(self, recorder: Recorder) -> None:
        _, tables = recorder.flush(self.part.alive)
        self._journal.add(tables)
