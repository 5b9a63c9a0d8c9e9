"""TensorFlow's tutorial "Multi-worker training with Keras", with the strategy swapped.

    python -m tfqcomm.launch --workers=2 tests/distribute/tutorial_fit.py DIRECTORY

As in the tutorial every worker saves, and those that are not the chief to a place that they then
remove; `BackupAndRestore` gets the same directory everywhere. The data are made up.
"""

from __future__ import annotations

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import tfqcomm

PER_WORKER_BATCH, STEPS, EPOCHS = 16, 8, 3


def digits():
    """Images float32[640, 28, 28] with a bright stripe, whose row gives the label int64[640]."""
    random = np.random.RandomState(0)
    labels = random.randint(0, 10, [640]).astype("int64")
    images = random.randint(0, 64, [640, 28, 28])
    images[np.arange(640), labels * 2] += 150
    return images.astype("float32") / 255.0, labels


def digits_dataset(batch_size):
    """An endless stream of batches."""
    return tf.data.Dataset.from_tensor_slices(digits()).shuffle(640, 1).repeat().batch(batch_size)


def build_and_compile_cnn_model():
    model = keras.Sequential(
        [
            keras.layers.InputLayer(shape=(28, 28)),
            keras.layers.Reshape(target_shape=(28, 28, 1)),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.SGD(learning_rate=0.05),
        metrics=["accuracy"],
    )
    return model


def _is_chief(task_type, task_id):
    return (task_type == "worker" and task_id == 0) or task_type is None


def write_filepath(filepath, task_type, task_id):
    """The path itself on the chief, and one in a directory of their own on the other workers."""
    dirpath, base = os.path.dirname(filepath), os.path.basename(filepath)
    if not _is_chief(task_type, task_id):
        dirpath = os.path.join(dirpath, f"workertemp_{task_id}")
        tf.io.gfile.makedirs(dirpath)
    return os.path.join(dirpath, base)


class InterruptOnce(keras.callbacks.Callback):
    """What the tutorial leaves to the reader: a run that ends before its time."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2 and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            raise InterruptedError


def main(directory):
    keras.utils.set_random_seed(0)  # without one, weights in a hundred leave the loss above 2
    tf_config = json.loads(os.environ["TF_CONFIG"])
    num_workers = len(tf_config["cluster"]["worker"])
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()

    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = digits_dataset(PER_WORKER_BATCH * num_workers).with_options(options)
    with strategy.scope():
        model = build_and_compile_cnn_model()

    task_type = strategy.cluster_resolver.task_type
    task_id = strategy.cluster_resolver.task_id
    best_path = write_filepath(os.path.join(directory, "best.keras"), task_type, task_id)
    callbacks = [
        keras.callbacks.BackupAndRestore(backup_dir=os.path.join(directory, "backup")),
        keras.callbacks.ModelCheckpoint(best_path, monitor="loss", save_best_only=True),
    ]
    interrupt = InterruptOnce(os.path.join(directory, f"interrupted_{task_id}"))
    fit = {"epochs": EPOCHS, "steps_per_epoch": STEPS, "verbose": 0}
    try:
        model.fit(dataset, callbacks=[*callbacks, interrupt], **fit)
    except InterruptedError:
        with strategy.scope():
            model = build_and_compile_cnn_model()  # as in a process that was started again
        history = model.fit(dataset, callbacks=callbacks, **fit)

    # Saving: all workers, each to its own path.
    model_path = os.path.join(directory, "model.keras")
    write_model_path = write_filepath(model_path, task_type, task_id)
    model.save(write_model_path)
    checkpoint_dir = os.path.join(directory, "ckpt")
    write_checkpoint_dir = write_filepath(checkpoint_dir, task_type, task_id)
    checkpoint = tf.train.Checkpoint(model=model)
    manager = tf.train.CheckpointManager(checkpoint, directory=write_checkpoint_dir, max_to_keep=1)
    manager.save()
    if not _is_chief(task_type, task_id):
        own = os.listdir(os.path.dirname(write_model_path))
        tf.io.gfile.rmtree(os.path.dirname(write_model_path))
    else:
        own = []

    # Loading: the saved model predicts the same; the checkpoint brings the weights back. All take
    # part in `evaluate`, so the chief has written its files when the others come to read them.
    result = model.evaluate(*digits(), verbose=0)
    loaded = keras.models.load_model(model_path)
    np.testing.assert_allclose(loaded.evaluate(*digits(), verbose=0), result, rtol=1e-4)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    checkpoint.restore(tf.train.latest_checkpoint(checkpoint_dir)).assert_existing_objects_matched()
    np.testing.assert_allclose(model.evaluate(*digits(), verbose=0), result, rtol=1e-4)
    again = loaded.fit(digits_dataset(PER_WORKER_BATCH), steps_per_epoch=STEPS, verbose=0)
    report = {
        "epochs": history.epoch,
        "loss": history.history["loss"] + again.history["loss"],
        "accuracy": result[1],
        "own": sorted(own),
    }
    print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
