"""A warm-up: the first steps are those without compression, the others those with it."""

import keras
import numpy as np
import pytest

from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    build,
    compressing,
    random_gradients,
)
from tests.step.error_feedback_reference import means_of_messages, sgd
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.compressors import AdaptiveTopK, BlockSign, PowerSGD, Ternary, TopK
from tfqcomm.optimizers import CompAMS, DiLoCo, OneBitAdam
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions

SHAPES = [(40, 30), (7,)]
STEPS, WARM_UP = 12, 5
CODECS = [
    TopK(0.1),
    BlockSign(),
    Ternary(shared_scale=True),
    AdaptiveTopK(0.1),
    PowerSGD(2),
    "float16",
    {"variable0": TopK(0.1), "*": "bfloat16"},
]


def run(compressor, gradients, start=None, **options):
    """The strategy, an SGD, its variables, and their values after each step, in one trace."""
    strategy = compressing(2, compressor, **options)
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(0.1), SHAPES)
    for variable, value in zip(variables, start or [], strict=False):
        variable.assign(value)
    return (
        strategy,
        optimizer,
        variables,
        apply_gradients(strategy, optimizer, variables, gradients),
    )


@pytest.mark.parametrize("codec", [TopK(0.1), BlockSign()], ids=str)
def test_steps_are_those_of_a_reference(codec):
    gradients = random_gradients(STEPS, 2, SHAPES)
    options = {"schedule": "all_gather", "warm_up": WARM_UP}
    strategy, optimizer, variables, found = run(codec, gradients, **options)
    start = build(strategy, lambda: keras.optimizers.SGD(0.1), SHAPES)[1]
    for variable, values, g in zip(start, found, gradients, strict=True):
        dense = g[:WARM_UP].mean(axis=1, dtype=np.float32)
        (later,) = means_of_messages([codec], [g[WARM_UP:]])
        expected = sgd(variable.numpy(), np.concatenate([dense, later]), [0.1] * STEPS)
        np.testing.assert_allclose(values, expected, atol=2e-5)
    assert_replicas_equal(strategy, [*variables, *optimizer.variables])
    traffic = ledger_of(optimizer).meter.read()
    _, other, _, _ = run(codec, [g[:1] for g in gradients], schedule="all_gather")
    compressed = ledger_of(other).meter.read().bytes_sent
    assert compressed < 4 * 1207 / 3
    assert traffic.bytes_sent == WARM_UP * 4 * 1207 + (STEPS - WARM_UP) * compressed
    assert traffic.dense_bytes == STEPS * 4 * 1207
    assert str(ledger_of(optimizer).routes[0]).endswith(
        f"{codec} after {WARM_UP} steps of float32, all_gather"
    )


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_codec_begins_when_the_warm_up_is_over(codec):
    """With what it would be from there on alone, and not with residuals of before."""
    gradients = random_gradients(STEPS, 2, SHAPES)
    dense = run(None, gradients)[-1]
    strategy, optimizer, variables, found = run(codec, gradients, warm_up=WARM_UP)
    for values, expected in zip(found, dense, strict=True):
        np.testing.assert_allclose(values[:WARM_UP], expected[:WARM_UP], atol=1e-6)
    assert np.abs(found[0][WARM_UP:] - dense[0][WARM_UP:]).max() > 1e-6
    assert_replicas_equal(strategy, [*variables, *optimizer.variables])
    if not any(getattr(codec, kind, True) for kind in ("adaptive", "low_rank", "integer")):
        begin = [value[WARM_UP - 1] for value in dense]
        alone = run(codec, [g[WARM_UP:] for g in gradients], start=begin)[-1]
        for values, expected in zip(found, alone, strict=True):
            np.testing.assert_allclose(values[WARM_UP:], expected, atol=1e-5)


def test_steps_that_are_skipped_do_not_count():
    gradients = random_gradients(8, 2, SHAPES)
    gradients[0][2, 1, 3, 3] = np.nan
    _, optimizer, _, found = run(TopK(0.1), gradients, warm_up=4)
    dense = run(None, gradients)[-1]
    np.testing.assert_allclose(found[0][4], dense[0][4], atol=1e-6)  # the fourth that is taken
    assert np.abs(found[0][5] - dense[0][5]).max() > 1e-3
    assert ledger_of(optimizer).meter.read().skipped_steps == 1


X = np.random.default_rng(0).normal(size=[32, 16]).astype("float32")


def compiled(optimizer=None, world=2, **options):
    strategy = compressing(world, TopK(0.2), **options)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([16]), keras.layers.Dense(8)])
        model.compile(optimizer() if optimizer else keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def fit(model, epochs, **kwargs):
    model.fit(X, X[:, :8], batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def test_the_switch_needs_no_new_trace(monkeypatch):
    traced = []
    update = keras.optimizers.SGD.update_step
    monkeypatch.setattr(
        keras.optimizers.SGD, "update_step", lambda *a: traced.append(1) or update(*a)
    )
    model = compiled(warm_up=6)
    fit(model, 1)
    traces = len(traced)
    fit(model, 2)
    assert traces and len(traced) == traces
    assert ledger_of(model.optimizer).residuals.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("begun", [1, 3])
def test_a_run_that_was_interrupted_goes_on_with_its_count(begun, tmp_path):
    expected, stopped, again = (compiled(world=1, warm_up=6) for _ in range(3))
    fit(expected, 5)
    fit(stopped, begun, callbacks=[BackupAndRestore(tmp_path, delete_checkpoint=False)])
    fit(again, 5, callbacks=[BackupAndRestore(tmp_path)])
    for a, b in zip(again.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_optimizers_of_this_package_warm_up_too():
    """`CompAMS` as its strategy's would; the exchanges of `DiLoCo` by its steps."""

    def inner():
        return DiLoCo(keras.optimizers.SGD(0.1), 2, compressor=TopK(0.2), min_size=0, warm_up=5)

    for optimizer, dense_bytes in [
        (lambda: CompAMS(0.1, compressor=TopK(0.2), min_size=0, warm_up=3), 3 * 4 * 136),
        (inner, 2 * 4 * 136),
    ]:
        model = compiled(optimizer)
        fit(model, 1)  # four steps
        assert ledger_of(model.optimizer).meter.read().bytes_sent >= dense_bytes
        residuals = ledger_of(model.optimizer).residuals
        assert (residuals.norm() == 0) == isinstance(model.optimizer, DiLoCo)
        fit(model, 1)
        assert residuals.norm() > 0
        again = keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer))
        assert again.get_config()["warm_up"] in (3, 5)


def test_arguments():
    for value in (-1, 2.0, True, None, "auto"):
        expected = f"Argument `warm_up` must be a non-negative integer. Received: warm_up={value!r}"
        with pytest.raises(ValueError, match=expected):
            ExchangeOptions("top_k", warm_up=value)
    with pytest.raises(ValueError, match="`warm_up` of the optimizer is not supported.*warm_up=5"):
        options_of(CompAMS(warm_up=5), 1)
    assert OneBitAdam(warm_up=9).options.warm_up == 0
    assert OneBitAdam(warm_up=9).get_config()["warm_up"] == 9
