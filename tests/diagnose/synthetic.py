"""Run directories with given losses and attention, made with the real writer."""

from pathlib import Path

import numpy as np

from attnscope.config import members_of, parse_table
from attnscope.runs.layout import COLUMNS, MemberEntry
from attnscope.runs.reader import Run, open_run
from attnscope.runs.writer import RunWriter
from tests.runs.made_up import event

HEALTHY = {"entropy_ratio": 0.5, "max_logit": 10.0, "logit_std": 1.0}
MOVING = {"weight_norm": 10.0, "update_norm": 0.01, "grad_norm": 1.0, "grad_max": 0.2}


def steps_table(losses_MS, **columns):
    """The steps table of members that all recorded the same steps; other columns are healthy, gradients as the losses."""
    losses_MS = np.atleast_2d(np.asarray(losses_MS, dtype=float))
    n_members, n_steps = losses_MS.shape
    table = {name: np.ones(n_members * n_steps) for name in COLUMNS["steps"]}
    table["step"] = np.repeat(np.arange(n_steps), n_members)
    table["member"] = np.tile(np.arange(n_members), n_steps)
    table["loss"] = losses_MS.T.ravel()
    table["grad_norm"] = np.where(np.isfinite(table["loss"]), 1.0, np.nan)  # backward of it
    return table | {name: np.asarray(values).ravel() for name, values in columns.items()}


def heads_table(n_members, steps, *, n_layers=1, n_heads=1, **columns):
    """The heads table; a column is one number, or one per row (step, member, layer, head)."""
    shape = (len(steps), n_members, n_layers, n_heads)
    places = np.indices(shape).reshape(4, -1)
    table = {name: np.full(places.shape[1], 0.5) for name in COLUMNS["heads"]}
    for name, value in (HEALTHY | columns).items():
        table[name] = np.broadcast_to(np.asarray(value, dtype=float), shape).ravel()
    table["step"] = np.asarray(steps)[places[0]]
    table |= {"member": places[1], "layer": places[2], "head": places[3]}
    return table


def params_of_one(steps, groups=("q", "k", "v"), **columns):
    """The params table of one member; a column is one number, or one per row (step, group), all in layer 0."""
    shape = (len(steps), len(groups))
    table = {name: np.ones(shape).ravel() for name in COLUMNS["params"]}
    table["step"] = np.repeat(np.asarray(steps), len(groups))
    table |= {name: np.zeros(shape[0] * shape[1], dtype=int) for name in ("member", "layer", "nonfinite")}
    table["group"] = np.array(list(groups) * len(steps), dtype=object)
    return table | {name: np.broadcast_to(np.asarray(x, dtype=float), shape).ravel() for name, x in columns.items()}


def watched_run_of(path: Path, *, steps=None, heads=None, params=None, events=(), end="finished") -> Run:
    """A watched run of one member, `rank 0`; events are (kind, step, fields)."""
    writer = RunWriter.create(
        path,
        command=["attnscope", "watch", "train.py"],
        config=None,
        members=[MemberEntry(name="rank 0", part=0, index=0, settings={})],
        environment={},
        data={},
    )
    part = writer.part(0)
    for table, columns in (("steps", steps), ("heads", heads), ("params", params)):
        if columns is not None:
            part.append(table, columns)
    for kind, step, fields in events:
        part.event(event(kind, step=step, member=0, **fields))
    part.finish(end)
    return open_run(path)


def params_table(n_members, steps, *, layers=(0, 1), groups=("q", "mlp_in"), **columns):
    """The params table; a column is one number, or one per row (step, member, layer, group)."""
    shape = (len(steps), n_members, len(layers), len(groups))
    places = np.indices(shape).reshape(4, -1)
    table = {name: np.ones(places.shape[1]) for name in COLUMNS["params"]}
    for name, value in (MOVING | columns).items():
        table[name] = np.broadcast_to(np.asarray(value, dtype=float), shape).ravel()
    if "update_ratio" not in columns:
        with np.errstate(all="ignore"):
            table["update_ratio"] = table["update_norm"] / table["weight_norm"]
    table |= {"step": np.asarray(steps)[places[0]], "member": places[1], "layer": np.asarray(layers)[places[2]]}
    table["group"] = np.asarray(groups, dtype=object)[places[3]]
    table["nonfinite"] = np.zeros(places.shape[1], dtype=np.int64)
    return table


def qkv_table(n_members, steps, *, n_layers=1, groups=("q", "k", "v"), **columns):
    """The params table; grad_norm or another column is one number, or one per row (step, member, layer, group)."""
    shape = (len(steps), n_members, n_layers, len(groups))
    places = np.indices(shape).reshape(4, -1)
    table = {name: np.ones(places.shape[1]) for name in COLUMNS["params"]}
    table |= {name: np.broadcast_to(np.asarray(value, dtype=float), shape).ravel() for name, value in columns.items()}
    table["nonfinite"] = np.zeros(places.shape[1])
    table["step"] = np.asarray(steps)[places[0]]
    table |= {"member": places[1], "layer": places[2], "group": np.asarray(groups, dtype=object)[places[3]]}
    return table


def run_of(
    path: Path,
    config=None,
    *,
    steps=None,
    heads=None,
    params=None,
    events=(),
    end="finished",
    error=None,
    planned=None,
    unigram=5.0,
    reference=None,
) -> Run:
    """A run of one part with these tables; events are (kind, step, member, fields); `planned` steps, `end` and its error."""
    config = dict(config or {})
    if planned is not None:
        config["train"] = config.get("train", {}) | {"steps": planned}
    resolved = parse_table(config)
    writer = RunWriter.create(
        path,
        command=["attnscope", "train"],
        config=resolved,
        members=members_of(resolved),
        environment={},
        data={"reference": {"unigram": unigram} | (reference or {})},
    )
    part = writer.part(0)
    for table, columns in (("steps", steps), ("heads", heads), ("params", params)):
        if columns is not None:
            part.append(table, columns)
    for kind, step, member, fields in events:
        part.event(event(kind, step=step, member=member, **fields))
    part.finish(end, **({} if error is None else {"error": error}))
    return open_run(path)
