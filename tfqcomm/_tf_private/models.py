"""Keras' models: what they hold, and how they are built."""

from __future__ import annotations

import inspect
import weakref
from typing import TypeAlias

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.trainers.data_adapters import tf_dataset_adapter

from tfqcomm._tf_private.hooks import is_wrapped, wrap

_Weak: TypeAlias = weakref.WeakKeyDictionary
_models: _Weak = _Weak()  # optimizer -> weak reference to the model it trains
_called: _Weak = _Weak()  # layer -> None; in the order of first calls, as everywhere
_trained: _Weak = _Weak()  # optimizer -> weak references to those it trains


def remember_models() -> None:
    """Notes what an optimizer may train: the model of a `fit`, and layers that a replica calls.

    An optimizer sees trainable variables only; the moving statistics of batch normalization are
    reached through the layers that hold both.
    """
    if not is_wrapped(keras.Model.make_train_function):
        wrap(keras.Model, "make_train_function", _note_model)
        wrap(keras.layers.Layer, "__call__", _note_call)


def agree_before_compile() -> None:
    """Lets workers compare their optimizers before `compile` creates the optimizers' variables.

    Afterwards it is too late: one worker creates a variable while the other does something else.
    Also lets an optimizer say that XLA cannot compile its step (`supports_jit`, as layers do),
    where Keras decides by itself.
    """
    if not is_wrapped(keras.Model.compile):
        wrap(keras.Model, "compile", _agree_and_compile)


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
    """Builds a model, its losses and its metrics for batches of this spec, computing nothing.

    The optimizer is left to the caller.
    """
    vars(model.optimizer)["build"] = lambda variables: None
    try:
        model._symbolic_build(data_batch=element_spec)
    finally:
        del vars(model.optimizer)["build"]


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


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers, also those within others, each once."""
    return list({id(layer): layer for layer in model._flatten_layers()}.values())


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
