"""What every optimizer owes its user under a strategy. Keras' own run it, too."""

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import OPTIMIZERS, over_optimizers
from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    assert_weights_close,
    build,
    compressing,
    copies,
    plain,
    random_gradients,
)
from tests.rungs import slow_unless
from tfqcomm import optimizers
from tfqcomm.optimizers import CompressedOptimizer
from tfqcomm.state.ledger import ledger_of

WORLD, BATCH, BATCHES, EPOCHS = 2, 16, 4, 2
X = np.random.default_rng(0).normal(size=[BATCH * BATCHES, 6]).astype("float32")
Y = (X.sum(axis=1, keepdims=True) > 0).astype("float32")


def strategy_of(case, world=WORLD):
    if case.strategy_compressor is None:
        return plain(world)
    return compressing(world, case.strategy_compressor)


def compiled(case, strategy, optimizer=None, **kwargs):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([6]), *layers])
        model.compile(
            case.make() if optimizer is None else optimizer(),
            loss=keras.losses.BinaryCrossentropy(from_logits=True),
            **kwargs,
        )
    return model


def fit(model):
    return model.fit(X, Y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)


@functools.cache
def fitted(case):
    """The model that the others are compared with, its strategy and history."""
    strategy = strategy_of(case)
    model = compiled(case, strategy)
    return strategy, model, fit(model)


def test_catalogue_is_complete():
    exported = {
        value
        for value in vars(optimizers).values()
        if isinstance(value, type) and issubclass(value, CompressedOptimizer)
    }
    exported.remove(CompressedOptimizer)  # abstract
    assert exported <= {type(case.make()) for case in OPTIMIZERS}


@over_optimizers()
def test_fit_learns_and_counts(case):
    strategy, model, history = fitted(case)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert model.optimizer.iterations.numpy() == BATCHES * EPOCHS
    assert_replicas_equal(strategy, model.weights + model.optimizer.variables)
    traffic = ledger_of(model.optimizer).meter.read()
    assert (traffic.steps, traffic.skipped_steps) == (BATCHES * EPOCHS, 0)
    assert 0 < traffic.bytes_sent < traffic.dense_bytes


@over_optimizers(settings=False)
def test_fit_without_a_strategy(case):
    model = compiled(case, plain())
    history = fit(model)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert model.optimizer.iterations.numpy() == BATCHES * EPOCHS


@over_optimizers()
def test_config_round_trip(case):
    optimizer = case.make(weight_decay=0.1, clipnorm=2.0, name="mine")
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()
    assert type(optimizer).from_config(optimizer.get_config()).get_config() == again.get_config()


@over_optimizers()
def test_saved_model_loads_in_plain_keras_and_goes_on(case, tmp_path):
    _, model, _ = fitted(case)
    model.save(tmp_path / "model.keras")
    plainly = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert_weights_close(plainly, model, atol=0)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    loaded.fit(X, Y, batch_size=BATCH, verbose=0)
    assert loaded.optimizer.iterations.numpy() == BATCHES * (EPOCHS + 1)


@pytest.mark.slow
@over_optimizers(settings=False)
def test_custom_loop_equals_fit(case):
    _, expected, _ = fitted(case)
    strategy = strategy_of(case)
    model = compiled(case, strategy)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH).repeat(EPOCHS)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))  # divided by W, as in `fit`
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    @tf.function
    def step(x, y):
        strategy.run(replica_step, args=(x, y))

    for x, y in strategy.experimental_distribute_dataset(data):
        step(x, y)
    assert_weights_close(model, expected)


@pytest.mark.slow
@over_optimizers(settings=False)
@pytest.mark.parametrize(
    "options",
    slow_unless(
        lambda options: "run_eagerly" not in options,
        [{"run_eagerly": True}, {"steps_per_execution": 4}],
    ),
    ids=str,
)
def test_fit_does_the_same_in_other_ways(case, options):
    _, expected, _ = fitted(case)
    model = compiled(case, strategy_of(case), **options)
    fit(model)
    assert_weights_close(model, expected)
    assert model.optimizer.iterations.numpy() == BATCHES * EPOCHS


@over_optimizers()
def test_not_a_number_on_one_replica_skips_the_step_on_all(case):
    """Weights, slots, iterations and residuals stay; weight decay does not act; then it goes on."""
    shapes = [(8, 8), (3,)]
    strategy = strategy_of(case)
    make = functools.partial(case.make, weight_decay=0.1)
    optimizer, variables = build(strategy, make, shapes)
    state = [*variables, *optimizer.variables]
    good = random_gradients(3, WORLD, shapes)
    bad = [g.copy() for g in good]
    bad[0][1, 1, 0, 0] = np.nan  # in the second step, on the second replica
    history = apply_gradients(strategy, optimizer, variables, bad)
    np.testing.assert_array_equal(history[0][1], history[0][0])
    assert not np.array_equal(history[0][2], history[0][1])
    assert optimizer.iterations.numpy() == 2

    before, owed = copies(strategy, state), ledger_of(optimizer).residuals.total()
    apply_gradients(strategy, optimizer, variables, [g[1:2] for g in bad])
    np.testing.assert_equal(copies(strategy, state), before)
    np.testing.assert_equal(ledger_of(optimizer).residuals.total(), owed)
    traffic = ledger_of(optimizer).meter.read()
    assert (traffic.steps, traffic.skipped_steps) == (4, 2)

    expected, clean = build(strategy, make, shapes)  # as if the step had never been
    right = apply_gradients(strategy, expected, clean, [g[[0, 2]] for g in good])
    for a, b in zip(history, right, strict=True):
        np.testing.assert_allclose(a[2], b[1], atol=1e-6)


@over_optimizers(settings=False)
def test_xla_is_refused(case):
    model = compiled(case, strategy_of(case), jit_compile=True)
    with pytest.raises(ValueError, match="cannot be compiled by XLA.*`model.compile.*jit_compile"):
        fit(model)


def test_keras_does_not_choose_to_compile_what_cannot_be(monkeypatch):
    """As it does by default on one GPU, where adaptive top-k would then end in an error of XLA."""
    gpu = types.SimpleNamespace(device_type="GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *args: [gpu])
    for optimizer, chosen in ((optimizers.AdaptiveTopKSGD(), False), (optimizers.QAdam(), True)):
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        assert model.jit_compile is chosen


def test_what_compile_is_given_by_position_is_checked_as_well():
    """Its arguments were only seen by name."""
    strategy = compressing(WORLD, "top_k")
    seen = []
    strategy.agree_on_optimizer = seen.append
    with strategy.scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(1)])
        model.compile("sgd", "mse", None, None, None, False, 4)
        assert model.steps_per_execution == 4
        model.compile(loss="mse", steps_per_execution=2)
        model.compile(loss="mse", optimizer="adam")
    assert seen == ["sgd", "rmsprop", "adam"]


OWN = [case for case in OPTIMIZERS if case.strategy_compressor is None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name == "QAdam" else [pytest.mark.slow]) for c in OWN],
    ids=str,
)
def test_one_device_without_a_strategy_may_be_compiled(case):
    """On one GPU Keras' default does so, and every optimizer of this package refused it."""
    if not case.make().supports_jit:  # XLA pads what a selection finds, and keeps other entries
        with pytest.raises(ValueError, match="cannot be compiled by XLA: .*TopK.* selects entries"):
            fit(compiled(case, plain(), jit_compile=True))
        return
    model = compiled(case, plain(), jit_compile=True)
    fit(model)
    expected = compiled(case, plain())
    fit(expected)
    assert_weights_close(model, expected, atol=1e-5)
    assert model.optimizer.iterations.numpy() == BATCHES * EPOCHS


@over_optimizers(settings=False)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_overwrite_frequency": 2},
    ],
    ids=lambda options: [*options][-1],
)
def test_what_a_strategy_cannot_do_is_refused(case, options):
    name, value = [*options.items()][-1]
    model = compiled(case, strategy_of(case), lambda: case.make(**options))
    with pytest.raises(
        ValueError, match=f"(?s)`{name}` is not supported.*Received: {name}={value}"
    ):
        fit(model)


@over_optimizers(settings=False)
def test_apply_outside_of_a_replica_is_refused(case):
    strategy = strategy_of(case)
    optimizer, variables = build(strategy, case.make, [(3,)])
    text = "must be called in a replica context: inside `strategy.run"
    with strategy.scope(), pytest.raises(ValueError, match=text):
        optimizer.apply([tf.zeros([3])], variables)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.05),  # where there are slots, TensorFlow refuses by itself
        lambda: optimizers.LeaderSGD(0.05, 0.9, global_period=2),
        lambda: optimizers.PeriodicAveragingSGD(0.05, period=2),
    ],
    ids=["SGD", "LeaderSGD", "PeriodicAveragingSGD"],
)
def test_optimizer_made_outside_of_the_scope_does_not_count_every_step_twice(make):
    """Iterations went up by the number of replicas, and no pull was ever due."""
    case = OPTIMIZERS[-1]  # a strategy that compresses
    optimizer = make()
    model = compiled(case, strategy_of(case), lambda: optimizer)
    with pytest.raises(ValueError, match=r"(?s)must be created in the scope of the strategy.*Rec"):
        fit(model)
    assert optimizer.iterations.numpy() == 0


@pytest.mark.parametrize("cls", [optimizers.PeriodicAveragingSGD, optimizers.AdaptiveTopKSGD])
def test_one_replica_has_the_moving_averages_and_constraints_of_keras(cls):
    options = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    results = []
    for make in (cls, keras.optimizers.SGD):
        kernel = keras.Variable(np.full([4, 4], 3.0, "float32"))
        kernel.constraint = keras.constraints.MaxNorm(1.0)
        optimizer = make(0.1, **options)
        optimizer.build([kernel])
        values = []
        for step in range(4):
            optimizer.apply([np.full([4, 4], -step, "float32")], [kernel])
            values += [kernel.numpy(), *(v.numpy() for v in optimizer.variables[2:])]
        results.append(values)
    for mine, right in zip(*results, strict=True):
        np.testing.assert_allclose(mine, right, atol=1e-6)


@over_optimizers(settings=False)
def test_moving_average_of_the_weights(case):
    """`use_ema`: the averages of all steps, which `fit` puts into the model at its end."""
    strategy = strategy_of(case)
    make = functools.partial(case.make, use_ema=True, ema_momentum=0.5)
    optimizer, variables = build(strategy, make, [(4, 4)])
    history = apply_gradients(strategy, optimizer, variables, random_gradients(4, WORLD, [(4, 4)]))
    average = history[0][0]
    for value in history[0][1:]:
        average = (average + value) / 2
    assert_replicas_equal(strategy, optimizer.variables)
    with strategy.scope():
        optimizer.finalize_variable_values(variables)
    np.testing.assert_allclose(variables[0].numpy(), average, atol=1e-6)
    assert_replicas_equal(strategy, variables)
