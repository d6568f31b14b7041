"""Functions of PyTorch replaced by ones that look at what passes, and put back.

A replacement calls the original with the arguments as they came and returns what it returned. Nothing is looked at while
torch.compile traces: a compiled graph is that of the unwatched script. Where code runs eagerly amid compiled code, Dynamo
compiles what the unwatched script would have it compile, and nothing of ours.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Original = Callable[..., Any]
Look = Callable[[Original, tuple[Any, ...], dict[str, Any]], Any]

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Patches:
    """What is replaced at the moment.

    Invariant: `restore` puts every attribute back to what stood there before, the latest first, and no module has a
    replacement under another name.
    """

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        """`is_wanted` is asked at every call whether anybody looks."""
        self._is_wanted = is_wanted
        self._put_back: list[Callable[[], None]] = []
        self._originals: dict[int, tuple[object, Original]] = {}
        self._inside = threading.local()

    def replace(self, owners: list[Any], name: str, look: Look) -> None:
        """Replace `name` of each owner that has it, and other modules' names for the same function.

        Owners that have the same function get the same replacement. A function that a replaced one calls is not looked
        at again.
        """
        made: dict[int, Callable[..., Any]] = {}
        for owner in owners:
            original = getattr(owner, name, None)
            if original is None or any(original is new for new in made.values()):
                continue  # an owner may be replaced already, as another name of the same function
            new = made.get(id(original))
            if new is None:
                new = made[id(original)] = self._watched(original, look)
                self._originals[id(new)] = new, original
                if not isinstance(owner, type):
                    self._replace_aliases(original, new)
            if getattr(owner, name) is original:
                self._set(owner, name, new)

    def restore_with(self, undo: Callable[[], None]) -> None:
        """Something else that must be undone with the rest."""
        self._put_back.append(undo)

    def restore(self) -> None:
        """Put everything back."""
        while self._put_back:
            self._put_back.pop()()
        originals, self._originals = self._originals, {}
        if not originals:
            return
        for names in _namespaces():  # names bound since then, by `from module import function`
            for name, value in list(names.items()):
                found = originals.get(id(value))
                if found is not None and found[0] is value:
                    names[name] = found[1]

    def is_looking(self) -> bool:
        """Whether a call that is looked at goes on in this thread."""
        return bool(getattr(self._inside, "busy", False))

    def undisturbed(self) -> "_Undisturbed":
        """A context in which calls are not looked at: for our own computations."""
        return _Undisturbed(self._inside)

    def _watched(self, original: Original, look: Look) -> Callable[..., Any]:
        inside, is_wanted = self._inside, self._is_wanted

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            compiler = _set_compiler(None)
            try:
                if is_wanted() and not getattr(inside, "busy", False):
                    inside.busy = True
                    try:
                        call = original if compiler is None else _compiled_by(compiler, original)
                        return look(call, args, kwargs)
                    finally:
                        inside.busy = False
            finally:
                _set_compiler(compiler)
            return original(*args, **kwargs)

        # Dynamo would take it for a frame of the script's. It stays so after `restore`: the code is nobody else's.
        _leave_alone(watched)
        return watched

    def _set_in(self, names: dict[str, Any], name: str, new: object) -> None:
        before = names[name]
        names[name] = new
        self._put_back.append(lambda: names.__setitem__(name, before))

    def _set(self, owner: Any, name: str, new: object) -> None:
        own = vars(owner).get(name, _MISSING)  # a class may have inherited it
        setattr(owner, name, new)
        if own is _MISSING:
            self._put_back.append(lambda: delattr(owner, name))
        else:
            self._put_back.append(lambda: setattr(owner, name, own))

    def _replace_aliases(self, original: Original, new: object) -> None:
        """Names that `from module import function` bound before anybody watched."""
        for names in _namespaces():
            for name, value in list(names.items()):
                if value is original:
                    self._set_in(names, name, new)


def not_compiled(hook: Callable[_P, _T]) -> Callable[_P, _T | None]:
    """What PyTorch calls of ours while it may compile: then it does nothing, and amid compiled code it runs as it is."""

    @functools.wraps(hook)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        if torch.compiler.is_compiling():
            return None
        compiler = _set_compiler(None)
        try:
            return hook(*args, **kwargs)
        finally:
            _set_compiler(compiler)

    _leave_alone(called)
    return called


def _compiled_by(compiler: object, original: Original) -> Original:
    """The original, compiled as if we did not stand between it and its caller."""

    @functools.wraps(original)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        _set_compiler(compiler)
        try:
            return original(*args, **kwargs)
        finally:
            _set_compiler(None)

    _leave_alone(compiled)
    return compiled


def _leave_alone(function: Any) -> None:
    """Let Dynamo run the code of this function as it is, but still see what it calls."""
    if _IS_KNOWN:
        act = _DYNAMO._FrameAction
        how = _DYNAMO._FrameExecStrategy(act.SKIP, act.DEFAULT)
        _DYNAMO.set_code_exec_strategy(function.__code__, how)


def _namespaces() -> list[dict[str, Any]]:
    """Of all modules."""
    found = [getattr(module, "__dict__", None) for module in list(sys.modules.values())]
    return [names for names in found if isinstance(names, dict)]


class _Undisturbed:
    """Sets the mark by which replacements know that they are inside one another."""

    def __init__(self, inside: threading.local) -> None:
        self._inside = inside
        self._before = False

    def __enter__(self) -> None:
        self._before = getattr(self._inside, "busy", False)
        self._inside.busy = True

    def __exit__(self, *_: object) -> None:
        self._inside.busy = self._before


# The part of Dynamo that is in C, and there before it is imported. It is private: a torch without it is watched as if nothing
# were compiled, and the numbers of what runs eagerly amid compiled code may change in their last bits.
_DYNAMO: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_IS_KNOWN = all(
    hasattr(_DYNAMO, name)
    for name in ("set_eval_frame", "set_code_exec_strategy", "_FrameAction", "_FrameExecStrategy")
)
# Chooses what compiles the frames that this thread enters, None = nothing, and returns what did before. Called from Python
# of ours it would be too late: that would be compiled.
_set_compiler: Callable[[Any], Any] = (
    _DYNAMO.set_eval_frame if _IS_KNOWN else lambda _compiler: None
)
_MISSING = object()
