"""From tensors on the device to rows on disk, a block of steps at a time.

A step only reduces what passes by, while it is in the cache, and nothing waits for it. What follows from the reductions
is computed for a whole block at once, and `flush` brings the block to the host in one copy per table.

Shape key: S steps of a block, C column, M member, L layer, H head, G group, D d_model, K d_head, E heads × d_head.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from attnscope.config import Config
from attnscope.data import Batch
from attnscope.metrics.activations import SEQUENCES, activation_rms, token_cosine, token_norms, token_total
from attnscope.metrics.attention import statistics_of, statistics_of_all
from attnscope.metrics.form import form_update_ratio
from attnscope.metrics.gradients import (
    PARAMETER_STATISTICS,
    Grouping,
    Sheet,
    global_norm,
    group_norms,
    parameter_stats,
)
from attnscope.metrics.loss import TokenLosses, output_logit_max
from attnscope.metrics.rows import SAMPLES, Rows, Shelf, sample_rows
from attnscope.metrics.totals import HEAD_COLUMNS
from attnscope.model import QKV, AttentionInputs
from attnscope.runs.streams import Array
from attnscope.train.block import Block, tables_of
from attnscope.train.step import Clipped, attention_call

# The columns of the steps table that come from the device, in the order of `Recorder._on_host`.
STEP_COLUMNS = (
    "loss",
    "log_z",
    "output_logit_max",
    "token_cosine",
    "activation_rms_max",
    "grad_norm",
    "clip_factor",
    "lr",
    "loss_scale",
    "val_loss",
)
LAYER_COLUMNS = ("activation_rms", "token_cosine")

BLOCK_BYTES = 64 << 20  # of sampled queries and keys that wait for the end of their block

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class StepSeen:
    """What was seen of one step: reductions only; what follows from them is computed once per block.

    Attributes:
        step: updates done before it.
        measures: whether heads and parameters are looked at.
        real_BS: False on padding; None where there is none.
        sample: the query rows to look at; None = all.
    """

    step: int
    measures: bool
    real_BS: Tensor | None
    sample: Rows | None
    stats: list[dict[str, Tensor]] = field(default_factory=list)
    token_norm_MN: list[Tensor] = field(default_factory=list)
    streams_MND: list[Tensor] = field(default_factory=list)
    token_total_LMBD: Tensor | None = None
    forward_M: list[Tensor] = field(default_factory=list)
    clip: Clipped | None = None
    grad_norm_M: Tensor | None = None
    reductions_RX: Tensor | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    nonfinite: dict[str, Tensor] = field(default_factory=dict)
    form_ratio_MLH: Tensor | None = None
    val_loss_M: Tensor | None = None
    step_ms: float = 0.0


class Recorder:
    """The observer of a training step; holds the block that is not on disk yet.

    Invariants: a block has whole steps only, however a step was broken off. Every tensor of a block has the same
    member axis, so `flush` comes before members leave.
    """

    def __init__(self, config: Config) -> None:
        self._record = config.record
        self._n_layers = config.model.n_layers
        self._seq_len = config.model.seq_len
        self._n_compared = min(config.data.batch_size, SEQUENCES) * config.model.seq_len
        self._d_model = config.model.d_model
        self._d_head = config.d_head
        self._tokens_per_step = config.data.batch_size * config.model.seq_len
        self._last = time.perf_counter()
        self._block: list[StepSeen] = []
        self._block_ms = 0.0
        self._shelf = Shelf()
        self._sheet: Sheet | None = None
        if config.train.compile:  # what looks at a graph is no part of it
            self.attention = torch.compiler.disable(self.attention)  # type: ignore[method-assign]
            self.residual = torch.compiler.disable(self.residual)  # type: ignore[method-assign]

    def begin(self, step: int, batch: Batch, grouping: Grouping) -> None:
        """The next step starts: choose the rows to look at."""
        self._grouping = grouping
        n_batch, seq_len = batch.tokens_BT.shape
        rows = self._record.rows
        self._now = StepSeen(
            step=step,
            measures=step % self._record.every == 0,
            real_BS=batch.visible_BS,
            sample=(
                None
                if isinstance(rows, str)
                else sample_rows(
                    n_batch=n_batch,
                    n_queries=seq_len,
                    rows=rows,
                    seed=step % SAMPLES,
                    device=batch.tokens_BT.device,
                )
            ),
        )

    def attention(self, layer: int, inputs: AttentionInputs) -> None:
        """Cut the sampled rows out of a layer's attention."""
        if not self._now.measures:
            return
        call = attention_call(inputs, self._now.real_BS)
        if self._now.sample is None:
            self._now.stats.append(statistics_of_all(call))
        else:
            self._shelf.put(call, self._now.sample)

    def residual(self, layer: int, x_MND: Tensor) -> None:
        """Size of the residual stream after a layer, and how alike its tokens are."""
        x_MND = x_MND.detach()
        self._now.token_norm_MN.append(token_norms(x_MND))
        if self._now.measures or layer == self._n_layers - 1:
            self._now.streams_MND.append(x_MND[:, : self._n_compared])

    def output(self, output_logits_MNV: Tensor, losses: TokenLosses) -> None:
        """What the forward pass alone decides."""
        self._compare_tokens()
        self._now.forward_M = [losses.loss_M.detach(), losses.log_z_M.detach(), output_logit_max(output_logits_MNV)]

    def _compare_tokens(self) -> None:
        """All layers at once: four small operations instead of four per layer."""
        now = self._now
        x_LMND = torch.stack(now.streams_MND)
        norm_LMN = torch.stack(now.token_norm_MN[-len(x_LMND) :])[..., : self._n_compared]
        now.token_total_LMBD = token_total(x_LMND, norm_LMN, seq_len=self._seq_len)
        now.streams_MND = []

    def gradients(self, gradients: Mapping[str, Tensor], clip: Clipped) -> None:
        """What clipping did; the norm of gradients, where no parameter will be measured."""
        self._now.clip = clip
        if self._now.measures:
            self._now.gradients = gradients
            if self._sheet is None:
                self._sheet = Sheet(gradients, self._grouping)
        else:
            self._now.grad_norm_M = global_norm(group_norms(gradients, self._grouping))

    def parameter(self, name: str, gradient: Tensor, weight: Tensor, update: Tensor) -> None:
        """Sizes of one parameter, its gradient and its update."""
        if self._now.measures:
            _there(self._sheet).measure(name, gradient=gradient, weight=weight, update=update)
            if name == "qkv":  # here, for neither weights nor update stay
                self._now.form_ratio_MLH = self._form_ratio(weight.detach(), update)

    def _form_ratio(self, weight_MLD3E: Tensor, update_MLD3E: Tensor) -> Tensor:
        """`attn_form_update_ratio`, (M, L, H)."""

        def heads(x_MLD3E: Tensor, which: str) -> Tensor:
            x_MLDHK = x_MLD3E[..., QKV.index(which), :].unflatten(-1, (-1, self._d_head))
            return x_MLDHK.transpose(2, 3)

        return form_update_ratio(
            q=heads(weight_MLD3E, "q"),
            k=heads(weight_MLD3E, "k"),
            q_update=heads(update_MLD3E, "q"),
            k_update=heads(update_MLD3E, "k"),
        )

    def evaluated(self, val_loss_M: Tensor) -> None:
        """The held-out loss of every member at the weights that this step starts from."""
        self._now.val_loss_M = val_loss_M

    def end(self) -> None:
        """The step is done: it belongs to the block now."""
        now = self._now
        if now.measures:
            sheet = _there(self._sheet)
            now.reductions_RX = sheet.values.clone()
            now.nonfinite = sheet.count_nonfinite(now.gradients)
            now.gradients = {}
        time_now = time.perf_counter()
        now.step_ms = 1000 * (time_now - self._last)
        self._last = time_now
        self._block.append(now)
        self._block_ms += now.step_ms

    def due(self, seconds: float) -> bool:
        """Whether the block has waited this long, or holds as much as a block should."""
        return self._shelf.nbytes > BLOCK_BYTES or self._block_ms >= 1000 * seconds

    def flush(self, members: Sequence[int]) -> tuple[Block | None, dict[str, dict[str, Array]]]:
        """Bring the block to the host and forget it; it and its tables, None and none if it is empty."""
        if not self._block:
            return None, {}
        seen, self._block, self._block_ms = self._block, [], 0.0
        block = self._on_host(seen, members)
        self._sheet = None  # members may leave now
        tables = tables_of(block, self._tokens_per_step)
        return block, tables

    @torch.no_grad()
    def _on_host(self, seen: Sequence[StepSeen], members: Sequence[int]) -> Block:
        """Compute what follows from the reductions and bring it to the host, one copy per table."""
        measured = [step for step in seen if step.measures]
        heads, layers, params = {}, {}, {}
        if measured:
            stats = self._heads(measured)
            stats["attn_form_update_ratio"] = torch.stack([_there(step.form_ratio_MLH) for step in measured])
            heads_CSMLH = torch.stack([x.float() for x in stats.values()]).cpu().numpy()
            heads = dict(zip(stats, heads_CSMLH, strict=True))
            layers_CSML = torch.stack(self._layers(measured)).cpu().numpy()
            layers = dict(zip(LAYER_COLUMNS, layers_CSML, strict=True))
            stats_of_groups = parameter_stats(self._parameters(measured), self._grouping)
            for step, grad_norm_M in zip(measured, global_norm(stats_of_groups["grad_norm"]), strict=True):
                step.grad_norm_M = grad_norm_M
            params_CSMG = torch.stack([stats_of_groups[name] for name in PARAMETER_STATISTICS]).cpu().numpy()
            params = dict(zip(PARAMETER_STATISTICS, params_CSMG, strict=True))
        columns_CSM = torch.stack(self._steps(seen)).cpu().numpy()
        return Block(
            members=tuple(members),
            steps=np.array([step.step for step in seen]),
            step_ms=np.array([step.step_ms for step in seen]),
            columns=dict(zip(STEP_COLUMNS, columns_CSM, strict=True)),
            head_steps=np.array([step.step for step in measured], dtype=np.int64),
            heads=heads,
            layers=layers,
            params=params,
            groups=self._grouping.rows,
        )

    def _steps(self, seen: Sequence[StepSeen]) -> list[Tensor]:
        """STEP_COLUMNS, each (S, M)."""
        forward_CSM = _stacked(*(step.forward_M for step in seen))
        rms_LSM = self._activation_rms(seen)
        total_SMBD = torch.stack([_there(step.token_total_LMBD)[-1] for step in seen])
        clips = [_there(step.clip) for step in seen]
        unknown_M = torch.full_like(forward_CSM[0, 0], float("nan"))
        val_losses = [step.val_loss_M for step in seen]
        return [
            *forward_CSM,
            token_cosine(total_SMBD, seq_len=self._seq_len),
            rms_LSM.amax(dim=0),
            torch.stack([_there(step.grad_norm_M) for step in seen]),
            *_stacked(*([clip.factor_M, clip.lr_M, clip.loss_scale_M] for clip in clips)),
            torch.stack([unknown_M if x is None else x for x in val_losses]),
        ]

    def _activation_rms(self, seen: Sequence[StepSeen]) -> Tensor:
        """(L, S, M)."""
        norm_LSMN = _stacked(*(step.token_norm_MN for step in seen))
        return activation_rms(norm_LSMN, d_model=self._d_model)

    def _layers(self, measured: Sequence[StepSeen]) -> list[Tensor]:
        """LAYER_COLUMNS, each (S, M, L)."""
        total_SLMBD = torch.stack([_there(step.token_total_LMBD) for step in measured])
        found_LSM = (self._activation_rms(measured), token_cosine(total_SLMBD, seq_len=self._seq_len).transpose(0, 1))
        return [x_LSM.permute(1, 2, 0) for x_LSM in found_LSM]

    def _parameters(self, measured: Sequence[StepSeen]) -> dict[str, dict[str, Tensor]]:
        """What was measured of each parameter, with a leading axis S."""
        stacked = _there(self._sheet).read(torch.stack([_there(x.reductions_RX) for x in measured]))
        for name, stats in stacked.items():
            stats["nonfinite"] = torch.zeros_like(stats["grad_norm"])
            for s, seen in enumerate(measured):
                if seen.nonfinite:
                    stats["nonfinite"][s] = seen.nonfinite[name]
        return stacked

    def _heads(self, measured: Sequence[StepSeen]) -> dict[str, Tensor]:
        """Column to (S, M, L, H)."""
        if measured[0].sample is None:
            each_layer = [stats for seen in measured for stats in seen.stats]
            columns = {name: torch.stack([x[name] for x in each_layer]) for name in HEAD_COLUMNS}
        else:
            pieces = [statistics_of(rows) for rows in self._shelf.pieces(len(measured) * self._n_layers)]
            self._shelf.clear()
            columns = {name: torch.cat([piece[name] for piece in pieces]) for name in HEAD_COLUMNS}
        return {name: x.unflatten(0, (len(measured), self._n_layers)).transpose(1, 2) for name, x in columns.items()}


def _stacked(*rows: Sequence[Tensor]) -> Tensor:
    """The same C tensors of each of S steps as one, (C, S, ...)."""
    flat = torch.stack([x for row in rows for x in row])
    return flat.unflatten(0, (len(rows), -1)).transpose(0, 1)


def _there(x: _T | None) -> _T:
    """What every whole step has."""
    assert x is not None
    return x
