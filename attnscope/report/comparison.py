"""What a comparison says: one sentence for the verdict, and its tables."""

import statistics
from collections.abc import Sequence

from attnscope.comparison.cells import EFFECTS, Comparison, SingleChange
from attnscope.comparison.member import MemberRow
from attnscope.comparison.statistics import FEWEST, LEVEL
from attnscope.comparison.subjects import Cell, outcome_text
from attnscope.config import short_names
from attnscope.report.blocks import Table
from attnscope.report.numbers import number

MOST_NAMED = 6  # changes in the sentence
FEW = 4  # members that stand side by side, as columns
A_RANGE = 3  # learning rates from which on a sweep is about them


def sentence_on(comparison: Comparison) -> str | None:
    """What single settings do to the baseline, or up to which learning rate arms are stable; None if there is neither."""
    if comparison.baseline is None:
        return None
    said = _on_changes(comparison.baseline, comparison.changes)
    if said is None or any(len(arm.cells) >= A_RANGE for arm in comparison.lr_arms):
        arms = [
            arm
            for arm in comparison.lr_arms  # of the others nothing ended that would tell
            if arm.stable is not None or arm.bracket == arm.cells[0][0]
        ]
        stable = [
            f"{arm.name} {'none' if arm.stable is None else f'{arm.stable:.3g}'}"
            + ("" if arm.bracket is None else f" (diverges at {arm.bracket:.3g})")
            for arm in arms[:MOST_NAMED]
        ]
        more = f" and {len(arms) - MOST_NAMED} more arms" if len(arms) > MOST_NAMED else ""
        return f"Largest stable learning rate: {', '.join(stable)}{more}." if stable else said
    return said


def _on_changes(baseline: Cell, changes: Sequence[SingleChange]) -> str | None:
    words = short_names(baseline.settings)
    by_effect: dict[str, list[str]] = {}
    for change in changes:
        by_effect.setdefault(change.effect, []).append(f"{words[change.setting]}={change.value}")
    verbs = {
        "rescues": ("rescues it", "rescue it"),
        "hides": (
            "only hides it: nothing diverges, but not all learn",
            "only hide it: nothing diverges, but not all learn",
        ),
        "helps": ("helps some seeds", "help some seeds"),
        "does not help": ("does not help", "do not help"),
        "stalls": ("makes members stall", "make members stall"),
        "breaks": ("makes members diverge", "make members diverge"),
        "keeps": ("keeps it training", "keep it training"),
    }
    said = []
    for effect, (one, several) in verbs.items():
        named = by_effect.get(effect, [])
        if named:
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            said.append(f"{', '.join(named[:MOST_NAMED])}{more} {one if len(named) == 1 else several}")
    if not said:
        return None
    return f"Baseline {baseline.name}: {outcome_text(baseline)}. Changed alone, {'; '.join(said)}."


def change_table(comparison: Comparison) -> Table | None:
    """What each single setting does to the baseline."""
    if comparison.baseline is None or not comparison.changes:
        return None
    differences = {difference.cell: difference for difference in comparison.differences}
    words = short_names(comparison.axes)
    rows = [
        ("(baseline)", "", outcome_text(comparison.baseline), "", mean_and_range(comparison.baseline.final_losses), "")
    ]
    for change in comparison.changes:
        difference = differences.get(change.cell.name)
        rows.append(
            (
                words[change.setting],
                change.value,
                outcome_text(change.cell),
                change.effect,
                mean_and_range(change.cell.final_losses),
                "-" if difference is None else with_interval(difference.mean, difference.interval, signed=True),
            )
        )
    used = dict.fromkeys(change.effect for change in comparison.changes)
    meaning = "; ".join(f"{effect}: {EFFECTS[effect]}" for effect in used if effect in EFFECTS)
    return Table(
        titles=("setting", "value", "outcome", "effect", "final loss", "loss - baseline"),
        rows=tuple(rows),
        words=4,
        caption=f"Baseline {comparison.baseline.name}, with one setting changed at a time. {meaning}. {HOW_COMPARED}",
    )


HOW_COMPARED = (
    "final loss: mean over the members that did not diverge (smallest to largest), nats per token. loss - baseline: mean over "
    f"pairs that share seed and data, with its {LEVEL:.0%} bootstrap-t interval from {FEWEST} pairs on, unless most of them "
    "nearly tie; a member that diverged counts with its first loss."
)


def cell_table(comparison: Comparison, *, names: bool = False) -> Table:
    """Every cell: outcome, losses, when it diverged, and how it compares.

    Args:
        comparison: whose cells these are.
        names: one column with the cell's name, in place of one for each setting.
    """
    differences = {difference.cell: difference for difference in comparison.differences}
    compared = bool(comparison.differences)
    keys = [] if names else list(comparison.axes)
    words = short_names(comparison.axes)
    rows = []
    for cell in comparison.cells:
        difference = differences.get(cell.name)
        last = "baseline" if cell is comparison.baseline else "-"
        if difference is not None:
            last = with_interval(difference.mean, difference.interval, signed=True)
        rows.append(
            (
                *((cell.name,) if names or not keys else ()),
                *(cell.settings[key] for key in keys),
                outcome_text(cell),
                mean_and_range(cell.final_losses),
                steps_text(cell.diverged_at),
                *((last,) if compared else ()),
            )
        )
    return Table(
        titles=(
            *(("cell",) if names or not keys else ()),
            *(words[key] for key in keys),
            "outcome",
            "final loss",
            "diverged at",
            *(("loss - baseline",) if compared else ()),
        ),
        rows=tuple(rows),
        words=1 + max(1, len(keys)),
        caption=f"Members that differ in nothing but their seed are one row. {HOW_COMPARED} diverged at: median step "
        "(first to last).",
    )


def lr_table(comparison: Comparison) -> Table | None:
    """Learning rates per arm; None where none differ."""
    if not comparison.lr_arms:
        return None
    rows = [
        (
            arm.name,
            "none" if arm.stable is None else f"{arm.stable:.3g}",
            "-" if arm.bracket is None else f"{arm.bracket:.3g}",
            "-" if arm.best is None else f"{arm.best:.3g}",
            "-" if arm.sensitivity is None else with_interval(arm.sensitivity, arm.interval),
        )
        for arm in comparison.lr_arms
    ]
    return Table(
        titles=("arm", "largest stable lr", "diverges at", "best lr", "LR sensitivity"),
        rows=tuple(rows),
        words=1,
        caption="largest stable lr: no member diverged up to it; diverges at: the next one tried. LR sensitivity: mean over "
        "learning rates of min(final loss, first loss) minus the best, nats per token (Wortsman et al. 2023); it depends on "
        "the range, which all arms here share.",
    )


def member_table(members: Sequence[MemberRow]) -> Table:
    """Few members as columns: the settings in which they differ, then how they ended and what their attention was like."""
    keys = dict.fromkeys(key for member in members for key in member.settings)
    rows = [(key, *(member.settings.get(key, "-") for member in members)) for key in keys]
    for title, column in (
        ("first loss", "first_loss"),
        ("best loss", "best_loss"),
        ("final loss", "final_loss"),
        ("val_loss", "val_loss"),
    ):
        rows.append((title, *(number(getattr(member, column)) for member in members)))
    rows += [
        (
            column,
            *(f"{number(getattr(member.start, column))} → {number(getattr(member.end, column))}" for member in members),
        )
        for column in ("entropy", "entropy_ratio", "max_prob", "max_logit")
    ]
    at = ("outcome", *(_ended(member) for member in members))
    rows.insert(len(keys), at)
    return Table(
        titles=("", *(member.name for member in members)),
        rows=tuple(rows),
        words=1,
        caption="Losses in nats per token. Attention: first step measured → last step at which it was still finite, mean over "
        "layers and heads (max_logit: the largest).",
    )


def _ended(member: MemberRow) -> str:
    if member.status in ("trained", "stalled") or member.step is None:
        return member.status
    return f"{member.status} at step {member.step}"


def comparison_tables(comparison: Comparison, members: Sequence[MemberRow]) -> list[Table]:
    """All of it: members as columns where they are few, else cells as rows."""
    if len(members) <= FEW:
        return [member_table(members)]
    tables = [change_table(comparison), lr_table(comparison), cell_table(comparison)]
    return [table for table in tables if table is not None]


def mean_and_range(values: Sequence[float]) -> str:
    """3.02, or 3.04 (3.02–3.07) of several."""
    if not values:
        return "-"
    mean = number(sum(values) / len(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({number(min(values))}–{number(max(values))})"


def steps_text(steps: Sequence[int]) -> str:
    """10, or 10 (7–17) of several."""
    if not steps:
        return "-"
    if len(steps) == 1:
        return str(steps[0])
    return f"{statistics.median_low(steps)} ({min(steps)}–{max(steps)})"


def with_interval(mean: float, interval: tuple[float, float] | None, *, signed: bool = False) -> str:
    """-0.31 [-0.40, -0.22]."""
    sign = "+" if signed and mean > 0 else ""
    if interval is None:
        return f"{sign}{number(mean)}"
    return f"{sign}{number(mean)} [{number(interval[0])}, {number(interval[1])}]"
