"""The small network that Leader SGD is demonstrated on."""

import keras


def leader_sgd_cnn() -> keras.Model:
    """Returns a CNN for 28x28x1 images and 10 classes: 50,006 parameters, logits.

    Three times conv3x3 - relu with stride 2, without padding, with 16, 32 and 64 filters: 28x28 to
    13x13 to 6x6 to 2x2. Then fc(100) - relu - fc(10).

    References:
        Teng et al.: Leader Stochastic Gradient Descent for Distributed Training of Deep Learning
        Models, NeurIPS 2019, https://arxiv.org/abs/1905.10395; the network is that of the authors'
        demonstration on Fashion-MNIST.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *[layers.Conv2D(n, 3, strides=2, activation="relu") for n in (16, 32, 64)],
            layers.Flatten(),
            layers.Dense(100, activation="relu"),
            layers.Dense(10),
        ],
        name="leader_sgd_cnn",
    )
