"""Communication-efficient distributed training for TensorFlow and Keras 3."""

from tfqcomm.launch.start import is_launcher

if not is_launcher():
    import tfqcomm._tf_private.probe  # noqa: F401 (says what does not fit)
    from tfqcomm import (
        advise,
        callbacks,
        compressors,
        distribute,
        launch,
        optimizers,
        parameter_server,
        sparsity,
    )

__all__ = [
    "advise",
    "callbacks",
    "compressors",
    "distribute",
    "launch",
    "optimizers",
    "parameter_server",
    "sparsity",
]

__version__ = "0.1.0"
