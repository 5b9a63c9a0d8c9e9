"""Keras' callbacks; those that write files get the same path on all workers."""

from __future__ import annotations

import pathlib

import keras

from tests.distribute.scenarios.tools import classification, compiled, fit, found, scenario

callbacks = keras.callbacks


@scenario
def early_stopping_restores_the_best_weights(strategy, directory):
    model = compiled(strategy, optimizer=lambda: keras.optimizers.SGD(2.0, momentum=0.9))
    x, y = classification()
    stop = callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    history = fit(model, x, y, epochs=12, validation_data=(x, y), callbacks=[stop])
    return found(strategy, model, history=history, best=stop.best_epoch, stopped=stop.stopped_epoch)


@scenario
def reduce_learning_rate_on_plateau(strategy, directory):
    model = compiled(strategy)
    plateau = callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=10.0)
    history = fit(model, *classification(), epochs=4, callbacks=[plateau])
    return found(strategy, model, history=history)


@scenario
def learning_rate_scheduler(strategy, directory):
    model = compiled(strategy)
    schedule = callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5**epoch)
    history = fit(model, *classification(), epochs=3, callbacks=[schedule])
    return found(strategy, model, history=history)


@scenario
def model_checkpoint(strategy, directory):
    model = compiled(strategy)
    x, y = classification()
    save = [
        callbacks.ModelCheckpoint(pathlib.Path(directory, "checkpoints", "epoch-{epoch}.keras")),
        callbacks.ModelCheckpoint(
            pathlib.Path(directory, "checkpoints", "best.weights.h5"),
            monitor="val_loss",
            save_best_only=True,
            save_weights_only=True,
        ),
    ]
    history = fit(model, x, y, validation_data=(x, y), callbacks=save)
    predicted = model.predict(x[:32], verbose=0)
    return found(strategy, model, history=history, best=float(save[1].best), predicted=predicted)


@scenario
def csv_logger(strategy, directory):
    model = compiled(strategy)
    log = callbacks.CSVLogger(pathlib.Path(directory, "log.csv"))
    return found(strategy, model, history=fit(model, *classification(), callbacks=[log]))


@scenario
def tensorboard_with_histograms(strategy, directory):
    model = compiled(strategy)
    x, y = classification()
    board = callbacks.TensorBoard(pathlib.Path(directory, "board"), histogram_freq=1)
    history = fit(model, x, y, validation_data=(x, y), callbacks=[board])
    return found(strategy, model, history=history)


class Interrupt(callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


@scenario
def backup_and_restore_of_keras(strategy, directory):
    """Two epochs, an interruption, and the other two: as without it."""
    path = pathlib.Path(directory, "backup")
    x, y = classification()
    try:
        fit(
            compiled(strategy),
            x,
            y,
            epochs=4,
            callbacks=[callbacks.BackupAndRestore(path), Interrupt()],
        )
    except InterruptedError:
        model = compiled(strategy)
    again = callbacks.BackupAndRestore(path)
    history = model.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0, callbacks=[again])
    return found(strategy, model, history=history.history, epochs=history.epoch)
