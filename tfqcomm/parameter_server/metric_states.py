"""The states of all metrics of a model in one vector, and how those of several workers combine.

Most metrics are sums over batches, a few are maxima; what a custom metric is says its graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.flat import flat_values, join, split_like

_UNCHANGED_BY = {"Identity", "Cast", "Reshape", "EnsureShape", "StopGradient", "PreventGradient"}
_COMBINED_BY = {
    "Add": "sum",
    "AddV2": "sum",
    "AddN": "sum",
    "Sub": "sum",
    "Maximum": "maximum",
    "Minimum": "minimum",
}


class MetricStates:
    """All states of a model's metrics, float64, in the order of its `metrics_variables`.

    Args:
        model: built; its metrics are as at the beginning of an epoch.

    Attributes:
        variables: the metrics'.
        initial: their states at the beginning of an epoch, float64[m].
    """

    def __init__(self, model: keras.Model):
        self.variables = list(model.metrics_variables)
        self.initial = flat_values(self.variables, np.float64)
        # How each one combines; None if its graph does not say. Known once a step was traced.
        self._kinds: list[str | None] = ["sum"] * len(self.variables)

    def mapping(self, states: tf.Tensor) -> list[tuple[keras.Variable, tf.Tensor]]:
        """For a `keras.StatelessScope` in which the metrics have these states."""
        return list(zip(self.variables, split_like(states, self.variables), strict=True))

    def collect(self, scope: keras.StatelessScope, mapping) -> tf.Tensor:
        """The states after a step in a scope that began with `mapping`."""
        self._kinds = [
            _combination(before, tf.convert_to_tensor(scope.get_current_value(variable)))
            for variable, before in mapping
        ]
        return join(self.variables, scope, tf.float64)

    def check(self, workers: int) -> None:
        """Refuses metrics of which several workers cannot say a common result.

        Raises:
            ValueError: naming the state.
        """
        pairs = zip(self.variables, self._kinds, strict=True)
        unknown = [variable.path for variable, kind in pairs if kind is None]
        if workers > 1 and unknown:
            raise ValueError(
                "A metric must add to its states, or take a maximum or minimum with them, so that "
                "those of several workers can be brought together: `state.assign(state + x)`. "
                f"Received: {', '.join(unknown)}, with workers={workers}"
            )

    def merge(self, states: Sequence[np.ndarray]) -> np.ndarray:
        """What one worker would have that had seen the batches of all.

        Args:
            states: float64[m] of each, all begun with `initial`.
        """
        stacked, merged, start = np.stack(states), [], 0
        for variable, kind in zip(self.variables, self._kinds, strict=True):
            place = slice(start, start := start + int(np.prod(variable.shape)))
            merged.append(_MERGED[kind](stacked[:, place], self.initial[place]))
        return np.concatenate([self.initial[:0], *merged])


_MERGED = {
    "sum": lambda states, initial: initial + (states - initial).sum(0),
    "maximum": lambda states, initial: states.max(0),
    "minimum": lambda states, initial: states.min(0),
    None: lambda states, initial: states[-1],  # of one worker, which may have been started anew
}


def _combination(before: tf.Tensor, after: tf.Tensor) -> str | None:
    """How `after` was made of `before`: "sum" also if it was not; None for in no such way."""
    depends = _dependents(before)
    found = set()
    while after.name != before.name:
        if after.name not in depends:
            return None  # the state of the last batch alone
        operation = after.op
        places = [i for i, x in enumerate(operation.inputs) if x.name in depends]
        if len(places) != 1 or (operation.type == "Sub" and places != [0]):
            return None
        if operation.type in _COMBINED_BY:
            found.add(_COMBINED_BY[operation.type])
        elif operation.type not in _UNCHANGED_BY:
            return None
        after = operation.inputs[places[0]]
    return None if len(found) > 1 else "".join(found) or "sum"


def _dependents(before: tf.Tensor) -> set[str]:
    """The names of all tensors that are computed from `before`, and its own."""
    found, waiting = {before.name}, [before]
    while waiting:
        for operation in waiting.pop().consumers():
            new = [x for x in operation.outputs if x.name not in found]
            found |= {x.name for x in new}
            waiting += new
    return found
