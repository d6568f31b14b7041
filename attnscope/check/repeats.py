"""Whether the same pass gives the same output: dropout where there should be none, random numbers that no seed reaches."""

import torch

from attnscope.check.attention import Observed
from attnscope.check.case import NOISE, SEED, Case, Mode, change_BP, first_changed
from attnscope.check.result import Checked, failed, not_looked, passed, short


def dropout_in_evaluation(case: Case, _: Observed) -> Checked:
    """Whether two passes in evaluation mode agree, whatever the random numbers are."""
    before = case.outputs["evaluation"]
    after = case.run(case.batch, "evaluation", seed=SEED + 1)
    apart = float(change_BP(before, after).max())
    return _repeated(
        case,
        name="dropout in evaluation",
        mode="evaluation",
        apart=apart,
        other_seed=SEED + 1,
        said="Two passes in evaluation mode with different seeds",
        remedy=(
            "Pass training=self.training to F.dropout and dropout_p=p if self.training else 0.0 to "
            "F.scaled_dot_product_attention, or use nn.Dropout."
        ),
    )


def repeatable_training(case: Case, _: Observed) -> Checked:
    """Whether two passes in training mode with the same seed agree."""
    name = "repeatable training"
    if "training" not in case.outputs:
        return not_looked(
            name,
            f"The pass in training mode failed: {case.problems['training'].rstrip('.')}.",
            "Give a batch with which the model can train.",
        )
    return _repeated(
        case,
        name=name,
        mode="training",
        apart=case.noise("training"),
        other_seed=SEED,
        said="Two passes in training mode with the same seed",
        remedy=(
            "Draw random numbers from the global generators of torch, numpy or random, or seed your own generator; on a GPU, see "
            "torch.use_deterministic_algorithms."
        ),
    )


def _repeated(case: Case, *, name: str, mode: Mode, apart: float, other_seed: int, said: str, remedy: str) -> Checked:
    evidence: list[dict[str, object]] = [{"mode": mode, "change": apart, "compared with": NOISE}]
    if apart <= NOISE:
        how = "by nothing" if apart == 0 else f"by {short(apart)} of the largest output"
        return passed(name, f"{said} differ {how}.", evidence)
    everywhere = torch.ones_like(case.batch.real_BT)
    first = first_changed(case.trace(case.batch, mode), case.trace(case.batch, mode, seed=other_seed), everywhere)
    evidence[0]["first module"] = first
    begins = f", from {first} on" if first else ""
    finding = f"{said} differ by {short(apart)} of the largest output{begins}."
    return failed(name, finding, evidence, remedy)
