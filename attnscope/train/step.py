"""One training step for all members of a part: nothing here waits for the device or talks to the host.

Shape key: M member, L layer, B batch, T position, N = B x T tokens, V vocab.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from attnscope.config import Config
from attnscope.data import IGNORE, Batch
from attnscope.metrics.attention import max_attn_logit
from attnscope.metrics.gradients import Grouping, global_norm, group_norms, group_parameters
from attnscope.metrics.loss import TokenLosses, token_losses
from attnscope.metrics.rows import Call
from attnscope.model import QKV, AttentionInputs, Geometry, Observer, apart, attn_scales, geometry_of
from attnscope.train.broadcast import fit
from attnscope.train.clipping import clip_gradients
from attnscope.train.optimizer import OPTIMIZERS, Hyper, State, add_decay
from attnscope.train.schedule import lr_at

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dynamic loss scaling with the constants of torch.amp.GradScaler (Micikevicius et al. 2018).
INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_GROWTH = 2.0
LOSS_SCALE_BACKOFF = 0.5
LOSS_SCALE_INTERVAL = 2000

QK_CLIP_ALPHA = 0.5  # Kimi K2: both W_q and W_k take the square root of what the logits lose

_GROUPS_OF = {"token_embedding": ("embedding",), "position_embedding": ("embedding",), "qkv": QKV}
_NOT_LAYERED = ("token_embedding", "position_embedding", "head", "norm_final")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What stays the same from step to step while the same members live.

    Attributes:
        config: what all members share; its per-member settings are not read.
        configs: one per living member, in the order of the axis M.
        forward: `attnscope.model.forward`, compiled or not.
        clips: whether any member has a clipping threshold.
        decays: whether any member has weight decay.
        schedules: whether any member's learning rate changes.
        regularizes: whether any member has a z-loss.
        updates: where the optimizer writes, the same memory for all; an update stands until that of the next parameter.
    """

    config: Config
    configs: Sequence[Config]
    device: torch.device
    dtype: torch.dtype
    forward: Callable[..., Tensor]
    geometry: Geometry
    grouping: Grouping
    attn_scale_ML: Tensor
    peak: Hyper
    warmup_M: Tensor
    z_loss_M: Tensor
    threshold_M: Tensor
    ones_M: Tensor
    clips: bool
    decays: bool
    schedules: bool
    regularizes: bool
    updates: dict[str, Tensor]


def set_up(
    configs: Sequence[Config],
    parameters: Mapping[str, Tensor],
    *,
    device: torch.device,
    forward: Callable[..., Tensor],
) -> Setup:
    """Turn the members' numbers into tensors with the axis M."""
    config = configs[0]

    def numbers(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    optimizers = [config.optimizer for config in configs]
    thresholds = [config.clip.threshold for config in configs]
    limits = [float("inf") if isinstance(t, str) else t for t in thresholds]
    return Setup(
        config=config,
        configs=configs,
        device=device,
        dtype=DTYPES[config.precision.dtype],
        forward=forward,
        geometry=geometry_of(config, seq_len=config.model.seq_len, device=device),
        grouping=group_parameters(
            {name: _groups_of(name) for name in parameters},
            layered=frozenset(parameters) - frozenset(_NOT_LAYERED),
            n_layers=config.model.n_layers,
        ),
        attn_scale_ML=attn_scales(configs).to(device),
        peak=Hyper(
            lr_M=numbers([o.lr for o in optimizers]),
            momentum_M=numbers([o.momentum for o in optimizers]),
            beta1_M=numbers([o.betas[0] for o in optimizers]),
            beta2_M=numbers([o.betas[1] for o in optimizers]),
            eps_M=numbers([o.eps for o in optimizers]),
            weight_decay_M=numbers([o.weight_decay for o in optimizers]),
        ),
        warmup_M=numbers([o.warmup_steps for o in optimizers]),
        z_loss_M=numbers([o.z_loss for o in optimizers]),
        threshold_M=numbers(limits),
        ones_M=numbers([1.0] * len(configs)),
        clips=config.clip.mode != "none" and min(limits) < float("inf"),
        decays=any(o.weight_decay for o in optimizers),
        schedules=config.optimizer.schedule != "constant" or any(o.warmup_steps for o in optimizers),
        regularizes=any(o.z_loss for o in optimizers),
        updates=_updates(parameters),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """What became of the gradients: factor, learning rate and loss scale of the step, each (M,)."""

    factor_M: Tensor
    lr_M: Tensor
    loss_scale_M: Tensor


class StepObserver(Observer, Protocol):
    """Looks at a whole training step, in the order in which things happen."""

    def output(self, output_logits_MNV: Tensor, losses: TokenLosses) -> None:
        """Called after the forward pass."""

    def gradients(self, gradients: Mapping[str, Tensor], clip: Clipped) -> None:
        """Called with the gradients before clipping, loss scale divided out."""

    def parameter(self, name: str, gradient: Tensor, weight: Tensor, update: Tensor) -> None:
        """Called for each parameter before the update is added to it; the gradient is that before clipping."""


def run_step(
    setup: Setup,
    parameters: Mapping[str, Tensor],
    state: State,
    batch: Batch,
    *,
    step: int,
    observer: StepObserver | None,
) -> Tensor:
    """One step: forward, backward, clipping, update. Moves `parameters` and `state` on, in place.

    Args:
        setup: from `set_up`.
        parameters: float32 leaves that require gradients.
        state: of optimizer, clipping and loss scaling.
        batch: on the device.
        step: updates already done.
        observer: sees everything that passes; None = nobody.

    Returns:
        The loss before the update, (M,), nats per token.
    """
    config = setup.config
    heads = HeadLimits(config.attention.qk_clip, observer) if config.attention.qk_clip else None
    output_logits_MNV = setup.forward(
        {name: value.to(setup.dtype) for name, value in parameters.items()},
        config,
        setup.geometry,
        batch.tokens_BT,
        attn_scale_ML=setup.attn_scale_ML,
        real_BS=batch.visible_BS,
        dropout_seeds_LM=_dropout_seeds(setup, step),
        observer=heads or observer,
    )
    losses = token_losses(
        output_logits_MNV,
        batch.targets_BT.flatten(),
        ignore=None if batch.scores_all else IGNORE,
        regularizes=setup.regularizes,
    )
    if observer is not None:
        observer.output(output_logits_MNV.detach(), losses)
    objective_M = losses.loss_M
    if losses.log_z_square_M is not None:
        objective_M = objective_M + setup.z_loss_M * losses.log_z_square_M
    loss_scale_M = state["loss_scale"].clone() if "loss_scale" in state else None
    if loss_scale_M is not None:
        objective_M = objective_M * loss_scale_M
    in_order = torch.autograd.grad(objective_M.sum(), list(parameters.values()))
    with torch.no_grad():
        gradients = dict(zip(parameters, in_order, strict=True))
        if loss_scale_M is not None:
            gradients = {name: g / fit(loss_scale_M, g) for name, g in gradients.items()}
        _update(setup, parameters, state, gradients, loss_scale_M, step=step, observer=observer)
        if heads is not None:
            heads.shrink(parameters, d_head=config.d_head)
    return losses.loss_M.detach()


def _update(
    setup: Setup,
    parameters: Mapping[str, Tensor],
    state: State,
    gradients: Mapping[str, Tensor],
    loss_scale_M: Tensor | None,
    *,
    step: int,
    observer: StepObserver | None,
) -> None:
    """Clip, let the optimizer speak, and add what it says."""
    config = setup.config
    hyper = setup.peak
    if setup.schedules:
        lr_M = lr_at(
            step,
            lr_M=hyper.lr_M,
            warmup_M=setup.warmup_M,
            schedule=config.optimizer.schedule,
            steps=config.train.steps,
        )
        hyper = replace(hyper, lr_M=lr_M)
    before, sound_M = {}, None
    if loss_scale_M is not None:  # adaptive clipping must forget an overflow too
        before = {name: value.clone() for name, value in state.items()}
        sound_M = all_finite(gradients)
    clipped, factor_M = gradients, setup.ones_M
    if setup.clips:
        clipped, factor_M = clip_gradients(
            gradients,
            mode=config.clip.mode,
            threshold_M=setup.threshold_M,
            grad_norm_M=global_norm(group_norms(gradients, setup.grouping)),
            state=state,
            step=step,
        )
    if observer is not None:
        scale_M = setup.ones_M if loss_scale_M is None else loss_scale_M
        observer.gradients(gradients, Clipped(factor_M=factor_M, lr_M=hyper.lr_M, loss_scale_M=scale_M))
    optimizer = OPTIMIZERS[config.optimizer.name]
    for name in optimizer(clipped, state, hyper, setup.updates):
        parameter, update = parameters[name], setup.updates[name]
        if setup.decays:
            add_decay(name, update, parameter, hyper)
        if sound_M is not None:
            update.masked_fill_(~fit(sound_M, update), 0.0)
        if observer is not None:
            observer.parameter(name, gradients[name], parameter, update)
        parameter.add_(update)
    if sound_M is not None:
        _after_scaling(state, before, sound_M)


class HeadLimits:
    """QK-Clip (Kimi K2): remembers the largest logit of every head and shrinks W_q and W_k where it was too large.

    Invariant: stands between the forward pass and the real observer, and hands everything on.
    """

    def __init__(self, threshold: float, behind: StepObserver | None) -> None:
        self._threshold = threshold
        self._behind = behind
        self._largest_MH: list[Tensor] = []

    def attention(self, layer: int, inputs: AttentionInputs) -> None:
        """Remember the layer's largest logits, exactly."""
        self._largest_MH.append(max_attn_logit(attention_call(inputs, None)))
        if self._behind is not None:
            self._behind.attention(layer, inputs)

    def residual(self, layer: int, x_MND: Tensor) -> None:
        """Hand on."""
        if self._behind is not None:
            self._behind.residual(layer, x_MND)

    def shrink(self, parameters: Mapping[str, Tensor], *, d_head: int) -> None:
        """Multiply W_q and W_k of every head by √(threshold / largest logit) where that is below 1."""
        weights = apart(parameters)
        for layer, largest_MH in enumerate(self._largest_MH):
            # An infinite logit says nothing of how much to shrink; a ratio of 0 would end the head for good.
            too_large_MH = (largest_MH > self._threshold) & largest_MH.isfinite()
            ratio_MH = (self._threshold / largest_MH).where(too_large_MH, 1.0)
            for name in ("q", "k"):
                heads_MDHK = weights[name][:, layer].unflatten(-1, (-1, d_head))
                heads_MDHK.mul_((ratio_MH**QK_CLIP_ALPHA)[:, None, :, None])


def attention_call(inputs: AttentionInputs, real_BS: Tensor | None) -> Call:
    """What the metrics need of one layer; padded queries become rows that see nothing, which are left out."""
    visible = inputs.visible
    if real_BS is not None:
        real_B1T1 = real_BS[:, None, :, None]
        visible = real_B1T1 if visible is None else visible & real_B1T1
    return Call(
        q=inputs.q_MBHTK.detach(),
        k=inputs.k_MBHSK.detach(),
        attn_scale=_kept(inputs.attn_scale),
        visible=visible,
        bias=inputs.bias_HTS,
        softcap=inputs.softcap,
    )


def _kept(attn_scale: Tensor) -> Tensor:
    """A scale that is learned moves on before it is looked at."""
    return attn_scale.detach().clone() if attn_scale.requires_grad else attn_scale


def loss_scaling_state(n_members: int, device: torch.device) -> State:
    """Scale and steps since the last overflow, (M,)."""
    return {
        "loss_scale": torch.full((n_members,), INITIAL_LOSS_SCALE, device=device),
        "loss_scale_age": torch.zeros(n_members, device=device),
    }


def all_finite(tensors: Mapping[str, Tensor]) -> Tensor:
    """Whether all numbers of each member are finite, (M,)."""
    return torch.stack([x.flatten(1).isfinite().all(dim=-1) for x in tensors.values()]).all(dim=0)


def _after_scaling(state: State, before: Mapping[str, Tensor], sound_M: Tensor) -> None:
    """Members whose gradients overflowed forget the step; their scale is halved, the others' grows now and then."""
    for name, old in before.items():
        state[name].copy_(state[name].where(fit(sound_M, old), old))
    age_M = (before["loss_scale_age"] + 1).where(sound_M, 0)
    ripe_M = age_M >= LOSS_SCALE_INTERVAL
    grown_M = before["loss_scale"].where(~ripe_M, before["loss_scale"] * LOSS_SCALE_GROWTH)
    state["loss_scale"].copy_(grown_M.where(sound_M, before["loss_scale"] * LOSS_SCALE_BACKOFF))
    state["loss_scale_age"].copy_(age_M.where(~ripe_M, 0))


def _updates(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for the largest update, shaped for every parameter: what is used again and again stays in the cache."""
    some = next(iter(parameters.values()))
    room = some.new_zeros(max(value.numel() for value in parameters.values()), requires_grad=False)
    return {name: room[: value.numel()].view(value.shape) for name, value in parameters.items()}


def _dropout_seeds(setup: Setup, step: int) -> list[list[int]] | None:
    """One seed per layer and member, a pure function of train.seed, step and layer."""
    config = setup.config
    if not config.attention.dropout:
        return None
    n_layers = config.model.n_layers
    return [
        [hash((config.train.seed, step, layer)) & (2**63 - 1) for config in setup.configs] for layer in range(n_layers)
    ]


def _groups_of(name: str) -> tuple[str, ...]:
    return ("norm",) if name.startswith("norm_") else _GROUPS_OF.get(name, (name,))
