"""A model and a batch, and passes of the one through the other that leave nothing behind.

Shape key: B batch, T position, P rows of a sequence in the output (T, or 1), F everything else.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnscope.check.batch import CallBatch, read_batch
from attnscope.check.output import KINDS, OutputKind, described, rows_in
from attnscope.check.undisturbed import copied, same_state, seed_all
from attnscope.errors import AttnscopeError, ShapeError, error_in_a_line

# Of two outputs, relative to the largest: below it, they agree. Measured on CPU: what a causal mask hides changes outputs by
# exactly 0 in float32 and bfloat16 (fused, by hand, linear), and by 2e-7 in a convolution by FFT. One layer of 12 without its
# mask (GPT-2, untrained, 256 positions) changed them by 3e-3 and more, a mask of -10 instead of -inf by 8e-5.
NOISE = 1e-5
SEED = 0
# Layers that take statistics of the batch in training, and others in evaluation.
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

Mode = Literal["evaluation", "training"]
MODES: tuple[Mode, ...] = ("evaluation", "training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is checked.

    Attributes:
        model: in the state in which it was handed over, between passes.
        batch: what it is called with.
        kind: what the rows of its output are.
        outputs: of the unchanged batch in each mode, (B, P, F), of a whole (1, 1, F); absent where the pass failed.
        again: outputs of the same pass with the same seed, once more.
        problems: why a pass failed, by mode.
    """

    model: nn.Module
    batch: CallBatch
    kind: OutputKind
    outputs: dict[Mode, Tensor]
    again: dict[Mode, Tensor]
    problems: dict[Mode, str]

    @property
    def grid(self) -> tuple[int, int | None]:
        """Sequences and positions."""
        return len(self.batch.real_BT), self.batch.n_positions

    def watched(self, where_BT: Tensor) -> Tensor:
        """The rows of the output that belong to these positions, (B, P), or (1, 1) of a whole."""
        if self.kind == "positions":
            return where_BT
        where_B1 = where_BT.any(dim=1, keepdim=True)
        return where_B1 if self.kind == "sequences" else where_B1.any(dim=0, keepdim=True)

    def finite(self, mode: Mode) -> bool:
        """Whether there is a finite number in the rows of positions that are not padded."""
        return bool(self.outputs[mode][self.watched(self.batch.real_BT)].isfinite().any())

    def noise(self, mode: Mode) -> float:
        """How far two passes with one seed are apart."""
        return float(change_BP(self.outputs[mode], self.again[mode]).max())

    def usable(self, mode: Mode) -> bool:
        """Whether a change of the output can be put down to a change of the input."""
        return mode in self.outputs and self.finite(mode) and self.noise(mode) <= NOISE

    def why_unusable(self, mode: Mode) -> str:
        """In words, for a mode that is not usable."""
        if mode in self.problems:
            return self.problems[mode].rstrip(".")
        if not self.finite(mode):
            return f"no output is finite in {mode}"
        return f"two passes in {mode} with one seed differ by {self.noise(mode):.3g}"

    def run(self, batch: CallBatch, mode: Mode, *, seed: int = SEED) -> Tensor:
        """Outputs (B, P, F) for this batch, without gradients."""
        with in_mode(self.model, mode, seed=seed), torch.no_grad():
            return rows_of(call(self.model, batch), self.batch, self.kind)

    def trace(self, batch: CallBatch, mode: Mode, *, seed: int = SEED, sequences: bool = False) -> "Trace":
        """Names of modules in the order in which they are done, each with one number per row of its output.

        Args:
            batch: goes in.
            mode: of the model.
            seed: of random numbers.
            sequences: whether one number for each sequence will do, of modules without positions; else only pooled outputs
                (B, F) have one.
        """
        trace: Trace = []
        handles = []
        with in_mode(self.model, mode, seed=seed), torch.no_grad():
            try:
                for name, module in self.model.named_modules():

                    def look(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
                        rows = _rows(out, self.batch, "positions")
                        is_pooled = isinstance(out, Tensor) and out.dim() == 2
                        if rows is None and (sequences or is_pooled):
                            rows = _rows(out, self.batch, "sequences")
                        if rows is not None:
                            weights = torch.arange(1.0, rows.shape[-1] + 1, device=rows.device)
                            trace.append((name, (rows.float() * weights.cos()).sum(dim=-1)))

                    handles.append(module.register_forward_hook(look))
                call(self.model, batch)
            finally:
                for handle in handles:
                    handle.remove()
        return trace


# A module, and one number for each position (B, T), or for each sequence (B, 1).
Trace = list[tuple[str, Tensor]]


def open_case(model: nn.Module, batch: object, *, time_first: bool = False) -> Case:
    """Pass the batch through the model twice in each mode.

    Raises:
        ShapeError: no input among the arguments, or no floating tensor in the output.
        AttnscopeError: the forward pass in evaluation mode raised an exception.
    """
    read = read_batch(model, batch, time_first=time_first)
    kind: OutputKind | None = None
    outputs: dict[Mode, Tensor] = {}
    again: dict[Mode, Tensor] = {}
    problems: dict[Mode, str] = {}
    for mode in MODES:
        try:
            for kept in (outputs, again):
                with in_mode(model, mode, seed=SEED), torch.no_grad():
                    output = call(model, read)
                    kind = kind or next((k for k in KINDS if _rows(output, read, k) is not None), None)
                    kept[mode] = rows_of(output, read, kind)
            if outputs[mode].shape != outputs["evaluation"].shape:
                raise ShapeError(f"the output in {mode} has other rows than in evaluation")
        except AttnscopeError as error:
            if mode == "evaluation":
                raise
            outputs.pop(mode, None)
            problems[mode] = str(error)
    assert kind is not None
    return Case(model=model, batch=read, kind=kind, outputs=outputs, again=again, problems=problems)


@contextmanager
def in_mode(model: nn.Module, mode: Mode, *, seed: int) -> Iterator[None]:
    """Seeded, in this mode, with everything put back afterwards.

    A model that is in training already keeps the parts that its owner has put into evaluation.
    """
    with same_state(model):
        if mode == "evaluation":
            model.eval()
        elif not model.training:
            model.train()
        seed_all(seed)
        yield


def call(model: nn.Module, batch: CallBatch, *, keep: Tensor | None = None) -> Any:
    """Call the model with a copy of the batch, but for the tensor to keep, which carries a gradient.

    Raises:
        AttnscopeError: it raised an exception.
    """
    args, kwargs = copied(batch.args, keep), copied(batch.kwargs, keep)
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise AttnscopeError(
            f"the forward pass of {type(model).__name__} raised {raised(error)}. Make model(batch) work by itself first."
        ) from error


def rows_of(output: Any, batch: CallBatch, kind: OutputKind | None) -> Tensor:
    """The output as (B, P, F), at least float32.

    Raises:
        ShapeError: it has no rows of this kind.
    """
    rows = None if kind is None else _rows(output, batch, kind)
    if rows is None:
        wanted = "" if kind in (None, "whole") else f" with a row for each of its {kind}"
        raise ShapeError(f"the model returned {described(output)}, but no floating tensor{wanted}.")
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows.clone()


def _rows(output: Any, batch: CallBatch, kind: OutputKind) -> Tensor | None:
    """As `rows_in`, of a model that has its axes in the order of the batch."""
    n_batch, n_positions = len(batch.real_BT), batch.n_positions
    if batch.time_first and kind == "positions" and n_positions is not None:
        rows = rows_in(output, n_positions, n_batch, kind)
        return None if rows is None else rows.transpose(0, 1)
    return rows_in(output, n_batch, n_positions, kind)


def raised(error: BaseException) -> str:
    """An exception in one line: what and where."""
    message = error_in_a_line(error)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((_OURS, "<"))
    ]
    theirs = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    if not theirs:
        return message
    return f"{message} ({theirs[-1].filename.rpartition('/')[2]}, line {theirs[-1].lineno})"


def change_BP(before: Tensor, after: Tensor) -> Tensor:
    """How far outputs (B, P, F) are apart in each row, relative to the largest number in the first, (B, P).

    NaN equals NaN; where only one is finite they are infinitely far apart.
    """
    finite = before.isfinite() & after.isfinite()
    same = (before == after) | (before.isnan() & after.isnan())
    apart = (before - after).abs().where(finite, torch.inf).masked_fill(same, 0.0)
    size = before.abs().where(before.isfinite(), 0.0).max()
    return (apart / size).nan_to_num(0.0, posinf=torch.inf).amax(dim=-1)


def first_changed(before: Trace, after: Trace, where_BT: Tensor) -> str | None:
    """The first module whose output changes at these positions; None where no module has an output of its own there."""
    where_B1 = where_BT.any(dim=1, keepdim=True)
    masks = {where_B1.shape: where_B1, where_BT.shape: where_BT}
    for (name, one), (other, two) in zip(before, after, strict=False):
        if name != other or one.shape != two.shape:
            return None
        if name and (change_BP(one[..., None], two[..., None])[masks[one.shape]] > NOISE).any():
            return name
    return None


_OURS = __file__.rpartition("check/")[0]
