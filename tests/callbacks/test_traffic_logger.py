"""What TrafficLogger reports is what was sent, in numbers worked out by hand."""

from __future__ import annotations

import importlib.util

import absl.logging
import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.callbacks.backup_functions import TwoOptimizers
from tfqcomm.callbacks import TrafficLogger
from tfqcomm.compressors import TopK
from tfqcomm.distribute import CompressedAllReduce
from tfqcomm.optimizers import CompAMS

# Kernels of 64 x 32 and 32 x 10 elements and their biases; only the first has 1024 or more.
PARAMETERS = 64 * 32 + 32 + 32 * 10 + 10
DENSE_NUMBERS = PARAMETERS - 64 * 32
# All is well, a tenth of the values, 3 low bits of each position, 255 + 205 bits for the rest.
TOP_K_WORDS = 1 + 205 + 20 + 15

KEYS = [
    "epoch",
    "steps",
    "skipped_steps",
    "bytes_sent",
    "dense_bytes",
    "ratio",
    "residual_norm_ratio",
]


def compiled(strategy, optimizer="adam", **kwargs):
    layers, loss = keras.layers, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with strategy.scope():
        model = keras.Sequential([keras.Input([64]), layers.Dense(32), layers.Dense(10)])
        model.compile(optimizer, loss, **kwargs)
    return model


def fit(strategy, logger, epochs=1, x=None, model=None, **kwargs):
    """Three steps in each epoch."""
    model = model or compiled(strategy, **kwargs)
    random = np.random.RandomState(0)
    x = random.randn(48, 64).astype("float32") if x is None else x
    y = random.randint(0, 10, 48)
    model.fit(
        x,
        y,
        batch_size=16,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[logger],
    )
    return model


@pytest.fixture
def strategy(mirrored_strategy):
    """Returns a function: n replicas that send a tenth of each kernel, unless told otherwise."""

    def make(n, compressor=None, **options):
        ops = CompressedAllReduce(compressor or TopK(0.1), **options)
        return mirrored_strategy(n, ops)

    return make


def bytes_per_step(world):
    """What one of `world` workers sends: a ring of all-reduces, and copies to all others."""
    return 2 * (world - 1) * 4 * DENSE_NUMBERS // world + (world - 1) * 4 * TOP_K_WORDS


def dense_bytes_per_step(world):
    return 2 * (world - 1) * 4 * PARAMETERS // world


@pytest.mark.parametrize("world", [2, 4])
def test_history(strategy, world):
    logger = TrafficLogger(verbose=0)
    fit(strategy(world), logger, epochs=2)
    assert [record["epoch"] for record in logger.history] == [0, 1]
    for record in logger.history:
        assert list(record) == KEYS
        assert record["steps"] == 3
        assert record["skipped_steps"] == 0
        assert record["bytes_sent"] == 3 * bytes_per_step(world)
        assert record["dense_bytes"] == 3 * dense_bytes_per_step(world)
        assert record["ratio"] == dense_bytes_per_step(world) / bytes_per_step(world)
        assert record["residual_norm_ratio"] > 0.5


def test_the_numbers_themselves():
    """Two workers: 1448 + 964 bytes in a step, instead of 9640."""
    assert (bytes_per_step(2), dense_bytes_per_step(2)) == (2412, 9640)


def test_without_compression(strategy):
    logger = TrafficLogger(verbose=0)
    fit(strategy(2, "identity"), logger)
    (record,) = logger.history
    assert record["bytes_sent"] == 3 * 4 * PARAMETERS
    assert record["ratio"] == 1.0
    assert record["residual_norm_ratio"] == 0


def test_a_single_replica_sends_nothing():
    logger = TrafficLogger(verbose=0)
    fit(tf.distribute.get_strategy(), logger, optimizer=CompAMS(1e-3, compressor=TopK(0.1)))
    (record,) = logger.history
    assert (record["bytes_sent"], record["dense_bytes"], record["ratio"]) == (0, 0, 1.0)
    assert record["residual_norm_ratio"] > 0.5


def test_residual_norm_ratio(strategy):
    """One step of a linear model that begins at zero: of its gradient the larger half is sent."""
    with strategy(1).scope():
        model = keras.Sequential(
            [keras.Input([64]), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
        )
        optimizer = CompAMS(1e-3, compressor=TopK(0.5), min_size=0)
        model.compile(optimizer, "mse")
    random = np.random.RandomState(0)
    x, y = random.randn(16, 64).astype("float32"), random.randn(16, 1).astype("float32")
    logger = TrafficLogger(verbose=0)
    model.fit(x, y, batch_size=16, verbose=0, callbacks=[logger])
    gradient = np.abs(2 / 16 * x.T @ y)[:, 0]
    left = np.sort(gradient)[:32]
    ratio = logger.history[0]["residual_norm_ratio"]
    assert ratio == pytest.approx(np.linalg.norm(left) / np.linalg.norm(gradient), rel=1e-5)


def test_skipped_steps(strategy):
    x = np.random.RandomState(0).randn(48, 64).astype("float32")
    x[20, 3] = np.nan
    logger = TrafficLogger(verbose=0)
    fit(strategy(2), logger, epochs=2, x=x)
    assert [record["skipped_steps"] for record in logger.history] == [1, 1]
    assert [record["steps"] for record in logger.history] == [3, 3]


def test_fit_twice_counts_each_epoch_once(strategy):
    logger = TrafficLogger(verbose=0)
    place = strategy(2)
    model = fit(place, logger)
    fit(place, TrafficLogger(verbose=0), model=model)  # seen by another logger
    fit(place, logger, model=model)
    assert [record["bytes_sent"] for record in logger.history] == [3 * bytes_per_step(2)] * 2


@pytest.mark.slow
def test_several_steps_per_execution(strategy):
    logger = TrafficLogger(verbose=0)
    fit(strategy(2), logger, steps_per_execution=2)
    assert logger.history[0]["steps"] == 3
    assert logger.history[0]["bytes_sent"] == 3 * bytes_per_step(2)


@pytest.mark.slow
def test_two_optimizers_are_added_up(strategy):
    logger = TrafficLogger(verbose=0)
    place = strategy(2)
    with place.scope():
        model = TwoOptimizers()
        model.compile(keras.optimizers.Adam(1e-2))
    fit(place, logger, model=model)
    (record,) = logger.history
    kernels, biases = [64 * 32, 32 * 64], [32, 64]
    assert record["steps"] == 2 * 3
    assert record["dense_bytes"] == 3 * 4 * sum(kernels + biases)
    # Each sends a tenth of its kernel, its bias, and twice that all is well.
    assert record["bytes_sent"] == 3 * 4 * (2 * TOP_K_WORDS + sum(biases))


# ------------------------------------------------------------------------------------ what it says


def test_tensorboard(tmp_path, strategy):
    logger = TrafficLogger(tmp_path / "logs", verbose=0)
    fit(strategy(2), logger, epochs=2)
    (file,) = (tmp_path / "logs").iterdir()
    found = {}
    for record in tf.data.TFRecordDataset([str(file)]):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    assert len(found) == 2 * (len(KEYS) - 1)
    for record in logger.history:
        for key in KEYS[1:]:
            assert found[f"traffic/{key}", record["epoch"]] == pytest.approx(record[key])


def test_log_dir_needs_tensorboard(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Argument `log_dir` needs the package `tensorboard`"):
        TrafficLogger("logs")


def test_says_once_how_each_tensor_travels(strategy, capsys):
    fit(strategy(2), TrafficLogger(), epochs=2)
    text = capsys.readouterr().out
    assert text.count("TrafficLogger: what is compressed, and how it travels") == 1
    ends = [
        "dense/kernel [64, 32]: TopK(ratio=0.1, value_dtype='float32'), all_gather",
        "dense/bias [32]: float32, dense",
        "dense_1/kernel [32, 10]: float32, dense",
        "dense_1/bias [10]: float32, dense",
    ]
    for line, end in zip(text.strip().splitlines()[1:], ends, strict=True):
        assert line.endswith(end)


def test_warns_of_an_optimizer_that_exchanges_nothing(monkeypatch, mirrored_strategy):
    said = []
    monkeypatch.setattr(absl.logging, "log_first_n", lambda *args: said.append(args))
    logger = TrafficLogger(verbose=0)
    fit(mirrored_strategy(2), logger)
    assert logger.history == []
    ((level, text, times),) = said
    assert (level, times) == (absl.logging.WARNING, 1)
    assert "the model's optimizer exchanges nothing through tfqcomm" in text
