"""Whose training is recorded, where several threads train at once: a step has no number in two trainings.

The first thread that trains has its steps recorded. Another one goes on with it where that has ended, or where it runs the
same layers or optimizers (a training that moves from thread to thread); else it is left out.
"""

import threading
import weakref

from torch.utils.weak import WeakIdKeyDictionary

from attnscope.watch.capture import in_backward


class Turns:
    """Which thread it is."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._thread: weakref.ref[threading.Thread] | None = None
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
            if not self._may_take(part, trains=trains):
                return False
            self._owner, self._thread = here, weakref.ref(threading.current_thread())
        self._has_trained = self._has_trained or trains
        if part is not None:
            self._known[part] = True
        return True

    def _may_take(self, part: object | None, *, trains: bool) -> bool:
        if self._owner is None or (part is not None and part in self._known):
            return True
        thread = None if self._thread is None else self._thread()
        if thread is None or not thread.is_alive() or (trains and not self._has_trained):
            self._known = WeakIdKeyDictionary()
            self._has_trained = False
            return True
        return False
