"""Rules of normalization: a norm that leaves nothing of what it is given."""

from attnscope.diagnose.blindness import answer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.findings import Evidence, Finding, NotLooked
from attnscope.runs.probe_events import NormsOverOne
from attnscope.runs.probed import told
from attnscope.runs.reader import Run


def norm_over_one_feature(run: Run) -> Finding | NotLooked | None:
    """A norm normalizes over a single number.

    What it looks at: in watched runs, calls of layer norm, RMS norm and group norm in the first two steps: over how many numbers
    each takes its statistics. It is an error where that is one, for an RMS norm a warning.
    Why it matters: a number less its own mean is 0: whatever comes in, the bias comes out, and no gradient goes back. An RMS
    norm leaves the sign.
    What to try: give the norm the size of the features (LayerNorm(d_model)), and mind which axis they are on; fewer groups than
    channels. Where a model has a single feature (a series of one value), project it to a width before.
    Known limits: norms that are written by hand and those in compiled graphs are not seen; batch and instance norms over one
    number raise in PyTorch. A norm over several numbers of the wrong axis is not told from one that is meant so.
    Source: the definition: (x − mean x) / √(var x + ε) of one number is 0.
    """
    concerns = []
    for each in reversed({each.member: each for each in reversed(told(run, NormsOverOne))}.values()):
        what = each.what
        if not what.over_one:
            continue
        first = what.names[0] if what.names else "a norm"
        more = f" and {what.over_one - 1} more" if what.over_one > 1 else ""
        only_sign = what.sign_left >= what.over_one
        said = (
            f"{first}{more} of the {what.norms} norms seen {'normalize' if more else 'normalizes'} over a single number: "
            + ("of what comes in, only the sign is left." if only_sign else "whatever comes in, the bias comes out.")
        )
        names = what.names or (None,)
        concerns.append(
            Concern(
                member=each.member,
                step=each.step,
                badness=float(what.over_one),
                said=said,
                evidence=tuple(
                    Evidence(member=each.member, step=each.step, group=name, quantity="events", value=1.0)
                    for name in names
                ),
                severity="warning" if only_sign else "error",
            )
        )
    finding = finding_of(
        run,
        concerns,
        rule="norm_over_one_feature",
        title="A norm normalizes over a single number",
        kind="cause",
        several="have norms over a single number",
        remedy=(
            "Give the norm the size of the features (LayerNorm(d_model)), fewer groups than channels, and a model of single "
            "values a projection to a width before it."
        ),
        source="the definition of normalization",
        explains=(
            "parameters_without_gradient",
            "gradients_vanish_with_depth",
            "uniform_attention",
            "starved_queries_and_keys",
            "rank_collapse",
            "keys_repeated",
            "plateau",
            "stalled",
        ),
    )
    return answer(run, "norm_over_one_feature", finding, without_steps(run))
