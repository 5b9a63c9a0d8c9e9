"""Shows how sparse a model becomes, epoch by epoch."""

from __future__ import annotations

import keras

from tfqcomm.sparsity import sparse_bytes, zero_share


class SparsityLogger(keras.callbacks.Callback):
    """The share of trainable weights that are exactly zero, for optimizers with l1.

    Also puts it into the logs of `fit`, as `zero_share`: progress bar, `History`, TensorBoard.
    Give it before the callbacks that are to see it.

    Args:
        vectors: count tensors of rank <= 1, too; biases are not regularized by default.

    Attributes:
        history: one dict per epoch with
            epoch: index;
            zero_share: of all counted weights together;
            by_weight: path -> share;
            sparse_bytes: of the counted weights when only the others are kept.

    Example:
    >>> logger = SparsityLogger()
    >>> logger.history
    []
    """

    def __init__(self, *, vectors: bool = False):
        super().__init__()
        if not isinstance(vectors, bool):
            raise ValueError(f"Argument `vectors` must be a bool. Received: vectors={vectors!r}")
        self.vectors = vectors
        self.history: list[dict] = []

    def on_epoch_end(self, epoch, logs=None):
        """Adds the epoch to `history`."""
        weights = {
            weight.path: weight.numpy()
            for weight in self.model.trainable_weights
            if self.vectors or len(weight.shape) > 1
        }
        share = zero_share(weights.values())
        self.history.append(
            {
                "epoch": epoch,
                "zero_share": share,
                "by_weight": {path: zero_share([value]) for path, value in weights.items()},
                "sparse_bytes": sum(
                    sparse_bytes(int((value != 0).sum()), value.size, value.itemsize)
                    for value in weights.values()
                ),
            }
        )
        if logs is not None:
            logs["zero_share"] = share
