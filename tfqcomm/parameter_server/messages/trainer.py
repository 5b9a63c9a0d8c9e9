"""Training with messages to parameter servers, in rounds or as they arrive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private, checks
from tfqcomm.parameter_server import embeddings, optimizers
from tfqcomm.parameter_server.base_trainer import BaseTrainer
from tfqcomm.parameter_server.embeddings import AUTO, check_rows_from, codecs, exported
from tfqcomm.parameter_server.fleet import make_fleet
from tfqcomm.parameter_server.free_running import FreeRunning
from tfqcomm.parameter_server.messages import memory
from tfqcomm.parameter_server.messages.asynchronous import (
    Asynchronous,
    Bounded,
    check_staleness,
)
from tfqcomm.parameter_server.messages.chief import ChiefCopy, make_servers
from tfqcomm.parameter_server.messages.program import Program
from tfqcomm.parameter_server.messages.routes import routes
from tfqcomm.parameter_server.messages.synchronous import Synchronous
from tfqcomm.parameter_server.messages.table_files import TableFiles
from tfqcomm.parameter_server.messages.worker import Worker
from tfqcomm.parameter_server.partition import ALONE_FROM, partition
from tfqcomm.parameter_server.payload import Format, weight_codec

MODES = ("sync", "async")


class Trainer(BaseTrainer):
    """Trains a Keras model whose weights live on parameter servers.

    The chief runs this object; workers and servers run `python -m tfqcomm.launch --serve`. Without
    a cluster, one is embedded in the process. In every step a worker pulls the weights, encoded
    where they live, computes a gradient on a batch of its own, and pushes the optimizer's message,
    encoded; the server decodes it and runs the optimizer's other half.

    "sync", the papers' algorithm: the servers take one step per round, on the mean of one message
    from each worker. The same as the optimizer under an all-reduce strategy with W replicas.
    "async": each message is a step of its own, scaled by 1 / W, as soon as it arrives: a worker's
    step and the servers' are one remote call, unless there is a bound on staleness. An epoch has
    the same batches, so W times as many iterations, and l1 is scaled likewise. Where a step does
    not shrink with its message, as in Adam or with weight decay, choose a learning rate W times
    smaller.

    Args:
        build_model: a function that returns a Keras model; called once, on the chief.
        optimizer: CompAMS, QAdam, QCMDAdagrad, QRDAAdagrad or AdaptiveTopKSGD (which keeps its
            average number of entries at every step), with their own compressors; or any of Keras'.
            The trainer makes one like it. For LeaderSGD there is `LeaderTrainer`.
        loss, metrics, loss_weights, weighted_metrics: as in `compile`; of metrics, too, it makes
            others like them. Under policy "mixed_float16" losses are scaled as `compile` does it.
        compressor: of the messages of Keras' optimizers: a `tfqcomm.compressors.Compressor`, its
            name or its config.
        weight_compressor: of the pulled weights: `UniformGrid(8)`, `BlockInt8()`, `BFloat16()` or
            another, without error feedback; or `SparseWeights()`, which is lossless, and the
            default with an optimizer that has `l1`. With a QAdam it defaults to the optimizer's.
        mode: "sync" or "async".
        max_staleness: in mode "async", the most server steps between a pull and the message that
            came of it; at least W - 1. Workers wait for slower ones as far as needed. None for no
            bound.
        pull_ahead: whether a worker pulls the weights of its next step while it computes this one,
            in mode "async" without a bound. It then never waits for weights, and computes at those
            from before its last push: for links on which transfers take most of a step.
        error_feedback, min_size, seed: with `compressor`, as in `tfqcomm.distribute`. `min_size`
            says for all optimizers without one of their own which tensors are compressed.
        cluster_resolver: names the cluster; by default TF_CONFIG does, if it is set.
        workers, parameter_servers: of an embedded cluster.
        variable_partitioner: as of `tf.distribute.ParameterServerStrategy`. By default variables
            of 8 MiB and more are split among the servers. A part counts as a tensor of its own:
            scales and top-k range over it. Where a step or a constraint depends on the whole of a
            variable (Adafactor, Lamb, Muon; all but NonNeg), it is not split.
        embedding_rows_from: elements. Where a `keras.layers.Embedding` has at least so many, and
            its weights are trained, workers pull and push the rows of their batches alone: see
            "Embeddings" below. None: whole tables. "auto": by rows from 262,144 elements on, where
            optimizer, regularizer and constraint allow it. `rows` names others.
        row_codec: how these rows travel, both ways: "float32", "bfloat16", or "int8" with a scale
            per row.
        row_feedback: error feedback of rows that are pushed: what the codec leaves out of a row is
            added when this worker pushes the row again. How many slots a worker keeps for that in
            each table, of 4 bytes an element and 8 more: "all" for one per row; else a row has slot
            id % slots, and what another row was owed there is dropped. None: no feedback.
        timeout_seconds: how long a worker or a parameter server that is waited for may answer
            nothing at all, as a stopped process or a frozen machine does, before that is an error
            that names it. A step may take longer: a task that computes still answers. None: for
            ever.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Attributes:
        model: a plain Keras model. It has the servers' weights, and its optimizer their slots, at
            the end of every epoch, and tables that travel by rows whenever they are asked for; what
            is loaded into it before `fit` is what `fit` starts from.
        workers: for each of them whether it is `alive`, and its `messages`, `bytes_pushed` and
            `bytes_pulled` so far.

    Worker faults: a worker that is killed takes its residual and moments with it, and its last
    message unless that has arrived; training goes on with the others. Started again, it takes part
    again, with a new memory. Messages are numbered, and no server takes one twice. If a parameter
    server is lost, `fit` raises `ServerLost`; also if one is stopped but not gone, for
    `timeout_seconds`; a worker that is stopped is a `RuntimeError`.

    Embeddings: a table is spread over all servers, in ranges of rows. A step changes the rows that
    its batches touch, and leaves others and what the optimizer keeps of them alone ("lazy"): SGD,
    Adagrad, Adam, AdamW, RMSprop, CompAMS, QAdam, QCMDAdagrad, QRDAAdagrad; others are refused.
    Rows are encoded without error feedback unless `row_feedback` says so: what is owed to them
    would be a table on each worker, and is paid when a row is touched again. It is in no backup,
    and lost with its worker. QAdam's moments of rows live on the servers. In mode
    "async" rows are as new as the moment they are pulled. An id that a table does not have is a
    ValueError that names it. From its creation on such a table lives on the servers alone: what
    reads its variable in `model` fetches it, what assigns it sends it, and evaluation on the chief
    looks up rows. First values are drawn by the layer's initializer in blocks of rows: for the same
    seed they differ from plain Keras', and are the same on any number of servers.

    Differences from training in one process: `train_step` is Keras' own; gradients of embeddings
    are dense where whole tables travel, and the step is lazy where rows do; moving statistics of
    layers are averaged over the workers; each worker drops out other inputs; a message that is not
    finite is skipped. What cannot be as in one process is refused by name. All optimizers of Keras
    are compared in docs/optimizers.md.

    Example:
    >>> import tfqcomm
    >>> trainer = tfqcomm.parameter_server.Trainer(
    ...     lambda: keras.Sequential([keras.Input([8]), keras.layers.Dense(1)]),
    ...     optimizer=tfqcomm.optimizers.QAdam(1e-3),
    ...     loss="mse",
    ...     weight_compressor="uniform_grid",
    ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        build_model: Callable[[], keras.Model],
        *,
        optimizer="adam",
        loss=None,
        metrics: Sequence | None = None,
        loss_weights=None,
        weighted_metrics: Sequence | None = None,
        compressor=None,
        weight_compressor=None,
        mode: str = "sync",
        max_staleness: int | None = None,
        pull_ahead: bool = False,
        error_feedback: bool | str = "auto",
        min_size: int = 1024,
        seed: int = 0,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        workers: int = 2,
        parameter_servers: int = 1,
        variable_partitioner: Callable | None = None,
        embedding_rows_from: int | str | None = AUTO,
        row_codec: str = "float32",
        row_feedback: int | str | None = None,
        timeout_seconds: float | None = 60.0,
    ):
        checks.one_of("mode", mode, MODES)
        optimizer = keras.optimizers.get(optimizer)
        optimizers.check(optimizer)
        plain = optimizers.inner(optimizer)
        own = getattr(plain, "options", None)
        if own is not None and compressor is not None:
            raise ValueError(
                "Argument `compressor` must be None with an optimizer that brings its own. "
                f"Received: compressor={compressor!r}, optimizer={type(plain).__name__} with "
                f"{own.compressor}"
            )
        self._arguments = {
            "compressor": compressor,
            "error_feedback": error_feedback,
            "min_size": min_size,
            "seed": seed,
        }
        optimizers.options_of(optimizer, 1, **self._arguments)  # says what is wrong with them
        self._weight_codec = weight_codec(weight_compressor, plain)
        check_rows_from(embedding_rows_from)
        self._rows_from = embedding_rows_from
        self._made_there = embeddings.to_be_made(optimizer, embedding_rows_from)
        self._row_codec = codecs.get(row_codec)
        embeddings.check_feedback(row_feedback, self._row_codec)
        self._row_feedback = row_feedback
        self._mode = mode
        self._max_staleness = max_staleness
        self._pull_ahead = pull_ahead
        self._partitioner = variable_partitioner
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
        embeddings.refuse_what_needs_tables(self.model)
        check_staleness(mode, max_staleness, len(self._cluster.workers), pull_ahead)

    def export(self, path) -> None:
        """Writes the model, for use without a cluster.

        Args:
            path: of a `.keras` file, for which the chief must have the memory of each table in
                turn; or else of a new directory, into which tables go block by block:
                `tfqcomm.parameter_server.load_export` reads it.
        """
        self._watch.call_roll()
        if self._ready:
            self._watch.run(self._fetch)
        if str(path).endswith(".keras"):
            self.model.save(path)
        else:
            self._watch.run(exported.export, self.model, path)

    def _building(self):
        make = embeddings.on_servers(self._cluster.servers)
        return embeddings.placing_tables(self._made_there, make)

    def _build_optimizer(self):
        """With slots of one row of tables, in place of which come those of the servers."""
        model, servers = self.model, self._cluster.servers
        self._tables = embeddings.find_tables(model, self._rows_from, len(servers))
        embeddings.settle(model, self._tables, servers)
        with _tf_private.as_one_row([table.weights for table in self._tables]):
            super()._build_optimizer()

    def _evaluate(self, call, *args, **kwargs):
        """Under the eyes of the watch if that needs servers."""
        if not embeddings.elsewhere(self.model):
            return call(*args, **kwargs)
        with embeddings.naming_strange_ids():
            return self._watch.run(functools.partial(call, *args, **kwargs))

    def _make(self, makers, loss_scale):
        model, cluster = self.model, self._cluster
        workers = len(cluster.workers)
        tables = self._tables
        reasons = [optimizers.whole_only(self.optimizer, v) for v in model.trainable_variables]
        pieces = partition(
            [tuple(v.shape) for v in model.trainable_variables],
            len(cluster.servers),
            self._partitioner,
            {i: reason for i, reason in enumerate(reasons) if reason},
            {table.variable for table in tables},
        )
        options = optimizers.options_of(self.optimizer, 1, **self._arguments)
        large = sum(p.size for p in pieces if options.reaches(p.shape, p.size))
        options = optimizers.options_of(self.optimizer, large, **self._arguments)
        servers = make_servers(
            model,
            pieces,
            tables,
            self._row_codec,
            cluster.servers,
            lambda *own: Format(*own, options, self._weight_codec, alone_from=ALONE_FROM),
            workers,
            1.0 if self._mode == "sync" else 1.0 / workers,
            inboxes=self._mode == "sync" or self._max_staleness is not None,
        )
        program = Program(
            model,
            servers,
            pieces,
            tables,
            loss_scale,
            workers,
            pull_ahead=self._pull_ahead,
            row_feedback=self._row_feedback,
        )
        fleet = make_fleet(self._cluster, self._watch, Worker, program, servers, makers, loss_scale)
        memories = memory.Memories(fleet, program)
        meter = self._register(
            routes(program),
            residuals=memory.Residuals(memories),
            worker_state=memory.WorkerState(memories),
        )
        if tables:
            self._ledger.tables = TableFiles(fleet, program, memories)
        return fleet, ChiefCopy(model, pieces, tables, servers), memories, meter

    def _send(self):
        super()._send()
        for worker in self._fleet.workers:
            worker.has_pulled = False  # what it has is not what the chief has sent

    def _driver(self):
        if self._mode == "sync":
            return Synchronous(self._fleet)
        if self._max_staleness is None:
            return FreeRunning(self._fleet, Asynchronous(self._fleet))
        return FreeRunning(self._fleet, Bounded(self._fleet, self._max_staleness))
