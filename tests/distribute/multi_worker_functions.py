"""What the workers of `test_multi_worker.py` do; the test runs parts of it in one process, too.

Importing TensorFlow is most of what a pair of workers costs: one pair does everything, one
strategy serves all runs, and what a run found is returned for the tests to judge.
"""

from __future__ import annotations

import pathlib

import keras
import numpy as np
import tensorflow as tf

from tests.multi_process_functions import task_index
from tfqcomm.aggregators import ExchangeOptions
from tfqcomm.callbacks import TrafficLogger
from tfqcomm.compressors import BlockSign, RandomK, TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.optimizers import CompAMS

FEATURES, CLASSES, EXAMPLES, BATCH = 64, 10, 256, 32
STEPS = 104  # in two epochs

CONFIGS = {
    "dense": {"compressor": None},
    "top_k": {"compressor": TopK(0.1)},
    "block_sign": {"compressor": BlockSign()},
    "two_phase": {"compressor": BlockSign(), "schedule": "two_phase"},
    "random_k": {"compressor": RandomK(0.25)},
    "everything": {"compressor": BlockSign(block=64), "min_size": 0},
    "comp_ams": {"optimizer": lambda: CompAMS(1e-2, compressor=TopK(0.1))},
}
own = CONFIGS["comp_ams"]["optimizer"]


def classification(examples=EXAMPLES):
    """Inputs float32[n, 64] and the class that a hidden matrix gives them, int32[n]."""
    random = np.random.RandomState(0)
    x = random.randn(examples, FEATURES).astype("float32")
    return x, (x @ random.randn(FEATURES, CLASSES)).argmax(1).astype("int32")


def classifier(*between):
    """A kernel of 2048 elements, compressed by default, and one of 320, which is not."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input([FEATURES]),
            layers.Dense(32, activation="relu"),
            *between,
            layers.Dense(CLASSES),
        ]
    )


def compiled(strategy, *between, optimizer=None, **kwargs):
    with strategy.scope():
        model = classifier(*between)
        model.compile(
            optimizer() if optimizer else keras.optimizers.Adam(1e-2),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **kwargs,
        )
    return model


def use(strategy, compressor=None, **options):
    """Gives the one strategy of this process other options for the next run."""
    strategy.options = ExchangeOptions(compressor, **options)


def local_values(strategy, variables):
    """The variables of each local replica."""
    results = [strategy.experimental_local_results(v.value) for v in variables]
    return [[np.array(v) for v in replica] for replica in zip(*results, strict=True)]


def train(strategy, optimizer=None, compressor=None, **options):
    """Trains, evaluates and predicts; equal data for replica r whatever the strategy is."""
    del compressor, options  # of the strategy
    model = compiled(strategy, optimizer=optimizer)
    x, y = classification(STEPS * BATCH // 2)
    traffic = TrafficLogger()
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        validation_data=(x[:96], y[:96]),
        callbacks=[traffic],
        verbose=0,
    ).history
    return {
        "history": history,
        "evaluate": model.evaluate(x[:96], y[:96], batch_size=BATCH, verbose=0),
        "predict": model.predict(x[:96], batch_size=BATCH, verbose=0),
        "weights": local_values(strategy, model.weights),
        "traffic": traffic.history,
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def train_with_all_configs(strategy):
    results = {}
    for name, config in CONFIGS.items():
        options = {k: v for k, v in config.items() if k != "optimizer"}
        use(strategy, **options)
        results[name] = train(strategy, **config)
    return results


def batch_normalization(strategy):
    use(strategy, "top_k")
    model = compiled(strategy, keras.layers.BatchNormalization(momentum=0.9))
    x, y = classification()
    x = x * np.linspace(0.5, 3, EXAMPLES)[:, None].astype("float32")  # replicas see other scales
    model.fit(x, y, batch_size=BATCH, epochs=3, shuffle=False, verbose=0)
    return {
        "predict": model.predict(x[:64], batch_size=BATCH, verbose=0),
        "weights": local_values(strategy, model.weights),
    }


def embedding_with_ragged_rows(strategy):
    """A step of SGD on an embedding, where rank r has r + 2 rows, some of them twice."""
    use(strategy, "top_k")
    with strategy.scope():
        table = keras.Variable(np.zeros([50, 4], "float32"), name="table")
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([table])

    @tf.function
    def step(rows, count):
        def replica_step(rows, count):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            rows = rows[: count + replica]
            with tf.GradientTape() as tape:
                tape.watch(table.value)
                picked = tf.gather(table.value, rows)
                scale = tf.cast(replica + 1, tf.float32)
                loss = tf.reduce_sum(picked) * scale / strategy.num_replicas_in_sync
            gradient = tape.gradient(loss, table.value)
            assert isinstance(gradient, tf.IndexedSlices)
            optimizer.apply([gradient], [table])

        strategy.run(replica_step, args=(rows, count))

    for _ in range(2):
        step(tf.constant([3, 7, 3, 49, 0, 11], tf.int32), tf.constant(2))
    return local_values(strategy, [table])


def embedding_model(strategy):
    use(strategy, "block_sign")
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([5], dtype="int32"),
                keras.layers.Embedding(500, 8),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dense(2),
            ]
        )
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.RandomState(0)
    x = random.randint(0, 500, [90, 5])  # the last batch has 26 examples
    traffic = TrafficLogger()
    model.fit(
        x, x[:, 0] % 2, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[traffic]
    )
    return {
        "weights": local_values(strategy, model.weights),
        "traffic": traffic.history,
    }


def nan_on_one_worker(strategy):
    """The last replica's examples of the fourth step, of eight, hold a NaN."""
    use(strategy, "top_k")
    x, y = classification()
    x[3 * BATCH + BATCH - 1, 5] = np.nan
    model = compiled(strategy)
    traffic = TrafficLogger()
    model.fit(
        x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[traffic]
    )
    with_nan = local_values(strategy, model.weights)
    keep = np.r_[: 3 * BATCH, 4 * BATCH : EXAMPLES]
    other = compiled(strategy)
    other.fit(x[keep], y[keep], batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return {
        "traffic": traffic.history,
        "weights": with_nan,
        "weights without the batch": local_values(strategy, other.weights),
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def overflow_on_one_worker(strategy, optimizer):
    """Mixed precision: only the last replica's gradients overflow in the second step of four."""
    use(strategy, "block_sign")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(strategy, optimizer=optimizer)
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = classification(4 * BATCH)
    x[2 * BATCH - 1] = 60000.0
    scales = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: scales.append(float(model.optimizer.dynamic_scale.numpy()))
    )
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0, callbacks=[record])
    return {
        "scales": scales,
        "weights": local_values(strategy, model.weights),
        "iterations": int(model.optimizer.inner_optimizer.iterations.numpy()),
    }


def custom_loop(strategy):
    """`strategy.run` by hand, with a user's own all-reduce of 5000 numbers beside the step."""
    use(strategy, TopK(0.1))
    with strategy.scope():
        model = classifier()
        optimizer = keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_variables)
    x, y = classification()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data = strategy.experimental_distribute_dataset(data.with_options(options))

    def replica_step(x, y):
        context = tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True)) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        mine = tf.range(5000, dtype=tf.float32) * tf.cast(
            context.replica_id_in_sync_group + 1, tf.float32
        )
        return context.all_reduce("sum", mine), context.all_reduce("sum", loss)

    @tf.function
    def step(x, y):
        return strategy.run(replica_step, args=(x, y))

    for batch in data:
        summed, loss = step(*batch)
    return {
        "weights": local_values(strategy, model.weights),
        "all_reduce": np.array(strategy.experimental_local_results(summed)[0]),
        "loss": float(strategy.experimental_local_results(loss)[0]),
    }


class SaveOnChief(keras.callbacks.Callback):
    """What users write: nobody but the chief saves, in the middle of training."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0 and task_index() == 0:
            self.model.save(self.path)


def chief_saves(strategy, directory, optimizer=None, compressor=None):
    """Saves in the first of two epochs, and once more at the end, where predictions are kept."""
    use(strategy, compressor)
    model = compiled(strategy, keras.layers.BatchNormalization(), optimizer=optimizer)
    x, y = classification()
    kind = "stock" if optimizer is None else "own"
    save = SaveOnChief(pathlib.Path(directory, f"{kind}-1.keras"))
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[save])
    if task_index() == 0:
        model.save(pathlib.Path(directory, f"{kind}-2.keras"))
    return model.predict(x[:64], batch_size=BATCH, verbose=0)


def several_steps_per_execution(strategy):
    x, y = classification()
    results = []
    for count in (1, 4):
        use(strategy, "top_k")
        model = compiled(strategy, steps_per_execution=count)
        traffic = TrafficLogger()
        model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[traffic])
        results.append(
            {
                "weights": local_values(strategy, model.weights),
                "steps": [record["steps"] for record in traffic.history],
            }
        )
    return results


def kinds_of_data(strategy, examples):
    """`fit`, `evaluate` and `predict` on arrays and on a `tf.data.Dataset`."""
    x, y = classification(examples)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    results = {}
    for name, data in {
        "arrays": {"x": x, "y": y, "batch_size": BATCH},
        "dataset": {"x": dataset},
    }.items():
        use(strategy, "top_k")
        model = compiled(strategy)
        history = model.fit(**data, epochs=2, shuffle=False, verbose=0).history
        evaluated = model.evaluate(**data, verbose=0)
        data.pop("y", None)
        results[name] = {
            "loss": history["loss"],
            "evaluate": evaluated,
            "predict": model.predict(**data, verbose=0),
            "weights": local_values(strategy, model.weights),
        }
    return results


def everything(directory):
    """All of the above on two workers of one device each."""
    strategy = MultiWorkerMirroredStrategy()
    return {
        "configs": train_with_all_configs(strategy),
        "batch_normalization": batch_normalization(strategy),
        "embedding_with_ragged_rows": embedding_with_ragged_rows(strategy),
        "embedding_model": embedding_model(strategy),
        "nan": nan_on_one_worker(strategy),
        "overflow": {
            "stock": overflow_on_one_worker(strategy, None),
            "own": overflow_on_one_worker(strategy, own),
        },
        "custom_loop": custom_loop(strategy),
        "saved": {
            "stock": chief_saves(strategy, directory, compressor="top_k"),
            "own": chief_saves(strategy, directory, optimizer=own),
        },
        "several_steps": several_steps_per_execution(strategy),
        "data": {n: kinds_of_data(strategy, n) for n in (96, 81)},
    }


def two_devices_each():
    """Four replicas, on two workers."""
    strategy = MultiWorkerMirroredStrategy(devices_per_worker=2)
    return {
        "configs": {
            name: (use(strategy, **{k: v for k, v in CONFIGS[name].items() if k != "optimizer"}),
                   train(strategy, **CONFIGS[name]))[1]
            for name in ("dense", "block_sign", "two_phase", "everything", "comp_ams")
        },
        "batch_normalization": batch_normalization(strategy),
        "embedding_with_ragged_rows": embedding_with_ragged_rows(strategy),
        "nan": nan_on_one_worker(strategy),
        "custom_loop": custom_loop(strategy),
    }
