"""The papers' algorithms as Keras optimizers."""

from tfqcomm.optimizers.comp_ams import CompAMS

__all__ = ["CompAMS"]
