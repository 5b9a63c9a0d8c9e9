"""Sees to it that no worker waits for ever, and says who is missing and what each is doing.

Collectives have no time limit of their own. Beside the program two threads look after them:

    pulse    once a second every worker tells all others how many collectives it has begun and
             ended, where it is, and for how long (a small all-gather in a group of its own)
    health   every few seconds each peer is asked whether it is there at all (a remote call that
             the operating system answers for a process that died, and nobody for a stopped one)

What all workers know of each other is judged alike by all: see `verdict`. A worker whose program
has come to its end waits for the others' ends, so that nobody takes it for lost.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private

PULSE_SECONDS = 1.0
HEALTH_SECONDS = 5.0  # between two questions to all peers, and for each answer
HEALTH_ATTEMPTS = 2
SETTLED_SECONDS = 2.5  # how long a worker must have waited for its place to be believed
_TEXT_BYTES = 160


@dataclasses.dataclass(frozen=True)
class Pulse:
    """What one worker tells the others.

    Attributes:
        begun, ended: collectives so far; one that is begun and not ended is waited in.
        seconds: since the last of them began or ended.
        finished: whether its program has come to its end.
        place: where it is, or was last.
    """

    begun: int
    ended: int
    seconds: float
    finished: bool
    place: str

    @property
    def waits(self) -> bool:
        """Whether it is in a collective, and has been for more than a moment."""
        return self.begun > self.ended and self.seconds >= SETTLED_SECONDS

    def to_words(self) -> np.ndarray:
        """int32[44]."""
        numbers = [self.begun, self.ended, int(self.seconds * 1000), int(self.finished)]
        text = self.place.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        words = (np.array(numbers, np.int64) & 0x7FFFFFFF).astype(np.int32)
        return np.concatenate([words, np.frombuffer(text, "<i4").astype(np.int32)])

    @classmethod
    def from_words(cls, words: np.ndarray) -> Pulse:
        """Inverse of `to_words`."""
        text = words[4:].astype("<i4").tobytes().rstrip(b"\0").decode(errors="ignore")
        begun, ended, milliseconds, finished = (int(word) for word in words[:4])
        return cls(begun, ended, milliseconds / 1000, bool(finished), text)


def verdict(pulses: Sequence[Pulse], names: Sequence[str], timeout_seconds: float) -> str | None:
    """Why this cluster cannot go on, or None while it can.

    The n-th collective of every worker is the same one. So workers that wait in their n-th at
    different places wait for ever, and so does one that waits in a collective which a worker whose
    program has ended never began.

    Args:
        pulses: of all workers at one moment, in rank order.
        names: the workers' addresses.
        timeout_seconds: how long one may wait for another that is busy elsewhere; 0: for ever.
    """
    waiting = [pulse for pulse in pulses if pulse.waits]
    if not waiting:
        return None
    number = min(pulse.begun for pulse in waiting)
    here = [pulse for pulse in waiting if pulse.begun == number]
    if len({pulse.place for pulse in here}) > 1:
        return (
            "The workers of this cluster wait for one another in different places:\n"
            f"{_describe(pulses, names)}\n"
            "What communicates (`fit`, `evaluate`, `predict`, saving a backup) must be called on "
            "all workers, in the same order. On one worker alone `model(x)` works."
        )
    if any(pulse.finished and pulse.begun < number for pulse in pulses):
        return (
            "A worker of this cluster has come to its end while others wait for it:\n"
            f"{_describe(pulses, names)}\n"
            "Either it failed (see what it printed), or it was given fewer steps or epochs."
        )
    longest = max(pulse.seconds for pulse in here)
    if timeout_seconds and longest > timeout_seconds:
        return (
            f"A worker has waited {longest:.0f} seconds for the others, and "
            f"timeout_seconds={timeout_seconds:g}:\n{_describe(pulses, names)}\n"
            "If a worker may be busy for longer, with saving for instance, raise `timeout_seconds`."
        )
    return None


def _describe(pulses, names) -> str:
    lines = []
    for rank, (pulse, name) in enumerate(zip(pulses, names, strict=True)):
        if pulse.finished:
            what = f"has ended; last in: {pulse.place}"
        elif pulse.begun > pulse.ended:
            what = f"waits for {pulse.seconds:.0f} s in: {pulse.place}"
        else:
            what = f"is busy for {pulse.seconds:.0f} s; last in: {pulse.place}"
        lines.append(f"  worker {rank} ({name}) {what}")
    return "\n".join(lines)


class Watch:
    """The two threads of one strategy in this process.

    Args:
        strategy: whose workers are watched.
        names: their addresses, in rank order.
        timeout_seconds: see `verdict`.
    """

    def __init__(self, strategy, names: Sequence[str], timeout_seconds: float):
        self._strategy = strategy
        self._names = list(names)
        self._timeout_seconds = timeout_seconds
        self._progress = _tf_private.progress_of(strategy)
        device = strategy.extended.worker_devices[0]
        self._collectives = _tf_private.Collectives(strategy, device, aside="watch")
        self._finishing = threading.Event()
        self._over = threading.Event()  # nothing is left to be watched
        self._seen = ((0, 0), time.monotonic())
        self._threads = [self._thread(self._pulse), self._thread(self._health)]
        atexit.register(self.finish)

    def collectives(self) -> int:
        """How many collectives this worker has begun; eager."""
        return self._progress.read()[0]

    def finish(self) -> None:
        """Waits until all workers have come to their end, or one of them is lost."""
        self._finishing.set()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.finish)

    def _thread(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True, name=f"tfqcomm{work.__name__}")
        thread.start()
        return thread

    def _pulse(self) -> None:
        while not self._over.is_set():
            try:
                pulses = self._exchange()
            except tf.errors.OpError:
                break  # the collectives were aborted, by the other thread or by a peer's end
            if all(pulse.finished for pulse in pulses):
                break
            reason = verdict(pulses, self._names, self._timeout_seconds)
            if reason and not self._finishing.is_set():
                self._abort(reason)
            self._finishing.wait(PULSE_SECONDS)
            if self._finishing.is_set():
                self._over.wait(PULSE_SECONDS / 10)
        self._over.set()

    def _exchange(self) -> list[Pulse]:
        with _tf_private.doing("a pulse"):
            gathered = self._collectives.all_gather(tf.constant(self._own().to_words()[None]))
        return [Pulse.from_words(words) for words in gathered.numpy()]

    def _own(self) -> Pulse:
        begun, ended, place = self._progress.read()
        if self._seen[0] != (begun, ended):
            self._seen = ((begun, ended), time.monotonic())
        return Pulse(
            begun=begun,
            ended=ended,
            seconds=time.monotonic() - self._seen[1],
            finished=self._finishing.is_set(),
            place=_tf_private.place_text(place),
        )

    def _health(self) -> None:
        peers = [p for p in range(len(self._names)) if p != self._collectives.rank]
        while not self._over.wait(HEALTH_SECONDS):
            for peer in peers:
                failure = self._failure(peer)
                if failure and not self._over.is_set():
                    self._abort(f"cluster check alive failed: {failure}")

    def _failure(self, peer: int) -> str | None:
        for _ in range(HEALTH_ATTEMPTS):
            failure = _tf_private.peer_failure(self._strategy, peer, HEALTH_SECONDS)
            if failure is None:
                return None
        return f"worker {peer} ({self._names[peer]}), {failure}"

    def _abort(self, reason: str) -> None:
        self._over.set()
        if not self._finishing.is_set():
            logging.error("%s", reason)
        _tf_private.abort_collectives(reason)
