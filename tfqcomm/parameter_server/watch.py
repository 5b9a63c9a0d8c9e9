"""Sees to it that nobody waits for ever for a task that is stopped but not gone, and names it.

TensorFlow's remote calls have no time limit, and nothing ends one from outside. So those that may
last are made in threads that can be left behind, while the caller keeps an eye on the tasks:

    caller    waits for the call; once a second it looks whether a task has been silent too long
    call      a daemon thread, for ever in its remote call if the task never answers
    asker     while somebody waits for more than a second: greets all tasks, once a second

A task that computes answers greetings all the same, however long its step takes. What the caller's
own thread does between such calls is not watched: there is a roll-call before it.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from tfqcomm.parameter_server.cluster import Cluster, greet

ASK_SECONDS = 1.0  # between two greetings, and for each answer
CLOSE_SECONDS = 60.0  # that a call may still take when the interpreter ends


def check_timeout(timeout_seconds: float | None) -> None:
    """Refuses what is no time to wait."""
    number = isinstance(timeout_seconds, (int, float)) and not isinstance(timeout_seconds, bool)
    if timeout_seconds is not None and not (number and timeout_seconds > 0):
        raise ValueError(
            "Argument `timeout_seconds` must be None or a positive number of seconds. "
            f"Received: timeout_seconds={timeout_seconds!r}"
        )


class Watch:
    """Makes the calls of one trainer that need other tasks.

    Args:
        cluster: the tasks, servers before workers.
        timeout_seconds: how long a task may be silent while somebody waits; None: for ever.
        trainer: whose calls these are.

    Attributes:
        lost: devices of workers that nobody waits for until they are back.
    """

    def __init__(self, cluster: Cluster, timeout_seconds: float | None, trainer):
        _trainers.add(trainer)
        self.lost: set[str] = set()
        self._cluster = cluster
        self._timeout_seconds = timeout_seconds
        self._awaited: set[Future] = set()
        self._silence: dict[str, float] = {}  # device -> seconds, as of the last greetings
        self.asker: threading.Thread | None = None
        self._starting = threading.Lock()
        self._frozen: str | None = None  # device; from then on every call is an error

    def call_roll(self) -> None:
        """Returns when no task is stopped; raises as `run` does.

        Before the caller's own thread does more than wait: even an operation on the chief may need
        all tasks, since TensorFlow gives them every function that it makes of one.
        """
        if self._timeout_seconds is not None:
            self.run(self._await_answers)

    def _await_answers(self) -> None:
        for device in (*self._cluster.servers, *self._cluster.workers):
            while self._is_silent(device, gone=False):
                time.sleep(0.1)

    def run(self, call: Callable, *arguments):
        """What `call` returns, made in another thread.

        Raises:
            ServerLost: when a parameter server has been silent for too long meanwhile.
            RuntimeError: when a worker has.
        """
        if self._timeout_seconds is None or threads.is_one():  # there, somebody waits already
            return call(*arguments)
        return self.wait(threads.submit(call, *arguments))

    def run_all(self, calls: Sequence[Callable]) -> list:
        """What the calls return, which are made at the same time; raises as `run` does."""
        return [self.wait(future) for future in [threads.submit(call) for call in calls]]

    def wait(self, future: Future):
        """The result of a call that another thread makes; raises as `run` does."""
        if self._timeout_seconds is None:
            return future.result()
        began = time.monotonic()
        self._check(0.0)
        self._awaited.add(future)
        try:
            while True:
                try:
                    future.exception(ASK_SECONDS)
                except concurrent.futures.TimeoutError:  # of the wait: the call's own is returned
                    self._see_to_questions()
                    self._check(time.monotonic() - began)
                else:
                    return future.result()
        finally:
            self._awaited.discard(future)

    def _check(self, waited: float) -> None:
        """Raises if a task has been silent for too long, and the caller has waited as long."""
        limit = self._timeout_seconds or math.inf
        for device, silence in list(self._silence.items()):
            if self._frozen is None and min(silence, waited) >= limit:
                self._frozen = device
                threads.leave_behind()
                # To free a variable of theirs would be a call that nobody could leave.
                threading.Thread(target=_hold, args=(list(_trainers),), daemon=True).start()
        if self._frozen is not None:
            raise self._cluster.silent(self._frozen, limit)

    def _see_to_questions(self) -> None:
        with self._starting:
            if self.asker is None or not self.asker.is_alive():
                self._silence = dict.fromkeys((*self._cluster.servers, *self._cluster.workers), 0.0)
                self.asker = threading.Thread(target=self._ask, daemon=True)
                self.asker.start()

    def _ask(self) -> None:
        """Greets all tasks as long as somebody waits.

        Seconds are counted by questions, not by the clock: a chief that was itself stopped must
        not blame the others for it.
        """
        while self._awaited:
            next_time = time.monotonic() + ASK_SECONDS
            answers = {
                # Who calls a worker that is gone is told so by TensorFlow, and does without it.
                device: threads.submit(self._is_silent, device, device in self._cluster.servers)
                for device in self._silence
            }
            for device, is_silent in answers.items():
                silence = self._silence[device] + ASK_SECONDS
                self._silence[device] = silence if is_silent.result() else 0.0
            time.sleep(max(0.0, next_time - time.monotonic()))

    def _is_silent(self, device: str, gone: bool) -> bool:
        """Whether a task does not answer; `gone` where nobody listens at its address."""
        if device in self.lost:
            return False
        try:
            return not greet(self._cluster.addresses[device], ASK_SECONDS)
        except ConnectionError:
            return gone
        except OSError:  # its machine does not answer either
            return True


class _Threads:
    """Daemon threads, as many as are needed at a time: the interpreter does not wait for them."""

    def __init__(self):
        self._idle: list[queue.SimpleQueue] = []
        self._busy: set[Future] = set()
        self._here = threading.local()
        self.left_behind = False
        atexit.register(self._finish)

    def is_one(self) -> bool:
        """Whether the calling thread is one of them."""
        return getattr(self._here, "mine", False)

    def submit(self, call: Callable, *arguments) -> Future:
        """Makes a call in one of them."""
        future: Future = Future()
        self._busy.add(future)
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), daemon=True).start()
        inbox.put((future, functools.partial(call, *arguments)))
        return future

    def leave_behind(self) -> None:
        """Some will never return: the process ends without them."""
        self.left_behind = True

    def _work(self, inbox: queue.SimpleQueue) -> None:
        self._here.mine = True
        while True:
            future, call = inbox.get()
            result = error = None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            self._busy.discard(future)
            self._idle.append(inbox)
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, call, result, error  # nothing lives on until the next call

    def _finish(self) -> None:
        """Lets calls end: one that comes back when the interpreter is gone would abort it."""
        if not self.left_behind:
            concurrent.futures.wait(list(self._busy), CLOSE_SECONDS)


threads = _Threads()
_trainers: weakref.WeakSet = weakref.WeakSet()


def _hold(_) -> None:
    """Keeps its argument beyond the end of the interpreter, which frees what no thread has."""
    threading.Event().wait()
