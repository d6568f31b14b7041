"""A model and a batch, and passes of the one through the other that leave nothing behind.

Shape key: B batch, T position, F everything else.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnscope.check.batch import Batch, read_batch, with_input
from attnscope.check.output import described, per_position
from attnscope.check.undisturbed import copied, same_state, seed_all
from attnscope.errors import AttnscopeError, ShapeError

# Of two outputs, relative to the largest: below it, they agree. Measured on CPU: what a causal mask hides changes outputs by
# exactly 0 in float32 and bfloat16 (fused, by hand, linear), and by 2e-7 in a convolution by FFT. One layer of 12 without its
# mask (GPT-2, untrained, 256 positions) changed them by 3e-3 and more, a mask of -10 instead of -inf by 8e-5.
NOISE = 1e-5
SEED = 0

Mode = Literal["evaluation", "training"]
MODES: tuple[Mode, ...] = ("evaluation", "training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is checked.

    Attributes:
        model: in the state in which it was handed over, between passes.
        batch: what it is called with.
        outputs: of the unchanged batch in each mode, (B, T, F); absent where the pass failed.
        again: outputs of the same pass with the same seed, once more.
        problems: why a pass failed, by mode.
    """

    model: nn.Module
    batch: Batch
    outputs: dict[Mode, Tensor]
    again: dict[Mode, Tensor]
    problems: dict[Mode, str]

    @property
    def grid(self) -> tuple[int, int]:
        """Sequences and positions."""
        n_batch, n_positions = self.batch.real_BT.shape
        return n_batch, n_positions

    def noise(self, mode: Mode) -> float:
        """How far two passes with one seed are apart."""
        return float(change_BT(self.outputs[mode], self.again[mode]).max())

    def usable(self, mode: Mode) -> bool:
        """Whether a change of the output can be put down to a change of the input."""
        if mode not in self.outputs or not self.outputs[mode][self.batch.real_BT].isfinite().any():
            return False
        return self.noise(mode) <= NOISE

    def why_unusable(self, mode: Mode) -> str:
        """In words, for a mode that is not usable."""
        if mode in self.problems:
            return self.problems[mode]
        if not self.outputs[mode][self.batch.real_BT].isfinite().any():
            return f"no output is finite in {mode}"
        return f"two passes in {mode} with one seed differ by {self.noise(mode):.3g}"

    def run(self, x: Tensor, mode: Mode, *, seed: int = SEED) -> Tensor:
        """Outputs (B, T, F) for this input, without gradients."""
        with in_mode(self.model, mode, seed=seed), torch.no_grad():
            return rows_of(call(self.model, with_input(self.batch, x)), self.batch)

    def trace(self, x: Tensor, mode: Mode, *, seed: int = SEED) -> list[tuple[str, Tensor]]:
        """Names of modules in the order in which they are done, each with one number per position of its output, (B, T)."""
        found: list[tuple[str, Tensor]] = []
        handles = []
        with in_mode(self.model, mode, seed=seed), torch.no_grad():
            try:
                for name, module in self.model.named_modules():

                    def look(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
                        rows = per_position(out, *self.grid)
                        if rows is not None:
                            weights = torch.arange(1.0, rows.shape[-1] + 1, device=rows.device)
                            found.append((name, (rows.float() * weights.cos()).sum(dim=-1)))

                    handles.append(module.register_forward_hook(look))
                call(self.model, with_input(self.batch, x))
            finally:
                for handle in handles:
                    handle.remove()
        return found


def open_case(model: nn.Module, batch: object) -> Case:
    """Pass the batch through the model twice in each mode.

    Raises:
        ShapeError: no input among the arguments, or no output with a row for each position.
        AttnscopeError: the forward pass in evaluation mode raised an exception.
    """
    read = read_batch(model, batch)
    outputs: dict[Mode, Tensor] = {}
    again: dict[Mode, Tensor] = {}
    problems: dict[Mode, str] = {}
    for mode in MODES:
        try:
            for found in (outputs, again):
                with in_mode(model, mode, seed=SEED), torch.no_grad():
                    found[mode] = rows_of(call(model, read), read)
        except AttnscopeError as error:
            if mode == "evaluation":
                raise
            outputs.pop(mode, None)
            problems[mode] = str(error)
    return Case(model=model, batch=read, outputs=outputs, again=again, problems=problems)


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


def call(model: nn.Module, batch: Batch, *, copy: bool = True) -> Any:
    """Call the model with a copy of the batch, or with the batch itself, whose input carries a gradient.

    Raises:
        AttnscopeError: it raised an exception.
    """
    args, kwargs = (
        (copied(batch.args), copied(batch.kwargs)) if copy else (batch.args, batch.kwargs)
    )
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise AttnscopeError(
            f"the forward pass of {type(model).__name__} raised {raised(error)}. Make model(batch) work by itself first."
        ) from error


def rows_of(output: Any, batch: Batch) -> Tensor:
    """The output as (B, T, F), at least float32.

    Raises:
        ShapeError: it has no row for each position.
    """
    n_batch, n_positions = batch.real_BT.shape
    rows = per_position(output, n_batch, n_positions)
    if rows is None:
        raise ShapeError(
            f"the model returned {described(output)}, but no floating tensor ({n_batch}, {n_positions}, ...) with a row for each "
            f"position of {batch.input_name} {tuple(batch.input.shape)}. Give it the arguments with which it returns all "
            "positions (nanoGPT: targets too; an encoder-decoder: decoder_input_ids)."
        )
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows.clone()


def raised(error: BaseException) -> str:
    """An exception in one line: what and where."""
    text = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    frames = [
        each
        for each in traceback.extract_tb(error.__traceback__)
        if not each.filename.startswith((_OURS, "<"))
    ]
    theirs = [each for each in frames if "site-packages" not in each.filename] or frames
    if not theirs:
        return message
    return f"{message} ({theirs[-1].filename.rpartition('/')[2]}, line {theirs[-1].lineno})"


def change_BT(before: Tensor, after: Tensor) -> Tensor:
    """How far outputs (B, T, F) are apart at each position, relative to the largest number in the first, (B, T).

    NaN equals NaN; where only one is finite they are infinitely far apart.
    """
    finite = before.isfinite() & after.isfinite()
    same = (before == after) | (before.isnan() & after.isnan())
    apart = (before - after).abs().where(finite, torch.inf).masked_fill(same, 0.0)
    size = before.abs().where(before.isfinite(), 0.0).max()
    return (apart / size).nan_to_num(0.0, posinf=torch.inf).amax(dim=-1)


def first_changed(
    before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], where_BT: Tensor
) -> str | None:
    """The first module whose output changes at these positions; None where no module has an output of its own there."""
    for (name, one_BT), (other, two_BT) in zip(before, after, strict=False):
        if name != other:
            return None
        if name and (change_BT(one_BT[..., None], two_BT[..., None])[where_BT] > NOISE).any():
            return name
    return None


_OURS = __file__.rpartition("check/")[0]
