"""Rules of parameters that are not trained as they should be: in no optimizer, without a gradient, without a learning rate."""

import numpy as np

from attnscope.diagnose.blindness import NO_OPTIMIZER, answer, without_steps
from attnscope.diagnose.concern import Concern, finding_of
from attnscope.findings import Evidence, Finding, NotLooked, Severity
from attnscope.runs.by_member import members_of_rows
from attnscope.runs.probed import Some, Upkeep, WithoutOptimizer, upkeep_of, without_optimizer_of
from attnscope.runs.reader import Run

FEWEST_UPDATES = 3  # before it can be said that something never happens
# Of the numbers of a model: who trains the smaller part of it alone, a new head for instance, does so on purpose.
MOST_OF_IT = 0.5
TRAINED_BADLY = ("plateau", "stalled")

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
    concerns = []
    for each in without_optimizer_of(run):
        mine = [one for one in upkeep_of(run) if one.member == each.member]
        steps = max((one.updates + one.steps_without_gradient for one in mine), default=0)
        if steps >= FEWEST_UPDATES and each.some.count:
            concerns.append(_forgotten(each, is_everything=not any(one.updates for one in mine), steps=steps))
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
        explains=(*TRAINED_BADLY, "parameters_without_gradient"),
    )
    return answer(run, "parameters_without_optimizer", finding, _without_upkeep(run))


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
    concerns = [each for one in upkeep_of(run) for each in _never_reached(one, run)]
    concerns += _all_zero(run, {each.member for each in concerns})
    worst: dict[str, Concern] = {}
    for each in sorted(concerns, key=lambda each: ("error", "warning", "note").index(each.severity)):
        worst.setdefault(each.member, each)
    finding = finding_of(
        run,
        list(worst.values()),
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
    return answer(run, "parameters_without_gradient", finding, _without_upkeep(run))


def parameters_frozen(run: Run) -> Finding | NotLooked | None:
    """Parameters have gradients, and a learning rate of 0 at every update.

    What it looks at: in watched runs, parameters of an optimizer whose group had a learning rate of 0 at each of at least
    FEWEST_UPDATES updates, while they had gradients. All parameters of an optimizer are a warning, some a note.
    Why it matters: they do not move, and their gradients are computed for nothing.
    What to try: another learning rate for the group; look at the schedule, which may divide whole numbers or count from the end; what
    is frozen on purpose: requires_grad_(False), which saves its gradients, too.
    Known limits: a learning rate that is a tensor is not looked at, nor updates that are rounded away.
    Source: an update is a multiple of the learning rate in every optimizer of torch.optim but Adadelta's kind.
    """
    concerns = []
    for each in upkeep_of(run):
        if each.updates < FEWEST_UPDATES or not each.lr_zero.count:
            continue
        whole = each.lr_zero.count + each.detached.count + each.unused.count >= each.parameters
        which = f"all {each.parameters}" if whole else f"{each.lr_zero.count} of {each.parameters}"
        concerns.append(
            _concern(
                each,
                f"{each.optimizer} made {each.updates} updates, and the learning rate of {which} parameters was 0 at each of them"
                f"{_listed(each.lr_zero)}.",
                each.lr_zero,
                "warning" if whole else "note",
            )
        )
    finding = finding_of(
        run,
        concerns,
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
    return answer(run, "parameters_frozen", finding, _without_upkeep(run))


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
        if each.compared >= FEWEST_UPDATES and each.gradients_kept == each.compared
    ]
    finding = finding_of(
        run,
        concerns,
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
    return answer(run, "gradients_accumulate", finding, _without_upkeep(run))


def _kept(each: Upkeep, severity: Severity) -> Concern:
    n = each.compared
    evidence = Evidence(
        member=each.member, step=1, quantity="events", value=float(each.gradients_kept), threshold=float(n)
    )
    said = (
        f"At each of {n} updates of {each.optimizer} that were looked at, the loss was differentiated while the gradients of the "
        "updates before were still there, and was added to them."
    )
    return Concern(member=each.member, step=1, badness=float(n), said=said, evidence=(evidence,), severity=severity)


def _forgotten(each: WithoutOptimizer, *, is_everything: bool, steps: int) -> Concern:
    n = each.some.count
    said = f"{n} parameters get gradients, and no optimizer has them{_listed(each.some)}"
    severity: Severity = "note"
    if each.hidden:
        where = ", ".join(each.hidden)
        said += f". {sum(each.hidden.values())} of them are those of modules in a Python container ({where}), where "
        said += "parameters() does not find them"
        severity = "error"
    elif is_everything:
        said += f": after {steps} steps, no parameter of an optimizer has had a gradient. It may have been made for another model"
        severity = "error"
    elif each.left_out and each.share < MOST_OF_IT:
        said += f": {each.share:.2g} of the model that the others belong to"
        severity = "warning"
    else:
        said += ". That may be on purpose"
    evidence = tuple(
        Evidence(member=each.member, step=each.step, group=name, quantity="events") for name in each.some.names
    )
    return Concern(member=each.member, step=0, badness=float(n), said=f"{said}.", evidence=evidence, severity=severity)


def _never_reached(each: Upkeep, run: Run) -> list[Concern]:
    """Of one optimizer."""
    if each.steps_without_gradient >= FEWEST_UPDATES and not each.updates:
        others = any(one.updates for one in upkeep_of(run) if one.member == each.member)
        why = ": zero_grad() stands between backward() and step()" if each.zeroed else ""
        said = (
            f"{each.optimizer} stepped {each.steps_without_gradient} times after a loss was differentiated, and none of its "
            f"{each.parameters} parameters had a gradient{why}."
        )
        everything = Some(count=each.parameters, names=())
        return [_concern(each, said, everything, "warning" if others else "error")]
    if each.updates < FEWEST_UPDATES:
        return []
    found: list[Concern] = []
    for some, severity, what in (
        (each.detached, "warning", "compute in the forward pass, and never got a gradient"),
        (each.unused, "note", "never got a gradient; perhaps they are not used"),
    ):
        if some.count:
            said = f"In {each.updates} updates of {each.optimizer}, {some.count} of its {each.parameters} parameters {what}"
            found.append(_concern(each, f"{said}{_listed(some)}.", some, severity))  # type: ignore[arg-type]
    return found


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


def _concern(each: Upkeep, said: str, some: Some, severity: Severity) -> Concern:
    evidence = tuple(Evidence(member=each.member, step=each.step, group=name, quantity="events") for name in some.names)
    whole = Evidence(member=each.member, step=each.step, quantity="events", value=float(some.count), threshold=0.0)
    return Concern(
        member=each.member,
        step=0,
        badness=float(some.count),
        said=said,
        evidence=(whole, *evidence),
        severity=severity,
    )


def _listed(some: Some) -> str:
    """The first names, in brackets."""
    if not some.names:
        return ""
    more = f" and {some.count - 3} more" if some.count > 3 else ""
    return f" ({', '.join(some.names[:3])}{more})"


def _without_upkeep(run: Run) -> dict[str, str]:
    """Members of a watched script whose optimizers were not looked at."""
    if run.kind != "watch":
        return without_steps(run)  # trains all of its parameters
    blind = {}
    for entry in run.entries:
        mine = [each for each in upkeep_of(run) if each.member == entry.name]
        if not mine:
            blind[entry.name] = NO_OPTIMIZER
        elif all(each.updates + each.steps_without_gradient < FEWEST_UPDATES for each in mine):
            blind[entry.name] = NO_UPDATES
    return blind
