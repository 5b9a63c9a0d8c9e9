"""Collectives that outlive the step in which they were launched.

A step of TensorFlow ends when all of its operations have ended, its collectives too. What is to be
under way during the steps that follow is launched by a thread of its own, in a group of its own:

    step t             start ---> thread: all-gather, all-reduce      nobody waits
    steps t+1 ...                        ...                          the program's own collectives
    step t + overlap   take  <--- result                              waits for what is left of it

A step calls both as operations of its graph. All processes start and take the same flights in the
same order. What is not under way when it is to be taken, as after a restart, is sent then.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private

_numbers = itertools.count()  # in the order in which optimizers begin: the same on all processes


class Flight:
    """One collective that is under way, or has ended.

    Attributes:
        step: in which it was started.
    """

    def __init__(self, step: int):
        self.step = step
        self._ended = threading.Event()
        self._result: np.ndarray | None = None
        self._error: BaseException | None = None

    def run(self, launch: Callable[[], tf.Tensor]) -> None:
        """Launches it, and waits for its end; on the thread of the flights."""
        try:
            self._result = launch().numpy()
        except BaseException as error:  # whoever takes it is told
            self._error = error
        self._ended.set()

    def result(self) -> np.ndarray:
        """Waits for its end."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return cast(np.ndarray, self._result)


class Flights:
    """What one optimizer has under way, one after the other on a thread of its own.

    Args:
        collectives: in a group of their own, on the CPU.
        progress: notes that the program waits for one of them.
    """

    def __init__(self, collectives: _tf_private.Collectives, progress: _tf_private.Progress):
        self.progress = progress
        self._collectives = collectives
        self._number = next(_numbers)
        self._under_way: dict[str, Flight] = {}
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(
            target=_fly, args=(self._queue,), daemon=True, name="tfqcomm_in_flight"
        )
        thread.start()
        weakref.finalize(self, self._queue.put, None)

    def start(self, kind: str, name: str, value: np.ndarray, step: int) -> Flight:
        """Launches a collective, and does not wait for it."""
        flight = self._under_way[name] = Flight(step)
        place = f"flight {self._number}, {name}"
        launch = functools.partial(
            _launch, getattr(self._collectives, kind), place, np.array(value)
        )
        self._queue.put((flight, launch))
        return flight

    def take(self, kind: str, name: str, value: np.ndarray, step: int) -> np.ndarray:
        """What has come of a flight of this step; if there is none, of one that starts now."""
        flight = self._under_way.pop(name, None)
        if flight is None or flight.step != step:
            flight = self.start(kind, name, value, step)
            del self._under_way[name]
        return flight.result()

    def state(self) -> dict[str, np.ndarray]:
        """Nothing: a run that goes on from a backup sends again what was under way."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Drops what is under way: it is of another run. On all processes alike."""
        self._under_way.clear()


def _fly(flights: queue.SimpleQueue) -> None:
    while (entry := flights.get()) is not None:
        flight, launch = entry
        flight.run(launch)
        del entry, flight, launch  # not to be kept until the next one comes


def _launch(collective, place: str, value: np.ndarray) -> tf.Tensor:
    with _tf_private.doing(place):  # the keys of what may be under way at a time differ
        return collective(tf.constant(value))


class _Stage(abc.ABC):
    """The moves of one exchange, in the order in which they are traced.

    Args:
        flights: of the optimizer.
        name: of the exchange.
        step: int64 scalar: which one it is, of those of this name.
        processes: that take part.
    """

    def __init__(self, flights: Flights, name: str, step: tf.Tensor, processes: int):
        self.flights = flights
        self.name = name
        self.step = step
        self.processes = processes
        self._moves = itertools.count()

    def together(self):
        """Scope of moves that may be under way at a time."""
        return contextlib.nullcontext()

    def all_gather(self, value: tf.Tensor) -> tf.Tensor:
        """Concatenates every process' `value` along the first axis."""
        shape = [self.processes * value.shape[0], *value.shape[1:]]
        return self._move("all_gather", value, shape)

    def all_reduce(self, value: tf.Tensor) -> tf.Tensor:
        """Sums `value` over the processes."""
        return self._move("all_reduce", value, value.shape)

    def _move(self, kind, value, shape):
        name = f"{self.name}, move {next(self._moves)}"
        with tf.device("CPU:0"):
            return self.move(kind, name, value, shape)

    @abc.abstractmethod
    def move(self, kind: str, name: str, value: tf.Tensor, shape) -> tf.Tensor:
        """One of them: its result, of a static shape."""


class Departures(_Stage):
    """Starts what an exchange sends; what it makes of zeros is of no use."""

    def move(self, kind, name, value, shape):
        """Starts it; the result is not there yet."""
        flights = self.flights  # TensorFlow never lets go of `start`, nor of what that refers to

        def start(value, step):
            flights.start(kind, name, value, int(step))
            return True

        tf.numpy_function(start, [value, self.step], tf.bool)
        return tf.zeros(shape, value.dtype)


class Arrivals(_Stage):
    """Takes what has come of what was started in an earlier step."""

    def move(self, kind, name, value, shape):
        """Waits for it."""
        flights = self.flights  # as in `Departures`

        def take(value, step):
            return flights.take(kind, name, value, int(step))

        def wait(value):
            taken = tf.numpy_function(take, [value, self.step], value.dtype)
            return tf.ensure_shape(taken, shape)

        with _tf_private.doing(f"what was sent {name}"):
            return flights.progress.noted(kind, value, wait)
