"""Hands a run to other tools: files of tables, or one run per member in a tracker. Needs no torch.

Reading order: exported, folder, parts, tables (csv, parquet), scalars and settings (what trackers take), tensorboard, wandb,
mlflow. All targets but the last two write nothing outside their folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from attnscope.config import nearest
from attnscope.errors import AttnscopeError
from attnscope.export.exported import Exported
from attnscope.export.mlflow import to_mlflow
from attnscope.export.tables import to_csv, to_parquet
from attnscope.export.tensorboard import to_tensorboard
from attnscope.export.wandb import to_wandb
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run

__all__ = ["TARGETS", "Exported", "export_run"]

TARGETS: Mapping[str, Callable[[Run, Path | None], Exported]] = {
    "csv": to_csv,
    "parquet": to_parquet,
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
    "mlflow": to_mlflow,
}


def export_run(run: Run, target: str, *, out: str | Path | None = None) -> Exported:
    """Export a run.

    Args:
        run: to export; it may still be training, or have been killed.
        target: one of TARGETS.
        out: folder to write, which must be empty or not exist; None = export/<target> in the run directory, where an
            earlier export is replaced.

    Raises:
        AttnscopeError: there is no such target, a package is not installed, or a tracker refuses.
        RunWriteError: the folder cannot be written.
    """
    if target not in TARGETS:
        raise AttnscopeError(
            f"There is no export to {printable(target)}.{nearest(target, list(TARGETS))} Use {', '.join(TARGETS)}."
        )
    return TARGETS[target](run, None if out is None else Path(out))
