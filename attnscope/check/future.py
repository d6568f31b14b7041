"""Whether outputs know positions that come after their own.

Shape key: B batch, T position whose output is looked at, S position that is changed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.check.attention import Observed, spread
from attnscope.check.batch import CallBatch, changed_at
from attnscope.check.case import NOISE, Case, Mode, change_BP, first_changed
from attnscope.check.facts import Attention
from attnscope.check.result import MOST_ROWS, Checked, failed, listed, many, not_looked, passed, short, stated
from attnscope.check.sight import Direction, Sight, direction_of, sight_of

CHANGED = 8  # positions, one after the other
CHANGED_IN_TRAINING = 3
MASK = (
    "Hide what comes after the query in every layer: is_causal=True, or logits.masked_fill(ones(T, T).triu(1), -inf) before the "
    "softmax."
)
NAME = "future leak"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Who reacts to whom.

    Attributes:
        change_TS: how strongly the output at T reacts to position S.
        known_TS: where that was tried.
        how: by changing positions, by gradients too.
    """

    change_TS: Tensor
    known_TS: Tensor
    how: str

    @property
    def sight(self) -> Sight:
        """Pairs that react."""
        return sight_of(self.change_TS > NOISE, self.known_TS)


def future_leak(case: Case, observed: Observed, *, causal: bool | None) -> Checked:
    """Whether a later position changes an earlier output, in evaluation and in training.

    Args:
        case: what is checked.
        observed: its attention, and gradients between positions.
        causal: True = nothing may leak, False = the future is meant to be seen, None = all or nothing may leak.
    """
    n_positions = case.grid[1]
    without = "Give the arguments with which the model returns all positions (nanoGPT: targets too)."
    if n_positions is None:
        return not_looked(NAME, "The input has no position axis.", "Only sequences have a future.")
    if case.kind != "positions":
        shape = tuple(case.outputs["evaluation"].shape)
        rows = "one number or vector" if case.kind == "whole" else f"{shape[0]} rows, one a sequence"
        layers = [call for call in observed.calls if call.direction is not None]
        finding = f"The output has no position axis ({rows})."
        return not_looked(NAME, finding, without, _layer_rows(layers))
    if n_positions < 2:
        return not_looked(NAME, "The batch has a single position.", "Give longer sequences.")
    if not case.usable("evaluation"):
        return not_looked(
            NAME,
            f"Nothing can be told: {case.why_unusable('evaluation')}.",
            "Repair that first (see the other checks).",
        )
    reach = _reach(case, observed)
    sight = reach.sight
    direction = direction_of(sight)
    layers = [call for call in observed.calls if call.direction is not None]
    if direction == "alone":
        return not_looked(
            NAME,
            f"No output reacts to any other position than its own ({reach.how}).",
            "Projections that start at zero hide what attention does: check the model after some training steps. If it has been "
            "trained, its attention has no effect, or it takes another axis than the second for positions.",
            _layer_rows(layers),
        )
    if direction == "causal":
        in_training = _leak_in_training(case)
        if in_training is not None:
            return in_training
        meant = ", though it is meant to see the future" if causal is False else ""
        finding = (
            f"Looks causal{meant}: none of {many(sight.could_ahead, 'pair')} of an output and a later position reacts "
            f"({reach.how}); {many(sight.behind, 'pair')} with an earlier position do."
        )
        evidence = _pair_rows(reach, "evaluation", ahead=False)[:1] + _layer_rows(layers)
        if causal is False:
            return failed(NAME, finding, evidence, "Leave out the causal mask.")
        return passed(NAME, finding, evidence)
    return _leaking(case, reach, sight, direction, layers, causal)


def _leaking(
    case: Case,
    reach: Reach,
    sight: Sight,
    direction: Direction,
    layers: list[Attention],
    causal: bool | None,
) -> Checked:
    pairs = (
        f"{sight.ahead:,} of {many(sight.could_ahead, 'pair')} of an output and a later position react ({reach.how}), up to "
        f"{many(sight.farthest, 'position')} ahead"
    )
    partly = _partly(direction, sight, layers)
    is_block = _is_block(sight, layers) or (direction == "blocks" and not layers)
    rows = _pair_rows(reach, "evaluation", ahead=True)
    if (causal is None and not partly) or causal is False:
        how = ", within blocks of positions" if is_block else f", but {partly}" if partly else ""
        finding = f"Attends to the future{how}: {pairs}."
        evidence = rows[:3] + _layer_rows(layers)
        # Of what is said to be meant so, the opposite would have failed.
        return (stated if causal is None or partly else passed)(NAME, finding, evidence)
    first = _first_leaking_module(case, reach)
    begins = f"; the first module whose output changes is {first}" if first else ""
    if first:
        rows = ({**rows[0], "first module": first}, *rows[1:])
    return failed(
        NAME,
        f"Attends to the future{', ' + partly if partly else ', though it is meant to be causal'}: {pairs}{begins}.",
        rows[:3] + _layer_rows(layers),
        MASK if causal else f"{MASK} Where sight of part of the future is meant (a prefix), say causal=False.",
    )


def _is_block(sight: Sight, layers: list[Attention]) -> bool:
    """Whether what is seen ahead is a prefix, or whole blocks, in all layers."""
    kinds = {layer.direction for layer in layers} - {"alone"}
    return kinds == {"blocks"} and sight.farthest <= max(layer.farthest for layer in layers)


def _partly(direction: Direction, sight: Sight, layers: list[Attention]) -> str:
    """Why a leak looks like a mistake and not like an encoder; empty where it does not."""
    if direction == "backwards":
        return "and not to the past: the mask is the wrong way round"
    soft = [layer for layer in layers if layer.soft is not None and layer.soft.keys == "later keys"]
    if soft:
        return f"for the mask of {listed(layer.layer for layer in soft)} hides nothing: {soft[0].soft}"
    if _is_block(sight, layers):
        return ""
    kinds = {layer.direction for layer in layers} - {"alone"}
    causal = sum(layer.direction == "causal" for layer in layers)
    if kinds == {"causal"}:
        return f"though the masks of {many(causal, 'attention layer')} are causal: something else mixes positions"
    if "causal" in kinds:
        open_layers = [layer.layer for layer in layers if layer.direction != "causal"]
        return f"in {len(open_layers)} of {many(len(layers), 'attention layer')} ({listed(open_layers)})"
    if "partly" in kinds:
        odd = [layer for layer in layers if layer.direction == "partly"]
        ahead = max(layer.farthest for layer in odd)
        return f"in part: {odd[0].layer} sees up to {many(ahead, 'position')} ahead"
    if direction == "partly":
        share = sight.mirrored / sight.mirrors if sight.mirrors else 0.0
        return f"in part: {share:.0%} of what outputs see behind them they see at the same distance ahead"
    return ""


def _reach(case: Case, observed: Observed) -> Reach:
    real_BT = case.batch.real_BT
    n_positions = real_BT.shape[1]
    change_TS = torch.zeros(n_positions, n_positions, device=real_BT.device)
    known_TS = torch.zeros_like(change_TS, dtype=torch.bool)
    pairs_BTS = real_BT[:, :, None] & real_BT[:, None, :]
    real_TS = pairs_BTS.any(dim=0)
    changed = [j for j in spread(n_positions, CHANGED) if real_BT[:, j].any()]
    for j in changed:
        change_TS[:, j] = _column(case, j, "evaluation")
        known_TS[:, j] = True
    for i, reacts_T in observed.reacts.items():
        change_TS[i] = torch.maximum(change_TS[i], reacts_T.to(change_TS))
        known_TS[i] = True
    how = f"{many(len(changed), 'position')} changed"
    if observed.reacts:
        how += f", gradients of {len(observed.reacts)}"
    return Reach(change_TS=change_TS, known_TS=known_TS & real_TS, how=how)


def _column(case: Case, j: int, mode: Mode) -> Tensor:
    """How much each position's output changes with position j, (T,), in the sequences in which neither is padding."""
    real_BT = case.batch.real_BT
    after = case.run(_changed_at_position(case, j), mode)
    change = change_BP(case.outputs[mode], after)
    return change.masked_fill(~(real_BT & real_BT[:, j : j + 1]), 0.0).amax(dim=0)


def _changed_at_position(case: Case, j: int) -> CallBatch:
    where_BT = torch.zeros_like(case.batch.real_BT)
    where_BT[:, j] = case.batch.real_BT[:, j]
    return changed_at(case.batch, where_BT)


def _leak_in_training(case: Case) -> Checked | None:
    """A leak that evaluation does not show: statistics over positions, an expert that is full."""
    if not case.usable("training"):
        return None
    real_BT = case.batch.real_BT
    for j in reversed(spread(real_BT.shape[1], CHANGED_IN_TRAINING)):
        if j == 0 or not real_BT[:, j].any():
            continue
        column_T = _column(case, j, "training")[:j]
        leaked = int((column_T > NOISE).sum())
        if not leaked:
            continue
        i = int(column_T.argmax())
        first = _first_changed_before(case, j, "training")
        begins = f", first in {first}" if first else ""
        return failed(
            NAME,
            f"Attends to the future in training only: position {j} changes {leaked} of {many(j, 'output')} before it, by up to "
            f"{short(float(column_T[i]))} of the largest output{begins}.",
            ({**_pair_row("training", i, j, float(column_T[i])), "first module": first},),
            "Take no statistics over positions or sequences while training: LayerNorm or RMSNorm instead of BatchNorm.",
        )
    return None


def _first_leaking_module(case: Case, reach: Reach) -> str | None:
    """From the changed position that leaks most."""
    n_positions = case.batch.real_BT.shape[1]
    above_TS = torch.ones_like(reach.known_TS).triu(1)
    leaks_S = reach.change_TS.where(above_TS & reach.known_TS, 0.0).amax(dim=0)
    tried = spread(n_positions, CHANGED)
    j = max(tried, key=lambda at: float(leaks_S[at]))
    return _first_changed_before(case, j, "evaluation")


def _first_changed_before(case: Case, j: int, mode: Mode) -> str | None:
    real_BT = case.batch.real_BT
    before_BT = real_BT & real_BT[:, j : j + 1]
    before_BT[:, j:] = False
    return first_changed(case.trace(case.batch, mode), case.trace(_changed_at_position(case, j), mode), before_BT)


def _pair_rows(reach: Reach, mode: Mode, *, ahead: bool) -> tuple[dict[str, object], ...]:
    """The pairs that react most."""
    side_TS = torch.ones_like(reach.known_TS)
    side_TS = side_TS.triu(1) if ahead else side_TS.tril(-1)
    change_TS = reach.change_TS.where(side_TS & reach.known_TS, 0.0)
    top = change_TS.flatten().topk(min(3, change_TS.numel()))
    n = change_TS.shape[1]
    return tuple(
        _pair_row(mode, at // n, at % n, value)
        for value, at in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if value > NOISE
    )


def _pair_row(mode: Mode, i: int, j: int, change: float) -> dict[str, object]:
    return {"mode": mode, "output": i, "reacts to": j, "change": change, "compared with": NOISE}


def _layer_rows(layers: list[Attention]) -> tuple[dict[str, object], ...]:
    """Those that are not causal first."""
    order = sorted(layers, key=lambda layer: layer.direction == "causal")
    rows: list[dict[str, object]] = [
        {"layer": layer.layer, "sees": layer.direction, "ahead": layer.farthest} for layer in order
    ]
    return tuple(rows[: MOST_ROWS - 3])
