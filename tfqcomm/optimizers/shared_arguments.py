"""What optimizers share with Keras' own: arguments of any, and where they are registered."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from typing import Protocol, TypeVar

import keras

from tfqcomm.step.shared_arguments import exchange_texts, keyword, show


def _keras_arguments() -> dict[str, inspect.Parameter]:
    """Those of `keras.optimizers.Optimizer`, of whatever version, but for the learning rate.

    Its own constructor passes everything on to a base class, which Keras does not export.
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in reversed(keras.optimizers.Optimizer.__mro__):
        if "__init__" in vars(owner) and owner is not object:
            found |= inspect.signature(owner.__init__).parameters
    return {
        name: keyword(name, parameter.default)
        for name, parameter in found.items()
        if parameter.default is not parameter.empty and name != "learning_rate"
    }


KERAS_ARGUMENTS = _keras_arguments()


class _Shares(Protocol):
    @classmethod
    def shared_arguments(cls) -> Mapping[str, inspect.Parameter]: ...


Optimizer = TypeVar("Optimizer", bound=_Shares)


def shown(optimizer: type[Optimizer]) -> type[Optimizer]:
    """Decorates an optimizer whose `**options` are to be written out: see `show`."""
    shared = optimizer.shared_arguments()
    names = [name for name in KERAS_ARGUMENTS if name != "name" and name in shared]
    of_keras = textwrap.fill(
        f"{', '.join(names)}: as of `keras.optimizers.Optimizer`.",
        width=96,
        subsequent_indent=" " * 8,
    )
    show(optimizer, shared, exchange_texts(), of_keras if names else "")
    return optimizer


def register(optimizer: type[Optimizer]) -> type[Optimizer]:
    """Decorates an optimizer of this package: makes it known to Keras, and its arguments to all."""
    return keras.saving.register_keras_serializable(package="tfqcomm")(shown(optimizer))
