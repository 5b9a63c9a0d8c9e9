"""Replicas that train alone with any optimizer, and exchange how far they came now and then.

every step    each replica: a step of the inner optimizer with its own gradient and its own state
some steps    a fragment: mean of (global - own) weights, compressed; the outer step moves the
              global weights, and every replica takes them, or a part of them

                        step   1  2  3  4  5  6  7  8  9 10 11 12       every=4, fragments=2
    fragment 0 is exchanged             x           x           x
    fragment 1 is exchanged       x           x           x
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import keras
import tensorflow as tf

from tfqcomm import _tf_private, checks
from tfqcomm.aggregators.base import Aggregator
from tfqcomm.optimizers.local.fragment import Fragment, Turns
from tfqcomm.optimizers.local.global_weights import GlobalWeights
from tfqcomm.optimizers.local.inner_optimizer import (
    keep_state,
    local_steps,
    refuse_constraints,
    refuse_inner,
)
from tfqcomm.optimizers.local.pieces import Piece, cut, wide
from tfqcomm.optimizers.local.pulls import Pullable, own_gradients
from tfqcomm.optimizers.memory import RememberingOptimizer
from tfqcomm.optimizers.shared_arguments import KERAS_ARGUMENTS
from tfqcomm.state.ledger import Ledger, ledger_for
from tfqcomm.state.replicas import copies, values_of
from tfqcomm.state.traffic import Route
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import path_of
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.refusals import (
    agree_to_train,
    refuse_idle_patterns,
    refuse_impossible,
    require_own_scope,
)
from tfqcomm.step.shared_arguments import exchange_arguments
from tfqcomm.transport import Transport
from tfqcomm.transport.of_strategy import transport_for

_ARGUMENTS = exchange_arguments(of_gradients=False)
_MOST_BUCKETS = 1 << 16  # of a fragment: so many seeds are its own


class OuterOptimizer(RememberingOptimizer):
    """Abstract base: any Keras optimizer on every replica alone, and an outer step now and then.

    Args:
        inner: an optimizer of Keras, not built yet, its name or its config.
        every: H, steps between two exchanges of a variable.
        outer_learning_rate, outer_momentum: of the outer step.
        compressor: of the differences.
        fragments: P, which divides `every`: as many parts take turns.
        overlap: steps between the sending and the merging of a fragment, below `every` / P.
        merge: in (0, 1], the share of the global weights in what a replica goes on from.
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
        overlap: int,
        merge: float,
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
        checks.non_negative_integer("overlap", overlap)
        if overlap >= every // fragments:
            raise ValueError(
                "Argument `overlap` must be below every / fragments: a fragment is merged before "
                f"the next one is sent. Received: overlap={overlap}, every={every}, "
                f"fragments={fragments}"
            )
        self.inner = keras.optimizers.get(inner)
        refuse_inner(self.inner)
        self.loss_scale_factor = self.inner.loss_scale_factor
        self.turns = Turns(every, fragments, overlap)
        self.exchange_options = ExchangeOptions(compressor, **exchange)
        _refuse_compressor(self.exchange_options.compressor, fragments)
        self.global_weights = GlobalWeights(
            outer_learning_rate, outer_momentum, checks.ratio(merge, "merge")
        )
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
    def every(self) -> int:
        """H, steps between two exchanges of a variable."""
        return self.turns.every

    @property
    def fragments(self) -> int:
        """P, the parts of the variables that take turns."""
        return self.turns.fragments

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
            paths = [path_of(v) for v in variables]
            pieces = cut(variables, paths, self.exchange_options, self.fragments)
            self._begin(strategy, replicas, variables, pieces)
            finite = local_steps(
                self.inner, strategy, ledger, values_of(variables), gradients, learning_rate
            )
            sent, healthy = self._exchange(replicas, variables, pieces)
            size = sum(v.shape.num_elements() * wide(v).size for v in replicas.variables[0])
            dense = ledger.transport.bytes_all_reduce(size, itemsize=1)
            ledger.meter.record(sent, dense, finite & healthy, lambda: tf.constant(0.0))

        context = tf.distribute.get_replica_context()
        context.merge_call(merged, args=(gradients, tf.convert_to_tensor(learning_rate)))

    def _key(self, variable) -> str:
        # By position: Keras may call the same layer `dense` in one run and `dense_2` in the next.
        return str(_tf_private.variable_index(self, variable))

    def _begin(self, strategy, replicas: Pullable, variables, pieces: Sequence[Sequence[Piece]]):
        """Before the first step: workers agree on what they do, and state finds its place."""
        ledger = replicas.ledger
        if "shared" not in ledger.kept:
            facts = self.exchange_options.facts(path_of(v) for v in variables)
            agree_to_train(ledger.transport, self, variables, facts)
            refuse_idle_patterns(self, self.exchange_options, variables)
            keep_state(self.inner, strategy, ledger)
        ledger.keep("shared", lambda: self.global_weights.shared)
        self.global_weights.begin(replicas, [self._key(v) for v in variables])
        if self.turns.overlap:
            self.turns.begin(self.global_weights.shared, replicas, pieces)

    def _exchange(self, replicas: Pullable, variables, pieces: Sequence[Sequence[Piece]]):
        """Bytes that one worker sent in this step, and whether what it sent was taken."""
        step = tf.cast(tf.convert_to_tensor(self.iterations), tf.int64) + 1
        own = list(zip(*replicas.variables, strict=True))  # of each variable its local copies
        total, healthy = tf.constant(0, tf.int64), tf.constant(True)
        keys = [self._key(v) for v in variables]
        routes: dict[str, Route] = {}
        for index, of_one in enumerate(pieces):
            if not of_one:
                continue
            fragment = Fragment(
                self.turns,
                index,
                of_one,
                [keys[piece.place] for piece in of_one],
                [variables[piece.place] for piece in of_one],
                [own[piece.place] for piece in of_one],
                self.global_weights,
                replicas.ledger,
                functools.partial(self._exchange_of, index, replicas.ledger),
                routes,
            )
            sent, taken = fragment.take_turn(step)
            total, healthy = total + sent, healthy & taken
        if routes:  # in a step that is not traced, those of what is exchanged, if anything is
            replicas.ledger.routes = tuple(routes[key] for key in keys if key in routes)
        return total, healthy

    def _exchange_of(self, index: int, ledger: Ledger, transport: Transport) -> GradientExchange:
        """That of a fragment: those of one round draw independently."""
        options = self.exchange_options
        options = dataclasses.replace(options, seed=options.seed + index * _MOST_BUCKETS)
        return GradientExchange(options, ledger, self.aggregators, transport)

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
            "every": self.turns.every,
            "outer_learning_rate": self.global_weights.learning_rate,
            "outer_momentum": self.global_weights.momentum,
            "fragments": self.turns.fragments,
            "overlap": self.turns.overlap,
            "merge": self.global_weights.merge,
            **{n: exchange[n] for n in ("compressor", *_ARGUMENTS)},
        }


def _refuse_compressor(compressor, fragments):
    if fragments > 1 and (compressor.adaptive or getattr(compressor, "alternate", False)):
        raise ValueError(
            "Argument `fragments` must be 1 with a compressor that plans from exchange to "
            "exchange: it would take each fragment for the whole model. "
            f"Received: fragments={fragments}, compressor={compressor}"
        )
