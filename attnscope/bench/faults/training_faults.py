"""Faults of how a model is trained: targets, loss, batches, optimizer, learning rate, gradients and precision of updates."""

from attnscope.bench.faults.fault import (
    Fault,
    adamw_config,
    is_adamw,
    is_by_hand,
    is_decoder,
    is_own,
    is_sgd,
    nothing,
    post_config,
    sgd_config,
)
from attnscope.bench.faults.recipe import Recipe


def _scores_all(recipe: Recipe) -> bool:
    return is_decoder(recipe) and recipe.source not in ("recall", "modular")


TRAINING: tuple[Fault, ...] = (
    Fault(
        name="labels not shifted",
        right=("labels_shifted_wrong",),
        strengths=({"targets": "same"},),
        is_structural=True,
        fits=_scores_all,
    ),
    Fault(
        name="labels shifted twice",
        right=("labels_shifted_wrong",),
        strengths=({"targets": "late"},),
        is_structural=True,
        fits=_scores_all,
    ),
    Fault(name="labels shuffled", right=("plateau",), strengths=({"targets": "shuffled"},), is_structural=True),
    Fault(name="loss of the wrong sign", right=("loss_rises",), strengths=({"loss_sign": -1.0},)),
    Fault(
        name="loss summed",
        right=("loss_summed", "learning_rate_too_high"),
        strengths=({"loss_sum": True, "clip": 0.0}, {"loss_sum": True, "clip": 0.0, "batch_size": 16}),
        fits=is_sgd,
    ),
    Fault(
        name="accumulation not divided",
        right=("accumulation_not_divided",),
        strengths=({"accumulate": 4, "divides": False, "clip": 0.0}, {"accumulate": 8, "divides": False, "clip": 0.0}),
        fits=is_sgd,
    ),
    Fault(
        name="gradients never zeroed",
        right=("gradients_accumulate",),
        strengths=({"zeroes_grad": False}, {"zeroes_grad": False, "clip": 0.0}),
    ),
    Fault(name="one batch for ever", right=("repeated_batch",), strengths=({"repeats_batch": True},)),
    Fault(
        name="one batch poisoned",
        right=("poisoned_batch",),
        strengths=({"poison_at": 90}, {"poison_at": 90, "clip": 0.0}),
        is_structural=True,
    ),
    Fault(
        name="learning rate too high",
        right=("learning_rate_too_high",),
        strengths=({"lr": 10.0}, {"lr": 100.0}),  # times that of the base
        lab=({"optimizer.lr": 10.0}, {"optimizer.lr": 100.0}),
    ),
    Fault(
        name="learning rate too low",
        right=("learning_rate_too_low",),
        strengths=({"lr": 1e-2}, {"lr": 1e-4}),  # times that of the base
        lab=({"optimizer.lr": 1e-2}, {"optimizer.lr": 1e-4}),
    ),
    Fault(
        name="learning rate jumps",
        right=("learning_rate_jump",),
        strengths=({"lr_jump_at": 80, "lr_times": 10.0}, {"lr_jump_at": 80, "lr_times": 100.0}),
    ),
    Fault(
        name="learning rate grows",
        right=("learning_rate_too_high",),
        strengths=({"lr_growth": 1.03}, {"lr_growth": 1.05}),  # after 150 steps 80 and 1,400 times as high
        is_slow=True,
    ),
    Fault(
        name="momentum too close to 1",
        right=("learning_rate_too_high",),  # lr / (1 - momentum) is 10 and 100 times that of the base
        lab=({"optimizer.momentum": 0.99}, {"optimizer.momentum": 0.999}),
        fits=nothing,
        fits_lab=sgd_config,
    ),
    Fault(
        name="warm-up missing",
        right=("missing_warmup", "learning_rate_too_high"),
        strengths=({"warmup": 0, "lr": 3.0}, {"warmup": 0, "lr": 6.0}),  # lr times that of the base
        lab=(
            {"optimizer.warmup_steps": 0, "optimizer.lr": 3.0},
            {"optimizer.warmup_steps": 0, "optimizer.lr": 6.0},
        ),
        fits=lambda recipe: recipe.norm == "post",
        fits_lab=post_config,
    ),
    Fault(
        name="weight decay too strong",
        right=("weight_decay_too_strong",),
        strengths=({"weight_decay": 20.0}, {"weight_decay": 100.0}),
        lab=({"optimizer.weight_decay": 20.0}, {"optimizer.weight_decay": 100.0}),
        fits=is_adamw,
        fits_lab=adamw_config,
    ),
    Fault(
        name="Adam's eps too large",
        right=("adam_epsilon_too_large",),
        strengths=({"eps": 1.0}, {"eps": 100.0}),
        lab=({"optimizer.eps": 1.0}, {"optimizer.eps": 100.0}),
        fits=is_adamw,
        fits_lab=adamw_config,
    ),
    Fault(
        name="clipped to nothing",
        right=("clipping_always_on",),
        strengths=({"clip": 0.02}, {"clip": 1e-3}),
        lab=(
            {"clip.mode": "norm", "clip.threshold": 0.02},
            {"clip.mode": "norm", "clip.threshold": 1e-3},
        ),
        fits=is_sgd,
        fits_lab=sgd_config,
    ),
    Fault(
        name="z-loss outweighs the loss",
        right=(),
        lab=({"optimizer.z_loss": 10.0}, {"optimizer.z_loss": 100.0}),
        fits=nothing,
    ),
    Fault(
        name="parameters in no optimizer",
        right=("parameters_without_optimizer",),
        strengths=({"left_out": ("h.1.",)}, {"left_out": ("mlp", "attn")}),
        is_structural=True,
    ),
    Fault(
        name="layers cut from the graph",
        right=("parameters_without_gradient",),
        strengths=({"detached": (1,)}, {"detached": (0, 1, 2)}),
        is_structural=True,
        fits=is_own,
    ),
    Fault(
        name="parameters with a learning rate of 0",
        right=("parameters_frozen",),
        strengths=({"still": ("h.0.",)}, {"still": ("attn",)}),
        is_structural=True,
    ),
    Fault(
        name="evaluation mode in training",
        right=("evaluation_in_training",),
        strengths=({"evaluates": True, "dropout": 0.1},),
        is_structural=True,
    ),
    Fault(
        name="bfloat16 updates round away",
        right=("updates_round_away", "learning_rate_too_low"),
        strengths=({"dtype": "bfloat16", "lr": 0.03}, {"dtype": "bfloat16", "lr": 0.003}),  # lr times that of the base
        fits=lambda recipe: is_adamw(recipe) and is_by_hand(recipe),
    ),
)
