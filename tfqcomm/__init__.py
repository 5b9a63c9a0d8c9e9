"""Communication-efficient distributed training for TensorFlow and Keras 3."""

from tfqcomm import callbacks, compressors, distribute, optimizers, sparsity

__all__ = ["callbacks", "compressors", "distribute", "optimizers", "sparsity"]

__version__ = "0.1.0"
