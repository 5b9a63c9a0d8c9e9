"""Gradient accumulation: k batches and one exchange are a step on a batch k times larger."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    build,
    compressing,
    copies,
    plain,
    random_gradients,
)
from tests.step.error_feedback_reference import means_of_messages, sgd
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.compressors import AdaptiveTopK, PowerSGD, TopK
from tfqcomm.optimizers import CompAMS, DiLoCo, OneBitAdam, QAdam
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions

SHAPES = [(40, 30), (7,), ()]
EXCHANGES, BATCHES = 10, 4

OWN = {"compressor": "identity", "min_size": 0, "accumulate": BATCHES}
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "CompAMS": lambda: CompAMS(0.01, **OWN),
    "QAdam": lambda: QAdam(0.01, **OWN),
    "OneBitAdam": lambda: OneBitAdam(0.01, warm_up=3, **OWN),
}


def large(gradients, batches=BATCHES):
    """Those of batches so many times larger: the mean of each row of batches."""
    return [g.reshape(-1, batches, *g.shape[1:]).mean(axis=1) for g in gradients]


def run(optimizer, gradients, compressor="identity", **options):
    """The strategy, the optimizer, its variables, and their values after each batch."""
    strategy = compressing(2, compressor, **options)
    shapes = [g.shape[2:] for g in gradients]
    optimizer, variables = build(strategy, optimizer, shapes)
    history = apply_gradients(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, [*variables, *optimizer.variables])
    return strategy, optimizer, variables, history


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_larger_batches(name, monkeypatch):
    gradients = random_gradients(EXCHANGES * BATCHES, 2, SHAPES)
    _, optimizer, _, found = run(OPTIMIZERS[name], gradients, accumulate=BATCHES)
    monkeypatch.setitem(OWN, "accumulate", 1)
    _, expected_optimizer, _, expected = run(OPTIMIZERS[name], large(gradients))
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(values[BATCHES - 1 :: BATCHES], wanted, atol=1e-5)
        unchanged = values.reshape(-1, BATCHES, *values.shape[1:])
        np.testing.assert_array_equal(unchanged[1:, :-1], unchanged[:-1, -1:].repeat(3, axis=1))
    assert optimizer.iterations.numpy() == EXCHANGES
    for a, b in zip(optimizer.variables, expected_optimizer.variables, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    traffic, wanted = (ledger_of(o).meter.read() for o in (optimizer, expected_optimizer))
    assert (traffic.steps, traffic.bytes_sent) == (wanted.steps, wanted.bytes_sent)


@pytest.mark.parametrize("rates", [[0.1] * 10, [0.1] * 5 + [0.02] * 5], ids=["", "scaled"])
def test_messages_are_those_of_a_reference(rates):
    """Compressed with error feedback, which follows the rate of exchanges."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4], [rates[0], rates[-1]])
    gradients = random_gradients(20, 2, SHAPES)
    start = build(plain(), lambda: keras.optimizers.SGD(), SHAPES)[1]
    _, optimizer, _, found = run(
        lambda: keras.optimizers.SGD(schedule), gradients, TopK(0.1),
        schedule="all_gather", accumulate=2, scale_residual=True,
    )  # fmt: skip
    means = means_of_messages([TopK(0.1)] * 3, large(gradients, 2), rates)
    for variable, values, mean in zip(start, found, means, strict=True):
        np.testing.assert_allclose(values[1::2], sgd(variable.numpy(), mean, rates), atol=2e-5)


@pytest.mark.parametrize("codec", ["block_sign", AdaptiveTopK(0.1), PowerSGD(2)], ids=str)
def test_every_kind_of_exchange_waits(codec):
    gradients = random_gradients(12, 2, SHAPES)
    make = OPTIMIZERS["SGD"]
    _, _, _, found = run(make, gradients, codec, accumulate=3, warm_up=1)
    _, _, _, expected = run(make, large(gradients, 3), codec, warm_up=1)
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(values[2::3], wanted, atol=2e-3)


def test_a_batch_that_is_not_finite_costs_its_whole_step():
    gradients = random_gradients(12, 2, SHAPES)
    bad = [g.copy() for g in gradients]
    bad[0][4, 1, 3, 3] = np.inf
    _, optimizer, _, found = run(OPTIMIZERS["Adam"], bad, accumulate=3)
    without = [np.delete(g, [3, 4, 5], axis=0) for g in gradients]
    _, _, _, expected = run(OPTIMIZERS["Adam"], without, accumulate=3)
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.delete(values, [3, 4, 5], axis=0), wanted, atol=1e-6)
    assert optimizer.iterations.numpy() == 3
    assert ledger_of(optimizer).meter.read().skipped_steps == 1


def test_float64_is_added_up_in_its_own_type():
    strategy = compressing(2, None, accumulate=2)
    with strategy.scope():
        variable = keras.Variable(np.zeros([3]), dtype="float64")
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([variable])

    @tf.function
    def step(value):
        strategy.run(lambda: optimizer.apply([tf.fill([3], value)], [variable]))

    for value in (1.0, 2.0**-40):
        step(tf.constant(value, tf.float64))
    np.testing.assert_array_equal(variable, -np.full([3], 1 + 2.0**-40))


TOKENS = np.random.default_rng(0).integers(0, 50, [48, 4]).astype("int32")
TARGETS = np.random.default_rng(1).normal(size=[48, 3]).astype("float32")


def compiled(optimizer, world=2, compressor=None, **options):
    keras.utils.set_random_seed(0)
    strategy = compressing(world, compressor, **options)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([4], dtype="int32"),
                keras.layers.Embedding(50, 16),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
        model.compile(optimizer(), "mse")
    return strategy, model


def fit(model, batch_size=8, epochs=2, **kwargs):
    kwargs |= {"batch_size": batch_size, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(TOKENS, TARGETS, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "loss_scale"])
def test_fit_is_that_of_larger_batches_with_embeddings_that_stay_sparse(name, monkeypatch):
    def optimizer():
        if name != "loss_scale":
            return OPTIMIZERS[name]()
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), 2.0**10)

    traced = []
    inner = getattr(optimizer(), "inner_optimizer", optimizer())
    update = type(inner).update_step
    monkeypatch.setattr(type(inner), "update_step", lambda *a: traced.append(1) or update(*a))
    strategy, model = compiled(optimizer, accumulate=3)
    fit(model, epochs=1)
    traces = len(traced)
    fit(model, epochs=1)
    assert traces and len(traced) == traces
    assert_replicas_equal(strategy, model.weights)
    _, expected = compiled(optimizer)
    for _ in range(2):  # at the end of each, averages become the weights
        fit(expected, batch_size=24, epochs=1)
    for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    found, wanted = (
        getattr(m.optimizer, "inner_optimizer", m.optimizer) for m in (model, expected)
    )
    assert found.iterations.numpy() == wanted.iterations.numpy() == 4
    # Duplicates within the three batches are added up, and sent once.
    sent, most = (ledger_of(o).meter.read().bytes_sent for o in (found, wanted))
    assert sent < 0.9 * most


def test_adam_squares_the_sum_of_an_embeddings_rows():
    """As of a dense gradient; Keras squares every occurrence of a row by itself."""
    random = np.random.default_rng(0)
    values = random.normal(size=[12, 2, 5, 4]).astype("float32")
    places = random.integers(0, 6, [12, 2, 5])
    gradients = np.zeros([12, 2, 6, 4], np.float32)
    for index in np.ndindex(12, 2, 5):
        gradients[index[:2]][places[index]] += values[index]
    expected = run(OPTIMIZERS["Adam"], large([gradients], 3))[-1][0]
    strategy = compressing(2, None, accumulate=3)
    optimizer, (variable,) = build(strategy, OPTIMIZERS["Adam"], [(6, 4)])

    def replica_step(values, places):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        rows = tf.IndexedSlices(values[rank] / 2, places[rank], tf.constant([6, 4]))
        optimizer.apply([rows], [variable])

    step = tf.function(lambda *of: strategy.run(replica_step, args=of))
    for batch in range(12):
        step(tf.constant(values[batch]), tf.constant(places[batch]))
        if batch % 3 == 2:
            np.testing.assert_allclose(variable, expected[batch // 3], atol=1e-5)


@pytest.mark.slow
def test_a_backup_in_the_middle_of_a_step_goes_on(tmp_path):
    """Epochs of three batches, and two batches to a step."""
    for optimizer in (OPTIMIZERS["Adam"], lambda: QAdam(0.01, **(OWN | {"accumulate": 2}))):
        options = {"world": 1, "compressor": "block_sign", "accumulate": 2}
        (_, expected), (_, stopped), (_, again) = (compiled(optimizer, **options) for _ in range(3))
        fit(expected, 16, 3)
        assert expected.optimizer.iterations.numpy() == 4
        fit(stopped, 16, 1, callbacks=[BackupAndRestore(tmp_path, delete_checkpoint=False)])
        state = ledger_of(stopped.optimizer).state()
        assert state["accumulation/batches"] == 1
        assert state["worker/accumulated/1"].any()
        fit(again, 16, 3, callbacks=[BackupAndRestore(tmp_path)])
        for a, b in zip(again.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_moving_statistics_come_together_with_the_exchange():
    keras.utils.set_random_seed(0)
    strategy = compressing(2, None, accumulate=2)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([4]), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
        )
        model.compile("sgd", "mse")
    x = TOKENS * np.linspace(0.5, 2, 48)[:, None]
    model.fit(x, TARGETS, batch_size=8, shuffle=False, verbose=0)
    assert_replicas_equal(strategy, model.weights)
    model.fit(x[:8], TARGETS[:8], batch_size=8, shuffle=False, verbose=0)
    first, second = copies(strategy, model.non_trainable_variables)
    assert not np.array_equal(first[0], second[0])


@pytest.mark.slow
def test_without_a_strategy_and_compiled_by_xla():
    for compile_options in ({}, {"jit_compile": True}, {"run_eagerly": True}):
        weights = []
        for accumulate, batch_size in ((2, 8), (1, 16)):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])
            optimizer = CompAMS(0.1, compressor="block_sign", min_size=0, accumulate=accumulate)
            model.compile(optimizer, "mse", **compile_options)
            model.fit(TOKENS, TARGETS, batch_size=batch_size, shuffle=False, verbose=0)
            weights.append(model.get_weights())
        for a, b in zip(*weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_does_not_fit_is_refused():
    for value in (0, -1, 2.0, True, None):
        expected = f"`accumulate` must be a positive integer. Received: accumulate={value!r}"
        with pytest.raises(ValueError, match=expected):
            ExchangeOptions("top_k", accumulate=value)
    with pytest.raises(ValueError, match="`accumulate` of the optimizer is not supported"):
        options_of(CompAMS(accumulate=2), 1)
    with pytest.raises(ValueError, match="not recognized: .*accumulate"):
        DiLoCo(keras.optimizers.SGD(), 2, accumulate=2)
    optimizer, variables = build(
        plain(), lambda: CompAMS(accumulate=2, gradient_accumulation_steps=2), SHAPES
    )
    expected = "`gradient_accumulation_steps` is not supported.* Use `accumulate`.*accumulate=2"
    with pytest.raises(ValueError, match=expected):
        for _ in range(2):
            optimizer.apply([tf.zeros(shape) for shape in SHAPES], variables)
    optimizer, variables = build(plain(), lambda: CompAMS(accumulate=2), SHAPES)
    optimizer.apply([tf.zeros(SHAPES[0])], variables[:1])
    with pytest.raises(ValueError, match="the same variables at every step.*2 variables after 1"):
        optimizer.apply([tf.zeros(shape) for shape in SHAPES[:2]], variables[:2])
