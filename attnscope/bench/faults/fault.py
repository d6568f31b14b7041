"""What a kind of fault is: what it changes, in programs under watch and in configs of the lab, and what is right to say of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnscope.bench.faults.recipe import Recipe
from attnscope.config import Config

Changes = Mapping[str, object]  # of fields of a recipe, or of settings of a config


def nothing(_program: object) -> bool:
    """Fits nowhere."""
    return False


def everything(_program: object) -> bool:
    """Fits everywhere."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: a few words.
        right: rules of which one should be the first cause that is named: what is wrong, or what comes to the same, not what
            follows from it.
        strengths: what it changes in a recipe, the weaker first; empty: it is put into runs of the lab alone.
        lab: what it changes in a config, the weaker first; empty: it is put into programs under watch alone.
        is_structural: it is a fault whether or not a short training is the worse for it.
        is_slow: training breaks late and by and by: how long before signals know takes many such programs, so that a small
            population has all of them.
        fits: recipes that it can be put into, and in which it matters.
        fits_lab: the same of configs.
    """

    name: str
    right: tuple[str, ...]
    strengths: tuple[Changes, ...] = ()
    lab: tuple[Changes, ...] = ()
    is_structural: bool = False
    is_slow: bool = False
    fits: Callable[[Recipe], bool] = everything
    fits_lab: Callable[[Config], bool] = everything


def is_decoder(recipe: Recipe) -> bool:
    """It predicts the next token."""
    return recipe.objective == "next_token"


def is_padded(recipe: Recipe) -> bool:
    """Its sequences are, behind their last token."""
    return recipe.objective == "masked"


def is_by_hand(recipe: Recipe) -> bool:
    """Its attention is written in the program."""
    return recipe.attention in ("written", "sdpa")


def is_own(recipe: Recipe) -> bool:
    """Its blocks are written in the program."""
    return recipe.attention != "gpt2"


def has_a_mask(recipe: Recipe) -> bool:
    """It has a causal mask that is written in the program."""
    return is_decoder(recipe) and is_by_hand(recipe)


def is_adamw(recipe: Recipe) -> bool:
    """All of it is trained with AdamW, whose updates do not depend on the size of gradients."""
    return recipe.optimizer == "adamw"


def is_sgd(recipe: Recipe) -> bool:
    """Its updates are as large as its gradients are."""
    return recipe.optimizer == "sgd"


def decoder_config(config: Config) -> bool:
    """It predicts the next token."""
    return config.model.kind == "decoder"


def encoder_config(config: Config) -> bool:
    """It predicts masked tokens of padded sequences."""
    return config.model.kind == "encoder"


def free_qk_config(config: Config) -> bool:
    """Weights of q and k decide how large they are."""
    return not config.attention.qk_norm


def adamw_config(config: Config) -> bool:
    """As `is_adamw`."""
    return config.optimizer.name == "adamw"


def sgd_config(config: Config) -> bool:
    """As `is_sgd`."""
    return config.optimizer.name == "sgd"


def post_config(config: Config) -> bool:
    """Norms stand behind the branches."""
    return config.model.norm == "post"
