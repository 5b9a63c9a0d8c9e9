"""Wraps methods of Keras' classes, and functions of its modules, once each."""

from __future__ import annotations

import functools


def wrap(holder, name, wrapper):
    # Where it is defined: Keras asks whether `Model.compile` is still that of its base class, and
    # would not compile a model that it loads.
    owner = next(base for base in getattr(holder, "__mro__", [holder]) if name in vars(base))
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    method.wrapped_by_tfqcomm = True
    setattr(owner, name, method)


def is_wrapped(method) -> bool:
    return getattr(method, "wrapped_by_tfqcomm", False)
