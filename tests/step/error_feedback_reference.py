"""Error feedback in NumPy, one tensor at a time: what options of a step are held against."""

import numpy as np


def means_of_messages(codecs, gradients, rates=None):
    """The means of what W workers send, by step.

    target = g + e; message = C(target); e = target - message (Karimireddy et al., arXiv 1901.09847,
    algorithm 2). With `rates`, e is multiplied by the old rate over the new one before.

    Args:
        codecs: for each variable a compressor; None sends everything.
        gradients: for each variable [steps, W, ...].
        rates: the learning rate of each step; None leaves e as it is.

    Returns:
        For each variable [steps, ...].
    """
    return [
        _means(codec, values, rates) if codec else values.mean(axis=1, dtype=np.float32)
        for codec, values in zip(codecs, gradients, strict=True)
    ]


def _means(codec, gradients, rates):
    steps, world, *shape = gradients.shape
    owed = np.zeros([world, int(np.prod(shape))], np.float32)
    means = []
    for step in range(steps):
        if rates is not None and step:
            owed *= np.float32(rates[step - 1]) / np.float32(rates[step])
        target = gradients[step].reshape(world, -1) + owed
        sent = np.stack([codec.decode(codec.encode(row), len(row)).numpy() for row in target])
        owed = target - sent
        means.append(sent.mean(axis=0, dtype=np.float32).reshape(shape))
    return np.stack(means)


def sgd(start, means, rates):
    """The variable after each step: [steps, ...]."""
    moves = means * np.asarray(rates, np.float32).reshape(-1, *[1] * (means.ndim - 1))
    return start - np.cumsum(moves, axis=0, dtype=np.float32)
