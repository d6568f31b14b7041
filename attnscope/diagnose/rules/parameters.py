"""Rules of parameters that are not trained as they should be: in no optimizer, without a gradient, without a learning rate."""

from collections.abc import Sequence, Set

import numpy as np

from attnscope.diagnose.blindness import NO_OPTIMIZER, answer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.findings import SEVERITIES, Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import members_of_rows
from attnscope.runs.probe_events import Upkeep, WithoutOptimizer
from attnscope.runs.probed import Told, upkeep_of, without_optimizer_of
from attnscope.runs.reader import Run

FEWEST_UPDATES = 3  # before it can be said that something never happens
# Of the parameters of a model: who trains the smaller part of it alone, a new head for instance, does so on purpose.
MOST_OF_IT = 0.5
TRAINED_BADLY = ("learning_rate_too_low", "plateau", "stalled")

MEASURED = (
    "measured: a decoder of 2 layers on a Markov chain, 200 steps, 6 seeds, ends 0.17 to 0.34 nats above its twin with AdamW at 1e-3, "
    "0.96 to 1.5 at 3e-3, above where it began at 1e-2, and with SGD, momentum 0.9, at 0.01 and 0.05 it is NaN in all of them"
)

NO_UPDATES = f"fewer than {FEWEST_UPDATES} updates"


def parameters_without_optimizer(run: Run) -> Finding | NotLooked | None:
    """Parameters have gradients, and no optimizer has them.

    What it looks at: in watched runs, the parameters of the modules that compute in the first steps, and have a gradient when an
    optimizer steps, after at least FEWEST_UPDATES of them: whether any optimizer of the process has them, and whether something
    else moves them. It is an error where they are those of modules in a Python list of a model that is trained otherwise, or
    where the optimizers have only parameters that never get a gradient; a warning where they are less than MOST_OF_IT of a
    model whose other parameters are trained; else a note.
    Why it matters: they stay as they were initialized.
    What to try: nn.ModuleList, nn.ModuleDict or nn.Sequential in place of a list or dict of modules; an optimizer that is made
    of all parameters, after the model has its final form; requires_grad_(False) of what is frozen on purpose.
    Known limits: modules inside of a compiled graph are not seen to compute.
    Source: what nn.Module.parameters() finds: https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html.
    """
    concerns, upkeep, is_reason = [], upkeep_of(run), False
    for each in without_optimizer_of(run):
        mine = [one.what for one in upkeep if one.member == each.member]
        steps = max((one.updates + one.steps_without_gradient for one in mine), default=0)
        if steps >= FEWEST_UPDATES and each.what.parameters:
            is_everything = not any(one.updates for one in mine)
            is_reason |= is_everything  # for optimizers that have no gradient at all
            concerns.append(_forgotten(each, is_everything=is_everything, steps=steps))
    finding = finding_of(
        run,
        concerns,
        rule="parameters_without_optimizer",
        title="No optimizer has some of the parameters",
        kind="cause",
        several="have parameters that no optimizer has",
        remedy=(
            "Hold modules in nn.ModuleList, nn.ModuleDict or nn.Sequential, and make the optimizer of all parameters of the model "
            "that is trained, once it has its final form. What is frozen on purpose: requires_grad_(False)."
        ),
        source="what nn.Module.parameters() finds",
        explains=(*TRAINED_BADLY, *(["parameters_without_gradient"] if is_reason else [])),
    )
    return answer(run, "parameters_without_optimizer", finding, without_upkeep(run))


def parameters_without_gradient(run: Run) -> Finding | NotLooked | None:
    """Parameters that an optimizer has never get a gradient.

    What it looks at: in watched runs, after at least FEWEST_UPDATES steps: optimizers none of whose parameters ever had a gradient
    after a loss was differentiated, and steps whose gradients are all exactly 0: an error where nothing else was trained. Parameters
    of layers that compute in the first steps and never had a gradient (a warning), and others that never had one (a note).
    Why it matters: they stay as they were initialized. A zero_grad() between backward() and step() throws all gradients away, a
    detach() or an operation without a derivative cuts off those of everything before it.
    What to try: zero_grad() before backward(); look between the named parameters and the loss for detach(), .data, .item(), argmax
    and torch.no_grad().
    Known limits: modules that are used only now and then (experts, heads of other tasks) are notes until they are used.
    Source: torch.autograd leaves .grad as None where no gradient arrives.
    """
    upkeep = upkeep_of(run)
    trained = {each.member for each in upkeep if each.what.updates}
    concerns = [concern for each in upkeep for concern in _never_reached(each, trained)]
    concerns += _all_zero(run, {each.member for each in concerns})
    finding = finding_of(
        run,
        _worst_of_each(concerns),
        rule="parameters_without_gradient",
        title="Parameters never get a gradient",
        kind="cause",
        several="have parameters that never get a gradient",
        remedy=(
            "Call zero_grad() before backward(), and not between it and step(). Look between these parameters and the loss for "
            "detach(), .data, .item(), argmax and torch.no_grad(); leave out what is not used."
        ),
        source="torch.autograd leaves .grad as None where no gradient arrives",
        explains=TRAINED_BADLY,
    )
    return answer(run, "parameters_without_gradient", finding, without_upkeep(run))


def parameters_frozen(run: Run) -> Finding | NotLooked | None:
    """Parameters have gradients, and a learning rate of 0 at every update.

    What it looks at: in watched runs, parameters of an optimizer whose group had a learning rate of 0 at each of at least
    FEWEST_UPDATES updates, while they had gradients: a warning, but a note where they are at least MOST_OF_IT of the optimizer's
    parameters, and not all of them: the body of a model whose head is trained, perhaps.
    Why it matters: they do not move, and their gradients are computed for nothing.
    What to try: another learning rate for the group; look at the schedule, which may divide whole numbers or count from the end; what
    is frozen on purpose: requires_grad_(False), which saves its gradients, too.
    Known limits: a learning rate that is a tensor is not looked at, nor updates that are rounded away.
    Source: an update is a multiple of the learning rate in every optimizer of torch.optim but Rprop.
    """
    concerns = []
    for each in upkeep_of(run):
        what = each.what
        if what.updates < FEWEST_UPDATES or not what.lr_zero:
            continue
        whole = what.lr_zero + what.detached + what.unused >= what.parameters
        on_purpose = not whole and what.lr_zero >= MOST_OF_IT * what.parameters
        which = f"all {what.parameters}" if whole else f"{what.lr_zero} of {what.parameters}"
        said = (
            f"{what.optimizer} made {what.updates} updates, and the learning rate of {which} parameters was 0 at each of them"
            f"{_listed(what.lr_zero, what.lr_zero_names)}."
        )
        concerns.append(_concern(each, said, what.lr_zero, what.lr_zero_names, "note" if on_purpose else "warning"))
    finding = finding_of(
        run,
        _worst_of_each(concerns),
        rule="parameters_frozen",
        title="Parameters have a learning rate of 0",
        kind="cause",
        several="have parameters with a learning rate of 0",
        remedy=(
            "Give the group a learning rate, and look at its schedule. What is frozen on purpose: requires_grad_(False), which "
            "saves its gradients, too."
        ),
        source="the learning rates of the optimizer's groups at every update",
        explains=TRAINED_BADLY,
    )
    return answer(run, "parameters_frozen", finding, without_upkeep(run))


def gradients_accumulate(run: Run) -> Finding | NotLooked | None:
    """Gradients are never zeroed: each update is made of those of all batches so far.

    What it looks at: in watched runs, gradients of a few parameters of each optimizer as a loss is about to be differentiated, from
    its second update to its fifth: if at each of at least FEWEST_UPDATES of them every backward pass since the last one began
    with gradients that were not 0. It is an error in members that diverged.
    Why it matters: the sum grows with every batch, and old gradients, of weights that are gone, outweigh the new one: as a
    momentum of 1, it does not settle.
    What to try: optimizer.zero_grad() before backward(), or after step().
    Known limits: a script that zeroes gradients only later in training is not looked at again.
    Source: MEASURED.
    """
    diverged = {member.name for member in run.members if member.diverged_at is not None}
    concerns = [
        _kept(each, "error" if each.member in diverged else "warning")
        for each in upkeep_of(run)
        if each.what.compared >= FEWEST_UPDATES and each.what.gradients_kept == each.what.compared
    ]
    finding = finding_of(
        run,
        _worst_of_each(concerns),
        rule="gradients_accumulate",
        title="Gradients are never zeroed",
        kind="cause",
        several="never zero their gradients",
        remedy="Call optimizer.zero_grad() before backward(), or after step().",
        source=MEASURED,
        explains=(
            "learning_rate_too_high",
            "logit_growth",
            "entropy_collapse",
            "clipping_always_on",
            "nonfinite",
            "loss_explosion",
            "loss_spike",
            "loss_rises",
            *TRAINED_BADLY,
        ),
    )
    return answer(run, "gradients_accumulate", finding, without_upkeep(run))


def _worst_of_each(concerns: Sequence[Concern]) -> list[Concern]:
    """One of each member, which may have several optimizers."""
    worst: dict[str, Concern] = {}
    for concern in sorted(concerns, key=lambda concern: SEVERITIES.index(concern.severity)):
        worst.setdefault(concern.member, concern)
    return list(worst.values())


def _kept(each: Told[Upkeep], severity: Severity) -> Concern:
    n, kept = each.what.compared, float(each.what.gradients_kept)
    evidence = Evidence(member=each.member, step=1, quantity="events", value=kept, threshold=float(n))
    said = (
        f"At each of {n} updates of {each.what.optimizer} that were looked at, the loss was differentiated while the gradients of "
        "the updates before were still there, and was added to them."
    )
    return Concern(member=each.member, step=1, badness=float(n), said=said, evidence=(evidence,), severity=severity)


def _forgotten(each: Told[WithoutOptimizer], *, is_everything: bool, steps: int) -> Concern:
    what, n = each.what, each.what.parameters
    said = f"{n} parameters get gradients, and no optimizer has them{_listed(n, what.names)}"
    severity: Severity = "note"
    if what.hidden:
        where = ", ".join(what.containers)
        said += f". {what.hidden} of them are those of modules in a Python container ({where}), where parameters() does not find"
        said += " them"
        severity = "error"
    elif is_everything:
        said += f": after {steps} steps, no parameter of an optimizer has had a gradient. It may have been made for another model"
        severity = "error"
    elif what.left_out and (what.share_left_out or 0.0) < MOST_OF_IT:
        said += f": {what.share_left_out or 0.0:.2g} of the model that the others belong to"
        severity = "warning"
    else:
        said += ". That may be on purpose"
    evidence = tuple(Evidence(member=each.member, step=each.step, group=name, quantity="events") for name in what.names)
    return Concern(member=each.member, step=0, badness=float(n), said=f"{said}.", evidence=evidence, severity=severity)


def _never_reached(each: Told[Upkeep], trained: Set[str]) -> list[Concern]:
    """Of one optimizer; members `trained` have one that updates."""
    what = each.what
    if what.steps_without_gradient >= FEWEST_UPDATES and not what.updates:
        why = ": zero_grad() stands between backward() and step()" if what.steps_zeroed else ""
        said = (
            f"{what.optimizer} stepped {what.steps_without_gradient} times after a loss was differentiated, and none of its "
            f"{what.parameters} parameters had a gradient{why}."
        )
        return [_concern(each, said, what.parameters, (), "warning" if each.member in trained else "error")]
    if what.updates < FEWEST_UPDATES:
        return []
    begun = f"In {what.updates} updates of {what.optimizer},"
    concerns = []
    if what.detached:
        said = (
            f"{begun} {what.detached} of its {what.parameters} parameters compute in the forward pass, and never got a gradient"
            f"{_listed(what.detached, what.detached_names)}."
        )
        concerns.append(_concern(each, said, what.detached, what.detached_names, "warning"))
    if what.unused:
        said = (
            f"{begun} {what.unused} of its {what.parameters} parameters never got a gradient; perhaps they are not used"
            f"{_listed(what.unused, what.unused_names)}."
        )
        concerns.append(_concern(each, said, what.unused, what.unused_names, "note"))
    return concerns


def _all_zero(run: Run, known: set[str]) -> list[Concern]:
    """Members all of whose gradients are exactly 0."""
    steps = run.steps
    codes_N, norm_N = members_of_rows(steps), steps["grad_norm"].to_numpy().astype(np.float64)
    measured_N = ~np.isnan(norm_N)
    n_M, moved_M = (
        np.bincount(codes_N[rows], minlength=len(run.entries)) for rows in (measured_N, measured_N & (norm_N != 0))
    )
    dead = [m for m in np.flatnonzero((n_M >= FEWEST_UPDATES) & (moved_M == 0)) if run.entries[m].name not in known]
    return [
        Concern(
            member=(name := run.entries[m].name),
            step=0,
            badness=float(n_M[m]),
            said=f"The gradient of {name} is exactly 0 at each of its {n_M[m]} updates: it is zeroed before them, or cut off.",
            evidence=(Evidence(member=name, step=0, quantity="grad_norm", value=0.0, threshold=0.0),),
            severity="error",
        )
        for m in dead
    ]


def _concern(each: Told[Upkeep], said: str, count: int, names: Sequence[str], severity: Severity) -> Concern:
    evidence = [Evidence(member=each.member, step=each.step, group=name, quantity="events") for name in names]
    whole = Evidence(member=each.member, step=each.step, quantity="events", value=float(count), threshold=0.0)
    return Concern(
        member=each.member,
        step=0,
        badness=float(count),
        said=said,
        evidence=(whole, *evidence),
        severity=severity,
    )


def _listed(count: int, names: Sequence[str]) -> str:
    """The first names, in brackets."""
    if not names:
        return ""
    more = f" and {count - 3} more" if count > 3 else ""
    return f" ({', '.join(names[:3])}{more})"


def without_upkeep(run: Run) -> dict[str, str]:
    """Members of a watched script whose optimizers were not looked at."""
    if run.kind != "watch":
        return without_steps(run)  # trains all of its parameters
    blind, upkeep = {}, upkeep_of(run)
    for entry in run.entries:
        mine = [each.what for each in upkeep if each.member == entry.name]
        if not mine:
            blind[entry.name] = NO_OPTIMIZER
        elif all(each.updates + each.steps_without_gradient < FEWEST_UPDATES for each in mine):
            blind[entry.name] = NO_UPDATES
    return blind
