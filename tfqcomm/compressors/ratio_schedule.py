"""A share of entries that changes from exchange to exchange, as a Keras schedule says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from tfqcomm import checks

Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule


def is_schedule(value) -> bool:
    """Whether it is one of Keras' schedules."""
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


@dataclasses.dataclass(frozen=True)
class RatioSchedule:
    """A schedule that is equal to any other of the same configuration, as compressors must be.

    Attributes:
        config: in Keras' own format, as JSON.
    """

    config: str

    @classmethod
    def of(cls, schedule: Schedule | Mapping[str, Any]) -> RatioSchedule:
        """Takes a schedule, or its configuration.

        It is not asked for a share yet: that would start TensorFlow, before workers have joined.

        Raises:
            ValueError: if it is none that can be saved.
        """
        try:
            if is_schedule(schedule):
                schedule = keras.optimizers.schedules.serialize(schedule)
            made = cls(json.dumps(schedule, sort_keys=True))
            made.make()
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                "Argument `budget` must be a schedule that Keras can save and load: with a "
                "`get_config`, and registered by `keras.saving.register_keras_serializable`. "
                f"Received: budget={schedule!r} ({error})"
            ) from error
        return made

    def at(self, step) -> tf.Tensor:
        """The share of the exchange with this number: float32 scalar."""
        return tf.cast(self.make()(step), tf.float32)

    @property
    def first(self) -> float:
        """The share that it begins with; now, not when a graph that is being traced runs.

        Raises:
            ValueError: if it is no ratio.
        """
        with tf.init_scope():
            return checks.ratio(float(self.at(0)), "budget(0)")

    def make(self):
        """The schedule itself, made anew."""
        return keras.optimizers.schedules.deserialize(self.get_config())

    def get_config(self) -> dict[str, Any]:
        """The schedule's configuration."""
        return json.loads(self.config)

    def __repr__(self):
        config = self.get_config()
        arguments = ", ".join(f"{k}={v!r}" for k, v in config["config"].items() if v is not None)
        return f"{config['class_name']}({arguments})"
