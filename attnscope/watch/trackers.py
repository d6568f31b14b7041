"""Hands a few columns on to the tracker that a script logs to anyway, while it trains; all of them are in the run directory.

    attnscope/loss  attnscope/grad_norm  attnscope/clip_factor  attnscope/entropy_ratio  attnscope/max_prob
    attnscope/max_logit  attnscope/layer 3/max_logit

NaN and Inf are handed on as they are. Of several ranks the first one logs.

Shape key: N rows of a table.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnscope.errors import ConfigError
from attnscope.runs.found_live import FoundLive

PREFIX = "attnscope"
STEP_COLUMNS = ("loss", "grad_norm", "clip_factor")
MEANS = ("entropy_ratio", "max_prob")  # over all heads of a step
FOLDER = "tensorboard"  # in the run directory
MOST_METRICS = 1000  # of one request (mlflow.utils.validation)
MOST_TEXT = 300  # characters of an exception

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """What is logged of one step: name to value."""

    step: int
    values: Mapping[str, float]


# Logs moments, ascending; False = the script has no active run of this tracker.
Write = Callable[[Sequence[LoggedStep]], bool]


class TrackerLog:
    """Logs block after block.

    Invariant: nothing is raised. A tracker that raised once is not called again; an active run that is missing is said once.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Log to `TRACKERS[name]` what is recorded in the run directory `path`."""
        self._name = name
        self._path = path
        self._write: Write | None = TRACKERS[name](path)
        self._has_logged = False
        self._has_said = False

    def __call__(self, steps: Mapping[str, Array], heads: Mapping[str, Array]) -> str | None:
        """Log a block of the tables, which may be empty; why that failed, once."""
        moments = moments_of(steps, heads)
        if self._write is None or not moments:
            return None
        try:
            is_active = self._write(moments)
        except Exception as error:
            # Whatever happens between the tracker and its server, training goes on.
            self._write = None
            reason = f"{self._name}: {type(error).__name__}: {error}"[:MOST_TEXT]
            reason = " ".join(reason.split())
            self._say(f"{reason}. Nothing more is logged to it; {self._path} has everything.")
            return reason
        if not is_active and not self._has_logged and not self._has_said:
            self._has_said = True
            self._say(
                f"{self._name} has no active run, so nothing is logged to it until the script calls {BEGINS[self._name]}."
            )
        self._has_logged = self._has_logged or is_active
        return None

    def alert(self, step: int, found: FoundLive) -> str | None:
        """Raise an alert of what a rule found, where the tracker has alerts; why that failed."""
        alert = ALERTS.get(self._name)
        if alert is None or self._write is None:
            return None
        try:
            alert(step, found)
        except Exception as error:
            reason = " ".join(f"{self._name}: {type(error).__name__}: {error}"[:MOST_TEXT].split())
            self._say(f"{reason}. No alert was raised; {self._path} has the finding.")
            return reason
        return None

    def _say(self, line: str) -> None:
        """On stderr: stdout is the script's."""
        print(f"attnscope: {line}", file=sys.stderr, flush=True)


def check_tracker(name: str) -> None:
    """Say early what would keep a tracker from logging.

    Raises:
        ConfigError: there is no such tracker, or it is not installed.
    """
    if name not in TRACKERS:
        raise ConfigError(f"log_to is {name!r}, but must be {', '.join(list(TRACKERS)[:-1])} or {list(TRACKERS)[-1]}.")
    found = find_spec(name)
    if found is None or found.origin is None:  # a bare folder, which wandb makes where it writes
        raise ConfigError(f'log_to is {name!r}, which is not installed. Install it: pip install "attnscope[trackers]"')


def moments_of(steps: Mapping[str, Array], heads: Mapping[str, Array]) -> list[LoggedStep]:
    """The steps of a block, ascending; heads without a measured row count for nothing."""
    values: dict[int, dict[str, float]] = {}
    for at, step in enumerate(steps.get("step", ())):
        found = values.setdefault(int(step), {})
        for name in STEP_COLUMNS:
            if name != "loss" or "loss_seen" not in steps or steps["loss_seen"][at]:
                found[f"{PREFIX}/{name}"] = float(steps[name][at])
    is_measured_N = heads["rows"] > 0 if heads else np.zeros(0, dtype=bool)
    measured = {name: column_N[is_measured_N] for name, column_N in heads.items()}
    for step in np.unique(measured.get("step", np.zeros(0))):
        found = values.setdefault(int(step), {})
        here_N = measured["step"] == step
        for name in MEANS:
            found[f"{PREFIX}/{name}"] = float(measured[name][here_N].mean())
        max_logit_N, layer_N = measured["max_logit"][here_N], measured["layer"][here_N]
        found[f"{PREFIX}/max_logit"] = float(max_logit_N.max())
        for layer in np.unique(layer_N):
            largest = float(max_logit_N[layer_N == layer].max())
            found[f"{PREFIX}/layer {layer}/max_logit"] = largest
    return [LoggedStep(step=step, values=values[step]) for step in sorted(values)]


def to_tensorboard(path: Path) -> Write:
    """An event file in the run directory, opened anew for each block: one that a killed process leaves is whole."""
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    file = path.absolute() / FOLDER / name  # the script may change its folder

    def write(moments: Sequence[LoggedStep]) -> bool:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        events = [
            Event(
                wall_time=now,
                step=moment.step,
                summary=Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in moment.values.items()]),
            )
            for moment in moments
        ]
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            events.insert(0, Event(wall_time=now, file_version="brain.Event:2"))
        with file.open("ab") as opened:
            records = RecordWriter(opened)
            for event in events:
                records.write(event.SerializeToString())
        return True

    return write


def to_wandb(_path: Path) -> Write:
    """One step of each block, a measured one where there is one, joins the row that the script logs next.

    Rows of our own would count as steps, and wandb drops what the script then logs with a smaller `step`. On the charts
    our x axis is `attnscope/step`.
    """
    known: list[str] = []  # runs that have our x axis

    def write(moments: Sequence[LoggedStep]) -> bool:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is None:
            return False
        if run.id not in known:
            known.append(run.id)
            run.define_metric(f"{PREFIX}/step", hidden=True)
            run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/step")
        measured = [moment for moment in moments if f"{PREFIX}/max_logit" in moment.values]
        last = (measured or moments)[-1]
        run.log({f"{PREFIX}/step": last.step, **last.values}, commit=False)
        return True

    return write


def to_mlflow(_path: Path) -> Write:
    """Every step, to the run that was active last: it takes metrics after its end, too."""
    found: list[tuple[Any, str]] = []

    def write(moments: Sequence[LoggedStep]) -> bool:
        mlflow = sys.modules.get("mlflow")
        active = None if mlflow is None else mlflow.active_run()
        if mlflow is not None and active is not None:
            found[:] = [(mlflow.MlflowClient(), active.info.run_id)]
        if not found:
            return False
        from mlflow.entities import Metric

        client, run_id = found[0]
        now = round(1000 * time.time())
        metrics = [Metric(tag, x, now, m.step) for m in moments for tag, x in m.values.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])
        return True

    return write


def alert_in_wandb(step: int, found: FoundLive) -> None:
    """As the script's own alerts are: by mail or Slack, as its user has set it up."""
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if wandb is not None and run is not None:
        level = wandb.AlertLevel.ERROR if found.severity == "error" else wandb.AlertLevel.WARN
        run.alert(title=f"{PREFIX}: {found.title}", text=f"step {step}: {found.summary}", level=level)


# Trackers that have alerts, which show outside of their pages.
ALERTS: Mapping[str, Callable[[int, FoundLive], None]] = {"wandb": alert_in_wandb}
TRACKERS: Mapping[str, Callable[[Path], Write]] = {
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "mlflow": to_mlflow,
}
BEGINS = {"wandb": "wandb.init()", "mlflow": "mlflow.start_run()"}
