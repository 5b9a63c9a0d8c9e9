"""Every touch of a private TensorFlow or Keras name, each with its reason.

Checked on TensorFlow 2.20 and 2.21 with Keras 3.10 and 3.15. When an upgrade breaks something,
it breaks here: the functions below are the whole surface, and no other file may reach past it
(`tests/test_private_names.py` holds that).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.trainers.data_adapters import tf_dataset_adapter
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    cross_device_utils,
    distribute_lib,
)
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


def process_addresses(strategy: tf.distribute.Strategy) -> list[str]:
    """`host:port` of every process in rank order; empty on a single process."""
    cluster = getattr(strategy.extended, "_cluster_spec", None)
    if not cluster:
        return []
    return [*cluster.as_dict().get("chief", []), *cluster.as_dict().get("worker", [])]


class Collectives:
    """One process' end of the collectives between processes, on one device of each.

    The strategy keeps the keys that pair up collectives; only its own launcher class knows how to
    draw them at call time, which is what allows lengths to change from step to step.
    """

    def __init__(self, strategy: tf.distribute.Strategy, device: str):
        extended = strategy.extended
        self.size = process_count(strategy)
        self.rank = process_rank(strategy)
        self._options = extended._communication_options
        keys = extended._collective_keys
        self._group_key = keys.get_group_key((device,))
        self._launcher = cross_device_utils.CollectiveReplicaLauncher(
            self._group_key, self.size, keys, device, self._options
        )
        self._device = device

    def all_gather(self, value: tf.Tensor) -> tf.Tensor:
        """Concatenates every process' `value` along the first axis."""
        return self._launcher._all_gather(value, self._options)

    def all_reduce(self, value: tf.Tensor) -> tf.Tensor:
        """Sums `value` over the processes."""
        return self._launcher.all_reduce(value, None, self._options)

    def all_to_all(self, value: tf.Tensor) -> tf.Tensor:
        """Sends row p of `value` to process p; row p of the result came from process p."""
        with tf.device(self._device):
            return collective_ops.all_to_all_v2(
                value,
                group_size=self.size,
                group_key=self._group_key,
                instance_key=self._launcher._next_instance_key(),
                communication_hint=self._options.implementation.value,
                timeout=self._options.timeout_seconds or 0,
                ordering_token=self._launcher._get_ordering_token(),
            )

    def broadcast(self, value: tf.Tensor, source: tf.Tensor, processes: range) -> tf.Tensor:
        """Gives `value` of process `source`, a scalar known at run time only, to `processes`.

        The runtime must be told while the graph is built who sends: so both are, and one runs.
        """
        group_key = self._group_key  # of all; a smaller group has a key of its own
        if len(processes) < self.size:
            group_key += 1000 + processes.start * self.size + processes.stop
        group = {
            "group_size": len(processes),
            "group_key": group_key,
            "instance_key": self._launcher._next_instance_key(),
            "communication_hint": self._options.implementation.value,
            "timeout": self._options.timeout_seconds or 0,
        }
        with tf.device(self._device):
            return tf.cond(
                tf.equal(source, self.rank),
                lambda: collective_ops.broadcast_send_v2(value, **group),
                lambda: collective_ops.broadcast_recv_v2(value.shape, value.dtype, **group),
            )


class WorkerExtended(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    """The multi-worker strategy's engine, with three things TensorFlow's constructor cannot set.

    * several logical CPUs per process (TensorFlow takes the first alone);
    * a question to all workers before each variable is created, so that workers which build
      different models hear what differs instead of waiting for each other for ever, and values
      that all have anyway (an optimizer's zeros, seeded weights) are not sent;
    * TensorFlow's own check of its peers' health instead of the coordination service: it names the
      peer that died, where the service says at most that a heartbeat was missed, and it ends the
      wait for a worker that never comes, where the service waits without limit.
    """

    _check_health_interval = 5
    _check_health_timeout = 5
    _check_health_retry_limit = 2
    _strategies = 0  # of this process, so far

    def __init__(self, strategy, *, devices_per_worker, before_variable, **kwargs):
        self._devices_per_worker = devices_per_worker
        self._before_variable = before_variable
        self._check_health_initial_timeout = kwargs["communication_options"].timeout_seconds
        super().__init__(strategy, **kwargs)

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

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        devices, kind = super()._initialize_local_devices(cluster_resolver, worker_device)
        if self._devices_per_worker is not None and kind == "CPU":
            devices = tuple(
                f"{worker_device}/device:CPU:{i}" for i in range(self._devices_per_worker)
            )
        return devices, kind

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
            if self._before_variable(kwargs.get("name"), value):
                return value
            return creator(replica_id, device, primary_var, **{**kwargs, "initial_value": value})()

        return initial_value


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
    """A Keras optimizer whose exchange of gradients is its own.

    Keras' `apply` unscales, clips and filters the local gradients, then calls the two private
    methods below; a subclass gets one public method, `distributed_step`, for both.
    """

    def distributed_step(self, gradients, variables, learning_rate):
        """Exchanges the local `gradients` and updates `variables` (abstract)."""
        raise TypeError(f"{type(self).__name__} must define `distributed_step`")

    def _apply_weight_decay(self, variables):
        pass  # part of the step, which may be skipped as a whole

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.distributed_step(grads, trainable_variables, learning_rate)


Step = Callable[[keras.optimizers.Optimizer, list, list, tf.Tensor], None]
_find_step: Callable[[keras.optimizers.Optimizer], Step | None] | None = None


def intercept_stock_optimizers(find_step: Callable[[keras.optimizers.Optimizer], Step | None]):
    """Lets `find_step(optimizer)` take over the exchange and update of Keras' own optimizers.

    TensorFlow's seam, `CrossDeviceOps.batch_reduce`, sees nameless tensors: not whose gradients
    they are, nor that they are gradients at all, and it cannot skip the update that follows. The
    two methods wrapped here know all three. Where `find_step` answers None, Keras' code runs.
    """
    global _find_step
    if _find_step is None:
        _wrap(TFOptimizer, "_apply_weight_decay", _decay_unless_intercepted)
        _wrap(TFOptimizer, "_backend_update_step", _step_unless_intercepted)
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


def _decay_unless_intercepted(original, optimizer, variables):
    if _find_step(optimizer) is None:
        original(optimizer, variables)


def _step_unless_intercepted(original, optimizer, grads, trainable_variables, learning_rate):
    step = _find_step(optimizer)
    if step is None:
        original(optimizer, grads, trainable_variables, learning_rate)
    else:
        step(optimizer, grads, trainable_variables, learning_rate)


def update_variables(optimizer, strategy, variables, gradients, learning_rate) -> None:
    """Keras' decoupled weight decay, then its `update_step`, where each variable lives.

    Args:
        variables: `tf.Variable`s, mirrored or not.
        gradients: one tensor for each, the same on all replicas.
    """
    for variable, gradient in zip(variables, gradients, strict=True):
        if decays(optimizer, variable):
            strategy.extended.update(
                variable, _decay, args=(learning_rate, optimizer.weight_decay), group=False
            )
        strategy.extended.update(
            variable,
            lambda v, g, lr: optimizer.update_step(g, v, lr),
            args=(gradient, learning_rate),
            group=False,
        )


def _decay(variable, learning_rate, weight_decay):
    rate = tf.cast(learning_rate, variable.dtype) * tf.cast(weight_decay, variable.dtype)
    variable.assign_sub(variable * rate)


def decays(optimizer, variable) -> bool:
    """Whether the optimizer's weight decay acts on `variable`."""
    return optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)


def variable_index(optimizer, variable) -> int:
    """The position of `variable` among those the optimizer was built for."""
    return optimizer._get_variable_index(variable)


def agree_on_finite_gradients() -> None:
    """Makes `LossScaleOptimizer` ask all replicas whether the gradients are finite.

    Keras asks the first local replica alone: an inf on another is applied, and two processes
    that see different answers wait for each other for ever.
    """
    if not _is_wrapped(keras.optimizers.LossScaleOptimizer.check_finite):
        _wrap(keras.optimizers.LossScaleOptimizer, "check_finite", _agreed_check_finite)


def _agreed_check_finite(original, optimizer, grads):
    finite = original(optimizer, grads)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return finite
    failures = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.float32))
    return tf.equal(failures, 0.0)


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


def remember_models() -> None:
    """Notes which model an optimizer trains, each time `fit` starts.

    An optimizer sees trainable variables only; the moving statistics of batch normalization are
    reached through the model.
    """
    if not _is_wrapped(keras.Model.make_train_function):
        _wrap(keras.Model, "make_train_function", _note_model)


def agree_before_compile() -> None:
    """Lets workers compare their optimizers before `compile` creates the optimizers' variables.

    Afterwards it is too late: one worker creates a variable while the other does something else.
    """
    if not _is_wrapped(keras.Model.compile):
        _wrap(keras.Model, "compile", _agree_and_compile)


def _agree_and_compile(original, model, optimizer="rmsprop", *args, **kwargs):
    agree = getattr(model.distribute_strategy, "agree_on_optimizer", None)
    if agree is not None and tf.executing_eagerly():
        agree(optimizer, kwargs.get("steps_per_execution", 1))
    return original(model, optimizer, *args, **kwargs)


def _note_model(original, model, *args, **kwargs):
    for value in (model.optimizer, *vars(model).values()):  # a GAN has several
        if isinstance(value, keras.optimizers.Optimizer):
            _models[getattr(value, "inner_optimizer", value)] = weakref.ref(model)
    return original(model, *args, **kwargs)


def model_of(optimizer) -> keras.Model | None:
    """The model that `optimizer` was last seen training in `fit`."""
    reference = _models.get(optimizer)
    return reference() if reference else None


def statistics(model: keras.Model) -> list[keras.Variable]:
    """Float state that layers update while they train, such as batch norm's moving averages.

    Weights that a user froze are not among them, nor is the state of frozen layers.
    """
    found = []
    for layer in model._flatten_layers():
        if layer.trainable:
            found += [v for v in layer._non_trainable_variables if v.dtype.startswith("float")]
    return list({id(v): v for v in found}.values())


def resume_at_epoch(model: keras.Model, epoch: int) -> None:
    """Makes a `fit` that is about to start begin at `epoch`, as Keras' own callback does."""
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
