"""Which optimizers have a lazy meaning: a step that leaves rows alone that no batch has touched.

What differs from the dense step, with everything an optimizer keeps of a row kept as a row:

SGD                      without momentum nothing; with it, momenta of other rows rest
Adagrad, QCMDAdagrad     nothing without l1: a gradient of zero changes nothing; l1 acts on the
                         rows of a step
Adam, AdamW, CompAMS     moments of other rows do not decay, and do not move them; biases are
                         corrected by the optimizer's iterations, as in TensorFlow's `LazyAdam`
RMSprop                  means of other rows do not decay
QAdam                    likewise, in each worker's own moments, which for rows live on the
                         servers; "1-1/t" counts the worker's steps with a row
QRDAAdagrad              t counts the steps of a row; its center is what the row was before them

Weight decay acts on the rows of a step. Others see norms, signs of momenta or averages of whole
variables, or move all of a variable at every step.
"""

from __future__ import annotations

import keras

from tfqcomm.parameter_server.optimizers import inner

_OF_KERAS = ("SGD", "Adagrad", "Adam", "AdamW", "RMSprop")
LAZY = (*_OF_KERAS, "CompAMS", "QAdam", "QCMDAdagrad", "QRDAAdagrad")


def check(optimizer: keras.optimizers.Optimizer, table: str, way_out: str) -> None:
    """Refuses optimizers without a lazy meaning.

    Args:
        optimizer: of the model.
        table: its name.
        way_out: what to do about it.

    Raises:
        ValueError: saying what to do.
    """
    optimizer = inner(optimizer)
    name = type(optimizer).__name__
    if name not in LAZY:
        raise ValueError(
            f"Argument `optimizer` must be one of {', '.join(LAZY)} where only the rows of a batch "
            f"travel, as those of {table}: a step of {name} moves rows that the batch does not "
            f"touch. {way_out} Received: optimizer={name}"
        )
    codec = getattr(optimizer, "weight_compressor", None)
    if codec is not None and not codec.lossless:
        raise ValueError(
            "Argument `weight_compressor` of the optimizer must be None where only the rows of a "
            f"batch travel, as those of {table}: what it leaves out of a weight depends on the "
            f"whole table. Use the trainer's `weight_compressor` and `row_codec`. {way_out} "
            f"Received: weight_compressor={codec}"
        )
