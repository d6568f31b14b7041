"""Whose training is recorded, where several threads train at once: a step has no number in two trainings.

The first thread that trains has its steps recorded. Another one goes on with it where that has ended, or where it runs the
same layers or optimizers (a training that moves from thread to thread); a thread that trained meanwhile is left out for good.
"""

import threading
import weakref
from collections.abc import Callable

from torch.utils.weak import WeakIdKeyDictionary

from attnscope.capture.eager import in_backward


class Turns:
    """Which thread it is."""

    def __init__(self, on_other: Callable[[], None]) -> None:
        """`on_other` is called when it is another training: a thread that was looked at has not trained, or has ended."""
        self._on_other = on_other
        self._owner: int | None = None
        self._thread: weakref.ref[threading.Thread] | None = None
        self._left_out: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._has_trained = False
        self._known = WeakIdKeyDictionary()

    def is_mine(self, part: object | None = None, *, trains: bool) -> bool:
        """Whether what this thread does belongs to the training that is recorded.

        Args:
            part: the module or the optimizer with which it does it, where that is known.
            trains: it differentiates or updates; a forward pass alone may lead to nothing.
        """
        here = threading.get_ident()
        if here != self._owner and not in_backward():  # autograd has threads of its own
            thread = threading.current_thread()
            if not self._may_take(thread, part, trains=trains):
                if trains:
                    self._left_out.add(thread)
                return False
            self._owner, self._thread = here, weakref.ref(thread)
        self._has_trained = self._has_trained or trains
        if part is not None:
            self._known[part] = True
        return True

    def _may_take(self, thread: threading.Thread, part: object | None, *, trains: bool) -> bool:
        if self._owner is None or (part is not None and part in self._known):
            return True
        if thread in self._left_out:
            return False
        owner = None if self._thread is None else self._thread()
        if owner is None or not owner.is_alive() or (trains and not self._has_trained):
            self._known = WeakIdKeyDictionary()
            self._has_trained = False
            self._on_other()
            return True
        return False
