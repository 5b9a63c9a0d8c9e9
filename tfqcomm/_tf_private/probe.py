"""Looks for every private TensorFlow or Keras name that `_tf_private` uses, when it is imported.

Where an upgrade has renamed or changed one, `import tfqcomm` fails with one ImportError that names
it. Without that the first sign might be a model that trains in another way.

Each line is a name, `module:attribute.attribute`, and what is expected of it: the parameters that
are passed to it or that an override of it takes, or None where only its presence counts. A method
may have more of them, if these have defaults. `SET` are names that a class sets on itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator

CHECKED_ON = "TensorFlow 2.20 and 2.21 with Keras 3.10 and 3.15"

_STRATEGY = "tensorflow.python.distribute.collective_all_reduce_strategy"
_EXTENDED = f"{_STRATEGY}:CollectiveAllReduceExtended"
_LAUNCHER = "tensorflow.python.distribute.cross_device_utils:CollectiveReplicaLauncher"
_KEYS = "tensorflow.python.distribute.cross_device_utils:CollectiveKeys"
_OPS = "tensorflow.python.ops.collective_ops"
_CONTEXT = "tensorflow.python.eager.context"
_INPUT = "tensorflow.python.distribute.input_lib"
_GROUP = ("group_size", "group_key", "instance_key", "communication_hint", "timeout")
_OPTIMIZER = "keras.src.backend.tensorflow.optimizer:TFOptimizer"
_TRAINER = "keras.src.backend.tensorflow.trainer"
_MODEL = "keras:Model"

NAMES: dict[str, tuple[str, ...] | None] = {
    # graphs
    "tensorflow.python.ops.control_flow_util:GraphOrParentsInXlaContext": ("graph",),
    "tensorflow.python.ops.resource_variable_ops:ResourceVariable": None,
    "tensorflow.python.autograph.core.ag_ctx:control_status_ctx": (),
    "tensorflow.python.autograph.impl.api:tf_convert": ("f", "ctx", "convert_by_default"),
    "tensorflow.python.eager.polymorphic_function.polymorphic_function:Function._clone": (
        "python_function",
    ),
    # the register of kernels
    "tensorflow.python.framework.auto_control_deps:"
    "AutomaticControlDependencies.run_independently": ("op",),
    "tensorflow.python.framework.kernels:get_registered_kernels_for_op": ("name",),
    "tensorflow.python.framework.ops:Graph._get_function": ("name",),
    # collectives
    f"{_KEYS}.get_group_key": ("devices",),
    f"{_LAUNCHER}.__init__": ("group_key", "group_size", "collective_keys", "device", "options"),
    f"{_LAUNCHER}._control_input": ("control_input",),
    f"{_LAUNCHER}._get_ordering_token": (),
    f"{_LAUNCHER}._next_instance_key": (),
    f"{_LAUNCHER}._all_gather": ("input_tensor", "options"),
    f"{_LAUNCHER}.all_reduce": ("input_tensor", "control_input", "options"),
    f"{_OPS}:all_reduce_v2": ("t", *_GROUP, "ordering_token"),
    f"{_OPS}:all_gather_v2": ("t", *_GROUP, "ordering_token"),
    f"{_OPS}:all_to_all_v2": ("t", *_GROUP, "ordering_token"),
    f"{_OPS}:broadcast_send_v2": ("t", *_GROUP),
    f"{_OPS}:broadcast_recv_v2": ("shape", "dtype", *_GROUP),
    # the strategy
    "tensorflow.python.distribute.distribute_lib:Strategy.__init__": ("extended",),
    f"{_EXTENDED}.__init__": ("container_strategy", "cluster_resolver", "communication_options"),
    f"{_EXTENDED}._initialize_multi_worker": ("cluster_resolver",),
    f"{_EXTENDED}._initialize_local_devices": ("cluster_resolver", "worker_device"),
    f"{_EXTENDED}._get_variable_creator_initial_value": ("replica_id", "device", "primary_var"),
    f"{_EXTENDED}._start_check_health_thread": (),
    f"{_EXTENDED}._in_multi_worker_mode": (),
    f"{_CONTEXT}:context": (),
    f"{_CONTEXT}:get_server_def": (),
    f"{_CONTEXT}:executor_scope": ("e",),
    f"{_CONTEXT}:Context.coordination_service": None,
    f"{_CONTEXT}:Context.configure_coordination_service": ("service_type",),
    f"{_CONTEXT}:Context.abort_collective_ops": ("code", "message"),
    f"{_CONTEXT}:Context.check_collective_ops_peer_health": ("task", "timeout_in_ms"),
    f"{_CONTEXT}:Context.update_server_def": ("server_def",),
    f"{_CONTEXT}:Context.function_call_options": None,
    "tensorflow.python.eager.cancellation:CancellationManager.start_cancel": (),
    "tensorflow.python.eager.execute:execute_with_cancellation": (
        "op_name",
        "num_outputs",
        "inputs",
        "attrs",
        "ctx",
        "cancellation_manager",
    ),
    "tensorflow.python.eager.executor:new_executor": ("enable_async",),
    # data
    f"{_INPUT}:DistributedIterator._get_next_no_partial_batch_handling": (),
    f"{_INPUT}:DistributedIterator._reorder_replicas": ("replicas",),
    f"{_INPUT}:_get_value_or_dummy": ("input_workers", "optional_list", "produce_dummy"),
    f"{_INPUT}:_create_per_replica": ("value_list", "strategy"),
    "tensorflow.python.distribute.values:PerReplicaSpec": None,
    # Keras: optimizers
    f"{_OPTIMIZER}._apply_weight_decay": ("variables",),
    f"{_OPTIMIZER}._backend_apply_gradients": ("grads", "trainable_variables"),
    f"{_OPTIMIZER}._overwrite_model_variables_with_average_value": ("trainable_variables",),
    f"{_OPTIMIZER}._backend_update_step": ("grads", "trainable_variables", "learning_rate"),
    "keras:Optimizer._use_weight_decay": ("variable",),
    "keras:Optimizer._get_variable_index": ("variable",),
    "keras:Optimizer._clip_gradients": ("grads",),
    "keras:Optimizer.update_step": ("gradient", "variable", "learning_rate"),
    "keras.optimizers:LossScaleOptimizer.check_finite": ("grads",),
    "keras.optimizers:LossScaleOptimizer.scale_loss": ("loss",),
    # Keras: variables
    "keras:Variable._initialize": ("value",),
    "keras:Variable._maybe_autocast": ("value",),
    "tensorflow.python.util.dispatch:register_dispatchable_type": ("cls",),
    "keras.src.backend:numpy.take": ("x", "indices", "axis"),
    "keras.src.backend.common.stateless_scope:in_stateless_scope": (),
    # Keras: models
    f"{_MODEL}.make_train_function": ("force",),
    f"{_MODEL}.compile": ("optimizer", "loss", "metrics", "steps_per_execution", "jit_compile"),
    f"{_MODEL}._flatten_layers": (),
    f"{_MODEL}._compute_loss": ("x", "y", "y_pred", "sample_weight", "training"),
    f"{_MODEL}._post_build": (),
    f"{_MODEL}._symbolic_build": ("data_batch",),
    f"{_MODEL}._maybe_symbolic_build": ("iterator", "data_batch"),
    f"{_MODEL}._make_function": ("step_function",),
    "keras.src.backend:compute_output_spec": ("fn",),
    "keras.src.trainers.data_adapters.tf_dataset_adapter:make_class_weight_map_fn": (
        "class_weight",
    ),
    f"{_TRAINER}:reduce_per_replica": ("values", "strategy", "reduction"),
}

SET: dict[str, tuple[str, ...]] = {
    "tensorflow.python.eager.polymorphic_function.polymorphic_function:Function": ("_autograph",),
    _EXTENDED: (
        "_cluster_spec",
        "_collective_key_base",
        "_collective_keys",
        "_communication_options",
        "_cross_device_ops",
        "_host_cross_device_ops",
        "_id_in_cluster",
        "_num_workers",
        "_std_server_started",
    ),
    _LAUNCHER: ("_collective_keys", "_device", "_group_key", "_group_size", "_options"),
    "tensorflow.python.distribute.cross_device_ops:CollectiveAllReduce": ("_launchers",),
    f"{_INPUT}:DistributedIterator": (
        "_cardinality",
        "_input_workers",
        "_iterators",
        "_replica_order",
        "_strategy",
    ),
    "tensorflow.python.distribute.values:PerReplicaSpec": ("_value_specs",),
    "tensorflow.python.distribute.values:DistributedValues": ("_values",),
    "keras:Variable": ("_shape", "_value"),
    "keras:layers.Layer": ("_non_trainable_variables", "_seed_generators"),
    "keras:Optimizer": (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
        "_learning_rate",
        "_model_variables_moving_average",
        "_trainable_variables",
    ),
    "keras:metrics.MeanMetricWrapper": ("_fn_kwargs",),
    _MODEL: ("_initial_epoch", "_loss_tracker"),
}

# What only some of the versions have; `_tf_private` asks for it before it is used.
OPTIONAL = {"_autoconvert_optionals"}


def check() -> None:
    """Makes sure that all names are there and as expected.

    Raises:
        ImportError: names the first that is not, and the versions all were checked on.
    """
    for problem in _problems():
        raise ImportError(
            f"tfqcomm does not fit the installed TensorFlow {_version('tensorflow')} and Keras "
            f"{_version('keras')}: {problem}. It was checked on {CHECKED_ON}: install one of "
            "these, or a newer tfqcomm."
        )


def _problems() -> Iterator[str]:
    for name, parameters in NAMES.items():
        found = _find(name)
        if found is None:
            yield f"{name} is missing"
        elif parameters is not None and not _takes(found, parameters):
            yield f"{name} takes {inspect.signature(found)}, where {parameters} was expected"
    for owner, names in SET.items():
        known = _attributes(_find(owner))
        for name in names:
            if name not in known:
                yield f"{owner} has no attribute {name}"


def _find(name: str):
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _takes(function, names: tuple[str, ...]) -> bool:
    """Whether a function has these parameters, and no others that must be given."""
    parameters = list(inspect.signature(function).parameters.values())
    known = {parameter.name for parameter in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known.update(names)
    required = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    required -= {p.name for p in parameters if p.kind is p.VAR_POSITIONAL}
    return set(names) <= known and required - {"self", "cls"} <= set(names)


def _attributes(owner: type | None) -> set[str]:
    """What a class and its bases define, or name in the code of their methods."""
    found = set()
    for base in getattr(owner, "__mro__", ()):
        for name, member in vars(base).items():
            found.add(name)
            code = getattr(inspect.unwrap(getattr(member, "fget", member)), "__code__", None)
            found.update(code.co_names if code else ())
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


check()
