"""The optimizers of a model: the compiled one, and those it holds beside it."""

from __future__ import annotations

from tfqcomm._tf_private import optimizers_of

__all__ = ["optimizers_of"]
