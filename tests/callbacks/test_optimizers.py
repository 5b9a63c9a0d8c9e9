"""Which optimizers of a model the callbacks see, and in what order, which names their backups."""

import keras

from tfqcomm._tf_private import optimizers_of


class Several(keras.Model):
    """Holds optimizers in every way there is."""

    def __init__(self, make):
        super().__init__()
        self.in_list = [make(), {"deeper": make()}]
        self.attribute = make()
        self.scaled = keras.optimizers.LossScaleOptimizer(make())
        self.same = self.attribute


def test_optimizers_in_containers_are_found_behind_those_found_ever_since():
    made = []

    def make():
        made.append(keras.optimizers.SGD())
        return made[-1]

    model = Several(make)
    compiled = keras.optimizers.SGD()
    model.compile(compiled)
    first, deeper, attribute, inner = made
    assert optimizers_of(model) == [compiled, attribute, inner, first, deeper]


def test_a_model_that_is_not_compiled_has_none():
    assert optimizers_of(keras.Sequential([keras.layers.Dense(1)])) == []
