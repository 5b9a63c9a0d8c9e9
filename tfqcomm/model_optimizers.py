"""The optimizers of a model: the compiled one, and those it holds beside it."""

from __future__ import annotations

import keras


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The compiled optimizer, then those a custom model holds (a GAN's, twin critics').

    A `LossScaleOptimizer` exchanges nothing itself: the one inside is returned.
    """
    optimizers = [
        getattr(value, "inner_optimizer", value)
        for value in (model.optimizer, *vars(model).values())
        if isinstance(value, keras.optimizers.Optimizer)
    ]
    return list({id(o): o for o in optimizers}.values())
