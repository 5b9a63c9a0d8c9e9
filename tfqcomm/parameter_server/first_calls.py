"""A graph is called for the first time on a task while no other call is under way.

TensorFlow keeps all that a process calls on other tasks in one vector. A call reads from a pointer
into it without a lock (`EagerClusterFunctionLibraryRuntime::Run`), and a first call appends to it
(`Instantiate`), which may move what the pointer stands for: rarely a chief whose workers start, or
get a batch of a new shape, would send a message to nowhere, or crash.

So what is called is made known to the tasks beforehand, alone. That takes the chief's own
preparations, not a step: TensorFlow does both in one call, of which the second half is cancelled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class FirstCalls:
    """Scopes of calls that may be under way together, and of those that must be alone.

    Who wants to be alone comes first: workers that start together are all made known before the
    first of them takes a step.

    Attributes:
        generation: changes when all that was made known is forgotten.
    """

    def __init__(self):
        self.generation = 0
        self._changed = threading.Condition()
        self._together = 0  # calls under way
        self._waiting = 0  # calls that want to be alone
        self._alone = False  # whether one is

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Scope of a call of what is known; others may be under way."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._alone or self._waiting))
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Scope in which no call is under way."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._alone or self._together))
                self._alone = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def forget(self) -> None:
        """Every call is a first one again: TensorFlow has thrown away what it had prepared."""
        self.generation += 1


first_calls = FirstCalls()
