"""Replicas that train alone with any optimizer, and exchange how far they came now and then.

every step    each replica: a step of the inner optimizer with its own gradient and its own state
some steps    a fragment: mean of (global - own) weights, compressed; the outer step moves the
              global weights, and every replica goes on from these

                        step   1  2  3  4  5  6  7  8  9 10 11 12       every=4, fragments=2
    fragment 0 is exchanged             x           x           x
    fragment 1 is exchanged       x           x           x
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from tfqcomm import _tf_private, checks
from tfqcomm.aggregators.base import Aggregator
from tfqcomm.optimizers.local.global_weights import GlobalWeights, deal, wide
from tfqcomm.optimizers.local.inner_optimizer import (
    keep_state,
    local_steps,
    refuse_constraints,
    refuse_inner,
)
from tfqcomm.optimizers.local.pulls import Pullable, own_gradients
from tfqcomm.optimizers.memory import RememberingOptimizer
from tfqcomm.optimizers.shared_arguments import KERAS_ARGUMENTS
from tfqcomm.state.ledger import ledger_for
from tfqcomm.state.replicas import copies, values_of
from tfqcomm.state.traffic import Route
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message, path_of
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.refusals import (
    agree_to_train,
    refuse_idle_patterns,
    refuse_impossible,
    require_own_scope,
)
from tfqcomm.step.shared_arguments import exchange_arguments
from tfqcomm.step.step import paid
from tfqcomm.step.verification import verify_replicas
from tfqcomm.transport.of_strategy import transport_for

_ARGUMENTS = exchange_arguments(of_gradients=False)


class OuterOptimizer(RememberingOptimizer):
    """Abstract base: any Keras optimizer on every replica alone, and an outer step now and then.

    Args:
        inner: an optimizer of Keras, not built yet, its name or its config.
        every: H, steps between two exchanges of a variable.
        outer_learning_rate, outer_momentum: of the outer step.
        compressor: of the differences.
        fragments: P, which divides `every`: as many parts take turns.
        **options: those of `ExchangeOptions`.

    Attributes:
        aggregators: by schedule, in place of the usual ones.
    """

    aggregators: ClassVar[dict[str, type[Aggregator]]] = {}
    synchronous = False  # between exchanges replicas neither wait for one another nor are equal

    def __init__(
        self,
        inner,
        every: int,
        outer_learning_rate: float,
        outer_momentum: float,
        compressor,
        fragments: int,
        *,
        name: str,
        **options,
    ):
        exchange = {n: options.pop(n) for n in _ARGUMENTS if n in options}
        super().__init__(0.0, name=name, **options)  # its learning rate is that of `inner`
        checks.positive_integer("every", every)
        checks.positive("outer_learning_rate", outer_learning_rate)
        checks.fraction("outer_momentum", outer_momentum)
        checks.positive_integer("fragments", fragments)
        if every % fragments:
            raise ValueError(
                "Argument `fragments` must divide `every`: fragments take turns in equal "
                f"intervals. Received: fragments={fragments}, every={every}"
            )
        self.inner = keras.optimizers.get(inner)
        refuse_inner(self.inner)
        self.loss_scale_factor = self.inner.loss_scale_factor
        self.every = every
        self.fragments = fragments
        self.exchange_options = ExchangeOptions(compressor, **exchange)
        _refuse_compressor(self.exchange_options.compressor, fragments)
        self.global_weights = GlobalWeights(outer_learning_rate, outer_momentum)
        _tf_private.agree_on_finite_gradients()
        _tf_private.allow_updates_by_others()
        _tf_private.agree_before_compile()

    @classmethod
    def shared_arguments(cls):
        """Those of `ExchangeOptions`: what Keras' optimizers take is an argument of `inner`."""
        return _ARGUMENTS | {"name": KERAS_ARGUMENTS["name"]}

    @property
    def supports_jit(self) -> bool:
        """Whether XLA can compile the step where there is no strategy."""
        return self.exchange_options.compressor.compilable

    @property
    def learning_rate(self):
        """That of the inner optimizer: callbacks may set it."""
        return self.inner.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner.learning_rate = learning_rate

    def build(self, variables):
        """Makes the inner optimizer's state."""
        super().build(variables)
        self.inner.build(variables)

    @tf.autograph.experimental.do_not_convert  # this is graph code already
    def apply(self, grads, trainable_variables=None):
        """One inner step, and an exchange if it is time to. In replica context."""
        super().apply(own_gradients(self, grads), trainable_variables)

    def distributed_step(self, gradients, variables, learning_rate):
        """Every replica's own inner step, then the exchange of the fragment whose turn it is."""
        refuse_constraints(variables)
        refuse_impossible(self, self.exchange_options)
        variables = list(variables)
        gradients = _tf_private.clip_gradients(self.inner, list(gradients))

        def merged(strategy, gradients, learning_rate):
            for optimizer in (self, self.inner):
                require_own_scope(optimizer, strategy)
            ledger = ledger_for(self, transport_for(strategy))
            replicas = Pullable(ledger, copies(strategy, variables))
            self._begin(strategy, replicas, variables)
            finite = local_steps(
                self.inner, strategy, ledger, values_of(variables), gradients, learning_rate
            )
            sent, healthy = self._exchange(strategy, replicas, variables)
            size = sum(v.shape.num_elements() * wide(v).size for v in replicas.variables[0])
            dense = ledger.transport.bytes_all_reduce(size, itemsize=1)
            ledger.meter.record(sent, dense, finite & healthy, lambda: tf.constant(0.0))

        context = tf.distribute.get_replica_context()
        context.merge_call(merged, args=(gradients, tf.convert_to_tensor(learning_rate)))

    def _key(self, variable) -> str:
        # By position: Keras may call the same layer `dense` in one run and `dense_2` in the next.
        return str(_tf_private.variable_index(self, variable))

    def _begin(self, strategy, replicas: Pullable, variables):
        """Before the first step: workers agree on what they do, and state finds its place."""
        ledger = replicas.ledger
        if "shared" not in ledger.kept:
            facts = self.exchange_options.facts(path_of(v) for v in variables)
            agree_to_train(ledger.transport, self, variables, facts)
            refuse_idle_patterns(self, self.exchange_options, variables)
            keep_state(self.inner, strategy, ledger)
        ledger.keep("shared", lambda: self.global_weights.shared)
        self.global_weights.begin(replicas, [self._key(v) for v in variables])

    def _exchange(self, strategy, replicas: Pullable, variables):
        """Bytes that one worker sent in this step, and whether what it sent was taken."""
        sizes = [v.shape.num_elements() for v in replicas.variables[0]]
        turn = (tf.cast(tf.convert_to_tensor(self.iterations), tf.int32) + 1) % self.every
        total, healthy = tf.constant(0, tf.int64), tf.constant(True)
        routes: dict[int, Route] = {}  # by the place of the variable
        for index, places in enumerate(deal(sizes, self.fragments)):
            if not places:
                continue
            sent, taken = tf.cond(
                tf.equal(turn, index * (self.every // self.fragments)),
                lambda places=places: self._exchange_fragment(
                    strategy, replicas, variables, places, routes
                ),
                lambda: (tf.constant(0, tf.int64), tf.constant(True)),
            )
            total, healthy = total + sent, healthy & taken
        if routes:  # in a step that is not traced, those of what is exchanged, if anything is
            replicas.ledger.routes = tuple(route for _, route in sorted(routes.items()))
        return total, healthy

    def _exchange_fragment(self, strategy, replicas: Pullable, variables, places, routes):
        """Means of differences, then the outer step: one graph for all local replicas."""
        exchange = GradientExchange(self.exchange_options, replicas.ledger, self.aggregators)
        own = list(zip(*replicas.variables, strict=True))  # of each variable its local copies
        messages = []
        for place in places:
            key, path = self._key(variables[place]), path_of(variables[place])
            differences = self.global_weights.differences(key, own[place])
            messages.append(Message(key, differences, path=path))
        compresses = exchange.options.after_warm_up(self.iterations)
        # Rounds are counted, not steps, whose remainders by W might all be one.
        rounds = tf.convert_to_tensor(self.iterations) // self.every
        reduction = exchange.reduce(messages, rounds, compresses)
        for place, route in zip(places, replicas.ledger.routes, strict=True):
            codec = f"{route.codec} every {self.every} steps"
            routes[place] = dataclasses.replace(route, codec=codec)
        residuals = replicas.ledger.residuals
        debts = [residuals.debt(m.key, m.size) for m in messages]

        def move():
            reduction.commit()
            for message, mean, debt in zip(messages, reduction.means, debts, strict=True):
                self.global_weights.move(message.key, paid(mean, debt))
            return tf.constant(True)

        with tf.device(exchange.transport.device):
            taken = tf.cond(reduction.healthy, move, lambda: tf.constant(False))
        for message, place in zip(messages, places, strict=True):
            self.global_weights.give(message.key, own[place])  # also of a round that was lost
        if exchange.options.verify:
            verify_replicas(
                exchange.ledger, strategy, values_of([variables[place] for place in places]), taken
            )
        return tf.cast(reduction.bytes_sent, tf.int64), taken

    def show_global_weights(self, strategy, variables) -> None:
        """Gives the global weights to all replicas of this process (eager).

        Args:
            variables: of the model, among those that the optimizer was built for.
        """
        known = [v for v in variables if self._key(v) in self.global_weights]
        for variable in known:
            value = strategy.experimental_local_results(variable.value)
            self.global_weights.give(self._key(variable), value)

    def get_config(self):
        """Serializable arguments."""
        exchange = self.exchange_options.get_config()
        return {
            "name": self.name,
            "inner": keras.saving.serialize_keras_object(self.inner),
            "every": self.every,
            "outer_learning_rate": self.global_weights.learning_rate,
            "outer_momentum": self.global_weights.momentum,
            "fragments": self.fragments,
            **{n: exchange[n] for n in ("compressor", *_ARGUMENTS)},
        }


def _refuse_compressor(compressor, fragments):
    if fragments > 1 and (compressor.adaptive or getattr(compressor, "alternate", False)):
        raise ValueError(
            "Argument `fragments` must be 1 with a compressor that plans from exchange to "
            "exchange: it would take each fragment for the whole model. "
            f"Received: fragments={fragments}, compressor={compressor}"
        )
