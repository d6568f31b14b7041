"""Which positions of an input are padding, as the other arguments of the call say.

Shape key: B batch, T position.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Arguments (B, T) that mark padding, and whether True or 1 marks what is hidden; None = models do not agree.
MASKS: dict[str, bool | None] = {
    "decoder_attention_mask": False, "attention_mask": False, "attn_mask": None, "mask": None, "padding_mask": None,
    "pad_mask": None, "tgt_key_padding_mask": True, "src_key_padding_mask": True, "key_padding_mask": True,
}  # fmt: skip
LENGTHS = ("lengths", "length", "lens", "seq_lens", "seqlens", "seq_lengths", "input_lengths", "valid_lens")  # (B,)
# Of a decoder; those of its encoder say nothing about its positions.
DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "tgt")
DECODER_MASKS = ("decoder_attention_mask", "tgt_key_padding_mask")


def padding_of(name: str, x: Tensor, given: Mapping[str, Any]) -> tuple[str | None, Tensor]:
    """The argument that marks padding of the input `x` called `name` (None = there is none), and False where it is padding."""
    for mask_name, marks_hidden in MASKS.items():
        mask = given.get(mask_name)
        is_of_decoder = mask_name in DECODER_MASKS
        if (name in DECODER) == is_of_decoder and _is_mask(mask_name, mask, x):
            assert isinstance(mask, Tensor)
            return mask_name, _real(mask, x, marks_hidden).to(x.device)
    everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for lengths_name in LENGTHS if name not in DECODER else ():
        lengths = given.get(lengths_name)
        if _are_lengths(lengths, x):
            assert isinstance(lengths, Tensor)
            at_T = torch.arange(x.shape[1], device=x.device)
            return lengths_name, at_T < lengths.to(x.device)[:, None]
    return None, everything


def is_of_other_axes(x: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether a padding mask is (B, T) for an input (T, B, ...), as nn.Transformer takes them without batch_first."""
    flipped = (x.shape[1], x.shape[0])
    masks = (given.get(name) for name in MASKS if name.endswith("key_padding_mask"))
    return flipped != x.shape[:2] and any(isinstance(mask, Tensor) and tuple(mask.shape) == flipped for mask in masks)


def _real(mask: Tensor, x: Tensor, marks_hidden: bool | None) -> Tensor:
    if mask.is_floating_point() and (mask < 0).any():  # added to logits
        return mask > -1
    marked = mask > 0.5 if mask.is_floating_point() else mask != 0
    if marks_hidden is None:
        marks_hidden = _marks_hidden(marked, x)
    return ~marked if marks_hidden else marked


def _marks_hidden(marked_BT: Tensor, x: Tensor) -> bool:
    """Where models do not agree: padding stands at an end of a sequence, and holds the same everywhere."""
    if marked_BT.all() or not marked_BT.any():
        return not marked_BT.any()
    fits = [_looks_like_padding(hidden_BT, x) for hidden_BT in (~marked_BT, marked_BT)]
    return fits == [False, True]


def _looks_like_padding(hidden_BT: Tensor, x: Tensor) -> bool:
    if hidden_BT.all(dim=1).any():  # a sequence of nothing else
        return False
    steps_BT = hidden_BT[:, 1:].int() - hidden_BT[:, :-1].int()
    if (steps_BT.abs().sum(dim=1) > 1).any():
        return False
    return x.is_floating_point() or len(x[hidden_BT].unique()) <= 1


def _is_mask(name: str, mask: object, x: Tensor) -> bool:
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2] or mask.is_complex():
        return False
    # Of equal axes, these names may mean (T, T): who sees whom.
    return name not in ("mask", "attn_mask") or mask.shape[0] != mask.shape[1]


def _are_lengths(lengths: object, x: Tensor) -> bool:
    return (
        isinstance(lengths, Tensor)
        and tuple(lengths.shape) == (len(x),)
        and not lengths.is_floating_point()
        and lengths.dtype != torch.bool
        and bool((lengths >= 1).all() and (lengths <= x.shape[1]).all())
    )
