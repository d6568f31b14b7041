"""What preflight says, as plain data: for tables on a terminal and for JSON."""

from dataclasses import asdict, dataclass

from attnscope.check.result import Checked
from attnscope.check.result import to_table as check_table
from attnscope.diagnose import Diagnosis
from attnscope.findings import to_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number, predicted and measured.

    Attributes:
        name: of it; that of a column where it is one.
        unit: bytes, seconds, nats, or nothing.
        predicted: None = theory does not say.
        measured: None = it could not be measured.
        compared: what it is held against, and the number, the nearest first.
    """

    name: str
    predicted: float | None = None
    measured: float | None = None
    unit: str = ""
    compared: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One attention layer before the first step.

    Attributes:
        layer: its number.
        name: of its module; None in the lab.
        quantities: of its softmax and of the residual stream after it.
    """

    layer: int
    name: str | None = None
    quantities: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradNorm:
    """The norm of the gradient of one parameter group; layer -1 is outside of layers, which are numbered as the blocks are."""

    layer: int
    group: str
    norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One member, or the model in hand.

    Attributes:
        member: its name.
        layers: in order.
        quantities: of the whole.
        gradients: of every parameter group.
    """

    member: str
    layers: tuple[LayerFacts, ...]
    quantities: tuple[Quantity, ...]
    gradients: tuple[GradNorm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What members that are trained together take.

    Attributes:
        members: their names.
        quantities: bytes and seconds of all of them.
    """

    members: tuple[str, ...]
    quantities: tuple[Quantity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What is to be expected.

    Attributes:
        target: config or factory.
        members: each with its numbers.
        needs: memory and time of each part.
        checks: member, or nothing of the model in hand, to what was tested of its masks.
        diagnosis: what the rules say of the first steps.
        rules: how many of them could look, and how many there are.
    """

    target: str
    members: tuple[Expected, ...]
    needs: tuple[Needed, ...]
    checks: tuple[tuple[str, Checked], ...]
    diagnosis: Diagnosis
    rules: tuple[int, int]

    @property
    def failed(self) -> tuple[Checked, ...]:
        """Checks that failed."""
        return tuple(check for _, check in self.checks if check.status == "failed")

    @property
    def ready(self) -> bool:
        """Whether neither a rule nor a check objects."""
        return not self.failed and all(finding.severity == "note" for finding in self.diagnosis.findings)


def as_json(preflight: Preflight) -> dict[str, object]:
    """For machines; numbers that are not finite are left to `attnscope.runs.layout.to_json`."""
    return {
        "target": preflight.target,
        "ready": preflight.ready,
        "members": [asdict(member) for member in preflight.members],
        "needs": [asdict(needed) for needed in preflight.needs],
        "checks": [{"member": member, **check_table(check)} for member, check in preflight.checks],
        "findings": [to_table(finding) for finding in preflight.diagnosis.findings],
        "chains": [[finding.rule for finding in chain] for chain in preflight.diagnosis.chains],
        "not_looked": [to_table(each) for each in preflight.diagnosis.not_looked],
    }
