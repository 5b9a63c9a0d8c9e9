"""What Leader SGD and its baselines have in common: replicas that train alone between pulls.

every step    each replica: SGD with its own gradient and its own momentum; nothing is sent
some steps    a pull: the replicas' parameters, each as one vector, move towards one another

Letters: d parameters, L local replicas, W replicas in all.
"""

from __future__ import annotations

import abc

import keras
import tensorflow as tf

from tfqcomm import _tf_private, checks
from tfqcomm.optimizers.local.pulls import Pullable, SharedState, own_gradients
from tfqcomm.optimizers.memory import RememberingOptimizer
from tfqcomm.state.ledger import Ledger, ledger_for
from tfqcomm.state.replicas import copies
from tfqcomm.state.traffic import Route
from tfqcomm.step.refusals import agree_to_train, require_own_scope
from tfqcomm.transport.of_strategy import transport_for


def local_sgd_update(gradient, buffer, learning_rate, *, momentum, nesterov):
    """One step of a worker on its own, as `keras.optimizers.SGD` does it.

    Returns:
        What to add to the variable, and the new momentum buffer.
    """
    v = momentum * buffer - learning_rate * gradient  # velocity
    return (momentum * v - learning_rate * gradient if nesterov else v), v


class LocalSGDOptimizer(RememberingOptimizer):
    """Abstract base of optimizers whose replicas hold different weights between pulls.

    A subclass says when and how replicas pull one another. `callbacks.AverageReplicas` puts the
    average of all replicas into the model where it is evaluated, saved or handed over.

    Args:
        learning_rate: float or `keras.optimizers.schedules.LearningRateSchedule`.
        momentum: in [0, 1); the buffers are local and untouched by pulls.
        nesterov: look ahead, as in Keras.
        **options: of `keras.optimizers.Optimizer`. Clipping acts on a replica's own gradient;
            weight decay is Keras' decoupled one, in every local step.
    """

    synchronous = False  # between pulls replicas neither wait for one another nor equal one another

    def __init__(self, learning_rate, momentum: float, *, nesterov: bool, **options):
        super().__init__(learning_rate, **options)
        checks.fraction("momentum", momentum)
        checks.boolean("nesterov", nesterov)
        self.momentum = momentum
        self.nesterov = nesterov
        self.shared = SharedState()
        _tf_private.agree_on_finite_gradients()

    @abc.abstractmethod
    def pull_if_due(self, step: tf.Tensor, replicas: Pullable) -> tf.Tensor:
        """Moves the replicas towards one another if it is time to.

        Args:
            step: int scalar, the number of this step; the first is 1.
            replicas: after their own step.

        Returns:
            Bytes that one worker sent.
        """

    def prepare(self, replicas: Pullable) -> None:
        """Called once, before the first step of several replicas."""

    @property
    @abc.abstractmethod
    def route(self) -> tuple[str, str]:
        """How a pull travels, for people: what is sent, and by which collective."""

    @tf.autograph.experimental.do_not_convert  # this is graph code already
    def apply(self, grads, trainable_variables=None):
        """One local step, and a pull if it is time to. In replica context."""
        super().apply(own_gradients(self, grads), trainable_variables)

    def distributed_step(self, gradients, variables, learning_rate):
        """Every replica's own step, then the pull."""
        context = tf.distribute.get_replica_context()
        _refuse_impossible(self, variables, context.num_replicas_in_sync)
        variables = list(variables)

        def merged(strategy, gradients, learning_rate):
            require_own_scope(self, strategy)
            ledger = self.ledger(strategy)
            replicas = Pullable(ledger, copies(strategy, variables))
            self._begin(replicas, variables)
            local = [strategy.experimental_local_results(g) for g in gradients]
            rates = strategy.experimental_local_results(learning_rate)
            healthy = [
                self._local_step(ledger, replica, variables, own, gradients, rate)
                for replica, (own, gradients, rate) in enumerate(
                    zip(replicas.variables, zip(*local, strict=True), rates, strict=True)
                )
            ]
            if replicas.transport.world == 1:  # several replicas have neither: see below
                self._finish(strategy, variables, healthy[0])
            sent = self._pull(replicas)
            dense = ledger.transport.bytes_all_reduce(replicas.size)
            ledger.meter.record(sent, dense, tf.reduce_all(healthy), lambda: tf.constant(0.0))

        context.merge_call(merged, args=(list(gradients), tf.convert_to_tensor(learning_rate)))

    def _finish(self, strategy, variables, healthy):
        """Moving averages and constraints, in a step that was taken."""
        values = [v.value if isinstance(v, keras.Variable) else v for v in variables]

        def finish():
            _tf_private.finish_step(self, strategy, values)
            return tf.constant(True)

        tf.cond(healthy, finish, lambda: tf.constant(False))

    def ledger(self, strategy: tf.distribute.Strategy) -> Ledger:
        """Holds the transport, the meter and what each replica remembers by itself."""
        ledger = ledger_for(self, transport_for(strategy))
        ledger.keep("shared", lambda: self.shared)
        return ledger

    def _begin(self, replicas, variables):
        """Before the first step: workers agree on what they do, and say how pulls travel."""
        ledger = replicas.ledger
        if ledger.routes:
            return
        agree_to_train(ledger.transport, self, variables)
        sent, schedule = self.route
        ledger.routes = tuple(
            Route(getattr(v, "path", v.name), tuple(v.shape), schedule, sent) for v in variables
        )
        if ledger.transport.world > 1:
            self.prepare(replicas)

    def _local_step(self, ledger, replica, variables, own, gradients, learning_rate):
        """Updates one replica's `own` copies; returns whether its gradients were finite."""
        steps = []
        for variable, copy, gradient in zip(variables, own, gradients, strict=True):
            buffer = None
            if self.momentum:
                key = str(_tf_private.variable_index(self, variable))
                buffer = ledger.worker_state.variable(replica, "momentum", key, copy.shape, 0.0)
            steps.append((copy, buffer, gradient, _tf_private.decays(self, variable)))

        def update():
            for step in steps:
                self.update_copy(*step, learning_rate)
            return tf.constant(True)

        with tf.device(ledger.transport.devices[replica]):
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
            return tf.cond(finite, update, lambda: tf.constant(False))

    def update_copy(self, variable, buffer, gradient, decays, learning_rate):
        """Takes a local step with one replica's copy of a variable.

        Args:
            variable, buffer: updated; `buffer` is its momentum, None without momentum.
            gradient: of the replica's own loss.
            decays: whether weight decay acts on the variable.
            learning_rate: scalar.
        """
        rate = tf.cast(learning_rate, variable.dtype)
        gradient = tf.cast(gradient, variable.dtype)
        if decays:
            variable.assign_sub(variable * rate * tf.cast(self.weight_decay, variable.dtype))
        if buffer is None:
            variable.assign_sub(gradient * rate)
            return
        step, velocity = local_sgd_update(
            gradient,
            tf.cast(buffer, variable.dtype),
            rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )
        buffer.assign(tf.cast(velocity, buffer.dtype))
        variable.assign_add(step)

    def _pull(self, replicas: Pullable) -> tf.Tensor:
        if replicas.transport.world == 1:
            return tf.constant(0)
        with tf.device(replicas.transport.device):
            step = tf.cast(tf.convert_to_tensor(self.iterations), tf.int32) + 1
            return self.pull_if_due(step, replicas)

    def get_config(self):
        """Serializable arguments."""
        return {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}


def _refuse_impossible(optimizer, variables, world):
    if _tf_private.in_xla_context() and tf.distribute.has_strategy():
        raise ValueError(
            "Replicas that train alone cannot be compiled by XLA: their collectives would be "
            "replaced. Use `model.compile(..., jit_compile=False)`."
        )
    if world == 1:
        return
    for name in ("gradient_accumulation_steps", "use_ema"):
        value = getattr(optimizer, name)
        if value:
            raise ValueError(
                f"Argument `{name}` is not supported where replicas hold different weights. "
                f"Received: {name}={value}"
            )
    constrained = [v.path for v in variables if getattr(v, "constraint", None) is not None]
    if constrained:
        raise ValueError(
            "Constraints of weights are not supported where replicas hold different weights: "
            f"Keras would average them. Received: constraints on {constrained}"
        )
