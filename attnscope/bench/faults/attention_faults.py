"""Faults of what a model computes: the scale, initial weights, masks, the softmax, heads, residuals and norms."""

from attnscope.bench.faults.fault import (
    Fault,
    decoder_config,
    encoder_config,
    free_qk_config,
    has_a_mask,
    is_by_hand,
    is_own,
    is_padded,
    nothing,
)
from attnscope.bench.faults.recipe import Recipe


def _of_scale(recipe: Recipe) -> bool:
    return is_by_hand(recipe) or recipe.attention == "gpt2"  # whose config can leave it out, too


def _several_layers(recipe: Recipe) -> bool:
    return is_by_hand(recipe) and recipe.n_layers > 1


ATTENTION: tuple[Fault, ...] = (
    Fault(
        name="scale missing",
        right=("applied_scale", "unusual_scale"),
        strengths=({"scale": 0.0, "n_heads": 2, "qk_gain": 1.5}, {"scale": 0.0, "n_heads": 1, "qk_gain": 2.0}),
        lab=(
            {"attention.scale": "none", "model.n_heads": 2, "init.qk_gain": 1.5},
            {"attention.scale": "none", "model.n_heads": 1, "init.qk_gain": 2.0},
        ),
        fits=_of_scale,
        fits_lab=free_qk_config,
    ),
    Fault(
        name="scale multiplies twice",
        right=("applied_scale", "unusual_scale"),
        strengths=({"scale": 0.25}, {"scale": 0.03}),
        lab=({"attention.scale": 0.0625}, {"attention.scale": 0.0075}),
        fits=is_by_hand,
    ),
    Fault(
        name="initial q and k too large",
        right=("saturated_at_start",),
        strengths=({"qk_gain": 4.0}, {"qk_gain": 8.0}),
        lab=({"init.qk_gain": 4.0}, {"init.qk_gain": 8.0}),
        fits=_of_scale,
        fits_lab=free_qk_config,
    ),
    Fault(
        name="initial weights too large",
        right=("saturated_at_start", "first_loss_too_high"),
        strengths=({"gain": 3.0}, {"gain": 6.0}),
        lab=({"init.gain": 3.0}, {"init.gain": 6.0}),
    ),
    Fault(
        name="tied embedding of std 1",
        right=("first_loss_too_high",),
        strengths=({"embedding_std": 0.5, "ties": True}, {"embedding_std": 1.0, "ties": True}),
        lab=(
            {"init.embedding_std": 0.5, "model.tie_embeddings": True},
            {"init.embedding_std": 1.0, "model.tie_embeddings": True},
        ),
    ),
    Fault(
        name="causal mask missing",
        right=("future_visible",),
        strengths=({"mask": "none"},),
        lab=({"attention.mask": "none"},),
        is_structural=True,
        fits=has_a_mask,
        fits_lab=decoder_config,
    ),
    Fault(
        name="causal mask off by one",
        right=("future_visible",),
        strengths=({"mask": "off_by_one"},),
        is_structural=True,
        fits=has_a_mask,
    ),
    Fault(
        name="causal mask transposed",
        right=("future_visible",),
        strengths=({"mask": "transposed"},),
        is_structural=True,
        fits=has_a_mask,
    ),
    Fault(
        name="causal mask of the wrong sign",
        right=("future_visible",),
        strengths=({"mask": "added"},),
        is_structural=True,
        fits=has_a_mask,
    ),
    Fault(
        name="causal mask too faint",
        right=("future_visible",),
        strengths=({"mask": "faint"},),
        is_structural=True,
        fits=has_a_mask,
    ),
    Fault(
        name="causal mask hides the token itself",
        right=("rows_fully_masked",),
        strengths=({"mask": "strict"},),
        fits=has_a_mask,
    ),
    Fault(
        name="padding mask missing",
        right=("padding_attended",),
        strengths=({"padding": "seen"},),
        lab=({"attention.mask": "none"},),
        fits=is_padded,
        fits_lab=encoder_config,
    ),
    Fault(
        name="padding mask inverted",
        right=("padding_attended",),
        strengths=({"padding": "inverted"},),
        is_structural=True,
        fits=is_padded,
    ),
    Fault(
        name="softmax over the queries",
        right=("wrong_softmax_axis",),
        strengths=({"softmax_axis": -2},),
        is_structural=True,
        fits=is_by_hand,
    ),
    Fault(
        name="attention over the batch",
        right=("attention_over_batch",),
        strengths=({"over_batch": True, "padding": "seen"},),
        is_structural=True,
        fits=is_own,
    ),
    Fault(
        name="keys repeated",
        right=("keys_repeated",),
        strengths=({"repeats_keys": True},),
        is_structural=True,
        fits=is_by_hand,
    ),
    Fault(
        name="heads dead",
        right=("uniform_attention",),
        strengths=({"dead_layers": (1,)}, {"dead_layers": (0, 1)}),
        is_structural=True,
        fits=_several_layers,
    ),
    Fault(
        name="heads identical",
        right=("identical_heads",),
        strengths=({"copies_heads": True},),
        is_structural=True,
        fits=is_by_hand,
    ),
    Fault(
        name="residual missing",
        right=("residual_missing",),
        strengths=({"has_residual": False}, {"has_residual": False, "n_layers": 5}),
        fits=is_own,
    ),
    Fault(
        name="residual of attention missing",
        right=("residual_missing",),
        strengths=({"has_attention_residual": False}, {"has_attention_residual": False, "n_layers": 5}),
        fits=is_own,
    ),
    Fault(
        name="norm over one feature",
        right=("norm_over_one_feature",),
        strengths=({"norm_over": "one"},),
        fits=lambda recipe: is_own(recipe) and recipe.norm != "none",
    ),
    Fault(
        name="float16 overflows",
        right=("half_precision_headroom", "saturated_at_start"),
        lab=(
            {"precision.dtype": "float16", "init.qk_gain": 40.0},
            {"precision.dtype": "float16", "init.qk_gain": 80.0},
        ),
        fits=nothing,
        fits_lab=free_qk_config,
    ),
)
