"""How to watch: what the command, the function and the callbacks have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnscope.errors import ConfigError
from attnscope.signals.moments import Live
from attnscope.watch.trackers import check_tracker

EVERY = 10  # steps between those at which attention, the residual stream and parameters are measured
ROWS = 32  # query rows measured per head and call


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a watcher is told.

    Attributes:
        every: attention, the residual stream and parameters are measured at the first 20 steps and at every so many.
        rows: query rows per head and call, or "all".
        layers: names of attention layers, with * and ? as in a shell; none = all.
        stop_on: conditions at which training is stopped, names of rules among them.
        log_to: a tracker; None = none.
        snapshot: how many of the last steps to keep, weights and batches; 0 = none.
    """

    every: int = EVERY
    rows: int | str = ROWS
    layers: Sequence[str] = ()
    stop_on: Sequence[str] = ()
    log_to: str | None = None
    snapshot: int = 0

    def checked(self) -> Live:
        """What is looked for and stopped on, if everything can be done.

        Raises:
            ConfigError: a number is too small, a condition cannot be understood, the tracker is unknown or not installed.
        """
        from attnscope.diagnose.live import (
            live,
        )  # many modules, which a script that only imports attnscope.watch need not wait for

        if self.every < 1:
            raise ConfigError(f"every is {self.every!r}, but must be at least 1.")
        if self.rows != "all" and (isinstance(self.rows, str) or self.rows < 1):
            raise ConfigError(f'rows is {self.rows!r}, but must be a whole number, at least 1, or "all".')
        if self.snapshot < 0:
            raise ConfigError(f"snapshot is {self.snapshot!r}, but must be a number of steps, or 0 for none.")
        if isinstance(self.layers, str) or isinstance(self.stop_on, str):
            raise ConfigError("layers and stop_on are lists: write stop_on=['nonfinite'].")
        if self.log_to is not None:
            check_tracker(self.log_to)
        return live(self.stop_on)
