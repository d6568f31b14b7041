"""From tensors on the device to rows on disk, a block of steps at a time.

Each step adds three small tensors to the block and nothing waits for them; `flush` brings the block to the host in
one copy per table.

Shape key: S steps of a block, C column, M member, L layer, H head, G group.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnscope.config import Config
from attnscope.data import Batch
from attnscope.metrics.activations import activation_rms, token_cosine
from attnscope.metrics.attention import (
    STATISTICS,
    AttentionRows,
    rows_of,
    sample_rows,
    stack_layers,
    statistics_of,
    statistics_of_all,
)
from attnscope.metrics.gradients import (
    PARAMETER_STATISTICS,
    Grouping,
    global_norm,
    group_norms,
    measure_parameter,
    parameter_stats,
)
from attnscope.metrics.loss import TokenLosses, output_logit_max
from attnscope.model import AttentionInputs
from attnscope.runs.writer import PartWriter
from attnscope.train.step import Clipped, attention_call

# The columns of the steps table that come from the device, in the order in which a step makes them.
STEP_COLUMNS = (
    "loss",
    "log_z",
    "output_logit_max",
    "activation_rms_max",
    "token_cosine",
    "grad_norm",
    "clip_factor",
    "lr",
    "loss_scale",
)
HEAD_COLUMNS = (*STATISTICS, "rows", "rows_left_out")

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A few steps of one part, on the host.

    Attributes:
        members: index within the part, (M,).
        steps: (S,).
        step_ms: (S,).
        columns: column of the steps table to (S, M).
        head_steps: the steps of which heads were measured.
        heads: column of the heads table to (S, M, L, H) over head_steps.
        params: column of the params table to (S, M, G) over head_steps.
        groups: (layer, group name) along G.
    """

    members: Sequence[int]
    steps: Array
    step_ms: Array
    columns: dict[str, Array]
    head_steps: Array
    heads: dict[str, Array]
    params: dict[str, Array]
    groups: tuple[tuple[int, str], ...]


class Recorder:
    """The observer of a training step; holds the block that is not on disk yet.

    Invariant: every tensor of a block has the same member axis, so `flush` comes before members leave.
    """

    def __init__(self, writer: PartWriter, config: Config) -> None:
        self._writer = writer
        self._record = config.record
        self._tokens_per_step = config.data.batch_size * config.model.seq_len
        self._last = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._steps: list[int] = []
        self._step_ms: list[float] = []
        self._val_loss_M: dict[int, Tensor] = {}
        self._rows_CM: list[Tensor] = []
        self._head_steps: list[int] = []
        self._heads_CMLH: list[Tensor] = []
        self._params_CMG: list[Tensor] = []

    def begin(self, step: int, batch: Batch, grouping: Grouping) -> None:
        """The next step starts: choose the rows to look at."""
        self._grouping = grouping
        self._real_BS = batch.visible_BS
        self._n_batch, seq_len = batch.tokens_BT.shape
        self._measures_heads = step % self._record.every == 0
        self._sample = (
            None
            if isinstance(self._record.rows, str)
            else sample_rows(
                n_batch=self._n_batch,
                n_queries=seq_len,
                rows=self._record.rows,
                seed=step,
            )
        )
        self._steps.append(step)
        if self._measures_heads:
            self._head_steps.append(step)
        self._layers: list[AttentionRows] = []
        self._layer_stats: list[dict[str, Tensor]] = []
        self._residual_norm_LM: list[Tensor] = []
        self._parameters: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def attention(self, layer: int, inputs: AttentionInputs) -> None:
        """Cut the sampled rows out of a layer's attention."""
        if not self._measures_heads:
            return
        call = attention_call(inputs, self._real_BS)
        if self._sample is None:
            self._layer_stats.append(statistics_of_all(call))
        else:
            self._layers.append(rows_of(call, self._sample))

    @torch.no_grad()
    def residual(self, layer: int, x_MND: Tensor) -> None:
        """Size of the residual stream after a layer."""
        self._residual_norm_LM.append(activation_rms(x_MND))
        self._last_residual_MND = x_MND.detach()

    @torch.no_grad()
    def output(self, output_logits_MNV: Tensor, losses: TokenLosses) -> None:
        """Everything that the forward pass alone decides."""
        self._forward_rows_CM = [
            losses.loss_M.detach(),
            losses.log_z_M.detach(),
            output_logit_max(output_logits_MNV),
            torch.stack(self._residual_norm_LM).amax(dim=0),
            token_cosine(self._last_residual_MND, n_batch=self._n_batch),
        ]
        del self._last_residual_MND
        if self._layers:
            stats = statistics_of(stack_layers(self._layers))
            self._heads_CMLH.append(torch.stack([stats[name] for name in HEAD_COLUMNS]))
        elif self._layer_stats:
            self._heads_CMLH.append(
                torch.stack(
                    [
                        torch.stack([stats[name] for stats in self._layer_stats], dim=1)
                        for name in HEAD_COLUMNS
                    ]
                )
            )

    def gradients(self, gradients: Mapping[str, Tensor], clip: Clipped) -> None:
        """What clipping did; the norm of gradients, where no parameter will be measured."""
        self._clip = clip
        if not self._measures_heads:
            self._grad_norm_M = global_norm(group_norms(gradients, self._grouping))

    def parameter(self, name: str, gradient: Tensor, weight: Tensor, update: Tensor) -> None:
        """Norms of one parameter."""
        if self._measures_heads:
            self._parameters[name] = measure_parameter(
                gradient=gradient,
                weight=weight.detach(),
                update=update,
                layered=name in self._grouping.layered,
            )

    def end(self) -> None:
        """The step is done: put its row together."""
        if self._parameters:
            params = parameter_stats(self._parameters, self._grouping)
            self._grad_norm_M = global_norm(params["grad_norm"])
            self._params_CMG.append(torch.stack([params[name] for name in PARAMETER_STATISTICS]))
        clip = self._clip
        rows_M = [
            *self._forward_rows_CM,
            self._grad_norm_M,
            clip.factor_M,
            clip.lr_M,
            clip.loss_scale_M,
        ]
        self._rows_CM.append(torch.stack(rows_M))
        now = time.perf_counter()
        self._step_ms.append(1000 * (now - self._last))
        self._last = now

    def add_val_loss(self, step: int, val_loss_M: Tensor) -> None:
        """The held-out loss of every member at the weights of `step`; the step's row must still be in the block."""
        self._val_loss_M[step] = val_loss_M

    def due(self, seconds: float) -> bool:
        """Whether the oldest step of the block has waited this long."""
        return sum(self._step_ms) >= 1000 * seconds

    def flush(self, members: Sequence[int]) -> Block | None:
        """Write the block and forget it; None if it is empty.

        Raises:
            RunWriteError: the disk did not take it.
        """
        if not self._steps:
            return None
        block = self._to_host(members)
        self._clear()
        for table, columns in tables_of(block, self._tokens_per_step).items():
            if len(columns["step"]):
                self._writer.append(table, columns)
        return block

    def _to_host(self, members: Sequence[int]) -> Block:
        rows_SCM = torch.stack(self._rows_CM).cpu().numpy()
        columns = {name: rows_SCM[:, i] for i, name in enumerate(STEP_COLUMNS)}
        columns["val_loss"] = np.full_like(columns["loss"], np.nan)
        for step, val_loss_M in self._val_loss_M.items():
            columns["val_loss"][self._steps.index(step)] = val_loss_M.cpu().numpy()
        heads, params = {}, {}
        if self._head_steps:
            heads_SCMLH = torch.stack(self._heads_CMLH).cpu().numpy()
            params_SCMG = torch.stack(self._params_CMG).cpu().numpy()
            heads = {name: heads_SCMLH[:, i] for i, name in enumerate(HEAD_COLUMNS)}
            params = {name: params_SCMG[:, i] for i, name in enumerate(PARAMETER_STATISTICS)}
        return Block(
            members=tuple(members),
            steps=np.array(self._steps),
            step_ms=np.array(self._step_ms),
            columns=columns,
            head_steps=np.array(self._head_steps, dtype=np.int64),
            heads=heads,
            params=params,
            groups=self._grouping.rows,
        )


def tables_of(block: Block, tokens_per_step: int) -> dict[str, dict[str, Array]]:
    """Lay a block out as the columns of the three tables, one row per step, member and whatever the table is about."""
    n_members = len(block.members)
    steps = {
        **_keys(block.steps, block.members, 1),
        **{name: value.ravel() for name, value in block.columns.items()},
        "tokens": np.repeat((block.steps + 1) * tokens_per_step, n_members),
        "step_ms": np.repeat(block.step_ms, n_members),
    }
    if not len(block.head_steps):
        return {"steps": steps}
    n_layers, n_heads = block.heads["entropy"].shape[2:]
    times = len(block.head_steps) * n_members
    heads = {
        **_keys(block.head_steps, block.members, n_layers * n_heads),
        "layer": np.tile(np.repeat(np.arange(n_layers), n_heads), times),
        "head": np.tile(np.arange(n_heads), times * n_layers),
        **{name: value.ravel() for name, value in block.heads.items()},
    }
    params = {
        **_keys(block.head_steps, block.members, len(block.groups)),
        "layer": np.tile([layer for layer, _ in block.groups], times),
        "group": np.tile(np.array([group for _, group in block.groups], dtype=object), times),
        **{name: value.ravel() for name, value in block.params.items()},
    }
    return {"steps": steps, "heads": heads, "params": params}


def _keys(steps: Array, members: Sequence[int], rows_each: int) -> dict[str, Array]:
    return {
        "step": np.repeat(steps, len(members) * rows_each),
        "member": np.tile(np.repeat(np.array(members), rows_each), len(steps)),
    }
