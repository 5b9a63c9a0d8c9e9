"""What the experiments measure is what they say."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import models
from experiments import data, report, training
from tfqcomm.optimizers import CompAMS


def test_scorer_agrees_with_keras():
    digits = data.load("digits")
    model = training.compiled(
        models.digits_cnn, keras.optimizers.SGD, tf.distribute.get_strategy(), seed=0
    )
    loss, accuracy = training.Scorer(model, digits.x_test, digits.y_test, batch=100)()
    expected = model.evaluate(digits.x_test, digits.y_test, verbose=0, return_dict=True)
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert accuracy == pytest.approx(expected["accuracy"])


def test_replicas_draw_dropout_masks_of_their_own(mirrored_strategy):
    strategy = mirrored_strategy(3)

    def build():
        return keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5)])

    model = training.compiled(build, keras.optimizers.SGD, strategy, seed=0)

    @tf.function
    def masks():
        return strategy.run(lambda: model(tf.ones([1, 64]), training=True))

    first, second = (
        [m.numpy() for m in strategy.experimental_local_results(masks())] for _ in "ab"
    )
    assert len(np.unique([*first, *second], axis=0)) == 6


def test_train_records_every_epoch(mirrored_strategy):
    digits = data.load("digits")
    model = training.compiled(
        lambda: models.mlp((8, 8, 1), 10, (32,)),
        lambda: CompAMS(1e-2, compressor="block_sign"),
        mirrored_strategy(2),
        seed=0,
    )
    epochs = training.train(model, digits, epochs=2, global_batch=101, seed=0)
    assert [epoch["steps"] for epoch in epochs] == [14, 14]  # 1437 // 101; 100 examples each
    assert epochs[1]["test_loss"] < epochs[0]["test_loss"]
    assert report.summary(epochs)["bytes_per_worker_and_step"] == epochs[0]["bytes_sent"] / 14


def test_train_refuses_a_batch_that_does_not_fit(mirrored_strategy):
    digits = data.load("digits")
    model = training.compiled(
        lambda: models.mlp((8, 8, 1)), keras.optimizers.SGD, mirrored_strategy(2), seed=0
    )
    for batch in (1, 1438):
        with pytest.raises(ValueError, match=rf"from 2, .* to 1437, .*global_batch={batch}"):
            training.train(model, digits, epochs=1, global_batch=batch, seed=0)


@pytest.mark.slow
def test_lstm_learns_and_its_embedding_is_compressed(mirrored_strategy):
    rng = np.random.default_rng(0)
    y = np.arange(32, dtype=np.int32) % 2
    x = np.zeros([32, 500], np.int32)
    x[:, :6] = rng.integers(2, 1000, [32, 6]) + 999 * y[:, None]
    model = training.compiled(
        models.comp_ams_imdb_lstm,
        lambda: CompAMS(1e-2, compressor="top_k", min_size=0),
        mirrored_strategy(2),
        seed=0,
    )
    epochs = training.train(
        model, data.Dataset(x, y, x, y, num_classes=2), epochs=6, global_batch=8, seed=0
    )
    assert epochs[-1]["test_loss"] < 0.8 * epochs[0]["test_loss"]
    assert epochs[-1]["test_accuracy"] > 0.9
    assert epochs[0]["ratio"] > 50  # of 93,122 floats the table has 64,000


def test_table_is_markdown():
    run = {
        "title": "Adam, dense",
        "test_accuracy": 0.98,
        "bytes_per_worker_and_step": 1_135_148.0,
        "ratio": 1.0,
        "seconds_per_step": 0.0123,
    }
    header, rule, row = report.table({"runs": {"adam_dense": run}}).splitlines()
    assert len(header) == len(rule) == len(row)
    assert header.count("|") == rule.count("|") == row.count("|") == 6
    assert all(cell in row for cell in ("98.00%", "1,135,148", "1.0x", "0.0123"))
