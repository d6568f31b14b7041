"""Conditions on what is recorded, typed by a person: nonfinite, explosion, max_logit>1e4, the name of a rule.

And whether the newest records meet one.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attnscope.config import nearest
from attnscope.errors import ConfigError
from attnscope.runs.events import Diverged, Event
from attnscope.runs.found_live import FoundLive
from attnscope.runs.layout import COLUMNS, KEYS
from attnscope.signals.nonfinite import TENSORS, Looked, Tables, looked_at, norms_looked_at

NAMED = ("nonfinite", "explosion")
IS_NAME = re.compile(r"[a-z]\w+")
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
    """When to stop: one of NAMED, where a rule finds something, or a column of a table above or below a threshold.

    Attributes:
        text: as it was typed.
        rule: its name; None where it is no rule.
        column: None for one of NAMED, and for a rule.
        sign: < or >.
        threshold: in the unit of the column.
    """

    text: str
    rule: str | None = None
    column: str | None = None
    sign: str = ""
    threshold: float = 0.0


def parse_condition(text: str, rules: Collection[str] = (), not_live: Mapping[str, str] | None = None) -> Condition:
    """Read nonfinite, explosion, the name of a rule, or COLUMN>NUMBER.

    Args:
        text: as it was typed.
        rules: names of those that can be asked while training goes on.
        not_live: why others cannot, by their names.

    Raises:
        ConfigError: it is none of these.
    """
    if text in NAMED:
        return Condition(text=text)
    if text in rules:
        return Condition(text=text, rule=text)
    if not_live and text in not_live:
        raise ConfigError(
            f"--stop-on {text}: this rule cannot be asked while training goes on: {not_live[text]}. Ask it afterwards: "
            f"attnscope diagnose RUN --fail-on {text}"
        )
    match = COMPARED.fullmatch(text.strip())
    if match is None:
        hint = nearest(text, [*NAMED, *rules]) if IS_NAME.fullmatch(text) else ""
        raise ConfigError(
            f"--stop-on is {text!r}, but must be nonfinite, explosion, the name of a rule, or a column and a threshold, as in "
            f"max_logit>1e4.{hint}"
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


def first_met(
    conditions: Sequence[Condition], tables: Tables, diverged: Event | None, found: Sequence[Event] = ()
) -> tuple[Condition, str] | None:
    """The first condition that the newest records meet, and what met it; None if none does.

    Args:
        conditions: in the order in which they are asked.
        tables: the newest records, and as `losses` those of the steps table that were seen.
        diverged: what the alarms say of the losses up to here; None = none has diverged.
        found: by rules, in them.
    """
    for condition in conditions:
        if condition.rule is not None:
            said = _found(condition.rule, found)
        elif condition.text == "explosion":
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
    is_one = len(np.unique(table["member"])) == 1 if "member" in table else True
    keys = [key for key in KEYS[TABLE_OF[column]] if key != "member" or not is_one]
    place = ", ".join(f"{key} {table[key][worst]}" for key in keys)
    return f"{column} {values[worst]:.4g} at {place}"


def _found(rule: str, found: Sequence[Event]) -> str | None:
    for event in found:
        if isinstance(event.what, FoundLive) and event.what.rule == rule:
            return f"{event.what.of_members}, found at step {event.step}"
    return None


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
