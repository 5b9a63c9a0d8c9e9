"""Decoupled DiLoCo: learners that never wait, for one another or for what is merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private, checks, compressors
from tfqcomm.optimizers.local.inner_optimizer import refuse_constraints
from tfqcomm.optimizers.local.pieces import deal
from tfqcomm.parameter_server.alone import Pace
from tfqcomm.parameter_server.base_trainer import BaseTrainer
from tfqcomm.parameter_server.diloco import refusals
from tfqcomm.parameter_server.diloco.chief import GlobalCopy, InnerStates, OuterState
from tfqcomm.parameter_server.diloco.errands import DiLoCoErrands
from tfqcomm.parameter_server.diloco.inner import InnerStep
from tfqcomm.parameter_server.diloco.program import DiLoCoProgram
from tfqcomm.parameter_server.diloco.rounds import Rounds
from tfqcomm.parameter_server.diloco.server import DiLoCoServer
from tfqcomm.parameter_server.diloco.worker import DiLoCoWorker
from tfqcomm.parameter_server.fleet import make_fleet
from tfqcomm.parameter_server.free_running import FreeRunning
from tfqcomm.parameter_server.partition import partition
from tfqcomm.parameter_server.payload import Format
from tfqcomm.state.traffic import Route


class DiLoCoTrainer(BaseTrainer):
    """Trains by Decoupled DiLoCo: every worker on its own, at its own pace, with any optimizer.

    Each worker, a learner, holds weights of its own and takes steps of the inner optimizer, with
    inner state of its own. The parameter servers hold the global weights, in `fragments` parts that
    take turns: every H / P steps of an average worker a round begins, at most two at a time, in
    which the learners are asked how far they have come with one fragment. With Theta_p its global
    weights, theta_m those of learner m, and w_m = (examples)^2 / (steps) since it took them:

        learner:  after a step sends delta_m = Theta_p - theta_m, encoded
        servers:  delta = (sum w |delta_m| / sum w) phi(sum w phi(delta_m) / sum w)
                  buf = outer_momentum * buf + delta
                  Theta_p = Theta_p - outer_learning_rate * (delta + outer_momentum * buf)
        learner:  after a step takes theta_m = (1 - mixing) * theta_m + mixing * Theta_p

    tensor by tensor, with phi(x) = x / |x|: of differences that are nearly orthogonal a plain mean
    is too short. Those of embeddings are averaged with the weights w as they are. A round waits for
    `quorum` answers, and then for others as long as there is time until the next round, less what
    merging takes: `grace` * (H / P * seconds of a step - seconds so far - seconds of merging). An
    answer that comes later, or from weights that have been merged since, is dropped and counted.
    Nobody waits: a worker that is three times slower takes a third of the steps.

    An epoch has `steps_per_epoch` steps for each worker on average, whoever takes them. At its end
    workers finish the step they are at, and `model` gets the global weights; the next epoch goes on
    with each one's own. Steps since the last round are not in them: let an epoch be much longer
    than `every`. The optimizer's `iterations`, on which schedules depend, are the steps of an
    average worker. Every `fit` begins with the weights of `model` for all.

    Args:
        build_model, loss, metrics, loss_weights, weighted_metrics: as of `Trainer`.
        cluster_resolver, workers, parameter_servers, timeout_seconds: likewise.
        optimizer: a `tfqcomm.optimizers.DiLoCo`, of which the trainer makes one like it. Its
            `compressor` encodes what learners send, such as "block_int8"; fragments travel back in
            float32. There is no error feedback.
        mixing: in (0, 1], the share of the global weights in what learners go on from; lower =>
            they keep more of what they have learnt by themselves.
        quorum: answers that a round waits for, or of all workers that are alive where these are
            fewer; None for all workers but one.
        grace: share of the time left that a round waits for further answers; 0 for none.
        grace_seconds: the longest grace; None for no limit.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Attributes:
        model: a plain Keras model with the global weights of the end of the last epoch. What is
            loaded into it before `fit` is what all workers start from.
        workers: for each of them whether it is `alive`, its `steps`, how many of its answers were
            `taken` and `dropped`, and its `bytes_pushed` and `bytes_pulled` so far.
        rounds: that were merged so far.

    `fit` and `evaluate` are those of `Trainer`; the `staleness` in the History is the age of the
    fragments that were taken, in steps of all workers since they were merged.

    Worker faults: the others go on without one that is killed, and a quorum is of those that are
    left. Started again, it takes all fragments as they are, and begins with fresh inner state; so
    it does, with its inner state, when its weights are no longer finite. If a parameter server is
    lost, `fit` raises `ServerLost`; what is stopped but not gone is an error as of `Trainer`.

    Differences from the paper: fragments are made of whole variables, dealt to about equal size,
    each on one server; examples stand for tokens; whichever worker's step ends first after a round
    has ended calls the servers to merge it.

    Example:
    >>> import tfqcomm
    >>> trainer = tfqcomm.parameter_server.DiLoCoTrainer(
    ...     lambda: keras.Sequential([keras.Input([8]), keras.layers.Dense(1)]),
    ...     optimizer=tfqcomm.optimizers.DiLoCo(
    ...         keras.optimizers.AdamW(1e-3), every=32, fragments=4, compressor="block_int8"
    ...     ),
    ...     loss="mse",
    ... )  # doctest: +SKIP

    References:
        Decoupled DiLoCo, https://arxiv.org/abs/2604.21428; Douillard et al.: Streaming DiLoCo with
        overlapping communication, https://arxiv.org/abs/2501.18512
    """

    def __init__(
        self,
        build_model: Callable[[], keras.Model],
        *,
        optimizer,
        loss=None,
        metrics: Sequence | None = None,
        loss_weights=None,
        weighted_metrics: Sequence | None = None,
        mixing: float = 0.5,
        quorum: int | None = None,
        grace: float = 1.0,
        grace_seconds: float | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        workers: int = 2,
        parameter_servers: int = 1,
        timeout_seconds: float | None = 60.0,
    ):
        optimizer = keras.optimizers.get(optimizer)
        refusals.check(optimizer)
        refusals.options_of(optimizer, 0)
        self._mixing = checks.ratio(mixing, "mixing")
        checks.positive_integer_or_none("quorum", quorum)
        checks.non_negative("grace", grace)
        if grace_seconds is not None:
            checks.non_negative("grace_seconds", grace_seconds)
        self._grace, self._grace_seconds = grace, grace_seconds
        super().__init__(
            build_model,
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            loss_weights=loss_weights,
            weighted_metrics=weighted_metrics,
            cluster_resolver=cluster_resolver,
            workers=workers,
            parameter_servers=parameter_servers,
            timeout_seconds=timeout_seconds,
        )
        count = len(self._cluster.workers)
        self._quorum = quorum or max(1, count - 1)
        if self._quorum > count:
            raise ValueError(
                f"Argument `quorum` must be at most the number of workers, {count}. "
                f"Received: quorum={quorum}"
            )

    @property
    def workers(self) -> list[dict[str, int]]:
        """What each worker has done, sent and received so far."""
        learners = self._book.learners if self._ready else []
        return [
            {**worker, "taken": learner.taken, "dropped": learner.dropped}
            for worker, learner in zip(super().workers, learners, strict=True)
        ]

    @property
    def rounds(self) -> int:
        """How many were merged so far."""
        return self._book.merged if self._ready else 0

    def _make(self, makers, loss_scale):
        model, optimizer = self.model, self._inner_optimizer
        refuse_constraints(model.trainable_variables)
        servers = self._make_servers()
        inner = InnerStep(optimizer.inner, model.trainable_variables)
        program = DiLoCoProgram(model, inner, servers, optimizer.fragments, loss_scale)
        self._book = Rounds(
            optimizer.fragments,
            optimizer.every // optimizer.fragments,
            len(self._cluster.workers),
            self._quorum,
            self._grace,
            self._grace_seconds,
        )
        self._merging = threading.Lock()
        fleet = make_fleet(
            self._cluster, self._watch, DiLoCoWorker, program, servers, makers, loss_scale
        )
        copy = GlobalCopy(model, fleet, self._book, self._merging)
        states = InnerStates(fleet, optimizer)
        meter = self._register(self._routes(servers), worker_state=states)
        self._ledger.keep("shared", lambda: OuterState(copy, model))
        return fleet, copy, states, meter

    def _make_servers(self) -> list[DiLoCoServer]:
        variables = self.model.trainable_variables
        optimizer, devices = self._inner_optimizer, self._cluster.servers
        shapes = [tuple(v.shape) for v in variables]
        sizes = [int(np.prod(shape)) for shape in shapes]
        whole = dict.fromkeys(range(len(shapes)), "merging keeps the norm of a whole variable")
        pieces = partition(shapes, len(devices), whole=whole)
        fragment_of = {
            place: fragment
            for fragment, places in enumerate(deal(sizes, optimizer.fragments))
            for place in places
        }
        reached = optimizer.exchange_options.reaches
        large = sum(s for shape, s in zip(shapes, sizes, strict=True) if reached(shape, s))
        options = refusals.options_of(self.model.optimizer, large)
        values = [v.numpy() for v in variables]
        servers = []
        for index, device in enumerate(devices):
            own = [p for p in pieces if p.server == index]
            formats = [
                Format(
                    tuple(p for p in own if fragment_of[p.variable] == fragment),
                    0,
                    options,
                    compressors.get(None),
                )
                for fragment in range(optimizer.fragments)
            ]
            servers.append(
                DiLoCoServer(
                    device,
                    formats,
                    values,
                    _embeddings(self.model),
                    len(self._cluster.workers),
                    optimizer.global_weights.learning_rate,
                    optimizer.global_weights.momentum,
                )
            )
        return servers

    def _routes(self, servers: Sequence[DiLoCoServer]) -> list[Route]:
        codecs: dict[int, str] = {}
        for format in (format for server in servers for format in server.formats):
            codec = str(format.options.one_compressor)
            codecs |= {p.variable: "float32" for p in format.up.rest}
            codecs |= {p.variable: codec for p in format.large}
        return [
            Route(v.path, tuple(v.shape), "asked for, merged, taken", codecs[place])
            for place, v in enumerate(self.model.trainable_variables)
        ]

    def _driver(self):
        pace = Pace(self._fleet, self._inner_optimizer.inner)
        errands = DiLoCoErrands(self._fleet, self._book, self._mixing, self._merging, pace)
        return FreeRunning(self._fleet, errands)

    @property
    def _applied_per_iteration(self) -> int:
        return len(self._cluster.workers)


def _embeddings(model: keras.Model) -> frozenset[int]:
    """Places of the tables among the trainable variables."""
    places = {id(v): place for place, v in enumerate(model.trainable_variables)}
    tables = [
        layer.embeddings
        for layer in _tf_private.layers_of(model)
        if isinstance(layer, keras.layers.Embedding)
    ]
    return frozenset(places[id(table)] for table in tables if id(table) in places)
