"""Conditions on what is recorded, typed by a person: nonfinite, explosion, max_logit>1e4; and whether the newest records meet one."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnscope.errors import ConfigError
from attnscope.runs.events import Diverged, Event
from attnscope.runs.layout import COLUMNS, KEYS
from attnscope.signals.nonfinite import TENSORS, Looked, Tables, looked_at, norms_looked_at

NAMED = ("nonfinite", "explosion")
COMPARED = re.compile(r"(?P<column>\w+)\s*(?P<sign>[<>])\s*(?P<threshold>[-+.\w]+)")
# What may be compared: every column with numbers, and the table it is first found in.
TABLE_OF = {
    name: table
    for table in reversed(("steps", "heads", "params"))
    for name, column in COLUMNS[table].items()
    if name not in KEYS[table] and column.kind != "string"
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """When to stop: one of NAMED, or a column of a table above or below a threshold.

    Attributes:
        text: as it was typed.
        column: None for one of NAMED.
        sign: < or >.
        threshold: in the unit of the column.
    """

    text: str
    column: str | None = None
    sign: str = ""
    threshold: float = 0.0


def parse_condition(text: str) -> Condition:
    """Read nonfinite, explosion, or COLUMN>NUMBER.

    Raises:
        ConfigError: it is none of these.
    """
    if text in NAMED:
        return Condition(text=text)
    match = COMPARED.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"--stop-on is {text!r}, but must be nonfinite, explosion, or a column and a threshold, as in max_logit>1e4."
        )
    if match["column"] not in TABLE_OF:
        raise ConfigError(
            f"--stop-on {text}: there is no column {match['column']}. Columns: {', '.join(sorted(TABLE_OF))}."
        )
    try:
        threshold = float(match["threshold"])
        if math.isnan(threshold):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--stop-on {text}: {match['threshold']!r} is not a number. Write it as in max_logit>1e4."
        ) from None
    return Condition(text=text, column=match["column"], sign=match["sign"], threshold=threshold)


def first_met(conditions: Sequence[Condition], tables: Tables, diverged: Event | None) -> tuple[Condition, str] | None:
    """The first condition that the newest records meet, and what met it; None if none does.

    Args:
        conditions: in the order in which they are asked.
        tables: the newest records, and as `losses` those of the steps table that were seen.
        diverged: what the alarms say of the losses up to here; None = none has diverged.
    """
    for condition in conditions:
        if condition.text == "explosion":
            said = _explosion(diverged)
        elif condition.text == "nonfinite":
            said = _nonfinite(tables)
        else:
            said = _beyond(condition, tables)
        if said is not None:
            return condition, said
    return None


def _beyond(condition: Condition, tables: Tables) -> str | None:
    column = condition.column
    assert column is not None
    table = tables.get(TABLE_OF[column]) or {}
    if not table:
        return None
    values = table[column].astype(np.float64)
    bad = values > condition.threshold if condition.sign == ">" else values < condition.threshold
    if not bad.any():
        return None
    worst = np.flatnonzero(bad)[0]
    place = ", ".join(f"{key} {table[key][worst]}" for key in KEYS[TABLE_OF[column]] if key != "member")
    return f"{column} {values[worst]:.4g} at {place}"


def _explosion(diverged: Event | None) -> str | None:
    if diverged is None or not isinstance(diverged.what, Diverged):
        return None
    return f"the loss diverged at step {diverged.step}: {diverged.what.why}"


def _nonfinite(tables: Tables) -> str | None:
    steps, losses = (tables.get(name) or {} for name in ("steps", "losses"))
    # The gradient norm is there also at steps whose parameters are not measured.
    for looked in (*looked_at({**tables, "steps": losses}), *norms_looked_at(steps)):
        if looked.broken_N.any():
            at = int(np.argmax(looked.broken_N))
            return f"{_named(looked, at)} is not finite at step {looked.step_N[at]}"
    return None


def _named(looked: Looked, at: int) -> str:
    if looked.tensor != "gradient":
        return TENSORS[looked.tensor]
    return "grad_norm" if looked.group_N is None else f"the gradient of {looked.group_N[at]}"
