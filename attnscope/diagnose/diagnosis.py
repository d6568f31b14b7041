"""Every rule, causes before symptoms, and the one function that asks them all."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from attnscope.diagnose.chains import chains, linked
from attnscope.diagnose.confidence import measured
from attnscope.diagnose.rules.axes import attention_over_batch, keys_repeated
from attnscope.diagnose.rules.batches import poisoned_batch, repeated_batch
from attnscope.diagnose.rules.clipping import clipped_after_step, clipped_before_unscaling, clipping_always_on
from attnscope.diagnose.rules.collapse import entropy_collapse, rank_collapse
from attnscope.diagnose.rules.data import first_loss_too_high, loss_too_low, plateau
from attnscope.diagnose.rules.depth import gradients_explode_with_depth, gradients_vanish_with_depth
from attnscope.diagnose.rules.descent import loss_rises
from attnscope.diagnose.rules.future import future_visible, labels_shifted_wrong
from attnscope.diagnose.rules.heads import attention_sink, identical_heads, uniform_attention
from attnscope.diagnose.rules.learning_rate import learning_rate_too_high, learning_rate_too_low
from attnscope.diagnose.rules.logits import logit_growth, starved_queries_and_keys
from attnscope.diagnose.rules.loss import failed, loss_explosion, loss_spike, stalled
from attnscope.diagnose.rules.masks import padding_attended, rows_fully_masked, wrong_softmax_axis
from attnscope.diagnose.rules.modes import dropout_in_evaluation, evaluation_in_training, evaluation_scales_otherwise
from attnscope.diagnose.rules.nonfinite import nonfinite, nonfinite_loss_passed, updates_skipped
from attnscope.diagnose.rules.norms import norm_over_one_feature
from attnscope.diagnose.rules.optimizer import adam_epsilon_too_large, weight_decay_too_strong
from attnscope.diagnose.rules.parameters import (
    gradients_accumulate,
    parameters_frozen,
    parameters_without_gradient,
    parameters_without_optimizer,
)
from attnscope.diagnose.rules.precision import half_precision_headroom, loss_scale_collapse, updates_round_away
from attnscope.diagnose.rules.residual import residual_missing
from attnscope.diagnose.rules.saturation import saturated_at_start
from attnscope.diagnose.rules.scale import applied_scale, unusual_scale
from attnscope.diagnose.rules.schedule import learning_rate_jump, missing_warmup
from attnscope.diagnose.rules.sums import accumulation_not_divided, loss_summed
from attnscope.findings import Finding, NotLooked, to_table
from attnscope.runs.layout import to_json
from attnscope.runs.reader import Run

Rule = Callable[[Run], Finding | NotLooked | None]

RULES: tuple[Rule, ...] = (
    wrong_softmax_axis,
    attention_over_batch,
    norm_over_one_feature,
    keys_repeated,
    future_visible,
    labels_shifted_wrong,
    rows_fully_masked,
    padding_attended,
    parameters_without_optimizer,
    parameters_without_gradient,
    parameters_frozen,
    gradients_accumulate,
    clipped_before_unscaling,
    clipped_after_step,
    evaluation_in_training,
    dropout_in_evaluation,
    evaluation_scales_otherwise,
    residual_missing,
    repeated_batch,
    loss_rises,
    applied_scale,
    saturated_at_start,
    first_loss_too_high,
    half_precision_headroom,
    updates_round_away,
    loss_summed,
    accumulation_not_divided,
    adam_epsilon_too_large,
    weight_decay_too_strong,
    learning_rate_jump,
    missing_warmup,
    learning_rate_too_high,
    learning_rate_too_low,
    gradients_explode_with_depth,
    gradients_vanish_with_depth,
    clipping_always_on,
    logit_growth,
    entropy_collapse,
    uniform_attention,
    starved_queries_and_keys,
    identical_heads,
    attention_sink,
    unusual_scale,
    poisoned_batch,
    nonfinite,
    nonfinite_loss_passed,
    loss_scale_collapse,
    updates_skipped,
    loss_explosion,
    loss_spike,
    loss_too_low,
    plateau,
    rank_collapse,
    stalled,
    failed,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What every rule says of a run; one that is in neither looked everywhere and found nothing.

    Attributes:
        findings: causes before symptoms, and notes last; what nothing else explains comes first.
        not_looked: rules that could not look, and why; each stands alone, its `also` beside it.
        chains: of findings, each explained by the one before it: from a cause to what became of it.
    """

    findings: tuple[Finding, ...]
    not_looked: tuple[NotLooked, ...]
    chains: tuple[tuple[Finding, ...], ...] = ()


def examine(run: Run) -> Diagnosis:
    """Ask every rule; a run that is still training is judged by what it has recorded."""
    answers = [answer for rule in RULES if (answer := rule(run)) is not None]
    not_looked = [
        replace(each, also=())
        for answer in answers
        for each in ((answer,) if isinstance(answer, NotLooked) else ()) + answer.also
        if isinstance(each, NotLooked)
    ]
    confidence = measured()
    findings = linked(
        [replace(each, confidence=confidence.get(each.rule)) for each in answers if isinstance(each, Finding)]
    )
    return Diagnosis(findings=findings, not_looked=tuple(not_looked), chains=chains(findings))


def diagnose(run: Run) -> tuple[Finding, ...]:
    """What every rule finds in a run, causes first."""
    return examine(run).findings


def findings_json(run: Run, diagnosis: Diagnosis) -> str:
    """What was looked for, what was found, and where nobody could look, for machines."""
    said = {
        "run": run.name,
        "status": run.status,
        "members": [{"name": each.name, "status": each.status, "error": each.error} for each in run.members],
        "rules": [rule.__name__ for rule in RULES],
        "findings": [to_table(finding) for finding in diagnosis.findings],
        "chains": [[finding.rule for finding in chain] for chain in diagnosis.chains],
        "not_looked": [to_table(each) for each in diagnosis.not_looked],
        "lost": run.lost,
    }
    return to_json(said, indent=1)
