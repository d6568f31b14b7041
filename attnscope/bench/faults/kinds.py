"""The faults that are put into programs, and what would be right to say of each; and the programs that they are put into."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnscope.bench.faults.recipe import Recipe

Changes = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: a few words.
        right: rules of which one should be the first cause that is named.
        strengths: what it changes in a recipe, the weaker first.
        is_structural: it is a fault whether or not a short training is the worse for it.
        fits: recipes that it can be put into.
    """

    name: str
    right: tuple[str, ...]
    strengths: tuple[Changes, ...]
    is_structural: bool = False
    fits: Callable[[Recipe], bool] = lambda _recipe: True


def _is_decoder(recipe: Recipe) -> bool:
    return recipe.objective == "next_token"


def _is_by_hand(recipe: Recipe) -> bool:
    return recipe.attention != "mha"


def _has_a_mask(recipe: Recipe) -> bool:
    return _is_decoder(recipe) and _is_by_hand(recipe)


def _is_adamw(recipe: Recipe) -> bool:
    return recipe.optimizer == "adamw"


def _by_its_size(recipe: Recipe) -> bool:
    return recipe.optimizer == "sgd"


# Each trains well as it is.
BASES: dict[str, Recipe] = {
    "written pre": Recipe(attention="written"),
    "sdpa rope": Recipe(position="rope", source="markov"),
    "encoder": Recipe(attention="mha", objective="masked", lr=1e-3),
    "written post": Recipe(attention="written", norm="post", lr=1e-3, warmup=30),
    "no norm sgd": Recipe(attention="written", norm="none", optimizer="sgd", lr=0.01, embedding_std=0.3),
    "sdpa muon": Recipe(optimizer="muon", lr=5e-3),
    "sdpa pre": Recipe(source="recall", dropout=0.1),
    "pre sgd": Recipe(attention="written", optimizer="sgd", lr=0.1),
}

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="scale missing",
        right=("applied_scale", "unusual_scale"),
        strengths=({"scale": 0.0, "n_heads": 2, "qk_gain": 1.5}, {"scale": 0.0, "n_heads": 1, "qk_gain": 2.0}),
        fits=_is_by_hand,
    ),
    Fault(
        name="scale multiplies twice",
        right=("applied_scale", "unusual_scale"),
        strengths=({"scale": 0.25}, {"scale": 0.03}),
        fits=_is_by_hand,
    ),
    Fault(
        name="initial q and k too large",
        right=("saturated_at_start",),
        strengths=({"qk_gain": 4.0}, {"qk_gain": 8.0}),
        fits=_is_by_hand,
    ),
    Fault(
        name="initial weights too large",
        right=("saturated_at_start", "first_loss_too_high"),
        strengths=({"gain": 3.0}, {"gain": 6.0}),
    ),
    Fault(
        name="tied embedding of std 1",
        right=("first_loss_too_high",),
        strengths=({"embedding_std": 0.5, "ties": True}, {"embedding_std": 1.0, "ties": True}),
    ),
    Fault(
        name="causal mask missing",
        right=("future_visible", "loss_too_low"),
        strengths=({"mask": "none"},),
        is_structural=True,
        fits=_has_a_mask,
    ),
    Fault(
        name="causal mask off by one",
        right=("future_visible", "loss_too_low"),
        strengths=({"mask": "off_by_one"},),
        is_structural=True,
        fits=_has_a_mask,
    ),
    Fault(
        name="causal mask transposed",
        right=("future_visible", "loss_too_low"),
        strengths=({"mask": "transposed"},),
        is_structural=True,
        fits=_has_a_mask,
    ),
    Fault(
        name="causal mask of the wrong sign",
        right=("future_visible", "loss_too_low"),
        strengths=({"mask": "added"},),
        is_structural=True,
        fits=_has_a_mask,
    ),
    Fault(
        name="causal mask too faint",
        right=("future_visible", "loss_too_low"),
        strengths=({"mask": "faint"},),
        is_structural=True,
        fits=_has_a_mask,
    ),
    Fault(
        name="softmax over the queries",
        right=("wrong_softmax_axis",),
        strengths=({"softmax_axis": -2},),
        is_structural=True,
        fits=_is_by_hand,
    ),
    Fault(
        name="labels not shifted",
        right=("labels_shifted_wrong", "future_visible", "loss_too_low"),
        strengths=({"targets": "same"},),
        is_structural=True,
        fits=lambda recipe: _is_decoder(recipe) and recipe.source != "recall",
    ),
    Fault(name="labels shuffled", right=("plateau",), strengths=({"targets": "shuffled"},), is_structural=True),
    Fault(name="loss of the wrong sign", right=("loss_rises",), strengths=({"loss_sign": -1.0},)),
    Fault(
        name="loss summed",
        right=("loss_summed", "learning_rate_too_high", "clipping_always_on"),
        strengths=({"loss_sum": True, "clip": 0.0}, {"loss_sum": True, "clip": 0.0, "batch_size": 16}),
        fits=_by_its_size,
    ),
    Fault(
        name="accumulation not divided",
        right=("loss_summed", "learning_rate_too_high", "clipping_always_on"),
        strengths=({"accumulate": 4, "divides": False, "clip": 0.0}, {"accumulate": 8, "divides": False, "clip": 0.0}),
        fits=_by_its_size,
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
        name="residual missing",
        right=("gradients_vanish_with_depth", "rank_collapse", "learning_rate_too_low"),
        strengths=({"has_residual": False}, {"has_residual": False, "n_layers": 5}),
    ),
    Fault(
        name="heads dead",
        right=("uniform_attention",),
        strengths=({"dead_layers": (1,)}, {"dead_layers": (0, 1)}),
        is_structural=True,
        fits=_is_by_hand,
    ),
    Fault(
        name="heads identical",
        right=("identical_heads",),
        strengths=({"copies_heads": True},),
        is_structural=True,
        fits=_is_by_hand,
    ),
    Fault(
        name="learning rate too high",
        right=("learning_rate_too_high",),
        strengths=({"lr": 10.0}, {"lr": 100.0}),  # times that of the base
    ),
    Fault(
        name="learning rate too low",
        right=("learning_rate_too_low",),
        strengths=({"lr": 1e-2}, {"lr": 1e-4}),  # times that of the base
    ),
    Fault(
        name="learning rate jumps",
        right=("learning_rate_jump",),
        strengths=({"lr_jump_at": 80, "lr_times": 10.0}, {"lr_jump_at": 80, "lr_times": 100.0}),
    ),
    Fault(
        name="warm-up missing",
        right=("missing_warmup", "learning_rate_too_high"),
        strengths=({"warmup": 0, "lr": 3.0}, {"warmup": 0, "lr": 6.0}),  # lr times that of the base
        fits=lambda recipe: recipe.norm == "post",
    ),
    Fault(
        name="weight decay too strong",
        right=("weight_decay_too_strong",),
        strengths=({"weight_decay": 20.0}, {"weight_decay": 100.0}),
        fits=_is_adamw,
    ),
    Fault(
        name="Adam's eps too large",
        right=("adam_epsilon_too_large", "learning_rate_too_low"),
        strengths=({"eps": 1.0}, {"eps": 100.0}),
        fits=_is_adamw,
    ),
    Fault(
        name="clipped to nothing",
        right=("clipping_always_on", "learning_rate_too_low"),
        strengths=({"clip": 0.02}, {"clip": 1e-3}),
        fits=_by_its_size,
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
        fits=lambda recipe: recipe.optimizer == "adamw" and _is_by_hand(recipe),
    ),
)

RELATIVE = ("lr",)  # fields of which a change says how many times those of the base
