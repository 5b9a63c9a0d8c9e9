"""What the workers of `test_backup_and_restore.py` do; the test does parts of it itself."""

from __future__ import annotations

import time

import keras
import numpy as np
import tensorflow as tf

from tests.multi_process_functions import task_index
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.state.ledger import ledger_of
from tfqcomm.state.residuals import Residuals

BATCH, EXAMPLES, LEARNING_RATE = 48, 288, 0.1  # 6 batches, for 2, 3 or 4 replicas


class TwoOptimizers(keras.Model):
    """Each optimizer trains one of two layers."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(32)
        self.second = keras.layers.Dense(64)
        self.second_optimizer = keras.optimizers.Adam(1e-2)
        self(np.zeros([1, 64]))

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, data):
        x, _ = data
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(tf.square(self(x) - x)) / replicas
        second = self.second_optimizer
        if isinstance(second, (list, dict)):
            (second,) = second.values() if isinstance(second, dict) else second
        pairs = [(self.optimizer, self.first), (second, self.second)]
        for optimizer, layer in pairs:
            gradients = tape.gradient(loss, [v.value for v in layer.trainable_variables])
            optimizer.apply(gradients, layer.trainable_variables)
        return {"loss": loss * replicas}


class Interrupted(Exception):
    """What ends a run in the middle."""


def classification():
    random = np.random.RandomState(0)
    x = random.randn(EXAMPLES, 64).astype("float32")
    return x, (x @ random.randn(64, 10)).argmax(1).astype("int32")


def compiled(strategy, optimizer=None):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([64]), layers.Dense(32, activation="relu"), layers.Dense(10)]
        )
        model.compile(
            optimizer() if optimizer else keras.optimizers.SGD(LEARNING_RATE),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    return model


def train(model, backup, epochs, **kwargs):
    callbacks = [*kwargs.pop("callbacks", []), backup]
    kwargs = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(*classification(), epochs=epochs, callbacks=callbacks, **kwargs)


class InterruptAt(keras.callbacks.Callback):
    """Ends training as a crash would, where each epoch or batch begins."""

    def __init__(self, epoch, batch=0):
        super().__init__()
        self.when = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self._epoch, batch) >= self.when:
            raise Interrupted


def train_and_crash(strategy, backup_dir, epochs=2):
    """Leaves a backup of `epochs` epochs; returns the model as it was then."""
    model = compiled(strategy)
    try:
        train(model, BackupAndRestore(backup_dir), 100, callbacks=[InterruptAt(epochs)])
    except Interrupted:
        return model
    raise AssertionError("training came to an end")


def resume_without_gradients(strategy, backup_dir):
    """Goes on with one step whose gradients are zero: nothing but residuals is sent."""
    model = compiled(strategy)
    backup = BackupAndRestore(backup_dir, delete_checkpoint=False)
    weights = np.zeros([EXAMPLES], "float32")
    train(model, backup, 100, sample_weight=weights, callbacks=[StopAfter(1)])
    return model


class StopAfter(keras.callbacks.Callback):
    """Ends `fit` early, in good order."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch + 1 >= self.batches


def owed(model):
    """What the residuals owe each variable, in order; a collective."""
    total = ledger_of(model.optimizer).residuals.total()
    by_index = {int(key.partition(":")[0]): value for key, value in total.items()}
    return [
        by_index.get(i, np.zeros([np.prod(v.shape)], "float32")).reshape(v.shape)
        for i, v in enumerate(model.trainable_variables)
    ]


def settled(model):
    """The weights there would be if nothing were owed: what a restart must not change."""
    pairs = zip(model.trainable_variables, owed(model), strict=True)
    return [np.array(v.numpy()) - LEARNING_RATE * debt for v, debt in pairs]


# ------------------------------------------------------------------------------------- on workers


def crash_and_resume_on_two_workers(backup_dirs):
    """For each schedule: leaves a backup, then goes on from it once."""
    results = {}
    for schedule, backup_dir in backup_dirs.items():
        strategy = strategy_of_this_process(schedule=schedule)
        before = settled(train_and_crash(strategy, backup_dir))
        model = resume_without_gradients(strategy, backup_dir)
        results[schedule] = {"before": before, "after": settled(model), "owed": owed(model)}
    return results


_strategy = None


def strategy_of_this_process(**options):
    """One for all: see `MultiWorkerMirroredStrategy`."""
    global _strategy
    if _strategy is None:
        _strategy = MultiWorkerMirroredStrategy()
    _strategy.options = type(_strategy.options)("block_sign", **options)
    return _strategy


def train_through_a_crash(backup_dir, epochs):
    """Trains slowly, so that the test can kill a worker in the middle of an epoch."""
    restored = {}
    original = Residuals._initial_value

    def spy(self, slot):
        restored[slot.key] = original(self, slot)
        return restored[slot.key]

    Residuals._initial_value = spy
    strategy = MultiWorkerMirroredStrategy("top_k")
    model = compiled(strategy, lambda: keras.optimizers.Adam(1e-2))
    seen = []

    class Slow(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(epoch)
            print(f"epoch {epoch} begins.", flush=True)

        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.05)

    try:
        history = train(model, BackupAndRestore(backup_dir), epochs, callbacks=[Slow()]).history
    except Exception as error:
        print(f"interrupted by {error}", flush=True)
        time.sleep(600)
    return {
        "epochs": seen,
        "accuracy": history["accuracy"][-1],
        "restored": restored,
        "weights": [np.array(v.numpy()) for v in model.weights],
        "rank": task_index(),
    }
