"""A small convolutional network for scikit-learn's 8x8 digits."""

import keras


def digits_cnn() -> keras.Model:
    """Returns a CNN for 8x8x1 images and 10 classes: 283,786 parameters, logits.

    conv3x3(32) - relu - conv3x3(64) - relu - pool - fc(256) - relu - dropout - fc(10): LeNet's plan
    at the size of the data. As in most networks three tensors hold over 99% of the parameters.

    References:
        Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998), Section II.
    """
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dropout(0.25),
            layers.Dense(10),
        ],
        name="digits_cnn",
    )
