"""An optimizer's two halves on a parameter-server cluster, made of the user's one object."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private, compressors
from tfqcomm.optimizers.base import CompressedOptimizer
from tfqcomm.step.halves import WorkerHalf
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.policy import Policy

# What each element's step depends on: itself alone. Others see the whole tensor: its norm, say.
_ELEMENTWISE = {
    *("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion"),
    *("ScheduleFreeAdamW", "CompAMS", "QAdam", "QCMDAdagrad", "QRDAAdagrad", "AdaptiveTopKSGD"),
    "LeaderSGD",
}
# Options of a step that the workers of parameter servers do not take.
_ALL_REDUCE_ONLY = {
    *("residual_decay", "warm_up", "scale_residual", "accumulate", "embedding_rows"),
    "hierarchical",
}


def inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer itself, without the `LossScaleOptimizer` that `compile` may put around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def whole_only(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> str | None:
    """Why a server must hold all rows of `variable`; None if parts of it do as well."""
    name = type(inner(optimizer)).__name__
    if name not in _ELEMENTWISE:
        return f"a step of {name} depends on the whole of a variable"
    if not isinstance(variable.constraint, (type(None), keras.constraints.NonNeg)):
        return f"its constraint {type(variable.constraint).__name__} depends on the whole of it"
    return None


def check(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuses what has no two halves, or needs more than Keras' `update_step`.

    Raises:
        ValueError: saying what to use instead.
    """
    optimizer = inner(optimizer)
    name = type(optimizer).__name__
    if isinstance(optimizer, _tf_private.OptimizerSeam) and not hasattr(optimizer, "options"):
        raise ValueError(
            "Argument `optimizer` must be one whose workers send messages, such as CompAMS, QAdam, "
            "QCMDAdagrad, QRDAAdagrad, AdaptiveTopKSGD or any optimizer of Keras: the workers of "
            f"{name} train on their own. Use it under a MirroredStrategy or "
            "`tfqcomm.distribute.MultiWorkerMirroredStrategy`; for LeaderSGD there is "
            f"`tfqcomm.parameter_server.LeaderTrainer`. Received: optimizer={name}"
        )
    _check_worker_half(optimizer)
    _check_arguments(optimizer)
    options = getattr(optimizer, "options", None)
    if options is not None and options.granularity != "tensor":
        raise ValueError(
            "Argument `granularity` of the optimizer must be 'tensor' with parameter servers, "
            f"which hold one tensor each. Received: granularity={options.granularity!r}"
        )
    if options is not None and options.schedule not in ("auto", "all_gather"):
        raise ValueError(
            "Argument `schedule` of the optimizer must be 'auto' or 'all_gather' with parameter "
            f"servers, which replace collectives. Received: schedule={options.schedule!r}"
        )


def _check_worker_half(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuses optimizers whose messages a worker cannot make of its gradient and its own state."""
    if not isinstance(optimizer, CompressedOptimizer):
        return
    own_step = type(optimizer).distributed_step is not CompressedOptimizer.distributed_step
    if optimizer.reads_server or optimizer.warms_up or own_step:
        name = type(optimizer).__name__
        raise ValueError(
            "Argument `optimizer` must be one whose workers make messages of their gradients and "
            "of what they remember themselves, such as CompAMS, QAdam or any optimizer of Keras: "
            f"those of {name} need more, which stays on the servers. Use it under a "
            "MirroredStrategy or `tfqcomm.distribute.MultiWorkerMirroredStrategy`. "
            f"Received: optimizer={name}"
        )


def check_leader(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuses what does not elect leaders.

    Raises:
        ValueError: saying what to use instead.
    """
    optimizer = inner(optimizer)
    name = type(optimizer).__name__
    if not hasattr(optimizer, "leader_compressor"):
        raise ValueError(
            "Argument `optimizer` must be a `tfqcomm.optimizers.LeaderSGD`. For other optimizers "
            f"there is `tfqcomm.parameter_server.Trainer`. Received: optimizer={name}"
        )
    if not optimizer.leader_compressor.lossless:
        raise ValueError(
            "Argument `leader_compressor` of the optimizer must be None: use `weight_compressor` "
            "of the trainer, since the weights themselves are encoded, not differences. "
            f"Received: leader_compressor={optimizer.leader_compressor}"
        )
    _check_arguments(optimizer)


def _check_arguments(optimizer: keras.optimizers.Optimizer) -> None:
    """Refuses what no worker's step takes into account."""
    name = type(optimizer).__name__
    if hasattr(optimizer, "optimizers"):
        raise ValueError(
            "Argument `optimizer` must be one for all variables: a server keeps the state of one. "
            f"Received: optimizer={name}"
        )
    if _tf_private.calls_for_learning_rate(optimizer):
        raise ValueError(
            "Argument `learning_rate` of the optimizer must be a float or a "
            "`keras.optimizers.schedules.LearningRateSchedule`: servers cannot call a function of "
            f"the chief's. Received: optimizer={name} with a callable"
        )
    for argument in ("use_ema", "gradient_accumulation_steps"):
        if getattr(optimizer, argument):
            raise ValueError(
                f"Argument `{argument}` of the optimizer is not supported with parameter servers. "
                f"Received: {argument}={getattr(optimizer, argument)}"
            )


def options_of(
    optimizer: keras.optimizers.Optimizer, elements: int, **arguments
) -> ExchangeOptions:
    """How the messages of `optimizer` are compressed: by its own compressor, or by the trainer's.

    Args:
        elements: of all tensors that are compressed. Adaptive top-k keeps its average number of
            them at every step: how many a step needs is known to all-reduce strategies only.
        **arguments: of the trainer, for optimizers without options of their own.

    Raises:
        ValueError: for codecs whose messages a server cannot decode.
    """
    return served(
        getattr(inner(optimizer), "options", None) or ExchangeOptions(**arguments), elements
    )


def served(options: ExchangeOptions, elements: int) -> ExchangeOptions:
    """Such options, as far as the messages of workers to servers have them; see `options_of`."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in _ALL_REDUCE_ONLY and value != field.default:
            raise ValueError(
                f"Argument `{field.name}` of the optimizer is not supported with parameter "
                f"servers. Received: {field.name}={value!r}"
            )
    if isinstance(options.compressor, Policy):
        raise ValueError(
            "Argument `compressor` must be one compressor with parameter servers: policies by path "
            "are for a MirroredStrategy or `tfqcomm.distribute.MultiWorkerMirroredStrategy`. "
            f"Received: compressor={options.compressor}"
        )
    compressor: Any = options.compressor
    if compressor.low_rank:
        raise ValueError(
            "Argument `compressor` must be one whose messages a server decodes by themselves, such "
            "as 'top_k' or 'block_sign': of low rank are means over all workers, between two "
            "all-reduces. Use it under a MirroredStrategy or "
            f"`tfqcomm.distribute.MultiWorkerMirroredStrategy`. Received: compressor={compressor}"
        )
    if compressor.adaptive:
        adaptive = cast(compressors.AdaptiveTopK, compressor)
        if adaptive.schedule is not None:
            raise ValueError(
                "Argument `budget` must not be a schedule with parameter servers, where the number "
                f"of entries is fixed. Received: budget={adaptive.schedule}"
            )
        kept = adaptive.num_kept(elements)
        ratio = kept / elements if elements else 1.0
        compressor = compressors.TopK(ratio)
    if compressor.integer:  # a server decodes each message by itself
        compressor = dataclasses.replace(compressor, shared_scale=False)
    if compressor.shared_support:
        compressor = dataclasses.replace(compressor, support="own")
    options = dataclasses.replace(options, compressor=compressor, schedule="auto")
    return ExchangeOptions(
        options.codec,  # scaled as error feedback, or its absence, needs it
        error_feedback=options.feedback,
        min_size=options.min_size,
        seed=options.seed,
    )


def worker_half(optimizer: keras.optimizers.Optimizer) -> WorkerHalf | None:
    """The optimizer itself, if its workers compute more than a gradient."""
    optimizer = inner(optimizer)
    return optimizer if getattr(optimizer, "worker_slots", None) else None


def server_optimizer(
    optimizer: keras.optimizers.Optimizer, share: float = 1.0
) -> keras.optimizers.Optimizer:
    """One like `optimizer`, on the current device, whose `apply` takes means of messages.

    Gradients were unscaled and clipped by the worker, and nothing is left to exchange. Where a
    step takes only a `share` of the mean, so it does of the l1 norm, which would act W times as
    strongly otherwise.
    """
    optimizer = inner(optimizer)
    config = optimizer.get_config()
    config |= dict.fromkeys(("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"))
    if "l1" in config:
        config["l1"] *= share
    clone = type(optimizer).from_config(config)
    if isinstance(clone, _tf_private.OptimizerSeam):
        clone.__dict__["distributed_step"] = functools.partial(_update, clone)  # of this one alone
    return clone


def _update(optimizer, means, variables, learning_rate):
    variables = [v.value for v in variables]
    strategy = tf.distribute.get_strategy()
    _tf_private.update_variables(optimizer, strategy, variables, means, learning_rate)


def server_variable(value: np.ndarray, like: keras.Variable, name: str) -> keras.Variable:
    """A float32 variable for a piece of `like`, named so that optimizers know both.

    Muon looks for "embedding" in the path, and `slots_of` for the piece's name at its end.
    """
    with contextlib.ExitStack() as scopes:
        for part in like.path.split("/"):
            scopes.enter_context(keras.name_scope(part))
        variable = keras.Variable(np.asarray(value, np.float32), dtype="float32", name=name)
    variable.constraint = like.constraint
    return variable


def slots_of(
    optimizer: keras.optimizers.Optimizer,
) -> tuple[list[keras.Variable], dict[str, list[keras.Variable]]]:
    """An optimizer's variables: shared ones such as `iterations`, and those of each piece, by name.

    Args:
        optimizer: built for variables that are named as pieces are.
    """
    shared: list[keras.Variable] = []
    slots: dict[str, list[keras.Variable]] = {}
    for variable in optimizer.variables:
        names = re.findall(r"variable\d+_row\d+", variable.path.rpartition("/")[2])
        if names:
            slots.setdefault(names[-1], []).append(variable)
        else:
            shared.append(variable)
    return shared, slots


def slots_by_variable(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> tuple[list[keras.Variable], list[list[keras.Variable]]]:
    """Likewise of an optimizer built for any variables: the slots of each, in the same order.

    Keras does not say which slot belongs to which variable; one like it, built for variables with
    names that tell, has the same slots in the same places.
    """
    optimizer = inner(optimizer)
    clone = server_optimizer(optimizer)
    names = [f"variable{i}_row0" for i in range(len(variables))]
    clone.build(
        [server_variable(np.zeros(v.shape), v, n) for n, v in zip(names, variables, strict=True)]
    )
    place = {id(v): i for i, v in enumerate(clone.variables)}
    shared, slots = slots_of(clone)

    def originals(found):
        return [optimizer.variables[place[id(v)]] for v in found]

    by_variable = [slots.get(name, []) for name in names]
    return originals(shared), [originals(found) for found in by_variable]
