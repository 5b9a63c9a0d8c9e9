"""VGG-16 with batch normalization, for CIFAR-10."""

from __future__ import annotations

import keras

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16_bn(num_classes: int = 10) -> keras.Model:
    """Returns VGG-16 for 32x32x3 images: 15,253,578 parameters for 10 classes, logits.

    Configuration D of the paper, with batch normalization after each of the 13 convolutions. Five
    poolings leave 1x1x512 of an image of 32x32, so the two hidden layers have 512 units instead of
    4096, each behind a dropout. The moving statistics, another 8,448 numbers, are not trained.

    Args:
        num_classes: Number of logits.

    References:
        Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition,
        ICLR 2015, Table 1, https://arxiv.org/abs/1409.1556
    """
    layers = keras.layers
    blocks = [
        layer
        for filters_of_stage in STAGES
        for layer in (
            *[layer for filters in filters_of_stage for layer in _normalised_conv(filters)],
            layers.MaxPooling2D(),
        )
    ]
    head = [
        layers.Flatten(),
        layers.Dropout(0.5),
        layers.Dense(512, activation="relu"),
        layers.Dropout(0.5),
        layers.Dense(512, activation="relu"),
        layers.Dense(num_classes),
    ]
    return keras.Sequential([keras.Input((32, 32, 3)), *blocks, *head], name="vgg16_bn")


def _normalised_conv(filters: int) -> list[keras.Layer]:
    return [
        keras.layers.Conv2D(filters, 3, padding="same", kernel_initializer="he_normal"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
    ]
