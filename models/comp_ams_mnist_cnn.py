"""The MNIST network of COMP-AMS."""

import keras


def comp_ams_mnist_cnn() -> keras.Model:
    """Returns the CNN of COMP-AMS for 28x28x1 images and 10 classes: 21,840 parameters, logits.

    conv5x5(10) - pool - relu - conv5x5(20) - dropout - pool - relu - fc(50) - relu - dropout -
    fc(10). As in PyTorch's MNIST example, which has the same layers, the first dropout drops whole
    feature maps, and weights and biases start uniform within 1 / sqrt(fan-in).

    References:
        Li, Karimi, Li: On Distributed Adaptive Optimization with Gradient Compression, ICLR 2022,
        Section 5, https://arxiv.org/abs/2205.05632
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(10, 5, **_uniform(25)),
            layers.MaxPooling2D(),
            layers.ReLU(),
            layers.Conv2D(20, 5, **_uniform(250)),
            layers.SpatialDropout2D(0.5),
            layers.MaxPooling2D(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(50, activation="relu", **_uniform(320)),
            layers.Dropout(0.5),
            layers.Dense(10, **_uniform(50)),
        ],
        name="comp_ams_mnist_cnn",
    )


def _uniform(fan_in: int) -> dict[str, keras.initializers.Initializer]:
    limit = fan_in**-0.5
    return {
        "kernel_initializer": keras.initializers.RandomUniform(-limit, limit),
        "bias_initializer": keras.initializers.RandomUniform(-limit, limit),
    }
