"""What `DiLoCoTrainer` does not take of an optimizer, and of a model."""

from __future__ import annotations

import dataclasses

import keras

from tfqcomm import _tf_private
from tfqcomm.optimizers.local.diloco import DiLoCo
from tfqcomm.parameter_server import optimizers
from tfqcomm.step.options import ExchangeOptions


def check(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuses what is no DiLoCo, and those of its arguments that say what the trainer decides.

    Raises:
        ValueError: saying why, and what to use instead.
    """
    optimizer = optimizers.inner(optimizer)
    if type(optimizer) is not DiLoCo:
        raise ValueError(
            "Argument `optimizer` must be a `tfqcomm.optimizers.DiLoCo`. For other optimizers "
            "there is `tfqcomm.parameter_server.Trainer`. "
            f"Received: optimizer={type(optimizer).__name__}"
        )
    if optimizer.turns.overlap:
        raise ValueError(
            "Argument `overlap` of the optimizer must be 0: learners go on while a round is under "
            f"way, however long it takes. Received: overlap={optimizer.turns.overlap}"
        )
    if optimizer.global_weights.merge != 1:
        raise ValueError(
            "Argument `merge` of the optimizer must be 1: use `mixing` of the trainer. "
            f"Received: merge={optimizer.global_weights.merge}"
        )
    _check_inner(optimizer.inner)
    _check_exchange(optimizer.exchange_options)


def _check_inner(inner: keras.optimizers.Optimizer) -> None:
    if _tf_private.calls_for_learning_rate(inner):
        raise ValueError(
            "Argument `learning_rate` of `inner` must be a float or a "
            "`keras.optimizers.schedules.LearningRateSchedule`: workers cannot call a function of "
            f"the chief's. Received: inner={type(inner).__name__} with a callable"
        )
    if any(_tf_private.decay_exclusions(inner)):
        raise ValueError(
            "Argument `inner` must not exclude variables from weight decay yet: its config does "
            "not tell them. Exclude them of `trainer.optimizer.inner`, before `fit`. "
            f"Received: inner={type(inner).__name__} with exclusions"
        )


def _check_exchange(options: ExchangeOptions) -> None:
    if options.error_feedback is True:
        raise ValueError(
            "Argument `error_feedback` of the optimizer must be 'auto' or False, which are the "
            "same here: answers that come late are dropped, and what they owe with them. "
            "Received: error_feedback=True"
        )
    for name, taken in (("schedule", "auto"), ("granularity", "tensor")):
        value = getattr(options, name)
        if value != taken:
            raise ValueError(
                f"Argument `{name}` of the optimizer must be {taken!r} with parameter servers, "
                f"which replace collectives and hold one tensor each. Received: {name}={value!r}"
            )


def options_of(optimizer: keras.optimizers.Optimizer, elements: int) -> ExchangeOptions:
    """How answers are encoded.

    Args:
        elements: of all tensors that are compressed.

    Raises:
        ValueError: for what no server decodes by itself.
    """
    options = optimizers.inner(optimizer).exchange_options
    return optimizers.served(dataclasses.replace(options, error_feedback=False), elements)
