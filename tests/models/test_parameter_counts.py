"""Every model has the number of parameters its docstring and its paper give."""

import re

import numpy as np
import pytest

import models

COUNTS = {
    "comp_ams_cifar_cnn": 541_094,  # COMP-AMS, Section 5
    "comp_ams_mnist_cnn": 21_840,  # COMP-AMS, Section 5
    "digits_cnn": 283_786,
    "leader_sgd_cnn": 50_006,  # the authors' Fashion-MNIST demonstration
    "leader_sgd_cnn7": 351_946,  # the authors' code
    "mlp": 784 * 128 + 128 + 128 * 10 + 10,
}


def test_every_model_is_counted():
    assert sorted(COUNTS) == sorted(models.__all__)


@pytest.mark.parametrize("name", models.__all__)
def test_parameter_count(name):
    build = getattr(models, name)
    model = build()
    assert model.count_params() == COUNTS[name]
    assert re.search(rf"\b{COUNTS[name]:,} parameters", build.__doc__)
    assert model.output_shape == (None, 10)


def test_mlp_sizes():
    assert models.mlp((784,), 10, (1000, 1000)).count_params() == 1_796_010
    assert models.mlp((8, 8, 1), 10, ()).count_params() == 650


def test_leader_sgd_cnn7_crops_the_centre():
    model = models.leader_sgd_cnn7()
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        model(images, training=False), model(images[:, 2:30, 2:30], training=False)
    )
