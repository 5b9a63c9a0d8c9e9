"""Trains the same model with a trainer and in one process; each function runs in its own process.

`everything` makes one cluster and returns what all tests look at: a process takes seconds to begin.
"""

from __future__ import annotations

import gc
import logging
import os
import pathlib
import warnings
import weakref
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tfqcomm.parameter_server import LeaderTrainer, Trainer, buckets
from tfqcomm.parameter_server.messages import layout
from tfqcomm.parameter_server.messages import trainer as trainer_module
from tfqcomm.state.ledger import ledger_of

STEPS, BATCH, FEATURES = 6, 8, 6


def make_data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """X [steps, 2 workers, batch, features], y [steps, 2 workers, batch, 1]."""
    rng = np.random.default_rng(seed)
    shape = [STEPS, 2, BATCH]
    return rng.normal(size=[*shape, FEATURES]).astype("float32"), rng.normal(size=[*shape, 1])


def joined(arrays):
    """The batches of both workers as one."""
    return tf.nest.map_structure(lambda a: a.reshape([-1, *a.shape[3:]]), arrays)


def dataset_fn(arrays, workers: int) -> Callable:
    """Half of each batch for each of two workers, or all for one."""

    def batches(context):
        def mine(a):
            if workers == 1:
                return a.reshape([STEPS, -1, *a.shape[3:]])
            return a[:, context.input_pipeline_id]

        return tf.data.Dataset.from_tensor_slices(tf.nest.map_structure(mine, arrays))

    return batches


def in_one_process(build, optimizer, arrays, epochs: int = 1, **arguments) -> keras.Model:
    """The model after `keras.Model.fit`."""
    model = build()
    model.compile(optimizer=optimizer(), jit_compile=False, **arguments)
    model.optimizer.build(model.trainable_variables)  # as a trainer does, before `fit`
    dataset = tf.data.Dataset.from_tensor_slices(joined(arrays)).batch(2 * BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(dataset, epochs=epochs, shuffle=False, verbose=0)
    return model


def on_servers(build, optimizer, arrays, workers: int = 1, trainer=Trainer, epochs=1, **arguments):
    """The trainer after its `fit`."""
    arguments = {"parameter_servers": 2, **arguments}
    made = trainer(build, optimizer=optimizer(), workers=workers, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(dataset_fn(arrays, workers), epochs, verbose=0)
    return made


def difference(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """The largest of any two weights."""
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


def compare(build, optimizer, arrays=None, ways=((1, "sync"), (2, "sync"), (1, "async")), **more):
    """For each way to train the largest difference to one process; and how far that went."""
    arrays = make_data() if arrays is None else arrays
    weights = in_one_process(build, optimizer, arrays, **more).get_weights()
    found = {"moved": difference(weights, build().get_weights())}
    for workers, mode in ways:
        trainer = on_servers(build, optimizer, arrays, workers, mode=mode, **more)
        found[workers, mode] = difference(weights, trainer.model.get_weights())
    return found


def sequential(*layers, features=FEATURES, **arguments) -> keras.Model:
    return keras.Sequential([keras.Input([features]), *layers], **arguments)


def dense_model(**arguments) -> keras.Model:
    keras.utils.set_random_seed(0)
    return sequential(keras.layers.Dense(16, activation="tanh", **arguments), keras.layers.Dense(1))


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.1, momentum=0.9)


def slow_sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.01)


# ------------------------------------------------------------------------------- Mixed precision


def mixed_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    with_policy = {"dtype": "mixed_float16"}
    layers = [keras.layers.Dense(16, activation="tanh", **with_policy)]
    layers += [keras.layers.Dense(1, **with_policy)]
    model = sequential(*layers)
    model.dtype_policy = "mixed_float16"  # as a global policy would have it
    return model


def overflowing_data():
    """Gradients of the third batch do not fit into float16 at a scale of 2 ** 15."""
    x, y = make_data()
    y[2] *= 1e3
    return x, y


def scaled(optimizer: Callable) -> Callable:
    """A scale that grows within the test."""
    return lambda: keras.optimizers.LossScaleOptimizer(optimizer(), dynamic_growth_steps=2)


def scale_state(optimizer) -> list[float]:
    variables = (optimizer.dynamic_scale, optimizer.step_counter, optimizer.iterations)
    return [float(v.numpy()) for v in variables]


def mixed_precision() -> dict:
    """Weights, scale and iterations of one process, and of each trainer."""
    data = overflowing_data()
    found = {"default": compare(mixed_model, sgd, loss="mse", ways=((1, "sync"),))}
    for name, optimizer in (("dynamic", scaled(sgd)), ("static", static_scale)):
        one = in_one_process(mixed_model, optimizer, data, loss="mse")
        ways = {
            "sync 1": on_servers(mixed_model, optimizer, data, loss="mse"),
            "sync 2": on_servers(mixed_model, optimizer, data, 2, loss="mse"),
            "async 1": on_servers(mixed_model, optimizer, data, loss="mse", mode="async"),
        }
        leader = scaled(leader_sgd) if name == "dynamic" else static_leader
        ways["leader 1"] = on_servers(mixed_model, leader, data, 1, LeaderTrainer, loss="mse")
        found[name] = {
            way: (
                difference(one.get_weights(), trainer.model.get_weights()),
                scale_state(trainer.optimizer) if name == "dynamic" else None,
            )
            for way, trainer in ways.items()
        }
        if name == "dynamic":
            found["scale"] = scale_state(one.optimizer)
    trainer = on_servers(mixed_model, qadam, make_data(), 2, loss="mse", epochs=8)
    found["qadam"] = {
        "loss": trainer.model.history.history["loss"],
        "memory": sorted(tfqcomm_state(trainer)),
        "pushed": trainer.workers[0]["bytes_pushed"],
    }
    return found


def tfqcomm_state(trainer) -> dict:
    """What a backup keeps beside Keras' variables."""
    return ledger_of(getattr(trainer.optimizer, "inner_optimizer", trainer.optimizer)).state()


def static_scale():
    return keras.optimizers.SGD(0.1, momentum=0.9, loss_scale_factor=2.0**8)


def leader_sgd(**arguments):
    return tfqcomm.optimizers.LeaderSGD(0.1, momentum=0.9, **arguments)


def static_leader():
    return leader_sgd(loss_scale_factor=2.0**8)


def qadam():
    return tfqcomm.optimizers.QAdam(0.01, compressor="log_grid", min_size=0)


# ------------------------------------------------------------------ What silently differed before


def constraints() -> dict:
    found = {}
    for name in ("NonNeg", "UnitNorm", "MaxNorm"):

        def build(name=name):
            keras.utils.set_random_seed(0)
            return dense_model(kernel_constraint=getattr(keras.constraints, name)())

        found[name] = compare(build, sgd, loss="mse")
        one = in_one_process(build, sgd, make_data(), loss="mse").get_weights()
        leader = on_servers(build, leader_sgd, make_data(), 1, LeaderTrainer, loss="mse")
        found[name]["leader"] = difference(one, leader.model.get_weights())
    return found


def frozen_model() -> keras.Model:
    model = dense_model()
    model.layers[0].trainable = False
    return model


def frozen_weights() -> float:
    """The difference after frozen weights were set between two calls of `fit`."""
    arrays, ends = make_data(), []
    one = in_one_process(frozen_model, sgd, arrays, loss="mse")
    trainer = on_servers(frozen_model, sgd, arrays, 2, loss="mse")
    for model in (one, trainer.model):
        model.set_weights([w + 1 if i < 2 else w for i, w in enumerate(model.get_weights())])
    dataset = tf.data.Dataset.from_tensor_slices(joined(arrays)).batch(2 * BATCH)
    one.fit(dataset, shuffle=False, verbose=0)
    trainer.fit(dataset_fn(arrays, 2), verbose=0)
    ends = [one.get_weights(), trainer.model.get_weights()]
    return difference(*ends)


def adamw_without_biases():
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def biased_model() -> keras.Model:
    return dense_model(bias_initializer="ones")


def evaluated_first() -> tuple[list[float], list[float]]:
    """The losses of two epochs in one process, and with an `evaluate` of large losses before."""
    arrays = make_data()
    one = in_one_process(dense_model, sgd, arrays, loss="mse", epochs=2)
    trainer = Trainer(dense_model, optimizer=sgd(), loss="mse", metrics=["mae"])
    x, y = joined(arrays)
    trainer.evaluate(x, 1e3 + y, verbose=0)
    history = trainer.fit(dataset_fn(arrays, 2), 2, verbose=0)
    return one.history.history["loss"], history.history["loss"]


class Unused(keras.layers.Layer):
    """Has a weight that nothing depends on."""

    def build(self, shape):
        self.unused = self.add_weight(shape=[3, 3], initializer="ones", name="unused")

    def call(self, x):
        return x


def model_with_unused() -> keras.Model:
    keras.utils.set_random_seed(0)
    return sequential(Unused(), keras.layers.Dense(1, kernel_initializer="ones"))


def dropped() -> list[float]:
    """One step of two workers with a kernel of zeros: minus the mean of their dropout masks."""

    def build():
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        return sequential(keras.layers.Dropout(0.5), dense, features=64)

    trainer = Trainer(build, optimizer=keras.optimizers.SGD(1.0), loss=lambda y, y_pred: y_pred)
    arrays = (np.ones([1, 64], "float32"), np.zeros([1, 1], "float32"))
    trainer.fit(lambda: tf.data.Dataset.from_tensors(arrays), verbose=0)
    return trainer.model.get_weights()[0][:, 0].tolist()


def dropout_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return sequential(
        keras.layers.Dense(16), keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(1)
    )


class Extreme(keras.metrics.Metric):
    """The largest or the smallest target, or the last batch's first."""

    def __init__(self, how, name=None, **arguments):
        super().__init__(name=name or how, **arguments)
        self.how = how
        start = {"maximum": -1e9, "minimum": 1e9, "last": 0.0}[how]
        self.value = self.add_variable([], keras.initializers.Constant(start), name="value")

    def update_state(self, y, y_pred, sample_weight=None):
        y = tf.cast(y, "float32")
        if self.how == "maximum":
            self.value.assign(tf.maximum(self.value, tf.reduce_max(y)))
        elif self.how == "minimum":
            self.value.assign(tf.minimum(self.value, tf.reduce_min(y)))
        else:
            self.value.assign(tf.reshape(y, [-1])[0])

    def result(self):
        return tf.convert_to_tensor(self.value)

    def get_config(self):
        return {**super().get_config(), "how": self.how}


def extremes() -> dict:
    """What metrics of two workers say together, and of one; the error for one that cannot."""
    arrays = make_data()
    metrics = [Extreme("maximum"), Extreme("minimum")]
    trainer = on_servers(dense_model, sgd, arrays, 2, loss="mse", metrics=metrics, epochs=2)
    found = {"two": trainer.model.history.history, "y": arrays[1]}
    one = on_servers(dense_model, sgd, arrays, loss="mse", metrics=[Extreme("last")])
    found["last"] = one.model.history.history["last"][-1]
    try:
        on_servers(dense_model, sgd, arrays, 2, loss="mse", metrics=[Extreme("last")])
    except ValueError as error:
        found["error"] = str(error)
    return found


def more_servers_than_pieces() -> dict:
    """How many coordinates RandomK(5%) has reached after six steps, and what is called stale."""

    def build():
        dense = keras.layers.Dense(20, use_bias=False, kernel_initializer="zeros")
        return sequential(dense, features=10)

    x, y = np.ones([STEPS, 2, BATCH, 10], "float32"), np.ones([STEPS, 2, BATCH, 20], "float32")
    arguments = {
        "compressor": tfqcomm.compressors.RandomK(0.05),
        "error_feedback": False,
        "min_size": 0,
        "loss": "mse",
        "parameter_servers": 6,
    }
    trainer = on_servers(build, sgd, (x, y), 2, **arguments)
    stale = on_servers(build, sgd, (x, y), 2, mode="async", max_staleness=1, **arguments)
    return {
        "reached": float(np.mean(trainer.model.get_weights()[0] != 0)),
        "staleness": stale.model.history.history["max_staleness"],
    }


# ----------------------------------------------------------------- What people expect of `compile`


def two_headed() -> keras.Model:
    keras.utils.set_random_seed(0)
    first, second = keras.Input([FEATURES], name="first"), keras.Input([FEATURES], name="second")
    hidden = keras.layers.Dense(8, activity_regularizer="l2", kernel_regularizer="l1")(first)
    hidden = keras.layers.Concatenate()([hidden, second])
    outputs = {
        "a": keras.layers.Dense(1, name="a")(hidden),
        "b": keras.layers.Dense(1, name="b", bias_regularizer="l2")(hidden),
    }
    return keras.Model({"first": first, "second": second}, outputs)


def two_headed_data():
    x, y = make_data()
    weights = np.abs(make_data(1)[1][..., 0]).astype("float32")
    return (
        {"first": x, "second": make_data(2)[0]},
        {"a": y, "b": y + 1},
        {"a": weights, "b": weights + 1},
    )


class OldLoss(keras.Model):
    """Its overrides have no argument `training`, as before Keras 3.3."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_mean(tf.abs(tf.cast(y, "float32") - y_pred))


def old_loss() -> keras.Model:
    model = OldLoss()
    model(np.zeros([1, FEATURES], "float32"))
    return model


def compiled() -> dict:
    arguments = {
        "loss": {"a": "mse", "b": "mae"},
        "loss_weights": {"a": 0.3, "b": 2.0},
        "metrics": {"a": ["mae"]},
        "weighted_metrics": {"b": ["mse"]},
    }
    data = two_headed_data()
    one = in_one_process(two_headed, sgd, data, **arguments)
    trainer = on_servers(two_headed, sgd, data, **arguments)
    return {
        "weights": compare(two_headed, sgd, data, ways=((1, "sync"), (1, "async")), **arguments),
        "one": one.history.history,
        "servers": trainer.model.history.history,
        "old loss": compare(old_loss, sgd, loss=None),
    }


def class_weights() -> float:
    """The difference with rare classes that count more."""

    def build():
        keras.utils.set_random_seed(0)
        return sequential(keras.layers.Dense(3))

    x, y = make_data()
    data = (x, np.clip(np.round(y[..., 0] + 1), 0, 2).astype("int32"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = {0: 1.0, 1: 0.5, 2: 4.0}
    one = build()
    one.compile(sgd(), loss)
    dataset = tf.data.Dataset.from_tensor_slices(joined(data)).batch(2 * BATCH)
    one.fit(dataset, class_weight=weights, shuffle=False, verbose=0)
    trainer = Trainer(build, optimizer=sgd(), loss=loss)
    trainer.fit(dataset_fn(data, 2), class_weight=weights, verbose=0)
    return difference(one.get_weights(), trainer.model.get_weights())


def refusals() -> dict:
    """The errors of what cannot be right."""
    arrays = make_data()

    def freeze():
        trainer = on_servers(dense_model, sgd, arrays, 2, loss="mse")
        trainer.model.layers[0].trainable = False
        trainer.fit(dataset_fn(arrays, 2), verbose=0)

    def split():
        partitioner = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
        arguments = {"loss": "mse", "variable_partitioner": partitioner}
        on_servers(dense_model, lambda: keras.optimizers.Lamb(), arrays, **arguments)

    def all_frozen():
        def build():
            model = dense_model()
            model.trainable = False
            return model

        on_servers(build, sgd, arrays, loss="mse")

    def assigned():
        def build():
            return sequential(keras.layers.SpectralNormalization(keras.layers.Dense(1)))

        on_servers(build, sgd, arrays, loss="mse")

    errors = {}
    for function in (freeze, split, all_frozen, assigned):
        try:
            function()
        except ValueError as error:
            errors[function.__name__] = str(error)
    return errors


# ------------------------------------------------------------------------------- Kinds of layers


class Counter(keras.layers.Layer):
    """Counts its calls, in an integer that nobody averages."""

    def build(self, shape):
        self.calls = self.add_weight(
            shape=[], dtype="int32", initializer="zeros", trainable=False, name="calls"
        )

    def call(self, x):
        self.calls.assign_add(1)
        return x


def normalization():
    layer = keras.layers.Normalization()
    layer.adapt(joined(make_data())[0])
    return layer


def shared():
    dense = keras.layers.Dense(FEATURES, activation="tanh")
    return [dense, dense]


LAYERS = {  # between the features and a Dense(1)
    "convolutions": lambda: [
        keras.layers.Reshape([FEATURES, 1]),
        keras.layers.Conv1D(4, 2),
        keras.layers.BatchNormalization(),
        keras.layers.SeparableConv1D(4, 2),
        keras.layers.MaxPooling1D(),
        keras.layers.Flatten(),
    ],
    "recurrent layers": lambda: [
        keras.layers.Reshape([FEATURES, 1]),
        keras.layers.Masking(),
        keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True)),
        keras.layers.GRU(4, dropout=0.2, recurrent_dropout=0.2, seed=1),
    ],
    "attention": lambda: [
        keras.layers.Reshape([FEATURES, 1]),
        keras.layers.EinsumDense("abc,cd->abd", output_shape=(FEATURES, 8)),
        Attention(),
        keras.layers.LayerNormalization(),
        keras.layers.Flatten(),
    ],
    "noise": lambda: [
        keras.layers.GaussianNoise(0.1, seed=1),
        keras.layers.GaussianDropout(0.1, seed=2),
        keras.layers.AlphaDropout(0.1, seed=3),
    ],
    "normalizations, a counter and an activation with weights": lambda: [
        normalization(),
        Counter(),
        keras.layers.Dense(8),
        keras.layers.GroupNormalization(2),
        keras.layers.UnitNormalization(),
        keras.layers.PReLU(),
    ],
    "shared layers": shared,
    "a model within a model, and frozen layers": lambda: [
        keras.Sequential([keras.layers.Dense(8), keras.layers.BatchNormalization()]),
        keras.layers.Dense(8, trainable=False),
        keras.layers.BatchNormalization(trainable=False),
    ],
}


class Attention(keras.layers.Layer):
    """Attends to itself."""

    def __init__(self):
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1, seed=1)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x, training=None):
        return self.attention(x, x, training=training)


def layers() -> dict:
    """For each kind the largest difference of any variable; dropout's states among them."""
    found = {}
    for name, make in LAYERS.items():

        def build(make=make):
            keras.utils.set_random_seed(0)
            return sequential(*make(), keras.layers.Dense(1))

        one = in_one_process(build, slow_sgd, make_data(), loss="mse", epochs=2)
        trainer = on_servers(build, slow_sgd, make_data(), loss="mse", epochs=2)
        pairs = zip(one.variables, trainer.model.variables, strict=True)
        found[name] = difference(*zip(*((a.numpy(), b.numpy()) for a, b in pairs), strict=True))
    return found


# -------------------------------------------------------------------------------------- Backups


class Sum(keras.layers.Layer):
    """The sum of many weights: the gradient of each is 1, whatever they are."""

    def build(self, shape):
        self.kernels = [
            self.add_weight(shape=[4, 4], initializer="zeros", name=f"kernel{i}") for i in range(24)
        ]

    def call(self, x):
        return x * tf.add_n([tf.reduce_sum(kernel) for kernel in self.kernels])


class BackUp(keras.callbacks.Callback):
    """Notes what a backup of the moment would keep, whatever others are at."""

    def __init__(self):
        super().__init__()
        self.backups: list[tuple[int, list[np.ndarray], dict]] = []

    def on_train_batch_end(self, batch, logs=None):
        state = ledger_of(self.model.optimizer).state()
        version = int(self.model.optimizer.iterations.numpy())
        self.backups.append((version, self.model.get_weights(), state))


def torn_backups() -> dict:
    """How far backups within an asynchronous epoch are from what must hold at any moment.

    Every message is a matrix of ones: at version v a weight is -v / 2, but for what two workers
    owe it.
    """
    trainer = Trainer(
        lambda: sequential(Sum(), features=1),
        optimizer=keras.optimizers.SGD(1.0),
        loss=lambda y, y_pred: y_pred,
        compressor="top_k",
        min_size=0,
        mode="async",
        parameter_servers=3,
    )
    back_up = BackUp()
    arrays = (np.ones([1, 1], "float32"), np.zeros([1, 1], "float32"))
    trainer.fit(
        lambda: tf.data.Dataset.from_tensors(arrays),
        steps_per_epoch=40,
        callbacks=[back_up],
        verbose=0,
    )
    errors = [
        max(
            float(np.abs(weight + version / 2 - state[f"residual/{i}"].reshape([4, 4])).max())
            for i, weight in enumerate(weights)
        )
        for version, weights, state in back_up.backups
    ]
    return {"errors": errors, "versions": [version for version, _, _ in back_up.backups]}


# ------------------------------------------------------------------------------------ Everything


def freed() -> int:
    """How many of some models are still there once their trainers are gone."""
    models = []
    for trainer in (Trainer, LeaderTrainer):
        optimizer = leader_sgd if trainer is LeaderTrainer else qadam
        made = on_servers(dense_model, optimizer, make_data(), 2, trainer, loss="mse")
        models.append(weakref.ref(made.model))
        del made
    gc.collect()
    return sum(model() is not None for model in models)


# ----------------------------------------------------------------------------- Taking turns


def taking_turns() -> dict:
    """For each optimizer how far `fit` by turns of a trainer and of its model is from one process.

    Twice, since the second `fit` of the model takes the steps that the first has traced.
    """
    arrays, found = make_data(), {}
    some = {"compressor": tfqcomm.compressors.TopK(0.2), "min_size": 8, "schedule": "all_gather"}
    optimizers = {
        "CompAMS": lambda: tfqcomm.optimizers.CompAMS(1e-2, **some),
        "QAdam": lambda: tfqcomm.optimizers.QAdam(1e-2, beta_2="1-1/t", **some),
        "LeaderSGD": lambda: tfqcomm.optimizers.LeaderSGD(0.05, 0.9),
    }
    dataset = tf.data.Dataset.from_tensor_slices(joined(arrays)).batch(2 * BATCH)
    for name, optimizer in optimizers.items():
        one = in_one_process(dense_model, optimizer, arrays, epochs=4, loss="mse")
        kind = LeaderTrainer if name == "LeaderSGD" else Trainer
        trainer = on_servers(dense_model, optimizer, arrays, trainer=kind, loss="mse")
        trainer.model.fit(dataset, shuffle=False, verbose=0)
        trainer.fit(dataset_fn(arrays, 1), verbose=0)
        trainer.model.fit(dataset, shuffle=False, verbose=0)
        weights = one.get_weights()
        memory = [ledger_of(model.optimizer).state() for model in (one, trainer.model)]
        found[name] = {
            "moved": difference(weights, dense_model().get_weights()),
            "turns": difference(weights, trainer.model.get_weights()),
            "memory": difference(*([m[key] for key in sorted(memory[0])] for m in memory)),
            "keys": sorted(memory[0]) == sorted(memory[1]),
        }
    return found


# ------------------------------------------------------------------------- Transfers of their own


def long_tensors() -> dict:
    """With tensors that are long enough to travel alone; and what it changes that they do."""
    return {
        "weights": compare(wide_model, sgd, loss="mse", ways=((2, "sync"), (1, "async"))),
        "change": {
            way: difference(*[after_training(way, alone_from) for alone_from in (1 << 16, None)])
            for way in LOSSY
        },
    }


LOSSY = {
    "up": {"compressor": "log_grid", "mode": "async"},
    "up, in rounds": {"compressor": "log_grid", "mode": "sync"},
    "down": {"weight_compressor": "float16", "mode": "async"},
}


def after_training(way: str, alone_from: int | None) -> list[np.ndarray]:
    """Weights, and what the workers remember; None: nothing is encoded, kept, or travels alone."""
    before = trainer_module.ALONE_FROM
    trainer_module.ALONE_FROM = alone_from
    layout.ALONE_FROM = buckets.ALONE_FROM = alone_from or 1 << 30
    try:
        trained = on_servers(wide_model, sgd, make_data(), loss="mse", **LOSSY[way])
    finally:
        trainer_module.ALONE_FROM = layout.ALONE_FROM = buckets.ALONE_FROM = before
    owed = ledger_of(trained.optimizer).residuals.total()
    return [*trained.model.get_weights(), *(owed[key] for key in sorted(owed))]


def wide_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    wide = keras.layers.Dense((1 << 16) // FEATURES + 1, activation="tanh")
    return sequential(wide, keras.layers.Dense(4), keras.layers.Dense(1))


# ----------------------------------------------------------------------------------- Pulls ahead


def pulled_ahead() -> dict[str, float]:
    """How far one worker that pulls ahead comes from what it is to compute, in two calls of `fit`.

    The second one begins with weights that were set in between.
    """
    ways = {
        "in a row": {},
        "alone": {"alone_from": 4},
        "of any length": {"weight_compressor": tfqcomm.parameter_server.SparseWeights()},
    }
    return {way: from_delayed_descent(**arguments) for way, arguments in ways.items()}


def from_delayed_descent(alone_from: int = layout.ALONE_FROM, **arguments) -> float:
    """The largest difference of any weight to `delayed_descent`."""
    x, y = make_data()
    begin, other = np.full([FEATURES, 1], 0.5, "float32"), np.full([FEATURES, 1], -1.0, "float32")

    def build():
        dense = keras.layers.Dense(1, use_bias=False)
        model = sequential(dense)
        model.set_weights([begin])
        return model

    before, trainer_module.ALONE_FROM = trainer_module.ALONE_FROM, alone_from
    try:
        options = {"mode": "async", "pull_ahead": True, "loss": "mse", "min_size": 0, **arguments}
        trainer = on_servers(build, lambda: keras.optimizers.SGD(0.1), (x, y), **options)
    finally:
        trainer_module.ALONE_FROM = before
    found = trainer.model.get_weights()
    trainer.model.set_weights([other])
    trainer.fit(dataset_fn((x, y), 1), verbose=0)
    found += trainer.model.get_weights()
    return difference(found, [delayed_descent(begin, x, y), delayed_descent(other, x, y)])


def delayed_descent(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """w[t + 1] = w[t] - 0.1 g(w[t - 1]), where the first two gradients are at w[0]."""
    at = now = weights.astype("float64")
    for batch, target in zip(
        x.reshape([STEPS, -1, FEATURES]), y.reshape([STEPS, -1, 1]), strict=True
    ):
        gradient = 2 * batch.T @ (batch @ at - target) / len(batch)
        at, now = now, now - 0.1 * gradient
    return now


def everything() -> dict:
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())
    tf.get_logger().addHandler(listener)
    on_servers(dense_model, sgd, make_data(), 2, parameter_servers=6, loss="mse")  # the most
    return {
        "warnings": messages,
        "mixed precision": mixed_precision(),
        "constraints": constraints(),
        "frozen weights": frozen_weights(),
        "excluded": compare(biased_model, adamw_without_biases, loss="mse"),
        "evaluated first": evaluated_first(),
        "unused": compare(model_with_unused, lambda: keras.optimizers.AdamW(0.1), loss="mse"),
        "dropped": dropped(),
        "dropout": compare(dropout_model, sgd, loss="mse", ways=((1, "sync"), (1, "async"))),
        "extremes": extremes(),
        "more servers than pieces": more_servers_than_pieces(),
        "compiled": compiled(),
        "class weights": class_weights(),
        "refusals": refusals(),
        "layers": layers(),
        "torn backups": torn_backups(),
        "freed": freed(),
        "taking turns": taking_turns(),
        "long tensors": long_tensors(),
        "pulled ahead": pulled_ahead(),
    }


def growth(mode: str, rounds: int = 1800, window: int = 300) -> float:
    """The fewest bytes by which a round lets the process grow, over windows of a long `fit`."""
    os.environ.pop("TF_CONFIG", None)
    sizes = []

    def note(batch, logs):
        if (batch + 1) % window == 0:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))

    trainer = Trainer(
        lambda: sequential(keras.layers.Dense(1)), optimizer="sgd", loss="mse", mode=mode
    )
    trainer.fit(
        dataset_fn(make_data(), 2),
        steps_per_epoch=rounds,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)],
        verbose=0,
    )
    return min(np.diff(sizes)[1:]) / window
