"""Replicas in several processes, joined by TensorFlow's collectives."""

from __future__ import annotations

import copy
import weakref

import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.agreement import check_agreement
from tfqcomm.transport.base import Transport
from tfqcomm.transport.in_flight import Arrivals, Departures, Flights
from tfqcomm.transport.watch import Watch

# TensorFlow's ring slows down above 64 MB per collective; half of that is on the safe side.
MAX_WORDS_PER_COLLECTIVE = 32 * 2**20 // 4


class CollectiveTransport(Transport):
    """Replicas in several processes, joined by TensorFlow's collectives (gRPC or NCCL).

    Attributes:
        collectives: by which values move.
        addresses: of the processes, in rank order.
        watch: sees to it that nobody waits for ever.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        devices = strategy.extended.worker_devices
        super().__init__(
            _tf_private.process_count(strategy), _tf_private.process_rank(strategy), devices
        )
        self.collectives: _tf_private.Collectives | Departures | Arrivals
        self.collectives = _tf_private.Collectives(strategy, devices[0])
        self._aside: _tf_private.Collectives | None = None
        self._strategy = weakref.ref(strategy)
        self.addresses = _tf_private.process_addresses(strategy)
        self.watch = Watch(strategy, self.addresses, strategy.extended.timeout_seconds or 0)

    def together(self):
        return self.collectives.together()

    def flights(self):
        if self._aside is None:
            device = tf.DeviceSpec.from_string(self.device)
            cpu = device.replace(device_type="CPU", device_index=0).to_string()
            with tf.init_scope():
                self._aside = _tf_private.Collectives(self._strategy(), cpu, aside="in flight")
        return Flights(self._aside, _tf_private.progress_of(self._strategy()))

    def departing(self, flights, name, step):
        return self._by(Departures(flights, name, step, self.processes))

    def arriving(self, flights, name, step):
        return self._by(Arrivals(flights, name, step, self.processes))

    def _by(self, collectives: Departures | Arrivals) -> CollectiveTransport:
        other = copy.copy(self)
        other.collectives = collectives
        return other

    def agree(self, topic, facts, notes, **more):
        with tf.init_scope():
            self.before_agreement()
            return self._compare(topic, facts, notes, **more)

    def _compare(self, topic, facts, notes, **more):
        with _tf_private.doing("an agreement with the others"):
            return check_agreement(
                self.collectives.all_gather, self.addresses, topic, facts, notes, **more
            )

    def gather_processes(self, stacked):
        if stacked.shape.rank == 1:
            return self.collectives.all_gather(stacked)
        parts = [self.collectives.all_gather(part) for part in _split_columns(stacked)]
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=1)

    def reduce_processes(self, value):
        if self.processes == 2 and _is_short(value):  # as many bytes, but one round and not two
            pair = self.collectives.all_gather(value[None])
            return pair[0] + pair[1]
        parts = [self.collectives.all_reduce(part) for part in _split_columns(value[None])]
        return tf.concat(parts, axis=1)[0]

    def exchange_processes(self, rows):
        flat = tf.reshape(rows, [self.processes, -1])
        parts = [self.collectives.all_to_all(part) for part in _split_columns(flat)]
        return tf.reshape(tf.concat(parts, axis=1), tf.shape(rows))

    def broadcast_processes(self, value, source, processes):
        parts = _split_columns(value[None])
        parts = [self.collectives.broadcast(part, source, processes) for part in parts]
        return tf.concat(parts, axis=1)[0]


def _is_short(vector: tf.Tensor) -> bool:
    gathers = vector.dtype in (tf.float32, tf.float16, tf.int32)  # there is no bfloat16 kernel
    return gathers and vector.shape[0] is not None and vector.shape[0] < 2**18


def _split_columns(rows: tf.Tensor) -> list[tf.Tensor]:
    """Cuts [r, c, ...] along its columns so that no piece exceeds the collectives' limit."""
    columns = rows.shape[1]
    if columns is None or rows.shape[0] is None or rows.shape.rank > 2:
        return [rows]
    step = max(1, MAX_WORDS_PER_COLLECTIVE // max(1, rows.shape[0]))
    if columns <= step:
        return [rows]
    return [rows[:, start : start + step] for start in range(0, columns, step)]
