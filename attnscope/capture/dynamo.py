"""Keeps Dynamo's hands off our code, and leaves to it what it would compile without us.

Dynamo compiles every Python frame that is entered while code amid compiled code runs eagerly: ours, too, as if the script
had written it. The parts of it that are used here are private: a torch without them is watched as if nothing were compiled,
and the numbers of what runs eagerly amid compiled code may change in their last bits.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_T = TypeVar("_T")
_P = ParamSpec("_P")

# The part of Dynamo that is in C, and there before it is imported.
_DYNAMO: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_IS_KNOWN = all(
    hasattr(_DYNAMO, name)
    for name in ("set_eval_frame", "set_code_exec_strategy", "_FrameAction", "_FrameExecStrategy")
)
# Chooses what compiles the frames that this thread enters, None = nothing, and returns what did before. Called from Python
# of ours it would be too late: that would be compiled.
set_compiler: Callable[[Any], Any] = _DYNAMO.set_eval_frame if _IS_KNOWN else lambda _compiler: None


def leave_alone(function: Any) -> None:
    """Let Dynamo run the code of this function as it is, but still see what it calls."""
    if _IS_KNOWN:
        act = _DYNAMO._FrameAction
        how = _DYNAMO._FrameExecStrategy(act.SKIP, act.DEFAULT)
        _DYNAMO.set_code_exec_strategy(function.__code__, how)


def compiled_by(compiler: object, original: Callable[..., Any]) -> Callable[..., Any]:
    """The original, compiled as if we did not stand between it and its caller."""

    @functools.wraps(original)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        set_compiler(compiler)
        try:
            return original(*args, **kwargs)
        finally:
            set_compiler(None)

    leave_alone(compiled)
    return compiled


def not_compiled(hook: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """What PyTorch calls of ours while it may compile: then it does nothing, and amid compiled code it runs as it is."""

    @functools.wraps(hook)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        if torch.compiler.is_compiling():
            return None
        compiler = set_compiler(None)
        try:
            return hook(*args, **kwargs)
        finally:
            set_compiler(compiler)

    leave_alone(called)
    return called
