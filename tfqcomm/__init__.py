"""Communication-efficient distributed training for TensorFlow and Keras 3."""

from tfqcomm import callbacks, compressors, distribute, optimizers

__all__ = ["callbacks", "compressors", "distribute", "optimizers"]

__version__ = "0.1.0"
