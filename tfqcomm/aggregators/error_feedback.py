"""Error feedback: what compression left out of a message is added to the next one.

The residual of a message belongs to one replica and one tensor and starts at zero:

    words = encode(message + residual);  residual = message + residual - decode(words)

so the sum of all decoded messages plus the residual is the sum of all messages (Seide et al.,
2014; Karimireddy et al., arXiv 1901.09847).
"""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.compressors.base import Compressor


def encode_with_feedback(
    compressor: Compressor, message: tf.Tensor, residual: tf.Tensor | None, seed
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Encodes `message` plus what is owed from before.

    Args:
        message: float32[n].
        residual: float32[n], or None for no error feedback.

    Returns:
        int32[w] words and the new residual (None without error feedback).
    """
    if residual is None:
        return compressor.encode(message, seed), None
    target = message + residual
    words = compressor.encode(target, seed)
    return words, target - compressor.decode(words, message.shape[0])
