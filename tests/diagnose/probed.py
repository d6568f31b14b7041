"""Watched runs that say what their probes found, made with the real writer."""

from pathlib import Path

import numpy as np

from attnscope.runs.layout import MemberEntry
from attnscope.runs.reader import Run, open_run
from attnscope.runs.writer import RunWriter
from tests.diagnose.synthetic import heads_table, steps_table
from tests.runs.made_up import event

LAYER = {"n_heads": 1, "d_head": 16, "scale": 0.25, "mask": "none", "dtype": "float32", "backend": "sdpa"}
SIGHT = {"queries": 16, "keys": 16, "later": 0.0, "later_rows": 0.0, "padded": None, "inverted_rows": 0.0}
TARGETS = {
    "positions": 16,
    "compared": 128,
    "equal_before": 0.05,
    "equal_same": 0.05,
    "equal_next": 1.0,
    "equal_after_next": 0.05,
    "sequences": 1,
}
UPKEEP = {
    "number": 0,
    "optimizer": "AdamW",
    "updates": 30,
    "steps_without_gradient": 0,
    "steps_zeroed": 0,
    "compared": 4,
    "gradients_kept": 0,
    "parameters": 12,
    "detached": 0,
    "detached_names": [],
    "unused": 0,
    "unused_names": [],
    "lr_zero": 0,
    "lr_zero_names": [],
}
ORPHANS = {
    "parameters": 4,
    "names": ["a.weight", "a.bias", "b.weight", "b.bias"],
    "left_out": 0,
    "share_left_out": 0.0,
    "hidden": 0,
    "containers": [],
}


def probed(path: Path, *events, n_members=1, steps=30, losses=None, grad_norm=1.0, attention=("attn",)) -> Run:
    """Ranks that recorded so many steps and these attention layers; events are (kind, fields, step, member), the last two 0."""
    names = ["watched"] if n_members == 1 else [f"rank {n}" for n in range(n_members)]
    entries = [MemberEntry(name=name, part=part, index=0, settings={}) for part, name in enumerate(names)]
    writer = RunWriter.create(
        path, command=["attnscope", "watch"], config=None, members=entries, environment={}, data={}
    )
    for number in range(n_members):
        part = writer.part(number)
        if steps:
            table = steps_table(np.full((1, steps), 4.0) if losses is None else losses)
            part.append("steps", table | {"grad_norm": np.broadcast_to(np.asarray(grad_norm, float), steps).copy()})
        if attention:
            part.append("heads", heads_table(1, [0], n_layers=len(attention)))
        part.event(event("optimizer", step=0, member=0, name="AdamW"))
        for layer, name in enumerate(attention):
            part.event(event("attention", step=0, member=0, **LAYER, layer=layer, name=name))
        for kind, fields, *where in events:
            step, member = (*where, 0, 0)[:2] if len(where) < 2 else where
            if member == number:
                part.event(event(kind, step=step, member=0, **fields))
        part.finish("finished")
    return open_run(path)
