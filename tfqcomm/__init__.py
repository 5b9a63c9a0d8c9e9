"""Communication-efficient distributed training for TensorFlow and Keras 3."""

from tfqcomm._start import is_launcher

if not is_launcher():
    from tfqcomm import (
        callbacks,
        compressors,
        distribute,
        launch,
        optimizers,
        parameter_server,
        sparsity,
    )

__all__ = [
    "callbacks",
    "compressors",
    "distribute",
    "launch",
    "optimizers",
    "parameter_server",
    "sparsity",
]

__version__ = "0.1.0"
