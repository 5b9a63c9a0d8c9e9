"""Rows of embeddings in fewer bits: their mean, their bytes, and what a model learns from them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import assert_replicas_equal, compressing
from tests.step.test_exchange import dense, exchange_of_replicas, mean_of, message, routes, rows
from tfqcomm.optimizers import CompAMS, QAdam
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions
from tfqcomm.step.message import Message

INDICES = [
    [[1, 2], [3, 4], [5, 6]],
    [[1], [1, 1, 9], []],
    [[0, 0, 0], [9, 0, 9], [0]],
    [[], [], []],
]


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize(("row_type", "size"), [("int8", 8), ("bfloat16", 8)])
def test_the_mean_has_each_row_once(indices, row_type, size):
    exchange = exchange_of_replicas(3, "top_k", min_size=0, embedding_rows=row_type)
    sent = rows("embedding", indices)
    reduction = exchange.reduce([sent, message("bias", (7,), 3)], 0)
    assert reduction.healthy
    mean = reduction.means[0]
    once = sorted({place for of in indices for place in of})
    assert sorted(mean.indices.numpy()) == once
    largest = max([np.abs(dense(v)).max() for v in sent.values])
    np.testing.assert_allclose(dense(mean), mean_of(sent), atol=largest / 250)
    assert routes(exchange)["embedding"] == ("all_gather", f"rows in {row_type}, each once")
    reduction.record()
    as_they_are = exchange_of_replicas(3, "top_k", min_size=0)
    as_they_are.reduce([sent, message("bias", (7,), 3)], 0).record()
    saved = as_they_are.ledger.meter.read().bytes_sent - exchange.ledger.meter.read().bytes_sent
    before = 20 * max(map(len, indices)) + 2 * 4  # all are as long as the longest; two lengths
    after = size * max(len(set(of)) for of in indices) + 4
    assert saved == 2 * (before - after)


def test_rows_of_matrices_and_of_wider_types():
    values = np.random.default_rng(0).normal(size=[4, 3, 2])
    places, shape = tf.constant([7, 0, 7, 2]), tf.constant([9, 3, 2])
    of = tf.IndexedSlices(tf.constant(values), places, shape)
    exchange = exchange_of_replicas(2, None, embedding_rows="int8")
    (mean,) = exchange.reduce([Message("table", [of, of])], 0).means
    np.testing.assert_allclose(dense(mean), dense(of), atol=0.05)
    assert mean.shape == (9, 3, 2)


@pytest.mark.parametrize("row_type", ["int8", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_rows_that_are_not_finite_once_they_are_summed_skip_the_step(row_type, bad):
    values = tf.constant([[bad, 1.0], [bad, 2.0]])
    of = tf.IndexedSlices(values, tf.constant([3, 3]), tf.constant([9, 2]))
    well = tf.IndexedSlices(tf.ones([2, 2]), tf.constant([3, 3]), tf.constant([9, 2]))
    exchange = exchange_of_replicas(2, None, embedding_rows=row_type)
    assert not exchange.reduce([Message("table", [well, of])], 0).healthy
    assert exchange.reduce([Message("table", [well, well])], 0).healthy


WORDS, LENGTH, CLASSES = 400, 12, 4


def sentences(examples, seed):
    """Each word speaks for a class, some not much; a sentence's class is what most of them say."""
    meaning = np.random.default_rng(0).normal(size=[WORDS, CLASSES])
    words = np.random.default_rng(seed).zipf(1.3, size=[examples, LENGTH]) % WORDS
    return words.astype("int32"), meaning[words].sum(axis=1).argmax(axis=1).astype("int32")


def train_classifier(seed, **options):
    """Accuracy on new sentences, and the bytes of an embedding's gradients, on two replicas."""
    keras.utils.set_random_seed(seed)
    strategy = compressing(2, None, **options)
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([LENGTH], dtype="int32"),
                layers.Embedding(WORDS, 32),
                layers.LSTM(32),
                layers.Dense(CLASSES),
            ]
        )
        model.compile(
            keras.optimizers.Adam(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    x, y = sentences(6_000, 1)
    model.fit(x, y, batch_size=100, epochs=12, verbose=0)
    assert_replicas_equal(strategy, model.trainable_variables)
    accuracy = model.evaluate(*sentences(4_000, 2), batch_size=1_000, verbose=0)[1]
    others = sum(v.shape.num_elements() for v in model.trainable_variables[1:])
    meter = ledger_of(model.optimizer).meter.read()
    return accuracy, meter.bytes_sent - meter.steps * 4 * (others + 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_classifier_learns_as_well_from_a_fraction_of_the_bytes():
    """Embedding and LSTM: at least 3.5 times fewer bytes for int8, within 0.3 points."""
    found = {
        row_type: np.array([train_classifier(seed, embedding_rows=row_type) for seed in range(3)])
        for row_type in ("float32", "int8")
    }
    print(found)
    (plain, plain_bytes), (int8, int8_bytes) = (of.mean(axis=0) for of in found.values())
    assert plain > 0.85
    assert int8 >= plain - 0.003
    assert plain_bytes >= 3.5 * int8_bytes


def test_arguments():
    with pytest.raises(ValueError, match="`embedding_rows` must be one of .*embedding_rows='int4'"):
        ExchangeOptions("top_k", embedding_rows="int4")
    with pytest.raises(ValueError, match="`embedding_rows` of the optimizer is not supported"):
        options_of(CompAMS(embedding_rows="int8"), 1)
    config = QAdam(embedding_rows="bfloat16").get_config()
    assert QAdam.from_config(config).options.embedding_rows == "bfloat16"
