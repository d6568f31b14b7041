"""A batch as a model is called with it: which argument holds the positions, which of them are padding, and other values.

Shape key: B batch, T position, D features.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.errors import ShapeError

# Arguments that hold the positions whose outputs are looked at: those of a decoder before those of its encoder.
INPUTS = (
    "decoder_input_ids", "decoder_inputs_embeds", "tgt", "input_ids", "inputs_embeds", "src", "x", "idx", "tokens", "input",
    "inputs", "query",
)  # fmt: skip
# Arguments (B, T) that mark padding, and whether True or 1 marks what is hidden.
MASKS = {
    "decoder_attention_mask": False, "attention_mask": False, "attn_mask": False, "mask": False, "padding_mask": True,
    "tgt_key_padding_mask": True, "src_key_padding_mask": True, "key_padding_mask": True,
}  # fmt: skip
# Of a decoder; those of its encoder say nothing about its positions.
DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "tgt")
DECODER_MASKS = ("decoder_attention_mask", "tgt_key_padding_mask")
OTHERS = ("labels", "position_ids", "token_type_ids", "targets", "target", *MASKS)  # no inputs
FORMS = "token ids (B, T), floats (B, T, D), a tuple of arguments, or a dict of keyword arguments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The arguments of a call.

    Attributes:
        args: positional.
        kwargs: by keyword.
        at: index in `args` or key in `kwargs` of the input: token ids (B, T) or floats (B, T, D).
        input_name: of that argument.
        real_BT: False where the input is padding; all True without a mask.
        mask_name: the argument that marks padding; None = there is none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int | str
    input_name: str
    real_BT: Tensor
    mask_name: str | None

    @property
    def input(self) -> Tensor:
        """Token ids (B, T), or floats (B, T, D)."""
        found = self.args[self.at] if isinstance(self.at, int) else self.kwargs[self.at]
        assert isinstance(found, Tensor)
        return found

    @property
    def has_ids(self) -> bool:
        """Whether the input is token ids."""
        return not self.input.is_floating_point()


def read_batch(model: nn.Module, batch: object) -> Batch:
    """Find the input and the mask among the arguments.

    Raises:
        ShapeError: there is no input among them.
    """
    args, kwargs = _arguments(batch)
    named = _named(model, args, kwargs)
    inputs = {name: at for name, at, x in named if _is_input(name, x)}
    if not inputs:
        held = ", ".join(f"{name} {_kind(x)}" for name, _, x in named) or "nothing"
        raise ShapeError(f"batch: holds {held}, but no input. Give {FORMS}.")
    name = next((each for each in INPUTS if each in inputs), next(iter(inputs)))
    x = next(x for each, _, x in named if each == name)
    n_batch, n_positions = x.shape[:2]
    read = Batch(
        args=args,
        kwargs=kwargs,
        at=inputs[name],
        input_name=name,
        real_BT=torch.ones(n_batch, n_positions, dtype=torch.bool, device=x.device),
        mask_name=None,
    )
    given = {each: value for each, _, value in named}
    read = _with_mask(read, given, x)
    if read.has_ids and len(known_ids(read)) < 2:
        raise ShapeError(
            f"batch: {name} {tuple(x.shape)} does not hold two different token ids, so that none can be changed. Give real or "
            "random tokens."
        )
    return read


def _with_mask(read: Batch, given: dict[str, Any], x: Tensor) -> Batch:
    for mask_name, marks_hidden in MASKS.items():
        mask: Any = given.get(mask_name)
        if (read.input_name in DECODER) != (mask_name in DECODER_MASKS) or not _is_mask(
            mask_name, mask, x
        ):
            continue
        if mask.is_floating_point():
            real: Tensor = mask > -1 if marks_hidden else mask > 0.5  # added to logits, or 1 = real
        else:
            real = mask == 0 if marks_hidden else mask != 0
        return replace(read, real_BT=real.to(x.device), mask_name=mask_name)
    return read


def with_input(batch: Batch, x: Tensor) -> Batch:
    """The batch with this input in place of its own."""
    if isinstance(batch.at, int):
        args = (*batch.args[: batch.at], x, *batch.args[batch.at + 1 :])
        return replace(batch, args=args)
    return replace(batch, kwargs={**batch.kwargs, batch.at: x})


def changed_at(batch: Batch, where_BT: Tensor, seed: int = 0) -> Tensor:
    """The input with other values where `where_BT` is True: other token ids of the same batch, or other floats.

    Ids come from the positions that are no padding, so that they are known to be valid.
    """
    x = batch.input
    generator = torch.Generator().manual_seed(seed)
    if not batch.has_ids:
        spread = x.detach().float().std().nan_to_num(0.0).item() or 1.0
        noise = torch.randn(x.shape, generator=generator) * spread
        where = where_BT.reshape(*where_BT.shape, *[1] * (x.dim() - 2))
        return torch.where(where, x + noise.to(x), x)
    pool = known_ids(batch).cpu()
    drawn = torch.randint(len(pool), x.shape, generator=generator)
    drawn = torch.where(pool[drawn] == x.cpu(), (drawn + 1) % len(pool), drawn)
    return torch.where(where_BT, pool[drawn].to(x), x)


def known_ids(batch: Batch) -> Tensor:
    """Different token ids of the batch outside of its padding."""
    return batch.input[batch.real_BT].unique()


def _arguments(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise ShapeError(f"batch: is a {type(batch).__name__}. Give {FORMS}.")


def _named(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, int | str, Any]]:
    """Name, place and value of every argument; positional ones are named as `forward` names them."""
    try:
        names = [
            each.name
            for each in inspect.signature(model.forward).parameters.values()
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        names = []
    names += [f"argument {number}" for number in range(len(names), len(args))]
    positional = [(names[at], at, value) for at, value in enumerate(args)]
    return [*positional, *((name, name, value) for name, value in kwargs.items())]


def _is_input(name: str, x: object) -> bool:
    if not isinstance(x, Tensor) or name in OTHERS or x.dtype == torch.bool or x.is_complex():
        return False
    return x.dim() >= 3 if x.is_floating_point() else x.dim() == 2


def _is_mask(name: str, mask: object, x: Tensor) -> bool:
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        return False
    # Of equal axes, these names may mean (T, T): who sees whom.
    return name not in ("mask", "attn_mask") or mask.shape[0] != mask.shape[1]


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    return type(x).__name__
