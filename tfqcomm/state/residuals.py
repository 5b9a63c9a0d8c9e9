"""Residuals: what compression left out of the messages so far, kept by replica and tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.kernels.layout import Layout
from tfqcomm.transport.base import Transport

_OF_MESSAGES = ("worker", "process")  # kinds


@dataclasses.dataclass(frozen=True)
class Slot:
    """Names the residual of one tensor, or of the part of a tensor that a replica owns.

    Attributes:
        kind: "worker" for residuals of a replica's own messages; "process" for those of the mean
            message of a process, in a hierarchical exchange; "owner" for those of the re-encoded
            mean in a two-phase exchange; "debt" for what a restored run owes to the mean of a
            tensor that travels without error feedback, once in each process.
        key: the tensor's name.
        size: its elements, n.
        start, stop: the part kept here.
    """

    kind: str
    key: str
    size: int
    start: int
    stop: int


class Residuals:
    """The residuals of one optimizer, for all replicas of this process.

    What a checkpoint keeps is what they owe the mean message, summed over all replicas: a
    worker's residual counts 1 / W, as its messages do, that of a process likewise, and an owner's
    in full. So a run may go on
    with another number of replicas, or another schedule, and nothing is lost or counted twice.
    """

    def __init__(self, transport: Transport):
        self._transport = transport
        self._sizes: dict[str, int] = {}  # key -> n, equal on all processes
        self._vectors: dict[tuple[int, tuple[Slot, ...], Layout], tf.Variable] = {}
        self._pending: dict[str, np.ndarray] = {}
        self._joints: dict[str, dict[str, int]] = {}  # name of several tensors -> their sizes

    def declare(self, key: str, size: int) -> None:
        """Makes a tensor known; all processes declare the same ones in the same order."""
        self._sizes[key] = size

    def declare_joint(self, name: str, sizes: dict[str, int]) -> None:
        """Makes known under what name backups of earlier versions keep several tensors in a row."""
        self._joints[name] = sizes
        self._take_apart(name)

    def _take_apart(self, name: str) -> None:
        sizes = self._joints[name]
        if name not in self._pending or len(self._pending[name]) != sum(sizes.values()):
            return
        joint = self._pending.pop(name)
        parts = np.split(joint, np.cumsum(list(sizes.values()))[:-1])
        self._pending |= dict(zip(sizes, parts, strict=True))

    def vector(self, replica: int, slots: tuple[Slot, ...], layout: Layout) -> tf.Variable:
        """The residuals of a bucket on a local replica, float32[layout.size], created as zeros.

        Args:
            slots: what stands in it, in order; several to a vector of the layout if it is joint.
        """
        place = replica, slots, layout
        if place not in self._vectors:
            with tf.init_scope():
                values = [self._first_value(replica, slot) for slot in slots]
            self._vectors[place] = _tf_private.local_variable(
                _packed(values, layout),
                name=f"residual/{slots[0].kind}/{slots[0].key}",
                device=self._transport.devices[replica],
            )
        return self._vectors[place]

    def variable(self, replica: int, slot: Slot) -> tf.Variable:
        """The residual of one tensor, or of a part of it: float32[stop - start]."""
        return self.vector(replica, (slot,), Layout((slot.stop - slot.start,)))

    def _first_value(self, replica: int, slot: Slot) -> np.ndarray:
        """What another bucket kept of the same elements, and no longer does; or what was saved.

        The cut into buckets may change, as where layers are frozen.
        """
        holders = [place for place in self._vectors if place[0] == replica and slot in place[1]]
        if not holders:
            return self._initial_value(slot)
        total = np.zeros([slot.stop - slot.start], np.float32)
        for place in holders:
            _, slots, layout = place
            values = _unpacked(self._vectors[place].numpy(), slots, layout)
            index = slots.index(slot)
            total, values[index] = total + values[index], np.zeros_like(total)
            self._vectors[place].assign(_packed(values, layout))
        return total

    def debt(self, key: str, size: int) -> tf.Variable | None:
        """What a restored run owes to the mean of `key`, float32[n], where no residual pays it.

        Whoever adds it to the mean assigns zeros. To be called behind the exchange of a step,
        which creates residuals of all that it compresses with error feedback.
        """
        slot = Slot("debt", key, size, 0, size)
        if self._exists(slot):
            return self.variable(0, slot)
        paid = any(other.key == key for other in self._slots())
        if paid or key not in self._pending:
            return None
        self.declare(key, size)
        return self.variable(0, slot)

    def _slots(self) -> set[Slot]:
        return {slot for _, slots, _ in self._vectors for slot in slots}

    def _exists(self, slot: Slot) -> bool:
        return any(slot in slots for _, slots, _ in self._vectors)

    def variables(self) -> dict[tuple[int, tuple[Slot, ...]], tf.Variable]:
        """All there are, by local replica and slots."""
        return {(replica, slots): v for (replica, slots, _), v in self._vectors.items()}

    def norm(self) -> float:
        """Euclidean norm of the first local replica's own residuals."""
        norms = [
            np.linalg.norm(variable.numpy().astype(np.float64))
            for (replica, slots, _), variable in self._vectors.items()
            if replica == 0 and slots[0].kind in _OF_MESSAGES
        ]
        return float(np.linalg.norm(norms))

    def total(self) -> dict[str, np.ndarray]:
        """What all replicas of all processes owe: a collective, to be called on all of them.

        Returns:
            key -> float32[n].
        """
        local = {key: np.zeros([size], np.float32) for key, size in self._sizes.items()}
        world, processes = self._transport.world, self._transport.processes
        holders = {"worker": world, "process": processes, "owner": 1, "debt": processes}
        for (_, slots, layout), variable in self._vectors.items():
            for slot, values in zip(slots, _unpacked(variable.numpy(), slots, layout), strict=True):
                local[slot.key][slot.start : slot.stop] += values / holders[slot.kind]
        for key in self._pending.keys() - {slot.key for slot in self._slots()}:
            # It waits for its variable, on every process.
            owed = self._pending[key].astype(np.float32)
            local[key] = owed / np.float32(self._transport.processes)
        local = {key: local[key] for key in sorted(local)}  # in the same order everywhere
        return self._transport.add_up(local)

    def load_total(self, total: dict[str, np.ndarray]) -> None:
        """Gives a saved `total()` to the replicas there are now.

        Residuals that do not exist yet receive their part when they are created.
        """
        self._pending = dict(total)
        for name in self._joints:
            self._take_apart(name)
        given: set[tuple[int, Slot]] = set()  # once, where several buckets hold an element
        for (replica, slots, layout), variable in self._vectors.items():
            values = [
                self._initial_value(slot)
                if (replica, slot) not in given
                else np.zeros([slot.stop - slot.start], np.float32)
                for slot in slots
            ]
            given |= {(replica, slot) for slot in slots}
            variable.assign(_packed(values, layout))

    def _initial_value(self, slot: Slot) -> np.ndarray:
        saved = self._pending.get(slot.key)
        in_debt = self._exists(Slot("debt", slot.key, slot.size, 0, slot.size))
        if slot.kind in _OF_MESSAGES and in_debt:  # which is paid apart
            saved = None
        # Workers take all of it over: that of W equal residuals of weight 1 / W.
        if saved is None or slot.kind == "owner":
            return np.zeros([slot.stop - slot.start], np.float32)
        if saved.shape != (slot.size,):
            raise ValueError(
                f"The saved residual of `{slot.key}` must have {slot.size} elements. "
                f"Received: shape={saved.shape}. Was it saved by another model?"
            )
        return saved[slot.start : slot.stop].astype(np.float32)


def _packed(values: Sequence[np.ndarray], layout: Layout) -> np.ndarray:
    """The values of slots, one after the other, as they stand in a bucket."""
    flat, row = np.zeros([layout.size], np.float32), np.concatenate(values)
    begin = 0
    for start, n in zip(layout.starts, layout.sizes, strict=True):
        flat[start : start + n] = row[begin : begin + n]
        begin += n
    return flat


def _unpacked(flat: np.ndarray, slots: Sequence[Slot], layout: Layout) -> list[np.ndarray]:
    """Inverse of `_packed`."""
    parts = [flat[start : start + n] for start, n in zip(layout.starts, layout.sizes, strict=True)]
    ends = np.cumsum([slot.stop - slot.start for slot in slots])
    return np.split(np.concatenate(parts), ends[:-1])
