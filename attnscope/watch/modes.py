"""Which mode a model is in: evaluation while it is trained, training while it is evaluated.

Looked at as losses are differentiated, and in the first evaluations.
"""

import sys
import weakref
from collections.abc import Callable, Iterable
from types import FrameType

import torch
from torch import nn

from attnscope.capture.names import Modules
from attnscope.runs.probe_events import DropoutInEvaluation, EvaluationInTraining
from attnscope.watch.guard import OnEvent
from attnscope.watch.parameters import parameters_of
from attnscope.watch.step import Step

MOST_EVALUATIONS = 3  # that are looked at
MOST_LOOKS = 3  # at models that are in evaluation while a loss is differentiated

DROPOUTS = (nn.modules.dropout._DropoutNd,)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
# What runs a forward pass without gradients that gets them later: checkpointing, autograd functions.
_FUNCTIONS = ("torch/autograd/function.py", "torch/utils/checkpoint.py")


class Modes:
    """The mode of the model that computed last.

    Invariant: keeps no module alive.
    """

    def __init__(self, modules: Modules, on_event: OnEvent) -> None:
        self._modules = modules
        self._on_event = on_event
        self._last: Callable[[], nn.Module | None] = _nobody
        self._evaluated: Callable[[], nn.Module | None] = _nobody
        self._evaluations = 0
        self._looked = 0
        self._trained = 0  # losses that were differentiated in training mode

    def computed(self, module: nn.Module) -> None:
        """A module computes in training."""
        self._last = weakref.ref(module)

    def looks_at_evaluation(self) -> bool:
        """Whether it counts what is computed without gradients."""
        return self._evaluations < MOST_EVALUATIONS

    def computed_without_gradients(self, module: nn.Module | None) -> None:
        """Something is computed without gradients."""
        self._evaluated = _nobody if module is None else weakref.ref(module)

    def evaluated(self, step: Step) -> None:
        """After an update, a loss was computed without gradients."""
        module, self._evaluated = self._evaluated(), _nobody
        if module is None or _inside_a_function():
            return
        self._evaluations += 1
        if not module.training:
            return
        model = self._modules.root_of(module)
        dropped = [share for each in model.modules() if each.training and (share := dropout_of(each)) > 0]
        if dropped:
            self._evaluations = MOST_EVALUATIONS
            what = DropoutInEvaluation(model=type(model).__name__, dropouts=len(dropped), dropout=max(dropped))
            self._on_event(what, step=step.number)

    def differentiated(self, step: Step, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """A loss is about to be differentiated, after these optimizers have stepped."""
        module = self._last()
        if self._looked >= MOST_LOOKS or module is None:
            return
        if module.training:
            self._trained += 1
            return
        self._looked += 1
        model = self._modules.root_of(module)
        owned = {id(p) for each in optimizers for p in parameters_of(each, with_gradient=False)}
        if not any(id(p) in owned for p in model.parameters()) or any(each.training for each in model.modules()):
            return
        self._looked = MOST_LOOKS
        what = EvaluationInTraining(
            model=type(model).__name__,
            losses_before=self._trained,
            dropouts=sum(dropout_of(each) > 0 for each in model.modules()),
            batch_norms=sum(isinstance(each, BATCH_NORMS) and each.track_running_stats for each in model.modules()),
        )
        self._on_event(what, step=step.number)


def dropout_of(module: nn.Module) -> float:
    """The share that a module drops in training."""
    if isinstance(module, DROPOUTS):
        return float(module.p)
    return float(module.dropout) if isinstance(module, nn.MultiheadAttention) else 0.0


def _inside_a_function() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.replace("\\", "/").endswith(_FUNCTIONS):
            return True
        frame = frame.f_back
    return False


def _nobody() -> None:
    return None
