"""Residuals: what compression left out of the messages so far, kept by replica and tensor."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport


@dataclasses.dataclass(frozen=True)
class Slot:
    """Names the residual of one tensor, or of the part of a tensor that a replica owns.

    Attributes:
        kind: "worker" for residuals of a replica's own messages; "owner" for those of the
            re-encoded mean in a two-phase exchange; "debt" for what a restored run owes to the
            mean of a tensor that travels without error feedback, once in each process.
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
    worker's residual counts 1 / W, as its messages do, and an owner's in full. So a run may go on
    with another number of replicas, or another schedule, and nothing is lost or counted twice.
    """

    def __init__(self, transport: Transport):
        self._transport = transport
        self._sizes: dict[str, int] = {}  # key -> n, equal on all processes
        self._variables: dict[tuple[int, Slot], tf.Variable] = {}
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

    def variable(self, replica: int, slot: Slot) -> tf.Variable:
        """The residual variable of a local replica, float32[stop - start], created as zeros."""
        if (replica, slot) not in self._variables:
            self._variables[replica, slot] = _tf_private.local_variable(
                self._initial_value(slot),
                name=f"residual/{slot.kind}/{slot.key}",
                device=self._transport.devices[replica],
            )
        return self._variables[replica, slot]

    def existing(self, replica: int, slot: Slot) -> tf.Variable | None:
        """That variable if there is one: what travels dense has none."""
        return self._variables.get((replica, slot))

    def debt(self, key: str, size: int) -> tf.Variable | None:
        """What a restored run owes to the mean of `key`, float32[n], where no residual pays it.

        Whoever adds it to the mean assigns zeros. To be called behind the exchange of a step,
        which creates residuals of all that it compresses with error feedback.
        """
        slot = Slot("debt", key, size, 0, size)
        if (0, slot) in self._variables:
            return self._variables[0, slot]
        paid = any(other.key == key for _, other in self._variables)
        if paid or key not in self._pending:
            return None
        self.declare(key, size)
        return self.variable(0, slot)

    def variables(self) -> dict[tuple[int, Slot], tf.Variable]:
        """All there are, by local replica and slot."""
        return dict(self._variables)

    def norm(self) -> float:
        """Euclidean norm of the first local replica's own residuals."""
        norms = [
            np.linalg.norm(variable.numpy().astype(np.float64))
            for (replica, slot), variable in self._variables.items()
            if replica == 0 and slot.kind == "worker"
        ]
        return float(np.linalg.norm(norms))

    def total(self) -> dict[str, np.ndarray]:
        """What all replicas of all processes owe: a collective, to be called on all of them.

        Returns:
            key -> float32[n].
        """
        local = {key: np.zeros([size], np.float32) for key, size in self._sizes.items()}
        holders = {"worker": self._transport.world, "owner": 1, "debt": self._transport.processes}
        for (_, slot), variable in self._variables.items():
            local[slot.key][slot.start : slot.stop] += variable.numpy() / holders[slot.kind]
        for key in self._pending.keys() - {slot.key for _, slot in self._variables}:
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
        for (_, slot), variable in self._variables.items():
            variable.assign(self._initial_value(slot))

    def _initial_value(self, slot: Slot) -> np.ndarray:
        saved = self._pending.get(slot.key)
        in_debt = (0, Slot("debt", slot.key, slot.size, 0, slot.size)) in self._variables
        if slot.kind == "worker" and in_debt:  # which is paid apart
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
