"""The 20-layer residual network for CIFAR-10."""

from __future__ import annotations

import keras


def resnet20(num_classes: int = 10) -> keras.Model:
    """Returns ResNet-20 for 32x32x3 images: 269,722 parameters for 10 classes, logits.

    conv3x3(16), three stages of three residual blocks with 16, 32 and 64 filters, the mean over
    each feature map, fc. Shortcuts are the paper's option A: where the shape changes, every second
    row and column and zeros for the new filters, without parameters. The moving statistics of
    batch normalization, another 1,376 numbers, are not trained.

    Args:
        num_classes: Number of logits.

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, Section 4.2,
        https://arxiv.org/abs/1512.03385
    """
    layers = keras.layers
    images = keras.Input((32, 32, 3))
    x = layers.ReLU()(_normalised_conv(images, 16, 1))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        x = _block(x, filters, strides)
        x = _block(x, filters, 1)
        x = _block(x, filters, 1)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(num_classes)(x), name="resnet20")


def _block(x, filters: int, strides: int):
    relu = keras.layers.ReLU()
    residual = _normalised_conv(relu(_normalised_conv(x, filters, strides)), filters, 1)
    return keras.layers.ReLU()(residual + _shortcut(x, filters, strides))


def _shortcut(x, filters: int, strides: int):
    if strides == 1:
        return x
    new = (filters - x.shape[-1]) // 2
    return keras.ops.pad(x[:, ::strides, ::strides], [[0, 0], [0, 0], [0, 0], [new, new]])


def _normalised_conv(x, filters: int, strides: int):
    x = keras.layers.Conv2D(
        filters,
        3,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)
    return keras.layers.BatchNormalization()(x)
