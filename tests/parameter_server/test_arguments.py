"""What does not fit is refused by name, before a cluster is joined."""

import keras
import pytest
import tensorflow as tf

from tfqcomm import compressors, optimizers
from tfqcomm.parameter_server import SparseWeights, Trainer
from tfqcomm.parameter_server.data import datasets, inspect_dataset, steps_of_epoch
from tfqcomm.parameter_server.messages.asynchronous import check_staleness
from tfqcomm.parameter_server.optimizers import options_of


def build_model():
    return keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])


def several_optimizers():
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD()))


def excluding_variables():
    optimizer = keras.optimizers.AdamW()
    optimizer.exclude_from_weight_decay(var_list=build_model().trainable_variables)
    return optimizer


class Above(keras.metrics.Metric):
    """Would be made with another limit than the one it was given."""

    def __init__(self, limit=0.5, name="above"):
        super().__init__(name=name)
        self._limit = limit


class StepOfItsOwn(optimizers.CompAMS):
    """A user's: servers would have left its `distributed_step` out without a word."""

    def distributed_step(self, gradients, variables, learning_rate):
        super().distributed_step([g / 2 for g in gradients], variables, learning_rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "eager"}, r"`mode` must be one of \['sync', 'async'\]. Received: mode='eager'"),
        ({"workers": 0}, r"`workers` must be a positive integer. Received: workers=0"),
        ({"parameter_servers": 1.5}, r"`parameter_servers` must be a positive integer."),
        ({"compressor": "zip"}, r"`compressor` must be None.*Received: compressor='zip'"),
        (
            {"compressor": "power_sgd"},
            r"`compressor` must be one whose messages a server decodes.*=PowerSGD\(rank=4",
        ),
        (
            {"optimizer": optimizers.CompAMS(compressor="power_sgd")},
            r"`compressor` must be one whose messages a server decodes.*=PowerSGD\(rank=4",
        ),
        ({"min_size": -1}, r"`min_size` must be a non-negative integer."),
        (
            {"row_codec": "int8", "row_feedback": 0},
            r"`row_feedback` must be 'all', None or a positive integer.*row_feedback=0",
        ),
        (
            {"row_codec": "int8", "row_feedback": True},
            r"`row_feedback` must be 'all', None or a positive integer.*row_feedback=True",
        ),
        (
            {"row_codec": "int8", "row_feedback": "auto"},
            r"`row_feedback` must be 'all', None or a positive integer.*row_feedback='auto'",
        ),
        (
            {"row_feedback": "all"},
            r"`row_feedback` must be None with row_codec='float32', which leaves nothing out",
        ),
        (
            {"weight_compressor": "zip"},
            r"`weight_compressor` must be None, `SparseWeights\(\)`.*weight_compressor='zip'",
        ),
        (
            {"optimizer": optimizers.CompAMS(), "compressor": "top_k"},
            r"`compressor` must be None with an optimizer that brings its own.*CompAMS with TopK",
        ),
        (
            {"optimizer": optimizers.LeaderSGD()},
            r"`optimizer` must be one whose workers send messages.*Received: optimizer=LeaderSGD",
        ),
        (
            {"optimizer": keras.optimizers.LossScaleOptimizer(optimizers.LeaderSGD())},
            r"`optimizer` must be one whose workers send messages.*Received: optimizer=LeaderSGD",
        ),
        (
            {"optimizer": several_optimizers()},
            r"`optimizer` must be one for all variables.*Received: optimizer=MultiOptimizer",
        ),
        (
            {"optimizer": keras.optimizers.SGD(lambda: 0.1)},
            r"`learning_rate` of the optimizer must be a float or.*SGD with a callable",
        ),
        (
            {"optimizer": excluding_variables()},
            r"must be named before the trainer makes its model.*an optimizer with `var_list`",
        ),
        (
            {"metrics": [Above(0.7)]},
            r"`Above.get_config\(\)` must tell all arguments.*Missing: \['limit'\]",
        ),
        (
            {"optimizer": keras.optimizers.Adam(use_ema=True)},
            r"`use_ema` of the optimizer is not supported.*use_ema=True",
        ),
        (
            {"optimizer": keras.optimizers.Adam(gradient_accumulation_steps=2)},
            r"`gradient_accumulation_steps` of the optimizer is not supported",
        ),
        (
            {"optimizer": optimizers.OneBitAdam()},
            r"those of OneBitAdam need more, which stays on the servers.*optimizer=OneBitAdam",
        ),
        (
            {"optimizer": optimizers.DeMo()},
            r"those of DeMo need more, which stays on the servers.*optimizer=DeMo",
        ),
        (
            {"optimizer": keras.optimizers.LossScaleOptimizer(StepOfItsOwn())},
            r"those of StepOfItsOwn need more, which stays on the servers",
        ),
        (
            {"optimizer": optimizers.CompAMS(granularity="model")},
            r"`granularity` of the optimizer must be 'tensor'.*granularity='model'",
        ),
        (
            {"optimizer": optimizers.QAdam(schedule="two_phase")},
            r"`schedule` of the optimizer must be 'auto' or 'all_gather'.*schedule='two_phase'",
        ),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Trainer(build_model, loss="mse", **arguments)


def test_refuses_a_model_instead_of_a_function():
    with pytest.raises(ValueError, match="`build_model` must be a function"):
        Trainer(build_model(), loss="mse")


def test_refuses_the_scope_of_a_strategy(mirrored_strategy):
    with (
        mirrored_strategy(2).scope(),
        pytest.raises(ValueError, match="must not be made in the scope.*MirroredStrategy"),
    ):
        Trainer(build_model, loss="mse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sync", 3, 2), r"`max_staleness` must be None with mode='sync'.*max_staleness=3"),
        (("async", 2, 4), r"`max_staleness` must be None or an integer from 3 on.*max_staleness=2"),
        (("async", True, 2), r"`max_staleness` must be None or an integer from 1 on"),
        (("sync", None, 2, True), r"`pull_ahead` must be False unless mode='async' and max_stale"),
        (("async", 3, 2, True), r"`pull_ahead` must be False unless.*max_staleness=3"),
        (("async", None, 2, 1), r"`pull_ahead` must be a bool\. Received: pull_ahead=1"),
    ],
)
def test_refuses_a_bound_that_cannot_hold(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_staleness(*arguments)


@pytest.mark.parametrize("task", ["worker", "ps"])
def test_other_tasks_are_told_what_to_run(task, monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}
    config = f'{{"cluster": {cluster}, "task": {{"type": "{task}", "index": 0}}}}'
    monkeypatch.setenv("TF_CONFIG", config.replace("'", '"'))
    with pytest.raises(ValueError, match=f"tfqcomm.launch --serve.*task={task} 0"):
        Trainer(build_model, loss="mse")


def test_a_cluster_needs_parameter_servers(monkeypatch):
    config = '{"cluster": {"worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}'
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="tasks of the jobs `worker` and `ps`"):
        Trainer(build_model, loss="mse")


def test_data():
    dataset = tf.data.Dataset.range(6).batch(2)
    with pytest.raises(ValueError, match="`dataset_fn` must be a function that returns a batched"):
        datasets(dataset, 2)
    with pytest.raises(ValueError, match="`dataset_fn` must return a batched tf.data.Dataset"):
        inspect_dataset(lambda: [1, 2])
    with pytest.raises(ValueError, match="`steps_per_epoch` must be a positive integer, or None"):
        steps_of_epoch(None, inspect_dataset(dataset.repeat)[1])
    assert steps_of_epoch(None, inspect_dataset(lambda: dataset)[1]) == 3
    assert steps_of_epoch(7, 3) == 7


def test_every_worker_has_data_of_its_own():
    first, second = datasets(lambda context: (context.input_pipeline_id, str(context)), 2)
    assert (first()[0], second()[0]) == (0, 1)


def test_sparse_weights_are_the_default_with_l1():
    from tfqcomm.parameter_server.payload import weight_codec

    assert weight_codec(None, optimizers.QRDAAdagrad(0.1, l1=1e-3)) == SparseWeights()
    assert weight_codec(None, optimizers.QRDAAdagrad(0.1)).lossless
    assert weight_codec(None, keras.optimizers.SGD()).lossless
    quantized = optimizers.QAdam(weight_compressor="uniform_grid")
    assert weight_codec(None, quantized) == quantized.weight_compressor


def test_messages_are_scaled_as_error_feedback_or_its_absence_needs_it():
    """A server decodes without knowing the option: the codec itself has to be the right one."""
    for feedback, compressor, keeps, factor in [
        ("auto", compressors.RandomK(0.1), True, 1.0),
        (False, compressors.RandomK(0.1), False, 10.0),
        ("auto", compressors.Ternary(clip=None), False, 1.0),
        (True, compressors.Ternary(clip=None, shared_scale=True), True, 2 / 11),
    ]:
        arguments = {"compressor": compressor, "error_feedback": feedback, "min_size": 0, "seed": 0}
        options = options_of(keras.optimizers.Adam(), 100, **arguments)
        assert options.feedback == keeps
        assert options.codec == options.compressor
        ones = tf.ones([100])
        decoded = options.compressor.decode(options.compressor.encode(ones), 100)
        assert float(tf.reduce_max(decoded)) == pytest.approx(factor)
