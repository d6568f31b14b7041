"""Checkpoints of a part: tensors as safetensors, the rest as JSON. Needs torch.

The JSON file is put into place last: without it, or beside tensors that do not match its hash, there is no checkpoint.
"""

import contextlib
import hashlib
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from attnscope.errors import RunError, RunWriteError
from attnscope.runs.atomic import reason_of, remedy_of, replace_file
from attnscope.runs.checksums import sealed
from attnscope.runs.foreign import is_folder, printable, read_file
from attnscope.runs.layout import (
    CHECKPOINT_FILE,
    MAX_CHECKPOINT_BYTES,
    MAX_JSON_BYTES,
    checkpoint_file,
    to_json,
    with_special,
)
from attnscope.runs.manifest import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where training can go on: `step` updates are done.

    Attributes:
        step: updates already done.
        tensors: on the CPU.
        state: as JSON gives it back: tuples have become lists.
        notes: one line per newer checkpoint that could not be used.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, object]
    notes: tuple[str, ...] = ()


def save_checkpoint(part_dir: Path, *, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write a checkpoint, then remove the others.

    Args:
        part_dir: folder of the part.
        step: updates already done.
        tensors: on any device, of any strides; two that share memory come back as two.
        state: anything JSON understands.

    Returns:
        The path of its JSON half.

    Raises:
        RunWriteError: the disk did not take it; the checkpoint before it is still there.
    """
    payload = save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()})
    commit = {"step": step, "sha256": hashlib.sha256(payload).hexdigest(), "state": state}
    path = part_dir / checkpoint_file(step, "json")
    keep = {path.name, checkpoint_file(step, "safetensors")}
    try:
        replace_file(part_dir / checkpoint_file(step, "safetensors"), payload)
        replace_file(path, sealed(to_json(commit)).encode())
    except OSError as error:
        raise RunWriteError(
            f"{path}: {reason_of(error)}. The checkpoint before it and all records are kept. "
            f"{remedy_of(error)}, then: attnscope train --resume {shlex.quote(str(part_dir.parent))}"
        ) from None
    remove_checkpoints(part_dir, keep=keep)
    return path


def remove_checkpoints(part_dir: Path, *, keep: Collection[str] = ()) -> None:
    """Delete the checkpoints of a part but for the files in `keep`; what cannot be deleted stays."""
    with contextlib.suppress(OSError):
        for entry in sorted(part_dir.iterdir()):  # "json" goes before "safetensors"
            if CHECKPOINT_FILE.fullmatch(entry.name) and entry.name not in keep:
                entry.unlink()


def load_checkpoint(part_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is none.

    Raises:
        RunError: the folder cannot be listed, or there are checkpoints and none is whole.
    """
    if not is_folder(part_dir):
        return None
    try:
        matches = [CHECKPOINT_FILE.fullmatch(entry.name) for entry in part_dir.iterdir()]
    except OSError as error:
        raise RunError(f"{part_dir}: {reason_of(error)}. {remedy_of(error)} and try again.") from None
    steps = sorted({int(match["step"]) for match in matches if match and match["kind"] == "json"})
    notes: list[str] = []
    for step in reversed(steps):
        try:
            tensors, state = _load(part_dir, step)
        except RunError as error:
            notes.append(str(error))
        else:
            return Checkpoint(step=step, tensors=tensors, state=state, notes=tuple(notes))
    if notes:
        raise RunError(
            f"{printable(part_dir.parent, 400)}: {notes[0]}. Restore the file, or delete the checkpoint: the part is then "
            "trained again from its first step."
        )
    return None


def _load(part_dir: Path, step: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    name = f"{part_dir.name}/{checkpoint_file(step, 'json')}"
    path = part_dir / checkpoint_file(step, "json")
    commit = read_json(path, name=name, limit=MAX_JSON_BYTES, way_out="")
    name = f"{part_dir.name}/{checkpoint_file(step, 'safetensors')}"
    payload = read_file(part_dir / checkpoint_file(step, "safetensors"), name=name, limit=MAX_CHECKPOINT_BYTES)
    state = with_special(commit.get("state"))
    if commit.get("step") != step or not isinstance(state, dict):
        raise RunError(f"{name}: its JSON does not describe step {step}")
    if commit.get("sha256") != hashlib.sha256(payload).hexdigest():
        raise RunError(f"{name}: is not the file that its JSON was written for")
    try:
        return load(payload), state
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise RunError(f"{name}: is damaged: {printable(error)}") from None
