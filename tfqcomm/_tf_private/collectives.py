"""TensorFlow's collectives between processes: their keys, their order, their end."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import (
    cross_device_utils,
)
from tensorflow.python.ops import collective_ops

from tfqcomm._tf_private.graphs import local_variable, run_independently
from tfqcomm._tf_private.processes import process_count, process_rank

_FIRST_FIXED_KEY = 1 << 30  # TensorFlow draws its own keys from 100 upwards
_doing = threading.local()
_places: dict[int, str] = {}  # number of a place -> its text


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what the collectives launched, or traced, in this scope are for.

    The text is part of what pairs them up, so it must be the same on all processes.
    """
    before = getattr(_doing, "what", "")
    _doing.what = what
    try:
        yield
    finally:
        _doing.what = before


def place_text(number: int) -> str:
    """What a place that `Progress` has noted is called."""
    return _places.get(number, "the beginning")


def _place(kind: str, value: tf.Tensor, number: int = 0) -> int:
    """Numbers a place in the program: the same on all processes, whenever it was traced.

    Args:
        number: among those that are in flight at a time, from 1 on.
    """
    what = getattr(_doing, "what", "") or "a collective of the program's own"
    which = f", number {number}" if number else ""
    text = f"{what} ({kind}, {value.dtype.name}{value.shape}{which})"
    number = _FIRST_FIXED_KEY | zlib.crc32(text.encode()) >> 2
    if _places.setdefault(number, text) != text:
        raise RuntimeError(f"Two collectives share a key: {text!r} and {_places[number]!r}")
    return number


class Progress:
    """How far this process is among its collectives: noted in the graph, read by the watch.

    Noting them keeps them in program order: none begins before the one before it has ended, or, of
    those that may be in flight at a time, has begun. So the n-th collective of every process is
    the same.
    """

    def __init__(self):
        zero = np.zeros([2], np.int64)  # begun and ended
        self._counts = local_variable(zero, name="collectives", device="CPU:0")
        self._at = local_variable(np.int64(0), name="place", device="CPU:0")

    def begin(self, place: int, value: tf.Tensor) -> tf.Tensor:
        """`value`, once it is known that the collective at `place` begins with it."""
        with tf.control_dependencies([value]), tf.device("CPU:0"):
            noted = [
                self._at.assign(place, read_value=False),
                self._counts.assign_add([1, 0], read_value=False),
            ]
        with tf.control_dependencies([] if tf.executing_eagerly() else noted):
            return tf.identity(value)

    def noted(self, kind: str, value: tf.Tensor, wait) -> tf.Tensor:
        """`wait(value)`, in which this process waits for the others, noted as a collective."""
        result = wait(self.begin(_place(kind, value), value))
        self.end(result)
        return result

    def end(self, *results: tf.Tensor) -> None:
        """Notes that the collectives with these results have ended."""
        with tf.control_dependencies(list(results)), tf.device("CPU:0"):
            self._counts.assign_add([0, len(results)], read_value=False)

    def read(self) -> tuple[int, int, int]:
        """Collectives begun, ended, and the number of the last one's place; eager."""
        begun, ended = self._counts.numpy()
        return int(begun), int(ended), int(self._at.numpy())


class _Flight:
    """Collectives that may be in flight at a time: how many there were, and their results."""

    def __init__(self):
        self.results: list[tf.Tensor] = []
        self._number = 0
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

    def next_number(self) -> int:
        """Of two such collectives of one kind and shape each needs a key of its own."""
        self._number += 1
        return self._number

    def has_graph(self) -> bool:
        """Whether results made now can be waited for at the end: not those of a branch."""
        eager = tf.executing_eagerly()
        return self._graph is (None if eager else tf.compat.v1.get_default_graph())


class Launcher(cross_device_utils.CollectiveReplicaLauncher):
    """Launches collectives with keys that are used again from step to step.

    TensorFlow draws a new key for every execution, keeps 2 KB about each for ever, and asks the
    group's leader about it first. A key may be used again once its collective has ended in this
    process, for then all peers have taken what they were sent; executions are in program order. So
    a place in the program has one key. Where a length is known at run time only, TensorFlow would
    refuse to see the key again with another one, and its own way is kept; on GPUs likewise.

    A time limit would cost a thread for each collective that sleeps until the limit: there is none
    but what a caller's own options name. The watch ends the wait for those who do not come.

    Args:
        progress: notes what is launched; None where several replicas of one process must be in a
            collective at a time.
    """

    def __init__(self, group_key, group_size, keys, device, options, progress: Progress | None):
        super().__init__(group_key, group_size, keys, device, options)
        self._progress = progress
        self._flight: _Flight | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Scope of collectives that may be in flight at a time.

        Each begins when its value is there and the one before it has begun. What follows the scope
        waits for all. NCCL wants them one after the other: so they stay on GPUs.
        """
        self._flight = flight = _Flight()
        try:
            yield
        finally:
            self._flight = None
        if flight.results and self._progress is not None:
            self._progress.end(*flight.results)

    @classmethod
    def like(cls, launcher, progress: Progress | None) -> Launcher:
        """One that does what TensorFlow's `launcher` would."""
        return cls(
            launcher._group_key,
            launcher._group_size,
            launcher._collective_keys,
            launcher._device,
            launcher._options,
            progress,
        )

    def all_reduce(self, input_tensor, control_input=None, options=None):
        """Sums over the group."""
        with self._control_input(control_input):
            return self.launch("all-reduce", collective_ops.all_reduce_v2, input_tensor, options)

    def _all_gather(self, input_tensor, options):
        return self.launch("all-gather", collective_ops.all_gather_v2, input_tensor, options)

    def all_to_all(self, value):
        """Sends row p to member p of the group."""
        return self.launch("all-to-all", collective_ops.all_to_all_v2, value)

    def broadcast(self, value, source: tf.Tensor, rank: int, processes: range):
        """Gives `value` of process `source`, a scalar known at run time only, to `processes`.

        The runtime must be told while the graph is built who sends: so both are, and one runs.
        """
        group_key = self._group_key  # of all; a smaller group has a key of its own
        if len(processes) < self._group_size:
            group_key += 1000 + processes.start * self._group_size + processes.stop
        own = {"group_key": group_key, "group_size": len(processes), "ordering_token": None}

        def send(value, **group):
            del group["ordering_token"]  # a broadcast takes none
            if self._keeps_key(value):
                # The runtime remembers with a key who sends: one for each source.
                with tf.device("CPU:0"):
                    group["instance_key"] += tf.cast(source, tf.int32)
            return tf.cond(
                tf.equal(source, rank),
                lambda: collective_ops.broadcast_send_v2(value, **group),
                lambda: collective_ops.broadcast_recv_v2(value.shape, value.dtype, **group),
            )

        return self.launch("broadcast", send, value, **own)

    def launch(self, kind, collective, value, options=None, **more):
        """Runs `collective` on `value`, noting that it begins and ends."""
        options = self._options.merge(options)
        value = tf.convert_to_tensor(value)
        flight = self._flight if self._keeps_key(value) else None
        place = _place(kind, value, flight.next_number() if flight else 0)
        flies = flight is not None and flight.has_graph()
        group = {
            "group_size": self._group_size,
            "group_key": self._group_key,
            "instance_key": self._key(place, value),
            "communication_hint": options.implementation.value,
            "timeout": options.timeout_seconds or 0,
            "ordering_token": None if flies else self._get_ordering_token(),
            **more,
        }
        with tf.device(self._device):
            if self._progress is None:
                return collective(value, **group)
            result = collective(self._progress.begin(place, value), **group)
            if flies:
                flight.results.append(result)
                if not tf.executing_eagerly():
                    run_independently(result.op)
            else:
                self._progress.end(result)
            return result

    def _keeps_key(self, value):
        return value.shape.is_fully_defined() and "GPU" not in self._device

    def _key(self, place, value):
        if self._keeps_key(value):
            with tf.device("CPU:0"):
                return tf.constant(place, tf.int32)
        return self._next_instance_key()


class Collectives:
    """One process' end of the collectives between processes, on one device of each.

    Args:
        strategy: whose processes take part.
        device: of this process.
        aside: what these are for, which may run beside those of the program; "" for those.
    """

    def __init__(self, strategy: tf.distribute.Strategy, device: str, *, aside: str = ""):
        extended = strategy.extended
        self.size = process_count(strategy)
        self.rank = process_rank(strategy)
        self._options = extended._communication_options
        keys = extended._collective_keys
        group_key = keys.get_group_key((device, aside) if aside else (device,))
        self._launcher = Launcher(
            group_key, self.size, keys, device, self._options, None if aside else extended.progress
        )

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Scope of collectives that may be in flight at a time; see `Launcher.together`."""
        return self._launcher.together()

    def all_gather(self, value: tf.Tensor) -> tf.Tensor:
        """Concatenates every process' `value` along the first axis."""
        return self._launcher._all_gather(value, self._options)

    def all_reduce(self, value: tf.Tensor) -> tf.Tensor:
        """Sums `value` over the processes."""
        return self._launcher.all_reduce(value)

    def all_to_all(self, value: tf.Tensor) -> tf.Tensor:
        """Sends row p of `value` to process p; row p of the result came from process p."""
        return self._launcher.all_to_all(value)

    def broadcast(self, value: tf.Tensor, source: tf.Tensor, processes: range) -> tf.Tensor:
        """Gives `value` of process `source`, a scalar known at run time only, to `processes`."""
        return self._launcher.broadcast(value, source, self.rank, processes)


def progress_of(strategy: tf.distribute.Strategy) -> Progress:
    """What `strategy`'s collectives note of themselves."""
    return strategy.extended.progress
