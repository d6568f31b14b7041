"""How PyTorch is listened to: operators where they are dispatched, and a few of its Python functions replaced and put back.

Operators are heard without replacing anything (`attnscope.capture.dispatch`). Python functions that no operator shows are
replaced: clipping, what starts the backward pass, kernels of other libraries. A replacement calls the original with the
arguments as they came and returns what it returned. Nothing is looked at while torch.compile traces: a compiled graph is that
of the unwatched script. Where code runs eagerly amid compiled code, Dynamo compiles what the unwatched script would have it
compile, and nothing of ours.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from attnscope.capture.dispatch import Look, Original, listen
from attnscope.capture.dynamo import compiled_by, leave_alone, set_compiler

# Told of a call that is over: its arguments, as the operator's schema has them, and what it returned.
Observe = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


class Patches:
    """What is listened to and replaced at the moment.

    Invariant: `restore` puts every attribute back to what stood there before, the latest first, and no module has a
    replacement under another name.
    """

    def __init__(self, is_wanted: Callable[[], bool], on_error: Callable[[Exception], None]) -> None:
        """`is_wanted` is asked at every call whether anybody looks; `on_error` is told what an observer raised."""
        self._is_wanted = is_wanted
        self._on_error = on_error
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

    def listen(self, name: str, observe: Observe) -> None:
        """Be told of the calls of an operator, aten::`name`, but of none that one of those told of makes inside."""
        inside, is_wanted, on_error = self._inside, self._is_wanted, self._on_error

        def heard(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not is_wanted() or getattr(inside, "busy", False):
                return original(*args, **kwargs)
            inside.busy = True
            try:
                out = original(*args, **kwargs)
                try:
                    observe(args, kwargs, out)
                except Exception as error:
                    on_error(error)
                return out
            finally:
                inside.busy = False

        self._put_back.append(listen(name, heard))

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
            compiler = set_compiler(None)
            try:
                if is_wanted() and not getattr(inside, "busy", False):
                    inside.busy = True
                    try:
                        call = original if compiler is None else compiled_by(compiler, original)
                        return look(call, args, kwargs)
                    finally:
                        inside.busy = False
            finally:
                set_compiler(compiler)
            return original(*args, **kwargs)

        # Dynamo would take it for a frame of the script's. It stays so after `restore`: the code is nobody else's.
        leave_alone(watched)
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


_MISSING = object()
