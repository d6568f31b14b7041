"""A batch as a model is called with it: which argument holds the positions, which of them are padding, and other values.

Shape key: B batch, T position, D features.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.check.padding import DECODER, LENGTHS, MASKS, is_of_other_axes, padding_of
from attnscope.errors import ShapeError

# Inputs without an axis of positions, whatever their axes are.
PICTURES = (
    "pixel_values", "images", "image", "img", "pixels", "input_features", "input_values", "audio", "waveform",
)  # fmt: skip
# Arguments that hold the positions whose outputs are looked at: those of a decoder before those of its encoder.
INPUTS = (
    *DECODER, "input_ids", "inputs_embeds", "src", "x", "idx", "tokens", "input", "inputs", "query", *PICTURES
)  # fmt: skip
OTHERS = ("labels", "position_ids", "token_type_ids", "targets", "target", "y", *MASKS, *LENGTHS)  # no inputs
FORMS = "token ids (B, T), floats (B, T, D), a tuple of arguments, or a dict of keyword arguments"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBatch:
    """A batch as the arguments of a call of the model.

    Attributes:
        args: positional.
        kwargs: by keyword.
        at: index in `args` or key in `kwargs` of the input.
        input_name: of that argument.
        has_positions: whether the input has an axis of positions; an image has none.
        time_first: whether that axis comes before that of sequences.
        real_BT: False where the input is padding; all True without a mask; (B, 1) of an input without positions.
        mask_name: the argument that marks padding; None = there is none.
        source: of an encoder-decoder, the same arguments with the input of the encoder.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int | str
    input_name: str
    has_positions: bool
    time_first: bool
    real_BT: Tensor
    mask_name: str | None
    source: "CallBatch | None"

    @property
    def raw(self) -> Tensor:
        """The input as it stands among the arguments."""
        x = self.args[self.at] if isinstance(self.at, int) else self.kwargs[self.at]
        assert isinstance(x, Tensor)
        return x

    @property
    def input(self) -> Tensor:
        """Token ids (B, T), floats (B, T, D), or anything (B, ...) without positions."""
        return self.raw.transpose(0, 1) if self.time_first else self.raw

    @property
    def has_ids(self) -> bool:
        """Whether the input is token ids."""
        return not self.raw.is_floating_point()

    @property
    def n_positions(self) -> int | None:
        """T; None where the input has no positions."""
        return self.real_BT.shape[1] if self.has_positions else None


def read_batch(model: nn.Module, batch: object, *, time_first: bool = False) -> CallBatch:
    """Find the input and the mask among the arguments.

    Args:
        model: whose `forward` names positional arguments.
        batch: whatever it is called with.
        time_first: the input is (T, B, ...); a padding mask of such axes says the same.

    Raises:
        ShapeError: there is no input among them.
    """
    args, kwargs = _arguments(batch)
    named = _named(model, args, kwargs)
    given = {name: value for name, _, value in named}
    at_of = {name: at for name, at, x in named if _is_input(name, x)}
    if not at_of:
        held = ", ".join(f"{name} {_kind(x)}" for name, _, x in named) or "nothing"
        raise ShapeError(f"batch: holds {held}, but no input. Give {FORMS}.")
    order = sorted(at_of, key=lambda name: _rank(name, given[name]))

    def read(name: str, source: CallBatch | None) -> CallBatch:
        x = given[name]
        has_positions = _has_positions(name, x)
        is_flipped = has_positions and (time_first or is_of_other_axes(x, given))
        x = x.transpose(0, 1) if is_flipped else x
        mask_name, real = None, torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        if has_positions:
            mask_name, real = padding_of(name, x, given)
        return CallBatch(
            args=args,
            kwargs=kwargs,
            at=at_of[name],
            input_name=name,
            has_positions=has_positions,
            time_first=is_flipped,
            real_BT=real,
            mask_name=mask_name,
            source=source,
        )

    name = order[0]
    sources = [source for source in order if source not in DECODER and name in DECODER]
    call_batch = read(name, read(sources[0], None) if sources else None)
    if call_batch.has_ids and len(known_ids(call_batch)) < 2:
        raise ShapeError(
            f"batch: {name} {tuple(call_batch.raw.shape)} does not hold two different token ids, so that none can be changed. Give "
            "real or random tokens."
        )
    return call_batch


def with_input(batch: CallBatch, x: Tensor) -> CallBatch:
    """The batch with this input in place of its own."""
    x = x.transpose(0, 1) if batch.time_first else x
    if isinstance(batch.at, int):
        args = (*batch.args[: batch.at], x, *batch.args[batch.at + 1 :])
        return replace(batch, args=args)
    return replace(batch, kwargs={**batch.kwargs, batch.at: x})


def changed_at(batch: CallBatch, where_BT: Tensor, seed: int = 0) -> CallBatch:
    """The batch with other values where `where_BT` is True: other token ids of the same batch, or other floats.

    Ids come from the positions that are no padding, so that they are known to be valid.
    """
    x = batch.input
    generator = torch.Generator().manual_seed(seed)
    known = where_BT.shape if batch.has_positions else (len(x),)
    where = where_BT.reshape(*known, *[1] * (x.dim() - len(known)))
    if not batch.has_ids:
        spread = x.detach().float().std().nan_to_num(0.0).item() or 1.0
        noise = torch.randn(x.shape, generator=generator) * spread
        return with_input(batch, torch.where(where, x + noise.to(x), x))
    pool = known_ids(batch).cpu()
    drawn = torch.randint(len(pool), x.shape, generator=generator)
    drawn = torch.where(pool[drawn] == x.cpu(), (drawn + 1) % len(pool), drawn)
    return with_input(batch, torch.where(where, pool[drawn].to(x), x))


def known_ids(batch: CallBatch) -> Tensor:
    """Different token ids of the batch outside of its padding."""
    return (batch.input[batch.real_BT] if batch.has_positions else batch.input).unique()


def _arguments(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise ShapeError(f"batch: is a {type(batch).__name__}. Give {FORMS}.")


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, int | str, Any]]:
    """Name, index or key, and value of every argument; positional ones are named as `forward` names them."""
    try:
        names = [
            parameter.name
            for parameter in inspect.signature(model.forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        names = []
    names += [f"argument {number}" for number in range(len(names), len(args))]
    positional = [(names[at], at, value) for at, value in enumerate(args)]
    return [*positional, *((name, name, value) for name, value in kwargs.items())]


def _is_input(name: str, x: object) -> bool:
    if not isinstance(x, Tensor) or name in OTHERS or x.dtype == torch.bool or x.is_complex():
        return False
    return x.dim() >= 2 and x.numel() > 0


def _rank(name: str, x: Tensor) -> tuple[int, int]:
    """Known names first, then what looks most like tokens or their vectors."""
    known = INPUTS.index(name) if name in INPUTS else len(INPUTS)
    return known, int(x.dim() != (3 if x.is_floating_point() else 2))


def _has_positions(name: str, x: Tensor) -> bool:
    if name in PICTURES:
        return False
    return x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    return type(x).__name__
