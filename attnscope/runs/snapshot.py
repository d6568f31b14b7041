"""Snapshots of a watched model around a break: the weights before a step and the batches it met, as safetensors.

Needs torch, like checkpoint.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnscope.errors import RunError, RunWriteError
from attnscope.runs.atomic import reason_of, remedy_of, sync_folder
from attnscope.runs.foreign import is_regular_file, printable
from attnscope.runs.layout import to_json, with_special

SNAPSHOT_FILE = re.compile(r"snapshot-(?P<step>\d{8})\.safetensors")
FORMAT = "attnscope snapshot 1"

Argument = Tensor | int | float | bool | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A step that can be looked at again: `model.load_state_dict(weights)`, `torch.set_rng_state(rng)`, `model(**batch)`.

    Attributes:
        step: updates already done.
        weights: name to parameter or buffer, before the step.
        batches: what the model was called with, argument by argument, one for each micro-batch; parts of a nested
            argument are named with dots.
        rng: state of the CPU's random numbers before each batch.
        left_out: arguments that are neither tensors nor numbers or texts.
    """

    step: int
    weights: Mapping[str, Tensor]
    batches: Sequence[Mapping[str, Argument]]
    rng: Sequence[Tensor]
    left_out: Sequence[str] = ()


def save_snapshot(part_dir: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot, whole or not at all.

    Raises:
        RunWriteError: the disk did not take it.
    """
    tensors = {f"weights/{name}": x for name, x in snapshot.weights.items()}
    plain: list[dict[str, object]] = []
    for number, (batch, rng) in enumerate(zip(snapshot.batches, snapshot.rng, strict=True)):
        tensors[f"rng/{number}"] = rng
        plain.append({})
        for name, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"batches/{number}/{name}"] = value
            else:
                plain[number][name] = value
    metadata = {
        "format": FORMAT,
        "step": str(snapshot.step),
        "batches": to_json(plain),
        "left_out": to_json(list(snapshot.left_out)),
    }
    path = part_dir / f"snapshot-{snapshot.step:08d}.safetensors"
    scratch = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Cloned: a file has no views, and two names for one memory come back as two.
        save_file(
            {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()},
            scratch,
            metadata=metadata,
        )
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        said = (reason_of(error), f" {remedy_of(error)}.") if isinstance(error, OSError) else (error, "")  # fmt: skip
        raise RunWriteError(f"{path}: {said[0]}. The records are kept.{said[1]}") from None
    sync_folder(part_dir)
    return path


def load_snapshot(path: str | Path) -> Snapshot:
    """Read a snapshot; its tensors are on the CPU.

    Raises:
        RunError: it is not there, or is no snapshot.
    """
    path = Path(path)
    if not is_regular_file(path):
        raise RunError(
            f"{printable(path)}: there is no such file. `attnscope watch --snapshot 2` writes some where training breaks."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RunError(f"{printable(path)}: is not a snapshot of attnscope")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        plain = with_special(json.loads(metadata["batches"]))
        left_out = json.loads(metadata["left_out"])
        batches: list[dict[str, Argument]] = [dict(batch) for batch in plain]  # type: ignore[attr-defined]
        rng = [tensors[f"rng/{number}"] for number in range(len(batches))]
        weights = {}
        for name, x in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "weights":
                weights[rest] = x
            elif kind == "batches":
                number, _, argument = rest.partition("/")
                batches[int(number)][argument] = x
        return Snapshot(
            step=int(metadata["step"]),
            weights=weights,
            batches=batches,
            rng=rng,
            left_out=[str(line) for line in left_out],
        )
    except RunError:
        raise
    except (
        SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise RunError(f"{printable(path)}: is damaged: {printable(error)}") from None


def snapshots_of(run_dir: Path) -> list[Path]:
    """The snapshots of all parts of a run, by part and step."""
    try:
        return sorted(path for path in run_dir.glob("part-*/*") if SNAPSHOT_FILE.fullmatch(path.name))
    except OSError:
        return []
