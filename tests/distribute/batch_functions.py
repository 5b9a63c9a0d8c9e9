"""What the workers of `test_batches.py` do; most of it runs in one process, too: the yardstick."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.distribute.multi_worker_functions import attempt, fresh, replicas, use
from tests.multi_process_functions import task_index
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.transport.of_strategy import transport_for

FEATURES, CLASSES = 12, 4


def data(rows):
    random = np.random.RandomState(0)
    return random.randn(rows, FEATURES).astype("float32"), random.randint(0, CLASSES, rows)


def dense(strategy, *layers, inputs=None, **kwargs):
    """A small classifier: `layers`, then a softmax."""
    fresh()
    with strategy.scope():
        make = [layer() for layer in layers]
        inputs = keras.Input([FEATURES]) if inputs is None else inputs
        model = keras.Sequential([inputs, *make, keras.layers.Dense(CLASSES)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"], **kwargs)
    return model


def everything(strategy, model, x, y, batch):
    """`fit`, `evaluate` and `predict`; finite weights, and what they were on each replica."""
    use(strategy, "identity")
    history = model.fit(x, y, batch_size=batch, epochs=2, shuffle=False, verbose=0).history
    return {
        "history": history,
        "evaluate": model.evaluate(x, y, batch_size=batch, verbose=0),
        "predict": model.predict(x, batch_size=batch, verbose=0),
        "weights": replicas(strategy, model.weights),
    }


def rows(strategy, count, batch):
    return everything(strategy, dense(strategy), *data(count), batch)


def rows_with_batch_norm(strategy, count, batch):
    """Batch normalization of no rows is not finite."""
    return everything(
        strategy, dense(strategy, keras.layers.BatchNormalization), *data(count), batch
    )


def validation_split(strategy):
    """101 rows: 80 and 21."""
    use(strategy, "identity")
    model = dense(strategy)
    x, y = data(101)
    return model.fit(x, y, validation_split=0.2, batch_size=16, shuffle=False, verbose=0).history


def of_type(strategy, dtype):
    """Inputs for whose type there is no collective."""
    x, y = data(20)
    x = (x > 0) if dtype == "bool" else (x * 50 + 100).clip(0, 255).astype(dtype)
    model = dense(
        strategy,
        lambda: keras.layers.Rescaling(1 / 255),
        inputs=keras.Input([FEATURES], dtype=dtype),
    )
    return everything(strategy, model, x, y, 8)


def strings(strategy):
    """Text is vectorized in the model."""
    words = ["a b", "b c d", "a", "d d a b", "c"] * 4
    fresh()
    vectorize = keras.layers.TextVectorization(
        vocabulary=list("abcd"), output_mode="int", output_sequence_length=4
    )
    use(strategy, "identity")
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([1], dtype="string"),
                vectorize,
                keras.layers.Embedding(8, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(CLASSES),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
    dataset = tf.data.Dataset.from_tensor_slices((np.array(words)[:, None], np.arange(20) % 4))
    return model.fit(dataset.batch(8), epochs=2, verbose=0).history


def padded_texts(strategy):
    """Each worker pads its texts to a length of its own; on one process, all to the longest."""
    fresh()
    use(strategy, "identity")
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([None], dtype="int32"),
                keras.layers.Embedding(30, 4, mask_zero=True),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(CLASSES),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])

    def batches(context):
        random = np.random.RandomState(context.input_pipeline_id)
        lengths = 12 + context.input_pipeline_id
        texts = random.randint(1, 30, [16, lengths])
        return tf.data.Dataset.from_tensor_slices((texts, texts[:, 0] % CLASSES)).batch(4)

    dataset = strategy.distribute_datasets_from_function(batches)
    history = model.fit(dataset, epochs=2, steps_per_epoch=4, verbose=0).history
    return {"history": history, "weights": replicas(strategy, model.weights)}


class OfRaggedTexts(keras.Model):
    """Pads in the model, which no symbol of a dense batch survives."""

    def __init__(self):
        super().__init__()
        self.embed = keras.layers.Embedding(30, 4)
        self.classify = keras.layers.Dense(CLASSES)

    def call(self, texts):
        padded = self.embed(texts.to_tensor(shape=[None, 5]))
        return self.classify(tf.reshape(padded, [-1, 20]))


def ragged(strategy):
    """Ragged inputs, whose parts differ in all sizes."""
    fresh()
    use(strategy, "identity")
    texts = tf.ragged.constant([[1] * (1 + i % 5) for i in range(22)])
    with strategy.scope():
        model = OfRaggedTexts()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
    dataset = tf.data.Dataset.from_tensor_slices((texts, np.arange(22) % CLASSES)).batch(8)
    return model.fit(dataset, epochs=2, verbose=0).history


class Outputs(keras.Model):
    """Returns its inputs in many forms."""

    def call(self, x):
        return {
            "bfloat16": tf.cast(x, tf.bfloat16),
            "bool": x > 0,
            "uint8": tf.cast(tf.abs(x) * 10, tf.uint8),
            "int16": tf.cast(x * 10, tf.int16),
            "uint32": tf.cast(tf.abs(x) * 10, tf.uint32),
            "complex64": tf.complex(x, -x),
            "string": tf.strings.as_string(x[:, 0]),
            "scalar rows": x[:, 0],
        }


def outputs(strategy, count):
    """`predict` of every type; one that is not there has no `compute_output_spec`."""
    fresh()
    with strategy.scope():
        model = Outputs()
        model.compile()
    x, _ = data(count)
    return model.predict(x, batch_size=4, verbose=0), model(x)


def a_variable_made_in_a_function(strategy):
    """As `tf.function` allows it, in its first call."""
    made = []

    @tf.function
    def step():
        if not made:
            with strategy.scope():
                made.append(tf.Variable(tf.random.stateless_normal([3], [task_index(), 0])))
                made.append(tf.Variable(tf.zeros([3])))
        return made[0] + made[1]

    return np.array(strategy.experimental_local_results(step())[0])


# ---------------------------------------------------------------------------- two workers alone


def out_of_data(strategy, with_steps):
    """Worker 0 has three batches for each epoch, worker 1 has six."""
    use(strategy, "identity")
    model = dense(strategy)
    own = 3 if task_index() == 0 else 6
    x, y = data(own * 4)

    def batches(context):
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(4)

    dataset = strategy.distribute_datasets_from_function(batches)
    seen = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda b, logs: seen.append(b))
    kwargs = {"steps_per_epoch": own} if with_steps else {}
    history = model.fit(dataset, epochs=2, verbose=0, callbacks=[callback], **kwargs).history
    return {
        "batches": seen,
        "loss": history["loss"],
        "evaluate": model.evaluate(dataset, verbose=0),
    }


def stop_on_one(strategy, worker, when):
    """`stop_training` is set on one worker alone, within the second epoch or at its end."""
    use(strategy, "identity")
    model = dense(strategy)
    epochs = []

    def stop(*_, **__):
        if task_index() == worker and len(epochs) == 1:
            model.stop_training = True

    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=stop if when == "batch" else None,
        on_epoch_end=lambda epoch, logs: (
            stop() if when == "epoch" else None,
            epochs.append(epoch),
        ),
    )
    model.fit(*data(64), batch_size=8, epochs=5, verbose=0, callbacks=[callback])
    return epochs


def rates_on_one(strategy):
    """A LearningRateScheduler on the chief alone: the error of each worker."""
    use(strategy, "identity")
    model = dense(strategy)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 1e-4)
    try:
        callbacks = [schedule] if task_index() == 0 else []
        model.fit(*data(64), batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    except ValueError as error:
        return str(error)
    return None


def collectives_of_local_methods(strategy):
    """In an epoch of 32 steps without a pull, with three metrics."""
    from tfqcomm.optimizers import LeaderSGD

    fresh()
    with strategy.scope():
        model = keras.Sequential([keras.Input([FEATURES]), keras.layers.Dense(CLASSES)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(
            LeaderSGD(0.01, global_period=1000),
            loss,
            metrics=["accuracy", "sparse_categorical_crossentropy"],
        )
    seen = []
    watch = transport_for(strategy).watch
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(watch.collectives())
    )
    model.fit(*data(256), batch_size=8, epochs=1, verbose=0, callbacks=[callback])
    return seen[-1] - seen[0]


SAME_ANYWHERE = {
    "101 rows": (rows, 101, 16),
    "5 rows, one a batch": (rows, 5, 1),
    "one row": (rows, 1, 32),
    "5 rows with batch norm": (rows_with_batch_norm, 5, 2),
    "validation_split": (validation_split,),
    "uint8": (of_type, "uint8"),
    "bool": (of_type, "bool"),
    "strings": (strings,),
    "padded texts": (padded_texts,),
    "ragged": (ragged,),
    "outputs of 9 rows": (outputs, 9),
    "outputs of one row": (outputs, 1),
}
ON_TWO_WORKERS = {
    **SAME_ANYWHERE,
    "variable in a function": (a_variable_made_in_a_function,),
    "out of data": (out_of_data, False),
    "fewer steps": (out_of_data, True),
    "stop, batch, chief": (stop_on_one, 0, "batch"),
    "stop, batch, other": (stop_on_one, 1, "batch"),
    "stop, epoch, chief": (stop_on_one, 0, "epoch"),
    "stop, epoch, other": (stop_on_one, 1, "epoch"),
    "rates": (rates_on_one,),
    "local methods": (collectives_of_local_methods,),
}


def on_two_workers():
    """All of it under one strategy."""
    strategy = MultiWorkerMirroredStrategy(timeout_seconds=60)
    return {name: attempt(job, strategy, *args) for name, (job, *args) in ON_TWO_WORKERS.items()}
