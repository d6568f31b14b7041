"""A member of the lab as a module, so that the checks of any model can be made of it.

Shape key: M member, B batch, T position, S key position, V vocab.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnscope.check.model import check_model
from attnscope.check.result import Checked
from attnscope.config import Config
from attnscope.data import Batch
from attnscope.model import attn_scales, forward, geometry_of

MOST_SEQUENCES = 3  # are enough for every check
# Of the checks, those of masks and leaks; what the others look at is ours, or a matter of the settings, which have rules.
MADE = ("future leak", "padding leak", "batch leak", "masked rows", "softmax axis")


class LabModel(nn.Module):
    """One member's forward pass, (B, T) token ids to (B, T, V) output logits."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], position: int) -> None:
        """`position` is that of the member along the axis M of the weights."""
        super().__init__()
        self._config = config
        self.parameter_of = nn.ParameterDict(
            {name: value[position : position + 1].cpu().float() for name, value in weights.items()}
        )
        self._geometry = geometry_of(config, seq_len=config.model.seq_len, device=torch.device("cpu"))
        self._attn_scale_ML = attn_scales([config])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Output logits; 0 in the mask is padding."""
        logits_MNV = forward(
            dict(self.parameter_of.items()),
            self._config,
            self._geometry,
            input_ids,
            attn_scale_ML=self._attn_scale_ML,
            real_BS=None if attention_mask is None else attention_mask.bool(),
        )
        return logits_MNV[0].unflatten(0, input_ids.shape)


def checks_of(config: Config, weights: Mapping[str, Tensor], position: int, batch: Batch) -> tuple[Checked, ...]:
    """Mask and leak tests of a member; a decoder that predicts the next token is meant to be causal."""
    model = LabModel(config, weights, position)
    given = {"input_ids": batch.tokens_BT[:MOST_SEQUENCES].cpu()}
    if batch.visible_BS is not None:
        given["attention_mask"] = batch.visible_BS[:MOST_SEQUENCES].cpu().long()
    is_causal = config.model.kind == "decoder" and config.data.objective == "next_token"
    checks = check_model(model, given, causal=True if is_causal else None)
    left_out = () if "attention_mask" in given else ("padding leak",)  # there is none that could leak
    return tuple(check for check in checks if check.name in MADE and check.name not in left_out)
