"""Whether training computes what evaluation computes, but for dropout."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isclose

import torch

from attnscope.check.attention import Observed, look
from attnscope.check.case import BATCH_NORMS, NOISE, SEED, Case, Trace, change_BP, first_changed
from attnscope.check.dropout import without_dropout
from attnscope.check.facts import Attention
from attnscope.check.result import Checked, failed, listed, many, not_looked, passed, short, stated
from attnscope.check.scale import SCALE_WITHIN

NAME = "training and evaluation"
SEEDS = (SEED, SEED + 1, SEED + 2)  # what is not the same for all of them is random, and not compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that an attention call shall be the same in."""

    name: str
    of: Callable[[Attention], object]


FACTS = (
    Fact(name="scale", of=lambda call: None if call.is_cosine else call.scale),
    Fact(name="visible pairs", of=lambda call: call.pairs),
    Fact(name="mask", of=lambda call: call.pattern),
    Fact(name="heads", of=lambda call: call.n_heads),
    Fact(name="d_head", of=lambda call: call.d_head),
    Fact(name="queries", of=lambda call: call.n_queries),
    Fact(name="keys", of=lambda call: call.n_keys),
    Fact(name="dtype", of=lambda call: call.dtype),
)


def training_and_evaluation(case: Case, observed: Observed) -> Checked:
    """Whether attention has the same scale, mask and shapes in both modes, and outputs agree without dropout."""
    if "training" not in case.outputs:
        return not_looked(NAME, f"The pass in training mode failed: {case.why_unusable('training')}.", "Give a batch with which the model can train.")  # fmt: skip
    if not observed.calls and observed.why.startswith("with gradients"):
        return not_looked(NAME, f"{observed.why}.", "Make that pass work first.")
    outputs = _outputs(case)
    # Layers that are dropped, noise, experts drawn: what comes out differs from seed to seed even without dropout.
    real_BP = case.watched(case.batch.real_BT)
    is_random = any(_apart(outputs[0], other, real_BP) > NOISE for other in outputs[1:])
    seeds = SEEDS if is_random else SEEDS[:1]
    passes = [look(case, "training", seed=seed, dropout=False) for seed in seeds]
    rows = _differences(observed, passes)
    n_calls = [len(observed.calls), *(len(training.calls) for training in passes)]
    if rows:
        first = rows[0]
        return failed(
            NAME,
            f"Attention is not the same in both modes: {first['fact']} of {first['layer']} is {_said(first['evaluation'])} in "
            f"evaluation and {_said(first['training'])} in training ({many(len(rows), 'difference')}, in "
            f"{listed(dict.fromkeys(str(row['layer']) for row in rows))}).",
            rows,
            "Let both modes take the same path: only dropout may depend on self.training.",
        )
    if n_calls[0] != n_calls[1] and len(set(n_calls[1:])) == 1 and not is_random:
        return failed(
            NAME,
            f"{many(n_calls[0], 'attention call')} in evaluation and {n_calls[1]:,} in training, without anything random.",
            _missing(observed, passes[0]),
            "Let both modes run the same layers.",
        )
    seen = f"{many(n_calls[0], 'attention call')} the same" if n_calls[0] else "no attention seen"
    if is_random:
        return stated(
            NAME,
            f"Training is random without its dropout, too: outputs cannot be compared ({seen} in both modes).",
        )
    if not case.usable("evaluation"):
        return not_looked(NAME, f"Outputs cannot be compared: {case.why_unusable('evaluation')}; {seen} in both modes.", "Repair that first (see the other checks).")  # fmt: skip
    apart = _apart(case.outputs["evaluation"], outputs[0], real_BP)
    if apart <= NOISE:
        return passed(NAME, f"Without dropout, both modes give the same outputs ({seen} in both).")
    return _said_apart(case, apart, seen)


def _said_apart(case: Case, apart: float, seen: str) -> Checked:
    """Outputs differ though nothing is random and attention was seen to be the same."""
    with without_dropout():
        in_training: Trace = case.trace(case.batch, "training")
    first = first_changed(case.trace(case.batch, "evaluation"), in_training, case.batch.real_BT)
    module = dict(case.model.named_modules()).get(first or "")
    begins = f", first in {first}" if first else ""
    why = " which takes statistics of the batch in training" if isinstance(module, BATCH_NORMS) else ""
    return stated(
        NAME,
        f"Without dropout, outputs in training differ from those in evaluation by {short(apart)} of the largest{begins}{why} "
        f"({seen} in both).",
        [{"change": apart, "compared with": NOISE, "first module": first}],
    )


def _apart(one: torch.Tensor, two: torch.Tensor, real_BP: torch.Tensor) -> float:
    """At positions that are not padded."""
    return float(change_BP(one, two)[real_BP].max())


def _outputs(case: Case) -> list[torch.Tensor]:
    with without_dropout():
        return [case.run(case.batch, "training", seed=seed) for seed in SEEDS]


def _differences(observed: Observed, passes: list[Observed]) -> list[dict[str, object]]:
    """Facts of the same call of the same layer that all training passes agree on, and evaluation does not."""
    rows: list[dict[str, object]] = []
    in_training = [_by_place(training) for training in passes]
    for place, mine in _by_place(observed).items():
        theirs = [calls[place] for calls in in_training if place in calls]
        if len(theirs) < len(passes):
            continue
        here: list[dict[str, object]] = []
        for fact in FACTS:
            one, others = fact.of(mine), [fact.of(call) for call in theirs]
            if fact.name == "mask" and here:
                continue  # the number of pairs says it already
            if fact.name == "scale" and (one is None or None in others):
                continue  # it could not be read
            if _is_same(one, others[0]) or not all(_is_same(others[0], value) for value in others):
                continue
            words = ("", "") if fact.name != "mask" else (f"{mine.mask}, {mine.pairs:,} pairs", f"{theirs[0].mask}, {theirs[0].pairs:,} other pairs")  # fmt: skip
            here.append({"layer": mine.layer, "fact": fact.name, "evaluation": words[0] or one, "training": words[1] or others[0]})  # fmt: skip
        rows += here
    return rows


def _by_place(observed: Observed) -> dict[tuple[str, int], Attention]:
    """Calls by their layer, and the how many-th of it they are."""
    calls: dict[tuple[str, int], Attention] = {}
    for call in observed.calls:
        number = 0
        while (call.layer, number) in calls:
            number += 1
        calls[call.layer, number] = call
    return calls


def _missing(observed: Observed, training: Observed) -> list[dict[str, object]]:
    one, two = _by_place(observed), _by_place(training)
    return [
        {"layer": layer, "evaluation": (layer, n) in one, "training": (layer, n) in two}
        for layer, n in sorted({*one, *two})
        if ((layer, n) in one) != ((layer, n) in two)
    ]


def _is_same(one: object, two: object) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return isclose(one, two, rel_tol=SCALE_WITHIN)
    return one == two


def _said(value: object) -> str:
    return short(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
