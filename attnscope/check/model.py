"""`check_model`: every check on one model and one batch."""

import torch
from torch import nn

from attnscope.capture.names import unwrapped
from attnscope.check.attention import Observed, look
from attnscope.check.batch import with_input
from attnscope.check.case import NOISE, Case, change_BP, open_case
from attnscope.check.dtypes import dtypes, registered_layers
from attnscope.check.eager import eagerly
from attnscope.check.future import future_leak
from attnscope.check.leaks import batch_leak, padding_leak
from attnscope.check.masks import masked_rows, softmax_axis
from attnscope.check.modes import training_and_evaluation
from attnscope.check.output import KINDS
from attnscope.check.repeats import dropout_in_evaluation, repeatable_training
from attnscope.check.result import Checked
from attnscope.check.scale import attention_scale
from attnscope.check.shapes import head_shapes
from attnscope.check.undisturbed import undisturbed
from attnscope.errors import ShapeError

# Each is check(case, observed); before them stands future_leak, which is told what the model is meant to be.
CHECKS = (
    padding_leak,
    batch_leak,
    dropout_in_evaluation,
    repeatable_training,
    training_and_evaluation,
    masked_rows,
    softmax_axis,
    attention_scale,
    head_shapes,
    registered_layers,
    dtypes,
)


def check_model(model: nn.Module, batch: object, *, causal: bool | None = None) -> tuple[Checked, ...]:
    """Check a model for leaks, broken masks, wrong scales and passes that cannot be repeated.

    The model is called some fifty times, and is left exactly as it was, as are random numbers. It takes a copy of the
    weights. What a model keeps outside of its modules (a file, a global variable) is its own affair.

    Args:
        model: any module, on any device, in training or evaluation mode.
        batch: token ids (B, T), floats (B, T, D), images, a tuple of positional arguments, or a dict of keyword arguments
            (input_ids, attention_mask, labels). Checks that need what the output has not (positions) are not made. With two sequences or more, of which one is padded, every check applies.
        causal: whether the model is meant to be causal. None = say what it is; only sight of part of the future fails.

    Returns:
        One result per check, in a fixed order.

    Raises:
        ShapeError: no input in the batch, or no floating tensor in the output.
        AttnscopeError: the forward pass raised an exception.
    """
    if not isinstance(model, nn.Module):
        raise ShapeError(f"model: is a {type(model).__name__}, but must be a torch.nn.Module.")
    model = unwrapped(model)
    with eagerly(model), undisturbed(model):
        case, observed = _opened(model, batch)
        with torch.no_grad():
            first = future_leak(case, observed, causal=causal)
            return (first, *(check(case, observed) for check in CHECKS))


def _opened(model: nn.Module, batch: object) -> tuple[Case, Observed]:
    """The case, with positions on the first axis of the input where the model treats them so."""
    case = open_case(model, batch)
    observed = look(case)
    over_batch = {call.over_batch for call in observed.calls} - {None}
    if over_batch:
        other = open_case(model, batch, time_first=True)
        # Nobody hides later sequences of a batch from earlier ones: an axis with a causal mask is that of positions.
        if "causal" in over_batch or _fits_better(case, other):
            return other, look(other)
    return case, observed


def _fits_better(case: Case, other: Case) -> bool:
    """Whether the axes are told by the output, or because sequences can change places and positions cannot."""
    if other.kind != case.kind or case.kind != "positions":
        return KINDS.index(other.kind) < KINDS.index(case.kind)
    return _can_change_places(other) and not _can_change_places(case)


def _can_change_places(case: Case) -> bool:
    """Whether sequences in another order give the same outputs in that order."""
    if not case.usable("evaluation"):
        return False
    after = case.run(with_input(case.batch, case.batch.input.roll(1, 0)), "evaluation")
    return float(change_BP(case.outputs["evaluation"].roll(1, 0), after).max()) <= NOISE
