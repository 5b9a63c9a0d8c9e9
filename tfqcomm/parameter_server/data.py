"""The data of each worker, and of the validation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import keras
import tensorflow as tf


def datasets(dataset_fn: Callable[..., tf.data.Dataset], workers: int) -> list[Callable]:
    """For each worker a function that makes its dataset.

    Args:
        dataset_fn: takes a `tf.distribute.InputContext`, or nothing.

    Raises:
        ValueError: for anything else.
    """
    if not callable(dataset_fn):
        raise ValueError(
            "Argument `dataset_fn` must be a function that returns a batched tf.data.Dataset: "
            f"every worker makes its own. Received: dataset_fn={dataset_fn!r}"
        )
    if not inspect.signature(dataset_fn).parameters:
        return [dataset_fn] * workers
    return [
        functools.partial(dataset_fn, tf.distribute.InputContext(workers, index, workers))
        for index in range(workers)
    ]


def inspect_dataset(dataset_fn: Callable) -> tuple[object, int | None]:
    """The spec of its batches, and how many there are if that is known."""
    dataset = dataset_fn()
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "Argument `dataset_fn` must return a batched tf.data.Dataset. "
            f"Received: {type(dataset).__name__}"
        )
    length = int(dataset.cardinality())
    return dataset.element_spec, length if length > 0 else None


def endless(dataset_fn: Callable) -> tf.data.Dataset:
    """What a worker reads: again and again, and ahead."""
    return dataset_fn().repeat().prefetch(tf.data.AUTOTUNE)


def steps_of_epoch(steps_per_epoch: int | None, length: int | None) -> int:
    """How many rounds an epoch has.

    Raises:
        ValueError: if nobody says.
    """
    steps = length if steps_per_epoch is None else steps_per_epoch
    if type(steps) is not int or steps < 1:
        raise ValueError(
            "Argument `steps_per_epoch` must be a positive integer, or None with a dataset of "
            f"known length. Received: steps_per_epoch={steps_per_epoch!r}, length={length}"
        )
    return steps


def validate(model: keras.Model, validation_data, validation_steps) -> dict[str, float]:
    """What `evaluate` says, as `fit` shows it."""
    is_pair = isinstance(validation_data, (tuple, list))
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        validation_data if is_pair else (validation_data,)
    )
    values = model.evaluate(
        x,
        y,
        sample_weight=sample_weight,
        steps=validation_steps,
        verbose=0,
        return_dict=True,
    )
    return {f"val_{name}": value for name, value in values.items()}
