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

    def common(self, other: Slot) -> tuple[slice, slice] | None:
        """Where in this one, and where in the other, the elements are that both have, if any."""
        low, high = max(self.start, other.start), min(self.stop, other.stop)
        if self.key != other.key or low >= high:
            return None
        return (
            slice(low - self.start, high - self.start),
            slice(low - other.start, high - other.start),
        )


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
        self._parts: dict[str, tuple[str, int, int]] = {}  # name -> key, n, first element

    def declare(self, key: str, size: int) -> None:
        """Makes a tensor known; all processes declare the same ones in the same order."""
        key, size, _ = self._parts.get(key, (key, size, 0))
        self._sizes[key] = size

    def declare_part(self, name: str, key: str, size: int, start: int) -> None:
        """Makes known a name for elements of the tensor `key` of `size`, from `start` on.

        What is owed of them is kept as the tensor's: it survives a cut into other parts.
        """
        self._parts[name] = key, size, start

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
        slots = tuple(self._of_tensor(slot) for slot in slots)
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
        """What other buckets kept of the same elements, and no longer do; or what was saved.

        The cut into buckets may change, as where layers are frozen.
        """
        found = np.zeros([slot.stop - slot.start], np.float32)
        kept = np.zeros(found.shape, bool)
        for (owner, slots, layout), variable in self._vectors.items():
            same = [other.kind == slot.kind and slot.common(other) for other in slots]
            if owner != replica or not any(same):
                continue
            values = _unpacked(variable.numpy(), slots, layout)
            for value, common in zip(values, same, strict=True):
                if common:
                    here, there = common
                    found[here] += value[there]
                    value[there] = 0
                    kept[here] = True
            variable.assign(_packed(values, layout))
        return found if kept.all() else np.where(kept, found, self._initial_value(slot))

    def debt(self, key: str, size: int) -> tf.Variable | None:
        """What a restored run owes to the mean of `key`, float32[n], where no residual pays it.

        Whoever adds it to the mean assigns zeros. To be called behind the exchange of a step,
        which creates residuals of all that it compresses with error feedback.
        """
        slot = self._of_tensor(Slot("debt", key, size, 0, size))
        slots = self._slots()
        if slot in slots:
            return self.variable(0, slot)
        paid = any(slot.common(other) for other in slots)
        if paid or slot.key not in self._pending:
            return None
        self.declare(key, size)
        return self.variable(0, slot)

    def _slots(self) -> set[Slot]:
        return {slot for _, slots, _ in self._vectors for slot in slots}

    def _of_tensor(self, slot: Slot) -> Slot:
        if slot.key not in self._parts:
            return slot
        key, size, begin = self._parts[slot.key]
        return Slot(slot.kind, key, size, begin + slot.start, begin + slot.stop)

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
        there_are = self._slots()
        for key, saved in self._pending.items():  # may wait for its variable, on every process
            waiting = saved.astype(np.float32)
            whole = Slot("debt", key, len(waiting), 0, len(waiting))
            for there, _ in filter(None, map(whole.common, there_are)):
                waiting[there] = 0
            if key not in local:
                local[key] = np.zeros_like(waiting)
            local[key] += waiting / np.float32(processes)
        local = {key: local[key] for key in sorted(local)}  # in the same order everywhere
        return self._transport.add_up(local)

    def load_total(self, total: dict[str, np.ndarray]) -> None:
        """Gives a saved `total()` to the replicas there are now.

        Residuals that do not exist yet receive their part when they are created.
        """
        self._pending = dict(total)
        for name in self._joints:
            self._take_apart(name)
        given: dict[tuple, list[Slot]] = {}  # once, where several buckets hold an element
        for (replica, slots, layout), variable in self._vectors.items():
            values = []
            for slot in slots:
                before = given.setdefault((replica, slot.kind, slot.key), [])
                values.append(_without(self._initial_value(slot), slot, before))
                before.append(slot)
            variable.assign(_packed(values, layout))

    def _initial_value(self, slot: Slot) -> np.ndarray:
        saved = self._pending.get(slot.key)
        # Workers take all of it over: that of W equal residuals of weight 1 / W.
        if saved is None or slot.kind == "owner":
            return np.zeros([slot.stop - slot.start], np.float32)
        if saved.shape != (slot.size,):
            raise ValueError(
                f"The saved residual of `{slot.key}` must have {slot.size} elements. "
                f"Received: shape={saved.shape}. Was it saved by another model?"
            )
        value = saved[slot.start : slot.stop].astype(np.float32)
        if slot.kind not in _OF_MESSAGES:
            return value
        debts = [other for other in self._slots() if other.kind == "debt"]  # which are paid apart
        return _without(value, slot, debts)


def _without(value: np.ndarray, slot: Slot, others: Sequence[Slot]) -> np.ndarray:
    """The value of a slot, with zeros where any of the others has the element, too."""
    for here, _ in filter(None, map(slot.common, others)):
        value[here] = 0
    return value


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
