"""Small run directories with numbers that tell where they come from."""

import json
from pathlib import Path

import numpy as np

from attnscope.config import Config, members_of, with_control
from attnscope.runs.events import Event, Untyped
from attnscope.runs.layout import COLUMNS
from attnscope.runs.part_writer import PartWriter
from attnscope.runs.writer import RunWriter

GROUPS = ("embedding", "q", "k")


def unsealed(path: Path) -> dict:
    """What a JSON file of a run holds, to be changed and written back: without its checksum."""
    raw = json.loads(path.read_text())
    raw.pop("crc32", None)
    return raw


def event(kind: str, *, step: int, member: int | None = None, **fields: object) -> Event:
    """Of any kind, with any fields, as they stand in a line."""
    return Event(step=step, member=member, what=Untyped(kind=kind, fields=fields))


def new_run(path: Path, *, twins: bool = True, unigram: object = 3.0, config: Config | None = None) -> RunWriter:
    if config is None:
        config = with_control(Config()) if twins else Config()
    return RunWriter.create(
        path,
        command=["attnscope", "train", "--no-scale"],
        config=config,
        members=members_of(config),
        environment={"python": "3.11"},
        data={"source": "stdlib", "sha256": "ab", "reference": {"unigram": unigram}},
    )


def columns(table: str, steps, *, members=(0,), value: float = 1.0, seed: int = 0, n_layers=2, n_heads=2):
    """All columns of a table, one row per step, member and (heads: layer and head; params: group of 3)."""
    each = {"steps": 1, "heads": n_layers * n_heads, "layers": n_layers, "params": len(GROUPS)}[table]
    steps = np.asarray(steps)
    n = len(steps) * len(members) * each
    noise = np.random.default_rng(seed).normal(size=(len(COLUMNS[table]), n))
    made = {name: value + 0.1 * noise[i] for i, name in enumerate(COLUMNS[table])}
    made["step"] = np.repeat(steps, len(members) * each)
    made["member"] = np.tile(np.repeat(np.array(members), each), len(steps))
    places = np.arange(n) % each
    if table == "heads":
        made |= {"layer": places // n_heads, "head": places % n_heads}
    if table == "layers":
        made["layer"] = places
    if table == "params":
        made |= {
            "layer": np.minimum(places, 1) - 1,
            "group": np.array(GROUPS, dtype=object)[places],
        }
    return made


def fill(part: PartWriter, steps, *, members=(0, 1), value: float = 1.0, seed: int = 0) -> None:
    for table in COLUMNS:
        part.append(table, columns(table, steps, members=members, value=value, seed=seed))
