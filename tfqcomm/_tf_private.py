"""Every touch of a private TensorFlow or Keras name, each with its reason.

Checked on TensorFlow 2.20 and 2.21 with Keras 3.10 and 3.15. When an upgrade breaks something,
it breaks here: the functions below are the whole surface, and no other file may reach past it
(`tests/test_private_names.py` holds that).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend
from keras.src.backend.tensorflow import trainer
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.trainers.data_adapters import tf_dataset_adapter
from tensorflow.python.autograph.core import ag_ctx as autograph_ctx
from tensorflow.python.autograph.impl import api as autograph
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    cross_device_utils,
    distribute_lib,
    input_lib,
)
from tensorflow.python.distribute import values as distributed_values
from tensorflow.python.eager import context, executor
from tensorflow.python.ops import collective_ops, control_flow_util, resource_variable_ops

# ---------------------------------------------------------------------------- TensorFlow: graphs


def in_xla_context() -> bool:
    """Whether ops are being built for XLA: there is no public way to ask."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def local_variable(value, *, name: str, device: str | None = None) -> tf.Variable:
    """A plain variable of this process, which no strategy mirrors and no checkpoint tracks.

    `tf.Variable` would be mirrored by the strategy in whose scope the caller happens to run.
    """
    with tf.init_scope(), tf.device(device):
        return resource_variable_ops.ResourceVariable(value, trainable=False, name=name)


# ----------------------------------------------------------------------- TensorFlow: collectives


def process_count(strategy: tf.distribute.Strategy) -> int:
    """Processes that take part in `strategy`'s collectives (1 unless it is multi-worker)."""
    return getattr(strategy.extended, "_num_workers", 1)


def process_rank(strategy: tf.distribute.Strategy) -> int:
    """This process' index in [0, process_count)."""
    return getattr(strategy.extended, "_id_in_cluster", 0)


def process_tasks(strategy: tf.distribute.Strategy) -> list[str]:
    """TensorFlow's name of every process in rank order."""
    cluster = strategy.extended._cluster_spec
    return [
        f"/job:{job}/replica:0/task:{task}"
        for job in ("chief", "worker")
        if job in cluster.jobs
        for task in range(cluster.num_tasks(job))
    ]


def process_addresses(strategy: tf.distribute.Strategy) -> list[str]:
    """`host:port` of every process in rank order; empty on a single process."""
    cluster = getattr(strategy.extended, "_cluster_spec", None)
    if not cluster:
        return []
    return [*cluster.as_dict().get("chief", []), *cluster.as_dict().get("worker", [])]


_FIRST_FIXED_KEY = 1 << 30  # TensorFlow draws its own keys from 100 upwards

_doing = threading.local()
_places: dict[int, str] = {}  # number of a place -> its text


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what the collectives launched, or traced, in this scope are for.

    The text is part of what pairs them up, so it must be the same on all processes.
    """
    before = getattr(_doing, "what", "")
    _doing.what = what
    try:
        yield
    finally:
        _doing.what = before


def place_text(number: int) -> str:
    """What a place that `Progress` has noted is called."""
    return _places.get(number, "the beginning")


def _place(kind: str, value: tf.Tensor) -> int:
    """Numbers a place in the program: the same on all processes, whenever it was traced."""
    what = getattr(_doing, "what", "") or "a collective of the program's own"
    text = f"{what} ({kind}, {value.dtype.name}{value.shape})"
    number = _FIRST_FIXED_KEY | zlib.crc32(text.encode()) >> 2
    if _places.setdefault(number, text) != text:
        raise RuntimeError(f"Two collectives share a key: {text!r} and {_places[number]!r}")
    return number


class Progress:
    """How far this process is among its collectives: noted in the graph, read by the watch.

    Noting one also keeps the next from beginning before it has ended, as TensorFlow's ordering
    token does, so the n-th collective of every process is the same.
    """

    def __init__(self):
        zero = np.zeros([2], np.int64)  # begun and ended
        self._counts = local_variable(zero, name="collectives", device="CPU:0")
        self._at = local_variable(np.int64(0), name="place", device="CPU:0")

    def begin(self, place: int, value: tf.Tensor) -> tf.Tensor:
        """`value`, once it is known that the collective at `place` begins with it."""
        with tf.control_dependencies([value]), tf.device("CPU:0"):
            noted = [
                self._at.assign(place, read_value=False),
                self._counts.assign_add([1, 0], read_value=False),
            ]
        with tf.control_dependencies([] if tf.executing_eagerly() else noted):
            return tf.identity(value)

    def end(self, result: tf.Tensor) -> tf.Tensor:
        """`result`, and notes that the collective has ended."""
        with tf.control_dependencies([result]), tf.device("CPU:0"):
            self._counts.assign_add([0, 1], read_value=False)
        return result

    def read(self) -> tuple[int, int, int]:
        """Collectives begun, ended, and the number of the last one's place; eager."""
        begun, ended = self._counts.numpy()
        return int(begun), int(ended), int(self._at.numpy())


class Launcher(cross_device_utils.CollectiveReplicaLauncher):
    """Launches collectives with keys that are used again from step to step.

    TensorFlow draws a new key for every execution, keeps 2 KB about each for ever, and asks the
    group's leader about it first. A key may be used again once its collective has ended in this
    process, for then all peers have taken what they were sent; executions are in program order. So
    a place in the program has one key. Where a length is known at run time only, TensorFlow would
    refuse to see the key again with another one, and its own way is kept; on GPUs likewise.

    A time limit would cost a thread for each collective that sleeps until the limit: there is none
    but what a caller's own options name. The watch ends the wait for those who do not come.

    Args:
        progress: notes what is launched; None where several replicas of one process must be in a
            collective at a time.
    """

    def __init__(self, group_key, group_size, keys, device, options, progress: Progress | None):
        super().__init__(group_key, group_size, keys, device, options)
        self._progress = progress

    @classmethod
    def like(cls, launcher, progress: Progress | None) -> Launcher:
        """One that does what TensorFlow's `launcher` would."""
        return cls(
            launcher._group_key,
            launcher._group_size,
            launcher._collective_keys,
            launcher._device,
            launcher._options,
            progress,
        )

    def all_reduce(self, input_tensor, control_input=None, options=None):
        """Sums over the group."""
        launch = functools.partial(self.launch, "all-reduce", collective_ops.all_reduce_v2)
        with self._control_input(control_input):
            return launch(input_tensor, options)

    def _all_gather(self, input_tensor, options):
        return self.launch("all-gather", collective_ops.all_gather_v2, input_tensor, options)

    def all_to_all(self, value):
        """Sends row p to member p of the group."""
        return self.launch("all-to-all", collective_ops.all_to_all_v2, value)

    def broadcast(self, value, source: tf.Tensor, rank: int, processes: range):
        """Gives `value` of process `source`, a scalar known at run time only, to `processes`.

        The runtime must be told while the graph is built who sends: so both are, and one runs.
        """
        group_key = self._group_key  # of all; a smaller group has a key of its own
        if len(processes) < self._group_size:
            group_key += 1000 + processes.start * self._group_size + processes.stop
        own = {"group_key": group_key, "group_size": len(processes), "ordering_token": None}

        def send(value, **group):
            del group["ordering_token"]  # a broadcast takes none
            return tf.cond(
                tf.equal(source, rank),
                lambda: collective_ops.broadcast_send_v2(value, **group),
                lambda: collective_ops.broadcast_recv_v2(value.shape, value.dtype, **group),
            )

        return self.launch("broadcast", send, value, **own)

    def launch(self, kind, collective, value, options=None, **more):
        """Runs `collective` on `value`, noting that it begins and ends."""
        options = self._options.merge(options)
        value = tf.convert_to_tensor(value)
        place = _place(kind, value)
        group = {
            "group_size": self._group_size,
            "group_key": self._group_key,
            "instance_key": self._key(place, value),
            "communication_hint": options.implementation.value,
            "timeout": options.timeout_seconds or 0,
            "ordering_token": self._get_ordering_token(),
            **more,
        }
        with tf.device(self._device):
            if self._progress is None:
                return collective(value, **group)
            return self._progress.end(collective(self._progress.begin(place, value), **group))

    def _key(self, place, value):
        if value.shape.is_fully_defined() and "GPU" not in self._device:
            with tf.device("CPU:0"):
                return tf.constant(place, tf.int32)
        return self._next_instance_key()


class Collectives:
    """One process' end of the collectives between processes, on one device of each.

    Args:
        strategy: whose processes take part.
        device: of this process.
        aside: whether these may run beside those of the program: for the watch.
    """

    def __init__(self, strategy: tf.distribute.Strategy, device: str, *, aside: bool = False):
        extended = strategy.extended
        self.size = process_count(strategy)
        self.rank = process_rank(strategy)
        self._options = extended._communication_options
        keys = extended._collective_keys
        group_key = keys.get_group_key((device, "aside") if aside else (device,))
        self._launcher = Launcher(
            group_key, self.size, keys, device, self._options, None if aside else extended.progress
        )

    def all_gather(self, value: tf.Tensor) -> tf.Tensor:
        """Concatenates every process' `value` along the first axis."""
        return self._launcher._all_gather(value, self._options)

    def all_reduce(self, value: tf.Tensor) -> tf.Tensor:
        """Sums `value` over the processes."""
        return self._launcher.all_reduce(value)

    def all_to_all(self, value: tf.Tensor) -> tf.Tensor:
        """Sends row p of `value` to process p; row p of the result came from process p."""
        return self._launcher.all_to_all(value)

    def broadcast(self, value: tf.Tensor, source: tf.Tensor, processes: range) -> tf.Tensor:
        """Gives `value` of process `source`, a scalar known at run time only, to `processes`."""
        return self._launcher.broadcast(value, source, self.rank, processes)


def progress_of(strategy: tf.distribute.Strategy) -> Progress:
    """What `strategy`'s collectives note of themselves."""
    return strategy.extended.progress


def abort_collectives(message: str) -> None:
    """Ends all collectives of this process, now and for good, with this error."""
    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, message)


def peer_failure(strategy: tf.distribute.Strategy, process: int, timeout_seconds: float):
    """Why a process does not answer; None if it does. Waits for the answer."""
    task = process_tasks(strategy)[process]
    try:
        context.context().check_collective_ops_peer_health(
            task, timeout_in_ms=int(timeout_seconds * 1000)
        )
    except tf.errors.OpError as error:
        return f"{task} is down: {error.message}"
    return None


class WorkerExtended(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    """The multi-worker strategy's engine, with what TensorFlow's constructor cannot set.

    * several logical CPUs per process (TensorFlow takes the first alone);
    * variables that are not sent by the chief one by one as they are made: `on_new_variable` hears
      of each, and sees to it that all workers have the same;
    * no coordination service, which waits for a worker that never comes without limit, and says of
      one that died at most that a heartbeat was missed; nor TensorFlow's own check of its peers'
      health: the package's watch does that and more;
    * collectives of `Launcher`.

    Attributes:
        progress: of the collectives.
        timeout_seconds: how long others are waited for.
    """

    _strategies = 0  # of this process, so far

    def __init__(
        self, strategy, *, devices_per_worker, on_new_variable, communication_options, **kwargs
    ):
        self._devices_per_worker = devices_per_worker
        self._on_new_variable = on_new_variable
        self.timeout_seconds = communication_options.timeout_seconds
        super().__init__(
            strategy, communication_options=_without_timeout(communication_options), **kwargs
        )

    def _initialize_multi_worker(self, cluster_resolver):
        cls = WorkerExtended
        if cls._strategies:
            # One server serves all strategies of a process: starting it again would abort the
            # collectives of whoever is ahead. Each strategy draws keys of its own.
            self._std_server_started = True
            self._collective_key_base = cls._strategies * 1_000_000
        elif context.context().coordination_service is None:
            context.context().configure_coordination_service(service_type="")  # do without
        cls._strategies += 1
        super()._initialize_multi_worker(cluster_resolver)
        self.progress = Progress()
        for ops in (self._cross_device_ops, self._host_cross_device_ops):
            progress = self.progress if len(ops._launchers) == 1 else None
            ops._launchers = [Launcher.like(launcher, progress) for launcher in ops._launchers]

    def _start_check_health_thread(self):
        """Waits until all workers are there; TensorFlow would go on to check their health."""
        nothing = tf.identity([])
        limit = tf.distribute.experimental.CommunicationOptions(
            timeout_seconds=self.timeout_seconds,
            implementation=tf.distribute.experimental.CommunicationImplementation.RING,
        )
        try:
            self._host_cross_device_ops.reduce(
                tf.distribute.ReduceOp.SUM, nothing, nothing, options=limit
            )
        except tf.errors.DeadlineExceededError:
            raise RuntimeError(
                f"Timeout waiting for the cluster, timeout is {self.timeout_seconds:g} seconds"
            ) from None

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        devices, kind = super()._initialize_local_devices(cluster_resolver, worker_device)
        if self._devices_per_worker is not None and kind == "CPU":
            devices = tuple(
                f"{worker_device}/device:CPU:{i}" for i in range(self._devices_per_worker)
            )
        return devices, kind

    def _create_variable(self, next_creator, **kwargs):
        variable = super()._create_variable(next_creator, **kwargs)
        if tf.executing_eagerly() and self._num_workers > 1:
            self._on_new_variable(variable)
        return variable

    def _get_variable_creator_initial_value(self, replica_id, device, primary_var, **kwargs):
        creator = super()._get_variable_creator_initial_value
        if replica_id != 0 or self._num_workers == 1:
            return creator(replica_id, device, primary_var, **kwargs)

        def initial_value():
            value = kwargs["initial_value"]
            value = value() if callable(value) else value
            value = tf.convert_to_tensor(
                getattr(value, "wrapped_value", value), dtype=kwargs.get("dtype")
            )
            if tf.executing_eagerly():
                return value  # compared later, with all that are new
            # In a tf.function (an optimizer that is built in its first step) constants, as zeros
            # are, are equal as the programs are. What is computed comes from the chief.
            if tf.get_static_value(value) is not None:
                return value
            return creator(replica_id, device, primary_var, **{**kwargs, "initial_value": value})()

        return initial_value


def _without_timeout(options):
    return tf.distribute.experimental.CommunicationOptions(
        bytes_per_pack=options.bytes_per_pack, implementation=options.implementation
    )


def copies_of(variable: tf.Variable) -> tuple[tf.Variable, ...]:
    """A distributed variable's copies on this process' replicas; a plain one is its only copy."""
    return getattr(variable, "_values", (variable,))


def init_strategy(strategy: tf.distribute.Strategy, extended: WorkerExtended) -> None:
    """Constructs `strategy` around `extended`.

    `tf.distribute.MultiWorkerMirroredStrategy.__init__` builds its own engine; its parent takes
    one.
    """
    distribute_lib.Strategy.__init__(strategy, extended)


def cross_device_ops(strategy: tf.distribute.Strategy) -> tf.distribute.CrossDeviceOps | None:
    """The cross-device ops a strategy was built with."""
    return getattr(strategy.extended, "_cross_device_ops", None)


# ------------------------------------------------------------------------------ Keras: optimizers


class OptimizerSeam(keras.optimizers.Optimizer):
    """A Keras optimizer whose step is its own, from local gradients to weights.

    Keras' `apply` unscales and filters the local gradients, then calls the private methods below;
    a subclass gets one public method, `distributed_step`, for all of them.
    """

    def distributed_step(self, gradients, variables, learning_rate):
        """Exchanges the local `gradients`, and takes the whole of the step (abstract).

        That is weight decay, `update_step`, moving averages and constraints: `update_variables`.
        """
        raise TypeError(f"{type(self).__name__} must define `distributed_step`")

    def _backend_apply_gradients(self, grads, trainable_variables):
        if self.gradient_accumulation_steps:
            super()._backend_apply_gradients(grads, trainable_variables)  # gathers, now and then:
        else:
            _take_step(self, self.distributed_step, grads, trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.distributed_step(grads, trainable_variables, learning_rate)

    def _apply_weight_decay(self, variables):
        pass  # part of the step, which may be skipped as a whole

    def decay_step(self, variable, learning_rate):
        """Keras' decoupled weight decay of one variable, before its `update_step`."""
        rate = tf.cast(learning_rate, variable.dtype) * tf.cast(self.weight_decay, variable.dtype)
        variable.assign_sub(variable * rate)


Step = Callable[[keras.optimizers.Optimizer, list, list, tf.Tensor], None]
_find_step: Callable[[keras.optimizers.Optimizer], Step | None] | None = None


def intercept_stock_optimizers(find_step: Callable[[keras.optimizers.Optimizer], Step | None]):
    """Lets `find_step(optimizer)` take over the exchange and update of Keras' own optimizers.

    TensorFlow's seam, `CrossDeviceOps.batch_reduce`, sees nameless tensors: not whose gradients
    they are, nor that they are gradients at all, and it cannot skip the update that follows. The
    method wrapped here knows all three, and comes before anything of an optimizer changes. Where
    `find_step` answers None, Keras' code runs.
    """
    global _find_step
    if _find_step is None:
        _wrap(TFOptimizer, "_backend_apply_gradients", _apply_unless_intercepted)
        _wrap(TFOptimizer, "_backend_update_step", _update_also_in_cross_replica_context)
    _find_step = find_step


def _wrap(cls, name, wrapper):
    # Where it is defined: Keras asks whether `Model.compile` is still that of its base class, and
    # would not compile a model that it loads.
    owner = next(base for base in cls.__mro__ if name in vars(base))
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return wrapper(original, self, *args, **kwargs)

    method.wrapped_by_tfqcomm = True
    setattr(owner, name, method)


def _is_wrapped(method) -> bool:
    return getattr(method, "wrapped_by_tfqcomm", False)


def _apply_unless_intercepted(original, optimizer, grads, trainable_variables):
    step = None if isinstance(optimizer, OptimizerSeam) else _find_step(optimizer)
    if step is None:
        original(optimizer, grads, trainable_variables)
    else:
        _take_step(optimizer, functools.partial(step, optimizer), grads, trainable_variables)


def _take_step(optimizer, step, grads, trainable_variables):
    step(optimizer._clip_gradients(grads), list(trainable_variables), optimizer.learning_rate)
    # Keras' `apply` will go through this list, its own, once more, for constraints. They are part
    # of the step, and a step that was skipped changes nothing.
    trainable_variables.clear()


def _update_also_in_cross_replica_context(original, optimizer, grads, variables, learning_rate):
    if tf.distribute.in_cross_replica_context():  # in the middle of `update_variables`
        _update_each(optimizer, tf.distribute.get_strategy(), variables, grads, learning_rate)
    else:
        original(optimizer, grads, variables, learning_rate)


def update_variables(optimizer, strategy, variables, gradients, learning_rate) -> None:
    """All that changes in one step of `optimizer`, each variable where it lives.

    Weight decay, `update_step`, moving averages, constraints: in Keras' order, and nothing else
    of a step may change anything, or one that is skipped would.

    Args:
        variables: `tf.Variable`s, mirrored or not.
        gradients: one tensor for each, the same on all replicas.
    """
    for variable in variables:
        _decay(optimizer, strategy, variable, learning_rate)
    if isinstance(optimizer, OptimizerSeam):
        _update_each(optimizer, strategy, variables, gradients, learning_rate)
    else:  # Nadam multiplies its momenta here, once for all variables
        optimizer._backend_update_step(gradients, variables, learning_rate)
    finish_step(optimizer, strategy, variables)


def _update_each(optimizer, strategy, variables, gradients, learning_rate):
    for variable, gradient in zip(variables, gradients, strict=True):
        strategy.extended.update(
            variable,
            lambda v, g, lr: optimizer.update_step(g, v, lr),
            args=(gradient, learning_rate),
            group=False,
        )


def _decay(optimizer, strategy, variable, learning_rate):
    method = type(optimizer)._apply_weight_decay
    if method not in (TFOptimizer._apply_weight_decay, OptimizerSeam._apply_weight_decay):
        known = optimizer._trainable_variables[variable_index(optimizer, variable)]

        def step(local, rate):  # Muon has a method of its own; here it sees the local copy alone
            optimizer._apply_weight_decay([known])

    elif decays(optimizer, variable):
        keras_own = functools.partial(OptimizerSeam.decay_step, optimizer)
        step = getattr(optimizer, "decay_step", keras_own)
    else:
        return
    strategy.extended.update(variable, step, args=(learning_rate,), group=False)


def finish_step(optimizer, strategy, variables) -> None:
    """What Keras' `apply` does once `variables` are updated: moving averages, constraints."""
    if optimizer.gradient_accumulation_steps:
        return  # Keras does it itself, after every batch it gathers
    if optimizer.use_ema:
        _average_weights(optimizer, strategy)
    for variable in variables:
        known = optimizer._trainable_variables[variable_index(optimizer, variable)]
        constraint = getattr(known, "constraint", None)
        if constraint is not None:
            strategy.extended.update(
                variable,
                lambda v, constraint=constraint: v.assign(constraint(tf.convert_to_tensor(v))),
                group=False,
            )


def _average_weights(optimizer, strategy):
    """`use_ema`; every replica averages its own copies, so that nothing is sent."""
    known, averages = optimizer._trainable_variables, optimizer._model_variables_moving_average
    steps, every = optimizer.iterations, optimizer.ema_overwrite_frequency

    def update(average, value):
        momentum = tf.cast(tf.not_equal(steps, 0), value.dtype) * optimizer.ema_momentum
        average.assign(momentum * average + (1 - momentum) * value)

    for variable, average in zip(map(_value, known), averages, strict=True):
        if average is not None:
            strategy.extended.update(_value(average), update, args=(variable,), group=False)

    def overwrite():
        optimizer._overwrite_model_variables_with_average_value(known)
        return tf.constant(True)

    if every:
        tf.cond(tf.equal((steps + 1) % every, 0), overwrite, lambda: tf.constant(False))


def _value(variable) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def decays(optimizer, variable) -> bool:
    """Whether the optimizer's weight decay acts on `variable`."""
    return optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)


def variable_index(optimizer, variable) -> int:
    """The position of `variable` among those the optimizer was built for."""
    return optimizer._get_variable_index(variable)


def agree_on_finite_gradients() -> None:
    """Makes Keras' optimizers of optimizers skip a step as one.

    `LossScaleOptimizer` asks the first local replica alone whether gradients are finite: an inf on
    another is applied, and two processes that see different answers wait for each other for ever.
    The parts of a `MultiOptimizer` know their own gradients alone, and some would take a step that
    the others skip.
    """
    if not _is_wrapped(keras.optimizers.LossScaleOptimizer.check_finite):
        _wrap(keras.optimizers.LossScaleOptimizer, "check_finite", _agreed_check_finite)
    several = getattr(keras.optimizers, "MultiOptimizer", None)  # Keras 3.10 has none
    if several is not None and not _is_wrapped(several.apply):
        _wrap(several, "apply", _apply_all_or_none)


def _agreed_check_finite(original, optimizer, grads):
    finite = original(optimizer, grads)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return finite
    failures = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.float32))
    return tf.equal(failures, 0.0)


def _apply_all_or_none(original, optimizer, grads, trainable_variables=None):
    parts = optimizer.optimizers
    if not any(isinstance(o, OptimizerSeam) or (_find_step and _find_step(o)) for o in parts):
        return original(optimizer, grads, trainable_variables)
    finite = [tf.reduce_all(tf.math.is_finite(_numbers(g))) for g in grads if g is not None]
    if any(g is not None for g in grads):
        poison = tf.where(tf.reduce_all(finite), 0.0, float("nan"))  # one for all
        grads = [g if g is None else _plus(g, poison) for g in grads]
    before = [tf.identity(o.iterations.value) for o in parts]
    original(optimizer, grads, trainable_variables)
    moved = [tf.not_equal(o.iterations, was) for o, was in zip(parts, before, strict=True)]
    skipped = tf.cast(~tf.reduce_any(moved), optimizer.iterations.dtype)
    optimizer.iterations.assign_sub(skipped)


def _numbers(gradient):
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _plus(gradient, number):
    number = tf.cast(number, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values + number, gradient.indices, gradient.dense_shape)
    return gradient + number


def pass_losses_on() -> None:
    """Shows the loss to the optimizer inside a `LossScaleOptimizer`: Keras asks the outer alone."""
    if not _is_wrapped(keras.optimizers.LossScaleOptimizer.scale_loss):
        _wrap(keras.optimizers.LossScaleOptimizer, "scale_loss", _observed_scale_loss)


def _observed_scale_loss(original, optimizer, loss):
    observe = getattr(optimizer.inner_optimizer, "observe_loss", None)
    if observe is not None:
        observe(loss)
    return original(optimizer, loss)


# ---------------------------------------------------------------------------------- Keras: models

_models = weakref.WeakKeyDictionary()  # optimizer -> weak reference to the model it trains
_called = weakref.WeakKeyDictionary()  # layer -> None; in the order of first calls, as everywhere
_trained = weakref.WeakKeyDictionary()  # optimizer -> weak references to those it trains


def remember_models() -> None:
    """Notes what an optimizer may train: the model of a `fit`, and layers that a replica calls.

    An optimizer sees trainable variables only; the moving statistics of batch normalization are
    reached through the layers that hold both.
    """
    if not _is_wrapped(keras.Model.make_train_function):
        _wrap(keras.Model, "make_train_function", _note_model)
        _wrap(keras.layers.Layer, "__call__", _note_call)


def agree_before_compile() -> None:
    """Lets workers compare their optimizers before `compile` creates the optimizers' variables.

    Afterwards it is too late: one worker creates a variable while the other does something else.
    Also lets an optimizer say that XLA cannot compile its step (`supports_jit`, as layers do),
    where Keras decides by itself.
    """
    if not _is_wrapped(keras.Model.compile):
        _wrap(keras.Model, "compile", _agree_and_compile)


def _agree_and_compile(original, model, *args, **kwargs):
    agree = getattr(model.distribute_strategy, "agree_on_optimizer", None)
    given = inspect.signature(original).bind(model, *args, **kwargs)
    given.apply_defaults()
    if agree is not None and tf.executing_eagerly():
        agree(given.arguments["optimizer"])
    automatic = given.arguments.get("jit_compile") == "auto"
    if automatic and not getattr(given.arguments["optimizer"], "supports_jit", True):
        given.arguments["jit_compile"] = False
    return original(*given.args, **given.kwargs)


def _note_model(original, model, *args, **kwargs):
    for optimizer in optimizers_of(model):  # a GAN has several
        _models[optimizer] = weakref.ref(model)
    return original(model, *args, **kwargs)


def _note_call(original, layer, *args, **kwargs):
    in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
    if in_replica and layer not in _called:
        _called[layer] = None
        _trained.clear()
    return original(layer, *args, **kwargs)


def optimizers_held_by(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The compiled optimizer, then those a custom model holds, then those in its containers."""
    held = [getattr(model, "optimizer", None), *vars(model).values()]
    found = [o for o in held if isinstance(o, keras.optimizers.Optimizer)]
    found += [o for value in held for o in _contained(value)]
    return list({id(o): o for o in found}.values())


def _contained(value) -> list[keras.optimizers.Optimizer]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [o for one in value for o in _contained(one)]
    return [value] if isinstance(value, keras.optimizers.Optimizer) else []


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Likewise; of an optimizer that wraps others, those: it exchanges nothing itself."""
    found = [o for held in optimizers_held_by(model) for o in _unwrapped(held)]
    return list({id(o): o for o in found}.values())


def _unwrapped(optimizer) -> list[keras.optimizers.Optimizer]:
    inner = getattr(optimizer, "inner_optimizer", None)  # of a `LossScaleOptimizer`
    if inner is not None:
        return _unwrapped(inner)
    return list(getattr(optimizer, "optimizers", [optimizer]))  # the parts of a `MultiOptimizer`


def trained_weights(optimizer, model: keras.Model) -> list[int] | None:
    """The places among the model's weights of those the optimizer was built for; None: not yet."""
    if not optimizer.built:
        return None
    place = {id(v): i for i, v in enumerate(model.weights)}
    return [place[id(v)] for v in optimizer._trainable_variables if id(v) in place]


def trained_by(optimizer) -> list[keras.layers.Layer]:
    """What holds the variables of `optimizer`: its model in `fit`, and layers that were called."""
    if optimizer not in _trained:
        own = {id(v) for v in optimizer._trainable_variables}
        layers = [layer for layer in _called if any(id(v) in own for v in layer.weights)]
        inside = {id(one) for layer in layers for one in layer._flatten_layers(include_self=False)}
        layers = [layer for layer in layers if id(layer) not in inside]
        _trained[optimizer] = [weakref.ref(layer) for layer in layers]
    found = [_models.get(optimizer, lambda: None)(), *(one() for one in _trained[optimizer])]
    return [layer for layer in found if layer is not None]


def statistics(model: keras.layers.Layer) -> list[keras.Variable]:
    """Float state that layers update while they train, such as batch norm's moving averages.

    Weights that a user froze are not among them, nor is the state of frozen layers, nor that of a
    stateful RNN, which Keras does not count among weights.
    """
    found = []
    for layer in model._flatten_layers():
        if layer.trainable:  # bfloat16 is a float, too
            found += [v for v in layer._non_trainable_variables if "float" in v.dtype]
    return list({id(v): v for v in found}.values())


def resume_at_epoch(model: keras.Model, epoch: int | None) -> None:
    """Makes a `fit` that is about to start begin at `epoch`, as Keras' own callback does.

    It holds for every later `fit`, too, until it is None.
    """
    model._initial_epoch = epoch


# ------------------------------------------------------------------------------ Parameter servers


@functools.cache
def _executor(device: str) -> executor.Executor:
    return executor.new_executor(enable_async=False)


@contextlib.contextmanager
def executor_scope(device: str) -> Iterator[None]:
    """Scope in which eager operations have a status of their own, one for each device.

    Otherwise an operation that fails on a lost task makes those of other threads fail, too.
    """
    own = _executor(device)
    try:
        with context.executor_scope(own):
            yield
    except tf.errors.OpError:
        own.clear_error()  # it would be raised once more when the process ends
        raise


def share_functions(chief: str = "chief") -> None:
    """Lets the tasks of the cluster call functions that were traced before it was connected.

    TensorFlow gives a task, when it joins, all functions there are, but not when the cluster is
    connected first: so all leave for a moment. Codecs are traced once per process.
    """
    everybody = context.get_server_def()
    alone = type(everybody)()
    alone.CopyFrom(everybody)
    del alone.cluster.job[:]
    alone.cluster.job.extend(job for job in everybody.cluster.job if job.name == chief)
    for server_def in (alone, everybody):
        context.context().update_server_def(server_def)


def reconnect() -> None:
    """Takes up again with the tasks of the cluster that were started anew; fails if any is gone.

    Meanwhile other threads may go on working with the rest of the cluster.
    """
    context.context().update_server_def(context.get_server_def())


def build_by_calling(model: keras.Model, batch) -> None:
    """Builds a model, its losses and its metrics by calling it on a batch.

    Keras' own way, to call it on a symbol of the batch's shape, loses that a tensor is ragged or
    sparse.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    outputs = model(x)
    symbols = [
        tf.nest.map_structure(lambda v: keras.KerasTensor(v.shape, v.dtype.name), values)
        for values in (y, outputs)
    ]
    for method in (model.compute_metrics, model._compute_loss):
        backend.compute_output_spec(method, None, *symbols, sample_weight=sample_weight)
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    model._post_build()


def build_from_spec(model: keras.Model, element_spec) -> None:
    """Builds a model, its losses and its metrics for batches of this spec, computing nothing."""
    model._symbolic_build(data_batch=element_spec)


def loss_tracker(model: keras.Model) -> keras.metrics.Metric:
    """The metric that `fit` shows as "loss"."""
    return model._loss_tracker


def first_epoch(model: keras.Model, default: int) -> int:
    """Where `resume_at_epoch` said to begin; said once, it holds for one `fit`."""
    epoch, model._initial_epoch = model._initial_epoch or default, None
    return epoch


def clip_gradients(optimizer: keras.optimizers.Optimizer, gradients: list) -> list:
    """The optimizer's own clipping, which its `apply` begins with."""
    return optimizer._clip_gradients(gradients)


def compute_loss(model: keras.Model, x, y, y_pred, sample_weight) -> tf.Tensor:
    """As `train_step` does it: an override need not have the argument `training`."""
    return model._compute_loss(x, y, y_pred, sample_weight, training=True)


def random_seeds(model: keras.Model) -> list[keras.Variable]:
    """The states that dropout and the like draw from, each (seed, numbers drawn)."""
    generators = [g for layer in model._flatten_layers() for g in layer._seed_generators]
    return list({id(g.state): g.state for g in generators}.values())


def may_decay(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether `variable` is not excluded from weight decay, as far as there is any."""
    return optimizer._use_weight_decay(variable)


def decay_exclusions(optimizer: keras.optimizers.Optimizer) -> tuple[bool, str | None]:
    """What `exclude_from_weight_decay` was told: whether variables, and a pattern of names."""
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    told = bool(getattr(optimizer, "_exclude_from_weight_decay", None))
    return told, pattern and pattern.pattern


def calls_for_learning_rate(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the learning rate is a function, which only the process that made it can call."""
    rate = optimizer._learning_rate
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return callable(rate) and not isinstance(rate, (schedule, keras.Variable))


def function_arguments(metric: keras.metrics.Metric) -> dict:
    """What a metric passes to its function: `CosineSimilarity`'s config does not tell `axis`."""
    return getattr(metric, "_fn_kwargs", {})


def weigh_classes(dataset: tf.data.Dataset, class_weight: dict) -> tf.data.Dataset:
    """Adds to each batch the sample weights that Keras' `fit` makes of `class_weight`."""
    return dataset.map(tf_dataset_adapter.make_class_weight_map_fn(class_weight))


# --------------------------------------------------------------------------------- Keras: trainer


def run_training_by(loop) -> None:
    """Lets `loop` take part in Keras' `fit`, `evaluate` and `predict`.

    Args:
        loop: has functions `fit`, `evaluate`, `predict`, `make_function`, `build` and `reduce`, each
            of what Keras would call and its arguments.
    """
    if not _is_wrapped(keras.Model.fit):
        _wrap(keras.Model, "fit", loop.fit)
        _wrap(keras.Model, "evaluate", loop.evaluate)
        _wrap(keras.Model, "predict", loop.predict)
        _wrap(keras.Model, "_make_function", loop.make_function)
        _wrap(keras.Model, "_maybe_symbolic_build", loop.build)
        original = trainer.reduce_per_replica

        def reduce_per_replica(values, strategy, reduction):
            return loop.reduce(original, values, strategy, reduction)

        trainer.reduce_per_replica = reduce_per_replica


def without_optionals(model: keras.Model, step: Callable) -> Callable:
    """`step` for data in which features may be missing."""
    convert = getattr(model, "_autoconvert_optionals", None)  # not in Keras 3.10
    return convert(step) if convert else step


def not_to_convert(function: Callable) -> Callable:
    """Marks what AutoGraph is to call as it is, and go on with what that calls, as in TensorFlow.

    `tf.autograph.experimental.do_not_convert` would switch AutoGraph off for the user's code, too.
    """
    return autograph.autograph_artifact(function)


def converted(function: Callable) -> Callable:
    """`function` as `tf.distribute.Strategy.run` would convert it for AutoGraph."""
    status = autograph_ctx.control_status_ctx()
    return autograph.tf_convert(function, status, convert_by_default=False)


def next_batch(iterator: tf.distribute.DistributedIterator):
    """Whether this process has a batch, and its batch: of no rows for a replica that has none.

    TensorFlow would ask all processes, at every step, whether any of them has data.

    Returns:
        Bool scalar, and an `Optional` that always has a value: so the batch may go from one
        tf.function to another without its size becoming part of their signatures.
    """
    has_batch, batch = _next_batch(iterator)
    return has_batch, tf.experimental.Optional.from_value(batch)


def _next_batch(iterator):
    strategy = iterator._strategy
    if iterator._cardinality == tf.data.INFINITE_CARDINALITY:
        return tf.constant(True), iterator._get_next_no_partial_batch_handling()
    workers = iterator._input_workers
    with tf.device(workers.worker_devices[0]):
        optionals = [iterator._iterators[0].get_next_as_optional_list()]
        has_batch = tf.reduce_any([optional.has_value() for optional in optionals[0]])
    values = input_lib._get_value_or_dummy(workers, optionals, produce_dummy=True)
    if iterator._replica_order is not None:
        values = iterator._reorder_replicas(values)
    values = tf.nest.map_structure(_of_any_number_of_rows, values)
    return has_batch, input_lib._create_per_replica(values, strategy)


def _of_any_number_of_rows(value):
    """Hides from the graph that a replica gets no rows: Keras takes the mean of such for NaN."""
    if tf.executing_eagerly() or not tf.is_tensor(value) or value.shape.rank in (None, 0):
        return value
    if isinstance(value, tf.Tensor) and value.shape[0] == 0:
        return tf.compat.v1.placeholder_with_default(value, [None, *value.shape[1:]])
    return value


def element_of_one_replica(strategy: tf.distribute.Strategy, iterator):
    """The next batch of this process' first replica; what batches look like if it has none."""
    has_batch, batch = _next_batch(iterator)
    first = tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], batch)
    leaves = tf.nest.flatten(first, expand_composites=True)
    if has_batch and all(leaf.shape.rank == 0 or leaf.shape[0] for leaf in leaves):
        return first
    return tf.nest.map_structure(_spec_of_one_replica, iterator.element_spec)


def _spec_of_one_replica(spec):
    return spec._value_specs[0] if isinstance(spec, distributed_values.PerReplicaSpec) else spec


def first_iterator(epoch_iterator):
    """The iterator with which an epoch of Keras' begins."""
    return next(item[-1] for item in epoch_iterator)  # the last of three; of two in Keras 3.10
