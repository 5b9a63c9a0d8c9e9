"""A model's step is timed, and the model is as before."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.advise import compute


def perceptron(**compiled):
    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(5), keras.layers.BatchNormalization()]
    )
    if compiled:
        model.compile(**compiled)
    return model


def labelled():
    model = perceptron(
        optimizer=keras.optimizers.Adam(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    random = np.random.RandomState(0)
    return model, random.randn(40, 6).astype("float32"), random.randint(0, 5, 40)


def test_gradients_are_those_of_the_compiled_loss_and_nothing_has_changed():
    model, x, y = labelled()
    before = [v.numpy() for v in model.variables]
    times, gradients = compute.measure(compute.prepare(model, x, y, 32), 0.0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert int(model.optimizer.iterations) == 0
    assert not any(np.any(v.numpy()) for v in model.optimizer.variables[2:])

    assert times.seconds > 0 and min(times.forward, times.backward, times.update) >= 0
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=y[:32], y_pred=model(x[:32], training=True))
    expected = tape.gradient(loss, [v.value for v in model.trainable_variables])
    for found, gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-6)


def test_data_sets_come_in_batches_of_their_own():
    model, x, y = labelled()
    step = compute.prepare(model, tf.data.Dataset.from_tensor_slices((x, y)).batch(7))
    assert step.x.shape == [7, 6] and step.y.shape == [7]


def test_what_is_missing_is_made_up():
    step = compute.prepare(perceptron(), batch_size=9)
    assert step.x.shape == [9, 6] and np.std(step.x) > 0.5 and step.y is None
    _, gradients = compute.measure(step, 0.0)
    assert [g.shape for g in gradients] == [v.shape for v in step.model.trainable_variables]


def test_rows_of_embeddings_stay_rows():
    words = keras.Sequential([keras.Input([4], dtype="int32"), keras.layers.Embedding(20, 3)])
    _, gradients = compute.measure(compute.prepare(words), 0.0)
    assert isinstance(gradients[0], tf.IndexedSlices)


@pytest.mark.parametrize(
    "model",
    [keras.Sequential([keras.layers.Dense(3)]), keras.Sequential([keras.Input([None, 3])])],
)
def test_inputs_of_unknown_shape_need_examples(model):
    with pytest.raises(ValueError, match="Argument `x` must be given .* Received: x=None"):
        compute.prepare(model)
