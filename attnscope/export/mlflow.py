"""A run in MLflow: one MLflow run per member, in an experiment named after the run.

Where MLFLOW_TRACKING_URI is set they go there, else into a SQLite database of their own: MLflow has given up its store of
plain files. MLflow keeps NaN, but a SQL database has the largest float64 for Inf.
"""

import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from attnscope.errors import AttnscopeError
from attnscope.export.exported import Exported, not_installed
from attnscope.export.folder import new_folder, safe_names
from attnscope.export.parts import by_part
from attnscope.export.scalars import TAG_LETTERS, Moment, scalars_of, start_of
from attnscope.export.settings import Setting, outcome_of, settings_of
from attnscope.runs.foreign import printable
from attnscope.runs.layout import to_json
from attnscope.runs.members import MemberRecord
from attnscope.runs.reader import Run

DATABASE = "mlflow.db"
RETRIES, FEW = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"  # unless it is set already
MOST_METRICS = 1000  # of one request (mlflow.utils.validation)
MOST_PARAMS = 100
SECRET = re.compile(r"//[^/\s]*@")
STATUSES = {"finished": "FINISHED", "failed": "FAILED"}  # others are KILLED


def to_mlflow(run: Run, out: Path | None) -> Exported:
    """Log every member to MLflow.

    Exporting again to a server adds new runs to the experiment.

    Raises:
        AttnscopeError: mlflow is not installed, or does not reach or refuses its server, or as `new_folder`.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI")
    counts: dict[str, int] = {}
    lost: list[str] = []
    if server:
        if out is not None:
            raise AttnscopeError(
                f"--out has no effect where MLFLOW_TRACKING_URI is set ({_shown(server)}). Drop one of them."
            )
        experiment = _log(run, server, None, counts, lost)
        place = _shown(server)
        look = 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
        if server.startswith(("http://", "https://")):
            page = f"{place.rstrip('/')}/#/experiments/{experiment}"
            look = f"python -m webbrowser {shlex.quote(page)}"
    else:
        with new_folder(run, "mlflow", out) as folder:
            artifacts = (folder.final.absolute() / "artifacts").as_uri()
            _log(run, _database_in(folder.scratch), artifacts, counts, lost)
        place = str(folder.final)
        look = f"mlflow ui --backend-store-uri {shlex.quote(_database_in(folder.final))}"
        if find_spec("flask") is None:  # mlflow-skinny writes, but has no pages
            look = f"pip install mlflow && {look}"
    return Exported(place=place, counts=counts, unit="values", lost=tuple(lost), next_command=look)


def _database_in(folder: Path) -> str:
    path = folder.absolute() / DATABASE
    if strange := set("?#%") & set(str(path)):
        raise AttnscopeError(
            f"{printable(folder.parent, 400)}: MLflow opens no database in a folder with {min(strange)} in its name. "
            "Name another folder with --out."
        )
    return f"sqlite:///{path}"


def _log(run: Run, uri: str, artifacts: str | None, counts: dict[str, int], lost: list[str]) -> str:
    """Log the members of a run, count their values, and return the id of the experiment."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise not_installed(error, "mlflow") from None
    with _brief_and_impatient():
        try:
            client = MlflowClient(tracking_uri=uri)
        except ImportError as error:
            raise not_installed(error, "sqlalchemy") from None
        except Exception as error:  # MLflow's, SQLAlchemy's, or the system's
            raise _refused(uri, error) from None
        try:
            experiment = _experiment(client, run.name, artifacts)
            for part in by_part(run, lost):
                for member, moments in scalars_of(part):
                    settings = settings_of(part, member, lost)
                    tracked = _begin(client, experiment, part, member, settings)
                    counts[member.name], last = _log_metrics(client, tracked, moments)
                    if part.status != "running":
                        status = STATUSES.get(part.status, "KILLED")
                        client.set_terminated(tracked, status, end_time=last or None)
        except MlflowException as error:
            raise _refused(uri, error) from None
    return experiment


@contextmanager
def _brief_and_impatient() -> Iterator[None]:
    """MLflow does not tell of every table it makes, nor try for many minutes to reach a server."""
    logger = logging.getLogger("mlflow")
    level, is_set = logger.level, RETRIES in os.environ
    logger.setLevel(logging.WARNING)
    os.environ.setdefault(RETRIES, FEW)
    try:
        yield
    finally:
        logger.setLevel(level)
        if not is_set:
            del os.environ[RETRIES]


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The id of an experiment, made if there is none of that name."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return str(client.create_experiment(name, artifact_location=artifacts))
    if experiment.lifecycle_stage != "active":
        raise AttnscopeError(
            f"The MLflow experiment {name} is deleted. Restore it: mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}"
        )
    return str(experiment.experiment_id)


def _begin(client: Any, experiment: str, run: Run, member: MemberRecord, settings: Mapping[str, Setting]) -> str:
    """The id of a new MLflow run that knows how its member was trained and what became of it."""
    from mlflow.entities import Param

    outcome = {f"attnscope.{name}": str(value) for name, value in outcome_of(member).items()}
    started = _milliseconds(start_of(run))
    tracked = client.create_run(experiment, start_time=started, run_name=member.name, tags=outcome)
    keys = safe_names(settings, letters=TAG_LETTERS)
    params = iter([Param(keys[key], x if isinstance(x, str) else to_json(x)) for key, x in settings.items()])
    while batch := list(islice(params, MOST_PARAMS)):
        client.log_batch(tracked.info.run_id, params=batch)
    return str(tracked.info.run_id)


def _log_metrics(client: Any, tracked: str, moments: Iterable[Moment]) -> tuple[int, int]:
    """How many values were logged, and the time of the last."""
    from mlflow.entities import Metric

    metrics = (
        Metric(tag, value, _milliseconds(moment.seconds), moment.step)
        for moment in moments
        for tag, value in moment.values.items()
    )
    count = last = 0
    while batch := list(islice(metrics, MOST_METRICS)):
        client.log_batch(tracked, metrics=batch)
        count, last = count + len(batch), batch[-1].timestamp
    return count, last


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _refused(uri: str, error: Exception) -> AttnscopeError:
    reason = _shown(" ".join(str(error).split()), 300).rstrip(".")
    return AttnscopeError(f"MLflow at {_shown(uri)}: {reason}. Put that right and try again.")


def _shown(text: str, limit: int = 200) -> str:
    """Without the names and passwords that addresses can have in them."""
    return printable(SECRET.sub("//", text), limit)
