"""The optimizers of a model, as callbacks see them."""

from __future__ import annotations

from tfqcomm._tf_private import optimizers_of

__all__ = ["optimizers_of"]
