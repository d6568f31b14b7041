"""Rules of the mode that a model is in: dropout while it is evaluated, evaluation while it is trained, another attention in each."""

from attnscope.diagnose.blindness import answer, without_attention, without_optimizer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.diagnose.rules.masks import layer_names, named
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.probe_events import AttentionInOtherMode, DropoutInEvaluation, EvaluationInTraining
from attnscope.runs.probed import Told, told
from attnscope.runs.reader import Run

# The smaller scale by the larger one. A fit is right to 0.03; who leaves 1/sqrt(d_head) out has 0.5 at d_head 4, and less above it.
OTHER_SCALE = 0.8
# Share of query rows that see a later key: all do without a mask, and none under a causal one.
NEARLY_ALL_ROWS = 0.9
NO_EVALUATION = (
    "no evaluation over as many positions as training was seen at a measured step, right before its training"
)


def dropout_in_evaluation(run: Run) -> Finding | NotLooked | None:
    """The loss is evaluated with dropout on.

    What it looks at: in watched runs, the first cross-entropies that are computed without gradients, of what is computed without
    them, after the first update: whether the model is in training mode and has modules that drop something.
    Why it matters: the loss on held-out data is that of a worse model, and another one at every evaluation.
    What to try: model.eval() before, model.train() after.
    Known limits: other losses than cross-entropy are not seen in evaluation, nor dropout that is no module (the dropout_p of
    F.scaled_dot_product_attention); it may be on purpose, to see how sure a model is.
    Source: Srivastava et al. 2014: units are dropped in training alone.
    """
    concerns = [
        _concern(
            each,
            f"At step {each.step}, {each.what.model} computes a loss without gradients while it is in training mode: "
            f"{each.what.dropouts} modules drop up to {each.what.dropout or 0.0:.2g} of what they are given.",
            each.what.dropout or 0.0,
        )
        for each in reversed({each.member: each for each in reversed(told(run, DropoutInEvaluation))}.values())
    ]
    finding = finding_of(
        run,
        concerns,
        rule="dropout_in_evaluation",
        title="Dropout is on in evaluation",
        kind="cause",
        several="are evaluated with dropout",
        remedy="Call model.eval() before evaluation and model.train() after it.",
        source="Srivastava et al. 2014",
    )
    return answer(run, "dropout_in_evaluation", finding, _without_optimizer(run))


def evaluation_in_training(run: Run) -> Finding | NotLooked | None:
    """The model is trained in evaluation mode.

    What it looks at: in watched runs, whether all modules of a model whose parameters an optimizer has are in evaluation mode
    as its loss is differentiated, and whether it has dropout or batch norms that are told of it. It is a warning where
    it was in training mode before, or has batch norms; else a note: who fine-tunes may want it so.
    Why it matters: nothing is dropped, and batch norms take statistics that were gathered before, from the start 0 and 1.
    What to try: model.train() before training, and after every evaluation.
    Known limits: dropout that is no module is not counted.
    Source: Srivastava et al. 2014; Ioffe & Szegedy 2015.
    """
    concerns = []
    for each in reversed({each.member: each for each in reversed(told(run, EvaluationInTraining))}.values()):
        what = each.what
        parts = {"modules that drop something": what.dropouts, "batch norms": what.batch_norms}
        changed = " and ".join(f"{n} {name}" for name, n in parts.items() if n)
        if not changed:
            continue
        before = ", and was in training mode before" if what.losses_before else ""
        severity: Severity = "warning" if what.losses_before or what.batch_norms else "note"
        said = f"At step {each.step}, {what.model} is trained in evaluation mode{before}: it has {changed}."
        concerns.append(_concern(each, said, float(what.dropouts + what.batch_norms), severity))
    finding = finding_of(
        run,
        concerns,
        rule="evaluation_in_training",
        title="The model is trained in evaluation mode",
        kind="cause",
        several="are trained in evaluation mode",
        remedy="Call model.train() before training, and after every evaluation.",
        source="Srivastava et al. 2014; Ioffe & Szegedy 2015",
        explains=("loss_explosion", "plateau", "stalled"),
    )
    return answer(run, "evaluation_in_training", finding, _without_optimizer(run))


def evaluation_scales_otherwise(run: Run) -> Finding | NotLooked | None:
    """Attention is another one in evaluation than in training.

    What it looks at: in watched runs, one evaluation of each layer, beside its calls in training over as many positions at the same
    step: what multiplies q.k (the smaller by the larger below OTHER_SCALE), and whether queries see keys after
    them: none in training, and NEARLY_ALL_ROWS in evaluation. The calls of one query with a cache are left out.
    Why it matters: the loss on held-out data, and what is generated, are those of a model that nobody trained.
    What to try: one function for both modes; nothing but dropout may depend on self.training.
    Known limits: an evaluation at a step that is not measured, or over other lengths, is not looked at, nor one after which nothing
    is trained; a scale is known where a single number multiplies q.k.
    Source: Vaswani et al. 2017, section 3.2.1; what is compared are the calls themselves.
    """
    if run.kind != "watch":
        return None
    looked, names = told(run, AttentionInOtherMode), layer_names(run)
    concerns = []
    for entry in run.entries:
        mine = [each for each in looked if each.member == entry.name]
        found = [(each, said) for each in mine if (said := _otherwise(each.what))]
        if found:
            worst, said = found[0]
            concerns.append(
                Concern(
                    member=entry.name,
                    step=worst.step,
                    badness=float(len(found)),
                    said=(
                        f"At step {worst.step}, in {len(found)} of {len(mine)} attention layers that were compared, evaluation attends "
                        f"otherwise than training: {named(names, worst.member, worst.what.layer)} {said}."
                    ),
                    evidence=tuple(
                        Evidence(
                            member=each.member,
                            step=each.step,
                            layer=each.what.layer,
                            quantity="events",
                            value=each.what.scale_ratio,
                            threshold=OTHER_SCALE,
                        )
                        for each, _ in found
                    ),
                    severity="warning",
                )
            )
    finding = finding_of(
        run,
        concerns,
        rule="evaluation_scales_otherwise",
        title="Attention is another one in evaluation",
        kind="cause",
        several="attend otherwise in evaluation than in training",
        remedy="Use one function for both modes: nothing but dropout may depend on self.training.",
        source="Vaswani et al. 2017, section 3.2.1",
    )
    compared = {each.member for each in looked}
    blind = {entry.name: NO_EVALUATION for entry in run.entries if entry.name not in compared}
    return answer(run, "evaluation_scales_otherwise", finding, blind | without_attention(run))


def _otherwise(what: AttentionInOtherMode) -> str:
    """In words, what is other in evaluation; empty where nothing is."""
    said = []
    if what.scale_ratio is not None and 0 < what.scale_ratio < OTHER_SCALE:
        times = f"{1 / what.scale_ratio:.3g} times" if what.is_larger else f"1/{1 / what.scale_ratio:.3g} of"
        said.append(f"multiplies q.k by {times} what it does in training")
    if what.later_rows_trained == 0 and (what.later_rows or 0.0) >= NEARLY_ALL_ROWS:
        said.append("lets queries see the keys after them, which training hides")
    return " and ".join(said)


def _concern(
    each: Told[DropoutInEvaluation] | Told[EvaluationInTraining],
    said: str,
    value: float,
    severity: Severity = "warning",
) -> Concern:
    evidence = Evidence(member=each.member, step=each.step, quantity="events", value=value)
    return Concern(
        member=each.member, step=each.step, badness=value, said=said, evidence=(evidence,), severity=severity
    )


def _without_optimizer(run: Run) -> dict[str, str]:
    """Members of a watched script whose updates were not seen; this lab changes the mode of nothing."""
    return (without_optimizer(run) if run.kind == "watch" else {}) | without_steps(run)
