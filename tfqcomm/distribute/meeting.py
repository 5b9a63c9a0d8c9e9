"""Where the workers meet during `fit`: what each epoch begins with, and whether it is the last."""

from __future__ import annotations

import dataclasses
import weakref

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm._tf_private import optimizers_of
from tfqcomm.distribute.interception import options_of
from tfqcomm.step.refusals import optimizer_facts
from tfqcomm.step.verification import fingerprint
from tfqcomm.transport.base import Transport

_ADVICE = (
    "A callback that changes the learning rate, the optimizer or the weights must be given to "
    "`fit` on all workers, and do the same there; and all must train for the same epochs."
)


@dataclasses.dataclass
class Epoch:
    """What the workers know of the epoch that is under way.

    Attributes:
        steps: int[P], how many each worker is going to take; the largest integer if not known.
        steps_are_sure: whether all workers have counted them, and nobody merely asked for them.
        taken: so far.
        wants_stop: whether a callback of this worker has ended the training.
        stops: whether all workers end it.
    """

    steps: np.ndarray
    steps_are_sure: bool = False
    taken: int = 0
    wants_stop: bool = False
    stops: bool = False

    @property
    def left(self) -> int:
        """Steps that all workers are going to take."""
        return int(self.steps.min()) - self.taken


UNKNOWN = np.iinfo(np.int64).max
_epochs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> Epoch


def epoch_of(model: keras.Model) -> Epoch:
    """The epoch of the `fit` that is under way."""
    return _epochs.setdefault(model, Epoch(np.array([UNKNOWN])))


class Meeting(keras.callbacks.Callback):
    """The last of the callbacks on every worker of a `fit`.

    Callbacks act where they run. One that changes the learning rate on one worker alone would train
    two models; one that sets `stop_training` would leave the others waiting. So at the begin of
    every epoch the workers compare what they train with, and what: an error says what differs. And
    what one wants to end all end: after the next step, or at the end of the epoch.

    Args:
        transport: to the other workers.
        counted: whether this worker has a batch for each of the steps of an epoch.
    """

    def __init__(self, transport: Transport, *, counted: bool):
        super().__init__()
        self._transport = transport
        self._counted = counted

    def on_epoch_begin(self, epoch, logs=None):
        """Compares the epoch, the optimizer's settings and the weights."""
        facts = {"epoch": str(epoch)}
        for number, optimizer in enumerate(optimizers_of(self.model)):
            place = f"optimizer {number}: " if number else ""
            facts |= {f"{place}{k}": v for k, v in optimizer_facts(optimizer).items()}
            facts[f"{place}iterations"] = str(int(optimizer.iterations.numpy()))
        if self._replicas_are_equal():
            facts["fingerprint of the weights"] = str(int(self._fingerprint()[0]))
        self._transport.agree("begin an epoch of fit", facts, {}, advice=_ADVICE)
        steps = (self.params or {}).get("steps")
        own = tf.constant([steps or UNKNOWN, int(bool(steps) and self._counted)], tf.int64)
        with _tf_private.doing("the begin of an epoch of fit"):
            steps, sure = self._transport.gather_vectors(own).numpy().T
        _epochs[self.model] = Epoch(steps, bool(sure.all()))

    def on_train_batch_end(self, batch, logs=None):
        """Notes a wish to stop, which the others hear of with the next step."""
        epoch = epoch_of(self.model)
        if self.model.stop_training and not epoch.stops:
            epoch.wants_stop = True
            self.model.stop_training = False

    def on_epoch_end(self, epoch, logs=None):
        """Ends training everywhere if it ends anywhere."""
        wants_stop = self.model.stop_training or epoch_of(self.model).wants_stop
        with _tf_private.doing("the end of an epoch of fit"):
            wishes = self._transport.gather_vectors(tf.constant([int(wants_stop)]))
        self.model.stop_training = bool(np.any(wishes.numpy()))

    def _replicas_are_equal(self):
        options = options_of(self.model.distribute_strategy)
        inside = optimizers_of(self.model)  # also of a `LossScaleOptimizer`
        return options.verify and all(getattr(o, "synchronous", True) for o in inside)

    def _fingerprint(self):
        strategy = self.model.distribute_strategy
        variables = [
            strategy.experimental_local_results(v.value)[0] for v in self.model.trainable_variables
        ]
        return fingerprint(variables)
