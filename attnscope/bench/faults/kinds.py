"""All kinds of faults, and putting one into a program."""

from dataclasses import replace

from attnscope.bench.faults.attention_faults import ATTENTION
from attnscope.bench.faults.fault import Changes, Fault
from attnscope.bench.faults.recipe import Recipe
from attnscope.bench.faults.training_faults import TRAINING

__all__ = ["FAULTS", "RELATIVE", "Changes", "Fault", "changed"]

FAULTS: tuple[Fault, ...] = (*ATTENTION, *TRAINING)

RELATIVE = ("lr",)  # fields of which a change says how many times those of the base


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """A recipe with a fault; of RELATIVE fields, so many times what it had."""
    times = {name: getattr(recipe, name) * changes[name] for name in RELATIVE if name in changes}
    return replace(recipe, **{**changes, **times})
