"""Compressors by name and by configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tfqcomm.compressors.base import Compressor

_CLASSES: dict[str, type[Compressor]] = {}  # by name, in order of registration


def register(name: str) -> Callable[[type[Compressor]], type[Compressor]]:
    """Class decorator: makes a compressor known to `get` by name and to Keras' serialization."""

    def decorate(cls: type[Compressor]) -> type[Compressor]:
        _CLASSES[name] = keras.saving.register_keras_serializable(package="tfqcomm")(cls)
        return cls

    return decorate


def names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_CLASSES)


def get(identifier) -> Compressor:
    """The compressor that `identifier` stands for.

    Args:
        identifier: None (`Identity()`: nothing is compressed), a name such as `"top_k"` (the
            class with its defaults), a configuration as `serialize` returns it, or a compressor.

    Raises:
        ValueError: If it is none of these; the message lists the names.
    """
    if isinstance(identifier, Compressor):
        return identifier
    if identifier is None:
        identifier = "identity"
    if isinstance(identifier, dict):
        return deserialize(identifier)
    if isinstance(identifier, str) and identifier in _CLASSES:
        return _CLASSES[identifier]()
    raise ValueError(
        "Argument `compressor` must be None, a `tfqcomm.compressors.Compressor`, its "
        f"configuration, or one of the names {list(_CLASSES)}. Received: compressor={identifier!r}"
    )


def serialize(compressor: Compressor) -> dict[str, Any]:
    """A JSON-compatible configuration, in Keras' own format."""
    return keras.saving.serialize_keras_object(compressor)


def deserialize(config: dict[str, Any]) -> Compressor:
    """Inverse of `serialize`; `{"class_name": "TopK", "config": {"ratio": 0.1}}` is enough."""
    own = {cls.__name__: cls for cls in _CLASSES.values()}
    if "module" not in config and config.get("class_name") in own:
        return own[config["class_name"]].from_config(config.get("config", {}))
    try:
        compressor = keras.saving.deserialize_keras_object(config)
    except TypeError:  # Keras knows no such class
        compressor = None
    if not isinstance(compressor, Compressor):
        raise ValueError(
            f"Argument `config` must describe one of the compressors {list(own)}. "
            f"Received: config={config}"
        )
    return compressor
