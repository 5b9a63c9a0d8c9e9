"""What the workers of `test_multi_worker.py` do; the test does the same in one process.

Importing TensorFlow is most of what a worker costs: one pair of them does everything, under one
strategy, and returns what it found for the tests to judge.
"""

from __future__ import annotations

import pathlib
import traceback

import keras
import numpy as np
import tensorflow as tf

from tests.multi_process_functions import task_index
from tfqcomm.callbacks import TrafficLogger
from tfqcomm.compressors import BlockSign, PowerSGD, RandomK, Ternary, TopK, UniformGrid
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.optimizers import AdaptiveTopKSGD, CompAMS, QAdam, QCMDAdagrad, QRDAAdagrad
from tfqcomm.step import ExchangeOptions

FEATURES, CLASSES, EXAMPLES, BATCH = 64, 10, 256, 32
STEPS = 104  # of `train`, in two epochs

CONFIGS = {
    "dense": {"compressor": None},
    "top_k": {"compressor": TopK(0.1)},
    "block_sign": {"compressor": BlockSign()},
    "two_phase": {"compressor": BlockSign(block=64), "schedule": "two_phase", "min_size": 0},
    "random_k": {"compressor": RandomK(0.25)},
    "ternary": {"compressor": Ternary(clip=1.5, shared_scale=True)},
    "power_sgd": {"compressor": PowerSGD(2)},
    "acp_sgd": {"compressor": PowerSGD(2, alternate=True)},
    "comp_ams": {"optimizer": lambda: CompAMS(1e-2, compressor=TopK(0.1))},
    "qadam": {
        "optimizer": lambda: QAdam(3e-3, compressor="log_grid", weight_compressor=UniformGrid(8))
    },
    "qcmd_adagrad": {"optimizer": lambda: QCMDAdagrad(0.05, l1=1e-4)},
    "qrda_adagrad": {"optimizer": lambda: QRDAAdagrad(0.1, l1=1e-5, center="initial")},
    "adaptive_top_k_sgd": {
        "optimizer": lambda: AdaptiveTopKSGD(0.1, 0.9, budget=0.05, momentum_correction=True)
    },
}


# ------------------------------------------------------------------------------------------ tools


def use(strategy, compressor=None, **options):
    """Gives the one strategy of this process other options for the next run."""
    strategy.options = ExchangeOptions(compressor, **options)


def fresh():
    """Equal weights and equal names, in whatever order models are made."""
    policy = keras.config.dtype_policy()
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)


def classification(examples=EXAMPLES):
    """Inputs float32[n, 64] and the class that a hidden matrix gives them, int32[n]."""
    random = np.random.RandomState(0)
    x = random.randn(examples, FEATURES).astype("float32")
    return x, (x @ random.randn(FEATURES, CLASSES)).argmax(1).astype("int32")


def classifier(*between):
    """A kernel of 2048 elements, compressed by default, and one of 320, which is not."""
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
    fresh()
    with strategy.scope():
        model = classifier(*between)
        model.compile(
            optimizer() if optimizer else keras.optimizers.Adam(1e-2),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            **kwargs,
        )
    return model


def fit(model, x, y, epochs, **kwargs):
    """Trains without surprises; with one device each, worker r gets the r-th part of a batch."""
    kwargs = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, y, epochs=epochs, **kwargs).history


def replicas(strategy, variables):
    """For each local replica, its values of the variables."""
    values = [strategy.experimental_local_results(v.value) for v in variables]
    return [[np.array(v) for v in replica] for replica in zip(*values, strict=True)]


# ------------------------------------------------------- under any strategy, of this process or not


def train(strategy, config, dealt=None):
    """More than a hundred steps.

    Args:
        dealt: a new order for the equal parts of each batch.
    """
    config = dict(CONFIGS[config])
    optimizer = config.pop("optimizer", None)
    use(strategy, **config)
    model = compiled(strategy, optimizer=optimizer)
    x, y = classification(STEPS * BATCH // 2)
    if dealt:
        x, y = (a.reshape(-1, len(dealt), BATCH // len(dealt), *a.shape[1:]) for a in (x, y))
        x, y = (a[:, dealt].reshape(-1, *a.shape[3:]) for a in (x, y))
    traffic = TrafficLogger(verbose=0)
    history = fit(model, x, y, 2, callbacks=[traffic])
    return {
        "weights": replicas(strategy, model.weights),
        "history": history,
        "traffic": traffic.history,
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def validate(strategy):
    """`fit` with validation data, `evaluate` and `predict`, on arrays and on a dataset."""
    x, y = classification(81)  # the last batch of two replicas: 9 + 8 examples
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    inputs = tf.data.Dataset.from_tensor_slices(x).batch(BATCH)
    results = {}
    for name in ("arrays", "dataset"):
        use(strategy, "top_k")
        model = compiled(strategy)
        if name == "arrays":
            history = fit(model, x, y, 1, validation_data=(x, y))
            evaluated = model.evaluate(x, y, batch_size=BATCH, verbose=0)
            predicted = model.predict(x, batch_size=BATCH, verbose=0)
        else:
            history = fit(model, dataset, None, 1, validation_data=dataset, batch_size=None)
            evaluated = model.evaluate(dataset, verbose=0)
            predicted = model.predict(inputs, verbose=0)
        results[name] = {
            "history": history,
            "evaluate": evaluated,
            "predict": predicted,
            "weights": replicas(strategy, model.weights),
        }
    return results


def batch_normalization(strategy):
    use(strategy, "top_k")
    model = compiled(strategy, keras.layers.BatchNormalization(momentum=0.9))
    x, y = classification()
    x = x * np.linspace(0.5, 3, EXAMPLES)[:, None].astype("float32")  # replicas see other scales
    fit(model, x, y, 2)
    return {
        "weights": replicas(strategy, model.weights),
        "predict": model.predict(x[:64], batch_size=BATCH, verbose=0),
    }


def ragged_embedding(strategy, with_dense):
    """Two steps of SGD on an embedding; replica r sees r + 2 rows, some of them twice."""
    use(strategy, "top_k")
    fresh()
    with strategy.scope():
        variables = [keras.Variable(np.zeros([50, 4], "float32"), name="table")]
        if with_dense:
            variables.append(keras.Variable(np.zeros([3], "float32"), name="bias"))
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build(variables)

    def replica_step(rows):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        rows = rows[: replica + 2]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(variables[0].value, rows))
            loss += sum(tf.reduce_sum(v.value) for v in variables[1:])
            loss *= tf.cast(replica + 1, tf.float32) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, [v.value for v in variables])
        optimizer.apply(gradients, variables)

    @tf.function
    def step(rows):
        strategy.run(replica_step, args=(rows,))

    for _ in range(2):
        step(tf.constant(RAGGED_ROWS))
    return replicas(strategy, variables)


RAGGED_ROWS = [3, 7, 3, 49, 0, 11]


def embedding_model(strategy):
    use(strategy, "block_sign")
    fresh()
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([5], dtype="int32"),
                layers.Embedding(500, 8),
                layers.Flatten(),
                layers.Dense(64, activation="relu"),
                layers.Dense(2),
            ]
        )
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.RandomState(0).randint(0, 500, [89, 5])  # the last batch: 13 + 12 examples
    traffic = TrafficLogger(verbose=0)
    fit(model, x, x[:, 0] % 2, 2, callbacks=[traffic])
    return {"weights": replicas(strategy, model.weights), "traffic": traffic.history}


def nan_on_one_worker(strategy):
    """The last replica's examples of the fourth step, of eight, hold a NaN."""
    use(strategy, "top_k")
    x, y = classification()
    x[4 * BATCH - 1, 5] = np.nan
    model, traffic = compiled(strategy), TrafficLogger(verbose=0)
    fit(model, x, y, 2, callbacks=[traffic])
    keep = np.r_[: 3 * BATCH, 4 * BATCH : EXAMPLES]
    without = compiled(strategy)
    fit(without, x[keep], y[keep], 2)
    return {
        "weights": replicas(strategy, model.weights),
        "weights without the batch": replicas(strategy, without.weights),
        "skipped_steps": [record["skipped_steps"] for record in traffic.history],
        "iterations": int(model.optimizer.iterations.numpy()),
    }


def overflow_on_one_worker(strategy, config):
    """Mixed precision; the last replica's gradients alone overflow in the second step of four."""
    config = dict(CONFIGS[config])
    optimizer = config.pop("optimizer", None)
    use(strategy, **config)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(strategy, optimizer=optimizer)
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = classification(4 * BATCH)
    x[2 * BATCH - 1] = 60000.0
    scales = []

    def record(batch, logs):
        scales.append(float(model.optimizer.dynamic_scale.numpy()))

    fit(model, x, y, 1, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=record)])
    return {
        "scales": scales,
        "weights": replicas(strategy, model.weights),
        "iterations": int(model.optimizer.inner_optimizer.iterations.numpy()),
    }


def custom_loop(strategy):
    """`strategy.run` by hand, with a user's own all-reduce of 5000 numbers beside the step."""
    use(strategy, TopK(0.1))
    fresh()
    with strategy.scope():
        model = classifier()
        optimizer = keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_variables)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = tf.data.Dataset.from_tensor_slices(classification()).batch(BATCH)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data = strategy.experimental_distribute_dataset(data.with_options(options))

    def replica_step(x, y):
        context = tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True)) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        rank = tf.cast(context.replica_id_in_sync_group, tf.float32)
        return context.all_reduce("sum", tf.range(5000.0) * (rank + 1))

    @tf.function
    def step(x, y):
        return strategy.run(replica_step, args=(x, y))

    for batch in data:
        summed = step(*batch)
    return {
        "weights": replicas(strategy, model.weights),
        "all_reduce": np.array(strategy.experimental_local_results(summed)[0]),
    }


# ------------------------------------------------------------------------------- on workers alone


class SaveOnChief(keras.callbacks.Callback):
    """What users write: nobody but the chief saves, in the middle of training."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0 and task_index() == 0:
            self.model.save(self.path)


def save_on_chief(strategy, config, directory):
    """Saves after the first of two epochs, and once more at the end; returns predictions."""
    options = dict(CONFIGS[config])
    optimizer = options.pop("optimizer", None)
    use(strategy, **options)
    model = compiled(strategy, keras.layers.BatchNormalization(), optimizer=optimizer)
    x, y = classification()
    fit(model, x, y, 2, callbacks=[SaveOnChief(pathlib.Path(directory, f"{config}-1.keras"))])
    if task_index() == 0:
        model.save(pathlib.Path(directory, f"{config}-2.keras"))
    return model.predict(x[:64], batch_size=BATCH, verbose=0)


def several_steps_per_execution(strategy, several):
    """Weights after 8 batches; 3 does not divide them."""
    use(strategy, "top_k")
    model = compiled(strategy, steps_per_execution=several)
    fit(model, *classification(), 1)
    return {"weights": replicas(strategy, model.weights)}


def other_names(strategy):
    """Worker 1 has made a model of its own before: automatic names differ from here on."""
    use(strategy, RandomK(0.25))
    fresh()
    if task_index() == 1:
        classifier()
    with strategy.scope():
        model = classifier()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, *classification(), 1)
    return {
        "names": [v.path for v in model.weights],
        "weights": replicas(strategy, model.weights),
    }


def attempt(function, *args):
    """The result, or the traceback as text: one failure must not hide the other results."""
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


SAME_ANYWHERE = {
    **{f"train {name}": (train, name) for name in CONFIGS},
    "validate": (validate,),
    "batch_normalization": (batch_normalization,),
    "ragged_embedding": (ragged_embedding, True),
    "ragged_embedding alone": (ragged_embedding, False),
    "embedding_model": (embedding_model,),
    "nan": (nan_on_one_worker,),
    "overflow top_k": (overflow_on_one_worker, "top_k"),
    "overflow comp_ams": (overflow_on_one_worker, "comp_ams"),
    "custom_loop": (custom_loop,),
}


ON_TWO_WORKERS = {
    **SAME_ANYWHERE,
    "save top_k": (save_on_chief, "top_k"),
    "save comp_ams": (save_on_chief, "comp_ams"),
    "several_steps": (several_steps_per_execution, 3),
    "single_steps": (several_steps_per_execution, 1),
    "other_names": (other_names,),
}


def on_two_workers(names, directory):
    """Some of it, with one device for each worker; what is saved is saved in `directory`."""
    strategy = MultiWorkerMirroredStrategy()
    results = {}
    for name in names:
        job, *args = ON_TWO_WORKERS[name]
        directories = [directory] if job is save_on_chief else []
        results[name] = attempt(job, strategy, *args, *directories)
    return results


def with_two_devices_each(names):
    """Some of it with four replicas, on two workers."""
    strategy = MultiWorkerMirroredStrategy(devices_per_worker=2)
    jobs = {name: SAME_ANYWHERE[name] for name in names}
    return {name: attempt(job, strategy, *args) for name, (job, *args) in jobs.items()}
