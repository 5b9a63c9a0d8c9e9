"""The callbacks of a `fit`, as Keras' own makes them of what a user gives."""

from __future__ import annotations

from collections.abc import Sequence

import keras


def callback_list(
    callbacks: Sequence[keras.callbacks.Callback],
    model: keras.Model,
    *,
    epochs: int,
    steps: int,
    verbose: int | str,
) -> keras.callbacks.CallbackList:
    """The user's, with a `History` and, unless `verbose` is 0, a progress bar."""
    return keras.callbacks.CallbackList(
        list(callbacks),
        add_history=True,
        add_progbar=verbose != 0,
        verbose=1 if verbose == "auto" else verbose,
        epochs=epochs,
        steps=steps,
        model=model,
    )
