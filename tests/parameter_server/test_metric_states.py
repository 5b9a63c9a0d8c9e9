"""How the states of several workers' metrics combine is read from their graphs."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.metric_states import MetricStates

ARGUMENTS = [  # the first that a class takes
    {},
    {"num_classes": 2},
    {"num_classes": 2, "target_class_ids": [0]},
    {"recall": 0.5},
    {"precision": 0.5},
    {"sensitivity": 0.5},
    {"specificity": 0.5},
    {"fn": keras.losses.mean_squared_error},
    {"normalizer": [1.0, 1.0]},
]


def keras_metrics() -> dict[str, type]:
    found = {name: getattr(keras.metrics, name) for name in dir(keras.metrics)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type)
        and issubclass(value, keras.metrics.Metric)
        and value is not keras.metrics.Metric
    }


def make(cls: type) -> keras.metrics.Metric:
    for arguments in ARGUMENTS:
        try:
            return cls(**arguments)
        except TypeError:
            continue
    raise AssertionError(f"no arguments for {cls}")


def targets(name: str) -> tuple[np.ndarray, ...]:
    """What `update_state` takes: a few metrics want classes, or values alone."""
    if name in ("Mean", "Sum"):
        return (np.float32([[1, 0], [0, 1]]),)
    if name.startswith("Sparse"):
        return np.int32([1, 0]), np.float32([[0.2, 0.8], [0.6, 0.4]])
    if name in ("BinaryIoU", "IoU", "MeanIoU"):
        return np.int32([1, 0]), np.int32([1, 1])
    return np.float32([[1, 0], [0, 1]]), np.float32([[0.2, 0.8], [0.6, 0.4]])


def states_after(metric, *arguments) -> tuple[MetricStates, np.ndarray]:
    """The states after one update, as a worker's graph computes them."""
    metric.update_state(*arguments)  # some make their variables now
    metric.reset_state()
    states = MetricStates(types.SimpleNamespace(metrics_variables=metric.variables))

    @tf.function(autograph=False)
    def update(vector):
        mapping = states.mapping(vector)
        with keras.StatelessScope(mapping) as scope:
            metric.update_state(*arguments)
        return states.collect(scope, mapping)

    return states, update(states.initial).numpy()


@pytest.mark.parametrize("name", keras_metrics())
def test_two_workers_say_of_kerases_metrics_what_one_would_say(name):
    metric, arguments = make(keras_metrics()[name]), targets(name)
    states, after = states_after(metric, *arguments)
    states.check(workers=2)
    merged = states.merge([after, after])
    metric.update_state(*arguments)
    metric.update_state(*arguments)
    expected = [np.ravel(v.numpy()) for v in metric.variables]
    np.testing.assert_allclose(merged, np.concatenate(expected), rtol=1e-6)


class Custom(keras.metrics.Metric):
    """Its state begins with 2, and becomes what a function makes of it and of 5."""

    def __init__(self, function):
        super().__init__(name="custom")
        self._function = function
        self.value = self.add_variable([], keras.initializers.Constant(2.0), name="value")

    def reset_state(self):
        self.value.assign(2.0)

    def update_state(self, x):
        self.value.assign(self._function(tf.convert_to_tensor(self.value), x))


@pytest.mark.parametrize(
    ("function", "merged"),
    [
        (lambda old, x: old + x, 12.0),
        (lambda old, x: x + tf.cast(tf.reshape(old, [1]), tf.float32)[0] * 1, None),
        (lambda old, x: old - x, -8.0),
        (lambda old, x: x - old, None),
        (tf.maximum, 5.0),
        (tf.minimum, 2.0),
        (lambda old, x: tf.maximum(old + x, x), None),
        (lambda old, x: x, None),
        (lambda old, x: old, 2.0),
        (lambda old, x: 0.9 * old + x, None),
        (lambda old, x: old + old, None),
    ],
)
def test_states_are_summed_only_if_they_are_sums(function, merged):
    states, after = states_after(Custom(function), tf.constant(5.0))
    if merged is None:
        with pytest.raises(ValueError, match="must add to its states.*custom/value"):
            states.check(workers=2)
        states.check(workers=1)
        assert states.merge([states.initial, after]) == after
    else:
        states.check(workers=2)
        assert states.merge([after, after]) == merged
