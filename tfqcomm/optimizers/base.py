"""What the optimizers of the papers have in common: a worker's half and a server's half.

worker    message = `worker_step(gradient)`, with state of its own; or the gradient itself
exchange  mean of the decoded messages of all workers, with error feedback
server    `update_step(mean, variable, learning_rate)`, the same on every replica
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from tfqcomm import _tf_private
from tfqcomm.optimizers.memory import RememberingOptimizer
from tfqcomm.optimizers.shared_arguments import KERAS_ARGUMENTS, shown
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.shared_arguments import exchange_arguments
from tfqcomm.step.step import distributed_step


@shown
class CompressedOptimizer(RememberingOptimizer):
    """Abstract base of optimizers that bring their own compression.

    A subclass defines `build` and `update_step` as any Keras optimizer does: the server's half.
    One with a worker's half defines `worker_slots` and `worker_step`, too, and `server_state` if it
    reads what the server's half keeps; one whose messages take more than that overrides
    `distributed_step`. It works under no strategy, MirroredStrategy and
    MultiWorkerMirroredStrategy, in `fit` and in a custom loop that calls `apply` (or
    `apply_gradients`) in replica context.

    Args:
        learning_rate: float or `keras.optimizers.schedules.LearningRateSchedule`.
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config; or a policy, as of
            `tfqcomm.distribute.CompressedAllReduce`.
        **options: those of `ExchangeOptions`, and of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.
    """

    decides: frozenset[str] = frozenset()  # shared arguments that an algorithm does not take

    def __init__(self, learning_rate, *, compressor, **options):
        exchange = {name: options.pop(name) for name in self._open() if name in options}
        super().__init__(learning_rate, **options)
        self.options = ExchangeOptions(compressor, **exchange)
        _tf_private.agree_on_finite_gradients()
        _tf_private.remember_models()
        _tf_private.agree_before_compile()

    @classmethod
    def shared_arguments(cls) -> Mapping[str, inspect.Parameter]:
        """Those of `ExchangeOptions` that the algorithm leaves open, and Keras'."""
        return cls._open() | KERAS_ARGUMENTS

    @classmethod
    def _open(cls) -> dict[str, inspect.Parameter]:
        arguments = exchange_arguments()
        return {name: arguments[name] for name in arguments if name not in cls.decides}

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile the step where there is no strategy."""
        return self.options.compressor.compilable

    worker_slots: Mapping[str, float] = {}  # what a worker remembers of each tensor: see `step`
    reads_server = False  # whether `worker_step` needs `server_state`, which all replicas have
    warms_up = False  # whether messages travel dense at first: then it is a `step.halves.WarmUp`

    def server_state(self, index: int) -> Mapping[str, keras.Variable]:
        """What `worker_step` reads of the server's half of one variable: name -> slot."""
        return {}

    def worker_step(self, gradient, state, iteration):
        """The worker's half (abstract): a tensor's message and the worker's new state."""
        raise TypeError(f"{type(self).__name__} must define `worker_step`")

    def worker_sent(self, state, left_out):
        """What of the worker's state remains once its message was compressed: all of it."""
        return state

    def distributed_step(self, gradients, variables, learning_rate):
        """Exchanges the messages of all replicas and updates `variables`."""
        worker = self if self.worker_slots or self.reads_server else None
        warm_up = self if self.warms_up else None
        distributed_step(self, self.options, gradients, variables, learning_rate, worker, warm_up)

    def index_of(self, variable) -> int:
        """The position of `variable` among those given to `build`, and so of its slots."""
        return _tf_private.variable_index(self, variable)

    def get_config(self):
        """Serializable arguments, the compressor's among them."""
        exchange = self.options.get_config()
        left_open = {name: exchange[name] for name in exchange if name not in self.decides}
        return {**super().get_config(), **left_open}


def per_row(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a slot with one number for each row of a variable, so that both are cut alike."""
    return (*shape[:1], *[1 for _ in shape[1:]])


def complete(
    store: Mapping[str, np.ndarray], variables: Sequence, added: Sequence, value: float
) -> Mapping[str, np.ndarray]:
    """What an older version saved of an optimizer, with slots that it did not have.

    Args:
        store: from position to value, as Keras saves an optimizer's `variables`.
        variables: of the optimizer today.
        added: the last of them, perhaps missing in `store`.
        value: of all their elements.
    """
    old = len(variables) - len(added)
    if len(store.keys()) != old:
        return store
    late = {str(old + i): np.full(v.shape, value, v.dtype) for i, v in enumerate(added)}
    return {**{str(i): store[str(i)] for i in range(old)}, **late}
