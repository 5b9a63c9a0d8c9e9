"""The CIFAR-10 network of COMP-AMS."""

import keras


def comp_ams_cifar_cnn() -> keras.Model:
    """Returns the CNN of COMP-AMS for 32x32x3 images and 10 classes: 541,094 parameters, logits.

    Three times conv3x3 - relu - pool with 16, 32 and 64 filters, then fc(500) - relu - dropout -
    fc(10).

    References:
        Li, Karimi, Li: On Distributed Adaptive Optimization with Gradient Compression, ICLR 2022,
        Section 5, https://arxiv.org/abs/2205.05632
    """
    layers = keras.layers
    blocks = [
        layer
        for filters in (16, 32, 64)
        for layer in (
            layers.Conv2D(filters, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
        )
    ]
    head = [
        layers.Flatten(),
        layers.Dense(500, activation="relu"),
        layers.Dropout(0.5),
        layers.Dense(10),
    ]
    return keras.Sequential([keras.Input((32, 32, 3)), *blocks, *head], name="comp_ams_cifar_cnn")
