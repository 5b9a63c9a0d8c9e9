"""By what workers multiply losses, so that small gradients do not vanish in float16."""

from __future__ import annotations

import keras


class LossScale:
    """The scale of an optimizer, kept by the chief: all workers are told the same.

    Keras' rule: halved when a gradient is not finite, a step that is skipped; doubled after
    `dynamic_growth_steps` steps. Of several workers that meet the same overflow, one halves it.

    Args:
        optimizer: a `LossScaleOptimizer`; or one with a `loss_scale_factor`, which stays.

    Attributes:
        value: the scale; None if losses are not scaled.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer):
        dynamic = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._optimizer = optimizer if dynamic else None
        self.value: float | None = optimizer.loss_scale_factor
        self._steps = 0
        self.load()

    def load(self) -> None:
        """Takes what the optimizer's variables say, which may have been restored."""
        if self._optimizer is not None:
            self.value = float(self._optimizer.dynamic_scale.numpy())
            self._steps = int(self._optimizer.step_counter.numpy())

    def store(self) -> None:
        """Puts it into the optimizer's variables, where a backup finds it."""
        if self._optimizer is not None:
            self._optimizer.dynamic_scale.assign(self.value)
            self._optimizer.step_counter.assign(self._steps)

    def note(self, healthy: bool, used: float | None) -> None:
        """After a step, or one that was skipped.

        Args:
            used: the scale of that step, which may have been changed since.
        """
        if self._optimizer is None or self.value is None or used is None:
            return
        if not healthy:
            self._steps = 0
            self.value = min(self.value, used / 2)
        elif self._steps == self._optimizer.dynamic_growth_steps - 1:
            self._steps = 0
            self.value *= 2.0
        else:
            self._steps += 1
