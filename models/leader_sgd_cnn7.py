"""The 7-layer CIFAR-10 network of EASGD and Leader SGD."""

import keras


def leader_sgd_cnn7() -> keras.Model:
    """Returns a CNN for 28x28x3 crops and 10 classes: 351,946 parameters, logits.

    conv5x5(64) - relu - pool - conv5x5(128) - relu - pool - conv3x3(64) - relu - fc(256) -
    dropout - fc(10), all convolutions without padding: 28x28 to 12x12 to 4x4 to 2x2. As in the
    authors' code nothing but dropout is between the last two layers. Larger images are cropped to
    their centre, so that 32x32 test images and random crops of training images both fit.

    References:
        Teng et al.: Leader Stochastic Gradient Descent for Distributed Training of Deep Learning
        Models, NeurIPS 2019, https://arxiv.org/abs/1905.10395
        Zhang, Choromanska, LeCun: Deep Learning with Elastic Averaging SGD, NeurIPS 2015,
        Section 5.1, https://arxiv.org/abs/1412.6651
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.CenterCrop(28, 28),
            layers.Conv2D(64, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(128, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(256),
            layers.Dropout(0.5),
            layers.Dense(10),
        ],
        name="leader_sgd_cnn7",
    )
