r"""Moves words between replicas, and knows what each move costs on the wire.

A transport is used from cross-replica code: it takes one value per replica of this process and
gives back what all of them will use, on the process' first device. Between processes it launches
one collective per call, however many devices a process has.

    replicas of process 0     replicas of process 1
      r0 r1 ... r(L-1)          rL ... r(2L-1)          world = processes x local
       \\  |  /                    \\  |  /
        lead  <--- collective --->  lead

Letters: L local replicas, P processes, W = P x L replicas in all, w words, c words of a chunk.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf

from tfqcomm.transport.in_flight import Flights


class Transport(abc.ABC):
    """Abstract. There are `LocalTransport` and `CollectiveTransport`, and a view of either.

    Attributes:
        member: what takes part: a "worker", that is a replica, or a "process".
        processes: number of processes, P.
        process: the rank of this process in [0, P).
        local: replicas in this process, L.
        device: where results are, and where work done once per process should be.
        before_agreement: called before processes agree on anything, where there are several.
    """

    member: ClassVar[str] = "worker"

    def __init__(self, processes: int, process: int, devices: Sequence[str | None]):
        self.processes = processes
        self.process = process
        self.devices = tuple(devices)
        self.local = len(self.devices)
        self.device = self.devices[0]
        self.before_agreement: Callable[[], None] = lambda: None

    @property
    def world(self) -> int:
        """Replicas in all, W."""
        return self.processes * self.local

    @property
    def ranks(self) -> range:
        """The replicas of this process, among all."""
        return range(self.process * self.local, (self.process + 1) * self.local)

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Scope of moves of which each may begin while others are under way."""
        return contextlib.nullcontext()

    def flights(self) -> Flights:
        """What one optimizer will have under way while steps go on; between processes only."""
        raise TypeError(f"{type(self).__name__} has no flights: nothing leaves this process")

    def departing(self, flights: Flights, name: str, step: tf.Tensor) -> Transport:
        """Starts what one exchange sends, and gives zeros for what will come of it.

        Args:
            flights: of the optimizer.
            name: of the exchange.
            step: int64 scalar: which one it is, of those of this name.
        """
        raise TypeError(f"{type(self).__name__} has no flights: nothing leaves this process")

    def arriving(self, flights: Flights, name: str, step: tf.Tensor) -> Transport:
        """Waits for what was started by `departing` of the same arguments."""
        raise TypeError(f"{type(self).__name__} has no flights: nothing leaves this process")

    def all_gather(self, words: Sequence[tf.Tensor]) -> tf.Tensor:
        """Gives everyone's words to everyone: L times int32[w] -> int32[W, w], in rank order."""
        with tf.device(self.device):
            gathered = self.gather_processes(tf.stack(list(words)))
            return tf.reshape(gathered, [self.world, _static_length(words[0])])

    def all_reduce(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """Sums vectors over all replicas, in a fixed order: L times [n] -> [n]."""
        with tf.device(self.device):
            total = values[0]
            for value in values[1:]:
                total = total + value
            return tf.reshape(self.reduce_processes(total), [_static_length(total)])

    def all_to_all(self, words: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Exchanges rows: L times int32[W, c], row j for replica j -> L times int32[W, c]."""
        with tf.device(self.device):
            sent = tf.stack(list(words))  # [L, W, c]
            sent = tf.reshape(sent, [self.local, self.processes, self.local, -1])
            # [P (destination), L (destination), L (source), c]
            sent = tf.transpose(sent, [1, 2, 0, 3])
            received = self.exchange_processes(sent)  # [P (source), L (destination), L, c]
            received = tf.transpose(received, [1, 0, 2, 3])
            received = tf.reshape(received, [self.local, self.world, -1])
        return tf.unstack(received, self.local)

    def broadcast(self, values: Sequence[tf.Tensor], roots: tf.Tensor) -> list[tf.Tensor]:
        """Gives every replica the vector of its group's root, which is chosen at run time.

        Groups are equal ranges of ranks. Each of them spans whole processes or fits into one;
        nothing crosses its border.

        Args:
            values: L times [n], n being the same everywhere; those of roots are sent.
            roots: int32[g], the rank of each group's root; equal on all processes.

        Returns:
            L times [n].

        Raises:
            ValueError: if there are no such groups.
        """
        groups = roots.shape[0]
        size = self.world // groups  # replicas of a group
        if self.world % groups or (size % self.local and self.local % size):
            raise ValueError(
                f"Argument `roots` must name one root for each of equal groups of the {self.world} "
                f"replicas, which are in processes of {self.local}. Received: {groups} roots"
            )
        first = self.ranks.start // size
        with tf.device(self.device):
            if size <= self.local:
                parts = [values[i : i + size] for i in range(0, self.local, size)]
                picked = [_pick(part, roots[first + i] % size) for i, part in enumerate(parts)]
                return [picked[i // size] for i in range(self.local)]
            processes = range(first * size // self.local, (first + 1) * size // self.local)
            mine = _pick(values, roots[first] % self.local)
            received = self.broadcast_processes(mine, roots[first] // self.local, processes)
            return [received] * self.local

    def gather_vectors(self, vector: tf.Tensor) -> tf.Tensor:
        """Every process' vector, in rank order: [n] -> [P, n]; of what each has one, not L."""
        with tf.device(self.device):
            gathered = self.gather_processes(tf.stack([vector] * self.local))
            return gathered[:: self.local]

    def all_gather_ragged(self, values: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Like `all_gather` for rows whose number differs.

        Args:
            values: L times [m_r, ...].

        Returns:
            W tensors, and the bytes one worker sent: all rows are padded to the longest.
        """
        with tf.device(self.device):
            lengths = self.gather_processes(tf.stack([tf.shape(v)[0] for v in values]))
            longest = tf.reduce_max(lengths)
            padded = [_pad_rows(v, longest) for v in values]
            empty = tf.zeros([self.world, *tf.unstack(tf.shape(padded[0]))], padded[0].dtype)
            gathered = tf.cond(  # [W, longest, ...]; the ring crashes on empty tensors
                longest > 0, lambda: self.gather_processes(tf.stack(padded)), lambda: empty
            )
            words = tf.size(padded[0], tf.int64) * padded[0].dtype.size // 4
            sent = self.bytes_all_gather(words + 1)
            return [gathered[r, : lengths[r]] for r in range(self.world)], sent

    @abc.abstractmethod
    def agree(
        self, topic: str, facts: dict[str, str], notes: dict[str, str], **more: bytes | str
    ) -> bool:
        """Compares `facts` with those of all processes, eagerly; `notes` are only shown.

        Args:
            **more: `evidence`, bytes that are compared as well, but may differ; `advice`, what to
                do where facts differ.

        Returns:
            Whether the evidence is the same on all processes.

        Raises:
            ValueError: on every process, naming the facts that differ and between whom.
        """

    def add_up(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sums float32 arrays over all processes, eagerly; all have the same names and shapes."""
        flat = [array.ravel() for array in arrays.values()]
        if self.processes == 1 or not sum(map(len, flat)):  # the ring crashes on empty tensors
            return dict(arrays)
        total = self.reduce_processes(tf.constant(np.concatenate(flat))).numpy()
        pieces = np.split(total, np.cumsum([len(part) for part in flat])[:-1])
        return {
            name: piece.reshape(array.shape)
            for (name, array), piece in zip(arrays.items(), pieces, strict=True)
        }

    def share_bytes(self, data: bytes) -> bytes:
        """Gives the first process' `data` to all, eagerly; what others pass is ignored."""
        if self.processes == 1:
            return data
        chief = self.process == 0
        length = tf.constant([len(data) if chief else 0], tf.int64)  # may be beyond 2 GiB
        size = int(self.reduce_processes(length)[0])
        if size == 0:  # the ring crashes on empty tensors
            return b""
        words = np.zeros([-(-size // 4)], "<i4")
        if chief:
            words.view(np.uint8)[:size] = np.frombuffer(data, np.uint8)
        shared = self.reduce_processes(tf.constant(words)).numpy().astype("<i4")
        return shared.tobytes()[:size]

    # What one worker sends, in bytes. A worker is a process; inside a single process every
    # replica counts as one, so that a simulation on logical devices reports what the same run
    # would send on W machines.

    def bytes_all_gather(self, words):
        """Bytes one worker sends in `all_gather` of `words` int32 words per replica."""
        workers, per_worker = self._workers()
        return (workers - 1) * per_worker * 4 * words

    def bytes_all_reduce(self, elements: int, itemsize: int = 4) -> int:
        """Bytes one worker sends in a ring all-reduce of `elements` numbers."""
        workers, _ = self._workers()
        return 2 * (workers - 1) * elements * itemsize // workers

    def bytes_all_to_all(self, chunk_words: int) -> int:
        """Bytes one worker sends in `all_to_all` with `chunk_words` words per pair of replicas."""
        workers, per_worker = self._workers()
        return (workers - 1) * per_worker * per_worker * 4 * chunk_words

    def bytes_broadcast(self, words: int, groups: int = 1) -> int:
        """Bytes one worker sends in `broadcast` of `words` int32 words, on average.

        A tree of m workers sends m - 1 copies; who passes them on depends on the root.
        """
        workers, _ = self._workers()
        members = max(1, workers // groups)
        return (members - 1) * 4 * words // members

    def _workers(self) -> tuple[int, int]:
        return (self.processes, self.local) if self.processes > 1 else (self.local, 1)

    @abc.abstractmethod
    def gather_processes(self, stacked: tf.Tensor) -> tf.Tensor:
        """[L, ...] -> [W, ...]."""

    @abc.abstractmethod
    def reduce_processes(self, value: tf.Tensor) -> tf.Tensor:
        """[n] -> [n], summed."""

    @abc.abstractmethod
    def exchange_processes(self, rows: tf.Tensor) -> tf.Tensor:
        """[P, ...] -> [P, ...], row p to process p."""

    @abc.abstractmethod
    def broadcast_processes(
        self, value: tf.Tensor, source: tf.Tensor, processes: range
    ) -> tf.Tensor:
        """[n] -> [n], that of `source`, one of `processes`, to all of them."""


def _pick(values: Sequence[tf.Tensor], index: tf.Tensor) -> tf.Tensor:
    if len(values) == 1:
        return values[0]
    return tf.switch_case(index, [lambda value=value: tf.identity(value) for value in values])


def _static_length(vector: tf.Tensor) -> int:
    return -1 if vector.shape[0] is None else vector.shape[0]


def _pad_rows(value: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    padding = [[0, rows - tf.shape(value)[0]]] + [[0, 0]] * (value.shape.rank - 1)
    return tf.pad(value, padding)
