"""A run in Weights & Biases: one wandb run per member, in a group named after the run.

WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and the login are wandb's own. Without a server (WANDB_MODE=offline) everything is
in the folder, for `wandb sync`.
"""

import os
import shlex
from pathlib import Path
from typing import Any

from attnscope.errors import AttnscopeError
from attnscope.export.exported import Exported, not_installed
from attnscope.export.folder import new_folder
from attnscope.export.parts import by_part
from attnscope.export.scalars import scalars_of
from attnscope.export.settings import outcome_of, settings_of
from attnscope.runs.foreign import printable
from attnscope.runs.reader import Run

PROJECT = "attnscope"  # where WANDB_PROJECT names no other


def to_wandb(run: Run, out: Path | None) -> Exported:
    """Log every member to wandb; what wandb keeps on disk is in the folder.

    Exporting again adds new runs on the server.

    Raises:
        AttnscopeError: wandb is not installed, refuses or does not reach its server, or as `new_folder`.
    """
    try:
        import wandb
    except ImportError as error:
        raise not_installed(error, "wandb") from None
    if os.environ.get("WANDB_MODE") == "disabled":
        raise AttnscopeError("WANDB_MODE is disabled: nothing would be written. Set it to offline or online.")
    counts: dict[str, int] = {}
    lost: list[str] = []
    address = None
    try:
        with new_folder(run, "wandb", out) as folder:
            for part in by_part(run, lost):
                for member, moments in scalars_of(part):
                    counts[member.name] = 0
                    with _begun(
                        folder.scratch,
                        name=member.name,
                        group=run.name,
                        job_type=run.kind,
                        config=settings_of(part, member, lost),
                    ) as tracked:
                        for moment in moments:
                            tracked.log(moment.values, step=moment.step)
                            counts[member.name] += len(moment.values)
                        tracked.summary.update(outcome_of(member))
                        address = None if tracked.offline else tracked.project_url
    except wandb.errors.Error as error:
        raise _refused(error) from None
    runs = f"{shlex.quote(str(folder.final / 'wandb'))}/offline-run-*"
    return Exported(
        place=address or str(folder.final),
        counts=counts,
        unit="values",
        lost=tuple(lost),
        next_command=f"python -m webbrowser {address}" if address else f"wandb sync {runs}",
    )


def _begun(folder: Path, **about: object) -> Any:
    """A wandb run that records what it is told, nothing of this process or its machine."""
    import wandb

    try:
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        return wandb.init(
            dir=folder,
            mode=os.environ.get("WANDB_MODE") or None,  # wandb itself looks once in a process
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            reinit="create_new",
            settings=quiet,
            **about,
        )
    except Exception as error:  # wandb's, pydantic's, or the system's
        raise _refused(error) from None


def _refused(error: Exception) -> AttnscopeError:
    reason = printable(" ".join(str(error).split()), 300).rstrip(".")
    return AttnscopeError(f"wandb: {reason}. Or do without a server: set WANDB_MODE=offline.")
