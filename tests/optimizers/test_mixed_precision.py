"""`mixed_float16`: an overflow on one replica alone is one skip, agreed by all."""

import functools

import keras
import numpy as np
import pytest

from tests.catalogue import OPTIMIZERS
from tests.replicas import assert_replicas_equal, compressing, plain
from tests.rungs import slow_unless
from tfqcomm.state.ledger import ledger_of

CASES = [case for case in OPTIMIZERS if str(case) in ("CompAMS-TopK", "Adam", "SGD")]


def embedding_model():
    layers = keras.layers
    return [
        keras.Input([3], dtype="int32"),
        layers.Embedding(20, 4),
        layers.GlobalAveragePooling1D(),
        layers.Dense(2, dtype="float32"),
    ]


def dense_model():
    return [
        keras.Input([6]),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.Dense(2, dtype="float32"),
    ]


def compiled(case, strategy, layers):
    keras.config.set_dtype_policy("mixed_float16")  # the `fresh_session` fixture puts it back
    with strategy.scope():
        model = keras.Sequential(layers())
        optimizer = case.make(weight_decay=0.1)
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def strategy_of(case):
    if case.strategy_compressor is None:
        return plain(2)
    return compressing(2, case.strategy_compressor)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sick", slow_unless(lambda sick: sick == 1, [0, 1]))
def test_an_overflow_on_one_replica_is_skipped_by_all(case, sick):
    strategy = strategy_of(case)
    model = compiled(case, strategy, dense_model)
    fit = functools.partial(model.fit, batch_size=8, shuffle=False, verbose=0)
    x = np.random.default_rng(0).normal(size=[8, 6]).astype("float32")
    y = np.arange(8) % 2
    fit(x, y)
    before, scale = model.get_weights(), model.optimizer.dynamic_scale.numpy()
    owed = ledger_of(model.optimizer.inner_optimizer).residuals.total()

    overflowing = x.copy()
    overflowing[4 * sick] = 3e4  # its part of the batch: float16 ends at 65504
    fit(overflowing, y)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.optimizer.dynamic_scale.numpy() == scale / 2
    assert model.optimizer.iterations.numpy() == 1
    np.testing.assert_equal(ledger_of(model.optimizer.inner_optimizer).residuals.total(), owed)

    fit(x, y)
    assert model.optimizer.iterations.numpy() == 2
    assert not np.array_equal(model.get_weights()[0], before[0])
    assert_replicas_equal(strategy, model.weights + model.optimizer.inner_optimizer.variables)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_embeddings(case):
    strategy = strategy_of(case)
    model = compiled(case, strategy, embedding_model)
    before = model.get_weights()[0]
    x = np.random.default_rng(0).integers(0, 20, [16, 3])
    model.fit(x, np.arange(16) % 2, batch_size=8, verbose=0)
    assert model.optimizer.iterations.numpy() == 2
    assert not np.array_equal(model.get_weights()[0], before)
    assert_replicas_equal(strategy, model.weights)
