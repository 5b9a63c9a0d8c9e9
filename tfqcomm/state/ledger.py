"""The ledger: all that is kept beside an optimizer, found in one place.

    residuals      what compression has left out, by replica and tensor
    worker_state   what workers remember on their own: moments, momenta, losses
    kept           whatever else a run needs to go on: a budget, a centre, what leaders sent
    meter, routes  what was sent, and how
    verified       what the replicas have proved to one another

One object for each optimizer, made at its first use. The first three are its state: `state` is what
a backup holds of them, exact over all replicas of all processes; `memory` is what is saved with the
optimizer itself, by one process alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar, cast

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.state.residuals import Residuals
from tfqcomm.state.traffic import Meter, Route
from tfqcomm.state.worker_state import WorkerState
from tfqcomm.transport import Transport

Arrays = Mapping[str, np.ndarray]


class Keeper(Protocol):
    """Part of an optimizer's state."""

    def state(self) -> dict[str, np.ndarray]:
        """What is saved of it, the same on all processes."""

    def load_state(self, state: Arrays) -> None:
        """Inverse of `state`; what is missing stays as it is."""


Kept = TypeVar("Kept", bound=Keeper)


class Tables(Protocol):
    """Weights, with all that is kept of their rows, that live on parameter servers alone."""

    def save(self, directory: str) -> None:
        """Lets the servers write them into a new directory."""

    def restore(self, directory: str) -> None:
        """Inverse of `save`, also on another number of servers."""

    def left_out(self) -> AbstractContextManager:
        """Scope in which nothing of them is read or written otherwise."""


class Ledger:
    """What is kept beside one optimizer.

    Attributes:
        transport: to all replicas.
        residuals: error feedback of this optimizer alone.
        worker_state: what its worker half remembers.
        kept: what else its state is made of, by part.
        meter: what has been sent.
        routes: how each tensor travels; known once a step has been traced.
        verified: bool variable, whether the replicas' weights were compared.
        served: whether weights live on parameter servers, and `residuals` and `worker_state` stand
            in for those of workers elsewhere: nobody can take a step with them here.
        tables: weights that this process does not hold, if there are any.
        refresh: called before a backup where the model is behind them, within an epoch; else None.
            It is given the directory to save tables in, or None.
    """

    def __init__(self, transport: Transport):
        self.transport = transport
        self.residuals = Residuals(transport)
        self.worker_state = WorkerState(transport)
        self.kept: dict[str, Keeper] = {}
        self.meter = Meter()
        self.routes: tuple[Route, ...] = ()
        self.verified = _tf_private.local_variable(False, name="verified", device="CPU:0")
        self.served = False
        self._here = self.residuals, self.worker_state  # of this process' own steps
        self._steps_here = False  # whether there were any
        self.tables: Tables | None = None
        self.refresh: Callable[[str | None], None] | None = None
        self._saved: dict[str, dict[str, np.ndarray]] = {}  # part -> for one yet to be made

    def keep(self, part: str, make: Callable[[], Kept]) -> Kept:
        """The keeper of a part, made at its first use and given what was saved of it before."""
        if part not in self.kept:
            self.kept[part] = make()
            self.kept[part].load_state(self._saved.get(part, {}))
        return cast(Kept, self.kept[part])

    def serve(
        self,
        routes: Sequence[Route],
        residuals: Residuals | None = None,
        worker_state: WorkerState | None = None,
    ) -> None:
        """From now on weights live on servers, and workers keep what stands in for these."""
        if not self.served:
            before = self.state()  # of a backup that was restored, or of steps of this process
            self.residuals = residuals or self.residuals
            self.worker_state = worker_state or self.worker_state
            self.load_state(before)
            self.served = True
            self.routes = tuple(routes)

    def step_here(self) -> None:
        """Called before this process takes steps itself: it takes over what workers have."""
        self._steps_here = True
        self.end_serving()

    def end_serving(self) -> None:
        """If this process takes steps, too, gives what workers have to the graphs it has traced."""
        if self.served and self._steps_here:
            with tf.init_scope():  # a step may be about to be traced
                before = self.state()
                self.residuals, self.worker_state = self._here
                self.load_state(before)
            self.served = False
            self.routes = ()

    def state(self, directory: str | None = None) -> dict[str, np.ndarray]:
        """What a backup keeps beside Keras' variables: a collective, for all processes to call.

        Args:
            directory: where `tables` are saved, which then are left out; None to include them.
        """
        apart = None
        if self.refresh is not None:
            self.refresh(directory)
        if directory is not None and self.tables is not None:
            apart = self.tables
            if self.refresh is None:
                apart.save(directory)
        with apart.left_out() if apart is not None else nullcontext():
            residual, worker = self.residuals.total(), self.worker_state.mean()
        return _flat({"residual": residual, "worker": worker, **self._parts()})

    def memory(self) -> dict[str, np.ndarray]:
        """What of `state` is saved with the optimizer: without residuals, and no collective.

        Of several processes each has its own mean of what workers remember.
        """
        worker = self.worker_state
        mean = worker.mean() if self.served else worker.local_mean()
        return _flat({"worker": mean, **self._parts()})

    def load_state(self, state: Arrays) -> None:
        """Inverse of `state`, also on another number of replicas."""
        parts = _nested(state)
        self.residuals.load_total(parts.pop("residual", {}))
        self._load_parts(parts)

    def load_memory(self, memory: Arrays) -> None:
        """Inverse of `memory`; residuals stay."""
        self._load_parts(_nested(memory))

    def _parts(self) -> dict[str, dict[str, np.ndarray]]:
        return self._saved | {part: keeper.state() for part, keeper in self.kept.items()}

    def _load_parts(self, parts):
        self.worker_state.load_mean(parts.pop("worker", {}))
        self._saved = parts
        for part, keeper in self.kept.items():
            keeper.load_state(parts.get(part, {}))


def _flat(parts: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
    """The keys of an archive: "part/name"."""
    return {f"{part}/{key}": v for part, values in parts.items() for key, v in values.items()}


def _nested(state: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """Inverse of `_flat`."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, value in state.items():
        part, key = name.split("/", 1)
        parts.setdefault(part, {})[key] = value
    return parts


class _Book:
    """An optimizer's ledger, or what was restored for one that is yet to be made."""

    def __init__(self):
        self.ledger: Ledger | None = None
        self.restored: dict[str, np.ndarray] | None = None  # of a backup
        self.remembered: dict[str, np.ndarray] | None = None  # saved with the optimizer
        self.watched = False


_books: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> _Book


def _book(optimizer) -> _Book:
    return _books.setdefault(optimizer, _Book())


def ledger_for(optimizer, transport: Transport) -> Ledger:
    """The ledger of `optimizer` for a step of this process; see `new_ledger`."""
    ledger = new_ledger(optimizer, transport)
    ledger.step_here()
    return ledger


def new_ledger(optimizer, transport: Transport) -> Ledger:
    """The ledger of `optimizer`, made at its first use: no two optimizers share one."""
    book = _book(optimizer)
    if book.ledger is None:
        book.ledger = Ledger(transport)
        if book.remembered is not None:
            book.ledger.load_memory(book.remembered)
        if book.restored is not None:
            book.ledger.load_state(book.restored)
        book.remembered = book.restored = None
        if book.watched:
            book.ledger.meter.watch()
    return book.ledger


def ledger_of(optimizer) -> Ledger | None:
    """The ledger of `optimizer`, or None when it has not exchanged anything yet."""
    book = _books.get(optimizer)
    return book.ledger if book else None


def watch(optimizer) -> None:
    """From now on somebody reads the norms of what `optimizer` sends."""
    book = _book(optimizer)
    book.watched = True
    if book.ledger is not None:
        book.ledger.meter.watch()


def restore_state(optimizer, state: Arrays) -> None:
    """Gives `optimizer` what `Ledger.state` once returned."""
    book = _book(optimizer)
    if book.ledger is not None:
        book.ledger.load_state(state)
    else:
        book.restored = dict(state)


def memory_of(optimizer) -> dict[str, np.ndarray]:
    """What `optimizer` keeps beside Keras' variables and residuals: see `Ledger.memory`."""
    book = _book(optimizer)
    if book.ledger is not None:
        return book.ledger.memory()
    restored = {k: v for k, v in (book.restored or {}).items() if "residual/" not in k}
    return restored or dict(book.remembered or {})


def restore_memory(optimizer, memory: Arrays) -> None:
    """Gives `optimizer` what `memory_of` once returned."""
    book = _book(optimizer)
    if book.ledger is not None:
        book.ledger.load_memory(memory)
    else:
        book.remembered = dict(memory)
