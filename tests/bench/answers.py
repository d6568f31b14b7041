"""Answers to programs that were never trained."""

from attnscope.bench.faults.answered import Answered, Said
from attnscope.bench.faults.population import REPORTED, Done
from attnscope.bench.faults.traces import Trace


def done(fault, base="a", *, half=REPORTED, seed=1, loss=2.0, name=None, strength=0, error=None):
    return Done(
        case=name or f"{fault}-{base}-{seed}",
        fault=fault,
        base=base,
        strength=strength,
        half=half,
        seed=seed,
        final_loss=loss,
        held_out_loss=loss,
        error=error,
    )


def said(rule, *, severity="error", kind="cause", step=3, layers=(), explains=()):
    return Said(rule=rule, severity=severity, kind=kind, step=step, layers=layers, explains=explains)


def answered(one, *findings, diverged_at=None, norm="pre", **values):
    """With traces of so many values, one every ten steps."""
    traces = {
        name: Trace(steps=tuple(range(0, 10 * len(course), 10)), values=tuple(course))
        for name, course in values.items()
    }
    return Answered(done=one, norm=norm, diverged_at=diverged_at, findings=findings, traces=traces)
