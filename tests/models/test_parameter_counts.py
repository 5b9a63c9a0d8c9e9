"""Every model has the number of parameters its docstring and its paper give."""

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import models

COUNTS = {  # of trained parameters
    "character_cnn": 96 * 32 + 8 * 32 * 256 + 2 * 256 * 256 + 256 * 96,
    "comp_ams_cifar_cnn": 541_094,  # COMP-AMS, Section 5
    "comp_ams_imdb_lstm": 2000 * 32 + 4 * (32 + 64 + 1) * 64 + 65 * 64 + 65 * 2,
    "comp_ams_mnist_cnn": 21_840,  # COMP-AMS, Section 5
    "digits_cnn": 283_786,
    "leader_sgd_cnn": 50_006,  # the authors' Fashion-MNIST demonstration
    "leader_sgd_cnn7": 351_946,  # the authors' code
    "logistic_regression": 124,
    "mlp": 784 * 128 + 128 + 128 * 10 + 10,
    "resnet20": 269_722,  # 0.27M in the paper, Table 6
    "softmax_regression": 784 * 10 + 10,
    "vgg16_bn": 15_253_578,
}
TWO_CLASSES = ("comp_ams_imdb_lstm", "logistic_regression")


def test_every_model_is_counted():
    assert sorted(COUNTS) == sorted(models.__all__)


@pytest.mark.parametrize("name", models.__all__)
def test_parameter_count(name):
    build = getattr(models, name)
    model = build()
    assert sum(math.prod(v.shape) for v in model.trainable_variables) == COUNTS[name]
    assert re.search(rf"\b{COUNTS[name]:,} parameters", build.__doc__)
    texts = (None, None, 96)
    classes = (None, 2 if name in TWO_CLASSES else 10)
    assert model.output_shape == (texts if name == "character_cnn" else classes)


@pytest.mark.parametrize("name", models.__all__)
def test_saving(name, tmp_path):
    model = getattr(models, name)()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for saved, read in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(saved, read)


@pytest.mark.parametrize(("name", "count"), [("resnet20", 1_376), ("vgg16_bn", 8_448)])
def test_moving_statistics(name, count):
    build = getattr(models, name)
    assert build().count_params() - COUNTS[name] == count
    assert f"{count:,} numbers" in build.__doc__


def test_mlp_sizes():
    assert models.mlp((784,), 10, (1000, 1000)).count_params() == 1_796_010
    assert models.mlp((784,), 10, (100,)).count_params() == 79_510
    assert models.mlp((8, 8, 1), 10, ()).count_params() == 650


def test_leader_sgd_cnn7_crops_the_centre():
    model = models.leader_sgd_cnn7()
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        model(images, training=False), model(images[:, 2:30, 2:30], training=False)
    )


def test_resnet20_shortcut_is_option_a():
    model = models.resnet20()
    for variable in model.trainable_variables:  # without its convolutions a block is its shortcut
        if "batch_normalization" in variable.path and "gamma" in variable.path:
            variable.assign(np.zeros(variable.shape))
    first = keras.Model(model.input, model.layers[3].output)
    model.layers[2].gamma.assign(np.ones(16))
    last = keras.Model(model.input, model.layers[-3].output)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
    expected = np.zeros([1, 8, 8, 64])
    expected[..., 24:40] = first(images)[:, ::4, ::4]  # 16 of 64 maps, every fourth row and column
    np.testing.assert_allclose(last(images), expected, rtol=1e-5)


def test_linear_models_start_at_zero():
    for model in (models.softmax_regression(), models.logistic_regression()):
        assert all(not np.any(v) for v in model.trainable_variables)


def test_logistic_regression_is_a_softmax_of_two():
    model = models.logistic_regression(5, kernel_initializer="glorot_uniform")
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    weights, bias = (v.numpy() for v in model.trainable_variables)
    expected = 1 / (1 + np.exp(-(features @ weights + bias)))
    np.testing.assert_allclose(tf.nn.softmax(model(features))[:, 1:], expected, rtol=1e-5)


@pytest.mark.slow
def test_lstm_skips_padding():
    model = models.comp_ams_imdb_lstm()
    words = np.random.default_rng(0).integers(1, 2000, 500).astype(np.int32)
    at_end, at_start = np.zeros([2, 1, 500], np.int32)
    at_end[0, :40] = at_start[0, -40:] = words[:40]
    np.testing.assert_allclose(model(at_end), model(at_start), rtol=1e-5)


@pytest.mark.slow
def test_lstm_embeds_with_a_dense_gradient():
    model = models.comp_ams_imdb_lstm()
    words = np.full([1, 500], 3, np.int32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(words))
    gradient = tape.gradient(loss, model.trainable_variables[0].value)
    assert isinstance(gradient, tf.Tensor) and gradient.shape == (2000, 32)
    assert np.flatnonzero(np.any(gradient, axis=1)).tolist() == [3]


def test_character_cnn_sees_the_last_16_characters_and_none_to_come():
    model = models.character_cnn()
    texts = np.random.default_rng(0).integers(0, 96, [1, 40]).astype(np.int32)
    changed = texts.copy()
    changed[0, 20] = (texts[0, 20] + 1) % 96
    differs = np.any(model(texts).numpy() != model(changed).numpy(), axis=-1)[0]
    assert np.flatnonzero(differs).tolist() == [*range(20, 36)]
