"""A value of a graph in a variable's place: what Keras' optimizers work on where rows vary."""

from __future__ import annotations

import keras
import tensorflow as tf


class WorkingValue:
    """What an optimizer assigns to while a step is traced, of any shape.

    A `tf.Variable` of unknown shape would do as well, but not on another task: TensorFlow aborts
    the task that is told of one.

    Attributes:
        tensor: the present value.
    """

    def __init__(self, variable: tf.Variable):
        self.tensor = variable.read_value()
        self._unique_id = variable._unique_id  # by which optimizers know variables

    @property
    def dtype(self) -> tf.DType:
        """Of the value."""
        return self.tensor.dtype

    @property
    def shape(self) -> tf.TensorShape:
        """Of the value."""
        return self.tensor.shape

    def assign(self, value) -> None:
        """Puts `value` in the present one's place, as a `tf.Variable` would."""
        self.tensor = tf.convert_to_tensor(value, self.dtype)

    def assign_add(self, value) -> None:
        """Adds `value` to the present one."""
        self.tensor = self.tensor + value

    def assign_sub(self, value) -> None:
        """Subtracts `value` from the present one."""
        self.tensor = self.tensor - value

    def __mul__(self, other):
        return self.tensor * other

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.tensor, dtype=dtype, name=name)


def work_on_values(variable: keras.Variable) -> WorkingValue:
    """Gives a variable a value of graphs in place of its own.

    What looks at the variable's shape, such as Keras' `assign`, still sees the one it was made
    with; an optimizer's `update_step` does not look.
    """
    variable._value = WorkingValue(variable._value)
    return variable._value
